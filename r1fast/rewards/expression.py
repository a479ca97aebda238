"""Arithmetic notation to exact values: a recursive-descent parser over tokens, bounded in depth."""

from __future__ import annotations

import re
from fractions import Fraction

from r1fast.rewards import algebra, trigonometry
from r1fast.rewards.algebra import TooBig, Undefined, Value
from r1fast.rewards.latex import FUNCTIONS, GREEK, Token, Unreadable

MAX_DEPTH = 32


class Expression:
    """Arithmetic over `algebra.Value`."""

    def __init__(self, tokens: list[Token], depth: int = 0):
        self.tokens = tokens
        self.at = 0
        self.depth = depth
        self.saw_infinity = False

    def parse(self) -> Value:
        value = self.sum()
        if self.at < len(self.tokens):
            raise Unreadable(f"unexpected {self.tokens[self.at].value!r}")
        if self.saw_infinity and value.num not in (_PLUS_INFINITY.num, _MINUS_INFINITY.num):
            raise Undefined("arithmetic on infinity")
        return value

    def peek(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, value: str | None = None) -> Token:
        t = self.peek()
        if t is None or (value is not None and t.value != value):
            raise Unreadable(f"expected {value or 'more'}, got {t.value if t else 'the end'}")
        self.at += 1
        return t

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        value = None
        while (t := self.peek()) is not None and (value is None or t.value in _SIGNS):
            sign = 1
            if t.value in _SIGNS and t.kind == "mark":
                self.at += 1
                sign = 1 if t.value == "+" else -1
            term = self.product()
            if value is None:
                value = term if sign > 0 else algebra.neg(term)
            else:
                value = algebra.add(value, term, sign)
        self.depth -= 1
        if value is None:
            raise Unreadable("an empty expression")
        return value

    def product(self) -> Value:
        value = self.signed()
        while (t := self.peek()) is not None:
            if t.value in ("*", "cdot", "times") and t.kind != "word":
                before, after = (
                    self.tokens[self.at - 1 : self.at],
                    self.tokens[self.at + 1 : self.at + 2],
                )
                if t.value == "times" and all(_is_capital(x) for x in (*before, *after)):
                    raise Unreadable("a product of capitals, which may not commute")
                self.at += 1
                value = algebra.mul(value, self.signed())
            elif t.value == "/" and t.kind == "mark":
                self.at += 1
                value = algebra.div(value, self.signed())
            elif self.starts_factor(t):
                if t.kind == "number":
                    raise Unreadable("two numbers in a row")
                value = algebra.mul(value, self.power())
            else:
                break
        return value

    def starts_factor(self, t: Token) -> bool:
        if t.kind in ("number", "word"):
            return True
        if t.kind == "command":
            return t.value in _FACTOR_COMMANDS or t.value in GREEK or t.value in FUNCTIONS
        return t.kind == "mark" and t.value in ("(", "[", "{")

    def signed(self) -> Value:
        """A factor with any number of signs in front; a loop, so a thousand signs do not nest."""
        negative = False
        while (t := self.peek()) is not None and t.kind == "mark" and t.value in "+-":
            negative ^= t.value == "-"
            self.at += 1
        value = self.power()
        return algebra.neg(value) if negative else value

    def power(self) -> Value:
        mixed = self.mixed_number()
        if mixed is not None:
            return mixed
        base = self.postfix()
        t = self.peek()
        if t is None or t.value != "^":
            return base
        self.at += 1
        t = self.peek()
        if t is not None and t.value == "prime":
            self.at += 1
            return algebra.opaque("prime", base)
        ahead = self.tokens[self.at : self.at + 5]
        if len(ahead) == 5 and "".join(x.value for x in ahead if x.kind == "mark") == "{()}":
            if ahead[2].kind == "number":
                raise Unreadable("a number in brackets as an exponent, which may be a derivative")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        negative = t is not None and t.value == "-"
        if negative:
            self.at += 1
        exponent = self.power()  # right to left: 2^3^2 = 2^9
        self.depth -= 1
        return _power(base, algebra.neg(exponent) if negative else exponent)

    def mixed_number(self) -> Value | None:
        r"""1\frac{2}{3} or "1 2/3": a whole number and a proper fraction of whole numbers."""
        window = self.tokens[self.at : self.at + 9]
        if not window or window[0].kind != "number" or not window[0].value.isdigit():
            return None
        if len(window) > 1 and window[1].kind == "command" and window[1].value == "frac":
            start = self.at
            self.at += 2
            try:
                parts = self.digit_argument(), self.digit_argument()
            except Unreadable:
                parts = None, None
        elif (
            len(window) > 3
            and window[1].kind == "number"
            and window[2].value == "/"
            and window[3].kind == "number"
        ):
            start = self.at
            self.at += 4
            digits = [t.value if t.value.isdigit() else None for t in (window[1], window[3])]
            parts = digits[0], digits[1]
        else:
            return None
        numerator, denominator = parts
        if numerator and denominator and 0 < int(numerator) < int(denominator):
            fraction = Fraction(int(numerator), int(denominator))
            return algebra.constant(int(window[0].value) + fraction)
        self.at = start
        return None

    def digit_argument(self) -> str:
        t = self.take()
        if t.kind == "number":
            return self.first_digit(t).value
        if t.value != "{":
            raise Unreadable("no whole number")
        digits = self.take()
        self.take("}")
        if not digits.value.isdigit():
            raise Unreadable("no whole number")
        return digits.value

    def first_digit(self, t: Token) -> Token:
        r"""\frac13: TeX reads one digit; the others are put back."""
        if len(t.value) > 1:
            self.tokens = list(self.tokens)
            self.at -= 1
            self.tokens[self.at] = Token("number", t.value[1:])
        return Token("number", t.value[0])

    def postfix(self) -> Value:
        value = self.atom()
        while (t := self.peek()) is not None and t.value in ("!", "'", "circ"):
            if t.kind == "mark" and t.value == "!":
                value = algebra.factorial(value)
            elif t.value == "circ" and t.kind == "command" and value.rational is not None:
                value = algebra.mul(value, _DEGREE)
            elif t.value == "'" and t.kind == "mark" and value.rational is None:
                value = algebra.opaque("prime", value)
            else:  # 7', or a composition of functions
                raise Unreadable(f"{t.value!r} behind a number")
            self.at += 1
        return value

    def atom(self) -> Value:
        t = self.take()
        if t.kind == "number":
            return algebra.constant(_number(t.value))
        if t.kind == "word":
            return self.word(t.value)
        if t.kind == "text":
            return self.word(t.value.strip())
        if t.kind == "mark":
            return self.bracketed(t)
        if t.value in GREEK:
            return self.subscripted(t.value)
        if t.value in FUNCTIONS:
            return self.function(t.value)
        if t.value == "pi":
            return algebra.symbol("pi")
        if t.value == "infty":
            self.saw_infinity = True
            return algebra.symbol(algebra.INFINITY)
        if t.value == "frac":
            numerator = self.argument()
            return algebra.div(numerator, self.argument())
        if t.value == "binom":
            upper = self.argument()
            return algebra.binomial(upper, self.argument())
        if t.value == "sqrt":
            index = algebra.constant(2)
            if (n := self.peek()) is not None and n.value == "[":
                self.at += 1
                index = self.sum()
                self.take("]")
            return algebra.power(self.argument(), algebra.div(algebra.constant(1), index))
        if t.value in ("lfloor", "lceil"):
            inner = self.sum()
            self.take({"lfloor": "rfloor", "lceil": "rceil"}[t.value])
            return algebra.opaque(t.value, inner)
        if t.value.startswith("math") or t.value in ("emptyset", "overline", "vec"):
            if t.value in ("overline", "vec"):
                raise Unreadable(f"\\{t.value}")
            return algebra.symbol(t.value)
        raise Unreadable(f"\\{t.value}")

    def bracketed(self, t: Token) -> Value:
        closing = {"(": ")", "[": "]", "{": "}", "|": "|"}.get(t.value)
        if closing is None:
            raise Unreadable(f"unexpected {t.value!r}")
        value = self.sum()
        self.take(closing)
        return algebra.absolute(value) if t.value == "|" else value

    def argument(self) -> Value:
        """The argument of a command: a group, or one token (one digit)."""
        t = self.peek()
        if t is not None and t.kind == "number":
            self.at += 1
            return algebra.constant(_number(self.first_digit(t).value))
        if t is not None and t.kind == "word" and len(t.value) > 1:
            self.tokens = list(self.tokens)
            self.tokens[self.at] = Token("word", t.value[1:])
            return algebra.symbol(t.value[0])
        return self.atom()

    def word(self, word: str) -> Value:
        """A run of letters: a function, pi, or a product of one-letter symbols."""
        if word in FUNCTIONS:
            return self.function(word)
        if word == "sqrt":
            return algebra.power(self.postfix(), algebra.constant(Fraction(1, 2)))
        if word == "pi":
            return algebra.symbol("pi")
        if word == "inf":
            self.saw_infinity = True
            return algebra.symbol(algebra.INFINITY)
        if word in GREEK:
            return self.subscripted(word)
        if not word.isalpha() or len(word) > 3:
            raise Unreadable(f"the word {word[:20]!r} in an expression")
        if _ONE_NAME.fullmatch(word):
            return algebra.symbol(word)
        if word in _APPLIED and self.is_applied():
            return algebra.opaque(word, self.atom())
        value = letters(word[:-1])
        last = self.subscripted(word[-1])
        if len(word) > 1 and (t := self.peek()) is not None and t.value == "^":
            # xy^2: the power belongs to the last letter only
            self.at += 1
            last = algebra.power(last, self.power())
        return algebra.mul(value, last)

    def is_applied(self) -> bool:
        """f(x), f(g(x)): a function, where h(a + b) is a product."""
        behind = [t.value for t in self.tokens[self.at : self.at + 3]]
        return behind[:1] == ["("] and behind[2:] in ([")"], ["("])

    def subscripted(self, name: str) -> Value:
        if (t := self.peek()) is not None and t.value == "_":
            self.at += 1
            t = self.take()
            if t.value == "{":
                inner = []
                while (t := self.take()).value != "}":
                    inner.append(t.value)
                name += "_" + "".join(inner)
            else:
                name += "_" + t.value
        return algebra.symbol(name)

    def function(self, name: str) -> Value:
        arguments: list[Value] = []
        exponent: Value | None = None
        while (t := self.peek()) is not None and t.value in ("_", "^"):  # log_2, sin^2
            self.at += 1
            if t.value == "^" and self.at < len(self.tokens) and self.tokens[self.at].value == "-":
                raise Unreadable(f"{name}^-, which may be an inverse")
            argument = self.argument()
            if t.value == "^" and (argument.rational or 0) > 0:
                exponent = argument
            else:  # sin^{-1} is the inverse function, and no power
                arguments.append(algebra.opaque(t.value, argument))
        t = self.peek()
        if t is None:
            raise Unreadable(f"{name} of nothing")
        if t.value in ("(", "{"):
            inner = self.atom()
        else:
            inner = self.power()
            while (t := self.peek()) is not None and (  # sin 2 pi x
                (t.kind == "word" and t.value not in FUNCTIONS) or t.value in ("pi", *GREEK)
            ):
                inner = algebra.mul(inner, self.power())
        value = None if arguments else trigonometry.evaluate(name, inner)
        if value is None:
            value = algebra.opaque(name, inner, *arguments)
        return value if exponent is None else algebra.power(value, exponent)


# a triangle, an order; a roman number; n choose r
_ONE_NAME = re.compile("[A-Z]{3}|[IVXLCDM]*[IVX][IVXLCDM]*(?<=..)|[a-z][CP][a-z]")
_APPLIED = frozenset("fghFGHP")
_SIGNS = ("+", "-")
_FACTOR_COMMANDS = frozenset({"frac", "sqrt", "pi", "infty", "binom", "lfloor", "lceil"})
_E = algebra.symbol("e")
_DEGREE = algebra.mul(algebra.symbol("pi"), algebra.constant(Fraction(1, 180)))
_PLUS_INFINITY = algebra.symbol(algebra.INFINITY)
_MINUS_INFINITY = algebra.neg(_PLUS_INFINITY)


def _is_capital(t: Token) -> bool:
    return t.kind == "word" and len(t.value) == 1 and t.value.isupper()


def letters(word: str) -> Value:
    """A product of symbols, or one symbol where the letters have an order."""
    if _ONE_NAME.fullmatch(word):
        return algebra.symbol(word)
    value = algebra.constant(1)
    for letter in word:
        value = algebra.mul(value, algebra.symbol(letter))
    return value


def _number(text: str) -> Fraction:
    r"""An integer, a decimal, or p/q: what tokenize makes of 0.1\overline{6}."""
    return Fraction(text if text[-1] != "." else text[:-1])


def _power(base: Value, exponent: Value) -> Value:
    if exponent.rational is None and algebra.equal(base, _E):
        value = trigonometry.unit_circle(exponent)
        if value is not None:
            return value
    return algebra.power(base, exponent)
