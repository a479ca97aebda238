"""Rows that survive a kill: appended to a file one by one, read again where the same work goes on.

Each process appends to its own file. The first line says what the rows belong to (a digest of model,
sampling and data); rows of another work are not used. A line that a kill has torn is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

from r1fast import distributed

Key = tuple[str, int]  # problem id, sample


class RowLog:
    """`rows` holds what any process of an earlier call has left, by (problem id, sample).

    To be closed; with several processes they make it together.
    """

    def __init__(self, folder: Path, name: str, digest: str):
        self.rows: dict[Key, dict] = {}
        head = {"digest": digest}
        lengths: dict[Path, int] = {}
        for path in sorted(folder.glob(f"{name}.partial-*.jsonl")):
            found, lengths[path] = _read(path, head)
            self.rows.update({(row["problem_id"], row["sample"]): row for row in found})
        distributed.barrier()  # nobody writes before all have read
        own = folder / f"{name}.partial-{distributed.rank()}.jsonl"
        if lengths.get(own):
            with own.open("r+b") as file:
                file.truncate(lengths[own])
        else:
            folder.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(head) + "\n", encoding="utf-8")
        self._file = own.open("a", encoding="utf-8", newline="\n")

    def append(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()  # the system keeps it, even where this process is killed now

    def close(self) -> None:
        self._file.close()


def _read(path: Path, head: dict) -> tuple[list[dict], int]:
    """(rows, bytes of what is whole); none of a file that belongs to other work."""
    rows: list[dict] = []
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict) or (size == 0 and row != head):
            break
        if size:
            rows.append(row)
        size += len(line)
    return rows, size
