"""Benchmarks: the paper's tables and other sweeps, by one command that may be killed.

    python benchmark.py table4                        the paper's seven rows on the synthetic city
    python benchmark.py table1 --root DIR             Vaihingen, beside the paper's competitors
    python benchmark.py tuners --seeds 0 1 --epochs 5 any flag of train.py goes to every cell
    python benchmark.py table4 --list                 the cells, and what each will take
    python benchmark.py table4 --shard 2/8            every eighth cell, for a job array
    python benchmark.py speed                         the accelerated network against the plain
    python benchmark.py device                        all of a GPU, in nine minutes
    python benchmark.py plan vaihingen                hours and memory of the paper's recipe

A sweep makes every cell (a row with a seed) that its folder lacks, goes on with what was
interrupted, and prints the table. results.jsonl in the folder holds a line a cell, by a key of
settings, code, backbone and pixels; results.html shows it.
"""

from __future__ import annotations

import argparse
import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from data import open_from_settings
from engine import plan, speed, survey
from engine.commandline import add_settings, given_settings
from engine.console import Mistake, Parser, run_script, say_next, typed
from engine.device import pick_device
from engine.files import write_text
from engine.identity import Identities
from engine.plugins import load_given_plugins
from engine.recipes import recipe
from engine.settings import Settings
from engine.signals import noted_signals
from engine.store import Store
from engine.sweep import Cell, Sweep, cells_of, check_given, in_shard
from engine.tables import TABLES, rows_of
from geodata.rasters import DataError
from reports.sweep import as_csv, as_latex, lines_of, markdown, write_sweep_page
from sam_vit import WeightsError


def add_flags(parser: Parser, data: str) -> None:
    """The flags of a sweep, and those of train.py but for what a sweep sets by itself."""
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a cell for each row and seed")
    add("--out", type=Path, help="folder of the sweep; by default results/NAME_DATA")
    add(
        "--reuse", type=Path, nargs="+", metavar="DIR", default=[], help="sweeps with cells to take"
    )
    add("--only", metavar="PATTERN", help="cells by name, as '*lora*' or '*/seed-0'")
    add("--shard", metavar="I/N", help="every N-th cell from the I-th on")
    add("--list", action="store_true", help="print the cells and what they take; make none")
    add("--reference", metavar="ROW", help="the row that the others are compared with")
    add("--processes", type=int, default=1, help="of torchrun, for each cell")
    add("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    add("--latex", type=Path, metavar="FILE", help="write the table as LaTeX")
    add_settings(parser, Settings(**{**recipe(data), "data": data}), without=("seed", "out"))


def build_parser() -> Parser:
    parser = Parser(prog="benchmark.py", description=__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, table in TABLES.items():
        add_flags(names.add_parser(name, help=f"{table.title}, on {table.data}"), table.data)
    speed.add_flags(names.add_parser("speed", help="the accelerated network against the plain"))
    text = "all that a GPU is to be asked, in some minutes"
    survey.add_flags(names.add_parser("device", help=text))
    plan.add_flags(names.add_parser("plan", help="hours and memory of a data set's recipe"))
    return parser


def sweep(args: argparse.Namespace) -> int:
    """Makes and shows a table -> the exit status."""
    table = TABLES[args.name]
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise Mistake("a sweep starts torchrun by itself: give it --processes N")
    if min(args.seeds) < 0 or args.processes < 1:
        raise Mistake("--seeds begin at 0, --processes at 1")
    given = given_settings(args)
    given.setdefault("data", table.data)
    del given["out"]  # the sweep's
    if table.data != "synthetic" and given["data"] not in (table.data, "synthetic"):
        raise Mistake(f"--data {given['data']} contradicts {args.name}, which is of {table.data}")
    rows = rows_of(args.name, given["data"], given.get("encoder") if table.sizes else None)
    check_given(rows, given)
    out = args.out or Path("results") / f"{args.name}_{given['data']}"
    reference = args.reference or table.reference or rows[-1].name
    if reference not in (names := [row.name for row in rows]):
        raise Mistake(f"--reference {reference}: the rows of {args.name} are {', '.join(names)}")
    device, cells = pick_device(given.get("device", "auto")), []
    store = Store.open(out, args.name, given["data"])
    try:
        with store.lock():  # one process at a time makes the city
            ids = Identities(open_from_settings, device)
            cells, missing = cells_of(rows, args.seeds, given, args.as_published, ids)
    finally:
        if not cells:
            store.discard()
    if not cells:
        raise Mistake(f"no row of {args.name} can be made: {missing[0]}")
    for line in missing:
        print(line, file=sys.stderr)
    chosen = [c for c in cells if args.only is None or fnmatchcase(c.name, args.only)]
    chosen = in_shard(chosen, args.shard) if args.shard else chosen
    if not chosen:
        raise Mistake(f"--only {args.only}, --shard {args.shard}: no cell of {args.name}")
    if args.reuse and table.cost:
        raise Mistake(f"--reuse: {args.name} times each cell itself; leave it out")
    for other in args.reuse:
        store.take_over(other, {c.key: {"cell": c.name, "row": c.row.name} for c in chosen})
    done, damaged = store.read()
    for line in damaged:
        print(line, file=sys.stderr)
    if args.list:
        print_cells(chosen, store, device, ids)
        return 0
    work = Sweep(store, device, args.processes, table.cost)
    with noted_signals() as noted:
        work.make(chosen, lambda line: print(line, flush=True), noted)
    show(args, store, reference, cells)
    return 1 if missing or work.failed else 0


def show(args: argparse.Namespace, store: Store, reference: str, cells: list[Cell]) -> None:
    """Prints the table of all that is done, and writes it where it is asked for."""
    done, table = store.read()[0], TABLES[args.name]
    rows = {cell.row.name: cell.s.modalities for cell in cells}
    results = [done[cell.key] for cell in cells if cell.key in done]
    lines = lines_of(args.name, rows, results, reference)
    print(markdown(args.name, lines, reference, table.cost))
    if len(results) < len(cells):
        print(f"{len(cells) - len(results)} of {len(cells)} cells are not made yet: --list")
    if len(done) > len(results):
        print(f"{len(done) - len(results)} results of other settings, code or tiles are not shown")
    with store.lock():
        page = store.path / "results.html"
        write_sweep_page(page, args.name, table.title, lines, reference)
    texts = (args.csv, as_csv(lines, reference)), (args.latex, as_latex(lines, table.cost))
    for path, text in texts:
        try:
            if path is not None:
                write_text(path, text)
        except OSError as error:
            raise Mistake(f"{path} cannot be written ({error.strerror})") from error
    say_next(typed("-m", "webbrowser", page))


def print_cells(cells: list[Cell], store: Store, device: torch.device, ids: Identities) -> None:
    """The cells, how far each is, and what a plan or a finished one of its row says it takes."""
    done, told = store.read()[0], {}
    for cell in cells:
        row, state = cell.row.name, store.state(cell.folder, cell.key, done, cell.s)
        for other in cells:
            if other.row.name == row and other.key in done:
                seconds = done[other.key]["seconds"]
                told.setdefault(row, f"{seconds:.0f} s of training, as {other.name}")
        if row not in told:
            told[row] = plan.in_words(cell.s, ids.dataset(cell.s), device)
        print(f"{cell.name}: {state}; {told[row]}")


def main() -> None:
    load_given_plugins("benchmark.py")
    args = build_parser().parse_args()
    if args.name == "speed":
        return speed.compare_networks(args)
    if args.name == "device":
        return survey.survey_device(args)
    if args.name == "plan":
        return plan.print_plan(args)
    if status := sweep(args):
        sys.exit(status)


if __name__ == "__main__":
    run_script(main, DataError, WeightsError)
