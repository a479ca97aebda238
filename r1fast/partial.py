"""Where a file or folder is written before it is renamed into its place, and what a kill has left there."""

import glob
import os
import shutil
from pathlib import Path


def partial_of(path: Path) -> Path:
    """`.<name>.<process>.part` beside `path`, which does not exist; those of processes that are gone go."""
    own = path.with_name(f".{path.name}.{os.getpid()}.part")
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = stale.name.split(".")[-2]
        if stale == own or (process.isdecimal() and not _runs(int(process))):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
    return own


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
