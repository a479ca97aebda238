"""Supervised examples from files: prompts with the completion to learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1fast.columns import identity_of, need_text, one_of, read_messages, text_of
from r1fast.data import load_problems
from r1fast.jsonl import read_jsonl
from r1fast.problem_rows import PROMPT_FIELDS
from r1fast.protocol import SPECIAL_TOKEN, join_completion
from r1fast.types import KINDS

_CALCULATOR = re.compile(r"<<[^<>]*>>")


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
            prompt, completion, extra = read_messages(row["messages"], where)
        else:
            prompt_field = one_of(row, PROMPT_FIELDS, where)
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
            prompt = need_text(row, prompt_field, where)
            completion = need_text(row, "completion", where)
        keep = row.get("keep", True)
        if not isinstance(keep, bool):
            raise ValueError(f"{where}: 'keep' must be true or false, got {keep!r:.80}")
        own_kind = text_of(row, "kind", where) or kind
        if own_kind not in KINDS:
            raise ValueError(f"{where}: 'kind' must be one of {', '.join(KINDS)}, got {own_kind!r}")
        used = {"messages", "completion", "id", "problem_id", "kind", "language", "keep"}
        example = Example(
            prompt=prompt,
            completion=completion,
            id=identity_of(row, f"{path.name}:{line}", seen, where, line),
            problem_id=text_of(row, "problem_id", where),
            kind=own_kind,
            language=text_of(row, "language", where) or language or "en",
            keep=keep,
            meta={k: v for k, v in row.items() if k not in used and k not in PROMPT_FIELDS} | extra,
        )
        if keep or not only_kept:
            examples.append(example)
    if not examples:
        rows = f"{num_rows} rows, none of them kept" if num_rows else "no rows"
        raise ValueError(f"{path} holds {rows}")
    return examples


def has_completions(path: str | Path) -> bool:
    """Whether any row has something to learn: prompts alone serve RL only."""
    for line, row in read_jsonl(path):
        if "messages" in row:
            _, completion, _ = read_messages(row["messages"], f"{path}:{line}", need_reply=False)
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
