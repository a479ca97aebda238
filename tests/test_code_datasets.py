"""HumanEval and MBPP as a whole through the sandbox: references pass, wrong mutants of them do not."""

from pathlib import Path

import pytest
from mutants import wrong_mutants

from r1fast.data import load_problems
from r1fast.rewards import CodeReward
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.graders import check_problem
from r1fast.rewards.sandbox import SandboxUnavailable

SHARED = Path(__file__).parents[2] / "shared/data"
FIXTURES = Path(__file__).parent / "fixtures"
# what of MBPP no literal can carry, or is wrong in the data
MBPP_FAILS = {
    "MBPP/596": "error: the test needs `sys`, which only the reference imports",
    "MBPP/737": "returns a re.Match",
    "MBPP/787": "returns a re.Match",
    "MBPP/794": "returns a re.Match",
}


@pytest.fixture(scope="module")
def reward():
    # some references compute for seconds, and the machine may be busy
    with CodeReward(timeout=20.0, total_timeout=60.0) as reward:
        try:
            reward.start()
        except SandboxUnavailable as error:
            pytest.skip(f"THIS MACHINE HAS NO SANDBOX: {error}")
        yield reward


def humaneval(path):
    """(problem, its code problem, the reference, its test code) of each row."""
    for row in load_problems(path, check=check_problem):
        code = row.prompt + row.meta["canonical_solution"]
        test = f"{row.meta['test']}\ncheck({row.meta['entry_point']})"
        yield row, read_code_problem(row.meta, row.prompt), code, test


def check_humaneval(reward, path, num_rows):
    rows = list(humaneval(path))
    assert len(rows) == num_rows
    mutants = wrong_mutants([(code, test) for *_, code, test in rows])
    assert None not in mutants
    right = [reward.run(problem, code) for _, problem, code, _ in rows]
    wrong = [reward.run(row[1], mutant) for row, mutant in zip(rows, mutants, strict=True)]
    failed = {r.id: f.result().why for (r, *_), f in zip(rows, right, strict=True)
              if f.result().verdict != "correct"}  # fmt: skip
    passed = {r.id: (f.result().verdict, m)
              for (r, *_), f, m in zip(rows, wrong, mutants, strict=True)
              if f.result().verdict not in ("wrong", "timeout")}  # fmt: skip
    assert failed == {}
    assert passed == {}


def test_humaneval_excerpt(reward):
    check_humaneval(reward, FIXTURES / "humaneval_excerpt.jsonl", 8)


needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repo")


@needs_data
@pytest.mark.slow
def test_humaneval(reward):
    check_humaneval(reward, SHARED / "humaneval/HumanEval.jsonl.gz", 164)


@needs_data
@pytest.mark.slow
def test_sanitized_mbpp(reward):
    rows = load_problems(SHARED / "mbpp/sanitized-mbpp.json", check=check_problem)
    assert len(rows) == 427
    futures = [reward.run(read_code_problem(row.meta), row.meta["code"]) for row in rows]
    failed = {row.id: future.result() for row, future in zip(rows, futures, strict=True)
              if future.result().verdict != "correct"}  # fmt: skip
    assert failed.keys() <= MBPP_FAILS.keys(), failed
    assert len(failed) / len(rows) < 0.05
