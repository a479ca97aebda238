"""Group advantages: how much better a completion is than the others of its prompt.

    A_i = (r_i - mean(r)) / (std(r) + eps)          (DeepSeek-R1, equation 3)

`scale` "group" divides by the group's own std, "batch" by the std of all rewards (the mean stays
the group's), "none" does not divide (Dr. GRPO). `std` "population" divides by G (numpy, the paper),
"sample" by G - 1 (torch.std, TRL). A group whose rewards are all equal gets exactly 0.
Shapes: N groups of G completions.
"""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,  # (N, G) float
    *,
    scale: str = "group",
    std: str = "population",
    eps: float = 1e-4,
    batch_std: Tensor | None = None,  # () for "batch" over several ranks
) -> Tensor:  # (N, G)
    """Advantages of N groups. Raises ValueError for a wrong shape, option or a non-finite reward."""
    if rewards.dim() != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must be (N, G) with G >= 1, got {tuple(rewards.shape)}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    if std not in ("population", "sample"):
        raise ValueError(f"std must be population or sample, got {std!r}")
    if not rewards.isfinite().all():
        n = int((~rewards.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"rewards of group {n} are not finite: {rewards[n].tolist()}")
    G = rewards.shape[1]
    constant = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    centred = torch.where(constant, 0, rewards - rewards.mean(1, keepdim=True))
    if scale == "none":
        return centred
    if scale == "batch":
        sigma = _std(rewards.flatten(), std) if batch_std is None else batch_std
    else:
        divisor = G if std == "population" else max(G - 1, 1)
        sigma = (centred.square().sum(1, keepdim=True) / divisor).sqrt()
    return torch.where(constant, 0, centred / (sigma + eps))  # also where sigma + eps is 0


def _std(x: Tensor, kind: str) -> Tensor:
    return x.std(correction=0 if kind == "population" else int(x.numel() > 1))
