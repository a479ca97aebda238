"""Preference rewards for general prompts: helpfulness sees the summary, safety the whole response.

A model is any callable from pairs of (prompt, response) to scores; nothing is standardised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from r1fast.config import TemplateConfig
from r1fast.protocol import split_completion

ScoreFn = Callable[[list[tuple[str, str]]], list[float]]


class PreferenceRewards:
    """Scores completions with a helpfulness model, a safety model, or both."""

    def __init__(
        self,
        template: TemplateConfig,
        *,
        helpfulness: ScoreFn | None = None,
        safety: ScoreFn | None = None,
    ):
        self.template = template
        self.helpfulness = helpfulness
        self.safety = safety

    def score_helpfulness(
        self, prompts: Sequence[str], texts: Sequence[str], *, prompt_opens_think: bool = False
    ) -> list[float | None] | None:
        """On the summary only (arXiv 2501.12948, 2.3.4); None for a completion without one.

        Returns None where there is no such model.
        """
        if self.helpfulness is None:
            return None
        summaries = [
            split_completion(
                text,
                self.template.protocol,
                self.template.special_token,
                prompt_opens_think=prompt_opens_think,
            ).summary
            for text in texts
        ]
        rows = [i for i, summary in enumerate(summaries) if summary]
        pairs = [(prompts[i], summaries[i] or "") for i in rows]
        scores: list[float | None] = [None] * len(texts)
        for i, score in zip(rows, run_model("helpfulness", self.helpfulness, pairs), strict=True):
            scores[i] = score
        return scores

    def score_safety(
        self, prompts: Sequence[str], texts: Sequence[str]
    ) -> list[float | None] | None:
        """On the whole response, the reasoning included; None where there is no such model."""
        if self.safety is None:
            return None
        return list(run_model("safety", self.safety, list(zip(prompts, texts, strict=True))))


def run_model(name: str, score_fn: ScoreFn, pairs: list[tuple[str, str]]) -> list[float]:
    """The scores of `pairs`; ValueError where the model gives too few, too many or no numbers."""
    if not pairs:
        return []
    scores = [float(s) for s in score_fn(pairs)]
    if len(scores) != len(pairs):
        raise ValueError(f"the {name} model gave {len(scores)} scores for {len(pairs)} responses")
    if bad := [i for i, s in enumerate(scores) if not math.isfinite(s)]:
        raise ValueError(
            f"the {name} model gave {scores[bad[0]]} for response {bad[0]} "
            f"({len(bad)} of {len(pairs)} are no finite numbers): {pairs[bad[0]][1][:80]!r}"
        )
    return scores
