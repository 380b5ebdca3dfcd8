"""A network over rasters of any size, window by window.

`predict_windows` yields a class map from top to bottom; `predict_strips` is it of two arrays, and
`predict_tile` is the same as one array. The probabilities of a pixel are the softmax of the mean of
its windows' logits.

Shapes: `H, W` pixels of the raster, `B` windows of a batch, `K` classes.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from engine.console import Mistake
from engine.device import autocast
from engine.settings import Settings
from geodata.crops import window_places
from geodata.scaling import TileScale, height_range
from geodata.tiles import LoadedTile

Raster = Any  # whatever has a shape and slices like an array
ROWS = 64  # of a strip at most: what is computed from it is small beside the logits that wait


class NotFinite(Mistake):
    """A network's outputs are NaN or infinite."""

    status = 1


@torch.inference_mode()
def predict_windows(
    model: nn.Module,
    tile: LoadedTile,
    names: tuple[str, ...],
    window: int,
    stride: int,
    batch_size: int = 8,
    repeat_border: bool = False,
    precision: str = "fp32",
    progress: Callable[[int, int], None] | None = None,
    blend: str = "mean",
    flips: bool = False,
    probabilities: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The class map of a tile of any size, from overlapping windows whose logits are averaged
    (paper IV-B): from top to bottom in strips (n, W) uint8, each with the probabilities of the
    classes (K, n, W) float32 if they are asked for.

    The network is given the tile's rasters of these `names`. `repeat_border` counts the windows at
    the right and lower edge as often as the published code visits them. `blend="cosine"` trusts the
    middle of a window more than its border; `flips` averages each window over its four reflections,
    at four times the work. `progress(done, all)` is called after each row of windows.

    Only the rows of logits that still wait for a window are kept, and of the rasters, which may
    slice like arrays, one window at a time is asked for: memory grows with the width, and not with
    the height. Raises NotFinite where the network's outputs are no numbers."""
    H, W = tile.size
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    weight_1d = BLENDS[blend](window).to(device)  # (window,)
    weight_2d = weight_1d[:, None] * weight_1d  # (window, window)
    rows, columns = window_places(H, window, stride), window_places(W, window, stride)
    if not repeat_border:
        rows, columns = ([(start, 1) for start, _ in places] for places in (rows, columns))
    row_weights = weight_along(rows, weight_1d, H)  # (H,)
    column_weights = weight_along(columns, weight_1d, W)  # (W,)
    # (K, window, width) sums of the rows from the current window's top on
    logits: Tensor | None = None
    for i, (top, row_times) in enumerate(rows):
        for first in range(0, len(columns), batch_size):
            batch = columns[first : first + batch_size]
            boxes = [np.s_[top : top + window, left : left + window] for left, _ in batch]
            inputs = [_windows(tile, name, boxes, window).to(device) for name in names]
            with autocast(precision, device):  # -> (B, K, window, window)
                out = _all_flips(model, inputs) if flips else model(*inputs).float()
            if logits is None:
                logits = out.new_zeros(out.shape[1], window, max(W, window))
            for window_logits, (left, times) in zip(out, batch):
                weight = row_times * times * weight_2d
                logits[:, :, left : left + window] += weight * window_logits
        below = rows[i + 1][0] if i + 1 < len(rows) else H
        done = logits[:, : below - top, :W]
        if not done.isfinite().all():  # their largest would be class 0, without a word
            raise NotFinite(
                "the network's outputs are no numbers (NaN or infinity); its weights are not to be "
                "used: train again with a smaller --lr, or --clip 1"
            )
        for sums, weights in zip(done.split(ROWS, dim=1), row_weights[top:below].split(ROWS)):
            # The mean and the sum of a pixel's windows have the same largest class: the map has
            # nothing to divide by.
            classes = sums.argmax(dim=0).byte().cpu().numpy()
            yield classes, softmax_of_mean(sums, weights, column_weights) if probabilities else None
        kept = window - (below - top)
        logits[:, :kept] = logits[:, below - top :].clone()
        logits[:, kept:] = 0
        if progress:
            progress(i + 1, len(rows))


def predict_strips(
    model: nn.Module,
    image: Raster | None,
    dsm: Raster | None,
    window: int = 256,
    stride: int = 128,
    batch_size: int = 8,
    heights: tuple[float, float] | None = None,
    **options,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """`predict_windows` of image (H, W, 3), scaled over its type's range, and dsm (H, W) metres,
    over `heights` (by default their own lowest and highest); a network of one modality gets the one
    that is not None."""
    scale = TileScale(heights or (None if dsm is None else height_range(dsm)))
    tile = LoadedTile("", image, dsm, None, scale)
    names = tuple(name for name in ("image", "dsm") if getattr(tile, name) is not None)
    return predict_windows(model, tile, names, window, stride, batch_size, **options)


def predict_tile(
    model: nn.Module, image: Raster | None, dsm: Raster | None, *sizes, **options
) -> np.ndarray:
    """The class map (H, W) uint8 of `predict_strips`, of the same arguments, as one array."""
    strips = predict_strips(model, image, dsm, *sizes, **options)
    return np.concatenate([classes for classes, _ in strips])


def predict_loaded(
    model: nn.Module, tile: LoadedTile, s: Settings, stride: int, **options
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """`predict_windows` of a tile by the network of a run, which read and scaled it."""
    return predict_windows(model, tile, s.rasters, s.crop, stride, precision=s.precision, **options)


def _cosine(window: int) -> Tensor:
    """A bell (window,) that is 1 in the middle, and small but not 0 at the border."""
    return torch.sin((torch.arange(window) + 0.5) * torch.pi / window) ** 2


# How much a window counts along each of its sides, (window,): mean is the paper's.
BLENDS = {"mean": torch.ones, "cosine": _cosine}


def weight_along(places: list[tuple[int, int]], weight_1d: Tensor, length: int) -> Tensor:
    """What the windows at `places` weigh together at each pixel of a row or column: (length,).

    A window weighs at (y, x) what its row weighs at y times what its column weighs at x, and every
    row of windows has the same columns. So the sum over all windows is a product as well, and needs
    no buffer of the raster's size."""
    total = weight_1d.new_zeros(max(length, len(weight_1d)))
    for start, times in places:
        total[start : start + len(weight_1d)] += times * weight_1d
    return total[:length]


def softmax_of_mean(sums: Tensor, row_weights: Tensor, column_weights: Tensor) -> np.ndarray:
    """Weighted sums of logits, and the sums of weights (n,) and (W,) -> (K, n, W) float32."""
    return (sums / (row_weights[:, None] * column_weights)).softmax(dim=0).cpu().numpy()


def percent(probabilities: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8, 0 to 100."""
    return np.rint(100 * probabilities).astype(np.uint8)


def _all_flips(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """The mean (B, K, h, w) over a batch and its reflections, each output turned back."""
    turns = ((), (-1,), (-2,), (-2, -1))
    return sum(model(*(x.flip(axes) for x in inputs)).float().flip(axes) for axes in turns) / 4


def _windows(tile: LoadedTile, name: str, boxes: list, window: int) -> Tensor:
    """Windows as a network input, (B, C, w, w) or (B, w, w); reflected where the raster ends."""
    windows = []
    for box in boxes:
        array = tile.input(name, box)
        missing = [(0, 0)] * (array.ndim - 2) + [(0, window - n) for n in array.shape[-2:]]
        windows.append(np.pad(array, missing, mode="reflect"))
    return torch.from_numpy(np.stack(windows))
