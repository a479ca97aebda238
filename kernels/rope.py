"""The heads of a token: queries and keys out of one product, normed where the model norms them, and rotated.

    n = x r w  or  x                               r = (mean(x^2) + eps)^(-1/2) over a head
    y1 = n1 cos - n2 sin    y2 = n2 cos + n1 sin    n = (n1, n2), the halves of a head

and backward the rotation by the opposite angle, then rms_norm.py's. Values pass: v is a view of the product, and its gradient is
copied beside those of q and k, so that the product's gradient is written once. Memory-bound: it reads and writes (H + K) Dh
numbers a token, backward twice that. Below float32 it rounds n, cos, sin and n cos, as PyTorch does.
Shapes: T tokens, H query heads, K kv heads, Dh head width.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels import cpu_head
from r1fast.kernels.dispatch import Backend, block_backend
from r1fast.kernels.rows import matrix

MAX_PROGRAMS = (
    512  # of the backward where there are norms; each sums their gradients over its tokens
)
BLOCK_H = 8
MAX_NATIVE_DIM = 1024


def rotate_ref(x: Tensor, rotations: Tensor) -> Tensor:
    """(T, H, Dh), (T, 2 Dh) -> (T, H, Dh)"""
    cos, sin = rotations.to(x.dtype)[:, None].chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((x2, x1), dim=-1), sin)


def rope_ref(
    qkv: Tensor,
    rotations: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `rope` computes, in plain PyTorch."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q, k = (F.rms_norm(x, w.shape, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    return rotate_ref(q, rotations), rotate_ref(k, rotations), v


@triton.jit
def _rope_fwd_kernel(
    qkv_ptr, rotations_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, stride, H, K, half, eps,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token; tiles of heads by half a head."""
    t = tl.program_id(0).to(tl.int64)
    Dh = 2 * half
    dtype = q_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    inside = d < half
    at = rotations_ptr + t * 2 * Dh + d
    cos = tl.load(at, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin = tl.load(at + Dh + half, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
    if NORM:
        q1 = tl.load(q_weight_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        q2 = tl.load(q_weight_ptr + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k1 = tl.load(k_weight_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k2 = tl.load(k_weight_ptr + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    for first in range(0, H + K, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        is_query = (h < H)[:, None]
        mask = (h < H + K)[:, None] & inside[None, :]
        x_ptr = qkv_ptr + t * stride + h[:, None] * Dh + d[None, :]
        x1 = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + half, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            r = 1 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / Dh + eps)[:, None]
            x1 = (x1 * r * tl.where(is_query, q1, k1)).to(dtype).to(tl.float32)
            x2 = (x2 * r * tl.where(is_query, q2, k2)).to(dtype).to(tl.float32)
        y1 = ((x1 * cos).to(dtype).to(tl.float32) - x2 * sin).to(dtype)
        y2 = ((x2 * cos).to(dtype).to(tl.float32) + x1 * sin).to(dtype)
        to_q = q_ptr + (t * H + h[:, None]) * Dh + d[None, :]
        to_k = k_ptr + (t * K + h[:, None] - H) * Dh + d[None, :]
        tl.store(to_q, y1, mask=mask & is_query)
        tl.store(to_q + half, y2, mask=mask & is_query)
        tl.store(to_k, y1, mask=mask & (h >= H)[:, None])
        tl.store(to_k + half, y2, mask=mask & (h >= H)[:, None])


@triton.jit
def _rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, rotations_ptr, q_weight_ptr, k_weight_ptr, dqkv_ptr,
    dweight_ptr, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride,
    T, H, K, half, tokens_per_program, eps,
    NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dqkv of some tokens, and their share of the weights' gradients as one row of dweight."""
    program = tl.program_id(0).to(tl.int64)
    Dh = 2 * half
    dtype = dqkv_ptr.dtype.element_ty
    d = tl.arange(0, BLOCK_D)
    inside = d < half
    if NORM:
        q1 = tl.load(q_weight_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        q2 = tl.load(q_weight_ptr + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k1 = tl.load(k_weight_ptr + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k2 = tl.load(k_weight_ptr + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        dq1 = tl.zeros((BLOCK_D,), tl.float32)
        dq2 = tl.zeros((BLOCK_D,), tl.float32)
        dk1 = tl.zeros((BLOCK_D,), tl.float32)
        dk2 = tl.zeros((BLOCK_D,), tl.float32)
    begin = program * tokens_per_program
    for t in range(begin, tl.minimum(begin + tokens_per_program, T)):
        at = rotations_ptr + t * 2 * Dh + d
        cos = tl.load(at, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
        sin = tl.load(at + Dh + half, mask=inside, other=0.0).to(dtype).to(tl.float32)[None, :]
        for first in range(0, H + 2 * K, BLOCK_H):
            h = (first + tl.arange(0, BLOCK_H))[:, None]
            mask = (h < H + 2 * K) & inside[None, :]
            is_query = h < H
            is_key = (h >= H) & (h < H + K)
            is_value = h >= H + K
            from_q = dq_ptr + t * stride_qt + h * stride_qh + d[None, :]
            from_k = dk_ptr + t * stride_kt + (h - H) * stride_kh + d[None, :]
            from_v = dv_ptr + t * stride_vt + (h - H - K) * stride_vh + d[None, :]
            y1 = tl.load(from_q, mask=mask & is_query, other=0.0).to(tl.float32)
            y2 = tl.load(from_q + half, mask=mask & is_query, other=0.0).to(tl.float32)
            y1 += tl.load(from_k, mask=mask & is_key, other=0.0).to(tl.float32)
            y2 += tl.load(from_k + half, mask=mask & is_key, other=0.0).to(tl.float32)
            v1 = tl.load(from_v, mask=mask & is_value, other=0.0).to(tl.float32)
            v2 = tl.load(from_v + half, mask=mask & is_value, other=0.0).to(tl.float32)
            x1 = y1 * cos + y2 * sin
            x2 = y2 * cos - y1 * sin
            if NORM:
                x_ptr = qkv_ptr + t * stride + h * Dh + d[None, :]
                is_normed = mask & (h < H + K)
                a1 = tl.load(x_ptr, mask=is_normed, other=0.0).to(tl.float32)
                a2 = tl.load(x_ptr + half, mask=is_normed, other=0.0).to(tl.float32)
                w1 = tl.where(is_query, q1, k1)
                w2 = tl.where(is_query, q2, k2)
                r = 1 / tl.sqrt((tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)) / Dh + eps)[:, None]
                c = (tl.sum(x1 * w1 * a1, 1) + tl.sum(x2 * w2 * a2, 1))[:, None] / Dh * r * r
                g1 = x1 * a1 * r
                g2 = x2 * a2 * r
                dq1 += tl.sum(tl.where(is_query, g1, 0.0), 0)
                dq2 += tl.sum(tl.where(is_query, g2, 0.0), 0)
                dk1 += tl.sum(tl.where(is_key, g1, 0.0), 0)
                dk2 += tl.sum(tl.where(is_key, g2, 0.0), 0)
                x1 = r * (x1 * w1 - a1 * c)
                x2 = r * (x2 * w2 - a2 * c)
            to = dqkv_ptr + (t * (H + 2 * K) + h) * Dh + d[None, :]
            tl.store(to, tl.where(is_value, v1, x1).to(dtype), mask=mask)
            tl.store(to + half, tl.where(is_value, v2, x2).to(dtype), mask=mask)
    if NORM:
        to_dw = dweight_ptr + program * 2 * Dh + d
        tl.store(to_dw, dq1, mask=inside)
        tl.store(to_dw + half, dq2, mask=inside)
        tl.store(to_dw + Dh, dk1, mask=inside)
        tl.store(to_dw + Dh + half, dk2, mask=inside)


def _blocks(Dh: int) -> dict[str, int]:
    BLOCK_D = triton.next_power_of_2(Dh // 2)
    return {"BLOCK_H": BLOCK_H, "BLOCK_D": BLOCK_D, "num_warps": min(max(BLOCK_D // 32, 1), 8)}


def _fwd_triton(qkv, rotations, H, K, q_weight, k_weight, eps):
    T, Dh = len(qkv), rotations.shape[1] // 2
    q, k = qkv.new_empty(T, H, Dh), qkv.new_empty(T, K, Dh)
    weights = (qkv, qkv) if q_weight is None else (q_weight, k_weight)
    if T:
        with torch.cuda.device_of(qkv):
            _rope_fwd_kernel[(T,)](
                qkv, rotations, *weights, q, k, qkv.stride(0), H, K, Dh // 2, eps,
                NORM=q_weight is not None, **_blocks(Dh),
            )  # fmt: skip
    return q, k


def _bwd_triton(dq, dk, dv, qkv, rotations, H, K, q_weight, k_weight, eps):
    T, Dh, NORM = len(dq), rotations.shape[1] // 2, q_weight is not None
    tokens = triton.cdiv(max(T, 1), MAX_PROGRAMS) if NORM else 1
    programs = triton.cdiv(T, tokens)
    dqkv = dq.new_empty(T, (H + 2 * K) * Dh)
    dweight = torch.empty(programs, 2 * Dh, device=dq.device, dtype=torch.float32) if NORM else None
    x, weights = (qkv, (q_weight, k_weight)) if NORM else (dqkv, (dqkv, dqkv))
    strides = (s for g in (dq, dk, dv) for s in g.stride()[:2])
    if T:
        with torch.cuda.device_of(dq):
            _rope_bwd_kernel[(programs,)](
                dq, dk, dv, x, rotations, *weights, dqkv, dweight if NORM else dqkv, *strides,
                x.stride(0), T, H, K, Dh // 2, tokens, eps, NORM=NORM, **_blocks(Dh),
            )  # fmt: skip
    if not NORM:
        return dqkv, None, None
    return dqkv, *dweight.sum(0).to(q_weight.dtype).chunk(2)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _fwd_native(qkv, rotations, H, K, q_weight, k_weight, eps):
    from r1fast import _C

    T, Dh = len(qkv), rotations.shape[1] // 2
    q, k = (cpu_head.empty((T, n, Dh), qkv.dtype) for n in (H, K))
    _C.rope_forward(
        *matrix(qkv), rotations.data_ptr(), _address(q_weight), _address(k_weight), eps, T, H, K,
        Dh, qkv.dtype == torch.bfloat16, q.data_ptr(), k.data_ptr(), "auto",
        torch.get_num_threads(),
    )  # fmt: skip
    return q, k


def _bwd_native(dq, dk, dv, qkv, rotations, H, K, q_weight, k_weight, eps):
    from r1fast import _C

    T, Dh = len(dq), rotations.shape[1] // 2
    dqkv = cpu_head.empty((T, (H + 2 * K) * Dh), dq.dtype)
    dweight = None if q_weight is None else q_weight.new_empty(2, Dh)
    _C.rope_backward(
        *((g.data_ptr(), *g.stride()[:2]) for g in (dq, dk, dv)),
        *((0, 0) if qkv is None else matrix(qkv)), rotations.data_ptr(), _address(q_weight),
        _address(k_weight), eps, T, H, K, Dh, dq.dtype == torch.bfloat16, dqkv.data_ptr(),
        _address(dweight), "auto", torch.get_num_threads(),
    )  # fmt: skip
    return dqkv, *((None, None) if dweight is None else dweight)


FORWARD = {"triton": _fwd_triton, "native": _fwd_native}
BACKWARD = {"triton": _bwd_triton, "native": _bwd_native}


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, rotations, q_weight, k_weight, num_heads, num_kv_heads, eps, backend):
        ctx.heads, ctx.eps, ctx.backend = (num_heads, num_kv_heads), eps, backend
        rotations = rotations.contiguous()
        x = qkv if qkv.stride(1) == 1 else qkv.contiguous()
        weights = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
        q_weight, k_weight = weights
        q, k = FORWARD[backend](x, rotations, *ctx.heads, q_weight, k_weight, eps)
        # the product is read again by a norm's gradient alone
        ctx.save_for_backward(None if q_weight is None else x, rotations, q_weight, k_weight)
        v = x.unflatten(1, (num_heads + 2 * num_kv_heads, -1))[:, num_heads + num_kv_heads :]
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        qkv, rotations, *weights = ctx.saved_tensors
        grads = (g if g.stride(2) == 1 else g.contiguous() for g in (dq, dk, dv))
        dqkv, *dweights = BACKWARD[ctx.backend](
            *grads, qkv, rotations, *ctx.heads, *weights, ctx.eps
        )
        return dqkv, None, *dweights, None, None, None, None


def rope(
    qkv: Tensor,  # (T, (H + 2 K) Dh)
    rotations: Tensor,  # (T, 2 Dh) float32: cos twice, then sin with its first half negated
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None = None,  # (Dh,) of the norms, both or none
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # q (T, H, Dh), k (T, K, Dh), v (T, K, Dh)
    """v is a view of qkv. Differentiable once where a kernel computes it."""
    assert rotations.dtype == torch.float32, rotations.dtype
    assert qkv.shape == (len(rotations), (num_heads + 2 * num_kv_heads) * (rotations.shape[1] // 2))
    weights = () if q_weight is None else (q_weight, k_weight)
    chosen = block_backend(backend, qkv, *weights)
    if chosen == "native" and rotations.shape[1] > 2 * MAX_NATIVE_DIM:
        chosen = "torch"
    args = (qkv, rotations, num_heads, num_kv_heads, q_weight, k_weight, eps)
    if chosen == "torch":
        return rope_ref(*args)
    qkv, rotations, H, K, q_weight, k_weight, eps = args
    return RopeFunction.apply(qkv, rotations, q_weight, k_weight, H, K, eps, chosen)
