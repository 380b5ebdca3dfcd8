"""Rasters that a user names on a command line: --image, --dsm, --raster NAME=FILE."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from engine.console import typed
from engine.settings import Settings
from geodata.kinds import read_kind
from geodata.layouts import LAYOUTS, image_bands
from geodata.rasters import DataError
from geodata.scaling import Scaling
from geodata.tiles import Tile


def named_file(text: str) -> tuple[str, Path]:
    """What --raster says, NAME=FILE."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ArgumentTypeError(f"{text}: give NAME=FILE, as s1=radar.tif")
    return name, Path(path)


def tile_of_files(s: Settings, name: str, given: dict[str, Path], classes: list, run: str) -> Tile:
    """Rasters by name as a tile that is read and scaled as those of a run. Raises DataError where
    one that the run was trained on is missing, and it was trained to have all."""
    kinds, paths = {n: read_kind(n, form, run) for n, form in s.kinds.items()}, {}
    needed = {*s.rasters, *(kind.source for kind in kinds.values())}
    if others := given.keys() - needed:
        flag = f"--{min(others)}" if min(others) in ("image", "dsm") else f"--raster {min(others)}"
        raise DataError(f"{flag}: {run} was trained on {', '.join(s.rasters)}; leave it out")
    for kind in s.rasters:
        from_image = kind in kinds and kinds[kind].source == "image"
        path = given.get(kind) or (given.get("image") if from_image else None)
        flag = f"--{kind}" if kind in ("image", "dsm") else f"--raster {kind}=FILE"
        trained = f"{run} was trained on it"
        if path is not None and not path.is_file():
            raise DataError(f"{flag}: {path} is no file; {trained}")
        if path is not None:
            paths[kind] = path
        elif kind not in s.may_lack:
            raise DataError(f"{flag}: missing; {trained}; to do without: {to_lack(s)}")
    if not paths:
        raise DataError(f"no raster is given; {run} was trained on {', '.join(s.rasters)}")
    named, layout = tuple((name, tuple(color)) for name, color in classes), LAYOUTS.get(s.data)
    scaling, pixel = Scaling(s.heights, s.image_scaling), layout and layout.pixel
    lack = dict(kinds=kinds, may_lack=s.may_lack)
    tile = Tile(name, paths, named, pixel=pixel, scaling=scaling, **lack)
    if "image" in paths:
        tile.bands = image_bands(layout, s.bands, tile.raster("image").bands)
    if layout is not None and "dsm" in paths:
        tile.use_heights_of(layout, s.heights_kind)
    return tile


def to_lack(s: Settings) -> str:
    """The command that trains a run like another that may lack rasters."""
    place = ["--data", s.data, "--root", s.root] if s.data != "synthetic" else []
    return typed("train.py", *place, "--modalities", s.modalities, "--drop-modality", "0.5")


RASTER_FLAG = dict(
    type=named_file, action="append", default=[], metavar="NAME=FILE",
    help="another raster that the run was trained on; may be repeated",
)  # fmt: skip


def files_given(args: Namespace) -> dict[str, Path]:
    """The rasters of --image, --dsm and --raster by name. Raises DataError for one given twice."""
    given = {"image": args.image, "dsm": args.dsm}
    given = {name: path for name, path in given.items() if path is not None}
    for name, path in args.raster:
        if given.setdefault(name, path) is not path:
            raise DataError(
                f"--raster {name}={path}: {name} is {given[name]} already; give it once"
            )
    return given


def raster_words(files: dict[str, Path | str]) -> list:
    """Rasters by name as the flags that give them."""
    words = []
    for name, path in files.items():
        usual = name in ("image", "dsm")
        words += [f"--{name}", path] if usual else ["--raster", f"{name}={path}"]
    return words


def facts_of_run(run: Path) -> dict:
    """What `facts_of` told of a run's training tiles; {} for a run that did not keep it."""
    try:
        return dict(json.loads((run / "config.json").read_text(encoding="utf-8"))["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
