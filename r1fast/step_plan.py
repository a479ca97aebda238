"""Which completions a step counts, forwards and puts into which mini-batch: the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from r1fast.config import GRPOConfig
from r1fast.types import RolloutGroup

Key = tuple[int, int]  # (position of the group in the step, sample)


def check_groups(groups: Sequence[RolloutGroup], *, num_generations: int, vocab_size: int) -> None:
    """Raises ValueError, with problem and completion, for groups that no engine gives: what is dropped too."""
    for group in groups:
        name = f"problem {group.problem.id!r}"
        if len(group.completions) != num_generations:
            raise ValueError(
                f"{name} has {len(group.completions)} completions, "
                f"rollout.num_generations is {num_generations}"
            )
        _check_ids(f"{name}, prompt", group.prompt_ids, vocab_size)
        for i, completion in enumerate(group.completions):
            what, n = f"{name}, completion {i}", len(completion.token_ids)
            _check_ids(what, completion.token_ids, vocab_size)
            if len(completion.logprobs) != n:
                raise ValueError(
                    f"{what}: {len(completion.logprobs)} log-probabilities for {n} tokens; every token "
                    "needs that of the policy that sampled it"
                )


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise ValueError(f"{what} is empty")
    if min(ids) < 0 or max(ids) >= vocab_size:
        n = next(n for n, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise ValueError(
            f"{what}: token {n} has the id {ids[n]}; the model's are 0 to {vocab_size - 1}"
        )


class Fact(NamedTuple):
    """What all ranks know of a completion."""

    rank: int  # that has it
    num_prompt_tokens: int
    num_tokens: int
    has_advantage: bool
    is_masked: bool  # no part of the loss, so of no count of tokens either


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The completions of one optimizer step. Its denominators count what is not forwarded too."""

    keys: list[Key]
    live: list[Key]  # those that are forwarded
    num_tokens: int  # of completions with a loss


class StepPlan:
    """The facts of all ranks' completions, and what follows from them and the seed."""

    def __init__(
        self,
        facts: Mapping[Key, Fact],
        config: GRPOConfig,
        *,
        drops: bool,  # completions of advantage 0: nothing else of the loss has a gradient
    ):
        self.facts, self.config = dict(sorted(facts.items())), config
        self.unmasked = {key for key, fact in self.facts.items() if not fact.is_masked}
        self.live = {k for k in self.unmasked if self.facts[k].has_advantage or not drops}

    def num_tokens(self, keys: set[Key] | None = None) -> int:
        """Completion tokens of all, or of these."""
        return sum(f.num_tokens for key, f in self.facts.items() if keys is None or key in keys)

    def mini_batches(self, name: str) -> list[MiniBatch]:
        """All completions (or whole groups), shuffled by `name` and cut into nearly equal parts."""
        N = self.config.num_mini_batches
        groups: dict[int, list[Key]] = {}
        for key in self.facts:
            groups.setdefault(key[0], []).append(key)
        units = list(groups.values()) if self.config.whole_groups else [[k] for k in self.facts]
        if N > 1:
            random.Random(name).shuffle(units)
        bounds = [m * len(units) // N for m in range(N + 1)]
        parts = [sum(units[a:b], []) for a, b in pairwise(bounds)]
        return [
            MiniBatch(
                part,
                [key for key in part if key in self.live],
                self.num_tokens(self.unmasked.intersection(part)),
            )
            for part in parts
        ]
