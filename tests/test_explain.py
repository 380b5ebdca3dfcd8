"""What the page of a window shows is what the network does, and what it says of it is true."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from conftest import TINY, randomise, same_state, snapshot
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
from reports import inside as explain
from reports.inside import (
    chart,
    corner,
    enlarge,
    learned_mixing,
    look_inside,
    place_window,
    principal_colors,
    shares,
    tint,
    write_explanation,
)

CLASSES = (("ground", (255, 255, 255)), ("<b>roof</b>", (0, 0, 255)), ("tree", (0, 255, 0)))


def network(modalities=2, tuner="adapter", fusion="dfm", **options):
    torch.manual_seed(0)
    return randomise(build_mfnet(TINY, tuner, 3, modalities, fusion, **options)).eval()


def rasters(modalities, H=64, W=96):
    generator = torch.Generator().manual_seed(H + W)
    return [torch.rand(1, 3, H, W, generator=generator) for _ in range(modalities)]


# --------------------------------------------------------------------------------------- the inside


@pytest.mark.parametrize("fusion", ["dfm", "sum"])
@pytest.mark.parametrize("modalities, size", [(1, (64, 96)), (2, (70, 101)), (3, (64, 64))])
@torch.inference_mode()
def test_the_parts_of_a_level_sum_to_what_the_decoder_gets_and_the_classes_are_the_network_s(
    modalities, size, fusion
):
    model, given_rasters = network(modalities, fusion=fusion), rasters(modalities, *size)
    before, hooked = snapshot(model), len(model._forward_hooks)
    levels, pred = look_inside(model, *given_rasters)
    fused = model.fusion(model.encode(*given_rasters))
    assert len(levels) == len(fused) and all(len(level.parts) == modalities for level in levels)
    assert all(torch.equal(sum(level.parts), whole[0]) for level, whole in zip(levels, fused))
    assert [level.stride for level in levels] == ([4, 8, 16, 32] if fusion == "dfm" else [16])
    assert np.array_equal(pred, model(*given_rasters)[0].argmax(0).numpy()) and pred.shape == size
    assert same_state(model, before) and len(model._forward_hooks) == hooked


@torch.inference_mode()
def test_the_channel_weights_are_what_a_part_was_multiplied_by():
    model, given_rasters = network(), rasters(2)
    levels, _ = look_inside(model, *given_rasters)
    maps = model.encode(*given_rasters)
    for m in range(2):
        scales = model.fusion.pyramids[m](maps[m])
        for level, x in zip(levels, scales):
            weights = (level.parts[m] * x[0]).sum((1, 2)) / (x[0] ** 2).sum(
                (1, 2)
            )  # of part = weight * x, by channel
            assert level.channel_weights[m] == pytest.approx(weights.mean().item(), abs=1e-5)
            assert 0 < level.channel_weights[m] < 1


counts = st.integers(1, 4)


@given(counts, st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_shares_are_of_the_lengths_and_sum_to_1(M, C, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(C, h, w, generator=generator) * (m + 1) for m in range(M)]
    for part in parts:
        part[:, 0, 0] = 0
    found = shares(parts)
    assert found.shape == (M, h, w) and np.allclose(found.sum(axis=0), 1, atol=1e-12)
    assert np.allclose(found[:, 0, 0], 1 / M)
    for i, j in np.argwhere(np.arange(h * w).reshape(h, w) > 0):
        lengths = [sum(float(v) ** 2 for v in part[:, i, j]) ** 0.5 for part in parts]
        assert np.allclose(found[:, i, j], np.array(lengths) / sum(lengths), atol=1e-5)
    assert np.allclose(shares([part * 7 for part in parts]), found, atol=1e-6)


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


# ----------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("tuner, layers", [("adapter", [""]), ("lora", ["mlp.lin1", "mlp.lin2"])])
def test_the_mixing_weights_are_read_by_layer_and_block(tuner, layers):
    model = network(3, tuner)
    state, found = model.state_dict(), learned_mixing(model)
    assert list(found) == layers
    for layer, blocks in found.items():
        names = [
            ".".join(filter(None, ("image_encoder.blocks", str(i), layer, "mixing")))
            for i in range(2)
        ]
        assert blocks == [state[name].tolist() for name in names] and np.shape(blocks) == (2, 3)


@pytest.mark.parametrize(
    "options", [dict(modalities=1), dict(tuner="frozen"), dict(tuner="lora", mixing=False)], ids=str
)
def test_a_network_that_mixes_nothing_has_no_weights_of_it(options):
    assert learned_mixing(network(**options)) == {}


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


def test_a_place_is_a_square_and_an_equal_share_is_white():
    assert np.array_equal(
        enlarge(np.arange(6).reshape(1, 2, 3), 4, (3, 7))[:, :, 0], [[0, 0, 0, 0, 3, 3, 3]] * 3
    )
    assert tint(np.array([[0, 1 / 3, 1]]), 1 / 3).tolist() == [
        [explain.LESS.tolist(), [255] * 3, explain.MORE.tolist()]
    ]


def test_higher_weights_are_drawn_higher_and_one_half_in_the_middle():
    page = chart({"a": [0.5, 0.6], "b <": [0.45, 0.7]})
    places = [
        [float(point.split(",")[1]) for point in part.split('"')[0].split()]
        for part in page.split('points="')[1:]
    ]
    (half, a), (b, top) = places
    assert top == 30 and half == (30 + 195) / 2 and top < a < half < b
    assert half - a == pytest.approx((half - top) / 2, abs=0.1)
    assert "b &lt;" in page and "0.70" in page and "0.30" in page and chart({"one block": [0.5]})


def pictures_of(text):
    """Caption -> pixels of every picture on a page."""
    found = re.findall('<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    return {
        caption: np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
        for caption, code in found
    }


@pytest.mark.parametrize(
    "kinds, options, words, pictures",
    [
        ("image+dsm", dict(), ["block", "share of height", "channel weight of image"], 3 + 4 + 8),
        ("image+dsm", dict(tuner="lora"), ["lin1 image", "lin2 height"], 3 + 4 + 8),
        ("image+dsm", dict(fusion="sum"), ["stride 16, height"], 3 + 1 + 2),
        ("image+dsm", dict(tuner="frozen"), ["Nothing is mixed", "frozen"], 3 + 4 + 8),
        (
            "image+dsm",
            dict(tuner="lora", mixing=False),
            ["Nothing is mixed", "--no-mixing"],
            3 + 4 + 8,
        ),
        ("image", dict(), ["Nothing is mixed: there is one modality", "share of image"], 2 + 4),
        (
            "dsm",
            dict(fusion="sum"),
            ["Nothing is mixed: there is one modality", "share of height"],
            2 + 1,
        ),
    ],
    ids=str,
)
def test_the_page_shows_the_window_and_needs_nothing_from_outside(
    tmp_path, kinds, options, words, pictures
):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 100, 3), dtype=np.uint8) if "image" in kinds else None
    dsm = rng.normal(size=(90, 100)).astype(np.float32) if "dsm" in kinds else None
    scale = TileScale((-3.0, 3.0), ground=rng.normal(size=(9, 10)).astype(np.float32), cell=10)
    tile, model = (
        LoadedTile("a", image, dsm, None, None, scale),
        network(len(kinds.split("+")), **options),
    )
    path = write_explanation(
        tmp_path / "new" / "folder", model, tile, 64, (30, 79), CLASSES, "runs/<x>"
    )
    assert [p.name for p in path.parent.iterdir()] == ["explain.html"]
    page, text = Reader(), path.read_text(encoding="utf-8")
    page.feed(text)
    assert not page.open and not {"script", "link", "b"} & set(page.tags)
    assert len(page.links) == pictures and all(
        link.startswith("data:image/png;base64,") for link in page.links
    )
    assert page.tags.count("svg") == (1 if learned_mixing(model) else 0)
    for part in [*words, "Inside runs/<x>", "64 x 64 pixels from column 30 and row 26"]:
        assert part in page.text, part
    assert all(
        f"{w:.3f}" in page.text
        for blocks in learned_mixing(model).values()
        for w in np.ravel(blocks)
    )

    box, shown = np.s_[26:90, 30:94], pictures_of(text)
    inputs = [] if image is None else [torch.from_numpy(image[box]).permute(2, 0, 1)[None] / 255]
    inputs += (
        []
        if dsm is None
        else [torch.from_numpy(scale.height_input(dsm, np.s_[0:90, 0:100])[box])[None]]
    )
    levels, pred = look_inside(model, *inputs)
    assert np.array_equal(
        shown["predicted classes"], labels_to_colors(pred, [color for _, color in CLASSES])
    )
    assert image is None or np.abs(shown["image"].astype(int) - image[box]).max() <= 1
    for level in levels:
        (caption,) = [name for name in shown if name.startswith(f"stride {level.stride}: ")]
        assert shown[caption].shape == (64, 64, 3)
        assert np.array_equal(
            shown[caption][:: level.stride, :: level.stride], principal_colors(level.fused.numpy())
        )
        for name, share in zip(("image", "height"), shares(level.parts) if "+" in kinds else ()):
            numbers = f"{share.mean():.2f}, from {share.min():.2f} to {share.max():.2f}"
            drawn = shown[f"stride {level.stride}, {name}: {numbers}"]
            assert np.array_equal(drawn[:: level.stride, :: level.stride], tint(share, 1 / 2))
            assert f"{share.mean():.3f}" in page.text


def test_a_corner_is_two_whole_numbers():
    assert corner("12,-3") == (12, -3)
    for text in ("", "1", "1,2,3", "1.5,2", "a,b"):
        with pytest.raises(explain.ArgumentTypeError, match="X,Y"):
            corner(text)
