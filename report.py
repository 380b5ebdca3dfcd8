"""Pictures of a run: one panel per tile, image | height | truth | prediction | errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from checkpoints import replace_atomically
from data import LoadedTile, height_range, labels_to_colors

MAX_SIDE = 640  # pixels: larger tiles are shown smaller
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
        pixels = visible(tile)
        columns.append(("image", pixels, Image.Resampling.BOX))
    if tile.dsm is not None:
        low, high = height_range(tile.dsm)
        columns.append((f"height, {low:.1f} to {high:.1f} m", shade_heights(tile.dsm), Image.Resampling.BOX))
    if tile.labels is not None:
        columns.append(("truth", labels_to_colors(tile.labels, palette), Image.Resampling.NEAREST))
    columns.append(("prediction", labels_to_colors(pred, palette), Image.Resampling.NEAREST))
    if tile.labels is not None:
        columns.append(("errors (red)", error_map(pred, tile.labels), Image.Resampling.NEAREST))
    return assemble(columns, classes)


def assemble(columns: list[tuple[str, np.ndarray, Image.Resampling]], classes: Classes) -> Image.Image:
    """Puts the columns side by side, their titles above, the legend of the classes below."""
    H, W = columns[0][1].shape[:2]
    shrink = min(1.0, MAX_SIDE / max(H, W))
    h, w = max(1, round(H * shrink)), max(1, round(W * shrink))
    size = min(max(w // 24, 11), 22)  # pixels of a line of text: readable when a wide panel is shown smaller
    font = ImageFont.load_default(size)
    gap, line = size // 2 + 2, 2 * size
    step = max(w, max(round(font.getlength(title)) for title, _, _ in columns)) + gap
    entries = [(name, color, round(font.getlength(name))) for name, color in classes]
    legend = gap + sum(length + 3 * size for _, _, length in entries)
    canvas = Image.new("RGB", (max(gap + step * len(columns), legend), h + 2 * line), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (title, pixels, resampling) in enumerate(columns):
        draw.text((gap + i * step, line // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(Image.fromarray(pixels).resize((w, h), resampling), (gap + i * step, line))
        draw.rectangle((gap + i * step - 1, line - 1, gap + i * step + w, line + h), outline=INK)
    left, middle = gap, line + h + line // 2
    for name, color, length in entries:
        draw.rectangle((left, middle - size // 2, left + size, middle + size // 2), fill=color, outline=INK)
        draw.text((left + size + gap // 2, middle), name, fill=INK, font=font, anchor="lm")
        left += length + 3 * size
    return canvas


def visible(tile: LoadedTile) -> np.ndarray:
    """(H, W, 3) uint8 of the image as the network sees it; what is not in 0 to 1, as by SAM's mean, stretched to it."""
    pixels = tile.scale.image_input(tile.image).transpose(1, 2, 0)
    if pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (pixels * 255).astype(np.uint8)


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
