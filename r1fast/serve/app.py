"""The HTTP side: routes, limits and errors of an OpenAI-compatible server, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from r1fast.metrics import warn
from r1fast.policy import Policy
from r1fast.rollout.engine import Engine
from r1fast.rollout.request import RefusedRequest
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import sample_seed
from r1fast.serve.engine_thread import EngineThread, Job
from r1fast.serve.fields import RequestError
from r1fast.serve.reader import Reader
from r1fast.serve.requests import Generation, read_chat, read_completion
from r1fast.serve.responses import DONE, Responder, sse
from r1fast.types import Completion


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes before it refuses."""

    max_samples: int  # of all requests at work or waiting; more is answered with 429
    max_body_bytes: int  # of one request
    max_stream_bytes: int = 64 << 20  # of one stream, made and not yet taken, about; more ends it


class Service:
    """Answers requests with one engine. `model_name` is what clients call the model."""

    def __init__(
        self, policy: Policy, engine: Engine, model_name: str, limits: Limits, api_key: str = ""
    ):
        self.policy, self.model_name, self.limits, self.api_key = (
            policy, model_name, limits, api_key,
        )  # fmt: skip
        self.thread = EngineThread(engine, limits.max_stream_bytes)
        self.created = int(time.time())
        self.token_text = functools.lru_cache(1 << 16)(lambda t: policy.tokenizer.decode([t]))
        self.reader = Reader(policy)

    @property
    def num_samples(self) -> int:
        """At work or waiting."""
        return self.thread.num_samples

    def app(self) -> Starlette:
        """The ASGI application; the engine's thread lives as long as it does."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={
                RequestError: self._refuse,
                HTTPException: self._refuse,
                ClientDisconnect: self._gone,
                Exception: self._refuse,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.thread.stop)
            self.reader.close()

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, read_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, read_chat)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_card())

    async def health(self, request: Request) -> Response:
        """200 while the engine works; 503 once its thread is gone or its last step failed."""
        failure = self.thread.failure if self.thread.alive else "the engine's thread has ended"
        return JSONResponse(
            {"status": failure or "ok", "samples": self.num_samples}, 503 if failure else 200
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format: totals of this server, and the engine's own counters."""
        self._check_key(request)
        lines = []
        gauges = {"samples_in_flight": self.num_samples, "samples_limit": self.limits.max_samples}
        gauges |= {f"engine_{k}": v for k, v in asdict(self.thread.engine.stats).items()}
        for kind, values in (("counter", self.thread.counters), ("gauge", gauges)):
            for name, value in values.items():
                name = f"r1fast_{name}" + "_total" * (kind == "counter")
                lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def _generate(self, request: Request, read: Any) -> Response:
        self._check_key(request)

        def checked(body: dict, policy: Policy) -> Generation:
            self._check_model(body.get("model"))
            return read(body, policy, self.limits.max_samples)

        generation = await self.reader.read(await self._body(request), checked)
        self._admit(generation)
        job = await self._submit(generation)
        responder = Responder(generation, self.model_name, self.token_text, self.policy.decode)
        if generation.stream:
            return _EventStream(self._stream(job, responder), lambda: self._close(job))
        try:
            return JSONResponse(await self._whole(request, job, responder))
        finally:
            self._close(job)

    async def _submit(self, generation: Generation) -> Job:
        """Seeds come from the request's seed, the place in its list of prompts, and the sample."""
        seed = secrets.randbits(63) if generation.seed is None else generation.seed
        seeds = [
            [sample_seed("serve", seed, i, j) for j in range(generation.best_of)]
            for i in range(len(generation.prompts))
        ]
        try:
            job = await self.thread.submit(
                generation.prompts, seeds, generation.sampling, streams=generation.stream
            )
        except RefusedRequest as error:
            name = generation.field_names.get(error.field, error.field)
            raise RequestError(str(error), name) from None
        self.thread.counters["requests"] += 1
        self.thread.counters["prompt_tokens"] += sum(map(len, generation.prompts))
        return job

    def _admit(self, generation: Generation) -> None:
        """Refuse a request where too many samples are here already."""
        wanted, limit = generation.num_samples, self.limits.max_samples
        if wanted > limit:
            raise RequestError(
                f"the request asks for {wanted} samples, this server takes at most {limit} at once; "
                "split it",
                "prompt" if len(generation.prompts) > 1 else generation.field_names["n"],
            )
        if self.num_samples + wanted > limit:
            raise RequestError(
                f"{self.num_samples} samples are at work or waiting, {wanted} more go beyond the limit "
                f"of {limit}; try again later",
                status=429,
                code="too_many_samples",
            )

    def _close(self, job: Job) -> None:
        """A request is over, by its end or because its client left."""
        if job.num_open:
            self.thread.counters["aborted_requests"] += 1
            self.thread.abort(job)

    async def _whole(self, request: Request, job: Job, responder: Responder) -> dict:
        """The answer in one piece. Raises ClientDisconnect when nobody waits for it any more."""
        collecting = asyncio.ensure_future(_collect(job))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            # a text's offsets take time: others go on meanwhile
            return await asyncio.to_thread(responder.response, collecting.result())
        finally:
            collecting.cancel()
            leaving.cancel()

    async def _stream(self, job: Job, responder: Responder) -> AsyncIterator[bytes]:
        """Server-sent events. An error in the middle is an event of its own, and the last one."""
        first = b"".join(map(sse, responder.first_chunks()))
        if first:
            yield first
        num_tokens = 0
        try:
            async for items in job.events():
                parts = []
                for prompt, event in items:
                    num_tokens += len(event.token_ids)
                    if event.finish_reason == "error":
                        error = RequestError(f"the engine failed: {event.error}", status=500)
                        yield b"".join(parts) + sse(error.body()) + DONE
                        return
                    chunk = responder.chunk(prompt, event)
                    if chunk is not None:
                        parts.append(sse(chunk))
                if parts:
                    yield b"".join(parts)
        except RequestError as error:
            yield sse(error.body()) + DONE
            return
        if responder.generation.include_usage:
            yield sse(responder.usage_chunk(num_tokens))
        yield DONE

    async def _body(self, request: Request) -> bytes:
        """The body, refused where it is longer than the limit or not declared as JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            # a browser must ask before it sends this type to another origin, so a page cannot
            raise RequestError(
                f"the content type must be application/json, got {kind or 'none'!r}", status=415
            )
        limit, parts, size = self.limits.max_body_bytes, [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise RequestError(
                    f"the body is longer than this server's limit of {limit} bytes; split the request",
                    status=413,
                )
        return b"".join(parts)

    def _check_key(self, request: Request) -> None:
        if not self.api_key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
        if kind.lower() != "bearer" or not right:
            raise RequestError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    def _check_model(self, name: Any) -> None:
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist here; this server has {self.model_name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def _model_card(self) -> dict:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "r1fast",
            "max_model_len": self.policy.model.spec.max_position_embeddings,
        }

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Any error in OpenAI's shape."""
        headers = {}
        if isinstance(error, HTTPException):  # no such path, or another method
            known = ", ".join(route.path for route in request.app.routes)
            text = f"{request.method} {request.url.path}: {error.detail}; known paths: {known}"
            error, headers = RequestError(text, status=error.status_code), error.headers or {}
        elif not isinstance(error, RequestError):
            warn(f"{request.url.path} failed: {type(error).__name__}: {error}")
            error = RequestError(f"{type(error).__name__}: {error}", status=500)
        if error.status == 429:
            headers = {"retry-after": "1"}
        self.thread.counters["refused_requests"] += 1
        return JSONResponse(error.body(), error.status, headers)

    async def _gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it


class _EventStream(StreamingResponse):
    """Server-sent events that call `close` once, when they end or the client leaves."""

    def __init__(self, content: AsyncIterator[bytes], close: Any):
        super().__init__(
            content, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
        self.close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


async def _collect(job: Job) -> list[list[Completion]]:
    """Everything a job makes. Raises RequestError where a sample ends in an error."""
    parts = [[[] for _ in seeds] for seeds in job.seeds]
    async for items in job.events():
        for prompt, event in items:
            if event.finish_reason == "error":
                raise RequestError(f"the engine failed: {event.error}", status=500)
            parts[prompt][event.sample].append(event)
    return [[completion_of(events) for events in group] for group in parts]


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
