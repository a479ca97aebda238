"""From a config to the objects of a run: problems, general prompts, the scorer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from r1fast import running_sum
from r1fast.config import Config
from r1fast.data import load_problems
from r1fast.model import load_tokenizer
from r1fast.policy import pick_device
from r1fast.reward_model import load_reward_model, score_fn
from r1fast.rewards.math import parse_gold
from r1fast.rewards.preference import PreferenceRewards
from r1fast.rewards.score import RewardScorer, check_problems
from r1fast.templates import render_prompt
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
    return load_problems(config.data.general, format="jsonl", kind="general")


def make_scorer(config: Config, reward_models: Path | None = None) -> RewardScorer:
    """The configured rewards. Preference models come from the config or a reward-model stage."""
    w = config.rewards
    preference = None
    if reward_models is not None:
        preference = preference_rewards(config, reward_models)
    elif w.helpfulness_model or w.safety_model:
        preference = preference_rewards(config, Path())
    if preference is None:  # the weights wait for their models
        w = replace(w, helpfulness=0.0, safety=0.0)
    return RewardScorer(
        w, config.template, config.rollout.max_completion_tokens, preference=preference
    )


def preference_rewards(config: Config, folder: Path) -> PreferenceRewards:
    """Helpfulness as the model's raw score, safety as a probability (its sigmoid)."""
    w = config.rewards

    def model(name: str, given: str) -> ScoreFn | None:
        path = Path(given) if given else folder / name
        if not given and not path.exists():
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
