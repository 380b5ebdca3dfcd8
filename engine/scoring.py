"""Scores: a confusion matrix, and what a network scores on the tiles of a split.

Every number comes from one int64 confusion matrix, rows truth, columns prediction. OA and kappa
count all classes; mF1 and mIoU are the plain means over the data set's scored classes (ISPRS:
without clutter), without those that appear neither in the truth nor in the prediction.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Callable

import numpy as np
import torch.nn as nn

from engine.console import Mistake, Ticker
from engine.distributed import Team
from engine.inference import percent, predict_loaded
from engine.settings import Settings
from geodata.crops import sliding_windows, window_places
from geodata.rasters import DataError
from geodata.tiles import LoadedTile, Tile


class ConfusionMatrix:
    """Counts pixels by (truth, prediction); the means average the `scored` classes, or all."""

    def __init__(self, num_classes: int, scored: tuple[int, ...] | None = None, ignore: int = 255):
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.scored = tuple(range(num_classes)) if scored is None else tuple(scored)
        self.ignore = ignore

    def update(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Adds two maps of one shape. Pixels whose truth is `ignore` do not count, whatever was
        predicted there. Raises ValueError for maps of different shapes and labels of no class."""
        if pred.shape != truth.shape:
            raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
        K = len(self.counts)
        counted = truth != self.ignore
        t, p = truth[counted].astype(np.int64), pred[counted].astype(np.int64)
        if t.size and (min(t.min(), p.min()) < 0 or max(t.max(), p.max()) >= K):
            highest = f"truth up to {t.max()}, prediction up to {p.max()}"
            raise ValueError(f"labels outside 0 to {K - 1}: {highest}")
        self.counts += np.bincount(t * K + p, minlength=K * K).reshape(K, K)

    def scores(self) -> dict:
        """oa, mf1, miou (0 to 1), kappa (-1 to 1), per_class, confusion, pixels; None where nothing
        was counted.

        per_class lists iou, f1, precision, recall, pixels (of the truth) of each class; a value
        whose denominator is zero is None, and a class without iou and f1 is left out of the means.
        Where truth and prediction hold one and the same class alone, there is no kappa either."""
        c = self.counts  # as Python's integers from here on: pixels squared overflow int64
        hits, truth, pred = c.diagonal().tolist(), c.sum(axis=1).tolist(), c.sum(axis=0).tolist()
        per_class = [
            {
                "iou": ratio(hit, t + p - hit),
                "f1": ratio(2 * hit, t + p),
                "precision": ratio(hit, p),
                "recall": ratio(hit, t),
                "pixels": t,
            }
            for hit, t, p in zip(hits, truth, pred)
        ]
        right, total = sum(hits), sum(truth)
        chance = sum(t * p for t, p in zip(truth, pred))
        return {
            "oa": ratio(right, total),
            "mf1": self._mean(per_class, "f1"),
            "miou": self._mean(per_class, "iou"),
            "kappa": ratio(total * right - chance, total * total - chance),
            "per_class": per_class,
            "confusion": self.counts.tolist(),
            "pixels": total,
        }

    def _mean(self, per_class: list[dict], key: str) -> float | None:
        values = [per_class[k][key] for k in self.scored if per_class[k][key] is not None]
        return sum(values) / len(values) if values else None


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def score_split(
    model: nn.Module,
    dataset,
    split: str,
    s: Settings,
    stride: int | None = None,
    keep: Callable[[LoadedTile, np.ndarray, np.ndarray], None] | None = None,
    team: Team = Team(),
    pause: Callable[[], None] = lambda: None,
) -> dict:
    """Predicts and scores every tile of a split of a `data.Dataset` -> scores of all, the same per
    tile, and the convention beside them.

    Where there are eroded and full labels, each prediction is counted with both: the scores are
    those of the data set's choice, and `full_labels` (or `eroded_labels`) holds those of the
    others, unless `notes` says why there are none. `keep(tile, prediction, confidence in percent)`
    is called for each tile, for whoever wants to look at it, and `pause` after each row of windows,
    for whoever wants to stop. The processes of a `team` take turns at the tiles and get the same
    scores. Raises NotFinite where the network's outputs are no numbers."""
    modalities, K = s.rasters, len(dataset.classes)
    stride = s.eval_stride if stride is None else stride
    if not 1 <= stride <= s.crop:
        raise Mistake(f"--stride {stride}: give 1 to the window's {s.crop} pixels")
    tiles = dataset.tiles(split, modalities)
    # The training tiles have their full labels alone.
    other = dataset.with_other_labels() if split != "train" else None
    others = other.find_tiles(split, modalities)[0] if other is not None else []
    others = {tile.name: tile for tile in others}
    mine = tiles[team.rank :: team.world]
    rows = sum(len(window_places(tile.size[0], s.crop, stride)) for tile in mine)
    ticker, rows_done = Ticker(f"scoring {split} tiles, row of windows"), itertools.count(1)

    def progress(row: int, of: int) -> None:
        if team.is_main:
            ticker(next(rows_done), rows)
        pause()

    found = {}  # tile -> confusion, the one with the other labels or why there is none, windows
    for tile in mine:
        loaded = tile.load(modalities)
        how = dict(batch_size=s.batch_size, repeat_border=s.repeat_border, progress=progress)
        strips = predict_loaded(model, loaded, s, stride, probabilities=keep is not None, **how)
        maps = [(c, percent(p.max(axis=0)) if keep else None) for c, p in strips]
        pred = np.concatenate([classes for classes, _ in maps])
        second = count_other(pred, others[tile.name], K) if other is not None else None
        windows = len(sliding_windows(*loaded.size, s.crop, stride))
        found[tile.name] = confusion(pred, loaded.labels, K), second, windows
        if keep:
            keep(loaded, pred, np.concatenate([sure for _, sure in maps]))
    ticker.close()
    found = {name: counted for part in team.gather(found) for name, counted in part.items()}
    names = [tile.name for tile in tiles]
    first, second = ({name: found[name][i] for name in names} for i in (0, 1))
    protocol = dict(split=split, window=s.crop, stride=stride, repeat_border=s.repeat_border)
    protocol["windows"] = sum(windows for _, _, windows in found.values())
    result = {**sum_up(first, dataset, protocol), **protocol, "notes": []}
    rows = result["per_class"]
    lost = [row["name"] for row in rows if row["pixels"] and not row["iou"]]
    if lost and not s.class_weights:
        remedy = "train with --class-weights balanced --balance-crops"
        result["notes"].append(f"{', '.join(lost)}: not one pixel was found; {remedy}")
    if dataset.withheld:
        result["without"] = "+".join(dataset.withheld)
    if other is not None:
        kind = "full" if other.full_labels else "eroded"
        unread = [why for why in second.values() if isinstance(why, str)]
        if unread:  # a score of the other tiles alone would compare with nothing
            lacking = f"which {len(unread)} of the tiles lack: {unread[0]}"
            result["notes"].append(f"not scored with {kind} labels, {lacking}")
        else:
            result[f"{kind}_labels"] = sum_up(second, other, protocol)
    return result


def confusion(pred: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(pred, truth)
    return matrix.counts


def count_other(pred: np.ndarray, tile: Tile, num_classes: int) -> np.ndarray | str:
    """The confusion (K, K) with a tile's other labels, or, in a line, why they are unreadable."""
    try:
        truth = tile.read_labels()
    except DataError as error:
        return str(error)
    # Files may differ by a row: `Tile.size`.
    H, W = (min(a, b) for a, b in zip(pred.shape, truth.shape))
    return confusion(pred[:H, :W], truth[:H, :W], num_classes)


def sum_up(counts: dict[str, np.ndarray], dataset, protocol: dict) -> dict:
    """The scores of all tiles, in `per_tile` those of each, in `convention` what they mean."""
    K, names = len(dataset.classes), dataset.class_names
    total, per_tile = ConfusionMatrix(K, dataset.scored), {}
    for name, confused in counts.items():
        own = ConfusionMatrix(K, dataset.scored)
        own.counts = confused
        total.counts += confused
        own_scores = own.scores()
        per_tile[name] = {
            k: own_scores[k] for k in ("oa", "mf1", "miou", "kappa", "pixels", "confusion")
        }
    result = total.scores()
    for name, row in zip(names, result["per_class"]):
        row["name"] = name
    everything = len(dataset.scored) == K
    averaged = "all classes" if everything else ", ".join(names[k] for k in dataset.scored)
    labels = dataset.labels_note if protocol["split"] != "train" else "full labels"
    as_published = protocol["repeat_border"]
    border = "border windows counted as published" if as_published else "each window once"
    result["convention"] = (
        f"{protocol['split']} split, {labels}; mF1 and mIoU average {averaged}; "
        f"OA and kappa count all {K} classes; "
        f"windows of {protocol['window']} at stride {protocol['stride']}, logits averaged, {border}"
        + (f"; without {'+'.join(dataset.withheld)}" if dataset.withheld else "")
    )
    return {**result, "labels": labels, "per_tile": per_tile}


# Where a score with the labels that are not the convention's is kept.
OTHER_LABELS = ("full_labels", "eroded_labels")
SUMMARY = (("OA", "oa"), ("mF1", "mf1"), ("mIoU", "miou"), ("kappa", "kappa"))


def format_scores(scores: dict) -> str:
    """The scores as a table in percent, with the convention."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.2f}"

    lines = [f"{'class':<16}   IoU     F1   prec.  recall      pixels"]
    for row in scores["per_class"]:
        values = " ".join(cell(row[key]) for key in ("iou", "f1", "precision", "recall"))
        lines.append(f"{row['name']:<16}{values} {row['pixels']:11,}")
    parts = {f" with {k.replace('_', ' ')}": scores[k] for k in OTHER_LABELS if k in scores}
    for beside, part in {"": scores, **parts}.items():
        means = "  ".join(f"{label} {cell(part[key]).strip()}" for label, key in SUMMARY)
        lines.append(f"{means}  ({part['pixels']:,} pixels{beside})")
    notes = [f"note: {note}" for note in scores.get("notes", [])]
    return "\n".join([*lines, f"({scores['convention']})", *notes])


def scores_name(
    ran: Settings,
    asked: Settings,
    split: str,
    stride: int,
    final: bool,
    without: str = "",
    scored: bool = False,
) -> str:
    """The file for the scores of a run: scores.json for those by its own protocol at its end. What
    was scored otherwise (`asked`, at `stride`) is kept under a name that says how; that of tiles
    in another folder too, once the run is `scored`."""
    parts = [] if split == "test" else [split]
    parts += [] if final else ["unfinished"]
    parts += [] if stride == ran.eval_stride else [f"stride{stride}"]
    if asked.repeat_border != ran.repeat_border:
        parts.append("border" if asked.repeat_border else "no-border")
    if asked.full_labels != ran.full_labels:
        parts.append("full-labels" if asked.full_labels else "eroded-labels")
    parts += [f"without-{without}"] if without else []
    if scored and Path(asked.root).resolve() != Path(ran.root).resolve():
        parts.append(f"root-{Path(asked.root).resolve().name}")
    return "_".join(["scores", *parts]) + ".json"
