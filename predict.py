"""From two rasters to a class map, and to how sure the network is of it.

    python predict.py --run runs/NAME --image ortho.tif --dsm heights.tif --out map.tif
    python predict.py --image ortho.tif --dsm heights.tif --out map.png --stride 64 --blend cosine --flips
    python predict.py --image ortho.tif --dsm heights.tif --explain FOLDER --at 512,256    a page about one window
    python predict.py --image ortho.tif --dsm heights.tif --out map.tif --confidence sure.tif --probabilities classes.tif

The map is a PNG or a GeoTIFF, by the ending of --out: class indices with a colour table, laid where the image lies; see
`maps.py`. Rasters are read and the map is written strip by strip. `predict_strips` is what `evaluate.py` uses too.

The probabilities of a pixel are the softmax of the mean of its windows' logits. They are what the network says, and
networks are often surer than they are right.

Shapes: `H, W` pixels of the raster, `B` windows of a batch, `K` classes.
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from checkpoints import load_model, newest_run, pick_device
from console import Parser, Ticker, run_script
from data import LAYOUTS, MODALITIES, DataError, LoadedTile, Tile, height_range, image_bands, scaling_of, window_places
from explain import corner, write_explanation
from maps import Output, check_outputs, cut_out, without_data, write_maps
from mfnet import MIN_SIZE
from rasters import one_line, raster_bands
from scaling import TileScale
from slices import Decoded

Raster = np.ndarray | Decoded  # or whatever else slices like one of `slices.py`
ROWS = 64  # of a strip at most: what is computed from it is small beside the logits that wait


# ------------------------------------------------------------------------------------------------------- sliding window


@torch.inference_mode()
def predict_strips(
    model: nn.Module,
    image: Raster | None,
    dsm: Raster | None,
    window: int = 256,
    stride: int = 128,
    batch_size: int = 8,
    heights: tuple[float, float] | None = None,
    repeat_border: bool = False,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
    scale: TileScale | None = None,
    blend: str = "mean",
    flips: bool = False,
    probabilities: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The class map of `predict_tile` from top to bottom, in strips (n, W) uint8, each with the probabilities of the
    classes (K, n, W) float32 if they are asked for.

    Only the rows of logits that still wait for a window are kept, and of the rasters, which may slice like arrays, one
    window at a time is asked for: memory grows with the width, and not with the height.
    """
    rasters = [r for r in (image, dsm) if r is not None]
    H, W = rasters[0].shape[:2]
    scale = scale or TileScale(heights or (None if dsm is None else height_range(dsm)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    side = BLENDS[blend](window).to(device)  # (window,)
    share = side[:, None] * side  # (window, window)
    rows, columns = window_places(H, window, stride), window_places(W, window, stride)
    row_weights = weight_along(rows, side, H, repeat_border)  # (H,)
    column_weights = weight_along(columns, side, W, repeat_border)  # (W,)
    logits: Tensor | None = None  # (K, window, width) sums of the rows from the current window's top on
    for i, (top, row_weight) in enumerate(rows):
        for left_batch in _batches(columns, batch_size):
            boxes = [np.s_[top : top + window, left : left + window] for left, _ in left_batch]
            inputs = [_windows(r, boxes, window, scale).to(device) for r in rasters]
            with autocast(precision, device):
                out = _all_flips(model, inputs) if flips else model(*inputs).float()  # (B, K, window, window)
            if logits is None:
                logits = out.new_zeros(out.shape[1], window, max(W, window))
            for window_logits, (left, column_weight) in zip(out, left_batch):
                weight = row_weight * column_weight if repeat_border else 1
                logits[:, :, left : left + window] += weight * share * window_logits
        below = rows[i + 1][0] if i + 1 < len(rows) else H
        done = logits[:, : below - top, :W]
        for sums, weights in zip(done.split(ROWS, dim=1), row_weights[top:below].split(ROWS)):
            # The mean and the sum of a pixel's windows have the same largest class: the map has nothing to divide by.
            classes = sums.argmax(dim=0).byte().cpu().numpy()
            yield classes, softmax_of_mean(sums, weights, column_weights) if probabilities else None
        kept = window - (below - top)
        logits[:, :kept] = logits[:, below - top :].clone()
        logits[:, kept:] = 0
        if progress:
            progress(i + 1, len(rows))


def predict_tile(
    model: nn.Module,
    image: Raster | None,
    dsm: Raster | None,
    window: int = 256,
    stride: int = 128,
    batch_size: int = 8,
    heights: tuple[float, float] | None = None,
    **options,
) -> np.ndarray:
    """Class map (H, W) uint8 of a raster of any size, from overlapping windows whose logits are averaged (paper IV-B).

    image (H, W, 3), dsm (H, W) metres, both scaled by `scale`, by default the image over its type's range and the
    heights over `heights` (by default their own lowest and highest); a network of one modality gets the one that is
    not None. `repeat_border=True` counts the windows at the right and lower edge as often as the published code visits
    them (PAPER.md 3.5). `blend="cosine"` trusts the middle of a window more than its border; `flips` averages each
    window over its four reflections, at four times the work. `progress(done, all)` is called after each row of windows.
    These and the other `options` are those of `predict_strips`.
    """
    strips = predict_strips(model, image, dsm, window, stride, batch_size, heights, **options)
    return np.concatenate([classes for classes, _ in strips])


def _cosine(window: int) -> Tensor:
    """A bell (window,) that is 1 in the middle, and small but not 0 at the border."""
    return torch.sin((torch.arange(window) + 0.5) * torch.pi / window) ** 2


# How much a window counts along each of its sides, (window,): mean is the paper's.
BLENDS = {"mean": torch.ones, "cosine": _cosine}


def weight_along(places: list[tuple[int, int]], side: Tensor, length: int, repeat: bool) -> Tensor:
    """What the windows at `places` weigh together at each pixel of a row or column: (length,).

    A window weighs at (y, x) what its row weighs at y times what its column weighs at x, and every row of windows has the
    same columns. So the sum over all windows is a product as well, and needs no buffer of the raster's size.
    """
    total = side.new_zeros(max(length, len(side)))
    for start, times in places:
        total[start : start + len(side)] += (times if repeat else 1) * side
    return total[:length]


def softmax_of_mean(sums: Tensor, row_weights: Tensor, column_weights: Tensor) -> np.ndarray:
    """Probabilities (K, n, W) float32 out of the weighted sums of logits, and what was summed weighs: (n,) and (W,)."""
    return (sums / (row_weights[:, None] * column_weights)).softmax(dim=0).cpu().numpy()


def percent(probabilities: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8, 0 to 100."""
    return np.rint(100 * probabilities).astype(np.uint8)


def _all_flips(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The mean of what a model says of a batch and of its reflections, each turned back: (B, K, h, w)."""
    turns = ((), (-1,), (-2,), (-2, -1))
    return sum(model(*(x.flip(axes) for x in inputs)).float().flip(axes) for axes in turns) / 4


def _batches(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _windows(raster: Raster, boxes: list, window: int, scale: TileScale) -> Tensor:
    """The windows of one raster as a network input, (B, 3, w, w) or (B, w, w); reflected where the raster ends."""
    windows = []
    for box in boxes:
        array = scale.image_input(raster[box]) if len(raster.shape) == 3 else scale.height_input(raster[box], box)
        missing = [(0, 0)] * (array.ndim - 2) + [(0, window - n) for n in array.shape[-2:]]
        windows.append(np.pad(array, missing, mode="reflect"))
    return torch.from_numpy(np.stack(windows))


def store_frozen_weights(model: nn.Module, precision: str, device: torch.device) -> None:
    """In bf16 the frozen matrices are kept in bf16, not cast in every step; what is trained stays fp32, in place."""
    if resolve_precision(precision, device) != "bf16":
        return
    for p in model.parameters():
        if not p.requires_grad and p.ndim in (2, 4) and p.shape[0] > 1:
            p.data = p.data.bfloat16()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on CUDA devices that have it, else fp32."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def autocast(precision: str, device: torch.device):
    """The context in which a network runs in a precision: fp32, bf16 (mixed), or auto."""
    bf16 = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


# ---------------------------------------------------------------------------------------------------------------- script


def tile_of(args: Namespace, run: Path, settings: dict, classes: list) -> Tile:
    """The rasters of the command line as a tile that is read and scaled as the run's own were."""
    modalities = MODALITIES[settings["modalities"]]
    paths = {kind: path for kind, path in (("image", args.image), ("dsm", args.dsm)) if kind in modalities}
    for kind, path in paths.items():
        if path is None or not path.is_file():
            raise DataError(f"--{kind}: {'missing' if path is None else f'{path} is no file'}; {run} was trained on it")
    label = (args.out or args.explain).stem
    tile = Tile(label, paths, tuple((name, tuple(color)) for name, color in classes), scaling=scaling_of(settings))
    layout = LAYOUTS.get(settings["data"])
    if "image" in paths:
        tile.bands = image_bands(layout, settings.get("bands", ""), raster_bands(args.image))
    if layout is not None:
        tile.pixel = layout.pixel
        tile.height_unit = next((u for p, u in layout.dsm if args.dsm and Path(p).suffix == args.dsm.suffix.lower()), 1.0)
    return tile


def bands_of(strips: Iterator, confidence: bool, probabilities: bool) -> Iterator[np.ndarray]:
    """`predict_strips` as the bands (C, n, W) uint8 of what is written: classes, then in percent what is asked for."""
    for classes, shares in strips:
        sure = [percent(shares.max(axis=0, keepdims=True))] if confidence else []
        yield np.concatenate([classes[None], *sure, *([percent(shares)] if probabilities else [])])


def stride_of(args: Namespace, settings: dict) -> int:
    return settings["eval_stride"] if args.stride is None else args.stride


def write_prediction(
    args: Namespace, paths: dict[str, Path], model: nn.Module, settings: dict, tile: Tile, loaded: LoadedTile
) -> None:
    """Predicts the whole raster into the files of `paths` (by flag). Raises DataError where they cannot be written."""
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
    if loaded.image is not None:
        strips = cut_out(strips, without_data(args.image, loaded.image.raw))
    names = tuple(name for name, _ in tile.classes)
    bands = {"--out": ("class",), "--confidence": ("confidence",), "--probabilities": names}
    outputs = [Output(path, bands[flag], tile.classes if flag == "--out" else ()) for flag, path in paths.items()]
    try:
        write_maps(outputs, strips, loaded.size, tile.paths.get("image", args.dsm))
    except OSError as error:
        listed = " ".join(f"{flag} {path}" for flag, path in paths.items())
        raise DataError(f"{listed}: cannot be written ({one_line(error)})") from error


def main() -> None:
    parser = Parser(prog="predict.py", description="Predicts a class map from an image and a height raster.")
    parser.add_argument("--run", type=Path, help="folder of a run; by default the newest below runs/")
    parser.add_argument("--image", type=Path, help="image of three or more bands (TIFF, PNG, JPEG)")
    parser.add_argument("--dsm", type=Path, help="height raster of the same size, or a GeoTIFF on another grid")
    parser.add_argument("--out", type=Path, help="class map to write: .png or .tif")
    parser.add_argument("--confidence", type=Path, metavar="FILE", help="write how sure the map is too: .png or .tif")
    parser.add_argument("--probabilities", type=Path, metavar="FILE", help="write a band for every class too: .tif")
    parser.add_argument("--explain", type=Path, metavar="FOLDER", help="write a page about what happens to one window")
    parser.add_argument("--at", type=corner, metavar="X,Y", help="upper left pixel of that window; else in the middle")
    parser.add_argument("--blend", choices=list(BLENDS), default="mean", help="how overlapping windows are averaged")
    parser.add_argument("--flips", action="store_true", help="average each window over its four reflections")
    parser.add_argument("--stride", type=int, help="pixels between windows; by default as the run was scored")
    parser.add_argument("--weights", help="where SAM's weights are now; by default as the run found them")
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
    model, settings, classes = load_model(run / "model.pt", args.weights, Ticker("fetching SAM's weights, bytes"))
    store_frozen_weights(model, settings["precision"], device)
    tile = tile_of(args, run, settings, classes)
    loaded = tile.open(MODALITIES[settings["modalities"]])
    if min(loaded.size) < MIN_SIZE:
        H, W = loaded.size
        raise DataError(f"{args.image or args.dsm}: {W} x {H} pixels are too few; give a raster of {MIN_SIZE} and more")
    for note in tile.notes:
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
        print(f"{listed}: {size} by {run}, windows of {settings['crop']}, stride {stride_of(args, settings)}")


if __name__ == "__main__":
    run_script(main)
