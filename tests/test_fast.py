"""What `accelerate` makes faster computes what the plain network does, in values, gradients and
names; and each of its parts against an oracle of a few lines."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomise
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_sam_vit import attend_all_pairs, random_attention
from torch.testing import assert_close

import fast
import tuners
from fast import FastAttention, FastLinear, accelerate
from mfnet import build_mfnet
from sam_vit import Attention, Block, get_rel_pos
from tuners import TUNERS, MMAdapter, MMLoRA, StandardAdapter, Tuner

side = st.integers(1, 9)


# -------------------------------------------------------------------------------- the whole network


class BiasByModality(nn.Module):
    """A frozen linear layer, adopted, with a trained bias of each modality's own."""

    def __init__(self, linear, modalities):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.offset = nn.Parameter(torch.zeros(modalities, 1, 1, 1, len(linear.weight)))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return (y.unflatten(0, (len(self.offset), -1)) + self.offset).flatten(0, 1)


class BiasTuning(Tuner):
    """Written as a user would: its own layer in `attn.qkv`, so that a zero token's key is not
    `qkv.bias`, and differs between the modalities; norms of SAM's are trained too."""

    sam_trained = ("blocks.*.norm?.*",)

    def __init__(self, block, modalities):
        super().__init__(block, modalities)
        self.attn.qkv = BiasByModality(self.attn.qkv, modalities)


class DropoutTuning(Tuner):
    """A user's adapter that drops some of what it computes."""

    starts_as_frozen = False

    def __init__(self, block, modalities, p=0.5):
        super().__init__(block, modalities)
        C = self.width
        self.adapter = nn.Sequential(nn.Linear(C, 8), nn.Dropout(p), nn.Linear(8, C))

    def forward(self, x):
        x = super().forward(x)
        return x + self.adapter(x)


@pytest.fixture(scope="module", autouse=True)
def users_tuners():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TUNERS, "bias-tuning", BiasTuning)
        patch.setitem(TUNERS, "dropout-tuning", DropoutTuning)
        yield


def outputs_and_gradients(model, rasters, precision):
    """The encoder's maps, and the gradients of its rasters and of all that is trained in it."""
    torch.manual_seed(0)
    rasters = [r.clone().requires_grad_() for r in rasters]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        maps = torch.stack(model.train().encode(*rasters)).float()
    model.zero_grad()
    (maps * torch.linspace(-1, 1, maps.numel()).view_as(maps)).sum().backward()
    trained = [p for p in model.image_encoder.parameters() if p.requires_grad]
    return maps.detach(), [t.grad for t in (*rasters, *trained)]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def joined(tensors):
    return torch.cat([t.flatten() for t in tensors])


CASE = dict(H=70, W=100, window=3, heads=2, M=2, without=False, precision="fp32", seed=0)


@settings(max_examples=40)
@example(tuner="dropout-tuning", checkpointing=True, **CASE)
@example(tuner="bias-tuning", checkpointing=False, **CASE)
@example(tuner="adapter", checkpointing=True, **CASE)
@given(
    tuner=st.sampled_from([*TUNERS, "bias-tuning", "dropout-tuning"]),
    H=st.integers(64, 130),
    W=st.integers(64, 130),
    window=st.integers(2, 9),
    heads=st.sampled_from([1, 2, 4]),
    M=st.integers(1, 4),
    without=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_accelerated_network_equals_the_plain_one_in_outputs_gradients_and_names(
    tuner, H, W, window, heads, M, without, precision, checkpointing, seed
):
    sizes = dict(embed_dim=32, depth=2, num_heads=heads, global_attn_indexes=(1,), img_size=64)
    torch.manual_seed(seed)
    missing = without and M > 1
    plain = build_mfnet({**sizes, "window_size": window}, tuner, 3, modalities=M, fills=missing)
    randomise(plain, seed)
    quick = accelerate(deepcopy(plain), checkpointing)
    assert list(quick.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(quick.parameters(), plain.parameters()))
    rasters = [torch.rand(1, 3, H, W) for _ in range(M)]
    rasters[-1] = torch.full_like(rasters[-1], torch.nan) if missing else rasters[-1]
    expected, wanted = outputs_and_gradients(plain, rasters, "fp32")
    found, gradients = outputs_and_gradients(quick, rasters, precision)
    assert all(g is not None for g in gradients)
    errors = relative(found, expected), relative(joined(gradients), joined(wanted))
    limits = 1e-5, 1e-5
    if precision == "bf16":  # as near to fp32 as the plain network in bf16
        rounded, others = outputs_and_gradients(plain, rasters, "bf16")
        limits = relative(rounded, expected), relative(joined(others), joined(wanted))
        limits = [1.5 * limit for limit in limits]
    assert errors[0] < limits[0] and errors[1] < limits[1]


@pytest.mark.parametrize("tuner", ["adapter", "lora", "bias-tuning"])
def test_logits_and_all_gradients_are_the_plain_ones_in_double_precision(tuner):
    sizes = dict(embed_dim=32, depth=2, num_heads=2, global_attn_indexes=(1,), window_size=3)
    plain = randomise(build_mfnet(sizes, tuner, 3)).double()
    quick, found = accelerate(deepcopy(plain)), []
    image, dsm = torch.rand(2, 3, 64, 96).double(), torch.rand(2, 64, 96).double()
    for model in (plain, quick):
        torch.manual_seed(0)
        logits = model.train()(image, dsm)
        logits.square().mean().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-7, atol=1e-10)


# --------------------------------------------------------------------------- what it knows and not


def blocks(*blocks):
    """What `accelerate` takes for an encoder."""
    return SimpleNamespace(blocks=blocks)


def small_block(dim=8, window=3):
    return randomise(Block(dim, 2, 2.0, table_size=3, window=window).requires_grad_(False))


def test_a_foreign_layer_a_foreign_block_and_a_hooked_layer_are_left_as_they_are():
    foreign, hooked, own = (T(small_block(), 2) for T in (BiasTuning, Tuner, DropoutTuning))
    hooked.attn.qkv.register_forward_hook(lambda layer, args, out: out + 1)
    accelerate(blocks(foreign, hooked, own))
    assert type(foreign.attn.qkv) is BiasByModality and type(foreign.norm1) is nn.LayerNorm
    assert type(own) is DropoutTuning and type(own.adapter[0]) is nn.Linear
    assert type(own.norm1) is nn.LayerNorm and type(own.attn) is FastAttention
    x = torch.randn(2, 4, 5, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "append_bias", None)  # the way of the fast attention alone
        for block in (foreign, hooked):
            block(x)
        with pytest.raises(TypeError):
            own(x)


def test_the_padding_of_a_hooked_layer_is_what_the_layer_gives():
    block = small_block()
    block.attn.qkv.register_forward_hook(lambda layer, args, out: out + 1)
    x, plain = torch.randn(2, 4, 5, 8), deepcopy(block)
    accelerate(blocks(block))
    assert_close(block(x), plain(x))


class NeighbourLoRA(tuners.LoRA):
    """A user's: the key of a token depends on the others of its window, padding too."""

    def forward(self, x):
        return super().forward(x) + x.mean(dim=(1, 2), keepdim=True).repeat(1, 1, 1, 3)


def test_a_layer_derived_from_a_known_one_is_left_as_it_is_and_right():
    block = Tuner(small_block(), 2)
    block.attn.qkv = NeighbourLoRA(block.attn.qkv, 2, 1, 1.0, [slice(0, 8)], False)
    x, plain = torch.randn(2, 4, 5, 8), deepcopy(block)
    accelerate(blocks(block))
    assert_close(block(x), plain(x))


@pytest.mark.parametrize("kind", [StandardAdapter, MMAdapter])
def test_nothing_inside_the_adapters_is_kept_for_the_backward_pass(kind):
    block = kind(Block(32, 2, 4.0, table_size=3, window=3).requires_grad_(False), 2, ratio=0.75)
    accelerate(blocks(block))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = block(torch.randn(2, 3, 3, 32, requires_grad=True))
    widths = {size for shape in kept for size in shape}
    assert 128 in widths and 24 not in widths  # hidden: the frozen MLP's, the adapters'
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_under_checkpointing_only_the_input_of_a_block_is_kept(checkpointing):
    block = MMLoRA(small_block(), 2)
    accelerate(blocks(block), checkpointing)
    x, kept = torch.randn(2, 4, 4, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        block(x)
    assert (set(kept) <= {x.shape}) == checkpointing


def test_accelerating_twice_changes_nothing_more():
    block = MMAdapter(small_block(), 2)
    once = [type(m) for m in accelerate(blocks(block), True).blocks[0].modules()]
    assert [type(m) for m in accelerate(blocks(block), True).blocks[0].modules()] == once


@given(M=st.integers(2, 6), shape=st.lists(st.integers(1, 4), max_size=3))
def test_the_fast_mixture_is_the_papers(M, shape):
    u, w = torch.randn(M, *shape, dtype=torch.float64), torch.randn(M, dtype=torch.float64)
    assert_close(fast.fast_mix(u, w), tuners.mix_modalities(u, w))


def test_under_autocast_the_output_of_a_known_norm_is_cast_once():
    block, x = MMAdapter(small_block(), 2), torch.randn(2, 4, 4, 8)
    accelerate(blocks(block))
    with torch.autocast("cpu", torch.bfloat16):
        assert block.norm1(x).dtype == block.norm2(x).dtype == torch.bfloat16
    assert block.norm1(x).dtype == torch.float32


# ----------------------------------------------------------------------------------- the attention


def fast_attention(attn):
    """The same weights, accelerated."""
    attn = deepcopy(attn)
    attn.__class__, attn.qkv.__class__ = FastAttention, FastLinear
    return attn


@given(rows=st.integers(1, 4), cols=st.integers(1, 4), a=st.integers(1, 5), b=st.integers(1, 5))
def test_windows_are_cut_row_by_row_and_merged_back(rows, cols, a, b):
    x = torch.randn(2, rows * a, cols * b, 3, 2)
    windows = fast.cut_windows(x, a, b)  # (images x windows, heads, a, b, d)
    second = x[1, :a, -b:]  # the top right window of the second image
    assert torch.equal(windows[rows * cols + cols - 1], second.permute(2, 0, 1, 3))
    assert torch.equal(fast.merge_windows(windows, *x.shape[1:3]), x.flatten(3))


@given(h=st.integers(1, 12), w=st.integers(1, 12), rows=st.integers(1, 9), cols=st.integers(1, 9))
def test_a_grid_is_split_into_whole_windows_and_what_is_left_at_its_end(h, w, rows, cols):
    x = torch.randn(2, h, w, 3)
    bands = fast.split_grid(x, rows, cols)
    assert torch.equal(torch.cat([torch.cat(band, dim=2) for band in bands], dim=1), x)
    for n, side, sizes in (
        (h, rows, [band[0].shape[1] for band in bands]),
        (w, cols, [part.shape[2] for part in bands[0]]),
    ):
        assert sizes == [size for size in (n // side * side, n % side) if size]


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    more_h=st.integers(0, 3),
    more_w=st.integers(0, 3),
    d=st.integers(1, 5),
)
def test_a_window_that_is_filled_up_is_the_softmax_of_all_pairs_with_the_copies(
    h, w, more_h, more_w, d
):
    rows, cols = h + more_h, w + more_w
    q, k, v = torch.randn(3, rows, cols, d, dtype=torch.float64)
    padding = torch.randn(2, d, dtype=torch.float64)
    table_h, table_w = (torch.randn(2 * n - 1, d, dtype=torch.float64) for n in (rows, cols))
    inside = torch.zeros(rows, cols, 1, dtype=torch.bool)
    inside[:h, :w] = True
    full = (t.where(inside, value).flatten(0, 1) for t, value in ((k, padding[0]), (v, padding[1])))
    expected = attend_all_pairs(q.flatten(0, 1), *full, table_h, table_w, rows, cols).view(
        rows, cols, d
    )[:h, :w]

    rel_h, rel_w = get_rel_pos(table_h, rows), get_rel_pos(table_w, cols)
    queries = fast.append_bias(q[None, :h, :w, None], rel_h[:h], rel_w[:w])  # one image, one head
    windows = (
        fast.cut_windows(t, h, w) for t in (queries, k[None, :h, :w, None], v[None, :h, :w, None])
    )
    found = fast.windowed_attention(*windows, rows, cols, padding[:, None, None])
    assert_close(found[0, 0], expected)


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    more_h=st.integers(0, 3),
    more_w=st.integers(1, 3),
    size=st.integers(0, 300),
)
def test_the_logit_of_the_padding_is_a_sum_over_its_positions_at_any_size_of_the_numbers(
    h, w, more_h, more_w, size
):
    rows, cols = h + more_h, w + more_w
    to_rows, to_cols = (
        size * torch.randn(1, 1, h, w, n, dtype=torch.float64) for n in (rows, cols)
    )
    bias = to_rows[..., :, None] + to_cols[..., None, :]  # (1, 1, h, w, rows, cols)
    positions = [bias[..., y, x] for y in range(rows) for x in range(cols) if y >= h or x >= w]
    found = fast.padding_logit(to_rows, to_cols)[..., 0]
    assert_close(found, torch.stack(positions).logsumexp(0))


@given(n=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), more=st.integers(0, 3))
def test_chunked_or_fused_attention_is_the_softmax_of_keys_with_their_codes(n, m, d, more):
    shapes = (2, 3, n, d + more), (2, 3, m, d), (m, more), (2, 3, m, d)
    q, k, codes, v = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    expected = (q @ torch.cat([k, codes.expand(2, 3, m, more)], dim=-1).mT).softmax(dim=-1) @ v
    assert_close(fast.softmax_attention(q, k, codes, v), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "MAX_EXPLICIT_LOGITS", 0)
        assert_close(fast.softmax_attention(q, k, codes, v), expected)


@given(n=st.integers(1, 6), d=st.integers(1, 9), more=st.integers(0, 9))
def test_the_fused_kernel_gets_one_width_and_a_multiple_of_8(n, d, more):
    q, k, codes = torch.ones(1, 1, n, d + more), torch.ones(1, 1, n, d), torch.ones(n, more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "MAX_EXPLICIT_LOGITS", 0)
        patch.setattr(F, "scaled_dot_product_attention", lambda *qkv, scale: torch.stack(qkv))
        widths = fast.softmax_attention(q, k, codes, k).shape  # of a stack of three: equal ones
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, scale: seen.append(q) or v)
        seen = []
        fast.softmax_attention(q, k, codes, k)
    assert widths[0] == 3 and seen[0].shape[-1] % 8 == 0 and seen[0].shape[-1] < d + more + 8


@given(h=side, w=side, window=st.integers(2, 5))
def test_attention_in_bf16_stays_in_bf16_and_near_the_rest(h, w, window):
    attn, x = random_attention(2, window, window), torch.randn(2, h, w, 8, dtype=torch.float64)
    whole, half = attn(x), fast_attention(attn).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()


@given(
    N=st.integers(1, 5),
    heads=st.integers(1, 2),
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    chunk=st.integers(1, 40),
)
def test_the_backward_pass_of_chunked_attention_is_its_derivative(N, heads, n, m, chunk):
    q, k, v = (
        torch.randn(N, heads, *s, dtype=torch.float64, requires_grad=True)
        for s in ((n, 3), (m, 2), (m, 2))
    )
    codes = torch.randn(m, 1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CHUNK_LOGITS", chunk)
        assert torch.autograd.gradcheck(fast.softmax_attention, (q, k, codes, v))


@given(
    N=st.integers(1, 9),
    heads=st.integers(1, 3),
    n=st.integers(1, 4),
    m=st.integers(1, 4),
    chunk=st.integers(1, 99),
)
def test_chunks_of_windows_stay_below_the_limit_and_leave_none_out(N, heads, n, m, chunk):
    q, k, v = torch.randn(N, heads, n, 2), torch.randn(N, heads, m, 2), torch.randn(N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CHUNK_LOGITS", chunk)
        parts = list(fast.chunks(q, k, v))
    for whole, pieces in zip((q, k, v), zip(*parts)):
        assert torch.equal(torch.cat(pieces), whole)
    assert all(len(part) == 1 or part.shape[:3].numel() * m <= chunk for part, _, _ in parts)


def test_no_attention_weights_are_kept_for_the_backward_pass():
    attn = fast_attention(randomise(Attention(32, 2, 16, 0)))
    x = torch.randn(2, 16, 16, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        attn(x)
    assert max(kept) < 4 * 2 * 2 * 256 * 256  # bytes, images, heads, queries, keys


@given(h=side, w=side, window=st.integers(0, 5), heads=st.integers(1, 2))
def test_attention_without_padded_tokens_equals_padding_first(h, w, window, heads):
    attn = random_attention(heads, window or 5, window)
    x = torch.randn(2, h, w, 4 * heads, dtype=torch.float64)
    assert_close(fast_attention(attn)(x), attn(x))


# --------------------------------------------------------------------------------- the linear layer

size = st.integers(1, 9)


def double_gradients(x, weight, bias, grad):
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    return torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad.double())


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    C=size,
    D=size,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_is_the_linear_layer_for_tokens_in_any_arrangement(lead, C, D, dtype):
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((*lead, C), (D, C), (D,)))
    out = fast.linear(x, weight, bias)
    assert out.is_contiguous()
    assert_close(
        out, F.linear(x.double(), weight.double(), bias.double()).to(dtype), atol=1e-5, rtol=1e-5
    )


@given(B=st.integers(1, 3), h=st.integers(1, 4), C=size, D=size)
def test_its_gradients_are_those_of_the_linear_layer_also_from_strided_tokens(B, h, C, D):
    x = torch.randn(B, C, h, h).permute(0, 2, 3, 1).requires_grad_()
    weight, bias, grad = (
        torch.randn(D, C, requires_grad=True),
        torch.randn(D, requires_grad=True),
        torch.randn(B, h, h, D),
    )
    found = torch.autograd.grad(fast.linear(x, weight, bias), (x, weight, bias), grad)
    for mine, exact in zip(found, double_gradients(x, weight, bias, grad)):
        assert_close(mine, exact.float(), atol=1e-4, rtol=1e-4)


@given(T=size, C=size, D=size)
def test_the_convolution_has_the_derivative_that_it_says(T, C, D):
    shapes = (1, C, 1, T), (D, C), (D,)
    assert torch.autograd.gradcheck(
        fast.LinearAsConv.apply,
        [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes],
    )


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_are_kept_for_a_trained_weight_alone(trained):
    layer, x = FastLinear(8, 5).requires_grad_(trained), torch.randn(2, 3, 3, 8, requires_grad=True)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        out = layer(x)
    assert (x.untyped_storage().data_ptr() in kept) == trained
    out.sum().backward()
    assert x.grad is not None and (layer.weight.grad is not None) == trained


def test_under_autocast_it_computes_in_bf16_and_its_weights_get_gradients_of_their_own_precision():
    layer, x = FastLinear(8, 5), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert_close(out.float(), F.linear(x, layer.weight, layer.bias), atol=0.05, rtol=0.05)
