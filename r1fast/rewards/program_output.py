"""Whether what a program wrote is what was expected, as a whole: never line by line of the shorter one."""

from __future__ import annotations

import math

COMPARISONS = ("lines", "tokens", "exact")


def same_output(out: str, expected: str, comparison: str = "lines", tolerance: float = 0.0) -> bool:
    """`lines`: equal but for white space at the ends of lines and of the text. `tokens`: the same
    words, whatever is between them; numbers within `tolerance`, absolute or relative, where it is
    above 0. `exact`: equal.
    """
    if comparison == "exact":
        return out == expected
    if comparison == "lines" and not tolerance:
        return _lines(out) == _lines(expected)
    words, wanted = out.split(), expected.split()
    return len(words) == len(wanted) and all(
        w == e or (tolerance > 0 and _close(w, e, tolerance))
        for w, e in zip(words, wanted, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _close(word: str, expected: str, tolerance: float) -> bool:
    if "_" in word:  # Python's own way to write a number
        return False
    try:
        a, b = float(word), float(expected)
    except ValueError:
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
