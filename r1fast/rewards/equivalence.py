"""Whether two typed answers are the same.

True, False, or None where the exact algebra leaves it open. Types never mix: (0, 9) is not [0, 9),
a set is not a tuple.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from r1fast.rewards import algebra
from r1fast.rewards.answers import Answer
from r1fast.rewards.expression import Expression
from r1fast.rewards.latex import tokenize
from r1fast.rewards.regions import as_intervals, unknown_of
from r1fast.rewards.units import same_name, same_unit

_FLIPPED = {"=": "=", "<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}


def same(gold: Answer, answer: Answer) -> bool | None:
    """Whether `answer` is `gold`; None where exact algebra leaves it open."""
    if gold.name and answer.name and gold.name != answer.name:
        arguments = "(" in gold.name, "(" in answer.name  # f(x) = x and f = x may be the same
        if all(arguments) or gold.name.partition("(")[0] != answer.name.partition("(")[0]:
            return False
    if gold.kind == "text" or answer.kind == "text":
        if gold.kind == answer.kind:
            if gold.mark == answer.mark:
                return True
            if gold.value is None or answer.value is None:
                return False
        if gold.value is None or answer.value is None:
            return False
        return algebra.equal(gold.value, answer.value)
    if gold.kind == "value" and answer.kind == "value":
        return _same_value(gold, answer)
    kinds = {gold.kind, answer.kind}
    if "time" in kinds:
        return _same_time(gold, answer)
    if len(kinds) == 2 or "without" in kinds:  # x >= 3 and [3, oo)
        regions = as_intervals(gold), as_intervals(answer)
        if regions[0] is not None and regions[1] is not None:
            return _same_items(regions[0], regions[1], as_set=True)
    if kinds == {"tuple", "list"}:
        pair = [_by_name(gold), _by_name(answer)]
        if pair[0] is not None and pair[1] is not None:
            return (
                _all(same(g, a) for g, a in zip(*pair, strict=True))
                if len(pair[0]) == len(pair[1])
                else False
            )
    if kinds == {"tuple", "matrix"}:
        pair = [_nested_rows(gold), _nested_rows(answer)]
        if pair[0] is not None and pair[1] is not None:
            gold, answer, kinds = pair[0], pair[1], {"matrix"}
    if kinds == {"list"} and _is_named(gold) != _is_named(answer):  # m = 2, b = 1 is 2, 1
        return (
            _all(same(g, a) for g, a in zip(gold.items, answer.items, strict=True))
            if len(gold.items) == len(answer.items)
            else False
        )
    if kinds <= {"list", "set"}:
        if gold.mark != answer.mark and gold.mark and answer.mark:
            if any(item.kind == "relation" for item in gold.items + answer.items):
                return False  # "x < 1 or x > 2" is not "x < 1 and x > 2"
        return _same_items(gold.items, answer.items, as_set="set" in kinds)
    if "list" in kinds or "set" in kinds:
        return False if "union" not in kinds else None
    if "relation" in kinds:
        return _same_relation(gold, answer)
    if len(kinds) > 1:
        return None if kinds == {"tuple", "matrix"} else False
    if gold.kind == "union":
        return _same_items(gold.items, answer.items, as_set=True)
    if gold.kind == "base":
        return gold.mark == answer.mark
    if gold.kind == "matrix":
        if gold.mark != answer.mark:  # a determinant is no matrix
            return False
        if [len(r) for r in gold.items] != [len(r) for r in answer.items]:
            return False
        pairs = zip(gold.items, answer.items, strict=True)
        return _all(same(g, a) for gr, ar in pairs for g, a in zip(gr, ar, strict=True))
    if gold.mark != answer.mark or len(gold.items) != len(answer.items):
        return False
    return _all(same(g, a) for g, a in zip(gold.items, answer.items, strict=True))


def _same_time(gold: Answer, answer: Answer) -> bool:
    """9:00 a.m.; where only one side says which half of the day, the clock decides."""
    clocks = []
    for side in (gold, answer):
        if side.kind == "time":
            clocks.append(side.mark)
        elif side.kind == "tuple" and side.mark == "::" and len(side.items) == 2:
            values = [
                item.value.rational if item.value is not None else None for item in side.items
            ]
            if any(v is None or v.denominator != 1 for v in values):
                return False
            if any(item.unit for item in side.items):
                return False
            clocks.append(f"{values[0]}:{int(values[1]):02}")
        else:
            return False
    if gold.kind != answer.kind:
        clocks = [clock.partition(" ")[0] for clock in clocks]
    return clocks[0] == clocks[1]


def _is_named(answer: Answer) -> bool:
    """Whether the items have names of their own."""
    names = [item.name for item in answer.items]
    return all(names) and len(set(names)) == len(names)


def _by_name(answer: Answer) -> tuple[Answer, ...] | None:
    """The items of (1, 2), or of "x = 1, y = 2" in the order of the names."""
    if answer.kind == "tuple":
        if answer.mark != "()":
            return None
        named = [item.name for item in answer.items]
        if not all(named):
            return None if any(named) else answer.items
    names = [item.name for item in answer.items]
    if len(set(names)) != len(names) or not all(len(name) == 1 for name in names):
        return None
    return tuple(sorted(answer.items, key=lambda item: item.name))


def _nested_rows(answer: Answer) -> Answer | None:
    """[[1, 2], [3, 4]] as a matrix."""
    if answer.kind == "matrix":
        return answer
    rows = [item.items for item in answer.items if item.kind == "tuple" and item.mark == "[]"]
    if answer.mark != "[]" or len(rows) != len(answer.items):
        return None
    return Answer("matrix", items=tuple(rows))


def same_bounded(gold: Answer, answer: Answer) -> bool | None:
    """`same`, where a comparison beyond the bounds of the algebra is open, not an error."""
    try:
        return same(gold, answer)
    except ValueError:  # TooBig, Undefined
        return None


def _all(results) -> bool | None:
    outcome: bool | None = True
    for result in results:
        if result is False:
            return False
        outcome = outcome and result
    return outcome


def _same_value(gold: Answer, answer: Answer) -> bool | None:
    assert gold.value is not None
    assert answer.value is not None
    if gold.unit and answer.unit and not same_unit(gold.unit, answer.unit):
        return False
    if answer.unit in ("k", "b") and not gold.unit:  # 7K may be 7 kelvin, and 7000
        return False
    if "degree" in (gold.unit, answer.unit) and gold.unit != answer.unit:
        return _same_angle(gold, answer)
    result = algebra.equal(gold.value, answer.value)
    if result is not False:
        return result
    g, a = gold.value.rational, answer.value.rational
    if g is None or a is None:
        return False
    if gold.percent != answer.percent:
        # "25%" and "25" mean the same where only one of them says percent; but 0.5% is not 0.5
        g100 = g * 100 if gold.percent else g
        a100 = a * 100 if answer.percent else a
        return g100 == a100 and abs(g100) > 1
    return _rounds_to(g, answer, a)


def _same_angle(gold: Answer, answer: Answer) -> bool | None:
    """90 degrees is 90 where no unit is said, and pi/2; pi/4 degrees is not pi/4."""
    degrees, other = (gold, answer) if gold.unit == "degree" else (answer, gold)
    assert degrees.value is not None
    assert other.value is not None
    if other.unit not in ("", "radian", "radians", "rad"):
        return False
    if other.unit == "" and degrees.value.rational is not None and other.value.rational is not None:
        return degrees.value.rational == other.value.rational
    turn = algebra.pi_multiple(other.value)
    if turn is None or degrees.value.rational is None:
        return False
    return degrees.value.rational == turn * 180


def _rounds_to(gold: Fraction, answer: Answer, value: Fraction) -> bool:
    """Whether a decimal of 10 or more digits is a fraction written out, as 0.0833333333333333."""
    d = gold.denominator
    while d % 2 == 0:
        d //= 2
    while d % 5 == 0:
        d //= 5
    if answer.digits < 10 or d == 1:
        return False
    return abs(gold - value) * 10 ** (answer.digits - 1) < abs(gold)


def _same_items(gold: tuple, items: tuple, as_set: bool) -> bool | None:
    """Equal as unordered collections; as sets, repeated elements count once."""
    if as_set:
        gold, items = _distinct(gold), _distinct(items)
    if len(gold) != len(items):
        return False
    left = list(items)
    outcome: bool | None = True
    counted = all(item.unit for item in (*gold, *items)) and len(gold) > 1  # 5 boys, 3 girls
    for g in gold:
        verdicts = [same(g, a) if not counted or same_name(g.unit, a.unit) else False for a in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            outcome = None
        else:
            return False
    return outcome


def _distinct(items: tuple) -> tuple:
    kept: list[Answer] = []
    for item in items:
        if not any(same(item, other) is True for other in kept):
            kept.append(item)
    return tuple(kept)


def _same_relation(gold: Answer, answer: Answer) -> bool | None:
    """Equations up to a constant factor, chains of inequalities in either direction."""
    gold, answer = _as_relation(gold), _as_relation(answer)
    if gold.kind != "relation" or answer.kind != "relation":
        # -4 <= k <= 0 and [-4, 0] may be the same set; a bare value is not an equation
        return None if {gold.kind, answer.kind} & {"tuple", "union"} else False
    if gold.mark == answer.mark == "=":
        sides = [side.value for side in gold.items + answer.items]
        if all(side is not None for side in sides):
            g = algebra.add(sides[0], sides[1], -1)
            a = algebra.add(sides[2], sides[3], -1)
            return algebra.proportional(g, a)
    if unknown_of(gold) and unknown_of(gold) == unknown_of(answer):
        regions = as_intervals(gold), as_intervals(answer)
        if regions[0] is not None and regions[1] is not None:
            return _same_items(regions[0], regions[1], as_set=True)
    if len(gold.items) != len(answer.items):
        return False
    flipped = replace(
        answer,
        items=answer.items[::-1],
        mark=" ".join(_FLIPPED[op] for op in reversed(answer.mark.split())),
    )
    outcome: bool | None = False
    for reading in (answer, flipped):
        if gold.mark == reading.mark:
            pairs = zip(gold.items, reading.items, strict=True)
            result = _all(same(g, a) for g, a in pairs)
            if result is not False:
                return result
    if any(item.value is None or item.value.opaque for item in gold.items + answer.items):
        outcome = None
    # x > 3 and x - 3 > 0 are the same; only equal forms are decided here
    return None if outcome is None or gold.mark.split()[0] != "=" else False


def _as_relation(answer: Answer) -> Answer:
    """x = 5 was read as the value 5 named x; as an equation it has two sides."""
    if answer.kind == "value" and answer.name:
        side = Expression(tokenize(answer.name)).parse()
        items = (Answer("value", value=side), replace(answer, name=""))
        return Answer("relation", items=items, mark="=")
    return answer
