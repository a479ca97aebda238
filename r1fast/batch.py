"""Sequences -> packed micro-batches without padding. The only place that shifts tokens."""

from collections.abc import Sequence as Seq
from itertools import pairwise

import torch

from r1fast import _C
from r1fast.types import PackedBatch, Sequence


def pack(
    sequences: Seq[Sequence],
    token_budget: int,
    token_weights: Seq[float],  # (len(sequences),) the weight of each completion token of one
    *,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """Micro-batches of at most `token_budget` tokens, deterministic.

    A sequence of n tokens is forwarded as its first n - 1; the target of position t is token t + 1.
    Raises ValueError for a sequence over the budget, an empty prompt or an empty completion.
    """
    for i, s in enumerate(sequences):
        if not s.prompt_ids or not s.completion_ids:
            part = "prompt" if not s.prompt_ids else "completion"
            raise ValueError(f"sequence {i} has an empty {part}: it has no token to learn from")
    lengths = [s.num_tokens - 1 for s in sequences]
    bins = _C.pack(lengths, token_budget) if sequences else []
    return [
        collate([sequences[i] for i in b], [token_weights[i] for i in b], b, device) for b in bins
    ]


def collate(
    sequences: list[Sequence], token_weights: list[float], index: list[int], device
) -> PackedBatch:
    """One PackedBatch of whole sequences, in the given order."""
    input_ids, target_ids, positions, mask, cu = [], [], [], [], [0]
    weights, advantages, old, ref, policy = [], [], [], [], []
    has_policy = all(s.policy_logprobs is not None for s in sequences)
    for s, weight in zip(sequences, token_weights, strict=True):
        tokens = s.prompt_ids + s.completion_ids
        n, P = len(tokens) - 1, len(s.prompt_ids) - 1  # the first P targets are prompt tokens
        R = n - P
        input_ids += tokens[:-1]
        target_ids += [0] * P + tokens[P + 1 :]
        positions += range(n)
        mask += [False] * P + [True] * R
        weights += [0.0] * P + [weight] * R
        advantages += [0.0] * P + [s.advantage] * R
        old += [0.0] * P + (s.old_logprobs if s.old_logprobs is not None else [0.0] * R)
        ref += [0.0] * P + (s.ref_logprobs if s.ref_logprobs is not None else [0.0] * R)
        if has_policy:
            policy += [0.0] * P + s.policy_logprobs
        cu.append(cu[-1] + n)
    assert len(old) == len(ref) == cu[-1], (len(old), len(ref), cu[-1])

    def put(values, dtype):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=put(input_ids, torch.int64),
        position_ids=put(positions, torch.int64),
        cu_seqlens=put(cu, torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(cu)),
        target_ids=put(target_ids, torch.int64),
        completion_mask=put(mask, torch.bool),
        token_weights=put(weights, torch.float32),
        advantages=put(advantages, torch.float32),
        old_logprobs=put(old, torch.float32),
        ref_logprobs=put(ref, torch.float32),
        sequence_index=list(index),
        policy_logprobs=put(policy, torch.float32) if has_policy else None,
    )
