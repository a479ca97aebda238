"""Training checkpoints that survive a crash at any moment: safetensors and JSON, hashed, no pickle.

    folder/step-000123/{model,optimizer,...}.safetensors  state.json  manifest.json
    folder/step-000123/model-00001-of-00002.safetensors   where several ranks have written
    folder/latest                                         the name of the last healthy one, for people
    folder/best                                           that of the best one
    folder/step-000124.damaged/                           what was not read back as it was written

A checkpoint is written to a temporary folder of the same filesystem, flushed to disk, and only then
renamed into place: a `step-*` folder is whole, or was damaged later. The manifest's hashes show the
second: safetensors itself notices a truncated file, but no flipped bit and no zero-filled tail.
It is then read back from the disk; only when that was right does `latest` name it, and do older ones go: what
`latest` names is healthy, as of that moment. One run writes a folder at a time, its ranks
each their share of the tensors (`shares`); the first rank publishes when all shares are on disk, and any number of
ranks reads them. `checkpoint_writer.py` does it beside the training.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1fast.checkpoint_check import CHUNK, StoppedError, problem_in, read_small, steps_in
from r1fast.checkpoint_layout import (
    MANIFEST,
    NAME,
    STATE,
    VERSION,
    checkpoint_files,
    prefix_of,
    set_of,
)
from r1fast.distributed import gather_objects, is_first, together
from r1fast.file_errors import naming
from r1fast.json_fields import is_number
from r1fast.metrics import warn
from r1fast.shards import Shard, has_shards, local
from r1fast.tensor_file import Bytes, json_bytes

LATEST, BEST = "latest", "best"
DAMAGED = ".damaged"  # ends the name of a checkpoint that was put aside
MEASURE = "measure"  # in the state: {"metric": name, "value": number}
TEMP_PREFIX = ".saving-"


class NonFiniteWeightsError(ValueError, FloatingPointError):
    """Weights that no checkpoint is made of."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint on disk; tensors are read when asked for."""

    path: Path
    step: int
    state: dict

    def names(self) -> list[str]:
        """The keys that `save_checkpoint` was given in `tensors`."""
        return sorted({set_of(p.stem) for p in self.path.glob("*.safetensors")})

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors saved under `name`, in their own dtypes."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if name not in self.names():
            raise ValueError(
                f"checkpoint {self.path} holds no {name!r}; it holds {', '.join(self.names())}"
            )
        found: dict[str, Tensor] = {}
        for path in sorted(self.path.glob("*.safetensors")):
            if set_of(path.stem) == name:
                try:
                    found |= load_file(path, device=str(device))
                except SafetensorError as error:
                    raise ValueError(
                        f"{path} is not a readable safetensors file: {error}"
                    ) from error
        return {key.removeprefix(prefix_of(name)): x for key, x in found.items()}


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping,
    *,
    keep_last: int = 1,
) -> Path:
    """Write `folder/step-<step>` and drop all but the `keep_last` newest; returns its path.

    Each key of `tensors` becomes a file; tied tensors and views are written as they look. `state`
    is plain JSON data. Raises ValueError for non-finite weights in tensors["model"], and OSError
    (a full disk): older checkpoints are then untouched and nothing half-written stays behind.
    """
    refuse_nonfinite(tensors.get("model", {}), step)
    return publish(folder, step, checkpoint_files(tensors, state), keep_last=keep_last)


def publish(
    folder: str | Path,
    step: int,
    files: Mapping[str, Iterable[Bytes]],
    *,
    keep_last: int = 1,
    keep_best: str = "",
    stop: Callable[[], bool] = lambda: False,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `checkpoint_files` as `folder/step-<step>`, read it back, point `latest` to it, then drop old ones.

    Beside the `keep_last` newest the one stays whose MEASURE of the metric `keep_best` is the best: the
    largest, or for a name that begins with "-" the smallest. Raises DamagedError where it is not read back
    as it was written, and StoppedError soon after `stop()` is true.

    With a `group` every rank of it calls this with files of its own, the first with STATE among them; what
    fails on one is an error on all, and then nothing is published.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    folder = Path(folder)
    pieces, is_main = {name: _pieces(x, stop) for name, x in files.items()}, is_first(group)
    final = write_step(folder, step, pieces, group)
    found = together(lambda: problem_in(final, step, stop, from_disk=True, of=files), group)
    if problems := [problem for problem in dict.fromkeys(found) if problem]:
        aside, *_ = together(lambda: _put_aside(folder, final) if is_main else "", group)
        raise DamagedError(
            f"CHECKPOINT {final} IS DAMAGED: it was read back from the disk at once, and "
            f"{'; '.join(problems)}. {aside}; older checkpoints are kept. Check the disk and the memory"
        )
    together(lambda: _point(folder, LATEST, final) if is_main else None, group)
    if not is_main:
        return final
    try:
        _rotate(folder, final, step, keep_last, keep_best)
    except OSError as error:  # the new one is on disk
        warn(f"older checkpoints in {folder} could not be removed after step {step}: {error}")
    return final


class DamagedError(OSError):
    """A checkpoint was not read back as it was written."""


def write_step(
    folder: Path,
    step: int,
    files: Mapping[str, Iterable[Bytes]],
    group: ProcessGroup | None = None,
) -> Path:
    """Write `folder/step-<step>`: these files and a manifest of their hashes. Returns its path.

    Whole or not at all, in place of an earlier one. Raises OSError (a full disk). With a `group` the files
    are those of every rank of it, and the first writes the manifest when all are on disk.
    """
    final = folder / f"step-{step:06d}"
    temp = folder / f"{TEMP_PREFIX}{final.name}"
    is_main = is_first(group)

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temp.mkdir()

    def write() -> dict[str, dict]:
        if not is_main and not temp.is_dir():
            raise OSError(
                f"{folder} of the first rank is not to be seen here: all ranks need one filesystem"
            )
        return {name: _write(temp / name, chunks) for name, chunks in files.items()}

    def finish(entries: dict[str, dict]) -> None:
        manifest = {"version": VERSION, "step": step, "name": final.name, "files": entries}
        _write(temp / MANIFEST, [json_bytes(manifest)])
        _sync_folder(temp)
        _make_way(final)
        os.rename(temp, final)
        _sync_folder(folder)

    together(lambda: prepare() if is_main else None, group)
    try:
        written = together(write, group)
        entries = {name: entry for own in written for name, entry in own.items()}
        together(lambda: finish(entries) if is_main else None, group)
    except BaseException:
        if is_main:
            _remove(temp)
        raise
    return final


def remove_unfinished(folder: Path) -> None:
    """What a run that was killed inside a save has left; only for the process that writes here."""
    for stale in folder.glob(f"{TEMP_PREFIX}*"):
        _remove(stale)


def load_checkpoint(folder: str | Path, up_to: int | None = None) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose sizes and hashes are right; None if it has none.

    Of step `up_to` at most, where one is given. A damaged one is warned about and the one before it
    taken. Where all are damaged, ValueError: a run must not start again from nothing unasked; ForeignError
    for one of a newer layout, or under another step's name.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is to hold checkpoints and is no folder, or a link to nothing")
    found = [(step, path) for step, path in steps_in(folder) if up_to is None or step <= up_to]
    damage = []
    for step, path in found:
        if problem := problem_in(path, step):
            damage.append(f"{path.name}: {problem}")
            warn(f"CHECKPOINT {path} IS DAMAGED and is not used: {problem}")
            continue
        if damage:
            warn(f"going on from the older checkpoint {path}, step {step}")
        return Checkpoint(path, step, json.loads((path / STATE).read_bytes()))
    if damage:
        raise ValueError(
            f"no checkpoint in {str(folder)!r} is whole ({'; '.join(damage)}); "
            "remove the folder to start from the beginning"
        )
    return None


def read_step(folder: Path, step: int) -> Checkpoint | None:
    """What `write_step` has written of this step; None if nothing. ValueError where it is damaged or foreign."""
    paths = [path for number, path in steps_in(folder) if number == step]
    if not paths:
        return None
    if problem := problem_in(paths[0], step):
        raise ValueError(f"{paths[0]} is damaged: {problem}")
    return Checkpoint(paths[0], step, json.loads((paths[0] / STATE).read_bytes()))


def refuse_nonfinite(model: Mapping[str, Tensor | Shard], step: int) -> None:
    """Raises NonFiniteWeightsError; on all ranks where the weights of one are not finite that they share."""
    bad = _nonfinite({name: local(x) for name, x in model.items()})
    if has_shards(model):
        found = set().union(*gather_objects(bad))
        bad = [name for name in model if name in found]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteWeightsError(
            f"the weights of step {step} are not finite ({', '.join(bad[:3])}{more}); "
            "no checkpoint written, the one before is kept"
        )


def _nonfinite(model: Mapping[str, Tensor]) -> list[str]:
    floats = {name: x for name, x in model.items() if x.is_floating_point() and x.numel()}
    if not floats:
        return []
    # a NaN is both ends; at a tenth of the time of a mask, and with one wait for a device
    ends = torch.stack([torch.stack(torch.aminmax(x.detach())).double() for x in floats.values()])
    finite = ends.isfinite().all(1).tolist()
    return [name for name, ok in zip(floats, finite, strict=True) if not ok]


def _pieces(chunks: Iterable[Bytes], stop: Callable[[], bool]) -> Iterator[Bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK):
            if stop():
                raise StoppedError
            yield memoryview(chunk)[start : start + CHUNK]


def _write(path: Path, chunks: Iterable[Bytes]) -> dict:
    """Write and flush to disk; returns the file's line in the manifest."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    with naming(path):
        try:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _point(folder: Path, name: str, target: Path) -> None:
    """Let the pointer `name` name the checkpoint `target`."""
    pointer = folder / f"{TEMP_PREFIX}{name}"
    try:
        _write(pointer, [f"{target.name}\n".encode()])
        os.replace(pointer, folder / name)
        _sync_folder(folder)
    except BaseException:
        _remove(pointer)
        raise


def _put_aside(folder: Path, final: Path) -> str:
    """Take a damaged checkpoint out of use, and say so. The one that was damaged before it goes."""
    for earlier in folder.glob(f"step-*{DAMAGED}"):
        _remove(earlier)
    aside = final.with_name(final.name + DAMAGED)
    try:
        os.rename(final, aside)
        if left := steps_in(folder):
            _point(folder, LATEST, left[0][1])
        else:
            (folder / LATEST).unlink(missing_ok=True)
    except OSError as error:  # its hashes tell as much
        return f"It is not used, though it could not be renamed ({error})"
    return f"It is not used, and now called {aside.name}"


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems
            raise
    finally:
        os.close(descriptor)


def _make_way(final: Path) -> None:
    """Move a checkpoint of the same step aside, to a name that `load_checkpoint` also reads."""
    if not os.path.lexists(final):
        return
    if problem_in(final, int(NAME.fullmatch(final.name)[1])):
        _remove(final)
        return
    old = final.with_name(final.name + ".old")
    _remove(old)
    os.rename(final, old)


def _rotate(folder: Path, newest: Path, step: int, keep_last: int, keep_best: str) -> None:
    """Remove what is neither of the `keep_last` newest nor the best."""
    best, kept = _best(folder, step, keep_best), 1
    if best is None:
        (folder / BEST).unlink(missing_ok=True)
    elif _read(folder / BEST) != f"{best.name}\n":
        _point(folder, BEST, best)
    for other, path in steps_in(folder):
        if path == newest:
            continue
        if other > step:
            warn(f"{path} is ahead of this run, which has just saved step {step}; removed")
        elif other < step and kept < keep_last:
            kept += 1
            continue
        elif path == best:
            continue
        gone = path.with_name(
            f"{TEMP_PREFIX}{path.name}.gone"
        )  # a kill leaves nothing that is half there
        os.rename(path, gone)
        _remove(gone)


def _best(folder: Path, step: int, metric: str) -> Path | None:
    """The checkpoint up to `step` with the best value of `metric`; of equal ones the newest."""
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    values = []
    for other, path in steps_in(folder):
        if NAME.fullmatch(path.name)[2]:
            continue
        try:
            measure = json.loads(read_small(path / STATE)).get(MEASURE) or {}
            metric, value = measure.get("metric"), measure.get("value", -math.inf)
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # damaged since: it will be found where it is loaded
        is_comparable = is_number(value) and not math.isnan(value)
        if name and metric == name and is_comparable and other <= step:
            values.append((sign * value, other, path))
    return max(values)[2] if values else None


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
