"""An evaluation goes on where a kill left it, and what is stored can be graded again without a model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import ParityScorer
from tiny import tiny_config, tiny_policy, tiny_problems

from r1fast.evaluate import evaluate, run
from r1fast.evaluate.row_log import RowLog
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


def test_a_log_of_other_work_or_with_rubbish_is_not_used(tmp_path):
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
    other = RowLog(tmp_path, "samples", "two")
    assert other.rows == {}
    other.close()
    assert len(path.read_text().splitlines()) == 1
