"""Data sets, tiles, labels, heights, crops and windows. Knows no model.

A data set is a table (`LAYOUTS`): classes, splits, and where the files of a tile lie. `open_dataset` finds the files of
a split and complains in one line about those that are missing; a `Tile` reads them, a `LoadedTile` keeps them in
memory in their own types (uint8 pixels, float32 metres) and cuts network inputs out of them.

Every random choice is a function of (seed, epoch, index): crops and flips have no state, so any number of workers and
any resumed run draws the same samples.

Shapes: `H, W` pixels of a tile, `h, w` pixels of a crop or window, `C` bands, `K` classes. Labels are uint8 class
indices, 255 = not scored. Heights are metres until `scale_heights`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Iterator

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import synthetic

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # a damaged file is one line, and that is ours
IGNORE = 255
MODALITIES = {"image": ("image",), "dsm": ("dsm",), "image+dsm": ("image", "dsm")}


class DataError(ValueError):
    """A mistake in the data or in what was asked of them; the message names the file and says what to do."""


# ------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """One data set as a table. Paths are patterns of `{id}` below the root; of several, the first that exists counts."""

    classes: tuple[tuple[str, tuple[int, int, int]], ...]  # name and colour of class 0, 1, ...
    scored: tuple[int, ...]  # the classes that mF1 and mIoU average
    splits: dict[str, tuple[str, ...]]  # tile ids
    image: tuple[str, ...]
    dsm: tuple[str, ...]
    labels: tuple[str, ...]  # for training
    test_labels: tuple[str, ...]  # for scoring
    labels_note: str  # how the scored labels are to be called beside a score
    source: str  # where the data come from


ISPRS_CLASSES = (
    ("impervious", (255, 255, 255)),
    ("building", (0, 0, 255)),
    ("low vegetation", (0, 255, 255)),
    ("tree", (0, 255, 0)),
    ("car", (255, 255, 0)),
    ("clutter", (255, 0, 0)),
)
UNSCORED_COLOR = (0, 0, 0)  # ISPRS's eroded labels: class borders; read as 255

_VAIHINGEN_ERODED = "top_mosaic_09cm_area{id}_noBoundary.tif"
VAIHINGEN = Layout(
    classes=ISPRS_CLASSES,
    scored=(0, 1, 2, 3, 4),
    splits={
        "train": tuple("1 3 23 26 7 11 13 28 17 32 34 37".split()),
        "test": tuple("5 21 15 30".split()),
    },
    image=("top/top_mosaic_09cm_area{id}.tif",),
    dsm=("dsm/dsm_09cm_matching_area{id}.tif",),
    labels=(
        "gts_for_participants/top_mosaic_09cm_area{id}.tif",
        "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/top_mosaic_09cm_area{id}.tif",
        "top_mosaic_09cm_area{id}.tif",
    ),
    test_labels=(
        "gts_eroded_for_participants/" + _VAIHINGEN_ERODED,
        "ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/" + _VAIHINGEN_ERODED,
        _VAIHINGEN_ERODED,
    ),
    labels_note="eroded labels",
    source="ISPRS commission II, working group 4, '2D semantic labeling' (data request form)",
)

LAYOUTS: dict[str, Layout] = {"vaihingen": VAIHINGEN, "synthetic": VAIHINGEN}
DATASETS = (*LAYOUTS, "tiles")


# ------------------------------------------------------------------------------------------------------ reading rasters


def read_raster(path: Path) -> np.ndarray:
    """(H, W) or (H, W, C) in the file's own type. tifffile first, Pillow for the rest. Raises DataError by file."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            return _read_tiff(path)
        with Image.open(path) as image:
            return np.asarray(image)
    except DataError:
        raise
    except Exception as error:  # a damaged file makes decoders raise anything: IndexError, struct.error, zlib.error
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); replace the file") from error


def _read_tiff(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        end = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts))
        if end > tiff.filehandle.size:
            raise DataError(f"{path}: truncated, {tiff.filehandle.size} bytes of {end}; fetch the file again")
        try:
            array = page.asarray()
        except ValueError as error:  # a compression that tifffile leaves to the package imagecodecs
            if "imagecodecs" not in str(error):
                raise
            return _read_by_pillow(path, page.compression.name)
        planes = array.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        return np.moveaxis(array, 0, -1) if planes else array


def _read_by_pillow(path: Path, compression: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: compressed by {compression}; pip install imagecodecs reads it") from error


def raster_size(path: Path) -> tuple[int, int]:
    """(H, W) from the header alone. Raises DataError by file."""
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with tifffile.TiffFile(path) as tiff:
                return int(tiff.pages[0].imagelength), int(tiff.pages[0].imagewidth)
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # as above
        raise DataError(f"{path}: cannot be read ({_one_line(error)}); replace the file") from error


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ------------------------------------------------------------------------------------------------------ labels, heights


def colors_to_labels(
    rgb: np.ndarray, palette: list[tuple[int, int, int]], tolerance: int | None = None, unknown: int = IGNORE
) -> np.ndarray:
    """(H, W, 3) uint8 colours -> (H, W) uint8 indices into `palette` (at most 64 colours).

    A pixel belongs to a colour when no channel differs by more than `tolerance`; without one, by the most that keeps
    the palette unambiguous: 127 for ISPRS's colours, which is thresholding each channel, and repairs the lossy labels
    of Potsdam (PAPER.md 3.2). `tolerance=0` is exact matching. Pixels that fit no colour become `unknown`.
    """
    colors = np.asarray(palette, dtype=np.int16)
    K = len(colors)
    distances = np.abs(colors[:, None] - colors[None]).max(axis=-1) + 256 * np.eye(K, dtype=np.int16)
    widest = (int(distances.min()) - 1) // 2 if K > 1 else 255
    if tolerance is None:
        tolerance = widest
    if tolerance > widest or widest < 0:
        raise ValueError(f"tolerance {tolerance} makes the palette ambiguous; at most {widest}")
    # Bit k of tables[c][v]: value v in channel c may belong to colour k. Three look-ups and two ands find the colour.
    values = np.arange(256, dtype=np.int16)
    fits = np.abs(values[None, :, None] - colors.T[:, None, :]) <= tolerance  # (3, 256, K)
    tables = (fits * (np.uint64(1) << np.arange(K, dtype=np.uint64))).sum(axis=-1, dtype=np.uint64)
    tables = tables.astype(np.uint8 if K <= 8 else np.uint64)
    bits = tables[0][rgb[..., 0]] & tables[1][rgb[..., 1]] & tables[2][rgb[..., 2]]
    labels = np.full(rgb.shape[:2], unknown, dtype=np.uint8)
    for k in range(K):
        labels[bits == tables.dtype.type(1 << k)] = k
    return labels


def labels_to_colors(labels: np.ndarray, palette: list[tuple[int, int, int]]) -> np.ndarray:
    """(H, W) indices -> (H, W, 3) uint8 colours; what is no index of the palette becomes black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


def height_range(dsm: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) height of a tile in metres."""
    return float(dsm.min()), float(dsm.max())


def scale_heights(dsm: np.ndarray, low_high: tuple[float, float]) -> np.ndarray:
    """Metres -> [0, 1] float32 over the range of the tile (PAPER.md 1, Input); 0 where the tile is flat."""
    low, high = low_high
    return ((dsm - low) / (high - low if high > low else 1.0)).astype(np.float32)


def fill_missing_heights(dsm: np.ndarray, nodata: float | None) -> tuple[np.ndarray, int]:
    """Heights as float32, with NaN, infinite, absurd (beyond 10 km) and no-data pixels set to the lowest valid one.

    Returns the heights and the number of pixels that were filled. Raises DataError when none is valid.
    """
    dsm = dsm.astype(np.float32)
    valid = np.isfinite(dsm) & (np.abs(dsm) < 10_000) & (dsm > -1_000)
    if nodata is not None:
        valid &= dsm != np.float32(nodata)
    missing = valid.size - int(valid.sum())
    if missing == valid.size:
        raise DataError("holds no valid height")
    return (np.where(valid, dsm, dsm[valid].min()) if missing else dsm), missing


def _nodata_value(path: Path) -> float | None:
    """GDAL's no-data value (TIFF tag 42113), if the file has one."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags.get(42113)
    try:
        return float(str(tag.value).strip("\x00 ")) if tag is not None else None
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------------------- tiles


@dataclass
class Tile:
    """The files of one tile, read on demand. All of them are cut to the size they have in common."""

    name: str
    paths: dict[str, Path]  # image, and where they exist dsm, labels
    classes: tuple[tuple[str, tuple[int, int, int]], ...]
    unscored_color: tuple[int, int, int] | None = None
    ignore_index: int = IGNORE  # the value of single-band labels that is not scored
    notes: list[str] = field(default_factory=list)  # what was repaired, a line each

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) that all files share. They may differ by two pixels (Vaihingen's do by one); more is an error."""
        sizes = {kind: raster_size(path) for kind, path in self.paths.items()}
        H, W = (min(s[i] for s in sizes.values()) for i in (0, 1))
        for kind, (h, w) in sizes.items():
            if h - H > 2 or w - W > 2:
                listing = ", ".join(f"{self.paths[k]} {a} x {b}" for k, (a, b) in sizes.items())
                raise DataError(f"tile {self.name}: the files differ in size by more than two pixels: {listing}")
            if (h, w) != (H, W):
                self.notes.append(f"tile {self.name}: {kind} of {h} x {w} cut to the common {H} x {W}")
        return H, W

    def _read(self, kind: str) -> np.ndarray:
        array = read_raster(self.paths[kind])
        H, W = self.size
        if array.ndim not in (2, 3) or array.shape[0] < H or array.shape[1] < W:
            raise DataError(f"{self.paths[kind]}: {array.shape} pixels read where its header says {H} x {W}")
        return array[:H, :W]

    def read_image(self) -> np.ndarray:
        """(H, W, 3), the first three bands in the file's own type: 8 or 16 bit, or float in [0, 1]."""
        image = self._read("image")
        if image.ndim != 3 or image.shape[2] < 3:
            raise DataError(f"{self.paths['image']}: an image of three or more bands is needed, not {image.shape}")
        image = image[..., :3]
        if image.dtype not in (np.uint8, np.uint16):
            image = image.astype(np.float32)
            if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
                raise DataError(f"{self.paths['image']}: float images must lie in 0 to 1; scale them first")
        return image

    def read_dsm(self) -> np.ndarray | None:
        """(H, W) float32 metres, missing heights set to the tile's lowest; None for a tile without heights."""
        if "dsm" not in self.paths:
            return None
        path = self.paths["dsm"]
        dsm = self._read("dsm")
        dsm = dsm[..., 0] if dsm.ndim == 3 else dsm
        try:
            dsm, missing = fill_missing_heights(dsm, _nodata_value(path))
        except DataError as error:
            raise DataError(f"{path}: {error}; leave the tile out or replace the file") from None
        if missing:
            self.notes.append(f"tile {self.name}: {missing} pixels without height, set to the lowest")
        return dsm

    def read_labels(self) -> np.ndarray:
        """(H, W) uint8 class indices, 255 = not scored; for a test tile the labels it is scored with."""
        path = self.paths["labels"]
        raw = self._read("labels")
        K = len(self.classes)
        if raw.ndim == 3 and raw.shape[2] >= 3:
            palette = [color for _, color in self.classes]
            if self.unscored_color is not None:
                palette.append(self.unscored_color)
            codes = colors_to_labels(raw[..., :3], palette)
            unknown = int((codes == IGNORE).sum())
            labels = np.where(codes == K, np.uint8(IGNORE), codes)
        else:
            raw = raw[..., 0] if raw.ndim == 3 else raw
            known = (raw >= 0) & (raw < K) & (raw != self.ignore_index)
            unknown = int((~known & (raw != self.ignore_index)).sum())
            labels = np.where(known, raw, IGNORE).astype(np.uint8)
        if unknown == labels.size:
            raise DataError(f"{path}: no pixel has the colour or the index of a class; check the classes of the data set")
        if unknown:
            self.notes.append(f"tile {self.name}: {unknown} label pixels fit no class, not scored")
        return labels

    def load(self, modalities: tuple[str, ...] = ("image", "dsm")) -> LoadedTile:
        """Everything that a network of `modalities` needs, in memory."""
        dsm = self.read_dsm() if "dsm" in modalities else None
        if "dsm" in modalities and dsm is None:
            raise DataError(f"tile {self.name} has no heights; add them, or use --modalities image")
        image = self.read_image() if "image" in self.paths else None
        labels = self.read_labels() if "labels" in self.paths else None
        return LoadedTile(self.name, image, dsm, labels, height_range(dsm) if dsm is not None else None)


@dataclass
class LoadedTile:
    """A tile in memory, in its own types."""

    name: str
    image: np.ndarray | None  # (H, W, 3)
    dsm: np.ndarray | None  # (H, W) float32 metres
    labels: np.ndarray | None  # (H, W) uint8
    heights: tuple[float, float] | None  # lowest and highest, for scaling

    @property
    def size(self) -> tuple[int, int]:
        return next(a for a in (self.image, self.dsm) if a is not None).shape[:2]

    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.image, self.dsm, self.labels) if a is not None)


def image_input(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) of 8 or 16 bit, or float in [0, 1] -> (3, h, w) float32 in [0, 1]."""
    top = np.iinfo(image.dtype).max if np.issubdtype(image.dtype, np.integer) else 1
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / np.float32(top)


# ----------------------------------------------------------------------------------------------------------- data sets


@dataclass
class Dataset:
    name: str
    root: Path
    classes: tuple[tuple[str, tuple[int, int, int]], ...]
    scored: tuple[int, ...]
    labels_note: str
    layout: Layout | None = None  # None: own tiles, found by listing folders
    ignore_index: int = IGNORE

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return [color for _, color in self.classes]

    @property
    def class_names(self) -> list[str]:
        return [name for name, _ in self.classes]

    def tiles(self, split: str, modalities: tuple[str, ...] = ("image", "dsm")) -> list[Tile]:
        """The tiles of a split, with all their files there. Raises DataError in one line if not."""
        if self.layout is None:
            return _own_tiles(self, split)
        return _layout_tiles(self, split, modalities)


def open_dataset(name: str, root: str | Path | None = None) -> Dataset:
    """A data set by name: vaihingen, synthetic (made on first use), or tiles (own files). Raises DataError."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    root = Path(root if root is not None else Path("data") / name)
    if name == "synthetic":
        try:
            synthetic.ensure_city(root)
        except ValueError as error:
            raise DataError(str(error)) from error
    if name == "tiles":
        return _open_own_tiles(root)
    layout = LAYOUTS[name]
    return Dataset(name, root, layout.classes, layout.scored, layout.labels_note, layout)


def _layout_tiles(dataset: Dataset, split: str, modalities: tuple[str, ...]) -> list[Tile]:
    layout, root = dataset.layout, dataset.root
    if split not in layout.splits:
        raise DataError(f"{dataset.name} has no split {split!r}; there are {', '.join(layout.splits)}")
    labels = layout.labels if split == "train" else layout.test_labels
    kinds = {"image": layout.image, "labels": labels} | ({"dsm": layout.dsm} if "dsm" in modalities else {})
    tiles, missing = [], []
    for tile_id in layout.splits[split]:
        paths = {}
        for kind, patterns in kinds.items():
            candidates = [root / pattern.format(id=tile_id) for pattern in patterns]
            paths[kind] = next((p for p in candidates if p.is_file()), candidates[0])
            if not paths[kind].is_file():
                missing.append(paths[kind])
        tiles.append(Tile(tile_id, paths, dataset.classes, UNSCORED_COLOR))
    if missing:
        first = ", ".join(str(p) for p in missing[:3])
        tree = ", ".join(patterns[0] for patterns in kinds.values())
        raise DataError(
            f"{dataset.name}: {len(missing)} files of the {split} split are missing, first {first}; "
            f"expected below {root}: {tree}; the data come from {layout.source}"
        )
    return tiles


# ------------------------------------------------------------------------------------------------------------ own tiles

IMAGE_ENDINGS = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
OWN_TREE = "classes.json and {train,val,test}/{images,dsm,labels}/NAME.{tif,png,jpg}"


def _open_own_tiles(root: Path) -> Dataset:
    path = root / "classes.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; own tiles are expected below --root as {OWN_TREE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = tuple((str(c["name"]), tuple(int(v) for v in c["color"])) for c in content["classes"])
        ignore = int(content.get("ignore", IGNORE))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{path}: not of the form {{"classes": [{{"name": ..., "color": [r, g, b]}}, ...]}} ({_one_line(error)})'
        ) from error
    colors = [color for _, color in classes]
    if not 2 <= len(classes) <= 64 or any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in colors):
        raise DataError(f"{path}: 2 to 64 classes are needed, each with a colour [r, g, b] of 0 to 255")
    if len(set(colors)) < len(colors):
        raise DataError(f"{path}: two classes have the same colour; give each its own")
    return Dataset("tiles", root, classes, tuple(range(len(classes))), "all labels", ignore_index=ignore)


def _own_tiles(dataset: Dataset, split: str) -> list[Tile]:
    folder = dataset.root / split
    images = _files_by_stem(folder / "images")
    if not images:
        raise DataError(f"{folder / 'images'}: no images; own tiles are expected below --root as {OWN_TREE}")
    dsm, labels = _files_by_stem(folder / "dsm"), _files_by_stem(folder / "labels")
    unlabelled = sorted(set(images) - set(labels))
    if unlabelled:
        raise DataError(f"{folder / 'labels'}: no labels for {len(unlabelled)} images, first {unlabelled[0]}")
    tiles = []
    for name, path in sorted(images.items()):
        paths = {"image": path, "labels": labels[name]} | ({"dsm": dsm[name]} if name in dsm else {})
        tiles.append(Tile(name, paths, dataset.classes, ignore_index=dataset.ignore_index))
    return tiles


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_ENDINGS}


# ----------------------------------------------------------------------------------------------------- crops for training


@dataclass(frozen=True)
class Crop:
    tile: int
    top: int
    left: int
    flip_rows: bool
    flip_columns: bool


def draw_crop(
    seed: int, epoch: int, index: int, sizes: list[tuple[int, int]], crop: int, last_pixel: bool = True
) -> Crop:
    """A uniformly drawn tile, a uniformly drawn position, two coin flips: a function of its arguments alone.

    differs: the published code never draws a tile's last row and column; here every position that fits is drawn,
    unless `last_pixel` is False.
    """
    rng = np.random.default_rng((seed, epoch, index))
    tile = int(rng.integers(len(sizes)))
    top, left = (int(rng.integers(max(n - crop + last_pixel, 1))) for n in sizes[tile])
    return Crop(tile, top, left, bool(rng.integers(2)), bool(rng.integers(2)))


class CropDataset(torch.utils.data.Dataset):
    """Training samples; the index is the pair (epoch, index)."""

    def __init__(
        self, tiles: list[LoadedTile], crop: int, seed: int, modalities: tuple[str, ...], last_pixel: bool = True
    ):
        self.tiles, self.crop, self.seed, self.modalities, self.last_pixel = tiles, crop, seed, modalities, last_pixel
        self.sizes = [tile.size for tile in tiles]

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """([image (3, h, w), dsm (h, w)] as the modalities ask, labels (h, w) int64).

        A tile smaller than the crop is continued by reflection; what was added is never scored.
        """
        c = draw_crop(self.seed, *key, self.sizes, self.crop, self.last_pixel)
        tile = self.tiles[c.tile]
        cut = np.s_[c.top : c.top + self.crop, c.left : c.left + self.crop]
        rasters = []
        for kind in self.modalities:
            raster = image_input(tile.image[cut]) if kind == "image" else scale_heights(tile.dsm[cut], tile.heights)
            rasters.append(_tensor(_fit(raster, self.crop, "reflect"), c))
        return rasters, _tensor(_fit(tile.labels[cut], self.crop, "constant", constant_values=IGNORE), c).long()


def _fit(array: np.ndarray, size: int, mode: str, **options) -> np.ndarray:
    """(..., h, w) -> (..., size, size), padded below and on the right."""
    h, w = array.shape[-2:]
    widths = [(0, 0)] * (array.ndim - 2) + [(0, size - h), (0, size - w)]
    return np.pad(array, widths, mode, **options) if (h, w) != (size, size) else array


def _tensor(array: np.ndarray, crop: Crop) -> Tensor:
    rows, columns = (-1 if crop.flip_rows else 1), (-1 if crop.flip_columns else 1)
    return torch.from_numpy(array[..., ::rows, ::columns].copy())


class CropOrder(torch.utils.data.Sampler):
    """Batches of (epoch, index): `steps` batches of `batch` samples an epoch, from step `first` of the run on.

    Of each batch only the share of process `rank` of `world` is listed, and that in `parts` batches of their own.
    """

    def __init__(
        self, epochs: int, steps: int, batch: int, first: int = 0, parts: int = 1, rank: int = 0, world: int = 1
    ):
        self.epochs, self.steps, self.batch, self.first = epochs, steps, batch, first
        self.parts, self.rank, self.world = parts, rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch // (self.parts * self.world)
        for step in range(self.first, self.epochs * self.steps):
            epoch, start = step // self.steps, step % self.steps * self.batch
            for part in range(self.parts):
                offset = start + (part * self.world + self.rank) * size
                yield [(epoch, offset + i) for i in range(size)]

    def __len__(self) -> int:
        return (self.epochs * self.steps - self.first) * self.parts


# ------------------------------------------------------------------------------------------------- windows for prediction


def sliding_windows(height: int, width: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(top, left, weight) of the windows that cover height x width pixels, row by row.

    Windows start every `stride` pixels; one that would pass the edge is moved inwards. Each place is listed once, and
    its weight says how often the published loop visits it (PAPER.md 2: at stride 32 the last row and column 8 times).
    A side shorter than the window has the one place 0. Raises DataError for a stride that leaves gaps.
    """
    rows, columns = window_places(height, window, stride), window_places(width, window, stride)
    return [(top, left, m * n) for top, m in rows for left, n in columns]


def window_places(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """The (start, weight) of the windows along one side."""
    if not 1 <= stride <= window:
        raise DataError(f"the stride lies between 1 and the window's {window} pixels, not {stride}")
    last = max(length - window, 0)
    starts = [min(start, last) for start in range(0, length, stride)]
    return [(start, starts.count(start)) for start in dict.fromkeys(starts)]
