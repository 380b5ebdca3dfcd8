"""The files of a run's folder, read without trust."""

from __future__ import annotations

import json
from pathlib import Path

from geodata.rasters import DataError

MEANS = {"oa": "OA", "mf1": "mF1", "miou": "mIoU", "kappa": "kappa"}  # of scores.json -> as shown


def read_files(folder: Path) -> tuple[dict, dict, list[dict]]:
    """(config.json, scores.json, log.jsonl) of a run; empty where there is no such file. Raises
    DataError for one that cannot be read.
    """
    found = []
    for name, empty in (("config.json", {}), ("scores.json", {}), ("log.jsonl", [])):
        try:
            text = (folder / name).read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if line.strip()]
            content = [json.loads(line) for line in lines] if empty == [] else json.loads(text)
        except FileNotFoundError:
            content = empty
        except (OSError, ValueError) as error:  # of JSON too
            raise DataError(f"{folder / name} is damaged ({in_a_line(error)})") from error
        records = content if empty == [] else [content]
        if not all(isinstance(record, dict) for record in records):
            raise DataError(f"{folder / name} is damaged (it holds something else)")
        found.append(content)
    return tuple(found)


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
