"""`generate` and `stream`: whole calls, as loops over the engine's `add` and `step`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain

from r1fast.interrupt import boundary
from r1fast.rollout.request import token_ids
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.types import Problem, RolloutGroup, TokenEvent

TOKENS_AT_ONCE = 64  # at most, where nobody waits for single ones


class Loops:
    """The part of `engine.Engine` that drives itself."""

    # what a rank that has its samples does for those that have not
    tend: Callable[[], None] | None = None
    # request id -> events that another loop's step had: a callback may generate, streams may take turns
    _events: dict[int, list[TokenEvent]]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: SamplingParams,
        *,
        seed: int = 0,
        return_entropy: bool = False,
        names: Sequence[str] | None = None,  # how errors call the prompts; None: "prompt 0" ...
    ) -> Iterator[TokenEvent]:
        """The events of `num_generations` samples of each prompt; request_id is the prompt's index.

        Other calls of `stream` and `generate` may take turns with it. Events of requests that were `add`ed go
        to whoever steps, and are lost here: use `step` for both.
        """
        seeds = _seeds(prompts, num_generations, seed)
        ids = self._add_all(
            prompts, seeds, sampling, names, stream=True, return_entropy=return_entropy
        )
        with closing(self._steps(ids)) as steps:
            for events in steps:
                yield from events

    def _add_all(self, prompts, seeds, sampling, names=None, **options) -> dict[int, int]:
        """Add all prompts or, where one is bad, none. Returns request id -> position."""
        ids: dict[int, int] = {}
        try:
            for i, (prompt, own) in enumerate(zip(prompts, seeds, strict=True)):
                name = f"prompt {i}" if names is None else names[i]
                ids[self.add(prompt, own, sampling, name=name, **options)] = i
        except ValueError:
            self._discard(ids)
            raise
        self._events |= {id: [] for id in ids}
        return ids

    def _steps(self, ids: dict[int, int]) -> Iterator[list[TokenEvent]]:
        """The events of requests, id -> position, of each step until they have ended; under positions.

        Nothing of them stays when this is left early.
        """
        try:
            while True:
                events = [event for id in ids for event in self._events[id]]
                if not events:
                    under_way = chain(self._requests, (e.request_id for e in self._ended))
                    if ids.keys().isdisjoint(under_way):
                        return
                    boundary("rollout")
                    for event in self.step(TOKENS_AT_ONCE):
                        is_own = event.request_id in ids
                        (events if is_own else self._events.get(event.request_id, [])).append(event)
                for id in ids:
                    self._events[id].clear()
                yield [replace(e, request_id=ids[e.request_id]) for e in events]
        finally:
            self._discard(ids)
            for id in ids:
                self._events.pop(id, None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int | None,  # None: as many as there are `seeds`
        sampling: SamplingParams,
        *,
        seed: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,  # (N, G) instead of some made from `seed`
        problems: Sequence[Problem] | None = None,  # (N,) that the prompts are of
        return_entropy: bool = False,
        on_finish: Callable[[int], None] = lambda num_finished: None,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> list[RolloutGroup]:
        """G completions of each of N prompts, in order; events of each step to `on_token`.

        A completion depends on its prompt and seed, not on its batch mates or on what the engine did
        before: to the last bit on the CPU's native forward (`batch_invariant` insists on it), elsewhere
        up to the rounding of GEMMs, whose order of summation may depend on the batch. A completion whose
        logits are not finite ends with finish_reason "error", one that is aborted meanwhile with "abort".
        The request_id of an event is its prompt's index. Raises ValueError for bad input, before anything
        is sampled, and FloatingPointError where every completion has failed.
        """
        if seeds is None:
            seeds = _seeds(prompts, num_generations, seed)
        if len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts need as many lists of seeds, got {len(seeds)}"
            )
        if num_generations is not None and any(len(own) != num_generations for own in seeds):
            raise ValueError(
                f"num_generations = {num_generations} needs as many seeds for each prompt, "
                f"got {[len(own) for own in seeds]!r:.80}; None takes as many as there are"
            )
        if problems is not None and len(problems) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many problems, got {len(problems)}")
        stream = on_token is not None
        ids = self._add_all(prompts, seeds, sampling, stream=stream, return_entropy=return_entropy)
        parts: list[list[list[TokenEvent]]] = [[[] for _ in own] for own in seeds]
        num_finished = 0
        with closing(self._steps(ids)) as steps:
            for events in steps:
                for event in events:
                    parts[event.request_id][event.sample].append(event)
                    if on_token is not None:
                        on_token(event)
                if ended := sum(e.finish_reason is not None for e in events):
                    num_finished += ended
                    on_finish(num_finished)
        completions = [[completion_of(events) for events in group] for group in parts]
        flat = [c for group in completions for c in group]
        if flat and all(c.finish_reason == "error" for c in flat):
            raise FloatingPointError(flat[0].error)
        if problems is None:
            problems = [Problem("", id=f"prompt {i}") for i in range(len(prompts))]
        return [
            RolloutGroup(problem, token_ids(prompt, problem.id).tolist(), group)
            for problem, prompt, group in zip(problems, prompts, completions, strict=True)
        ]


def _seeds(prompts: Sequence, num_generations: int | None, seed: int) -> list[list[int]]:
    if num_generations is None or num_generations < 0:
        raise ValueError(f"num_generations must be at least 0, got {num_generations}")
    return [[sample_seed(seed, i, g) for g in range(num_generations)] for i in range(len(prompts))]
