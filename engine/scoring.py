"""Scores: a confusion matrix, and what a network scores on the tiles of a split.

Every number comes from one int64 confusion matrix, rows truth, columns prediction. OA and kappa
count all classes; mF1 and mIoU are the plain means over the data set's scored classes (ISPRS:
without clutter), without those that appear neither in the truth nor in the prediction.
"""

from __future__ import annotations

import itertools
from typing import Callable

import numpy as np
import torch.nn as nn

from engine.console import Mistake, Ticker
from engine.distributed import Team
from engine.inference import percent, predict_strips
from engine.settings import Settings
from geodata.crops import sliding_windows, window_places
from geodata.layouts import MODALITIES
from geodata.rasters import DataError
from geodata.tiles import LoadedTile, Tile


class ConfusionMatrix:
    """Counts pixels by (truth, prediction); `scored` are the classes that the means average, by
    default all.
    """

    def __init__(self, num_classes: int, scored: tuple[int, ...] | None = None, ignore: int = 255):
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.scored = tuple(range(num_classes)) if scored is None else tuple(scored)
        self.ignore = ignore

    def update(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Adds two maps of one shape. Pixels whose truth is `ignore` do not count, whatever was
        predicted there.

        Raises ValueError for maps of different shapes and for labels that are no class.
        """
        if pred.shape != truth.shape:
            raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
        K = len(self.counts)
        counted = truth != self.ignore
        t, p = truth[counted].astype(np.int64), pred[counted].astype(np.int64)
        if t.size and (min(t.min(), p.min()) < 0 or max(t.max(), p.max()) >= K):
            raise ValueError(
                f"labels outside 0 to {K - 1}: truth up to {t.max()}, prediction up to {p.max()}"
            )
        self.counts += np.bincount(t * K + p, minlength=K * K).reshape(K, K)

    def scores(self) -> dict:
        """oa, mf1, miou (0 to 1), kappa (-1 to 1), per_class, confusion, pixels; None where nothing
        was counted.

        per_class lists iou, f1, precision, recall, pixels (of the truth) of each class; a value
        whose denominator is zero is None, and a class without iou and f1 is left out of the means.
        Where truth and prediction hold one and the same class alone, there is no kappa either."""
        hits = np.diag(self.counts)
        truth, pred, total = (
            self.counts.sum(axis=1),
            self.counts.sum(axis=0),
            int(self.counts.sum()),
        )
        per_class = [
            {
                "iou": ratio(hits[k], truth[k] + pred[k] - hits[k]),
                "f1": ratio(2 * hits[k], truth[k] + pred[k]),
                "precision": ratio(hits[k], pred[k]),
                "recall": ratio(hits[k], truth[k]),
                "pixels": int(truth[k]),
            }
            for k in range(len(hits))
        ]
        right = int(hits.sum())
        chance = sum(
            int(t) * int(p) for t, p in zip(truth, pred)
        )  # Python's integers: pixels squared overflow int64
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
    return int(part) / int(whole) if whole else None


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
    modalities, K = MODALITIES[s.modalities], len(dataset.classes)
    tiles = dataset.tiles(split, modalities)
    stride = s.eval_stride if stride is None else stride
    if not 1 <= stride <= s.crop:
        raise Mistake(f"--stride {stride}: give 1 to the window's {s.crop} pixels")
    # The training tiles have their full labels alone.
    other = dataset.with_other_labels() if split != "train" else None
    found = [] if other is None else other.find_tiles(split, modalities)[0]
    others = {tile.name: tile for tile in found}
    mine = tiles[team.rank :: team.world]
    rows = sum(len(window_places(tile.size[0], s.crop, stride)) for tile in mine)
    ticker, rows_done = Ticker(f"scoring {split} tiles, row of windows"), itertools.count(1)

    def progress(row: int, of: int) -> None:
        if team.is_main:
            ticker(next(rows_done), rows)
        pause()

    counts, windows, second = {}, {}, {}
    for tile in mine:
        loaded = tile.load(modalities)
        pred, confidence = predict_loaded(model, loaded, s, stride, keep is not None, progress)
        own = ConfusionMatrix(K, dataset.scored)
        own.update(pred, loaded.labels)
        counts[tile.name] = own.counts
        if other is not None:
            second[tile.name] = count_other(pred, others[tile.name], K)
        windows[tile.name] = len(sliding_windows(*loaded.size, s.crop, stride))
        if keep:
            keep(loaded, pred, confidence)
    ticker.close()
    counts, second, windows = (merged(team, part) for part in (counts, second, windows))
    names = [tile.name for tile in tiles]
    protocol = dict(split=split, window=s.crop, stride=stride, repeat_border=s.repeat_border)
    protocol["windows"] = sum(windows.values())
    result = {**sum_up(counts, names, dataset, protocol), **protocol, "notes": []}
    if other is not None:
        kind = "full" if other.full_labels else "eroded"
        unread = [second[name] for name in names if isinstance(second[name], str)]
        if unread:  # a score of the other tiles alone would compare with nothing
            result["notes"].append(
                f"not scored with {kind} labels, which {len(unread)} of the tiles lack: {unread[0]}"
            )
        else:
            result[f"{kind}_labels"] = sum_up(second, names, other, protocol)
    return result


def predict_loaded(
    model: nn.Module,
    tile: LoadedTile,
    s: Settings,
    stride: int,
    confidence: bool,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray | None]:
    """The class map (H, W) of a tile, and how sure it is (H, W) in percent if asked for."""
    strips = predict_strips(
        model,
        tile.image if "image" in MODALITIES[s.modalities] else None,
        tile.dsm,
        s.crop,
        stride,
        s.batch_size,
        repeat_border=s.repeat_border,
        precision=s.precision,
        progress=progress,
        scale=tile.scale,
        probabilities=confidence,
    )
    maps = [(classes, percent(p.max(axis=0)) if confidence else None) for classes, p in strips]
    pred = np.concatenate([classes for classes, _ in maps])
    return pred, np.concatenate([sure for _, sure in maps]) if confidence else None


def count_other(pred: np.ndarray, tile: Tile, num_classes: int) -> np.ndarray | str:
    """The confusion (K, K) of a prediction with a tile's other labels, or, in a line, why they
    cannot be read.
    """
    try:
        truth = tile.read_labels()
    except DataError as error:
        return str(error)
    matrix = ConfusionMatrix(num_classes)
    H, W = (
        min(a, b) for a, b in zip(pred.shape, truth.shape)
    )  # files may differ by a row: `Tile.size`
    matrix.update(pred[:H, :W], truth[:H, :W])
    return matrix.counts


def merged(team: Team, part: dict) -> dict:
    return {name: value for own in team.gather(part) for name, value in own.items()}


def sum_up(counts: dict[str, np.ndarray], names: list[str], dataset, protocol: dict) -> dict:
    """The scores of all tiles together, in `per_tile` those of each, and in `convention` what they
    mean.
    """
    K = len(dataset.classes)
    total, per_tile = ConfusionMatrix(K, dataset.scored), {}
    for name in names:
        own = ConfusionMatrix(K, dataset.scored)
        own.counts = counts[name]
        total.counts += own.counts
        kept = ("oa", "mf1", "miou", "kappa", "pixels", "confusion")
        per_tile[name] = {k: v for k, v in own.scores().items() if k in kept}
    result = total.scores()
    for name, row in zip(dataset.class_names, result["per_class"]):
        row["name"] = name
    averaged = (
        "all classes"
        if len(dataset.scored) == K
        else ", ".join(dataset.class_names[k] for k in dataset.scored)
    )
    labels = dataset.labels_note if protocol["split"] != "train" else "full labels"
    border = (
        "border windows counted as published" if protocol["repeat_border"] else "each window once"
    )
    result["convention"] = (
        f"{protocol['split']} split, {labels}; mF1 and mIoU average {averaged}; "
        f"OA and kappa count all {K} classes; "
        f"windows of {protocol['window']} at stride {protocol['stride']}, logits averaged, {border}"
    )
    return {**result, "labels": labels, "per_tile": per_tile}


def format_scores(scores: dict) -> str:
    """The scores as a table in percent, with the convention."""

    def cell(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.2f}"

    lines = [f"{'class':<16}   IoU     F1   prec.  recall      pixels"]
    for row in scores["per_class"]:
        values = " ".join(cell(row[key]) for key in ("iou", "f1", "precision", "recall"))
        lines.append(f"{row['name']:<16}{values} {row['pixels']:11,}")
    for name, part in (
        ("", scores),
        *((name, scores[name]) for name in OTHER_LABELS if name in scores),
    ):
        means = "  ".join(f"{label} {cell(part[key]).strip()}" for label, key in SUMMARY)
        beside = f" with {name.replace('_', ' ')}" if name else ""
        lines.append(f"{means}  ({part['pixels']:,} pixels{beside})")
    return "\n".join(
        [
            *lines,
            f"({scores['convention']})",
            *(f"note: {note}" for note in scores.get("notes", [])),
        ]
    )


# Where a score with the labels that are not the convention's is kept.
OTHER_LABELS = ("full_labels", "eroded_labels")


SUMMARY = (("OA", "oa"), ("mF1", "mf1"), ("mIoU", "miou"), ("kappa", "kappa"))


def scores_name(ran: Settings, asked: Settings, split: str, stride: int, final: bool) -> str:
    """The file for the scores of a run: scores.json for those by its own protocol at its end.

    What was scored otherwise (`asked`, at `stride`) is kept under a name that says how."""
    parts = [] if split == "test" else [split]
    parts += [] if final else ["unfinished"]
    parts += [] if stride == ran.eval_stride else [f"stride{stride}"]
    if asked.repeat_border != ran.repeat_border:
        parts.append("border" if asked.repeat_border else "no-border")
    if asked.full_labels != ran.full_labels:
        parts.append("full-labels" if asked.full_labels else "eroded-labels")
    return "_".join(["scores", *parts]) + ".json"
