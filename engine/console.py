"""How the scripts talk: one line for a mistake, one line for progress. Imports nothing of ours."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
import time
from typing import Callable, Iterable, NoReturn, TextIO


class Mistake(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do instead.
    A subclass, or an error of another room, may carry its own `status` and `label`."""

    status = 2
    label = "error"


class Parser(argparse.ArgumentParser):
    """Long flags are written out; a mistake is one line, with the flag that was probably meant."""

    def __init__(self, **options):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=as_written, **options)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self.unknown_word(unknown[0]))
        return args

    def subparsers(self) -> list[argparse.ArgumentParser]:
        kind = argparse._SubParsersAction
        return [p for a in self._actions if isinstance(a, kind) for p in a.choices.values()]

    def unknown_word(self, word: str) -> str:
        actions = [action for parser in (self, *self.subparsers()) for action in parser._actions]
        flags = [flag for action in actions for flag in action.option_strings]
        name = word.split("=")[0].replace("_", "-")
        longer = [flag for flag in flags if name.startswith("--") and flag.startswith(name)]
        meant = difflib.get_close_matches(name, flags, n=1, cutoff=0.75) or longer
        return f"{word} is no flag" + (f"; did you mean {meant[0]}?" if meant else "")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown(value, action.choices))

    def error(self, message: str) -> NoReturn:
        say_mistake(f"error: {message}; see python {self.prog} --help")
        sys.exit(2)


def unknown(value: object, known: Iterable) -> str:
    """What to say of a name that is none of the known ones: the one that was probably meant."""
    close = difflib.get_close_matches(str(value), map(str, known), n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{value}: {meant}give {', '.join(map(str, known))}"


def run_script(main: Callable[[], None], *mistakes: type[Exception]) -> NoReturn:
    """Runs a script's main: a `Mistake`, or one of `mistakes`, becomes one line and exit status 2,
    Ctrl-C exit status 130."""
    # A damaged TIFF is one line, and that is ours.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a class name that the terminal cannot show becomes ?
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # python data.py ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (Mistake, *mistakes) as error:
        say_mistake(f"{getattr(error, 'label', 'error')}: {error}")
        sys.exit(getattr(error, "status", 2))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        say_mistake("stopped: out of memory; close other programs, or ask for less at a time")
        sys.exit(1)
    sys.exit(0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the machine or of a GPU: torch has an error for the latter, and
    for the former one with this text."""
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return short or "can't allocate memory" in str(error)


def say_mistake(line: str) -> None:
    """Prints a mistake once for all processes of torchrun.

    Most mistakes happen on every process. The others wait before they speak: where the main one
    failed too, torchrun has ended them by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5)
        line = f"process {rank}: {line}"
    print(line, file=sys.stderr, flush=True)


def typed(script: str, *words: object) -> str:
    """The command that runs a script, as it is typed, whatever is in its words."""
    return shlex.join(["python", script, *map(str, words)])


def say_next(command: str) -> None:
    """Prints what to type next beside a table, which is for a file or a pipe."""
    print(f"next: {command}", file=sys.stderr)


class Ticker:
    """Progress: a line that is rewritten on a terminal, else one after each `every` seconds."""

    def __init__(self, label: str, stream: TextIO | None = None, every: float = 10.0):
        self.label, self.stream, self.every = label, stream or sys.stdout, every
        self.start = self.last = time.monotonic()
        self.first_done: int | None = None
        self.width = 0  # of the line that is being rewritten; 0: there is none

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total`, 0 if unknown; the pace since the first call gives the time left."""
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.start = done, now
        terminal, finished = self.stream.isatty(), done == total
        if not finished and now - self.last < (0.1 if terminal else self.every):
            return
        self.last = now
        line = f"{self.label} {done}/{total or '?'}{text}"
        if not finished and done > self.first_done and total:
            left = (now - self.start) * (total - done) / (done - self.first_done)
            line += f", {clock(left)} left"
        if terminal:
            print("\r" + line.ljust(self.width), end="", file=self.stream, flush=True)
            self.width = len(line)
        else:
            print(line, file=self.stream, flush=True)
        if finished:
            self.close()

    def close(self) -> None:
        """Ends the line, so that what is printed next begins one of its own."""
        if self.width:
            print(file=self.stream, flush=True)
            self.width = 0


def clock(seconds: float) -> str:
    """Seconds as 1:02 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
