"""Sliding-window prediction, and the maps that are written."""

import numpy as np
import pytest
import tifffile
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import labels_to_colors, read_raster
from predict import autocast, predict_tile, write_map

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
    """A convolution of image and heights. Every number of it is a small multiple of 1/4, so that sums are exact in any
    order; what it says of a pixel depends on where the window's border is."""

    def __init__(self, seed):
        super().__init__()
        weight = torch.randint(-20, 21, (5, 4, 3, 3), generator=torch.Generator().manual_seed(seed)).float()
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


def predict_at_full_size(model, image, dsm, window, stride, repeat):
    """Every window one by one into sums of the whole size."""
    H, W = dsm.shape
    padding = [(0, max(window - n, 0)) for n in (H, W)]
    image, dsm = np.pad(image, [*padding, (0, 0)], mode="reflect"), np.pad(dsm, padding, mode="reflect")
    sums = torch.zeros(5, *dsm.shape, dtype=torch.float64)
    for top in places(H, window, stride, repeat):
        for left in places(W, window, stride, repeat):
            cut = np.s_[top : top + window, left : left + window]
            x, y = torch.from_numpy(image[cut]).permute(2, 0, 1), torch.from_numpy(dsm[cut] / 4)
            sums[(slice(None), *cut)] += model(x[None], y[None])[0].double()
    return sums.argmax(0).numpy()[:H, :W]


# ------------------------------------------------------------------------------------------------------ sliding window


@given(sides, sides, windows(), st.integers(1, 5), st.integers(0, 99))
def test_a_model_that_answers_its_input_gives_the_largest_band_of_any_raster(H, W, window, batch, seed):
    image = np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)
    model = Echo()
    found = predict_tile(model, image, None, *window, batch)
    assert found.dtype == np.uint8 and np.array_equal(found, image.argmax(-1))
    assert max(model.batches) <= batch


@settings(max_examples=40)
@given(sides, sides, windows(), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_prediction_equals_sums_over_all_windows_at_full_size(H, W, window, batch, repeat, seed):
    rng = np.random.default_rng(seed)
    image, dsm = (rng.integers(0, 5, (H, W, 3)) / 4).astype(np.float32), rng.integers(0, 5, (H, W)).astype(np.float32)
    model = Whole(seed)
    found = predict_tile(model, image, dsm, *window, batch, heights=(0, 4), repeat_border=repeat)
    with torch.no_grad():
        assert np.array_equal(found, predict_at_full_size(model, image, dsm, *window, repeat))


def test_repeated_border_windows_make_a_difference():
    rng = np.random.default_rng(0)
    image, dsm = rng.integers(0, 2, (40, 40, 3)).astype(np.float32), rng.integers(0, 5, (40, 40)).astype(np.float32)
    once, repeated = (predict_tile(Whole(1), image, dsm, 16, 4, repeat_border=r) for r in (False, True))
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
    predict_tile(Echo(), np.zeros((H, 9, 3), np.uint8), None, *window, progress=lambda *call: calls.append(call))
    rows = len(places(H, *window, repeat=False))
    assert calls == [(i + 1, rows) for i in range(rows)]


@pytest.mark.parametrize("stride", [0, -4, 9])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        predict_tile(Echo(), np.zeros((20, 20, 3), np.uint8), None, 8, stride)


@pytest.mark.parametrize("precision, name", [("fp32", "float32"), ("auto", "float32"), ("bf16", "bfloat16")])
def test_only_bf16_computes_in_bf16_on_the_cpu(precision, name):
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)


# ----------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("name", ["map.png", "map.tif", "map.TIFF", "MAP.PNG"])
def test_a_map_holds_the_class_indices_and_a_table_of_their_colours(tmp_path, name):
    rng = np.random.default_rng(0)
    for H, W in ((1, 1), (7, 30), (65, 64)):
        classes, palette = rng.integers(0, 6, (H, W)).astype(np.uint8), [tuple(c) for c in rng.integers(0, 256, (6, 3))]
        write_map(tmp_path / name, classes, palette)
        assert np.array_equal(read_raster(tmp_path / name), classes)
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), labels_to_colors(classes, palette))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_map_that_cannot_be_written_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch):
    write_map(tmp_path / "a.tif", np.zeros((4, 4), np.uint8), [(1, 2, 3)])
    before = (tmp_path / "a.tif").read_bytes()

    def break_off(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tifffile, "imwrite", break_off)
    with pytest.raises(OSError, match="disk full"):
        write_map(tmp_path / "a.tif", np.ones((4, 4), np.uint8), [(1, 2, 3)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"] and (tmp_path / "a.tif").read_bytes() == before
