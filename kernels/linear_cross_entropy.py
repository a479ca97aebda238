"""Cross-entropy of next tokens from hidden states, logits never kept: what SFT trains on.

The negative log-likelihood is a policy-gradient loss with advantage 1 and the ratio held at 1
(cispo on policy: -logp), so the machinery is fused_grpo_loss.py's: 3 GEMM passes, 6 T D V FLOP.
Shapes: T tokens, D model width, V vocabulary.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from r1fast.kernels.dispatch import Backend
from r1fast.kernels.fused_grpo_loss import FusedLossFunction
from r1fast.kernels.linear_logprobs import check_head_inputs, linear_logprobs, logits_ref
from r1fast.kernels.loss_rows import LossRows, check_finite, check_shape, check_tensors
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.kernels.vocab_head import gradients_needed


def linear_cross_entropy_ref(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch with the logits in memory."""
    return torch.nn.functional.cross_entropy(
        logits_ref(hidden, weight, bias, temperature, softcap), target_ids,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,) int64 in [0, V) or ignore_index
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_tokens: float | None = None,
    token_weights: Tensor | None = None,  # (T,) constants that multiply each token's loss
    return_entropy: bool = False,
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # () for mean and sum, (T,) for none; float32, nats
    """Negative log-likelihood of `target_ids`, differentiable in hidden, weight and bias.

    Rows of `ignore_index` are never read and get no gradient. "mean" divides by the number of the
    others, or by `num_tokens`; for "mean" and "sum" the gradient is made in the forward, and
    backward may be called once. With every row ignored a mean is NaN, as in
    torch.nn.functional.cross_entropy. `return_entropy` adds the entropies (T,), detached, 0 where
    ignored. The other arguments, and ValueError, as in `linear_logprobs`.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if num_tokens is not None and not num_tokens > 0:
        raise ValueError(f"num_tokens must be above 0, got {num_tokens}")
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f"num_tokens is what a mean divides by; reduction is {reduction!r}")
    check_tensors(target_ids=target_ids)
    check_tensors(optional=True, token_weights=token_weights)
    counts = target_ids != ignore_index
    if token_weights is not None:
        check_shape("token_weights", token_weights, len(target_ids))
        check_finite("token_weights", token_weights[counts], counts.nonzero()[:, 0])
    check_head_inputs(hidden, weight, target_ids, bias, temperature, softcap, process_group, counts)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    head_options = {
        "temperature": float(temperature),
        "softcap": softcap,
        "backend": backend,
        "workspace_bytes": workspace_bytes,
        "process_group": process_group,
    }
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0, got {workspace_bytes}")
    if reduction == "none":
        chosen, entropy = linear_logprobs(
            hidden[counts], weight, target_ids[counts],
            bias=bias, return_entropy=True, **head_options,
        )  # fmt: skip
        if token_weights is not None:
            chosen = chosen * token_weights[counts].to(wide)
        zeros = torch.zeros(len(target_ids), dtype=wide, device=hidden.device)
        nll = zeros.masked_scatter(counts, -chosen)
        return (nll, zeros.masked_scatter(counts, entropy.detach())) if return_entropy else nll
    index = counts.nonzero()[:, 0]
    divisor = 1.0
    if reduction == "mean":
        divisor = float(num_tokens or len(index) or math.nan)
    if len(index) < len(hidden):
        hidden, target_ids = hidden[index], target_ids[index]
    weights = torch.full((len(index),), 1 / divisor, dtype=wide, device=counts.device)
    if token_weights is not None:
        weights *= token_weights[index]
    report: dict[str, Tensor] = {}
    rows = LossRows(torch.ones_like(weights), weights, *[None] * 6)
    loss = FusedLossFunction.apply(
        hidden, weight, bias, target_ids, rows, PolicyLossOptions(loss_type="cispo"),
        head_options | {"needs": gradients_needed(hidden, weight, bias), "row_numbers": index},
        ("entropy",) * return_entropy, report,
    )  # fmt: skip
    if math.isnan(divisor):
        loss = loss + math.nan
    if not return_entropy:
        return loss
    entropy = torch.zeros(len(counts), dtype=wide, device=counts.device)
    entropy[index] = report["entropy"]
    return loss, entropy
