"""Two runs compared, against cases whose answer is known."""

import math
import random
from itertools import product

import numpy as np
import pytest

from r1fast.evaluate.compare import compare_runs, compare_scores, resampled_means, sign_flip_p_value
from r1fast.jsonl import write_jsonl


def all_signs(d: list[float]) -> float:
    """The p-value of a sign-flip test, by its definition."""
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True)))
        for signs in product((1, -1), repeat=len(d))
    ]
    return sum(x >= abs(sum(d)) - 1e-9 for x in sums) / len(sums)


def test_against_all_resamples_of_a_small_case():
    """Four problems have 4^4 resamples and 2^4 sign patterns: interval and p-value can be counted."""
    a, b = [[0, 0], [0, 1], [1, 1], [0, 0]], [[1, 1], [1, 1], [1, 1], [0, 1]]
    d = np.array([1, 0.5, 0, 0.5])
    every = np.array([np.mean(draw) for draw in product(d, repeat=4)])
    found = compare_scores(a, b, num_resamples=40_000)
    assert found.difference == 0.5
    assert (found.mean_a, found.mean_b) == (0.375, 0.875)
    assert (found.num_better, found.num_worse) == (3, 0)
    assert found.p_value == all_signs(d.tolist()) == 0.25
    low, high = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.126)  # one step of 1/8
    assert np.mean(resampled_means(d, 40_000, 0)) == pytest.approx(0.5, abs=0.005)
    assert found.note == "4 problems: the interval is too narrow"


def test_few_problems_that_moved_alike_prove_nothing():
    """p is never below 2^(1 - problems that differ), and one problem has no interval."""
    one = compare_scores([[1]], [[0]])
    assert (one.low, one.high, one.stderr, one.p_value) == (None, None, None, 1.0)
    assert one.note == "1 problem: no interval"
    for n in (2, 5, 15):
        alike = compare_scores([[0, 0]] * (n + 3), [[1, 1]] * n + [[0, 0]] * 3)  # three are equal
        assert alike.p_value == 2.0 ** (1 - n)
    assert compare_scores([[1], [0]], [[0], [1]]).p_value == 1
    assert compare_scores([[0]] * 20, [[1]] * 20).note == ""


def test_drawn_signs_are_all_signs():
    """Of 15 problems all patterns are counted, of 16 some are drawn: both are the definition's."""
    rng = random.Random(2)
    d = [rng.choice((-1, -0.5, 0.25, 0.5, 1)) for _ in range(16)]
    assert sign_flip_p_value(np.array(d[:9]), 10, 0) == pytest.approx(all_signs(d[:9]))
    p = all_signs(d)
    drawn = sign_flip_p_value(np.array([0.0, *d]), 40_000, 0)
    assert drawn == pytest.approx(p, abs=4 * math.sqrt(p / 40_000))
    far = sign_flip_p_value(np.ones(60), 999, 0)
    assert far == 1 / 1000  # (r + 1) / (R + 1): never 0


def test_against_the_normal_law_and_the_binomial():
    """Many problems: the interval is the mean +- 1.96 standard errors; of 0 and 1 the sign-flip test is
    McNemar's exact one."""
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
    m, most = found.num_better + found.num_worse, max(found.num_better, found.num_worse)
    exact = 2 * sum(math.comb(m, i) for i in range(most, m + 1)) / 2**m
    assert 0.05 < exact < 0.95
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
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
        ValueError, match=r"4 problems have the same id but another question, gold .*: x1, x2"
    ):
        compare_runs(a, other)
    with pytest.raises(ValueError, match=r"no samples.jsonl: it is no evaluated run folder"):
        compare_runs(a, tmp_path)


def test_runs_of_other_tests_or_graders(tmp_path):
    """What decides on a verdict is the same in both, or it is said."""
    a = stored(tmp_path / "a", {"x": "cw"}, problem_hash="one", grader="code-1")
    b = stored(tmp_path / "b", {"x": "cc"}, problem_hash="two", grader="code-1")
    with pytest.raises(ValueError, match=r"tests or baseline in the two runs: x; evaluate both"):
        compare_runs(a, b)
    c = stored(tmp_path / "c", {"x": "cc"}, problem_hash="one", grader="code-2")
    assert compare_runs(a, a)["same_grader"]
    assert not compare_runs(a, c)["same_grader"]


def test_rows_that_stand_twice_or_are_damaged(tmp_path, capsys):
    a = stored(tmp_path / "a", {"x": "ww", "y": "ww"})
    b = stored(tmp_path / "b", {"x": "cc", "y": "ww"})
    path = b / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0].replace("correct", "wrong")]))
    assert compare_runs(a, b)["all"]["mean_b"] == 0.25  # x: the last of its sample 0 and sample 1
    assert "1 samples stand there again (problem 'x', sample 0, line 5)" in capsys.readouterr().err
    path.write_text("".join([*lines[:2], lines[2].replace('"wrong"', '"great"')]))
    with pytest.raises(
        ValueError, match=r"samples.jsonl:3: 'verdict' must be one of .*great.*delete it"
    ):
        compare_runs(a, b)
