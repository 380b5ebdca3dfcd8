"""Scores a run on a split.

    python evaluate.py                       the newest run, on its test tiles
    python evaluate.py --run DIR --split train --stride 64

Prints the scores with the convention they follow, and writes them to the run's `scores.json` (another split:
`scores_SPLIT.json`). The same run on the same machine gives the same digits.

Every number comes from one int64 confusion matrix, rows truth, columns prediction. OA and kappa count all classes;
mF1 and mIoU are the plain means over the data set's scored classes (ISPRS: without clutter), without those that
appear neither in the truth nor in the prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import numpy as np
import torch.nn as nn

from checkpoints import load_model, newest_run, pick_device, replace_atomically
from console import Parser, Ticker, run_script
from data import MODALITIES, DataError, Dataset, LoadedTile, open_from_settings, sliding_windows
from distributed import Team
from predict import percent, predict_strips, store_frozen_weights
from report import save_panel, write_report
from settings import held_out_tiles


class ConfusionMatrix:
    """Counts pixels by (truth, prediction); `scored` are the classes that the means average, by default all."""

    def __init__(self, num_classes: int, scored: tuple[int, ...] | None = None, ignore: int = 255):
        self.counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.scored = tuple(range(num_classes)) if scored is None else tuple(scored)
        self.ignore = ignore

    def update(self, pred: np.ndarray, truth: np.ndarray) -> None:
        """Adds two maps of one shape. Pixels whose truth is `ignore` do not count, whatever was predicted there.

        Raises ValueError for maps of different shapes and for labels that are no class.
        """
        if pred.shape != truth.shape:
            raise ValueError(f"prediction {pred.shape} and truth {truth.shape} differ in shape")
        K = len(self.counts)
        counted = truth != self.ignore
        t, p = truth[counted].astype(np.int64), pred[counted].astype(np.int64)
        if t.size and (min(t.min(), p.min()) < 0 or max(t.max(), p.max()) >= K):
            raise ValueError(f"labels outside 0 to {K - 1}: truth up to {t.max()}, prediction up to {p.max()}")
        self.counts += np.bincount(t * K + p, minlength=K * K).reshape(K, K)

    def scores(self) -> dict:
        """oa, mf1, miou, kappa (0 to 1; None where nothing was counted), per_class, confusion, pixels.

        per_class lists iou, f1, precision, recall, pixels (of the truth) of each class; a value whose denominator is
        zero is None, and a class without iou and f1 is left out of the means.
        """
        hits = np.diag(self.counts)
        truth, pred, total = self.counts.sum(axis=1), self.counts.sum(axis=0), int(self.counts.sum())
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
        oa = ratio(hits.sum(), total)
        chance = float((truth / max(total, 1)) @ (pred / max(total, 1)))
        return {
            "oa": oa,
            "mf1": self._mean(per_class, "f1"),
            "miou": self._mean(per_class, "iou"),
            "kappa": (oa - chance) / (1 - chance) if oa is not None and chance < 1 else None,
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
    dataset: Dataset,
    split: str,
    settings: dict,
    stride: int,
    keep: Callable[[LoadedTile, np.ndarray, np.ndarray], None] | None = None,
    team: Team = Team(),
) -> dict:
    """Predicts and scores every tile of a split -> scores of all, the same per tile, and the convention beside them.

    `keep(tile, prediction, confidence in percent)` is called for each tile, for whoever wants to see it. The members of
    a `team` take turns at the tiles and get the same scores.
    """
    modalities = MODALITIES[settings["modalities"]]
    tiles = dataset.tiles(split, modalities)
    window, K = settings["crop"], len(dataset.classes)
    if not 1 <= stride <= window:
        raise DataError(f"the stride lies between 1 and the window's {window} pixels, not {stride}")
    total, counts, windows = ConfusionMatrix(K, dataset.scored), {}, {}
    ticker = Ticker(f"scoring {split} tiles")
    for i, tile in list(enumerate(tiles))[team.rank :: team.world]:
        loaded = tile.load(modalities)
        rasters = [loaded.image if "image" in modalities else None, loaded.dsm]
        strips = predict_strips(
            model,
            *rasters,
            window,
            stride,
            settings["batch_size"],
            repeat_border=settings["repeat_border"],
            precision=settings["precision"],
            scale=loaded.scale,
            probabilities=keep is not None,
        )
        maps = [(classes, percent(p.max(axis=0)) if keep else None) for classes, p in strips]
        pred = np.concatenate([classes for classes, _ in maps])
        own = ConfusionMatrix(K, dataset.scored)
        own.update(pred, loaded.labels)
        counts[tile.name] = own.counts
        windows[tile.name] = len(sliding_windows(*loaded.size, window, stride))
        if keep:
            keep(loaded, pred, np.concatenate([confidence for _, confidence in maps]))
        if team.leads:
            ticker(i + 1, len(tiles))
    counts = {name: c for part in team.gather(counts) for name, c in part.items()}
    windows = {name: n for part in team.gather(windows) for name, n in part.items()}
    per_tile = {}
    for tile in tiles:
        own = ConfusionMatrix(K, dataset.scored)
        own.counts = counts[tile.name]
        total.counts += own.counts
        per_tile[tile.name] = {k: v for k, v in own.scores().items() if k in ("oa", "mf1", "miou", "kappa", "pixels")}
    result = total.scores()
    for name, row in zip(dataset.class_names, result["per_class"]):
        row["name"] = name
    averaged = "all classes" if len(dataset.scored) == K else ", ".join(dataset.class_names[k] for k in dataset.scored)
    note = dataset.labels_note if split != "train" else "full labels"
    border = "border windows counted as published" if settings["repeat_border"] else "each window once"
    result["convention"] = (
        f"{split} split, {note}; mF1 and mIoU average {averaged}; OA and kappa count all {K} classes; "
        f"windows of {window} at stride {stride}, logits averaged, {border}"
    )
    return {**result, "split": split, "windows": sum(windows.values()), "per_tile": per_tile}


def format_scores(scores: dict) -> str:
    """The scores as a table in percent, with the convention."""

    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:6.2f}"

    lines = [f"{'class':<16}   IoU     F1   prec.  recall      pixels"]
    for row in scores["per_class"]:
        values = " ".join(percent(row[key]) for key in ("iou", "f1", "precision", "recall"))
        lines.append(f"{row['name']:<16}{values} {row['pixels']:11,}")
    means = "  ".join(f"{label} {percent(scores[key]).strip()}" for label, key in SUMMARY)
    return "\n".join([*lines, f"{means}  ({scores['pixels']:,} pixels)", f"({scores['convention']})"])


SUMMARY = (("OA", "oa"), ("mF1", "mf1"), ("mIoU", "miou"), ("kappa", "kappa"))


def score_run(
    run: Path, model: nn.Module, dataset: Dataset, split: str, settings: dict, stride: int, team: Team = Team()
) -> dict:
    """Scores a split into the run's folder: scores.json (or scores_SPLIT.json), and pictures/ with a panel per tile."""
    pictures = run / "pictures"
    pictures.mkdir(exist_ok=True)

    def keep(tile: LoadedTile, pred: np.ndarray, confidence: np.ndarray) -> None:
        save_panel(pictures / f"{split}_{tile.name}.png", tile, pred, confidence, dataset.classes)

    scores = score_split(model, dataset, split, settings, stride, keep, team)
    path = run / ("scores.json" if split == "test" else f"scores_{split}.json")
    if team.leads:
        replace_atomically(path, lambda p: p.write_text(json.dumps(scores, indent=1), encoding="utf-8"))
    return scores


def main() -> None:
    parser = Parser(prog="evaluate.py", description="Scores a run on a split.")
    parser.add_argument("--run", type=Path, help="folder of a run; by default the newest below runs/")
    parser.add_argument("--split", default="test", help="test (default), train, or another split of the data set")
    parser.add_argument("--root", help="folder of the data set; by default where the run found it")
    parser.add_argument("--stride", type=int, help="pixels between windows; by default as the run was scored")
    parser.add_argument("--full-labels", action="store_true", help="score with the full labels, not the eroded ones")
    parser.add_argument("--weights", help="where SAM's weights are now; by default as the run found them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    run = args.run or newest_run()
    model, settings, classes = load_model(run / "model.pt", args.weights, Ticker("fetching SAM's weights, bytes"))
    if args.full_labels:
        settings["full_labels"] = True
    dataset = open_from_settings(settings, args.root)
    names = [name for name, _ in classes]
    if names != dataset.class_names:
        listed = f"{', '.join(names)}, and {dataset.name} has {', '.join(dataset.class_names)}"
        raise DataError(f"{run} tells apart {listed}; score it on tiles of its own classes")
    if settings["val"]:
        dataset = dataset.hold_out(held_out_tiles(settings["val"]))
    device = pick_device(args.device)
    store_frozen_weights(model, settings["precision"], device)
    model.to(device)
    stride = settings["eval_stride"] if args.stride is None else args.stride
    scores = score_run(run, model, dataset, args.split, settings, stride)
    if args.split == "test":
        write_report(run)
    print(f"{run}: {settings['encoder']}, {settings['tuner']}, {settings['modalities']}, fusion {settings['fusion']}")
    print(format_scores(scores))


if __name__ == "__main__":
    run_script(main)
