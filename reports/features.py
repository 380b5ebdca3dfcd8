"""Arrays of a network as pictures: features, contributions, attention, heat.

Shapes: `H, W` pixels of the window, `M` modalities, `C` channels, `h, w` places of a level."""

from __future__ import annotations

import math

import numpy as np

from reports.panels import INK

MORE, LESS = np.array((27, 120, 55)), np.array((118, 42, 131))  # than the middle, which is white
MARK = (230, 0, 126)


def contributions(parts: list[np.ndarray]) -> np.ndarray:
    """M parts (C, h, w) of a level -> (M, h, w) in 0 to 1, which sum to 1: the norm of a modality's
    part over the sum of all norms; equal where nothing is added."""
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


def shared_colors(maps: list[np.ndarray]) -> list[np.ndarray]:
    """`principal_colors` of several maps of one size along the same components: what has one colour
    is alike, in whichever of the pictures."""
    return np.split(principal_colors(np.concatenate(maps, axis=2)), len(maps), axis=1)


def tint(values: np.ndarray, middle: float, reach: float | None = None) -> np.ndarray:
    """(h, w) -> (h, w, 3) uint8: white at `middle`, MORE or LESS in full `reach` away from it, by
    default where the values lie farthest from it."""
    offset = values - middle
    reach = np.abs(offset).max() if reach is None else reach
    strength = np.clip(offset / max(reach, 1e-12), -1, 1)[..., None]
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


def grid(pixels: np.ndarray, stride: int) -> np.ndarray:
    drawn = pixels.copy()
    drawn[::stride] = drawn[:, ::stride] = INK
    return drawn


def outline(pixels: np.ndarray, place: tuple[int, int], stride: int) -> np.ndarray:
    """(H, W, 3) with the border of the patch at `place`, in places of `stride` pixels, drawn in."""
    drawn, (y, x) = pixels.copy(), (stride * n for n in place)
    patch, edges = drawn[y : y + stride, x : x + stride], [0, 1, -2, -1]
    patch[edges] = patch[:, edges] = MARK
    return drawn


def cells(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) of pixels as the share (h, w) of each place that it covers; places beyond the
    window have none of it."""
    stride = enlarge(np.zeros((*shape, 3)), mask.shape)[0]
    padding = [(0, n * stride - side) for n, side in zip(shape, mask.shape)]
    padded = np.pad(mask.astype(np.float64), padding)
    return padded.reshape(shape[0], stride, shape[1], stride).mean(axis=(1, 3))
