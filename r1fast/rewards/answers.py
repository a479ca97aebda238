"""Typed answers: numbers, expressions, tuples, intervals, sets, matrices, equations, words.

`read_answer(text)` parses; equivalence.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import product

from r1fast.rewards import algebra
from r1fast.rewards.algebra import TooBig, Value
from r1fast.rewards.expression import MAX_DEPTH, Expression, letters
from r1fast.rewards.latex import GREEK, Token, Unreadable, clean, tokenize
from r1fast.rewards.units import CURRENCIES, MAGNITUDES, take_unit

MAX_ITEMS = 64
MAX_SIGNS = 3
_BOTH_SIGNS = {"pm": "+-", "mp": "-+"}
_LETTER = re.compile(r"\(?([A-Za-z])[).:]*")
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s*)?(?:\(([A-J])\)|([A-J])[.):])\s*(\S.*)?", re.DOTALL
)
_OPTION = re.compile(r"(?:option|choice)\s+([A-J])\.?", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_CHOICE_MARK = re.compile(r"\([A-J]\)|\b[A-J][.):]")
# what takes the letter back, or names another: "(C) or D", "C. Actually D", "(C) is wrong"
_TAKEN_BACK = re.compile(
    r"\W*(?:(?:or|and|is|are|not|no|nope|wrong|incorrect|false|maybe|perhaps|actually|but|wait|rather|n't)\b\W*)+"
    r"(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:answer|option|choice)\b.*|.{0,40}\b[A-J]\W*)?",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_LETTER = re.compile(
    r"\b(?:or|and|answer|option|choice|actually|but|not)\b[^.]*\b(?-i:[A-J])\b", re.IGNORECASE
)
_NUMBER_NAMES = {
    name: str(n)
    for n, name in enumerate(
        "two three four five six seven eight nine ten eleven twelve".split(), 2
    )
} | {"sixteen": "16"}
_NUMBERS = {
    word: n
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
     "one hundred": 100, "one half": Fraction(1, 2), "one third": Fraction(1, 3)}  # fmt: skip
_WORDS = frozenset("no yes on of or so to is it if in at up us we he me my by go do".split())
_SYNONYMS = {
    "dne": "does not exist", "limit does not exist": "does not exist", "no solutions": "no solution",
    "no real solutions": "no real solution", "there is no solution": "no solution", "none exist": "none",
    "there are no solutions": "no solution", "has no solution": "no solution",
}  # fmt: skip
_BASE = re.compile(
    r"\(?\s*([0-9][0-9A-Z]*|[A-F][0-9A-F]*[0-9][0-9A-F]*)\s*\)?\s*_\s*"
    r"(?:([0-9])|\{\s*([0-9]+)\s*\}|\{?\s*\\text\s*\{\s*([a-z]+)\s*\}\s*\}?)"
)
_CLOCK = re.compile(
    r"(?:\\text\s*\{)?\s*(\d{1,2})(?::(\d\d))?[\s~]*(?:\\(?:text|mathrm)\s*\{|\\[ ,])?[\s~]*"
    r"([AaPp])\.?\s*[Mm]\.?\s*\}?"
)
# "\$5", "$5" and "€5", but not "$5$": that is a formula
_MONEY = re.compile(
    r"\$?\s*-?\s*(?:\\([$€£¥])|([€£¥]))\s*[\d.].*|-?\s*(\$)\s*[\d.][^$]*", re.DOTALL
)
_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "le", "ge": "ge", "ne": "ne"}
_OPEN = {"(": "(", "[": "[", "\\{": "{", "langle": "("}
_CLOSE = {")": ")", "]": "]", "rangle": ")"}


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One typed answer. `kind` says which of the fields are in use."""

    kind: str  # value | tuple | list | set | union | matrix | relation | base | time | text
    value: Value | None = None  # value
    items: tuple = ()  # Answers; rows of a matrix
    # brackets "(]" of a tuple; operators of a relation; "and", "or" of a list; base; time; text
    mark: str = ""
    percent: bool = False  # of a value
    unit: str = ""
    digits: int = 0  # significant digits where the value was written as one plain decimal
    name: str = ""  # x of "x = 5"


@lru_cache(maxsize=1 << 12)  # an answer of 2,000 characters takes 50 KiB
def read_answer(text: str) -> Answer:
    """Parse. Raises Unreadable, TooBig or Undefined (all ValueError)."""
    if any(sign in text for sign in CURRENCIES) and (match := _MONEY.fullmatch(text.strip())):
        answer = _read(text)
        unit = "" if answer.percent else CURRENCIES[match[1] or match[2] or match[3]]
        return replace(answer, unit=answer.unit or unit) if answer.kind == "value" else answer
    return _read(text)


def _read(text: str) -> Answer:
    text = clean(text)
    if not text:
        raise Unreadable("an empty answer")
    if match := _LETTER.fullmatch(text):
        return Answer("value", value=algebra.symbol(match[1]))
    if "_" in text and (match := _BASE.fullmatch(text)):
        base = match[2] or match[3] or _NUMBER_NAMES.get(match[4])
        if base is not None and (base.isdigit() and 2 <= int(base) <= 36):
            return Answer("base", mark=f"{match[1].lstrip('0') or '0'}_{int(base)}")
    if text[-1:] in "mM}" and (match := _CLOCK.fullmatch(text)):
        return _clock(match)
    tokens = tokenize(text)
    if len(tokens) == 1 and tokens[0].kind == "text":
        return read_answer(tokens[0].value.strip() or "\\")
    if _is_prose(tokens):
        return _text(tokens)
    return _Reader(text).answer(tokens)


def _clock(match: re.Match) -> Answer:
    hour, minute, half = int(match[1]), int(match[2] or 0), match[3].lower()
    if not 1 <= hour <= 12 or minute > 59:
        raise Unreadable("no time of day")
    return Answer("time", mark=f"{hour}:{minute:02} {half}m")


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
    """The letter of "(B) Paris", "B. Paris", "Option B"; None where two choices are named."""
    text = _WRAPPED.sub(r"\1", text.strip().strip("$")).strip()
    if match := _OPTION.fullmatch(text):
        return match[1].upper()
    match = _CHOICE.fullmatch(text)
    behind = (match[3] if match else "") or ""
    if match is None or any(p.search(behind) for p in (_CHOICE_MARK, _OTHER_LETTER)):
        return None
    return None if behind and _TAKEN_BACK.fullmatch(behind) else match[1] or match[2]


def _text(tokens: list[Token]) -> Answer:
    words = re.findall(r"[\w']+", " ".join(t.value for t in tokens).casefold())
    while len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    value, mark = None, " ".join(words)
    if mark in _NUMBERS:
        value = algebra.constant(_NUMBERS[mark])
    elif len(tokens) == 1 and tokens[0].kind == "word" and len(mark) <= 3 and mark not in _WORDS:
        value = letters(tokens[0].value)  # ab may be a times b
    return Answer("text", mark=_SYNONYMS.get(mark, mark), value=value)


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
            parts = _split(tokens, _is_separator)
            if not parts[0] or not parts[-1]:
                raise Unreadable("a separator at an end")
            parts = [part for part in parts if part]  # "1, 2, and 3"
            if len(parts) > MAX_ITEMS:
                raise TooBig(f"more than {MAX_ITEMS} items")
            items = [item for part in parts for item in self.items(part)]
            if len(items) == 1:
                return replace(items[0], name=name) if name else items[0]
            joiners = {_joiner(t) for t in _top_level(tokens) if _is_separator(t)}
            mark = joiners.pop() if len(joiners) == 1 else ""
            names = {item.name for item in items}
            if len(names) == 1:  # x = 1 or x = 2
                name = name or names.pop()
                items = [replace(item, name="") for item in items]
            return Answer("list", items=tuple(items), mark=mark, name=name)
        finally:
            self.depth -= 1

    def items(self, tokens: list[Token]) -> list[Answer]:
        """One item, or each reading of its plus-minus signs: independent, or tied by a minus-plus."""
        signs = [t.value for t in tokens if t.kind == "command" and t.value in _BOTH_SIGNS]
        if not signs:
            return [self.item(tokens)]
        if len(signs) > MAX_SIGNS:
            raise TooBig(f"more than {MAX_SIGNS} plus-minus signs in one item")
        chosen: Iterable[tuple[str, ...]] = product("+-", repeat=len(signs))
        if "mp" in signs:
            chosen = (tuple(_BOTH_SIGNS[name][i] for name in signs) for i in (0, 1))
        return [self.item(_with_signs(tokens, signs)) for signs in chosen]

    def item(self, tokens: list[Token]) -> Answer:
        if not tokens:
            raise Unreadable("an empty part")
        without = _split(tokens, lambda t: t.kind == "command" and t.value == "setminus")
        if len(without) == 2:
            return Answer("without", items=tuple(self.item(part) for part in without))
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
            if first.value == "\\{" and not inside:
                return Answer("value", value=algebra.symbol("emptyset"))
            if first.value == "\\{" or any(_is_separator(t) for t in inside):
                inner = self.answer(inside)
                items = inner.items if inner.kind == "list" else (inner,)
                return Answer("set", items=items)
        if first.value in ("(", "[") and len(tokens) > 2 and tokens[1].value == "begin:array":
            if (
                tokens[-2].value == "end:array"
                and _CLOSE.get(last.value) == ")]"["([".index(first.value)]
            ):
                return self.matrix(tokens[1:-1])
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
        if operators == ("=",) and (names := _names(sides[0])):
            side = self.item(sides[1])  # (a, b) = (1, 2)
            if side.kind == "tuple" and side.mark == "()" and len(side.items) == len(names):
                pairs = list(zip(side.items, names, strict=True))
                if set(names) <= set("xyz"):  # (y, x) = (5, 6) is the point (6, 5)
                    pairs.sort(key=lambda pair: pair[1])
                return replace(side, items=tuple(replace(item, name=n) for item, n in pairs))
        items = tuple(self.item(side) for side in sides)
        return Answer("relation", items=items, mark=" ".join(operators))

    def matrix(self, tokens: list[Token]) -> Answer:
        name = tokens[0].value.removeprefix("begin:")
        end = tokens[-1]
        is_array = name == "array" and tokens[1].value == "{"
        if not (name.rstrip("*").endswith("matrix") or is_array) or end.value != f"end:{name}":
            raise Unreadable(f"environment {name!r}")
        inside = tokens[1:-1]
        if is_array:  # {c|c} says how columns are set
            closing = _matching(inside, 0)
            if not all(t.value.strip("lcr|") == "" for t in inside[1:closing]):
                raise Unreadable("the columns of an array")
            inside = inside[closing + 1 :]
        if any(t.value.startswith("begin:") for t in inside):
            raise Unreadable("a nested environment")
        rows = [r for r in _split(inside, lambda t: t.value == "\\\\") if r]
        if not rows or len(rows) > MAX_ITEMS:
            raise Unreadable(f"a matrix of {len(rows)} rows")
        cells = tuple(
            tuple(self.quantity(cell) for cell in _split(row, lambda t: t.value == "&"))
            for row in rows
        )
        return Answer("matrix", items=cells, mark="||" if name[0] in "vV" else "")

    def quantity(self, tokens: list[Token]) -> Answer:
        """An expression, perhaps with a percent sign, a unit or a base behind it."""
        tokens, unit = take_unit(tokens)
        percent = False
        if tokens and tokens[-1].value == "%":
            percent, tokens = True, tokens[:-1]
        elif unit in ("percent", "per cent"):
            percent, unit = True, ""
        if not tokens:
            raise Unreadable("a unit without a number")
        parser = Expression(tokens, self.depth)
        value = parser.parse()
        if percent:
            value = algebra.div(value, algebra.constant(100))
        scale, _, rest = unit.partition(" ")
        if scale in MAGNITUDES:
            unit = rest
            value = algebra.mul(value, algebra.constant(10 ** MAGNITUDES[scale]))
        digits = 0
        plain = tokens[1:] if tokens[0].value in "+-" else tokens
        if len(plain) == 1 and plain[0].kind == "number" and "." in plain[0].value:
            digits = len(re.sub(r"[eE].*|\.", "", plain[0].value).lstrip("0"))
        return Answer("value", value=value, percent=percent, unit=unit, digits=digits)


def _with_signs(tokens: list[Token], signs: tuple[str, ...]) -> list[Token]:
    left = iter(signs)
    return [
        Token("mark", next(left), t.spaced) if t.kind == "command" and t.value in _BOTH_SIGNS else t
        for t in tokens
    ]


def _names(tokens: list[Token]) -> tuple[str, ...]:
    """("a", "b") of "(a, b)"; () for anything else."""
    if len(tokens) < 5 or tokens[0].value != "(" or tokens[-1].value != ")":
        return ()
    inside = tokens[1:-1]
    letters = [t.value for t in inside[::2] if t.kind == "word" and len(t.value) == 1]
    commas = [t for t in inside[1::2] if t.value == ","]
    whole = len(letters) == len(commas) + 1 and len(letters) + len(commas) == len(inside)
    return tuple(letters) if whole and len(set(letters)) == len(letters) else ()


def _joiner(t: Token) -> str:
    word = t.value.strip().strip(",").casefold().strip()
    return word if word in ("and", "or") else ""


def _top_level(tokens: list[Token]) -> list[Token]:
    """The tokens outside of all brackets."""
    depth, kept = 0, []
    for t in tokens:
        depth += (t.value in _OPENING) - (t.value in _CLOSING)
        if depth == 0:
            kept.append(t)
    return kept


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
        if tokens[i].value in _OPENING:
            depth += 1
        elif tokens[i].value in _CLOSING:
            depth -= 1
            if depth == 0:
                return i
    return -1


_OPENING = frozenset(("(", "[", "\\{", "{", "langle"))
_CLOSING = frozenset((")", "]", "\\}", "}", "rangle"))
