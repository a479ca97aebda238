"""Sequences -> packed micro-batches without padding. The only place that shifts tokens."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch

from r1fast import _C
from r1fast.types import PackedBatch, Sequence


def pack(
    sequences: Seq[Sequence],
    token_budget: int,
    token_weights: Seq[float],  # (len(sequences),) the weight of each completion token of one
    *,
    device: torch.device | str = "cpu",
    share_prompts: bool = False,
    cost_per_token: float = 0.0,  # outside attention, in pairs of query and key; evens micro-batches
    longer_alone: bool = False,  # what is over the budget by itself is a micro-batch, not an error
) -> list[PackedBatch]:
    """Micro-batches of at most `token_budget` forwarded tokens, deterministic.

    A sequence's last token is only a target. With `share_prompts` equal prompts are forwarded once
    a micro-batch, and a group of them is divided only where it is over the budget by itself.
    Raises ValueError for a sequence over the budget, an empty prompt or an empty completion.
    """
    for i, s in enumerate(sequences):
        if not s.prompt_ids or not s.completion_ids:
            part = "prompt" if not s.prompt_ids else "completion"
            raise ValueError(f"sequence {i} has an empty {part}: it has no token to learn from")
    within = range(len(sequences))
    alone: list[int] = []
    if longer_alone:
        alone = [i for i in within if sequences[i].num_tokens - 1 > token_budget]
        within = sorted(set(within) - set(alone))
    groups = group_by_prompt(sequences, within) if share_prompts else [[i] for i in within]
    lengths = [
        (len(sequences[g[0]].prompt_ids), [len(sequences[i].completion_ids) for i in g])
        for g in groups
    ]
    bins = [
        [[groups[g][m] for m in members] for g, members in b]
        for b in lay_out(lengths, token_budget, cost_per_token)
    ]
    bins += [[[i]] for i in alone]
    return [collate(sequences, token_weights, b, device) for b in bins]


def idle_batch(device: torch.device | str = "cpu") -> PackedBatch:
    """A micro-batch of one token that counts for nothing."""
    batch = collate([Sequence([0], [0])], [0.0], [[0]], device)
    batch.sequence_index, batch.cu_seqlens = [], batch.cu_seqlens[:1]
    return batch


def lay_out(
    groups: Seq[tuple[int, Seq[int]]],  # tokens of a prompt, and of each completion that shares it
    token_budget: int,
    cost_per_token: float = 0.0,
) -> list[list[tuple[int, list[int]]]]:
    """What each micro-batch holds: groups, and which of their completions."""
    if all(len(completions) == 1 for _, completions in groups):
        lengths = [prompt + completions[0] - 1 for prompt, completions in groups]
        return [[(g, [0]) for g in b] for b in _C.pack(lengths, token_budget)]
    (bins,) = _C.pack_groups(
        [prompt for prompt, _ in groups],
        [[n - 1 for n in completions] for _, completions in groups],
        token_budget,
        cost_per_token,
    )
    return bins


def group_by_prompt(
    sequences: Seq[Sequence], index: Iterable[int] | None = None
) -> list[list[int]]:
    """Indices (all, or those of `index`) of the sequences of each prompt, in the order of their first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(sequences)) if index is None else index:
        groups.setdefault(tuple(sequences[i].prompt_ids), []).append(i)
    return list(groups.values())


def collate(
    sequences: Seq[Sequence], token_weights: Seq[float], groups: list[list[int]], device
) -> PackedBatch:
    """One PackedBatch of the sequences with these indices; those of one list share their prompt."""
    input_ids, positions, bounds, prefix_of = [], [], [0], []
    rows, target_ids, cu = [], [], [0]
    weights, advantages, old, ref, policy, rollout = [], [], [], [], [], []
    has_policy = all(s.policy_logprobs is not None for s in sequences)
    has_rollout = all(s.rollout_logprobs is not None for s in sequences)
    has_old = not has_rollout or all(s.old_logprobs is not None for s in sequences)

    def forward(tokens: list[int], position: int, prefix: int) -> None:
        input_ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        bounds.append(len(input_ids))
        prefix_of.append(prefix)

    for group in groups:
        prompt = sequences[group[0]].prompt_ids
        prefix, start = len(prefix_of), len(input_ids)
        last = start + len(prompt) - 1  # its hidden state predicts every completion's first token
        if len(group) > 1:
            forward(prompt, 0, -1)
        for i in group:
            s = sequences[i]
            R = len(s.completion_ids)
            if len(group) == 1:
                forward(prompt + s.completion_ids[:-1], 0, -1)
            elif R > 1:
                forward(s.completion_ids[:-1], len(prompt), prefix)
            rows += [last, *range(len(input_ids) - R + 1, len(input_ids))]
            target_ids += s.completion_ids
            weights += [token_weights[i]] * R
            advantages += [s.advantage] * R
            old += s.old_logprobs if s.old_logprobs is not None else [0.0] * R
            ref += s.ref_logprobs if s.ref_logprobs is not None else [0.0] * R
            if has_policy:
                policy += s.policy_logprobs
            if has_rollout:
                rollout += s.rollout_logprobs
            cu.append(cu[-1] + R)
    assert len(rows) == len(old) == len(ref) == cu[-1], (len(rows), len(old), len(ref), cu[-1])

    def put(values, dtype):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=put(input_ids, torch.int64),
        position_ids=put(positions, torch.int64),
        bounds=bounds,
        prefix_of=prefix_of,
        target_rows=rows,
        target_ids=put(target_ids, torch.int64),
        cu_seqlens=put(cu, torch.int32),
        token_weights=put(weights, torch.float32),
        advantages=put(advantages, torch.float32),
        old_logprobs=put(old, torch.float32) if has_old else None,
        ref_logprobs=put(ref, torch.float32),
        sequence_index=[i for group in groups for i in group],
        policy_logprobs=put(policy, torch.float32) if has_policy else None,
        rollout_logprobs=put(rollout, torch.float32) if has_rollout else None,
    )
