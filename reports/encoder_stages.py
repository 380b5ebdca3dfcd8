"""The first half of the lesson: patches, attention, tuner, the encoder's maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.labels import labels_to_colors
from geodata.layouts import Classes
from geodata.tiles import LoadedTile
from reports import features as draw
from reports.boxes import draw_boxes
from reports.lesson import SAME, Stage, percent, shape, side_by_side
from reports.page import line_chart, table
from reports.panels import raster_pictures

if TYPE_CHECKING:
    from engine.inside import Inside


def patch_stage(inside: Inside, cut: LoadedTile, classes: Classes) -> Stage:
    stage = Stage(
        "The window, its patches and positions",
        ["geodata/scaling.py:image_input", "geodata/scaling.py:scale_heights"]
        + [f"sam_vit.py:{name}.forward" for name in ("ImageEncoderViT", "PatchEmbed")],
        "Rasters are scaled to 0 to 1 and stacked along the batch; the encoder is not told which "
        "is which. A patch of 16 x 16 pixels becomes a token, and its position is added.",
        ("tokens (M, h, w, C)", shape(inside.tokens), "patch_embed"),
    )
    rasters = raster_pictures(cut)
    pictures = {
        name: draw.outline(draw.grid(picture, 16), inside.place, 16)
        for name, picture in rasters.items()
    }
    if cut.labels is not None:
        pictures["labels"] = labels_to_colors(cut.labels, [color for _, color in classes])
    see = "the same ground everywhere, cut into patches."
    if cut.dsm is not None and cut.dsm.min() == cut.dsm.max():
        see += " The heights do not vary: they tell nothing apart."
    wrong = "an outline lies elsewhere in the next picture: the files are not on one grid."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    colors = draw.shared_colors([t.transpose(2, 0, 1) for t in inside.tokens])
    pictures = {f"tokens, {name}": picture for name, picture in zip(inside.names, colors)}
    unit = inside.positions / np.linalg.norm(inside.positions, axis=-1, keepdims=True)
    alike, (y, x) = unit @ unit[inside.place], inside.place
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
        said.append(
            f"In block {a['block']} it gives itself {percent(a['with'][inside.place])} and padding "
            f"{percent(a['padding'])}; an equal part is {percent(equal)}; relative positions move "
            + (f"{percent(moved)}." if moved > SAME else "nothing, as tables of zeros do.")
        )
    see = (
        f"where the outlined token of the {inside.names[0]} looks, mean of the heads: green more "
        f"than an equal part, purple less, white outside of its window. {' '.join(said)}"
    )
    wrong = "with SAM's weights relative positions move nothing: lost, as in the published code."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
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
    lines = {name: list(enumerate(added[:, m].tolist())) for m, name in enumerate(inside.names)}
    chart = line_chart("added / frozen", lines, 0, max(float(added.max()), 0.01), "block")
    wrong = "a trained tuner stays at 0: it is not in the block. Far above 1 it drowns SAM."
    stage.show(chart, see, wrong)
    return stage


def mixing_stage(inside: Inside) -> Stage:
    stage = Stage("How the modalities mix inside the encoder", [], "")
    if not inside.mixing:
        alone = len(inside.names) == 1
        why = "there is one modality" if alone else "this tuner has no mixing weights"
        stage.words = f"Nothing is mixed: {why}."
        return stage
    stage.code = ["tuners.py:mix_modalities"]
    stage.words = (
        "Of what the tuner adds to the MLP a modality takes w times its own, and 1 - w times the "
        "mean of the others'. Training starts at w = 0.5."
    )
    lines = {}
    for layer, blocks in inside.mixing.items():
        for m, name in enumerate(inside.names):
            lines[f"{layer.removeprefix('mlp.')} {name}".strip()] = [
                weights[m] for weights in blocks
            ]
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
