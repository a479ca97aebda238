"""The servers: who gets the next sample, who is lost and comes back, and every sample sent until it is there.

A server is `up`, `lost` (a request failed there, or it gives no sign of life: its samples go elsewhere), or
`back` (it answers again, and nobody knows yet which weights it has: the engine brings it up to date).
Worker threads send, one looks after the servers; the engine's thread alone takes what has arrived.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from r1fast.rollout.vllm.client import Call, Client, Interrupted, RequestError, ServerError

PROBE_SECONDS = 1.0  # between two looks at lost servers
LIFE_SECONDS = 5.0  # and at those that are up
PROBE_TIMEOUT = 10.0
MAX_QUIET_SECONDS = 60.0
SILENT_PROBES = 3  # in a row, after which a server that is up counts as lost


@dataclass(eq=False)
class Server:
    """What is known of one. Its weights are of `version`, or, while it is given others, up to `newest`."""

    client: Client
    state: Literal["up", "lost", "back"] = "back"
    version: int = -1
    newest: int = -1
    reason: str = ""  # why it was lost
    jobs: set[Job] = field(default_factory=set)  # under way
    num_silent: int = 0
    num_failures: int = 0  # since a sample last came from it
    quiet_until: float = 0.0  # it is not asked before: longer after each failure
    model: str = ""  # the name that it knows its model by

    @property
    def url(self) -> str:
        return self.client.url


@dataclass(eq=False)
class Job:
    """One sample, from its request to what came of it."""

    key: tuple[int, int]  # (request, sample)
    body: dict  # of /v1/completions, without the model's name
    name: str = ""  # for errors
    server: Server | None = None  # that it was sent to last
    waits: bool = False  # there, for the weights for which the server has stopped it before
    call: Call = field(default_factory=Call)
    num_tries: int = 0
    is_cancelled: bool = False
    reply: object = None  # of `read`
    versions: tuple[int, int] = (-1, -1)  # of the weights when it was sent, and when it was there
    arrived: float = 0.0  # time.monotonic() when it was there
    error: Exception | None = None


class Fleet:
    """`num_slots` samples at a time on `servers`; `read` makes of a server's JSON what a job's reply is.

    `read` raises ServerError for what is none. A sample is sent at most 1 + num_retries times.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        read: Callable[[object, Job], object],
        *,
        num_slots: int,
        num_retries: int,
        request_timeout: float,
    ):
        self.servers, self._read, self._num_slots = list(servers), read, num_slots
        self._num_retries, self._request_timeout = num_retries, request_timeout
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self.done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._num_threads = self._num_idle = 0
        self._is_closed = self._is_held = False
        self._lost_since = time.monotonic()  # when the last server went; while none is up
        self.num_retried = self.num_lost = 0  # samples sent again, times that a server was lost
        threading.Thread(target=self._look_after, name="vllm-health", daemon=True).start()

    def send(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            if len(self._jobs) > self._num_idle and self._num_threads < self._num_slots:
                self._num_threads += 1
                threading.Thread(target=self._work, name="vllm-request", daemon=True).start()
            self._changed.notify()

    def hold(self, is_held: bool) -> None:
        """What is not under way yet waits until it is let go again."""
        with self._changed:
            self._is_held = is_held
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nothing will come of it; a server that is at it stops."""
        with self._changed:
            job.is_cancelled = True
        job.call.cut()

    @property
    def up(self) -> list[Server]:
        return [server for server in self.servers if server.state == "up"]

    @property
    def seconds_without(self) -> float:
        """Since the last server went; 0 while there is one."""
        with self._changed:
            return 0.0 if self.up else time.monotonic() - self._lost_since

    def expect(self, version: int) -> None:
        """Servers are given the weights of `version` from now on, by somebody else."""
        with self._changed:
            for server in self.up:
                server.newest = version

    def take_up(self, server: Server, version: int) -> None:
        """It has the weights of `version` and may be sent samples."""
        with self._changed:
            server.state, server.reason, server.num_silent = "up", "", 0
            server.version = server.newest = version
            for job in server.jobs:
                if job.waits:
                    job.waits, job.versions = False, (version, version)
            self._changed.notify_all()

    def lose(self, server: Server, reason: str, *, cut: bool = True) -> None:
        """No more samples for it; with `cut` those under way there are sent elsewhere at once."""
        with self._changed:
            if server.state == "up":
                self.num_lost += 1
                if len(self.up) == 1:
                    self._lost_since = time.monotonic()
            server.state, server.reason = "lost", reason
            pause = min(MAX_QUIET_SECONDS, PROBE_SECONDS * 2 ** min(server.num_failures, 9))
            server.num_failures, server.quiet_until = (
                server.num_failures + 1,
                time.monotonic() + pause,
            )
            jobs = list(server.jobs) if cut else []
        for job in jobs:
            job.call.cut()

    def reasons(self) -> str:
        return "; ".join(f"{s.url}: {s.reason or s.state}" for s in self.servers)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            jobs = [job for server in self.servers for job in server.jobs]
            self._jobs.clear()
            self._changed.notify_all()
        for job in jobs:
            job.call.cut()

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            job, server = taken
            try:
                body = {"model": server.model, **job.body}
                reply = server.client.post(
                    "/v1/completions", body, timeout=self._request_timeout, call=job.call
                )
                job.reply = self._read(reply, job)
            except RequestError as error:
                job.error = error
            except ServerError as error:
                if self._send_again(job, server, error):
                    continue
            except Exception as error:  # ours: the engine's thread is to raise it
                job.error = error
            with self._changed:
                first = server.newest if job.waits else job.versions[0]
                job.versions, job.arrived = (first, server.newest), time.monotonic()
                server.num_failures = 0
                server.jobs.discard(job)
            self.done.put(job)

    def _next(self) -> tuple[Job, Server] | None:
        """A sample and the server that has the least to do, once there are both; None: it is over."""
        with self._changed:
            while not self._is_closed:
                while self._jobs and self._jobs[0].is_cancelled:
                    self._jobs.popleft()
                if self._jobs and not self._is_held and (up := self.up):
                    job = self._jobs.popleft()
                    job.waits = job.waits and job.server in up
                    server = job.server if job.waits else min(up, key=lambda s: len(s.jobs))
                    job.call, job.server = Call(), server
                    job.num_tries += 1
                    job.versions = server.version, server.newest
                    server.jobs.add(job)
                    return job, server
                self._num_idle += 1
                self._changed.wait()
                self._num_idle -= 1
            self._num_threads -= 1
            return None

    def _send_again(self, job: Job, server: Server, error: ServerError) -> bool:
        """Whether somebody else is to try; the server is lost either way, unless it was told to stop."""
        with self._changed:
            server.jobs.discard(job)
            if job.is_cancelled or self._is_closed:
                return True
            was_lost = server.state == "lost"  # and this sample cut off for it
            if is_planned := isinstance(error, Interrupted):
                job.waits, job.num_tries = True, job.num_tries - 1
        if not was_lost and not is_planned:
            # others under way there may still end well, or fail by themselves
            self.lose(server, str(error), cut=False)
        with self._changed:
            if job.num_tries <= self._num_retries:
                self.num_retried += not is_planned
                self._jobs.appendleft(job)
                self._changed.notify()
                return True
        job.error = ServerError(
            f"a sample failed on {job.num_tries} tries (rollout.vllm.num_retries = "
            f"{self._num_retries}), the last one: {error}"
        )
        self.done.put(job)
        return True

    def _look_after(self) -> None:
        """Ask lost servers whether they are back, and those that are up whether they still are."""
        next_look = time.monotonic() + LIFE_SECONDS
        while not self._is_closed:
            looks_at_all = time.monotonic() >= next_look
            if looks_at_all:
                next_look = time.monotonic() + LIFE_SECONDS
            now = time.monotonic()
            asked = [
                s
                for s in self.servers
                if (s.state == "lost" and now >= s.quiet_until)
                or (looks_at_all and s.state == "up")
            ]
            threads = [threading.Thread(target=self._probe, args=(s,), daemon=True) for s in asked]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(PROBE_SECONDS)

    def _probe(self, server: Server) -> None:
        try:
            server.client.get("/health", timeout=PROBE_TIMEOUT)
        except (ServerError, RequestError) as error:
            server.num_silent += 1
            if server.state == "lost":
                server.reason = f"{server.reason.partition('; now ')[0]}; now {error}"
            elif server.state == "up" and server.num_silent >= SILENT_PROBES:
                self.lose(server, f"no sign of life: {error}")
            return
        with self._changed:
            server.num_silent = 0
            if server.state == "lost":
                server.state = "back"
