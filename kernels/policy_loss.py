"""The policy-gradient losses of GRPO and its relatives, from log-probabilities: value and gradient.

Per token, with d = ref - logp and the importance ratio r = exp(log_is):

    log_is    = logp - old                            (level "token")
              = mean of logp - old over the sequence  (level "sequence": GSPO, 2507.18071)
    clip      -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A), for A < 0 not above -dual_clip A
    cispo     -sg[clip(r)] A logp                     (2506.13585)
    sapo      -4 sigmoid(tau (r - 1)) / tau A         (2511.20347)
    k1, k2, k3 = -d, d^2 / 2, exp(d) - d - 1;  k3_unbiased = r k3   (DeepSeek-V3.2)
    loss_t    = importance keep policy_t + kl_coef kl_t

The whole loss is sum_t weight_t loss_t - sum_t entropy_weight_t H_t; the weights hold the
denominators (docs/grpo.md has a row for each loss type).

The maths stands once, in `_token_loss`: Triton compiles it, and the same source runs on PyTorch
tensors of any dtype. It reads 5 and writes 8 floats a token, next to 6 V D FLOP for the logits.
Shapes: T tokens of completions only, S sequences, which lie one after another.
"""

import math
import types
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton
from r1fast.kernels.loss_rows import (
    LossRows,
    check_finite,
    check_shape,
    prepare_rows,
    segment_sum,
    spread,
)
from r1fast.kernels.policy_loss_options import POLICY_OF, PolicyLossOptions


@triton.jit
def _token_loss(
    logp, log_is, ref, A,
    clip_low, clip_high, delta, dual_clip, tau_pos, tau_neg,
    POLICY: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """(policy, kl, their gradients in log_is and in logp, was r below clip_low, above clip_high)"""
    # exp(80) is far beyond every clip, and 0 * exp(80) is still 0
    log_is = tl.minimum(log_is, 80.0)
    r = tl.exp(log_is)
    zero = logp * 0.0
    low, high = r < clip_low, r > clip_high
    dpolicy_logp = zero
    if POLICY == "clip":
        clipped = tl.minimum(tl.maximum(r, clip_low), clip_high)
        first, second = tl.minimum(r, delta) * A, clipped * A
        slope = tl.where(first <= second, r <= delta, (r >= clip_low) & (r <= clip_high))
        policy = -tl.minimum(first, second)
        ceiling = tl.where(A < 0, -dual_clip * A, float("inf"))
        slope = slope & (policy <= ceiling)
        policy = tl.minimum(policy, ceiling)
        dpolicy = tl.where(slope, -r * A, zero)
    elif POLICY == "cispo":
        dpolicy_logp = -tl.minimum(tl.maximum(r, clip_low), clip_high) * A
        policy = dpolicy_logp * logp
        dpolicy = zero
    else:
        tau = tl.where(A > 0, tau_pos + zero, tau_neg + zero)
        gate = tl.sigmoid(tau * (r - 1))
        policy = -4 * gate / tau * A
        dpolicy = -4 * gate * (1 - gate) * r * A

    d = tl.minimum(ref - logp, 80.0)
    dkl = zero
    if KL == "k1":
        kl = -d
        dkl_logp = zero + 1
    elif KL == "k2":
        kl = 0.5 * d * d
        dkl_logp = -d
    else:
        # exp(d) - d - 1 cancels near 0; the series is exact to float64 there
        near = tl.where(tl.abs(d) < 0.25, d, zero)
        series = 1.0 / 362880 + near * (1.0 / 3628800 + near * (1.0 / 39916800))
        series = 1.0 / 720 + near * (1.0 / 5040 + near * (1.0 / 40320 + near * series))
        series = 0.5 + near * (1.0 / 6 + near * (1.0 / 24 + near * (1.0 / 120 + near * series)))
        far = tl.where(tl.abs(d) < 0.25, zero, d)
        kl = tl.where(tl.abs(d) < 0.25, near * near * series, tl.exp(far) - far - 1)
        dkl_logp = 1 - tl.exp(d)
        if KL == "k3_unbiased":
            kl = kl * r
            dkl = kl
            dkl_logp = dkl_logp * r
    return policy, kl, dpolicy, dpolicy_logp, dkl, dkl_logp, low, high


class _OnTensors:
    """What `_token_loss` uses of triton.language, on PyTorch tensors and numbers."""

    exp, abs, sigmoid, where = torch.exp, torch.abs, torch.sigmoid, torch.where

    @staticmethod
    def minimum(x: Tensor, y: Tensor | float) -> Tensor:
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)

    @staticmethod
    def maximum(x: Tensor, y: float) -> Tensor:
        return x.clamp(min=y)


_token_loss_ref = types.FunctionType(
    _token_loss.fn.__code__, {**_token_loss.fn.__globals__, "tl": _OnTensors}
)


@triton.jit
def _token_loss_kernel(
    logp_ptr, log_is_ptr, ref_ptr, A_ptr,
    policy_ptr, kl_ptr, dpolicy_ptr, dpolicy_logp_ptr, dkl_ptr, dkl_logp_ptr, low_ptr, high_ptr,
    T, clip_low, clip_high, delta, dual_clip, tau_pos, tau_neg,
    POLICY: tl.constexpr, KL: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = t < T
    logp = tl.load(logp_ptr + t, mask=ok, other=0.0)
    log_is = tl.load(log_is_ptr + t, mask=ok, other=0.0)
    ref = tl.load(ref_ptr + t, mask=ok, other=0.0)
    A = tl.load(A_ptr + t, mask=ok, other=0.0)
    policy, kl, dpolicy, dpolicy_logp, dkl, dkl_logp, low, high = _token_loss(
        logp, log_is, ref, A,
        clip_low, clip_high, delta, dual_clip, tau_pos, tau_neg, POLICY, KL,
    )  # fmt: skip
    tl.store(policy_ptr + t, policy, mask=ok)
    tl.store(kl_ptr + t, kl, mask=ok)
    tl.store(dpolicy_ptr + t, dpolicy, mask=ok)
    tl.store(dpolicy_logp_ptr + t, dpolicy_logp, mask=ok)
    tl.store(dkl_ptr + t, dkl, mask=ok)
    tl.store(dkl_logp_ptr + t, dkl_logp, mask=ok)
    tl.store(low_ptr + t, low, mask=ok)
    tl.store(high_ptr + t, high, mask=ok)


def token_loss(
    logprobs: Tensor,  # (T,)
    log_is: Tensor,  # (T,)
    ref_logprobs: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    options: PolicyLossOptions,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:  # 8 of (T,): see _token_loss
    """`_token_loss` on whole tensors; differentiable on PyTorch only."""
    clip_low, clip_high = 1 - options.clip_eps_low, 1 + options.clip_eps_high
    if options.loss_type == "cispo" and options.cispo_clip == "absolute":
        clip_low, clip_high = -math.inf, options.clip_eps_high
    numbers = (
        clip_low, clip_high,
        math.inf if options.delta is None else options.delta,
        1e30 if options.dual_clip is None else options.dual_clip,  # 0 * inf would be NaN
        options.sapo_temperature_pos, options.sapo_temperature_neg,
    )  # fmt: skip
    names = (POLICY_OF[options.loss_type], options.kl_estimator)
    tensors = (logprobs, log_is, ref_logprobs, advantages)
    if not use_triton(logprobs, backend):
        return _token_loss_ref(*tensors, *numbers, *names)
    T, BLOCK_T = logprobs.numel(), 512
    floats = [torch.empty_like(logprobs) for _ in range(6)]
    flags = [torch.empty_like(logprobs, dtype=torch.int8) for _ in range(2)]
    grid = (max(1, triton.cdiv(T, BLOCK_T)),)
    with torch.cuda.device_of(logprobs):
        _token_loss_kernel[grid](
            *(x.contiguous() for x in tensors), *floats, *flags, T, *numbers, *names,
            BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return (*floats, *(f != 0 for f in flags))


def kl_of(old: Tensor, ref: Tensor, estimator: str) -> Tensor:  # (T,)
    """The k1, k2 or k3 estimate of KL(old | ref) at each token."""
    zero = torch.zeros_like(old)
    return _token_loss_ref(old, zero, ref, zero, *[1.0] * 6, "clip", estimator)[1]


def rollout_weights(
    gap: Tensor,  # (T,) old - rollout log-probability
    options: PolicyLossOptions,
    lengths: Tensor | None,  # (S,)
) -> tuple[Tensor, Tensor]:  # (T,), (T,) bool
    """The factor, and where a bound has changed it, that corrects for a rollout engine whose probabilities differ from the trainer's.

    Over tokens, sequences (product) or their geometric mean: `truncate` clamps the ratio to
    [rollout_clip_min, rollout_clip_max], `mask` sets what is outside to 0 (TIS, IcePop: 2510.18855).
    """
    level, _, how = options.rollout_correction.partition("_")
    if level != "token":
        total = segment_sum(gap, lengths)
        if level == "geometric":
            total = total / lengths.clamp(min=1)
        gap = spread(total, lengths, len(gap))
    ratio = torch.exp(gap.clamp(max=80.0))
    low = -math.inf if options.rollout_clip_min is None else options.rollout_clip_min
    high = math.inf if options.rollout_clip_max is None else options.rollout_clip_max
    outside = (ratio < low) | (ratio > high)
    return ratio.clamp(low, high) if how == "truncate" else ratio.masked_fill(outside, 0.0), outside


@dataclass
class LossTerms:
    loss: Tensor  # ()
    dlogprobs: Tensor  # (T,)
    dentropy: Tensor | None  # (T,)
    metrics: dict[str, Tensor]  # sums over tokens


def loss_terms(
    logprobs: Tensor,  # (T,)
    entropy: Tensor | None,  # (T,)
    rows: LossRows,
    options: PolicyLossOptions,
    backend: Backend = "auto",
) -> LossTerms:
    """Loss of these rows, its gradient in log-probabilities and entropies, and metric sums.

    The gradient is analytic; on PyTorch the loss is differentiable too, which tests compare.
    """
    T, lengths = len(logprobs), rows.lengths
    if rows.policy_logprobs is not None:  # x - x is 0: that value, with the gradient of this graph
        logprobs = rows.policy_logprobs + (logprobs - logprobs.detach())
    old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
    ref = logprobs.detach() if rows.ref_logprobs is None else rows.ref_logprobs
    A, scale = rows.advantages, rows.importance
    if scale is None:
        scale = torch.ones_like(logprobs)
    if options.kl_in_reward:
        total = segment_sum(kl_of(old, ref, options.kl_estimator), lengths)
        A = A - options.kl_coef * spread(total, lengths, T)
    if options.rollout_correction is not None:
        factor, outside = rollout_weights(old - rows.rollout_logprobs, options, lengths)
        scale = scale * factor
    if options.off_policy_mask_threshold is not None:
        sampled = old if rows.rollout_logprobs is None else rows.rollout_logprobs
        drift = segment_sum(sampled - logprobs.detach(), lengths) / lengths.clamp(min=1)
        near = spread(drift <= options.off_policy_mask_threshold, lengths, T)
        scale = scale * ((A >= 0) | near)
    entropy_weights = rows.entropy_weights
    if options.top_entropy_quantile < 1:
        floor = quantile(entropy.detach(), 1 - options.top_entropy_quantile)
        floor = floor - 8 * torch.finfo(floor.dtype).eps * floor.abs()  # rounding splits no ties
        keep = (entropy.detach() >= floor).to(logprobs.dtype)
        scale = scale * keep
        if entropy_weights is not None:  # stays a mean over the tokens that learn
            entropy_weights = entropy_weights * keep * (T / keep.sum())

    log_is = logprobs - old
    if options.importance_sampling_level == "sequence":
        log_is = spread(segment_sum(log_is, lengths) / lengths.clamp(min=1), lengths, T)
    policy, kl, dpolicy, dpolicy_logp, dkl, dkl_logp, low, high = token_loss(
        logprobs, log_is, ref, A, options, backend
    )
    if options.loss_type == "cispo" and logprobs.requires_grad:
        policy = dpolicy_logp.detach() * logprobs  # the ratio is a constant
    beta = options.kl_coef if options.kl_in_loss else 0.0
    w = rows.weights
    per_token, by_ratio, by_logp = scale * policy, scale * dpolicy, scale * dpolicy_logp
    if beta:  # else the KL may overflow: 0 * inf is not 0
        per_token, by_ratio = per_token + beta * kl, by_ratio + beta * dkl
        by_logp = by_logp + beta * dkl_logp
    loss = (w * per_token).sum()
    through_ratio = w * by_ratio
    if options.importance_sampling_level == "sequence":
        mean = segment_sum(through_ratio.detach(), lengths) / lengths.clamp(min=1)
        through_ratio = spread(mean, lengths, T)
    dlogprobs = through_ratio + w * by_logp
    dentropy = None
    if entropy_weights is not None:
        loss = loss - (entropy_weights * entropy).sum()
        dentropy = -entropy_weights

    clipped_low, clipped_high = low & (A < 0), high & (A > 0)
    metrics = {
        "clip_ratio/low_mean": clipped_low.sum(),
        "clip_ratio/high_mean": clipped_high.sum(),
        "clip_ratio/region_mean": (clipped_low | clipped_high).sum(),
        "ratio": log_is.detach().clamp(max=80.0).exp().sum(),
    }
    if rows.ref_logprobs is not None:
        metrics["kl"] = kl.detach().sum()
    if options.rollout_correction is not None:
        metrics["rollout_correction/weight"] = factor.sum()
        metrics["rollout_correction/bounded"] = outside.sum()
    if entropy is not None:
        metrics["entropy"] = entropy.detach().sum()
    return LossTerms(loss, dlogprobs.detach(), dentropy, metrics)


def quantile(x: Tensor, q: float) -> Tensor:
    """Linear interpolation between order statistics; torch.quantile stops at 16 million."""
    x = x.sort().values
    at = q * (len(x) - 1)
    below = math.floor(at)
    return torch.lerp(x[below], x[min(below + 1, len(x) - 1)], at - below)


class PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, rows, options, backend, report):
        terms = loss_terms(logprobs, entropy, rows, options, backend)
        ctx.save_for_backward(terms.dlogprobs, terms.dentropy)
        report.update(terms.metrics)
        return terms.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dlogprobs, dentropy = ctx.saved_tensors
        return dloss * dlogprobs, None if dentropy is None else dloss * dentropy, *[None] * 4


def policy_loss(
    logprobs: Tensor,  # (T,)
    advantages: Tensor,  # (S,) with cu_seqlens, or (T,)
    completion_mask: Tensor | None,  # (T,) bool
    options: PolicyLossOptions,
    *,
    entropy: Tensor | None = None,  # (T,), where the options need it
    backend: Backend = "auto",
    **batch,
) -> tuple[Tensor, dict[str, Tensor]]:  # (), metrics: means over tokens, detached
    """The loss of `fused_grpo_loss` for log-probabilities that are already there.

    `batch` is what `loss_rows.prepare_rows` takes: cu_seqlens, old_logprobs, ref_logprobs,
    rollout_logprobs, policy_logprobs, importance_weights, token_weights, normaliser, num_sequences,
    num_tokens, max_completion_tokens. Differentiable in logprobs and entropy. Masked entries are never read.

    Raises ValueError as `fused_grpo_loss` does.
    """
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must be (T,), got {tuple(logprobs.shape)}")
    if options.needs_entropy and entropy is None:
        raise ValueError("entropy_coef and top_entropy_quantile need entropy (T,)")
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprobs must be float32 or float64, got {logprobs.dtype}")
    index, rows = prepare_rows(
        options, len(logprobs), advantages, completion_mask, dtype=logprobs.dtype, **batch
    )
    for name, x in (("logprobs", logprobs), ("entropy", entropy)):
        if x is not None:
            check_shape(name, x, len(logprobs))
            check_finite(name, x[index], index)
    report: dict[str, Tensor] = {}
    loss = PolicyLossFunction.apply(
        logprobs[index], None if entropy is None else entropy[index], rows, options, backend, report
    )
    report = {name: total / max(len(index), 1) for name, total in report.items()}
    report["num_tokens"] = torch.tensor(len(index), device=logprobs.device)
    return loss, report
