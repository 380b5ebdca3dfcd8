"""One optimiser step, and the state that a run needs to go on: loss, optimiser, precision, parts of
a batch, processes.

Shapes: `M` modalities, `B` batch, `K` classes, `H, W` pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.checkpoints import load_trained_state, trained_state
from engine.console import Mistake
from engine.device import autocast
from engine.distributed import Team, wrap_distributed
from engine.settings import Settings
from geodata.layouts import IGNORE
from mfnet import MFNet
from sam_vit import WeightsError
from tuners import tell_present


class TrainingStopped(Mistake):
    """Training cannot go on; what was saved stays. `status` is the exit status."""

    label = "stopped"

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass
class Progress:
    """Where a run stands, besides weights and optimiser."""

    step: int = 0  # optimiser steps done
    loss_sum: float = 0.0  # of the steps of the current epoch
    scored: float = 0.0  # pixels (by the weights of their classes) that counted in this epoch
    unscored: bool = False  # the epoch that ended with `step` is still to be scored, to choose one
    best: float | None = None  # best mIoU of the tiles that --select looks at
    best_epoch: int = 0
    lengthened: list = field(default_factory=list)  # [step, epochs]: epochs until then, if changed


# ------------------------------------------------------------------------------------ loss and rate


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    total: float | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of (B, K, H, W) and (B, H, W), summed over the scored pixels and divided by
    `total`, by default the batch's own `scored_weight`, which makes it the mean.
    differs: without a scored pixel it is 0, where the published code's mean is no number."""
    # Summed by itself: on a GPU the kernel that sums as well adds in any order.
    how = dict(ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing)
    loss = F.cross_entropy(logits.float(), labels, weights, **how).sum()
    total = scored_weight(labels, weights).item() if total is None else total
    return loss / total if total > 0 else 0 * loss


def scored_weight(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The number of scored pixels, each counted with its class's weight."""
    scored = labels != IGNORE
    weight = scored.sum() if weights is None else weights[labels[scored]].sum()
    return weight.cpu().double()  # MPS has no float64


def class_weights(s: Settings, pixels: Sequence[int]) -> Tensor | None:
    """The weights (K,) of the classes in the loss, None for equal ones. `pixels` (K,) are those of
    the training tiles. Raises Mistake."""
    if not s.class_weights:
        return None
    if s.class_weights == "balanced":
        return balanced_weights(pixels)
    num_classes = len(pixels)
    try:
        weights = [float(w) for w in s.class_weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != num_classes or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        needed = f"{num_classes} numbers of 0 or more are needed, as 1,1,2, or balanced"
        raise Mistake(f"--class-weights {s.class_weights}: {needed}")
    return torch.tensor(weights)


def balanced_weights(pixels: Sequence[int]) -> Tensor:
    """The weights (K,) of classes with so many pixels: by the inverse square root of their share,
    and 1 for the mean pixel. A class without a pixel has none.

    The square root stands between no weights and the inverse share, as of median frequency
    balancing (Eigen and Fergus, ICCV 2015): that gives all classes the same part of the loss, and
    pays for a rare one with many false pixels of it. A share below 0.1 % counts as that much."""
    shares = torch.tensor(pixels, dtype=torch.float64) / max(sum(pixels), 1)
    weights = torch.where(shares > 0, shares.clamp(min=1e-3) ** -0.5, 0)
    return (weights / (weights * shares).sum()).float()


def learning_rate(step: int, s: Settings) -> float:
    """The learning rate of a step (0-based, over the whole run): a function of its arguments."""
    total = s.epochs * s.steps
    warmup = min(s.warmup, total // 2)
    if step < warmup:
        return s.lr * (step + 1) / (warmup + 1)
    if s.schedule == "multistep":
        # The published 25, 35 and 45 of 50 epochs; a shorter run drops after the same parts of it.
        # differs: the published code drops one epoch early, at the start of these epochs.
        drops = [m - 1 if s.early_drops else m for m in (25, 35, 45)]
        return s.lr * 0.1 ** sum(50 * step >= m * total for m in drops)
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def build_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay)


# ---------------------------------------------------------------------------------------- in parts


def encode_in_parts(model: MFNet, parts: int) -> None:
    """Makes the encoder take a batch in `parts` micro-batches while it is trained, in place.

    Only the encoder does, which holds nearly all of the activations: each part's are computed again
    in the backward pass. Fusion and decoder take the whole batch, so that their batch norms have
    its statistics, and the gradients are those of the whole batch. Raises Mistake for a tuner whose
    blocks normalise over the batch."""
    encoder, M = model.image_encoder, model.modalities
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in encoder.modules()):
        why = f"the tuner {encoder.tuner} normalises over the batch, not over parts of it"
        raise Mistake(f"--accumulate {parts}: {why}; leave it out")
    whole = encoder.forward

    def of_part(x: Tensor, present: Tensor | None) -> Tensor:
        tell_present(encoder, present)
        return whole(x)

    def forward(x: Tensor, seen: dict | None = None) -> Tensor:
        if seen is not None or not torch.is_grad_enabled():
            return whole(x, seen)
        told = getattr(encoder, "present", None)
        present = [None] * parts if told is None else told.chunk(parts, dim=1)
        chunks = x.unflatten(0, (M, -1)).chunk(parts, dim=1)  # parts of (M, B / parts, 3, H, W)
        maps = [
            checkpoint(partial(of_part, present=there), part.flatten(0, 1), use_reentrant=False)
            for part, there in zip(chunks, present)
        ]
        return torch.cat([y.unflatten(0, (M, -1)) for y in maps], dim=1).flatten(0, 1)

    encoder.forward = forward


# ------------------------------------------------------------------------------------------ a step


class Trainer:
    """A network in training: takes steps, and holds everything that it takes to go on."""

    def __init__(self, model: MFNet, s: Settings, team: Team, pixels: Sequence[int]):
        """`pixels` (K,): of each class in the training tiles."""
        self.model, self.s, self.team = model, s, team
        self.device = next(model.parameters()).device
        if s.compile:
            if self.device.type == "cpu":
                why = "on a CPU it compiles for minutes and saves 5 % at best"
                raise Mistake(f"--compile is for a GPU: {why}; leave it out")
            for block in model.image_encoder.blocks:
                block.compile()  # in place: state-dict names stay
        if s.accumulate > 1:
            encode_in_parts(model, s.accumulate)
        self.forward = wrap_distributed(model, team)
        self.optimizer = build_optimizer(model, s)
        self.weights = class_weights(s, pixels)
        self.progress = Progress()

    def step(self, rasters: list[Tensor], labels: Tensor) -> float:
        """One optimiser step on this process's crops -> the loss of the whole batch. Raises
        TrainingStopped, and changes no weight, where loss or gradient is no number."""
        s, step = self.s, self.progress.step
        # Dropout: a function of seed and step, on every process.
        torch.manual_seed(s.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        total = self.team.sum(scored_weight(labels, self.weights)).item()
        weights = None if self.weights is None else self.weights.to(self.device)
        self.optimizer.zero_grad()
        with autocast(s.precision, self.device):
            logits = self.forward(*(r.to(self.device, non_blocking=True) for r in rasters))
        labels = labels.to(self.device, non_blocking=True)
        loss = segmentation_loss(logits, labels, total, weights, s.label_smoothing)
        # The processes' gradients are averaged, and the loss wants their sum.
        (loss * self.team.world).backward()
        value = self.team.sum(loss.detach().cpu().double()).item()
        self.stop_unless(math.isfinite(value), f"loss is {value} at step {step + 1}")
        norm = nn.utils.clip_grad_norm_(self.trained(), s.clip or math.inf).item()
        self.stop_unless(math.isfinite(norm), f"gradient is {norm} at step {step + 1}")
        self.optimizer.step()
        self.progress.step += 1
        self.progress.loss_sum += value
        self.progress.scored += total
        return value

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def stop_unless(self, fine: bool, what: str) -> None:
        if not fine:
            raise TrainingStopped(f"the {what}; try a smaller --lr, or --clip 1")

    def check_weights(self) -> None:
        """Raises TrainingStopped for weights that, or whose squares, are not finite."""
        with torch.no_grad():
            norms = torch.stack([p.norm() for p in self.trained()])
        step, fine = self.progress.step, bool(norms.isfinite().all())
        self.stop_unless(fine, f"weights are not finite after step {step}")

    def state_dict(self, base: dict, data: str) -> dict:
        return {
            "settings": asdict(self.s),
            "base": base,
            "data": data,
            "state": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, content: dict, name: str) -> None:
        """What `state_dict` gave, read from the file `name`. Raises WeightsError."""
        load_trained_state(self.model, content["state"], name)
        known = {f.name for f in fields(Progress)}
        try:
            self.optimizer.load_state_dict(content["optimizer"])
            kept = {k: v for k, v in content["progress"].items() if k in known}
            self.progress = Progress(**kept)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{name}: its optimiser or progress is damaged ({error})") from error
