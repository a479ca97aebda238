"""Whether a checkpoint on disk is whole: sizes, hashes, version and step, as its manifest has them."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path

from r1fast.checkpoint_layout import MANIFEST, NAME, NEVER, READABLE, STATE, VERSION
from r1fast.file_errors import naming
from r1fast.hf_folder import MAX_JSON

FIELDS = {"version", "step", "name", "files"}  # of a manifest; the name came later
CHUNK = 1 << 22  # bytes written or read at a time
# what a read may fail with though the checkpoint is whole: no room in the process, a network filesystem, rights
PASSING = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EINTR, errno.ETIMEDOUT, errno.EACCES, errno.EPERM,
)  # fmt: skip


class ForeignError(ValueError):
    """A step folder that is not damaged, but is not what its name says to this program. It is left alone."""


class StoppedError(Exception):
    """A save was given up because it was asked to."""


def steps_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first; `step-3` comes before `step-3.old`."""
    if not folder.is_dir():
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [(int(m[1]), m[2] is None, path) for m, path in matches if m and path.is_dir()]
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def problem_in(
    path: Path,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    *,
    from_disk: bool = False,  # and not from what the system remembers of a write
    of: Container[str] | None = None,  # the files whose content is looked at; None: all
) -> str:
    """What is wrong with a checkpoint; empty when it is whole. Raises ForeignError."""
    reading = MANIFEST
    try:
        manifest = json.loads(read_small(path / MANIFEST))
        version = manifest["version"]
        if type(version) is int and version > VERSION and version not in NEVER:
            raise ForeignError(
                f"{path} was written by a newer r1fast (layout {version}; this one reads up to {VERSION}): "
                "install that one, or move the folder out of here to go on without it"
            )
        named, files = manifest["step"], manifest["files"]
        if version not in READABLE:
            return f"its layout is version {version!r}, this program reads {READABLE}"
        # said twice: where both agree, the folder was renamed, else the manifest is damaged
        own = f"step-{named:06d}"
        if own != (name := manifest.get("name", own)):
            return f"{MANIFEST} says step {named} and {name!r:.80}"
        if unknown := manifest.keys() - FIELDS:
            return f"{MANIFEST} has fields that this layout has not: {sorted(unknown)!r:.80}"
        present = {p.name for p in path.iterdir()} - {MANIFEST}
        if not isinstance(files, dict):
            return f"{MANIFEST} must hold an object of files, got {files!r:.80}"
        # other names are of a person or a system, and never read
        present = {
            name for name in present if name in files or name.endswith((".safetensors", ".json"))
        }
        if STATE not in files or present != set(files):
            odd = sorted(present ^ {STATE, *files})
            return f"its files are not those of {MANIFEST}: {', '.join(odd)}"
        for name, entry in files.items():
            size = _size(path / name)
            if size != entry["size"]:
                return f"{name} has {size} bytes, not {entry['size']}"
        for name, entry in files.items():
            if of is not None and name not in of:
                continue
            if _sha256(path / name, stop, from_disk=from_disk) != entry["sha256"]:
                return f"the content of {name} has changed (sha256)"
        reading = STATE
        state = json.loads(read_small(path / STATE))
    except ForeignError:
        raise
    except OSError as error:
        if error.errno in PASSING:
            raise  # says nothing of the checkpoint
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{reading} cannot be read: {error!r:.200}"
    if not isinstance(state, dict):
        return f"{STATE} must hold an object, got {state!r:.80}"
    if named != step:
        raise ForeignError(
            f"{path} holds the checkpoint of step {named}, so somebody has renamed or copied it: call it {own} "
            f"again, or move it out of here"
        )
    return ""


def _size(path: Path) -> int:
    if not path.is_file() and path.exists():  # a pipe would be waited for, a device never ends
        raise ValueError(f"{path.name} is no file")
    return path.stat().st_size


def read_small(path: Path) -> bytes:
    if (size := _size(path)) > MAX_JSON:
        raise ValueError(f"it has {size} bytes")
    return path.read_bytes()


def _sha256(path: Path, stop: Callable[[], bool], *, from_disk: bool) -> str:
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if from_disk and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a hint, which not every filesystem takes
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with naming(path):
            while chunk := os.read(descriptor, CHUNK):
                if stop():
                    raise StoppedError
                digest.update(chunk)
    finally:
        os.close(descriptor)
    return digest.hexdigest()
