"""Tiles: the rasters of one place, opened, checked, repaired and kept for a network.

A `Tile` names files and opens them; a `LoadedTile` keeps them in memory in their own types, or
leaves them in their files, for `crops.py` to cut network inputs out of them.

Shapes: `H, W` pixels of a tile, `C` bands, `K` classes. Labels are uint8 class indices, 255 = not
scored. Heights are metres until they are scaled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import numpy as np

from geodata.grids import Grid, nearest, on_grid, read_grid, resample, same_grid
from geodata.kinds import Kind
from geodata.labels import Legend, listed
from geodata.layouts import IGNORE, Classes, Layout
from geodata.rasters import open_raster
from geodata.scaling import (
    Scaling,
    TileScale,
    band_pixels,
    fill,
    fixed_range,
    height_limits,
    measure_bands,
    measure_heights,
    measure_image,
    metres,
    type_range,
    valid_heights,
)
from geodata.slices import (
    Box,
    DataError,
    Raster,
    View,
    ranges,
    row_strips,
    strip_boxes,
    view_of,
    with_bands,
)

MUCH = 0.05  # the share of pixels without height that is told in percent
FAR = 1.5  # times the pixel size of training, or the span of its heights, that is told
NEAR = 2  # pixels that the files of a tile may differ by; Vaihingen's do by one


@dataclass
class Tile:
    """The files of one tile, opened on demand.

    All of them are cut to the size they have in common, but for those on another grid than the
    image, which are resampled."""

    name: str
    paths: dict[str, Path]  # image, and where they exist dsm, labels, and other rasters by name
    classes: Classes
    unscored_color: tuple[int, int, int] | None = None
    ignore_index: int = IGNORE  # the value of single-band labels that is not scored
    notes: list[str] = field(default_factory=list)  # what was repaired, a line each
    bands: tuple[int, ...] = (0, 1, 2)  # of the image, from 0
    height_unit: float = 1.0  # metres of one count of the heights
    codes: tuple[int, ...] | None = None  # the class of raw code 0, 1, ... of single-band labels
    exact: bool = False  # as published: colours must match exactly, and any other one is class 0
    pixel: float | None = None  # metres, where no georeference says it
    scaling: Scaling = Scaling()
    one_grid: bool = False  # the files of a benchmark lie on each other, whatever their tags say
    missing_heights: int = 0  # pixels that were filled
    height_limits: tuple[float, float] | None = None  # metres, once the heights are read
    unknown_labels: int = 0  # pixels that `read_labels` found to fit no class
    kinds: dict[str, Kind] = field(default_factory=dict)  # of the rasters besides image and heights
    may_lack: tuple[str, ...] = ()  # rasters that the network can do without, but not without all
    withheld: tuple[str, ...] = ()  # rasters that the network is not given
    rasters: dict[str, Raster] = field(default_factory=dict, repr=False)

    def raster(self, kind: str) -> Raster:
        if kind not in self.rasters:
            self.rasters[kind] = open_raster(self.paths[kind])
        return self.rasters[kind]

    def _note(self, text: str) -> None:
        line = f"tile {self.name}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    @property
    def legend(self) -> Legend:
        meaning = self.unscored_color, self.ignore_index, self.codes, self.exact
        return Legend(self.classes, *meaning)

    @property
    def base(self) -> str:
        """The kind of file on whose grid the tile lies."""
        return next(kind for kind in ("image", "dsm", *self.kinds, "labels") if kind in self.paths)

    @cached_property
    def grids(self) -> dict[str, tuple[Grid, Grid]]:
        """Of files that lie on another grid than the image: theirs and the image's."""
        found, base = {}, self.raster(self.base)
        for kind in () if self.one_grid else self.paths:
            if kind != self.base:
                raster = self.raster(kind)
                theirs, own = read_grid(raster), read_grid(base)
                near = np.abs(np.subtract(raster.shape[:2], base.shape[:2])).max() <= NEAR
                if theirs and own and not (near and same_grid(own, theirs, base.shape[:2])):
                    found[kind] = theirs, own
        return found

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H, W) that all files share."""
        sizes = {k: self.raster(k).shape[:2] for k in self.paths if k not in self.grids}
        H, W = (min(size[axis] for size in sizes.values()) for axis in (0, 1))
        if any(h - H > NEAR or w - W > NEAR for h, w in sizes.values()):
            listing = ", ".join(f"{self.paths[k]} {h} x {w}" for k, (h, w) in sizes.items())
            remedy = "files on another grid than the image need GeoTIFF tags, as the image does"
            remedy = "lay them on the image's grid" if self.one_grid else remedy
            raise DataError(
                f"tile {self.name}: the files differ in size by more than two pixels: {listing}; "
                f"{remedy}"
            )
        for kind, (h, w) in sizes.items():
            if (h, w) != (H, W):
                self._note(f"{kind} of {h} x {w} cut to the common {H} x {W}")
        return H, W

    def _on_tile(self, kind: str, view: View, lay: Callable) -> View:
        """A view of a whole file, as far as it belongs to the tile."""
        if kind not in self.grids:
            return replace(view, shape=(*self.size, *view.shape[2:]))
        self._note(f"{'heights' if kind == 'dsm' else kind} resampled to the image's grid")
        return on_grid(self.paths[kind], view, *self.grids[kind], self.size, lay)

    # -------------------------------------------------------------------------------------- images

    def read(self, name: str) -> np.ndarray:
        """A raster by its name: `read_image`, `read_dsm`, `read_labels`, or the bands (H, W, C)
        float32 of another one, NaN where it has no data."""
        known = {"image": self.read_image, "dsm": self.read_dsm, "labels": self.read_labels}
        return known[name]() if name in known else self._bands(name)[:, :]

    def read_image(self) -> np.ndarray:
        """(H, W, C), the chosen bands in the file's own type."""
        return self._image()[:, :]

    def _image(self) -> View:
        """The image behind slices, checked. Raises DataError by file."""
        raster = self.raster("image")
        if raster.bands < 3 and self.bands == (0, 1, 2):
            palette = raster.colours == "palette"
            expand = "; expand its colour table: gdal_translate -expand rgb IN OUT.tif" * palette
            wanted = f"an image of three or more bands is needed, not {raster.shape}; see --bands"
            raise DataError(f"{raster.path}: {wanted}{expand}")
        if max(self.bands) >= raster.bands:
            missing = f"band {max(self.bands) + 1} is asked for; see --bands"
            raise DataError(f"{raster.path}: has {raster.bands} bands, and {missing}")
        dtype = raster.dtype if raster.dtype.kind in "iu" else np.dtype(np.float32)
        read = partial(_image_pixels, raster, self.bands)
        view = View((*self.size, len(self.bands)), dtype, read)
        if problem := self._pixel_problem(view):
            raise DataError(f"{raster.path}: {problem}")
        return view

    def _bands(self, name: str) -> View:
        """A raster besides image and heights behind slices. Raises DataError by file."""
        raster, kind = self.raster(name), self.kinds[name]
        if (last := max(kind.bands) + 1) > raster.bands:
            found = f"has {raster.bands} band{'s' * (raster.bands > 1)}"
            raise DataError(f"{raster.path}: {found}, and {name} is made of band {last}")
        read = partial(band_pixels, raster, kind.bands, kind.nodata)
        shape = (*raster.shape[:2], len(kind.bands))
        return self._on_tile(name, View(shape, np.dtype(np.float32), read), resample)

    def _pixel_problem(self, view: View) -> str | None:
        """Why no network can be given the pixels of an image, with what helps."""
        by_type, remedy = self.scaling.images in ("unit", "sam"), "--image-scaling LOW:HIGH"
        if view.dtype.kind in "iu":
            odd = by_type and view.dtype not in (np.uint8, np.uint16)
            return f"pixels of {view.dtype}; give their range as {remedy}" if odd else None
        for strip in row_strips(view):
            if not np.isfinite(strip).all():
                return (
                    "the image holds pixels that are no number; if they are no data, say so in it: "
                    "gdal_edit.py -a_nodata nan FILE"
                )
            if by_type and not (strip.min() >= 0 and strip.max() <= 1):
                return f"float images must lie in 0 to 1; give their range as {remedy}"
        return None

    def without_data(self) -> Callable[[slice], np.ndarray] | None:
        """For a slice of rows, where a map of the tile has no data: (n, W) bool; None for a tile
        without such places. That is where the image has none, or, without an image, the heights or
        the first of the other rasters."""
        columns = slice(0, self.size[1])
        if self.base in self.kinds:
            bands = self._bands(self.base)
            return lambda rows: np.isnan(bands[rows, columns]).all(axis=-1)
        if self.base == "dsm":
            heights = self.heights()
            return lambda rows: ~valid_heights(heights[rows, columns])
        raster = open_raster(self.paths["image"])  # with segments of its own
        return (lambda rows: ~raster.valid((rows, columns))) if raster.has_holes else None

    # ------------------------------------------------------------------------------------- heights

    def read_dsm(self) -> np.ndarray | None:
        """(H, W) float32 metres, missing heights set to the tile's lowest; None for a tile without
        heights."""
        return self._open("dsm", "array")[0] if "dsm" in self.paths else None

    def use_heights_of(self, layout: Layout, kind: str) -> None:
        """Reads heights as a run on a layout's `kind` of them does: 8-bit ones without a scale of
        their own are counts of the layout's unit, others metres."""
        raster = self.raster("dsm")
        if raster.dtype == np.uint8 and raster.scale == 1:
            self.height_unit = layout.dsm.get(kind, next(iter(layout.dsm.values())))[0]

    def heights(self, raster: Raster | None = None) -> View:
        """Metres (H, W) behind slices, NaN where the file has no data; of `raster` where that holds
        the file already. Raises DataError by file."""
        raster = raster or self.raster("dsm")
        if raster.bands > 2 or raster.colours != "grey":
            raise DataError(
                f"{raster.path}: heights are one band, and this has {raster.bands} "
                f"({raster.colours}); give a height raster, or take one band: "
                f"gdal_translate -b 1 -colorinterp gray IN OUT.tif"
            )
        read = partial(metres, raster, self.height_unit)
        view = View(raster.shape[:2], np.dtype(np.float32), read)
        if "dsm" in self.grids:  # of which every pixel counts, before neighbours are mixed
            height_limits(view)
            view = view_of(view, fill, np.nan)
        return self._on_tile("dsm", view, resample)

    def _open_heights(self, keep: str) -> tuple[np.ndarray | View, TileScale]:
        """`_open` of the heights: metres (H, W) without holes."""
        raster = self.raster("dsm")
        if keep == "memory" and raster.dtype == np.uint8 and "dsm" not in self.grids:
            raster, keep = raster.in_memory(), "file"
        dsm = self.heights(raster)
        dsm = dsm if keep == "file" else dsm[:, :]
        low, high, missing = height_limits(dsm)
        if missing:  # a fixed range is one for all tiles, and so is what stands for no height
            lowest = (fixed_range(self.scaling.heights) or (low,))[0]
            dsm = view_of(dsm, fill, lowest) if keep == "file" else fill(dsm, lowest)
            share = missing / (self.size[0] * self.size[1])
            percent = f", {100 * share:.1f} % of the tile" if share > MUCH else ""
            self._note(f"{missing} pixels without height{percent}, read as the lowest")
        if keep == "file":
            dsm.nbytes = raster.nbytes
        self.missing_heights, self.height_limits = missing, (low, high)
        return dsm, measure_heights(self.scaling.heights, dsm, self.pixel_size(), (low, high))

    def pixel_size(self) -> float | None:
        """Metres; None where neither the layout nor a georeference tells."""
        grid = None if self.one_grid and self.pixel else read_grid(self.raster(self.base))
        return (grid and grid.pixel_size()) or self.pixel

    # -------------------------------------------------------------------------------------- labels

    def read_labels(self) -> np.ndarray:
        """(H, W) uint8 class indices, 255 = not scored; for a test tile the labels it is scored
        with."""
        view, labels, unknown = self._labels(), np.empty(self.size, np.uint8), 0
        for box in strip_boxes(self.size):
            decoded = view[box]
            unknown += int((decoded < 0).sum())
            labels[box] = self.legend.finish(decoded)
        self.unknown_labels = unknown
        if unknown == labels.size:
            raise DataError(
                f"{self.paths['labels']}: no pixel has the colour or the index of a class; it "
                f"holds {listed(self.unknown_values(1))}; check the classes of the data set"
            )
        if unknown:
            fate = "read as class 0, as published" if self.exact else "not scored"
            self._note(f"{unknown} label pixels fit no class, {fate}")
        return labels

    def _labels(self) -> View:
        """What `Legend.decode` gives, behind slices."""
        raster, legend = self.raster("labels"), self.legend
        masked = (raster.mask, raster.alpha) != (None, None)
        shown = replace(raster, nodata=None) if masked else None
        read = partial(_label_pixels, raster, legend, legend.table_of(raster), shown)
        return self._on_tile("labels", View(raster.shape[:2], np.dtype(np.int16), read), nearest)

    def unknown_values(self, strips: int | None = None) -> dict:
        """Value or colour -> pixels that fit no class, in the first strips or all."""
        raster, legend, found = self.raster("labels"), self.legend, Counter()
        table = legend.table_of(raster)
        for box in list(strip_boxes(raster.shape))[:strips]:
            raw = raster[box]
            found.update(legend.unknown(raw, legend.decode(raw, table)))
        return dict(found)

    # ----------------------------------------------------------------------------------- the whole

    def load(
        self,
        modalities: tuple[str, ...] = ("image", "dsm"),
        held: set[str] | None = None,
        labelled: bool = True,
    ) -> LoadedTile:
        """Everything that a network of `modalities` needs, in memory; with the image and labels if
        there are any.

        With `held`, the rasters that are named there stay in memory in the types of their
        files, the others in their files, out of which every crop is cut. All of them are read once
        or twice, from top to bottom, to be checked and measured."""
        lacking, kept = self.check_modalities(modalities), self.paths if held is None else held
        given = [name for name in modalities if name not in lacking]
        if held is None and "image" in self.paths and "image" not in (*given, *self.withheld):
            given.append("image")
        in_memory = "array" if held is None else "memory"
        opened = {name: self._open(name, in_memory if name in kept else "file") for name in given}
        labels = None
        if "labels" in self.paths and labelled:
            labels = self.read_labels()
            if "labels" not in kept:
                labels = view_of(self._labels(), self.legend.finish, dtype=np.uint8)
        self.rasters = {}
        dsm, scale = opened.pop("dsm", (None, TileScale()))
        image, own = opened.pop("image", (None, scale))
        of_image = dict(image=own.image, clip_image=own.clip_image)
        scale = replace(scale, **of_image, eight_bit_image=own.eight_bit_image)
        return LoadedTile(
            self.name,
            image,
            dsm,
            labels,
            scale,
            more={name: bands for name, (bands, _) in opened.items()},
            scales={name: own for name, (_, own) in opened.items()},
            units={name: self.kinds[name].unit for name in opened},
            lacking={name: self.count_bands(name) for name in lacking},
        )

    def open(self, modalities: tuple[str, ...]) -> LoadedTile:
        """What `load` gives a network, without labels, and left in the files."""
        return self.load(modalities, held=set(), labelled=False)

    def _open(self, name: str, keep: str) -> tuple[np.ndarray | View, TileScale]:
        """A raster for a network, checked, and its scale. `keep` it as an "array"; in "memory",
        uint8 heights as they are in the file; or in the "file", behind slices. Raises DataError by
        file."""
        path = self.paths[name]
        try:
            if name == "dsm":
                return self._open_heights(keep)
            raster = self.raster(name)
            view = self._image() if name == "image" else self._bands(name)
            pixels = view if keep == "file" else view[:, :]
            if name == "image":
                return pixels, measure_image(self.scaling.images, pixels, raster.valid)
            top = type_range(raster.dtype)
            scale = measure_bands(self.kinds[name].scaling, pixels, top)
        except DataError as error:
            named = any(str(p) in str(error) for p in self.paths.values())
            raise DataError(str(error) if named else f"{path}: {error}") from None
        if empty := sum(int(np.isnan(strip).any(axis=-1).sum()) for strip in row_strips(pixels)):
            self._note(f"{empty} pixels of {name} without data, read as the lowest")
        return pixels, scale

    def check(self, modalities: tuple[str, ...]) -> None:
        """Raises DataError for what `load` would stumble over, but for damage in an image whose
        scaling measures nothing: of that a few rows are decoded."""
        again = replace(self, notes=[], rasters={})
        image = again.load(modalities, held=set()).image
        if "image" in self.paths and "image" not in self.withheld:
            view = again._image() if image is None else image
            for row in (0, view.shape[0] // 2, view.shape[0] - 1):
                view[row : row + 1, :]

    def check_modalities(self, modalities: tuple[str, ...]) -> list[str]:
        """The rasters that the tile lacks of those of a network. Raises DataError where the network
        cannot be given the tile."""
        lacking = [n for n in modalities if n not in self.paths or n in self.withheld]
        missed = [n for n in lacking if n not in self.may_lack or len(lacking) == len(modalities)]
        if missed:
            what = "heights" if missed[0] == "dsm" else missed[0]
            rest = "+".join(n for n in modalities if n not in lacking)
            ways = f", use --modalities {rest}, or train with --drop-modality 0.5" if rest else ""
            raise DataError(f"tile {self.name} has no {what}; add it, leave the tile out{ways}")
        return lacking

    def count_bands(self, name: str) -> int:
        """The bands of a raster that a network takes."""
        bands = self.bands if name == "image" else (0,) if name == "dsm" else self.kinds[name].bands
        return len(bands)

    def stays_in_file(self, kind: str) -> bool:
        """Whether crops can be cut out of the file at the cost of a crop."""
        return kind not in self.grids and self.raster(kind).in_parts

    def memory(self, kind: str) -> int:
        """Bytes that a raster takes when it is held in memory, from the header."""
        (H, W), own = self.size, self.raster(kind).dtype.itemsize
        sizes = {"labels": 1, "image": own, "dsm": 1 if own == 1 else 4}
        bands = 1 if kind == "labels" else self.count_bands(kind)
        return H * W * bands * sizes.get(kind, 4)

    def far_from(self, facts: dict) -> list[str]:
        """In a line each, what is far from the `facts_of` a run's training tiles."""
        lines, pixel = [], self.pixel_size()
        if pixel and facts.get("pixel") and not 1 / FAR <= pixel / facts["pixel"] <= FAR:
            lines.append(
                f"pixels of {pixel:.3g} m, and the run was trained on {facts['pixel']:.3g} m; warp "
                f"the rasters: gdalwarp -tr {facts['pixel']:.3g} {facts['pixel']:.3g} IN OUT.tif"
            )
        if self.height_limits and facts.get("heights"):
            (low, high), (least, most) = self.height_limits, facts["heights"]
            span = max(most - least, 1)
            if high - low > FAR * span or low > most + span or high < least - span:
                lines.append(
                    f"heights of {low:.4g} to {high:.4g} m, and the run was trained on "
                    f"{least:.4g} to {most:.4g} m; are they of the same kind and unit?"
                )
        return lines


def _image_pixels(raster: Raster, bands: tuple[int, ...], box: Box) -> np.ndarray:
    """The chosen bands (h, w, C); whole numbers as they are, floats 0 where there is no data."""
    raw = with_bands(raster[box])
    if raw.dtype.kind == "f":
        where = raster.valid(box, raw)
        raw = raw.astype(np.float32)
        if where is not None:
            raw[~where] = 0
    return raw if bands == tuple(range(raw.shape[2])) else raw[..., list(bands)]


def _label_pixels(
    raster: Raster, legend: Legend, table: np.ndarray | None, shown: Raster | None, box: Box
) -> np.ndarray:
    """What `Legend.decode` gives; not scored where the mask or alpha band that `shown` has is 0."""
    raw = raster[box]
    out = legend.decode(raw, table)
    if shown is not None:
        out[~shown.valid(box, raw)] = IGNORE
    return out


@dataclass
class LoadedTile:
    """A tile for a network. Rasters are arrays, or slice like arrays where they are held packed or
    in their files."""

    name: str
    image: np.ndarray | View | None  # (H, W, C) in the type of its file
    dsm: np.ndarray | View | None  # (H, W) float32 metres
    labels: np.ndarray | View | None  # (H, W) uint8
    scale: TileScale = TileScale()
    more: dict[str, np.ndarray | View] = field(default_factory=dict)  # (H, W, C) float32 by name
    scales: dict[str, TileScale] = field(default_factory=dict)  # of those
    units: dict[str, str] = field(default_factory=dict)  # of those
    lacking: dict[str, int] = field(default_factory=dict)  # rasters that are missing -> bands

    @property
    def size(self) -> tuple[int, int]:
        return self.rasters()[0].shape[:2]

    def rasters(self) -> list[np.ndarray | View]:
        rasters = (self.image, self.dsm, *self.more.values(), self.labels)
        return [raster for raster in rasters if raster is not None]

    def input(self, name: str, box: Box) -> np.ndarray:
        """What a network is given of a raster inside a box: (C, h, w) or (h, w) float32, NaN
        throughout where it is missing."""
        if name in self.lacking:
            bands = () if name == "dsm" else (self.lacking[name],)
            size = (len(part) for part in ranges(box, self.size))
            return np.full((*bands, *size), np.nan, np.float32)
        if name == "image":
            return self.scale.image_input(self.image[box])
        if name == "dsm":
            return self.scale.height_input(self.dsm[box], box)
        return np.nan_to_num(self.scales[name].image_input(self.more[name][box]))

    def nbytes(self) -> int:
        return sum(raster.nbytes for raster in self.rasters())
