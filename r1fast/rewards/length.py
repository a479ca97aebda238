"""Length rewards: DAPO's soft penalty for overlong completions, and a penalty for repetition."""

from __future__ import annotations

from collections.abc import Sequence


def overlong_penalty(num_tokens: int, max_tokens: int, cache: int = 0) -> float:
    """0 up to L_max - L_c, then linear down to -1 at L_max (arXiv 2503.14476, eq. 13).

    `cache` is L_c; 0 takes a fifth of `max_tokens`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= cache <= max_tokens:
        raise ValueError(f"the cache must be in [0, {max_tokens}] tokens, got {cache}")
    cache = cache or max(1, max_tokens // 5)
    free = max_tokens - cache
    over = min(1.0, max(0, num_tokens - free) / cache)
    return -over if over else 0.0


def repetition_penalty(tokens: Sequence, ngram: int = 20) -> float:
    """-(share of n-grams that were seen before), in [-1, 0]. Tokens are ids or words."""
    if ngram < 1:
        raise ValueError(f"ngram must be at least 1, got {ngram}")
    num_ngrams = len(tokens) - ngram + 1
    if num_ngrams < 2:
        return 0.0
    distinct = {tuple(tokens[i : i + ngram]) for i in range(num_ngrams)}
    return len(distinct) / num_ngrams - 1.0
