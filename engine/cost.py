"""What the encoder has to multiply, counted from the shapes, and how fast this machine multiplies.

A product (n, a, b, c) stands for n matrix products of (a, b) by (b, c): 2 n a b c operations.

Shapes: `B` images of a batch, `M` modalities, `T` tokens of all images and modalities.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable

import torch

from fast import linear, split_sizes
from mfnet import MFNet

Product = tuple[int, int, int, int]


def encoder_products(model: MFNet, batch: int, crop: int) -> Counter[Product]:
    """The matrix products that the encoder's forward pass needs for `batch` images of crop x crop
    -> how often each: SAM's layers on real tokens, attention, and what the tuner says it adds."""
    encoder, M = model.image_encoder, model.modalities
    side = crop // encoder.patch_size
    T, C = M * batch * side * side, encoder.pos_embed.shape[-1]
    products: Counter[Product] = Counter()
    products[1, T, 3 * encoder.patch_size**2, C] += 1
    for name, p in encoder.blocks.named_parameters(prefix="blocks"):
        if name not in encoder.added_names and p.ndim == 2 and ".rel_pos_" not in name:
            products[1, T, p.shape[1], p.shape[0]] += 1  # of a linear layer, (out, in)
    for block in encoder.blocks:
        products.update(attention_products(block.attn, M * batch, side))
        products.update(block.added_products(T))
    out = encoder.neck[0].out_channels
    products[1, T, C, out] += 1
    products[1, T, 9 * out, out] += 1
    return products


def attention_products(attn: torch.nn.Module, images: int, side: int) -> Counter[Product]:
    """Those of softmax(q k^T + bias) v on grids of side x side tokens: real queries, real keys, one
    key of padding."""
    heads, d, window = attn.num_heads, attn.rel_pos_h.shape[1], attn.window or side
    products: Counter[Product] = Counter()
    for h in split_sizes(side, window):
        for w in split_sizes(side, window):
            a, b = min(h, window), min(w, window)
            windows = images * (h // a) * (w // b)
            keys = a * b + (a * b < window * window)
            products[windows * heads, a * b, d, keys] += 1  # q k^T
            products[windows * heads, a * b, keys, d] += 1
            products[1, windows * heads * a * b, d, 2 * window] += 1  # q . rel_h and q . rel_w
    return products


def operations(products: Counter[Product]) -> int:
    return sum(count * 2 * n * a * b * c for (n, a, b, c), count in products.items())


def ceiling(
    products: Counter[Product], dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """Seconds that the products take by themselves: of each the median of `repeats`, times how
    often it is needed. A product with a weight counts as the faster of a matrix product and of
    `fast.linear`, which may go about it in another way."""
    seconds = 0.0
    for (n, a, b, c), count in products.items():
        x = torch.randn(n, a, b, device=device).to(dtype).squeeze(0)
        y = torch.randn(n, b, c, device=device).to(dtype).squeeze(0)
        ways = [lambda: torch.matmul(x, y)]
        if n == 1:
            weight, bias = y.T.contiguous(), y.new_zeros(c)
            ways.append(lambda: linear(x, weight, bias))
        with torch.inference_mode():
            seconds += count * min(median_seconds(way, repeats, device) for way in ways)
    return seconds


def median_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    work()
    calls = 20 if device.type == "cuda" else 1  # one alone waits for its launch
    several = [timed(lambda: [work() for _ in range(calls)], device) for _ in range(repeats)]
    return statistics.median(several) / calls


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on a GPU with what it has set going there."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def machine(device: torch.device) -> str:
    """The processor or the GPU, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = next(models, name)
    return f"{name}, {torch.get_num_threads()} threads"
