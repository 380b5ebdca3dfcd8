"""The layers of a tile of the procedural city, and what the sensors see of them.

The image alone is ambiguous on purpose. To keep shadows from giving the answer away, some low
things throw the shadow of a tall one: `Canvas.caster` is the height that throws shadows,
`Canvas.relief` the surface that the sun shades, and `Canvas.height` the truth, which goes to the
DSM.

Lengths are metres and angles radians throughout; x runs along columns and y along rows."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

PIXEL = 0.09  # metres
IMPERVIOUS, BUILDING, LOW, TREE, CAR, CLUTTER = range(6)  # as in `layouts.ISPRS_CLASSES`

# Albedos in the image's bands: near infrared, red, green.
ASPHALT = (0.38, 0.39, 0.41)
LAWN = (0.66, 0.33, 0.34)


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise (H, W) float32, mean about 0, deviation about 0.7, with features of `cell`
    pixels.
    """
    rows, columns = shape[0] // cell + 3, shape[1] // cell + 3
    grid = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    field = np.asarray(grid.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC))
    return field[cell : cell + shape[0], cell : cell + shape[1]]


def turned(x: float, y: float, angle: float, a: float, b: float) -> tuple[float, float]:
    """Where the point is that lies `a` along the angle and `b` to its right from (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    return x + a * c - b * s, y + a * s + b * c


def blur(x: np.ndarray) -> np.ndarray:
    """Binomial blur (1 2 1) along both axes of (H, W) or (H, W, C)."""
    x = np.pad(x, [(1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
    return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


class Canvas:
    """The layers of a tile in the making, and the textures that all its objects share. Everything
    is lawn at first.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int):
        self.rng, self.shape = rng, (height, width)
        fine, small, large, stains, veins = (
            noise(rng, self.shape, cell) for cell in (1, 4, 60, 14, 45)
        )
        # Textures are fields over the whole tile, so that asphalt is the same asphalt on a roof and
        # on the street.
        cracks = 0.16 * (np.abs(veins) < 0.012)
        self.asphalt = 0.07 * fine + 0.04 * small + 0.05 * stains + 0.04 * large - cracks
        self.leaves = 0.7 * noise(rng, self.shape, 6) + 0.5 * small + 0.25 * fine
        self.grass = 0.05 * fine + 0.04 * stains + 0.08 * large
        self.tone = np.float32(ASPHALT) * rng.uniform(0.92, 1.08)
        self.albedo = np.float32(LAWN) * (1 + self.grass)[..., None]
        self.labels = np.full(self.shape, LOW, np.uint8)
        self.height = 0.05 * (1 + small)  # above the terrain, as it goes to the DSM
        self.caster = np.zeros(self.shape, np.float32)  # above the terrain, as it throws shadows
        self.relief = 0.02 * small  # the surface that the sun shades

    def frame(self, x: float, y: float, angle: float, reach: float):
        """The pixels within `reach` of (x, y): their window, and coordinates (a, b) about that
        point, a along angle.
        """
        top, left = (max(0, math.floor((p - reach) / PIXEL)) for p in (y, x))
        bottom, right = (max(0, math.ceil((p + reach) / PIXEL)) for p in (y, x))
        window = slice(top, min(bottom, self.shape[0])), slice(left, min(right, self.shape[1]))
        dy = (np.arange(*window[0].indices(self.shape[0]), dtype=np.float32) * PIXEL - y)[:, None]
        dx = (np.arange(*window[1].indices(self.shape[1]), dtype=np.float32) * PIXEL - x)[None, :]
        c, s = math.cos(angle), math.sin(angle)
        return window, c * dx + s * dy, c * dy - s * dx

    def rectangle(self, x: float, y: float, angle: float, length: float, width: float):
        """Window, coordinates and mask of a rectangle: `length` along `angle`, `width` across."""
        window, a, b = self.frame(x, y, angle, math.hypot(length, width) / 2)
        return window, a, b, (np.abs(a) < length / 2) & (np.abs(b) < width / 2)

    def paint(self, window, mask, label=None, albedo=None, height=None, caster=None, relief=0.0):
        """Writes layers where mask holds, from numbers or arrays of the window. Without a caster,
        the height is one.
        """

        def put(layer, value):
            layer[window][mask] = value[mask] if np.shape(value)[:2] == mask.shape else value

        caster = height if caster is None else caster
        layers = (self.relief, self.labels, self.albedo, self.height, self.caster)
        for layer, value in zip(layers, (relief, label, albedo, height, caster)):
            if value is not None:
                put(layer, value)

    def asphalt_albedo(self, window) -> np.ndarray:
        """Asphalt of a slightly varying age, (h, w, 3): the one paint of streets, yards and flat
        roofs.
        """
        return self.tone * self.rng.uniform(0.93, 1.07) * (1 + self.asphalt[window])[..., None]


# ----------------------------------------------------------------------------- what the sensors see


def shadows(caster: np.ndarray, toward_x: float, toward_y: float, rise: float) -> np.ndarray:
    """How far each pixel lies in shade, 0 to 1: marches towards the sun, whose ray rises `rise`
    metres per metre.
    """
    rows, columns = caster.shape
    above = np.zeros_like(caster)
    step = 2 * PIXEL
    for k in range(1, int(caster.max() / rise / step) + 1):
        dy, dx = round(toward_y * k * 2), round(toward_x * k * 2)
        if abs(dy) >= rows or abs(dx) >= columns:
            break
        here = slice(max(0, -dy), rows - max(0, dy)), slice(max(0, -dx), columns - max(0, dx))
        there = slice(max(0, dy), rows - max(0, -dy)), slice(max(0, dx), columns - max(0, -dx))
        above[here] = np.maximum(above[here], caster[there] - caster[here] - rise * step * k)
    return np.clip(above / 0.4, 0, 1)


def photograph(canvas: Canvas) -> np.ndarray:
    """The image, uint8 (H, W, 3): sun and sky on the albedo, then lens, sensor and laboratory."""
    rng = canvas.rng
    # the sun stands high in the south
    azimuth, elevation = math.pi / 2 + rng.uniform(-1.0, 1.0), rng.uniform(0.92, 1.10)
    toward_x, toward_y, rise = math.cos(azimuth), math.sin(azimuth), math.tan(elevation)
    slope_y, slope_x = (np.clip(g / PIXEL, -1.6, 1.6) for g in np.gradient(canvas.relief))
    steepness = np.sqrt(1 + slope_x**2 + slope_y**2)
    facing = (rise - toward_x * slope_x - toward_y * slope_y) / (rise * steepness)
    sun = np.clip(facing, 0, 1.5) * (1 - blur(shadows(canvas.caster, toward_x, toward_y, rise)))
    light = np.float32((0.32, 0.35, 0.39)) + np.float32((0.68, 0.65, 0.61)) * sun[..., None]
    image = blur(canvas.albedo * light) * rng.uniform(0.92, 1.08) * rng.uniform(0.96, 1.04, 3)
    image += 0.012 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)


def measure_heights(canvas: Canvas) -> np.ndarray:
    """The surface model, float32 (H, W) metres: terrain and objects, soft and noisy as image
    matching leaves them.
    """
    rng, (rows, columns) = canvas.rng, canvas.shape
    y, x = np.arange(rows)[:, None] * PIXEL, np.arange(columns)[None, :] * PIXEL
    level, tilt_x, tilt_y = rng.uniform((262, -0.025, -0.025), (286, 0.025, 0.025))
    terrain = level + tilt_x * x + tilt_y * y + 0.4 * noise(rng, canvas.shape, 250)
    error = 0.06 * noise(rng, canvas.shape, 1) + 0.05 * noise(rng, canvas.shape, 7)
    return (terrain + blur(blur(canvas.height)) + error).astype(np.float32)
