"""What a network does with one window, as arrays: the material of `explain.py`.

What the network's forward keeps in `seen` is taken from there; the rest is asked of its own blocks,
fusion and decoder on what was seen. "Before tuning" is the same network with the tuner's part of
the encoder taken out; a weight of SAM's that the tuner trained stays as it is.

Shapes: `M` modalities, `h, w` tokens, `C` width, `H, W` pixels, `K` classes. There is one window, so
no array has an axis for the batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mfnet import SIZE_STEP, MFNet, as_three_channels, reflect_pad, round_up
from sam_vit import (
    Attention,
    Block,
    build_image_encoder,
    decomposed_rel_pos,
    get_rel_pos,
    resize_positions,
    window_partition,
    window_unpartition,
)

CLASSES = 3  # how many classes have heat maps: those with the most predicted pixels


@dataclass
class Inside:
    """Arrays of one window, float32."""

    names: list[str]  # of the modalities
    tuner: str
    tunes_sam: bool  # whether the tuner trains weights of SAM's
    parameters: dict[str, tuple[int, int]]  # part of the network -> (all, trained)
    place: tuple[int, int]  # row and column of the query
    tokens: np.ndarray  # (M, h, w, C)
    positions: np.ndarray  # (h, w, C)
    attention: list[dict]  # see `query_attention`; [] for blocks whose attention is not SAM's
    added: (
        np.ndarray
    )  # (blocks, M): norm of what the tuner adds over the norm of what it is added to
    mixing: dict[str, list[list[float]]]  # layer that mixes -> for each block M weights
    maps: list[np.ndarray]  # M times (256, h, w)
    maps_before: list[np.ndarray]
    parts: list[list[np.ndarray]]  # of each level, finest first, M times (256, ., .)
    gates: list[list[np.ndarray]]  # of each level M times (256,); [] without them
    fused: list[np.ndarray]  # of each level (256, ., .)
    decoder: list[np.ndarray]  # coarsest first, (64, ., .)
    skip_weights: list[float]  # of the decoder's fusions, coarsest first; [] without skips
    logits: np.ndarray  # (K, H, W)
    heat: dict[int, np.ndarray]  # class -> (2, M, h, w), before tuning and after
    variants: dict[str, np.ndarray]  # what is different -> logits (K, H, W)
    drawings: dict[str, list[list[tuple]]]  # of the first block and of the fusion: `parts_in_order`


@torch.no_grad()
def look_inside(model: MFNet, encoder: str, rasters: list[Tensor], names: list[str]) -> Inside:
    """A network in eval mode on an encoder of `sam_vit.SIZES`, and one window: a raster for each of
    the modalities `names`, each (1, 3, H, W) or (1, H, W)."""
    bare = without_tuner(model, encoder)
    seen, before = {}, {}
    logits = model(*rasters, seen=seen)
    bare(*rasters, seen=before)
    tokens, positions = patch_tokens(model, rasters)
    streams = [tokens + positions, *seen["blocks"][:-1]]  # what enters each block
    blocks, M = model.image_encoder.blocks, model.modalities
    place = tuple(n // 2 for n in tokens.shape[1:3])
    plain = [block(x) for block, x in zip(bare.image_encoder.blocks, streams)]
    effects = [tuned - same for tuned, same in zip(seen["blocks"], plain)]
    largest = logits[0].argmax(dim=0).flatten().bincount().argsort(descending=True)[:CLASSES]
    heat = [
        class_heat(network, maps, largest.tolist(), logits.shape[-2:])
        for network, maps in ((bare, before["maps"]), (model, seen["maps"]))
    ]
    return Inside(
        names=names,
        tuner=model.image_encoder.tuner,
        tunes_sam=any(block.sam_trained for block in blocks),
        parameters=parameters_by_part(model),
        place=place,
        tokens=array(tokens),
        positions=array(positions[0]),
        attention=[
            query_attention(i, blocks[i], streams[i], place) for i in windowed_and_global(blocks)
        ],
        added=np.array([share(e, x, M) for e, x in zip(effects, plain)]),
        mixing=learned_mixing(model),
        maps=[array(x[0]) for x in seen["maps"]],
        maps_before=[array(x[0]) for x in before["maps"]],
        parts=[[array(x[0]) for x in level["parts"]] for level in seen["levels"]],
        gates=[[array(g.flatten()) for g in level["gates"]] for level in seen["levels"]],
        fused=[array(x[0]) for x in seen["fused"]],
        decoder=[array(x[0]) for x in seen["decoder"]],
        skip_weights=skip_weights(model.decoder),
        logits=array(logits[0]),
        heat={k: np.stack([maps[i] for maps in heat]) for i, k in enumerate(largest.tolist())},
        variants=other_ways(model, rasters, names),
        drawings={
            "block": parts_in_order(blocks[0], lambda: blocks[0](streams[0])),
            "fusion": parts_in_order(model.fusion, lambda: model.fusion(seen["maps"])),
        },
    )


def array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def share(part: Tensor, whole: Tensor, M: int) -> list[float]:
    """For each modality the norm of a part over the norm of what it is added to."""
    norms = (x.float().unflatten(0, (M, -1)).flatten(1).norm(dim=1) for x in (part, whole))
    return torch.div(*norms).tolist()


# ------------------------------------------------------------------------------------- the encoder


def without_tuner(model: MFNet, encoder: str) -> MFNet:
    """The same network, of the same tensors, without what the tuner added to the encoder."""
    tuned = model.image_encoder
    base = {n: t for n, t in tuned.state_dict().items() if n not in tuned.added_names}
    with torch.device("meta"):
        bare = build_image_encoder(encoder)
    bare.load_state_dict(base, assign=True)
    return MFNet(bare, model.fusion, model.decoder, model.modalities).eval()


def patch_tokens(model: MFNet, rasters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (M, h, w, C) before the positions are added, and the positions (1, h, w, C)."""
    x = torch.cat([as_three_channels(raster) for raster in rasters])
    x = reflect_pad(x, *(round_up(n, SIZE_STEP) for n in x.shape[-2:]))
    tokens = model.image_encoder.patch_embed(x)
    return tokens, resize_positions(model.image_encoder.pos_embed, tokens.shape[1:3])


def windowed_and_global(blocks: nn.ModuleList) -> list[int]:
    """The first block with windows and the first without, as far as there are such."""
    sam = [i for i, block in enumerate(blocks) if isinstance(block.attn, Attention)]
    kinds = {bool(blocks[i].attn.window): i for i in reversed(sam)}
    return [kinds[windowed] for windowed in (True, False) if windowed in kinds]


def query_attention(index: int, block: Block, x: Tensor, place: tuple[int, int]) -> dict:
    """The attention weights of one query of the first modality, the mean of all heads, over the
    grid: "with" and "without" relative positions, (h, w) each; "padding", the share that goes to
    padded tokens; "window", rows and columns; "block", its number."""
    attn, (h, w) = block.attn, x.shape[1:3]
    rows, cols = (attn.window, attn.window) if attn.window else (h, w)
    windows = window_partition(block.norm1(x), rows, cols)
    qkv = attn.qkv(windows).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(3, 0, 4, 1, 2, 5)  # each (N, heads, rows, cols, d)
    tables = get_rel_pos(attn.rel_pos_h, rows), get_rel_pos(attn.rel_pos_w, cols)
    bias = decomposed_rel_pos(q, *tables)
    q, k = q.flatten(2, 3), k.flatten(2, 3)
    (y, top), (x, left) = (divmod(n, side) for n, side in zip(place, (rows, cols)))
    window, query = y * -(-w // cols) + x, top * cols + left
    found = {"block": index, "window": (rows, cols)}
    for name, logits in (
        ("with", q @ k.mT * q.shape[-1] ** -0.5 + bias),
        ("without", q @ k.mT * q.shape[-1] ** -0.5),
    ):
        weights = torch.zeros_like(logits[:, 0, 0])  # (N, rows * cols) of all windows
        weights[window] = logits[window, :, query].softmax(dim=-1).mean(dim=0)
        grid = window_unpartition(weights.view(-1, rows, cols, 1), h, w)  # of all modalities
        found[name] = array(grid[0, ..., 0])
    return found | {"padding": 1 - float(found["with"].sum())}


def learned_mixing(model: MFNet) -> dict[str, list[list[float]]]:
    """The layers of a block that mix -> for each block the M weights; {} if none does."""
    found: dict[str, list[list[float]]] = {}
    for block in model.image_encoder.blocks:
        for layer, weights in block.mixing_weights().items():
            found.setdefault(layer, []).append(weights.tolist())
    return found


# ------------------------------------------------------------------------------- behind the encoder


def skip_weights(decoder: nn.Module) -> list[float]:
    """The share of the skip in each fusion of the decoder."""
    fusions = [f for f in (decoder.p3, decoder.p2, decoder.p1) if hasattr(f, "weights")]
    pairs = [F.relu(fusion.weights).tolist() for fusion in fusions]
    return [skip / (skip + below + 1e-8) for skip, below in pairs]


def class_heat(
    model: MFNet, maps: tuple[Tensor, ...], classes: list[int], size: tuple[int, int]
) -> list[np.ndarray]:
    """For each class (M, h, w): the gradient of its summed logits with respect to each modality's
    map, times the map, summed over the channels: what each place adds to the class."""
    with torch.enable_grad():
        maps = [x.detach().requires_grad_() for x in maps]
        padded = [round_up(n, SIZE_STEP) for n in size]
        logits = model.decoder(model.fusion(maps), padded)[0, :, : size[0], : size[1]]
        sums = logits.float().sum(dim=(1, 2))
        grads = [torch.autograd.grad(sums[k], maps, retain_graph=True) for k in classes]
    return [np.stack([array((g * x).sum(dim=1)[0]) for g, x in zip(gs, maps)]) for gs in grads]


def other_ways(model: MFNet, rasters: list[Tensor], names: list[str]) -> dict[str, np.ndarray]:
    """Logits (K, H, W) of the same window with each modality but the first at 0, and with other
    mixing weights."""
    found = {}
    for m, name in list(enumerate(names))[1:]:
        flat = [torch.zeros_like(r) if i == m else r for i, r in enumerate(rasters)]
        found[f"{name} 0 everywhere"] = array(model(*flat)[0])
    for w in (0.5, 1.0) if learned_mixing(model) else ():
        with mixing_weights_at(model, w):
            found[f"mixing weights {w:g}"] = array(model(*rasters)[0])
    return found


@contextmanager
def mixing_weights_at(model: MFNet, value: float) -> Iterator[None]:
    blocks = model.image_encoder.blocks
    weights = [w for block in blocks for w in block.mixing_weights().values()]
    kept = [w.clone() for w in weights]
    try:
        for w in weights:
            w.fill_(value)
        yield
    finally:
        for w, old in zip(weights, kept):
            w.copy_(old)


# -------------------------------------------------------------------------------------- its modules


def parameters_by_part(model: MFNet) -> dict[str, tuple[int, int]]:
    """(all, trained) parameters of patch_embed, pos_embed, blocks (SAM's), tuner, neck, fusion and
    decoder."""
    added = {"image_encoder." + n for n in model.image_encoder.added_names}
    parts = ("patch_embed", "pos_embed", "blocks", "tuner", "neck", "fusion", "decoder")
    counts = dict.fromkeys(parts, (0, 0))
    for name, p in model.named_parameters():
        part = "tuner" if name in added else name.removeprefix("image_encoder.").split(".")[0]
        all_of_it, trained = counts[part]
        counts[part] = all_of_it + p.numel(), trained + p.numel() * p.requires_grad
    return counts


def parts_in_order(module: nn.Module, run: Callable[[], object]) -> list[list[tuple]]:
    """The children of a module in the order in which `run` calls them, each as (name, class, lines,
    whether something in it is trained): rows of one, or of two members of a list of modules."""
    units = {}
    for name, child in module.named_children():
        members = child.named_children() if isinstance(child, nn.ModuleList) else ()
        units |= {f"{name}.{n}": m for n, m in members} or {name: child}
    called: list[str] = []
    hooks = [
        unit.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, unit in units.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    rows: list[list[tuple]] = []
    for name in dict.fromkeys(called):
        before = rows[-1][-1][0] if rows and len(rows[-1]) < 2 else ""
        siblings = "." in name and before.split(".")[0] == name.split(".")[0]
        trained = any(p.requires_grad for p in units[name].parameters())
        part = (name, type(units[name]).__name__, part_lines(units[name]), trained)
        rows[-1].append(part) if siblings else rows.append([part])
    return rows + [
        [(name, "parameter", [values(p)], p.requires_grad)]
        for name, p in module.named_parameters(recurse=False)
    ]


def part_lines(unit: nn.Module) -> list[str]:
    """A line for each matrix in a module, with its shape, and for each part without parameters."""
    lines = []
    for path, module in unit.named_modules():
        own = dict(module.named_parameters(recurse=False))
        lines += [
            f"{path}.{name}".removeprefix(".").removesuffix(".weight") + " " + by(p.shape)
            for name, p in own.items()
            if name != "bias"
        ]
        if not own and not list(module.children()):
            lines.append(f"{path} {type(module).__name__}")
    return lines


def by(shape: torch.Size) -> str:
    return " × ".join(map(str, shape))


def values(p: Tensor) -> str:
    return ", ".join(f"{v:.3f}" for v in p.flatten()[:4].tolist())
