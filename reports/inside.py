"""Looking inside: a page about what a trained network does with one window.

The page is made of what the network's own forward pass keeps on request (`MFNet.forward`'s `seen`):
nothing is computed here but pictures and means.

Shapes: `H, W` pixels of the window, `M` modalities, `C` channels, `h, w` places of a level."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from geodata.labels import labels_to_colors
from geodata.layouts import Classes
from geodata.rasters import DataError, one_line
from geodata.tiles import LoadedTile
from reports.page import figure, legend, line_chart, note, table, write_page
from reports.panels import raster_pictures

MORE, LESS = np.array((27, 120, 55)), np.array((118, 42, 131))  # than an equal part, in white


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
    h, w = min(window, H), min(window, W)
    x, y = at if at is not None else ((W - w) // 2, (H - h) // 2)
    if not (0 <= x < W and 0 <= y < H):
        raise DataError(f"--at {x},{y}: outside of the raster; give 0,0 to {W - 1},{H - 1}")
    left, top = min(x, W - w), min(y, H - h)
    return np.s_[top : top + h, left : left + w]


def cut_window(tile: LoadedTile, box: tuple[slice, slice]) -> LoadedTile:
    """The tile's rasters inside the box, as arrays."""
    rasters = {"image": tile.image, "dsm": tile.dsm}
    return replace(tile, **{k: raster[box] for k, raster in rasters.items() if raster is not None})


# ------------------------------------------------------------------------------------- the pictures


def contributions(parts: list[np.ndarray]) -> np.ndarray:
    """M parts (C, h, w) of a level -> (M, h, w) in 0 to 1, which sum to 1: the norm of a modality's
    part over the sum of all norms; equal where nothing is added.
    """
    norms = np.stack([np.linalg.norm(part.astype(np.float64), axis=0) for part in parts])
    total = norms.sum(axis=0)
    return np.where(total > 0, norms / np.where(total > 0, total, 1), 1 / len(parts))


def principal_colors(features: np.ndarray) -> np.ndarray:
    """Features (C, h, w) -> (h, w, 3) uint8: the first three principal components of the places as
    red, green, blue.

    Each component is stretched from its 1st to its 99th percentile. Its sign: of the places that
    lie farthest from the mean, the first is bright. A component that does not vary (constant
    features, few places or channels) is grey, 128."""
    C, h, w = features.shape
    x = features.reshape(C, h * w).T.astype(np.float64)
    rounding = 1e-6 * np.linalg.norm(x)
    x = x - x.mean(axis=0)
    _, axes = np.linalg.eigh(x.T @ x)  # (C, C), the longest last
    colors = np.full((h * w, 3), 128, np.uint8)
    for i, scores in enumerate(x @ axis for axis in axes.T[::-1][:3]):
        if np.linalg.norm(scores) > rounding:
            distance = np.abs(scores)
            scores = scores * np.sign(scores[np.argmax(distance >= (1 - 1e-6) * distance.max())])
            low, high = np.percentile(scores, (1, 99))
            colors[:, i] = np.clip(255 * (scores - low) / max(high - low, rounding), 0, 255).round()
    return colors.reshape(h, w, 3)


def tint(contribution: np.ndarray, equal: float) -> np.ndarray:
    """(h, w) in 0 to 1 -> (h, w, 3) uint8: white at an equal contribution, MORE or LESS in full
    where it lies farthest from that.
    """
    offset = contribution - equal
    strength = (offset / max(np.abs(offset).max(), 1e-9))[..., None]
    colors = 255 + np.abs(strength) * (np.where(strength > 0, MORE, LESS) - 255)
    return colors.round().astype(np.uint8)


def enlarge(pixels: np.ndarray, size: tuple[int, int]) -> tuple[int, np.ndarray]:
    """(h, w, 3) -> stride, (H, W, 3): each place as the square of pixels that it stands for, cut
    where the window ends.

    A level's places cover the window padded to less than twice its size, and strides are powers
    of two: the stride is the smallest one that covers it."""
    stride = 2 ** max(0, math.ceil(math.log2(size[0] / len(pixels))))
    squares = pixels.repeat(stride, axis=0).repeat(stride, axis=1)
    return stride, squares[: size[0], : size[1]]


# ----------------------------------------------------------------------------------------- the page


def write_inside(
    folder: Path,
    cut: LoadedTile,
    box: tuple[slice, slice],
    seen: dict,
    mixing: dict[str, list[list[float]]],
    classes: Classes,
    title: str,
) -> Path:
    """Writes explain.html about the window `box` of a tile, `cut`, into `folder`, which is made.

    `seen` holds `levels`, `fused` and `logits` of a forward pass on the window, with a batch of 1;
    `mixing` the M mixing weights of each block, by the layer that mixes, {} where none does. Raises
    DataError if the page cannot be written.
    """
    names = [name for name, r in (("image", cut.image), ("height", cut.dsm)) if r is not None]
    levels = [[as_array(part) for part in level["parts"]] for level in seen["levels"]]
    gates = [[as_array(g).mean() for g in level["gates"]] for level in seen["levels"]]
    fused = [as_array(features) for features in seen["fused"]]
    pred = as_array(seen["logits"]).argmax(axis=0).astype(np.uint8)
    (H, W), (rows, columns) = pred.shape, box
    where = f"A window of {W} x {H} pixels from column {columns.start} and row {rows.start} on."
    sections = {
        "": note(where),
        "The window": window_section(cut, pred, classes),
        "What the decoder gets": feature_section(fused, pred.shape),
        "What each modality adds": contribution_section(levels, gates, names, pred.shape),
        "How modalities mix inside the encoder": mixing_section(mixing, names),
    }
    path = folder / "explain.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_page(path, title, sections)
    except OSError as error:
        reason = f"cannot be written ({one_line(error)})"
        raise DataError(f"--out {folder}: {reason}; give another folder") from error
    return path


def as_array(tensor) -> np.ndarray:
    """The first of a batch, as float32."""
    return tensor[0].detach().float().cpu().numpy()


def figures(pictures: dict[str, np.ndarray]) -> str:
    drawn = (figure(caption, Image.fromarray(pixels)) for caption, pixels in pictures.items())
    return f'<div class="figures">{"".join(drawn)}</div>'


def window_section(cut: LoadedTile, pred: np.ndarray, classes: Classes) -> str:
    pictures = raster_pictures(cut)
    pictures["predicted classes"] = labels_to_colors(pred, [color for _, color in classes])
    counts = np.bincount(pred.ravel(), minlength=len(classes))
    present = {
        f"{name} {100 * count / pred.size:.1f} %": f"rgb{tuple(color)}"
        for (name, color), count in zip(classes, counts)
        if count
    }
    return figures(pictures) + legend(present)


def feature_section(fused: list[np.ndarray], size: tuple[int, int]) -> str:
    words = (
        f"The fused features, {len(fused[0])} numbers at each place. The three directions in which "
        "they vary most (principal components) are red, green and blue: places of one colour are "
        "alike to the network. Each picture has directions of its own, so colours do not compare "
        "from one to the next."
    )
    if len(fused) > 1:
        words += (
            " Chequers at strides 4 and 8 come from the transposed convolutions that enlarge the "
            "encoder's map."
        )
    pictures = {}
    for features in fused:
        stride, pixels = enlarge(principal_colors(features), size)
        pictures[f"stride {stride}: {features.shape[2]} x {features.shape[1]}"] = pixels
    return f"<p>{words}</p>{figures(pictures)}"


def contribution_section(
    levels: list[list[np.ndarray]], gates: list, names: list[str], size: tuple[int, int]
) -> str:
    """The contributions in a table, and in a map a level for each modality but the last one, which
    has what the others leave.
    """
    words = "There is one modality: all of it is its own."
    if len(names) > 1:
        words = (
            "A level is the sum of one part from each modality. A modality's contribution is the "
            "length of its part over the sum of the lengths: green where it adds more than an "
            "equal part, purple where less, white where just that; each map is stretched to its "
            "own ends. It tells how much is added, and not how much the classes depend on it."
        )
    if any(gates):
        words += (
            " The channel weight is the mean of the squeeze-and-excitation's gates of a "
            "modality's channels."
        )
    rows, pictures = [], {}
    for parts, means in zip(levels, gates):
        found = contributions(parts)
        stride = enlarge(found[0], size)[0]
        numbers = (*found.mean(axis=(1, 2)), *means)
        rows.append([str(stride), *(f"{number:.3f}" for number in numbers)])
        for name, one in zip(names[:-1], found):
            ends = f"from {one.min():.2f} to {one.max():.2f}"
            caption = f"stride {stride}, {name}: {one.mean():.2f}, {ends}"
            pictures[caption] = enlarge(tint(one, 1 / len(names)), size)[1]
    head = ["stride", *(f"contribution of {name}" for name in names)]
    head += [f"channel weight of {name}" for name in names] if any(gates) else []
    return f"<p>{words}</p>{figures(pictures)}{table(head, rows)}"


def mixing_section(mixing: dict[str, list[list[float]]], names: list[str]) -> str:
    if not mixing or len(names) == 1:
        why = "the tuner of this run has no mixing weights; the modalities meet in the fusion alone"
        return f"<p>Nothing is mixed: {why if len(names) > 1 else 'there is one modality'}.</p>"
    words = (
        "What the tuner adds to the MLP of a block is, for each modality, w times its own update "
        "and 1 &minus; w times the mean of the others'. Training starts at w = 0.5; above it a "
        "modality keeps more of its own."
    )
    lines = {}
    for layer, blocks in mixing.items():
        for m, name in enumerate(names):
            lines[f"{layer.split('.')[-1]} {name}".strip()] = [weights[m] for weights in blocks]
    reach = max(0.05, *(abs(w - 0.5) for values in lines.values() for w in values))
    points = {name: list(enumerate(values)) for name, values in lines.items()}
    drawn = line_chart("mixing weights", points, 0.5 - reach, 0.5 + reach, "block")
    columns = zip(*lines.values())
    rows = [[str(block), *(f"{w:.3f}" for w in values)] for block, values in enumerate(columns)]
    return f'<p>{words}</p><div class="charts">{drawn}{table(["block", *lines], rows)}</div>'
