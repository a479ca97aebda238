"""Rows of a matrix by index, some of them several times; the backward adds those up.

    y_n = x[rows[n]]            dx_t = sum over n with rows[n] = t of dy_n

index_select would do, but its backward adds in the dtype of x and, on CUDA, in any order. Here a row
that is taken once is copied, the others are summed in float32 (float64 for float64) in the order of n.
Shapes: T rows, N taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowGather:
    """`rows` and what its backward needs; made on the host once a batch."""

    rows: Tensor  # (N,) int64
    once: Tensor  # the rows taken once
    once_at: Tensor  # and their places in `rows`
    shared: Tensor  # the rows taken several times
    shared_at: Tensor  # all their places, row by row
    counts: Tensor  # how many each has


def plan_gather(rows: Sequence[int], *, device: torch.device | str = "cpu") -> RowGather:
    index = torch.tensor(rows, dtype=torch.int64)
    places = index.argsort(stable=True)
    taken, counts = index[places].unique_consecutive(return_counts=True)
    several = counts > 1
    at_several = several.repeat_interleave(counts)
    parts = (
        index, taken[~several], places[~at_several], taken[several], places[at_several],
        counts[several],
    )  # fmt: skip
    return RowGather(*(x.to(device, non_blocking=True) for x in parts))


class GatherRowsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan, ctx.shape = plan, x.shape
        return x.index_select(0, plan.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        plan = ctx.plan
        dx = dy.new_zeros(ctx.shape)
        dx.index_copy_(0, plan.once, dy.index_select(0, plan.once_at))
        if len(plan.shared):
            wide = torch.promote_types(dy.dtype, torch.float32)
            several = dy.index_select(0, plan.shared_at).flatten(1).to(wide)
            sums = torch.segment_reduce(several, "sum", lengths=plan.counts, unsafe=True)
            dx.index_copy_(0, plan.shared, sums.to(dx.dtype).unflatten(1, dx.shape[1:]))
        return dx, None


def gather_rows(x: Tensor, plan: RowGather) -> Tensor:  # (T, ...) -> (N, ...)
    return GatherRowsFunction.apply(x, plan)
