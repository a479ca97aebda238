"""A linear layer's three products, of 2 T D N FLOP each.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum_t dy

In float32 on a CPU with AVX-512 or AVX2 they are csrc/products.hpp: MKL keeps to AVX2 on processors that are not
Intel's, at half the speed of AVX-512; on AVX2 both are as fast, from some more tokens on. In bfloat16 the first is
csrc/linear.hpp, which samples: what training computes is then what was sampled, and an oneDNN product, as exact but summed in another order, is on the other side of a rounding now and then. The choice
depends on the processor, dtypes and shapes alone, and the products are the same bits for any number of threads, so that a
resumed run repeats its steps. Everything else is PyTorch's.
Shapes: T tokens, D inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.kernels import cpu_head
from r1fast.kernels.rows import as_rows, matrix

MIN_TOKENS = {"avx512": 32, "avx2": 192}  # below, packing W costs more than it saves


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (N, D), (N,) -> (..., N): what `linear` computes, in plain PyTorch."""
    return F.linear(x, weight, bias)


def is_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether C++ computes the products of x (..., D), or of its gradient, with W: all of them."""
    if not _fits(x, weight, bias, torch.float32):
        return False
    return x.numel() >= MIN_TOKENS[cpu_head.native_level(torch.float32)] * x.shape[-1]


def is_sampled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether C++ computes y by the sampler's own sums, in bfloat16."""
    return _fits(x, weight, bias, torch.bfloat16) and x.shape[-1] % 2 == 0 and x.numel() > 0


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and all(t.is_cpu and t.dtype == dtype for t in tensors)
        and weight.ndim == 2
        and weight.numel() > 0
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and cpu_head.supported(dtype)
    )


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (..., N), without autograd, as what follows."""
    native = is_native(x, weight, bias)
    if not native and not is_sampled(x, weight, bias):
        return F.linear(x, weight, bias)
    from r1fast import _C

    rows, weight = as_rows(x), as_rows(weight)
    bias = None if bias is None else bias.contiguous()
    y = cpu_head.empty((*x.shape[:-1], len(weight)), x.dtype)
    product = _C.linear_forward if native else _C.linear_forward_bf16
    product(
        *matrix(rows), len(rows), *matrix(weight), *weight.shape,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def linear_dx(dy: Tensor, weight: Tensor) -> Tensor:
    """dx (..., D)"""
    if not is_native(dy, weight.t()):
        return dy @ weight
    from r1fast import _C

    rows, weight = as_rows(dy), as_rows(weight)
    dx = cpu_head.empty((*dy.shape[:-1], weight.shape[1]), torch.float32)
    _C.linear_dx(
        *matrix(rows), len(rows), *matrix(weight), *weight.shape, dx.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return dx


def linear_dweight(dy: Tensor, x: Tensor) -> Tensor:
    """dW (N, D), of dy (T, N) and x (T, D)."""
    dweight = dy.new_empty(dy.shape[1], x.shape[1])
    if not is_native(x, dweight) or dy.dtype != x.dtype:
        return torch.mm(dy.t(), x, out=dweight)
    from r1fast import _C

    dy, x = as_rows(dy), as_rows(x)
    _C.linear_dweight(
        *matrix(dy), len(dy), *matrix(x), *dweight.shape, dweight.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return dweight


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear_fwd(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = linear_dx(dy, weight) if needs_x else None
        dy = dy.flatten(0, -2)
        dweight = linear_dweight(dy, x.flatten(0, -2)) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (N, D), (N,) -> (..., N). Differentiable once where C++ computes it."""
    in_cpp = is_native(x, weight, bias) or is_sampled(x, weight, bias)
    if in_cpp and not torch.is_autocast_enabled("cpu"):
        return LinearFunction.apply(x, weight, bias)
    return linear_ref(x, weight, bias)
