"""The state of every sample that decodes, as arrays over slots: a step touches no Python object a token.

`order` holds the running slots in the order of the batch: samples of one request follow each other, so
that attention reads what they share once.
Shapes: S slots, B running rows, L tokens, M blocks, N positions a block.
"""

from dataclasses import dataclass

import numpy as np

from r1fast.rollout.request import Sample
from r1fast.rollout.sampler import SamplingParams

RESULTS = ("tokens", "logprobs", "truncated", "entropies")
GROWTH = 64  # arrays grow to twice their width, and to a multiple of this


@dataclass(slots=True)
class Batch:
    """What stays equal from step to step while no sample starts or ends."""

    slots: np.ndarray  # (B,) int64
    group_starts: np.ndarray  # (groups + 1,) int32
    shared_blocks: np.ndarray  # (groups,) int32: full blocks at the front that all of a group hold
    sampling: SamplingParams | None  # of all rows, where it is the same
    adjusts: bool  # whether any row has its logits changed
    truncates: bool  # whether any row samples from another distribution than the policy
    return_entropy: bool
    num_top: int


class Rows:
    """Slots and their arrays. Token n of a slot is tokens[slot, n]; the last one is not in the cache yet."""

    def __init__(self, num_slots: int, block_size: int, eos: np.ndarray):
        S = num_slots
        self.block_size, self.is_eos = block_size, eos  # (V,) bool
        self.samples: list[Sample | None] = [None] * S
        self.free = list(range(S - 1, -1, -1))
        self.tokens = np.zeros((S, 0), np.int64)
        self.logprobs, self.truncated, self.entropies = (
            np.zeros((S, 0), np.float32) for _ in range(3)
        )
        self.blocks = np.zeros((S, 0), np.int32)
        self.length, self.prompt_length, self.limit, self.min_length, self.num_blocks, self.seed = (
            np.zeros(S, np.int64) for _ in range(6)
        )
        self.group = np.full(S, -1, np.int64)  # its request's id
        self.started = np.zeros(S, np.int64)  # when, to find who came last
        self.temperature, self.top_p, self.min_p = (np.zeros(S, np.float32) for _ in range(3))
        self.top_k = np.zeros(S, np.int64)
        self.ignore_eos, self.is_watched = np.zeros(S, bool), np.zeros(S, bool)
        self.num_watched = 0
        self.stop_ids = np.full((S, 0), -1, np.int64)
        self._num_started = 0
        self._batch: Batch | None = None

    @property
    def num_running(self) -> int:
        return len(self.samples) - len(self.free)

    def reserve(self, num_tokens: int) -> None:
        """Room for so many tokens in every slot."""
        width = self.tokens.shape[1]
        if num_tokens > width:
            wider = -(-max(num_tokens, 2 * width) // GROWTH) * GROWTH
            for name in RESULTS:
                setattr(self, name, _widen(getattr(self, name), wider))
            self.blocks = _widen(self.blocks, -(-wider // self.block_size))

    def start(self, sample: Sample, tokens: np.ndarray, blocks: np.ndarray) -> int:
        """Give the sample a slot, the last free one. `tokens` are all in the cache, in `blocks` and, where these
        are the full ones alone, its tail; the next token is appended by `append`.
        """
        slot = self.free[-1]  # taken at the end: what fails before leaves everything as it was
        request, p = sample.request, sample.request.sampling
        self.reserve(len(tokens) + 1)
        self.tokens[slot, : len(tokens)] = tokens
        self.blocks[slot, : len(blocks)] = blocks
        if len(blocks) * self.block_size < len(tokens):
            self.blocks[slot, len(blocks)] = -1  # the rest is a tail
        self.length[slot], self.num_blocks[slot] = len(tokens), len(blocks)
        self.prompt_length[slot], self.limit[slot] = len(request.prompt), sample.limit
        self.min_length[slot] = len(request.prompt) + p.min_tokens
        self.seed[slot], self.group[slot] = sample.seed, request.id
        self._num_started += 1
        self.started[slot] = self._num_started
        self.temperature[slot], self.top_k[slot] = p.temperature, p.top_k
        self.top_p[slot], self.min_p[slot] = p.top_p, p.min_p
        self.ignore_eos[slot], self.is_watched[slot] = p.ignore_eos, is_watched(sample)
        self.num_watched += int(self.is_watched[slot])
        if len(p.stop_token_ids) > self.stop_ids.shape[1]:
            self.stop_ids = _widen(self.stop_ids, len(p.stop_token_ids), -1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(p.stop_token_ids)] = p.stop_token_ids
        if sample.saved is not None:  # it goes on after a preemption
            for name in RESULTS[1:]:
                values = sample.saved[name]
                getattr(self, name)[slot, : len(values)] = values
            sample.saved = None
        self.samples[slot], sample.slot = sample, slot
        self.free.pop()
        self._batch = None
        return slot

    def leave(self, sample: Sample) -> np.ndarray:
        """Take the sample's slot back. Returns its blocks (num_blocks,), which it still holds."""
        slot = sample.slot
        blocks = self.blocks[slot, : self.num_blocks[slot]].copy()
        self.samples[slot], sample.slot = None, -1
        self.group[slot] = -1
        self.num_watched -= int(self.is_watched[slot])
        self.free.append(slot)
        self._batch = None
        return blocks

    def save(self, sample: Sample) -> np.ndarray:
        """Keep the sample's results on itself. Returns all its tokens (L,)."""
        sample.saved = {name: x.copy() for name, x in self.results(sample).items()}
        return self.tokens[sample.slot, : self.length[sample.slot]].copy()

    def results(self, sample: Sample) -> dict[str, np.ndarray]:
        """Tokens, logprobs, truncated, entropies of what the sample has drawn, (n,) each."""
        slot = sample.slot
        if slot < 0:
            return sample.saved or dict.fromkeys(RESULTS, np.zeros(0))
        first, n = self.prompt_length[slot], self.length[slot] - self.prompt_length[slot]
        return {name: getattr(self, name)[slot, :n] for name in RESULTS[1:]} | {
            "tokens": self.tokens[slot, first : first + n]
        }

    def append(
        self, slots: np.ndarray, tokens: np.ndarray, values: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token for each of these slots. Returns (n,) bool: ended by a token, ended by its limit."""
        at = self.length[slots]
        self.tokens[slots, at] = tokens
        generated = at - self.prompt_length[slots]
        for name, x in values.items():
            getattr(self, name)[slots, generated] = x
        self.length[slots] = at + 1
        stopped = self.is_eos[tokens] & ~self.ignore_eos[slots]
        if self.stop_ids.shape[1]:
            stopped |= (self.stop_ids[slots] == tokens[:, None]).any(1)
        return stopped, at + 1 >= self.limit[slots]

    def add_blocks(self, slots: np.ndarray, blocks: np.ndarray) -> None:
        """One more block for each of these slots."""
        self.blocks[slots, self.num_blocks[slots]] = blocks
        self.num_blocks[slots] += 1

    def batch(self) -> Batch:
        if self._batch is None:
            self._batch = self._make_batch()
        return self._batch

    def _make_batch(self) -> Batch:
        slots = np.flatnonzero(self.group >= 0)
        slots = slots[np.lexsort((self.started[slots], self.group[slots]))]
        group = self.group[slots]
        starts = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1], [True])))
        samples = [self.samples[s] for s in slots]
        params = [s.request.sampling for s in samples]
        same = all(p is params[0] or p == params[0] for p in params) if params else False
        return Batch(
            slots,
            starts.astype(np.int32),
            self._shared(slots, starts).astype(np.int32),
            params[0] if same else None,
            any(p.changes_logits for p in params),
            any(p.truncates for p in params),
            any(s.request.return_entropy for s in samples),
            max((p.top_logprobs for p in params), default=0),
        )

    def _shared(self, slots: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Blocks that all rows of each group begin with, no further than the full ones of the prompt."""
        sizes, first = np.diff(starts), slots[starts[:-1]]
        full = np.where(sizes > 1, self.prompt_length[first] // self.block_size, 0)
        width = int(full.max(initial=0))
        if not width:
            return full
        table = self.blocks[slots, :width]
        differs = table != np.repeat(table[starts[:-1]], sizes, axis=0)  # (B, width)
        equal = np.where(differs.any(1), differs.argmax(1), width)
        return np.minimum(np.minimum.reduceat(equal, starts[:-1]), full)


def is_watched(sample: Sample) -> bool:
    """Whether each token of the sample is looked at in Python."""
    has_seen = sample.seen is not None
    return sample.text is not None or has_seen or sample.request.sampling.top_logprobs > 0


def _widen(x: np.ndarray, width: int, fill: int = 0) -> np.ndarray:
    wider = np.full((len(x), width), fill, x.dtype)
    wider[:, : x.shape[1]] = x
    return wider
