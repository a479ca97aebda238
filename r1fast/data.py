"""Problem files to problems. Knows no tensors.

Every error names the file and the line: `train.jsonl:12: 'answer' must be ..., got ...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from r1fast.columns import identity_of, text_of
from r1fast.jsonl import read_rows
from r1fast.problem_rows import (
    ANSWER_FIELDS,
    PROMPT_FIELDS,
    choice_columns,
    choice_prompt,
    gsm8k_row,
    humaneval_row,
    instruction_columns,
    math_row,
    mbpp_row,
    plain_row,
    read_mgsm,
)
from r1fast.types import KINDS, Problem

FORMATS = ("auto", "jsonl", "gsm8k", "math", "mgsm", "humaneval", "mbpp")
UNANSWERED_KINDS = ("general", "code", "if", "open")  # what is right stands elsewhere, or nowhere
SUBSET_FIELDS = ("subset", "subject")
_MGSM_NAME = re.compile(r"mgsm[_-]([a-z]{2,3})$", re.IGNORECASE)


def load_problems(
    path: str | Path,
    *,
    format: str = "auto",
    language: str = "",
    max_problems: int = 0,
    kind: str = "math",
    check: Callable[[Problem], object] | None = None,
) -> list[Problem]:
    """Read a problem file.

    `language` and `kind` hold where a row names none. `check` (rewards.graders.check_problem) raises
    ValueError for a gold, tests, options or instructions that it cannot read; the file and line are put
    in front. A row without an answer must be of a kind that does without (UNANSWERED_KINDS). Of kind
    choice the options are put under the question, and the answer becomes a letter.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if max_problems < 0:
        raise ValueError(f"max_problems must be at least 0 (0 is all), got {max_problems}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if format == "auto":
        format = detect_format(path)
    if format == "mgsm":
        match = _MGSM_NAME.search(path.stem)
        default_language = match[1].lower() if match else language
        if not default_language:
            raise ValueError(
                f"{path}: the language is read from a name such as mgsm_de.tsv; "
                "name it with `language` instead"
            )
        rows: Iterable = read_mgsm(path)
    else:
        default_language = language or "en"
        rows = read_rows(path)
    kind = "code" if format in ("humaneval", "mbpp") else kind
    read = {
        "gsm8k": gsm8k_row, "math": math_row, "humaneval": humaneval_row, "mbpp": mbpp_row,
    }.get(format, plain_row)  # fmt: skip
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}:{line}"
        prompt, answer, row = read(row, where)
        own_kind = text_of(row, "kind", where) or kind
        if own_kind not in KINDS:
            raise ValueError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {own_kind!r}")
        if answer is None and own_kind not in UNANSWERED_KINDS:
            raise ValueError(
                f"{where}: no answer (looked for {', '.join(ANSWER_FIELDS)}; the row has "
                f"{', '.join(map(repr, row)) or 'nothing'}); a prompt that cannot be verified "
                'says "kind": "general"'
            )
        problem_id = identity_of(row, f"{path.name}:{line}", seen, where, line)
        subset = next((text_of(row, f, where) for f in SUBSET_FIELDS if row.get(f)), "")
        used = {"id", "kind", "language", *SUBSET_FIELDS, *PROMPT_FIELDS, *ANSWER_FIELDS}
        meta = {k: v for k, v in row.items() if k not in used}
        if own_kind == "choice":
            answer, columns = choice_columns(row, answer, where)
            prompt, meta = choice_prompt(prompt, columns["choices"]), meta | columns
        elif own_kind == "if":
            meta |= instruction_columns(row, where)
        problem = Problem(
            prompt=prompt,
            answer=answer,
            id=problem_id,
            kind=own_kind,
            language=text_of(row, "language", where) or default_language,
            subset=subset,
            meta=meta,
        )
        if check is not None:
            _checked(problem, check, where)
        problems.append(problem)
        if len(problems) == max_problems:
            break
    if not problems:
        raise ValueError(f"{path} holds no rows")
    return problems


def detect_format(path: str | Path) -> str:
    """The format, from the suffix and the first row's keys."""
    path = Path(path)
    if path.suffix == ".tsv":
        return "mgsm"
    for _, row in read_rows(path):
        if {"prompt", "test", "entry_point"} <= row.keys():
            return "humaneval"
        if {"test_list", "code"} <= row.keys():
            return "mbpp"
        if isinstance(row.get("answer"), str) and "question" in row and "####" in row["answer"]:
            return "gsm8k"
        if "problem" in row and "solution" in row:
            return "math"
        return "jsonl"
    raise ValueError(f"{path} holds no rows")


def _checked(problem: Problem, check: Callable[[Problem], object], where: str) -> None:
    try:
        check(problem)
    except ValueError as error:
        what = "answer" if problem.kind == "math" else "row"
        raise ValueError(
            f"{where}: {error}; correct the {what}, drop the row, or give it 'kind': 'general', "
            "which nothing verifies"
        ) from None
