"""Which samples are decoded next: whole groups first come, first served, into the free slots."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from r1fast.types import Completion


@dataclass(slots=True)
class Request:
    """One sample being decoded."""

    prompt: int  # which prompt of the call
    sample: int  # which of its completions
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish_reason: str = ""

    def completion(self, text: str) -> Completion:
        return Completion(self.token_ids, self.logprobs, self.finish_reason, text, self.entropies)


class Scheduler:
    """Hands out requests of the same prompt together, so that its prefill can be shared."""

    def __init__(self, seeds: Sequence[Sequence[int]], num_slots: int):
        self.waiting = deque(
            deque(Request(p, i, seed) for i, seed in enumerate(group))
            for p, group in enumerate(seeds)
            if group
        )
        self.num_slots = num_slots
        self.running: list[Request] = []  # slot i decodes running[i]

    @property
    def done(self) -> bool:
        return not self.running and not self.waiting

    def admit(self) -> list[list[Request]]:
        """Requests for the free slots, grouped by prompt."""
        groups = []
        free = self.num_slots - len(self.running)
        while free and self.waiting:
            group = self.waiting[0]
            taken = [group.popleft() for _ in range(min(free, len(group)))]
            if not group:
                self.waiting.popleft()
            free -= len(taken)
            groups.append(taken)
        return groups
