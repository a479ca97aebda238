"""Rewards of a rollout: every part that applies to a problem, and their weighted sum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.config_check import REWARDS
from r1fast.interrupt import boundary
from r1fast.metrics import warn
from r1fast.rewards.chat import ChatModel
from r1fast.rewards.code import CodeReward
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.format import format_reward
from r1fast.rewards.graders import JUDGED_KINDS, Grade, Graders, check_problem, needs_judge
from r1fast.rewards.judge import Judge
from r1fast.rewards.language import check_language, knows_language, language_consistency
from r1fast.rewards.length import overlong_penalty, repetition_penalty
from r1fast.rewards.math import MathReward
from r1fast.rewards.pairwise import PairwiseJudge, pairwise_metrics
from r1fast.rewards.preference import PreferenceRewards
from r1fast.rewards.sandbox import SandboxInfo, find_compiler
from r1fast.rewards.user_function import UserFunction
from r1fast.types import KINDS, Completion, Problem, Reward, RolloutGroup

PARTS = REWARDS
MIN_BREAKER_VERDICTS = 8
JUDGE_COUNTS = (
    "requests", "retries", "cached", "failed", "prompt_tokens", "completion_tokens",
    "first", "second", "neither", "a", "b", "tie", "inconsistent",
)  # fmt: skip
RewardFn = Callable[..., Sequence[float | None]]


class RewardScorer:
    """Fills `group.rewards`. To be closed: the graders own processes. The code grader starts when needed.

    Who decides on which kind of problem is in graders.py. `preference` holds the reward models of general
    prompts, `judge` decides on answers of kind `qa`, and `pairwise` on open ones, and on general responses
    against the problem's reference answer. `extra` maps a name to a user's
    reward function and its weight; the function follows TRL's contract,
    `f(prompts=, completions=, completion_ids=, **columns) -> list[float | None]`, and None means
    that it does not apply. A call that fails or takes too long counts as None, unless it is the first, or
    the third in a row (user_function.py). More than `max_error_share` grader failures in a call stop the run.
    """

    def __init__(
        self,
        config: RewardConfig,
        template: TemplateConfig,
        max_completion_tokens: int,
        preference: PreferenceRewards | None = None,
        *,
        judge: Judge | None = None,
        pairwise: PairwiseJudge | None = None,
        extra: Mapping[str, tuple[RewardFn, float]] | None = None,
        grader: MathReward | None = None,
        code: CodeReward | None = None,
        prompt_opens_think: bool = False,
        repetition_ngram: int = 20,
        max_error_share: float = 0.5,
        function_timeout: float = 300.0,  # seconds of a call of `extra`'s; 0 = any, in this thread
    ):
        self.config = config
        self.template = template
        self.max_completion_tokens = max_completion_tokens
        self.preference, self.judge, self.pairwise = preference, judge, pairwise
        self.extra = dict(extra or {})
        if clash := sorted(set(self.extra) & set(PARTS)):
            raise ValueError(f"extra reward {clash[0]!r} has the name of a built-in one")
        for name, (_, weight) in self.extra.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a number, got {weight}")
        self._functions = {name: UserFunction(name, function_timeout) for name in self.extra}
        self._weights = {kind: config.weights(kind) for kind in KINDS}
        for name in ("helpfulness", "safety"):
            if self.uses(name) and (preference is None or getattr(preference, name) is None):
                raise ValueError(
                    f"rewards.{name} = {max(w[name] for w in self._weights.values())} needs a {name} "
                    f"model; set rewards.{name}_model or the weight to 0"
                )
        if self.uses("judge") and pairwise is None:
            raise ValueError(
                "rewards.judge needs a judge; set judge.url (or judge.path), or the weight to 0"
            )
        self.grader = grader or MathReward(
            timeout=config.math_timeout, num_workers=config.math_workers
        )
        self.code = code or CodeReward(
            timeout=config.code_timeout,
            total_timeout=config.code_total_timeout,
            memory_mib=config.code_memory_mib,
            partial=config.code_partial,
            num_workers=config.sandbox_slots,
            rung=config.sandbox,
            allow_unsafe_sandbox=config.allow_unsafe_sandbox,
        )
        self.prompt_opens_think = prompt_opens_think
        self.repetition_ngram = repetition_ngram
        self.max_error_share = max_error_share
        self.counts: Counter[str] = Counter()  # verdicts since the start
        self.errors: Counter[str] = Counter()  # failures by reward
        self._told: Counter[str] = Counter()  # what `judge_counts` has given before
        self._pending: Counter[str] | None = None  # verdicts inside `as_one_call`

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.grader.close()
        self.code.close()

    def prepare(self, problems: Sequence[Problem]) -> None:
        """Start what these problems need: a sandbox that is missing is an error now, not in an hour."""
        if any(problem.kind == "code" for problem in problems):
            self.code.start()

    @property
    def sandbox(self) -> SandboxInfo | None:
        """What programs run in; None before the first one."""
        return self.code.info

    def uses(self, name: str) -> bool:
        """Whether problems of any kind have a weight on this reward."""
        return any(weights[name] for weights in self._weights.values())

    def judge_counts(self) -> dict[str, float]:
        """What the judges were asked and said since the last call, to be summed over ranks; nothing
        where there is none."""
        if not self.chats:
            return {}
        now = self.judge_totals()
        values = {name: float(now[name] - self._told[name]) for name in JUDGE_COUNTS}
        self._told = now
        return values

    def judge_totals(self) -> Counter[str]:
        """What the judges were asked and said since the start."""
        now: Counter[str] = Counter()
        for counted in (self.judge and self.judge.verdicts, self.pairwise and self.pairwise.counts):
            now.update(counted or {})
        for chat in self.chats:
            now.update(chat.counts)
        return now

    @property
    def chats(self) -> list[ChatModel]:
        """The models that the judges ask, each once."""
        chats = [judge.chat for judge in (self.judge, self.pairwise) if judge is not None]
        return chats[:1] if len(chats) == 2 and chats[0] is chats[1] else chats

    @property
    def judge_name(self) -> str:
        """The model that judges; "" without one."""
        return ", ".join(chat.name for chat in self.chats)

    def score(self, groups: list[RolloutGroup], *, step_from_end: int | None = None) -> None:
        """Give every completion of every group its `Reward`.

        `step_from_end` counts the steps still to come (0 is the last one); where the config sets
        `preference_last_steps`, preference rewards are off before those steps.
        """
        rows = [(group, completion) for group in groups for completion in group.completions]
        boundary("reward", f"{len(rows)} completions")
        graded = self._graders().grade([(group.problem, c) for group, c in rows])
        parts: list[dict[str, float | None]] = []
        for (group, completion), grade in zip(rows, graded, strict=True):
            parts.append(self._rule_parts(group.problem, completion, grade))
        self._add_preference(rows, parts, step_from_end)
        self._add_pairwise(rows, parts, step_from_end)
        self._add_extra(rows, parts)
        rewards = [
            Reward(
                total=self.total(p, group.problem.kind),
                parts=p,
                verdict=None if grade is None else grade.verdict,
                answer=None if grade is None else grade.answer,
                detail={} if grade is None else grade.detail,
            )
            for (group, _), p, grade in zip(rows, parts, graded, strict=True)
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
                f"(more than {self.max_error_share:.0%}); the rewards mean nothing{self._last_error()}"
            )

    def _last_error(self) -> str:
        last = [chat.last_error for chat in self.chats if chat.last_error]
        return f". The judge's last failure: {last[0]}" if last else ""

    def total(self, parts: Mapping[str, float | None], kind: str = "math") -> float:
        """The sum over the parts that apply, by the weights for problems of this kind."""
        weights = dict(self._weights[kind])
        weights.update({name: weight for name, (_, weight) in self.extra.items()})
        return math.fsum(weights[n] * value for n, value in parts.items() if value is not None)

    def _graders(self) -> Graders:
        return Graders(
            self.template,
            self.grader,
            self.code,
            self.judge,
            self.pairwise,
            self.prompt_opens_think,
            self.config.math_batch_timeout,
        )

    def _rule_parts(
        self, problem: Problem, completion: Completion, grade: Grade | None
    ) -> dict[str, float | None]:
        c, protocol, token = self.config, self.template.protocol, self.template.special_token
        opens, weights = self.prompt_opens_think, self._weights[problem.kind]
        parts: dict[str, float | None] = {}
        if grade is not None:
            # an infrastructure failure is no zero: the part does not apply, the verdict says why
            parts["accuracy"] = grade.credit
        if grade is not None or problem.kind == "general":  # DeepSeek-R1, equation 10: both kinds
            parts["format"] = format_reward(
                completion.text, protocol, token, prompt_opens_think=opens
            )
        # measured at weight 0 too: the drift of the language is what R1-Zero is watched for
        reasoning = self._graders().split(completion)
        parts["language"] = None
        if reasoning.reasoning and (
            weights["language"] or knows_language(problem.language, c.lexicon)
        ):
            parts["language"] = language_consistency(
                reasoning.reasoning, problem.language, lexicon=c.lexicon
            )
        num_tokens = len(completion.token_ids)
        if weights["overlong"]:
            parts["overlong"] = overlong_penalty(
                num_tokens, self.max_completion_tokens, c.overlong_cache
            )
        if weights["repetition"]:
            parts["repetition"] = repetition_penalty(completion.token_ids, self.repetition_ngram)
        return parts

    def _add_preference(
        self,
        rows: list[tuple[RolloutGroup, Completion]],
        parts: list[dict[str, float | None]],
        step_from_end: int | None,
    ) -> None:
        if self.preference is None or self._waits(step_from_end):
            return
        if at := self._weighted(rows, "helpfulness"):
            scores = self.preference.score_helpfulness(
                [rows[i][0].problem.prompt for i in at],
                [rows[i][1].text for i in at],
                prompt_opens_think=self.prompt_opens_think,
            )
            if scores is not None:
                scores = _lowest_where_none(scores, [id(rows[i][0]) for i in at])
                for i, score in zip(at, scores, strict=True):
                    parts[i]["helpfulness"] = score
        if at := self._weighted(rows, "safety"):
            prompts = [rows[i][0].problem.prompt for i in at]
            scores = self.preference.score_safety(prompts, [rows[i][1].text for i in at])
            for i, score in zip(at, scores or [], strict=True):
                parts[i]["safety"] = score

    def _waits(self, step_from_end: int | None) -> bool:
        """Whether preference rewards are not on yet in this step."""
        return step_from_end is not None and 0 < self.config.preference_last_steps <= step_from_end

    def _weighted(self, rows: list[tuple[RolloutGroup, Completion]], name: str) -> list[int]:
        """The rows whose problem's kind has a weight on this reward."""
        return [i for i, (group, _) in enumerate(rows) if self._weights[group.problem.kind][name]]

    def _add_pairwise(
        self,
        rows: list[tuple[RolloutGroup, Completion]],
        parts: list[dict[str, float | None]],
        step_from_end: int | None,
    ) -> None:
        """The summary against the reference answer: 1 won, 0.5 tie, 0 lost; a response without a
        summary has lost. Where the judge failed it earns the mean of its group's others."""
        if self.pairwise is None or self._waits(step_from_end):
            return
        at = [i for i in self._weighted(rows, "judge") if rows[i][0].problem.answer]
        if not at:
            return
        problems = [rows[i][0].problem for i in at]
        split = self._graders().split
        summaries = [split(rows[i][1]).summary or "" for i in at]
        comparisons = self.pairwise.compare(
            [(p.prompt, s, p.answer or "") for p, s in zip(problems, summaries, strict=True)]
        )
        scores = [c.score for c in comparisons]
        failed = sum(score is None for score in scores)
        self.errors["judge"] += failed
        if len(at) >= MIN_BREAKER_VERDICTS and failed > self.max_error_share * len(at):
            raise RuntimeError(
                f"the judge failed on {failed} of {len(at)} comparisons (more than "
                f"{self.max_error_share:.0%}); the rewards mean nothing. The last failure: "
                f"{self.pairwise.chat.last_error}"
            )
        scores = _mean_where_none(scores, [id(rows[i][0]) for i in at])
        for i, score in zip(at, scores, strict=True):
            parts[i]["judge"] = score

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
            boundary("reward", name)
            scores = self._functions[name](
                function,
                prompts=[p.prompt for p in problems],
                completions=[completion.text for _, completion in rows],
                completion_ids=[list(completion.token_ids) for _, completion in rows],
                **columns,
            )
            if scores is None:  # it failed, which was said
                self.errors[name] += len(rows)
                scores = [None] * len(rows)
            if len(scores) != len(rows):
                raise ValueError(
                    f"reward {name!r} returned {len(scores)} scores for {len(rows)} completions"
                )
            scores = [_number(name, s, problems[i].id) for i, s in enumerate(scores)]
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


def _number(name: str, score: Any, problem_id: str) -> float | None:
    """A user's score; its zero-dimensional arrays and tensors too."""
    if score is None:
        return None
    if not isinstance(score, str | bytes | complex):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(score)
    raise ValueError(
        f"reward {name!r} returned {score!r} ({type(score).__name__}) for problem {problem_id!r}; "
        "a score is a number, or None where the reward does not apply"
    )


def check_problems(
    problems: Sequence[Problem], config: RewardConfig, *, has_judge: bool = True
) -> None:
    """ValueError for problems the configured rewards cannot score, before the first step."""
    paid = {kind for kind in KINDS if config.weights(kind)["language"]}
    first = {p.language: p.id for p in reversed(problems) if p.kind in paid}
    for language, problem_id in sorted(first.items()):
        try:
            check_language(language, config.lexicon)
        except ValueError as error:
            raise ValueError(
                f"problem {problem_id!r}: {error}; set its 'language' to one of them, "
                "or rewards.language to 0"
            ) from None
    for problem in problems:
        try:
            check_problem(problem)
        except ValueError as error:
            raise ValueError(f"problem {problem.id!r}: {error}") from None
        if problem.kind == "code":
            read = read_code_problem(
                problem.meta, problem.meta.get("code_prompt") or problem.prompt
            )
            if read.language == "cpp" and not find_compiler():
                raise ValueError(
                    f"problem {problem.id!r} is in C++, which needs g++ in /usr/bin or /usr/local/bin "
                    "(apt-get install g++); there is none"
                )
        if problem.kind in JUDGED_KINDS and not has_judge:
            raise needs_judge(problem)
        if problem.kind in config.by_kind and not any(config.weights(problem.kind).values()):
            raise ValueError(
                f"problem {problem.id!r} has no reward: every weight of "
                f"rewards.by_kind.{problem.kind} is 0"
            )


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


def _mean_where_none(scores: list[float | None], groups: list[int]) -> list[float | None]:
    """What a judge failed on earns the mean of its group's others; None where it failed on all."""
    known: dict[int, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        if score is not None:
            known.setdefault(group, []).append(score)
    return [
        score if score is not None else math.fsum(known[g]) / len(known[g]) if g in known else None
        for g, score in zip(groups, scores, strict=True)
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


def judge_row(counts: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from `judge_counts`, summed over ranks; nothing where nobody was asked."""
    if not any(counts.values()):
        return {}
    row = {f"judge/{name}": counts[name] for name in ("requests", "retries", "cached", "failed")}
    row["judge/tokens"] = counts["prompt_tokens"] + counts["completion_tokens"]
    pairs = pairwise_metrics(Counter({name: int(n) for name, n in counts.items()}))
    return row | {f"judge/{name}": value for name, value in pairs.items()}
