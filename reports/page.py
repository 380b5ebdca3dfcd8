"""A page of HTML that needs no network and no script: text, tables, charts and pictures inside.

It is readable on a phone, in a dark scheme and in print."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from engine.files import replace_atomically
from geodata.annotation import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, YELLOW

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #595959; --rule: #bbb; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --rule: #555; --page: #161616; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  margin: 0 auto; max-width: 1100px; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--rule); }
.note, pre { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
.banner { border: 2px solid; padding: .5rem 1rem; font-weight: 600; }
.numbers { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.numbers b { display: block; font-size: 2.2rem; line-height: 1.1; }
.wide { overflow-x: auto; padding-right: 1.5rem;  /* what goes on to the right fades out */
  mask-image: linear-gradient(90deg, #000 calc(100% - 1.5rem), transparent); }
.wide img { min-width: 800px; width: 100%; } .wide svg { min-width: 760px; }
.safe, body:has(#safe:checked) .usual { display: none; }
body:has(#safe:checked) .safe { display: revert; }
.command { user-select: all; }
a { color: inherit; }
.even { font-size: .85rem; }
.even table { table-layout: fixed; width: calc(8rem + var(--columns) * 7rem); }
.even th { hyphens: auto; overflow-wrap: break-word; padding: .2rem .4rem; }
.even th:first-child { width: 8rem; }
.bar { display: inline-block; width: 8rem; height: .8em; border: 1px solid var(--soft); }
table { border-collapse: collapse; margin-bottom: 1rem; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
.dim { color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
svg { max-width: 100%; height: auto; font-size: 12px; fill: currentColor; }
svg path { stroke: var(--rule); fill: none; } svg polyline { stroke-width: 2; fill: none; }
figure { margin: 0 0 1rem; } figcaption { font-size: .9rem; }
.figures { display: grid; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(max(150px, 22%), 1fr)); }
.figures img { width: 100%; border: 1px solid var(--rule); box-sizing: border-box; }
.plate .figures img { image-rendering: pixelated; }
.plate { border-left: 3px solid var(--rule); padding-left: .8rem; }
.equation { overflow-x: auto; font: 1.1rem/1.9 Georgia, serif; }
.equation > b { margin-left: 2em; font-size: 1rem; }
.frac { display: inline-block; vertical-align: middle; text-align: center; line-height: 1.3; }
.frac span { display: block; padding: 0 .2em; }
.frac span + span { border-top: 1px solid; }
.equation sub, .frac { white-space: nowrap; }
.code { color: var(--ink); border: 1px solid var(--rule); padding: .5rem; margin: .2rem 0;
  font-size: .8rem; }
.key { white-space: nowrap; margin-right: 1rem; }
.key span { display: inline-block; width: 1em; height: 1em; margin-right: .4em;
  vertical-align: -.15em; border: 1px solid var(--soft); }
.settings { columns: 18rem; font-size: .9rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; } .wide img { min-width: 0; } h2 { break-after: avoid; } }
"""

RANDOM = (
    '<p class="banner">The encoder is random: SAM&rsquo;s weights were not loaded, and these '
    "scores do not compare with the paper&rsquo;s.</p>"
)
Color = tuple[int, int, int]
# In the order of ISPRS's classes, whose own colours they are akin to; the first is a pale grey.
SAFE: tuple[Color, ...] = ((221,) * 3, BLUE, SKY, GREEN, YELLOW, VERMILLION, PURPLE, ORANGE)
COLORS = ("#3987c2", "#d95f02", "#2ca02c", "#a57bc9", "#a8756a", "#d060ac")  # of lines, in turn


def write_page(path: Path, title: str, sections: dict[str, str]) -> None:
    """Writes a page, whole or not at all; `sections` are HTML by heading, "" for the first one."""
    heads = {name: f"<h2>{html.escape(name)}</h2>" if name else "" for name in sections}
    body = "".join(heads[name] + content for name, content in sections.items())
    title = html.escape(title)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{body}</body></html>"
    )
    replace_atomically(path, lambda p: p.write_text(text, "utf-8", errors="backslashreplace"))


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def spread(values: list[float], form: str = "{:.2f}", sign: str = "±") -> str:
    """The mean, from two values on with the standard deviation of a sample; "" of none."""
    if not values:
        return ""
    deviation = f" {sign} {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def percent(*values: float | None) -> str:
    """The `spread` of values of 0 to 1 in percent; - where there is none."""
    return spread([100 * value for value in values if value is not None], sign="+-") or "-"


def table(
    head: list[str],
    rows: list[list[str]],
    attributes: Callable[[int, int], str] = lambda row, column: "",
) -> str:
    """All cells are text; `attributes` gives those of a cell's tag, as HTML."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    for i, row in enumerate(rows):
        cells = (f"<td{attributes(i, j)}>{html.escape(cell)}</td>" for j, cell in enumerate(row))
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def figure(
    caption: str, picture: Image.Image, format: str = "PNG", palette: Sequence[Color] = ()
) -> str:
    """A picture inside the page, with its caption. What holds colours of the classes' `palette`
    alone is there in the other colours too, for `class_legend` to switch to."""
    text = html.escape(caption)
    image = f'<img{{}} alt="{text}" src="{{}}">'
    if (other := recolored(picture, palette)) is not None:
        usual, safe = encoded(picture, "PNG"), encoded(other, "PNG")
        images = image.format(' class="usual"', usual) + image.format(' class="safe"', safe)
    else:
        images = image.format("", encoded(picture, format))
    return f"<figure>{images}<figcaption>{text}</figcaption></figure>"


def encoded(picture: Image.Image, format: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format=format, quality=85)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def recolored(picture: Image.Image, palette: Sequence[Color]) -> Image.Image | None:
    """A class map in the colours of `SAFE`; None for any other picture, and for more classes than
    there are such colours. Black, which is not scored, stays."""
    pixels = np.asarray(picture.convert("RGB"))
    if not 0 < len(palette) <= len(SAFE):
        return None
    out, left = pixels.copy(), (pixels != 0).any(axis=-1)
    for color, safe in zip(palette, SAFE):
        there = (pixels == color).all(axis=-1)
        out[there], left = safe, left & ~there
    return None if left.any() else Image.fromarray(out)


def legend(colors: dict[str, str], look: str = "") -> str:
    """Squares of CSS colours, by the text beside them."""
    key = '<span class="key"><span style="background:{}"></span>{}</span> '
    keys = [key.format(color, html.escape(text)) for text, color in colors.items()]
    return f'<p class="note {look}">{"".join(keys)}</p>'


def bar(low: str, high: str, colors: Sequence[Color]) -> str:
    """The colours of a map from `low` to `high`."""
    shades = ", ".join(f"rgb{tuple(map(int, color))}" for color in colors)
    drawn = f'<span class="bar" style="background:linear-gradient(90deg, {shades})"></span>'
    return f'<p class="note">{html.escape(low)} {drawn} {html.escape(high)}</p>'


def command(words: str) -> str:
    """A command, to be copied by a click."""
    return f'<pre class="command">{html.escape(words)}</pre>'


def class_legend(classes: Sequence[tuple[str, Color]]) -> str:
    """The legend of all class maps of a page, and the switch to colours that are safe for colour
    blindness, if there are so many."""
    usual = {name: f"rgb{tuple(color)}" for name, color in classes}
    if len(classes) > len(SAFE):
        return legend(usual)
    safe = {name: f"rgb{color}" for name, color in zip(usual, SAFE)}
    box = '<label><input type="checkbox" id="safe"> colours that are safe for colour blindness'
    return legend(usual, "usual") + legend(safe, "safe") + f'<p class="note">{box}</label></p>'


# ---------------------------------------------------------------------------------------- drawings


def svg(title: str, width: float, height: float, drawn: list[str]) -> str:
    label = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" {label}>{"".join(drawn)}</svg>'


END = ' text-anchor="end"'  # a look: the text ends at x


def text_at(x: float, y: float, text: str, look: str = "") -> str:
    """Text inside an SVG, as HTML; `look`: further attributes."""
    return f'<text x="{x:g}" y="{y:g}"{look}>{text}</text>'


def line_chart(
    title: str, lines: dict[str, list[tuple[float, float]]], low: float, high: float, x_name: str
) -> str:
    """Lines of (x, y) by name as inline SVG, over y from `low` to `high` with a tick in the middle;
    points that are not finite are left out. A legend where there is more than one."""
    left, right, top, bottom = 64, 352, 30, 190
    lines = {n: [(x, y) for x, y in points if math.isfinite(y)] for n, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points] or [0]
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = (x - first) / ((last - first) or 1), (y - low) / ((high - low) or 1)
        return left + u * (right - left), bottom - v * (bottom - top)

    drawn = [text_at(left, 16, html.escape(title), ' font-weight="600"')]
    for y in (low, (low + high) / 2, high):
        height = place(first, y)[1]
        drawn.append(f'<path d="M{left} {height:g}H{right}"/>')
        drawn.append(text_at(left - 6, height + 4, f"{y:.3g}", END))
    colors = dict(zip(lines, itertools.cycle(COLORS)))
    for name, points in lines.items():
        places = ["{:.1f},{:.1f}".format(*place(*point)) for point in points]
        drawn.append(f'<polyline points="{" ".join(places)}" stroke="{colors[name]}"/>')
        dot = f'<circle cx="{{}}" cy="{{}}" r="2.5" fill="{colors[name]}"/>'
        drawn += [dot.format(*xy.split(",")) for xy in places]
    drawn.append(text_at(left, bottom + 17, f"{html.escape(x_name)} {first:g}"))
    drawn.append(text_at(right, bottom + 17, f"{last:g}", END))
    return f"<div>{svg(title, 360, 215, drawn)}{legend(colors) if len(lines) > 1 else ''}</div>"


Box = tuple[str, str, list[str], bool]  # name, class, a line for each of its parts, is it trained


def draw_boxes(rows: list[list[Box]], title: str) -> str:
    """The parts of a module in the order of its calls: rows of boxes, from top to bottom with an
    arrow between; orange where something is trained, grey where all is frozen or there are no
    parameters."""
    across, gap, line = 358, 6, 14  # pixels; a phone shows the drawing at its own size
    drawn, top = [], 2
    for i, row in enumerate(rows):
        height = 22 + line * max(len(lines) for _, _, lines, _ in row)
        width = (across - 4 - gap * (len(row) - 1)) / len(row)
        if i:
            drawn.append(f'<path d="M{across / 2} {top - 14}v10m-3-4l3 4l3-4"/>')
        for j, (name, kind, lines, trained) in enumerate(row):
            left = 2 + j * (width + gap)
            color = COLORS[1] if trained else "var(--rule)"
            edge = f'stroke="{color}" stroke-width="2" fill="none"'
            place = f'x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="4"'
            drawn.append(f"<rect {place} {edge}/>")
            head = f'<tspan font-weight="600">{html.escape(name)}</tspan> {html.escape(kind)}'
            for k, text in enumerate([head, *map(html.escape, lines)]):
                drawn.append(text_at(left + 6, top + 15 + line * k, text, ' font-size="12"'))
        top += height + 16
    return svg(title, across, top - 12, drawn)
