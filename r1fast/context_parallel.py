"""Micro-batches whose tokens are divided over the ranks of a context group (parallel.context_parallel): Ulysses.

Of T packed tokens rank r of c has those from r L on, L = ceil(T / c); what is missing of c L at the end is filled up.
A rank's tokens go through the decoder alone. In attention, which alone looks at others, ranks exchange:

    (L, H, Dh) of its tokens, all heads -> (c L, H / c, Dh) of all tokens, its heads -> attention -> and back

so the attention of one rank is used as it is, prefixes that groups share included. A target belongs to the rank that
has the token which predicts it: losses and gradients, whose denominators are global, add up over all ranks.

With R = lcm(K, c) kv heads (K, each sent to as many ranks as need it) a rank sends in a layer's forward
(c - 1) / c * T / c * (2 H + 2 R) Dh numbers, in the backward as many, and with layers recomputed the forward's again.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from r1fast.config import GRPOConfig
from r1fast.grpo import loss_options
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.kernels.loss_rows import NonFiniteError
from r1fast.kernels.policy_loss import policy_loss
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.model import Attend, ModelSpec
from r1fast.types import ContextPart, PackedBatch


def check_heads(spec: ModelSpec, num_ranks: int) -> None:
    """Raises ValueError where the heads of attention cannot be divided over so many ranks."""
    H = spec.num_heads
    if H % num_ranks:
        fitting = ", ".join(str(n) for n in range(1, H + 1) if H % n == 0)
        raise ValueError(
            f"parallel.context_parallel = {num_ranks} does not divide the {H} query heads of the model: "
            f"take one of {fitting}"
        )


def cut(batch: PackedBatch, group: dist.ProcessGroup) -> PackedBatch:
    """This rank's tokens of a micro-batch, and the targets that they predict."""
    T, size = batch.bounds[-1], group.size()
    L = -(-T // size)
    start, stop = (min(n * L, T) for n in (group.rank(), group.rank() + 1))
    rows = torch.tensor(batch.target_rows if batch.sequence_index else [], dtype=torch.int64)
    own = ((rows >= start) & (rows < stop)).nonzero()[:, 0]  # (n,)
    ends = batch.cu_seqlens[1:].cpu().long()
    sequence = torch.searchsorted(ends, own, right=True)  # that each is of
    counts = torch.bincount(sequence, minlength=len(ends))
    device = batch.input_ids.device
    targets = own.to(device, non_blocking=True)
    lengths = counts[counts > 0]

    def tokens(x: Tensor) -> Tensor:  # (T,) -> (L,)
        return F.pad(x[start:stop], (0, L - (stop - start)))

    def predicted(x: Tensor | None) -> Tensor | None:  # (N,) -> (n,)
        return None if x is None else x[targets]

    return replace(
        batch,
        input_ids=tokens(batch.input_ids),
        position_ids=tokens(batch.position_ids),
        target_rows=(rows[own] - start).tolist(),
        target_ids=predicted(batch.target_ids),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True),
        token_weights=predicted(batch.token_weights),
        advantages=predicted(batch.advantages),
        old_logprobs=predicted(batch.old_logprobs),
        ref_logprobs=predicted(batch.ref_logprobs),
        sequence_index=[i for i, n in zip(batch.sequence_index, counts.tolist(), strict=True) if n],
        policy_logprobs=predicted(batch.policy_logprobs),
        rollout_logprobs=predicted(batch.rollout_logprobs),
        context=ContextPart(group, stop - start if batch.sequence_index else 0, targets, batch),
    )


def all_targets(own: Tensor, part: ContextPart) -> Tensor:  # (n, ...) -> (N, ...)
    """Numbers of each of a micro-batch's targets, from the ranks that have them."""
    found = own.new_zeros(len(part.whole.target_ids), *own.shape[1:])
    found[part.targets] = own
    dist.all_reduce(found, group=part.group)  # one number and zeros
    return found


def coupled_objective(
    hidden: Tensor,  # (n, D)
    head_weight: Tensor,  # (V, D)
    batch: PackedBatch,
    config: GRPOConfig,
    *,
    temperature: float,
    num_tokens: int,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_objective` of a piece, for losses that take the log-probabilities of whole sequences together.

    Ranks exchange them, and each takes the loss of all N targets, whose gradient it carries on into its own; of
    the sums each has its share. The log-probabilities are kept for the backward or made again, where the fused
    loss makes its gradient in the same pass. All ranks call it, also one without a target.
    """
    part, whole, failure = batch.context, batch.context.whole, None
    try:
        logprobs, entropy = linear_logprobs(
            hidden,
            head_weight,
            batch.target_ids,
            temperature=temperature,
            return_entropy=True,
            process_group=process_group,
        )
    except NonFiniteError as error:  # the others wait for what is here
        failure = error
        logprobs = entropy = torch.full_like(batch.token_weights, math.nan)
    found = all_targets(torch.stack((logprobs, entropy), dim=1).detach(), part)  # (N, 2)
    if failure is not None:
        raise failure
    loss, report = policy_loss(
        found[:, 0].index_copy(0, part.targets, logprobs),
        whole.advantages,
        None,
        PolicyLossOptions(**loss_options(config)),
        cu_seqlens=whole.cu_seqlens,
        old_logprobs=whole.old_logprobs,
        ref_logprobs=whole.ref_logprobs if config.kl_coef else None,
        rollout_logprobs=whole.rollout_logprobs,
        token_weights=whole.token_weights,
        num_tokens=num_tokens,
        entropy=found[:, 1].index_copy(0, part.targets, entropy),
    )
    report |= {"num_tokens": torch.ones_like(loss), "loss": loss.detach() / len(found)}
    share = len(found) / part.group.size()
    return loss, {name: mean * share for name, mean in report.items()} | {
        "logprobs": logprobs.detach()
    }


class UlyssesAttention:
    """`attend` of all tokens and some heads, for ranks that have all heads of some tokens."""

    def __init__(self, attend: Attend, num_tokens: int, group: dist.ProcessGroup):
        self.attend, self.num_tokens, self.group = attend, num_tokens, group

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(L, H, Dh), (L, K, Dh), (L, K, Dh) -> (L, H, Dh)"""
        T, num_ranks, K = self.num_tokens, self.group.size(), k.shape[1]
        copies = math.lcm(K, num_ranks) // K  # ranks that need the same one
        if copies > 1:
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        q, k, v = (self._to_heads(x)[:T] for x in (q, k, v))
        mixed = self.attend(layer, q, k, v)  # (T, H / c, Dh)
        missing = num_ranks * -(-T // num_ranks) - T
        return self._to_tokens(F.pad(mixed, (0, 0, 0, 0, 0, missing)))

    def _to_heads(self, x: Tensor) -> Tensor:  # (L, h, Dh) -> (c L, h / c, Dh)
        parts = x.unflatten(1, (self.group.size(), -1)).transpose(0, 1)
        return _Exchange.apply(parts, self.group).flatten(0, 1)

    def _to_tokens(self, x: Tensor) -> Tensor:  # (c L, h / c, Dh) -> (L, h, Dh)
        parts = _Exchange.apply(x.unflatten(0, (self.group.size(), -1)), self.group)
        return parts.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """(c, ...) -> (c, ...): part r goes to rank r, and its place takes what that rank has for this one.

    Its own inverse, so the gradient goes back the same way. All ranks of the group call it together.
    """

    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
