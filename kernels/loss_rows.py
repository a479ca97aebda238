"""What a policy loss needs of each completion token: advantage, weight, old and reference log-prob.

Here a batch with masks and sequences becomes plain rows of completion tokens, checked; the weights
hold the denominators of the loss types:

    grpo, gspo, sapo   1 / (tokens of the sequence * num_sequences)
    dapo, cispo        1 / num_tokens
    bnpo               1 / completion tokens of this call
    dr_grpo            1 / (num_sequences * max_completion_tokens)
    luspo              1 / num_sequences
Shapes: T packed tokens, N completion tokens, S sequences.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from r1fast.kernels.policy_loss_options import PolicyLossOptions


class NonFiniteError(ValueError):
    """A number that should be finite is not: an overflow upstream, not a mistake in the call."""


SEQUENCE_MEANS = ("grpo", "gspo", "sapo")


@dataclass(frozen=True)
class LossRows:
    """Of each completion token. Shapes (N,)."""

    advantages: Tensor
    weights: Tensor
    entropy_weights: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    importance: Tensor | None  # constant factors of the policy term
    lengths: Tensor | None  # (S,) int64, where the sequences are known
    policy_logprobs: Tensor | None = None  # that stand in the loss for the ones computed beside it

    def rows(self, part: slice | Tensor, lengths: Tensor | None = None) -> "LossRows":
        """The rows `part`; where the loss looks at sequences they are whole, of `lengths` tokens."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lengths"}
        picked = {k: x if x is None else x[part] for k, x in tensors.items()}
        return replace(self, **picked, lengths=lengths)


def segment_sum(x: Tensor, lengths: Tensor) -> Tensor:  # (N,), (S,) -> (S,)
    """Summed in float64: a sequence may have 100,000 tokens."""
    return torch.segment_reduce(x.double(), "sum", lengths=lengths, unsafe=True).to(x.dtype)


def spread(x: Tensor, lengths: Tensor, N: int) -> Tensor:  # (S,), (S,) -> (N,)
    return torch.repeat_interleave(x, lengths, output_size=N)


def divisor_of(
    loss_type: str, *, num_sequences: int, num_tokens: int, max_completion_tokens: int | None
) -> float:
    """What the sum over sequences (of means or sums) or over tokens is divided by."""
    if loss_type in ("dapo", "cispo", "bnpo"):
        return num_tokens
    return num_sequences * (max_completion_tokens if loss_type == "dr_grpo" else 1)


def prepare_rows(
    options: PolicyLossOptions,
    T: int,
    advantages: Tensor,  # (S,) or (T,)
    completion_mask: Tensor | None,  # (T,) bool
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    old_logprobs: Tensor | None = None,  # (T,), and so the next six
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    policy_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    normaliser: float | None = None,
    num_sequences: int | None = None,
    num_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, LossRows]:
    """(indices of the completion tokens (N,), their rows). Raises ValueError for what does not fit."""
    _check_tensors(None, advantages=advantages)
    device = advantages.device
    _check_tensors(
        device, completion_mask=completion_mask, cu_seqlens=cu_seqlens, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, policy_logprobs=policy_logprobs,
        importance_weights=importance_weights, token_weights=token_weights,
    )  # fmt: skip
    check_mask(completion_mask, T)
    if completion_mask is None:
        index = torch.arange(T, device=device)
    else:
        index = completion_mask.nonzero()[:, 0]
    N = len(index)
    if not N:
        raise ValueError(
            f"the mask is empty: no completion token among {T} rows; skip this micro-batch"
        )
    lengths = None
    if cu_seqlens is not None:
        lengths = _completion_lengths(cu_seqlens, completion_mask, T, device)
    S = None if lengths is None else len(lengths)
    if S == T and advantages.shape == (T,) and not bool((cu_seqlens.diff() == 1).all()):
        raise ValueError(
            f"there are as many sequences as rows ({T}), some empty: advantages could be of either; "
            "leave the empty sequences out of cu_seqlens"
        )
    if advantages.shape == (T,) and S != T:
        advantages = advantages[index]
    elif S is not None and advantages.shape == (S,):
        advantages = spread(advantages, lengths, N)
    else:
        expected = f"(T,) = ({T},)" + ("" if S is None else f" or (S,) = ({S},)")
        hint = "; one per sequence needs cu_seqlens" if S is None else ""
        raise ValueError(f"advantages must be {expected}, got {tuple(advantages.shape)}{hint}")

    if lengths is None and (
        options.looks_at_sequences
        or (options.loss_type in SEQUENCE_MEANS and token_weights is None)
    ):
        raise ValueError(
            f"loss_type {options.loss_type!r} with these options looks at whole sequences: "
            f"give cu_seqlens (for one sequence: [0, {T}])"
        )
    if options.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {options.kl_coef} needs ref_logprobs (T,)")
    if options.rollout_correction and rollout_logprobs is None:
        raise ValueError(
            f"rollout_correction = {options.rollout_correction!r} needs rollout_logprobs (T,)"
        )

    def picked(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        check_shape(name, x, T)
        return x.detach()[index].to(dtype)

    rows = LossRows(
        advantages=advantages.detach().to(dtype),
        weights=_weights(
            options, N, lengths, picked("token_weights", token_weights), normaliser,
            num_sequences, num_tokens, max_completion_tokens, dtype, device,
        ),
        entropy_weights=None,
        old_logprobs=picked("old_logprobs", old_logprobs),
        ref_logprobs=picked("ref_logprobs", ref_logprobs),
        rollout_logprobs=picked("rollout_logprobs", rollout_logprobs),
        importance=picked("importance_weights", importance_weights),
        lengths=lengths,
        policy_logprobs=picked("policy_logprobs", policy_logprobs),
    )  # fmt: skip
    for f in fields(rows):
        x = getattr(rows, f.name)
        if x is not None and f.name != "lengths":
            check_finite(f.name, x, index)
    if options.entropy_coef:
        share = options.entropy_coef / (N if num_tokens is None else num_tokens)
        rows = replace(rows, entropy_weights=torch.full_like(rows.weights, share))
    return index, rows


def check_mask(completion_mask: Tensor | None, T: int) -> None:
    if completion_mask is None:
        return
    check_tensors(completion_mask=completion_mask)
    check_shape("completion_mask", completion_mask, T)
    if completion_mask.dtype != torch.bool:
        raise ValueError(f"completion_mask must be bool, got {completion_mask.dtype}")


def drop_dead_rows(
    index: Tensor, rows: LossRows, options: PolicyLossOptions
) -> tuple[Tensor, LossRows]:
    """Without the tokens whose gradient is known to be 0 before any log-probability is."""
    if not options.learns_by_advantage_alone:
        return index, rows
    live = (rows.advantages != 0) & (rows.weights != 0)
    if rows.importance is not None:
        live &= rows.importance != 0
    lengths = rows.lengths
    if lengths is not None:
        counts = segment_sum(live.float(), lengths).long()
        if options.looks_at_sequences:  # its live tokens need the dead ones
            live, lengths = spread(counts > 0, lengths, len(live)), lengths * (counts > 0)
        else:
            lengths = counts
    if bool(live.all()):
        return index, rows
    kept = live.nonzero()[:, 0]
    return index[kept], rows.rows(kept, lengths)


def _completion_lengths(cu_seqlens, mask, T, device) -> Tensor:  # (S,)
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
    cu = cu_seqlens.to(device=device, dtype=torch.int64)
    sizes = cu.diff() if cu.dim() == 1 else cu
    if cu.dim() != 1 or len(cu) < 2 or cu[0] != 0 or cu[-1] != T or bool((sizes < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of rows, {T}; got shape "
            f"{tuple(cu_seqlens.shape)}, {cu_seqlens.flatten()[:8].tolist()}"
        )
    if mask is None:
        return sizes
    before = torch.cat([cu.new_zeros(1), mask.cumsum(0)])
    return before[cu].diff()


def _weights(
    options, N, lengths, token_weights, normaliser,
    num_sequences, num_tokens, max_completion_tokens, dtype, device,
) -> Tensor:  # (N,)  # fmt: skip
    for name, value in (
        ("normaliser", normaliser),
        ("num_sequences", num_sequences),
        ("num_tokens", num_tokens),
        ("max_completion_tokens", max_completion_tokens),
    ):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {value}")
    if token_weights is not None:
        return token_weights / (1.0 if normaliser is None else normaliser)
    kind, divisor = options.loss_type, normaliser
    weights = torch.ones(N, dtype=dtype, device=device)
    if kind in SEQUENCE_MEANS:
        weights = spread(1.0 / lengths.clamp(min=1).to(dtype), lengths, N)
    if divisor is None:
        if num_sequences is None and lengths is None and kind not in ("dapo", "cispo", "bnpo"):
            raise ValueError(f"loss_type {kind!r} needs cu_seqlens or num_sequences")
        if kind == "dr_grpo" and max_completion_tokens is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_tokens")
        divisor = divisor_of(
            kind,
            num_sequences=num_sequences or (0 if lengths is None else len(lengths)),
            num_tokens=N if num_tokens is None or kind == "bnpo" else num_tokens,
            max_completion_tokens=max_completion_tokens,
        )
    return weights / divisor


def check_tensors(*, optional: bool = False, **tensors: object) -> None:
    """ValueError for what is not a tensor, nor None where that is allowed."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (optional and x is None):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, T: int) -> None:
    if x.shape != (T,):
        raise ValueError(f"{name} must be (T,) = ({T},), got {tuple(x.shape)}")


def check_finite(name: str, x: Tensor, index: Tensor) -> None:  # (N,), (N,) their row numbers
    if not bool(x.isfinite().all()):
        n = int((~x.isfinite()).nonzero()[0])
        raise NonFiniteError(
            f"{name} is {x[n].item()} at row {int(index[n])}, which is not masked: mask rows "
            "that hold nothing, or look for where it comes from"
        )


def _check_tensors(device: torch.device | None, **tensors: Tensor | None) -> None:
    check_tensors(optional=True, **tensors)
    for name, x in tensors.items():
        if x is None:
            continue
        if x.is_complex():
            raise ValueError(f"{name} must be real, got {x.dtype}")
        if device is not None and x.device != device and name != "cu_seqlens":
            raise ValueError(
                f"{name} is on {x.device}, advantages are on {device}: move one of them"
            )
