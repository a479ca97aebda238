"""Causal attention over packed segments, of which some continue another: a prompt, held once.

Segment s with prefix p sees the whole of p, then itself causally:

    o_i = sum_{j in p} softmax_j(scale * q_i . k_j) v_j + sum_{j in s, j <= i} ...    one softmax

On the CPU C++ computes both in one softmax (cpu_attention.py). In float64 and float16, and where it
is not the faster one, they are two calls of PyTorch's flash attention, merged by log-sum-exps:

    l = log(exp(l_p) + exp(l_s))        o = exp(l_p - l) o_p + exp(l_s - l) o_s

and the backward of each part, given o and l of the whole, is its share of the exact gradient: it
forms softmax = exp(scale * q . k - l) and delta = do . o, and looks at nothing else of the forward.
The prefix part is one call for all segments of a prefix, and its keys are not copied.

On a GPU each segment's keys are gathered, prefix first, for varlen attention with more keys than
queries (causal from the bottom right); the backward of the gather adds up over the segments.
About 4 * H * Dh FLOPs a pair of query and key forward, 3.5x that with the backward.
Shapes: T packed tokens, S segments, H query heads, K kv heads, Dh head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.attention import (
    Bucket,
    flash_varlen,
    gather_buckets,
    plan_buckets,
    scatter_buckets,
    uses_flash,
)
from r1fast.kernels.cpu_attention import (
    SegmentPlan,
    native_attention,
    plan_segments,
    uses_native,
)
from r1fast.kernels.gather_rows import RowGather, gather_rows, plan_gather

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_attention_ref(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (T, K, Dh)
    v: Tensor,  # (T, K, Dh)
    bounds: Sequence[int],
    prefix_of: Sequence[int],
    *,
    scale: float | None = None,
) -> Tensor:  # (T, H, Dh)
    """What `prefix_attention` computes, with a dense mask over the whole pack."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = torch.tensor([b - a for a, b in pairwise(bounds)], device=q.device)
    segment = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
    prefix = torch.tensor(prefix_of, device=q.device)[segment]
    order = torch.arange(len(q), device=q.device)
    own = (segment[:, None] == segment) & (order[:, None] >= order)
    visible = own | (prefix[:, None] == segment)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring segments of one prefix: query rows start..stop see prefix rows too."""

    prefix: slice
    queries: slice


@dataclass(frozen=True, slots=True)
class GatheredKeys:
    """Of each segment its prefix and itself, one after the other."""

    gather: RowGather
    bounds: list[int]  # (S + 1,) offsets into what is gathered
    cu_seqlens: Tensor  # (S + 1,) int32 on the device, of the queries
    cu_seqlens_k: Tensor  # and of the keys

    @property
    def max_seqlen(self) -> int:
        return max((b - a for a, b in pairwise(self.bounds)), default=0)


@dataclass(frozen=True)
class PrefixPlan:
    """Who sees whom in one packed batch, shared by every layer; made once, in the form that is asked for."""

    bounds: list[int]  # (S + 1,) rows of the segments, increasing from 0
    prefix_of: list[int]  # (S,) the segment before it, which has no prefix itself; -1: none
    device: torch.device
    gather: bool  # whether keys are gathered

    @property
    def max_seqlen(self) -> int:
        return max((b - a for a, b in pairwise(self.bounds)), default=0)

    @cached_property
    def segments(self) -> SegmentPlan:
        return plan_segments(self.bounds, self.prefix_of)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return plan_buckets(self.bounds)

    @cached_property
    def runs(self) -> list[Run]:
        runs: list[Run] = []
        for s, p in enumerate(self.prefix_of):
            if p < 0:
                continue
            prefix = slice(self.bounds[p], self.bounds[p + 1])
            queries = slice(self.bounds[s], self.bounds[s + 1])
            if runs and runs[-1].prefix == prefix and runs[-1].queries.stop == queries.start:
                queries = slice(runs.pop().queries.start, queries.stop)
            runs.append(Run(prefix, queries))
        return runs

    @cached_property
    def keys(self) -> GatheredKeys:
        rows, bounds = [], [0]
        for s, p in enumerate(self.prefix_of):
            if p >= 0:
                rows += range(self.bounds[p], self.bounds[p + 1])
            rows += range(self.bounds[s], self.bounds[s + 1])
            bounds.append(len(rows))
        cu_seqlens, cu_seqlens_k = (
            torch.tensor(x, dtype=torch.int32).to(self.device, non_blocking=True)
            for x in (self.bounds, bounds)
        )
        return GatheredKeys(plan_gather(rows, device=self.device), bounds, cu_seqlens, cu_seqlens_k)


def plan_prefixes(
    bounds: Sequence[int],
    prefix_of: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    gather: bool | None = None,  # default: everywhere but on the CPU
) -> PrefixPlan:
    assert len(bounds) == len(prefix_of) + 1, (len(bounds), len(prefix_of))
    for s, p in enumerate(prefix_of):
        assert p < 0 or (p < s and prefix_of[p] < 0), (s, p)
    device = torch.device(device)
    gather = device.type != "cpu" if gather is None else gather
    return PrefixPlan(list(bounds), list(prefix_of), device, gather)


def _heads_first(x: Tensor, group: int) -> Tensor:
    """(..., L, K, Dh) -> (B, group * K, L, Dh), as PyTorch's attention takes it."""
    x = x.transpose(-3, -2)
    x = x.repeat_interleave(group, dim=-3) if group > 1 else x
    return x if x.ndim == 4 else x[None]


def _heads_last(dx: Tensor, group: int) -> Tensor:
    """(B, group * K, L, Dh) -> (B, L, K, Dh): the heads that share a kv head are added up."""
    dx = dx.unflatten(1, (-1, group)).sum(2) if group > 1 else dx
    return dx.transpose(1, 2)


class PrefixAttentionFunction(torch.autograd.Function):
    """Both parts and their merge. Half precision is computed in float32 (attention.py says why)."""

    @staticmethod
    def forward(ctx, q, k, v, plan, scale):
        ctx.plan, ctx.scale, ctx.group = plan, scale, q.shape[1] // k.shape[1]
        wide = torch.promote_types(q.dtype, torch.float32)
        qw, kw, vw = (x.to(wide) for x in (q, k, v))
        outputs, sums = [], []
        for qb, kb, vb in zip(
            *(gather_buckets(x, plan.buckets) for x in (qw, kw, vw)), strict=True
        ):
            o, lse = _forward(
                _heads_first(qb, 1), _heads_first(kb, ctx.group), _heads_first(vb, ctx.group),
                0.0, True, scale=scale,
            )  # fmt: skip
            outputs.append(o.transpose(1, 2))
            sums.append(lse.transpose(1, 2)[..., None])
        out = scatter_buckets(outputs, plan.buckets, len(q))  # (T, H, Dh)
        lse = scatter_buckets(sums, plan.buckets, len(q))  # (T, H, 1)
        for run in plan.runs:
            o, lse_p = _forward(
                _heads_first(qw[run.queries], 1),
                _heads_first(kw[run.prefix], ctx.group),
                _heads_first(vw[run.prefix], ctx.group),
                scale=scale,
            )
            lse_p, lse_s = lse_p[0].mT[..., None], lse[run.queries]
            out[run.queries].lerp_(o[0].transpose(0, 1), (lse_p - lse_s).sigmoid_())
            lse[run.queries] = torch.logaddexp(lse_p, lse_s)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.to(q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        plan, group, T = ctx.plan, ctx.group, len(q)
        inputs = [x.to(out.dtype) for x in (dout, q, k, v)]
        buckets = zip(
            *(gather_buckets(x, plan.buckets) for x in (*inputs, out, lse)),
            plan.buckets, strict=True,
        )  # fmt: skip
        parts: tuple[list, list, list] = ([], [], [])
        for *tensors, bucket in buckets:
            if bucket.padding is not None:
                tensors[0].flatten(0, 1).index_fill_(0, bucket.padding, 0)
            for grads, grad in zip(parts, _part(*tensors, group, True, ctx.scale), strict=True):
                grads.append(grad)
        dq, dk, dv = (scatter_buckets(grads, plan.buckets, T) for grads in parts)
        do, qw, kw, vw = inputs
        for run in plan.runs:
            dqp, dkp, dvp = _part(
                do[run.queries], qw[run.queries], kw[run.prefix], vw[run.prefix],
                out[run.queries], lse[run.queries], group, False, ctx.scale,
            )  # fmt: skip
            dq[run.queries] += dqp[0]
            dk[run.prefix] += dkp[0]
            dv[run.prefix] += dvp[0]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _part(do, q, k, v, out, lse, group, is_causal, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one call, from `out` and `lse` of the whole. (..., L, H, Dh) -> (B, L, H, Dh)"""
    lse = lse.squeeze(-1).mT
    dq, dk, dv = _backward(
        _heads_first(do, 1), _heads_first(q, 1), _heads_first(k, group), _heads_first(v, group),
        _heads_first(out, 1), (lse if lse.ndim == 3 else lse[None]).contiguous(),
        0.0, is_causal, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), _heads_last(dk, group), _heads_last(dv, group)


def _segment_sdpa(q: Tensor, k: Tensor, v: Tensor, plan: PrefixPlan, scale) -> Tensor:
    """Varlen attention by one SDPA call a segment; `k` and `v` are gathered."""
    # brings torch.compile's machinery, 4 seconds of import that no other path needs
    from torch.nn.attention.bias import causal_lower_right

    group = q.shape[1] // k.shape[1]
    outputs = [q[:0]]
    for queries, keys in zip(pairwise(plan.bounds), pairwise(plan.keys.bounds), strict=True):
        o = F.scaled_dot_product_attention(
            _heads_first(q[slice(*queries)], 1),
            *(_heads_first(x[slice(*keys)], group) for x in (k, v)),
            attn_mask=causal_lower_right(queries[1] - queries[0], keys[1] - keys[0]),
            scale=scale,
        )
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, plan: PrefixPlan, scale) -> Tensor:
    """The GPU's way, with a plan made with `gather`; runs on every device."""
    keys, values = (gather_rows(x, plan.keys.gather) for x in (k, v))
    if not uses_flash(q):
        return _segment_sdpa(q, keys, values, plan, scale)
    return flash_varlen()(
        q, keys, values, plan.keys.cu_seqlens, plan.keys.cu_seqlens_k,
        plan.max_seqlen, plan.keys.max_seqlen, scale,
    )  # fmt: skip


def prefix_attention(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (T, K, Dh), K divides H
    v: Tensor,  # (T, K, Dh)
    plan: PrefixPlan,
    *,
    scale: float | None = None,  # default Dh ** -0.5
) -> Tensor:  # (T, H, Dh)
    """Exact attention within each segment and to its prefix; differentiable once."""
    assert plan.bounds[-1] == len(q) == len(k) == len(v), (plan.bounds[-1], len(q), len(k), len(v))
    if plan.gather:
        return gathered_attention(q, k, v, plan, scale)
    if uses_native(q):
        return native_attention(q, k, v, plan.segments, scale)
    return PrefixAttentionFunction.apply(q, k, v, plan, scale)


class PrefixAttention:
    """The `attend` of a batch with shared prompts, for every layer."""

    def __init__(self, bounds: Sequence[int], prefix_of: Sequence[int]):
        self.bounds, self.prefix_of = bounds, prefix_of
        self._plan: PrefixPlan | None = None  # made in the first layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, Dh), (T, K, Dh), (T, K, Dh) -> (T, H, Dh)"""
        if self._plan is None:
            self._plan = plan_prefixes(self.bounds, self.prefix_of, device=q.device)
        return prefix_attention(q, k, v, self._plan)
