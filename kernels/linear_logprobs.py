"""Log-probability (and entropy) of given tokens from hidden states, without keeping the logits.

    z = (h W^T + b) / temperature        logprob = z_y - logsumexp(z)
    H = logsumexp(z) - sum_j p_j z_j     p = softmax(z)

    dlogprob/dz_j = [j = y] - p_j        dH/dz_j = -p_j (log p_j + H)

Rows are taken in chunks of at most `chunk_elements` logits. The forward is one GEMM pass (2 T D V
FLOP); the backward recomputes the logits and is three more. When all logits fit in one chunk they
are kept as log-probabilities and the recomputation is saved. Sums are in float32 (float64 for
float64 input).
Shapes: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32


def linear_logprobs_ref(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (T,)
    """What `linear_logprobs` computes, in plain PyTorch with the logits in memory."""
    logprobs = _all_logprobs(hidden, weight, bias, temperature)
    chosen = logprobs.gather(1, target_ids[:, None])[:, 0]
    return (chosen, -(logprobs.exp() * logprobs).sum(1)) if return_entropy else chosen


def _all_logprobs(hidden, weight, bias, temperature) -> Tensor:  # (T, V)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return torch.log_softmax(logits / temperature, dim=1)


class LinearLogprobsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, temperature, chunk_elements):
        rows = max(1, chunk_elements // weight.shape[0])
        parts, kept = [], None
        for h, y in zip(hidden.split(rows), target_ids.split(rows), strict=True):
            kept = _all_logprobs(h, weight, bias, temperature)
            entropy = -(kept.exp() * kept).sum(1)
            parts.append((kept.gather(1, y[:, None])[:, 0], entropy))
        logprobs, entropy = (torch.cat(p) for p in zip(*parts, strict=True))
        ctx.save_for_backward(
            hidden, weight, bias, target_ids, kept if len(parts) == 1 else None, entropy
        )
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)  # an unused entropy costs no pass over the logits
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, dentropy):
        hidden, weight, bias, target_ids, kept, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(entropy)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        acc = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=acc) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=acc) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.rows):
            rows = slice(start, start + ctx.rows)
            logp = kept
            if logp is None:
                logp = _all_logprobs(hidden[rows], weight, bias, ctx.temperature)
            dz = logp.exp()
            scale = -dlogprobs[rows, None]
            if dentropy is not None:
                scale = scale - dentropy[rows, None] * (logp + entropy[rows, None])
            dz *= scale
            dz.scatter_add_(1, target_ids[rows, None], dlogprobs[rows, None].to(dz.dtype))
            dz /= ctx.temperature
            if need_bias:
                dbias += dz.sum(0)
            dz = dz.to(weight.dtype)
            if need_hidden:
                torch.mm(dz, weight, out=dhidden[rows])
            if need_weight:
                dweight += torch.mm(dz.t(), hidden[rows])
        dweight = dweight.to(weight.dtype) if need_weight else None
        return dhidden, dweight, dbias.to(bias.dtype) if need_bias else None, None, None, None


def linear_logprobs(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,) int64 in [0, V)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor | tuple[Tensor, Tensor]:  # (T,) float32 log-probabilities in nats [, (T,) entropy]
    """Per-token log-probabilities, differentiable in hidden, weight and bias.

    Raises ValueError for shapes that do not fit, a target outside the vocabulary or a temperature
    that is not positive.
    """
    _check(hidden, weight, target_ids, bias, temperature)
    if not len(target_ids):
        empty = hidden.sum() * 0 + hidden.new_zeros(0, dtype=torch.float32)
        return (empty, empty) if return_entropy else empty
    logprobs, entropy = LinearLogprobsFunction.apply(
        hidden, weight, bias, target_ids, temperature, chunk_elements
    )
    return (logprobs, entropy) if return_entropy else logprobs


def _check(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden (T, D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if target_ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"need one target per row: target_ids {tuple(target_ids.shape)} for hidden "
            f"{tuple(hidden.shape)}"
        )
    if target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids must be int64, got {target_ids.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need bias (V,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one of them")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not hidden.is_cuda and len(target_ids):  # on CUDA the check would stall the stream
        low, high = int(target_ids.min()), int(target_ids.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"target_ids must be in [0, {weight.shape[0]}), got values from {low} to {high}"
            )
