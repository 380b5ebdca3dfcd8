"""Rasters behind slices: `raster[rows, columns]` reads what is asked for, `raster[:, :]` all of it,
so that an orthophoto need not fit in memory. `rasters.py` opens them.

Every mistake is a DataError of one line that names the file.

Shapes: `H, W` pixels of a raster, `h, w` of a slice, `C` bands, bands last, `S` of a segment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from geodata.codecs import NONE, Codec, picture_pixels

Box = tuple[slice, slice]

STRIP = 512  # rows that are worked on at a time, so that temporary arrays stay small


class DataError(ValueError):
    """A mistake in the data or in what was asked of them; the message names the file and says what
    to do."""


def unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read ({one_line(error)}); replace the file")


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def row_strips(raster) -> Iterator[np.ndarray]:
    """An array, or what slices like one, from top to bottom in strips of at most STRIP rows."""
    for box in strip_boxes(raster.shape):
        yield raster[box]


def strip_boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    for top in range(0, shape[0], STRIP):
        yield np.s_[top : min(top + STRIP, shape[0]), 0 : shape[1]]


def with_bands(pixels: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, C) -> (h, w, C)."""
    return pixels if pixels.ndim == 3 else pixels[..., None]


def ranges(box: Box, shape: tuple[int, ...]) -> tuple[range, range]:
    return tuple(range(*part.indices(n)) for part, n in zip(box, shape))


@dataclass
class Raster:
    """A file behind slices. A slice is an array in the type of the file, (h, w) or (h, w, C)."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    segment: tuple[int, int]  # height and width of the segments that the file is cut into
    codec: Codec | None = None  # None: a picture
    places: np.ndarray | None = None  # (segments, 2): offset and bytes; 0 bytes: left out
    colours: str = "grey"  # or rgb, palette
    palette: np.ndarray | None = None  # (N, 3) uint8
    nodata: float | None = None
    alpha: int | None = None  # the band that says how opaque a pixel is
    mask: Raster | None = None  # 0 where there is no data
    scale: float = 1.0  # of the first band: what is meant is value * scale + offset, in metres
    offset: float = 0.0
    geo: dict = field(default_factory=dict)  # tags and GeoTIFF keys that say where it lies
    blocks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # decoded segments
    held: np.ndarray | None = None  # all of it, where it is in memory

    @property
    def bands(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def nbytes(self) -> int:
        """Of memory that lasts."""
        return sum(part.nbytes for part in (self.held, self.mask) if part is not None)

    @property
    def planes(self) -> int:
        """Bands that lie one after the other in the file; 1 where pixels lie side by side."""
        return self.bands // self.codec.samples if self.codec else 1

    @property
    def segments(self) -> tuple[int, int]:
        """How many lie below each other, and beside each other."""
        return tuple(-(-n // side) for n, side in zip(self.shape, self.segment))

    @property
    def in_parts(self) -> bool:
        """Whether slices cost about what they hold: whether segments are small."""
        if self.codec is None:
            return False
        samples = self.segment[0] * self.segment[1] * self.codec.samples
        return self._in_rows or samples * self.dtype.itemsize <= 1 << 22

    def __getitem__(self, box: Box) -> np.ndarray:
        if self.held is not None:
            return self.held[box]
        rows, columns = ranges(box, self.shape)
        try:
            out = (self._rows if self._in_rows else self._from_blocks)(rows, columns)
        except Exception as error:  # a damaged file makes decoders raise anything
            raise unreadable(self.path, error) from error
        return out.reshape(len(rows), len(columns), *self.shape[2:])

    @cached_property
    def _in_rows(self) -> bool:
        """Whether rows lie uncompressed in one piece. They are then read one by one, which takes a
        third of the time of a memory map, whose every row is a page fault."""
        if self.codec is None or self.planes > 1 or self.segment[1] != self.shape[1]:
            return False
        plain = self.codec.compression == NONE and self.codec.bits == 8 * self.dtype.itemsize
        joined = self.places.sum(axis=1)[:-1] == self.places[1:, 0]
        return plain and bool(self.places.all() and joined.all())

    def _rows(self, rows: range, columns: range) -> np.ndarray:
        pixels = np.empty((len(rows), len(columns), self.bands), self.codec.dtype)
        pixel, start = self.codec.dtype.itemsize * self.bands, int(self.places[0, 0])
        with open(self.path, "rb", buffering=0) as file:
            for row, into in zip(rows, pixels):
                file.seek(start + (row * self.shape[1] + columns.start) * pixel)
                if file.readinto(into) < into.nbytes:
                    raise ValueError("truncated while it was in use")
        return pixels.astype(self.dtype, copy=False)

    def _from_blocks(self, rows: range, columns: range) -> np.ndarray:
        (height, width), (down, across) = self.segment, self.segments
        samples = self.bands // self.planes
        out = np.empty((len(rows), len(columns), self.bands), self.dtype)
        # Made for reading downwards: segments above a slice go, and those far below it, so that
        # overlapping windows decode each once and random crops keep few.
        first, last = rows.start // height, (rows.stop + STRIP) // height
        self.blocks = {at: b for at, b in self.blocks.items() if first <= at[0] <= last}
        places = product(
            range(self.planes),
            range(first, -(-rows.stop // height)),
            range(columns.start // width, -(-columns.stop // width)),
        )
        for plane, i, j in places:
            index = (plane * down + i) * across + j
            if (i, index) not in self.blocks:
                self.blocks[i, index] = self._decode(index, i * height)
            y, x = rows.start - i * height, columns.start - j * width  # the slice in the segment
            into = out[max(-y, 0) : height - y, max(-x, 0) : width - x]
            block = self.blocks[i, index][max(y, 0) : y + len(rows), max(x, 0) : x + len(columns)]
            into[..., plane * samples : (plane + 1) * samples] = block
        return out

    def _decode(self, index: int, top: int) -> np.ndarray:
        """A segment (h, w, S); one of strips ends where the raster does."""
        if self.codec is None:
            return picture_pixels(self.path, self.shape)
        h, w = self.segment
        h = h if self.codec.tiled else min(h, self.shape[0] - top)
        if not self.places[index, 1]:  # left out, which means no data
            fill = 0 if self.nodata is None else self.nodata
            return np.full((h, w, self.codec.samples), fill, self.dtype)
        return self.codec.unpack(self.packed(index), h, w, index, self.segment[0])

    def packed(self, index: int) -> bytes:
        """A segment as it is in the file."""
        offset, count = map(int, self.places[index])
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(count)

    def valid(self, box: Box, pixels: np.ndarray | None = None) -> np.ndarray | None:
        """(h, w) bool, where the slice of `box`, read already or not, is data; None for a raster
        without holes. There is none where the mask or the alpha band is 0, and where every other
        band has the no-data value."""
        if not self.has_holes:
            return None
        pixels = with_bands(self[box] if pixels is None else pixels)
        out = np.ones(pixels.shape[:2], bool) if self.mask is None else self.mask[box] != 0
        if self.alpha is not None:
            out &= pixels[..., self.alpha] != 0
        if self.nodata is not None:
            colors = pixels[..., [band for band in range(self.bands) if band != self.alpha]]
            nan = self.nodata != self.nodata
            out &= (colors == colors if nan else colors != self.nodata).any(-1)
        return out

    @property
    def has_holes(self) -> bool:
        return (self.mask, self.alpha, self.nodata) != (None, None, None)

    def in_memory(self) -> Raster:
        """The same, held in the type of the file: uint8 heights take a quarter of float32."""
        whole, mask = np.ascontiguousarray(self[:, :]), self.mask and self.mask.in_memory()
        return replace(self, held=whole, mask=mask, blocks={})

    def __getstate__(self) -> dict:
        return {**self.__dict__, "blocks": {}}


@dataclass
class View:
    """What `read(box)` gives, as far as `shape` reaches: slices like an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]  # a process of its own needs one of a module
    nbytes: int = 0  # of memory that lasts

    def __getitem__(self, box: Box) -> np.ndarray:
        return self.read(tuple(slice(part.start, part.stop) for part in ranges(box, self.shape)))


def view_of(source: Raster | View, function: Callable, *more, dtype: type | None = None) -> View:
    """`function(source[box], *more)` behind slices, of the source's type unless one is given."""
    read = partial(_read_by, source, function, more)
    return View(source.shape, source.dtype if dtype is None else np.dtype(dtype), read)


def _read_by(source: Raster | View, function: Callable, more: tuple, box: Box) -> np.ndarray:
    return function(source[box], *more)
