"""Verdicts a second of the mathematics grader: the exact tier on one core, the symbolic one in workers.

No answer is seen twice, so nothing comes out of a cache. "numbers": integers, thousands and decimals in
boxes and tags; "fractions"; "expressions": what the first tier's algebra compares; "symbolic": logarithms and functions, which
sympy decides in the worker processes; "hostile": a tenth of the symbolic ones are powers of powers, deep
nests and sums that sympy is killed over. Where math-verify is installed, its own `verify` is the peer on the
same rows without the hostile ones (its time-outs are signals, and off here).

    python benchmarks/bench_rewards.py [number of verdicts]
"""

import logging
import random
import sys
import time
from importlib.util import find_spec

from common import append_rows, print_table

from r1fast.rewards.math import MathReward

WORKERS = (1, 2)


def numbers(n: int, rng: random.Random) -> list[tuple[str, str]]:
    rows = []
    for i in range(n):
        value = rng.randrange(10_000, 10_000_000)
        gold, text = (
            (f"{value}", rf"\boxed{{{value:,}}}"),
            (f"{value}", rf"So it is $\boxed{{{value + i % 3}}}$."),
            (f"{value / 1000}", rf"\boxed{{{value / 1000:.4f}}}"),
            (f"{value}", rf"<think>{value}</think><answer>{value}.0</answer>"),
        )[i % 4]
        rows.append((gold, text))
    return rows


def fractions(n: int, rng: random.Random) -> list[tuple[str, str]]:
    rows = []
    for i in range(n):
        value = rng.randrange(10_000, 10_000_000)
        gold, text = (
            (f"{value}/1000", rf"\boxed{{{value / 1000}}}"),
            (rf"\frac{{{value}}}{{7}}", rf"\boxed{{\dfrac{{{2 * value + i % 3}}}{{14}}}}"),
        )[i % 2]
        rows.append((gold, text))
    return rows


def expressions(n: int, rng: random.Random) -> list[tuple[str, str]]:
    rows = []
    for i in range(n):
        a, b = rng.randrange(2, 10_000), rng.randrange(2, 10_000)
        gold, text = (
            (rf"x^2+{a + b}x+{a * b}", rf"\boxed{{(x+{a})(x+{b})}}"),
            (rf"{a}\sqrt{{2}}+{b}", rf"\boxed{{{b}+\sqrt{{{2 * a * a}}}}}"),
            (
                rf"(-\infty,{a}]\cup[{a + b},\infty)",
                rf"\boxed{{x\le {a} \text{{ or }} x\ge {a + b}}}",
            ),
            (rf"\left({a},\frac{{{b}}}{{3}}\right)", rf"\boxed{{({a},{b}/3)}}"),
        )[i % 4]
        rows.append((gold, text))
    return rows


def symbolic(n: int, rng: random.Random) -> list[tuple[str, str]]:
    rows = []
    for i in range(n):
        a, b = rng.randrange(2, 10_000), rng.randrange(2, 10_000)
        rows.append(
            (
                (rf"\ln({a * b})", rf"\boxed{{\ln {a}+\ln {b}}}"),
                (rf"\tan(x)+{a}", rf"\boxed{{\frac{{\sin x}}{{\cos x}}+{a}}}"),
                (rf"2^{{n}}+{a}", rf"\boxed{{2\cdot 2^{{n-1}}+{a + i % 8 // 4}}}"),
                (rf"\log_2 {2**10 * a}", rf"\boxed{{10+\log_2 {a}}}"),
            )[i % 4]
        )
    return rows


def hostile(n: int, rng: random.Random) -> list[tuple[str, str]]:
    rows = symbolic(n, rng)
    for i in range(0, n, 10):
        a = rng.randrange(2, 10_000)
        rows[i] = (
            rf"\ln {a}",
            (
                rf"\boxed{{9^{{9^{{{a}}}}}}}",
                rf"\boxed{{\sqrt{{{a}+\sqrt{{2+\sqrt{{3+\sqrt{{5+\sqrt{{7+\sin(\cos(\tan {a}))}}}}}}}}}}}}",
                rf"\boxed{{{a}!+\gcd(10^{{60}}!,{a})}}",
                "<think>" * 300 + rf"</think>\boxed{{{'(' * 300}{a}}}",
                rf"\boxed{{\binom{{{a}}}{{5}}\cdot e^{{e^{{e^{{{a}}}}}}}}}",
            )[i // 10 % 5],
        )
    return rows


def rate(grader: MathReward, rows: list[tuple[str, str]], batch: int = 256) -> tuple[float, dict]:
    before = dict(grader.counts)
    start = time.perf_counter()
    for at in range(0, len(rows), batch):
        grader.grade_all(rows[at : at + batch])
    seconds = time.perf_counter() - start
    counts = {k: n - before.get(k, 0) for k, n in grader.counts.items() if n - before.get(k, 0)}
    return len(rows) / seconds, counts


def peer_rate(rows: list[tuple[str, str]]) -> float:
    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # one line a call: that nothing watches the time
    start = time.perf_counter()
    for gold, text in rows:
        found = parse(f"${gold}$", parsing_timeout=None), parse(text, parsing_timeout=None)
        verify(*found, timeout_seconds=None)
    return len(rows) / (time.perf_counter() - start)


def main() -> None:
    num_verdicts = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    num_symbolic = max(50, num_verdicts // 40)
    has_peer = find_spec("math_verify") is not None
    rng = random.Random(0)
    rows, table = [], []

    def add(mix: str, variant: str, per_second: float, counts: dict) -> None:
        rows.append((f"mix={mix}", variant, "verdicts", per_second, "1/s"))
        table.append(
            [mix, variant, f"{per_second:,.0f}", ", ".join(f"{n} {k}" for k, n in counts.items())]
        )

    for name, make in (
        ("numbers", numbers),
        ("fractions", fractions),
        ("expressions", expressions),
    ):
        with MathReward(symbolic=False) as grader:
            grader.grade_all(make(100, random.Random(1)))
            add(name, "exact tier, 1 core", *rate(grader, make(num_verdicts, rng)))
        if has_peer:
            add(name, "math-verify, 1 core", peer_rate(make(num_symbolic, rng)), {})
    for name, make in (("symbolic", symbolic), ("hostile", hostile)):
        for num_workers in WORKERS if has_peer else ():
            with MathReward(num_workers=num_workers) as grader:
                grader.pool.compare_all(
                    [(rf"\ln {i}", r"\ln 2") for i in range(3, 7)]
                )  # all are up
                per_second, counts = rate(grader, make(num_symbolic, rng))
                add(name, f"symbolic tier, {num_workers} workers", per_second, counts)
                killed = grader.pool.num_restarts
                rows.append(
                    (
                        f"mix={name}",
                        f"symbolic tier, {num_workers} workers",
                        "killed",
                        killed,
                        "count",
                    )
                )
        if has_peer and name == "symbolic":
            add(name, "math-verify, 1 core", peer_rate(make(num_symbolic, rng)), {})
    print_table(["mix", "variant", "verdicts/s", "verdicts"], table)
    append_rows("rewards", rows)


if __name__ == "__main__":
    main()
