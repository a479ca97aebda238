"""One run in an output folder: a second one would remove the first one's checkpoints, and write between its lines."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from r1fast import distributed
from r1fast.checkpoint_layout import checkpoints_around

FILE = ".lock"
PATIENCE = 30  # seconds for one that was told to stop: checkpoint.deadline_seconds is 25


@contextmanager
def only_run(folder: str | Path, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold `folder` for this process, rank 0 for all ranks. Raises ValueError where another one goes on holding it.

    A record lock: it goes with its process, however that ends, and no process that it has forked keeps it. Where a
    filesystem has no locks the run goes on without.
    """
    if not distributed.is_main():
        yield
        return
    path = Path(folder)
    if around := checkpoints_around(path):
        raise ValueError(
            f"output_dir = {str(path)!r} would lie among the checkpoints in {around}, where their run writes and "
            "removes: take a folder outside"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"output_dir = {str(path)!r} cannot be a folder: {error}") from None
    # unbuffered: what a full disk has not taken would be an error once more when it is closed, after the run
    with open(path / FILE, "ab", buffering=0) as file:
        end, said = time.monotonic() + patience, False
        while not _lock(file):
            if time.monotonic() >= end:
                raise ValueError(
                    f"{path} is in use by another run, {_owner(path)}: end that one, or take another output_dir"
                )
            if not said:
                sys.stderr.write(
                    f"waiting up to {patience:.0f} s for {_owner(path)} to leave {path}\n"
                )
                said = True
            time.sleep(0.2)
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield


def _lock(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # no locks here
        return True
    return True


def _owner(path: Path) -> str:
    """Of the lock, as far as its file says."""
    try:
        owner = json.loads((path / FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that does not say who it is"
