"""Wrong variants of right programs: the first change of the syntax tree that plain execution refutes."""

import ast
import json
import subprocess
import sys

_SWAP = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


def _sites(tree):
    """(node, what to change it to) for every change, in the order of the code."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in _SWAP:
            yield node, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAP:
            yield node, "ops"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, bool, str):
            yield node, "value"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node, "return"


def _mutant(code, number):
    tree = ast.parse(code)
    node, what = list(_sites(tree))[number]
    if what == "op":
        node.op = _SWAP[type(node.op)]()
    elif what == "ops":
        node.ops[0] = _SWAP[type(node.ops[0])]()
    elif what == "return":
        node.value = ast.Tuple([node.value], ast.Load())
    elif isinstance(node.value, bool):
        node.value = not node.value
    else:
        node.value = node.value + (1 if isinstance(node.value, int) else "x")
    return ast.unparse(ast.fix_missing_locations(tree))


def _refuted(code, test):
    """Whether an assertion fails, or anything else does, within a second."""
    import signal

    space = {"__name__": "mutant"}
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        exec(code, space)
        exec(test, space)
    except TimeoutError:
        return False  # rather a mutant that answers
    except Exception:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return False


def main():
    """Rows of {code, test} on stdin; for each a mutant, or null."""
    import random
    import signal

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for row in map(json.loads, sys.stdin):
        rng = random.Random(len(row["code"]))
        found = None
        numbers = list(range(len(list(_sites(ast.parse(row["code"]))))))
        rng.shuffle(numbers)
        for number in numbers:
            code = _mutant(row["code"], number)
            random.seed(0)
            if code != ast.unparse(ast.parse(row["code"])) and _refuted(code, row["test"]):
                found = code
                break
        sys.__stdout__.write(json.dumps(found) + "\n")


def wrong_mutants(rows):
    """A wrong variant of each (code, test), found in a plain process without any sandbox."""
    text = "".join(json.dumps({"code": code, "test": test}) + "\n" for code, test in rows)
    done = subprocess.run(
        [sys.executable, "-I", __file__], input=text, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    main()
