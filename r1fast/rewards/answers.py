"""Typed answers: numbers, expressions, tuples, intervals, sets, matrices, equations, words.

`read_answer(text)` parses; equivalence.py compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from r1fast.rewards import algebra
from r1fast.rewards.algebra import TooBig, Value
from r1fast.rewards.expression import MAX_DEPTH, Expression
from r1fast.rewards.latex import FUNCTIONS, GREEK, Token, Unreadable, clean, tokenize

MAX_ITEMS = 64
_LETTER = re.compile(r"\(?([A-Za-z])[).:]*")
_CHOICE = re.compile(r"(?:\(([A-J])\)|([A-J])[.):])\s*(\S.*)?", re.DOTALL)
_CHOICE_MARK = re.compile(r"\([A-J]\)|\b[A-J][.):]")
# what may stand behind a number as its unit, and what a sentence would hold instead
_NOT_UNITS = frozenset(
    "is not isn't or and but wrong than to no if either neither nor maybe perhaps about more less "
    "incorrect false true the answer so was are be unless except plus minus times squared cubed "
    "factorial half halves thirds quarters tenths hundredths negative mod modulo dozen".split()
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "le", "ge": "ge", "ne": "ne"}
_OPEN = {"(": "(", "[": "[", "\\{": "{", "langle": "("}
_CLOSE = {")": ")", "]": "]", "rangle": ")"}
_MAGNITUDES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
}  # fmt: skip


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
        if not tokens:
            raise Unreadable("an empty part")
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
                if first.value == "\\{" or last.value not in _CLOSE:
                    raise Unreadable(f"a bracket {first.value} closed by {last.value}")
                mark = _OPEN[first.value] + _CLOSE[last.value]
                items = tuple(self.answer(part) for part in parts)
                return Answer("tuple", items=items, mark=mark)
            if first.value == "(" and last.value == ")" and parts[0]:
                return self.answer(parts[0])
            if first.value == "[" and last.value == "]":  # a list of one is not its element
                return Answer("tuple", items=(self.answer(parts[0]),), mark="[]")
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
        parser = Expression(tokens, self.sign, self.depth)
        value = parser.parse()
        if percent:
            value = algebra.div(value, algebra.constant(100))
        scale, _, rest = unit.partition(" ")
        if scale in _MAGNITUDES:
            unit = rest
            value = algebra.mul(value, algebra.constant(10 ** _MAGNITUDES[scale]))
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
        return len(rest) == 2 or (
            len(rest) > 2 and rest[1].value == "{" and rest[-1].value == "}" and len(rest) <= 5
        )
    return (
        len(rest) == 3 and rest[0].value == "(" and rest[2].value == ")" and len(first.value) == 1
    )


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
