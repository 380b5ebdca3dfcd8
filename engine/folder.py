"""The folder of a run: held by one process at a time, every file in it whole or not there.

config.json   settings, base, classes, code, parameters
log.jsonl     a line for each epoch
last.pt       everything to go on, from before the first step
model.pt      what was trained; `finished` in it says whether training came to its end
plugins/      the plugins the run was trained with
scores.json, pictures/, report.html
"""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from engine.checkpoints import MODEL_KEYS, is_finished, read_content, save_tensors, saved_files
from engine.console import Mistake, typed
from engine.distributed import Team
from engine.files import write_text
from engine.locks import try_lock
from engine.settings import Settings
from engine.training import TrainingStopped
from sam_vit import WeightsError, first_line

LAST_KEYS = ("settings", "base", "data", "state", "optimizer", "progress")
# What a folder holds where something was trained or scored that is not to be lost.
KEPT = ("last.pt", "model.pt", "scores.json", "log.jsonl")


class RunFolder:
    """A folder that this process holds: a second one that opens it is refused."""

    def __init__(self, path: Path):
        self.path, self.lock = path, None

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def hold(self) -> None:
        """Raises Mistake where another process holds the folder; a killed one holds nothing."""
        if os.name != "posix":  # Windows locks no folder
            return
        try:
            self.lock = try_lock(self.path)
        except Mistake:  # a file system without locks
            return
        if self.lock is None:
            busy = f"{self.path} is being trained by another process"
            raise Mistake(f"{busy}; wait for it, or give another --out")
        # A process that cuts crops would hold it for seconds after this one was killed.
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A full disk or a folder that is gone ends the run with a line; what is written stays."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            if not self.path.exists():
                raise TrainingStopped(f"{self.path} is gone ({reason})") from error
            free = shutil.disk_usage(self.path).free / 1e6
            again = typed("train.py", "--resume", "--out", self.path)
            raise TrainingStopped(
                f"{self.path} cannot be written ({reason}, {free:,.0f} MB are free); what was "
                f"saved is intact: make room, then {again}"
            ) from error

    def write_text(self, name: str, text: str) -> None:
        with self.writing():
            write_text(self / name, text)

    def write_json(self, name: str, content: dict) -> None:
        self.write_text(name, json.dumps(content, indent=1))

    def versions(self, now: str, step: int, total: int) -> str:
        """What trained the run: the code of each part of it, `now` from `step` on."""
        path = self / "config.json"
        if step == 0 or not path.exists():
            return now
        before = str(json.loads(path.read_text(encoding="utf-8")).get("version"))
        same = before.endswith(now) or step >= total
        return before if same else f"{before}; from step {step}: {now}"

    def append_log(self, entry: dict) -> None:
        """Adds a line to log.jsonl, in place of what was logged from this step on."""
        kept = [line for line in self.log_lines() if json.loads(line)["step"] < entry["step"]]
        self.write_text("log.jsonl", "\n".join([*kept, json.dumps(entry)]) + "\n")

    def amend_log(self, **values) -> None:
        """Adds values to the last line of log.jsonl."""
        self.append_log({**json.loads(self.log_lines()[-1]), **values})

    def log_lines(self) -> list[str]:
        path = self / "log.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def is_finished(self) -> bool:
        """Whether the run came to its end and was scored."""
        path = self / "model.pt"
        return path.exists() and (self / "scores.json").exists() and is_finished(path)

    def reopen(self) -> None:
        """Takes back that the run is finished: what it was scored with is no longer its end."""
        for name in ("scores.json", "report.html"):
            (self / name).unlink(missing_ok=True)
        if (self / "model.pt").exists():
            content = read_content(self / "model.pt", MODEL_KEYS)
            with self.writing():
                save_tensors(self / "model.pt", {**content, "finished": False})


# ---------------------------------------------------------------------------------- new and resumed


def check_new(folder: Path) -> None:
    """Raises Mistake for a folder with a run, or files of one, unless it has not taken a step."""
    there = [name for name in KEPT if (folder / name).exists()]
    if there == ["last.pt"] and read_last(folder)["progress"]["step"] == 0:
        return
    if "last.pt" in there:
        again = typed("train.py", "--resume", "--out", folder)
        raise Mistake(f"{folder} holds a run; go on with it: {again}; or give another --out")
    if there:
        raise Mistake(f"{folder} holds {there[0]}, which a run would overwrite; give another --out")


def new_folder(s: Settings, team: Team) -> RunFolder:
    """The folder of a new run, made and held by the main process. Raises Mistake if that fails."""
    path = Path(team.broadcast(s.out or unused_name(s)))
    check_new(path)
    team.barrier()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--out {path}: the folder cannot be made ({error.strerror})") from error
    folder = RunFolder(path)
    if team.is_main:
        folder.hold()
    return folder


def unused_name(s: Settings) -> str:
    stem, serial = f"runs/{time.strftime('%Y%m%d-%H%M%S')}_{s.data}_{s.tuner}", 2
    path = Path(stem)
    while path.exists():
        path, serial = Path(f"{stem}-{serial}"), serial + 1
    return str(path)


def read_last(folder: Path) -> dict:
    """last.pt of a run. Raises WeightsError."""
    content = read_content(folder / "last.pt", LAST_KEYS)
    if type(content["progress"]) is not dict or type(content["progress"].get("step")) is not int:
        raise WeightsError(f"{folder / 'last.pt'}: not the file of a run, its progress is damaged")
    return content


def unfinished_run(runs: Path = Path("runs")) -> Path:
    """The folder below `runs`, those of --seeds included, that was saved last and is not finished.
    Raises Mistake."""
    saved = saved_files(runs, "last.pt")
    open_runs = [path.parent for path in saved if not (path.parent / "scores.json").exists()]
    if not open_runs:
        listed = f"; {saved[-1].parent} is the newest finished one" if saved else ""
        raise Mistake(f"there is no unfinished run below {runs.resolve()}{listed}; give --out DIR")
    return open_runs[-1]
