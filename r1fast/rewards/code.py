"""The accuracy reward of programs: run in a sandbox against tests that the program never sees.

A verdict, never a number alone: correct | wrong | no_answer | unparseable (no compiler takes it) | timeout |
error (we failed; the score is None). Whatever a program does is its own failure, never ours.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from r1fast.metrics import note, warn
from r1fast.protocol import SPECIAL_TOKEN
from r1fast.rewards.code_answer import cpp_standard, extract_code
from r1fast.rewards.code_problem import COLUMNS, MAX_CODE, CodeProblem, read_code_problem
from r1fast.rewards.messages import column_of, message_text
from r1fast.rewards.sandbox import Sandbox, SandboxInfo, TrialResult
from r1fast.types import Verdict


@dataclass(frozen=True, slots=True)
class GradedCode:
    """`share` is the part of the tests that passed; 1.0 exactly where the verdict is correct."""

    verdict: Verdict
    answer: str | None  # the program
    share: float = 0.0
    why: str = ""

    def credit(self, partial: bool = False) -> float:
        return self.share if partial else float(self.verdict == "correct")


class CodeReward:
    """Grades programs in Python and C++; thread safe, to be closed. Also a TRL reward function.

    `timeout` is the seconds of a core of one call or program (a problem's `time_limit` goes before
    it); the clock's may be half as many again and 1 s. `total_timeout` is the seconds of the clock of
    all tests of a completion, once it has a box. What a program is kept from running by others does
    not count, up to four times these limits (more with more than two slots a core), where the verdict
    is `error`. So an endless loop ends after `timeout` on quiet cores. `partial` scores the share of tests that pass and
    runs them all; else a completion is right as a whole, and the first failure ends its tests. What
    isolates the programs: see Sandbox; SandboxUnavailable at the first use where nothing can.
    """

    __name__ = "code_accuracy"  # TRL names the column of a reward by it

    def __init__(
        self,
        *,
        timeout: float = 4.0,
        total_timeout: float = 30.0,
        memory_mib: int = 512,
        partial: bool = False,
        num_workers: int = 0,
        rung: str = "auto",
        allow_unsafe_sandbox: bool = False,
        protocol: str | None = None,
    ):
        if timeout <= 0 or total_timeout <= 0:
            raise ValueError(f"timeouts must be above 0 seconds, got {timeout}, {total_timeout}")
        self.timeout, self.total_timeout = timeout, total_timeout
        self.memory_mib, self.partial, self.protocol = memory_mib, partial, protocol
        self.sandbox = Sandbox(
            rung=rung,
            allow_unsafe=allow_unsafe_sandbox,
            num_slots=num_workers,
            memory_bytes=memory_mib << 20,
        )
        self.counts: Counter[str] = Counter()  # verdicts since the start
        self._lock = threading.Lock()
        self._info: SandboxInfo | None = None
        self._problems: dict[str, CodeProblem] = {}

    def __enter__(self) -> CodeReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sandbox.close()

    def start(self) -> SandboxInfo:
        """Start the sandbox and say, once, what it is made of."""
        info = self.sandbox.start()
        with self._lock:
            first, self._info = self._info is None, info
        if first:
            text = f"generated programs run in the sandbox {info.description}"
            skipped = "; ".join(f"{name}: {why}" for name, why in info.skipped.items())
            if info.rung == "unsafe":
                warn(
                    "NO SANDBOX: generated programs run as this user, with its files, secrets and "
                    f"network (allow_unsafe_sandbox). Not possible here: {skipped}"
                )
            elif info.level:
                why = (
                    f"Better ones are not possible here: {skipped}"
                    if skipped
                    else "It was asked for"
                )
                warn(f"{text}. {why}")
            else:
                note(text)
        return info

    @property
    def info(self) -> SandboxInfo | None:
        """What the sandbox is made of; None before its first use."""
        return self._info

    def __call__(
        self, prompts=None, completions=None, completion_ids=None, **columns: Any
    ) -> list[float | None]:
        """TRL's contract; the columns are those of code_problem.py, one entry a completion.

        A share of 0 to 1, or None where the row has no tests or the sandbox failed. ValueError for a
        row whose tests cannot be read.
        """
        texts = [message_text(c) for c in completions or []]
        known = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
        for name, values in known.items():
            column_of(name, values, len(texts))
        futures: list[Future[GradedCode] | None] = []
        for i, text in enumerate(texts):
            row = {name: values[i] for name, values in known.items() if values[i] is not None}
            if not row.keys() & {"tests", "test_list", "test", "input_output"}:
                futures.append(None)
                continue
            try:
                problem = self.problem(row, message_text(prompts[i]) if prompts else "")
            except ValueError as error:
                raise ValueError(f"row {i}: {error}; correct the row, or drop it") from None
            futures.append(self.submit(problem, text, self.protocol))
        grades = [None if future is None else future.result() for future in futures]
        for grade in grades:
            if grade is not None and grade.verdict == "error":
                warn(f"a program has no verdict, and no reward: {grade.why}")
        return [
            None if g is None or g.verdict == "error" else g.credit(self.partial) for g in grades
        ]

    def problem(self, columns: Mapping[str, Any], prompt: str = "") -> CodeProblem:
        """`read_code_problem`, once for each row: the G completions of a group share one."""
        key = json.dumps([{n: columns[n] for n in COLUMNS if n in columns}, prompt], default=repr)
        with self._lock:
            problem = self._problems.get(key)
        if problem is None:
            problem = read_code_problem(columns, prompt)
            with self._lock:
                if len(self._problems) >= 4096:
                    self._problems.clear()
                self._problems[key] = problem
        return problem

    def grade(self, problem: CodeProblem, text: str, *args, **kwargs) -> GradedCode:
        """Extract the program and run it: `submit`, with its arguments, and wait."""
        return self.submit(problem, text, *args, **kwargs).result()

    def submit(
        self,
        problem: CodeProblem,
        text: str,
        protocol: str | None = None,
        special_token: str = SPECIAL_TOKEN,
        *,
        prompt_opens_think: bool = False,
    ) -> Future[GradedCode]:
        """Extract the program by `protocol` and run it; as many run at once as the sandbox has slots."""
        extracted = extract_code(
            text, problem.language, protocol, special_token, prompt_opens_think=prompt_opens_think
        )
        if extracted.answer is None:
            return self._decided(
                GradedCode(extracted.verdict or "no_answer", None, 0.0, extracted.fault)
            )
        return self.run(problem, extracted.answer, cpp_standard(extracted.tag))

    def run(self, problem: CodeProblem, code: str, standard: str = "c++17") -> Future[GradedCode]:
        """Run a program as it is. ValueError where a C++ problem meets a machine without g++.

        `standard` is what C++ is compiled as: c++17, c++20 or c++23, or the next lower one that the
        compiler knows.
        """
        try:
            size = len(code.encode("utf-8"))
        except UnicodeEncodeError:
            return self._decided(GradedCode("unparseable", code, 0.0, "half a surrogate pair"))
        if size > MAX_CODE:
            return self._decided(GradedCode("unparseable", code, 0.0, f"{size} bytes of code"))
        if "\0" in code:
            return self._decided(GradedCode("unparseable", code, 0.0, "a NUL character"))
        info = self.start()
        if problem.language == "cpp" and not info.compiler:
            raise ValueError(
                "C++ problems need g++ in /usr/bin or /usr/local/bin (apt-get install g++); there is none"
            )
        job = problem.job(
            code,
            timeout=self.timeout,
            total_timeout=self.total_timeout,
            memory_mib=self.memory_mib,
            stop_early=not self.partial,
        ) | {"standard": standard}
        graded: Future[GradedCode] = Future()

        def finish(done: Future[TrialResult]) -> None:
            try:
                grade = judged(done.result(), len(problem.tests), code)
                self._count(grade)
            except Exception as error:  # nobody may wait for ever
                grade = GradedCode("error", code, 0.0, f"{type(error).__name__}: {error}")
            graded.set_result(grade)

        self.sandbox.submit(job).add_done_callback(finish)
        return graded

    def _decided(self, grade: GradedCode) -> Future[GradedCode]:
        future: Future[GradedCode] = Future()
        self._count(grade)
        future.set_result(grade)
        return future

    def _count(self, grade: GradedCode) -> None:
        with self._lock:
            self.counts[grade.verdict] += 1


def judged(trial: TrialResult, num_tests: int, code: str) -> GradedCode:
    """The verdict on a trial: the first test that did not pass decides which."""
    if trial.error:
        return GradedCode("error", code, 0.0, trial.error)
    if trial.loaded != "yes" and not trial.tests:
        verdict: Verdict = "wrong"
        if trial.loaded in ("unparseable", "timeout"):
            verdict = trial.loaded  # type: ignore[assignment]
        return GradedCode(verdict, code, 0.0, trial.why)
    failed = next((test for test in trial.tests if test["outcome"] != "pass"), None)
    if failed is None and len(trial.tests) == num_tests > 0:
        return GradedCode("correct", code, 1.0)
    if failed is None:
        return GradedCode("error", code, 0.0, f"{len(trial.tests)} of {num_tests} tests came back")
    share = sum(test["share"] for test in trial.tests) / num_tests
    return GradedCode(failed["outcome"], code, min(share, 1 - 1e-9), failed["why"])
