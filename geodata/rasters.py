"""Raster files: reading TIFF, PNG and JPEG, and laying one GeoTIFF on the grid of another. Knows no
data set.

Shapes: `H, W` pixels of a raster, `C` bands, bands last. Every mistake is a DataError of one line
that names the file."""

from __future__ import annotations

import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator, TypeVar

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

TIFF_ENDINGS = (".tif", ".tiff")


UNCOMPRESSED, DEFLATE = 1, (8, 32946)


PIXEL_SCALE, TIE_POINT, TRANSFORMATION, GEO_KEYS, GEO_NUMBERS, GEO_TEXT = (
    33550,
    33922,
    34264,
    34735,
    34736,
    34737,
)


GEO_TAGS = (PIXEL_SCALE, TIE_POINT, TRANSFORMATION, GEO_KEYS, GEO_NUMBERS, GEO_TEXT)


NODATA = 42113  # GDAL's


MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC, PROJECTED, USER_DEFINED = (
    1024,
    1025,
    2048,
    3072,
    32767,
)  # GeoTIFF keys, a value


STRIP = 512  # rows that are worked on at a time, so that temporary arrays stay small


T = TypeVar("T")


def row_strips(raster):
    """An array, or what slices like one, from top to bottom in strips of at most STRIP rows."""
    for top in range(0, raster.shape[0], STRIP):
        yield raster[top : top + STRIP, 0 : raster.shape[1]]


class DataError(ValueError):
    """A mistake in the data or in what was asked of them; the message names the file and says what
    to do.
    """


# ------------------------------------------------------------------------------------------ reading


def read_raster(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) in the file's own type. tifffile first, Pillow for the rest. Raises
    DataError by file.
    """
    try:
        if is_tiff(path):
            return _read_tiff(path)
        with open_picture(path) as image:
            return np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything: IndexError, struct.error, zlib.error
        raise unreadable(path, error) from error


def is_tiff(path: Path) -> bool:
    return path.suffix.lower() in TIFF_ENDINGS


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """A file as Pillow reads it, of any size: an orthophoto is larger than what Pillow takes for an
    attack.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        check_bytes(path, tiff, page)
        try:
            array = page.asarray()
        except ValueError as error:  # a compression that tifffile leaves to the package imagecodecs
            if "imagecodecs" not in str(error):
                raise
            return _read_by_pillow(path, page.compression.name)
        return np.moveaxis(array, 0, -1) if by_planes(page) and array.ndim == 3 else array


def by_planes(page: tifffile.TiffPage) -> bool:
    """Whether the file holds band after band."""
    return page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE


def check_bytes(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """Raises DataError for a truncated file, and for one that holds more pixels than its header
    declares.
    """
    end = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts))
    if end > tiff.filehandle.size:
        raise DataError(
            f"{path}: truncated, {tiff.filehandle.size} bytes of {end}; fetch the file again"
        )
    if page.is_tiled:  # tiles are padded
        return
    bits = page.bitspersample * (1 if by_planes(page) else page.samplesperpixel)
    row = -(-page.imagewidth * bits // 8)
    found = wanted = 0
    if page.compression == UNCOMPRESSED:
        found = sum(page.databytecounts)
        wanted = row * page.imagelength * (page.samplesperpixel if by_planes(page) else 1)
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
        with open_picture(path) as image:
            return np.asarray(image)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(
            f"{path}: compressed by {compression}; pip install imagecodecs reads it"
        ) from error


def raster_size(path: Path) -> tuple[int, int]:
    """(H, W) from the header alone. Raises DataError by file."""
    return _header(
        path,
        lambda page: (int(page.imagelength), int(page.imagewidth)),
        lambda image: (image.height, image.width),
    )


def raster_bands(path: Path) -> int:
    """The number of bands, from the header. Raises DataError by file."""
    return _header(path, lambda page: page.samplesperpixel, lambda image: len(image.getbands()))


def raster_bytes(path: Path) -> int:
    """Bytes of one value of the file, from the header: 1 for 8 bits. Raises DataError by file."""
    sizes = {"I;16": 2, "I": 4, "F": 4}
    return _header(path, lambda page: page.dtype.itemsize, lambda image: sizes.get(image.mode, 1))


def alpha_band(path: Path) -> int | None:
    """Which band says how opaque a pixel is, from the header; None without. Raises DataError by
    file.
    """

    def of_tiff(page: tifffile.TiffPage) -> int | None:
        extra = [int(kind) for kind in page.extrasamples]
        alpha = next((i for i, kind in enumerate(extra) if kind in (1, 2)), None)
        return None if alpha is None else page.samplesperpixel - len(extra) + alpha

    return _header(
        path,
        of_tiff,
        lambda image: image.getbands().index("A") if "A" in image.getbands() else None,
    )


def _header(
    path: Path, of_tiff: Callable[[tifffile.TiffPage], T], of_picture: Callable[[Image.Image], T]
) -> T:
    """What the header of a TIFF, or of another picture, tells. Raises DataError by file."""
    try:
        if is_tiff(path):
            with tifffile.TiffFile(path) as tiff:
                return of_tiff(tiff.pages[0])
        with open_picture(path) as image:
            return of_picture(image)
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> DataError:
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


def geo_tags(path: Path) -> list[tuple]:
    """The tags that say where a GeoTIFF lies, as tifffile writes them (code, type, count, value,
    True); [] without.
    """
    if not is_tiff(path):
        return []
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = [tiff.pages[0].tags[code] for code in GEO_TAGS if code in tiff.pages[0].tags]
            return [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags]
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def _tags(path: Path) -> dict[int, object]:
    """The values of the tags that tell about places and no-data; empty for what is no TIFF. Raises
    DataError by file.
    """
    if not is_tiff(path):
        return {}
    try:
        with tifffile.TiffFile(path) as tiff:
            tags = tiff.pages[0].tags
            return {code: tags[code].value for code in (*GEO_TAGS, NODATA) if code in tags}
    except Exception as error:  # as above
        raise unreadable(path, error) from error


# ------------------------------------------------------------------------------------ GeoTIFF grids


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a GeoTIFF lie: the outer corner of the first one, and a pixel's size,
    rows going south.
    """

    left: float
    top: float
    step_x: float
    step_y: float
    system: (
        int | None
    )  # the EPSG number, None where the file describes its coordinate system by parameters
    projected: bool | None  # metres or degrees, None where the file does not tell

    def pixel_size(self) -> float | None:
        """Metres, None where the coordinates are degrees."""
        return None if self.projected is False else (self.step_x + self.step_y) / 2

    def moved(self, rows: int, columns: int) -> Grid:
        """The same grid from another pixel on."""
        return replace(
            self, left=self.left + columns * self.step_x, top=self.top - rows * self.step_y
        )


def read_grid(path: Path) -> Grid | None:
    """The grid of a GeoTIFF (tags 33550 and 33922, or 34264), None without tags. Raises DataError
    for a rotated one.
    """
    tags = _tags(path)
    if PIXEL_SCALE in tags and TIE_POINT in tags:
        (step_x, step_y), tie = tags[PIXEL_SCALE][:2], tags[TIE_POINT]
        left, top = tie[3] - tie[0] * step_x, tie[4] + tie[1] * step_y
    elif TRANSFORMATION in tags:
        m = tags[TRANSFORMATION]
        if m[1] or m[4]:
            raise DataError(
                f"{path}: its grid is rotated (tag 34264); warp it to a grid that goes north"
            )
        step_x, step_y, left, top = m[0], -m[5], m[3], m[7]
    else:
        return None
    if not (step_x > 0 and step_y > 0):
        raise DataError(
            f"{path}: its pixels measure {step_x} x {step_y}; warp it to a grid that goes north"
        )
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
    """Whether every pixel of a raster of `size` lies within less than a pixel of the other's pixel
    of that index.
    """
    H, W = size
    drift_x = abs(one.left - other.left) + W * abs(one.step_x - other.step_x)
    drift_y = abs(one.top - other.top) + H * abs(one.step_y - other.step_y)
    return _one_system(one, other) and drift_x < one.step_x and drift_y < one.step_y


def _one_system(one: Grid, other: Grid) -> bool:
    """False where both files name their systems and these differ; what is not named is taken for
    the same.
    """
    known = None not in (one.system, other.system) and one.system != other.system
    kinds = None not in (one.projected, other.projected) and one.projected != other.projected
    return not known and not kinds


def places_in(source: Grid, target: Grid, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The fractional rows (H,) and columns (W,) of the source at which the middles of the target's
    pixels lie.
    """
    rows = (
        source.top - target.top + (np.arange(size[0]) + 0.5) * target.step_y
    ) / source.step_y - 0.5
    columns = (
        target.left - source.left + (np.arange(size[1]) + 0.5) * target.step_x
    ) / source.step_x - 0.5
    return rows, columns


def check_overlap(
    source: Grid, target: Grid, shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    """Raises DataError when a raster of `shape` shares no coordinate system, or no pixel, with a
    target of `size`.
    """
    if not _one_system(source, target):
        name = lambda g: (
            f"EPSG:{g.system}" if g.system else "degrees" if g.projected is False else "metres"
        )
        raise DataError(
            f"lies in another coordinate system ({name(source)}) than the image ({name(target)}); warp it first"
        )
    for places, n in zip(places_in(source, target, size), shape):
        if not ((places >= -0.5) & (places <= n - 0.5)).any():
            raise DataError(
                "does not overlap the image; their GeoTIFF tags say that they show different places"
            )


def resample(array: np.ndarray, source: Grid, target: Grid, size: tuple[int, int]) -> np.ndarray:
    """Heights (h, w) float32, NaN where missing, laid bilinearly on the target's grid -> (H, W)
    float32.

    A pixel is the weighted mean of its valid neighbours, NaN where there is none, and outside the
    source. Raises DataError when the coordinate systems differ or the grids do not overlap."""
    rows, columns = places_in(source, target, size)
    inside = [
        (places >= -0.5) & (places <= n - 0.5) for places, n in zip((rows, columns), array.shape)
    ]
    check_overlap(source, target, array.shape, size)
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
    """(h, w) at fractional places -> (len(rows), len(columns)) float32; places beyond the edge take
    its value.
    """
    for axis, places in ((0, rows), (1, columns)):
        last = array.shape[axis] - 1
        places = np.clip(places, 0, last)
        low = np.minimum(places.astype(np.intp), max(last - 1, 0))
        share = (places - low).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        high = np.minimum(low + 1, last)
        array = array.take(low, axis) * (1 - share) + array.take(high, axis) * share
    return array
