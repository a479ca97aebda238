"""Rows of HumanEval and MBPP as prompts of code problems. The tests stay in the row, whose columns
rewards/code_problem.py reads."""

from __future__ import annotations

from collections.abc import Mapping


def humaneval_row(row: Mapping, where: str) -> tuple[str, None, dict]:
    """The function to complete is the prompt."""
    for name in ("prompt", "entry_point", "test"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{where}: no {name!r}, which format humaneval needs")
    return row["prompt"], None, {"id": _id(row, "HumanEval"), **row}


def mbpp_row(row: Mapping, where: str) -> tuple[str, None, dict]:
    """The task, and the first test: without it nobody knows what the function is called."""
    task = row.get("prompt") or row.get("text")  # sanitized, and the full set
    tests = row.get("test_list")
    if not isinstance(task, str) or not task.strip():
        raise ValueError(f"{where}: no 'prompt' or 'text', which format mbpp needs")
    if not isinstance(tests, list) or not tests or not isinstance(tests[0], str):
        raise ValueError(f"{where}: 'test_list' must be a list of assertions, got {tests!r:.80}")
    prompt = f"{task.strip()}\nYour code must satisfy: {tests[0].strip()}"
    return prompt, None, {"id": _id(row, "MBPP"), **row}


def _id(row: Mapping, name: str) -> str:
    task = str(row.get("task_id", ""))
    return task if not task or "/" in task else f"{name}/{task}"
