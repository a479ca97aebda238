"""Signals noted instead of obeyed at once, so that a step can end, or be given up, and be saved.

The first SIGINT, SIGTERM or SIGUSR1 (SLURM's warning) sets a deadline. Work that cannot end and be saved
by then is given up at the next `boundary` inside of a `stoppable` block, or amid what such a block waits
for: there nothing has changed yet that a checkpoint holds. Signal handlers are the process's, and so is
the one request that is open.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from r1fast.watchdog import beat

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")  # they and torchrun's agent both pass one on
ONE_SIGNAL = 2.0  # seconds in which a launcher's signals are one
NOTHING, STOPPED, LOST = range(3)  # what a rank's work came to, the worst last
LOOKS = 0.1  # seconds between two looks at the clock once a signal came


class Stopped(KeyboardInterrupt):
    """Work was given up for a signal; what a checkpoint holds is as it was before it."""


class ServersLost(Stopped):
    """Nobody is left to sample; saved and ended as for a signal, with an exit code of its own."""


class StopRequest:
    """Inside the block the first signal only sets `received`; a second acts at once.

    `gives_up(seconds left)` says whether what runs is to be given up. Handlers can be set in the main
    thread only: elsewhere this does nothing.
    """

    def __init__(
        self,
        notice: str = "",  # to stderr when the first signal comes; a step may take a while
        *,
        deadline: float = 25.0,
        gives_up: Callable[[float], bool] = lambda left: left <= 0,
    ):
        self.notice, self.deadline, self._gives_up = notice, deadline, gives_up
        self.received = False
        self.came = 0.0  # time.monotonic() of the first signal
        self.depth = self.num_waiting = 0  # of `stoppable` blocks
        self._noted, self._closed, self._lock = threading.Event(), False, threading.Lock()
        self._wakes = False  # the signal that comes next is from `_look`
        self._main = threading.main_thread().ident
        self._before: dict = {}

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - (time.monotonic() - self.came) if self.received else self.deadline

    @property
    def gives_up(self) -> bool:
        return self.received and self._gives_up(self.left)

    def __enter__(self) -> Self:
        _raise_again()
        if threading.current_thread() is threading.main_thread():
            _open.append(self)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
            threading.Thread(target=self._look, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:  # nobody wakes us with a signal that is not ours any more
            self._closed = True
        self._noted.set()
        self._restore()
        if self in _open:
            _open.remove(self)

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received, self.came = True, time.monotonic()
            self._noted.set()
            if self.notice:
                os.write(2, f"\n{self.notice}\n".encode())  # buffered streams may be inside a write
        elif self._wakes:
            self._wakes = False
            if self.num_waiting and self.gives_up:
                raise Stopped
        elif not (is_launched() and time.monotonic() < self.came + ONE_SIGNAL):
            self._restore()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _look(self) -> None:
        """Wake the main thread out of what it waits for (a reward, say) when there is no time left."""
        self._noted.wait()
        while True:
            with self._lock:
                if self._closed:
                    return
                if self.num_waiting and self.gives_up:
                    self._wakes = True
                    signal.pthread_kill(self._main, signal.SIGUSR1)
            time.sleep(LOOKS)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_open: list[StopRequest] = []  # of this process; the innermost is last
_raised: list[int] = []  # signals that `interrupts` has made a KeyboardInterrupt of


def is_launched() -> bool:
    return any(name in os.environ for name in LAUNCHERS)


def giving_up() -> bool:
    """Whether a signal asks to give up what runs."""
    return bool(_open) and _open[-1].gives_up


def boundary(phase: str, detail: str = "") -> None:
    """Between two pieces of work, in any thread: something has moved. Raises Stopped where it is to end here."""
    beat(phase, detail)
    _raise_again()
    if not _open or not (request := _open[-1]).received:
        return
    if request.depth and threading.get_ident() == request._main and request.gives_up:
        raise Stopped


@contextmanager
def stoppable(
    *,
    waits: bool = False,
    in_step: bool = False,
    meanwhile: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Around work that exchanges nothing with other ranks and changes nothing that a checkpoint holds.

    Raises Stopped on every rank where one has given it up, ServersLost where that was why. A rank that is done
    waits for the others, and calls `meanwhile` again and again. What `waits` touches no weights, not even for
    a moment, and is also woken out of a wait. Work that ranks do in step may exchange, and stops where they have
    agreed to (`TokenBudget.each`), at no boundary of one rank alone.
    """
    if not _open or threading.get_ident() != _open[-1]._main:
        yield
        if meanwhile is not None:
            _worst(NOTHING, meanwhile)
        return
    request, stopped = _open[-1], None
    request.depth += not in_step
    request.num_waiting += waits
    try:
        yield
    except Stopped as error:
        stopped = error
        if request.depth > 1:
            raise
    finally:
        request.num_waiting -= waits
        request.depth -= not in_step
    if request.depth:
        return
    own = STOPPED if stopped is not None or request.gives_up else NOTHING
    worst = _worst(LOST if isinstance(stopped, ServersLost) else own, meanwhile)
    if stopped is None and worst == LOST:
        raise ServersLost(
            "another rank has no vLLM server left, see what it says; this one stops with it"
        )
    if worst != NOTHING:
        raise stopped or Stopped


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank: ranks stop together."""
    return bool(_worst(int(flag)))


def _worst(own: int, meanwhile: Callable[[], object] | None = None) -> int:
    """The largest number of all ranks."""
    import torch

    from r1fast import distributed

    if distributed.world_size() == 1:
        return own
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return int(distributed.all_reduce(torch.tensor(own, device=device), "max", meanwhile))


@contextmanager
def interrupts() -> Iterator[None]:
    """Outside of training: SIGTERM and SIGUSR1 are KeyboardInterrupt, as SIGINT is.

    What was sampled or graded is on disk by then. A library may swallow it amid an import: then it is
    raised again at the next boundary or beginning of a training, and what fails before that is it too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        _raised.append(number)
        raise KeyboardInterrupt

    numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except Exception as error:
        if _raised:
            raise KeyboardInterrupt from error
        raise
    finally:
        _raised.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _raise_again() -> None:
    if _raised and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
