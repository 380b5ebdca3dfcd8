"""Rasters behind slices: `raster[rows, columns]` reads what is asked for, so that an orthophoto
need not fit in memory.

    InFile      out of an uncompressed file, row by row
    Segments    out of a file in tiles or strips, compressed or not, keeping what the rows in use need
    OnGrid      heights of another grid, resampled slice by slice
    Decoded     what any of them, or an array, gives, turned into what a network takes
    Held        the same of an array as a whole

All have a `shape` that starts with `H, W`. Every mistake is a DataError of one line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import tifffile

from geodata.rasters import (
    UNCOMPRESSED,
    DataError,
    Grid,
    by_planes,
    check_bytes,
    check_overlap,
    is_tiff,
    places_in,
    read_raster,
    resample,
    unreadable,
)


@dataclass
class InFile:
    """The pixels of an uncompressed file, read slice by slice: nothing of the file stays in the
    process.

    `decode` turns what was cut out into what is wanted; `shape` starts with H, W. Slices like an
    array. Rows are read one by one, which takes a third of the time of a memory map, whose every
    row is a page fault."""

    path: Path
    dtype: np.dtype
    offset: int
    stored: tuple[int, ...]  # the shape in the file
    shape: tuple[int, ...]
    decode: Callable[[np.ndarray], np.ndarray]
    nbytes: int = 0

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (range(*part.indices(n)) for part, n in zip(box, self.shape))
        pixels = np.empty((len(rows), len(columns), *self.stored[2:]), self.dtype)
        pixel = self.dtype.itemsize * int(np.prod(self.stored[2:]))
        with open(self.path, "rb", buffering=0) as file:
            for row, into in zip(rows, pixels):
                file.seek(self.offset + (row * self.stored[1] + columns.start) * pixel)
                if file.readinto(into) < into.nbytes:
                    raise DataError(
                        f"{self.path}: truncated while it was in use; fetch the file again"
                    )
        return self.decode(pixels)


@dataclass
class Held:
    """Pixels in memory in the type of their file, decoded at each slice: uint8 heights take a
    quarter of float32.
    """

    array: np.ndarray
    decode: Callable[[np.ndarray], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def __getitem__(self, box) -> np.ndarray:
        return self.decode(self.array[box])


def raster_in_file(
    path: Path, shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]
) -> InFile | None:
    """The file behind slices, or None where its pixels do not lie uncompressed, row by row, in one
    piece.
    """
    if not is_tiff(path):
        return None
    try:
        return _in_one_piece(path, shape, decode)
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def _in_one_piece(
    path: Path, shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]
) -> InFile | None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        pieces = zip(page.dataoffsets, page.databytecounts, page.dataoffsets[1:])
        in_one_piece = all(start + count == following for start, count, following in pieces)
        if page.compression != UNCOMPRESSED or page.is_tiled or by_planes(page) or not in_one_piece:
            return None
        if page.bitspersample not in (8, 16, 32, 64) or page.fillorder != 1 or page.dtype is None:
            return None
        dtype = np.dtype(page.dtype).newbyteorder(tiff.byteorder)
        return InFile(path, dtype, page.dataoffsets[0], page.shape, shape, decode)


def open_raster(path: Path) -> InFile | Segments | np.ndarray:
    """(H, W) or (H, W, C) behind slices, in the type of the file: read in parts where the file can
    be, else in memory.
    """
    if not is_tiff(path):
        return read_raster(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            check_bytes(path, tiff, tiff.pages[0])
            shape = _shape(tiff.pages[0])
        in_file = _in_one_piece(path, shape, lambda raw: raw)
        if in_file is not None:
            return in_file
        segments = Segments(path)
        segments.decode(None, 0)
        return segments
    except DataError:
        raise
    except ValueError as error:
        if "imagecodecs" not in str(error):
            raise unreadable(path, error) from error
        return read_raster(path)  # by Pillow, which cannot read in parts
    except Exception as error:  # as in rasters.py
        raise unreadable(path, error) from error


def _shape(page: tifffile.TiffPage) -> tuple[int, ...]:
    bands = (page.samplesperpixel,) if page.samplesperpixel > 1 else ()
    return (int(page.imagelength), int(page.imagewidth), *bands)


class Segments:
    """The pixels of a TIFF in tiles or strips, made for reading downwards.

    Rows of tiles stay decoded until a slice begins below them, so windows that overlap decode each
    tile once."""

    def __init__(self, path: Path):
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            self.path, self.shape, self.dtype, self.decode = (
                path,
                _shape(page),
                page.dtype,
                page.decode,
            )
            self.places = list(zip(page.dataoffsets, page.databytecounts))
            self.planes = page.samplesperpixel if by_planes(page) else 1
            self.height = (
                page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
            )
        self.across = len(self.places) // (
            self.planes * -(-self.shape[0] // self.height)
        )  # tiles side by side
        self.rows: dict[int, np.ndarray] = {}  # row of tiles -> (height, W, C)

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (range(*part.indices(n)) for part, n in zip(box, self.shape))
        first, last = rows.start // self.height, max(rows.start, rows.stop - 1) // self.height
        self.rows = {i: row for i, row in self.rows.items() if i >= first}
        for i in range(first, last + 1):
            if i not in self.rows:
                self.rows[i] = self._read(i)
        cut = np.concatenate(
            [self.rows[i][:, columns.start : columns.stop] for i in range(first, last + 1)]
        )
        top = rows.start - first * self.height
        return cut[top : top + len(rows)].reshape(len(rows), len(columns), *self.shape[2:])

    def _read(self, i: int) -> np.ndarray:
        """Row i of tiles, (height, W, C)."""
        H, W, C = (*self.shape, 1)[:3]
        top = i * self.height
        out = np.zeros((min(self.height, H - top), W, C), self.dtype)
        down = len(self.places) // (self.planes * self.across)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for plane in range(self.planes):
                    for index in range(
                        (plane * down + i) * self.across, (plane * down + i + 1) * self.across
                    ):
                        offset, count = self.places[index]
                        if count == 0:  # GDAL leaves out tiles that hold nothing
                            continue
                        file.seek(offset)
                        pixels, (_, _, _, left, _), _ = self.decode(file.read(count), index)
                        band = slice(plane, plane + 1) if self.planes > 1 else slice(None)
                        pixels = pixels[0, : len(out), : W - left]
                        out[: len(pixels), left : left + pixels.shape[1], band] = pixels
        except Exception as error:  # a damaged file makes decoders raise anything
            raise unreadable(self.path, error) from error
        return out


@dataclass
class Decoded:
    """What a raster gives, through `decode`, as far as `shape` reaches."""

    raw: InFile | Segments | OnGrid | np.ndarray
    shape: tuple[int, ...]
    decode: Callable[[np.ndarray], np.ndarray]
    nbytes: int = 0  # of memory that lasts

    @property
    def dtype(self) -> np.dtype:
        return self[0:1, 0:1].dtype

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (slice(*part.indices(n)) for part, n in zip(box, self.shape))
        return self.decode(self.raw[rows, columns])


class OnGrid:
    """Heights (h, w) float32, NaN where missing, on the grid of an image of `size`: `resample`,
    slice by slice.
    """

    def __init__(self, heights: Decoded, source: Grid, target: Grid, size: tuple[int, int]):
        check_overlap(source, target, heights.shape, size)
        self.heights, self.source, self.target, self.shape = heights, source, target, size
        self.places = places_in(source, target, size)

    def __getitem__(self, box: tuple[slice, slice]) -> np.ndarray:
        cut, needed = [], []
        for part, places, n, length in zip(box, self.places, self.heights.shape, self.shape):
            part = range(*part.indices(length))
            inside = places[part.start : part.stop]
            inside = inside[(inside >= -0.5) & (inside <= n - 0.5)]
            low, high = (int(inside[0]) - 1, int(inside[-1]) + 3) if len(inside) else (0, 0)
            cut.append(part)
            needed.append(slice(max(low, 0), min(high, n)))
        size = (len(cut[0]), len(cut[1]))
        if not all(part.stop for part in needed):
            return np.full(size, np.nan, np.float32)
        source = self.source.moved(needed[0].start, needed[1].start)
        return resample(
            self.heights[needed[0], needed[1]],
            source,
            self.target.moved(cut[0].start, cut[1].start),
            size,
        )
