"""Rows that survive a kill: appended to a file one by one, read again where the same work goes on.

Each process appends to its own file. The first line says what the rows belong to (a digest of model,
sampling and data); rows of another work are not used. A line that a kill has torn is left out, and so
is a damaged one, with a warning: what it held is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from r1fast import distributed
from r1fast.evaluate.sample_rows import Key, wrong_in
from r1fast.file_errors import naming
from r1fast.metrics import warn


class RowLog:
    """`rows` holds what any process of an earlier call has left, by (problem id, sample), `costs` what
    they have told with `add_costs`. Rows that lack a column of `needed` are damaged.

    To be closed; with several processes they make it together.
    """

    def __init__(self, folder: Path, name: str, digest: str, needed: Iterable[str] = ()):
        self.rows: dict[Key, dict] = {}
        self.costs: list[dict] = []
        head = {"digest": digest}
        needed = ("problem_id", "sample", *needed)
        lengths: dict[Path, int] = {}
        for path in sorted(folder.glob(f"{name}.partial-*.jsonl")):
            found, lengths[path] = _read(path, head, needed)
            for row in found:
                if "costs" in row:
                    self.costs.append(row["costs"])
                else:
                    self.rows[row["problem_id"], row["sample"]] = row
        distributed.barrier()  # nobody writes before all have read
        own = folder / f"{name}.partial-{distributed.rank()}.jsonl"
        if lengths.get(own):
            with own.open("r+b") as file:
                file.truncate(lengths[own])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with naming(own):
                own.write_text(json.dumps(head) + "\n", encoding="utf-8")
        self._file = own.open("a", encoding="utf-8", newline="\n")

    def append(self, row: Mapping) -> None:
        with naming(self._file.name):
            self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()  # the system keeps it, even where this process is killed now

    def add_costs(self, costs: Mapping) -> None:
        """What the rows appended since the last call have cost."""
        self.append({"costs": costs})

    def close(self) -> None:
        self._file.close()


def _read(path: Path, head: dict, needed: tuple[str, ...]) -> tuple[list[dict], int]:
    """(rows, bytes up to the last line's end); none of a file that belongs to other work."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what a kill has torn has no end
    if not lines or _object(lines[0]) != head:
        return [], 0
    rows: list[dict] = []
    for number, line in enumerate(lines[1:], 2):
        row = _object(line)
        is_cost = row is not None and isinstance(row.get("costs"), dict)
        wrong = "not a JSON object" if row is None else "" if is_cost else wrong_in(row, needed)
        if wrong:
            warn(f"{path}:{number}: {wrong}; the line is left out, what it held is made again")
        elif row is not None:
            rows.append(row)
    return rows, sum(len(line) + 1 for line in lines)


def _object(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
