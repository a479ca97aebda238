"""`r1fast plan`: what the stages of a config will take, before any weight is read. config.json is enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from r1fast import distributed, running_sum
from r1fast.assemble import problem_sets
from r1fast.cluster_report import Options, show_clusters, whole
from r1fast.config import STAGES, Config, LoraConfig, stage_config
from r1fast.costs import Size
from r1fast.examples import load_examples
from r1fast.hf_folder import read_model_config
from r1fast.lora import add_lora
from r1fast.machine import GPU
from r1fast.metrics import table
from r1fast.model import Decoder, ModelSpec, load_tokenizer
from r1fast.pipeline import SMALL, Pipeline
from r1fast.plan import Plan, billions, mib
from r1fast.planner import peak
from r1fast.planning import assumed_gpu, grpo_groups, make_job, make_plan, sft_groups
from r1fast.policy import Policy, pick_device
from r1fast.progress import duration
from r1fast.recipe import RECIPE
from r1fast.sft import encode_examples
from r1fast.templates import encode_prompts

SOME = 256  # problems or examples whose lengths are looked at
DEFAULT_GPU = "h100"  # where a config asks for one and there is none


def plan_config(config: Config, options: Options) -> None:
    """Tables of one stage, or a line for each stage of a pipeline; with --gpus a cluster on paper."""
    if "gpus" in options:
        show_clusters(config, options)
        return
    if extra := [name for name in ("per-node", "network") if name in options]:
        raise ValueError(f"--{extra[0]} is of a cluster: say how many GPUs it has, --gpus N")
    stage = str(options.get("stage", ""))
    if stage and stage not in STAGES:
        raise ValueError(f"--stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if stage and RECIPE[stage].kind == "data":
        trained = ", ".join(name for name in STAGES if RECIPE[name].kind != "data")
        raise ValueError(f"stage {stage!r} trains no policy; those that do: {trained}")
    if stage:
        own = stage_config(config, stage)
        _plan(own, stage, RECIPE[stage].kind, options, _base(own, stage)).show()
    elif config.model.path:
        for kind in ["grpo"] + ["sft"] * bool(config.data.sft):
            _plan(config, kind, kind, options, config.model.path).show()
    else:
        _show_stages(config, options)


def _show_stages(config: Config, options: Options) -> None:
    order = [name for name in Pipeline(config).order if RECIPE[name].kind != "data"]
    trained = [n for n in order if n not in ("base", "small_base") or not _base(config, n)]
    rows, plans = [], []
    for name in trained:
        own = stage_config(config, name)
        plan = _plan(own, name, RECIPE[name].kind, options, _base(own, name))
        plans.append(plan)
        whole = sum(plan.seconds().values())
        steps = own.grpo.num_steps if plan.job.kind == "grpo" else own.sft.max_steps
        rows.append(
            [
                name, billions(plan.job.size.total), f"{plan.token_budget:,}",
                mib(peak(plan.memory)[1]), f"{whole:.3g} s", f"{steps:,}" if steps else "by epochs",
                duration(whole * steps) if steps else "-",
            ]
        )  # fmt: skip
    most = (
        "" if options.get("completion-tokens") else ", at most"
    )  # every completion is the longest
    columns = ["stage", "parameters", "token budget", "peak memory", f"a step{most}", "steps"]
    columns.append(f"together{most}")
    notes = [f"{plans[0].device}, {mib(plans[0].available)} there; rewards are not in the seconds"]
    notes += plans[0].assumptions
    notes += [f"{name}: {plan.lengths}" for name, plan in zip(trained, plans, strict=True)]
    table(
        "The stages that train",
        columns,
        rows,
        [
            *notes,
            "more of one: --stage NAME; with completions of another length: --completion-tokens N",
        ],
    )


def _plan(config: Config, stage: str, kind: str, options: Options, path: str) -> Plan:
    """`path` is the model that training starts from; empty: the embedded task's own."""
    device, gpu = _device(config, options)
    num_ranks = whole(options, "ranks") or distributed.world_size()
    p = config.parallel
    group_size = p.context_parallel * p.tensor_parallel
    if num_ranks % group_size:
        raise ValueError(
            f"parallel.context_parallel x parallel.tensor_parallel = {p.context_parallel} x {p.tensor_parallel} does not "
            f"divide the {num_ranks} ranks: say a multiple of {group_size}, --ranks"
        )
    num = config.grpo.prompts_per_step if kind == "grpo" else config.sft.batch_size
    if num_ranks > num:
        key = "grpo.prompts_per_step" if kind == "grpo" else "sft.batch_size"
        raise ValueError(f"{key} = {num} is less than one for each of {num_ranks} ranks")
    spec, policy = _model(config, stage, path)
    if policy is not None and stage in ("base", "small_base"):
        config = replace(config, lora=LoraConfig())  # as the recipe does
    model = Decoder(spec, dtype=config.model.dtype, device="meta")
    if config.lora.rank:
        add_lora(model, config.lora)
    size = Size.of(model)
    if kind == "grpo":
        prompts, cut = (
            _prompts(config, _tokenizer(policy, path), spec),
            config.rollout.max_completion_tokens,
        )
        asked, context = whole(options, "completion-tokens"), spec.max_position_embeddings
        if asked > cut:
            raise ValueError(
                f"--completion-tokens {asked} is more than rollout.max_completion_tokens = {cut}"
            )
        prompt = grpo_groups(config, prompts, cut, num_ranks)[0][0]
        if asked > context - prompt:
            raise ValueError(
                f"--completion-tokens {asked} behind prompts of {prompt} tokens is more than the model's context of "
                f"{context} (max_position_embeddings)"
            )
        mean = asked or min(cut, context - prompt)
        groups = grpo_groups(config, prompts, mean, num_ranks)
        longest = min(max(prompts) + cut, context)
        lengths = f"prompts of {prompt} and completions of {mean} tokens"
        if mean == cut:
            lengths += ", the longest"
        elif mean == context - prompt:
            lengths += f", all that the model's context of {context} leaves"
    else:
        examples = _examples(config, policy, _tokenizer(policy, path), spec)
        groups = sft_groups(config, examples, num_ranks // group_size)
        longest = max(map(sum, examples))
        lengths = f"examples of {sum(map(sum, examples)) / len(examples):.0f} tokens in the mean"
    job = make_job(kind, spec, size, config, device, groups, longest, num_ranks)
    if job.budget != "auto" and job.budget < job.longest_piece:
        raise ValueError(
            f"{kind}.token_budget = {job.budget} is less than the longest sequence, {job.longest_piece} "
            f'tokens{" a rank" * (p.context_parallel > 1)}: set it to that or more, or to "auto"'
        )
    return make_plan(job, stage, lengths, gpu=gpu)


def _device(config: Config, options: Options) -> tuple[torch.device, GPU | None]:
    """Where the config runs; a GPU that is not there is assumed."""
    asked = str(options.get("gpu", ""))
    if asked or (config.model.device == "cuda" and not torch.cuda.is_available()):
        return torch.device("cuda"), assumed_gpu(asked or DEFAULT_GPU)
    return torch.device(pick_device(config.model.device)), None


def _base(config: Config, stage: str) -> str:
    """The model that a stage of a pipeline starts from, where one is given."""
    p = config.pipeline
    return p.small_base if stage in SMALL else p.base


def _model(config: Config, stage: str, path: str) -> tuple[ModelSpec, Policy | None]:
    """The shape, and the embedded task's own model where that is trained."""
    if path:
        return ModelSpec.from_hf_config(read_model_config(path)), None
    if not config.data.task:
        raise ValueError("name a model: model.path, or pipeline.base for the stages of a pipeline")
    policy = running_sum.new_policy("small_base" if stage in SMALL else "base", config)
    return policy.model.spec, policy


def _tokenizer(policy: Policy | None, path: str):
    """None where it would have to be fetched."""
    if policy is not None:
        return policy.tokenizer
    return load_tokenizer(path) if Path(path).expanduser().is_dir() else None


def _prompts(config: Config, tokenizer, spec: ModelSpec) -> list[int]:
    """Tokens of the first prompts; the longest allowed where there are no data or no tokenizer."""
    room = min(config.rollout.max_prompt_tokens, spec.max_position_embeddings - 1)
    if tokenizer is None or not (config.data.train or config.data.task):
        return [room]
    some = replace(config, data=replace(config.data, max_train_problems=SOME, eval=""))
    ids, _, _ = encode_prompts(problem_sets(some)[0], tokenizer, config.template, room)
    if not ids:
        raise ValueError(f"none of the first {SOME} prompts has at most {room} tokens")
    return list(map(len, ids))


def _examples(
    config: Config, policy: Policy | None, tokenizer, spec: ModelSpec
) -> list[tuple[int, int]]:
    """(prompt, completion) tokens of some examples; the longest allowed where there are none."""
    room = min(config.sft.max_seq_tokens, spec.max_position_embeddings)
    if config.data.sft and tokenizer is not None:
        reader = Policy(Decoder(replace(spec, num_layers=1), device="meta"), tokenizer, [0])
        examples = load_examples(config.data.sft, language=config.data.language)[:SOME]
        sequences = encode_examples(examples, reader, config)
    elif policy is not None:
        sequences = running_sum.encode_corpus(
            running_sum.base_corpus(SOME, config.seed), policy
        )  # fmt: skip
    else:
        prompt = min(config.rollout.max_prompt_tokens, room // 2)
        return [(prompt, room - prompt)]
    return [(len(s.prompt_ids), len(s.completion_ids)) for s in sequences]
