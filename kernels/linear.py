"""A linear layer's three products, of 2 T D N FLOP each.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum_t dy

In float32 on a CPU with AVX-512 or AVX2 they are csrc/products.hpp: MKL keeps to AVX2 on processors that are not
Intel's, at half the speed of AVX-512; on Intel's it is a tenth faster (a fifth at 64 tokens), with bits that depend on
the threads and on the rows beside; on AVX2 both are as fast, from some more tokens on. In bfloat16 the first is
csrc/linear.hpp, which samples: what training computes is then what was sampled, and an oneDNN product, as exact but summed
in another order, is on the other side of a rounding now and then. dx, dW and a y of an odd D are PyTorch's in bfloat16, but
where it multiplies in plain loops (AVX2 alone: 3 GFLOP/s a core where float32 has 100): there they are the float32 products
of the widened factors, rounded once. The choice depends on the processor, dtypes and shapes alone, and the products of C++
are the same bits for any number of threads, so that a resumed run repeats its steps. Everything else is PyTorch's.
Shapes: T tokens, D inputs, N outputs.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast.kernels import cpu_head
from r1fast.kernels.rows import as_rows, matrix

MIN_TOKENS = {"avx512": 32, "avx2": 192}  # below, packing W costs more than it saves
WIDEN_TOKENS = 16  # below, PyTorch's loops over bfloat16 are as fast for y
SLAB = 1 << 20  # elements of W or dW that are widened at a time, so that they stay in the cache


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


@cache
def has_bf16_products() -> bool:
    """Whether PyTorch multiplies bfloat16 by oneDNN here, and oneDNN by instructions for it (AVX512-BF16, AMX,
    AVX2-VNNI-2, or Arm's).

    On AVX-512 without them oneDNN takes bfloat16 all the same, two to five times slower than float32.
    ONEDNN_MAX_CPU_ISA counts where it leaves out AVX-512, a oneDNN that is switched off later does not. No oneDNN, no
    such question.
    """
    name = "_is_mkldnn_bf16_supported"
    if not hasattr(torch.ops.mkldnn, name) or not getattr(torch.ops.mkldnn, name)():
        return False
    return not torch.cpu._is_avx512_supported() or torch.cpu._is_avx512_bf16_supported()


def is_widened(*factors: Tensor) -> bool:
    """Whether the product is taken in float32, as PyTorch would be slow: two to five times on AVX-512, twenty and more on AVX2."""
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in factors)
        and all(t.is_cpu and t.dtype == torch.bfloat16 for t in factors)
        and not has_bf16_products()
    )


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
        factors = (x, weight) if bias is None else (x, weight, bias)
        if x.numel() < WIDEN_TOKENS * x.shape[-1] or not is_widened(*factors):
            return F.linear(x, weight, bias)
        wide, y = x.float(), x.new_empty(*x.shape[:-1], len(weight))
        height = _slab(weight.shape[1])
        biases = [None] * len(weight.split(height)) if bias is None else bias.split(height)
        for part, rows, b in zip(y.split(height, -1), weight.split(height), biases, strict=True):
            part.copy_(linear_fwd(wide, rows.float(), None if b is None else b.float()))
        return y
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
    if is_widened(dy, weight):
        wide, dx = dy.float(), dy.new_empty(*dy.shape[:-1], weight.shape[1])
        width = _slab(len(weight))
        for part, columns in zip(dx.split(width, -1), weight.split(width, 1), strict=True):
            part.copy_(linear_dx(wide, columns.float()))
        return dx
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
    if is_widened(dy, x):
        wide, height = x.float(), _slab(x.shape[1])
        for part, columns in zip(dweight.split(height), dy.split(height, 1), strict=True):
            part.copy_(linear_dweight(columns.float(), wide))
        return dweight
    if not is_native(x, dweight) or dy.dtype != x.dtype:
        return torch.mm(dy.t(), x, out=dweight)
    from r1fast import _C

    dy, x = as_rows(dy), as_rows(x)
    _C.linear_dweight(
        *matrix(dy), len(dy), *matrix(x), *dweight.shape, dweight.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return dweight


def add_product_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y (T, N) + a (T, R) b (R, N) in place, rounded once. For a small R."""
    if is_widened(y, a, b):
        return y.copy_(torch.addmm(y.float(), a.float(), b.float()))
    return y.addmm_(a, b)


def _slab(length: int) -> int:
    """Rows or columns of this length that are widened at a time: whole vectors."""
    return max(16, SLAB // max(1, length) // 16 * 16)


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
        dy = dy.reshape(-1, dy.shape[-1])
        dweight = linear_dweight(dy, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., D), (N, D), (N,) -> (..., N). Differentiable once where C++ computes it, or PyTorch's gradients are slow."""
    is_own = is_native(x, weight, bias) or is_sampled(x, weight, bias) or is_widened(x, weight)
    if is_own and not torch.is_autocast_enabled("cpu"):
        return LinearFunction.apply(x, weight, bias)
    return linear_ref(x, weight, bias)
