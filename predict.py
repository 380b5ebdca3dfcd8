"""From two rasters to a class map, and to how sure the network is of it.

    python predict.py --run runs/NAME --image ortho.tif --dsm heights.tif --out map.tif
    python predict.py --image ortho.tif --dsm heights.tif --out map.png --stride 64 --blend cosine --flips
    python predict.py --image ortho.tif --dsm heights.tif --explain FOLDER --at 512,256    a page about one window
    python predict.py --image ortho.tif --dsm heights.tif --out map.tif --confidence sure.tif --probabilities classes.tif

The map is a PNG or a GeoTIFF, by the ending of --out: class indices with a colour table, laid where
the image lies; see `maps.py`. Rasters are read and the map is written strip by strip.
`predict_strips` is what `evaluate.py` uses too.

The probabilities of a pixel are the softmax of the mean of its windows' logits. They are what the
network says, and networks are often surer than they are right.

Shapes: `H, W` pixels of the raster, `B` windows of a batch, `K` classes.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch.nn as nn

from data import facts_of_run, image_bands, scaling_of
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, Ticker, run_script
from engine.device import autocast, pick_device, store_frozen_weights
from engine.inference import BLENDS, percent, predict_strips, predict_tile
from geodata.layouts import LAYOUTS, MODALITIES
from geodata.maps import Output, check_outputs, cut_out, write_maps
from geodata.rasters import DataError, one_line, open_raster
from geodata.tiles import LoadedTile, Tile
from mfnet import MIN_SIZE
from reports.inside import corner, write_explanation

__all__ = ["predict_strips", "predict_tile"]  # from engine/inference.py, for users


def tile_of(args: Namespace, run: Path, settings: dict, classes: list) -> Tile:
    """The rasters of the command line as a tile that is read and scaled as the run's own were."""
    modalities = MODALITIES[settings["modalities"]]
    paths = {
        kind: path
        for kind, path in (("image", args.image), ("dsm", args.dsm))
        if kind in modalities
    }
    for kind, path in paths.items():
        if path is None or not path.is_file():
            raise DataError(
                f"--{kind}: {'missing' if path is None else f'{path} is no file'}; {run} was trained on it"
            )
    label = (args.out or args.explain).stem
    tile = Tile(
        label,
        paths,
        tuple((name, tuple(color)) for name, color in classes),
        scaling=scaling_of(settings),
    )
    layout = LAYOUTS.get(settings["data"])
    if "image" in paths:
        tile.bands = image_bands(layout, settings.get("bands", ""), open_raster(args.image).bands)
    if layout is not None:
        tile.pixel = layout.pixel
        if "dsm" in paths:
            tile.use_heights_of(layout, settings.get("heights_kind", ""))
    return tile


def bands_of(strips: Iterator, confidence: bool, probabilities: bool) -> Iterator[np.ndarray]:
    """`predict_strips` as the bands (C, n, W) uint8 of what is written: classes, then in percent
    what is asked for.
    """
    for classes, shares in strips:
        sure = [percent(shares.max(axis=0, keepdims=True))] if confidence else []
        yield np.concatenate([classes[None], *sure, *([percent(shares)] if probabilities else [])])


def stride_of(args: Namespace, settings: dict) -> int:
    return settings["eval_stride"] if args.stride is None else args.stride


def write_prediction(
    args: Namespace,
    paths: dict[str, Path],
    model: nn.Module,
    settings: dict,
    tile: Tile,
    loaded: LoadedTile,
) -> None:
    """Predicts the whole raster into the files of `paths` (by flag). Raises DataError where they
    cannot be written.
    """
    strips = predict_strips(
        model,
        loaded.image,
        loaded.dsm,
        settings["crop"],
        stride_of(args, settings),
        precision=settings["precision"],
        progress=Ticker("rows of windows"),
        scale=loaded.scale,
        blend=args.blend,
        flips=args.flips,
        probabilities=len(paths) > 1,
    )
    strips = bands_of(strips, bool(args.confidence), bool(args.probabilities))
    strips = cut_out(strips, tile.without_data())
    names = tuple(name for name, _ in tile.classes)
    bands = {"--out": ("class",), "--confidence": ("confidence",), "--probabilities": names}
    outputs = [
        Output(path, bands[flag], tile.classes if flag == "--out" else ())
        for flag, path in paths.items()
    ]
    try:
        write_maps(outputs, strips, loaded.size, tile.paths.get("image", args.dsm))
    except OSError as error:
        listed = " ".join(f"{flag} {path}" for flag, path in paths.items())
        raise DataError(f"{listed}: cannot be written ({one_line(error)})") from error


def main() -> None:
    parser = Parser(
        prog="predict.py", description="Predicts a class map from an image and a height raster."
    )
    parser.add_argument(
        "--run", type=Path, help="folder of a run; by default the newest below runs/"
    )
    parser.add_argument("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG)")
    parser.add_argument(
        "--dsm", type=Path, help="height raster of the same size, or a GeoTIFF on another grid"
    )
    parser.add_argument("--out", type=Path, help="class map to write: .png or .tif")
    parser.add_argument(
        "--confidence",
        type=Path,
        metavar="FILE",
        help="write how sure the map is too: .png or .tif",
    )
    parser.add_argument(
        "--probabilities", type=Path, metavar="FILE", help="write a band for every class too: .tif"
    )
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="FOLDER",
        help="write a page about what happens to one window",
    )
    parser.add_argument(
        "--at",
        type=corner,
        metavar="X,Y",
        help="upper left pixel of that window; else in the middle",
    )
    parser.add_argument(
        "--blend", choices=list(BLENDS), default="mean", help="how overlapping windows are averaged"
    )
    parser.add_argument(
        "--flips", action="store_true", help="average each window over its four reflections"
    )
    parser.add_argument(
        "--stride", type=int, help="pixels between windows; by default as the run was scored"
    )
    parser.add_argument(
        "--weights", help="where SAM's weights are now; by default as the run found them"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    paths = {f"--{name}": getattr(args, name) for name in ("out", "confidence", "probabilities")}
    paths = {flag: path for flag, path in paths.items() if path}
    if not (args.out or args.explain) or args.at and not args.explain:
        parser.error("give --out FILE, --explain FOLDER, or both; --at goes with --explain")
    if paths and not args.out:
        parser.error("--confidence and --probabilities go with --out")
    check_outputs(paths, [path for path in (args.image, args.dsm) if path])

    run = args.run or newest_run()
    device = pick_device(args.device)
    model, settings, classes = load_model(
        run / "model.pt", args.weights, Ticker("fetching SAM's weights, bytes")
    )
    store_frozen_weights(model, settings["precision"], device)
    tile = tile_of(args, run, settings, classes)
    loaded = tile.open(MODALITIES[settings["modalities"]])
    if min(loaded.size) < MIN_SIZE:
        H, W = loaded.size
        raise DataError(
            f"{args.image or args.dsm}: {W} x {H} pixels are too few; give a raster of {MIN_SIZE} and more"
        )
    for note in [*tile.notes, *tile.far_from(facts_of_run(run))]:
        print(f"note: {note}")
    if args.explain:
        with autocast(settings["precision"], device):
            what = model.to(device), loaded, settings["crop"], args.at, tile.classes, str(run)
            page = write_explanation(args.explain, *what)
        print(f"{page}: what {run} does with one window")
    if args.out:
        write_prediction(args, paths, model.to(device), settings, tile, loaded)
        listed = ", ".join(map(str, paths.values()))
        size = f"{loaded.size[1]} x {loaded.size[0]} pixels"
        print(
            f"{listed}: {size} by {run}, windows of {settings['crop']}, stride {stride_of(args, settings)}"
        )


if __name__ == "__main__":
    run_script(main)
