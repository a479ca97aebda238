"""Completions of problems by the policy, all at once or one by one as they end.

A completion depends on its prompt and its seed alone, so samples that an interrupted run has left
need not be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b

from r1fast import distributed
from r1fast.config import Config
from r1fast.interrupt import any_rank, boundary, stoppable
from r1fast.metrics import warn
from r1fast.policy import Policy
from r1fast.progress import progress
from r1fast.rollout.make_engine import make_engine
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.templates import encode_prompts
from r1fast.types import Completion, Problem, RolloutGroup

TOKENS_AT_ONCE = 64  # steps of the engine in one call, where nobody waits for single tokens


@dataclass(frozen=True, slots=True)
class Ask:
    """A problem of this rank, ready to be sampled."""

    problem: Problem
    prompt_ids: list[int]
    seeds: list[int]  # (k,)

    @property
    def prompt_hash(self) -> str:
        """Of the token ids that the model is given."""
        return blake2b(repr(self.prompt_ids).encode(), digest_size=8).hexdigest()


def asks_of(
    policy: Policy, problems: Sequence[Problem], config: Config, num_samples: int, purpose: str
) -> list[Ask]:
    """This rank's share of `problems`. Prompts that are too long are reported and left out."""
    room = min(config.rollout.max_prompt_tokens, policy.model.spec.max_position_embeddings - 1)
    ids, kept, dropped = encode_prompts(problems, policy.tokenizer, config.template, room)
    if dropped:
        warn(f"{len(dropped)} of {len(problems)} prompts are longer than {room} tokens: left out")
    rank, world_size = distributed.rank(), distributed.world_size()
    return [
        Ask(
            problems[i],
            prompt,
            [sample_seed(config.seed, purpose, problems[i].id, j) for j in range(num_samples)],
        )
        for prompt, i in zip(ids[rank::world_size], kept[rank::world_size], strict=True)
    ]


def sample_groups(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    sampling: SamplingParams,
    num_samples: int,
    *,
    purpose: str,
    title: str = "",
) -> list[RolloutGroup]:
    """This rank's share of `num_samples` completions of each problem, not yet scored.

    Prompts that are too long are reported and left out. With a `title` progress is shown.
    """
    asks = asks_of(policy, problems, config, num_samples, purpose)
    found: dict[tuple[int, int], Completion] = {}
    sample_missing(
        policy, asks, config, sampling, {},
        lambda i, j, completion: found.__setitem__((i, j), completion), title=title,
    )  # fmt: skip
    return [
        RolloutGroup(ask.problem, ask.prompt_ids, [found[i, j] for j in range(num_samples)])
        for i, ask in enumerate(asks)
    ]


def sample_missing(
    policy: Policy,
    asks: Sequence[Ask],
    config: Config,
    sampling: SamplingParams,
    done: Mapping[tuple[int, int], object],  # (place in `asks`, sample) that need not be drawn
    on_finish: Callable[[int, int, Completion], None],
    *,
    title: str = "",
) -> None:
    """Draw every sample of `asks` that is not in `done`, and hand each on as soon as it ends.

    Failed ones (logits that are not finite) are handed on too and counted in a warning. Raises
    FloatingPointError where every completion has failed.
    """
    missing = [
        [j for j in range(len(ask.seeds)) if (i, j) not in done] for i, ask in enumerate(asks)
    ]
    total = sum(len(ask.seeds) for ask in asks)
    num_missing = sum(map(len, missing))
    # ranks bring servers up to date together, and agree at the end whether one was told to stop
    if not any_rank(num_missing > 0):
        return
    failed: list[str] = []
    start = total - num_missing
    with (
        closing(make_engine(policy, config.rollout)) as engine,
        progress(title, total=total, unit="sample", start=start, enabled=bool(title)) as bar,
        stoppable(meanwhile=engine.tend),
    ):
        engine.sync()
        places: dict[int, int] = {}
        for i, (ask, own) in enumerate(zip(asks, missing, strict=True)):
            if own:
                request = engine.add(
                    ask.prompt_ids,
                    [ask.seeds[j] for j in own],
                    sampling,
                    name=f"problem {ask.problem.id}",
                    stream=False,
                )
                places[request] = i
        while engine.has_work:
            boundary("sampling", title)
            for event in engine.step(TOKENS_AT_ONCE):
                i = places[event.request_id]
                completion = completion_of([event])
                if completion.finish_reason == "error":
                    failed.append(completion.error)
                on_finish(i, missing[i][event.sample], completion)
                bar.update()
    if failed:
        if len(failed) == num_missing:
            raise FloatingPointError(failed[0])
        warn(f"{len(failed)} of {total} completions failed and are cut off (first: {failed[0]})")
