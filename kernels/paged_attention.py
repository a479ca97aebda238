"""Decode attention over a paged KV cache, a shared prompt read once for its whole group (cascade).

    o_i = sum_{p < limit_i} softmax_p(scale * q_i . k_p) v_p

over the positions p of query i's own sequence. Query j of a sequence with n queries (n = 1 in plain
decoding; more for a chunk of a prompt, or for drafts to be verified) sees the positions below

    limit = context_len - n + j + 1

Partial results (m, l, a) = (maximum, sum of exp(s - m), sum of exp(s - m) v) over disjoint positions
are merged by log-sum-exp: m = max(m1, m2), l = l1 exp(m1 - m) + l2 exp(m2 - m), a likewise; o = a / l.

Bytes: 2 K Dh sizeof(dtype) for each position of each sequence, those of a shared prefix once a group.
4 H Dh FLOP for each query and position.
Shapes: B sequences, Nq queries, H query heads, K kv heads, Dh head width.
"""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from r1fast.kernels.paged_cache import TILE, PagedLayout, copy_blocks, read_kv, write_kv

__all__ = [
    "TILE",
    "DecodePlan",
    "PagedLayout",
    "copy_blocks",
    "paged_attention",
    "paged_attention_ref",
    "read_kv",
    "write_kv",
]


@dataclass
class DecodePlan:
    """Who sees what in one step: int32 tensors, static buffers that are refilled every step.

    Rows [group_starts[g], group_starts[g + 1]) share their first shared_blocks[g] blocks, which are
    full and in every query's view; 0: nothing is shared. Entries of `block_table` behind the context are not read.
    """

    block_table: Tensor  # (B, max_blocks)
    context_lens: Tensor  # (B,) positions, those of this step's queries included
    group_starts: Tensor  # (num_groups + 1,) from 0 to B
    shared_blocks: Tensor  # (num_groups,)
    query_starts: Tensor | None = None  # (B + 1,) from 0 to Nq; None: one query a sequence
    max_shared_blocks: int | None = None  # no group shares more; None: as many as a row has
    workspace: object = None  # memory of the CPU kernel, made by the first call
    # tiles of 16 alone: (B, TILE), slots below 0 of the positions of a sequence's last block where that is -1
    tails: Tensor | None = None

    def slots(self, sequence: int, positions: Tensor, block_size: int) -> Tensor:  # (n,) -> (n,)
        """Where these positions of a sequence lie, int64."""
        blocks = self.block_table[sequence, positions // block_size].long()
        slots = blocks * block_size + positions % block_size
        if self.tails is None:
            return slots
        return torch.where(blocks < 0, self.tails[sequence, positions % TILE].long(), slots)


def paged_attention_ref(
    q: Tensor,  # (Nq, H, Dh)
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    plan: DecodePlan,
    *,
    scale: float | None = None,
    backend: str = "torch",
    out: Tensor | None = None,
) -> Tensor:  # (Nq, H, Dh)
    """What `paged_attention` computes, in plain PyTorch, one sequence at a time, in q's dtype."""
    scale = layout.head_dim**-0.5 if scale is None else scale
    out = torch.empty_like(q) if out is None else out
    queries = range(len(plan.context_lens) + 1)
    queries = list(queries) if plan.query_starts is None else plan.query_starts.tolist()
    repeats = q.shape[1] // layout.num_kv_heads
    for i, context in enumerate(plan.context_lens.tolist()):
        start, end = queries[i], queries[i + 1]
        if start == end:
            continue
        positions = torch.arange(context, device=q.device)
        k, v = read_kv(layout, keys, values, plan.slots(i, positions, layout.block_size))
        k, v = (x.to(q.dtype).repeat_interleave(repeats, dim=1) for x in (k, v))  # (L, H, Dh)
        scores = scale * torch.einsum("ihd,jhd->hij", q[start:end], k)  # (H, n, L)
        limits = torch.arange(context - (end - start) + 1, context + 1, device=q.device)
        hidden = positions >= limits[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("hij,jhd->ihd", weights, v)
    return out


def paged_attention_native(
    q: Tensor,
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    plan: DecodePlan,
    scale: float,
    out: Tensor,
    level: str = "auto",  # auto, baseline, avx2 or avx512
) -> None:
    """csrc/decode_attention.hpp over tiled storage."""
    from r1fast import _C

    if plan.workspace is None:
        plan.workspace = _C.DecodeWorkspace()
    plan.workspace.attend(
        q.data_ptr(), out.data_ptr(), q.shape[1], scale,
        keys.data_ptr(), values.data_ptr(), layout.num_kv_heads, layout.head_dim,
        layout.dtype == torch.bfloat16,
        plan.block_table.data_ptr(), plan.block_table.stride(0),
        0 if plan.tails is None else plan.tails.data_ptr(), layout.block_size,
        plan.context_lens.data_ptr(),
        0 if plan.query_starts is None else plan.query_starts.data_ptr(),
        plan.group_starts.data_ptr(), plan.shared_blocks.data_ptr(), len(plan.shared_blocks),
        level, torch.get_num_threads(),
    )  # fmt: skip


def paged_attention(
    q: Tensor,  # (Nq, H, Dh), K divides H, of the layout's dtype
    layout: PagedLayout,
    keys: Tensor,  # as layout.allocate gave them
    values: Tensor,
    plan: DecodePlan,
    *,
    scale: float | None = None,  # default Dh ** -0.5
    backend: str = "auto",  # or native, triton, flash, torch
    out: Tensor | None = None,  # (Nq, H, Dh)
) -> Tensor:  # (Nq, H, Dh)
    """Exact attention of each query over its sequence's cache; 0 for a query that sees nothing.

    A row's result is the same bits whatever rows are beside it, whatever is shared and for any number of threads.
    """
    layout.check(keys, values)
    scale = layout.head_dim**-0.5 if scale is None else scale
    backend = _choose(layout, plan, backend)
    _check(q, layout, plan)
    q = q.contiguous()
    out = torch.empty_like(q) if out is None else out
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True), out.shape
    if backend == "native":
        paged_attention_native(q, layout, keys, values, plan, scale, out)
    elif backend == "triton":
        from r1fast.kernels.triton_paged_attention import paged_attention_triton

        paged_attention_triton(
            q, keys, values, plan.block_table, plan.context_lens, plan.query_starts,
            plan.group_starts, plan.shared_blocks, scale, out, plan.max_shared_blocks,
        )  # fmt: skip
    elif backend == "flash":
        out.copy_(_flash_attention(q, keys, values, plan, scale))
    else:
        paged_attention_ref(q, layout, keys, values, plan, scale=scale, out=out)
    return out


FLASH_BLOCK = 256  # flash attention 2 takes blocks of a multiple of this


def _flash_attention(q, keys, values, plan: DecodePlan, scale: float) -> Tensor:
    """The kv-cache kernel of flash attention 2 over the rows layout as it lies: one query a sequence.

    A shared prefix is read once for each sequence.
    """
    from flash_attn import flash_attn_with_kvcache

    out = flash_attn_with_kvcache(
        q[:, None], keys, values, cache_seqlens=plan.context_lens, block_table=plan.block_table,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out[:, 0]


def _choose(layout: PagedLayout, plan: DecodePlan, backend: str) -> str:
    """auto: C++ for tiles, Triton on CUDA. What cannot run is refused."""
    known = ("auto", "native", "fast", "triton", "flash", "torch")
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
    if backend == "auto" or backend == "fast":
        on_cuda = torch.device(layout.device).type == "cuda"
        return "native" if layout.is_tiled else "triton" if on_cuda else "torch"
    if (backend == "native") != layout.is_tiled and backend != "torch":
        needed = "tiled" if backend == "native" else "rows"
        raise ValueError(
            f"backend {backend} needs the {needed} layout, got {'tiled' if layout.is_tiled else 'rows'}"
        )
    if backend == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError("backend flash needs flash-attn, which is not installed; use auto")
        half = layout.dtype in (torch.bfloat16, torch.float16)
        if layout.block_size % FLASH_BLOCK or plan.query_starts is not None or not half:
            raise ValueError(
                f"backend flash needs blocks of a multiple of {FLASH_BLOCK}, bfloat16 or float16 and "
                f"one query a sequence, got block_size {layout.block_size} in {layout.dtype}; use auto"
            )
    return backend


def _check(q: Tensor, layout: PagedLayout, plan: DecodePlan) -> None:
    """Our own mistakes: what the kernels would read past."""
    assert q.dtype == layout.dtype, (q.dtype, layout.dtype)
    assert q.dim() == 3, q.shape
    assert q.shape[2] == layout.head_dim, (q.shape, layout)
    assert q.shape[1] % layout.num_kv_heads == 0, (q.shape, layout)
    B, num_groups = len(plan.context_lens), len(plan.shared_blocks)
    tensors = plan.block_table, plan.context_lens, plan.group_starts, plan.shared_blocks
    tensors += () if plan.query_starts is None else (plan.query_starts,)
    if plan.tails is not None:
        assert layout.is_tiled, layout
        assert layout.block_size == TILE, layout
        assert plan.tails.shape == (B, TILE), (plan.tails.shape, B)
        assert plan.tails.is_contiguous(), plan.tails.stride()
        tensors += (plan.tails,)
    for x in tensors:
        assert x.dtype == torch.int32, x.dtype
        assert x.stride(-1) == 1 or x.numel() < 2, x.stride()
        assert x.device == q.device, (x.device, q.device)
    assert len(plan.block_table) == B, (plan.block_table.shape, B)
    assert len(plan.group_starts) == num_groups + 1, (plan.group_starts.shape, num_groups)
    if plan.query_starts is None:
        assert len(q) == B, (q.shape, B)
    else:
        assert len(plan.query_starts) == B + 1, (plan.query_starts.shape, B)
