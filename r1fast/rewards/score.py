"""Rewards of a rollout: every part that applies to a problem, and their weighted sum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.metrics import warn
from r1fast.protocol import split_completion
from r1fast.rewards.format import format_reward
from r1fast.rewards.language import check_language, knows_language, language_consistency
from r1fast.rewards.length import overlong_penalty, repetition_penalty
from r1fast.rewards.math import Graded, MathReward
from r1fast.rewards.preference import PreferenceRewards
from r1fast.types import Completion, Problem, Reward, RolloutGroup

PARTS = (
    "accuracy", "format", "language", "overlong", "repetition", "helpfulness", "safety",
)  # fmt: skip
MIN_BREAKER_VERDICTS = 8
RewardFn = Callable[..., Sequence[float | None]]


class RewardScorer:
    """Fills `group.rewards`. To be closed: the mathematics grader owns worker processes.

    `preference` holds the reward models of general prompts. `extra` maps a name to a user's
    reward function and its weight; the function follows TRL's contract,
    `f(prompts=, completions=, completion_ids=, **columns) -> list[float | None]`, and None means
    that it does not apply. More than `max_error_share` grader failures in a call stop the run.
    """

    def __init__(
        self,
        config: RewardConfig,
        template: TemplateConfig,
        max_completion_tokens: int,
        preference: PreferenceRewards | None = None,
        *,
        extra: Mapping[str, tuple[RewardFn, float]] | None = None,
        grader: MathReward | None = None,
        prompt_opens_think: bool = False,
        repetition_ngram: int = 20,
        max_error_share: float = 0.5,
    ):
        self.config = config
        self.template = template
        self.max_completion_tokens = max_completion_tokens
        self.preference = preference
        self.extra = dict(extra or {})
        if clash := sorted(set(self.extra) & set(PARTS)):
            raise ValueError(f"extra reward {clash[0]!r} has the name of a built-in one")
        for name, (_, weight) in self.extra.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a number, got {weight}")
        for name in ("helpfulness", "safety"):
            if getattr(config, name) and (preference is None or getattr(preference, name) is None):
                raise ValueError(
                    f"rewards.{name} = {getattr(config, name)} needs a {name} model; "
                    f"set rewards.{name}_model or the weight to 0"
                )
        self.grader = grader or MathReward(timeout=config.math_timeout)
        self.prompt_opens_think = prompt_opens_think
        self.repetition_ngram = repetition_ngram
        self.max_error_share = max_error_share
        self.counts: Counter[str] = Counter()  # verdicts since the start
        self.errors: Counter[str] = Counter()  # failures by reward
        self._pending: Counter[str] | None = None  # verdicts inside `as_one_call`
        self._grading = ThreadPoolExecutor(max_workers=4, thread_name_prefix="grade")

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._grading.shutdown(wait=True)
        self.grader.close()

    def score(self, groups: list[RolloutGroup], *, step_from_end: int | None = None) -> None:
        """Give every completion of every group its `Reward`.

        `step_from_end` counts the steps still to come (0 is the last one); where the config sets
        `preference_last_steps`, preference rewards are off before those steps.
        """
        rows = [(group, completion) for group in groups for completion in group.completions]
        graded = self._grade(rows)
        parts: list[dict[str, float | None]] = []
        for (group, completion), grade in zip(rows, graded, strict=True):
            parts.append(self._rule_parts(group.problem, completion, grade))
        self._add_preference(rows, parts, step_from_end)
        self._add_extra(rows, parts)
        rewards = [
            Reward(
                total=self.total(p),
                parts=p,
                verdict=None if grade is None else grade.verdict,
                answer=None if grade is None else grade.answer,
            )
            for p, grade in zip(parts, graded, strict=True)
        ]
        at = 0
        for group in groups:
            group.rewards = rewards[at : at + len(group.completions)]
            at += len(group.completions)
            _mask_errors(group.rewards)
        verdicts = Counter(grade.verdict for grade in graded if grade is not None)
        self.counts.update(verdicts)
        self.errors["accuracy"] += verdicts["error"]
        if self._pending is None:
            self._check_errors(verdicts)
        else:
            self._pending.update(verdicts)

    @contextmanager
    def as_one_call(self) -> Iterator[None]:
        """Calls of `score` in here, of a few groups each, are one call for `max_error_share`.

        They may come from another thread, one at a time.
        """
        self._pending = Counter()
        try:
            yield
            self._check_errors(self._pending)
        finally:
            self._pending = None

    def _check_errors(self, verdicts: Counter[str]) -> None:
        num_verdicts = verdicts.total()
        if (
            num_verdicts >= MIN_BREAKER_VERDICTS
            and verdicts["error"] > self.max_error_share * num_verdicts
        ):
            raise RuntimeError(
                f"the grader failed on {verdicts['error']} of {num_verdicts} completions "
                f"(more than {self.max_error_share:.0%}); the rewards mean nothing"
            )

    def total(self, parts: Mapping[str, float | None]) -> float:
        """The weighted sum over the parts that apply."""
        weights = {name: getattr(self.config, name) for name in PARTS}
        weights.update({name: weight for name, (_, weight) in self.extra.items()})
        return math.fsum(weights[n] * value for n, value in parts.items() if value is not None)

    def _grade(self, rows: list[tuple[RolloutGroup, Completion]]) -> list[Graded | None]:
        def grade(row: tuple[RolloutGroup, Completion]) -> Graded | None:
            group, completion = row
            if not _verifiable(group.problem):
                return None
            assert group.problem.answer is not None
            return self.grader.grade(
                group.problem.answer,
                completion.text,
                self.template.protocol,
                self.template.special_token,
                prompt_opens_think=self.prompt_opens_think,
            )

        return list(self._grading.map(grade, rows))

    def _rule_parts(
        self, problem: Problem, completion: Completion, grade: Graded | None
    ) -> dict[str, float | None]:
        c, protocol, token = self.config, self.template.protocol, self.template.special_token
        opens = self.prompt_opens_think
        parts: dict[str, float | None] = {}
        if grade is not None:
            # an infrastructure failure is no zero: the part does not apply, the verdict says why
            failed = grade.verdict == "error"
            parts["accuracy"] = None if failed else float(grade.verdict == "correct")
        if grade is not None or problem.kind == "general":  # DeepSeek-R1, equation 10: both kinds
            parts["format"] = format_reward(
                completion.text, protocol, token, prompt_opens_think=opens
            )
        # measured at weight 0 too: the drift of the language is what R1-Zero is watched for
        reasoning = split_completion(completion.text, protocol, token, prompt_opens_think=opens)
        parts["language"] = None
        if reasoning.reasoning and (c.language or knows_language(problem.language, c.lexicon)):
            parts["language"] = language_consistency(
                reasoning.reasoning, problem.language, lexicon=c.lexicon
            )
        num_tokens = len(completion.token_ids)
        if c.overlong:
            parts["overlong"] = overlong_penalty(
                num_tokens, self.max_completion_tokens, c.overlong_cache
            )
        if c.repetition:
            parts["repetition"] = repetition_penalty(completion.token_ids, self.repetition_ngram)
        return parts

    def _add_preference(
        self,
        rows: list[tuple[RolloutGroup, Completion]],
        parts: list[dict[str, float | None]],
        step_from_end: int | None,
    ) -> None:
        c = self.config
        if self.preference is None or (
            step_from_end is not None and 0 < c.preference_last_steps <= step_from_end
        ):
            return
        general = [i for i, (group, _) in enumerate(rows) if group.problem.kind == "general"]
        if not general:
            return
        prompts = [rows[i][0].problem.prompt for i in general]
        texts = [rows[i][1].text for i in general]
        if c.helpfulness:
            scores = self.preference.score_helpfulness(
                prompts, texts, prompt_opens_think=self.prompt_opens_think
            )
            if scores is not None:
                scores = _lowest_where_none(scores, [id(rows[i][0]) for i in general])
                for i, score in zip(general, scores, strict=True):
                    parts[i]["helpfulness"] = score
        if c.safety:
            for i, score in zip(
                general, self.preference.score_safety(prompts, texts) or [], strict=True
            ):
                parts[i]["safety"] = score

    def _add_extra(
        self,
        rows: list[tuple[RolloutGroup, Completion]],
        parts: list[dict[str, float | None]],
    ) -> None:
        """Call the user's rewards with one row per completion, the problem's columns repeated."""
        if not self.extra or not rows:
            return
        problems = [group.problem for group, _ in rows]
        columns: dict[str, list] = {
            name: [getattr(p, name) for p in problems]
            for name in ("answer", "id", "kind", "language", "subset")
        }
        for name in sorted({key for p in problems for key in p.meta} - set(columns)):
            columns[name] = [p.meta.get(name) for p in problems]
        for reserved in ("prompts", "completions", "completion_ids"):
            columns.pop(reserved, None)
        for name, (function, _) in self.extra.items():
            scores = function(
                prompts=[p.prompt for p in problems],
                completions=[completion.text for _, completion in rows],
                completion_ids=[list(completion.token_ids) for _, completion in rows],
                **columns,
            )
            try:
                scores = list(scores)
            except TypeError:
                raise ValueError(
                    f"reward {name!r} must return a list, got {type(scores).__name__}"
                ) from None
            if len(scores) != len(rows):
                raise ValueError(
                    f"reward {name!r} returned {len(scores)} scores for {len(rows)} completions"
                )
            bad = [i for i, s in enumerate(scores) if s is not None and not math.isfinite(s)]
            if bad:
                self.errors[name] += len(bad)
                warn(
                    f"reward {name!r} returned {scores[bad[0]]} for problem "
                    f"{problems[bad[0]].id!r}; {len(bad)} of {len(scores)} scores are not finite "
                    "and do not count"
                )
            for part, score in zip(parts, scores, strict=True):
                counts = score is not None and math.isfinite(score)
                part[name] = float(score) if counts else None


def check_problems(problems: Sequence[Problem], config: RewardConfig) -> None:
    """ValueError for problems the configured rewards cannot score, before the first step."""
    if config.language:
        for language in sorted({p.language for p in problems}):
            check_language(language, config.lexicon)


def _lowest_where_none(scores: list[float | None], groups: list[int]) -> list[float | None]:
    """A response without a summary is as bad as the worst of its group; None where all are.

    Left out it would count 0, more than a response that the reward model dislikes.
    """
    lowest: dict[int, float] = {}
    for group, score in zip(groups, scores, strict=True):
        if score is not None:
            lowest[group] = min(score, lowest.get(group, score))
    return [
        lowest.get(g) if score is None else score for g, score in zip(groups, scores, strict=True)
    ]


def _mask_errors(rewards: list[Reward]) -> None:
    """What the grader could not judge earns the mean of the others: an advantage of 0."""
    if not any(r.verdict == "error" for r in rewards):
        return
    judged = [r.total for r in rewards if r.verdict != "error"] or [r.total for r in rewards]
    mean = math.fsum(judged) / len(judged)
    for reward in rewards:
        if reward.verdict == "error":
            reward.total = mean


def _verifiable(problem: Problem) -> bool:
    return problem.kind != "general" and problem.answer is not None
