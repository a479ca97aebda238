"""Makes plans: of a stage that is about to train, or of a config alone; measures once a process and shape."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from r1fast.config import Config, LoraConfig, OptimConfig
from r1fast.context_parallel import check_heads
from r1fast.costs import Groups, Size
from r1fast.machine import GPU, GPUS, available_memory, device_name, measure_bandwidth
from r1fast.metrics import warn
from r1fast.model import DTYPES, Decoder, ModelSpec
from r1fast.plan import Plan, PlanWatch, number
from r1fast.planner import Job, choose_budget, has_room, memory_of
from r1fast.probe import Footprint, Speed, measure_footprint, measure_gemm, measure_speed
from r1fast.recompute import MODES
from r1fast.rollout.sampler import SamplingParams
from r1fast.roofline import SHARE, roofline
from r1fast.sharding import check_offload
from r1fast.shards import local
from r1fast.tensor_parallel import check_divides, local_spec
from r1fast.training import Trainer

MAX_LAYER = 32 << 20  # parameters of a layer that is timed itself
CPU_BYTES = "activations are counted of the CPU's operations"
ROUND = 16  # tokens: lengths this close are one measurement


def grpo_groups(config: Config, prompts: Sequence[int], completion: int, num_ranks: int) -> Groups:
    """A rank's share of a step: prompts of the mean length, all completions of one."""
    prompt = max(1, round(sum(prompts) / len(prompts)))
    num = -(-config.grpo.prompts_per_step // num_ranks)
    return [(prompt, [completion] * config.rollout.num_generations)] * num


def sft_groups(config: Config, lengths: Sequence[tuple[int, int]], num_ranks: int) -> Groups:
    """(prompt, completion) of examples -> a rank's share of a step, from short to long ones."""
    num = -(-config.sft.batch_size // num_ranks)
    ordered = sorted(lengths, key=sum)
    picks = [ordered[(2 * i + 1) * len(ordered) // (2 * num)] for i in range(num)]
    return [(p, [n]) for p, n in picks]


def make_job(
    kind: str,
    spec: ModelSpec,
    size: Size,
    config: Config,
    device: torch.device,
    groups: Groups,
    longest: int,
    num_ranks: int,
) -> Job:
    asked = config.model.activation_checkpointing
    mode = "none" if asked == "auto" else asked
    shares = kind == "grpo" and config.grpo.shared_prompt
    own_size, p = size, config.parallel
    if (num_ranks // p.tensor_parallel) % p.replicas:
        raise ValueError(
            f"parallel.replicas = {p.replicas} does not divide the {num_ranks // p.tensor_parallel} ranks that "
            "have a share of the same weights"
        )
    check_offload(p, device)
    if p.tensor_parallel > 1:
        check_divides(spec, p.tensor_parallel, p.vocab_parallel)
        own_size = Size.of(Decoder(_own_spec(spec, config), device="meta"))
    if p.context_parallel > 1:
        check_heads(_own_spec(spec, config), p.context_parallel)
    footprint = _footprint_of(spec, config, shares, mode)
    return Job(
        kind, spec, size, own_size, config, device, num_ranks, mode, footprint, groups, longest
    )  # fmt: skip


def _own_spec(spec: ModelSpec, config: Config) -> ModelSpec:
    """Of what a rank forwards in training."""
    return local_spec(spec, config.parallel.tensor_parallel, config.parallel.vocab_parallel)


def _footprint_of(spec: ModelSpec, config: Config, shares: bool, mode: str) -> Footprint:
    rest = DTYPES[config.model.dtype], shares, _key(config.lora), mode
    own, whole = (_footprint(_plain(x), *rest) for x in (_own_spec(spec, config), spec))
    return replace(own, forward=whole.forward)  # the reference is whole


def with_checkpointing(job: Job, mode: str) -> Job:
    if mode == job.checkpointing:
        return job
    footprint = _footprint_of(job.spec, job.config, job.shares, mode)
    return replace(job, checkpointing=mode, footprint=footprint)


def _layer_bytes(job: Job) -> float:
    return with_checkpointing(job, "none").footprint.layer


def choose_checkpointing(job: Job, available: int, budget: int | str) -> Job:
    """The job with what the config asks for; with "auto" the first mode that memory allows."""
    asked = job.config.model.activation_checkpointing
    if asked != "auto":
        return with_checkpointing(job, asked)
    for mode in MODES:
        job = with_checkpointing(job, mode)
        if has_room(job, budget, available):
            break
    return job


def make_plan(
    job: Job,
    stage: str,
    lengths: str,
    *,
    known_bytes: int = 0,  # of the run's tensors that are there already
    token_budget: int | None = None,  # what the run has, or found
    checkpointing: str = "",  # likewise
    gpu: GPU | None = None,  # to assume
) -> Plan:
    available = gpu.memory if gpu else available_memory(job.device) + known_bytes
    if checkpointing:
        job = with_checkpointing(job, checkpointing)
    else:
        job = choose_checkpointing(job, available, token_budget or job.budget)
    budget, reason = job.budget, "as configured"
    if budget == "auto":
        budget, reason = choose_budget(job, available)
        reason = f"auto: {reason}"
    if token_budget not in (None, budget):
        budget, reason = token_budget, "as it was before"
    notes: list[str] = []
    if gpu is None:
        name = device_name(job.device)
        peak_flops, speed = _speed_here(job, max(budget, job.longest_piece))
        notes = busy()
        if job.device.type == "cuda":
            notes += [
                f"seconds: {SHARE:.0%} of what a large product and a copy reach here is assumed",
                CPU_BYTES,
            ]
    else:
        name, notes = gpu.name, assumptions(gpu)
        peak_flops = gpu.fp32_flops if job.dtype == torch.float32 else gpu.bf16_flops
        speed = roofline(job, _layer_bytes(job), peak_flops, gpu.bandwidth)
    if job.divided is not None:
        notes = [*notes, job.divided.says()]
    if job.context > 1:
        notes = [
            *notes,
            f"parallel.context_parallel = {job.context}: as many ranks have the tokens of a micro-batch between "
            "them; what exchanging attention's heads takes is not in the seconds",
        ]
    longest = job.work(job.at_longest())
    phases = memory_of(job, longest, max(budget, job.longest_piece), available)
    return Plan(
        job, stage, name, available, budget, reason, phases, job.work(job.groups), lengths,
        speed, peak_flops, notes,
    )  # fmt: skip


def busy() -> list[str]:
    """A note where others take this machine's processors, so that what is timed comes out too slow."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < 1.5 * cores:
        return []
    return [f"the machine is busy (load {load:.1f} on {cores} cores): seconds are too high"]


def assumptions(gpu: GPU) -> list[str]:
    return [
        f"not measured: {gpu.name} by its data sheet, {number(gpu.bf16_flops)}FLOP/s in bfloat16, "
        f"{number(gpu.fp32_flops)}FLOP/s in float32, {number(gpu.bandwidth)}B/s; {SHARE:.0%} of them is assumed",
        CPU_BYTES,
    ]


def assumed_gpu(name: str) -> GPU:
    if name not in GPUS:
        raise ValueError(f"--gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]


def _speed_here(job: Job, budget: int) -> tuple[float, Speed]:
    """(FLOP/s of a large product, what the parts of a step take)."""
    largest_layer = job.size.linears // job.spec.num_layers
    if job.device.type == "cuda" or largest_layer > MAX_LAYER:
        gemm, bandwidth = _rates(job.dtype, job.device)
        return gemm, roofline(job, _layer_bytes(job), gemm, bandwidth)
    r, lengths = job.config.rollout, [n for _, ns in job.groups for n in ns]
    speed = _speed(
        _plain(job.spec),
        job.dtype,
        job.device,
        _rounded(sum(p for p, _ in job.groups) / len(job.groups)),
        _rounded(sum(lengths) / len(lengths)),
        len(job.groups),
        len(lengths) // len(job.groups),
        job.shares,
        _rounded(budget),
        (r.max_batch_size, r.temperature, r.top_p, r.top_k, r.min_p)
        if job.kind == "grpo"
        else None,
        job.config.optim.max_grad_norm > 0,
        _key(job.config.lora),
        job.checkpointing,
        torch.get_num_threads(),
    )
    return speed.gemm, speed


def _plain(spec: ModelSpec) -> ModelSpec:
    return replace(spec, rope_scaling=None)  # which changes no cost, and has no hash


def _key(lora: LoraConfig) -> tuple:
    """With a hash; nothing of adapters that are off."""
    return (lora.rank, lora.alpha, lora.rslora, *lora.targets) if lora.rank else (0,)


def _lora(key: tuple) -> LoraConfig:
    return LoraConfig(key[0], key[1], key[2], list(key[3:])) if key[0] else LoraConfig()


def _rounded(length: float) -> int:
    return max(1, round(length) if length < ROUND else round(length / ROUND) * ROUND)


@functools.cache
def _footprint(
    spec: ModelSpec, dtype: torch.dtype, shares: bool, lora: tuple, mode: str
) -> Footprint:
    return measure_footprint(
        spec, dtype, share_prompts=shares, lora=_lora(lora), checkpointing=mode
    )


@functools.cache
def _rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    return measure_gemm(dtype, device), measure_bandwidth(device)


@functools.cache
def _speed(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    prompt: int,
    completion: int,
    num_groups: int,
    num_completions: int,
    shares: bool,
    budget: int,
    rollout: tuple[int, float, float, int, float] | None,
    clips: bool,
    lora: tuple,
    checkpointing: str,
    num_threads: int,
) -> Speed:
    max_batch_size, *sampled = rollout or (1,)
    sampling = SamplingParams(*sampled[:3], min_p=sampled[3]) if rollout else None
    return measure_speed(
        spec,
        dtype,
        device,
        [(prompt, [completion] * num_completions)] * num_groups,
        share_prompts=shares,
        token_budget=budget,
        max_batch_size=max_batch_size,
        sampling=sampling,
        optim=OptimConfig(max_grad_norm=float(clips)),
        lora=_lora(lora),
        checkpointing=checkpointing,
    )


def watch(trainer: Trainer, job: Job, lengths: str) -> PlanWatch | None:
    """The plan of a stage that begins now, said and written down; None where it cannot be made."""
    known = held_bytes(trainer)
    try:
        plan = make_plan(
            job,
            trainer.stage,
            lengths,
            known_bytes=known,
            token_budget=trainer.token_budget.num_tokens,
            checkpointing=trainer.model.checkpointing,
        )
        trainer.folder.mkdir(parents=True, exist_ok=True)
        return PlanWatch(plan, trainer.folder, known)
    except (
        RuntimeError,
        OSError,
        ValueError,
    ) as error:  # a probe that fails is no reason not to train
        warn(f"{trainer.stage}: no plan, as a measurement failed: {error}")
        return None


def settle(trainer: Trainer, job: Job, budget: int | str) -> tuple[int, str]:
    """(tokens of a micro-batch, what layers keep), where either is left to the memory that is there."""
    available = available_memory(job.device) + held_bytes(trainer)
    job = choose_checkpointing(job, available, budget)
    tokens = choose_budget(job, available)[0] if budget == "auto" else int(budget)
    return tokens, job.checkpointing


def held_bytes(trainer: Trainer) -> int:
    """Of the tensors that training holds on its device between steps."""
    named = [
        trainer.trained(),
        trainer.optimizer.state_tensors(),
        *trainer.extra_tensors().values(),
    ]
    is_sharded = trainer.parallel.is_sharded
    # what is frozen too
    named += [trainer.parallel.shards if is_sharded else dict(trainer.model.named_parameters())]
    tensors = [local(x) for part in named for x in part.values()]
    device = trainer.policy.device.type
    unique = {x.data_ptr(): x.nbytes for x in tensors if x.device.type == device}
    return sum(unique.values())
