"""Charts of a sweep as inline SVG: intervals in rows, and points with numbers."""

from __future__ import annotations

import html
import math

from reports.page import COLORS, note

RULE = 'stroke="var(--rule)"'


def interval_chart(title: str, rows: dict[str, tuple[float, float, float]]) -> str:
    """(mean, low, high) by name, one above the other, about a line at 0. What holds 0 is pale."""
    width, left, right, top, step = 760, 230, 740, 44, 22
    low = min(0, *(value[1] for value in rows.values()))
    high = max(0, *(value[2] for value in rows.values()))
    span, bottom = (high - low) or 1, top + step * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / span * (right - left)

    drawn = [f'<text x="0" y="14" font-weight="600">{html.escape(title)}</text>']
    for value in dict.fromkeys((low, 0, high)):
        anchor = "end" if value == high else "start" if value == low else "middle"
        if value and abs(x(value) - x(0)) < 60:
            continue  # its label would lie on that of 0
        drawn.append(f'<text x="{x(value):.1f}" y="34" text-anchor="{anchor}">{value:.3g}</text>')
    drawn.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top - 6}" y2="{bottom}" {RULE}/>')
    for i, (name, (mean, first, last)) in enumerate(rows.items()):
        y, faint = top + step * i + 10, ' opacity="0.55"' if first <= 0 <= last else ""
        line = f'x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y}" y2="{y}"'
        drawn.append(
            f'<text x="0" y="{y + 4}">{html.escape(name)}</text><g{faint}>'
            f'<line {line} stroke="{COLORS[0]}" stroke-width="3"/>'
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="5" fill="{COLORS[0]}"/></g>'
        )
    label = f'role="img" aria-label="{html.escape(title)}" style="min-width:{width}px"'
    svg = f'<svg viewBox="0 0 {width} {bottom + 8}" width="{width}" {label}>{"".join(drawn)}</svg>'
    return f'<div class="wide">{svg}</div>'


def scatter_chart(x_name: str, y_name: str, points: dict[str, tuple[float, float]]) -> str:
    """Points (x, y) by name, numbered; x by its logarithm where it spans more than a factor 20."""
    width, left, right, top, bottom = 360, 50, 335, 30, 200
    xs, ys = ([point[i] for point in points.values()] for i in (0, 1))
    log = min(xs) > 0 and max(xs) > 20 * min(xs)

    def along(value: float, values: list[float], scale=lambda v: v) -> float:
        low, high = scale(min(values)), scale(max(values))
        return (scale(value) - low) / ((high - low) or 1)

    title = f"{y_name} against {x_name}"
    drawn = [f'<text x="0" y="16" font-weight="600">{html.escape(title)}</text>']
    for value in dict.fromkeys((min(ys), max(ys))):
        y = bottom - along(value, ys) * (bottom - top)
        drawn.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" {RULE}/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for number, (name, (x, y)) in enumerate(points.items(), 1):
        cx = left + along(x, xs, math.log if log else float) * (right - left)
        cy = bottom - along(y, ys) * (bottom - top)
        color = COLORS[(number - 1) % len(COLORS)]
        drawn.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"><title>{html.escape(name)}'
            f'</title></circle><text x="{cx + 6:.1f}" y="{cy - 5:.1f}">{number}</text>'
        )
    scale = ", logarithmic" if log else ""
    drawn.append(f'<text x="{left}" y="{bottom + 20}">{min(xs):.3g}{scale}</text>')
    drawn.append(f'<text x="{right}" y="{bottom + 20}" text-anchor="end">{max(xs):.3g}</text>')
    label = f'role="img" aria-label="{html.escape(title)}"'
    svg = f'<svg viewBox="0 0 {width} 225" width="{width}" {label}>{"".join(drawn)}</svg>'
    names = note(", ".join(f"{number} {name}" for number, name in enumerate(points, 1)))
    return f'<div style="max-width:{width}px">{svg}{names}</div>'
