"""What README.md and docs/ show works: their Python runs, their commands are understood, and every
flag and file that they name is there.
"""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_city
from processes import Script

import tuners
from engine.console import Parser
from engine.plugins import load_plugins
from geodata.layouts import LAYOUTS
from mfnet import build_mfnet, trained_names
from sam_vit import SIZES

ROOT = Path(tuners.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}
(LESSON,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OF_EXTENDING = re.findall(r"```python\n(.*?)```", PAGES["docs/extending.md"], re.DOTALL)
SCRIPTS = (
    *("train", "evaluate", "predict", "explain", "benchmark", "data", "prepare"),
    *("geodata.synthetic", "engine.checkpoints", "engine.pretraining"),
)
TINY = "--encoder vit_t --weights none --batch-size 2 --crop 64 --stride 64 --device cpu"


class ParserReached(Exception):
    """Raised in place of what a script does with its command line."""


def commands(text):
    """(script, its words) of every command in the shell blocks and in the code of a line."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", plain)]
    for line in [*lines.splitlines(), *inline]:
        found = re.match(r"\s*(?:python|torchrun .*?)(?: -m)? ([\w.]+?)(?:\.py)?( .*)?$", line)
        if found and found[1] in SCRIPTS and (found[2] or line not in inline):  # not a mere mention
            words = (found[2] or "").split(" #")[0].replace("$seed", "0")
            yield found[1], tuple(shlex.split(words))


COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})


@pytest.fixture(autouse=True)
def a_folder_with_the_files_of_docs_extending(tmp_path, monkeypatch):
    for name, text in zip(("scaleshift.py", "mytown.py", "tiny.py"), OF_EXTENDING, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    tables, modules = (tuners.TUNERS, LAYOUTS, SIZES), set(sys.modules)
    known = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, known):
        table.clear()
        table.update(before)
    for name in sys.modules.keys() - modules:
        if name.startswith("plugin"):
            del sys.modules[name]


@pytest.fixture
def parser_of(monkeypatch):
    """The parser of a script, as it stands before it reads the command line."""

    def find(name):
        def stop(self, *args):
            raise ParserReached(self)

        monkeypatch.setattr(sys, "argv", [name])
        with monkeypatch.context() as patch, pytest.raises(ParserReached) as reached:
            for kind in (Parser, argparse.ArgumentParser):
                patch.setattr(kind, "parse_args", stop)
            importlib.import_module(name).main()
        return reached.value.args[0]

    return find


def run_as_shown(folder, script, *words):
    process = Script(ROOT / script, *words, cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory):
    """A folder in which a small city lies where the README has it, and a run that is finished."""
    folder = tmp_path_factory.mktemp("readme")
    write_city(folder / "data" / "synthetic", seed=3, size=(128, 132))
    data = "--data vaihingen --root data/synthetic --epochs 1 --steps 1 --out runs/first"
    run_as_shown(folder, "train.py", *data.split(), *TINY.split())
    return folder


def test_the_python_of_the_readme_runs_and_its_shapes_hold(folder_of_a_run, monkeypatch):
    monkeypatch.chdir(folder_of_a_run)
    names = {}
    exec(LESSON, names)
    assert not names["model"].training and len(names["classes"]) == 6


def test_the_page_about_a_window_is_written_as_the_readme_says(folder_of_a_run):
    (words,) = [words for name, words in commands(README) if name == "explain"]
    run_as_shown(folder_of_a_run, "explain.py", *words)
    assert (folder_of_a_run / "runs" / "first" / "explain" / "explain.html").is_file()


@pytest.mark.parametrize(
    "options, trained", [({}, {"scale", "shift"}), ({"shift": False}, {"scale"})]
)
def test_the_tuner_of_docs_extending_trains_its_own_parameters_and_no_others(options, trained):
    exec(OF_EXTENDING[0], {})
    model = build_mfnet("vit_t", "scaleshift", **options)
    model(torch.rand(1, 3, 64, 64), torch.rand(1, 64, 64)).sum().backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None}
    assert found == set(trained_names(model))
    assert {n.split(".")[-1] for n in found if n.startswith("image_encoder")} == trained


@pytest.mark.parametrize(
    "name, words", COMMANDS, ids=lambda part: part if type(part) is str else ""
)
def test_every_command_that_is_shown_is_understood(name, words, parser_of):
    if name == "train":
        importlib.import_module("train").parse_settings(list(words))
    else:
        load_plugins([words[i + 1] for i, word in enumerate(words) if word == "--plugin"])
        parser_of(name).parse_args(words)


def test_the_commands_of_every_script_are_shown():
    assert {name for name, _ in COMMANDS} == set(SCRIPTS)


def test_every_flag_that_is_named_is_one_of_the_scripts(parser_of):
    parsers = [parser_of(name) for name in SCRIPTS]
    ours = [parser for parser in parsers if isinstance(parser, Parser)]
    parsers += [sub for parser in ours for sub in parser.subparsers()]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert named - known - {"--include", "--nproc"} == set(), page


def test_every_file_that_is_named_is_there():
    there = {
        path.name
        for folder in (".", "engine", "geodata", "reports")
        for path in (ROOT / folder).glob("*.py")
    }
    for page, text in PAGES.items():
        home = (ROOT / page).parent
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (home / link).is_file(), f"{page}: {link}"
        for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", text):
            assert (ROOT / name).is_file() or name in there, f"{page}: {name}"
        for name in re.findall(r"pytest -q (tests/\w+\.py)", text):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_the_readme_lists_every_module_on_a_front_page():
    for folder in (".", "engine", "geodata", "reports"):
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert f"`{path.name}`" in README, path
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("data", ["vaihingen", "potsdam", "hunan"])
def test_every_departure_of_the_published_code_is_listed_with_its_flag(data):
    parse = importlib.import_module("train").parse_settings
    ours, published = (vars(parse(["--data", data, *w])[0]) for w in ([], ["--as-published"]))
    different = [name for name in ours if ours[name] != published[name]]
    assert len(different) >= 7
    for name in different:
        assert f"| `--{name.replace('_', '-')}" in PAGES["docs/training.md"], name


def test_the_test_command_of_the_readme_is_what_is_run_on_every_change():
    program = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".venv/bin/python -m pytest -q" in README and ".venv/bin/python -m pytest -q" in program
    assert (
        "pip install -r requirements.txt" in README and "install -q -r requirements.txt" in program
    )


def test_every_experiment_of_the_log_has_a_date_a_question_a_command_a_figure_and_a_conclusion():
    entries = re.split(r"^## ", PAGES["docs/log.md"], flags=re.MULTILINE)[1:]
    assert len(entries) >= 15
    for i, entry in enumerate(entries, 1):
        title = entry.splitlines()[0]
        assert re.match(rf"{i}\. .*\(20\d\d-\d\d-\d\d\b.*\)$", title), title
        assert re.findall(r"^- (\w+): ", entry, re.MULTILINE) == [
            *("Question", "Command", "Figure", "Conclusion")
        ], title
