"""The lesson's stages, in the order of the network: what each draws and says of one window.

What they say is computed from the numbers, so that it holds for any tuner, for mixing weights of 1
and for a network that has learned nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.labels import labels_to_colors
from geodata.layouts import IGNORE, Classes
from geodata.tiles import LoadedTile
from reports import features as draw
from reports.lesson import SAME, Stage, percent, shape, side_by_side
from reports.page import bar, class_legend, draw_boxes, line_chart, table
from reports.panels import error_map, raster_pictures, shade, shade_confidence

if TYPE_CHECKING:
    from engine.inside import Inside

SHADES = (draw.LESS, (255, 255, 255), draw.MORE)  # of `draw.tint`


def walk(
    inside: Inside, cut: LoadedTile, classes: Classes, tuner: str, code_of_tuner: list[str]
) -> list[Stage]:
    return [
        patch_stage(inside, cut, classes),
        attention_stage(inside),
        tuner_stage(inside, tuner, code_of_tuner),
        mixing_stage(inside),
        feature_stage(inside),
        fusion_stage(inside),
        decoder_stage(inside),
        class_stage(inside, cut.labels, classes),
        heat_stage(inside, classes),
        other_stage(inside, cut.labels, classes),
    ]


# ------------------------------------------------------------------------------------- the encoder


def patch_stage(inside: Inside, cut: LoadedTile, classes: Classes) -> Stage:
    stage = Stage(
        "The window, its patches and positions",
        ["geodata/scaling.py:image_input", "geodata/scaling.py:scale_heights"]
        + [f"sam_vit.py:{name}.forward" for name in ("ImageEncoderViT", "PatchEmbed")],
        "Rasters are scaled to 0 to 1 and stacked along the batch; the encoder is not told which "
        "is which. A patch of 16 x 16 pixels becomes a token, and its position is added.",
        ("tokens (M, h, w, C)", shape(inside.tokens), "patch_embed"),
    )
    place, (y, x) = inside.place, inside.place
    palette = [color for _, color in classes]
    rasters = raster_pictures(cut)
    pictures = {n: draw.outline(draw.grid(p, 16), place, 16) for n, p in rasters.items()}
    if cut.labels is not None:
        pictures["labels"] = labels_to_colors(cut.labels, palette)
    see = "the same ground everywhere, cut into patches."
    if cut.dsm is not None and cut.dsm.min() == cut.dsm.max():
        see += " The heights do not vary: they tell nothing apart."
    wrong = "an outline lies elsewhere in the next picture: the files are not on one grid."
    stage.show(side_by_side(pictures, inside.size, palette), see, wrong)
    colors = draw.shared_colors([t.transpose(2, 0, 1) for t in inside.tokens])
    pictures = {f"tokens, {name}": picture for name, picture in zip(inside.names, colors)}
    unit = inside.positions / np.linalg.norm(inside.positions, axis=-1, keepdims=True)
    alike = unit @ unit[place]
    pictures["positions, compared with the outlined token's"] = draw.tint(alike, 0, 1)
    around = alike[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
    near, everywhere = ((part.sum() - 1) / (part.size - 1) for part in (around, alike))
    knows = "they tell" if near > everywhere + 0.05 else "like random ones they do not tell"
    see = (
        "tokens of one colour are alike, in any of these pictures. Positions (green: alike, by the "
        f"cosine) have {near:.2f} near the outlined token and {everywhere:.2f} everywhere: "
        f"{knows} near from far."
    )
    wrong = "all tokens have one colour: the raster is flat, or the patches say nothing of it."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage


def attention_stage(inside: Inside) -> Stage:
    stage = Stage(
        "Blocks and attention",
        [f"sam_vit.py:{n}" for n in ("Block.forward", "Attention.forward", "decomposed_rel_pos")],
        "A block adds to each token what attention and MLP find, by the same layers for all "
        "modalities.",
        (f"the stream, {len(inside.added)} times", shape(inside.tokens), "blocks"),
    )
    pictures, said = {}, []
    for a in inside.attention:
        (rows, cols), equal = a["window"], 1 / (a["window"][0] * a["window"][1])
        ways = {way: np.where(a["inside"], a[way], equal) for way in ("with", "without")}
        reach = max(np.abs(weights - equal).max() for weights in ways.values())
        for way, weights in ways.items():
            _, drawn = draw.enlarge(draw.tint(weights, equal, reach), inside.size)
            caption = f"block {a['block']}, window {rows} x {cols}, {way} relative positions"
            pictures[caption] = draw.outline(drawn, inside.place, 16)
        moved = np.abs(a["with"] - a["without"]).sum() / 2
        moves = percent(moved) if moved > SAME else "nothing, as tables of zeros do"
        said.append(
            f"In block {a['block']} it gives itself {percent(a['with'][inside.place])} and padding "
            f"{percent(a['padding'])}; an equal part is {percent(equal)}; relative positions move "
            f"{moves}."
        )
    see = (
        f"where the outlined token of the {inside.names[0]} looks, mean of the heads: green more "
        f"than an equal part, purple less, white outside of its window. {' '.join(said)}"
    )
    wrong = "with SAM's weights relative positions move nothing: lost, as in the published code."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    stage.figures.append(bar("less than an equal part", "more", SHADES))
    return stage


def tuner_stage(inside: Inside, tuner: str, code: list[str]) -> Stage:
    stage = Stage(
        f"What the tuner adds: {tuner}",
        code,
        "In the encoder the tuner's parameters are trained, and those of SAM's that it declares.",
        ("the same stream", shape(inside.tokens), "tuner"),
    )
    rows, added = inside.drawings["block"], inside.added
    trained = [name for row in rows for name, _, _, is_trained in row if is_trained]
    see = f"block {inside.drawn} in the order of its calls; a dot marks what is trained. "
    see += f"Trained parts: {', '.join(trained) or 'none'}."
    wrong = "a part of the tuner is missing, or a dot stands where it trains nothing."
    stage.show(draw_boxes(rows, "A block of the encoder"), see, wrong)
    block, m = np.unravel_index(added.argmax(), added.shape)
    see = "the tuner adds nothing: a block gives what the frozen one does."
    if added.max() > SAME:
        most = f"{percent(added[block, m])} in block {block}, {inside.names[m]}"
        see = f"the norm of what it adds over that of what the frozen block gives. At most {most}."
    if inside.parameters["blocks"][1]:
        see += " SAM's own weights count as frozen here, though this tuner has trained them."
    lines = {name: list(enumerate(one.tolist())) for name, one in zip(inside.names, added.T)}
    chart = line_chart("added / frozen", lines, 0, max(float(added.max()), 0.01), "block")
    wrong = "a trained tuner stays at 0: it is not in the block. Far above 1 it drowns SAM."
    stage.show(chart, see, wrong)
    return stage


def mixing_stage(inside: Inside) -> Stage:
    heading = "How the modalities mix inside the encoder"
    if not inside.mixing:
        alone = len(inside.names) == 1
        why = "there is one modality" if alone else "this tuner has no mixing weights"
        return Stage(heading, [], f"Nothing is mixed: {why}.")
    stage = Stage(
        heading,
        ["tuners.py:mix_modalities"],
        "Of what the tuner adds to the MLP a modality takes w times its own, and 1 - w times the "
        "mean of the others'. Training starts at w = 0.5.",
    )
    lines = {
        f"{layer.removeprefix('mlp.')} {name}".strip(): [weights[m] for weights in blocks]
        for layer, blocks in inside.mixing.items()
        for m, name in enumerate(inside.names)
    }
    off, name, block, w = max(
        (abs(w - 0.5), name, i, w) for name, weights in lines.items() for i, w in enumerate(weights)
    )
    first = len(inside.added) - len(next(iter(lines.values())))  # the tuned blocks are the last
    points = {name: list(enumerate(ws, first)) for name, ws in lines.items()}
    reach = max(0.05, off)
    chart = line_chart("mixing weights", points, 0.5 - reach, 0.5 + reach, "block")
    rows = [[str(i), *(f"{w:.3f}" for w in ws)] for i, ws in enumerate(zip(*lines.values()), first)]
    see = f"the middle is the start. Farthest from it: {name} in block {block + first}, "
    see += f"w = {w:.3f}. "
    if off <= SAME:
        see = "all weights are where they start, at 0.5. "
    see += "Above 0.5 a modality keeps more of its own, and at 1 it hears nothing of the others."
    wrong = (
        "all are exactly 0.5 after a training. Below 0 and above 1 is right: nothing clamps them."
    )
    stage.show(f'<div class="charts">{chart}{table(["block", *lines], rows)}</div>', see, wrong)
    return stage


def feature_stage(inside: Inside) -> Stage:
    maps, before, names = inside.seen["maps"], inside.maps_before, inside.names
    stage = Stage(
        "The encoder's maps, before and after tuning",
        [],
        "The neck makes 256 channels of the stream. Before tuning: the encoder without the tuner.",
        (f"maps, {len(maps)} times", shape(maps[0]), "neck"),
    )
    captions = [f"{name}, {when} tuning" for when in ("before", "after") for name in names]
    pictures = dict(zip(captions, draw.shared_colors(before + maps)))
    moved = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(before, maps)]
    see = "principal components; one colour is one kind of place, in all of these pictures. "
    if max(moved) > SAME:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in zip(names, moved))
        see += f"Tuning moved the maps by a part of their norm: {shares}."
    else:
        see += "The tuner changes nothing: before and after are the same."
    if len(names) > 1:
        was, now = (cosine(*both[:2]) for both in (before, maps))
        see += f" The maps of {names[0]} and {names[1]} have a cosine of {was:.2f}, then {now:.2f}."
    wrong = "a map has one colour: it tells no places apart. Or a trained tuner moved nothing."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


# ------------------------------------------------------------------------------ fusion and decoder


def stride(level: np.ndarray, inside: Inside) -> int:
    return draw.enlarge(level[0], inside.size)[0]


def level_pictures(levels: list[np.ndarray], inside: Inside) -> dict[str, np.ndarray]:
    return {f"stride {stride(level, inside)}": draw.principal_colors(level) for level in levels}


def fusion_stage(inside: Inside) -> Stage:
    names, rows, levels = inside.names, inside.drawings["fusion"], inside.seen["levels"]
    code = ["Pyramid", "SqueezeExcitation", "SEFusion"] if rows else ["SumFusion"]
    where = "On each level of the pyramids" if rows else "On one level, that of the tokens,"
    stage = Stage(
        "Fusion",
        [f"dfm.py:{name}.forward" for name in code],
        f"{where} one part of each modality is added up.",
        ("fused, finest first", shape(*inside.seen["fused"]), "fusion"),
    )
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
            " Then a modality's length over the sum of all: green more than an equal part, purple "
            f"less. The smallest mean of a modality on a level is {least:.2f}."
        )
    wrong = "a level has one colour all over; or a modality's mean is near 0: it is not heard."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    if len(names) > 1:
        stage.figures.append(bar("less than an equal part", "more", SHADES))
    if any(level["gates"] for level in levels):
        charts = []
        for m, name in enumerate(names):
            gates = [np.sort(level["gates"][m].ravel())[::8].tolist() for level in levels]
            lines = {f"level {i}": list(enumerate(found)) for i, found in enumerate(gates, 1)}
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


# ----------------------------------------------------------------------------------------- classes


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
        pictures[f"probability of {classes[k][0]} (dark: high)"] = shade(probs[k], 0, 1)
    wrong = "one class covers all after a training; or whole objects are wrong, not only outlines."
    stage.show(side_by_side(pictures, inside.size, palette), see, wrong)
    stage.figures.append(class_legend(classes))
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
    stage.figures.append(bar("lowers the logits", "raises them", SHADES))
    return stage


def other_stage(inside: Inside, labels: np.ndarray | None, classes: Classes) -> Stage:
    heading, palette = "The same window, otherwise", [color for _, color in classes]
    if not inside.variants:
        return Stage(heading, [], "There is one modality, and nothing to change.")
    stage = Stage(heading, [], "The same network with one thing changed, and nothing trained anew.")
    as_it_is, pictures, said = inside.seen["logits"].argmax(axis=0), {}, []
    scored = np.zeros(inside.size, bool) if labels is None else labels != IGNORE
    for name, logits in {"as it is": inside.seen["logits"], **inside.variants}.items():
        found = logits.argmax(axis=0).astype(np.uint8)
        right = f", {percent((found == labels)[scored].mean())} right" if scored.any() else ""
        pictures[name + right] = labels_to_colors(found, palette)
        if name in inside.variants:
            changed = found != as_it_is
            pictures[f"{name}: changed"] = error_map(changed, np.zeros_like(changed))
            said.append(f"{name}, {percent(changed.mean())}")
    see = f"magenta changes class. With {'; with '.join(said)} of the pixels do."
    wrong = (
        "a modality at 0 changes nothing: the network does not use it. Or mixing weights change "
        "nothing though others were learned: what is mixed is small, or alike in all modalities."
    )
    stage.show(side_by_side(pictures, inside.size, palette), see, wrong)
    return stage
