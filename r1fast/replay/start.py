"""Where a recorded step began: a checkpoint or the first model, and the recorded updates from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1fast import distributed
from r1fast.checkpoint import Checkpoint, load_checkpoint, steps_in
from r1fast.checkpoint_state import checked
from r1fast.config import Config, config_of
from r1fast.config_diff import same_config
from r1fast.metrics import warn
from r1fast.policy import Policy, policy_of
from r1fast.policy_update import check_loss_options
from r1fast.provenance import rounding
from r1fast.recording import (
    FOLDER,
    Recording,
    read_recording,
    recorded_steps,
    shown_steps,
    snapshot,
)
from r1fast.replay.update import ReplayedUpdate, State

WHERE = ("model.path", "model.device")  # change where it runs, not what is compared
WHAT = ("grpo.", "optim.", "rollout.batch_invariant")


@dataclass(slots=True)
class Replay:
    """A step ready to be replayed: the trainer has the state from before it."""

    recording: Recording
    config: Config  # the recorded one
    variant: Config | None  # with the overrides that change the update, where there are some
    trainer: ReplayedUpdate
    start: str  # where the weights are from
    differences: list[str]  # of machine and code, then -> now
    is_exact: bool  # the state before the step is the recorded one, to the last bit


def prepare(folder: Path, step: int, overrides: Sequence[str] = ()) -> Replay:
    """Raises ValueError for a step whose weights cannot be had, or are not the recorded ones."""
    recording = _recording(folder, step)
    where, what = _split(overrides)
    config = config_of(recording.state["config"], where)
    variant = config_of(recording.state["config"], overrides) if what else None
    if variant is not None:
        _check_variant(config, variant)
    saved, between = _start(folder, step)
    is_given = any(override.startswith("--model.path=") for override in where)
    policy = _policy(folder, config, recording, saved, is_given=is_given)
    trainer, start = None, f"the model {policy.path}"
    versions = rounding(policy.device, distributed.world_size())
    is_exact, reasons = True, []
    for one in [*(read_recording(folder, n) for n in between), recording]:
        own = config_of(one.state["config"], where)
        if trainer is None:
            trainer = ReplayedUpdate(policy, own, folder, one)
            if saved is not None:
                trainer.restore(saved)
                start = f"the checkpoint of step {saved.step}"
        trainer = under(trainer, own, one)
        other = same_config(one.state["versions"], versions) + reasons
        is_first = one.step == (between or [step])[0]
        is_exact &= _check_state(trainer, one, [] if is_first else other)
        if trainer.take_budget(one):
            reasons.append(f"micro-batches: those that step {one.step} began with did not fit")
        if one is not recording:
            trainer.update(one.of_rank(trainer.rank, trainer.world_size), one.step - 1)
    if between:
        start += f", then the recorded update{'s' * (len(between) > 1)} of {shown_steps(between)}"
    differences = same_config(recording.state["versions"], versions) + reasons
    return Replay(recording, config, variant, trainer, start, differences, is_exact)


def under(trainer: ReplayedUpdate, config: Config, recording: Recording) -> ReplayedUpdate:
    """A trainer of this config with the state of `trainer`, whose model it takes over."""
    if trainer.config == config:
        return trainer
    state = State.of(trainer, recording.step - 1)
    other = ReplayedUpdate(trainer.policy, config, trainer.folder, recording)
    other.restore(state)
    return other


def _recording(folder: Path, step: int) -> Recording:
    if not (folder / FOLDER).is_dir():
        stages = sorted(str(path.parent) for path in folder.glob(f"*/{FOLDER}"))
        if stages:
            raise ValueError(
                f"{str(folder)!r} is a run of several stages: name one of {', '.join(stages)}"
            )
        if not folder.is_dir():
            raise ValueError(f"the run folder {str(folder)!r} does not exist")
    return read_recording(folder, step)


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(where it runs, what of the update is changed)."""
    where, what = [], []
    for override in overrides:
        key = override.removeprefix("--").partition("=")[0]
        if key in WHERE:
            where.append(override)
        elif key.startswith(WHAT):
            what.append(override)
        else:
            raise ValueError(
                f"{key} is no part of an update of recorded rollouts; what can be changed is "
                f"{', '.join(f'{name}*' if name.endswith('.') else name for name in WHAT)} and, "
                f"for another place, {', '.join(WHERE)}"
            )
    return where, what


def _check_variant(config: Config, variant: Config) -> None:
    check_loss_options(variant)
    if variant.grpo.kl_coef and not config.grpo.kl_coef:
        raise ValueError(
            f"grpo.kl_coef = {variant.grpo.kl_coef} needs the reference of the run, which had none "
            "(grpo.kl_coef = 0): record a run whose kl_coef is above 0, however small"
        )


def _start(folder: Path, step: int) -> tuple[Checkpoint | None, list[int]]:
    """(the newest checkpoint before the step, or None for the beginning; the steps in between)."""
    checkpoints = folder / "checkpoints"
    if saved := load_checkpoint(checkpoints, up_to=step - 1):
        checked(saved)
    between = list(range(saved.step + 1 if saved else 1, step))
    recorded = recorded_steps(folder)
    if missing := [n for n in between if n not in recorded]:
        there = shown_steps(sorted({n for n, _ in steps_in(checkpoints)})) or "none"
        raise ValueError(
            f"the weights before step {step} cannot be had: from "
            + (f"the checkpoint of step {saved.step}" if saved else "the beginning")
            + f" on, the updates of steps {shown_steps(missing)} are not recorded. Recorded steps: "
            f"{shown_steps(recorded)}; checkpoints: {there}. Record the steps between too (--record="
            f"{between[0]}-{step}), or keep nearer checkpoints (checkpoint.every_steps, "
            "checkpoint.keep_last)"
        )
    return saved, between


def _policy(
    folder: Path, config: Config, recording: Recording, saved: Checkpoint | None, *, is_given: bool
) -> Policy:
    """The model that the run started from; with a checkpoint any of its shape will do."""
    path = config.model.path if is_given else recording.state["starts_from"]
    try:
        if not path:
            raise ValueError("the run's model was made by a program, not read from a folder")
        return policy_of(config, path)
    except ValueError as error:
        # the base of adapters is not in the checkpoint
        if saved is not None and (folder / "model").is_dir() and not config.lora.rank:
            return policy_of(config, folder / "model")
        raise ValueError(
            f"the model that the run started from is not to be had: {error}. --model.path=FOLDER "
            "says where it is now"
        ) from None


def _check_state(trainer: ReplayedUpdate, recording: Recording, reasons: list[str]) -> bool:
    """Whether the state is the recorded one. ValueError where it is not, and nothing explains it."""
    before, found = recording.state["before"], snapshot(trainer)
    wrong = [name for name, x in before["digests"].items() if found["digests"].get(name) != x]
    counters = ((name, x) for name, x in before["counters"].items() if name != "token_budget")
    lost = [name for name, x in counters if found["counters"].get(name) != x]
    if not wrong and not lost:
        return True
    problem = (
        f"the state before step {recording.step} is not the recorded one "
        f"({', '.join(wrong + lost)})"
    )
    if lost or not reasons:
        raise ValueError(
            f"{problem}: the model, the checkpoint or the recorded updates that it was made from are of "
            "another run, or code has changed"
        )
    warn(f"{problem}: it was made again with other {'; '.join(reasons)}")
    return False
