"""Dead leaves: pictures of nothing, for an encoder to learn to see on. They show no city.

Shapes of many sizes (polygons, ellipses, blobs, ribbons, lines, rows of one shape) cover each
other on a plane. They share a few materials, which differ in colour and texture; some are domes or
ridges that the sun shades, some stand high and throw shadows; lens and sensor blur and spoil. What
comes with a picture is which pixels belong to one shape, and the shape's own colour.

Lengths are pixels and angles radians; `H, W` pixels, `h, w` those of a shape's window. After
Matheron's dead leaves model; that networks can be pre-trained on it is Baradad et al. 2021."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geodata.canvas import blur, shifted

SMALLEST = 4.0  # radius of a shape


@dataclass
class Picture:
    """A picture and what it shows."""

    image: np.ndarray  # (H, W, 3) uint8
    shapes: np.ndarray  # (H, W) uint16: the shape on top, 0 where there is none
    colors: np.ndarray  # (shapes, 3) uint8: the colour of each, without texture, light and noise


def make_picture(seed: int, index: int, size: int) -> Picture:
    """Picture `index` of the collection `seed`, size x size pixels. A function of its arguments."""
    rng = np.random.default_rng((seed, index))
    pile = Pile(rng, size)
    # Large shapes mostly lie below small ones, or nothing small would be left to see.
    radii = power_law(rng, int(rng.uniform(0.04, 0.4) * size), SMALLEST, size / 3)
    for radius in sorted(radii, key=lambda r: -r * rng.lognormal(0, 0.7)):
        pile.drop(float(radius))
    image = photograph(rng, pile)
    colors = np.clip(255 * np.stack(pile.colors) + 0.5, 0, 255).astype(np.uint8)
    return Picture(image, pile.shapes, colors)


def power_law(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """n numbers between low and high with a density of x ** -2."""
    return 1 / rng.uniform(1 / high, 1 / low, n)


def noise(rng: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Value noise (size, size) float32 of deviation 1, with features of `cell` pixels."""
    n = int(size / cell) + 3
    at = np.arange(size) / cell + rng.uniform(0, 1)
    left = at.astype(int)
    t = at - left
    t = (t * t * (3 - 2 * t))[:, None]
    grid = rng.standard_normal((n, n))
    rows = grid[left] * (1 - t) + grid[left + 1] * t  # (size, n)
    field = (rows[:, left].T * (1 - t) + rows[:, left + 1].T * t).T
    return (field / (field.std() + 1e-6)).astype(np.float32)


class Pile:
    """The layers of a picture in the making, and the materials that its shapes share."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.rng, self.size = rng, size
        self.fields = [noise(rng, size, c) for c in (1, 2, *rng.uniform((3, 10, 40), (8, 30, 120)))]
        rough = rng.choice((0.0, 1.0), p=(0.2, 0.8))  # a fifth of the pictures is without texture
        spread, center = rng.uniform(0.1, 0.35), rng.uniform(0.25, 0.65)
        hue = rng.uniform(0, 1)  # 0: the picture is grey
        self.materials = []
        for _ in range(rng.integers(4, 14)):
            grey = center + spread * rng.standard_normal()
            color = np.clip(grey + hue * 0.25 * rng.standard_normal(3), 0.02, 0.98)
            weights = rough * rng.exponential(0.06, len(self.fields)) * rng.integers(0, 2, 5)
            pattern = rng.choice(("plain", "stripes", "grid", "speckle"), p=(0.6, 0.2, 0.1, 0.1))
            self.materials.append((color, weights, pattern, rough * rng.uniform(0.1, 0.5)))
        self.albedo = np.empty((size, size, 3), np.float32)
        self.shapes = np.zeros((size, size), np.uint16)
        self.height = np.zeros((size, size), np.float32)  # throws shadows
        self.relief = np.zeros((size, size), np.float32)  # is shaded
        self.colors: list[np.ndarray] = []
        window, a, b = self.frame(0, 0, 0)
        self.paint(window, np.ones((size, size), bool), 0.0, 0.0, a, b, material=0)

    def frame(self, x: float, y: float, angle: float, reach: float = math.inf):
        """The window of pixels within `reach` of (x, y), and their coordinates (a, b) about that
        point, a along the angle; None outside the picture."""
        ends = []
        for p in (y, x):
            low, high = max(0, p - reach), min(self.size, p + reach + 1)
            if high - low < 1:
                return None
            ends.append(slice(int(low), int(high)))
        dy, dx = np.ogrid[ends[0], ends[1]]
        dy, dx = np.float32(dy - y), np.float32(dx - x)
        c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        return tuple(ends), c * dx + s * dy, c * dy - s * dx

    def drop(self, radius: float) -> None:
        """Lets a shape fall anywhere, or a row of it."""
        rng = self.rng
        x, y = rng.uniform(0, self.size, 2)
        angle, copies = rng.uniform(0, 2 * math.pi), 1
        if radius < self.size / 10 and rng.random() < 0.15:
            copies = rng.integers(2, 7)
        outline, reach = draw_outline(rng, radius, self.size)
        material = rng.integers(len(self.materials))
        height = rng.choice((0.0, 1.0)) * rng.uniform(1, 4 + radius)
        profile, steep = rng.choice(("flat", "dome", "ridge"), p=(0.6, 0.2, 0.2)), rng.uniform(0, 1)
        turn, gap = rng.choice((0, math.pi / 2)), radius * rng.uniform(1.6, 3)
        for k in range(copies):
            step = k * gap
            place = x + step * math.cos(angle + turn), y + step * math.sin(angle + turn)
            if (found := self.frame(*place, angle, reach)) is None:
                continue
            window, a, b = found
            f = outline(a, b)  # below 1 inside
            inside = np.maximum(1 - f, 0)
            bump = {"flat": 0 * f, "dome": np.sqrt(inside * (1 + f)), "ridge": inside}[profile]
            self.paint(window, f < 1, steep * radius * bump, height, a, b, material)

    def paint(self, window, mask, relief, height, a, b, material: int) -> None:
        """Writes the layers of a shape where mask (h, w) holds."""
        rng = self.rng
        color, weights, pattern, strength = self.materials[material]
        color = color * rng.uniform(0.9, 1.1)
        texture = sum(w * field[window] for w, field in zip(weights, self.fields))
        period = rng.uniform(3, 16)
        if pattern in ("stripes", "grid"):
            crossed = (b % period < 0.3 * period) & (pattern == "grid")
            texture = texture - strength * (crossed | (a % period < 0.4 * period))
        if pattern == "speckle":
            texture = texture + strength * (self.fields[1][window] > 1.2)
        slope = rng.uniform(-1, 1, 2) * rng.choice((0, 0.25)) / (np.abs(a).max() + 1)
        texture = texture + slope[0] * a + slope[1] * b
        layers = (self.relief, relief), (self.height, height), (self.shapes, len(self.colors))
        for layer, value in layers:
            layer[window][mask] = value[mask] if np.ndim(value) else value
        self.albedo[window][mask] = color * (1 + texture[mask][:, None])
        self.colors.append(color)


def draw_outline(rng: np.random.Generator, r: float, size: int):
    """A function of a shape's own coordinates (a, b) that is below 1 inside, and how far it
    reaches."""
    kind = rng.choice(("rectangle", "polygon", "ellipse", "blob", "ribbon", "corner"))
    flat = rng.uniform(0.3, 1)
    if kind == "rectangle":
        return lambda a, b: np.maximum(np.abs(a) / r, np.abs(b) / (flat * r)), 1.5 * r
    if kind == "polygon":  # convex: the farthest of its sides
        n = rng.integers(3, 8)
        angles = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * math.pi / n
        sides = [(math.cos(t), math.sin(t), r * rng.uniform(0.6, 1)) for t in angles]
        return lambda a, b: np.maximum.reduce([(c * a + s * b) / d for c, s, d in sides]), 2 * r
    if kind == "ellipse":
        return lambda a, b: np.hypot(a / r, b / (flat * r)), r
    if kind == "blob":
        waves = [(k, rng.normal(0, 0.25 / k), rng.uniform(0, 6.3)) for k in range(2, 9)]

        def blob(a, b):
            t = np.arctan2(b, a)
            rim = 1 + sum(size * np.cos(k * t + phase) for k, size, phase in waves)
            return np.hypot(a, b) / (r * np.maximum(rim, 0.2))

        return blob, 1.6 * r
    if kind == "ribbon":  # a line, where it is thin
        bend, length, phase = rng.uniform(0, 2 * r + 5), rng.uniform(15, 80), rng.uniform(0, 6.3)
        half, end = max(0.7, 0.3 * flat * r), rng.uniform(2, 12) * r

        def ribbon(a, b):
            across = np.abs(b - bend * np.sin(a / length + phase)) / half
            return np.maximum(across, np.abs(a) / end)

        return ribbon, min(end + bend + half, 2 * size)
    cut = rng.uniform(-0.4, 0.4)  # a rectangle without a quarter

    def corner(a, b):
        quarter = np.minimum(np.abs(a + r), np.abs(b + r)) / (r * (1 + cut))
        return np.maximum(np.maximum(np.abs(a), np.abs(b)) / r, quarter)

    return corner, 1.5 * r


# --------------------------------------------------------------------------------- light and camera


def shade(height: np.ndarray, dx: float, dy: float, rise: float) -> np.ndarray:
    """How far each pixel (H, W) lies in shadow, 0 to 1, of a sun in the direction (dx, dy) whose
    rays climb `rise` a pixel."""
    above = np.zeros_like(height)
    for k in range(1, min(len(height) - 1, int(height.max() / rise) + 1)):
        here, there = shifted(height.shape, round(dy * k), round(dx * k))
        above[here] = np.maximum(above[here], height[there] - height[here] - rise * k)
    return np.clip(above, 0, 1)


def photograph(rng: np.random.Generator, pile: Pile) -> np.ndarray:
    """The picture (H, W, 3) uint8: sun and sky on the albedo, then lens and sensor."""
    azimuth, rise = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 2)
    dx, dy = math.cos(azimuth), math.sin(azimuth)
    slope_y, slope_x = np.gradient(np.clip(pile.relief, 0, 30))
    facing = rise - np.clip(dx * slope_x + dy * slope_y, -1.5, 1.5)
    facing = np.clip(facing / np.sqrt(1 + slope_x**2 + slope_y**2) / rise, 0, 1.8)
    sun = facing * (1 - blur(shade(pile.height, dx, dy, rise)))
    share = rng.choice((0.0, 1.0), p=(0.15, 0.85)) * rng.uniform(0.2, 0.8)  # overcast: no shadows
    image = pile.albedo * (1 - share + share * sun)[..., None]
    for _ in range(rng.integers(0, 4)):
        image = blur(image)
    image = image * rng.uniform(0.8, 1.2)
    image = image + rng.uniform(0, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)
