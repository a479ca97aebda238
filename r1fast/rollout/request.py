"""What the scheduler moves about: requests, their samples, and the prefills that start them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
from torch import Tensor

from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.text import TextStream


class RefusedRequest(ValueError):
    """A request that cannot be served. `field` is what of it is at fault: prompt, seeds, lengths, sampling
    or one of SamplingParams."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what is wanted of it."""

    id: int
    name: str  # how errors call it
    prompt: np.ndarray  # (P,) int64
    sampling: SamplingParams
    stream: bool
    return_entropy: bool
    samples: list["Sample"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Sample:
    """One completion of a request. `slot` is where it decodes, -1 while it does not."""

    request: Request
    index: int
    seed: int
    limit: int  # tokens of prompt and completion
    slot: int = -1
    is_done: bool = False
    num_emitted: int = 0  # tokens that events have shown
    text: TextStream | None = None  # where it streams or may stop at a string
    shown: str = ""  # text for its next event
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    seen: np.ndarray | None = None  # (V,) bool, of tokens under a repetition penalty
    saved: dict[str, np.ndarray] | None = None  # its row, while it is preempted


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens to be forwarded once, for the samples that go on from them.

    A prompt for all its samples, or the prompt and the tokens so far of a sample that was preempted.
    """

    request: Request
    tokens: np.ndarray  # (P,) int64
    samples: list[Sample]  # that have not started
    blocks: np.ndarray | None = None  # (num_blocks,) int32, held from its admission on
    num_computed: int = 0  # tokens whose keys and values are in the cache
    logits: Tensor | None = None  # (V,) of the last token, once all are computed
    is_sound: bool = False  # whether a token can be drawn from them


def token_ids(
    given: Sequence[int] | np.ndarray | Tensor, name: str, field: str = "prompt"
) -> np.ndarray:  # (P,), of any integer type
    """Tokens as an array. Raises RefusedRequest, which calls them `name`, for anything else."""
    try:
        ids = np.asarray(given.tolist() if isinstance(given, Tensor) else given)
    except ValueError:  # lists of different lengths
        ids = None
    if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RefusedRequest(
            f"{name} must be a list of token ids, and prompts a list of such lists; got {given!r:.80}",
            field,
        )
    return ids


def check_request(
    name: str,
    prompt: np.ndarray,  # of `token_ids`
    seeds: Sequence[int],
    sampling: SamplingParams,
    *,
    vocab_size: int,
    context: int,  # tokens of prompt and completion
    eos_ids: Sequence[int],
    has_text: bool,
) -> None:
    """Raises RefusedRequest, which calls the request `name`, for what no cache could make possible."""
    V = vocab_size
    if not len(prompt):
        raise RefusedRequest(f"{name} is empty", "prompt")
    if not isinstance(sampling, SamplingParams):
        raise RefusedRequest(
            f"{name} needs SamplingParams as `sampling`, got {type(sampling).__name__}", "sampling"
        )
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise RefusedRequest(f"{name} has a seed that is no integer: {seed!r:.80}", "seeds")
        if not -(2**63) <= seed < 2**63:
            raise RefusedRequest(f"{name} has a seed that does not fit in 64 bits: {seed}", "seeds")
    if prompt.min() < 0 or prompt.max() >= V:
        raise RefusedRequest(
            f"{name} has a token id outside [0, {V}): {prompt.min()}..{prompt.max()}", "prompt"
        )
    if len(prompt) >= context:
        raise RefusedRequest(
            f"{name} has {len(prompt)} tokens and fills the model's context of {context}; "
            "drop or shorten it",
            "prompt",
        )
    if sampling.stop and not has_text:
        raise RefusedRequest(
            f"{name} has stop strings, but the engine was made without `decode`", "stop"
        )
    for key in ("stop_token_ids", "logit_bias"):
        for token in getattr(sampling, key):
            if not 0 <= token < V:
                raise RefusedRequest(f"{name} has {key} with token {token}, outside [0, {V})", key)
    banned = {t for t, bias in sampling.logit_bias.items() if bias == -math.inf}
    by = ["logit_bias"] * bool(banned)
    if sampling.min_tokens:
        banned |= {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids)}
        by.append("min_tokens")
    if len(banned) == V:
        raise RefusedRequest(
            f"{name} bans every one of the vocabulary's {V} tokens by its {' and '.join(by)}", by[0]
        )


def why_banned(sampling: SamplingParams) -> str:
    """Where the model's logits were finite, and those that the request made of them are not."""
    names = [
        name
        for name, is_set in (
            ("logit_bias", sampling.logit_bias),
            ("min_tokens", sampling.min_tokens),
            ("repetition_penalty", sampling.repetition_penalty != 1),
        )
        if is_set
    ]
    return f"its own {' and '.join(names)} left no token with a finite logit"
