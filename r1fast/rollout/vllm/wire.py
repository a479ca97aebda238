"""What of a request goes over the wire to /v1/completions, and what of the reply is a sample.

Token ids both ways, nothing is tokenised again; text is made here, by the policy's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from r1fast.rollout.request import RefusedRequest
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm.client import Interrupted, ServerError
from r1fast.types import TokenEvent

_SENT = ("temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "max_tokens",
         "stop_token_ids")  # fmt: skip
_DEFAULTS = SamplingParams()
MAX_TEMPERATURE = 2  # vLLM's own


def sampling_body(
    name: str, prompt_ids: Sequence[int], sampling: SamplingParams, eos_ids: Sequence[int]
) -> dict:
    """The request of a sample, without its model, seed and max_tokens. Raises RefusedRequest, which calls
    it `name`, for sampling that is not sent."""
    for f in fields(sampling):
        if f.name not in _SENT and getattr(sampling, f.name) != getattr(_DEFAULTS, f.name):
            raise RefusedRequest(
                f"{name} has {f.name} = {getattr(sampling, f.name)!r:.80}, which is not sent to vLLM: "
                f"what can be set is {', '.join(_SENT)}",
                f.name,
            )
    if sampling.temperature > MAX_TEMPERATURE:
        raise RefusedRequest(
            f"{name} has temperature = {sampling.temperature:g}: vLLM takes up to {MAX_TEMPERATURE}",
            "temperature",
        )
    stops = list(sampling.stop_token_ids)
    if not sampling.ignore_eos:  # a server knows its own config's alone
        stops += [t for t in eos_ids if t not in stops]
    return {
        "prompt": list(prompt_ids),
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
        "ignore_eos": sampling.ignore_eos,
        "stop_token_ids": stops,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def read_completion(
    reply: object, prompt_ids: Sequence[int], request_id: int, sample: int, max_tokens: int
) -> TokenEvent:
    """The one sample of a reply. Raises ServerError for what is none."""
    try:
        (choice,) = reply["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason, stopped_by = choice["finish_reason"], choice.get("stop_reason")
        seen = choice.get("prompt_token_ids")
        well_formed = reason == "abort" or (
            all(type(t) is int for t in ids)
            and all(type(x) in (int, float) for x in logprobs)
            and 0 < len(ids) == len(logprobs) <= max_tokens
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        well_formed = False
    if not well_formed:
        raise ServerError(f"no completion with token ids and log-probabilities: {reply!r:.300}")
    if seen is not None and list(seen) != list(prompt_ids):
        raise ServerError("the server has read another prompt than it was sent")
    if reason == "abort":
        raise Interrupted("the server was paused")
    if reason not in ("stop", "length"):
        raise ServerError(f"a sample ended with finish_reason {reason!r}")
    logprobs = [float(x) for x in logprobs]
    return TokenEvent(
        request_id, sample, list(ids), logprobs, finish_reason=reason, stop_reason=stopped_by
    )
