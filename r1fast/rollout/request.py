"""What the scheduler moves about: requests, their samples, and the prefills that start them."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.text import TextStream


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
    logits: Tensor | None = None  # (1, V) of the last token, once all are computed
