"""Stages of equation, code, shapes and pictures, and the page that they make.

`encoder_stages.py` and `decoder_stages.py` draw the arrays of `engine/inside.py`. Every figure says
what to see in it and what would be wrong if it looked otherwise; what it says is computed from the
numbers, so that it holds for any tuner, for a mixing weight of 1 and for a network that has learned
nothing.
"""

from __future__ import annotations

import html
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

from geodata.rasters import DataError, one_line
from reports.method import excerpt
from reports.page import figure, note, table, write_page

MAX_LINES = 12  # of an excerpt
SAME = 5e-5  # what is less apart than this is printed as the same


@dataclass
class Stage:
    heading: str
    code: list[str]  # names as docs/method.md cites them, `file.py:name`
    words: str
    shapes: list[tuple[str, str, str]]  # what, its shape, of which part the parameters are
    plates: list[str] = field(default_factory=list)  # HTML


def plate(pictures: dict[str, np.ndarray] | str, see: str, wrong: str) -> str:
    """Pictures by their short names, or a drawing, with the caption of all of them."""
    if not isinstance(pictures, str):
        drawn = (figure(name, Image.fromarray(p)) for name, p in pictures.items())
        pictures = f'<div class="figures">{"".join(drawn)}</div>'
    caption = f"<b>See:</b> {html.escape(see)} <b>Wrong if:</b> {html.escape(wrong)}"
    return f'<figure class="plate">{pictures}<figcaption>{caption}</figcaption></figure>'


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def listed(names: list[str], numbers) -> str:
    return ", ".join(f"{name} {number}" for name, number in zip(names, numbers))


def shape(*arrays: np.ndarray) -> str:
    many = f"{len(arrays)} of " if len(arrays) > 1 else ""
    return f"{many}({', '.join(map(str, arrays[0].shape))})"


# ----------------------------------------------------------------------------------------- the page


def write_lesson(
    path: Path,
    title: str,
    words: str,
    stages: list[Stage],
    equations: dict[str, dict[int, str]],
    functions: dict[str, Callable],
    parameters: dict[str, tuple[int, int]],
) -> None:
    """Writes the page. `functions` are what the names in the stages' `code` mean, `equations` are of
    `reports.method.equations`, `parameters` (all, trained) by part. Raises DataError."""
    shown: dict[int, str] = {}  # an equation stands where it is computed first
    sections = {"": note(words)}
    for i, stage in enumerate(stages, 1):
        parts = [f"<p>{html.escape(stage.words)}</p>"]
        for name in stage.code:
            new = {n: text for n, text in equations.get(name, {}).items() if n not in shown}
            shown |= new
            parts += [
                f'<p class="equation">{text} <span>({n})</span></p>' for n, text in new.items()
            ]
            parts.append(code_block(name, functions[name]))
        if stage.shapes:
            counts = [parameters.get(part, (0, 0)) for _, _, part in stage.shapes]
            rows = [
                [what, dims, f"{n:,}", f"{k:,}"]
                for (what, dims, _), (n, k) in zip(stage.shapes, counts)
            ]
            parts.append(table(["at this point", "shape", "parameters", "trained"], rows))
        sections[f"{i}. {stage.heading}"] = "".join([*parts, *stage.plates])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, title, sections)
    except OSError as error:
        reason = f"cannot be written ({one_line(error)})"
        raise DataError(f"--out {path.parent}: {reason}; give another folder") from error


def code_block(name: str, function: Callable) -> str:
    """The lines of a function as they stand; of a user's own, at most MAX_LINES."""
    try:
        lines = excerpt(function)
        first = inspect.getsourcelines(function)[1]
    except OSError:
        return note(f"{name}: its source is not at hand.")
    rest = f", and {len(lines) - MAX_LINES} lines more" if len(lines) > MAX_LINES else ""
    code = html.escape("\n".join(lines[:MAX_LINES]))
    return f'<figure><figcaption>{html.escape(name)}, line {first}{rest}</figcaption><pre class="code">{code}</pre></figure>'
