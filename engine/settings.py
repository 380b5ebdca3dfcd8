"""Every setting of a run: a dataclass, the command line made from it, and the recipes of the data
sets.

The same values are printed, written to `config.json` and kept in the checkpoints. The defaults are
the paper's recipe (PAPER.md 2); `RECIPES` adapts them to a data set; what is given by hand comes
last."""

from __future__ import annotations

import argparse
import math
import secrets
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

from engine.console import Parser
from geodata.layouts import DATASETS, LABELS, MODALITIES
from geodata.rasters import DataError
from mfnet import MIN_SIZE
from sam_vit import SIZES
from tuners import TUNERS


def option(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    data: str = option("synthetic", "data set", tuple(sorted(DATASETS)))
    root: str = option("", "folder of the data set; by default data/NAME")
    out: str = option("", "folder of the run; by default runs/TIME_DATA_TUNER")
    # the network
    encoder: str = option(
        "vit_l", "size of SAM's encoder; vit_t is made up, for laptops", tuple(SIZES)
    )
    weights: str = option(
        "auto", "SAM's weights: auto (the official file), none (random), or a path"
    )
    relative_positions: str = option(
        "sam", "SAM's tables, or zero as the published code has them", ("sam", "zero")
    )
    tuner: str = option("adapter", "how the encoder is tuned", tuple(TUNERS))
    mixing: bool = option(True, "let the modalities exchange information inside the tuner")
    rank: int = option(4, "rank of the LoRA updates")
    modalities: str = option("image+dsm", "rasters that the network sees", tuple(MODALITIES))
    fusion: str = option(
        "dfm", "how the modalities' maps are merged; sum is the ablation", ("dfm", "sum")
    )
    # the data
    bands: str = option(
        "", "bands of the image: rgb, irrg (potsdam), or three counted from 1, as in 4,3,2"
    )
    labels: str = option(
        "dataset", "how labels are decoded: with their defects repaired, or as published", LABELS
    )
    splits: str = option(
        "paper", "the paper's training and test tiles, or the official ones", ("paper", "official")
    )
    full_labels: bool = option(False, "score with the full labels where there are eroded ones")
    heights: str = option(
        "minmax", "scaling of heights: minmax, percentiles, ground, or metres LOW:HIGH"
    )
    heights_kind: str = option(
        "", "kind of heights where a data set has several (potsdam: normalised, absolute)"
    )
    image_scaling: str = option(
        "unit", "scaling of images: unit, sam, reflectance, minmax, or LOW:HIGH"
    )
    memory_gb: float = option(
        4.5, "memory for training tiles; what does not fit is read crop by crop from its files"
    )
    # the training
    crop: int = option(256, "pixels of a training crop, and of a window when scoring")
    crop_range: str = option(
        "full",
        "where crops may lie: published leaves out the last row and column",
        ("full", "published"),
    )
    batch_size: int = option(10, "crops in a step, over all processes")
    epochs: int = option(50, "number of epochs")
    steps: int = option(1000, "optimiser steps in an epoch")
    accumulate: int = option(1, "parts that a step's batch is computed in, to save memory")
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adamw", ("sgd", "adamw"))
    lr: float = option(0.01, "learning rate at its highest")
    weight_decay: float = option(5e-4, "weight decay")
    schedule: str = option(
        "multistep",
        "a tenth after epochs 25, 35, 45; or smooth",
        ("multistep", "cosine", "onecycle"),
    )
    early_drops: bool = option(
        False, "multistep drops at the start of epochs 25, 35, 45, as published"
    )
    warmup: int = option(0, "steps over which the learning rate rises first")
    clip: float = option(0.0, "largest norm of the gradient; 0: as it is")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes")
    class_weights: str = option(
        "", "weight of each class in the loss, as 1,1,1,1,2,1; by default all 1"
    )
    # the choice of the model, and the score
    val: str = option(
        "",
        "training tiles held out for choosing the best epoch: how many, or names as 7,32 (one alone: 7,)",
    )
    select: str = option(
        "last",
        "which epoch is kept: last, best on --val, best on the test tiles (as published)",
        ("last", "val", "test"),
    )
    eval_every: int = option(
        0, "epochs between scores during training; 0: every one where --select needs it, else none"
    )
    eval_stride: int = option(32, "pixels between windows when scoring")
    repeat_border: bool = option(
        False, "count windows at the border as often as the published loop visits them"
    )
    # the machine
    precision: str = option(
        "auto",
        "fp32, bf16 (frozen weights stored so), or auto: bf16 where a GPU has it",
        ("auto", "fp32", "bf16"),
    )
    checkpointing: bool = option(
        False, "compute each block's activations again going backward: less memory, more time"
    )
    compile: bool = option(False, "torch.compile each block of the encoder")
    deterministic: bool = option(False, "bit-identical runs on a GPU, slower")
    seed: int = option(0, "seed of every random choice; -1 draws one")
    save_every: int = option(
        0, "steps between saves of last.pt, besides those at the end of an epoch"
    )
    workers: int = option(-1, "processes that cut crops; by default 0 on the CPU, 4 beside a GPU")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


RECIPES: dict[str, dict] = {
    "vaihingen": dict(precision="fp32"),  # the paper's: Settings as it stands
    "potsdam": dict(precision="fp32"),
    "hunan": dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance"),
    "mmhunan": dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance"),
    "tiles": dict(
        batch_size=4, epochs=8, steps=20, optimizer="adamw", lr=1e-3, weight_decay=0.01,
        schedule="cosine", warmup=20, eval_stride=128,
    ),
    "synthetic": dict(
        encoder="vit_t", weights="none", crop=128, batch_size=8, epochs=10, steps=30, optimizer="adamw", lr=2e-3,
        weight_decay=0.01, schedule="cosine", warmup=20, eval_stride=64,
    ),
}  # fmt: skip


# What the published code does otherwise than its paper (PAPER.md 3); `--as-published` sets them
# all.
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
    name: dict(image_scaling="minmax") for name in ("hunan", "mmhunan")
}


# Pixels between the published code's windows, while it trains and for its final scores (PAPER.md
# 2).
PUBLISHED_STRIDES = {
    "vaihingen": (32, 32),
    "potsdam": (128, 32),
    "hunan": (256, 128),
    "mmhunan": (256, 128),
}


# What may differ between a run and its continuation: the data and the base are checked by what they
# hold.
FREE_ON_RESUME = ("out", "root", "weights", "workers", "device", "save_every", "memory_gb")


def parse_settings(
    argv: list[str] | None = None, description: str = ""
) -> tuple[Settings, dict, argparse.Namespace]:
    """The command line -> (settings, those given by hand, the switches --resume, --seeds,
    --as-published).
    """
    hints = get_type_hints(Settings)
    parser = Parser(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in fields(Settings):
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{f.default}]"
        if hints[f.name] is bool:
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            kind, choices = hints[f.name], f.metadata["choices"]
            parser.add_argument(
                flag, type=kind, choices=choices, default=argparse.SUPPRESS, help=text
            )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, by default the newest"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="train once with each seed; mean and deviation of the scores",
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="depart from the paper where the published code does",
    )
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    data = given.get("data", "synthetic")
    published = {**AS_PUBLISHED, **AS_PUBLISHED_WITH.get(data, {})} if args.as_published else {}
    settings = Settings(**{**RECIPES[data], **published, **given})
    settings.root = settings.root or str(Path("data") / data)
    if settings.val and settings.select == "last" and "select" not in given:
        settings.select = "val"
    if settings.seed == -1 and not args.resume:
        settings.seed = secrets.randbelow(2**31)
    check_settings(settings)
    return settings, given, args


def check_settings(s: Settings) -> None:
    """Raises DataError for a setting that cannot work."""
    for name in ("batch_size", "epochs", "steps", "rank", "accumulate"):
        if getattr(s, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(s, name)}: at least 1 is needed")
    for name in ("warmup", "clip", "eval_every", "save_every", "weight_decay"):
        if not getattr(s, name) >= 0:
            raise DataError(f"--{name.replace('_', '-')} {getattr(s, name)}: 0 or more is needed")
    if s.batch_size % s.accumulate:
        raise DataError(f"--accumulate {s.accumulate} does not divide the batch of {s.batch_size}")
    if s.crop < MIN_SIZE:
        raise DataError(
            f"--crop {s.crop} is too small for the network; give {MIN_SIZE} pixels or more"
        )
    if not 1 <= s.eval_stride <= s.crop:
        raise DataError(f"--eval-stride {s.eval_stride}: give 1 to the crop's {s.crop} pixels")
    if not s.lr > 0 or not math.isfinite(s.lr):
        raise DataError(f"--lr {s.lr}: a positive number is needed")
    if not 0 <= s.label_smoothing < 1:
        raise DataError(f"--label-smoothing {s.label_smoothing}: 0 to less than 1 is needed")
    if s.select == "val" and not s.val:
        raise DataError("--select val needs --val: the tiles to hold out")
    if s.seed < -1:
        raise DataError(f"--seed {s.seed}: 0 or more is needed, or -1 to draw one")


def held_out_tiles(val: str) -> int | tuple[str, ...]:
    """--val: a number of tiles, or their names with commas."""
    return (
        int(val)
        if val.isdigit()
        else tuple(name.strip() for name in val.split(",") if name.strip())
    )


def class_weights(s: Settings, num_classes: int) -> list[float] | None:
    """The weights of the classes in the loss, None for equal ones. Raises DataError."""
    if not s.class_weights:
        return None
    try:
        weights = [float(w) for w in s.class_weights.split(",")]
    except ValueError:
        weights = []
    if (
        len(weights) != num_classes
        or min(weights) < 0
        or not math.isfinite(sum(weights))
        or sum(weights) == 0
    ):
        raise DataError(
            f"--class-weights {s.class_weights}: {num_classes} numbers of 0 or more are needed, as 1,1,2"
        )
    return weights


def resumed_settings(stored: dict, given: dict, folder: Path) -> Settings:
    """The settings of the run in `folder`, as its last.pt holds them. Raises DataError for a flag
    that contradicts.
    """
    for name, value in given.items():
        if name not in FREE_ON_RESUME and stored[name] != value:
            flag = "--" + name.replace("_", "-")
            raise DataError(
                f"{flag} {value} contradicts the run in {folder}, which has {stored[name]}; leave it out"
            )
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    return Settings(**{**stored, **free, "out": str(folder)})


def learning_rate(step: int, s: Settings) -> float:
    """The learning rate of a step (0-based, over the whole run): a function of its arguments alone."""
    total = s.epochs * s.steps
    warmup = min(s.warmup, total // 2)
    if step < warmup:
        return s.lr * (step + 1) / (warmup + 1)
    if s.schedule == "multistep":
        # differs: the published code drops one epoch early, at the start of epochs 25, 35, 45 of 1
        # to 50
        drops = [m - 1 if s.early_drops else m for m in (25, 35, 45)]
        return s.lr * 0.1 ** sum(step // s.steps >= m for m in drops)
    if s.schedule == "cosine":
        return s.lr * half_cosine((step - warmup) / (total - warmup))
    peak = warmup + int(
        0.3 * (total - warmup)
    )  # onecycle: up over 30 % of the run, down to nothing over the rest
    if step < peak:
        return s.lr * (1 - 0.96 * half_cosine((step - warmup) / (peak - warmup)))
    return s.lr * half_cosine((step - peak) / (total - peak))


def half_cosine(x: float) -> float:
    """1 at 0, falling smoothly to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * x))
