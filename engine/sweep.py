"""Makes the cells of a table: each row with each seed, by train.py, in processes of their own.

A cell that fails spoils nothing but itself. On a machine with several GPUs a cell is made on each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Callable

import torch

from engine.commandline import parse_settings
from engine.console import Mistake
from engine.cost import machine
from engine.identity import HOME, Identities
from engine.plan import measure_image
from engine.settings import Settings, flag, words_of
from engine.store import Store, result_of_run
from engine.tables import Row
from engine.training import TrainingStopped
from geodata.rasters import DataError
from sam_vit import WeightsError

TRAIN = HOME / "train.py"


@dataclass
class Cell:
    """A row with a seed: one run, and one line of the store."""

    row: Row
    s: Settings
    words: list[str]  # of train.py
    key: str
    is_current: Callable[[], bool]  # whether code and files are still those of the key
    base: str  # SHA-256 of the backbone in it
    scored: tuple[int, ...]  # the classes that means average

    @property
    def name(self) -> str:
        return f"{self.row.name}/seed-{self.s.seed}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", f"{self.name}_{self.key[:16]}")


@dataclass
class Job:
    cell: Cell
    child: subprocess.Popen
    claim: int
    slot: int
    start: float = field(default_factory=time.monotonic)


def check_given(rows: list[Row], given: dict) -> None:
    """Raises Mistake for a flag that contradicts what a row sets."""
    for row in rows:
        for name, value in given.items():
            ours = row.settings.get(name, value)
            clash = ours != value
            if name == "tuner_option":  # words, of which a row sets some or none
                pairs = (word.partition("=")[::2] for word in value)
                ours = row.settings.get(name, {})
                clash = any(str(ours[k]) != v for k, v in pairs if k in ours)
            if clash:
                row_sets = f"the row {row.name}, which is of {ours}"
                raise Mistake(f"{flag(name)} {value} contradicts {row_sets}")


def cells_of(
    rows: list[Row], seeds: list[int], given: dict, published: bool, ids: Identities
) -> tuple[list[Cell], list[str]]:
    """The cells of rows, seed by seed, and in a line each why a row cannot be made. Raises Mistake
    for settings that cannot be."""
    cells, missing = [], []
    for seed in dict.fromkeys(seeds):
        for row in rows:
            parts = {k: v for k, v in row.settings.items() if k not in given or k == "tuner_option"}
            words = [*words_of(given), *words_of({**parts, "seed": seed})]
            words += ["--as-published"] * published
            try:
                s, *_ = parse_settings(words)
                key, base, scored = ids.key(s), ids.base(s), tuple(ids.dataset(s).scored)
            except (DataError, WeightsError) as error:
                line = f"{row.name}: {error}"
                missing += [line] if line not in missing else []
                continue
            cells.append(Cell(row, s, words, key, ids.watch(s), base, scored))
    return cells, missing


class Sweep:
    """Makes cells into a store, at most one a slot at a time; `say` prints a line."""

    def __init__(self, store: Store, device: torch.device, processes: int = 1, cost: bool = False):
        self.store, self.device, self.processes, self.cost = store, device, processes, cost
        several = device.type == "cuda" and device.index is None and processes == 1
        self.slots = list(range(torch.cuda.device_count())) if several else [0]
        self.failed: list[str] = []

    def make(self, cells: list[Cell], say: Callable[[str], None], noted: list[int]) -> None:
        """Makes what is missing, and waits for what another process makes. `noted` are signals that
        ask to stop. Raises TrainingStopped."""
        todo, elsewhere, jobs, waits = list(cells), [], [], False
        while todo or jobs or elsewhere:
            if noted:
                self.stop(jobs, noted[0])
            free = [slot for slot in self.slots if slot not in [job.slot for job in jobs]]
            if todo and free:
                cell = todo.pop(0)
                claim = self.store.claim(cell.folder)
                if claim is None:
                    elsewhere.append(cell)
                elif job := self.begin(cell, claim, free[0]):
                    jobs.append(job)
                continue
            for job in [job for job in jobs if job.child.poll() is not None]:
                jobs.remove(job)
                self.end(job, say)
            if elsewhere and not todo and (not jobs or free):
                if not waits and not jobs:
                    say(f"waiting for cells that another process makes: {elsewhere[0].name}")
                    waits = True
                todo, elsewhere = elsewhere, []
                time.sleep(0.5)
            time.sleep(0.05)

    def begin(self, cell: Cell, claim: int, slot: int) -> Job | None:
        """Starts a claimed cell, unless it is done, or its run was finished before it was noted."""
        if cell.key in self.store.read()[0] or self.keep(cell):
            os.close(claim)
            return None
        cells = self.store.path / "cells"
        run = cells / cell.folder
        words = [*cell.words, "--out", str(run)]
        if (run / "last.pt").exists():
            words = [word for word in words if word != "--as-published"] + ["--resume"]
        python = [sys.executable]
        if self.processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone"]
            python += [f"--nproc_per_node={self.processes}"]
        environment = dict(os.environ)
        if len(self.slots) > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = visible.split(",") if visible else [str(i) for i in self.slots]
            environment["CUDA_VISIBLE_DEVICES"] = names[slot]
        held = {"pass_fds": (claim,)} if os.name == "posix" else {}
        with open(cells / f"{cell.folder}.txt", "ab") as output:
            child = subprocess.Popen(
                [*python, str(TRAIN), *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, **held,
            )  # fmt: skip
        return Job(cell, child, claim, slot)

    def end(self, job: Job, say: Callable[[str], None]) -> None:
        """Keeps the result of a training process that ended, or the reason that there is none."""
        cell, code = job.cell, job.child.returncode
        output = self.store.path / "cells" / f"{cell.folder}.txt"
        reason = ""
        if not cell.is_current():
            reason = "code or tiles changed while it was trained; it is to be made again"
            shutil.rmtree(self.store.path / "cells" / cell.folder, ignore_errors=True)
        elif code:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit status {code}"
        elif (entry := self.keep(cell, job.slot)) is None:
            reason = "it ended without scores on its backbone"
        os.close(job.claim)
        if reason:
            self.failed.append(f"{cell.name} failed: {reason} ({output})")
            say(self.failed[-1])
        else:
            took = time.monotonic() - job.start
            say(f"{cell.name}: mIoU {100 * (entry['scores']['miou'] or 0):.2f}, {took:.0f} s")

    def keep(self, cell: Cell, slot: int = 0) -> dict | None:
        """Appends the line of a cell whose run is finished -> the line; None where it is not."""
        try:
            found = result_of_run(self.store.path / "cells" / cell.folder)
        except DataError:
            return None
        if found is None or found["base"]["sha256"] != cell.base:
            return None
        device = torch.device("cuda", slot) if len(self.slots) > 1 else self.device
        entry = {
            "key": cell.key, "cell": cell.name, "row": cell.row.name, "seed": cell.s.seed,
            **found, "scored": list(cell.scored), "settings": asdict(cell.s),
            "device": machine(device), "command": ["train.py", *cell.words],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        if self.cost:
            entry |= measure_image(cell.s, device)
        entry = json.loads(json.dumps(entry))
        self.store.append(entry)
        return entry

    def stop(self, jobs: list[Job], number: int) -> None:
        """Lets the training processes save, and ends."""
        for job in jobs:
            job.child.send_signal(signal.SIGTERM)
        for job in jobs:
            job.child.wait()
        again = "the same command goes on with what was begun"
        raise TrainingStopped(f"interrupted; {again}", status=128 + number)


def in_shard(cells: list[Cell], shard: str) -> list[Cell]:
    """Every n-th cell from the i-th on, of "i/n" with i from 1. Raises Mistake."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise Mistake(f"--shard {shard}: give I/N with I from 1 to N, as 2/8")
    return cells[i - 1 :: n]
