"""Where rasters lie: grids out of GeoTIFF tags, world files and GDAL's sidecars; one raster laid on
the grid of another.

Shapes: `h, w` pixels of a source, `H, W` pixels of the target."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np

from geodata.rasters import GEO_TAGS, feet, open_raster
from geodata.slices import Box, DataError, Raster, View, ranges, strip_boxes

SAME = 0.01  # of a pixel: files that are written on one grid differ by rounding alone
USER_DEFINED = 32767
WORLD_FILES = {".png": ".pgw", ".jpg": ".jgw", ".jpeg": ".jgw"}  # of a TIFF .tfw; of any .wld
# GeoTIFF's keys that make a projection: method, centre, scale, shift, ellipsoid.
PROJECTION = re.compile(
    "Projection|ProjCoordTrans|Proj.*(Long|Lat|Parallel|Easting|Northing|Scale|Azimuth)"
    "|GeogSemi|GeogInv"
)


@dataclass(frozen=True)
class Grid:
    """Where pixels lie: the outer corner of the first one, and a pixel's size, rows going south.

    Columns that do not go east and rows that do not go south have a `turn`, or a negative step."""

    left: float
    top: float
    step_x: float
    step_y: float
    system: int | None = None  # the EPSG number; None where the file has parameters, or nothing
    projected: bool | None = None  # metres or degrees, None where the file does not tell
    turn: tuple[float, float] = (0.0, 0.0)  # x of a row further down, y of a column further right
    unit: float = 1.0  # metres of one unit of the coordinates
    parameters: tuple[tuple[str, float], ...] = field(default=(), compare=False)

    @property
    def north_up(self) -> bool:
        return self.step_x > 0 and self.step_y > 0 and self.turn == (0, 0)

    def pixel_size(self) -> float | None:
        """Metres, None where the coordinates are degrees."""
        if self.projected is False:
            return None
        sides = np.hypot((self.step_x, self.step_y), self.turn[::-1])
        return float(sides.mean()) * self.unit

    def moved(self, rows: int, columns: int) -> Grid:
        """The same grid from another pixel on."""
        left, top = self.corner(rows, columns)
        return replace(self, left=left, top=top)

    def corner(self, row: float, column: float) -> tuple[float, float]:
        """(x, y) of the upper left corner of a pixel."""
        x = self.left + column * self.step_x + row * self.turn[0]
        return x, self.top - row * self.step_y + column * self.turn[1]

    def pixels(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fractional (column, row) of places: the reverse of `corner`."""
        right, down, (turn_x, turn_y) = x - self.left, self.top - y, self.turn
        whole = self.step_x * self.step_y + turn_x * turn_y
        column = (right * self.step_y - down * turn_x) / whole
        return column, (down * self.step_x + right * turn_y) / whole

    def pixel_area(self) -> float | None:
        """Square metres, None where the coordinates are degrees."""
        if self.projected is False:
            return None
        return abs(self.step_x * self.step_y + self.turn[0] * self.turn[1]) * self.unit**2

    def world_file(self) -> str:
        """The six lines of a world file, which tells of the middle of the first pixel."""
        x, y = self.corner(0.5, 0.5)
        values = (self.step_x, self.turn[1], self.turn[0], -self.step_y, x, y)
        return "".join(f"{float(value)!r}\n" for value in values)


def read_grid(source: Path | Raster) -> Grid | None:
    """The grid of a raster, None without one. GDAL's sidecar counts first, then the tags, then a
    world file. Raises DataError by file."""
    raster = source if isinstance(source, Raster) else open_raster(source)
    geo = raster.geo
    scale, tie, matrix = (geo.get(code) for code in (33550, 33922, 34264))
    if "GeoTransform" in geo:
        left, step_x, turn_x, top, turn_y, down = geo["GeoTransform"]
    elif scale and tie and len(tie) == 6:
        step_x, down, turn_x, turn_y = scale[0], -scale[1], 0.0, 0.0
        left, top = tie[3] - tie[0] * step_x, tie[4] - tie[1] * down
    elif matrix and len(matrix) == 16:
        step_x, turn_x, _, left, turn_y, down, _, top = matrix[:8]
    elif lines := _world_lines(raster.path):
        step_x, turn_y, turn_x, down, x, y = lines
        left, top = x - (step_x + turn_x) / 2, y - (down + turn_y) / 2
    else:
        return None
    place = (left, step_x, turn_x, top, turn_y, down)
    if not np.isfinite(place).all() or step_x * down == turn_x * turn_y:
        raise DataError(
            f"{raster.path}: its pixels measure {step_x} x {-down}; georeference it again: "
            f"gdal_edit.py -a_ullr ULX ULY LRX LRY FILE"
        )
    if geo.get("GTRasterTypeGeoKey") == 2 and "GeoTransform" not in geo:
        left, top = left - (step_x + turn_x) / 2, top - (down + turn_y) / 2  # of the pixel's middle
    parameters = tuple(
        (key, float(value))
        for key, value in geo.items()
        if isinstance(key, str) and PROJECTION.match(key) and isinstance(value, (int, float))
    )
    projected = {1: True, 2: False}.get(geo.get("GTModelTypeGeoKey"))
    turn, unit = (float(turn_x), float(turn_y)), feet(geo, "ProjLinearUnitsGeoKey", 0)
    return Grid(left, top, step_x, -down, _system(geo), projected, turn, unit, parameters)


def _world_lines(path: Path) -> tuple[float, ...] | None:
    ending = WORLD_FILES.get(path.suffix.lower(), ".tfw")
    for suffix in (ending, ending.upper(), path.suffix + "w", ".wld"):
        beside = path.with_suffix(suffix)
        if beside != path and beside.is_file():
            try:
                a, b, c, d, e, f = map(float, beside.read_text().replace(",", ".").split())
            except ValueError as error:
                raise DataError(f"{beside}: not the six numbers of a world file") from error
            return a, b, c, d, e, f
    return None


def _system(geo: dict) -> int | None:
    code = geo.get("ProjectedCSTypeGeoKey", geo.get("GeographicTypeGeoKey"))
    if code is not None and int(code) not in (0, USER_DEFINED):
        return int(code)
    named = re.search(r"EPSG:(\d+)", str(geo.get(34737, "")))
    return int(named[1]) if named else None


def geo_tags(path: Path, row: int = 0, column: int = 0) -> list[tuple]:
    """The tags that say where a raster lies from a pixel on, as tifffile writes them (code, type,
    count, value, True); [] without."""
    raster = open_raster(path)
    geo = raster.geo
    if "GeoTransform" in geo or not (33922 in geo or 34264 in geo):
        grid = read_grid(raster)
        if grid is None:
            return []
        geo = {code: value for code, value in geo.items() if code not in (33550, 33922, 34264)}
        geo |= _place_tags(grid, point=geo.get("GTRasterTypeGeoKey") == 2)
    if row or column:  # every tie point is that much nearer to the first pixel
        tie, matrix = (np.array(geo.get(code, [])) for code in (33922, 34264))
        tie[0::6] -= column
        tie[1::6] -= row
        matrix[3::4] += column * matrix[0::4] + row * matrix[1::4]
        geo = {**geo, 33922: tuple(tie.tolist()), 34264: tuple(matrix.tolist())}
    kept = [(code, kind) for code, kind in GEO_TAGS.items() if np.size(geo.get(code, ()))]
    counts = [0 if kind == "s" else np.size(geo[code]) for code, kind in kept]
    return [(*tag, n, geo[tag[0]], True) for tag, n in zip(kept, counts)]


def _place_tags(grid: Grid, point: bool) -> dict[int, tuple]:
    """The values of the tags that lay a grid; of its first pixel's middle where the keys say that
    a place is a point."""
    left, top = grid.corner(0.5, 0.5) if point else (grid.left, grid.top)
    if grid.north_up:
        return {33550: (grid.step_x, grid.step_y, 0.0), 33922: (0.0, 0.0, 0.0, left, top, 0.0)}
    rows = (grid.step_x, grid.turn[0], 0.0, left), (grid.turn[1], -grid.step_y, 0.0, top)
    return {34264: (*rows[0], *rows[1], *[0.0] * 7, 1.0)}


# ------------------------------------------------------------------------------------- two of them


def same_grid(one: Grid, other: Grid, size: tuple[int, int]) -> bool:
    """Whether every pixel of a raster of `size` lies where the other's pixel of that index does."""
    pixel = min(abs(one.step_x) + abs(one.turn[0]), abs(one.step_y) + abs(one.turn[1]))
    corners = [(0, 0), (size[0], 0), (0, size[1]), size]
    drift = [np.subtract(one.corner(*c), other.corner(*c)) for c in corners]
    return one_system(one, other) and float(np.abs(drift).max()) <= SAME * pixel


def one_system(one: Grid, other: Grid) -> bool:
    """False where both files name their systems and these differ, by number or in a parameter;
    what is not named is taken for the same."""
    if None not in (one.projected, other.projected) and one.projected != other.projected:
        return False
    if None not in (one.system, other.system):
        return one.system == other.system
    theirs = dict(other.parameters)
    shared = [(value, theirs[key]) for key, value in one.parameters if key in theirs]
    return all(abs(a - b) <= 1e-9 * max(1, abs(a)) for a, b in shared) and one.unit == other.unit


def places_in(
    source: Grid, target: Grid, shape: tuple[int, ...], size: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The fractional rows (H,) of a source of `shape` at which the middles of the target's pixels
    lie, and which of them lie in it; the same of the columns (W,). Both grids go north."""
    starts = source.top - target.top, target.left - source.left
    steps = (target.step_y, source.step_y), (target.step_x, source.step_x)
    found = []
    for start, (step, own), n, length in zip(starts, steps, size, shape):
        places = (start + (np.arange(n) + 0.5) * step) / own - 0.5
        found.append((places, (places >= -0.5) & (places <= length - 0.5)))
    return found


def on_grid(
    path: Path, source: View, source_grid: Grid, target: Grid, size: tuple[int, int], lay: Callable
) -> View:
    """The raster (h, w) of a file on the target's grid of `size`, slice by slice, by `lay`:
    `resample` or `nearest`. Raises DataError by file where it cannot be laid there."""
    if not one_system(source_grid, target):
        one, other = (
            f"EPSG:{g.system}" if g.system else "degrees" if g.projected is False else "parameters"
            for g in (source_grid, target)
        )
        raise DataError(
            f"{path}: lies in another coordinate system ({one}) than the image ({other}); warp it: "
            f"gdalwarp -t_srs SYSTEM IN OUT.tif"
        )
    if not (source_grid.north_up and target.north_up):
        raise DataError(
            f"{path}: lies on another grid than the image, and one of them is rotated or goes "
            f"south; warp it: gdalwarp IN OUT.tif"
        )
    along = places_in(source_grid, target, source.shape, size)
    if not all(inside.any() for _, inside in along):
        raise DataError(
            f"{path}: does not overlap the image: by their georeferences they show different "
            f"places; check them with gdalinfo"
        )

    def read(box: Box) -> np.ndarray:
        parts, needed = ranges(box, size), []
        for part, (places, inside), n in zip(parts, along, source.shape):
            here = places[part.start : part.stop][inside[part.start : part.stop]]
            low, high = (int(here[0]) - 1, int(here[-1]) + 3) if len(here) else (0, 1)
            needed.append(slice(max(low, 0), min(high, n)))
        moved = source_grid.moved(*(part.start for part in needed))
        part_of = target.moved(*(part.start for part in parts))
        return lay(source[tuple(needed)], moved, part_of, tuple(map(len, parts)))

    return View((*size, *source.shape[2:]), source.dtype, read)


def nearest(array: np.ndarray, source: Grid, target: Grid, size: tuple[int, int]) -> np.ndarray:
    """Labels (h, w) on the target's grid -> (H, W); 255 where the source does not reach."""
    (rows, above), (columns, beside) = places_in(source, target, array.shape, size)
    rows, columns = (
        np.clip(np.floor(places + 0.5), 0, n - 1).astype(np.intp)
        for places, n in zip((rows, columns), array.shape)
    )
    return np.where(above[:, None] & beside, array[rows[:, None], columns], array.dtype.type(255))


def resample(array: np.ndarray, source: Grid, target: Grid, size: tuple[int, int]) -> np.ndarray:
    """Heights (h, w) float32, NaN where missing, laid bilinearly on the target's grid -> (H, W)
    float32. A pixel is the weighted mean of its valid neighbours, NaN where there is none, and
    outside the source. Several bands (h, w, C) one by one."""
    if array.ndim == 3:
        bands = [resample(band, source, target, size) for band in np.moveaxis(array, -1, 0)]
        return np.stack(bands, axis=-1)
    (rows, above), (columns, beside) = places_in(source, target, array.shape, size)
    valid = np.isfinite(array)
    known, weights = np.where(valid, array, 0).astype(np.float32), valid.astype(np.float32)
    out = np.full(size, np.nan, np.float32)
    for strip, _ in strip_boxes(size):
        weight = bilinear(weights, rows[strip], columns)
        here = (weight > 1e-6) & above[strip, None] & beside
        out[strip][here] = bilinear(known, rows[strip], columns)[here] / weight[here]
    return out


def bilinear(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(h, w) at fractional places -> (len(rows), len(columns)) float32; places beyond the edge take
    its value."""
    for axis, places in enumerate((rows, columns)):
        last = array.shape[axis] - 1
        places = np.clip(places, 0, last)
        low = np.minimum(places.astype(np.intp), max(last - 1, 0))
        share = np.expand_dims((places - low).astype(np.float32), 1 - axis)
        high = np.minimum(low + 1, last)
        array = array.take(low, axis) * (1 - share) + array.take(high, axis) * share
    return array
