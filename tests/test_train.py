"""The pieces of training: learning rate, loss, optimiser, a step, and the folder of a run."""

import json
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, snapshot
from hypothesis import given
from hypothesis import strategies as st

from engine.budget import check_budget, explain_failure
from engine.checkpoints import save_tensors
from engine.console import Mistake
from engine.distributed import Team
from engine.folder import RunFolder, check_new, new_folder, unfinished_run
from engine.run import describe_model
from engine.settings import Settings
from engine.training import (
    Trainer,
    TrainingStopped,
    build_optimizer,
    class_weights,
    encode_in_parts,
    learning_rate,
    scored_weight,
    segmentation_loss,
)
from fast import accelerate
from mfnet import build_mfnet
from tuners import TUNERS, Tuner

# ----------------------------------------------------------------------------------------- training


@given(st.integers(1, 20), st.data())
def test_the_learning_rate_drops_to_a_tenth_after_epochs_25_35_and_45(steps, data):
    s = Settings(steps=steps, epochs=50, lr=0.01)
    for epochs, expected in (((1, 25), 1e-2), ((26, 35), 1e-3), ((36, 45), 1e-4), ((46, 50), 1e-5)):
        for epoch in epochs:
            step = (epoch - 1) * steps + data.draw(st.integers(0, steps - 1))
            assert learning_rate(step, s) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 60), st.integers(1, 20), st.booleans())
def test_a_run_of_any_length_drops_after_the_same_parts_of_it(epochs, steps, early):
    s = Settings(steps=steps, epochs=epochs, early_drops=early)
    total = epochs * steps
    for step in range(total):
        expected = sum(step / total >= (m - early) / 50 - 1e-12 for m in (25, 35, 45))
        assert learning_rate(step, s) == pytest.approx(0.01 * 0.1**expected, rel=1e-12)


def test_as_published_the_rate_drops_one_epoch_earlier():
    drops = []
    for early in (False, True):
        s = Settings(steps=2, epochs=50, early_drops=early)
        rates = [learning_rate(step, s) for step in range(100)]
        drops.append({i // 2 for i in range(1, 100) if rates[i] < rates[i - 1]})
    assert drops == [{25, 35, 45}, {24, 34, 44}]


@given(st.integers(1, 30), st.integers(1, 30), st.floats(1e-6, 1))
def test_the_cosine_rises_to_the_highest_rate_then_falls_and_stays_positive(epochs, steps, lr):
    s = Settings(schedule="cosine", epochs=epochs, steps=steps, lr=lr)
    rates = [learning_rate(step, s) for step in range(epochs * steps)]
    peak = rates.index(max(rates))
    assert rates[peak] == lr and min(rates) > 0 and peak <= 20
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert len(rates) < 10 or rates[-1] < 0.5 * lr


@given(st.integers(1, 30), st.floats(1e-6, 1))
def test_the_warmup_rises_evenly_to_the_rate_of_the_schedule(warmup, lr):
    s = Settings(warmup=warmup, epochs=10, steps=100, lr=lr)
    rates = [learning_rate(step, s) for step in range(warmup + 1)]
    assert rates == pytest.approx([lr * (i + 1) / (warmup + 1) for i in range(warmup + 1)])


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_the_loss_is_the_mean_cross_entropy_of_the_scored_pixels_and_0_where_there_is_none(
    B, K, side, share, seed
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, side, side, generator=generator, requires_grad=True)
    labels = torch.randint(K, (B, side, side), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < share] = 255
    loss = segmentation_loss(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    if (labels == 255).all():
        assert loss == 0 and not gradient.any()
    else:
        expected = F.cross_entropy(logits, labels, ignore_index=255)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_a_batch_without_a_scored_pixel_leaves_no_trace():
    logits = torch.randn(2, 6, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.fixture(scope="module")
def model():
    return build_mfnet("vit_t", "adapter")


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_holds_what_is_trained_and_nothing_else(model, name, kind):
    optimizer = build_optimizer(model, Settings(optimizer=name, weight_decay=0.125))
    (group,) = optimizer.param_groups
    assert (
        type(optimizer) is kind
        and group["weight_decay"] == 0.125
        and group.get("momentum", 0.9) == 0.9
    )
    assert {id(p) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_a_network_that_trains_anything_but_what_its_tuner_lists_is_refused(model):
    text = describe_model(model)
    assert all(
        re.search(rf"\b{group} [\d,]+", text)
        for group in ("encoder", "tuner", "fusion", "decoder", "frozen")
    )
    weight = model.image_encoder.patch_embed.proj.weight
    weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="tuner"):
        describe_model(model)
    weight.requires_grad_(False)


def test_class_weights_and_smoothing_are_those_of_torch_s_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    labels[0] = 255
    weights = torch.tensor([1.0, 2.0, 0.5])
    whole = F.cross_entropy(logits, labels, weights, ignore_index=255, label_smoothing=0.1)
    total = float(scored_weight(labels, weights))
    parts = [
        segmentation_loss(logits[i : i + 2], labels[i : i + 2], total, weights, 0.1) for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_a_batch_of_a_class_without_weight_counts_nothing_whatever_the_smoothing():
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    loss = segmentation_loss(
        logits, torch.zeros(2, 4, 4).long(), None, torch.tensor([0.0, 1.0]), 0.1
    )
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_class_weights_are_one_number_for_each_class():
    assert class_weights(Settings(class_weights="1,2,0.5"), [9, 9, 9]).tolist() == [1, 2, 0.5]
    assert class_weights(Settings(), [9, 9, 9]) is None
    for bad in ("1,2", "1,2,x", "1,2,-1", "0,0,0", "1,2,inf"):
        with pytest.raises(Mistake, match="--class-weights"):
            class_weights(Settings(class_weights=bad), [9, 9, 9])


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=8).filter(any))
def test_balanced_weights_fall_with_the_root_of_the_share_and_keep_the_scale_of_the_loss(pixels):
    weights = class_weights(Settings(class_weights="balanced"), pixels).double()
    counts = torch.tensor(pixels).double()
    assert ((weights == 0) == (counts == 0)).all()
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)  # of the mean pixel
    common = counts > counts.sum() / 1000
    products = (weights * counts.sqrt())[common]  # the same for all
    assert torch.allclose(products, products[:1], rtol=1e-5)
    rare = weights[(counts > 0) & ~common]
    assert (rare <= weights[common].min() * 1000**0.5 * (1 + 1e-5)).all()


# ------------------------------------------------------------------------------------------ a step


def batch(B=4, K=6, size=64, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rasters = [torch.rand(B, 3, size, size, generator=g), torch.rand(B, size, size, generator=g)]
    labels = torch.randint(0, K, (B, size, size), generator=g)
    return [r.to(dtype) for r in rasters], labels


def trainer(seed=0, tuner="lora", dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = accelerate(build_mfnet(TINY, tuner)).to(dtype)
    return Trainer(model, Settings(precision="fp32", **changes), Team(), [1] * 6)


def moved(*steps, **changes):
    """The weights of a trainer after steps, as one vector."""
    t = trainer(**changes)
    for rasters, labels in steps:
        t.model.train()
        t.step(rasters, labels)
    return torch.cat([p.detach().flatten() for p in t.trained()])


@pytest.mark.parametrize("weights, smoothing", [("", 0.0), ("1,2,3,4,5,6", 0.1)])
def test_a_step_is_that_of_torch_s_own_optimiser_at_the_rate_of_the_schedule(weights, smoothing):
    rasters, labels = batch()
    changes = dict(class_weights=weights, label_smoothing=smoothing)
    t = trainer(lr=0.1, warmup=3, weight_decay=0.01, **changes)
    weight = torch.arange(1.0, 7) if weights else None
    reference = trainer().model
    optimizer = torch.optim.SGD(
        [p for p in reference.parameters() if p.requires_grad],
        lr=1,
        momentum=0.9,
        weight_decay=0.01,
    )
    for step, rate in enumerate((0.025, 0.05, 0.075, 0.1)):
        t.model.train()
        t.step(rasters, labels)
        reference.train()
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(*rasters), labels, weight, label_smoothing=smoothing)
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for a, b in zip(t.model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(clip=1e-3),
        dict(class_weights="1,2,3,4,5,6"),
        dict(label_smoothing=0.2),
        dict(seed=1),
        dict(lr=0.02),
        dict(weight_decay=0.1),
        dict(optimizer="adamw"),
        dict(warmup=5),
    ],
    ids=str,
)
def test_a_setting_of_the_training_moves_the_weights(changes):
    one = batch()
    assert not torch.equal(moved(one), moved(one, **changes))


def test_the_gradient_is_clipped_to_the_given_norm():
    rasters, labels = batch()
    t = trainer(clip=1e-3)
    t.model.train()
    t.step(rasters, labels)
    norms = torch.stack([p.grad.norm() for p in t.trained()])
    assert norms.norm() == pytest.approx(1e-3, rel=1e-3)


@cache
def step_in_parts(tuner, parts):
    """(loss, gradients, state) of a network after a step on ten images."""
    rasters, labels = batch(10, dtype=torch.float64)
    t = trainer(tuner=tuner, dtype=torch.float64, batch_size=10, accumulate=parts)
    t.model.train()
    loss = t.step(rasters, labels)
    gradients = {n: p.grad for n, p in t.model.named_parameters() if p.grad is not None}
    return loss, gradients, snapshot(t.model)


@pytest.mark.parametrize("tuner", ["lora", "adapter", "full"])
@pytest.mark.parametrize("parts", [2, 5])
def test_a_batch_in_parts_has_the_gradients_and_statistics_of_the_whole(tuner, parts):
    loss, gradients, state = step_in_parts(tuner, 1)
    loss_again, gradients_again, state_again = step_in_parts(tuner, parts)
    assert loss == pytest.approx(loss_again, rel=1e-12)
    assert gradients.keys() == gradients_again.keys()
    for name, g in gradients.items():
        assert (g - gradients_again[name]).norm() <= 1e-9 * (g.norm() + 1e-6), name
    assert all(torch.allclose(state[n].double(), state_again[n].double(), atol=1e-9) for n in state)


def test_the_encoder_takes_a_batch_in_parts_and_keeps_no_more_than_one():
    seen = []
    model = build_mfnet(TINY, "lora")
    model.image_encoder.blocks[0].register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    encode_in_parts(model, 5)
    rasters, _ = batch(10)
    model.train()(*rasters).sum().backward()
    assert seen == 2 * 5 * [4]  # forward and again in the backward pass, two crops of two rasters
    with torch.no_grad():
        model(*rasters)
    assert seen[-1] == 20


def test_a_tuner_that_normalises_over_the_batch_is_not_taken_in_parts(monkeypatch):
    class Normalised(Tuner):
        def __init__(self, block, modalities):
            super().__init__(block, modalities)
            self.bn = nn.BatchNorm2d(self.width)

    monkeypatch.setitem(TUNERS, "normalised", Normalised)
    with pytest.raises(Mistake, match="--accumulate 2: the tuner normalised"):
        trainer(tuner="normalised", accumulate=2, batch_size=4)


def test_dropout_in_a_tuner_is_the_same_again_under_checkpointing_and_in_parts(monkeypatch):
    class Dropping(Tuner):
        def __init__(self, block, modalities):
            super().__init__(block, modalities)
            self.scale = nn.Parameter(torch.ones(self.width))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return super().forward(x) * self.drop(self.scale.expand_as(x))

    monkeypatch.setitem(TUNERS, "dropping", Dropping)

    def gradients(parts=1, checkpointing=False):
        torch.manual_seed(0)
        model = accelerate(build_mfnet(TINY, "dropping"), checkpointing=checkpointing)
        if parts > 1:
            encode_in_parts(model, parts)
        torch.manual_seed(1)
        model.train()(*batch(4)[0]).sum().backward()
        return torch.cat([block.scale.grad for block in model.image_encoder.blocks])

    torch.testing.assert_close(gradients(), gradients(checkpointing=True))
    again = gradients(parts=2)
    monkeypatch.setattr("engine.training.checkpoint", lambda f, x, use_reentrant: f(x))
    torch.testing.assert_close(again, gradients(parts=2))


def test_compiling_is_refused_on_a_cpu_and_done_elsewhere(monkeypatch):
    with pytest.raises(Mistake, match="--compile is for a GPU"):
        trainer(compile=True)
    compiled = []
    model = build_mfnet(TINY, "lora")
    for block in model.image_encoder.blocks:
        block.compile = lambda: compiled.append(block)
    meta = model.to("meta")
    Trainer(meta, Settings(compile=True), Team(), [1] * 6)
    assert len(compiled) == TINY["depth"]


# ------------------------------------------------------------------------------- what is no number


def poison(value):
    def hook(module, inputs, output):
        return output * value

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_any_weight_moves(value):
    t, (rasters, labels) = trainer(), batch()
    t.model.register_forward_hook(poison(value))
    t.model.train()
    before = [p.detach().clone() for p in t.trained()]
    with pytest.raises(TrainingStopped, match="the loss is .* at step 1"):
        t.step(rasters, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, t.trained())) and t.progress.step == 0


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_stops_before_any_weight_moves(clip):
    t, (rasters, labels) = trainer(clip=clip), batch()
    weight = next(iter(t.trained()))
    weight.register_hook(lambda g: g * float("nan"))
    t.model.train()
    before = [p.detach().clone() for p in t.trained()]
    with pytest.raises(TrainingStopped, match="the gradient is nan at step 1"):
        t.step(rasters, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, t.trained()))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_weights_that_are_no_numbers_or_absurd_are_not_to_be_saved(value):
    t = trainer()
    t.check_weights()
    with torch.no_grad():
        t.trained()[-1].view(-1)[0] = value
    with pytest.raises(TrainingStopped, match="weights are not finite"):
        t.check_weights()


# ------------------------------------------------------------------------------------------ limits


def test_a_run_that_no_machine_holds_is_refused_before_anything_is_allocated():
    cpu = torch.device("cpu")
    base = dict(encoder="vit_t", weights="none", precision="fp32", crop=64)
    check_budget(Settings(**base), 6, cpu, 1)
    for changes, part in (
        (dict(tuner="lora", tuner_option={"rank": 100_000_000}), "fewer trained parameters"),
        (dict(batch_size=100_000_000), "--batch-size 100000000"),
        (dict(workers=100_000), "--workers 100000"),
    ):
        with pytest.raises(Mistake, match=part):
            check_budget(Settings(**{**base, **changes}), 6, cpu, 1)


def test_what_a_run_needs_grows_with_what_is_trained_and_shrinks_with_processes(monkeypatch):
    monkeypatch.setattr("engine.budget.total_memory", lambda device: 60.0)
    base = dict(encoder="vit_t", precision="fp32", crop=64)
    cpu = torch.device("cpu")
    check_budget(Settings(**base, batch_size=40), 6, cpu, 1)
    for changes, world in ((dict(batch_size=400), 1), (dict(tuner="full", optimizer="adamw"), 1)):
        with pytest.raises(Mistake):
            check_budget(Settings(**{**base, **changes}), 6, cpu, world)
    check_budget(Settings(**base, batch_size=400), 6, cpu, 10)


@pytest.mark.parametrize(
    "error, parts",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            [
                "MB",
                "--accumulate 2",
                "--gradient-checkpointing",
                "--precision bf16",
                "--resume --out run",
            ],
        ),
        (MemoryError("Unable to allocate 3 TiB"), ["--accumulate 2", "--gradient-checkpointing"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--accumulate 2"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), ["--workers 0"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_that_was_foreseen_ends_with_the_ways_out(error, parts):
    s = Settings(batch_size=10, out="run", precision="fp32")
    line = str(explain_failure(error, s, torch.device("cpu")))
    assert "\n" not in line and all(part in line for part in parts), line
    assert explain_failure(RuntimeError("something else"), s, torch.device("cpu")) is None


# --------------------------------------------------------------------------------- the run's folder


def begun(folder, step=0):
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(settings={}, base={}, data="", state={}, optimizer={}, progress={"step": step})
    save_tensors(folder / "last.pt", content)
    return folder


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    folders = [new_folder(Settings(data="tiles", tuner="lora"), Team()).path for _ in range(3)]
    assert len(set(folders)) == 3 and all(f.is_dir() and f.parent.name == "runs" for f in folders)
    assert folders[0].name == "20250101-000000_tiles_lora"


@pytest.mark.parametrize("name", ["model.pt", "scores.json", "log.jsonl", "last.pt"])
def test_a_folder_that_holds_what_a_run_would_overwrite_is_refused(tmp_path, name):
    if name == "last.pt":
        begun(tmp_path, step=3)
    else:
        (tmp_path / name).write_text("mine")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(Mistake, match=f"{tmp_path} holds .*another --out"):
        new_folder(Settings(out=str(tmp_path)), Team())
    assert (tmp_path / name).read_bytes() == before


def test_a_run_that_died_before_its_first_step_can_be_begun_again(tmp_path):
    begun(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    check_new(tmp_path / "run")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    check_new(tmp_path / "config")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="cannot be made"):
        new_folder(Settings(out=str(tmp_path / "file" / "run")), Team())


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.hold()
    with pytest.raises(Mistake, match=f"{tmp_path} is being trained by another process"):
        second.hold()
    first.release()
    second.hold()
    second.release()


def test_the_newest_run_that_is_not_finished_is_gone_on_with(tmp_path):
    with pytest.raises(Mistake, match="no unfinished run"):
        unfinished_run(tmp_path)
    begun(tmp_path / "open", step=2)
    done = begun(tmp_path / "done", step=9)
    (done / "scores.json").write_text("{}")
    assert unfinished_run(tmp_path) == tmp_path / "open"
    seed = tmp_path / "three" / "seed-1"
    seed.mkdir(parents=True)
    (seed / "last.pt").touch()
    os.utime(seed / "last.pt", (2**31 - 1, 2**31 - 1))
    assert unfinished_run(tmp_path) == seed


def test_the_log_has_one_line_for_each_step_whatever_was_logged_before(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6, 4):
        folder.append_log({"step": step, "try": step})
    folder.amend_log(miou=0.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "try": 2}, {"step": 4, "try": 4, "miou": 0.5}]


@pytest.mark.parametrize(
    "step, expected",
    [(0, "new"), (5, "old; from step 5: new"), (10, "old")],
    ids=["begun again", "gone on with", "only scored again"],
)
def test_the_code_that_is_named_with_a_run_is_the_code_that_trained_it(tmp_path, step, expected):
    folder = RunFolder(tmp_path)
    assert folder.versions("old", 0, 10) == "old"
    folder.write_json("config.json", {"version": "old"})
    assert folder.versions("new", step, 10) == expected
    assert folder.versions("old", step, 10) == "old"


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(TrainingStopped, match="No space left.*make room.*--resume"):
        with folder.writing():
            raise OSError(28, "No space left on device")
    folder.path.rmdir()
    with pytest.raises(TrainingStopped, match="run is gone"):
        with folder.writing():
            Path(folder / "last.pt").write_text("")
    with pytest.raises(RuntimeError, match="a bug"):
        with RunFolder(tmp_path).writing():
            raise RuntimeError("a bug")
