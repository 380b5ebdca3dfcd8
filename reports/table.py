"""Runs beside the paper: Markdown, one table for each data set, out of the files of the runs alone.

    python evaluate.py --table               every run below runs/
    python evaluate.py --table DIR DIR ...   runs, or folders that hold some

Runs that differ in the seed alone are one row; see `runs.py`. The notes below a table say where the
protocol differs from the published code's, which the paper's scores are of."""

from __future__ import annotations

import json
import re

from engine.recipes import PUBLISHED_STRIDES, recipe, with_optimizer
from engine.settings import Settings, flag
from geodata.layouts import VAIHINGEN_TEST_PIXELS
from reports.files import MEANS
from reports.page import percent
from reports.paper import DOUBTFUL, paper_scores, paper_trained, variant
from reports.runs import CHOICE, OPTIONS, Result, read_runs

__all__ = ["markdown", "read_runs"]

# What a row is called by.
METHOD = OPTIONS | {"data", "encoder", "tuner", "modalities", "kinds", "drop_modality"}
METHOD |= {"drop_only", "fusion"}

HEAD = ("run", "seeds", *MEANS.values(), "the paper: OA / mF1 / mIoU", "trained, M")
HEAD += ("the paper: trained, M", "images/s", "memory, GiB", "notes")

CAPTION = (
    "Scores in percent; of several seeds mean +- standard deviation (n - 1). The paper's are those "
    "of the best of its epochs on the test tiles; trained parameters are counted, and the paper "
    "prints more than its network trains. Speed and memory are those of training."
)


def inline(value) -> str:
    """A value out of a file as Markdown that is text, in one line and one cell."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`|<\[*])", r"\\\1", text)


def label(traits: dict) -> str:
    return inline(", ".join(filter(None, (traits["tuner"], traits["encoder"], variant(traits)))))


def group(runs: list[Result]) -> list[list[Result]]:
    """Rows: the runs of one are alike in all `traits`. In the order of what they are called, then
    of their folders."""
    rows: dict[str, list[Result]] = {}
    for run in runs:
        rows.setdefault(json.dumps(run.traits, sort_keys=True), []).append(run)
    return sorted(rows.values(), key=lambda row: (label(row[0].traits), row[0].folder.as_posix()))


# ---------------------------------------------------------------------------------------- the notes


def differences(traits: dict) -> list[str]:
    """Where a row's protocol differs from the published code's; on other data, from the recipe."""
    data, scored, published = traits["data"], traits["scored"], traits["data"] in PUBLISHED_STRIDES
    theirs = Settings(**with_optimizer({}, recipe(data, traits["encoder"], published)))
    during, final = PUBLISHED_STRIDES.get(data, (theirs.eval_stride, theirs.eval_stride))
    pairs = {
        named(name): (value, getattr(theirs, name))
        for name, value in traits.items()
        if name not in METHOD | {"eval_stride", "select_stride"} and hasattr(theirs, name)
    }
    if "eval_stride" in traits:
        pairs[named("eval_stride")] = (traits.get("select_stride") or traits["eval_stride"], during)
    taught = "pre-trained" if traits["encoder"] == "vit_t" else "SAM's"
    pairs["weights"] = tuple(
        "random" if random else taught
        for random in (traits["base"] == "random", theirs.weights == "none")
    )
    pairs["scored at stride"] = (scored["stride"], final)
    pairs["border windows"] = tuple(
        "repeated" if repeated else "once" for repeated in (scored["repeat_border"], published)
    )
    pairs["scored by labels"] = ("full" if is_full(traits) else "eroded", "eroded")
    whose = "the published code" if published else "the recipe"
    return [
        f"{what}: {shown(ours)}; {whose}: {shown(other)}"
        for what, (ours, other) in pairs.items()
        if ours != other
    ]


def named(name: str) -> str:
    """A setting as the notes call it."""
    return f"`{flag(name)}`" + (" while choosing the epoch" if name in CHOICE else "")


def is_full(traits: dict) -> bool:
    """Whether a row was scored by the full labels of a data set that has eroded ones."""
    return traits["scored"]["labels"].startswith("full")


def shown(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return inline(value) or "none"


def notes(traits: dict) -> list[str]:
    """The differences of a row, what to know of the paper's row, the scored pixels, the code."""
    lines, pixels, paper = differences(traits), traits["pixels"], sum(VAIHINGEN_TEST_PIXELS)
    if (traits["data"], traits["tuner"], traits["encoder"]) == DOUBTFUL and not variant(traits):
        lines.append("the paper's row repeats another method's numbers, and is left out")
    eroded = traits["data"] == "vaihingen" and not is_full(traits)
    others = eroded and pixels != [*VAIHINGEN_TEST_PIXELS]
    beside = f"; the paper's test tiles have {paper:,}, so these are others" if others else ""
    base = inline(traits["base"])[:12]
    base = "" if traits["base"] == "random" else f", on weights with SHA-256 {base}"
    return [
        *lines,
        f"{sum(pixels):,} pixels scored{beside}",
        f"trained by {inline(traits['version'])}{base}",
    ]


# ---------------------------------------------------------------------------------------- the table


def row_cells(row: list[Result], numbers: list[int]) -> list[str]:
    """The cells of a row, in the order of HEAD; `numbers` are those of its notes."""
    traits, seeds = row[0].traits, len({run.seed for run in row})
    scores, trained = paper_scores(traits) or (), paper_trained(traits)
    seconds = sum(run.seconds for run in row)
    memory = [run.memory for run in row if run.memory is not None]
    return [
        label(traits),
        str(seeds) if seeds == len(row) else f"{seeds} in {len(row)} runs",
        *(percent(*(run.scores[key] for run in row)) for key in MEANS),
        " / ".join(f"{score:.2f}" for score in scores),
        f"{row[0].trainable / 1e6:.2f}",
        f"{trained[0] / 1e6:.2f} (it prints {trained[1]:.2f})" if trained else "",
        f"{sum(run.images for run in row) / seconds:.3g}" if seconds else "",
        f"{max(memory) / 1024:.2f}" if memory else "",
        ", ".join(map(str, numbers)),
    ]


def markdown(runs: list[Result]) -> str:
    """A section for each data set: the table, the notes by number, and the folders of each row."""
    sections = []
    names = {run.traits["data"] for run in runs}
    for data in sorted(names, key=lambda name: (name not in PUBLISHED_STRIDES, name)):
        numbered: dict[str, int] = {}  # note -> number
        lines, folders = [HEAD, ("---", *["---:"] * (len(HEAD) - 1))], []
        for row in group([run for run in runs if run.traits["data"] == data]):
            traits = row[0].traits
            numbers = [numbered.setdefault(note, len(numbered) + 1) for note in notes(traits)]
            lines.append(row_cells(row, numbers))
            paths = (" ".join(run.folder.as_posix().replace("`", "'").split()) for run in row)
            folders.append(f"- {label(traits)}: {', '.join(f'`{path}`' for path in paths)}")
        table = [f"| {' | '.join(cells)} |" for cells in lines]
        listed = [f"{number}. {note}" for note, number in numbered.items()]
        sections += [f"## {inline(data)}", *map("\n".join, (table, listed, folders))]
    return "\n\n".join([*sections, CAPTION])
