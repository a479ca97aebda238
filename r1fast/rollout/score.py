"""Log-probabilities of given completions: teacher forcing through the engine's prefill.

Prompts and completions are forwarded in chunks over the blocks of the engine's own cache, as a sample that
was preempted is; so the sums, on the native forward, are those of decoding, to the bit. Nothing is read from
the prefix cache or left in it: what comes out says what the weights say.
Shapes: P prompt tokens, n completion tokens, N tokens of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1fast.kernels.sample import token_logprobs
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.request import token_ids
from r1fast.rollout.runner import Runner

LOGITS_BYTES = 64 << 20  # of logits at any one time


@dataclass(slots=True, eq=False)
class Given:
    """A completion whose tokens are given: the job of a chunk, as `Prefill` is."""

    name: str  # how errors call it
    tokens: np.ndarray  # (P + n - 1,) int64: the last token is predicted, never forwarded
    targets: np.ndarray  # (n,) int64: tokens P - 1, P, ... predict them
    logprobs: np.ndarray  # (n,) float32, filled in
    blocks: np.ndarray | None = None  # (num_blocks,) int32, held while it is forwarded


class Scoring:
    """One call of `Engine.score`. It holds blocks for one step's completions and the prompt of the last one."""

    def __init__(self, runner: Runner, cache: KVCache, chunk_tokens: int, temperature: float):
        self.runner, self.cache, self.allocator = runner, cache, cache.allocator
        self.chunk_tokens, self.temperature = chunk_tokens, temperature
        self.step: list[tuple[Given, int, int]] = []  # tokens [start, end) of each
        self.room = chunk_tokens
        self.held: list[np.ndarray] = []  # blocks, of the prompt and of completions

    def run(self, groups: list[list[Given]], prompt_lengths: Sequence[int]) -> None:
        """Fill in the log-probabilities of each prompt's completions."""
        try:
            for group, length in zip(groups, prompt_lengths, strict=True):
                self._add([job for job in group if len(job.targets)], length)
            self._forward()
        finally:
            for blocks in self.held:
                self.allocator.free(blocks)

    def _add(self, group: list[Given], prompt_length: int) -> None:
        """The full blocks before the prompt's last token, whose logits each completion needs, are shared."""
        N = self.cache.block_size
        full = (prompt_length - 1) // N if len(group) > 1 else 0
        shared = None
        for job in group:
            total = self.cache.blocks_for(len(job.tokens))
            own = self._allocate(total - (0 if shared is None else full), job.name)
            start = 0 if shared is None else full * N
            if shared is None:
                shared = own[:full]
                self.allocator.share(shared)  # held for the others
                self.held.append(shared)
                job.blocks = own
            else:
                self.allocator.share(shared)
                job.blocks = np.concatenate((shared, own))
            self.held.append(job.blocks)
            while start < len(job.tokens):
                end = min(start + self.room, len(job.tokens))
                self.step.append((job, start, end))
                self.room -= end - start
                start = end
                if not self.room:
                    self._forward()
        if shared is not None:
            self._free(shared)

    def _allocate(self, count: int, name: str) -> np.ndarray:
        if count > self.allocator.num_available:
            self._forward()
        if count > (free := self.allocator.num_available):
            remedy = f"give the cache {count * self.cache.block_bytes} bytes or more"
            if count <= self.cache.num_blocks:
                remedy = "score when the requests that hold the others have ended, or " + (
                    "give the cache more bytes"
                )
            raise ValueError(
                f"{name} needs {count} blocks of the cache, {free} of {self.cache.num_blocks} are "
                f"free: {remedy}"
            )
        return self.allocator.allocate(count)

    def _free(self, blocks: np.ndarray) -> None:
        self.held = [b for b in self.held if b is not blocks]
        self.allocator.free(blocks)

    def _forward(self) -> None:
        """Run the step, score what it predicts, and give back what is complete."""
        if not self.step:
            return
        hidden = self.runner.forward_chunks(self.step, self.cache)
        rows, targets, first = [], [], 0
        for job, start, end in self.step:
            before = len(job.tokens) - len(job.targets)  # tokens that predict nothing
            begin = max(start, before)
            rows.append(np.arange(begin, end) - start + first)
            targets.append(job.targets[begin - before : max(end - before, 0)])
            first += end - start
        values = self._score(hidden, np.concatenate(rows), np.concatenate(targets))
        taken = 0
        for (job, _, end), part in zip(self.step, targets, strict=True):
            stop = end - len(job.tokens) + len(job.targets)
            job.logprobs[stop - len(part) : stop] = values[taken : taken + len(part)]
            taken += len(part)
            if end == len(job.tokens):
                self._free(job.blocks)
        self.step, self.room = [], self.chunk_tokens

    def _score(self, hidden: Tensor, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
        if not len(rows):  # of a long prompt
            return np.zeros(0, np.float32)
        device = hidden.device
        hidden = hidden[torch.from_numpy(rows).to(device)]
        ids = torch.from_numpy(targets).to(device)
        size = max(LOGITS_BYTES // (4 * self.runner.model.spec.vocab_size), 1)
        parts = [
            token_logprobs(self.runner.logits(h), t, temperature=self.temperature)
            for h, t in zip(hidden.split(size), ids.split(size), strict=True)
        ]
        return torch.cat(parts).cpu().numpy()


def make_jobs(
    prompts: Sequence[np.ndarray],
    completions: Sequence[Sequence[Sequence[int]]],
    vocab_size: int,
    context: int,
) -> list[list[Given]]:
    """A job for each completion. Raises ValueError for what cannot be one; prompts have been checked."""
    if len(prompts) != len(completions):
        raise ValueError(
            f"{len(prompts)} prompts need as many lists of completions, got {len(completions)}"
        )
    groups = []
    for i, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        jobs = []
        for j, completion in enumerate(group):
            name = f"completion {j} of prompt {i}"
            given = token_ids(completion, name, "completions")
            n = len(given)
            if n and not 0 <= given.min() <= given.max() < vocab_size:
                raise ValueError(
                    f"{name} has a token id outside [0, {vocab_size}): {given.min()}..{given.max()}"
                )
            if len(prompt) + n > context:
                raise ValueError(
                    f"{name} has {n} tokens after {len(prompt)} of the prompt: the model's context "
                    f"is {context}"
                )
            ids = np.concatenate((prompt, given)).astype(np.int64)
            jobs.append(Given(name, ids[:-1], ids[len(prompt) :], np.zeros(n, np.float32)))
        groups.append(jobs)
    return groups
