"""Which tokens are forwarded next: first come, first served, prompts in chunks, all within the cache.

A request waits, is admitted (its prompt gets blocks, as far as they are not found in the prefix cache),
is prefilled in chunks between decode steps, and then its samples start as slots come free. Full blocks
of a prompt are shared by its samples, the partly filled last one is copied when a sample starts, without
its empty part where the cache has tails. When
the cache is full, the sample that started last gives its blocks back and is computed again later.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from r1fast._C import Tails
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.request import Prefill, Request, Sample
from r1fast.rollout.result import EngineStats
from r1fast.rollout.rows import Rows

Chunk = tuple[Prefill, int, int]  # its tokens [start, end)
Start = tuple[Prefill, Sample]  # a sample whose first token is drawn from the prefill's logits


class Scheduler:
    """Moves samples between waiting, prefilling, ready and running; owns what they hold."""

    def __init__(
        self,
        cache: KVCache,
        rows: Rows,
        counts: EngineStats,  # what happens is counted there
        *,
        prefill_tokens: int,
        prefix_cache: bool,
    ):
        self.cache, self.rows, self.allocator, self.counts = cache, rows, cache.allocator, counts
        self.prefill_tokens, self.prefix_cache = prefill_tokens, prefix_cache
        self.waiting: deque[Prefill] = deque()
        self.prefilling: list[Prefill] = []
        self.ready: deque[Prefill] = deque()  # computed, with samples that wait for a slot
        self.copies: list[tuple[int, int]] = []  # blocks to be copied before anything is written

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.ready or self.rows.num_running)

    @property
    def could_start(self) -> bool:
        """Whether anything might be prefilled or started while no sample ends."""
        return bool(self.prefilling or ((self.ready or self.waiting) and self.rows.free))

    @property
    def num_waiting(self) -> int:
        jobs = (*self.waiting, *self.prefilling, *self.ready)
        return sum(len(job.samples) for job in jobs)

    def add(self, request: Request) -> None:
        self.waiting.append(Prefill(request, request.prompt, list(request.samples)))

    def grow(self, num_tokens: int = 1) -> None:
        """Blocks for the next `num_tokens` positions of every running sample; preempts if need be."""
        if self.cache.tails is not None:
            assert num_tokens == 1, num_tokens
            self._grow_tails(self.cache.tails)
            return
        rows, N = self.rows, self.cache.block_size
        while rows.num_running:
            slots = rows.batch().slots
            last = np.minimum(rows.length[slots] + num_tokens - 1, rows.limit[slots])
            short = -(-last // N) - rows.num_blocks[slots]
            missing = int(short.clip(0).sum())
            if missing <= self.allocator.num_available:
                break
            self._preempt()
        if not rows.num_running:
            return
        rows.reserve(int(last.max()) + 1)
        if not missing:
            return
        blocks, taken = self.allocator.allocate(missing), 0
        for extra in range(int(short.max())):
            needy = slots[short > extra]
            rows.add_blocks(needy, blocks[taken : taken + len(needy)])
            taken += len(needy)

    def grow_ahead(self, num_tokens: int) -> int:
        """After `grow`: blocks for `num_tokens` positions where nobody has to be preempted for them, else for
        the next one alone. Returns for how many.
        """
        rows, slots = self.rows, self.rows.batch().slots
        last = np.minimum(rows.length[slots] + num_tokens - 1, rows.limit[slots])
        missing = (-(-last // self.cache.block_size) - rows.num_blocks[slots]).clip(0).sum()
        if missing > self.allocator.num_available:
            return 1
        self.grow(num_tokens)
        return num_tokens

    def _grow_tails(self, tails: Tails) -> None:
        rows = self.rows
        while rows.num_running:
            slots = rows.batch().slots
            if tails.missing(slots, rows.length, rows.num_blocks) <= self.allocator.num_available:
                rows.reserve(int(rows.length[slots].max()) + 1)
                grown = tails.grow(slots, rows.length, rows.blocks, rows.num_blocks)
                assert grown, self.allocator.num_available
                return
            self._preempt()

    def _preempt(self) -> None:
        """Free some blocks: of prefills first, they have least to lose, then of the newest sample."""
        self.counts.preemptions += 1
        if job := (self.prefilling or self.ready or [None])[-1]:
            (self.prefilling if self.prefilling else self.ready).pop()
            self._return(job)
            return
        slots = self.rows.batch().slots
        newest = self.rows.samples[slots[self.rows.started[slots].argmax()]]
        tokens = self.rows.save(newest)
        self._release(self._leave(newest), tokens[:-1])
        self.waiting.appendleft(Prefill(newest.request, tokens, [newest]))

    def _return(self, job: Prefill) -> None:
        """Back to the front of the queue, to be computed from the beginning."""
        self._give_up(job)
        job.blocks, job.num_computed, job.logits, job.is_sound = None, 0, None, False
        self.waiting.appendleft(job)

    def _give_up(self, job: Prefill) -> None:
        """Its blocks. What it has computed is known to be sound once there are logits that are."""
        self._release(job.blocks, job.tokens[: job.num_computed if job.is_sound else 0])

    def _release(self, blocks: np.ndarray, computed: np.ndarray) -> None:
        """Give up blocks; the full ones, which hold the `computed` tokens, may be found again."""
        if self.prefix_cache:
            full = len(computed) // self.cache.block_size
            self.allocator.insert(computed, blocks[:full])
        self.allocator.free(blocks)

    def admit(self) -> list[Chunk]:
        """The prompt tokens of this step, at most `prefill_tokens`, or one token's worth of a prompt."""
        chunks, budget = [], self.prefill_tokens
        for job in self.prefilling:
            budget -= self._take_chunk(job, budget, chunks)
        slots = len(self.rows.free) - sum(len(j.samples) for j in (*self.prefilling, *self.ready))
        while self.waiting and budget > 0 and slots > 0:
            job = self.waiting[0]
            if not self._reserve(job, slots):
                break
            self.waiting.popleft()
            self.prefilling.append(job)
            slots -= len(job.samples)
            budget -= self._take_chunk(job, budget, chunks)
        return chunks

    @staticmethod
    def _take_chunk(job: Prefill, budget: int, chunks: list[Chunk]) -> int:
        start = job.num_computed
        end = min(start + budget, len(job.tokens))
        if end > start:
            chunks.append((job, start, end))
        return end - start

    def _reserve(self, job: Prefill, num_slots: int) -> bool:
        """Blocks for all the job's tokens, found or fresh; False if there are not enough."""
        tokens, found = job.tokens, np.zeros(0, np.int32)
        total = self.cache.blocks_for(len(tokens))
        if self.prefix_cache:
            found = self.allocator.lookup(tokens[:-1])  # the last token's logits must be computed
        # every sample that starts or runs takes another block soon
        soon = min(len(job.samples), num_slots) + self.rows.num_running
        others = self.rows.num_running or self.prefilling or self.ready
        if total - len(found) + (soon if others else 0) > self.allocator.num_available:
            self.allocator.free(found)
            return False
        job.num_computed = len(found) * self.cache.block_size
        self.counts.prefix_queries += len(tokens)
        self.counts.prefix_hits += job.num_computed
        job.blocks = np.concatenate((found, self.allocator.allocate(total - len(found))))
        return True

    def computed(self, chunks: list[Chunk]) -> list[Prefill]:
        """Note that these chunks are in the cache. Returns the jobs that are complete, as ready."""
        complete = []
        for job, _, end in chunks:
            job.num_computed = end
            if end == len(job.tokens):
                complete.append(job)
        self.prefilling = [job for job in self.prefilling if job not in complete]
        self.ready += complete
        return complete

    def keep(self, jobs: list[Prefill], logits: Tensor) -> None:
        """(n, V) logits of the last tokens of complete jobs. Where they are sound, others may find the blocks."""
        # minus infinity bans a token; what a NaN has touched is not to be found again
        sound = (logits < torch.inf).all(1) & logits.isfinite().any(1)
        for job, row, job.is_sound in zip(jobs, logits, sound.tolist(), strict=True):
            job.logits = row.clone()
            if self.prefix_cache and job.is_sound:
                full = len(job.tokens) // self.cache.block_size
                self.allocator.insert(job.tokens, job.blocks[:full])

    def start(self) -> list[Start]:
        """Give free slots to samples that are ready. Their first token is drawn from the job's logits."""
        started = []
        while self.ready and self.rows.free:
            job = self.ready[0]
            sample = job.samples[0]
            blocks = self._fork(job)
            if blocks is None:
                if not self.rows.num_running:
                    # it must not wait for others: it takes the prompt's blocks, the rest come again
                    rest = Prefill(job.request, job.tokens, job.samples[1:])
                    job.samples = [sample]
                    self.waiting.appendleft(rest)
                    continue
                break
            self.rows.start(sample, job.tokens, blocks)
            job.samples.pop(0)
            started.append((job, sample))
            if not job.samples:
                self.ready.popleft()
                if self.cache.tails is not None:
                    self.allocator.free(job.blocks[len(blocks) :])  # each sample has a copy
        return started

    def _fork(self, job: Prefill) -> np.ndarray | None:
        """Blocks for the job's next sample: its last sample takes the job's own. None: cache full."""
        full = len(job.tokens) // self.cache.block_size
        if self.cache.tails is not None:
            return self._fork_tail(job, full, self.cache.tails)
        if len(job.samples) == 1:
            return job.blocks
        blocks = job.blocks
        if full < len(blocks):
            if not self.allocator.num_available:
                return None
            own = self.allocator.allocate(1)
            self.copies.append((int(blocks[full]), int(own[0])))
            blocks = np.concatenate((blocks[:full], own))
        self.allocator.share(blocks[:full])
        return blocks

    def _fork_tail(self, job: Prefill, full: int, tails: Tails) -> np.ndarray | None:
        """The full blocks; the positions behind them are copied to the slot that the sample gets."""
        self.rows.reserve(len(job.tokens) + 1)  # before anything is taken: it may fail
        slot, count = self.rows.free[-1], len(job.tokens) % self.cache.block_size
        if count and not tails.adopt(slot, int(job.blocks[full]), count):
            return job.blocks if len(job.samples) == 1 else None
        if len(job.samples) > 1:
            self.allocator.share(job.blocks[:full])
        return job.blocks[:full]

    def finish(self, sample: Sample, *, is_sound: bool = True) -> None:
        """The sample's slot and blocks are free again; unsound ones are not to be found again."""
        length = self.rows.length[sample.slot] - 1 if is_sound else 0
        tokens = self.rows.tokens[sample.slot, :length].copy()
        self._release(self._leave(sample), tokens)
        sample.is_done = True

    def _leave(self, sample: Sample) -> np.ndarray:
        """The sample runs no more. Returns the blocks that it still holds."""
        if self.cache.tails is not None:
            self.cache.tails.release(sample.slot)
        return self.rows.leave(sample)

    def drop(self, request: Request) -> list[Sample]:
        """End all that is not done of a request. Returns the samples, those that ran among them."""
        ended = [s for s in request.samples if not s.is_done]
        for sample in ended:
            if sample.slot >= 0:
                self.finish(sample)
            sample.is_done = True
        for job in (*self.prefilling, *self.ready):
            if job.request is request:
                self._give_up(job)
        for name in ("waiting", "prefilling", "ready"):
            jobs = getattr(self, name)
            setattr(self, name, type(jobs)(job for job in jobs if job.request is not request))
        return ended
