"""The rows of samples.jsonl: what is stored of a sample, and reading it back with every column checked.

A verdict belongs to a text, to the problem that it was given for (`problem_hash`), and to a version of
its grader.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from r1fast.jsonl import read_jsonl
from r1fast.metrics import warn
from r1fast.rewards.graders import GRADED_BY
from r1fast.types import KINDS, VERDICTS, Completion, FinishReason, Problem

Key = tuple[str, int]  # problem id, sample
SAMPLED = ("sample", "seed", "prompt_hash", "text", "finish_reason", "num_tokens")
FINAL = (
    "problem_id", "kind", "subset", "prompt", "answer", *SAMPLED, "extracted", "verdict", "grader",
    "format", "language_share",
)  # fmt: skip
FLAGS = ("followed", "followed_loosely")  # of each of the row's instructions
REMEDY = "correct the line, or delete it: the command that made the run draws and grades that sample again"


def problem_hash(problem: Problem) -> str:
    """Of all that decides on a verdict besides the response: question, gold, and the columns that the
    kind's grader reads."""
    columns = {name: problem.meta.get(name) for name in GRADED_BY.get(problem.kind, ())}
    values = [problem.kind, problem.prompt, problem.answer, problem.language, columns]
    text = json.dumps(values, sort_keys=True, default=repr)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def final_row(problem: Problem, row: Mapping, reward: Any, grader: str) -> dict:
    """What samples.jsonl holds of a sample."""
    return {
        "problem_id": problem.id,
        **asked_of(problem),
        "problem_hash": problem_hash(problem),
        **{name: row[name] for name in SAMPLED},
        "extracted": reward.answer,
        "verdict": reward.verdict,
        "grader": grader,
        "format": reward.parts.get("format"),
        "language_share": reward.parts.get("language"),
        **reward.detail,
    }


def asked_of(problem: Problem) -> dict:
    """The columns of a row that tell of its problem."""
    return {name: getattr(problem, name) for name in ("kind", "subset", "prompt", "answer")}


def completion_of_row(row: Mapping) -> Completion:
    """A stored sample to be graded. Which tokens it had is not stored: no verdict depends on it."""
    return Completion([0] * row["num_tokens"], [], row["finish_reason"], row["text"])


def read_samples(path: Path, needed: Iterable[str] = FINAL) -> list[dict]:
    """The rows of a samples.jsonl. ValueError for one that is damaged: file, line, what to do.

    Of rows that are there twice the last counts, in the place of the first, with a warning.
    """
    needed = tuple(needed)
    rows: dict[Key, dict] = {}
    twice: list[str] = []
    try:
        for line, row in read_jsonl(path):
            if wrong := wrong_in(row, needed):
                raise ValueError(f"{path}:{line}: {wrong}")
            key = row["problem_id"], row["sample"]
            if key in rows:
                twice.append(f"problem {key[0]!r}, sample {key[1]}, line {line}")
            rows[key] = row
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    if twice:
        warn(
            f"{path}: {len(twice)} samples stand there again ({twice[0]}); the last of each counts"
        )
    return list(rows.values())


def wrong_in(row: Mapping, needed: Iterable[str]) -> str:
    """What is wrong with a stored row, in words; "" where nothing is."""
    for name in needed:
        if name not in row:
            return f"no {name!r}; the row has {', '.join(map(repr, row)) or 'nothing'}"
    for name, value in row.items():
        is_right, words = _COLUMNS.get(name, (None, ""))
        if is_right is not None and not is_right(value):
            return f"{name!r} must be {words}, got {value!r:.60}"
    if row.get("verdict", "") is None and row.get("kind", "general") != "general":
        if row.get("kind") != "math" or row.get("answer") is not None:
            return f"'verdict' must be one of {', '.join(VERDICTS)} where kind is {row['kind']}, got null"
    if names := row.get("instructions"):
        for flag in FLAGS:
            if len(row.get(flag) or ()) != len(names):
                return f"{flag!r} must have one entry for each of {len(names)} instructions"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value) and 0 <= value <= 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _among(values: tuple, *, null: bool = True) -> tuple[Callable[[Any], bool], str]:
    def is_right(value: Any) -> bool:
        return (null and value is None) or (isinstance(value, str) and value in values)

    return is_right, f"one of {', '.join(values)}{' or null' * null}"


def _is_list(of: type, value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(x, of) for x in value))


def _are_grades(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == 2
        and all(x is None or (isinstance(x, int) and not isinstance(x, bool)) for x in value)
    )


_TEXT = _is_text, "a string"
_TEXT_OR_NULL = _is_text_or_null, "a string or null"
_COUNT = _is_count, "a whole number from 0"
_SHARE = _is_share, "a number from 0 to 1 or null"
_COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("problem_id", "subset", "prompt", "prompt_hash", "problem_hash", "text", "grader"), _TEXT),
    **dict.fromkeys(("answer", "extracted"), _TEXT_OR_NULL),
    **dict.fromkeys(("sample", "seed", "num_tokens", "summary_chars", "baseline_chars"), _COUNT),
    **dict.fromkeys(("format", "language_share", "score"), _SHARE),
    **dict.fromkeys(FLAGS, (lambda value: _is_list(bool, value), "a list of true and false, or null")),
    "kind": _among(KINDS, null=False),
    "verdict": _among(VERDICTS),
    "outcome": _among(("win", "tie", "loss", "error")),
    "finish_reason": _among(get_args(FinishReason), null=False),
    "instructions": (lambda value: _is_list(str, value), "a list of names, or null"),
    "grades": (_are_grades, "two whole numbers or nulls, or null"),
}  # fmt: skip
