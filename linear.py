"""The linear layer of the encoder and its tuners: `nn.Linear`, at the speed of the processor.

A linear layer over tokens is a convolution of 1 x 1 pixels, and on one kind of machine that
matters: the x86 builds of PyTorch leave matrix products in fp32 to a library that keeps its widest
instructions for one maker's processors, and convolutions to another that uses them on all. Measured
on two cores of another maker at the shapes of ViT-B and ViT-L: 190 to 210 GFLOP/s as a product, 360
to 450 as a convolution, forward and backward. In bf16 both are as fast.

Shapes: `C` width in, `D` width out, `T` tokens.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

OF_X86 = (
    torch.backends.mkl.is_available()
)  # that library for products comes with these builds alone


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which precision layers compute with x: autocast's, or without it that of x."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Linear(nn.Linear):
    """(..., C) -> (..., D), with the parameters of `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., C), weight (D, C), bias (D) -> (..., D): x weight^T + bias, under autocast in its
    precision.

    The casts are made here, because those of autocast are kept until its end: a second copy of all
    trained weights."""
    x, weight, bias = (t.to(autocast_dtype(x)) for t in (x, weight, bias))
    if x.device.type == "cpu" and x.dtype == torch.float32 and OF_X86:
        tokens = x.reshape(1, 1, -1, x.shape[-1]).permute(
            0, 3, 1, 2
        )  # (1, C, 1, T), in memory token by token
        return Pointwise.apply(tokens, weight, bias).permute(0, 2, 3, 1).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Pointwise(torch.autograd.Function):
    """x (1, C, 1, T), weight (D, C), bias (D) -> (1, D, 1, T).

    The convolution of PyTorch would keep x for the way back; here it is kept only for a weight that
    is trained."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return F.conv2d(x, weight[:, :, None, None], bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        kernel = weight[:, :, None, None]
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            F.conv_transpose2d(grad, kernel) if for_x else None,
            nn.grad.conv2d_weight(x, kernel.shape, grad)[:, :, 0, 0] if for_weight else None,
            grad.sum(dim=(0, 2, 3)) if for_bias else None,
        )
