"""The linear layer against the one of PyTorch, in values, gradients and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from linear import Linear, Pointwise, linear

size = st.integers(1, 9)


def double_gradients(x, weight, bias, grad):
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    return torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad.double())


@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    C=size,
    D=size,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_it_is_the_linear_layer_for_tokens_in_any_arrangement(lead, C, D, dtype):
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((*lead, C), (D, C), (D,)))
    out = linear(x, weight, bias)
    assert out.is_contiguous()
    assert_close(
        out, F.linear(x.double(), weight.double(), bias.double()).to(dtype), atol=1e-5, rtol=1e-5
    )


@given(B=st.integers(1, 3), h=st.integers(1, 4), C=size, D=size)
def test_its_gradients_are_those_of_the_linear_layer_also_from_strided_tokens(B, h, C, D):
    x = torch.randn(B, C, h, h).permute(0, 2, 3, 1).requires_grad_()
    weight, bias, grad = (
        torch.randn(D, C, requires_grad=True),
        torch.randn(D, requires_grad=True),
        torch.randn(B, h, h, D),
    )
    found = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), grad)
    for mine, exact in zip(found, double_gradients(x, weight, bias, grad)):
        assert_close(mine, exact.float(), atol=1e-4, rtol=1e-4)


@given(T=size, C=size, D=size)
def test_the_convolution_has_the_derivative_that_it_says(T, C, D):
    shapes = (1, C, 1, T), (D, C), (D,)
    assert torch.autograd.gradcheck(
        Pointwise.apply, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    )


@pytest.mark.parametrize("trained", [False, True])
def test_tokens_are_kept_for_a_trained_weight_alone(trained):
    layer, x = Linear(8, 5).requires_grad_(trained), torch.randn(2, 3, 3, 8, requires_grad=True)
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        out = layer(x)
    assert (x.untyped_storage().data_ptr() in kept) == trained
    out.sum().backward()
    assert x.grad is not None and (layer.weight.grad is not None) == trained


def test_under_autocast_it_computes_in_bf16_and_its_weights_get_gradients_of_their_own_precision():
    layer, x = Linear(8, 5), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert_close(out.float(), F.linear(x, layer.weight, layer.bias), atol=0.05, rtol=0.05)
