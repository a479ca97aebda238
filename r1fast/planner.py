"""What a step will take, before it is run: memory by kind, the token budget, FLOPs and seconds.

Memory is of the fullest moment of each phase. In training that is the beginning of the backward, when all layers'
activations are there, or its end, when all gradients are. What stays from phase to phase: weights,
reference, optimizer, the cache of the engine and, on a CPU, its packed copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from r1fast.config import Config
from r1fast.costs import (
    Counts,
    Groups,
    Size,
    apart,
    cache_bytes,
    count,
    forward_flops,
    head_chunk_bytes,
    rollout_flops,
)
from r1fast.machine import GIB
from r1fast.model import DTYPES, ModelSpec
from r1fast.probe import Footprint, Speed
from r1fast.rollout.native import why_not
from r1fast.sharded_memory import Shares
from r1fast.tensor_parallel import local_spec

CPU_TOKENS = (
    4096  # a micro-batch above these is no faster on a CPU, and slower where layers are narrow
)
PROMPT_SHARE = 20  # a prompt that is forwarded again is at most a twentieth of its micro-batch
# what the C library's heap holds beside the activations, freed and in pieces; measured, see docs/log.md
HEAP_SHARE = 0.25
FILLED = 0.9  # of the memory that is there, the most that is planned for
MAX_TOKENS = 1 << 17  # nothing is gained above
# tokens of a micro-batch below which keeping less is cheaper than more micro-batches: each adds its gradients to
# the float32 sums, which at 8,192 tokens is a few hundredths of its time, as `selective` is; `full` is a quarter
ENOUGH = {"none": 8192, "selective": 2048, "full": 1}
NOTHING = Counts(0, 0, 0, 0, 0, 0)
Memory = dict[str, dict[str, int]]  # phase -> kind -> bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One rank's part of a step of a stage."""

    kind: str  # grpo | sft
    spec: ModelSpec
    size: Size
    slice: Size  # of what parallel.tensor_parallel gives the first rank of it
    config: Config
    device: torch.device
    world_size: int
    checkpointing: str  # one of recompute.MODES
    footprint: Footprint  # with it
    groups: Groups  # as many as one rank has in a step, of lengths that are expected
    longest: int  # tokens of the longest sequence that may come, its last one included

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.model.dtype]

    @property
    def trained_item(self) -> int:
        """Bytes of a trained parameter; adapters are float32."""
        return 4 if self.config.lora.rank else self.dtype.itemsize

    @property
    def trains_head(self) -> bool:
        return not self.config.lora.rank

    @property
    def divided(self) -> Shares | None:
        """What a rank holds of the model where it is not all of it."""
        p = self.config.parallel
        if p.mode == "ddp" and p.tensor_parallel == 1:
            return None
        L, item = self.spec.num_layers, self.dtype.itemsize
        return Shares(self.size, self.slice, L, item, self.world_size, p)

    @property
    def own_spec(self) -> ModelSpec:
        """The shape of what a rank forwards in training."""
        p = self.config.parallel
        return local_spec(self.spec, p.tensor_parallel, p.vocab_parallel)

    @property
    def context(self) -> int:
        """Ranks that have pieces of the same micro-batches."""
        return self.config.parallel.context_parallel

    @property
    def longest_piece(self) -> int:
        """What one rank forwards of the longest sequence."""
        return -(-(self.longest - 1) // self.context)

    @property
    def budget(self) -> int | str:
        return getattr(self.config, self.kind).token_budget

    @property
    def shares(self) -> bool:
        return self.kind == "grpo" and self.config.grpo.shared_prompt

    @property
    def has_reference(self) -> bool:
        return self.kind == "grpo" and self.config.grpo.kl_coef > 0

    @property
    def passes(self) -> int:
        """Over a step's sequences in training."""
        return self.config.grpo.num_iterations if self.kind == "grpo" else 1

    def packed(self, groups: Groups) -> Groups:
        return groups if self.shares else apart(groups)

    def work(self, groups: Groups) -> Work:
        """Of a step with these `groups`: in RL what one rank samples, and all of a model-parallel group train together."""
        size = self.context * self.config.parallel.tensor_parallel
        return Work(groups, list(groups) * (size if self.kind == "grpo" else 1))

    def at_longest(self) -> Groups:
        """As many sequences, all of the greatest length."""
        if self.kind == "sft":
            return [(p, [self.longest - p]) for p, _ in self.groups]
        return [(p, [self.longest - p] * len(ns)) for p, ns in self.groups]

    def mini_batches(self, groups: Groups) -> list[Groups]:
        """Of one pass; completions are dealt out one by one, where they are split at random."""
        g = self.config.grpo
        N = g.num_mini_batches if self.kind == "grpo" else 1
        if g.whole_groups:
            return [groups[m::N] for m in range(N)]
        parts: list[list] = [[] for _ in range(N)]
        first = 0
        for prompt, lengths in groups:
            for m in range(N):
                if own := lengths[(m - first) % N :: N]:
                    parts[m].append((prompt, own))
            first += len(lengths)
        return parts

    def num_updates(self) -> int:
        return self.passes * (self.config.grpo.num_mini_batches if self.kind == "grpo" else 1)


@dataclass(frozen=True, slots=True)
class Work:
    """A rank's step: what it samples, and what it trains together with its model-parallel group."""

    sampled: Groups
    trained: Groups

    @classmethod
    def of(cls, groups: Groups) -> Work:
        return cls(groups, groups)


def resident(job: Job, groups: Groups, available: int) -> dict[str, int]:
    """What stays through a step over `groups`, of `available` bytes."""
    size, item, divided = job.size, job.dtype.itemsize, job.divided
    frozen = size.total - size.trained
    masters = 4 * size.trained * (job.trained_item < 4)
    kinds = {"weights": frozen * item + size.trained * job.trained_item,
             "optimizer": masters + 8 * size.trained}  # fmt: skip
    if divided is not None:
        kinds = divided.kept()
    g, r = job.config.grpo, job.config.rollout
    on_gpu = job.device.type == "cuda"
    if job.has_reference:
        is_copy = not job.config.lora.rank  # else it is the base that is trained on
        is_away = on_gpu and is_copy and (g.ref_device == "cpu" or job.config.parallel.cpu_offload)
        kinds["reference"] = 0 if is_away else _reference_bytes(job)
        if divided is not None and is_copy and not is_away:
            kinds["reference"] = divided.share(_reference_dtype(job).itemsize)
    if job.kind != "grpo":
        return kinds
    has_tails = not on_gpu and r.block_size == 16 and not r.num_draft_tokens
    options = {"max_batch_size": r.max_batch_size, "block_size": r.block_size, "dtype": job.dtype,
               "has_tails": has_tails}  # fmt: skip
    if on_gpu:  # all that slots may need, made before the first gradients are
        whole = 0 if divided is None else divided.whole()
        moments = 8 * size.trained if divided is None else kinds["optimizer"]  # not there yet
        room = (available - sum(kinds.values()) - whole + moments) // 2
        context = job.spec.max_position_embeddings
        needed = cache_bytes(job.spec, [(1, [context - 1])] * r.max_batch_size, **options)
    else:  # memory is taken when it is written to
        room, needed = available // 2, cache_bytes(job.spec, groups, **options)
        if divided is None and (packed := _packed_bytes(job)):
            kinds["packed for decoding"] = packed
    kinds["cache"] = min(needed, int(r.cache_gib * GIB) or room)
    return kinds


def _packed_bytes(job: Job) -> int:
    """Of the copies that a CPU's sampler makes: all weights packed, or without the native forward a head in float32."""
    if job.device.type != "cpu":
        return 0
    if why_not(job.spec, job.dtype, job.device) is None:
        return (job.size.linears + job.size.table) * job.dtype.itemsize
    wide = torch.promote_types(job.dtype, torch.float32)
    return 0 if wide == job.dtype else job.size.table * wide.itemsize


def _reference_bytes(job: Job) -> int:
    if job.config.lora.rank:  # the base itself, under a copy of adapters that have been trained
        is_copied = job.config.grpo.ref_refresh_steps or job.config.model.adapter
        return job.size.trained * job.trained_item if is_copied else 0
    return job.size.total * _reference_dtype(job).itemsize


def _reference_dtype(job: Job) -> torch.dtype:
    return DTYPES.get(job.config.grpo.ref_dtype, job.dtype)


def memory_of(job: Job, work: Work, budget: int, available: int) -> Memory:
    """Of every phase of this work."""
    counts = training_counts(job, work.trained, budget)
    largest = max(counts, key=lambda c: c.largest, default=NOTHING)
    several = any(c.micro_batches > 1 for c in counts)
    sizes = largest.largest, largest.largest_targets
    return memory(job, work.sampled, *sizes, several=several, available=available)


def memory(
    job: Job, groups: Groups, tokens: int, targets: int, *, several: bool, available: int
) -> Memory:
    """Where the largest micro-batch has so many tokens, and `several` follow one another."""
    f, size, item, divided = job.footprint, job.slice, job.dtype.itemsize, job.divided
    kept = resident(job, groups, available)
    phases: Memory = {}
    if job.kind == "grpo":
        slots = min(job.config.rollout.max_batch_size, sum(len(ns) for _, ns in groups))
        logits = 4 * slots * job.spec.vocab_size
        phases["rollout"] = kept | {"logits": logits}
        if divided is not None:
            phases["rollout"]["gathered"] = divided.whole()
            if packed := _packed_bytes(job):
                phases["rollout"]["packed for decoding"] = packed
        elif job.device.type == "cpu":
            kept = kept | {"logits": logits}  # until the engine takes the new weights
    if job.has_reference:
        phases["reference"] = kept | {"activations": int(f.forward * tokens)}
        if divided is not None:
            own = _reference_bytes(job)
            phases["reference"]["gathered"] = divided.whole() if divided.of_base else own
        elif not kept["reference"]:
            phases["reference"]["reference"] = _reference_bytes(job)
    saved = f.layer * job.spec.num_layers * tokens
    chunk = head_chunk_bytes(job.own_spec, job.dtype, job.device.type, targets)
    table = size.table * 4 * job.trains_head  # dweight is a float32 sum
    summed = 4 * size.trained if divided is None else divided.gradients()
    before = summed * several  # of the micro-batches before
    # the embedding's gradient, beside the head's
    tied = size.table * item * (job.trains_head and job.spec.tie_word_embeddings)
    tied *= divided is None or not divided.has_rows
    dhidden = 4 * targets * job.spec.hidden_size
    moments = (
        {"activations": int(saved + f.loss * tokens), "head": chunk + table + dhidden},
        {"activations": int(saved + f.backward * tokens), "head": table},
        {"activations": 0, "head": 0, "gradients": _fresh(job, several) + tied},
    )
    for kinds in moments:
        kinds["gradients"] = kinds.get("gradients", 0) + before
    fullest = max(moments, key=lambda kinds: sum(kinds.values()))
    if job.device.type == "cpu":
        fullest["heap"] = int(HEAP_SHARE * (saved + f.backward * tokens))
    phases["training"] = kept | fullest
    flat = summed * (job.world_size > 1)  # summed over ranks in one piece
    if divided is not None:
        phases["training"]["gathered"] = divided.gathered()
        flat = divided.flat()
    phases["update"] = kept | {"gradients": summed + flat}
    return phases


def _fresh(job: Job, several: bool) -> int:
    """Gradients as a backward makes them, beside those that are added up already."""
    if job.divided is not None:
        return job.divided.fresh(several)
    if several and job.trained_item == 4:
        return job.size.table * 4 * job.trains_head  # one at a time is added
    return job.size.trained * job.trained_item


def peak(phases: Memory) -> tuple[str, int]:
    """The fullest phase and its bytes."""
    sums = {phase: sum(kinds.values()) for phase, kinds in phases.items()}
    phase = max(sums, key=sums.__getitem__)
    return phase, sums[phase]


def choose_budget(job: Job, available: int) -> tuple[int, str]:
    """What "auto" is, and why: a round number that depends on nothing but shapes, lengths and memory.

    Enough for the longest sequence, whether or not that is thought to fit.
    """
    most, reason = _most_tokens(job)
    longest = job.longest_piece
    sizes = [n for n in _round_sizes() if longest < n < most]
    for tokens in (max(most, longest), *reversed(sizes), longest):
        if fits(job, tokens, available):
            return tokens, reason
        reason = "memory"
    return longest, "the longest sequence, which may not fit into memory"


def has_room(job: Job, budget: int | str, available: int) -> bool:
    """Whether micro-batches of `budget`, or with "auto" of as many tokens as pay, fit with the job's checkpointing."""
    if budget == "auto":
        budget = min(_most_tokens(job)[0], ENOUGH[job.checkpointing])
    return fits(job, max(int(budget), job.longest_piece), available)


def fits(job: Job, tokens: int, available: int) -> bool:
    """Micro-batches of so many tokens, of the longest sequences."""
    whole = _tokens_of_step(job)
    size, several = min(tokens, max(whole, job.longest_piece)), tokens < whole
    phases = memory(job, job.at_longest(), size, size, several=several, available=available)
    return peak(phases)[1] <= FILLED * available


def _tokens_of_step(job: Job) -> int:
    """Forwarded by a rank in the largest mini-batch, at the longest."""
    largest = max(
        sum(p + sum(n - 1 for n in ns) for p, ns in job.packed(part))
        for part in job.mini_batches(job.work(job.at_longest()).trained)
    )
    return -(-largest // job.context)


def _most_tokens(job: Job) -> tuple[int, str]:
    """Of a micro-batch, whatever memory there is; and why."""
    limits = {
        "a micro-batch holds a whole mini-batch": _tokens_of_step(job),
        "no more is faster": MAX_TOKENS,
    }
    if job.device.type == "cpu":
        prompt = max((p for p, _ in job.groups), default=0)
        group = max(
            (p + sum(n - 1 for n in ns) for p, ns in job.packed(job.at_longest())), default=0
        )
        limits["the CPU is not faster with more"] = max(
            CPU_TOKENS, min(PROMPT_SHARE * prompt, group)
        )
    reason = min(limits, key=limits.__getitem__)
    return limits[reason], reason


def _round_sizes() -> Iterable[int]:
    """1, 1.5, 2, 3, 4, 6, 8 ... in ascending order."""
    for k in range(1, MAX_TOKENS.bit_length()):
        yield from (1 << k, 3 << k - 1)


def training_counts(job: Job, groups: Groups, budget: int) -> list[Counts]:
    """Of every mini-batch of a pass over what is trained, on one rank."""
    return [_counted(job, part, budget) for part in job.mini_batches(groups) if part]


def _counted(job: Job, groups: Groups, budget: int) -> Counts:
    return count(job.packed(groups), budget * job.context).over(job.context)


def _scored(job: Job, groups: Groups, budget: int) -> Counts:
    """By the reference, which is whole on each rank of a tensor group, for some of their sequences."""
    return _counted(job, groups, budget).over(job.config.parallel.tensor_parallel)


def _sliced(job: Job, counts: Counts) -> Counts:
    """Of the whole model what takes as much as a rank's slice of it takes for all."""
    p = job.config.parallel
    own = counts.over(p.tensor_parallel)
    return own if p.vocab_parallel else replace(own, targets=counts.targets)


def flops(job: Job, work: Work, budget: int) -> dict[str, float]:
    """By part of a step; `training ...` is forward and backward, what must be computed and no more."""
    found = {}
    spec, size = job.spec, job.size
    if job.kind == "grpo":
        found |= rollout_flops(spec, size, work.sampled)
    if job.has_reference:
        one = forward_flops(spec, size, _scored(job, work.trained, budget))
        found["reference"] = sum(one.values())
    times = (2.0 + size.trained / size.total) * job.passes  # frozen weights have no gradient
    for part in training_counts(job, work.trained, budget):
        for name, value in forward_flops(spec, size, _sliced(job, part)).items():
            key = f"training, {name}"
            whole = 3.0 * job.passes if name == "attention" else times
            found[key] = found.get(key, 0.0) + whole * value
    return found


def training_flops(found: dict[str, float]) -> float:
    return sum(value for name, value in found.items() if name.startswith("training"))


def seconds(job: Job, speed: Speed, work: Work, budget: int) -> dict[str, float]:
    """By phase, named as in the metrics."""
    found = {}
    if job.kind == "grpo":
        found["rollout"] = speed.rollout(work.sampled, job.config.rollout.max_batch_size)
    if job.has_reference:
        found["reference"] = speed.forward(_scored(job, work.trained, budget))
    parts = [_sliced(job, part) for part in training_counts(job, work.trained, budget)]
    found["train"] = job.passes * sum(map(speed.train, parts)) + speed.update * job.num_updates()
    return found
