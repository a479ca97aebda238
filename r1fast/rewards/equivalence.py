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

_UNITS = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "kg": "kilogram",
    "g": "gram", "mg": "milligram", "ft": "foot", "feet": "foot", "in": "inch", "inches": "inch",
    "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce", "hr": "hour", "h": "hour",
    "min": "minute", "s": "second", "sec": "second", "l": "liter", "ml": "milliliter",
    "cent": "cent", "dollar": "dollar", "usd": "dollar", "day": "day", "week": "week",
    "month": "month", "year": "year", "yard": "yard", "yd": "yard", "degree": "degree",
    "radian": "radian", "rad": "radian",
}  # fmt: skip
_UNITS.update({name: name for name in list(_UNITS.values())})
_FLIPPED = {"=": "=", "<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}


def same(gold: Answer, answer: Answer) -> bool | None:
    """Whether `answer` is `gold`; None where exact algebra leaves it open."""
    if gold.name and answer.name and gold.name != answer.name:
        if gold.name.partition("(")[0] != answer.name.partition("(")[0]:
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
    if kinds <= {"list", "set"}:
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
        if [len(r) for r in gold.items] != [len(r) for r in answer.items]:
            return False
        pairs = zip(gold.items, answer.items, strict=True)
        return _all(same(g, a) for gr, ar in pairs for g, a in zip(gr, ar, strict=True))
    if gold.mark != answer.mark or len(gold.items) != len(answer.items):
        return False
    return _all(same(g, a) for g, a in zip(gold.items, answer.items, strict=True))


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
    if gold.unit and answer.unit and not _same_unit(gold.unit, answer.unit):
        return False
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


def _same_unit(a: str, b: str) -> bool:
    """False only for two known units that differ: "12 cm" is not "12 m"."""

    def known(unit: str) -> str | None:
        bare = unit.rstrip("23").strip()
        name = _UNITS.get(bare) or _UNITS.get(bare.removesuffix("s"))
        return name and name + unit[len(unit.rstrip("23")) :]

    x, y = known(a), known(b)
    return x is None or y is None or x == y


def _same_items(gold: tuple, items: tuple, as_set: bool) -> bool | None:
    """Equal as unordered collections; as sets, repeated elements count once."""
    if as_set:
        gold, items = _distinct(gold), _distinct(items)
    if len(gold) != len(items):
        return False
    left = list(items)
    outcome: bool | None = True
    for g in gold:
        verdicts = [same(g, a) for a in left]
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
        side = Expression(tokenize(answer.name), 1, 0).parse()
        items = (Answer("value", value=side), replace(answer, name=""))
        return Answer("relation", items=items, mark="=")
    return answer
