"""What TRL hands to a reward function: texts, or the messages of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def message_text(message: Any) -> str:
    """A string as it is, of a conversation the last message's content. ValueError for anything else."""
    if isinstance(message, str):
        return message
    if isinstance(message, Sequence) and message and isinstance(message[-1], dict):
        return str(message[-1].get("content") or "")
    raise ValueError(f"a message must be a string or a list of messages, got {message!r:.80}")


def column_of(name: str, values: Any, num: int) -> Sequence:
    """A column with one entry for each of `num` completions; ValueError where it has not."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != num:
        got = f"{len(values)}" if isinstance(values, Sequence) else f"{values!r:.40}"
        raise ValueError(
            f"column {name!r} must have one entry for each of {num} completions, got {got}"
        )
    return values
