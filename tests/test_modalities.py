"""Any rasters, and any of them missing: kinds, bands, the network without one, the scripts."""

# ruff: noqa: F811  # `script` is a fixture of test_scripts.py
import json
import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY, randomise
from hypothesis import given
from hypothesis import strategies as st
from test_scripts import TINY as FLAGS
from test_scripts import script, write_own_tiles  # noqa: F401

from data import CropDataset, Tile, open_dataset
from engine.commandline import parse_settings, resumed_settings
from engine.training import encode_in_parts
from fast import accelerate
from geodata.crops import CropOrder, crops_of_step, draw_missing
from geodata.kinds import Kind, ordered, read_kind
from geodata.rasters import DataError
from mfnet import build_mfnet, count_parameters
from tuners import mix_modalities, tell_present

RNG = np.random.default_rng(0)
CLASSES = (("ground", (90, 90, 90)), ("house", (200, 0, 0)))


def own_tiles(tmp_path, rasters, **files):
    """Own tiles with image, heights and further rasters (80, 80[, C]) for both splits."""
    root = tmp_path / "mine"
    write_own_tiles(root)
    content = json.loads((root / "classes.json").read_text()) | {"rasters": rasters}
    (root / "classes.json").write_text(json.dumps(content))
    for name, array in files.items():
        for split in ("train", "test"):
            (root / split / name).mkdir()
            for image in (root / split / "images").iterdir():
                path = root / split / name / f"{image.stem}.tif"
                tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig")
    return root


def shrunk_image(tmp_path, shape):
    path = tmp_path / "r.tif"
    tifffile.imwrite(path, RNG.random(shape).astype(np.float32), photometric="minisblack")
    return path


# ------------------------------------------------------------------------------------------- kinds


@given(st.sets(st.sampled_from(["image", "dsm", "sar", "nir", "x-2"]), min_size=1))
def test_the_order_in_which_rasters_are_given_does_not_matter(names):
    found = {ordered("+".join(order)) for order in permutations(names)}
    first = [name for name in ("image", "dsm") if name in names]
    assert found == {"+".join(first + sorted(names - {"image", "dsm"}))}
    s, _, _ = parse_settings(["--modalities", "+".join(sorted(names))])
    assert s.rasters == tuple(found.pop().split("+"))


def test_rasters_on_a_command_line_are_those_of_a_run_in_any_order():
    words = ["--modalities", "sar+dsm+image", "--drop-modality", "0.5", "--drop-only", "sar+image"]
    s, told, _ = parse_settings(words)
    assert told["modalities"] == s.modalities == "image+dsm+sar"
    assert told["drop_only"] == s.drop_only == "image+sar"
    assert resumed_settings(s, told, Path("run")) == replace(s, out="run")


@pytest.mark.parametrize("text", ["image+image", "image+", "", "a b", "image,dsm", "../x"])
def test_what_is_no_list_of_rasters_is_refused(text):
    with pytest.raises(DataError, match="--modalities .*image\\+dsm"):
        ordered(text)


@given(
    bands=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    scaling=st.sampled_from(["percentiles", "unit", "-30:0"]),
    more=st.sampled_from([{}, {"unit": "dB"}, {"nodata": -1}, {"from": "image"}]),
)
def test_a_kind_is_kept_with_a_run_as_it_was_written(bands, scaling, more):
    form = {"bands": bands, "scaling": scaling, **more}
    kind = read_kind("sar", form, "here")
    assert kind.bands == tuple(b - 1 for b in bands) and kind.as_dict() == form
    assert read_kind("sar", json.loads(json.dumps(kind.as_dict())), "here") == kind


@pytest.mark.parametrize(
    "name, form, said",
    [
        ("labels", {}, "another name"),
        ("a+b", {}, "another name"),
        ("sar", [1], "list of its properties"),
        ("sar", {"band": [1]}, "no property band; there are .*bands"),
        ("sar", {"bands": [0]}, "from 1 on"),
        ("sar", {"bands": []}, "from 1 on"),
        ("sar", {"kind": "radar"}, "height or bands"),
        ("sar", {"scaling": "loud"}, "scaling loud: give percentiles"),
        ("sar", {"from": "dsm"}, "image"),
        ("sar", {"nodata": "none"}, "nodata"),
    ],
)
def test_a_kind_that_cannot_be_is_refused_in_one_line(name, form, said):
    with pytest.raises(DataError, match=f"here: the raster {name}: .*{said}".replace("+", "\\+")):
        read_kind(name, form, "here")


# ------------------------------------------------------------------------------------------- tiles


def test_own_rasters_are_read_by_their_names_and_scaled_by_their_kinds(tmp_path):
    sar = RNG.normal(-15, 4, (80, 80, 2)).astype(np.float32)
    sar[3, 4], sar[5, 6, 0] = -99, np.nan
    kinds = {"sar": {"bands": [2, 1], "scaling": "-30:0", "nodata": -99}}
    kinds["blue"] = {"from": "image", "bands": [3], "scaling": "unit"}
    root = own_tiles(tmp_path, {**kinds, "dsm": {"kind": "height"}}, sar=sar)
    tile = open_dataset("tiles", root).tiles("train", ("image", "dsm", "blue", "sar"))[0]
    read = tile.read("sar")
    assert read.shape == (80, 80, 2) and np.isnan(read[3, 4]).all() and np.isnan(read[5, 6, 1])
    assert np.nanmax(np.abs(read[6:] - sar[6:, :, ::-1])) == 0
    assert np.array_equal(tile.read("image"), tile.read_image())
    loaded, box = tile.load(("image", "dsm", "blue", "sar")), np.s_[0:80, 0:80]
    assert [n.endswith("2 pixels of sar without data, read as the lowest") for n in tile.notes] == [
        1
    ]
    expected = np.nan_to_num(np.clip((read + 30) / 30, 0, 1))
    assert np.allclose(loaded.input("sar", box), expected.transpose(2, 0, 1), atol=1e-6)
    assert np.allclose(loaded.input("blue", box)[0], loaded.input("image", box)[2])
    in_files = tile.load(("image", "dsm", "blue", "sar"), held=set())
    for name in ("image", "dsm", "blue", "sar"):
        assert np.array_equal(
            in_files.input(name, np.s_[5:9, 7:30]), loaded.input(name, box)[..., 5:9, 7:30]
        )


@given(low=st.integers(-50, 50), span=st.integers(1, 90), dtype=st.sampled_from(["i2", "f4"]))
def test_percentiles_are_of_each_band_and_ignore_what_is_no_data(
    tmp_path_factory, low, span, dtype
):
    values = RNG.integers(low, low + span + 1, (70, 66, 2)).astype(dtype)
    values[:9] = -9999
    values[9:12, :, 0] = -9998  # of one band alone, and by the file's word
    path = tmp_path_factory.mktemp("p") / "a.tif"
    about = dict(photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(path, values, **about, extratags=[(42113, "s", 0, "-9998", True)])
    tile = Tile("a", {"sar": path}, CLASSES, kinds={"sar": Kind((0, 1), nodata=-9999)})
    found = tile.open(("sar",)).input("sar", np.s_[9:70, 0:66])
    for band, one in zip(found, np.moveaxis(values[9:].astype(np.float64), -1, 0)):
        there = one != -9998
        first, last = np.percentile(one[there], (1, 99))
        wanted = there * np.clip((one - first) / ((last - first) or 1), 0, 1)
        assert np.allclose(band, wanted, atol=1e-5)


def test_a_raster_on_another_grid_is_laid_on_the_image_and_one_elsewhere_is_refused(tmp_path):
    def geo(left, pixel):
        return [
            (33550, "d", 3, (pixel, pixel, 0.0), True),
            (33922, "d", 6, (0.0,) * 3 + (left, 160.0, 0.0), True),
        ]

    image, sar = tmp_path / "image.tif", tmp_path / "sar.tif"
    tifffile.imwrite(
        image, np.zeros((160, 160, 3), np.uint8), photometric="rgb", extratags=geo(0, 1)
    )
    values = np.stack([np.full((80, 80), 5), np.tile(np.arange(80), (80, 1))], -1).astype(
        np.float32
    )
    tags = dict(photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(sar, values, extratags=geo(0, 2), **tags)
    paths, kinds = {"image": image, "sar": sar}, {"sar": Kind((0, 1), "0:80")}
    tile = Tile("a", paths, CLASSES, kinds=kinds)
    read = tile.read("sar")
    assert read.shape == (160, 160, 2) and (read[..., 0] == 5).all()
    assert np.allclose(read[80, 1:159, 1], (np.arange(1, 159) + 0.5) / 2 - 0.5)
    assert tile.open(("image", "sar")).size == (160, 160)
    tifffile.imwrite(sar, values, extratags=geo(9000, 2), **tags)
    with pytest.raises(DataError, match="sar.tif: does not overlap the image"):
        Tile("a", paths, CLASSES, kinds=kinds).check(("image", "sar"))


def test_other_band_counts_and_unknown_rasters_are_refused_by_file(tmp_path):
    root = own_tiles(tmp_path, {"sar": {"bands": [1, 2]}}, sar=np.zeros((80, 80), np.float32))
    tiles = open_dataset("tiles", root)
    with pytest.raises(DataError, match="sar.a.tif: has 1 band, and sar is made of band 2"):
        tiles.tiles("train", ("image", "sar"))[0].load(("image", "sar"))
    with pytest.raises(
        DataError, match="no raster lidar; there are image, dsm, sar; list.*classes.json"
    ):
        tiles.tiles("train", ("image", "lidar"))


def test_a_tile_that_lacks_a_raster_is_named_or_trained_on_without_it(tmp_path):
    root, names = (
        own_tiles(tmp_path, {"sar": {}}, sar=np.eye(80, dtype=np.float32)),
        ("image", "dsm", "sar"),
    )
    (root / "train/sar/a.tif").unlink()
    dataset = open_dataset("tiles", root)
    with pytest.raises(DataError, match="tile a has no sar; .*leave the tile out.*--drop-modality"):
        dataset.tiles("train", names)[0].load(names)
    dataset.may_lack = names
    tile = dataset.tiles("train", names)[0].load(names)
    crops = CropDataset([tile], 64, 0, names, may_lack=names)
    (image, dsm, sar), labels = crops[0, 0]
    assert sar.shape == (1, 64, 64) and sar.isnan().all()
    assert not (image.isnan().any() or dsm.isnan().any())
    again, same = crops[0, 0, True]
    assert torch.equal(labels, same) and again[2].isnan().all()
    assert {x.isnan().all().item() for x in again[:2]} == {True, False}
    assert all(torch.equal(x, y) or x.isnan().all() for x, y in zip(again, (image, dsm, sar)))
    for one, other in ((0, 1), (1, 0)):  # --drop-only
        crops.may_lack = (names[one], "sar")
        again, _ = zip(*(crops[0, i, True] for i in range(4)))
        assert all(x[one].isnan().all() and not x[other].isnan().any() for x in again)
    dataset.may_lack = ("image", "dsm")
    with pytest.raises(DataError, match="tile a has no sar"):
        dataset.tiles("train", names)[0].load(names)
    dataset.may_lack = names
    with pytest.raises(DataError, match="no training tile has sar; .*use --modalities image"):
        dataset.lacking(dataset.tiles("train", names), "train", names)
    shutil.copy(root / "train/images/a.tif", root / "train/images/b.tif")
    shutil.copy(root / "train/labels/a.tif", root / "train/labels/b.tif")
    tiles = dataset.tiles("train", names[:2])
    assert dataset.lacking(tiles, "train", names[:2]) == ["1 of 2 train tiles have no heights"]
    (root / "test/sar/a.tif").unlink()
    assert dataset.check(names) == ["1 of 1 test tiles have no sar"]


RASTERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4)


@given(RASTERS, st.integers(0, 99))
def test_a_crop_never_goes_without_all_rasters_nor_without_one_that_it_needs(rasters, seed):
    lacking, may = map(list, zip(*rasters))
    if all(lacking):
        return
    gone = draw_missing((seed, 1, 2), lacking, may)
    assert gone == draw_missing((seed, 1, 2), lacking, may) and not all(gone)
    assert all(g == own or g and m for g, own, m in zip(gone, lacking, may))
    able = sum(m and not own for m, own in zip(may, lacking))
    assert (sum(gone) > sum(lacking)) == (able > 0 and lacking.count(False) > 1)


def test_each_raster_and_each_number_of_them_is_missing_as_often():
    drawn = np.array([draw_missing((3, 0, i), [False] * 4, [True] * 4) for i in range(4000)])
    assert np.allclose(drawn.mean(axis=0), 0.5, atol=0.03)
    counts = np.bincount(drawn.sum(axis=1), minlength=5) / len(drawn)
    assert np.allclose(counts, [0, 1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)


@given(st.integers(1, 12), st.sampled_from([1, 2, 4]), st.floats(0, 1))
def test_crops_are_those_of_a_run_without_dropout_and_a_share_of_them_again(size, world, share):
    plain, batch = list(CropOrder(2, 3, size * world)), size * world
    whole = list(CropOrder(2, 3, batch, again=share))
    first = [[key for key in keys if len(key) == 2] for keys in whole]
    again = [[key[:2] for key in keys if len(key) == 3] for keys in whole]
    assert first == plain and all({*a} <= {*f} for a, f in zip(again, first))
    assert {abs(len(a) - share * batch) < 1 + 1e-6 for a in again} == {True}
    assert all(len(a) == (0 if share == 0 else batch if share == 1 else len(a)) for a in again)
    assert all(keys[keys.index(key) - 1] == key[:2] for keys in whole for key in keys if key[2:])
    ranks = [list(CropOrder(2, 3, batch, 0, rank, world, share)) for rank in range(world)]
    assert [sum(shares, []) for shares in zip(*ranks)] == whole
    sizes = {len(keys) for shares in ranks for keys in shares}
    if len(sizes) == 1:
        assert crops_of_step(batch, share, world) == len(whole[0])
    else:
        with pytest.raises(DataError, match="of each process; give 1, 0.5 or"):
            crops_of_step(batch, share, world)
    assert crops_of_step(batch, 1 / size, world) == batch + world


# ----------------------------------------------------------------------------------- the network


def network(bands, fills=True, tuner="adapter"):
    torch.manual_seed(0)
    model = build_mfnet(TINY, tuner, 3, len(bands), bands=bands, fills=fills)
    return randomise(model).eval().requires_grad_(False)


def rasters_of(bands, B=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(B, C, 64, 64, generator=generator) for C in bands]


def missing(raster, *images):
    out = raster.clone()
    out[list(images)] = torch.nan
    return out


@given(M=st.integers(2, 4), there=st.data(), tokens=st.integers(1, 3))
def test_those_that_are_there_mix_with_the_mean_of_the_others_that_are_there(M, there, tokens):
    B, u, w = 2, torch.randn(M, 2 * tokens, 5), torch.nn.Parameter(torch.rand(M))
    present = torch.tensor(
        there.draw(
            st.lists(st.lists(st.booleans(), min_size=B, max_size=B), min_size=M, max_size=M)
        )
    )
    w.present = present
    found = mix_modalities(u, w).view(M, B, tokens, 5)
    for m in range(M):
        for b in range(B):
            own = u.view(M, B, tokens, 5)[:, b]
            others = [own[k] for k in range(M) if k != m and present[k, b]]
            mean = sum(others) / len(others) if others else own[m]
            assert torch.allclose(found[m, b], w[m] * own[m] + (1 - w[m]) * mean, atol=1e-6)


@pytest.mark.parametrize(
    "bands, tuner",
    [((3, 1, 2), "adapter"), ((3, 1, 2), "lora"), ((3, 1), "ssf"), ((4, 1, 2, 1), "adapter")],
)
def test_a_missing_raster_leaves_the_other_images_of_a_batch_alone(bands, tuner):
    model, rasters = network(bands, tuner=tuner), rasters_of(bands, B=2)
    given = [missing(r, 1) if m == 1 else r for m, r in enumerate(rasters)]
    found, whole = model(*given), model(*rasters)
    assert torch.allclose(found[0], whole[0], atol=1e-5) and found.isfinite().all()
    assert not torch.allclose(found[1], whole[1], atol=1e-3)
    assert torch.allclose(found[1], model(*(r[1:] for r in given))[0], atol=1e-5)
    assert torch.allclose(accelerate(deepcopy(model))(*given), found, atol=1e-4)


def test_with_all_rasters_there_a_network_with_fills_is_the_one_without():
    bands = (3, 1, 1)
    with_fills, without = network(bands), network(bands, fills=False)
    state = {n: t for n, t in with_fills.state_dict().items() if n != "rasters.fills"}
    without.load_state_dict(state)
    assert torch.allclose(with_fills(*rasters_of(bands)), without(*rasters_of(bands)), atol=1e-5)


def test_two_rasters_have_the_parameters_and_names_that_they_always_had():
    model = build_mfnet(TINY, "adapter", 3)
    assert not [n for n in model.state_dict() if n.startswith("rasters")]
    assert list(count_parameters(model)) == [
        "encoder",
        "tuner",
        "fusion",
        "decoder",
        "total",
        "trainable",
    ]
    more = build_mfnet(TINY, "adapter", 3, 3, bands=(3, 5, 2), fills=True)
    assert count_parameters(more)["rasters"] == 3 * (5 + 1) + 3 * (2 + 1) + 3 * 256
    assert all(p.requires_grad for n, p in more.named_parameters() if n.startswith("rasters"))


@pytest.mark.parametrize("C", [1, 2, 3, 4, 7])
def test_a_projection_starts_as_means_of_neighbouring_bands(C):
    raster = torch.rand(2, C, 64, 64)
    found = build_mfnet(TINY, "frozen", 3, 1, bands=(C,)).rasters.three_channels(0, raster)
    groups = {2: ([0], [1], [0, 1]), 4: ([0, 1], [2], [3]), 7: ([0, 1, 2], [3, 4], [5, 6])}
    groups = groups.get(C, ([0], [C // 2], [C - 1]))
    wanted = torch.stack([raster[:, group].mean(dim=1) for group in groups], dim=1)
    assert torch.allclose(found, wanted)
    if C not in (1, 3):
        with pytest.raises(ValueError, match=f"raster 0 has {C} bands"):
            build_mfnet(TINY, "frozen", 3, 1, bands=(C,))(raster[:, 1:])


def test_parts_of_a_batch_give_the_gradients_of_the_whole_with_rasters_missing():
    bands, gradients = (3, 1, 2), []
    rasters = rasters_of(bands, B=4)
    rasters = [missing(rasters[0], 0), missing(rasters[1], 1, 2), rasters[2]]
    for parts in (1, 2):
        model = network(bands)
        model.requires_grad_(True)
        if parts > 1:
            encode_in_parts(model, parts)
        model(*rasters).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))
    tell_present(model.image_encoder, None)


# ------------------------------------------------------------------------------------- the scripts

RUN = ["--data", "tiles", "--root", "mine", "--epochs", 1, "--steps", 2, *FLAGS, "--out"]
DROP = ["--drop-modality", 0.4]


def test_three_rasters_train_score_and_predict_with_any_of_them_missing(script, tmp_path):
    sar = RNG.normal(size=(80, 80, 2)).astype(np.float32)
    root = own_tiles(tmp_path, {"sar": {"bands": [1, 2]}}, sar=sar)
    for name in ("images", "labels", "sar"):
        shutil.copy(root / "train" / name / "a.tif", root / "train" / name / "b.tif")
    status, out, err = script("train.py", *RUN, "run", *DROP, "--modalities", "sar+image+dsm")
    assert status == 0 and f"rasters {9 + 3 * 256:,}" in out, err
    assert "note: 1 of 2 train tiles have no heights" in out
    assert "2 crops of 64, 1 of them again with rasters missing" in out
    (tmp_path / "mine/classes.json").write_text(
        (tmp_path / "mine/classes.json").read_text().replace("[1, 2]", "[2, 1]")
    )  # the run keeps the bands that it was trained on
    assert script("evaluate.py", "--run", "run", "--without", "sar+dsm")[0] == 0
    scores = json.loads((tmp_path / "run/scores_without-dsm+sar.json").read_text())
    assert scores["without"] == "dsm+sar" and scores["convention"].endswith("without dsm+sar")
    assert len(list((tmp_path / "run/pictures").glob("*_without-dsm+sar.png"))) == 1
    files = {
        n: f"mine/test/{d}/{p.name}"
        for n, d in (("image", "images"), ("dsm", "dsm"), ("sar", "sar"))
        for p in (tmp_path / "mine/test" / d).iterdir()
    }
    predict = ["predict.py", "--run", "run", "--out", "map.png", "--raster", f"sar={files['sar']}"]
    assert script(*predict)[0] == 0
    assert script("explain.py", "--run", "run")[0] == 0
    page = (tmp_path / "run/explain/explain.html").read_text()
    assert "without sar" in page and "tokens, sar" in page
    for words, parts in (
        (["evaluate.py", "--run", "run", "--without", "nir"], ["--without nir", "image, dsm, sar"]),
        (["evaluate.py", "--run", "run", "--without", "sar+dsm+image"], ["nothing is left"]),
        (["predict.py", "--run", "run", "--out", "m.png"], ["no raster", "image, dsm, sar"]),
        ([*predict, "--raster", "nir=x.tif"], ["--raster nir", "image, dsm, sar"]),
        ([*predict, "--raster", "sar=x.tif"], ["sar=x.tif", "give it once"]),
        ([*predict[:-1], "sar"], ["NAME=FILE"]),
        ([*predict[:-1], f"sar={files['dsm']}"], [files["dsm"], "band 2"]),
    ):
        status, _, err = script(*words)
        assert status == 2 and all(part in err for part in parts) and err.count("\n") == 1, err


def test_a_run_without_dropout_says_how_to_train_one(script, tmp_path):
    own_tiles(tmp_path, {})
    assert script("train.py", *RUN, "run")[0] == 0
    trains = "python train.py --data tiles --root mine --modalities image+dsm --drop-modality 0.5"
    for words in (
        ["evaluate.py", "--without", "dsm"],
        ["predict.py", "--image", "x.png", "--out", "m.png"],
    ):
        (tmp_path / "x.png").write_bytes(
            next((tmp_path / "mine/test/images").iterdir()).read_bytes()
        )
        status, _, err = script(*words, "--run", "run")
        assert status == 2 and trains in err and err.count("\n") == 1
    assert script("train.py", *RUN, "only", *DROP, "--drop-only", "dsm")[0] == 0
    assert script("evaluate.py", "--run", "only", "--without", "dsm")[0] == 0
    status, _, err = script("evaluate.py", "--run", "only", "--without", "image")
    assert status == 2 and "only cannot do without" in err
    assert script("train.py", *RUN, "image", "--modalities", "image")[0] == 0
    words = ["--run", "image", "--image", "x.png", "--dsm", "nowhere.tif", "--out", "m.png"]
    status, _, err = script("predict.py", *words)
    assert status == 2 and "--dsm: image was trained on image; leave it out" in err
    for flags, said in (
        (["--modalities", "image", *DROP], "alone nothing"),
        (["--drop-modality", 1.5], "0 to 1"),
        (["--drop-only", "dsm"], "needs --drop-modality"),
        ([*DROP, "--drop-only", "sar"], "there are image, dsm"),
        (["--modalities", "image+lidar"], "no raster lidar"),
        (["--modalities", "image+image"], "give different names with +"),
    ):
        status, _, err = script("train.py", *RUN, "none", *flags)
        assert status == 2 and said in err and err.count("\n") == 1
