"""Seconds of a step by phase, and of its parts while they are profiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


class Timer:
    """Seconds per phase: `with timer("rollout"): ...`, then `timer.take()`.

    Phases may nest and repeat; a nested phase counts in its parent too. `sync` runs before each
    reading of the clock (torch.cuda.synchronize where the time of queued work should count). `part`s
    of a phase are timed while there is a `mark`, a profiler's range of a name; every phase gets one then.
    """

    mark: Callable[[str], AbstractContextManager] | None = None

    def __init__(
        self,
        sync: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda phase: None,  # told as each begins
    ):
        self.sync, self.clock, self.on_phase = sync, clock, on_phase
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with nullcontext() if self.mark is None else self.mark(phase):
            self.on_phase(phase)
            self._running.append(phase)
            began = self._now()
            try:
                yield
            finally:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - began
                self._running.pop()

    def part(self, name: str) -> AbstractContextManager:
        """`with timer.part("forward"):` times "train/forward" inside of "train"; without a mark nothing."""
        if self.mark is None:
            return nullcontext()
        return self("/".join([*self._running[-1:], name]))

    def seconds(self) -> dict[str, float]:
        """{"rollout": seconds, "rollout/decode": seconds, ...} since the last `take`."""
        return dict(self._seconds)

    def phase_seconds(self) -> dict[str, float]:
        """{"time/rollout": seconds, ...} since the last `take`, without parts."""
        return {f"time/{phase}": x for phase, x in self._seconds.items() if "/" not in phase}

    def take(self) -> dict[str, float]:
        """`phase_seconds()`, and start again from zero."""
        seconds = self.phase_seconds()
        self._seconds.clear()
        return seconds

    def _now(self) -> float:
        if self.sync is not None:
            self.sync()
        return self.clock()
