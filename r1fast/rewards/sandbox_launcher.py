"""The process that starts boxes: single-threaded, with nothing in it that a fork could break.

Started by sandbox.py, with one socket to it: jobs come as JSON lines, trials go back. It ends, and takes
every box with it, when that socket closes or the process that started it has gone. A launcher
that is killed itself leaves nothing either: bubblewrap dies with its parent, and for the rung `rlimits`
a process of its own waits for its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict

from r1fast.rewards.sandbox_box import BoxFailure, kill_tree
from r1fast.rewards.sandbox_files import guard
from r1fast.rewards.sandbox_ladder import (
    MAX_SLOTS,
    RUNGS,
    Host,
    NoSandbox,
    Rung,
    look_around,
    remove_work,
    rung_of,
)
from r1fast.rewards.sandbox_pool import BoxPool, Referee
from r1fast.rewards.sandbox_trial import run_trial

_MAX_JOB = 1 << 30


def main() -> None:
    """argv: the descriptor of the socket, the pid of whoever starts it, settings as JSON."""
    descriptor, parent, settings = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    os.umask(0o077)
    # a trainer that was started with a higher priority does not give it to what it runs
    settings["nice"] = max(0, os.getpriority(os.PRIO_PROCESS, 0))
    with contextlib.suppress(OSError):  # the clock of all boxes
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    faulthandler.dump_traceback_later(100)  # a start that hangs says where; cancelled after it
    # of a whole job: for the trainer, with which we end
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # PR_SET_CHILD_SUBREAPER: what a box leaves comes to us, to be reaped now
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    asyncio.run(Launcher(socket.socket(fileno=descriptor), parent, settings).run())


class Launcher:
    def __init__(self, control: socket.socket, parent: int, settings: dict):
        self.control, self.parent, self.settings = control, parent, settings
        self.pool: BoxPool | None = None
        self.ended = asyncio.Event()
        self.tasks: set[asyncio.Task] = set()

    async def run(self) -> None:
        self.reader, self.writer = await asyncio.open_unix_connection(
            sock=self.control, limit=_MAX_JOB
        )
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._watch_parent()
        try:
            try:
                host = look_around(self.settings["cgroups"])
                host.nice = self.settings["nice"]
                _end_strays(host)
                rung, skipped = await self._climb(host)
            except NoSandbox as error:
                self._say({"failed": str(error)})
                return
            faulthandler.cancel_dump_traceback_later()
            assert self.pool is not None
            self.referee = Referee(self.pool)
            self.pool.open_slots()
            self.watching = asyncio.gather(self.pool.watch(), self.pool.even_out())
            if rung.name == "rlimits":
                assert host.first_uid is not None
                assert host.lock is not None
                uids = range(host.first_uid, host.first_uid + self.pool.num_slots + 1)
                guard(rung.work, uids, host.lock.fileno())
            self.pool.warm_up()
            self._say({
                "rung": rung.name, "level": RUNGS.index(rung.name), "parts": rung.parts(),
                "description": rung.describe(), "skipped": skipped, "python": host.python,
                "compiler": host.compiler, "num_slots": self.pool.num_slots,
            })  # fmt: skip
            jobs = asyncio.ensure_future(self._read_jobs())
            await self.ended.wait()
            jobs.cancel()
        finally:
            self._clean_up()
            os._exit(0)  # whatever tasks are left have lost their boxes

    async def _climb(self, host: Host) -> tuple[Rung, dict[str, str]]:
        """The first rung on which a box starts, and why those above it do not do."""
        wanted = self.settings["rung"]
        names = [n for n in RUNGS if n != "unsafe"] if wanted == "auto" else [wanted]
        if self.settings["allow_unsafe"] and "unsafe" not in names:
            names.append("unsafe")
        elif wanted == "unsafe" and not self.settings["allow_unsafe"]:
            raise NoSandbox("the rung 'unsafe' needs allow_unsafe_sandbox = true")
        skipped: dict[str, str] = {}
        for name in names:
            try:
                rung = rung_of(name, host)
                s = self.settings
                num_slots = min(s["num_slots"], MAX_SLOTS)
                self.pool = BoxPool(rung, num_slots, s["num_spare"], s["memory_bytes"])
                await self._try(rung)
                return rung, skipped
            except (ValueError, BoxFailure, OSError) as error:
                skipped[name] = str(error)
        raise NoSandbox("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))

    async def _try(self, rung: Rung) -> None:
        from r1fast.rewards.sandbox_box import Slot

        assert self.pool is not None
        slot = Slot(1, rung, 64, self.settings["memory_bytes"])
        self.pool.free.put_nowait(slot)
        box = await self.pool.take(self.settings["memory_bytes"])
        await box.kill()
        self.pool.boxes.pop(box.pid, None)

    async def _read_jobs(self) -> None:
        while line := await self.reader.readline():
            task = asyncio.ensure_future(self._serve(json.loads(line)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self.ended.set()

    async def _serve(self, job: dict) -> None:
        assert self.pool is not None
        try:
            trial = await run_trial(job, self.pool, self.referee)
            reply = asdict(trial)
        except Exception as error:  # the trainer must hear of it, whatever it is
            reply = {"loaded": "", "why": "", "tests": [], "error": f"launcher: {error!r}"}
        self._say({"id": job["id"], **reply})

    def _say(self, message: dict) -> None:
        with contextlib.suppress(OSError):
            self.writer.write(json.dumps(message).encode() + b"\n")

    def _reap(self) -> None:
        if self.pool is not None:
            self.pool.reap()

    def _watch_parent(self) -> None:
        """The socket may be held open by a fork of the parent; its pid is what counts."""
        if os.getppid() != self.parent:
            os._exit(1)
        loop = asyncio.get_running_loop()
        try:
            descriptor = os.pidfd_open(self.parent)
        except OSError:  # a kernel without pidfd

            async def poll() -> None:
                while os.getppid() == self.parent:
                    await asyncio.sleep(0.5)
                self.ended.set()

            self.polling = asyncio.ensure_future(poll())
            return
        loop.add_reader(descriptor, self.ended.set)

    def _clean_up(self) -> None:
        if self.pool is None:
            return
        boxes = list(self.pool.boxes.values())
        for box in boxes:
            kill_tree(box.pid, box.slot, box.dead.is_set())
        slots = {id(s): s for s in [*self.pool.slots, *(box.slot for box in boxes)]}
        for slot in slots.values():
            if slot.cgroup is not None:
                slot.cgroup.kill()
                slot.cgroup.remove()
        remove_work(self.pool.rung)


def _end_strays(host: Host) -> None:
    """Programs that a killed launcher left under the uids that are now ours (lower rungs only)."""
    if host.first_uid is None:
        return
    mine = range(host.first_uid, host.first_uid + MAX_SLOTS + 1)
    for pid in _pids():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid in mine:
                os.kill(pid, signal.SIGKILL)


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


if __name__ == "__main__":
    main()
