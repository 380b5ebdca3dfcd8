"""The tuners against the paper's equations, written with one tensor for each modality; and what
each of them trains.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, small_encoder
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mfnet import build_mfnet, count_parameters
from sam_vit import Block
from tuners import (
    TUNERS,
    LoRA,
    MMAdapter,
    MMLoRA,
    Tuner,
    apply_tuner,
    mix_modalities,
    parse_option,
    tuner_names,
    tuner_options,
)

every_tuner = pytest.mark.parametrize("name", TUNERS)
every_count = pytest.mark.parametrize("M", [1, 2, 3])
with_parameters = pytest.mark.parametrize("name", ["adapter", "lora"])
grid_side = st.integers(1, 7)
DIM = 8


def tuned(name, M=2, random=True, **options):
    encoder = apply_tuner(small_encoder(), name, M, **options)
    return randomise(encoder, seed=1) if random else encoder


def small_block():
    return randomise(
        Block(DIM, num_heads=2, mlp_ratio=2.0, table_size=3, window=3)
        .double()
        .requires_grad_(False)
    )


def small_tuned(tuner, block, **options):
    return randomise(tuner(deepcopy(block), 2, **options).double().requires_grad_(False), seed=1)


def two_streams(h, w, dim=DIM):
    return torch.randn(2, 3, h, w, dim, dtype=torch.float64)  # x and y, each a batch of 3


# ------------------------------------------------------------------------------------ the equations


def test_two_modalities_mix_as_in_the_paper():
    u_x, u_y = torch.randn(2, 3, 4)
    w_x, w_y = torch.tensor([0.3, 1.7])
    found = mix_modalities(torch.stack([u_x, u_y]), torch.stack([w_x, w_y]))
    assert_close(found, torch.stack([w_x * u_x + (1 - w_x) * u_y, w_y * u_y + (1 - w_y) * u_x]))


@given(M=st.integers(2, 6), shape=st.lists(st.integers(1, 4), max_size=3))
def test_more_modalities_mix_with_the_mean_of_the_others(M, shape):
    u, w = torch.randn(M, *shape, dtype=torch.float64), torch.randn(M, dtype=torch.float64)
    for m, mixed in enumerate(mix_modalities(u, w)):
        others = [u[i] for i in range(M) if i != m]
        assert_close(mixed, w[m] * u[m] + (1 - w[m]) * sum(others) / len(others))


def bottleneck(adapter, t):
    """W2 GELU(W1 t), with biases."""
    hidden = F.gelu(t @ adapter.fc1.weight.T + adapter.fc1.bias)
    return hidden @ adapter.fc2.weight.T + adapter.fc2.bias


def adopt(block, tuner):
    """Gives a plain block the frozen layers of a tuner's, every one of which is there under its
    name.
    """
    state = tuner.state_dict()
    block.load_state_dict({name: state[name] for name in block.state_dict()})


@given(h=grid_side, w=grid_side)
def test_mmadapter_equals_the_papers_equations(h, w):
    block = small_block()
    tuner = small_tuned(MMAdapter, block)
    adopt(block, tuner)
    x, y = two_streams(h, w)
    z, n, u = {}, {}, {}
    for m, stream in enumerate((x, y)):
        a = block.attn(block.norm1(stream))
        z[m] = stream + a + bottleneck(tuner.attn_adapters[m], a)
        n[m] = block.norm2(z[m])
        u[m] = bottleneck(tuner.mlp_adapters[m], n[m])
    w_x, w_y = tuner.mixing
    out_x = z[0] + block.mlp(n[0]) + w_x * u[0] + (1 - w_x) * u[1]
    out_y = z[1] + block.mlp(n[1]) + w_y * u[1] + (1 - w_y) * u[0]
    assert_close(tuner(torch.cat([x, y])), torch.cat([out_x, out_y]))


def mixed_linear(layer, x, y):
    """y_m = W x_m + b + w_m B_m A_m x_m + (1 - w_m) B_o A_o x_o, and no factor 1/r."""
    l_x, l_y = (t @ layer.lora_A[m, 0].T @ layer.lora_B[m, 0].T for m, t in enumerate((x, y)))
    w_x, w_y = layer.mixing
    frozen_x, frozen_y = (t @ layer.weight.T + layer.bias for t in (x, y))
    return frozen_x + w_x * l_x + (1 - w_x) * l_y, frozen_y + w_y * l_y + (1 - w_y) * l_x


@given(h=grid_side, w=grid_side, rank=st.integers(1, 5), alpha=st.sampled_from([1.0, 2.0]))
def test_mmlora_equals_the_papers_equations(h, w, rank, alpha):
    block = small_block()
    tuner = small_tuned(MMLoRA, block, rank=rank, alpha=alpha)
    qkv = tuner.attn.qkv
    streams, n = two_streams(h, w), {}
    z = {}
    for m, stream in enumerate(streams):
        own = deepcopy(block)  # this modality alone, its update merged into the weights of q and v
        adopt(own, tuner)
        own.attn.qkv.weight[:DIM] += alpha / rank * qkv.lora_B[m, 0] @ qkv.lora_A[m, 0]
        own.attn.qkv.weight[2 * DIM :] += alpha / rank * qkv.lora_B[m, 1] @ qkv.lora_A[m, 1]
        z[m] = stream + own.attn(own.norm1(stream))
        n[m] = own.norm2(z[m])
    hidden = (F.gelu(t) for t in mixed_linear(tuner.mlp.lin1, n[0], n[1]))
    out_x, out_y = mixed_linear(tuner.mlp.lin2, *hidden)
    assert_close(tuner(streams.flatten(0, 1)), torch.cat([z[0] + out_x, z[1] + out_y]))


@pytest.mark.parametrize("mixing", [True, False])
def test_lora_at_step_0_computes_what_the_frozen_block_does(mixing):
    x = torch.rand(4, 3, 64, 80)
    assert_close(tuned("lora", random=False, mixing=mixing)(x), tuned("frozen", random=False)(x))


def test_lora_starts_with_kaiming_uniform_a_and_zero_b():
    layer = LoRA(torch.nn.Linear(100, 20), 2, 4, 1.0, [slice(0, 20)], mixing=True)
    largest = layer.lora_A.abs().max()
    assert (
        0.09 < largest <= 0.1
    )  # gain sqrt(1/3) for a = sqrt 5: bound sqrt(3) / sqrt(3) / sqrt(100)
    assert not layer.lora_B.any() and layer.mixing.tolist() == [0.5, 0.5]


def test_adapters_start_with_half_own_and_half_other():
    assert all(
        block.mixing.tolist() == [0.5, 0.5] for block in tuned("adapter", random=False).blocks
    )


# -------------------------------------------------------------------------------------- the streams


@every_tuner
@every_count
def test_every_tuner_keeps_the_shapes(name, M):
    assert tuned(name, M)(torch.rand(2 * M, 3, 48, 64)).shape == (2 * M, 256, 3, 4)


@every_tuner
@every_count
def test_a_sample_is_encoded_the_same_in_any_batch(name, M):
    encoder, x = tuned(name, M), torch.rand(M, 3, 3, 48, 64)
    whole = encoder(x.flatten(0, 1)).unflatten(0, (M, 3))
    assert_close(whole[:, 1], encoder(x[:, 1]))


def outputs_moved_by_the_first_stream(encoder, M):
    """For each modality, whether its output changes when only the first modality's input does."""
    x = torch.rand(M, 3, 48, 48)
    moved = torch.cat([x[:1] + 0.5, x[1:]])
    return [not torch.equal(a, b) for a, b in zip(encoder(x), encoder(moved))]


@with_parameters
@pytest.mark.parametrize("M", [2, 3])
@pytest.mark.parametrize("mixing", [True, False])
def test_streams_influence_each_other_only_when_they_are_mixed(name, M, mixing):
    moved = outputs_moved_by_the_first_stream(tuned(name, M, mixing=mixing), M)
    assert moved == [True] + [mixing] * (M - 1)


@pytest.mark.parametrize("name", ["frozen", "full"])
def test_streams_without_a_tuner_stay_apart(name):
    assert outputs_moved_by_the_first_stream(tuned(name, 3), 3) == [True, False, False]


@with_parameters
def test_each_modality_has_parameters_of_its_own(name):
    x = torch.rand(1, 3, 48, 48)
    of_x, of_y = tuned(name, mixing=False)(torch.cat([x, x]))
    assert (of_x - of_y).abs().max() > 1e-3


# ---------------------------------------------------------------------------------- what is trained


@every_tuner
@every_count
def test_exactly_the_tuners_own_parameters_are_trained(name, M):
    encoder = tuned(name, M)
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    sam = list(dict(small_encoder().named_parameters()))
    added = [n for n in dict(encoder.named_parameters()) if n not in sam]
    of_sam = {
        "frozen": [],
        "full": sam,
        "bitfit": [n for n in sam if n.endswith(".bias")],
        "norm": [n for n in sam if ".norm1." in n or ".norm2." in n],
        "partial": [n for n in sam if n.startswith("blocks.")],  # both of them
    }
    assert trained == tuner_names(encoder) == of_sam.get(name, added)
    assert bool(added) == (name not in of_sam)


@every_tuner
@every_count
def test_the_names_and_values_of_sam_survive(name, M):
    before = small_encoder().state_dict()
    after = tuned(name, M, random=False).state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before)


@every_tuner
@every_count
@pytest.mark.parametrize("mixing", [True, False])
def test_gradients_reach_every_trained_parameter_and_no_frozen_one(name, M, mixing):
    encoder = tuned(name, M, **({"mixing": mixing} if name in ("adapter", "lora") else {}))
    x = torch.rand(M, 3, 64, 48, requires_grad=True)
    (encoder(x) ** 2).sum().backward()
    reached = [n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached == tuner_names(encoder)
    assert all(p.grad is None for n, p in encoder.named_parameters() if n not in reached)
    for n, p in encoder.named_parameters():
        if n.endswith(("lora_A", "lora_B", "mixing")):
            assert all(row.any() for row in p.grad), (
                n
            )  # each modality's share of a stacked parameter


def test_the_first_step_of_lora_moves_b_and_not_a():
    encoder = tuned("lora", random=False)
    (encoder(torch.rand(2, 3, 64, 48)) ** 2).sum().backward()
    moved = {
        n.split(".")[-1]
        for n, p in encoder.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert moved == {"lora_B"}


@with_parameters
def test_one_modality_has_nothing_to_mix(name):
    assert not [n for n in tuner_names(tuned(name, 1)) if "mixing" in n]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, modalities, options, said",
    [
        ("prompt", 2, {}, "prompt.*frozen, full, adapter, lora"),
        ("adapter", 0, {}, "modality"),
        ("lora", -1, {}, "modality"),
        ("lora", 2, {"rank": 0}, "rank"),
        ("lora", 2, {"rank": -1}, "rank"),
        ("adapter", 2, {"ratio": 0.01}, "ratio"),
    ],
)
def test_an_impossible_tuner_is_refused(name, modalities, options, said):
    with pytest.raises(ValueError, match=said):
        tuned(name, modalities, **options)


@every_tuner
def test_a_second_tuner_is_refused(name):
    encoder = tuned(name)
    with pytest.raises(ValueError, match=name):
        apply_tuner(encoder, "lora")


# ---------------------------------------------------------------------------- what a tuner declares


@every_tuner
@every_count
def test_a_tuner_says_whether_a_new_one_computes_what_the_frozen_block_does(name, M):
    x = torch.rand(M, 3, 64, 80)
    out, frozen = (tuned(n, M, random=False)(x) for n in (name, "frozen"))
    assert torch.allclose(out, frozen, atol=1e-5) == TUNERS[name].starts_as_frozen


@every_tuner
@every_count
def test_a_tuner_counts_the_products_that_it_adds(name, M):
    def operations(name):
        encoder = tuned(name, M)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.rand(M, 3, 48, 96))  # 3 x 6 tokens: whole windows
        return encoder, counter.get_total_flops()

    encoder, counted = operations(name)
    added = [p for block in encoder.blocks for p in block.added_products(M * 18)]
    assert sum(2 * n * a * b * c for n, a, b, c in added) == counted - operations("frozen")[1]


class NormTuning(Tuner):
    """Trains SAM's norms, the second ones on request."""

    def __init__(self, block, modalities, both=False, scale=1.0, note="", depth=3):
        super().__init__(block, modalities)
        self.sam_trained = ("blocks.*.norm?.*",) if both else ("blocks.*.norm1.*",)


@pytest.fixture
def norm_tuning(monkeypatch):
    monkeypatch.setitem(TUNERS, "norms", NormTuning)


@pytest.mark.parametrize("both", [False, True])
def test_a_tuner_trains_the_parameters_of_sam_that_it_names(norm_tuning, both):
    encoder = tuned("norms", both=both)
    norms = [f".norm{k}." for k in ((1, 2) if both else (1,))]
    expected = [n for n, _ in encoder.named_parameters() if any(norm in n for norm in norms)]
    assert tuner_names(encoder) == expected and len(expected) == 4 * len(norms)
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == expected


def test_options_are_the_constructors_with_their_defaults(norm_tuning):
    own = {"both": False, "scale": 1.0, "note": "", "depth": 3}
    assert tuner_options("norms") == {**own, "blocks": "all"}
    assert tuner_options("frozen") == {}


@pytest.mark.parametrize(
    "text, value",
    [
        ("both=true", ("both", True)),
        ("both=False", ("both", False)),
        ("scale=0.5", ("scale", 0.5)),
        ("note=a=b", ("note", "a=b")),
        ("depth=2", ("depth", 2)),
    ],
)
def test_an_option_is_read_by_the_type_of_its_default(norm_tuning, text, value):
    assert parse_option("norms", text) == value


@pytest.mark.parametrize("text", ["both=1", "scale=x", "depth=1.5", "depth", "width=3", "=3", ""])
def test_an_option_that_cannot_be_is_refused_in_a_line(norm_tuning, text):
    with pytest.raises(ValueError) as refused:
        parse_option("norms", text)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name, known", [("adapter", "ratio=0.25, mixing=True"), ("full", "blocks=all")]
)
def test_an_unknown_option_is_refused_with_the_list(name, known):
    with pytest.raises(ValueError, match=f"no option 'rank'.*{known}"):
        apply_tuner(small_encoder(), name, 2, rank=3)


@with_parameters
@pytest.mark.parametrize("mixing", [True, False])
def test_the_mixing_weights_are_told_by_layer(name, mixing):
    for block in tuned(name, 3, mixing=mixing).blocks:
        found = block.mixing_weights()
        layers = {"adapter": [""], "lora": ["mlp.lin1", "mlp.lin2"]}[name] if mixing else []
        assert list(found) == layers and all(w.shape == (3,) for w in found.values())


@pytest.mark.parametrize(
    "name, option, shown",
    [("lora", {"rank": 3}, "rank=3"), ("adapter", {"ratio": 0.5}, "bottleneck=16")],
)
def test_a_printed_block_shows_its_method(name, option, shown):
    text = str(tuned(name, random=False, **option).blocks[0])
    assert shown in text and "w=[0.500, 0.500]" in text and "window=3" in text


@pytest.mark.parametrize(
    "name, count", [("standard-adapter", 25_227_264), ("standard-lora", 2_752_512)]
)
def test_the_standard_tuners_of_vit_l_have_so_many_parameters(name, count):
    with torch.device("meta"):
        model = build_mfnet("vit_l", name)
    assert count_parameters(model)["tuner"] == count
    assert count_parameters(model)["trainable"] == count + 1_643_136 + 515_102
