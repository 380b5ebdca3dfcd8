"""Segment Anything's image encoder (Kirillov et al. 2023), with SAM's parameter names.

    pixels -> patch_embed -> + pos_embed -> blocks -> neck -> features
              16 x 16 conv                  ViT       1x1, 3x3 conv

Every name below is the name of an official checkpoint's tensor once its prefix `image_encoder.` is
gone, so the checkpoint is the specification: `load_sam_weights` accounts for every tensor of it, or
raises.

Two facts of SAM that are easy to miss, and that are kept:
  * a grid that is no multiple of the window is padded with zeros after `norm1`, and the padded
  tokens take part in the
    attention unmasked: their key and value are the bias of `qkv`;
  * the relative-position terms multiply the query *before* it is scaled.

Shapes: `B` batch, `H, W` pixels, `h, w` tokens (H/16, W/16), `C` width, `N` windows or images, `d`
width of a head. The trunk is channels-last, (B, h, w, C); the neck and everything after it
channels-first."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import append_bias, attend_part, relative_table, split_grid
from linear import Linear, autocast_dtype

SIZES: dict[str, dict] = {
    # Not one of SAM's: about 2 M parameters, for laptops, lessons and tests. No official weights
    # exist for it.
    "vit_t": dict(
        embed_dim=160, depth=4, num_heads=4, global_attn_indexes=(1, 3), window_size=8, img_size=256
    ),
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


Outputs = TypeVar("Outputs")  # a tensor or several


class WeightsError(ValueError):
    """A checkpoint that is not what it should be; the message names the file, the tensors and what
    to do.
    """


# --------------------------------------------------------------------------- leaf -> block -> model


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.proj(x).permute(0, 2, 3, 1).contiguous()
        )  # (B, 3, H, W) -> (B, h, w, C), token by token in memory


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, in windows of `window` tokens, or
    global if it is 0.

    differs: SAM pads, projects to q, k, v and multiplies out on padded tokens. Here no padded token
    is ever computed: the windows at the lower and right edge are smaller, and what SAM computes for
    its zero tokens there, the bias of `qkv` as key and value, takes part as one key. Same function;
    at 256 px, where windows of 14 are laid over a grid of 16, a third of the tokens."""

    def __init__(self, dim: int, num_heads: int, table_size: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        B, h, w, _ = x.shape
        qkv = self.qkv(x).view(B, h, w, 3, self.num_heads, -1)
        rows, cols = (self.window, self.window) if self.window else (h, w)
        q, k, v = qkv.unbind(3)  # each (B, h, w, heads, d)
        rel_h, rel_w = relative_table(self.rel_pos_h, rows), relative_table(self.rel_pos_w, cols)
        rel_h, rel_w = (
            rel.repeat(-(-n // len(rel)), 1, 1)[:n].to(q.dtype)
            for rel, n in ((rel_h, h), (rel_w, w))
        )
        _, *filling = self.qkv.bias.to(q.dtype).view(3, self.num_heads, -1)
        bands = zip(*(split_grid(t, rows, cols) for t in (append_bias(q, rel_h, rel_w), k, v)))
        out = [
            torch.cat([attend_part(*part, rows, cols, filling) for part in zip(*band)], dim=2)
            for band in bands
        ]
        return self.proj(torch.cat(out, dim=1))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1 = Linear(dim, hidden)
        self.lin2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class LayerNorm(nn.LayerNorm):
    """Under autocast its output is cast here, once, and not again by every layer that takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(autocast_dtype(x))


def recomputed(function: Callable[[Tensor], Outputs], x: Tensor) -> Outputs:
    """function(x); what it takes to go backward is not kept but computed again. For functions
    without randomness.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """Pre-norm transformer block; `tuners.py` adopts its four children."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, table_size: int, window: int):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, table_size, window)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, h, w, C)
        return x + self.mlp(self.norm2(x))


class ImageEncoderViT(nn.Module):
    """SAM's ViT with its neck. `global_attn_indexes` lists the blocks without windows; `img_size`
    fixes only how large the stored tables of positions are: any input size is accepted, and the
    tables are resized to it.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        global_attn_indexes: tuple[int, ...],
        window_size: int = 14,
        img_size: int = 1024,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        out_chans: int = 256,
    ):
        super().__init__()
        self.patch_size = patch_size
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(1, grid, grid, embed_dim), std=0.02)
        )
        self.blocks = nn.ModuleList()
        for i in range(depth):
            is_global = i in global_attn_indexes
            table_size, window = (grid, 0) if is_global else (window_size, window_size)
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, table_size, window))
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )
        # Compute each block's activations again going backward instead of keeping them: less
        # memory, more time.
        self.activation_checkpointing = False
        # Written by tuners.apply_tuner: which tuner the blocks carry, and the names it added to
        # SAM's.
        self.tuner: str | None = None
        self.added_names: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), H and W multiples of the patch size -> (B, out_chans, H / patch, W /
        patch).
        """
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(
                f"the encoder takes multiples of {self.patch_size} pixels, not {tuple(x.shape[-2:])}"
            )
        x = self.patch_embed(x)
        x = x + resize_positions(self.pos_embed, x.shape[1:3])
        for block in self.blocks:
            x = recomputed(block, x) if self.activation_checkpointing else block(x)
        return self.neck(x.permute(0, 3, 1, 2))


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h0, w0, C) -> (1, h, w, C), bicubic without aligned corners; unchanged when the grid is
    the stored one.
    """
    if tuple(pos_embed.shape[1:3]) == tuple(grid):
        return pos_embed
    resized = F.interpolate(pos_embed.permute(0, 3, 1, 2).float(), size=tuple(grid), mode="bicubic")
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


def build_image_encoder(size: str | dict, **overrides) -> ImageEncoderViT:
    """The encoder of a name in `SIZES`, or of a dict of the constructor's arguments."""
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"unknown encoder {size!r}; there are {', '.join(SIZES)}")
        size = SIZES[size]
    return ImageEncoderViT(**{**size, **overrides})


# ------------------------------------------------------------------------------------------ loading


@dataclass
class LoadReport:
    """What became of every tensor of a checkpoint. As text, one line."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(
        default_factory=list
    )  # "name: old shape -> new shape", counted in `loaded` too
    zeroed: list[str] = field(default_factory=list)  # relative positions set to zero on request
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized"
        text += f", {len(self.zeroed)} set to zero" if self.zeroed else ""
        parts = sorted({name.split(".")[0] for name in self.ignored})
        return text + f", {len(self.ignored)} ignored" + (f" ({', '.join(parts)})" if parts else "")


def check_total(expected: dict[str, Tensor], given: dict[str, Tensor], what: str) -> None:
    """Raises WeightsError with every difference unless both hold the same names with the same
    shapes.
    """
    missing = [n for n in expected if n not in given]
    unexpected = [n for n in given if n not in expected]
    misshapen = [
        f"{n} {tuple(given[n].shape)} instead of {tuple(expected[n].shape)}"
        for n in expected
        if n in given and given[n].shape != expected[n].shape
    ]
    if missing or unexpected or misshapen:
        lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        listing = "; ".join(
            f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists if names
        )
        raise WeightsError(f"{what} does not fit: {listing}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt, .bin or .safetensors file, and nothing but tensors. Raises
    WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such file; give the path of a checkpoint, or --weights none"
        )
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise WeightsError(
                f"{path}: reading it needs the package safetensors (pip install safetensors)"
            ) from error
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{path}: not a readable safetensors file ({first_line(error)})"
            ) from error
    state = read_tensors(path)
    if isinstance(state, dict) and isinstance(
        state.get("model"), dict
    ):  # as training scripts like to save it
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise WeightsError(f"{path}: not a state dict (a dict from names to tensors)")
    return state


def read_tensors(path: Path) -> object:
    """What torch.save wrote, provided it is tensors and built-ins. Raises WeightsError for anything
    else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, it is damaged or holds more than tensors ({first_line(error)})"
        ) from error
    except (
        Exception
    ) as error:  # zipfile, struct, pickle and torch raise a dozen kinds for a damaged file
        raise WeightsError(
            f"{path}: truncated or not a torch checkpoint ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")


# What stands beside the image encoder in a whole SAM: expected in the file, not needed here.
OTHER_PARTS = (
    "prompt_encoder.",
    "mask_decoder.",
    "shared_image_embedding.",
    "pixel_mean",
    "pixel_std",
)


# Hugging Face's spelling of the same names, as (theirs, Meta's), applied in this order.
HUGGING_FACE_NAMES = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("neck.conv1.", "neck.0."),
    ("neck.layer_norm1.", "neck.1."),
    ("neck.conv2.", "neck.2."),
    ("neck.layer_norm2.", "neck.3."),
    ("layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)


def sam_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Any of the known spellings -> (tensors by Meta's names without a prefix, names that belong to
    other parts).
    """
    encoder, ignored = {}, []
    for name, tensor in state.items():
        short = name.removeprefix("module.")
        if short.startswith(OTHER_PARTS):
            ignored.append(short)
            continue
        short = short.removeprefix("image_encoder.").removeprefix("vision_encoder.")
        for theirs, ours in HUGGING_FACE_NAMES:
            short = short.replace(theirs, ours)
        if short in encoder:
            raise WeightsError(f"the checkpoint holds {short} twice, the second time as {name}")
        encoder[short] = tensor
    return encoder, ignored


def load_sam_weights(
    encoder: ImageEncoderViT,
    source: str | Path | dict[str, Tensor],
    relative_positions: str = "sam",
) -> LoadReport:
    """Copies SAM's image encoder into `encoder`, which may carry a tuner already (its own tensors
    stay).

    `source`: a path or a state dict in Meta's or Hugging Face's names; the prompt encoder and the
    mask decoder of a whole SAM are ignored. `relative_positions`: "sam", or "zero" for what the
    published MFNet code computes (its loader drops the tables in silence; PAPER.md 3.1). Positions
    of another grid and tables of another length are resized and reported; anything else missing,
    unexpected or of another shape raises WeightsError with the lists, and nothing is changed."""
    if relative_positions not in ("sam", "zero"):
        raise ValueError(f"relative_positions is 'sam' or 'zero', not {relative_positions!r}")
    what = str(source) if isinstance(source, (str, Path)) else "the state dict"
    state = read_state_dict(source) if isinstance(source, (str, Path)) else source
    given, ignored = sam_names(state)
    expected = {n: t for n, t in encoder.state_dict().items() if n not in encoder.added_names}
    report = LoadReport(ignored=ignored)
    for name, tensor in given.items():
        if name not in expected or tensor.shape == expected[name].shape:
            continue
        resized = resize_table(name, tensor, expected[name].shape)
        if resized is not None:
            given[name] = resized
            report.resized.append(f"{name}: {tuple(tensor.shape)} -> {tuple(resized.shape)}")
    check_total(expected, given, what)
    with torch.no_grad():
        for name, target in expected.items():
            # differs: the published loader leaves these tables at zero without a word; here only
            # when asked to.
            if relative_positions == "zero" and ".rel_pos_" in name:
                target.zero_()
                report.zeroed.append(name)
            else:
                target.copy_(given[name])
                report.loaded.append(name)
    return report


def resize_table(name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """Positions of another grid or relative tables of another length, resized; None when that
    cannot help.
    """
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]:
        return None
    if name == "pos_embed":
        return resize_positions(tensor, shape[1:3])
    if ".rel_pos_" in name and tensor.shape[0] % 2:  # 2n - 1 offsets
        return F.interpolate(tensor.float().T[None], size=shape[0], mode="linear")[0].T
    return None
