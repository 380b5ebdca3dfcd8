"""A module as a drawing: a box for each of its parts in the order of its calls, as SVG."""

from __future__ import annotations

import html

WIDTH, GAP, LINE = 358, 6, 13  # pixels; a phone shows the drawing at its own size
TRAINED, FROZEN = "#d95f02", "var(--rule)"


Box = tuple[str, str, list[str], bool]  # name, class, a line for each of its parts, is it trained


def draw_boxes(rows: list[list[Box]], title: str) -> str:
    """Rows of boxes, from top to bottom with an arrow between: orange where something is trained,
    grey where all is frozen or there are no parameters."""
    drawn, top = [], 2
    for i, row in enumerate(rows):
        height = 22 + LINE * max(len(lines) for _, _, lines, _ in row)
        width = (WIDTH - 4 - GAP * (len(row) - 1)) / len(row)
        if i:
            drawn.append(f'<path d="M{WIDTH / 2} {top - 14}v10m-3-4l3 4l3-4"/>')
        for j, (name, kind, lines, trained) in enumerate(row):
            left = 2 + j * (width + GAP)
            edge = f'stroke="{TRAINED if trained else FROZEN}" stroke-width="2" fill="none"'
            place = f'x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="4"'
            drawn.append(f"<rect {place} {edge}/>")
            head = f'<tspan font-weight="600">{html.escape(name)}</tspan> {html.escape(kind)}'
            texts = [head, *map(html.escape, lines)]
            drawn += [
                f'<text x="{left + 6:g}" y="{top + 15 + LINE * k}" font-size="10">{text}</text>'
                for k, text in enumerate(texts)
            ]
        top += height + 16
    label = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg viewBox="0 0 {WIDTH} {top - 12}" width="{WIDTH}" {label}>{"".join(drawn)}</svg>'
