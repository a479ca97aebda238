"""A programming problem: how its row is read, checked and turned into a job for the sandbox.

Four ways to say what is right, one a row; expected values never go where the candidate's code runs:

    tests = [{"input": "3 4\\n", "output": "7\\n"}]                a program: standard input and output
    tests = [{"args": [3, 4], "expected": 7}], entry_point         a function, or a method of Solution
    tests = ["assert add(3, 4) == 7"] (or test_list)               assertions, as in MBPP
    test = "def check(candidate): ...", entry_point                a check, as in HumanEval

`input_output` (APPS, TACO) is read too, and lists may come as JSON text. `setup` runs before the tests,
`preamble` before the candidate's code; a HumanEval prompt is both.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1fast.rewards.program_output import COMPARISONS

LANGUAGES = {"python": "python", "python3": "python", "py": "python",
             "cpp": "cpp", "c++": "cpp", "cxx": "cpp"}  # fmt: skip
COLUMNS = (
    "programming_language", "tests", "test_list", "test_imports", "test_setup_code", "challenge_test_list",
    "test", "entry_point", "input_output", "setup", "preamble", "comparison", "tolerance",
    "time_limit", "memory_limit_mib", "result_from",
)  # fmt: skip
MAX_SECONDS, MAX_MEMORY_MIB = 600, 1 << 16  # what a row may ask for
MAX_CODE = 256 << 10  # bytes of a candidate's code
_COMPILE_MEMORY = 2 << 30
_FILE_BYTES = 64 << 20
_STACK_BYTES = 64 << 20
_REFEREE_MEMORY = 512 << 20
_OUTPUT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """What a candidate is held against. `mode`: "programs" (stdin, stdout) or "calls" (functions)."""

    mode: str
    tests: tuple[dict[str, Any], ...]
    language: str = "python"
    names: tuple[str, ...] = ()  # the candidate's functions that tests call
    setup: str = ""
    check: str = ""  # test code that is run once, before the tests
    preamble: str = ""
    comparison: str = "lines"
    tolerance: float = 0.0
    time_limit: float = 0.0  # seconds a test may take; 0 = the reward's own
    memory_mib: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def job(
        self, code: str, *, timeout: float, total_timeout: float, memory_mib: int, stop_early: bool
    ) -> dict[str, Any]:
        """The message to the launcher."""
        seconds = self.time_limit or timeout
        memory = (self.memory_mib or memory_mib) << 20
        output = max([_OUTPUT_BYTES] + [2 * len(t.get("output", "")) for t in self.tests])
        is_cpp = self.language == "cpp"
        return {
            "mode": self.mode,
            "language": self.language,
            "code": code,
            "preamble": self.preamble,
            "names": list(self.names),
            "setup": self.setup,
            "check": self.check,
            "tests": list(self.tests),
            "comparison": self.comparison,
            "tolerance": self.tolerance,
            "stop_early": stop_early,
            "limits": {
                "cpu": math.ceil(seconds),
                # a core may be shared with another box
                "wall": 1.5 * seconds + 1,
                "total": max(total_timeout, 1.5 * seconds + 1),
                "total_cpu": math.ceil(max(total_timeout, seconds)),
                "memory": memory,
                "box_memory": max(memory, _COMPILE_MEMORY) if is_cpp else memory,
                "file": _FILE_BYTES,
                "output": output,
                "stack": min(_STACK_BYTES, memory // 2),
                "compile_memory": _COMPILE_MEMORY,
                "compile_cpu": 15,
                "compile_wall": 30.0,
                "referee_memory": _REFEREE_MEMORY,
            },
        }


def read_code_problem(columns: Mapping[str, Any], prompt: str = "") -> CodeProblem:
    """A problem from the columns of a row. ValueError for what could never be verified."""
    language = _language(columns)
    entry = _string(columns, "entry_point")
    options: dict[str, Any] = {
        "language": language,
        "setup": _setup(columns),
        "preamble": _string(columns, "preamble"),
        "comparison": _string(columns, "comparison") or "lines",
        "tolerance": _number(columns, "tolerance", 0.0),
        "time_limit": _number(columns, "time_limit", 0.0, MAX_SECONDS),
        "memory_mib": int(_number(columns, "memory_limit_mib", 0, MAX_MEMORY_MIB)),
    }
    if options["comparison"] not in COMPARISONS:
        raise ValueError(
            f"'comparison' must be one of {', '.join(COMPARISONS)}, got {options['comparison']!r}"
        )
    given = [
        n for n in ("tests", "test_list", "test", "input_output") if columns.get(n) is not None
    ]
    if len(given) != 1:
        raise ValueError(
            "a code problem needs one of 'tests', 'test_list', 'test' and 'input_output', "
            f"got {' and '.join(map(repr, given)) or 'none'}"
        )
    if given == ["test"]:
        return _check_problem(_string(columns, "test"), entry, prompt, options)
    if given == ["input_output"]:
        tests, entry = _apps_tests(columns["input_output"], entry)
    else:
        tests = _listed(columns[given[0]], given[0])
    if not tests:
        raise ValueError(f"{given[0]!r} holds no tests: nothing could be verified")
    if all(isinstance(test, str) for test in tests):
        return _assert_problem(tests, entry, options)
    if not all(isinstance(test, Mapping) for test in tests):
        raise ValueError(f"{given[0]!r} must hold objects or assertions, got {tests[0]!r:.80}")
    tests = [_present(test) for test in tests]
    if all("output" in test for test in tests):
        return CodeProblem("programs", tuple(_program_test(t) for t in tests), **options)
    if all("expected" in test for test in tests):
        return _function_problem(tests, entry, columns.get("result_from"), options)
    raise ValueError(
        "a test must have 'input' and 'output', or 'args' and 'expected'; "
        f"got {', '.join(map(repr, tests[0])) or 'an empty object'}"
    )


def _present(test: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a test has: Arrow fills in None where rows of a dataset have different ones. A function
    may be expected to return None."""
    is_program = test.get("output") is not None
    return {k: v for k, v in test.items() if v is not None or (k == "expected" and not is_program)}


def _language(columns: Mapping[str, Any]) -> str:
    text = (_string(columns, "programming_language") or "python").strip().lower()
    if text not in LANGUAGES:
        raise ValueError(
            f"'programming_language' must be one of {', '.join(LANGUAGES)}, got {text!r}"
        )
    return LANGUAGES[text]


def _setup(columns: Mapping[str, Any]) -> str:
    imports = columns.get("test_imports") or ()
    if isinstance(imports, str):
        imports = [imports]
    lines = [*imports, _string(columns, "test_setup_code"), _string(columns, "setup")]
    text = "\n".join(line for line in lines if line)
    _parse(text, "setup")
    return text


def _string(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, got {value!r:.80}")
    return value


def _number(columns: Mapping[str, Any], name: str, default: float, most: float = math.inf) -> float:
    value = columns.get(name)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most or value == math.inf:
        limit = "of at least 0" if most == math.inf else f"from 0 to {most:g}"
        raise ValueError(f"{name!r} must be a number {limit}, got {value!r:.80}")
    return value


def _listed(value: Any, name: str) -> list:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name!r} is text that is not JSON: {error}") from None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise ValueError(f"{name!r} must be a list, got {value!r:.80}")
    return list(value)


def _parse(code: str, name: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name!r} is not Python: {error}") from None


def _apps_tests(value: Any, entry: str) -> tuple[list, str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"'input_output' is text that is not JSON: {error}") from None
    if not isinstance(value, Mapping) or not {"inputs", "outputs"} <= value.keys():
        raise ValueError("'input_output' must be an object with 'inputs' and 'outputs'")
    inputs, outputs = _listed(value["inputs"], "inputs"), _listed(value["outputs"], "outputs")
    if len(inputs) != len(outputs):
        raise ValueError(f"'input_output' has {len(inputs)} inputs but {len(outputs)} outputs")
    entry = value.get("fn_name") or entry
    pairs = zip(inputs, outputs, strict=True)
    if not entry:
        return [{"input": _joined(i), "output": _joined(o)} for i, o in pairs], ""
    # an output may stand in a list of its own
    return [{"args": i, "expected": o[0] if isinstance(o, list) and len(o) == 1 else o}
            for i, o in pairs], entry  # fmt: skip


def _joined(value: Any) -> Any:
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def _program_test(test: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("input", "output"):
        if not isinstance(test.get(name, ""), str):
            raise ValueError(f"a test's {name!r} must be a string, got {test[name]!r:.80}")
    return {"input": test.get("input", ""), "output": test["output"]}


def _function_problem(
    tests: list[Mapping], entry: str, result_from: Any, options: dict[str, Any]
) -> CodeProblem:
    entry = _entry_point(entry)
    if result_from is not None and (type(result_from) is not int or result_from < 0):
        raise ValueError(f"'result_from' must be the index of an argument, got {result_from!r}")
    read = []
    for test in tests:
        args, kwargs = test.get("args", []), test.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(
                f"a test's 'args' must be a list, 'kwargs' an object; got {test!r:.80}"
            )
        if result_from is not None and result_from >= len(args):
            raise ValueError(f"'result_from' is {result_from}, a test has {len(args)} arguments")
        if kwargs and options["language"] == "cpp":
            raise ValueError("a C++ function has no 'kwargs'")
        row = {"kind": "call", "name": entry, "args": args, "kwargs": kwargs,
               "expected": test["expected"], "tolerance": options["tolerance"],
               "result_from": result_from}  # fmt: skip
        try:
            json.dumps(row)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a test is not JSON: {error}") from None
        read.append(row)
    return CodeProblem("calls", tuple(read), names=(entry,), **options)


def _entry_point(entry: str) -> str:
    parts = entry.split(".")
    if not entry or len(parts) > 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"'entry_point' must name a function, as 'add' or 'Solution.add', got {entry!r}"
        )
    return entry


def _assert_problem(tests: list[str], entry: str, options: dict[str, Any]) -> CodeProblem:
    known = set(vars(builtins)) | _defined(_parse(options["setup"], "setup"))
    called: list[str] = []
    trees: list[ast.Module] = []
    for test in tests:
        tree = _parse(test, "tests")
        if not tree.body:
            raise ValueError("a test is empty: nothing could be verified")
        called += [n for n in _called(tree) if n not in _defined(tree)]
        trees.append(tree)
    # a function may be called `sum`: then no other name is called
    own = [n for n in called if n not in known] or called[:1]
    names = (_entry_point(entry),) if entry else tuple(dict.fromkeys(own))
    if not names:
        raise ValueError(f"the tests call no function of the candidate's: {tests[0]!r:.80}")
    given = {name.split(".")[0] for name in names}
    for test, tree in zip(tests, trees, strict=True):
        if not _asserts(tree, given):
            raise ValueError(f"the test {test!r:.80} asserts nothing: nothing could be verified")
    if options["language"] == "cpp" and len(names) > 1:
        raise ValueError(f"one C++ function can be tested, the tests call {', '.join(names)}")
    rows = tuple({"kind": "code", "code": test} for test in tests)
    return CodeProblem("calls", rows, names=names, **options)


def _asserts(tree: ast.AST, given: set[str]) -> bool:
    """Whether it can fail: an assertion of more than True, a raise, or a call of another's function, which
    may be one that asserts. `given` are the names of what is tested."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Assert):
            if not (isinstance(node.test, ast.Constant) and node.test.value):
                return True
        if isinstance(node, ast.Call):
            base = node.func
            while isinstance(base, (ast.Attribute, ast.Call)):
                base = base.value if isinstance(base, ast.Attribute) else base.func
            name = base.id if isinstance(base, ast.Name) else ""
            if name not in given and (name == "" or not hasattr(builtins, name)):
                return True
    return False


def _called(tree: ast.AST) -> list[str]:
    return [
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def _defined(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def _check_problem(test: str, entry: str, prompt: str, options: dict[str, Any]) -> CodeProblem:
    entry = _entry_point(entry)
    tree = _parse(test, "test")
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "check" not in functions:
        raise ValueError("'test' must define check(candidate)")
    check = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check")
    if not _asserts(check, {*(a.arg for a in check.args.args), entry.split(".")[0]}):
        raise ValueError("check(candidate) asserts nothing: nothing could be verified")
    if not options["preamble"] and _is_stub(prompt, entry):
        # helpers that the prompt defines are there for the candidate and for the tests
        options["preamble"] = prompt
        options["setup"] = "\n".join(filter(None, (options["setup"], prompt)))
    rows = ({"kind": "code", "code": f"check({entry})"},)
    if options["language"] == "cpp":
        options["preamble"] = ""
    return CodeProblem("calls", rows, names=(entry,), check=test, **options)


def _is_stub(prompt: str, entry: str) -> bool:
    try:
        tree = ast.parse(prompt)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(n, ast.FunctionDef) and n.name == entry for n in tree.body)
