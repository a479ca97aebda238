"""Log-probability (and entropy) of given tokens from hidden states, without keeping the logits.

    z = cap tanh((h W^T + b) / cap) / temperature      logprob = z_y - logsumexp(z)
    H = logsumexp(z) - sum_j p_j z_j                   p = softmax(z)

    dlogprob/dz_j = [j = y] - p_j                      dH/dz_j = -p_j (log p_j + H)

vocab_head.py does it in chunks of rows. The forward is one GEMM pass (2 T D V FLOP). The backward
takes two more for chunks whose exponentials fit in `workspace_bytes`, three for the others, whose
logits it computes again; one less where the weight is frozen.
Shapes: T tokens, D model width, V vocabulary.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from r1fast.kernels import vocab_head
from r1fast.kernels.dispatch import Backend
from r1fast.kernels.loss_rows import check_tensors
from r1fast.kernels.vocab_head import (
    ChunkStats,
    VocabHead,
    grad_dtypes,
    gradients_needed,
    to_dtypes,
)

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 5 << 28}  # 1.25 GiB on a GPU


def linear_logprobs_ref(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (T,)
    """What `linear_logprobs` computes, in plain PyTorch with the logits in memory."""
    logprobs = torch.log_softmax(logits_ref(hidden, weight, bias, temperature, softcap), dim=1)
    chosen = logprobs.gather(1, target_ids[:, None])[:, 0]
    return (chosen, -(logprobs.exp() * logprobs).sum(1)) if return_entropy else chosen


def logits_ref(hidden, weight, bias, temperature, softcap) -> Tensor:  # (T, V)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


class LinearLogprobsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, target_ids, temperature, softcap, want_entropy,
        backend, workspace_bytes, process_group, needs,
    ):  # fmt: skip
        space = WORKSPACE_BYTES[hidden.device.type] if workspace_bytes is None else workspace_bytes
        for deferred in (True, False) if hidden.device.type in vocab_head.DEFERS else (False,):
            head = VocabHead(
                hidden, weight, target_ids,
                bias=bias, temperature=temperature, softcap=softcap, deferred=deferred,
                backend=backend, process_group=process_group, needs=needs,
            )  # fmt: skip
            chunks = _forward(head, space, want_entropy)
            if head.held():
                break
        head.deferred = False  # the backward may look at what is computed again
        ctx.head, ctx.chunks, ctx.want_entropy = head, chunks, want_entropy
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)  # an unused entropy costs no pass over E
        logprobs = torch.cat([stats.logprobs for _, stats in chunks])
        if not want_entropy:
            return logprobs
        return logprobs, torch.cat([stats.entropy for _, stats in chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogprobs, dentropy=None):
        hidden, weight, bias = ctx.saved_tensors
        head = ctx.head
        if dlogprobs is None and dentropy is None:
            return (None,) * 11
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(dentropy)
        for part, stats in ctx.chunks:
            if stats.E is None:
                again = head.forward(
                    part, stats.logprobs, keep=True, want_entropy=dentropy is not None
                )
            else:
                again, stats.E = replace(stats), None  # freed chunk by chunk
            head.backward(
                part, again, dlogprobs[part], None if dentropy is None else dentropy[part]
            )
        return *to_dtypes(head.gradients(), grad_dtypes(hidden, weight, bias)), *[None] * 8


def _forward(head: VocabHead, left: int, want_entropy: bool) -> list[tuple[slice, ChunkStats]]:
    """Statistics of all chunks; of those that fit into `left` bytes what the backward needs too."""
    T, chunks = len(head.hidden), []
    rows = min(head.rows_per_chunk(T, None), head.rows_per_chunk(T, left))
    if head.bytes_of(T) > left:
        left -= head.bytes_of(rows)  # for the chunk that is computed again
    for start in range(0, T, rows):
        part = slice(start, min(start + rows, T))
        room = head.bytes_of(part.stop - start)
        keep = (head.need_hidden or head.need_weight or head.need_bias) and room <= left
        stats = head.forward(part, keep=keep, want_entropy=want_entropy, own_workspace=True)
        left -= room * keep
        chunks.append((part, stats))
    return chunks


def linear_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,) int64 in [0, V)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,  # logits become softcap * tanh(logits / softcap), as in Gemma 2
    return_entropy: bool = False,
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (T,) float32 log-probabilities in nats [, (T,) entropy]
    """Per-token log-probabilities, differentiable in hidden, weight and bias; so is the entropy.

    `workspace_bytes` is how much may be kept for the backward (256 MiB on the CPU, 1.25 GiB on a
    GPU). `backend`: on CUDA "auto" is Triton. On the CPU it is C++ ("native") where the chip has
    AVX2 or more, else PyTorch ("torch"); both sum bfloat16 in float32, while
    "fast" leaves it to PyTorch's GEMM and has the error of PyTorch's bfloat16 logits (about 0.05
    nats at |z| = 30). Autocast is off inside: give hidden and weight one dtype.

    With `process_group`, `weight` and `bias` are this rank's slice of the vocabulary (slices
    in the order of the ranks, of any size), `hidden` and `target_ids` the same on every rank; every
    rank gets the whole result, and the whole gradient of hidden. A bfloat16 weight gets a bfloat16
    gradient, or the float32 sum itself where `weight.grad_dtype` is torch.float32.

    Raises ValueError for shapes, dtypes or devices that do not fit, a target outside the
    vocabulary, a temperature or softcap that is not positive, NaN or Inf in `hidden`.
    """
    check_head_inputs(hidden, weight, target_ids, bias, temperature, softcap, process_group)
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0, got {workspace_bytes}")
    if not len(target_ids):
        zero = hidden.sum() * 0 + weight.sum() * 0 + (0 if bias is None else bias.sum() * 0)
        empty = zero + zero.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (empty, empty) if return_entropy else empty
    return LinearLogprobsFunction.apply(
        hidden, weight, bias, target_ids, float(temperature), softcap, return_entropy,
        backend, workspace_bytes, process_group, gradients_needed(hidden, weight, bias),
    )  # fmt: skip


def check_head_inputs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    process_group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
) -> None:
    """ValueError with what was wrong, what came and what would do. Masked targets may be anything."""
    check_tensors(hidden=hidden, weight=weight, target_ids=target_ids)
    check_tensors(optional=True, bias=bias)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden (T, D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not weight.shape[0] or not weight.shape[1]:
        raise ValueError(f"weight must not be empty, got {tuple(weight.shape)}")
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"need one target per row: target_ids {tuple(target_ids.shape)} for hidden "
            f"{tuple(hidden.shape)}"
        )
    if target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids must be int64, got {target_ids.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need bias (V,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if hidden.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"hidden must be floating point: float64, float32, bfloat16 or float16, got {hidden.dtype}"
        )
    if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"bias must be {hidden.dtype} or float32, got {bias.dtype}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one of them")
    devices = {str(x.device) for x in (hidden, weight, target_ids, bias) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if process_group is None:
        read = target_ids if mask is None else target_ids[mask]
        low, high = (int(x) for x in read.aminmax()) if len(read) else (0, 0)
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"target_ids must be in [0, {weight.shape[0]}), got values from {low} to {high}"
            )
