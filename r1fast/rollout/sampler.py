"""Draws tokens so that a completion depends on its own seed alone, with the policy's log-probability.

A token is the inverse CDF of its distribution at one uniform number, and that number is a hash of
(sample seed, position): no generator state, so batch mates and engine history cannot matter.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, splitmix64's increment


@dataclass(frozen=True, slots=True)
class SamplingParams:
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    max_tokens: int = 1024

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 is off), got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed from, for example, (run seed, step, problem, sample)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:  # (B,), (B,) int64 -> (B,) in [0, 1)
    """splitmix64 of seed and position; int64 multiplication wraps as uint64's does."""
    x = seeds + GOLDEN * (positions + 1)
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x = x ^ _shift(x, 31)
    return _shift(x, 11).double() * 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample(
    logits: Tensor,  # (B, V)
    u: Tensor,  # (B,) uniforms
    params: SamplingParams,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # (B,) tokens, (B,) logprobs, (B,) entropies
    """Log-probabilities are of the policy at the temperature, before top-k and top-p.

    Greedy reports them at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (params.temperature or 1.0), dim=-1)
    if params.temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        probs = logprobs.exp()
        if params.top_k or params.top_p < 1:
            probs = _truncate(probs, params.top_k, params.top_p)
        cdf = probs.double().cumsum(-1)
        # strictly above: a token of probability 0 is never drawn
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp_max(logits.shape[-1] - 1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1) if return_entropy else None
    return tokens, chosen, entropy


def _truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero everything outside the top k and outside the smallest set with mass >= top_p."""
    ordered, index = probs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0
    if top_p < 1:
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before < top_p * total, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(1, index, ordered)
