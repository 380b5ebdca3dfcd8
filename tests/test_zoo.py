"""The zoo's tuners against their papers' equations; what each declares of itself; and the option
`blocks` of every tuner. What holds for all tuners alike stands in test_tuners.py, test_fast.py,
test_mfnet.py and test_checkpoints.py, which take zoo.py's too.
"""

import inspect
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, same_state, small_encoder, snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import tuners
import zoo
from fast import FastAttention, FastLinear, FastRescaledLinear, accelerate
from mfnet import build_mfnet, count_parameters
from reports.paper import variant
from sam_vit import Block, build_image_encoder, load_sam_weights
from tuners import TUNERS, apply_tuner, count_tuned, tuner_names, tuner_options

ZOO = {name: tuner for name, tuner in TUNERS.items() if tuner.__module__ == "zoo"}
MIXED = ["adaptformer", "convpass", "ssf", "ia3", "dora"]
DIM = 8  # of a small block: 16 hidden channels, 2 heads
side = st.integers(1, 7)
count = st.integers(1, 3)


def tuned(name, M=2, random=True, **options):
    encoder = apply_tuner(small_encoder(), name, M, **options)
    return randomise(encoder, seed=1) if random else encoder


def small_block():
    block = Block(DIM, num_heads=2, mlp_ratio=2.0, table_size=3, window=3).double()
    return randomise(block.requires_grad_(False))


def tuned_block(name, M, **options):
    """A tuner's block and the frozen one that it stands on, both random."""
    tuner = randomise(ZOO[name](small_block(), M, **options).double(), seed=1)
    state = tuner.state_dict()
    block = small_block()
    block.load_state_dict({n: state[n] for n in block.state_dict()})
    return tuner, block


def streams(M, h, w):
    return list(torch.randn(M, 2, h, w, DIM, dtype=torch.float64))


def mix(u, mixing):
    """One tensor for each modality -> w own + (1 - w) the mean of the others."""
    if mixing is None:
        return u
    total = sum(u)
    return [w * t + (1 - w) * (total - t) / (len(u) - 1) for w, t in zip(mixing, u)]


def dense(layer, t, act=lambda t: t):
    return act(t @ layer.weight.T + layer.bias)


# ------------------------------------------------------------------------------------ the equations


@given(h=side, w=side, M=count, bottleneck=st.integers(1, 5), mixing=st.booleans())
def test_adaptformer_equals_its_equation(h, w, M, bottleneck, mixing):
    tuner, block = tuned_block("adaptformer", M, bottleneck=bottleneck, scale=0.3, mixing=mixing)
    xs = streams(M, h, w)
    z = [x + block.attn(block.norm1(x)) for x in xs]
    n = [block.norm2(t) for t in z]
    u = [0.3 * dense(a.fc2, dense(a.fc1, t, F.relu)) for a, t in zip(tuner.adapters, n)]
    expected = [a + block.mlp(b) + c for a, b, c in zip(z, n, mix(u, tuner.mixing))]
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


def bypass(module, t):
    """down, GELU, 3 x 3 over the neighbours, GELU, up, the convolution written as nine shifts."""
    t = dense(module.down, t, F.gelu)
    h, w = t.shape[1:3]
    padded, kernel = F.pad(t, (0, 0, 1, 1, 1, 1)), module.conv.weight  # (out, in, 3, 3)
    near = [(i, j, padded[:, i : i + h, j : j + w]) for i in range(3) for j in range(3)]
    t = sum(part @ kernel[:, :, i, j].T for i, j, part in near) + module.conv.bias
    return dense(module.up, F.gelu(t))


@given(h=side, w=side, M=count, bottleneck=st.integers(1, 4), mixing=st.booleans())
def test_convpass_equals_its_equation(h, w, M, bottleneck, mixing):
    tuner, block = tuned_block("convpass", M, bottleneck=bottleneck, scale=0.5, mixing=mixing)
    xs, z, n, u = streams(M, h, w), [], [], []
    for m, x in enumerate(xs):
        n1 = block.norm1(x)
        z.append(x + block.attn(n1) + 0.5 * bypass(tuner.attn_bypasses[m], n1))
        n.append(block.norm2(z[m]))
        u.append(0.5 * bypass(tuner.mlp_bypasses[m], n[m]))
    expected = [a + block.mlp(b) + c for a, b, c in zip(z, n, mix(u, tuner.mixing))]
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


def rescaled(linear, scale, shift=0.0):
    """In place, y -> scale * y + shift merged into the weights."""
    linear.weight *= scale[:, None]
    linear.bias.mul_(scale).add_(shift)


@given(h=side, w=side, M=count)
def test_ssf_unmixed_is_the_frozen_block_with_scale_and_shift_merged(h, w, M):
    tuner, block = tuned_block("ssf", M, mixing=False)
    tuner.requires_grad_(False)
    xs, expected = streams(M, h, w), []
    for m, x in enumerate(xs):
        own = deepcopy(block)
        for path in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
            after = tuner.get_submodule(path).after
            rescaled(own.get_submodule(path), after.scale[m], after.shift[m])
        for norm, after in ((own.norm1, tuner.after_norm1), (own.norm2, tuner.after_norm2)):
            norm.weight.mul_(after.scale[m])
            norm.bias.mul_(after.scale[m]).add_(after.shift[m])
        expected.append(own(x))
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


@given(h=side, w=side, M=count)
def test_ia3_unmixed_is_the_frozen_block_with_its_vectors_merged(h, w, M):
    tuner, block = tuned_block("ia3", M, mixing=False)
    tuner.requires_grad_(False)
    xs, expected = streams(M, h, w), []
    for m, x in enumerate(xs):
        own = deepcopy(block)
        keys_and_values = tuner.attn.qkv.after.scale[m]  # (2C,)
        rescaled(own.attn.qkv, torch.cat([torch.ones(DIM).double(), keys_and_values]))
        own.mlp.lin2.weight *= tuner.mlp.lin2.before.scale[m]
        expected.append(own(x))
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


@given(
    h=side, w=side, M=count, rank=st.integers(1, 4), layers=st.sampled_from(["attn", "attn+mlp"])
)
def test_dora_unmixed_is_the_frozen_block_with_rows_of_another_direction_and_length(
    h, w, M, rank, layers
):
    tuner, block = tuned_block("dora", M, rank=rank, alpha=3.0, layers=layers, mixing=False)
    tuner.requires_grad_(False)
    xs, expected = streams(M, h, w), []
    for m, x in enumerate(xs):
        own = deepcopy(block)
        for path in ("attn.qkv", "mlp.lin1", "mlp.lin2"):
            layer, weight = tuner.get_submodule(path), own.get_submodule(path).weight
            if "mlp" in path and layers == "attn":
                continue
            for i, rows in enumerate(weight.chunk(3) if path == "attn.qkv" else [weight]):
                length = layer.magnitude[m, i] * rows.square().sum(dim=1).sqrt()
                rows += 3.0 / rank * layer.lora_B[m, i] @ layer.lora_A[m, i]
                rows *= (length / rows.square().sum(dim=1).sqrt())[:, None]
        expected.append(own(x))
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


@pytest.mark.parametrize("name", ["ssf", "ia3", "dora"])
@pytest.mark.parametrize("M", [2, 3])
def test_what_comes_to_a_layer_of_the_mlp_is_mixed_as_in_the_paper(name, M):
    tuner = randomise(ZOO[name](small_block(), M).double(), seed=1)
    layer = tuner.mlp.lin2
    rescale = layer.before if name == "ia3" else layer.after if name == "ssf" else None
    module = layer if name == "dora" else rescale
    apart = deepcopy(module)
    apart.mixing = None
    x = torch.randn(M, 5, 16 if name != "ssf" else DIM, dtype=torch.float64)
    base = x if rescale else F.linear(x, layer.weight, layer.bias)
    u = list(apart(x) - base)
    assert_close(module(x), base + torch.stack(mix(u, module.mixing)))


def attend(q, k, v, bias):
    return ((q @ k.T) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1) @ v


@given(h=side, w=side, M=count, P=st.integers(1, 4))
def test_vpt_lets_every_window_attend_to_the_prompts_of_its_modality(h, w, M, P):
    """Window by window and head by head, from the tokens' side: the attention over the tokens of
    the window, padding among them, and the prompts, which have no relative position."""
    tuner, block = tuned_block("vpt", M, prompts=P)
    xs, d = streams(M, h, w), DIM // 2
    table_h, table_w = block.attn.rel_pos_h, block.attn.rel_pos_w
    expected = []
    for m, x in enumerate(xs):
        n = F.pad(block.norm1(x), (0, 0, 0, -w % 3, 0, -h % 3))
        out = torch.zeros_like(n)
        prompts = block.attn.qkv(block.norm1(tuner.prompts[m]))
        for b in range(len(n)):
            for top in range(0, n.shape[1], 3):
                for left in range(0, n.shape[2], 3):
                    part = n[b, top : top + 3, left : left + 3].reshape(9, DIM)
                    qkv, place = block.attn.qkv(part), [divmod(i, 3) for i in range(9)]
                    found = []
                    for head in range(2):
                        c = slice(head * d, (head + 1) * d)
                        q, k, v = (t[:, c] for t in qkv.chunk(3, dim=1))
                        _, k_p, v_p = (t[:, c] for t in prompts.chunk(3, dim=1))
                        rel = torch.tensor([[a - e + 2 for e, _ in place] for a, _ in place])
                        col = torch.tensor([[a - e + 2 for _, e in place] for _, a in place])
                        bias = (q[:, None] * (table_h[rel] + table_w[col])).sum(dim=-1)
                        bias = torch.cat([bias, torch.zeros(9, P).double()], dim=1)
                        found.append(attend(q, torch.cat([k, k_p]), torch.cat([v, v_p]), bias))
                    here = torch.cat(found, dim=1).view(3, 3, DIM)
                    out[b, top : top + 3, left : left + 3] = here
        z = x + block.attn.proj(out)[:, :h, :w]
        expected.append(z + block.mlp(block.norm2(z)))
    assert_close(tuner(torch.cat(xs)), torch.cat(expected))


# ------------------------------------------------------------------------------ what holds for each


OPTIONS = {
    # Few ReLUs may all be shut for every token, and then nothing before them gets a gradient.
    "adaptformer": dict(bottleneck=st.integers(8, 40), scale=st.sampled_from([0.1, 2.0])),
    "convpass": dict(bottleneck=st.integers(1, 10), scale=st.sampled_from([0.1, 2.0])),
    "dora": dict(rank=st.integers(1, 5), layers=st.sampled_from(["attn", "mlp", "attn+mlp"])),
    "vpt": dict(prompts=st.integers(1, 6)),
    "norm": dict(layers=st.sampled_from(["attn", "mlp", "attn+mlp"])),
}


@st.composite
def choices(draw):
    """A tuner of the zoo, its options, and a number of modalities."""
    name = draw(st.sampled_from(sorted(ZOO)))
    options = {option: draw(values) for option, values in OPTIONS.get(name, {}).items()}
    options |= {"mixing": draw(st.booleans())} if name in MIXED else {}
    options |= {"blocks": draw(st.sampled_from(["all", "late", "1", "2"]))}
    return name, options, draw(count)


@settings(max_examples=40)
@given(choices())
def test_names_gradients_and_start_are_what_the_tuner_says_with_any_options(choice):
    name, options, M = choice
    sam = small_encoder()
    encoder = tuned(name, M, random=False, **options)
    state = encoder.state_dict()
    assert all(torch.equal(state[n], t) for n, t in sam.state_dict().items())
    x = torch.rand(M, 3, 64, 80)
    assert torch.allclose(encoder(x), sam(x), atol=1e-5) == ZOO[name].starts_as_frozen
    (randomise(encoder, seed=1)(x) ** 2).sum().backward()
    reached = [n for n, p in encoder.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached == tuner_names(encoder) and reached
    assert reached == [n for n, p in encoder.named_parameters() if p.requires_grad]
    stacked = ("lora_A", "lora_B", "magnitude", "scale", "shift", "prompts", "mixing")
    for n, p in encoder.named_parameters():  # each modality's share of a stacked parameter
        if n.endswith(stacked):
            assert len(p) == M and all(row.any() for row in p.grad), n


@settings(max_examples=30)
@given(choices(), st.sampled_from(["before", "after"]))
def test_an_official_checkpoint_loads_before_and_after_and_the_start_stays_the_frozen_one(
    choice, when
):
    name, options, M = choice
    checkpoint = {"image_encoder." + n: t for n, t in small_encoder(seed=7).state_dict().items()}
    encoder = small_encoder()
    if when == "before":
        load_sam_weights(encoder, checkpoint)
    apply_tuner(encoder, name, M, **options)
    added = {n: t for n, t in snapshot(encoder).items() if n in encoder.added_names}
    if when == "after":
        assert len(load_sam_weights(encoder, checkpoint).loaded) == len(checkpoint)
    sam = small_encoder(seed=7)
    assert same_state(encoder, {**encoder.state_dict(), **sam.state_dict(), **added})
    x = torch.rand(M, 3, 48, 64)
    assert torch.allclose(encoder(x), sam(x), atol=1e-5) == ZOO[name].starts_as_frozen


@settings(max_examples=25)
@example(("ssf", {"mixing": True, "blocks": "all"}, 2), 70, 100, 3)
@example(("dora", {"mixing": True, "blocks": "all"}, 3), 70, 100, 3)
@example(("vpt", {"blocks": "all"}, 2), 70, 100, 3)
@given(choices(), st.integers(64, 130), st.integers(64, 130), st.integers(2, 9))
def test_plain_equals_accelerated_with_any_options_in_values_and_gradients(choice, H, W, window):
    name, options, M = choice
    sizes = dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), img_size=64)
    plain = build_mfnet(
        {**sizes, "window_size": window}, name, num_classes=3, modalities=M, **options
    )
    randomise(plain)
    quick, found = accelerate(deepcopy(plain)), []
    rasters = torch.rand(M, 1, 3, H, W)
    for model in (plain, quick):
        maps = torch.stack(model.encode(*rasters))
        (maps * torch.linspace(-1, 1, maps.numel()).view_as(maps)).sum().backward()
        grads = [p.grad.flatten() for p in model.image_encoder.parameters() if p.requires_grad]
        found.append((maps.detach(), torch.cat(grads)))
    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_accelerated_network_knows_the_layers_of_the_zoo(name):
    block = accelerate(tuned(name)).blocks[0]
    linears = [m for m in block.modules() if type(m) in (torch.nn.Linear, zoo.RescaledLinear)]
    assert [m for m in linears if m.weight.shape[0] > 32] == []
    assert isinstance(block.attn, FastAttention) == (name != "vpt")
    kind = FastRescaledLinear if name in ("ssf", "ia3") else FastLinear
    assert isinstance(block.attn.qkv, kind) == (name != "dora")


@pytest.mark.parametrize("name", ["ssf", "dora"])
def test_the_accelerated_attention_never_takes_the_plain_way(name, monkeypatch):
    encoder = accelerate(tuned(name))
    monkeypatch.setattr("sam_vit.window_partition", None)
    assert encoder(torch.rand(2, 3, 64, 80)).isfinite().all()


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("M", [1, 2, 3])
def test_saved_and_loaded_the_logits_are_the_same(name, M, tmp_path):
    sizes = dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3)
    saved = randomise(build_mfnet(sizes, name, 3, M)).eval()
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    again = build_mfnet(sizes, name, 3, M).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    rasters = torch.rand(M, 1, 3, 64, 64)
    assert torch.equal(again(*rasters), saved(*rasters))


# C width, M modalities, of one block; the hidden width is 4 C.
FORMULAS = {
    "adaptformer": lambda C, M: M * (C * 64 + 64 + 64 * C + C),
    "convpass": lambda C, M: 2 * M * (C * 8 + 8 + 8 * 8 * 9 + 8 + 8 * C + C),
    "ssf": lambda C, M: M * 2 * (C + 3 * C + C + C + 4 * C + C),
    "ia3": lambda C, M: M * (C + C + 4 * C),
    "dora": lambda C, M: M * (3 * (4 * C + C * 4 + C) + 2 * (4 * C + 4 * 4 * C) + 4 * C + C),
    "vpt": lambda C, M: M * 10 * C,
    "bitfit": lambda C, M: C + 3 * C + C + C + 4 * C + C,
    "norm": lambda C, M: 4 * C,
}
MIXING_LAYERS = {"adaptformer": 1, "convpass": 1, "ssf": 2, "ia3": 1, "dora": 2}
PATCHES_AND_NECK = {"bitfit": lambda C: C + 256 + 256}


@pytest.mark.parametrize("size, C, depth", [("vit_t", 160, 4), ("vit_b", 768, 12)])
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("mixing", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_number_of_trained_parameters_is_its_formula(name, size, C, depth, M, mixing):
    with torch.device("meta"):
        encoder = build_image_encoder(size)
        apply_tuner(encoder, name, M, **({} if mixing or name not in MIXED else {"mixing": False}))
    mixed = MIXING_LAYERS.get(name, 0) * M if mixing and M > 1 else 0
    beside = PATCHES_AND_NECK.get(name, lambda C: 0)(C)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert trained == depth * (FORMULAS[name](C, M) + mixed) + beside


@pytest.mark.parametrize(
    "size, C, d, tables", [("vit_t", 160, 40, (15, 31)), ("vit_b", 768, 64, (27, 127))]
)
def test_partial_trains_the_last_two_blocks_whole(size, C, d, tables):
    """Norms, qkv, proj, the MLP, and relative positions; of the last two one has windows."""
    with torch.device("meta"):
        counts = count_parameters(build_mfnet(size, "partial"))
    block = 4 * C + 3 * C * C + 3 * C + C * C + C + 8 * C * C + 5 * C
    trained = 2 * block + 2 * d * sum(tables)
    assert counts["trainable"] == trained + counts["fusion"] + counts["decoder"]
    assert counts["tuner"] == 0


# -------------------------------------------------------------------------------- the option blocks


every_tuner = pytest.mark.parametrize("name", [n for n in TUNERS if n != "frozen"])


@pytest.mark.parametrize(
    "blocks, depth, tuned",
    [("all", 12, 12), ("late", 12, 6), ("late", 5, 3), ("late", 1, 1), ("2", 4, 2), (4, 4, 4)],
)
def test_the_last_blocks_are_tuned_all_the_later_half_or_so_many(blocks, depth, tuned):
    assert count_tuned(blocks, depth) == tuned


@every_tuner
@pytest.mark.parametrize("blocks", ["0", "5", "-1", "1.5", "early", "", "True"])
def test_blocks_that_are_not_there_are_refused(name, blocks):
    with pytest.raises(ValueError, match="blocks=.*all, late or a number from 1 to 4"):
        apply_tuner(small_encoder(depth=4), name, blocks=blocks)


@every_tuner
@pytest.mark.parametrize("blocks, first", [("late", 2), ("1", 3)])
def test_a_block_that_is_not_tuned_is_the_frozen_one_in_every_modality(name, blocks, first):
    encoder = apply_tuner(small_encoder(depth=4), name, 2, blocks=blocks)
    trained = [n.split(".")[:2] for n in tuner_names(encoder) if n.startswith("blocks.")]
    assert {int(number) for _, number in trained} == set(range(first, 4))
    added, of_tuner = encoder.added_names, tuner_names(encoder)
    with torch.no_grad():  # the blocks' parameters alone, so that the stream below stays
        for n, p in encoder.named_parameters():
            if n in of_tuner and n.startswith("blocks."):
                p += 0.1 * torch.randn_like(p)
    x, seen, expected = torch.rand(4, 3, 48, 64), {}, {}
    encoder(x, seen), small_encoder(depth=4)(x, expected)
    same = [torch.equal(a, b) for a, b in zip(seen["blocks"], expected["blocks"])]
    assert same == [True] * first + [False] * (4 - first)
    assert all(not b.added_products(8) and not b.mixing_weights() for b in encoder.blocks[:first])
    assert all(int(n.split(".")[1]) >= first for n in added)


@every_tuner
def test_all_blocks_are_the_same_bits_as_without_the_option(name):
    states = []
    for options in ({}, {"blocks": TUNERS[name].blocks}):
        torch.manual_seed(3)
        encoder = apply_tuner(small_encoder(), name, **options)
        states.append((snapshot(encoder), tuner_names(encoder)))
    assert same_state(encoder, states[0][0]) and states[0][1] == states[1][1]


def test_blocks_are_named_beside_a_score_only_where_not_all_are_tuned():
    run = dict(tuner="lora", fusion="dfm", modalities="image+dsm")
    assert variant({**run, "tuner_option": tuner_options("lora")}) == ""
    late = {**tuner_options("lora"), "blocks": "late"}
    assert variant({**run, "tuner_option": late}) == "blocks late"


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("adaptformer", {"bottleneck": 0}, "bottleneck=0"),
        ("convpass", {"bottleneck": -1}, "bottleneck=-1"),
        ("dora", {"rank": 0}, "rank=0"),
        ("dora", {"layers": "mlp+attn"}, "layers=mlp"),
        ("norm", {"layers": ""}, "layers="),
        ("vpt", {"prompts": 0}, "prompts=0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        tuned(name, **options)


# ------------------------------------------------------------------------------------------ the zoo


def test_there_are_twelve_tuners_and_those_of_the_zoo_are_these():
    names = "adaptformer convpass ssf ia3 dora vpt bitfit norm partial".split()
    assert sorted(ZOO) == sorted(names) and len(TUNERS.keys() - {"frozen"}) >= 12


@pytest.mark.parametrize(
    "name", [n for n, t in TUNERS.items() if t.__module__ in ("tuners", "zoo")]
)
def test_no_tuner_is_longer_than_40_lines_and_each_of_the_zoo_cites_its_paper(name):
    source = inspect.getsource(TUNERS[name])
    assert len(source.splitlines()) <= 40
    if name in ZOO:
        text = " ".join(TUNERS[name].__doc__.split())
        assert re.search(
            r': [A-Z][\w-]+( [A-Z]\w+)*, .*".+".*, \w+ 20\d\d, arXiv \d{4}\.\d{5}', text
        )


def test_a_tuner_of_the_zoo_needs_the_zoo_and_the_refusal_says_so():
    code = """
import sys, tuners
from sam_vit import build_image_encoder
try:
    tuners.apply_tuner(build_image_encoder("vit_t"), "ssf")
except ValueError as error:
    print(error)
import mfnet
print(mfnet.build_mfnet("vit_t", "ssf").image_encoder.tuner)
try:
    tuners.tuner_options("sff")
except ValueError as error:
    print(error)
"""
    home = Path(tuners.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    first, second, third = done.stdout.splitlines()
    assert "unknown tuner 'ssf'" in first and "lora" in first and "import zoo" in first
    assert second == "ssf" and "convpass" in third and "import zoo" not in third
