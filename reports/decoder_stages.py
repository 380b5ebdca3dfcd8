"""The second half of the lesson: fusion, decoder, classes, heat maps, the same window otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.labels import labels_to_colors
from geodata.layouts import IGNORE, Classes
from reports import features as draw
from reports.boxes import draw_boxes
from reports.lesson import Stage, percent, shape, side_by_side
from reports.page import legend, line_chart
from reports.panels import error_map, shade_confidence

if TYPE_CHECKING:
    from engine.inside import Inside


def stride(level: np.ndarray, inside: Inside) -> int:
    return draw.enlarge(level[0], inside.size)[0]


def level_pictures(levels: list[np.ndarray], inside: Inside) -> dict[str, np.ndarray]:
    return {f"stride {stride(level, inside)}": draw.principal_colors(level) for level in levels}


def fusion_stage(inside: Inside) -> Stage:
    names, rows, levels = inside.names, inside.drawings["fusion"], inside.seen["levels"]
    code = ["Pyramid", "SqueezeExcitation", "SEFusion"] if rows else ["SumFusion"]
    stage = Stage(
        "Fusion",
        [f"dfm.py:{name}.forward" for name in code],
        "On each level of the pyramids" if rows else "On one level, that of the tokens,",
        ("fused, finest first", shape(*inside.seen["fused"]), "fusion"),
    )
    stage.words += " one part of each modality is added up."
    if rows:
        see = "the module in the order of its calls: pyramids, then levels that join them."
        wrong = "a pyramid or a level is missing, or nothing in a pyramid is trained (grey)."
        stage.show(draw_boxes(rows, "The Deep Fusion Module"), see, wrong)
    pictures, least = level_pictures(inside.seen["fused"], inside), 1.0
    for level in levels:
        found = draw.contributions(level["parts"])
        least = min(least, found.mean(axis=(1, 2)).min())
        for name, one in zip(names[:-1], found):
            ends = f"{one.mean():.2f}, from {one.min():.2f} to {one.max():.2f}"
            caption = f"stride {stride(level['parts'][0], inside)}, what {name} adds: {ends}"
            pictures[caption] = draw.tint(one, 1 / len(names))
    see = "fused features, principal components, each picture with directions of its own."
    if len(names) > 1:
        see += (
            " Then a modality's length over the sum of all: green more than an equal part, purple"
        )
        see += f" less. The smallest mean of a modality on a level is {least:.2f}."
    wrong = "a level has one colour all over; or a modality's mean is near 0: it is not heard."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    if any(level["gates"] for level in levels):
        charts = []
        for m, name in enumerate(names):
            lines = {f"level {i}": list(enumerate(np.sort(level["gates"][m].ravel())[::8].tolist()))
                     for i, level in enumerate(levels, 1)}  # fmt: skip
            charts.append(line_chart(f"gates of {name}", lines, 0, 1, "every 8th channel, sorted"))
        gates = np.concatenate([g.ravel() for level in levels for g in level["gates"]])
        see = f"the channels' gates, {gates.min():.2f} to {gates.max():.2f}, near 0.5 at first."
        see += " They hardly differ: no channel is preferred yet." if gates.std() < 0.05 else ""
        wrong = "most are 0 or 1: a gate that far out is hardly trained any more."
        stage.show(f'<div class="charts">{"".join(charts)}</div>', see, wrong)
    return stage


def decoder_stage(inside: Inside) -> Stage:
    stage = Stage(
        "Decoder",
        ["mfnet.py:Decoder.forward", "mfnet.py:WeightedFusion.forward"],
        "UNetFormer's: a block on the coarsest map, then three times: enlarge, fuse, refine.",
        ("stages, coarsest first", shape(*inside.seen["decoder"]), "decoder"),
    )
    weights = ", ".join(f"{w:.2f}" for w in inside.skip_weights)
    see = "from coarse to fine, principal components. "
    see += f"Skips weigh {weights} (at first 0.50)." if weights else "There are no skips."
    wrong = "the last picture has no outline of the window, or a skip weighs 0.00: it is not heard."
    pictures = level_pictures(inside.seen["decoder"], inside)
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage


def class_stage(inside: Inside, labels: np.ndarray | None, classes: Classes) -> Stage:
    logits, palette, K = inside.seen["logits"], [color for _, color in classes], len(classes)
    stage = Stage(
        "Logits, probabilities, errors",
        ["mfnet.py:MFNet.forward", "engine/inference.py:softmax_of_mean"],
        "This is one window; on a whole tile the logits of overlapping windows are summed.",
        ("logits (K, H, W)", shape(logits), ""),
    )
    probs = np.exp(logits - logits.max(axis=0))
    probs /= probs.sum(axis=0)
    pred, sure = logits.argmax(axis=0).astype(np.uint8), probs.max(axis=0)
    pictures = {"predicted classes": labels_to_colors(pred, palette)}
    see = f"the largest probability is {sure.mean():.2f} on average, where {1 / K:.2f} is a guess."
    if labels is not None and (labels != IGNORE).any():
        scored, right = labels != IGNORE, pred == labels
        pictures["errors (magenta; black: not scored)"] = error_map(pred, labels)
        see += f" {percent(right[scored].mean())} of the scored pixels are right."
        if right[scored].any() and not right[scored].all():
            here, there = (sure[scored & mask].mean() for mask in (right, ~right))
            see += f" The probability is {here:.2f} where right and {there:.2f} where wrong."
    hundredths = np.rint(100 * sure).astype(np.uint8)
    pictures["the largest probability (dark: unsure)"] = shade_confidence(hundredths, K)
    for k in inside.heat:
        pictures[f"probability of {classes[k][0]} (dark: high)"] = draw.shade(probs[k], 0, 1)
    wrong = "one class covers all after a training; or whole objects are wrong, not only outlines."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    present = {classes[k][0]: f"rgb{tuple(palette[k])}" for k in np.unique(pred)}
    stage.figures.append(legend(present))
    return stage


def heat_stage(inside: Inside, classes: Classes) -> Stage:
    stage = Stage(
        "What speaks for a class (the paper's Fig. 11)",
        [],
        "The gradient of a class's logits, summed over the window, with respect to a modality's "
        "map, times that map, summed over its channels. Before tuning: the maps of the encoder "
        "without the tuner, in the same fusion and decoder.",
    )
    pred = inside.seen["logits"].argmax(axis=0)
    for k, heat in inside.heat.items():  # (2, M, h, w)
        covered, raised = draw.cells(pred == k, heat.shape[2:]), np.clip(heat, 0, None)
        pictures = {
            f"{name}, {when} tuning": draw.tint(heat[i, m], 0, np.abs(heat).max())
            for i, when in enumerate(("before", "after"))
            for m, name in enumerate(inside.names)
        }
        on_it = [percent((r * covered).sum() / r.sum()) if r.any() else "nothing" for r in raised]
        strength = np.abs(heat[1]).sum(axis=(1, 2))
        shares = zip(inside.names, strength / max(strength.sum(), 1e-12))
        see = (
            f"{classes[k][0]}, on {percent((pred == k).mean())} of the window. Green raises its "
            f"logits, purple lowers them, on one scale. Of what raises it {on_it[0]} lies on it "
            f"before tuning and {on_it[1]} after. The heat after tuning by modality: "
        ) + ", ".join(f"{name} {percent(share)}" for name, share in shares)
        wrong = "after a training that share is no larger than the class's part of the window."
        stage.show(side_by_side(pictures, inside.size), f"{see}.", wrong)
    return stage


def other_stage(inside: Inside, labels: np.ndarray | None, classes: Classes) -> Stage:
    stage = Stage("The same window, otherwise", [], "There is one modality, and nothing to change.")
    if not inside.variants:
        return stage
    stage.words = "The same network with one thing changed, and nothing trained anew."
    as_it_is, pictures, said = inside.seen["logits"], {}, []
    scored = np.zeros(inside.size, bool) if labels is None else labels != IGNORE
    for name, logits in {"as it is": as_it_is, **inside.variants}.items():
        found = logits.argmax(axis=0).astype(np.uint8)
        right = f", {percent((found == labels)[scored].mean())} right" if scored.any() else ""
        pictures[name + right] = labels_to_colors(found, [color for _, color in classes])
        if logits is not as_it_is:
            changed = found != as_it_is.argmax(axis=0)
            pictures[f"{name}: changed"] = error_map(changed, np.zeros_like(changed))
            said.append(f"{name}, {percent(changed.mean())}")
    see = f"magenta changes class. With {'; with '.join(said)} of the pixels do."
    wrong = (
        "a modality at 0 changes nothing: the network does not use it. Or mixing weights change "
        "nothing though others were learned: what is mixed is small, or alike in all modalities."
    )
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage
