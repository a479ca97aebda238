"""The launcher's boxes: a fixed number of slots, a few boxes kept ready, and the referee's box."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import time
from pathlib import Path

from r1fast.rewards.sandbox_box import (
    START_TIMEOUT,
    Box,
    BoxFailure,
    Program,
    Slot,
    default_processes,
    kill_tree,
    lower,
    patience_of,
)
from r1fast.rewards.sandbox_files import holds_more
from r1fast.rewards.sandbox_ladder import NUM_PROCESSES, TMPFS_BYTES, Rung
from r1fast.rewards.sandbox_usage import Census, usage

_FOLDER = Path(__file__).parent
_REFEREE_MEMORY = 4 << 30


class BoxPool:
    """Boxes for candidates: `take` one, use it once, `give` it back."""

    def __init__(self, rung: Rung, num_slots: int, num_spare: int, memory_bytes: int):
        self.rung, self.num_slots = rung, num_slots
        self.num_spare = min(num_spare, num_slots)
        self.memory_bytes = memory_bytes
        self.program = Program(_FOLDER / "candidate.py", rung.host.python)
        # free slots, and above them boxes that are ready
        self.free: asyncio.LifoQueue[Slot | Box] = asyncio.LifoQueue()
        self.boxes: dict[int, Box] = {}  # by pid, those that live
        self.slots: list[Slot] = []
        self.num_ready = self.num_waiting = self.num_started = 0
        self.census, self.patience = Census(self.boxes), patience_of(num_slots)
        self.num_working = 0  # boxes with a candidate
        self.tasks: set[asyncio.Task] = set()

    def open_slots(self) -> None:
        for index in range(self.num_slots, 0, -1):
            slot = Slot(index, self.rung, NUM_PROCESSES, self.memory_bytes)
            self.slots.append(slot)
            self.free.put_nowait(slot)

    async def take(self, memory_bytes: int) -> Box:
        """A box that is ready. BoxFailure where two attempts to start one failed."""
        box = await self._take(memory_bytes)
        self.num_working += 1
        return box

    async def _take(self, memory_bytes: int) -> Box:
        self.num_waiting += 1
        try:
            place = await self.free.get()
        finally:
            self.num_waiting -= 1
        if isinstance(place, Box):
            self.num_ready -= 1
            if not place.dead.is_set() and not place.reader.at_eof():
                try:
                    place.slot.limit_memory(memory_bytes)
                    return place
                except BoxFailure:
                    pass
            await self._end(place)
            place = place.slot
        try:
            place.limit_memory(memory_bytes)
            return await self._start(place)
        except BaseException:
            self.free.put_nowait(place)
            raise

    def give(self, box: Box) -> None:
        """Kill it; its slot is free when nothing of it is left."""
        self.num_working -= 1
        self._spawn(self._recycle(box))

    def warm_up(self) -> None:
        """Have boxes ready while nobody waits."""
        for _ in range(self.num_spare - self.num_ready):
            with contextlib.suppress(asyncio.QueueEmpty):
                place = self.free.get_nowait()
                if isinstance(place, Box):
                    self.free.put_nowait(place)
                    return
                self._spawn(self._prepare(place))

    def _spawn(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _recycle(self, box: Box) -> None:
        await self._end(box)
        if self.num_waiting or self.num_ready >= self.num_spare:
            self.free.put_nowait(box.slot)
        else:
            await self._prepare(box.slot)

    async def _prepare(self, slot: Slot) -> None:
        self.num_ready += 1
        try:
            box = await self._start(slot)
        except BoxFailure:
            self.num_ready -= 1
            self.free.put_nowait(slot)
        else:
            self.free.put_nowait(box)

    async def _start(self, slot: Slot) -> Box:
        for attempt in range(2):
            box = Box(slot, self.census, self.patience)
            try:
                box.start(self.program)
                self.boxes[box.pid] = box
                self.num_started += 1
                await box.connect(self.program)
                await box.ready()
                return box
            except (BoxFailure, OSError) as error:
                failure = error
                if box.pid:
                    await self._end(box)
            except BaseException:
                if box.pid:
                    self._spawn(self._recycle(box))
                raise
            if attempt == 0:
                await asyncio.sleep(0.05)
        raise BoxFailure(f"a box did not start: {failure}")

    async def _end(self, box: Box) -> None:
        await box.kill()
        self.boxes.pop(box.pid, None)
        self.reap()

    async def watch(self) -> None:
        """End a box that holds more than it may of what nothing else bounds here.

        Memory, without cgroups: pages that processes share count in each of them, so a fork costs
        what it could come to. Files, without a file system of its own.
        """
        limit_memory, rung = self.rung.host.cgroups is None, self.rung
        cost = 0.0
        while limit_memory or rung.work:
            await asyncio.sleep(max(0.1, 5 * cost))
            spent = time.process_time()
            held = usage({pid: box.lone_uid for pid, box in self.boxes.items()})
            for pid, box in list(self.boxes.items()):
                if (part := held.get(pid)) is None:
                    continue
                if (limit_memory and part.resident_bytes > box.slot.memory_bytes) or (
                    box.folder
                    and holds_more(
                        TMPFS_BYTES, box.folder, rung.shared, box.slot.uid, part.pids, box.hidden
                    )
                ):
                    kill_tree(pid, box.slot, box.dead.is_set())
            cost = time.process_time() - spent

    async def even_out(self) -> None:
        """Where boxes have no share of the cores: one with many processes gives each less of them.

        Priorities are such that n running threads weigh as much as one: each step is a factor of 1.25.
        """
        while not self.rung.host.shares_cores:
            await asyncio.sleep(self.census.interval)
            if not self.num_working:
                continue
            _, seen = self.census.look()
            for pid, box in list(self.boxes.items()):
                if pid not in seen or box.slot.index == 0:  # the referees are ours
                    continue
                running = sum(thread.runnable for thread in seen[pid].threads.values())
                nice = min(19, round(math.log(max(1, running), 1.25)))
                if nice > box.slot.nice and nice > self.rung.host.nice:
                    box.slot.nice = nice
                    lower(box.slot, seen[pid])

    def reap(self) -> None:
        """On SIGCHLD."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.boxes:
                self.boxes[pid].dead.set()


class Referee:
    """The box in which tests run. `open` gives the socket of a fresh process in it."""

    def __init__(self, pool: BoxPool):
        self.pool = pool
        self.program = Program(_FOLDER / "referee.py", pool.rung.host.python)
        self.box: Box | None = None
        self.slot: Slot | None = None
        self.lock = asyncio.Lock()

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """BoxFailure where the box cannot be started."""
        async with self.lock:
            for attempt in range(2):
                if self.box is None:
                    await self._start()
                assert self.box is not None
                assert self.box.kept is not None
                ours, theirs = socket.socketpair()
                try:
                    await self._pass(theirs)
                except OSError:
                    ours.close()
                    await self._stop()
                    if attempt:
                        raise BoxFailure("the referee's box ended") from None
                    continue
                finally:
                    theirs.close()
                ours.setblocking(False)
                return await asyncio.open_unix_connection(sock=ours, limit=8 << 20)
        raise AssertionError("unreachable")

    async def _pass(self, descriptor: socket.socket) -> None:
        assert self.box is not None
        assert self.box.kept is not None
        for _ in range(1000):
            try:
                socket.send_fds(self.box.kept, [b"x"], [descriptor.fileno()])
                return
            except BlockingIOError:  # it is busy forking
                await asyncio.sleep(0.005)
        raise OSError("the referee does not answer")

    async def _start(self) -> None:
        if self.slot is None:
            pool = self.pool
            self.slot = Slot(0, pool.rung, default_processes(pool.num_slots), _REFEREE_MEMORY)
        box = self.box = Box(self.slot, self.pool.census, self.pool.patience)
        loop = asyncio.get_running_loop()
        try:
            box.start(self.program)
            self.pool.boxes[box.pid] = box
            assert box.kept is not None
            async with asyncio.timeout(START_TIMEOUT):
                await loop.sock_sendall(
                    box.kept, b"%08d" % len(self.program.body) + self.program.body
                )
                if await loop.sock_recv(box.kept, 1) != b"r":
                    raise OSError(box.complaint() or "it ended")
        except (OSError, TimeoutError) as error:
            why = box.complaint() or error
            await self._stop()
            raise BoxFailure(f"the referee's box did not start: {why}") from None

    async def _stop(self) -> None:
        if self.box is not None:
            box, self.box = self.box, None
            await box.kill()
            self.pool.boxes.pop(box.pid, None)
