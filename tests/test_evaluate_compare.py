"""Two runs compared, against cases whose answer is known."""

import math
import random
from itertools import product

import numpy as np
import pytest

from r1fast.evaluate.compare import compare_runs, compare_scores, resampled_means
from r1fast.jsonl import write_jsonl


def test_against_all_resamples_of_a_small_case():
    """Four problems have 4^4 resamples, each as likely: interval and p-value can be counted."""
    a, b = [[0, 0], [0, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [1, 1], [0, 1]]
    d = np.array([1, 0.5, 0, 0.5])
    every = np.array([np.mean(draw) for draw in product(d, repeat=4)])
    exact_p = np.mean(np.abs(every - 0.5) >= 0.5 - 1e-12)
    found = compare_scores(a, b, num_resamples=40_000)
    assert found.difference == 0.5
    assert (found.mean_a, found.mean_b) == (0.375, 0.875)
    assert (found.num_better, found.num_worse) == (3, 0)
    assert found.p_value == pytest.approx(exact_p, abs=3 * math.sqrt(exact_p / 40_000))
    low, high = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.126)  # one step of 1/8
    assert np.mean(resampled_means(d, 40_000, 0)) == pytest.approx(0.5, abs=0.005)


def test_against_the_normal_law():
    """Many problems: the interval is the mean +- 1.96 standard errors, and p is that of a z-test."""
    rng = random.Random(0)
    a = [[float(rng.random() < 0.5)] for _ in range(2000)]
    b = [[float(rng.random() < 0.53)] for _ in range(2000)]
    found = compare_scores(a, b)
    assert found.stderr is not None
    assert found.low == pytest.approx(
        found.difference - 1.96 * found.stderr, abs=0.1 * found.stderr
    )
    assert found.high == pytest.approx(
        found.difference + 1.96 * found.stderr, abs=0.1 * found.stderr
    )
    z = abs(found.difference) / found.stderr
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert found.run_stderr is None  # one sample a problem


def test_no_difference_rejects_as_often_as_it_should():
    rng = random.Random(1)
    rejected = 0
    for i in range(200):
        a, b = (
            [[float(rng.random() < 0.5) for _ in range(2)] for _ in range(60)] for _ in range(2)
        )
        rejected += compare_scores(a, b, num_resamples=500, seed=i).p_value < 0.05
    assert 2 <= rejected <= 24  # 10 expected


def test_pairing_finds_what_two_separate_errors_would_not():
    """b solves one more problem in ten, whatever the problem's difficulty."""
    a = [[float(i % 2)] * 4 for i in range(200)]
    b = [[1.0] * 4 if i % 10 == 0 else v for i, v in enumerate(a)]
    found = compare_scores(a, b)
    assert found.difference == pytest.approx(0.1)
    assert found.p_value < 0.001
    apart = math.hypot(*(np.std([v[0] for v in side]) / math.sqrt(200) for side in (a, b)))
    assert found.stderr is not None
    assert found.stderr < apart / 2
    same = compare_scores(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_the_same_twice():
    a, b = [[0.0], [1.0], [0.0]], [[1.0], [1.0], [0.0]]
    assert compare_scores(a, b) == compare_scores(a, b)
    assert compare_scores(a, b, seed=1) != compare_scores(b, a, seed=1)
    for bad in ([[1.0]], []):
        with pytest.raises(ValueError, match="needs the same problems, got 3 and"):
            compare_scores(a, bad)


def stored(folder, verdicts: dict[str, str], **changes):
    """One sample a letter of each problem: c correct, w wrong, e error."""
    names = {"c": "correct", "w": "wrong", "e": "error"}
    rows = [
        {"problem_id": p, "subset": p[0], "prompt": f"question {p}", "answer": "1", "sample": j,
         "verdict": names[v], "num_tokens": 10} | changes
        for p, letters in verdicts.items() for j, v in enumerate(letters)
    ]  # fmt: skip
    folder.mkdir()
    write_jsonl(folder / "samples.jsonl", rows)
    return folder


def test_runs(tmp_path):
    a = stored(tmp_path / "a", {"x1": "cw", "x2": "ww", "y1": "cc", "y2": "ec"})
    b = stored(tmp_path / "b", {"x1": "ccc", "x2": "cwc", "y1": "ccw", "y2": "eee"})
    told = compare_runs(a, b)
    assert told["num_left_out"] == 1  # y2 has no verdict in b
    assert told["all"]["mean_a"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert told["all"]["mean_b"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert set(told["subsets"]) == {"x", "y"}
    assert told["subsets"]["y"]["num_problems"] == 1
    assert told["all"]["run_stderr"] > 0
    more = stored(tmp_path / "more", {"x1": "c", "x2": "c", "y1": "c", "y2": "c", "z": "c"})
    with pytest.raises(ValueError, match=r"1 only in .*more \(z\); evaluate both"):
        compare_runs(a, more)
    other = stored(tmp_path / "d", {"x1": "c", "x2": "c", "y1": "c", "y2": "c"}, answer="2")
    with pytest.raises(
        ValueError, match=r"4 problems have the same id but another question or gold .*: x1, x2"
    ):
        compare_runs(a, other)
    with pytest.raises(ValueError, match=r"no samples.jsonl: it is no evaluated run folder"):
        compare_runs(a, tmp_path)
