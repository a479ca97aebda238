"""RMS norm over the last dimension, alone or after a residual sum, in float32 arithmetic whatever the dtype.

    s = x + delta    y = s r w               r = (mean(s^2) + eps)^(-1/2)
    ds = ds' + r (dy w - s r^2 c)            c = mean(dy w s), ds' the gradient of s by itself
    dw = sum_t dy s r                        dx = ddelta = ds

Memory-bound: it reads x and delta and writes s and y, once each; backward reads dy, ds' and s and writes ds. r is computed
again from s. A chain of PyTorch ops makes three times the passes. dw is summed over blocks of rows, then over the blocks.
Shapes: T rows, D width.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels import cpu_head
from r1fast.kernels.dispatch import Backend, block_backend
from r1fast.kernels.rows import as_rows, matrix

MAX_PROGRAMS = 512  # of the backward; each sums dw over its rows


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., D), (D,) -> (..., D): what `rms_norm` computes, in plain PyTorch."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_norm_ref(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `add_rms_norm` computes, in plain PyTorch."""
    s = x + delta
    return rms_norm_ref(s, weight, eps), s


@triton.jit
def _norm_fwd_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, stride_x, stride_delta, D, eps,
    HAS_DELTA: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    x = tl.load(x_ptr + row * stride_x + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * stride_delta + d, mask=mask, other=0.0).to(tl.float32)
        s = (x + delta).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + d, s, mask=mask)
        x = s.to(tl.float32)  # as it is read later
    r = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    w = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + d, (x * r * w).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, ds_ptr, s_ptr, weight_ptr, dx_ptr, dweight_ptr, stride_dy, stride_ds, stride_s,
    T, D, rows_per_program, eps, HAS_DS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of some rows, and their share of dw as one row of dweight."""
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < D
    w = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_D,), tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, T)):
        dy = tl.load(dy_ptr + row * stride_dy + d, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + row * stride_s + d, mask=mask, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
        c = tl.sum(dy * w * s, 0) / D * r * r
        dx = r * (dy * w - s * c)
        if HAS_DS:
            dx += tl.load(ds_ptr + row * stride_ds + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * s * r
    tl.store(dweight_ptr + program * D + d, dw, mask=mask)


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def _fwd_triton(x, delta, weight, eps):
    (T, D), BLOCK_D = x.shape, triton.next_power_of_2(x.shape[1])
    y, s = torch.empty_like(x, memory_format=torch.contiguous_format), x
    if delta is not None:
        s = torch.empty_like(y)
    other = x if delta is None else delta
    if T:
        with torch.cuda.device_of(x):
            _norm_fwd_kernel[(T,)](
                x, other, weight, s, y, x.stride(0), other.stride(0), D, eps,
                HAS_DELTA=delta is not None, BLOCK_D=BLOCK_D, num_warps=_num_warps(BLOCK_D),
            )  # fmt: skip
    return y, s


def _bwd_triton(dy, ds, s, weight, eps):
    (T, D), BLOCK_D = s.shape, triton.next_power_of_2(s.shape[1])
    rows = triton.cdiv(max(T, 1), MAX_PROGRAMS)
    programs = triton.cdiv(T, rows)
    dx = torch.empty_like(s, memory_format=torch.contiguous_format)
    dweight = torch.empty(programs, D, device=s.device, dtype=torch.float32)
    other = dy if ds is None else ds
    if T:
        with torch.cuda.device_of(s):
            _norm_bwd_kernel[(programs,)](
                dy, other, s, weight, dx, dweight, dy.stride(0), other.stride(0), s.stride(0), T, D,
                rows, eps, HAS_DS=ds is not None, BLOCK_D=BLOCK_D, num_warps=_num_warps(BLOCK_D),
            )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


def _fwd_native(x, delta, weight, eps):
    from r1fast import _C

    y, s = cpu_head.empty(x.shape, x.dtype), x
    if delta is not None:
        s = cpu_head.empty(x.shape, x.dtype)
    _C.norm_forward(
        *matrix(x), *((0, 0) if delta is None else matrix(delta)), weight.data_ptr(), eps,
        *x.shape, x.dtype == torch.bfloat16, s.data_ptr(), y.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return y, s


def _bwd_native(dy, ds, s, weight, eps):
    from r1fast import _C

    dx, dweight = cpu_head.empty(s.shape, s.dtype), torch.empty_like(weight)
    _C.norm_backward(
        *matrix(dy), *((0, 0) if ds is None else matrix(ds)), *matrix(s), weight.data_ptr(), eps,
        *s.shape, s.dtype == torch.bfloat16, dx.data_ptr(), dweight.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight


FORWARD = {"triton": _fwd_triton, "native": _fwd_native}
BACKWARD = {"triton": _bwd_triton, "native": _bwd_native}


class RMSNormFunction(torch.autograd.Function):
    """(x, delta or None) -> y, s"""

    @staticmethod
    def forward(ctx, x, delta, weight, eps, backend):
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.backend, shape = eps, backend, x.shape
        x, weight = as_rows(x), weight.contiguous()
        delta = None if delta is None else as_rows(delta)
        y, s = FORWARD[backend](x, delta, weight, eps)
        ctx.save_for_backward(s, weight)
        return y.view(shape), None if delta is None else s.view(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, ds):
        if dy is None:
            return ds, ds, None, None, None
        s, weight = ctx.saved_tensors
        shape = dy.shape
        dy, ds = as_rows(dy), None if ds is None else as_rows(ds)
        dx, dweight = BACKWARD[ctx.backend](dy, ds, s, weight, ctx.eps)
        dx = dx.view(shape)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None, None


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    *,
    backend: Backend = "auto",
) -> Tensor:  # (..., D)
    """Differentiable in both, once where a kernel computes it."""
    chosen = block_backend(backend, x, weight)
    if chosen == "torch":
        return F.rms_norm(x, weight.shape, weight, eps)
    return RMSNormFunction.apply(x, None, weight, eps, chosen)[0]


def add_rms_norm(
    x: Tensor,  # (..., D)
    delta: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The norm of x + delta, and x + delta."""
    chosen = block_backend(backend, x, delta, weight)
    if chosen == "torch" or x.shape != delta.shape:
        s = x + delta
        return F.rms_norm(s, weight.shape, weight, eps), s
    return RMSNormFunction.apply(x, delta, weight, eps, chosen)
