"""Sliding-window prediction, and how sure it is."""

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.device import autocast
from engine.inference import BLENDS, percent, predict_strips, predict_tile
from geodata.crops import sliding_windows
from predict import bands_of

sides = st.integers(1, 40)


class Echo(nn.Module):
    """The logits are the image itself; notes how many windows it was given at once."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, image):
        self.batches.append(len(image))
        return image


class Whole(nn.Module):
    """A convolution of image and heights. Every number of it is a small multiple of 1/4, so that
    sums are exact in any order; what it says of a pixel depends on where the window's border is.
    """

    def __init__(self, seed):
        super().__init__()
        weight = torch.randint(
            -20, 21, (5, 4, 3, 3), generator=torch.Generator().manual_seed(seed)
        ).float()
        self.weight = nn.Parameter(weight)

    def forward(self, image, dsm):
        return F.conv2d(torch.cat([image, dsm[:, None]], 1), self.weight, padding=1)


@st.composite
def windows(draw, largest=16):
    """(window, stride), with at least a quarter of the window from one to the next."""
    window = draw(st.integers(3, largest))
    return window, draw(st.integers(-(-window // 4), window))


def places(length, window, stride, repeat):
    starts = [min(start, max(length - window, 0)) for start in range(0, length, stride)]
    return starts if repeat else sorted(set(starts))


def answer(model, image, dsm, flips):
    """What a model says of one window, (K, window, window); with flips, the mean over its
    reflections.
    """
    turns = ((), (-1,), (-2,), (-2, -1)) if flips else ((),)
    return sum(
        model(image[None].flip(t), dsm[None].flip(t))[0].double().flip(t) for t in turns
    ) / len(turns)


def average_at_full_size(model, image, dsm, window, stride, repeat, blend="mean", flips=False):
    """Every window one by one into sums of the whole size -> the mean logits (5, H, W) in double
    precision.
    """
    H, W = dsm.shape
    bell = torch.sin((torch.arange(window).double() + 0.5) * torch.pi / window) ** 2
    share = {"mean": torch.ones(window, window), "cosine": torch.outer(bell, bell)}[blend]
    padding = [(0, max(window - n, 0)) for n in (H, W)]
    image, dsm = (
        np.pad(image, [*padding, (0, 0)], mode="reflect"),
        np.pad(dsm, padding, mode="reflect"),
    )
    sums, weights = (
        torch.zeros(5, *dsm.shape, dtype=torch.float64),
        torch.zeros(dsm.shape, dtype=torch.float64),
    )
    for top in places(H, window, stride, repeat):
        for left in places(W, window, stride, repeat):
            cut = np.s_[top : top + window, left : left + window]
            x, y = torch.from_numpy(image[cut]).permute(2, 0, 1), torch.from_numpy(dsm[cut] / 4)
            sums[(slice(None), *cut)] += share * answer(model, x, y, flips)
            weights[cut] += share
    return (sums / weights)[:, :H, :W]


# ----------------------------------------------------------------------------------- sliding window


blends = st.sampled_from(sorted(BLENDS))


@given(sides, sides, windows(), st.integers(1, 5), blends, st.booleans(), st.integers(0, 99))
def test_a_model_that_answers_its_input_gives_the_largest_band_of_any_raster(
    H, W, window, batch, blend, flips, seed
):
    image = np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)
    model = Echo()
    found = predict_tile(model, image, None, *window, batch, blend=blend, flips=flips)
    assert found.dtype == np.uint8 and np.array_equal(found, image.argmax(-1))
    assert max(model.batches) <= batch


@settings(max_examples=40)
@given(sides, sides, windows(), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_prediction_equals_sums_over_all_windows_at_full_size(H, W, window, batch, repeat, seed):
    rng = np.random.default_rng(seed)
    image, dsm = (
        (rng.integers(0, 5, (H, W, 3)) / 4).astype(np.float32),
        rng.integers(0, 5, (H, W)).astype(np.float32),
    )
    model = Whole(seed)
    found = predict_tile(model, image, dsm, *window, batch, heights=(0, 4), repeat_border=repeat)
    with torch.no_grad():
        assert np.array_equal(
            found, average_at_full_size(model, image, dsm, *window, repeat).argmax(0)
        )


@given(sides, sides, windows(), blends)
def test_strips_come_from_top_to_bottom_and_make_up_the_map(H, W, window, blend):
    image = np.random.default_rng(H).integers(0, 256, (H, W, 3), dtype=np.uint8)
    strips = list(predict_strips(Echo(), image, None, *window, blend=blend))
    assert (
        all(0 < len(strip) <= window[1] for strip, _ in strips[:-1])
        and 0 < len(strips[-1][0]) <= window[0]
    )
    assert np.array_equal(np.concatenate([strip for strip, _ in strips]), image.argmax(-1))
    assert all(probabilities is None for _, probabilities in strips)


# ------------------------------------------------------------------------------------ probabilities


class Soft(Whole):
    """The same with logits so small that every class has a share."""

    def forward(self, image, dsm):
        return super().forward(image, dsm) / 64


def with_probabilities(*args, **options):
    """The whole class map (H, W) and the probabilities (K, H, W)."""
    classes, probabilities = zip(*predict_strips(*args, **options, probabilities=True))
    return np.concatenate(classes), np.concatenate(probabilities, axis=1)


@settings(max_examples=30)
@given(
    sides,
    sides,
    windows(),
    st.integers(1, 5),
    st.booleans(),
    blends,
    st.booleans(),
    st.integers(0, 99),
)
def test_probabilities_are_the_softmax_of_the_mean_over_all_windows_at_full_size(
    H, W, window, batch, repeat, blend, flips, seed
):
    rng = np.random.default_rng(seed)
    image, dsm = (
        (rng.integers(0, 5, (H, W, 3)) / 4).astype(np.float32),
        rng.integers(0, 5, (H, W)).astype(np.float32),
    )
    model, options = (
        Soft(seed),
        dict(heights=(0, 4), repeat_border=repeat, blend=blend, flips=flips),
    )
    classes, found = with_probabilities(model, image, dsm, *window, batch, **options)
    with torch.no_grad():
        wanted = average_at_full_size(model, image, dsm, *window, repeat, blend, flips).softmax(0)
    assert found.dtype == np.float32 and np.allclose(found, wanted, rtol=0, atol=1e-6)
    assert np.allclose(found.sum(0), 1, rtol=0, atol=1e-6)
    assert np.array_equal(classes, predict_tile(model, image, dsm, *window, batch, **options))
    assert np.array_equal(np.take_along_axis(found, classes[None].astype(int), 0)[0], found.max(0))


@given(sides, sides, windows(), st.booleans(), blends, st.booleans())
def test_constant_logits_give_constant_probabilities_up_to_the_last_row_and_column(
    H, W, window, repeat, blend, flips
):
    class Constant(nn.Module):
        def forward(self, image):
            return torch.tensor([1.0, 2.0, -3.0, 0.5])[:, None, None].expand(
                len(image), -1, *image.shape[-2:]
            )

    image = np.zeros((H, W, 3), np.uint8)
    options = dict(repeat_border=repeat, blend=blend, flips=flips)
    classes, found = with_probabilities(Constant(), image, None, *window, **options)
    wanted = torch.tensor([1.0, 2.0, -3.0, 0.5]).softmax(0).numpy()[:, None, None]
    assert (
        found.shape == (4, H, W)
        and (classes == 1).all()
        and np.allclose(found, wanted, rtol=0, atol=1e-6)
    )


def test_a_strip_is_never_higher_than_is_cheap_to_turn_into_probabilities():
    strips = list(
        predict_strips(Echo(), np.zeros((500, 9, 3), np.uint8), None, 200, 150, probabilities=True)
    )
    assert (
        max(len(classes) for classes, _ in strips) <= 64
        and sum(len(classes) for classes, _ in strips) == 500
    )
    assert all(probabilities.shape == (3, len(classes), 9) for classes, probabilities in strips)


def test_percent_is_rounded_and_the_confidence_is_the_share_of_the_class_of_the_map():
    assert percent(np.array([0, 0.004, 0.006, 0.5, 0.996, 1], np.float32)).tolist() == [
        0,
        0,
        1,
        50,
        100,
        100,
    ]
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    bands = {}
    for confidence, probabilities in ((False, False), (True, False), (False, True), (True, True)):
        strips = predict_strips(
            Echo(), image, None, 16, 8, probabilities=confidence or probabilities
        )
        found = np.concatenate(list(bands_of(strips, confidence, probabilities)), axis=1)
        assert found.dtype == np.uint8 and np.array_equal(found[0], image.argmax(-1))
        bands[confidence, probabilities] = found[1:]
    assert bands[False, False].shape == (0, 30, 20)
    assert np.array_equal(bands[True, False][0], bands[False, True].max(0))
    assert np.array_equal(
        bands[True, True], np.concatenate([bands[True, False], bands[False, True]])
    )


# -------------------------------------------------------------------------------------- the windows


@given(sides, sides, windows(), st.integers(1, 5))
def test_each_window_is_computed_once_where_the_published_loop_repeats_those_at_the_border(
    H, W, window, batch
):
    model = Echo()
    predict_tile(model, np.zeros((H, W, 3), np.uint8), None, *window, batch, repeat_border=True)
    published = len(places(H, *window, repeat=True)) * len(places(W, *window, repeat=True))
    windows = sliding_windows(H, W, *window)
    assert sum(model.batches) == len(windows) <= published == sum(weight for *_, weight in windows)


def test_a_tile_of_vaihingen_s_size_takes_fewer_forwards_than_the_published_loop():
    model = Echo()
    predict_tile(model, np.zeros((512, 600, 3), np.uint8), None, 256, 32, repeat_border=True)
    assert sum(model.batches) == 9 * 12 and 16 * 19 == len(range(0, 512, 32)) * len(
        range(0, 600, 32)
    )


def test_the_cosine_window_trusts_the_middle_and_no_pixel_is_without_a_share():
    side = BLENDS["cosine"](16)
    assert (
        side.min() > 0
        and torch.allclose(side, side.flip(0))
        and (side[:8].diff() > 0).all()
        and side.max() <= 1
    )

    class Border(nn.Module):
        """Class 1 along the window's border, a little surer than class 0 is elsewhere."""

        def forward(self, image):
            border = torch.ones(image.shape[-2:])
            border[1:-1, 1:-1] = 0
            return torch.stack([1 - border, 1.5 * border]).expand(len(image), 2, -1, -1)

    image = np.zeros((40, 40, 3), np.uint8)
    mean, cosine = (
        predict_tile(Border(), image, None, 16, 8, blend=blend)[8:32, 8:32]
        for blend in ("mean", "cosine")
    )
    assert mean.any() and not cosine.any()


def test_flips_make_a_model_blind_to_left_and_right_and_up_and_down():
    image = np.random.default_rng(0).integers(0, 5, (40, 40, 3)).astype(np.float32) / 4
    dsm = np.random.default_rng(1).integers(0, 5, (40, 40)).astype(np.float32)
    straight = predict_tile(Whole(1), image, dsm, 16, 8, flips=True)
    turned = predict_tile(Whole(1), image[::-1, ::-1], dsm[::-1, ::-1], 16, 8, flips=True)[
        ::-1, ::-1
    ]
    assert (
        np.array_equal(straight, turned)
        and (straight != predict_tile(Whole(1), image, dsm, 16, 8)).any()
    )


def test_repeated_border_windows_make_a_difference():
    rng = np.random.default_rng(0)
    image, dsm = (
        rng.integers(0, 2, (40, 40, 3)).astype(np.float32),
        rng.integers(0, 5, (40, 40)).astype(np.float32),
    )
    once, repeated = (
        predict_tile(Whole(1), image, dsm, 16, 4, repeat_border=r) for r in (False, True)
    )
    assert (once != repeated).any()


@given(sides, sides, windows(), st.integers(0, 99))
def test_heights_are_scaled_over_the_whole_raster_and_not_over_a_window(H, W, window, seed):
    class Above(nn.Module):
        def forward(self, dsm):
            return torch.stack([torch.full_like(dsm, 0.5), dsm], 1)

    dsm = np.random.default_rng(seed).integers(240, 301, (H, W)).astype(np.float32)
    low, high = dsm.min(), dsm.max()
    assert np.array_equal(predict_tile(Above(), None, dsm, *window), 2 * (dsm - low) > high - low)
    assert np.array_equal(predict_tile(Above(), None, dsm, *window, heights=(200, 300)), dsm > 250)


@given(sides, windows())
def test_progress_counts_the_rows_of_windows_to_the_last(H, window):
    calls = []
    predict_tile(
        Echo(),
        np.zeros((H, 9, 3), np.uint8),
        None,
        *window,
        progress=lambda *call: calls.append(call),
    )
    rows = len(places(H, *window, repeat=False))
    assert calls == [(i + 1, rows) for i in range(rows)]


@pytest.mark.parametrize("stride", [0, -4, 9])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        predict_tile(Echo(), np.zeros((20, 20, 3), np.uint8), None, 8, stride)


@pytest.mark.parametrize(
    "precision, name", [("fp32", "float32"), ("auto", "float32"), ("bf16", "bfloat16")]
)
def test_only_bf16_computes_in_bf16_on_the_cpu(precision, name):
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)
