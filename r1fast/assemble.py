"""From a config to the objects of a run: problems, general prompts, the scorer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1fast import running_sum
from r1fast.config import Config
from r1fast.data import load_problems
from r1fast.metrics import warn
from r1fast.model import load_tokenizer
from r1fast.policy import pick_device
from r1fast.reward_model import load_reward_model, score_fn
from r1fast.rewards.math import parse_gold
from r1fast.rewards.preference import PreferenceRewards
from r1fast.rewards.score import RewardScorer, check_problems
from r1fast.templates import prompt_opens_think, render_prompt
from r1fast.types import Problem

ScoreFn = Callable[[list[tuple[str, str]]], list[float]]
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
                check_gold=parse_gold,
            )
            if path
            else []
        )
    for problems in sets:
        check_problems(problems, config.rewards)
    return sets[0], sets[1]


def general_problems(config: Config) -> list[Problem]:
    """Prompts that nothing verifies, for the last phase of all-scenario RL."""
    if config.data.task == "running_sum":
        return running_sum.make_general()
    if not config.data.general:
        return []
    return load_problems(
        config.data.general, format="jsonl", kind="general", language=config.data.language
    )


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
    weighted = [name for name in ("helpfulness", "safety") if getattr(w, name)]
    if weighted and not rules_only:
        loaded = preference_rewards(config, reward_models)
        missing = [name for name in weighted if getattr(loaded, name) is None]
        if missing:
            warn(
                f"no model for {' and '.join(f'rewards.{name}' for name in missing)}: counted as 0 "
                f"(name rewards.{missing[0]}_model, or preference data for the pipeline)"
            )
        weighted = [name for name in weighted if name not in missing]
        preference = loaded if weighted else None
    kept = weighted if preference is not None else []
    w = replace(w, **{n: 0.0 for n in ("helpfulness", "safety") if n not in kept})
    return RewardScorer(
        w,
        config.template,
        config.rollout.max_completion_tokens,
        preference=preference,
        prompt_opens_think=prompt_opens_think(config.template, tokenizer),
    )


def preference_rewards(config: Config, folder: Path | None) -> PreferenceRewards:
    """Helpfulness as the model's raw score, safety as a probability (its sigmoid)."""
    w = config.rewards

    def model(name: str, given: str) -> ScoreFn | None:
        path = Path(given) if given else folder and folder / name
        if path is None or not (given or path.exists()):
            return None
        tokenizer = load_tokenizer(path)
        reward_model = load_reward_model(
            path, dtype=config.model.dtype, device=pick_device(config.model.device)
        )
        return score_fn(
            reward_model,
            tokenizer,
            lambda prompt: render_prompt(prompt, config.template, tokenizer),
        )

    safety = model("safety", w.safety_model)
    return PreferenceRewards(
        config.template,
        helpfulness=model("helpfulness", w.helpfulness_model),
        safety=safety and (lambda pairs: [_sigmoid(s) for s in safety(pairs)]),
    )


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))
