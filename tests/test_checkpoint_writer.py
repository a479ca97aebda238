"""Saves beside the training: what they hold, how long a step waits, what is kept, what failures come to."""

import errno
import json
import os
import threading
import time

import pytest
import torch
from faults import grpo_trainer, sft_trainer, warnings_of_saves
from tiny import tiny_config, without_clock

from r1fast import checkpoint, checkpoint_writer
from r1fast.checkpoint import load_checkpoint
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import CheckpointConfig
from r1fast.metrics import read_metrics

OTHER_SIZE = torch.ones(3)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    return warnings_of_saves(monkeypatch)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Disk work waits until it is set."""
    event, real = threading.Event(), os.fsync

    def fsync(descriptor):
        assert event.wait(20)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield event
    event.set()


def weights(value: float) -> dict:
    return {"model": {"w": torch.full((4, 3), value), "b": torch.arange(3).float() + value}}


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def writer(folder, best: str = "", **config) -> CheckpointWriter:
    return CheckpointWriter(folder, CheckpointConfig(**config), best)


def test_the_state_is_that_of_the_call_and_no_one_waits_for_the_disk(tmp_path, gate):
    tensors, state = weights(1), {"list": [1]}
    with writer(tmp_path) as saves:
        saves.save(1, tensors, state)
        tensors["model"]["w"].fill_(7)  # the next step
        state["list"].append(2)
        assert saves.saw({}).keys() == {"checkpoint/seconds"}
        assert load_checkpoint(tmp_path) is None  # all of it is still to be written
        gate.set()
    found = load_checkpoint(tmp_path)
    assert (found.step, found.state) == (1, {"list": [1]})
    assert torch.equal(found.tensors("model")["w"], torch.ones(4, 3))


def test_buffers_are_used_again_and_follow_the_state(tmp_path):
    with writer(tmp_path) as saves:
        saves.save(1, weights(1), {})
        first = {key: x.data_ptr() for key, x in saves._buffers.items()}
        saves.save(2, weights(2), {})
        assert {key: x.data_ptr() for key, x in saves._buffers.items()} == first
        tied = {"model": weights(3)["model"] | {"w": OTHER_SIZE, "tied": OTHER_SIZE}}
        tied["model"]["b"] = torch.arange(6).float()[::2]
        saves.save(3, tied, {})
    found = load_checkpoint(tmp_path)
    assert found.step == 3
    for name, x in tied["model"].items():
        assert torch.equal(found.tensors("model")[name], x)
    assert not saves._buffers


def test_one_save_is_in_flight(tmp_path, gate, warnings, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "LONG_WAIT", 0.05)
    with writer(tmp_path, keep_last=2) as saves:
        saves.save(1, weights(1), {})
        threading.Timer(0.2, gate.set).start()
        saves.save(2, weights(2), {})
        assert load_checkpoint(tmp_path, up_to=1).step == 1  # the second has waited for it
        assert saves.saved_step == 1
        row = saves.saw({})
        assert row["checkpoint/seconds"] > 0.05
    assert saves.saved_step == 2
    size = sum(p.stat().st_size for p in (tmp_path / "step-000001").iterdir())
    assert row["checkpoint/bytes"] == size
    assert row["checkpoint/write_seconds"] > 0.1
    assert "step 2 waited 0." in warnings[0]
    assert "checkpoint.every_steps" in warnings[0]
    assert load_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_waited_for_save_is_there(tmp_path, asynchronous):
    saves = writer(tmp_path, asynchronous=asynchronous)
    saves.save(1, weights(1), {}, wait=True)
    assert load_checkpoint(tmp_path).step == 1
    assert saves._thread is None


def test_synchronous_saves_use_no_thread_and_no_copy(tmp_path):
    with writer(tmp_path, asynchronous=False) as saves:
        saves.save(1, weights(1), {})
        assert load_checkpoint(tmp_path).step == 1
        assert saves._thread is None
        assert not saves._buffers


def test_without_memory_for_a_copy_the_step_waits(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(checkpoint_writer, "available_memory", lambda device: 100)
    with writer(tmp_path) as saves:
        saves.save(1, weights(1), {})
        assert load_checkpoint(tmp_path).step == 1
        assert not saves._buffers
        saves.save(2, weights(2), {})
    assert load_checkpoint(tmp_path).step == 2
    assert len(warnings) == 1
    assert "while the step waits" in warnings[0]
    assert "more than half of the 0.0 GiB left" in warnings[0]


def test_memory_that_is_refused_costs_the_copy_alone(tmp_path, monkeypatch, warnings):
    def empty(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with writer(tmp_path) as saves:
        monkeypatch.setattr(torch, "empty", empty)
        saves.save(1, weights(1), {})
        assert load_checkpoint(tmp_path).step == 1
    assert "could not be had: DefaultCPUAllocator" in warnings[0]


def test_a_failure_in_the_thread_is_never_silent(tmp_path, monkeypatch, warnings):
    def fail(error):
        def publish(*args, **kwargs):
            raise error

        monkeypatch.setattr(checkpoint_writer, "publish", publish)

    saves = writer(tmp_path)
    fail(OSError(errno.ENOSPC, "No space left on device"))
    saves.save(1, weights(1), {})
    saves._thread.join()
    saves.saw({})
    assert "checkpoint of step 1 could not be written, training goes on" in warnings[0]
    saves.save(2, weights(1), {})
    saves.save(3, weights(1), {})  # tells of the second, too
    assert "checkpoint of step 2 could" in warnings[1]
    saves.close()
    assert "checkpoint of step 3 could" in warnings[2]
    assert saves.saved_step == -1
    fail(ZeroDivisionError("a mistake of ours"))
    saves.save(4, weights(1), {})
    saves._thread.join()
    with pytest.raises(ZeroDivisionError):
        saves.saw({})
    with pytest.raises(ZeroDivisionError), saves:
        saves.save(5, weights(1), {})
    with pytest.raises(KeyError, match="another"), saves:  # which is not hidden behind it
        saves.save(6, weights(1), {})
        raise KeyError("another")
    assert "checkpoint of step 6 could not be written: ZeroDivisionError" in warnings[-1]


def test_weights_that_are_not_finite_end_the_step_that_saves(tmp_path):
    with writer(tmp_path) as saves:
        saves.save(1, weights(1), {})
        with pytest.raises(ValueError, match=r"weights of step 2 are not finite \(w, b\)"):
            saves.save(2, weights(float("nan")), {})
    assert names(tmp_path) == ["latest", "step-000001"]


def test_an_interrupted_wait_gives_the_save_up(tmp_path, monkeypatch):
    """A second Ctrl-C while the last save is written: nothing writes when the process ends."""
    saves = writer(tmp_path)
    saves.save(1, weights(1), {})
    saves.close()
    started, real = threading.Event(), os.write

    def slow(descriptor, data):
        started.set()
        time.sleep(0.05)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    saves.save(2, weights(2), {})
    thread, join = saves._thread, saves._thread.join

    def interrupted():
        monkeypatch.setattr(thread, "join", join)
        assert started.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt), saves:
        pass
    assert not thread.is_alive()
    assert names(tmp_path) == ["latest", "step-000001"]
    assert load_checkpoint(tmp_path).step == 1
    monkeypatch.setattr(os, "write", real)
    with saves:  # in a notebook one may go on
        saves.save(3, weights(3), {})
    assert load_checkpoint(tmp_path).step == 3


def damage_after_write(monkeypatch, file: str, steps: set[int]) -> None:
    """What the disk gives back of `file` is not what was written."""
    real = checkpoint.write_step

    def write_step(folder, step, files, group):
        path = real(folder, step, files, group)
        if step in steps:
            data = bytearray((path / file).read_bytes())
            data[-3] ^= 4
            (path / file).write_bytes(data)
        return path

    monkeypatch.setattr(checkpoint, "write_step", write_step)


def test_what_is_not_read_back_as_written_is_put_aside(tmp_path, monkeypatch, warnings):
    damage_after_write(monkeypatch, "model.safetensors", {2, 3})
    with writer(tmp_path, keep_last=1) as saves:
        for step in (1, 2):
            saves.save(step, weights(step), {})
        saves._thread.join()
        saves.saw({})
        assert "step-000002 IS DAMAGED" in warnings[0]
        assert "model.safetensors has changed" in warnings[0]
        assert names(tmp_path) == ["latest", "step-000001", "step-000002.damaged"]
        assert (tmp_path / "latest").read_text() == "step-000001\n"
        assert load_checkpoint(tmp_path).step == 1
        saves.save(3, weights(3), {})
        saves.save(4, weights(4), {})
    # the last healthy one stayed until there was another; of the damaged ones the last is kept to look at
    assert names(tmp_path) == ["latest", "step-000003.damaged", "step-000004"]
    assert load_checkpoint(tmp_path).step == 4
    assert len(warnings) == 2


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch, warnings):
    saves = writer(tmp_path)
    saves.save(1, weights(1), {}, wait=True)
    with monkeypatch.context() as patch:
        real = os.open

        def unreadable(path, flags, *args):
            if not flags & os.O_WRONLY and str(path).endswith("model.safetensors"):
                raise OSError(errno.EIO, "Input/output error")
            return real(path, flags, *args)

        patch.setattr(os, "open", unreadable)
        saves.save(2, weights(2), {}, wait=True)
    assert "cannot be read: [Errno 5]" in warnings[0]
    assert names(tmp_path) == ["latest", "step-000001", "step-000002.damaged"]


def test_it_is_read_from_the_disk(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *how: told.append(how))
    saves = writer(tmp_path)
    saves.save(1, weights(1), {}, wait=True)
    assert told == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2  # model and state


VALUES = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1}


@pytest.mark.parametrize(
    ("best", "kept", "pointer"),
    [
        ("reward", [4, 5], 4),  # of equal ones the newest
        ("-reward", [5], 5),
        ("", [5], None),
        ("other", [5], None),
    ],
)
def test_the_best_is_kept(tmp_path, best, kept, pointer, warnings):
    for half in (range(1, 4), range(4, 6)):  # two processes: all that is known is on the disk
        with writer(tmp_path, best, keep_last=1) as saves:
            for step in half:
                saves.saw({"reward": VALUES[step] - 0.1})
                saves.saw({"reward": VALUES[step] + 0.1, "loss": 1.0})
                saves.save(step, weights(step), {})
    assert [p for p in names(tmp_path) if "step" in p] == [f"step-{n:06d}" for n in kept]
    assert (tmp_path / "best").exists() == (pointer is not None)
    if pointer:
        assert (tmp_path / "best").read_text() == f"step-{pointer:06d}\n"
        state = json.loads((tmp_path / f"step-{pointer:06d}" / "state.json").read_text())
        assert state["measure"] == {"metric": "reward", "value": pytest.approx(VALUES[pointer])}
    assert load_checkpoint(tmp_path).step == 5
    assert bool(warnings) == (best == "other")
    if warnings:
        assert "no step has had the metric 'other' so far" in warnings[0]


def test_best_and_newest_are_counted_apart(tmp_path):
    with writer(tmp_path, "reward", keep_last=2) as saves:
        for step, value in enumerate((5.0, 9.0, 1.0, 2.0, 3.0, float("nan")), 1):
            saves.saw({"reward": value})
            saves.save(step, weights(step), {})
    kept = ["best", "latest", "step-000002", "step-000005", "step-000006"]
    assert names(tmp_path) == kept
    with writer(tmp_path, keep_last=1) as saves:  # and when it is not wanted any more
        saves.save(7, weights(7), {})
    assert names(tmp_path) == ["latest", "step-000007"]


def test_a_best_one_that_was_damaged_since_is_passed_over(tmp_path, warnings):
    with writer(tmp_path, "reward", keep_last=3) as saves:
        for step in (1, 2):
            saves.saw({"reward": 9.0 / step})
            saves.save(step, weights(step), {})
        saves.close()
        (tmp_path / "step-000001" / "state.json").write_bytes(b"\0" * 9)
        saves.saw({"reward": 1.0})
        saves.save(3, weights(3), {})
    assert (tmp_path / "best").read_text() == "step-000002\n"


def test_the_stages_have_measures_of_their_own(tmp_path):
    assert sft_trainer(tmp_path / "a").checkpoints.keep_best == "-loss"
    assert grpo_trainer(tmp_path / "b").checkpoints.keep_best == "reward"
    evaluating = grpo_trainer(
        tmp_path / "c", "--eval.every_steps=1", evaluate=lambda: {"pass@1": 0.5}
    )
    assert evaluating.checkpoints.keep_best == "eval/pass@1"
    asked = grpo_trainer(tmp_path / "d", "--checkpoint.keep_best=entropy")
    assert asked.checkpoints.keep_best == "entropy"
    with pytest.raises(ValueError, match=r"checkpoint\.keep_best must be -loss, as less"):
        tiny_config("--checkpoint.keep_best=loss")


@pytest.mark.parametrize("make", [sft_trainer, grpo_trainer])
def test_a_run_has_the_same_bits_either_way(tmp_path, make):
    every = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=9")
    for name in ("true", "false"):
        make(tmp_path / name, *every, f"--checkpoint.asynchronous={name}").run()
    both = [tmp_path / name for name in ("true", "false")]
    for step in range(1, 5):
        a, b = (load_checkpoint(run / "checkpoints", up_to=step) for run in both)
        assert a.step == b.step == step
        assert a.state == b.state
        assert a.state["measure"]["metric"] == ("loss" if make is sft_trainer else "reward")
        for name in a.names():
            assert all(torch.equal(x, b.tensors(name)[k]) for k, x in a.tensors(name).items())
    rows = [read_metrics(run) for run in both]
    assert without_clock(rows[0]) == without_clock(rows[1])
    timed = {"checkpoint/seconds", "checkpoint/write_seconds", "checkpoint/bytes"}
    assert timed <= rows[1][1].keys()
    assert not timed & rows[1][0].keys()


def test_changes_wait_for_the_copy(tmp_path, monkeypatch):
    """On a GPU the copy is still under way when the next step begins; this is where it must be over."""
    trainer = grpo_trainer(tmp_path, "--grpo.ref_refresh_steps=1", "--grpo.num_steps=2")
    seen = []
    monkeypatch.setattr(trainer.checkpoints, "before_change", lambda: seen.append("wait"))
    for owner, name in ((trainer.optimizer, "step"), (trainer.reference, "refresh")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, r=real, n=name: (seen.append(n), r(*a))[1])
    trainer.run()
    assert seen == ["wait", "step", "wait", "refresh"] * 2
