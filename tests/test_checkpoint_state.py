"""A state.json that a person has made or edited, with its hash made right: a ValueError that names file and field."""

import json
import math
import random
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from faults import forge
from safetensors.torch import load_file, save_file
from tiny import TokenScorer, tiny_checkpoint, tiny_config, tiny_problems

from r1fast.__main__ import main
from r1fast.checkpoint import load_checkpoint
from r1fast.checkpoint_state import _POINT, FIELDS, checked
from r1fast.hacking_monitor import Point
from r1fast.policy import policy_of
from r1fast.trainer import GRPOTrainer

STEP = "step-000002"
JUNK = [
    None, True, False, -1, 0, 2**63, 10**400, 1e400, -math.inf, math.nan, 0.5, "x", "", "\ud800", "a\0b", [], [1], [{}], {}, {"a": 1}, {"a": {}},
]  # fmt: skip


def make(base: str, folder: Path, *overrides: str) -> GRPOTrainer:
    config = tiny_config(f"--model.path={base}", "--grpo.num_steps=2", *overrides)
    return GRPOTrainer(policy_of(config), config, folder, tiny_problems(), TokenScorer())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    """(the model, the folder of a run with a reference and a monitor's memory)."""
    folder = tmp_path_factory.mktemp("state")
    base = tiny_checkpoint(folder / "base")
    trainer = make(base, folder / "run", "--checkpoint.keep_last=1")
    trainer.monitor.saw_reward(0.5)
    trainer.monitor.saw_evaluation(1, {"pass@1": 0.5, "pass@1_stderr": 0.1})
    trainer.run()
    shutil.copy(folder / "run/checkpoints" / STEP / "state.json", folder / "run" / "sound.json")
    return base, folder / "run"


@pytest.fixture
def edited(run):
    """Replaces files of the checkpoint, which is whole again after the test."""
    path = run[1] / "checkpoints" / STEP
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def edit(name: str, raw: bytes) -> None:
        for file, kept in before.items():
            (path / file).write_bytes(kept)
        forge(path, name, raw)

    yield edit
    for file, kept in before.items():
        (path / file).write_bytes(kept)


def state_of(run) -> dict:
    """As it was written."""
    return json.loads((run[1] / "sound.json").read_text())


def leaves(value: dict, prefix=()) -> list[tuple]:
    """The path of every field that the table knows of."""
    found = []
    for key, inner in value.items():
        if not prefix and f"{key}?" not in FIELDS and key not in FIELDS:
            continue
        found.append((*prefix, key))
        if isinstance(inner, dict) and key not in ("config", "tokenizer"):
            found += leaves(inner, (*prefix, key))
    return found


def test_what_is_written_is_what_the_table_has(run):
    state = state_of(run)
    known = {name.removesuffix("?") for name in FIELDS}
    assert set(state) <= known
    assert known - set(state) == {"base", "base_path", "unfinished"}
    assert state["monitor"]["points"]
    assert set(_POINT) == {field.name for field in fields(Point)}
    assert checked(load_checkpoint(run[1] / "checkpoints")).state == state


@pytest.mark.parametrize(("path", "value", "told"), [
    ("optimizer_step", None, "'optimizer_step' must be a whole number of at least 0, got None"),
    ("optimizer_step", 1.5, "'optimizer_step' must be a whole number of at least 0, got 1.5"),
    ("num_tokens", "many", "'num_tokens' must be a whole number of at least 0, got 'many'"),
    ("config", [], r"'config' must be an object, got \[\]"),
    ("config.grpo", 3, "'config.grpo' must be an object, got 3"),
    ("token_budget.num_tokens", 0, "'token_budget.num_tokens' must be a whole number of at least 1, got 0"),
    ("token_budget.was_halved", 1, "'token_budget.was_halved' must be true or false, got 1"),
    ("reference_version", "0", "'reference_version' must be a whole number"),
    ("monitor.points", {}, "'monitor.points' must be a list, got {}"),
    ("monitor.rewards", [1, "x"], r"'monitor.rewards\[1\]' must be a number, got 'x'"),
    ("unfinished", {"step_time": "x"}, "'unfinished.step_time' must be a number, got 'x'"),
    ("unfinished", {"loss": []}, "'unfinished' must be an object of numbers and texts"),
    ("world_size", 0, "'world_size' must be a whole number of at least 1, got 0"),
    ("tokenizer", 7, "'tokenizer' must be an object, got 7"),
    ("measure", "best", "'measure' must be an object, got 'best'"),
    ("starts_from", "\ud800", r"'starts_from' must be a text, got '\\ud800'"),
])  # fmt: skip
def test_a_wrong_field_is_named(run, edited, path, value, told):
    state = state_of(run)
    *outer, last = path.split(".")
    inner = state
    for key in outer:
        inner = inner[key]
    inner[last] = value
    edited("state.json", json.dumps(state).encode())
    with pytest.raises(ValueError, match=told) as caught:
        make(*run)
    assert f"{STEP}/state.json: " in str(caught.value)
    assert f"or remove {STEP} to go on from the checkpoint before it" in str(caught.value)


def test_a_missing_field_is_named(run, edited, tmp_path, capsys):
    for name in ("optimizer_step", "num_tokens", "config", "reference_version"):
        state = state_of(run)
        del state[name]
        edited("state.json", json.dumps(state).encode())
        with pytest.raises(ValueError, match=rf"state\.json has no '{name}'; it was not written"):
            make(*run)
        assert main(["export", str(run[1]), str(tmp_path / "out")]) == 2
        assert f"has no '{name}'" in capsys.readouterr().err


def test_any_state_is_taken_or_refused(run, edited, tmp_path):
    """Whatever stands in any of its fields, alone or two at once: no other kind of error."""
    rng, sound, refused = random.Random(0), state_of(run), 0
    paths = leaves(sound)
    assert len(paths) > 15
    for case in range(150):
        state = json.loads(json.dumps(sound))
        for path in rng.sample(paths, 1 + case % 2):
            inner = state
            for key in path[:-1]:
                inner = inner[key] if isinstance(inner, dict) and key in inner else {}
            if isinstance(inner, dict):
                inner[path[-1]] = rng.choice(JUNK)
                if rng.random() < 0.2:
                    del inner[path[-1]]
        edited("state.json", json.dumps(state).encode())
        try:
            checked(load_checkpoint(run[1] / "checkpoints"))
        except ValueError:
            refused += 1
            continue
        if case % 3 == 0:  # what is taken does not fail later
            try:
                make(*run)
            except ValueError:
                pass
    assert 75 < refused < 150


@pytest.mark.parametrize(("file", "name", "change", "told"), [
    ("reference", "reference.norm.weight", None, "1 tensors of a checkpoint are not those of this run"),
    ("reference", "reference.norm.weight", torch.ones(3), r"\(3,\) and not \(32,\)"),
    ("optimizer", "optimizer.step.norm.weight", torch.ones(2), "one float32 number of at least 0 for 'step.norm.weight'"),
    ("optimizer", "optimizer.step.norm.weight", torch.tensor(math.nan), "one float32 number"),
    ("optimizer", "optimizer.step.norm.weight", torch.tensor(1), "got torch.int64"),
    ("model", "norm.weight", None, "holds other weights than this run trains"),
])  # fmt: skip
def test_tensors_that_are_not_the_runs(run, edited, file, name, change, told, tmp_path):
    tensors = load_file(run[1] / "checkpoints" / STEP / f"{file}.safetensors")
    assert name in tensors
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    edited(f"{file}.safetensors", (tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(ValueError, match=told):
        make(*run)
