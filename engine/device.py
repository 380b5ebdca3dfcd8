"""Where a run computes and in which precision, how much memory there is, and which code it was."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn

from engine.console import Mistake
from sam_vit import first_line


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, Apple's MPS, or the CPU; fp32 there is fp32 from now on (`set_tf32`). Raises
    Mistake for what this machine lacks."""
    if name == "auto":
        on_mac = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else on_mac
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise Mistake(f"--device {name} cannot be used here ({reason}); try auto or cpu") from error
    set_tf32(False)
    return device


def set_tf32(allowed: bool) -> None:
    """Whether GPUs may round the factors of fp32 products to 10 bits. PyTorch lets convolutions,
    unless it is told not to: 1e-3 between a map of a GPU and that of a CPU."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is bf16 on CUDA devices that compute in it, else fp32."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def autocast(precision: str, device: torch.device):
    """The context in which a network runs in a precision: fp32, bf16 (mixed), or auto."""
    bf16 = resolve_precision(precision, device) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def store_frozen_weights(model: nn.Module, precision: str, device: torch.device) -> None:
    """In bf16 the frozen matrices are kept so, in place, and not cast in every step."""
    if resolve_precision(precision, device) != "bf16":
        return
    for p in model.parameters():
        if not p.requires_grad and p.ndim in (2, 4) and p.shape[0] > 1:
            p.data = p.data.bfloat16()


def compute_deterministically(device: torch.device) -> None:
    """Asks torch for kernels that give the same bits again, from now on, before the first product.

    Those that have no such kind warn; the fused attention's backward passes would do no more than
    that, and so are left out on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type == "cuda":
        for enable in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
            getattr(torch.backends.cuda, enable)(False)


# ------------------------------------------------------------------------------------------- memory


def use_large_pages() -> None:
    """Asks PyTorch for large pages of Linux for its large tensors on a CPU; before the first one.

    Measured: a training step of ViT-L takes a seventh less memory, and the same time."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def peak_memory(device: torch.device) -> float | None:
    """The most memory used so far, in MB: of the GPU, else of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def total_memory(device: torch.device) -> float | None:
    """The memory of the GPU, else of the machine, in MB; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**20
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (AttributeError, ValueError, OSError):
        return None


# --------------------------------------------------------------------------------------------- code


def version() -> str:
    """The commit of this code, with -dirty where a Python file differs from it, and torch's."""
    return f"commit {commit()}, torch {torch.__version__}, python {platform.python_version()}"


def commit() -> str:
    """The commit of this project's own repository: a copy inside another one is "unknown"."""
    home = Path(__file__).resolve().parent.parent

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(home), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        top, described = git("rev-parse", "--show-toplevel"), git("describe", "--always")
        if not described.stdout.strip() or Path(top.stdout.strip()).resolve() != home:
            return "unknown"
        changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return described.stdout.strip() + ("-dirty" if changed else "")
