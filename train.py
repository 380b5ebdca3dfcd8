"""Trains MFNet, scores the test tiles, and writes pictures.

    python train.py                                              a synthetic city, on any laptop
    python train.py --data vaihingen --root DIR                  the paper's recipe: ViT-L, MMAdapter, 50 x 1000 x 10
    python train.py --data vaihingen --root DIR --tuner lora
    python train.py --data tiles --root DIR                      own tiles
    python train.py --resume --out runs/NAME                     go on with an interrupted run

A run's folder holds config.json, log.jsonl (a line per epoch), last.pt (everything to go on), and at the end model.pt
(what was trained), scores.json and pictures/. Every random choice is a function of --seed: the same command on the same
machine gives the same weights, and a resumed run those of one that was never stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from checkpoints import (
    build_model,
    load_trained_state,
    newest_run,
    pick_device,
    read_content,
    replace_atomically,
    save_model,
    trained_state,
)
from console import Parser, Ticker, clock, run_script
from data import DATASETS, IGNORE, LABELS, MODALITIES, CropDataset, CropOrder, DataError, LoadedTile
from data import load_tiles, memory_line, open_from_settings
from evaluate import format_scores, score_run
from mfnet import MIN_SIZE, MFNet, count_parameters, trained_names
from predict import autocast
from sam_vit import SIZES
from tuners import TUNERS


def option(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Every setting of a run. The defaults are the paper's recipe (PAPER.md 2); `RECIPES` adapts them to a data set."""

    data: str = option("synthetic", "data set", tuple(sorted(DATASETS)))
    root: str = option("", "folder of the data set; by default data/NAME")
    out: str = option("", "folder of the run; by default runs/TIME_DATA_TUNER")
    encoder: str = option("vit_l", "size of SAM's encoder; vit_t is made up, for laptops", tuple(SIZES))
    weights: str = option("auto", "SAM's weights: auto (the official file), none (random), or a path")
    relative_positions: str = option("sam", "SAM's tables, or zero as the published code has them", ("sam", "zero"))
    tuner: str = option("adapter", "how the encoder is tuned", tuple(TUNERS))
    mixing: bool = option(True, "let the modalities exchange information inside the tuner")
    rank: int = option(4, "rank of the LoRA updates")
    modalities: str = option("image+dsm", "rasters that the network sees", tuple(MODALITIES))
    fusion: str = option("dfm", "how the modalities' maps are merged; sum is the ablation", ("dfm", "sum"))
    bands: str = option("", "bands of the image: rgb, irrg (potsdam), or three counted from 1, as in 4,3,2")
    labels: str = option("dataset", "how labels are decoded: with their defects repaired, or as published", LABELS)
    splits: str = option("paper", "the paper's training and test tiles, or the official ones", ("paper", "official"))
    full_labels: bool = option(False, "score with the full labels where there are eroded ones")
    heights: str = option("minmax", "scaling of heights: minmax, percentiles, ground, or metres LOW:HIGH")
    image_scaling: str = option("unit", "scaling of images: unit, sam, reflectance, minmax, or LOW:HIGH")
    memory_gb: float = option(4.5, "memory for training tiles; what does not fit is read crop by crop from its files")
    crop: int = option(256, "pixels of a training crop, and of a window when scoring")
    batch_size: int = option(10, "crops in a step")
    epochs: int = option(50, "number of epochs")
    steps: int = option(1000, "optimiser steps in an epoch")
    optimizer: str = option("sgd", "sgd (momentum 0.9) or adamw", ("sgd", "adamw"))
    lr: float = option(0.01, "learning rate at its highest")
    weight_decay: float = option(5e-4, "weight decay")
    schedule: str = option("multistep", "multistep: a tenth after epochs 25, 35, 45; cosine", ("multistep", "cosine"))
    eval_stride: int = option(32, "pixels between windows when scoring")
    precision: str = option("auto", "fp32, bf16 (mixed), or auto: bf16 where a GPU has it", ("auto", "fp32", "bf16"))
    seed: int = option(0, "seed of every random choice")
    workers: int = option(-1, "processes that cut crops; by default 0 on the CPU, 4 beside a GPU")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")


RECIPES: dict[str, dict] = {
    "vaihingen": dict(precision="fp32"),  # the paper's: Settings as it stands
    "potsdam": dict(precision="fp32", eval_stride=32),
    "hunan": dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance"),
    "mmhunan": dict(precision="fp32", steps=500, eval_stride=128, image_scaling="reflectance"),
    "tiles": dict(batch_size=4, epochs=10, steps=20, optimizer="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine", eval_stride=128),
    "synthetic": dict(encoder="vit_t", weights="none", crop=128, batch_size=8, epochs=10, steps=30, optimizer="adamw", lr=2e-3, weight_decay=0.01, schedule="cosine", eval_stride=64),
}
# What may differ between a run and its continuation without changing a single weight.
FREE_ON_RESUME = ("out", "root", "workers", "device", "memory_gb")
MILESTONES = (25, 35, 45)  # differs: the drop comes after these epochs, the published code's at their start
WARMUP_STEPS = 20  # of the cosine schedule


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved stays."""


# ------------------------------------------------------------------------------------------------------------- settings


def parse_settings(argv: list[str] | None = None) -> tuple[Settings, dict, bool]:
    """The command line -> (settings, those that were given by hand, whether to resume)."""
    hints = get_type_hints(Settings)
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} [{f.default}]"
        if hints[f.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            kind, choices = hints[f.name], f.metadata["choices"]
            parser.add_argument(flag, type=kind, choices=choices, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, by default the newest")
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    data = given.get("data", "synthetic")
    settings = Settings(**{**RECIPES[data], **given})
    settings.root = settings.root or str(Path("data") / data)
    check_settings(settings)
    return settings, given, resume


def check_settings(s: Settings) -> None:
    """Raises DataError for a setting that cannot work."""
    for name in ("batch_size", "epochs", "steps", "rank"):
        if getattr(s, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(s, name)}: at least 1 is needed")
    if s.crop < MIN_SIZE:
        raise DataError(f"--crop {s.crop} is too small for the network; give {MIN_SIZE} pixels or more")
    if not 1 <= s.eval_stride <= s.crop:
        raise DataError(f"--eval-stride {s.eval_stride}: give 1 to the crop's {s.crop} pixels")
    if not s.lr > 0 or not math.isfinite(s.lr):
        raise DataError(f"--lr {s.lr}: a positive number is needed")


def resumed_settings(folder: Path, given: dict) -> tuple[Settings, dict]:
    """The settings of an interrupted run and its last.pt. Raises DataError for a flag that contradicts them."""
    last = read_content(folder / "last.pt", ("settings", "base", "state", "optimizer", "epoch", "rng"))
    stored = last["settings"]
    for name, value in given.items():
        if name not in FREE_ON_RESUME and stored[name] != value:
            flag = "--" + name.replace("_", "-")
            raise DataError(f"{flag} {value} contradicts the run in {folder}, which has {stored[name]}; leave it out")
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    return Settings(**{**stored, **free, "out": str(folder)}), last


def new_folder(settings: Settings) -> Path:
    """The folder of a new run, made. Raises DataError if it holds a run already or cannot be made."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}_{settings.data}_{settings.tuner}"
    folder = Path(settings.out) if settings.out else Path("runs") / name
    serial = 2
    while not settings.out and folder.exists():
        folder, serial = Path("runs") / f"{name}-{serial}", serial + 1
    if (folder / "config.json").exists():
        raise DataError(f"{folder} holds a run already; go on with it by --resume, or give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {folder}: the folder cannot be made ({error.strerror})") from error
    return folder


# ------------------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, s: Settings) -> float:
    """The learning rate of the step (0-based, over the whole run): a function of its arguments alone."""
    if s.schedule == "multistep":
        return s.lr * 0.1 ** sum(step // s.steps >= m for m in MILESTONES)
    total = s.epochs * s.steps
    warmup = min(WARMUP_STEPS, total // 10)
    if step < warmup:
        return s.lr * (step + 1) / (warmup + 1)
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def build_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the scored pixels of (B, K, H, W); 0 for a batch without any, where the mean is 0/0."""
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


def train(model: MFNet, tiles: list[LoadedTile], s: Settings, folder: Path, base: dict, last: dict | None) -> None:
    """Trains from the beginning, or from `last`, to the last epoch; writes log.jsonl and last.pt every epoch."""
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, s)
    first_epoch = 0
    if last is not None:
        load_trained_state(model, last["state"], str(folder / "last.pt"))
        optimizer.load_state_dict(last["optimizer"])
        restore_random_state(last["rng"])
        first_epoch = last["epoch"]
    workers = s.workers if s.workers >= 0 else (0 if device.type == "cpu" else 4)
    loader = torch.utils.data.DataLoader(
        CropDataset(tiles, s.crop, s.seed, MODALITIES[s.modalities]),
        batch_sampler=CropOrder(s.epochs, s.steps, s.batch_size, first_epoch),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    ticker = Ticker("step")
    start = time.monotonic()
    for epoch in range(first_epoch, s.epochs):
        model.train()
        epoch_start, losses = time.monotonic(), []
        for step in range(epoch * s.steps, (epoch + 1) * s.steps):
            rasters, labels = next(batches)
            lr = learning_rate(step, s)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast(s.precision, device):
                logits = model(*(r.to(device, non_blocking=True) for r in rasters))
            loss = segmentation_loss(logits, labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainingStopped(f"the loss is {losses[-1]} at step {step + 1}; try a smaller --lr")
            optimizer.step()
            speed = (step + 1 - first_epoch * s.steps) * s.batch_size / (time.monotonic() - start)
            ticker(step + 1, s.epochs * s.steps, f", loss {losses[-1]:.3f}, {speed:.3g} images/s")
        seconds = time.monotonic() - epoch_start
        entry = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * s.steps,
            "loss": sum(losses) / len(losses),
            "lr": lr,
            "images_per_second": s.steps * s.batch_size / seconds,
            "peak_memory_mb": peak_memory(device),
            "seconds": seconds,
        }
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        save_last(folder / "last.pt", model, optimizer, s, base, epoch + 1)


def save_last(path: Path, model: MFNet, optimizer: torch.optim.Optimizer, s: Settings, base: dict, epoch: int) -> None:
    content = {
        "settings": asdict(s),
        "base": base,
        "state": trained_state(model),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "rng": random_state(),
    }
    replace_atomically(path, lambda p: torch.save(content, p))


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators (dropout draws from them; crops have none)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def peak_memory(device: torch.device) -> float | None:
    """The most memory used so far in MB: of the GPU, else of the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --------------------------------------------------------------------------------------------------------------- script


def describe_model(model: MFNet) -> str:
    """The table of parameters by group; raises AssertionError unless exactly what the tuner lists is trained."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == trained_names(model), "what requires a gradient is not what the tuner trains"
    counts = count_parameters(model)
    counts["frozen"] = counts["total"] - counts["trainable"]
    return "parameters: " + ", ".join(f"{group} {n:,}" for group, n in counts.items())


def version() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"commit {commit or 'unknown'}, torch {torch.__version__}, python {platform.python_version()}"


def main() -> None:
    settings, given, resume = parse_settings()
    last = None
    if resume:
        folder = Path(settings.out) if settings.out else newest_run(holding="last.pt")
        settings, last = resumed_settings(folder, given)
    device = pick_device(settings.device)
    modalities = MODALITIES[settings.modalities]
    if settings.data == "synthetic" and not Path(settings.root).exists():
        print(f"making a synthetic city in {settings.root}", flush=True)
    dataset = open_from_settings(asdict(settings))
    dataset.tiles("test", modalities)  # a missing test tile is to be found now, not after the training
    tiles = dataset.tiles("train", modalities)
    loaded = load_tiles(tiles, modalities, settings.memory_gb)
    model, base, report = build_model(asdict(settings), len(dataset.classes), Ticker("fetching SAM's weights, bytes"))
    if last is not None and last["base"]["sha256"] != base["sha256"] and settings.tuner != "full":
        raise DataError(f"{folder} stands on {last['base']}, not on {base}; give the same --weights")
    model.to(device)

    folder = folder if resume else new_folder(settings)
    settings.out = str(folder)
    config = {**asdict(settings), "base": base, "classes": dataset.classes, "version": version()}
    replace_atomically(folder / "config.json", lambda p: p.write_text(json.dumps(config, indent=1), encoding="utf-8"))
    print(f"MFNet, {version()}, device {device}")
    print(", ".join(f"{k} {v}" for k, v in asdict(settings).items()))
    print(f"training: {memory_line(loaded)}, from {settings.root}")
    for note in (note for tile in tiles for note in tile.notes):
        print(f"note: {note}")
    print(f"weights: {report}" if report else "weights: NONE, the encoder is random; scores will be far below the paper's")
    print(describe_model(model))
    print(f"{settings.epochs} epochs x {settings.steps} steps x {settings.batch_size} crops of {settings.crop}", flush=True)

    start = time.monotonic()
    train(model, loaded, settings, folder, base, last)
    seconds = time.monotonic() - start
    save_model(folder / "model.pt", model, asdict(settings), base, [[n, list(c)] for n, c in dataset.classes])
    memory = peak_memory(device)
    images = (settings.epochs - (last["epoch"] if last else 0)) * settings.steps * settings.batch_size
    print(
        f"trained in {clock(seconds)}, {images / seconds:.3g} images/s, "
        f"peak memory {'unknown' if memory is None else f'{memory:,.0f} MB'}"
    )
    scores = score_run(folder, model.eval(), dataset, "test", asdict(settings), settings.eval_stride)
    print(format_scores(scores))
    print(f"{folder}: model.pt, scores.json, pictures/")


if __name__ == "__main__":
    try:
        run_script(main)
    except TrainingStopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(1)
