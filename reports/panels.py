"""Rasters as pictures: an image, heights, errors, confidence, and all of a tile side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling
from PIL.PngImagePlugin import PngInfo

from engine.files import replace_atomically
from geodata.labels import labels_to_colors
from geodata.layouts import IGNORE, Classes
from geodata.tiles import LoadedTile

MAX_SIDE = 640  # pixels: larger tiles are shown smaller
INK, PAPER = (40, 40, 40), (255, 255, 255)
WRONG, RIGHT, UNSCORED = (196, 0, 140), (232, 232, 232), (0, 0, 0)  # no class of ISPRS is magenta
SURE, UNSURE = (255, 255, 255), (8, 48, 107)


def save_panel(
    path: Path, tile: LoadedTile, pred: np.ndarray, confidence: np.ndarray, classes: Classes
) -> None:
    """Writes the panel of a tile as a PNG: its rasters, labels (H, W), prediction (H, W), errors
    and confidence (H, W) in percent, with a legend of the classes."""
    palette = [color for _, color in classes]
    columns = {title: shrunk(pixels) for title, pixels in raster_pictures(tile).items()}
    flat = {"prediction": labels_to_colors(pred, palette)}
    if tile.labels is not None:
        flat = {"truth": labels_to_colors(tile.labels, palette)} | flat
        flat["errors (magenta)"] = error_map(pred, tile.labels)
    # means of colours that stand for classes would be other classes
    columns |= {title: shrunk(pixels, Resampling.NEAREST) for title, pixels in flat.items()}
    columns["confidence (dark: unsure)"] = shrunk(shade_confidence(confidence, len(classes)))
    panel, boxes = assemble(columns, classes)
    info = PngInfo()  # for a page, which shows each column with a caption of its own
    info.add_text("columns", json.dumps(boxes))
    replace_atomically(path, lambda p: panel.save(p, format="PNG", pnginfo=info))


def raster_pictures(tile: LoadedTile) -> dict[str, np.ndarray]:
    """Caption -> (H, W, 3) uint8 of the tile's rasters as the network takes them."""
    found = {}
    if tile.image is not None:
        found["image"] = visible(tile)
    if tile.dsm is not None:
        low, high = tile.dsm.min(), tile.dsm.max()
        found[f"height, {low:.1f} to {high:.1f} m"] = shade_heights(tile.dsm)
    for name, bands in tile.more.items():
        low, high = np.nanmin(bands), np.nanmax(bands)
        pixels = np.nan_to_num(tile.scales[name].image_input(bands)).transpose(1, 2, 0)
        caption = f"{name}, {low:.3g} to {high:.3g} {tile.units[name]}".rstrip()
        found[caption] = (as_colors(pixels) * 255).astype(np.uint8)
    return found


def as_colors(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W, 3): one band grey, two with their mean, of more the first three."""
    if pixels.shape[2] == 2:
        return np.concatenate([pixels, pixels.mean(axis=2, keepdims=True)], axis=2)
    return pixels[..., :3] if pixels.shape[2] > 2 else pixels.repeat(3, axis=2)


def shrunk(pixels: np.ndarray, way: Resampling = Resampling.BOX) -> Image.Image:
    """(H, W, 3) uint8 as a picture whose sides are at most MAX_SIDE."""
    H, W = pixels.shape[:2]
    factor = min(1.0, MAX_SIDE / max(H, W))
    size = max(1, round(W * factor)), max(1, round(H * factor))
    return Image.fromarray(pixels).resize(size, way)


def assemble(
    columns: dict[str, Image.Image], classes: Classes
) -> tuple[Image.Image, dict[str, tuple[int, int, int, int]]]:
    """Puts the columns side by side, their titles above, the legend of the classes below -> the
    picture, and the box of each column in it (left, top, right, bottom)."""
    w, h = next(iter(columns.values())).size
    size = min(max(w // 24, 11), 22)  # of a line: readable when a wide panel is shown smaller
    font = ImageFont.load_default(size)
    gap, line = size // 2 + 2, 2 * size
    step = max(w, *(round(font.getlength(title)) for title in columns)) + gap
    lengths = [round(font.getlength(name)) for name, _ in classes]
    width = max(gap + step * len(columns), gap + sum(lengths) + 3 * size * len(lengths))
    canvas = Image.new("RGB", (width, h + 2 * line), PAPER)
    draw, boxes = ImageDraw.Draw(canvas), {}
    for i, (title, picture) in enumerate(columns.items()):
        left = gap + i * step
        draw.text((left, line // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(picture, (left, line))
        boxes[title] = (left, line, left + w, line + h)
        draw.rectangle((left - 1, line - 1, left + w, line + h), outline=INK)
    left, middle = gap, line + h + line // 2
    for (name, color), length in zip(classes, lengths):
        square = (left, middle - size // 2, left + size, middle + size // 2)
        draw.rectangle(square, fill=color, outline=INK)
        draw.text((left + size + gap // 2, middle), name, fill=INK, font=font, anchor="lm")
        left += length + 3 * size
    return canvas, boxes


def visible(tile: LoadedTile) -> np.ndarray:
    """(H, W, 3) uint8 of the image as the network takes it; what is not in 0 to 1, as by SAM's
    mean, stretched to it."""
    pixels = as_colors(tile.scale.image_input(tile.image).transpose(1, 2, 0))
    if pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (pixels * 255).astype(np.uint8)


def shade_heights(dsm: np.ndarray) -> np.ndarray:
    """(H, W) metres -> (H, W, 3) grey: bright is high, lit from the upper left."""
    low, high = np.percentile(dsm, (1, 99))
    level = np.clip((dsm - low) / max(high - low, 1e-6), 0, 1)
    dy, dx = np.gradient(dsm) if min(dsm.shape) > 1 else (np.zeros_like(dsm), np.zeros_like(dsm))
    slope = -(dx + dy) * 0.7
    relief = slope / np.sqrt(1 + slope**2)
    grey = np.clip(40 + 180 * level + 45 * relief, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def error_map(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H, W, 3): wrong pixels magenta, right ones light, unscored ones black."""
    out = np.where((pred == truth)[..., None], np.uint8(RIGHT), np.uint8(WRONG))
    out[truth == IGNORE] = UNSCORED
    return out


def shade_confidence(confidence: np.ndarray, K: int) -> np.ndarray:
    """(H, W) percent -> (H, W, 3): from dark where all K classes are as likely to light where one
    is certain."""
    return shade(100.0 - np.arange(256), 0, 100 - 100 / K if K > 1 else 100)[confidence]


def shade(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(...) -> (..., 3) uint8: white at `low` and below, dark from `high` on."""
    level = np.clip((values - low) / max(high - low, 1e-12), 0, 1)[..., None]
    return np.rint(np.array(SURE) + level * (np.array(UNSURE) - SURE)).astype(np.uint8)
