"""The scripts as they are used: a run from training to a map, an interruption, and mistakes.

What a run leaves behind is tried through the shell. Mistakes run inside this process, where a
script starts at once."""

import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import write_city
from PIL import Image
from processes import QUICK

from engine import checkpoints, speed
from geodata import synthetic
from geodata.grids import read_grid
from geodata.rasters import read_raster

HOME = Path(__file__).parent.parent
TINY = "--encoder vit_t --weights none --batch-size 2 --crop 64 --stride 64 --device cpu".split()

OWN = ["--data", "tiles", "--root", "mine", "--epochs", 1, "--steps", 1, *TINY]


def shell(cwd, *words, more=None):
    """python SCRIPT WORDS... -> the finished process."""
    command = [sys.executable, *map(str, [HOME / words[0], *words[1:]])]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME), **(more or {})}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """The same inside this process, in an empty folder -> (exit status, stdout, stderr)."""

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HOME / name), run_name="__main__")
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return call


def state_of(path):
    return torch.load(path, weights_only=True)["state"]


def same_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write_own_tiles(root, size=80, heights=True):
    """One training and one test tile: houses are high and bright."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    listed = [{"name": "ground", "color": [90, 90, 90]}, {"name": "house", "color": [200, 0, 0]}]
    (root / "classes.json").write_text(json.dumps({"classes": listed}))
    for split in ("train", "test"):
        labels = np.kron(rng.integers(0, 2, (5, 5)), np.ones((size // 5, size // 5))).astype(
            np.uint8
        )
        image = (60 + 120 * labels[..., None] + rng.integers(0, 30, (*labels.shape, 3))).astype(
            np.uint8
        )
        rasters = {"images": image, "labels": labels}
        if heights:
            rasters["dsm"] = (200 + 9.0 * labels).astype(np.float32)
        for kind, array in rasters.items():
            (root / split / kind).mkdir(parents=True)
            photometric = "rgb" if array.ndim == 3 else "minisblack"
            tifffile.imwrite(root / split / kind / "a.tif", array, photometric=photometric)


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "city"
    write_city(root, seed=3, size=(128, 132))
    return root


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory):
    """(folder that holds runs/, the run, the finished process) of two epochs of two steps."""
    folder = tmp_path_factory.mktemp("work")
    flags = ["--data", "vaihingen", "--root", city, "--epochs", 2, "--steps", 2, *TINY]
    process = shell(folder, "train.py", *flags)
    assert process.returncode == 0, process.stderr
    (run,) = (folder / "runs").iterdir()
    return folder, run, process


@pytest.fixture(scope="module")
def tile(city):
    """The rasters of a test tile."""
    paths = synthetic.tile_paths(city, 5)
    return paths["image"], paths["dsm"]


# -------------------------------------------------------------------------------------------- a run


def test_training_writes_the_run_s_files_and_says_how_fast_it_was(trained, city):
    _, run, process = trained
    pictures = [f"pictures/test_{n}.png" for n in (15, 21, 30, 5)]
    assert set(files_below(run)) >= {
        "config.json",
        "last.pt",
        "log.jsonl",
        "model.pt",
        "scores.json",
        *pictures,
    }
    assert not [name for name in files_below(run) if name.endswith(".tmp")]
    assert (
        all(part in process.stdout for part in ("images/s", "peak memory", "MB", "epoch 2/2: loss"))
        and not process.stderr
    )
    assert "weights: NONE" in process.stdout and "trainable" in process.stdout
    config = json.loads((run / "config.json").read_text())
    assert config["root"] == str(city) and config["steps"] == 2 and config["precision"] == "fp32"
    log = log_of(run)
    assert [(line["epoch"], line["step"]) for line in log] == [(1, 2), (2, 4)]
    assert all(line["images_per_second"] > 0 and np.isfinite(line["loss"]) for line in log)
    assert [line["lr"] for line in log] == pytest.approx([0.01, 1e-4])


def test_the_scores_name_their_convention_and_count_the_eroded_labels(trained, city):
    _, run, process = trained
    scores = json.loads((run / "scores.json").read_text())
    assert {"oa", "mf1", "miou", "kappa", "per_class", "confusion", "pixels"} <= scores.keys()
    assert "eroded labels" in scores["convention"] and scores["convention"] in process.stdout
    assert (
        f"OA {100 * scores['oa']:.2f}" in process.stdout
        and f"mIoU {100 * scores['miou']:.2f}" in process.stdout
    )
    black = sum(
        (read_raster(synthetic.tile_paths(city, n)["eroded"]) == 0).all(-1).sum()
        for n in synthetic.TEST_AREAS
    )
    assert scores["pixels"] == np.sum(scores["confusion"]) == 4 * 128 * 132 - black


def test_evaluation_without_a_word_scores_the_newest_run_with_the_same_digits(trained):
    folder, run, process = trained
    before = (run / "scores.json").read_bytes()
    (run / "scores.json").unlink()
    again = shell(folder, "evaluate.py", "--device", "cpu")
    assert again.returncode == 0 and not again.stderr
    assert (run / "scores.json").read_bytes() == before
    table = again.stdout[again.stdout.index("class ") :]
    *table, written = table.strip().splitlines()
    assert "\n".join(table) in process.stdout
    assert written.endswith(f"scores.json; next: python explain.py --run {run.relative_to(folder)}")


def test_full_labels_are_scored_beside_the_eroded_ones_and_with_full_labels_the_other_way_round(
    trained, script
):
    _, run, process = trained
    eroded = json.loads((run / "scores.json").read_text())
    second = eroded["full_labels"]
    assert (
        f"mIoU {100 * second['miou']:.2f}" in process.stdout
        and f"{4 * 128 * 132:,} pixels with full labels" in process.stdout
    )
    assert "this run, full labels" in (run / "report.html").read_text(encoding="utf-8")
    shutil.copytree(run, "copy")
    status, out, _ = script("evaluate.py", "--run", "copy", "--full-labels", "--device", "cpu")
    assert json.loads(Path("copy/scores.json").read_text()) == eroded
    full = json.loads(Path("copy/scores_full-labels.json").read_text())
    keys = (
        "oa",
        "mf1",
        "miou",
        "kappa",
        "per_class",
        "confusion",
        "pixels",
        "per_tile",
        "convention",
        "labels",
    )
    assert (
        status == 0 and {k: full[k] for k in keys} == second and "pixels with eroded labels" in out
    )
    assert full["eroded_labels"] == {k: eroded[k] for k in keys}


def test_as_published_is_scored_at_the_published_stride_unless_another_is_given(trained, script):
    shutil.copytree(trained[1], "copy")
    for flags, stride in (([], 32), (["--stride", 48], 48)):
        status, out, _ = script(
            "evaluate.py", "--run", "copy", "--as-published", *flags, "--device", "cpu"
        )
        scores = json.loads(Path(f"copy/scores_stride{stride}_border.json").read_text())
        assert status == 0 and (scores["stride"], scores["repeat_border"]) == (stride, True)
        assert (
            f"windows of 64 at stride {stride}, logits averaged, border windows counted as"
            " published" in scores["convention"]
        )
        assert scores["convention"] in out


def test_the_table_holds_seeds_as_a_row_and_what_is_not_finished_beside_it(script, tmp_path):
    write_own_tiles(tmp_path / "mine")
    status, out, _ = script("train.py", *OWN, "--seeds", 0, 1, "--out", "runs/two")
    assert status == 0
    Path("runs/begun").mkdir()
    shutil.copy("runs/two/seed-0/config.json", "runs/begun")
    assert script("evaluate.py", "--run", "runs/two/seed-0", "--stride", 32)[0] == 0
    status, table, err = script("evaluate.py", "--table")
    skipped, then = err.splitlines()
    assert status == 0 and "runs/begun" in skipped
    assert then in {f"next: python explain.py --run runs/two/seed-{i}" for i in (0, 1)}
    scores = [
        100 * json.loads(Path(f"runs/two/seed-{i}/scores.json").read_text())["miou"] for i in (0, 1)
    ]
    cell = f"{np.mean(scores):.2f} +- {np.std(scores, ddof=1):.2f}"
    assert table.startswith("## tiles") and cell in table and cell in out
    status, newest, _ = script("evaluate.py")  # of all, those of --seeds included
    assert status == 0 and newest.splitlines()[-1].startswith("runs/two/seed-1/scores.json")
    status, one, _ = script("evaluate.py", "--table", "runs/two")
    assert status == 0 and cell in one


def test_only_the_run_s_own_protocol_at_its_end_is_its_score(script, tmp_path):
    """A run that was stopped, or is scored at another stride, is never taken for a finished one."""
    write_own_tiles(tmp_path / "mine")
    assert script("train.py", *OWN, "--select", "test", "--out", "run")[0] == 0
    before = Path("run/scores.json").read_bytes()
    shutil.copytree("mine", "other")
    for flags in (["--stride", 32], ["--split", "train"], ["--root", "other"]):
        assert script("evaluate.py", "--run", "run", *flags)[0] == 0
    assert Path("run/scores.json").read_bytes() == before
    names = {f"run/scores_{name}.json" for name in ("stride32", "train", "root-other")}
    assert names <= {*files_below(tmp_path)}
    assert script("evaluate.py", "--run", "run", "--root", tmp_path / "mine")[0] == 0
    assert {path for path in files_below(tmp_path) if "scores_" in path} == names
    content = torch.load("run/model.pt", weights_only=True)
    torch.save({**content, "finished": False}, "run/model.pt")
    Path("run/scores.json").unlink()
    status, out, _ = script("evaluate.py", "--run", "run")
    assert status == 0 and "not trained to its end" in out
    assert not Path("run/scores.json").exists() and Path("run/scores_unfinished.json").exists()
    status, _, err = script("evaluate.py", "--table", "run")
    assert status == 2 and "finished" in err


def test_a_run_of_one_file_is_scored_and_one_that_cannot_be_written_too(
    script, tmp_path, monkeypatch
):
    write_own_tiles(tmp_path / "mine")
    assert script("train.py", *OWN, "--out", "run")[0] == 0
    Path("alone").mkdir()
    checkpoints.main(["--run", "run", "--whole", "alone/model.pt"])
    status, out, err = script("evaluate.py", "--run", "alone")
    assert (status, err) == (0, "") and "mIoU" in out and "alone/scores.json" in out

    Path("run/log.jsonl").write_text("")
    status, out, err = script("evaluate.py", "--run", "run")
    assert (status, err) == (0, "") and "mIoU" in out

    def read_only(path, write):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("engine.files.replace_atomically", read_only)
    status, out, err = script("evaluate.py", "--run", "run")
    assert (status, err) == (0, "") and "mIoU" in out and "Permission denied" in out


def test_a_forged_run_makes_no_city_and_prints_what_the_terminal_can_show(script, tmp_path, city):
    write_own_tiles(tmp_path / "mine")
    path = tmp_path / "mine" / "classes.json"
    path.write_text(path.read_text().replace("house", "h\u00e4user \u5bb6"), encoding="utf-8")
    assert script("train.py", *OWN, "--out", "run")[0] == 0
    done = shell(tmp_path, "evaluate.py", "--run", "run", more={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "h?user ?" in done.stdout
    content = torch.load("run/model.pt", weights_only=True)
    content["settings"] |= {"data": "synthetic", "root": str(tmp_path / "elsewhere")}
    torch.save(content, "run/model.pt")
    assert_refused(script("evaluate.py", "--run", "run"), "elsewhere", "--root")
    assert not (tmp_path / "elsewhere").exists()


def test_another_split_is_scored_beside_the_test_split(trained, script):
    _, run, _ = trained
    before = (run / "scores.json").read_bytes()
    status, out, _ = script("evaluate.py", "--run", run, "--split", "train", "--device", "cpu")
    scores = json.loads((run / "scores_train.json").read_text())
    assert status == 0 and scores["pixels"] == 12 * 128 * 132 and "train split, full labels" in out
    assert (run / "scores.json").read_bytes() == before


def test_a_map_has_the_size_of_the_image_and_comes_out_the_same_again(
    trained, tile, script, tmp_path
):
    folder, run, _ = trained
    words = ["--image", tile[0], "--dsm", tile[1], "--stride", 48, "--device", "cpu"]
    process = shell(folder, "predict.py", *words, "--out", tmp_path / "one.tif")
    assert process.returncode == 0 and not process.stderr and "132 x 128 pixels" in process.stdout
    assert script("predict.py", "--run", run, *words, "--out", "two.tif")[0] == 0
    found = read_raster(tmp_path / "one.tif")
    assert found.shape == (128, 132) and found.max() < 6
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()


def test_a_map_of_a_geotiff_in_tiles_lies_where_the_image_lies(trained, tile, script, tmp_path):
    folder, run, _ = trained
    tags = [
        (33550, "d", 3, (0.5, 0.5, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 7e5, 6.6e6, 0.0), True),
    ]
    image, no_data = read_raster(tile[0]).copy(), (42113, "s", 0, "255", True)
    image[:40, :40] = 255
    options = dict(tile=(32, 48), compression="zlib", photometric="rgb")
    tifffile.imwrite("image.tif", image, extratags=[*tags, no_data], **options)
    words = ["--run", run, "--dsm", tile[1], "--stride", 48, "--device", "cpu"]
    for flags in ([], ["--blend", "mean", "--flips"]):
        tifffile.imwrite("plain.tif", image, photometric="rgb")
        assert (
            script("predict.py", *words, *flags, "--image", "plain.tif", "--out", "wanted.tif")[0]
            == 0
        )
        assert (
            script("predict.py", *words, *flags, "--image", "image.tif", "--out", "map.tif")[0] == 0
        )
        wanted, found = read_raster(Path("wanted.tif")), read_raster(Path("map.tif"))
        assert (found[:40, :40] == 255).all() and wanted.max() < 6
        outside = (image != 255).any(-1)
        assert np.array_equal(found[outside], wanted[outside])
        assert read_grid(Path("map.tif")) == read_grid(Path("image.tif"))
    assert script("predict.py", *words, "--image", "image.tif", "--out", "map.png")[0] == 0
    made = [
        "map.pgw",
        "map.png",
        "map.png.aux.xml",
        "map.qml",
        "map.tif",
        "map.tif.aux.xml",
        "wanted.qml",
        "wanted.tif",
        "wanted.tif.aux.xml",
    ]
    assert files_below(tmp_path) == sorted(["image.tif", "plain.tif", *made])


def test_confidence_and_probabilities_belong_to_the_same_map_and_lie_where_it_lies(
    trained, tile, script, tmp_path
):
    _, run, _ = trained
    tags = [
        (33550, "d", 3, (0.5, 0.5, 0.0), True),
        (33922, "d", 6, (0.0, 0.0, 0.0, 7e5, 6.6e6, 0.0), True),
    ]
    image = read_raster(tile[0]).copy()
    image[:40, :40] = 255
    tifffile.imwrite(
        "image.tif", image, extratags=[*tags, (42113, "s", 0, "255", True)], photometric="rgb"
    )
    words = ["--run", run, "--image", "image.tif", "--dsm", tile[1], "--device", "cpu"]
    assert script("predict.py", *words, "--out", "alone.tif")[0] == 0
    more = ["--out", "map.tif", "--confidence", "sure.tif", "--probabilities", "all.tif"]
    status, out, err = script("predict.py", *words, *more)
    assert (status, err) == (0, "") and "map.tif, sure.tif, all.tif: 132 x 128 pixels" in out
    assert Path("map.tif").read_bytes() == Path("alone.tif").read_bytes()
    classes, sure, shares = (tifffile.imread(name) for name in ("map.tif", "sure.tif", "all.tif"))
    outside = classes == 255
    assert (
        outside[:40, :40].all()
        and (sure[outside] == 255).all()
        and (shares[:, outside] == 255).all()
    )
    assert (
        shares.shape == (6, 128, 132)
        and np.abs(shares[:, ~outside].sum(0, dtype=int) - 100).max() <= 3
    )
    chosen = np.take_along_axis(shares, np.where(outside, 0, classes)[None].astype(int), 0)[0]
    assert np.array_equal(chosen[~outside], sure[~outside]) and np.array_equal(shares.max(0), sure)
    with tifffile.TiffFile("all.tif") as tiff:
        text = tiff.pages[0].tags[42112].value
    names = [row["name"] for row in json.loads((run / "scores.json").read_text())["per_class"]]
    assert re.findall(r'role="description">([^<]*)<', text) == names
    assert all(
        read_grid(Path(name)) == read_grid(Path("image.tif")) for name in ("sure.tif", "all.tif")
    )
    assert script("predict.py", *words, "--out", "map.tif", "--confidence", "sure.png")[0] == 0
    assert np.array_equal(read_raster(Path("sure.png")), sure)
    assert files_below(tmp_path) == [
        "all.tif", "alone.qml", "alone.tif", "alone.tif.aux.xml", "image.tif", "map.qml", "map.tif",
        "map.tif.aux.xml", "sure.pgw", "sure.png", "sure.png.aux.xml", "sure.tif",
    ]  # fmt: skip


def test_ctrl_c_in_the_middle_of_a_prediction_leaves_no_file(
    trained, tile, script, tmp_path, monkeypatch
):
    _, run, _ = trained
    packed = []

    def compress_some(data, compress=zlib.compress):
        packed.append(len(data))
        if len(packed) == 4:
            raise KeyboardInterrupt
        return compress(data)

    words = ["--run", run, "--image", tile[0], "--dsm", tile[1], "--device", "cpu"]
    monkeypatch.setattr(zlib, "compress", compress_some)
    more = ["--out", "map.tif", "--confidence", "sure.tif", "--probabilities", "all.tif"]
    status, _, err = script("predict.py", *words, *more)
    assert (
        status == 130
        and err.strip() == "interrupted"
        and len(packed) == 4
        and files_below(tmp_path) == []
    )


def test_a_map_of_the_run_s_own_stride_is_what_was_scored(trained, tile, city, script, tmp_path):
    _, run, _ = trained
    words = [
        "--run",
        run,
        "--image",
        tile[0],
        "--dsm",
        tile[1],
        "--out",
        "a.png",
        "--blend",
        "mean",
        "--device",
        "cpu",
    ]
    status, *_ = script("predict.py", *words)
    truth = read_raster(synthetic.tile_paths(city, 5)["eroded"])
    colours = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    scored = truth.any(-1)
    share = (colours == truth).all(-1)[scored].mean()
    assert status == 0 and json.loads((run / "scores.json").read_text())["per_tile"]["5"][
        "oa"
    ] == pytest.approx(share)


def test_a_page_about_a_window_is_written(trained, tile, script, tmp_path):
    folder, run, _ = trained
    words = ["--image", tile[0], "--dsm", tile[1], "--device", "cpu"]
    alone = shell(folder, "explain.py", *words, "--out", tmp_path / "alone", "--at", "66,0")
    assert (
        alone.returncode == 0
        and not alone.stderr
        and alone.stdout.splitlines()[-1].startswith(f"{tmp_path / 'alone' / 'explain.html'}: ")
    )
    assert files_below(tmp_path) == ["alone/explain.html"]
    assert script("explain.py", "--run", run, *words, "--out", "middle")[0] == 0
    for page in ("alone", "middle"):  # four of SAM's windows are more than the tile
        text = Path(page, "explain.html").read_text(encoding="utf-8")
        assert "Tile given, 132 x 128 pixels from column 0 and row 0 on" in text


def test_another_seed_is_another_run(trained, script, city):
    _, run, _ = trained
    flags = [
        "--data",
        "vaihingen",
        "--root",
        city,
        "--epochs",
        1,
        "--steps",
        2,
        *TINY,
        "--seed",
        1,
        "--out",
        "other",
    ]
    assert script("train.py", *flags)[0] == 0
    assert log_of(Path("other"))[0]["loss"] != log_of(run)[0]["loss"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--tuner", "lora", "--tuner-option", "rank=2"],
        ["--tuner", "full", "--precision", "bf16"],
        ["--modalities", "image", "--tuner", "frozen"],
        ["--modalities", "dsm"],
        ["--fusion", "sum", "--optimizer", "adamw", "--schedule", "cosine"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_kind_of_network_trains_is_scored_again_and_predicts(script, tmp_path, flags):
    write_own_tiles(tmp_path / "mine", heights="image" not in flags)
    status, _, err = script("train.py", *OWN, *flags)
    assert (status, err) == (0, "")
    (scores,) = tmp_path.glob("runs/*/scores.json")
    before = scores.read_bytes()
    assert script("evaluate.py", "--device", "cpu")[0] == 0 and scores.read_bytes() == before
    paths = {"--image": "mine/test/images/a.tif", "--dsm": "mine/test/dsm/a.tif"}
    taken = flags[1] if "--modalities" in flags else "image+dsm"
    rasters = [word for flag, path in paths.items() if flag[2:] in taken for word in (flag, path)]
    predict = ["predict.py", "--out", "map.png", "--device", "cpu"]
    assert script(*predict, *rasters)[0] == 0
    for flag, path in paths.items():
        if flag[2:] not in taken:
            assert_refused(script(*predict, *rasters, flag, path), flag, "leave it out")
    assert read_raster(tmp_path / "map.png").shape == (80, 80)


def test_tiles_smaller_than_the_window_are_trained_on_and_rasters_of_64_pixels_are_mapped(
    script, tmp_path
):
    write_own_tiles(tmp_path / "mine", size=50)
    status, _, err = script("train.py", *OWN, "--crop", 96, "--out", "run")
    assert (status, err) == (0, "") and json.loads(Path("run/scores.json").read_text())[
        "pixels"
    ] == 2500
    words = [
        "--image",
        "image.tif",
        "--dsm",
        "dsm.tif",
        "--out",
        "map.tif",
        "--probabilities",
        "all.tif",
        "--device",
        "cpu",
    ]
    for H, W in ((64, 64), (64, 100), (130, 65), (63, 100), (100, 1)):
        tifffile.imwrite("image.tif", np.zeros((H, W, 3), np.uint8), photometric="rgb")
        tifffile.imwrite("dsm.tif", np.zeros((H, W), np.float32))
        status, out, err = result = script("predict.py", "--run", "run", *words)
        if min(H, W) < 64:
            assert_refused(result, "image.tif", f"{W} x {H}", "64")
            assert not Path("map.tif").exists()
            continue
        assert (status, err) == (0, "") and f"{W} x {H} pixels" in out
        assert read_raster(Path("map.tif")).shape == (H, W) and tifffile.imread(
            "all.tif"
        ).shape == (2, H, W)
        Path("map.tif").unlink()


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_are_no_numbers_stop_with_status_1_and_are_neither_saved_nor_scored(
    script, tmp_path, city, epochs
):
    words = ["--data", "vaihingen", "--root", city, "--epochs", epochs, "--steps", 1, *TINY]
    status, _, err = script("train.py", *words, "--lr", "1e30", "--out", "run")
    assert status == 1 and len(err.splitlines()) == 1 and "after step 1" in err
    last = torch.load("run/last.pt", weights_only=True)
    assert last["progress"]["step"] == 0 and files_below(tmp_path) == [
        "run/config.json",
        "run/last.pt",
    ]


def test_a_network_whose_outputs_are_no_numbers_is_neither_scored_nor_used(trained, tile, script):
    shutil.copytree(trained[1], "copy")
    content = torch.load("copy/model.pt", weights_only=True)
    content["state"]["decoder.segmentation_head.2.weight"][0] = float("nan")
    torch.save(content, "copy/model.pt")
    before = Path("copy/scores.json").read_bytes()
    words = ["--run", "copy", "--image", tile[0], "--dsm", tile[1], "--out", "map.tif"]
    for result in (script("evaluate.py", "--run", "copy"), script("predict.py", *words)):
        assert result[0] == 1 and "no numbers" in result[2] and len(result[2].splitlines()) == 1
    assert Path("copy/scores.json").read_bytes() == before and not Path("map.tif").exists()


def test_labels_of_which_none_counts_end_the_first_epoch(script, tmp_path):
    write_own_tiles(tmp_path / "mine")
    path = tmp_path / "mine" / "train" / "labels" / "a.tif"
    labels = np.full((80, 80), 255, np.uint8)
    labels[:2, :2] = 0  # no crop of 64 that is drawn first holds it, the flips aside
    tifffile.imwrite(path, labels)
    words = [*OWN, "--class-weights", "0,1", "--out", "run"]
    status, _, err = script("train.py", *words)
    assert status == 1 and "no pixel of epoch 1" in err and "data.py" in err


# ----------------------------------------------------------------------------------------- mistakes


def assert_refused(result, *parts):
    status, out, err = result
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert all(str(part) in err for part in parts), err


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--root nowhere", ["first nowhere/top/top_mosaic_09cm_area1.tif", "ISPRS"]),
        ("--data mars", ["mars", "vaihingen"]),
        ("--tuner magic", ["magic", "adapter", "lora"]),
        ("--tuner-option rank=2", ["--tuner-option", "adapter", "ratio"]),
        ("--plugin nowhere.py", ["--plugin nowhere.py"]),
        ("--workers 100000", ["--workers 100000"]),
        ("--compile", ["--compile"]),
        ("--class-weights 1,2", ["--class-weights"]),
        ("--seed 12345678901234567890", ["--seed"]),
        ("--encoder vit_z", ["vit_z", "vit_l"]),
        ("--modalities height", ["height", "image, dsm, intensity"]),
        ("--bands bgr", ["--bands bgr", "counted from 1"]),
        ("--crop 32", ["--crop 32"]),
        ("--crop many", ["--crop", "many"]),
        ("--stride 0", ["--stride 0"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--weights nowhere.pth", ["nowhere.pth"]),
        ("--device gpu7", ["gpu7"]),
        ("--spell right", ["--spell"]),
    ],
)
def test_a_mistake_before_training_is_one_line_with_status_2_and_writes_nothing(
    script, tmp_path, city, flags, parts
):
    base = [
        "--data",
        "vaihingen",
        "--root",
        city,
        "--epochs",
        1,
        "--steps",
        1,
        *TINY,
        "--out",
        "run",
    ]
    assert_refused(script("train.py", *base, *flags.split()), *parts)
    assert files_below(tmp_path) == [] and not (tmp_path / "run").exists()


def truncate_image(root):
    image = read_raster(root / "train/images/a.tif")
    (root / "train/images/a.tif").unlink()
    Image.fromarray(image).save(root / "train/images/a.tif", compression="tiff_lzw")
    content = (root / "train/images/a.tif").read_bytes()
    (root / "train/images/a.tif").write_bytes(content[: len(content) // 2])


def resize_heights(root):
    tifffile.imwrite(root / "train/dsm/a.tif", np.zeros((83, 80), np.float32))


def recolour_labels(root):
    tifffile.imwrite(
        root / "train/labels/a.tif", np.full((80, 80, 3), 255, np.uint8), photometric="rgb"
    )


def remove_heights(root):
    shutil.rmtree(root / "train/dsm")


def remove_test_tiles(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    "damage, parts",
    [
        (truncate_image, ["train/images/a.tif"]),
        (resize_heights, ["train/dsm/a.tif 83 x 80", "train/images/a.tif 80 x 80"]),
        (recolour_labels, ["train/labels/a.tif", "classes"]),
        (remove_heights, ["tile a", "--modalities image"]),
        (remove_test_tiles, ["test/images"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_own_tiles_are_one_line_that_names_the_file_and_no_run_begins(
    script, tmp_path, damage, parts
):
    write_own_tiles(tmp_path / "mine")
    damage(tmp_path / "mine")
    assert_refused(script("train.py", *OWN, "--out", "run"), *parts)
    assert not (tmp_path / "run").exists()


def test_mistakes_through_the_shell_are_one_line_each_and_no_more(tmp_path):
    write_own_tiles(tmp_path / "mine")
    truncate_image(tmp_path / "mine")
    train = ["train.py", *OWN, "--out", "run"]
    for words, part in ((train, "mine/train/images/a.tif"), (["evaluate.py"], "no finished run")):
        process = shell(tmp_path, *words)
        assert_refused((process.returncode, process.stdout, process.stderr), part)
        assert not process.stdout and [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_second_run_into_the_same_folder_is_refused_and_the_first_is_kept(trained, script, city):
    _, run, _ = trained
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    base = ["--data", "vaihingen", "--root", city, "--epochs", 2, "--steps", 2, *TINY]
    assert_refused(script("train.py", *base, "--out", run), run, "--resume")
    assert_refused(script("train.py", "--resume", "--out", run, "--lr", "0.5"), "--lr 0.5", "0.01")
    assert {name: (run / name).read_bytes() for name in files_below(run)} == before


@pytest.mark.parametrize(
    "words, parts",
    [
        (["train.py", "--resume"], ["runs"]),
        (["train.py", "--resume", "--out", "nowhere"], ["nowhere"]),
        (["evaluate.py"], ["no finished run", "runs"]),
        (["evaluate.py", "--run", "nowhere"], ["nowhere"]),
        (["evaluate.py", "--table"], ["runs"]),
        (["explain.py"], ["no finished run", "runs"]),
        (["evaluate.py", "--table", "nowhere"], ["nowhere"]),
        (["evaluate.py", "--table", "--stride", "8"], ["--stride"]),
        (["predict.py", "--image", "a.tif", "--out", "b.png"], ["no finished run", "runs"]),
        (["predict.py", "--run", "nowhere", "--image", "a.tif", "--out", "b.png"], ["nowhere"]),
        (["predict.py", "--image", "a.tif"], ["--out"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_without_a_run_there_is_one_line_and_nothing_is_written(script, tmp_path, words, parts):
    assert_refused(script(*words), *parts)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--split val", ["val", "train, test"]),
        ("--root nowhere", ["nowhere/top/top_mosaic_09cm_area5.tif"]),
        ("--stride 0", ["stride", "64"]),
        ("--stride 65", ["stride", "64"]),
    ],
)
def test_a_mistake_in_evaluation_is_one_line_and_leaves_the_scores(trained, script, flags, parts):
    _, run, _ = trained
    before = (run / "scores.json").read_bytes()
    assert_refused(script("evaluate.py", "--run", run, *flags.split()), *parts)
    assert (run / "scores.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"--dsm": None}, ["--dsm", "missing"]),
        ({"--image": "nowhere.tif"}, ["--image", "nowhere.tif"]),
        ({"--dsm": "short.tif"}, ["short.tif", "128 x 132"]),
        ({"--image": "garbage.tif"}, ["garbage.tif"]),
        ({"--image": "grey.tif"}, ["grey.tif", "three or more bands"]),
        ({"--out": "map.jpg"}, ["--out map.jpg"]),
        ({"--out": "nowhere/map.png"}, ["--out nowhere/map.png"]),
        ({"--out": "/proc/map.png"}, ["--out /proc/map.png"]),
        ({"--out": "/proc/map.tif"}, ["--out /proc/map.tif"]),
        ({"--out": "short.tif", "--dsm": "short.tif"}, ["--out short.tif", "another file"]),
        ({"--confidence": "sure.jpg"}, ["--confidence sure.jpg", ".png or .tif"]),
        ({"--confidence": "nowhere/sure.tif"}, ["--confidence nowhere/sure.tif"]),
        ({"--confidence": "/proc/sure.png"}, ["--confidence /proc/sure.png"]),
        (
            {"--confidence": "short.tif", "--dsm": "short.tif"},
            ["--confidence short.tif", "another file"],
        ),
        ({"--confidence": "./map.png"}, ["--confidence map.png", "--out", "another file"]),
        ({"--probabilities": "all.png"}, ["--probabilities all.png", "give a .tif"]),
        ({"--probabilities": "/proc/all.tif"}, ["--probabilities /proc/all.tif"]),
        (
            {"--probabilities": "a.tif", "--confidence": "A.tif"},
            ["--probabilities a.tif", "is the file of --confidence"],
        ),
        ({"--polygons": "map.shp"}, ["--polygons map.shp", ".geojson"]),
        ({"--polygons": "nowhere/a.geojson"}, ["--polygons nowhere/a.geojson", "folder"]),
        ({"--min-area": "3"}, ["--min-area", "--polygons"]),
        ({"--min-area": "nan", "--polygons": "a.geojson"}, ["--min-area", "0 or more"]),
        ({"--image": ".", "--dsm": None}, ["--out map.png", "give a folder"]),
        ({"--image": ".", "--dsm": ".", "--out": "maps"}, ["garbage.tif"]),
        ({"--image": "empty", "--out": "maps"}, ["empty", "no image in this folder"]),
        ({"--image": ".", "--dsm": "empty", "--out": "maps"}, ["--dsm empty", "add garbage.tif"]),
        ({"--image": ".", "--dsm": ".", "--out": "/proc/maps"}, ["--out /proc/maps"]),
        ({"--blend": "sum"}, ["--blend", "cosine"]),
        ({"--stride": "0"}, ["stride", "64"]),
        ({"--stride": "-8"}, ["stride", "64"]),
        ({"--stride": "65"}, ["stride", "64"]),
    ],
    ids=str,
)
def test_a_mistake_in_prediction_is_one_line_and_writes_no_map(
    trained, tile, script, tmp_path, flags, parts
):
    _, run, _ = trained
    tifffile.imwrite("short.tif", np.zeros((125, 132), np.float32))
    tifffile.imwrite("grey.tif", np.zeros((128, 132), np.uint8))
    Path("garbage.tif").write_bytes(b"II*\x00 no more than this")
    Path("empty").mkdir()
    words = {"--run": run, "--image": tile[0], "--dsm": tile[1], "--out": "map.png"} | flags
    given = [word for pair in words.items() if pair[1] is not None for word in pair]
    assert_refused(script("predict.py", *given), *parts)
    assert files_below(tmp_path) == ["garbage.tif", "grey.tif", "short.tif"]


def test_an_image_without_a_band_that_the_run_was_trained_on_is_one_line(script, tmp_path):
    write_own_tiles(tmp_path / "mine")
    for path in (tmp_path / "mine").glob("*/images/a.tif"):
        image = np.concatenate([read_raster(path)] * 2, axis=-1)[..., :4]
        tifffile.imwrite(path, image, photometric="rgb", extrasamples=["unspecified"])
    assert script("train.py", *OWN, "--bands", "4,3,2", "--out", "run")[0] == 0
    tifffile.imwrite("three.tif", np.zeros((80, 80, 3), np.uint8), photometric="rgb")
    words = ["--run", "run", "--dsm", "mine/test/dsm/a.tif", "--out", "map.tif"]
    assert_refused(script("predict.py", *words, "--image", "three.tif"), "three.tif", "band 4")
    assert not Path("map.tif").exists()


def test_a_run_of_other_classes_than_the_data_s_is_one_line_and_leaves_the_scores(script, tmp_path):
    write_own_tiles(tmp_path / "mine")
    assert script("train.py", *OWN, "--out", "run")[0] == 0
    before, path = Path("run/scores.json").read_bytes(), tmp_path / "mine" / "classes.json"
    listed = json.loads(path.read_text())["classes"]
    for classes in ([*listed, {"name": "tree", "color": [0, 200, 0]}], listed[::-1]):
        path.write_text(json.dumps({"classes": classes}))
        names = ", ".join(c["name"] for c in classes)
        assert_refused(
            script("evaluate.py", "--run", "run", "--device", "cpu"),
            "run tells apart ground, house",
            names,
        )
    assert Path("run/scores.json").read_bytes() == before


@pytest.mark.parametrize(
    "flags, parts",
    [
        ({"--at": "132,0"}, ["--at 132,0", "131,127"]),
        ({"--at": "5"}, ["--at", "X,Y"]),
        ({"--out": "short.tif"}, ["short.tif", "another folder"]),
        ({"--out": "/proc/inside"}, ["/proc/inside", "another folder"]),
        ({"--tile": "5"}, ["--tile", "--image"]),
        ({"--image": "tiny.tif", "--dsm": "low.tif"}, ["132 x 60", "64"]),
        ({"--dsm": "short.tif"}, ["short.tif", "128 x 132"]),
    ],
    ids=str,
)
def test_a_mistake_in_looking_inside_is_one_line_and_writes_no_page(
    trained, tile, script, tmp_path, flags, parts
):
    _, run, _ = trained
    tifffile.imwrite("short.tif", np.zeros((125, 132), np.float32))
    tifffile.imwrite("low.tif", np.zeros((60, 132), np.float32))
    tifffile.imwrite(
        "tiny.tif", np.arange(60 * 132 * 3, dtype=np.uint16).reshape(60, 132, 3), photometric="rgb"
    )
    words = {"--run": run, "--image": tile[0], "--dsm": tile[1], "--out": "inside"} | flags
    given = [word for pair in words.items() if pair[1] is not None for word in pair]
    assert_refused(script("explain.py", *given), *parts)
    assert (
        files_below(tmp_path) == ["low.tif", "short.tif", "tiny.tif"]
        and not Path("inside").exists()
    )


# ---------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_prints_and_keeps_both_networks_with_their_ratio_memory_and_ceiling(tmp_path):
    words = "speed --encoder vit_t --tasks network --crop 64 --batch 1 --repeats 1 --precision fp32"
    words = [*words.split(), "--memory", "--out", "here/rows.csv", "--device", "cpu"]
    done = shell(tmp_path, "benchmark.py", *words)
    out = done.stdout
    assert (done.returncode, done.stderr) == (0, "next: python benchmark.py plan vaihingen\n")
    assert files_below(tmp_path) == ["here/rows.csv", "here/rows.md"]
    assert out.strip() in (tmp_path / "here/rows.md").read_text()
    with (tmp_path / "here/rows.csv").open(newline="") as file:
        plain, fast = csv.DictReader(file)
    assert (plain["order"], fast["order"]) == ("plain", "fast") and float(fast["error"]) < 1e-4
    ratio = float(plain["seconds"]) / float(fast["seconds"])
    assert float(fast["times_plain"]) == pytest.approx(ratio, rel=1e-3)
    assert float(fast["of_ceiling"]) > 0 and 100 < float(fast["peak_mb"]) < 4000
    assert "torch" in fast["version"]


def test_a_plan_tells_hours_windows_and_memory_of_the_recipe_for_each_crop(script, monkeypatch):
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda kind: QUICK)
    words = "plan vaihingen --encoder vit_t --device cpu".split()
    status, out, err = script("benchmark.py", *words)
    then = "next: python train.py --data=vaihingen --root=DIR --encoder=vit_t\n"
    assert (status, err) == (0, then) and "50 x 1000 steps of 10" in out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in out.splitlines()
        if line.startswith("| ")
    ][1:]
    assert [int(row[0]) for row in rows] == [256, 224, 448, 672, 896]
    windows = 4 * (len(range(0, 2500 - 256, 32)) + 1) * (len(range(0, 1900 - 256, 32)) + 1)
    assert rows[0][1] == "x 1.00" and int(rows[0][4].replace(",", "")) == windows
    for column in (3, 6):  # hours and gigabytes grow with the crop
        values = [float(row[column].split()[0].replace(",", "")) for row in rows]
        assert 0 < values[1] <= values[0] <= values[2] <= values[3] <= values[4]


@pytest.mark.parametrize(
    "words, part",
    [
        ("--batch 0", "--batch"),
        ("--crop 32", "--crop"),
        ("--precision tf32", "tf32"),
        ("--tasks all", "--tasks"),
    ],
)
def test_a_mistake_in_the_benchmark_is_one_line(script, tmp_path, words, part):
    assert_refused(script("benchmark.py", "speed", *words.split(), "--device", "cpu"), part)
    assert files_below(tmp_path) == []
