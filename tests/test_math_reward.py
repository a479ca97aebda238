"""The mathematics grader: extraction, exact comparison, the symbolic worker, and its limits."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.data import load_problems
from r1fast.rewards import symbolic
from r1fast.rewards.answers import read_answer
from r1fast.rewards.equivalence import same
from r1fast.rewards.graders import check_problem
from r1fast.rewards.math import MathReward, extract_answer, parse_gold

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not beside the repo")
needs_sympy = pytest.mark.skipif(find_spec("math_verify") is None, reason="no math-verify")


@pytest.fixture(scope="module")
def grader():
    with MathReward() as grader:
        yield grader


@pytest.fixture(scope="module")
def exact():
    return MathReward(symbolic=False)


SAME = [
    ("1/2", "0.5"), (r"\frac{1}{2}", "1/2"), ("0.5", "50%"), ("25%", "0.25"), ("25", r"25\%"),
    ("3", "3.0"), ("1000000", "1e6"), ("1,000,000", "1000000"), (r"11,\! 111", "11111"),
    ("1 000", "1000"), (r"1{,}000", "1000"), ("-3", "−3"), ("12", "12."), ("12", "=12"),
    ("12", r"\$12"), ("12", "x = 12"), ("12", "144/12"), ("12", r"6\times 2"), ("12", "-(-12)"),
    (r"\frac{3}{2}", "1 1/2"), (r"\frac{3}{2}", r"1\tfrac12"), ("1/3", r"\frac13"),
    ("2/3", "0.666666666667"), ("2^{100}", "1267650600228229401496703205376"), ("10!", "3628800"),
    (r"\binom{10}{3}", "120"), ("90^\\circ", "90"), ("90", "90°"), ("5 dollars", "$5"),
    ("7 million", "7000000"), ("3 hours", "3"), ("A", "(A)"), ("C", r"\textbf{(C)}"),
    ("C", "(C) 15"), ("C", "C: 15"), ("yes", "Yes."), ("ellipse", "an ellipse"),
    ("x^2-1", "(x-1)(x+1)"), ("(1,2)", r"\left(1, 2\right)"), ("1,2", "2,1"), (r"\{1,2\}", "2,1"),
    (r"\{1,2\}", r"\{1,2,2\}"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"), (r"\frac{1}{i}", "-i"), ("6-5i", "-5i+6"),
    (r"e^{i\pi}", "-1"), (r"1\pm\sqrt5", r"1+\sqrt5, 1-\sqrt5"), ("x=3", "3=x"),
    ("y=2x+3", "2x - y + 3 = 0"), ("y=2x+3", "2x+3"), ("x=1,y=2", "y=2,x=1"), ("x>3", "3<x"),
    ("1<x<2", "2>x>1"), (r"x \in [-2,7]", "[-2,7]"),
    (r"(2,12)\cup(12,\infty)", r"(12,\infty)\cup(2,12)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("2xy", "2yx"), ("xy^2", "y^2x"), ("x_1+x_2", "x_2+x_1"), ("1010_2", "1010_{2}"),
    (r"(3, \frac{\pi}{2})", r"(3,\pi/2)"), (r"\frac{11+9a}{20}", "0.45a+0.55"),
]  # fmt: skip
DIFFERENT = [
 ("2/3", "0.6667"), ("25", "0.25"), ("0.5", "0.5%"), ("12", "1 2"),
    ("12", "[12]"), ("12", "12 = x"), ("12", "approximately 12"),
    ("12", "12 or 13"), ("12", "12, 12"),
    ("12", "12;13"), ("12", "not 12"), ("7", "7 million"), ("3 hours", "3 minutes"), ("3", "y=x+3"),
    ("A", "(B)"), ("A", "A, B"), ("A", "(A) or (B)"), ("no", "no solution"), ("x^2-1", "x^2+1"),
    ("(1,2)", "1,2"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2)"), ("1,2", "1,2,2"), ("[0,1]", "(0,1)"),
    (r"2\sqrt{3}", r"\sqrt{13}"), (r"2\sqrt3", "3.4641"), (r"\pi", "3.14159"),
    (r"\pi", r"\frac{22}{7}"),
    ("x=1,y=2", "x=2,y=1"), ("x>3", "x<3"), (r"(-\infty,3)", r"(-\infty,3]"), ("0", ""),
    ("0", r"10^{-50}"), ("1", r"1+10^{-50}"), ("1", "0.99999999999999999"), ("0", r"\infty-\infty"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("204_5", "204_6"),
    ("3R^2", "3r^2"), (r"\sqrt{x^2}", "x"), ("7", r"7\text{ (since }x>0)"), ("7", "7\n\n8"),
    (r"\pm 2", "2"), ("1000000", "1000001"), ("f(x)", "f(y)"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same_answers(exact, gold, answer):
    assert exact.verify(gold, answer) == "correct"


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(grader, gold, answer):
    assert grader.verify(gold, answer) in ("wrong", "no_answer", "unparseable")


@needs_sympy
@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\cot x", r"\frac{\cos x}{\sin x}", "correct"),
        (r"\cot x", r"\tan x", "wrong"),
        (r"\log_2 8", "3", "correct"),
        (r"\ln 8", r"3\ln 2", "correct"),
        (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", "correct"),
        (r"\sqrt{3+2\sqrt2}", "2.414213562373095", "wrong"),
        (r"2^{n+1}", r"2\cdot 2^n", "correct"),
        (r"\sin^2 x+\cos^2 x", "1", "correct"),
        (r"10^{-60}\sin 1", r"10^{-60}\sin 2", "wrong"),  # small is not zero
        (r"[-4,0]", r"-4\le k\le 0", "correct"),
        (r"[-4,0]", r"-4<k\le 0", "wrong"),
        (r"\sin A", r"\sin a", "unparseable"),  # math-verify does not tell them apart
        (r"\sqrt{x^2}", "x", "wrong"),
    ],
)
def test_symbolic_answers(grader, gold, answer, verdict):
    assert grader.verify(gold, answer) == verdict


def test_without_sympy_open_questions_stay_open(exact):
    assert exact.verify(r"\cot x", r"\frac{\cos x}{\sin x}") == "unparseable"
    assert exact.verify(r"\cot x", r"\cot{x}") == "correct"


@pytest.mark.parametrize(
    ("text", "protocol", "answer", "verdict"),
    [
        ("<think> 3 </think> <answer> 8 </answer>", "think_answer", "8", None),
        (r"<think>x</think><answer>It is \boxed{8}.</answer>", "think_answer", "8", None),
        (r"<think>x</think><answer>\boxed{7} \boxed{8}</answer>", "think_answer", None, "wrong"),
        ("<think>x</think><answer>7</answer><answer>8</answer>", "think_answer", None, "wrong"),
        ("<think>x</think><answer>7</answer> or 8", "think_answer", None, "wrong"),
        (r"<think>\boxed{7}</think>", "think_answer", None, "no_answer"),
        (r"<think>x</think> \boxed{7}", "think_answer", None, "no_answer"),
        ("<think> 3 + 5 is", "think_answer", None, "no_answer"),
        (r"<think>\boxed{7}</think> It is \boxed{8}.", "think", "8", None),
        (r"<think>\boxed{7}</think> I do not know what it is.", "think", None, "no_answer"),
        ("<think>x</think>\n\nSo we add.\nThe answer is 8.", "think", "8.", None),
        (r"\boxed{7} and more thought", "think", "7", None),
        ("|special_token|a|special_token|8", "cold_start", "8", None),
        (r"|special_token|\boxed{1}|special_token|\boxed{8}", "cold_start", "8", None),
        ("|special_token|a 8", "cold_start", None, "no_answer"),
        (r"so \boxed{5}, then \boxed{5}", None, "5", None),
        (r"so \boxed{5}, then \boxed{6}", None, None, "wrong"),
        (r"so \boxed{0.5}, then \boxed{\frac12}", None, r"\frac12", None),
        (r"so \boxed{5}\boxed{}", None, None, "wrong"),
        (r"so \boxed{", None, None, "no_answer"),
        ("", None, None, "no_answer"),
    ],
)
def test_extraction(text, protocol, answer, verdict):
    extracted = extract_answer(text, protocol)
    assert (extracted.answer, extracted.verdict) == (answer, verdict)
    assert (extracted.answer is None) == bool(extracted.fault)


def test_several_boxes_are_a_policy():
    assert extract_answer(r"\boxed{1} then \boxed{2}", several_boxes="last").answer == "2"
    with pytest.raises(ValueError, match="several_boxes must be 'wrong' or 'last'"):
        extract_answer("7", several_boxes="first")


def test_golds():
    for gold in ("7", r"\frac{1}{2}", r"\int_0^1 x dx", r"F_n = \sum_k F_k", "Evelyn", "A"):
        assert parse_gold(gold) == gold
    for gold in ("", " ", r"\frac{1", "nan", "None", "inf", r"\frac{1}{0}", "?", "x" * 3000):
        with pytest.raises(ValueError, match="gold answer"):
            parse_gold(gold)


def test_gold_errors_name_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "\\\\frac{1"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: gold .* cannot be read.*correct the answer"):
        load_problems(path, check=check_problem)


@needs_shared
@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "math500/test.jsonl", "mgsm/mgsm_de.tsv"])
def test_public_golds_are_typed_and_equal_themselves(exact, name):
    for problem in load_problems(SHARED / "data" / name, check=check_problem):
        gold = read_answer(problem.answer)  # raises where the grammar cannot read it
        assert same(gold, gold) is True, problem.answer
        assert exact.verify(problem.answer, rf"So \boxed{{{problem.answer}}}.") == "correct"
        assert exact.verify(problem.answer, "123456789.125") in ("wrong", "unparseable")


@needs_shared
@needs_sympy
def test_acceptance_cases(grader):
    """core: at most 3 wrong, none of them a false positive; hack: all; robust: all, each in 1 s."""
    tally, failed, slowest = Counter(), [], 0.0
    grader.verify(r"\cot x", r"\frac{1}{\tan x}")  # the worker is up
    for line in (SHARED / "cases" / "math_grader.jsonl").read_text().splitlines():
        case = json.loads(line)
        start = time.perf_counter()
        verdict = grader.verify(case["gold"], case["pred"])
        seconds = time.perf_counter() - start
        if case["tier"] == "robust":
            slowest = max(slowest, seconds)
        if (verdict == "correct") != case["expected"]:
            failed.append((case["tier"], case["id"], verdict))
            tally[case["tier"], verdict == "correct"] += 1
    assert tally["core", False] <= 3, failed
    assert tally["core", True] == 0, failed
    assert [f for f in failed if f[0] != "core"] == []
    assert slowest < 1.0


@pytest.mark.parametrize(
    "answer",
    ["9**9**9", "9^9^9^9", r"2^{-10^9}", "(x+1)^{100000}", "1" * 5000, "1e9999", "10^{10^{10}}!",
     "99999!", r"\binom{10^9}{5}", "(" * 500 + "1", r"\frac{" * 400 + "1", "-" * 1900 + "1",
     r"\sqrt{" * 60 + "2" + "}" * 60, "+".join("abcdefghij" * 60), r"(a+b+c+d+e+f)^{30}",
     r"\sum_{k=1}^{10^{12}} \frac1k", r"\sqrt[1000000007]{2}", "1,2," * 400, "x_{" * 300,
     r"\int_0^1 x^{x^x}dx", '__import__("os").system("id")', r"\pm" * 300 + "1",
     "2^{2^{2^{2^{30}}}}",
     r"\sqrt{" + "9" * 900 + "}"],
)  # fmt: skip
def test_hostile_answers_are_refused_at_once(exact, answer):
    start = time.perf_counter()
    assert exact.verify("42", answer) not in ("correct", "error")
    assert time.perf_counter() - start < 1.0


FRAGMENTS = [
    r"\frac", "{", "}", "(", ")", "[", "]", r"\{", r"\}", ",", "^", "_", "!", "%", r"\sqrt", r"\pm",
    r"\infty", "12", "1/2", "x", "sin", r"\begin{pmatrix}", r"\\", "&", r"\end{pmatrix}", r"\cup",
    "=", "<", r"\text{a}", "\\", "$", "é", "²", "٣", "1e5", ".", "-", "|", "i", r"\circ", "and",
    ":", r"\boxed{", "<answer>", "</think>", r"\left.", "e", " ", "million", "°",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12),
)
def test_any_text_gets_a_verdict(exact, gold, answer):
    gold, answer = "".join(gold), "".join(answer)
    verdict = exact.verify(gold, answer)
    try:
        parse_gold(gold)
    except ValueError:
        assert verdict != "unparseable"  # an error: it is not the answer's fault
        return
    assert verdict != "error"
    if "\\boxed" not in gold and "<answer>" not in gold and "</think>" not in gold:
        assert exact.verify(gold, gold) in ("correct", "unparseable")


@needs_sympy
def test_a_hanging_worker_is_killed_and_replaced():
    with MathReward(timeout=0.5) as grader:
        pool = grader.pool
        assert pool.compare("1", r"\cos 0") == "correct"
        start = time.perf_counter()
        assert pool.compare(r"\prod_{k=1}^n k^k", r"\sum_{k=0}^{n} k^{k^k}") == "timeout"
        assert time.perf_counter() - start < 3
        assert pool.num_restarts == 1
        start = time.perf_counter()
        assert pool.compare("1", r"\cos 0") == "correct"
        assert time.perf_counter() - start < 1  # a fork, no import of sympy


def test_a_worker_that_never_answers_is_late(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    ready = 'print(\'{"ready": true, "pid": 0}\', flush=True)'
    script.write_text(f"import time; {ready}; time.sleep(60)")
    monkeypatch.setattr(symbolic, "_WORKER", script)
    monkeypatch.setattr(symbolic, "_FORK_TIMEOUT", 0.5)
    pool = symbolic.SymbolicPool(0.2, 1, 1 << 30)
    pool.available = True
    start = time.perf_counter()
    assert pool.compare("1", "2") == "timeout"
    assert time.perf_counter() - start < 2
    script.write_text(ready)
    assert pool.compare("1", "2") == "error"  # no child came after the one that was late
    assert pool.compare("1", "2") == "error"  # it ended without an answer
    assert pool.num_restarts == 3
    pool.close()


@needs_sympy
def test_workers_that_die_are_replaced_and_threads_may_share():
    with MathReward(num_workers=2) as grader:
        pool = grader.pool
        assert pool.compare("1", r"\cos 0") == "correct"
        worker = pool._slots.get()
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        pool._slots.put(worker)
        verdicts = []
        before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)

        def ask(i):
            for k in range(10):
                verdicts.append(grader.verify(rf"\sin {i + k}", rf"2\sin({i + k})/2") == "correct")

        threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verdicts == [True] * 40
        assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == before
    with pytest.raises(RuntimeError, match="closed"):
        pool.compare("1", "2")


@needs_sympy
def test_workers_do_not_outlive_a_killed_trainer():
    code = (
        "from r1fast.rewards.math import MathReward; import os\n"
        "g = MathReward(); assert g.verify(r'\\ln 8', r'3\\ln 2') == 'correct'\n"
        "w = g.pool._slots.get(); print(w.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, check=False)
    pid = int(run.stdout)
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"worker {pid} still runs")


def _alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


HANGS = r"\sum_{k=0}^{n} k^{k^k}"  # what sympy is busy with for long; asked of the pool directly


@needs_sympy
def test_a_batch_keeps_its_order_and_its_deadline():
    with MathReward(timeout=30, cpu_timeout=30, num_workers=2) as grader:
        pool = grader.pool
        assert pool.compare_all([("1", r"\cos 0"), ("2", r"\cos 0")]) == ["correct", "wrong"]
        pairs = [("1", r"\cos 0"), (r"\prod_{k=1}^n k^k", HANGS), ("2", r"\cos 0")]
        start = time.monotonic()
        assert pool.compare_all(pairs, start + 2) == ["correct", "timeout", "wrong"]
        assert time.monotonic() - start < 4
        # both workers are busy until the deadline: what never began is no one's wrong answer
        busy = [(r"\prod_{k=1}^n k^k", HANGS + f"+{i}") for i in range(2)]
        start = time.monotonic()
        assert pool.compare_all([*busy, ("1", r"\cos 0")], start + 1.5) == [
            "timeout", "timeout", "error",
        ]  # fmt: skip
        assert time.monotonic() - start < 4
        assert pool.compare("1", r"\cos 0") == "correct"


@needs_sympy
def test_processor_time_ends_a_comparison_before_the_clock_does():
    with MathReward(timeout=60, cpu_timeout=0.3) as grader:
        start = time.monotonic()
        assert grader.pool.compare(r"\prod_{k=1}^n k^k", HANGS) == "timeout"
        assert time.monotonic() - start < 30
        assert grader.pool.compare("1", r"\cos 0") == "correct"


def test_batches_have_the_verdicts_of_single_calls(exact):
    rows = [(g, a) for g, a in SAME + DIFFERENT] * 2
    graded = exact.grade_all(rows)
    assert [g.verdict for g in graded] == [exact.verify(*row) for row in rows]
    with pytest.raises(ValueError, match="deadline must be above 0 seconds, got 0"):
        exact.grade_all(rows, deadline=0)


@needs_sympy
def test_event_loops_may_grade(grader):
    async def main():
        rows = [(r"\ln 8", r"3\ln 2"), ("7", r"\boxed{8}"), ("7", "")]
        beats = 0

        async def beat():
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.001)

        heart = asyncio.create_task(beat())
        batches = await asyncio.gather(*(grader.grade_all_async(rows) for _ in range(3)))
        heart.cancel()
        assert beats > 0
        return batches

    for batch in asyncio.run(main()):
        assert [g.verdict for g in batch] == ["correct", "wrong", "no_answer"]


def test_the_cache_answers_without_comparing_again(exact, monkeypatch):
    grader = MathReward(symbolic=False)
    assert grader.verify("1/2", "0.5") == "correct"
    monkeypatch.setattr(grader, "_compare", lambda *_: pytest.fail("compared again"))
    assert grader.verify("1/2", "0.5") == "correct"
    assert grader.counts["correct"] == 2


def test_trl_contract(exact):
    scores = exact(
        prompts=["a", "b", "c"],
        completions=[r"\boxed{8}", [{"role": "assistant", "content": "<answer>9</answer>"}], "x"],
        completion_ids=[[1], [2], [3]],
        answer=["8", "8", None],
        other=[1, 2, 3],
    )
    assert scores == [1.0, 0.0, None]
    with pytest.raises(ValueError, match="1 completions but 2 answers"):
        exact(completions=["a"], answer=["1", "2"])


def test_equivalence_classes_for_voting(exact):
    assert exact.equivalent("0.5", r"\frac12")
    assert not exact.equivalent("0.5", "0.25")


# --- what must not pass, and what must


@pytest.fixture(scope="module")
def both_tiers():
    with MathReward() as grader:
        yield grader


NOT_THE_SAME = [
    # real functions that differ left of -1 or right of 11
    (r"|x+2|", "x+2"), (r"\sqrt{(x+1)^2}", "x+1"), ("|x-11|", "11-x"), ("y = |x|", "y = x"),
    # notation that is no product of letters
    (r"\angle ABC", r"\angle ACB"), ("A^T", "A"), (r"\gcd(a,b)", r"\gcd(a,c)"), ("f(g(x))", "g(f(x))"),
    ("x^{(2)}", "x^2"), (r"A\times B", r"B\times A"), ("ABC", "ACB"), ("nCr", "rCn"), ("||x||", "|x|"),
    (r"\pm a\pm b", r"\pm(a+b)"), (r"\pm 1\pm 2", r"\pm 3"),
    ("(5, 6)", "(y, x) = (5, 6)"),
    # units and currencies
    ("60 mph", "60 miles"), (r"5\text{ N}", r"5\text{ J}"), (r"5\text{ Hz}", r"5\text{ kHz}"), (r"\$5", "£5"),
    (r"5\text{ square feet}", r"5\text{ cubic feet}"), (r"5\text{ cm}^2", r"5\text{ square feet}"),
    ("5 tons", "5 pounds"), ("5 cents", r"\$5"), (r"25\%", "25 percentage points"),
    *[("7", f"7 {words}") for words in (
        "point five", "eight", "twentieths", "quadrillion", "lakh", "doubled", "until nine", "nope", "cannot",
        r"\text{ eight}", r"\text{K}", "basis points", "percentage", "gross",
    )],
    # a letter that is taken back, or one of two
    *[("C", text) for text in (
        "(C) or D", "(C) and D", "(C) is wrong, the answer is D", "C. Actually D", "C) no, D", "(C) not",
        "C: maybe D",
    )],
    ("7", "#### 8\n#### 7"),
]  # fmt: skip
THE_SAME = [
    (r"3\pm\sqrt{2}", r"3+\sqrt2, 3-\sqrt2"), (r"\pm 1", r"\{1, -1\}"), (r"a \pm b \mp c", "a+b-c, a-b+c"),
    (r"\pm 1\pm 2", "3, -1, 1, -3"),
    ("x^{3/2}", r"x\sqrt{x}"), (r"2\ln x", r"\ln(x^2)"), (r"\sqrt{x}\sqrt{x+1}", r"\sqrt{x^2+x}"), ("|x-3|", "|3-x|"),
    (r"\frac{1}{2}h(b_1+b_2)", r"\frac{h(b_1+b_2)}{2}"), (r"Ce^{-x}", r"\frac{C}{e^x}"), ("(1+i)^2", "2i"),
    ("AB", "BA"), ("(6, 5)", "(y, x) = (5, 6)"), ("(3, 2)", "(n, k) = (3, 2)"),
    (r"\$5", "5 dollars"), ("5", "€5"), ("12.50", "$12.5"), ("60", "60 km/h"), ("60 mph", "60 miles per hour"),
    (r"5\text{ square feet}", r"5\text{ ft}^2"), ("500000", "5 lakh"), ("7", "7 apples"), (r"300\text{ K}", "300"),
    ("C", "(C) No solution"), ("C", "C. Vitamin D"), ("C", "C) 5 and 6"), ("IV", r"\text{IV}"),
    ("5 boys, 3 girls", "3 girls, 5 boys"), ("m=2,b=1", "2, 1"), ("1", r"1\text{st}"), ("11th", "11"), ("7", "seven"),
    (r"(-\infty, 2)", "(-inf, 2)"), ("does not exist", "DNE"), ("7", "7\u200b"), ("x=1, y=2", "(1, 2)"), ("7", "so\n#### 7\n#### 7.0"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), NOT_THE_SAME)
def test_what_only_looks_the_same(both_tiers, gold, answer):
    assert both_tiers.verify(gold, answer) != "correct"


@pytest.mark.parametrize(("gold", "answer"), THE_SAME)
def test_what_is_the_same_written_otherwise(both_tiers, gold, answer):
    assert both_tiers.verify(gold, answer) == "correct"


@pytest.mark.parametrize("text", [
    r"-\boxed{7}", r"x = - \boxed{7}", r"$\frac{1}{\boxed{7}}$", r"$\sqrt{\boxed{7}}$", r"$2\cdot\boxed{7}$",
    r"\boxed{7}^2", r"\boxed{7}00", r"\boxed{7} 8 9", r"\boxed{7} or 8", r"\boxed{7}, or maybe $8$",
    r"It is not \boxed{7}.", r"\boxed{7}. Wait, no: it is 8.", r"\boxed{7}. No, 8.", r"\boxed{7}\framebox{8}",
    "Answer: 8\nAnswer: 7",
])  # fmt: skip
def test_a_box_that_is_a_part_or_taken_back(text):
    with MathReward(symbolic=False) as grader:
        assert grader.grade("7", f"<think>a</think>\n{text}", "think").verdict == "wrong"


@pytest.mark.parametrize("text", [
    r"So $x=\boxed{7}$ apples.", r"\[ \boxed{7} \]", r"- \boxed{7}", r"**\boxed{7}**", r"$\boxed{7}$-gon",
    r"There are \boxed{7} ways, no more and no less.", r"\frac{14}{2} = \boxed{7}", "\\boxed{7}\n\n2 are odd.",
    r"14 \equiv \boxed{7} \pmod{11}", r"= \boxed{7}$ or seven.", "Answer: 7\nAnswer: 7.0", r"${\boxed{7}}$",
])  # fmt: skip
def test_a_box_in_ordinary_prose(text):
    with MathReward(symbolic=False) as grader:
        assert grader.grade("7", f"<think>a</think>\n{text}", "think").verdict == "correct"


def test_a_percent_sign_behind_the_box_belongs_to_it():
    with MathReward(symbolic=False) as grader:
        assert grader.grade(r"25\%", r"It is \boxed{25}\%.").answer == r"25\%"
        assert grader.verify("0.25", r"\boxed{25}\%") == "correct"


@pytest.mark.parametrize("answer", [
    "(" * 28 + r"\pm 1" + ")" * 28, "(1," * 28 + r"\pm 1" + ")" * 28, r"\pm 1" * 30,
])  # fmt: skip
def test_plus_minus_signs_do_not_double_the_work(answer):
    start = time.perf_counter()
    with MathReward(symbolic=False) as grader:
        assert grader.verify("7", answer) != "correct"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("text", [
    "**Final answer:** **18**", "### Final Answer\n**18**", "# Answer\n18", "Therefore, x = 18.", "Thus $x=18$.",
    "The final answer is **18**.", "答案是18。", "La respuesta es 18.", "Die Antwort ist 18.", "La réponse est 18.",
    "Ответ: 18", "答えは18です。", "คำตอบคือ 18", "Jibu ni 18", "উত্তর হল 18",
])  # fmt: skip
def test_a_summary_that_states_its_answer_without_a_box(text):
    with MathReward(symbolic=False) as grader:
        assert grader.grade("18", f"<think>a</think> {text}").verdict == "correct"
        assert grader.grade("19", f"<think>a</think> {text}").verdict == "wrong"


def test_a_gold_that_cannot_be_read_is_no_answers_fault(capsys):
    with MathReward(symbolic=False) as grader:
        rewards = grader(completions=["7", "7", "7"], answer=["\\frac{", "", "7"])
        assert rewards == [None, None, 1.0]
        assert grader.counts["error"] == 2
    assert "correct the answer or drop the row" in capsys.readouterr().err


def test_an_interrupted_comparison_does_not_shift_the_next(monkeypatch):
    """A Ctrl-C in a notebook leaves a reply in the pipe: the next question must not get it."""
    with MathReward() as grader:
        assert grader.pool.compare("1", r"\cos 0") == "correct"
        real = symbolic._Worker.read
        for lost in ("wrong", "right"):

            def interrupted(worker, timeout):
                raise KeyboardInterrupt

            monkeypatch.setattr(symbolic._Worker, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                grader.pool.compare("1", r"\cos 0" if lost == "right" else r"\sin 0")
            monkeypatch.setattr(symbolic._Worker, "read", real)
            verdicts = [grader.pool.compare("1", a) for a in (r"\sin 0", r"\cos 0", r"\sin 0")]
            assert verdicts == ["wrong", "correct", "wrong"]
