"""What the files of a recorded step hold, and their check: their hashes do not say who has written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from r1fast.checkpoint_layout import STATE
from r1fast.json_fields import (
    ANY_TEXT,
    COUNT,
    FLAG,
    OBJECT,
    POSITIVE,
    TEXT,
    Kind,
    check_fields,
    is_number,
    is_sound,
)

NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers

_BUDGET = {"token_budget": {"num_tokens": POSITIVE, "was_halved": FLAG}}
_METRICS = Kind(
    "an object of numbers",
    lambda x: isinstance(x, dict) and all(is_number(v) or v in NOT_FINITE for v in x.values()),
)
_DIGESTS = Kind(
    "an object of texts", lambda x: isinstance(x, dict) and all(is_sound(v) for v in x.values())
)
_TEXT_OR_NULL = Kind("a text or null", lambda x: x is None or is_sound(x))
_STOP = Kind("a text, a token id or null", lambda x: x is None or is_sound(x) or COUNT.holds(x))
_PARTS = Kind(
    "an object of numbers or null",
    lambda x: isinstance(x, dict) and all(v is None or is_number(v) for v in x.values()),
)
RECORDED = {
    "stage": TEXT,
    "data": TEXT,
    "starts_from": TEXT,
    "versions": {"processes": POSITIVE},
    "before": {"counters": _BUDGET, "digests": _DIGESTS},
    "after": {"counters?": _BUDGET, "digests?": _DIGESTS},  # nothing where the update failed
    "row": _METRICS,
    "config": OBJECT,
}
PROBLEM = {
    "rank": COUNT, "position": COUNT, "prompt": ANY_TEXT, "answer": _TEXT_OR_NULL, "id": ANY_TEXT, "kind": ANY_TEXT,
    "language": ANY_TEXT, "subset": ANY_TEXT, "meta": OBJECT,
}  # fmt: skip
COMPLETION = {
    "finish_reason": ANY_TEXT, "stop_reason": _STOP, "text": ANY_TEXT, "parts": _PARTS, "verdict": _TEXT_OR_NULL,
    "answer": _TEXT_OR_NULL,
}  # fmt: skip
LENGTHS = {  # tensors, and that which says how many of theirs belong together
    "prompt_ids": "prompt_lengths",
    "completion_ids": "completion_lengths",
    "logprobs": "completion_lengths",
}
REMEDY = "it was not written by r1fast, or edited since: record the step again"


def check_recording(folder: Path, state: dict) -> None:
    check_fields(state, RECORDED, folder / STATE, REMEDY)


def read_recorded_rows(path: Path, table: Mapping) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not valid JSON: {error}; {REMEDY}") from None
        check_fields(rows[-1], table, f"{path}:{number}", REMEDY)
    return rows


def check_numbers(
    tensors: Mapping[str, Tensor], num_problems: int, num_completions: int, path: Path
) -> None:
    """The tensors are there and of lengths that fit each other and the rows."""
    names = {"num_completions", "rewards", *LENGTHS, *LENGTHS.values()}
    if missing := sorted(names - tensors.keys()):
        raise ValueError(f"{path} has no {missing[0]!r}; {REMEDY}")
    sizes = {
        "num_completions": (num_problems, "problems"),
        "prompt_lengths": (num_problems, "problems"),
        "completion_lengths": (num_completions, "completions"),
        "rewards": (num_completions, "completions"),
    }
    for name, lengths in LENGTHS.items():
        if bool((tensors[lengths] < 0).any()):
            raise ValueError(f"{path}: {lengths!r} must be at least 0; {REMEDY}")
        sizes[name] = int(tensors[lengths].sum()), f"of {lengths}"
    for name, (size, what) in sizes.items():
        if tensors[name].shape != (size,):
            raise ValueError(
                f"{path}: {name!r} must have one number for each of {size} {what}, got "
                f"{tuple(tensors[name].shape)}; {REMEDY}"
            )
    if int(tensors["num_completions"].sum()) != num_completions:
        raise ValueError(f"{path}: 'num_completions' must add up to {num_completions}; {REMEDY}")
