"""Decode attention on a GPU: split positions, a group's shared prefix once for all its rows, one merge.

The formulas are in paged_attention.py. Two launches of one kernel make partial results (m, l, a) in float32: over the
shared prefixes, with the query heads of a whole group as rows, and over each sequence's own positions. A third merges
them. Splits are SPLIT positions long whatever the batch is, and nothing depends on how many programs run, so a
row's bits do not depend on its batch mates as long as its prefix stays shared or not.
Grids depend on shapes alone: the launches can be captured in a CUDA graph and replayed with other contexts. So
room that a step does not use has to be cheap: an empty split writes eight bytes a row, an empty group runs no program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.triton_head import precision

SPLIT = 512  # positions of one partial result
LEAST_G = 32  # group counts up to this share one compiled kernel
# (bytes of an element, shared prefix) -> query rows and positions at once; 16 rows are a tensor core's least
TILES = {(2, True): (64, 64), (2, False): (16, 64), (4, True): (16, 32), (4, False): (16, 32)}


@triton.jit(do_not_specialize=["max_blocks", "num_groups", "num_queries", "first_part"])
def _partial_kernel(
    q_ptr, keys_ptr, values_ptr, table_ptr, context_ptr, query_starts_ptr, group_starts_ptr,
    shared_ptr, m_ptr, l_ptr, a_ptr, max_blocks, num_groups, num_queries, first_part, scale,
    H: tl.constexpr, K: tl.constexpr, Dh: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr, ONE_QUERY: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one kv head, one split. Rows are (query, head) of a group, or of a sequence.

    ONE_QUERY: query i is sequence i's, and query_starts is not read.
    """
    kv_head = tl.program_id(0) % K
    index = tl.program_id(0) // K  # shared: a tile of some group; else a sequence
    split = tl.program_id(2)
    HEADS: tl.constexpr = H // K
    groups = tl.arange(0, BLOCK_G)
    is_group = groups < num_groups
    ends = tl.load(group_starts_ptr + 1 + groups, mask=is_group, other=0x7FFFFFFF)
    if SHARED:
        # the tiles of all groups follow each other
        starts = tl.load(group_starts_ptr + groups, mask=is_group, other=0)
        sizes = tl.where(is_group, ends - starts, 0)
        if not ONE_QUERY:
            first = tl.load(query_starts_ptr + starts, mask=is_group, other=0)
            sizes = tl.load(query_starts_ptr + starts + sizes, mask=is_group, other=0) - first
        tiles = (sizes * HEADS + BLOCK_M - 1) // BLOCK_M
        group = tl.sum((tl.cumsum(tiles, 0) <= index).to(tl.int32), 0)
        if group >= num_groups:
            return
        tile = index - tl.sum(tl.where(groups < group, tiles, 0), 0)
        sequence = tl.load(group_starts_ptr + group)
        last = tl.load(group_starts_ptr + group + 1)
        begin = 0
        end = tl.load(shared_ptr + group) * BLOCK_SIZE
    else:
        tile = tl.program_id(1)
        sequence = index
        last = index + 1
        group = tl.sum((ends <= index).to(tl.int32), 0)
        begin = tl.load(shared_ptr + group) * BLOCK_SIZE
        end = tl.load(context_ptr + index)
    if ONE_QUERY:
        first_query = sequence
        end_query = last
    else:
        first_query = tl.load(query_starts_ptr + sequence)
        end_query = tl.load(query_starts_ptr + last)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = first_query + row // HEADS
    head = kv_head * HEADS + row % HEADS
    is_row = query < end_query
    if first_query + tile * BLOCK_M // HEADS >= end_query:
        return
    if SHARED:
        limit = tl.full((BLOCK_M,), end, tl.int32)
    else:
        limit = end - (end_query - query) + 1
    begin = begin + split * SPLIT
    end = tl.minimum(end, begin + SPLIT)
    d = tl.arange(0, BLOCK_D)
    at = query.to(tl.int64) * H + head  # (BLOCK_M,)
    row_mask = is_row[:, None] & (d < Dh)[None, :]
    q = tl.load(q_ptr + at[:, None] * Dh + d[None, :], mask=row_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    a = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        p = start + tl.arange(0, BLOCK_N)
        inside = p < end
        block = tl.load(
            table_ptr + sequence.to(tl.int64) * max_blocks + p // BLOCK_SIZE, mask=inside, other=0
        )
        slot = block.to(tl.int64) * BLOCK_SIZE + p % BLOCK_SIZE
        offset = (slot * K + kv_head)[:, None] * Dh + d[None, :]
        mask = inside[:, None] & (d < Dh)[None, :]
        k = tl.load(keys_ptr + offset, mask=mask, other=0.0)
        v = tl.load(values_ptr + offset, mask=mask, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where(inside[None, :] & (p[None, :] < limit[:, None]), s, float("-inf"))
        most = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(most == float("-inf"), 0.0, most)
        e = tl.exp(s - safe[:, None])
        shrink = tl.exp(m - safe)
        l = l * shrink + tl.sum(e, 1)
        a = a * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
        m = most
    part = (first_part + split).to(tl.int64) * num_queries * H + at
    tl.store(m_ptr + part, m, mask=is_row)
    tl.store(l_ptr + part, l, mask=is_row)
    if begin < end:  # an empty split has no `a`
        tl.store(a_ptr + part[:, None] * Dh + d[None, :], a, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _merge_kernel(
    m_ptr, l_ptr, a_ptr, out_ptr, num_rows, num_parts,
    Dh: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query head: its parts, in order; 0 if none has seen a position."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m = float("-inf")
    l = 0.0
    a = tl.zeros((BLOCK_D,), tl.float32)
    at = row
    for _ in range(num_parts):
        other = tl.load(m_ptr + at)
        most = tl.maximum(m, other)
        safe = tl.where(most == float("-inf"), 0.0, most)
        old, new = tl.exp(m - safe), tl.exp(other - safe)
        l = l * old + tl.load(l_ptr + at) * new
        width = tl.where(other > float("-inf"), Dh, 0)  # an empty part has written no `a`
        a = a * old + tl.load(a_ptr + at * Dh + d, mask=d < width, other=0.0) * new
        m = most
        at += num_rows
    out = a / tl.where(l == 0, 1.0, l)
    tl.store(out_ptr + row * Dh + d, out.to(out_ptr.dtype.element_ty), mask=d < Dh)


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, slots_ptr, keys_ptr, values_ptr, stride_k, stride_v,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: its WIDTH = K Dh elements of key and of value."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    at = tl.load(slots_ptr + token) * WIDTH + i
    k = tl.load(k_ptr + token * stride_k + i, mask=inside)
    v = tl.load(v_ptr + token * stride_v + i, mask=inside)
    tl.store(keys_ptr + at, k, mask=inside)
    tl.store(values_ptr + at, v, mask=inside)


def write_kv_triton(
    keys: Tensor,  # (num_blocks, block_size, K, Dh)
    values: Tensor,
    k: Tensor,  # (N, K, Dh) of their dtype, a token's elements side by side
    v: Tensor,
    slots: Tensor,  # (N,) int64
) -> None:
    width = k.shape[1] * k.shape[2]
    if len(slots):
        _write_kernel[(len(slots),)](
            k, v, slots, keys, values, k.stride(0), v.stride(0),
            WIDTH=width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip


def paged_attention_triton(
    q: Tensor,  # (Nq, H, Dh)
    keys: Tensor,  # (num_blocks, block_size, K, Dh)
    values: Tensor,
    block_table: Tensor,  # (B, max_blocks) int32
    context_lens: Tensor,  # (B,)
    query_starts: Tensor | None,  # (B + 1,); None: one query a sequence
    group_starts: Tensor,  # (num_groups + 1,)
    shared_blocks: Tensor,  # (num_groups,)
    scale: float,
    out: Tensor,  # (Nq, H, Dh)
    max_shared_blocks: int | None = None,  # no group shares more; default max_blocks
) -> None:
    (Nq, H, Dh), (_, block_size, K, _) = q.shape, keys.shape
    B, max_blocks = block_table.shape
    num_groups = len(shared_blocks)
    heads = H // K
    max_shared = max_blocks if max_shared_blocks is None else max_shared_blocks
    shared_splits = triton.cdiv(max_shared * block_size, SPLIT)
    own_splits = triton.cdiv(max_blocks * block_size, SPLIT)
    num_parts = shared_splits + own_splits
    m, l = q.new_empty(2, num_parts, Nq, H, dtype=torch.float32)
    a = q.new_empty(num_parts, Nq, H, Dh, dtype=torch.float32)
    constants = {
        "H": H, "K": K, "Dh": Dh, "BLOCK_SIZE": block_size, "SPLIT": SPLIT,
        "UPCAST": not q.is_cuda,  # the interpreter multiplies bfloat16 as if it were integers
        "PRECISION": precision(q.dtype),
        "BLOCK_D": max(16, triton.next_power_of_2(Dh)),
        "BLOCK_G": triton.next_power_of_2(max(num_groups, LEAST_G)),
        "ONE_QUERY": query_starts is None,
    }  # fmt: skip
    most_rows = heads * (1 if query_starts is None else Nq)  # of one sequence
    for is_shared, splits in ((True, shared_splits), (False, own_splits)):
        BLOCK_M, BLOCK_N = TILES[q.element_size(), is_shared]
        # all the tiles that groups can have: the full ones, and one more for each
        tiles = Nq * heads // BLOCK_M + num_groups if is_shared else triton.cdiv(most_rows, BLOCK_M)
        grid = (tiles * K, 1, splits) if is_shared else (B * K, tiles, splits)
        if splits and B and Nq:
            _partial_kernel[grid](
                q, keys, values, block_table, context_lens, query_starts, group_starts,
                shared_blocks, m, l, a, block_table.stride(0), num_groups, Nq,
                0 if is_shared else shared_splits, scale,
                SHARED=is_shared, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **constants,
            )  # fmt: skip
    if Nq:
        _merge_kernel[(Nq * H,)](
            m, l, a, out, Nq * H, num_parts, Dh=Dh, BLOCK_D=constants["BLOCK_D"], num_warps=1
        )
