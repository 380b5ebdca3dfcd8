"""Segment Anything's image encoder (Kirillov et al. 2023), with SAM's parameter names.

    pixels -> patch_embed -> + pos_embed -> blocks -> neck -> features
              16 x 16 conv                  ViT       1x1, 3x3 conv

Every name below is the name of a tensor in an official checkpoint once its prefix `image_encoder.`
is gone, so the checkpoint is the specification: `load_sam_weights` accounts for every tensor of it,
or raises.

Two facts of SAM that are easy to miss:
  * a grid that is no multiple of the window is padded with zeros after `norm1`, and the padded
    tokens take part in the attention unmasked: their key and value are the bias of `qkv`;
  * the relative-position terms multiply the query *before* it is scaled.

This is the definition; `fast.py` computes the same numbers in less time.

Shapes: `B` batch, `H, W` pixels, `h, w` tokens (H/16, W/16), `C` width, `N` windows or images, `d`
width of a head, `rows, cols` tokens of a window. The trunk is channels-last, (B, h, w, C); the neck
and everything after it channels-first.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SIZES: dict[str, dict] = {
    # Not one of SAM's: about 2 M parameters, for laptops, lessons and tests.
    "vit_t": dict(
        embed_dim=160, depth=4, num_heads=4, global_attn_indexes=(1, 3), window_size=8, img_size=256
    ),
    "vit_b": dict(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "vit_l": dict(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": dict(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


class WeightsError(ValueError):
    """A checkpoint that is not what it should be; names the file, the tensors and what to do."""


# --------------------------------------------------------------------------- leaf -> block -> model


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """Each patch of 16 x 16 pixels becomes one token."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()  # (B, 3, H, W) -> (B, h, w, C)


def window_partition(x: Tensor, rows: int, cols: int) -> Tensor:
    """(B, h, w, C) -> (B * windows, rows, cols, C), row by row; zeros below and on the right."""
    B, h, w, C = x.shape
    x = F.pad(x, (0, 0, 0, -w % cols, 0, -h % rows))
    x = x.view(B, x.shape[1] // rows, rows, x.shape[2] // cols, cols, C)
    return x.transpose(2, 3).reshape(-1, rows, cols, C)


def window_unpartition(windows: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `window_partition`: (B * windows, rows, cols, C) -> (B, h, w, C)."""
    _, rows, cols, C = windows.shape
    x = windows.view(-1, -(-h // rows), -(-w // cols), rows, cols, C).transpose(2, 3)
    return x.reshape(len(x), x.shape[1] * rows, -1, C)[:, :h, :w]


def get_rel_pos(table: Tensor, n: int) -> Tensor:
    """The (2L - 1, d) table of relative positions as (n, n, d): [query, key] is the entry of the
    offset query - key. A table of another length is resized linearly to 2n - 1 offsets."""
    if len(table) != 2 * n - 1:
        table = F.interpolate(table.T[None], size=2 * n - 1, mode="linear")[0].T
    position = torch.arange(n, device=table.device)
    return table[position[:, None] - position[None, :] + n - 1]


def decomposed_rel_pos(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """The bias q . rel_h[qy, ky] + q . rel_w[qx, kx] of every query and key: q (N, heads, rows,
    cols, d), not scaled, and rel_h (rows, rows, d), rel_w (cols, cols, d) -> (N, heads, n, n) for
    the n = rows * cols tokens of a window."""
    of_rows = torch.einsum("nayxd,ykd->nayxk", q, rel_h)  # (N, heads, rows, cols, rows of keys)
    of_cols = torch.einsum("nayxd,xkd->nayxk", q, rel_w)
    bias = of_rows[..., :, None] + of_cols[..., None, :]
    return bias.flatten(4, 5).flatten(2, 3)


class Attention(nn.Module):
    """Multi-head attention with decomposed relative positions, in windows of `window` x `window`
    tokens, or over the whole grid if `window` is 0."""

    def __init__(self, dim: int, num_heads: int, table_size: int, window: int):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        h, w = x.shape[1:3]
        rows, cols = (self.window, self.window) if self.window else (h, w)
        x = window_partition(x, rows, cols)  # (N, rows, cols, C), some tokens zero
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # each (N, heads, rows, cols, d)
        rel_h, rel_w = get_rel_pos(self.rel_pos_h, rows), get_rel_pos(self.rel_pos_w, cols)
        bias = decomposed_rel_pos(q, rel_h, rel_w)
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))  # (N, heads, n, d)
        logits = (q * q.shape[-1] ** -0.5) @ k.mT + bias  # (N, heads, n, n)
        out = logits.softmax(dim=-1) @ v
        out = out.transpose(1, 2).reshape(x.shape)  # (N, rows, cols, C)
        return window_unpartition(self.proj(out), h, w)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, window={self.window or 'global'}"


class MLP(nn.Module):
    """lin2 GELU(lin1 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `tuners.py` replaces it by blocks that adopt its children."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, table_size: int, window: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, table_size, window)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))  # (B, h, w, C)
        return x + self.mlp(self.norm2(x))


class ImageEncoderViT(nn.Module):
    """SAM's ViT with its neck.

    `global_attn_indexes` lists the blocks without windows; `img_size` fixes only how large the
    stored tables of positions are: any input size is accepted, and the tables are resized to it.
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
        self.pos_embed = nn.Parameter(torch.empty(1, grid, grid, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            is_global = i in global_attn_indexes
            table_size, window = (grid, 0) if is_global else (window_size, window_size)
            self.blocks.append(Block(embed_dim, num_heads, mlp_ratio, table_size, window))
        self.neck = nn.Sequential(
            nn.Conv2d(embed_dim, out_chans, kernel_size=1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )
        # Written by tuners.apply_tuner: the tuner of the blocks, and the names it added to SAM's.
        self.tuner: str | None = None
        self.added_names: list[str] = []

    def forward(self, x: Tensor, seen: dict | None = None) -> Tensor:
        """(B, 3, H, W), H and W multiples of the patch size -> (B, out_chans, h, w).

        Into `seen`, if given, goes "blocks": the output (B, h, w, C) of every block.
        """
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            size = tuple(x.shape[-2:])
            raise ValueError(f"the encoder takes multiples of {self.patch_size} pixels, not {size}")
        x = self.patch_embed(x)
        x = x + resize_positions(self.pos_embed, x.shape[1:3])
        for block in self.blocks:
            x = block(x)
            if seen is not None:
                seen.setdefault("blocks", []).append(x)
        return self.neck(x.permute(0, 3, 1, 2))


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, h0, w0, C) -> (1, h, w, C), bicubic without aligned corners; the stored grid as it is."""
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
    resized: list[str] = field(default_factory=list)  # "name: old shape -> new", loaded too
    zeroed: list[str] = field(default_factory=list)  # relative positions set to zero on request
    ignored: list[str] = field(default_factory=list)  # of SAM's other parts

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized"
        text += f", {len(self.zeroed)} set to zero" if self.zeroed else ""
        parts = sorted({name.split(".")[0] for name in self.ignored})
        return text + f", {len(self.ignored)} ignored" + (f" ({', '.join(parts)})" if parts else "")


def check_keys_match(expected: dict[str, Tensor], given: dict[str, Tensor], what: str) -> None:
    """Raises WeightsError with every difference unless names and shapes of both are the same."""
    pairs = {n: (tuple(given[n].shape), tuple(t.shape)) for n, t in expected.items() if n in given}
    wrong = {
        "missing": [n for n in expected if n not in given],
        "unexpected": [n for n in given if n not in expected],
        "of another shape": [f"{n} {a} instead of {b}" for n, (a, b) in pairs.items() if a != b],
    }
    lists = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names]
    if lists:
        raise WeightsError(f"{what} does not fit: {'; '.join(lists)}")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt, .bin or .safetensors file. Raises WeightsError for all else."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a checkpoint's path, or --weights none")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = read_tensors(path)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # as training scripts like to save it
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise WeightsError(f"{path}: not a state dict (a dict from names to tensors)")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        remedy = "pip install safetensors"
        raise WeightsError(f"{path}: reading it needs a package; {remedy}") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise WeightsError(f"{path}: not a readable safetensors file ({reason})") from error


def read_tensors(path: Path) -> object:
    """What torch.save wrote, if it is tensors and built-ins. Raises WeightsError for all else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = f"refused, it is damaged or holds more than tensors ({first_line(error)})"
    except Exception as error:  # zipfile, struct, pickle and torch raise a dozen kinds
        reason = f"truncated or not a torch checkpoint ({first_line(error)})"
    raise WeightsError(f"{path}: {reason}")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip().rstrip(".")


# What stands beside the image encoder in a whole SAM: expected in the file, not needed here.
OTHER_PARTS = r"^(prompt_encoder|mask_decoder|shared_image_embedding)\.|^pixel_(mean|std)"

# Meta's names without their prefix for the prefixes and for Hugging Face's spelling, in this order.
META_NAMES = (
    (r"^(image|vision)_encoder\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^neck\.conv1\.", "neck.0."),
    (r"^neck\.layer_norm1\.", "neck.1."),
    (r"^neck\.conv2\.", "neck.2."),
    (r"^neck\.layer_norm2\.", "neck.3."),
    (r"^layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
)


def our_names(
    state: dict[str, Tensor], names: tuple[tuple[str, str], ...], unused: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint -> (its tensors by the names that `names`, pairs of a pattern and ours, give
    them, the names of what is left out: what matches `unused`, and a second copy of a tensor).
    Raises WeightsError for two copies that differ."""
    renamed, ignored = {}, []
    for name, tensor in state.items():
        ours = name = name.removeprefix("module.")
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        if re.search(unused, name) or ours in renamed and torch.equal(renamed[ours], tensor):
            ignored.append(name)
        elif ours in renamed:
            raise WeightsError(f"the state dict holds {ours} twice, with different values")
        else:
            renamed[ours] = tensor
    return renamed, ignored


def load_sam_weights(
    encoder: ImageEncoderViT,
    source: str | Path | dict[str, Tensor],
    relative_positions: str = "sam",
) -> LoadReport:
    """Copies SAM's image encoder into `encoder`; the tensors of a tuner that it carries stay.

    `source`: a path or a state dict in Meta's or Hugging Face's names; the prompt encoder and the
    mask decoder of a whole SAM are ignored. `relative_positions`: "sam", or "zero" for what the
    published MFNet code computes, whose loader drops the tables in silence. Positions of another
    grid and tables of another length are resized and reported; anything else missing, unexpected or
    of another shape raises WeightsError with the lists, and nothing is changed.
    """
    if relative_positions not in ("sam", "zero"):
        raise ValueError(f"relative_positions is 'sam' or 'zero', not {relative_positions!r}")
    what = str(source) if isinstance(source, (str, Path)) else "the state dict"
    state = read_state_dict(source) if isinstance(source, (str, Path)) else source
    given, ignored = our_names(state, META_NAMES, OTHER_PARTS)
    expected = {n: t for n, t in encoder.state_dict().items() if n not in encoder.added_names}
    report = LoadReport(ignored=ignored)
    for name in (name for name in given if name in expected):
        old, new = given[name].shape, expected[name].shape
        given[name] = resize_table(name, given[name], new)
        if given[name].shape != old:
            report.resized.append(f"{name}: {tuple(old)} -> {tuple(given[name].shape)}")
    check_keys_match(expected, given, what)
    with torch.no_grad():
        for name, target in expected.items():
            # differs: the published loader leaves these tables at zero without a word
            if relative_positions == "zero" and ".rel_pos_" in name:
                target.zero_()
                report.zeroed.append(name)
            else:
                target.copy_(given[name])
                report.loaded.append(name)
    return report


def resize_table(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """Positions of another grid or tables of another length, resized; else the tensor as it is."""
    if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1] or tensor.shape == shape:
        return tensor
    if name == "pos_embed":
        return resize_positions(tensor, shape[1:3])
    if ".rel_pos_" in name and tensor.shape[0] % 2:  # 2n - 1 offsets
        return F.interpolate(tensor.float().T[None], size=shape[0], mode="linear")[0].T
    return tensor
