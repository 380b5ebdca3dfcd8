"""How the scripts talk: one line for a mistake, one line for progress."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Callable, NoReturn, TextIO

from geodata.rasters import DataError
from sam_vit import WeightsError


class Parser(argparse.ArgumentParser):
    """One line and exit status 2 for a mistake on the command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's main: a user's mistake becomes one line and exit status 2, Ctrl-C exit status
    130.
    """
    logging.getLogger("tifffile").addHandler(
        logging.NullHandler()
    )  # a damaged file is one line, and that is ours
    try:
        main()
    except (DataError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class Ticker:
    """Progress: one line that is rewritten on a terminal, otherwise a plain line every `every`
    seconds.
    """

    def __init__(self, label: str, stream: TextIO | None = None, every: float = 10.0):
        self.label, self.stream, self.every = label, stream or sys.stdout, every
        self.start = self.last = time.monotonic()
        self.first_done: int | None = None
        self.width = 0

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total`, 0 if unknown; the time left is taken from the pace since the first
        call.
        """
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.start = done, now
        terminal, finished = self.stream.isatty(), done == total
        if not finished and now - self.last < (0.1 if terminal else self.every):
            return
        self.last = now
        line = f"{self.label} {done}/{total or '?'}{text}"
        if not finished and done > self.first_done and total:
            line += (
                f", {clock((now - self.start) * (total - done) / (done - self.first_done))} left"
            )
        if terminal:
            print(
                "\r" + line.ljust(self.width),
                end="\n" if finished else "",
                file=self.stream,
                flush=True,
            )
            self.width = len(line)
        else:
            print(line, file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
