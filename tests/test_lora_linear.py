"""A linear with adapters on some of its parts: against float64, forward and backward."""

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.lora_linear import lora_linear, lora_linear_ref

PARTS = {  # name -> (N, parts)
    "all": (40, ((0, 24), (24, 32), (32, 40))),
    "one": (40, ((0, 40),)),
    "gaps": (40, ((0, 24), (32, 40))),
    "last": (40, ((39, 40),)),
}


def make(parts, num_out, T, D, r, dtype, bias=True):
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    wide = torch.promote_types(dtype, torch.float32)
    A = normal(len(parts) * r, D, dtype=wide)
    B = normal(sum(end - start for start, end in parts), r, dtype=wide)
    x, weight = normal(T, D), normal(num_out, D)
    return [x, weight, normal(num_out) if bias else None, A, B]


def run(op, tensors, parts, dy, dtype=None):
    tensors = [
        x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors
    ]
    y = op(*tensors, parts, 0.7)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(None if x is None else x.grad for x in tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("T", "D", "r"), [(1, 5, 1), (33, 64, 8), (130, 48, 3)])
def test_against_float64(name, dtype, T, D, r):
    num_out, parts = PARTS[name]
    tensors = make(parts, num_out, T, D, r, dtype)
    dy = torch.randn(T, num_out, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run(lora_linear, tensors, parts, dy)
    baseline = run(lora_linear_ref, tensors, parts, dy)
    exact = run(lora_linear_ref, tensors, parts, dy, torch.float64)
    names = ("y", "x", "weight", "bias", "A", "B")
    for what, *values in zip(names, actual, baseline, exact, strict=True):
        assert values[0].dtype == values[1].dtype, what
        assert_accurate(what, *values)


def test_what_is_frozen_gets_no_gradient_and_costs_no_product():
    num_out, parts = PARTS["gaps"]
    x, weight, bias, A, B = make(parts, num_out, 9, 16, 2, torch.float32)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    x = x.detach()
    y = lora_linear(x, weight, bias, A, B, parts, 0.7)
    with torch.autograd.profiler.profile() as profile:
        y.sum().backward()
    products = [e.name for e in profile.function_events if e.name in ("aten::mm", "aten::addmm_")]
    assert len(products) == 5  # dh and dB of two parts, dA; neither dx nor dW
    assert weight.grad is bias.grad is x.grad is None
    assert A.grad is not None
    assert B.grad is not None


def test_adapters_of_zero_leave_the_bits_of_the_layer():
    num_out, parts = PARTS["all"]
    x, weight, bias, A, B = make(parts, num_out, 50, 32, 4, torch.float32)
    with torch.no_grad():
        base = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(lora_linear(x, weight, bias, A, B * 0, parts, 2.0), base)
        assert not torch.equal(lora_linear(x, weight, bias, A, B, parts, 2.0), base)
