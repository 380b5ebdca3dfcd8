"""From a tile's pixels and metres to what a network sees.

`Scaling` is the choice, two plain strings that are kept with a run; `measure` turns it into the
numbers of one tile.

    heights   minmax       the tile's lowest is 0, its highest 1 (PAPER.md 1, Input)
              percentiles  the same between the 1st and 99th percentile, clipped
              LOW:HIGH     a fixed range in metres, clipped
              ground       height above the local ground, 0 to 30 m, clipped
    images    unit         the whole range of the file's type; floats lie in 0 to 1 (PAPER.md 1, Input)
              sam          the same, minus SAM's mean, over its standard deviation
              LOW:HIGH     a fixed range, clipped
              reflectance  0 to 0.4, clipped; values above 10 are ten-thousandths, 8-bit pixels are `unit`
              minmax       each image and band from its own lowest to its highest
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from geodata.rasters import DataError, bilinear, row_strips

SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 255


REFLECTANCE = 0.4  # what becomes 1: brighter than land without snow and cloud


GROUND_WIDTH = 60.0  # metres: narrower things stand on the ground, wider ones are ground


GROUND_SPAN = 30.0  # metres above the ground that become 1


CELLS = 32  # of the ground's grid in GROUND_WIDTH


HEIGHTS, IMAGES = ("minmax", "percentiles", "ground"), ("unit", "sam", "reflectance", "minmax")


@dataclass(frozen=True)
class Scaling:
    """How rasters become inputs; see the top of the file. Raises DataError for an unknown choice."""

    heights: str = "minmax"
    images: str = "unit"

    def __post_init__(self):
        for flag, value, names in (
            ("--heights", self.heights, HEIGHTS),
            ("--image-scaling", self.images, IMAGES),
        ):
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
    """The numbers that scale one tile. Heights in metres; an image of None scales as its type says."""

    heights: tuple[float, float] | None = None  # what becomes 0 and 1
    clip_heights: bool = False
    ground: np.ndarray | None = None  # (h, w) metres, one value for `cell` x `cell` pixels
    cell: int = 1
    image: tuple[np.ndarray, np.ndarray] | None = (
        None  # per band: what becomes 0, and the span that becomes 1
    )
    clip_image: bool = False

    def image_input(self, image: np.ndarray) -> np.ndarray:
        """(h, w, C) -> (C, h, w) float32."""
        if self.image is None:
            return image_input(image)
        low, span = (np.asarray(values, np.float32)[:, None, None] for values in self.image)
        out = (np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) - low) / span
        return np.clip(out, 0, 1, out=out) if self.clip_image else out

    def height_input(self, dsm: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
        """The metres (h, w) cut out of the tile by `box` -> (h, w) float32."""
        if self.ground is not None:
            rows, columns = (
                (part.start + np.arange(n) + 0.5) / self.cell - 0.5
                for part, n in zip(box, dsm.shape)
            )
            dsm = dsm - bilinear(self.ground, rows, columns)
        out = scale_heights(dsm, self.heights)
        return np.clip(out, 0, 1, out=out) if self.clip_heights else out


def measure(
    scaling: Scaling,
    image: np.ndarray | None,
    dsm: np.ndarray | None,
    unit: float,
    pixel: float | None,
) -> TileScale:
    """The numbers of a tile: image (H, W, C), dsm (H, W) in counts of `unit` metres, pixels of
    `pixel` metres.

    Both may slice like arrays, and are read from top to bottom. Raises DataError where the numbers
    cannot be had."""
    numbers = {}
    if dsm is not None:
        numbers |= _measure_heights(scaling.heights, dsm, unit, pixel)
    if image is not None:
        numbers |= _measure_image(scaling.images, image)
    return TileScale(**numbers)


def _measure_heights(choice: str, dsm: np.ndarray, unit: float, pixel: float | None) -> dict:
    if choice == "minmax":
        low, high = height_range(dsm)
        return dict(heights=(low * unit, high * unit))
    if choice == "percentiles":
        (H, W), step = dsm.shape, max(1, dsm.shape[1] // 1000)
        sparse = np.concatenate(
            [dsm[row : row + 1, 0:W][:, ::step] for row in range(0, H, max(1, H // 1000))]
        )
        low, high = (float(v) * unit for v in np.percentile(sparse, (1, 99)))
        return dict(heights=(low, high), clip_heights=True)
    if choice == "ground":
        if pixel is None:
            raise DataError(
                "--heights ground needs to know the size of a pixel; give GeoTIFFs, or another choice"
            )
        ground, cell = local_ground(dsm, GROUND_WIDTH / pixel)
        return dict(
            heights=(0.0, GROUND_SPAN),
            clip_heights=True,
            ground=ground * np.float32(unit),
            cell=cell,
        )
    return dict(heights=fixed_range(choice), clip_heights=True)


def _measure_image(choice: str, image: np.ndarray) -> dict:
    C, integer = image.shape[2], np.issubdtype(image.dtype, np.integer)
    top = np.iinfo(image.dtype).max if integer else 1
    if choice == "sam":
        if C != 3:
            raise DataError("--image-scaling sam is for three bands")
        return dict(image=(np.array(SAM_MEAN) / 255 * top, np.array(SAM_STD) / 255 * top))
    if choice == "minmax":
        ends = [(strip.min(axis=(0, 1)), strip.max(axis=(0, 1))) for strip in row_strips(image)]
        low, high = (np.stack(values).astype(np.float64) for values in zip(*ends))
        low, high = low.min(axis=0), high.max(axis=0)
        return dict(image=(low, np.where(high > low, high - low, 1)))
    # differs: the published code scales each image and band of MMHunan by itself, which is `minmax`
    # (PAPER.md 3.10)
    if choice == "reflectance" and image.dtype != np.uint8:
        full = REFLECTANCE * (10_000 if any(strip.max() > 10 for strip in row_strips(image)) else 1)
        return dict(image=(np.zeros(C), np.full(C, full)), clip_image=True)
    if fixed := fixed_range(choice):
        return dict(image=(np.full(C, fixed[0]), np.full(C, fixed[1] - fixed[0])), clip_image=True)
    return {}


def image_input(image: np.ndarray) -> np.ndarray:
    """(h, w, C) of 8 or 16 bit, or float in [0, 1] -> (C, h, w) float32 in [0, 1]."""
    top = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(top)


def height_range(dsm: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) height of a tile in metres."""
    ends = [(float(strip.min()), float(strip.max())) for strip in row_strips(dsm)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def scale_heights(dsm: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    """Metres -> [0, 1] float32 over the range of the tile (PAPER.md 1, Input); 0 where the tile is
    flat.
    """
    low, high = low_high
    return ((dsm - low) / (high - low if high > low else 1.0)).astype(np.float32)


# ---------------------------------------------------------------------------------- missing, ground


def valid_heights(dsm: np.ndarray, nodata: float | None) -> np.ndarray:
    """(H, W) bool: not NaN, infinite, absurd (below -1 km, from 10 km on) or the file's no-data
    value.
    """
    valid = (dsm < 10_000) & (dsm > -1_000)  # NaN is neither
    if nodata is not None:
        valid &= dsm != np.float32(nodata)
    return valid


def fill_missing_heights(dsm: np.ndarray, nodata: float | None) -> tuple[np.ndarray, int]:
    """Heights as float32, with those that are not valid set to the lowest valid one.

    Returns the heights and the number of pixels that were filled. Raises DataError when none is
    valid."""
    dsm = dsm.astype(np.float32)
    valid = valid_heights(dsm, nodata)
    missing = valid.size - int(valid.sum())
    if missing == valid.size:
        raise DataError("holds no valid height")
    if missing:
        dsm[~valid] = dsm.min(where=valid, initial=np.inf)
    return dsm, missing


def lowest_height(dsm, nodata: float | None) -> tuple[float, int]:
    """The lowest valid height of what slices like (H, W), and the number of pixels without. Raises
    DataError for none.
    """
    lowest, missing = np.inf, 0
    for strip in row_strips(dsm):
        strip = (strip[..., 0] if strip.ndim == 3 else strip).astype(np.float32)
        valid = valid_heights(strip, nodata)
        missing += valid.size - int(valid.sum())
        lowest = min(lowest, float(strip.min(where=valid, initial=np.inf)))
    if lowest == np.inf:
        raise DataError("holds no valid height")
    return lowest, missing


def local_ground(dsm: np.ndarray, width: float) -> tuple[np.ndarray, int]:
    """The ground below (H, W) heights: a morphological opening by a square of `width` pixels -> (h,
    w) float32, cell.

    It is computed on the lowest heights of cells of `cell` x `cell` pixels, 32 of which span the
    square."""
    cell = max(1, round(width / CELLS))
    span = 2 * (round(width / cell) // 2) + 1
    H, W = dsm.shape
    starts = np.arange(0, W, cell)
    lowest = np.empty((-(-H // cell), len(starts)), np.float32)
    for i in range(len(lowest)):
        lowest[i] = np.minimum.reduceat(dsm[i * cell : (i + 1) * cell, 0:W].min(axis=0), starts)
    eroded = sliding_min(lowest, span)
    return -sliding_min(-eroded, span), cell


def sliding_min(array: np.ndarray, span: int) -> np.ndarray:
    """The lowest value of (h, w) in the square of `span` (odd) about each place, as far as it lies
    inside.
    """
    for axis in (0, 1):
        array = np.moveaxis(array, axis, 0)
        n, half = len(array), span // 2
        array = np.pad(array, [(half, half), (0, 0)], constant_values=np.inf)
        reach = 1  # places that each value is the lowest of, doubled until they are `span`
        while reach < span:
            step = min(reach, span - reach)
            array = np.minimum(array[:-step], array[step:])
            reach += step
        array = np.moveaxis(array[:n], 0, axis)
    return array
