"""The engine's interface over a fleet of vLLM servers: `add`, `step`, `abort`, `generate`, and `sync`.

A sample is a request of its own, with its own seed: what a server that was lost did not bring is sent to
another, and nothing else is sampled again. Servers find a prompt's other samples in their prefix cache.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from r1fast import distributed
from r1fast.config import RolloutConfig
from r1fast.interrupt import ServersLost, Stopped, boundary
from r1fast.policy import Policy
from r1fast.rollout.loops import Loops
from r1fast.rollout.request import RefusedRequest, check_request, token_ids
from r1fast.rollout.result import EngineStats, undecodable
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm.client import Client, RequestError, ServerError
from r1fast.rollout.vllm.fleet import Fleet, Job, Server
from r1fast.rollout.vllm.sync import CanaryError, WeightSync
from r1fast.rollout.vllm.wire import read_completion, sampling_body
from r1fast.types import TokenEvent

STEP_SECONDS = 0.05  # that a step waits for a sample to end
CONNECT_SECONDS = 1.0  # between two tries while no server answers


class VllmEngine(Loops):
    """Samples of `policy` by the servers of `rollout.vllm`, which get its weights in `sync`.

    Events come when a sample has ended, with `stream` too. What one process asks for is spread over all
    servers, at most rollout.max_batch_size samples at a time. Not for several threads at once. Raises
    ValueError for servers that cannot do what is asked, ServersLost where none answers in
    rollout.vllm.wait_seconds.
    """

    def __init__(self, policy: Policy, rollout: RolloutConfig):
        self.policy, self.model, self.eos_ids = policy, policy.model, sorted(policy.eos_ids)
        self.config, self.context = rollout.vllm, policy.model.spec.max_position_embeddings
        if not self.config.servers:
            raise ValueError(
                "rollout.engine = vllm needs rollout.vllm.servers, the addresses of servers that run, or "
                "rollout.vllm.start, the Python of vLLM's environment, with which they are started here"
            )
        servers = [Server(Client(url)) for url in self.config.servers]
        self._longest = min(rollout.max_prompt_tokens + rollout.max_completion_tokens, self.context)
        self.weights = WeightSync(policy.model, rollout, servers)
        self.fleet = Fleet(
            servers,
            self._read,
            num_slots=rollout.max_batch_size,
            num_retries=self.config.num_retries,
            request_timeout=self.config.request_timeout,
        )
        self._requests: dict[int, dict[int, Job]] = {}  # samples that have not ended
        self._ended: list[TokenEvent] = []
        self._events = {}
        self._counts = EngineStats()
        self._num_requests = 0

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def close(self) -> None:
        """What is under way is given up; the servers stay."""
        self.fleet.close()
        self.weights.close()

    # -- weights

    def reset_prefix_cache(self) -> None:
        """The weights have changed: the next `sync` is to send them."""
        self.weights.changed()

    def sync(self) -> None:
        """Give every server the policy's weights as they are now. All ranks together.

        What becomes of samples under way, rollout.vllm.update says; what `hold` kept is sent afterwards. Raises
        CanaryError where a server then does not have them, ServersLost where there is none.
        """
        version, digest = self._of_main(self._take_weights)
        if not distributed.is_main():
            self.weights.follow(version, digest)
            self.fleet.expect(version)
        up = self._of_main(self._update_all)
        if not distributed.is_main():
            self._follow(up)
        self.fleet.hold(False)

    def _of_main(self, do: Callable[[], list]) -> list:
        """What `do` gives on rank 0, which alone does it; where it fails, ranks end together."""
        facts: list = []
        failed: BaseException | None = None
        if distributed.is_main():
            try:
                facts = do()
            except (Stopped, CanaryError, ValueError, OSError) as error:
                failed = error
        ending = "" if failed is None else f"rank 0: {failed}"
        own = [facts, ending, isinstance(failed, Stopped)]
        facts, ending, is_stopped = distributed.gather_objects(own)[0]
        if failed is not None:
            raise failed
        if ending:
            raise (ServersLost if is_stopped else RuntimeError)(ending)
        return facts

    def _take_weights(self) -> list:
        self._wait_for_one()
        self.weights.take()
        return [self.weights.version, self.weights.digest]

    def _update_all(self) -> list:
        """The places of the servers that have them then."""
        self._update([s for s in self.fleet.servers if s.state != "lost"])
        self._wait_for_one(updated=True)
        return [i for i, s in enumerate(self.fleet.servers) if s.state == "up"]

    def _follow(self, up: Sequence[int]) -> None:
        """Take rank 0's word for which servers have the weights; the others are not asked before they do."""
        for i, server in enumerate(self.fleet.servers):
            if i not in up:
                if server.state == "up":
                    self.fleet.lose(server, "rank 0 has lost it")
                continue
            try:
                self._introduce(server)
                self.fleet.take_up(server, self.weights.version)
            except (ServerError, RequestError) as error:
                self.fleet.lose(server, str(error))

    def _update(self, servers: Sequence[Server]) -> None:
        """Those that do not have the weights get them, all at the same time, and show that they have them."""
        began, stale = time.monotonic(), []
        for server in servers:
            try:
                self._introduce(server)
                if not self.weights.has_them(server):
                    stale.append(server)
            except (ServerError, RequestError) as error:
                self.fleet.lose(server, str(error))
        if stale:
            self.weights.prepare()

        def bring_up(server: Server) -> list | ServerError:
            try:
                if server in stale:
                    self.weights.give(server)
                return self.weights.canaries(server)
            except ServerError as error:
                return error

        servers = [server for server in servers if server.state != "lost"]
        with ThreadPoolExecutor(max(len(servers), 1), "vllm-weights") as pool:
            replies = list(pool.map(bring_up, servers))
        for server, reply in zip(servers, replies, strict=True):
            if isinstance(reply, ServerError):
                self.fleet.lose(server, str(reply))
                continue
            self.weights.check(server, reply)
            self.fleet.take_up(server, self.weights.version)
        if stale:
            self.weights.took(began)

    def _introduce(self, server: Server) -> None:
        """Learn its model's name. Raises ValueError for a server that is too small for this run."""
        if server.model:
            return
        reply = server.client.get("/v1/models", timeout=30.0)
        try:
            card = reply["data"][0]
            name, room = str(card["id"]), card.get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ServerError(f"{server.url}/v1/models names no model: {reply!r:.200}") from None
        if isinstance(room, int) and room < self._longest:
            raise ValueError(
                f"{server.url} has room for {room} tokens, and prompt and completion may have "
                f"{self._longest} (rollout.max_prompt_tokens + rollout.max_completion_tokens): start it "
                f"with --max-model-len {self._longest}, or lower these"
            )
        self.weights.introduce(server)
        server.model = name

    def _wait_for_one(self, *, updated: bool = False) -> None:
        """Until a server answers (and, if `updated`, has the weights). Raises ServersLost."""
        began = time.monotonic()
        while not any(s.state != "lost" for s in self.fleet.servers) or (
            updated and not self.fleet.up
        ):
            if time.monotonic() - began > self.config.wait_seconds:
                raise self._servers_lost()
            boundary("rollout", "waiting for a vLLM server")
            time.sleep(CONNECT_SECONDS)
            self._bring_back()

    def _bring_back(self) -> None:
        """Servers that answer again, with the weights that they have to have."""
        for server in self.fleet.servers:
            if server.state != "back" or not self.weights.digest:
                continue
            server.model = ""  # it may be another process
            if distributed.is_main():
                self.weights.take()  # they may have changed since the last sync
                self._update([server])
                continue
            try:
                self._introduce(server)
                if self.weights.was_given_them(server):
                    self.fleet.take_up(server, self.weights.version)
            except (ServerError, RequestError) as error:
                self.fleet.lose(server, str(error))

    def tend(self) -> None:
        """While other ranks still sample: servers that come back get their weights from rank 0 alone."""
        if distributed.is_main():
            self._bring_back()

    def _servers_lost(self) -> ServersLost:
        return ServersLost(
            f"no vLLM server for {self.config.wait_seconds:g} s (rollout.vllm.wait_seconds): "
            f"{self.fleet.reasons()}"
        )

    def sleep(self) -> None:
        """Servers give their GPU's memory back until the next `sync`, where they can and are asked to."""
        if self.config.sleep and distributed.is_main():
            for server in self.fleet.up:
                try:
                    self.weights.sleep(server)
                except ServerError as error:
                    self.fleet.lose(server, str(error))

    # -- requests

    def add(
        self,
        prompt_ids: Sequence[int],
        seeds: Sequence[int],
        sampling: SamplingParams,
        *,
        name: str = "",
        stream: bool = True,
        return_entropy: bool = False,
        lengths: Sequence[int] | None = None,  # most tokens of each sample, instead of max_tokens
    ) -> int:
        """As `Engine.add`; entropies and what `wire.sampling_body` refuses are not to be had."""
        self._num_requests += 1
        number, name = self._num_requests, name or f"request {self._num_requests}"
        prompt = token_ids(prompt_ids, name)
        check_request(
            name, prompt, seeds, sampling, vocab_size=self.model.spec.vocab_size,
            context=self.context, eos_ids=self.eos_ids, has_text=True,
        )  # fmt: skip
        if return_entropy:
            raise RefusedRequest(f"{name} asks for entropies, which vLLM does not tell", "prompt")
        body = sampling_body(name, prompt.tolist(), sampling, self.eos_ids)
        lengths = [sampling.max_tokens] * len(seeds) if lengths is None else lengths
        room = self.context - len(prompt)
        jobs = {}
        for i, (seed, length) in enumerate(zip(seeds, lengths, strict=True)):
            own = {"max_tokens": min(length, room), "seed": seed}
            jobs[i] = Job((number, i), body | own, f"{name}, sample {i}")
        if jobs:
            self._requests[number] = jobs
            for job in jobs.values():
                self.fleet.send(job)
        return number

    def hold(self) -> None:
        """What is not under way yet waits for the next `sync`."""
        self.fleet.hold(True)

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._ended)

    def abort(self, request_id: int) -> None:
        """Its samples that are not done end with finish_reason "abort"; other ids are ignored."""
        for i, job in self._requests.pop(request_id, {}).items():
            self.fleet.cancel(job)
            self._ended.append(TokenEvent(request_id, i, [], [], finish_reason="abort"))

    def _discard(self, request_ids) -> None:
        ids = set(request_ids)
        for request_id in ids:
            self.abort(request_id)
        self._ended = [e for e in self._ended if e.request_id not in ids]

    def step(self, num_tokens: int = 1) -> list[TokenEvent]:
        """The samples that have ended, as soon as there are some; after a while none.

        Servers that are back get their weights here. Raises ServersLost where all have been gone for
        rollout.vllm.wait_seconds, and ServerError or ValueError for a sample that none brings.
        """
        self._counts.decode_steps += 1
        events, self._ended = self._ended, []
        if not self._requests:
            return events
        self._bring_back()
        if self.fleet.seconds_without > self.config.wait_seconds:
            raise self._servers_lost()
        jobs = []
        with suppress(queue.Empty):
            jobs.append(self.fleet.done.get(timeout=0 if events else STEP_SECONDS))
            while True:
                jobs.append(self.fleet.done.get_nowait())
        for job in jobs:
            if (event := self._event(job)) is not None:
                events.append(event)
        return events

    def _event(self, job: Job) -> TokenEvent | None:
        number, i = job.key
        if i not in self._requests.get(number, {}):  # it was aborted
            return None
        if job.error is not None:
            raise job.error
        del self._requests[number][i]
        if not self._requests[number]:
            del self._requests[number]
        event: TokenEvent = job.reply
        event.weight_versions, event.arrived = job.versions, job.arrived
        self._counts.decode_tokens += len(event.token_ids)
        return event

    def _read(self, reply: object, job: Job) -> TokenEvent:
        """What a server has sampled, in one of the fleet's threads."""
        event = read_completion(reply, job.body["prompt"], *job.key, job.body["max_tokens"])
        if not all(map(math.isfinite, event.logprobs)):
            error = f"{job.name}: {job.server.url} gives a log-probability that is not finite"
            if job.num_tries <= self.config.num_retries:  # another one may do better
                raise ServerError(error)
            event.finish_reason, event.error = "error", error
        elif max(event.token_ids) >= self.model.spec.vocab_size or min(event.token_ids) < 0:
            raise ServerError(
                f"a token id is outside [0, {self.model.spec.vocab_size}): another model's"
            )
        else:
            try:
                event.text = self.policy.decode(event.token_ids)
            except Exception as error:  # the tokenizer's: it ends this sample alone
                event.finish_reason, event.error = "error", undecodable(error)
        return event

    # -- numbers

    @property
    def stats(self) -> EngineStats:
        stats = EngineStats(
            decode_steps=self._counts.decode_steps, decode_tokens=self._counts.decode_tokens
        )
        running = sum(len(server.jobs) for server in self.fleet.servers)
        open_samples = sum(map(len, self._requests.values()))
        stats.num_running = min(running, open_samples)
        stats.num_waiting = open_samples - stats.num_running
        return stats

    @property
    def num_decode_steps(self) -> int:
        return self._counts.decode_steps

    def take_metrics(self) -> dict[str, float]:
        """Of this rank since the last call."""
        row = {
            "vllm/servers": float(len(self.fleet.up)),
            "vllm/lost": float(self.fleet.num_lost),
            "vllm/retries": float(self.fleet.num_retried),
            "vllm/weight_version": float(self.weights.version),
        }
        self.fleet.num_lost = self.fleet.num_retried = 0
        return row | self.weights.take_metrics()


def joined(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of all ranks as one row."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        if name in ("vllm/lost", "vllm/retries"):
            found[name] = sum(values)
        else:
            found[name] = (min if name == "vllm/servers" else max)(values)
    return found
