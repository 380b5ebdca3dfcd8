"""Everything that a machine is to be asked, in one go and within some minutes: `benchmark.py
device`.

Parts come in the order of what is wanted most. The report is written after each, so that what ends
early is not lost; what failed, or what no time was left for, stays in with the reason. Runs are
those of train.py, in processes of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterator

import torch

from engine.checkpoints import read_content
from engine.console import Mistake, Parser, say_next
from engine.cost import machine
from engine.device import pick_device, version
from engine.files import write_text
from engine.plan import plan
from engine.recipes import recipe
from engine.settings import Settings
from engine.speed import Case, measure_and_keep, variants_of
from engine.tables import rows_of
from geodata.synthetic import open_city
from sam_vit import SIZES, first_line

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PARTS = ("speed", "resume", "tile", "runs", "plan")


@dataclass
class Survey:
    """What is asked of which device; `out` is the CSV of rows, with the report beside it."""

    args: argparse.Namespace
    device: torch.device
    deadline: float  # of time.monotonic
    folder: Path  # for runs; it goes at the end

    @property
    def left(self) -> float:
        """Seconds. Raises Mistake where none is left."""
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise Mistake("not measured: no time was left")
        return seconds

    # ---------------------------------------------------------------------------------------- speed

    def measure(self, case: Case, more: tuple[str, ...] = ()) -> str:
        """Plain and fast network in fp32 and bf16, in one process, and `more` orders."""
        repeats = 1 if case.task == "tile" else self.args.repeats
        cases = variants_of(case, ("bf16",), more)
        return measure_and_keep(cases, repeats, self.device, self.args.out, memory=False)

    # ----------------------------------------------------------------------------------------- runs

    def start(self, *words: str) -> subprocess.Popen:
        """train.py on a synthetic city; what it says goes into a file beside its run."""
        name = words[words.index("--out") + 1]
        with (self.folder / f"{name}.txt").open("ab") as output:
            command = [sys.executable, str(TRAIN), *words]
            return subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=output)

    def wait_for(self, child: subprocess.Popen, name: str, kill: bool = False) -> None:
        """Waits for the end of a run; with `kill` it gets SIGKILL after its first epoch. Raises
        RuntimeError with its last line where it ends otherwise."""
        log, output = self.folder / name / "log.jsonl", self.folder / f"{name}.txt"
        try:
            while child.poll() is None and self.left:
                if kill and log.exists() and log.read_text():
                    child.kill()
                    if child.wait() != 0:
                        return
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            lines = output.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {child.returncode}")
        if kill:
            raise RuntimeError("the run ended before it could be killed")

    def train(self, name: str, *words: str, kill: bool = False) -> None:
        self.wait_for(self.start("--out", name, *words), name, kill)

    def scores(self, run: str) -> dict:
        return json.loads((self.folder / run / "scores.json").read_text())

    def scores_by_precision(self) -> str:
        """mIoU of the city in fp32 and in bf16 with each seed, all of them at once."""
        device, names = ("--device", self.args.device), {}
        if "--root" not in self.args.train:
            open_city(self.folder / "data" / "synthetic")  # or each of them would make it
        for precision in ("fp32", "bf16"):
            for seed in map(str, self.args.seeds):
                name = f"{precision}-{seed}"
                how = ("--seed", seed, "--precision", precision, *device, *self.args.train)
                names[name] = self.start("--out", name, *how)
        lines = []
        for name, child in names.items():
            try:
                self.wait_for(child, name)
                lines.append(f"{name}: mIoU {100 * (self.scores(name)['miou'] or 0):.2f}")
            except (RuntimeError, Mistake) as error:
                lines.append(f"{name}: {error}")
        return "\n".join(lines)

    def killed_and_resumed(self) -> str:
        """Whether a run that was killed goes on to the bits of one that was not."""
        always = ("--seed", "0", "--deterministic", "--device", self.args.device, *self.args.train)
        self.train("whole", *always)
        self.train("killed", *always, kill=True)
        self.train("killed", "--resume")
        whole, killed = (self.trained(run) for run in ("whole", "killed"))
        same = whole.keys() == killed.keys()
        differ = [n for n in whole if not (same and torch.equal(whole[n], killed[n]))]
        scores = "the same" if self.scores("whole") == self.scores("killed") else "other"
        return f"{len(differ)} of {len(whole)} tensors differ; {scores} scores"

    def trained(self, run: str) -> dict[str, torch.Tensor]:
        path = self.folder / run / "model.pt"
        return read_content(path, ("state",))["state"]

    def from_cpu_to_device(self) -> str:
        """A run that begins on the CPU and goes on here, and its score."""
        self.train("moved", "--seed", "0", "--device", "cpu", *self.args.train, kill=True)
        self.train("moved", "--resume", "--device", self.args.device)
        return f"mIoU {100 * (self.scores('moved')['miou'] or 0):.2f}"

    # ----------------------------------------------------------------------------------------- plan

    def plan(self, settings: dict) -> str:
        given = {"data": "vaihingen", **settings}
        s = Settings(**{**recipe("vaihingen", settings["encoder"]), **given})
        s.complete()
        return plan(s, self.device)

    # ---------------------------------------------------------------------------------------- parts

    def parts(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """(title, what gives its text) of every part that was asked for."""
        args = self.args
        first, *others = args.encoders
        case = Case("step", first, "adapter", args.crop, args.batch, "", "")
        if "speed" in args.parts:
            yield "Training step", lambda: self.measure(case)
            yield "Forward", lambda: self.measure(replace(case, task="network"))
        if "resume" in args.parts:
            yield "Killed and resumed, --deterministic", self.killed_and_resumed
            yield "Begun on the CPU, gone on with here", self.from_cpu_to_device
        if "tile" in args.parts:
            tile = replace(case, task="tile", encoder=others[0] if others else first)
            yield "A whole tile at stride 32", lambda: self.measure(tile)
        if "runs" in args.parts:
            yield "Scores of the city", self.scores_by_precision
        if "speed" in args.parts:
            for change in (
                dict(task="encoder"),
                dict(tuner="lora"),
                *(dict(encoder=encoder) for encoder in others),
                *(dict(encoder=encoder, task="network") for encoder in others),
                *(dict(crop=crop) for crop in args.more_crops),
            ):
                title = ", ".join(f"{name} {value}" for name, value in change.items())
                yield title, lambda change=change: self.measure(replace(case, **change))
        if "plan" in args.parts:
            for row in rows_of("table1", "vaihingen", None if others else first):
                yield f"Plan: {row.name}", lambda row=row: self.plan(row.settings)
        if "speed" in args.parts:
            compiled = ("compiled",) if self.device.type == "cuda" else ()
            yield "With all variants", lambda: self.measure(case, ("checkpointed", *compiled))


def take(survey: Survey) -> None:
    """Does every part, and writes the report after each."""
    args, report = survey.args, [f"# {machine(survey.device)}", version()]
    path = args.out.with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    for title, work in survey.parts():
        start = time.monotonic()
        try:
            text = work() if survey.left else ""
            if survey.device.type == "cuda":
                gc.collect()  # compiled blocks refer to themselves
                torch.cuda.empty_cache()
        except Exception as error:  # whatever it is, the other parts are wanted
            text = first_line(error)
        heading = "" if text.startswith("## ") else f"## {title}\n\n"
        text = f"{heading}{text.strip()}\n\n({time.monotonic() - start:.0f} s)\n"
        print(text, flush=True)
        report.append(text)
        write_text(path, "\n\n".join(report))


# --------------------------------------------------------------------------------- the command line


def add_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--minutes", type=float, default=9, help="after which no further part is begun")
    add("--encoders", nargs="+", choices=list(SIZES), default=["vit_l", "vit_b", "vit_h"])
    add("--crop", type=int, default=256, help="pixels")
    add("--more-crops", type=int, nargs="*", default=[224, 448], help="of the training step")
    add("--batch-size", "--batch", dest="batch", type=int, default=10, help="images")
    add("--repeats", type=int, default=7)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the city's runs")
    add("--out", type=Path, default=Path("benchmarks/DEVICE.csv"), help="and .md beside it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--train", nargs=argparse.REMAINDER, default=[], help="flags of train.py, for every run")


def survey_device(args: argparse.Namespace) -> None:
    """Raises Mistake."""
    if min(args.batch, args.repeats) < 1 or min([args.crop, *args.more_crops]) < 64:
        raise Mistake("--batch-size and --repeats begin at 1, --crop and --more-crops at 64")
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        take(Survey(args, device, time.monotonic() + 60 * args.minutes, Path(folder)))
    say_next("python -m pytest -q")
