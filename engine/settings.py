"""Every setting of a run, and what makes a setting valid.

The same values are kept in `config.json` and in the checkpoints, and read back by
`Settings.from_dict`. The defaults are the paper's recipe; `recipes.py` adapts them to a data set,
`commandline.py` makes the flags from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Callable, get_type_hints

from engine.console import Mistake, typed, unknown
from geodata.kinds import ordered
from geodata.layouts import LABELS, LAYOUTS
from geodata.scaling import Scaling
from mfnet import MIN_SIZE
from sam_vit import SIZES
from tuners import TUNERS, tuner_options


def option(group: str, default, help: str, choices: tuple | Callable[[], tuple] = ()):
    """A field of `Settings`; `choices` that a plugin may add to are a function."""
    text = {"group": group, "help": help, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=text)
    return field(default=default, metadata=text)


GROUPS = ("network", "data", "training", "score", "machine")
of_network, of_data, of_training, of_score, of_machine = (partial(option, g) for g in GROUPS)

ALIASES = {"mmhunan": "hunan"}  # names that earlier versions had beside today's
# What config.json holds besides the settings.
BESIDE_SETTINGS = ("base", "classes", "version", "processes", "parameters", "facts", "lengthened")
BESIDE_SETTINGS += ("command", "date")

# Flags that are not called as what a run's folder has. The old name is still taken.
FLAGS = {"eval_stride": "--stride", "checkpointing": "--gradient-checkpointing"}


def data_sets() -> tuple[str, ...]:
    return (*sorted(LAYOUTS.keys() - ALIASES.keys()), "tiles")


@dataclass
class Settings:
    data: str = of_data("synthetic", "data set", data_sets)
    root: str = of_data("", "folder of the data set; by default data/NAME")
    bands: str = of_data("", "bands: rgb, irrg, rgbir (potsdam), or numbers from 1 on, as 4,3,2")
    labels: str = of_data("dataset", "labels with their defects repaired, or as published", LABELS)
    splits: str = of_data("paper", "which training and test tiles", ("paper", "official"))
    full_labels: bool = of_data(False, "score with the full labels where there are eroded ones")
    heights: str = of_data("minmax", "heights: minmax, percentiles, ground, or metres LOW:HIGH")
    heights_kind: str = of_data("", "kind of heights, of several (potsdam: normalised, absolute)")
    kinds: dict = of_data({}, "")  # the other rasters' `Kind`s; no flag: the data set fills it in
    image_scaling: str = of_data("unit", "images: unit, sam, reflectance, minmax, or LOW:HIGH")
    share: float = of_data(1.0, "share of the training tiles, above 0 to 1; --seed draws which")
    memory_gb: float = of_data(4.5, "memory for training tiles; the others are read crop by crop")

    encoder: str = of_network("vit_l", "SAM's size; vit_t is made up, tiny", lambda: tuple(SIZES))
    weights: str = of_network(
        "auto", "auto (official; vit_t: this project's), none (random), a path"
    )
    relative_positions: str = of_network("sam", "SAM's, or zero as published", ("sam", "zero"))
    tuner: str = of_network("adapter", "how the encoder is tuned", lambda: tuple(TUNERS))
    tuner_option: dict = of_network({}, "an option of the tuner; may be repeated")
    modalities: str = of_network(
        "image+dsm", "rasters of the network: image, dsm and others that the data set has, with +"
    )
    fusion: str = of_network("dfm", "how the maps are merged; sum is the ablation", ("dfm", "sum"))
    plugin: dict = of_network({}, "a file with a tuner, data set or encoder; may be repeated")

    crop: int = of_training(256, "pixels of a training crop, and of a window when scoring")
    crop_range: str = of_training(
        "full", "places of crops; published: but the last row and column", ("full", "published")
    )
    augment: str = of_training(
        "flips",
        "how crops are varied; the paper says rotations too, its code has flips",
        ("flips", "flips+rotations"),
    )
    drop_modality: float = of_training(
        0.0, "share of crops trained on again with rasters missing, so that they may be later"
    )
    drop_only: str = of_training("", "the rasters that --drop-modality takes, with +; else any")
    batch_size: int = of_training(10, "crops in a step, over all processes")
    epochs: int = of_training(50, "number of epochs")
    steps: int = of_training(1000, "optimiser steps in an epoch")
    optimizer: str = of_training("sgd", "each has a rate and a decay of its own", ("sgd", "adamw"))
    lr: float = of_training(0.01, "learning rate at its highest")
    weight_decay: float = of_training(5e-4, "weight decay")
    schedule: str = of_training(
        "multistep",
        "a tenth after 50, 70 and 90 % of the run (epochs 25, 35, 45 of 50); or smooth",
        ("multistep", "cosine"),
    )
    early_drops: bool = of_training(False, "multistep drops an epoch (of 50) earlier, as published")
    warmup: int = of_training(0, "steps over which the learning rate rises first")
    clip: float = of_training(0.0, "largest norm of the gradient; 0: as it is")
    label_smoothing: float = of_training(0.0, "part of the target that is spread over all classes")
    class_weights: str = of_training(
        "", "of each class in the loss, as 1,1,2, or balanced: more for rare ones; by default all 1"
    )
    balance_crops: bool = of_training(False, "every other crop holds a class drawn with equal odds")
    seed: int = of_training(0, "seed of every random choice; -1 draws one")

    val: str = of_score(
        "", "training tiles held out: how many, names as 7,32 (one alone: 7,), or val: a folder"
    )
    select: str = of_score(
        "last",
        "epoch that is kept: last, best on --val, best on the test tiles (as published)",
        ("last", "val", "test"),
    )
    eval_every: int = of_score(0, "epochs between scores in training; 0: 1 if --select needs it")
    eval_stride: int = of_score(32, "pixels between windows when scoring")
    select_stride: int = of_score(0, "the same while training; 0: as --stride")
    repeat_border: bool = of_score(False, "count border windows as often as the published loop")

    out: str = of_machine("", "folder of the run; by default runs/TIME_DATA_TUNER")
    precision: str = of_machine(
        "auto",
        "fp32, bf16 (frozen weights stored so), or auto: bf16 where a GPU has it",
        ("auto", "fp32", "bf16"),
    )
    accumulate: int = of_machine(1, "parts of a batch in the encoder: less memory, same gradients")
    checkpointing: bool = of_machine(False, "blocks compute activations again: less memory")
    compile: bool = of_machine(False, "torch.compile each block of the encoder, on a GPU")
    deterministic: bool = of_machine(False, "bit-identical runs on a GPU, slower")
    save_every: int = of_machine(0, "steps between saves of last.pt, besides those after an epoch")
    workers: int = of_machine(-1, "processes that cut crops; -1: 0 on the CPU, 4 with a GPU")
    device: str = of_machine("auto", "auto, cpu, cuda, cuda:1, mps")

    @property
    def rasters(self) -> tuple[str, ...]:
        """The names of the rasters, in the order in which the network takes them."""
        return tuple(self.modalities.split("+"))

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The rasters that may be missing."""
        if not self.drop_modality:
            return ()
        return tuple(self.drop_only.split("+")) if self.drop_only else self.rasters

    @classmethod
    def from_dict(cls, stored: dict, where: str) -> Settings:
        """What `config.json`, `model.pt` or `last.pt` hold, of this version or an earlier one.
        Raises Mistake in one line that begins with `where` for what cannot be a run's settings."""
        if not isinstance(stored, dict):
            raise Mistake(f"{where}: its settings are no list of names and values")
        stored = upgrade({k: v for k, v in stored.items() if k not in BESIDE_SETTINGS})
        hints = get_type_hints(cls)
        if newer := ", ".join(sorted(str(name) for name in stored if name not in hints)):
            raise Mistake(f"{where}: settings of a newer version ({newer}); use that version")
        for name, value in stored.items():
            if hints[name] is float and type(value) is int:
                stored[name] = float(value)
            elif type(value) is not hints[name]:
                kind = hints[name].__name__
                raise Mistake(f"{where}: the setting {name} is {value!r}, not of {kind}")
        settings = cls(**stored)
        try:
            settings.complete()
        except Mistake as error:
            raise Mistake(f"{where}: {error}; use the version that wrote it") from None
        return settings

    def complete(self) -> None:
        """Fills in the tuner's options, and raises Mistake for a setting that cannot work."""
        for f in fields(self):
            choices, value = choices_of(f), getattr(self, f.name)
            if choices and value not in choices:
                raise Mistake(f"{flag(f.name)} {unknown(value, choices)}")
        self.tuner_option = complete_options(self.tuner, self.tuner_option)
        check_ranges(self)
        try:
            self.modalities = ordered(self.modalities)
            if self.drop_only:
                self.drop_only = ordered(self.drop_only, "--drop-only")
            Scaling(self.heights, self.image_scaling)
        except ValueError as error:
            raise Mistake(str(error)) from error


def flag(name: str) -> str:
    return FLAGS.get(name) or "--" + name.replace("_", "-")


def words_of(given: dict) -> list[str]:
    """Settings by name as the words of a command line. A value may begin with a minus sign, and
    so stands behind an =."""
    words = []
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(flag(name) if value else flag("no_" + name))
        elif isinstance(value, dict):
            words += [f"{flag(name)}={option}={v}" for option, v in value.items()]
        elif isinstance(value, list):
            words += [f"{flag(name)}={v}" for v in value]
        else:
            words.append(f"{flag(name)}={value}")
    return words


def command_line(script: str, given: dict) -> str:
    """The command that gives settings, by name, to a script; a plugin by its file."""
    return typed(script, *words_of(given))


def choices_of(f) -> tuple[str, ...]:
    choices = f.metadata["choices"]
    return choices() if callable(choices) else choices


def upgrade(stored: dict) -> dict:
    """Settings of an earlier version in the names of this one."""
    old = {name: stored.pop(name) for name in ("rank", "mixing") if name in stored}
    if old and "tuner_option" not in stored and stored.get("tuner") in TUNERS:
        known = tuner_options(stored["tuner"])
        stored["tuner_option"] = {name: value for name, value in old.items() if name in known}
    if stored.get("data") in ALIASES:
        stored["data"] = ALIASES[stored["data"]]
    return stored


def complete_options(tuner: str, given: dict) -> dict:
    """The options of a tuner: its defaults, and what is given instead. Raises Mistake."""
    defaults = tuner_options(tuner)
    for name, value in given.items():
        if name not in defaults:
            there = ", ".join(f"{n}={v}" for n, v in defaults.items()) or "none"
            raise Mistake(f"--tuner-option {name}: {tuner} has no such option; there are: {there}")
        if type(value) is not type(defaults[name]):
            kind = type(defaults[name]).__name__
            raise Mistake(f"--tuner-option {name}={value}: a value of {kind} is needed")
    return {**defaults, **given}


def check_ranges(s: Settings) -> None:
    """Raises Mistake for a number that cannot work."""

    def need(fits: bool, name: str, what: str) -> None:
        if not fits:
            raise Mistake(f"{flag(name)} {getattr(s, name)}: {what}")

    for name in ("batch_size", "epochs", "steps", "accumulate"):
        need(getattr(s, name) >= 1, name, "at least 1 is needed")
    for name in ("warmup", "clip", "eval_every", "save_every", "weight_decay", "memory_gb"):
        need(0 <= getattr(s, name) < math.inf, name, "0 or more is needed")
    parts = s.batch_size % s.accumulate == 0
    need(parts, "accumulate", f"does not divide --batch-size {s.batch_size}")
    need(s.crop >= MIN_SIZE, "crop", f"too small for the network; give {MIN_SIZE} pixels or more")
    need(1 <= s.eval_stride <= s.crop, "eval_stride", f"give 1 to the crop's {s.crop} pixels")
    need(0 <= s.select_stride <= s.crop, "select_stride", f"give 0 to the crop's {s.crop} pixels")
    need(0 < s.lr < math.inf, "lr", "a positive number is needed")
    need(0 < s.share <= 1, "share", "more than 0 to 1 is needed")
    need(0 <= s.drop_modality <= 1, "drop_modality", "0 to 1 is needed")
    alone = s.drop_modality and "+" not in s.modalities
    need(not alone, "drop_modality", f"of {s.modalities} alone nothing can be missing")
    need(s.drop_modality or not s.drop_only, "drop_only", "needs --drop-modality")
    fits = {*s.may_lack} <= {*s.rasters}
    need(fits, "drop_only", f"there are {', '.join(s.rasters)}")
    need(0 <= s.label_smoothing < 1, "label_smoothing", "0 to less than 1 is needed")
    need(s.select != "val" or bool(s.val), "select", "needs --val: the tiles to hold out")
    need(-1 <= s.seed < 2**32, "seed", "0 to 4294967295 is needed, or -1 to draw one")
    need(s.workers >= -1, "workers", "0 or more is needed, or -1 for the default")


def held_out_tiles(val: str) -> int | tuple[str, ...]:
    """--val: a number of tiles, or their names with commas."""
    names = tuple(name.strip() for name in val.split(",") if name.strip())
    return int(val) if val.isdigit() else names
