"""The second half of the lesson: fusion, decoder, classes, heat maps, the same window otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.layouts import IGNORE, Classes
from geodata.tiles import labels_to_colors
from reports import features as draw
from reports.boxes import Box, draw_boxes
from reports.lesson import Stage, listed, percent, plate, shape
from reports.page import legend, line_chart, table
from reports.panels import error_map, shade_confidence

if TYPE_CHECKING:
    from engine.inside import Inside


def level_pictures(levels: list[np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    found = {}
    for level in levels:
        stride, pixels = draw.enlarge(draw.principal_colors(level), size)
        found[f"stride {stride}: {level.shape[2]} x {level.shape[1]}"] = pixels
    return found


def fusion_stage(inside: Inside) -> Stage:
    names, size, gates = inside.names, inside.logits.shape[1:], inside.gates
    is_dfm = len(inside.fused) > 1
    rows = [[Box(*part) for part in row] for row in inside.drawings["fusion"]]
    plates = (
        [
            plate(
                draw_boxes(rows, "The Deep Fusion Module"),
                "the pyramids, then the levels that join them, in the order in which they are called.",
                "a pyramid or a level is missing, or is not trained (grey).",
            )
        ]
        if rows
        else []
    )
    pictures, numbers, lowest = level_pictures(inside.fused, size), [], 1.0
    for parts, gate in zip(inside.parts, gates):
        found = draw.contributions(parts)
        stride = draw.enlarge(found[0], size)[0]
        lowest = min(lowest, found.mean(axis=(1, 2)).min())
        for name, one in zip(names[:-1], found):
            ends = f"{one.mean():.2f}, from {one.min():.2f} to {one.max():.2f}"
            caption = f"stride {stride}, what {name} adds: {ends}"
            pictures[caption] = draw.enlarge(draw.tint(one, 1 / len(names)), size)[1]
        means = (*found.mean(axis=(1, 2)), *(g.mean() for g in gate))
        numbers.append([str(stride), *(f"{n:.3f}" for n in means)])
    head = ["stride", *(f"contribution of {n}" for n in names)]
    head += [f"mean gate of {n}" for n in names] if any(gates) else []
    see = (
        "the fused features by their principal components, each picture with directions of its own."
    )
    if len(names) > 1:
        see += (
            " Then a modality's part: the length of what it adds over the sum of the lengths; green "
            f"more than an equal part, purple less. The smallest mean of a modality is {lowest:.2f}."
        )
    plates.append(
        plate(
            pictures,
            see,
            "a fused map has one colour all over; or a modality's mean is "
            "near 0: the fusion does not hear it.",
        )
    )
    plates.append(table(head, numbers))
    if any(gates):
        plates.append(gate_plate(inside))
    module = "DeepFusionModule" if is_dfm else "SumFusion"
    codes = [
        "dfm.py:Pyramid.forward",
        "dfm.py:SqueezeExcitation.forward",
        "dfm.py:SEFusion.forward",
    ]
    return Stage(
        "Fusion",
        codes if is_dfm else ["dfm.py:SumFusion.forward"],
        f"{module}: from the map of each modality "
        + ("four levels, each the sum of the modalities." if is_dfm else "one sum, one level."),
        [("fused, finest first", ", ".join(shape(x) for x in inside.fused), "fusion")],
        plates,
    )


def gate_plate(inside: Inside) -> str:
    every = np.concatenate([g for gates in inside.gates for g in gates])
    charts = []
    for m, name in enumerate(inside.names):
        lines = {
            f"level {i}": list(enumerate(np.sort(gates[m])[::8].tolist()))
            for i, gates in enumerate(inside.gates, 1)
        }
        charts.append(line_chart(f"gates of {name}, sorted", lines, 0, 1, "channels, every eighth"))
    see = f"the gate of each channel, from {every.min():.2f} to {every.max():.2f}; a new one is near 0.5."
    if every.std() < 0.05:
        see += " They are nearly alike: no channel is chosen over another yet."
    drawn = f'<div class="charts">{"".join(charts)}</div>'
    return plate(drawn, see, "most gates lie at 0 or 1: they can no longer be trained.")


def decoder_stage(inside: Inside) -> Stage:
    pictures = level_pictures(inside.decoder, inside.logits.shape[1:])
    skips = inside.skip_weights
    see = "from coarse to fine, by principal components. "
    see += (
        f"The skips weigh {', '.join(f'{w:.2f}' for w in skips)} in the three fusions (at the start "
        "0.50), the map from below the rest."
        if skips
        else "Without skips, nothing finer than a token comes in: outlines follow the grid of tokens."
    )
    wrong = (
        "the last picture has no outline of the window, or a skip weighs 0.00 (it is not heard)."
    )
    return Stage(
        "Decoder",
        ["mfnet.py:Decoder.forward", "mfnet.py:WeightedFusion.forward"],
        "UNetFormer's: a block on the coarsest map, then three times enlarge, fuse with the finer one, "
        "refine.",
        [("stages, coarsest first", ", ".join(shape(x) for x in inside.decoder), "decoder")],
        [plate(pictures, see, wrong)],
    )


def class_stage(inside: Inside, labels: np.ndarray | None, classes: Classes) -> Stage:
    palette, names = [color for _, color in classes], [name for name, _ in classes]
    probs = softmax(inside.logits)
    pred, sure = probs.argmax(axis=0).astype(np.uint8), probs.max(axis=0)
    counts = np.bincount(pred.ravel(), minlength=len(classes))
    largest = [k for k in np.argsort(-counts)[: len(inside.heat)] if counts[k]]
    pictures = {"predicted classes": labels_to_colors(pred, palette)}
    see = f"the largest probability is {sure.mean():.2f} on average (of {len(classes)} equal ones: "
    see += f"{1 / len(classes):.2f}); dark is unsure."
    if sure.mean() < 1.5 / len(classes):
        see += " That is what a network says which has learned nothing."
    if labels is not None and (labels != IGNORE).any():
        scored = labels != IGNORE
        right = pred == labels
        pictures["errors (magenta; black is not scored)"] = error_map(pred, labels)
        see += f" {percent(right[scored].mean())} of the scored pixels are right"
        apart = [sure[scored & mask] for mask in (right, ~right)]
        see += (
            ", with a probability of {:.2f} where right and {:.2f} where wrong.".format(
                *map(np.mean, apart)
            )
            if all(map(len, apart))
            else "."
        )
    pictures["probability of the predicted class"] = shade_confidence(
        np.rint(100 * sure).astype(np.uint8), len(classes)
    )
    for k in largest:
        pictures[f"probability of {names[k]}"] = draw.shade(probs[k], 0, 1)
    colors = {
        f"{names[k]} {percent(counts[k] / pred.size)}": f"rgb{tuple(palette[k])}"
        for k in np.flatnonzero(counts)
    }
    wrong = (
        "after a training one class covers all; or whole objects, not outlines alone, are wrong: look "
        "above for the stage at which they are lost."
    )
    return Stage(
        "Logits, probabilities, errors",
        ["mfnet.py:MFNet.forward", "engine/inference.py:softmax_of_mean"],
        "This window alone; on a whole tile the logits of overlapping windows are summed.",
        [("logits (K, H, W)", shape(inside.logits), "")],
        [plate(pictures, see, wrong), legend(colors)],
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=0))
    return e / e.sum(axis=0)


def heat_stage(inside: Inside, classes: Classes) -> Stage:
    """The paper's Fig. 11."""
    pred, size = inside.logits.argmax(axis=0), inside.logits.shape[1:]
    plates = []
    for k, heat in inside.heat.items():
        covered = draw.cells(pred == k, heat.shape[2:])
        pictures, found = {}, []
        for m, name in enumerate(inside.names):
            for when, values in zip(("before", "after"), heat[:, m]):
                drawn = draw.tint(values, 0, np.abs(heat).max())
                pictures[f"{name}, {when} tuning"] = draw.enlarge(drawn, size)[1]
                found.append((f"{name} {when}", on_class(values, covered)))
        see = (
            f"{classes[k][0]}: green places raise its logits, purple ones lower them, all on one scale. "
            f"It is predicted on {percent((pred == k).mean())} of the window; of what raises it lies "
            f"there: {', '.join(f'{name} {share}' for name, share in found)}."
        )
        plates.append(
            plate(
                pictures,
                see,
                "a trained network's green ignores where the class lies: "
                "its share there is then no larger than the class's part of the window.",
            )
        )
    return Stage(
        "What speaks for a class (the paper's Fig. 11)",
        [],
        "The gradient of a class's logits, summed over the window, with respect to each modality's map, "
        "times the map, summed over its channels. Before tuning, the same fusion and decoder are given "
        "the maps of the encoder without the tuner.",
        [("heat (h, w)", shape(next(iter(inside.heat.values()))[0, 0]), "")],
        plates,
    )


def on_class(values: np.ndarray, covered: np.ndarray) -> str:
    """The share of the positive heat that lies on a class's places."""
    raised = np.clip(values, 0, None)
    return percent((raised * covered).sum() / raised.sum()) if raised.sum() > 0 else "nothing"


def other_stage(inside: Inside, labels: np.ndarray | None, classes: Classes) -> Stage:
    palette, pred = [color for _, color in classes], inside.logits.argmax(axis=0)
    scored = None if labels is None or (labels == IGNORE).all() else labels != IGNORE

    def right(classes_of_pixels: np.ndarray) -> str:
        return (
            ""
            if scored is None
            else f", {percent((classes_of_pixels == labels)[scored].mean())} right"
        )

    pictures = {f"as it is{right(pred)}": labels_to_colors(pred.astype(np.uint8), palette)}
    said = []
    for name, logits in inside.variants.items():
        other = logits.argmax(axis=0)
        said.append(f"{name}: {percent((other != pred).mean())} of the pixels change class")
        pictures[f"{name}{right(other)}"] = labels_to_colors(other.astype(np.uint8), palette)
        pictures[f"{name}: changed"] = error_map(other, pred)
    stage = Stage("The same window, otherwise", [], "There is one modality and nothing to mix.", [])
    if said:
        stage.words = "The same network, with one thing changed and nothing trained anew."
        wrong = (
            "without height nothing changes in a network that was trained with it: it does not use it. "
            "Mixing weights that are far from what was learned and change nothing: the tuner's update "
            "is small, or alike in all modalities."
        )
        stage.plates = [plate(pictures, f"magenta is what changes. {'; '.join(said)}.", wrong)]
    return stage
