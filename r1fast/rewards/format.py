"""The format reward: 1.0 for a completion that keeps to its protocol, else 0.0."""

from __future__ import annotations

from r1fast.protocol import SPECIAL_TOKEN, split_completion


def format_reward(
    text: str,
    protocol: str = "think_answer",
    special_token: str = SPECIAL_TOKEN,
    *,
    prompt_opens_think: bool = False,
) -> float:
    """Tags in order, once each, the answer behind them and nothing behind the answer."""
    parts = split_completion(text, protocol, special_token, prompt_opens_think=prompt_opens_think)
    return float(parts.well_formed)
