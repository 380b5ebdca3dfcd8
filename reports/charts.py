"""Charts of a sweep as inline SVG: intervals in rows, and points with numbers."""

from __future__ import annotations

import html
import math

from reports.page import COLORS, END, note, svg, text_at


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'


def interval_chart(title: str, rows: dict[str, tuple[float, float, float]]) -> str:
    """(mean, low, high) by name, one above the other, about a line at 0. What holds 0 is pale."""
    left, right, top, step = 230, 740, 44, 22
    low = min(0, *(value[1] for value in rows.values()))
    high = max(0, *(value[2] for value in rows.values()))
    span, bottom = (high - low) or 1, top + step * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / span * (right - left)

    drawn = [text_at(0, 14, html.escape(title), ' font-weight="600"')]
    for value in dict.fromkeys((low, 0, high)):
        anchor = "end" if value == high else "start" if value == low else "middle"
        if value and abs(x(value) - x(0)) < 60:
            continue  # its label would lie on that of 0
        drawn.append(text_at(x(value), 34, f"{value:.3g}", f' text-anchor="{anchor}"'))
    drawn.append(rule(x(0), top - 6, x(0), bottom))
    for i, (name, (mean, first, last)) in enumerate(rows.items()):
        y, faint = top + step * i + 10, ' opacity="0.55"' if first <= 0 <= last else ""
        line = f'x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y}" y2="{y}"'
        drawn.append(
            f"{text_at(0, y + 4, html.escape(name))}<g{faint}>"
            f'<line {line} stroke="{COLORS[0]}" stroke-width="3"/>'
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="5" fill="{COLORS[0]}"/></g>'
        )
    return f'<div class="wide">{svg(title, 760, bottom + 8, drawn)}</div>'


def scatter_chart(x_name: str, y_name: str, points: dict[str, tuple[float, float]]) -> str:
    """Points (x, y) by name, numbered; x by its logarithm where it spans more than a factor 20."""
    width, left, right, top, bottom = 360, 50, 335, 30, 200
    xs, ys = ([point[i] for point in points.values()] for i in (0, 1))
    log = min(xs) > 0 and max(xs) > 20 * min(xs)

    def along(value: float, values: list[float], scale=float) -> float:
        low, high = scale(min(values)), scale(max(values))
        return (scale(value) - low) / ((high - low) or 1)

    title = f"{y_name} against {x_name}"
    drawn = [text_at(0, 16, html.escape(title), ' font-weight="600"')]
    for value in dict.fromkeys((min(ys), max(ys))):
        y = bottom - along(value, ys) * (bottom - top)
        drawn.append(rule(left, y, right, y) + text_at(left - 6, y + 4, f"{value:.4g}", END))
    for number, (name, (x, y)) in enumerate(points.items(), 1):
        cx = left + along(x, xs, math.log if log else float) * (right - left)
        cy = bottom - along(y, ys) * (bottom - top)
        color = COLORS[(number - 1) % len(COLORS)]
        drawn.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"><title>{html.escape(name)}'
            f"</title></circle>{text_at(cx + 6, cy - 5, str(number))}"
        )
    scale = ", logarithmic" if log else ""
    drawn.append(text_at(left, bottom + 20, f"{min(xs):.3g}{scale}"))
    drawn.append(text_at(right, bottom + 20, f"{max(xs):.3g}", END))
    names = note(", ".join(f"{number} {name}" for number, name in enumerate(points, 1)))
    return f'<div style="max-width:{width}px">{svg(title, width, 225, drawn)}{names}</div>'
