"""One thread steps the engine while there is work; requests come and go from an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from r1fast.metrics import warn
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.serve.fields import RequestError
from r1fast.types import TokenEvent

COUNTERS = (
    "requests refused_requests aborted_requests prompt_tokens generated_tokens first_tokens "
    "first_token_seconds"  # summed over the first tokens of streams
).split()
Item = tuple[int, TokenEvent]  # (which prompt of the job, what is new)


@dataclass(eq=False, slots=True)
class Job:
    """One request of a client: its prompts, and what the engine has made of them so far."""

    prompts: Sequence[list[int]]
    seeds: Sequence[Sequence[int]]  # for each prompt, one a sample
    sampling: SamplingParams
    streams: bool
    accepted: asyncio.Future
    queue: asyncio.Queue[list[Item] | None] = field(default_factory=asyncio.Queue)
    num_bytes: int = 0  # of what is in the queue, about
    num_left: int = 0  # samples that have not ended, as the event loop counts them
    ids: dict[int, int] = field(default_factory=dict)  # the engine's request id -> prompt
    num_open: int = 0  # samples that have not ended, as the engine's thread counts them
    began: float = 0.0

    async def events(self) -> AsyncIterator[list[Item]]:
        """What is new, as it comes, until every sample has ended. Raises RequestError where too much waited."""
        left = sum(map(len, self.seeds))
        while left:
            items = await self.queue.get()
            if items is None:
                raise RequestError(
                    "the stream is taken more slowly than it is made, and too much of it waits; "
                    "ask for fewer samples or log-probabilities at once",
                    status=408,
                    code="client_too_slow",
                )
            self.num_bytes -= _num_bytes(items)
            left -= sum(event.finish_reason is not None for _, event in items)
            yield items


class EngineThread:
    """Owns the engine: nothing else calls it, though anybody may read its `stats`.

    What begins with an underscore runs in the thread, but for `_post` and `_put`; the rest belongs to the event loop.
    """

    def __init__(self, engine: Engine, max_stream_bytes: int = 64 << 20):
        self.engine, self.max_stream_bytes = engine, max_stream_bytes
        self.num_samples = 0  # that have not ended; the event loop counts them
        self.counters = dict.fromkeys(COUNTERS, 0)  # since the start, for /metrics
        self.failure = ""  # of the last step, where that failed
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._jobs: dict[int, Job] = {}  # by the engine's request id
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """After the step that is running. What is unfinished is given up."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def submit(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        streams: bool,
    ) -> Job:
        """Hand a request to the engine. Raises what it raises where it refuses one of the prompts."""
        job = Job(prompts, seeds, sampling, streams, self._loop.create_future())
        job.num_open = job.num_left = sum(map(len, seeds))
        job.began = time.monotonic()
        self.num_samples += job.num_left
        self._post(lambda: self._add(job))
        try:
            await job.accepted
        except BaseException:
            self.abort(job)
            raise
        return job

    def abort(self, job: Job) -> None:
        """Give up what is unfinished; its blocks are free after the next step."""
        self.num_samples -= job.num_left
        job.num_left = 0
        self._post(lambda: self._abort(job))

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._stopping or self.engine.has_work):
                    self._wake.wait()
                if self._stopping:
                    return
                actions = list(self._inbox)
                self._inbox.clear()
            for action in actions:
                try:
                    action()
                except Exception as error:
                    self._fail(error)
            if not self.engine.has_work:
                continue
            try:
                self._deliver(self.engine.step())
                self.failure = ""
            except Exception as error:  # whatever it is, the next requests deserve an answer
                self._fail(error)

    def _add(self, job: Job) -> None:
        """All prompts of a job or, where the engine refuses one, none."""
        error = None
        try:
            for i, (prompt, seeds) in enumerate(zip(job.prompts, job.seeds, strict=True)):
                name = f"prompt[{i}]" if len(job.prompts) > 1 else "the prompt"
                added = self.engine.add(prompt, seeds, job.sampling, name=name, stream=job.streams)
                job.ids[added] = i
        except Exception as refused:  # handed on to whoever asked
            error = refused
            self._abort(job)
        self._jobs.update(dict.fromkeys(job.ids, job))
        self._call(lambda: _resolve(job.accepted, error))

    def _abort(self, job: Job) -> None:
        for request_id in job.ids:
            self.engine.abort(request_id)
            self._jobs.pop(request_id, None)
        job.ids.clear()

    def _deliver(self, events: list[TokenEvent]) -> None:
        by_job: dict[Job, list[Item]] = {}
        now = time.monotonic()
        for event in events:
            self.counters["generated_tokens"] += len(event.token_ids)
            job = self._jobs.get(event.request_id)
            if job is None:  # aborted
                continue
            if job.began and event.token_ids and job.streams:
                self.counters["first_token_seconds"] += now - job.began
                self.counters["first_tokens"] += 1
                job.began = 0.0
            by_job.setdefault(job, []).append((job.ids[event.request_id], event))
            job.num_open -= event.finish_reason is not None
        for job in by_job:
            if not job.num_open:
                for request_id in job.ids:
                    self._jobs.pop(request_id, None)
        if by_job:
            self._call(lambda: self._put(by_job))

    def _fail(self, error: Exception) -> None:
        """A step failed as a whole: every request of the moment ends with its error."""
        self.failure = f"{type(error).__name__}: {error}"
        warn("a step of the engine failed\n" + "".join(traceback.format_exception(error)).rstrip())
        by_job = {}
        for job in dict.fromkeys(self._jobs.values()):
            item = (0, TokenEvent(-1, 0, [], [], finish_reason="error", error=self.failure))
            by_job[job], job.num_open = [item] * job.num_open, 0
        self._call(lambda: self._put(by_job))
        for job in by_job:
            try:
                self._abort(job)
            except Exception as again:  # the thread must live to answer the others
                warn(f"a request could not be given up: {type(again).__name__}: {again}")
        self._jobs.clear()
        time.sleep(0.1)  # a fault that stays must not spin

    def _put(self, by_job: dict[Job, list[Item]]) -> None:
        """In the event loop. A stream of which too much waits already is given up."""
        for job, items in by_job.items():
            if not job.num_left:  # given up meanwhile
                continue
            num_ended = sum(event.finish_reason is not None for _, event in items)
            job.num_left -= num_ended
            self.num_samples -= num_ended
            job.queue.put_nowait(items)
            job.num_bytes += _num_bytes(items)
            if job.streams and job.num_left and job.num_bytes > self.max_stream_bytes:
                self.abort(job)
                job.queue.put_nowait(None)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._stopping = True


def _resolve(future: asyncio.Future, error: Exception | None) -> None:
    if future.done():  # the client is gone
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _num_bytes(items: list[Item]) -> int:
    """What Python takes for them, about."""
    return sum(
        1024 + 64 * len(event.token_ids) + 128 * sum(map(len, event.top_logprobs or ()))
        for _, event in items
    )
