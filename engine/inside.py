"""What a network does with one window, as arrays: the material of `explain.py`.

What the network's forward keeps in `seen` is taken from there; the rest is asked of its own blocks,
fusion and decoder on what was seen. "Before tuning" is the same network with what the tuner added
to the encoder taken out; a weight of SAM's that the tuner trained stays as it is.

Shapes: `M` modalities, `h, w` tokens, `C` width, `H, W` pixels, `K` classes. There is one window:
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
    names: list[str]  # of the modalities
    size: tuple[int, int]  # H, W
    tokens: np.ndarray  # (M, h, w, C), before the positions are added
    positions: np.ndarray  # (h, w, C)
    place: tuple[int, int]  # row and column of the token whose attention is shown
    attention: list[dict]  # see `query_attention`
    added: np.ndarray  # (blocks, M): the norm of what the tuner adds over that of the frozen block
    tunes_sam: bool  # whether the tuner trains weights of SAM's
    mixing: dict[str, list[list[float]]]  # layer that mixes -> for each block M weights
    maps: list[np.ndarray]  # M times (256, h, w)
    maps_before: list[np.ndarray]
    parts: list[list[np.ndarray]]  # of each level, finest first, M times (256, ., .)
    gates: list[list[np.ndarray]]  # of each level M times (256, 1, 1); [] without them
    fused: list[np.ndarray]  # of each level (256, ., .)
    decoder: list[np.ndarray]  # coarsest first, (64, ., .)
    skip_weights: list[float]  # of the decoder's fusions, coarsest first; [] without skips
    logits: np.ndarray  # (K, H, W)
    heat: dict[int, np.ndarray]  # class -> (2, M, h, w), before tuning and after
    variants: dict[str, np.ndarray]  # what is different -> logits (K, H, W)
    drawings: dict[str, list[list[tuple]]]  # of the first block and of the fusion: `parts_in_order`
    parameters: dict[str, tuple[int, int]]  # part of the network -> (all, trained)


@torch.no_grad()
def look_inside(model: MFNet, encoder: str, rasters: dict[str, Tensor]) -> Inside:
    """A network in eval mode, whose encoder is one of `sam_vit.SIZES`, and one window: (1, 3, H, W)
    or (1, H, W) for each modality."""
    inputs, M, blocks = list(rasters.values()), model.modalities, model.image_encoder.blocks
    bare, seen, before = without_tuner(model, encoder), {}, {}
    logits, _ = model(*inputs, seen=seen), bare(*inputs, seen=before)
    tokens, positions = patch_tokens(model, inputs)
    streams = [tokens + positions, *seen["blocks"][:-1]]  # what enters each block
    frozen = [block(x) for block, x in zip(bare.image_encoder.blocks, streams)]
    place = tuple(n * 5 // 8 for n in tokens.shape[1:3])
    shown = logits[0].argmax(dim=0).flatten().bincount().argsort(descending=True)[:CLASSES].tolist()
    heat = [class_heat(model, x["maps"], shown, logits.shape[-2:]) for x in (before, seen)]
    return Inside(
        names=list(rasters),
        size=tuple(logits.shape[-2:]),
        tokens=array(tokens),
        positions=array(positions[0]),
        place=place,
        attention=[
            query_attention(i, blocks[i], streams[i], place) for i in windowed_and_global(blocks)
        ],
        added=np.array([norms(y - x, M) / norms(x, M) for y, x in zip(seen["blocks"], frozen)]),
        tunes_sam=any(block.sam_trained for block in blocks),
        mixing=learned_mixing(model),
        maps=arrays(seen["maps"]),
        maps_before=arrays(before["maps"]),
        parts=[arrays(level["parts"]) for level in seen["levels"]],
        gates=[arrays(level["gates"]) for level in seen["levels"]],
        fused=arrays(seen["fused"]),
        decoder=arrays(seen["decoder"]),
        skip_weights=skip_weights(model.decoder),
        logits=array(logits[0]),
        heat=dict(zip(shown, map(np.stack, zip(*heat)))),
        variants=other_ways(model, rasters),
        drawings={
            "block": parts_in_order(blocks[0], lambda: blocks[0](streams[0])),
            "fusion": parts_in_order(model.fusion, lambda: model.fusion(seen["maps"])),
        },
        parameters=parameters_by_part(model),
    )


def array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def arrays(batches: list[Tensor]) -> list[np.ndarray]:
    return [array(x[0]) for x in batches]


def norms(x: Tensor, M: int) -> np.ndarray:
    """(M, h, w, C) or a batch of them -> (M,)."""
    return np.linalg.norm(array(x).reshape(M, -1), axis=1)


# ------------------------------------------------------------------------------------- the encoder


def without_tuner(model: MFNet, encoder: str) -> MFNet:
    """The same network, of the same tensors, without what the tuner added to the encoder."""
    tuned = model.image_encoder
    base = {n: t for n, t in tuned.state_dict().items() if n not in tuned.added_names}
    with torch.device("meta"):
        bare = build_image_encoder(encoder)
    bare.load_state_dict(base, assign=True)
    return MFNet(bare, model.fusion, model.decoder, model.modalities).eval()


def patch_tokens(model: MFNet, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (M, h, w, C) before the positions are added, and the positions (1, h, w, C)."""
    x = torch.cat([as_three_channels(raster) for raster in inputs])
    x = reflect_pad(x, *(round_up(n, SIZE_STEP) for n in x.shape[-2:]))
    tokens = model.image_encoder.patch_embed(x)
    return tokens, resize_positions(model.image_encoder.pos_embed, tokens.shape[1:3])


def windowed_and_global(blocks: nn.ModuleList) -> list[int]:
    """The first block with windows and the first without, of those whose attention is SAM's."""
    sam = [i for i, block in enumerate(blocks) if isinstance(block.attn, Attention)]
    first = {bool(blocks[i].attn.window): i for i in reversed(sam)}
    return [first[windowed] for windowed in (True, False) if windowed in first]


def query_attention(index: int, block: Block, x: Tensor, place: tuple[int, int]) -> dict:
    """The attention weights of one query of the first modality, the mean of all heads, over the
    grid: "with" and "without" relative positions, (h, w) each; "inside", where its window lies;
    "padding", the share of padded tokens; "window", rows and columns; "block", its number."""
    attn, (h, w) = block.attn, x.shape[1:3]
    rows, cols = (attn.window, attn.window) if attn.window else (h, w)
    windows = window_partition(block.norm1(x), rows, cols)
    qkv = attn.qkv(windows).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(3, 0, 4, 1, 2, 5)  # each (N, heads, rows, cols, d)
    tables = get_rel_pos(attn.rel_pos_h, rows), get_rel_pos(attn.rel_pos_w, cols)
    (y, top), (x, left) = (divmod(n, side) for n, side in zip(place, (rows, cols)))
    window, query = y * -(-w // cols) + x, top * cols + left  # of the first modality
    bias = decomposed_rel_pos(q, *tables)[window, :, query]  # (heads, rows * cols)
    q, k = (t[window].flatten(1, 2) for t in (q, k))  # (heads, rows * cols, d)
    products = (q[:, query : query + 1] * q.shape[-1] ** -0.5 @ k.mT)[:, 0]

    def on_grid(values: Tensor) -> np.ndarray:
        """What is (rows * cols,) in the query's window as (h, w), 0 outside."""
        grid = values.new_zeros(len(windows), rows * cols)
        grid[window] = values
        return array(window_unpartition(grid.view(-1, rows, cols, 1), h, w)[0, ..., 0])

    found = {
        "block": index,
        "window": (rows, cols),
        "inside": on_grid(torch.ones_like(bias[0])) > 0,
    }
    for name, logits in (("with", products + bias), ("without", products)):
        found[name] = on_grid(logits.softmax(dim=-1).mean(dim=0))
    return found | {"padding": max(0.0, 1 - float(found["with"].sum()))}


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
    model: MFNet, maps: list[Tensor], classes: list[int], size: tuple[int, int]
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


def other_ways(model: MFNet, rasters: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Logits (K, H, W) of the same window with each modality but the first at 0, and with other
    mixing weights."""
    found = {}
    for name in list(rasters)[1:]:
        flat = rasters | {name: torch.zeros_like(rasters[name])}
        found[f"{name} 0 everywhere"] = array(model(*flat.values())[0])
    for value in (0.5, 1.0) if learned_mixing(model) else ():
        with mixing_weights_at(model, value):
            found[f"mixing weights {value:g}"] = array(model(*rasters.values())[0])
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
    counts = {part: (0, 0) for part in ("tuner", "fusion")}  # these may have none
    for name, p in model.named_parameters():
        part = "tuner" if name in added else name.removeprefix("image_encoder.").split(".")[0]
        whole, trained = counts.get(part, (0, 0))
        counts[part] = whole + p.numel(), trained + p.numel() * p.requires_grad
    return counts


def parts_in_order(module: nn.Module, run: Callable[[], object]) -> list[list[tuple]]:
    """The children of a module in the order in which `run` calls them, then its own parameters,
    each as (name, class, lines, whether something in it is trained). Two members of a list of
    modules share a row."""
    units: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        members = child.named_children() if isinstance(child, nn.ModuleList) else ()
        units |= {f"{name}.{n}": member for n, member in members} or {name: child}
    called: dict[str, None] = {}  # an ordered set
    hooks = [
        unit.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, unit in units.items()
    ]
    run()
    for hook in hooks:
        hook.remove()
    rows: list[list[tuple]] = []
    for name in called:
        unit, siblings = units[name], "." in name and bool(rows) and len(rows[-1]) < 2
        siblings = siblings and rows[-1][0][0].split(".")[0] == name.split(".")[0]
        trained = any(p.requires_grad for p in unit.parameters())
        part = (name, type(unit).__name__, part_lines(unit), trained)
        rows[-1:] = [[*rows[-1], part]] if siblings else [*rows[-1:], [part]]
    for name, p in module.named_parameters(recurse=False):
        few = ", ".join(f"{v:.3f}" for v in p.flatten()[:4].tolist())
        rows.append([(name, "parameter", [few], p.requires_grad)])
    return rows


def part_lines(unit: nn.Module) -> list[str]:
    """A line for each parameter but biases, with its shape, and for each part that has none."""
    lines = []
    for path, module in unit.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, p in own.items():
            if name != "bias":
                shape = " × ".join(map(str, p.shape))
                line = f"{path}.{name} {shape}".removeprefix(".").replace(".weight", "")
                lines.append("● " * p.requires_grad + line)
        if not own and not list(module.children()):
            lines.append(f"{path} {type(module).__name__}")
    return lines
