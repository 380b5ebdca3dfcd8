"""A sweep's results beside the paper's: as Markdown, as CSV, as LaTeX, and as a page.

A result is a line of `results.jsonl`. All that these tables hold comes from such lines and from
`competitors.py`; scores are in percent.
"""

from __future__ import annotations

import csv
import html
import io
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reports.charts import interval_chart, scatter_chart
from reports.competitors import PAPER, paper_row
from reports.page import note, spread, table, write_page
from reports.statistics import Difference, paired_difference

MEANS = {"oa": "OA", "mf1": "mF1", "miou": "mIoU"}
COST = {  # of a line -> as shown, how, and whether every sweep measures it
    "trained": ("trained, M", 1e6, "{:.2f}"),
    "seconds": ("training, s", 1, "{:.0f}"),
    "memory_mb": ("memory of training, MB", 1, "{:.0f}"),
    "image_seconds": ("one image, s", 1, "{:.3f}"),
    "image_mb": ("memory of one image, MB", 1, "{:.0f}"),
}
PAPER_COST = ("trained, M", "memory, MB")  # of table 6


@dataclass
class Line:
    """A row of a table: its results, and what the paper prints for it."""

    name: str
    results: list[dict]  # of several seeds
    paper: dict[str, float]  # column -> value
    modalities: str = ""  # "" for a competitor
    backbone: str = ""
    difference: Difference | None = None  # from the reference row

    def has(self, kind: str) -> bool:
        return kind in self.modalities.split("+")

    def scores(self, key: str) -> list[float]:
        found = (result["scores"][key] for result in self.results)
        return [100 * value for value in found if value is not None]

    def recalls(self, name: str) -> list[float]:
        rows = (row for result in self.results for row in result["scores"]["per_class"])
        return [100 * r["recall"] for r in rows if r["name"] == name and r["recall"] is not None]

    def cost(self, key: str) -> list[float]:
        return [r[key] / COST[key][1] for r in self.results if r.get(key) is not None]

    def mean_cost(self, key: str) -> str:
        found = self.cost(key)
        return COST[key][2].format(statistics.fmean(found)) if found else ""

    def printed(self, column: str) -> str:
        return f"{self.paper[column]:.2f}" if column in self.paper else ""


def lines_of(name: str, rows: dict[str, str], results: list[dict], reference: str) -> list[Line]:
    """The rows of a table (name -> modalities) in their order, each compared with the reference;
    then the paper's."""
    own = {row: [r for r in results if r["row"] == row] for row in rows}
    lines = [Line(row, own[row], paper_row(name, row), m) for row, m in rows.items()]
    for line in lines:
        if line.name != reference:
            line.difference = compare(line.results, own.get(reference, []))
    listed = PAPER[name].rows if name in PAPER else {}
    others = {row: found for row, found in listed.items() if row not in own}
    return lines + [Line(row, [], values, backbone=b) for row, (b, values) in others.items()]


def compare(ours: list[dict], other: list[dict]) -> Difference | None:
    """The difference over the seeds that both have; None where none is, or tiles differ."""
    ours, other = ({r["seed"]: r for r in results} for results in (ours, other))
    seeds = sorted(ours.keys() & other.keys())
    pairs = [(ours[seed], other[seed]) for seed in seeds]
    tiles = {tuple(sorted(r["tiles"])) for pair in pairs for r in pair}
    if len(tiles) != 1:
        return None
    (names,) = tiles
    counts = [np.array([[p[i]["tiles"][n] for n in names] for p in pairs]) for i in (0, 1)]
    return paired_difference(*counts, pairs[0][0]["scored"])


# ---------------------------------------------------------------------------------- cells of tables


def told(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.2f}"
    if difference.low is None:
        return f"{text}, one seed: not told apart"
    if difference.low == difference.high == 0:
        return f"{text}, the same scores"
    text += f" ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
    return text if difference.is_told else f"{text}, not told apart"


def cells_of(lines: list[Line], cost: bool) -> list[list[str]]:
    """Head and rows; `cost` adds what differs from run to run, times and memory."""
    costs = [key for key in COST if key == "trained" or cost and any(ln.cost(key) for ln in lines)]
    wanted = [*MEANS.values(), *(PAPER_COST if cost else ())]
    printed = list(dict.fromkeys(c for ln in lines for c in ln.paper if c in wanted))
    more = other_rasters(lines)
    head = ["row", "image", "height", *more, "seeds", *MEANS.values(), "difference of mIoU"]
    head += [COST[key][0] for key in costs] + [f"paper: {column}" for column in printed]
    rows = [
        [
            line.name + (f" ({line.backbone})" if line.backbone else ""),
            "✓" * line.has("image"),
            *("✓" * line.has(kind) for kind in ("dsm", *more)),
            str(len(line.results)) if line.results else "",
            *(spread(line.scores(key)) for key in MEANS),
            told(line.difference),
            *map(line.mean_cost, costs),
            *map(line.printed, printed),
        ]
        for line in lines
    ]
    return [head, *rows]


def class_cells(lines: list[Line]) -> list[list[str]]:
    """Head and rows: the recall of each class, here and in the paper."""
    names = class_names(lines)
    printed = [name for name in names if any(name in line.paper for line in lines)]
    rows = [
        [line.name, *(spread(line.recalls(n)) for n in names), *map(line.printed, printed)]
        for line in lines
    ]
    return [["recall", *names, *(f"paper: {name}" for name in printed)], *rows]


def other_rasters(lines: list[Line]) -> list[str]:
    """Those besides image and heights that some row has."""
    kinds = {kind for line in lines for kind in line.modalities.split("+")}
    return sorted(kinds - {"", "image", "dsm"})


def class_names(lines: list[Line]) -> list[str]:
    found = [row["name"] for ln in lines for r in ln.results for row in r["scores"]["per_class"]]
    return list(dict.fromkeys(found))


def captions(name: str, lines: list[Line], reference: str) -> list[str]:
    seeds = max((len(line.results) for line in lines), default=0)
    notes = sorted({r["scores"]["convention"] for ln in lines for r in ln.results})
    texts = [
        "Percent; mean ± standard deviation over seeds. Beside each row the difference of mIoU "
        f"from {reference}, with a 95 % interval over seeds and tiles (paired bootstrap); where it "
        "holds 0 the two are not told apart. Of twenty equal rows, one is told apart by chance.",
        *notes,
    ]
    texts += [f"{PAPER[name].note}."] if name in PAPER else []
    if 0 < seeds < 3:
        texts.append(f"{seeds} seed{'s' * (seeds > 1)}: too few to tell much.")
    return texts


def markdown(name: str, lines: list[Line], reference: str, cost: bool = False) -> str:
    head, *rows = cells_of(lines, cost)
    rule = ["---", *["---:"] * (len(head) - 1)]
    drawn = [
        "| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |"
        for cells in (head, rule, *rows)
    ]
    return "\n".join([*drawn, "", *captions(name, lines, reference)])


def as_csv(lines: list[Line], reference: str) -> str:
    """Numbers alone, one to a column: mean and standard deviation, ends of the interval."""
    names, kinds = class_names(lines), ("image", "dsm", *other_rasters(lines))
    records = []
    for line in lines:
        d = line.difference
        record = {"row": line.name, "backbone": line.backbone, "seeds": len(line.results)}
        record |= {kind: int(line.has(kind)) for kind in kinds if line.modalities}
        values = {label: line.scores(key) for key, label in MEANS.items()}
        values |= {f"recall {name}": line.recalls(name) for name in names}
        values |= {key: line.cost(key) for key in COST}
        for key, found in values.items():
            record[key] = statistics.fmean(found) if found else ""
            record[f"{key} sd"] = statistics.stdev(found) if len(found) > 1 else ""
        record |= {"reference": reference, "difference": "" if d is None else 100 * d.mean}
        record |= {"low": "", "high": "", "told": ""}
        if d and d.low is not None:
            record |= {"low": 100 * d.low, "high": 100 * d.high, "told": int(d.is_told)}
        records.append(record | {f"paper {column}": v for column, v in line.paper.items()})
    text = io.StringIO()
    fields = dict.fromkeys(key for record in records for key in record)
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_latex(lines: list[Line], cost: bool = False) -> str:
    """A tabular of the table on the terminal; its ticks need the package amssymb."""
    signs = {"\\": r"\textbackslash{}", "±": r"$\pm$", "✓": r"\checkmark"}
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\^{}"}
    cells = cells_of(lines, cost)
    head, *rows = (
        " & ".join("".join(signs.get(c, c) for c in cell) for cell in row) + r" \\" for row in cells
    )
    begin = rf"\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}"
    return "\n".join([begin, r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}", ""])


# ----------------------------------------------------------------------------------------- the page


def write_sweep_page(path: Path, name: str, title: str, lines: list[Line], reference: str) -> None:
    """The table with every class, the intervals, the score against the cost, and the cells."""

    def drawn_table(cells: list[list[str]]) -> str:
        head, *rows = ([cell.replace(" ", "\u00a0") for cell in row] for row in cells)
        return table(head, rows, lambda row, _: "" if lines[row].results else ' class="dim"')

    notes = "".join(note(text) for text in captions(name, lines, reference))
    sections = {"": drawn_table(cells_of(lines, cost=True)) + notes}
    intervals = {
        ln.name: tuple(100 * value for value in (d.mean, d.low, d.high))
        for ln in lines
        if (d := ln.difference) and d.low is not None
    }
    if intervals:
        sections["Differences"] = interval_chart(f"mIoU less {reference}'s, percent", intervals)
    charts = []
    for key in COST:
        points = {
            line.name: (statistics.fmean(line.cost(key)), statistics.fmean(line.scores("miou")))
            for line in lines
            if line.cost(key) and line.scores("miou")
        }
        charts += [scatter_chart(COST[key][0], "mIoU, %", points)] if len(points) > 1 else []
    if charts:
        sections["Score and cost"] = f'<div class="charts">{"".join(charts)}</div>'
    if any(line.results for line in lines):
        sections["Classes"] = drawn_table(class_cells(lines))
        sections["Cells"] = made_by(lines)
    write_page(path, f"{name}: {title}", sections)


def made_by(lines: list[Line]) -> str:
    """Where and by what each result was made."""
    head = ["cell", "key", "device", "code", "backbone", "date"]
    results = [result for line in lines for result in line.results]
    rows = [
        [r["cell"], r["key"][:12], r["device"], r["version"], r["base"]["sha256"][:12], r["date"]]
        for r in results
    ]
    commands = (html.escape(" ".join(result["command"])) for result in results)
    return table(head, rows) + f"<pre>{'<br>'.join(commands)}</pre>"
