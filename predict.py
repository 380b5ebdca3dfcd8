"""From two rasters to a class map, and to how sure the network is of it.

    python predict.py --run runs/NAME --image ortho.tif --dsm heights.tif --out map.tif
    python predict.py --image ortho.tif --dsm heights.tif --out map.png --stride 64 --blend cosine
    python predict.py --image ortho.tif --dsm heights.tif --out map.tif --confidence sure.tif
    python predict.py --image ortho.tif --dsm heights.tif --out map.tif --probabilities classes.tif

The map is a PNG or a GeoTIFF, by the ending of --out: class indices with a colour table, laid where
the image lies; see `geodata/maps.py`. Rasters are read and the map is written strip by strip.
`predict_strips` is what `evaluate.py` uses too.

The probabilities of a pixel are the softmax of the mean of its windows' logits. They are what the
network says, and networks are often surer than they are right.

Shapes: `H, W` pixels of the raster, `B` windows of a batch, `K` classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import numpy as np

from data import facts_of_run, tile_of_files
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, Ticker, run_script
from engine.device import pick_device, store_frozen_weights
from engine.inference import BLENDS, percent, predict_loaded, predict_strips, predict_tile
from fast import accelerate
from geodata.layouts import MODALITIES
from geodata.maps import Output, check_outputs, cut_out, write_maps
from geodata.rasters import DataError, one_line
from geodata.tiles import Tile
from mfnet import MIN_SIZE
from sam_vit import WeightsError

__all__ = ["predict_strips", "predict_tile"]  # from engine/inference.py, for users


def bands_of(strips: Iterator, confidence: bool, probabilities: bool) -> Iterator[np.ndarray]:
    """The bands (C, n, W) uint8 of what is written: classes, then what is asked for in percent."""
    for classes, probs in strips:
        sure = [percent(probs.max(axis=0, keepdims=True))] if confidence else []
        yield np.concatenate([classes[None], *sure, *([percent(probs)] if probabilities else [])])


def write_prediction(
    paths: dict[str, Path], strips: Iterator, tile: Tile, size: tuple[int, int], like: Path
) -> None:
    """Writes what `predict_strips` yields to `paths` (by flag), laid where the raster `like` lies.
    Raises DataError where they cannot be written."""
    strips = bands_of(strips, "--confidence" in paths, "--probabilities" in paths)
    strips = cut_out(strips, tile.without_data())
    names = tuple(name for name, _ in tile.classes)
    bands = {"--out": ("class",), "--confidence": ("confidence",), "--probabilities": names}
    colors = {"--out": tile.classes}
    outputs = [Output(path, bands[f], colors.get(f, ())) for f, path in paths.items()]
    try:
        write_maps(outputs, strips, size, like)
    except OSError as error:
        listed = " ".join(f"{flag} {path}" for flag, path in paths.items())
        raise DataError(f"{listed}: cannot be written ({one_line(error)})") from error


def main() -> None:
    parser = Parser(prog="predict.py", description="Predicts a class map from image and heights.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG)")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    add("--out", type=Path, required=True, help="class map to write: .png or .tif")
    add("--confidence", type=Path, metavar="FILE", help="write how sure the map is: .png or .tif")
    add("--probabilities", type=Path, metavar="FILE", help="write a band for every class: .tif")
    add("--blend", choices=list(BLENDS), default="mean", help="how windows are averaged")
    add("--flips", action="store_true", help="average each window over its four reflections")
    add("--stride", type=int, help="pixels between windows; by default as the run was scored")
    add("--weights", help="where SAM's weights are now; by default as the run found them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    paths = {f"--{name}": getattr(args, name) for name in ("out", "confidence", "probabilities")}
    paths = {flag: path for flag, path in paths.items() if path}
    check_outputs(paths, [path for path in (args.image, args.dsm) if path])

    run = args.run or newest_run()
    device = pick_device(args.device)
    model, s, classes = load_model(run / "model.pt", args.weights)
    store_frozen_weights(model, s.precision, device)
    accelerate(model.to(device))
    tile = tile_of_files(s, args.out.stem, args.image, args.dsm, classes, str(run))
    loaded = tile.open(MODALITIES[s.modalities])
    H, W = loaded.size
    if min(H, W) < MIN_SIZE:
        few = f"{args.image or args.dsm}: {W} x {H} pixels are too few"
        raise DataError(f"{few}; give a raster of {MIN_SIZE} and more")
    for note in [*tile.notes, *tile.far_from(facts_of_run(run))]:
        print(f"note: {note}")
    stride = s.eval_stride if args.stride is None else args.stride
    how = dict(blend=args.blend, flips=args.flips, progress=Ticker("rows of windows"))
    strips = predict_loaded(model, loaded, s, stride, probabilities=len(paths) > 1, **how)
    write_prediction(paths, strips, tile, (H, W), tile.paths.get("image", args.dsm))
    listed = ", ".join(map(str, paths.values()))
    print(f"{listed}: {W} x {H} pixels by {run}, windows of {s.crop}, stride {stride}")


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
