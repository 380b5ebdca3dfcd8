"""How a frozen encoder is taught: `frozen`, `full`, `adapter` (MMAdapter) and `lora` (MMLoRA).

A tuner is a function from a block of the encoder to the block that takes its place. The new block
*adopts* the layers of the old one under their old names, so every official checkpoint stays valid,
and adds parameters of its own; those are what is trained. To add a tuner: write one class, put one
line into `TUNERS`.

The M modalities lie behind each other along the batch, modality-major: rows 0 to B-1 are the first
modality. The frozen layers see one batch of M*B; a tuner splits the first axis where it must tell
the modalities apart.

Shapes: `M` modalities, `B` batch, `h, w` tokens, `C` width, `r` rank; x is (M*B, h, w, C).
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from linear import Linear, linear
from sam_vit import Block, ImageEncoderViT, recomputed


def mix_modalities(u: Tensor, weights: Tensor) -> Tensor:
    """u (M, ...), weights (M,) -> w_m u_m + (1 - w_m) * the mean of the others' u. For M = 2 the
    paper's equation.

    The weights are learnable scalars, started at 0.5 and not clamped, as published.
    """
    M = u.shape[0]
    w = weights.view(M, *[1] * (u.ndim - 1))
    share = (1 - w) / (
        M - 1
    )  # of each of the others, so that (w - share) u_m + share * (the sum of all) is the mixture
    first, *others = u.unbind()
    return (w - share).to(u.dtype) * u + share.to(u.dtype) * sum(others, first)


def mixing_weights(modalities: int, mixing: bool) -> nn.Parameter | None:
    """One scalar for each modality; None for one modality alone, or for streams that are not to be
    mixed.
    """
    return nn.Parameter(torch.full((modalities,), 0.5)) if mixing and modalities > 1 else None


# ---------------------------------------------------------------------------------------- MMAdapter


class Adapter(nn.Module):
    """W2 GELU(W1 t), a bottleneck without a skip of its own."""

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.fc1 = Linear(dim, bottleneck)
        self.fc2 = Linear(bottleneck, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(t)))


class MMAdapter(nn.Module):
    """A block with two adapters for each modality; the MLP's adapters exchange information
    (PAPER.md 1, MMAdapter).

        a = attn(norm1(x));          a <- a + AttnAdapter_m(a);   z = x + a
        n = norm2(z);                u_m = MlpAdapter_m(n_m)
        out = z + mlp(n) + w_m u_m + (1 - w_m) u_other

    `ratio` is the bottleneck's share of the width; `mixing=False` keeps the streams apart (the
    paper's "standard").

    What the adapters compute is computed again going backward, not kept: with the default ratio it
    is a fourteenth of the block's operations, but a quarter of what it would keep."""

    def __init__(self, block: Block, modalities: int, ratio: float = 0.25, mixing: bool = True):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )
        dim = self.norm1.normalized_shape[0]
        bottleneck = int(dim * ratio)
        if bottleneck < 1:
            raise ValueError(
                f"an adapter of ratio {ratio} has no width left in a block of width {dim}"
            )
        self.attn_adapters = nn.ModuleList(Adapter(dim, bottleneck) for _ in range(modalities))
        self.mlp_adapters = nn.ModuleList(Adapter(dim, bottleneck) for _ in range(modalities))
        self.mixing = mixing_weights(modalities, mixing)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))  # (M*B, h, w, C)
        z = x + (a + recomputed(self.adapt_attention, a))
        n, u = recomputed(self.exchange, z)
        return z + (self.mlp(n) + u)

    def adapt_attention(self, a: Tensor) -> Tensor:
        return adapt(self.attn_adapters, a).flatten(0, 1)

    def exchange(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """n and what the modalities tell each other of it, each (M*B, h, w, C)."""
        n = self.norm2(z)
        u = adapt(self.mlp_adapters, n)  # (M, B, h, w, C)
        if self.mixing is not None:
            u = mix_modalities(u, self.mixing)
        return n, u.flatten(0, 1)


def adapt(adapters: nn.ModuleList, x: Tensor) -> Tensor:
    """Each modality through its own adapter: (M*B, h, w, C) -> (M, B, h, w, C)."""
    return torch.stack([adapter(t) for adapter, t in zip(adapters, x.chunk(len(adapters)))])


# ------------------------------------------------------------------------------------------- MMLoRA


class LoRA(nn.Module):
    """A frozen linear layer, adopted, plus B_m A_m x for each modality m.

    `parts` are the slices of the output that get an update, each of equal width: the q and the v of
    a fused qkv, or the whole output. A: Kaiming-uniform, B: zero, so that a new layer computes what
    the frozen one does."""

    def __init__(
        self,
        linear: nn.Linear,
        modalities: int,
        rank: int,
        scale: float,
        parts: list[slice],
        mixing: bool,
    ):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.parts, self.scale = parts, scale
        width = parts[0].stop - parts[0].start
        bound = linear.in_features**-0.5  # Kaiming-uniform with a = sqrt 5
        A = torch.empty(modalities, len(parts), rank, linear.in_features).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)  # (M, parts, r, in)
        self.lora_B = nn.Parameter(
            torch.zeros(modalities, len(parts), width, rank)
        )  # (M, parts, width, r)
        self.mixing = mixing_weights(modalities, mixing)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)  # (M*B, h, w, out)
        M = self.lora_A.shape[0]
        tokens = x.reshape(M, -1, x.shape[-1])  # (M, B*h*w, in)
        y = y.view(M, -1, y.shape[-1])
        for i, part in enumerate(self.parts):
            update = tokens @ self.lora_A[:, i].mT @ self.lora_B[:, i].mT  # (M, B*h*w, width)
            if self.mixing is not None:
                update = mix_modalities(update, self.mixing)
            y[..., part] += self.scale * update
        return y.view(*x.shape[:-1], -1)


class MMLoRA(Block):
    """A block whose qkv (on q and v, no mixing) and both MLP layers (with mixing) carry LoRA
    (PAPER.md 1, MMLoRA).

    The update of qkv is scaled by alpha / rank, the updates of the MLP are not, as published.
    """

    def __init__(
        self, block: Block, modalities: int, rank: int = 4, alpha: float = 1.0, mixing: bool = True
    ):
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = (
            block.norm1,
            block.attn,
            block.norm2,
            block.mlp,
        )
        if rank < 1:
            raise ValueError(f"the rank of a LoRA is at least 1, not {rank}")
        C = self.attn.qkv.in_features
        query_and_value = [slice(0, C), slice(2 * C, 3 * C)]
        self.attn.qkv = LoRA(
            self.attn.qkv, modalities, rank, alpha / rank, query_and_value, mixing=False
        )
        for name in ("lin1", "lin2"):
            linear = getattr(self.mlp, name)
            whole = [slice(0, linear.out_features)]
            setattr(self.mlp, name, LoRA(linear, modalities, rank, 1.0, whole, mixing))


# ----------------------------------------------------------------------------------------- applying


def unchanged(block: Block, modalities: int) -> Block:
    return block


TUNERS: dict[str, Callable[..., nn.Module]] = {
    "frozen": unchanged,  # the encoder is a fixed feature extractor: only fusion and decoder learn
    "full": unchanged,  # every weight of the encoder is trained
    "adapter": MMAdapter,
    "lora": MMLoRA,
}


def apply_tuner(
    encoder: ImageEncoderViT, name: str, modalities: int = 2, **options
) -> ImageEncoderViT:
    """Replaces the blocks of `encoder` in place by blocks of the tuner, and freezes everything that
    it does not train.

    `options` are the tuner's own: `ratio` and `mixing` for adapter; `rank`, `alpha` and `mixing`
    for lora. Raises ValueError for an unknown tuner, for no modality, or for an encoder that
    carries a tuner already."""
    if name not in TUNERS:
        raise ValueError(f"unknown tuner {name!r}; there are {', '.join(TUNERS)}")
    if modalities < 1:
        raise ValueError(f"at least one modality is needed, not {modalities}")
    if encoder.tuner is not None:
        raise ValueError(f"this encoder carries the tuner {encoder.tuner!r} already")
    sam = dict(encoder.named_parameters())
    encoder.blocks = nn.ModuleList(
        [TUNERS[name](block, modalities, **options) for block in encoder.blocks]
    )
    for p in sam.values():
        p.requires_grad_(name == "full")
    encoder.tuner = name
    encoder.added_names = [n for n, _ in encoder.named_parameters() if n not in sam]
    return encoder


def tuner_names(encoder: ImageEncoderViT) -> list[str]:
    """The names of the parameters that the encoder's tuner trains; what SAM brought, only for
    `full`.
    """
    if encoder.tuner == "full":
        return [n for n, _ in encoder.named_parameters()]
    return list(encoder.added_names)
