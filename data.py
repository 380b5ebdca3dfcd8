"""Data sets -> tiles -> crops. Knows no model.

    python data.py --data NAME --root DIR        checks a folder before anybody trains

A data set is a table of `geodata/layouts.py`: classes, splits, and where the files of a tile lie.
`open_dataset` finds the files of a split and complains in one line about those that are missing.
Below it, each one idea, the modules of `geodata/`; what users need of them is importable from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from engine.console import Parser, run_script
from engine.settings import Settings
from geodata import synthetic
from geodata.crops import Crop, CropDataset, CropOrder, draw_crop, sliding_windows, window_places
from geodata.doctor import check_dataset
from geodata.labels import colors_to_labels, labels_to_colors
from geodata.layouts import (
    DATASETS,
    IGNORE,
    ISPRS_CLASSES,
    LABELS,
    LAYOUTS,
    MODALITIES,
    UNSCORED_COLOR,
    Classes,
    Layout,
)
from geodata.loading import facts_of, fingerprint, load_tiles, memory_line
from geodata.rasters import DataError, one_line, open_raster, read_raster
from geodata.scaling import Scaling, fill_missing_heights, height_range, image_input, scale_heights
from geodata.tiles import LoadedTile, Tile

# What users need of the rooms below, importable from here.
__all__ = [
    "Crop",
    "CropDataset",
    "CropOrder",
    "draw_crop",
    "sliding_windows",
    "window_places",
    "DATASETS",
    "IGNORE",
    "ISPRS_CLASSES",
    "LABELS",
    "LAYOUTS",
    "MODALITIES",
    "UNSCORED_COLOR",
    "Classes",
    "Layout",
    "DataError",
    "read_raster",
    "Scaling",
    "fill_missing_heights",
    "height_range",
    "image_input",
    "scale_heights",
    "LoadedTile",
    "Tile",
    "colors_to_labels",
    "facts_of",
    "facts_of_run",
    "fingerprint",
    "labels_to_colors",
    "load_tiles",
    "memory_line",
    "Dataset",
    "open_dataset",
    "open_from_settings",
]


# ---------------------------------------------------------------------------------------- data sets


@dataclass
class Dataset:
    name: str
    root: Path
    classes: Classes
    scored: tuple[int, ...]
    labels_note: str
    layout: Layout | None = None  # None: own tiles, found by listing folders
    ignore_index: int = IGNORE
    # "": the layout's first choice, or the first three; a name of the layout; or 4,3,2 from 1 on
    bands: str = ""
    labels: str = "dataset"  # one of LABELS
    full_labels: bool = False  # score with the full labels where there are eroded ones
    splits: str = "paper"  # or official
    scaling: Scaling = Scaling()
    held_out: tuple[str, ...] = ()  # tiles of `train` that are the split `val`
    heights_kind: str = ""  # of the layout's kinds of heights; "": that of `chosen_heights`

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return [color for _, color in self.classes]

    @property
    def class_names(self) -> list[str]:
        return [name for name, _ in self.classes]

    def tiles(self, split: str, modalities: tuple[str, ...] = ("image", "dsm")) -> list[Tile]:
        """The tiles of a split, with all their files there. Raises DataError in one line if not."""
        tiles, missing = self.find_tiles(split, modalities)
        if missing:
            first = ", ".join(str(path) for path in missing[:3])
            tree = OWN_TREE if self.layout is None else self.layout.describe()
            source = f"; the data come from {self.layout.source}" if self.layout else ""
            raise DataError(
                f"{self.name}: {len(missing)} files of the {split} split are missing, first "
                f"{first}; "
                f"expected below {self.root}: {tree}{source}"
            )
        return tiles

    def find_tiles(
        self, split: str, modalities: tuple[str, ...] = ("image", "dsm")
    ) -> tuple[list[Tile], list[Path]]:
        """The tiles of a split, and the files of theirs that are missing. Raises DataError where
        there is no tile.
        """
        find = _own_tiles if self.layout is None else _layout_tiles
        if not self.held_out or split not in ("train", "val"):
            return find(self, split, modalities, split != "train")
        tiles, missing = find(self, "train", modalities, split == "val")
        return [tile for tile in tiles if (tile.name in self.held_out) == (split == "val")], missing

    def chosen_heights(self) -> tuple[str, float]:
        """The kind of the heights, one for all splits, to be kept with a run, and the metres of one
        count. Normalised and absolute heights are not mixed: of several kinds it is the first that
        is there for every tile, or else the first."""
        if self.layout is None:
            return "", 1.0
        kinds = {self.heights_kind: ...} if self.heights_kind else self.layout.dsm
        for kind in kinds if len(kinds) > 1 else ():
            patterns = self.layout.dsm[kind][1]
            splits = self.layout.listed or self.layout.splits[self.splits]
            found = (_tile_names(self, split) for split in splits)
            if all(_find(root, patterns, *n)[2] for root, names in found for n in names):
                return kind, self.layout.dsm[kind][0]
        kind = next(iter(kinds))
        return kind, self.layout.dsm[kind][0]

    def check(self, modalities: tuple[str, ...]) -> None:
        """Looks into the files of all tiles that are not trained on, which are needed only after
        the training. Raises DataError."""
        for split in ("val", "test") if self.held_out else ("test",):
            for tile in self.tiles(split, modalities):
                tile.check(modalities)

    def with_other_labels(self) -> Dataset | None:
        """The same, scored with full labels for eroded ones, or the reverse; None where there is
        one kind.
        """
        if self.layout is None or self.layout.labels == self.layout.test_labels:
            return None
        note = labels_note(self.layout, not self.full_labels, self.labels, self.splits)
        return replace(self, full_labels=not self.full_labels, labels_note=note)

    def hold_out(self, names: tuple[str, ...] | int | None = None) -> Dataset:
        """The data set with a split `val` that is taken out of `train`.

        Named tiles, so many tiles spread evenly over the list, or None: the layout's own list.
        Raises DataError."""
        whole = replace(self, held_out=())
        train = [tile.name for tile in whole.tiles("train", ())]
        if names is None and self.layout is not None and self.layout.listed:
            names = tuple(tile.name for tile in whole.tiles("val", ()))
        if names is None:
            names = self.layout.validation if self.layout else max(1, len(train) // 6)
        if isinstance(names, int):
            names = (
                tuple(train[(2 * i + 1) * len(train) // (2 * names)] for i in range(names))
                if names
                else ()
            )
        unknown = sorted(set(names) - set(train))
        if unknown or not 0 < len(set(names)) < len(train):
            raise DataError(
                f"validation tiles {', '.join(names) or '(none)'}: give some but not all of the "
                f"training tiles {', '.join(train)}"
            )
        return replace(self, held_out=tuple(names))


def open_dataset(
    name: str,
    root: str | Path | None = None,
    bands: str = "",
    labels: str = "dataset",
    full_labels: bool = False,
    splits: str = "paper",
    scaling: Scaling = Scaling(),
    heights_kind: str = "",
) -> Dataset:
    """A data set by name: one of `LAYOUTS` (synthetic is made on first use), or tiles (own files).
    Raises DataError.
    """
    if name not in (names := (*LAYOUTS, "tiles")):  # a plugin may have added to the layouts
        raise DataError(f"unknown data set {name!r}; there are {', '.join(names)}")
    root = Path(root if root is not None else Path("data") / name)
    if labels not in LABELS:
        raise DataError(f"--labels {labels}: give {' or '.join(LABELS)}")
    if name == "synthetic":
        try:
            synthetic.open_city(root)
        except ValueError as error:
            raise DataError(str(error)) from error
    layout = LAYOUTS.get(name)
    if heights_kind and (layout is None or heights_kind not in layout.dsm):
        raise DataError(f"{name} has no heights of the kind {heights_kind!r}")
    choices = dict(
        bands=bands, labels=labels, full_labels=full_labels, splits=splits, scaling=scaling
    )
    choices["heights_kind"] = heights_kind
    if splits not in (layout.splits if layout else ("paper",)):
        raise DataError(
            f"--splits {splits}: {name} has "
            f"{', '.join(layout.splits) if layout else 'the folders of its own'}"
        )
    image_bands(layout, bands, 99)
    if layout is None:
        return replace(_open_own_tiles(root), **choices)
    note = labels_note(layout, full_labels, labels, splits)
    return Dataset(name, root, layout.classes, layout.scored, note, layout, **choices)


def labels_note(layout: Layout, full_labels: bool, labels: str, splits: str) -> str:
    """How the labels that are scored are to be called beside a score."""
    note = (
        "full labels" if full_labels and layout.labels != layout.test_labels else layout.labels_note
    )
    if labels == "published":
        note += (
            ", raw codes as published"
            if layout.codes
            else ", colours matched exactly and unknown ones class 0"
        )
    return note + (" (official split)" if splits == "official" else "")


def open_from_settings(s: Settings, root: str | Path | None = None) -> Dataset:
    """The data set of a run, read as the run reads it; `root` where it lies elsewhere now. Raises
    DataError.
    """
    check_bands(LAYOUTS.get(s.data), s.bands)
    scaling, kind = scaling_of(s), s.heights_kind
    names = s.data, root or s.root, s.bands, s.labels, s.full_labels, s.splits
    return open_dataset(*names, scaling, kind)


def scaling_of(s: Settings) -> Scaling:
    return Scaling(s.heights, s.image_scaling)


def tile_of_files(
    s: Settings, name: str, image: Path | None, dsm: Path | None, classes: list, run: str
) -> Tile:
    """Rasters as a tile that is read and scaled as those of a run. Raises DataError where one that
    the run was trained on is missing.
    """
    given = {"image": image, "dsm": dsm}
    paths = {kind: given[kind] for kind in MODALITIES[s.modalities]}
    for kind, path in paths.items():
        if path is None or not path.is_file():
            what = "missing" if path is None else f"{path} is no file"
            raise DataError(f"--{kind}: {what}; {run} was trained on it")
    named = tuple((name, tuple(color)) for name, color in classes)
    tile = Tile(name, paths, named, scaling=scaling_of(s))
    layout = LAYOUTS.get(s.data)
    if "image" in paths:
        tile.bands = image_bands(layout, s.bands, open_raster(image).bands)
    if layout is not None:
        tile.pixel = layout.pixel
    if layout is not None and "dsm" in paths:
        tile.use_heights_of(layout, s.heights_kind)
    return tile


def facts_of_run(run: Path) -> dict:
    """What `facts_of` told of a run's training tiles; {} for a run that did not keep it."""
    try:
        return dict(json.loads((run / "config.json").read_text(encoding="utf-8"))["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def image_bands(layout: Layout | None, bands: str, count: int) -> tuple[int, ...]:
    """The bands, from 0, that `bands` means in an image file of `count` bands. Raises DataError."""
    if bands and all(part.strip().isdigit() for part in bands.split(",")):
        chosen = tuple(int(part) - 1 for part in bands.split(","))
        if len(chosen) == 3 and min(chosen) >= 0:
            return chosen
    elif layout is None and not bands:
        return (0, 1, 2)
    elif layout is not None and (bands in layout.image or not bands):
        variants = [numbers for _, numbers in layout.image[bands or next(iter(layout.image))]]
        return max((v for v in variants if max(v) < count), key=max, default=variants[0])
    raise DataError(f"--bands {bands}: give {_band_choices(layout)}")


def _band_choices(layout: Layout | None) -> str:
    named = [
        name
        for name, ((_, bands), *_) in (layout.image.items() if layout else ())
        if len(bands) == 3
    ]
    return f"{', '.join(named)}{', or ' if named else ''}three bands counted from 1, as in 4,3,2"


def check_bands(layout: Layout | None, bands: str) -> None:
    """Raises DataError unless `bands` means three, which is what a network takes."""
    count = len(image_bands(layout, bands, 99))
    if count != 3:
        raise DataError(
            f"--bands {bands}: a network takes three bands, not {count}; give "
            f"{_band_choices(layout)}"
        )


def _layout_tiles(
    dataset: Dataset, split: str, modalities: tuple[str, ...], scored: bool
) -> tuple[list[Tile], list[Path]]:
    layout = dataset.layout
    root, names = _tile_names(dataset, split)
    labels = layout.test_labels if scored and not dataset.full_labels else layout.labels
    kinds = {"image": _image_patterns(dataset), "labels": labels}
    heights_kind, unit = dataset.chosen_heights() if "dsm" in modalities else ("", 1.0)
    if heights_kind:
        kinds["dsm"] = layout.dsm[heights_kind][1]
    tiles, missing = [], []
    for folder, name in names:
        found = {kind: _find(root, patterns, folder, name) for kind, patterns in kinds.items()}
        missing += [path for _, path, there in found.values() if not there]
        pattern, _, _ = found["image"]
        coded = found["labels"][0] in layout.coded
        by_number = dataset.bands and dataset.bands not in layout.image
        tiles.append(
            Tile(
                name,
                {kind: path for kind, (_, path, _) in found.items()},
                dataset.classes,
                layout.unscored_color,
                ignore_index=-1 if layout.codes and not coded else IGNORE,
                bands=image_bands(layout, dataset.bands, 99)
                if by_number
                else kinds["image"][pattern],
                height_unit=unit,
                codes=layout.codes[dataset.labels] if coded else None,
                exact=dataset.labels == "published" and not layout.codes,
                pixel=layout.pixel,
                scaling=dataset.scaling,
                one_grid=True,
            )
        )
    return tiles, missing


def _image_patterns(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """Pattern -> bands, in the order of preference."""
    image = dataset.layout.image
    named = image.get(dataset.bands) or next(iter(image.values()))
    return dict(named)


def _find(root: Path, patterns, folder: str, name: str) -> tuple[str, Path, bool]:
    """(pattern, path, True) of the first file that exists; (pattern, path, False) of the first
    pattern if none does.
    """
    padded = "_".join(part.zfill(2) for part in name.split("_"))
    candidates = [(p, root / p.format(id=name, padded=padded, folder=folder)) for p in patterns]
    found = next(((*c, True) for c in candidates if c[1].is_file()), None)
    return found or (*candidates[0], False)


def _tile_names(dataset: Dataset, split: str) -> tuple[Path, list[tuple[str, str]]]:
    """The folder that holds everything, and the (folder, number) of each tile of a split."""
    layout, root, table = dataset.layout, dataset.root, dataset.layout.splits[dataset.splits]
    if split not in (layout.listed or table):
        raise DataError(
            f"{dataset.name} has no split {split!r}; there are {', '.join(layout.listed or table)}"
        )
    if not layout.listed:
        return root, [("", name) for name in table[split]]
    for base in (root / nested for nested in layout.nested):
        folders = layout.listed[split]
        listed = [
            (folder, _number(path.stem))
            for folder in folders
            for path in sorted((base / folder / "lc").glob("*.tif"))
        ]
        if listed:
            empty = [folder for folder in folders if not any(f == folder for f, _ in listed)]
            if empty:
                raise DataError(
                    f"{base / empty[0] / 'lc'}: no labels; the {split} split takes "
                    f"{', '.join(folders)}"
                )
            return base, sorted(
                listed, key=lambda item: (folders.index(item[0]), len(item[1]), item[1])
            )
        prepared = [path.stem for path in (base / "images_png").glob("*.png")]
        chosen = [name for name in prepared if (name in table["test"]) == (split == "test")]
        if chosen and split != "val":
            return base, [("", name) for name in sorted(chosen, key=lambda name: (len(name), name))]
    where = " or ".join(f"{folder}/lc/lc_NUMBER.tif" for folder in layout.listed[split])
    raise DataError(
        f"{root}: no tiles of the {split} split; expected {where} with s2, topo beside lc, or "
        f"images_png, dsm_pngs, "
        f"masks_png; the data come from {layout.source}"
    )


def _number(stem: str) -> str:
    return stem.removeprefix("lc_")


# ---------------------------------------------------------------------------------------- own tiles

IMAGE_ENDINGS = (".tif", ".tiff", ".gtiff", ".png", ".jpg", ".jpeg")
FOREIGN = (".jp2", ".img", ".vrt", ".asc", ".ecw", ".bil")  # found, to be refused with what helps


OWN_TREE = "classes.json and {train,val,test}/{images,dsm,labels}/NAME.{tif,png,jpg}"


def _open_own_tiles(root: Path) -> Dataset:
    path = root / "classes.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; own tiles are expected below --root as {OWN_TREE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        classes = tuple(
            (str(c["name"]), tuple(int(v) for v in c["color"])) for c in content["classes"]
        )
        ignore = int(content.get("ignore", IGNORE))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f'{path}: not of the form {{"classes": [{{"name": ..., "color": [r, g, b]}}, ...]}} '
            f"({one_line(error)})"
        ) from error
    colors = [color for _, color in classes]
    if not 2 <= len(classes) <= 64 or any(
        len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in colors
    ):
        raise DataError(
            f"{path}: 2 to 64 classes are needed, each with a colour [r, g, b] of 0 to 255"
        )
    if len(set(colors)) < len(colors):
        raise DataError(f"{path}: two classes have the same colour; give each its own")
    names = [name for name, _ in classes]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two classes have the same name; give each its own")
    return Dataset(
        "tiles", root, classes, tuple(range(len(classes))), "all labels", ignore_index=ignore
    )


def _own_tiles(
    dataset: Dataset, split: str, modalities: tuple[str, ...], scored: bool
) -> tuple[list[Tile], list[Path]]:
    folder = dataset.root / split
    images = _files_by_stem(folder / "images")
    if not images:
        raise DataError(
            f"{folder / 'images'}: no images; own tiles are expected below --root as {OWN_TREE}"
        )
    dsm = _files_by_stem(folder / "dsm") if "dsm" in modalities else {}
    labels = _files_by_stem(folder / "labels")
    unlabelled = sorted(set(images) - set(labels))
    if unlabelled:
        raise DataError(
            f"{folder / 'labels'}: no labels for {len(unlabelled)} images, first {unlabelled[0]}"
        )
    bands, tiles = image_bands(None, dataset.bands, 99), []
    for name, path in sorted(images.items()):
        paths = {"image": path, "labels": labels[name]} | (
            {"dsm": dsm[name]} if name in dsm else {}
        )
        ignore = dataset.ignore_index
        tiles.append(
            Tile(
                name,
                paths,
                dataset.classes,
                ignore_index=ignore,
                bands=bands,
                scaling=dataset.scaling,
            )
        )
    return tiles, []


def _files_by_stem(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in (*IMAGE_ENDINGS, *FOREIGN) and not path.name.startswith("."):
            other = found.setdefault(path.stem, path)
            if other != path:
                raise DataError(f"{path}: is the same tile as {other.name}; delete one of them")
    return found


def main() -> None:
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("--data", required=True, choices=sorted(DATASETS), help="data set")
    parser.add_argument("--root", type=Path, help="its folder; by default data/NAME")
    parser.add_argument(
        "--modalities", choices=tuple(MODALITIES), default="image+dsm", help="rasters to look at"
    )
    parser.add_argument("--bands", default="", help="as for train.py")
    parser.add_argument("--labels", choices=LABELS, default="dataset", help="as for train.py")
    parser.add_argument(
        "--splits", choices=("paper", "official"), default="paper", help="as for train.py"
    )
    parser.add_argument("--full-labels", action="store_true", help="as for train.py")
    parser.add_argument("--image-scaling", help="as for train.py")
    args = parser.parse_args()
    check_bands(LAYOUTS.get(args.data), args.bands)
    hunan = args.data in ("hunan", "mmhunan")
    scaling = Scaling(images=args.image_scaling or ("reflectance" if hunan else "unit"))
    dataset = open_dataset(
        args.data, args.root, args.bands, args.labels, args.full_labels, args.splits, scaling
    )
    print(f"{args.data} in {dataset.root}, scored by {dataset.labels_note}")
    if not check_dataset(dataset, MODALITIES[args.modalities]):
        raise DataError(
            f"{dataset.root}: training cannot run; see above what is missing or unusable"
        )
    print("training can run")


if __name__ == "__main__":
    run_script(main, DataError)
