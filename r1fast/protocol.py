"""How a completion is read and written: reasoning, answer and summary, for each protocol.

`think_answer`  <think> reasoning </think> <answer> answer </answer>      (R1-Zero)
`cold_start`    |special_token| reasoning |special_token| summary         (cold start)
`think`         <think> reasoning </think> summary                        (the released R1)

White space around tags never matters: word-level tokenizers join with spaces.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

PROTOCOLS = ("think_answer", "cold_start", "think")
SPECIAL_TOKEN = "|special_token|"
THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a completion says where. A part is None where the text has no such place."""

    reasoning: str | None
    answer: str | None  # the region in which the final answer stands
    summary: str | None  # what the user reads: everything but the reasoning
    well_formed: bool
    fault: str = ""  # why it is not well formed, in words


def split_completion(
    text: str,
    protocol: str = "think_answer",
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
) -> Parts:
    """Read `text` by `protocol`. `prompt_opens_think`: the prompt already ended in the opening tag.

    A text that breaks the protocol still gives what can be read without guessing, for instance
    the reasoning of a completion that was cut off before its answer.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if protocol == "cold_start":
        return _split_cold_start(text, special_token, prompt_opens_think)
    if prompt_opens_think and not text.lstrip().startswith(THINK):
        text = THINK + text
    head, opened, rest = text.partition(THINK)
    fault = "" if opened else f"no {THINK}"
    if opened and head.strip():
        fault = f"text before {THINK}"
    if END_THINK not in text:
        # an opened thought that never closes is all reasoning; without tags there is none
        reasoning = rest.strip() if opened else None
        tail = "" if opened else text
        fault = fault or f"no {END_THINK}"
    else:
        before, _, tail = text.rpartition(END_THINK)
        reasoning = before.partition(THINK)[2].strip() if THINK in before else before.strip()
        if text.count(THINK) > 1 or text.count(END_THINK) > 1:
            fault = fault or "a think tag stands twice"
    if protocol == "think":
        summary = tail.strip() or None
        if summary is None:
            fault = fault or f"nothing after {END_THINK}"
        elif ANSWER in text or END_ANSWER in text:
            fault = fault or "a tag of another protocol"
        return Parts(reasoning, summary, summary, not fault, fault)
    if reasoning is not None and (ANSWER in reasoning or END_ANSWER in reasoning):
        fault = fault or "an answer tag inside the reasoning"
    answer, answer_fault = read_answer_block(tail)
    fault = fault or answer_fault
    summary = answer if answer is not None else (tail.strip() or None)
    return Parts(reasoning, answer, summary, not fault, fault)


def answer_region(
    text: str,
    protocol: str | None,
    special_token: str,
    tail: str | None,
    *,
    prompt_opens_think: bool = False,
) -> tuple[str | None, str, bool]:
    """(where an answer may stand, what is wrong, whether it is the answer and nothing else).

    By `protocol`, or where that is None by the tags that the text has: `tail` is then what stands behind
    the reasoning, None where a thought never ends.
    """
    if protocol is not None:
        parts = split_completion(
            text, protocol, special_token, prompt_opens_think=prompt_opens_think
        )
        return parts.answer, parts.fault, protocol == "think_answer"
    if tail is None:
        return None, f"no {END_THINK}", False
    if ANSWER in tail:
        return *read_answer_block(tail), True
    return tail, "", tail == text


def read_answer_block(tail: str) -> tuple[str | None, str]:
    """The content of the one <answer> block in `tail`, and what is wrong: (answer, fault).

    The answer is None where there is no block, more than one, or text behind it.
    """
    if tail.count(ANSWER) > 1 or tail.count(END_ANSWER) > 1:
        return None, SECOND_ANSWER
    before, opened, rest = tail.partition(ANSWER)
    answer, closed, after = rest.partition(END_ANSWER)
    if not opened or not closed:
        return None, f"no {END_ANSWER}" if opened else f"no {ANSWER}"
    if after.strip():
        return None, TEXT_AFTER_ANSWER
    if THINK in answer or THINK in before:
        return None, f"{THINK} after {END_THINK}"
    if not answer.strip():
        return None, "empty answer"
    return answer.strip(), "text before <answer>" if before.strip() else ""


SECOND_ANSWER = "a second answer block"
TEXT_AFTER_ANSWER = "text after the answer"


def _split_cold_start(text: str, token: str, prompt_opens_think: bool) -> Parts:
    if not token.strip():
        raise ValueError(f"special_token must not be empty, got {token!r}")
    if prompt_opens_think and not text.lstrip().startswith(token):
        text = token + text
    pieces = [piece.strip() for piece in text.split(token)]
    if len(pieces) == 1:
        return Parts(None, None, pieces[0] or None, False, f"no {token}")
    if len(pieces) == 2:
        return Parts(pieces[1], None, None, False, f"no second {token}")
    reasoning, summary = pieces[1], pieces[-1] or None
    fault = ""
    if pieces[0]:
        fault = f"text before the first {token}"
    elif len(pieces) > 3:
        fault = f"{token} stands {len(pieces) - 1} times"
        summary = None
    elif summary is None:
        fault = f"nothing after the second {token}"
    elif any(tag in text for tag in TAGS):
        fault = "a tag of another protocol"
    return Parts(reasoning, summary, summary, not fault, fault)


def join_completion(
    reasoning: str,
    answer: str,
    protocol: str = "think_answer",
    special_token: str = SPECIAL_TOKEN,
) -> str:
    """The inverse of `split_completion`; `reasoning` may be empty, as for a simple query."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    reasoning, answer = reasoning.strip(), answer.strip()
    if not answer:
        raise ValueError("the answer (or summary) of a completion is empty")
    for tag in (special_token,) * (protocol == "cold_start") + TAGS:
        if tag in reasoning or tag in answer:
            raise ValueError(f"{tag!r} inside the reasoning or the answer cannot be read back")
    if protocol == "cold_start":
        return " ".join(filter(None, (special_token, reasoning, special_token, answer)))
    thought = " ".join(filter(None, (THINK, reasoning, END_THINK)))
    if protocol == "think_answer":
        return f"{thought} {ANSWER} {answer} {END_ANSWER}"
    thought = f"{THINK}\n{reasoning}\n{END_THINK}" if reasoning else f"{THINK}\n\n{END_THINK}"
    return f"{thought}\n\n{answer}"


def protocol_hint(
    texts: Sequence[str],
    protocol: str = "think_answer",
    special_token: str = SPECIAL_TOKEN,
    opened: Collection[str] = PROTOCOLS,
) -> str:
    """A sentence for who reads completions by `protocol` where most follow another one; "" where they do not.

    Of 200 `texts` drawn at random: under a tenth follow `protocol`, and at least half the other one. `opened`: the
    protocols whose opening tag the prompt has written (`templates.opened_protocols`).
    """
    some = random.Random(0).sample(texts, 200) if len(texts) > 200 else texts

    def share(name: str) -> float:
        if name == "cold_start" and not special_token.strip():
            return 0.0  # nothing follows it
        parts = [
            split_completion(t, name, special_token, prompt_opens_think=name in opened)
            for t in some
        ]
        return sum(p.well_formed for p in parts) / len(some)

    if not some or share(protocol) >= 0.1:
        return ""
    for other in PROTOCOLS:
        if other != protocol and share(other) >= 0.5:
            return (
                f'next to none of the completions follow template.protocol = "{protocol}", and '
                f'most follow "{other}": --template.protocol={other} reads those'
            )
    return ""


def opens_think(
    prompt: str, protocol: str = "think_answer", special_token: str = SPECIAL_TOKEN
) -> bool:
    """Whether a rendered prompt ends in the opening tag, as the chat templates of R1 models do."""
    return prompt.rstrip().endswith(opening_tag(protocol, special_token))


def opening_tag(protocol: str = "think_answer", special_token: str = SPECIAL_TOKEN) -> str:
    return special_token if protocol == "cold_start" else THINK


def whole_completion(
    text: str, protocol: str = "think_answer", special_token: str = SPECIAL_TOKEN
) -> str:
    """A completion that is to stand alone: with the opening tag that its prompt ended in."""
    tag = opening_tag(protocol, special_token)
    return text if text.lstrip().startswith(tag) else tag + text


def rest_of_completion(
    prompt: str, text: str, protocol: str = "think_answer", special_token: str = SPECIAL_TOKEN
) -> str:
    """`text` without the opening tag where the rendered `prompt` ends in it already."""
    tag = opening_tag(protocol, special_token)
    if not opens_think(prompt, protocol, special_token) or not text.lstrip().startswith(tag):
        return text
    rest, space = text.lstrip()[len(tag) :], prompt[len(prompt.rstrip()) :]
    return rest[len(space) :] if rest.startswith(space) else rest.lstrip()


def boxes(text: str) -> list[str]:
    r"""The contents of the outermost \boxed{...}, in order; "" for a box that never closes."""
    return [content for content, _, _ in box_spans(text)]


def box_spans(text: str) -> list[tuple[str, int, int]]:
    r"""(content, start, end) of the outermost \boxed{...}, as `boxes`."""
    found: list[tuple[str, int, int]] = []
    at = 0
    while match := _BOX.search(text, at):
        start = match.end()
        if start >= len(text):
            found.append(("", match.start(), len(text)))
            break
        if text[start] != "{":  # \boxed 7: one token, as TeX reads it
            token = re.match(r"\\[A-Za-z]+|[^\s$]", text[start:])
            if match.end() > match.start() and token and text[start - 1].isspace():
                token = re.match(r"[^\s$.,;]+", text[start:]) or token
            at = start + max(1, len(token[0]) if token else 1)
            found.append((token[0] if token else "", match.start(), at))
            continue
        end = _closing(text, start)
        if end < 0:
            found.append(("", match.start(), len(text)))
            break
        at = end + 1
        found.append((text[start + 1 : end].strip(), match.start(), at))
    return found


def _closing(text: str, start: int) -> int:
    r"""Index of the brace that closes the one at `start`, or -1. \{ and \} do not count."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        brace = match[0]
        depth += (brace == "{") - (brace == "}")
        if depth == 0 and brace in "{}":
            return match.start()
    return -1
