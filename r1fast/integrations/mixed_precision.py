"""The language-model head under autocast and with float32 weights: one dtype inside, theirs outside.

A peer's trainer runs bfloat16 autocast over float32 weights. The ops of r1fast take one dtype and
are not to be cast inside, so copies go in; the weight's gradient comes back as the float32 sum that
the op has, not rounded to the dtype of the copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def run_head(
    op: Callable[..., tuple[Tensor, ...]],  # (hidden, weight, bias) -> tensors
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
) -> tuple[Tensor, ...]:
    """`op` in the dtype of autocast where that is on, else in the dtype of `hidden`."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        if hidden.dtype == weight.dtype == dtype:
            return op(hidden, weight, bias)
        return _InDtype.apply(op, dtype, hidden, weight, bias)


class _InDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, dtype, *tensors):
        needs = ctx.needs_input_grad[2:]
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        copies = [None if x is None else x.detach().to(dtype) for x in tensors]
        for x, need in zip(copies, needs, strict=True):
            if need:
                x.requires_grad_()
        for x in copies[1:]:
            if x is not None and x.requires_grad:
                x.grad_dtype = torch.promote_types(dtype, torch.float32)
        with torch.enable_grad():
            outputs = op(*copies)
        ctx.leaves = [x for x in copies if x is not None and x.requires_grad]
        ctx.needs, ctx.outputs = needs, outputs
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        if ctx.outputs is None:
            raise RuntimeError(
                "backward a second time: the first has freed what it needs. Add the losses up and "
                "call backward once"
            )
        used = [
            (x, g)
            for x, g in zip(ctx.outputs, gradients, strict=True)
            if g is not None and x.requires_grad
        ]
        ctx.outputs = None
        found = [None] * len(ctx.leaves)
        if used:
            outputs, gradients = zip(*used, strict=True)
            found = torch.autograd.grad(outputs, ctx.leaves, gradients)
        found = iter(found)
        results = [next(found) if need else None for need in ctx.needs]
        return (
            None,
            None,
            *(
                None if g is None else g.to(dtype)
                for g, dtype in zip(results, ctx.dtypes, strict=True)
            ),
        )
