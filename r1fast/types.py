"""The nouns of a run: what flows from a JSONL line to a training step. No logic, no torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

Verdict = Literal["correct", "wrong", "no_answer", "unparseable", "timeout", "error"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
# of problems, each with a grader of its own (rewards/graders.py); nothing verifies general ones
KINDS = ("math", "code", "choice", "if", "qa", "open", "general")
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One task. `answer` is None where nothing can be verified (general prompts), or columns of `meta`
    tell what is right (code, if, open)."""

    prompt: str  # the user's words, before any template
    answer: str | None = None  # the gold answer
    id: str = ""  # unique in its file; "file.jsonl:12" where the row names none
    kind: str = "math"  # routes the rewards, one of KINDS
    language: str = "en"  # the language the reasoning should be in
    subset: str = ""  # for per-subset tables
    meta: Mapping = field(default_factory=dict)  # every other column of the row


@dataclass(slots=True)
class Completion:
    """One sampled answer. `logprobs` are the policy's at the sampling temperature."""

    token_ids: list[int]
    logprobs: list[float]  # len(token_ids)
    finish_reason: FinishReason
    text: str = ""
    entropies: list[float] = field(default_factory=list)  # len(token_ids) when asked for
    # under what was sampled from: after penalties, biases, top-k, top-p and min-p; empty without them
    truncated_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)  # when asked for
    stop_reason: str | int | None = None  # the stop string or the token id that ended it
    error: str = ""  # what went wrong where finish_reason is "error"
    # of the weights that sampled it, first and last: of servers, which may get others meanwhile
    weight_versions: tuple[int, int] | None = None


@dataclass(slots=True)
class TokenEvent:
    """What a step of the engine adds to one sample of a request: its new tokens and their text.

    A request that does not stream has one event a sample, when it ends, with everything.
    """

    request_id: int
    sample: int  # which of the request's samples
    token_ids: list[int]
    logprobs: list[float]  # the policy's at the sampling temperature, len(token_ids)
    text: str = ""  # what may be shown now: no part of a stop string, no half character
    truncated_logprobs: list[float] = field(default_factory=list)  # as in Completion
    top_logprobs: list[list[tuple[int, float]]] | None = None  # (id, logprob), most likely first
    entropies: list[float] | None = None
    finish_reason: FinishReason | None = None  # None: more will come
    stop_reason: str | int | None = None
    error: str = ""
    weight_versions: tuple[int, int] | None = None  # as in Completion
    arrived: float = 0.0  # time.monotonic() when a server had sent it


@dataclass(slots=True)
class Reward:
    """What a completion earned. A part is None where it does not apply to the problem."""

    total: float  # the weighted sum; the mean of the group's others where the verdict is "error"
    parts: dict[str, float | None]  # unweighted
    verdict: Verdict | None  # of the accuracy reward; None where nothing can be verified
    answer: str | None = None  # what was extracted
    detail: dict = field(default_factory=dict)  # what else its grader says, for stored samples


@dataclass(slots=True)
class RolloutGroup:
    """A problem and its G completions."""

    problem: Problem
    prompt_ids: list[int]
    completions: list[Completion]
    rewards: list[Reward] = field(default_factory=list)
    position: int | None = None  # in the step, over all ranks; None: as this rank's are dealt


@dataclass(slots=True)
class Sequence:
    """One training sequence before packing: a prompt and the tokens to learn."""

    prompt_ids: list[int]
    completion_ids: list[int]
    old_logprobs: list[float] | None = None  # len(completion_ids)
    ref_logprobs: list[float] | None = None  # len(completion_ids)
    advantage: float = 0.0
    # len(completion_ids): the sampler's, where the loss corrects for it; then old ones are the trainer's,
    # and None where the weights are still those of the forward to come
    rollout_logprobs: list[float] | None = None
    # len(completion_ids): what the loss takes instead of the training forward's own
    policy_logprobs: list[float] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch without padding: T forwarded tokens, N completion tokens to predict.

    The tokens are in segments. A sequence on its own is one segment; where several share a prompt it
    is a segment, and each of their completions is one that continues it.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    bounds: list[int]  # (segments + 1,) where each begins, from 0 to T
    prefix_of: list[int]  # (segments,) the segment it continues; -1 where it stands alone
    target_rows: list[int]  # (N,) the token whose hidden state predicts each target
    target_ids: Tensor  # (N,) int64: the completions' tokens, sequence after sequence
    cu_seqlens: Tensor  # (S + 1,) int32: the targets of each sequence
    token_weights: Tensor  # (N,) float32: one over the global denominator of the loss
    advantages: Tensor  # (N,) float32
    old_logprobs: Tensor | None  # (N,) float32; None: those that the forward is to give
    ref_logprobs: Tensor  # (N,) float32
    sequence_index: list[int]  # (S,) where each sequence stood before packing
    policy_logprobs: Tensor | None = None  # (N,) float32, where the sequences have them
    rollout_logprobs: Tensor | None = None  # (N,) float32, likewise
    # where a rank has a piece of it: then `bounds` and `prefix_of` are of all tokens, everything else is its own
    context: ContextPart | None = None

    @property
    def num_tokens(self) -> int:
        """T, what this rank forwards of sequences."""
        if self.context is not None:
            return self.context.num_tokens
        return 0 if self.is_idle else self.bounds[-1]

    @property
    def is_idle(self) -> bool:
        """Without a target: forwarded because other ranks, which are in step with this one, have some."""
        return not self.sequence_index

    @property
    def sampler_logprobs(self) -> Tensor:  # (N,)
        """As the tokens were drawn."""
        return self.old_logprobs if self.rollout_logprobs is None else self.rollout_logprobs


@dataclass(frozen=True, slots=True)
class ContextPart:
    """Which part of a micro-batch a rank of a context group has."""

    group: ProcessGroup
    num_tokens: int  # of sequences
    targets: Tensor  # (n,) int64, ascending: which of the N are predicted by its tokens
    whole: PackedBatch
