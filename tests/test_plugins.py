"""A user's own tuner, data set and encoder in a file: loaded, kept with the run, checked."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import write_city

from engine import checkpoints
from engine.console import Mistake
from engine.plugins import load_plugins, load_run_plugins, module_name, sha256
from geodata.layouts import LAYOUTS
from sam_vit import SIZES
from tuners import TUNERS

HOME = Path(__file__).parent.parent

TUNER = """
import torch
import torch.nn as nn
from geodata.layouts import LAYOUTS
from sam_vit import SIZES
from tuners import TUNERS, Tuner


class ScaleShift(Tuner):
    def __init__(self, block, modalities, ratio: float = 1.0, mixing: bool = True):
        super().__init__(block, modalities)
        self.ratio = ratio
        self.scale = nn.Parameter(torch.ones(modalities, 1, 1, 1, self.width))
        self.mixing = nn.Parameter(torch.full((modalities,), 0.5)) if mixing else None

    def forward(self, x):
        y = super().forward(x).unflatten(0, (len(self.scale), -1)) * (self.scale * self.ratio)
        if self.mixing is not None:
            y = y + 0.1 * self.mixing.sum() * y.mean(dim=0)
        return y.flatten(0, 1)


TUNERS["scaleshift"] = ScaleShift
LAYOUTS["mytown"] = LAYOUTS["vaihingen"]
SIZES["tiny"] = dict(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, img_size=64
)
"""


@pytest.fixture
def clean(monkeypatch):
    """A program that has loaded nothing yet."""

    def forget():
        for name in [name for name in sys.modules if name.startswith("plugin_")]:
            del sys.modules[name]
        for table, name in ((TUNERS, "scaleshift"), (LAYOUTS, "mytown"), (SIZES, "tiny")):
            table.pop(name, None)

    forget()
    yield forget
    forget()


@pytest.fixture
def script(tmp_path, monkeypatch, capsys, clean):
    def call(name, *words):
        clean()  # each script is a program of its own
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HOME / name), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TUNER)
    return call


def write_tiles(root):
    rng = np.random.default_rng(0)
    root.mkdir()
    classes = [{"name": "ground", "color": [90, 90, 90]}, {"name": "house", "color": [200, 0, 0]}]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    for split in ("train", "test"):
        rasters = {
            "images": rng.integers(0, 255, (64, 64, 3)).astype(np.uint8),
            "dsm": rng.normal(size=(64, 64)).astype(np.float32),
            "labels": rng.integers(0, 2, (64, 64)).astype(np.uint8),
        }
        for kind, array in rasters.items():
            (root / split / kind).mkdir(parents=True)
            photometric = "rgb" if array.ndim == 3 else "minisblack"
            tifffile.imwrite(root / split / kind / "a.tif", array, photometric=photometric)


TRAIN = "--data tiles --root mine --epochs 1 --steps 1 --encoder tiny --weights none --crop 64"
TRAIN += " --batch-size 2 --stride 64 --device cpu --tuner scaleshift --out run"
RASTERS = ["--image", "mine/test/images/a.tif", "--dsm", "mine/test/dsm/a.tif"]


def test_a_tuner_and_an_encoder_in_a_file_train_are_scored_used_and_gone_on_with(script, tmp_path):
    write_tiles(tmp_path / "mine")
    words = [*TRAIN.split(), "--tuner-option", "ratio=0.5", "--tuner-option", "mixing=false"]
    status, out, err = script("train.py", *words, "--plugin", "mine.py")
    assert (status, err) == (0, "") and out.splitlines()[0].startswith("plugin mine.py")
    digest = sha256(TUNER.encode())
    config = json.loads(Path("run/config.json").read_text())
    assert config["plugin"] == {"mine.py": digest}
    assert config["tuner_option"] == {"ratio": 0.5, "mixing": False, "blocks": "all"}
    for name in ("last.pt", "model.pt"):
        content = torch.load(Path("run") / name, weights_only=True)
        assert content["settings"]["plugin"] == {"mine.py": digest}
        assert not any("mixing" in n for n in content["state"])
        assert any(n.endswith("blocks.1.scale") for n in content["state"])
    assert Path("run/plugins/mine.py").read_text() == TUNER

    Path("mine.py").unlink()
    before = Path("run/scores.json").read_bytes()
    status, out, err = script("evaluate.py", "--run", "run")
    assert (status, err) == (0, "") and "plugin run/plugins/mine.py" in out.splitlines()[0]
    assert Path("run/scores.json").read_bytes() == before
    for name, target in (("predict.py", "map.tif"), ("explain.py", "inside")):
        status, _, err = script(name, "--run", "run", *RASTERS, "--out", target)
        assert (status, err) == (0, "") and Path(target).exists()
    status, _, err = script("train.py", "--resume", "--out", "run", "--epochs", 2)
    assert (status, err) == (0, "")
    assert torch.load("run/last.pt", weights_only=True)["progress"]["step"] == 2


def test_a_plugin_that_is_missing_or_changed_is_one_line_and_is_not_run(script, tmp_path, clean):
    write_tiles(tmp_path / "mine")
    assert script("train.py", *TRAIN.split(), "--plugin", "mine.py")[0] == 0
    path = Path("run/plugins/mine.py")
    path.write_text(TUNER + "\nopen('harm', 'w').close()\n")
    for words in (["evaluate.py", "--run", "run"], ["train.py", "--resume", "--out", "run"]):
        status, _, err = script(*words)
        assert status == 2 and len(err.splitlines()) == 1 and "another file" in err
    path.unlink()
    status, _, err = script("evaluate.py", "--run", "run")
    assert status == 2 and len(err.splitlines()) == 1
    assert "run/plugins/mine.py is missing" in err and sha256(TUNER.encode()) in err
    assert not Path("harm").exists()
    Path("alone").mkdir()
    shutil.copy("run/model.pt", "alone/model.pt")
    clean()
    with pytest.raises(Mistake, match="alone/plugins/mine.py is missing"):
        checkpoints.load_model("alone/model.pt")
    path.write_text(TUNER)
    checkpoints.main(["--run", "run", "--whole", "alone/whole.pt"])
    assert Path("alone/whole.pt").exists()


def test_a_data_set_in_a_file_is_a_choice_of_its_own(script, tmp_path):
    status, out, _ = script("train.py", "--plugin", "mine.py", "--data", "mytown", "--help")
    assert status == 0 and "mytown" in out and "scaleshift" in out and "tiny" in out
    status, _, err = script("data.py", "--plugin", "mine.py", "--data", "mytown", "--root", "none")
    assert status == 2 and "none: training cannot run" in err
    status, _, err = script("train.py", "--data", "mytown")
    assert status == 2 and "mytown" in err and "vaihingen" in err


def test_a_data_set_in_a_file_is_trained_on_by_the_paper_s_recipe(script, tmp_path):
    write_city(tmp_path / "town", size=64)
    words = "--data mytown --root town --tuner frozen --epochs 1 --steps 1 --encoder tiny --crop 64"
    words += " --weights none --batch-size 2 --stride 64 --out run --plugin mine.py"
    status, _, err = script("train.py", *words.split())
    assert (status, err) == (0, "")
    config = json.loads(Path("run/config.json").read_text())
    assert (config["data"], config["optimizer"], config["lr"]) == ("mytown", "sgd", 0.01)
    status, out, err = script("evaluate.py", "--run", "run")
    assert (status, err) == (0, "") and "eroded labels" in out


@pytest.mark.parametrize(
    "content, part",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise ValueError", "ValueError"),
        (None, "no such Python file"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line(tmp_path, clean, content, part):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Mistake) as raised:
        load_plugins([path])
    line = str(raised.value)
    assert f"--plugin {path}" in line and part in line and "\n" not in line


def test_a_plugin_runs_once_in_a_program_and_its_name_is_said_before(tmp_path, clean, capsys):
    path = tmp_path / "mine.py"
    path.write_text("print('running')\n")
    plugins = load_plugins([path, path])
    load_run_plugins(plugins, tmp_path / "anywhere")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"plugin {path} (sha256 {plugins['mine.py'][:12]})", "running"]
    assert module_name(plugins["mine.py"]) in sys.modules
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text("print('other')\n")
    with pytest.raises(Mistake, match="two plugins are called mine.py"):
        load_plugins([path, tmp_path / "other" / "mine.py"])
