"""One raster as tiles: blocks that do not touch, shared out among training, validation and test.

Neighbouring pixels show the same roof: blocks that touched would let a network be tested on what it
was trained on. So a gap lies between all of them.

Shapes: `n` blocks, `P` parts, `K` classes."""

from __future__ import annotations

import numpy as np

from geodata.slices import Box

GAP = 32  # a gap is this part of a block: 16 pixels beside 512, which costs 6 % of the area
TRIES = 40


def cut_blocks(size: tuple[int, int], block: int) -> list[Box]:
    """Blocks of about `block` x `block` pixels with gaps between them, that reach the last row and
    column of a raster of `size` (H, W)."""
    gap = max(1, block // GAP)
    rows, columns = (_cut(length, block, gap) for length in size)
    return [(y, x) for y in rows for x in columns]


def _cut(length: int, block: int, gap: int) -> list[slice]:
    n = max(1, round((length + gap) / (block + gap)))
    inner = length - gap * (n - 1)
    return [slice(i * inner // n + i * gap, (i + 1) * inner // n + i * gap) for i in range(n)]


def share_out(pixels: np.ndarray, sizes: tuple[int, ...], seed: int) -> np.ndarray:
    """The part (n,) of each block, of which `sizes` (P,) say how many go where; `pixels` (n, K) are
    those of each class. A function of its arguments alone.

    Of many orders the one counts that leaves the fewest parts without a class, and then the one
    whose parts are most alike. Scarce classes come first (K. Sechidis, G. Tsoumakas, I. Vlahavas,
    On the stratification of multi-label data, ECML PKDD 2011): each of their blocks goes to the
    part that lacks most of its classes, and of equal ones to the one that is most short of it."""
    shares = np.array(sizes)[:, None] / len(pixels)  # (P, 1)
    total = pixels.sum(axis=0)
    best, least = np.zeros(len(pixels), int), None
    for attempt in range(TRIES):
        part = _share_once(pixels, sizes, shares * total, np.random.default_rng((seed, attempt)))
        got = np.stack([pixels[part == p].sum(axis=0) for p in range(len(sizes))])  # (P, K)
        uneven = np.abs(got / np.maximum(total, 1) - shares)[:, total > 0].sum()
        cost = int(((got == 0) & (total > 0)).sum()), float(uneven)
        if least is None or cost < least:
            best, least = part, cost
    return best


def _share_once(
    pixels: np.ndarray, sizes: tuple[int, ...], wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    part, room = np.full(len(pixels), -1), np.array(sizes)
    got = np.zeros_like(wanted)  # (P, K)
    order = rng.permutation(len(pixels))
    for k in np.argsort((pixels > 0).sum(axis=0), kind="stable"):
        for i in order[(part[order] < 0) & (pixels[order, k] > 0)]:
            lacking = (got[:, pixels[i] > 0] == 0).sum(axis=1)
            short = wanted[:, k] - got[:, k]
            p = max(np.flatnonzero(room), key=lambda p: (lacking[p], short[p]))
            part[i], room[p] = p, room[p] - 1
            got[p] += pixels[i]
    return part
