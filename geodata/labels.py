"""What stands in a label file -> class indices: colours, colour tables, numbers, raw codes.

Shapes: `H, W` pixels, `K` classes. Labels are uint8 class indices, 255 = not scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geodata.layouts import IGNORE, Classes
from geodata.slices import Raster, row_strips

LISTED = 8  # unknown values that are named
UNKNOWN = 254  # stands for colours of no class; palettes have at most 64


def colors_to_labels(
    rgb: np.ndarray,
    palette: list[tuple[int, int, int]],
    tolerance: int | None = None,
    unknown: int = IGNORE,
) -> np.ndarray:
    """(H, W, 3) uint8 colours -> (H, W) uint8 indices into `palette` (at most 64 colours).

    A pixel belongs to a colour when no channel differs by more than `tolerance`; without one, by
    the most that keeps the palette unambiguous: 127 for ISPRS's colours, which is thresholding each
    channel, and repairs the lossy labels of Potsdam (docs/method.md 3.2). `tolerance=0` is exact
    matching. Pixels that fit no colour become `unknown`."""
    colors = np.asarray(palette, dtype=np.int16)
    K = len(colors)
    distances = np.abs(colors[:, None] - colors[None]).max(axis=-1) + 256 * np.eye(K, dtype=int)
    widest = (int(distances.min()) - 1) // 2 if K > 1 else 255
    tolerance = widest if tolerance is None else tolerance
    if tolerance > widest or widest < 0:
        raise ValueError(f"tolerance {tolerance} makes the palette ambiguous; at most {widest}")
    # Bit k of tables[c][v]: value v in channel c may belong to colour k. Three look-ups and two
    # ands find the colour.
    values = np.arange(256, dtype=np.int16)
    fits = np.abs(values[None, :, None] - colors.T[:, None, :]) <= tolerance  # (3, 256, K)
    tables = (fits * (np.uint64(1) << np.arange(K, dtype=np.uint64))).sum(axis=-1, dtype=np.uint64)
    tables = tables.astype(np.uint8 if K <= 8 else np.uint64)
    bits = tables[0][rgb[..., 0]] & tables[1][rgb[..., 1]] & tables[2][rgb[..., 2]]
    labels = np.full(rgb.shape[:2], unknown, dtype=np.uint8)
    for k in range(K):
        labels[bits == tables.dtype.type(1 << k)] = k
    return labels


def labels_to_colors(labels: np.ndarray, palette: list[tuple[int, int, int]]) -> np.ndarray:
    """(H, W) indices -> (H, W, 3) uint8 colours; what is no index of the palette becomes black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    return table[labels]


@dataclass(frozen=True)
class Legend:
    """What the values of label files mean."""

    classes: Classes
    unscored_color: tuple[int, int, int] | None = None
    ignore_index: int = IGNORE  # the value of single-band labels that is not scored
    codes: tuple[int, ...] | None = None  # the class of raw code 0, 1, ... of single-band labels
    exact: bool = False  # as published: colours must match exactly, and any other one is class 0

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        colors = [color for _, color in self.classes]
        return colors if self.unscored_color is None else [*colors, self.unscored_color]

    def decode(self, raw: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
        """Colours (H, W, 3 and more) or numbers (H, W) -> (H, W) int16: classes, IGNORE for what is
        not scored, -1 for what fits no class. `table` (N,) are the classes of a colour table."""
        if raw.ndim == 3 and raw.shape[2] >= 3:
            # differs: the published code matches colours exactly, and makes all others class 0
            # (docs/method.md 3.2)
            return self._of_colors(raw[..., :3], 0 if self.exact else None)
        raw = raw[..., 0] if raw.ndim == 3 else raw
        if raw.dtype == np.uint8 and raw.size > 256:  # each value once
            return self.decode(np.arange(256, dtype=np.uint8), table)[raw]
        if self.ignore_index == -1 and raw.dtype == np.uint8:  # int8's -1 written as 255
            raw = raw.view(np.int8)
        if table is None:
            table = np.array(range(len(self.classes)) if self.codes is None else self.codes)
        known = (raw >= 0) & (raw < len(table)) & (raw == np.trunc(raw))
        out = np.where(known, table[np.where(known, raw, 0).astype(np.intp)], -1)
        out[raw == self.ignore_index] = IGNORE
        return out.astype(np.int16)

    def _of_colors(self, rgb: np.ndarray, tolerance: int | None) -> np.ndarray:
        out = colors_to_labels(rgb, self.palette, tolerance, UNKNOWN).astype(np.int16)
        out[out == len(self.classes)] = IGNORE
        out[out == UNKNOWN] = -1
        return out

    def table_of(self, raster: Raster) -> np.ndarray | None:
        """The classes (N,) of a raster's colour table, where it speaks of the classes: where most
        pixels have the exact colour of one; None where the raster holds numbers."""
        if raster.palette is None or self.codes is not None or raster.dtype != np.uint8:
            return None
        table = self._of_colors(raster.palette[None], 0)[0]
        own = table[: len(self.classes)]
        if np.array_equal(own, np.arange(len(own))):
            return None
        counts = np.zeros(256, np.int64)
        for strip in row_strips(raster):
            counts += np.bincount(strip.ravel(), minlength=256)
        counts[max(self.ignore_index, 0)] = 0
        return table if 2 * counts[: len(table)][table >= 0].sum() > counts.sum() else None

    def unknown(self, raw: np.ndarray, decoded: np.ndarray) -> dict:
        """Value or colour -> pixels, of those that fit no class."""
        values, colours = raw[decoded == -1], raw.ndim == 3 and raw.shape[2] >= 3
        if colours:  # as one number each, which are sorted ten times faster than rows
            values = values[:, :3].astype(np.int32) @ (65536, 256, 1)
        found = zip(*(part.tolist() for part in np.unique(values, return_counts=True)))
        return {(v >> 16, v >> 8 & 255, v & 255) if colours else v: n for v, n in found}

    def finish(self, decoded: np.ndarray) -> np.ndarray:
        """What `decode` gave -> (H, W) uint8 labels."""
        return np.where(decoded < 0, 0 if self.exact else IGNORE, decoded).astype(np.uint8)


def listed(unknown: dict) -> str:
    """The most frequent unknown values, with their pixels."""
    most = sorted(unknown.items(), key=lambda item: -item[1])
    text = ", ".join(f"{value} ({count:,} pixels)" for value, count in most[:LISTED])
    return text + (f" and {len(most) - LISTED} more values" if len(most) > LISTED else "")
