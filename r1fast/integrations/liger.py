"""Liger Kernel's fused GRPO loss, call for call, on fused_grpo_loss.

    from r1fast.integrations.liger import LigerFusedLinearGRPOLoss  # for liger_kernel.chunked_loss's

Same arguments, same (loss, metrics), same gradients; liger_kernel 0.8 is the model. What differs:
- `compiled` and `chunk_size` are accepted and mean nothing: there is nothing to compile or to chunk.
- Masked tokens are never read, they may hold NaN. Liger's luspo with token-level ratios adds up the
  loss of padding too; here, as in TRL, only completion tokens count. Without padding both agree.
- vespo off policy asks for one more pass over the logits, since its factor is the whole sequence's.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from r1fast.integrations.mixed_precision import run_head
from r1fast.integrations.padded import POLICY_OF, padded_loss, token_weights
from r1fast.kernels.linear_logprobs import linear_logprobs


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its relatives from hidden states. Arguments as in liger_kernel 0.8.

    Raises ValueError for an unknown loss type or level, for what Liger asserts, and for vespo with
    `use_bias_correction_kl` off policy.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        if loss_type not in POLICY_OF:
            raise ValueError(f"loss_type must be one of {', '.join(POLICY_OF)}, got {loss_type!r}")
        if importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be token or sequence, got "
                f"{importance_sampling_level!r}"
            )
        if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(
                f"loss_type {loss_type!r} is defined per token: importance_sampling_level must be "
                "'token', got 'sequence'"
            )
        for name, value in (
            ("sapo_temperature_pos", sapo_temperature_pos),
            ("sapo_temperature_neg", sapo_temperature_neg),
            ("delta", delta),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,  # (B, C, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, C)
        attention_mask: Tensor,  # (B, C)
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, C)
        old_per_token_logps: Tensor | None = None,  # (B, C)
        ref_input: Tensor | None = None,  # (B, C, D)
        ref_weight: Tensor | None = None,  # (V, D)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B,), (B, 1) or (B, C)
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # (), (kl where beta is not 0, share clipped)
        if _input.dim() != 3:
            raise ValueError(f"_input must be (B, C, D), got {tuple(_input.shape)}")
        if selected_token_ids.shape != _input.shape[:2] or attention_mask.shape != _input.shape[:2]:
            raise ValueError(
                f"selected_token_ids and attention_mask must be (B, C) = {tuple(_input.shape[:2])}, "
                f"got {tuple(selected_token_ids.shape)} and {tuple(attention_mask.shape)}"
            )
        if self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            raise ValueError(
                "use_ref_model=True needs ref_per_token_logps, or ref_input and ref_weight; "
                "use_ref_model=False does without"
            )
        mask = attention_mask.bool()
        ids = selected_token_ids.reshape(-1)
        reference = ref_per_token_logps if self.use_ref_model else None
        if self.use_ref_model and reference is None and self.beta != 0:
            reference = self._logprobs(ref_input, ref_weight, ref_bias, ids, mask)
        # without a reference the policy is its own: the divergence and its gradient are 0
        beta = 0.0 if reference is None else self.beta
        importance = vllm_is_ratio
        if importance is not None:
            importance = _per_token("vllm_is_ratio", importance, mask)
        factor, old = advantages[:, None], old_per_token_logps
        if self.loss_type == "vespo":
            if beta and self.use_bias_correction_kl and old is not None:
                raise ValueError(
                    "vespo with use_bias_correction_kl and old_per_token_logps is not covered: "
                    "leave one of them out, or take loss_type='cispo'"
                )
            new = None
            if old is not None:
                new = self._logprobs(_input, lin_weight, bias, ids, mask)
            factor = factor * self._vespo_factor(advantages, new, old, mask, importance)
            old = importance = None
        report = {}

        def op(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
            loss, metrics = padded_loss(
                hidden, weight, bias, ids, torch.ones_like(mask),
                mask=mask, advantages=factor,
                weights=token_weights(
                    self.loss_type, mask, _num_items(mask, num_items_in_batch),
                    self.max_completion_length,
                ),
                old_logprobs=old, ref_logprobs=reference, importance_weights=importance,
                loss_type=self.loss_type,
                importance_sampling_level=self.importance_sampling_level,
                clip_eps_low=self.epsilon_low, clip_eps_high=self.epsilon_high,
                delta=self.delta, temperature=self.temperature, kl_coef=beta,
                kl_estimator="k3_unbiased" if self.use_bias_correction_kl else "k3",
                sapo_temperature_pos=self.sapo_temperature_pos,
                sapo_temperature_neg=self.sapo_temperature_neg,
            )  # fmt: skip
            report.update(metrics)
            return (loss,)

        (loss,) = run_head(op, _input.reshape(-1, _input.shape[-1]), lin_weight, bias)
        return loss, self._metrics(report, mask, loss.detach().new_zeros(()))

    def _metrics(self, report: dict, mask: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
        share = report.get("num_evaluated", zero) / mask.sum().clamp(min=1)
        clipped = zero
        if self.loss_type not in ("sapo", "vespo"):  # they clip nothing
            clipped = report.get("clip_ratio/region_mean", zero) * share
        kl = report.get("kl", zero) * share
        return (kl, clipped) if self.beta != 0 else (clipped,)

    @torch.no_grad()
    def _logprobs(self, hidden, weight, bias, ids, mask) -> Tensor:  # (B, C), 0 outside the mask
        if weight is None:
            raise ValueError("ref_input needs ref_weight (V, D)")
        rows = mask.reshape(-1)
        (logprobs,) = run_head(
            lambda h, w, b: (linear_logprobs(h, w, ids[rows], bias=b, temperature=self.temperature),),
            hidden.reshape(-1, hidden.shape[-1])[rows], weight, bias,
        )  # fmt: skip
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)

    @torch.no_grad()
    def _vespo_factor(self, advantages, new, old, mask, importance) -> Tensor:  # (B, 1)
        """phi(w) = exp(lambda) w^k exp(-lambda w), w the probability ratio of the whole sequence."""
        floor, ceiling = math.log(1e-8), 20.0
        log_w = torch.zeros(len(mask), 1, device=mask.device)
        if old is not None:
            gap = torch.where(mask, new - old, 0.0)
            log_w += gap.clamp(-ceiling, ceiling).sum(1, keepdim=True)
        if importance is not None:
            logs = importance.float().log().clamp(floor, ceiling)
            per_token = importance.shape[1] > 1
            log_w += (torch.where(mask, logs, 0.0) if per_token else logs).sum(1, keepdim=True)
        log_w = log_w.clamp(floor, ceiling)
        up = advantages[:, None] >= 0
        k = torch.where(up, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(up, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        return phi.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _per_token(name: str, x: Tensor, mask: Tensor) -> Tensor:  # (B, 1) or (B, C)
    x = x[:, None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[0] != len(mask) or x.shape[1] not in (1, mask.shape[1]):
        B, C = mask.shape
        raise ValueError(f"{name} must be ({B},), ({B}, 1) or ({B}, {C}), got {tuple(x.shape)}")
    return x


def _num_items(mask: Tensor, num_items: Tensor | float | None) -> Tensor:  # ()
    """Tokens of the whole batch over the number of ranks."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_items is not None:
        total = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    else:
        total = mask.sum().float()
        if world > 1:
            dist.all_reduce(total)
    return (total / world).clamp(min=1)
