"""The sampler on a GPU: sums of blocks, then one program a row that walks to its token.

The formulas are in sample.py. The first kernel reads the logits once, many programs a row; the second reads a row's
block sums and one block of its logits. Sums over blocks are float64, in one order whatever the batch is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # words a program sums


@triton.jit
def _block_sums_kernel(
    logits_ptr, inv_temperature_ptr, max_ptr, s_ptr, sz_ptr, bad_ptr, V, stride, num_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    is_bad = (x != x) | (x == float("inf"))
    most = tl.max(tl.where(is_bad, float("-inf"), x), 0)
    seen = most > float("-inf")
    z = tl.maximum((x - tl.where(seen, most, 0.0)) * inv_temperature, -110.0)  # -inf e^-inf is 0
    e = tl.where(is_bad | (z <= -110.0), 0.0, tl.exp(z))
    to = row * num_blocks + block
    tl.store(max_ptr + to, most)
    tl.store(s_ptr + to, tl.sum(e, 0))
    tl.store(sz_ptr + to, tl.sum(e * z, 0))
    tl.store(bad_ptr + to, tl.sum(is_bad.to(tl.int32), 0))


@triton.jit
def _row_sums_kernel(
    max_ptr, s_ptr, sz_ptr, bad_ptr, inv_temperature_ptr, row_max_ptr, row_s_ptr, row_sz_ptr,
    is_bad_ptr, num_blocks, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    at, inside = row * num_blocks + b, b < num_blocks
    block_max = tl.load(max_ptr + at, mask=inside, other=float("-inf"))
    most = tl.max(block_max, 0)
    seen = most > float("-inf")
    below = (block_max - tl.where(seen, most, 0.0)).to(tl.float64)
    below = tl.maximum(below * tl.load(inv_temperature_ptr + row), -1000.0)
    share = tl.exp(below)
    s = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float64)
    sz = tl.load(sz_ptr + at, mask=inside, other=0.0).to(tl.float64)
    bad = tl.sum(tl.load(bad_ptr + at, mask=inside, other=0), 0)
    tl.store(row_max_ptr + row, most)
    tl.store(row_s_ptr + row, tl.sum(s * share, 0))
    tl.store(row_sz_ptr + row, tl.sum(share * (sz + below * s), 0))
    tl.store(is_bad_ptr + row, ((bad > 0) | (most == float("-inf"))).to(tl.int8))


@triton.jit
def _draw_kernel(
    logits_ptr, u_ptr, temperature_ptr, inv_temperature_ptr, max_ptr, s_ptr, row_max_ptr,
    row_s_ptr, tokens_ptr, V, stride, num_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The first word whose cumulative mass is above u, or the first of the largest."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    most = tl.load(row_max_ptr + row)
    greedy = tl.load(temperature_ptr + row) == 0
    b = tl.arange(0, BLOCKS)
    at, inside = row * num_blocks + b, b < num_blocks
    block_max = tl.load(max_ptr + at, mask=inside, other=float("-inf"))
    below = (block_max - tl.where(most > float("-inf"), most, 0.0)).to(tl.float64)
    share = tl.exp(tl.maximum(below * inv_temperature, -1000.0))
    mass = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float64) * share
    target = tl.load(u_ptr + row) * tl.load(row_s_ptr + row)
    cdf = tl.cumsum(mass, 0)
    # the first block above the target; the last one with a mass where rounding leaves none
    above = tl.where((cdf > target) & (mass > 0), b, BLOCKS)
    chosen = tl.min(above, 0)
    last = tl.max(tl.where(mass > 0, b, 0), 0)
    chosen = tl.where(chosen == BLOCKS, last, chosen)
    largest = tl.min(tl.where(block_max == most, b, BLOCKS), 0)
    chosen = tl.minimum(tl.where(greedy, largest, chosen), num_blocks - 1)
    left = target - tl.sum(tl.where(b < chosen, mass, 0.0), 0)
    left = left / tl.sum(tl.where(b == chosen, share, 0.0), 0)
    peak = tl.max(tl.where(b == chosen, block_max, float("-inf")), 0)

    i = tl.arange(0, BLOCK)
    word = chosen * BLOCK + i
    x = tl.load(logits_ptr + row * stride + word, mask=word < V, other=float("-inf")).to(tl.float32)
    z = (x - tl.where(peak > float("-inf"), peak, 0.0)) * inv_temperature
    e = tl.where(z <= -110.0, 0.0, tl.exp(z))
    inner = tl.cumsum(e.to(tl.float64), 0)
    found = tl.min(tl.where((inner > left) & (e > 0), i, BLOCK), 0)
    found = tl.where(found == BLOCK, tl.max(tl.where(e > 0, i, 0), 0), found)
    found = tl.where(greedy, tl.min(tl.where(x == most, i, BLOCK - 1), 0), found)
    tl.store(tokens_ptr + row, (chosen * BLOCK + found).to(tl.int64))


class RowSums(NamedTuple):
    """softmax(logits / temperature) of B rows: p = exp((x - max) / temperature) / s."""

    block_max: Tensor  # (B, num_blocks) float32
    block_s: Tensor
    max: Tensor  # (B,) float32
    s: Tensor  # (B,) float64
    sz: Tensor  # (B,) float64, sum of e log e
    is_bad: Tensor  # (B,) bool


def sum_rows(logits: Tensor, inv_temperature: Tensor) -> RowSums:  # (B, V), (B,) float64
    (B, V), num_blocks = logits.shape, triton.cdiv(logits.shape[1], BLOCK)
    parts = logits.new_empty(3, B, num_blocks, dtype=torch.float32)
    bad = logits.new_empty(B, num_blocks, dtype=torch.int32)
    row_max = logits.new_empty(B, dtype=torch.float32)
    row_s, row_sz = logits.new_empty(2, B, dtype=torch.float64)
    is_bad = logits.new_empty(B, dtype=torch.int8)
    if B:
        _block_sums_kernel[(B, num_blocks)](
            logits, inv_temperature.float(), parts[0], parts[1], parts[2], bad, V, logits.stride(0),
            num_blocks, BLOCK=BLOCK,
        )  # fmt: skip
        _row_sums_kernel[(B,)](
            parts[0], parts[1], parts[2], bad, inv_temperature, row_max, row_s, row_sz, is_bad,
            num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        )  # fmt: skip
    return RowSums(parts[0], parts[1], row_max, row_s, row_sz, is_bad.bool())


def draw(
    logits: Tensor, u: Tensor, temperature: Tensor, inv_temperature: Tensor, sums: RowSums
) -> Tensor:
    """(B,) int64 tokens. A bad row gets some id below V."""
    (B, V), num_blocks = logits.shape, sums.block_max.shape[1]
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    if B:
        _draw_kernel[(B,)](
            logits, u, temperature, inv_temperature.float(), sums.block_max, sums.block_s,
            sums.max, sums.s, tokens, V, logits.stride(0), num_blocks,
            BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
        )  # fmt: skip
    return tokens.clamp_max(V - 1)
