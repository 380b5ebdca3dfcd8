"""docs/extending.md: its three files are a tuner, a data set and an encoder that train, are scored
and map as it says; and its table tells the options that there are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from processes import Script

import mfnet  # noqa: F401  # with which the zoo's tuners are known
from tuners import TUNERS, parse_option, tuner_options

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(
    zip(
        ("scaleshift.py", "mytown.py", "tiny.py"),
        re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL),
        strict=True,
    )
)


def write_town(root):
    """Tiles 1, 2 and 3 of 64 x 64 pixels, where the page's layout looks for them."""
    rng, colors = np.random.default_rng(0), np.array([(90, 90, 90), (200, 0, 0)], np.uint8)
    for tile in "123":
        rasters = {
            "ortho": rng.integers(0, 255, (64, 64, 3)).astype(np.uint8),
            "heights": rng.normal(size=(64, 64)).astype(np.float32),
            "labels": colors[rng.integers(0, 2, (64, 64))],
        }
        for kind, array in rasters.items():
            (root / kind).mkdir(parents=True, exist_ok=True)
            photometric = "rgb" if array.ndim == 3 else "minisblack"
            tifffile.imwrite(root / kind / f"{tile}.tif", array, photometric=photometric)


def in_a_new_process(folder, *words):
    process = Script(ROOT / words[0], *words[1:], cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_the_page_s_tuner_data_set_and_encoder_are_trained_scored_and_used(tmp_path):
    for name, text in FILES.items():
        assert name in PAGE
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_town(tmp_path / "town")
    words = "--data mytown --root town --encoder tiny --tuner scaleshift --weights none --epochs 1"
    words += " --steps 1 --batch-size 2 --crop 64 --stride 64 --device cpu --out run"
    words += " --tuner-option shift=false --tuner-option blocks=1"
    plugins = [word for name in FILES for word in ("--plugin", name)]
    in_a_new_process(tmp_path, "train.py", *words.split(), *plugins)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tuner_option"] == {"shift": False, "blocks": "1"}
    assert config["parameters"]["tuner"] == 2 * 32  # a scale of C channels and 2 modalities
    for name in FILES:
        (tmp_path / name).unlink()
    before = (tmp_path / "run" / "scores.json").read_bytes()
    assert [row["name"] for row in json.loads(before)["per_class"]] == ["ground", "house"]
    in_a_new_process(tmp_path, "evaluate.py", "--run", "run", "--device", "cpu")
    assert (tmp_path / "run" / "scores.json").read_bytes() == before
    rasters = ["--image", "town/ortho/3.tif", "--dsm", "town/heights/3.tif"]
    words = ["--run", "run", *rasters, "--out", "map.tif", "--device", "cpu"]
    in_a_new_process(tmp_path, "predict.py", *words)
    assert tifffile.imread(tmp_path / "map.tif").shape[:2] == (64, 64)


@pytest.mark.parametrize("name", [n for n, tuner in TUNERS.items() if tuner.__module__ == "zoo"])
def test_the_page_tells_the_options_of_every_tuner_of_the_zoo(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.*?)\|$", PAGE, re.MULTILINE)
    told = dict(parse_option(name, text) for text in re.findall(r"`(.+?)`", row))
    assert {"blocks": "all", **told} == tuner_options(name)
