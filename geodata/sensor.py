"""What camera, sun and image matching make of a tile of the procedural city: the image, and the
heights; and what a laser scanner makes of it.

A `Flight` is the day and the hour. The training tiles and the test tiles are flown on days that
overlap: the latter mostly later in the year, under a lower sun. The heights come from matching
images: edges wander and smear, what moves has no height, and where it is dark or hidden there are
holes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geodata.canvas import CAR, PIXEL, TREE, Canvas, blur, direction, mix, noise, shifted

SKY, SUN = (0.92, 1.00, 1.12), (1.04, 1.00, 0.94)  # colours of the light
HAZE = (0.42, 0.47, 0.52)


@dataclass(frozen=True)
class Flight:
    """The conditions of a picture."""

    season: float  # 0 spring, 1 late autumn
    toward: tuple[float, float]  # the sun, as a direction of x and y
    rise: float  # of the sun's ray, metres a metre
    direct: float  # the share of the light that the sun gives
    haze: float  # the share of the light that the air adds
    softness: float  # of the lens, 0 to 1
    grain: float  # deviation of the sensor's noise


def plan_flight(rng: np.random.Generator, difficulty: float, later: bool) -> Flight:
    """A day and an hour at random; `later` for the test tiles."""

    def draw(usual, *ranges):  # about the usual value, or in the season's range
        low, high = ranges[later]
        return mix(usual, rng.uniform(low, high), difficulty)

    season = min(max(draw(0.25, (0.0, 0.7), (0.35, 0.75)), 0.0), 1.0)
    hour = rng.uniform(*((-1.0, 0.4), (-0.4, 1.0))[later])
    elevation = math.radians(60 - 16 * season + rng.uniform(-4, 4))
    return Flight(
        season=season,
        toward=direction(math.pi / 2 + hour),
        rise=round(math.tan(elevation), 6),
        direct=draw(0.66, (0.50, 0.70), (0.40, 0.66)),
        haze=max(0.0, draw(0.0, (0.0, 0.10), (0.03, 0.12))),
        softness=rng.uniform(0.0, 0.3) * min(difficulty, 1),
        grain=max(0.0, mix(0.012, rng.uniform(0.010, 0.022), difficulty)),
    )


def hidden(surface: np.ndarray, toward: tuple[float, float], rise: float, tallest: float):
    """How far each pixel (H, W) lies behind something, 0 to 1, seen along rays that come from
    `toward` and rise `rise` metres a metre; nothing stands higher than `tallest` above its ground.

    The highest obstacle within n steps is that of the first n/2, or of the n/2 from there on."""
    horizon, n = surface.copy(), 1
    while n * PIXEL * rise < tallest:
        here, there = shifted(surface.shape, round(toward[1] * n), round(toward[0] * n))
        horizon[here] = np.maximum(horizon[here], horizon[there] - rise * PIXEL * n)
        n *= 2
    return np.clip((horizon - surface) / 0.4, 0, 1)


def photograph(canvas: Canvas, flight: Flight) -> np.ndarray:
    """The image, uint8 (H, W, 3): sun and sky on the albedo, then air, lens and sensor."""
    rng, (x, y), rise = canvas.rng, flight.toward, flight.rise
    tallest = float(canvas.height.max())
    shade = blur(hidden(canvas.ground + canvas.height, flight.toward, rise, tallest))
    slopes = np.gradient(canvas.ground + canvas.relief)
    slope_y, slope_x = (np.clip(slope / np.float32(PIXEL), -1.6, 1.6) for slope in slopes)
    steepness = np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    sun = np.clip((rise - x * slope_x - y * slope_y) / (rise * steepness), 0, 1.5) * (1 - shade)
    sky = np.float32(SKY) * (1 - flight.direct)
    image = canvas.albedo * (sky + np.float32(SUN) * (flight.direct * sun)[..., None])
    image += flight.haze * (np.float32(HAZE) - image)
    image = blur(image)
    image += flight.softness * (blur(image, 2) - image)
    gain, cast = rng.uniform(1.05, 1.25), mix(0.03, 0.07, canvas.difficulty)
    image *= np.float32([gain * rng.uniform(1 - cast, 1 + cast) for _ in range(3)])
    image += flight.grain * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(255 * image + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------- image matching


def measure_heights(canvas: Canvas, image: np.ndarray) -> np.ndarray:
    """The surface model, float32 (H, W) metres above the sea, NaN where the image (H, W, 3) could
    not be matched with its neighbour."""
    rng, shape, difficulty = canvas.rng, canvas.shape, canvas.difficulty
    true = canvas.ground + np.where(canvas.moving, 0, canvas.height)
    surface = melt(rng, wander(rng, true, 1.8 * difficulty), min(difficulty, 1.0))
    dim = np.clip(1.6 - image.sum(axis=2, dtype=np.int32).astype(np.float32) / 128, 0, 1)
    surface += 0.06 * noise(rng, shape, 1) + 0.05 * noise(rng, shape, 7)
    surface += difficulty * (0.12 + 0.35 * dim) * noise(rng, shape, 9)
    if difficulty > 0:
        toward = direction(rng.uniform(0, 2 * math.pi))  # where the neighbour was taken
        occluded = hidden(true, toward, 2.2, float(canvas.height.max()))
        doubt = 1.1 * occluded + 0.8 * dim + 0.7 * noise(rng, shape, 12)
        surface[doubt > mix(3.0, 1.75, difficulty)] = np.nan
    return surface.astype(np.float32)


def wander(rng: np.random.Generator, surface: np.ndarray, pixels: float) -> np.ndarray:
    """The surface (H, W) with every place moved by a smooth error of about `pixels`."""
    rows, columns = (np.arange(side, dtype=np.float32) for side in surface.shape)
    dy, dx = (pixels * noise(rng, surface.shape, 18) for _ in range(2))
    y = np.clip(np.rint(rows[:, None] + dy), 0, len(rows) - 1).astype(np.intp)
    x = np.clip(np.rint(columns[None, :] + dx), 0, len(columns) - 1).astype(np.intp)
    return surface[y, x]


def melt(rng: np.random.Generator, surface: np.ndarray, share: float) -> np.ndarray:
    """The surface (H, W) with soft edges. A window of matching that straddles an edge sees what
    stands in front: here and there, up to 0.8 of the `share`, things grow and their edges run."""
    grown = surface.copy()
    for dy, dx in ((0, 2), (0, -2), (2, 0), (-2, 0)):
        here, there = shifted(surface.shape, dy, dx)
        grown[here] = np.maximum(grown[here], surface[there])
    for step in (1, 2, 3):
        grown = blur(grown, step)
    where = np.clip(0.5 + 0.7 * noise(rng, surface.shape, 30), 0, 0.8)
    return blur(blur(surface + share * where * (grown - surface)))


# ------------------------------------------------------------------------------------ a laser scan

LEAVES_RETURN = 0.55  # of a pulse, the share that a crown's first echo gets; the rest goes on
CHROME, LACQUER = 1.6, 0.25  # what metal sends back, facing the scanner and away from it


def scan(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """The intensity of a laser scan at 1064 nm, uint8 (H, W): the scanner brings its own light, so
    that there is no shadow in it, and water swallows it.

    A pulse lights a spot; crowns split it, and metal sends it back or away. `rng` is its own, so
    that what the camera sees stays as it was."""
    metal = np.where(noise(rng, canvas.shape, 8) > 0.4, np.float32(CHROME), np.float32(LACQUER))
    crown = LEAVES_RETURN * (1 + 0.5 * noise(rng, canvas.shape, 3))
    back = canvas.albedo[..., 0].copy()  # near infrared
    back = np.where((canvas.labels == CAR) & ~canvas.moving, metal * (0.3 + back), back)
    back = np.where(canvas.labels == TREE, crown * back, back)
    flown = 1 + 0.10 * noise(rng, canvas.shape, 90)  # strips at other angles and ranges
    speckle = 1 + 0.22 * noise(rng, canvas.shape, 2)
    spot = blur(blur((back * flown * speckle).astype(np.float32), 1), 2)
    spot += 0.02 * noise(rng, canvas.shape, 1)
    return np.clip(230 * spot + 0.5, 0, 255).astype(np.uint8)
