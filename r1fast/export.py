"""`r1fast export`: the weights of any checkpoint of a run as a plain Hugging Face folder.

A checkpoint holds what was trained. The rest is from the model that the run started from: config.json, the
tokenizer and, under adapters, the frozen weights, which are compared with those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from r1fast.checkpoint import BEST, Checkpoint, load_checkpoint, read_step, steps_in
from r1fast.checkpoint_layout import NAME, checkpoints_around
from r1fast.checkpoint_state import checked
from r1fast.config import Config, config_of, load_config
from r1fast.lora import add_lora, merge_lora
from r1fast.metrics import say
from r1fast.model import DTYPES, load_tokenizer
from r1fast.policy import Policy, load_policy
from r1fast.reward_model import load_reward_model
from r1fast.reward_training import RewardPolicy
from r1fast.training_state import base_digest, fill

KEYS = ("model.path", "model.dtype")
CHECKPOINTS = "checkpoints"


def export(target: str, overrides: list[str], options: Mapping) -> None:
    """Write what the command line asks for. Raises ValueError for what is not there or does not fit."""
    out = options.get("out", "")
    if not out:
        raise ValueError("export takes two folders: r1fast export RUN|CHECKPOINT OUT")
    _check_out(Path(out).expanduser())
    asked = _asked(overrides)
    saved = find_checkpoint(Path(target), options.get("step", ""))
    policy = restored(saved, asked.get("model.path", ""))
    lora = _config(saved).lora.rank
    if "adapter-only" in options:
        if not lora:
            raise ValueError(f"{saved.path} has no adapters: it was trained without lora.rank")
        policy.save_adapter(out)
    else:
        if dtype := asked.get("model.dtype", ""):
            if lora:
                merge_lora(policy.model)
            policy.model.to(DTYPES[dtype])
        policy.save(out)
    what = "adapter" if "adapter-only" in options else "model, adapters merged" if lora else "model"
    say(f"{saved.path}: {what} in {out}")


def _check_out(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists; not overwritten")
    if folder := checkpoints_around(out):
        raise ValueError(
            f"{out} would lie among the checkpoints in {folder}, where its run writes and removes: name a "
            "folder outside"
        )


def _asked(overrides: list[str]) -> dict[str, str]:
    asked = {}
    for word in overrides:
        key, _, value = word.removeprefix("--").partition("=")
        if key not in KEYS:
            raise ValueError(
                f"{key} is no part of an export; what can be said is {', '.join(KEYS)}"
            )
        asked[key] = value
    load_config(None, overrides)  # an unknown dtype is an error that names the known ones
    return asked


def find_checkpoint(target: Path, step: str = "") -> Checkpoint:
    """Of a checkpoint's own folder, or of a run: the newest whole one, that of `step`, or the best."""
    if not target.is_dir():
        raise ValueError(f"no such folder: {str(target)!r}; name a run or one of its checkpoints")
    if step not in ("", "best") and not step.isdecimal():
        raise ValueError(f"--step must be a whole number or best, got {step!r}")
    if (match := NAME.fullmatch(target.resolve().name)) and not match[2]:
        if step and (step == "best" or int(step) != int(match[1])):
            raise ValueError(f"{target} is of step {int(match[1])}, and --step asks for {step}")
        folder, step = target.resolve().parent, str(int(match[1]))
    elif steps_in(target):
        folder = target
    elif (target / CHECKPOINTS).is_dir():
        folder = target / CHECKPOINTS
    else:
        stages = sorted(str(path.parent) for path in target.glob(f"**/{CHECKPOINTS}"))
        hint = f"; name one of {', '.join(stages)}" if stages else ""
        raise ValueError(f"{str(target)!r} holds no checkpoints{hint}")
    if step == "best":
        if not (folder / BEST).is_file():
            raise ValueError(f"no checkpoint in {str(folder)!r} is the best (checkpoint.keep_best)")
        step = (folder / BEST).read_text().strip().removeprefix("step-")
        if not step.isdecimal():
            raise ValueError(f"{folder / BEST} must name a step folder, got {step!r:.80}")
    saved = read_step(folder, int(step)) if step else load_checkpoint(folder)
    if saved is None:
        there = ", ".join(str(n) for n, _ in reversed(steps_in(folder))) or "none"
        raise ValueError(
            f"{str(folder)!r} has no checkpoint of step {step or 'any'}; steps: {there}"
        )
    return checked(saved)


def _config(saved: Checkpoint) -> Config:
    """What of the run's config makes a model."""
    return config_of({key: saved.state["config"].get(key, {}) for key in ("model", "lora")})


def restored(saved: Checkpoint, path: str = "") -> Policy | RewardPolicy:
    """The model of a checkpoint on the CPU, on top of the one at `path` or that the run started from."""
    state, config = saved.state, _config(saved)
    run = saved.path.parent.parent
    known = (
        [path]
        if path
        else [state.get("starts_from") or state.get("base_path") or config.model.path]
    )
    if not path and not state.get("base"):  # of a whole model any of its shape will do
        known.append(str(run / "model"))
    base = next((p for p in known if Path(p).is_dir()), known[0])
    weights = saved.tensors("model")
    policy: Policy | RewardPolicy
    if "score_weight" in weights:
        policy = RewardPolicy(
            load_reward_model(base, config.model.dtype), load_tokenizer(base), base
        )
    else:
        policy = load_policy(base, dtype=config.model.dtype, device="cpu")
    if state.get("base"):
        add_lora(policy.model, config.lora)
        if base_digest(policy.model) != state["base"]:
            raise ValueError(
                f"the adapters in {saved.path} were trained on other weights than those of {base!r}: "
                f"name the model (it was {state.get('base_path', '')!r}) with --model.path="
            )
    targets = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    shapes, own = ({n: x.shape for n, x in named.items()} for named in (weights, targets))
    if shapes != own:
        raise ValueError(
            f"the weights in {saved.path} do not fit {base!r}: name the model that the run started "
            "from, or one of its shape, with --model.path="
        )
    with torch.no_grad():
        fill(targets, weights)
    return policy
