"""From the tokens of one decode step to the inputs of the next, on the device: the host sees several steps at once.

    results[step] = drawn token, its log-probability, whether its logits were bad
    tokens = drawn;  positions, context += 1;  slot = table[row, position // N] N + position % N;  step += 1

A row of padding (context 0) stays as it is.
Shapes: R rows, K steps, M blocks a row, N positions a block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton
from r1fast.kernels.sample import Sampled


@dataclass(slots=True)
class StepState:
    """What one step reads and the next one is told; all in memory that stays where it is."""

    step: Tensor  # (1,) int64: how many have been made, below K
    tokens: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64
    slots: Tensor  # (R,) int64
    context: Tensor  # (R,) int32, 0: padding
    table: Tensor  # (R, M) int32, of which the blocks of all K steps are there
    out_tokens: Tensor  # (K, R) int64
    out_logprobs: Tensor  # (K, R) float32
    out_bad: Tensor  # (K, R) uint8, 0: sound


def advance_ref(state: StepState, drawn: Sampled, block_size: int) -> None:
    s, step = state, state.step
    for out, x in (
        (s.out_tokens, drawn.tokens), (s.out_logprobs, drawn.logprobs),
        (s.out_bad, drawn.is_bad.view(torch.uint8)),
    ):  # fmt: skip
        out.index_copy_(0, step, x[None])
    alive = s.context > 0
    positions = s.positions + 1
    block = (positions // block_size).clamp_max(s.table.shape[1] - 1)
    slots = s.table.gather(1, block[:, None])[:, 0].long() * block_size + positions % block_size
    s.slots.copy_(torch.where(alive, slots, s.slots))
    s.tokens.copy_(torch.where(alive, drawn.tokens, s.tokens))
    s.positions.add_(alive)
    s.context.add_(alive)
    step.add_(1)


@triton.jit
def _advance_kernel(
    step_ptr, tokens_ptr, positions_ptr, slots_ptr, context_ptr, table_ptr, out_tokens_ptr,
    out_logprobs_ptr, out_bad_ptr, drawn_ptr, logprobs_ptr, bad_ptr, R, M, stride_table,
    BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: the step's number is read before it is raised."""
    step = tl.load(step_ptr)
    for first in range(0, R, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = row < R
        token = tl.load(drawn_ptr + row, mask=inside, other=0)
        to = step * R + row
        tl.store(out_tokens_ptr + to, token, mask=inside)
        tl.store(out_logprobs_ptr + to, tl.load(logprobs_ptr + row, mask=inside), mask=inside)
        tl.store(out_bad_ptr + to, tl.load(bad_ptr + row, mask=inside), mask=inside)
        context = tl.load(context_ptr + row, mask=inside, other=0)
        alive = inside & (context > 0)
        position = tl.load(positions_ptr + row, mask=alive, other=0) + 1
        column = tl.minimum(position // BLOCK_SIZE, M - 1)
        block = tl.load(table_ptr + row * stride_table + column, mask=alive, other=0).to(tl.int64)
        tl.store(slots_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=alive)
        tl.store(tokens_ptr + row, token, mask=alive)
        tl.store(positions_ptr + row, position, mask=alive)
        tl.store(context_ptr + row, context + 1, mask=alive)
    tl.debug_barrier()
    tl.store(step_ptr, step + 1)


def advance(
    state: StepState, drawn: Sampled, block_size: int, *, backend: Backend = "auto"
) -> None:
    """What the next step reads, in place of what this one has read. Asks the device nothing."""
    if not use_triton(state.tokens, backend):
        advance_ref(state, drawn, block_size)
        return
    s, R = state, len(state.tokens)
    _advance_kernel[(1,)](
        s.step, s.tokens, s.positions, s.slots, s.context, s.table, s.out_tokens, s.out_logprobs,
        s.out_bad, drawn.tokens, drawn.logprobs, drawn.is_bad.view(torch.uint8), R, s.table.shape[1],
        s.table.stride(0), BLOCK_SIZE=block_size, BLOCK_R=min(triton.next_power_of_2(R), 1024),
    )  # fmt: skip
