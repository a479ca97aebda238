"""Runs programs that nobody has read: a launcher process, and boxes that it starts.

    with Sandbox() as sandbox:
        trial = sandbox.submit(job).result()

No `preexec_fn`, no fork and no signal in this process, so a threaded trainer with a GPU may use it. The
launcher ends with this process, even one that is killed, and the boxes with the launcher.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_START_TIMEOUT = 200.0  # every rung may take a box that does not answer
_log = logging.getLogger(__name__)


def find_compiler() -> str:
    """The g++ of C++ problems, or "". Boxes see /usr only."""
    found = shutil.which("g++", path="/usr/bin:/usr/local/bin")
    return os.path.realpath(found) if found else ""


class SandboxUnavailable(ValueError):
    """No isolation that was asked for is possible here; the text says why, and what would do."""


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """What boxes are made of here. `level` counts the rungs of the ladder, 0 is the best."""

    rung: str
    level: int
    parts: tuple[str, ...]
    description: str
    skipped: dict[str, str]  # better rungs, and why this machine cannot have them
    python: str  # the interpreter inside
    compiler: str  # g++ inside, or ""
    num_slots: int


@dataclass(slots=True)
class TrialResult:
    """What came of a job. `error` says that we failed, not the candidate."""

    loaded: str = ""  # yes | raised | unparseable | timeout
    why: str = ""
    error: str = ""
    tests: list[dict[str, Any]] = field(default_factory=list)  # {outcome, share, why} each
    outputs: list[str] = field(default_factory=list)  # "status: text" of programs, if `keep_output`


class Sandbox:
    """A launcher and its boxes; thread safe, starts when first needed, to be closed.

    A process that is forked off has a launcher of its own when it first needs one.

    `num_slots` is how many boxes run at once (0: two for each usable core, at least 4, so that one
    slow program holds nobody up), `num_spare` how many are kept ready. `rung` is "auto" or a name
    from sandbox_ladder.RUNGS. `cgroups=False` leaves control groups alone, as a machine without them
    does: then the launcher looks at the boxes' memory ten times a second, and gives boxes with many
    processes a lower priority. Without any isolation the first use raises SandboxUnavailable, unless
    `allow_unsafe` is set.
    """

    def __init__(
        self,
        *,
        rung: str = "auto",
        allow_unsafe: bool = False,
        num_slots: int = 0,
        num_spare: int | None = None,
        memory_bytes: int = 512 << 20,
        cgroups: bool = True,
    ):
        from r1fast.rewards.sandbox_ladder import MAX_SLOTS, RUNGS

        if rung not in ("auto", *RUNGS):
            raise ValueError(f"sandbox must be auto or one of {', '.join(RUNGS)}, got {rung!r}")
        if not 0 <= num_slots <= MAX_SLOTS:
            raise ValueError(f"num_slots must be 0 (automatic) to {MAX_SLOTS}, got {num_slots}")
        if memory_bytes < 32 << 20:
            raise ValueError(f"memory_bytes must be at least 32 MiB, got {memory_bytes}")
        cores = len(os.sched_getaffinity(0))
        num_slots = num_slots or min(MAX_SLOTS, max(4, 2 * cores))
        self._settings = {
            "rung": rung,
            "allow_unsafe": allow_unsafe,
            "num_slots": num_slots,
            "num_spare": min(num_slots, 2 * cores) if num_spare is None else num_spare,
            "memory_bytes": memory_bytes,
            "cgroups": cgroups,
        }
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._launcher: _LauncherProcess | None = None
        self._closed = False
        self.num_restarts = 0  # launchers that ended by themselves

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> SandboxInfo:
        """What the boxes are made of; starts the launcher where none runs."""
        return self._running().info

    def submit(self, job: dict[str, Any]) -> Future[TrialResult]:
        """Queue a job (see code_problem.py for its keys). The future never raises for a candidate."""
        return self._running().submit(job)

    def _running(self) -> _LauncherProcess:
        if self._pid != os.getpid():  # a fork: the launcher and the thread are its parent's
            self._lock, self._pid = threading.Lock(), os.getpid()
            self._launcher = None
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            if self._launcher is not None and self._launcher.ended:
                self._launcher.close()
                self._launcher = None
                self.num_restarts += 1
                _log.warning("the sandbox's launcher ended; it is started again")
            if self._launcher is None:
                self._launcher = _LauncherProcess(self._settings)
            return self._launcher

    def close(self) -> None:
        """End the launcher and every box; what has not come back yet is an error."""
        with self._lock:
            self._closed = True
            launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.close()


class _LauncherProcess:
    def __init__(self, settings: dict):
        self.ended = False
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[TrialResult]] = {}
        self._number = 0
        ours, theirs = socket.socketpair()
        boot = (
            f"import sys; sys.path.append({str(_ROOT)!r}); "
            "from r1fast.rewards.sandbox_launcher import main; main()"
        )
        # -S and an empty environment: nothing of the trainer's reaches it, nor what it starts
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", boot, str(theirs.fileno()), str(os.getpid()),
             json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C in the terminal is for the trainer
        )  # fmt: skip
        theirs.close()
        self._socket = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours, os.getpid())
        self._lines = ours.makefile("r", encoding="ascii", newline="\n")
        try:
            ours.settimeout(_START_TIMEOUT)
            first = self._lines.readline()
            ours.settimeout(None)
        except OSError as error:
            why = self._complaint()
            self.close()
            raise SandboxUnavailable(
                f"the sandbox's launcher did not answer in {_START_TIMEOUT:.0f} s ({error}): {why}"
            ) from None
        hello = json.loads(first) if first.endswith("\n") else {"failed": self._complaint()}
        if "failed" in hello:
            self.close()
            raise SandboxUnavailable(
                f"no sandbox on this machine: {hello['failed']}. Install bubblewrap, or set "
                "rewards.allow_unsafe_sandbox = true to run generated programs as this user, with no "
                "protection of its files, secrets and network"
            )
        self.info = SandboxInfo(**{**hello, "parts": tuple(hello["parts"])})
        threading.Thread(
            target=_read_results,
            args=(self._lines, weakref.ref(self), self._waiting, self._lock),
            name="sandbox results",
            daemon=True,
        ).start()

    def _complaint(self) -> str:
        assert self._process.stderr is not None
        self._process.kill()
        text = self._process.stderr.read()[-2000:].decode(errors="replace").strip()
        return f"the launcher said: {text or 'nothing'}"

    def submit(self, job: dict[str, Any]) -> Future[TrialResult]:
        future: Future[TrialResult] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            if self.ended:
                future.set_result(TrialResult(error="the sandbox's launcher has ended"))
                return future
            self._waiting[number] = future
            line = json.dumps({**job, "id": number}).encode("ascii") + b"\n"
            try:
                self._socket.sendall(line)
            except OSError as error:
                self._waiting.pop(number, None)
                future.set_result(TrialResult(error=f"the sandbox's launcher: {error}"))
        return future

    def close(self) -> None:
        self._finalizer()


def _read_results(
    lines: Any,
    owner: weakref.ref[_LauncherProcess],
    waiting: dict[int, Future[TrialResult]],
    lock: threading.Lock,
) -> None:
    """The thread that hands trials out, until the launcher ends."""
    try:
        for line in lines:
            if not line.endswith("\n"):
                break
            reply = json.loads(line)
            with lock:
                future = waiting.pop(reply.pop("id"), None)
            if future is not None:
                future.set_result(TrialResult(**reply))
    except (OSError, ValueError):
        pass
    if (process := owner()) is not None:
        process.ended = True
    with lock:
        left = list(waiting.values())
        waiting.clear()
    for future in left:
        future.set_result(TrialResult(error="the sandbox's launcher has ended"))


def _end(process: subprocess.Popen, control: socket.socket, owner: int) -> None:
    """The launcher ends its boxes when its socket does; it is given a moment for that."""
    if os.getpid() != owner:  # a fork leaves
        return
    try:
        control.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    control.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.stderr is not None:
        process.stderr.close()
