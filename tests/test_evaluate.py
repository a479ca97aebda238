import json
import math
from fractions import Fraction
from itertools import combinations, permutations
from types import SimpleNamespace
from zlib import crc32

import pytest
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.evaluate import evaluate, pass_at_k, sample_groups, summarise, vote
from r1fast.evaluate.statistics import judge_bias
from r1fast.jsonl import read_jsonl
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.sampler import SamplingParams
from r1fast.types import Problem


def row(problem="p", verdict="correct", extracted="1", **changes) -> dict:
    base = {
        "problem_id": problem, "kind": "math", "subset": "", "answer": "1", "text": "",
        "finish_reason": "stop", "num_tokens": 10, "extracted": extracted, "verdict": verdict,
        "format": 1.0, "language_share": None,
    }  # fmt: skip
    return base | changes


def same(a: str, b: str) -> bool:
    return a == b


def test_vote_by_hand():
    right, wrong = row(), row(verdict="wrong", extracted="2")
    other = row(verdict="wrong", extracted="3")
    silent = row(verdict="no_answer", extracted=None)
    assert vote([right, right, wrong], same) == 1
    assert vote([right, wrong, wrong], same) == 0
    assert vote([right, wrong], same) == 0.5  # a tie counts by its share
    assert vote([right, wrong, other], same) == pytest.approx(1 / 3)
    assert vote([right, right, wrong, wrong, other], same) == 0.5
    assert vote([right, silent, silent, silent], same) == 1  # no answer, no vote
    assert vote([silent, silent], same) == 0
    assert vote([], same) == 0


def test_votes_are_joined_by_equivalence():
    half, point5, wrong = row(extracted="1/2"), row(extracted="0.5"), row("p", "wrong", "7")

    def numbers(a, b):
        return eval(a) == eval(b)

    assert vote([half, point5, wrong, wrong, half], numbers) == 1
    assert vote([half, point5, wrong, wrong, half], same) == 0.5


def test_votes_do_not_depend_on_the_order_of_samples():
    """Equality that is not transitive: the classes are its connected components."""
    pairs = {("25", "25%"), ("25%", "0.25"), ("seven", "7")}  # asked one way alone

    def related(a, b):
        return a == b or (a, b) in pairs

    verdicts = {"25": "wrong", "25%": "correct", "0.25": "correct", "4": "wrong"}
    answers = ["25", "25%", "25%", "0.25", "4", "4", "4"]
    orders = set(permutations(answers))
    found = {vote([row("p", verdicts[x], x) for x in order], related) for order in orders}
    assert found == {0.75}  # of the winning class three of four are correct
    assert (
        vote(
            [row("p", "correct", "seven"), row("p", "correct", "7"), row("p", "wrong", "8")],
            related,
        )
        == 1
    )
    assert (
        vote(
            [row("p", "correct", "7"), row("p", "correct", "seven"), row("p", "wrong", "8")],
            related,
        )
        == 1
    )


def test_what_a_grader_failed_on_does_not_vote():
    failed = [row("p", "error", "7")] * 3
    assert vote([*failed, row("p", "correct", "8")], same) == 1
    assert vote(failed, same) == 0


def test_summary_by_hand():
    rows = [
        *[row("a", "correct", "1") for _ in range(3)],
        row("a", "wrong", "2", finish_reason="length", num_tokens=30),
        *[row("b", "wrong", "2", format=0.0) for _ in range(2)],
        row("b", "correct", "1", language_share=0.5),
        row("b", "no_answer", None, language_share=1.0),
        *[row("c", None, None, kind="general", format=None) for _ in range(4)],
    ]
    s = summarise(rows, same)
    assert (s["num_problems"], s["k"], s["num_samples"]) == (3, 4, 12)
    assert s["pass@1"] == 0.5  # mean of 3/4 and 1/4; the general prompt has no verdict
    # variance of {3/4, 1/4} is 1/8, over 2 problems
    assert s["pass@1_stderr"] == pytest.approx(math.sqrt(1 / 8 / 2))
    # each problem's own: 3/16 / (k - 1) = 1/16; mean over 2, error of the mean
    assert s["pass@1_run_stderr"] == pytest.approx(math.sqrt(1 / 16 / 2))
    assert s["cons@k"] == 0.5
    assert s["verdicts"] == {"correct": 4, "wrong": 3, "no_answer": 1}
    assert s["format_rate"] == pytest.approx(6 / 8)
    assert s["language_share"] == pytest.approx(0.75)
    assert s["mean_length"] == pytest.approx((11 * 10 + 30) / 12)
    assert s["clip_rate"] == pytest.approx(1 / 12)
    assert "subsets" not in s


def test_errors_of_one_problem_and_one_sample():
    s = summarise([row()], same)
    assert s["pass@1"] == s["cons@k"] == 1
    assert s["pass@1_stderr"] is s["pass@1_run_stderr"] is None  # nothing to estimate them from
    s = summarise([row("a"), row("a", "wrong"), row("b"), row("b")], same)
    assert s["pass@1_stderr"] == pytest.approx(math.sqrt(1 / 8 / 2))
    assert s["pass@1_run_stderr"] == pytest.approx(math.sqrt(1 / 4) / 2)
    s = summarise([row("a", None, None)], same)
    assert "pass@1" not in s
    assert s["clip_rate"] == 0


def test_the_error_is_that_of_repeated_runs():
    """The run error against the spread of simulated runs with known success rates."""
    import random

    rates, k, rng = [0.1, 0.5, 0.9, 0.7], 8, random.Random(0)

    def one_run() -> dict:
        rows = [
            row(str(i), "correct" if rng.random() < p else "wrong")
            for i, p in enumerate(rates)
            for _ in range(k)
        ]
        return summarise(rows, same)

    runs = [one_run() for _ in range(400)]
    means = [r["pass@1"] for r in runs]
    mean = sum(means) / 400
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 399)
    estimate = math.sqrt(sum(r["pass@1_run_stderr"] ** 2 for r in runs) / 400)
    assert estimate == pytest.approx(spread, rel=0.15)


def test_subsets():
    rows = [row("a", subset="algebra"), row("b", "wrong", subset="geometry"), row("c"),
            row("d", "wrong", subset="algebra", num_tokens=30, finish_reason="length")]  # fmt: skip
    found = summarise(rows, same)["subsets"]
    assert list(found) == ["algebra", "geometry"]
    algebra = found["algebra"]
    assert (algebra["num_problems"], algebra["pass@1"], algebra["cons@k"]) == (2, 0.5, 0.5)
    assert (algebra["mean_length"], algebra["clip_rate"]) == (20, 0.5)
    assert algebra["pass@1_stderr"] == pytest.approx(0.5)
    assert found["geometry"]["pass@1"] == 0


def test_kinds():
    """Each kind's score with the number of problems that it is of; none where all are alike."""
    rows = [row("a"), row("b", "wrong", kind="choice"), row("c", "wrong", kind="if"),
            row("d", "correct", kind="open", outcome="win", score=1.0, summary_chars=1, baseline_chars=1),
            row("e", None, None, kind="general", format=None)]  # fmt: skip
    s = summarise(rows, same)
    assert (s["num_problems"], s["pass@1"], s["cons@k"]) == (5, pytest.approx(1 / 3), 0.5)
    found = {kind: (v["num_problems"], v.get("pass@1"), v.get("win_rate"), v.get("cons@k"))
             for kind, v in s["kinds"].items()}  # fmt: skip
    assert found == {"math": (1, 1, None, 1), "choice": (1, 0, None, 0), "if": (1, 0, None, None),
                     "open": (1, None, 1, None)}  # fmt: skip
    assert "kinds" not in summarise([row("a"), row("e", None, None, kind="general")], same)


def brute_force(n: int, c: int, k: int) -> Fraction:
    draws = list(combinations([True] * c + [False] * (n - c), k))
    return Fraction(sum(map(any, draws)), len(draws))


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_pass_at_k_is_what_counting_all_draws_gives(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(float(brute_force(n, c, k)), rel=1e-14)


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [(64, 3, 16), (1000, 1, 1), (1000, 999, 2), (10**6, 1, 3), (5000, 7, 2500), (5000, 2400, 1)],
)
def test_pass_at_k_keeps_its_digits(n, c, k):
    whole = math.comb(n, k)
    exact = Fraction(whole - math.comb(n - c, k), whole)
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)


def test_pass_at_k_refuses_what_cannot_be():
    for n, c, k in [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)]:
        with pytest.raises(ValueError, match=r"0 <= c <= n and 1 <= k <= n, got"):
            pass_at_k(n, c, k)


def test_the_curve():
    rows = [
        row(p, "correct" if i < c else "wrong") for p, c in (("a", 1), ("b", 6)) for i in range(6)
    ]
    s = summarise(rows, same)
    assert [k for k in s if k.startswith("pass@") and not k.endswith("stderr")] == [
        "pass@1", "pass@2", "pass@4", "pass@6",
    ]  # fmt: skip
    assert s["pass@2"] == pytest.approx((1 / 3 + 1) / 2)
    assert s["pass@6"] == 1
    values = [s["pass@1"], s["pass@2"], s["pass@4"], s["pass@6"]]
    assert values == sorted(values)
    assert s["pass@4_stderr"] == pytest.approx(math.sqrt((1 - 2 / 3) ** 2 / 2 / 2))


def test_a_grader_that_failed_is_no_zero():
    rows = [row("a"), row("a", "error", None), row("a", "error", None), row("b", "wrong"), row("b", "wrong"),
            row("b", "wrong"), *[row("c", "error", None)] * 3]  # fmt: skip
    s = summarise(rows, same)
    assert s["pass@1"] == 0.5
    assert (s["num_errors"], s["num_unjudged_problems"]) == (5, 1)
    assert s["pass@1_run_stderr"] is None  # one judged sample of a tells nothing
    assert "pass@2" not in s
    s = summarise([row("a", "error", None)], same)
    assert "pass@1" not in s
    assert s["num_errors"] == 1


def test_instructions_and_short_answers_and_pairs():
    followed = row("a", kind="if", instructions=["x", "y"], followed=[True, False],
                   followed_loosely=[True, True], verdict="wrong")  # fmt: skip
    s = summarise([followed, followed | {"followed": [True, True], "verdict": "correct"}], same)
    assert (s["prompt_strict"], s["prompt_loose"]) == (0.5, 1.0)
    assert (s["instruction_strict"], s["instruction_loose"]) == (0.75, 1.0)
    assert s["instructions"]["y"] == {"num": 2, "strict": 0.5, "loose": 1.0}
    assert "cons@k" not in s
    short = [
        row(str(i), v, kind="qa") for i, v in enumerate(["correct", "wrong", "no_answer", "error"])
    ]
    s = summarise(short, same)
    assert s["pass@1"] == pytest.approx(1 / 3)
    assert s["attempted_rate"] == pytest.approx(2 / 3)
    assert s["correct_given_attempted"] == 0.5
    assert s["f_score"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    pairs = [
        row(str(i), v, kind="open", outcome=o, score=x, summary_chars=10, baseline_chars=30)
        for i, (o, v, x) in enumerate(
            [
                ("win", "correct", 1.0),
                ("tie", "wrong", 0.5),
                ("loss", "wrong", 0.0),
                ("error", "error", None),
            ]
        )
    ]
    s = summarise(pairs, same)
    assert s["win_rate"] == 0.5
    assert s["win_rate_stderr"] == pytest.approx(0.5 / math.sqrt(3))
    assert s["outcomes"] == {"win": 1, "tie": 1, "loss": 1, "error": 1}
    assert (s["summary_chars"], s["baseline_chars"]) == (10, 30)
    assert "pass@1" not in s
    mixed = summarise([*pairs, row("m", "correct"), row("n", "error")], same)
    assert (mixed["win_rate"], mixed["pass@1"], mixed["num_errors"]) == (0.5, 1.0, 2)


def test_bias_of_a_judge_by_hand():
    """Grades of our answer, shown first and second; what failed counts in neither share."""
    first_wins = [[2, -2], [1, -1]]
    assert judge_bias(first_wins) == {"position_bias": 1.0, "inconsistent": 1.0}
    assert judge_bias([[-1, 1]]) == {"position_bias": -1.0, "inconsistent": 1.0}
    assert judge_bias([[2, 1], [-1, -2], [0, 0]]) == {"position_bias": 0.0, "inconsistent": 0.0}
    assert judge_bias([[1, None], [0, -1]]) == {"position_bias": 2 / 3, "inconsistent": 0.0}
    assert judge_bias([[None, None]]) == judge_bias([]) == {}


class ParityScorer(TokenScorer):
    """Correct where a checksum of the text is even; answers with the rest of it by three."""

    grader = SimpleNamespace(equivalent=same)

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            for c, reward in zip(group.completions, group.rewards, strict=True):
                number = crc32(c.text.encode())
                reward.verdict = "wrong" if number % 2 else "correct"
                reward.answer = str(number % 3)


def test_stored_samples_recompute_the_scores(tmp_path):
    config = tiny_config("--eval.num_samples=4", "--eval.top_p=1.0", "--seed=5")
    result = evaluate(tiny_policy(), tiny_problems(6), config, ParityScorer(), folder=tmp_path)
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert stored == result
    rows = [r for _, r in read_jsonl(tmp_path / "samples.jsonl")]
    assert len(rows) == 24
    settings = {"temperature": 0.6, "top_p": 1.0, "seed": 5}
    assert summarise(rows, same) | settings == stored
    assert 0 < result["pass@1"] < 1
    assert len({r["seed"] for r in rows}) == 24
    again = evaluate(tiny_policy(), tiny_problems(6), config, ParityScorer())
    assert again == result


def test_texts_of_another_protocol_are_told(tmp_path, monkeypatch, capsys):
    seen = []

    def hint(texts, protocol, special_token, opened):
        seen.append((texts, protocol, special_token, opened))
        return f"{len(texts)} texts of another protocol"

    monkeypatch.setattr("r1fast.evaluate.run.protocol_hint", hint)
    config = tiny_config("--template.protocol=cold_start", "--template.special_token=<#>")
    evaluate(tiny_policy(), tiny_problems(2), config, ParityScorer())  # amid training: not told
    assert seen == []
    evaluate(tiny_policy(), tiny_problems(2), config, ParityScorer(), folder=tmp_path)
    ((texts, *read_by),) = seen
    assert texts == [r["text"] for _, r in read_jsonl(tmp_path / "samples.jsonl")]
    assert read_by == ["cold_start", "<#>", []]
    assert f"warning: {len(texts)} texts of another protocol" in capsys.readouterr().err


def test_a_sample_does_not_depend_on_the_other_problems():
    policy, config = tiny_policy(), tiny_config()
    problems, sampling = tiny_problems(5), SamplingParams(max_tokens=8)
    all_of_them = sample_groups(policy, problems, config, sampling, 2, purpose="eval")
    (alone,) = sample_groups(policy, problems[3:4], config, sampling, 2, purpose="eval")
    assert [c.token_ids for c in alone.completions] == [
        c.token_ids for c in all_of_them[3].completions
    ]
    other = sample_groups(policy, problems, config, sampling, 2, purpose="rejection")
    assert other[3].completions[0].token_ids != alone.completions[0].token_ids


def test_long_prompts_are_reported(capsys):
    problems = [*tiny_problems(2), Problem("long " * 60, "1", "long")]
    groups = sample_groups(
        tiny_policy(), problems, tiny_config(), SamplingParams(max_tokens=4), 1, purpose="eval"
    )
    assert [g.problem.id for g in groups] == ["p0", "p1"]
    assert "1 of 3 prompts are longer than 32 tokens" in " ".join(capsys.readouterr().err.split())


def test_with_the_real_scorer_and_greedy(tmp_path):
    config = tiny_config("--eval.temperature=0", "--eval.num_samples=2")
    with RewardScorer(RewardConfig(), TemplateConfig(name="raw"), 8) as scorer:
        result = evaluate(tiny_policy(), tiny_problems(2), config, scorer, folder=tmp_path)
        rows = [r for _, r in read_jsonl(tmp_path / "samples.jsonl")]
        recomputed = summarise(rows, scorer.grader.equivalent)
    assert recomputed.items() <= result.items()
    assert result["pass@1_run_stderr"] == 0  # greedy samples are all the same
    assert rows[0]["text"] == rows[1]["text"]


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match=r"no evaluation problems \(see data\.eval\)"):
        evaluate(tiny_policy(), [], tiny_config(), TokenScorer())
