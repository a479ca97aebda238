"""Rewards: verifiable, rule-based and preference rewards. Names load when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "RewardScorer": "score",
    "check_problems": "score",
    "MathReward": "math",
    "CodeReward": "code",
    "CodeProblem": "code_problem",
    "read_code_problem": "code_problem",
    "extract_code": "code_answer",
    "Sandbox": "sandbox",
    "SandboxUnavailable": "sandbox",
    "extract_answer": "math",
    "parse_gold": "math",
    "check_problem": "graders",
    "FormatReward": "format",
    "format_reward": "format",
    "LanguageReward": "language",
    "language_consistency": "language",
    "check_language": "language",
    "overlong_penalty": "length",
    "repetition_penalty": "length",
    "PreferenceRewards": "preference",
    "Judge": "judge",
    "PairwiseJudge": "pairwise",
    "ChatEndpoint": "chat",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
