"""The DeepSeek-R1 recipe as resumable stages, each in its own folder of the run.

base -> R1-Zero -> cold start -> RL + language reward -> rejection sampling -> SFT from base ->
RL stage 2 (preference rewards join at the end) -> distillation, with RL on the small base beside it.

A stage's folder holds its artefacts (model/, eval.json, samples.jsonl, metrics.jsonl, *.jsonl) and
a manifest written last, so a second run continues where the first stopped.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from r1fast import cold_start, distributed, rejection, running_sum
from r1fast.assemble import general_problems, make_scorer, problem_sets
from r1fast.checkpoint import same_config
from r1fast.claims import claims
from r1fast.config import STAGES, Config, stage_config, to_dict
from r1fast.data import load_examples
from r1fast.evaluate import evaluate
from r1fast.hf_folder import read_json, write_json
from r1fast.metrics import duration, rule, say
from r1fast.policy import Policy, load_policy
from r1fast.preferences import score_general, train_reward_models
from r1fast.report import print_stage_table, write_report
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the recipe."""

    title: str
    kind: str  # sft | grpo | data
    starts_from: str  # the stage whose model it starts from, or whose output it reads
    needs: tuple[str, ...]  # the stages that must be done
    sections: tuple[str, ...]  # of the config, beside ALL_STAGES: a change makes it another stage
    run: Callable[[Pipeline, Config, Path], None]


ALL_STAGES = ("seed", "model", "data", "template")
OF_EVALUATION = (
    "eval.num_problems", "eval.num_samples", "eval.temperature", "eval.top_p", "data.eval",
    "data.max_eval_problems", "rollout.max_prompt_tokens", "rollout.max_completion_tokens",
    "rewards.lexicon", "rewards.math_timeout",
)  # fmt: skip
DATA_FILES = ("train", "eval", "general", "sft", "preference", "safety")
SMALL = ("small_base", "distill", "small_rl")


class Pipeline:
    """A run folder and the stages in it."""

    def __init__(self, config: Config, *, force: bool = False):
        self.config, self.folder, self.force = config, Path(config.output_dir), force
        self.order = [s for s in STAGES if s in config.pipeline.stages]
        self.skipped: list[str] = []
        if not (config.pipeline.small_base or config.data.task):
            self.skipped = [s for s in self.order if s in SMALL]
            self.order = [s for s in self.order if s not in SMALL]

    # --- models and data -------------------------------------------------------------------------

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def model_path(self, stage: str) -> str:
        """The folder of a stage's model; base models may be given by path."""
        given = {"base": self.config.pipeline.base, "small_base": self.config.pipeline.small_base}
        return given.get(stage) or str(self.path(stage) / "model")

    def policy(self, stage: str) -> Policy:
        m = self.config.model
        return load_policy(self.model_path(stage), dtype=m.dtype, device=m.device)

    def evaluate(self, policy: Policy, config: Config, stage: str) -> None:
        _, problems = problem_sets(config)
        with make_scorer(config, tokenizer=policy.tokenizer, rules_only=True) as scorer:
            evaluate(
                policy,
                problems,
                config,
                scorer,
                folder=self.path(stage),
                title=f"{stage}: evaluation",
            )

    # --- running ---------------------------------------------------------------------------------

    def run(self, *, start: str = "", only: str = "") -> None:
        """Every stage that is not done; from `start` on, or `only` one, again."""
        for name in (start, only):
            if name and name not in self.order:
                why = "; it needs pipeline.small_base" if name in self.skipped else ""
                raise ValueError(
                    f"stage {name!r} is not in this pipeline{why}; its stages: "
                    f"{', '.join(self.order)}"
                )
        self._check_files(start, only)
        began = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.skipped:
            say(f"pipeline.small_base is empty: without {', '.join(self.skipped)}")
        if start:
            self._set_aside(self.order[self.order.index(start) :])
        if only:
            self._set_aside([only])
        for name in [only] if only else self.order:
            self._run_stage(name)
            self._write_manifest(began)
        if distributed.is_main():
            report = write_report(self.folder)
            print_stage_table(self.folder)
            say(f"\nreport: {report}")
            spent = [m["seconds"] for name in self.order if (m := self._manifest(name))]
            stages = f"{len(spent)} stage{'s' * (len(spent) != 1)}"
            say(f"{stages} in {duration(sum(spent))}; this call {duration(time.time() - began)}")
        distributed.barrier()

    def _check_files(self, start: str, only: str) -> None:
        """Every file that a stage to come will read is there: an error now, not in a week."""
        first = self.order.index(start) if start else len(self.order)
        ahead = [n for i, n in enumerate(self.order) if i >= first or not self._manifest(n)]
        missing: dict[str, str] = {}
        for name in [only] if only else ahead:
            config = stage_config(self.config, name)
            d, c, w, p = config.data, config.cold_start, config.rewards, config.pipeline
            files = {f"data.{key}": getattr(d, key) for key in DATA_FILES}
            models = {
                "rewards.helpfulness_model": w.helpfulness_model,
                "rewards.safety_model": w.safety_model,
                "pipeline.base": p.base,
                "pipeline.small_base": p.small_base,
            }
            if name == "cold_start":
                files["cold_start.few_shot_file"] = c.few_shot_file
                files["cold_start.edited_file"] = c.edited_file
                models["cold_start.collector"] = c.collector
            missing |= {k: v for k, v in files.items() if v and not Path(v).is_file()}
            missing |= {
                key: model
                for key, model in models.items()  # "org/name" may be one of the Hub
                if (model.startswith(("/", ".", "~")) or model.count("/") > 1)
                and not Path(model).expanduser().exists()
            }
        if missing:
            lines = "".join(f"\n  {key} = {value!r}" for key, value in missing.items())
            raise ValueError(f"these files or folders do not exist:{lines}")

    def _run_stage(self, name: str) -> None:
        stage, folder = RECIPE[name], self.path(name)
        config = stage_config(self.config, name)
        if self._is_done(name, config):
            return
        needs = [n for n in stage.needs if n != "r1_zero" or _asks_r1_zero(name, config)]
        missing = [n for n in needs if n in self.order and not self._manifest(n)]
        missing += [n for n in needs if n not in self.order and not self._given(n)]
        if missing:
            raise ValueError(
                f"stage {name} needs {', '.join(missing)} first; run the pipeline without --only, "
                "or add it to pipeline.stages"
            )
        rule(stage.title)
        folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        began = time.time()
        earlier = self._seconds_so_far(folder)
        stage.run(self, config, folder)
        self._close_stage(name, config, time.time() - began + earlier)

    def _close_stage(self, name: str, config: Config, seconds: float) -> None:
        """Write the manifest that says a stage is done."""
        stage = RECIPE[name]
        manifest = {
            "name": name,
            "title": stage.title,
            "kind": stage.kind,
            "starts_from": stage.starts_from,
            "status": "done",
            "seconds": round(seconds, 1),
            "config": to_dict(config),
        }
        if distributed.is_main():
            write_json(self.path(name) / "manifest.json", manifest)
        distributed.barrier()

    @staticmethod
    def _seconds_so_far(folder: Path) -> float:
        """Training seconds of an interrupted earlier try, from its metrics."""
        rows = folder / "metrics.jsonl"
        if not rows.exists():
            return 0.0
        seconds = 0.0
        for line in rows.read_text().splitlines():
            try:
                seconds += json.loads(line).get("step_time") or 0.0
            except json.JSONDecodeError:
                continue  # a torn last line
        return seconds

    def _given(self, stage: str) -> bool:
        given = {"base": self.config.pipeline.base, "small_base": self.config.pipeline.small_base}
        return bool(given.get(stage)) or bool(self._manifest(stage))

    def _manifest(self, name: str) -> dict:
        return read_json(self.path(name) / "manifest.json", default={})

    def _is_done(self, name: str, config: Config) -> bool:
        """Whether a stage is done with these values; where only its evaluation changed, redo that."""
        manifest, title = self._manifest(name), RECIPE[name].title
        if manifest.get("status") != "done":
            return False
        changes = same_config(manifest["config"], to_dict(config))
        keys = {line: line.partition(":")[0] for line in changes}
        trained = [line for line, key in keys.items() if _matters(name, key)]
        if trained and not self.force:
            raise ValueError(
                f"stage {name} was run with other values:\n  " + "\n  ".join(trained) + "\n"
                f"--from {name} runs it and what follows again; --force keeps it as it is; "
                "or take another output_dir"
            )
        asked = [line for line, key in keys.items() if _is_under(key, OF_EVALUATION)]
        if trained or not asked or not (self.path(name) / "eval.json").exists():
            say(f"{title}: done before, kept")
            if name == "cold_start" and cold_start.was_edited(self.path(name), config):
                edited = Path(config.cold_start.edited_file or "cold_start.jsonl").name
                say(f"{edited} was edited since; --from cold_start trains on it")
            return True
        say(f"{title}: done before, kept; evaluated again for {', '.join(asked)}")
        policy = self.policy(name)
        self.evaluate(policy, config, name)
        if (self.path(name) / "general.json").exists():
            _evaluate_general(self, policy, config, self.path(name), self.path("reward_models"))
        self._close_stage(name, config, manifest["seconds"])
        return True

    def _set_aside(self, names: list[str]) -> None:
        """Move the folders of these stages away: nothing is deleted."""
        existing = [n for n in names if self.path(n).exists()]
        if existing and distributed.is_main():
            now, number = time.strftime("%Y%m%d-%H%M%S"), 1
            aside = self.folder / "replaced" / now
            while aside.exists():  # twice in one second
                number += 1
                aside = self.folder / "replaced" / f"{now}-{number}"
            aside.mkdir(parents=True)
            reused = names[0] == "cold_start" and self._may_reuse_collection()
            for name in existing:
                self.path(name).rename(aside / name)
            if reused:
                cold_start.reuse(aside / "cold_start", self.path("cold_start"))
            say(f"earlier {', '.join(existing)}: moved to {aside}")
        distributed.barrier()

    def _may_reuse_collection(self) -> bool:
        """Whether sampling for the cold start would ask the same models for the same again."""
        folder, manifest = self.path("cold_start"), self._manifest("cold_start")
        if not all((folder / name).exists() for name in ("collected.jsonl", "accounting.json")):
            return False
        now = to_dict(stage_config(self.config, "cold_start"))
        changes = same_config(manifest["config"], now) if manifest else []
        keys = [line.partition(":")[0] for line in changes]
        changed = [
            key
            for key in keys
            if _matters("cold_start", key)
            and not _is_under(key, ("sft", "optim", "cold_start.edited_file"))
        ]
        collected = (folder / "collected.jsonl").stat().st_mtime_ns
        models = (self.path(name) / "model" / "config.json" for name in ("base", "r1_zero"))
        newer = any(m.stat().st_mtime_ns > collected for m in models if m.exists())
        return not changed and not newer

    def _write_manifest(self, began: float) -> None:
        if not distributed.is_main():
            return
        stages = []
        present = replace(self.config, pipeline=replace(self.config.pipeline, stages=self.order))
        for name in self.order:
            stage, own = RECIPE[name], self._manifest(name)
            stages.append({
                "name": name, "title": stage.title, "folder": name, "kind": stage.kind,
                "starts_from": stage.starts_from, "status": own.get("status", "not run"),
                "seconds": own.get("seconds"),
            })  # fmt: skip
        manifest = {
            "title": f"R1 pipeline: {self.folder.name}",
            "stages": stages,
            "claims": claims(self.folder, present),
            "config": to_dict(self.config),
            "seed": self.config.seed,
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
            "seconds": round(sum(s["seconds"] or 0.0 for s in stages), 1),
            **provenance(),
        }
        write_json(self.folder / "manifest.json", manifest)


def _matters(name: str, key: str) -> bool:
    """Whether a changed config key makes what a stage has trained or sampled another one."""
    if _is_under(key, ("data.eval", "data.max_eval_problems")):
        return False
    stage = RECIPE[name]
    models = (f"pipeline.{name}", f"pipeline.{stage.starts_from}")  # given base models
    return _is_under(key, (*ALL_STAGES, *stage.sections, *models))


def _is_under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _asks_r1_zero(name: str, config: Config) -> bool:
    return name != "cold_start" or "r1_zero" in config.cold_start.methods


def provenance() -> dict:
    """What a number depends on besides the config."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return {"commit": commit, "device": device, "torch": torch.__version__}


# --- the stages ------------------------------------------------------------------------------------


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

        def quick_eval() -> dict:
            return evaluate(
                policy,
                held_out[: config.eval.every_num_problems],
                config,
                eval_scorer,
                num_samples=config.eval.every_num_samples,
            )

        GRPOTrainer(
            policy,
            config,
            folder,
            train,
            scorer,
            stage=name,
            general=general if preferred else None,
            evaluate=quick_eval,
            force=pipeline.force,
        ).run()
    pipeline.evaluate(policy, config, name)
    if preferred:
        _evaluate_general(pipeline, policy, config, folder, reward_models)


def _evaluate_general(
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
    if not (folder / "accounting.json").exists():
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
    train_reward_models(config, pipeline.model_path("base"), folder)


def _grpo_from(start: str) -> Callable[[Pipeline, Config, Path], None]:
    return lambda pipeline, config, folder: _run_grpo(pipeline, config, folder, start)


_SFT = ("sft", "optim")
_GRPO = ("rollout", "grpo", "rewards", "optim")
_SAMPLED = ("rollout", "rewards", "sample")
RECIPE = {
    "base": Stage("Base model", "sft", "scratch", (), _SFT, _run_base),
    "small_base": Stage("Small base model", "sft", "scratch", (), _SFT, _run_base),
    "r1_zero": Stage("R1-Zero", "grpo", "base", ("base",), _GRPO, _grpo_from("base")),
    "cold_start": Stage("Cold start", "sft", "base", ("base", "r1_zero"), (*_SFT, *_SAMPLED, "cold_start"), _run_cold_start),
    "rl_1": Stage("RL + language reward", "grpo", "cold_start", ("cold_start",), _GRPO, _grpo_from("cold_start")),
    "rejection": Stage("Rejection sampling", "data", "rl_1", ("rl_1",), _SAMPLED, _run_rejection),
    "sft": Stage("SFT from base", "sft", "base", ("base", "rejection"), _SFT, _run_sft),
    "reward_models": Stage("Reward models", "data", "base", ("base",), _SFT, _run_reward_models),
    "rl_2": Stage("RL, all scenarios", "grpo", "sft", ("sft",), _GRPO, _grpo_from("sft")),
    "distill": Stage("Distilled small model", "sft", "small_base", ("small_base", "rejection"), _SFT, _run_distill),
    "small_rl": Stage("RL on the small base", "grpo", "small_base", ("small_base",), _GRPO, _grpo_from("small_base")),
}  # fmt: skip
