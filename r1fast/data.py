"""Files to problems and examples, and the order they are visited in. Knows no tensors.

Every error names the file and the line: `train.jsonl:12: 'answer' must be ..., got ...`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from r1fast.code_rows import humaneval_row, mbpp_row
from r1fast.protocol import SPECIAL_TOKEN, boxes, join_completion
from r1fast.types import KINDS, Problem

FORMATS = ("auto", "jsonl", "gsm8k", "math", "mgsm", "humaneval", "mbpp")
PROMPT_FIELDS = ("prompt", "question", "problem")
ANSWER_FIELDS = ("answer", "gold", "target")
SUBSET_FIELDS = ("subset", "subject")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_MGSM_NAME = re.compile(r"mgsm[_-]([a-z]{2,3})$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised example: what the user said and what the model is to learn to say."""

    prompt: str  # the user's words, before any template
    completion: str
    id: str = ""
    problem_id: str = ""  # of the problem a completion was sampled for
    kind: str = "math"
    language: str = "en"
    keep: bool = True  # a person's edit may set it to false
    meta: Mapping = field(default_factory=dict)  # every other column of the row


def load_problems(
    path: str | Path,
    *,
    format: str = "auto",
    language: str = "",
    max_problems: int = 0,
    kind: str = "math",
    check_gold: Callable[[str], object] | None = None,
    check_code: Callable[[Mapping, str], object] | None = None,
) -> list[Problem]:
    """Read a problem file.

    `language` and `kind` hold where a row names none. `check_gold` (rewards.math.parse_gold)
    raises ValueError for a gold answer it cannot read, and `check_code`
    (rewards.code_problem.read_code_problem) for tests; the file and line are put in front. A row
    without an answer must be of kind `general`, or `code` with tests (of HumanEval and MBPP all are).
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
        rows: Iterable = _read_mgsm(path)
    else:
        default_language = language or "en"
        rows = read_rows(path)
    kind = "code" if format in ("humaneval", "mbpp") else kind
    read = {
        "gsm8k": _gsm8k_row, "math": _math_row, "humaneval": humaneval_row, "mbpp": mbpp_row,
    }.get(format, _plain_row)  # fmt: skip
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}:{line}"
        prompt, answer, row = read(row, where)
        own_kind = _text(row, "kind", where) or kind
        if own_kind not in KINDS:
            raise ValueError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {own_kind!r}")
        if answer is None and own_kind not in ("general", "code"):
            raise ValueError(
                f"{where}: no answer (looked for {', '.join(ANSWER_FIELDS)}; the row has "
                f"{', '.join(map(repr, row)) or 'nothing'}); a prompt that cannot be verified "
                'says "kind": "general"'
            )
        try:
            if own_kind == "code" and check_code is not None:
                check_code(row, prompt)
            elif own_kind == "math" and answer is not None and check_gold is not None:
                check_gold(answer)
        except ValueError as error:
            help_ = (
                "; correct the answer, drop the row, or give it 'kind': 'general', which nothing verifies"
                if own_kind == "math"
                else ""
            )
            raise ValueError(f"{where}: {error}{help_}") from None
        problem_id = _identity(row, f"{path.name}:{line}", seen, where, line)
        subset = next((_text(row, f, where) for f in SUBSET_FIELDS if row.get(f)), "")
        used = {"id", "kind", "language", *SUBSET_FIELDS, *PROMPT_FIELDS, *ANSWER_FIELDS}
        problems.append(
            Problem(
                prompt=prompt,
                answer=answer,
                id=problem_id,
                kind=own_kind,
                language=_text(row, "language", where) or default_language,
                subset=subset,
                meta={k: v for k, v in row.items() if k not in used},
            )
        )
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


def _plain_row(row: dict, where: str) -> tuple[str, str | None, dict]:
    if "messages" in row:
        prompt, _, extra = _read_messages(row["messages"], where, need_reply=False)
        answer_field = _one_of(row, ANSWER_FIELDS, where)
        answer = None if answer_field is None else _answer(row, answer_field, where)
        return prompt, answer, {k: v for k, v in row.items() if k != "messages"} | extra
    prompt_field = _one_of(row, PROMPT_FIELDS, where)
    if prompt_field is None:
        raise ValueError(
            f"{where}: no prompt (looked for {', '.join(PROMPT_FIELDS)}; the row has "
            f"{', '.join(map(repr, row)) or 'nothing'})"
        )
    answer_field = _one_of(row, ANSWER_FIELDS, where)
    answer = None if answer_field is None else _answer(row, answer_field, where)
    return _need_text(row, prompt_field, where), answer, row


def _one_of(row: dict, names: tuple[str, ...], where: str) -> str | None:
    """The one of `names` the row has (null counts as absent); two of them contradict each other."""
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise ValueError(f"{where}: has {' and '.join(map(repr, present))}; keep one of them")
    return present[0] if present else None


def _answer(row: dict, name: str, where: str) -> str:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {name!r} must be a string or a number, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {name!r} must be a finite number, got {value!r}")
    text = value if isinstance(value, str) else str(value)
    _check_text(text, name, where)
    if not text.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    return text.strip()


def _gsm8k_row(row: dict, where: str) -> tuple[str, str, dict]:
    """`answer` is a worked solution; the gold stands behind #### on its last line."""
    for name in ("question", "answer"):
        if name not in row:
            raise ValueError(f"{where}: no {name!r}, which format gsm8k needs")
    solution, mark, gold = _need_text(row, "answer", where).rpartition("####")
    if not mark or not gold.strip():
        raise ValueError(f"{where}: 'answer' must end in '#### gold', got {row['answer'][-40:]!r}")
    gold = _THOUSANDS.sub("", gold.strip())
    extra = {"solution": solution.strip()} | {k: v for k, v in row.items() if k != "answer"}
    return _need_text(row, "question", where), gold, extra


def _math_row(row: dict, where: str) -> tuple[str, str, dict]:
    r"""`answer`, or the last \boxed{} of `solution` (the layout of hendrycks/math)."""
    if "problem" not in row:
        raise ValueError(f"{where}: no 'problem', which format math needs")
    if row.get("answer") is not None:
        gold = _answer(row, "answer", where)
    else:
        found = boxes(_need_text(row, "solution", where)) if "solution" in row else []
        if not found or not found[-1]:
            raise ValueError(f"{where}: no 'answer' and no \\boxed{{}} in 'solution'")
        gold = found[-1]
    extra = dict(row)
    if "unique_id" in extra:
        extra.setdefault("id", extra.pop("unique_id"))
    if "type" in extra:
        extra.setdefault("subject", extra.pop("type"))
    return _need_text(row, "problem", where), gold, extra


def _read_mgsm(path: Path) -> Iterator[tuple[int, dict]]:
    """Lines of `question <tab> answer`."""
    for line, text in _read_lines(path):
        columns = text.split("\t")
        if len(columns) != 2:
            raise ValueError(
                f"{path}:{line}: expected question <tab> answer, got {len(columns)} columns"
            )
        question, gold = columns
        yield line, {"prompt": question, "answer": _THOUSANDS.sub("", gold.strip())}


def load_examples(
    path: str | Path, *, language: str = "", kind: str = "math", only_kept: bool = True
) -> list[Example]:
    """Read supervised examples: rows of `prompt` and `completion`, or of chat `messages`.

    `messages` is [user, assistant], a system message may come first. Rows with "keep": false are
    left out unless `only_kept` is False.
    """
    path = Path(path)
    examples: list[Example] = []
    seen: dict[str, int] = {}
    num_rows = 0
    for line, row in read_jsonl(path):
        num_rows += 1
        where = f"{path}:{line}"
        extra: dict = {}
        if "messages" in row:
            prompt, completion, extra = _read_messages(row["messages"], where)
        else:
            prompt_field = _one_of(row, PROMPT_FIELDS, where)
            if prompt_field is not None and row.get("completion") is None and kind == "general":
                raise ValueError(
                    f"{where}: no 'completion', which supervised training on general data needs; "
                    "keep rows with only a prompt in a file of their own, for RL"
                )
            if prompt_field is None or "completion" not in row:
                raise ValueError(
                    f"{where}: an example needs 'prompt' and 'completion', or 'messages'; "
                    f"the row has {', '.join(map(repr, row)) or 'nothing'}"
                )
            prompt = _need_text(row, prompt_field, where)
            completion = _need_text(row, "completion", where)
        keep = row.get("keep", True)
        if not isinstance(keep, bool):
            raise ValueError(f"{where}: 'keep' must be true or false, got {keep!r:.80}")
        own_kind = _text(row, "kind", where) or kind
        if own_kind not in KINDS:
            raise ValueError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {own_kind!r}")
        used = {"messages", "completion", "id", "problem_id", "kind", "language", "keep"}
        example = Example(
            prompt=prompt,
            completion=completion,
            id=_identity(row, f"{path.name}:{line}", seen, where, line),
            problem_id=_text(row, "problem_id", where),
            kind=own_kind,
            language=_text(row, "language", where) or language or "en",
            keep=keep,
            meta={k: v for k, v in row.items() if k not in used and k not in PROMPT_FIELDS} | extra,
        )
        if keep or not only_kept:
            examples.append(example)
    if not examples:
        rows = f"{num_rows} rows, none of them kept" if num_rows else "no rows"
        raise ValueError(f"{path} holds {rows}")
    return examples


def _read_messages(messages: Any, where: str, *, need_reply: bool = True) -> tuple[str, str, dict]:
    """(prompt, completion, {"system": text} where there is one); "" without a reply."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: 'messages' must be a list of objects, got {messages!r:.80}")
    roles = [m.get("role") for m in messages]
    texts = [_need_text(m, "content", f"{where}: messages[{i}]") for i, m in enumerate(messages)]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] and (need_reply or turns != ["user"]):
        raise ValueError(
            f"{where}: 'messages' must be one user and one assistant turn (a system turn may "
            f"come first), got roles {roles}"
        )
    extra = {"system": texts[0]} if turns != roles else {}
    prompt, *reply = texts[len(texts) - len(turns) :]
    return prompt, "".join(reply), extra


def has_completions(path: str | Path) -> bool:
    """Whether any row has something to learn: prompts alone serve RL only."""
    for line, row in read_jsonl(path):
        if "messages" in row:
            _, completion, _ = _read_messages(row["messages"], f"{path}:{line}", need_reply=False)
        else:
            completion = row.get("completion")
        if completion:
            return True
    return False


def gsm8k_examples(
    path: str | Path, protocol: str = "think_answer", special_token: str = SPECIAL_TOKEN
) -> list[Example]:
    """GSM8K's own solutions as supervised examples, without the <<3+4=7>> calculator marks."""
    return [
        Example(
            prompt=problem.prompt,
            completion=join_completion(
                _CALCULATOR.sub("", problem.meta["solution"]),
                problem.answer or "",
                protocol,
                special_token,
            ),
            id=problem.id,
            problem_id=problem.id,
            meta={"answer": problem.answer},
        )
        for problem in load_problems(path, format="gsm8k")
    ]


def _text(row: Mapping, name: str, where: str) -> str:
    """An optional string column, "" where it is absent."""
    value = row.get(name)
    if value is None:
        return ""
    if name in ("id", "problem_id") and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {value!r:.80}")
    _check_text(value, name, where)
    return value


def _need_text(row: Mapping, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {value!r:.80}")
    _check_text(value, name, where)
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    return value


def _check_text(text: str, name: str, where: str) -> None:
    if "\0" in text:
        raise ValueError(f"{where}: {name!r} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}"
        ) from None


def _identity(row: Mapping, default: str, seen: dict[str, int], where: str, line: int) -> str:
    identity = _text(row, "id", where) or default
    if identity in seen:
        raise ValueError(f"{where}: id {identity!r} was used on line {seen[identity]} already")
    seen[identity] = line
    return identity


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    for line, text in _read_lines(path):
        try:
            row = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{line}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            hint = " (JSON Lines: one object a line, no array around)" * isinstance(row, list)
            raise ValueError(
                f"{path}:{line}: expected a JSON object, got {type(row).__name__} "
                f"{text[:60]!r}{hint}"
            )
        yield line, row


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """`read_jsonl`, or (position from 1, object) of a .json file that is one array, as MBPP's is."""
    path = Path(path)
    lines = (text for _, text in _read_lines(path))
    if path.suffix != ".json" or not next(lines, "").lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    text = "\n".join(text for _, text in _read_lines(path))
    try:
        rows = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON array of objects, got {text[:60]!r}")
    yield from enumerate(rows, 1)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line that is not blank; only \\n ends a line."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"data file {str(path)!r} {what}")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{path}:1: is UTF-16; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{line}: not valid UTF-8 at byte {error.start}: {error.reason}"
                ) from None
            if "\0" in text:
                raise ValueError(f"{path}:{line}: holds a NUL byte")
            if text.strip():
                yield line, text.rstrip("\r\n")


def write_jsonl(path: str | Path, rows: Iterable) -> int:
    """Write mappings or dataclasses, one a line, all or nothing; returns how many."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    num_rows = 0
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                row = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                num_rows += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), the same on every machine."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed is hashed with SHA-512
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The indices of batch `step` on a walk through shuffled epochs, wrapping across their ends.

    Each epoch visits every index once; no index comes twice in a batch where n >= batch_size.
    A pure function of its arguments: a resumed run asks for its step.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    start, indices = step * batch_size, []
    while len(indices) < batch_size:
        epoch, offset = divmod(start + len(indices), n)
        missing = batch_size - len(indices)
        indices += _walk_order(n, batch_size, seed, epoch)[offset : offset + missing]
    return indices


def _walk_order(n: int, batch_size: int, seed: int, epoch: int) -> list[int]:
    """`epoch_order`, changed only where a batch that spans two epochs would repeat an index."""
    if batch_size <= n < 2 * batch_size:
        # too few indices to move any aside: one order until a batch ends where an epoch does;
        # n consecutive entries of a repeated permutation are always distinct
        return epoch_order(n, seed, epoch // (batch_size // math.gcd(n, batch_size)))
    order = epoch_order(n, seed, epoch)
    carried = (epoch * n) % batch_size  # indices the spanning batch took from the last epoch
    if epoch == 0 or carried == 0 or n < batch_size:
        return order
    taken = set(epoch_order(n, seed, epoch - 1)[n - carried :])
    head = batch_size - carried
    # the last batch_size entries stay put, so the next epoch may rely on them
    spare = [i for i in range(head, n - batch_size) if order[i] not in taken]
    for i in range(head):
        if order[i] in taken:
            j = spare.pop(0)
            order[i], order[j] = order[j], order[i]
    return order
