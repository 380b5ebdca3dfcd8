"""The equations of docs/method.md as HTML, and the lines of code that compute them.

That page is the one place where an equation, its number and its code are put together: after an
equation come the names, as `file.py:name`, that compute it, or it shares those of the next one.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import textwrap
from typing import Callable

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.")
SYMBOLS = {
    r"\cdot": "·", r"\top": "⊤", r"\sum": "∑", r"\sigma": "σ", r"\alpha": "α", r"\omega": "ω",
    r"\leftarrow": "←", r"\ne": "≠", r"\in": "∈", r"\ni": "∋", r"\qquad": "&emsp;&emsp;",
    r"\quad": "&emsp;", r"\,": "&thinsp;", r"\Big": "", "-": "−",
}  # fmt: skip


def equations(page: str) -> dict[str, dict[int, str]]:
    """The text of docs/method.md -> for each name that it cites the equations that it computes, as
    HTML by number."""
    found: dict[str, dict[int, str]] = {}
    waiting: dict[int, str] = {}  # equations that no name has followed yet
    tagged = r"\$\$([^$]+?)\s*\\tag\{(\d+)\}\s*\$\$([^$]*)"
    for latex, number, text in re.findall(tagged, page):
        waiting[int(number)] = to_html(" ".join(latex.split()))
        names = re.findall(r"`([\w/]+\.py:[\w.]+)`", text)
        for name in names:
            found.setdefault(name, waiting)
        waiting = {} if names else waiting
    return found


def to_html(latex: str) -> str:
    """An equation in LaTeX, as far as docs/method.md uses it, as HTML."""
    return up_to(None, TOKEN.findall(latex)[::-1])


def up_to(end: str | None, tokens: list[str]) -> str:
    parts = []
    while tokens and tokens[-1] != end:
        parts.append(term(tokens))
    del tokens[-1:]
    return "".join(parts)


def term(tokens: list[str]) -> str:
    """Takes a term off the end of `tokens`, which are in reverse order."""
    token = tokens.pop()
    if token == "{":
        return up_to("}", tokens)
    if token in "_^":
        return "<{0}>{1}</{0}>".format("sub" if token == "_" else "sup", argument(tokens))
    if token in (r"\frac", r"\tfrac"):
        parts = [f"<span>{argument(tokens)}</span>" for _ in range(2)]
        return f'<span class="frac">{"".join(parts)}</span>'
    if token == r"\sqrt":
        return "√" + argument(tokens)
    if token == r"\text":
        return re.sub("</?i>", "", argument(tokens)).replace("−", "-")
    if token in SYMBOLS:
        return SYMBOLS[token]
    return f"<i>{token}</i>" if token.isalpha() else html.escape(token.removeprefix("\\"))


def argument(tokens: list[str]) -> str:
    while tokens[-1].isspace():
        tokens.pop()
    return term(tokens)


def excerpt(function: Callable) -> list[str]:
    """The body of a function below its docstring, as it stands in its file. Raises OSError for one
    that stands in none."""
    source = textwrap.dedent(inspect.getsource(function))
    (first, *_), lines = ast.parse(source).body[0].body, source.splitlines()
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if is_docstring else first.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):  # comments before the first statement
        start -= 1
    return textwrap.dedent("\n".join(lines[start:])).strip("\n").splitlines()
