"""The network on any size and any rasters, its parts against oracles, its parameter counts, the
published weights.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import TINY, randomise, same_state, snapshot
from goldens.detfill import fill_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import mfnet
from dfm import DeepFusionModule
from mfnet import build_mfnet, count_parameters, load_published_weights, trained_names
from sam_vit import LayerNorm2d, WeightsError
from tuners import TUNERS

GOLDENS = Path(__file__).parent / "goldens"
pixels = st.integers(64, 150)
every_tuner = pytest.mark.parametrize("tuner", TUNERS)


@cache
def small_model(modalities=2, tuner="adapter", fusion="dfm"):
    torch.manual_seed(0)
    model = build_mfnet(TINY, tuner, num_classes=5, modalities=modalities, fusion=fusion)
    return randomise(model).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------- the network


@settings(max_examples=15)
@given(H=pixels, W=pixels, modalities=st.integers(1, 3), fusion=st.sampled_from(["dfm", "sum"]))
def test_any_size_from_64_up_gives_logits_of_that_size(H, W, modalities, fusion):
    rasters = [torch.rand(1, 3, H, W), *torch.rand(modalities - 1, 1, H, W)]
    logits = small_model(modalities, fusion=fusion)(*rasters)
    assert logits.shape == (1, 5, H, W) and logits.isfinite().all()


@settings(max_examples=15)
@given(H=pixels, W=pixels)
def test_an_odd_size_equals_reflecting_to_the_next_multiple_of_32_first(H, W):
    model, image, dsm = small_model(), torch.rand(1, 3, H, W), torch.rand(1, 1, H, W)
    padding = (0, -W % 32, 0, -H % 32)
    first = model(F.pad(image, padding, mode="reflect"), F.pad(dsm, padding, mode="reflect"))
    assert_close(model(image, dsm), first[..., :H, :W])


def test_a_height_raster_may_come_without_its_channel_or_repeated_to_three():
    model, image, dsm = small_model(), torch.rand(2, 3, 64, 96), torch.rand(2, 64, 96)
    logits = model(image, dsm)
    assert torch.equal(model(image, dsm[:, None]), logits)
    assert torch.equal(model(image, dsm[:, None].repeat(1, 3, 1, 1)), logits)


def test_a_network_of_heights_alone_takes_them_in_their_place():
    model, dsm = small_model(modalities=1), torch.rand(2, 64, 64)
    assert torch.equal(model(None, dsm), model(dsm[:, None].repeat(1, 3, 1, 1)))


def test_encode_gives_one_map_for_each_modality_in_their_order():
    model = small_model(tuner="frozen")
    image, dsm = torch.rand(2, 3, 64, 96), torch.rand(2, 64, 96)
    of_image, of_dsm = model.encode(image, dsm)
    assert_close(of_image, model.image_encoder(image))
    assert_close(of_dsm, model.image_encoder(dsm[:, None].repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("tuner", ["adapter", "lora"])
def test_a_sample_does_not_see_its_batch(modalities, tuner):
    model = small_model(modalities, tuner)
    rasters = [torch.rand(3, 3, 64, 80), *torch.rand(modalities - 1, 3, 64, 80)]
    alone = model(*(r[1:2] for r in rasters))
    assert_close(model(*rasters)[1:2], alone, atol=1e-5 * alone.abs().max().item(), rtol=0)


@pytest.mark.parametrize("fusion", ["dfm", "sum"])
def test_every_modality_reaches_the_logits(fusion):
    model = small_model(3, "frozen", fusion)
    rasters = torch.rand(3, 1, 3, 64, 64)
    logits = model(*rasters)
    for m in range(3):
        moved = rasters.clone()
        moved[m] = 1 - moved[m]
        assert (model(*moved) - logits).abs().max() > 1e-3


IMAGE, DSM = torch.rand(2, 3, 64, 64), torch.rand(2, 64, 64)
REFUSED = {
    "one of two": (IMAGE,),
    "three for two": (IMAGE, DSM, DSM),
    "none": (None,),
    "another height": (IMAGE, torch.rand(2, 65, 64)),
    "another width": (IMAGE, torch.rand(2, 1, 64, 96)),
    "another batch": (IMAGE, torch.rand(4, 64, 64)),
    "too low": (IMAGE[:, :, :63], DSM[:, :63]),
    "too narrow": (IMAGE[..., :63], DSM[..., :63]),
}


@pytest.mark.parametrize("rasters", REFUSED.values(), ids=REFUSED)
def test_rasters_that_do_not_fit_are_refused(rasters):
    with pytest.raises(ValueError):
        small_model()(*rasters)


def test_a_tenth_of_the_last_channels_is_dropped_in_training():
    assert [m.p for m in small_model().modules() if isinstance(m, nn.Dropout2d)] == [0.1]


def test_an_unknown_fusion_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'cat'.*dfm, sum"):
        build_mfnet(TINY, fusion="cat")


# ---------------------------------------------------------------------------------------- its parts


def bounce(n, size):
    """The first `size` positions of a walk to and fro over n places."""
    walk, step = [0], 1
    while len(walk) < size:
        if not 0 <= walk[-1] + step < n:
            step = -step
        walk.append(walk[-1] + step if n > 1 else 0)
    return walk[:size]


@given(
    H=st.integers(1, 9), W=st.integers(1, 9), more_h=st.integers(0, 30), more_w=st.integers(0, 30)
)
def test_reflection_goes_to_and_fro_as_often_as_needed(H, W, more_h, more_w):
    x = torch.randn(2, H, W)
    found = mfnet.reflect_pad(x, H + more_h, W + more_w)
    assert torch.equal(found, x[:, bounce(H, H + more_h)][..., bounce(W, W + more_w)])
    if more_h < H and more_w < W:
        assert torch.equal(found, F.pad(x, (0, more_w, 0, more_h), mode="reflect"))


@given(
    h=st.integers(1, 5).map(lambda n: 2 * n),
    w=st.integers(1, 5).map(lambda n: 2 * n),
    modalities=st.integers(1, 3),
)
def test_deep_fusion_reweights_and_adds_pyramids_at_four_strides(h, w, modalities):
    fusion = randomise(DeepFusionModule(16, modalities).eval().requires_grad_(False))
    maps = torch.randn(modalities, 2, 16, h, w)
    found = fusion(tuple(maps))
    assert [tuple(f.shape[-2:]) for f in found] == [
        (4 * h, 4 * w),
        (2 * h, 2 * w),
        (h, w),
        (h // 2, w // 2),
    ]
    for level, scaled in (
        (2, maps),
        (3, maps.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-3, -1))),
    ):
        wanted = scaled[0] if modalities == 1 else 0  # one alone is passed on as it is
        for m, x in enumerate(scaled if modalities > 1 else ()):
            squeeze, _, excite, _ = fusion.levels[level].se[m].fc
            hidden = torch.relu(x.mean((2, 3)) @ squeeze.weight[..., 0, 0].T + squeeze.bias)
            weight = torch.sigmoid(hidden @ excite.weight[..., 0, 0].T + excite.bias)
            wanted = wanted + x * weight[:, :, None, None]
        assert_close(found[level], wanted)


@pytest.mark.parametrize("fusion", ["dfm", "sum"])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_a_forward_pass_tells_its_intermediates_on_request(fusion, modalities):
    model = randomise(build_mfnet(TINY, "lora", 3, modalities, fusion)).eval()
    rasters, seen = [torch.rand(2, 3, 70, 100) for _ in range(modalities)], {}
    with torch.no_grad():
        logits = model(*rasters, seen=seen)
        assert torch.equal(logits, model(*rasters)) and torch.equal(logits, seen["logits"])
        maps = model.encode(*rasters)
    assert len(seen["maps"]) == modalities
    assert all(torch.equal(a, b) for a, b in zip(seen["maps"], maps))
    assert [tuple(b.shape) for b in seen["blocks"]] == [(2 * modalities, 6, 8, 32)] * 2
    assert len(seen["levels"]) == len(seen["fused"]) == (4 if fusion == "dfm" else 1)
    for level, fused in zip(seen["levels"], seen["fused"]):
        assert len(level["parts"]) == modalities
        assert_close(sum(level["parts"]), fused)
        gates = modalities if fusion == "dfm" and modalities > 1 else 0
        assert [tuple(g.shape) for g in level["gates"]] == [(2, 256, 1, 1)] * gates
    assert [x.shape[1] for x in seen["decoder"]] == [64] * 4
    head = model.decoder.segmentation_head(seen["decoder"][-1])
    assert_close(F.interpolate(head, (96, 128), mode="bilinear")[..., :70, :100], logits)


def test_the_decoder_s_activations_end_at_6():
    layer = mfnet.conv_bn_relu(1, 1, 1).eval()
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
        out = layer(torch.tensor([-1.0, 5.0, 60.0]).view(1, 1, 1, 3))
    assert_close(out.flatten(), torch.tensor([0.0, 5.0, 6.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_another_number_of_channels_than_one_or_three_is_refused(channels):
    with pytest.raises(ValueError, match="one or three channels"):
        build_mfnet(TINY, "frozen")(torch.rand(1, channels, 64, 64), torch.rand(1, 64, 64))


def test_only_the_first_pyramid_normalises_by_layer():
    norms = [type(pyramid.up4[1]) for pyramid in DeepFusionModule(16, 3).pyramids]
    assert norms == [LayerNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]


@given(H=st.integers(2, 12), W=st.integers(2, 12), half=st.integers(1, 4))
def test_rows_and_columns_are_averaged_over_one_reflection_and_zeros(H, W, half):
    x, size = torch.randn(H, W, dtype=torch.float64), 2 * half
    tall, wide = torch.cat([x, x[-2:-1]]), torch.cat([x, x[:, -2:-1]], dim=1)
    wanted = torch.zeros_like(x)
    for i in range(H):
        for j in range(W):
            rows = tall[max(i - half + 1, 0) : i + half + 1, j]
            cols = wide[i, max(j - half + 1, 0) : j + half + 1]
            wanted[i, j] = (rows.sum() + cols.sum()) / size  # what is missing counts as zero
    assert_close(mfnet.average_rows_and_columns(x[None, None], size)[0, 0], wanted)


@settings(max_examples=15)
@given(H=st.integers(2, 9), W=st.integers(2, 9), window=st.sampled_from([2, 4]))
def test_the_decoders_attention_equals_window_by_window_on_reflected_pixels(H, W, window):
    C, heads, d = 6, 2, 3
    attn = randomise(mfnet.GlobalLocalAttention(C, heads, window).double().requires_grad_(False))
    x = torch.randn(1, C, H, W, dtype=torch.float64)
    padded = x[0][:, bounce(H, H + -H % window)][..., bounce(W, W + -W % window)]
    out = torch.empty_like(padded)
    at = [(i, j) for i in range(window) for j in range(window)]
    offsets = [
        [(a - c + window - 1) * (2 * window - 1) + b - e + window - 1 for c, e in at] for a, b in at
    ]
    bias = attn.relative_position_bias_table[torch.tensor(offsets)]  # (tokens, tokens, heads)
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            here = slice(None), slice(top, top + window), slice(left, left + window)
            qkv = attn.qkv.weight[..., 0, 0] @ padded[here].reshape(C, -1)
            for head in range(heads):
                q, k, v = (qkv[part + head * d : part + (head + 1) * d] for part in (0, C, 2 * C))
                weights = torch.softmax(q.T @ k / d**0.5 + bias[..., head], dim=1)
                out[here][head * d : (head + 1) * d] = (v @ weights.T).view(d, window, window)
    assert_close(attn.window_attention(x), out[None, :, :H, :W])


# ----------------------------------------------------------------------------------- the parameters

PUBLISHED_COUNTS = {  # encoder, tuner, trainable (docs/method.md, Parameters)
    ("vit_b", "adapter"): (89_670_912, 14_201_880, 16_360_118),
    ("vit_b", "lora"): (89_670_912, 1_032_240, 3_190_478),
    ("vit_l", "adapter"): (308_278_272, 50_454_576, 52_612_814),
    ("vit_l", "lora"): (308_278_272, 2_752_608, 4_910_846),
    ("vit_h", "adapter"): (637_026_048, 105_062_464, 107_220_702),
    ("vit_h", "lora"): (637_026_048, 4_587_648, 6_745_886),
}


@pytest.mark.parametrize("size, tuner", PUBLISHED_COUNTS)
def test_parameter_counts_are_the_papers(size, tuner):
    with torch.device("meta"):
        counts = count_parameters(build_mfnet(size, tuner))
    encoder, tuned, trainable = PUBLISHED_COUNTS[size, tuner]
    parts = dict(encoder=encoder, tuner=tuned, fusion=1_643_136, decoder=515_102)
    assert counts == {**parts, "total": sum(parts.values()), "trainable": trainable}


@every_tuner
@pytest.mark.parametrize("fusion", ["dfm", "sum"])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_exactly_the_tuner_fusion_and_decoder_are_trained(tuner, fusion, modalities):
    model = build_mfnet(TINY, tuner, modalities=modalities, fusion=fusion)
    named = dict(model.named_parameters())
    assert trained_names(model) == [n for n, p in named.items() if p.requires_grad]
    assert all(named[n].requires_grad for n in named if not n.startswith("image_encoder."))
    counts = count_parameters(model)
    assert counts["trainable"] == sum(p.numel() for p in named.values() if p.requires_grad)
    assert counts["total"] == sum(p.numel() for p in named.values())
    assert counts["total"] == sum(
        counts[part] for part in ("encoder", "tuner", "fusion", "decoder")
    )
    of_sam_alone = ("frozen", "full", "bitfit", "norm", "partial")
    assert bool(counts["tuner"]) == (tuner not in of_sam_alone)
    assert bool(counts["fusion"]) == (fusion == "dfm")


@every_tuner
@pytest.mark.parametrize("fusion", ["dfm", "sum"])
def test_gradients_reach_exactly_what_is_trained(tuner, fusion):
    model = build_mfnet(TINY, tuner, fusion=fusion)
    (model(torch.rand(2, 3, 64, 64), torch.rand(2, 64, 64)) ** 2).mean().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None]
    assert reached == trained_names(model)


@pytest.mark.parametrize("tuner", ["adapter", "lora"])
def test_shapes_alone_pass_through_the_network_on_the_meta_device(tuner):
    with torch.device("meta"):
        model = build_mfnet("vit_l", tuner)
        assert model(torch.empty(2, 3, 256, 320), torch.empty(2, 256, 320)).shape == (
            2,
            6,
            256,
            320,
        )


# ---------------------------------------------------------------------------- the published weights


@cache
def golden(tuner):
    return json.loads((GOLDENS / f"mfnet_{tuner}.json").read_text())


def published_model(tuner, modalities=2):
    torch.manual_seed(0)
    return (
        build_mfnet(golden(tuner)["encoder"], tuner, modalities=modalities)
        .eval()
        .requires_grad_(False)
    )


def published_state(tuner):
    """A state dict of the published network, without the second copy of its encoder."""
    shapes = {n: shape for n, (shape, _) in golden(tuner)["keys"].items()}
    return {n: torch.as_tensor(a) for n, a in fill_state_dict(shapes, seed=5).items()}


def second_copy(state):
    return {"sam." + n: t for n, t in state.items() if n.startswith("image_encoder.")}


UNUSED = {
    "sam.prompt_encoder.no_mask_embed.weight": torch.ones(1, 256),
    "sam.pixel_mean": torch.ones(3, 1, 1),
}
VARIANTS = {
    "data parallel": lambda state: {"module." + n: t for n, t in state.items()},
    "second copy": lambda state: state | second_copy(state),
    "whole SAM": lambda state: state | second_copy(state) | UNUSED,
    "second copy alone": lambda state: {
        "sam." * n.startswith("image_encoder.") + n: t for n, t in state.items()
    },
}


@pytest.mark.parametrize("tuner", ["adapter", "lora"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_published_weights_in_any_wrapping_give_the_same_logits(tuner, variant):
    image, dsm = torch.rand(1, 3, 64, 64), torch.rand(1, 64, 64)
    plain, wrapped = published_model(tuner), published_model(tuner)
    load_published_weights(plain, published_state(tuner))
    load_published_weights(wrapped, variant(published_state(tuner)))
    assert torch.equal(wrapped(image, dsm), plain(image, dsm))


@pytest.mark.parametrize("tuner", ["adapter", "lora"])
def test_every_published_tensor_is_loaded_or_reported(tuner):
    state = published_state(tuner)
    report = load_published_weights(published_model(tuner), state | second_copy(state) | UNUSED)
    assert len(report.loaded) + len(report.ignored) == len(state) + len(second_copy(state)) + len(
        UNUSED
    )
    assert set(UNUSED) <= set(report.ignored)


def removed(state, name):
    del state[name]


def misshapen(state, name):
    state[name] = state[name][..., :-1]


def transposed(state, name):
    state[name] = state[name].mT.contiguous()


def contradicted(state, name):
    state["sam." + name] = state[name] + 1


def foreign(state, name):
    state[name] = torch.zeros(1)


BLOCK = "image_encoder.blocks.1."
DAMAGES = [
    ("adapter", removed, BLOCK + "DSM_Adapter.D_fc1.bias", "blocks.1.attn_adapters.1.fc1.bias"),
    ("adapter", removed, BLOCK + "wy_Adapter", "blocks.1.mixing"),
    ("adapter", removed, BLOCK + "attn.rel_h", "blocks.1.attn.rel_pos_h"),
    ("adapter", removed, "fusion2.se_depth.fc.0.weight", "fusion.levels.1.se.1.fc.0.weight"),
    ("adapter", misshapen, BLOCK + "attn.proj.weight", "blocks.1.attn.proj.weight"),
    ("adapter", misshapen, "decoder.p1.ca.1.0.weight", "decoder.p1.ca.0.weight"),
    ("adapter", contradicted, BLOCK + "mlp.lin1.weight", "blocks.1.mlp.lin1.weight"),
    ("adapter", contradicted, BLOCK + "wx_Adapter", "blocks.1.mixing"),
    ("adapter", foreign, "fpn3x.0.weight", "fpn3x.0.weight"),
    ("lora", removed, BLOCK + "attn.qkv.lora_Ax", "blocks.1.attn.qkv.lora_A"),
    ("lora", removed, BLOCK + "mlp.lin1.lora_By", "blocks.1.mlp.lin1.lora_B"),
    ("lora", removed, BLOCK + "mlp.lin2.lora_wx", "blocks.1.mlp.lin2.mixing"),
    ("lora", misshapen, BLOCK + "attn.qkv.lora_Ax", "blocks.1.attn.qkv.lora_A"),
    ("lora", misshapen, BLOCK + "mlp.lin1.lora_By", "blocks.1.mlp.lin1.lora_B"),
    ("lora", transposed, BLOCK + "mlp.lin2.lora_Ax", "blocks.1.mlp.lin2.lora_A"),
    ("lora", transposed, BLOCK + "attn.qkv.lora_By", "blocks.1.attn.qkv.lora_B"),
    ("lora", contradicted, BLOCK + "attn.qkv.lora_By", "blocks.1.attn.qkv.lora_B"),
]


@pytest.mark.parametrize(
    "tuner, damage, name, said", DAMAGES, ids=[f"{d.__name__}-{n}" for _, d, n, _ in DAMAGES]
)
def test_a_damaged_published_state_is_named_and_changes_nothing(tuner, damage, name, said):
    model, state = published_model(tuner), published_state(tuner)
    before = snapshot(model)
    damage(state, name)
    with pytest.raises(WeightsError, match=said):
        load_published_weights(model, state)
    assert same_state(model, before)


@pytest.mark.parametrize(
    "tuner, other, modalities",
    [
        ("adapter", "lora", 2),
        ("lora", "adapter", 2),
        ("adapter", "adapter", 3),
        ("lora", "lora", 1),
    ],
)
def test_published_weights_fit_only_their_own_network(tuner, other, modalities):
    model = published_model(tuner, modalities)
    before = snapshot(model)
    with pytest.raises(WeightsError):
        load_published_weights(model, published_state(other))
    assert same_state(model, before)
