"""A sweep's results as a table: Markdown, CSV, LaTeX, a page."""

from reports.page import percent


def markdown(name, entries):
    lines = ["| row | mIoU |", "|---|---:|"]
    for row in dict.fromkeys(e["row"] for e in entries):
        own = [e for e in entries if e["row"] == row]
        lines.append(f"| {row} | {percent(*(e['scores']['miou'] for e in own))} |")
    return "\n".join(lines)
