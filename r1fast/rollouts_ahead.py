"""Rollouts that overlap training: while a step is trained on, servers sample what the next steps need.

With grpo.max_staleness = k the requests of steps t + 1 .. t + k are sent before the update of step t, once the
servers have the weights that step t begins with. So the first token of every sample is of weights at
most k updates older than those that it trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from r1fast.config import Config
from r1fast.interrupt import boundary
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm.engine import VllmEngine
from r1fast.types import RolloutGroup, TokenEvent


def settled_update(config: Config) -> Config:
    """`config` with what rollout.vllm.update = "auto" is."""
    v = config.rollout.vllm
    if v.update != "auto":
        return config
    v = replace(v, update="keep" if config.grpo.max_staleness else "wait")
    return replace(config, rollout=replace(config.rollout, vllm=v))


@dataclass(slots=True)
class _Asked:
    """A group that is being sampled."""

    group: RolloutGroup  # without completions as yet
    num_samples: int
    ended: dict[int, TokenEvent] = field(default_factory=dict)  # sample -> all of it

    @property
    def is_whole(self) -> bool:
        return len(self.ended) == self.num_samples


class RolloutsAhead:
    """This rank's requests of the steps to come, and their samples until their step takes them.

    `groups(step)` are a step's without completions, `seeds(step, position)` those of a group's samples.
    What is out is in no checkpoint: a run that stops gives it up, and one that goes on asks again.
    """

    def __init__(
        self,
        engine: VllmEngine,
        groups: Callable[[int], list[RolloutGroup]],
        seeds: Callable[[int, int], list[int]],
        sampling: SamplingParams,
        *,
        max_staleness: int,
        num_steps: int,
    ):
        self.engine, self.sampling = engine, sampling
        self._groups, self._seeds = groups, seeds
        self.max_staleness, self.num_steps = max_staleness, num_steps
        # an update that waits for samples in flight comes when the step's own are there
        self.drains = engine.config.update == "wait"
        self._next = 0  # step whose requests have not been sent
        self._asked: dict[int, _Asked] = {}  # by request
        self._steps: dict[int, list[_Asked]] = {}
        self._waited, self._lay_ready = 0.0, 0.0

    def is_out(self, step: int) -> bool:
        """Whether the requests of this step have been sent."""
        return step < self._next

    def send(self, step: int) -> None:
        """What is not out yet of the steps from this one to the last that may begin with the servers' weights.

        These are those that `step` trains; there is nothing to send beyond the end of training.
        """
        for coming in range(
            max(step, self._next), min(step + self.max_staleness + 1, self.num_steps)
        ):
            self._steps[coming] = [self._ask(coming, group) for group in self._groups(coming)]
            self._next = coming + 1

    def _ask(self, step: int, group: RolloutGroup) -> _Asked:
        seeds = self._seeds(step, group.position)
        name = f"step {step + 1}, problem {group.problem.id}"
        request = self.engine.add(group.prompt_ids, seeds, self.sampling, name=name, stream=False)
        self._asked[request] = asked = _Asked(group, len(seeds))
        return asked

    def collect(self, step: int) -> list[RolloutGroup]:
        """The groups of a step whose requests are out, once they are all there."""
        asked, began = self._steps[step], time.monotonic()
        while not all(a.is_whole for a in asked):
            self._advance()
        self._waited += time.monotonic() - began
        arrived = [event.arrived for a in asked for event in a.ended.values()]
        self._lay_ready = max(began - max(arrived, default=began), 0.0)
        del self._steps[step]
        for a in asked:
            a.group.completions = [completion_of([a.ended[i]]) for i in range(a.num_samples)]
        return [a.group for a in asked]

    def drain(self) -> None:
        """What is under way ends, and nothing more is sent until the servers have new weights."""
        began = time.monotonic()
        self.engine.hold()
        while self.engine.stats.num_running:
            self._advance()
        self._waited += time.monotonic() - began

    def _advance(self) -> None:
        boundary("rollout")
        for event in self.engine.step():
            asked = self._asked[event.request_id]
            asked.ended[event.sample] = event
            if asked.is_whole:
                del self._asked[event.request_id]

    def take_metrics(self) -> dict[str, float]:
        """Seconds that this rank waited for samples since the last call, and its samples for it."""
        row = {"trainer": self._waited, "samples": self._lay_ready}
        self._waited = self._lay_ready = 0.0
        return row
