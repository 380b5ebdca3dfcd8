"""The layers of a tile of the procedural city; the textures and materials that its things share.

Of things that look alike some are low and some are high: a material is one paint, whether it lies
on the ground or on a roof, and so is foliage. The ground is not flat either, so that a height says
little before it is compared with those about it.

Whatever reaches a pixel comes of +, -, *, / and roots of arrays, of random draws, and of sines that
are rounded: the same bits from any numpy.

Lengths are metres and angles radians throughout; x runs along columns and y along rows."""

from __future__ import annotations

import math

import numpy as np

PIXEL = 0.09  # metres
IMPERVIOUS, BUILDING, LOW, TREE, CAR, CLUTTER = range(6)  # as in `layouts.ISPRS_CLASSES`

# Albedos in the image's bands: near infrared, red, green.
MATERIALS = {
    "asphalt": (0.38, 0.39, 0.41),
    "concrete": (0.54, 0.53, 0.52),
    "gravel": (0.50, 0.45, 0.40),
    "clay": (0.56, 0.46, 0.33),
}
LAWN, STRAW = (0.66, 0.33, 0.34), (0.60, 0.44, 0.37)  # in spring, at the end of summer
# Foliage in summer and in autumn: lime, birch, copper beech, conifer.
LEAVES = (
    ((0.62, 0.20, 0.25), (0.60, 0.42, 0.30)),
    ((0.80, 0.28, 0.35), (0.70, 0.52, 0.36)),
    ((0.55, 0.25, 0.15), (0.52, 0.38, 0.20)),
    ((0.36, 0.10, 0.17), (0.36, 0.12, 0.17)),
)
# No pixel: a window, and coordinates in it.
NOWHERE = ((slice(0, 0), slice(0, 0)), *np.zeros((2, 0, 0), np.float32))


def mix(easy: float, hard: float, difficulty: float) -> float:
    """From `easy` at a difficulty of 0 to `hard` at 1, and on."""
    return easy + (hard - easy) * difficulty


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise (H, W) float32, mean 0, deviation about 0.75 (1 for a cell of 1), with features
    of `cell` pixels."""
    field = rng.standard_normal([side // cell + 3 for side in shape], dtype=np.float32)
    for axis, side in enumerate(shape if cell > 1 else ()):
        k, rest = np.divmod(np.arange(side) + rng.integers(cell), cell)
        t = (rest / cell).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        left = field.take(k, axis)
        field = left + (field.take(k + 1, axis) - left) * (t * t * (3 - 2 * t))
    return field[: shape[0], : shape[1]]


def wave(t):
    """A wave of period 1 between -1 and 1 that looks like a sine, of arrays or numbers."""
    t = t % 1 - 0.5
    return 16 * t * (abs(t) - 0.5)


def direction(angle: float) -> tuple[float, float]:
    """Cosine and sine, rounded to what every library agrees on."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def turned(x: float, y: float, angle: float, a: float, b: float) -> tuple[float, float]:
    """Where the point is that lies `a` along the angle and `b` to its right from (x, y)."""
    c, s = direction(angle)
    return x + a * c - b * s, y + a * s + b * c


def blur(x: np.ndarray, step: int = 1) -> np.ndarray:
    """Binomial blur (1 2 1), the taps `step` pixels apart, along both axes of (H, W[, C])."""
    x = np.pad(x, [(step, step)] * 2 + [(0, 0)] * (x.ndim - 2), mode="edge")
    x = (x[: -2 * step] + 2 * x[step:-step] + x[2 * step :]) / 4
    return (x[:, : -2 * step] + 2 * x[:, step:-step] + x[:, 2 * step :]) / 4


def shifted(shape: tuple[int, int], dy: int, dx: int):
    """Two windows of one size: the pixels (row, column), and those at (row + dy, column + dx)."""
    (rows, columns), dy = shape, max(-shape[0], min(shape[0], dy))
    dx = max(-columns, min(columns, dx))
    here = slice(max(0, -dy), rows - max(0, dy)), slice(max(0, -dx), columns - max(0, dx))
    return here, (slice(max(0, dy), rows + min(0, dy)), slice(max(0, dx), columns + min(0, dx)))


def textured(colour, texture: np.ndarray) -> np.ndarray:
    """A colour with a texture (h, w) about 0 -> (h, w, 3) float32."""
    return np.float32(colour) * (1 + texture)[..., None]


class Canvas:
    """The layers of a tile in the making, and the textures that all its objects share. Everything
    is lawn at first, on a slope."""

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, difficulty=1.0, season=0.3
    ):
        self.rng, self.shape = rng, (height, width)
        self.difficulty, self.season = difficulty, season  # 0 spring, 1 late autumn
        fine, small, large, stains, veins = (
            noise(rng, self.shape, cell) for cell in (1, 4, 60, 14, 45)
        )
        # Textures are fields over the whole tile, so that asphalt is the same asphalt on a roof and
        # on the street.
        cracks = 0.16 * (np.abs(veins) < 0.012).astype(np.float32)
        asphalt = 0.07 * fine + 0.04 * small + 0.05 * stains + 0.04 * large - cracks
        coarse = 0.13 * fine + 0.10 * small + 0.05 * stains
        self.textures = {"asphalt": asphalt, "concrete": 0.6 * asphalt, "gravel": coarse}
        self.textures["clay"] = 0.8 * asphalt
        self.leaves = 0.7 * noise(rng, self.shape, 6) + 0.5 * small + 0.25 * fine
        self.grass = 0.05 * fine + 0.04 * stains + 0.08 * large
        self.tones = {name: rng.uniform(0.9, 1.1) for name in MATERIALS}
        self.ripe = np.clip(season + difficulty * 0.25 * (large + stains), 0, 1)
        self.albedo = self.lawn((slice(0, height), slice(0, width)))
        self.labels = np.full(self.shape, LOW, np.uint8)
        self.ground = self.terrain()  # above the sea
        self.height = 0.05 * (1 + small)  # above the ground
        self.relief = 0.02 * small  # above the ground, as the sun shades it
        self.moving = np.zeros(self.shape, bool)  # here in the one picture, gone in the next

    def terrain(self) -> np.ndarray:
        """Slopes and hills, float32 (H, W) metres above the sea."""
        rng, steep = self.rng, mix(0.025, 0.09, self.difficulty)
        level, tilt_x, tilt_y = rng.uniform(262, 286), rng.uniform(-1, 1), rng.uniform(-1, 1)
        y, x = (np.arange(side, dtype=np.float32) * PIXEL for side in self.shape)
        slope = steep * (tilt_x * x[None, :] + tilt_y * y[:, None])
        return level + slope + mix(0.4, 0.9, self.difficulty) * noise(rng, self.shape, 250)

    def frame(self, x: float, y: float, angle: float, reach: float):
        """The pixels within `reach` of (x, y): their window, and coordinates (a, b) about that
        point, a along angle."""
        top, left = (max(0, math.floor((p - reach) / PIXEL)) for p in (y, x))
        bottom, right = (max(0, math.ceil((p + reach) / PIXEL)) for p in (y, x))
        if min(bottom, right) == 0 or top >= self.shape[0] or left >= self.shape[1]:
            return NOWHERE  # most of what is drawn lies beyond a small tile
        window = slice(top, min(bottom, self.shape[0])), slice(left, min(right, self.shape[1]))
        dy = (np.arange(*window[0].indices(self.shape[0]), dtype=np.float32) * PIXEL - y)[:, None]
        dx = (np.arange(*window[1].indices(self.shape[1]), dtype=np.float32) * PIXEL - x)[None, :]
        c, s = direction(angle)
        return window, c * dx + s * dy, c * dy - s * dx

    def rectangle(self, x: float, y: float, angle: float, length: float, width: float):
        """Window, coordinates and mask of a rectangle: `length` along `angle`, `width` across."""
        window, a, b = self.frame(x, y, angle, math.sqrt(length * length + width * width) / 2)
        return window, a, b, (np.abs(a) < length / 2) & (np.abs(b) < width / 2)

    def level(self, window, mask) -> np.ndarray:
        """Above the ground, (h, w): the level that evens out the ground below a mask."""
        ground = self.ground[window]
        below = ground[mask]
        return ((below.min() + below.max()) / 2 if below.size else 0) - ground

    def paint(self, window, mask, label=None, albedo=None, height=None, relief=0.0):
        """Writes layers where mask holds, from numbers or arrays of the window."""
        if not mask.size:
            return
        layers = (self.relief, self.labels, self.albedo, self.height)
        for layer, value in zip(layers, (relief, label, albedo, height)):
            if value is not None:
                own = np.shape(value)[:2] == mask.shape
                layer[window][mask] = value[mask] if own else value

    # The paints, (h, w, 3) float32 over a window: the same for whatever they cover.

    def material(self, window, name: str) -> np.ndarray:
        """A material of a slightly varying age."""
        tone = self.tones[name] * self.rng.uniform(0.93, 1.07)
        return np.float32(MATERIALS[name]) * (tone * (1 + self.textures[name][window]))[..., None]

    def lawn(self, window) -> np.ndarray:
        """Grass: of lawns, and of planted roofs."""
        green, dry, ripe = np.float32(LAWN), np.float32(STRAW), self.ripe[window][..., None]
        return textured(green + (dry - green) * ripe, self.grass[window])

    def foliage(self, window, colour) -> np.ndarray:
        """Leaves of a colour; they darken where they recede."""
        return textured(colour, 0.16 * self.leaves[window])

    def leaf_colour(self) -> np.ndarray:
        """Of a plant that is drawn, at its time of the year: (3,) float32."""
        rng = self.rng
        common = rng.random() < mix(0.75, 0.5, self.difficulty)
        summer, autumn = LEAVES[0 if common else int(rng.integers(len(LEAVES)))]
        turned_by = min(max(self.season * rng.uniform(0.5, 1.5) - 0.2, 0.0), 1.0)
        colour = [(s + (a - s) * turned_by) for s, a in zip(summer, autumn)]
        return np.float32(colour) * np.float32(rng.uniform(0.88, 1.12))
