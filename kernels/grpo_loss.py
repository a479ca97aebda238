"""Per-token GRPO loss: clipped surrogate plus k3 KL to the reference policy, in one pass.

    r    = exp(logp - old)                              importance ratio
    s    = min(r * A, clip(r, 1 - eps_low, 1 + eps_high) * A)
    kl   = exp(ref - logp) - (ref - logp) - 1           k3 estimator, >= 0
    loss = -s + kl_coef * kl

    dloss/dlogp = -[r * A is the min] * A * r + kl_coef * (1 - exp(ref - logp))

Equation 2 of DeepSeekMath (2402.03300) and equation 1 of DeepSeek-R1 (2501.12948). The clip values
may be 1 or more (R1 uses 10): the lower bound then never binds.
Reads 5 and writes 2 floats a token, so it is memory-bound. Shapes: T = tokens in the packed batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton


def grpo_loss_ref(
    logprobs: Tensor,  # (T,)
    old_logprobs: Tensor,  # (T,)
    ref_logprobs: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    completion_mask: Tensor,  # (T,) bool
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float,
) -> Tensor:  # (T,)
    """What `grpo_loss` computes, in plain PyTorch."""
    # masked inputs may be anything, NaN included: replace them before the arithmetic
    logprobs, old_logprobs, ref_logprobs, advantages = (
        torch.where(completion_mask, x, 0.0)
        for x in (logprobs, old_logprobs, ref_logprobs, advantages)
    )
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    kl = torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)
    return torch.where(completion_mask, kl_coef * kl - surrogate, 0.0)


@triton.jit
def _grpo_loss_fwd_kernel(
    logprobs_ptr, old_ptr, ref_ptr, advantages_ptr, mask_ptr,
    loss_ptr, dlogprobs_ptr,
    T, clip_eps_low, clip_eps_high, kl_coef,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_bounds = t < T
    keep = tl.load(mask_ptr + t, mask=in_bounds, other=0) != 0
    logp = tl.load(logprobs_ptr + t, mask=keep, other=0.0)
    old = tl.load(old_ptr + t, mask=keep, other=0.0)
    ref = tl.load(ref_ptr + t, mask=keep, other=0.0)
    A = tl.load(advantages_ptr + t, mask=keep, other=0.0)

    ratio = tl.exp(logp - old)
    clipped = tl.minimum(tl.maximum(ratio, 1 - clip_eps_low), 1 + clip_eps_high)
    unclipped_is_min = ratio * A <= clipped * A
    surrogate = tl.where(unclipped_is_min, ratio * A, clipped * A)
    d = ref - logp
    # exp(d) - d - 1 cancels near 0; the series is exact to float32 there
    series = d * d * (0.5 + d * (1.0 / 6.0 + d * (1.0 / 24.0)))
    kl = tl.where(tl.abs(d) < 0.05, series, tl.exp(d) - d - 1)
    loss = kl_coef * kl - surrogate
    dlogp = kl_coef * (1 - tl.exp(d)) - tl.where(unclipped_is_min, ratio * A, 0.0)

    tl.store(loss_ptr + t, tl.where(keep, loss, 0.0), mask=in_bounds)
    tl.store(dlogprobs_ptr + t, tl.where(keep, dlogp, 0.0), mask=in_bounds)


def grpo_loss_fwd(
    logprobs, old_logprobs, ref_logprobs, advantages, completion_mask,
    clip_eps_low, clip_eps_high, kl_coef,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel. Returns the loss (T,) and its gradient in logprobs (T,)."""
    loss, dlogprobs = torch.empty_like(logprobs), torch.empty_like(logprobs)
    T, BLOCK_T = logprobs.numel(), 1024
    if T:
        _grpo_loss_fwd_kernel[(triton.cdiv(T, BLOCK_T),)](
            logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, loss, dlogprobs,
            T, clip_eps_low, clip_eps_high, kl_coef, BLOCK_T=BLOCK_T,
        )  # fmt: skip
    return loss, dlogprobs


class GRPOLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, *args):
        loss, dlogprobs = grpo_loss_fwd(logprobs, *args)
        ctx.save_for_backward(dlogprobs)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        (dlogprobs,) = ctx.saved_tensors
        return dloss * dlogprobs, *[None] * 7


def grpo_loss(
    logprobs: Tensor,  # (T,) float32
    old_logprobs: Tensor,  # (T,)
    ref_logprobs: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    completion_mask: Tensor,  # (T,) bool
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float,
    backend: Backend = "auto",
) -> Tensor:  # (T,), 0 where completion_mask is False
    """Per-token GRPO loss. Differentiable in `logprobs` only. Masked entries are never read.

    Raises ValueError where the shapes differ.
    """
    tensors = (logprobs, old_logprobs, ref_logprobs, advantages, completion_mask)
    if len({x.shape for x in tensors}) > 1 or logprobs.dim() != 1:
        raise ValueError(
            "logprobs, old_logprobs, ref_logprobs, advantages and completion_mask must all be "
            f"(T,), got {[tuple(x.shape) for x in tensors]}"
        )
    if use_triton(logprobs, backend):
        tensors = tuple(x.contiguous() for x in tensors)
        return GRPOLossFunction.apply(*tensors, clip_eps_low, clip_eps_high, kl_coef)
    return grpo_loss_ref(
        *tensors, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, kl_coef=kl_coef
    )
