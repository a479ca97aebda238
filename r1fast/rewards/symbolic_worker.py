"""The process behind symbolic.py: reads two answers, says whether they are the same value.

Not imported by the package; run as a script. math-verify reads the LaTeX. The comparison is our
own, for math-verify's rounds to 6 decimals: 1/2004! = 1/2006!. Two expressions are the same when
they agree to 40 digits at random points; one clear difference decides against.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time

NUM_POINTS = 6
DIGITS = 60
AGREE = 40  # digits


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a stray print must not break the protocol
    try:
        import math_verify  # noqa: F401
        import sympy  # noqa: F401
    except Exception as error:  # the parent must hear of it, whatever it is
        replies.write(json.dumps({"ready": False, "why": repr(error)}) + "\n")
        return
    limit(int(sys.argv[1]))
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"same": compare(request["gold"], request["answer"])}
        except MemoryError:
            reply = {"same": None, "why": "memory"}
        except RecursionError:
            reply = {"same": None, "why": "recursion"}
        except Exception as error:  # sympy raises everything
            reply = {"same": None, "why": repr(error)[:200]}
        replies.write(json.dumps(reply) + "\n")


def end_with_parent(parent: int) -> None:
    """A worker in the middle of a hopeless simplification must not outlive a killed trainer."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
    points = list(sample(sympy, gold, answer))
    if any(not close(sympy, x, y) for x, y in points):
        return False
    return True if len(points) >= (2 if gold.free_symbols | answer.free_symbols else 1) else None


def sample(sympy, a, b):
    """Pairs of 60-digit values at random points; points where one is no number are left out."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    rng = random.Random(0)
    for turn in range(NUM_POINTS if symbols else 1):
        low = 2 if turn < 3 else -2  # first where roots and logarithms are real
        point = {s: sympy.Rational(rng.randint(10**6, 9 * 10**6), 10**6) + low for s in symbols}
        x, y = (number(e.subs(point)) for e in (a, b))
        if all(v.is_number and v.is_finite for v in (x, y)):
            yield x, y


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
