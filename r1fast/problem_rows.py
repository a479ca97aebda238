"""Rows of problem files: each format as (prompt, answer, columns), and what kinds of problems add.

Columns that decide on a verdict keep their names; rewards/graders.py reads them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1fast.columns import check_text, need_text, one_of, read_messages
from r1fast.jsonl import read_lines
from r1fast.protocol import boxes

PROMPT_FIELDS = ("prompt", "question", "problem")
ANSWER_FIELDS = ("answer", "gold", "target")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def plain_row(row: dict, where: str) -> tuple[str, str | None, dict]:
    if "messages" in row:
        prompt, _, extra = read_messages(row["messages"], where, need_reply=False)
        answer_field = one_of(row, ANSWER_FIELDS, where)
        answer = None if answer_field is None else _answer(row, answer_field, where)
        return prompt, answer, {k: v for k, v in row.items() if k != "messages"} | extra
    prompt_field = one_of(row, PROMPT_FIELDS, where)
    if prompt_field is None:
        raise ValueError(
            f"{where}: no prompt (looked for {', '.join(PROMPT_FIELDS)}; the row has "
            f"{', '.join(map(repr, row)) or 'nothing'})"
        )
    answer_field = one_of(row, ANSWER_FIELDS, where)
    answer = None if answer_field is None else _answer(row, answer_field, where)
    return need_text(row, prompt_field, where), answer, row


def _answer(row: dict, name: str, where: str) -> str:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {name!r} must be a string or a number, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {name!r} must be a finite number, got {value!r}")
    text = value if isinstance(value, str) else str(value)
    check_text(text, name, where)
    if not text.strip():
        raise ValueError(
            f"{where}: {name!r} is empty; give the gold answer, drop the row, or give it 'kind': "
            "'general', which nothing verifies"
        )
    return text.strip()


def gsm8k_row(row: dict, where: str) -> tuple[str, str, dict]:
    """`answer` is a worked solution; the gold stands behind #### on its last line."""
    for name in ("question", "answer"):
        if name not in row:
            raise ValueError(f"{where}: no {name!r}, which format gsm8k needs")
    solution, mark, gold = need_text(row, "answer", where).rpartition("####")
    if not mark or not gold.strip():
        raise ValueError(f"{where}: 'answer' must end in '#### gold', got {row['answer'][-40:]!r}")
    gold = _THOUSANDS.sub("", gold.strip())
    extra = {"solution": solution.strip()} | {k: v for k, v in row.items() if k != "answer"}
    return need_text(row, "question", where), gold, extra


def math_row(row: dict, where: str) -> tuple[str, str, dict]:
    r"""`answer`, or the last \boxed{} of `solution` (the layout of hendrycks/math)."""
    if "problem" not in row:
        raise ValueError(f"{where}: no 'problem', which format math needs")
    if row.get("answer") is not None:
        gold = _answer(row, "answer", where)
    else:
        found = boxes(need_text(row, "solution", where)) if "solution" in row else []
        if not found or not found[-1]:
            raise ValueError(f"{where}: no 'answer' and no \\boxed{{}} in 'solution'")
        gold = found[-1]
    extra = dict(row)
    if "unique_id" in extra:
        extra.setdefault("id", extra.pop("unique_id"))
    if "type" in extra:
        extra.setdefault("subject", extra.pop("type"))
    return need_text(row, "problem", where), gold, extra


def read_mgsm(path: Path) -> Iterator[tuple[int, dict]]:
    """Lines of `question <tab> answer`."""
    for line, text in read_lines(path):
        columns = text.split("\t")
        if len(columns) != 2:
            raise ValueError(
                f"{path}:{line}: expected question <tab> answer, got {len(columns)} columns"
            )
        question, gold = columns
        yield line, {"prompt": question, "answer": _THOUSANDS.sub("", gold.strip())}


def humaneval_row(row: Mapping, where: str) -> tuple[str, None, dict]:
    """The function to complete is the prompt."""
    for name in ("prompt", "entry_point", "test"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: no {name!r}, which format humaneval needs")
    return row["prompt"], None, {"id": _task_id(row, "HumanEval"), **row}


def mbpp_row(row: Mapping, where: str) -> tuple[str, None, dict]:
    """The task, and the first test: without it nobody knows what the function is called."""
    task = row.get("prompt") or row.get("text")  # sanitized, and the full set
    tests = row.get("test_list")
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{where}: no 'prompt' or 'text', which format mbpp needs")
    if not isinstance(tests, list) or not tests or not isinstance(tests[0], str):
        raise ValueError(f"{where}: 'test_list' must be a list of assertions, got {tests!r:.80}")
    prompt = f"{task.strip()}\nYour code must satisfy: {tests[0].strip()}"
    return prompt, None, {"id": _task_id(row, "MBPP"), **row}


def _task_id(row: Mapping, name: str) -> str:
    task = str(row.get("task_id", ""))
    return task if not task or "/" in task else f"{name}/{task}"


def choice_columns(row: Mapping, answer: str | None, where: str) -> tuple[str, dict]:
    """(the gold's letter, columns) of a row of kind choice: `choices` or `options`, and the answer as a
    letter or an index from 0."""
    options = row.get("choices") or row.get("options")
    if (
        not isinstance(options, list)
        or not 2 <= len(options) <= len(LETTERS)
        or any(isinstance(o, bool) or not isinstance(o, str | int | float) for o in options)
    ):
        raise ValueError(f"{where}: 'choices' must be a list of options, got {options!r:.80}")
    texts = [str(option) for option in options]
    letter = gold_letter(answer, texts, where)
    if texts.count(gold := texts[LETTERS.index(letter)]) > 1:
        raise ValueError(
            f"{where}: two of 'choices' are the answer's {gold!r:.40}; keep one of them"
        )
    return letter, {"choices": texts}


def gold_letter(answer: Any, options: Sequence[str], where: str) -> str:
    """The gold's letter, from a letter, an index that counts from 0, or the option's own text."""
    text, num = (
        "" if isinstance(answer, bool) or answer is None else str(answer).strip(),
        len(options),
    )
    if text.isdecimal() and int(text) < num:
        if isinstance(answer, str) and text in options and options[int(text)] != text:
            raise ValueError(
                f"{where}: 'answer' {answer!r} is the index of one option and the text of another; "
                "give the letter"
            )
        return LETTERS[int(text)]
    if len(text) == 1 and text.upper() in LETTERS[:num]:
        return text.upper()
    if isinstance(answer, str) and text and text in options:
        return LETTERS[options.index(text)]
    raise ValueError(
        f"{where}: 'answer' must be an index from 0 to {num - 1}, a letter from A to {LETTERS[num - 1]} "
        f"or the text of an option, got {answer!r:.40}"
    )


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """The zero-shot wording of openai/simple-evals (MIT), which the paper used, for any number of options."""
    letters = LETTERS[: len(options)]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(letters, options, strict=True))
    return (
        "Answer the following multiple choice question. The last line of your response should be "
        "of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of "
        f"{letters}. Think step by step before answering.\n\n{question}\n\n{listed}"
    )


def instruction_columns(row: Mapping, where: str) -> dict:
    """{"instructions", "arguments"} of a row of kind if, also by IFEval's names; a null argument counts
    as absent."""
    names = row.get("instructions", row.get("instruction_id_list"))
    arguments = row.get("arguments", row.get("kwargs"))
    if not isinstance(names, list) or not names or not isinstance(arguments, list):
        raise ValueError(
            f"{where}: a row of kind if needs lists 'instructions' and 'arguments' (in IFEval's files "
            f"'instruction_id_list' and 'kwargs'), got {names!r:.40} and {arguments!r:.40}"
        )
    if len(names) != len(arguments):
        raise ValueError(
            f"{where}: {len(names)} instructions but {len(arguments)} arguments (kwargs); each has one, "
            "{} where it takes nothing"
        )
    return {
        "instructions": names,
        "arguments": [
            {k: v for k, v in a.items() if v is not None} if isinstance(a, Mapping) else a or {}
            for a in arguments
        ],
    }
