"""Worker processes that compare symbolic answers, killed at a wall-clock deadline.

JSON lines over pipes: {"gold", "answer"} in, {"same": true | false | null} out. No signal is used
in this process, so any thread may ask; a worker that is late or dies is replaced.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec
from pathlib import Path

from r1fast.types import Verdict

_WORKER = Path(__file__).with_name("symbolic_worker.py")
_START_TIMEOUT = 60.0  # importing sympy on a busy machine
_log = logging.getLogger(__name__)


class SymbolicPool:
    """`num_workers` processes, each started when it is first needed."""

    def __init__(self, timeout: float, num_workers: int, memory_bytes: int):
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        self.available = find_spec("math_verify") is not None
        self.num_restarts = 0
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(num_workers):
            self._slots.put(None)
        self._num_workers = num_workers

    def compare(self, gold: str, answer: str) -> Verdict:
        """A verdict; unparseable where math-verify is missing or cannot read an answer."""
        if not self.available:
            return "unparseable"
        if self._closed:
            raise RuntimeError("the symbolic grader is closed")
        worker = self._slots.get()
        try:
            if self._closed:
                raise RuntimeError("the symbolic grader was closed")
            if worker is not None and worker.process.poll() is not None:
                worker.kill()
                worker = None
            if worker is None:
                worker = _Worker(self.memory_bytes)
            reply = worker.ask({"gold": gold, "answer": answer}, self.timeout)
        except _Late:
            worker = self._replace(worker)
            return "timeout"
        except (OSError, ValueError) as error:
            _log.warning("symbolic worker failed: %s", error)
            worker = self._replace(worker)
            return "error"
        finally:
            self._slots.put(worker)
        if reply.get("fatal"):
            return "error"
        if reply.get("same") is None:
            return "unparseable"
        return "correct" if reply["same"] else "wrong"

    def _replace(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
        with self._lock:
            self.num_restarts += 1

    def close(self) -> None:
        """Kill the workers; one that is busy when its comparison ends or is late."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self._num_workers):
            worker = self._slots.get()
            if worker is not None:
                worker.kill()
        for _ in range(self._num_workers):  # wakes whoever still waits for a slot
            self._slots.put(None)


class _Late(Exception):
    """No reply before the deadline."""


class _Worker:
    def __init__(self, memory_bytes: int):
        # -P: the folder of the script stays off sys.path, where math.py would hide the stdlib's
        kept = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "SYSTEMROOT")
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in kept if name in os.environ},
            start_new_session=True,  # a Ctrl-C in the terminal is for the trainer
        )
        self._finalizer = weakref.finalize(self, _end, self.process)
        self.buffer = b""
        try:
            ready = self._read(_START_TIMEOUT)
        except BaseException:
            self.kill()
            raise
        if not ready.get("ready"):
            self.kill()
            raise OSError(f"symbolic worker did not start: {ready}")

    def ask(self, request: dict, timeout: float) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return self._read(timeout)

    def _read(self, timeout: float) -> dict:
        """One line of JSON, by polling the pipe: nothing here blocks beyond the deadline."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise _Late
            chunk = os.read(descriptor, 65536)
            if not chunk:
                raise OSError(f"worker ended with status {self.process.wait()}")
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError(f"not a reply: {line[:80]!r}")
        return reply

    def kill(self) -> None:
        self._finalizer()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes for a dead reader
                pipe.close()
