"""An evaluation goes on where a kill left it, and what is stored can be graded again without a model."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate import ParityScorer
from tiny import tiny_config, tiny_policy, tiny_problems

from r1fast.evaluate import evaluate, run
from r1fast.evaluate.rescore import rescore, stored_setup
from r1fast.evaluate.row_log import RowLog
from r1fast.evaluate.sample_rows import read_samples
from r1fast.jsonl import read_jsonl

CONFIG = ("--eval.num_samples=3", "--eval.top_p=1.0", "--seed=7")
FILES = ("samples.jsonl", "eval.json", "problems.jsonl", "evaluation.json")
# the n-th row of a log is torn in the middle, and the process is killed
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from test_evaluate import ParityScorer
from tiny import tiny_config, tiny_policy, tiny_problems
from r1fast.evaluate import evaluate, row_log
name, left, folder = sys.argv[1], int(sys.argv[2]), __import__("pathlib").Path(sys.argv[3])
append = row_log.RowLog.append
def killing(self, row):
    global left
    if name in self._file.name:
        left -= 1
        if left < 0:
            self._file.write('{"problem_id": "p')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    append(self, row)
row_log.RowLog.append = killing
config = tiny_config(*CONFIG)
evaluate(tiny_policy(), tiny_problems(5), config, ParityScorer(), folder=folder)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def engine_calls(monkeypatch) -> list[int]:
    """How many samples each call has drawn."""
    drawn: list[int] = []
    sample = run.sample_missing

    def counted(policy, asks, config, sampling, done, on_finish, **options):
        drawn.append(sum(len(ask.seeds) for ask in asks) - len(done))
        sample(policy, asks, config, sampling, done, on_finish, **options)

    monkeypatch.setattr(run, "sample_missing", counted)
    return drawn


def test_killed_twice_it_ends_as_one_that_was_not(tmp_path, engine_calls):
    code = KILLED.replace("*CONFIG", f"*{CONFIG!r}")
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "GOMP_SPINCOUNT": "10000"}
    for name, rows in (("samples.partial", 4), ("graded.partial", 6)):
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(rows), str(tmp_path / "killed")],
            env=env, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "killed" / "samples.jsonl").exists()
        (log,) = (tmp_path / "killed").glob(f"{name}-*.jsonl")
        whole = [json.loads(line) for line in log.read_text().splitlines()[1:-1]]
        assert len(whole) == rows
    policy, problems, config = tiny_policy(), tiny_problems(5), tiny_config(*CONFIG)
    resumed = evaluate(policy, problems, config, ParityScorer(), folder=tmp_path / "killed")
    assert engine_calls == [0]  # all were drawn by the second call
    plain = evaluate(policy, problems, config, ParityScorer(), folder=tmp_path / "plain")
    assert engine_calls == [0, 15]
    assert contents(tmp_path / "killed") == contents(tmp_path / "plain")
    assert resumed == plain
    assert not list((tmp_path / "killed").glob("*.partial-*"))


def test_only_what_is_missing_is_drawn(tmp_path, engine_calls):
    policy, problems = tiny_policy(), tiny_problems(4)

    def go(*overrides, folder="run"):
        config = tiny_config(*CONFIG, *overrides)
        return evaluate(policy, problems, config, ParityScorer(), folder=tmp_path / folder)

    go()
    go()  # the same again
    go("--eval.num_samples=5")
    go("--eval.num_samples=5", folder="at once")
    assert engine_calls == [12, 0, 8, 20]
    assert contents(tmp_path / "run") == contents(tmp_path / "at once")
    go("--eval.temperature=0.7")  # other settings: other samples
    go("--eval.temperature=0.7", "--seed=8")
    assert engine_calls[4:] == [12, 12]
    policy = tiny_policy(seed=1)  # another model
    go("--eval.temperature=0.7", "--seed=8")
    problems = [*problems[:3], tiny_problems(6)[5]]
    go("--eval.temperature=0.7", "--seed=8")
    assert engine_calls[6:] == [12, 3]
    assert len((tmp_path / "run" / "problems.jsonl").read_text().splitlines()) == 4


def test_a_verdict_that_failed_is_asked_for_again(tmp_path):
    class Failing(ParityScorer):
        def score(self, groups, step_from_end=None):
            super().score(groups, step_from_end)
            for reward in (r for g in groups for r in g.rewards[:1]):
                reward.verdict = "error"

    policy, problems, config = tiny_policy(), tiny_problems(3), tiny_config(*CONFIG)
    first = evaluate(policy, problems, config, Failing(), folder=tmp_path)
    assert first["num_errors"] == 3
    seen = []

    class Counting(ParityScorer):
        def score(self, groups, step_from_end=None):
            super().score(groups, step_from_end)
            seen.extend(c.text for g in groups for c in g.completions)

    second = evaluate(policy, problems, config, Counting(), folder=tmp_path)
    assert "num_errors" not in second
    assert len(seen) == 3  # the others' verdicts hold
    assert second["num_samples"] == 9


def test_a_stored_row_says_all_of_a_sample(tmp_path):
    evaluate(tiny_policy(), tiny_problems(2), tiny_config(*CONFIG), ParityScorer(), folder=tmp_path)
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert {
        "prompt_hash",
        "seed",
        "text",
        "finish_reason",
        "extracted",
        "verdict",
        "grader",
    } <= rows[0].keys()
    assert len({row["prompt_hash"] for row in rows}) == 2
    assert len({row["seed"] for row in rows}) == 6
    assert "token_ids" not in rows[0]
    setup = json.loads((tmp_path / "evaluation.json").read_text())
    assert setup["temperature"] == 0.6
    assert setup["top_p"] == 1.0
    assert len(setup["weights"]) == 16


def test_a_log_of_other_work_or_with_rubbish_is_not_used(tmp_path, capsys):
    log = RowLog(tmp_path, "samples", "one")
    log.append({"problem_id": "p", "sample": 0, "text": "é"})
    log.close()
    again = RowLog(tmp_path, "samples", "one")
    assert again.rows == {("p", 0): {"problem_id": "p", "sample": 0, "text": "é"}}
    again.append({"problem_id": "p", "sample": 1})
    again.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"problem_id": "q", "sam')
    torn = RowLog(tmp_path, "samples", "one")
    torn.append({"problem_id": "q", "sample": 0})
    torn.close()
    whole = RowLog(tmp_path, "samples", "one")
    assert list(whole.rows) == [("p", 0), ("p", 1), ("q", 0)]
    whole.close()
    path.write_bytes(
        path.read_bytes().replace(b'"sample": 1}', b'"sample": -1}')
    )  # the second of three
    damaged = RowLog(tmp_path, "samples", "one")
    damaged.append({"problem_id": "q", "sample": 1})
    damaged.close()
    last = RowLog(tmp_path, "samples", "one")
    assert list(last.rows) == [("p", 0), ("q", 0), ("q", 1)]  # what stands behind it is kept
    last.close()
    assert "samples.partial-0.jsonl:3: 'sample' must be a whole number" in capsys.readouterr().err
    other = RowLog(tmp_path, "samples", "two")
    assert other.rows == {}
    other.close()
    assert len(path.read_text().splitlines()) == 1


class Graded(ParityScorer):
    """Says which samples it was given, by problem; right is what the problem's gold or columns say."""

    def __init__(self, version=""):
        super().__init__()
        self.version, self.seen = version, []

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            self.seen += [group.problem.id] * len(group.completions)
            gold = str((group.problem.answer, dict(group.problem.meta)))
            for reward in group.rewards:
                reward.verdict = "correct" if "right" in gold else "wrong"


CHOICES = {"choices": ["yes", "no"]}
CHANGES = [  # (kind, what of a problem is changed, whether its verdicts are given again)
    ("math", {"answer": "right"}, True),
    ("code", {"meta": {"test": "right", "entry_point": "f"}}, True),
    ("choice", {"meta": {"choices": ["right", "no"]}}, True),
    ("if", {"meta": {"instructions": ["right"], "arguments": [{}]}}, True),
    ("qa", {"meta": {"question": "right"}}, True),
    ("open", {"meta": {"question": "q", "baseline": "right"}}, True),
    ("math", {"meta": {"source": "a column that nothing reads"}}, False),
    ("math", {"subset": "other"}, False),
]


@pytest.mark.parametrize(("kind", "change", "again"), CHANGES)
def test_a_verdict_belongs_to_its_problem(tmp_path, engine_calls, capsys, kind, change, again):
    policy, config = tiny_policy(), tiny_config(*CONFIG)
    problems = [replace(p, meta=CHOICES) for p in tiny_problems(3, kind)]
    first = evaluate(policy, problems, config, Graded(), folder=tmp_path)
    assert first["pass@1"] == 0
    problems[1] = replace(problems[1], **change)
    scorer = Graded()
    second = evaluate(policy, problems, config, scorer, folder=tmp_path)
    assert engine_calls == [9, 0]  # no sample is drawn again
    assert scorer.seen == ["p1"] * 3 * again
    assert second["pass@1"] == pytest.approx(again / 3)
    told = "3 stored verdicts are given again: 3 of problems whose answer, tests or other columns"
    assert (told in capsys.readouterr().err) == again
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert [row["answer"] for row in rows[3:6]] == [problems[1].answer] * 3
    assert [row["subset"] for row in rows[3:6]] == [problems[1].subset] * 3
    fresh = evaluate(policy, problems, config, Graded(), folder=tmp_path / "fresh")
    assert contents(tmp_path / "fresh") == contents(tmp_path)
    assert fresh == second


def test_a_verdict_belongs_to_its_grader_and_settings(tmp_path, engine_calls, capsys):
    policy, problems = tiny_policy(), tiny_problems(2)

    def go(scorer, *overrides):
        evaluate(policy, problems, tiny_config(*CONFIG, *overrides), scorer, folder=tmp_path)
        return len(scorer.seen), capsys.readouterr().err

    assert go(Graded("1"))[0] == 6
    assert go(Graded("1")) == (0, "")
    seen, told = go(Graded("2"))
    assert (seen, "6 stored verdicts are given again: 6 of another version" in told) == (6, True)
    seen, told = go(Graded("2"), "--rewards.math_timeout=7")
    assert (seen, "6 under another template or other rewards" in told) == (6, True)
    assert engine_calls == [6, 0, 0, 0]


DAMAGE = [
    (lambda lines: [*lines[:2], lines[2][:-20]], r"samples.jsonl:3: not valid JSON"),
    (lambda lines: ["[]", *lines], r"samples.jsonl:1: expected a JSON object, got list"),
    (lambda lines: [lines[0].replace('"verdict"', '"verdikt"'), *lines], r"samples.jsonl:1: no 'verdict'"),
    (lambda lines: [*lines[:1], changed(lines[1], verdict="great")], r"jsonl:2: 'verdict' must be one of.*'great'"),
    (lambda lines: [changed(lines[0], verdict=None)], r"where kind is math, got null"),
    (lambda lines: [changed(lines[0], num_tokens="x")], r"'num_tokens' must be a whole number from 0, got 'x'"),
    (lambda lines: [changed(lines[0], text=None)], r"'text' must be a string, got None"),
    (lambda lines: [changed(lines[0], score=2)], r"'score' must be a number from 0 to 1 or null, got 2"),
    (lambda lines: [changed(lines[0], instructions=["a"], followed=[])], r"'followed' must have one entry for each of 1"),
    (lambda lines: [changed(lines[0], grades=[1])], r"'grades' must be two whole numbers"),
]  # fmt: skip


def changed(line: str, **columns) -> str:
    return json.dumps(json.loads(line) | columns)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_rows_say_what_to_do_and_nothing_is_lost(tmp_path, engine_calls, damage, message):
    policy, problems, config = tiny_policy(), tiny_problems(2), tiny_config(*CONFIG)
    evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
    whole = contents(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*; correct the line, or delete it"):
        evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
    with pytest.raises(ValueError, match=message):
        rescore(tmp_path, ParityScorer(), stored_setup(tmp_path))
    assert contents(tmp_path) == before
    lines = path.read_text().splitlines(keepends=True)
    number = int(re.search(r":(\d+):", str(error_of(path)))[1])
    path.write_text("".join(lines[: number - 1]))  # the remedy, and more
    evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
    assert contents(tmp_path) == whole
    assert engine_calls[1] == 6 - (number - 1)


def error_of(path: Path) -> ValueError:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_samples(path)
    return caught.value


def test_a_row_that_stands_twice_counts_once(tmp_path, capsys):
    policy, problems, config = tiny_policy(), tiny_problems(2), tiny_config(*CONFIG)
    evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
    whole, path = contents(tmp_path), tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for what in ("evaluate", "rescore"):
        first = changed(lines[0], text="what stands first does not count") + "\n"
        path.write_text("".join([first, *lines[1:], lines[0]]))
        if what == "evaluate":
            evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
        else:
            rescore(tmp_path, ParityScorer(), stored_setup(tmp_path))
        assert contents(tmp_path) == whole
    told = capsys.readouterr().err
    assert "samples.jsonl: 1 samples stand there again (problem 'p0', sample 0, line 7)" in told


def test_nothing_stored_and_other_damaged_files(tmp_path):
    policy, problems, config = tiny_policy(), tiny_problems(2), tiny_config(*CONFIG)
    evaluate(policy, problems, config, ParityScorer(), folder=tmp_path)
    whole = contents(tmp_path)

    def again():
        return rescore(tmp_path, ParityScorer(), stored_setup(tmp_path))

    for name, text, message in (
        ("samples.jsonl", "", "samples.jsonl holds no samples: there is nothing to grade"),
        ("eval.json", "{", "eval.json is not valid JSON.*; delete it"),
        ("evaluation.json", "[]", "evaluation.json must hold a JSON object.*; restore it, or delete"),
        ("evaluation.json", "{}", "evaluation.json lacks template, rewards, .*; restore it"),
        ("problems.jsonl", '{"prompt": 1}', "problems.jsonl:1: prompt, id, kind.*; correct the line"),
        ("problems.jsonl", '{"x": 1}', "problems.jsonl:1: not a problem .* has 'x'; correct the line"),
        ("problems.jsonl", '{"prompt": "p", "id": "p0", "kind": "choice", "answer": "A"}',
         "problems.jsonl:1: 'choices' must be a list"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            again()
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).write_bytes(whole[name])
    assert again()["num_changed"] == 0
    assert contents(tmp_path) == whole


class Judged(Graded):
    """A scorer whose judge gets one request a sample, and is stopped before problem `until`."""

    judge_name = "j"

    def __init__(self, until="", name="j"):
        super().__init__(name)
        self.until, self.judge_name = until, name

    def judge_totals(self):
        return Counter(requests=len(self.seen), prompt_tokens=10 * len(self.seen))

    def score(self, groups, step_from_end=None):
        if any(group.problem.id == self.until for group in groups):
            raise KeyboardInterrupt
        super().score(groups, step_from_end)


def test_what_a_judge_cost_is_that_of_all_calls(tmp_path, monkeypatch, capsys):
    """Of an evaluation that is extended, and of one that was stopped."""
    policy, problems = tiny_policy(), [replace(p, meta=CHOICES) for p in tiny_problems(3, "qa")]
    monkeypatch.setattr(run, "GRADED_AT_ONCE", 1)

    def go(scorer, k, folder="run"):
        config = tiny_config(*CONFIG, f"--eval.num_samples={k}")
        return evaluate(policy, problems, config, scorer, folder=tmp_path / folder).get("judge")

    def cost(requests, name="j"):
        return {"model": name, "requests": requests, "retries": 0, "cached": 0, "failed": 0,
                "prompt_tokens": 10 * requests, "completion_tokens": 0}  # fmt: skip

    assert go(Judged(), 2) == cost(6)
    assert go(Judged(), 2) == cost(6)  # nobody was asked
    with pytest.raises(KeyboardInterrupt):
        go(Judged(until="p2"), 4)
    capsys.readouterr()
    assert go(Judged(), 4) == cost(12) == go(Judged(), 4, "at once")
    assert "the judge got 2 requests in this call, 12 with those before" in capsys.readouterr().err
    assert go(Judged(name="other"), 4) == cost(12, "other")  # all anew: the cost of one judge alone
    with pytest.raises(KeyboardInterrupt):
        go(Judged(until="p2"), 2, "third")
    assert go(Judged(name="other"), 2, "third") == cost(6, "other")


def test_a_sandbox_that_is_missing_is_told_before_sampling(tmp_path, engine_calls):
    class Closed(ParityScorer):
        def prepare(self, problems):
            assert [p.id for p in problems] == ["p0", "p1"]
            raise RuntimeError("no sandbox here")

    policy, problems, config = tiny_policy(), tiny_problems(2), tiny_config(*CONFIG)
    with pytest.raises(RuntimeError, match="no sandbox here"):
        evaluate(policy, problems, config, Closed(), folder=tmp_path)
    assert engine_calls == []
