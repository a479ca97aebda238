r"""The accuracy reward of mathematics: what was answered, and whether it is the gold answer.

Tier 1 (answers.py) is typed, exact and takes microseconds. Tier 2 (symbolic.py) asks sympy, by way
of math-verify, in a worker process that is killed at the deadline. A verdict, never a number:
correct | wrong | no_answer | unparseable | timeout | error.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from r1fast.metrics import warn
from r1fast.protocol import (
    END_THINK,
    SECOND_ANSWER,
    SPECIAL_TOKEN,
    TEXT_AFTER_ANSWER,
    THINK,
    answer_region,
    box_spans,
)
from r1fast.rewards import answers, latex
from r1fast.rewards.algebra import TooBig, Undefined
from r1fast.rewards.equivalence import same, same_bounded
from r1fast.rewards.messages import message_text
from r1fast.rewards.symbolic import SymbolicPool
from r1fast.types import Verdict

SEVERAL_BOXES = "several different boxes"  # or #### lines
NOT_THE_BOX = "the box is a part of an expression, or taken back"
# -\boxed{7}, 2\cdot\boxed{7}, \frac{1}{\boxed{7}}; "it is not \boxed{7}"
_BEFORE_BOX = re.compile(
    r"(?:[-+/^]|[\d)}=][ ]*[-+/^*][ ]+|\d\*|\\(?:cdot|times|div|pm|mp|ne|neq|not)[ ]*|\\sqrt\{|[\^_]\{"
    r"|\\[dt]?frac\{[^{}]*(?:\}\{)?[^{}]*|(?:\b(?:not|never)|n't|≠)(?:\s+equal(?:\s+to)?)?[\s$]*(?:\\[(\[])?\s*)\Z"
)
# \boxed{7}^2, \boxed{7}00, \boxed{7} or 8
_BEHIND_BOX = re.compile(
    r"\d|[ \t]*(?:\^|/|[-+*][ \t]*[\d\\]|\\(?:cdot|times|div|d?frac|sqrt|boxed|framebox|pm)\b)"
    r"|[\s$]*(?:\\[)\]])?[,\s]*(?:or|and/or)\s+(?:maybe\s+|perhaps\s+)?[$\s]*(?:\\[(\[])?\s*[-\d\\]"
)
_MORE = re.compile(r"[ \t$]+-?\d")
_TAKEN_BACK = re.compile(
    r"\b(?:wait|scratch that|correction|I mean|on second thought)\b|\bactually\b[^.]*\d|(?:^|[.!?;]\s+)no\s*[:,.;]|"
    r"\b(?:not|isn't)\s+(?:the\s+)?(?:correct|right)\b|\bis\s+(?:wrong|incorrect)\b", re.IGNORECASE
)  # fmt: skip
_PERCENT = re.compile(r"\s*\\?%")
# what a policy must not get away with: more than one answer is wrong, not unanswered
_WRONG_FAULTS = frozenset({SECOND_ANSWER, TEXT_AFTER_ANSWER, SEVERAL_BOXES, NOT_THE_BOX})
_MAX_CACHE = 1 << 16
# a number and a letter that may be its unit: "3 m", "1.5 L"
_LETTER_UNIT = re.compile(r"(.*[0-9}])\s+(?:[mgshL])(?:\s*\^\s*\{?[23]\}?)?", re.DOTALL)
_EMPHASIS = re.compile(r"\*\*([^*\n]+)\*\*")
_HEADING = re.compile(r"#{1,6}\s+(?=\D)")
_LABEL = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?answer\s*:?", re.IGNORECASE)
_CONNECTIVE = re.compile(r"(?:therefore|thus|so|hence|then|finally)\b,?\s*", re.IGNORECASE)
_JAPANESE_IS = re.compile(r"\s*です\s*[。.]?\Z")
_HASHES = re.compile(r"####\s*(\S.*)")


@dataclass(frozen=True, slots=True)
class Extracted:
    """The answer that stands in the protocol's place, or why there is none."""

    answer: str | None
    fault: str = ""
    tag: str = ""  # of the fenced block that it stood in

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
    the reasoning never count. Two different boxes, or lines behind ####, are wrong; `several_boxes="last"` takes the last.
    `protocol=None` goes by the tags the text has; a text without tags and boxes is the answer.
    """
    if several_boxes not in ("wrong", "last"):
        raise ValueError(f"several_boxes must be 'wrong' or 'last', got {several_boxes!r}")
    region, fault, bare = answer_region(
        text,
        protocol,
        special_token,
        _behind_thought(text),
        prompt_opens_think=prompt_opens_think,
    )
    if region is None or not region.strip():
        return Extracted(None, fault or "no answer")
    spans = box_spans(region)
    if not spans:
        hashed = [m[1] for line in region.splitlines() if (m := _HASHES.fullmatch(line.strip()))]
        if several_boxes == "wrong" and any(_differ(hashed[-1], other) for other in hashed[:-1]):
            return Extracted(None, SEVERAL_BOXES)
        stated = [
            _unprefixed(x) for x in region.splitlines() if latex.ANSWER_PREFIX.match(x.strip())
        ]
        if several_boxes == "wrong" and any(_differ(stated[-1], other) for other in stated[:-1]):
            return Extracted(None, SEVERAL_BOXES)
        answer = _bare(region) if bare else _stated(region)
        return Extracted(answer, "" if answer else r"no \boxed{} in the summary")
    found = [content for content, _, _ in spans]
    if several_boxes == "wrong" and any(_differ(found[-1], other) for other in found[:-1]):
        return Extracted(None, SEVERAL_BOXES)
    answer, start, end = spans[-1]
    before, behind = region[:start], region[end:]
    spoiled = (
        _BEFORE_BOX.search(before[-80:]) or _BEHIND_BOX.match(behind) or _TAKEN_BACK.search(behind)
    )
    if spoiled or (_MORE.match(behind) and any(c.isdigit() for c in answer)):
        return Extracted(None, NOT_THE_BOX)
    if answer and _PERCENT.match(behind):
        answer += r"\%"
    return Extracted(answer or None, "" if answer else "an empty box")


def _behind_thought(text: str) -> str | None:
    """What stands behind the reasoning; None where a thought never ends."""
    if END_THINK in text:
        return text.rpartition(END_THINK)[2]
    return None if THINK in text else text


def _bare(region: str) -> str | None:
    """The answer of a region that is the answer; behind #### in the last line, GSM8K's way."""
    region = region.strip()
    last = region.rpartition("\n")[2].strip()
    if match := _HASHES.fullmatch(last):
        return match[1]
    if "**" in region and "\n" not in region:  # bold, as in **Answer:** 7; 2**3 is a power
        if region.count("**") == 2 and (region[:2] == "**" or "answer" in region.casefold()):
            region = _EMPHASIS.sub(r"\1", region)
    return region


def _stated(region: str) -> str | None:
    """The answer of a summary without a box: "The answer is 7", or nothing but the answer."""
    lines = [_unmarked(line) for line in region.strip().splitlines() if _unmarked(line)]
    if not lines:
        return None
    if match := _HASHES.fullmatch(region.strip().splitlines()[-1].strip()):
        return match[1]
    last = lines[-1]
    if latex.ANSWER_PREFIX.match(last):
        return _unprefixed(last) or None
    if len(lines) > 1 and _LABEL.fullmatch(lines[-2]):  # a heading, and the answer under it
        return last
    if len(lines) == 1 and len(last.split()) <= 3 and not _CONNECTIVE.match(last):
        return last
    last = _CONNECTIVE.sub("", last)
    try:
        readable = len(lines) == 1 and answers.read_answer(last).kind != "text"
    except ValueError:
        readable = False
    return last if readable else None


def _unmarked(line: str) -> str:
    """A line without the marks of Markdown's headings and bold; 2**3 is a power."""
    line = _HEADING.sub("", line.strip())
    return _EMPHASIS.sub(r"\1", line).strip() if not re.search(r"\w\*\*\w", line) else line


def _unprefixed(line: str) -> str:
    """7 of "The answer is 7"."""
    return _JAPANESE_IS.sub("", latex.ANSWER_PREFIX.sub("", line.strip(), count=1)).strip()


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


@lru_cache(maxsize=1 << 12)
def _gold_fault(gold: str) -> str:
    try:
        parse_gold(gold)
    except ValueError as error:
        return str(error)
    return ""


@dataclass(frozen=True, slots=True)
class Graded:
    verdict: Verdict
    answer: str | None


class MathReward:
    """Grades answers; thread safe, to be closed. Also a TRL reward function.

    `timeout` is the wall clock of one symbolic comparison, `cpu_timeout` its processor time,
    `num_workers` the processes for them.
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
        cpu_timeout: float = 0.6,
    ):
        for name, value in (("timeout", timeout), ("cpu_timeout", cpu_timeout)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {value}")
        self.several_boxes = several_boxes
        self.pool = None
        if symbolic:
            self.pool = SymbolicPool(timeout, num_workers, memory_bytes, cpu_timeout)
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
        texts = [message_text(c) for c in completions or []]
        if len(answer) != len(texts):
            raise ValueError(f"{len(texts)} completions but {len(answer)} answers")
        rows = [(str(g), t) for g, t in zip(answer, texts, strict=True) if g is not None]
        graded = iter(self.grade_all(rows))
        verdicts = ["error" if gold is None else next(graded).verdict for gold in answer]
        return [None if v == "error" else float(v == "correct") for v in verdicts]

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
        rows = [(gold, text)]
        return self.grade_all(rows, protocol, special_token, prompt_opens_think=prompt_opens_think)[
            0
        ]

    def grade_all(
        self,
        rows: Sequence[tuple[str, str]],
        protocol: str | None = None,
        special_token: str = SPECIAL_TOKEN,
        *,
        prompt_opens_think: bool = False,
        deadline: float | None = None,
    ) -> list[Graded]:
        """Grade (gold, text) rows; the result has their order. Any thread may call.

        `deadline` is the seconds that all of it may take. A comparison that it ends is a timeout,
        one that was not begun an error, never a silent wrong.
        """
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline must be above 0 seconds, got {deadline}")
        until = None if deadline is None else time.monotonic() + deadline
        extracted = [
            extract_answer(
                text,
                protocol,
                special_token,
                prompt_opens_think=prompt_opens_think,
                several_boxes=self.several_boxes,
            )
            for _, text in rows
        ]
        pairs = dict.fromkeys(
            (gold, e.answer)
            for (gold, _), e in zip(rows, extracted, strict=True)
            if e.answer is not None
        )
        verdicts = dict(zip(pairs, self.compare_all(list(pairs), until), strict=True))
        graded = []
        for (gold, _), e in zip(rows, extracted, strict=True):
            verdict = e.verdict if e.answer is None else verdicts[gold, e.answer]
            assert verdict is not None
            if verdict == "unparseable" and (fault := _gold_fault(gold)):
                warn(f"{fault}; such rows have no reward: correct the answer or drop the row")
                verdict = "error"  # not the answer's fault
            graded.append(Graded(verdict, e.answer))
        with self._lock:
            self.counts.update(g.verdict for g in graded)
        return graded

    async def grade_all_async(self, rows: Sequence[tuple[str, str]], *args, **kwargs):
        """`grade_all` beside the event loop, which it does not hold up."""
        return await asyncio.to_thread(self.grade_all, rows, *args, **kwargs)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same: the classes that cons@k votes over."""
        return self.compare(a, b) == "correct"

    def compare(self, gold: str, answer: str) -> Verdict:
        """The verdict on an extracted answer, cached by (gold, answer)."""
        return self.compare_all([(gold, answer)])[0]

    def compare_all(
        self, pairs: Sequence[tuple[str, str]], until: float | None = None
    ) -> list[Verdict]:
        """`compare` for many pairs; `until` (of time.monotonic) is the deadline of the batch."""
        verdicts: list[Verdict | None] = []
        for pair in pairs:
            with self._lock:
                if (verdict := self._cache.get(pair)) is not None:
                    self._cache.move_to_end(pair)
            if verdict is None:
                late = until is not None and time.monotonic() >= until
                verdict = "error" if late else self._compare(*pair)
                if verdict is not None:
                    self._keep(pair, verdict)
            verdicts.append(verdict)
        left = [i for i, verdict in enumerate(verdicts) if verdict is None]
        if left:
            assert self.pool is not None
            found = self.pool.compare_all([pairs[i] for i in left], until)
            for i, verdict in zip(left, found, strict=True):
                self._keep(pairs[i], verdict)
                verdicts[i] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def _keep(self, pair: tuple[str, str], verdict: Verdict) -> None:
        if verdict in ("error", "timeout"):  # a machine's failure may pass
            return
        with self._lock:
            self._cache[pair] = verdict
            if len(self._cache) > _MAX_CACHE:
                self._cache.popitem(last=False)

    def _compare(self, gold: str, answer: str) -> Verdict | None:
        """What the first tier says; None where the second has to."""
        if len(gold) > latex.MAX_LENGTH or len(answer) > latex.MAX_LENGTH:
            return "unparseable"
        if (number := latex.plain_number(gold)) is not None:  # most golds, and most answers
            if (other := latex.plain_number(answer)) is not None:
                return "correct" if number == other else "wrong"
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
                if result is not True and _is_number(typed_gold):
                    if match := _LETTER_UNIT.fullmatch(answer.strip()):
                        number = _read(match[1])
                        if isinstance(number, answers.Answer) and _is_number(number):
                            result = same_bounded(typed_gold, number)
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
        return None if self.pool.available else "unparseable"


def _is_number(answer: answers.Answer) -> bool:
    """A rational number without a unit."""
    plain = answer.kind == "value" and not answer.unit and not answer.name
    return plain and answer.value is not None and answer.value.rational is not None


def _read(text: str) -> answers.Answer | ValueError:
    try:
        return answers.read_answer(text)
    except ValueError as error:
        return error
