"""How a C++ answer's function is called: the `main` behind it, with what it may need to be found."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator
from typing import Any

# comments and literals; what never closes goes to the end, so that no text takes long
_NOISE = re.compile(
    r"""//[^\n]*|/\*(?:.*?\*/|.*\Z)|R"(\w{0,16})\((?:.*?\)\1"|.*\Z)"""
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""",
    re.DOTALL,
)
_SOLUTION = re.compile(r"\b(?:class|struct)\s{1,80}Solution\b[^;{}()]{0,200}\{")
# a solution may define what it is written in; contests' `#define int long long` is usual
_WORDS = (
    "main int long short signed unsigned char bool float double void auto const static return decltype "
    "using std vector map string optional r1fast_candidate serve_calls serve_typed object args"
).split()


def cpp_mains(job: dict[str, Any]) -> list[str]:
    """Ways to call the function, the likeliest first: as it is declared, with the tests' types."""
    owner, _, name = job["names"][0].rpartition(".")
    owners = [owner] if owner else _owners(job["code"], name)
    types = _types(job)
    mains = []
    for owner in owners:
        target = f"&{owner}::{name}" if owner else f"&::{name}"
        mains.append(f"serve_calls({target})")
        if types is not None:
            call = f"return ::{name}(args...);"
            if owner:  # what it returns may be part of the object
                call = f"{owner} object; return object.{name}(args...);"
            kind = "" if owner else " -> decltype(auto)"
            mains.append(f"serve_typed<{', '.join(types)}>([](auto&... args){kind} {{ {call} }})")
    clean = "".join(f"#undef {word}\n" for word in _WORDS)
    return [
        f'\n#line 1 "r1fast_main.cpp"\n{clean}int main() {{ return r1fast_candidate::{main}; }}\n'
        for main in mains
    ]


def _owners(code: str, name: str) -> list[str]:
    """ "" for a function, "Solution" for a method of that class; the likelier one first."""
    code = _NOISE.sub(" ", code)
    found = _SOLUTION.search(code)
    if found is None:
        return [""]
    depth, end = 1, len(code)
    for brace in re.compile(r"[{}]").finditer(code, found.end()):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            end = brace.end()
            break
    mention = re.compile(rf"(?<![\w.>]){re.escape(name)}\s*[(=]")
    inside = mention.search(code, found.end(), end) is not None
    outside = mention.search(code[: found.start()] + ";" + code[end:]) is not None
    if inside and outside:
        return ["Solution", ""]
    return [""] if outside else ["Solution"]


def _types(job: dict[str, Any]) -> list[str] | None:
    """C++ types that hold the arguments of all tests; None where there are none, or not known."""
    name = job["names"][0].rpartition(".")[2]
    calls = [
        args
        for test in job["tests"]
        for args in (
            [test["args"]] if test["kind"] == "call" else _literal_calls(test["code"], name)
        )
    ]
    if not calls or len({len(args) for args in calls}) > 1:
        return None
    types = [_type_of(list(column)) for column in zip(*calls, strict=True)]
    return None if None in types else types  # type: ignore[return-value]


def _literal_calls(test: str, name: str) -> Iterator[list]:
    for node in ast.walk(ast.parse(test)):
        if isinstance(node, ast.Call) and not node.keywords:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called == name:
                with contextlib.suppress(ValueError, TypeError):
                    yield [ast.literal_eval(arg) for arg in node.args]


def _type_of(values: list) -> str | None:
    """The type of all of these values; an int where nothing says what."""
    kinds = {type(value) for value in values}
    if kinds <= {bool} and kinds:
        return "bool"
    if kinds <= {int}:
        low, high = min(values, default=0), max(values, default=0)
        for name, least, most in (
            ("int", -(2**31), 2**31 - 1),
            ("long long", -(2**63), 2**63 - 1),
            ("unsigned long long", 0, 2**64 - 1),
        ):
            if least <= low and high <= most:
                return name
        return None
    if kinds <= {int, float}:
        return "double"
    if kinds == {str}:
        return "std::string"
    if kinds <= {list, tuple}:
        inner = _type_of([item for value in values for item in value])
        return inner and f"std::vector<{inner}>"
    if kinds == {dict}:
        key = _type_of([k for value in values for k in value])
        inner = _type_of([v for value in values for v in value.values()])
        return key and inner and f"std::map<{key}, {inner}>"
    return None
