"""A user's own tuners, data sets and encoders: `--plugin FILE`.

A plugin is a Python file that adds to `tuners.TUNERS`, `geodata.layouts.LAYOUTS` or
`sam_vit.SIZES`. Its content is copied into the run's folder, below plugins/, and its SHA-256 is
kept with the run's settings, so that the run is scored, resumed and used without the flag.

A model.pt alone runs no code: only a file in the folder beside it does, after its name was printed,
and only if it is the very file that the run was trained with.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType

from engine.console import Mistake, Parser
from engine.files import replace_atomically
from sam_vit import first_line

FOLDER = "plugins"  # of a run's folder

Plugins = dict[str, str]  # file name -> SHA-256 of its content, in the order of loading


def load_plugins(paths: list[str | Path]) -> Plugins:
    """Executes files, each once -> what to keep with the run. Raises Mistake in one line."""
    plugins: Plugins = {}
    for path in map(Path, paths):
        if path.suffix != ".py" or not path.is_file():
            raise Mistake(f"--plugin {path}: there is no such Python file")
        content = path.read_bytes()
        if plugins.get(path.name, sha256(content)) != sha256(content):
            raise Mistake(f"--plugin {path}: two plugins are called {path.name}; rename one")
        plugins[path.name] = sha256(content)
        execute(path, content)
    return plugins


def load_given_plugins(script: str) -> None:
    """Executes those of the command line, before its other words are understood."""
    first = Parser(prog=script, add_help=False)
    first.add_argument("--plugin", action="append", default=[])
    load_plugins(first.parse_known_args()[0].plugin)


def load_run_plugins(plugins: Plugins, folder: Path) -> None:
    """Executes the plugins in a run's folder. Raises Mistake where one is missing or another."""
    for name, digest in plugins.items():
        if module_name(digest) in sys.modules:
            continue
        path = folder / FOLDER / Path(name).name
        content = path.read_bytes() if path.is_file() else None
        if content is None or sha256(content) != digest:
            found = "is missing" if content is None else f"is another file ({sha256(content)})"
            trained = f"the run was trained with --plugin {name} (sha256 {digest})"
            raise Mistake(f"{path} {found}; {trained}: put that file there")
        execute(path, content)


def keep_plugins(plugins: Plugins, folder: Path) -> None:
    """Writes the plugins that this process has loaded into a run's folder."""
    for name, digest in plugins.items():
        content, target = sys.modules[module_name(digest)].__content__, folder / FOLDER / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(target, lambda p: p.write_bytes(content))


def execute(path: Path, content: bytes) -> None:
    """Runs the code of a plugin, unless this process has done so already."""
    name = module_name(sha256(content))
    if name in sys.modules:
        return
    if os.environ.get("RANK", "0") == "0":  # once for all processes of torchrun
        print(f"plugin {path} (sha256 {sha256(content)[:12]})", flush=True)
    module = ModuleType(name)
    module.__file__, module.__content__ = str(path), content
    sys.modules[name] = module  # where dataclasses look a class's module up
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        kind = type(error).__name__
        raise Mistake(f"--plugin {path}: {kind}: {first_line(error)}") from error


def module_name(digest: str) -> str:
    return f"plugin_{digest[:16]}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
