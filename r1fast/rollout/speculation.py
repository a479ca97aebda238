"""Drafts by prompt lookup: what followed the last few tokens where they stood before.

Reasoning repeats itself. A draft is forwarded together with the last token; each position is then drawn
with its own uniform number as ever, and a draft counts where it is what was drawn. So the completion has
the tokens that it would have without speculation, and their distribution is unchanged.
"""

from dataclasses import dataclass

import numpy as np

from r1fast.rollout.rows import Rows


@dataclass(frozen=True, slots=True)
class Speculation:
    """How many tokens are drafted, and how many must agree for it. Raises ValueError below 1."""

    num_draft: int = 4  # tokens drafted at once, at most
    ngram: int = 4  # tokens that must agree: tried first
    min_ngram: int = 2  # and last

    def __post_init__(self):
        if self.num_draft < 1:
            raise ValueError(f"num_draft must be at least 1, got {self.num_draft}")
        if not 1 <= self.min_ngram <= self.ngram:
            raise ValueError(
                f"min_ngram must be in [1, ngram = {self.ngram}], got {self.min_ngram}"
            )

    def drafts(self, rows: Rows, slots: np.ndarray) -> np.ndarray:  # (B, num_draft) int64
        """Tokens that may follow each slot's last one; -1 behind the last of them."""
        drafts = np.full((len(slots), self.num_draft), -1, np.int64)
        for row, slot in enumerate(slots):
            room = min(self.num_draft, rows.limit[slot] - rows.length[slot] - 1)
            # penalties and bans depend on the tokens before, which drafts are not yet
            if room > 0 and not rows.samples[slot].request.sampling.changes_logits:
                found = self.lookup(rows.tokens[slot, : rows.length[slot]])[:room]
                drafts[row, : len(found)] = found
        return drafts

    def lookup(self, tokens: np.ndarray) -> np.ndarray:  # (L,) -> (at most num_draft,)
        """What followed the latest earlier place of the longest n-gram that `tokens` end with."""
        L = len(tokens)
        ends = np.flatnonzero(tokens[: L - 1] == tokens[-1]) + 1  # each is where something followed
        best = ends if self.min_ngram == 1 else ends[:0]
        for n in range(2, self.ngram + 1):
            ends = ends[ends >= n]
            ends = ends[tokens[ends - n] == tokens[L - n]]
            if not len(ends):
                break
            if n >= self.min_ngram:
                best = ends
        if not len(best):
            return best
        return tokens[best[-1] : best[-1] + self.num_draft]
