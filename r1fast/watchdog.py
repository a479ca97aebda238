"""What a run is doing, for whoever watches it: a heartbeat file, and stacks where nothing moves any more.

    heartbeat.json   pid, host, stage, step, phase, time: of the last thing that moved, seconds old at most
    hang-<time>.txt  stacks of all threads and the child processes, when nothing has moved for too long

`beat` says that something has moved; a thread looks at it. Where native code holds the interpreter's lock no
thread of ours runs: then faulthandler's own writes the stacks, to stderr.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from r1fast.metrics import warn

if TYPE_CHECKING:
    from r1fast.config import LogConfig

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits: the same command may work
FIRST_STEP = 3  # times as long: compilers, caches, the first load of everything
HEARTBEAT_SECONDS = 5.0
LATE = 4  # ticks between two looks that count, on a machine that is busy
STDERR = 2


class Watchdog:
    """Watches a stage in `folder` from its own thread. `seconds` without a beat are a hang; 0: never."""

    def __init__(
        self,
        folder: str | Path,
        *,
        stage: str,
        seconds: float = 600.0,
        abort: bool = False,
        num_steps: int = 0,
        step: int = 0,
    ):
        self.folder, self.stage, self.num_steps = Path(folder), stage, num_steps
        self.seconds, self.abort = seconds, abort
        self.step, self.step_seconds = step, 0.0
        self.phase, self.detail, self.moved = "start", "", time.time()
        self.num_dumps = 0
        self._num_beats = 0
        self._patience = float(FIRST_STEP)
        self._end = threading.Event()
        from r1fast.distributed import rank

        self.rank = rank()
        self._suffix = f"-rank{self.rank}" if self.rank else ""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._arm()  # here: on a busy machine the thread may come late
        _watching.append(self)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        _watching.remove(self)
        self._end.set()
        self._thread.join()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
        self.beat("done" if kind is None else "stopped", "" if kind is None else kind.__name__)
        self._write()

    def beat(self, phase: str, detail: str = "") -> None:
        self.phase, self.detail = phase, detail
        self._num_beats += 1

    def step_ended(self, step: int, seconds: float) -> None:
        self.step, self.step_seconds, self._patience = step, seconds, 1.0
        self.beat("step")

    def _watch(self) -> None:
        limit = self.seconds or HEARTBEAT_SECONDS
        tick = min(1.0, HEARTBEAT_SECONDS / 4, limit / 8)
        seen, quiet, factor = -1, 0.0, 1.0  # seconds without a beat
        looked = told_at = time.monotonic()
        told = -1  # what the file has
        while not self._end.wait(tick):
            now = time.monotonic()
            self._arm()
            # a process that was stopped (SIGSTOP, a suspended job) looks late: it did not hang
            quiet += min(now - looked, LATE * tick)
            looked = now
            if seen != self._num_beats:
                seen, quiet, factor = self._num_beats, 0.0, 1.0
                self.moved = time.time()
            elif self.seconds and quiet >= self.seconds * self._patience * factor:
                factor *= 2
                self._dump(quiet)
                if self.abort:
                    self._leave()
            if told != seen and now - told_at >= min(HEARTBEAT_SECONDS, limit):
                told, told_at = seen, now
                self._write()

    def _arm(self) -> None:
        """The second line, which fires where our thread does not come to put it off."""
        if self.seconds:
            later = 2 * self.seconds * self._patience
            faulthandler.dump_traceback_later(later, file=STDERR, exit=self.abort)

    def _write(self) -> None:
        """A file replaced as a whole; it is as old as what it tells of."""
        values = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "rank": self.rank,
            "stage": self.stage,
            "step": self.step,
            "num_steps": self.num_steps,
            "phase": self.phase,
            "detail": self.detail,
            "time": round(self.moved, 3),
            "step_seconds": round(self.step_seconds, 3),
        }
        path = self.folder / f"heartbeat{self._suffix}.json"
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(json.dumps(values) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            warn(f"{path} could not be written, training goes on: {error}")

    def _dump(self, quiet: float) -> None:
        self.num_dumps += 1
        at = f"{self.phase}, {self.detail}" if self.detail else self.phase
        text = (
            f"r1fast: NOTHING HAS MOVED FOR {quiet:.0f} s in {self.stage}, after step {self.step}, since "
            f"{at!r} (pid {os.getpid()} on {socket.gethostname()}, log.watchdog_seconds = {self.seconds:g})\n"
            + "".join(f"child {line}\n" for line in children(os.getpid()))
        )
        name = f"hang-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}{self._suffix}.txt"
        with contextlib.suppress(OSError), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.write(STDERR, f"\n{text}".encode())
        faulthandler.dump_traceback(STDERR, all_threads=True)

    def _leave(self) -> NoReturn:
        self.phase, self.detail = "hung", f"{self.phase} {self.detail}".strip()
        self._write()
        os.write(STDERR, f"r1fast: given up with exit code {EXIT_HUNG}\n".encode())
        os._exit(EXIT_HUNG)


def watched(folder: str | Path | None, stage: str, log: LogConfig) -> AbstractContextManager:
    """A Watchdog for work that has no steps, as [log] asks for it; none where there is no folder."""
    if folder is None:
        return contextlib.nullcontext()
    return Watchdog(folder, stage=stage, seconds=log.watchdog_seconds, abort=log.watchdog_abort)


_watching: list[Watchdog] = []  # of this process; usually one


def beat(phase: str, detail: str = "") -> None:
    """Something has moved: between pieces of work, from any thread."""
    for watchdog in _watching:
        watchdog.beat(phase, detail)


def children(pid: int) -> list[str]:
    """The processes under `pid` as "pid parent state name seconds of CPU", where /proc has them."""
    rows: dict[int, tuple[int, str, str, float]] = {}
    if not sys.platform.startswith("linux"):
        return []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = path.read_text(errors="replace").rpartition(")")
        except OSError:  # it has ended
            continue
        own, _, name = head.partition(" (")
        fields = tail.split()
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        rows[int(own)] = (int(fields[1]), name, fields[0], ticks)
    found, ahead = [], [pid]
    while ahead:
        parent = ahead.pop()
        for own, (its, name, state, ticks) in sorted(rows.items()):
            if its == parent:
                found.append(f"{own} of {parent}: {name}, state {state}, {ticks:.1f} s of CPU")
                ahead.append(own)
    return found
