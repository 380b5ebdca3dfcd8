"""What a result is a result of: a key of settings, code, backbone and pixels.

Two cells of one key are one computation; whatever may change a score changes the key. Where files
lie, how many processes and threads compute, comments, docstrings and layout of the code do not. A
plugin counts as its file, as a run keeps it, comments included.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from engine.commandline import FREE_ON_RESUME
from engine.device import resolve_precision
from engine.networks import build_model
from engine.settings import Settings
from geodata.slices import DataError, row_strips
from tuners import TUNERS

HOME = Path(__file__).resolve().parent.parent

# Of all that train.py imports, what moves no score: it speaks, keeps files, or chooses settings,
# pixels and weights, which are in the key by themselves.
NEUTRAL = {"reports", "engine.console", "engine.files", "engine.signals", "engine.commandline"}
NEUTRAL |= {"engine.locks"}
NEUTRAL |= {"engine.settings", "engine.recipes", "engine.plugins", "engine.pretrained"}
NEUTRAL |= {"engine.budget", "geodata.doctor", "geodata.city", "geodata.canvas"}
NEUTRAL |= {"geodata.synthetic", "geodata.sensor", "geodata.things"}

FREE = {*FREE_ON_RESUME, "weights"}  # settings that move no score; weights count by their content


def sha256(content: object) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --------------------------------------------------------------------------------------------- code


def code_digest(tuner: str, home: Path = HOME, start: str = "train") -> str:
    """SHA-256 of the code that computes a run of `tuner`: of every module below `home` that `start`
    imports, directly or not, less the other tuners."""
    classes = {cls.__name__ for cls in TUNERS.values()}
    bases = frozenset(cls.__name__ for cls in inspect.getmro(TUNERS[tuner]))
    found, todo = {}, [start]
    while todo:
        name = todo.pop()
        path = home / f"{name.replace('.', '/')}.py"
        if name in found or NEUTRAL & {name, name.split(".")[0]} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        others = frozenset(cls for cls in classes - bases if cls in text)
        found[name] = canonical(text, bases if others else frozenset(), others)
        todo += imported(text)
    return sha256([TUNERS[tuner].__qualname__, found])


@lru_cache(maxsize=None)
def imported(text: str) -> list[str]:
    """Every module that a source may import, also inside functions."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@lru_cache(maxsize=None)
def canonical(text: str, bases: frozenset[str], others: frozenset[str]) -> str:
    """A source without comments, docstrings and layout, and without the classes of `others` that
    nothing which stays refers to, nor the entries of `TUNERS`."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            kept = [part for part in node.body if not is_text(part)]
            node.body = kept or [ast.Pass()]
    body = [part for part in tree.body if not registers(part)]
    wanted = set(bases)
    while True:
        kept = [p for p in body if not isinstance(p, ast.ClassDef) or p.name not in others - wanted]
        named = {n.id for p in kept for n in ast.walk(p) if isinstance(n, ast.Name)}
        if named & others <= wanted:
            break
        wanted |= named & others
    return ast.unparse(ast.Module(kept, []))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def registers(node: ast.AST) -> bool:
    """Whether a statement puts tuners into `TUNERS`."""
    simple = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr))
    parts = getattr(node, "targets", [getattr(node, "target", getattr(node, "value", None))])
    names = (n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name))
    return simple and "TUNERS" in names


# ------------------------------------------------------------------------ pixels, backbone, the key


def splits_of(s: Settings) -> tuple[str, ...]:
    """The splits that move a score; tiles held out of `train` are those of `train`."""
    folder = s.data == "tiles" and s.val == "val"
    return ("train", "val", "test") if folder else ("train", "test")


def pixels_digest(
    dataset: Any, modalities: tuple[str, ...], splits: tuple[str, ...] = ("train", "test")
) -> str:
    """SHA-256 of what a network of `modalities` is given of all tiles, before it is scaled:
    images, heights, labels. Raises DataError."""
    digest = hashlib.sha256()
    for split in splits:
        for tile in dataset.tiles(split, modalities):
            loaded = tile.load(modalities)
            digest.update(f"{split} {tile.name}".encode())
            loaded.image = loaded.image if "image" in modalities else None
            for raster in loaded.rasters():
                digest.update(f"{raster.shape} {raster.dtype}".encode())
                for strip in row_strips(raster):
                    digest.update(np.ascontiguousarray(strip))
    return digest.hexdigest()


class Identities:
    """Keys of runs; what many of them share is computed once. `open_data` opens the data set of
    settings."""

    def __init__(self, open_data: Callable[[Settings], Any], device: torch.device):
        self.open_data, self.device, self.known = open_data, device, {}

    def once(self, key: tuple, compute):
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def dataset(self, s: Settings) -> Any:
        found = self.once(("dataset", *data_settings(s)), lambda: self.open_data(s))
        s.kinds = s.kinds or found.kinds_of(s.rasters)
        return found

    def base(self, s: Settings) -> str:
        """The SHA-256 of the encoder's weights. Raises WeightsError."""
        seed = s.seed if s.weights == "none" else None
        plain = replace(s, tuner="frozen", tuner_option={})
        key = ("base", s.encoder, s.weights, s.relative_positions, seed)
        return self.once(key, lambda: build_model(plain, 2)[1]["sha256"])

    def counted(self, s: Settings) -> dict:
        """The settings that may move a score, with what a run fills in by itself."""
        dataset = self.dataset(s)
        kept = {name: value for name, value in asdict(s).items() if name not in FREE}
        if "dsm" in s.rasters:
            kept["heights_kind"] = dataset.chosen_heights()[0]
        return kept | {"precision": resolve_precision(s.precision, self.device)}

    def watch(self, s: Settings) -> Callable[[], bool]:
        """A function that says whether code and files are what they are now."""

        def look() -> list:
            tiles = [self.dataset(s).tiles(split, s.rasters) for split in splits_of(s)]
            paths = [path for found in tiles for tile in found for path in tile.paths.values()]
            stats = [path.stat() for path in paths if path.exists()]
            return [code_digest(s.tuner), [(stat.st_size, stat.st_mtime_ns) for stat in stats]]

        before = look()

        def is_current() -> bool:
            try:
                return look() == before
            except DataError:
                return False

        return is_current

    def key(self, s: Settings) -> str:
        """Raises DataError or WeightsError for a run that cannot be."""
        what = s.rasters, splits_of(s)
        where = ("pixels", *data_settings(s), *what)
        pixels = self.once(where, lambda: pixels_digest(self.dataset(s), *what))
        return sha256([self.counted(s), code_digest(s.tuner), self.base(s), pixels])


def data_settings(s: Settings) -> tuple:
    names = "data root bands labels splits full_labels heights heights_kind image_scaling"
    return tuple(getattr(s, name) for name in [*names.split(), "may_lack"])
