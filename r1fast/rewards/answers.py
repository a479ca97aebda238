"""Typed answers: numbers, expressions, tuples, intervals, sets, matrices, equations, words.

`read_answer(text)` parses, `same(gold, answer)` decides True, False, or None where the exact
algebra leaves it open. Types never mix: (0, 9) is not [0, 9), a set is not a tuple.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from r1fast.rewards import algebra
from r1fast.rewards.algebra import TooBig, Undefined, Value
from r1fast.rewards.latex import FUNCTIONS, GREEK, Token, Unreadable, clean, tokenize

MAX_DEPTH = 32
MAX_ITEMS = 64
_LETTER = re.compile(r"\(?([A-Za-z])[).:]*")
_CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s*(\S.*)?", re.DOTALL)
_CHOICE_MARK = re.compile(r"\([A-J]\)|\b[A-J][.):]")
# what may stand behind a number as its unit, and what a sentence would hold instead
_NOT_UNITS = frozenset(
    "is not isn't or and but wrong than to no if either neither nor maybe perhaps about more less "
    "incorrect false true the answer so was are be unless except plus minus times".split()
)
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
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "le", "ge": "ge", "ne": "ne"}
_FLIPPED = {"=": "=", "<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne"}
_OPEN = {"(": "(", "[": "[", "\\{": "{", "langle": "("}
_CLOSE = {")": ")", "]": "]", "\\}": "}", "rangle": ")"}


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One typed answer. `kind` says which of the fields are in use."""

    kind: str  # value | tuple | list | set | union | matrix | relation | base | text
    value: Value | None = None  # value
    items: tuple = ()  # Answers; rows of a matrix
    mark: str = ""  # brackets "(]" of a tuple; operators of a relation; base; text
    percent: bool = False  # of a value
    unit: str = ""
    digits: int = 0  # significant digits where the value was written as one plain decimal
    name: str = ""  # x of "x = 5"


@lru_cache(maxsize=1 << 16)
def read_answer(text: str) -> Answer:
    """Parse. Raises Unreadable, TooBig or Undefined (all ValueError)."""
    text = clean(text)
    if not text:
        raise Unreadable("an empty answer")
    if match := _LETTER.fullmatch(text):
        return Answer("value", value=algebra.symbol(match[1]))
    tokens = tokenize(text)
    if len(tokens) == 1 and tokens[0].kind == "text":
        return read_answer(tokens[0].value.strip() or "\\")
    if _is_prose(tokens):
        return _text(tokens)
    return _Reader(text).answer(tokens)


def letter_of(answer: Answer) -> str | None:
    """The letter where the answer is one capital letter A to J, as in multiple choice."""
    if answer.kind != "value" or answer.value is None or answer.name:
        return None
    atoms = answer.value.atoms()
    letter = next(iter(atoms)) if len(atoms) == 1 else ""
    if len(letter) == 1 and letter in "ABCDEFGHIJ":
        return letter if algebra.equal(answer.value, algebra.symbol(letter)) else None
    return None


def choice_letter(text: str) -> str | None:
    """The letter of "(B) Paris" or "B. Paris"; None where two choices are named."""
    match = _CHOICE.fullmatch(text.strip())
    if match is None or _CHOICE_MARK.search(match[3] or ""):
        return None
    return match[1] or match[2]


def _text(tokens: list[Token]) -> Answer:
    words = re.findall(r"[\w']+", " ".join(t.value for t in tokens).casefold())
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    value = None
    if len(tokens) == 1 and len(tokens[0].value) <= 3:  # ab may be a times b
        value = algebra.constant(1)
        for letter in tokens[0].value:
            value = algebra.mul(value, algebra.symbol(letter))
    return Answer("text", mark=" ".join(words), value=value)


def _is_prose(tokens: list[Token]) -> bool:
    words = [t for t in tokens if t.kind in ("word", "text")]
    marks = {t.value for t in tokens if t.kind not in ("word", "text")}
    if not words or not marks <= set(".,-'") or _separated(tokens) or _is_symbolic(tokens):
        return False
    return "-" not in marks or all(len(t.value) > 2 for t in words)  # p - q is no prose


def _is_symbolic(tokens: list[Token]) -> bool:
    """A single letter, or letters in a row as in "x y"."""
    return all(t.kind == "word" and len(t.value) == 1 for t in tokens) or (
        len(tokens) == 2 and tokens[1].value == "'" and len(tokens[0].value) == 1
    )


def _separated(tokens: list[Token]) -> bool:
    return any(_is_separator(t) for t in tokens)


def _is_separator(t: Token) -> bool:
    if t.kind in ("word", "text"):
        return t.value.strip().strip(",").casefold().strip() in ("and", "or")
    return t.value in (",", ";")


class _Reader:
    """A recursive-descent parser over tokens; depth and sizes are bounded."""

    def __init__(self, text: str):
        self.text = text
        self.depth = 0
        self.sign = 1  # which of the two readings of a plus-minus is parsed

    # --- structure: lists, relations, brackets

    def answer(self, tokens: list[Token]) -> Answer:
        """A whole answer: one item, or an unordered list of them."""
        if not tokens:
            raise Unreadable("an empty part")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        try:
            name = ""
            if len(tokens) > 2 and _is_name(tokens[:1]):
                if tokens[1].value == "in" and tokens[1].kind == "command":
                    tokens = tokens[2:]
                elif tokens[1].value == "=" and _separated(tokens):
                    rest = tokens[2:]
                    if not any(t.value == "=" for t in rest):  # n = 1, 2, 3
                        name, tokens = tokens[0].value, rest
            parts = [part for part in _split(tokens, _is_separator) if part]
            if not parts:
                raise Unreadable("only separators")
            if len(parts) > MAX_ITEMS:
                raise TooBig(f"more than {MAX_ITEMS} items")
            items = [item for part in parts for item in self.items(part)]
            if len(items) == 1:
                return replace(items[0], name=name) if name else items[0]
            names = {item.name for item in items}
            if len(names) == 1:  # x = 1 or x = 2
                name = name or names.pop()
                items = [replace(item, name="") for item in items]
            return Answer("list", items=tuple(items), name=name)
        finally:
            self.depth -= 1

    def items(self, tokens: list[Token]) -> list[Answer]:
        """One item, two where it holds a plus-minus."""
        if not any(t.kind == "command" and t.value in ("pm", "mp") for t in tokens):
            return [self.item(tokens)]
        readings = []
        for self.sign in (1, -1):
            readings.append(self.item(tokens))
        self.sign = 1
        return readings

    def item(self, tokens: list[Token]) -> Answer:
        unions = _split(tokens, lambda t: t.kind == "command" and t.value == "cup")
        if len(unions) > 1:
            return Answer("union", items=tuple(self.item(part) for part in unions))
        if any(_is_relation(t) for t in tokens):
            return self.relation(tokens)
        ratio = _split(tokens, lambda t: t.value == ":")
        if len(ratio) > 1:
            return Answer("tuple", items=tuple(self.item(p) for p in ratio), mark="::")
        first, last = tokens[0], tokens[-1]
        if first.kind == "command" and first.value.startswith("begin:"):
            return self.matrix(tokens)
        if first.value in ("\\{", "{") and _matching(tokens, 0) == len(tokens) - 1:
            inside = tokens[1:-1]
            if first.value == "\\{" or any(_is_separator(t) for t in inside):
                inner = self.answer(inside)
                items = inner.items if inner.kind == "list" else (inner,)
                return Answer("set", items=items)
        if first.value in _OPEN and _matching(tokens, 0) == len(tokens) - 1:
            parts = _split(tokens[1:-1], lambda t: t.value in (",", ";"))
            if len(parts) > 1:
                if len(parts) > MAX_ITEMS:
                    raise TooBig(f"more than {MAX_ITEMS} items")
                mark = _OPEN[first.value] + _CLOSE[last.value]
                items = tuple(self.answer(part) for part in parts)
                return Answer("tuple", items=items, mark=mark)
            if first.value == "(" and last.value == ")" and parts[0]:
                return self.answer(parts[0])
        if all(t.kind in ("word", "text") for t in tokens) and not _is_symbolic(tokens):
            return _text(tokens)
        return self.quantity(tokens)

    def relation(self, tokens: list[Token]) -> Answer:
        operators = tuple(_RELATIONS[t.value] for t in tokens if _is_relation(t, deep=tokens))
        sides = _split(tokens, _is_relation)
        if len(sides) != len(operators) + 1 or not all(sides):
            raise Unreadable("a relation with an empty side")
        if operators == ("=",) and _is_name(sides[0]):
            side = self.item(sides[1])
            return replace(side, name="".join(t.value for t in sides[0]))
        items = tuple(self.item(side) for side in sides)
        return Answer("relation", items=items, mark=" ".join(operators))

    def matrix(self, tokens: list[Token]) -> Answer:
        name = tokens[0].value.removeprefix("begin:")
        end = tokens[-1]
        if not name.rstrip("*").endswith("matrix") or end.value != f"end:{name}":
            raise Unreadable(f"environment {name!r}")
        inside = tokens[1:-1]
        if any(t.value.startswith("begin:") for t in inside):
            raise Unreadable("a nested environment")
        rows = [r for r in _split(inside, lambda t: t.value == "\\\\") if r]
        if not rows or len(rows) > MAX_ITEMS:
            raise Unreadable(f"a matrix of {len(rows)} rows")
        cells = tuple(
            tuple(self.quantity(cell) for cell in _split(row, lambda t: t.value == "&"))
            for row in rows
        )
        return Answer("matrix", items=cells)

    def quantity(self, tokens: list[Token]) -> Answer:
        """An expression, perhaps with a percent sign, a unit or a base behind it."""
        tokens, unit = _take_unit(tokens)
        if unit == "base":
            return Answer("base", mark="".join(t.value for t in tokens if t.value not in "{}"))
        percent = False
        if tokens and tokens[-1].value == "%":
            percent, tokens = True, tokens[:-1]
        elif unit in ("percent", "per cent"):
            percent, unit = True, ""
        if not tokens:
            raise Unreadable("a unit without a number")
        parser = _Expression(tokens, self.sign, self.depth)
        value = parser.parse()
        if percent:
            value = algebra.div(value, algebra.constant(100))
        digits = 0
        plain = tokens[1:] if tokens[0].value in "+-" else tokens
        if len(plain) == 1 and plain[0].kind == "number" and "." in plain[0].value:
            digits = len(re.sub(r"[eE].*|\.", "", plain[0].value).lstrip("0"))
        return Answer("value", value=value, percent=percent, unit=unit, digits=digits)


def _is_relation(t: Token, deep: object = None) -> bool:
    return t.value in _RELATIONS and (t.kind == "mark" or t.value in ("le", "ge", "ne"))


def _is_name(tokens: list[Token]) -> bool:
    """The left side of "x = 5", "f(x) = ...", "a_1 = ..."."""
    if not tokens:
        return False
    first = tokens[0]
    if not ((first.kind == "word" and len(first.value) <= 2) or first.value in GREEK):
        return False
    rest = tokens[1:]
    if not rest:
        return True
    if rest[0].value == "_":
        return len(rest) == 2 or (rest[1].value == "{" and rest[-1].value == "}" and len(rest) <= 5)
    return len(rest) == 3 and rest[0].value == "(" and rest[2].value == ")" and len(first.value) == 1


def _split(tokens: list[Token], is_separator) -> list[list[Token]]:
    """Split at separators outside of all brackets and environments."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for t in tokens:
        if t.value in ("(", "[", "\\{", "{", "langle") or t.value.startswith("begin:"):
            depth += 1
        elif t.value in (")", "]", "\\}", "}", "rangle") or t.value.startswith("end:"):
            depth -= 1
            if depth < 0:
                raise Unreadable("a bracket that was never opened")
        if depth == 0 and is_separator(t):
            parts.append([])
        else:
            parts[-1].append(t)
    if depth:
        raise Unreadable("a bracket that never closes")
    return parts


def _matching(tokens: list[Token], start: int) -> int:
    """Index of the bracket that closes the one at `start`; half-open intervals may mix them."""
    depth = 0
    for i in range(start, len(tokens)):
        if tokens[i].value in ("(", "[", "\\{", "{", "langle"):
            depth += 1
        elif tokens[i].value in (")", "]", "\\}", "}", "rangle"):
            depth -= 1
            if depth == 0:
                return i
    return -1


def _take_unit(tokens: list[Token]) -> tuple[list[Token], str]:
    """Take words, \text{...} with its power, and degree marks off the end: (the rest, unit)."""
    end = len(tokens)
    if (
        end >= 3
        and tokens[0].kind == "number"
        and tokens[1].value == "_"
        and all(t.kind == "number" or t.value in "{}" for t in tokens[2:])
    ):
        return tokens, "base"
    if end >= 2 and tokens[-1].kind == "command" and tokens[-1].value == "circ":
        return (tokens[:-1] if tokens[-2].value != "^" else tokens[:-2]), "degree"
    unit_power = ""
    tail = [t.value for t in tokens[-4:]]
    if end > 2 and tail[-2:-1] == ["^"] and tail[-1] in ("2", "3"):
        end, unit_power = end - 2, tail[-1]
    elif end > 4 and tail[-3:-2] == ["{"] and tail[-1] == "}" and tail[0] == "^":
        end, unit_power = end - 4, tail[-2]
    stop = end
    while stop > 0 and _is_unit_word(tokens[stop - 1], tokens[stop - 2] if stop > 1 else None):
        stop -= 1
    words = " ".join(t.value for t in tokens[stop:end]).casefold()
    words = re.sub(r"[^\w/' ]", " ", words).split()
    if stop == end or stop == 0 or not words:
        return tokens, ""
    if len(words) > 4 or any(w in _NOT_UNITS for w in words):
        raise Unreadable("words behind a number that are no unit")
    return tokens[:stop], " ".join(words) + unit_power


def _is_unit_word(t: Token, before: Token | None) -> bool:
    if t.kind == "text":
        return not (before is not None and before.value in ("^", "_"))
    if t.kind == "word":
        return len(t.value) >= 3 and t.value not in FUNCTIONS and t.value not in ("sqrt", "frac")
    return False


class _Expression:
    """Arithmetic over `algebra.Value`."""

    def __init__(self, tokens: list[Token], sign: int, depth: int):
        self.tokens = tokens
        self.at = 0
        self.sign = sign
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
            if t.value in _SIGNS and t.kind in ("mark", "command"):
                self.at += 1
                sign = {"+": 1, "-": -1, "pm": self.sign, "mp": -self.sign}[t.value]
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
        """A factor with any number of signs in front (a loop: a thousand signs are no recursion)."""
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
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        negative = t is not None and t.value == "-"
        if negative:
            self.at += 1
        exponent = self.power()  # right to left: 2^3^2 = 2^9
        self.depth -= 1
        return algebra.power(base, algebra.neg(exponent) if negative else exponent)

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
        while (t := self.peek()) is not None and t.kind == "mark" and t.value in ("!", "'"):
            self.at += 1
            value = algebra.factorial(value) if t.value == "!" else algebra.opaque("prime", value)
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
        if word in GREEK:
            return self.subscripted(word)
        if not word.isalpha() or len(word) > 3:
            raise Unreadable(f"the word {word[:20]!r} in an expression")
        value = algebra.constant(1)
        for letter in word[:-1]:
            value = algebra.mul(value, algebra.symbol(letter))
        last = self.subscripted(word[-1])
        if len(word) > 1 and (t := self.peek()) is not None and t.value == "^":
            # xy^2: the power belongs to the last letter only
            self.at += 1
            last = algebra.power(last, self.power())
        return algebra.mul(value, last)

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
        arguments = []
        while (t := self.peek()) is not None and t.value in ("_", "^"):  # log_2, sin^2
            self.at += 1
            arguments.append(algebra.opaque(t.value, self.argument()))
        t = self.peek()
        if t is None:
            raise Unreadable(f"{name} of nothing")
        if t.value in ("(", "{"):
            inner = self.atom()
        else:
            inner = self.power()
            while (t := self.peek()) is not None and (  # sin 2 pi x
                t.kind == "word" and t.value not in FUNCTIONS or t.value in ("pi", *GREEK)
            ):
                inner = algebra.mul(inner, self.power())
        return algebra.opaque(name, inner, *arguments)


_SIGNS = ("+", "-", "pm", "mp")
_FACTOR_COMMANDS = frozenset({"frac", "sqrt", "pi", "infty", "binom", "lfloor", "lceil"})
_PLUS_INFINITY = algebra.symbol(algebra.INFINITY)
_MINUS_INFINITY = algebra.neg(_PLUS_INFINITY)


def _number(text: str) -> Fraction:
    return Fraction(text if text[-1] != "." else text[:-1])


# --- comparison


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
        side = _Expression(tokenize(answer.name), 1, 0).parse()
        items = (Answer("value", value=side), replace(answer, name=""))
        return Answer("relation", items=items, mark="=")
    return answer
