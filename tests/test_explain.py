"""What the page of a window shows is what it was given, and what it says of it is true."""

import base64
import io
import re
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from conftest import TINY, randomise
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from test_report import Reader

from geodata.labels import labels_to_colors
from geodata.rasters import DataError
from geodata.scaling import TileScale
from geodata.tiles import LoadedTile
from mfnet import build_mfnet
from reports.inside import (
    contributions,
    corner,
    cut_window,
    enlarge,
    place_window,
    principal_colors,
    tint,
    write_inside,
)
from reports.page import line_chart

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
            assert u == pytest.approx(46 + 306 * i / max(last - 1, 1), abs=0.06)
            assert v == pytest.approx(190 - 160 * (y - low) / ((high - low) or 1), abs=0.06)
    assert len(lines) < 2 or all(
        " ".join(n.split()) in " ".join(reader.text.split()) for n in lines
    )


def test_points_that_are_not_finite_are_left_out_of_a_chart():
    points = [(1, 0.5), (2, float("nan")), (3, float("inf")), (4, 0.25)]
    drawn = line_chart("loss", {"": points}, 0, 1, "epoch")
    assert drawn.count("<circle") == 2 and not re.search("nan|inf", drawn)
    assert line_chart("loss", {"": []}, 0, 1, "epoch").count("<circle") == 0


# ----------------------------------------------------------------------------------------- the page


def a_tile(kinds, H=90, W=100):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8) if "image" in kinds else None
    dsm = rng.normal(size=(H, W)).astype(np.float32) if "dsm" in kinds else None
    return LoadedTile("a", image, dsm, None, None, TileScale((-3.0, 3.0)))


def what_was_seen(M, size, gates=True, strides=(4, 8, 16, 32), dtype=torch.float32):
    """Intermediates of a forward pass in the shapes that the network keeps them in."""
    generator, levels = torch.Generator().manual_seed(0), []
    for stride in strides:
        h, w = (-(-n // 32) * 32 // stride for n in size)
        parts = [torch.randn(1, 8, h, w, generator=generator).to(dtype) for _ in range(M)]
        weights = [torch.rand(1, 8, 1, 1, generator=generator) for _ in range(M)] if gates else []
        levels.append({"parts": parts, "gates": weights})
    logits = torch.randn(1, 3, *size, generator=generator)
    fused = [sum(level["parts"]) for level in levels]
    return {"levels": levels, "fused": fused, "logits": logits, "blocks": [], "maps": []}


def pictures_of(text):
    """Caption -> pixels of every picture on a page."""
    found = re.findall('<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    return {
        caption: np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
        for caption, code in found
    }


TWO = {"mlp.lin1": [[0.25, 0.5]] * 3, "mlp.lin2": [[0.125, 0.75]] * 3}


@pytest.mark.parametrize(
    "kinds, mixing, options, words, pictures",
    [
        ("image+dsm", {"": [[0.375, 0.625]] * 2}, {}, ["block", "0.375", "0.625"], 3 + 4 + 4),
        ("image+dsm", TWO, {}, ["lin1 image", "lin2 height", "0.125"], 3 + 4 + 4),
        ("image+dsm", {}, {}, ["Nothing is mixed: the tuner of this run has no"], 3 + 4 + 4),
        (
            "image+dsm",
            TWO,
            dict(gates=False, strides=(16,)),
            ["contribution of height", "stride 16"],
            3 + 1 + 1,
        ),
        ("image+dsm", TWO, dict(dtype=torch.bfloat16), ["channel weight of height"], 3 + 4 + 4),
        ("image", {}, {}, ["Nothing is mixed: there is one modality"], 2 + 4),
        ("dsm", {}, dict(gates=False, strides=(16,)), ["contribution of height"], 2 + 1),
    ],
    ids=str,
)
def test_the_page_shows_what_was_seen_and_needs_nothing_from_outside(
    tmp_path, kinds, mixing, options, words, pictures
):
    box = np.s_[26:90, 30:96]
    tile, M = a_tile(kinds), len(kinds.split("+"))
    cut, seen = cut_window(tile, box), what_was_seen(M, (64, 66), **options)
    folder = tmp_path / "new" / "folder"
    path = write_inside(folder, cut, box, seen, mixing, CLASSES, "Inside runs/<x>")
    assert [p.name for p in path.parent.iterdir()] == ["explain.html"]
    page, text = Reader(), path.read_text(encoding="utf-8")
    page.feed(text)
    assert not page.open and not {"script", "link", "b"} & set(page.tags)
    assert len(page.links) == pictures
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert page.tags.count("svg") == (1 if mixing else 0)
    for part in [*words, "Inside runs/<x>", "66 x 64 pixels from column 30 and row 26"]:
        assert part in page.text, part
    assert ("channel weight" in page.text) == bool(seen["levels"][0]["gates"])

    shown = pictures_of(text)
    pred = seen["logits"][0].argmax(0).byte().numpy()
    colors = labels_to_colors(pred, [color for _, color in CLASSES])
    assert np.array_equal(shown["predicted classes"], colors)
    if cut.image is not None:
        assert np.abs(shown["image"].astype(int) - tile.image[box]).max() <= 1
    for level, fused in zip(seen["levels"], seen["fused"]):
        stride = 96 // fused.shape[3]
        (caption,) = [name for name in shown if name.startswith(f"stride {stride}: ")]
        assert shown[caption].shape == (64, 66, 3)
        expected = principal_colors(fused[0].float().numpy())[
            : -(-64 // stride), : -(-66 // stride)
        ]
        assert np.array_equal(shown[caption][::stride, ::stride], expected)
        found = contributions([part[0].float().numpy() for part in level["parts"]])
        for one in found:
            assert f"{one.mean():.3f}" in page.text
        for gate in level["gates"]:
            assert f"{gate.mean():.3f}" in page.text
        if M == 2:
            one = found[0]
            caption = f"image: {one.mean():.2f}, from {one.min():.2f} to {one.max():.2f}"
            drawn = shown[f"stride {stride}, {caption}"][::stride, ::stride]
            assert np.array_equal(drawn, tint(one, 0.5)[: drawn.shape[0], : drawn.shape[1]])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    tile, box = a_tile("image"), np.s_[0:90, 0:100]
    seen = what_was_seen(1, (90, 100))
    with pytest.raises(
        DataError, match="--out .*file: cannot be written .*; give another folder"
    ) as caught:
        write_inside(tmp_path / "file", tile, box, seen, {}, CLASSES, "x")
    assert "\n" not in str(caught.value)


def test_a_corner_is_two_whole_numbers():
    assert corner("12,-3") == (12, -3)
    for text in ("", "1", "1,2,3", "1.5,2", "a,b"):
        with pytest.raises(ArgumentTypeError, match="X,Y"):
            corner(text)


@pytest.mark.parametrize("fusion", ["dfm", "sum"])
@torch.inference_mode()
def test_the_network_s_own_intermediates_make_the_page(tmp_path, fusion):
    torch.manual_seed(0)
    model = randomise(build_mfnet(TINY, "lora", 3, 2, fusion)).eval()
    tile, box, seen, mixing = a_tile("image+dsm"), np.s_[0:70, 0:100], {}, {}
    cut = cut_window(tile, box)
    image = torch.from_numpy(cut.scale.image_input(cut.image))[None]
    logits = model(image, torch.from_numpy(cut.scale.height_input(cut.dsm, box))[None], seen=seen)
    for block in model.image_encoder.blocks:
        for layer, weights in block.mixing_weights().items():
            mixing.setdefault(layer, []).append(weights.tolist())
    path = write_inside(tmp_path, cut, box, seen, mixing, CLASSES, "x")
    shown = pictures_of(path.read_text(encoding="utf-8"))
    colors = labels_to_colors(logits[0].argmax(0).numpy(), [color for _, color in CLASSES])
    assert np.array_equal(shown["predicted classes"], colors)
    strides = [int(name.split()[1][:-1]) for name in shown if re.match(r"stride \d+: ", name)]
    assert strides == ([4, 8, 16, 32] if fusion == "dfm" else [16])
    numbers = [w for blocks in mixing.values() for weights in blocks for w in weights]
    assert len(numbers) == 8 and all(f"{w:.3f}" in path.read_text() for w in numbers)
