"""What a verdict on a program costs, on each rung of the sandbox's ladder that this machine has.

The floor is what any isolation by a new process has to pay: `python -I -S -c pass`, and the same in the
rung's bubblewrap. "one at a time" is the wall clock from a completion to its verdict, with boxes kept ready
(the default) and without; "64 at once" is 64 boxes of which one sleeps, in verdicts a second.

    python benchmarks/bench_sandbox.py [rung ...]  [--data ../shared/data]

`--data` also counts the references of HumanEval and sanitized MBPP that pass.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import append_rows, print_table

from r1fast.data import load_problems
from r1fast.rewards import CodeReward
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.sandbox import Sandbox, SandboxUnavailable
from r1fast.rewards.sandbox_ladder import look_around, rung_of

RUNGS = ("bwrap", "namespaces", "rlimits")
NUM_REPEATS = 30
SUM = {"tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]}
ADD = {"tests": ["assert add(3, 4) == 7", "assert add(1, 1) == 2", "assert add(-1, 1) == 0"]}
CASES = {
    "function, 3 assertions": (ADD, "def add(a, b): return a + b"),
    "program, 2 inputs": (SUM, "print(sum(map(int, input().split())))"),
    "function, 100 calls": (
        {"tests": ["for i in range(100): assert f(i) == i * i"]},
        "def f(x): return x * x",
    ),
}


def milliseconds(work, repeats=NUM_REPEATS) -> float:
    """The median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def floors() -> list[tuple]:
    host = look_around(use_cgroups=False)
    user = {} if host.first_uid is None else {"user": host.first_uid, "group": host.first_uid}
    bare = [host.python, "-I", "-S", "-c", "pass"]
    rows = [("start and end", "bare python", "time", milliseconds(lambda: run(bare, {})), "ms")]
    try:
        boxed = rung_of("bwrap", host).command(bare, "")
    except ValueError:
        return rows
    at = boxed.index("--seccomp")  # its descriptor is the launcher's business
    boxed = boxed[:at] + boxed[at + 2 :]
    return [
        *rows,
        ("start and end", "python in bwrap", "time", milliseconds(lambda: run(boxed, user)), "ms"),
    ]


def run(command, options) -> None:
    subprocess.run(command, env={}, check=True, capture_output=True, **options)


def costs(rung: str) -> list[tuple]:
    rows = []
    for label, num_spare in (("", None), (", no box ready", 0)):
        with CodeReward(rung=rung) as reward:
            if num_spare is not None:
                reward.sandbox.close()
                reward.sandbox = Sandbox(rung=rung, num_spare=num_spare)
            reward.start()
            for shape, (columns, code) in CASES.items():
                problem = read_code_problem(columns)

                def verdict(reward=reward, problem=problem, code=code) -> None:
                    grade = reward.run(problem, code).result()
                    assert grade.verdict == "correct", grade

                verdict()
                shape = f"one at a time, {shape}{label}"
                rows.append((shape, rung, "time of a verdict", milliseconds(verdict), "ms"))
    return rows


def throughput(rung: str) -> list[tuple]:
    with CodeReward(rung=rung, num_workers=64, timeout=60.0, total_timeout=100.0) as reward:
        reward.start()
        slow = reward.run(read_code_problem(SUM), "import time; time.sleep(50)")
        problem, code = read_code_problem(ADD), CASES["function, 3 assertions"][1]
        start = time.perf_counter()
        futures = [reward.run(problem, code) for _ in range(4 * 63)]
        assert all(future.result().verdict == "correct" for future in futures)
        rate = len(futures) / (time.perf_counter() - start)
        assert not slow.done(), "the slow one ended too soon to hold anybody up"
    return [("64 at once, one of them sleeps", rung, "verdicts", rate, "1/s")]


def references(folder: Path) -> list[tuple]:
    rows = []
    for name, path, column in (
        ("HumanEval", "humaneval/HumanEval.jsonl.gz", "canonical_solution"),
        ("MBPP sanitized", "mbpp/sanitized-mbpp.json", "code"),
    ):
        problems = load_problems(folder / path)
        with CodeReward(timeout=20.0, total_timeout=60.0) as reward:
            rung = reward.start().rung
            start = time.perf_counter()
            futures = [
                reward.run(
                    read_code_problem(p.meta, p.prompt),
                    (p.prompt if column == "canonical_solution" else "") + p.meta[column],
                )
                for p in problems
            ]
            grades = [future.result() for future in futures]
            seconds = time.perf_counter() - start
        passed = sum(grade.verdict == "correct" for grade in grades)
        rows += [
            (f"{name}, {len(problems)} references", rung, "correct", passed, "problems"),
            (f"{name}, {len(problems)} references", rung, "verdicts", len(grades) / seconds, "1/s"),
        ]
        for problem, grade in zip(problems, grades, strict=True):
            if grade.verdict != "correct":
                print(f"{problem.id}: {grade.verdict}: {grade.why}")
    return rows


def main() -> None:
    args = sys.argv[1:]
    data = None
    if "--data" in args:
        at = args.index("--data")
        data = Path(args[at + 1])
        del args[at : at + 2]
    rows = floors()
    for rung in args or RUNGS:
        try:
            rows += costs(rung) + throughput(rung)
        except SandboxUnavailable as error:
            print(f"not measured: {error}")
    if data is not None:
        rows += references(data)
    print_table(["shape", "variant", "value", "unit"],
                [[s, v, f"{x:.1f}", u] for s, v, _, x, u in rows])  # fmt: skip
    print(json.dumps({"load average": os.getloadavg()}))
    append_rows("sandbox", rows)


if __name__ == "__main__":
    main()
