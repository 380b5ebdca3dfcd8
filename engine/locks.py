"""Locks between processes: held while the file is open, so that a killed process holds nothing."""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from engine.console import Mistake

HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK}  # another process has it


def try_lock(path: Path) -> int | None:
    """Locks a folder, or a file, which is made if need be -> its descriptor, to be closed; None
    where another process holds it. Raises Mistake on a file system that has no locks."""
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o644)
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if error.errno in HELD:
            return None
        lockless = f"{path.parent} is on a file system without locks ({error.strerror})"
        raise Mistake(f"{lockless}; give an --out on another") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until this process holds the lock."""
    while (descriptor := try_lock(path)) is None:
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(descriptor)
