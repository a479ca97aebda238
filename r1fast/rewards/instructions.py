"""Instructions that a program can check: the 25 of IFEval (arXiv 2311.07911), by their public ids.

Each check is a function of the response and the row's own arguments, with the meaning of the
reference implementation (google-research, instruction_following_eval, Apache-2.0). Two things are
ours: sentences and words are split by rules here, where the reference asks NLTK, and a language is
told by text_language.py, where it asks langdetect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from r1fast.rewards.text_language import check_known, is_language

Check = Callable[[str, Mapping[str, Any]], bool]
_RELATIONS = ("less than", "at least")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Gen|Col|Sr|Jr|Inc|Ltd|Co|vs|etc|No|Fig|e\.g|i\.e|cf|approx|a\.m|p\.m)"
    r"|\b[A-Z](?:\.[A-Z])*)\.$"
)
_MAX_ABBREVIATION = 32  # characters that an abbreviation at the end is looked for in
_SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"'”’)\]*_]*\s+(?=[\"'“‘(\[*_#-]*[^\sa-z])|(?<=[。！？])\s*|\n{2,}"
)
_WORD = re.compile(r"\w+(?:[-'’.&]\w+)*")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One kind of instruction: the arguments that a row must bring, and the check."""

    check: Check
    required: tuple[str, ...] = ()


def known_instruction(name: str) -> str:
    """The id without a language prefix ("en:keywords:existence"). ValueError where none has it."""
    short = re.sub(r"^[a-z]{2}:", "", name)
    if short not in INSTRUCTIONS:
        raise ValueError(f"unknown instruction {name!r}; known: {', '.join(sorted(INSTRUCTIONS))}")
    return short


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """ValueError where a row does not say all that its instruction needs, or with a wrong type."""
    short = known_instruction(name)
    for key in INSTRUCTIONS[short].required:
        value = arguments.get(key)
        if value is None:
            raise ValueError(f"instruction {name!r} needs {key!r}, got {dict(arguments)}")
        kind = _ARGUMENTS[key]
        if kind is list:
            ok = isinstance(value, list) and value and all(isinstance(x, str) and x for x in value)
        else:
            ok = isinstance(value, kind) and not isinstance(value, bool) and value != ""
        if key.endswith("relation"):
            ok = value in _RELATIONS
        if not ok:
            what = {list: "a list of words", int: "a whole number", str: "a text"}[kind]
            what = " or ".join(_RELATIONS) if key.endswith("relation") else what
            raise ValueError(f"instruction {name!r}: {key!r} must be {what}, got {value!r}")
        if key == "language":
            check_known(value)


def check_instructions(names: object, arguments: object) -> None:
    """ValueError unless both are lists of one length, with all that each instruction needs."""
    if not isinstance(names, list) or not names or not isinstance(arguments, list):
        raise ValueError(
            "a problem of kind if needs lists 'instructions' and 'arguments' (as in IFEval: "
            f"'instruction_id_list' and 'kwargs'), got {names!r:.60} and {arguments!r:.60}"
        )
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instructions but {len(arguments)} arguments (kwargs)")
    for name, own in zip(names, arguments, strict=True):
        if not isinstance(name, str) or not isinstance(own, Mapping):
            raise ValueError(
                f"an instruction is a name with a table, got {name!r:.60} with {own!r:.60}"
            )
        check_arguments(name, own)


def follows(response: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `response` does what the instruction says, read strictly; an empty one never does.

    ValueError for an unknown id.
    """
    check = INSTRUCTIONS[known_instruction(name)].check
    return bool(response.strip()) and bool(check(response, arguments))


def follows_loosely(response: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """The same for the response, without its first or last line or both, each without asterisks."""
    lines = response.split("\n")
    variants = [
        response,
        *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])),
    ]
    variants += [variant.replace("*", "") for variant in variants]
    return any(follows(variant, name, arguments) for variant in variants)


def count_sentences(text: str) -> int:
    """Sentences: ends with a full stop, a mark or a blank line; "Dr. No" and "3.5" do not end one."""
    count, has_word = 0, False
    for piece in map(str.strip, _SENTENCE_END.split(text)):
        has_word = has_word or bool(re.search(r"\w", piece))
        if not piece or _ABBREVIATION.search(piece[-_MAX_ABBREVIATION:]):
            continue
        count += has_word
        has_word = False
    return count + has_word


def count_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def _related(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def _response_language(text: str, a: Mapping) -> bool:
    return is_language(text, a["language"])


def _number_sentences(text: str, a: Mapping) -> bool:
    return _related(count_sentences(text), a["relation"], a["num_sentences"])


def _number_words(text: str, a: Mapping) -> bool:
    return _related(count_words(text), a["relation"], a["num_words"])


def _number_paragraphs(text: str, a: Mapping) -> bool:
    """Paragraphs are divided by ***; an empty one between two is a fault."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1] if len(parts) > 1 else []
    return (
        all(p.strip() for p in inner) and sum(bool(p.strip()) for p in parts) == a["num_paragraphs"]
    )


def _nth_paragraph_first_word(text: str, a: Mapping) -> bool:
    """Paragraphs are divided by a blank line; the n-th begins with the word."""
    parts, nth = text.split("\n\n"), a["nth_paragraph"]
    count = sum(bool(p.strip()) for p in parts)
    if not 1 <= nth <= count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    first = re.split(r"[.,?!'\"]", word, maxsplit=1)[0]
    return count == a["num_paragraphs"] and first.lower() == a["first_word"].lower()


def _placeholders(text: str, a: Mapping) -> bool:
    count = 0
    for line in text.split(
        "\n"
    ):  # by hand: a pattern takes the square of the brackets that never close
        at = line.find("[")
        while at >= 0 and (end := line.find("]", at + 1)) >= 0:
            count, at = count + 1, line.find("[", end + 1)
    return count >= a["num_placeholders"]


def _postscript(text: str, a: Mapping) -> bool:
    marker = a["postscript_marker"].strip()
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(
        marker, re.escape(marker.lower())
    )
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, a: Mapping) -> bool:
    # blanks of its own line alone: \s would begin at each of many empty lines and pass all of them
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == a["num_bullets"]


def _constrained(text: str, a: Mapping) -> bool:
    return any(answer in text for answer in _CONSTRAINED)


def _highlights(text: str, a: Mapping) -> bool:
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= a["num_highlights"]


def _sections(text: str, a: Mapping) -> bool:
    pattern = rf"\s?{re.escape(a['section_spliter'].strip())}\s?\d+\s?"
    return len(re.split(pattern, text)) - 1 >= a["num_sections"]


def _json(text: str, a: Mapping) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip())
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, a: Mapping) -> bool:
    for line in text.split(
        "\n"
    ):  # by hand, from the first << to the last >>: a pattern takes the square
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 2 and line[begin : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str, a: Mapping) -> bool:
    """Two different responses, divided by six asterisks."""
    parts = text.split("******")
    inner = parts[1:-1] if len(parts) > 1 else []
    full = [p.strip() for p in parts if p.strip()]
    return all(p.strip() for p in inner) and len(full) == 2 and full[0] != full[1]


def _repeat_prompt(text: str, a: Mapping) -> bool:
    return text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())


def _existence(text: str, a: Mapping) -> bool:
    return all(re.search(re.escape(word), text, re.IGNORECASE) for word in a["keywords"])


def _forbidden(text: str, a: Mapping) -> bool:
    words = a["forbidden_words"]
    return not any(re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE) for w in words)


def _frequency(text: str, a: Mapping) -> bool:
    count = len(re.findall(re.escape(a["keyword"].strip()), text, re.IGNORECASE))
    return _related(count, a["relation"], a["frequency"])


def _letter_frequency(text: str, a: Mapping) -> bool:
    count = text.lower().count(a["letter"].lower())
    return _related(count, a["let_relation"], a["let_frequency"])


def _end_checker(text: str, a: Mapping) -> bool:
    return text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())


def _quotation(text: str, a: Mapping) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _english_capital(text: str, a: Mapping) -> bool:
    return text.isupper() and is_language(text.lower(), "en")


def _english_lowercase(text: str, a: Mapping) -> bool:
    return text.islower() and is_language(text, "en")


def _capital_words(text: str, a: Mapping) -> bool:
    count = sum(word.isupper() for word in _WORD.findall(text))
    return _related(count, a["capital_relation"], a["capital_frequency"])


def _no_comma(text: str, a: Mapping) -> bool:
    return "," not in text


_ARGUMENTS: dict[str, type] = {
    "language": str, "num_sentences": int, "relation": str, "num_words": int, "num_paragraphs": int,
    "nth_paragraph": int, "first_word": str, "num_placeholders": int, "postscript_marker": str,
    "num_bullets": int, "num_highlights": int, "section_spliter": str, "num_sections": int,
    "prompt_to_repeat": str, "keywords": list, "forbidden_words": list, "keyword": str,
    "frequency": int, "letter": str, "let_relation": str, "let_frequency": int, "end_phrase": str,
    "capital_relation": str, "capital_frequency": int,
}  # fmt: skip
INSTRUCTIONS: dict[str, Instruction] = {
    "change_case:capital_word_frequency": Instruction(
        _capital_words, ("capital_relation", "capital_frequency")
    ),
    "change_case:english_capital": Instruction(_english_capital),
    "change_case:english_lowercase": Instruction(_english_lowercase),
    "combination:repeat_prompt": Instruction(_repeat_prompt, ("prompt_to_repeat",)),
    "combination:two_responses": Instruction(_two_responses),
    "detectable_content:number_placeholders": Instruction(_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": Instruction(_postscript, ("postscript_marker",)),
    "detectable_format:constrained_response": Instruction(_constrained),
    "detectable_format:json_format": Instruction(_json),
    "detectable_format:multiple_sections": Instruction(
        _sections, ("section_spliter", "num_sections")
    ),
    "detectable_format:number_bullet_lists": Instruction(_bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": Instruction(_highlights, ("num_highlights",)),
    "detectable_format:title": Instruction(_title),
    "keywords:existence": Instruction(_existence, ("keywords",)),
    "keywords:forbidden_words": Instruction(_forbidden, ("forbidden_words",)),
    "keywords:frequency": Instruction(_frequency, ("keyword", "relation", "frequency")),
    "keywords:letter_frequency": Instruction(
        _letter_frequency, ("letter", "let_relation", "let_frequency")
    ),
    "language:response_language": Instruction(_response_language, ("language",)),
    "length_constraints:nth_paragraph_first_word": Instruction(
        _nth_paragraph_first_word, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "length_constraints:number_paragraphs": Instruction(_number_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_sentences": Instruction(
        _number_sentences, ("relation", "num_sentences")
    ),
    "length_constraints:number_words": Instruction(_number_words, ("relation", "num_words")),
    "punctuation:no_comma": Instruction(_no_comma),
    "startend:end_checker": Instruction(_end_checker, ("end_phrase",)),
    "startend:quotation": Instruction(_quotation),
}
