"""One box: a confined process group with one socket to it. Used by the launcher only."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import marshal
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from r1fast.rewards.sandbox_cgroup import Cgroup
from r1fast.rewards.sandbox_files import kill_user, sweep_files
from r1fast.rewards.sandbox_ladder import NUM_PROCESSES, TMPFS_BYTES, Rung
from r1fast.rewards.sandbox_usage import Census, Meter, Usage

MAX_LINE = 8 << 20  # bytes of a message from a box
MIN_PATIENCE = 4.0
START_TIMEOUT = 20.0  # seconds, on a machine that is busy with other things
HARD_MEMORY = 8 << 30  # what a box may set its own limits up to
_KEPT_MEMORY = 96 << 20  # of a box beside its program: the harness, bubblewrap, files
# the program comes over the control socket, length first, so that no path need be reachable
_BOOT = (
    "import marshal,posix\nr=posix.read\nn=int(r(0,8))\nb=b''\n"
    "while len(b)<n:\n c=r(0,n-len(b))\n if not c:posix._exit(1)\n b+=c\n"
    "exec(marshal.loads(b) if {compiled} else compile(b,'box','exec'))"
)


class BoxFailure(Exception):
    """A box that did not start: ours, not the candidate's."""


class BoxStarved(BoxFailure):
    """A box that had too little of a core to tell whether it was late."""


@dataclass(slots=True)
class Deadline:
    """Of all that a candidate does, by its boxes' clock: moves on while they are kept from running."""

    at: float
    last: float  # ends all, whatever was the matter

    @classmethod
    def within(cls, seconds: float, patience: float) -> Deadline:
        now = asyncio.get_running_loop().time()
        return cls(now + seconds, now + patience * seconds)

    @property
    def left(self) -> float:
        return min(self.at, self.last) - asyncio.get_running_loop().time()


class Program:
    """A script for the inside of boxes, compiled here where both Pythons read the same code."""

    def __init__(self, path: Path, python: str):
        source = path.read_bytes()
        question = "import _imp,importlib.util as u;print(u.MAGIC_NUMBER.hex())"
        done = subprocess.run(
            [python, "-I", "-S", "-c", question], capture_output=True, text=True, env={}
        )
        same = done.stdout.strip() == importlib.util.MAGIC_NUMBER.hex()
        self.body = marshal.dumps(compile(source, path.stem, "exec")) if same else source
        self.argv = [python, "-I", "-S", "-c", _BOOT.format(compiled=same)]


class Slot:
    """A place for one box at a time: its uid, its cgroup."""

    def __init__(self, index: int, rung: Rung, num_processes: int, memory_bytes: int):
        self.index, self.rung = index, rung
        self.num_processes = num_processes
        first = rung.host.first_uid
        self.uid = None if first is None or rung.name == "unsafe" else first + index
        self.cgroup: Cgroup | None = None
        self.nice = 0  # what even_out() gave the box that is there
        self.memory_bytes = 0
        self._limit_memory(memory_bytes)

    def _limit_memory(self, memory_bytes: int) -> None:
        total = memory_bytes + _KEPT_MEMORY + TMPFS_BYTES
        if self.rung.host.cgroups is None:
            self.memory_bytes = total  # BoxPool.watch_memory holds it to that
        if total == self.memory_bytes:
            return
        if self.cgroup is None:
            tree, name = self.rung.host.cgroups, str(self.index)
            self.cgroup = tree.make(name, total, self.num_processes + 4)
        else:
            self.cgroup.limit(total, self.num_processes + 4)
        self.memory_bytes = total

    def limit_memory(self, memory_bytes: int) -> None:
        """Of all that the box's processes hold together."""
        try:
            self._limit_memory(memory_bytes)
        except OSError as error:
            raise BoxFailure(f"cgroup: {error}") from None


class Box:
    """A running box."""

    def __init__(self, slot: Slot, census: Census, patience: float):
        self.slot, self.census, self.patience = slot, census, patience
        slot.nice = 0
        self.pid = 0
        self.folder = ""
        self.hidden: dict[int, int] = {}  # as holds_more takes it
        self.dead = asyncio.Event()
        self.kept: socket.socket | None = None

    @property
    def lone_uid(self) -> int | None:
        """A uid that only its processes have."""
        return self.slot.uid

    def start(self, program: Program) -> None:
        """Fork and execute. No Python runs in the child but what stands in `_become`."""
        rung, slot = self.slot.rung, self.slot
        self.kept, given = socket.socketpair()
        self.diagnosis, stderr = os.pipe()
        os.set_blocking(self.diagnosis, False)
        filter_reader, filter_writer = os.pipe()
        os.write(filter_writer, rung.host.filter)
        os.close(filter_writer)
        if rung.work:
            self.folder = tempfile.mkdtemp(dir=rung.work)
            if slot.uid is not None:
                os.chown(self.folder, slot.uid, slot.uid)
        command = rung.command(program.argv, self.folder)
        pid = os.fork()
        if pid == 0:
            try:
                self._become(command, given.fileno(), stderr, filter_reader)
            except BaseException as error:
                os.write(stderr, f"{type(error).__name__}: {error}".encode()[:500])
            finally:
                os._exit(126)
        self.pid = pid
        given.close()
        os.close(stderr)
        os.close(filter_reader)
        self.kept.setblocking(False)

    def _become(self, command: list[str], control: int, stderr: int, filter_reader: int) -> None:
        slot, rung = self.slot, self.slot.rung
        if slot.cgroup is not None:
            for entrance in slot.cgroup.entrances():
                with open(entrance, "w") as file:
                    file.write("0")
        for wanted, descriptor in ((10, control), (11, stderr), (12, filter_reader)):
            os.dup2(descriptor, wanted)
        for wanted in (0, 1, 2, 3):
            os.dup2((10, 10, 11, 12)[wanted], wanted)
        os.closerange(3 if rung.name != "bwrap" else 4, 1 << 16)
        # this process has the launcher's own priority, which may be a higher one
        os.setpriority(os.PRIO_PROCESS, 0, rung.host.nice)
        if slot.uid is not None:
            os.setgroups([])
            os.setresgid(slot.uid, slot.uid, slot.uid)
            os.setresuid(slot.uid, slot.uid, slot.uid)
        for kind, value in self._limits():
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if rung.name in ("rlimits", "unsafe"):
            os.chdir(self.folder)
        if rung.name == "unsafe":
            os.setsid()
        # bubblewrap's own environment can be read in the box as that of process 1
        environment = {} if rung.name == "bwrap" else {"PATH": "/usr/bin", "PYTHONHASHSEED": "0"}
        os.execve(command[0], command, environment)

    def _limits(self) -> list[tuple[int, int]]:
        limits = [
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_AS, HARD_MEMORY),
            (resource.RLIMIT_NOFILE, 256),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_MEMLOCK, 64 << 10),
        ]
        if self.slot.uid is not None:  # another uid's would count this user's other processes
            limits.append((resource.RLIMIT_NPROC, self.slot.num_processes))
        return limits

    async def connect(self, program: Program) -> None:
        """Send the program; BoxFailure, with what was said on stderr, where nothing answers."""
        assert self.kept is not None
        self.reader, self.writer = await asyncio.open_unix_connection(
            sock=self.kept, limit=MAX_LINE
        )
        self.writer.write(b"%08d" % len(program.body) + program.body)

    async def ready(self) -> None:
        line = await self.read_line(START_TIMEOUT)
        if line != b'{"ready":true}\n':
            raise BoxFailure(self.complaint() or ("no answer" if line is None else "it ended"))

    def send(self, line: str) -> None:
        self.writer.write(line.encode("utf-8", "surrogatepass") + b"\n")

    async def read_line(self, timeout: float) -> bytes | None:
        """A line; b"" where the box has ended or sent more than a line may have; None if late."""
        try:
            async with asyncio.timeout(timeout):
                line = await self.reader.readline()
                return line if line.endswith(b"\n") else b""
        except TimeoutError:
            return None
        except (ValueError, OSError):
            return b""

    async def read_answer(self, wall: float, cpu: float, deadline: Deadline) -> bytes | None:
        """`read_line`, by the box's own clock; BoxStarved where the machine had no core for it.

        Late is what has been waited for `wall` seconds, or has had `cpu` seconds of a core. Time in
        which the box wanted a core that others had does not count, here and for `deadline`, up to
        `patience` times as much in all.
        """
        start = asyncio.get_running_loop().time()
        meter = Meter(start)
        room = min(wall, deadline.at - start)
        last = min(start + self.patience * wall, deadline.last)
        try:
            while meter.own < room and meter.busy < cpu:
                now = asyncio.get_running_loop().time()
                if now >= last:
                    if self.slot.nice or self._has_yielded():  # its own doing
                        return None
                    raise BoxStarved(
                        f"the machine was too busy: {meter.busy:.1f} s of a core in {now - start:.1f} s"
                    )
                line = await self.read_line(
                    min(self.census.interval, max(room - meter.own, 0.02), last - now)
                )
                if line is not None:
                    return line
                seen_at, seen = self.census.look()
                meter.look(seen_at, seen.get(self.pid))
            return None
        finally:
            deadline.at += meter.kept

    def _has_yielded(self) -> bool:
        """Whether it gave its session a lower priority, which a file can do."""
        for pid in self.census.seen[self.pid].pids if self.pid in self.census.seen else ():
            with contextlib.suppress(OSError):
                if not Path(f"/proc/{pid}/autogroup").read_text().rstrip().endswith(" nice 0"):
                    return True
        return False

    def complaint(self) -> str:
        with contextlib.suppress(OSError):
            return os.read(self.diagnosis, 2000).decode("utf-8", "replace").strip()
        return ""

    async def kill(self) -> None:
        """End everything in the box and wait until nothing of it is left."""
        for _ in range(2000):
            kill_tree(self.pid, self.slot, self.dead.is_set())
            if self.dead.is_set() and not self._left():
                break
            await asyncio.sleep(0.002)
        if hasattr(self, "writer"):
            self.writer.close()
        elif self.kept is not None:
            self.kept.close()
        with contextlib.suppress(OSError):
            os.close(self.diagnosis)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            sweep_files(self.slot.rung.shared, self.slot.uid)

    def _left(self) -> bool:
        return self.slot.cgroup is not None and bool(self.slot.cgroup.members())


def kill_tree(pid: int, slot: Slot, dead: bool) -> None:
    """SIGKILL to a box: its first process (and, with it, its pid namespace), its uid, its group."""
    if not dead:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    if slot.cgroup is not None:
        for member in slot.cgroup.members():
            with contextlib.suppress(OSError):
                os.kill(member, signal.SIGKILL)
    if slot.rung.name == "rlimits" and slot.uid is not None:
        kill_user(slot.uid)
    elif slot.rung.name == "unsafe":
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def lower(slot: Slot, seen: Usage) -> None:
    """Give all that runs in a box the priority `slot.nice`."""
    if slot.uid is not None:  # at once, so that nothing forks away from it
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_USER, slot.uid, slot.nice)
        return
    for thread in seen.threads:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, slot.nice)


def patience_of(num_slots: int) -> float:
    """How many times its limits a box may take: what it needs for them when all are at work, twice."""
    return max(MIN_PATIENCE, 2 * num_slots / len(os.sched_getaffinity(0)))


def default_processes(slots: int) -> int:
    """Of the referee's box, which has a process for each verdict under way."""
    return NUM_PROCESSES + 2 * slots
