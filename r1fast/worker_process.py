"""A script of ours in a process of its own, asked by lines of JSON and never waited for beyond a deadline.

For work that must not run in the trainer: it may hang, or take more memory than there is. Deadlines are
those of time.monotonic.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")
CHUNK = 1 << 16


class Late(Exception):
    """No answer before the deadline."""


class Ended(OSError):
    """The process has ended; `status` is its return code."""

    def __init__(self, status: int):
        super().__init__(f"worker ended with status {status}")
        self.status = status


class WorkerProcess:
    """Ends with its owner. `process` is the Popen."""

    def __init__(self, script: Path, *arguments: object):
        # -P: the folder of the script stays off sys.path, where our math.py and types.py would hide the stdlib's
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=True,  # a Ctrl-C in the terminal is for the trainer
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._finalizer = weakref.finalize(self, _end, self.process)
        self._read = bytearray()  # and not yet given out

    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, message: Mapping[str, Any], deadline: float) -> None:
        """Raises Late. One that has ended is told of by `read`."""
        rest = memoryview(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while rest:
                if not select.select([], [self._in], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise Late
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._in, rest[:CHUNK]) :]

    def read(self, deadline: float) -> dict:
        """The next line. Raises Late, Ended, and ValueError for what is no JSON object."""
        seen = 0
        while (end := self._read.find(b"\n", seen)) < 0:
            seen = len(self._read)
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Late
            if not (chunk := os.read(self._out, CHUNK)):
                raise Ended(self.process.wait())
            self._read += chunk
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError(f"not a reply: {line[:80]!r}")
        return reply

    def kill(self) -> None:
        self._finalizer()

    def forget(self) -> None:
        """In a fork: the process and its pipes are the parent's."""
        self._finalizer.detach()


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: what it has forked too
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
