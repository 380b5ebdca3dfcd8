"""Scores from one confusion matrix, and the pictures beside them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from data import ISPRS_CLASSES, LoadedTile
from evaluate import ConfusionMatrix, format_scores, score_split
from report import RIGHT, SURE, UNSCORED, UNSURE, WRONG, error_map, save_panel, shade_confidence

GOLDENS = Path(__file__).parent / "goldens"
MEANS = ("oa", "mf1", "miou", "kappa")
pytestmark = pytest.mark.filterwarnings("error")


def score(pred, truth, K, scored=None, ignore=255):
    matrix = ConfusionMatrix(K, scored, ignore)
    matrix.update(pred, truth)
    return matrix.scores()


# ------------------------------------------------------------------------------------------------------------- metrics


def test_the_scores_are_those_of_the_published_program():
    golden = json.loads((GOLDENS / "eval.json").read_text())
    text = golden["text"]
    with np.load(GOLDENS / "eval.npz") as maps:
        found = score(maps["pred"], maps["gt"], 6, scored=(0, 1, 2, 3, 4), ignore=6)

    def printed(pattern):
        return [float(number) for number in re.findall(pattern, text)]

    rows = re.search(r"\[\[.*?\]\]", text, re.DOTALL).group()
    assert found["confusion"] == json.loads(re.sub(r"(\d)\s+(?=\d)", r"\1, ", rows.replace("]\n", "],")))
    assert [found["pixels"]] == printed(r"(\d+) pixels")
    assert [round(100 * found["oa"], 2)] == printed(r"accuracy : (.*)")
    recalls, f1s = text.split("F1Score :")
    of_class = r"(?m)^[a-z. ]+: (0\.\d+)$"
    assert [round(c["recall"], 4) for c in found["per_class"]] == [float(n) for n in re.findall(of_class, recalls)]
    assert [round(c["f1"], 4) for c in found["per_class"]] == [float(n) for n in re.findall(of_class, f1s)][:6]
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
    truth = draw(hnp.arrays(np.uint8, shape, elements=st.one_of(st.integers(0, K - 1), st.just(255))))
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
            sum(map(test, pairs)) for test in (lambda x: x == (k, k), lambda x: x[0] == k, lambda x: x[1] == k)
        )
        assert row["pixels"] == true and [row["recall"], row["precision"]] == [share(hit, true), share(hit, positive)]
        assert [row["iou"], row["f1"]] == [share(hit, true + positive - hit), share(2 * hit, true + positive)]
    assert found["confusion"] == [[pairs.count((t, p)) for p in range(K)] for t in range(K)]
    assert found["pixels"] == n and found["oa"] == share(sum(t == p for t, p in pairs), n)
    for mean, of in (("miou", "iou"), ("mf1", "f1")):
        values = [found["per_class"][k][of] for k in scored if found["per_class"][k][of] is not None]
        assert found[mean] == pytest.approx(sum(values) / len(values)) if values else found[mean] is None
    chance = sum(sum(t == k for t, _ in pairs) * sum(p == k for _, p in pairs) for k in range(K))
    if not pairs or chance == n * n:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx((found["oa"] - chance / n**2) / (1 - chance / n**2), abs=1e-12)


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
    assert found["per_class"][2] == {"iou": None, "f1": None, "precision": None, "recall": None, "pixels": 0}
    assert found["miou"] == 0.5 and found["mf1"] == pytest.approx(2 / 3)


def test_a_class_that_is_only_predicted_counts_as_missed():
    found = score(np.array([0, 1]), np.array([0, 0]), 2)
    assert found["per_class"][1]["iou"] == 0 and found["per_class"][1]["recall"] is None and found["miou"] == 0.25


def test_where_nothing_is_scored_every_score_is_none():
    found = score(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8), 3)
    assert [found[name] for name in MEANS] == [None] * 4 and found["pixels"] == 0
    assert json.loads(json.dumps(found)) == found


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(3).update(np.zeros((2, 3), int), np.zeros((3, 2), int))


@pytest.mark.parametrize("pred, truth", [([3], [0]), ([0], [3]), ([-1], [0]), ([0], [-1]), ([0, 200], [1, 2])])
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
    assert all(part in lines[4] for part in ("OA 75.00", "mF1 73.33", "mIoU 58.33", "kappa 50.00", "(4 pixels)"))
    assert lines[5] == "(all labels)"


def test_who_wants_to_see_the_tiles_gets_map_and_confidence_and_the_scores_stay_the_same():
    rng, kept = np.random.default_rng(0), []
    image, labels = rng.integers(0, 256, (100, 70, 3), dtype=np.uint8), rng.integers(0, 3, (100, 70), dtype=np.uint8)
    tile = SimpleNamespace(name="a", load=lambda modalities: LoadedTile("a", image, None, labels, None))
    names = ["red", "green", "blue"]
    dataset = SimpleNamespace(tiles=lambda *_: [tile], classes=names, class_names=names, scored=(0, 1, 2), labels_note="")
    settings = dict(modalities="image", crop=64, batch_size=2, repeat_border=False, precision="fp32")
    arguments = (torch.nn.Identity(), dataset, "test", settings, 32)  # the logits are the image
    assert score_split(*arguments) == score_split(*arguments, lambda *shown: kept.append(shown))
    ((shown, pred, confidence),) = kept
    wanted = torch.from_numpy(image / 255).softmax(-1).amax(-1).numpy()
    assert shown.name == "a" and np.array_equal(pred, image.argmax(-1))
    assert confidence.dtype == np.uint8 and np.abs(confidence - 100 * wanted).max() <= 0.5001


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_error_map_is_red_where_wrong_and_black_where_nothing_is_scored():
    found = error_map(np.array([[0, 1, 1]]), np.array([[0, 0, 255]]))
    assert found.dtype == np.uint8 and found.tolist() == [[list(RIGHT), list(WRONG), list(UNSCORED)]]


@pytest.mark.parametrize("K", [2, 6])
def test_confidence_is_light_where_sure_and_dark_where_all_classes_are_as_likely(K):
    even = -(-100 // K)
    colours = shade_confidence(np.arange(even, 101, dtype=np.uint8)[None], K)[0].astype(int)
    assert np.abs(colours[0] - UNSURE).max() <= 2 and tuple(colours[-1]) == SURE
    assert (np.diff(colours, axis=0) >= 0).all() and np.diff(colours.sum(1)).min() > 0  # one hue, and steps of light
    assert tuple(shade_confidence(np.zeros((1, 1), np.uint8), K)[0, 0]) == UNSURE


@pytest.mark.parametrize("shape", [(1, 1), (3, 90), (700, 5)])
@pytest.mark.parametrize("missing", [None, "image", "dsm", "labels"])
def test_a_panel_is_drawn_for_any_size_and_shows_the_prediction_in_its_colours(tmp_path, shape, missing):
    rasters = {
        "image": np.full((*shape, 3), 40_000, np.uint16),
        "dsm": np.linspace(250, 260, shape[0] * shape[1], dtype=np.float32).reshape(shape),
        "labels": np.full(shape, 255, np.uint8),
    }
    tile = LoadedTile("a", **{kind: None if kind == missing else a for kind, a in rasters.items()}, heights=(250, 260))
    palette = tuple((name, (10 + k, 20, 30)) for k, (name, _) in enumerate(ISPRS_CLASSES))
    save_panel(tmp_path / "a.png", tile, np.full(shape, 3, np.uint8), np.full(shape, 16, np.uint8), palette)
    with Image.open(tmp_path / "a.png") as panel:
        pixels = np.asarray(panel)
    shown = (pixels == (13, 20, 30)).all(axis=-1).sum()
    legend = (pixels == (10, 20, 30)).all(axis=-1).sum()  # class 0 stands in the legend alone
    h, w = (max(1, round(n * min(1, 640 / max(shape)))) for n in shape)
    assert legend > 0 and shown == legend + h * w
    assert (pixels == UNSURE).all(axis=-1).sum() == h * w  # nothing else has the scale's dark end
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
