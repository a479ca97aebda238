"""One decode step, as arrays on the host and as tensors on the model's device.

Shapes: B running rows, Nq tokens of the step (B, or more with drafts), M blocks of the longest row, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from r1fast.kernels.paged_attention import TILE, DecodePlan
from r1fast.rollout.rows import Rows


@dataclass(slots=True)
class Inputs:
    """What the model forwards in one step."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    slots: Tensor  # (N,) int64: where their keys and values go


@dataclass(slots=True)
class DecodeStep:
    tokens: np.ndarray  # (Nq,) int64
    positions: np.ndarray  # (Nq,) int64
    slots: np.ndarray  # (Nq,) int64
    table: np.ndarray  # (B, M) int32
    context: np.ndarray  # (B,) int64
    group_starts: np.ndarray  # (G + 1,) int32
    shared_blocks: np.ndarray  # (G,) int32
    query_starts: np.ndarray | None  # (B + 1,) int64; None: a token a row
    tails: np.ndarray | None = None  # (B, TILE) int32, as in DecodePlan

    @classmethod
    def of(
        cls,
        rows: Rows,
        drafts: np.ndarray | None = None,
        tails: np.ndarray | None = None,  # (S, TILE) int32 of `_C.Tails`
        num_steps: int = 1,
    ) -> "DecodeStep":
        """The last token of every running row, and after it the row's drafts (B, num_draft), -1: none.

        The table has the blocks of `num_steps` steps, of which this is the first.
        """
        batch, N = rows.batch(), rows.block_size
        context = rows.length[batch.slots]
        tokens, positions = rows.tokens[batch.slots, context - 1], context - 1
        starts, row = None, np.arange(len(batch.slots))
        if drafts is not None:
            counts = 1 + (drafts >= 0).sum(1)
            starts = np.concatenate(([0], np.cumsum(counts)))
            row = np.repeat(row, counts)
            offset = np.arange(len(row)) - starts[row]
            tokens = np.concatenate((tokens[:, None], drafts), 1)[row, offset]
            positions, context = positions[row] + offset, context + counts - 1
        table = rows.blocks[batch.slots, : -(-int(context.max() + num_steps - 1) // N)]
        blocks = table[row, positions // N]
        slots = slots_of(blocks, positions, N)
        if tails is not None:
            tails = tails[batch.slots]
            slots = np.where(blocks < 0, tails[row, positions % TILE], slots)
        shared = batch.group_starts, batch.shared_blocks
        return cls(tokens, positions, slots, table, context, *shared, starts, tails)

    def to(self, tensor: Callable[[np.ndarray], Tensor]) -> tuple[Inputs, DecodePlan]:
        """The same as tensors, each made by `tensor`."""
        inputs = Inputs(*map(tensor, (self.tokens, self.positions, self.slots)))
        starts = self.query_starts
        plan = DecodePlan(
            *(
                tensor(x.astype(np.int32))
                for x in (self.table, self.context, self.group_starts, self.shared_blocks)
            ),
            None if starts is None else tensor(starts.astype(np.int32)),
            max_shared_blocks=int(self.shared_blocks.max(initial=0)),
            tails=None if self.tails is None else tensor(self.tails),
        )
        return inputs, plan


def slots_of(blocks: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """(N,) blocks that hold the positions (N,) -> (N,) int64 slots."""
    return blocks.astype(np.int64) * block_size + positions % block_size
