"""TRL's GRPOTrainer on r1fast's ops: its log-probabilities, entropies and, where it can, its loss.

    from r1fast.integrations.trl import patch
    trainer = patch(trl.GRPOTrainer(...));  trainer.train()

TRL 1.16 gets everything from one function, the head that its model forward calls, through one
method of the trainer. Both hooks are on the trainer given (`unpatch` takes them off): around that
method the head is r1fast's, and around `_compute_loss` the head makes the loss's gradient in the
forward, while TRL's own code goes on to compute the value and every metric from the
log-probabilities, now constants. So TRL says what the loss is, r1fast differentiates it in 3 GEMM
passes instead of 4, and the two values are compared at every step.

`ChunkedLogProbFunction` alone replaces trl.kernels.ChunkedLogProbFunction, call for call.
Shapes: B completions, C tokens of the longest, N scored tokens, D width, V vocabulary.
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from r1fast.integrations.mixed_precision import run_head
from r1fast.integrations.padded import padded_loss, token_weights
from r1fast.kernels.linear_logprobs import linear_logprobs

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HEAD_ARGUMENTS = [
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size",
    "final_logit_softcapping", "logit_scale", "outputs",
]  # fmt: skip
LOSSES = ("auto", "fused", "logprobs")
FUSED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")
CHUNK_ELEMENTS = 1 << 24


class ChunkedLogProbFunction:
    """What trl.kernels.ChunkedLogProbFunction is to its callers: `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,  # of TRL's tiles; r1fast has its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:  # logprobs and the four of OUTPUTS, each (N,) or None
        head = _head_arguments(temperature, final_logit_softcapping, logit_scale)

        def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            found = linear_logprobs(
                hidden, weight, targets, bias=bias, return_entropy="entropy" in outputs, **head
            )
            return found if isinstance(found, tuple) else (found,)

        logprobs, *entropy = run_head(op, hidden, weight, bias)
        rest = (None, None, None)
        if {*outputs} & {*OUTPUTS[1:]}:
            rest = _statistics(hidden, weight, bias, targets, outputs, **head)
        return logprobs, entropy[0] if entropy else None, *rest


def _head_arguments(temperature: float, softcap: float | None, scale: float) -> dict[str, Any]:
    """TRL's z = cap(scale u) / temperature, with the scale inside the other two."""
    if not scale > 0:
        raise ValueError(f"logit_scale must be above 0, got {scale}")
    return {
        "temperature": temperature / scale,
        "softcap": None if softcap is None else softcap / scale,
    }


@torch.no_grad()
def _statistics(
    hidden, weight, bias, targets, outputs, temperature, softcap
) -> tuple[Tensor | None, ...]:  # log sum p^2, mean logit, is top 1: each (N,) or None
    """What no loss of GRPO needs: one more pass over the logits, a few rows at a time."""

    def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        parts = []
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            z = torch.nn.functional.linear(h, weight, bias).float()
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            z /= temperature
            concentration = (2 * z).logsumexp(1) - 2 * z.logsumexp(1)
            parts.append((concentration, z.mean(1), z.argmax(1) == y))
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    found = run_head(op, hidden.detach(), weight.detach(), bias)
    return tuple(x if name in outputs else None for name, x in zip(OUTPUTS[1:], found, strict=True))


class _FusedHead:
    """Stands in for ChunkedLogProbFunction during one loss: makes the gradients in the forward.

    The log-probabilities that leave are constants but for the first, which carries the loss's
    gradient: sum(logprobs) - sum(logprobs).detach() is 0 with the gradient of the loss. So the
    gradient leaves the model through its output, where wrappers such as FSDP wait for it.
    """

    def __init__(self, **loss):
        self.loss, self.value = loss, None

    def apply(
        self, hidden, weight, bias, targets, temperature, chunk_size,
        final_logit_softcapping=None, logit_scale=1.0, outputs=OUTPUTS,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        head = _head_arguments(temperature, final_logit_softcapping, logit_scale)

        def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            loss, metrics = padded_loss(
                hidden, weight, bias, targets, want=("logprobs", "entropy"), **head, **self.loss
            )
            return loss, metrics["logprobs"], metrics["entropy"]

        loss, logprobs, entropy = run_head(op, hidden, weight, bias)
        self.value = loss.detach()
        if len(logprobs):
            carrier = (loss - self.value)[None]
            logprobs = logprobs.detach() + torch.cat([carrier, loss.new_zeros(len(logprobs) - 1)])
        else:
            logprobs = loss + loss.new_zeros(0)
        return logprobs, entropy.detach(), None, None, None


class _Hooks:
    """What `patch` puts in place of two methods of a trainer."""

    def __init__(self, trainer, utils, fused: bool):
        self.trainer, self.utils, self.fused = trainer, utils, fused
        self.score: Callable = trainer._get_per_token_logps_and_entropies
        self.compute_loss: Callable = trainer._compute_loss
        self.head: _FusedHead | None = None
        self.carrier: Tensor | None = None

    @contextlib.contextmanager
    def _own_head(self) -> Iterator[None]:
        utils = self.utils
        theirs = utils._ChunkedLogProbFunction, utils._use_triton
        # off CUDA, TRL scores every position, prompts and padding too; r1fast takes the rows that count
        utils._ChunkedLogProbFunction = self.head or ChunkedLogProbFunction
        utils._use_triton = lambda device: True
        try:
            yield
        finally:
            utils._ChunkedLogProbFunction, utils._use_triton = theirs

    def scored(self, model, *args, **kwargs):
        with self._own_head():
            logprobs, entropies, aux_loss = self.score(model, *args, **kwargs)
        if self.head is not None:
            self.carrier = logprobs.sum()
            logprobs = logprobs.detach()
        return logprobs, entropies, aux_loss

    def loss(self, model, inputs):
        if not self.fused:
            return self.compute_loss(model, inputs)
        self.head = _FusedHead(**_loss_arguments(self.trainer, inputs))
        try:
            value = self.compute_loss(model, inputs).detach()
            self._compare(value)
            return value + (self.carrier - self.carrier.detach()).to(value.dtype)
        finally:
            self.head = self.carrier = None

    def _compare(self, value: Tensor) -> None:
        """The gradient is of the loss that TRL means: the values agree but for rounding."""
        ours, loss = self.head.value, self.head.loss
        size = (loss["weights"] * loss["advantages"].abs()).sum() + value.abs() + 1e-2
        if not bool((ours - value).abs() <= 1e-3 * size):
            raise RuntimeError(
                f"r1fast's loss is {ours.item():.6g}, TRL's is {value.item():.6g}: please report "
                "this configuration. patch(trainer, loss='logprobs') trains on TRL's"
            )


def patch(trainer, loss: str = "auto"):
    """Make this trl.GRPOTrainer train on r1fast's ops; returns it. `unpatch` undoes it.

    `loss`: "fused" makes the gradient with `fused_grpo_loss`, "logprobs" only scores with
    `linear_logprobs` and leaves the loss to autograd; "auto" fuses where the configuration allows.

    Raises ValueError for what r1fast cannot do (models with images, adapters on the head, ZeRO-3,
    torch.compile, another TRL) and says what would do.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    utils = _trl_utils(trainer)
    _refuse_unsupported(trainer)
    reasons = [] if loss == "logprobs" else _not_fused_because(trainer)
    if loss == "fused" and reasons:
        raise ValueError(
            f"this configuration's loss cannot be fused: {'; '.join(reasons)}. loss='auto' or "
            "'logprobs' trains it on linear_logprobs"
        )
    if reasons:
        logging.getLogger(__name__).warning(
            "the loss is TRL's own, on r1fast's log-probabilities: %s", "; ".join(reasons)
        )
    unpatch(trainer)
    hooks = _Hooks(trainer, utils, fused=loss != "logprobs" and not reasons)
    trainer._r1fast = hooks
    trainer._get_per_token_logps_and_entropies = hooks.scored
    trainer._compute_loss = hooks.loss
    return trainer


def unpatch(trainer):
    """The trainer as it was before `patch`; returns it."""
    if vars(trainer).pop("_r1fast", None) is not None:
        del trainer._get_per_token_logps_and_entropies, trainer._compute_loss
    return trainer


def _trl_utils(trainer):
    """trl.trainer.utils, once everything that the hooks rely on was found."""
    try:
        version = importlib.metadata.version("trl")
        utils = importlib.import_module("trl.trainer.utils")
        known = importlib.import_module("trl").GRPOTrainer
    except ImportError as error:
        raise ValueError(f"TRL cannot be imported ({error}): pip install 'r1fast[peers]'") from None
    if not isinstance(trainer, known):
        raise ValueError(f"patch takes a trl.GRPOTrainer, got {type(trainer).__name__}")
    theirs = getattr(utils, "_ChunkedLogProbFunction", None)
    missing = [
        name
        for holder, names in (
            (utils, ("_ChunkedLogProbFunction", "_use_triton", "add_fused_lm_head")),
            (trainer, ("_get_per_token_logps_and_entropies", "_compute_loss")),
        )
        for name in names
        if not hasattr(holder, name)
    ]
    if missing:
        raise ValueError(f"TRL {version} has no {', '.join(missing)}: r1fast knows TRL 1.16")
    found = list(inspect.signature(theirs.forward).parameters)
    if found != HEAD_ARGUMENTS:
        raise ValueError(
            f"the chunked log-probabilities of TRL {version} take {', '.join(found[1:])}; r1fast "
            f"knows TRL 1.16, where they take {', '.join(HEAD_ARGUMENTS[1:])}"
        )
    return utils


def _refuse_unsupported(trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model.config.get_text_config() is not model.config:
        raise ValueError(
            f"{type(model).__name__} is not a text model: r1fast packs text only; train it unpatched"
        )
    head = model.get_output_embeddings()
    if type(head).__module__.startswith("peft."):
        raise ValueError(
            f"the head is a PEFT {type(head).__name__}: r1fast takes its plain weight. Leave "
            "lm_head out of target_modules and modules_to_save"
        )
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 takes the head's weight away before the backward: use ZeRO-2 or FSDP"
        )
    if trainer.args.torch_compile:
        raise ValueError("torch_compile=True traces the head into its graph: set it to False")


def _not_fused_because(trainer) -> list[str]:
    import trl

    reasons = []
    if trainer.loss_type not in FUSED:
        reasons.append(f"loss_type {trainer.loss_type!r} weighs by the ratio of whole sequences")
    if type(trainer)._compute_loss is not trl.GRPOTrainer._compute_loss:
        reasons.append(f"{type(trainer).__name__} has a _compute_loss of its own")
    if trainer.aux_loss_enabled:
        reasons.append("router_aux_loss_coef adds a loss that is not the head's")
    if trainer.top_entropy_quantile < 1:
        reasons.append("top_entropy_quantile is taken over all processes")
    if trainer.use_adaptive_entropy:
        reasons.append("use_adaptive_entropy changes the bonus as it goes")
    if trainer.off_policy_mask_threshold is not None and trainer.use_vllm:
        reasons.append("off_policy_mask_threshold looks at vLLM's log-probabilities, NaN included")
    adapter = getattr(trainer.accelerator.unwrap_model(trainer.model), "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        reasons.append("prompt-learning adapters pad the labels")
    return reasons


def _loss_arguments(trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """TRL's configuration and batch as `padded_loss` wants them."""
    args, kind, train = trainer.args, trainer.loss_type, trainer.model.training
    present = inputs["completion_mask"].bool()
    mask = present & inputs["tool_mask"].bool() if "tool_mask" in inputs else present
    advantages = inputs["advantages"]
    accumulation = trainer.current_gradient_accumulation_steps if train else 1
    num_items = 1.0
    if kind in ("dapo", "cispo"):  # num_items_in_batch spans the generation batch
        num_items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        num_items = num_items / (args.steps_per_generation if train else 1)
    weights = token_weights(kind, mask, num_items, trainer.max_completion_length) / accumulation
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    return {
        "present": present,
        "mask": mask,
        "advantages": advantages[:, None] if advantages.dim() == 1 else advantages,
        "weights": weights,
        "old_logprobs": inputs.get("old_per_token_logps"),
        "ref_logprobs": inputs["ref_per_token_logps"] if trainer.beta else None,
        "importance_weights": inputs["importance_sampling_ratio"] if corrected else None,
        "loss_type": kind,
        "importance_sampling_level": trainer.importance_sampling_level,
        "clip_eps_low": trainer.epsilon_low,
        "clip_eps_high": trainer.epsilon_high,
        "delta": args.delta,
        "sapo_temperature_pos": args.sapo_temperature_pos,
        "sapo_temperature_neg": args.sapo_temperature_neg,
        "kl_coef": trainer.beta,
        "kl_estimator": "k3_unbiased" if args.use_bias_correction_kl else "k3",
        "entropy_coef": trainer.entropy_coef / accumulation
        if trainer._entropy_bonus_enabled
        else 0.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold,
    }
