"""What SFT and GRPO share: the loop over steps, checkpoints and resume, learning rate, metrics.

A step is a pure function of (weights, optimizer state, step number): data order, sampling and
mini-batch split derive from the seed and the step, so a resumed run repeats what would have been.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from array import array
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.checkpoint import load_checkpoint, remove_unfinished, same_config
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import Config, to_dict
from r1fast.config_check import lora_targets
from r1fast.interrupt import Stopped, StopRequest, any_rank
from r1fast.jsonl import write_jsonl
from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.gather_rows import gather_rows, plan_gather
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.kernels.prefix_attention import PrefixAttention
from r1fast.lora import add_lora, lora_of
from r1fast.metrics import MetricsWriter, Timer, drop_rows, progress, say, warn
from r1fast.model import Attend, Decoder
from r1fast.optim import Optimizer, learning_rate
from r1fast.policy import Policy
from r1fast.profiling import Profiler
from r1fast.rollout.sampler import sample_seed
from r1fast.rollout.weights import checksums
from r1fast.token_budget import TokenBudget
from r1fast.types import PackedBatch
from r1fast.watchdog import Watchdog, beat

MAX_SKIPPED = 5  # non-finite gradients in a row before the run stops
MAX_DUMPED = 10  # steps with such a gradient whose batches are kept
DISK_BYTES_PER_SECOND = 2e8  # of a save, until one was timed


def hidden_states(model: Decoder, batch: PackedBatch) -> Tensor:  # (N, D)
    """What predicts each completion token: the last hidden states of the tokens before them."""
    if any(prefix >= 0 for prefix in batch.prefix_of):
        attend: Attend = PrefixAttention(batch.bounds, batch.prefix_of)
    else:
        cu_seqlens = torch.tensor(batch.bounds, dtype=torch.int32)
        longest = int(cu_seqlens.diff().max())
        attend = PackedAttention(cu_seqlens.to(batch.input_ids.device, non_blocking=True), longest)
    hidden = model(batch.input_ids, batch.position_ids, attend)  # (T, D)
    return gather_rows(hidden, plan_gather(batch.target_rows, device=hidden.device))


def completion_logprobs(
    model: Decoder, batch: PackedBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """Log-probability and entropy of every completion token."""
    return linear_logprobs(
        hidden_states(model, batch),
        model.head_weight,
        batch.target_ids,
        temperature=temperature,
        return_entropy=True,
    )


@torch.no_grad()
def sequence_logprobs(
    model: Decoder, batches: Iterable[PackedBatch], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probabilities of every packed sequence's completion, in the order before packing."""
    found: dict[int, list[float]] = {}
    for batch in batches:
        logprobs, _ = completion_logprobs(model, batch, temperature)
        values, bounds = logprobs.tolist(), batch.cu_seqlens.tolist()
        for i, start, end in zip(batch.sequence_index, bounds[:-1], bounds[1:], strict=True):
            found[i] = values[start:end]
    return [found[i] for i in range(len(found))]


def cost_per_token(model: Decoder) -> float:
    """What a token costs outside attention, in pairs of query and key: for a balanced packing.

    2 FLOPs a parameter against 4 an element of each query head in every layer.
    """
    spec = model.spec
    return model.num_parameters() / (2 * spec.num_layers * spec.num_heads * spec.head_dim)


def digest(rows: Iterable[list[int]]) -> str:
    """A short name for training data: another order or another token gives another one."""
    hashed = hashlib.blake2b(digest_size=16)
    for row in rows:
        hashed.update(array("q", [len(row), *row]).tobytes())
    return hashed.hexdigest()


def put_adapters(model: Decoder, config: Config, stage: str) -> None:
    """The adapters that the config asks for, where the model has none yet.

    Raises ValueError where it has others.
    """
    asked, found = config.lora, lora_of(model)
    if asked.rank and found is None:
        add_lora(model, asked, seed=sample_seed(config.seed, "lora", stage))
    elif found is not None:
        asked = replace(asked, targets=lora_targets(asked.targets))
        if asked != found:
            values = "".join(f"\n  lora.{key} = {value!r}" for key, value in asdict(found).items())
            raise ValueError(
                f"the model has adapters of another kind than [lora] says: {asked}. To go on with "
                f"them, set{values}\nor merge them first"
            )


def base_digest(model: Decoder) -> str:
    """A short name for the weights that are not trained, on any device."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    sums = zip(frozen.items(), checksums(frozen.values()), strict=True)
    text = "\n".join(f"{name} {p.dtype} {value}" for (name, p), value in sums)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Watch(Protocol):
    def after_step(self, row: dict, work: Any, last: bool) -> None:
        """`row` has the seconds of the step's phases, `work` is the trainer's."""


class Trainer:
    """State, checkpoints and metrics of one training stage in `folder`."""

    section = ""  # of the config that has the token_budget
    shorter = ""  # the keys that bound a sequence's length
    work: Any = None  # of the last step, as a plan counts it
    batch: list = ()  # what this rank learned from in the last step, for a dump
    unfinished: dict | None = None  # the row of a step whose evaluation was given up
    stop_reason: Exception | None = None  # set by a step after which, saved, the run ends with it

    def __init__(
        self,
        policy: Policy,
        config: Config,
        folder: str | Path,
        *,
        stage: str,
        num_steps: int,
        num_optimizer_steps: int,
        data: str,  # the digest of what is trained on
        force: bool = False,
        resume: bool = True,  # from the newest checkpoint in `folder`
    ):
        put_adapters(policy.model, config, stage)
        self.data = data
        self.policy, self.model, self.config = policy, policy.model, config
        self.folder, self.stage = Path(folder), stage
        self.num_steps, self.num_optimizer_steps = num_steps, num_optimizer_steps
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        # the frozen base is not in the checkpoints, so they name it
        self.base = base_digest(self.model) if config.lora.rank else ""
        self.optimizer = Optimizer(self.model.named_parameters(), config.optim)
        self.step = self.optimizer_step = self.num_tokens = self.num_skipped = 0
        is_cuda = policy.device.type == "cuda"
        self.timer = Timer(torch.cuda.synchronize if is_cuda else None, on_phase=beat)
        self._resumed_step = 0  # nothing is lost that is not trained yet
        self.was_updated = False  # by the step that runs: it cannot be given up and saved any more
        self._seconds: dict[str, float] = {}  # what a step, an evaluation, a save took last
        self._part, self._began = "step", time.monotonic()
        if not (resume and self._resume(force)):
            self.token_budget = self._make_token_budget({})

    def _resume(self, force: bool) -> bool:
        """Whether there was a checkpoint to go on from."""
        saved = load_checkpoint(self.folder / "checkpoints")
        if saved is None:
            return False
        other = saved.state.get("stage", self.stage)
        if other != self.stage:
            raise ValueError(
                f"{self.folder} holds a checkpoint of stage {other!r}, this is stage "
                f"{self.stage!r}: take another output_dir"
            )
        changes = same_config(saved.state["config"], self.config_that_matters())
        if saved.state.get("data", self.data) != self.data:
            changes.append("the training data: other rows, or another order")
        if changes and not force:
            raise ValueError(
                f"{self.folder} was begun with another config:\n  " + "\n  ".join(changes) + "\n"
                "Take another output_dir, or --force to go on with the new values."
            )
        self.restore(saved)
        if self.step < self.num_steps:
            say(f"{self.stage}: goes on after step {self.step} of {self.num_steps}")
        return True

    def restore(self, saved) -> None:
        """Take the step, state and tensors of `saved`: a Checkpoint, or what looks like one."""
        weights, trained = saved.tensors("model"), self.trained()
        shapes, own = ({n: x.shape for n, x in named.items()} for named in (weights, trained))
        if shapes != own:
            raise ValueError(
                f"the checkpoint in {self.folder} holds other weights than this run trains (all of the "
                "model, or other adapters): take another output_dir"
            )
        if saved.state.get("base", "") != self.base:
            raise ValueError(
                f"the adapters in {self.folder} were trained on the weights of "
                f"{saved.state['base_path']!r}; "
                f"those of {self.policy.path!r} are others: name that model, or take another output_dir"
            )
        fill(trained, weights)
        self.optimizer.load_state_tensors(saved.tensors("optimizer"))
        self.load_extra(saved)
        self.step, self.optimizer_step = saved.step, saved.state["optimizer_step"]
        self.num_tokens = saved.state["num_tokens"]
        self.unfinished = saved.state.get("unfinished")
        self._resumed_step = self.step
        self.token_budget = self._make_token_budget(saved.state)

    def _make_token_budget(self, state: dict) -> TokenBudget:
        """As it was when the checkpoint was made, unless the config has another one now: other
        micro-batches would be other rounding."""
        asked = getattr(self.config, self.section).token_budget
        stored, was_halved = state.get("token_budget"), False
        if stored and state["config"][self.section]["token_budget"] == asked:
            num_tokens, was_halved = stored["num_tokens"], stored["was_halved"]
        else:
            num_tokens = asked
        checkpointing = self.config.model.activation_checkpointing
        if "auto" in (num_tokens, checkpointing):
            num_tokens, checkpointing = self.settle(num_tokens)
        self.model.checkpointing = checkpointing
        budget = TokenBudget(
            num_tokens,
            discard=self.optimizer.zero_grad,
            relieve=self._keep_less,
            advice=f"Lower {self.shorter}, take model.activation_checkpointing = full, "
            "model.dtype = bfloat16, or a smaller model",
            was_halved=was_halved,
        )
        budget.agree(self.policy.device)
        return budget

    def settle(self, token_budget: int | str) -> tuple[int, str]:
        """(token budget, what layers keep): what is "auto" of them, by the memory that is there."""
        raise NotImplementedError

    def _keep_less(self) -> str:
        """Where it was left to us, layers keep their inputs alone from now on. Says so; empty: no more can be done."""
        asked = self.config.model.activation_checkpointing
        if asked != "auto" or self.model.checkpointing == "full":
            return ""
        self.model.checkpointing = "full"
        return "layers are computed again in the backward (model.activation_checkpointing = full)"

    def watch(self) -> Watch | None:
        """For subclasses: what is to see the first steps."""
        return None

    def state(self) -> dict:
        """What `restore` takes beside the tensors, as plain data."""
        state = {
            "stage": self.stage,
            "data": self.data,
            "optimizer_step": self.optimizer_step,
            "num_tokens": self.num_tokens,
            "token_budget": {
                "num_tokens": self.token_budget.num_tokens,
                "was_halved": self.token_budget.was_halved,
            },
            "config": self.config_that_matters(),
            **self.extra_state(),
        }
        if self.unfinished is not None:
            state["unfinished"] = self.unfinished
        if self.base:
            state |= {"base": self.base, "base_path": self.policy.path}
        return state

    def trained(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds: a frozen base is where it was read from."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def load_extra(self, saved) -> None:
        """For subclasses: tensors beyond model and optimizer."""

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def extra_state(self) -> dict:
        """For subclasses: plain data beyond the counters."""
        return {}

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a step changes."""
        return {
            "model": {n: p.detach() for n, p in self.trained().items()},
            "optimizer": self.optimizer.state_tensors(),
            **self.extra_tensors(),
        }

    def config_that_matters(self) -> dict:
        """What changes the weights of this stage: not where they go, what is shown or evaluated."""
        config = to_dict(self.config)
        for key in ("output_dir", "log", "checkpoint", "pipeline", "stages"):
            del config[key]
        for key in ("eval", "sample", "cold_start", "monitor", "judge"):
            del config[key]
        for key in ("eval", "max_eval_problems"):
            del config["data"][key]
        del config["model"]["activation_checkpointing"]  # the same gradient
        return json.loads(json.dumps(config))

    def own_measure(self) -> str:
        """What checkpoint.keep_best = "auto" is, of this stage as it is configured."""
        return ""

    @cached_property
    def checkpoints(self) -> CheckpointWriter:
        asked = self.config.checkpoint
        best = self.own_measure() if asked.keep_best == "auto" else asked.keep_best
        return CheckpointWriter(self.folder / "checkpoints", asked, best)

    @property
    def saved_step(self) -> int:
        """The newest step known to be on disk, of rank 0's folder."""
        return max(self._resumed_step, self.checkpoints.saved_step)

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint; without `wait` its disk work may be left to a thread."""
        beat("save")
        began = time.monotonic()
        if distributed.is_main():
            state = self.state() | {"starts_from": self.policy.path}
            self.checkpoints.save(self.step, self.state_tensors(), state, wait=wait)
        distributed.barrier()
        self._seconds["save"] = max(time.monotonic() - began, self.checkpoints.write_seconds)

    def optimize(self) -> tuple[Tensor, float]:
        """Sum gradients over ranks and step. Returns (gradient norm, for `read_norms`; learning rate)."""
        beat("optimizer")
        self.was_updated = True
        self.optimizer.accumulate()
        distributed.sum_gradients(self.optimizer.masters)
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
        size = sum(p.nbytes + 12 * p.numel() for p in self.trained().values())
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


@torch.no_grad()
def fill(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    assert targets.keys() == sources.keys(), targets.keys() ^ sources.keys()
    for name, target in targets.items():
        target.copy_(sources[name])
