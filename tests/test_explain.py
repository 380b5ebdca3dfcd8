"""What the lesson shows is what the network computed, and what it says of it is true."""

import ast
import base64
import html
import io
import re
import runpy
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomise, same_state, snapshot, write_city
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from test_report import Reader

import explain
from engine.checkpoints import save_model
from engine.inside import class_heat, look_inside, query_attention, without_tuner
from engine.networks import build_model
from engine.plugins import load_plugins
from engine.settings import Settings
from explain import corner, find_function, functions_of_tuner, place_window
from geodata import synthetic
from geodata.labels import labels_to_colors
from geodata.rasters import DataError
from geodata.scaling import TileScale
from geodata.tiles import LoadedTile
from mfnet import build_mfnet
from reports.features import cells, contributions, enlarge, principal_colors, shared_colors, tint
from reports.lesson import write_lesson
from reports.method import equations, excerpt, to_html
from reports.page import line_chart
from sam_vit import Block
from tuners import TUNERS

HOME = Path(explain.__file__).resolve().parent
METHOD = (HOME / "docs" / "method.md").read_text(encoding="utf-8")
CLASSES = (("ground", (255, 255, 255)), ("<b>roof</b>", (0, 0, 255)), ("tree", (0, 255, 0)))
GREEN, WHITE, PURPLE = [27, 120, 55], [255, 255, 255], [118, 42, 131]

# --------------------------------------------------------------------------------- what is computed


@given(*[st.integers(1, n) for n in (4, 6, 5, 5)], st.integers(0, 99))
def test_contributions_are_of_the_lengths_and_sum_to_1(M, C, h, w, seed):
    rng = np.random.default_rng(seed)
    parts = [(m + 1) * rng.normal(size=(C, h, w)).astype(np.float32) for m in range(M)]
    for part in parts:
        part[:, 0, 0] = 0
    found = contributions(parts)
    assert found.shape == (M, h, w) and np.allclose(found.sum(axis=0), 1, atol=1e-12)
    assert np.allclose(found[:, 0, 0], 1 / M)
    for i, j in np.argwhere(np.arange(h * w).reshape(h, w) > 0):
        lengths = [sum(float(v) ** 2 for v in part[:, i, j]) ** 0.5 for part in parts]
        assert np.allclose(found[:, i, j], np.array(lengths) / sum(lengths), atol=1e-5)
    assert np.allclose(contributions([part * 7 for part in parts]), found, atol=1e-6)


# -------------------------------------------------------------------------------- principal colours

features = st.tuples(
    st.integers(3, 7), st.integers(2, 6), st.integers(3, 6), st.integers(0, 9999)
).map(
    lambda v: np.random.default_rng(v[3]).normal(size=v[:3]) * np.arange(v[0], 0, -1)[:, None, None]
)


def scores_by_svd(x):
    """The scores (places, 3) of the first three components, from numpy's SVD; None where they are
    not well told apart.
    """
    flat = x.reshape(len(x), -1).T
    U, S, _ = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)
    S = np.append(S, 0)
    told_apart = (S[:3] > 1.05 * S[1:4]).all() and S[2] > 1e-3 * S[0]
    return U[:, :3] * S[:3] if told_apart else None


@given(features)
def test_the_colours_are_the_principal_components_stretched_and_turned_to_their_farthest_place(x):
    scores = scores_by_svd(x)
    assume(scores is not None)
    colors = principal_colors(x).reshape(-1, 3).astype(float)
    for component, color in zip(scores.T, colors.T):
        order = np.sort(np.abs(component))
        assume(order[-1] > 1.001 * order[-2])
        component = component * np.sign(component[np.abs(component).argmax()])
        low, high = np.percentile(component, (1, 99))
        assert np.abs(color - np.clip((component - low) / (high - low), 0, 1) * 255).max() < 1


@given(features, st.floats(0.01, 100), st.integers(0, 99))
def test_colours_do_not_depend_on_the_unit_the_origin_or_the_axes_of_the_features(x, unit, seed):
    scores = scores_by_svd(x)
    assume(scores is not None)
    order = np.sort(np.abs(scores), axis=0)
    assume((order[-1] > 1.001 * order[-2]).all())
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(len(x), len(x))))
    moved = unit * np.einsum("ij,jhw->ihw", rotation, x) + rng.normal(size=(len(x), 1, 1))
    difference = principal_colors(moved).astype(int) - principal_colors(x)
    assert np.abs(difference).max() <= 1
    assert np.array_equal(principal_colors(x[:, ::-1]), principal_colors(x)[::-1])


@given(
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), st.floats(-1e4, 1e4), st.integers(0, 99)
)
def test_any_size_has_colours_and_what_does_not_vary_is_grey(shape, value, seed):
    assert (principal_colors(np.full(shape, value, np.float32)) == 128).all()
    colors = principal_colors(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    C, h, w = shape
    assert colors.shape == (h, w, 3) and colors.dtype == np.uint8
    varying = min(3, C, h * w - 1)
    assert (colors[..., varying:] == 128).all() and (colors[..., :varying] != 128).any(
        axis=(0, 1)
    ).all()


# --------------------------------------------------------------------------- windows and pictures


@given(st.integers(64, 300), st.integers(64, 300), st.integers(64, 200), st.data())
def test_a_window_begins_where_it_is_asked_to_or_ends_with_the_raster(H, W, window, data):
    x, y = data.draw(st.integers(0, W - 1)), data.draw(st.integers(0, H - 1))
    inside = np.zeros((H, W))
    inside[place_window((H, W), window, (x, y))] = 1
    h, w = min(window, H), min(window, W)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert inside.sum() == h * w and len(rows) == h and inside[y, x] == 1
    assert rows[0] == y or rows[-1] == H - 1
    assert columns[0] == x or columns[-1] == W - 1
    for part, n in zip(place_window((H, W), window, None), (H, W)):
        assert 0 <= (n - part.stop) - part.start <= 1


@pytest.mark.parametrize("at", [(90, 0), (0, 80), (-1, 0)])
def test_a_corner_outside_of_the_raster_is_one_line(at):
    with pytest.raises(DataError, match="--at .* 0,0 to 89,79"):
        place_window((80, 90), 64, at)


def test_an_equal_contribution_is_white_and_the_farthest_from_it_is_in_full_colour():
    assert tint(np.array([[0.3, 0.5, 0.6, 0.7]]), 0.5)[0, [0, 1, 3]].tolist() == [
        PURPLE,
        WHITE,
        GREEN,
    ]
    half = tint(np.array([[0.5, 0.6, 0.7]]), 0.5)[0, 1]
    assert np.abs(half - (np.array(GREEN) + WHITE) / 2).max() <= 0.5
    assert (tint(np.full((2, 3), 1 / 3), 1 / 3) == 255).all()


@given(st.integers(64, 400), st.integers(64, 400), st.sampled_from([4, 8, 16, 32]))
def test_a_place_is_a_square_of_the_level_s_stride_cut_at_the_window(H, W, stride):
    h, w = (-(-n // 32) * 32 // stride for n in (H, W))  # the network pads to multiples of 32
    places = np.arange(3 * h * w).reshape(h, w, 3)
    found, pixels = enlarge(places, (H, W))
    assert found == stride and pixels.shape == (H, W, 3)
    y, x = H - 1, W // 2
    assert np.array_equal(pixels[y, x], places[y // stride, x // stride])


numbers = st.floats(-1e3, 1e3)


@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.lists(numbers, min_size=1, max_size=9)),
    st.sampled_from(["loss", "<&>"]),
)
def test_a_chart_draws_each_point_where_its_numbers_say(lines, title):
    values = [y for points in lines.values() for y in points]
    low, high = min(values, default=0), max(values, default=1)
    drawn = line_chart(title, {k: list(enumerate(v, 1)) for k, v in lines.items()}, low, high, "x")
    reader = Reader()
    reader.feed(drawn)
    assert not reader.open and "b" not in reader.tags and title in reader.text
    found = [part.split('"')[0].split() for part in drawn.split('points="')[1:]]
    assert [len(points) for points in found] == [len(points) for points in lines.values()]
    last = max(map(len, lines.values()), default=1)
    for points, ys in zip(found, lines.values()):
        for i, (point, y) in enumerate(zip(points, ys)):
            u, v = (float(number) for number in point.split(","))
            assert u == pytest.approx(64 + 288 * i / max(last - 1, 1), abs=0.06)
            assert v == pytest.approx(190 - 160 * (y - low) / ((high - low) or 1), abs=0.06)
    assert len(lines) < 2 or all(
        " ".join(n.split()) in " ".join(reader.text.split()) for n in lines
    )


def test_points_that_are_not_finite_are_left_out_of_a_chart():
    points = [(1, 0.5), (2, float("nan")), (3, float("inf")), (4, 0.25)]
    drawn = line_chart("loss", {"": points}, 0, 1, "epoch")
    assert drawn.count("<circle") == 2 and not re.search("nan|inf", drawn)
    assert line_chart("loss", {"": []}, 0, 1, "epoch").count("<circle") == 0


# ------------------------------------------------------------------------ equations and their code


@pytest.mark.parametrize(
    "latex, shown",
    [
        (r"\frac{a}{c}", '<span class="frac"><span><i>a</i></span><span><i>c</i></span></span>'),
        (r"R^2_{q_y - k}", "<i>R</i><sup>2</sup><sub><i>q</i><sub><i>y</i></sub> − <i>k</i></sub>"),
        (r"\text{conv-BN}(x) \ne 10^{-8}", "conv-BN(<i>x</i>) ≠ 10<sup>−8</sup>"),
        (r"\sqrt d < \max k", "√<i>d</i> &lt; max <i>k</i>"),
    ],
)  # fmt: skip
def test_latex_becomes_html(latex, shown):
    assert to_html(latex) == shown


def test_every_equation_of_the_method_is_read_whole():
    found = {n: text for by_number in equations(METHOD).values() for n, text in by_number.items()}
    assert sorted(found) == list(range(1, METHOD.count(r"\tag{") + 1))
    for text in found.values():
        reader = Reader()
        reader.feed(text)
        assert not reader.open and not set("\\{}_^$") & set(text)


def body_of(name):
    """The lines of a function below its docstring, by the syntax tree of its file alone."""
    file, path = name.split(":")
    text = (HOME / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in path.split("."):
        (node,) = [n for n in node.body if getattr(n, "name", "") == part]
    body = [s for s in node.body if not isinstance(getattr(s, "value", None), ast.Constant)]
    lines = text.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
    return [line[body[0].col_offset :] for line in lines]


def test_an_excerpt_is_the_body_as_it_stands_without_its_docstring():
    def example(x):
        """One.

        Two."""
        # Three.

        return x

    assert excerpt(example) == ["# Three.", "", "return x"]
    assert excerpt(Block.forward) == body_of("sam_vit.py:Block.forward")


# ------------------------------------------------------------------------------- what is collected


def a_tile(kinds, H=90, W=100, labels=True):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8) if "image" in kinds else None
    dsm = rng.normal(size=(H, W)).astype(np.float32) if "dsm" in kinds else None
    truth = rng.choice([0, 1, 2, 255], (H, W)).astype(np.uint8) if labels else None
    return LoadedTile("a", image, dsm, truth, TileScale((-3.0, 3.0)))


def inputs_of(tile):
    rasters = {}
    if tile.image is not None:
        rasters["image"] = torch.from_numpy(tile.scale.image_input(tile.image))[None]
    if tile.dsm is not None:
        box = np.s_[0 : tile.size[0], 0 : tile.size[1]]
        rasters["height"] = torch.from_numpy(tile.scale.height_input(tile.dsm, box))[None]
    return rasters


def network(tuner="adapter", modalities=2, fusion="dfm", fresh=False, **options):
    torch.manual_seed(0)
    model = build_mfnet(TINY, tuner, 3, modalities, fusion, **options).eval()
    return model if fresh else randomise(model)


@pytest.mark.parametrize("tuner", ["frozen", "adapter", "lora", "standard-adapter"])
@torch.no_grad()
def test_before_tuning_is_the_frozen_network_on_the_same_base(tuner):
    model = network(tuner)
    state = model.state_dict()
    plain = network("frozen")
    plain.load_state_dict({n: state[n] for n in plain.state_dict()})
    x = [torch.rand(1, 3, 70, 100) for _ in range(2)]
    assert torch.equal(without_tuner(model, TINY)(*x), plain(*x))


@pytest.mark.parametrize("tuner", ["adapter", "lora", "full"])
def test_looking_inside_leaves_the_network_as_it_was(tuner):
    model = network(tuner)
    before = snapshot(model)
    look_inside(model, TINY, inputs_of(a_tile("image+dsm")))
    assert same_state(model, before) and not model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_the_weights_of_a_query_are_those_that_give_its_attention(index):
    encoder = {**TINY, "num_heads": 1}
    block = randomise(build_mfnet(encoder, "lora", 3)).image_encoder.blocks[index]
    x, (y, left) = torch.randn(2, 6, 6, 32), (4, 2)
    found = query_attention(index, block, x, (y, left))
    n = block.norm1(x)
    values = block.attn.qkv(n)[0, :, :, 64:]
    out = block.attn.proj(torch.einsum("yx,yxc->c", torch.from_numpy(found["with"]), values))
    assert torch.allclose(out, block.attn(n)[0, y, left], atol=1e-5)
    rows = 3 if index == 0 else 6
    assert found["window"] == (rows, rows) and found["inside"].sum() == rows * rows
    assert not found["with"][~found["inside"]].any() and found["padding"] < 1e-6
    assert np.abs(found["with"] - found["without"]).max() > 1e-3
    for table in (block.attn.rel_pos_h, block.attn.rel_pos_w):
        table.zero_()
    zeroed = query_attention(index, block, x, (y, left))
    assert np.allclose(zeroed["with"], found["without"], atol=1e-6)


@given(st.integers(4, 9), st.integers(4, 9), st.data())
def test_attention_to_tokens_and_to_padding_sums_to_1(h, w, data):
    place = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    with torch.no_grad():
        found = query_attention(
            0, network().image_encoder.blocks[0], torch.randn(2, h, w, 32), place
        )
    assert found["with"].sum() + found["padding"] == pytest.approx(1, abs=1e-5)
    assert found["inside"][place] and (found["padding"] > 1e-4) == (found["inside"].sum() < 9)


def test_heat_is_what_the_maps_add_to_a_class_s_logits():
    """By Euler: its sum is the derivative of the logits with respect to a factor on the maps."""
    model = network().double()
    maps = [torch.rand(1, 256, 4, 4, dtype=torch.float64) for _ in range(2)]
    heat = class_heat(model, maps, [2, 0], (60, 64))
    assert [h.shape for h in heat] == [(2, 4, 4)] * 2

    def total(factors, k):
        scaled = [f * x for f, x in zip(factors, maps)]
        with torch.no_grad():
            return model.decoder(model.fusion(scaled), (64, 64))[0, k, :60].sum().item()

    e = 1e-6
    for found, k in zip(heat, (2, 0)):
        for m in range(2):
            up, down = ([1 + s * e * (m == i) for i in range(2)] for s in (1, -1))
            slope = (total(up, k) - total(down, k)) / (2 * e)
            assert found[m].sum() == pytest.approx(slope, rel=1e-3, abs=1e-3)


@torch.no_grad()
def test_what_is_added_and_changed_is_measured_against_the_network_itself():
    model, rasters = network("adapter"), inputs_of(a_tile("image+dsm"))
    inside = look_inside(model, TINY, rasters)
    x = torch.from_numpy(inside.tokens + inside.positions)
    block = model.image_encoder.blocks[0]
    frozen = Block.forward(block, x)
    for m in range(2):
        share = (block(x)[m] - frozen[m]).norm() / frozen[m].norm()
        assert inside.added[0, m] == pytest.approx(share.item(), rel=1e-4)
    flat = model(rasters["image"], torch.zeros_like(rasters["height"]))[0]
    assert np.array_equal(inside.variants["height 0 everywhere"], flat.numpy())
    for value in (0.5, 1.0):
        for block in model.image_encoder.blocks:
            block.mixing.fill_(value)
        expected = model(*rasters.values())[0].numpy()
        assert np.array_equal(inside.variants[f"mixing weights {value:g}"], expected)
    assert sum(n for n, _ in inside.parameters.values()) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_drawing_has_the_parts_of_a_module_in_the_order_of_their_calls():
    inside = look_inside(network("adapter"), TINY, inputs_of(a_tile("image+dsm")))
    rows = [[name for name, *_ in row] for row in inside.drawings["block"]]
    pair = [f"{{}}.{m}" for m in range(2)]
    expected = [["norm1"], ["attn"], [p.format("attn_adapters") for p in pair], ["norm2"], ["mlp"],
                [p.format("mlp_adapters") for p in pair], ["mixing"]]  # fmt: skip
    assert rows == expected
    trained = {
        name: is_trained for row in inside.drawings["block"] for name, _, _, is_trained in row
    }
    assert {name for name, t in trained.items() if t} == {*rows[2], *rows[5], "mixing"}
    assert [name for name, *_ in inside.drawings["fusion"][0]] == ["pyramids.0", "pyramids.1"]


@given(
    st.integers(64, 120), st.integers(64, 120), st.sampled_from([4, 8, 16, 32]), st.integers(0, 9)
)
def test_the_share_of_a_class_on_the_places_of_a_level_is_its_share_of_pixels(H, W, stride, seed):
    mask = np.random.default_rng(seed).random((H, W)) < 0.3
    h, w = (-(-n // 32) * 32 // stride for n in (H, W))
    found = cells(mask, (h, w))
    assert found.shape == (h, w) and found.sum() * stride**2 == pytest.approx(mask.sum())
    assert found[0, 0] == pytest.approx(mask[:stride, :stride].mean())


def test_maps_that_share_colours_have_one_colour_for_one_feature():
    x = np.random.default_rng(0).normal(size=(8, 4, 5))
    one, two = shared_colors([x, x[:, ::-1]])
    assert np.array_equal(one, two[::-1]) and len(np.unique(one.reshape(-1, 3), axis=0)) > 5


# ----------------------------------------------------------------------------------------- the page


def page_of(folder, model, tile):
    """(what was collected, the HTML, what Reader made of it)."""
    inside = look_inside(model, TINY, inputs_of(tile))
    functions = functions_of_tuner(model)
    stages = explain.walk(inside, tile, CLASSES, model.image_encoder.tuner, list(functions))
    names = {name for stage in stages for name in stage.code}
    functions = {name: functions.get(name) or find_function(name) for name in names}
    path = folder / "new" / "explain.html"
    write_lesson(
        path, "One <b>run", "words", stages, equations(METHOD), functions, inside.parameters
    )
    assert [p.name for p in path.parent.iterdir()] == ["explain.html"]
    text, reader = path.read_text(encoding="utf-8"), Reader()
    reader.feed(text)
    return inside, text, reader


def pictures_of(text):
    """(caption, pixels) of every picture on a page."""
    found = re.findall(
        '<img(?: class="usual")? alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text
    )
    return [
        (html.unescape(caption), np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))))
        for caption, code in found
    ]


def code_of(text):
    """Name -> lines of every excerpt on a page, numbers of the equations that stand before it."""
    parts = re.findall(
        r'<b>\((\d+)\)</b>|<figcaption>([\w/]+\.py:[\w.]+), line \d+[^<]*</figcaption>'
        r'<pre class="code">([^<]*)</pre>', text)  # fmt: skip
    found, numbers = {}, []
    for number, name, code in parts:
        if number:
            numbers.append(int(number))
        else:
            found[name], numbers = (html.unescape(code).splitlines(), numbers), []
    return found


KINDS = [
    ("adapter", "image+dsm", "dfm", False),
    ("lora", "image+dsm", "dfm", False),
    ("lora", "image+dsm", "dfm", True),
    ("adapter", "image+dsm", "sum", True),
    ("frozen", "image+dsm", "dfm", True),
    ("full", "image+dsm", "sum", False),
    ("standard-lora", "image+dsm", "dfm", False),
    ("standard-adapter", "image", "dfm", True),
    ("adapter", "dsm", "sum", False),
    ("ssf", "image+dsm", "dfm", False),
    ("dora", "image+dsm", "dfm", True),
]


@pytest.mark.parametrize("tuner, kinds, fusion, fresh", KINDS, ids=str)
def test_equation_name_and_code_stand_together_on_every_page(tmp_path, tuner, kinds, fusion, fresh):
    M = len(kinds.split("+"))
    tile = a_tile(kinds, labels=not fresh)
    inside, text, page = page_of(tmp_path, network(tuner, M, fusion, fresh), tile)
    assert not page.open and not {"script", "link"} & set(page.tags)
    assert "<b>roof" not in text and "<b>run" not in text
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    shown = code_of(text)
    assert {"sam_vit.py:Attention.forward", "mfnet.py:Decoder.forward"} <= shown.keys()
    for name, (lines, numbers) in shown.items():
        assert lines == body_of(name) and 0 < len(lines) <= 12, name
        for n in numbers:  # after its equation, before another one's names
            following = METHOD.split(rf"\tag{{{n}}}")[1]
            cited = re.search(r"`[\w/]+\.py:[^$]*", following).group()
            assert f"`{name}`" in cited, (n, name)
    found = sorted(n for _, numbers in shown.values() for n in numbers)
    assert found == sorted(set(found)) and {2, 3, 4, 14, 15, 17} <= set(found)
    plates = re.findall(r'<figure class="plate">', text)
    assert len(plates) == text.count("<b>See:</b>") == text.count("<b>Wrong if:</b>") >= 8

    pictures = pictures_of(text)
    assert all(pixels.shape == (90, 100, 3) for _, pixels in pictures)
    pred = inside.seen["logits"].argmax(axis=0)
    colors = labels_to_colors(pred.astype(np.uint8), [color for _, color in CLASSES])
    assert np.array_equal(dict(pictures)["predicted classes"], colors)
    assert any("errors" in caption for caption, _ in pictures) == (tile.labels is not None)
    if tile.labels is not None:
        right = (pred == tile.labels)[tile.labels != 255].mean()
        assert f"{100 * right:.1f} % of the scored pixels are right" in page.text
    if fresh and tuner in ("lora", "dora", "frozen"):
        assert (
            "the tuner adds nothing" in page.text and "before and after are the same" in page.text
        )
    else:
        assert ("the tuner adds nothing" in page.text) == (tuner == "full")
    assert ("Nothing is mixed" in page.text) == (
        tuner not in ("adapter", "lora", "ssf", "dora") or M == 1
    )
    if fresh:
        assert "relative positions move nothing" in page.text
        assert "they start, at 0.5" in page.text or "Nothing is mixed" in page.text


@pytest.mark.parametrize("tuner", ["adapter", "lora"])
@pytest.mark.parametrize("fresh", [True, False])
def test_with_mixing_weights_of_1_the_captions_say_so(tmp_path, tuner, fresh):
    model = network(tuner, fresh=fresh)
    for block in model.image_encoder.blocks:
        for w in block.mixing_weights().values():
            w.data.fill_(1.0)
    inside, _, page = page_of(tmp_path, model, a_tile("image+dsm"))
    assert np.array_equal(inside.variants["mixing weights 1"], inside.seen["logits"])
    assert "w = 1.000" in page.text and "With height 0 everywhere" in page.text
    assert re.search(r"with mixing weights 1, 0\.0 % of", page.text)


def test_where_the_late_blocks_are_tuned_the_page_shows_the_first_of_them(tmp_path):
    inside, text, page = page_of(tmp_path, network("lora", blocks="late"), a_tile("image+dsm"))
    assert inside.drawn == 1 and "block 1 in the order of its calls" in page.text
    assert "tuners.py:LoRA.forward" in code_of(text)
    assert re.search(r"Farthest from it: lin\d (image|height|dsm) in block 1, w = ", page.text)
    assert not inside.added[0].any() and inside.added[1].all()


def test_flat_rasters_and_unscored_labels_make_a_page(tmp_path):
    tile = a_tile("image+dsm")
    tile.image[:], tile.dsm[:], tile.labels[:] = 0, 5, 255
    _, text, page = page_of(tmp_path, network(), tile)
    assert "The heights do not vary" in page.text and not re.search(r"\bnan\b|\binf\b", page.text)
    assert "errors" not in dict(pictures_of(text))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out .*cannot be written .*; give another folder") as e:
        write_lesson(tmp_path / "file" / "explain.html", "x", "", [], {}, {}, {})
    assert "\n" not in str(e.value)


def test_a_corner_is_two_whole_numbers():
    assert corner("12,-3") == (12, -3)
    for text in ("", "1", "1,2,3", "1.5,2", "a,b"):
        with pytest.raises(ArgumentTypeError, match="X,Y"):
            corner(text)


# --------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has not been trained, on the tiles of a small city."""
    folder = tmp_path_factory.mktemp("explained")
    write_city(folder / "city", seed=3, size=(128, 132))
    write_run(folder / "runs" / "one", folder / "city")
    return folder / "runs" / "one"


def write_run(path, city, tuner="adapter", plugin=None):
    flags = dict(encoder="vit_t", weights="none", crop=64, tuner=tuner, plugin=plugin or {})
    s = Settings(data="vaihingen", root=str(city), **flags)
    model, base, _ = build_model(s, 6)
    path.mkdir(parents=True)
    classes = [[name, list(color)] for name, color in synthetic.ISPRS_CLASSES]
    save_model(path / "model.pt", model, s, base, classes, 1, True)


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HOME / "explain.py"), run_name="__main__")
    return end.value.code or 0, *capsys.readouterr()


def test_the_newest_run_s_first_test_tile_is_shown_and_another_one_by_name(
    run, monkeypatch, capsys
):
    monkeypatch.chdir(run.parent.parent)
    status, out, err = call(monkeypatch, capsys, "--device", "cpu")
    page = run / "explain" / "explain.html"
    assert (status, err) == (0, "") and "runs/one/explain/explain.html: " in out
    text = page.read_text(encoding="utf-8")
    assert "Tile 5, 132 x 128 pixels from column 0 and row 0 on" in text
    assert text.count("of the scored pixels are right") == 1
    words = ["--run", run, "--tile", 21, "--out", "other"]
    assert call(monkeypatch, capsys, *words)[0] == 0
    assert "Tile 21, " in Path("other/explain.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--tile", "6"], ["--tile 6", "5, 21"]),
        (["--tile", "5", "--image", "a.tif"], ["--tile", "--image"]),
        (["--image", "a.tif"], ["--image", "a.tif"]),
        (["--at", "132,0"], ["--at 132,0", "131,127"]),
        (["--run", "nowhere"], ["nowhere"]),
        (["--device", "abacus"], ["abacus"]),
        (["--out", "/proc/lesson"], ["/proc/lesson", "another folder"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_exit_status_2(run, monkeypatch, capsys, words, parts):
    monkeypatch.chdir(run.parent.parent)
    status, out, err = call(monkeypatch, capsys, *words)
    assert status == 2 and err.count("\n") == 1 and all(part in err for part in parts), err


def test_a_changed_line_of_the_code_and_of_the_method_is_on_the_page(run, tmp_path):
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns("data", "runs", ".*", "tests", "__pycache__")
    shutil.copytree(HOME, copy, ignore=skipped)
    for file, was, now in (
        (
            "tuners.py",
            "        n = self.norm2(z)\n",
            "        n = self.norm2(z)  # a changed line\n",
        ),
        ("docs/method.md", r"\text{Adapter}(t) = W_2", r"\text{Adapter}(t) = W_7"),
    ):
        text = (copy / file).read_text(encoding="utf-8")
        assert text.count(was) == 1
        (copy / file).write_text(text.replace(was, now), encoding="utf-8")
    command = [sys.executable, copy / "explain.py", "--run", run, "--out", tmp_path / "page"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = (tmp_path / "page" / "explain.html").read_text(encoding="utf-8")
    assert "n = self.norm2(z)  # a changed line" in text and "<i>W</i><sub>7</sub>" in text


PLUGIN = (
    """
from tuners import TUNERS, Tuner
import torch.nn as nn

class Shift(Tuner):
    def __init__(self, block, modalities):
        super().__init__(block, modalities)
        self.shift = nn.Parameter(0.1 + 0 * block.norm1.weight)

    def forward(self, x):
        # a line of the user's own
        y = super().forward(x)
"""
    + "        y = y\n" * 12
    + """
        return y + self.shift

TUNERS["shift"] = Shift
"""
)


def test_a_user_s_tuner_is_shown_with_its_own_lines_at_most_12(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TUNERS, "shift", None)  # taken out again at the end
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "one" / "plugins" / "mine.py"
    path.parent.mkdir(parents=True)
    path.write_text(PLUGIN)
    digest = load_plugins([path])
    write_run(tmp_path / "two", run.parent.parent / "city", "shift", digest)
    shutil.move(path.parent, tmp_path / "two" / "plugins")
    for name in [n for n in sys.modules if n.startswith("plugin_")]:
        del sys.modules[name]
    status, _, err = call(monkeypatch, capsys, "--run", "two")
    assert status == 0, err
    text = Path("two/explain/explain.html").read_text(encoding="utf-8")
    lines, _ = code_of(text)["mine.py:Shift.forward"]
    assert lines[0] == "# a line of the user's own" and len(lines) == 12
    assert "lines more" in text and "What the tuner adds: shift" in text
