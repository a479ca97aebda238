"""fused_grpo_loss on padded batches, as TRL and Liger hold them.

They keep (B, C): B completions, padded to C tokens, with a mask. The weights that `token_weights`
gives hold each loss type's denominator, so what a peer calls dapo or dr_grpo is here the clipped
loss under other weights; the loss maths stays where it is, in kernels/policy_loss.py.
Shapes: B completions, C tokens of the longest, N rows of hidden states, D width, V vocabulary.
"""

import torch
from torch import Tensor

from r1fast.kernels.fused_grpo_loss import fused_grpo_loss

POLICY_OF = {  # the peers' loss type -> the one of fused_grpo_loss that has its policy term
    "grpo": "grpo", "bnpo": "grpo", "dr_grpo": "grpo", "dapo": "grpo", "luspo": "grpo",
    "cispo": "cispo", "sapo": "sapo", "vespo": "cispo",
}  # fmt: skip


def token_weights(
    loss_type: str,
    mask: Tensor,  # (B, C) bool
    num_items: Tensor | float,  # dapo, cispo, vespo: what the sum over tokens is divided by
    max_completion_length: int | None = None,
) -> Tensor:  # (B, C) float32
    """The weight of each token's loss in the batch's, 0 outside the mask."""
    B, ones = len(mask), mask.float()
    if loss_type in ("grpo", "sapo"):
        return ones / ones.sum(1, keepdim=True).clamp(min=1) / B
    if loss_type == "bnpo":
        return ones / ones.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return ones / (B * max_completion_length)
    if loss_type == "luspo":
        return ones / B
    return ones / num_items


def padded_loss(
    hidden: Tensor,  # (N, D), the rows of `present` one after another
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (N,)
    present: Tensor,  # (B, C) bool, with N set
    *,
    mask: Tensor,  # (B, C) bool, the tokens of the loss: some of `present`
    advantages: Tensor,  # (B, 1) or (B, C)
    weights: Tensor,  # (B, C)
    old_logprobs: Tensor | None = None,  # (B, C), and so the next two
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,  # or (B, 1)
    loss_type: str,
    want: tuple[str, ...] = (),
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`fused_grpo_loss` of them, (loss, metrics); an empty mask gives 0 and zero gradients."""
    if not bool(mask.any()):
        zero = (hidden[:0].sum() + weight[:0].sum()).float()
        return zero, {name: zero.new_zeros(len(hidden)) for name in want}

    def packed(x: Tensor | None) -> Tensor | None:  # (B, C) or (B, 1) -> (N,)
        return None if x is None else x.detach().expand(present.shape)[present]

    lengths = present.sum(1)
    return fused_grpo_loss(
        hidden, weight, target_ids, packed(advantages), packed(mask),
        bias=bias,
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        old_logprobs=packed(old_logprobs),
        ref_logprobs=packed(ref_logprobs),
        importance_weights=packed(importance_weights),
        token_weights=packed(weights),
        loss_type=POLICY_OF[loss_type],
        cispo_clip="absolute" if loss_type == "cispo" else "relative",
        want=want, **options,
    )  # fmt: skip
