"""The numbers of the published implementations, from goldens/: the same weights and inputs give the
same results.

Weights and inputs are made by `goldens/detfill.py` from names and a seed. All tolerances are
relative to the largest absolute value of the published array, except that every gradient norm is
held to its own size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from goldens.detfill import det_input, fill_state_dict

from fast import accelerate
from mfnet import build_mfnet, load_published_weights
from sam_vit import Block, build_image_encoder
from tuners import TUNERS

GOLDENS = Path(__file__).parent / "goldens"


def read_golden(name):
    """The golden's settings, published arrays and the weights it was computed with."""
    settings = json.loads((GOLDENS / f"{name}.json").read_text())
    shapes = {n: shape for n, (shape, _) in settings["keys"].items()}
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        published = {n: torch.tensor(arrays[n]) for n in arrays}
    weights = {n: torch.as_tensor(a) for n, a in fill_state_dict(shapes, settings["seed"]).items()}
    return settings, published, weights


def error(found, published):
    assert found.shape == published.shape
    return ((found - published).abs().max() / published.abs().max()).item()


def test_the_encoder_equals_metas():
    settings, published, weights = read_golden("sam_encoder")
    encoder = build_image_encoder(settings["encoder"])
    encoder.load_state_dict(weights)
    x = torch.tensor(det_input((settings["batch"], 3, 256, 256), settings["seed"], "image"))
    with torch.no_grad():
        assert error(encoder(x)[:, ::8], published["out"]) < 2e-5


@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_standard_blocks_are_the_published_ablations(name, quick):
    settings = json.loads((GOLDENS / "standard_blocks.json").read_text())
    (h, w), C, seed = settings["hw"], settings["dim"], settings["seed"]
    filled = fill_state_dict(settings["keys"][name], seed)
    filled = {n.replace(".rel_", ".rel_pos_"): torch.as_tensor(a) for n, a in filled.items()}
    block = Block(C, settings["num_heads"], 4.0, table_size=4, window=settings["window"])
    tuned = TUNERS[f"standard-{name}"](block, 2)
    given = {n: t for n, t in filled.items() if n in tuned.state_dict()}
    for m, (xy, published) in enumerate((("x", "Img_Adapter"), ("y", "DSM_Adapter"))):
        for n in tuned.state_dict():
            if n.startswith(f"attn_adapters.{m}"):
                given[n] = filled[n.replace(f"attn_adapters.{m}.", f"{published}.D_")]
            elif "lora_" in n:  # (M, slices, rows, columns); published: (slices * rows, columns)
                stacked = given.setdefault(n, torch.zeros_like(tuned.state_dict()[n]))
                stacked[m] = filled[n + xy].view_as(stacked[m])
    tuned.load_state_dict(given)
    if quick:
        accelerate(SimpleNamespace(blocks=[tuned]))
    x = [torch.tensor(det_input((2, h, w, C), seed, kind) - 0.5) for kind in ("image", "dsm")]
    with torch.no_grad():
        found = tuned(torch.cat(x)).chunk(2)
    with np.load(GOLDENS / "standard_blocks.npz") as arrays:
        for stream, kind in zip(found, ("image", "dsm")):
            assert error(stream, torch.tensor(arrays[f"{name}_{kind}"])) < 1e-5


# -------------------------------------------------------------------------------------- the network


def parameters_by_modality(model):
    """(name, parameter, index): one entry for each modality that a parameter stacks, one entry for
    any other.
    """
    for name, p in model.named_parameters():
        if name.endswith(("lora_A", "lora_B", "mixing")):
            yield from ((f"{name}[{m}]", p, m) for m in range(len(p)))
        else:
            yield name, p, ...


def value(tensor):
    return tensor.detach().numpy().tobytes()


@pytest.fixture(scope="module", params=["adapter", "lora"])
def run(request):
    """One network with the published weights: its outputs and gradients in eval mode, then three
    steps of training.
    """
    settings, published, weights = read_golden(f"mfnet_{request.param}")
    seed, (H, W), B, K = (
        settings["seed"],
        settings["hw"],
        settings["batch"],
        settings["num_classes"],
    )
    image = torch.tensor(det_input((B, 3, H, W), seed, "image"))
    dsm = torch.tensor(det_input((B, H, W), seed, "dsm"))
    labels = torch.tensor(det_input((B, H, W), seed, "label") * K).long()
    model = build_mfnet(settings["encoder"], request.param, K)
    load_published_weights(model, weights)

    # Each published parameter is told by its value, so that these tests rest on no table of names.
    ours = {value(p[m]): name for name, p, m in parameters_by_modality(model)}
    translated = {n: ours[value(weights[n.removeprefix("sam.")])] for n in settings["grad_norm"]}

    model.eval()
    with torch.no_grad():
        encoded = model.encode(image, dsm)
    logits = model(image, dsm)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    gradients = {
        n: p.grad[m].clone() for n, p, m in parameters_by_modality(model) if p.grad is not None
    }

    model.train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)
    train_losses = []
    for _ in range(3):
        optimizer.zero_grad()
        step_loss = F.cross_entropy(model(image, dsm), labels)
        step_loss.backward()
        optimizer.step()
        train_losses.append(step_loss.item())
    return SimpleNamespace(
        settings=settings,
        published=published,
        encoded=encoded,
        logits=logits.detach(),
        loss=loss.detach(),
        translated=translated,
        gradients=gradients,
        train_losses=torch.tensor(train_losses),
    )


def test_the_maps_of_both_modalities_equal_the_published(run):
    for found, name in zip(run.encoded, ("enc_image", "enc_dsm"), strict=True):
        assert error(found[:, ::8], run.published[name]) < 2e-5


def test_the_logits_equal_the_published(run):
    stride = run.settings["logits_stride"]
    assert error(run.logits[..., ::stride, ::stride], run.published["logits_sub"]) < 2e-4


def test_mean_and_spread_of_all_logits_equal_the_published(run):
    assert error(run.logits.mean((2, 3)), run.published["logits_mean"]) < 2e-4
    assert error(run.logits.std((2, 3)), run.published["logits_std"]) < 2e-4


def test_the_loss_equals_the_published(run):
    assert error(run.loss, run.published["loss"]) < 1e-5


def test_exactly_the_published_parameters_receive_a_gradient(run):
    assert len(run.translated) == len(run.settings["grad_norm"])
    assert sorted(run.translated.values()) == sorted(run.gradients)


def test_every_gradient_has_the_published_norm(run):
    for name, norm in run.settings["grad_norm"].items():
        found = run.gradients[run.translated[name]].norm().item()
        assert abs(found - norm) < 1e-3 * norm, name


def test_three_steps_of_sgd_equal_the_published(run):
    assert error(run.train_losses, run.published["train_losses"]) < 1e-4
