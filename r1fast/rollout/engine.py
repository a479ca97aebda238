"""Continuous batching over the trainer's own weights: schedule -> run -> postprocess.

There is no second copy of the model and no weight sync: a step reads the parameters as they are. A prompt is
prefilled once for its G samples, which share its blocks; a slot that comes free is refilled in the same step.
Shapes: B decode rows, T prompt tokens, H query heads, K kv heads, Dh head width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch

from r1fast.config import RolloutConfig
from r1fast.model import Decoder
from r1fast.policy import Policy
from r1fast.rollout.decoding import Decoding
from r1fast.rollout.draw import draw
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.loops import Loops
from r1fast.rollout.request import (
    RefusedRequest,
    Request,
    Sample,
    check_request,
    token_ids,
)
from r1fast.rollout.result import EngineStats
from r1fast.rollout.rows import Rows
from r1fast.rollout.runner import Runner
from r1fast.rollout.sampler import MAX_SCALE, SamplingParams
from r1fast.rollout.scheduler import Scheduler
from r1fast.rollout.score import Scoring, make_jobs
from r1fast.rollout.speculation import Speculation
from r1fast.rollout.text import TextStream
from r1fast.rollout.weights import checksums, versions, weights
from r1fast.types import TokenEvent


class Engine(Loops, Decoding):
    """Samples from `model`. `eos_ids` end a completion (the end token is part of it).

    Weights may be trained, replaced or moved (`model.to`) between requests, not while one runs.
    Not for several threads at once. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        model: Decoder,
        eos_ids: Iterable[int],
        *,
        decode: Callable[[list[int]], str] | None = None,  # tokenizer.decode, for text
        max_batch_size: int = 256,
        cache_bytes: int | None = None,  # for keys and values; None: found
        block_size: int = 16,  # positions
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,  # of prompts in one step, so that decoding goes on
        batch_invariant: bool = False,
        cuda_graphs: bool = True,  # on a GPU, for steps without drafts
        speculation: Speculation | None = None,
        fixed_weights: bool = False,  # they never change: not looked at again
        part: Callable[
            [str], AbstractContextManager
        ] = nullcontext,  # what a profiler puts around one
    ):
        eos = sorted(set(eos_ids))
        if not eos:
            raise ValueError("the engine needs at least one end-of-sequence id, got none")
        if outside := [t for t in eos if not 0 <= t < model.spec.vocab_size]:
            raise ValueError(
                f"end-of-sequence id {outside[0]} is outside [0, {model.spec.vocab_size})"
            )
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("block_size", block_size),
            ("prefill_tokens", prefill_tokens),
        ):
            if not isinstance(value, Integral):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(cache_bytes, Integral | None):
            raise ValueError(f"cache_bytes must be an integer or None, got {cache_bytes!r}")
        if block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16, got {block_size}")
        self.model, self.eos_ids, self.part = model, eos, part
        self.decode = decode or (lambda ids: "")
        self._has_text = decode is not None
        self.context = model.spec.max_position_embeddings
        self.speculation = speculation
        self._is_eos = np.zeros(model.spec.vocab_size, bool)
        self._is_eos[eos] = True
        self._cache_options = {
            "block_size": block_size,
            "num_bytes": cache_bytes,
            "max_sequences": max_batch_size,
            "max_positions": self.context,
        }
        self.runner = Runner(
            model,
            batch_invariant=batch_invariant,
            graph_rows=max_batch_size if cuda_graphs else 0,
        )
        self.rows = Rows(max_batch_size, block_size, self._is_eos)
        self.scheduler: Scheduler | None = None  # with its cache, from the first request on
        self._prefill_tokens, self._prefix_cache = prefill_tokens, prefix_cache
        self._fixed_weights = fixed_weights
        self._requests: dict[int, Request] = {}
        self._ended: list[TokenEvent] = []  # of requests that were aborted
        self._events = {}
        self._num_requests = 0
        self._versions: tuple = ()  # of the weights as they were when the engine was last idle,
        self._checksums: list[int] = []  # and what they held
        self._counts = EngineStats()

    @classmethod
    def of(cls, policy: Policy, rollout: RolloutConfig, **options) -> "Engine":
        """The engine that a config asks for, with further `options` of the constructor."""
        return cls(
            policy.model,
            policy.eos_ids,
            decode=policy.decode,
            max_batch_size=rollout.max_batch_size,
            cache_bytes=math.ceil(rollout.cache_gib * 2**30) or None,
            block_size=rollout.block_size,
            prefix_cache=rollout.prefix_cache,
            prefill_tokens=rollout.prefill_tokens,
            batch_invariant=rollout.batch_invariant,
            cuda_graphs=rollout.cuda_graphs,
            speculation=Speculation(rollout.num_draft_tokens) if rollout.num_draft_tokens else None,
            **options,
        )

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

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
        """Ask for len(seeds) samples of one prompt; they begin in the next steps. Returns an id.

        With `stream` every step has an event for each sample, else there is one when it ends.
        Raises ValueError, which calls the request `name`, for an empty prompt, a token id outside the
        vocabulary, a prompt that fills the context, bans of every token, and for what the cache cannot
        hold even alone; and where the weights have changed while other requests run.
        """
        self._num_requests += 1
        name = name or f"request {self._num_requests}"
        prompt = token_ids(prompt_ids, name)
        self._check(prompt, seeds, sampling, name)
        self._refresh()
        prompt = prompt.astype(np.int64)  # a copy
        lengths = [sampling.max_tokens] * len(seeds) if lengths is None else lengths
        if len(lengths) != len(seeds) or min(lengths, default=1) < 1:
            raise RefusedRequest(
                f"{name} needs a length of at least 1 for each of its {len(seeds)} samples, "
                f"got {lengths}",
                "lengths",
            )
        limits = [min(len(prompt) + n, self.context) for n in lengths]
        limit = max(limits, default=0)
        cache = self.scheduler.cache
        if (needed := cache.blocks_for(limit)) > cache.num_blocks:
            raise RefusedRequest(
                f"{name} needs {needed} blocks of the cache for its {len(prompt)} tokens and up to "
                f"{limit - len(prompt)} more, there are {cache.num_blocks} of "
                f"{cache.block_size} positions: give the cache {needed * cache.block_bytes} bytes "
                "or more, or lower max_tokens",
                "prompt",
            )
        request = Request(self._num_requests, name, prompt, sampling, stream, return_entropy)
        for i, (seed, own) in enumerate(zip(seeds, limits, strict=True)):
            sample = Sample(request, i, seed, own)
            if stream or sampling.stop:
                sample.text = TextStream(self.decode, sampling.stop)
            if sampling.repetition_penalty != 1:
                sample.seen = np.zeros(self.model.spec.vocab_size, bool)
                sample.seen[prompt] = True
            request.samples.append(sample)
        if request.samples:
            self._requests[request.id] = request
            self.scheduler.add(request)
        return request.id

    def _check(
        self, prompt: np.ndarray, seeds: Sequence[int], sampling: SamplingParams, name: str
    ) -> None:
        check_request(
            name,
            prompt,
            seeds,
            sampling,
            vocab_size=self.model.spec.vocab_size,
            context=self.context,
            eos_ids=self.eos_ids,
            has_text=self._has_text,
        )

    def _refresh(self) -> None:
        """A cache that fits the weights, and none of what older ones have left in it.

        Raises ValueError where a quick look finds other weights while requests run; what that look
        cannot see (a fused optimizer's step) is found when the engine is idle.
        """
        if self._fixed_weights and self.scheduler is not None:
            return
        now = versions(self.model)
        if self._requests:
            if now != self._versions:
                raise ValueError(
                    f"the model's weights have changed while {len(self._requests)} requests run; "
                    "let them end or abort them before training, then add more"
                )
            return
        weight, content = self.model.head_weight, checksums(weights(self.model))
        if (now, content) != (self._versions, self._checksums):
            self.reset_prefix_cache()
        if self.scheduler is None or not self.scheduler.cache.fits(weight):
            self.scheduler = None  # the old cache's memory is free before there is a new one
            # drafts are written ahead, and a graph reads what lies still
            has_tails = self.speculation is None and self.runner.graphs is None
            cache = KVCache(
                self.model.spec, weight.dtype, weight.device, has_tails=has_tails,
                **self._cache_options,
            )  # fmt: skip
            self.scheduler = Scheduler(
                cache, self.rows, self._counts, prefill_tokens=self._prefill_tokens,
                prefix_cache=self._prefix_cache,
            )  # fmt: skip
        self._versions, self._checksums = now, content

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix and prepared weight: the weights have changed.

        There is no need to: an engine without requests looks for changes when one is added, at all
        weights. With `fixed_weights` it does not, and this makes it take them as they are now.
        """
        self.runner.reset()
        if self.scheduler is not None:
            self.scheduler.allocator.reset()

    def sync(self) -> None:
        """Nothing: the weights are read where they are. Servers (vllm/engine.py) have to be sent them."""

    def close(self) -> None:
        """Nothing either."""

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._ended)

    def abort(self, request_id: int) -> None:
        """Its samples that are not done end with finish_reason "abort"; other ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        for sample in request.samples:
            if not sample.is_done:
                self._ended.append(self._event(sample, "abort"))
        self.scheduler.drop(request)

    def _discard(self, request_ids: Iterable[int]) -> None:
        """End these requests, and nobody is to see an event of them any more."""
        ids = set(request_ids)
        for request_id in ids:
            self.abort(request_id)
        self._ended = [e for e in self._ended if e.request_id not in ids]

    @torch.inference_mode()
    def step(self, num_tokens: int = 1) -> list[TokenEvent]:
        """Schedule, run, postprocess: about one token of every running sample.

        On the CPU's native forward up to `num_tokens` of them, as long as no sample ends or streams and
        none could start. Raises ValueError for num_tokens below 1.
        """
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        events, self._ended = self._ended, []
        if self.scheduler is not None:
            self._step(events, num_tokens)
        return events

    def _step(self, events: list[TokenEvent], num_tokens: int) -> None:
        self.scheduler.grow(1 + (self.speculation.num_draft if self.speculation else 0))
        if self.rows.num_running:
            self._decode(events, num_tokens)
        self._start(events)
        chunks = self.scheduler.admit()
        if chunks:
            with self.part("prefill"):
                hidden = self.runner.prefill(chunks, self.scheduler.cache)
                complete = self.scheduler.computed(chunks)
                if complete:
                    self.scheduler.keep(complete, self.runner.logits(hidden))
            self._counts.prefill_tokens += sum(end - start for _, start, end in chunks)
            self._start(events)

    def _start(self, events: list[TokenEvent]) -> None:
        """First tokens of the samples for which there are slots."""
        started = self.scheduler.start()
        self.runner.copy_blocks(self.scheduler.copies, self.scheduler.cache)
        self.scheduler.copies = []
        if started:
            logits = torch.stack([job.logits for job, _ in started])
            slots = np.array([sample.slot for _, sample in started])
            with self.part("sampling"):
                drawn = draw(logits, self.rows, slots)
            self._append(slots, drawn, np.arange(len(slots)), events)

    @property
    def stats(self) -> EngineStats:
        """Counters since the engine was made, and how full its cache is now."""
        if self.scheduler is None:
            return replace(self._counts)
        cache, allocator = self.scheduler.cache, self.scheduler.allocator
        return replace(
            self._counts,
            num_blocks=cache.num_blocks,
            blocks_used=allocator.num_used,
            blocks_cached=allocator.num_cached,
            peak_blocks=allocator.peak_used,
            block_bytes=cache.block_bytes,
            num_running=self.rows.num_running,
            num_waiting=self.scheduler.num_waiting,
        )

    @property
    def num_decode_steps(self) -> int:
        return self._counts.decode_steps

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Sequence[int]],  # N
        completions: Sequence[Sequence[Sequence[int]]],  # of each prompt, any number and length
        temperature: float = 1.0,
    ) -> list[list[np.ndarray]]:  # (n,) float32 for each completion
        """The log-probabilities of given tokens: what `generate` reports where it draws them.

        To the bit on the CPU's native forward, elsewhere up to the rounding of GEMMs. NaN from the token
        on whose logits are not finite. Raises ValueError, which names prompt or completion, for an empty prompt,
        a token id outside the vocabulary, a temperature of 0, more tokens than the context or the cache has room for.
        """
        if not 1 / MAX_SCALE <= temperature <= MAX_SCALE:
            raise ValueError(
                f"temperature must be in [{1 / MAX_SCALE:g}, {MAX_SCALE:g}], got {temperature}: a greedy draw "
                "has no log-probability, and generate reports those at temperature 1 for it"
            )
        prompts = [token_ids(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        for i, prompt in enumerate(prompts):
            self._check(prompt, (), SamplingParams(), f"prompt {i}")
        jobs = make_jobs(prompts, completions, self.model.spec.vocab_size, self.context)
        self._refresh()
        scoring = Scoring(self.runner, self.scheduler.cache, self._prefill_tokens, temperature)
        scoring.run(jobs, [len(prompt) for prompt in prompts])
        return [[job.logprobs for job in group] for group in jobs]
