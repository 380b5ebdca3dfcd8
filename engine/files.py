"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Callable


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path` and renames it: the file is either the old
    or the new one. A link stays one, and the file that it leads to is replaced."""
    replace_together([path], write)


def write_text(path: Path, text: str) -> None:
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_together(paths: list[Path], write: Callable[..., None]) -> None:
    """The same for files that belong together, with a temporary path for each: all are whole before
    one is renamed. What there is of the others is removed before the first takes its place: an
    interruption leaves too few of them, and never one beside a file that it does not belong to."""
    paths = [path.resolve() if path.is_symlink() else path for path in paths]
    mark = secrets.token_hex(4)  # no file of the user's has such a name
    temporary = [path.with_name(f"{path.name}.{mark}.tmp") for path in paths]
    try:
        write(*temporary)
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        for finished, path in zip(temporary, paths):
            os.replace(finished, path)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
