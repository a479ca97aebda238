"""The gate of a decoder's MLP: y = silu(g) u of the two halves of one product.

    silu(g) = g p    p = 1 / (1 + exp(-g))    du = dy silu(g)    dg = dy u p (1 + g (1 - p))

Memory-bound: it reads 2 F numbers and writes F a token; backward reads 3 F and writes 2 F. Only g and u are kept for it:
silu(g) is computed again. Arithmetic in float32; below float32 silu(g) is rounded, as PyTorch rounds it.
Shapes: T tokens, F MLP width.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels import cpu_head
from r1fast.kernels.dispatch import Backend, block_backend
from r1fast.kernels.rows import as_rows, matrix

BLOCK_F = 1024


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F): what `swiglu` computes, in plain PyTorch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, y_ptr, stride, width, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < width
    g = tl.load(gate_up_ptr + row * stride + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + row * stride + width + f, mask=mask, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + f, (silu * u).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_up_ptr, dgate_up_ptr, stride_dy, stride, width, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < width
    dy = tl.load(dy_ptr + row * stride_dy + f, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate_up_ptr + row * stride + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + row * stride + width + f, mask=mask, other=0.0).to(tl.float32)
    p = 1 / (1 + tl.exp(-g))
    at = dgate_up_ptr + row * 2 * width + f
    dtype = dgate_up_ptr.dtype.element_ty
    tl.store(at, (dy * u * (p * (1 + g * (1 - p)))).to(dtype), mask=mask)
    tl.store(at + width, (dy * (g * p)).to(dtype), mask=mask)


def _fwd_triton(gate_up, width):
    y = gate_up.new_empty(len(gate_up), width)
    if y.numel():
        with torch.cuda.device_of(y):
            grid = len(y), triton.cdiv(width, BLOCK_F)
            _swiglu_fwd_kernel[grid](gate_up, y, gate_up.stride(0), width, BLOCK_F=BLOCK_F)
    return y


def _bwd_triton(dy, gate_up, width):
    dgate_up = gate_up.new_empty(gate_up.shape)
    if dy.numel():
        with torch.cuda.device_of(dy):
            grid = len(dy), triton.cdiv(width, BLOCK_F)
            _swiglu_bwd_kernel[grid](
                dy, gate_up, dgate_up, dy.stride(0), gate_up.stride(0), width, BLOCK_F=BLOCK_F
            )
    return dgate_up


def _fwd_native(gate_up, width):
    from r1fast import _C

    y = cpu_head.empty((len(gate_up), width), gate_up.dtype)
    _C.swiglu_forward(
        *matrix(gate_up), *y.shape, y.dtype == torch.bfloat16, y.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _bwd_native(dy, gate_up, width):
    from r1fast import _C

    dgate_up = cpu_head.empty(gate_up.shape, gate_up.dtype)
    _C.swiglu_backward(
        *matrix(dy), *matrix(gate_up), len(dy), width, dy.dtype == torch.bfloat16,
        dgate_up.data_ptr(), "auto", torch.get_num_threads(),
    )  # fmt: skip
    return dgate_up


FORWARD = {"triton": _fwd_triton, "native": _fwd_native}
BACKWARD = {"triton": _bwd_triton, "native": _bwd_native}


class SwigluFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, backend):
        ctx.backend = backend
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        return FORWARD[backend](as_rows(gate_up), width).view(*gate_up.shape[:-1], width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        dgate_up = BACKWARD[ctx.backend](as_rows(dy), as_rows(gate_up), dy.shape[-1])
        return dgate_up.view(gate_up.shape), None


def swiglu(gate_up: Tensor, *, backend: Backend = "auto") -> Tensor:  # (..., 2 F) -> (..., F)
    """Differentiable once where a kernel computes it."""
    chosen = block_backend(backend, gate_up)
    if chosen == "torch":
        return swiglu_ref(gate_up)
    return SwigluFunction.apply(gate_up, chosen)
