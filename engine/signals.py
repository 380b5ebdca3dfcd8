"""Signals that ask a run to stop: noted, and looked at where it can stop."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import Iterator

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Signals are noted in a list, for the loop to look at; a second one ends the program."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}

    def note(number: int, frame) -> None:
        noted.append(number)
        signal.signal(number, before[number])

    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup stays deaf to SIGHUP
                signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker: int) -> None:
    """A terminal's Ctrl-C reaches the workers too; they go on until the parent has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
