"""`r1fast plan CONFIG --gpus 8,64,512`: the tables of cluster_plan.py."""

from __future__ import annotations

from r1fast import cluster_plan
from r1fast.cluster_plan import Cluster, ClusterPlan, Load, plan_cluster
from r1fast.config import Config
from r1fast.hf_folder import read_model_config
from r1fast.machine import GIB
from r1fast.metrics import table
from r1fast.paper_shape import PaperShape, read_shape
from r1fast.plan import billions
from r1fast.planning import assumed_gpu
from r1fast.progress import duration

Options = dict[str, str | list[str]]
DEFAULT_GPU = "h100"
MOST_GPUS = 1 << 16


def whole(options: Options, name: str) -> int:
    """0 where the option is not given."""
    if name not in options:
        return 0
    text = str(options[name])
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"--{name} must be a whole number of at least 1, got {text!r}")
    return int(text)


def show_clusters(config: Config, options: Options) -> None:
    """A row for each number of GPUs. Raises ValueError for options that do not fit."""
    if not config.model.path:
        raise ValueError(
            "name a model: --model.path, a folder with a config.json; configs/shapes has some, "
            "configs/shapes/deepseek-v3 for instance"
        )
    if extra := [name for name in ("stage", "ranks") if name in options]:
        raise ValueError(
            f"--{extra[0]} is of a plan of this machine; --gpus is a step of RL on paper"
        )
    shape = read_shape(read_model_config(config.model.path))
    gpu = assumed_gpu(str(options.get("gpu", DEFAULT_GPU)))
    per_node, network = whole(options, "per-node") or 8, whole(options, "network") or 400
    load = _load(config, options)
    clusters = [
        Cluster(n, gpu, per_node=per_node, network=network * 1e9 / 8)
        for n in _numbers(str(options["gpus"]), per_node)
    ]
    plans = [plan_cluster(shape, cluster, load) for cluster in clusters]
    active = f", {billions(shape.active)} active" if shape.num_experts else ""
    name = f"{config.model.path}: {billions(shape.total)} parameters{active}, bfloat16, {gpu.name}, on paper"
    _show(name, clusters, plans, _notes(shape, clusters[0], load))


def _numbers(text: str, per_node: int) -> list[int]:
    words = text.split(",")
    if not all(w.isdecimal() and 1 <= int(w) <= MOST_GPUS for w in words):
        raise ValueError(
            f"--gpus must be whole numbers from 1 to {MOST_GPUS:,}, as 8,64,512; got {text!r}"
        )
    for n in map(int, words):
        if n > per_node and n % per_node:
            raise ValueError(f"--gpus {n} are no whole nodes of {per_node}: see --per-node")
    return [int(w) for w in words]


def _load(config: Config, options: Options) -> Load:
    r, g = config.rollout, config.grpo
    mean = whole(options, "completion-tokens") or r.max_completion_tokens
    if mean > r.max_completion_tokens:
        raise ValueError(
            f"--completion-tokens {mean} is more than rollout.max_completion_tokens = "
            f"{r.max_completion_tokens}"
        )
    return Load(
        g.prompts_per_step, r.num_generations, r.max_prompt_tokens, mean, r.max_completion_tokens,
        updates=g.num_mini_batches * g.num_iterations, has_reference=g.kl_coef > 0,
    )  # fmt: skip


def _show(name: str, clusters: list[Cluster], plans: list[ClusterPlan], notes: list[str]) -> None:
    phases = list(dict.fromkeys(x for plan in plans for x in plan.seconds))
    kinds = list(dict.fromkeys(x for plan in plans for x in plan.network if plan.fits))
    some = list(zip(clusters, plans, strict=True))
    table(name, ["GPUs", "layout"], [[f"{c.num_gpus:,}", _layout(c, p)] for c, p in some], notes)
    table(
        "",
        ["GPUs", "GiB of a GPU", *phases, "a step", "MFU"],
        [
            [f"{c.num_gpus:,}", f"{p.peak / GIB:,.0f}",
             *(_time(p, p.seconds.get(x, 0.0)) for x in phases), _time(p, p.total_seconds),
             f"{100 * p.mfu:.0f}%" if p.fits else "-"]
            for c, p in some
        ],
        ["moved: weights to the rollouts, the optimizer's state to the host and back; MFU of training"],
    )  # fmt: skip
    if kinds:
        table(
            "",
            ["GPUs", *kinds],
            [
                [f"{c.num_gpus:,}", *(_gigabytes(p.network.get(k, 0.0)) if p.fits else "-" for k in kinds)]
                for c, p in some
            ],
            ["GB that one GPU receives in a step, from its node or from others"],
        )  # fmt: skip


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:,.0f}" if value else "-"


def _layout(cluster: Cluster, plan: ClusterPlan) -> str:
    layout = plan.layout
    words = ["sharded" if layout.is_sharded else "whole" if cluster.num_gpus > 1 else ""]
    words += [f"experts over {layout.ep}"] * (layout.ep > 1)
    words += [f"sequences over {layout.cp}"] * (layout.cp > 1)
    words += [f"rollout on {layout.instance}"] * (cluster.num_gpus > 1)
    words += ["optimizer to the host in rollouts"] * plan.is_offloaded
    words += ["DOES NOT FIT"] * (not plan.fits)
    return ", ".join(filter(None, words)) or "one GPU"


def _time(plan: ClusterPlan, seconds: float) -> str:
    return duration(seconds) if plan.fits else "-"


def _notes(shape: PaperShape, cluster: Cluster, load: Load) -> list[str]:
    c = cluster_plan
    longest = ", the longest" if load.mean_tokens == load.max_tokens else ""
    found = [
        f"a step: {load.prompts:,} prompts of {load.prompt_tokens:,} tokens, {load.group} completions of "
        f"{load.mean_tokens:,} tokens{longest} (at most {load.max_tokens:,}), {load.updates} updates; rewards not counted",
        "nothing here was measured, and r1fast runs none of the layouts but whole models; layers are recomputed",
        f"assumed: {100 * c.PRODUCTS:.0f}% of {cluster.gpu.bf16_flops / 1e12:.0f} TFLOP/s in products, "
        f"{100 * c.ATTENTION:.0f}% in attention, {100 * c.BANDWIDTH:.0f}% of {cluster.gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{100 * c.NETWORK:.0f}% of {cluster.nvlink / 1e9:.0f} GB/s within {cluster.per_node} GPUs and of "
        f"{cluster.network / 1e9:.0f} GB/s beyond; weights are gathered beside the products, all else waits",
        f"fits: {100 * c.FILLED:.0f}% of {cluster.gpu.memory / GIB:.0f} GiB, the fuller of training and rollout",
    ]
    if shape.num_experts:
        found.append(
            f"experts: {100 * c.EXPERTS:.0f}% of the peak, an even router that may send a token to any rank"
        )
    return found
