"""Lines of metrics.jsonl and completions.jsonl read back, whatever a crash, a full disk or a person has left in them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from r1fast.file_errors import naming
from r1fast.json_fields import is_number

ASIDE = ".damaged"  # ends the name of the file that lines go to which are no rows


@dataclass
class Lines:
    # as they stand there, as they read
    rows: list[tuple[bytes, dict]] = field(default_factory=list)
    damaged: list[tuple[int, bytes, str]] = field(default_factory=list)  # number, line, why
    cut: bytes = b""  # the last line, where a crash came in the middle of its write
    is_ended: bool = True  # by a newline


def parse_lines(path: Path) -> Lines:
    found, lines = Lines(), path.read_bytes().split(b"\n")
    found.is_ended = not lines[-1].strip()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.rows.append((line, _row(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                found.cut = line
            else:
                found.damaged.append((number, line, str(error)))
    return found


def _row(line: bytes) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not an object, but {row!r:.60}")
    if not is_number(step := row.get("step", 0)):
        raise ValueError(f"its step is {step!r:.60}")
    return row


def cut_back(path: Path, resume_step: int | None, *, has_every_step: bool = False) -> list[str]:
    """Rewrite `path` without rows after `resume_step`, and without lines that are no rows. Returns what to say of those.

    Damaged lines are put into a file beside it: a run goes on without them, and nothing is lost. Where the file
    `has_every_step`, rows that are missing are told too.
    """
    found = parse_lines(path) if path.exists() else Lines()
    said = []
    if has_every_step and resume_step is not None and resume_step >= 0:
        said += _missing(path, {row.get("step", 0) for _, row in found.rows}, resume_step)
    keep = [
        line for line, row in found.rows if resume_step is None or row.get("step", 0) <= resume_step
    ]
    if len(keep) == len(found.rows) and found.is_ended and not found.damaged:
        return said
    if found.damaged:
        aside = path.with_name(path.name + ASIDE)
        with naming(aside), aside.open("ab") as file:
            file.writelines(line + b"\n" for _, line, _ in found.damaged)
            file.flush()
            os.fsync(file.fileno())
        number, _, why = found.damaged[0]
        said.append(
            f"{path}: {len(found.damaged)} lines are no rows and were moved to {aside.name}, the first "
            f"line {number} ({why}); the run goes on without them"
        )
    if found.cut:
        said.append(
            f"{path}: its last line was cut off, as by a crash in the middle of its write, and is dropped: "
            f"{found.cut.decode(errors='replace')!r:.80}"
        )
    part = path.with_name(path.name + ".part")
    with naming(part), part.open("wb") as file:
        file.writelines(line + b"\n" for line in keep)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return said


def _missing(path: Path, found: set, resume_step: int) -> list[str]:
    """What to say of rows that a run which goes on after `resume_step` should find, and of rows without a checkpoint."""
    if resume_step == 0:
        later = sum(step > 0 for step in found)
        return [
            f"{path} has {later} steps of a run of which there is no checkpoint here: they are done again, from "
            "the first. Where there were checkpoints, stop this, and see where that folder has gone"
        ] * (later > 0)
    missing = sorted(set(range(1, resume_step + 1)) - found)
    return [
        f"{path} lacks {len(missing)} of the {resume_step} steps that the checkpoint has seen, the first "
        f"step {step}: the weights are those of all, charts have a gap"
        for step in missing[:1]
    ]
