"""Continuous batching over the trainer's own weights: prefill a prompt once, decode its G samples.

schedule -> prefill -> decode -> postprocess. There is no second copy of the model and no weight
sync: `generate` reads the parameters as they are when it is called. A finished slot is refilled at
once, and the batch is compacted when nothing is left to refill it with.
Shapes: B decode slots, T prompt tokens, H query heads, K kv heads, L cached positions, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.attention import PackedAttention
from r1fast.model import Decoder
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.result import EngineStats
from r1fast.rollout.sampler import SamplingParams, sample, sample_seed, uniforms
from r1fast.rollout.scheduler import Request, Scheduler
from r1fast.types import Completion, Problem, RolloutGroup, TokenEvent

PREFILL_TOKENS = 8192  # in one prefill forward
COMPACT_BELOW = 0.8  # share of the slots still running


@dataclass(frozen=True, slots=True)
class Speculation:
    """Prompt lookup: what followed the last n-gram where it stood before is drafted and verified."""

    num_draft: int = 4  # tokens drafted at once
    ngram: int = 3  # tokens that must agree, at most
    min_ngram: int = 2


class Engine:
    """Samples from `model`. `eos_ids` end a completion (the end token is part of it)."""

    def __init__(
        self,
        model: Decoder,
        eos_ids: Iterable[int],
        *,
        decode: Callable[[list[int]], str] = lambda ids: "",  # tokenizer.decode for the texts
        max_batch_size: int = 256,
        cache_bytes: int | None = None,  # for keys and values; None: found
        block_size: int = 16,
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,  # forwarded in one step, so that decoding goes on
        batch_invariant: bool = False,
        speculation: "Speculation | None" = None,
    ):
        self._queue, self._ids, self.stats = [], 0, EngineStats()
        self.model, self.decode, self.max_batch_size = model, decode, max_batch_size
        self.device = model.head_weight.device
        self.eos = torch.tensor(sorted(set(eos_ids)), device=self.device)
        self.num_decode_steps = 0
        if not len(self.eos):
            raise ValueError("the engine needs at least one end-of-sequence id, got none")
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")

    @torch.inference_mode()
    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],  # (N, G) one for each completion of each prompt
        sampling: SamplingParams,
        *,
        return_entropy: bool = False,
        on_finish: Callable[[int], None] = lambda num_finished: None,
    ) -> list[list[Completion]]:
        """G completions of each of N prompts, in order.

        A completion depends on its prompt and seed, not on its batch mates (up to the rounding of
        the GEMMs, whose order of summation may depend on the batch size). Raises ValueError for an
        empty prompt, a token id outside the vocabulary or a prompt that fills the context.
        """
        if len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts need as many lists of seeds, got {len(seeds)}"
            )
        self._check(prompts)
        scheduler = Scheduler(seeds, self.max_batch_size)
        dtype = self.model.head_weight.dtype
        num_slots = min(self.max_batch_size, sum(len(s) for s in seeds))
        cache = KVCache(self.model.spec, num_slots, dtype, self.device)
        results: list[list[Completion | None]] = [[None] * len(s) for s in seeds]
        state = _DecodeState(self.device)
        num_finished = 0
        while not scheduler.done:
            if admitted := scheduler.admit():
                for part in _by_tokens(admitted, prompts):
                    logits = self._prefill(part, prompts, cache)
                    state.extend(part)
                    scheduler.running += [r for group in part for r in group]
                    self._emit(
                        logits, state, scheduler, cache, sampling, return_entropy, len(logits)
                    )
            else:
                logits = self._decode_step(state, cache)
                self._emit(logits, state, scheduler, cache, sampling, return_entropy, len(logits))
            finished = [r for r in scheduler.running if r.finish_reason]
            alive = len(scheduler.running) - len(finished)
            if finished and (scheduler.waiting or alive <= COMPACT_BELOW * len(scheduler.running)):
                rows = [i for i, r in enumerate(scheduler.running) if not r.finish_reason]
                cache.keep(rows)
                state.keep(rows)
                scheduler.running = [scheduler.running[i] for i in rows]
                for r in finished:
                    results[r.prompt][r.sample] = r.completion(self.decode(r.token_ids))
                num_finished += len(finished)
                on_finish(num_finished)
        return results

    def add(
        self, prompt_ids, seeds, sampling, *, name="", stream=True, return_entropy=False
    ) -> int:
        """Ask for len(seeds) samples of one prompt; they begin in the next steps. Returns an id.

        With `stream` every step has an event for each sample, else there is one when it ends.
        Raises ValueError, which calls the request `name`, for bad input.
        """
        self._check([prompt_ids])
        self._ids += 1
        self._queue.append((self._ids, prompt_ids, list(seeds), sampling, stream, return_entropy))
        return self._ids

    def step(self) -> list[TokenEvent]:
        """Schedule, run, postprocess: about one token of every running sample."""
        events = []
        if self._queue:
            id, prompt, seeds, sampling, stream, entropy = self._queue.pop(0)
            for i, c in enumerate(
                self._generate([prompt], [seeds], sampling, return_entropy=entropy)[0]
            ):
                last = len(c.token_ids) - 1
                events += [
                    TokenEvent(id, i, [t], [lp], self.decode([t]) if n < last else "",
                               finish_reason=c.finish_reason if n == last else None)
                    for n, (t, lp) in enumerate(zip(c.token_ids, c.logprobs, strict=True))
                ]  # fmt: skip
        return events

    def abort(self, request_id: int) -> None:
        """Its unfinished samples end with finish_reason "abort" in the next step; unknown ids too."""
        self._queue = [q for q in self._queue if q[0] != request_id]

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix: weights that were changed behind the engine's back."""

    def stream(self, prompts, num_generations, sampling, *, seed=0):
        """The events of `num_generations` samples of each prompt; request_id is the prompt's index."""
        ids = {
            self.add(p, [sample_seed(seed, i, g) for g in range(num_generations)], sampling): i
            for i, p in enumerate(prompts)
        }
        while self.has_work:
            for event in self.step():
                yield replace(event, request_id=ids[event.request_id])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int | None,
        sampling: SamplingParams,
        *,
        seed: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,  # (N, G), instead of those made from seed
        problems: Sequence[Problem] | None = None,  # whose prompts these are
        return_entropy: bool = False,
        on_finish: Callable[[int], None] = lambda num_finished: None,
        on_token: Callable[[TokenEvent], None] | None = None,
    ) -> list[RolloutGroup]:
        seeds = seeds or [
            [sample_seed(seed, i, g) for g in range(num_generations)] for i in range(len(prompts))
        ]
        out = self._generate(
            prompts, seeds, sampling, return_entropy=return_entropy, on_finish=on_finish
        )
        problems = problems or [Problem("", id=f"prompt {i}") for i in range(len(prompts))]
        return [RolloutGroup(*x) for x in zip(problems, prompts, out, strict=True)]

    def _check(self, prompts) -> None:
        V, context = self.model.spec.vocab_size, self.model.spec.max_position_embeddings
        for i, p in enumerate(prompts):
            if not len(p):
                raise ValueError(f"prompt {i} is empty")
            if min(p) < 0 or max(p) >= V:
                raise ValueError(f"prompt {i} has a token id outside [0, {V}): {min(p)}..{max(p)}")
            if len(p) >= context:
                raise ValueError(
                    f"prompt {i} has {len(p)} tokens and fills the model's context of {context}; "
                    "drop or shorten it"
                )

    def _logits(self, hidden: Tensor) -> Tensor:  # (B, D) -> (B, V)
        logits = F.linear(hidden, self.model.head_weight)
        if not bool(logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite: its weights have diverged")
        return logits

    def _prefill(self, groups: list[list[Request]], prompts, cache: KVCache) -> Tensor:
        """Forward each prompt once, fill the slots of its requests. Returns (slots, V) logits."""
        ids = [prompts[g[0].prompt] for g in groups]
        lengths = [len(p) for p in ids]
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        flat = torch.tensor([t for p in ids for t in p], device=self.device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(self.device)
        packed = PackedAttention(cu.to(self.device), max(lengths))
        first = cache.size
        starts = cu.tolist()
        cache.reserve(max(lengths) + 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            slot = first
            for g, a, b in zip(groups, starts, starts[1:], strict=False):
                cache.append_prompt(layer, k[a:b], v[a:b], slot, len(g))
                slot += len(g)
            return packed(layer, q, k, v)

        hidden = self.model(flat, positions, attend)
        cache.lengths += [n for n, g in zip(lengths, groups, strict=True) for _ in g]
        last = torch.tensor([e - 1 for e, g in zip(starts[1:], groups, strict=True) for _ in g])
        return self._logits(hidden[last.to(self.device)])

    def _decode_step(self, state: "_DecodeState", cache: KVCache) -> Tensor:
        """One token for every slot. Returns (B, V) logits."""
        self.num_decode_steps += 1
        B, L = cache.size, max(cache.lengths) + 1
        cache.reserve(L)
        positions = torch.tensor(cache.lengths, device=self.device)
        rows = torch.arange(B, device=self.device)
        beyond = torch.arange(L, device=self.device) > positions[:, None]
        mask = torch.zeros(B, 1, 1, L, dtype=cache.keys[0].dtype, device=self.device)
        mask.masked_fill_(beyond[:, None, None], float("-inf"))
        grouped = self.model.spec.num_heads != self.model.spec.num_kv_heads

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
            out = F.scaled_dot_product_attention(
                q[:, :, None], keys[:B, :, :L], values[:B, :, :L], mask, enable_gqa=grouped
            )
            return out[:, :, 0]

        hidden = self.model(state.tokens, positions, attend)
        cache.lengths = [n + 1 for n in cache.lengths]
        return self._logits(hidden)

    def _emit(self, logits, state, scheduler, cache, sampling, return_entropy, count) -> None:
        """Sample for the last `count` slots and note what has finished."""
        first = len(scheduler.running) - count
        seeds, drawn = state.seeds[first:], state.drawn[first:]
        u = uniforms(seeds, drawn)
        tokens, logprobs, entropies = sample(logits, u, sampling, return_entropy)
        state.tokens[first:] = tokens
        state.drawn[first:] += 1
        is_eos = torch.isin(tokens, self.eos).tolist()
        context = self.model.spec.max_position_embeddings
        entropy_list = entropies.tolist() if return_entropy else [None] * count
        for i, (t, lp, entropy, stop) in enumerate(
            zip(tokens.tolist(), logprobs.tolist(), entropy_list, is_eos, strict=True), first
        ):
            r = scheduler.running[i]
            if r.finish_reason:  # decoded on only because the batch was not compacted yet
                continue
            r.token_ids.append(t)
            r.logprobs.append(lp)
            if entropy is not None:
                r.entropies.append(entropy)
            if stop:
                r.finish_reason = "stop"
            elif len(r.token_ids) >= sampling.max_tokens or cache.lengths[i] + 1 >= context:
                r.finish_reason = "length"


class _DecodeState:
    """The tensors that go with the slots: last token, seed, tokens drawn."""

    def __init__(self, device: torch.device):
        self.tokens = torch.empty(0, dtype=torch.int64, device=device)
        self.seeds, self.drawn = self.tokens, self.tokens

    def extend(self, groups: list[list[Request]]) -> None:
        new = torch.tensor([r.seed for g in groups for r in g], device=self.tokens.device)
        zeros = torch.zeros_like(new)
        self.tokens = torch.cat((self.tokens, zeros))
        self.seeds = torch.cat((self.seeds, new))
        self.drawn = torch.cat((self.drawn, zeros))

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        self.tokens, self.seeds, self.drawn = (
            x[index] for x in (self.tokens, self.seeds, self.drawn)
        )


def _by_tokens(groups: list[list[Request]], prompts) -> Iterable[list[list[Request]]]:
    """Split so that one prefill forward has at most PREFILL_TOKENS (or one prompt)."""
    part, tokens = [], 0
    for g in groups:
        n = len(prompts[g[0].prompt])
        if part and tokens + n > PREFILL_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(g)
        tokens += n
    if part:
        yield part
