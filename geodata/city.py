"""A procedural city: a tile of streets, houses, greenery and cars as an image, heights and labels.
Writes no file.

The image alone is ambiguous on purpose. Flat roofs are painted by the function that paints yards,
with the asphalt of the streets; shrubberies (low vegetation) by the function that paints
broadleaved crowns. What tells them apart is the height. To keep shadows from giving the answer
away, some yards and shrubberies throw the shadow of a tall thing: `Canvas.caster` is the height
that throws shadows, `Canvas.relief` the surface that the sun shades, and `Canvas.height` the truth,
which goes to the DSM.

Lengths are metres and angles radians throughout; x runs along columns and y along rows. One pixel
is 9 cm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

GENERATOR_VERSION = (
    2  # raise it whenever a tile changes, so that old folders are not taken for new ones
)


PIXEL = 0.09  # metres


CLASSES = ("impervious", "building", "low vegetation", "tree", "car", "clutter")


IMPERVIOUS, BUILDING, LOW, TREE, CAR, CLUTTER = range(6)


PALETTE = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))


# Albedos in the image's bands: near infrared, red, green.
ASPHALT = (0.38, 0.39, 0.41)


SIDEWALK = (0.53, 0.52, 0.51)


LAWN = (0.66, 0.33, 0.34)


LEAVES = (0.62, 0.20, 0.25)


OTHER_LEAVES = ((0.36, 0.10, 0.17), (0.84, 0.29, 0.36))  # conifers, young birches


TILES = (
    (0.58, 0.50, 0.34),
    (0.50, 0.40, 0.28),
    (0.27, 0.28, 0.33),
    (0.68, 0.66, 0.60),
)  # new clay to concrete


PAINT = (
    (0.93, 0.93, 0.93),
    (0.90, 0.89, 0.86),
    (0.08, 0.08, 0.09),
    (0.72, 0.74, 0.76),
    (0.62, 0.62, 0.16),
    (0.20, 0.22, 0.55),
    (0.16, 0.45, 0.50),
    (0.80, 0.76, 0.30),
)


CONTAINER = ((0.25, 0.30, 0.72), (0.75, 0.55, 0.15), (0.20, 0.55, 0.45))


@dataclass
class Scene:
    """One tile."""

    image: np.ndarray  # (H, W, 3) uint8: near infrared, red, green
    dsm: np.ndarray  # (H, W) float32, metres above sea level
    labels: np.ndarray  # (H, W) uint8, 0 to 5 as in CLASSES


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


# --------------------------------------------------------------------------------------- the canvas


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
    return x + a * math.cos(angle) - b * math.sin(angle), y + a * math.sin(angle) + b * math.cos(
        angle
    )


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
        fine, small, large = (
            noise(rng, self.shape, 1),
            noise(rng, self.shape, 4),
            noise(rng, self.shape, 60),
        )
        stains, veins = noise(rng, self.shape, 14), noise(rng, self.shape, 45)
        # Textures are fields over the whole tile, so that asphalt is the same asphalt on a roof and
        # on the street.
        self.asphalt = (
            0.07 * fine
            + 0.04 * small
            + 0.05 * stains
            + 0.04 * large
            - 0.16 * (np.abs(veins) < 0.012)
        )
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

        put(self.relief, relief)
        for layer, value in (
            (self.labels, label),
            (self.albedo, albedo),
            (self.height, height),
            (self.caster, height if caster is None else caster),
        ):
            if value is not None:
                put(layer, value)

    def asphalt_albedo(self, window) -> np.ndarray:
        """Asphalt of a slightly varying age, (h, w, 3): the one paint of streets, yards and flat
        roofs.
        """
        return self.tone * self.rng.uniform(0.93, 1.07) * (1 + self.asphalt[window])[..., None]


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
    long = np.abs(
        (v - v0 + spacing / 2) % spacing - spacing / 2
    )  # distance to the middle of the nearest street
    short = np.abs((u - u0 + across / 2) % across - across / 2)
    nearest = np.minimum(long, short)
    joints = (u % 0.6 < 0.09) | (v % 0.6 < 0.09)
    paving = np.float32(SIDEWALK) * (1 + 0.7 * canvas.asphalt - 0.12 * joints)[..., None]
    canvas.paint(window, nearest < STREET / 2 + WALK, IMPERVIOUS, paving, 0.1)
    canvas.paint(window, nearest < STREET / 2, IMPERVIOUS, canvas.asphalt_albedo(window), 0.0)
    dashes = (long < 0.08) & (u % 6 < 3) & (short > STREET) | (short < 0.08) & (v % 6 < 3) & (
        long > STREET
    )
    canvas.paint(window, dashes, albedo=0.8)

    metres = np.arange(-reach - 10, reach + 10)
    along = [v0 + k * spacing for k in range(-int(reach / spacing) - 2, int(reach / spacing) + 3)]
    crossing = [u0 + k * across for k in range(-int(reach / across) - 2, int(reach / across) + 3)]
    streets = [[place(u, v) for u in metres] for v in along]
    streets += [
        [(x, y, turn + math.pi / 2) for x, y, turn in (place(u, v) for v in metres)]
        for u in crossing
    ]
    lots = []
    for v in along:
        for u in crossing:
            for side in (0, 1):
                lots += row_of_lots(rng, place, u, across, v, spacing, side)
    return Plan(streets, lots)


def row_of_lots(rng, place, u: float, across: float, v: float, spacing: float, side: int) -> list:
    """The lots of one block along one side of the street v, between the streets at u and u +
    across.
    """
    edge = STREET / 2 + WALK
    depth, u, end, lots = spacing / 2 - edge, u + edge, u + across - edge, []
    while end - u > 9:
        width = min(rng.uniform(14, 20), end - u)
        x, y, angle = place(u + width / 2, v + (edge + depth / 2) * (1 - 2 * side))
        lots.append((x, y, angle + math.pi * side, width, depth))
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
        leafy(
            canvas,
            window,
            mask & (canvas.labels[window] == LOW),
            LOW,
            LEAVES,
            1.0 + 0.2 * canvas.leaves[window],
            0,
        )
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
        slab(
            canvas,
            *at(shift, (setback - depth) / 2),
            angle,
            court,
            setback + 0.4,
            IMPERVIOUS,
            0.0,
            0.0,
        )
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
        slab(
            canvas,
            *at(a + end, b + (broad + wing) / 2),
            angle,
            length / 2,
            wing,
            label,
            height,
            caster,
        )


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
        canvas.paint(
            window,
            water,
            CLUTTER,
            np.float32((0.05, 0.28, 0.40)) * (1 + grain)[..., None],
            -0.3,
            0.0,
        )
    elif kind == "container":
        ribs = 1 + 0.12 * np.sin(a * (2 * math.pi / 0.5))
        canvas.paint(
            window,
            mask,
            CLUTTER,
            np.float32(CONTAINER[rng.integers(len(CONTAINER))]) * ribs[..., None],
            2.6,
        )
    else:
        heap = np.clip(1.3 - (2 * a / length) ** 2 - (2 * b / width) ** 2 + 0.25 * leaves, 0, 1)
        canvas.paint(
            window,
            heap > 0,
            CLUTTER,
            np.float32((0.62, 0.55, 0.45)) * (1 + 3 * grain)[..., None],
            1.6 * heap,
            relief=1.6 * heap + 0.2 * leaves,
        )


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
    canvas.paint(window, mask, BUILDING, albedo, eaves + slope * inside, relief=slope * inside)
    chimney = (np.abs(a - length * rng.uniform(-0.3, 0.3)) < 0.4) & (np.abs(b - 0.8) < 0.3) & mask
    canvas.paint(
        window, chimney, BUILDING, 0.55, eaves + slope * inside + 1.2, relief=slope * inside
    )


# -------------------------------------------------------------------------------- cars and greenery


def draw_traffic(canvas: Canvas, plan: Plan) -> None:
    """Parked cars along one side of every street, and a few that drive."""
    rng = canvas.rng
    for street in plan.streets:
        side = rng.choice((-1, 1))
        for offset, gap in ((2.4 * side, 10.0), (0.1 * side, 45.0), (-2.2 * side, 45.0)):
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
    if (
        not body.any()
        or (canvas.labels[window][around] != IMPERVIOUS).any()
        or canvas.height[window][around].max() > 1
    ):
        return
    colour = np.float32(PAINT[rng.integers(len(PAINT))])
    albedo = np.broadcast_to(colour, a.shape + (3,)) * (1 - 0.10 * (np.abs(a) > 1.2))[..., None]
    glass = ((a > 0.45) & (a < 1.0) | (a < -1.35) & (a > -1.75)) & (np.abs(b) < width * 0.42)
    albedo[glass] = (0.12, 0.14, 0.17)
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
    lobes = sum(
        rng.uniform(0, 0.10) * np.cos(k * np.arctan2(b, a) + rng.uniform(0, 6.28))
        for k in (2, 3, 5)
    )
    distance = np.sqrt(a * a + b * b) / (radius * (1 + lobes + 0.06 * canvas.leaves[window]))
    if (canvas.labels[window][distance < 0.1] == BUILDING).any():
        return 0  # trunks stand beside houses
    dome = np.sqrt(np.clip(1 - distance**2, 0, 1))
    tall = top * (0.6 + 0.4 * dome) + 0.3 * canvas.leaves[window]
    label, height = (LOW, 0.35 + 0.1 * canvas.leaves[window]) if decoy else (TREE, tall)
    free = canvas.labels[window] == LOW
    if not decoy:  # a crown hangs over a roof well below it, and ends at another
        roof = canvas.labels[window] == BUILDING
        free = (canvas.height[window] < np.where(roof, 0.6 * top, tall)) & (
            canvas.labels[window] != CLUTTER
        )
    mask = (distance < 1) & free
    old = canvas.height[window] > 0.2 if decoy else canvas.labels[window] == TREE
    gained = int((mask & ~old).sum())
    caster = tall if not decoy or rng.random() < 0.6 else height
    leafy(canvas, window, mask, label, colour, height, caster, 0.55 * radius * dome)
    return gained


def draw_greenery(canvas: Canvas) -> None:
    """Clusters of crowns on the green ground: first shrubberies, then trees, until each has its
    share of the tile.
    """
    rng, (rows, columns) = canvas.rng, canvas.shape
    for decoy, share in ((True, rng.uniform(0.14, 0.20)), (False, rng.uniform(0.16, 0.25))):
        wanted = share * rows * columns
        for _ in range(rows * columns // 800):
            row, column = rng.integers(rows), rng.integers(columns)
            if wanted <= 0:
                break
            if canvas.labels[row, column] != LOW:
                continue
            usual = decoy or rng.random() < 0.5
            colour = np.float32(LEAVES if usual else OTHER_LEAVES[rng.integers(2)]) * rng.uniform(
                0.9, 1.1
            )
            for _ in range(rng.integers(1, 6)):
                x, y = column * PIXEL + rng.normal(0, 2.2), row * PIXEL + rng.normal(0, 2.2)
                radius = rng.uniform(1.5, 3.4)
                wanted -= crown(
                    canvas, x, y, radius, colour, 2.0 + radius * rng.uniform(1.4, 3.0), decoy
                )


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
    """The image, uint8 (H, W, 3): sun and sky on the albedo, then the lens, the sensor and the lab."""
    rng = canvas.rng
    azimuth, elevation = (
        math.pi / 2 + rng.uniform(-1.0, 1.0),
        rng.uniform(0.92, 1.10),
    )  # high, from the south
    toward_x, toward_y, rise = math.cos(azimuth), math.sin(azimuth), math.tan(elevation)
    slope_y, slope_x = (np.clip(g / PIXEL, -1.6, 1.6) for g in np.gradient(canvas.relief))
    facing = (rise - toward_x * slope_x - toward_y * slope_y) / (
        rise * np.sqrt(1 + slope_x**2 + slope_y**2)
    )
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
    terrain = (
        rng.uniform(262, 286) + rng.uniform(-0.025, 0.025) * x + rng.uniform(-0.025, 0.025) * y
    )
    terrain = terrain + 0.4 * noise(rng, canvas.shape, 250)
    error = 0.06 * noise(rng, canvas.shape, 1) + 0.05 * noise(rng, canvas.shape, 7)
    return (terrain + blur(blur(canvas.height)) + error).astype(np.float32)
