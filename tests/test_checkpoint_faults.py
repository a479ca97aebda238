"""Faults put into saves: a full and a failing disk at every file operation, damage, kill -9.

With R1FAST_FAULT_REPORT naming a folder, what was tried and survived is written there as JSON.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import killable
import pytest
import torch
from faults import DAMAGES, FileOperations, Tally, leftovers, warnings_of_saves
from tiny import without_clock

from r1fast.checkpoint import load_checkpoint
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import CheckpointConfig
from r1fast.metrics import read_metrics

KILLS = 15  # of each kind: by the clock, and inside saves
FULL, FAILING = (OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EIO))
TALLY = Tally("test_checkpoint_faults")


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    TALLY.write()


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    return warnings_of_saves(monkeypatch)


def fail_at(monkeypatch, folder: Path, n: int, error: OSError) -> list[str]:
    """The n-th file operation in `folder` fails; returns the names of all, as they are made."""
    operations = FileOperations(
        lambda path: path.startswith(str(folder)),
        lambda name, function: monkeypatch.setattr(os, name, function),
    )
    operations.arm(n, error)
    return operations.seen


def weights(step: int) -> dict:
    named = {"w": torch.full((4, 3), float(step)), "b": torch.arange(3.0)}
    return {"model": named, "optimizer": {"step": torch.tensor(float(step))}}


def assert_whole(folder: Path, steps: set[int]) -> None:
    found = load_checkpoint(folder)
    assert found.step in steps
    assert float(found.tensors("optimizer")["step"]) == found.step
    assert torch.equal(found.tensors("model")["w"], weights(found.step)["model"]["w"])


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("error", [FULL, FAILING], ids=["ENOSPC", "EIO"])
def test_a_failure_of_any_file_operation(tmp_path, monkeypatch, warnings, error, asynchronous):
    folder = tmp_path / "checkpoints"
    config = CheckpointConfig(asynchronous=asynchronous)
    saves = CheckpointWriter(folder, config, "reward")
    step, n, names = 0, 0, set()
    while True:
        n, step = n + 1, step + 1
        saves.saw({"reward": float(step)})  # it is the best, and the one before goes
        if step == 1:
            saves.save(step, weights(step), {}, wait=True)
            step += 1
            saves.saw({"reward": float(step)})
        with monkeypatch.context() as patch:
            seen = fail_at(patch, folder, n, error)
            saves.save(step, weights(step), {})
            saves.close()
        if len(seen) < n:
            break
        names.add(seen[n - 1])
        # the temporary folder is gone; an old one may be half removed, under a name that is not read
        assert all(name.endswith(".gone") for name in leftovers(folder)), (n, seen[n - 1])
        assert_whole(folder, {step - 1, step})
        found, told = load_checkpoint(folder), list(warnings)
        assert all(str(step) in text for text in told)
        # silent only where nothing was lost
        assert told or found.step == step, (n, seen[n - 1])
        warnings.clear()
        step += 1
        saves.saw({"reward": float(step)})
        saves.save(step, weights(step), {})
        saves.close()
        assert_whole(folder, {step})
        assert (folder / "best").read_text() == (folder / "latest").read_text()
        assert leftovers(folder) == []
        assert not [text for text in warnings if "DAMAGED" in text]
        warnings.clear()
    assert names >= {"open", "write", "fsync", "rename", "replace", "mkdir", "close"}
    assert "read" in names
    TALLY.count(f"{errno.errorcode[error.errno]} at a file operation of a save", n - 1)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_goes_on_while_the_disk_is_full(tmp_path, monkeypatch, warnings, asynchronous):
    killable.make("sft", tmp_path / "whole", asynchronous).run()
    trainer = killable.make("sft", tmp_path / "full", asynchronous)
    real, full = os.write, {4, 6}  # no byte of these saves can be written

    def write(descriptor, data):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if any(f"step-{step:06d}" in path for step in full):
            raise FULL
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    trainer.run()
    assert [text[: len("checkpoint of step 4")] for text in warnings] == [
        "checkpoint of step 4", "checkpoint of step 6",
    ]  # fmt: skip
    assert all("training goes on: [Errno 28]" in text for text in warnings)
    a, b = (load_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "full"))
    assert a.step == b.step == killable.STEPS
    for name in a.names():
        assert all(torch.equal(x, b.tensors(name)[k]) for k, x in a.tensors(name).items())
    TALLY.count("a full disk during two saves of a run", 1)


@pytest.fixture(scope="module")
def damaged_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    trainer = killable.make("grpo", folder, "true")
    object.__setattr__(trainer.config.checkpoint, "keep_last", 2)
    trainer.run()
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_to_any_file_of_the_newest(damaged_run, name, warnings):
    newest = damaged_run / "checkpoints" / f"step-{killable.STEPS:06d}"
    files = sorted(newest.iterdir())
    assert [p.name for p in files] == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "reference.safetensors",
        "state.json",
    ]  # fmt: skip
    for path in files:
        data = path.read_bytes()
        path.write_bytes(DAMAGES[name](data))
        try:
            trainer = killable.make("grpo", damaged_run, "true")
        finally:
            path.write_bytes(data)
        assert trainer.step == killable.STEPS - killable.EVERY, path.name
        assert "IS DAMAGED" in warnings[0]
        assert "going on from the older checkpoint" in warnings[1]
        warnings.clear()
    TALLY.count(f"{name} in the newest checkpoint", len(files))


class Runs:
    """The process that forks the runs: it has imported everything."""

    def __init__(self):
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, killable.__file__], env=env, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, kind: str, folder: Path, asynchronous: str, point: int = 0, delay: float = 0):
        """(exit code, seconds from the first step on); killed after `delay` of them, if it still runs."""
        self.process.stdin.write(f"{kind} {folder} {asynchronous} {point}\n")
        pid = int(self.process.stdout.readline())
        assert self.process.stdout.readline() == "begun\n"
        began = time.monotonic()
        if delay:
            time.sleep(delay)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it was done
        code = int(self.process.stdout.readline())
        return code, time.monotonic() - began


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.process.stdin.close()
    assert runs.process.wait(20) == 0


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Uninterrupted runs: (folder, seconds, file operations of its saves) by kind and by who writes."""
    found = {}
    for kind in ("sft", "grpo"):
        for asynchronous in ("true", "false"):
            folder = tmp_path_factory.mktemp("whole") / kind
            code, seconds = runs.run(kind, folder, asynchronous)
            assert code == 0
            found[kind, asynchronous] = folder, seconds, int((folder / "operations").read_text())
    return found


def assert_same_run(folder: Path, whole: Path) -> None:
    a, b = (load_checkpoint(run / "checkpoints") for run in (folder, whole))
    assert (a.step, a.state) == (b.step, b.state)
    for name in a.names():
        assert all(torch.equal(x, b.tensors(name)[k]) for k, x in a.tensors(name).items())
    assert (folder / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()
    rows, expected = (without_clock(read_metrics(run)) for run in (folder, whole))
    assert [row["step"] for row in rows] == list(range(1, killable.STEPS + 1))
    for row in rows + expected:
        row.pop("rollout/cache_mib", None)  # the most that the process's engine ever held
    assert rows == expected
    assert leftovers(folder / "checkpoints") == []


def work_lost(folder: Path) -> int:
    """Steps that were done, and are to be done again."""
    saved = load_checkpoint(folder / "checkpoints")
    rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return (rows[-1]["step"] if rows else 0) - (saved.step if saved else 0)


@pytest.mark.parametrize("inside", [False, True], ids=["by_the_clock", "inside_saves"])
def test_kill_9(tmp_path, runs, whole, warnings, inside):
    """A killed run is started again until it is done, and is then to the bit what it would have been."""
    rng, kills, most, attempts = random.Random(7), 0, 0, 0
    for case in range(len(whole)):
        (kind, asynchronous), (expected, seconds, operations) = list(whole.items())[case]
        enough = KILLS * (case + 1) // len(whole)
        while kills < enough:  # a random moment may come after the end
            folder, code = tmp_path / "run", None
            while code != 0:
                attempts += 1
                assert attempts < 10 * KILLS
                kill = kills < enough
                code, _ = runs.run(
                    kind, folder, asynchronous,
                    point=rng.randint(1, operations) if kill and inside else 0,
                    delay=rng.uniform(0, seconds) if kill and not inside else 0,
                )  # fmt: skip
                assert code in (0, -signal.SIGKILL)
                if code:
                    kills += 1
                    lost = work_lost(folder)
                    # since the last checkpoint; beside the training one more may be in flight
                    assert 0 <= lost <= killable.EVERY * (2 if asynchronous == "true" else 1)
                    most = max(most, lost)
            assert_same_run(folder, expected)
            shutil.rmtree(folder)
    assert kills == KILLS
    assert not warnings  # no half-written checkpoint was ever met
    where = "inside a save" if inside else "at a random moment"
    TALLY.count(f"kill -9 {where}, each with a resume", kills, most_steps_lost=most)
