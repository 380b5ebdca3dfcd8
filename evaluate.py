"""Scores a run on a split.

    python evaluate.py                       the newest run, on its test tiles
    python evaluate.py --run DIR --split train --stride 64
    python evaluate.py --as-published        windows and border windows as the published code counts them
    python evaluate.py --table [DIR ...]     all runs in a table beside the paper's rows; see table.py

Prints the scores with the convention they follow, and writes them to the run's `scores.json`
(another split: `scores_SPLIT.json`). The same run on the same machine gives the same digits.
ISPRS's test tiles have eroded and full labels: the score is that of the eroded ones (with
--full-labels: of the full), and the other one is stored beside it.

Every number comes from one int64 confusion matrix, rows truth, columns prediction. OA and kappa
count all classes; mF1 and mIoU are the plain means over the data set's scored classes (ISPRS:
without clutter), without those that appear neither in the truth nor in the prediction."""

from __future__ import annotations

import sys
from pathlib import Path

from data import open_from_settings
from engine.checkpoints import load_model, newest_run
from engine.console import Parser, Ticker, run_script
from engine.device import pick_device, store_frozen_weights
from engine.scoring import ConfusionMatrix, format_scores, score_run, score_split
from engine.settings import PUBLISHED_STRIDES, held_out_tiles
from geodata.rasters import DataError
from reports.report import write_report
from reports.table import markdown, read_runs

__all__ = ["ConfusionMatrix", "score_split"]  # from engine/scoring.py, for users


def as_published(settings: dict) -> dict:
    """The settings of a run, with the windows that the published code scores with (PAPER.md 2,
    3.5).

    A data set that was not published keeps the run's stride.
    """
    _, stride = PUBLISHED_STRIDES.get(settings["data"], (0, settings["eval_stride"]))
    return {**settings, "repeat_border": True, "eval_stride": stride}


def print_table(folders: list[Path]) -> None:
    runs, skipped = read_runs(folders)
    for line in skipped:
        print(line, file=sys.stderr)
    print(markdown(runs))


def main() -> None:
    parser = Parser(prog="evaluate.py", description="Scores a run on a split.")
    parser.add_argument(
        "--run", type=Path, help="folder of a run; by default the newest below runs/"
    )
    parser.add_argument(
        "--split", default="test", help="test (default), train, or another split of the data set"
    )
    parser.add_argument("--root", help="folder of the data set; by default where the run found it")
    parser.add_argument(
        "--stride", type=int, help="pixels between windows; by default as the run was scored"
    )
    parser.add_argument(
        "--full-labels",
        action="store_true",
        help="score by the full labels first, not the eroded ones",
    )
    parser.add_argument(
        "--as-published", action="store_true", help="the published code's stride and border windows"
    )
    parser.add_argument(
        "--weights", help="where SAM's weights are now; by default as the run found them"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--table",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="print the runs in these folders, or all",
    )
    args = parser.parse_args()
    if args.table is not None:
        for name, value in vars(args).items():
            if name not in ("run", "table") and value != parser.get_default(name):
                parser.error(
                    f"--table shows runs as they were scored; leave out --{name.replace('_', '-')}"
                )
        print_table([*args.table, *([args.run] if args.run else [])] or [Path("runs")])
        return
    run = args.run or newest_run()
    model, settings, classes = load_model(
        run / "model.pt", args.weights, Ticker("fetching SAM's weights, bytes")
    )
    if args.full_labels:
        settings["full_labels"] = True
    dataset = open_from_settings(settings, args.root)
    names = [name for name, _ in classes]
    if names != dataset.class_names:
        listed = f"{', '.join(names)}, and {dataset.name} has {', '.join(dataset.class_names)}"
        raise DataError(f"{run} tells apart {listed}; score it on tiles of its own classes")
    if args.as_published:
        settings = as_published(settings)
    if settings["val"]:
        dataset = dataset.hold_out(held_out_tiles(settings["val"]))
    device = pick_device(args.device)
    store_frozen_weights(model, settings["precision"], device)
    model.to(device)
    stride = settings["eval_stride"] if args.stride is None else args.stride
    scores = score_run(run, model, dataset, args.split, settings, stride)
    if args.split == "test":
        write_report(run)
    print(
        f"{run}: {settings['encoder']}, {settings['tuner']}, {settings['modalities']}, fusion {settings['fusion']}"
    )
    print(format_scores(scores))


if __name__ == "__main__":
    run_script(main)
