"""The trainer's weights on a server: which it has, how it gets others, and the check that it has them.

A server's label, which vLLM keeps beside its weights, is "r1fast-<version>-<digest of the weights>". So it is known
which weights a server has that was not started by this process, or has come back; the digest decides, the
version counts. An update is vLLM's own: pause, start, update, finish, an emptied prefix cache, resume.
"""

from __future__ import annotations

import hashlib
import re
import time
from bisect import bisect_right, insort
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from r1fast.config import RolloutConfig
from r1fast.metrics import note
from r1fast.model import Decoder
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm.canary import MAX_MEAN, SAMPLE_TOKENS, Canary, canary_prompts, compare
from r1fast.rollout.vllm.client import RequestError, ServerError
from r1fast.rollout.vllm.fleet import Server
from r1fast.rollout.vllm.transfer import make_transfer
from r1fast.rollout.vllm.wire import read_completion, sampling_body
from r1fast.rollout.weights import checksums, weights

REPLY_SECONDS = 60.0  # for what takes no time
NEEDED = ("/pause", "/resume", "/start_weight_update", "/update_weights", "/finish_weight_update",
          "/update_weight_version", "/weight_info", "/reset_prefix_cache")  # fmt: skip
UPDATING = "r1fast-updating"  # label of weights that are half of one kind
_LABEL = re.compile(r"r1fast-(\d+)-([0-9a-f]+)")
_HOW = "python -m r1fast.rollout.vllm.start starts one as it is needed"


class CanaryError(RuntimeError):
    """A server does not have the trainer's weights, whatever it says."""


class WeightSync:
    """What the servers are to have, and who has it. `version` and `digest` are of the last `take`."""

    def __init__(self, model: Decoder, rollout: RolloutConfig, servers: Sequence[Server]):
        self.model, self.config = model, rollout.vllm
        self.version, self.digest, self.are_known = 0, "", False
        self._now = ""  # digest of the trainer's weights, where it was taken since they changed
        self._versions: list[int] = []  # that this run has had, sorted
        self._servers, self._temperature = servers, rollout.temperature
        self._prompts = canary_prompts(model.spec.vocab_size, model.spec.max_position_embeddings)
        self._transfer = make_transfer(model, self.config, [s.client for s in servers])
        self._sleeps: dict[str, bool] = {}  # url -> whether it can
        self._row: dict[str, float] = {}

    def close(self) -> None:
        self._transfer.close()

    def changed(self) -> None:
        """The trainer's weights are others than those of the last `take`, or may be."""
        self.are_known, self._now = False, ""

    def take(self) -> None:
        """Look at the trainer's weights. New ones get the next version, known ones that of their servers."""
        if self.are_known:
            return
        digest = self._digest_now()
        if digest != self.digest:
            versions = {}
            for server in self._servers:
                if server.state != "lost":
                    with suppress(ServerError, RequestError):
                        version, theirs = self._label(server)
                        versions[theirs] = max(version, versions.get(theirs, 0))
            newest = max([self.version, *versions.values()])
            self._has(versions.get(digest, newest + 1), digest)
        self.are_known = True

    def follow(self, version: int, digest: str) -> None:
        """Take rank 0's word for it."""
        self._has(version, digest)
        self.are_known = True

    def _has(self, version: int, digest: str) -> None:
        self.version, self.digest = version, digest
        if version not in self._versions:
            insort(self._versions, version)

    def lag(self, version: int) -> int:
        """How many times the weights have changed since they were of `version`."""
        return len(self._versions) - bisect_right(self._versions, version)

    def introduce(self, server: Server) -> None:
        """Raises ValueError for a server that takes no weights."""
        paths = server.client.get("/openapi.json", timeout=REPLY_SECONDS)
        paths = paths.get("paths", {}) if isinstance(paths, dict) else {}
        if missing := [path for path in NEEDED if path not in paths]:
            raise ValueError(
                f"{server.url} has no {', '.join(missing)}: weights cannot be sent to it. It needs "
                f"VLLM_SERVER_DEV_MODE=1 and a vLLM of 0.29 or newer; {_HOW}"
            )

    def has_them(self, server: Server) -> bool:
        return self._label(server)[1] == self.digest

    def was_given_them(self, server: Server) -> bool:
        """On a rank that gives none: whether rank 0 has, those of the last `sync` or, since then, those of now."""
        version, digest = self._label(server)
        if digest not in ("", self.digest) and not self.are_known and digest == self._digest_now():
            self.follow(version, digest)
        return digest == self.digest

    def _digest_now(self) -> str:
        self._now = self._now or digest_of(self.model)
        return self._now

    def _label(self, server: Server) -> tuple[int, str]:
        reply = server.client.get("/weight_info", timeout=REPLY_SECONDS)
        label = reply.get("weight_version") if isinstance(reply, dict) else None
        match = _LABEL.fullmatch(label) if isinstance(label, str) else None
        return (int(match[1]), match[2]) if match else (-1, "")

    def prepare(self) -> None:
        """Before servers are given the weights, in parallel."""
        self._transfer.prepare(self.version)

    def give(self, server: Server) -> None:
        """The weights of `prepare`. Raises ServerError where the server does not take them."""
        mode = "wait" if self.config.update == "auto" else self.config.update
        patience = self.config.request_timeout + REPLY_SECONDS if mode == "wait" else REPLY_SECONDS
        post, server.newest = server.client.post, self.version
        try:
            post(f"/pause?mode={mode}", timeout=patience)
            try:
                post("/update_weight_version", {"new_version": UPDATING}, timeout=REPLY_SECONDS)
                if self._sleeps.get(server.url):
                    post("/wake_up?tags=weights", timeout=self.config.sync_timeout)
                self._start(server)
                self._transfer.send(server.client, timeout=self.config.sync_timeout)
                label = {"weight_version": f"r1fast-{self.version}-{self.digest}"}
                post("/finish_weight_update", label, timeout=self.config.sync_timeout)
                # samples that go on are computed again: keys and values of older weights are no use
                again = "true" if mode == "keep" else "false"
                reset = f"/reset_prefix_cache?reset_running_requests={again}"
                reply = post(reset, timeout=REPLY_SECONDS)
                if isinstance(reply, dict) and reply.get("success") is False:
                    raise ServerError(f"{server.url} cannot empty its prefix cache")
            finally:
                post("/resume", timeout=REPLY_SECONDS)
        except RequestError as error:
            raise ServerError(str(error)) from None

    def _start(self, server: Server) -> None:
        try:
            server.client.post("/start_weight_update", timeout=self.config.sync_timeout)
        except ServerError:  # a trainer that is gone may have begun one
            server.client.post("/finish_weight_update", timeout=self.config.sync_timeout)
            server.client.post("/start_weight_update", timeout=self.config.sync_timeout)

    def canaries(self, server: Server) -> list[tuple[list[int], list[float]]]:
        """What the server samples, with its log-probabilities: for `check`."""
        if self._sleeps.get(server.url):
            server.client.post("/wake_up", timeout=self.config.sync_timeout)
        with ThreadPoolExecutor(len(self._prompts), "vllm-canary") as pool:  # the trainer waits
            return list(pool.map(partial(self._canary, server), range(len(self._prompts))))

    def _canary(self, server: Server, i: int) -> tuple[list[int], list[float]]:
        sampling = SamplingParams(self._temperature, max_tokens=SAMPLE_TOKENS, ignore_eos=True)
        body = sampling_body("the canary", self._prompts[i], sampling, ())
        body |= {"model": server.model, "seed": i, "max_tokens": SAMPLE_TOKENS}
        patience = min(self.config.request_timeout, REPLY_SECONDS)
        try:
            reply = server.client.post("/v1/completions", body, timeout=patience)
        except RequestError as error:
            raise ServerError(str(error)) from None
        event = read_completion(reply, self._prompts[i], 0, i, SAMPLE_TOKENS)
        return event.token_ids, event.logprobs

    def check(self, server: Server, sampled: list[tuple[list[int], list[float]]]) -> None:
        """Compare with the trainer's own. Raises CanaryError."""
        found = compare(self.model, self._prompts, sampled, self._temperature)
        for key, value in (("mean", found.mean), ("max", found.largest)):
            name = f"vllm/canary_{key}"
            self._row[name] = max(value, self._row.get(name, 0.0))
        limit = self.config.max_canary or MAX_MEAN[self.model.head_weight.dtype]
        if found.mean > limit and not self.config.max_canary:
            limit = max(limit, MAX_MEAN.get(self._dtype(server), 0.0))
        if not found.mean <= limit:
            raise CanaryError(self._complaint(server, found, limit))

    def _complaint(self, server: Server, found: Canary, limit: float) -> str:
        return (
            f"{server.url} does not sample from the trainer's weights (version {self.version}): over "
            f"{len(self._prompts)} canaries of {SAMPLE_TOKENS} tokens its log-probabilities are "
            f"{found.mean:.4g} nats off in the mean, {found.largest:.4g} at most ({found.where}); the limit is "
            f"rollout.vllm.max_canary = {limit:g}. Another model, a head or a cache that kept older weights, "
            f"or a server without --logprobs-mode processed_logprobs does that; {_HOW}"
        )

    def _dtype(self, server: Server) -> torch.dtype | None:
        """That the server computes in, as far as it tells."""
        with suppress(ServerError, RequestError, KeyError, TypeError, AttributeError):
            reply = server.client.get("/server_info?config_format=json", timeout=REPLY_SECONDS)
            name = str(reply["vllm_config"]["model_config"]["dtype"]).removeprefix("torch.")
            return getattr(torch, name, None)
        return None

    def sleep(self, server: Server) -> None:
        """Weights and cache leave the GPU; the next `give` brings weights, `canaries` the cache."""
        if server.url not in self._sleeps:
            paths = server.client.get("/openapi.json", timeout=REPLY_SECONDS)["paths"]
            self._sleeps[server.url] = "/sleep" in paths and self.model.head_weight.is_cuda
            if not self._sleeps[server.url]:
                note(
                    "rollout.vllm.sleep: servers on a CPU, or without --enable-sleep-mode, stay awake"
                )
        if self._sleeps[server.url]:
            body = {"new_version": UPDATING}  # level 2 forgets the weights
            server.client.post("/update_weight_version", body, timeout=REPLY_SECONDS)
            server.client.post("/sleep?level=2&mode=wait", timeout=self.config.sync_timeout)

    def took(self, began: float) -> None:
        self._row["vllm/sync_seconds"] = time.monotonic() - began
        self._row["vllm/sync_bytes"] = float(self._transfer.num_bytes)
        self._transfer.num_bytes = 0

    def take_metrics(self) -> dict[str, float]:
        row, self._row = self._row, {}
        return row


def digest_of(model: Decoder) -> str:
    """A short name for the weights as a forward reads them now."""
    sums = checksums(weights(model))
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
