"""Crops for training and windows for prediction.

Every random choice is a function of (seed, epoch, index): crops and flips have no state, so any
number of workers and any resumed run draws the same samples.

Shapes: `H, W` pixels of a tile, `h, w` pixels of a crop or window."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from geodata.layouts import IGNORE
from geodata.slices import DataError, row_strips
from geodata.tiles import LoadedTile

# ------------------------------------------------------------------------------- crops for training


@dataclass(frozen=True)
class Crop:
    tile: int
    top: int
    left: int
    flip_rows: bool
    flip_columns: bool
    turned: bool = False  # rows for columns, which with flips makes the quarter turns


def draw_crop(
    seed: int,
    epoch: int,
    index: int,
    sizes: list[tuple[int, int]],
    crop: int,
    last_pixel: bool = True,
    rotations: bool = False,
) -> Crop:
    """A uniformly drawn tile, a uniformly drawn position, two coin flips: a function of its
    arguments alone. `rotations` add quarter turns: each of the square's eight symmetries is drawn
    as often.

    differs: the paper says rotations and flips; the published code flips only, and so do we unless
    asked.
    differs: the published code never draws a tile's last row and column; here every position that
    fits is drawn, unless `last_pixel` is False."""
    rng = np.random.default_rng((seed, epoch, index))
    tile = int(rng.integers(len(sizes)))
    top, left = (int(rng.integers(max(n - crop + last_pixel, 1))) for n in sizes[tile])
    flips = bool(rng.integers(2)), bool(rng.integers(2))
    return Crop(tile, top, left, *flips, rotations and bool(rng.integers(2)))


class ClassPlaces:
    """Where each class lies in the training tiles: its pixels by tile and row, so that one can be
    drawn without a list of all."""

    def __init__(self, labels: list, num_classes: int):
        """`labels`: the (H, W) class indices of each tile, arrays or behind slices."""
        self.labels, rows = labels, []
        for one in labels:
            for strip in row_strips(one):
                rows.append([(strip == k).sum(axis=1) for k in range(num_classes)])
        self.before = np.concatenate(rows, axis=1).cumsum(axis=1)  # (K, rows): pixels up to a row
        self.present = np.flatnonzero(self.before[:, -1])
        self.first = np.cumsum([0, *(one.shape[0] for one in labels)])  # the first row of each tile

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """(tile, row, column) of a uniformly drawn pixel of a uniformly drawn class."""
        k = rng.choice(self.present)
        nth = rng.integers(self.before[k, -1])
        row = int(np.searchsorted(self.before[k], nth, side="right"))
        tile = int(np.searchsorted(self.first, row, side="right")) - 1
        row -= int(self.first[tile])
        here = np.flatnonzero(self.labels[tile][row : row + 1, 0 : self.labels[tile].shape[1]] == k)
        return tile, row, int(rng.choice(here))


def around_pixel(
    drawn: Crop,
    place: tuple[int, int, int],
    size: tuple[int, int],
    crop: int,
    last_pixel: bool,
    rng: np.random.Generator,
) -> Crop:
    """A drawn crop, laid anew so that it holds the pixel `place`: uniformly drawn of the positions
    that do."""
    corner = []
    for pixel, n in zip(place[1:], size):
        last = max(n - crop + last_pixel, 1) - 1
        low, high = max(pixel - crop + 1, 0), min(pixel, last)
        corner.append(int(rng.integers(min(low, high), high + 1)))
    return replace(drawn, tile=place[0], top=corner[0], left=corner[1])


@dataclass
class CropDataset(torch.utils.data.Dataset):
    """Training samples; the index is the pair (epoch, index), or (epoch, index, True) for the same
    crop again with rasters missing.

    With `balanced` classes, so many, every sample of an odd index is a crop around a pixel of a
    class that is drawn with equal odds (nnU-Net does so with a third of them: Isensee et al.,
    Nature Methods 2021)."""

    tiles: list[LoadedTile]
    crop: int
    seed: int
    modalities: tuple[str, ...]
    last_pixel: bool = True
    rotations: bool = False
    balanced: int = 0
    may_lack: tuple[str, ...] = ()  # the rasters that may be missing

    def __post_init__(self):
        labels = [tile.labels for tile in self.tiles]
        self.places = ClassPlaces(labels, self.balanced) if self.balanced else None

    def draw(self, epoch: int, index: int) -> Crop:
        sizes = [tile.size for tile in self.tiles]
        how = self.crop, self.last_pixel
        c = draw_crop(self.seed, epoch, index, sizes, *how, self.rotations)
        if self.places is None or index % 2 == 0:
            return c
        rng = np.random.default_rng((self.seed, epoch, index, 1))  # another stream than draw_crop's
        place = self.places.draw(rng)
        return around_pixel(c, place, sizes[place[0]], *how, rng)

    def __getitem__(self, key: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
        """([image (3, h, w), dsm (h, w), other rasters (C, h, w)] as the modalities ask, labels (h,
        w) int64). What is missing or taken away is NaN throughout.

        A tile smaller than the crop is continued by reflection; what was added is never scored."""
        c, rasters = self.draw(*key[:2]), []
        tile = self.tiles[c.tile]
        cut = np.s_[c.top : c.top + self.crop, c.left : c.left + self.crop]
        gone = [name in tile.lacking for name in self.modalities]
        if len(key) > 2:
            may = [name in self.may_lack for name in self.modalities]
            gone = draw_missing((self.seed, *key), gone, may)
        for name, is_gone in zip(self.modalities, gone):
            raster = tile.input(name, cut)
            raster = np.full_like(raster, np.nan) if is_gone else raster
            rasters.append(_tensor(_fit(raster, self.crop, mode="reflect"), c))
        labels = _fit(tile.labels[cut], self.crop, mode="constant", constant_values=IGNORE)
        return rasters, _tensor(labels, c).long()


def draw_missing(key: tuple[int, ...], lacking: list[bool], may: list[bool]) -> list[bool]:
    """Which rasters a crop goes without: those that it lacks, and of the others that may be missing
    one or more, but never all. Each number of them is drawn as often. A function of its
    arguments."""
    rng = np.random.default_rng((*key, 2))  # crops are drawn from others
    gone = np.array(lacking)
    own = rng.permutation(np.flatnonzero(~gone & may))
    most = min(len(own), (~gone).sum() - 1)
    gone[own[: rng.integers(1, most + 1) if most else 0]] = True
    return gone.tolist()


def taken_again(place: int, share: float) -> bool:
    """Whether the crop at a place of a batch is one of the `share` that are trained on again with
    rasters missing: the first, and from there on evenly."""
    return taken_before(place + 1, share) > taken_before(place, share)


def taken_before(place: int, share: float) -> int:
    """How many crops before a place of a batch are `taken_again`."""
    return math.ceil(round(place * share, 9))


def crops_of_step(batch: int, share: float, world: int = 1) -> int:
    """The crops that a step takes with those that are `taken_again`. Raises DataError where they do
    not lie evenly on `world` processes."""
    size = batch // world
    ends = [taken_before(rank * size, share) for rank in range(world + 1)]
    again = [end - start for start, end in zip(ends, ends[1:])]
    if len(set(again)) > 1:
        problem = f"{', '.join(map(str, again))} of {size} crops of each process"
        raise DataError(f"--drop-modality {share:g}: takes {problem}; give 1, 0.5 or {1 / size:g}")
    return batch + sum(again)


def _fit(array: np.ndarray, size: int, **options) -> np.ndarray:
    """(..., h, w) -> (..., size, size), padded below and on the right."""
    h, w = array.shape[-2:]
    widths = [(0, 0)] * (array.ndim - 2) + [(0, size - h), (0, size - w)]
    return np.pad(array, widths, **options) if (h, w) != (size, size) else array


def _tensor(array: np.ndarray, crop: Crop) -> Tensor:
    rows, columns = (-1 if crop.flip_rows else 1), (-1 if crop.flip_columns else 1)
    array = array[..., ::rows, ::columns]
    return torch.from_numpy((array.swapaxes(-1, -2) if crop.turned else array).copy())


@dataclass
class CropOrder(torch.utils.data.Sampler):
    """Batches of (epoch, index): `steps` batches of `batch` samples an epoch, from step `first` of
    the run on; of each batch only the share of process `rank` of `world`. Behind each that is
    `taken_again` stands (epoch, index, True)."""

    epochs: int
    steps: int
    batch: int
    first: int = 0
    rank: int = 0
    world: int = 1
    again: float = 0.0

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        size = self.batch // self.world
        places = range(self.rank * size, (self.rank + 1) * size)
        for step in range(self.first, len(self) + self.first):
            epoch, start = step // self.steps, step % self.steps * self.batch
            keys = []
            for place in places:
                keys.append((epoch, start + place))
                if taken_again(place, self.again):
                    keys.append((epoch, start + place, True))
            yield keys

    def __len__(self) -> int:
        return self.epochs * self.steps - self.first


# --------------------------------------------------------------------------- windows for prediction


def sliding_windows(
    height: int, width: int, window: int, stride: int
) -> list[tuple[int, int, int]]:
    """(top, left, weight) of the windows that cover height x width pixels, row by row.

    Windows start every `stride` pixels; one that would pass the edge is moved inwards. Each place
    is listed once, and its weight says how often the published loop visits it (docs/method.md
    3.5: at stride 32 the last row and column 8 times). A side shorter than the window has the one
    place 0. Raises DataError for a stride that leaves gaps."""
    rows, columns = window_places(height, window, stride), window_places(width, window, stride)
    return [(top, left, m * n) for top, m in rows for left, n in columns]


def window_places(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """The (start, weight) of the windows along one side."""
    if not 1 <= stride <= window:
        raise DataError(f"the stride lies between 1 and the window's {window} pixels, not {stride}")
    last = max(length - window, 0)
    starts = [min(start, last) for start in range(0, length, stride)]
    return [(start, starts.count(start)) for start in dict.fromkeys(starts)]
