"""Sets of real numbers written in different ways: x >= 3 is [3, oo), R without {1} two intervals."""

from __future__ import annotations

from itertools import pairwise

from r1fast.rewards import algebra
from r1fast.rewards.answers import Answer

_REALS = ("mathbb{R}", "mathbf{R}", "mathds{R}")
_MINUS_INFINITY = Answer("value", value=algebra.neg(algebra.symbol(algebra.INFINITY)))
_PLUS_INFINITY = Answer("value", value=algebra.symbol(algebra.INFINITY))
_CONSTANT = frozenset(("pi", "e", algebra.INFINITY))


def as_intervals(answer: Answer) -> tuple[Answer, ...] | None:
    """The intervals that `answer` is made of, None where it is no such set.

    Intervals as written, inequalities of one unknown against constants, "x < 1 or x > 2", the real
    numbers, and the real numbers without some rational ones. Nothing is merged.
    """
    if answer.kind == "tuple" and len(answer.items) == 2 and answer.mark[:1] in ("(", "["):
        return (answer,) if all(_is_constant(item) for item in answer.items) else None
    if answer.kind == "relation":
        return _of_relation(answer)
    if answer.kind == "union" or (answer.kind == "list" and answer.mark == "or"):
        parts = [as_intervals(item) for item in answer.items]
        if any(part is None for part in parts):
            return None
        return tuple(interval for part in parts for interval in part or ())
    if answer.kind == "value" and _is_reals(answer):
        return (Answer("tuple", items=(_MINUS_INFINITY, _PLUS_INFINITY), mark="()"),)
    if answer.kind == "without" and _is_reals(answer.items[0]):
        return _reals_without(answer.items[1])
    return None


def unknown_of(answer: Answer) -> str:
    """The x of an inequality in x."""
    names = [next(iter(i.value.atoms())) for i in answer.items if i.value and _is_unknown(i)]
    return names[0] if len(names) == 1 else ""


def _is_reals(answer: Answer) -> bool:
    value = answer.value
    return value is not None and any(algebra.equal(value, algebra.symbol(r)) for r in _REALS)


def _is_constant(answer: Answer) -> bool:
    value = answer.value
    if answer.kind != "value" or value is None or answer.unit or answer.percent:
        return False
    return all(atom in _CONSTANT or atom[0] == "#" for atom in value.atoms())


def _is_unknown(answer: Answer) -> bool:
    value = answer.value
    if answer.kind != "value" or value is None or len(value.atoms()) != 1 or answer.unit:
        return False
    (name,) = value.atoms()
    plain = name[0].isalpha() and name not in _CONSTANT and name != "i"
    return plain and algebra.equal(value, algebra.symbol(name)) is True


def _of_relation(answer: Answer) -> tuple[Answer, ...] | None:
    """x < 3, 3 > x, 1 < x <= 2, x != 1."""
    operators, items = answer.mark.split(), answer.items
    unknown = [i for i, item in enumerate(items) if _is_unknown(item)]
    if len(unknown) != 1 or not all(
        _is_constant(x) for i, x in enumerate(items) if i not in unknown
    ):
        return None
    if len(items) == 2:
        (operator,) = operators
        if unknown[0] == 1:
            operator = {"<": ">", ">": "<", "le": "ge", "ge": "le"}.get(operator, operator)
        bound = items[1 - unknown[0]]
        if operator == "ne":
            return _reals_without(bound)
        if operator in ("<", "le"):
            mark = "()" if operator == "<" else "(]"
            return (Answer("tuple", items=(_MINUS_INFINITY, bound), mark=mark),)
        if operator in (">", "ge"):
            mark = "()" if operator == ">" else "[)"
            return (Answer("tuple", items=(bound, _PLUS_INFINITY), mark=mark),)
        return None
    if len(items) != 3 or unknown[0] != 1:
        return None
    low, high = items[0], items[2]
    if set(operators) <= {">", "ge"}:
        low, high = high, low
        operators = [{">": "<", "ge": "le"}[operator] for operator in reversed(operators)]
    if not set(operators) <= {"<", "le"}:
        return None
    mark = {"<": "(", "le": "["}[operators[0]] + {"<": ")", "le": "]"}[operators[1]]
    return (Answer("tuple", items=(low, high), mark=mark),)


def _reals_without(points: Answer) -> tuple[Answer, ...] | None:
    """The open intervals between rational points."""
    items = points.items if points.kind in ("set", "list") else (points,)
    rationals = [item.value.rational if item.value is not None else None for item in items]
    if any(r is None for r in rationals):
        return None
    ends = [
        _MINUS_INFINITY,
        *(Answer("value", value=algebra.constant(r)) for r in sorted(set(rationals))),
        _PLUS_INFINITY,
    ]
    return tuple(Answer("tuple", items=(low, high), mark="()") for low, high in pairwise(ends))
