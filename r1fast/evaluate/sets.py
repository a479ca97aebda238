"""The usual evaluation sets, from local files in the formats in which they are published.

Every reader gives `Problem`s whose `meta` holds what their grader needs, and whose prompt is the
set's own text: presets.py puts the wording around it. Errors name the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from r1fast.data import load_problems
from r1fast.jsonl import read_jsonl
from r1fast.problem_rows import LETTERS, choice_columns, instruction_columns
from r1fast.protocol import boxes
from r1fast.rewards.graders import check_problem
from r1fast.rewards.instructions import check_instructions
from r1fast.types import Problem

Row = dict[str, Any]
MAX_BYTES = 1 << 30  # of a set that is read as a whole


def read_gsm8k(path: Path) -> list[Problem]:
    """JSONL of question and answer, the gold behind ####."""
    return load_problems(path, format="gsm8k", check=check_problem)


def read_math(path: Path) -> list[Problem]:
    """JSONL of problem, answer (or the box of solution), subject, level, unique_id."""
    return load_problems(path, format="math", check=check_problem)


def read_problems(path: Path) -> list[Problem]:
    """Any problem file that training reads too; the format is detected."""
    return load_problems(path, check=check_problem)


def read_mgsm(path: Path) -> list[Problem]:
    """mgsm_de.tsv, or a folder of them: one subset a language, in turns."""
    files = sorted(path.glob("mgsm_*.tsv")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no mgsm_*.tsv")
    return _in_turns([
        [replace(problem, subset=problem.language)
         for problem in load_problems(file, format="mgsm", check=check_problem)]
        for file in files
    ])  # fmt: skip


def read_aime(path: Path) -> list[Problem]:
    """Rows of problem and answer (or the box of solution); answers are whole numbers up to 999."""
    problems = []
    for where, row in _rows(path):
        low = {name.lower(): value for name, value in row.items()}
        prompt = _text(low, where, "problem", "question", "prompt")
        gold = low.get("answer")
        if gold is None:
            found = boxes(str(low.get("solution") or ""))
            gold = found[-1] if found else ""
        gold = re.sub(r"[$\s]", "", str(gold))
        if not (gold.isdecimal() and int(gold) <= 999):
            raise ValueError(f"{where}: an AIME answer is a number from 0 to 999, got {gold!r:.40}")
        name = str(low.get("id") or low.get("url") or "") or _place(where)
        problems.append(Problem(prompt, str(int(gold)), name, subset=str(low.get("year") or "")))
    return _checked(problems, path)


def read_humaneval(path: Path) -> list[Problem]:
    """JSONL (or .jsonl.gz) of task_id, prompt, entry_point, test."""
    problems = []
    for where, row in _rows(path):
        code = _text(row, where, "prompt")
        meta = {name: _text(row, where, name) for name in ("test", "entry_point")}
        problems.append(
            Problem(code, None, str(row.get("task_id") or _place(where)), "code",
                    meta={"code_prompt": code, **meta})
        )  # fmt: skip
    return _checked(problems, path)


def read_mbpp(path: Path) -> list[Problem]:
    """sanitized-mbpp.json (an array) or mbpp.jsonl: prompt or text, test_list."""
    problems = []
    for where, row in _rows(path):
        tests = row.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise ValueError(
                f"{where}: 'test_list' must be a list of assertions, got {tests!r:.80}"
            )
        names = ("test_list", "test_imports", "test_setup_code", "challenge_test_list")
        meta = {name: row[name] for name in names if row.get(name)}
        problems.append(
            Problem(_text(row, where, "prompt", "text"), None,
                    f"mbpp/{row.get('task_id', _place(where))}", "code",
                    meta={"code_prompt": "", **meta})
        )  # fmt: skip
    return _checked(problems, path)


def read_ifeval(path: Path) -> list[Problem]:
    """JSONL of key, prompt, instruction_id_list and kwargs, one entry an instruction."""
    problems = []
    for where, row in _rows(path):
        meta = instruction_columns(row, where)
        try:
            check_instructions(meta["instructions"], meta["arguments"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        problems.append(
            Problem(_text(row, where, "prompt"), None, str(row.get("key", _place(where))), "if",
                    meta=meta)
        )  # fmt: skip
    return _checked(problems, path)


def read_mmlu(path: Path) -> list[Problem]:
    """JSONL of question, choices, answer (an index or a letter), subject; or the CSV files.

    A CSV has question, A, B, C, D, answer without a header (the subject is the file's name), or a
    header of Question, A, B, C, D, Answer, Subject. A folder holds one CSV a subject;
    they are read in turns.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    parts = []
    for file in files:
        parts.append(problems := [])
        for where, row in _mmlu_rows(file):
            gold, meta = choice_columns(row, row.get("answer"), where)
            name = str(row.get("id") or row.get("question_id") or _place(where))
            subject = str(row.get("subject") or row.get("category") or "")
            problems.append(
                Problem(_text(row, where, "question", "prompt"), gold, name, "choice",
                        subset=subject, meta=meta)
            )  # fmt: skip
    return _checked(_in_turns(parts), path)


def read_gpqa(path: Path) -> list[Problem]:
    """CSV or JSONL of Question, Correct Answer, Incorrect Answer 1 to 3.

    The options are shuffled by the question's own text, so that they stand alike in every run.
    """
    problems = []
    for where, row in _rows(path):
        question = _text(row, where, "Question")
        right = _text(row, where, "Correct Answer").strip()
        options = [right] + [_text(row, where, f"Incorrect Answer {i}").strip() for i in (1, 2, 3)]
        order = list(range(4))
        random.Random(f"gpqa/{question}").shuffle(order)  # a string seed is hashed with SHA-512
        problems.append(
            Problem(question.strip(), LETTERS[order.index(0)],
                    str(row.get("Record ID") or _place(where)), "choice",
                    subset=str(row.get("High-level domain") or row.get("Subdomain") or ""),
                    meta={"choices": [options[i] for i in order]})
        )  # fmt: skip
    return _checked(problems, path)


def read_simpleqa(path: Path) -> list[Problem]:
    """CSV or JSONL of problem and answer; the topic of SimpleQA's metadata is the subset."""
    problems = []
    for where, row in _rows(path):
        found = re.search(r"['\"]topic['\"]:\s*['\"]([^'\"]+)", str(row.get("metadata") or ""))
        subset = found[1] if found else str(row.get("topic") or "")
        problems.append(
            Problem(_text(row, where, "problem", "question", "prompt"),
                    _text(row, where, "answer").strip(), str(row.get("id") or _place(where)),
                    "qa", subset=subset)
        )  # fmt: skip
    return _checked(problems, path)


def read_open(path: Path, baseline: Path | None = None) -> list[Problem]:
    """Open questions and the answers that ours are compared with.

    AlpacaEval: a JSON array of instruction and output; or any rows of prompt and answer (or
    completion), as in data.general. ArenaHard: JSONL of uid (or question_id),
    prompt (or turns), cluster; its answers are in a file of their own, `baseline`, by the same ids.
    """
    answers = {} if baseline is None else dict(_baseline_rows(baseline))
    problems = []
    for where, row in _rows(path):
        name = str(row.get("uid") or row.get("question_id") or row.get("id") or _place(where))
        question = row.get("instruction") or row.get("prompt") or _turn(row.get("turns"))
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: no question (looked for instruction, prompt, turns)")
        answer = answers.get(name) or answers.get(question)
        answer = answer or row.get("output") or row.get("answer") or row.get("completion")
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{where}: no answer to compare with for {name!r}; {_no_baseline(baseline, answers)}"
            )
        subset = str(row.get("dataset") or row.get("category") or "")
        problems.append(
            Problem(question, None, name, "open", subset=subset, meta={"baseline": answer})
        )
    return _checked(problems, path)


def _no_baseline(path: Path | None, answers: Mapping[str, str]) -> str:
    """What the baseline's file has instead of the question's id, or what a row needs without one."""
    if path is None:
        return (
            "a row brings 'output' (AlpacaEval), 'answer' or 'completion', or --baseline FILE has one "
            "for each id (ArenaHard)"
        )
    some = ", ".join(f"{name!r:.40}" for name in list(answers)[:3]) or "none"
    more = ", ..." * (len(answers) > 3)
    return (
        f"--baseline {path} has answers to {len(answers)} others ({some}{more}): give the file of this "
        "set's questions, by uid, question_id or id"
    )


def _baseline_rows(path: Path) -> Iterator[tuple[str, str]]:
    """(id or question, answer) of a file of model answers."""
    for where, row in _rows(path):
        answer: Any = row.get("output") or row.get("answer")
        if answer is None and isinstance(row.get("choices"), list) and row["choices"]:
            answer = _turn(row["choices"][0].get("turns"))
        if answer is None and isinstance(row.get("messages"), list) and row["messages"]:
            answer = row["messages"][-1].get("content")
        if isinstance(answer, Mapping):
            answer = answer.get("answer")
        key = row.get("uid") or row.get("question_id") or row.get("id") or row.get("instruction")
        if not key or not isinstance(answer, str):
            raise ValueError(
                f"{where}: a baseline's row needs an id and an answer; it has {', '.join(row)}"
            )
        yield str(key), answer


def _turn(turns: Any) -> str | None:
    """The text of the first turn: a string, or an object with its content."""
    first = turns[0] if isinstance(turns, list) and turns else None
    return first.get("content") if isinstance(first, Mapping) else first


def _mmlu_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if path.suffix != ".csv":
        yield from _rows(path)
        return
    subject = re.sub(r"_(test|val|dev)$", "", path.stem)
    header: list[str] | None = None
    for line, columns in _csv(path):
        low = [c.strip().lower() for c in columns]
        if header is None and line == 1 and "question" in low and "answer" in low:
            header = low
            continue
        where = f"{path}:{line}"
        if header is not None:
            row = dict(zip(header, columns, strict=False))
            options = [row[c] for c in "abcdefghij" if row.get(c)]
            yield where, {**row, "choices": options, "id": None}
        elif len(columns) < 4:
            raise ValueError(
                f"{where}: expected question, options, answer; got {len(columns)} columns"
            )
        else:
            question, *options, answer = columns
            yield (
                where,
                {"question": question, "choices": options, "answer": answer, "subject": subject},
            )


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of JSONL, a JSON array, CSV with a header, each also .gz."""
    if not os.path.isfile(path):  # False, too, for a name that is too long
        raise ValueError(
            f"data file {str(path)!r} {'is a folder' if os.path.isdir(path) else 'does not exist'}"
        )
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        header: list[str] | None = None
        for line, columns in _csv(path):
            if header is None:
                header = columns
            elif len(columns) != len(header):
                raise ValueError(
                    f"{path}:{line}: {len(columns)} columns, the header has {len(header)}"
                )
            else:
                yield f"{path}:{line}", dict(zip(header, columns, strict=True))
        return
    if name.endswith(".jsonl") and name == path.name:
        yield from ((f"{path}:{line}", row) for line, row in read_jsonl(path))
        return
    text = _read(path)
    if not text.lstrip().startswith("["):
        for line, part in enumerate(text.split("\n"), 1):
            if part.strip():
                yield f"{path}:{line}", _object(part, f"{path}:{line}")
        return
    rows = _parse(text, str(path))
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{i}: expected an object, got {type(row).__name__}")
        yield f"{path}:{i}", row


def first_line(path: Path) -> int:
    """Where the first row stands; 1 where none can be read."""
    try:
        where, _ = next(_rows(path))
    except (ValueError, StopIteration):
        return 1
    return int(where.rpartition(":")[2])


def _object(text: str, where: str) -> Row:
    row = _parse(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _read(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"{path} has over {MAX_BYTES >> 20} MiB, as which no set is read")
        return raw.decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, columns); a field may span lines."""
    delimiter = "\t" if path.name.removesuffix(".gz").endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(_read(path), newline=""), delimiter=delimiter)
    try:
        for columns in reader:
            if columns:
                yield reader.line_num, columns
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _text(row: Mapping, where: str, *names: str) -> str:
    """The first of these columns that is there."""
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise ValueError(
        f"{where}: no {' or '.join(map(repr, names))}; the row has {', '.join(map(repr, row)) or 'nothing'}"
    )


def _place(where: str) -> str:
    return Path(where).name


def _in_turns(parts: list[list[Problem]]) -> list[Problem]:
    """The first of each part, then the second: the first N problems are of all parts."""
    return [p for row in zip_longest(*parts) for p in row if p is not None]


def _checked(problems: list[Problem], path: Path) -> list[Problem]:
    if not problems:
        raise ValueError(f"{path} holds no rows")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"{path}: id {problem.id!r} stands twice")
        seen.add(problem.id)
    return problems
