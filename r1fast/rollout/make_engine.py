"""The rollout engine that a config asks for: r1fast's own, or servers of vLLM."""

from r1fast.config import RolloutConfig
from r1fast.policy import Policy
from r1fast.rollout.engine import Engine
from r1fast.rollout.vllm.engine import VllmEngine


def make_engine(policy: Policy, rollout: RolloutConfig, **options) -> Engine | VllmEngine:
    """Further `options` are those of `Engine`, which servers are not asked."""
    if rollout.engine == "vllm":
        return VllmEngine(policy, rollout)
    return Engine.of(policy, rollout, **options)
