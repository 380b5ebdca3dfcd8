"""What reports need of a run's folder: its files, and which of them are results that compare.

A run's scores count as its result when it was trained to its end and scored as its own settings
say. `traits` hold everything that moves a score, so that runs of equal traits differ in the seed
alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.console import typed
from engine.settings import Settings
from geodata.rasters import DataError
from reports.files import MEANS, in_a_line, read_files
from reports.paper import tuner_options

# Settings that move no score, or as rounding does: where files lie, and ways to compute the same.
FREE = {"out", "root", "weights", "workers", "device", "save_every", "memory_gb", "seed"}
FREE |= {"accumulate", "checkpointing", "compile", "deterministic"}
# How epochs are scored during training: of no effect unless one is chosen by it.
CHOICE = {"eval_every", "eval_stride", "select_stride", "repeat_border", "full_labels"}
OPTIONS = {"tuner_option", "mixing", "rank"}  # one trait: `tuner_options`


@dataclass(frozen=True)
class Result:
    """What the table needs of a run."""

    folder: Path
    traits: dict  # equal for the runs of a row of the table
    seed: int
    scores: dict[str, float | None]  # by the keys of MEANS, 0 to 1
    trainable: int  # parameters
    images: float
    seconds: float  # of training
    memory: float | None  # MiB


def read_run(folder: Path) -> Result:
    """Raises DataError, which says why, for a run that has no result yet or whose files are
    damaged."""
    config, scores, log = read_files(folder)
    try:
        if reason := no_result(folder, config, scores, log):
            raise DataError(reason)
        return result_of(folder, config, scores, log)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"its files are damaged ({in_a_line(error)})") from error


def no_result(folder: Path, config: dict, scores: dict, log: list[dict]) -> str:
    """Why the scores in a folder are not the result of its run; "" where they are."""
    again = f"score it again: {typed('evaluate.py', '--run', folder)}"
    if not scores:
        return "it is not finished, there is no scores.json"
    if not config:
        return "there is no config.json to say how it was trained"
    done = log[-1]["epoch"] if log else 0
    if done < config["epochs"]:
        return f"it is not finished, log.jsonl ends at epoch {done} of {config['epochs']}"
    if "stride" not in scores:
        return f"an earlier version scored it; {again}"
    own = {"window": "crop", "stride": "eval_stride", "repeat_border": "repeat_border"}
    for name, setting in own.items():
        if scores[name] != config[setting]:
            return f"scored with {name} {scores[name]}, trained with {config[setting]}; {again}"
    labels = "full" if config["full_labels"] else "eroded"
    if scores["labels"].split()[0] not in (labels, "all"):
        return f"scored with {scores['labels']}, trained for the {labels} ones; {again}"
    return ""


def result_of(folder: Path, config: dict, scores: dict, log: list[dict]) -> Result:
    """A run out of what its files hold. Raises KeyError, TypeError or ValueError if that fails."""
    left_out = FREE | OPTIONS | (CHOICE if config["select"] == "last" else set())
    defaults = {k: v for k, v in vars(Settings()).items() if k not in left_out}
    traits = {name: config.get(name, default) for name, default in defaults.items()}
    traits["data"] = "hunan" if config["data"] == "mmhunan" else config["data"]
    traits["tuner_option"] = tuner_options(config)
    # Random tensors are a function of the seed: their sum would set each seed apart.
    random = config["base"]["weights"] == "random"
    traits["base"] = "random" if random else config["base"]["sha256"]
    traits["version"], traits["classes"] = config["version"], config["classes"]
    traits["lengthened"] = config.get("lengthened", [])
    traits["pixels"] = [int(row["pixels"]) for row in scores["per_class"]]
    traits["scored"] = {k: scores[k] for k in ("labels", "window", "stride", "repeat_border")}
    memory = [entry["peak_memory_mb"] for entry in log if entry.get("peak_memory_mb") is not None]
    return Result(
        folder,
        traits,
        int(config["seed"]),
        {key: None if scores[key] is None else float(scores[key]) for key in MEANS},
        int(config["parameters"]["trainable"]),
        sum(entry["images_per_second"] * entry["seconds"] for entry in log),
        sum(entry["seconds"] for entry in log),
        max(memory, default=None),
    )


def read_runs(folders: list[Path]) -> tuple[list[Result], list[str]]:
    """The results in and below folders, and for each other run a line that says why it is left out.

    Raises DataError for a folder without any run, and where there is no result."""
    found: dict[Path, Path] = {}
    for folder in folders:
        files = [path for name in ("config.json", "scores.json") for path in folder.rglob(name)]
        if not files:
            ways = "train one, or name folders: --table DIR"
            raise DataError(f"{folder}: there is no run in it or below it; {ways}")
        for path in sorted({path.parent for path in files}):
            found.setdefault(path.resolve(), path)
    runs, skipped = [], []
    for folder in found.values():
        try:
            runs.append(read_run(folder))
        except DataError as error:
            skipped.append(f"skipped {folder}: {error}")
    if not runs:
        below = f"{len(skipped)} runs below {', '.join(map(str, folders))}"
        raise DataError(f"of {below} none can be shown: {skipped[0]}")
    return runs, skipped
