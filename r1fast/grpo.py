"""The GRPO objective (DeepSeek-R1, equations 1 to 3; docs/grpo.md): weights, advantages, loss.

Every token's loss is multiplied by a weight that already holds the *global* denominator (all ranks,
all micro-batches of one optimizer step), and the sum is taken. So the gradient does not depend on
how a step is split.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from math import isfinite

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1fast.config import GRPOConfig
from r1fast.kernels.advantages import group_advantages, has_signal
from r1fast.kernels.fused_grpo_loss import fused_grpo_loss
from r1fast.kernels.loss_rows import SEQUENCE_MEANS, divisor_of
from r1fast.kernels.policy_loss import policy_loss
from r1fast.kernels.policy_loss_options import LOSS_TYPES, PolicyLossOptions
from r1fast.types import VERDICTS, PackedBatch, RolloutGroup

NAMES = {f.name for f in fields(GRPOConfig)}


def token_weights(
    loss_type: str,
    lengths: Sequence[int],  # (S,) completion tokens of this rank's sequences
    *,
    num_sequences: int,  # over all ranks
    num_tokens: int,  # completion tokens over all ranks
    max_completion_tokens: int,
) -> list[float]:  # (S,)
    """One over the denominator of each sequence's tokens.

    grpo, gspo, sapo: mean over tokens, then over sequences. dapo, cispo: mean over all tokens.
    dr_grpo: sum over a constant, num_sequences * max_completion_tokens. luspo: sum over sequences.
    """
    known = [name for name in LOSS_TYPES if name != "bnpo"]  # whose mean depends on the packing
    if loss_type not in known:
        raise ValueError(f"loss_type must be one of {', '.join(known)}, got {loss_type!r}")
    divisor = divisor_of(
        loss_type,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        max_completion_tokens=max_completion_tokens,
    )
    return [1.0 / (divisor * (n if loss_type in SEQUENCE_MEANS else 1)) for n in lengths]


def rollout_advantages(
    groups: list[RolloutGroup], config: GRPOConfig, batch_std: Tensor | None = None
) -> list[list[float]]:  # per group, per completion
    """Advantages of every group from its rewards, computed in float64.

    Exactly 0 in a group without signal: equal rewards, or equal verdicts and rewards that differ by
    float noise. Raises ValueError, with the problem, for a reward that is not finite or missing.
    """
    if not groups:
        return []
    for group in groups:
        _check_rewards(group)
    totals = [[r.total for r in g.rewards] for g in groups]
    for group, row in zip(groups, totals, strict=True):
        if len(row) != len(totals[0]):
            raise ValueError(
                f"groups must have {len(totals[0])} rewards each, got one of {len(row)}: problem "
                f"{group.problem.id!r}"
            )
    advantages = group_advantages(
        torch.tensor(totals, dtype=torch.float64),
        scale=config.scale_rewards,
        std=config.std,
        eps=config.std_eps,
        batch_std=batch_std,
        verdicts=torch.tensor([_verdict_codes(g) for g in groups]),
    )
    return advantages.tolist()


def groups_with_signal(groups: list[RolloutGroup]) -> list[bool]:
    """Of every group, whether its advantages are other than exactly 0, as `rollout_advantages` has it."""
    for group in groups:
        _check_rewards(group)
    return [
        bool(has_signal(
            torch.tensor([[r.total for r in group.rewards]], dtype=torch.float64),
            torch.tensor([_verdict_codes(group)]),
        ))
        for group in groups
    ]  # fmt: skip


def _check_rewards(group: RolloutGroup) -> None:
    if len(group.rewards) != len(group.completions):
        raise ValueError(
            f"problem {group.problem.id!r} has {len(group.rewards)} rewards for "
            f"{len(group.completions)} completions"
        )
    for i, reward in enumerate(group.rewards):
        if not isfinite(reward.total):
            parts = {n: v for n, v in reward.parts.items() if v is not None and not isfinite(v)}
            named = ", ".join(f"{name} is {value}" for name, value in parts.items())
            raise ValueError(
                f"problem {group.problem.id!r}, completion {i}: the reward is {reward.total}"
                + f" ({named})" * bool(named)
                + "; a reward function must return a finite number, or None where it does not apply"
            )


def _verdict_codes(group: RolloutGroup) -> list[int]:
    """A number for each kind of verdict; where nothing was verified, each is its own kind.

    A grader's failure earns the mean of the others, so it is of their kind.
    """
    verdicts = [reward.verdict for reward in group.rewards]
    others = next((v for v in verdicts if v != "error"), "error")
    kinds = [others if v == "error" else v for v in verdicts]
    return [-1 - i if kind is None else VERDICTS.index(kind) for i, kind in enumerate(kinds)]


def grpo_objective(
    hidden: Tensor,  # (N, D) what predicts each completion token
    head_weight: Tensor,  # (V, D)
    batch: PackedBatch,
    config: GRPOConfig,
    *,
    temperature: float,
    num_tokens: int,  # completion tokens of the optimizer step, over all ranks and micro-batches
    process_group: ProcessGroup | None = None,  # whose ranks have a slice of the vocabulary each
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one micro-batch: sums over its N completion tokens, and their logprobs.

    The metrics are detached; `logprobs` is (N,), of the completion tokens under `hidden`. The loss is
    taken at the batch's `policy_logprobs` where there are some.
    """
    loss, report = fused_grpo_loss(
        hidden,
        head_weight,
        batch.target_ids,
        batch.advantages,
        cu_seqlens=batch.cu_seqlens,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs if config.kl_coef else None,
        policy_logprobs=batch.policy_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        token_weights=batch.token_weights,
        num_tokens=num_tokens,
        temperature=temperature,
        want=("logprobs", "entropy"),
        process_group=process_group,
        **loss_options(config),
    )
    logprobs, entropy = report.pop("logprobs"), report.pop("entropy")
    num_tokens = report.pop("num_tokens")
    sums = {name: mean * report["num_evaluated"] for name, mean in report.items()}
    del sums["num_evaluated"]
    sums |= {"num_tokens": num_tokens, "entropy": entropy.sum()}
    return loss, sums | {"loss": loss.detach(), "logprobs": logprobs}


def token_coefficients(
    logprobs: Tensor,  # (N,) as `grpo_objective` returns them
    batch: PackedBatch,
    config: GRPOConfig,
) -> Tensor:  # (N,)
    """-d loss / d log-probability of every completion token: above 0 it is made likelier."""
    options = replace(PolicyLossOptions(**loss_options(config)), entropy_coef=0.0)
    logprobs = logprobs.detach().requires_grad_()
    loss, _ = policy_loss(
        logprobs,
        batch.advantages,
        None,
        options,
        cu_seqlens=batch.cu_seqlens,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs if config.kl_coef else None,
        policy_logprobs=batch.policy_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        token_weights=batch.token_weights,
    )
    return -torch.autograd.grad(loss, logprobs)[0]


def loss_options(config: GRPOConfig) -> dict[str, object]:
    """The config's part of PolicyLossOptions; 0 stands for None where a config has no None."""
    options = {
        f.name: getattr(config, f.name) for f in fields(PolicyLossOptions) if f.name in NAMES
    }
    for name in ("delta", "dual_clip", "off_policy_mask_threshold"):
        options[name] = options[name] or None
    if options["rollout_correction"] in ("auto", "none"):
        options["rollout_correction"] = None
    return options
