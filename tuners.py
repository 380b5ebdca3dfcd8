"""Parameter-efficient tuners: what teaches a frozen encoder both modalities.

A tuner is a class that takes a block of the encoder and is the block that replaces it. It adopts
the block's layers under their old names, so every official checkpoint stays valid, and adds
parameters of its own, which are trained. To add one: derive from `Tuner` and put it into `TUNERS`.
These are the paper's; `import zoo` adds other published ones.

The M modalities lie behind each other along the batch, modality-major: rows 0 to B - 1 are the
first modality. The frozen layers see one batch of M * B; a tuner splits the first axis where it
must tell the modalities apart.

Shapes: `M` modalities, `B` batch, `h, w` tokens, `C` width, `r` rank; x is (M*B, h, w, C).
"""

from __future__ import annotations

import inspect
import sys
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sam_vit import Block, ImageEncoderViT


class Tuner(Block):
    """A block that adopts the layers of a frozen one. By itself it is `frozen`: nothing is trained.

    What a tuner declares: its options are the keyword arguments of its constructor, and `blocks`,
    which `apply_tuner` sees to; the rest stands in the attributes and methods below.
    """

    # The default of its option `blocks`, which of them are tuned: see `count_tuned`.
    blocks = "all"
    # SAM's parameters that are trained besides its own, as patterns: "blocks.*.norm1.*". What they
    # say of a block counts only if it is tuned.
    sam_trained: tuple[str, ...] = ()
    # Whether a new one computes what the frozen block does.
    starts_as_frozen = True

    def __init__(self, block: Block, modalities: int):
        nn.Module.__init__(self)
        for name in ("norm1", "attn", "norm2", "mlp"):
            setattr(self, name, getattr(block, name))

    @property
    def width(self) -> int:
        return self.norm1.normalized_shape[0]

    def mixing_weights(self) -> dict[str, Tensor]:
        """The layers that mix the modalities -> their M weights; {} for streams that stay apart."""
        mixing = [(n, p) for n, p in self.named_parameters() if n.split(".")[-1] == "mixing"]
        return {name.rpartition(".")[0]: p for name, p in mixing}

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        """The matrix products (n, a, b, c) that the tuner adds to a forward pass over `tokens`
        tokens of all modalities: n products of (a, b) by (b, c)."""
        return []


class Full(Tuner):
    """Every weight of the encoder is trained, positions, patches and neck included, whichever
    blocks are."""

    sam_trained = ("*",)


def mix_modalities(u: Tensor, weights: Tensor) -> Tensor:
    """u (M, ...), weights (M,) -> w_m u_m + (1 - w_m) * the mean of the other modalities' u.

    For M = 2 the paper's equation. The weights are learnable scalars, started at 0.5 and not
    clamped, as published. The others are those that are there, if `tell_present` said which; one
    that is alone keeps its u.
    """
    if getattr(weights, "present", None) is not None:
        return mix_present(u, weights)
    M = len(u)
    others = torch.stack([torch.cat([u[:m], u[m + 1 :]]).mean(dim=0) for m in range(M)])
    w = weights.view(M, *[1] * (u.ndim - 1))
    return w * u + (1 - w) * others


def mix_present(u: Tensor, weights: Tensor) -> Tensor:
    """`mix_modalities` where some modalities are missing from some images."""
    M, B = weights.present.shape
    x, there = u.reshape(M, B, -1), weights.present[..., None].to(u.dtype)
    others = there.sum(dim=0) - there  # how many
    mean = ((there * x).sum(dim=0) - there * x) / others.clamp(min=1)
    w = weights.view(M, 1, 1)
    return torch.where(others > 0, w * x + (1 - w) * mean, x).view_as(u)


def tell_present(encoder: nn.Module, present: Tensor | None) -> None:
    """Says which modalities of which images are there, (M, B) bool, until it is called again; the
    encoder and the mixing weights carry it. None: all of them."""
    encoder.present = present
    for name, p in encoder.named_parameters():
        if name.split(".")[-1] == "mixing":
            p.present = present


def mix_streams(x: Tensor, weights: Tensor | None) -> Tensor:
    """`mix_modalities` of what lies behind each other along the batch, (M*B, ...); x without
    weights."""
    if weights is None:
        return x
    return mix_modalities(x.unflatten(0, (len(weights), -1)), weights).flatten(0, 1)


def new_mixing(modalities: int, mixing: bool) -> nn.Parameter | None:
    """One scalar for each modality; None for one modality alone, or for streams kept apart."""
    return nn.Parameter(torch.full((modalities,), 0.5)) if mixing and modalities > 1 else None


# --------------------------------------------------------------------------------------- MMAdapter


class Adapter(nn.Module):
    """W2 GELU(W1 t), a bottleneck without a skip of its own.

    differs: the paper's eq. (1) has ReLU, its code GELU.
    """

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, bottleneck)
        self.fc2 = nn.Linear(bottleneck, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(t)))


def new_adapters(modalities: int, dim: int, ratio: float) -> nn.ModuleList:
    """One adapter for each modality; `ratio` is the bottleneck's fraction of the width."""
    if int(dim * ratio) < 1:
        raise ValueError(f"an adapter of ratio {ratio} has no width in a block of width {dim}")
    return nn.ModuleList(Adapter(dim, int(dim * ratio)) for _ in range(modalities))


def adapt(adapters: nn.ModuleList, x: Tensor) -> Tensor:
    """Each modality through its own adapter: (M*B, h, w, C) -> the same shape."""
    return torch.cat([adapter(t) for adapter, t in zip(adapters, x.chunk(len(adapters)))])


def adapter_products(adapters: nn.ModuleList, tokens: int) -> list[tuple[int, int, int, int]]:
    """A matrix product for each weight, (out, in) or (out, in, 3, 3), of an adapter with its
    modality's share of the tokens."""
    weights = [p.flatten(1).T for p in adapters.parameters() if p.ndim > 1]
    return [(1, tokens // len(adapters), *weight.shape) for weight in weights]


class StandardAdapter(Tuner):
    """Each modality adapted after the attention, on its own: "standard Adapter" of Table IV.

    a = attn(norm1(x));   z = x + a + AttnAdapter_m(a);   out = z + mlp(norm2(z))
    """

    starts_as_frozen = False

    def __init__(self, block: Block, modalities: int, ratio: float = 0.25):
        super().__init__(block, modalities)
        self.attn_adapters = new_adapters(modalities, self.width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        z = x + a + adapt(self.attn_adapters, a)
        return z + self.mlp(self.norm2(z))

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        return adapter_products(self.attn_adapters, tokens)


class MMAdapter(Tuner):
    """Each modality adapted after the attention, and beside the MLP, where they exchange
    information (docs/method.md, MMAdapter).

        a = attn(norm1(x));   z = x + a + AttnAdapter_m(a)
        n = norm2(z);         u_m = MlpAdapter_m(n_m)
        out = z + mlp(n) + w_m u_m + (1 - w_m) u_other

    `ratio` is the bottleneck's fraction of the width; `mixing=False` keeps the streams apart.
    """

    starts_as_frozen = False

    def __init__(self, block: Block, modalities: int, ratio: float = 0.25, mixing: bool = True):
        super().__init__(block, modalities)
        self.attn_adapters = new_adapters(modalities, self.width, ratio)
        self.mlp_adapters = new_adapters(modalities, self.width, ratio)
        self.mixing = new_mixing(modalities, mixing)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        z = x + a + adapt(self.attn_adapters, a)
        n = self.norm2(z)
        return z + self.mlp(n) + mix_streams(adapt(self.mlp_adapters, n), self.mixing)

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        attn, mlp = (adapter_products(a, tokens) for a in (self.attn_adapters, self.mlp_adapters))
        return attn + mlp

    def extra_repr(self) -> str:
        M, bottleneck = len(self.attn_adapters), self.attn_adapters[0].fc1.out_features
        return f"modalities={M}, bottleneck={bottleneck}, {describe_mixing(self.mixing)}"


def describe_mixing(mixing: Tensor | None) -> str:
    if mixing is None:
        return "streams apart"
    return "w=[" + ", ".join(f"{w:.3f}" for w in mixing.tolist()) + "]"


# ------------------------------------------------------------------------------------------ MMLoRA


class LoRA(nn.Module):
    """A frozen linear layer, adopted, plus a low-rank update of each modality's own.

        y_m = W x_m + b + scale (w_m B_m A_m x_m + (1 - w_m) B_o A_o x_o)     if it mixes
        y_m = W x_m + b + scale B_m A_m x_m                                   if not

    `output_slices` are the parts of the output that get an update, each of equal width: the q and
    the v of a fused qkv, or the whole output. B starts at zero, so a new layer computes what the
    frozen one does.

    differs: A starts Kaiming-uniform as in the published code; the paper says Gaussian.
    """

    def __init__(
        self,
        linear: nn.Linear,
        modalities: int,
        rank: int,
        scale: float,
        output_slices: list[slice],
        mixing: bool,
    ):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.output_slices, self.scale = output_slices, scale
        slices, width = len(output_slices), output_slices[0].stop - output_slices[0].start
        bound = linear.in_features**-0.5  # Kaiming-uniform with a = sqrt 5
        A = torch.empty(modalities, slices, rank, linear.in_features).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A)  # (M, slices, r, in)
        self.lora_B = nn.Parameter(torch.zeros(modalities, slices, width, rank))
        self.mixing = new_mixing(modalities, mixing)

    def frozen(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        M = len(self.lora_A)
        y = self.frozen(x).view(M, -1, len(self.weight))  # (M, tokens, out)
        tokens = x.reshape(M, -1, x.shape[-1])  # (M, tokens, in)
        for i, part in enumerate(self.output_slices):
            update = tokens @ self.lora_A[:, i].mT @ self.lora_B[:, i].mT  # (M, tokens, width)
            y[..., part] += self.scale * self.mix(update)
        return y.view(*x.shape[:-1], -1)

    def mix(self, update: Tensor) -> Tensor:
        return update if self.mixing is None else mix_modalities(update, self.mixing)

    def extra_repr(self) -> str:
        M, slices, rank, C = self.lora_A.shape
        text = f"in={C}, out={len(self.weight)}, modalities={M}, updates={slices}, rank={rank}"
        return f"{text}, scale={self.scale:g}, {describe_mixing(self.mixing)}"


def add_lora(
    block: Tuner, M: int, rank: int, qv_scale: float, mlp_scale: float, mixing: bool
) -> None:
    """Puts a LoRA on q and v, unmixed, and one on each layer of the MLP, in place."""
    if rank < 1:
        raise ValueError(f"the rank of a LoRA is at least 1, not {rank}")
    C = block.width
    query_and_value = [slice(0, C), slice(2 * C, 3 * C)]
    block.attn.qkv = LoRA(block.attn.qkv, M, rank, qv_scale, query_and_value, mixing=False)
    for name in ("lin1", "lin2"):
        linear = getattr(block.mlp, name)
        whole = [slice(0, linear.out_features)]
        setattr(block.mlp, name, LoRA(linear, M, rank, mlp_scale, whole, mixing))


def lora_products(block: Tuner, tokens: int) -> list[tuple[int, int, int, int]]:
    """Two matrix products for each update, of each modality's share of the tokens."""
    products = []
    for name, p in block.named_parameters():
        if name.endswith(("lora_A", "lora_B")):  # (M, slices, out, in)
            M, slices, out, C = p.shape
            products.append((M * slices, tokens // M, C, out))
    return products


class MMLoRA(Tuner):
    """LoRA on q and v, each modality's its own, and on both MLP layers, where they are mixed
    (docs/method.md, MMLoRA).

    differs: the update of q and v is scaled by alpha / rank, as in the published code and not in
    the paper; the updates of the MLP are not.
    """

    def __init__(
        self, block: Block, modalities: int, rank: int = 4, alpha: float = 1.0, mixing: bool = True
    ):
        super().__init__(block, modalities)
        add_lora(self, modalities, rank, alpha / max(rank, 1), 1.0, mixing)

    def added_products(self, tokens: int) -> list[tuple[int, int, int, int]]:
        return lora_products(self, tokens)


class StandardLoRA(MMLoRA):
    """MMLoRA unmixed, with all updates scaled by alpha / rank: "standard LoRA" of Table IV."""

    def __init__(self, block: Block, modalities: int, rank: int = 4, alpha: float = 1.0):
        Tuner.__init__(self, block, modalities)
        scale = alpha / max(rank, 1)
        add_lora(self, modalities, rank, scale, scale, mixing=False)


# ---------------------------------------------------------------------------------------- applying

TUNERS: dict[str, type[Tuner]] = {
    "frozen": Tuner,  # the encoder is a fixed feature extractor: only fusion and decoder learn
    "full": Full,
    "adapter": MMAdapter,
    "lora": MMLoRA,
    "standard-adapter": StandardAdapter,
    "standard-lora": StandardLoRA,
}


def tuner_options(name: str) -> dict[str, object]:
    """The options of a tuner with their defaults. Raises ValueError for an unknown tuner."""
    if name not in TUNERS:
        more = "" if "zoo" in sys.modules else "; those of zoo.py need `import zoo`"
        raise ValueError(f"unknown tuner {name!r}; there are {', '.join(TUNERS)}{more}")
    tuner = TUNERS[name]
    _, _, *options = inspect.signature(tuner).parameters.values()
    placement = {} if tuner is Tuner else {"blocks": tuner.blocks}  # `frozen` tunes none
    return {option.name: option.default for option in options} | placement


def count_tuned(blocks: str | int, depth: int) -> int:
    """How many blocks, counted from the last, are tuned: "all", "late" (the last half, of an odd
    number the larger) or so many. Raises ValueError for anything else."""
    words = {"all": depth, "late": depth - depth // 2} | {str(k): k for k in range(1, depth + 1)}
    if str(blocks) not in words:
        raise ValueError(f"blocks={blocks}: all, late or a number from 1 to {depth} is needed")
    return words[str(blocks)]


def check_options(name: str, options: dict[str, object]) -> None:
    """Raises ValueError for an option that the tuner does not have."""
    known = tuner_options(name)
    for option in options:
        if option not in known:
            listed = ", ".join(f"{k}={v}" for k, v in known.items()) or "none"
            raise ValueError(f"the tuner {name} has no option {option!r}; its options: {listed}")


def parse_option(name: str, text: str) -> tuple[str, object]:
    """ "ratio=0.5" -> ("ratio", 0.5), by the type of the option's default. Raises ValueError."""
    option, equals, value = text.partition("=")
    check_options(name, {option: value})
    default = tuner_options(name)[option]
    kinds = {bool: {"true": True, "false": False}.__getitem__, int: int, float: float, str: str}
    try:
        if not equals:
            raise ValueError
        return option, kinds[type(default)](value.lower() if isinstance(default, bool) else value)
    except (KeyError, ValueError):
        raise ValueError(f"{text!r}: write {option}=VALUE, as {option}={default}") from None


def apply_tuner(
    encoder: ImageEncoderViT, name: str, modalities: int = 2, **options
) -> ImageEncoderViT:
    """Replaces the blocks of `encoder` by the tuner's, in place, and freezes all it does not train.
    A block that the option `blocks` leaves out stays as it is without a tuner, frozen.

    Raises ValueError for an unknown tuner or option, for no modality, and for an encoder that
    carries a tuner already.
    """
    check_options(name, options)
    if modalities < 1:
        raise ValueError(f"at least one modality is needed, not {modalities}")
    if encoder.tuner is not None:
        raise ValueError(f"this encoder carries the tuner {encoder.tuner!r} already")
    sam = dict(encoder.named_parameters())
    tuned = count_tuned(options.pop("blocks", TUNERS[name].blocks), len(encoder.blocks))
    before, after = list(encoder.blocks)[:-tuned], list(encoder.blocks)[-tuned:]
    blocks = [Tuner(block, modalities) for block in before]
    blocks += [TUNERS[name](block, modalities, **options) for block in after]
    encoder.blocks = nn.ModuleList(blocks)
    for n, p in sam.items():
        p.requires_grad_(is_trained_of_sam(n, encoder.blocks))
    encoder.tuner = name
    encoder.added_names = [n for n, _ in encoder.named_parameters() if n not in sam]
    return encoder


def is_trained_of_sam(name: str, blocks: nn.ModuleList) -> bool:
    """Whether a parameter of SAM's is trained: one of a block by what that block declares, any
    other by what any block does."""
    part, number, *_ = name.split(".", 2) + [""]
    asked = [blocks[int(number)]] if part == "blocks" else blocks
    return any(fnmatchcase(name, p) for block in asked for p in getattr(block, "sam_trained", ()))


def tuner_names(encoder: ImageEncoderViT) -> list[str]:
    """The names of the parameters that the encoder's tuner trains: its own, and those of SAM's that
    it declares."""
    names, added = [n for n, _ in encoder.named_parameters()], set(encoder.added_names)
    return [n for n in names if n in added or is_trained_of_sam(n, encoder.blocks)]
