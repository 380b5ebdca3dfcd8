"""The pieces of training: recipes, settings, learning rate, loss, and the folder of a run."""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from engine.distributed import Team
from engine.settings import RECIPES, Settings, check_settings, learning_rate, parse_settings
from engine.training import build_optimizer, segmentation_loss
from geodata.layouts import DATASETS
from geodata.rasters import DataError
from mfnet import build_mfnet
from train import describe_model, new_folder

# ----------------------------------------------------------------------------------------- settings


def test_the_recipe_of_vaihingen_is_the_paper_s():
    settings, given_by_hand, args = parse_settings(["--data", "vaihingen"])
    paper = dict(
        encoder="vit_l", weights="auto", tuner="adapter", mixing=True, modalities="image+dsm", fusion="dfm", crop=256,
        batch_size=10, epochs=50, steps=1000, optimizer="sgd", lr=0.01, weight_decay=5e-4, schedule="multistep",
        eval_stride=32, precision="fp32",
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in paper} == paper
    assert given_by_hand == {"data": "vaihingen"} and not args.resume


@pytest.mark.parametrize(
    "data, encoder, weights", [("tiles", "vit_l", "auto"), ("synthetic", "vit_t", "none")]
)
def test_the_other_recipes_are_short_ones_of_adamw(data, encoder, weights):
    settings, _, _ = parse_settings(["--data", data])
    assert (settings.encoder, settings.weights, settings.optimizer) == (encoder, weights, "adamw")
    assert settings.epochs * settings.steps <= 500


def test_every_data_set_has_a_recipe_of_settings_that_work():
    names = {f.name for f in dataclasses.fields(Settings)}
    assert set(RECIPES) == set(DATASETS)
    for data, recipe in RECIPES.items():
        assert recipe.keys() <= names
        check_settings(Settings(data=data, **recipe))


def test_the_command_line_without_a_word_is_the_synthetic_city():
    settings, given_by_hand, _ = parse_settings([])
    assert (
        settings.data == "synthetic" and given_by_hand == {} and settings.root.endswith("synthetic")
    )


def test_what_is_given_by_hand_overrides_the_recipe_and_nothing_else():
    flags = (
        "--data tiles --epochs 3 --lr 0.5 --optimizer sgd --no-mixing --root /a --resume".split()
    )
    settings, given_by_hand, args = parse_settings(flags)
    changed = dict(data="tiles", epochs=3, lr=0.5, optimizer="sgd", mixing=False, root="/a")
    assert given_by_hand == changed and args.resume
    assert dataclasses.asdict(settings) == {
        **dataclasses.asdict(Settings()),
        **RECIPES["tiles"],
        **changed,
    }


@pytest.mark.parametrize("f", dataclasses.fields(Settings), ids=lambda f: f.name)
def test_every_setting_is_a_flag_that_is_read_in_its_own_type(f):
    flag = "--" + f.name.replace("_", "-")
    value = {"int": 65, "float": 0.25, "str": (f.metadata["choices"] or ("x",))[-1], "bool": False}[
        f.type
    ]
    words = ["--no-" + flag[2:]] if f.type == "bool" else [flag, str(value)]
    extra = {
        "crop": ["--eval-stride", "65"],
        "select": ["--val", "2"],
        "accumulate": ["--batch-size", "130"],
    }.get(f.name, [])
    extra += ["--select", "last"] if f.name == "val" else []
    settings, _, _ = parse_settings([*words, *extra])
    assert getattr(settings, f.name) == value and type(getattr(settings, f.name)) is type(f.default)


BAD = "crop 32, eval-stride 0, eval-stride 129, batch-size 0, epochs 0, steps -1, rank 0, lr 0, lr nan, lr inf"


@pytest.mark.parametrize("words", BAD.split(", "))
def test_a_setting_that_cannot_work_is_refused_by_its_flag(words):
    with pytest.raises(DataError, match=f"--{words}"):
        parse_settings(f"--{words}".split())


# ----------------------------------------------------------------------------------------- training


@given(st.integers(1, 20), st.data())
def test_the_learning_rate_drops_to_a_tenth_after_epochs_25_35_and_45(steps, data):
    s = Settings(steps=steps, epochs=50, lr=0.01)
    for epochs, expected in (((1, 25), 1e-2), ((26, 35), 1e-3), ((36, 45), 1e-4), ((46, 50), 1e-5)):
        for epoch in epochs:
            step = (epoch - 1) * steps + data.draw(st.integers(0, steps - 1))
            assert learning_rate(step, s) == pytest.approx(expected, rel=1e-12)


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


# --------------------------------------------------------------------------------- the run's folder


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20250101-000000")
    folders = [new_folder(Settings(data="tiles", tuner="lora"), Team()) for _ in range(3)]
    assert len(set(folders)) == 3 and all(f.is_dir() and f.parent.name == "runs" for f in folders)
    assert folders[0].name == "20250101-000000_tiles_lora"


def test_a_folder_that_holds_a_run_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="holds a run already.*--resume"):
        new_folder(Settings(out=str(tmp_path)), Team())
    with pytest.raises(DataError, match="cannot be made"):
        new_folder(Settings(out=str(tmp_path / "config.json" / "run")), Team())
