"""Tiles: the rasters of one place, read, checked, repaired and kept for a network.

A `Tile` names files and reads them; a `LoadedTile` keeps them in memory in their own types, or
leaves them in their files, for `crops.py` to cut network inputs out of them.

Shapes: `H, W` pixels of a tile, `C` bands, `K` classes. Labels are uint8 class indices, 255 = not
scored. Heights are metres until they are scaled."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from geodata.layouts import IGNORE, Classes
from geodata.rasters import (
    STRIP,
    DataError,
    Grid,
    nodata_value,
    raster_bytes,
    raster_size,
    read_grid,
    read_raster,
    resample,
    row_strips,
    same_grid,
)
from geodata.scaling import (
    Scaling,
    TileScale,
    fill_missing_heights,
    lowest_height,
    measure,
    valid_heights,
)
from geodata.slices import Decoded, Held, InFile, OnGrid, open_raster, raster_in_file

# ------------------------------------------------------------------------------------------ colours


def colors_to_labels(
    rgb: np.ndarray,
    palette: list[tuple[int, int, int]],
    tolerance: int | None = None,
    unknown: int = IGNORE,
) -> np.ndarray:
    """(H, W, 3) uint8 colours -> (H, W) uint8 indices into `palette` (at most 64 colours).

    A pixel belongs to a colour when no channel differs by more than `tolerance`; without one, by
    the most that keeps the palette unambiguous: 127 for ISPRS's colours, which is thresholding each
    channel, and repairs the lossy labels of Potsdam (PAPER.md 3.2). `tolerance=0` is exact
    matching. Pixels that fit no colour become `unknown`."""
    colors = np.asarray(palette, dtype=np.int16)
    K = len(colors)
    distances = np.abs(colors[:, None] - colors[None]).max(axis=-1) + 256 * np.eye(
        K, dtype=np.int16
    )
    widest = (int(distances.min()) - 1) // 2 if K > 1 else 255
    if tolerance is None:
        tolerance = widest
    if tolerance > widest or widest < 0:
        raise ValueError(f"tolerance {tolerance} makes the palette ambiguous; at most {widest}")
    # Bit k of tables[c][v]: value v in channel c may belong to colour k. Three look-ups and two
    # ands find the colour.
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


# -------------------------------------------------------------------------------------------- tiles


@dataclass
class Tile:
    """The files of one tile, read on demand.

    All of them are cut to the size they have in common, but for heights on another grid, which are
    resampled."""

    name: str
    paths: dict[str, Path]  # image, and where they exist dsm, labels
    classes: Classes
    unscored_color: tuple[int, int, int] | None = None
    ignore_index: int = IGNORE  # the value of single-band labels that is not scored
    notes: list[str] = field(default_factory=list)  # what was repaired, a line each
    bands: tuple[int, ...] = (0, 1, 2)  # of the image, from 0
    height_unit: float = 1.0  # metres of one count of the heights
    codes: tuple[int, ...] | None = None  # the class of raw code 0, 1, ... of single-band labels
    exact: bool = False  # as published: colours must match exactly, and any other one is class 0
    pixel: float | None = None  # metres, None: what the GeoTIFF tags say
    scaling: Scaling = Scaling()
    one_grid: bool = False  # the files of a benchmark lie on each other, whatever their tags say
    missing_heights: int = 0  # pixels that `read_dsm` filled
    unknown_labels: int = 0  # pixels that `read_labels` found to fit no class

    @cached_property
    def grids(self) -> tuple[Grid, Grid] | None:
        """The grids of the heights and of the image where they differ, None where the pixels lie on
        each other.
        """
        if self.one_grid or not {"image", "dsm"} <= self.paths.keys():
            return None
        heights, image = read_grid(self.paths["dsm"]), read_grid(self.paths["image"])
        if heights is None or image is None:
            return None
        (h, w), (H, W) = raster_size(self.paths["dsm"]), raster_size(self.paths["image"])
        same = same_grid(image, heights, (H, W)) and abs(h - H) <= 2 and abs(w - W) <= 2
        return None if same else (heights, image)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) that all files share. They may differ by two pixels (Vaihingen's do by one); more
        is an error.
        """
        kinds = [kind for kind in self.paths if kind != "dsm" or self.grids is None]
        sizes = {kind: raster_size(self.paths[kind]) for kind in kinds}
        H, W = (min(s[i] for s in sizes.values()) for i in (0, 1))
        for kind, (h, w) in sizes.items():
            if h - H > 2 or w - W > 2:
                listing = ", ".join(f"{self.paths[k]} {a} x {b}" for k, (a, b) in sizes.items())
                raise DataError(
                    f"tile {self.name}: the files differ in size by more than two pixels: {listing}; heights on "
                    f"another grid than the image need GeoTIFF tags in both files"
                )
            if (h, w) != (H, W):
                self.notes.append(
                    f"tile {self.name}: {kind} of {h} x {w} cut to the common {H} x {W}"
                )
        return H, W

    def _read(self, kind: str) -> np.ndarray:
        array = read_raster(self.paths[kind])
        H, W = self.size
        if array.ndim not in (2, 3) or array.shape[0] < H or array.shape[1] < W:
            raise DataError(
                f"{self.paths[kind]}: {array.shape} pixels read where its header says {H} x {W}"
            )
        return array[:H, :W]

    def read_image(self) -> np.ndarray:
        """(H, W, C), the chosen bands in the file's own type, C = 3 for any network."""
        image = self._read("image")
        self._check_bands(image.shape)
        image = self._decode_image(image)
        self._check_pixels(image)
        return image

    def _check_bands(self, shape: tuple[int, ...]) -> None:
        path = self.paths["image"]
        if len(shape) != 3 or shape[2] < 3:
            raise DataError(f"{path}: an image of three or more bands is needed, not {shape}")
        if max(self.bands) >= shape[2]:
            raise DataError(
                f"{path}: has {shape[2]} bands, and band {max(self.bands) + 1} is asked for; see --bands"
            )

    def _check_pixels(self, image: np.ndarray | Decoded) -> None:
        path, dtype = self.paths["image"], image.dtype
        whole, by_type = np.issubdtype(dtype, np.integer), self.scaling.images in ("unit", "sam")
        for strip in row_strips(image) if not whole else ():
            if not np.isfinite(strip).all():
                raise DataError(
                    f"{path}: the image holds pixels that are no number; fill them first"
                )
            if by_type and not (strip.min() >= 0 and strip.max() <= 1):
                raise DataError(
                    f"{path}: float images must lie in 0 to 1; give their range as --image-scaling LOW:HIGH"
                )
        if by_type and whole and dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"{path}: pixels of {dtype}; give their range as --image-scaling LOW:HIGH"
            )

    def _decode_image(self, raw: np.ndarray) -> np.ndarray:
        raw = raw if raw.dtype.isnative else raw.astype(raw.dtype.newbyteorder("="))
        if not np.issubdtype(raw.dtype, np.integer):
            raw = raw.astype(np.float32)
        if self.bands == tuple(range(raw.shape[2])):
            return raw
        return np.stack([raw[..., band] for band in self.bands], axis=-1)

    def read_dsm(self) -> np.ndarray | None:
        """(H, W) float32 metres, missing heights set to the tile's lowest; None for a tile without
        heights.
        """
        if "dsm" not in self.paths:
            return None
        return _to_metres(self._read_heights(), self.height_unit)

    def _read_heights(self) -> np.ndarray:
        """(H, W) in counts of `height_unit`: uint8 as it is, anything else float32 with missing
        heights filled.
        """
        path, (H, W) = self.paths["dsm"], self.size
        dsm, nodata = self._raw_heights()
        if dsm.dtype == np.uint8 and nodata is None and self.grids is None:
            return dsm
        try:
            if self.grids is not None:
                dsm = dsm.astype(np.float32)
                dsm[~valid_heights(dsm, nodata)] = np.nan
                if not np.isfinite(dsm).any():
                    raise DataError("holds no valid height")
                dsm, nodata = resample(dsm, *self.grids, (H, W)), None
                self.notes.append(f"tile {self.name}: heights resampled to the image's grid")
            dsm, missing = fill_missing_heights(dsm, nodata)
            self.missing_heights = missing
        except DataError as error:
            raise DataError(f"{path}: {error}; leave the tile out or replace the file") from None
        if missing:
            self.notes.append(
                f"tile {self.name}: {missing} pixels without height, set to the lowest"
            )
        return dsm

    def _raw_heights(self) -> tuple[np.ndarray, float | None]:
        """The first band as it is in the file, and the file's no-data value."""
        path = self.paths["dsm"]
        dsm = self._read("dsm") if self.grids is None else read_raster(path)
        return (dsm[..., 0] if dsm.ndim == 3 else dsm), nodata_value(path)

    def read_labels(self) -> np.ndarray:
        """(H, W) uint8 class indices, 255 = not scored; for a test tile the labels it is scored
        with.
        """
        raw = self._read("labels")
        labels, unknown = np.empty(raw.shape[:2], np.uint8), 0
        for top in range(0, len(raw), STRIP):
            labels[top : top + STRIP], count = self._decode_labels(raw[top : top + STRIP])
            unknown += count
        self.unknown_labels = unknown
        if unknown == labels.size:
            raise DataError(
                f"{self.paths['labels']}: no pixel has the colour or the index of a class; check the classes of the data set"
            )
        if unknown:
            fate = "read as class 0, as published" if self.exact else "not scored"
            self.notes.append(f"tile {self.name}: {unknown} label pixels fit no class, {fate}")
        return labels

    def _decode_labels(self, raw: np.ndarray) -> tuple[np.ndarray, int]:
        """What stands in the file, colours or numbers -> (class indices, number of pixels that fit
        no class).
        """
        K = len(self.classes)
        if raw.ndim == 3 and raw.shape[2] >= 3:
            palette = [color for _, color in self.classes]
            if self.unscored_color is not None:
                palette.append(self.unscored_color)
            # differs: the published code matches colours exactly, and makes all others class 0
            # (PAPER.md 3.2)
            codes = colors_to_labels(raw[..., :3], palette, tolerance=0 if self.exact else None)
            unknown = codes == IGNORE
            codes[codes == K] = IGNORE
            if self.exact:
                codes[unknown] = 0
            return codes, int(unknown.sum())
        raw = raw[..., 0] if raw.ndim == 3 else raw
        if self.codes is not None:
            known = (raw >= 0) & (raw < len(self.codes))
            table = np.array(self.codes, np.uint8)
            return np.where(known, table[np.where(known, raw, 0)], IGNORE).astype(np.uint8), int(
                (~known & (raw != IGNORE)).sum()
            )
        if self.ignore_index == -1 and raw.dtype == np.uint8:  # int8's -1 written as 255
            raw = raw.view(np.int8)
        known = (raw >= 0) & (raw < K) & (raw != self.ignore_index)
        unknown = ~known & (raw != self.ignore_index)
        return np.where(known, raw, IGNORE).astype(np.uint8), int(unknown.sum())

    def load(
        self, modalities: tuple[str, ...] = ("image", "dsm"), held: set[str] | None = None
    ) -> LoadedTile:
        """Everything that a network of `modalities` needs, in memory; with the image and labels if
        there are any.

        With `held`, for training: image, dsm and labels that are named there stay in memory in the
        types of their files, the others in their files, out of which every crop is cut. All of them
        are read once, to be checked."""
        self._check_modalities(modalities)
        rasters, scale = {}, TileScale()
        if "dsm" in modalities:
            dsm = self._read_heights()
            scale = self._measured(None, dsm)
            rasters["dsm"] = self._keep(
                "dsm", dsm, held, int(dsm.min()) if dsm.dtype == np.uint8 else float(dsm.min())
            )
            del dsm
        if "image" in self.paths and ("image" in modalities or held is None):
            image = self.read_image()
            measured = self._measured(image, None)
            scale = replace(scale, image=measured.image, clip_image=measured.clip_image)
            rasters["image"] = self._keep("image", image, held)
            del image
        if "labels" in self.paths:
            rasters["labels"] = self._keep("labels", self.read_labels(), held)
        image, dsm, labels = (rasters.get(kind) for kind in ("image", "dsm", "labels"))
        return LoadedTile(self.name, image, dsm, labels, scale.heights, scale)

    def open(self, modalities: tuple[str, ...]) -> LoadedTile:
        """What `load` gives a network, without labels, and left in the files as far as they can be
        read in parts.

        The files are passed through once or twice, from top to bottom, for what has to be checked
        and measured."""
        self._check_modalities(modalities)
        image = dsm = None
        scale = TileScale()
        if "dsm" in modalities:
            dsm, scale = self._open_heights()
        if "image" in modalities:
            raw = open_raster(self.paths["image"])
            self._check_bands(raw.shape)
            image = Decoded(raw, (*self.size, len(self.bands)), self._decode_image)
            self._check_pixels(image)
            measured = self._measured(image, None)
            scale = replace(scale, image=measured.image, clip_image=measured.clip_image)
        return LoadedTile(self.name, image, dsm, None, scale.heights, scale)

    def _open_heights(self) -> tuple[Decoded, TileScale]:
        """Metres (H, W) behind slices, missing ones set to the lowest, and their scale."""
        path, size = self.paths["dsm"], self.size
        raw, nodata = open_raster(path), nodata_value(path)
        try:
            if self.grids is not None:
                valid = Decoded(
                    raw, raw.shape[:2], partial(_fill, nodata=nodata, lowest=np.nan, unit=1)
                )
                raw, nodata = OnGrid(valid, *self.grids, size), None
                self.notes.append(f"tile {self.name}: heights resampled to the image's grid")
            lowest, missing = lowest_height(Decoded(raw, size, lambda heights: heights), nodata)
        except DataError as error:
            prefix = "" if str(error).startswith(str(path)) else f"{path}: "
            raise DataError(f"{prefix}{error}; leave the tile out or replace the file") from None
        if missing:
            self.notes.append(
                f"tile {self.name}: {missing} pixels without height, set to the lowest"
            )
        fill = partial(_fill, nodata=nodata, lowest=lowest)
        scale = self._measured(None, Decoded(raw, size, partial(fill, unit=1)))
        return Decoded(raw, size, partial(fill, unit=self.height_unit)), scale

    def _check_modalities(self, modalities: tuple[str, ...]) -> None:
        if "dsm" in modalities and "dsm" not in self.paths:
            raise DataError(f"tile {self.name} has no heights; add them, or use --modalities image")
        if len(self.bands) != 3:
            raise DataError(f"a network takes three bands, not {len(self.bands)}; see --bands")

    def _measured(self, image: np.ndarray | None, dsm: np.ndarray | None) -> TileScale:
        path = self.paths["image" if dsm is None else "dsm"]
        try:
            return measure(self.scaling, image, dsm, self.height_unit, self._pixel_size())
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def _pixel_size(self) -> float | None:
        if self.pixel is not None:
            return self.pixel
        grid = read_grid(self.paths["image" if "image" in self.paths else "dsm"])
        return grid.pixel_size() if grid is not None else None

    def _keep(
        self, kind: str, array: np.ndarray, held: set[str] | None, lowest: float = 0
    ) -> np.ndarray | Held | InFile:
        if held is None:
            return _to_metres(array, self.height_unit) if kind == "dsm" else array
        if kind not in held:
            return self.in_file(kind, lowest)
        if kind == "dsm" and array.dtype == np.uint8:
            return Held(array, partial(_to_metres, unit=self.height_unit))
        return _to_metres(array, self.height_unit) if kind == "dsm" else np.ascontiguousarray(array)

    def in_file(self, kind: str, lowest: float = 0) -> InFile | None:
        """The file behind slices, decoded like `read_...`; None where it has to be in memory."""
        if kind == "dsm" and self.grids is not None:
            return None
        path, (H, W) = self.paths[kind], self.size
        if kind == "image":
            return raster_in_file(path, (H, W, len(self.bands)), self._decode_image)
        if kind == "labels":
            return raster_in_file(path, (H, W), partial(_first, self._decode_labels))
        return raster_in_file(
            path,
            (H, W),
            partial(_fill, nodata=nodata_value(path), lowest=lowest, unit=self.height_unit),
        )

    def memory(self, kind: str) -> int:
        """Bytes that a raster takes when it is held in memory, from the header."""
        H, W = self.size
        if kind == "labels":
            return H * W
        size = raster_bytes(self.paths[kind])
        return H * W * (len(self.bands) * size if kind == "image" else 1 if size == 1 else 4)


def _first(function, raw: np.ndarray) -> np.ndarray:
    return function(raw)[0]


def _to_metres(dsm: np.ndarray, unit: float) -> np.ndarray:
    dsm = dsm.astype(np.float32, copy=False)
    return dsm if unit == 1 else dsm * np.float32(unit)


def _fill(raw: np.ndarray, nodata: float | None, lowest: float, unit: float) -> np.ndarray:
    dsm = (raw[..., 0] if raw.ndim == 3 else raw).astype(np.float32)
    dsm[~valid_heights(dsm, nodata)] = lowest
    return _to_metres(dsm, unit)


@dataclass
class LoadedTile:
    """A tile for a network. Rasters are arrays, or slice like arrays where they are held packed or
    in their files.
    """

    name: str
    image: np.ndarray | InFile | None  # (H, W, 3) in the type of its file
    dsm: np.ndarray | Held | InFile | None  # (H, W) float32 metres
    labels: np.ndarray | InFile | None  # (H, W) uint8
    heights: tuple[float, float] | None  # metres that become 0 and 1
    scale: TileScale | None = None  # None: the type's range, and `heights`

    def __post_init__(self):
        if self.scale is None:
            self.scale = TileScale(self.heights)

    @property
    def size(self) -> tuple[int, int]:
        return next(a for a in (self.image, self.dsm) if a is not None).shape[:2]

    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.image, self.dsm, self.labels) if a is not None)


def load_tiles(
    tiles: list[Tile], modalities: tuple[str, ...], memory_gb: float
) -> list[LoadedTile]:
    """Training tiles in at most `memory_gb` (10^9 bytes); what does not fit stays in its files,
    labels last.

    Raises DataError when the files that cannot be read crop by crop, compressed ones above all, are
    larger than that."""
    kinds = ("labels", *reversed(modalities))  # the smallest, and the dearest to decode, first
    budget, held, fixed = memory_gb * 1e9, [set() for _ in tiles], []
    for kind in kinds:
        for tile, chosen in zip(tiles, held):
            if kind in tile.paths and tile.in_file(kind) is None:
                chosen.add(kind)
                fixed.append((tile.memory(kind), str(tile.paths[kind])))
    used = sum(size for size, _ in fixed)
    if used > budget:
        raise DataError(
            f"{max(fixed)[1]}: only uncompressed TIFFs in one piece can be read crop by crop, and the {len(fixed)} files "
            f"that are none take {used / 1e9:.3g} GB, more than --memory-gb {memory_gb:g}; raise it, or write them uncompressed"
        )
    for kind in kinds:
        for tile, chosen in zip(tiles, held):
            if kind in tile.paths and kind not in chosen and used + tile.memory(kind) <= budget:
                chosen.add(kind)
                used += tile.memory(kind)
    return [tile.load(modalities, chosen) for tile, chosen in zip(tiles, held)]


def fingerprint(tiles: list[LoadedTile]) -> str:
    """A checksum of training tiles, of about a thousand rows of each, so that a run is not resumed
    on other data.
    """
    code = 0
    for tile in tiles:
        for raster in (tile.image, tile.dsm, tile.labels):
            if raster is not None:
                (H, W), code = (
                    raster.shape[:2],
                    zlib.crc32(f"{tile.name}{raster.shape}".encode(), code),
                )
                for row in range(0, H, max(1, H // 1000)):
                    code = zlib.crc32(np.ascontiguousarray(raster[row : row + 1, 0:W]), code)
    return f"{code:08x}"


def memory_line(loaded: list[LoadedTile]) -> str:
    """How much memory tiles take, and how much of them stays in files."""
    mapped = sum(
        isinstance(r, InFile) for tile in loaded for r in (tile.image, tile.dsm, tile.labels)
    )
    files = f", {mapped} rasters are read crop by crop from their files" if mapped else ""
    return f"{len(loaded)} tiles take {sum(tile.nbytes() for tile in loaded) / 1e6:,.1f} MB of memory{files}"
