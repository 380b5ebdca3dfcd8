"""What a run takes before it is trained: hours and memory, from a step of one image and of several.

Time and memory are taken to be linear in the images of a batch. On a CPU two images tell it; a GPU
takes one and two in the same time, and so a whole batch is tried where it fits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.console import Parser, say_next
from engine.cost import encoder_products, machine, operations
from engine.device import pick_device
from engine.recipes import recipe
from engine.settings import Settings, command_line
from engine.speed import Case, peak_of
from geodata.crops import crops_of_step, sliding_windows
from mfnet import build_mfnet
from sam_vit import SIZES
from tuners import TUNERS

# How many, and about H, W.
TEST_TILES = {"vaihingen": (4, 2500, 1900), "potsdam": (6, 6000, 6000), "hunan": (50, 256, 256)}
UNPADDED = (224, 448, 672, 896)  # pixels: whole windows of 14 tokens


@dataclass(frozen=True)
class Needs:
    """What a run was measured to take: seconds of a step and of a window, megabytes."""

    step: float
    window: float
    memory_one: float
    memory_more: float  # of each further image

    def memory(self, images: float) -> float:
        return self.memory_one + (images - 1) * self.memory_more


def measure_needs(s: Settings, device: torch.device) -> Needs:
    """A step of one image and of several of the run `s`, and windows, each in a process of its own.
    Raises RuntimeError where one fails."""
    crops = crops_of_step(s.batch_size, s.drop_modality)
    if device.type == "cpu" or crops < 3:
        return needs_by(2, crops, s, device)
    try:
        return needs_by(crops, crops, s, device)
    except RuntimeError:  # most often for want of memory
        return needs_by(2, crops, s, device)


def needs_by(several: int, crops: int, s: Settings, device: torch.device) -> Needs:
    """The needs of a run with `crops` images a step, from steps of one and of `several`."""
    precision = "bf16" if s.precision == "bf16" else "fp32"
    order = "checkpointed" if s.checkpointing else "fast"
    one, many = (
        Case("step", s.encoder, s.tuner, s.crop, batch, precision, order) for batch in (1, several)
    )
    memory_one, step_one = peak_of(one, device, s=s)
    memory, step_many, window = peak_of(many, device, replace(many, task="network"), s=s)
    step = step_one + (crops - 1) * (step_many - step_one) / (several - 1)
    more = (memory - memory_one) / (several - 1)
    return Needs(max(step, step_one), window / several, memory_one, more)


def measure_image(s: Settings, device: torch.device) -> dict:
    """Seconds and most megabytes of a forward pass of one image of 256 x 256, {} where it fails."""
    precision = "bf16" if s.precision == "bf16" else "fp32"
    try:
        case = Case("network", s.encoder, s.tuner, 256, 1, precision, "fast")
        megabytes, seconds = peak_of(case, device, s=s)
    except RuntimeError:
        return {}
    return dict(image_seconds=seconds, image_mb=megabytes)


def in_words(s: Settings, dataset: Any, device: torch.device) -> str:
    """What the run `s` takes on a `data.Dataset`."""
    try:
        needs = measure_needs(s, device)
    except RuntimeError as error:
        return f"a step could not be tried ({error})"
    sizes = [tile.size for tile in dataset.tiles("test", s.rasters)]
    training, scoring = needs.step * s.steps * s.epochs, needs.window * count_windows(sizes, s)
    used = needs.memory(crops_of_step(s.batch_size, s.drop_modality)) / 1000
    return f"about {training:.0f} s of training, {scoring:.0f} s of scoring, {used:.1f} GB"


def count_windows(sizes: list[tuple[int, int]], s: Settings, crop: int | None = None) -> int:
    """The windows that tiles of (H, W) are scored with."""
    return sum(len(sliding_windows(H, W, crop or s.crop, s.eval_stride)) for H, W in sizes)


def plan(s: Settings, device: torch.device) -> str:
    """A Markdown table of what the run `s` takes. Crops beside the recipe's are scaled by the
    encoder's operations (time) and by their pixels (memory). The score is that of the last epoch,
    the recipe's."""
    tiles, H, W = TEST_TILES[s.data]
    needs = measure_needs(s, device)
    with torch.device("meta"):
        model = build_mfnet(s.encoder, s.tuner)
    cost = {crop: operations(encoder_products(model, 1, crop)) for crop in (s.crop, *UNPADDED)}
    lines = [
        f"{s.data}: {s.encoder}, {s.tuner}, {s.precision}, {s.epochs} x {s.steps} steps of "
        f"{s.batch_size}; {machine(device)}\n",
        "| crop | operations | a step | training | windows | scoring | memory |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for crop, needed in cost.items():
        times = needed / cost[s.crop]
        step = times * needs.step
        windows = count_windows([(H, W)] * tiles, s, crop)
        memory = needs.memory(s.batch_size * (crop / s.crop) ** 2)
        training, scoring = step * s.steps * s.epochs / 3600, windows * needs.window * times / 3600
        lines.append(
            f"| {crop} | x {times:.2f} | {step:.3g} s | {training:,.1f} h | {windows:,} "
            f"| {scoring:,.2f} h | {memory / 1000:,.1f} GB |"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------- the command line


def add_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("dataset", choices=list(TEST_TILES), help="whose recipe")
    add("--encoder", choices=list(SIZES), help="by default the recipe's")
    add("--tuner", choices=list(TUNERS), default="adapter")
    add("--precision", choices=("fp32", "bf16"), help="by default the recipe's")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def print_plan(args: argparse.Namespace) -> None:
    given = dict(encoder=args.encoder, precision=args.precision)
    given = {name: value for name, value in given.items() if value}
    chosen = recipe(args.dataset, args.encoder) | dict(data=args.dataset, tuner=args.tuner)
    s = Settings(**{**chosen, **given})
    s.complete()
    print(plan(s, pick_device(args.device)))
    given = {**given, "tuner": args.tuner} if args.tuner != "adapter" else given
    say_next(command_line("train.py", {"data": args.dataset, "root": "DIR", **given}))
