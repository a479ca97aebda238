"""A finished evaluation whose place another one takes: it is set aside, not lost."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any

from r1fast import distributed
from r1fast.aside import new_aside
from r1fast.config import Config
from r1fast.evaluate.run import OF_SAMPLES, OF_VERDICTS, setup_of
from r1fast.evaluate.sampling import asks_of
from r1fast.evaluate.standing import finished_rows
from r1fast.metrics import note
from r1fast.partial import partial_of
from r1fast.policy import Policy
from r1fast.types import Problem

RESULTS = ("samples.jsonl", "evaluation.json")  # both: a finished evaluation
FILES = (*RESULTS, "problems.jsonl", "eval.json", "rescored.json", "manifest.json", "report.html")


def set_other_aside(
    folder: Path, policy: Policy, problems: list[Problem], config: Config, scorer: Any
) -> None:
    """Copy a finished evaluation to `folder/replaced` where this one would lose a sample of it, or the verdicts of
    other settings. Where none of its samples is used again it leaves the folder.

    All ranks together. Safe to be killed, and to be called again.
    """
    if not all((folder / name).is_file() for name in RESULTS):
        return
    asks = asks_of(policy, problems, config, config.eval.num_samples, "eval")
    setup = setup_of(policy, config, scorer, "", ())
    finished = finished_rows(
        folder, {n: setup[n] for n in OF_SAMPLES}, {n: setup[n] for n in OF_VERDICTS}
    )
    own = {(a.problem.id, j): (s, a.prompt_hash) for a in asks for j, s in enumerate(a.seeds)}
    used_here = sum(
        own.get(key) == (row["seed"], row["prompt_hash"]) for key, row in finished.rows.items()
    )
    used = sum(distributed.gather_objects(used_here))  # a problem is asked by one rank
    loses = used < len(finished.rows) or not finished.has_same_settings
    if loses and distributed.is_main():
        if not any(_same(folder, old) for old in folder.glob("replaced/[!.]*")):
            aside = new_aside(folder)
            aside.parent.mkdir(exist_ok=True)
            partial = partial_of(aside)
            partial.mkdir()
            for name in FILES:
                if (folder / name).is_file():
                    shutil.copy2(folder / name, partial / name)
            partial.rename(aside)
            note(f"{folder} held another evaluation: it was set aside, in {aside}")
        for name in FILES if used == 0 else ["rescored.json"]:
            (folder / name).unlink(missing_ok=True)
    distributed.barrier()


def _same(folder: Path, old: Path) -> bool:
    """Whether `old` holds these results: a call that was killed, or failed, has left them there."""
    return all(
        (old / name).is_file() and filecmp.cmp(folder / name, old / name, shallow=False)
        for name in RESULTS
    )
