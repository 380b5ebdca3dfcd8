"""The README is true: its tuner works, its commands are understood, its two commands are those that
are run.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

import tuners
from engine.commandline import parse_settings
from engine.recipes import AS_PUBLISHED
from mfnet import build_mfnet, trained_names

ROOT = Path(tuners.__file__).resolve().parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
TRAIN = [line.split("#")[0] for line in re.findall(r"train\.py(.*)", SHELL)]


def test_the_tuner_of_the_readme_trains_its_own_parameters_and_no_others(monkeypatch):
    monkeypatch.setattr(tuners, "TUNERS", dict(tuners.TUNERS))
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    model = build_mfnet("vit_t", "scaleshift")
    model(torch.rand(1, 3, 64, 64), torch.rand(1, 64, 64)).sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == set(trained_names(model))
    assert {n.split(".")[-1] for n in trained if n.startswith("image_encoder")} == {
        "scale",
        "shift",
    }


@pytest.mark.parametrize("words", TRAIN)
def test_every_training_command_of_the_readme_is_understood(words):
    parse_settings(shlex.split(words.replace("$seed", "0").replace("2>&1", "")))


def test_the_test_command_of_the_readme_is_what_is_run_on_every_change():
    program = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ".venv/bin/python -m pytest -q" in README and ".venv/bin/python -m pytest -q" in program
    assert (
        "pip install -r requirements.txt" in README and "install -q -r requirements.txt" in program
    )


def test_the_readme_lists_every_module_and_every_departure_of_the_published_code():
    assert all(f"`{path.name}`" in README for path in ROOT.glob("*.py"))
    for name, value in AS_PUBLISHED.items():
        assert f"`--{name.replace('_', '-')}" in README, name


def test_every_file_that_the_readme_shows_is_there():
    assert all((ROOT / name).is_file() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))
