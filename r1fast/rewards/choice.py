r"""Multiple choice: which letter a response commits to, and whether it is the right one.

The letter stands in the protocol's place, as \boxed{B}, as "Answer: B" (also "The correct option is
(B)"), as nothing but the letter ("B", "(b)", "B. Paris"), or the option's own text is repeated.
Prose is never searched for capitals: "A dog is an animal" names nothing. Two different answers are
wrong, as in mathematics.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from r1fast.problem_rows import LETTERS
from r1fast.protocol import END_THINK, SPECIAL_TOKEN, THINK, boxes, split_completion
from r1fast.types import Verdict

SEVERAL = "several different answers"
_WRAP = r"[\s*_`$~({\[\"'“”‘’<]{0,12}"  # what may stand around a letter
_UNWRAP = r"[\s*_`$~)}\]\"'“”‘’>]{0,12}"
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf|mbox|rm|bf)\b\s*")
_LONE = re.compile(
    rf"^(?:(?:option|choice)\s+)?{_WRAP}([A-Za-z]){_UNWRAP}[.,:;!。]?{_UNWRAP}$", re.I
)
_LABELLED = re.compile(
    rf"^{_WRAP}([A-Z]){_UNWRAP}(?:[.):\]]|\s-|\s–){_UNWRAP}\s+(\S.*)$", re.DOTALL
)
_LABEL = re.compile(rf"^{_WRAP}([A-Z]){_UNWRAP}[.):\]]", re.MULTILINE)
_STATEMENT = re.compile(
    r"(?:(?<![\w-])(?:answer|antwort|réponse|respuesta|(?:correct|right|best)\s+(?:choice|option))"
    r"(?:\s+(?:choice|option|letter))?(?:\s+(?:to|for|of)\s+(?:this|the)\s+(?:question|problem))?"
    r"(?![\w-])|答案)"
    r"(?P<link>[\s*_`]*(?:\b(?:is|would\s+be|must\s+be|should\s+be|ist|est|es)\b|是|为)?[\s*_`]*[:：=]?"
    r"(?:\s*(?:option|choice|letter)\b)?)(?=(?P<rest>[^\n]{1,400}))",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"^(?P<wrap>{_WRAP})(?P<letter>[A-Za-z])(?![\w'’])(?P<unwrap>{_UNWRAP})(?P<after>.*)$"
)
_ALTERNATIVE = re.compile(
    r"^\s*(?:,|/|&|\bor\b|\band\b|或|和)\s*(?:option\s+)?[({\[*_`]*[A-Z](?![\w'’])"
)
_REASON = re.compile(
    r"^\s*(?:because|since|as|which|where|for|due|given|by|and|but|not|rather|instead|although|"
    r"while|so|with)\b|^\s*[–—-]\s", re.IGNORECASE
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """The letter a response commits to, or why there is none."""

    letter: str | None
    fault: str = ""


def grade_choice(
    text: str,
    gold: str,
    options: Sequence[str],
    protocol: str | None = None,
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
) -> tuple[Verdict, str | None]:
    """(verdict, letter): correct, wrong, or no_answer. `gold` is the right option's letter.

    ValueError for a gold that is no letter of the options.
    """
    check_choice(gold, options)
    choice = extract_choice(
        text, options, protocol, special_token, prompt_opens_think=prompt_opens_think
    )
    if choice.letter is None:
        return ("wrong" if choice.fault == SEVERAL else "no_answer"), None
    return ("correct" if choice.letter == gold else "wrong"), choice.letter


def check_choice(gold: object, options: object) -> None:
    """ValueError unless `options` is a list of 2 to 26 texts and `gold` the letter of one of them."""
    is_list = isinstance(options, list | tuple) and all(isinstance(o, str) for o in options)
    if not is_list or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(
            f"'choices' must be a list of 2 to {len(LETTERS)} options, got {options!r:.80}"
        )
    if not isinstance(gold, str) or len(gold) != 1 or gold not in LETTERS[: len(options)]:
        last = LETTERS[len(options) - 1]
        raise ValueError(f"the gold of a choice must be a letter from A to {last}, got {gold!r}")


def extract_choice(
    text: str,
    options: Sequence[str],
    protocol: str | None = None,
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
) -> Choice:
    """The letter in the protocol's place; None where the response commits to none."""
    if protocol is None:
        if END_THINK in text:
            region: str | None = text.rpartition(END_THINK)[2]
        else:
            region = None if THINK in text else text
    else:
        parts = split_completion(
            text, protocol, special_token, prompt_opens_think=prompt_opens_think
        )
        region = parts.answer
    if region is None or not region.strip():
        return Choice(None, "no answer")
    if found := boxes(region):
        letters = [_letter(box, options) for box in found]
        if len({*letters}) > 1:
            return Choice(None, SEVERAL)
        return Choice(letters[0], "" if letters[0] else "the box holds no option")
    if letter := _letter(region, options):
        return Choice(letter)
    return _stated(region, options)


def _letter(text: str, options: Sequence[str]) -> str | None:
    """The letter where `text` is nothing but a letter, a labelled option or an option's text."""
    text = _plain(text)
    if match := _LONE.match(text):
        return match[1].upper()
    same = [i for i, option in enumerate(options) if _key(option) == _key(text)]
    if len(same) == 1 and _key(text):
        return LETTERS[same[0]]
    if (match := _LABELLED.match(text)) and _is_option(match[1], match[2], options):
        return match[1]
    return None


def _is_option(letter: str, text: str, options: Sequence[str]) -> bool:
    at = LETTERS.index(letter)
    return at < len(options) and bool(_key(text)) and _key(text) == _key(options[at])


def _stated(region: str, options: Sequence[str]) -> Choice:
    """The letters of "Answer: B" statements; without one the last line may be the bare letter."""
    region = _plain(region)
    found: list[str] = []
    for match in _STATEMENT.finditer(region):
        letter = _named(match["rest"], match["link"].rstrip().endswith((":", "：", "=")), options)
        if letter == SEVERAL:
            return Choice(None, SEVERAL)
        found += [letter] * bool(letter)
    if len({*found}) > 1:
        return Choice(None, SEVERAL)
    if found:
        return Choice(found[0])
    last = [line for line in region.splitlines() if line.strip()][-1]
    repeats = len({*_LABEL.findall(region)}) > 1  # the options once more, in order
    if (letter := _letter(last, options)) and not (repeats and not _LONE.match(last)):
        return Choice(letter)
    return Choice(None, "no letter that is an answer")


def _named(rest: str, marked: bool, options: Sequence[str]) -> str | None:
    """The letter at the head of what follows "the answer is"; SEVERAL where there are two."""
    match = _NAMED.match(rest)
    if match is None:
        return _letter(rest, options)
    wrapped = any(c in match["wrap"] for c in "([{*`$\"'“‘") and bool(match["unwrap"].strip())
    alone = marked and not match["after"].strip(" .")
    if match["letter"].islower() and not (wrapped or alone):
        return _letter(rest, options) if len(_key(rest)) > 1 else None  # "is a tricky one"
    letter, after = match["letter"].upper(), match["after"]
    if _ALTERNATIVE.match(after):
        return SEVERAL
    if len(_key(rest)) > 1 and (same := _letter(rest, options)):
        return same
    ends = not after.strip() or after[0] in ".,;:!?)]。，；"
    if ends or wrapped or _REASON.match(after):
        # "the answer is I" is prose where there are four options
        return letter if LETTERS.index(letter) < len(options) or marked or wrapped else None
    return letter if _is_option(letter, after, options) else None


def _plain(text: str) -> str:
    """Full-width letters as ASCII, LaTeX's text commands taken off."""
    return _LATEX.sub("", unicodedata.normalize("NFKC", text)).strip()


def _key(text: str) -> str:
    """What is compared of an option's text."""
    text = _plain(text).casefold()
    return re.sub(r"[\s$*_`{}]+", "", text).strip(".,;:!。\"'“”")
