"""`r1fast evaluate`: a preset or a file of problems, stored samples graded again, two runs compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from r1fast import distributed
from r1fast.assemble import has_judge, make_scorer, problem_sets
from r1fast.config import Config, load_config, to_dict
from r1fast.evaluate.compare import compare_runs
from r1fast.evaluate.presets import (
    MAX_COMPLETION_TOKENS,
    TEMPERATURE,
    TOP_P,
    Preset,
    find_preset,
)
from r1fast.evaluate.replaced import set_other_aside
from r1fast.evaluate.rescore import rescore, stored_config, stored_problems, stored_setup
from r1fast.evaluate.run import evaluate
from r1fast.evaluation_table import show_comparison, show_evaluation, show_rescored
from r1fast.hf_folder import read_json, write_json
from r1fast.metrics import note, say
from r1fast.policy import Policy, model_name, policy_of
from r1fast.provenance import provenance
from r1fast.report import report_on
from r1fast.rewards.graders import JUDGED_KINDS
from r1fast.rollout.vllm.start import started
from r1fast.run_lock import only_run
from r1fast.types import Problem

Options = Mapping[str, str | list[str]]  # of the command line, without their dashes
MAX_PROMPT_TOKENS = 4096  # of a preset's prompts
JUDGES = (
    "name an OpenAI-compatible endpoint (--judge-url and --judge-model, or judge.url and judge.model), "
    "or judge.path for a model in process"
)


def run_evaluate(target: str, overrides: list[str], options: Options) -> None:
    """What the command line asks for. Raises ValueError for options that do not go together."""
    asked = [name for name in ("preset", "rescore", "compare") if name in options]
    if len(asked) > 1:
        raise ValueError(f"--{asked[0]} and --{asked[1]} are two different things to do")
    if "compare" in options:
        told = compare_runs(str(options["compare"]), target)
        if distributed.is_main():
            say(json.dumps(told)) if "json" in options else show_comparison(told)
    elif "rescore" in options:
        _rescore(target, overrides, options)
    else:
        _evaluate(target, overrides, options)


def evaluation_config(target: str, overrides: list[str], options: Options) -> Config:
    """The config of a TOML file or of a model by itself, with what the preset says over it.

    What the command line says is over both. Needs no torch.
    """
    is_config = target.endswith(".toml")
    preset = find_preset(str(options["preset"])) if "preset" in options else None
    first: list[str] = []
    if preset is not None:
        first = [
            f"--eval.temperature={TEMPERATURE}", f"--eval.top_p={TOP_P}",
            f"--eval.num_samples={preset.num_samples}",
            f"--rollout.max_completion_tokens={MAX_COMPLETION_TOKENS}",
            f"--rollout.max_prompt_tokens={MAX_PROMPT_TOKENS}",
        ]  # fmt: skip
    data = str(options.get("data", ""))
    if not is_config:
        name = preset.name if preset else Path(data).stem or "evaluation"
        first += [
            f"--model.path={json.dumps(target)}",
            f"--output_dir=runs/evaluate/{model_name(target)}-{name}",
        ]
    config = load_config(target if is_config else None, [*first, *overrides])
    if preset is not None and not data:
        raise ValueError(f"--preset {preset.name} needs --data FILE: {preset.data}")
    if preset is None and data:
        config = replace(config, data=replace(config.data, eval=data))
    if preset is None and not data and not config.data.eval and not config.data.task:
        raise ValueError(
            "data.eval is empty: name a file of problems (--data FILE), for instance gsm8k "
            "test.jsonl, or a --preset of a known set"
        )
    if not config.model.path:
        raise ValueError(
            "model.path is empty: name a Hugging Face folder or model id, for instance "
            "--model.path=path/to/Qwen2.5-0.5B"
        )
    return config


def _evaluate(target: str, overrides: list[str], options: Options) -> None:
    config = _with_judge(evaluation_config(target, overrides, options), options)
    preset = find_preset(str(options["preset"])) if "preset" in options else None
    if preset is not None and preset.needs_judge and not has_judge(config):
        raise ValueError(f"preset {preset.name} is judged: {JUDGES}")
    if preset is not None:
        # a wrong file is refused before the model is loaded
        preset.load(str(options["data"]), str(options.get("baseline", "")))
    with only_run(config.output_dir), started(config) as config:
        _evaluate_by(config, preset, target, overrides, options)


def _evaluate_by(
    config: Config, preset: Preset | None, target: str, overrides: list[str], options: Options
) -> None:
    policy = policy_of(config)
    if not target.endswith(".toml") and not any(w.startswith("--template.") for w in overrides):
        config = _own_template(config, policy)
    problems = _problems(config, preset, options)
    with make_scorer(config, tokenizer=policy.tokenizer, rules_only=True) as scorer:
        folder = Path(config.output_dir)
        name = preset.name if preset else ""
        set_other_aside(folder, policy, problems, config, scorer)
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            manifest = {
                "title": f"evaluate: {folder.name}",
                "name": folder.name,
                "kind": "evaluate",
                "starts_from": config.model.path,
                "preset": name,
                "data_file": str(options.get("data", config.data.eval)),
                "judge": scorer.judge_name if judged(problems) else "",
                "config": to_dict(config),
                "seed": config.seed,
                **provenance(),
            }
            write_json(folder / "manifest.json", manifest)
        distributed.barrier()
        result = evaluate(
            policy, problems, config, scorer, folder=folder, title="evaluation", preset=name
        )
    if distributed.is_main():
        show_evaluation(result)
        report_on(folder)
    distributed.barrier()


def _own_template(config: Config, policy: Policy) -> Config:
    """A chat model's own template, its answer behind </think>; else the template of R1-Zero."""
    if getattr(policy.tokenizer, "chat_template", None):
        config = replace(config, template=replace(config.template, name="chat", protocol="think"))
    note(
        f"template: {config.template.name}; answers are read by protocol {config.template.protocol}"
    )
    return config


def _problems(config: Config, preset: Preset | None, options: Options) -> list[Problem]:
    if preset is None:
        return problem_sets(config)[1]
    problems = preset.load(
        str(options["data"]),
        str(options.get("baseline", "")),
        is_chat=config.template.name == "chat",
    )
    limits = [n for n in (config.eval.num_problems, config.data.max_eval_problems) if n]
    return problems[: min(limits)] if limits else problems


def judged(problems: Iterable[Problem]) -> bool:
    return any(problem.kind in JUDGED_KINDS for problem in problems)


def _with_judge(config: Config, options: Options) -> Config:
    """--judge-url and --judge-model in the place of what [judge] names."""
    url, model = str(options.get("judge-url", "")), str(options.get("judge-model", ""))
    if bool(url) != bool(model):
        raise ValueError("a judge needs both --judge-url and --judge-model")
    if not url:
        return config
    return replace(config, judge=replace(config.judge, url=url, model=model, path=""))


def _rescore(folder: str, overrides: list[str], options: Options) -> None:
    if distributed.world_size() > 1:
        raise ValueError("--rescore runs in one process: start it without torchrun")
    setup = stored_setup(folder)
    config = _with_judge(stored_config(setup, overrides), options)
    if judged(stored_problems(folder)) and not has_judge(config):
        raise ValueError(f"{folder} was judged, and is to be again: {JUDGES}")
    with only_run(folder), make_scorer(config, rules_only=True) as scorer:
        scorer.prompt_opens_think = setup["prompt_opens_think"]
        told = rescore(folder, scorer, setup | {"rewards": to_dict(config)["rewards"]})
    show_rescored(told, read_json(Path(folder) / "eval.json"))
    report_on(folder)
