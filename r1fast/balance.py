"""Which data rank trains on which completion, so that all have as much to compute, and how they get there.

Every rank knows the lengths of all completions and so the new places; what moves is sent once a rollout,
a mini-batch at a time: P + 2 R + 1 numbers of 4 bytes for a prompt of P tokens and a completion of R. All ranks of a
model-parallel group get what their data rank trains on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from r1fast import _C, distributed
from r1fast.distributed import RankGrid
from r1fast.step_plan import Fact, Key, MiniBatch, StepPlan
from r1fast.types import Sequence


def new_ranks(
    part: MiniBatch,
    facts: Mapping[Key, Fact],
    num_ranks: int,
    *,
    token_budget: int,  # of a micro-batch
    cost_per_token: float,  # outside attention, in pairs of query and key
    share_prompts: bool,
) -> dict[Key, int]:
    """The data rank, of `num_ranks`, of each live completion, by estimated cost: whole groups, cut where one alone is too much."""
    groups: dict[Key, list[Key]] = {}
    for key in part.live:
        groups.setdefault((key[0], -1) if share_prompts else key, []).append(key)
    if not groups:
        return {}
    prompts = [facts[keys[0]].num_prompt_tokens for keys in groups.values()]
    completions = [[facts[key].num_tokens - 1 for key in keys] for keys in groups.values()]
    total = sum(prompts) + sum(map(sum, completions))
    longest = max(p + max(c) for p, c in zip(prompts, completions, strict=True))
    # pieces of at most half of a rank's share, or the last one could leave them far apart
    piece = max(longest, min(token_budget, -(-total // (2 * num_ranks))))
    packed = _C.pack_groups(prompts, completions, piece, cost_per_token, num_ranks)
    keys = list(groups.values())
    return {
        keys[g][i]: rank
        for rank, bins in enumerate(packed)
        for pieces in bins
        for g, members in pieces
        for i in members
    }


def sampled_ranks(part: MiniBatch, facts: Mapping[Key, Fact], grid: RankGrid) -> dict[Key, int]:
    """The data rank of each live completion that one of its ranks has sampled."""
    return {key: grid.data_rank_of(facts[key].rank) for key in part.live}


def move(
    sequences: Mapping[Key, Sequence], plan: StepPlan, ranks: Mapping[Key, int], grid: RankGrid
) -> dict[Key, Sequence]:
    """This rank's `sequences` after each of `ranks` (data ranks) is where it belongs; all ranks call it together."""
    rank, own_rank = distributed.rank(), grid.data_rank
    moving = [[] for _ in range(distributed.world_size())]  # of every rank, in one order everywhere
    for key in sorted(ranks):
        source = plan.facts[key].rank
        if grid.group_size > 1 or source != ranks[key]:  # others of its group do not have it
            moving[source].append(key)
    own = {key: s for key, s in sequences.items() if ranks.get(key, own_rank) == own_rank}
    sizes = [sum(_size(plan.facts[key]) for key in keys) for keys in moving]
    if not any(sizes):
        return own
    sent = np.concatenate([_encode(sequences[key]) for key in moving[rank]] or [_NOTHING])
    received = distributed.gather_tensors(torch.from_numpy(sent), sizes)
    for keys, numbers in zip(moving, received, strict=True):
        starts = np.cumsum([0, *(_size(plan.facts[key]) for key in keys)])
        for key, start, end in zip(keys, starts[:-1], starts[1:], strict=True):
            if ranks[key] == own_rank:
                own[key] = _decode(numbers[start:end].numpy(), plan.facts[key])
    return dict(sorted(own.items()))


_NOTHING = np.zeros(0, np.int32)


def _size(fact: Fact) -> int:
    return fact.num_prompt_tokens + 2 * fact.num_tokens + 1


def _encode(s: Sequence) -> np.ndarray:  # (P + 2 R + 1,) int32
    assert s.old_logprobs is not None
    assert s.ref_logprobs is None, "they are made where the sequence is trained on"
    ids = np.array([*s.prompt_ids, *s.completion_ids], np.int32)
    # as float32, which is what a micro-batch takes
    return np.concatenate(
        (ids, np.array([*s.old_logprobs, s.advantage], np.float32).view(np.int32))
    )


def _decode(numbers: np.ndarray, fact: Fact) -> Sequence:
    P, R = fact.num_prompt_tokens, fact.num_tokens
    floats = numbers[P + R :].view(np.float32).tolist()
    return Sequence(
        numbers[:P].tolist(), numbers[P : P + R].tolist(), old_logprobs=floats[:-1],
        advantage=floats[-1],
    )  # fmt: skip
