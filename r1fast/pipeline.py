"""The DeepSeek-R1 recipe as resumable stages, each in its own folder of the run.

base -> R1-Zero -> cold start -> RL + language reward -> rejection sampling -> SFT from base ->
RL stage 2 (preference rewards join at the end) -> distillation, with RL on the small base beside it.

A stage's folder holds its artefacts (model/, eval.json, samples.jsonl, metrics.jsonl, *.jsonl) and
a manifest written last, so a second run continues where the first stopped.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path

from r1fast import cold_start, distributed
from r1fast.aside import new_aside
from r1fast.assemble import make_scorer, problem_sets
from r1fast.claims import claims
from r1fast.config import STAGES, Config, stage_config, to_dict
from r1fast.config_diff import same_config
from r1fast.evaluate import evaluate
from r1fast.hf_folder import read_json, write_json
from r1fast.json_fields import FINITE, OBJECT, TEXT, check_fields
from r1fast.metric_rows import parse_lines
from r1fast.metrics import rule, say
from r1fast.policy import Policy, load_policy
from r1fast.progress import duration
from r1fast.provenance import provenance
from r1fast.recipe import RECIPE, asks_r1_zero, evaluate_general
from r1fast.report import print_stage_table, report_on
from r1fast.run_lock import only_run

ALL_STAGES = ("seed", "model", "data", "template")
OF_EVALUATION = (
    "eval.num_problems", "eval.num_samples", "eval.temperature", "eval.top_p", "data.eval",
    "data.max_eval_problems", "rollout.max_prompt_tokens", "rollout.max_completion_tokens",
    "rewards.lexicon", "rewards.math_timeout", "rewards.math_batch_timeout", "rewards.math_workers",
)  # fmt: skip
DATA_FILES = ("train", "eval", "general", "sft", "preference", "safety")
SMALL = ("small_base", "distill", "small_rl")
MANIFEST = {"status?": TEXT, "seconds?": FINITE, "config?": OBJECT, "files?": OBJECT}  # of a stage
DONE = {"seconds": FINITE, "config": OBJECT}  # of one that is done


class Pipeline:
    """A run folder and the stages in it."""

    def __init__(self, config: Config, *, force: bool = False):
        if config.model.adapter:
            raise ValueError(
                "model.adapter is of one model, and a pipeline has several: merge it into "
                "pipeline.base (r1fast merge)"
            )
        stages = [stage_config(config, stage) for stage in config.stages]
        if any(c.rollout.engine == "vllm" for c in [config, *stages]):
            raise ValueError(
                "rollout.engine = vllm is of one model, and a pipeline has several: run its stages one by one "
                "(r1fast grpo, sample, evaluate), or take the embedded engine"
            )
        self.config, self.folder, self.force = config, Path(config.output_dir), force
        self.order = [s for s in STAGES if s in config.pipeline.stages]
        self.skipped: list[str] = []
        if not (config.pipeline.small_base or config.data.task):
            self.skipped = [s for s in self.order if s in SMALL]
            self.order = [s for s in self.order if s not in SMALL]

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
            print_stage_table(self.folder)
            report_on(self.folder)
            spent = [
                s for name in self.order if (s := self._manifest(name).get("seconds")) is not None
            ]
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
                "judge.path": config.judge.path,
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
        needs = [n for n in stage.needs if n != "r1_zero" or asks_r1_zero(name, config)]
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
        began, files = time.time(), data_digests(config)
        earlier = self._seconds_so_far(folder)
        with only_run(folder):  # the pipeline's own lock keeps nobody from a stage's folder
            stage.run(self, config, folder)
        self._close_stage(name, config, time.time() - began + earlier, files)

    def _close_stage(
        self, name: str, config: Config, seconds: float, files: dict[str, str]
    ) -> None:
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
            "files": files,
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
        values = (row.get("step_time") for _, row in parse_lines(rows).rows)
        return sum(x for x in values if FINITE.holds(x))

    def _given(self, stage: str) -> bool:
        given = {"base": self.config.pipeline.base, "small_base": self.config.pipeline.small_base}
        return bool(given.get(stage)) or bool(self._manifest(stage))

    def _manifest(self, name: str) -> dict:
        """What a stage that is done has written; empty for one that is not."""
        path = self.path(name) / "manifest.json"
        manifest, remedy = read_json(path, default={}), f"--from {name} runs the stage again"
        check_fields(manifest, MANIFEST, path, remedy)
        if manifest.get("status") == "done":
            check_fields(manifest, DONE, path, remedy)
        return manifest

    def _is_done(self, name: str, config: Config) -> bool:
        """Whether a stage is done with these values; where only its evaluation changed, redo that."""
        manifest, title = self._manifest(name), RECIPE[name].title
        if manifest.get("status") != "done":
            return False
        changes = _changes(manifest, config)
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
            evaluate_general(self, policy, config, self.path(name), self.path("reward_models"))
        self._close_stage(name, config, manifest["seconds"], data_digests(config))
        return True

    def _set_aside(self, names: list[str]) -> None:
        """Move the folders of these stages away: nothing is deleted."""
        existing = [n for n in names if self.path(n).exists()]
        if existing and distributed.is_main():
            aside = new_aside(self.folder)
            aside.mkdir(parents=True)
            reused = names[0] == "cold_start" and self._may_reuse_collection()
            for name in reversed(existing):  # what a kill leaves is a beginning, whose stages fit
                self.path(name).rename(aside / name)
            if reused:
                cold_start.reuse(aside / "cold_start", self.path("cold_start"))
            say(f"earlier {', '.join(existing)}: moved to {aside}")
        distributed.barrier()

    def _may_reuse_collection(self) -> bool:
        """Whether sampling for the cold start would ask the same models for the same again."""
        folder = self.path("cold_start")
        try:
            manifest = self._manifest("cold_start")
        except ValueError:  # it is set aside with the rest
            return False
        if not all((folder / name).exists() for name in ("collected.jsonl", "accounting.json")):
            return False
        changes = _changes(manifest, stage_config(self.config, "cold_start")) if manifest else []
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


def data_digests(config: Config) -> dict[str, str]:
    """SHA-256 of every file that [data] names and that is there."""
    named = {f"data.{key}": Path(getattr(config.data, key)) for key in DATA_FILES}
    digests = {}
    for key, path in named.items():
        if path.is_file():
            with path.open("rb") as file:
                digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _changes(manifest: dict, config: Config) -> list[str]:
    """What differs between a stage that is done and one of this config, a line a key."""
    changes = same_config(manifest["config"], to_dict(config))
    told = {line.partition(":")[0] for line in changes}
    before, now = manifest.get("files", {}), data_digests(config)
    return changes + [
        f"{key}: the content of {getattr(config.data, key.removeprefix('data.'))!r} has changed"
        for key in before
        if key not in told and now.get(key, before[key]) != before[key]
    ]


def _matters(name: str, key: str) -> bool:
    """Whether a changed config key makes what a stage has trained or sampled another one."""
    if _is_under(key, ("data.eval", "data.max_eval_problems")):
        return False
    stage = RECIPE[name]
    models = (f"pipeline.{name}", f"pipeline.{stage.starts_from}")  # given base models
    return _is_under(key, (*ALL_STAGES, *stage.sections, *models))


def _is_under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)
