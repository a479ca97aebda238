"""What boxes use, from /proc: memory where there are no cgroups, and seconds of a core."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Usage:
    """Of a process and everything below it that is still there."""

    resident_bytes: int = 0  # files left out; a page that several share counts in each
    cpu_seconds: float = 0.0


def usage(roots: Iterable[int]) -> dict[int, Usage]:
    """The usage of each of `roots`; nothing for one that has gone."""
    page, ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    own: dict[int, Usage] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError):
            stat = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            _, resident, shared = Path(f"/proc/{name}/statm").read_text().split()[:3]
            parents[int(name)] = int(stat[1])
            spent = sum(map(int, stat[11:15])) / ticks  # with children that were waited for
            own[int(name)] = Usage((int(resident) - int(shared)) * page, spent)
    total = {root: Usage() for root in roots}
    for pid, part in own.items():
        at = pid
        while at and at not in total:
            at = parents.get(at, 0)
        if at:
            total[at].resident_bytes += part.resident_bytes
            total[at].cpu_seconds += part.cpu_seconds
    return total
