"""Forwards of packed micro-batches: hidden states of what predicts, and log-probabilities from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from r1fast.context_parallel import UlyssesAttention, all_targets
from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.gather_rows import gather_rows, plan_gather
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.kernels.prefix_attention import PrefixAttention
from r1fast.model import Attend, Decoder
from r1fast.types import PackedBatch


def hidden_states(model: Decoder, batch: PackedBatch) -> Tensor:  # (N, D)
    """What predicts each completion token: the last hidden states of the tokens before them.

    Of a piece of a micro-batch those that are this rank's; the ranks of its context group call it together.
    """
    if any(prefix >= 0 for prefix in batch.prefix_of):
        attend: Attend = PrefixAttention(batch.bounds, batch.prefix_of)
    else:
        cu_seqlens = torch.tensor(batch.bounds, dtype=torch.int32)
        longest = int(cu_seqlens.diff().max())
        attend = PackedAttention(cu_seqlens.to(batch.input_ids.device, non_blocking=True), longest)
    if batch.context is not None:
        attend = UlyssesAttention(attend, batch.bounds[-1], batch.context.group)
    hidden = model(batch.input_ids, batch.position_ids, attend)  # (T, D)
    return gather_rows(hidden, plan_gather(batch.target_rows, device=hidden.device))


def nothing(hidden: Tensor, head_weight: Tensor) -> Tensor:  # (N, D), (V, D) -> ()
    """A loss of 0 in which all weights have a gradient of 0, for ranks whose backwards are in step."""
    return 0 * (hidden.sum() + head_weight.sum())


def completion_logprobs(
    model: Decoder, batch: PackedBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Log-probability and entropy of every completion token."""
    return linear_logprobs(
        hidden_states(model, batch),
        model.head_weight,
        batch.target_ids,
        temperature=temperature,
        return_entropy=True,
        process_group=model.head_group,
    )


@torch.no_grad()
def sequence_logprobs(
    model: Decoder, batches: Iterable[PackedBatch], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probabilities of every packed sequence's completion, in the order before packing."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        logprobs, _ = completion_logprobs(model, batch, temperature)
        if batch.context is not None:
            logprobs, batch = all_targets(logprobs, batch.context), batch.context.whole
        values, bounds = logprobs.tolist(), batch.cu_seqlens.tolist()
        for i, start, end in zip(batch.sequence_index, bounds[:-1], bounds[1:], strict=True):
            found[i] = values[start:end]
    return [found[i] for i in range(len(found))]


def cost_per_token(model: Decoder) -> float:
    """What a token costs outside attention, in pairs of query and key: for a balanced packing.

    2 FLOPs a parameter against 4 an element of each query head in every layer.
    """
    spec = model.spec
    return model.num_parameters() / (2 * spec.num_layers * spec.num_heads * spec.head_dim)
