"""One optimiser step, and the state that a run needs to go on: loss, optimiser, precision, parts of
a batch, processes.

Shapes: `B` batch, `K` classes, `H, W` pixels.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoints import load_trained_state, trained_state
from engine.device import autocast
from engine.distributed import Team, form_team
from engine.settings import Settings, class_weights, learning_rate
from fast import accelerate
from geodata.layouts import IGNORE
from mfnet import MFNet


class TrainingStopped(RuntimeError):
    """Training cannot go on; what was saved stays. `status` is the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass
class Progress:
    """Where a run stands, besides weights and optimiser."""

    step: int = 0  # optimiser steps done
    loss_sum: float = 0.0  # of the steps of the current epoch
    best: float | None = None  # best mIoU of the tiles that --select looks at
    best_epoch: int = 0


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    total: float | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of (B, K, H, W) and (B, H, W), summed over the scored pixels and divided by
    `total`.

    `total` is by default the batch's own `scored_weight`, which makes it the mean; 0 for a batch
    without scored pixels."""
    loss = F.cross_entropy(
        logits.float(),
        labels,
        weights,
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss / (scored_weight(labels, weights).to(loss) if total is None else total)


def scored_weight(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """The number of scored pixels, each counted with its class's weight; at least a tiny number."""
    scored = labels != IGNORE
    total = scored.sum() if weights is None else weights[labels[scored]].sum()
    return total.double().clamp(min=1e-12)


def build_optimizer(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay)


class Trainer:
    """A network in training: takes steps, and tells everything that it takes to go on from where it
    stands.
    """

    def __init__(self, model: MFNet, s: Settings, team: Team, num_classes: int):
        self.model, self.s, self.team = model, s, team
        self.device = next(model.parameters()).device
        accelerate(model, s.checkpointing)
        if s.compile:
            for block in model.image_encoder.blocks:
                block.compile()  # in place: state-dict names stay
        self.forward = form_team(model, team)
        self.optimizer = build_optimizer(model, s)
        weights = class_weights(s, num_classes)
        self.weights = None if weights is None else torch.tensor(weights, device=self.device)
        self.progress = Progress()

    def step(self, parts: list[tuple[list[Tensor], Tensor]]) -> float:
        """One optimiser step on this process's share, given in parts; returns the loss of the whole
        batch.
        """
        s, step = self.s, self.progress.step
        torch.manual_seed(
            s.seed * 1_000_003 + step
        )  # dropout: a function of seed and step, on every process
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        weights = None if self.weights is None else self.weights.cpu()
        total = self.team.sum(sum(scored_weight(labels, weights) for _, labels in parts)).item()
        self.optimizer.zero_grad()
        loss_sum = torch.zeros(1, dtype=torch.float64)
        for i, (rasters, labels) in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last or self.team.world == 1 else self.forward.no_sync():
                with autocast(s.precision, self.device):
                    logits = self.forward(*(r.to(self.device, non_blocking=True) for r in rasters))
                labels = labels.to(self.device, non_blocking=True)
                loss = segmentation_loss(logits, labels, total, self.weights, s.label_smoothing)
                (
                    loss * self.team.world
                ).backward()  # the team's gradients are averaged, the loss wants their sum
            loss_sum += loss.item()
        value = self.team.sum(loss_sum).item()
        if not math.isfinite(value):
            raise TrainingStopped(
                f"the loss is {value} at step {step + 1}; try a smaller --lr, or --clip 1"
            )
        if s.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.loss_sum += value
        return value

    def content(self, base: dict, data: str) -> dict:
        return {
            "settings": asdict(self.s),
            "base": base,
            "data": data,
            "state": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }

    def restore(self, content: dict, name: str) -> None:
        load_trained_state(self.model, content["state"], name)
        self.optimizer.load_state_dict(content["optimizer"])
        self.progress = Progress(**content["progress"])
