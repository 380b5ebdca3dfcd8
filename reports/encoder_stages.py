"""The first half of the lesson: window, patches, attention, tuner, the encoder's maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.layouts import Classes
from geodata.tiles import LoadedTile, labels_to_colors
from reports import features as draw
from reports.boxes import draw_boxes
from reports.lesson import SAME, Stage, percent, shape, side_by_side
from reports.page import line_chart, table
from reports.panels import raster_pictures

if TYPE_CHECKING:
    from engine.inside import Inside


def window_stage(inside: Inside, cut: LoadedTile, classes: Classes) -> Stage:
    code = {"image": "geodata/scaling.py:image_input", "height": "geodata/scaling.py:scale_heights"}
    stage = Stage(
        "The window",
        [*(code[name] for name in inside.names), "mfnet.py:as_three_channels"],
        "Rasters are scaled to 0 to 1, heights repeated to three channels, and all stacked along "
        "the batch: the encoder is not told which is which.",
        ("network input (M, 3, H, W)", str((len(inside.names), 3, *inside.size)), ""),
    )
    pictures, see = raster_pictures(cut), "the same ground in every picture."
    if cut.labels is not None:
        pictures["labels"] = labels_to_colors(cut.labels, [color for _, color in classes])
    if cut.dsm is not None:
        span = float(cut.dsm.max() - cut.dsm.min())
        see += f" Heights span {span:.1f} m; grey is stretched to the window."
        see += "" if span else " They do not vary: they cannot tell anything apart here."
    wrong = "an outline lies elsewhere in the next picture: the files are not on one grid."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage


def patch_stage(inside: Inside, cut: LoadedTile) -> Stage:
    stage = Stage(
        "Patches and positions",
        [
            "sam_vit.py:ImageEncoderViT.forward",
            "sam_vit.py:PatchEmbed.forward",
            "sam_vit.py:resize_positions",
        ],
        "A patch of 16 x 16 pixels becomes a token; a position is added. Blocks change the tokens, "
        "and never their grid.",
        ("tokens (M, h, w, C)", shape(inside.tokens), "patch_embed"),
    )
    pictures = {}
    for name, picture in zip(inside.names, raster_pictures(cut).values()):
        pictures[f"patches, {name}"] = draw.outline(draw.grid(picture, 16), inside.place, 16)
    colors = draw.shared_colors([t.transpose(2, 0, 1) for t in inside.tokens])
    pictures |= {f"tokens, {name}": picture for name, picture in zip(inside.names, colors)}
    unit = inside.positions / np.linalg.norm(inside.positions, axis=-1, keepdims=True)
    alike, (y, x) = unit @ unit[inside.place], inside.place
    pictures["positions like the outlined token's"] = draw.tint(alike, 0, 1)
    around = alike[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
    near, all_of_them = ((part.sum() - 1) / (part.size - 1) for part in (around, alike))
    see = (
        "tokens of one colour are alike, in all of these pictures. The last one compares the "
        "position of the outlined token with the others' (cosine; green is alike): its neighbours "
        f"are at {near:.2f}, all at {all_of_them:.2f}, so positions "
    )
    knows = near > all_of_them + 0.05
    see += "tell near from far." if knows else "do not tell near from far, as random ones do."
    wrong = "all tokens have one colour: the raster is flat, or the patches say nothing of it."
    stage.show(side_by_side(pictures, inside.size), see, wrong)
    return stage


def attention_stage(inside: Inside) -> Stage:
    code = ["Block.forward", "Attention.forward", "decomposed_rel_pos"]
    stage = Stage(
        "Blocks and attention",
        [f"sam_vit.py:{name}" for name in code],
        "A block adds to each token what attention and MLP find, with the same layers for every "
        "modality.",
        (f"the stream, {len(inside.added)} times", shape(inside.tokens), "blocks"),
    )
    (_, h, w, _), pictures, said = inside.tokens.shape, {}, []
    for a in inside.attention:
        (rows, cols), equal = a["window"], 1 / (a["window"][0] * a["window"][1])
        reach = max(np.abs(a[name] - equal)[a["inside"]].max() for name in ("with", "without"))
        where = f"windows of {rows} x {cols}" if (rows, cols) != (h, w) else "the whole grid"
        for name in ("with", "without"):
            drawn = draw.tint(np.where(a["inside"], a[name], equal), equal, reach)
            drawn = draw.outline(draw.enlarge(drawn, inside.size)[1], inside.place, 16)
            pictures[f"block {a['block']}, {where}, {name} relative positions"] = drawn
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
    wrong = (
        "SAM's weights are loaded, and relative positions move nothing: their tables were lost, as "
        "in the published code."
    )
    if pictures:
        stage.show(side_by_side(pictures, inside.size), see, wrong)
    else:
        stage.words += " The attention of this encoder is not SAM's, and is not drawn."
    return stage


def tuner_stage(inside: Inside, tuner: str, code: list[str]) -> Stage:
    stage = Stage(
        f"What the tuner adds: {tuner}",
        code,
        "In the encoder nothing is trained but the tuner's parameters, and those of SAM's that it "
        "declares.",
        ("the same stream", shape(inside.tokens), "tuner"),
    )
    rows, added = inside.drawings["block"], inside.added
    trained = [name for row in rows for name, _, _, is_trained in row if is_trained]
    see = (
        "block 0 in the order of its calls. Something in it is trained (orange; a dot marks what): "
    )
    see += f"{', '.join(trained) or 'nowhere'}."
    wrong = (
        "a part of the tuner is missing, or a dot stands at a part of SAM's that it does not train."
    )
    stage.show(draw_boxes(rows, "A block of the encoder"), see, wrong)
    block, m = np.unravel_index(added.argmax(), added.shape)
    see = "the tuner adds nothing: a block gives what the frozen one does."
    if added.max() > SAME:
        most = f"{percent(added[block, m])} in block {block}, {inside.names[m]}"
        see = f"the norm of what it adds over that of what the frozen block gives. At most {most}."
    if inside.tunes_sam:
        see += " SAM's own weights count as frozen here, though this tuner has trained them."
    lines = {name: list(enumerate(added[:, m].tolist())) for m, name in enumerate(inside.names)}
    chart = line_chart("added / frozen", lines, 0, max(float(added.max()), 0.01), "block")
    wrong = (
        "a trained tuner stays at 0 (it is not in the block), or far above 1 drowns what SAM knows."
    )
    stage.show(chart, see, wrong)
    return stage


def mixing_stage(inside: Inside) -> Stage:
    stage = Stage("How the modalities mix inside the encoder", [], "")
    if not inside.mixing:
        why = (
            "this tuner has no mixing weights" if len(inside.names) > 1 else "there is one modality"
        )
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
            lines[f"{layer.split('.')[-1]} {name}".strip()] = [weights[m] for weights in blocks]
    off, name, block, w = max(
        (abs(w - 0.5), name, i, w) for name, weights in lines.items() for i, w in enumerate(weights)
    )
    points, reach = {name: list(enumerate(ws)) for name, ws in lines.items()}, max(0.05, off)
    chart = line_chart("mixing weights", points, 0.5 - reach, 0.5 + reach, "block")
    rows = [[str(i), *(f"{w:.3f}" for w in ws)] for i, ws in enumerate(zip(*lines.values()))]
    see = f"the middle is the start. Farthest from it: {name} in block {block}, w = {w:.3f}. "
    if off <= SAME:
        see = "all weights are where they start, at 0.5. "
    see += "Above 0.5 a modality keeps more of its own, and at 1 it hears nothing of the others."
    wrong = (
        "all are exactly 0.5 after a training. Below 0 or above 1 is allowed, nothing clamps them."
    )
    stage.show(f'<div class="charts">{chart}{table(["block", *lines], rows)}</div>', see, wrong)
    return stage


def feature_stage(inside: Inside) -> Stage:
    stage = Stage(
        "The encoder's maps, before and after tuning",
        [],
        "The neck makes 256 channels of the stream. Before tuning: the encoder without the tuner.",
        (f"maps, {len(inside.maps)} times", shape(inside.maps[0]), "neck"),
    )
    pairs = list(zip(inside.names, inside.maps_before, inside.maps))
    colors = draw.shared_colors([x for _, *both in pairs for x in both])
    captions = [f"{n}, {when} tuning" for n in inside.names for when in ("before", "after")]
    moved = {n: np.linalg.norm(b - a) / np.linalg.norm(a) for n, a, b in pairs}
    see = "principal components; one colour is one kind of place, in all of these pictures. "
    if max(moved.values()) > SAME:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in moved.items())
        see += f"Tuning moved the maps by a part of their norm: {shares}."
    else:
        see += "The tuner changes nothing: before and after are the same."
    if len(pairs) > 1:
        was, now = (cosine(*maps[:2]) for maps in (inside.maps_before, inside.maps))
        first, second = inside.names[:2]
        see += f" The maps of {first} and {second} have a cosine of {was:.2f}, then of {now:.2f}."
    wrong = (
        "a map has one colour, so that it tells no places apart; or a trained tuner moved nothing."
    )
    stage.show(side_by_side(dict(zip(captions, colors)), inside.size), see, wrong)
    return stage


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
