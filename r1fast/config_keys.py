"""`r1fast COMMAND --help`: every key of a config with its default and, from config.py itself, what it is."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from r1fast import config
from r1fast.config import Config, choices_of

WIDTH = 100


def describe_keys() -> str:
    """A section after the other, a line or more a key: `name = default`, the choices, the comment."""
    comments = _comments(Path(config.__file__).read_text(encoding="utf-8"))
    sections = _sections("", Config())
    return "\n\n".join(
        "\n".join([f"[{name}]"] * bool(name) + _lines(values, comments))
        for name, values in sections
    )


def _sections(name: str, values: object) -> list[tuple[str, object]]:
    """A table and those within it, by their dotted names."""
    found = [(name, values)]
    for f in fields(values):  # type: ignore[arg-type]
        if is_dataclass(inner := getattr(values, f.name)):
            found += _sections(f"{name}.{f.name}".removeprefix("."), inner)
    return found


def _lines(values: object, comments: dict[tuple[str, str], str]) -> list[str]:
    hints, out = get_type_hints(type(values)), []
    for f in fields(values):  # type: ignore[arg-type]
        default = getattr(values, f.name)
        if is_dataclass(default):
            continue
        choices = choices_of(hints[f.name])
        words = "" if default in choices or not choices else "or "
        words += " | ".join(choice or '""' for choice in choices)
        if isinstance(default, str) and int in get_args(hints[f.name]):
            words += " | a whole number"
        notes = [words, comments.get((type(values).__name__, f.name), "")]
        left = f"  {f.name} = {_toml(default)}"
        note = "; ".join(n for n in notes if n)
        if len(left) < 44:
            indent = " " * 44
            out += textwrap.wrap(
                note, WIDTH, initial_indent=left.ljust(44), subsequent_indent=indent
            ) or [left]
        else:
            out += textwrap.wrap(left, WIDTH, subsequent_indent="      ")
            out += textwrap.wrap(note, WIDTH, initial_indent=" " * 44, subsequent_indent=" " * 44)
    return out


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("'", '"')


def _comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind it, or the comment lines right above it."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            last = item.end_lineno or item.lineno
            inside = [
                line.partition("#")[2].strip()
                for line in lines[item.lineno - 1 : last]
                if line.count('"') % 2 == 0 and "  #" in line
            ]
            above, at = [], item.lineno - 2
            while lines[at].lstrip().startswith("#"):
                above.insert(0, lines[at].strip().removeprefix("#").strip())
                at -= 1
            found[node.name, item.target.id] = " ".join([*above, *inside])
    return found
