"""What SFT and GRPO share: the loop over steps, learning rate, metrics, when a step is given up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.checkpoint import remove_unfinished
from r1fast.config import to_dict
from r1fast.interrupt import Stopped, StopRequest, any_rank
from r1fast.jsonl import write_jsonl
from r1fast.metrics import MetricsWriter, drop_rows, say, warn
from r1fast.optim import learning_rate
from r1fast.profiling import Profiler
from r1fast.progress import progress
from r1fast.timer import Timer
from r1fast.training_state import TrainingState
from r1fast.watchdog import Watchdog, beat

MAX_SKIPPED = 5  # non-finite gradients in a row before the run stops
MAX_DUMPED = 10  # steps with such a gradient whose batches are kept
DISK_BYTES_PER_SECOND = 2e8  # of a save, until one was timed


class Watch(Protocol):
    def after_step(self, row: dict, work: Any, last: bool) -> None:
        """`row` has the seconds of the step's phases, `work` is the trainer's."""


class Trainer(TrainingState):
    """Runs one training stage in `folder`, from wherever its newest checkpoint stands."""

    work: Any = None  # of the last step, as a plan counts it
    batch: list = ()  # what this rank learned from in the last step, for a dump
    stop_reason: Exception | None = None  # set by a step after which, saved, the run ends with it
    was_updated = False  # by the step that runs: it cannot be given up and saved any more
    num_skipped = 0  # optimizer steps in a row whose gradient was not finite
    _part, _began = "step", 0.0  # what runs, and since when

    @cached_property
    def timer(self) -> Timer:
        is_cuda = self.policy.device.type == "cuda"
        return Timer(torch.cuda.synchronize if is_cuda else None, on_phase=beat)

    def watch(self) -> Watch | None:
        """For subclasses: what is to see the first steps."""
        return None

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        """Inside, the policy's own model has its weights, to sample from or to evaluate. Ranks enter together."""
        if not self.parallel.is_sharded:
            yield
            return
        with self.timer("gather"):
            self.parallel.gather()
        try:
            yield
        finally:
            self.parallel.free()

    def optimize(self) -> tuple[Tensor, float]:
        """Sum gradients over ranks and step. Returns (gradient norm, for `read_norms`; learning rate)."""
        beat("optimizer")
        self.was_updated = True
        self.optimizer.accumulate()
        self.parallel.sum_gradients(self.optimizer.masters)
        self.on_gradient()
        lr = self.next_learning_rate()
        self.checkpoints.before_change()
        return self.optimizer.step(lr), lr

    def read_norms(self, norms: list[Tensor]) -> dict[str, float]:
        """Metrics of the optimizer steps of one training step, at its end: reading waits for the device.

        Raises FloatingPointError where too many in a row had no finite gradient.
        """
        values, skipped = [float(norm) for norm in norms], 0
        if not all(map(math.isfinite, values)):
            self._dump_batch()
        for value in values:
            if math.isfinite(value):
                self.num_skipped = 0
                continue
            skipped += 1
            self.num_skipped += 1
            warn(f"step {self.step + 1}: gradient is not finite, update skipped")
            if self.num_skipped >= MAX_SKIPPED:
                raise FloatingPointError(
                    f"{MAX_SKIPPED} gradients in a row were not finite; the last good weights are in "
                    f"{self.folder / 'checkpoints'}, what they were made of in "
                    f"{self.folder / 'nonfinite'}. Lower optim.lr or check the data."
                )
        found: dict[str, float] = {"train/updates_skipped": skipped}
        return found | ({"grad_norm": sum(values) / len(values)} if values else {})

    def _dump_batch(self) -> None:
        """What a gradient that is not finite was made of: a line a sequence."""
        folder, rank = self.folder / "nonfinite", f"-rank{self.rank}" * (self.rank > 0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if len(list(folder.glob(f"step-*[0-9]{rank}.jsonl"))) < MAX_DUMPED:
                rows = ({"step": self.step + 1, **asdict(x)} for x in self.batch)
                rows = (json.loads(json.dumps(row), parse_constant=str) for row in rows)  # NaN
                write_jsonl(folder / f"step-{self.step + 1:06d}{rank}.jsonl", rows)
        except OSError as error:
            warn(f"the batch could not be written, training goes on: {error}")

    def on_gradient(self) -> None:
        """For subclasses: the gradient of an optimizer step is whole, in `optimizer.masters`."""

    def next_learning_rate(self) -> float:
        """Of this optimizer step, which is counted: the schedule goes on also where none is made."""
        lr = learning_rate(self.config.optim, self.optimizer_step, self.num_optimizer_steps)
        self.optimizer_step += 1
        return lr

    def run(self) -> None:
        """Train to the end, from wherever the newest checkpoint stands; then save the model.

        On Ctrl-C, SIGTERM or SIGUSR1 the step is finished and saved, or, where there is no time for
        it, given up; then KeyboardInterrupt is raised.
        """
        if self.step < self.num_steps or self.unfinished is not None:
            self._train()
        elif self.step:
            say(f"{self.stage}: all {self.num_steps} steps were trained before, none is repeated")
            if distributed.is_main():
                remove_unfinished(self.folder / "checkpoints")
        self.parallel.gather()
        if distributed.is_main():
            self.policy.save(self.model_folder())
            if self.base:
                self.policy.save_adapter(self.folder / "adapter")
        distributed.barrier()

    def model_folder(self) -> Path:
        return self.folder / "model"

    def _train(self) -> None:
        log = self.config.log
        every = self.config.checkpoint.every_steps
        # with moments and masters
        size = sum(x.nbytes + 12 * x.shape.numel() for x in self.trained().values())
        self._seconds.setdefault("save", size / DISK_BYTES_PER_SECOND)
        if distributed.is_main():
            drop_rows(self.folder / "completions.jsonl", self.step)  # of steps done again
        watch = self.watch() if distributed.is_main() else None
        seconds = self.config.checkpoint.deadline_seconds
        notice = (
            f"stopping after this step, or within {seconds:g} s, with a checkpoint; "
            "once more stops at once"
        )
        with (
            (
                MetricsWriter(
                    self.folder,
                    stage=self.stage,
                    tensorboard=log.tensorboard and distributed.is_main(),
                    wandb=log.wandb and distributed.is_main(),
                    project=log.wandb_project,
                    run_name=f"{Path(self.config.output_dir).name}-{self.stage}",
                    config=to_dict(self.config),
                    resume_step=self.step,
                )
                if distributed.is_main()
                else _NoWriter()
            ) as writer,
            progress(
                self.stage, total=self.num_steps, start=self.step, line_every=self.line_every()
            ) as bar,
            self.checkpoints as checkpoints,
            StopRequest(
                notice if distributed.is_main() else "", deadline=seconds, gives_up=self.gives_up
            ) as stop,
            Watchdog(
                self.folder,
                stage=self.stage,
                seconds=log.watchdog_seconds,
                abort=log.watchdog_abort,
                num_steps=self.num_steps,
                step=self.step,
            ) as watchdog,
            Profiler(
                self.folder,
                self.timer,
                self.policy.device,
                log.profile_steps if distributed.is_main() else 0,
                num_left=self.num_steps - self.step,
            ) as profiler,
        ):
            while self.step < self.num_steps or self.unfinished is not None:
                if self.unfinished is None:
                    row = self._step(profiler)
                else:
                    row, self.unfinished = self.unfinished, None
                try:
                    self._begin("evaluation")
                    row |= self.after_step()
                    self._ended()
                except Stopped:
                    self.unfinished = json.loads(json.dumps(row, default=float))
                    self.save()
                    raise
                row |= self.timer.take()
                row |= checkpoints.saw(row)
                if self.note:
                    row["note"], self.note = self.note, ""
                bar.update(writer.write(self.step, row))
                watchdog.step_ended(self.step, row["step_time"])
                if watch is not None and self.work is not None:
                    watch.after_step(row, self.work, self.step == self.num_steps)
                stopping = any_rank(stop.received or self.stop_reason is not None)
                # the last step too: what follows may be stopped, and is not to train again
                ends = stopping or self.step == self.num_steps
                if ends or (every and self.step % every == 0):
                    self.save(wait=ends)
                if stopping:
                    raise self.stop_reason or KeyboardInterrupt

    def _step(self, profiler: Profiler) -> dict[str, float]:
        """One training step. Where it is given up, what it began with is saved."""
        profiler.begin(self.step)
        began, tokens, counted = time.perf_counter(), self.num_tokens, self.optimizer_step
        self._begin("step")
        try:
            row = self.train_step(self.step)
        except Stopped:
            self._give_up(counted)
            raise
        self._ended()
        row["train/token_budget"] = self.token_budget.agree(self.policy.device)
        self.step += 1
        seconds = time.perf_counter() - began
        profiler.end(seconds, self.num_tokens - tokens)
        row["num_tokens"] = self.num_tokens
        row["step_time"] = seconds
        row["tokens_per_second"] = (self.num_tokens - tokens) / seconds
        return row

    def _begin(self, part: str) -> None:
        self._part, self._began, self.was_updated = part, time.monotonic(), False

    def _ended(self) -> None:
        self._seconds[self._part] = time.monotonic() - self._began
        self.was_updated = False

    def gives_up(self, left: float) -> bool:
        """Whether what runs is to be given up for a signal: it would not end and be saved in `left` seconds.

        A step that has moved weights goes on to the last moment: what it began with is gone.
        """
        if self.was_updated:
            return left <= 0
        rest = self._seconds.get(self._part, 0.0) - (time.monotonic() - self._began)
        return max(rest, 0.0) + 1.5 * self._seconds["save"] >= left

    def _give_up(self, optimizer_step: int) -> None:
        """Save what the step began with, where that is not on disk and still there."""
        given_up = f"step {self.step + 1} was given up to stop in time"
        self.optimizer.zero_grad()
        if self.was_updated:
            self.checkpoints.close()  # the save in flight counts
            say(
                f"{given_up}, between its updates: the run goes on from the checkpoint of step "
                f"{self.saved_step}"
            )
            return
        self.optimizer_step = optimizer_step  # counted also where a mini-batch had no signal
        if any_rank(distributed.is_main() and self.step != self.saved_step):
            self.save()
        say(f"{given_up}; the run goes on from the end of step {self.step}")

    def line_every(self) -> int:
        return 1

    def train_step(self, step: int) -> dict[str, float]:
        raise NotImplementedError

    def after_step(self) -> dict[str, float]:
        return {}


class _NoWriter:
    """Stands in for MetricsWriter on ranks other than 0."""

    def write(self, step: int, row: dict) -> dict:
        return {"step": step, **row}

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        pass
