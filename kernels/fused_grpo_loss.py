"""The GRPO loss from hidden states, with its gradients made in the same forward: 3 GEMM passes.

The rows that count are taken in chunks: log-probabilities (vocab_head.py), then the loss and its
gradient in them (policy_loss.py), then both products of the backward, while the chunk's
exponentials are still there. So nothing of size T x V outlives a chunk, and no logit is computed
twice: 6 N D V FLOP for N rows with a gradient.

Rows that cannot have a gradient (masked, or without advantage where only the advantage gives one)
are not computed at all. Where a loss couples tokens (the ratio of a whole sequence), chunks are
whole sequences; sequences too long for one chunk, and quantiles over the batch, compute their
logits twice, 8 N D V FLOP.
Shapes: T packed tokens, N rows that count, S sequences, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from r1fast.kernels import vocab_head
from r1fast.kernels.dispatch import Backend
from r1fast.kernels.linear_logprobs import check_head_inputs, linear_logprobs_ref
from r1fast.kernels.loss_rows import check_mask, check_tensors, drop_dead_rows, prepare_rows
from r1fast.kernels.policy_loss import loss_terms
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.kernels.vocab_head import VocabHead, grad_dtypes, gradients_needed, to_dtypes

WANT = ("logprobs", "entropy")
CORRECTION_METRICS = ["rollout_correction/weight", "rollout_correction/bounded"]
METRICS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio")


def fused_grpo_loss_ref(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,)
    advantages: Tensor,  # (S,) or (T,)
    completion_mask: Tensor | None = None,  # (T,)
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    **loss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `fused_grpo_loss` computes, with the logits in memory and autograd for the gradients.

    `loss`: its other arguments, but want, backend, workspace_bytes and process_group.
    """
    names = {f.name for f in fields(PolicyLossOptions)}
    options = PolicyLossOptions(**{k: v for k, v in loss.items() if k in names})
    index, rows = prepare_rows(
        options, len(hidden), advantages, completion_mask,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
        **{k: v for k, v in loss.items() if k not in names},
    )  # fmt: skip
    logprobs, entropy = linear_logprobs_ref(
        hidden[index], weight, target_ids[index],
        bias=bias, temperature=temperature, softcap=softcap, return_entropy=True,
    )  # fmt: skip
    terms = loss_terms(logprobs, entropy, rows, options, "torch")
    return terms.loss, {name: total / max(len(index), 1) for name, total in terms.metrics.items()}


class FusedLossFunction(torch.autograd.Function):
    """Loss of `rows` and its gradients, both in `forward`; `backward` scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target_ids, rows, options, head_options, want, report):
        head_options = dict(head_options)
        workspace_bytes = head_options.pop("workspace_bytes")
        for deferred in (True, False) if hidden.device.type in vocab_head.DEFERS else (False,):
            head = VocabHead(
                hidden, weight, target_ids, bias=bias, finite_logprobs=True, deferred=deferred,
                **head_options,
            )  # fmt: skip
            loss, found = _compute(
                head, rows, options, want, workspace_bytes, head_options["backend"]
            )
            if head.held():
                break
        report |= found
        # narrowed in backward: the factor of the loss must meet the sums in float32
        ctx.gradients, ctx.dtypes = head.gradients(), grad_dtypes(hidden, weight, bias)
        ctx.in_triton = head.in_triton
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through fused_grpo_loss a second time: its gradients were handed over. "
                "Call the loss again, or use linear_logprobs, which allows it"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.in_triton:  # asking for the factor would stall a CUDA stream: the kernel looks at it
            from r1fast.kernels.triton_rows import scale_
        elif dloss.is_cuda or dloss != 1:
            scale_ = Tensor.mul_
        else:
            scale_ = None
        for gradient in gradients if scale_ else ():
            if gradient is not None:
                scale_(gradient, dloss)
        return *to_dtypes(gradients, ctx.dtypes), *[None] * 6


def _compute(
    head: VocabHead, rows, options, want, workspace_bytes, backend
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of `rows`, and sums over them for the report; the gradients are added up in `head`."""
    N, old = len(head.hidden), rows.old_logprobs
    needs = head.need_hidden or head.need_weight or head.need_bias
    size = head.rows_per_chunk(N, workspace_bytes)
    want_entropy = options.needs_entropy or "entropy" in want
    loss = torch.zeros((), dtype=head.wide, device=head.hidden.device)
    report: dict[str, Tensor] = {}
    kept = {name: [] for name in want}
    for part, lengths in _groups(N, size, options.coupling, rows.lengths):
        if part.start == part.stop:
            continue
        chunks = [slice(n, min(n + size, part.stop)) for n in range(part.start, part.stop, size)]
        single = len(chunks) == 1
        stats = [
            head.forward(
                chunk,
                None if old is None else old[chunk],
                keep=single and needs,
                want_entropy=want_entropy,
            )
            for chunk in chunks
        ]
        logprobs = torch.cat([s.logprobs for s in stats])
        entropy = torch.cat([s.entropy for s in stats]) if want_entropy else None
        terms = loss_terms(logprobs, entropy, rows.rows(part, lengths), options, backend)
        loss += terms.loss
        for name, value in terms.metrics.items():
            report[name] = report.get(name, 0) + value
        for name in want:
            kept[name].append({"logprobs": logprobs, "entropy": entropy}[name])
        if not needs:
            continue
        for chunk, s in zip(chunks, stats, strict=True):
            local = slice(chunk.start - part.start, chunk.stop - part.start)
            if not single:
                if not (terms.dlogprobs[local] != 0).any() and terms.dentropy is None:
                    continue
                s = head.forward(chunk, s.logprobs, keep=True, want_entropy=want_entropy)
            dentropy = None if terms.dentropy is None else terms.dentropy[local]
            head.backward(chunk, s, terms.dlogprobs[local], dentropy)
            s.E = None
    for name in want:
        report[name] = torch.cat(kept[name]) if kept[name] else loss.new_zeros(0)
    return loss, report


def _groups(
    N: int, size: int, coupling: str, lengths: Tensor | None
) -> Iterator[tuple[slice, Tensor | None]]:
    """Row ranges whose gradient is known once their log-probabilities are."""
    if coupling == "batch":
        yield slice(0, N), lengths
    elif coupling == "token":
        for start in range(0, N, size):
            yield slice(start, min(start + size, N)), None
    else:
        start = first = end = 0
        for s, length in enumerate(lengths.tolist()):
            if end > start and end + length - start > size:
                yield slice(start, end), lengths[first:s]
                start, first = end, s
            end += length
        yield slice(start, end), lengths[first:]


def fused_grpo_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target_ids: Tensor,  # (T,) int64 in [0, V), already shifted: row t predicts target_ids[t]
    advantages: Tensor,  # (S,) with cu_seqlens, or (T,)
    completion_mask: Tensor | None = None,  # (T,) bool, default: all
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,) int, row offsets of the sequences
    old_logprobs: Tensor | None = None,  # (T,) before the first update; default: the new ones
    ref_logprobs: Tensor | None = None,  # (T,) of the reference policy
    rollout_logprobs: Tensor | None = None,  # (T,) of the engine that sampled
    policy_logprobs: Tensor | None = None,  # (T,) to take the loss at, instead of those of hidden
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    cispo_clip: str = "relative",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_in: str = "loss",
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    rollout_correction: str | None = None,
    rollout_clip_min: float | None = None,
    rollout_clip_max: float | None = 2.0,
    importance_weights: Tensor | None = None,  # (T,) constants that multiply the policy term
    token_weights: Tensor | None = None,  # (T,) instead of the loss type's own
    normaliser: float | None = None,  # what the sum is divided by, instead of the loss type's own
    num_sequences: int | None = None,  # over all ranks and micro-batches; default: this call's
    num_tokens: int | None = None,  # completion tokens, likewise
    max_completion_tokens: int | None = None,  # for dr_grpo
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    want: Sequence[str] = (),
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # (), metrics
    """Loss of packed completions, differentiable once in hidden, weight and bias.

    The losses and their options are those of `PolicyLossOptions` (kernels/policy_loss.py has the
    formulas). Denominators: grpo, gspo, sapo: tokens of the sequence, then num_sequences; dapo,
    cispo: num_tokens; bnpo: completion tokens of this call; dr_grpo: num_sequences times
    max_completion_tokens; luspo: num_sequences. `normaliser` replaces them, the sum over tokens is
    then plain (for grpo, gspo, sapo: of sequence means). The entropy bonus is the mean over
    num_tokens.

    Metrics are means over the tokens that were computed, `num_evaluated` of the `num_tokens`
    completion tokens: the former is their weight where micro-batches are put together. They are
    ratio, kl (with ref_logprobs), entropy (where needed), clip_ratio/low_mean, high_mean and
    region_mean. Tokens without advantage are left out where nothing else gives them a gradient.
    `want` asks for "logprobs" or "entropy" as (T,) tensors, 0 outside the completions: then every
    completion token is computed. They are those of `hidden`, also beside `policy_logprobs`, which are
    for a caller whose log-probabilities come from elsewhere (a forward with a fixed order of sums):
    the loss and its derivatives in the log-probabilities are taken there, and go on into `hidden`.

    Masked rows may hold anything, NaN included, and are not read. `workspace_bytes` is the size of
    the exponentials at any one time (by default under an eighth of the logits), `process_group` as
    in `linear_logprobs`.

    A bfloat16 weight on the CPU gets a gradient in the memory of the float32 sum that it was, twice
    its size, or that sum itself where `weight.grad_dtype` is torch.float32.

    Raises ValueError for shapes, dtypes or devices that do not fit, an empty mask, a target outside
    the vocabulary or of probability 0, NaN or Inf in a row that counts, an unknown name, an option
    without its input.
    """
    options = PolicyLossOptions(
        loss_type=loss_type, importance_sampling_level=importance_sampling_level,
        clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, delta=delta, dual_clip=dual_clip,
        cispo_clip=cispo_clip, sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_in=kl_in, entropy_coef=entropy_coef, top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold,
        rollout_correction=rollout_correction, rollout_clip_min=rollout_clip_min,
        rollout_clip_max=rollout_clip_max,
    )  # fmt: skip
    check_tensors(hidden=hidden)
    check_mask(completion_mask, len(hidden))
    check_head_inputs(
        hidden, weight, target_ids, bias, temperature, softcap, process_group, completion_mask
    )
    want = (want,) if isinstance(want, str) else tuple(want)
    if unknown := set(want) - set(WANT):
        raise ValueError(f"want knows {', '.join(WANT)}, got {', '.join(sorted(unknown))}")
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be at least 0, got {workspace_bytes}")
    index, rows = prepare_rows(
        options, len(hidden), advantages, completion_mask, cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs,
        policy_logprobs=policy_logprobs, importance_weights=importance_weights,
        token_weights=token_weights, normaliser=normaliser,
        num_sequences=num_sequences, num_tokens=num_tokens,
        max_completion_tokens=max_completion_tokens,
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    )  # fmt: skip
    num_completion_tokens = len(index)
    if not want:
        index, rows = drop_dead_rows(index, rows, options)
    if len(index) < len(hidden):
        picked, picked_ids = hidden[index], target_ids[index]
    else:
        picked, picked_ids = hidden, target_ids
    report: dict[str, Tensor] = {}
    loss = FusedLossFunction.apply(
        picked, weight, bias, picked_ids, rows, options,
        {
            "temperature": float(temperature), "softcap": softcap, "backend": backend,
            "workspace_bytes": workspace_bytes, "process_group": process_group,
            "needs": gradients_needed(hidden, weight, bias), "row_numbers": index,
        },
        want, report,
    )  # fmt: skip
    for name in report.keys() - want:
        report[name] = report[name] / max(len(index), 1)
    for name in want:
        full = report[name].new_zeros(len(hidden))
        full[index] = report[name]
        report[name] = full
    also = ["kl"] if ref_logprobs is not None else []
    also += CORRECTION_METRICS if options.rollout_correction is not None else []
    for name in (*METRICS, *also):
        report.setdefault(name, loss.new_zeros(()))
    report["num_tokens"] = torch.tensor(num_completion_tokens, device=hidden.device)
    report["num_evaluated"] = torch.tensor(len(index), device=hidden.device)
    return loss, report
