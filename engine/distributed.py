"""One run on several processes, started by `torchrun --nproc_per_node=N train.py ...`.

N processes with B/N crops each compute what one process with B crops does: gradients are summed,
batch norms take their statistics over all processes, dropout draws the masks of the whole batch,
and scores come from one matrix. Without torchrun there is one process and nothing is exchanged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from engine.console import Mistake


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them knows them."""

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def broadcast(self, value):
        """The main process's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """The values of all processes by rank, on every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, in place; without gradient."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def join_team(device: str) -> tuple[Team, str]:
    """The processes of this run and this one's device: under torchrun its own GPU, or the CPU.
    Raises Mistake where torchrun's variables or its GPUs are not there."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        return Team(), device
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := ", ".join(name for name in needed if name not in os.environ):
        remedy = f"start by torchrun --nproc_per_node={world} train.py, or unset WORLD_SIZE"
        raise Mistake(f"WORLD_SIZE={world} is set and {missing} is not; {remedy}")
    use_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if use_gpu:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world)), torch.cuda.device_count()
        if gpus < here:
            few = f"{here} processes need {here} GPUs, and there are {gpus} here"
            remedy = f"give torchrun --nproc_per_node={gpus}, or --device cpu"
            raise Mistake(f"--device {device}: {few}; {remedy}")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Losses are summed on the CPU, gradients where they lie.
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    return Team(dist.get_rank(), world), device if use_gpu else "cpu"


def leave_team() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes (torch's own needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x32.sum(dim=(0, 2, 3))) / count
        centred = x32 - mean[:, None, None]
        variance = all_reduce((centred**2).sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class ShardedDropout2d(nn.Dropout2d):
    """Drops whole channels: each process draws the masks of the whole batch and applies those of
    its own crops, so that N processes drop what one would."""

    def __init__(self, p: float, rank: int, world: int):
        super().__init__(p)
        self.rank, self.world = rank, world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        B, C = x.shape[:2]
        # What nn.Dropout2d draws for the whole batch.
        masks = F.dropout2d(x.new_ones(self.world * B, C, 1, 1), self.p)
        return x * masks[self.rank * B : (self.rank + 1) * B]


def wrap_distributed(model: nn.Module, team: Team) -> nn.Module:
    """Prepares a model for its part of the batch, in place; returns what to call in training."""
    if team.world == 1:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = SyncBatchNorm2d(child.num_features, child.eps, child.momentum)
                norm.to(child.weight).load_state_dict(child.state_dict())
                setattr(module, name, norm)
            elif type(child) is nn.Dropout2d:
                setattr(module, name, ShardedDropout2d(child.p, team.rank, team.world))
    return nn.parallel.DistributedDataParallel(model)
