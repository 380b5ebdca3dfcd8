"""Runs beside the paper: Markdown, one table for each data set, out of the files of the runs alone.

    python evaluate.py --table               every run below runs/
    python evaluate.py --table DIR DIR ...   runs, or folders that hold some, as those of `train.py --seeds`

`read_runs` reads; the rest are pure functions from what was read to text. Runs that differ in the
seed alone are one row: nothing else that moves a score differs between them, nor the code, the
base, the scored pixels, the way of scoring. The notes below a table say where a row's way is not
the paper's, which is the published code's (PAPER.md 2 and 3)."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from engine.commandline import FREE_ON_RESUME
from engine.recipes import AS_PUBLISHED, AS_PUBLISHED_WITH, PUBLISHED_STRIDES, RECIPES
from engine.settings import Settings
from geodata.layouts import VAIHINGEN_TEST_PIXELS
from geodata.rasters import DataError

# ---------------------------------------------------------------------------------------- the paper

# OA / mF1 / mIoU in percent, by (data set, tuner, encoder); PAPER.md 4.
DOUBTFUL = ("hunan", "lora", "vit_l")  # repeats another method's numbers, and is left out


PAPER_SCORES: dict[tuple[str, str, str], tuple[float, float, float]] = {
    ("vaihingen", "lora", "vit_b"): (91.93, 89.89, 82.09),
    ("vaihingen", "lora", "vit_l"): (92.22, 91.09, 83.96),
    ("vaihingen", "lora", "vit_h"): (92.73, 91.50, 84.66),
    ("vaihingen", "adapter", "vit_b"): (92.62, 90.60, 83.24),
    ("vaihingen", "adapter", "vit_l"): (92.93, 91.51, 84.72),
    ("vaihingen", "adapter", "vit_h"): (92.97, 91.71, 85.03),
    ("potsdam", "lora", "vit_b"): (90.57, 91.48, 84.61),
    ("potsdam", "lora", "vit_l"): (90.99, 92.13, 85.71),
    ("potsdam", "lora", "vit_h"): (91.43, 92.49, 86.34),
    ("potsdam", "adapter", "vit_b"): (90.89, 91.79, 85.14),
    ("potsdam", "adapter", "vit_l"): (91.62, 92.51, 86.37),
    ("potsdam", "adapter", "vit_h"): (91.71, 92.70, 86.69),
    ("hunan", "lora", "vit_b"): (79.35, 58.79, 46.54),
    ("hunan", "lora", "vit_h"): (78.87, 60.38, 47.63),
    ("hunan", "adapter", "vit_b"): (80.68, 62.10, 49.20),
    ("hunan", "adapter", "vit_l"): (80.93, 65.33, 51.82),
    ("hunan", "adapter", "vit_h"): (81.07, 64.13, 51.08),
}


# mIoU of the ablations, all of Vaihingen with ViT-L, by (tuner, `variant`).
PAPER_ABLATIONS: dict[tuple[str, str], float] = {
    ("frozen", "image only"): 75.11,
    ("adapter", "image only"): 83.69,
    ("adapter", "no mixing"): 84.35,
    ("adapter", "fusion sum"): 84.25,
    ("lora", "image only"): 82.74,
    ("lora", "no mixing"): 82.06,
    ("lora", "fusion sum"): 83.24,
}


# Parameters that the paper's network trains, counted with six classes, and the millions that the
# paper prints.
PAPER_TRAINED: dict[tuple[str, str], tuple[int, float]] = {
    ("lora", "vit_b"): (3_190_478, 7.25),
    ("lora", "vit_l"): (4_910_846, 8.97),
    ("lora", "vit_h"): (6_745_886, 10.81),
    ("adapter", "vit_b"): (16_360_118, 20.42),
    ("adapter", "vit_l"): (52_612_814, 56.67),
    ("adapter", "vit_h"): (107_220_702, 111.28),
}


def variant(settings: dict) -> str:
    """What sets a run apart from the method: image only, no mixing, fusion sum; "" for the method
    itself.
    """
    one = "+" not in settings["modalities"]
    mixes = settings["tuner"] not in ("adapter", "lora") or settings.get("mixing", True)
    parts = {f"{settings['modalities']} only": one, "no mixing": not one and not mixes}
    parts["fusion sum"] = settings["fusion"] == "sum"
    return ", ".join(name for name, applies in parts.items() if applies)


def paper_cells(traits: dict) -> tuple[str, str]:
    """The paper's OA / mF1 / mIoU and its trained parameters in millions for a row, empty where it
    has none.
    """
    tuner, encoder, kind = traits["tuner"], traits["encoder"], variant(traits)
    if not kind:
        scores = PAPER_SCORES.get((traits["data"], tuner, encoder))
        trained, printed = PAPER_TRAINED.get((tuner, encoder), (0, 0))
        cell = f"{trained / 1e6:.2f} (it prints {printed:.2f})"
        return (" / ".join(f"{v:.2f}" for v in scores), cell) if scores else ("", "")
    ablation = (
        PAPER_ABLATIONS.get((tuner, kind))
        if (traits["data"], encoder) == ("vaihingen", "vit_l")
        else None
    )
    return (f"- / - / {ablation:.2f}" if ablation else ""), ""


# ----------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Finished:
    """What the table needs of a run. `traits` is the same for all runs of a row, and differs
    between rows.
    """

    folder: Path
    traits: dict
    seed: int
    scores: dict[str, float | None]  # oa, mf1, miou, kappa, 0 to 1
    trainable: int
    images: float
    seconds: float
    memory: float | None  # MiB


MEANS = ("oa", "mf1", "miou", "kappa")


# What moves no score, or as rounding does: where files lie, and the ways to compute the same thing.
FREE = {*FREE_ON_RESUME, "seed", "checkpointing", "compile", "deterministic"}


METHOD = ("data", "encoder", "tuner", "mixing", "modalities", "fusion")  # what a row is called by


# How epochs are scored during training: of no effect unless one is chosen by it.
CHOICE = ("eval_every", "eval_stride", "repeat_border", "full_labels")


def finished(folder: Path, config: dict, scores: dict, log: list[dict]) -> Finished:
    """A run out of its config.json, scores.json and log.jsonl. Raises KeyError, TypeError or
    ValueError if that fails.
    """
    left_out = {*FREE, *(CHOICE if config["select"] == "last" else ())}
    traits = {
        f.name: config.get(f.name, {} if f.name in ("plugin", "tuner_option") else f.default)
        for f in fields(Settings)
        if f.name not in left_out
    }
    traits["data"] = "hunan" if config["data"] == "mmhunan" else config["data"]
    random = config["base"]["weights"] == "random"  # its tensors are a function of the seed
    traits |= {
        "base": "random" if random else config["base"]["sha256"],
        "version": config["version"],
    }
    traits |= {
        "classes": config["classes"],
        "pixels": [int(row["pixels"]) for row in scores["per_class"]],
    }
    traits["scored"] = {key: scores[key] for key in ("labels", "window", "stride", "repeat_border")}
    memory = [line["peak_memory_mb"] for line in log if line.get("peak_memory_mb") is not None]
    return Finished(
        folder,
        traits,
        int(config["seed"]),
        {key: None if scores[key] is None else float(scores[key]) for key in MEANS},
        int(config["parameters"]["trainable"]),
        sum(line["images_per_second"] * line["seconds"] for line in log),
        sum(line["seconds"] for line in log),
        max(memory, default=None),
    )


def read_runs(folders: list[Path]) -> tuple[list[Finished], list[str]]:
    """The finished runs in and below folders, and for each other one a line that says why it is
    left out.

    Raises DataError for a folder without any run, and where no run is finished.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        here = sorted(
            {path.parent for name in ("config.json", "scores.json") for path in folder.rglob(name)}
        )
        if not here:
            raise DataError(
                f"{folder}: there is no run in it or below it; train one, or name folders: --table DIR"
            )
        for path in here:
            found.setdefault(path.resolve(), path)
    runs, skipped = [], []
    for folder in found.values():
        try:
            runs.append(read_run(folder))
        except DataError as error:
            skipped.append(f"skipped {folder}: {error}")
    if not runs:
        raise DataError(
            f"of {len(skipped)} runs below {', '.join(map(str, folders))} none can be shown: {skipped[0]}"
        )
    return runs, skipped


def read_run(folder: Path) -> Finished:
    """Raises DataError for a run that is not finished, or damaged, or was scored before there was a
    table.
    """
    if not (folder / "scores.json").exists():
        raise DataError("it is not finished, there is no scores.json")
    try:
        config, scores = (
            json.loads((folder / n).read_text(encoding="utf-8"))
            for n in ("config.json", "scores.json")
        )
        path = folder / "log.jsonl"
        log = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )
        old = "stride" not in scores and "convention" in scores
        run = None if old else finished(folder, config, scores, log)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # JSON's errors are ValueErrors
        raise DataError(
            f"its files are damaged ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if run is None:
        raise DataError(
            f"an earlier version scored it; score it again: python evaluate.py --run {folder}"
        )
    return run


def group(runs: list[Finished]) -> list[list[Finished]]:
    """Rows: the runs of one are alike in all `traits`. In the order of what they are called, then
    of their folders.
    """
    rows: dict[str, list[Finished]] = {}
    for run in runs:
        rows.setdefault(json.dumps(run.traits, sort_keys=True), []).append(run)
    return sorted(rows.values(), key=lambda row: (label(row[0].traits), row[0].folder.as_posix()))


# ---------------------------------------------------------------------------------------- the notes


def differences(traits: dict) -> list[str]:
    """Where a row's way is not that of the paper's scores, which is the published code's; on other
    data, the recipe's.
    """
    data, scored = traits["data"], traits["scored"]
    published = data in PUBLISHED_STRIDES
    departures = {**AS_PUBLISHED, **AS_PUBLISHED_WITH.get(data, {})} if published else {}
    theirs = asdict(Settings(**{**RECIPES.get(data, {}), **departures}))
    stride = theirs["eval_stride"]
    if published:
        theirs["eval_stride"], stride = PUBLISHED_STRIDES[data]
        theirs["batch_size"] = 4 if traits["encoder"] == "vit_h" else 10
    pairs = {
        f"`--{name.replace('_', '-')}`" + (" while choosing the epoch" if name in CHOICE else ""): (
            traits[name],
            value,
        )
        for name, value in theirs.items()
        if name in traits and name not in METHOD
    }
    bases = (traits["base"] == "random", theirs["weights"] == "none")
    pairs["weights"] = tuple("random" if random else "SAM's" for random in bases)
    pairs["scored at stride"] = (scored["stride"], stride)
    pairs["border windows"] = tuple(
        "repeated" if again else "once" for again in (scored["repeat_border"], published)
    )
    pairs["scored by labels"] = ("full" if is_full(traits) else "eroded", "eroded")
    whose = "the published code" if published else "the recipe"
    return [
        f"{what}: {_word(ours)}; {whose}: {_word(other)}"
        for what, (ours, other) in pairs.items()
        if ours != other
    ]


def is_full(traits: dict) -> bool:
    """Whether a row was scored by the full labels of a data set that has eroded ones."""
    return traits["scored"]["labels"].startswith("full")


def remarks(traits: dict) -> list[str]:
    """The notes of a row: its differences, what to know of the paper's row, the scored pixels, the
    code.
    """
    lines, pixels, paper = differences(traits), traits["pixels"], sum(VAIHINGEN_TEST_PIXELS)
    if (traits["data"], traits["tuner"], traits["encoder"]) == DOUBTFUL and not variant(traits):
        lines.append("the paper's row repeats another method's numbers, and is left out")
    other = (
        traits["data"] == "vaihingen" and not is_full(traits) and pixels != [*VAIHINGEN_TEST_PIXELS]
    )
    beside = f"; the paper's test tiles have {paper:,}, so these are others" if other else ""
    base = "" if traits["base"] == "random" else f", on weights with SHA-256 {traits['base'][:12]}"
    return [
        *lines,
        f"{sum(pixels):,} pixels scored{beside}",
        f"trained by {traits['version']}{base}",
    ]


def _word(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) or "none"


# ---------------------------------------------------------------------------------------- the table

HEAD = ("run", "seeds", "OA", "mF1", "mIoU", "kappa", "the paper: OA / mF1 / mIoU", "trained, M")


HEAD += ("the paper: trained, M", "images/s", "memory, GiB", "notes")


CAPTION = (
    "Scores in percent; of several seeds mean +- standard deviation (n - 1). The paper's are those of the best of its "
    "epochs on the test tiles; trained parameters are counted, and the paper prints more than its network trains. Speed "
    "and memory are those of training."
)


def spread(values: list[float | None]) -> str:
    """Mean of 0 to 1 in percent, with the standard deviation of a sample from two values on; -
    where there is none.
    """
    known = [100 * value for value in values if value is not None]
    deviation = f" +- {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{deviation}" if known else "-"


def row_cells(row: list[Finished], numbers: list[int]) -> list[str]:
    traits, seeds = row[0].traits, len({run.seed for run in row})
    scores, trained = paper_cells(traits)
    seconds, memory = (
        sum(run.seconds for run in row),
        [run.memory for run in row if run.memory is not None],
    )
    return [
        label(traits),
        str(seeds) if seeds == len(row) else f"{seeds} in {len(row)} runs",
        *(spread([run.scores[key] for run in row]) for key in MEANS),
        scores,
        f"{row[0].trainable / 1e6:.2f}",
        trained,
        f"{sum(run.images for run in row) / seconds:.3g}" if seconds else "",
        f"{max(memory) / 1024:.2f}" if memory else "",
        ", ".join(map(str, numbers)),
    ]


def label(traits: dict) -> str:
    return ", ".join(part for part in (traits["tuner"], traits["encoder"], variant(traits)) if part)


def markdown(runs: list[Finished]) -> str:
    """One section for each data set: the table, the notes by number, and the folders of each row."""
    sections = []
    names = {run.traits["data"] for run in runs}
    for data in sorted(names, key=lambda name: (name not in PUBLISHED_STRIDES, name)):
        notes: dict[str, int] = {}  # text -> number
        lines, folders = [HEAD, ("---", *["---:"] * (len(HEAD) - 1))], []
        for row in group([run for run in runs if run.traits["data"] == data]):
            numbers = [notes.setdefault(text, len(notes) + 1) for text in remarks(row[0].traits)]
            lines.append(row_cells(row, numbers))
            folders.append(
                f"- {label(row[0].traits)}: {', '.join(f'`{run.folder.as_posix()}`' for run in row)}"
            )
        table = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        ]
        listed = [f"{number}. {text}" for text, number in notes.items()]
        sections += [f"## {data}", "\n".join(table), "\n".join(listed), "\n".join(folders)]
    return "\n\n".join([*sections, CAPTION])
