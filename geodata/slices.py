"""Rasters behind slices: `raster[rows, columns]` reads what is asked for, `raster[:, :]` all of it,
so that an orthophoto need not fit in memory. `rasters.py` opens them.

Every mistake is a DataError of one line that names the file.

Shapes: `H, W` pixels of a raster, `h, w` of a slice, `C` bands, bands last, `S` of a segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from geodata.codecs import NONE, Codec, picture_pixels

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


def strip_boxes(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    for top in range(0, shape[0], STRIP):
        yield np.s_[top : min(top + STRIP, shape[0]), 0 : shape[1]]


def ranges(box: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[range, range]:
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

    nbytes = 0  # of memory that lasts

    @property
    def bands(self) -> int:
        return self.shape[2] if len(self.shape) == 3 else 1

    @property
    def planes(self) -> int:
        """Bands that lie one after the other in the file; 1 where pixels lie side by side."""
        return self.bands if self.codec and self.codec.samples < self.bands else 1

    @property
    def across(self) -> int:
        """Segments side by side."""
        return -(-self.shape[1] // self.segment[1])

    @property
    def in_parts(self) -> bool:
        """Whether slices cost about what they hold: whether segments are small."""
        pixels = self.segment[0] * self.segment[1] * self.bands // self.planes
        return self._in_rows or bool(self.codec) and pixels * self.dtype.itemsize <= 1 << 22

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = ranges(box, self.shape)
        try:
            if self._in_rows:
                out = self._rows(rows, columns)
            else:
                out = self._from_blocks(rows, columns)
        except DataError:
            raise
        except Exception as error:  # a damaged file makes decoders raise anything
            raise unreadable(self.path, error) from error
        return out.reshape(len(rows), len(columns), *self.shape[2:])

    @cached_property
    def _in_rows(self) -> bool:
        """Whether rows lie uncompressed in one piece. They are then read one by one, which takes a
        third of the time of a memory map, whose every row is a page fault."""
        if self.codec is None or self.planes > 1 or self.segment[1] != self.shape[1]:
            return False
        plain = self.codec.compression == NONE and self.codec.predictor == 1
        ends = self.places.sum(axis=1)
        whole = self.codec.bits == 8 * self.dtype.itemsize and bool(self.places.all())
        return plain and whole and bool((ends[:-1] == self.places[1:, 0]).all())

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
        out = np.empty((len(rows), len(columns), self.bands), self.dtype)
        (height, width), samples = self.segment, self.bands // self.planes
        down = -(-self.shape[0] // height)
        # Made for reading downwards: segments above a slice go, and those far below it, so that
        # overlapping windows decode each once and random crops keep few.
        first, last = rows.start // height, (rows.stop + STRIP) // height
        self.blocks = {at: b for at, b in self.blocks.items() if first <= at[0] <= last}
        for i in range(first, -(-rows.stop // height)):
            for j in range(columns.start // width, -(-columns.stop // width)):
                top, left = i * height, j * width
                of_out, of_block = zip(*(
                    _common(part, start, n)
                    for part, start, n in ((rows, top, height), (columns, left, width))
                ))  # fmt: skip
                for plane in range(self.planes):
                    index = (plane * down + i) * self.across + j
                    if (i, index) not in self.blocks:
                        self.blocks[i, index] = self._decode(index, top)
                    bands = slice(plane * samples, (plane + 1) * samples)
                    out[(*of_out, bands)] = self.blocks[i, index][of_block]
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

    def valid(self, box: tuple[slice, slice], pixels: np.ndarray) -> np.ndarray | None:
        """(h, w) bool, where `pixels`, the slice of `box`, are data; None for a raster without such
        a thing. They are none where the mask or the alpha band is 0, and where every other band has
        the no-data value."""
        out = None if self.mask is None else self.mask[box] != 0
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if self.alpha is not None:
            opaque = pixels[..., self.alpha] != 0
            out = opaque if out is None else out & opaque
        if self.nodata is not None:
            colors = [band for band in range(pixels.shape[2]) if band != self.alpha]
            is_data = pixels[..., colors] != self.dtype.type(self.nodata)
            if self.nodata != self.nodata:
                is_data = pixels[..., colors] == pixels[..., colors]
            out = is_data.any(axis=-1) if out is None else out & is_data.any(axis=-1)
        return out

    @property
    def has_holes(self) -> bool:
        return not self.mask is self.alpha is self.nodata is None

    def in_memory(self) -> Raster:
        """The same, held as it is in the file."""
        held = Held(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        held.array = np.ascontiguousarray(self[:, :])
        held.mask = self.mask and self.mask.in_memory()
        return held

    def __getstate__(self) -> dict:
        return {**self.__dict__, "blocks": {}}


class Held(Raster):
    """A raster in memory, in the type of its file: uint8 heights take a quarter of float32."""

    array: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.array.nbytes + (self.mask.nbytes if self.mask else 0)

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        return self.array[box]


@dataclass
class View:
    """What `read(box)` gives, as far as `shape` reaches: slices like an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, slice]], np.ndarray]
    nbytes: int = 0  # of memory that lasts

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        return self.read(tuple(slice(part.start, part.stop) for part in ranges(box, self.shape)))


def _common(part: range, start: int, n: int) -> tuple[slice, slice]:
    """Where `part` and the n pixels from `start` on meet: as a slice of either."""
    low, high = max(part.start, start), min(part.stop, start + n)
    return slice(low - part.start, high - part.start), slice(low - start, high - start)
