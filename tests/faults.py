"""Faults to put into a run, and who counts them: shared by the tests that inject faults and by the soak.

Nothing here is known to the package: os functions, methods and limits of the own process are replaced.
"""

import hashlib
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import checkpoint, checkpoint_writer, policy_update, sft
from r1fast.examples import Example
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer

REPORT = "R1FAST_FAULT_REPORT"  # names a folder for what was tried, as JSON
WRITING = "open read write fsync rename replace mkdir unlink rmdir".split()
OPERATIONS = [*WRITING, "close", "listdir", "scandir", "stat"]


class Tally:
    """What a module of tests has tried and survived, for `make faults`."""

    def __init__(self, module: str):
        self.module, self.rows = module, {}

    def count(self, fault: str, tried: int = 1, survived: int | None = None, **more: int) -> None:
        """`more` are maxima over the calls, as most_steps_lost."""
        row = self.rows.setdefault(fault, {"fault": fault, "tried": 0, "survived": 0})
        row["tried"] += tried
        row["survived"] += tried if survived is None else survived
        for key, value in more.items():
            row[key] = max(row.get(key, 0), value)

    def write(self) -> None:
        """Where the environment asks for it."""
        if folder := os.environ.get(REPORT):
            path = Path(folder) / f"{self.module}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"module": self.module, "faults": list(self.rows.values())}
            path.write_text(json.dumps(content, indent=2) + "\n")


def grpo_trainer(folder, *overrides: str, scorer=None, **kwargs) -> GRPOTrainer:
    scorer, config = scorer or TokenScorer(), tiny_config(*overrides)
    return GRPOTrainer(tiny_policy(), config, folder, tiny_problems(), scorer, **kwargs)


def sft_trainer(folder, *overrides: str, num_examples: int = 8) -> SFTTrainer:
    policy, config = tiny_policy(), tiny_config(*overrides)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(num_examples)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def warnings_of_saves(monkeypatch) -> list[str]:
    """What saves and loads of checkpoints warn of, as it comes."""
    texts: list[str] = []
    for module in (checkpoint, checkpoint_writer):
        monkeypatch.setattr(module, "warn", texts.append)
    return texts


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def flip_a_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zero_fill(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def forge(path: Path, name: str, raw: bytes) -> None:
    """Put a file into a checkpoint or a recording, as one whose hash is right."""
    (path / name).write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {"a flipped bit": flip_a_bit, "a truncated file": truncate, "a zeroed tail": zero_fill}


class Spoiled:
    """Puts a NaN into the loss, the gradient or a weight of the optimizer steps `steps`, counted from 0."""

    def __init__(self, trainer, monkeypatch, where: str, steps: range):
        self.trainer, self.where, self.steps = trainer, where, steps
        module = policy_update if isinstance(trainer, GRPOTrainer) else sft
        self.forward = module.hidden_states
        monkeypatch.setattr(module, "hidden_states", self.hidden_states)
        self.on_gradient = trainer.on_gradient
        trainer.on_gradient = self.gradient

    def hidden_states(self, model, batch):
        hidden = self.forward(model, batch)
        return hidden * math.nan if self.now("loss") else hidden

    def gradient(self):
        if self.now("gradient"):
            self.trainer.optimizer.masters[3].grad[0] = math.nan
        self.on_gradient()

    def now(self, where: str) -> bool:
        return self.where == where and self.trainer.optimizer_step in self.steps


@contextmanager
def no_room(size: int = 0) -> Iterator[None]:
    """A disk that is full, as far as files of more than `size` bytes go; stdout's too, where it is one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FileOperations:
    """Counts the calls of os.<name> on what lies in a folder, and lets one of them go wrong.

    `is_inside(path)` says whether a path is in it; `set_name(name, function)` replaces os.<name>.
    """

    def __init__(self, is_inside: Callable[[str], bool], set_name=None, names=OPERATIONS):
        self.is_inside = is_inside
        self.seen: list[str] = []
        self.at, self.error = 0, None  # which one fails, and how; without an error it kills
        self._ours: set[int] = set()  # open descriptors
        for name in names:
            (set_name or (lambda n, f: setattr(os, n, f)))(name, self._wrapped(name))

    def arm(self, at: int, error: OSError | None) -> None:
        """The `at`-th call from now on raises `error`, or the process is killed in the middle of it."""
        self.seen.clear()
        self.at, self.error = at, error

    def _counts(self, target, kwargs: dict) -> bool:
        if (folder := kwargs.get("dir_fd")) is not None:
            return folder in self._ours
        if isinstance(target, int):
            return target in self._ours
        return self.is_inside(os.fsdecode(target))

    def _wrapped(self, name: str) -> Callable:
        real = getattr(os, name)

        def call(target=".", *args, **kwargs):
            inside = self._counts(target, kwargs)
            if inside:
                self.seen.append(name)
            wrong = inside and len(self.seen) == self.at
            if wrong and self.error is None:
                if name == "write":
                    real(target, args[0][: len(args[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "close":
                real(target)  # closed is it anyway
                self._ours.discard(target)
            if wrong:
                raise self.error
            if name == "close":
                return None
            result = real(target, *args, **kwargs)
            if name == "open" and inside:
                self._ours.add(result)
            return result

        return call
