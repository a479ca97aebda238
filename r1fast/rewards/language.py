"""Language consistency: the share of the CoT's words that are in the target language.

Maths, code, URLs and identifiers are taken out first; numbers are neutral. What is left is cut
into segments (sentences, and runs of one script). The script decides where it can: Han without
kana is zh, kana makes a sentence ja, hangul is ko, Cyrillic is ru. Words of the Latin script are
told apart by `lingua` where it is installed, restricted to the expected languages; without it the
whole Latin run counts as the target where the target is written in Latin letters. One unit is a
word, or one character of Han, kana. A `lexicon` (language -> its words) decides everything, for
artificial languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from r1fast.protocol import PROTOCOLS, SPECIAL_TOKEN, split_completion
from r1fast.rewards.messages import column_of, message_text

_SURE = 0.65  # confidence from which lingua overrules the target in fewer words than _LONG
_LONG = 5
_MAX_WORD = 64  # letters that are looked at
# language -> script. Two languages of one script need lingua to be told apart.
SCRIPTS = {
    "en": "latin", "de": "latin", "fr": "latin", "es": "latin", "it": "latin", "pt": "latin",
    "vi": "latin", "nl": "latin", "pl": "latin", "tr": "latin", "id": "latin", "sv": "latin",
    "cs": "latin", "ro": "latin", "fi": "latin", "hu": "latin", "da": "latin", "sw": "latin",
    "ru": "cyrillic", "uk": "cyrillic", "bg": "cyrillic", "el": "greek", "he": "hebrew",
    "ar": "arabic", "fa": "arabic", "hi": "devanagari", "bn": "bengali", "te": "telugu",
    "ta": "tamil", "th": "thai", "ko": "hangul", "zh": "han", "ja": "kana",
}  # fmt: skip
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3005\U00020000-\U0002ebef"
_KANA = "\u3041-\u3096\u30a1-\u30fa\u30fc\u31f0-\u31ff\uff66-\uff9d"
_RANGES = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
    "\uff21-\uff3a\uff41-\uff5a",
    "cyrillic": "\u0400-\u052f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "hebrew": "\u0590-\u05ff",
    "arabic": "\u0600-\u065f\u066e-\u06ef\u06fa-\u06ff\u0750-\u077f",
    "devanagari": "\u0900-\u0963\u0970-\u097f",
    "bengali": "\u0980-\u09e5\u09f0-\u09ff",
    "telugu": "\u0c00-\u0c65\u0c70-\u0c7f",
    "tamil": "\u0b80-\u0be5\u0bf0-\u0bff",
    "thai": "\u0e01-\u0e4e",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    # of no language in the table: Armenian, Syriac, Gurmukhi to Oriya, Kannada to Sinhala, Lao to Georgian,
    # Ethiopic, Cherokee, Khmer, Mongolian
    "other": "\u0530-\u058f\u0700-\u07bf\u0a00-\u0b7f\u0c80-\u0dff\u0e81-\u10ff\u1200-\u13ff\u1780-\u18af",
}
_MARKS = "\u0300-\u036f'’"
# one unit: a Han or kana character, or a word of one script
_UNIT = re.compile(
    f"(?P<han>[{_HAN}])|(?P<kana>[{_KANA}])|"
    + "|".join(f"(?P<{name}>[{r}][{r}{_MARKS}]*)" for name, r in _RANGES.items())
)
_NOT_CODE = re.compile(
    f"(?:[{_HAN}{_KANA}{''.join(r for name, r in _RANGES.items() if name not in ('latin', 'greek'))}][{_MARKS}]*)+"
)
# Latin letters that every language writes so: points, units, functions
_BORROWED = re.compile(
    r"(?<![A-Za-z])(?:[A-Z]{1,4}|[A-Za-z]|sin|cos|tan|cot|log|ln|lim|max|min|mod|gcd|lcm|cm|mm|km|kg|mg|ml|mL|Hz)"
    r"(?![A-Za-z])"
)
# full stops that end a sentence; CJK full stops need no space
_SENTENCE = re.compile(r"(?<=[。！？；!?…])|(?<=[.:;])(?=\s)|\n+")
# code and maths in blocks; one that never closes is text
_BLOCKS = (("```", "```"), ("~~~", "~~~"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"))
_MAX_UNCLOSED = 100  # names of environments
_BEGIN = re.compile(r"\\begin(\{\w+\*?\})")
# Linear in the text: a repetition is bounded, possessive, or cannot begin within what it has passed.
_NOT_LANGUAGE = re.compile(
    r"`[^`\n]*`|\$(?=[^\s$])[^$\n]{0,300}?(?<=\S)\$(?!\d)|\\boxed\{[^{}]*\}|\\[A-Za-z]+"
    r"|(?:https?://|www\.)\S+|(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.\w++)+|&#?\w+;"  # addresses and entities
    r"|</?[A-Za-z][^<>\n]{0,80}>"  # tags
    r"|\b[A-Za-z]+(?:_[A-Za-z0-9]+)+\b|\b[A-Za-z]+\d\w*\b|\b\w+\(\)"  # identifiers
    r"|\b[a-z]+(?:[A-Z][a-z0-9]+)+\b|(?<![\w.])\w++(?:\.\w++)++\("
)
# one letter between numbers or operators is a variable, not a word
_VARIABLE = re.compile(
    r"(?<![\w'’])[A-Za-zα-ωΑ-Ω](?=\s*[=<>+*/^≤≥-]\s*\S)|(?<=[=<>+*/^≤≥])\s*[A-Za-z]\b"
)


def knows_language(language: str, lexicon: Mapping[str, Iterable[str]] | None = None) -> bool:
    return language in (lexicon or SCRIPTS)


def check_language(language: str, lexicon: Mapping[str, Iterable[str]] | None = None) -> None:
    """ValueError with the known languages where `language` is none of them."""
    known = sorted(lexicon) if lexicon else sorted(SCRIPTS)
    if language not in known:
        what = "the lexicon" if lexicon else "the known languages"
        raise ValueError(f"language {language!r} is not among {what}: {', '.join(known)}")


def language_consistency(
    text: str,
    target: str,
    *,
    lexicon: Mapping[str, Iterable[str]] | None = None,
    expected: Iterable[str] = (),
) -> float:
    """Units in `target` over all units of `text`, in [0, 1]; 1.0 where there are none.

    `text` is the reasoning alone. `expected` names the other languages that may occur (default:
    English and, for Latin targets, the major Latin languages lingua is asked about).
    """
    check_language(target, lexicon)
    if lexicon:
        return _lexicon_share(text, target, lexicon)
    expected = tuple(sorted({target, *(expected or _default_expected(target))}))
    for language in expected:
        check_language(language)
    num_target = num_units = 0
    for language, count in count_units(text, target, expected).items():
        num_units += count
        num_target += count if language == target else 0
    return num_target / num_units if num_units else 1.0


def _default_expected(target: str) -> tuple[str, ...]:
    return ("en", "de", "es", "fr") if SCRIPTS[target] == "latin" else ("en",)


def _lexicon_share(text: str, target: str, lexicon: Mapping[str, Iterable[str]]) -> float:
    words = {word: name for name, members in lexicon.items() for word in members if name != target}
    words.update(dict.fromkeys(lexicon[target], target))  # a shared word counts for the target
    found = [words[w] for w in re.findall(r"[^\s.,;:!?()]+", text) if w in words]
    return found.count(target) / len(found) if found else 1.0


def count_units(text: str, target: str, expected: tuple[str, ...]) -> dict[str, int]:
    """Units by language; a script no expected language is written in counts under its own name."""
    text = _NOT_LANGUAGE.sub(lambda match: f" {_foreign(match[0])} ", _without_blocks(text))
    text = _VARIABLE.sub(" ", text)
    if SCRIPTS[target] != "latin":
        text = _BORROWED.sub(" ", text)
    counts: dict[str, int] = {}
    for sentence in _SENTENCE.split(text):
        units: dict[str, list[str]] = {}
        for match in _UNIT.finditer(sentence):
            assert match.lastgroup is not None
            units.setdefault(match.lastgroup, []).append(match[0])
        if "kana" in units:  # Han beside kana is Japanese
            units["kana"] += units.pop("han", [])
        for script, words in units.items():
            language = _language_of(script, words, sentence, target, expected)
            counts[language] = counts.get(language, 0) + len(words)
    return counts


def _foreign(code: str) -> str:
    """What stands in code, maths or an address in letters that those have no use for: prose in hiding."""
    return "" if code.isascii() else " ".join(_NOT_CODE.findall(code))


def _without_blocks(text: str) -> str:
    """`text` without code blocks, displayed maths and environments."""
    for opening, closing in _BLOCKS:
        kept, at = [], 0
        while (start := text.find(opening, at)) >= 0:
            if (end := text.find(closing, start + len(opening))) < 0:
                break
            end += len(closing)
            kept += [text[at:start], _foreign(text[start:end])]
            at = end
        text = " ".join([*kept, text[at:]])
    kept, at, unclosed = [], 0, set()
    for match in _BEGIN.finditer(text):
        name = match[1]
        if match.start() < at or name in unclosed:
            continue
        if (end := text.find(r"\end" + name, match.end())) < 0:
            unclosed.add(name)
            if len(unclosed) > _MAX_UNCLOSED:
                break
            continue
        end += len(r"\end" + name)
        kept += [text[at : match.start()], _foreign(text[match.start() : end])]
        at = end
    return " ".join([*kept, text[at:]])


def _language_of(
    script: str, words: list[str], sentence: str, target: str, expected: tuple[str, ...]
) -> str:
    if script == "han" and target == "ja" and "zh" not in expected:
        return "ja"  # a Japanese sentence may hold no kana
    candidates = tuple(name for name in expected if SCRIPTS[name] == script)
    if not candidates:
        return script
    if len(candidates) == 1 and SCRIPTS[target] != script:
        return candidates[0]
    if len(candidates) > 1 and _has_lingua():
        # lingua's time grows with the square of a word's length
        shares = _detect(candidates, " ".join(word[:_MAX_WORD] for word in words))
        best = max(shares, key=shares.__getitem__)
        # "Let x be" is as much German as English: in doubt it is the target
        if len(words) >= _LONG or shares[best] >= _SURE or target not in candidates:
            return best
    return target if target in candidates else candidates[0]


@lru_cache(maxsize=1)
def _has_lingua() -> bool:
    return find_spec("lingua") is not None


@lru_cache(maxsize=16)
def _detector(candidates: tuple[str, ...]):
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, name.upper()) for name in candidates]
    return LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()


@lru_cache(maxsize=1 << 14)
def _detect(candidates: tuple[str, ...], text: str) -> dict[str, float]:
    """Confidence of each candidate; they add up to 1."""
    values = _detector(candidates).compute_language_confidence_values(text)
    return {v.language.iso_code_639_1.name.lower(): v.value for v in values}


class LanguageReward:
    """`language_consistency` of the reasoning as a TRL reward function.

    The target is the row's column `language`, else `language`. ValueError for one that is not known.
    """

    __name__ = "language"  # TRL names the column of a reward by it

    def __init__(
        self,
        language: str = "en",
        protocol: str = "think_answer",
        special_token: str = SPECIAL_TOKEN,
        *,
        lexicon: Mapping[str, Iterable[str]] | None = None,
        prompt_opens_think: bool = False,
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        check_language(language, lexicon)
        self.language, self.lexicon = language, lexicon
        self.protocol, self.special_token = protocol, special_token
        self.prompt_opens_think = prompt_opens_think

    def __call__(
        self, prompts=None, completions=None, completion_ids=None, *, language=None, **columns: Any
    ) -> list[float | None]:
        """The share of each reasoning that is in the target language; None without a reasoning."""
        texts = [message_text(completion) for completion in completions or []]
        if language is None:
            language = [None] * len(texts)
        targets = column_of("language", language, len(texts))
        shares: list[float | None] = []
        for text, target in zip(texts, targets, strict=True):
            reasoning = split_completion(
                text,
                self.protocol,
                self.special_token,
                prompt_opens_think=self.prompt_opens_think,
            ).reasoning
            target = target or self.language
            shares.append(
                language_consistency(reasoning, target, lexicon=self.lexicon) if reasoning else None
            )
        return shares
