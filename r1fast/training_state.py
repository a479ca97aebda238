"""What a stage of training is between two steps: weights, optimizer, counters, token budget; saved and resumed.

A step is a pure function of (weights, optimizer state, step number): data order, sampling and
mini-batch split derive from the seed and the step, so a resumed run repeats what would have been.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.checkpoint import load_checkpoint
from r1fast.checkpoint_state import checked
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import Config, to_dict
from r1fast.config_check import lora_targets
from r1fast.config_diff import same_config
from r1fast.lora import add_lora, lora_of
from r1fast.metrics import note, say
from r1fast.model import Decoder
from r1fast.policy import Policy
from r1fast.rollout.sampler import sample_seed
from r1fast.rollout.weights import checksums
from r1fast.sharding import make_parallel
from r1fast.shards import Shard, local
from r1fast.token_budget import TokenBudget
from r1fast.watchdog import beat


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


def tokenizer_facts(policy: Policy, config: Config) -> dict:
    """What names a tokenizer in a checkpoint: its size, a digest of its rules, what ends a completion."""
    if (tokenizer := policy.tokenizer) is None:
        return {}
    facts: dict = {"vocabulary": len(tokenizer)}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        for key in ("padding", "truncation"):  # of the last call
            rules.pop(key, None)
    else:
        rules = getattr(tokenizer, "get_vocab", dict)()  # of a user's own there may be none
    texts = {"rules": json.dumps(rules, sort_keys=True)}
    if config.template.name == "chat":
        texts["chat_template"] = str(tokenizer.chat_template)
    for name, text in texts.items():
        facts[name] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return facts | {"eos_ids": getattr(policy, "eos_ids", [])}


def check_same(targets: dict[str, Tensor | Shard], sources: dict[str, Tensor]) -> None:
    """Raises ValueError where names or shapes differ."""
    shapes, own = ({n: tuple(x.shape) for n, x in named.items()} for named in (sources, targets))
    if other := [name for name in shapes | own if shapes.get(name) != own.get(name)]:
        name = other[0]
        raise ValueError(
            f"{len(other)} tensors of a checkpoint are not those of this run, the first {name!r}: "
            f"{shapes.get(name, 'nothing')} and not {own.get(name, 'nothing')}"
        )


@torch.no_grad()
def fill(targets: dict[str, Tensor | Shard], sources: dict[str, Tensor]) -> None:
    check_same(targets, sources)
    for name, target in targets.items():
        rows = isinstance(target, Shard)
        local(target).copy_(target.rows_of(sources[name]) if rows else sources[name])


class TrainingState:
    """State and checkpoints of one training stage in `folder`."""

    section = ""  # of the config that has the token_budget
    shorter = ""  # the keys that bound a sequence's length
    can_shard = False  # parallel.mode = "fsdp"
    unfinished: dict | None = None  # the row of a step whose evaluation was given up
    note = ""  # for the next row: what cannot be as if the run had not been stopped

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
        # the frozen base is not in the checkpoints, so they name it; here it is whole yet
        self.base = base_digest(policy.model) if config.lora.rank else ""
        self.parallel = make_parallel(policy, config, can_shard=self.can_shard)
        self.policy, self.model, self.config = policy, self.parallel.model, config
        self.folder, self.stage = Path(folder), stage
        self.num_steps, self.num_optimizer_steps = num_steps, num_optimizer_steps
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.grid = self.parallel.grid
        self.group = distributed.beside()  # of the threads that write checkpoints
        # now, as it takes half a second for a large vocabulary: a save would keep a step waiting
        self.tokenizer = tokenizer_facts(policy, config) if resume else {}
        self.optimizer = self.parallel.make_optimizer(config.optim)
        self.prepare()
        self.step = self.optimizer_step = self.num_tokens = 0
        self._resumed_step = 0  # nothing is lost that is not trained yet
        self._seconds: dict[str, float] = {}  # what a step, an evaluation, a save took last
        if not (resume and self._resume(force)):
            self.token_budget = self._make_token_budget({})

    def prepare(self) -> None:
        """For subclasses: what is made of the first weights, before others are loaded."""

    def _resume(self, force: bool) -> bool:
        """Whether there was a checkpoint to go on from."""
        saved = load_checkpoint(self.folder / "checkpoints")
        found = distributed.gather_objects(saved and saved.step)
        if len(set(found)) > 1:
            there = ", ".join(f"rank {rank} step {step}" for rank, step in enumerate(found))
            raise ValueError(
                f"ranks find other checkpoints in {self.folder}: {there}. All ranks need one filesystem"
            )
        if saved is None:
            return False
        checked(saved)
        other = saved.state.get("stage", self.stage)
        if other != self.stage:
            raise ValueError(
                f"{self.folder} holds a checkpoint of stage {other!r}, this is stage "
                f"{self.stage!r}: take another output_dir"
            )
        changes = same_config(saved.state["config"], self.config_that_matters())
        if (data := saved.state.get("data", self.data)) != self.data:
            changes.append(
                f"the training data: other rows, or another order (digest {data} -> {self.data})"
            )
        if known := saved.state.get("tokenizer"):
            changes += same_config({"tokenizer": known}, {"tokenizer": self.tokenizer})
        if changes and not force:
            raise ValueError(
                f"{self.folder} was begun with another config:\n  " + "\n  ".join(changes) + "\n"
                "Take another output_dir, or --force to go on with the new values."
            )
        self.restore(saved)
        if self.step < self.num_steps:
            say(f"{self.stage}: goes on after step {self.step} of {self.num_steps}")
            now = self._layout()
            before = {name: saved.state.get(name, value) for name, value in now.items()}
            if before != now:
                words = {"world_size": "processes", "parallel": "model"}
                changed = [
                    f"{words[n]} {before[n]} -> {x}" for n, x in now.items() if x != before[n]
                ]
                self.note = (
                    f"{self.stage}: {', '.join(changed)} after step {self.step}: the same "
                    "data in the same order and the same random streams, but sums are added up in another "
                    "order, so losses and weights are those of the run before to rounding, not to the bit"
                )
                note(self.note)
        return True

    def _layout(self) -> dict[str, int | str]:
        """What decides in which order sums are added up."""
        return {"world_size": self.world_size, "parallel": self.parallel.name}

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
                f"{saved.state.get('base_path', '')!r}; "
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
        if stored and state["config"].get(self.section, {}).get("token_budget") == asked:
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
            in_step=self.policy.device if self.parallel.in_step else None,
        )
        budget.agree(self.policy.device)
        return budget

    def settle(self, token_budget: int | str) -> tuple[int, str]:
        """(token budget, what layers keep): what is "auto" of them, by the memory that is there."""
        raise NotImplementedError

    @property
    def micro_batch_tokens(self) -> int:
        """That a micro-batch may have, on all ranks together that have pieces of it."""
        return self.token_budget.num_tokens * self.grid.context

    def _keep_less(self) -> str:
        """Where it was left to us, layers keep their inputs alone from now on. Says so; empty: no more can be done."""
        asked = self.config.model.activation_checkpointing
        if asked != "auto" or self.model.checkpointing == "full":
            return ""
        self.model.checkpointing = "full"
        return "layers are computed again in the backward (model.activation_checkpointing = full)"

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

    def trained(self) -> dict[str, Tensor | Shard]:
        """The weights that a checkpoint holds: a frozen base is where it was read from."""
        return self.parallel.trained()

    def load_extra(self, saved) -> None:
        """For subclasses: tensors beyond model and optimizer."""

    def extra_tensors(self) -> dict[str, dict[str, Tensor | Shard]]:
        return {}

    def extra_state(self) -> dict:
        """For subclasses: plain data beyond the counters."""
        return {}

    def state_tensors(self) -> dict[str, dict[str, Tensor | Shard]]:
        """Everything that a step changes."""
        return {
            "model": self.parallel.stored(),
            "optimizer": self.optimizer.state_tensors(),
            **self.extra_tensors(),
        }

    def config_that_matters(self) -> dict:
        """What changes the weights of this stage: not where they go, what is shown or evaluated."""
        config = to_dict(self.config)
        for key in ("output_dir", "log", "checkpoint", "parallel", "pipeline", "stages"):
            del config[key]
        for key in ("eval", "sample", "cold_start", "monitor", "judge"):
            del config[key]
        for key in ("eval", "max_eval_problems"):
            del config["data"][key]
        del config["model"]["activation_checkpointing"]  # the same gradient
        del config["rollout"]["vllm"]  # where servers are, how long they are waited for
        return json.loads(json.dumps(config))

    def own_measure(self) -> str:
        """What checkpoint.keep_best = "auto" is, of this stage as it is configured."""
        return ""

    @cached_property
    def checkpoints(self) -> CheckpointWriter:
        asked = self.config.checkpoint
        best = self.own_measure() if asked.keep_best == "auto" else asked.keep_best
        return CheckpointWriter(self.folder / "checkpoints", asked, best, self.group)

    @property
    def saved_step(self) -> int:
        """The newest step known to be on disk."""
        return max(self._resumed_step, self.checkpoints.saved_step)

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint; without `wait` its disk work may be left to a thread."""
        beat("save")
        began = time.monotonic()
        state = self.state() | {
            "starts_from": self.policy.path,
            "tokenizer": self.tokenizer,
            **self._layout(),
        }
        self.checkpoints.save(self.step, self.state_tensors(), state, wait=wait)
        self._seconds["save"] = max(time.monotonic() - began, self.checkpoints.write_seconds)
