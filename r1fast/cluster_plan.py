"""What a step of RL takes on a cluster, on paper: which layout fits, what the network carries, where the time goes.

Counted from config.json and data sheets; nothing is measured, and layouts are planned that r1fast does not run (a
sharded model, experts in parallel, sequences cut over ranks). All GPUs do every phase in turns, as in the
DeepSeek-R1 paper's supplement: rollout, reference, training; the optimizer's state may wait in the host's memory.

    layout     what is not experts: sharded over all ranks, gathered a layer at a time (FSDP), or whole on every
               rank; experts: divided over `ep` ranks, tokens travel; a sequence: over `cp` ranks
    training   FLOPs of forward, the forward again (every layer is recomputed) and backward
    rollout    instances of `instance` GPUs, each with the whole model; the longest completion decides
Shapes: D width, L layers, V vocabulary, N ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from r1fast.machine import GPU
from r1fast.paper_shape import PaperShape

PRODUCTS = 0.7  # of the dense bfloat16 peak that large products reach
EXPERTS = 0.5  # that grouped products of experts reach
ATTENTION = 0.35  # that attention reaches
BANDWIDTH = 0.7  # of the memory's, in decoding
NETWORK = 0.8  # of a link's
FILLED = 0.9  # of a GPU's memory, the most that is planned for
STEP_SECONDS = 1e-3  # of the host in a decode step
ALL_REDUCE_SECONDS = 15e-6  # of one small all-reduce within an instance; two a layer
LAYER_WIDTHS = 20  # bfloat16 values of width D a token that one layer holds in its backward
HEAD_ROWS = 2048  # rows of exponentials in the fused loss
GATHERED = 2  # layers that are whole at a time
WEIGHT, GRADIENT, STATE = (
    2,
    4,
    12,
)  # bytes a parameter: bfloat16; float32; float32 master and two moments


@dataclass(frozen=True, slots=True)
class Cluster:
    num_gpus: int
    gpu: GPU
    per_node: int = 8
    nvlink: float = 450e9  # bytes/s of one GPU to the others of its node, one way
    network: float = 50e9  # of one GPU to other nodes: 400 Gbit/s
    host: float = 50e9  # of one GPU to its host's memory

    def link(self, ranks: int) -> float:
        """Bytes/s of one GPU in a group of so many ranks."""
        return NETWORK * (self.nvlink if ranks <= self.per_node else self.network)


@dataclass(frozen=True, slots=True)
class Load:
    """One step."""

    prompts: int
    group: int  # completions a prompt
    prompt_tokens: int
    mean_tokens: int  # of a completion
    max_tokens: int
    updates: int = 1  # optimizer steps
    has_reference: bool = True

    @property
    def sequences(self) -> int:
        return self.prompts * self.group

    @property
    def forwarded(self) -> int:
        """Tokens of one pass, a prompt once a group."""
        return self.prompts * self.prompt_tokens + self.sequences * self.mean_tokens

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees."""
        P, n = self.prompt_tokens, self.mean_tokens
        return self.prompts * P * P / 2 + self.sequences * (n * P + n * n / 2)


@dataclass(frozen=True, slots=True)
class Layout:
    is_sharded: bool
    ep: int  # ranks that divide the experts; 1: dense, or all experts on every rank
    cp: int  # ranks that divide a sequence
    instance: int  # GPUs of one copy of the model in a rollout


@dataclass(slots=True)
class ClusterPlan:
    """Bytes of one GPU, seconds, and bytes that one GPU receives; of one step."""

    layout: Layout
    available: float
    memory: dict[str, dict[str, float]] = field(default_factory=dict)  # phase -> kind -> bytes
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # "moved": weights to rollouts, state to the host
    network: dict[str, float] = field(
        default_factory=dict
    )  # "weights": gathered, a layer at a time
    is_offloaded: bool = False  # the optimizer's state, while completions are sampled
    mfu: float = 0.0  # of training: FLOPs that must be computed over the peak

    @property
    def peak(self) -> float:
        return max(sum(kinds.values()) for kinds in self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= FILLED * self.available

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def plan_cluster(shape: PaperShape, cluster: Cluster, load: Load) -> ClusterPlan:
    """The fastest layout that fits; where none does, the one that takes the least memory."""
    plans = [make_plan(shape, cluster, load, layout) for layout in layouts(shape, cluster)]
    fitting = [p for p in plans if p.fits]
    if fitting:
        return min(fitting, key=lambda p: p.total_seconds)
    return min(plans, key=lambda p: (p.peak, p.total_seconds))


def layouts(shape: PaperShape, cluster: Cluster) -> Iterator[Layout]:
    N = cluster.num_gpus
    for is_sharded in (False, True) if N > 1 else (False,):
        for ep in _divisors(math.gcd(N, shape.num_experts)) if shape.num_experts else (1,):
            for cp in _divisors(math.gcd(N, cluster.per_node)):
                for instance in _divisors(N):
                    yield Layout(is_sharded, ep, cp, instance)


def make_plan(shape: PaperShape, cluster: Cluster, load: Load, layout: Layout) -> ClusterPlan:
    plan = ClusterPlan(layout, cluster.gpu.memory)
    state = _train(plan, shape, cluster, load)
    _sample(plan, shape, cluster, load, state)
    return plan


def _train(plan: ClusterPlan, shape: PaperShape, cluster: Cluster, load: Load) -> float:
    """Fills in training and the reference. Returns the bytes that wait through a rollout."""
    N, layout, peak = cluster.num_gpus, plan.layout, cluster.gpu.bf16_flops
    D, L = shape.hidden_size, shape.layers
    dense = shape.total - shape.experts
    shards = N if layout.is_sharded else 1
    experts = shape.experts / layout.ep
    longest = math.ceil((load.prompt_tokens + load.max_tokens) / layout.cp)
    largest_layer = shape.shared / L
    reference = WEIGHT * (dense / shards + experts) * load.has_reference
    state = STATE * (dense / shards + shape.experts / N)
    weights = WEIGHT * (dense / shards + experts)
    plan.memory["training"] = {
        "weights": weights,
        "gradients": GRADIENT * (dense / shards + experts),
        "optimizer": state,
        "gathered": GATHERED * WEIGHT * largest_layer * layout.is_sharded,
        "activations": WEIGHT * D * longest * (L + LAYER_WIDTHS)
        + WEIGHT * HEAD_ROWS * shape.vocab_size,
        "head": GRADIENT * shape.table,
        "reference": 0.0,  # it waits in the host's memory
    }

    ranks = N / layout.cp  # that hold sequences of their own
    each = math.ceil(load.sequences / ranks)
    busy = load.sequences / (each * ranks)  # the rest waits for ranks that have one more
    tokens = load.forwarded / N / busy
    micro_batches = max(math.ceil(tokens / longest), load.updates)
    routed = shape.active - shape.shared - shape.table

    def products(times: float) -> float:
        flops = 2 * tokens * times
        slow = flops * (shape.shared + shape.table) / PRODUCTS + flops * routed / EXPERTS
        return slow / peak

    def attention(times: float) -> float:
        return times * shape.pair_flops * L * load.pairs / N / busy / (ATTENTION * peak)

    link, ep_link = cluster.link(N), cluster.link(layout.ep)
    gather = WEIGHT * dense * (1 - 1 / N) if layout.is_sharded else 0.0  # of one micro-batch
    travel = (
        2 * WEIGHT * shape.top_k * D * tokens * shape.moe_layers * (1 - 1 / layout.ep)
        if shape.num_experts
        else 0.0
    )  # there and back, one pass
    ring = WEIGHT * shape.cache_width * tokens * L * (layout.cp - 1)  # keys and values, one pass
    copies = N // layout.ep
    # gradients to where their state lies, weights back
    spread = (GRADIENT + WEIGHT) * experts * (1 - 1 / copies) if shape.num_experts else 0.0
    summed = 2 * GRADIENT * dense * (1 - 1 / N) * (not layout.is_sharded)
    scatter = GRADIENT * dense * (1 - 1 / N) * layout.is_sharded
    network = {
        "weights": micro_batches * 2 * gather,
        "gradients": micro_batches * scatter + load.updates * (summed + spread),
        "to experts": 3 * travel,
        "keys, values": 3 * ring,
    }
    plan.network = {name: value for name, value in network.items() if value}
    flow = (network["weights"] + micro_batches * scatter) / link  # beside the products
    waits = network["to experts"] / ep_link + network["keys, values"] / cluster.link(layout.cp)
    computed = products(4) + attention(4.5)
    update = load.updates * (
        28 * (dense / shards + shape.experts / N) / (BANDWIDTH * cluster.gpu.bandwidth)
        + (summed + spread) / link
    )
    plan.seconds["training"] = max(computed, flow) + waits + update
    if load.has_reference:
        if gather:
            plan.network["weights"] += micro_batches * gather
        one = max(products(1) + attention(1), micro_batches * gather / link)
        plan.seconds["reference"] = one + travel / ep_link + 2 * reference / cluster.host
    needed = 6 * shape.active * load.forwarded + 3 * shape.pair_flops * L * load.pairs
    plan.mfu = needed / (N * peak) / plan.seconds["training"]
    return state + (weights if layout.is_sharded or layout.ep > 1 else 0.0)


def _sample(
    plan: ClusterPlan, shape: PaperShape, cluster: Cluster, load: Load, waiting: float
) -> None:
    """Fills in the rollout, beside `waiting` bytes of training where there is room for them."""
    N, k, gpu = cluster.num_gpus, plan.layout.instance, cluster.gpu
    L, copies = shape.layers, N // k
    batch = math.ceil(load.sequences / copies)
    running = batch * load.mean_tokens / load.max_tokens  # in the mean over all steps
    position = WEIGHT * shape.cache_width * L
    prompts = math.ceil(load.prompts / copies) * load.prompt_tokens
    weights = WEIGHT * shape.total / k
    room = FILLED * gpu.memory - weights
    cached = position * (prompts + batch * load.mean_tokens) / k
    memory = {"weights": weights, "cache": cached}
    plan.is_offloaded = sum(memory.values()) + waiting > FILLED * gpu.memory
    if not plan.is_offloaded:
        memory["training's"] = waiting
    # what the cache cannot hold waits for its turn
    turns = max(1.0, cached / room) if room > 0 else math.inf
    memory["cache"] = min(cached, max(room, 0.0))
    plan.memory["rollout"] = memory
    bandwidth, peak = BANDWIDTH * gpu.bandwidth * k, PRODUCTS * gpu.bf16_flops * k
    batch, running = batch / turns, running / turns
    read = WEIGHT * (shape.shared + shape.table + shape.experts * shape.experts_met(running))
    keys = running * position * (load.prompt_tokens / load.group + load.mean_tokens / 2)
    step = (
        max(read / bandwidth, 2 * shape.active * running / peak) + keys / bandwidth + STEP_SECONDS
    )
    if k > 1:
        width = WEIGHT * running * shape.hidden_size
        step += 2 * L * (ALL_REDUCE_SECONDS + 2 * width / cluster.link(k))
        plan.network["decoding"] = turns * load.max_tokens * 2 * L * 2 * width
    prefill = 2 * shape.active * prompts / peak
    moved = WEIGHT * shape.total / k
    holds_all = k == 1 and not plan.layout.is_sharded and plan.layout.ep == 1
    if N > 1 and not holds_all:
        plan.network["to rollouts"] = moved
    seconds = moved / cluster.link(N) * (N > 1 and not holds_all)
    if plan.is_offloaded:
        seconds += 2 * waiting / cluster.host
    plan.seconds["moved"] = seconds
    plan.seconds["rollout"] = turns * load.max_tokens * step + prefill


def _divisors(n: int) -> list[int]:
    """The powers of two that divide n."""
    return [1 << i for i in range(n.bit_length()) if n % (1 << i) == 0 and 1 << i <= n]
