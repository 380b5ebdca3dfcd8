"""Data sets -> tiles -> crops. Knows no model.

    python data.py --data NAME --root DIR        checks a folder before anybody trains

A data set is a table of `geodata/layouts.py`: classes, splits, and where the files of a tile lie.
`Dataset.tiles` finds the files of a split and complains in one line about those that are missing.
Below it, each one idea, the modules of `geodata/`; what users need of them is importable from here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.console import Parser, run_script, typed
from engine.plugins import load_given_plugins
from engine.settings import Settings, data_sets, words_of
from geodata import synthetic
from geodata.crops import Crop, CropDataset, CropOrder, draw_crop, sliding_windows, window_places
from geodata.doctor import check_dataset
from geodata.kinds import Kind, ordered, read_kind
from geodata.labels import colors_to_labels, labels_to_colors
from geodata.layouts import (
    IGNORE,
    ISPRS_CLASSES,
    LABELS,
    LAYOUTS,
    UNSCORED_COLOR,
    Classes,
    Layout,
    image_bands,
)
from geodata.loading import facts_of, fingerprint, load_tiles, memory_line
from geodata.rasters import DataError, one_line, open_raster, read_raster
from geodata.scaling import Scaling, height_range, image_input, scale_heights
from geodata.tiles import LoadedTile, Tile


@dataclass
class Dataset:
    name: str
    root: Path
    classes: Classes
    scored: tuple[int, ...]
    layout: Layout | None = None  # None: own tiles, found by listing folders
    ignore_index: int = IGNORE
    bands: str = ""  # a name of the layout's; 4,3,2 from 1 on; "": its first, or the first three
    labels: str = "dataset"  # one of LABELS
    full_labels: bool = False  # score with the full labels where there are eroded ones
    splits: str = "paper"  # or official
    scaling: Scaling = Scaling()
    heights_kind: str = ""  # of the layout's kinds of heights; "": that of `chosen_heights`
    held_out: tuple[str, ...] = ()  # tiles of `train` that are the split `val`
    val_folder: bool = False  # or the folder of that name is
    rasters: dict[str, Kind] = field(default_factory=dict)  # besides image and heights
    may_lack: tuple[str, ...] = ()  # rasters that tiles may lack
    withheld: tuple[str, ...] = ()  # rasters that no tile is to give

    @property
    def class_names(self) -> list[str]:
        return [name for name, _ in self.classes]

    @property
    def labels_note(self) -> str:
        """How the labels that are scored are to be called beside a score."""
        full = self.full_labels and self.has_other_labels
        note = "full labels" if full else self.layout.labels_note if self.layout else "all labels"
        if self.labels == "published" and self.layout:
            coded = "raw codes as published"
            exact = "colours matched exactly and unknown ones class 0"
            note += f", {coded if self.layout.codes else exact}"
        return note + (" (official split)" if self.splits == "official" else "")

    @property
    def has_other_labels(self) -> bool:
        """Whether there are full labels and eroded ones."""
        return self.layout is not None and self.layout.labels != self.layout.test_labels

    def with_other_labels(self) -> Dataset | None:
        """The same, scored with full labels for eroded ones, or the reverse; None where there is
        one kind."""
        return replace(self, full_labels=not self.full_labels) if self.has_other_labels else None

    def tiles(self, split: str, modalities: tuple[str, ...] = ("image", "dsm")) -> list[Tile]:
        """The tiles of a split, with all their files there. Raises DataError in one line if not."""
        tiles, missing = self.find_tiles(split, modalities)
        if missing:
            first = ", ".join(map(str, missing[:3]))
            raise DataError(
                f"{self.name}: {len(missing)} files of the {split} split are missing, first "
                f"{first}; expected below {self.root}: {self.layout.describe()}; the data come "
                f"from {self.layout.source}"
            )
        return tiles

    def find_tiles(self, split: str, modalities: tuple[str, ...]) -> tuple[list[Tile], list[Path]]:
        """The tiles of a split, and the files of theirs that are missing. Raises DataError where
        there is no tile, and for a raster of no kind that it has."""
        known = ("image", "dsm", *self.rasters)
        if unknown := ", ".join(name for name in modalities if name not in known):
            remedy = "" if self.layout else f"; list others in {self.root / 'classes.json'}"
            raise DataError(
                f"--modalities {'+'.join(modalities)}: {self.name} has no raster {unknown}; there "
                f"are {', '.join(known)}{remedy}"
            )
        listed = "train" if self.held_out and split == "val" else split
        if self.layout is None:
            tiles, missing = _own_tiles(self, listed, modalities), []
        else:
            tiles, missing = _layout_tiles(self, listed, modalities, scored=split != "train")
        for tile in tiles:
            tile.kinds = {name: self.rasters[name] for name in modalities if name in self.rasters}
            tile.may_lack, tile.withheld = self.may_lack, self.withheld
        if self.held_out and listed == "train":
            tiles = [t for t in tiles if (t.name in self.held_out) == (split == "val")]
        return tiles, missing

    def lacking(self, tiles: list[Tile], split: str, modalities: tuple[str, ...]) -> list[str]:
        """A line for each raster that some tiles of a split lack and may lack. Raises DataError for
        one that no training tile has."""
        lines = []
        for name in (name for name in modalities if name in self.may_lack):
            n, what = sum(name not in t.paths for t in tiles), "heights" if name == "dsm" else name
            if n == len(tiles) and split == "train":
                rest = "+".join(other for other in modalities if other != name)
                remedy = f"add files of the tiles' names, or use --modalities {rest}"
                raise DataError(f"{self.root}: no training tile has {what}; {remedy}")
            lines += [f"{n} of {len(tiles)} {split} tiles have no {what}"] if n else []
        return lines

    def kinds_of(self, names: tuple[str, ...]) -> dict[str, dict]:
        """The kinds of rasters, besides image and heights, as they are kept with a run."""
        return {name: self.rasters[name].as_dict() for name in names if name in self.rasters}

    def chosen_heights(self) -> tuple[str, float]:
        """The kind of the heights, one for all splits, to be kept with a run, and the metres of one
        count. Normalised and absolute heights are not mixed: of several kinds it is the first that
        is there for every tile, or else the first."""
        if self.layout is None:
            return "", 1.0
        kinds = [self.heights_kind] if self.heights_kind else list(self.layout.dsm)
        whole = (kind for kind in kinds if len(kinds) == 1 or self._has_heights(kind))
        kind = next(whole, kinds[0])
        return kind, self.layout.dsm[kind][0]

    def _has_heights(self, kind: str) -> bool:
        """Whether every tile of every split has heights of a kind."""
        patterns = self.layout.dsm[kind][1]
        splits = self.layout.listed or self.layout.splits[self.splits]
        found = (_tile_names(self, split) for split in splits)
        paths = (_find(root, patterns, *name)[1] for root, names in found for name in names)
        return all(path.is_file() for path in paths)

    def check(self, modalities: tuple[str, ...]) -> list[str]:
        """Looks into the files of all tiles that are not trained on, which are needed only after
        the training -> what is to be told of them. Raises DataError."""
        lines = []
        for split in ("val", "test") if self.held_out or self.val_folder else ("test",):
            tiles = self.tiles(split, modalities)
            lines += self.lacking(tiles, split, modalities)
            for tile in tiles:
                tile.check(modalities)
        return lines

    def hold_out(self, names: tuple[str, ...] | int | None = None) -> Dataset:
        """The data set with a split `val` that is taken out of `train`.

        Named tiles, so many tiles spread evenly over the list, or None: the layout's own list. Of
        own tiles "val" is the folder of that name. Raises DataError."""
        if names == ("val",) and self.layout is None:
            return replace(self, val_folder=True)
        train = [tile.name for tile in self.tiles("train", ())]
        if names is None and self.layout is None:
            names = max(1, len(train) // 6)
        elif names is None and self.layout.listed:
            names = tuple(tile.name for tile in self.tiles("val", ()))
        elif names is None:
            names = self.layout.validation
        if isinstance(names, int):
            names = tuple(train[(2 * i + 1) * len(train) // (2 * names)] for i in range(names))
        if not names or not set(names) < set(train):
            raise DataError(
                f"validation tiles {', '.join(names) or '(none)'}: give some but not all of the "
                f"training tiles {', '.join(train)}"
            )
        return replace(self, held_out=tuple(names))


# ----------------------------------------------------------------------------------------- opening


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
    Raises DataError."""
    if name not in (names := (*LAYOUTS, "tiles")):  # a plugin may have added to the layouts
        raise DataError(f"unknown data set {name!r}; there are {', '.join(names)}")
    if labels not in LABELS:
        raise DataError(f"--labels {labels}: give {' or '.join(LABELS)}")
    root, layout = Path(root if root is not None else Path("data") / name), LAYOUTS.get(name)
    if name == "synthetic":
        synthetic.open_city(root)
    if heights_kind and (layout is None or heights_kind not in layout.dsm):
        raise DataError(f"{name} has no heights of the kind {heights_kind!r}")
    if splits not in (layout.splits if layout else ("paper",)):
        known = ", ".join(layout.splits) if layout else "the folders of its own"
        raise DataError(f"--splits {splits}: {name} has {known}")
    image_bands(layout, bands, 99)
    if layout is not None:
        classes, scored, ignored = layout.classes, layout.scored, IGNORE
        rasters = layout.rasters
    else:
        classes, ignored, rasters, _ = _read_classes(root / "classes.json")
        scored = tuple(range(len(classes)))
    choices = bands, labels, full_labels, splits, scaling, heights_kind
    return Dataset(name, root, classes, scored, layout, ignored, *choices, rasters=rasters)


def open_from_settings(s: Settings) -> Dataset:
    """The data set of a run, read as the run reads it. A run that has not kept its kinds of rasters
    yet gets them. Raises DataError."""
    scaling, names = Scaling(s.heights, s.image_scaling), (s.labels, s.full_labels, s.splits)
    dataset = open_dataset(s.data, s.root, s.bands, *names, scaling, s.heights_kind)
    for name, form in s.kinds.items():
        patterns = dataset.rasters[name].patterns if name in dataset.rasters else ()
        kept = replace(read_kind(name, form, "its settings"), patterns=patterns)
        dataset.rasters = {**dataset.rasters, name: kept}
    s.kinds = dataset.kinds_of(s.rasters)
    dataset.may_lack = s.may_lack
    return dataset


# ---------------------------------------------------------------------------- tiles of a benchmark


def _layout_tiles(
    dataset: Dataset, split: str, modalities: tuple[str, ...], scored: bool
) -> tuple[list[Tile], list[Path]]:
    layout, chosen = dataset.layout, dataset.bands
    root, names = _tile_names(dataset, split)
    image = dict(layout.image.get(chosen) or next(iter(layout.image.values())))  # pattern -> bands
    if chosen and chosen not in layout.image:
        image = dict.fromkeys(image, image_bands(layout, chosen, 99))
    labels = layout.test_labels if scored and not dataset.full_labels else layout.labels
    kinds, unit = {"image": image, "labels": labels}, 1.0
    if "dsm" in modalities:
        heights_kind, unit = dataset.chosen_heights()
        kinds["dsm"] = layout.dsm[heights_kind][1]
    kinds |= {n: dataset.rasters[n].patterns for n in modalities if n in dataset.rasters}
    tiles, missing = [], []
    for folder, name in names:
        found = {kind: _find(root, patterns, folder, name) for kind, patterns in kinds.items()}
        bands, coded = image[found["image"][0]], found["labels"][0] in layout.coded
        kept = {k: p for k, (_, p) in found.items() if p.is_file() or k not in dataset.may_lack}
        missing += [path for path in kept.values() if not path.is_file()]
        tile = Tile(
            name,
            kept,
            dataset.classes,
            layout.unscored_color,
            ignore_index=-1 if layout.codes and not coded else IGNORE,
            bands=bands,
            height_unit=unit,
            codes=layout.codes[dataset.labels] if coded else None,
            exact=dataset.labels == "published" and not layout.codes,
            pixel=layout.pixel,
            scaling=dataset.scaling,
            one_grid=True,
        )
        tiles.append(tile)
    return tiles, missing


def _find(root: Path, patterns, folder: str, name: str) -> tuple[str, Path]:
    """(pattern, path) of the first file that exists; of the first pattern if none does."""
    padded = "_".join(part.zfill(2) for part in name.split("_"))
    candidates = [(p, root / p.format(id=name, padded=padded, folder=folder)) for p in patterns]
    return next((found for found in candidates if found[1].is_file()), candidates[0])


def _tile_names(dataset: Dataset, split: str) -> tuple[Path, list[tuple[str, str]]]:
    """The folder that holds everything, and the (folder, number) of each tile of a split."""
    layout, table = dataset.layout, dataset.layout.splits[dataset.splits]
    if split not in (known := layout.listed or table):
        raise DataError(f"{dataset.name} has no split {split!r}; there are {', '.join(known)}")
    if not layout.listed:
        return dataset.root, [("", name) for name in table[split]]
    folders = layout.listed[split]
    for base in (dataset.root / nested for nested in layout.nested):
        found = {folder: _numbers(base / folder / "lc", "*.tif") for folder in folders}
        if any(found.values()):
            for folder in (folder for folder in folders if not found[folder]):
                takes = f"the {split} split takes {', '.join(folders)}"
                raise DataError(f"{base / folder / 'lc'}: no labels; {takes}")
            return base, [(folder, name) for folder in folders for name in found[folder]]
        prepared = _numbers(base / "images_png", "*.png")
        chosen = [name for name in prepared if (name in table["test"]) == (split == "test")]
        if chosen and split != "val":
            return base, [("", name) for name in chosen]
    where = " or ".join(f"{folder}/lc/lc_NUMBER.tif" for folder in folders)
    raise DataError(
        f"{dataset.root}: no tiles of the {split} split; expected {where} with s2, topo beside "
        f"lc, or images_png, dsm_pngs, masks_png; the data come from {layout.source}"
    )


def _numbers(folder: Path, pattern: str) -> list[str]:
    """The numbers of the tiles whose files lie in a folder, in their order."""
    names = [path.stem.removeprefix("lc_") for path in folder.glob(pattern)]
    return sorted(names, key=lambda name: (len(name), name))


# --------------------------------------------------------------------------------------- own tiles

OWN_TREE = "classes.json and {train,val,test}/{images,dsm,labels}/NAME.{tif,png,jpg}"
EXPECTED = f"own tiles are expected below --root as {OWN_TREE}"
ENDINGS = (".tif", ".tiff", ".gtiff", ".png", ".jpg", ".jpeg")
FOREIGN = (".jp2", ".img", ".vrt", ".asc", ".ecw", ".bil")  # found, to be refused with what helps


def _read_classes(path: Path) -> tuple[Classes, int, dict[str, Kind], list[str]]:
    """Classes, the ignored value, the rasters, and the words for train.py that prepare.py left, of
    a classes.json. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {EXPECTED}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        named = [(str(c["name"]), tuple(int(v) for v in c["color"])) for c in content["classes"]]
        ignored = int(content.get("ignore", IGNORE))
        forms = dict(content.get("rasters", {}))
    except (KeyError, TypeError, ValueError) as error:
        form = '{"classes": [{"name": ..., "color": [r, g, b]}, ...]}'
        raise DataError(f"{path}: not of the form {form} ({one_line(error)})") from error
    names, colors = zip(*named) if named else ((), ())
    valid = all(len(color) == 3 and all(0 <= v <= 255 for v in color) for color in colors)

    def need(fits: bool, what: str) -> None:
        if not fits:
            raise DataError(f"{path}: {what}")

    needed = "2 to 64 classes are needed, each with a colour [r, g, b] of 0 to 255"
    need(2 <= len(named) <= 64 and valid, needed)
    for what, values in (("colour", colors), ("name", names)):
        need(
            len(set(values)) == len(values), f"two classes have the same {what}; give each its own"
        )
    height = {"kind": "height"}
    remedy = f"give {json.dumps(height)}; its scale is --heights"
    need(forms.pop("dsm", height) == height, f"the raster dsm: {remedy}")
    odd = next((name for name in names if not name.isprintable()), None)
    need(odd is None, f"the class {odd!r} has a character that cannot be shown; rename it")
    rasters = {name: read_kind(name, form, str(path)) for name, form in forms.items()}
    told = content.get("train", [])
    words = isinstance(told, list) and all(isinstance(word, str) for word in told)
    need(words, '"train" is a list of the words for train.py; leave it out')
    return tuple(named), ignored, rasters, told


def _own_tiles(dataset: Dataset, split: str, modalities: tuple[str, ...]) -> list[Tile]:
    folder = dataset.root / split
    images, labels = files_by_stem(folder / "images"), files_by_stem(folder / "labels")
    others = [name for name in modalities if name != "image"]
    sources = {name: dataset.rasters[name].source for name in others if name in dataset.rasters}
    more = {n: images if sources.get(n) else files_by_stem(folder / n) for n in others}
    if not images:
        raise DataError(f"{folder / 'images'}: no images; {EXPECTED}")
    if lacking := sorted(images.keys() - labels.keys()):
        without = f"no labels for {len(lacking)} images, first {lacking[0]}"
        raise DataError(f"{folder / 'labels'}: {without}")
    choices = dict(ignore_index=dataset.ignore_index, scaling=dataset.scaling)
    choices["bands"], found = image_bands(None, dataset.bands, 99), []
    files_of = {"image": images, "labels": labels, **more}
    for name in sorted(labels if "image" in dataset.may_lack else images):
        paths = {kind: files[name] for kind, files in files_of.items() if name in files}
        found.append(Tile(name, paths, dataset.classes, **choices))
    return found


def files_by_stem(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in (*ENDINGS, *FOREIGN) and not path.name.startswith("."):
            if (other := found.setdefault(path.stem, path)) != path:
                raise DataError(f"{path}: is the same tile as {other.name}; delete one of them")
    return found


# -------------------------------------------------------------------------------------- the doctor


def main() -> None:
    load_given_plugins("data.py")
    parser = Parser(prog="data.py", description=__doc__)
    add, as_there = parser.add_argument, "as for train.py"
    add("--data", required=True, choices=data_sets(), help="data set")
    add("--plugin", action="append", default=[], metavar="FILE", help=as_there)
    add("--root", type=Path, help="its folder; by default data/NAME")
    add("--modalities", default="image+dsm", help="rasters to look at")
    add("--bands", default="", help=as_there)
    add("--labels", choices=LABELS, default="dataset", help=as_there)
    add("--splits", choices=("paper", "official"), default="paper", help=as_there)
    add("--full-labels", action="store_true", help=as_there)
    add("--image-scaling", help=as_there)
    by_hand, told = parser.parse_args(), []
    if by_hand.data == "tiles":
        told = _read_classes((by_hand.root or Path("data/tiles")) / "classes.json")[3]
    args, _ = parser.parse_known_args([*told, *sys.argv[1:]])  # the later word counts
    args.modalities = ordered(args.modalities)
    hunan = args.data == "hunan"
    scaling = Scaling(images=args.image_scaling or ("reflectance" if hunan else "unit"))
    choices = args.bands, args.labels, args.full_labels, args.splits, scaling
    dataset = open_dataset(args.data, args.root, *choices)
    print(f"{args.data} in {dataset.root}, scored by {dataset.labels_note}")
    if not check_dataset(dataset, tuple(args.modalities.split("+"))):
        what = "training cannot run; see above what is missing or unusable"
        raise DataError(f"{dataset.root}: {what}")
    given = {n: v for n, v in vars(by_hand).items() if v != parser.get_default(n)}
    print(f"training can run; next: {typed('train.py', *told, *words_of(given))}")


if __name__ == "__main__":
    run_script(main, DataError)
