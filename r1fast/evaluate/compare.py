"""Two runs on the same problems: the difference of their scores, and what chance makes of it.

Each problem has both runs' mean scores; d_i is their difference, d = mean(d_i) over N problems.

    interval    the 2.5% and 97.5% quantiles of d over problems drawn with replacement (bootstrap)
    p-value     the share of sign patterns s with |mean(s_i d_i)| >= |d|, two-sided (sign-flip test)

If the runs do not differ, a problem's difference is as likely to have the other sign. All 2^m patterns
of the m problems that differ are counted up to m = 15, else R are drawn: (1 + count) / (1 + R). So p is
never below 2^(1-m): one problem gives 1. The bootstrap knows only the problems it has seen: an interval
of few is too narrow, and there is none of one.

The run-to-run error is that of d when both models answer the same problems once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from r1fast.evaluate.sample_rows import read_samples
from r1fast.evaluate.statistics import by_problem, error_of_mean, mean, run_error, score_of

CHUNK = 1 << 22  # draws held in memory at once
COMPARED = ("problem_id", "sample", "subset", "prompt", "answer", "verdict", "num_tokens")
SAME = ("prompt", "answer", "problem_hash")  # of a problem in both runs
MAX_EXACT = 15  # problems that differ, up to which all sign patterns are counted
FEW = 20  # problems below which an interval is said to be too narrow


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured of b - a over N problems."""

    num_problems: int
    mean_a: float
    mean_b: float
    difference: float
    low: float | None  # of the 95% interval; None for one problem
    high: float | None
    p_value: float
    stderr: float | None  # over problems
    run_stderr: float | None  # of repeated runs on the same problems
    num_better: int  # problems on which b scores higher
    num_worse: int
    note: str  # what is to be known of interval and p-value of few problems; else ""


def compare_scores(
    a: Sequence[Sequence[float]],  # N problems, any number of samples each
    b: Sequence[Sequence[float]],  # the same problems
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Raises ValueError where there is no problem, or not the same number of them."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a comparison needs the same problems, got {len(a)} and {len(b)}")
    means_a, means_b = (np.array([math.fsum(v) / len(v) for v in side]) for side in (a, b))
    d = means_b - means_a  # (N,)
    difference = math.fsum(d) / len(d)
    low = high = None
    if len(d) > 1:
        low, high = map(float, np.quantile(resampled_means(d, num_resamples, seed), [0.025, 0.975]))
    errors = run_error(a), run_error(b)
    known = None not in errors
    return Comparison(
        num_problems=len(d),
        mean_a=math.fsum(means_a) / len(d),
        mean_b=math.fsum(means_b) / len(d),
        difference=difference,
        low=low,
        high=high,
        p_value=sign_flip_p_value(d, num_resamples, seed),
        stderr=error_of_mean(d.tolist()),
        run_stderr=math.hypot(*(e for e in errors if e is not None)) if known else None,
        num_better=int((d > 0).sum()),
        num_worse=int((d < 0).sum()),
        note=_note(len(d)),
    )


def _note(n: int) -> str:
    if n >= FEW:
        return ""
    return f"{n} problems: the interval is too narrow" if n > 1 else "1 problem: no interval"


def sign_flip_p_value(d: np.ndarray, num_resamples: int, seed: int) -> float:  # (N,)
    """How often differences with random signs are as far from 0 as these; 1 where none differs."""
    d = d[d != 0]  # (m,)
    m = len(d)
    # equal up to rounding counts as equal: sums in another order
    bar = abs(math.fsum(d)) - 1e-12 * max(m, 1)
    if m <= MAX_EXACT:
        flips = np.arange(1 << m)[:, None] >> np.arange(m) & 1  # (2^m, m)
        return float((np.abs((1 - 2 * flips) @ d) >= bar).mean())
    rng = np.random.default_rng(seed)
    rows = max(CHUNK // m, 1)
    count = 0
    for start in range(0, num_resamples, rows):
        flips = rng.integers(0, 2, (min(rows, num_resamples - start), m), dtype=np.int8)
        count += int((np.abs((1 - 2 * flips) @ d) >= bar).sum())
    return (1 + count) / (1 + num_resamples)


def resampled_means(d: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:  # (N,) -> (R,)
    """Means of N values drawn with replacement, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows = max(CHUNK // len(d), 1)
    parts = []
    for start in range(0, num_resamples, rows):
        size = (min(rows, num_resamples - start), len(d))
        parts.append(d[rng.integers(0, len(d), size)].mean(1))
    return np.concatenate(parts)


def compare_runs(folder_a: str | Path, folder_b: str | Path, *, seed: int = 0) -> dict:
    """{"all": ..., "subsets": {name: ...}, ...} of two evaluated run folders.

    Raises ValueError where a folder has no samples, where the problems differ (it says which), or
    where one problem has another question or gold in the two.
    """
    rows = [_rows(Path(folder)) for folder in (folder_a, folder_b)]
    grouped = [by_problem(r) for r in rows]
    _check_same(grouped, (folder_a, folder_b))
    scores = [
        {p: [x for r in s if (x := score_of(r)) is not None] for p, s in side.items()}
        for side in grouped
    ]
    ids = [p for p in grouped[0] if scores[0][p] and scores[1][p]]
    if not ids:
        raise ValueError("no problem has a verdict in both runs: there is nothing to compare")

    def compared(of: Sequence[str]) -> dict:
        return asdict(
            compare_scores([scores[0][p] for p in of], [scores[1][p] for p in of], seed=seed)
        )

    subsets: dict[str, list[str]] = {}
    for p in ids:
        if name := grouped[0][p][0]["subset"]:
            subsets.setdefault(name, []).append(p)
    lengths = [mean(r["num_tokens"] for r in side) for side in rows]
    return {
        "a": str(folder_a),
        "b": str(folder_b),
        "score": "win rate" if any(r.get("outcome") for r in rows[0]) else "pass@1",
        "num_left_out": len(grouped[0]) - len(ids),
        "same_grader": len({frozenset(r.get("grader", "") for r in side) for side in rows}) == 1,
        "mean_length_a": lengths[0],
        "mean_length_b": lengths[1],
        "all": compared(ids),
        "subsets": {name: compared(of) for name, of in sorted(subsets.items())},
    }


def _rows(folder: Path) -> list[dict]:
    path = folder / "samples.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no samples.jsonl: it is no evaluated run folder")
    return read_samples(path, COMPARED)


def _check_same(grouped: Sequence[Mapping[str, list[dict]]], names: Sequence[str | Path]) -> None:
    a, b = grouped
    for only, name in ((a.keys() - b.keys(), names[0]), (b.keys() - a.keys(), names[1])):
        if only:
            some = ", ".join(sorted(only)[:5]) + ", ..." * (len(only) > 5)
            raise ValueError(
                f"the runs have different problems: {len(only)} only in {name} ({some}); evaluate both on "
                "the same file"
            )
    differ = [p for p in a if any(a[p][0].get(key) != b[p][0].get(key) for key in SAME)]
    if differ:
        some = ", ".join(differ[:5]) + ", ..." * (len(differ) > 5)
        raise ValueError(
            f"{len(differ)} problems have the same id but another question, gold answer, tests or "
            f"baseline in the two runs: {some}; evaluate both on the same file (samples are kept)"
        )
