"""Polygons to pixels and back: `burn` fills rings, `trace` outlines the regions of a class map.

Both work on edges, on runs of pixels and on corners, never pixel by pixel. A ring is an array
(n, 2) of x and y in pixels from the upper left corner of the raster, so that the middle of the
first pixel is 0.5, 0.5; its last point is joined to its first.

Shapes: `H, W` pixels, `R` runs, `N` regions, `V` corners."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

import numpy as np

from geodata.slices import STRIP, strip_boxes

NOTHING = 255  # the class of pixels that belong to no region

# ------------------------------------------------------------------------------ polygons to pixels


def burn(labels: np.ndarray, rings: list[np.ndarray], value: int) -> int:
    """Sets the pixels of (H, W) whose middles lie inside an odd number of rings to `value`, in
    place -> how many of them had another class before.

    A middle on an outline is inside on the upper and on the right side of a polygon, so that
    neighbours share no pixel.
    differs: Pillow's ImageDraw.polygon paints whatever an outline touches, which makes buildings
    grow; this is the rule of gdal_rasterize."""
    (H, W), overwritten = labels.shape, 0
    starts = np.concatenate(rings)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    falls = (starts[:, 1] <= ends[:, 1])[:, None]
    upper, lower = np.where(falls, starts, ends), np.where(falls, ends, starts)
    # An edge crosses the middles of the rows from `first` to before `last`.
    first, last = (np.clip(np.ceil(p[:, 1] - 0.5), 0, H).astype(np.int64) for p in (upper, lower))
    lowest, end = int(first.min()), int(last.max())
    reach = np.clip(np.floor([starts[:, 0].min() + 0.5, starts[:, 0].max() + 0.5]), 0, W)
    left, right = map(int, reach)
    for top in range(lowest, end, STRIP):
        bottom = min(top + STRIP, end)
        begin = np.maximum(first, top)
        count = np.maximum(np.minimum(last, bottom) - begin, 0)
        edge = np.repeat(np.arange(len(count)), count)
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count - begin, count)
        (x, y), (x2, y2) = upper[edge].T, lower[edge].T
        crossed = np.floor((rows + 0.5 - y) * (x2 - x) / (y2 - y) + x + 0.5)
        inside = np.zeros((bottom - top, right - left + 1), np.uint8)
        columns = np.clip(crossed, left, right).astype(np.int64) - left
        np.bitwise_xor.at(inside, (rows - top, columns), 1)
        inside = np.bitwise_xor.accumulate(inside, axis=1)[:, :-1].astype(bool)
        part = labels[top:bottom, left:right]
        before = part[inside]
        overwritten += int(((before != NOTHING) & (before != value)).sum())
        part[inside] = value
    return overwritten


# ------------------------------------------------------------------------------ pixels to polygons


@dataclass
class Region:
    """Pixels of one class that are joined along their sides."""

    value: int
    pixels: int
    confidence: float  # the mean over its pixels
    rings: list[np.ndarray]  # (n, 2) int64: the outline, then the holes


def trace(classes, confidence, smallest: int = 1) -> Iterator[Region]:
    """The regions of a class map (H, W) uint8, NOTHING left out, with the mean of `confidence`
    (H, W) uint8; both may slice like arrays. A region of fewer than `smallest` pixels becomes part
    of the largest one beside it, as far as there is any.

    Outlines run along the sides of pixels, with the region on the left as a map shows it: outer
    rings counter-clockwise, holes clockwise. Regions that touch at a corner stay apart, and a
    region that touches itself at one has a hole there, so that all polygons are valid."""
    H, W = classes.shape
    start, value, length, sure = find_runs(classes, confidence)
    pairs = touching(start, H, W)
    if smallest > 1:
        value = merge_small(value, length, pairs, smallest)
    region, kinds, pixels = join_runs(value, length, pairs)
    means = np.bincount(region, sure) / pixels
    rings: list[list[np.ndarray]] = [[] for _ in kinds]
    for owner, ring in outlines(start, length, region, kinds[region] != NOTHING, (H, W)):
        rings[owner].append(ring)
    for i in np.flatnonzero(kinds != NOTHING).tolist():
        yield Region(int(kinds[i]), int(pixels[i]), float(means[i]), rings[i])


def find_runs(classes, confidence) -> tuple[np.ndarray, ...]:
    """Runs of one class beside each other in a row: the number of the first pixel, counted row by
    row, the class, the length, and the sum of the confidence, each (R,)."""
    (H, W), found = classes.shape, []
    for box in strip_boxes((H, W)):
        strip = classes[box]
        new = np.ones(strip.shape, bool)
        new[:, 1:] = strip[:, 1:] != strip[:, :-1]
        at = np.flatnonzero(new)
        sums = np.add.reduceat(confidence[box].ravel(), at, dtype=np.int64)
        found.append((at + box[0].start * W, strip.ravel()[at], sums))
    start, value, sums = map(np.concatenate, zip(*found))
    return start, value, np.diff(start, append=H * W), sums


def touching(start: np.ndarray, H: int, W: int) -> np.ndarray:
    """(2, n) runs that have a part of their sides in common."""
    later = np.flatnonzero(start % W)
    cuts = np.unique(np.concatenate([start[start >= W], start[start < (H - 1) * W] + W]))
    above, below = (np.searchsorted(start, place, "right") - 1 for place in (cuts - W, cuts))
    return np.stack([np.concatenate([later - 1, above]), np.concatenate([later, below])])


def join_runs(
    value: np.ndarray, length: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The region (R,) of each run, numbered from 0 from top to bottom; the class and the pixels of
    each region, (N,).

    Of two trees that a pair joins, the later root is hung below the earlier one, until no pair is
    in two trees."""
    root = np.arange(len(value))
    a, b = pairs[:, value[pairs[0]] == value[pairs[1]]]
    while len(a):
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        root = to_root(root)
    first, region = np.unique(root, return_inverse=True)
    return region, value[first], np.bincount(region, length).astype(np.int64)


def to_root(parent: np.ndarray) -> np.ndarray:
    """(n,) the last of the chain that each entry begins."""
    while not np.array_equal(further := parent[parent], parent):
        parent = further
    return parent


def merge_small(
    value: np.ndarray, length: np.ndarray, pairs: np.ndarray, smallest: int
) -> np.ndarray:
    """Classes (R,) in which regions below `smallest` pixels have that of their largest neighbour.

    A small region whose neighbours are all smaller waits for them to join it."""
    while True:
        region, kinds, pixels = join_runs(value, length, pairs)
        by_size = np.argsort(pixels, kind="stable")  # of equal ones by number
        rank = np.argsort(by_size)
        a, b = np.concatenate([region[pairs], region[pairs[::-1]]], axis=1)
        joins = (pixels[a] < smallest) & (kinds[a] != NOTHING) & (kinds[b] != NOTHING)
        joins &= rank[b] > rank[a]
        if not joins.any():
            return value
        largest = rank.copy()
        np.maximum.at(largest, a[joins], rank[b[joins]])
        value = kinds[to_root(by_size[largest])][region]


def outlines(
    start: np.ndarray, length: np.ndarray, region: np.ndarray, wanted: np.ndarray, size: tuple
) -> Iterator[tuple[int, np.ndarray]]:
    """(region, ring) of every ring of the runs that are `wanted` (R,); of a region the outer ring
    first."""
    H, W = size
    ys, xs, owner, is_left = corners(start, length, region, wanted, W)
    number = np.arange(len(ys))
    is_top = number % 2 == 0
    # At a corner an outline turns from a vertical to a horizontal side. Where the pixel across is
    # of the region too, it turns outwards: the region has three of the four pixels, or two that
    # touch at the corner, between which it then does not pass.
    y, x = ys - is_top, xs - is_left
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    run = np.searchsorted(start, np.where(inside, y * W + x, 0), "right") - 1
    across = inside & (region[run] == owner)
    region_below, is_west = is_top ^ across, is_left ^ across  # of the side; its western end
    order = np.argsort(((~region_below * (H + 1) + ys) * (W + 1) + xs) * 2 + is_west)
    west, east = order[0::2], order[1::2]
    # The region is on the left: down its left sides, up its right ones, west along the upper ones.
    following = np.where(is_top == is_left, number ^ 1, -1)
    upper = region_below[west]
    following[east[upper]] = west[upper]
    following[west[~upper]] = east[~upper]
    points, next_of, seen = np.stack([xs, ys], 1), following.tolist(), bytearray(len(ys))
    for first in east[upper].tolist():  # from top to bottom, so that the outer ring comes first
        ring, corner = [], first
        while not seen[corner]:
            seen[corner] = 1
            ring.append(corner)
            corner = next_of[corner]
        if ring:
            yield int(owner[first]), points[ring]


def corners(
    start: np.ndarray, length: np.ndarray, region: np.ndarray, wanted: np.ndarray, W: int
) -> tuple[np.ndarray, ...]:
    """The upper and the lower end of each straight left or right side of a region, one after the
    other: y, x, the region, whether it is a left side, each (V,)."""
    y, x = np.divmod(start, W)
    new = (x == 0) | (np.diff(region, prepend=-1) != 0)  # not so where a small region was merged
    last = np.append(new[1:], True)
    found = []
    for is_left, ends, column in ((True, new, x), (False, last, x + length)):
        here = np.flatnonzero(ends & wanted)
        here = here[np.argsort(column[here], kind="stable")]  # column by column, downwards
        rows, columns, owner = y[here], column[here], region[here]
        cut = (np.diff(columns) != 0) | (np.diff(rows) != 1) | (np.diff(owner) != 0)
        top, bottom = np.ones((2, len(rows)), bool)
        top[1:] = bottom[:-1] = cut
        ys = np.stack([rows[top], rows[bottom] + 1], 1).ravel()
        columns, owner = (np.repeat(of[top], 2) for of in (columns, owner))
        found.append((ys, columns, owner, np.full(len(ys), is_left)))
    return tuple(map(np.concatenate, zip(*found)))
