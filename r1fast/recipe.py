"""What each stage of the recipe does: its inputs from earlier stages, its training, its files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1fast import cold_start, distributed, rejection, running_sum
from r1fast.assemble import general_problems, make_scorer, problem_sets
from r1fast.config import Config, LoraConfig, stage_config
from r1fast.evaluate import short_evaluation
from r1fast.examples import load_examples
from r1fast.hf_folder import read_json, write_json
from r1fast.metrics import say
from r1fast.policy import Policy, load_policy
from r1fast.preferences import score_general, train_reward_models
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer

if TYPE_CHECKING:
    from r1fast.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the recipe."""

    title: str
    kind: str  # sft | grpo | data
    starts_from: str  # the stage whose model it starts from, or whose output it reads
    needs: tuple[str, ...]  # the stages that must be done
    sections: tuple[str, ...]  # of the config, beside ALL_STAGES: a change makes it another stage
    run: Callable[[Pipeline, Config, Path], None]


def asks_r1_zero(name: str, config: Config) -> bool:
    return name != "cold_start" or "r1_zero" in config.cold_start.methods


def _run_base(pipeline: Pipeline, config: Config, folder: Path) -> None:
    """The base model: given, or trained from scratch on the embedded task's corpus."""
    name = folder.name
    given = config.pipeline.base if name == "base" else config.pipeline.small_base
    if given:
        policy = load_policy(given, dtype=config.model.dtype, device=config.model.device)
    elif config.data.task:
        policy = running_sum.new_policy(name, config)
        num_documents = config.sft.max_steps * config.sft.batch_size
        corpus = running_sum.base_corpus(num_documents, config.seed, running_sum.GUESSES[name])
        sequences = running_sum.encode_corpus(corpus, policy)
        config = replace(config, lora=LoraConfig())  # random weights are nothing to adapt
        SFTTrainer(
            policy, config, folder, sequences, stage=name, in_order=True, force=pipeline.force
        ).run()
    else:
        raise ValueError(f"pipeline.{name} is empty: name a Hugging Face folder or model id")
    pipeline.evaluate(policy, config, name)


def _run_grpo(pipeline: Pipeline, config: Config, folder: Path, start: str) -> None:
    name = folder.name
    policy = pipeline.policy(start)
    train, held_out = problem_sets(config)
    general = general_problems(config)
    reward_models, tokenizer = pipeline.path("reward_models"), policy.tokenizer
    rules_only = not general or name != "rl_2"
    with (
        make_scorer(config, reward_models, tokenizer=tokenizer, rules_only=rules_only) as scorer,
        make_scorer(config, tokenizer=tokenizer, rules_only=True) as eval_scorer,
    ):
        preferred = scorer.preference is not None
        GRPOTrainer(
            policy,
            config,
            folder,
            train,
            scorer,
            stage=name,
            general=general if preferred else None,
            evaluate=short_evaluation(policy, held_out, config, eval_scorer),
            force=pipeline.force,
        ).run()
    pipeline.evaluate(policy, config, name)
    if preferred:
        evaluate_general(pipeline, policy, config, folder, reward_models)


def evaluate_general(
    pipeline: Pipeline, policy: Policy, config: Config, folder: Path, preference: Path
) -> None:
    """Preference scores on general prompts before and after RL stage 2, in general.json."""
    problems = general_problems(config)
    result = {
        when: score_general(model, problems, config, preference, config.eval.num_samples)
        for when, model in (("before", pipeline.policy("sft")), ("after", policy))
    }
    if distributed.is_main():
        write_json(folder / "general.json", result)
    for name in sorted(result["before"].keys() & result["after"].keys()):
        say(
            f"{name} on general prompts: {result['before'][name]:.2f} -> {result['after'][name]:.2f}"
        )


def _collect(pipeline: Pipeline, config: Config, folder: Path) -> None:
    """Ask a model for long chains of thought, by each of the configured methods."""
    c, m = config.cold_start, config.model
    train, _ = problem_sets(config)
    asked, policies = {}, {}
    for method in c.methods:
        asked[method] = stage_config(pipeline.config, "r1_zero") if method == "r1_zero" else config
        if method == "r1_zero":
            policies[method] = pipeline.policy("r1_zero")
        elif c.collector:
            policies[method] = load_policy(c.collector, dtype=m.dtype, device=m.device)
        else:
            policies[method] = pipeline.policy("base")
        if method == "reflection":  # its prompt asks for these tags
            asked[method] = replace(
                config, template=replace(config.template, protocol="think_answer")
            )
    with ExitStack() as stack:
        scorers = {
            method: stack.enter_context(
                make_scorer(asked[method], tokenizer=policies[method].tokenizer, rules_only=True)
            )
            for method in c.methods
        }
        cold_start.collect(policies, train, asked, scorers, config, folder)


def _run_cold_start(pipeline: Pipeline, config: Config, folder: Path) -> None:
    if not read_json(folder / "accounting.json", default={}).get("kept"):  # or none was kept
        _collect(pipeline, config, folder)
    c = config.cold_start
    edited = Path(c.edited_file) if c.edited_file else folder / "cold_start.jsonl"
    examples, counts = cold_start.read_back(folder / "collected.jsonl", edited)
    if distributed.is_main():
        accounting = read_json(folder / "accounting.json") | counts
        write_json(folder / "accounting.json", accounting)
        rejection.write_examples(folder / "trained.jsonl", examples)
    say("read back: " + ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in counts.items()))
    _sft(pipeline, config, folder, examples, start="base")


def _run_rejection(pipeline: Pipeline, config: Config, folder: Path) -> None:
    train, _ = problem_sets(config)
    policy = pipeline.policy("rl_1")
    with make_scorer(config, tokenizer=policy.tokenizer, rules_only=True) as scorer:
        reasoning = rejection.rejection_sample(policy, train, config, scorer, folder)
    general = []
    if config.data.general:
        general = rejection.general_examples(config.data.general, config, policy)
    elif config.data.task:
        general = running_sum.general_examples(config)
    mixed = rejection.mix(reasoning, general, config.seed)
    if distributed.is_main():
        rejection.write_examples(folder / "sft.jsonl", mixed)
        accounting = read_json(folder / "accounting.json")
        accounting |= {"reasoning": len(reasoning), "general": len(general)}
        write_json(folder / "accounting.json", accounting)
    distributed.barrier()


def _sft(pipeline: Pipeline, config: Config, folder: Path, examples: list, start: str) -> None:
    policy = pipeline.policy(start)
    sequences = encode_examples(examples, policy, config)
    SFTTrainer(policy, config, folder, sequences, stage=folder.name, force=pipeline.force).run()
    pipeline.evaluate(policy, config, folder.name)


def _run_sft(pipeline: Pipeline, config: Config, folder: Path) -> None:
    examples = load_examples(pipeline.path("rejection") / "sft.jsonl")
    _sft(pipeline, config, folder, examples, start="base")


def _run_distill(pipeline: Pipeline, config: Config, folder: Path) -> None:
    examples = load_examples(pipeline.path("rejection") / "sft.jsonl")
    _sft(pipeline, config, folder, examples, start="small_base")


def _run_reward_models(pipeline: Pipeline, config: Config, folder: Path) -> None:
    base = pipeline.model_path("base")
    train_reward_models(config, base, folder, force=pipeline.force)


def _grpo_from(start: str) -> Callable[[Pipeline, Config, Path], None]:
    return lambda pipeline, config, folder: _run_grpo(pipeline, config, folder, start)


_SCRATCH = ("sft", "optim")
_SFT = (*_SCRATCH, "lora")
_GRPO = ("rollout", "grpo", "rewards", "optim", "lora")
_SAMPLED = ("rollout", "rewards", "sample")
RECIPE = {
    "base": Stage("Base model", "sft", "scratch", (), _SCRATCH, _run_base),
    "small_base": Stage("Small base model", "sft", "scratch", (), _SCRATCH, _run_base),
    "r1_zero": Stage("R1-Zero", "grpo", "base", ("base",), _GRPO, _grpo_from("base")),
    "cold_start": Stage("Cold start", "sft", "base", ("base", "r1_zero"), (*_SFT, *_SAMPLED, "cold_start"), _run_cold_start),
    "rl_1": Stage("RL + language reward", "grpo", "cold_start", ("cold_start",), _GRPO, _grpo_from("cold_start")),
    "rejection": Stage("Rejection sampling", "data", "rl_1", ("rl_1",), _SAMPLED, _run_rejection),
    "sft": Stage("SFT from base", "sft", "base", ("base", "rejection"), _SFT, _run_sft),
    "reward_models": Stage("Reward models", "data", "base", ("base",), _SCRATCH, _run_reward_models),
    "rl_2": Stage("RL, all scenarios", "grpo", "sft", ("sft",), _GRPO, _grpo_from("sft")),
    "distill": Stage("Distilled small model", "sft", "small_base", ("small_base", "rejection"), _SFT, _run_distill),
    "small_rl": Stage("RL on the small base", "grpo", "small_base", ("small_base",), _GRPO, _grpo_from("small_base")),
}  # fmt: skip
