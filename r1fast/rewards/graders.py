"""The verdict of each kind of problem: rules where they can decide, tests of programs, judges.

    math      math.py, the gold answer          choice    choice.py, the gold's letter among `choices`
    code      code.py, tests in the sandbox     if        instructions.py, all that the row lists
    qa        judge.py, with the gold           open      pairwise.py, against the row's `baseline`
    general   nothing: no verdict

What could not be judged is "error", and has no credit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from r1fast.config import TemplateConfig
from r1fast.protocol import Parts, split_completion
from r1fast.rewards.choice import check_choice, grade_choice
from r1fast.rewards.code import CodeReward, GradedCode
from r1fast.rewards.code_problem import COLUMNS, read_code_problem
from r1fast.rewards.instructions import check_instructions, follows, follows_loosely
from r1fast.rewards.judge import Judge
from r1fast.rewards.math import MathReward, parse_gold
from r1fast.rewards.pairwise import Comparison, PairwiseJudge
from r1fast.types import Completion, Problem, Verdict

JUDGED_KINDS = ("qa", "open")
GRADED_BY = {  # the columns besides the answer that decide on a verdict
    "code": (*COLUMNS, "code_prompt"),
    "choice": ("choices",),
    "if": ("instructions", "arguments"),
    "qa": ("question",),
    "open": ("question", "baseline"),
}
Row = tuple[Problem, Completion]


@dataclass(frozen=True, slots=True)
class Grade:
    """`credit` is what the accuracy reward pays, from 0 to 1; None where the grader failed."""

    verdict: Verdict
    answer: str | None
    credit: float | None
    detail: dict = field(default_factory=dict)  # further columns of a stored sample


@dataclass(frozen=True, slots=True)
class Graders:
    """Who decides on what. `deadline` is the seconds of a call's mathematics."""

    template: TemplateConfig
    math: MathReward
    code: CodeReward
    judge: Judge | None = None
    pairwise: PairwiseJudge | None = None
    prompt_opens_think: bool = False
    deadline: float | None = None

    def grade(self, rows: Sequence[Row]) -> list[Grade | None]:
        """A grade for each row, None of general prompts. ValueError where a judge is missing.

        Programs run beside each other, as many as the sandbox takes, and beside all else.
        """
        graders = {"math": self._math, "choice": self._choice, "if": self._instructions,
                   "qa": self._qa, "open": self._open}  # fmt: skip
        at: dict[str, list[int]] = {}
        running: dict[int, Future[GradedCode]] = {}
        for i, (problem, completion) in enumerate(rows):
            if problem.kind == "code":
                running[i] = self._submit(problem, completion)
            elif problem.kind != "general" and (
                problem.kind != "math" or problem.answer is not None
            ):
                at.setdefault(problem.kind, []).append(i)
        graded: list[Grade | None] = [None] * len(rows)
        for kind, own in at.items():
            for i, grade in zip(own, graders[kind]([rows[i] for i in own]), strict=True):
                graded[i] = grade
        for i, future in running.items():
            done = future.result()
            credit = None if done.verdict == "error" else done.credit(self.code.partial)
            detail = {"share": done.share, "why": done.why}
            graded[i] = Grade(done.verdict, done.answer, credit, detail)
        return graded

    def split(self, completion: Completion) -> Parts:
        return split_completion(completion.text, *self._place(), prompt_opens_think=self.prompt_opens_think)  # fmt: skip

    def _place(self) -> tuple[str, str]:
        return self.template.protocol, self.template.special_token

    def _submit(self, problem: Problem, completion: Completion) -> Future[GradedCode]:
        # a preset words its prompts, and keeps the function's own head
        head = problem.meta.get("code_prompt") or problem.prompt
        return self.code.submit(
            self.code.problem(problem.meta, head), completion.text, *self._place(),
            prompt_opens_think=self.prompt_opens_think,
        )  # fmt: skip

    def _math(self, rows: list[Row]) -> list[Grade]:
        graded = self.math.grade_all(
            [(problem.answer or "", completion.text) for problem, completion in rows],
            *self._place(),
            prompt_opens_think=self.prompt_opens_think,
            deadline=self.deadline,
        )
        return [plain_grade(g.verdict, g.answer) for g in graded]

    def _choice(self, rows: list[Row]) -> list[Grade]:
        return [
            plain_grade(*grade_choice(
                completion.text, problem.answer or "", problem.meta["choices"], *self._place(),
                prompt_opens_think=self.prompt_opens_think,
            ))
            for problem, completion in rows
        ]  # fmt: skip

    def _instructions(self, rows: list[Row]) -> list[Grade]:
        return [grade_instructions(problem, self._response(c)) for problem, c in rows]

    def _qa(self, rows: list[Row]) -> list[Grade]:
        if self.judge is None:
            raise needs_judge(rows[0][0])
        answers = [self.split(completion).answer for _, completion in rows]
        verdicts = self.judge.judge_all(
            [(question_of(p), p.answer or "", a or "") for (p, _), a in zip(rows, answers, strict=True)]
        )  # fmt: skip
        return [plain_grade(v, a) for v, a in zip(verdicts, answers, strict=True)]

    def _open(self, rows: list[Row]) -> list[Grade]:
        if self.pairwise is None:
            raise needs_judge(rows[0][0])
        responses = [self._response(completion) for _, completion in rows]
        baselines = [baseline_of(problem) or "" for problem, _ in rows]
        found = self.pairwise.compare(
            [(question_of(p), r or "", b) for (p, _), r, b in zip(rows, responses, baselines, strict=True)]
        )  # fmt: skip
        return [graded_pair(*row) for row in zip(found, responses, baselines, strict=True)]

    def _response(self, completion: Completion) -> str | None:
        """What the user reads, or what stands in <answer>; None where the response has none."""
        parts = self.split(completion)
        text = parts.answer if self.template.protocol == "think_answer" else parts.summary
        return text if text and text.strip() else None


def plain_grade(verdict: Verdict, answer: str | None) -> Grade:
    return Grade(verdict, answer, None if verdict == "error" else float(verdict == "correct"))


def question_of(problem: Problem) -> str:
    """The set's own question, without what the prompt says about the form of the answer."""
    return str(problem.meta.get("question") or problem.prompt)


def baseline_of(problem: Problem) -> str | None:
    """What an open answer is compared with: the row's `baseline`, else its answer."""
    return problem.meta.get("baseline") or problem.answer


def graded_pair(comparison: Comparison, response: str | None, baseline: str) -> Grade:
    """The response as `a` against the baseline as `b`; one that never comes to its answer has lost.

    `grades` has the judge's two grades of the response, shown first and second; it is None where
    nobody was asked, as of an empty response or one equal to the baseline.
    """
    outcome = {"a": "win", "b": "loss"}.get(comparison.winner, comparison.winner)
    asked = response is not None and response.strip() != baseline.strip()
    detail = {
        "outcome": outcome,
        "score": comparison.score,
        "grades": [comparison.shown_first, comparison.shown_second] if asked else None,
        "summary_chars": len(response or ""),
        "baseline_chars": len(baseline),
    }
    verdict: Verdict = "error" if outcome == "error" else "correct" if outcome == "win" else "wrong"
    if response is None:
        verdict = "no_answer"
    return Grade(verdict, response, comparison.score, detail)


def grade_instructions(problem: Problem, response: str | None) -> Grade:
    """Strict and loose of every instruction; the verdict is that all are followed strictly."""
    text = response or ""
    asked = list(zip(problem.meta["instructions"], problem.meta["arguments"], strict=True))
    strict = [follows(text, name, arguments) for name, arguments in asked]
    loose = [follows_loosely(text, name, arguments) for name, arguments in asked]
    names = [re.sub(r"^[a-z]{2}:", "", name) for name, _ in asked]
    detail = {"instructions": names, "followed": strict, "followed_loosely": loose}
    if response is None:
        return Grade("no_answer", None, 0.0, detail)
    missed = [name for name, ok in zip(names, strict, strict=True) if not ok]
    if missed:
        return Grade("wrong", f"missed: {', '.join(missed)}", 0.0, detail)
    return Grade("correct", "all", 1.0, detail)


def check_problem(problem: Problem) -> None:
    """ValueError for a gold, tests, options or instructions that cannot be read."""
    if problem.kind == "code":
        read_code_problem(problem.meta, problem.meta.get("code_prompt") or problem.prompt)
    elif problem.kind == "choice":
        check_choice(problem.answer, problem.meta.get("choices"))
    elif problem.kind == "if":
        check_instructions(problem.meta.get("instructions"), problem.meta.get("arguments"))
    elif problem.kind == "open":
        baseline = baseline_of(problem)
        if not isinstance(baseline, str) or not baseline.strip():
            raise ValueError(
                "a problem of kind open needs a 'baseline' (or an answer), the text that answers "
                f"are compared with, got {baseline!r:.80}"
            )
    elif problem.kind == "math" and problem.answer is not None:
        parse_gold(problem.answer)


def needs_judge(problem: Problem) -> ValueError:
    """What is said of a problem that only a judge decides on, where there is none."""
    return ValueError(
        f"problem {problem.id!r} is of kind {problem.kind}, which a judge decides: set judge.url and "
        "judge.model (or judge.path)"
    )
