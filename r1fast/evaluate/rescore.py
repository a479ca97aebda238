"""`r1fast evaluate --rescore RUN`: stored samples graded again by the graders of now, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1fast.config import Config, config_of
from r1fast.evaluate.run import check_judge, grader_versions, judge_totals, what_graded
from r1fast.evaluate.sample_rows import completion_of_row, final_row, read_samples
from r1fast.evaluate.standing import stored_json
from r1fast.evaluate.statistics import by_problem, summarise
from r1fast.hf_folder import write_json
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.metrics import warn
from r1fast.rewards.graders import check_problem
from r1fast.types import KINDS, Problem, RolloutGroup

SETUP = ("template", "rewards", "max_completion_tokens", "temperature", "top_p", "seed",
         "prompt_opens_think")  # fmt: skip


def stored_setup(folder: str | Path) -> dict:
    """evaluation.json of a run folder. Raises ValueError where it is no evaluated one."""
    folder = Path(folder)
    for name in ("samples.jsonl", "evaluation.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} has no {name}: it is no evaluated run folder")
    setup = stored_json(folder / "evaluation.json")
    if missing := [name for name in SETUP if name not in setup]:
        raise ValueError(
            f"{folder / 'evaluation.json'} lacks {', '.join(missing)}; restore it, or delete it and "
            "evaluate again: all samples are drawn anew"
        )
    return setup


def stored_config(setup: Mapping, overrides: list[str]) -> Config:
    """The template and rewards that the samples were made and graded with, and overrides."""
    values = {
        "template": setup["template"],
        "rewards": setup["rewards"],
        "rollout": {"max_completion_tokens": setup["max_completion_tokens"]},
        "eval": {"temperature": setup["temperature"], "top_p": setup["top_p"]},
        "seed": setup["seed"],
    }
    return config_of(values, overrides)


def stored_problems(folder: str | Path) -> list[Problem]:
    """problems.jsonl of a run folder. ValueError, with file, line and remedy, where it is damaged."""
    path = Path(folder) / "problems.jsonl"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no problems.jsonl: what was asked is not known")
    remedy = "correct the line, or evaluate again: problems.jsonl is written anew, samples are kept"
    problems: dict[str, Problem] = {}
    try:
        for line, row in read_jsonl(path):
            problem = _problem_of(row, f"{path}:{line}")
            if problem.id in problems:
                raise ValueError(f"{path}:{line}: id {problem.id!r} stands twice")
            problems[problem.id] = problem
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    return list(problems.values())


def _problem_of(row: dict, where: str) -> Problem:
    try:
        problem = Problem(**row)
    except TypeError:
        raise ValueError(
            f"{where}: not a problem as evaluations store it; it has {', '.join(map(repr, row))}"
        ) from None
    texts = (problem.prompt, problem.id, problem.kind, problem.language, problem.subset)
    if not all(isinstance(text, str) for text in (*texts, problem.answer or "")):
        raise ValueError(f"{where}: prompt, id, kind, language, subset and answer must be strings")
    if problem.kind not in KINDS or not isinstance(problem.meta, dict):
        raise ValueError(
            f"{where}: 'kind' must be one of {', '.join(KINDS)} and 'meta' an object, got "
            f"{problem.kind!r} and {problem.meta!r:.40}"
        )
    if problem.kind != "math":  # a gold that cannot be read is a verdict, not damage
        try:
            check_problem(problem)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return problem


def rescore(
    folder: str | Path,
    scorer: Any,
    setup: dict,
    *,
    keep: Callable[[dict], bool] = lambda row: False,
) -> dict:
    """Grade all samples anew; samples.jsonl, eval.json and evaluation.json are replaced.

    rescored.json tells what changed: the numbers before, and each verdict that is another now. Rows
    for which `keep` says so stay as they are. Returns what rescored.json holds. RuntimeError, and
    nothing is replaced, where the judge failed on more than half of what it was asked.
    """
    folder = Path(folder)
    problems = {problem.id: problem for problem in stored_problems(folder)}
    old = read_samples(folder / "samples.jsonl")
    if not old:
        raise ValueError(f"{folder / 'samples.jsonl'} holds no samples: there is nothing to grade")
    before = stored_json(folder / "eval.json", default={})
    if unknown := sorted({row["problem_id"] for row in old} - problems.keys()):
        raise ValueError(
            f"samples.jsonl has problems that problems.jsonl lacks: {', '.join(unknown[:5])}; evaluate "
            "again: both are written anew, samples are kept"
        )
    groups, rows = [], []
    for name, samples in by_problem(old).items():
        again = [row for row in samples if not keep(row)]
        completions = [completion_of_row(row) for row in again]
        groups.append(RolloutGroup(problems[name], [], completions))
        rows.append(again)
    costs = judge_totals(scorer)
    with scorer.as_one_call():
        scorer.score(groups)
    versions = grader_versions(scorer, (problem.kind for problem in problems.values()))
    version = "; ".join(filter(None, versions.values()))
    new = {
        (row["problem_id"], row["sample"]): final_row(
            group.problem, row, reward, versions[group.problem.kind]
        )
        for group, samples in zip(groups, rows, strict=True)
        for row, reward in zip(samples, group.rewards, strict=True)
    }
    final = [new.get((row["problem_id"], row["sample"]), row) for row in old]
    result = summarise(final, scorer.grader.equivalent)
    result |= {name: setup[name] for name in ("temperature", "top_p", "seed")}
    check_judge(final, scorer)
    result |= what_graded(scorer, costs)
    changed = [
        {
            "problem_id": a["problem_id"], "sample": a["sample"],
            "before": a["verdict"], "after": b["verdict"],
            "extracted_before": a["extracted"], "extracted_after": b["extracted"],
        }
        for a, b in zip(old, final, strict=True)
        if (a["verdict"], a["extracted"], a.get("score")) != (b["verdict"], b["extracted"], b.get("score"))
    ]  # fmt: skip
    moves = Counter(f"{c['before']} -> {c['after']}" for c in changed if c["before"] != c["after"])
    told = {
        "grader_before": setup.get("grader", ""),
        "grader": version,
        "num_samples": len(old),
        "num_changed": len(changed),
        "moves": dict(moves),
        "eval_before": before,
        "changed": changed,
    }
    if errors := sum(row["verdict"] == "error" for row in final):
        warn(f"{errors} of {len(final)} samples could not be judged")
    write_json(folder / "rescored.json", told)
    write_jsonl(folder / "samples.jsonl", final)
    write_json(folder / "eval.json", result)
    write_json(folder / "evaluation.json", setup | {"grader": version})
    return told
