"""Other published tuners, in the same frame: `import zoo` adds them to `tuners.TUNERS`.

    adaptformer convpass             a bottleneck beside the MLP, convolutions beside both halves
    ssf ia3                          channels rescaled, and shifted
    dora                             LoRA of the weights' direction, and their length
    vpt                              prompts: learned tokens that every window attends to
    bitfit norm partial              weights of SAM's own: biases, norms, the last blocks

`mfnet.py` imports this module, so `build_mfnet` and every script know all of them.

What a tuner adds, each modality has of its own. As in the paper's tuners, what comes to the
attention stays there, and what comes to the MLP is mixed, w_m own + (1 - w_m) mean of the others
(`tuners.mix_modalities`), unless `mixing` is off. Weights of SAM's that a tuner trains are shared
by the modalities, so there is nothing to mix; nor do prompts add anything to a stream.

Shapes: `M` modalities, `B` batch, `N` windows, `h, w` tokens, `C` width, `D` width of a layer's
output, `r` rank, `P` prompts, `d` width of a head; x is (M*B, h, w, C).
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sam_vit import (
    Attention,
    Block,
    decomposed_rel_pos,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from tuners import (
    TUNERS,
    Adapter,
    LoRA,
    Tuner,
    adapt,
    adapter_products,
    describe_mixing,
    lora_products,
    mix_streams,
    new_mixing,
)


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value}: at least 1 is needed")
    return value


def named_halves(layers: str) -> list[str]:
    """ "attn", "mlp" or "attn+mlp" -> the halves of a block that it names."""
    halves = layers.split("+")
    if layers not in ("attn", "mlp", "attn+mlp"):
        raise ValueError(f"layers={layers}: attn, mlp or attn+mlp is needed")
    return halves


# -------------------------------------------------------------------------------- beside the layers


class ReLUAdapter(Adapter):
    """W2 ReLU(W1 t), zero at the start."""

    def __init__(self, dim: int, bottleneck: int):
        super().__init__(dim, bottleneck)
        nn.init.kaiming_normal_(self.fc1.weight)
        for p in (self.fc1.bias, self.fc2.weight, self.fc2.bias):
            nn.init.zeros_(p)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(t)))


class AdaptFormer(Tuner):
    """A scaled bottleneck beside the MLP: Chen, Ge, Tong, Wang, Song, Wang, Luo, "AdaptFormer:
    Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535.

    n = norm2(z);   u_m = scale * W2 ReLU(W1 n_m);   out = z + mlp(n) + mix_m(u)
    """

    def __init__(
        self,
        block: Block,
        modalities: int,
        bottleneck: int = 64,
        scale: float = 0.1,
        mixing: bool = True,
    ):
        super().__init__(block, modalities)
        width, self.scale = at_least_one("bottleneck", bottleneck), scale
        self.adapters = nn.ModuleList(ReLUAdapter(self.width, width) for _ in range(modalities))
        self.mixing = new_mixing(modalities, mixing)

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.attn(self.norm1(x))
        n = self.norm2(z)
        return z + self.mlp(n) + mix_streams(self.scale * adapt(self.adapters, n), self.mixing)

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        return adapter_products(self.adapters, tokens)


class Bypass(nn.Module):
    """1x1, 3x3 and 1x1 convolution with GELU between them, zero at the start: (B, h, w, C) -> the
    same. The 3x3 sees the whole grid, across windows, and starts as the identity."""

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, kernel_size=3, padding=1)
        self.up = nn.Linear(bottleneck, dim)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.dirac_(self.conv.weight)
        for p in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, t: Tensor) -> Tensor:
        t = F.gelu(self.down(t)).movedim(-1, 1)  # (B, bottleneck, h, w)
        return self.up(F.gelu(self.conv(t)).movedim(1, -1))


class Convpass(Tuner):
    """Convolutions beside the attention and the MLP: Jie, Deng, "Convolutional Bypasses Are Better
    Vision Transformer Adapters", ECAI 2024, arXiv 2207.07039.

    n = norm1(x);   z = x + attn(n) + scale * AttnBypass_m(n)
    n = norm2(z);   u_m = scale * MlpBypass_m(n_m);   out = z + mlp(n) + mix_m(u)
    """

    def __init__(
        self,
        block: Block,
        modalities: int,
        bottleneck: int = 8,
        scale: float = 1.0,
        mixing: bool = True,
    ):
        super().__init__(block, modalities)
        C, width, self.scale = self.width, at_least_one("bottleneck", bottleneck), scale
        self.attn_bypasses = nn.ModuleList(Bypass(C, width) for _ in range(modalities))
        self.mlp_bypasses = nn.ModuleList(Bypass(C, width) for _ in range(modalities))
        self.mixing = new_mixing(modalities, mixing)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        z = x + self.attn(n) + self.scale * adapt(self.attn_bypasses, n)
        n = self.norm2(z)
        return z + self.mlp(n) + mix_streams(self.scale * adapt(self.mlp_bypasses, n), self.mixing)

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        attn, mlp = (adapter_products(b, tokens) for b in (self.attn_bypasses, self.mlp_bypasses))
        return attn + mlp


# ----------------------------------------------------------------------------------- on the layers


class Rescale(nn.Module):
    """y_m + mix_m(u) with u_m = (scale_m - 1) y_m + shift_m: (M*B, ..., D) -> the same; unmixed it
    is scale_m y_m + shift_m. The first `skip` channels stay as they are; `std` is the spread of
    scale around 1 and of shift around 0 at the start."""

    def __init__(
        self,
        modalities: int,
        width: int,
        skip: int = 0,
        shift: bool = False,
        std: float = 0.0,
        mixing: bool = False,
    ):
        super().__init__()
        self.scale = nn.Parameter(1 + std * torch.randn(modalities, width - skip))
        self.shift = nn.Parameter(std * torch.randn(modalities, width)) if shift else None
        self.mixing = new_mixing(modalities, mixing)
        self.skip = skip

    def forward(self, y: Tensor) -> Tensor:
        streams = y.reshape(len(self.scale), -1, y.shape[-1])  # (M, tokens, D)
        u = F.pad(self.scale - 1, (self.skip, 0))[:, None] * streams
        if self.shift is not None:
            u = u + self.shift[:, None]
        return y + mix_streams(u, self.mixing).view_as(y).to(y.dtype)

    def extra_repr(self) -> str:
        M, width = self.scale.shape
        shift = "" if self.shift is None else ", shift"
        return f"modalities={M}, width={width}{shift}, {describe_mixing(self.mixing)}"


class RescaledLinear(nn.Module):
    """A frozen linear layer, adopted, with a `Rescale` in front of it or behind."""

    def __init__(
        self, linear: nn.Linear, before: Rescale | None = None, after: Rescale | None = None
    ):
        super().__init__()
        self.weight, self.bias, self.before, self.after = linear.weight, linear.bias, before, after

    def frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x if self.before is None else self.before(x))
        return y if self.after is None else self.after(y)


class SSF(Tuner):
    """Scale and shift behind every layer of a block: Lian, Zhou, Feng, Wang, "Scaling & Shifting
    Your Features", NeurIPS 2022, arXiv 2210.08823.

        y_m <- scale_m * y_m + shift_m     of norm1, qkv, proj, norm2;  lin1 and lin2: mixed

    differs: the layer that embeds the patches lies outside the blocks and stays as it is.
    """

    starts_as_frozen = False  # both start at random, as in its code

    def __init__(self, block: Block, modalities: int, mixing: bool = True):
        super().__init__(block, modalities)

        def new(width: int, mixed: bool = False) -> Rescale:
            return Rescale(modalities, width, shift=True, std=0.02, mixing=mixed)

        self.after_norm1, self.after_norm2 = new(self.width), new(self.width)
        for part, name, mixed in (
            (self.attn, "qkv", False),
            (self.attn, "proj", False),
            (self.mlp, "lin1", mixing),
            (self.mlp, "lin2", mixing),
        ):
            linear = getattr(part, name)
            setattr(part, name, RescaledLinear(linear, after=new(linear.out_features, mixed)))

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.attn(self.after_norm1(self.norm1(x)))
        return z + self.mlp(self.after_norm2(self.norm2(z)))


class IA3(Tuner):
    """Keys, values and the MLP's hidden channels rescaled: Liu, Tam, Muqeeth, Mohta, Huang, Bansal,
    Raffel, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", NeurIPS 2022, arXiv 2205.05638.

        k_m <- l_k k_m;   v_m <- l_v v_m;   mlp = lin2(l_ff GELU(lin1 n)),  l_ff's part mixed
    """

    def __init__(self, block: Block, modalities: int, mixing: bool = True):
        super().__init__(block, modalities)
        C, hidden = self.width, self.mlp.lin2.in_features
        keys_and_values = Rescale(modalities, 3 * C, skip=C)
        self.attn.qkv = RescaledLinear(self.attn.qkv, after=keys_and_values)
        of_hidden = Rescale(modalities, hidden, mixing=mixing)
        self.mlp.lin2 = RescaledLinear(self.mlp.lin2, before=of_hidden)


class DoRALinear(LoRA):
    """A frozen linear layer W, adopted, whose rows get another direction and length:

        y_m = W x_m + b + mix_m(u);   W x_m + u_m = magnitude_m ||W|| V_m x_m / ||V_m||
        V_m = W + scale B_m A_m

    No gradient flows through ||V||, as the paper proposes. `magnitude` starts at one, B at zero, so
    a new layer computes what W does.

    differs: the paper's norms are those of a column; these of a row, an output channel, as in its
    code. It trains magnitude times ||W||; here ||W|| is taken in the forward pass, because SAM's
    weights may be loaded after the tuner.
    """

    def __init__(self, linear: nn.Linear, modalities: int, *options):
        super().__init__(linear, modalities, *options)
        M, slices, width, _ = self.lora_B.shape
        self.magnitude = nn.Parameter(torch.ones(M, slices, width))

    def forward(self, x: Tensor) -> Tensor:
        M = len(self.lora_A)
        y = self.frozen(x).view(M, -1, len(self.weight))  # (M, tokens, D)
        tokens, u = x.reshape(M, -1, x.shape[-1]), []
        for i, part in enumerate(self.output_slices):  # which cover all of D
            A, B = self.lora_A[:, i], self.lora_B[:, i]  # (M, r, C), (M, width, r)
            gain = self.magnitude[:, i] / relative_length(self.weight[part], B, self.scale, A)
            Wx, update = y[..., part] - self.bias[part], self.scale * (tokens @ A.mT @ B.mT)
            u.append((gain - 1)[:, None] * Wx + gain[:, None] * update)
        y = y + self.mix(torch.cat(u, dim=-1)).to(y.dtype)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def relative_length(W: Tensor, B: Tensor, scale: float, A: Tensor) -> Tensor:
    """||W + scale B A|| / ||W|| of every row: W (D, C), B (M, D, r), A (M, r, C) -> (M, D)."""
    W = W.to(B.dtype)
    return (W + scale * (B @ A)).norm(dim=-1) / W.norm(dim=-1)


class DoRA(Tuner):
    """LoRA of the direction of W and a trained length: Liu, Wang, Yin, Molchanov, Wang, Cheng,
    Chen, "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353.

    On q, k, v and both layers of the MLP, the latter mixed; `layers` leaves one half out: attn,
    mlp or attn+mlp. The update is scaled by alpha / rank.
    """

    def __init__(
        self,
        block: Block,
        modalities: int,
        rank: int = 4,
        alpha: float = 8.0,
        layers: str = "attn+mlp",
        mixing: bool = True,
    ):
        super().__init__(block, modalities)
        rank, scale, C = at_least_one("rank", rank), alpha / rank, self.width
        halves, qkv = named_halves(layers), [slice(i * C, (i + 1) * C) for i in range(3)]
        if "attn" in halves:
            self.attn.qkv = DoRALinear(self.attn.qkv, modalities, rank, scale, qkv, False)
        for name in ("lin1", "lin2") if "mlp" in halves else ():
            linear = getattr(self.mlp, name)
            whole = [slice(0, linear.out_features)]
            setattr(self.mlp, name, DoRALinear(linear, modalities, rank, scale, whole, mixing))

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        products = lora_products(self, tokens)
        for layer in (m for m in self.modules() if isinstance(m, DoRALinear)):
            M, slices, width, rank = layer.lora_B.shape
            products.append((M * slices, width, rank, layer.weight.shape[1]))  # B A
        return products


# ------------------------------------------------------------------------------------------ prompts


class PromptedAttention(nn.Module):
    """SAM's attention, adopted, in which every window has the prompts as further keys and values.
    They have no place, so no relative position: their logits are q k^T / sqrt d alone."""

    def __init__(self, attn: Attention):
        super().__init__()
        self.num_heads, self.window = attn.num_heads, attn.window
        for name in ("qkv", "proj", "rel_pos_h", "rel_pos_w"):
            setattr(self, name, getattr(attn, name))

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """(M*B, h, w, C), prompts (M, P, C) -> (M*B, h, w, C)."""
        h, w = x.shape[1:3]
        rows, cols = (self.window, self.window) if self.window else (h, w)
        x = window_partition(x, rows, cols)  # (N, rows, cols, C)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # each (N, heads, rows, cols, d)
        rel_h, rel_w = get_rel_pos(self.rel_pos_h, rows), get_rel_pos(self.rel_pos_w, cols)
        bias = F.pad(decomposed_rel_pos(q, rel_h, rel_w), (0, prompts.shape[1]))
        of_prompts = self.qkv(prompts).unflatten(-1, (3, self.num_heads, -1))
        of_prompts = of_prompts.repeat_interleave(len(x) // len(prompts), dim=0)
        _, *more = of_prompts.permute(2, 0, 3, 1, 4)  # k and v, each (N, heads, P, d)
        k, v = (torch.cat([t.flatten(2, 3), p], dim=2) for t, p in zip((k, v), more))
        q = q.flatten(2, 3)  # (N, heads, n, d)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias  # (N, heads, n, n + P)
        out = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(x.shape)
        return window_unpartition(self.proj(out), h, w)


class VPT(Tuner):
    """Deep visual prompts: Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim, "Visual Prompt
    Tuning", ECCV 2022, arXiv 2203.12119.

    Every block has P tokens of its own beside those of the image, and what it makes of them is
    dropped, so all that they do is to be attended to. SAM's attention runs in windows: a token sees
    only those of its window, and prompts lie in none. So they join every window, and the global
    attention alike, as keys and values, as VPT has it for Swin's windows; see `PromptedAttention`.
    """

    starts_as_frozen = False

    def __init__(self, block: Block, modalities: int, prompts: int = 10):
        super().__init__(block, modalities)
        at_least_one("prompts", prompts)
        bound = (6 / (3 * 16**2 + self.width)) ** 0.5  # Xavier-uniform of a layer embedding patches
        values = torch.empty(modalities, prompts, self.width).uniform_(-bound, bound)
        self.prompts = nn.Parameter(values)
        self.attn = PromptedAttention(self.attn)

    def forward(self, x: Tensor) -> Tensor:
        z = x + self.attn(self.norm1(x), self.norm1(self.prompts))
        return z + self.mlp(self.norm2(z))

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        (M, P, C), heads = self.prompts.shape, self.attn.num_heads
        d = C // heads
        return [(1, M * P, C, 3 * C), (heads, tokens, d, P), (heads, tokens, P, d)]


# --------------------------------------------------------------------------------- weights of SAM's


class BitFit(Tuner):
    """Every bias of the encoder, patches and neck included: Ben Zaken, Goldberg, Ravfogel, "BitFit:
    Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022,
    arXiv 2106.10199."""

    sam_trained = ("*.bias",)


class NormTuning(Tuner):
    """The blocks' layer norms: Basu, Hu, Massiceti, Feizi, "Strong Baselines for
    Parameter-Efficient Few-Shot Fine-Tuning" (LN-Tune), AAAI 2024, arXiv 2304.01917.

    `layers` names those before the attention, before the MLP, or both: attn, mlp or attn+mlp.
    """

    def __init__(self, block: Block, modalities: int, layers: str = "attn+mlp"):
        super().__init__(block, modalities)
        names = {"attn": "blocks.*.norm1.*", "mlp": "blocks.*.norm2.*"}
        self.sam_trained = tuple(names[half] for half in named_halves(layers))


class Partial(Tuner):
    """The last blocks, whole, and nothing else of the encoder: He, Chen, Xie, Li, Dollar, Girshick,
    "Masked Autoencoders Are Scalable Vision Learners" (partial fine-tuning), CVPR 2022, arXiv
    2111.06377. How many is the option `blocks`, which every tuner has."""

    blocks = "2"
    sam_trained = ("blocks.*",)


TUNERS.update(
    {
        "adaptformer": AdaptFormer,
        "convpass": Convpass,
        "ssf": SSF,
        "ia3": IA3,
        "dora": DoRA,
        "vpt": VPT,
        "bitfit": BitFit,
        "norm": NormTuning,
        "partial": Partial,
    }
)
