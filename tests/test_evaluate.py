"""Scores from one confusion matrix, and the pictures beside them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import write_city
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from data import open_dataset
from engine.recipes import published_protocol
from engine.scoring import ConfusionMatrix, format_scores, score_split, scores_name
from engine.settings import Settings
from geodata import synthetic
from geodata.crops import sliding_windows
from geodata.labels import colors_to_labels
from geodata.layouts import ISPRS_CLASSES
from geodata.rasters import read_raster
from geodata.scaling import Scaling, TileScale
from geodata.tiles import LoadedTile
from reports.panels import (
    RIGHT,
    SURE,
    UNSCORED,
    UNSURE,
    WRONG,
    error_map,
    save_panel,
    shade_confidence,
)

GOLDENS = Path(__file__).parent / "goldens"
MEANS = ("oa", "mf1", "miou", "kappa")
pytestmark = pytest.mark.filterwarnings("error")


def score(pred, truth, K, scored=None, ignore=255):
    matrix = ConfusionMatrix(K, scored, ignore)
    matrix.update(pred, truth)
    return matrix.scores()


# ------------------------------------------------------------------------------------------ metrics


def test_the_scores_are_those_of_the_published_program():
    golden = json.loads((GOLDENS / "eval.json").read_text())
    text = golden["text"]
    with np.load(GOLDENS / "eval.npz") as maps:
        found = score(maps["pred"], maps["gt"], 6, scored=(0, 1, 2, 3, 4), ignore=6)

    def printed(pattern):
        return [float(number) for number in re.findall(pattern, text)]

    rows = re.search(r"\[\[.*?\]\]", text, re.DOTALL).group()
    assert found["confusion"] == json.loads(
        re.sub(r"(\d)\s+(?=\d)", r"\1, ", rows.replace("]\n", "],"))
    )
    assert [found["pixels"]] == printed(r"(\d+) pixels")
    assert [round(100 * found["oa"], 2)] == printed(r"accuracy : (.*)")
    recalls, f1s = text.split("F1Score :")
    of_class = r"(?m)^[a-z. ]+: (0\.\d+)$"
    assert [round(c["recall"], 4) for c in found["per_class"]] == [
        float(n) for n in re.findall(of_class, recalls)
    ]
    assert [round(c["f1"], 4) for c in found["per_class"]] == [
        float(n) for n in re.findall(of_class, f1s)
    ][:6]
    assert [round(found["mf1"], 4)] == printed(r"mean F1Score: (.*)")
    assert [round(found["kappa"], 4)] == printed(r"Kappa: (.*)")
    ious = [float(n) for n in re.search(r"\n\[(0\.[^\]]+)\]", text).group(1).split()]
    assert [round(c["iou"], 8) for c in found["per_class"]] == ious
    assert abs(found["miou"] - golden["miou"]) < 1e-12


@st.composite
def maps(draw):
    """(pred, truth, K): classes may be absent from either, and pixels ignored."""
    K = draw(st.integers(1, 5))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    some = draw(st.lists(st.integers(0, K - 1), min_size=1, unique=True))
    pred = draw(hnp.arrays(np.uint8, shape, elements=st.sampled_from(some)))
    truth = draw(
        hnp.arrays(np.uint8, shape, elements=st.one_of(st.integers(0, K - 1), st.just(255)))
    )
    return pred, truth, K


@given(maps(), st.data())
def test_the_scores_of_any_maps_are_those_counted_pixel_by_pixel(case, data):
    pred, truth, K = case
    scored = tuple(sorted(data.draw(st.sets(st.integers(0, K - 1)))))
    pairs = [(t, p) for t, p in zip(truth.ravel().tolist(), pred.ravel().tolist()) if t != 255]
    found, n = score(pred, truth, K, scored), len(pairs)

    def share(part, whole):
        return part / whole if whole else None

    for k, row in enumerate(found["per_class"]):
        hit, true, positive = (
            sum(map(test, pairs))
            for test in (lambda x: x == (k, k), lambda x: x[0] == k, lambda x: x[1] == k)
        )
        assert row["pixels"] == true and [row["recall"], row["precision"]] == [
            share(hit, true),
            share(hit, positive),
        ]
        assert [row["iou"], row["f1"]] == [
            share(hit, true + positive - hit),
            share(2 * hit, true + positive),
        ]
    assert found["confusion"] == [[pairs.count((t, p)) for p in range(K)] for t in range(K)]
    assert found["pixels"] == n and found["oa"] == share(sum(t == p for t, p in pairs), n)
    for mean, of in (("miou", "iou"), ("mf1", "f1")):
        values = [
            found["per_class"][k][of] for k in scored if found["per_class"][k][of] is not None
        ]
        assert (
            found[mean] == pytest.approx(sum(values) / len(values))
            if values
            else found[mean] is None
        )
    chance = sum(sum(t == k for t, _ in pairs) * sum(p == k for _, p in pairs) for k in range(K))
    if not pairs or chance == n * n:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx(
            (found["oa"] - chance / n**2) / (1 - chance / n**2), abs=1e-12
        )


@given(maps(), st.data())
def test_updates_in_parts_equal_one_update(case, data):
    pred, truth, K = case
    row = data.draw(st.integers(0, len(pred)))
    matrix = ConfusionMatrix(K)
    matrix.update(pred[:row], truth[:row])
    matrix.update(pred[row:], truth[row:])
    assert matrix.scores() == score(pred, truth, K)


def test_a_class_that_appears_nowhere_is_left_out_of_the_means():
    found = score(np.array([0, 1, 1]), np.array([0, 1, 0]), 3)
    assert found["per_class"][2] == {
        "iou": None,
        "f1": None,
        "precision": None,
        "recall": None,
        "pixels": 0,
    }
    assert found["miou"] == 0.5 and found["mf1"] == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_as_missed():
    found = score(np.array([0, 1]), np.array([0, 0]), 2)
    assert (
        found["per_class"][1]["iou"] == 0
        and found["per_class"][1]["recall"] is None
        and found["miou"] == 0.25
    )


@pytest.mark.parametrize("predicted, recall, miou", [(1, 1.0, 1.0), (2, 0.0, 0.0)])
def test_a_tile_of_one_class_has_every_score_but_a_kappa_that_means_nothing(
    predicted, recall, miou
):
    found = score(np.full((3, 4), predicted), np.full((3, 4), 1), 3)
    assert (found["oa"], found["miou"], found["mf1"]) == (recall, miou, miou) and found[
        "per_class"
    ][1]["recall"] == recall
    assert found["kappa"] == (None if predicted == 1 else 0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_kappa_is_exact_where_squares_of_pixels_pass_64_bits():
    matrix = ConfusionMatrix(2)
    matrix.counts[:] = [[3 * 10**9, 10**9], [10**9, 3 * 10**9]]
    assert matrix.scores()["kappa"] == 0.5


def test_where_nothing_is_scored_every_score_is_none():
    found = score(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8), 3)
    assert [found[name] for name in MEANS] == [None] * 4 and found["pixels"] == 0
    assert json.loads(json.dumps(found)) == found


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(3).update(np.zeros((2, 3), int), np.zeros((3, 2), int))


@pytest.mark.parametrize(
    "pred, truth", [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-1]), ([0, 200], [1, 2])]
)
def test_labels_that_are_no_class_are_refused_and_not_counted(pred, truth):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="outside 0 to 2"):
        matrix.update(np.array(pred), np.array(truth))
    assert matrix.counts.sum() == 0


def test_what_is_predicted_at_an_unscored_pixel_does_not_matter():
    assert score(np.array([0, 99]), np.array([0, 255]), 2)["confusion"] == [[1, 0], [0, 0]]


def test_the_table_is_in_percent_and_a_value_that_is_not_there_is_a_dash():
    scores = score(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 3)
    for name, row in zip(("ground", "house", "tree"), scores["per_class"]):
        row["name"] = name
    lines = format_scores({**scores, "convention": "all labels"}).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["ground", "66.67", "80.00", "66.67", "100.00", "2"],
        ["house", "50.00", "66.67", "100.00", "50.00", "2"],
        ["tree", "-", "-", "-", "-", "0"],
    ]
    assert all(
        part in lines[4]
        for part in ("OA 75.00", "mF1 73.33", "mIoU 58.33", "kappa 50.00", "(4 pixels)")
    )
    assert lines[5] == "(all labels)"


# ------------------------------------------------------------------------------------- whole splits


class Counting(nn.Module):
    """A convolution of image and heights to K classes; notes how many windows it was given. Every
    number of it and of the scaled rasters is a multiple of 1/4, so that sums are exact in any
    order.
    """

    def __init__(self, K):
        super().__init__()
        weight = torch.randint(
            -20, 21, (K, 4, 3, 3), generator=torch.Generator().manual_seed(0)
        ).float()
        self.weight, self.windows = nn.Parameter(weight), 0

    def forward(self, image, dsm):
        self.windows += len(image)
        return F.conv2d(torch.cat([image, dsm[:, None]], 1), self.weight, padding=1)


@pytest.fixture(scope="module")
def isprs(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    write_city(root, seed=2, size=64)
    return root


def quick(data="vaihingen", **own):
    return Settings(data=data, **{"crop": 64, "eval_stride": 64, "precision": "fp32", **own})


def labels_of(root, area, kind):
    colors = [*(color for _, color in ISPRS_CLASSES), (0, 0, 0)]
    labels = colors_to_labels(read_raster(synthetic.tile_paths(root, area)[kind]), colors)
    return np.where(labels == 6, 255, labels)


@pytest.mark.parametrize("full", [False, True])
def test_eroded_and_full_labels_are_counted_from_one_prediction_of_each_tile(isprs, full):
    settings, model, maps = quick(), Counting(6), {}
    dataset = open_dataset("vaihingen", isprs, full_labels=full)
    found = score_split(
        model, dataset, "test", settings, 64, lambda tile, pred, *_: maps.update({tile.name: pred})
    )
    assert model.windows == len(maps) == found["windows"] == 4
    second = found["eroded_labels" if full else "full_labels"]
    assert (
        not {"eroded_labels", "full_labels"} & second.keys()
        and ("full_labels" in found) != full
        and found["notes"] == []
    )
    for part, kind in (
        (found, "labels" if full else "eroded"),
        (second, "eroded" if full else "labels"),
    ):
        counts = [
            score(maps[str(n)], labels_of(isprs, n, kind), 6, range(5))
            for n in synthetic.TEST_AREAS
        ]
        assert part["confusion"] == np.sum([c["confusion"] for c in counts], axis=0).tolist()
        assert [part["per_tile"][str(n)]["miou"] for n in synthetic.TEST_AREAS] == [
            c["miou"] for c in counts
        ]
        assert ("full labels" if kind == "labels" else "eroded labels") in part["convention"]
    assert (
        found["pixels"] != second["pixels"]
        and {*ConfusionMatrix(6).scores(), "per_tile"} <= second.keys()
    )
    lines = format_scores(found).splitlines()
    assert (
        f"mIoU {100 * second['miou']:.2f}" in lines[-2] and lines[-1] == f"({found['convention']})"
    )
    assert f"({second['pixels']:,} pixels with {'eroded' if full else 'full'} labels)" in lines[-2]


def damaged(path):
    path.write_bytes(b"II*\x00 no more than this")


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), damaged], ids=["missing", "damaged"]
)
def test_a_test_tile_without_the_other_labels_is_scored_as_ever_and_a_note_says_why_that_is_all(
    tmp_path, damage
):
    write_city(tmp_path, seed=2, size=64)
    dataset, settings = open_dataset("vaihingen", tmp_path), quick()
    whole = score_split(Counting(6), dataset, "test", settings, 64)
    paths = [synthetic.tile_paths(tmp_path, n)["labels"] for n in synthetic.TEST_AREAS[1:3]]
    for path in paths:
        damage(path)
    found = score_split(Counting(6), dataset, "test", settings, 64)
    (note,) = found.pop("notes")
    del whole["full_labels"], whole["notes"]
    assert (
        found == whole
        and "full labels, which 2 of the tiles lack" in note
        and str(paths[0]) in note
    )
    assert "\n" not in note and format_scores({**found, "notes": [note]}).endswith(f"note: {note}")


def test_full_labels_that_lack_a_row_and_a_column_leave_the_score_by_eroded_ones_as_it_is(tmp_path):
    write_city(tmp_path, seed=2, size=64)
    dataset = open_dataset("vaihingen", tmp_path)
    whole = score_split(Counting(6), dataset, "test", quick(), 64)
    path = synthetic.tile_paths(tmp_path, 5)["labels"]
    tifffile.imwrite(path, read_raster(path)[:-1, :-1], photometric="rgb")
    found = score_split(Counting(6), dataset, "test", quick(), 64)
    assert (
        found.pop("full_labels")["pixels"] == whole.pop("full_labels")["pixels"] - 127
        and found == whole
    )


def test_training_tiles_are_scored_by_full_labels_and_held_out_ones_by_both(isprs):
    dataset = open_dataset("vaihingen", isprs).hold_out(2)
    found = {
        split: score_split(Counting(6), dataset, split, quick(), 64) for split in ("train", "val")
    }
    assert "full_labels" not in found["train"] and "full labels" in found["train"]["convention"]
    assert (
        "eroded" in found["val"]["convention"]
        and found["val"]["full_labels"]["pixels"] == 2 * 64 * 64
    )
    assert open_dataset("hunan", isprs).with_other_labels() is None


def write_small_tiles(root, labels):
    """Own tiles of numbers that the scaling 0:4 makes multiples of 1/4."""
    rng = np.random.default_rng(1)
    (root / "classes.json").write_text(
        json.dumps({"classes": [{"name": f"{k}", "color": [k, 0, 0]} for k in range(5)]})
    )
    for name, truth in labels.items():
        pixels = {
            "images": rng.integers(0, 5, (*truth.shape, 3)),
            "dsm": rng.integers(0, 5, truth.shape),
            "labels": truth,
        }
        for kind, array in pixels.items():
            (root / "test" / kind).mkdir(parents=True, exist_ok=True)
            options = dict(photometric="rgb") if kind == "images" else {}
            tifffile.imwrite(
                root / "test" / kind / f"{name}.tif", array.astype(np.uint8), **options
            )
    return open_dataset("tiles", root, scaling=Scaling("0:4", "0:4"))


@pytest.mark.parametrize(
    "H, W, window, stride",
    [(70, 93, 64, 16), (64, 100, 64, 32), (81, 66, 64, 24), (20, 75, 64, 32)],
)
def test_as_published_is_the_sum_over_the_published_loop_s_windows_with_fewer_forwards(
    tmp_path, H, W, window, stride
):
    truth = np.random.default_rng(0).integers(0, 5, (H, W))
    dataset, model, maps = write_small_tiles(tmp_path, {"a": truth}), Counting(5), []
    settings = published_protocol(quick("tiles", eval_stride=stride))
    assert settings.repeat_border and settings.eval_stride == stride  # own tiles were not published
    found = score_split(
        model, dataset, "test", settings, stride, lambda tile, pred, *_: maps.append(pred)
    )
    forwards = model.windows

    (tile,) = dataset.tiles("test")
    padding = [(0, max(window - n, 0)) for n in (H, W)]
    image = np.pad(tile.read_image() / np.float32(4), [*padding, (0, 0)], mode="reflect")
    dsm = np.pad(tile.read_dsm() / np.float32(4), padding, mode="reflect")
    sums, visits = np.zeros((5, *dsm.shape), np.float64), 0
    for x in range(
        0, H, stride
    ):  # the published loop: what passes the edge is moved inwards, and so visited again
        x = max(min(x, H - window), 0)
        for y in range(0, W, stride):
            y = max(min(y, W - window), 0)
            here, visits = np.s_[x : x + window, y : y + window], visits + 1
            rasters = (
                torch.from_numpy(image[here]).permute(2, 0, 1)[None],
                torch.from_numpy(dsm[here])[None],
            )
            sums[(slice(None), *here)] += model(*rasters)[0].detach().numpy()
    expected = sums.argmax(0)[:H, :W]
    assert (
        np.array_equal(maps[0], expected)
        and found["confusion"] == score(expected, truth, 5)["confusion"]
    )
    assert forwards == found["windows"] == len(sliding_windows(H, W, window, stride)) < visits
    assert "border windows counted as published" in found["convention"]


@pytest.mark.parametrize(
    "data, stride", [("vaihingen", 32), ("potsdam", 32), ("hunan", 128), ("tiles", 50)]
)
def test_as_published_takes_the_final_strides_of_the_published_data(data, stride):
    settings = quick(data, eval_stride=50)
    expected = replace(settings, eval_stride=stride, repeat_border=True)
    assert published_protocol(settings) == expected


def test_tiles_without_a_scored_pixel_or_of_one_class_add_to_the_whole_and_warn_of_nothing(
    tmp_path,
):
    mixed = np.random.default_rng(0).integers(0, 3, (64, 64))
    tiles = {"empty": np.full((64, 64), 255), "mixed": mixed, "one": np.full((64, 64), 2)}
    dataset = write_small_tiles(tmp_path, tiles)
    found = score_split(Counting(5), dataset, "test", quick("tiles"), 64)
    empty = found["per_tile"]["empty"]
    assert (
        [empty[name] for name in MEANS] == [None] * 4
        and empty["pixels"] == 0
        and found["pixels"] == 2 * 64 * 64
    )
    assert 0 <= found["per_tile"]["one"]["oa"] <= 1 and found["per_class"][4]["pixels"] == 0
    json.dumps(found, allow_nan=False)
    format_scores(found)


def test_who_wants_to_see_the_tiles_gets_map_and_confidence_and_the_scores_stay_the_same():
    rng, kept = np.random.default_rng(0), []
    image, labels = (
        rng.integers(0, 256, (100, 70, 3), dtype=np.uint8),
        rng.integers(0, 3, (100, 70), dtype=np.uint8),
    )
    tile = SimpleNamespace(
        name="a", size=labels.shape, load=lambda modalities: LoadedTile("a", image, None, labels)
    )
    names = ["red", "green", "blue"]
    dataset = SimpleNamespace(
        tiles=lambda *_: [tile], classes=names, class_names=names, scored=(0, 1, 2), labels_note=""
    )
    dataset.with_other_labels, dataset.withheld = lambda: None, ()
    settings = quick("tiles", modalities="image", batch_size=2)
    arguments = (torch.nn.Identity(), dataset, "test", settings, 32)  # the logits are the image
    assert score_split(*arguments) == score_split(*arguments, lambda *shown: kept.append(shown))
    ((shown, pred, confidence),) = kept
    wanted = torch.from_numpy(image / 255).softmax(-1).amax(-1).numpy()
    assert shown.name == "a" and np.array_equal(pred, image.argmax(-1))
    assert confidence.dtype == np.uint8 and np.abs(confidence - 100 * wanted).max() <= 0.5001


@pytest.mark.parametrize(
    "changes, split, stride, final, name",
    [
        ({}, "test", 64, True, "scores.json"),
        ({}, "train", 64, True, "scores_train.json"),
        ({}, "test", 32, True, "scores_stride32.json"),
        ({}, "test", 64, False, "scores_unfinished.json"),
        (dict(repeat_border=True), "test", 64, True, "scores_border.json"),
        (dict(full_labels=True), "val", 64, True, "scores_val_full-labels.json"),
    ],
)
def test_a_score_by_another_protocol_has_a_file_of_its_own(changes, split, stride, final, name):
    ran = quick()
    assert scores_name(ran, replace(ran, **changes), split, stride, final) == name
    assert scores_name(replace(ran, **changes), replace(ran, **changes), "test", 64, True) == (
        "scores.json"
    )


def test_scoring_pauses_after_each_row_of_windows_where_it_can_be_stopped(isprs):
    class Enough(Exception):
        pass

    calls = []

    def pause():
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    dataset = open_dataset("vaihingen", isprs)
    with pytest.raises(Enough):
        score_split(Counting(6), dataset, "test", quick(), 64, pause=pause)


def test_windows_are_computed_in_batches_of_the_run_s_size(tmp_path):
    class Noting(Counting):
        def forward(self, image, dsm):
            self.batches.append(len(image))
            return super().forward(image, dsm)

    model, dataset = Noting(5), write_small_tiles(tmp_path, {"a": np.zeros((64, 200), int)})
    model.batches = []
    found = score_split(model, dataset, "test", quick("tiles", batch_size=3), 64)
    assert model.batches == [3, 1] and found["windows"] == 4


# ----------------------------------------------------------------------------------------- pictures


def test_the_error_map_is_red_where_wrong_and_black_where_nothing_is_scored():
    found = error_map(np.array([[0, 1, 1]]), np.array([[0, 0, 255]]))
    assert found.dtype == np.uint8 and found.tolist() == [
        [list(RIGHT), list(WRONG), list(UNSCORED)]
    ]


@pytest.mark.parametrize("K", [2, 6])
def test_confidence_is_light_where_sure_and_dark_where_all_classes_are_as_likely(K):
    even = -(-100 // K)
    colours = shade_confidence(np.arange(even, 101, dtype=np.uint8)[None], K)[0].astype(int)
    assert np.abs(colours[0] - UNSURE).max() <= 2 and tuple(colours[-1]) == SURE
    assert (np.diff(colours, axis=0) >= 0).all() and np.diff(
        colours.sum(1)
    ).min() > 0  # one hue, and steps of light
    assert tuple(shade_confidence(np.zeros((1, 1), np.uint8), K)[0, 0]) == UNSURE


@pytest.mark.parametrize("shape", [(1, 1), (3, 90), (700, 5)])
@pytest.mark.parametrize("missing", [None, "image", "dsm", "labels"])
def test_a_panel_is_drawn_for_any_size_and_shows_the_prediction_in_its_colours(
    tmp_path, shape, missing
):
    rasters = {
        "image": np.full((*shape, 3), 40_000, np.uint16),
        "dsm": np.linspace(250, 260, shape[0] * shape[1], dtype=np.float32).reshape(shape),
        "labels": np.full(shape, 255, np.uint8),
    }
    tile = LoadedTile(
        "a",
        **{kind: None if kind == missing else a for kind, a in rasters.items()},
        scale=TileScale((250, 260)),
    )
    palette = tuple((name, (10 + k, 20, 30)) for k, (name, _) in enumerate(ISPRS_CLASSES))
    save_panel(
        tmp_path / "a.png", tile, np.full(shape, 3, np.uint8), np.full(shape, 16, np.uint8), palette
    )
    with Image.open(tmp_path / "a.png") as panel:
        pixels = np.asarray(panel)
    shown = (pixels == (13, 20, 30)).all(axis=-1).sum()
    legend = (pixels == (10, 20, 30)).all(axis=-1).sum()  # class 0 stands in the legend alone
    h, w = (max(1, round(n * min(1, 640 / max(shape)))) for n in shape)
    assert legend > 0 and shown == legend + h * w
    assert (pixels == UNSURE).all(axis=-1).sum() == h * w  # nothing else has the scale's dark end
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
