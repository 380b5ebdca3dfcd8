"""Labels of one image as a user has them, polygons or a raster -> classes, with a name and a colour
each, and class indices.

Shapes: `H, W` pixels of the image; labels are uint8 class indices, 255 = not labelled."""

from __future__ import annotations

import colorsys
from itertools import count
from pathlib import Path
from typing import Iterator
from xml.etree import ElementTree

import numpy as np

from geodata.geojson import MOST, read_polygons
from geodata.grids import read_grid
from geodata.layouts import IGNORE, Classes
from geodata.polygons import burn
from geodata.scaling import data_pixels
from geodata.slices import DataError, Raster
from geodata.tiles import Tile

# Told apart also by those who do not tell red from green (M. Okabe, K. Ito, 2008)
ORANGE, SKY, GREEN, YELLOW = (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)
BLUE, VERMILLION, PURPLE, GREY = (0, 114, 178), (213, 94, 0), (204, 121, 167), (153, 153, 153)


def colours() -> Iterator[tuple[int, ...]]:
    """Colours without end: the safe ones, then around the circle."""
    yield from (ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE, GREY)
    for i in count():
        rgb = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.09 * (i % 5), 0.95 - 0.17 * (i % 3))
        yield tuple(round(255 * v) for v in rgb)


def from_polygons(path: Path, field: str, tile: Tile) -> tuple[Classes, np.ndarray]:
    """Classes, and labels (H, W) on the tile's grid; of polygons that overlap the later one counts,
    and what none covers is not labelled. Raises DataError."""
    found = read_polygons(path, field, read_grid(tile.raster("image")), tile.size)
    labels, twice = np.full(tile.size, IGNORE, np.uint8), 0
    for name, rings in found.polygons:
        twice += burn(labels, rings, found.names.index(name))
    tile.notes += found.notes
    if twice:
        tile.notes.append(f"{path}: polygons of two classes share {twice} pixels, the later counts")
    return tuple(zip(found.names, colours())), labels


def from_raster(tile: Tile) -> tuple[Classes, np.ndarray]:
    """The same of the tile's label raster: a class for each of its colours, or for each number but
    255 and no data. Raises DataError."""
    raster = tile.raster("labels")
    strips = data_pixels(raster, raster.valid)
    if raster.bands >= 3:
        codes = (pixels[:, :3].astype(np.int64) @ (65536, 256, 1) for pixels in strips)
        values = _values(raster, codes, raster.dtype == np.uint8, 0xFFFFFF)
        found = [(v >> 16, v >> 8 & 255, v & 255) for v in values]
        tile.classes = tuple(("#{:02x}{:02x}{:02x}".format(*rgb), rgb) for rgb in found)
        tile.unscored_color = None if raster.nodata is None else (int(raster.nodata),) * 3
    else:
        numbers = (pixels[:, 0] for pixels in strips)
        values = _values(raster, numbers, raster.dtype.kind in "ui", 0xFFFF, IGNORE)
        beside, names = raster.path.with_name(raster.path.name + ".aux.xml"), {}
        if beside.is_file():
            categories = ElementTree.parse(beside).iter("Category")
            names = {k: category.text for k, category in enumerate(categories)}
        own = [] if raster.palette is None else [tuple(c.tolist()) for c in raster.palette]
        own = [own[v] for v in values if v < len(own)]
        free = own if len(set(own)) == len(values) else colours()
        called = [names.get(v) or f"class {v}" for v in values]
        called = [f"{n} ({v})" if called.count(n) > 1 else n for n, v in zip(called, values)]
        tile.classes = tuple(zip(called, free))
        number = {v: k for k, v in enumerate(values)}
        tile.codes = tuple(number.get(v, IGNORE) for v in range(values[-1] + 1))
    return tile.classes, tile.read_labels()


def _values(
    raster: Raster, strips: Iterator[np.ndarray], fits: bool, top: int, left_out: int | None = None
) -> list[int]:
    """The different values that are classes. Raises DataError for too many and for those above
    `top`, and where the type of the raster does not fit."""
    found = set()
    for strip in strips:
        found |= {*np.unique(strip).tolist()}
    values = sorted(found - {left_out})
    if not (fits and 2 <= len(values) <= MOST and 0 <= values[0] and values[-1] <= top):
        held = f"holds {len(values)} different values of {raster.dtype}"
        needed = f"labels are 2 to {MOST} class numbers from 0, or as many flat colours"
        remedy = "gdal_translate -ot Byte IN OUT.tif"
        raise DataError(f"{raster.path}: {held}; {needed}: {remedy}")
    return values
