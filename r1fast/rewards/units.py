"""Units behind numbers: taken off "12 cm", compared where both sides name one that is known."""

from __future__ import annotations

import re

from r1fast.rewards.latex import FUNCTIONS, Token, Unreadable

# what may stand behind a number as its unit, and what a sentence would hold instead
_NOT_UNITS = frozenset(
    "is not isn't or and but wrong than to no if either neither nor maybe perhaps about more less "
    "incorrect false true the answer so was are be unless except plus minus times squared cubed "
    "factorial half halves thirds quarters tenths hundredths negative mod modulo dozen "
    "fifths sixths sevenths eighths ninths thousandths millionths tens hundreds below above "
    "zero one off over under short root roots squares cubes debt opposite point comma dot decimal choose power "
    "remainder until onwards onward upwards nope impossible cannot never nothing doubled tripled halved double "
    "triple twice thrice kilo mega giga gross score scores permille basis rounded "
    "exactly add added subtract subtracted divided multiplied by into with "
    "without versus vs instead rather possibly probably sometimes unknown undefined infinite infinity percentage basis".split()
)
# eight, twentieths, seventeen, quadrillion: a second number, or a part of the first
_NUMBER_WORD = re.compile(
    r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred|thousand|[a-z]+illion)s?"
    r"|[a-z]+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|first|third|fourth"
    r"|[a-z]+(?:ieth|teenth|elfth|lventh|illionth|leventh)s?"
)
MAGNITUDES = {  # words that scale the number before them
    "hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12,
    "quadrillion": 15,
}  # fmt: skip
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen"}
# short words that are units behind a number, and letters that are behind "km/"
_SHORT_UNITS = frozenset(
    "cm mm km kg mg ft mi in yd lb lbs oz hr hrs min ml mL kW kJ Hz mph".split()
)
_PER_UNITS = _SHORT_UNITS | frozenset("h s m L sec hour minute second day".split())
_UNIT_TEXT = re.compile(r"(?:[^\W\d_]|[\s.,/'~()-])*(?:(?<=[a-z])\^?\{?[23]\}?)?[\s.]*")
_UNITS = {
    "cm": "centimeter", "mm": "millimeter", "km": "kilometer", "m": "meter", "kg": "kilogram",
    "g": "gram", "mg": "milligram", "ft": "foot", "feet": "foot", "in": "inch", "inches": "inch",
    "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce", "hr": "hour", "h": "hour",
    "min": "minute", "s": "second", "sec": "second", "l": "liter", "ml": "milliliter",
    "cent": "cent", "dollar": "dollar", "usd": "dollar", "day": "day", "week": "week",
    "month": "month", "year": "year", "yard": "yard", "yd": "yard", "degree": "degree",
    "radian": "radian", "rad": "radian", "n": "newton", "j": "joule", "kj": "kilojoule", "w": "watt",
    "kw": "kilowatt", "hz": "hertz", "khz": "kilohertz", "mhz": "megahertz", "v": "volt", "pa": "pascal",
    "kpa": "kilopascal", "c": "celsius", "f": "fahrenheit", "k": "kelvin", "gal": "gallon", "qt": "quart",
    "pint": "pint", "cup": "cup", "ton": "ton", "tonne": "tonne", "eur": "euro", "gbp": "pound sterling",
    "jpy": "yen", "mol": "mole", "litre": "liter", "metre": "meter", "centimetre": "centimeter",
    "millimetre": "millimeter", "kilometre": "kilometer",
}  # fmt: skip
_ORDINALS = frozenset(("st", "nd", "rd", "th"))
_PREFIXED = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_UNITS.update({name: name for name in list(_UNITS.values())})
_RATES = {"mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour"}


def take_unit(tokens: list[Token]) -> tuple[list[Token], str]:
    r"""Take words, \text{...} with its power, and degree marks off the end: (the rest, unit)."""
    end = len(tokens)
    if end >= 2 and tokens[-1].kind == "command" and tokens[-1].value == "circ":
        if any(t.value in FUNCTIONS for t in tokens):  # the angle of a cosine
            return tokens, ""
        return (tokens[:-1] if tokens[-2].value != "^" else tokens[:-2]), "degree"
    unit_power = ""
    tail = [t.value for t in tokens[-4:]]
    if end > 2 and tail[-2:-1] == ["^"] and tail[-1] in ("2", "3"):
        end, unit_power = end - 2, tail[-1]
    elif end > 4 and tail[-3:-2] == ["{"] and tail[-1] == "}" and tail[0] == "^":
        end, unit_power = end - 4, tail[-2]
    stop = end
    while stop > 0:
        before = tokens[stop - 2] if stop > 1 else None
        if _is_unit_word(tokens[stop - 1], before):
            stop -= 1
        elif stop > 3 and _is_rate(tokens[stop - 3 : stop]):  # km/h
            stop -= 2 + (tokens[stop - 3].value == "m")
        else:
            break
    words = " ".join(t.value for t in tokens[stop:end]).casefold()
    if stop < end and not _UNIT_TEXT.fullmatch(words):
        raise Unreadable("what stands behind a number is no unit")
    words = re.sub(r"[^\w/' ]", " ", words).split()
    if stop == end or stop == 0 or not words:
        return tokens, ""
    scale = words[0] in MAGNITUDES
    if len(words) > 4 or any(
        w in _NOT_UNITS or (_NUMBER_WORD.fullmatch(w) and not (scale and i == 0))
        for i, w in enumerate(words)
    ):
        raise Unreadable("words behind a number that are no unit")
    if len(words) == 1 and words[0] in _ORDINALS and tokens[stop - 1].kind == "number":
        if words[0] != _ordinal(tokens[stop - 1].value):
            raise Unreadable("an ordinal with another one's ending")
        return tokens[:stop], ""
    if words[0] == "degrees":
        words[0] = "degree"
    return tokens[:stop], " ".join(words) + unit_power


def _ordinal(digits: str) -> str:
    """The ending of 1st, 2nd, 3rd, 11th."""
    teen = digits[-2:-1] == "1" and len(digits) > 1
    return "th" if teen else {"1": "st", "2": "nd", "3": "rd"}.get(digits[-1:], "th")


def _is_unit_word(t: Token, before: Token | None) -> bool:
    if t.kind == "text":
        return not (before is not None and before.value in ("^", "_"))
    if t.kind == "word":
        if t.value in _SHORT_UNITS or t.value in _ORDINALS:
            return before is not None and (before.kind == "number" or before.value in ("}", "pi"))
        return len(t.value) >= 3 and t.value not in FUNCTIONS and t.value not in ("sqrt", "frac")
    return False


def _is_rate(tokens: list[Token]) -> bool:
    """km/h, m/s, miles/hour."""
    first, slash, last = tokens
    if slash.value != "/" or first.kind != "word" or last.kind != "word":
        return False
    known = first.value in _SHORT_UNITS or first.value == "m" or len(first.value) > 3
    return known and last.value in _PER_UNITS


def same_unit(a: str, b: str) -> bool:
    """False only for two known units that differ: "12 cm" is not "12 m", km/h not m/s, feet no square feet."""
    pair = [re.split(r"\s*/\s*|\s+per\s+", _RATES.get(unit, unit)) for unit in (a, b)]
    known = [[_known(part) for part in parts] for parts in pair]
    if len(pair[0]) != len(pair[1]):
        return not all(part for parts in known for part in parts)
    return not any(x and y and x != y for x, y in zip(*known, strict=True))


def same_name(a: str, b: str) -> bool:
    """Whether two units are the same one: "boys" and "boy", "cm" and "centimeters"."""
    return (_known(a) or a.removesuffix("s")) == (_known(b) or b.removesuffix("s"))


def _known(unit: str) -> str | None:
    """The unit's name with its power, None for a word that the table lacks."""
    first, _, rest = unit.strip().partition(" ")
    power = unit[len(unit.rstrip("23")) :]
    if first in _PREFIXED:
        unit, power = rest, _PREFIXED[first]
    bare = unit.rstrip("23").strip()
    name = _UNITS.get(bare) or _UNITS.get(bare.removesuffix("s"))
    return name and name + power
