"""Group advantages: how much better a completion is than the others of its prompt.

    A_i = (r_i - mean(r)) / (std(r) + eps)          (DeepSeek-R1, 2501.12948, equation 3)

`baseline` "leave_one_out" takes the mean of the others in place of the group's (RLOO, 2402.14740):
r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean(r)).
`scale` "group" divides by the group's own std, "batch" by the std of all rewards (the mean stays
the group's), "none" does not divide (Dr. GRPO, 2503.20783). `std` "population" divides by G (numpy,
the paper), "sample" by G - 1 (torch.std, TRL).

A group without signal gets exactly 0: its rewards are equal, or its verdicts are and its rewards
differ by float noise alone. (The mean of equal rewards such as 0.1 is not exact, and noise divided
by its own std is as large as any advantage.)
Reads and writes N G numbers, once. Shapes: N groups of G completions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton
from r1fast.kernels.loss_rows import check_tensors

NOISE = tl.constexpr(1e-6)  # of a reward, or of 1 where it is smaller


def group_advantages_ref(
    rewards: Tensor,  # (N, G)
    *,
    scale: str,
    std: str,
    eps: float,
    batch_std: Tensor | None,  # () for "batch"
    baseline: str,
    verdicts: Tensor | None,  # (N, G)
) -> Tensor:  # (N, G)
    """What `group_advantages` computes, in plain PyTorch."""
    r, G = rewards.to(torch.promote_types(rewards.dtype, torch.float32)), rewards.shape[1]
    signal = _signal(r, verdicts)[:, None]
    centred = torch.where(signal, r - r.mean(1, keepdim=True), 0)
    advantages = centred * (G / max(G - 1, 1)) if baseline == "leave_one_out" else centred
    if scale != "none":
        if scale == "batch":
            sigma = batch_std
        else:
            divisor = G if std == "population" else max(G - 1, 1)
            sigma = (centred.square().sum(1, keepdim=True) / divisor).sqrt()
        # also where sigma + eps is 0
        advantages = torch.where(signal, advantages / (sigma + eps), 0)
    return advantages.to(rewards.dtype)


def _signal(rewards: Tensor, verdicts: Tensor | None) -> Tensor:  # (N, G) -> (N,) bool
    high, low = rewards.amax(1), rewards.amin(1)
    if verdicts is None:
        return high != low
    noise = high - low <= NOISE.value * high.abs().clamp(min=1)
    unanimous = (verdicts == verdicts[:, :1]).all(1)
    return (high != low) & ~(noise & unanimous)


@triton.jit
def _group_advantages_kernel(
    rewards_ptr, verdicts_ptr, batch_std_ptr, advantages_ptr, N, G,
    SCALE: tl.constexpr, SAMPLE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr,
    HAS_VERDICTS: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    # EPS is a constexpr: an argument would arrive as float32, and rewards may be float64
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G)
    inside = (n < N)[:, None] & (g < G)[None, :]
    at = n[:, None] * G + g[None, :]
    r = tl.load(rewards_ptr + at, mask=inside, other=0.0)
    if r.dtype.primitive_bitwidth < 32:
        r = r.to(tl.float32)

    high = tl.max(tl.where(inside, r, float("-inf")), 1)
    low = tl.min(tl.where(inside, r, float("inf")), 1)
    signal = high != low
    if HAS_VERDICTS:
        verdicts = tl.load(verdicts_ptr + at, mask=inside, other=0)
        first = tl.load(verdicts_ptr + n * G, mask=n < N, other=0)
        dissent = tl.sum((inside & (verdicts != first[:, None])).to(tl.int32), 1)
        signal = signal & ((dissent > 0) | (high - low > NOISE * tl.maximum(tl.abs(high), 1.0)))

    centred = tl.where(inside, r - (tl.sum(r, 1) / G)[:, None], 0.0)
    advantages = centred
    if LEAVE_ONE_OUT:
        advantages = centred * G / tl.maximum(G - 1, 1)
    if SCALE == "batch":
        advantages = advantages / (tl.load(batch_std_ptr) + EPS)
    elif SCALE == "group":
        divisor = tl.maximum(G - 1, 1) if SAMPLE else G
        sigma = tl.sqrt(tl.sum(centred * centred, 1) / divisor)
        advantages = advantages / (sigma + EPS)[:, None]
    advantages = tl.where(signal[:, None], advantages, 0.0)  # also where sigma + EPS is 0
    tl.store(advantages_ptr + at, advantages.to(advantages_ptr.dtype.element_ty), mask=inside)


def group_advantages_fwd(
    rewards, *, scale, std, eps, batch_std, baseline, verdicts
) -> Tensor:  # (N, G)
    """Launch the kernel."""
    rewards = rewards.contiguous()
    advantages = torch.empty_like(rewards)
    N, G = rewards.shape
    if N:
        if batch_std is not None:
            batch_std = batch_std.to(rewards.device, rewards.dtype)
        BLOCK_G = triton.next_power_of_2(G)
        BLOCK_N = max(1, 1024 // BLOCK_G)
        _group_advantages_kernel[(triton.cdiv(N, BLOCK_N),)](
            rewards,
            rewards if verdicts is None else verdicts.to(torch.int64).contiguous(),
            rewards if batch_std is None else batch_std,
            advantages, N, G, SCALE=scale, SAMPLE=std == "sample",
            LEAVE_ONE_OUT=baseline == "leave_one_out", HAS_VERDICTS=verdicts is not None,
            EPS=eps, BLOCK_N=BLOCK_N, BLOCK_G=BLOCK_G,
        )  # fmt: skip
    return advantages


def group_advantages(
    rewards: Tensor,  # (N, G) float
    *,
    scale: str = "group",
    std: str = "population",
    eps: float = 1e-4,
    batch_std: Tensor | None = None,  # () for "batch" over several ranks
    baseline: str = "mean",
    verdicts: Tensor | None = None,  # (N, G) int: what each reward was given for
    backend: Backend = "auto",
) -> Tensor:  # (N, G), of the dtype of rewards
    """Advantages of N groups: in stds of the rewards, or in rewards for `scale` "none".

    The options and their sources are in the module's docstring. Not differentiable. Raises
    ValueError for a wrong shape, dtype or option, or a non-finite reward.
    """
    _check(rewards, verdicts)
    for name, value, known in (
        ("scale", scale, ("group", "batch", "none")),
        ("std", std, ("population", "sample")),
        ("baseline", baseline, ("mean", "leave_one_out")),
    ):
        if value not in known:
            choices = f"{', '.join(known[:-1])} or {known[-1]}"
            raise ValueError(f"{name} must be {choices}, got {value!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    if batch_std is not None and (batch_std.numel() != 1 or not bool(batch_std.isfinite().all())):
        raise ValueError(f"batch_std must be one finite number, got {batch_std}")
    if scale == "batch" and batch_std is None:
        batch_std = _std(rewards.flatten(), std)
    compute = group_advantages_fwd if use_triton(rewards, backend) else group_advantages_ref
    return compute(
        rewards, scale=scale, std=std, eps=eps, batch_std=batch_std, baseline=baseline,
        verdicts=verdicts,
    )  # fmt: skip


def has_signal(
    rewards: Tensor,  # (N, G) float
    verdicts: Tensor | None = None,  # (N, G) int
) -> Tensor:  # (N,) bool
    """Whether a group's advantages are other than exactly 0. Raises ValueError as `group_advantages`."""
    _check(rewards, verdicts)
    return _signal(rewards, verdicts)


def _check(rewards: Tensor, verdicts: Tensor | None) -> None:
    check_tensors(rewards=rewards)
    check_tensors(optional=True, verdicts=verdicts)
    if rewards.dim() != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must be (N, G) with G >= 1, got {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards must be float, got {rewards.dtype}: call .float()")
    if not rewards.isfinite().all():
        n = int((~rewards.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"rewards of group {n} are not finite: {rewards[n].tolist()}")
    if verdicts is None:
        return
    if verdicts.shape != rewards.shape:
        raise ValueError(
            f"verdicts must have the rewards' shape {tuple(rewards.shape)}, got "
            f"{tuple(verdicts.shape)}"
        )
    if verdicts.is_floating_point() or verdicts.is_complex():
        raise ValueError(f"verdicts must be integers, one for each kind, got {verdicts.dtype}")


def _std(x: Tensor, kind: str) -> Tensor:
    return x.std(correction=0 if kind == "population" else int(x.numel() > 1))
