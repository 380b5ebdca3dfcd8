"""What a run looks like: a panel per tile, and one page, `report.html`, made of the run's files
alone.

The page needs no network and no script: curves are inline SVG, pictures are in it. It is readable
on a phone and in print."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.files import replace_atomically
from geodata.labels import labels_to_colors
from geodata.scaling import height_range
from geodata.tiles import LoadedTile
from reports.table import PAPER_SCORES, variant

MAX_SIDE = 640  # pixels: larger tiles are shown smaller


INK, PAPER = (40, 40, 40), (255, 255, 255)


WRONG, RIGHT, UNSCORED = (214, 39, 40), (232, 232, 232), (0, 0, 0)


SURE, UNSURE = (255, 255, 255), (8, 48, 107)


Classes = tuple[tuple[str, tuple[int, int, int]], ...]


def save_panel(
    path: Path, tile: LoadedTile, pred: np.ndarray, confidence: np.ndarray, classes: Classes
) -> None:
    """Writes the panel of a tile as a PNG."""
    panel = tile_panel(tile, pred, confidence, classes)
    replace_atomically(path, lambda p: panel.save(p, format="PNG"))


def tile_panel(
    tile: LoadedTile, pred: np.ndarray, confidence: np.ndarray, classes: Classes
) -> Image.Image:
    """The tile's rasters, labels (H, W), prediction (H, W), errors and confidence (H, W) in percent
    side by side, with a legend of the classes.
    """
    palette = [color for _, color in classes]
    columns: list[tuple[str, np.ndarray, Image.Resampling]] = []
    if tile.image is not None:
        pixels = visible(tile)
        columns.append(("image", pixels, Image.Resampling.BOX))
    if tile.dsm is not None:
        low, high = height_range(tile.dsm)
        columns.append(
            (f"height, {low:.1f} to {high:.1f} m", shade_heights(tile.dsm), Image.Resampling.BOX)
        )
    if tile.labels is not None:
        columns.append(("truth", labels_to_colors(tile.labels, palette), Image.Resampling.NEAREST))
    columns.append(("prediction", labels_to_colors(pred, palette), Image.Resampling.NEAREST))
    if tile.labels is not None:
        columns.append(("errors (red)", error_map(pred, tile.labels), Image.Resampling.NEAREST))
    columns.append(
        (
            "confidence (dark: unsure)",
            shade_confidence(confidence, len(classes)),
            Image.Resampling.BOX,
        )
    )
    return assemble(columns, classes)


def assemble(
    columns: list[tuple[str, np.ndarray, Image.Resampling]], classes: Classes
) -> Image.Image:
    """Puts the columns side by side, their titles above, the legend of the classes below."""
    H, W = columns[0][1].shape[:2]
    shrink = min(1.0, MAX_SIDE / max(H, W))
    h, w = max(1, round(H * shrink)), max(1, round(W * shrink))
    size = min(
        max(w // 24, 11), 22
    )  # pixels of a line of text: readable when a wide panel is shown smaller
    font = ImageFont.load_default(size)
    gap, line = size // 2 + 2, 2 * size
    step = max(w, max(round(font.getlength(title)) for title, _, _ in columns)) + gap
    entries = [(name, color, round(font.getlength(name))) for name, color in classes]
    legend = gap + sum(length + 3 * size for _, _, length in entries)
    canvas = Image.new("RGB", (max(gap + step * len(columns), legend), h + 2 * line), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (title, pixels, resampling) in enumerate(columns):
        draw.text((gap + i * step, line // 2), title, fill=INK, font=font, anchor="lm")
        canvas.paste(Image.fromarray(pixels).resize((w, h), resampling), (gap + i * step, line))
        draw.rectangle((gap + i * step - 1, line - 1, gap + i * step + w, line + h), outline=INK)
    left, middle = gap, line + h + line // 2
    for name, color, length in entries:
        draw.rectangle(
            (left, middle - size // 2, left + size, middle + size // 2), fill=color, outline=INK
        )
        draw.text((left + size + gap // 2, middle), name, fill=INK, font=font, anchor="lm")
        left += length + 3 * size
    return canvas


def visible(tile: LoadedTile) -> np.ndarray:
    """(H, W, 3) uint8 of the image as the network sees it; what is not in 0 to 1, as by SAM's mean,
    stretched to it.
    """
    pixels = tile.scale.image_input(tile.image).transpose(1, 2, 0)
    if pixels.min() < 0 or pixels.max() > 1:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (pixels * 255).astype(np.uint8)


def shade_heights(dsm: np.ndarray) -> np.ndarray:
    """(H, W) metres -> (H, W, 3) grey: bright is high, with a light from the upper left for the
    relief.
    """
    low, high = np.percentile(dsm, (1, 99))
    level = np.clip((dsm - low) / max(high - low, 1e-6), 0, 1)
    dy, dx = np.gradient(dsm) if min(dsm.shape) > 1 else (np.zeros_like(dsm), np.zeros_like(dsm))
    slope = -(dx + dy) * 0.7
    relief = slope / np.sqrt(1 + slope**2)
    grey = np.clip(40 + 180 * level + 45 * relief, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def error_map(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(H, W, 3): wrong pixels red, right ones light, unscored ones black."""
    out = np.where((pred == truth)[..., None], np.uint8(RIGHT), np.uint8(WRONG))
    out[truth == 255] = UNSCORED
    return out


def shade_confidence(confidence: np.ndarray, K: int) -> np.ndarray:
    """(H, W) percent -> (H, W, 3): from dark where all K classes are as likely to light where one
    is certain.
    """
    lowest = 100 / K if K > 1 else 0
    level = np.clip((np.arange(256) - lowest) / (100 - lowest), 0, 1)[:, None]
    table = np.array(UNSURE) + level * (np.array(SURE) - UNSURE)
    return np.rint(table).astype(np.uint8)[confidence]


# ----------------------------------------------------------------------------------------- the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1100px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin-bottom: 1rem; } td, th { padding: .2rem .6rem; text-align: right; } th { font-weight: 600; }
td:first-child, th:first-child { text-align: left; } tr + tr td { border-top: 1px solid #eee; }
.wide { overflow-x: auto; } .wide img { min-width: 800px; width: 100%; } .note { color: #555; font-size: .9rem; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } svg { max-width: 100%; height: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(150px, 22%), 1fr)); gap: 1rem; margin: 1rem 0; }
figure { margin: 0; } figcaption { font-size: .9rem; } .key { white-space: nowrap; margin-right: 1rem; }
.figures img { width: 100%; box-sizing: border-box; border: 1px solid #bbb; image-rendering: pixelated; }
.key span { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.15em; border: 1px solid #444; }
.settings { columns: 18rem; font-size: .9rem; } .settings div { break-inside: avoid; }
@media print { body { max-width: none; } .wide img { min-width: 0; } h2 { break-after: avoid; } }
"""


def write_report(run: Path) -> None:
    """Writes report.html of a run's folder from its config.json, log.jsonl, scores.json and
    pictures/.
    """
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    scores = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    log = [
        json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    title = f"{config['data']}: {config['encoder']}, {config['tuner']}, {config['modalities']}"
    sections = [
        ("Scores", score_table(scores, config)),
        ("Training", curves(log)),
        ("Confusion", confusion_table(scores)),
        (
            "Tiles",
            "".join(
                picture(path)
                for path in sorted((run / "pictures").glob(f"{scores['split']}_*.png"))
            ),
        ),
        (
            "Parameters",
            table(["group", "number"], [[k, f"{v:,}"] for k, v in config["parameters"].items()]),
        ),
        ("Settings", setting_list(config)),
    ]
    text = page(title, config["version"], sections)
    replace_atomically(run / "report.html", lambda p: p.write_text(text, encoding="utf-8"))


def page(title: str, note: str, sections: list[tuple[str, str]]) -> str:
    """A page that needs nothing from outside; `sections` are headings and HTML."""
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>{body}</body></html>'
    )


def percent(value: float | None) -> str:
    return "&ndash;" if value is None else f"{100 * value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already, but for the first of a row, which is text."""
    lines = ["".join(f"<th>{html.escape(h)}</th>" for h in head)]
    lines += [
        f"<td>{html.escape(first)}</td>" + "".join(f"<td>{c}</td>" for c in cells)
        for first, *cells in rows
    ]
    return (
        '<div class="wide"><table>'
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</table></div>"
    )


def score_table(scores: dict, config: dict) -> str:
    """The means, also by the other labels, with the paper's row where it has one, then the classes."""
    parts = {"this run": scores}
    parts |= {
        f"this run, {k.replace('_', ' ')}": scores[k]
        for k in ("full_labels", "eroded_labels")
        if k in scores
    }
    means = [
        [name, *(percent(part[k]) for k in ("oa", "mf1", "miou", "kappa"))]
        for name, part in parts.items()
    ]
    paper = PAPER_SCORES.get((config["data"], config["tuner"], config["encoder"]))
    if paper and not variant(config):
        means.append(
            ["the paper (best epoch on the test tiles)", *(f"{v:.2f}" for v in paper), "&ndash;"]
        )
    classes = [
        [
            row["name"],
            *(percent(row[k]) for k in ("iou", "f1", "precision", "recall")),
            f"{row['pixels']:,}",
        ]
        for row in scores["per_class"]
    ]
    convention = "; ".join([scores["convention"], *scores.get("notes", [])])
    return (
        table(["percent", "OA", "mF1", "mIoU", "kappa"], means)
        + table(["class", "IoU", "F1", "precision", "recall", "pixels"], classes)
        + f'<p class="note">{html.escape(convention)}; {scores["pixels"]:,} pixels.</p>'
    )


def confusion_table(scores: dict) -> str:
    """Rows truth, columns prediction, in percent of the truth; the darker, the more."""
    names = [row["name"] for row in scores["per_class"]]
    rows = []
    for name, counts in zip(names, scores["confusion"]):
        shares = [n / max(sum(counts), 1) for n in counts]
        cells = [
            f'<span style="display:block;background:rgba(31,119,180,{s:.3f});color:{"#fff" if s > 0.6 else "#222"}">'
            f"{100 * s:.1f}</span>"
            for s in shares
        ]
        rows.append([name, *cells])
    return table(["truth \\ prediction, %", *names], rows)


def curves(log: list[dict]) -> str:
    """Loss, and the score where there is one, against the epoch; time and memory in words."""
    plots = [curve("loss", [(e["epoch"], e["loss"]) for e in log])]
    scored = [(e["epoch"], 100 * e["miou"]) for e in log if e.get("miou") is not None]
    plots += [curve("mIoU during training, %", scored)] if scored else []
    seconds, last = sum(e["seconds"] for e in log), log[-1]
    memory = "unknown" if last["peak_memory_mb"] is None else f"{last['peak_memory_mb']:,.0f} MB"
    words = f"{len(log)} epochs in {seconds:,.0f} s, {last['images_per_second']:.3g} images/s at last, peak memory {memory}."
    return f'<div class="curves">{"".join(plots)}</div><p class="note">{words}</p>'


def curve(label: str, points: list[tuple[int, float]]) -> str:
    """One line as inline SVG, with its smallest and largest value."""
    width, height, left, top = 480, 220, 60, 30
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)

    def place(x: float, y: float) -> str:
        u = (x - xs[0]) / max(xs[-1] - xs[0], 1)
        v = (y - low) / (high - low) if high > low else 0.5
        return f"{left + u * (width - left - 15):.1f},{height - 25 - v * (height - 25 - top):.1f}"

    line = " ".join(place(x, y) for x, y in points)
    dots = "".join(
        '<circle cx="{}" cy="{}" r="2.5" fill="#1f77b4"/>'.format(*place(x, y).split(","))
        for x, y in points
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}" font-size="12" fill="#444">'
        f'<text x="{left}" y="16" font-weight="600">{label}</text>'
        f'<path d="M{left} {top}V{height - 25}H{width - 15}" fill="none" stroke="#bbb"/>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{left - 6}" y="{height - 25}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{left}" y="{height - 8}">epoch {xs[0]}</text>'
        f'<text x="{width - 15}" y="{height - 8}" text-anchor="end">{xs[-1]}</text>'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>{dots}</svg>'
    )


def picture(path: Path) -> str:
    """A panel of pictures/ as a figure, at most 1600 pixels wide."""
    with Image.open(path) as panel:
        panel = panel.convert("RGB")
    panel.thumbnail((1600, 1600))
    buffer = io.BytesIO()
    panel.save(buffer, format="JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(path.stem.replace("_", " tile ", 1))
    return f'<p>{name}</p><div class="wide"><img alt="{name}" src="data:image/jpeg;base64,{code}"></div>'


def setting_list(config: dict) -> str:
    skipped = ("classes", "version", "parameters", "base")
    items = [f"{k}: {v}" for k, v in config.items() if k not in skipped] + [
        f"base: {config['base']['weights']}"
    ]
    return (
        '<div class="settings">' + "".join(f"<div>{html.escape(i)}</div>" for i in items) + "</div>"
    )
