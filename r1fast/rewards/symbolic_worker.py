"""The process behind symbolic.py: reads two answers, says whether they are the same value.

It imports sympy and forks a child that compares; the parent, or the child's own watch, ends a
comparison that takes too long, and the next child is there in milliseconds.

Not imported by the package; run as a script. math-verify reads the LaTeX. The comparison is our
own, for math-verify's rounds to 6 decimals: 1/2004! = 1/2006!. Two expressions are the same when
they agree to 40 digits at random points; one clear difference decides against.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import threading
import time

# (low, high, signs) of the variables of each point: first where roots and logarithms are real
RANGES = ((3, 11, (1,)), (3, 11, (1,)), (0, 2, (1,)), (0, 2, (1, -1)), (1, 12, (1, -1)), (1, 12, (1, -1)),
          (2, 12, (-1,)), (20, 200, (1,)), (20, 200, (-1,)))  # fmt: skip
DIGITS = 60
AGREE = 40  # digits
OUT_OF_TIME = 3  # exit status, known to symbolic.py


def main() -> None:
    """Import sympy once, then fork: a comparison that is killed costs a fork, not an import."""
    for number in (
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # of a whole job: for the trainer, which ends us
        signal.signal(number, signal.SIG_IGN)
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a stray print must not break the protocol
    try:
        warm_up()
    except Exception as error:  # the parent must hear of it, whatever it is
        say(out, {"ready": False, "why": repr(error)})
        return
    memory_bytes, cpu_seconds = int(sys.argv[1]), float(sys.argv[2])
    while True:
        child = os.fork()
        if child == 0:
            serve(out, memory_bytes, cpu_seconds)
        say(out, {"ready": True, "pid": child})
        if (status := wait(child)) is None or os.waitstatus_to_exitcode(status) == 0:
            return
        say(out, {"late": os.waitstatus_to_exitcode(status) == OUT_OF_TIME})


def say(out: int, message: dict) -> None:
    os.write(out, json.dumps(message).encode() + b"\n")  # one write: lines never mix


def wait(child: int) -> int | None:
    """The status of the child when it ends; None, and no child, where the trainer has ended."""
    poll = select.poll()
    poll.register(0, 0)  # nothing but a hang-up
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if poll.poll(20):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None


def warm_up() -> None:
    """The parser learns its grammar by use: seconds at first, milliseconds later."""
    for text in (
        r"\frac{\sqrt{3}}{2}+x^{2}\cdot 5", r"\sin(\cos(\tan(2x)))", r"\ln(ab)-\log_2 8", r"e^{x+1}",
        r"(x-1)(x+2)", r"\sqrt[3]{x^2-2}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"1<x\le 2", r"y=2x",
    ):  # fmt: skip
        compare(text, text)


def serve(out: int, memory_bytes: int, cpu_seconds: float) -> None:
    """Answer requests until there are no more; never returns."""
    limit(memory_bytes)
    watch = Watch(cpu_seconds)
    for line in sys.stdin:
        request = json.loads(line)
        watch.begin()
        try:
            reply = {"same": compare(request["gold"], request["answer"])}
        except MemoryError:
            reply = {"same": None, "why": "memory"}
        except RecursionError:
            reply = {"same": None, "why": "recursion"}
        except Exception as error:  # sympy raises everything
            reply = {"same": None, "why": repr(error)[:200]}
        watch.end()
        say(out, reply | {"id": request["id"]})
    os._exit(0)


class Watch:
    """Ends the process when a comparison has used `seconds` of processor time."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.end_at = float("inf")  # of time.process_time
        self.busy = threading.Event()
        threading.Thread(target=self.look, daemon=True).start()

    def begin(self) -> None:
        self.end_at = time.process_time() + self.seconds
        self.busy.set()

    def end(self) -> None:
        self.busy.clear()
        self.end_at = float("inf")

    def look(self) -> None:
        while self.busy.wait():
            if time.process_time() > self.end_at:
                os._exit(OUT_OF_TIME)
            time.sleep(0.02)


def limit(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:
        return
    for name, value in (
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 64),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def read(text: str):
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # its time-outs are SIGALRM; ours is the parent's clock
    )
    return found[0] if found else None


def compare(gold_text: str, answer_text: str) -> bool | None:
    import sympy

    gold, answer = read(gold_text), read(answer_text)
    if gold is None or answer is None:
        return None
    return same(sympy, gold, answer)


def same(sympy, gold, answer) -> bool | None:
    if gold == answer:
        return True
    if isinstance(gold, sympy.Eq) != isinstance(answer, sympy.Eq):
        # "y = x + 3" stands for its right side, an equation does not stand for a value
        side = assigned(sympy, gold), assigned(sympy, answer)
        return same(sympy, *side) if None not in side else False
    if isinstance(gold, sympy.Eq):
        g, a = gold.lhs - gold.rhs, answer.lhs - answer.rhs
        points = list(sample(sympy, g, a))
        ratios = [x / y for x, y in points if y != 0]
        if not ratios or len(ratios) < len(points) or ratios[0] == 0:
            return None
        return all(close(sympy, r, ratios[0]) for r in ratios)
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        if gold.shape != answer.shape:
            return False
        return every(same(sympy, g, a) for g, a in zip(gold, answer, strict=True))
    if isinstance(gold, (sympy.Tuple, tuple)) and isinstance(answer, (sympy.Tuple, tuple)):
        if len(gold) != len(answer) or type(gold) is not type(answer):
            return False
        return every(same(sympy, g, a) for g, a in zip(gold, answer, strict=True))
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        left = list(answer)
        for g in gold:
            match = next((a for a in left if same(sympy, g, a)), None)
            if match is None:
                return False
            left.remove(match)
        return not left
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        return same_expression(sympy, gold, answer)
    sets = as_set(sympy, gold), as_set(sympy, answer)
    if None not in sets:
        unknowns = [side.free_symbols for side in (gold, answer) if side.free_symbols]
        if len(unknowns) == 2 and unknowns[0] != unknowns[1]:
            return False
        return bool(sets[0] == sets[1]) or (None if sets[0].free_symbols else False)
    return None


def assigned(sympy, side):
    if isinstance(side, sympy.Eq):
        return side.rhs if isinstance(side.lhs, sympy.Symbol) else None
    return side


def every(results) -> bool | None:
    outcome: bool | None = True
    for result in results:
        if result is False:
            return False
        outcome = outcome and result
    return outcome


def as_set(sympy, side):
    """An interval, or an inequality in one unknown, as a set of reals."""
    if isinstance(side, sympy.Set):
        return side
    if isinstance(side, (sympy.core.relational.Relational, sympy.And, sympy.Or)):
        if len(side.free_symbols) == 1:
            return side.as_set()
    return None


def same_expression(sympy, gold, answer) -> bool | None:
    num_points = 0
    for x, y in sample(sympy, gold, answer):
        if not close(sympy, x, y):
            return False  # most wrong answers end at the first point
        num_points += 1
    return True if num_points >= (2 if gold.free_symbols | answer.free_symbols else 1) else None


def sample(sympy, a, b):
    """Pairs of 60-digit values at random points of every sign, near and far.

    Left out is a point where one is no number, and, unless i is written, one where a root or logarithm is not real:
    there the sides may be on different branches, as of sqrt(x^3) and x sqrt(x).
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    is_complex = any(e.has(sympy.I) for e in (a, b))
    rng = random.Random(0)
    for low, high, signs in RANGES if symbols else RANGES[:1]:
        point = {
            s: sympy.Rational(rng.randint(low * 10**6, high * 10**6), 10**6) * rng.choice(signs)
            for s in symbols
        }
        if symbols and not is_complex and not all(is_real(sympy, e, point) for e in (a, b)):
            continue
        x, y = (number(e.subs(point)) for e in (a, b))
        if all(v.is_number and v.is_finite for v in (x, y)):
            yield x, y


def is_real(sympy, expression, point) -> bool:
    """Whether the roots, logarithms and arcs in it have real values."""
    for node in sympy.preorder_traversal(expression):
        inner = None
        if node.is_Pow and not node.exp.is_integer:
            inner = node.base
        elif isinstance(node, sympy.log):
            inner = node.args[0]
        elif isinstance(node, (sympy.asin, sympy.acos)):
            inner = 1 - node.args[0] ** 2
        if inner is not None:
            value = inner.subs(point).evalf(15)
            if value.is_number and not value.is_nonnegative:
                return False
    return True


def number(expression):
    """60 correct digits however small the value is; 0 where the value cancels to nothing."""
    from sympy.core.evalf import PrecisionExhausted

    try:
        return expression.evalf(DIGITS, strict=True)
    except PrecisionExhausted:
        rough = expression.evalf(DIGITS)
        return rough * 0 if rough.is_number and abs(rough) < 10**-AGREE else rough


def close(sympy, x, y) -> bool:
    difference = abs((x - y).evalf(DIGITS))
    return bool(difference <= max(abs(x), abs(y)) * sympy.Float(10, DIGITS) ** -AGREE)


if __name__ == "__main__":
    main()
