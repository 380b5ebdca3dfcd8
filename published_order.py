"""The published order of computation, plainly: what `benchmark.py` compares with, and what the
tests check against.

It is the same function of the same weights as `mfnet.MFNet`, computed as the published code does
it: windows are cut first and padded with zeros, so that every layer of the attention runs on padded
tokens; the modalities go through each block one after the other; every matrix of attention is
written out, its bias added, and its softmax taken. Fusion and decoder are the network's own.

Shapes: `M` modalities, each a tensor of a list, not stacked; `B` batch, `h, w` tokens, `C` width,
`N` windows, `s` side of a window, `K` classes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from attention import relative_table
from mfnet import SIZE_STEP, MFNet, as_three_channels, reflect_pad, round_up
from sam_vit import Attention, resize_positions
from tuners import LoRA, MMAdapter

Streams = list[Tensor]  # one tensor for each modality


def published_forward(model: MFNet, *rasters: Tensor) -> Tensor:
    """The logits (B, K, H, W) that `model(*rasters)` gives, to rounding; rasters as there."""
    H, W = rasters[0].shape[-2:]
    padded = round_up(H, SIZE_STEP), round_up(W, SIZE_STEP)
    maps = published_encode(model, [reflect_pad(as_three_channels(r), *padded) for r in rasters])
    return model.decoder(model.fusion(maps), padded)[..., :H, :W]


def published_encode(model: MFNet, xs: Streams) -> Streams:
    """M times (B, 3, H, W), multiples of 32 -> M times the encoder's map (B, 256, h, w)."""
    encoder = model.image_encoder
    xs = [encoder.patch_embed(x) for x in xs]  # (B, h, w, C)
    xs = [x + resize_positions(encoder.pos_embed, x.shape[1:3]) for x in xs]
    for block in encoder.blocks:
        xs = run_block(block, xs)
    return [encoder.neck(x.permute(0, 3, 1, 2)) for x in xs]


def run_block(block: nn.Module, xs: Streams) -> Streams:
    adapted = isinstance(block, MMAdapter)
    outs = attend(block.attn, [block.norm1(x) for x in xs])
    if adapted:
        outs = [a + adapter(a) for a, adapter in zip(outs, block.attn_adapters)]
    xs = [x + a for x, a in zip(xs, outs)]
    ns = [block.norm2(x) for x in xs]
    hidden = [F.gelu(y) for y in linear(block.mlp.lin1, ns)]
    outs = linear(block.mlp.lin2, hidden)
    xs = [x + y for x, y in zip(xs, outs)]
    if adapted:
        us = mix([adapter(n) for n, adapter in zip(ns, block.mlp_adapters)], block.mixing)
        xs = [x + u for x, u in zip(xs, us)]
    return xs


def linear(layer: nn.Module, xs: Streams) -> Streams:
    """A frozen layer, one modality after the other, with its LoRA where it carries one."""
    ys = [F.linear(x, layer.weight, layer.bias) for x in xs]
    if not isinstance(layer, LoRA):
        return ys
    for i, part in enumerate(layer.parts):
        updates = [x @ layer.lora_A[m, i].T @ layer.lora_B[m, i].T for m, x in enumerate(xs)]
        for y, update in zip(ys, mix(updates, layer.mixing)):
            y[..., part] += layer.scale * update
    return ys


def mix(us: Streams, weights: Tensor | None) -> Streams:
    """Own share and the others' mean, as in `tuners.mix_modalities`."""
    if weights is None:
        return us
    others = [sum(u for n, u in enumerate(us) if n != m) / (len(us) - 1) for m in range(len(us))]
    return [w * u + (1 - w) * other for w, u, other in zip(weights, us, others)]


def attend(attn: Attention, xs: Streams) -> Streams:
    """M times (B, h, w, C) -> the same, with windows cut, and padded with zeros, before anything is
    computed.
    """
    B, h, w, C = xs[0].shape
    rows, cols = (attn.window, attn.window) if attn.window else (h, w)
    H, W = round_up(h, rows), round_up(w, cols)
    cut = [F.pad(x, (0, 0, 0, W - w, 0, H - h)) for x in xs]
    cut = [
        x.view(B, H // rows, rows, W // cols, cols, C).transpose(2, 3).reshape(-1, rows * cols, C)
        for x in cut
    ]
    heads = attn.num_heads
    rel_h, rel_w = relative_table(attn.rel_pos_h, rows), relative_table(attn.rel_pos_w, cols)
    outs = []
    for qkv in linear(attn.qkv, cut):  # (N, s*s, 3C)
        q, k, v = (
            qkv.view(len(qkv), rows * cols, 3, heads, C // heads)
            .permute(2, 0, 3, 1, 4)
            .flatten(1, 2)
        )
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (N*heads, s*s, s*s)
        q = q.view(-1, rows, cols, C // heads)
        bias_h = torch.einsum("nyxd,ykd->nyxk", q, rel_h.to(q.dtype))[..., :, None]
        bias_w = torch.einsum("nyxd,xkd->nyxk", q, rel_w.to(q.dtype))[..., None, :]
        weights = (weights.view(-1, rows, cols, rows, cols) + bias_h + bias_w).view_as(weights)
        out = (weights.softmax(dim=-1) @ v).view(-1, heads, rows * cols, C // heads).transpose(1, 2)
        out = attn.proj(out.reshape(B, H // rows, W // cols, rows, cols, C))
        outs.append(out.transpose(2, 3).reshape(B, H, W, C)[:, :h, :w])
    return outs


@torch.inference_mode()
def published_predict(
    model: MFNet,
    image: np.ndarray,
    dsm: np.ndarray,
    window: int,
    stride: int,
    batch_size: int,
    heights: tuple[float, float],
) -> np.ndarray:
    """The class map (H, W) of an image (H, W, 3) uint8 and heights (H, W), both at least a window
    large.

    The published loop: a window that would pass the edge is moved inwards, and so computed again
    and again; the logits of the whole tile are summed at full size."""
    H, W = dsm.shape
    x = torch.from_numpy(image).permute(2, 0, 1) / 255
    y = (torch.from_numpy(dsm) - heights[0]) / (heights[1] - heights[0])
    places = [
        (min(top, H - window), min(left, W - window))
        for top in range(0, H, stride)
        for left in range(0, W, stride)
    ]
    sums = None
    for i in range(0, len(places), batch_size):
        batch = places[i : i + batch_size]
        cuts = [np.s_[..., top : top + window, left : left + window] for top, left in batch]
        out = published_forward(
            model, torch.stack([x[c] for c in cuts]), torch.stack([y[c] for c in cuts])
        ).float()
        sums = out.new_zeros(out.shape[1], H, W) if sums is None else sums
        for cut, logits in zip(cuts, out):
            sums[cut] += logits
    return sums.argmax(dim=0).byte().numpy()
