"""The options of the policy losses: names, defaults, sources, and what goes with what."""

import math
from dataclasses import dataclass

POLICY_OF = {  # loss type -> the branch of _token_loss
    "grpo": "clip", "bnpo": "clip", "dapo": "clip", "dr_grpo": "clip", "gspo": "clip",
    "luspo": "clip", "cispo": "cispo", "sapo": "sapo",
}  # fmt: skip
LOSS_TYPES = tuple(POLICY_OF)
SEQUENCE_LOSSES = ("gspo", "luspo")  # their ratio is the sequence's
KL_ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased")
CORRECTIONS = (
    "token_truncate", "token_mask",  # TIS, IcePop
    "sequence_truncate", "sequence_mask",
    "geometric_truncate", "geometric_mask",
)  # fmt: skip


@dataclass(frozen=True)
class PolicyLossOptions:
    """Which loss. Raises ValueError for an unknown name or a value that makes no sense."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"  # gspo and luspo: always "sequence"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    delta: float | None = None  # upper clamp of r whatever the sign of A (INTELLECT-2)
    dual_clip: float | None = None  # for A < 0 the loss is at most -dual_clip A (1912.09729)
    # clip(r, 1 - low, 1 + high), or "absolute": min(r, high). MiniMax-M1 has no lower bound: low = 1
    cispo_clip: str = "relative"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    kl_coef: float = 0.0
    kl_estimator: str = "k3"  # k3_unbiased is unbiased with the ratio of a token, not of a sequence
    kl_in: str = "loss"  # or "reward": A - kl_coef times the sequence's summed estimator
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0  # the share of tokens, by entropy, that learn (2506.01939)
    off_policy_mask_threshold: float | None = None  # DeepSeek-V3.2: drops A < 0 beyond this mean KL
    # of old / rollout probability; TIS: token_truncate; IcePop: token_mask, within [0.5, 5] there
    rollout_correction: str | None = None
    rollout_clip_min: float | None = None
    rollout_clip_max: float | None = 2.0

    def __post_init__(self):
        for name, known in (
            ("loss_type", LOSS_TYPES),
            ("importance_sampling_level", ("token", "sequence")),
            ("cispo_clip", ("relative", "absolute")),
            ("kl_estimator", KL_ESTIMATORS),
            ("kl_in", ("loss", "reward")),
            ("rollout_correction", (None, *CORRECTIONS)),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.loss_type in SEQUENCE_LOSSES:
            object.__setattr__(self, "importance_sampling_level", "sequence")
        elif self.importance_sampling_level == "sequence" and self.loss_type in ("cispo", "sapo"):
            raise ValueError(
                f"loss_type {self.loss_type!r} is defined per token: "
                "importance_sampling_level must be 'token', got 'sequence'"
            )
        for name, low, strict in (
            ("clip_eps_low", 0, False),
            ("clip_eps_high", 0, False),
            ("delta", 0, True),
            ("dual_clip", 1, True),
            ("sapo_temperature_pos", 0, True),
            ("sapo_temperature_neg", 0, True),
            ("kl_coef", 0, False),
            ("off_policy_mask_threshold", 0, False),
            ("rollout_clip_min", 0, False),
            ("rollout_clip_max", 0, True),
        ):
            value = getattr(self, name)
            if value is not None and not (value > low if strict else value >= low):
                raise ValueError(
                    f"{name} must be {'above' if strict else 'at least'} {low}, got {value}"
                )
        for name in ("entropy_coef", "kl_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        low, high = self.rollout_clip_min, self.rollout_clip_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"rollout_clip_min = {low} is above rollout_clip_max = {high}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile must be in (0, 1], got {self.top_entropy_quantile}"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k3_unbiased":
            raise ValueError("kl_estimator k3_unbiased weighs a gradient: it needs kl_in='loss'")

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef != 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef != 0 and self.kl_in == "reward"

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    @property
    def learns_by_advantage_alone(self) -> bool:
        """Whether the gradient of a sequence without advantage is exactly 0, whatever its tokens."""
        return self.kl_coef == 0 and not self.needs_entropy

    @property
    def looks_at_sequences(self) -> bool:
        """Whether a token's loss depends on other tokens of its sequence."""
        return (
            self.importance_sampling_level == "sequence"
            or self.off_policy_mask_threshold is not None
            or self.kl_in_reward
            or (self.rollout_correction is not None and "token" not in self.rollout_correction)
        )

    @property
    def coupling(self) -> str:
        """The rows that must be known together before one gradient is: token, sequence or batch."""
        if self.top_entropy_quantile < 1:
            return "batch"
        return "sequence" if self.looks_at_sequences else "token"
