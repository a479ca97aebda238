"""Fields of a JSON file, checked against a table when it is read: what a person has edited is named, not met later.

    TABLE = {"step": COUNT, "budget?": {"num_tokens": POSITIVE}, "points": [{"step": COUNT}]}

A name that ends in "?" may be missing. A dict is an object with these fields, and others that nobody
reads; a list of one table is an array of such values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # a surrogate that is left alone


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be, in words and as a check."""

    words: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """What Python's arithmetic takes without an error: NaN too, but no number of more than 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def is_text(value: Any) -> bool:
    """Without NUL, which no file's name takes, and sound."""
    return is_sound(value) and "\0" not in value


def is_sound(value: Any) -> bool:
    """A text without half a surrogate pair, which no file, tokenizer or terminal takes."""
    return isinstance(value, str) and not _HALF_PAIR.search(value)


def is_row(value: Any) -> bool:
    """Names and what a row of metrics holds of them."""
    return isinstance(value, dict) and all(
        x is None or isinstance(x, bool) or is_number(x) or is_text(x) for x in value.values()
    )


TEXT = Kind("a text", is_text)
ANY_TEXT = Kind("a text", is_sound)  # of a model, which may hold NUL
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
COUNT = Kind("a whole number of at least 0", lambda x: type(x) is int and 0 <= x < 2**63)
POSITIVE = Kind("a whole number of at least 1", lambda x: type(x) is int and 0 < x < 2**63)
NUMBER = Kind("a number", is_number)
FINITE = Kind("a number", lambda x: is_number(x) and math.isfinite(x))
FINITE_OR_NULL = Kind("a number or null", lambda x: x is None or FINITE.holds(x))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
ROW = Kind("an object of numbers and texts", is_row)

Table = Kind | Mapping[str, Any] | list


def check_fields(value: Any, table: Table, file: object, remedy: str, name: str = "") -> None:
    """Raises ValueError with the file, the field, what it must be, what came, and the `remedy`."""
    if isinstance(table, Kind):
        if not table.holds(value):
            raise ValueError(f"{file}: {name!r} must be {table.words}, got {value!r:.80}; {remedy}")
        return
    if isinstance(table, list):
        check_fields(value, Kind("a list", lambda x: isinstance(x, list)), file, remedy, name)
        for i, item in enumerate(value):
            check_fields(item, table[0], file, remedy, f"{name}[{i}]")
        return
    check_fields(value, OBJECT, file, remedy, name)
    for field, kind in table.items():
        key = field.removesuffix("?")
        inner = f"{name}.{key}".removeprefix(".")
        if key in value:
            check_fields(value[key], kind, file, remedy, inner)
        elif key == field:
            raise ValueError(f"{file} has no {inner!r}; {remedy}")
