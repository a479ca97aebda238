"""The numbers of a rollout: sums that add over ranks, and the metrics made of them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from r1fast.types import VERDICTS, RolloutGroup

REFLECTION_WORDS = ("wait", "re-check", "recheck", "let me check", "verify")


def rollout_metrics(
    groups: Sequence[RolloutGroup], words: Sequence[str] = REFLECTION_WORDS
) -> dict[str, float]:
    """Every metric that the rollout alone determines (one process)."""
    names = {name for g in groups for reward in g.rewards for name in reward.parts}
    sums = rollout_sums(groups, sorted(names), words)
    return finish_rollout_metrics(sums, *rollout_extremes(groups))


def rollout_sums(
    groups: Sequence[RolloutGroup],
    part_names: Sequence[str],
    words: Sequence[str] = REFLECTION_WORDS,
) -> dict[str, float]:
    """Sums and counts to add over ranks (in float64), the same keys in the same order everywhere.

    `part_names`: the names of all rewards of the run, whether or not they apply to these problems.
    """
    names = ["groups", "zero_std_groups", "scored_groups", "group_std", "completions", "scored"]
    names += ["reward", "length", "clipped", "terminated_length", "wait", "verified"]
    names += ["verified_length", "verified_wait"]
    names += [f"verdict/{verdict}" for verdict in VERDICTS]
    names += [f"part/{name}/{kind}" for name in part_names for kind in ("count", "sum", "square")]
    sums = dict.fromkeys(names, 0.0)
    pattern = reflection_pattern(tuple(words))
    for group in groups:
        sums["groups"] += 1
        for completion in group.completions:
            length = len(completion.token_ids)
            clipped = completion.finish_reason == "length"
            sums["completions"] += 1
            sums["length"] += length
            sums["clipped"] += clipped
            sums["terminated_length"] += 0 if clipped else length
            sums["wait"] += pattern.search(completion.text) is not None
        totals = [reward.total for reward in group.rewards]
        if totals:
            sums["scored_groups"] += 1
            sums["zero_std_groups"] += max(totals) - min(totals) < 1e-8
            sums["group_std"] += _sample_std(len(totals), sum(totals), sum(t * t for t in totals))
        for completion, reward in zip(group.completions, group.rewards, strict=False):
            sums["scored"] += 1
            sums["reward"] += reward.total
            if reward.verdict is not None:
                sums["verified"] += 1
                sums["verified_length"] += len(completion.token_ids)
                sums["verified_wait"] += pattern.search(completion.text) is not None
                sums[f"verdict/{reward.verdict}"] += 1
            for name, value in reward.parts.items():
                if value is not None:
                    sums[f"part/{name}/count"] += 1
                    sums[f"part/{name}/sum"] += value
                    sums[f"part/{name}/square"] += value * value
    return sums


def rollout_extremes(groups: Sequence[RolloutGroup]) -> tuple[float, float]:
    """(shortest, longest) completion; (inf, -inf) of none, so that min and max over ranks work."""
    lengths = [len(completion.token_ids) for g in groups for completion in g.completions]
    return float(min(lengths, default=math.inf)), float(max(lengths, default=-math.inf))


def version_lag(groups: Sequence[RolloutGroup], lag: Callable[[int], int]) -> list[int]:
    """[summed over tokens, tokens, largest] of how far the oldest weights of each completion are behind."""
    completions = [c for group in groups for c in group.completions]
    lags = [lag(c.weight_versions[0]) for c in completions]
    lengths = [len(c.token_ids) for c in completions]
    weighed = [n * length for n, length in zip(lags, lengths, strict=True)]
    return [sum(weighed), sum(lengths), max(lags, default=0)]


def finish_version_lag(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Metrics of what `version_lag` gave on all ranks."""
    total, tokens, largest = zip(*ranks, strict=True)
    mean = sum(total) / max(sum(tokens), 1)
    return {"vllm/version_lag": mean, "vllm/version_lag_max": float(max(largest))}


def finish_rollout_metrics(
    sums: Mapping[str, float], min_length: float = math.inf, max_length: float = -math.inf
) -> dict[str, float]:
    """Metrics from the sums of all ranks. What was never counted is left out."""
    row: dict[str, float] = {}

    def mean(name: str, total: str, count: str) -> None:
        if sums[count]:
            row[name] = sums[total] / sums[count]

    mean("reward", "reward", "scored")
    mean("reward_std", "group_std", "scored_groups")
    mean("frac_reward_zero_std", "zero_std_groups", "scored_groups")
    for key in sums:
        if not (key.startswith("part/") and key.endswith("/count")) or not sums[key]:
            continue
        name = key.removeprefix("part/").removesuffix("/count")
        count, total, square = (sums[f"part/{name}/{kind}"] for kind in ("count", "sum", "square"))
        row[f"rewards/{name}/mean"] = total / count
        row[f"rewards/{name}/std"] = _sample_std(count, total, square)
        if name == "language":
            row["language_share"] = total / count
    mean("completions/mean_length", "length", "completions")
    if math.isfinite(min_length) and math.isfinite(max_length):
        row["completions/min_length"], row["completions/max_length"] = min_length, max_length
    if stopped := sums["completions"] - sums["clipped"]:
        row["completions/mean_terminated_length"] = sums["terminated_length"] / stopped
    mean("completions/clipped_ratio", "clipped", "completions")
    for verdict in VERDICTS:
        mean(f"verdicts/{verdict}", f"verdict/{verdict}", "verified")
    mean("completions/mean_verified_length", "verified_length", "verified")
    # answers to general prompts would dilute it; where nothing is verified, of all completions
    mean("wait_rate", "wait", "completions")
    mean("wait_rate", "verified_wait", "verified")
    return row


def wait_rate(texts: Sequence[str], words: Sequence[str] = REFLECTION_WORDS) -> float:
    """Share of the texts that hold a reflection word; 0 of none."""
    pattern = reflection_pattern(tuple(words))
    return sum(pattern.search(text) is not None for text in texts) / max(len(texts), 1)


@functools.cache
def reflection_pattern(words: tuple[str, ...] = REFLECTION_WORDS) -> re.Pattern[str]:
    """Any of the words as a whole word, in any case."""
    options = "|".join(r"\s+".join(map(re.escape, word.split())) for word in words) or r"(?!)"
    return re.compile(rf"(?<!\w)(?:{options})(?!\w)", re.IGNORECASE)


def _sample_std(count: float, total: float, square: float) -> float:
    """With N - 1, as TRL; 0 of a single value."""
    if count < 2:
        return 0.0
    return math.sqrt(max(square - total * total / count, 0.0) / (count - 1))
