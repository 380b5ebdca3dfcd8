"""Raster files: reading TIFF, PNG and JPEG, and laying one GeoTIFF on the grid of another. Knows no data set.

Shapes: `H, W` pixels of a raster, `C` bands, bands last. Every mistake is a DataError of one line that names the file.
"""

from __future__ import annotations

import logging
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # a damaged file is one line, and that is ours
Image.MAX_IMAGE_PIXELS = None  # an orthophoto is larger than what Pillow takes for an attack

TIFF_ENDINGS = (".tif", ".tiff")
UNCOMPRESSED, DEFLATE = 1, (8, 32946)
PIXEL_SCALE, TIE_POINT, TRANSFORMATION, GEO_KEYS, GEO_TEXT, NODATA = 33550, 33922, 34264, 34735, 34737, 42113
GEO_TAGS = (PIXEL_SCALE, TIE_POINT, TRANSFORMATION, GEO_KEYS, GEO_TEXT)
MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC, PROJECTED, USER_DEFINED = 1024, 1025, 2048, 3072, 32767  # GeoTIFF keys, a value
STRIP = 512  # rows that are worked on at a time, so that temporary arrays stay small


class DataError(ValueError):
    """A mistake in the data or in what was asked of them; the message names the file and says what to do."""


# -------------------------------------------------------------------------------------------------------------- reading


def read_raster(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) in the file's own type. tifffile first, Pillow for the rest. Raises DataError by file."""
    try:
        if is_tiff(path):
            return _read_tiff(path)
        with Image.open(path) as image:
            return np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything: IndexError, struct.error, zlib.error
        raise _unreadable(path, error) from error


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in TIFF_ENDINGS


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        _check_bytes(path, tiff, page)
        try:
            array = page.asarray()
        except ValueError as error:  # a compression that tifffile leaves to the package imagecodecs
            if "imagecodecs" not in str(error):
                raise
            return _read_by_pillow(path, page.compression.name)
        return np.moveaxis(array, 0, -1) if _by_planes(page) and array.ndim == 3 else array


def _by_planes(page: tifffile.TiffPage) -> bool:
    """Whether the file holds band after band."""
    return page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE


def _check_bytes(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """Raises DataError for a truncated file, and for one that holds more pixels than its header declares."""
    end = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts))
    if end > tiff.filehandle.size:
        raise DataError(f"{path}: truncated, {tiff.filehandle.size} bytes of {end}; fetch the file again")
    if page.is_tiled:  # tiles are padded
        return
    bits = page.bitspersample * (1 if _by_planes(page) else page.samplesperpixel)
    row = -(-page.imagewidth * bits // 8)
    found = wanted = 0
    if page.compression == UNCOMPRESSED:
        found = sum(page.databytecounts)
        wanted = row * page.imagelength * (page.samplesperpixel if _by_planes(page) else 1)
    elif page.compression in DEFLATE:
        tiff.filehandle.seek(page.dataoffsets[0])
        found = len(zlib.decompress(tiff.filehandle.read(page.databytecounts[0])))
        wanted = row * min(page.rowsperstrip, page.imagelength)
    if found >= 2 * wanted > 0:
        depth = page.bitspersample
        raise DataError(
            f"{path}: holds {found} bytes of pixels where its header declares {wanted} ({depth}-bit); "
            f"the pixels are of more bits than declared, write the file again"
        )


def _read_by_pillow(path: Path, compression: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: compressed by {compression}; pip install imagecodecs reads it") from error


def raster_size(path: Path) -> tuple[int, int]:
    """(H, W) from the header alone. Raises DataError by file."""
    try:
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return int(tiff.pages[0].imagelength), int(tiff.pages[0].imagewidth)
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def raster_bands(path: Path) -> int:
    """The number of bands, from the header. Raises DataError by file."""
    try:
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return tiff.pages[0].samplesperpixel
        with Image.open(path) as image:
            return len(image.getbands())
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def raster_bytes(path: Path) -> int:
    """Bytes of one value of the file, from the header: 1 for 8 bits. Raises DataError by file."""
    try:
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return tiff.pages[0].dtype.itemsize
        with Image.open(path) as image:
            return {"I;16": 2, "I": 4, "F": 4}.get(image.mode, 1)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read ({one_line(error)}); replace the file")


def one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def nodata_value(path: Path) -> float | None:
    """GDAL's no-data value (TIFF tag 42113), if the file has one."""
    text = _tags(path).get(NODATA)
    try:
        return float(str(text).strip("\x00 ")) if text is not None else None
    except ValueError:
        return None


def _tags(path: Path) -> dict[int, object]:
    """The values of the tags that tell about places and no-data; empty for what is no TIFF. Raises DataError by file."""
    if not is_tiff(path):
        return {}
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages[0].tags
            return {code: tags[code].value for code in (*GEO_TAGS, NODATA) if code in tags}
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


# ------------------------------------------------------------------------------------------------- rasters behind slices


@dataclass
class InFile:
    """The pixels of an uncompressed file, read slice by slice: nothing of the file stays in the process.

    `decode` turns what was cut out into what is wanted; `shape` starts with H, W. Slices like an array. Rows are read
    one by one, which takes a third of the time of a memory map, whose every row is a page fault.
    """

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
                    raise DataError(f"{self.path}: truncated while it was in use; fetch the file again")
        return self.decode(pixels)


@dataclass
class Held:
    """Pixels in memory in the type of their file, decoded at each slice: uint8 heights take a quarter of float32."""

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


def raster_in_file(path: Path, shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]) -> InFile | None:
    """The file behind slices, or None where its pixels do not lie uncompressed, row by row, in one piece."""
    if not is_tiff(path):
        return None
    try:
        return _in_one_piece(path, shape, decode)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _in_one_piece(path: Path, shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]) -> InFile | None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        pieces = zip(page.dataoffsets, page.databytecounts, page.dataoffsets[1:])
        in_one_piece = all(start + count == following for start, count, following in pieces)
        if page.compression != UNCOMPRESSED or page.is_tiled or _by_planes(page) or not in_one_piece:
            return None
        if page.bitspersample not in (8, 16, 32, 64) or page.fillorder != 1 or page.dtype is None:
            return None
        dtype = np.dtype(page.dtype).newbyteorder(tiff.byteorder)
        return InFile(path, dtype, page.dataoffsets[0], page.shape, shape, decode)


# ----------------------------------------------------------------------------------------------------------- GeoTIFF grids


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a GeoTIFF lie: the outer corner of the first one, and a pixel's size, rows going south."""

    left: float
    top: float
    step_x: float
    step_y: float
    system: int | None  # the EPSG number, None where the file describes its coordinate system by parameters
    projected: bool | None  # metres or degrees, None where the file does not tell

    def pixel_size(self) -> float | None:
        """Metres, None where the coordinates are degrees."""
        return None if self.projected is False else (self.step_x + self.step_y) / 2


def read_grid(path: Path) -> Grid | None:
    """The grid of a GeoTIFF (tags 33550 and 33922, or 34264), None without tags. Raises DataError for a rotated one."""
    tags = _tags(path)
    if PIXEL_SCALE in tags and TIE_POINT in tags:
        (step_x, step_y), tie = tags[PIXEL_SCALE][:2], tags[TIE_POINT]
        left, top = tie[3] - tie[0] * step_x, tie[4] + tie[1] * step_y
    elif TRANSFORMATION in tags:
        m = tags[TRANSFORMATION]
        if m[1] or m[4]:
            raise DataError(f"{path}: its grid is rotated (tag 34264); warp it to a grid that goes north")
        step_x, step_y, left, top = m[0], -m[5], m[3], m[7]
    else:
        return None
    if not (step_x > 0 and step_y > 0):
        raise DataError(f"{path}: its pixels measure {step_x} x {step_y}; warp it to a grid that goes north")
    keys = _geo_keys(tags)
    if keys.get(RASTER_TYPE) == 2:  # the tie point is the middle of a pixel
        left, top = left - step_x / 2, top + step_y / 2
    projected = {1: True, 2: False}.get(keys.get(MODEL_TYPE))
    return Grid(left, top, step_x, step_y, _system(tags, keys), projected)


def _geo_keys(tags: dict) -> dict[int, int]:
    """The GeoTIFF keys whose value is a number of the directory itself."""
    directory = tags.get(GEO_KEYS, ())
    entries = [directory[i : i + 4] for i in range(4, len(directory) - 3, 4)]
    return {key: value for key, place, _, value in entries if place == 0}


def _system(tags: dict, keys: dict[int, int]) -> int | None:
    code = keys.get(PROJECTED, keys.get(GEOGRAPHIC))
    if code not in (None, 0, USER_DEFINED):
        return code
    named = re.search(r"EPSG:(\d+)", str(tags.get(GEO_TEXT, "")))
    return int(named[1]) if named else None


def same_grid(one: Grid, other: Grid, size: tuple[int, int]) -> bool:
    """Whether every pixel of a raster of `size` lies within less than a pixel of the other's pixel of that index."""
    H, W = size
    drift_x = abs(one.left - other.left) + W * abs(one.step_x - other.step_x)
    drift_y = abs(one.top - other.top) + H * abs(one.step_y - other.step_y)
    return _one_system(one, other) and drift_x < one.step_x and drift_y < one.step_y


def _one_system(one: Grid, other: Grid) -> bool:
    """False where both files name their systems and these differ; what is not named is taken for the same."""
    known = None not in (one.system, other.system) and one.system != other.system
    kinds = None not in (one.projected, other.projected) and one.projected != other.projected
    return not known and not kinds


def resample(array: np.ndarray, source: Grid, target: Grid, size: tuple[int, int]) -> np.ndarray:
    """Heights (h, w) float32, NaN where missing, laid bilinearly on the target's grid -> (H, W) float32.

    A pixel is the weighted mean of its valid neighbours, NaN where there is none, and outside the source. Raises
    DataError when the coordinate systems differ or the grids do not overlap.
    """
    if not _one_system(source, target):
        name = lambda g: f"EPSG:{g.system}" if g.system else "degrees" if g.projected is False else "metres"
        raise DataError(f"lies in another coordinate system ({name(source)}) than the image ({name(target)}); warp it first")
    rows = (source.top - target.top + (np.arange(size[0]) + 0.5) * target.step_y) / source.step_y - 0.5
    columns = (target.left - source.left + (np.arange(size[1]) + 0.5) * target.step_x) / source.step_x - 0.5
    inside = [(places >= -0.5) & (places <= n - 0.5) for places, n in zip((rows, columns), array.shape)]
    if not inside[0].any() or not inside[1].any():
        raise DataError("does not overlap the image; their GeoTIFF tags say that they show different places")
    valid = np.isfinite(array)
    known, weights = np.where(valid, array, 0).astype(np.float32), valid.astype(np.float32)
    out = np.full(size, np.nan, np.float32)
    for top in range(0, size[0], STRIP):
        strip = slice(top, top + STRIP)
        weight = bilinear(weights, rows[strip], columns)
        here = (weight > 1e-6) & inside[0][strip, None] & inside[1]
        out[strip][here] = bilinear(known, rows[strip], columns)[here] / weight[here]
    return out


def bilinear(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(h, w) at fractional places -> (len(rows), len(columns)) float32; places beyond the edge take its value."""
    for axis, places in ((0, rows), (1, columns)):
        last = array.shape[axis] - 1
        places = np.clip(places, 0, last)
        low = np.minimum(places.astype(np.intp), max(last - 1, 0))
        share = (places - low).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        high = np.minimum(low + 1, last)
        array = array.take(low, axis) * (1 - share) + array.take(high, axis) * share
    return array
