"""Control groups of the boxes: memory, processes and share of the cores of a whole box, whatever it forks.

Version 1 (a hierarchy for each controller) and version 2 (where the controllers are delegated to
us). One group a slot, made once, reused, removed at the end; those of launchers that were killed are
removed by the next one.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "r1fast-"


class Cgroup:
    """The group of one slot: a folder a controller (one folder for all of them in version 2).

    `cpu` is a folder to be in, or none: groups have equal shares unless told otherwise.
    """

    def __init__(self, memory: Path, pids: Path, cpu: Path | None = None):
        self.memory, self.pids = memory, pids
        self.folders = sorted({memory, pids} | ({cpu} if cpu else set()))
        self.version = 2 if memory == pids else 1

    def limit(self, memory_bytes: int, num_processes: int) -> None:
        """Of all members together. A limit below what is still being freed is left as it was."""
        if self.version == 2:
            settings = [("memory.max", memory_bytes), ("memory.swap.max", 0)]
        else:  # the limit with swap may never be below the one without: it goes first and last
            swap = ("memory.memsw.limit_in_bytes", memory_bytes)
            settings = [swap, ("memory.limit_in_bytes", memory_bytes), swap]
        for name, value in settings:
            with contextlib.suppress(OSError):  # without swap accounting some are missing
                (self.memory / name).write_text(str(value))
        (self.pids / "pids.max").write_text(str(num_processes))

    def memory_limit(self) -> int:
        """In bytes; 0 where there is none."""
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        text = (self.memory / name).read_text().strip()
        return 0 if text == "max" else int(text)

    def entrances(self) -> list[str]:
        """Files into which a process writes "0" to join."""
        return [str(folder / "cgroup.procs") for folder in self.folders]

    def members(self) -> list[int]:
        found: set[int] = set()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
        return sorted(found)

    def kill(self) -> None:
        """SIGKILL for all that is left, until nothing is."""
        if self.version == 2:
            with contextlib.suppress(OSError):
                (self.pids / "cgroup.kill").write_text("1")
        for _ in range(200):
            members = self.members()
            if not members:
                return
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, 9)
            time.sleep(0.001)

    def remove(self) -> None:
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


class CgroupTree:
    """Where groups can be made. ValueError, with the reason, where they cannot."""

    def __init__(self) -> None:
        self.parents: tuple[Path, ...] = _parents()
        self.version = 2 if self.parents[0] == self.parents[1] else 1
        cpu = self._cpu_parent()
        self.has_cpu = cpu is not None
        self.parents += (cpu,) if cpu else ()
        self._sweep()

    def make(self, name: str, memory_bytes: int, num_processes: int) -> Cgroup:
        folders = [parent / f"{_PREFIX}{os.getpid()}-{name}" for parent in self.parents]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        group = Cgroup(*folders)
        group.limit(memory_bytes, num_processes)
        return group

    def _cpu_parent(self) -> Path | None:
        """Where groups have a share of the cores; None where nothing gives them one."""
        if self.version == 2:
            control = self.parents[0] / "cgroup.subtree_control"
            with contextlib.suppress(OSError):
                control.write_text("+cpu")
            return self.parents[0] if "cpu" in control.read_text().split() else None
        own = _own_groups()
        if "cpu" not in own:
            return None
        parent = _ROOT / "cpu" / own["cpu"]
        probe = parent / f"{_PREFIX}{os.getpid()}-probe"
        try:
            probe.mkdir(exist_ok=True)
            (probe / "cpu.shares").read_text()
            _try_to_join([probe])
            return parent
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                probe.rmdir()

    def _sweep(self) -> None:
        """Remove the groups of launchers that died by SIGKILL."""
        for parent in set(self.parents):
            for folder in parent.glob(f"{_PREFIX}[0-9]*-*"):
                pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    with contextlib.suppress(OSError):
                        folder.rmdir()


def _own_groups() -> dict[str, str]:
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            own[controller] = path.lstrip("/")
    return own


def _parents() -> tuple[Path, Path]:
    """The folders (memory, pids) in which to make groups, tried out."""
    own = _own_groups()
    tried = []
    if "memory" in own and "pids" in own:
        tried = [tuple(_ROOT / c / own[c] for c in ("memory", "pids"))]
    else:
        at = _ROOT / own.get("", "")
        # a group with processes in it delegates nothing, so a parent may have to
        for folder in (at, *at.parents):
            if not folder.is_relative_to(_ROOT):
                break
            control = folder / "cgroup.subtree_control"
            if control.is_file():
                with contextlib.suppress(OSError):
                    control.write_text("+memory +pids")
                with contextlib.suppress(OSError):
                    if {"memory", "pids"} <= set(control.read_text().split()):
                        tried.append((folder, folder))
    reason = "no cgroup hierarchy delegates memory and pids"
    for parents in tried:
        probe = [parent / f"{_PREFIX}{os.getpid()}-probe" for parent in parents]
        try:
            for folder in probe:
                folder.mkdir(exist_ok=True)
            group = Cgroup(*probe)
            group.limit(64 << 20, 16)
            if group.memory_limit() != 64 << 20:
                raise OSError(1, "a memory limit is not kept")
            # joining is what fails where only part of a tree is ours
            _try_to_join(probe)
            return parents[0], parents[1]
        except OSError as error:
            reason = f"cgroup: {error.strerror or error}"
        finally:
            for folder in probe:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    raise ValueError(reason)


def _try_to_join(folders: list[Path]) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(OSError):
            for folder in folders:
                (folder / "cgroup.procs").write_text("0")
            status = 0
        os._exit(status)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError(1, "a process could not join a group made here")
