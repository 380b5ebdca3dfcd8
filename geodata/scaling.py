"""From a tile's pixels and metres to what a network sees.

`Scaling` is the choice, two plain strings that are kept with a run; `measure_heights` and
`measure_image` turn it into the numbers of one tile.

    heights   minmax       the tile's lowest is 0, its highest 1 (the paper's)
              percentiles  the same between the 1st and 99th percentile, clipped
              LOW:HIGH     a fixed range in metres, clipped
              ground       height above the local ground, 0 to 30 m, clipped
    images    unit         the whole range of the file's type; floats lie in 0 to 1
              sam          the same, minus SAM's mean, over its standard deviation
              LOW:HIGH     a fixed range, clipped
              reflectance  0 to 0.4, clipped; above 10 in ten-thousandths; 8 bits are `unit`
              minmax       each image and band from its own lowest to its highest
    both      minmax8      minmax, truncated to 8 bits, as the published MMHunan was prepared
    others    percentiles  each raster and band between its 1st and 99th percentile, clipped
              unit, LOW:HIGH, reflectance, minmax as for images, clipped
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np

from geodata.grids import bilinear
from geodata.slices import Box, DataError, Raster, row_strips, strip_boxes, with_bands

SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 255
REFLECTANCE = 0.4  # what becomes 1: brighter than land without snow and cloud
GROUND_WIDTH = 60.0  # metres: narrower things stand on the ground, wider ones are ground
GROUND_SPAN = 30.0  # metres above the ground that become 1
CELLS = 32  # of the ground's grid in GROUND_WIDTH
ABSURD = 3  # different absurd heights: fewer stand for no data, as -9999 does
HEIGHTS = ("minmax", "minmax8", "percentiles", "ground")
BAND_SCALINGS = ("percentiles", "minmax", "unit", "reflectance")
IMAGES = ("unit", "sam", "reflectance", "minmax", "minmax8")


@dataclass(frozen=True)
class Scaling:
    """How rasters become inputs; see above. Raises DataError for an unknown choice."""

    heights: str = "minmax"
    images: str = "unit"

    def __post_init__(self):
        heights = "--heights", self.heights, HEIGHTS
        for flag, value, names in (heights, ("--image-scaling", self.images, IMAGES)):
            if value not in names and fixed_range(value) is None:
                raise DataError(f"{flag} {value}: give {', '.join(names)}, or a range LOW:HIGH")


def fixed_range(text: str) -> tuple[float, float] | None:
    """(low, high) of "LOW:HIGH", None for anything else."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None


@dataclass(frozen=True)
class TileScale:
    """The numbers of one tile. Heights in metres; an image of None scales as its type says."""

    heights: tuple[float, float] | None = None  # what becomes 0 and 1
    clip_heights: bool = False
    ground: np.ndarray | None = None  # (h, w) metres, one value for `cell` x `cell` pixels
    cell: int = 1
    image: tuple[np.ndarray, np.ndarray] | None = None  # (C,) what becomes 0; span from 0 to 1
    clip_image: bool = False
    eight_bit_heights: bool = False  # truncated to 255ths
    eight_bit_image: bool = False

    def image_input(self, image: np.ndarray) -> np.ndarray:
        """(h, w, C) -> (C, h, w) float32."""
        if self.image is None:
            return image_input(image)
        low, span = (np.asarray(values, np.float32)[:, None, None] for values in self.image)
        out = (np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) - low) / span
        out = truncate(out) if self.eight_bit_image else out
        return np.clip(out, 0, 1, out=out) if self.clip_image else out

    def height_input(self, dsm: np.ndarray, box: Box) -> np.ndarray:
        """The metres (h, w) cut out of the tile by `box` -> (h, w) float32."""
        if self.ground is not None:
            starts = (part.start + np.arange(n) + 0.5 for part, n in zip(box, dsm.shape))
            dsm = dsm - bilinear(self.ground, *(places / self.cell - 0.5 for places in starts))
        out = scale_heights(dsm, self.heights)
        out = truncate(out) if self.eight_bit_heights else out
        return np.clip(out, 0, 1, out=out) if self.clip_heights else out


def measure_heights(
    choice: str,
    dsm: np.ndarray,
    pixel: float | None = None,
    limits: tuple[float, float] | None = None,
) -> TileScale:
    """The numbers of heights (H, W), metres without holes, or what slices like them, with pixels of
    `pixel` metres; `limits` are the lowest and highest, where they are known. Raises DataError
    where the numbers cannot be had."""
    if choice in ("minmax", "minmax8"):
        return TileScale(limits or height_range(dsm), eight_bit_heights=choice == "minmax8")
    if choice == "ground":
        if pixel is None:
            raise DataError(
                "--heights ground needs the size of a pixel; give GeoTIFFs, or another choice"
            )
        return TileScale((0.0, GROUND_SPAN), True, *local_ground(dsm, GROUND_WIDTH / pixel))
    ends = fixed_range(choice) or np.percentile(sparse_rows(dsm), (1, 99)).tolist()
    return TileScale(tuple(ends), clip_heights=True)


def measure_image(choice: str, image: np.ndarray, valid: Callable | None = None) -> TileScale:
    """The numbers of an image (H, W, C), or what slices like it; `valid(box)` is where it has data,
    (h, w) bool, or None for all of it. Raises DataError where the numbers cannot be had."""
    C, top = image.shape[2], type_range(image.dtype)
    if choice == "sam":
        if C != 3:
            raise DataError("--image-scaling sam is for three bands")
        return TileScale(image=(np.array(SAM_MEAN) / 255 * top, np.array(SAM_STD) / 255 * top))
    if choice in ("minmax", "minmax8"):
        low, high = band_ends(image, valid)
        numbers = low, np.where(high > low, high - low, 1)
        return TileScale(image=numbers, clip_image=True, eight_bit_image=choice == "minmax8")
    # differs: the published code scales each image and band of MMHunan by itself, which is `minmax`
    # (docs/method.md 3.10)
    ends = fixed_range(choice)
    if choice == "reflectance" and image.dtype != np.uint8:
        counts = any(p.max() > 10 for p in data_pixels(image, valid))
        ends = 0.0, REFLECTANCE * (10_000 if counts else 1)
    if ends is None:
        return TileScale()
    numbers = np.full(C, ends[0]), np.full(C, ends[1] - ends[0])
    return TileScale(image=numbers, clip_image=True)


def measure_bands(choice: str, pixels: Raster, top: float) -> TileScale:
    """The numbers of a raster (H, W, C) that is neither image nor heights, NaN where it has no
    data; `unit` makes `top` 1. Raises DataError where it has none at all."""
    C, (low, high) = pixels.shape[2], (ends.astype(pixels.dtype) for ends in band_ends(pixels))
    if choice == "percentiles":
        low, high = np.nanpercentile(sparse_rows(pixels).reshape(-1, C), (1, 99), axis=0)
    elif choice != "minmax":
        bright = 10_000 if np.nanmax(high) > 10 else 1
        fixed = {"unit": (0, top), "reflectance": (0, REFLECTANCE * bright)}
        low, high = (np.full(C, end) for end in fixed.get(choice) or fixed_range(choice))
    low, span = np.nan_to_num(low), np.nan_to_num(high - low)
    return TileScale(image=(low, np.where(span > 0, span, 1)), clip_image=True)


def sparse_rows(raster: Raster) -> np.ndarray:
    """About a thousand rows and columns of what slices like an array."""
    (H, W), step = raster.shape[:2], max(1, raster.shape[1] // 1000)
    rows = range(0, H, max(1, H // 1000))
    return np.concatenate([raster[row : row + 1, 0:W][:, ::step] for row in rows])


def truncate(values: np.ndarray) -> np.ndarray:
    """0 to 1 -> the 255th below, as a conversion to 8 bits does."""
    return np.floor(np.float32(255) * values) / np.float32(255)


def band_ends(pixels: np.ndarray, valid: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value (C,) float64 of each band, NaN where it has none but NaN.
    Raises DataError where all bands are so, or no pixel is data."""
    low = high = np.full(pixels.shape[2], np.nan)
    for strip in data_pixels(pixels, valid):
        low, high = np.fmin(low, np.fmin.reduce(strip)), np.fmax(high, np.fmax.reduce(strip))
    if np.isnan(low).all():
        raise DataError("holds no pixel with data; leave the tile out or replace the file")
    return low, high


def data_pixels(image: np.ndarray, valid: Callable | None = None) -> Iterator[np.ndarray]:
    """Strip by strip the pixels (n, C) of a raster (H, W, C) or (H, W) that are data, without
    strips that have none."""
    for box in strip_boxes(image.shape):
        where = valid(box) if valid else None
        pixels = image[box] if where is None else image[box][where]
        if pixels.size:
            yield pixels.reshape(-1, (*image.shape, 1)[2])


def type_range(dtype: np.dtype) -> int:
    """What becomes 1 where a type's whole range counts."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1


def image_input(image: np.ndarray) -> np.ndarray:
    """(h, w, C) of 8 or 16 bit, or float in [0, 1] -> (C, h, w) float32 in [0, 1]."""
    top = np.float32(type_range(image.dtype))
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / top


def height_range(dsm: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) height of a tile in metres."""
    ends = [(float(strip.min()), float(strip.max())) for strip in row_strips(dsm)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def scale_heights(dsm: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    """Metres -> [0, 1] float32 over the range of the tile; 0 where it is flat."""
    low, high = low_high
    return ((dsm - low) / (high - low if high > low else 1.0)).astype(np.float32)


def band_pixels(
    raster: Raster, bands: tuple[int, ...], nodata: float | None, box: Box
) -> np.ndarray:
    """The chosen bands (h, w, C) float32, NaN where the file has no data, is `nodata`, or has no
    number."""
    raw = raster[box]
    where = raster.valid(box, raw)
    raw = with_bands(raw)[..., list(bands)]
    out = raw.astype(np.float32)
    out[~np.isfinite(out)] = np.nan
    for value in (nodata, raster.nodata):
        if value is not None:  # of each band by itself, as GDAL's masks are
            out[raw == value] = np.nan
    if where is not None:
        out[~where] = np.nan
    return out


# ---------------------------------------------------------------------------------- missing, ground


def valid_heights(dsm: np.ndarray) -> np.ndarray:
    """(H, W) bool: metres that are not NaN, infinite or absurd (-1 km and below, from 10 km on)."""
    return (dsm < 10_000) & (dsm > -1_000)  # NaN is neither


def metres(raster: Raster, unit: float, box: Box) -> np.ndarray:
    """Heights out of the first band, (h, w) float32 metres of counts of `unit`; NaN where the file
    has no data."""
    raw = raster[box]
    where = raster.valid(box, raw)
    raw = with_bands(raw)[..., 0]
    if (raster.scale, raster.offset) != (1, 0):
        raw = raw * raster.scale + raster.offset
    dsm = raw.astype(np.float32)
    dsm = dsm if unit == 1 else dsm * np.float32(unit)
    if where is not None:
        dsm[~where] = np.nan
    return dsm


def fill(dsm: np.ndarray, lowest: float) -> np.ndarray:
    """Metres with `lowest` where there is no valid height. In place."""
    dsm[~valid_heights(dsm)] = lowest
    return dsm


def height_limits(dsm) -> tuple[float, float, int]:
    """The lowest and highest of what slices like (H, W) metres, and the number of pixels without.
    Raises DataError for none, and for absurd values that are too many to stand for no data."""
    lowest, highest, missing, absurd = np.inf, -np.inf, 0, set()
    for strip in row_strips(dsm):
        valid = valid_heights(strip)
        missing += valid.size - int(valid.sum())
        lowest = min(lowest, float(strip.min(where=valid, initial=np.inf)))
        highest = max(highest, float(strip.max(where=valid, initial=-np.inf)))
        if not valid.all() and len(absurd) < ABSURD:
            others = strip[~valid]
            absurd |= set(np.unique(others[np.abs(others) < 1e6])[:ABSURD].tolist())
    if len(absurd) >= ABSURD:
        raise DataError(
            f"heights such as {min(absurd):g} and {max(absurd):g} m; if the file is not in metres, "
            f"say so in it: gdal_translate -a_scale 0.01 IN OUT.tif for centimetres"
        )
    if lowest == np.inf:
        raise DataError("holds no valid height; leave the tile out or replace the file")
    return lowest, highest, missing


def local_ground(dsm: np.ndarray, width: float) -> tuple[np.ndarray, int]:
    """The ground below (H, W) heights: a morphological opening by a square of `width` pixels -> (h,
    w) float32, cell.

    It is computed on the lowest heights of cells of `cell` x `cell` pixels, 32 of which span the
    square."""
    (H, W), cell = dsm.shape, max(1, round(width / CELLS))
    span, starts = 2 * (round(width / cell) // 2) + 1, np.arange(0, W, cell)
    lowest = np.empty((-(-H // cell), len(starts)), np.float32)
    for i in range(len(lowest)):
        lowest[i] = np.minimum.reduceat(dsm[i * cell : (i + 1) * cell, 0:W].min(axis=0), starts)
    eroded = sliding_min(lowest, span)
    return -sliding_min(-eroded, span), cell


def sliding_min(array: np.ndarray, span: int) -> np.ndarray:
    """The lowest value of (h, w) in the square of `span` (odd) about each place, as far as it lies
    inside."""
    for axis in (0, 1):
        ends = [(span // 2,) * 2 if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(array, ends, constant_values=np.inf)
        array = np.lib.stride_tricks.sliding_window_view(padded, span, axis).min(axis=-1)
    return array
