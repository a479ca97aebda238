"""What comes out of the engine: events, completions and the best of them, counters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from r1fast.rollout.request import Sample
from r1fast.types import Completion, FinishReason, TokenEvent


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made; blocks are as they are now."""

    num_blocks: int = 0  # of the cache
    blocks_used: int = 0  # held by requests
    blocks_cached: int = 0  # held by nobody, kept for equal prefixes
    peak_blocks: int = 0  # most that were ever held at once
    block_bytes: int = 0  # keys and values of all layers
    num_running: int = 0  # samples that are decoding
    num_waiting: int = 0  # samples that are not, yet
    decode_steps: int = 0
    decode_tokens: int = 0  # sampled by them
    prefill_tokens: int = 0  # forwarded
    prefix_hits: int = 0  # prompt tokens that were found in the cache
    prefix_queries: int = 0  # prompt tokens that were looked for
    preemptions: int = 0
    drafted: int = 0  # tokens that speculation proposed
    accepted: int = 0  # and that were what was sampled

    def since(self, before: "EngineStats") -> dict[str, float]:
        """What was counted after `before`; levels as they are now."""
        levels = ("num_blocks", "blocks_used", "blocks_cached", "peak_blocks", "block_bytes",
                  "num_running", "num_waiting")  # fmt: skip
        return {
            name: float(value if name in levels else value - getattr(before, name))
            for name, value in asdict(self).items()
        }

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0


def best_completions(
    completions: Sequence[Completion], n: int, by: Literal["sum", "mean"] = "sum"
) -> list[Completion]:
    """The `n` with the highest log-probability, summed or a token; errors last, ties in order.

    Raises ValueError for n outside [1, len(completions)] and for another `by`.
    """
    if by not in ("sum", "mean"):
        raise ValueError(f"by must be sum or mean, got {by!r}")
    if not 1 <= n <= len(completions):
        raise ValueError(f"cannot keep the best {n} of {len(completions)} completions")

    def score(c: Completion) -> tuple[bool, float]:
        scale = max(len(c.logprobs), 1) if by == "mean" else 1
        return c.finish_reason != "error", sum(c.logprobs) / scale

    return sorted(completions, key=score, reverse=True)[:n]


def event_of(
    sample: Sample,
    values: Mapping[str, np.ndarray],  # Rows.results of it
    decode: Callable[[list[int]], str],
    reason: FinishReason | None,
    **why,  # stop_reason or error
) -> TokenEvent:
    """What the sample has got since its last event."""
    request, first = sample.request, sample.num_emitted
    token_ids = values["tokens"][first:].tolist()
    sample.num_emitted += len(token_ids)
    try:
        text = _text_of(sample, token_ids, decode, is_last=reason is not None)
    except Exception as error:  # the tokenizer's: it ends this sample, not the others' step
        name = f"{request.name}, sample {sample.index}"
        text, reason, why = "", "error", {"error": f"{name}: {undecodable(error)}"}
    top, sample.top_logprobs = sample.top_logprobs, []
    return TokenEvent(
        request.id,
        sample.index,
        token_ids,
        values["logprobs"][first:].tolist(),
        text,
        values["truncated"][first:].tolist() if request.sampling.truncates else [],
        top if request.sampling.top_logprobs else None,
        values["entropies"][first:].tolist() if request.return_entropy else None,
        reason,
        **why,
    )


def _text_of(
    sample: Sample, token_ids: list[int], decode: Callable[[list[int]], str], *, is_last: bool
) -> str:
    if is_last and sample.text is not None:
        sample.shown += sample.text.finish()
    text, sample.shown = sample.shown, ""
    if not sample.request.stream and (sample.text is None or sample.text.stopped_by is None):
        text = decode(token_ids)
    return text


def undecodable(error: Exception) -> str:
    return f"its tokens cannot be decoded to text ({type(error).__name__}: {error})"


def completion_of(events: Sequence[TokenEvent]) -> Completion:
    """The whole of a sample, from all its events."""
    last = events[-1]
    return Completion(
        [t for e in events for t in e.token_ids],
        [x for e in events for x in e.logprobs],
        last.finish_reason,
        "".join(e.text for e in events),
        [x for e in events for x in e.entropies or ()],
        [x for e in events for x in e.truncated_logprobs],
        [x for e in events for x in e.top_logprobs or ()],
        last.stop_reason,
        last.error,
        last.weight_versions,
    )
