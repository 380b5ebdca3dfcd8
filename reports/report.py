"""What a run looks like: one page, `report.html`, made of the run's files alone."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from engine.console import typed
from geodata.layouts import LAYOUTS
from geodata.rasters import DataError
from reports.files import MEANS, in_a_line, read_files
from reports.page import (
    RANDOM,
    class_legend,
    command,
    figure,
    line_chart,
    note,
    percent,
    table,
    write_page,
)
from reports.paper import paper_scores

FULL_BLUE = np.array((31, 119, 180))  # a cell of the confusion that holds a whole row
LISTED_APART = {"classes", "version", "parameters", "base", "command", "date"}  # not as settings


def write_report(run: Path) -> None:
    """Writes report.html of a run's folder from its scores.json, and from config.json, log.jsonl
    and pictures/ as far as they are there. Raises DataError in one line."""
    config, scores, log = read_files(run)
    if not scores:
        again = typed("evaluate.py", "--run", run)
        raise DataError(f"{run}: there is no scores.json to report; score the run: {again}")
    try:
        title, sections = describe(run, config, scores, log)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{run}: its files are damaged ({in_a_line(error)})") from error
    write_page(run / "report.html", title, sections)


def describe(run: Path, config: dict, scores: dict, log: list[dict]) -> tuple[str, dict[str, str]]:
    """The title, and the sections of the page by heading."""
    title, head = f"Run {run.absolute().name}", big_numbers(scores, config)
    sections = {"Scores": score_tables(scores, config)}
    if log:
        sections["Training"] = training_section(log)
    sections["Confusion"] = confusion_table(scores)
    classes = [(str(name), tuple(color)) for name, color in config.get("classes", ())]
    sections["Tiles"] = pictures(run / "pictures", f"{scores['split']}_", classes)
    if config:
        title = ", ".join(str(config[k]) for k in ("data", "encoder", "tuner", "modalities"))
        head = (RANDOM if config["base"]["weights"] == "random" else "") + head + origin(config)
        counts = [[name, f"{count:,}"] for name, count in config["parameters"].items()]
        sections["Parameters"] = table(["group", "number"], counts)
        items = [f"{k}: {v}" for k, v in config.items() if k not in LISTED_APART]
        items.append(f"base: {config['base']['weights']}")
        listed = "".join(f"<div>{html.escape(item)}</div>" for item in items)
        sections["Settings"] = f'<div class="settings">{listed}</div>'
    else:
        head += note("There is no config.json in this folder: settings are not known.")
    sections["Next"] = command(typed("explain.py", "--run", run))
    return title, {"": head, **sections}


def origin(config: dict) -> str:
    """The code, the seed, and as far as they were kept the date and the command."""
    parts = [str(config["version"]), f"seed {config['seed']}", str(config.get("date", ""))]
    words = config.get("command")
    return note(", ".join(filter(None, parts))) + (command(str(words)) if words else "")


# ------------------------------------------------------------------------------------------- scores


def averaged(scores: dict, config: dict) -> list[int]:
    """The classes that mF1 and mIoU average: the data set's scored ones, as far as they occur; []
    where the mean does not confirm it, as of a data set that is not known here."""
    layout, rows = LAYOUTS.get(config.get("data")), scores["per_class"]
    scored = layout.scored if layout else range(len(rows))
    found = [k for k in scored if k < len(rows) and rows[k]["iou"] is not None]
    total = sum(rows[k]["iou"] for k in found)
    return found if found and math.isclose(total / len(found), scores["miou"] or 0) else []


def mean_labels(scores: dict, config: dict) -> dict[str, str]:
    count = len(averaged(scores, config))
    of = f" ({count} classes)" if count else ""
    return {key: name + of * (key in ("mf1", "miou")) for key, name in MEANS.items()}


def big_numbers(scores: dict, config: dict) -> str:
    labels, box = mean_labels(scores, config), "<div><b>{}</b>{}, %</div>"
    boxes = [box.format(percent(scores[key]), labels[key]) for key in ("miou", "mf1", "oa")]
    return f'<div class="numbers">{"".join(boxes)}</div>'


def score_tables(scores: dict, config: dict) -> str:
    """The means, also by the other labels, with the paper's row where it has one; the classes."""
    others = [name for name in ("full_labels", "eroded_labels") if name in scores]
    parts = {"this run": scores}
    parts |= {f"this run, {name.replace('_', ' ')}": scores[name] for name in others}
    means = [[name, *(percent(part[k]) for k in MEANS)] for name, part in parts.items()]
    if config and (paper := paper_scores(config)):
        name = "the paper (best epoch on the test tiles)"
        means.append([name, *(f"{score:.2f}" for score in paper), "-"])
    columns = ("iou", "f1", "precision", "recall")
    classes = [
        [row["name"], *(percent(row[k]) for k in columns), f"{row['pixels']:,}"]
        for row in scores["per_class"]
    ]
    inside = averaged(scores, config)
    head = ["class", "IoU", "F1", "precision", "recall", "pixels"]
    dim = ["" if row in inside or not inside else ' class="dim"' for row in range(len(classes))]
    return (
        table(["percent", *mean_labels(scores, config).values()], means)
        + table(head, classes, lambda row, _: dim[row])
        + note(f"{scores['convention']}; {scores['pixels']:,} pixels.")
        + "".join(f"<p>{html.escape(one)}</p>" for one in scores.get("notes", []))
    )


def confusion_table(scores: dict) -> str:
    """Rows truth, columns prediction, in percent of the truth; the darker, the more."""
    names, counts = [row["name"] for row in scores["per_class"]], scores["confusion"]
    parts = [[count / max(sum(row), 1) for count in row] for row in counts]

    def attributes(row: int, column: int) -> str:
        if column == 0:
            return ""
        back = 255 + parts[row][column - 1] * (FULL_BLUE - 255)
        colors = f"background:rgb{tuple(back.round().astype(int).tolist())};color:{text_on(back)}"
        return f' style="{colors}" title="{counts[row][column - 1]:,} pixels"'

    rows = [[name, *(f"{100 * p:.1f}" for p in row)] for name, row in zip(names, parts)]
    cells = table(["truth \\ prediction, %", *names], rows, attributes)
    return f'<div class="even" style="--columns:{len(names)}">{cells}</div>'


def text_on(color: np.ndarray) -> str:
    """Black or white, whichever has more contrast (WCAG) on a colour of 0 to 255."""
    c = np.asarray(color) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "#000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#fff"


# ------------------------------------------------------------------------------ training, pictures


def training_section(log: list[dict]) -> str:
    """Loss, and the score where there is one, against the epoch; time and memory in words."""
    losses = [(entry["epoch"], entry["loss"]) for entry in log]
    top = max((loss for _, loss in losses if math.isfinite(loss)), default=1)
    charts = [line_chart("loss", {"": losses}, 0, top, "epoch")]
    scored = [(e["epoch"], 100 * e["miou"]) for e in log if e.get("miou") is not None]
    if scored:
        low, high = min(value for _, value in scored), max(value for _, value in scored)
        low, high, title = 10 * (low // 10), 10 * math.ceil(high / 10), "mIoU during training, %"
        charts.append(line_chart(title, {"": scored}, low, max(high, low + 10), "epoch"))
    if rates := [(e["epoch"], e["lr"]) for e in log if "lr" in e]:
        top = max(rate for _, rate in rates)
        charts.append(line_chart("learning rate", {"": rates}, 0, top, "epoch"))
    seconds, memory = sum(entry["seconds"] for entry in log), log[-1].get("peak_memory_mb")
    words = (
        f"{len(log)} epochs in {seconds:,.0f} s, {log[-1]['images_per_second']:.3g} images/s at "
        f"last, peak memory {'unknown' if memory is None else f'{memory:,.0f} MB'}."
    )
    return f'<div class="charts">{"".join(charts)}</div>{note(words)}'


def pictures(folder: Path, prefix: str, classes: list) -> str:
    """The panels of a folder whose names begin with `prefix`: a figure for each column, under one
    legend, and a link to the whole."""
    found, palette = [class_legend(classes) if classes else ""], [color for _, color in classes]
    for path in sorted(path for path in folder.glob("*.png") if path.name.startswith(prefix)):
        caption = path.stem.replace("_", " tile ", 1)
        try:
            with Image.open(path) as picture:
                panel, boxes = picture.convert("RGB"), json.loads(picture.info.get("columns", "{}"))
            found.append(panel_figures(caption, panel, boxes, palette))
        except (OSError, SyntaxError) as error:  # Pillow's, of damaged PNGs
            found.append(note(f"{caption}: cannot be read ({in_a_line(error)})"))
        else:
            whole = html.escape(f"{folder.name}/{path.name}")
            found.append(f'<p class="note"><a href="{whole}">the whole picture</a></p>')
    return "".join(found) if len(found) > 1 else note("There are no pictures of these tiles here.")


def panel_figures(caption: str, panel: Image.Image, boxes: dict, palette: list) -> str:
    if not boxes:  # of an earlier version
        panel.thumbnail((1600, 1600))
        return f'<div class="wide">{figure(caption, panel, "JPEG")}</div>'
    parts = {title: panel.crop(box) for title, box in boxes.items()}
    drawn = [figure(title, part, "JPEG", palette) for title, part in parts.items()]
    return f'<h3>{html.escape(caption)}</h3><div class="figures">{"".join(drawn)}</div>'
