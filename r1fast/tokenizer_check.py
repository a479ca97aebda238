"""What a model folder says of its tokenizer, looked at when it is read and not where training first needs it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1fast.metrics import warn

PROBE = "What is 1 + 1?"
FIRST = 200  # prompts that are looked at
MUCH = 0.1  # of their tokens


def check_tokenizer_config(config: dict, folder: Path) -> None:
    """Raises ValueError for what could not be used, or not be written into the model that is trained."""
    file = folder / "tokenizer_config.json"
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{file} holds half a surrogate pair, which is no text: {error.object[error.start : error.end]!r}"
        ) from None
    length = config.get("model_max_length", 1)  # "no bound" is often a number of more than 64 bits
    is_number = type(length) in (int, float) and length >= 1
    if length is not None and not (is_number and (length == math.inf or length % 1 == 0)):
        raise ValueError(
            f"{file}: 'model_max_length' must be a whole number of tokens, got {length!r:.80}"
        )


def probe(tokenizer: Any) -> None:
    """Use it once: what a tokenizer is made of is only looked at then."""
    tokenizer.decode(tokenizer.encode(PROBE), skip_special_tokens=False)


def warn_of_unknown(
    prompts: Sequence[Sequence[int]], tokenizer: Any, path: str, ends: Sequence[int]
) -> None:
    """Warn where the first prompts hold much text that the tokenizer does not know.

    An unknown token that is also one that ends or pads says nothing: a chat template writes it too.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (*ends, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    ids = [i for prompt in prompts[:FIRST] for i in prompt]
    share = ids.count(unknown) / max(1, len(ids))
    if share > MUCH:
        warn(
            f"{100 * share:.0f}% of the tokens of the first {min(FIRST, len(prompts))} prompts are "
            f"{tokenizer.unk_token!r}, text that the tokenizer of {path or 'the model'} does not know: the model "
            "does not see it"
        )


def end_ids(named: dict[str, Any], vocab_size: int, folder: object) -> list[int]:
    """Ids that end a completion, in the order of `named`: by what they stand in, one, a list, or None.

    Raises ValueError for what is no token of the model, and where there are none.
    """
    ids: list[int] = []
    for file, value in named.items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if type(one) is not int or not 0 <= one < vocab_size:
                raise ValueError(
                    f"{folder}: 'eos_token_id' of {file} must be token ids of the model (0 to "
                    f"{vocab_size - 1}), got {one!r:.80}"
                )
            ids.append(one)
    if not ids:
        raise ValueError(f"{folder} names no end-of-sequence token in its tokenizer or config")
    return list(dict.fromkeys(ids))
