r"""The accuracy reward of mathematics: what was answered, and whether it is the gold answer.

Tier 1 (answers.py) is typed, exact and takes microseconds. Tier 2 (symbolic.py) asks sympy, by way
of math-verify, in a worker process that is killed at the deadline. A verdict, never a number:
correct | wrong | no_answer | unparseable | timeout | error.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from r1fast.protocol import (
    END_THINK,
    SECOND_ANSWER,
    SPECIAL_TOKEN,
    TEXT_AFTER_ANSWER,
    THINK,
    boxes,
    read_answer_block,
    split_completion,
)
from r1fast.rewards import answers, latex
from r1fast.rewards.algebra import TooBig, Undefined
from r1fast.rewards.equivalence import same, same_bounded
from r1fast.rewards.symbolic import SymbolicPool
from r1fast.types import Verdict

SEVERAL_BOXES = "several different boxes"
# what a policy must not get away with: more than one answer is wrong, not unanswered
_WRONG_FAULTS = frozenset({SECOND_ANSWER, TEXT_AFTER_ANSWER, SEVERAL_BOXES})
_MAX_CACHE = 1 << 16


@dataclass(frozen=True, slots=True)
class Extracted:
    """The answer that stands in the protocol's place, or why there is none."""

    answer: str | None
    fault: str = ""

    @property
    def verdict(self) -> Verdict | None:
        """The verdict where there is no answer to grade."""
        if self.answer is not None:
            return None
        return "wrong" if self.fault in _WRONG_FAULTS else "no_answer"


def extract_answer(
    text: str,
    protocol: str | None = None,
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
    several_boxes: str = "wrong",
) -> Extracted:
    r"""The final answer of a completion.

    It stands in <answer>, or in the summary: the content of \boxed{} where there is one. Boxes in
    the reasoning never count. Two different boxes are wrong, `several_boxes="last"` takes the last.
    `protocol=None` goes by the tags the text has; a text without tags and boxes is the answer.
    """
    if several_boxes not in ("wrong", "last"):
        raise ValueError(f"several_boxes must be 'wrong' or 'last', got {several_boxes!r}")
    bare = False
    if protocol is not None:
        parts = split_completion(
            text, protocol, special_token, prompt_opens_think=prompt_opens_think
        )
        region, fault = parts.answer, parts.fault
        bare = protocol == "think_answer"
    elif "<answer>" in (tail := _behind_thought(text) or ""):
        region, fault = read_answer_block(tail)
        bare = True
    else:
        region = _behind_thought(text)
        fault = f"no {END_THINK}" if region is None else ""
        bare = region == text
    if region is None or not region.strip():
        return Extracted(None, fault or "no answer")
    found = boxes(region)
    if not found:
        answer = region.strip() if bare else _stated(region)
        return Extracted(answer, "" if answer else r"no \boxed{} in the summary")
    if several_boxes == "wrong" and any(_differ(found[-1], other) for other in found[:-1]):
        return Extracted(None, SEVERAL_BOXES)
    return Extracted(found[-1] or None, "" if found[-1] else "an empty box")


def _behind_thought(text: str) -> str | None:
    """What stands behind the reasoning; None where a thought never ends."""
    if END_THINK in text:
        return text.rpartition(END_THINK)[2]
    return None if THINK in text else text


def _stated(region: str) -> str | None:
    """The answer of a summary without a box: "The answer is 7", or nothing but the answer."""
    lines = [line.strip() for line in region.strip().splitlines() if line.strip()]
    if latex.ANSWER_PREFIX.match(lines[-1]):
        return latex.ANSWER_PREFIX.sub("", lines[-1], count=1).strip() or None
    if len(lines) == 1 and len(lines[0].split()) <= 3:
        return lines[0]
    try:
        readable = len(lines) == 1 and answers.read_answer(lines[0]).kind != "text"
    except ValueError:
        readable = False
    return lines[0] if readable else None


def _differ(a: str, b: str) -> bool:
    if a == b:
        return False
    try:
        return same(answers.read_answer(a), answers.read_answer(b)) is not True
    except ValueError:
        return True


def parse_gold(gold: str) -> str:
    """The gold answer as it will be compared; ValueError where no answer could ever match it.

    A gold beyond the exact grammar (an integral, a set-builder) is kept: tier 2 or equal text
    decides. Empty, unbalanced and oversized golds are not.
    """
    if not isinstance(gold, str):
        raise ValueError(f"a gold answer must be a string, got {gold!r:.80}")
    if len(gold) > latex.MAX_LENGTH:
        raise ValueError(f"gold answer of {len(gold)} characters; at most {latex.MAX_LENGTH}")
    if gold.strip().casefold() in ("nan", "null", "none", "inf", "-inf"):
        raise ValueError(f"gold answer {gold!r} is a missing value, not an answer")
    try:
        answers.read_answer(gold)
    except TooBig:
        return gold
    except (latex.Unreadable, Undefined) as error:
        if not latex.is_balanced(gold) or isinstance(error, Undefined):
            raise ValueError(f"gold answer {gold!r:.80} cannot be read: {error}") from None
        if not any(c.isalnum() for c in gold) and "\\" not in gold.rstrip("\\"):
            raise ValueError(f"gold answer {gold!r:.80} holds nothing to compare") from None
    return gold


@dataclass(frozen=True, slots=True)
class Graded:
    verdict: Verdict
    answer: str | None


class MathReward:
    """Grades answers; thread safe, to be closed. Also a TRL reward function.

    `timeout` is the wall clock of one symbolic comparison, `num_workers` the processes for them.
    `symbolic=False`, or no math-verify installed: tier 1 alone answers.
    """

    __name__ = "math_accuracy"  # TRL names the column of a reward by it

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        num_workers: int = 1,
        symbolic: bool = True,
        several_boxes: str = "wrong",
        memory_bytes: int = 2 << 30,
    ):
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self.several_boxes = several_boxes
        self.pool = SymbolicPool(timeout, num_workers, memory_bytes) if symbolic else None
        self.counts: Counter[str] = Counter()  # verdicts since the start
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> MathReward:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()

    def __call__(
        self, prompts=None, completions=None, completion_ids=None, *, answer, **columns
    ) -> list[float | None]:
        """TRL's contract: 1.0, 0.0, or None where the row has no gold or the grader failed."""
        texts = [_message_text(c) for c in completions or []]
        if len(answer) != len(texts):
            raise ValueError(f"{len(texts)} completions but {len(answer)} answers")
        scores: list[float | None] = []
        for gold, text in zip(answer, texts, strict=True):
            verdict = "error" if gold is None else self.verify(str(gold), text)
            scores.append(None if verdict == "error" else float(verdict == "correct"))
        return scores

    def verify(self, gold: str, prediction: str) -> Verdict:
        """Grade a text that is an answer, or holds one in tags or boxes."""
        return self.grade(gold, prediction).verdict

    def grade(
        self,
        gold: str,
        text: str,
        protocol: str | None = None,
        special_token: str = SPECIAL_TOKEN,
        *,
        prompt_opens_think: bool = False,
    ) -> Graded:
        """Extract by `protocol` and compare with `gold`."""
        extracted = extract_answer(
            text,
            protocol,
            special_token,
            prompt_opens_think=prompt_opens_think,
            several_boxes=self.several_boxes,
        )
        if extracted.answer is None:
            verdict = extracted.verdict
            assert verdict is not None
        else:
            verdict = self.compare(gold, extracted.answer)
        with self._lock:
            self.counts[verdict] += 1
        return Graded(verdict, extracted.answer)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same: the classes that cons@k votes over."""
        return self.compare(a, b) == "correct"

    def compare(self, gold: str, answer: str) -> Verdict:
        """The verdict on an extracted answer, cached by (gold, answer)."""
        pair = (gold, answer)
        with self._lock:
            if (verdict := self._cache.get(pair)) is not None:
                self._cache.move_to_end(pair)
                return verdict
        verdict = self._compare(gold, answer)
        if verdict not in ("error", "timeout"):  # a machine's failure may pass
            with self._lock:
                self._cache[pair] = verdict
                if len(self._cache) > _MAX_CACHE:
                    self._cache.popitem(last=False)
        return verdict

    def _compare(self, gold: str, answer: str) -> Verdict:
        if len(gold) > latex.MAX_LENGTH or len(answer) > latex.MAX_LENGTH:
            return "unparseable"
        if latex.squeeze(gold) == latex.squeeze(answer):
            return "correct"
        typed_gold = _read(gold)
        typed_answer = _read(answer)
        if isinstance(typed_gold, answers.Answer):
            letter = answers.letter_of(typed_gold)
            if letter is not None and (named := answers.choice_letter(answer)) is not None:
                return "correct" if named == letter else "wrong"
            if isinstance(typed_answer, answers.Answer):
                result = same_bounded(typed_gold, typed_answer)
                if result is not None:
                    return "correct" if result else "wrong"
        if isinstance(typed_gold, answers.Answer) and typed_gold.kind == "text":
            return "wrong"
        for side in (typed_gold, typed_answer):
            if isinstance(side, (TooBig, Undefined)):
                return "unparseable"
        if not (latex.is_symbolic(gold) and latex.is_symbolic(answer)):
            return "unparseable"
        if self.pool is None or not latex.same_cases(gold, answer):
            return "unparseable"
        return self.pool.compare(gold, answer)


def _read(text: str) -> answers.Answer | ValueError:
    try:
        return answers.read_answer(text)
    except ValueError as error:
        return error


def _message_text(completion) -> str:
    """TRL passes a string, or the messages of a conversation."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], dict):
        return str(completion[-1].get("content") or "")
    raise ValueError(f"a completion must be a string or a list of messages, got {completion!r:.80}")
