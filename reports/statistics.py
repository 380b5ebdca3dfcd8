"""Mean, spread, and how sure a difference is, over a few seeds and a few tiles.

Shapes: `S` seeds, `T` tiles, `K` classes, `R` resamples; counts are int (S, T, K, K), rows truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """A difference of mIoU, 0 to 1, and its 95 % interval; None for one that cannot be had."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def mean_iou(counts: np.ndarray, scored: list[int]) -> np.ndarray:
    """(..., K, K) -> (...): the plain mean of the scored classes that occur, 0 where none does."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    ones = np.ones(counts.shape[-1])
    union = counts @ ones + ones @ counts - hits  # faster than sums over such short axes
    there = union[..., scored] > 0
    iou = np.where(there, hits[..., scored] / np.maximum(union[..., scored], 1), 0)
    return iou.sum(-1) / np.maximum(there.sum(-1), 1)


def t_quantile(freedom: float, level: float = 0.975) -> float:
    """Of Student's distribution with `freedom` >= 1, integrated over the angle whose tangent times
    the root of `freedom` is t."""
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * level - 1, area / area[-1], angle)))


def paired_difference(ours: np.ndarray, other: np.ndarray, scored: list[int]) -> Difference:
    """mIoU of `ours` less that of `other`, both (S, T, K, K) of the same seeds and tiles.

    The variance is that of a paired bootstrap: seeds are resampled, and tiles are, each with both
    networks' counts together. A resample of n things spreads by (n - 1) / n less than new things
    would, which is made good; and few things know their own variance badly, which Student's
    distribution pays for. Its freedom lies halfway between Welch and Satterthwaite's, which by
    itself tells up to 9 % of equal networks apart in simulations of two or three seeds, and that of
    the fewer things. One seed alone tells nothing of another, and has no interval."""
    S, T = ours.shape[:2]
    per_seed = mean_iou(ours.sum(1), scored) - mean_iou(other.sum(1), scored)  # (S,)
    mean = float(per_seed.mean())
    if S < 2:
        return Difference(mean)
    parts = {S - 1: per_seed.var(ddof=1) / S}  # freedom -> variance; the limit of many resamples
    if T > 1:
        draws = np.random.default_rng(0).multinomial(T, [1 / T] * T, RESAMPLES)  # (R, T)
        a, b = (
            mean_iou(np.tensordot(draws.astype(float), counts, (1, 1)), scored).mean(1)
            for counts in (ours, other)
        )
        parts[T - 1] = parts.get(T - 1, 0) + (a - b).var() * T / (T - 1)
    variance = sum(parts.values())
    if variance == 0:
        return Difference(mean, mean, mean)
    freedom = variance**2 / sum(v * v / n for n, v in parts.items())
    half = t_quantile((freedom + min(parts)) / 2) * variance**0.5
    return Difference(mean, mean - half, mean + half)
