"""The first half of the lesson: window, patches, attention, tuner, the encoder's maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geodata.layouts import Classes
from geodata.tiles import LoadedTile, labels_to_colors
from reports import features as draw
from reports.boxes import Box, draw_boxes
from reports.lesson import SAME, Stage, listed, percent, plate, shape
from reports.page import line_chart, note, table
from reports.panels import raster_pictures

if TYPE_CHECKING:
    from engine.inside import Inside


def window_stage(inside: Inside, cut: LoadedTile, classes: Classes) -> Stage:
    pictures = raster_pictures(cut)
    H, W = inside.logits.shape[1:]
    if cut.labels is not None:
        pictures["labels"] = labels_to_colors(cut.labels, [color for _, color in classes])
    see = "the same ground in every picture."
    if cut.dsm is not None:
        low, high = float(cut.dsm.min()), float(cut.dsm.max())
        see += f" Heights span {high - low:.1f} m here; the grey is stretched to this window."
        see += "" if high > low else " They do not vary: they cannot tell anything apart."
    return Stage(
        "The window",
        [
            *["geodata/scaling.py:image_input"][: "image" in inside.names],
            *["geodata/scaling.py:scale_heights"][: "height" in inside.names],
            "mfnet.py:as_three_channels",
        ],
        "The rasters are scaled to 0 to 1, the heights repeated to three channels, and stacked along "
        "the batch: the encoder does not know which is which.",
        [("network input, M x (3, H, W)", f"({len(inside.names)}, 3, {H}, {W})", "")],
        [
            plate(
                pictures,
                see,
                "an outline lies elsewhere from one picture to the next: the files do "
                "not lie on one grid.",
            )
        ],
    )


def patch_stage(inside: Inside, cut: LoadedTile) -> Stage:
    size, place = inside.logits.shape[1:], inside.place
    M, h, w, C = inside.tokens.shape
    unit = inside.positions / np.linalg.norm(inside.positions, axis=-1, keepdims=True)
    alike = unit @ unit[place]  # (h, w) cosines
    y, x = place
    near = alike[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
    near = (near.sum() - 1) / (near.size - 1)
    far = (alike.sum() - 1) / (alike.size - 1)
    pictures = {}
    for name, picture in zip(inside.names, raster_pictures(cut).values()):
        grid = picture.copy()
        grid[::16] = grid[:, ::16] = draw.MARK
        pictures[f"patches of 16 x 16 pixels, {name}"] = grid
    colors = draw.shared_colors([t.transpose(2, 0, 1) for t in inside.tokens])
    for name, tokens in zip(inside.names, colors):
        pictures[f"tokens, {name}"] = draw.enlarge(tokens, size)[1]
    position = draw.outline(draw.enlarge(draw.tint(alike, 0, 1), size)[1], place, 16)
    pictures["positions like the outlined one's"] = position
    knows = near > far + 0.05
    see = (
        "a token has one colour for what its patch looks like; the same colours in all of these "
        "pictures are the same features. In the last picture the position of the outlined token is "
        f"compared with the others' (cosine, green is alike): its neighbours' are at {near:.2f}, "
        f"all at {far:.2f} on average, so positions "
        + ("tell near from far." if knows else "do not tell near from far, as random ones do.")
    )
    wrong = "all tokens have one colour: the patches say nothing, or the raster is flat."
    return Stage(
        "Patches and positions",
        [
            "sam_vit.py:ImageEncoderViT.forward",
            "sam_vit.py:PatchEmbed.forward",
            "sam_vit.py:resize_positions",
        ],
        "Each patch becomes a token; a position is added; the blocks change tokens, never their grid.",
        [
            ("tokens (M, h, w, C)", f"({M}, {h}, {w}, {C})", "patch_embed"),
            ("positions (h, w, C)", shape(inside.positions), "pos_embed"),
        ],
        [plate(pictures, see, wrong)],
    )


def attention_stage(inside: Inside) -> Stage:
    size, (M, h, w, C) = inside.logits.shape[1:], inside.tokens.shape
    pictures, said = {}, []
    for a in inside.attention:
        rows, cols = a["window"]
        kind = f"block {a['block']}, "
        whole = (
            "all of the grid" if rows >= h and cols >= w else f"a window of {rows} x {cols} tokens"
        )
        for name in ("with", "without"):
            drawn = draw.shade(a[name], 0, max(a["with"].max(), a["without"].max()))
            caption = f"{kind}{whole}, {name} relative positions"
            pictures[caption] = draw.outline(draw.enlarge(drawn, size)[1], inside.place, 16)
        moved = np.abs(a["with"] - a["without"]).sum() / 2
        own = a["with"][inside.place]
        said.append(
            f"In block {a['block']} the query gives itself {percent(own)} "
            f"(an equal part is {percent(1 / (rows * cols))}), padding {percent(a['padding'])}; "
            + (
                f"relative positions move {percent(moved)} of it."
                if moved > SAME
                else "relative positions move nothing, as tables of zeros do."
            )
        )
    see = (
        f"where the outlined token of the {inside.names[0]} stream looks (mean of the heads; dark "
        f"is much, by the larger of the two). {' '.join(said)}"
    )
    plates = [
        plate(
            pictures,
            see,
            "anything but white lies outside the window of a windowed block, "
            "or all of a trained encoder's weights lie on the query itself.",
        )
    ]
    return Stage(
        "Blocks and attention",
        [
            "sam_vit.py:Block.forward",
            "sam_vit.py:Attention.forward",
            "sam_vit.py:decomposed_rel_pos",
        ],
        "A block adds to each token what its attention and its MLP find. All modalities pass the same "
        "frozen layers.",
        [
            (
                f"the stream, after each of {len(inside.added)} blocks",
                f"({M}, {h}, {w}, {C})",
                "blocks",
            )
        ],
        plates if pictures else [note("The attention of this encoder is not SAM's.")],
    )


def tuner_stage(inside: Inside, code: list[str]) -> Stage:
    names, added = inside.names, inside.added
    rows = [[Box(*part) for part in row] for row in inside.drawings["block"]]
    trained = [box.name for row in rows for box in row if box.trained]
    plates = [
        plate(
            draw_boxes(rows, "A block of the encoder"),
            f"the parts of block 0 in the order in which they are called. Trained (orange): "
            f"{', '.join(trained) or 'none'}; the others are SAM's, frozen.",
            "a part of the tuner is missing, or one of SAM's is orange without the tuner declaring it.",
        )
    ]
    block, m = np.unravel_index(added.argmax(), added.shape)
    see = (
        f"how much the tuner adds, in parts of the norm of what the frozen block gives. Most in block "
        f"{block}, {names[m]}: {percent(added[block, m])}."
        if added.max() > SAME
        else "the tuner adds nothing: a block gives what the frozen one does."
    )
    if inside.tunes_sam:
        see += " It trains weights of SAM's too; those count as frozen here, as they are now."
    lines = {n: list(enumerate(added[:, m].tolist())) for m, n in enumerate(names)}
    plates.append(
        plate(
            line_chart("added / frozen", lines, 0, max(float(added.max()), 0.01), "block"),
            see,
            "a tuner that has been trained stays at 0 (it is not in the block), or adds many times the "
            "stream (it drowns what SAM knows).",
        )
    )
    return Stage(
        f"What the tuner adds: {inside.tuner}",
        code,
        "The tuner's parameters are the only ones in the encoder that are trained, unless it declares "
        "some of SAM's.",
        [("the same stream", f"({', '.join(map(str, inside.tokens.shape))})", "tuner")],
        plates,
    )


def mixing_stage(inside: Inside) -> Stage:
    mixes = bool(inside.mixing)
    stage = Stage(
        "How the modalities mix inside the encoder",
        ["tuners.py:mix_modalities"] if mixes else [],
        "What the tuner adds beside the MLP is, for each modality, w times its own update "
        "and 1 - w times the mean of the others'. Training starts at w = 0.5.",
        [],
    )
    if not mixes:
        one = len(inside.names) == 1
        why = "there is one modality" if one else "this tuner has no mixing weights"
        stage.words = f"Nothing is mixed: {why}."
        return stage
    lines = {}
    for layer, blocks in inside.mixing.items():
        for m, name in enumerate(inside.names):
            lines[f"{layer.split('.')[-1]} {name}".strip()] = [weights[m] for weights in blocks]
    farthest = max(
        (abs(w - 0.5), -i, name, w) for name, ws in lines.items() for i, w in enumerate(ws)
    )
    off, block, name, w = farthest
    reach = max(0.05, off)
    points = {line: list(enumerate(values)) for line, values in lines.items()}
    chart = line_chart("mixing weights", points, 0.5 - reach, 0.5 + reach, "block")
    rows = [[str(i), *(f"{v:.3f}" for v in vs)] for i, vs in enumerate(zip(*lines.values()))]
    drawn = f'<div class="charts">{chart}{table(["block", *lines], rows)}</div>'
    see = (
        f"the middle line is the start. Farthest from it: {name} in block {-block}, w = {w:.3f}. "
        "Above 0.5 a modality keeps more of its own; at 1 it hears nothing of the others."
    )
    if off <= SAME:
        see = "all weights are at the start, 0.5: each modality takes half of the others' update."
    stage.plates = [
        plate(
            drawn,
            see,
            "every weight of a trained run is exactly 0.5 (they were not "
            "trained). Below 0 or above 1 is allowed: they are not clamped.",
        )
    ]
    stage.shapes = [("mixing weights", f"{len(rows)} blocks x {len(lines)}", "")]
    return stage


def feature_stage(inside: Inside) -> Stage:
    names, size = inside.names, inside.logits.shape[1:]
    pairs = list(zip(names, inside.maps_before, inside.maps))
    colors = draw.shared_colors([x for _, before, after in pairs for x in (before, after)])
    captions = [f"{n}, {when} tuning" for n in names for when in ("before", "after")]
    pictures = {c: draw.enlarge(p, size)[1] for c, p in zip(captions, colors)}
    moved = [np.linalg.norm(b - a) / np.linalg.norm(a) for _, a, b in pairs]
    see = (
        "the map of each modality, by its three principal components: one colour is one kind of "
        "place, in all of these pictures. "
    )
    see += (
        f"Tuning moved the maps by {listed(names, map(percent, moved))} of their norm."
        if max(moved) > SAME
        else "The tuner changes nothing, so before and after are the same."
    )
    if len(names) > 1:
        was, now = (cosine(maps[0], maps[1]) for maps in (inside.maps_before, inside.maps))
        see += f" The {names[0]}'s and the {names[1]}'s map have a cosine of {was:.2f}, then {now:.2f}."
    return Stage(
        "The encoder's maps, before and after tuning",
        [],
        "The neck makes 256 channels of the stream. Before tuning: the same encoder without the tuner.",
        [("maps", shape(*inside.maps), "neck")],
        [
            plate(
                pictures,
                see,
                "a map has one colour all over (it tells no places apart), or a trained "
                "tuner's before and after are the same.",
            )
        ],
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
