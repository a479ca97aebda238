"""What boxes use, from /proc: memory, seconds of a core, and what they waited for one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOOK_SECONDS = 0.25  # between two looks at the processor time of boxes; more where a look is dear
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Thread:
    cpu_seconds: float
    waited_seconds: float | None  # runnable, but without a core; None: the kernel does not say
    runnable: bool


@dataclass(slots=True)
class Usage:
    """Of a process and everything below it that is still there."""

    resident_bytes: int = 0  # files left out; a page that several share counts in each
    cpu_seconds: float = 0.0  # with children that were waited for
    pids: list[int] = field(default_factory=list)
    threads: dict[int, Thread] = field(default_factory=dict)


def usage(roots: Mapping[int, int | None], *, threads: bool = False) -> dict[int, Usage]:
    """The usage of each of `roots`, with its threads where asked for. Nothing for one that has gone.

    The value of a root is the uid that nobody else has, or None. By it a process is found whose parent
    has ended: it is a child of this process (the launcher) then, unless the box has its own pids.
    """
    parents: dict[int, int] = {}
    stats: dict[int, list[str]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = stats[int(name)] = _stat(f"/proc/{name}")
            parents[int(name)] = int(stat[1])
    total = {root: Usage() for root in roots}
    by_uid = {uid: root for root, uid in roots.items() if uid is not None}
    launcher = os.getpid()
    for pid, stat in stats.items():
        at = pid
        while at and at not in total and parents.get(at) != launcher:
            at = parents.get(at, 0)
        if not at:
            continue
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            if at not in total:
                at = by_uid[int(status_of(at)["Uid"].split()[0])]
            part = total[at]
            status = status_of(pid)
            part.pids.append(pid)
            part.cpu_seconds += sum(map(int, stat[11:15])) / _TICKS
            for kind in ("RssAnon", "RssShmem"):
                part.resident_bytes += int(status.get(kind, "0").split()[0]) << 10
            if threads:
                _add_threads(part, pid, stat)
    return total


def _read(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return file.read(1 << 16).decode("ascii", "replace")


def _stat(folder: str) -> list[str]:
    """What follows the name: state, parent, ..., times from 11 on, number of threads at 17."""
    return _read(f"{folder}/stat").rpartition(")")[2].split()


def status_of(pid: int) -> dict[str, str]:
    lines = _read(f"/proc/{pid}/status").split("\n")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _add_threads(part: Usage, pid: int, stat: list[str]) -> None:
    if int(stat[17]) == 1:
        part.threads[pid] = _thread(f"/proc/{pid}", stat)
        return
    for name in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            folder = f"/proc/{pid}/task/{name}"
            part.threads[int(name)] = _thread(folder, _stat(folder))


def _thread(folder: str, stat: list[str]) -> Thread:
    try:
        ran, waited = _read(f"{folder}/schedstat").split()[:2]
        return Thread(int(ran) / 1e9, int(waited) / 1e9, stat[0] == "R")
    except (OSError, ValueError):
        return Thread(sum(map(int, stat[11:13])) / _TICKS, None, stat[0] == "R")


class Census:
    """`usage` of all boxes with their threads, shared by those who ask at about the same time."""

    def __init__(self, boxes: Mapping[int, Any]):
        self.boxes = boxes  # by pid; each has a `lone_uid`
        self.at = -1e9
        self.seen: dict[int, Usage] = {}
        self.interval = LOOK_SECONDS

    def look(self) -> tuple[float, dict[int, Usage]]:
        """(time, usage by pid of a box), not older than half an interval."""
        now = time.monotonic()
        if now - self.at > self.interval / 2:
            roots = {pid: box.lone_uid for pid, box in self.boxes.items()}
            spent = time.process_time()
            self.seen, self.at = usage(roots, threads=True), now
            # no more than a twentieth of a core
            cost = 20 * (time.process_time() - spent)
            self.interval = min(1.0, max(LOOK_SECONDS, cost))
        return self.at, self.seen


class Meter:
    """How long a box has been waited for by its own clock: not while it is kept from running.

    Between two looks; before the first one no more than a moment counts, for then whoever looks was
    kept from running as well. What counts is the box as a whole: one in which any thread runs is not kept from running by that
    share of the time, so that processes which are in each other's way gain nothing.
    """

    def __init__(self, start: float) -> None:
        self.start = self.at = start
        self.last: Usage | None = None
        self.unseen = 0.0
        self.elapsed = self.busy = self.waited = 0.0

    @property
    def kept(self) -> float:
        """Seconds in which something of the box waited for a core that others had."""
        return self.unseen + max(0.0, min(self.waited, self.elapsed - self.busy))

    @property
    def own(self) -> float:
        return self.at - self.start - self.kept

    def look(self, now: float, seen: Usage | None) -> None:
        """`seen` is None where the box could not be found: then it was not kept from anything."""
        passed = now - self.at
        if passed <= 0:
            return
        last, self.at, self.last = self.last, now, seen
        if last is None or seen is None:
            if now - self.start == passed:
                self.unseen = max(0.0, passed - 2 * LOOK_SECONDS)
            return
        self.elapsed += passed
        self.busy += min(passed, max(0.0, seen.cpu_seconds - last.cpu_seconds))
        waited = [0.0]
        for number, thread in seen.threads.items():
            before = last.threads.get(number)
            # the kernel counts a wait when it ends: who has not run since is waiting still
            still = thread.runnable and (
                before is None
                or thread.waited_seconds is None
                or thread.cpu_seconds == before.cpu_seconds
            )
            ended = (thread.waited_seconds or 0.0) - (before.waited_seconds or 0.0 if before else 0)
            waited.append(max(ended, passed) if still else ended)
        self.waited += max(waited)
