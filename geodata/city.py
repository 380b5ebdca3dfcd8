"""A procedural city: a tile of streets, houses, greenery and cars as an image, heights and labels.
Writes no file.

Neither raster is enough alone: see `canvas.py` for what looks alike, `sensor.py` for what camera,
sun and image matching lose, `things.py` for what there is; here is where it lies. Streets run on
embankments and in cuttings and lots are terraced, so that a flat roof may be no higher than the
street, and a yard as high as a roof."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from geodata.canvas import BUILDING, IMPERVIOUS, LOW, PIXEL, Canvas, mix, turned, wave
from geodata.sensor import measure_heights, photograph, plan_flight, scan
from geodata.things import crown, draw_car, draw_clutter, gable, hedge, pick, slab

# Raise it whenever a tile changes, so that old folders are not taken for new ones.
GENERATOR_VERSION = 4

HARDEST = 2.0  # of the difficulties


@dataclass
class Scene:
    """One tile."""

    image: np.ndarray  # (H, W, 3) uint8: near infrared, red, green
    dsm: np.ndarray  # (H, W) float32, metres above sea level, NaN where there is no height
    labels: np.ndarray  # (H, W) uint8, 0 to 5
    intensity: np.ndarray  # (H, W) uint8, of a laser scan


def make_tile(
    seed: int, area: int, height: int, width: int, difficulty: float = 1.0, later: bool = False
) -> Scene:
    """The tile `area` of city `seed`, height x width pixels of 9 cm; `later` is how the test tiles
    are flown. A difficulty of 0 is nearly solved, 2 the hardest. A function of its arguments alone.
    """
    rng = np.random.default_rng((seed, area))
    flight = plan_flight(rng, difficulty, later)
    canvas = Canvas(rng, height, width, difficulty, flight.season)
    streets, lots = draw_streets(canvas)
    for lot, kind in lots:
        draw_lot(canvas, lot, kind)
    draw_traffic(canvas, streets)
    draw_greenery(canvas)
    image = photograph(canvas, flight)
    dsm, laser = measure_heights(canvas, image), np.random.default_rng((seed, area, 1))
    return Scene(image, dsm, canvas.labels, scan(canvas, laser))


# --------------------------------------------------------------------------------- streets and lots

STREET, WALK = 6.8, 1.7  # widths of a carriageway and of a sidewalk
# What stands on a lot: as many of each in any tile, beginning with those in its middle.
KINDS = ("house", "house", "flat", "flat", "yard", "yard", "works", "works")


@dataclass
class Lot:
    x: float
    y: float
    angle: float  # of the street
    width: float  # along the street
    depth: float

    def at(self, a: float, b: float) -> tuple[float, float]:
        """The place `a` along the street and `b` away from it, from the middle of the lot."""
        return turned(self.x, self.y, self.angle, a, b)


def draw_streets(canvas: Canvas) -> tuple[list, list]:
    """Two families of streets: long ones, gently bent, and straight ones across; lots fill the
    blocks between -> of each street a list of (x, y, angle), one for every metre; (lot, kind)."""
    rng, (rows, columns) = canvas.rng, canvas.shape
    middle = columns * PIXEL / 2, rows * PIXEL / 2
    reach = math.sqrt(rows * rows + columns * columns) * PIXEL / 2
    angle, bend = rng.uniform(0, math.pi), rng.uniform(0, 1.6)
    period, phase = rng.uniform(45, 80), rng.uniform(0, 1)
    spacing, across = rng.uniform(47, 53), rng.uniform(80, 110)
    v0, u0 = rng.uniform(-16, 16), pick(rng, (-1, 1)) * rng.uniform(10, 38)

    def place(u, v):  # u along the long streets, v across, to (x, y, angle)
        x, y = turned(*middle, angle, u, v + bend * wave(u / period + phase))
        steeper = wave((u + 0.5) / period + phase) - wave((u - 0.5) / period + phase)
        return x, y, angle + bend * steeper

    window, u, v = canvas.frame(*middle, angle, reach + 1)
    v = v - bend * wave(u / period + phase)
    # distances to the middle of the nearest street of each family
    long = np.abs((v - v0 + spacing / 2) % spacing - spacing / 2)
    short = np.abs((u - u0 + across / 2) % across - across / 2)
    nearest = np.minimum(long, short)
    raise_streets(canvas, window, long, u)
    joints = (u % 0.6 < 0.09) | (v % 0.6 < 0.09)
    paving = canvas.material(window, "concrete") * (1 - np.float32(0.12) * joints)[..., None]
    canvas.paint(window, nearest < STREET / 2 + WALK, IMPERVIOUS, paving, 0.1)
    surface = "concrete" if rng.random() < mix(0, 0.2, canvas.difficulty) else "asphalt"
    canvas.paint(window, nearest < STREET / 2, IMPERVIOUS, canvas.material(window, surface), 0.0)
    dashes = (long < 0.08) & (u % 6 < 3) & (short > STREET)
    dashes |= (short < 0.08) & (v % 6 < 3) & (long > STREET)
    canvas.paint(window, dashes, albedo=0.8)

    metres = [float(u) for u in range(-int(reach) - 10, int(reach) + 11)]
    along = [v0 + k * spacing for k in range(-int(reach / spacing) - 2, int(reach / spacing) + 3)]
    crossing = [u0 + k * across for k in range(-int(reach / across) - 2, int(reach / across) + 3)]
    streets = [[place(u, v) for u in metres] for v in along]
    for u in crossing:
        bearings = (place(u, v) for v in metres)
        streets.append([(x, y, bearing + math.pi / 2) for x, y, bearing in bearings])
    lots = []
    for v, u, opposite in product(along, crossing, (0, 1)):
        lots += row_of_lots(rng, place, u, across, v, spacing, opposite)
    return streets, assign(rng, lots, middle)


def raise_streets(canvas: Canvas, window, long: np.ndarray, u: np.ndarray) -> None:
    """Embankments and cuttings along the long streets, with slopes of 4 m; the streets across ramp
    up to them."""
    rng = canvas.rng
    high, low, phase = rng.uniform(0, 3), rng.uniform(-1.5, 0.5), rng.uniform(0, 1)
    profile = high + (low - high) * (0.5 + 0.5 * wave(u / rng.uniform(70, 110) + phase))
    slope = np.clip(1 - (long - STREET / 2 - WALK) / 4, 0, 1)
    canvas.ground[window] += (canvas.difficulty * profile * slope).astype(np.float32)


def row_of_lots(rng, place, u, across, v, spacing, opposite: int) -> list:
    """The lots of a block along street v, between the streets at u and u + across; `opposite` is 0
    for those on one edge of the street and 1 for those on the other."""
    edge = STREET / 2 + WALK
    depth, u, end, lots = spacing / 2 - edge, u + edge, u + across - edge, []
    while end - u > 9:
        width = min(rng.uniform(14, 20), end - u)
        x, y, angle = place(u + width / 2, v + (edge + depth / 2) * (1 - 2 * opposite))
        lots.append(Lot(x, y, angle + math.pi * opposite, width, depth))
        u += width
    return lots


def assign(rng: np.random.Generator, lots: list, middle: tuple[float, float]) -> list:
    """(lot, kind) from the middle outwards, the kinds in turns, each turn shuffled."""
    (x, y), kinds = middle, []
    while len(kinds) < len(lots):
        kinds += [KINDS[int(k)] for k in rng.permutation(len(KINDS))]
    outwards = sorted(lots, key=lambda lot: (lot.x - x) ** 2 + (lot.y - y) ** 2)
    return list(zip(outwards, kinds))


def draw_lot(canvas: Canvas, lot: Lot, kind: str) -> None:
    """A house, a flat-roofed building, a paved yard of the same outlines, or works."""
    rng, difficulty = canvas.rng, canvas.difficulty
    window, a, b, _ = canvas.rectangle(lot.x, lot.y, lot.angle, lot.width, lot.depth)
    inside = np.minimum(lot.width / 2 - np.abs(a), lot.depth / 2 - np.abs(b))
    terrace = difficulty * rng.uniform(-2.6, 2.6)
    canvas.ground[window] += (terrace * np.clip(inside / 1.2, 0, 1)).astype(np.float32)
    for side in (-0.5, 0.5):  # hedges towards the neighbours
        if rng.random() < mix(0.25, 0.5, difficulty):
            height, broad = mix(1.0, rng.uniform(0.9, 2.2), difficulty), rng.uniform(0.8, 1.4)
            middle = lot.at(side * (lot.width - 3), 1)
            hedge(canvas, *middle, lot.angle + math.pi / 2, lot.depth - 3, broad, height)
    if kind == "works":
        draw_works(canvas, lot)
    else:
        draw_building(canvas, lot, kind)
    if rng.random() < 0.35:
        things = ("basin", "container", "rubble")
        place = lot.at(rng.uniform(-0.3, 0.3) * lot.width, lot.depth / 2 - 3.5)
        draw_clutter(canvas, pick(rng, things), *place, lot.angle)


def draw_works(canvas: Canvas, lot: Lot) -> None:
    """A building site, a sports ground, a playground or a pool, in grass or gravel."""
    rng = canvas.rng
    kind = pick(rng, ("site", "court", "playground", "pool"))
    if kind == "site":
        side = lot.width - 3, lot.depth - 3
        slab(canvas, lot.x, lot.y, lot.angle, *side, IMPERVIOUS, 0.0, "gravel")
        for b in (-5, 0.5, 6):
            thing = pick(rng, ("container", "rubble", "rubble"))
            draw_clutter(canvas, thing, *lot.at(rng.uniform(-3, 3), b), lot.angle)
        return
    thing = "basin" if kind == "pool" else kind
    for b in (-4.7, 4.7):
        draw_clutter(canvas, thing, *lot.at(0, b), lot.angle)


def flat_material(canvas: Canvas, roof: bool) -> str:
    """What a flat roof or a yard is covered with."""
    rng = canvas.rng
    if rng.random() > mix(0.0, 0.6, canvas.difficulty):
        return "asphalt"
    return pick(rng, ("concrete", "gravel", "clay", "grass" if roof else "gravel"))


def draw_building(canvas: Canvas, lot: Lot, kind: str) -> None:
    """A house, a flat roof or a yard, with a forecourt, a wing and a garage at times."""
    rng, (width, depth), angle = canvas.rng, (lot.width, lot.depth), lot.angle
    length, broad = min(width - 1.5, rng.uniform(11, 17)), min(depth - 5, rng.uniform(10, 14))
    setback = rng.uniform(1.0, depth - broad - 2)
    a, b = rng.uniform(-1, 1) * (width - length - 1) / 2, -depth / 2 + setback + broad / 2
    if rng.random() < 0.6:  # a forecourt from the street to the front, at times with a car
        court = rng.uniform(3, 7)
        shift = rng.uniform(-1, 1) * (width - court) / 2
        middle, paving = lot.at(shift, (setback - depth) / 2), flat_material(canvas, roof=False)
        slab(canvas, *middle, angle, court, setback + 0.4, IMPERVIOUS, 0.0, paving)
        if setback > 5:
            draw_car(canvas, *lot.at(shift, -depth / 2 + 2.8), angle + math.pi / 2)
    if kind == "house":
        if length > broad or rng.random() < 0.3:  # the ridge mostly runs along the longer side
            gable(canvas, *lot.at(a, b), angle, length, broad)
        else:
            gable(canvas, *lot.at(a, b), angle + math.pi / 2, broad, length)
        if rng.random() < mix(0, 0.6, canvas.difficulty):  # a garage
            place = lot.at(pick(rng, (-1, 1)) * (width / 2 - 2.2), depth / 2 - 4)
            roof, top = flat_material(canvas, roof=True), rng.uniform(2.2, 2.8)
            slab(canvas, *place, angle, 3.2, 6, BUILDING, top, roof)
        return
    roof = kind == "flat"
    low, high = mix(3.0, 2.4, canvas.difficulty), mix(8.0, 6.5, canvas.difficulty)
    label, top = (BUILDING, rng.uniform(low, high)) if roof else (IMPERVIOUS, 0.0)
    cover = flat_material(canvas, roof)
    slab(canvas, *lot.at(a, b), angle, length, broad, label, top, cover)
    if rng.random() < 0.5:  # a wing behind makes the outline an L
        wing = rng.uniform(0.4, 1) * (depth / 2 - b - broad / 2)
        end = pick(rng, (-1, 1)) * length / 4
        middle = lot.at(a + end, b + (broad + wing) / 2)
        slab(canvas, *middle, angle, length / 2, wing, label, top, cover)
    if not roof and rng.random() < mix(0.3, 0.7, canvas.difficulty):  # a car park
        for k in range(int(length / 2.7)):
            for row in (-1, 1):
                if rng.random() < 0.6:
                    place = lot.at(a + (k + 0.5) * 2.7 - length / 2, b + row * (broad / 2 - 2.8))
                    draw_car(canvas, *place, angle + math.pi / 2 + rng.normal(0, 0.04))


# -------------------------------------------------------------------------------- cars and greenery


def draw_traffic(canvas: Canvas, streets: list) -> None:
    """Parked cars along one side of every street, and a few that drive."""
    rng = canvas.rng
    for street in streets:
        kerb = pick(rng, (-1, 1))
        for offset, gap in ((2.4 * kerb, 7.0), (0.1 * kerb, 30.0), (-2.2 * kerb, 40.0)):
            moving = abs(offset) < 1 and canvas.difficulty > 0
            k = rng.uniform(0, gap)
            while k < len(street):
                x, y, angle = street[int(k)]
                place = turned(x, y, angle, 0, offset)
                draw_car(canvas, *place, angle + rng.normal(0, 0.03), moving)
                k += 6.4 + rng.exponential(gap)


def draw_greenery(canvas: Canvas) -> None:
    """Clusters of crowns on the green ground: first shrubberies, then trees, until each covers its
    part of the tile."""
    rng, (rows, columns), difficulty = canvas.rng, canvas.shape, canvas.difficulty
    for shrub, cover in ((True, rng.uniform(0.12, 0.17)), (False, rng.uniform(0.18, 0.25))):
        wanted = cover * rows * columns
        for _ in range(rows * columns // 800):
            row, column = int(rng.integers(rows)), int(rng.integers(columns))
            if wanted <= 0:
                break
            if canvas.labels[row, column] != LOW:
                continue
            colour = canvas.leaf_colour()
            for _ in range(int(rng.integers(1, 6))):
                x, y = column * PIXEL + rng.normal(0, 2.2), row * PIXEL + rng.normal(0, 2.2)
                radius = rng.uniform(1.5, 3.4)
                top = mix(0.35, rng.uniform(0.4, 1.8), difficulty)
                if not shrub:
                    top = mix(2.0, 1.0, difficulty) + radius * rng.uniform(1.3, 3.0)
                wanted -= crown(canvas, x, y, radius, colour, top, shrub)
