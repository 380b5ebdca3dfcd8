"""The files of a run's folder, read without trust."""

from __future__ import annotations

import json
from pathlib import Path

from geodata.rasters import DataError

MEANS = {"oa": "OA", "mf1": "mF1", "miou": "mIoU", "kappa": "kappa"}  # of scores.json -> as shown


def read_files(folder: Path) -> tuple[dict, dict, list[dict]]:
    """(config.json, scores.json, log.jsonl) of a run; empty where there is no such file. Raises
    DataError for one that cannot be read."""
    config, scores = (read_objects(folder / f"{name}.json") for name in ("config", "scores"))
    log = read_objects(folder / "log.jsonl", separator="\n")
    return config[0] if config else {}, scores[0] if scores else {}, log


def read_objects(path: Path, separator: str | None = None) -> list[dict]:
    """The JSON objects of a file, one in all or one between separators; [] where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        parts = filter(str.strip, text.split(separator)) if separator else [text]
        found = [json.loads(part) for part in parts]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({in_a_line(error)})") from error
    if not all(isinstance(part, dict) for part in found):
        raise DataError(f"{path} is damaged (it holds something else than names and values)")
    return found


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
