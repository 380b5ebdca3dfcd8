"""What a data set is trained with where nobody says otherwise: the paper's recipe and its variants.

`recipe` gives the settings of a data set that differ from `Settings`' own, which are the paper's;
with `as_published`, also what the published code does otherwise than its paper.
"""

from __future__ import annotations

from dataclasses import fields, replace

from engine.settings import Settings, command_line
from geodata.layouts import LAYOUTS
from tuners import tuner_options

# The rate and the decay of an optimiser where neither recipe nor command line names them. AdamW's
# was measured with the benchmarks' schedule on a synthetic Vaihingen of 160 px tiles (vit_t, 200
# steps of 4 crops of 64, one seed): mIoU 36.1, 53.1, 50.0, 48.3, 45.1 at 1e-2, 3e-3, 1e-3, 3e-4,
# 1e-4, and 43.8 with SGD at 1e-2. Of the two best the smaller is taken.
OPTIMIZERS: dict[str, dict] = {
    "sgd": dict(lr=0.01, weight_decay=5e-4),  # the paper's
    "adamw": dict(lr=1e-3, weight_decay=0.01),
}

RECIPES: dict[str, dict] = {
    "vaihingen": dict(precision="fp32"),  # the paper's: Settings as it stands
    "potsdam": dict(precision="fp32"),
    # differs: the paper says 1000 steps an epoch, its code takes 500 on MMHunan
    "hunan": dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance"),
    "tiles": dict(
        batch_size=4, epochs=8, steps=20, optimizer="adamw", schedule="cosine", warmup=20,
        eval_stride=128,
    ),
    "synthetic": dict(
        encoder="vit_t", crop=128, batch_size=8, epochs=10, steps=30,
        optimizer="adamw", lr=2e-3, schedule="cosine", warmup=20, eval_stride=64,
    ),
}  # fmt: skip

# Pixels between the published code's windows, while it trains and for its final scores.
PUBLISHED_STRIDES = {"vaihingen": (32, 32), "potsdam": (128, 32), "hunan": (256, 128)}

# What the published code does otherwise than its paper; `--as-published` sets all of it.
AS_PUBLISHED: dict[str, object] = {
    "relative_positions": "zero",
    "labels": "published",
    "select": "test",
    "seed": -1,
    "repeat_border": True,
    "crop_range": "published",
    "early_drops": True,
}

AS_PUBLISHED_WITH: dict[str, dict[str, object]] = {
    "potsdam": dict(select_stride=128),
    "hunan": dict(select_stride=256, image_scaling="minmax8", heights="minmax8"),
}


def recipe(data: str, encoder: str | None = None, as_published: bool = False) -> dict:
    """The settings of a data set that differ from the defaults; with what the published code does.

    A data set without a recipe, as a plugin's, has the paper's."""
    found = dict(RECIPES.get(data, {}))
    if data in PUBLISHED_STRIDES and encoder == "vit_h":
        found["batch_size"] = 4  # the paper's, for its largest encoder
    if as_published:
        found |= AS_PUBLISHED | AS_PUBLISHED_WITH.get(data, {})
    return found


def with_optimizer(given: dict, chosen: dict) -> dict:
    """A recipe with the rate and decay of the optimiser, where another than its own was given."""
    optimizer = given.get("optimizer", chosen.get("optimizer", "sgd"))
    if optimizer != chosen.get("optimizer", "sgd"):
        chosen = {k: v for k, v in chosen.items() if k not in ("lr", "weight_decay")}
    return {**OPTIMIZERS[optimizer], **chosen}


def published_protocol(s: Settings) -> Settings:
    """A run's settings with the windows that the published code scores with.

    A data set that was not published keeps the run's stride."""
    _, stride = PUBLISHED_STRIDES.get(s.data, (0, s.eval_stride))
    return replace(s, repeat_border=True, eval_stride=stride)


# Settings that tell where things lie, or that a data set fills in.
NO_CHANGES = ("data", "root", "out", "plugin", "kinds")


def changes(s: Settings) -> dict:
    """What a run's settings change of the recipe of its data set, by name; data and files apart."""
    theirs = with_optimizer({}, recipe(s.data, s.encoder)) | {"data": s.data}
    kinds = list(LAYOUTS[s.data].dsm) if s.data in LAYOUTS else []
    if s.heights_kind in kinds[:1]:  # what a run fills in
        theirs["heights_kind"] = s.heights_kind
    theirs, options, found = Settings(**theirs), tuner_options(s.tuner), {}
    if theirs.precision == "auto" and s.precision == "fp32":  # as a run fills in without a GPU
        theirs.precision = "fp32"
    for f in fields(s):
        ours = getattr(s, f.name)
        if f.name == "tuner_option":
            ours = {name: v for name, v in ours.items() if v != options[name]}
            found |= {f.name: ours} if ours else {}
        elif f.name not in NO_CHANGES and ours != getattr(theirs, f.name):
            found[f.name] = ours
    return found


def different_from_recipe(s: Settings) -> str:
    """The same, in words."""
    changed = changes(s)
    changed |= changed.pop("tuner_option", {})
    listed = ", ".join(f"{name} {value}" for name, value in changed.items())
    return f"the recipe with {listed}" if listed else "the recipe as it stands"


def command_of(s: Settings) -> str:
    """The command that trains this very run, for a reader of its page."""
    plugins = [f"{s.out}/plugins/{name}" for name in s.plugin]
    files = dict(data=s.data, root=s.root, out=s.out) | ({"plugin": plugins} if plugins else {})
    theirs = recipe(s.data, s.encoder).get("precision", Settings.precision)
    precision = {"precision": s.precision} if theirs == "auto" else {}
    return command_line("train.py", files | precision | changes(s))
