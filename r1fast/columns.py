"""Columns of a row: texts that are there and sound, or an error that names the file and the line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_of(row: Mapping, name: str, where: str) -> str:
    """An optional string column, "" where it is absent."""
    value = row.get(name)
    if value is None:
        return ""
    if name in ("id", "problem_id") and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {value!r:.80}")
    check_text(value, name, where)
    return value


def need_text(row: Mapping, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {value!r:.80}")
    check_text(value, name, where)
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    return value


def check_text(text: str, name: str, where: str) -> None:
    if "\0" in text:
        raise ValueError(f"{where}: {name!r} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start}"
        ) from None


def identity_of(row: Mapping, default: str, seen: dict[str, int], where: str, line: int) -> str:
    identity = text_of(row, "id", where) or default
    if identity in seen:
        raise ValueError(f"{where}: id {identity!r} was used on line {seen[identity]} already")
    seen[identity] = line
    return identity


def one_of(row: dict, names: tuple[str, ...], where: str) -> str | None:
    """The one of `names` the row has (null counts as absent); two of them contradict each other."""
    present = [name for name in names if row.get(name) is not None]
    if len(present) > 1:
        raise ValueError(f"{where}: has {' and '.join(map(repr, present))}; keep one of them")
    return present[0] if present else None


def read_messages(messages: Any, where: str, *, need_reply: bool = True) -> tuple[str, str, dict]:
    """(prompt, completion, {"system": text} where there is one); "" without a reply."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: 'messages' must be a list of objects, got {messages!r:.80}")
    roles = [m.get("role") for m in messages]
    texts = [need_text(m, "content", f"{where}: messages[{i}]") for i, m in enumerate(messages)]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] and (need_reply or turns != ["user"]):
        raise ValueError(
            f"{where}: 'messages' must be one user and one assistant turn (a system turn may "
            f"come first), got roles {roles}"
        )
    extra = {"system": texts[0]} if turns != roles else {}
    prompt, *reply = texts[len(texts) - len(turns) :]
    return prompt, "".join(reply), extra
