"""DAPO's dynamic sampling (2503.14476): groups are drawn until the batch is full of those with signal.

The batch is the first `prompts_per_step` groups with signal in the order of the draws, never of their ends:
a function of weights, seed and step, whatever the timing, the number of ranks and the engine's history.
Candidates begin while others still decode, and what cannot be among the first any more is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from r1fast import distributed
from r1fast.config import Config
from r1fast.grpo import groups_with_signal
from r1fast.interrupt import ServersLost, Stopped, boundary, giving_up
from r1fast.metrics import warn
from r1fast.rollout.engine import Engine
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams
from r1fast.timer import Timer
from r1fast.types import Problem, RolloutGroup, TokenEvent

ROUND = (
    16  # steps of the engine between two looks at what has ended: a count, so that a run repeats
)
Candidate = tuple[Problem, list[int]]  # with its prompt ids


class Draws:
    """What has been drawn and what is known of it; the same on every rank."""

    def __init__(self, num_wanted: int, limit: int):
        self.num_wanted, self.limit = num_wanted, limit
        self.num_started = 0
        self.signal: dict[int, bool] = {}  # of the draws that have ended

    @property
    def taken(self) -> list[int]:
        """The batch: the first draws with signal, as far as is known."""
        return [d for d in sorted(self.signal) if self.signal[d]][: self.num_wanted]

    @property
    def end(self) -> int:
        """Draws from here on cannot be in the batch, whatever comes of those before."""
        taken = self.taken
        return taken[-1] + 1 if len(taken) == self.num_wanted else self.num_started

    @property
    def num_open(self) -> int:
        """Draws that have begun, not ended, and may be in the batch."""
        return sum(draw not in self.signal for draw in range(self.end))

    @property
    def is_done(self) -> bool:
        full = len(self.taken) == self.num_wanted
        return not self.num_open and (full or self.num_started == self.limit)

    @property
    def is_short(self) -> bool:
        """Whether what is under way will probably not fill the batch, and another may begin.

        By the share of signal in this step, of which a quarter of a batch is thought good at first.
        """
        good, prior = sum(self.signal.values()), max(1.0, self.num_wanted / 4)
        share = (good + prior) / (len(self.signal) + prior)
        return self.num_started < self.limit and good + share * self.num_open < self.num_wanted


@dataclass
class Drawn:
    """What one rank has of a step: groups with rewards, in the order of the draws."""

    kept: list[RolloutGroup] = field(default_factory=list)
    # with those that have no signal, up to the draw that filled the batch: rewards of all that was
    # drawn up to there are the policy's, those of what is kept would not be
    sampled: list[RolloutGroup] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class DynamicSampler:
    """One step's draws: `sample` is called once.

    Rewards are made in another thread while the engine decodes. Groups that end in one round are known
    at the end of the next, by then or waited for: so what is begun and stopped when repeats too.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        config: Config,
        candidates: Sequence[Candidate],  # in the order of the draws, over all ranks
        seeds: Callable[[int], list[int]],  # of a draw's samples
        score: Callable[[list[RolloutGroup]], None],
        timer: Timer,
    ):
        self.engine, self.sampling, self.config = engine, sampling, config
        self.candidates, self.seeds, self.score, self.timer = candidates, seeds, score, timer
        self.draws = Draws(config.grpo.prompts_per_step, len(candidates))
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.draw_of: dict[int, int] = {}  # of a request
        self.events: dict[int, dict[int, TokenEvent]] = {}  # draw -> sample -> all of it
        self.groups: dict[int, RolloutGroup] = {}  # of draws that have ended
        self.scoring: list[tuple[Future, list[RolloutGroup]]] = []
        self.lost: ServersLost | None = None

    def sample(self) -> Drawn:
        """Raises FloatingPointError where the policy's logits are not finite."""
        draws = self.draws
        pool = ThreadPoolExecutor(1, "reward", initializer=self._take_device)
        try:
            for draw in range(min(draws.num_wanted, draws.limit)):
                self._begin(draw, draw % self.world_size)
            while not draws.is_done:
                before, self.scoring = self.scoring, []
                with self.timer("rollout"):
                    ended = self._decode_or_end()
                if ended:
                    self.scoring.append((pool.submit(self.score, ended), ended))
                if not self.engine.has_work:
                    before, self.scoring = before + self.scoring, []
                with self.timer("reward"):
                    outcomes = self._outcomes(before)
                self._exchange(outcomes)
        finally:
            for request in self.draw_of:
                self.engine.abort(request)
            pool.shutdown(wait=not giving_up(), cancel_futures=True)
        with self.timer("rollout"):
            self._decode()  # the events of what was stopped
        return self._drawn()

    def _take_device(self) -> None:
        if self.engine.device.type == "cuda":  # a thread's own setting, for reward models
            torch.cuda.set_device(self.engine.device)

    def _begin(self, draw: int, rank: int) -> None:
        self.draws.num_started = draw + 1
        if rank != self.rank:
            return
        request = self.engine.add(
            self.candidates[draw][1],
            self.seeds(draw),
            self.sampling,
            name=f"draw {draw}",
            stream=False,
        )
        self.draw_of[request], self.events[draw] = draw, {}

    def _decode_or_end(self) -> list[RolloutGroup]:
        """A round; that there are no servers any more is for all ranks to know first."""
        try:
            return self._decode()
        except ServersLost as error:
            if self.world_size == 1:
                raise
            self.lost = error
            return []

    def _decode(self) -> list[RolloutGroup]:
        """A round of the engine. Returns the groups that have ended."""
        ended = []
        left = ROUND
        while left > 0 and self.engine.has_work:
            boundary("rollout")
            before = self.engine.num_decode_steps
            events = self.engine.step(left)  # may stop earlier by the clock, but not the round
            left -= max(1, self.engine.num_decode_steps - before)
            for event in events:
                if (draw := self.draw_of.get(event.request_id)) is None:
                    continue
                self.events[draw][event.sample] = event
                if event.finish_reason == "error":  # nothing to train on, and no group without it
                    raise FloatingPointError(event.error)
                if len(self.events[draw]) == self.config.rollout.num_generations:
                    del self.draw_of[event.request_id]
                    if group := self._group(draw):
                        ended.append(group)
        return ended

    def _group(self, draw: int) -> RolloutGroup | None:
        events = [event for _, event in sorted(self.events[draw].items())]
        if any(event.finish_reason == "abort" for event in events):
            return None
        problem, prompt_ids = self.candidates[draw]
        completions = [completion_of([event]) for event in events]
        self.groups[draw] = RolloutGroup(problem, list(prompt_ids), completions, position=draw)
        return self.groups[draw]

    def _outcomes(self, scoring: list[tuple[Future, list[RolloutGroup]]]) -> list[tuple[int, bool]]:
        """(draw, whether it may be in the batch) of groups whose rewards are waited for."""
        outcomes = []
        for future, groups in scoring:
            future.result()
            keeps = self._keeps(groups)
            outcomes += [(g.position, keep) for g, keep in zip(groups, keeps, strict=True)]
        return outcomes

    def _keeps(self, groups: list[RolloutGroup]) -> list[bool]:
        signals = groups_with_signal(groups)
        if self.config.grpo.dynamic_sampling == "signal":
            return signals
        return [signal and is_mixed(group) for signal, group in zip(signals, groups, strict=True)]

    def _exchange(self, outcomes: list[tuple[int, bool]]) -> None:
        """All ranks learn all outcomes, and stop and begin the same draws."""
        draws, stats, G = self.draws, self.engine.stats, self.config.rollout.num_generations
        # one group in advance, so that a slot that comes free is taken in the same step
        free = self.config.rollout.max_batch_size + G - stats.num_running - stats.num_waiting
        ends = giving_up() or self.lost is not None
        parts = distributed.gather_objects([outcomes, free, ends])
        if any(gives_up for _, _, gives_up in parts):
            raise self.lost or Stopped
        for ended, _, _ in parts:
            draws.signal.update((draw, has_signal) for draw, has_signal in ended)
        for request, draw in self.draw_of.items():
            if draw >= draws.end:
                self.engine.abort(request)
        room = [free for _, free, _ in parts]
        while draws.is_short and max(room) > 0:
            rank = room.index(max(room))
            room[rank] -= G
            self._begin(draws.num_started, rank)

    def _drawn(self) -> Drawn:
        draws, wanted = self.draws, self.draws.num_wanted
        taken, own = set(draws.taken), sorted(self.groups)
        kept = [self.groups[draw] for draw in own if draw in taken]
        lengths = {d: sum(len(e.token_ids) for e in x.values()) for d, x in self.events.items()}
        sums = distributed.sum_dict({
            "all": float(sum(lengths.values())),
            "kept": float(sum(lengths[d] for d in own if d in taken)),
            "aborted": float(sum(n for d, n in lengths.items() if d not in self.groups)),
        })  # fmt: skip
        if missing := wanted - len(taken):
            warn(
                "dynamic sampling: a step has fewer than grpo.prompts_per_step groups with signal "
                f"after grpo.max_rollout_factor = {self.config.grpo.max_rollout_factor} times as many "
                "(or all problems) were sampled, and goes on with those it has; "
                "rollout/groups_missing counts them"
            )
        return Drawn(
            kept,
            [self.groups[draw] for draw in own if draw < draws.end],
            {
                "rollout/groups_generated": draws.num_started,
                "rollout/groups_kept": len(taken),
                "rollout/groups_missing": missing,
                "rollout/oversampling": draws.num_started / wanted,
                "rollout/tokens_discarded": 1 - sums["kept"] / max(sums["all"], 1),
                "rollout/tokens_aborted": sums["aborted"],
            },
        )


def is_mixed(group: RolloutGroup) -> bool:
    """0 < #correct < G, of what the grader could judge; true where nothing is to be verified."""
    verdicts = [r.verdict for r in group.rewards if r.verdict not in (None, "error")]
    if not verdicts:
        return all(r.verdict is None for r in group.rewards)
    return 0 < verdicts.count("correct") < len(verdicts)
