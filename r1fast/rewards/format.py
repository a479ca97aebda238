"""The format reward: 1.0 for a completion that keeps to its protocol, else 0.0."""

from __future__ import annotations

from typing import Any

from r1fast.protocol import PROTOCOLS, SPECIAL_TOKEN, split_completion
from r1fast.rewards.messages import message_text


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


class FormatReward:
    """`format_reward` as a TRL reward function. ValueError for an unknown protocol."""

    __name__ = "format"  # TRL names the column of a reward by it

    def __init__(
        self,
        protocol: str = "think_answer",
        special_token: str = SPECIAL_TOKEN,
        *,
        prompt_opens_think: bool = False,
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        self.protocol, self.special_token = protocol, special_token
        self.prompt_opens_think = prompt_opens_think

    def __call__(
        self, prompts=None, completions=None, completion_ids=None, **columns: Any
    ) -> list[float]:
        """1.0 or 0.0 for each completion, whatever the columns."""
        return [
            format_reward(
                message_text(completion),
                self.protocol,
                self.special_token,
                prompt_opens_think=self.prompt_opens_think,
            )
            for completion in completions or []
        ]
