"""The things that stand in the procedural city, each painted onto the layers of a `Canvas`.

A flat roof, a yard and a street share their materials, a planted roof the grass of the lawns, a
rubble heap the gravel of the yards, a lorry the colours of the containers, and a hedge the leaves
of the trees. Lengths are metres; a lies along a thing's angle and b across."""

from __future__ import annotations

import math

import numpy as np

from geodata.canvas import (
    BUILDING,
    CAR,
    CLUTTER,
    IMPERVIOUS,
    LOW,
    MATERIALS,
    TREE,
    Canvas,
    mix,
    textured,
    wave,
)

# Albedos in the image's bands: near infrared, red, green.
WATER, POOL, GLASS = (0.05, 0.28, 0.40), (0.07, 0.42, 0.58), (0.12, 0.14, 0.17)
SAND, COURTS = (0.74, 0.66, 0.48), ((0.66, 0.60, 0.20), (0.18, 0.24, 0.56), (0.32, 0.20, 0.48))
CONTAINER = ((0.25, 0.30, 0.72), (0.75, 0.55, 0.15), (0.20, 0.55, 0.45), (0.80, 0.80, 0.78))
# Roof tiles, from new clay to concrete.
TILES = (MATERIALS["clay"], (0.50, 0.40, 0.28), (0.27, 0.28, 0.33), (0.68, 0.66, 0.60))
# Cars, the last two as dark as asphalt in the shade.
PAINT = (
    (0.93, 0.93, 0.93), (0.90, 0.89, 0.86), (0.72, 0.74, 0.76), (0.62, 0.62, 0.16),
    (0.20, 0.22, 0.55), (0.16, 0.45, 0.50), (0.80, 0.76, 0.30), (0.97, 0.97, 0.97),
    (0.08, 0.08, 0.09), (0.22, 0.22, 0.25),
)  # fmt: skip
# Small and large cars, vans, lorries: how many of all come up to here, length, width, height.
CARS = ((0.25, 3.8, 1.7, 1.5), (0.65, 4.7, 1.9, 1.5), (0.86, 5.6, 2.1, 2.3), (1, 8.5, 2.6, 3.3))


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------ yards, roofs


def slab(canvas: Canvas, x, y, angle, length, width, label, height, material="asphalt") -> None:
    """A level rectangle of a material or of "grass": a flat roof or a yard. At times with a pale
    rim and a few hatches."""
    rng = canvas.rng
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    albedo = canvas.lawn(window) if material == "grass" else canvas.material(window, material)
    if rng.random() < 0.4:
        albedo[(np.abs(a) > length / 2 - 0.25) | (np.abs(b) > width / 2 - 0.25)] += np.float32(0.12)
    for _ in range(int(rng.integers(0, 4))):
        da, db = rng.uniform(-0.35, 0.35) * length, rng.uniform(-0.35, 0.35) * width
        hatch = (np.abs(a - da) < 0.5) & (np.abs(b - db) < 0.4)
        albedo[hatch] *= np.float32(pick(rng, (0.6, 1.5)))
    level = canvas.level(window, mask)
    canvas.paint(window, mask, label, albedo, level + height, level)


def gable(canvas: Canvas, x, y, angle, length, width) -> None:
    """A house with a gabled or hipped roof of tiles, its ridge along the angle; at times solar
    panels and a chimney."""
    rng = canvas.rng
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    slope, inside = rng.uniform(0.5, 0.9), width / 2 - np.abs(b)
    if rng.random() < 0.35:
        inside = np.minimum(inside, length / 2 - np.abs(a))
    colour = np.float32(pick(rng, TILES)) * np.float32(rng.uniform(0.9, 1.1))
    texture = 1 + 0.06 * wave(inside / 0.36) + 0.8 * canvas.textures["asphalt"][window]
    albedo = colour * texture[..., None]
    if rng.random() < 0.3:
        panels = (np.abs(a) < length * 0.3) & (b > width * 0.1) & (b < width * 0.4)
        albedo[panels] = (0.10, 0.12, 0.22)
        albedo[panels & ((a % 1.0 < 0.09) | (b % 1.6 < 0.09))] = 0.4
    roof = slope * inside
    relief = canvas.level(window, mask) + roof
    top = relief + rng.uniform(3.0, mix(6.0, 5.0, canvas.difficulty))
    canvas.paint(window, mask, BUILDING, albedo, top, relief)
    chimney = (np.abs(a - length * rng.uniform(-0.3, 0.3)) < 0.4) & (np.abs(b - 0.8) < 0.3) & mask
    canvas.paint(window, chimney, BUILDING, 0.55, top + 1.2, relief)


# ----------------------------------------------------------------------------------------- clutter


def container(canvas: Canvas, window, a, b, mask) -> None:
    ribs = 0.12 * wave(a / 0.5)
    albedo = textured(pick(canvas.rng, CONTAINER), ribs)
    level = canvas.level(window, mask)
    canvas.paint(window, mask, CLUTTER, albedo, level + 2.6, level)


def rubble(canvas: Canvas, window, a, b, mask) -> None:
    length, width = a[mask].max() * 2, b[mask].max() * 2
    p, q = 2 * a / length, 2 * b / width
    heap = np.clip(1.3 - p * p - q * q + 0.25 * canvas.leaves[window], 0, 1)
    albedo = canvas.material(window, "gravel") * np.float32((1.2, 1.2, 1.12))
    top = 2.0 * heap
    canvas.paint(window, mask & (heap > 0), CLUTTER, albedo, top, top + 0.2 * canvas.leaves[window])


def basin(canvas: Canvas, window, a, b, mask) -> None:
    """Water behind a pale rim, a pond or a pool."""
    water = mask & (np.abs(a) < a[mask].max() - 0.4) & (np.abs(b) < b[mask].max() - 0.4)
    canvas.paint(window, mask, CLUTTER, 0.7, 0.0)
    albedo = textured(pick(canvas.rng, (WATER, POOL)), canvas.textures["asphalt"][window])
    canvas.paint(window, water, CLUTTER, albedo, -0.3)


def court(canvas: Canvas, window, a, b, mask) -> None:
    """A sports ground of a bright colour with white lines."""
    albedo = textured(pick(canvas.rng, COURTS), canvas.textures["concrete"][window])
    along, across = a[mask].max() - np.abs(a), b[mask].max() - np.abs(b)
    inside = np.minimum(along, across)
    albedo[(inside > 0.8) & (inside < 0.95) | (np.abs(a) < 0.08)] = 0.85
    canvas.paint(window, mask, CLUTTER, albedo, 0.0)


def playground(canvas: Canvas, window, a, b, mask) -> None:
    """Sand with posts and slides."""
    rng = canvas.rng
    albedo = textured(SAND, canvas.textures["gravel"][window])
    canvas.paint(window, mask, CLUTTER, albedo, 0.0)
    for _ in range(3):
        da, db = rng.uniform(-0.7, 0.7) * a[mask].max(), rng.uniform(-0.7, 0.7) * b[mask].max()
        slide = mask & (np.abs(a - da) < rng.uniform(0.4, 1.4)) & (np.abs(b - db) < 0.4)
        canvas.paint(window, slide, CLUTTER, pick(rng, CONTAINER), rng.uniform(0.6, 2.2))


# What it is -> its painter, length and width.
CLUTTERS = {
    "container": (container, 6.1, 2.5), "rubble": (rubble, 6.5, 5.5), "basin": (basin, 8, 5),
    "court": (court, 14, 9), "playground": (playground, 9, 8),
}  # fmt: skip


def draw_clutter(canvas: Canvas, kind: str, x, y, angle) -> None:
    """A thing that is none of the five classes, where the ground is free and in the tile."""
    paint, length, width = CLUTTERS[kind]
    length, width = (side * canvas.rng.uniform(0.85, 1.15) for side in (length, width))
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    free = np.isin(canvas.labels[window][mask], (LOW, IMPERVIOUS)).all()
    if free and mask.any() and a[mask].max() > 0.5 and b[mask].max() > 0.5:
        paint(canvas, window, a, b, mask)


# -------------------------------------------------------------------------------- cars and greenery


def draw_car(canvas: Canvas, x, y, angle, moving=False) -> None:
    """A car, a van or a lorry, where the ground under the whole of it is paved; a moving one has
    gone by the next picture."""
    rng = canvas.rng
    drawn = rng.random() * mix(0.65, 1.0, min(canvas.difficulty, 1))
    _, length, width, top = next(kind for kind in CARS if drawn <= kind[0])
    length, width = length * rng.uniform(0.93, 1.07), width * rng.uniform(0.96, 1.04)
    angle = angle + math.pi * int(rng.integers(2))
    window, a, b = canvas.frame(x, y, angle, length / 2 + 0.4)
    if not a.size:
        return
    p, q = 2 * a / length, 2 * b / width
    p, q = p * p * p, q * q
    body, around = p * p + q * q < 1, p * p + q * q < 1.6
    paved = (canvas.labels[window][around] == IMPERVIOUS).all()
    if not (body.any() and paved and canvas.height[window][around].max() <= 1):
        return
    paints = PAINT[: len(PAINT) if canvas.difficulty > 0 else 9]
    colour = np.float32(pick(rng, paints if top < 3 else CONTAINER))
    front = length / 2 - (0.9 if top > 2 else 1.5)  # where the windscreen is
    albedo = np.tile(colour, (*a.shape, 1))
    glass = (a > front) & (a < front + 0.5)
    if top < 2:  # a bonnet, a rear window, a roof between them
        albedo[a > front + 0.5] *= np.float32(0.9)
        glass |= (a < 0.85 - length / 2) & (a > 0.4 - length / 2)
        lower = np.where((a > 0.4 - length / 2) & (a < front + 0.3), 0, 0.45)
    else:  # a cab before the load
        lower = np.where(a > front + 0.3, top / 2, 0)
        albedo[(a < front - 0.6) & (a > front - 0.75)] = GLASS
    albedo[glass & (np.abs(b) < width * 0.42)] = GLASS
    curve = (-0.15 * q).astype(np.float32)
    canvas.paint(window, body, CAR, albedo, top - lower + 2 * curve, curve)
    canvas.moving[window][body] = moving


def hedge(canvas: Canvas, x, y, angle, length, width, height) -> None:
    """Clipped leaves: low vegetation, of a man's height."""
    window, _, b, mask = canvas.rectangle(x, y, angle, length, width)
    mask &= (canvas.labels[window] == LOW) & (canvas.height[window] < 0.3)
    top = height + 0.2 * canvas.leaves[window]
    albedo = canvas.foliage(window, canvas.leaf_colour())
    canvas.paint(window, mask, LOW, albedo, top, 0.22 * canvas.leaves[window] - 0.5 * b * b)


def crown(canvas: Canvas, x, y, radius, colour, top, shrub) -> int:
    """A crown of height `top`, or its likeness in shrubs of that height; returns how many pixels it
    gained."""
    rng = canvas.rng
    window, a, b = canvas.frame(x, y, 0.0, radius * 1.4)
    r = np.sqrt(a * a + b * b) + np.float32(1e-6)
    c, s, lobes = a / r, b / r, 0
    ck, sk = c, s
    for _ in range(4):  # cosines of the multiples of the bearing
        ck, sk = ck * c - sk * s, ck * s + sk * c
        size, phase = rng.uniform(0, 0.10), rng.uniform(-1, 1)
        lobes = lobes + size * (phase * ck + (1 - abs(phase)) * sk)
    distance = r / (radius * (1 + lobes + 0.06 * canvas.leaves[window]))
    labels, height = canvas.labels[window], canvas.height[window]
    if (labels[distance < 0.1] == BUILDING).any():
        return 0  # trunks stand beside houses
    dome = np.sqrt(np.clip(1 - distance * distance, 0, 1))
    tall = top * (0.6 + 0.4 * dome) + min(0.3, top / 4) * canvas.leaves[window]
    free = (labels == LOW) & (height < tall)
    if not shrub:  # a crown hangs over a roof well below it, and ends at another
        free = (height < np.where(labels == BUILDING, 0.6 * top, tall)) & (labels != CLUTTER)
    mask = (distance < 1) & free
    old = height > 0.2 if shrub else labels == TREE
    gained = int((mask & ~old).sum())
    relief = 0.55 * radius * dome + 0.22 * canvas.leaves[window]
    canvas.moving[window][mask] = False
    foliage = canvas.foliage(window, colour)
    canvas.paint(window, mask, LOW if shrub else TREE, foliage, tall, relief)
    return gained
