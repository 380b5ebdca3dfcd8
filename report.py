"""Pictures of a run: one panel per tile, image | height | truth | prediction | errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replace_atomically
from data import LoadedTile, image_input, labels_to_colors

MAX_SIDE = 640  # pixels: larger tiles are shown smaller
GAP, HEADER, LEGEND = 8, 20, 24  # pixels
INK, PAPER = (40, 40, 40), (255, 255, 255)
WRONG, RIGHT, UNSCORED = (214, 39, 40), (232, 232, 232), (0, 0, 0)

Classes = tuple[tuple[str, tuple[int, int, int]], ...]


def save_panel(path: Path, tile: LoadedTile, pred: np.ndarray, classes: Classes) -> None:
    """Writes the panel of a tile as a PNG."""
    panel = tile_panel(tile, pred, classes)
    replace_atomically(path, lambda p: panel.save(p, format="PNG"))


def tile_panel(tile: LoadedTile, pred: np.ndarray, classes: Classes) -> Image.Image:
    """The tile's rasters, labels (H, W), prediction (H, W) and errors side by side, with a legend of the classes."""
    palette = [color for _, color in classes]
    columns: list[tuple[str, np.ndarray, Image.Resampling]] = []
    if tile.image is not None:
        pixels = (image_input(tile.image).transpose(1, 2, 0) * 255).astype(np.uint8)
        columns.append(("image", pixels, Image.Resampling.BOX))
    if tile.dsm is not None:
        low, high = tile.heights
        columns.append((f"height, {low:.1f} to {high:.1f} m", shade_heights(tile.dsm), Image.Resampling.BOX))
    if tile.labels is not None:
        columns.append(("truth", labels_to_colors(tile.labels, palette), Image.Resampling.NEAREST))
    columns.append(("prediction", labels_to_colors(pred, palette), Image.Resampling.NEAREST))
    if tile.labels is not None:
        columns.append(("errors (red)", error_map(pred, tile.labels), Image.Resampling.NEAREST))
    return assemble(columns, classes)


def assemble(columns: list[tuple[str, np.ndarray, Image.Resampling]], classes: Classes) -> Image.Image:
    H, W = columns[0][1].shape[:2]
    shrink = min(1.0, MAX_SIDE / max(H, W))
    h, w = max(1, round(H * shrink)), max(1, round(W * shrink))
    font = ImageFont.load_default()
    step = max(w, 110) + GAP  # wide enough for the words above a narrow tile
    names = [name for name, _ in classes]
    legend_width = sum(30 + int(font.getlength(name)) for name in names) + GAP
    canvas = Image.new("RGB", (max(GAP + step * len(columns), legend_width), HEADER + h + LEGEND), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (title, pixels, resampling) in enumerate(columns):
        left = GAP + i * step
        draw.text((left, 4), title, fill=INK, font=font)
        canvas.paste(Image.fromarray(pixels).resize((w, h), resampling), (left, HEADER))
    left = GAP
    for name, color in classes:
        draw.rectangle((left, HEADER + h + 7, left + 12, HEADER + h + 18), fill=color, outline=INK)
        draw.text((left + 17, HEADER + h + 6), name, fill=INK, font=font)
        left += 30 + int(font.getlength(name))
    return canvas


def shade_heights(dsm: np.ndarray) -> np.ndarray:
    """(H, W) metres -> (H, W, 3) grey: bright is high, with a light from the upper left for the relief."""
    low, high = np.percentile(dsm, (1, 99))
    level = np.clip((dsm - low) / max(high - low, 1e-6), 0, 1)
    dy, dx = np.gradient(dsm) if min(dsm.shape) > 1 else (np.zeros_like(dsm), np.zeros_like(dsm))
    slope = -(dx + dy) * 0.7
    relief = slope / np.sqrt(1 + slope**2)
    grey = np.clip(40 + 180 * level + 45 * relief, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def error_map(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H, W, 3): wrong pixels red, right ones light, unscored ones black."""
    out = np.where((pred == truth)[..., None], np.uint8(RIGHT), np.uint8(WRONG))
    out[truth == 255] = UNSCORED
    return out
