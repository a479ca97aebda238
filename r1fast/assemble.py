"""From a config to the objects of a run: problems, general prompts, the scorer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1fast import running_sum
from r1fast.config import Config, RewardConfig
from r1fast.config_check import PREFERENCE_REWARDS
from r1fast.data import load_problems
from r1fast.hf_classifier import ScoreFn, load_score_fn
from r1fast.judge_engine import make_chat
from r1fast.metrics import warn
from r1fast.policy import pick_device
from r1fast.rewards.graders import check_problem
from r1fast.rewards.judge import Judge
from r1fast.rewards.pairwise import PairwiseJudge
from r1fast.rewards.preference import PreferenceRewards
from r1fast.rewards.score import RewardScorer, check_problems
from r1fast.templates import prompt_opens_think
from r1fast.types import KINDS, Problem

NUM_TASK_PROBLEMS = (4096, 200)  # of the embedded task: training, held out


def problem_sets(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, evaluation) problems: files where they are named, else the embedded task."""
    d = config.data
    num_train, num_eval = d.max_train_problems, d.max_eval_problems
    if config.eval.num_problems:
        num_eval = min(num_eval or config.eval.num_problems, config.eval.num_problems)
    if d.task == "running_sum":
        train, held_out = NUM_TASK_PROBLEMS
        return (
            running_sum.make_problems(num_train or train, config.seed),
            running_sum.make_problems(num_eval or held_out, config.seed, held_out=True),
        )
    sets = []
    for path, limit in ((d.train, num_train), (d.eval, num_eval)):
        sets.append(
            load_problems(
                path,
                format=d.format,
                language=d.language,
                max_problems=limit,
                check=check_problem,
            )
            if path
            else []
        )
    for problems in sets:
        check_problems(problems, config.rewards, has_judge=has_judge(config))
    return sets[0], sets[1]


def general_problems(config: Config) -> list[Problem]:
    """Prompts that nothing verifies, for the last phase of all-scenario RL.

    Where a judge compares responses with a reference, that is the row's `answer`, else its
    `completion`; ValueError where rewards.judge has a weight and no row has either.
    """
    if config.data.task == "running_sum":
        return running_sum.make_general()
    if not config.data.general:
        return []
    problems = load_problems(
        config.data.general, format="jsonl", kind="general", language=config.data.language
    )
    if not config.rewards.weights("general")["judge"]:
        return problems
    problems = [with_reference(problem) for problem in problems]
    if not any(problem.answer for problem in problems):
        raise ValueError(
            f"rewards.judge compares with a reference, and no row of {config.data.general} has an "
            "'answer' or a 'completion'"
        )
    return problems


def with_reference(problem: Problem) -> Problem:
    """Its answer, else the completion that it brings for supervised training."""
    reference = problem.answer or problem.meta.get("completion")
    return replace(problem, answer=reference) if isinstance(reference, str) else problem


def has_judge(config: Config) -> bool:
    return bool(config.judge.url or config.judge.path)


def make_pairwise(config: Config) -> PairwiseJudge:
    """The judge of two responses. Raises ValueError where [judge] names none."""
    chat = make_chat(config)
    if chat is None:
        raise ValueError(
            "there is no judge: set judge.url and judge.model, or judge.path for one in process"
        )
    return PairwiseJudge(chat)


def make_scorer(
    config: Config,
    reward_models: Path | None = None,
    *,
    tokenizer: Any = None,
    rules_only: bool = False,
) -> RewardScorer:
    """The configured rewards. Preference models come from the config or a reward-model stage.

    `tokenizer` tells whether its chat template opens the thought. With `rules_only`, for evaluation
    and sampling, no reward model is loaded; else a weight without a model counts 0, with a warning.
    """
    w, preference = config.rewards, None
    kept: list[str] = []
    weighted = [n for n in PREFERENCE_REWARDS if any(w.weights(kind)[n] for kind in KINDS)]
    chat = make_chat(config)
    if weighted and not rules_only:
        loaded = preference_rewards(config, reward_models)
        kept = [n for n in weighted if n != "judge" and getattr(loaded, n) is not None]
        kept += ["judge"] * ("judge" in weighted and chat is not None)
        missing = [n for n in weighted if n not in kept]
        if models := [f"rewards.{n}" for n in missing if n != "judge"]:
            warn(
                f"no model for {' and '.join(models)}: counted as 0 "
                f"(name {models[0]}_model, or preference data for the pipeline)"
            )
        if "judge" in missing:
            warn("no judge for rewards.judge: counted as 0 (set judge.url or judge.path)")
        preference = loaded if kept else None
    w = _without(w, [n for n in PREFERENCE_REWARDS if n not in kept])
    return RewardScorer(
        w,
        config.template,
        config.rollout.max_completion_tokens,
        preference=preference,
        judge=Judge(chat) if chat is not None else None,
        pairwise=PairwiseJudge(chat) if chat is not None else None,
        prompt_opens_think=prompt_opens_think(config.template, tokenizer),
    )


def _without(w: RewardConfig, names: list[str]) -> RewardConfig:
    """`w` with these rewards off for every kind of problem."""
    zero = dict.fromkeys(names, 0.0)
    tables = {
        kind: table | {n: 0.0 for n in names if n in table} for kind, table in w.by_kind.items()
    }
    return replace(w, **zero, by_kind=tables)


def preference_rewards(config: Config, folder: Path | None) -> PreferenceRewards:
    """Helpfulness as the model's raw score, safety as a probability (its sigmoid).

    Models of the config, else those of a reward-model stage in `folder`.
    """
    w = config.rewards

    def model(name: str, given: str) -> ScoreFn | None:
        path = Path(given) if given else folder and folder / name
        if path is None or not (given or path.exists()):
            return None
        return load_score_fn(
            path,
            template=config.template,
            dtype=config.model.dtype,
            device=pick_device(config.model.device),
            label=getattr(w, f"{name}_label"),
            how=getattr(w, f"{name}_input"),
        )

    safety = model("safety", w.safety_model)
    return PreferenceRewards(
        config.template,
        helpfulness=model("helpfulness", w.helpfulness_model),
        safety=safety and (lambda pairs: [_sigmoid(s) for s in safety(pairs)]),
    )


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))
