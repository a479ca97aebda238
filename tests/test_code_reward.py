"""The reward of programs: problems, answers, verdicts, and functions that try to be judged better."""

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1fast import metrics
from r1fast.config import config_of
from r1fast.data import load_problems
from r1fast.protocol import join_completion
from r1fast.rewards import CodeReward
from r1fast.rewards.code import GradedCode, judged
from r1fast.rewards.code_answer import extract_code, fenced_blocks
from r1fast.rewards.code_problem import MAX_CODE, read_code_problem
from r1fast.rewards.cpp_calls import cpp_mains
from r1fast.rewards.graders import check_problem
from r1fast.rewards.program_output import same_output
from r1fast.rewards.sandbox import SandboxUnavailable, TrialResult, find_compiler
from r1fast.rewards.score import RewardScorer, check_problems
from r1fast.trainer import GRPOTrainer
from r1fast.types import Completion, Problem, RolloutGroup

FIXTURES = Path(__file__).parent / "fixtures"
ADD = {"tests": ["assert add(3, 4) == 7", "assert add(1, 1) == 2", "assert add(-1, 1) == 0"]}
SUM = {"tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]}
needs_compiler = pytest.mark.skipif(not find_compiler(), reason="NO g++: C++ IS NOT TESTED HERE")


@pytest.fixture(scope="module")
def reward():
    reward = CodeReward(timeout=2.0, total_timeout=20.0, memory_mib=256)
    try:
        reward.start()
    except SandboxUnavailable as error:
        pytest.skip(f"THIS MACHINE HAS NO SANDBOX: {error}")
    yield reward
    assert reward.sandbox.num_restarts == 0, "a program took the launcher down"
    reward.close()


def verdict(reward, columns, code, prompt=""):
    return reward.run(read_code_problem(columns, prompt), code).result().verdict


# answers


@pytest.mark.parametrize(
    ("text", "protocol", "code"),
    [
        (
            "<think> ```python\nno\n``` </think>\nSo:\n```python\nx = 1\n```\nDone.",
            "think",
            "x = 1\n",
        ),
        ("<think>a</think>```py\nx = 1\n```\n```py\nx = 2\n```", "think", "x = 2\n"),
        ("<think>a</think>```\nx = 1\n```", "think", "x = 1\n"),
        ("<think>a</think>~~~python\nx = '```'\n~~~", "think", "x = '```'\n"),
        ("<think>a</think>```python\nx = 1\n```\n```text\n7\n```", "think", "x = 1\n"),
        ("<think>a</think> <answer> x = 1 </answer>", "think_answer", "x = 1"),
        ("<think>a</think> <answer>\n```python\nx = 1\n```\n</answer>", "think_answer", "x = 1\n"),
        ("def f(): pass", None, "def f(): pass"),
        ("Here:\n```python\nx = 1\n```", None, "x = 1\n"),
        ("<think>a</think> <answer> x = 1 </answer>", None, "x = 1"),
        ("|special_token| a |special_token| ```python\nx = 1\n```", "cold_start", "x = 1\n"),
    ],
)
def test_where_the_program_stands(text, protocol, code):
    assert extract_code(text, "python", protocol).answer == code


@pytest.mark.parametrize(
    ("text", "protocol", "fault"),
    [
        ("<think> ```python\nx = 1\n```", "think", "no </think>"),
        ("<think> ```python\nx = 1\n```", None, "no </think>"),
        ("<think>a</think> the answer is 7", "think", "no fenced block"),
        ("<think>a</think>```python\nx = 1", "think", "a fence that never closes"),
        ("<think>a</think>```java\nx = 1\n```", "think", "no block of python"),
        ("<think>a</think>```python\n\n```", "think", "an empty block"),
        (
            "<think>a</think><answer>1</answer><answer>2</answer>",
            "think_answer",
            "a second answer block",
        ),
    ],
)
def test_no_program(text, protocol, fault):
    extracted = extract_code(text, "python", protocol)
    assert (extracted.answer, extracted.fault) == (None, fault)


def test_fences_as_markdown_has_them():
    text = "````python\n```\ninner\n```\n````\n   ```cpp\ny\n```\n```c++ title\nz\n```"
    assert fenced_blocks(text) == (
        [("python", "```\ninner\n```\n"), ("cpp", "y\n"), ("c++", "z\n")], False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="language must be one of python, cpp, got 'rust'"):
        extract_code("x", "rust")


# problems


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs one of 'tests', 'test_list', 'test' and 'input_output', got none"),
        ({"tests": []}, "'tests' holds no tests: nothing could be verified"),
        ({"tests": "[]"}, "'tests' holds no tests"),
        ({"test_list": []}, "'test_list' holds no tests"),
        ({"tests": [{}]}, "must have 'input' and 'output', or 'args' and 'expected'; got an empty"),
        ({"tests": ["assert 1 == 1"]}, "the tests call no function of the candidate's"),
        ({"tests": [""]}, "a test is empty"),
        ({"tests": ["assert ("]}, "'tests' is not Python"),
        ({"tests": "[1"}, "'tests' is text that is not JSON"),
        ({"tests": ["assert f(1)"], "test": "x"}, "got 'tests' and 'test'"),
        ({"tests": [{"args": [1], "expected": 2}]}, "'entry_point' must name a function"),
        ({"tests": [{"args": 1, "expected": 2}], "entry_point": "f"}, "'args' must be a list"),
        ({"test": "def check(candidate): pass", "entry_point": "f"}, "asserts nothing"),
        ({"test": "x = 1", "entry_point": "f"}, r"must define check\(candidate\)"),
        ({"tests": [{"input": 3, "output": "4"}]}, "a test's 'input' must be a string, got 3"),
        ({**SUM, "comparison": "fuzzy"}, "'comparison' must be one of lines, tokens, exact"),
        ({**SUM, "programming_language": "cobol"}, "'programming_language' must be one of python"),
        ({**SUM, "time_limit": -1}, "'time_limit' must be a number from 0 to 600, got -1"),
        ({**SUM, "time_limit": 1e9}, "'time_limit' must be a number from 0 to 600"),
        ({**SUM, "memory_limit_mib": 1 << 40}, "'memory_limit_mib' must be a number from 0 to 65536"),
        ({**SUM, "tolerance": math.inf}, "'tolerance' must be a number of at least 0, got inf"),
        ({"tests": ["f(1)"]}, r"the test 'f\(1\)' asserts nothing"),
        ({"tests": ["assert f(1) == 2", "print(f(2)); assert True"]}, "asserts nothing"),
        ({"test": "def check(candidate): candidate(3)", "entry_point": "f"}, "asserts nothing"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs but 0 outputs"),
        ({"tests": ["assert f(1)", {"input": "", "output": ""}]}, "must hold objects or assertions"),
    ],
)  # fmt: skip
def test_problems_that_nothing_could_verify(columns, message):
    with pytest.raises(ValueError, match=message):
        read_code_problem(columns)


def test_trl_hears_why_a_row_has_no_reward(reward, capsys):
    metrics._warn_once.cache_clear()
    tests = [["assert add(missing) == 7"], ["assert add(3) == 3"]]
    assert reward(completions=["def add(x): return x"] * 2, tests=tests) == [None, 1.0]
    assert "a program has no verdict, and no reward: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"row 1: .* asserts nothing.*correct the row"):
        reward(completions=["x"] * 2, tests=[["assert add(3) == 3"], ["add(3)"]])


def test_tests_that_can_fail_without_assert():
    for test in (
        "np.testing.assert_allclose(f(1), 2)", "same(f(1), 2)", "if f(1) != 2: raise ValueError",
    ):  # fmt: skip
        setup = "import numpy as np\ndef same(a, b): assert a == b"
        assert read_code_problem({"tests": [test], "setup": setup}).names == ("f",)


def test_keys_that_arrow_fills_with_none_are_absent():
    called = {"args": [3, 4], "expected": None, "input": None, "output": None}
    problem = read_code_problem({"tests": [called], "entry_point": "f"})
    assert (problem.mode, problem.tests[0]["expected"]) == ("calls", None)
    program = {"input": "1\n", "output": "2\n", "args": None, "expected": None, "kwargs": None}
    assert read_code_problem({"tests": [program]}).mode == "programs"


def test_names_that_tests_call():
    assert read_code_problem(
        {"tests": ["import math\nassert math.isclose(f(g(1)), len([1]))"]}
    ).names == ("f", "g")
    assert read_code_problem({"tests": ["assert sum(10, 15) == 6"]}).names == ("sum",)
    problem = read_code_problem({"tests": ["assert h(f(1))"], "setup": "def h(x): return x"})
    assert problem.names == ("f",)


def test_rows_of_public_sets():
    rows = load_problems(FIXTURES / "humaneval_excerpt.jsonl", check=check_problem)
    assert {row.kind for row in rows} == {"code"}
    assert rows[0].id == "HumanEval/0"
    assert "poly" in read_code_problem(rows[3].meta, rows[3].prompt).setup
    rows = load_problems(FIXTURES / "mbpp_excerpt.json", check=check_problem)
    assert rows[0].id == "MBPP/2"
    assert rows[0].prompt.count("assert") == 1, "one test shows the function's name"
    assert len(read_code_problem(rows[0].meta).tests) == 3


def test_a_row_without_tests_is_refused_with_its_line(tmp_path):
    path = tmp_path / "code.jsonl"
    good = {"prompt": "add", "kind": "code", **ADD}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "tests": []}) + "\n")
    with pytest.raises(ValueError, match=r"code.jsonl:2: 'tests' holds no tests"):
        load_problems(path, check=check_problem)
    path.write_text(json.dumps(good))
    (problem,) = load_problems(path, check=check_problem)
    assert (problem.kind, problem.answer) == ("code", None)


# verdicts


@pytest.mark.parametrize(
    ("columns", "code", "expected"),
    [
        (ADD, "def add(a, b): return a + b", "correct"),
        (ADD, "def add(a, b): return a - b", "wrong"),
        (ADD, "def add(a, b) return a + b", "unparseable"),
        (ADD, "def sub(a, b): return a + b", "wrong"),
        (ADD, "def add(a, b):\n  while True: pass", "timeout"),
        (ADD, "import time; time.sleep(60)", "timeout"),
        (ADD, "raise ValueError", "wrong"),
        (SUM, "print(sum(map(int, input().split())))", "correct"),
        (SUM, "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))", "correct"),
        (SUM, "print(7)", "wrong"),
        (SUM, "print(sum(map(int, input().split()))); raise SystemExit(1)", "wrong"),
        (SUM, "if __name__ == '__main__': print(sum(map(int, input().split()))); exit()", "correct"),
        (SUM, "a, b = map(int, input().split()\nprint(a + b)", "unparseable"),
        ({"tests": [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}], "entry_point": "f"},
         "def f(x): return tuple(sorted(x))", "correct"),
        ({"tests": [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}], "entry_point": "f", "result_from": 0},
         "class Solution:\n  def f(self, x): x.sort()", "correct"),
        ({"tests": [{"args": [1], "kwargs": {"b": 2}, "expected": 0.3}], "entry_point": "f", "tolerance": 1e-6},
         "def f(a, b): return 0.1 * a + 0.1 * b", "correct"),
        ({"tests": [{"args": [1], "expected": True}], "entry_point": "Solution.f"},
         "class Solution:\n  def f(self, x): return 1", "wrong"),
        ({"input_output": json.dumps({"inputs": ["3 4\n"], "outputs": ["7\n"]})},
         "print(sum(map(int, input().split())))", "correct"),
        ({"input_output": {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}},
         "def f(a, b): return a + b", "correct"),
        ({"tests": ["try:\n  f(1)\nexcept ValueError: pass\nelse: assert False"]},
         "def f(x): raise ValueError(x)", "correct"),
        ({"tests": ["assert f((1, {2: {3}}), b'x', 1e400, 10**40) == ((1, {2: {3}}), b'x', 1e400, 10**40)"]},
         "def f(*args): return args", "correct"),
        ({"tests": ["assert f('aab').most_common(1) == [('a', 2)]"]},
         "from collections import Counter\ndef f(s): return Counter(s)", "correct"),
        ({"tests": ["assert list(f(2).items()) == [(2, 4)] and f(1)[1] == 2"]},
         "from collections import OrderedDict\ndef f(x): return OrderedDict([(x, 2 * x)])", "correct"),
        ({"tests": ["assert f(3) == [3]", "assert f(4) == (1, 2)", "assert f(5) == 2"]},
         "from collections import namedtuple\nfrom enum import IntEnum\nclass E(IntEnum): B = 2\n"
         "class L(list): pass\ndef f(x): return {3: L([3]), 4: namedtuple('P', 'x y')(1, 2), 5: E.B}[x]",
         "correct"),
        ({"tests": ["try:\n  f(1)\nexcept ValueError: pass\nelse: assert False"]},
         "class Bad(ValueError): pass\ndef f(x): raise Bad(x)", "correct"),
        ({"tests": ["try:\n  f(1)\nexcept ValueError: pass\nelse: assert False"]},
         "class ValueError(Exception): pass\ndef f(x): raise ValueError(x)", "wrong"),
        ({"tests": ["assert f('ab') == {'a': 1, 'b': 1}"]},
         "from collections import Counter\ndef f(s): return Counter(s)", "correct"),
    ],
)  # fmt: skip
def test_verdicts(reward, columns, code, expected):
    assert verdict(reward, columns, code) == expected


def test_humaneval_and_mbpp_excerpts(reward):
    grades = {}
    for row in map(json.loads, (FIXTURES / "humaneval_excerpt.jsonl").read_text().splitlines()):
        problem = read_code_problem(row, row["prompt"])
        right = row["prompt"] + row["canonical_solution"]
        wrong = row["prompt"] + "    return None\n"
        grades[row["task_id"]] = reward.run(problem, right), reward.run(problem, wrong)
        body = f"```python\n{row['canonical_solution']}```"  # as a base model goes on
        grades[row["task_id"] + " body"] = (
            reward.submit(problem, body),
            reward.run(problem, "x = 1"),
        )
    for row in json.loads((FIXTURES / "mbpp_excerpt.json").read_text()):
        problem = read_code_problem({k: v for k, v in row.items() if k != "prompt"})
        (name,) = problem.names
        wrong = reward.run(problem, f"def {name}(*args): return None")
        grades[row["task_id"]] = reward.run(problem, row["code"]), wrong
    for name, pair in grades.items():
        assert [future.result().verdict for future in pair] == ["correct", "wrong"], name


def test_share_of_the_tests():
    with CodeReward(timeout=2.0, partial=True, num_workers=2) as reward:
        third = "def add(a, b): return a + b if a == 3 else 9"
        assert reward(["p"], [third], tests=[ADD["tests"]]) == pytest.approx([1 / 3])
        hanging = "def add(a, b):\n  while a == 1: pass\n  return a + b"
        (grade,) = [reward.run(read_code_problem(ADD), hanging).result()]
        assert (grade.verdict, grade.share) == ("timeout", pytest.approx(2 / 3))
        assert reward(["p"], ["print(7)"], tests=[SUM["tests"]]) == pytest.approx([1 / 2])
        check = "def check(f):\n  assert f(1) == 1\n  assert f(2) == 2\n  for i in range(2): assert f(3) == 4"
        columns = {"test": check, "entry_point": "f"}
        grade = reward.run(read_code_problem(columns), "def f(x): return x").result()
        assert (grade.verdict, grade.share) == ("wrong", pytest.approx(1 / 2))
        crashing = "import os\ndef add(a, b):\n  if a == 1: os._exit(0)\n  return a + b"
        grade = reward.run(read_code_problem(ADD), crashing).result()
        assert (grade.verdict, grade.share) == ("wrong", pytest.approx(2 / 3))


# functions that try to be judged better; every one must be wrong (or late), never correct nor error

HACKS = {
    "always equal": "class A(int):\n  __eq__ = lambda s, o: True\n  __hash__ = int.__hash__\ndef add(a, b): return A(5)",
    "always equal object": "class A:\n  __eq__ = lambda s, o: True\ndef add(a, b): return A()",
    "equal through a subclass of str": "class A(str):\n  __eq__ = lambda s, o: True\ndef add(a, b): return A('x')",
    "exit at load": "import sys; sys.exit(0)",
    "exit in a call": "import sys\ndef add(a, b): sys.exit(0)",
    "hard exit in a call": "import os\ndef add(a, b): os._exit(0)",
    "keyboard interrupt": "def add(a, b): raise KeyboardInterrupt",
    "generator exit": "def add(a, b): raise GeneratorExit",
    "stop iteration": "def add(a, b): raise StopIteration",
    "assertion": "def add(a, b): raise AssertionError",
    "hostile exception": "class E(Exception):\n  def __str__(self): import os; os._exit(0)\ndef add(a, b): raise E",
    "patched builtins": "import builtins\nfor n in ('eval', 'type', 'repr', 'len', 'isinstance', 'print', '__import__'):\n  setattr(builtins, n, lambda *a, **k: True)\ndef add(a, b): return 5",
    "patched harness": "import sys\nm = sys.modules['__main__']\nm.encode = lambda v: '{\"always\": true}'\ndef add(a, b): return 5",
    "forged replies": "import os\nfor fd in range(3, 256):\n  for i in range(9):\n    try: os.write(fd, b'{\"id\":%d,\"value\":5}\\n' % i)\n    except OSError: pass\ndef add(a, b): return 5",
    "forged verdicts": "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'{\"test\":0,\"outcome\":\"pass\",\"share\":1}\\n{\"done\":true,\"error\":\"x\"}\\n' * 9)\n  except OSError: pass\ndef add(a, b): return 5",
    "forged failure": "import os\nfor fd in range(3, 256):\n  try: os.write(fd, b'{\"loaded\":\"yes\",\"why\":\"\"}\\n{\"error\":\"launcher\"}\\n')\n  except OSError: pass\ndef add(a, b): return 5",
    "deep reply": "import os\ndef add(a, b):\n  for fd in range(3, 256):\n    try: os.write(fd, b'{\"id\":1,\"value\":' + b'[' * 100000 + b'\\n')\n    except OSError: pass\n  return 5",
    "no line": "import os\ndef add(a, b):\n  for fd in range(3, 256):\n    try:\n      while True: os.write(fd, b'x' * 65536)\n    except OSError: pass",
    "binary reply": "import os\ndef add(a, b):\n  for fd in range(3, 256):\n    try: os.write(fd, b'\\xff\\xfe\\r\\r\\0\\n')\n    except OSError: pass\n  return 5",
    "closed descriptors": "import os\ndef add(a, b): os.closerange(0, 256)",
    "value of a reply that tests choke on": "def add(a, b): return {'x': [None] * 3}",
    "cycle": "def add(a, b):\n  x = []; x.append(x)\n  return x",
    "endless generator": "def add(a, b):\n  while True: yield 5",
    "endless iterator": "import itertools\ndef add(a, b): return itertools.chain.from_iterable([5] for _ in iter(int, 1))",
    "huge list": "def add(a, b): return [0] * 10**8",
    "huge text": "def add(a, b): return 'x' * 10**8",
    "huge number": "def add(a, b): return 1 << 10**7",
    "nan": "def add(a, b): return float('nan')",
    "function": "def add(a, b): return add",
    "no function": "add = 5",
    "class": "class add:\n  def __init__(self, a, b): pass\n  __eq__ = lambda s, o: True",
    "stack walk": "import sys\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n    for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n      if isinstance(v, dict) and 'expected' in v: return v['expected']\n    f = f.f_back\n  return 5",
    "memory walk": "import gc\ndef add(a, b):\n  for o in gc.get_objects():\n    if isinstance(o, dict) and 'tests' in o: return 7\n    if isinstance(o, str) and 'assert add' in o: return a + b\n  return 5",
    "thread that goes on": "import threading, os\ndef add(a, b):\n  threading.Thread(target=lambda: [os.fork() for _ in range(100)]).start()\n  return 5",
    "kill all": "import os\nos.kill(-1, 9)\ndef add(a, b): return a + b + 1",
    "stop itself": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGSTOP)",
    "memory": "def add(a, b): return len(bytearray(4 << 30)) + 5",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "segfault": "import ctypes\ndef add(a, b): return ctypes.string_at(0)",
    "NUL": "def add(a, b): return 5\0",
    "surrogate": "def add(a, b): return '\ud800'",
    "surrogate in a value": "def add(a, b): return chr(0xD800)",
    "a name that is no name": "def add(a, b): return type('x' * 10**6, (), {})()",
    "other arguments": "def add(*args): return len(args) + 6",
    "source of the harness": "import __main__, sys\ndef add(a, b): return [k for k in vars(__main__) if 'expect' in k] or 5",
}  # fmt: skip


def test_hacks_are_never_right_and_never_our_error(reward):
    problem = read_code_problem({"tests": ["assert add(3, 4) == 7"]})
    futures = {name: reward.run(problem, code) for name, code in HACKS.items()}
    grades = {name: future.result() for name, future in futures.items()}
    for name, grade in grades.items():
        assert grade.verdict in ("wrong", "timeout", "unparseable"), (name, grade)
    assert (
        grades["always equal"].why == "AssertionError: "
    )  # the plain 5 that it holds is not right
    assert grades["NUL"].verdict == grades["surrogate"].verdict == "unparseable"
    assert verdict(reward, ADD, "def add(a, b): return a + b") == "correct"


def test_values_that_break_the_tests_are_wrong_not_errors():
    """An error earns the mean of its group: an answer must not be able to bring one about."""
    tests = ["assert abs(f(3) - 1) < 9", "assert sum(f(2)) == 3", "assert g(f(1)) == 1",
             "assert [0] * f(5) == 1", "assert 2 ** f(9) == 1", "while f(1): pass\nassert not f(1)"]  # fmt: skip
    codes = [
        "def f(x): return None\ng = f", "def f(x): return 10**12\ng = f",
        "def f(x): return iter(())\ng = f", "def f(x): return {1: 2j}\ng = f",
    ]  # fmt: skip
    with CodeReward(timeout=0.5, total_timeout=2.0, num_workers=8) as reward:
        futures = {
            (test, code): reward.run(read_code_problem({"tests": [test]}), code)
            for test in tests for code in codes
        }  # fmt: skip
        for case, future in futures.items():
            assert future.result().verdict in ("wrong", "timeout", "correct"), case
    assert {future.result().verdict for future in futures.values()} >= {"wrong", "timeout"}


def test_our_failures_are_errors(reward):
    for columns, why in (
        ({"tests": ["assert add(lambda: 1) == 7"]}, "function"),
        ({"tests": ["assert add(1) == 7"], "setup": "import no_such_module"}, "no_such_module"),
        ({"tests": ["assert add(missing) == 7"]}, "missing"),
        ({"tests": ["assert add(1) == missing"]}, "missing"),
        ({"test": "def check(candidate):\n  assert 1 == 1", "entry_point": "add"}, "never calls"),
    ):
        grade = reward.run(read_code_problem(columns), "def add(a): return 7").result()
        assert grade.verdict == "error", grade
        assert why in grade.why
    assert judged(TrialResult(loaded="yes"), 0, "x").verdict == "error", "no test is no pass"
    assert reward(["p"], ["x = 1"], tests=[None]) == [None]


def test_expected_values_are_not_in_the_candidates_box(reward):
    """A candidate that reads all memory it can finds its arguments, and no expected value."""
    code = """
import os
def add(a, b):
    needle = b'98765 :deriuqer'  # from behind, so that it does not find itself
    hits = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            maps, mem = open(f'/proc/{pid}/maps').read(), open(f'/proc/{pid}/mem', 'rb', 0)
        except OSError:
            continue
        for line in maps.splitlines():
            low, high = (int(x, 16) for x in line.split()[0].split('-'))
            if 'r' in line.split()[1] and high - low < 1 << 26 and '[v' not in line:
                try:
                    mem.seek(low); data = mem.read(high - low)
                except (OSError, ValueError, OverflowError):
                    continue
                hits += [pid] * (needle in data[::-1])
    return 'nothing' if not hits else 'found'
"""
    for own, found in (("", "nothing"), ("\nx = 'required: 56789'", "found")):
        test = f"'required: 56789'\nassert add(3, 4) == {found!r}"
        grade = reward.run(read_code_problem({"tests": [test]}), code + own).result()
        assert grade.verdict == "correct", found


# C++


@needs_compiler
def test_cpp(reward):
    program = {**SUM, "programming_language": "c++"}
    right = "#include <iostream>\nint main() { long a, b; std::cin >> a >> b; std::cout << a + b; }"
    vectors = {
        "tests": [{"args": [[[1, 2], [3]], "é\n", True, 2.5], "expected": [[1, "é\n"], [3, "x"]]}],
        "entry_point": "f", "programming_language": "cpp",
    }  # fmt: skip
    method = """
#include <vector>
#include <string>
using namespace std;
class Solution { public:
  vector<pair<int, string>> f(vector<vector<int>>& rows, const string& s, bool on, double d) const {
    return {{rows[0][0], s}, {rows[1][0], on && d == 2.5 ? "x" : "y"}}; } };
int main() { return 3; }
"""
    in_place = {"tests": [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}], "entry_point": "f",
                "result_from": 0, "programming_language": "cpp"}  # fmt: skip
    cases = [
        (program, right, "correct"),
        (program, right.replace("a + b", "a - b"), "wrong"),
        (program, right.replace(";", ""), "unparseable"),
        (program, "int main() { for (;;); }", "timeout"),
        (program, "int main() { int* p = 0; *p = 1; }", "wrong"),
        (vectors, method, "correct"),
        (vectors, method.replace('"x"', '"z"'), "wrong"),
        (in_place, "#include <algorithm>\nvoid f(std::vector<int>& x) { std::sort(x.begin(), x.end()); }", "correct"),
        (in_place, "void f(std::vector<int>& x) { throw 1; }", "wrong"),
        (in_place, "#include <cstdlib>\nvoid f(std::vector<int>& x) { exit(0); }", "wrong"),
        (in_place, "int f(int x) { return x; }", "wrong"),
        (in_place, "int g;", "unparseable"),
    ]  # fmt: skip
    futures = [reward.run(read_code_problem(c), code) for c, code, _ in cases]
    for (_, code, expected), future in zip(cases, futures, strict=True):
        assert future.result().verdict == expected, (code, future.result())


@needs_compiler
def test_common_cpp_can_be_called(reward):
    def problem(*pairs, **columns):
        tests = [{"args": args, "expected": expected} for args, expected in pairs]
        return {"tests": tests, "entry_point": "f", "programming_language": "cpp", **columns}

    square, text = problem(([3], 9), ([-4], 16)), problem((["ab"], "ba"))
    counts = problem(([{"a": 1}], {"a": 1}))
    std = "using namespace std;\n"
    reverse = "string r(s.rbegin(), s.rend()); return r; }"
    cases = [
        (counts, std + "map<string, int> f(map<string, int> m) { return m; }", "correct"),
        (counts, std + "map<string, int> f(map<string, int> m) { m[\"b\"]; return m; }", "wrong"),
        (problem(([{"1": 2}], {"1": 2})), std + "unordered_map<int, int> f(unordered_map<int, int>& m) { return m; }", "correct"),
        (problem(([[1, 1]], [[1, 2]])), std + "map<int, int> f(vector<int> v) { map<int, int> m; for (int x : v) m[x]++; return m; }", "correct"),
        (problem(([1], [[[1, 2], 3]])), std + "map<pair<int, int>, int> f(int n) { return {{{n, 2}, 3}}; }", "correct"),
        ({"tests": ["assert f([1, 1, 2]) == {1: 2, 2: 1}"], "programming_language": "cpp"},
         std + "map<int, int> f(vector<int> v) { map<int, int> m; for (int x : v) m[x]++; return m; }", "correct"),
        (square, "// class Solution {\n/* struct Solution { */ int f(int n) { return n * n; }", "correct"),
        (square, "struct SolutionHelper { int a; };\nint f(int n) { return n * n; }", "correct"),
        (square, "class Solution { public: int g(int n) { return n; } };\nint f(int n) { return n * n; }", "correct"),
        (square, "int f(int n);\nstruct Solution { int g() { return f(1); } };\nint f(int n) { return n * n; }", "correct"),
        (square, "long long f(long long n) { return 0; }\nint f(int n) { return n * n; }", "correct"),
        (square, "struct Solution { int f(int n) { return n * n; } int f(std::string s) { return 0; } };", "correct"),
        (square, "template <class T> T f(T n) { return n * n; }", "correct"),
        (square, "auto f = [](int n) { return n * n; };", "correct"),
        (square, "auto f = [](auto n) { return n * n; };", "correct"),
        (square, "std::function<int(int)> f = [](int n) { return n * n; };", "correct"),
        (square, "#define int long long\nint f(int n) { return n * n; }\nsigned main() {}", "correct"),
        (square, "template <class T> T f(T n) { return n + 6; }", "wrong"),
        (square, "template <class T> T f(T n) { return n * ; }", "unparseable"),
        (square, std + "int f(vector<int>&& v) { return v[0]; }", "wrong"),
        (text, std + "string f(string_view s) { " + reverse, "correct"),
        (text, std + "string f(string&& s) { " + reverse, "correct"),
        (text, std + "string f(const char* p) { string s = p; " + reverse, "correct"),
        (problem(([[2, 1]], 1), entry_point="distance"),
         std + "int distance(vector<int> v) { return v[0] - v[1]; }", "correct"),
    ]  # fmt: skip
    futures = [reward.run(read_code_problem(columns), code) for columns, code, _ in cases]
    for (_, code, expected), future in zip(cases, futures, strict=True):
        assert future.result().verdict == expected, (code, future.result())


@needs_compiler
def test_the_tag_names_the_standard(reward):
    problem = read_code_problem(
        {"tests": [{"args": [3], "expected": 9}], "entry_point": "f", "programming_language": "cpp"}
    )
    code = "#include <concepts>\ntemplate <std::integral T> T g(T n) { return n * n; }\nint f(int n) { return g(n); }"
    assert reward.grade(problem, f"```c++20\n{code}\n```").verdict == "correct"
    assert reward.grade(problem, f"```cpp23\n{code}\n```").verdict == "correct"
    assert reward.grade(problem, f"```cpp\n{code}\n```").verdict == "unparseable"


def test_text_of_cpp_takes_linear_time():
    for hostile in ("/*", 'R"(', "class Solution ", '"', "'", "f "):
        start = time.process_time()
        cpp_mains({"names": ["f"], "tests": [], "code": hostile * (MAX_CODE // len(hostile))})
        assert time.process_time() - start < 2.0, hostile


def test_a_forked_process_has_a_sandbox_of_its_own(reward):
    problem = read_code_problem(ADD)
    assert reward.run(problem, "def add(a, b): return a + b").result().verdict == "correct"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            future = reward.run(problem, "def add(a, b): return b + a")
            status = int(future.result(timeout=60).verdict != "correct")
            reward.sandbox.close()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert verdict(reward, ADD, "def add(a, b): return a + b") == "correct"
    assert reward.sandbox.num_restarts == 0, "the parent's is as it was"


def test_a_missing_compiler_is_said(reward, monkeypatch):
    from dataclasses import replace

    problem = read_code_problem({**SUM, "programming_language": "cpp"})
    info = replace(reward.start(), compiler="")
    monkeypatch.setattr(reward, "start", lambda: info)
    with pytest.raises(ValueError, match=r"C\+\+ problems need g\+\+"):
        reward.run(problem, "int main() {}")
    monkeypatch.setattr("r1fast.rewards.score.find_compiler", lambda: "")
    problem = Problem("p", kind="code", id="x", meta={**SUM, "programming_language": "cpp"})
    with pytest.raises(ValueError, match=r"problem 'x' is in C\+\+, which needs g\+\+"):
        check_problems([problem], config_of({}).rewards)


# the contract, and the scorer


def test_trl_contract(reward):
    prompts = [[{"role": "user", "content": "add"}]] * 4
    texts = ["```python\ndef add(a, b): return a + b\n```", "```python\ndef add(a, b): return 1\n```",
             "no idea what to say", "def add(a, b): return a + b"]  # fmt: skip
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scores = reward(prompts=prompts, completions=completions, completion_ids=[[1]] * 4,
                    tests=[ADD["tests"]] * 3 + [None], other=[1] * 4)  # fmt: skip
    assert scores == [1.0, 0.0, 0.0, None]
    with pytest.raises(
        ValueError, match="column 'tests' must have one entry for each of 1 completions"
    ):
        reward(completions=["x"], tests=[])
    with pytest.raises(ValueError, match="holds no tests"):
        reward(completions=["x"], tests=[[]])


def test_scorer_routes_code_and_records_the_rung():
    config = config_of({"rewards": {"code_timeout": 2.0, "sandbox_slots": 2}})
    problem = Problem("add two numbers", kind="code", meta=ADD)
    answers = ["def add(a, b): return a + b", "def add(a, b): return a - b"]
    texts = [join_completion("hm", f"```python\n{code}\n```") for code in answers]
    texts += ["<think> cut off", join_completion("hm", "7")]
    completions = [Completion([1, 2], [0.0, 0.0], "stop", text) for text in texts]
    group = RolloutGroup(problem, [1], completions)
    sums = RolloutGroup(
        Problem("1 + 1", "2"), [1], [Completion([1], [0.0], "stop", join_completion("x", "2"))]
    )
    with RewardScorer(config.rewards, config.template, 100) as scorer:
        assert scorer.sandbox is None
        scorer.score([group, sums])
        assert scorer.sandbox.level == scorer.sandbox.level >= 0
    assert [r.verdict for r in group.rewards] == ["correct", "wrong", "no_answer", "wrong"]
    assert [r.parts["accuracy"] for r in group.rewards] == [1.0, 0.0, 0.0, 0.0]
    assert group.rewards[0].answer == answers[0] + "\n"
    assert sums.rewards[0].verdict == "correct"
    assert scorer.counts["correct"] == 2


def test_the_rung_is_recorded_in_the_run(tmp_path, reward):
    info = reward.start()
    run = SimpleNamespace(
        scorer=SimpleNamespace(sandbox=info), folder=tmp_path, sandbox_recorded=False
    )
    assert GRPOTrainer._sandbox_row(run) == {"sandbox/level": float(info.level)}
    assert json.loads((tmp_path / "sandbox.json").read_text())["description"] == info.description
    run.scorer.sandbox = None
    assert GRPOTrainer._sandbox_row(run) == {}


def test_the_rung_is_said_once(capsys):
    metrics._warn_once.cache_clear()  # a warning comes once a process
    with CodeReward(num_workers=1) as reward:
        info = reward.start()
        reward.start()
        text = capsys.readouterr().err
        assert text.count(f"generated programs run in the sandbox {info.description}") == 1
        assert ("warning" in text) == (info.level > 0)
    with CodeReward(num_workers=1, rung="unsafe", allow_unsafe_sandbox=True) as reward:
        reward.start()
        assert "NO SANDBOX: generated programs run as this user" in capsys.readouterr().err
    with (
        CodeReward(rung="unsafe") as reward,
        pytest.raises(SandboxUnavailable, match="allow_unsafe"),
    ):
        reward.start()


def test_a_run_without_a_sandbox_is_refused_before_the_first_step():
    config = config_of({}).rewards
    with RewardScorer(config, config_of({}).template, 10, code=CodeReward(rung="unsafe")) as scorer:
        scorer.prepare([Problem("1 + 1", "2")])
        with pytest.raises(ValueError, match="no sandbox on this machine"):
            scorer.prepare([Problem("p", kind="code", meta=ADD)])


def test_output_is_compared_as_a_whole():
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1\n2\n3", "1\n2"), "more is not equal"
    assert not same_output("1", "1\n2")
    assert not same_output("", "0")
    assert not same_output("1 2", "1\n2")
    assert same_output("1 2", "1\n2", "tokens")
    assert not same_output("1\n", "1", "exact")
    assert same_output("0.3000001 x", "0.3 x", "tokens", 1e-5)
    assert not same_output("nan", "0.3", "lines", 1e-5)
    assert not same_output("0.31", "0.3", "lines", 1e-5)


def test_credit():
    assert GradedCode("wrong", "x", 0.5).credit() == 0.0
    assert GradedCode("wrong", "x", 0.5).credit(partial=True) == 0.5
    with pytest.raises(ValueError, match="timeouts must be above 0"):
        CodeReward(timeout=0)


FORGED = """
import os
def f(*a):
  while True:
    for fd in range(3, 9):
      try:
        os.write(fd, {line!r} + b"\\n"); os.read(fd, 65536)
      except OSError: pass
"""


@pytest.mark.parametrize(
    "said", ['"pass"', '"error"', '"no_answer"', '"zzz"', '["x"]', "null", '"timeout"']
)
def test_what_the_launcher_says_cannot_be_forged(reward, said):
    """A candidate that writes to its control socket what only the launcher may say."""
    for row in (
        {"tests": ["assert f(3, 4) == 771", "assert f(1, 1) == 882"]},
        {"tests": [{"args": [3, 4], "expected": 771}], "entry_point": "f"},
    ):
        for line in (f'{{"gone":{said}}}', f'{{"said":"{{}}","gone":{said},"outcome":{said}}}'):
            problem = read_code_problem(row, "")
            grade = reward.run(problem, FORGED.format(line=line.encode())).result(timeout=60)
            assert grade.verdict in ("wrong", "timeout"), (said, row, grade)


@pytest.mark.parametrize(
    "test",
    [
        "for x in f(3):\n    last = x\nassert last == 5",
        "try:\n    v = f(3)\nexcept ValueError:\n    pass\nassert v == [5]",
        "def g():\n    for x in f(3):\n        y = x\n    return y\nassert g() == 5",
    ],
)
def test_a_name_that_the_tests_did_not_get_to_set_is_the_candidates_doing(reward, test):
    problem = read_code_problem({"tests": [test]}, "")
    code = "def f(n):\n    raise ValueError" if "except" in test else "def f(n):\n    return []"
    assert reward.run(problem, code).result(timeout=60).verdict == "wrong"
    lacking = read_code_problem({"tests": ["assert f(3) == nowhere"]}, "")
    assert reward.run(lacking, code).result(timeout=60).verdict in ("error", "wrong")
