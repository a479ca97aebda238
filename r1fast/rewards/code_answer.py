"""Where the program stands in a completion: the last fenced block in the protocol's place."""

from __future__ import annotations

import re

from r1fast.protocol import END_THINK, SPECIAL_TOKEN, THINK, answer_region
from r1fast.rewards.math import Extracted

TAGS = {
    "python": frozenset({"", "python", "python3", "py", "py3", "python 3"}),
    "cpp": frozenset(
        ["", "cpp", "c++", "cc", "cxx"]
        + [f"{c}{year}" for c in ("c++", "cpp") for year in ("11", "14", "17", "20", "2a", "23")]
    ),
}
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$", re.MULTILINE)


def extract_code(
    text: str,
    language: str = "python",
    protocol: str | None = None,
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
) -> Extracted:
    """The program of a completion, or why there is none.

    Its place is <answer>, or what follows the reasoning; there the last fenced block that is tagged
    as `language` ("python" or "cpp") or not at all. Without a fence an <answer> is code as a whole,
    and so is a text without any tags; a summary is not. `protocol=None` goes by the tags that the
    text has.
    """
    if language not in TAGS:
        raise ValueError(f"language must be one of {', '.join(TAGS)}, got {language!r}")
    never_ends = END_THINK not in text and text.lstrip().startswith(THINK)
    tail = None if never_ends else text.rpartition(END_THINK)[2]
    region, fault, bare = answer_region(
        text, protocol, special_token, tail, prompt_opens_think=prompt_opens_think
    )
    if region is None or not region.strip():
        return Extracted(None, fault or "no answer")
    blocks, opened = fenced_blocks(region)
    fitting = [code for tag, code in blocks if tag in TAGS[language]]
    if opened:
        return Extracted(None, "a fence that never closes")
    if blocks and not fitting:
        return Extracted(None, f"no block of {language}")
    if not blocks and not bare:
        return Extracted(None, "no fenced block")
    code = fitting[-1] if blocks else region
    tag = next(t for t, c in reversed(blocks) if c is code) if blocks else ""
    return Extracted(code, tag=tag) if code.strip() else Extracted(None, "an empty block")


def cpp_standard(tag: str) -> str:
    """What code with this tag is compiled as."""
    year = tag[-2:]
    return "c++23" if year == "23" else "c++20" if year in ("20", "2a") else "c++17"


def fenced_blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """([(tag in lower case, content)], whether the last fence never closes), as Markdown has them."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match | None = None
    for match in _FENCE.finditer(text):
        if opening is None:
            opening = match
            continue
        fence, tag = match[1], match[2].strip()
        if fence[0] == opening[1][0] and len(fence) >= len(opening[1]) and not tag:
            tag = opening[2].strip().lower()
            tag = tag if tag in ("python 3",) else tag.partition(" ")[0]
            blocks.append((tag, text[opening.end() + 1 : match.start()]))
            opening = None
    return blocks, opening is not None
