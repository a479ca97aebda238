r"""Exact values: rational functions over Q with radicals, pi, e, i and symbols. No float anywhere.

A polynomial is {monomial: coefficient}; a monomial is ((atom, exponent), ...), sorted. Atoms are
symbols, "i" (i^2 = -1) and primes "#3" with an exponent in (0, 1): sqrt(12) is {(("#3", 1/2),): 2}.
Monomials in such radicals are linearly independent over Q (Besicovitch
1940), so two values are equal exactly when their normal forms are. What has no normal form here
(sin x, a root of a sum) is an opaque atom: equal forms are equal values, unequal forms say nothing.
Sizes are bounded before anything is built; beyond a bound: TooBig.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

MAX_BITS = 32768  # of one coefficient
MAX_TERMS = 128
MAX_DEGREE = 64  # of a sum raised to a power
MAX_FACTORIAL = 2500

Monomial = tuple[tuple[str, Fraction], ...]
Poly = dict[Monomial, Fraction]
ONE = Fraction(1)
OPAQUE = "@"  # the first letter of an opaque atom
INFINITY = "oo"


class TooBig(ValueError):
    """The value exists but would be too large to build."""


class Undefined(ValueError):
    """0/0, 1/0, 0^0."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """num / den, den never the zero polynomial."""

    num: Poly
    den: Poly

    @property
    def rational(self) -> Fraction | None:
        """The value as a fraction, None where it is no rational constant (as written)."""
        if self.den is _UNIT:
            if not self.num:
                return Fraction(0)
            if len(self.num) == 1:
                return self.num.get(())
        return None

    @property
    def opaque(self) -> bool:
        return any(atom[0] == OPAQUE for p in (self.num, self.den) for m in p for atom, _ in m)

    def atoms(self) -> set[str]:
        return {atom for p in (self.num, self.den) for m in p for atom, _ in m}


_UNIT: Poly = {(): ONE}


def constant(value: int | Fraction) -> Value:
    value = Fraction(value)
    _bound(value)
    return Value({(): value} if value else {}, _UNIT)


def symbol(name: str, exponent: int | Fraction = 1) -> Value:
    return Value({((name, Fraction(exponent)),): ONE}, _UNIT)


def opaque(name: str, *args: Value) -> Value:
    """A function of `args` that is compared by its form only."""
    return symbol(f"{OPAQUE}{name}({','.join(map(key, args))})")


def _bound(value: Fraction) -> None:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooBig(f"a number above {MAX_BITS} bits")


def _poly_add(a: Poly, b: Poly, sign: int = 1) -> Poly:
    total = dict(a)
    for monomial, c in b.items():
        new = total.get(monomial, 0) + sign * c
        if new:
            _bound(new)
            total[monomial] = new
        else:
            total.pop(monomial, None)
    if len(total) > MAX_TERMS:
        raise TooBig(f"more than {MAX_TERMS} terms")
    return total


def _monomial_mul(a: Monomial, b: Monomial) -> tuple[Monomial, Fraction]:
    """(monomial, factor): radicals and i are reduced, the whole part goes to the factor."""
    if not a or not b:
        return a or b, ONE
    exponents = dict(a)
    for atom, e in b:
        exponents[atom] = exponents.get(atom, 0) + e
    return _reduce(exponents)


def _reduce(exponents: dict[str, Fraction]) -> tuple[Monomial, Fraction]:
    factor, kept = ONE, []
    for atom, e in exponents.items():
        if atom == "i" and e.denominator == 1:
            turns = e.numerator % 4
            factor *= -1 if turns >= 2 else 1
            e = Fraction(turns % 2)
        elif atom[0] == "#":
            whole = e.numerator // e.denominator
            if whole:
                factor *= Fraction(int(atom[1:])) ** whole
                e -= whole
        if e:
            kept.append((atom, e))
    return tuple(sorted(kept)), factor


def _poly_mul(a: Poly, b: Poly) -> Poly:
    if a is _UNIT:
        return b
    if b is _UNIT:
        return a
    if len(a) * len(b) > MAX_TERMS * 8:
        raise TooBig("a product of long sums")
    total: Poly = {}
    for ma, ca in a.items():
        for mb, cb in b.items():
            monomial, factor = _monomial_mul(ma, mb)
            new = total.get(monomial, 0) + ca * cb * factor
            _bound(new)
            total[monomial] = new
    total = {m: c for m, c in total.items() if c}
    if len(total) > MAX_TERMS:
        raise TooBig(f"more than {MAX_TERMS} terms")
    return total


def add(a: Value, b: Value, sign: int = 1) -> Value:
    if a.den is b.den or a.den == b.den:
        return Value(_poly_add(a.num, b.num, sign), a.den)
    num = _poly_add(_poly_mul(a.num, b.den), _poly_mul(b.num, a.den), sign)
    return _value(num, _poly_mul(a.den, b.den))


def neg(a: Value) -> Value:
    return Value({m: -c for m, c in a.num.items()}, a.den)


def mul(a: Value, b: Value) -> Value:
    return _value(_poly_mul(a.num, b.num), _poly_mul(a.den, b.den))


def div(a: Value, b: Value) -> Value:
    if not b.num:
        raise Undefined("division by zero")
    return mul(a, _value(b.den, b.num))


def _value(num: Poly, den: Poly) -> Value:
    """num / den; a denominator of one term moves into the numerator."""
    if len(den) == 1 and den is not _UNIT:
        ((monomial, c),) = den.items()
        inverse, factor = _reduce({atom: -e for atom, e in monomial})
        return Value(_poly_mul(num, {inverse: factor / c}), _UNIT)
    return Value(num, _UNIT if den == _UNIT else den)


def power(base: Value, exponent: Value) -> Value:
    r = exponent.rational
    if r is None:
        return _transcendental_power(base, exponent)
    if not base.num:
        if r <= 0:
            raise Undefined("zero to a power of zero or below")
        return base
    if r.denominator == 1:
        return _whole_power(base, r.numerator)
    if r.denominator > 64 or abs(r.numerator) > MAX_BITS:
        raise TooBig("a root of high order")
    return _root(base, r)


def _whole_power(base: Value, n: int) -> Value:
    if n < 0:
        return _whole_power(div(constant(1), base), -n)
    if len(base.num) == 1 and base.den is _UNIT:
        ((monomial, c),) = base.num.items()
        if abs(c) != 1:
            bits = max(c.numerator.bit_length(), c.denominator.bit_length())
            if n * max(1, bits - 1) > MAX_BITS:
                raise TooBig(f"a power above {MAX_BITS} bits")
        if n > 10**6:
            raise TooBig("an exponent above a million")
        for atom, e in monomial:
            if atom[0] == "#" and n * e * int(atom[1:]).bit_length() > MAX_BITS:
                raise TooBig(f"a power above {MAX_BITS} bits")
        reduced, factor = _reduce({atom: e * n for atom, e in monomial})
        return Value({reduced: c**n * factor}, _UNIT)
    if n > MAX_DEGREE:
        raise TooBig(f"a sum to a power above {MAX_DEGREE}")
    result = constant(1)
    for _ in range(n):
        result = mul(result, base)
    return result


def _root(base: Value, r: Fraction) -> Value:
    """base ** r with r = p/q, q > 1: principal root; real for an odd root of a negative number."""
    q = r.denominator
    if len(base.num) == 1 and base.den is _UNIT:
        ((monomial, c),) = base.num.items()
        unit = constant(1)
        if c < 0 and q % 2:
            unit = constant(-1 if r.numerator % 2 else 1)
        elif c < 0 and q == 2:
            unit = _whole_power(symbol("i"), r.numerator % 4)
        elif c < 0:
            return _opaque_root(base, r)
        # x^(1/2) is a fine atom; sqrt(x^2) is |x| and sqrt(x y) may not be split
        simple = all(atom[0] == "#" or atom == "pi" or atom == "e" for atom, _ in monomial)
        single = len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0] != "i"
        if not monomial or simple or (single and c > 0):
            exponents: dict[str, Fraction] = {atom: e * r for atom, e in monomial}
            whole = ONE
            try:
                factored = (_factor(abs(c.numerator)), 1), (_factor(c.denominator), -1)
            except TooBig:  # the number itself is within bounds, only its factors are unknown
                return _opaque_root(base, r)
            for factors, sign in factored:
                for prime, e in factors.items():
                    name = f"#{prime}"
                    exponents[name] = exponents.get(name, Fraction(0)) + sign * e * r
            for atom, e in exponents.items():
                if atom[0] == "#" and abs(e) * int(atom[1:]).bit_length() > MAX_BITS:
                    raise TooBig(f"a power above {MAX_BITS} bits")
            reduced, factor = _reduce(exponents)
            return mul(unit, Value({reduced: whole * factor}, _UNIT))
    return _opaque_root(base, r)


def _opaque_root(base: Value, r: Fraction) -> Value:
    atom = opaque(f"root{r.denominator}", base)
    return _whole_power(atom, r.numerator)


def _factor(n: int) -> dict[int, int]:
    """Prime factors by trial division up to 10^4; TooBig where a factor above 10^8 is left over.

    Perfect powers are taken apart first, so 10^100 and large squares are no problem.
    """
    factors: dict[int, int] = {}
    p = 2
    while p * p <= n and p < 10**4:
        while n % p == 0:
            factors[p] = factors.get(p, 0) + 1
            n //= p
        p += 1 if p == 2 else 2
    if n > 1:
        if n >= 10**8:
            root = math.isqrt(n)
            if root * root == n:
                for prime, e in _factor(root).items():
                    factors[prime] = factors.get(prime, 0) + 2 * e
                return factors
            raise TooBig("a radicand too large to factor")
        factors[n] = factors.get(n, 0) + 1
    return factors


def _transcendental_power(base: Value, exponent: Value) -> Value:
    return opaque("pow", base, exponent)


def factorial(a: Value) -> Value:
    n = a.rational
    if n is None:
        return opaque("factorial", a)
    if n.denominator != 1 or n < 0:
        raise Undefined(f"factorial of {n}")
    if n > MAX_FACTORIAL:
        raise TooBig(f"factorial above {MAX_FACTORIAL}")
    return constant(math.factorial(n.numerator))


def binomial(a: Value, b: Value) -> Value:
    n, k = a.rational, b.rational
    if n is None or k is None:
        return opaque("binom", a, b)
    if n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        raise Undefined(f"binomial of {n} and {k}")
    if n > MAX_FACTORIAL:
        raise TooBig(f"binomial above {MAX_FACTORIAL}")
    return constant(math.comb(n.numerator, k.numerator))


def absolute(a: Value) -> Value:
    if a.rational is not None:
        return constant(abs(a.rational))
    unit = (("i", ONE),)
    if a.den is _UNIT and unit in a.num and a.num.keys() <= {(), unit}:
        square = a.num.get((), Fraction(0)) ** 2 + a.num[unit] ** 2
        return power(constant(square), constant(Fraction(1, 2)))
    return opaque("abs", a)


def pi_multiple(a: Value) -> Fraction | None:
    """r where the value is r pi, as it is written."""
    if not a.num:
        return Fraction(0)
    pi = (("pi", ONE),)
    return a.num[pi] if a.den is _UNIT and a.num.keys() == {pi} else None


def equal(a: Value, b: Value) -> bool | None:
    """Whether two values are the same; None where an opaque atom leaves it open."""
    ra, rb = a.rational, b.rational
    if ra is not None and rb is not None:
        return ra == rb
    if _poly_mul(a.num, b.den) == _poly_mul(b.num, a.den):
        return True
    return None if a.opaque or b.opaque else False


def proportional(a: Value, b: Value) -> bool | None:
    """Whether a = c b for a rational c != 0: the same equation a = 0 and b = 0."""
    if not a.num or not b.num:
        return not a.num and not b.num
    x, y = _poly_mul(a.num, b.den), _poly_mul(b.num, a.den)
    if x.keys() == y.keys():
        lead = next(iter(x))
        ratio = x[lead] / y[lead]
        if all(c == ratio * y[m] for m, c in x.items()):
            return True
    return None if a.opaque or b.opaque else False


def key(a: Value) -> str:
    """A text that is the same for values of the same normal form."""
    return _poly_key(a.num) + ("" if a.den is _UNIT else "/" + _poly_key(a.den))


def _poly_key(p: Poly) -> str:
    terms = (f"{c}*" + ".".join(f"{a}^{e}" for a, e in m) for m, c in sorted(p.items()))
    return "[" + "+".join(terms) + "]"
