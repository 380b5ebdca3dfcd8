"""From rasters to a class map, and to how sure the network is of it.

    python predict.py --run runs/NAME --image ortho.tif --dsm heights.tif --out map.tif
    python predict.py --image ortho.tif --dsm heights.tif --out map.tif --confidence sure.tif
    python predict.py --image FOLDER --dsm heights.tif --out MAPS

The map is a PNG or a GeoTIFF, by the ending of --out: class indices with a colour table, laid where
the image lies; see `geodata/maps.py`, and docs/prediction.md for all that can be written. Rasters
are read and the map is written strip by strip. `evaluate.py` predicts by the same functions
(`engine/inference.py`) and averages windows as the paper does; a map trusts the middle of a window
more than its border.

Shapes: `H, W` pixels of the raster, `B` windows of a batch, `K` classes.
"""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Iterator

import numpy as np

from data import files_by_stem
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, Ticker, run_script, typed
from engine.device import pick_device, store_frozen_weights
from engine.given import RASTER_FLAG, facts_of_run, files_given, raster_words, tile_of_files
from engine.inference import BLENDS, percent, predict_loaded, predict_strips, predict_tile
from engine.settings import Settings
from fast import accelerate
from geodata.grids import read_grid
from geodata.maps import ENDINGS, POLYGONS, Output, check_outputs, cut_out, write_maps
from geodata.rasters import DataError, one_line
from geodata.tiles import Tile
from mfnet import MIN_SIZE, MFNet
from sam_vit import WeightsError

__all__ = ["predict_strips", "predict_tile"]  # from engine/inference.py, for users
EXTRAS = ("--confidence", "--probabilities", "--polygons")  # in the order of the bands


def bands_of(strips: Iterator, confidence: bool, probabilities: bool, polygons: bool = False):
    """Yields the bands (C, n, W) uint8 of what is written: classes, then what is asked for in
    percent, then what polygons are made of, classes and confidence."""
    for classes, probs in strips:
        sure = percent(probs.max(axis=0, keepdims=True)) if confidence or polygons else None
        parts = [classes[None], *([sure] if confidence else [])]
        parts += [percent(probs)] if probabilities else []
        yield np.concatenate([*parts, *([classes[None], sure] if polygons else [])])


def write_prediction(paths: dict[str, Path], strips: Iterator, tile: Tile, smallest: int) -> None:
    """Writes what `predict_strips` yields to `paths` (by flag), laid where the tile lies; polygons
    of `smallest` pixels and more. Raises DataError where they cannot be written."""
    strips = cut_out(bands_of(strips, *(flag in paths for flag in EXTRAS)), tile.without_data())
    names = tuple(name for name, _ in tile.classes)
    kinds = {
        "--out": (("class",), tile.classes),
        "--confidence": (("confidence",),),
        "--probabilities": (names,),
        "--polygons": (("class", "confidence"), tile.classes, smallest),
    }
    outputs = [Output(paths[flag], *kind) for flag, kind in kinds.items() if flag in paths]
    try:
        write_maps(outputs, strips, tile.size, tile.paths[tile.base])
    except OSError as error:
        listed = " ".join(f"{flag} {path}" for flag, path in paths.items())
        raise DataError(f"{listed}: cannot be written ({one_line(error)})") from error


Job = tuple[dict[str, Path], dict[str, Path]]  # rasters by name, what to write by flag


def jobs_of(given: dict[str, Path], paths: dict[str, Path]) -> list[Job]:
    """One for the rasters, or one for each image of a folder, whose maps go to folders and take its
    name. Raises DataError."""
    first = next(iter(given.values()), None)
    if first is None or not first.is_dir():
        check_outputs(paths, given.values())
        return [(given, paths)]
    for flag, path in paths.items():
        if path.suffix.lower() in (*ENDINGS, POLYGONS):
            raise DataError(f"{flag} {path}: {first} is a folder; give a folder too")
    folders, jobs = {n: files_by_stem(p) for n, p in given.items() if p.is_dir()}, []
    for name, path in folders[next(iter(given))].items():
        rasters = given | {n: files.get(name) for n, files in folders.items()}
        if lacking := next((n for n, found in rasters.items() if not found), None):
            what, where = "heights" if lacking == "dsm" else lacking, given[lacking]
            flag = "--dsm" if lacking == "dsm" else "--raster"
            raise DataError(f"{flag} {where}: no {what} for {path}; add {name}.tif")
        ends = {flag: name + (POLYGONS if flag == "--polygons" else ".tif") for flag in paths}
        jobs.append((rasters, {flag: path / ends[flag] for flag, path in paths.items()}))
    if not jobs:
        raise DataError(f"{first}: no image in this folder; give one with TIFF, PNG or JPEG files")
    for rasters, job in jobs:
        check_outputs(job, rasters.values(), folders=paths.values())
    for flag, path in paths.items():
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{flag} {path}: cannot be written ({one_line(error)})") from error
    return jobs


def predict_job(job: Job, model: MFNet, s: Settings, classes: list, run: Path, args: Namespace):
    """Writes the maps of one image. Raises DataError."""
    given, paths = job
    tile = tile_of_files(s, paths["--out"].stem, given, classes, str(run))
    loaded = tile.open(s.rasters)
    (H, W), like = loaded.size, tile.paths[tile.base]
    if min(H, W) < MIN_SIZE:
        few = f"{like}: {W} x {H} pixels are too few"
        raise DataError(f"{few}; give a raster of {MIN_SIZE} and more")
    for note in [*tile.notes, *tile.far_from(facts_of_run(run))]:
        print(f"note: {note}")
    stride = s.eval_stride if args.stride is None else args.stride
    how = dict(blend=args.blend, flips=args.flips, progress=Ticker("rows of windows"))
    strips = predict_loaded(model, loaded, s, stride, probabilities=len(paths) > 1, **how)
    grid = read_grid(like)
    area = (grid and grid.pixel_area()) or 1  # a pixel, where it does not tell metres
    write_prediction(paths, strips, tile, math.ceil(min(args.min_area / area, 1e18)))
    if "--polygons" in paths and grid and grid.system is None:
        remedy = f"ogr2ogr -a_srs EPSG:NUMBER OUT.geojson {paths['--polygons']}"
        print(f"note: the image names no EPSG number, and so the polygons do not; add it: {remedy}")
    listed = ", ".join(map(str, paths.values()))
    print(f"{listed}: {W} x {H} pixels by {run}, windows of {s.crop}, stride {stride}")


def main() -> None:
    parser = Parser(prog="predict.py", description="Predicts a class map from image and heights.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG), or a folder")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    add("--raster", **RASTER_FLAG)
    add("--out", type=Path, required=True, help="class map to write: .png or .tif")
    add("--confidence", type=Path, metavar="FILE", help="write how sure the map is: .png or .tif")
    add("--probabilities", type=Path, metavar="FILE", help="write a band for every class: .tif")
    add("--polygons", type=Path, metavar="FILE", help="write the map's regions: .geojson")
    text = "smaller polygons become part of the largest beside them: square metres, or pixels"
    add("--min-area", type=float, default=0.0, metavar="AREA", help=text)
    add("--blend", choices=list(BLENDS), default="cosine", help="how windows are averaged")
    add("--flips", action="store_true", help="average each window over its four reflections")
    add("--stride", type=int, help="pixels between windows; by default as the run was scored")
    add("--weights", help="where SAM's weights are now; by default as the run found them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if not 0 <= args.min_area < math.inf or args.min_area and not args.polygons:
        parser.error("--min-area is 0 or more, and for --polygons")
    paths = {flag: getattr(args, flag[2:]) for flag in ("--out", *EXTRAS)}
    jobs = jobs_of(files_given(args), {flag: path for flag, path in paths.items() if path})

    run = args.run or newest_run()
    device = pick_device(args.device)
    model, s, classes = load_model(run / "model.pt", args.weights)
    store_frozen_weights(model, s.precision, device)
    accelerate(model.to(device))
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1:
            print(f"{next(iter(job[0].values()))}, {number} of {len(jobs)}")
        predict_job(job, model, s, classes, run, args)
    given, out = raster_words(jobs[0][0]), f"{args.out.with_suffix('')}_explained"
    words = ["--run", run, *given, "--out", out]
    print(f"next: {typed('explain.py', *words)}")


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
