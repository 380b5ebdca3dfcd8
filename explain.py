"""A lesson: one page that walks one window through a network, stage by stage.

    python explain.py                                   the newest run, the middle of a test tile
    python explain.py --run runs/NAME --tile 11 --at 128,256
    python explain.py --image ortho.tif --dsm heights.tif --out FOLDER

explain.html in --out, by default in RUN/explain, holds for each stage the equation of
docs/method.md, the lines of code that compute it, shapes and numbers of parameters, and pictures of
what happened. The network is the plain one, not `fast.py`'s: the lines on the page are what ran.
"""

from __future__ import annotations

import importlib
import inspect
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from data import open_from_settings
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, run_script, typed
from engine.device import autocast, pick_device, store_frozen_weights
from engine.given import RASTER_FLAG, files_given, raster_words, tile_of_files
from engine.inside import first_tuned, look_inside
from engine.settings import Settings
from geodata.rasters import DataError
from geodata.tiles import LoadedTile, Tile
from mfnet import MIN_SIZE, MFNet
from reports.lesson import write_lesson
from reports.method import equations
from reports.page import RANDOM, command, note
from reports.stages import walk
from sam_vit import WeightsError

METHOD = Path(__file__).resolve().parent / "docs/method.md"


def corner(text: str) -> tuple[int, int]:
    """What --at says, "X,Y" -> (X, Y)."""
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text}: give X,Y in pixels, as in 512,256") from None
    return x, y


def place_window(
    size: tuple[int, int], window: int, at: tuple[int, int] | None
) -> tuple[slice, slice]:
    """The box of a window whose upper left pixel is `at` (X, Y), by default in the middle, of a
    raster of `size` (H, W).

    It ends where the raster does: moved there, and no larger than the raster. Raises DataError.
    """
    H, W = size
    if min(H, W) < MIN_SIZE:
        raise DataError(f"{W} x {H} pixels are too few; give a raster of {MIN_SIZE} and more")
    h, w = min(window, H), min(window, W)
    x, y = at if at is not None else ((W - w) // 2, (H - h) // 2)
    if not (0 <= x < W and 0 <= y < H):
        raise DataError(f"--at {x},{y}: outside of the raster; give 0,0 to {W - 1},{H - 1}")
    left, top = min(x, W - w), min(y, H - h)
    return np.s_[top : top + h, left : left + w]


def window_side(model: MFNet, crop: int) -> int:
    """The run's crop; where one of SAM's attention windows covers all of that, two by two."""
    window = max(getattr(block.attn, "window", 0) for block in model.image_encoder.blocks)
    return crop if crop > 16 * window else 2 * 16 * window


def choose_tile(args: Namespace, s: Settings, classes: list, run: Path) -> Tile:
    """The rasters that were named, or a test tile of the run's data set. Raises DataError."""
    if given := files_given(args):
        return tile_of_files(s, "given", given, classes, str(run))
    found = open_from_settings(s).tiles("test", s.rasters)
    tiles = {tile.name: tile for tile in found}
    name = next(iter(tiles)) if args.tile is None else args.tile
    if name not in tiles:
        raise DataError(f"--tile {name}: no test tile; there are {', '.join(tiles)}")
    return tiles[name]


def cut_window(tile: Tile, loaded: LoadedTile, box: tuple[slice, slice]) -> LoadedTile:
    """The rasters inside the box, as arrays, with the labels of a tile that has some."""
    labels = tile.read_labels() if "labels" in tile.paths else None
    rasters = {"image": loaded.image, "dsm": loaded.dsm, "labels": labels}
    more = {name: raster[box] for name, raster in loaded.more.items()}
    return replace(loaded, more=more, **{k: r[box] for k, r in rasters.items() if r is not None})


def functions_of_tuner(model: MFNet) -> dict[str, Callable]:
    """What the first tuned block computes that SAM's does not, as `file.py:Class.forward`."""
    block = model.image_encoder.blocks[first_tuned(model)]
    kinds = dict.fromkeys(map(type, block.modules()))
    own = [k.forward for k in kinds if not k.forward.__module__.startswith(("sam_vit", "torch."))]
    return {f"{Path(inspect.getfile(f)).name}:{f.__qualname__}": f for f in own}


def find_function(name: str) -> Callable:
    """`dfm.py:Pyramid.forward` -> the function."""
    file, path = name.split(".py:")
    return attrgetter(path)(importlib.import_module(file.replace("/", ".")))


def main() -> None:
    parser = Parser(prog="explain.py", description="Walks one window through a network, on a page.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--tile", help="a test tile of the run's data set; by default the first")
    add("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG)")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    add("--raster", **RASTER_FLAG)
    add("--at", type=corner, metavar="X,Y", help="upper left pixel of the window; else the middle")
    add("--out", type=Path, metavar="FOLDER", help="folder for the page; by default RUN/explain")
    add("--weights", help="where SAM's weights are now; by default as the run found them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if args.tile is not None and files_given(args):
        parser.error("--tile is one of the data set's; give it, or --image and --dsm")
    run, device = args.run or newest_run(), pick_device(args.device)
    model, s, classes = load_model(run / "model.pt", args.weights)
    store_frozen_weights(model, s.precision, device)
    tile = choose_tile(args, s, classes, run)
    loaded = tile.open(s.rasters)
    box = place_window(loaded.size, window_side(model, s.crop), args.at)
    cut, rasters = cut_window(tile, loaded, box), {}
    for line in tile.notes:
        print(f"note: {line}")
    for name in s.rasters:
        called = "height" if name == "dsm" else name
        rasters[called] = torch.from_numpy(loaded.input(name, box))[None].to(device)
    with autocast(s.precision, device):
        inside = look_inside(model.to(device), s.encoder, rasters)
    functions = functions_of_tuner(model)
    stages = walk(inside, cut, tile.classes, s.tuner, list(functions))
    named = {name for stage in stages for name in stage.code} - functions.keys()
    functions |= {name: find_function(name) for name in named}
    (H, W), (rows, columns) = inside.size, box
    words = (
        f"Tile {tile.name}, {W} x {H} pixels from column {columns.start} and row {rows.start} on. "
        "Equations and their numbers are those of docs/method.md; code is as it stands in the "
        "files, without docstrings."
    )
    page = (args.out or run / "explain") / "explain.html"
    method = equations(METHOD.read_text(encoding="utf-8"))
    title = f"One window through {run}"
    head = (RANDOM if s.weights == "none" else "") + note(words)
    if not files_given(args):
        at = f"{columns.start},{rows.start}"
        head += command(typed("explain.py", "--run", run, "--tile", tile.name, "--at", at))
    write_lesson(page, title, head, stages, method, functions, inside.parameters)
    rasters = raster_words(dict.fromkeys(s.rasters, "FILE"))
    again = typed("predict.py", "--run", run, *rasters, "--out", "map.tif")
    print(f"{page}: one window through {run}; next: {again}")


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
