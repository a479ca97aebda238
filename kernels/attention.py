"""Causal attention over a packed batch: each token sees its own sequence up to itself.

    o_i = sum_{j <= i} softmax_j(scale * q_i . k_j) v_j        i, j in the same sequence

About 2 * H * Dh * sum(L^2) FLOPs forward (causal), 3.5x that with the backward.

On the CPU C++ computes it (cpu_attention.py). Elsewhere without flash attention, and in float64 or
float16 on the CPU, sequences of similar length share a right-padded bucket, and one causal
SDPA call runs the bucket. Padding is exact without a mask: it comes after every real query, so the
causal rule already hides it. A padded slot repeats its sequence's last token, so that no other
sequence's values, NaN included, can reach it.
Shapes: T packed tokens, S sequences, H query heads, K kv heads, Dh head width, P padded tokens.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.cpu_attention import (
    SegmentPlan,
    native_attention,
    plan_segments,
    uses_native,
)

MAX_PADDING = 0.2  # a sequence joins a bucket if it fills 1 - MAX_PADDING of the longest one
MAX_WASTE = 10_000  # and while the bucket's padding costs less than a call (in scores, L^2)


def varlen_attention_ref(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (T, K, Dh)
    v: Tensor,  # (T, K, Dh)
    cu_seqlens: Tensor,  # (S + 1,)
    max_seqlen: int,
    *,
    plan: object = None,
    scale: float | None = None,
) -> Tensor:  # (T, H, Dh)
    """What `varlen_attention` computes, in plain PyTorch, one sequence at a time."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    bounds = cu_seqlens.tolist()
    outputs = [q[:0]]
    for start, end in pairwise(bounds):
        keys = k[start:end].repeat_interleave(group, dim=1)  # (L, H, Dh)
        values = v[start:end].repeat_interleave(group, dim=1)
        scores = scale * torch.einsum("ihd,jhd->hij", q[start:end], keys)  # (H, L, L)
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values))
    return torch.cat(outputs)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`count` sequences padded to `width`: P = count * width slots."""

    count: int
    width: int
    start: int  # the first token, where the bucket is a slice of the packed batch
    padded_from: Tensor | None  # (P,) the packed token in each slot; None where it is a slice
    tokens: Tensor | None  # (N,) the packed tokens of the bucket
    slots: Tensor | None  # (N,) their slots
    padding: Tensor | None  # (P - N,) the other slots


def plan_buckets(cu_seqlens: Tensor | Sequence[int], *, device=None) -> tuple[Bucket, ...]:
    """Group the sequences of a packed batch into buckets of similar length.

    `cu_seqlens` is (S + 1,), increasing from 0; empty sequences are in no bucket. The indices land
    on `device` (default: that of `cu_seqlens`). Made once a batch, shared by every layer.
    """
    cu_seqlens = torch.as_tensor(cu_seqlens)
    device = cu_seqlens.device if device is None else device
    cu_seqlens = cu_seqlens.to("cpu", torch.int64)
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    num_real = int((lengths > 0).sum())
    sizes = lengths[:num_real].tolist()

    firsts, wasted = [], 0  # the rank of each bucket's longest sequence
    for rank, length in enumerate(sizes):
        longest = sizes[firsts[-1]] if firsts else 0
        wasted += longest**2 - length**2
        if not firsts or length < (1 - MAX_PADDING) * longest or wasted > MAX_WASTE:
            firsts.append(rank)
            wasted = 0

    buckets = []
    for first, end in pairwise([*firsts, num_real]):
        count, width = end - first, sizes[first]
        starts, length = cu_seqlens[order[first:end], None], lengths[first:end, None]
        offset = torch.arange(width)
        padded_from = (starts + offset.minimum(length - 1)).flatten()  # (P,)
        start = int(starts[0])
        if torch.equal(padded_from, torch.arange(start, start + count * width)):
            buckets.append(Bucket(count, width, start, None, None, None, None))
            continue
        is_real = (offset < length).flatten()
        slots, padding = (x.nonzero().flatten() for x in (is_real, ~is_real))
        indices = (x.to(device) for x in (padded_from, padded_from[slots], slots, padding))
        buckets.append(Bucket(count, width, 0, *indices))
    return tuple(buckets)


def gather_buckets(x: Tensor, buckets: tuple[Bucket, ...]) -> tuple[Tensor, ...]:
    """(T, H, Dh) -> (count, width, H, Dh) of each bucket; a slice is a view."""
    return tuple(
        (
            x[b.start : b.start + b.count * b.width]
            if b.padded_from is None
            else x.index_select(0, b.padded_from)
        ).unflatten(0, (b.count, b.width))
        for b in buckets
    )


def scatter_buckets(
    parts: Sequence[Tensor], buckets: tuple[Bucket, ...], num_tokens: int
) -> Tensor:
    """(count, width, H, Dh) of each bucket -> (T, H, Dh); padding is dropped."""
    out = parts[0].new_empty(num_tokens, *parts[0].shape[2:])
    for b, part in zip(buckets, parts, strict=True):
        if b.padded_from is None:
            out[b.start : b.start + b.count * b.width].unflatten(0, (b.count, b.width)).copy_(part)
        else:
            out.index_copy_(0, b.tokens, part.flatten(0, 1).index_select(0, b.slots))
    return out


class GatherFunction(torch.autograd.Function):
    """`gather_buckets`, whose backward need not add anything up: padding has no gradient."""

    @staticmethod
    def forward(ctx, x, buckets):
        ctx.buckets, ctx.num_tokens = buckets, len(x)
        return gather_buckets(x, buckets)

    @staticmethod
    def backward(ctx, *dparts):
        return scatter_buckets(dparts, ctx.buckets, ctx.num_tokens), None


class ScatterFunction(torch.autograd.Function):
    """`scatter_buckets`; the gradient of padding is zero."""

    @staticmethod
    def forward(ctx, buckets, num_tokens, *parts):
        ctx.buckets = buckets
        return scatter_buckets(parts, buckets, num_tokens)

    @staticmethod
    def backward(ctx, dout):
        dparts = gather_buckets(dout, ctx.buckets)
        for b, dpart in zip(ctx.buckets, dparts, strict=True):
            if b.padding is not None:
                dpart.flatten(0, 1).index_fill_(0, b.padding, 0)
        return None, None, *dparts


def bucketed_attention(
    q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...], scale: float | None
) -> Tensor:
    """One causal SDPA call a bucket; runs on every device and dtype. Shapes as varlen_attention.

    On the CPU half precision is computed in float32: SDPA would round the weights there, and the
    log-probabilities of training would be 0.01 from those of decode (docs/log.md).
    """
    planned = sum(b.count * b.width if b.slots is None else len(b.slots) for b in buckets)
    assert planned == len(q) == len(k) == len(v), (planned, len(q), len(k), len(v))
    if not buckets:
        return q.clone()  # no tokens, but still a gradient
    outputs = []
    is_half = q.is_cpu and q.dtype in (torch.bfloat16, torch.float16)
    # one token alone attends to itself: nothing to sum
    dtype = torch.float32 if is_half and any(b.width > 1 for b in buckets) else q.dtype
    gathered = (GatherFunction.apply(x.to(dtype), buckets) for x in (q, k, v))
    for parts in zip(*gathered, strict=True):
        qb, kb, vb = (x.transpose(1, 2) for x in parts)  # (count, H, width, Dh)
        o = F.scaled_dot_product_attention(
            qb, kb, vb, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(o.transpose(1, 2))
    return ScatterFunction.apply(buckets, len(q), *outputs).to(q.dtype)


@cache
def flash_varlen() -> Callable | None:
    """The installed flash attention for packed CUDA batches, or None.

    Called with q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale. Causal from the
    bottom right: a sequence's queries are the last of its keys.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        pass
    else:
        return lambda *args: flash_attn_varlen_func(*args[:-1], softmax_scale=args[-1], causal=True)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True  # PyTorch 2.11 shares key heads without being asked
    return lambda *args: varlen_attn(*args[:-1], scale=args[-1], **options)


def uses_flash(q: Tensor) -> bool:
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and is_half and flash_varlen() is not None


# How one batch is computed: None is flash attention, which needs no plan
VarlenPlan = SegmentPlan | tuple[Bucket, ...] | None


def plan_varlen(q: Tensor, cu_seqlens: Tensor) -> VarlenPlan:
    """The one rule of dispatch, and what is made once a batch: shared by every layer."""
    if uses_flash(q):
        return None
    return (
        plan_segments(cu_seqlens) if uses_native(q) else plan_buckets(cu_seqlens, device=q.device)
    )


def varlen_attention(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (T, K, Dh), K divides H
    v: Tensor,  # (T, K, Dh)
    cu_seqlens: Tensor,  # (S + 1,) int32, from 0 to T
    max_seqlen: int,
    *,
    plan: VarlenPlan = None,
    scale: float | None = None,  # default Dh ** -0.5
) -> Tensor:  # (T, H, Dh)
    """Exact causal attention within each sequence of a packed batch; differentiable.

    `plan` is `plan_varlen(q, cu_seqlens)`, to be shared by the calls on one batch. Half-precision
    CUDA tensors go to flash attention, CPU ones to C++, everything else to the buckets.
    """
    plan = plan_varlen(q, cu_seqlens) if plan is None else plan
    if plan is None:
        cu_seqlens = cu_seqlens.to(q.device, torch.int32)
        return flash_varlen()(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale)
    if isinstance(plan, SegmentPlan):
        return native_attention(q, k, v, plan, scale)
    return bucketed_attention(q, k, v, plan, scale)


class PackedAttention:
    """The `attend` of training: `varlen_attention` over one packed batch, for every layer."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int):
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self._plan: VarlenPlan = None  # made in the first layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, H, Dh), (T, K, Dh), (T, K, Dh) -> (T, H, Dh)"""
        if self._plan is None:
            self._plan = plan_varlen(q, self.cu_seqlens)
        return varlen_attention(q, k, v, self.cu_seqlens, self.max_seqlen, plan=self._plan)
