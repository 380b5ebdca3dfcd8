"""The same numbers in less time and memory: `accelerate(model)`. Read this last.

`sam_vit.py` and `tuners.py` are the definition. `accelerate` gives modules that it knows another
class, in place: same parameters, same names, same function, equal by test. A module that it does
not know (a user's tuner, a foreign layer in `attn.qkv`) is left as it is, and stays right.

    Attention    no padded token is computed; the padding of a window takes part as one key
                 (`padding_logit`), relative positions as further dimensions of query and key
                 (`append_bias`), and no attention weights are kept for the backward pass; around
                 a `qkv` that `is_known`
    nn.Linear    a 1x1 convolution where that is faster (`linear`)
    nn.LayerNorm casts its output once under autocast, not again in every layer that takes it
    adapters     computed again in the backward pass instead of kept: a fourteenth of a block's
                 operations, but a quarter of its memory

Shapes: `M` modalities, `B` images, `h, w` tokens of a grid or of a window, `N` windows, `d` width
of a head, `rows, cols` of a full window; `T` tokens, `C` width in and `D` width out of a layer.
"""

from __future__ import annotations

from typing import Callable, Iterable, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sam_vit import MLP, Attention, Block, get_rel_pos
from tuners import Adapter, LoRA, MMAdapter, StandardAdapter, adapt, mix_modalities
from zoo import AdaptFormer, Convpass, DoRALinear, PromptedAttention, ReLUAdapter, RescaledLinear

MAX_EXPLICIT_LOGITS = 2**20  # of one head and window, up to which a CPU multiplies them out
CHUNK_LOGITS = 2**21  # of all heads and windows that a CPU multiplies out at a time
HAS_MKL = torch.backends.mkl.is_available()

Outputs = TypeVar("Outputs")  # a tensor or several


def accelerate(model: nn.Module, checkpointing: bool = False) -> nn.Module:
    """Makes the encoder of `model` (an MFNet or an ImageEncoderViT) faster, in place; returns it.

    With `checkpointing` each block's activations are computed again in the backward pass instead of
    kept, dropout as it was: less memory, more time.
    """
    blocks = getattr(model, "image_encoder", model).blocks
    for block in blocks:
        for module in list(block.modules()):
            if type(module) in (Attention, PromptedAttention, MLP, Adapter, ReLUAdapter):
                for child in module.children():
                    if type(child) is nn.Linear and child.bias is not None:
                        child.__class__ = FastLinear
            if type(module) in FASTER:
                module.__class__ = FASTER[type(module)]
        parts = type(block.attn), type(block.mlp)
        if type(block).forward in KNOWN_FORWARDS and parts == (FastAttention, MLP):
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.lin1)):
                if type(norm) is nn.LayerNorm and is_known(layer):
                    norm.__class__ = AutocastLayerNorm
        if checkpointing and not isinstance(block, Checkpointed):
            kind = type(block)
            block.__class__ = type(f"Checkpointed{kind.__name__}", (Checkpointed, kind), {})
    return model


class Checkpointed:
    """Mixed into a block: activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute(super().forward, x)


def recompute(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
    """function(x), whose activations are computed again in the backward pass instead of kept, from
    the random state of the first time."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False)


# ----------------------------------------------------------------------------------- linear, norms


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which precision layers compute with x: autocast's, or without it that of x."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class AutocastLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(autocast_dtype(x))


class FastLinear(nn.Linear):
    """(..., C) -> (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., C), weight (D, C), bias (D) -> (..., D): x weight^T + bias, in autocast's precision.

    PyTorch's x86 builds leave fp32 matrix products to MKL, which keeps AVX-512 for Intel's
    processors, and convolutions to oneDNN, which uses it on all. Measured on two cores of an AMD
    EPYC at the shapes of ViT-B and ViT-L: 190 to 210 GFLOP/s as a product, 360 to 450 as a 1x1
    convolution, forward and backward. In bf16 both are as fast.
    """
    # Cast here, because autocast keeps its own casts until its end: a second copy of the weights.
    x, weight, bias = (t.to(autocast_dtype(x)) for t in (x, weight, bias))
    if x.device.type == "cpu" and x.dtype == torch.float32 and HAS_MKL:
        tokens = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C, 1, T)
        out = LinearAsConv.apply(tokens, weight, bias)
        return out.permute(0, 2, 3, 1).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class LinearAsConv(torch.autograd.Function):
    """x (1, C, 1, T), weight (D, C), bias (D) -> (1, D, 1, T).

    PyTorch's convolution would always keep x for the backward pass; this keeps it only for a weight
    that is trained.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.conv2d(x, weight[:, :, None, None], bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernel = weight[:, :, None, None]
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            F.conv_transpose2d(grad, kernel) if for_x else None,
            nn.grad.conv2d_weight(x, kernel.shape, grad)[:, :, 0, 0] if for_weight else None,
            grad.sum(dim=(0, 2, 3)) if for_bias else None,
        )


# --------------------------------------------------------------------------------------- attention


class FastAttention(Attention):
    """SAM's attention, which pads and then projects, without computing a padded token.

    Windows at the lower and right edge are smaller, and their padding is one key and value: what
    `qkv` gives for a zero token. At 256 px, where windows of 14 are laid over a grid of 16, this is
    a third of the tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not is_known(self.qkv):
            return super().forward(x)
        B, h, w, _ = x.shape
        qkv = self.qkv(x).view(B, h, w, 3, self.num_heads, -1)
        rows, cols = (self.window, self.window) if self.window else (h, w)
        q, k, v = qkv.unbind(3)  # each (B, h, w, heads, d)
        rel_h = get_rel_pos(self.rel_pos_h, rows).repeat(-(-h // rows), 1, 1)[:h].to(q.dtype)
        rel_w = get_rel_pos(self.rel_pos_w, cols).repeat(-(-w // cols), 1, 1)[:w].to(q.dtype)
        zero = self.qkv(x.new_zeros(B, 1, 1, x.shape[-1])).to(q.dtype)  # (B, 1, 1, 3C)
        _, *pad_kv = zero.view(B, 3, self.num_heads, -1).unbind(1)  # each (B, heads, d)
        bands = zip(*(split_grid(t, rows, cols) for t in (append_bias(q, rel_h, rel_w), k, v)))
        out = [
            torch.cat([attend_part(*part, rows, cols, pad_kv) for part in zip(*band)], dim=2)
            for band in bands
        ]
        return self.proj(torch.cat(out, dim=1))


def is_known(layer: nn.Module) -> bool:
    """Whether a layer treats each token by itself, by the modality at most: it gives one key for
    all padding of an image."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    known = isinstance(layer, (FastLinear, FastFrozen))
    return known and layer.bias is not None and not hooked


def append_bias(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """q (B, h, w, heads, d), rel_h (h, h', d), rel_w (w, w', d) -> (B, h, w, heads, d + h' + w').

    The bias of a query and a key, q . rel_h[qy, ky] + q . rel_w[qx, kx], is a product itself: after
    the scaled query come its products with rel_h and rel_w, and after the key the one-hot codes of
    its row and column (`position_codes`). Any kernel then gets whole logits from one product.
    """
    to_rows = torch.einsum("byxad,ykd->byxak", q, rel_h)  # (B, h, w, heads, h'), not scaled
    to_cols = torch.einsum("byxad,xkd->byxak", q, rel_w)  # (B, h, w, heads, w')
    return torch.cat([q * q.shape[-1] ** -0.5, to_rows, to_cols], dim=-1)


def position_codes(h: int, w: int, rows: int, cols: int, like: Tensor) -> Tensor:
    """(h * w, rows + cols): the one-hot row and column of each of h x w tokens of a window."""
    row_code = torch.eye(h, rows, dtype=like.dtype, device=like.device).repeat_interleave(w, dim=0)
    col_code = torch.eye(w, cols, dtype=like.dtype, device=like.device).repeat(h, 1)
    return torch.cat([row_code, col_code], dim=1)


def append_codes(k: Tensor, codes: Tensor) -> Tensor:
    """k (N, heads, m, d), codes (m, c) -> (N, heads, m, d + c)."""
    return torch.cat([k, codes.expand(*k.shape[:2], -1, -1)], dim=-1)


def attend_part(
    q: Tensor, k: Tensor, v: Tensor, rows: int, cols: int, pad_kv: list[Tensor]
) -> Tensor:
    """All windows of one part of a grid: (B, h, w, heads, .) each -> (B, h, w, heads * d)."""
    h, w = k.shape[1:3]
    windows = (cut_windows(t, min(rows, h), min(cols, w)) for t in (q, k, v))
    return merge_windows(windowed_attention(*windows, rows, cols, pad_kv), h, w)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: int, cols: int, pad_kv: list[Tensor]
) -> Tensor:
    """softmax(logits) v in windows of h x w tokens: q as of `append_bias` (N, heads, h, w, d + rows
    + cols), k and v (N, heads, h, w, d) -> (N, heads, h, w, d).

    A window smaller than rows x cols is padded below and on the right: `pad_kv` are the key and the
    value of padding of each image, (images, heads, d), which take part as one key with
    `padding_logit`.
    """
    N, heads, h, w, d = k.shape
    keys, values, codes = k.flatten(2, 3), v.flatten(2, 3), position_codes(h, w, rows, cols, k)
    if (h, w) != (rows, cols):
        # (images, heads, d) -> (N, heads, 1, d)
        key, value = (t[:, :, None].repeat_interleave(N // len(t), dim=0) for t in pad_kv)
        q = torch.cat([q, padding_logit(q[..., d : d + rows], q[..., d + rows :])], dim=-1)
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        codes = F.pad(codes, (0, 1, 0, 1))  # padding has no row and no column of its own,
        codes[-1, -1] = 1  # but the logit of all its positions together
    return softmax_attention(q.flatten(2, 3), keys, codes, values).unflatten(2, (h, w))


def padding_logit(to_rows: Tensor, to_cols: Tensor) -> Tensor:
    """log(sum of exp(bias) over all padded positions) of each query: (N, heads, h, w, rows),
    (.., cols) -> (.., 1).

    Padded positions have one key, so their logits differ by the bias alone, a term of the row plus
    a term of the column, and the sum over a rectangle of positions is a product of two sums. They
    lie below the tokens (in all columns) and beside them (in the tokens' rows).
    """
    h, w = to_rows.shape[2:4]
    dtype = to_rows.dtype
    to_rows, to_cols = (t.to(torch.promote_types(dtype, torch.float32)) for t in (to_rows, to_cols))
    sums = (to_rows[..., h:], to_cols, to_rows[..., :h], to_cols[..., w:])
    below, all_cols, beside, right = (t.logsumexp(-1, keepdim=True) for t in sums)
    return torch.logaddexp(below + all_cols, beside + right).to(dtype)


def softmax_attention(q: Tensor, k: Tensor, codes: Tensor, v: Tensor) -> Tensor:
    """softmax(q [k, codes]^T) v: q (N, heads, n, d + c), k (N, heads, m, d), codes (m, c), without
    gradient, v (N, heads, m, d) -> (N, heads, n, d).

    On a CPU small products are written out. Measured on two cores with the windows of ViT-L: 5 ms
    forward and 16 ms with the backward pass in bf16, the fused kernel 14 and 49 ms; in fp32 12 and
    42 ms against 15 and 47 ms.
    """
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= MAX_EXPLICIT_LOGITS:
        return ChunkedAttention.apply(q, k, codes, v)
    # The fused kernels want one width, and a multiple of 8: zeros add nothing to a product.
    width = -(-q.shape[-1] // 8) * 8
    padded = (F.pad(t, (0, width - t.shape[-1])) for t in (q, append_codes(k, codes), v))
    return F.scaled_dot_product_attention(*padded, scale=1.0)[..., : v.shape[-1]]


class ChunkedAttention(torch.autograd.Function):
    """softmax(q [k, codes]^T) v, `CHUNK_LOGITS` logits at a time. The attention weights P are not
    kept but computed again in the backward pass, where dS = P * (dP - sum(P * dP))."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, codes: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, codes, v)
        whole = q.new_empty(*q.shape[:-1], v.shape[-1])
        for q, k, v, out in chunks(q, k, v, whole):
            torch.matmul(attention_weights(q, append_codes(k, codes)), v, out=out)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        q, k, codes, v = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for q, k, v, grad_out, grad_q, grad_k, grad_v in chunks(q, k, v, grad, *grads):
            keys = append_codes(k, codes)
            p = attention_weights(q, keys)
            torch.matmul(p.mT, grad_out, out=grad_v)
            grad_s = (grad_out @ v.mT).mul_(p)  # P * dP
            grad_s.addcmul_(p, grad_s.sum(dim=-1, keepdim=True), value=-1)
            torch.matmul(grad_s, keys, out=grad_q)
            torch.matmul(grad_s.mT, q[..., : k.shape[-1]], out=grad_k)
        return grads[0], grads[1], None, grads[2]


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T), in one piece of memory: (..., n, e), (..., m, e) -> (..., n, m)."""
    logits = q @ k.mT
    return torch.softmax(logits, dim=-1, out=logits)


def chunks(q: Tensor, k: Tensor, *more: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Splits all alike along the first axis: at most `CHUNK_LOGITS` logits, or one window."""
    size = max(1, CHUNK_LOGITS // (q.shape[1] * q.shape[2] * k.shape[2]))
    return zip(*(t.split(size) for t in (q, k, *more)))


def split_grid(x: Tensor, rows: int, cols: int) -> list[list[Tensor]]:
    """(B, h, w, ...) -> the part that full windows of rows x cols cover, and the rest on the right;
    below, the same."""
    bands = x.split(split_sizes(x.shape[1], rows), dim=1)
    return [list(band.split(split_sizes(x.shape[2], cols), dim=2)) for band in bands]


def split_sizes(n: int, side: int) -> list[int]:
    """How many of n tokens lie in full windows of `side`, and how many in a rest; no zeros."""
    return [part for part in (n - n % side, n % side) if part]


def cut_windows(x: Tensor, rows: int, cols: int) -> Tensor:
    """(B, h, w, heads, d), h and w multiples of rows and cols -> (B * windows, heads, rows, cols,
    d), row by row."""
    B, h, w, heads, d = x.shape
    x = x.view(B, h // rows, rows, w // cols, cols, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).contiguous().view(-1, heads, rows, cols, d)


def merge_windows(windows: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `cut_windows`: (B * windows, heads, rows, cols, d) -> (B, h, w, heads * d)."""
    _, heads, rows, cols, d = windows.shape
    x = windows.view(-1, h // rows, w // cols, heads, rows, cols, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, h, w, heads * d)


# ------------------------------------------------------------------------------------------ tuners


def fast_mix(u: Tensor, weights: Tensor | None) -> Tensor:
    """`tuners.mix_modalities` in fewer passes: (w - e) u + e * (the sum over all modalities), where
    e = (1 - w) / (M - 1) is what each of the others adds. Without weights, u."""
    if weights is None:
        return u
    if getattr(weights, "present", None) is not None:
        return mix_modalities(u, weights)
    M = len(u)
    w = weights.view(M, *[1] * (u.ndim - 1))
    each = (1 - w) / (M - 1)
    first, *others = u.unbind()
    return (w - each).to(u.dtype) * u + each.to(u.dtype) * sum(others, first)


class FastFrozen:
    """Mixed into a layer that adopts a frozen one's weight and bias."""

    def frozen(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return super().frozen(x)
        return linear(x, self.weight, self.bias)


class FastRescaledLinear(FastFrozen, RescaledLinear):
    pass


class FastDoRALinear(FastFrozen, DoRALinear):
    pass


class FastLoRA(FastFrozen, LoRA):
    def mix(self, update: Tensor) -> Tensor:
        return fast_mix(update, self.mixing)


class FastStandardAdapter(StandardAdapter):
    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        z = x + (a + recompute(lambda a: adapt(self.attn_adapters, a), a))
        return z + self.mlp(self.norm2(z))


class FastMMAdapter(MMAdapter):
    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        z = x + (a + recompute(lambda a: adapt(self.attn_adapters, a), a))
        n, u = recompute(self.exchange, z)
        return z + (self.mlp(n) + u)

    def exchange(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """n and what the modalities tell each other of it, each (M*B, h, w, C)."""
        n = self.norm2(z)
        u = adapt(self.mlp_adapters, n).unflatten(0, (len(self.mlp_adapters), -1))
        return n, fast_mix(u, self.mixing).flatten(0, 1)


FASTER: dict[type, type] = {
    Attention: FastAttention,
    LoRA: FastLoRA,
    RescaledLinear: FastRescaledLinear,
    DoRALinear: FastDoRALinear,
    StandardAdapter: FastStandardAdapter,
    MMAdapter: FastMMAdapter,
}
# Of blocks whose norms feed nothing but `attn`, `mlp`, adapters and bypasses.
KNOWN_FORWARDS = tuple(
    block.forward for block in (Block, FastStandardAdapter, FastMMAdapter, AdaptFormer, Convpass)
)
