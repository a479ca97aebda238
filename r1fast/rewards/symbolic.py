"""Worker processes that compare symbolic answers, killed at a deadline and replaced.

JSON lines over pipes: {"id", "gold", "answer"} in, {"id", "same": true | false | null} out. A worker is a process
that has sympy and its forked child that compares: at a deadline the child is killed and says
{"late"} by way of its parent, the next one {"ready", "pid"}. No signal is handled in this process,
so any thread may ask.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from r1fast.types import Verdict
from r1fast.worker_process import Late, WorkerProcess

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_START_TIMEOUT = 60.0  # importing sympy on a busy machine
_FORK_TIMEOUT = 10.0  # a new child of a worker that is up
_log = logging.getLogger(__name__)


class SymbolicPool:
    """`num_workers` processes, each started when it is first needed, replaced when it is killed.

    A comparison may take `timeout` seconds by the clock and `cpu_timeout` seconds of processor
    time: the second holds it short, the first holds where the machine is busy or the worker stuck.
    """

    def __init__(
        self, timeout: float, num_workers: int, memory_bytes: int, cpu_timeout: float = 0.6
    ):
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.timeout = timeout
        self.cpu_timeout = min(cpu_timeout, timeout)
        self.memory_bytes = memory_bytes
        self.num_workers = num_workers
        self.available = find_spec("math_verify") is not None
        self.num_restarts = 0
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(num_workers):
            self._slots.put(None)

    def compare(self, gold: str, answer: str, until: float | None = None) -> Verdict:
        """A verdict; unparseable where math-verify is missing or cannot read an answer.

        `until` (of time.monotonic) is the deadline of a whole batch: a comparison that it ends is a
        timeout, one that did not begin before it is an error, for the answer had no part in that.
        """
        if not self.available:
            return "unparseable"
        if self._closed:
            raise RuntimeError("the symbolic grader is closed")
        try:
            left = None if until is None else max(0.0, until - time.monotonic())
            worker = self._slots.get(timeout=left) if left != 0 else self._slots.get_nowait()
        except queue.Empty:
            return "error"
        try:
            if self._closed:
                raise RuntimeError("the symbolic grader was closed")
            if until is not None and time.monotonic() >= until:
                return "error"
            if worker is not None and not worker.is_running():
                worker.kill()
                worker = None
            if worker is None:
                worker = _Worker(self.memory_bytes, self.cpu_timeout)
            if not worker.is_ready(until):
                return "error"
            left = self.timeout if until is None else min(self.timeout, until - time.monotonic())
            reply = worker.ask({"gold": gold, "answer": answer}, max(0.0, left))
        except Late:
            with self._lock:
                self.num_restarts += 1
            assert worker is not None
            if not worker.kill_child():
                worker = self._replacement(worker)
            return "timeout"
        except (OSError, ValueError) as error:
            _log.warning("symbolic worker failed: %s", error)
            worker = self._replacement(worker)
            return "error"
        except BaseException:  # a Ctrl-C: its reply would be taken for the next one's
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            self._slots.put(worker)
        if reply.get("same") is None:
            return "unparseable"
        return "correct" if reply["same"] else "wrong"

    def compare_all(
        self, pairs: Sequence[tuple[str, str]], until: float | None = None
    ) -> list[Verdict]:
        """`compare` for (gold, answer) pairs, as many at once as there are workers, in order."""
        if len(pairs) < 2 or self.num_workers == 1:
            return [self.compare(gold, answer, until) for gold, answer in pairs]
        threads = min(self.num_workers, len(pairs))
        with ThreadPoolExecutor(threads, thread_name_prefix="symbolic") as executor:
            return list(executor.map(lambda pair: self.compare(*pair, until), pairs))

    def _replacement(self, worker: _Worker | None) -> _Worker | None:
        """A new worker, which gets ready while nobody waits for it."""
        if worker is not None:
            worker.kill()
        with self._lock:
            self.num_restarts += 1
        if self._closed:
            return None
        try:
            return _Worker(self.memory_bytes, self.cpu_timeout)
        except OSError as error:
            _log.warning("no new symbolic worker: %s", error)
            return None

    def close(self) -> None:
        """Kill the workers; one that is busy when its comparison ends or is late."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self.num_workers):
            worker = self._slots.get()
            if worker is not None:
                worker.kill()
        for _ in range(self.num_workers):  # wakes whoever still waits for a slot
            self._slots.put(None)


class _Worker(WorkerProcess):
    def __init__(self, memory_bytes: int, cpu_timeout: float):
        super().__init__(_WORKER, memory_bytes, cpu_timeout)
        self._start_by: float | None = time.monotonic() + _START_TIMEOUT  # None once it is ready
        self._child = 0  # the process that compares
        self._number = 0  # of the last request

    def is_ready(self, until: float | None) -> bool:
        """Wait for it to come up; False where `until` comes first. OSError where it does not."""
        if self._start_by is None:
            return True
        deadline = self._start_by if until is None else min(self._start_by, until)
        try:
            ready = self.read(deadline)
            while "pid" not in ready and ready.get("ready") is not False:  # of the last child
                ready = self.read(deadline)
        except Late:
            if deadline == until:
                return False
            raise OSError("symbolic worker did not come up in time") from None
        if not ready.get("ready"):
            raise OSError(f"symbolic worker did not start: {ready}")
        self._start_by, self._child = None, ready["pid"]
        return True

    def kill_child(self) -> bool:
        """End the comparison that is late; False where the worker itself has ended."""
        self._start_by = time.monotonic() + _FORK_TIMEOUT
        if not self.is_running():
            return False
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        self._child = 0
        return True

    def ask(self, request: dict, timeout: float) -> dict:
        deadline = time.monotonic() + timeout
        self._number += 1
        self.send(request | {"id": self._number}, deadline)
        reply = self.read(deadline)
        while (
            "late" not in reply and reply.get("id") != self._number
        ):  # of one that was interrupted
            reply = self.read(deadline)
        if "late" in reply:
            self._child = 0
            if reply["late"]:
                raise Late
            raise OSError("the process that compares has died")
        return reply
