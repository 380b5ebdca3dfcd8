"""The published loop over a tile; what the benchmark counts, compares and keeps."""

import csv
import os

import numpy as np
import pytest
import torch
from conftest import randomise
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine import speed
from engine.cost import encoder_products, operations
from engine.inference import predict_tile
from engine.speed import Case, Result, published_loop
from fast import accelerate
from mfnet import build_mfnet
from sam_vit import SIZES

SMALL = dict(
    embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3, img_size=64
)


def network(tuner, encoder=SMALL, **options):
    return randomise(build_mfnet(encoder, tuner, num_classes=3, **options), seed=1)


# --------------------------------------------------------------------------------- the whole tile


@pytest.mark.parametrize("H, W, stride", [(80, 100, 16), (64, 130, 32)])
def test_a_tile_in_the_published_loop_gives_the_same_map_by_more_windows(H, W, stride):
    model, rng, windows = network("adapter").eval(), np.random.default_rng(0), []
    image, dsm = (
        rng.integers(0, 256, (H, W, 3), dtype=np.uint8),
        rng.random((H, W), dtype=np.float32),
    )
    with model.decoder.register_forward_hook(lambda _, __, logits: windows.append(len(logits))):
        expected = published_loop(model, image, dsm, 64, stride, 4, (0.0, 1.0))
        published = sum(windows)
        found = predict_tile(model, image, dsm, 64, stride, 4, (0.0, 1.0), repeat_border=True)
    assert np.unique(found).size > 1 and np.array_equal(found, expected)
    assert published == -(-H // stride) * -(-W // stride) > sum(windows) - published


# ----------------------------------------------------------------------------------------- the cost


@pytest.mark.parametrize("tuner", ["frozen", "adapter", "lora"])
@pytest.mark.parametrize("crop", [64, 96, 128])
def test_the_counted_products_are_those_that_run(tuner, crop):
    model = accelerate(network(tuner))
    rasters = torch.rand(2, 3, crop, crop), torch.rand(2, crop, crop)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(*rasters)
    counted = operations(encoder_products(model, 2, crop))
    # What runs has the codes of rows and columns behind the keys, and products with all rows of a
    # window beside that.
    assert 0.8 * counter.get_total_flops() < counted <= counter.get_total_flops()


@pytest.mark.parametrize("crop, times", [(224, 1.0), (448, 4.0), (672, 9.0)])
def test_crops_of_whole_windows_need_products_in_proportion_to_their_pixels(crop, times):
    with torch.device("meta"):
        model = build_mfnet(SIZES["vit_b"] | {"global_attn_indexes": ()}, "adapter")
    one, many = (operations(encoder_products(model, 1, size)) for size in (224, crop))
    assert many == times * one


@given(st.integers(1, 3), st.integers(1, 4))
def test_products_grow_with_the_batch(batch, crops):
    model = network("adapter")
    assert operations(encoder_products(model, batch, 32 * crops)) == batch * operations(
        encoder_products(model, 1, 32 * crops)
    )


# -------------------------------------------------------------------------------------- the figures


def case(**own):
    return Case(
        **(
            dict(
                task="network",
                encoder="vit_t",
                tuner="adapter",
                crop=64,
                batch=1,
                precision="fp32",
                order="fast",
            )
            | own
        )
    )


def test_ratios_are_to_the_plain_network_in_fp32_and_in_the_same_precision():
    seconds = {
        ("fp32", "plain"): 8.0,
        ("fp32", "fast"): 4.0,
        ("bf16", "plain"): 2.0,
        ("bf16", "fast"): 1.0,
    }
    results = {case(precision=p, order=o): Result(seconds=s) for (p, o), s in seconds.items()}
    results[case(order="checkpointed")] = Result(note="failed")
    speed.compare(results)
    assert [r.times_plain_fp32 for r in results.values()] == [1, 2, 4, 8, None]
    assert [r.times_plain for r in results.values()] == [1, 2, 1, 2, None]


def test_a_difference_is_relative_to_the_largest_value_and_of_maps_the_share_of_pixels():
    assert speed.difference(torch.tensor([1.0, -4.0, 2.5]), torch.tensor([1.0, -4.0, 2.0])) == 0.125
    assert speed.difference(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 1], [2, 1]])) == 0.25


def test_rows_are_kept_in_place_of_those_of_the_same_case_and_failures_stay_in(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    speed.keep(
        {
            case(): Result(seconds=2.0, fastest=1, slowest=3),
            case(order="checkpointed"): Result(note="no compiler"),
        },
        path,
    )
    speed.keep(
        {
            case(): Result(seconds=1.0, fastest=1, slowest=1),
            case(batch=2): Result(seconds=5.0, fastest=5, slowest=5),
        },
        path,
    )
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["order"], row["batch"], row["seconds"]) for row in rows] == [
        ("fast", "1", "1"),
        ("checkpointed", "1", ""),
        ("fast", "2", "5"),
    ]
    speed.write_markdown(path)
    text = path.with_suffix(".md").read_text()
    assert "no compiler" in text and "batch 2" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_case_that_fails_keeps_its_reason_and_the_others_their_figures(monkeypatch):
    plain = speed.prepare

    def fail(case, model):
        def out_of_memory():
            raise torch.OutOfMemoryError("no room\nfor more")

        return out_of_memory if case.precision == "bf16" else plain(case, model)

    monkeypatch.setattr(speed, "prepare", fail)
    cases = [
        case(order=order, precision=p) for p in ("fp32", "bf16") for order in ("plain", "fast")
    ]
    results = speed.measure(cases, 1, torch.device("cpu"))
    assert [r.note for r in results.values()] == ["", "", "no room", "no room"]
    assert (
        results[cases[1]].seconds > 0
        and results[cases[1]].error < 1e-4
        and 0 < results[cases[1]].of_ceiling < 2
    )


@pytest.mark.parametrize("task", ["encoder", "network", "step"])
@pytest.mark.parametrize("tuner", ["adapter", "lora"])
def test_both_orders_compute_the_same_in_the_benchmark_itself(task, tuner):
    one, other = case(task=task, tuner=tuner, order="plain"), case(task=task, tuner=tuner)
    models = speed.networks([one, other], torch.device("cpu"))
    first, second = (speed.prepare(c, models[c])() for c in (one, other))
    assert speed.difference(second, first) < (1e-3 if task == "step" else 1e-5)
    assert torch.equal(
        speed.prepare(other, models[other])(), second
    )  # a step leaves the weights as they are


def test_memory_is_measured_with_the_large_pages_that_runs_have(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # given back after the test
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr(speed.multiprocessing, "get_context", lambda kind: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speed.peak_of(Case("step", "vit_t", "adapter", 64, 1, "fp32", "fast"), torch.device("cpu"))
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
