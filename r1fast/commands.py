"""What each command of the CLI does, on one process or under torchrun."""

from __future__ import annotations

from pathlib import Path

from r1fast import distributed
from r1fast.assemble import (
    general_problems,
    make_pairwise,
    make_scorer,
    problem_sets,
)
from r1fast.config import Config, to_dict
from r1fast.data import detect_format
from r1fast.evaluate import evaluate, short_evaluation
from r1fast.evaluate_command import run_evaluate
from r1fast.evaluation_table import show_evaluation
from r1fast.examples import Example, gsm8k_examples, load_examples
from r1fast.export import export
from r1fast.generate import Options, generate, model_config
from r1fast.hf_folder import read_json, resolve_model_path, write_json
from r1fast.metrics import say, table
from r1fast.pipeline import Pipeline
from r1fast.plan_config import plan_config
from r1fast.policy import Policy, load_policy, policy_of
from r1fast.preference_pairs import make_pairs
from r1fast.preferences import train_reward_models
from r1fast.provenance import provenance
from r1fast.rejection import rejection_sample
from r1fast.replay import replay
from r1fast.report import report_on, write_report
from r1fast.rollout.vllm.start import started
from r1fast.run_lock import only_run
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer


def run(command: str, target: Config | str, overrides: list[str], options: Options) -> None:
    distributed.start()
    try:
        if isinstance(target, Config):
            force = bool(options.get("force"))
            if command == "plan":
                plan_config(target, options)
            elif command == "pipeline":
                with only_run(target.output_dir):
                    Pipeline(target, force=force).run(
                        start=options.get("from", ""), only=options.get("only", "")
                    )
            else:
                with only_run(target.output_dir), started(target) as config:
                    _COMMANDS[command](config, force)
        elif command == "evaluate":
            run_evaluate(target, overrides, options)
        elif command == "report":
            say(f"report: {write_report(target)}")
        elif command == "replay":
            _replay(target, overrides, options)
        elif command == "merge":
            _merge(target, overrides, options)
        elif command == "export":
            export(target, overrides, options)
        elif command == "generate":
            generate(target, overrides, options)
        else:
            _serve(target, overrides, options)
    finally:
        distributed.stop()


def _policy(config: Config) -> Policy:
    if not config.model.path:
        raise ValueError(
            "model.path is empty: name a Hugging Face folder or model id, for instance "
            "--model.path=path/to/Qwen2.5-0.5B"
        )
    return policy_of(config)


def _begin(config: Config, command: str) -> Path:
    """The run folder, with what was asked for and what it runs on written down.

    Called when nothing can be refused any more: a refused run leaves the manifest as it was.
    """
    folder = Path(config.output_dir)
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "title": f"{command}: {folder.name}",
            "name": folder.name,
            "kind": command,
            "starts_from": config.model.path,
            "config": to_dict(config),
            "seed": config.seed,
            **provenance(),
        }
        write_json(folder / "manifest.json", manifest)
    distributed.barrier()
    return folder


def _grpo(config: Config, force: bool) -> None:
    policy = _policy(config)
    train, held_out = problem_sets(config)
    with make_scorer(config, tokenizer=policy.tokenizer) as scorer:
        trainer = GRPOTrainer(
            policy,
            config,
            config.output_dir,
            train,
            scorer,
            general=general_problems(config) if scorer.preference is not None else None,
            evaluate=short_evaluation(policy, held_out, config, scorer) if held_out else None,
            force=force,
        )
        folder = _begin(config, "grpo")
        trainer.run()
        if held_out:
            show_evaluation(
                evaluate(policy, held_out, config, scorer, folder=folder, title="evaluation")
            )
    _finish(folder)


def _sft(config: Config, force: bool, command: str = "sft") -> None:
    policy = _policy(config)
    sequences = encode_examples(_examples(config), policy, config)
    trainer = SFTTrainer(policy, config, config.output_dir, sequences, force=force)
    held_out = problem_sets(config)[1] if config.data.eval else []
    folder = _begin(config, command)
    trainer.run()
    if held_out:
        with make_scorer(config, tokenizer=policy.tokenizer, rules_only=True) as scorer:
            show_evaluation(
                evaluate(policy, held_out, config, scorer, folder=folder, title="evaluation")
            )
    _finish(folder)


def _distill(config: Config, force: bool) -> None:
    _sft(config, force, "distill")


def _examples(config: Config) -> list[Example]:
    """data.sft, or the solutions that a GSM8K file brings along."""
    d, t = config.data, config.template
    if d.sft:
        return load_examples(d.sft, language=d.language)
    if not d.train:
        raise ValueError("data.sft is empty: name a JSONL file of prompt + completion")
    if d.format not in ("auto", "gsm8k") or detect_format(d.train) != "gsm8k":
        raise ValueError(
            f"data.train = {d.train!r} holds problems, and only GSM8K's bring solutions to learn; "
            "name a JSONL file of prompt + completion as data.sft"
        )
    examples = gsm8k_examples(d.train, t.protocol, t.special_token)
    return examples[: d.max_train_problems] if d.max_train_problems else examples


def _sample(config: Config, force: bool) -> None:
    policy = _policy(config)
    train, _ = problem_sets(config)
    if not train:
        raise ValueError("data.train is empty: name a file of problems to sample")
    with make_scorer(config, tokenizer=policy.tokenizer, rules_only=True) as scorer:
        folder = _begin(config, "sample")
        rejection_sample(policy, train, config, scorer, folder)
    if distributed.is_main():
        accounting = read_json(folder / "accounting.json")
        rows = [["kept", accounting["kept"]], *accounting["dropped"].items()]
        table(f"{accounting['sampled']} completions", ["what became of them", "number"], rows)
    say(f"\nkept samples: {folder / 'sampled.jsonl'}")


def _reward_model(config: Config, force: bool) -> None:
    """Reward models of data.preference (pairwise) and data.safety (pointwise) on model.path's trunk."""
    if not (config.data.preference or config.data.safety or config.data.task):
        raise ValueError(
            "data.preference and data.safety are empty: name a JSONL file of prompt + chosen + "
            "rejected, or of prompt + response + safe"
        )
    if not config.model.path:
        raise ValueError("model.path is empty: name the model whose trunk the reward model gets")
    folder = _begin(config, "reward-model")
    train_reward_models(config, config.model.path, folder, force=force)
    accounting = read_json(folder / "accounting.json")
    table(
        "reward models",
        ["model", "rows", "held-out accuracy", "folder"],
        [
            [name, made["rows"], f"{made['held_out_accuracy']:.3f}", str(folder / name)]
            for name, made in accounting.items()
        ],
    )


def _preferences(config: Config, force: bool) -> None:
    """Preference pairs of data.general, by a judge."""
    judge = make_pairwise(config)
    problems = general_problems(config)
    if not problems:
        raise ValueError("data.general is empty: name a JSONL file of prompts")
    policy = _policy(config) if config.model.path else None
    folder = _begin(config, "preferences")
    make_pairs(problems, config, judge, folder, policy)
    if distributed.is_main():
        accounting = read_json(folder / "accounting.json")
        rows = [["kept", accounting["kept"]], *accounting["dropped"].items()]
        note = (
            f"mean length: chosen {accounting['mean_chosen_chars']:.0f}, rejected "
            f"{accounting['mean_rejected_chars']:.0f} characters"
        )
        bias = accounting.get("position_bias")
        notes = [note] + ([f"position bias of the judge: {bias:+.3f}"] if bias is not None else [])
        table(f"{accounting['sampled']} pairs", ["what became of them", "number"], rows, notes)
    say(f"\npairs: {folder / 'preference.jsonl'}")


def _finish(folder: Path) -> None:
    if distributed.is_main():
        report_on(folder)
    distributed.barrier()


def _replay(target: str, overrides: list[str], options: Options) -> None:
    text = options.get("step", "")
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"replay needs --step N, a step counted from 1, got {text or 'none'}")
    replay(target, int(text), overrides, as_json=bool(options.get("json")))


def _merge(target: str, overrides: list[str], options: Options) -> None:
    """A model and a LoRA adapter as one plain model folder, in the type that the model is stored in."""
    config, path = model_config(target, overrides)
    adapter, out = options.get("adapter", config.model.adapter), options.get("out", "")
    if not adapter or not out:
        raise ValueError("merge needs --adapter FOLDER (as PEFT writes it) and --out FOLDER")
    if Path(out).exists():
        raise ValueError(f"--out {out} exists; not overwritten")
    stored = read_json(resolve_model_path(path) / "config.json")
    dtype = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    if any(word.startswith("--model.dtype=") for word in overrides):
        dtype = config.model.dtype
    load_policy(path, dtype=dtype, device=config.model.device, adapter=adapter).save(out)
    say(f"{path} with {adapter}, {dtype}: {out}")


def _serve(target: str, overrides: list[str], options: Options) -> None:
    config, path = model_config(target, overrides)
    try:
        from r1fast.serve.server import ServeOptions, serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(
            f"r1fast serve needs {error.name}, which is not installed: pip install 'r1fast[serve]'"
        ) from None
    serve(config, path, ServeOptions.read(options))


_COMMANDS = {
    "grpo": _grpo,
    "sft": _sft,
    "distill": _distill,
    "sample": _sample,
    "reward-model": _reward_model,
    "preferences": _preferences,
}
