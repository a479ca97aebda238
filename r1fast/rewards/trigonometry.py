"""Exact values of trigonometric functions at multiples of pi/12, and of e^(i pi r)."""

from __future__ import annotations

from fractions import Fraction

from r1fast.rewards import algebra
from r1fast.rewards.algebra import Undefined, Value

# sin(n pi/12), n = 0 .. 6, as (a, b, d): (sqrt(a) + sqrt(b)) / d; a negative entry is subtracted
_SINES = ((0, 0, 1), (6, -2, 4), (1, 0, 2), (2, 0, 2), (3, 0, 2), (6, 2, 4), (1, 0, 1))


def sine(turn: Fraction) -> Value | None:
    """sin(pi * turn); None where `turn` is no multiple of 1/12."""
    n = turn * 12
    if n.denominator != 1:
        return None
    n = n.numerator % 24
    sign = -1 if n > 12 else 1
    n %= 12
    a, b, d = _SINES[min(n, 12 - n)]
    value = algebra.div(algebra.add(_root(a), _root(b)), algebra.constant(d))
    return value if sign > 0 else algebra.neg(value)


def cosine(turn: Fraction) -> Value | None:
    return sine(turn + Fraction(1, 2))


def _root(n: int) -> Value:
    if n == 0:
        return algebra.constant(0)
    root = algebra.power(algebra.constant(abs(n)), algebra.constant(Fraction(1, 2)))
    return root if n > 0 else algebra.neg(root)


def evaluate(name: str, angle: Value) -> Value | None:
    """sin, cos, tan, cot, sec, csc of `angle` (radians) where the value is exact, else None.

    Undefined where there is none, as for tan(pi/2).
    """
    if name not in ("sin", "cos", "tan", "cot", "sec", "csc"):
        return None
    turn = algebra.pi_multiple(angle)
    if turn is None or (s := sine(turn)) is None or (c := cosine(turn)) is None:
        return None
    one = algebra.constant(1)
    above, below = {
        "sin": (s, one), "cos": (c, one), "tan": (s, c), "cot": (c, s), "sec": (one, c),
        "csc": (one, s),
    }[name]  # fmt: skip
    if not below.num:
        raise Undefined(f"{name} where it has no value")
    return _rationalised(above, below)


def _rationalised(above: Value, below: Value) -> Value:
    """above / below without a sum in the denominator: sqrt(6) + sqrt(2) times its conjugate."""
    if len(below.num) == 2:
        first, second = below.num
        conjugate = Value({first: below.num[first], second: -below.num[second]}, below.den)
        above, below = algebra.mul(above, conjugate), algebra.mul(below, conjugate)
    return algebra.div(above, below)


def unit_circle(exponent: Value) -> Value | None:
    """e^exponent where the exponent is i pi r and the value exact, else None."""
    turn = algebra.pi_multiple(algebra.div(exponent, algebra.symbol("i")))
    if not exponent.num or turn is None:
        return None
    s, c = sine(turn), cosine(turn)
    if s is None or c is None:
        return None
    return algebra.add(c, algebra.mul(algebra.symbol("i"), s))
