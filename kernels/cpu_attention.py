"""Attention of training in C++ (csrc/training_attention.hpp): float32 and bfloat16 on the CPU, any head width.

The formulas are in prefix_attention.py. 4 * H * Dh FLOPs a pair of query and key forward, 2.5x that backward, with all
sums in float32. A row of the output and its gradient dq are the same bits whatever else is in the
batch, and the output's are those of decode (paged_attention.py), which samples; everything is for any number
of threads. What is kept for the backward is q, k, v, the output
(in float32) and of each row the largest score and 1 / sum exp(s - max).
Shapes: T packed tokens, S segments, H query heads, K kv heads, Dh head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Who sees whom in one packed batch, as C++ reads it; made once, shared by every layer."""

    bounds: Tensor  # (S + 1,) int64, from 0 to T
    prefix_of: Tensor | None  # (S,) int64, -1: none; None where no segment continues another

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])


def plan_segments(
    bounds: Tensor | Sequence[int],  # (S + 1,)
    prefix_of: Sequence[int] | None = None,  # (S,) as plan_prefixes takes it
) -> SegmentPlan:
    bounds = torch.as_tensor(bounds).to("cpu", torch.int64).contiguous()
    assert bounds[0] == 0, bounds
    assert (bounds.diff() >= 0).all(), bounds
    if prefix_of is None:
        return SegmentPlan(bounds, None)
    prefixes = torch.tensor(prefix_of, dtype=torch.int64)
    assert len(bounds) == len(prefixes) + 1, (len(bounds), len(prefixes))
    assert (prefixes < torch.arange(len(prefixes))).all(), prefix_of
    assert (prefixes[prefixes[prefixes >= 0]] < 0).all(), prefix_of  # a prefix has none itself
    return SegmentPlan(bounds, prefixes)


@cache
def level() -> str:
    """avx512, avx2 or baseline: what this machine's C++ has, or what R1FAST_CPU_LEVEL asks for."""
    from r1fast import _C

    return _C.cpu_level()


def uses_native(q: Tensor) -> bool:
    """Where it was measured to be faster than PyTorch: on every shape, but not without AVX2."""
    return q.is_cpu and q.dtype in DTYPES and level() != "baseline"


def _rows(x: Tensor) -> Tensor:
    """x (T, heads, Dh), copied unless heads lie side by side and elements too."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class NativeAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, level):
        from r1fast import _C

        q, k, v = _rows(q), _rows(k), _rows(v)
        T, H, Dh = q.shape
        is_half = q.dtype == torch.bfloat16
        out = q.new_empty(T, H, Dh)
        keep = any(ctx.needs_input_grad)
        wide = q.new_empty(T, H, Dh, dtype=torch.float32) if is_half and keep else None
        m, share = q.new_empty(2, T, H, dtype=torch.float32)
        _C.attention_forward(
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            is_half, H, k.shape[1], Dh, scale,
            plan.bounds.data_ptr(), _address(plan.prefix_of), len(plan.bounds) - 1,
            out.data_ptr(), _address(wide), m.data_ptr(), share.data_ptr(), level, torch.get_num_threads(),
        )  # fmt: skip
        ctx.plan, ctx.scale, ctx.level = plan, scale, level
        ctx.save_for_backward(q, k, v, wide if is_half else out, m, share)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        from r1fast import _C

        q, k, v, wide, m, share = ctx.saved_tensors
        plan, dout = ctx.plan, _rows(dout)
        (_, H, Dh), K = q.shape, k.shape[1]
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        _C.attention_backward(
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
            q.dtype == torch.bfloat16, H, K, Dh, ctx.scale,
            plan.bounds.data_ptr(), _address(plan.prefix_of), len(plan.bounds) - 1,
            wide.data_ptr(), m.data_ptr(), share.data_ptr(), dout.data_ptr(), dout.stride(0),
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), ctx.level, torch.get_num_threads(),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def native_attention(
    q: Tensor,  # (T, H, Dh) float32 or bfloat16, on the CPU
    k: Tensor,  # (T, K, Dh), K divides H
    v: Tensor,  # (T, K, Dh)
    plan: SegmentPlan,
    scale: float | None = None,  # default Dh ** -0.5
    *,
    level: str = "auto",  # auto, baseline, avx2 or avx512
) -> Tensor:  # (T, H, Dh)
    """Exact causal attention within each segment and to all of its prefix; differentiable once."""
    assert q.dtype in DTYPES, q.dtype
    for x in (q, k, v):
        assert (x.device.type, x.dtype) == ("cpu", q.dtype), (x.device, x.dtype, q.dtype)
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape[2] == k.shape[2], (q.shape, k.shape)
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    assert plan.num_tokens == len(q) == len(k), (plan.num_tokens, len(q), len(k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return NativeAttentionFunction.apply(q, k, v, plan, scale, level)
