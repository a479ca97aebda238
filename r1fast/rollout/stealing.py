"""Work stealing: a step's groups go to the rank that has slots for them first."""

from collections.abc import Callable, Sequence

import torch.distributed as dist

from r1fast import distributed
from r1fast.interrupt import boundary
from r1fast.rollout.engine import Engine
from r1fast.rollout.loops import TOKENS_AT_ONCE
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams
from r1fast.types import Completion, TokenEvent


class Claims:
    """Which rank samples which position of a step: each its own, and then what others have not begun.

    A claim is a counter in the process group's store, so it is decided where it is made, and no rank waits
    for another one.
    """

    numbers = 0  # of steps that were begun in this process

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.num_stolen = 0  # of the step
        self._number = 0  # of the step, on all ranks
        self._taken: list[str] = []  # keys of what this rank has claimed
        self._own: list[int] = []
        self._others: list[int] = []

    def begin(self, num_positions: int) -> None:
        """A new step, on all ranks together."""
        # a rank may have given one up before it began
        Claims.numbers = self._number = 1 + max(distributed.gather_objects(Claims.numbers))
        for key in self._taken:  # nobody asks for them any more
            self.store.delete_key(key)
        self._taken, self.num_stolen = [], 0
        owners = [position % self.world_size for position in range(num_positions)]
        self._own = [p for p, owner in enumerate(owners) if owner == self.rank][::-1]
        # taken from the end: what their owners come to last
        self._others = [p for p, owner in enumerate(owners) if owner != self.rank]

    def take_own(self) -> int | None:
        return self._take(self._own)

    def steal(self) -> int | None:
        position = self._take(self._others)
        self.num_stolen += position is not None
        return position

    def _take(self, positions: list[int]) -> int | None:
        while positions:
            position = positions.pop()
            key = f"r1fast/claim/{self._number}/{position}"
            if self.store.add(key, 1) == 1:
                self._taken.append(key)
                return position
        return None


def generate_claimed(
    engine: Engine,
    claims: Claims,
    prompts: Sequence[Sequence[int]],  # of all positions, over all ranks
    seeds: Callable[[int], list[int]],  # of a position's samples
    sampling: SamplingParams,
    num_slots: int,
) -> dict[int, list[Completion]]:
    """The completions of the positions that this rank comes to, in ascending order of positions.

    A rank takes a position of its own when a slot is free or will be next, and one of another rank's where it
    can begin at once. Raises ValueError for bad input.
    """
    claims.begin(len(prompts))
    position_of: dict[int, int] = {}  # of a request
    events: dict[int, dict[int, list[TokenEvent]]] = {}  # position -> sample

    def add(position: int) -> None:
        request = engine.add(
            prompts[position], seeds(position), sampling, name=f"prompt {position}", stream=False
        )
        position_of[request], events[position] = position, {}

    def num_open() -> int:
        return engine.stats.num_running + engine.stats.num_waiting

    def fill() -> None:
        while num_open() <= num_slots and (position := claims.take_own()) is not None:
            add(position)

    def steal() -> None:
        while num_open() < num_slots and (position := claims.steal()) is not None:
            add(position)

    try:
        fill()
        distributed.barrier()  # all have what they can begin with before anybody steals
        steal()
        while engine.has_work:
            boundary("rollout")
            for event in engine.step(TOKENS_AT_ONCE):
                if (position := position_of.get(event.request_id)) is not None:
                    events[position].setdefault(event.sample, []).append(event)
            fill()
            steal()
    except BaseException:
        for request in position_of:
            engine.abort(request)
        raise
    return {
        position: [completion_of(parts) for _, parts in sorted(samples.items())]
        for position, samples in sorted(events.items())
    }
