"""What a network does with one window, as arrays: the material of `explain.py`.

What the network's forward keeps in `seen` is taken from there; the rest is asked of its own blocks,
fusion and decoder on what was seen. "Before tuning" is the same network with what the tuner added
to the encoder taken out; a weight of SAM's that the tuner trained stays as it is.

Shapes: `M` modalities, `h, w` tokens, `C` width, `H, W` pixels, `K` classes. There is one window:
no array has an axis for the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

import sam_vit
from mfnet import SIZE_STEP, MFNet, reflect_pad, round_up
from sam_vit import Attention, Block

CLASSES = 3  # how many classes have heat maps: those with the most predicted pixels


@dataclass
class Inside:
    names: list[str]  # of the modalities
    seen: dict  # of `MFNet.forward`, as arrays
    maps_before: list[np.ndarray]  # M times (256, h, w)
    tokens: np.ndarray  # (M, h, w, C), before the positions are added
    positions: np.ndarray  # (h, w, C)
    place: tuple[int, int]  # row and column of the token whose attention is shown
    attention: list[dict]  # see `query_attention`
    added: np.ndarray  # (blocks, M): the norm of what the tuner adds over that of the frozen block
    mixing: dict[str, list[list[float]]]  # layer that mixes -> for each tuned block M weights
    skip_weights: list[float]  # the skip's share in the decoder's fusions, coarsest first
    heat: dict[int, np.ndarray]  # class -> (2, M, h, w), before tuning and after
    variants: dict[str, np.ndarray]  # what is different -> logits (K, H, W)
    drawings: dict[str, list[list[tuple]]]  # of a block and of the fusion: `parts_in_order`
    drawn: int  # which block: the first that is tuned
    parameters: dict[str, tuple[int, int]]  # part of the network -> (all, trained)

    @property
    def size(self) -> tuple[int, int]:
        return self.seen["logits"].shape[1:]


@torch.no_grad()
def look_inside(model: MFNet, encoder: str, rasters: dict[str, Tensor]) -> Inside:
    """A network in eval mode, whose encoder is one of `sam_vit.SIZES`, and one window: (1, 3, H, W)
    or (1, H, W) for each modality."""
    inputs, M, blocks = list(rasters.values()), model.modalities, model.image_encoder.blocks
    bare, seen, before = without_tuner(model, encoder), {}, {}
    logits, _ = model(*inputs, seen=seen), bare(*inputs, seen=before)
    x = [model.rasters.three_channels(m, raster) for m, raster in enumerate(inputs)]
    x = torch.cat(x).nan_to_num()
    x = reflect_pad(x, *(round_up(n, SIZE_STEP) for n in x.shape[-2:]))
    tokens = model.image_encoder.patch_embed(x)
    positions = sam_vit.resize_positions(model.image_encoder.pos_embed, tokens.shape[1:3])
    streams = [tokens + positions, *seen["blocks"][:-1]]  # what enters each block
    frozen = [block(x) for block, x in zip(bare.image_encoder.blocks, streams)]
    place = tuple(n * 5 // 8 for n in tokens.shape[1:3])
    sam = [i for i, block in enumerate(blocks) if isinstance(block.attn, Attention)]
    firsts = {bool(blocks[i].attn.window): i for i in reversed(sam)}  # with windows, and without
    firsts = [firsts[windowed] for windowed in (True, False) if windowed in firsts]
    counts = logits[0].argmax(dim=0).flatten().bincount()
    shown = [k for k in counts.argsort(descending=True).tolist() if counts[k]][:CLASSES]
    drawn = first_tuned(model)
    heat = [class_heat(model, x["maps"], shown, logits.shape[-2:]) for x in (before, seen)]
    mixing = [item for block in blocks for item in block.mixing_weights().items()]
    return Inside(
        list(rasters),
        {name: as_arrays(value) for name, value in seen.items() if name != "blocks"},
        as_arrays(before["maps"]),
        tokens.float().cpu().numpy(),
        as_arrays(positions),
        place,
        [query_attention(i, blocks[i], streams[i], place) for i in firsts],
        np.array([norms(y - x, M) / norms(x, M) for y, x in zip(seen["blocks"], frozen)]),
        {layer: [w.tolist() for other, w in mixing if other == layer] for layer, _ in mixing},
        skip_weights(model.decoder),
        dict(zip(shown, map(np.stack, zip(*heat)))),
        other_ways(model, rasters),
        {
            "block": parts_in_order(blocks[drawn], lambda: blocks[drawn](streams[drawn])),
            "fusion": parts_in_order(model.fusion, lambda: model.fusion(seen["maps"])),
        },
        drawn,
        parameters_by_part(model),
    )


def as_arrays(value):
    """Tensors, in lists and dicts, as float32 arrays of the first of their batch."""
    if isinstance(value, dict):
        return {name: as_arrays(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_arrays(v) for v in value]
    return value[0].detach().float().cpu().numpy()


def norms(x: Tensor, M: int) -> np.ndarray:
    """(M, h, w, C) -> (M,)."""
    return x.float().reshape(M, -1).norm(dim=1).cpu().numpy()


def without_tuner(model: MFNet, encoder: str) -> MFNet:
    """The same network, of the same tensors, without what the tuner added to the encoder."""
    tuned = model.image_encoder
    base = {n: t for n, t in tuned.state_dict().items() if n not in tuned.added_names}
    with torch.device("meta"):
        bare = sam_vit.build_image_encoder(encoder)
    bare.load_state_dict(base, assign=True)
    plain = MFNet(bare, model.fusion, model.decoder, model.bands)
    plain.rasters = model.rasters
    return plain.eval()


def query_attention(index: int, block: Block, x: Tensor, place: tuple[int, int]) -> dict:
    """The attention weights of one query of the first modality, the mean of all heads, over the
    grid: "with" and "without" relative positions, (h, w) each; "inside", where its window lies;
    "padding", the share of padded tokens; "window", rows and columns; "block", its number."""
    attn, (h, w) = block.attn, x.shape[1:3]
    rows, cols = (attn.window, attn.window) if attn.window else (h, w)
    qkv = attn.qkv(sam_vit.window_partition(block.norm1(x), rows, cols))
    q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
    rel_h = sam_vit.get_rel_pos(attn.rel_pos_h, rows)
    rel_w = sam_vit.get_rel_pos(attn.rel_pos_w, cols)
    (y, top), (x, left) = (divmod(n, side) for n, side in zip(place, (rows, cols)))
    window, query = y * -(-w // cols) + x, top * cols + left  # of the first modality
    bias = sam_vit.decomposed_rel_pos(q, rel_h, rel_w)[window, :, query]  # (heads, rows * cols)
    q, k = (t[window].flatten(1, 2) for t in (q, k))  # (heads, rows * cols, d)
    products = (q[:, query : query + 1] * q.shape[-1] ** -0.5 @ k.mT)[:, 0]
    box = np.s_[y * rows : (y + 1) * rows, x * cols : (x + 1) * cols]  # may end beyond the grid
    found = {"block": index, "window": (rows, cols), "inside": np.zeros((h, w), bool)}
    found["inside"][box] = True
    for name, logits in (("with", products + bias), ("without", products)):
        weights = logits.softmax(dim=-1).mean(dim=0).view(rows, cols)
        found[name] = np.zeros((h, w), np.float32)
        found[name][box] = weights[: h - y * rows, : w - x * cols].float().cpu()
    return found | {"padding": max(0.0, 1 - float(found["with"].sum()))}


def first_tuned(model: MFNet) -> int:
    """The number of the first block in which something is trained; 0 if there is none."""
    return next((i for i, b in enumerate(model.image_encoder.blocks) if is_trained(b)), 0)


def skip_weights(decoder: nn.Module) -> list[float]:
    """The share of the skip in each fusion of the decoder; [] without skips."""
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
    return [np.stack(as_arrays([(g * x).sum(dim=1) for g, x in zip(gs, maps)])) for gs in grads]


def other_ways(model: MFNet, rasters: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Logits (K, H, W) of the same window with each modality but the first at 0, without each that
    may be missing, and with other mixing weights, which are put back."""
    found = {}
    for name in rasters if model.rasters.fills is not None else ():
        gone = rasters | {name: torch.full_like(rasters[name], torch.nan)}
        found[f"without {name}"] = as_arrays(model(*gone.values()))
    for name in list(rasters)[1:]:
        flat = rasters | {name: torch.zeros_like(rasters[name])}
        found[f"{name} 0 everywhere"] = as_arrays(model(*flat.values()))
    mixing = [w for b in model.image_encoder.blocks for w in b.mixing_weights().values()]
    learned = [w.clone() for w in mixing]
    for value in (0.5, 1.0) if mixing else ():
        for w in mixing:
            w.fill_(value)
        found[f"mixing weights {value:g}"] = as_arrays(model(*rasters.values()))
    for w, old in zip(mixing, learned):
        w.copy_(old)
    return found


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
    each as (name, class, lines, whether something in it is trained). Members of a list of modules
    share rows, two by two."""
    names: dict[nn.Module, str] = {}
    for name, child in module.named_children():
        members = child.named_children() if isinstance(child, nn.ModuleList) else ()
        names |= {member: f"{name}.{n}" for n, member in members} or {child: name}
    called: dict[nn.Module, None] = {}  # an ordered set
    with register_module_forward_pre_hook(lambda part, _: called.setdefault(part)):
        run()
    rows = []
    for _, alike in groupby(filter(names.get, called), lambda part: names[part].split(".")[0]):
        boxes = [(names[p], type(p).__name__, part_lines(p), is_trained(p)) for p in alike]
        rows += [boxes[i : i + 2] for i in range(0, len(boxes), 2)]
    for name, p in module.named_parameters(recurse=False):
        few = ", ".join(f"{v:.3f}" for v in p.flatten()[:4].tolist())
        rows.append([(name, "parameter", [few], p.requires_grad)])
    return rows


def is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def part_lines(part: nn.Module) -> list[str]:
    """A line for each parameter but biases, with its shape, and for each part that has none."""
    lines = []
    for path, module in part.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, p in own.items():
            if name != "bias":
                shape = "×".join(map(str, p.shape))
                line = f"{path}.{name} {shape}".removeprefix(".").replace(".weight", "")
                lines.append("● " * p.requires_grad + line)
        if not own and not list(module.children()):
            lines.append(f"{path} {type(module).__name__}")
    return lines
