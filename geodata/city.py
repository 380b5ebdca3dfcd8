"""A procedural city: a tile of streets, houses, greenery and cars as an image, heights and labels.
Writes no file.

The image alone is ambiguous on purpose. Flat roofs are painted by the function that paints yards,
with the asphalt of the streets; shrubberies (low vegetation) by the function that paints
broadleaved crowns. What tells them apart is the height. Some yards and shrubberies throw the shadow
of a tall thing, so that shadows do not give the answer away; see `canvas.py`, also for the units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geodata.canvas import (
    BUILDING,
    CAR,
    CLUTTER,
    IMPERVIOUS,
    LOW,
    PIXEL,
    TREE,
    Canvas,
    measure_heights,
    photograph,
    turned,
)

# Raise it whenever a tile changes, so that old folders are not taken for new ones.
GENERATOR_VERSION = 2

# Albedos in the image's bands: near infrared, red, green.
SIDEWALK = (0.53, 0.52, 0.51)
LEAVES = (0.62, 0.20, 0.25)
OTHER_LEAVES = ((0.36, 0.10, 0.17), (0.84, 0.29, 0.36))  # conifers, young birches
WATER, GLASS, RUBBLE = (0.05, 0.28, 0.40), (0.12, 0.14, 0.17), (0.62, 0.55, 0.45)
CONTAINER = ((0.25, 0.30, 0.72), (0.75, 0.55, 0.15), (0.20, 0.55, 0.45))
# Roof tiles, from new clay to concrete.
TILES = ((0.58, 0.50, 0.34), (0.50, 0.40, 0.28), (0.27, 0.28, 0.33), (0.68, 0.66, 0.60))
# Cars.
PAINT = (
    (0.93, 0.93, 0.93), (0.90, 0.89, 0.86), (0.08, 0.08, 0.09), (0.72, 0.74, 0.76),
    (0.62, 0.62, 0.16), (0.20, 0.22, 0.55), (0.16, 0.45, 0.50), (0.80, 0.76, 0.30),
)  # fmt: skip


@dataclass
class Scene:
    """One tile."""

    image: np.ndarray  # (H, W, 3) uint8: near infrared, red, green
    dsm: np.ndarray  # (H, W) float32, metres above sea level
    labels: np.ndarray  # (H, W) uint8, 0 to 5


def make_tile(seed: int, area: int, height: int, width: int) -> Scene:
    """The tile `area` of city `seed`, height x width pixels of 9 cm. A function of its arguments
    alone.
    """
    canvas = Canvas(np.random.default_rng((seed, area)), height, width)
    plan = draw_streets(canvas)
    for lot in plan.lots:
        draw_lot(canvas, *lot)
    draw_traffic(canvas, plan)
    draw_greenery(canvas)
    return Scene(photograph(canvas), measure_heights(canvas), canvas.labels)


# --------------------------------------------------------------------------------- streets and lots

STREET, WALK = 6.8, 1.7  # widths of a carriageway and of a sidewalk


@dataclass
class Plan:
    """What the streets leave to the rest."""

    streets: list  # of lists of (x, y, angle), one for every metre of the street
    lots: list  # of (x, y, angle, width, depth), angle along the street


def draw_streets(canvas: Canvas) -> Plan:
    """Two families of streets: long ones, gently bent, and straight ones across; lots fill the
    blocks between.
    """
    rng, (rows, columns) = canvas.rng, canvas.shape
    middle, reach = (columns * PIXEL / 2, rows * PIXEL / 2), math.hypot(rows, columns) * PIXEL / 2
    angle, bend = rng.uniform(0, math.pi), rng.uniform(0, 1.6)
    wave, phase = rng.uniform(45, 80) / (2 * math.pi), rng.uniform(0, 2 * math.pi)
    spacing, across = rng.uniform(47, 53), rng.uniform(80, 110)
    v0, u0 = rng.uniform(-16, 16), rng.choice((-1, 1)) * rng.uniform(10, 38)

    def place(u, v):  # u along the long streets, v across, to (x, y, angle)
        x, y = turned(*middle, angle, u, v + bend * math.sin(u / wave + phase))
        return x, y, angle + math.atan(bend / wave * math.cos(u / wave + phase))

    window, u, v = canvas.frame(*middle, angle, reach + 1)
    v = v - bend * np.sin(u / wave + phase)
    # distances to the middle of the nearest street of each family
    long = np.abs((v - v0 + spacing / 2) % spacing - spacing / 2)
    short = np.abs((u - u0 + across / 2) % across - across / 2)
    nearest = np.minimum(long, short)
    joints = (u % 0.6 < 0.09) | (v % 0.6 < 0.09)
    paving = np.float32(SIDEWALK) * (1 + 0.7 * canvas.asphalt - 0.12 * joints)[..., None]
    canvas.paint(window, nearest < STREET / 2 + WALK, IMPERVIOUS, paving, 0.1)
    canvas.paint(window, nearest < STREET / 2, IMPERVIOUS, canvas.asphalt_albedo(window), 0.0)
    dashes = (long < 0.08) & (u % 6 < 3) & (short > STREET)
    dashes |= (short < 0.08) & (v % 6 < 3) & (long > STREET)
    canvas.paint(window, dashes, albedo=0.8)

    metres = np.arange(-reach - 10, reach + 10)
    along = [v0 + k * spacing for k in range(-int(reach / spacing) - 2, int(reach / spacing) + 3)]
    crossing = [u0 + k * across for k in range(-int(reach / across) - 2, int(reach / across) + 3)]
    streets = [[place(u, v) for u in metres] for v in along]
    for u in crossing:
        bearings = (place(u, v) for v in metres)
        streets.append([(x, y, bearing + math.pi / 2) for x, y, bearing in bearings])
    lots = []
    for v in along:
        for u in crossing:
            for opposite in (0, 1):
                lots += row_of_lots(rng, place, u, across, v, spacing, opposite)
    return Plan(streets, lots)


def row_of_lots(rng, place, u, across, v, spacing, opposite: int) -> list:
    """The lots of a block along street v, between the streets at u and u + across; `opposite` is 0
    for those on one edge of the street and 1 for those on the other.
    """
    edge = STREET / 2 + WALK
    depth, u, end, lots = spacing / 2 - edge, u + edge, u + across - edge, []
    while end - u > 9:
        width = min(rng.uniform(14, 20), end - u)
        x, y, angle = place(u + width / 2, v + (edge + depth / 2) * (1 - 2 * opposite))
        lots.append((x, y, angle + math.pi * opposite, width, depth))
        u += width
    return lots


def draw_lot(canvas: Canvas, x: float, y: float, angle: float, width: float, depth: float) -> None:
    """A house, a flat-roofed building, a paved yard of the same outlines, or a garden."""
    rng = canvas.rng

    def at(a, b):  # a along the street, b away from it, from the middle of the lot
        return turned(x, y, angle, a, b)

    kind = rng.choice(("house", "flat", "yard", "garden"), p=(0.37, 0.41, 0.19, 0.03))
    if rng.random() < 0.5:  # a hedge towards the neighbour
        window, _, _, mask = canvas.rectangle(*at(width / 2 - 0.5, 1), angle, 0.9, depth - 3)
        mask &= canvas.labels[window] == LOW
        leafy(canvas, window, mask, LOW, LEAVES, 1.0 + 0.2 * canvas.leaves[window], 0)
    if rng.random() < 0.35:
        draw_clutter(canvas, *at(rng.uniform(-0.3, 0.3) * width, depth / 2 - 3.5), angle)
    if kind == "garden":
        return
    length, broad = min(width - 1.5, rng.uniform(11, 17)), min(depth - 5, rng.uniform(10, 14))
    setback = rng.uniform(1.0, depth - broad - 2)
    a, b = rng.uniform(-1, 1) * (width - length - 1) / 2, -depth / 2 + setback + broad / 2
    if rng.random() < 0.6:  # a forecourt from the street to the front, at times with a car
        court = rng.uniform(3, 7)
        shift = rng.uniform(-1, 1) * (width - court) / 2
        middle = at(shift, (setback - depth) / 2)
        slab(canvas, *middle, angle, court, setback + 0.4, IMPERVIOUS, 0.0, 0.0)
        if setback > 5:
            draw_car(canvas, *at(shift, -depth / 2 + 2.8), angle + math.pi / 2)
    if kind == "house":
        if length > broad or rng.random() < 0.3:  # the ridge mostly runs along the longer side
            gable(canvas, *at(a, b), angle, length, broad)
        else:
            gable(canvas, *at(a, b), angle + math.pi / 2, broad, length)
        return
    top = rng.uniform(3.0, 8.0)
    label, height = (BUILDING, top) if kind == "flat" else (IMPERVIOUS, 0.0)
    caster = top if kind == "flat" or rng.random() < 0.5 else 0.0
    slab(canvas, *at(a, b), angle, length, broad, label, height, caster)
    if rng.random() < 0.5:  # a wing behind makes the outline an L
        wing = rng.uniform(0.4, 1) * (depth / 2 - b - broad / 2)
        end = rng.choice((-1, 1)) * length / 4
        middle = at(a + end, b + (broad + wing) / 2)
        slab(canvas, *middle, angle, length / 2, wing, label, height, caster)


def slab(canvas: Canvas, x, y, angle, length, width, label, height, caster) -> None:
    """A rectangle of asphalt: a flat roof or a yard. At times with a pale rim and a few hatches."""
    rng = canvas.rng
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    albedo = canvas.asphalt_albedo(window)
    if rng.random() < 0.4:
        albedo[(np.abs(a) > length / 2 - 0.25) | (np.abs(b) > width / 2 - 0.25)] += 0.12
    for _ in range(rng.integers(0, 4)):
        da, db = rng.uniform(-0.35, 0.35) * length, rng.uniform(-0.35, 0.35) * width
        albedo[(np.abs(a - da) < 0.5) & (np.abs(b - db) < 0.4)] *= rng.choice((0.6, 1.5))
    canvas.paint(window, mask, label, albedo, height, caster)


def draw_clutter(canvas: Canvas, x, y, angle) -> None:
    """A water basin, a container or a heap of rubble, where the ground is free."""
    rng = canvas.rng
    kind = rng.choice(("basin", "container", "rubble"))
    length, width = {"basin": (7, 4), "container": (6.1, 2.5), "rubble": (6, 5)}[kind]
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    if not np.isin(canvas.labels[window][mask], (LOW, IMPERVIOUS)).all():
        return
    grain, leaves = canvas.asphalt[window], canvas.leaves[window]
    if kind == "basin":
        water = (np.abs(a) < length / 2 - 0.4) & (np.abs(b) < width / 2 - 0.4)
        canvas.paint(window, mask, CLUTTER, 0.7, 0.0)
        albedo = np.float32(WATER) * (1 + grain)[..., None]
        canvas.paint(window, water, CLUTTER, albedo, -0.3, 0.0)
    elif kind == "container":
        ribs = 1 + 0.12 * np.sin(a * (2 * math.pi / 0.5))
        albedo = np.float32(CONTAINER[rng.integers(len(CONTAINER))]) * ribs[..., None]
        canvas.paint(window, mask, CLUTTER, albedo, 2.6)
    else:
        heap = np.clip(1.3 - (2 * a / length) ** 2 - (2 * b / width) ** 2 + 0.25 * leaves, 0, 1)
        albedo, top = np.float32(RUBBLE) * (1 + 3 * grain)[..., None], 1.6 * heap
        canvas.paint(window, heap > 0, CLUTTER, albedo, top, relief=top + 0.2 * leaves)


def gable(canvas: Canvas, x, y, angle, length, width) -> None:
    """A house with a gabled or hipped roof of tiles, its ridge along the angle; at times solar
    panels and a chimney.
    """
    rng = canvas.rng
    window, a, b, mask = canvas.rectangle(x, y, angle, length, width)
    slope, inside = rng.uniform(0.5, 0.9), width / 2 - np.abs(b)
    if rng.random() < 0.35:
        inside = np.minimum(inside, length / 2 - np.abs(a))
    colour = np.float32(TILES[rng.integers(len(TILES))]) * rng.uniform(0.9, 1.1)
    rows = np.sin(inside * (2 * math.pi / 0.36))
    albedo = colour * (1 + 0.06 * rows + 0.8 * canvas.asphalt[window])[..., None]
    if rng.random() < 0.3:
        panels = (np.abs(a) < length * 0.3) & (b > width * 0.1) & (b < width * 0.4)
        albedo[panels] = (0.10, 0.12, 0.22)
        albedo[panels & ((a % 1.0 < 0.09) | (b % 1.6 < 0.09))] = 0.4
    eaves = rng.uniform(3.0, 6.0)
    roof = slope * inside
    canvas.paint(window, mask, BUILDING, albedo, eaves + roof, relief=roof)
    chimney = (np.abs(a - length * rng.uniform(-0.3, 0.3)) < 0.4) & (np.abs(b - 0.8) < 0.3) & mask
    canvas.paint(window, chimney, BUILDING, 0.55, eaves + roof + 1.2, relief=roof)


# -------------------------------------------------------------------------------- cars and greenery


def draw_traffic(canvas: Canvas, plan: Plan) -> None:
    """Parked cars along one side of every street, and a few that drive."""
    rng = canvas.rng
    for street in plan.streets:
        kerb = rng.choice((-1, 1))
        for offset, gap in ((2.4 * kerb, 10.0), (0.1 * kerb, 45.0), (-2.2 * kerb, 45.0)):
            k = rng.uniform(0, gap)
            while k < len(street):
                x, y, angle = street[int(k)]
                draw_car(canvas, *turned(x, y, angle, 0, offset), angle + rng.normal(0, 0.03))
                k += 5.6 + rng.exponential(gap)


def draw_car(canvas: Canvas, x, y, angle) -> None:
    """A car, where the ground under the whole of it is paved."""
    rng = canvas.rng
    length, width = rng.uniform(3.9, 4.8), rng.uniform(1.7, 1.95)
    window, a, b = canvas.frame(x, y, angle + math.pi * rng.integers(2), length / 2 + 0.3)
    body = (2 * a / length) ** 6 + (2 * b / width) ** 4 < 1
    around = (2 * a / length) ** 6 + (2 * b / width) ** 4 < 1.6
    paved = (canvas.labels[window][around] == IMPERVIOUS).all()
    if not (body.any() and paved and canvas.height[window][around].max() <= 1):
        return
    colour = np.float32(PAINT[rng.integers(len(PAINT))])
    albedo = np.broadcast_to(colour, a.shape + (3,)) * (1 - 0.10 * (np.abs(a) > 1.2))[..., None]
    glass = ((a > 0.45) & (a < 1.0) | (a < -1.35) & (a > -1.75)) & (np.abs(b) < width * 0.42)
    albedo[glass] = GLASS
    height = np.where((a > -1.8) & (a < 0.9), 1.5, 1.05) - 0.3 * (2 * b / width) ** 2
    canvas.paint(window, body, CAR, albedo, height, relief=-0.15 * (2 * b / width) ** 2)


def leafy(canvas: Canvas, window, mask, label, colour, height, caster, dome=0.0) -> None:
    """Foliage over a mask: the one texture of hedges, shrubberies and crowns. The leaves darken
    where they recede.
    """
    leaves = canvas.leaves[window]
    albedo = np.float32(colour) * (1 + 0.16 * leaves)[..., None]
    canvas.paint(window, mask, label, albedo, height, caster, dome + 0.22 * leaves)


def crown(canvas: Canvas, x, y, radius, colour, top, decoy) -> int:
    """A crown of height `top`, or with `decoy` its likeness in low shrubs; returns how many pixels
    it gained.
    """
    rng = canvas.rng
    window, a, b = canvas.frame(x, y, 0.0, radius * 1.4)
    bearing, lobes = np.arctan2(b, a), 0
    for k in (2, 3, 5):
        lobes += rng.uniform(0, 0.10) * np.cos(k * bearing + rng.uniform(0, 6.28))
    distance = np.sqrt(a * a + b * b) / (radius * (1 + lobes + 0.06 * canvas.leaves[window]))
    if (canvas.labels[window][distance < 0.1] == BUILDING).any():
        return 0  # trunks stand beside houses
    dome = np.sqrt(np.clip(1 - distance**2, 0, 1))
    tall = top * (0.6 + 0.4 * dome) + 0.3 * canvas.leaves[window]
    label, height = (LOW, 0.35 + 0.1 * canvas.leaves[window]) if decoy else (TREE, tall)
    free = canvas.labels[window] == LOW
    if not decoy:  # a crown hangs over a roof well below it, and ends at another
        roof = canvas.labels[window] == BUILDING
        free = canvas.height[window] < np.where(roof, 0.6 * top, tall)
        free &= canvas.labels[window] != CLUTTER
    mask = (distance < 1) & free
    old = canvas.height[window] > 0.2 if decoy else canvas.labels[window] == TREE
    gained = int((mask & ~old).sum())
    caster = tall if not decoy or rng.random() < 0.6 else height
    leafy(canvas, window, mask, label, colour, height, caster, 0.55 * radius * dome)
    return gained


def draw_greenery(canvas: Canvas) -> None:
    """Clusters of crowns on the green ground: first shrubberies, then trees, until each covers its
    part of the tile.
    """
    rng, (rows, columns) = canvas.rng, canvas.shape
    for decoy, cover in ((True, rng.uniform(0.14, 0.20)), (False, rng.uniform(0.16, 0.25))):
        wanted = cover * rows * columns
        for _ in range(rows * columns // 800):
            row, column = rng.integers(rows), rng.integers(columns)
            if wanted <= 0:
                break
            if canvas.labels[row, column] != LOW:
                continue
            usual = decoy or rng.random() < 0.5
            colour = np.float32(LEAVES if usual else OTHER_LEAVES[rng.integers(2)])
            colour = colour * rng.uniform(0.9, 1.1)
            for _ in range(rng.integers(1, 6)):
                x, y = column * PIXEL + rng.normal(0, 2.2), row * PIXEL + rng.normal(0, 2.2)
                radius = rng.uniform(1.5, 3.4)
                top = 2.0 + radius * rng.uniform(1.4, 3.0)
                wanted -= crown(canvas, x, y, radius, colour, top, decoy)
