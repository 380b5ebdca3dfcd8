"""Where a run computes and in which precision, how much memory it took, and which code it was."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn

from sam_vit import WeightsError, first_line


def peak_memory(device: torch.device) -> float | None:
    """The most memory used so far in MB: of the GPU, else of the process; None where the system
    does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def store_frozen_weights(model: nn.Module, precision: str, device: torch.device) -> None:
    """In bf16 the frozen matrices are kept in bf16, not cast in every step; what is trained stays
    fp32, in place.
    """
    if resolve_precision(precision, device) != "bf16":
        return
    for p in model.parameters():
        if not p.requires_grad and p.ndim in (2, 4) and p.shape[0] > 1:
            p.data = p.data.bfloat16()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on CUDA devices that have it, else fp32."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return precision


def autocast(precision: str, device: torch.device):
    """The context in which a network runs in a precision: fp32, bf16 (mixed), or auto."""
    bf16 = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def pick_device(name: str) -> torch.device:
    """ "auto" -> CUDA, Apple's MPS, or the CPU. Raises WeightsError for a device that this machine
    lacks.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WeightsError(
            f"--device {name} cannot be used here ({first_line(error)}); try auto or cpu"
        ) from error
    if device.type == "cpu":
        # For PyTorch, which looks at it before its first large tensor: large pages of Linux for
        # large tensors. Measured: a training step of ViT-L takes a seventh less memory, and the
        # same time.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return device


def version() -> str:
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"commit {commit or 'unknown'}, torch {torch.__version__}, python {platform.python_version()}"
