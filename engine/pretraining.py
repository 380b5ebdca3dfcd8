"""Teaches `vit_t` to see, on pictures of nothing: how `weights/vit_t.pth` was made.

    python -m engine.pretraining --out FILE          an encoder, in SAM's names
    python -m engine.pretraining --probe FILE        what a linear classifier reads off its features

The pictures are those of `geodata/leaves.py`; no city, no class, no height. The task is dense and
knows no class, in the spirit of Segment Anything: which pixels belong together, where a shape ends,
and of what colour it is without its texture, its light and the noise. A head of one layer answers
it for cells of 4 x 4 pixels, and is thrown away. A last term keeps the features' channels apart,
which otherwise end up saying much the same. docs/log.md has what else was tried.

Every random choice is a function of the seed and the step: the same command with the same number
of threads on the same machine writes the same bytes, also when it was interrupted and begun again.

Shapes: `B` pictures, `H, W` pixels, `h, w` cells (H/4, W/4), `E` length of an embedding, `n`
sampled cells; `T` tokens, `K` classes, `R = 16` cells of a token.
"""

from __future__ import annotations

import argparse
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoints import save_tensors
from engine.console import Mistake, Parser, Ticker, run_script
from engine.files import replace_atomically
from fast import accelerate
from geodata.city import make_tile
from geodata.layouts import VAIHINGEN
from geodata.leaves import Picture, make_picture
from geodata.scaling import height_range, image_input, scale_heights
from sam_vit import (
    ImageEncoderViT,
    WeightsError,
    build_image_encoder,
    load_sam_weights,
    read_tensors,
)

CELL = 4  # pixels of the head's cells
EMBEDDING = 16
SIZE = 320  # pixels of a picture


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    images: Tensor  # (B, 3, H, W), 0 to 1
    shapes: Tensor  # (B, h, w) int64: the shape in the middle of each cell
    edges: Tensor  # (B, h, w) float: 1 where a cell holds two shapes
    colors: Tensor  # (B, 3, h, w): the colour of that shape


def make_batch(pictures: list[Picture], seed: int, step: int, tokens: int) -> Batch:
    """Crops of 128 pixels, and in every fourth step of 256, of `tokens` tokens in all: turned,
    mirrored, and in other colours. A function of its arguments."""
    rng = np.random.default_rng((seed, 1, step))
    side = 256 if step % 4 == 0 else 128
    parts = []
    for _ in range(max(1, tokens * 256 // side**2)):
        picture = pictures[rng.integers(len(pictures))]
        top, left = rng.integers(0, len(picture.shapes) - side + 1, 2)
        box = slice(top, top + side), slice(left, left + side)
        quarter, mirror = rng.integers(4), rng.integers(2)
        image, shapes = (
            np.rot90(a[box][:: 1 - 2 * mirror], quarter) for a in (picture.image, picture.shapes)
        )
        mix, shift = random_colors(rng)
        cells = shapes.reshape(side // CELL, CELL, side // CELL, CELL)
        middle = shapes[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(np.int64)
        image, flat = (c.astype(np.float32) / 255 @ mix + shift for c in (image, picture.colors))
        edges = cells.max(axis=(1, 3)) != cells.min(axis=(1, 3))
        parts.append((image.clip(0, 1).transpose(2, 0, 1), middle, edges, flat[middle].clip(0, 1)))
    images, shapes, edges, colors = (torch.from_numpy(np.stack(p)) for p in zip(*parts))
    return Batch(images.float(), shapes, edges.float(), colors.permute(0, 3, 1, 2).contiguous())


def random_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (3, 3) and a shift (3,) by which colours become others: bands are mixed, in a third
    of the cases into one grey, and contrast and brightness change."""
    mix = 0.7 * np.eye(3)[rng.permutation(3)] + rng.dirichlet((1, 1, 1), 3).T * 0.3
    if rng.random() < 0.33:
        mix = np.repeat(rng.dirichlet((1, 1, 1))[:, None], 3, axis=1)
    gain = rng.uniform(0.4, 1.3) * rng.choice((1, 1, 1, -1))
    shift = 0.5 - gain * 0.5 + rng.uniform(-0.2, 0.2)
    return (gain * mix).astype(np.float32), np.full(3, shift, np.float32)


# --------------------------------------------------------------------------------- network and loss


class Student(nn.Module):
    """The encoder, and the head that is thrown away."""

    def __init__(self):
        super().__init__()
        self.image_encoder = accelerate(build_image_encoder("vit_t"))
        side = self.image_encoder.patch_size // CELL
        channels = (EMBEDDING + 1 + 3) * side**2
        self.head = nn.Sequential(nn.Conv2d(256, channels, kernel_size=1), nn.PixelShuffle(side))
        self.radius = nn.Parameter(torch.ones(()))  # squared; nearer embeddings belong together

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> features (B, 256, H/16, W/16), embeddings (B, E, h, w), logits of edges
        (B, h, w), colours (B, 3, h, w)."""
        features = self.image_encoder(images)
        return features, *self.head(features).split_with_sizes((EMBEDDING, 1, 3), dim=1)


def affinity_loss(embeddings: Tensor, shapes: Tensor, radius: Tensor, n: int = 256) -> Tensor:
    """Do two cells belong to one shape? Cross-entropy of radius - distance^2 over all pairs of n
    cells, drawn from a random square of 32 x 32; pairs that do weigh as much as those that do not.
    """
    side = min(32, *shapes.shape[1:])
    top, left = (int(torch.randint(0, size - side + 1, ())) for size in shapes.shape[1:])
    box = ..., slice(top, top + side), slice(left, left + side)
    drawn = torch.randperm(side * side)[:n]
    e, ids = embeddings[box].flatten(2)[..., drawn].mT, shapes[box].flatten(1)[:, drawn]
    square = (e * e).sum(-1)  # (B, n), of e (B, n, E)
    distance = square[:, :, None] + square[:, None] - 2 * e @ e.mT  # (B, n, n)
    same = ids[:, :, None] == ids[:, None]
    loss = F.binary_cross_entropy_with_logits(radius - distance, same.float(), reduction="none")
    return sum((loss * pairs).sum() / pairs.sum().clamp(min=1) for pairs in (same, ~same)) / 2


def spread_loss(features: Tensor) -> Tensor:
    """Keeps the channels of features (B, 256, ., .) from saying all the same, or nothing: they are
    to have a deviation of 1 or more over the tokens of a batch, and to be uncorrelated (VICReg,
    Bardes et al. 2022)."""
    x = features.movedim(1, -1).flatten(0, 2)  # (T, 256)
    x = x - x.mean(0)
    std = (x.square().mean(0) + 1e-4).sqrt()
    cov = x.T @ x / (len(x) - 1)
    off = cov.square().sum() - cov.diagonal().square().sum()
    return 0.2 * F.relu(1 - std).mean() + 0.02 * off / len(cov)


def student_losses(student: Student, batch: Batch) -> dict[str, Tensor]:
    """The terms whose sum is trained."""
    features, embeddings, edges, colors = student(batch.images)
    return {
        "spread": spread_loss(features),
        "affinity": affinity_loss(embeddings, batch.shapes, student.radius),
        "edges": F.binary_cross_entropy_with_logits(edges[:, 0], batch.edges),
        "colors": 3 * F.l1_loss(colors, batch.colors),
    }


# ------------------------------------------------------------------------------------------ the run


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Up in a line, then down to zero in half a cosine."""
    warmup = min(200, steps // 4)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def build_optimizer(student: Student) -> torch.optim.Optimizer:
    """AdamW, which decays matrices only."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = dict(params=matrices, weight_decay=0.05), dict(params=others, weight_decay=0.0)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def pretrain(args: argparse.Namespace) -> None:
    """Trains from the beginning, or from what an interrupted run left, and writes `args.out`.
    Raises Mistake where that was another command."""
    part = args.out.with_name(args.out.name + ".part")
    command = {name: getattr(args, name) for name in ("seed", "steps", "pictures", "tokens", "lr")}
    torch.manual_seed(args.seed)
    student, first = Student(), 0
    optimizer = build_optimizer(student)
    if part.exists():
        kept = read_tensors(part)
        if kept["command"] != command:
            raise Mistake(f"{part} is of another command, {kept['command']}; remove it")
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    pictures = [make_picture(args.seed, i, SIZE) for i in range(args.pictures)]
    ticker, sums = Ticker("step", every=60), {}
    for step in range(first, args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        losses = student_losses(student, make_batch(pictures, args.seed, step, args.tokens))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        sums = {k: 0.98 * sums.get(k, v.item()) + 0.02 * v.item() for k, v in losses.items()}
        ticker(step + 1, args.steps, "".join(f", {k} {v:.4f}" for k, v in sums.items()))
        if (step + 1) % args.save_every == 0:
            state = dict(student=student.state_dict(), optimizer=optimizer.state_dict())
            save_tensors(part, dict(command=command, step=step + 1, **state))
    save_encoder(student.image_encoder, args.out)
    part.unlink(missing_ok=True)


def save_encoder(encoder: ImageEncoderViT, out: Path) -> None:
    """Writes the tensors in Meta's names as bf16."""
    state = {f"image_encoder.{n}": t.bfloat16() for n, t in encoder.state_dict().items()}
    buffer = io.BytesIO()  # torch.save writes the name of a file into it
    torch.save(state, buffer)
    replace_atomically(out, lambda path: path.write_bytes(buffer.getvalue()))


# -------------------------------------------------------------------------------------------- probe

PROBE_TRAIN, PROBE_TEST = range(1, 9), range(9, 13)  # areas of city 0, each of 512 x 512 pixels;
# the test's are flown later, as those of the data set


@torch.no_grad()
def probe_tokens(encoder: ImageEncoderViT, area: int, raster: str) -> tuple[Tensor, Tensor]:
    """Features (T, 256) of the tokens of a tile's image or heights, in windows of 128 pixels, and
    the classes (T, R) of their cells."""
    scene = make_tile(0, area, 512, 512, later=area in PROBE_TEST)
    if raster == "image":
        x = image_input(scene.image)
    else:
        dsm = np.where(np.isnan(scene.dsm), np.nanmin(scene.dsm), scene.dsm)  # as in files
        x = np.repeat(scale_heights(dsm, height_range(dsm))[None], 3, axis=0)
    windows = torch.from_numpy(x).unflatten(2, (4, 128)).unflatten(1, (4, 128))
    maps = encoder(windows.permute(1, 3, 0, 2, 4).flatten(0, 1))  # (windows, 256, 8, 8)
    cells = torch.from_numpy(scene.labels[CELL // 2 :: CELL, CELL // 2 :: CELL].astype(np.int64))
    cells = cells.view(4, 8, 4, 4, 8, 4)  # rows of windows, tokens, cells; columns of the same
    return maps.permute(0, 2, 3, 1).flatten(0, 2), cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, 16)


def fit_linear(x: Tensor, y: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Logistic regression of classes y (T, R) on features x (T, C), which are decorrelated first ->
    a function from features to classes."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    values, vectors = torch.linalg.eigh(torch.cov(((x - mean) / std).T))
    whiten = vectors / (values.clamp(min=0) + 1e-4).sqrt() / std[:, None]
    weight = torch.zeros(x.shape[1], y.shape[1] * classes, requires_grad=True)
    bias = torch.zeros(y.shape[1] * classes, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return ((x - mean) @ whiten @ weight + bias).unflatten(-1, (-1, classes))  # (T, R, K)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(x).flatten(0, 1), y.flatten()) + 1e-4 * (weight**2).sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")
    optimizer.step(objective)
    return lambda x: logits(x).argmax(-1)


def mean_iou(guess: Tensor, truth: Tensor, classes: int) -> float:
    """Percent, over the first `classes` classes."""
    pairs = [(guess == k, truth == k) for k in range(classes)]
    return 100 * torch.stack([(a & b).sum() / (a | b).sum() for a, b in pairs]).mean().item()


def probe(encoder: ImageEncoderViT, raster: str) -> float:
    """mIoU, percent, of a linear classifier of cells of the city by the features of a raster,
    "image" or "heights", on tiles that it was not fitted on."""
    train, test = (
        [torch.cat(t) for t in zip(*(probe_tokens(encoder, area, raster) for area in areas))]
        for areas in (PROBE_TRAIN, PROBE_TEST)
    )
    guess = fit_linear(*train, len(VAIHINGEN.classes))(test[0])
    return mean_iou(guess, test[1], len(VAIHINGEN.scored))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="-m engine.pretraining", description="Pre-trains vit_t on dead leaves, or probes it."
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="write the encoder")
    add("--probe", metavar="FILE", help="measure an encoder on the city; none is a random one")
    add("--seed", type=int, default=0, help="of every random choice [0]")
    add("--steps", type=int, default=1200, help="optimiser steps [1200]")
    add("--pictures", type=int, default=600, help="that crops are cut from [600]")
    add("--tokens", type=int, default=1024, help="in a step, of 16 x 16 pixels [1024]")
    add("--lr", type=float, default=1e-3, help="learning rate at its highest [0.001]")
    add("--save-every", type=int, default=500, help="steps between saves of FILE.part [500]")
    add("--threads", type=int, default=1, help="another number rounds otherwise [1]")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.probe is None):
        parser.error("give --out FILE or --probe FILE")
    if min(args.steps, args.pictures, args.tokens, args.save_every, args.threads) < 1:
        parser.error("the numbers are 1 or more")
    torch.set_num_threads(args.threads)
    if args.out:
        return pretrain(args)
    torch.manual_seed(args.seed)
    encoder = build_image_encoder("vit_t").eval()
    if args.probe != "none":
        load_sam_weights(encoder, args.probe)
    for raster in ("image", "heights"):
        print(f"{raster}: mIoU {probe(encoder, raster):.2f} %", flush=True)


if __name__ == "__main__":
    run_script(main, WeightsError)
