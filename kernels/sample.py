"""Draws a token from each row of logits, with its log-probability, in one pass over the vocabulary.

    p = softmax(logits / temperature)            the policy: what the trainer's old_logprobs are of
    r = softmax(adjusted / temperature), cut     what is sampled from

`adjusted` are the logits after repetition penalties, biases and bans (`Adjustments`). The cut keeps, in this order,
the top_k largest, then the smallest set of largest whose mass reaches top_p of what top_k left, then those of at least
min_p times the largest; of equal probabilities the lower id goes first. A token is the inverse CDF of r at one
uniform number u: the lowest id whose cumulative mass is above u. Temperature 0 is greedy: the lowest id of the largest
adjusted logit, with log-probabilities at temperature 1 and no cut.

Bytes: the (B, V) logits are read once. Rows are independent of each other, bit for bit.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton


@dataclass
class Adjustments:
    """Changes to single logits before sampling: x becomes x / penalty, or x * penalty where it is negative, + bias.

    Entries of a row are row_starts[b] to row_starts[b + 1]. First all penalties, then all biases; a bias
    of -inf bans a token. A token's penalty is given once a row; biases of a token add up.
    """

    row_starts: Tensor  # (B + 1,) int64, from 0 to M
    ids: Tensor  # (M,) int64
    penalty: Tensor  # (M,) float32, 1: none
    bias: Tensor  # (M,) float32, 0: none


class Sampled(NamedTuple):
    tokens: Tensor  # (B,) int64; 0 in a bad row
    logprobs: Tensor  # (B,) float32, log p of the tokens; NaN in a bad row
    truncated_logprobs: Tensor  # (B,) float32, log r
    is_bad: Tensor  # (B,) bool: a NaN, a +inf, or no finite logit
    entropies: Tensor | None  # (B,) float32, of p
    top_ids: Tensor | None  # (B, num_top) int64, the largest p first, of equal ones the lower id
    top_logprobs: Tensor | None  # (B, num_top) float32, log p


def adjust_logits_(logits: Tensor, adjustments: Adjustments) -> None:  # (B, V)
    """Applies the adjustments in place."""
    counts = adjustments.row_starts.diff()
    rows = torch.arange(len(counts), device=logits.device).repeat_interleave(counts)
    chosen = logits[rows, adjustments.ids].float()
    penalty = adjustments.penalty
    punished = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    is_punished = penalty != 1
    at = (rows[is_punished], adjustments.ids[is_punished])
    logits.index_put_(at, punished[is_punished].to(logits.dtype))
    logits.index_put_((rows, adjustments.ids), adjustments.bias.to(logits.dtype), accumulate=True)


def sample_ref(
    logits: Tensor,  # (B, V)
    u: Tensor,  # (B,) float64 in [0, 1)
    *,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
    adjustments: Adjustments | None = None,
    return_entropy: bool = False,
    num_top: int = 0,
    given: Tensor | None = None,
    backend: str = "torch",
) -> Sampled:
    """What `sample` computes, in plain PyTorch, with a full sort."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    B, V = logits.shape
    temperature, top_k, top_p, min_p = (
        torch.as_tensor(x, device=logits.device).expand(B)
        for x in (temperature, top_k, top_p, min_p)
    )
    greedy = temperature == 0
    divisor = torch.where(greedy, 1, temperature).to(dtype)[:, None]
    policy = torch.log_softmax(logits.to(dtype) / divisor, -1)
    adjusted = logits.to(dtype, copy=True)
    if adjustments is not None:
        adjust_logits_(adjusted, adjustments)
    is_bad = _is_bad(logits) | _is_bad(adjusted)
    sampled = torch.log_softmax(adjusted / divisor, -1)
    probs = _truncate(adjusted, sampled.exp(), greedy, top_k, top_p, min_p)
    cdf = probs.double().cumsum(-1)
    # strictly above: a token of probability 0 is never drawn
    tokens = torch.searchsorted(cdf, (u.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    last = V - 1 - (probs > 0).to(torch.int8).flip(-1).argmax(-1)
    tokens = torch.where(greedy, adjusted.argmax(-1), tokens.minimum(last))
    tokens = (tokens if given is None else given).masked_fill(is_bad, 0)
    chosen = tokens[:, None]
    truncated = sampled.gather(1, chosen)[:, 0] - cdf[:, -1].log().to(dtype)
    entropy = -torch.where(policy > -torch.inf, policy.exp() * policy, 0).sum(-1)
    order = policy.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    nan = torch.nan
    return Sampled(
        tokens,
        policy.gather(1, chosen)[:, 0].masked_fill(is_bad, nan),
        truncated.masked_fill(is_bad, nan),
        is_bad,
        entropy.masked_fill(is_bad, nan) if return_entropy else None,
        order.masked_fill(is_bad[:, None], 0) if num_top else None,
        policy.gather(1, order).masked_fill(is_bad[:, None], nan) if num_top else None,
    )


def _is_bad(logits: Tensor) -> Tensor:  # (B, V) -> (B,)
    return ~(logits < torch.inf).all(-1) | ~logits.isfinite().any(-1)


def _truncate(
    logits: Tensor, probs: Tensor, off: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Zero what is cut of `probs` (B, V), in the order of `logits`; rows that are `off` stay."""
    index = logits.sort(dim=-1, descending=True, stable=True).indices
    ordered = probs.gather(1, index)
    rank = torch.arange(probs.shape[1], device=probs.device)
    kept = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    left = torch.where(kept, ordered, 0).double()
    before = left.cumsum(-1) - left
    kept &= (before < top_p.double()[:, None] * left.sum(-1, keepdim=True)) | (top_p[:, None] >= 1)
    kept &= ordered >= min_p.to(probs.dtype)[:, None] * ordered[:, :1]
    kept |= off[:, None]
    return torch.zeros_like(probs).scatter_(1, index, torch.where(kept, ordered, 0))


def sample_native(
    logits: Tensor,
    u: Tensor,
    temperature: Tensor,  # (B,) float32
    top_k: Tensor,  # (B,) int64
    top_p: Tensor,  # (B,) float32
    min_p: Tensor,  # (B,) float32
    adjustments: Adjustments | None,
    return_entropy: bool,
    num_top: int,
    given: Tensor | None = None,  # (B,) int64
    level: str = "auto",  # auto, baseline, avx2 or avx512
) -> Sampled:
    """csrc/sampling.hpp, on the CPU."""
    from r1fast import _C

    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64)
    logprobs, truncated, entropies = torch.empty(3, B)
    is_bad = torch.empty(B, dtype=torch.bool)
    top_ids = torch.empty(B, num_top, dtype=torch.int64)
    top_logprobs = torch.empty(B, num_top)
    changes = (0, 0, 0, 0)
    if adjustments is not None:
        a = adjustments
        changes = tuple(x.data_ptr() for x in (a.row_starts, a.ids, a.penalty, a.bias))
    _C.sample(
        logits.data_ptr(), logits.stride(0), logits.dtype == torch.bfloat16, B, V, u.data_ptr(),
        temperature.data_ptr(), top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(),
        tokens.data_ptr(), logprobs.data_ptr(), truncated.data_ptr(), is_bad.data_ptr(),
        *changes, 0 if given is None else given.data_ptr(),
        entropies.data_ptr() if return_entropy else 0,
        num_top, top_ids.data_ptr(), top_logprobs.data_ptr(), level, torch.get_num_threads(),
    )  # fmt: skip
    return Sampled(
        tokens,
        logprobs,
        truncated,
        is_bad,
        entropies if return_entropy else None,
        top_ids if num_top else None,
        top_logprobs if num_top else None,
    )


def sample_triton(
    logits: Tensor,
    u: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    adjustments: Adjustments | None,
    return_entropy: bool,
    num_top: int,
    is_cut: bool,
    given: Tensor | None,
) -> Sampled:
    """triton_sample.py; what is cut is found by a sort, where anything may be cut."""
    from r1fast.kernels import triton_sample

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    greedy = temperature == 0
    inv_temperature = 1 / torch.where(greedy, 1.0, temperature).double()
    policy = sampled = triton_sample.sum_rows(logits, inv_temperature)
    adjusted = logits
    if adjustments is not None:
        adjusted = logits.float()
        adjusted = adjusted.clone() if adjusted is logits else adjusted
        adjust_logits_(adjusted, adjustments)
    if is_cut:
        probs = torch.softmax(adjusted.double() * inv_temperature[:, None], -1).float()
        kept = _truncate(adjusted, probs, greedy, top_k, top_p, min_p) > 0
        adjusted = adjusted.masked_fill(~(kept | greedy[:, None]), -torch.inf)
    if adjusted is not logits:
        sampled = triton_sample.sum_rows(adjusted, inv_temperature)
    tokens = given
    if tokens is None:
        tokens = triton_sample.draw(adjusted, u, temperature, inv_temperature, sampled)
    is_bad = policy.is_bad | sampled.is_bad

    def logprob(x: Tensor, sums, ids: Tensor) -> Tensor:  # (B, n) -> (B, n)
        z = (x.gather(1, ids).double() - sums.max[:, None]) * inv_temperature[:, None]
        return (z - sums.s.log()[:, None]).float().masked_fill(is_bad[:, None], torch.nan)

    tokens = tokens.masked_fill(is_bad, 0)
    entropies = (policy.s.log() - policy.sz / policy.s).float().masked_fill(is_bad, torch.nan)
    top_ids = None
    if num_top:
        top_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return Sampled(
        tokens,
        logprob(logits, policy, tokens[:, None])[:, 0],
        logprob(adjusted, sampled, tokens[:, None])[:, 0],
        is_bad,
        entropies if return_entropy else None,
        top_ids.masked_fill(is_bad[:, None], 0) if num_top else None,
        logprob(logits, policy, top_ids) if num_top else None,
    )


def sample(
    logits: Tensor,  # (B, V) float32 or bfloat16
    u: Tensor,  # (B,) float64 uniforms in [0, 1)
    *,
    temperature: Tensor | float = 1.0,  # each: one value, or (B,)
    top_k: Tensor | int = 0,  # 0: off
    top_p: Tensor | float = 1.0,  # 1: off
    min_p: Tensor | float = 0.0,  # 0: off
    adjustments: Adjustments | None = None,
    return_entropy: bool = False,
    num_top: int = 0,
    given: Tensor | None = None,  # (B,) int64 tokens to take instead of drawing some; without a cut
    backend: Backend = "auto",
) -> Sampled:
    """One token a row; `logits` stay as they are.

    Raises ValueError for a parameter out of its range; the ids of `adjustments` and `given` are checked too.
    """
    B, V = logits.shape
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    assert u.shape == (B,), (u.shape, B)
    if not 0 <= num_top <= V:
        raise ValueError(f"num_top must be from 0 to the vocabulary's {V}, got {num_top}")
    # a tensor on a GPU may cut
    is_cut = any(torch.is_tensor(x) or x != off for x, off in ((top_k, 0), (top_p, 1), (min_p, 0)))
    if given is not None:
        assert given.shape == (B,), (given.shape, B)
        assert not is_cut
        given = given.long().contiguous()
        if given.is_cpu and B and not bool(((given >= 0) & (given < V)).all()):
            raise ValueError(
                f"token ids must be in [0, {V}), got {int(given.min())}..{int(given.max())}"
            )
    temperature = _per_row("temperature", temperature, torch.float32, logits, 0, torch.inf)
    top_k = _per_row("top_k", top_k, torch.int64, logits, 0, 2**62)
    top_p = _per_row("top_p", top_p, torch.float32, logits, 0, 1)
    min_p = _per_row("min_p", min_p, torch.float32, logits, 0, 1)
    u = u.double().contiguous()
    if adjustments is not None:
        adjustments = _checked(adjustments, B, V)
    if use_native(logits, backend):
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        return sample_native(
            logits, u, temperature, top_k, top_p, min_p, adjustments, return_entropy, num_top, given
        )
    if use_triton(logits, backend):
        return sample_triton(
            logits,
            u,
            temperature,
            top_k,
            top_p,
            min_p,
            adjustments,
            return_entropy,
            num_top,
            is_cut,
            given,
        )
    return sample_ref(
        logits, u, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        adjustments=adjustments, return_entropy=return_entropy, num_top=num_top, given=given,
    )  # fmt: skip


def token_logprobs(
    logits: Tensor,  # (B, V) float32 or bfloat16
    token_ids: Tensor,  # (B,) int64
    *,
    temperature: Tensor | float = 1.0,  # 0: as `sample` has it, log-probabilities at 1
    backend: Backend = "auto",
) -> Tensor:  # (B,) float32, log p; NaN in a bad row
    """The log-probabilities that `sample` gives where it draws these tokens, to the bit.

    Raises ValueError for a temperature below 0 or, on the CPU, a token outside the vocabulary.
    """
    u = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    return sample(logits, u, temperature=temperature, given=token_ids, backend=backend).logprobs


def use_native(x: Tensor, backend: Backend) -> bool:
    return x.is_cpu and backend in ("auto", "native", "fast")


def _per_row(name: str, value, dtype: torch.dtype, logits: Tensor, low, high) -> Tensor:
    """(B,), within [low, high]. A tensor on a GPU is not looked at: that would wait for it."""
    if not torch.is_tensor(value):
        is_ok = low <= value <= high
        x = torch.full((len(logits),), value if is_ok else low, dtype=dtype, device=logits.device)
    else:
        x = value.to(logits.device, dtype).expand(len(logits)).contiguous()
        is_ok = not x.is_cpu or bool(((x >= low) & (x <= high)).all())
    if not is_ok:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return x


def _checked(a: Adjustments, num_rows: int, vocab_size: int) -> Adjustments:
    M = len(a.ids)
    assert a.row_starts.shape == (num_rows + 1,), (a.row_starts.shape, num_rows)
    assert a.penalty.shape == a.bias.shape == (M,), (a.penalty.shape, a.bias.shape, M)
    if a.ids.is_cpu and M and not bool(((a.ids >= 0) & (a.ids < vocab_size)).all()):
        raise ValueError(f"adjusted ids must be in [0, {vocab_size}), got {a.ids.tolist()}")
    return Adjustments(
        a.row_starts.long().contiguous(),
        a.ids.long().contiguous(),
        a.penalty.float().contiguous(),
        a.bias.float().contiguous(),
    )
