"""r1fast trains reasoning models with GRPO by the DeepSeek-R1 recipe. Names load when first used."""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "linear_logprobs": "r1fast.kernels.linear_logprobs",
    "linear_cross_entropy": "r1fast.kernels.linear_cross_entropy",
    "fused_grpo_loss": "r1fast.kernels.fused_grpo_loss",
    "policy_loss": "r1fast.kernels.policy_loss",
    "PolicyLossOptions": "r1fast.kernels.policy_loss_options",
    "group_advantages": "r1fast.kernels.advantages",
    "varlen_attention": "r1fast.kernels.attention",
    "load_config": "r1fast.config",
    "load_policy": "r1fast.policy",
    "load_problems": "r1fast.data",
    "Engine": "r1fast.rollout.engine",
    "SamplingParams": "r1fast.rollout.sampler",
    "MathReward": "r1fast.rewards.math",
    "RewardScorer": "r1fast.rewards.score",
    "GRPOTrainer": "r1fast.trainer",
    "SFTTrainer": "r1fast.sft",
    "Pipeline": "r1fast.pipeline",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'r1fast' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
