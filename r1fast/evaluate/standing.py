"""What an earlier evaluation in a folder has left that still holds: its samples, verdicts and costs.

A sample stands where model, sampling, prompt and seed are the same; its verdict, where also the text,
the problem (its gold, tests, options, baseline), the version of the grader and the settings are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1fast import distributed
from r1fast.evaluate.row_log import RowLog
from r1fast.evaluate.sample_rows import SAMPLED, Key, asked_of, problem_hash, read_samples
from r1fast.evaluate.sampling import Ask
from r1fast.hf_folder import read_json
from r1fast.metrics import note
from r1fast.rewards.graders import JUDGED_KINDS

JUDGE_COSTS = ("requests", "retries", "cached", "failed", "prompt_tokens", "completion_tokens")
GIVEN_AGAIN = {  # why a stored verdict does not stand, in words
    "problem": "of problems whose answer, tests or other columns are not what they were",
    "grader": "of another version of the grader",
    "settings": "under another template or other rewards",
    "error": "that had failed",
}
Place = tuple[int, int]  # in this rank's problems, sample


@dataclass(slots=True)
class Finished:
    """A finished evaluation of the same samples; nothing where there is none."""

    rows: dict[Key, dict] = field(default_factory=dict)
    has_same_settings: bool = False  # those that verdicts were given under
    judge: dict = field(default_factory=dict)  # what it cost


def finished_rows(folder: Path, of_samples: Mapping, of_verdicts: Mapping) -> Finished:
    """What `evaluate` has stored in the folder. ValueError where that is damaged."""
    setup_path, rows_path = folder / "evaluation.json", folder / "samples.jsonl"
    if not (setup_path.is_file() and rows_path.is_file()):
        return Finished()
    setup = stored_json(setup_path)
    if {name: setup.get(name) for name in of_samples} != of_samples:
        return Finished()
    rows = {(row["problem_id"], row["sample"]): row for row in read_samples(rows_path)}
    same = {name: setup.get(name) for name in of_verdicts} == of_verdicts
    judge = stored_json(folder / "eval.json", default={}).get("judge")
    return Finished(rows, same, judge if isinstance(judge, dict) else {})


def stored_json(path: Path, default: dict | None = None) -> dict:
    """A file of an evaluated folder. ValueError says what to do about a damaged one."""
    try:
        return read_json(path, default)
    except ValueError as error:
        remedy = {
            "eval.json": "delete it: it is made anew, without what a judge cost before",
            "evaluation.json": "restore it, or delete it and evaluate again: all samples are drawn anew",
        }.get(path.name, "restore it")
        raise ValueError(f"{error}; {remedy}") from None


def standing_rows(
    asks: Sequence[Ask],
    samples: Mapping[Place, dict],
    finished: Finished,
    logged: Mapping[Key, dict],  # verdicts of a call that was killed, under the settings of now
    versions: Mapping[str, str],  # of the graders, by kind
) -> tuple[dict[Place, dict], Counter[str]]:
    """The stored rows whose verdict stands, and how many do not, by reason (`GIVEN_AGAIN`).

    A verdict "error" is asked for again: what failed then may work now.
    """
    rows: dict[Place, dict] = {}
    again: Counter[str] = Counter()
    for i, ask in enumerate(asks):
        asked, own_hash = asked_of(ask.problem), problem_hash(ask.problem)
        for j in range(len(ask.seeds)):
            key = ask.problem.id, j
            row = logged.get(key) or finished.rows.get(key)
            if row is None or any(row[name] != samples[i, j][name] for name in SAMPLED):
                continue
            if row["verdict"] == "error":
                again["error"] += 1
            elif row.get("problem_hash") != own_hash:
                again["problem"] += 1
            elif row["grader"] != versions[ask.problem.kind]:
                again["grader"] += 1
            elif key not in logged and not finished.has_same_settings:
                again["settings"] += 1
            else:
                rows[i, j] = row | asked  # a subset may have another name now
    return rows, again


def tell_given_again(again: Counter[str]) -> None:
    """One line on stderr of all ranks' verdicts that do not stand."""
    counts = Counter[str]()
    for part in distributed.gather_objects(again):
        counts.update(part)
    if counts:
        why = ", ".join(f"{counts[reason]} {GIVEN_AGAIN[reason]}" for reason in sorted(counts))
        note(f"{counts.total()} stored verdicts are given again: {why}")


def costs_before(
    finished: Finished, standing: Mapping[Place, dict], log: RowLog, judge_name: str
) -> Counter[str]:
    """What this judge was asked in earlier calls: those of a killed one, and those of the finished
    evaluation where any of its judgements stands, on any rank."""
    stands = any(
        row["kind"] in JUDGED_KINDS and (row["problem_id"], row["sample"]) not in log.rows
        for row in standing.values()
    )
    total: Counter[str] = Counter()
    for costs in [*log.costs, *[finished.judge] * any(distributed.gather_objects(stands))]:
        if costs.get("model") == judge_name:
            total.update({n: costs[n] for n in JUDGE_COSTS if isinstance(costs.get(n), int)})
    return total
