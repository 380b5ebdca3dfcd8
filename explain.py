"""A page about what a trained network does with one window.

    python explain.py --image ortho.tif --dsm heights.tif --out FOLDER
    python explain.py --run runs/NAME --image ortho.tif --dsm heights.tif --out FOLDER --at 512,256

FOLDER/explain.html shows the window, the fused features level by level, what each modality adds to
them, and the learned mixing weights; see `reports/inside.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data import tile_of_files
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, Ticker, run_script
from engine.device import autocast, pick_device, store_frozen_weights
from fast import accelerate
from geodata.layouts import MODALITIES
from geodata.rasters import DataError
from mfnet import MIN_SIZE, MFNet
from reports.inside import corner, cut_window, place_window, write_inside
from sam_vit import WeightsError


def learned_mixing(model: MFNet) -> dict[str, list[list[float]]]:
    """The layers of a block that mix -> for each block the M weights; {} if none does."""
    found: dict[str, list[list[float]]] = {}
    for block in model.image_encoder.blocks:
        for layer, weights in block.mixing_weights().items():
            found.setdefault(layer, []).append(weights.tolist())
    return found


def main() -> None:
    parser = Parser(prog="explain.py", description="Writes a page about one window of a raster.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG)")
    add("--dsm", type=Path, help="heights of the same size, or a GeoTIFF on another grid")
    add(
        "--out", type=Path, metavar="FOLDER", required=True, help="folder for the page, made if new"
    )
    add(
        "--at",
        type=corner,
        metavar="X,Y",
        help="upper left pixel of the window; else in the middle",
    )
    add("--weights", help="where SAM's weights are now; by default as the run found them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    run = args.run or newest_run()
    device = pick_device(args.device)
    ticker = Ticker("fetching SAM's weights, bytes")
    model, s, classes = load_model(run / "model.pt", args.weights, ticker)
    store_frozen_weights(model, s.precision, device)
    accelerate(model.to(device))
    tile = tile_of_files(s, args.out.stem, args.image, args.dsm, classes, str(run))
    loaded = tile.open(MODALITIES[s.modalities])
    H, W = loaded.size
    if min(H, W) < MIN_SIZE:
        raise DataError(
            f"{args.image or args.dsm}: {W} x {H} pixels are too few; give a raster of {MIN_SIZE} "
            "and more"
        )
    for note in tile.notes:
        print(f"note: {note}")
    box = place_window(loaded.size, s.crop, args.at)
    cut, rasters, seen = cut_window(loaded, box), [], {}
    if cut.image is not None:
        rasters.append(cut.scale.image_input(cut.image))
    if cut.dsm is not None:
        rasters.append(cut.scale.height_input(cut.dsm, box))
    with autocast(s.precision, device), torch.inference_mode():
        model(*(torch.from_numpy(raster)[None].to(device) for raster in rasters), seen=seen)
    mixing = learned_mixing(model)
    page = write_inside(args.out, cut, box, seen, mixing, tile.classes, f"Inside {run}")
    print(f"{page}: what {run} does with one window")


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
