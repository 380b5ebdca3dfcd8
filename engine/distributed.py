"""One run on several processes, started by `torchrun --nproc_per_node=N train.py ...`.

N processes with a share of B/N crops each compute what one process with B crops does: gradients are
summed, batch norms take their statistics over all shares, dropout draws the masks of the whole
batch, and scores come from one matrix. Without torchrun a team has one member and nothing is
exchanged."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor


@dataclass(frozen=True)
class Team:
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, value):
        """The leader's value, for every member."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """The values of all members by rank, for every member."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the members' tensors, in place; without gradient."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def join_team(device: str) -> tuple[Team, str]:
    """The team of this process and its device: under torchrun its own GPU, or the CPU with gloo."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Team(), device
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    return Team(dist.get_rank(), world), device if gpu else "cpu"


def leave_team() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class TeamSum(torch.autograd.Function):
    """The sum of the members' tensors; each member's gradient is the sum of the gradients that all
    of them have.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class TeamBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes' shares (torch's own needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = TeamSum.apply(x32.sum(dim=(0, 2, 3))) / count
        centred = x32 - mean[:, None, None]
        variance = TeamSum.apply((centred**2).sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class ShardedDropout2d(nn.Dropout2d):
    """Drops whole channels: each process draws the masks of the whole batch and takes its own."""

    def __init__(self, p: float, rank: int, world: int):
        super().__init__(p)
        self.rank, self.world = rank, world

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        B, C = x.shape[:2]
        masks = nn.functional.dropout2d(x.new_ones(self.world * B, C, 1, 1), self.p)
        return x * masks[self.rank * B : (self.rank + 1) * B]


def form_team(model: nn.Module, team: Team) -> nn.Module:
    """Prepares a model for its share of the batch, in place, and returns what to call when training
    it.
    """
    if team.world == 1:
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = TeamBatchNorm2d(child.num_features, child.eps, child.momentum).to(
                    child.weight
                )
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
            elif type(child) is nn.Dropout2d:
                setattr(module, name, ShardedDropout2d(child.p, team.rank, team.world))
    return nn.parallel.DistributedDataParallel(model)
