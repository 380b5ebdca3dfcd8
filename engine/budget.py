"""What a run needs at the least, counted before it is allocated; what to do when it is more."""

from __future__ import annotations

import os

import torch

from engine.console import Mistake, is_out_of_memory, typed
from engine.device import peak_memory, resolve_precision, total_memory
from engine.networks import build_network
from engine.settings import Settings
from engine.training import TrainingStopped
from geodata.crops import crops_of_step
from mfnet import count_parameters
from sam_vit import first_line


def check_budget(s: Settings, num_classes: int, device: torch.device, world: int) -> None:
    """Raises Mistake for a run that this machine cannot hold, whatever its blocks keep.

    Counted are the weights, their gradients and the optimiser's state, and of a batch the rasters
    and the logits; the activations come on top."""
    processors = os.cpu_count() or 1
    if s.workers > 4 * max(processors, 4):
        raise Mistake(f"--workers {s.workers}: there are {processors} processors; give no more")
    have = total_memory(device)
    if have is None:
        return
    with torch.device("meta"):
        model = build_network(s, num_classes)
    counts = count_parameters(model)
    trained, frozen = counts["trainable"], counts["total"] - counts["trainable"]
    state = {"sgd": 1, "adamw": 2}[s.optimizer]
    stored = 2 if resolve_precision(s.precision, device) == "bf16" else 4
    weights = (stored * frozen + 4 * (2 + state) * trained) / 2**20
    # float32: three channels of each raster, and three times the logits, in the loss and backward
    numbers = 3 * len(s.rasters) + 3 * num_classes
    crops = crops_of_step(s.batch_size, s.drop_modality, world) / world
    batch = crops * s.crop**2 * 4 * numbers / 2**20
    if weights + batch > have:
        remedy = "a smaller --batch-size" if batch > weights else "fewer trained parameters"
        asked = f"{trained:,} trained parameters, --batch-size {s.batch_size} of --crop {s.crop}"
        sizes = f"more than {weights + batch:,.0f} MB are needed, and there are {have:,.0f}"
        raise Mistake(f"{asked}: {sizes}; give {remedy}")


def explain_failure(error: Exception, s: Settings, device: torch.device) -> TrainingStopped | None:
    """What stopped a run and how to go on, None for an error that nobody foresaw."""
    text, resume = first_line(error), typed("train.py", "--resume", "--out", s.out)
    if is_out_of_memory(error):
        ways = [] if s.checkpointing else [f"{resume} --gradient-checkpointing"]
        if s.batch_size > s.accumulate:
            larger = range(s.accumulate + 1, s.batch_size + 1)
            parts = next(n for n in larger if s.batch_size % n == 0)
            ways.append(f"{resume} --accumulate {parts}")
        ways.append(f"a run with a --batch-size below {s.batch_size}")
        ways += [] if s.precision == "bf16" else ["one with --precision bf16"]
        used = peak_memory(device)
        after = "" if used is None else f" after {used:,.0f} MB"
        return TrainingStopped(f"out of memory{after}; try {', or '.join(ways)}")
    if "DataLoader worker" in str(error):
        died = f"a process that cuts crops died ({text}), perhaps for want of memory"
        return TrainingStopped(f"{died}; go on with {resume} --workers 0")
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return TrainingStopped(f"--compile failed ({text}); train without it")
    return None
