"""Checkpoints written beside the training: a copy in memory now, the disk in a thread.

A save copies the state into buffers that the next save uses again, pinned and on a stream of its own on a GPU;
a thread hashes, writes, flushes, renames, reads back and rotates (`checkpoint.publish`). At most one is
in flight: the next save waits for it. What went wrong is said at the next step, and training goes on.
Several ranks copy and write their share each; their threads agree over a process group of their own.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1fast.checkpoint import (
    MEASURE,
    DamagedError,
    StoppedError,
    publish,
    refuse_nonfinite,
)
from r1fast.checkpoint_layout import checkpoint_files, shares
from r1fast.config import CheckpointConfig
from r1fast.distributed import RankGoneError, is_first, together
from r1fast.machine import GIB, available_memory
from r1fast.metrics import warn
from r1fast.shards import Shard, has_shards

LONG_WAIT = 1.0  # seconds of a step behind the save before it that are worth a word
CPU = torch.device("cpu")
State = Mapping[str, Mapping[str, Tensor | Shard]]


class CheckpointWriter:
    """The saves of one run into `folder`. Leaving its block waits for the last one.

    With a `group` (`distributed.beside`) all ranks of it call `save` alike, with equal tensors.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        keep_best: str = "",
        group: ProcessGroup | None = None,
    ):
        self.folder, self.config, self.group = folder, config, group
        self.is_main = is_first(group)
        self.keep_best = keep_best  # as `checkpoint.publish` takes it
        self._sum, self._count = 0.0, 0  # of that metric, since the last save
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self.saved_step = -1  # the newest that this run is known to have on disk
        self.write_seconds = 0.0  # of the last save, on disk
        # of the last save; the thread writes them, and they are read when it has ended
        self._step, self._failure, self._written = 0, None, {}
        self._is_whole = False
        self._stop = threading.Event()
        self._row: dict[str, float] = {}
        self._has_measure = False
        self._told: set[str] = set()
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def save(self, step: int, tensors: State, state: Mapping, *, wait: bool = False) -> None:
        """Write `step-<step>`, as `checkpoint.save_checkpoint` does; with `wait` it is there on return.

        A full disk is a warning. Raises ValueError for weights that are not finite.
        """
        began = time.perf_counter()
        refuse_nonfinite(tensors.get("model", {}), step)
        name = self.keep_best.removeprefix("-")
        if self._count:
            mean = self._sum / self._count
            state = {**state, MEASURE: {"metric": name, "value": mean}}
        elif name and self.is_main and not self._has_measure and not name.startswith("eval/"):
            warn(
                f"no step has had the metric {name!r} so far (checkpoint.keep_best), so no best "
                "checkpoint is kept"
            )
        self._sum, self._count = 0.0, 0
        self._wait_for_the_last(step)
        self._report()
        self._step = step
        self._stop.clear()
        own, plan = self._share(tensors)
        state = state if self.is_main else None
        # what was gathered is a copy already
        is_copy = any(has_shards(named) for named in tensors.values())
        if self.config.asynchronous and not wait and (is_copy or self._make_buffers(own)):
            files = checkpoint_files(own if is_copy else self._copy(own), state)
            name = f"checkpoint of step {step}"
            self._thread = threading.Thread(target=self._write, args=(step, files, plan), name=name)
            self._thread.start()
        else:
            self._write(step, checkpoint_files(own, state), plan)
            self._report()
        self._row["checkpoint/seconds"] = time.perf_counter() - began

    def saw(self, row: Mapping[str, float]) -> dict[str, float]:
        """Take note of a step's metrics; returns those of the saves since the step before.

        Warns where a save has failed, and raises what should not have happened in the thread.
        """
        value = row.get(self.keep_best.removeprefix("-"), math.nan)
        if math.isfinite(value):
            self._sum, self._count = self._sum + value, self._count + 1
            self._has_measure = True
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        self._report()
        found, self._row = self._row, {}
        return found

    def before_change(self) -> None:
        """To be called before weights or moments change: on a GPU the change waits for the copy of them."""
        if self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def close(self) -> None:
        """Wait for the save in flight. Interrupted, it is given up, and the checkpoint before it stays."""
        self._join()
        self._buffers.clear()
        self._report()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            warn(f"checkpoint of step {self._step} could not be written: {error!r}")

    def _share(self, tensors: State) -> tuple[State, str]:
        """(what this rank writes, a digest of what all write together)."""
        if self.group is None:
            return _whole([tensors], 0), ""
        everything = [
            f"{name} {key} {x.dtype} {tuple(x.shape)}"
            for name, named in tensors.items()
            for key, x in named.items()
        ]
        plan = hashlib.sha256("\n".join(everything).encode()).hexdigest()
        return _whole(shares(tensors, self.group.size()), self.group.rank()), plan

    def _write(self, step: int, files: Mapping, plan: str) -> None:
        began = time.perf_counter()

        def ready() -> str:
            if self._copied is not None:
                self._copied.synchronize()
            return plan

        try:
            plans = together(ready, self.group)
            assert len(set(plans)) == 1, f"ranks would write shares of other tensors: {plans}"
            path = publish(
                self.folder,
                step,
                files,
                keep_last=self.config.keep_last,
                keep_best=self.keep_best,
                stop=self._stop.is_set,
                group=self.group,
            )
            self._is_whole = True
            if self.is_main:
                self._written["checkpoint/bytes"] = sum(x.stat().st_size for x in path.iterdir())
        except StoppedError:
            pass
        except Exception as error:  # said by `_report`, in the thread that trains
            self._failure = error
        self._written["checkpoint/write_seconds"] = time.perf_counter() - began

    def _join(self) -> None:
        if self._thread is None:
            return
        try:
            self._thread.join()
        except BaseException:  # a second Ctrl-C
            self._stop.set()
            self._thread.join()
            raise
        self._thread = None

    def _wait_for_the_last(self, step: int) -> None:
        began = time.perf_counter()
        self._join()
        if (waited := time.perf_counter() - began) > LONG_WAIT:
            self._warn_once(
                "disk",
                f"the checkpoint of step {step} waited {waited:.1f} s for the disk, which was still "
                f"busy with that of step {self._step}: save less often (checkpoint.every_steps)",
            )

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            warn(text)
        self._told.add(kind)

    def _report(self) -> None:
        """What the last save came to, where it has ended."""
        if self._thread is not None:
            return
        if self._is_whole:
            self.saved_step, self._is_whole = self._step, False
            self.write_seconds = self._written["checkpoint/write_seconds"]
        self._row |= self._written
        failure, self._failure, self._written = self._failure, None, {}
        if isinstance(failure, DamagedError):
            warn(str(failure))
        elif isinstance(failure, RankGoneError):
            warn(f"checkpoint of step {self._step}: whether it is whole is not known, {failure}")
        elif isinstance(failure, OSError):
            warn(
                f"checkpoint of step {self._step} could not be written, training goes on: {failure}"
            )
        elif failure is not None:
            raise failure

    def _make_buffers(self, tensors: State) -> bool:
        """Whether there is room for a copy: in half of the memory that is left, the rest is the training's."""
        missing = {
            (name, key): x
            for name, named in tensors.items()
            for key, x in named.items()
            if not _is_buffer_of(self._buffers.get((name, key)), x)
        }
        wanted = {(name, key) for name, named in tensors.items() for key in named}
        for gone in self._buffers.keys() - wanted:
            del self._buffers[gone]
        size, available = sum(x.nbytes for x in missing.values()), available_memory(CPU)
        why = f"more than half of the {available / GIB:.1f} GiB left"
        if 2 * size <= available:
            try:
                for key, x in missing.items():
                    self._buffers[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
                return True
            except (MemoryError, RuntimeError) as error:
                why = f"which could not be had: {error}"
        self._buffers.clear()
        self._warn_once(
            "memory",
            "checkpoints are written while the step waits, as a copy of the state takes "
            f"{size / GIB:.1f} GiB of memory, {why}",
        )
        return False

    def _copy(self, tensors: State) -> dict[str, dict[str, Tensor]]:
        """The same tensors in buffers of their own, which hold them when `_copied` has happened."""
        cuda = [x for named in tensors.values() for x in named.values() if x.is_cuda]
        if cuda and self._stream is None:
            self._stream = torch.cuda.Stream(cuda[0].device)
        if cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        copies: dict[str, dict[str, Tensor]] = {}
        with torch.cuda.stream(self._stream):  # None: as it is
            for name, named in tensors.items():
                copies[name] = {key: self._copy_of((name, key), x) for key, x in named.items()}
        if cuda:
            self._copied = self._stream.record_event()
        return copies

    def _copy_of(self, key: tuple[str, str], x: Tensor) -> Tensor:
        buffer = self._buffers[key].copy_(x.detach(), non_blocking=True)
        if x.is_cuda:
            x.record_stream(self._stream)
        return buffer


def _whole(owned: list[State], rank: int) -> State:
    """What `rank` writes, of `owned` by all: where ranks share tensors, each is gathered by the one that writes it.

    Then all is a copy, on the CPU.
    """
    if not any(has_shards(named) for own in owned for named in own.values()):
        return owned[rank]
    found: dict[str, dict[str, Tensor]] = {name: {} for name in owned[rank]}
    for writer, own in enumerate(owned):
        for name, named in own.items():
            for key, x in named.items():
                whole = x.gather_to(writer) if isinstance(x, Shard) else x
                if writer == rank:
                    found[name][key] = whole if isinstance(x, Shard) else x.to(CPU, copy=True)
    return found


def _is_buffer_of(buffer: Tensor | None, x: Tensor) -> bool:
    return buffer is not None and buffer.shape == x.shape and buffer.dtype == x.dtype
