"""The GRPO objective (DeepSeek-R1, equations 1 to 3; docs/grpo.md): weights, advantages, loss.

Every token's loss is multiplied by a weight that already holds the *global* denominator (all ranks,
all micro-batches of one optimizer step), and the sum is taken. So the gradient does not depend on
how a step is split.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1fast.config import GRPOConfig
from r1fast.kernels.advantages import group_advantages
from r1fast.kernels.grpo_loss import grpo_loss
from r1fast.types import PackedBatch, RolloutGroup


def token_weights(
    loss_type: str,
    lengths: Sequence[int],  # (S,) completion tokens of this rank's sequences
    *,
    num_sequences: int,  # over all ranks
    num_tokens: int,  # completion tokens over all ranks
    max_completion_tokens: int,
) -> list[float]:  # (S,)
    """One over the denominator of each sequence's tokens.

    grpo: mean over tokens, then over sequences. dapo: mean over all tokens. dr_grpo: sum over a
    constant, num_sequences * max_completion_tokens.
    """
    if loss_type == "grpo":
        return [1.0 / (num_sequences * n) for n in lengths]
    if loss_type == "dapo":
        return [1.0 / num_tokens] * len(lengths)
    if loss_type == "dr_grpo":
        return [1.0 / (num_sequences * max_completion_tokens)] * len(lengths)
    raise ValueError(f"loss_type must be grpo, dapo or dr_grpo, got {loss_type!r}")


def rollout_advantages(
    groups: list[RolloutGroup], config: GRPOConfig, batch_std: Tensor | None = None
) -> list[list[float]]:  # per group, per completion
    """Advantages of every group from its rewards, computed in float64."""
    if not groups:
        return []
    totals = [[r.total for r in g.rewards] for g in groups]
    if sizes := {len(t) for t in totals if len(t) != len(totals[0])}:
        raise ValueError(
            f"groups must have {len(totals[0])} rewards each, got one of {sizes.pop()}"
        )
    advantages = group_advantages(
        torch.tensor(totals, dtype=torch.float64),
        scale=config.scale_rewards,
        std=config.std,
        eps=config.std_eps,
        batch_std=batch_std,
    )
    return advantages.tolist()


def grpo_objective(
    logprobs: Tensor,  # (Tc,) of the completion tokens only, differentiable
    batch: PackedBatch,
    config: GRPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metric sums over tokens). The sums are detached; divide by `num_tokens`."""
    m = batch.completion_mask
    old, ref, A = batch.old_logprobs[m], batch.ref_logprobs[m], batch.advantages[m]
    per_token = grpo_loss(
        logprobs,
        old,
        ref if config.kl_coef else logprobs.detach(),
        A,
        torch.ones_like(A, dtype=torch.bool),
        clip_eps_low=config.clip_eps_low,
        clip_eps_high=config.clip_eps_high,
        kl_coef=config.kl_coef,
    )
    loss = (per_token * batch.token_weights[m]).sum()
    with torch.no_grad():
        ratio = torch.exp(logprobs - old)
        low = (ratio < 1 - config.clip_eps_low) & (A < 0)
        high = (ratio > 1 + config.clip_eps_high) & (A > 0)
        sums = {
            "num_tokens": m.sum(),
            "clip_ratio/low_mean": low.sum(),
            "clip_ratio/high_mean": high.sum(),
            "clip_ratio/region_mean": (low | high).sum(),
            "ratio": ratio.sum(),
        }
        if config.kl_coef:
            sums["kl"] = (torch.expm1(ref - logprobs) - (ref - logprobs)).sum()
    return loss, sums
