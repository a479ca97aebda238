"""Verdicts of an evaluation: each kind of problem goes to its grader, rules and judges alike.

    math          rewards/math.py             choice        rewards/choice.py
    if            rewards/instructions.py     code          rewards/code.py, in the sandbox
    qa            a judge with the gold       open          a judge of two answers

Format and language are those of training for every kind. What could not be judged is "error".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from r1fast.evaluate.grader_version import version_of
from r1fast.protocol import split_completion
from r1fast.rewards.choice import grade_choice
from r1fast.rewards.instructions import follows, follows_loosely
from r1fast.rewards.score import RewardScorer
from r1fast.types import Completion, Problem, Reward, RolloutGroup, Verdict

KINDS = ("math", "general", "choice", "if", "code", "qa", "open")
Outcome = Literal["a", "b", "tie", "error"]
Rows = Sequence[tuple[str, str, str]]
CheckAnswers = Callable[[Rows], Sequence[Verdict]]  # of (question, gold, answer)
# of (question, answer a, answer b): which is better, whatever the order in which they were shown
ComparePairs = Callable[[Rows], Sequence[Outcome]]


@dataclass(slots=True)
class EvalReward(Reward):
    """A reward with the further columns of a stored sample."""

    detail: dict = field(default_factory=dict)


class EvalScorer:
    """The rules of training plus the graders that only evaluation has. To be closed.

    `judge` decides on answers of kind qa, `compare` on open ones; programs go to the rules' own `code`
    (rewards.code.CodeReward). A kind whose grader is missing is a ValueError when it comes.
    """

    def __init__(
        self,
        rules: RewardScorer,
        kind: str = "math",
        *,
        judge: CheckAnswers | None = None,
        compare: ComparePairs | None = None,
        judge_name: str = "",
    ):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.rules, self.kind = rules, kind
        self.judge, self.compare = judge, compare
        self.is_slow = kind in ("code", "qa", "open")
        self.version = version_of(kind, judge_name)

    def __enter__(self) -> EvalScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.rules.close()

    @property
    def grader(self):
        return self.rules.grader

    @property
    def sandbox(self):
        """What programs run in; None where none have run."""
        return getattr(self.rules, "sandbox", None)

    @property
    def prompt_opens_think(self) -> bool:
        return self.rules.prompt_opens_think

    def as_one_call(self):
        return self.rules.as_one_call()

    def score(self, groups: list[RolloutGroup]) -> None:
        """Give every completion its reward: verdict, extracted answer, format, language."""
        graders = {
            "choice": self._choice, "if": self._instructions, "code": self._code,
            "qa": self._qa, "open": self._open,
        }  # fmt: skip
        plain = [g for g in groups if g.problem.kind not in graders]
        self.rules.score(plain)
        for kind, grade in graders.items():
            own = [g for g in groups if g.problem.kind == kind]
            if not own:
                continue
            # the rules see general prompts: format and language, and no gold to grade
            shadows = [replace(g, problem=replace(g.problem, kind="general")) for g in own]
            self.rules.score(shadows)
            rows = [(g.problem, c) for g in own for c in g.completions]
            parts = [reward.parts for g in shadows for reward in g.rewards]
            rewards = iter(
                EvalReward(float(verdict == "correct"), part, verdict, answer, detail)
                for (verdict, answer, detail), part in zip(grade(rows), parts, strict=True)
            )
            for group in own:
                group.rewards = [next(rewards) for _ in group.completions]

    def _region(self, completion: Completion) -> str | None:
        """What the user reads, or what stands in <answer>; None where the response has none."""
        template = self.rules.template
        parts = split_completion(
            completion.text, template.protocol, template.special_token,
            prompt_opens_think=self.prompt_opens_think,
        )  # fmt: skip
        text = parts.answer if template.protocol == "think_answer" else parts.summary
        return text if text and text.strip() else None

    def _choice(self, rows: list[tuple[Problem, Completion]]) -> list[tuple]:
        template = self.rules.template
        graded = (
            grade_choice(
                completion.text, problem.answer or "", problem.meta["choices"], template.protocol,
                template.special_token, prompt_opens_think=self.prompt_opens_think,
            )
            for problem, completion in rows
        )  # fmt: skip
        return [(verdict, letter, {}) for verdict, letter in graded]

    def _instructions(self, rows: list[tuple[Problem, Completion]]) -> list[tuple]:
        return [grade_instructions(p, self._region(completion)) for p, completion in rows]

    def _code(self, rows: list[tuple[Problem, Completion]]) -> list[tuple]:
        code: Any = getattr(self.rules, "code", None)
        if code is None:
            raise ValueError("problems of kind code need rewards/code.py, which is not here")
        template = self.rules.template
        futures = [
            code.submit(
                code.problem(problem.meta, problem.meta.get("code_prompt") or problem.prompt),
                completion.text, template.protocol, template.special_token,
                prompt_opens_think=self.prompt_opens_think,
            )
            for problem, completion in rows
        ]  # fmt: skip
        graded = [future.result() for future in futures]
        return [(g.verdict, g.answer, {"share": g.share, "why": g.why}) for g in graded]

    def _qa(self, rows: list[tuple[Problem, Completion]]) -> list[tuple]:
        if self.judge is None:
            raise ValueError("problems of kind qa need a judge: --judge-url and --judge-model")
        answers = [self._region(completion) for _, completion in rows]
        asked = [i for i, answer in enumerate(answers) if answer is not None]
        verdicts: list[Verdict] = ["no_answer"] * len(rows)
        found = self.judge(
            [(question_of(rows[i][0]), rows[i][0].answer or "", answers[i] or "") for i in asked]
        )
        for i, verdict in zip(asked, found, strict=True):
            verdicts[i] = verdict
        return [(v, a, {}) for v, a in zip(verdicts, answers, strict=True)]

    def _open(self, rows: list[tuple[Problem, Completion]]) -> list[tuple]:
        if self.compare is None:
            raise ValueError("problems of kind open need a judge: --judge-url and --judge-model")
        summaries = [self._region(completion) for _, completion in rows]
        baselines = [problem.meta["baseline"] for problem, _ in rows]
        asked = [i for i, summary in enumerate(summaries) if summary is not None]
        outcomes: list[Outcome] = ["b"] * len(rows)  # what never comes to its answer has lost
        found = self.compare(
            [(question_of(rows[i][0]), summaries[i] or "", baselines[i]) for i in asked]
        )
        for i, outcome in zip(asked, found, strict=True):
            outcomes[i] = outcome
        return [graded_pair(*row) for row in zip(outcomes, summaries, baselines, strict=True)]


def question_of(problem: Problem) -> str:
    """The set's own question, without what the prompt says about the form of the answer."""
    return str(problem.meta.get("question") or problem.prompt)


def graded_pair(outcome: Outcome, summary: str | None, baseline: str) -> tuple:
    """(verdict, answer, detail) of our summary as answer a against the baseline as b."""
    names = {"a": "win", "b": "loss", "tie": "tie"}
    detail = {
        "outcome": names.get(outcome, "error"),
        "score": {"a": 1.0, "b": 0.0, "tie": 0.5}.get(outcome),
        "summary_chars": len(summary or ""),
        "baseline_chars": len(baseline),
    }
    verdict: Verdict = {"a": "correct", "b": "wrong", "tie": "wrong"}.get(outcome, "error")
    return ("no_answer" if summary is None else verdict), summary, detail


def grade_instructions(problem: Problem, response: str | None) -> tuple:
    """Strict and loose of every instruction; the verdict is that all are followed strictly."""
    text = response or ""
    asked = list(zip(problem.meta["instructions"], problem.meta["arguments"], strict=True))
    strict = [follows(text, name, arguments) for name, arguments in asked]
    loose = [follows_loosely(text, name, arguments) for name, arguments in asked]
    detail = {
        "instructions": [re.sub(r"^[a-z]{2}:", "", name) for name, _ in asked],
        "followed": strict,
        "followed_loosely": loose,
    }
    if response is None:
        return "no_answer", None, detail
    missed = [n for n, ok in zip(detail["instructions"], strict, strict=True) if not ok]
    return (
        ("wrong" if missed else "correct"),
        (f"missed: {', '.join(missed)}" if missed else "all"),
        detail,
    )
