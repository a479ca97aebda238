"""A linear layer's three products, of 2 T D N FLOP each.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum_t dy

In float32 on a CPU with AVX-512 they are csrc/products.hpp: MKL keeps to AVX2 on processors that are not Intel's, at
half the speed. The choice depends on the processor, dtypes and shapes alone, and the products are the same bits for any
number of threads, so that a resumed run repeats its steps. Everything else is PyTorch's.
Shapes: T tokens, D inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.kernels import cpu_head

MIN_TOKENS = 32  # below, packing W costs more than it saves


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (N, D), (N,) -> (..., N): what `linear` computes, in plain PyTorch."""
    return F.linear(x, weight, bias)


def is_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether C++ computes these products."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(
            type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32
            for t in tensors
        )
        and weight.ndim == 2
        and weight.numel() > 0
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and (bias is None or bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu")
        and cpu_head.supported(torch.float32)
    )


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), contiguous within a row."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        from r1fast import _C

        ctx.save_for_backward(x, weight)
        rows, w = _rows(x), _rows(weight)
        b = None if bias is None else bias.contiguous()
        y = cpu_head.empty((*x.shape[:-1], len(w)), torch.float32)
        _C.linear_forward(
            *_matrix(rows), len(rows), *_matrix(w), *w.shape, 0 if b is None else b.data_ptr(),
            y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        from r1fast import _C

        x, weight = ctx.saved_tensors
        dy, dx, dweight, dbias = _rows(dy), None, None, None
        if ctx.needs_input_grad[0]:
            dx, w = cpu_head.empty(x.shape, torch.float32), _rows(weight)
            _C.linear_dx(
                *_matrix(dy), len(dy), *_matrix(w), *w.shape, dx.data_ptr(), torch.get_num_threads()
            )
        if ctx.needs_input_grad[1]:
            dweight, rows = torch.empty(weight.shape, dtype=torch.float32), _rows(x)
            _C.linear_dweight(
                *_matrix(dy), len(dy), *_matrix(rows), *weight.shape, dweight.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (N, D), (N,) -> (..., N). Differentiable once where C++ computes it."""
    if is_native(x, weight, bias):
        return LinearFunction.apply(x, weight, bias)
    return linear_ref(x, weight, bias)
