"""The GRPO loss from hidden states in every implementation that bench_loss.py measures.

All compute dapo without a reference model. A peer that is not installed fails where it is made.
"""

import contextlib
import importlib
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from r1fast.kernels import cpu_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
GROUP = 8


@dataclass
class Problem:
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    ids: Tensor  # (T,)
    old: Tensor  # (T,)
    advantages: Tensor  # (S,)
    half: Tensor  # (S,), every other group 0
    cu_seqlens: Tensor  # (S + 1,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.hidden.shape, len(self.weight)

    def per_token(self, half: bool) -> Tensor:  # (T,)
        chosen = self.half if half else self.advantages
        return chosen.repeat_interleave(len(self.ids) // len(chosen))


def make_problem(T: int, D: int, V: int, dtype: torch.dtype, device: str, sample=True) -> Problem:
    """Random hidden states and weights; tokens drawn from the model's own distribution."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, device=device)

    S = next(s for s in (64, 32, 16, 8, 4, 2, 1) if T % s == 0 and (T // s >= 32 or s == 1))
    hidden = randn(T, D).to(dtype)
    weight = (randn(V, D) * (6.5 / math.sqrt(D))).to(dtype)
    ids, old = [], []
    for h in hidden.split(max(1, (1 << 24) // V)) if sample else ():
        logp = torch.log_softmax(h.float() @ weight.float().t(), 1)
        noise = torch.rand(logp.shape, generator=g, device=device).log_().neg_().log_()
        ids.append((logp - noise).argmax(1))
        old.append(logp.gather(1, ids[-1][:, None])[:, 0])
    advantages = randn(S)
    half = torch.where(torch.arange(S, device=device) // min(GROUP, S // 2 or 1) % 2 == 0, 1.0, 0.0)
    return Problem(
        hidden, weight,
        torch.cat(ids) if ids else torch.randint(V, (T,), generator=g, device=device),
        (torch.cat(old) if old else randn(T) - 8) + 0.02 * randn(T),
        advantages, advantages * half,
        torch.arange(0, T + 1, T // S, device=device),
    )  # fmt: skip


def grpo_of(logprobs: Tensor, p: Problem, half: bool) -> Tensor:
    """The loss all variants compute, from log-probabilities."""
    advantages = p.per_token(half).to(logprobs.dtype)
    ratio = (logprobs - p.old.to(logprobs.dtype)).exp()
    clipped = ratio.clamp(1 - CLIP["clip_eps_low"], 1 + CLIP["clip_eps_high"])
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


# a variant is a function of (problem, hidden, weight, half) that returns the loss


def r1fast_loss(backend: str, wide_dweight: bool = False) -> Callable:
    """With `wide_dweight` the weight's gradient comes back as the float32 sum it was made as."""
    from r1fast.kernels.fused_grpo_loss import fused_grpo_loss

    def loss(p, hidden, weight, half):
        return fused_grpo_loss(
            hidden, weight, p.ids, p.half if half else p.advantages, cu_seqlens=p.cu_seqlens,
            old_logprobs=p.old, loss_type="dapo", backend=backend, **CLIP,
        )[0]  # fmt: skip

    loss.wide_dweight = wide_dweight
    return loss


def from_logprobs(logprobs_of: Callable) -> Callable:
    def loss(p, hidden, weight, half):
        return grpo_of(logprobs_of(hidden, weight, p.ids), p, half)

    loss.logprobs = logprobs_of
    return loss


def r1fast_logprobs(backend: str) -> Callable:
    from r1fast.kernels.linear_logprobs import linear_logprobs

    return from_logprobs(lambda h, w, y: linear_logprobs(h, w, y, backend=backend))


def materialised(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, 1).gather(1, ids[:, None])[:, 0]


def torch_lce(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, ids, reduction="none").float()


def liger_loss() -> Callable:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    def loss(p, hidden, weight, half):
        S = len(p.advantages)
        fused = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, loss_type="dapo",
            epsilon_low=CLIP["clip_eps_low"], epsilon_high=CLIP["clip_eps_high"],
        )  # fmt: skip
        ids = p.ids.view(S, -1)
        return fused(
            hidden.view(*ids.shape, -1), weight, ids, torch.ones_like(ids),
            p.half if half else p.advantages, old_per_token_logps=p.old.view(S, -1),
        )[0]  # fmt: skip

    loss.logprobs = lambda h, w, y: LigerFusedLinearPPOBase.chunk_forward(h[None], w, y)[0]
    return loss


def trl_logprobs() -> Callable:
    from trl.kernels import ChunkedLogProbFunction

    try:
        importlib.import_module("trl.trainer.utils")
    except ImportError:  # its backward takes one function from there: a no-op without DeepSpeed
        stub = types.ModuleType("trl.trainer.utils")
        stub.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        package = types.ModuleType("trl.trainer")
        package.__path__, package.utils = [], stub
        sys.modules |= {"trl.trainer": package, "trl.trainer.utils": stub}

    return from_logprobs(
        lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]
    )


def cce_logprobs() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return from_logprobs(lambda h, w, y: -linear_cross_entropy(h, w, y, reduction="none").float())


def compiled() -> Callable:
    return from_logprobs(torch.compile(materialised))


def make_variants(device: str, dtype: str) -> dict[str, Callable[[], Callable]]:
    """Name -> what makes the variant; ImportError or AttributeError there: skipped with a note."""
    if device == "cpu" and dtype == "bf16":
        ours = {"exact": "native"} if cpu_head.supported(torch.bfloat16) else {}
        ours["fast"] = "fast"
    else:
        ours = {"": "auto"}
    variants = {}
    for suffix, backend in ours.items():
        variants[f"r1fast {suffix}".strip()] = lambda b=backend: r1fast_loss(b)
        variants[f"r1fast logprobs {suffix}".strip()] = lambda b=backend: r1fast_logprobs(b)
    if dtype != "fp32":
        variants["r1fast, fp32 dW"] = lambda: r1fast_loss("auto", True)
    variants["materialised"] = lambda: from_logprobs(materialised)
    if device == "cuda":
        variants["torch.compile"] = compiled
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        variants["F.linear_cross_entropy"] = lambda: from_logprobs(torch_lce)
    variants |= {"Liger": liger_loss, "TRL": trl_logprobs}
    if device == "cuda":
        variants["CCE"] = cce_logprobs
    return variants


def gemm_passes(p: Problem, onednn: bool) -> list[Callable[[], Tensor]]:
    """z = h W^T, dh = dz W, dW = dz^T h on one library."""
    h, w = p.hidden, p.weight
    dz = torch.randn(len(h), len(w), device=h.device, dtype=torch.float32).to(h.dtype)
    if onednn:
        linear = torch.ops.mkldnn._linear_pointwise
        return [
            lambda: linear(h, w, None, "none", [], None),
            lambda: linear(dz, w.t(), None, "none", [], None),
            lambda: linear(h.t(), dz.t(), None, "none", [], None),  # dW^T
        ]
    return [lambda: torch.mm(h, w.t()), lambda: torch.mm(dz, w), lambda: torch.mm(dz.t(), h)]


def make_gemms(p: Problem) -> dict[str, list[Callable]]:
    found = {"torch.mm": gemm_passes(p, False)}
    if p.hidden.dtype == torch.float32 and not p.hidden.is_cuda:
        try:
            candidates = gemm_passes(p, True)
            candidates[0]()
            found["oneDNN"] = candidates
        except (AttributeError, RuntimeError):  # internal to torch, may go
            print("no mkldnn._linear_pointwise in this torch: the GEMMs are torch.mm's")
    return found
