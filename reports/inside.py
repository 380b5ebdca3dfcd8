"""Looking inside: a page about what a trained network does with one window.

    python predict.py --run runs/NAME --image ortho.tif --dsm heights.tif --explain FOLDER [--at
    X,Y]

The levels of the fusion come from the network's own modules, called one after the other as
`MFNet.forward` calls them; nothing is attached to the network.

Shapes: `H, W` pixels of the window, `M` modalities, `C` 256 channels, `h, w` places of a level.
"""

from __future__ import annotations

import base64
import html
import io
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dfm import SumFusion
from engine.files import replace_atomically
from geodata.labels import labels_to_colors
from geodata.layouts import Classes
from geodata.rasters import DataError, one_line
from geodata.tiles import LoadedTile
from mfnet import SIZE_STEP, MFNet, round_up
from reports.report import page, shade_heights, table, visible

MORE, LESS = (
    np.array((27, 120, 55)),
    np.array((118, 42, 131)),
)  # than an equal share, which is white


COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")  # of the chart's lines


# --------------------------------------------------------------------------------------- the inside


@dataclass
class Level:
    """One level of the fusion of one window."""

    stride: int  # pixels of the window to one place of the level
    parts: list[Tensor]  # M times (C, h, w): what is added up
    channel_weights: list[
        float
    ]  # M times the mean of the squeeze-excitation's weights, in (0, 1); [] without one

    @property
    def fused(self) -> Tensor:
        """(C, h, w), what the decoder gets."""
        return sum(self.parts)


@torch.inference_mode()
def look_inside(model: MFNet, *rasters: Tensor) -> tuple[list[Level], np.ndarray]:
    """One window's rasters as in `MFNet.forward`, with a batch of 1 -> levels, finest first, and
    classes (H, W) uint8.
    """
    H, W = rasters[0].shape[-2:]
    padded = round_up(H, SIZE_STEP), round_up(W, SIZE_STEP)
    maps, levels = model.encode(*rasters), []
    if isinstance(model.fusion, SumFusion):
        levels.append(Level(padded[0] // maps[0].shape[2], [x[0] for x in maps], []))
    else:
        pyramids = zip(*(pyramid(x) for pyramid, x in zip(model.fusion.pyramids, maps)))
        for fuse, scales in zip(model.fusion.levels, pyramids):
            parts = [se(x)[0] for se, x in zip(fuse.se, scales)]
            weights = [
                se.fc(x.mean(dim=(2, 3), keepdim=True)).mean().item()
                for se, x in zip(fuse.se, scales)
            ]
            levels.append(Level(padded[0] // parts[0].shape[1], parts, weights))
    logits = model.decoder([level.fused[None] for level in levels], padded)[0, :, :H, :W]
    return levels, logits.argmax(dim=0).byte().cpu().numpy()


def shares(parts: list[Tensor]) -> np.ndarray:
    """M parts (C, h, w) of a level -> (M, h, w) in 0 to 1, which sum to 1: the norm of a modality's
    part over the sum of all norms; equal shares where nothing is added.
    """
    norms = (
        torch.stack([part.float().norm(dim=0) for part in parts]).cpu().numpy().astype(np.float64)
    )
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


def learned_mixing(model: MFNet) -> dict[str, list[list[float]]]:
    """The layers of a block that mix -> for each block the M weights w of `tuners.mix_modalities`;
    {} if none does.
    """
    found: dict[str, list[list[float]]] = {}
    for block in model.image_encoder.blocks:
        for name, weights in block.named_parameters():
            layer, _, last = name.rpartition(".")
            if last == "mixing":
                found.setdefault(layer, []).append(weights.tolist())
    return found


# ----------------------------------------------------------------------------------------- the page


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


def write_explanation(
    folder: Path,
    model: MFNet,
    tile: LoadedTile,
    window: int,
    at: tuple[int, int] | None,
    classes: Classes,
    run: str,
) -> Path:
    """Writes explain.html about one window of a tile into `folder`, which is made. Raises DataError
    if that cannot be.
    """
    box = place_window(tile.size, window, at)
    cut = replace(
        tile,
        **{
            kind: raster[box]
            for kind in ("image", "dsm")
            if (raster := getattr(tile, kind)) is not None
        },
    )
    inputs = {}
    if cut.image is not None:
        inputs["image"] = cut.scale.image_input(cut.image)
    if cut.dsm is not None:
        inputs["height"] = cut.scale.height_input(cut.dsm, box)
    device = next(model.parameters()).device
    levels, pred = look_inside(
        model, *(torch.from_numpy(array)[None].to(device) for array in inputs.values())
    )
    (H, W), (rows, columns), names = pred.shape, box, list(inputs)
    note = f"A window of {W} x {H} pixels from column {columns.start} and row {rows.start} on."
    sections = [
        ("The window", window_section(cut, pred, classes)),
        ("What the decoder gets", feature_section(levels, pred.shape)),
        ("What each modality adds", share_section(levels, names, pred.shape)),
        ("How modalities mix inside the encoder", mixing_section(model, names)),
    ]
    text, path = page(f"Inside {run}", note, sections), folder / "explain.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"--explain {folder}: cannot be written ({one_line(error)}); give another folder"
        ) from error
    return path


def window_section(cut: LoadedTile, pred: np.ndarray, classes: Classes) -> str:
    figures = []
    if cut.image is not None:
        figures.append(figure("image", visible(cut)))
    if cut.dsm is not None:
        figures.append(
            figure(f"height, {cut.dsm.min():.1f} to {cut.dsm.max():.1f} m", shade_heights(cut.dsm))
        )
    figures.append(
        figure("predicted classes", labels_to_colors(pred, [color for _, color in classes]))
    )
    counts = np.bincount(pred.ravel(), minlength=len(classes))
    legend = ""
    for (name, color), n in zip(classes, counts):
        if n:
            swatch = f'<span style="background:rgb{tuple(color)}"></span>'
            legend += (
                f'<span class="key">{swatch}{html.escape(name)} {100 * n / pred.size:.1f} %</span> '
            )
    return f'<div class="figures">{"".join(figures)}</div><p class="note">{legend}</p>'


def feature_section(levels: list[Level], size: tuple[int, int]) -> str:
    words = (
        f"The fused features, {len(levels[0].fused)} numbers at each place. The three directions in which they vary most "
        "(principal components) are red, green and blue: places of one colour are alike to the network. Each picture has "
        "directions of its own, so colours do not compare from one to the next."
    )
    if len(levels) > 1:
        words += " Chequers at strides 4 and 8 come from the transposed convolutions that enlarge the encoder's map."
    figures = []
    for level in levels:
        pixels = enlarge(principal_colors(level.fused.float().cpu().numpy()), level.stride, size)
        figures.append(
            figure(
                f"stride {level.stride}: {level.fused.shape[2]} x {level.fused.shape[1]}", pixels
            )
        )
    return f'<p>{words}</p><div class="figures">{"".join(figures)}</div>'


def share_section(levels: list[Level], names: list[str], size: tuple[int, int]) -> str:
    words, weighed = "There is one modality: all of it is its own.", bool(levels[0].channel_weights)
    if len(names) > 1:
        words = (
            "A level is the sum of one part from each modality. A modality's share is the length of its part over the "
            "sum of the lengths: green where it adds more than an equal share, purple where less, white where just "
            "that. It tells how much is added, and not how much the classes depend on it."
        )
    if weighed:
        words += " The channel weight is the mean of the squeeze-excitation's weights of a modality's channels."
    rows, figures = [], []
    for level in levels:
        by_modality = shares(level.parts)
        means = [share.mean() for share in by_modality]
        rows.append(
            [str(level.stride), *(f"{value:.3f}" for value in (*means, *level.channel_weights))]
        )
        for name, share in zip(names, by_modality) if len(names) > 1 else ():
            pixels = enlarge(tint(share, 1 / len(names)), level.stride, size)
            caption = f"stride {level.stride}, {name}: {share.mean():.2f}, from {share.min():.2f} to {share.max():.2f}"
            figures.append(figure(caption, pixels))
    head = ["stride", *(f"share of {name}" for name in names)]
    head += [f"channel weight of {name}" for name in names] if weighed else []
    return f'<p>{words}</p><div class="figures">{"".join(figures)}</div>{table(head, rows)}'


def mixing_section(model: MFNet, names: list[str]) -> str:
    found, tuner = learned_mixing(model), model.image_encoder.tuner
    if not found:
        off = (
            "was trained with --no-mixing"
            if tuner in ("adapter", "lora")
            else "has no weights for it"
        )
        why = f"the tuner of this run, {tuner}, {off}; the modalities meet in the fusion alone"
        return f"<p>Nothing is mixed: {why if len(names) > 1 else 'there is one modality'}.</p>"
    words = (
        "What the tuner adds to the MLP of a block is, for each modality, w times its own update and 1 &minus; w times "
        "the mean of the others'. Training starts at w = 0.5; above it a modality keeps more of its own."
    )
    lines = {}
    for layer, blocks in found.items():
        for m, name in enumerate(names):
            lines[f"{layer.split('.')[-1]} {name}".strip()] = [weights[m] for weights in blocks]
    rows = [
        [str(block), *(f"{w:.3f}" for w in values)]
        for block, values in enumerate(zip(*lines.values()))
    ]
    return f'<p>{words}</p><div class="curves">{chart(lines)}{table(["block", *lines], rows)}</div>'


def tint(share: np.ndarray, equal: float) -> np.ndarray:
    """(h, w) in 0 to 1 -> (h, w, 3) uint8: LESS at 0, white at an equal share, which is below 1,
    MORE at 1.
    """
    strength = np.interp(share, (0, equal, 1), (-1, 0, 1))[..., None]
    return (
        (255 + np.abs(strength) * (np.where(strength > 0, MORE, LESS) - 255))
        .round()
        .astype(np.uint8)
    )


def enlarge(pixels: np.ndarray, stride: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) -> (H, W, 3): each place as the square of pixels that it stands for, cut where the
    window ends.
    """
    return pixels.repeat(stride, axis=0).repeat(stride, axis=1)[: size[0], : size[1]]


def figure(caption: str, pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a picture inside the page, with its caption."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    code, text = base64.b64encode(buffer.getvalue()).decode(), html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{code}"><figcaption>{text}</figcaption></figure>'


def chart(lines: dict[str, list[float]]) -> str:
    """The weights of each line against the block, as inline SVG with 0.5 in the middle."""
    width, height, left, top, bottom, right = 480, 220, 60, 30, 195, 465
    reach = max(0.05, *(abs(w - 0.5) for values in lines.values() for w in values))
    drawn = [
        f'<path d="M{left} {top}V{bottom}H{right}M{left} {(top + bottom) / 2}H{right}" fill="none" stroke="#bbb"/>'
    ]
    for y, label in ((top, 0.5 + reach), ((top + bottom) / 2, 0.5), (bottom, 0.5 - reach)):
        drawn.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{label:.2f}</text>')
    for i, (name, values) in enumerate(lines.items()):
        color, step = COLORS[i % len(COLORS)], (right - left) / max(len(values) - 1, 1)
        xy = [
            (left + step * k, bottom - (w - 0.5 + reach) / (2 * reach) * (bottom - top))
            for k, w in enumerate(values)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in xy]
        start = left + i * (right - left) / len(lines)
        drawn.append(
            f'<text x="{start:.0f}" y="16" fill="{color}" font-weight="600">{html.escape(name)}</text>'
        )
    drawn.append(f'<text x="{left}" y="{height - 8}">block 0</text>')
    drawn.append(f'<text x="{right}" y="{height - 8}" text-anchor="end">{len(values) - 1}</text>')
    label = "mixing weights by block"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}" font-size="12" fill="#444">'
        f"{''.join(drawn)}</svg>"
    )
