"""Readability filters of rejection sampling: each returns why a sample is dropped, or None."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from r1fast.protocol import Parts
from r1fast.rewards.language import language_consistency

_WORD = re.compile(r"[\u3041-\u30ff\u3400-\u9fff]|[^\s\u3041-\u30ff\u3400-\u9fff]+")
_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
_INDENTED = re.compile(r"(?:^(?: {4}|\t).*(?:[;{}=():]|\bdef\b|\bimport\b).*\n?){3,}", re.MULTILINE)


def language_mix(
    parts: Parts,
    language: str,
    min_share: float,
    *,
    lexicon: Mapping[str, Iterable[str]] | None = None,
) -> str | None:
    """Reasoning with less than `min_share` of its words in `language`; 0 is off."""
    if min_share <= 0 or not parts.reasoning:
        return None
    share = language_consistency(parts.reasoning, language, lexicon=lexicon)
    if share >= min_share:
        return None
    return f"mixed language: {share:.3f} {language}, {min_share:g} is asked"


def long_paragraph(parts: Parts, max_words: int) -> str | None:
    """A paragraph of more than `max_words` words (Han and kana characters count each); 0 is off."""
    if max_words <= 0:
        return None
    for text in (parts.reasoning, parts.summary):
        for paragraph in re.split(r"\n\s*\n", text or ""):
            num_words = len(_WORD.findall(paragraph))
            if num_words > max_words:
                return f"long paragraph: {num_words} words, {max_words} are allowed"
    return None


def code_block(parts: Parts) -> str | None:
    """A fenced or indented block of code in the reasoning."""
    text = parts.reasoning or ""
    if _FENCE.search(text):
        return "code block: fenced"
    return "code block: indented" if _INDENTED.search(text) else None


def malformed(parts: Parts) -> str | None:
    """A completion that breaks its protocol."""
    return None if parts.well_formed else f"format: {parts.fault}"


class Duplicates:
    """Remembers the completions of each problem, without case, punctuation and white space."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, problem_id: str, text: str) -> str | None:
        key = (problem_id, re.sub(r"[\W_]+", "", text.casefold()) or text)
        if key in self._seen:
            return "duplicate: the same text was kept for this problem"
        self._seen.add(key)
        return None
