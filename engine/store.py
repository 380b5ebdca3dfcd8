"""A sweep's folder: `results.jsonl`, one line a finished cell, and the folders of its runs.

    sweep.json       which table of which data this is
    results.jsonl    a line a cell: key, settings, scores by tile too, cost, and its own SHA-256
    cells/           a run's folder a cell, NAME_KEY; beside it its output and its lock

A cell is done if a whole line has its key. A line is appended under a lock, and a cell is claimed
by a lock that its training process holds too: whichever process is killed, no cell is made twice.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from engine.console import Mistake
from engine.files import write_text
from engine.folder import RunFolder, read_last
from engine.identity import sha256
from engine.locks import locked, try_lock
from engine.settings import Settings
from geodata.rasters import DataError
from sam_vit import WeightsError

NEEDED = ("key", "cell", "row", "seed", "scores", "tiles", "scored", "trained", "sha256")


@dataclass
class Store:
    path: Path

    @classmethod
    def open(cls, path: Path, table: str, data: str) -> Store:
        """The folder of a sweep, made if need be. Raises Mistake for a folder of another one."""
        marker, wanted = path / "sweep.json", {"table": table, "data": data}
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(f"--out {path}: the folder cannot be made ({error.strerror})") from error
        store = cls(path)
        with store.lock():
            if marker.exists():
                try:
                    found = json.loads(marker.read_text(encoding="utf-8"))
                except ValueError:
                    found = "a damaged sweep.json"
            else:
                strange = sorted(p.name for p in path.iterdir() if p.name not in ("cells", "lock"))
                found = ", ".join(strange[:3]) or wanted
            if found != wanted:
                raise Mistake(f"{path} holds {found}, not {wanted}; give another --out")
            write_text(marker, json.dumps(wanted))
        return store

    def discard(self) -> None:
        """Removes the folder where nothing was made in it."""
        if (self.path / "results.jsonl").exists():
            return
        try:
            (self.path / "cells").rmdir()
        except OSError:
            return
        for name in ("sweep.json", "lock"):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()

    def lock(self):
        return locked(self.path / "lock")

    def claim(self, folder: str) -> int | None:
        """A lock on a cell, to be closed; None where another process makes it."""
        return try_lock(self.path / "cells" / f"{folder}.lock")

    def read(self) -> tuple[dict[str, dict], list[str]]:
        """The lines by key, the first of each, and what is wrong with the others in a line each."""
        path, found, damaged = self.path / "results.jsonl", {}, []
        text = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(text.split(b"\n"), 1):
            if not line:
                continue
            try:
                entry = json.loads(line)
                whole = isinstance(entry, dict) and all(name in entry for name in NEEDED)
                whole = whole and entry.pop("sha256") == sha256(entry)
            except (ValueError, RecursionError):
                whole = False
            if whole:
                found.setdefault(entry["key"], entry)
            else:
                remedy = "left alone, its cell is made again"
                damaged.append(f"{path}, line {number}: damaged; {remedy}")
        return found, damaged

    def state(self, folder: str, key: str, done: dict, s: Settings) -> str:
        """How far a cell is, in a word or two."""
        if key in done:
            return "done"
        if (claim := self.claim(folder)) is None:
            return "being made"
        os.close(claim)
        try:
            step = read_last(self.path / "cells" / folder)["progress"]["step"]
        except WeightsError:  # nothing that can be gone on with
            return "not begun"
        return f"interrupted at step {step} of {s.epochs * s.steps}"

    def take_over(self, other: Path, names: dict[str, dict]) -> None:
        """Appends the lines of another sweep's folder that have a key of `names`, with the "cell"
        and the "row" that it stands for here. Raises Mistake."""
        if not (other / "results.jsonl").is_file():
            raise Mistake(f"--reuse {other}: holds no results.jsonl; give the folder of a sweep")
        found = Store(other).read()[0]
        for key in names.keys() & found.keys():
            self.append(found[key] | names[key])

    def append(self, entry: dict) -> None:
        """Adds a line, unless there is one of its key."""
        path = self.path / "results.jsonl"
        with self.lock():
            if entry["key"] in self.read()[0]:
                return
            line = json.dumps({**entry, "sha256": sha256(entry)}).encode() + b"\n"
            with open(path, "ab+") as file:
                if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                    line = b"\n" + line  # a line that a killed process left half-written
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


def result_of_run(folder: Path) -> dict | None:
    """What a finished run tells of its cell; None for one that is not. Raises DataError for files
    that are damaged."""
    try:
        if not (folder / "last.pt").exists() or not RunFolder(folder).is_finished():
            return None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        names = ("oa", "mf1", "miou", "kappa", "per_class", "pixels", "convention")
        return {
            "scores": {name: scores[name] for name in names},
            "tiles": {name: tile["confusion"] for name, tile in scores["per_tile"].items()},
            "trained": config["parameters"]["trainable"],
            "parameters": config["parameters"],
            "seconds": sum(entry["seconds"] for entry in log),
            "memory_mb": max((e["peak_memory_mb"] or 0 for e in log), default=0) or None,
            "version": config["version"],
            "base": config["base"],
            "processes": config["processes"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder}: its files are damaged ({reason})") from error
