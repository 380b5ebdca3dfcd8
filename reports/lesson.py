"""Stages of equation, code, shapes and pictures, and the page that they make.

`stages.py` draws the arrays of `engine/inside.py`. Every figure says what to see in it and what
would be wrong if it looked otherwise."""

from __future__ import annotations

import html
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
from PIL import Image

from geodata.rasters import DataError, one_line
from reports.features import enlarge
from reports.method import excerpt
from reports.page import figure, note, write_page

MAX_LINES = 12  # of an excerpt
SAME = 5e-5  # what is less apart than this is called the same


@dataclass
class Stage:
    heading: str
    code: list[str]  # names as docs/method.md cites them, `file.py:name`
    words: str
    shape: tuple[str, str, str] | None = None  # what, its shape, which part has the parameters
    figures: list[str] = field(default_factory=list)  # HTML

    def show(self, drawing: str, see: str, wrong: str) -> None:
        """Adds a drawing (HTML) with its caption."""
        caption = f"<b>See:</b> {html.escape(see)} <b>Wrong if:</b> {html.escape(wrong)}"
        framed = f'<figure class="plate">{drawing}<figcaption>{caption}</figcaption></figure>'
        self.figures.append(framed)


def side_by_side(
    pictures: dict[str, np.ndarray], size: tuple[int, int], palette: Sequence = ()
) -> str:
    """Pictures (h, w, 3) by their short names, each as large as the window, `size`; class maps are
    in the colours of `palette`."""
    shown = {name: Image.fromarray(enlarge(p, size)[1]) for name, p in pictures.items()}
    drawn = [figure(name, picture, palette=palette) for name, picture in shown.items()]
    return f'<div class="figures">{"".join(drawn)}</div>'


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shape(*arrays: np.ndarray) -> str:
    return ", ".join(str(a.shape) for a in arrays)


# ----------------------------------------------------------------------------------------- the page


def write_lesson(
    path: Path,
    title: str,
    head: str,
    stages: list[Stage],
    equations: dict[str, dict[int, str]],
    functions: dict[str, Callable],
    parameters: dict[str, tuple[int, int]],
) -> None:
    """Writes the page: `head` is HTML, `equations` as of `reports.method`, `functions` by the names
    in the stages' `code`, `parameters` (all, trained) by part of the network. Raises DataError."""
    sections, shown = {"": head}, {}  # an equation stands where it is computed first
    for i, stage in enumerate(stages, 1):
        parts = [f"<p>{html.escape(stage.words)}</p>"]
        for name in stage.code:
            new = {n: text for n, text in equations.get(name, {}).items() if n not in shown}
            parts += [f'<p class="equation">{text}<b>({n})</b></p>' for n, text in new.items()]
            parts.append(code_block(name, functions[name]))
            shown |= new
        if stage.shape:
            what, here, part = stage.shape
            if part:
                here += "; {:,} parameters, {:,} of them trained".format(*parameters[part])
            parts.append(note(f"Here: {what}, {here}."))
        sections[f"{i}. {stage.heading}"] = "".join(parts + stage.figures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, title, sections)
    except OSError as error:
        why = f"cannot be written ({one_line(error)}); give another folder"
        raise DataError(f"--out {path.parent}: {why}") from error


def code_block(name: str, function: Callable) -> str:
    """The lines of a function as they stand in its file; of a long one, a user's, the first."""
    try:
        lines, line = excerpt(function), inspect.getsourcelines(function)[1]
    except OSError:
        return note(f"{name}: its file is not at hand.")
    rest = f", and {len(lines) - MAX_LINES} lines more" if len(lines) > MAX_LINES else ""
    code = html.escape("\n".join(lines[:MAX_LINES]))
    caption = f"<figcaption>{html.escape(name)}, line {line}{rest}</figcaption>"
    return f'<figure>{caption}<pre class="code">{code}</pre></figure>'
