"""Scores a run on a split.

    python evaluate.py                       the newest run, on its test tiles
    python evaluate.py --run DIR --split train
    python evaluate.py --run DIR --stride 64 --full-labels
    python evaluate.py --without dsm         as if a raster were missing
    python evaluate.py --as-published        windows as the published code counts them
    python evaluate.py --table [DIR ...]     all runs in a table beside the paper's rows

Prints the scores with the convention they follow; `engine/scoring.py` says what is counted. The
run's `scores.json` is rewritten where it was scored by its own protocol at its end; any other score
goes to a file that says how it was made, as `scores_stride64.json` or `scores_train.json`. The same
run on the same machine gives the same digits. ISPRS's test tiles have eroded and full labels: the
score is that of the eroded ones (with --full-labels: of the full), and the other one is stored
beside it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from data import open_from_settings
from engine.checkpoints import is_finished, load_model, newest_run
from engine.console import Mistake, Parser, run_script, say_next, typed
from engine.device import pick_device, store_frozen_weights
from engine.files import write_text
from engine.given import to_lack
from engine.recipes import published_protocol
from engine.scoring import ConfusionMatrix, format_scores, score_split, scores_name
from engine.settings import Settings, flag, held_out_tiles
from fast import accelerate
from geodata.kinds import ordered
from geodata.rasters import DataError, one_line
from reports.panels import save_panel
from reports.report import write_report
from reports.table import markdown, read_runs
from sam_vit import WeightsError

__all__ = ["ConfusionMatrix", "score_split"]  # from engine/scoring.py, for users


def evaluate(run: Path, args: argparse.Namespace) -> None:
    """Scores a run, prints the scores, and writes them where its folder can be written."""
    model, ran, classes = load_model(run / "model.pt", args.weights)
    s = published_protocol(ran) if args.as_published else replace(ran)
    s.full_labels = s.full_labels or args.full_labels
    s.root = args.root or s.root
    if s.data == "synthetic" and not Path(s.root).is_dir():
        raise DataError(f"{s.root}: no such folder; give that of the synthetic city by --root")
    dataset = open_from_settings(s)
    if (names := [name for name, _ in classes]) != dataset.class_names:
        listed = f"{', '.join(names)}, and {dataset.name} has {', '.join(dataset.class_names)}"
        raise DataError(f"{run} tells apart {listed}; score it on tiles of its own classes")
    if s.val:
        dataset = dataset.hold_out(held_out_tiles(s.val))
    dataset.withheld = withheld(args.without, s, run)
    device = pick_device(args.device)
    store_frozen_weights(model, s.precision, device)
    accelerate(model.to(device))
    stride, failed = s.eval_stride if args.stride is None else args.stride, []
    final, without = is_finished(run / "model.pt"), "+".join(dataset.withheld)
    scored = (run / "scores.json").exists()
    name = scores_name(ran, s, args.split, stride, final, without, scored)
    beside = f"_without-{without}" if without else ""

    def keep(tile, pred, confidence) -> None:
        path = run / "pictures" / f"{args.split}_{tile.name}{beside}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_panel(path, tile, pred, confidence, dataset.classes)
        except OSError as error:
            failed.append(error)

    own_panels = name in (f"scores{beside}.json", f"scores_{args.split}{beside}.json")
    scores = score_split(model, dataset, args.split, s, stride, keep if own_panels else None)
    print(f"{run}: {s.encoder}, {s.tuner}, {s.modalities}, fusion {s.fusion}")
    print(format_scores(scores))
    if "unfinished" in name:
        go_on = typed("train.py", "--resume", "--out", run)
        print(f"note: {run} was not trained to its end; go on: {go_on}")
    try:
        if failed:
            raise failed[0]
        write_text(run / name, json.dumps(scores, indent=1))
        if name == "scores.json" and (run / "config.json").exists():
            write_report(run)
        print(f"{run / name}; next: {typed('explain.py', '--run', run)}")
    except OSError as error:
        print(f"note: the scores are not kept, {run} cannot be written ({one_line(error)})")


def withheld(without: str, s: Settings, run: Path) -> tuple[str, ...]:
    """The rasters that --without names. Raises Mistake for those that the run cannot do without."""
    names = tuple(ordered(without, "--without").split("+")) if without else ()
    if others := ", ".join(name for name in names if name not in s.rasters):
        raise Mistake(f"--without {others}: {run} was trained on {', '.join(s.rasters)}")
    if len(names) == len(s.rasters):
        raise Mistake(f"--without {without}: nothing is left of {s.modalities}")
    if not {*names} <= {*s.may_lack}:
        raise Mistake(f"--without {without}: {run} cannot do without; to train one: {to_lack(s)}")
    return names


def main() -> None:
    parser = Parser(prog="evaluate.py", description="Scores a run on a split.")
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run; by default the newest below runs/")
    add("--split", default="test", help="test (default), train, or another split of the data set")
    add("--root", help="folder of the data set; by default where the run found it")
    add("--stride", type=int, help="pixels between windows; by default as the run was scored")
    add("--full-labels", action="store_true", help="score by the full labels, not the eroded ones")
    add("--without", default="", metavar="NAME", help="score as if this raster were missing")
    add("--as-published", action="store_true", help="the published code's stride, border windows")
    add("--weights", help="where SAM's weights are now; by default as the run found them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    text = "print the runs in these folders, or all"
    add("--table", nargs="*", type=Path, metavar="DIR", help=text)
    args = parser.parse_args()
    if args.table is None:
        return evaluate(args.run or newest_run(), args)
    for name, value in vars(args).items():
        if name not in ("run", "table") and value != parser.get_default(name):
            parser.error(f"--table shows runs as they were scored; leave out {flag(name)}")
    folders = [*args.table, *([args.run] if args.run else [])]
    runs, skipped = read_runs(folders or [Path("runs")])
    for line in skipped:
        print(line, file=sys.stderr)
    print(markdown(runs))
    best = max(runs, key=lambda run: run.scores["miou"] or 0)
    say_next(typed("explain.py", "--run", best.folder))


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
