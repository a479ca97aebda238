"""verl's fused head, call for call: log-probabilities and entropies of labels, on linear_logprobs.

    from r1fast.integrations.verl import linear_cross_entropy  # for verl.utils.kernel's

Facts of verl's function that hold here too, whatever its name says: the first result is the
log-probability (not its negative) of each label, the second the entropy, both float32 and flat, one
number a token, for hidden states in two or three dimensions; `reduction` touches the first alone;
both can be differentiated. Over a process group the weight is the rank's slice of the vocabulary and
the gradient of `hidden` that a rank gets is its share: the caller sums the shares, as Megatron's
sequence-parallel gather does in its backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from r1fast.integrations.mixed_precision import run_head
from r1fast.kernels.linear_logprobs import linear_logprobs

REDUCTIONS = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}


def linear_cross_entropy(
    hidden: Tensor,  # (N, D) or (..., D)
    weight: Tensor,  # (V, D), the rank's slice with a process group
    labels: Tensor,  # (N,) or (...), in [0, whole V)
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:  # (N,), or () with a reduction; (N,)
    """(logprobs, entropy). Any width and vocabulary; verl's own needs a width divisible by 128.

    Raises ValueError as `linear_logprobs` does, and for an unknown reduction.
    """
    name = "none" if reduction is None else str(reduction).lower()
    if name not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        # linear_logprobs gives every rank the whole gradient; the shares have to add up to one
        rows = _ScaleGradient.apply(rows, 1 / dist.get_world_size(dist_process_group))

    def op(hidden: Tensor, weight: Tensor, _bias: None) -> tuple[Tensor, Tensor]:
        return linear_logprobs(
            hidden, weight, labels.reshape(-1),
            temperature=1.0 if temperature is None else float(temperature),
            return_entropy=True, process_group=dist_process_group,
        )  # fmt: skip

    logprobs, entropy = run_head(op, rows, weight, None)
    return REDUCTIONS[name](logprobs), entropy


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None
