"""Checkpoints: bit-equal, crash-safe at every step of a save, and damage is found."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors import safe_open

from r1fast import checkpoint, checkpoint_check
from r1fast.checkpoint import load_checkpoint, read_step, save_checkpoint
from r1fast.config_diff import same_config


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", texts.append)
    return texts


def make(step: int) -> tuple[dict, dict]:
    g = torch.Generator().manual_seed(step)
    model = {
        "w": torch.randn(7, 5, generator=g),
        "half": torch.randn(3, 3, generator=g).bfloat16(),
        "odd": torch.randn(5, generator=g).half(),
    }
    optimizer = {
        "step": torch.tensor(float(step)),
        "count": torch.arange(9).view(3, 3),
        "mask": torch.tensor([True, False, True]),
        "rng": torch.randint(0, 255, (11,), generator=g, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(3, generator=g, dtype=torch.float64),
        "inf": torch.tensor([float("inf")]),
    }
    state = {"seed": step, "lr": 0.1 + step / 3, "cursor": {"epoch": 1, "index": [1, 2]}, "u": "é"}
    return {"model": model, "optimizer": optimizer}, state


def save(folder, step, **kwargs):
    tensors, state = make(step)
    return save_checkpoint(folder, step, tensors, state, **kwargs)


def assert_holds(found, step):
    tensors, state = make(step)
    assert found is not None
    assert found.step == step
    assert found.state == state
    assert found.names() == sorted(tensors)
    for name, named in tensors.items():
        loaded = found.tensors(name)
        assert loaded.keys() == named.keys()
        for key, x in named.items():
            y = loaded[key]
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert torch.equal(
                x.reshape(-1).view(torch.uint8) if x.numel() else x,
                y.reshape(-1).view(torch.uint8) if y.numel() else y,
            ), (name, key)


def leftovers(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_round_trip_is_bit_equal(tmp_path):
    path = save(tmp_path / "deep" / "run", 123)
    assert path == tmp_path / "deep/run/step-000123"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert (path.parent / "latest").read_text() == "step-000123\n"
    assert_holds(load_checkpoint(path.parent), 123)
    assert os.stat(path).st_mode & 0o777 == os.stat(path.parent).st_mode & 0o777
    with pytest.raises(ValueError, match="holds no 'reference'; it holds model, optimizer"):
        load_checkpoint(path.parent).tensors("reference")


def test_files_are_what_safetensors_reads(tmp_path):
    path = save(tmp_path, 1)
    with safe_open(path / "optimizer.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert torch.equal(file.get_tensor("optimizer.count"), torch.arange(9).view(3, 3))
    data = (path / "optimizer.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    assert header_size % 8 == 0
    header = json.loads(data[8 : 8 + header_size])
    for name, x in make(1)[0]["optimizer"].items():
        assert header[f"optimizer.{name}"]["data_offsets"][0] % x.element_size() == 0, name


def test_tied_tensors_views_and_parameters(tmp_path):
    weight = torch.nn.Parameter(torch.randn(6, 4))
    model = {"embed": weight, "head": weight, "row": weight[2], "transposed": weight.t()}
    save_checkpoint(tmp_path, 1, {"model": model}, {})
    loaded = load_checkpoint(tmp_path).tensors("model")
    for name, x in model.items():
        assert torch.equal(loaded[name], x), name
        assert not loaded[name].requires_grad
    loaded["embed"].zero_()
    assert torch.equal(loaded["head"], weight)


def test_an_empty_or_absent_folder_has_none(tmp_path, warnings):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step-000001").write_text("a file, not a folder")
    (tmp_path / "step-x").mkdir()
    assert load_checkpoint(tmp_path) is None
    assert not warnings


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def zero_fill(path):
    data = path.read_bytes()
    path.write_bytes(data[:-16] + bytes(16))


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_fill, lambda p: p.unlink()])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, warnings, file, damage):
    save(tmp_path, 1, keep_last=2)
    damage(save(tmp_path, 2, keep_last=2) / file)
    assert_holds(load_checkpoint(tmp_path), 1)
    assert "step-000002 IS DAMAGED" in warnings[0]
    assert file in warnings[0]
    assert "step-000001" in warnings[1]


def test_every_byte_of_the_manifest_counts(tmp_path, warnings):
    save(tmp_path, 1, keep_last=2)
    manifest = save(tmp_path, 2, keep_last=2) / "manifest.json"
    good = manifest.read_bytes()
    content = json.loads(good)
    for i in range(len(good)):
        manifest.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        found = load_checkpoint(tmp_path)
        # a flip between two kinds of white space changes nothing
        try:
            harmless = json.loads(manifest.read_bytes()) == content
        except ValueError:
            harmless = False
        assert found.step == (2 if harmless else 1), (i, good[i - 8 : i + 8])


def test_extra_files_are_damage(tmp_path, warnings):
    save(tmp_path, 1, keep_last=2)
    path = save(tmp_path, 2, keep_last=2)
    (path / "extra.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    assert_holds(load_checkpoint(tmp_path), 1)


def all_files(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_step_under_another_name_is_left_alone_and_named(tmp_path, warnings, how):
    """It is whole: to take the one before it, and to remove it at the next save, would lose work."""
    save(tmp_path, 1, keep_last=2)
    path, other = save(tmp_path, 2, keep_last=2), tmp_path / "step-000007"
    if how == "renamed":
        path.rename(other)
    else:
        shutil.copytree(path, other)
    before = all_files(tmp_path)
    told = r"step-000007 holds the checkpoint of step 2, .* call it step-000002 again, or move it"
    for load in (load_checkpoint, lambda folder: read_step(folder, 7)):
        with pytest.raises(checkpoint_check.ForeignError, match=told):
            load(tmp_path)
    assert all_files(tmp_path) == before
    assert not warnings
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["name"]  # as it was written once
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint_check.ForeignError, match=told):
        load_checkpoint(tmp_path)
    flip_bit(other / "model.safetensors")  # then it is damaged all the same
    assert load_checkpoint(tmp_path).step == (2 if how == "copied" else 1)


def test_one_of_a_newer_program_is_left_alone_and_named(tmp_path, warnings):
    save(tmp_path, 1, keep_last=2)
    path = save(tmp_path, 2, keep_last=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"version": 7, "parts": ["another layout"]}))
    before = all_files(tmp_path)
    told = (
        r"step-000002 was written by a newer r1fast \(layout 7; this one reads up to 4\): install"
    )
    for load in (load_checkpoint, lambda folder: read_step(folder, 2)):
        with pytest.raises(ValueError, match=told):
            load(tmp_path)
    assert all_files(tmp_path) == before
    assert not warnings
    for odd in (3, 5, 6, 0, -1, "5", None, 5.0):  # no version of any program
        (path / "manifest.json").write_text(json.dumps(manifest | {"version": odd}))
        assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_system_lacks_says_nothing_of_a_checkpoint(tmp_path, monkeypatch, number):
    """Else a run would go on from an older one, and remove the newest."""
    for step in (1, 2):
        save(tmp_path, step, keep_last=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *args: (_ for _ in ()).throw(OSError(number, "lacking")))
        with pytest.raises(OSError, match="lacking"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path).step == 2


def test_where_all_are_damaged_the_run_does_not_start_again_unasked(tmp_path, warnings):
    truncate(save(tmp_path, 4) / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-000004: model.safetensors has \d+ bytes"):
        load_checkpoint(tmp_path)


class Crash(BaseException):
    pass


def crash_at(monkeypatch, function: str, call: int, error):
    """Let the `call`-th call of os.<function> raise (or call) `error`; returns the calls."""
    calls, real = [], getattr(os, function)

    def maybe(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            if callable(error):
                error()
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, maybe)
    return calls


# fsync: model, optimizer, state, manifest, temp folder, parent, pointer, parent
POINTS = [("fsync", i) for i in range(1, 9)] + [("rename", 1), ("replace", 1)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Crash()])
@pytest.mark.parametrize(("function", "call"), POINTS)
def test_a_failure_at_any_step_keeps_a_whole_checkpoint(
    tmp_path, monkeypatch, warnings, function, call, error
):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        calls = crash_at(patch, function, call, error)
        with pytest.raises(type(error)):
            save(tmp_path, 2)
        assert len(calls) == call
    published = function == "replace" or (function == "fsync" and call > 5)
    assert_holds(load_checkpoint(tmp_path), 2 if published else 1)
    assert (tmp_path / "step-000001").is_dir()
    assert leftovers(tmp_path) == []
    assert not warnings
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000003"]


def test_points_are_all_there_are(tmp_path, monkeypatch):
    counts = {name: crash_at(monkeypatch, name, 0, Crash()) for name in ("fsync", "rename")}
    save(tmp_path, 1)
    assert len(counts["fsync"]) == 8
    assert len(counts["rename"]) == 1


def test_the_order_of_the_steps(tmp_path, monkeypatch):
    save(tmp_path, 1)
    seen = []

    def log(name, describe):
        real = getattr(os, name)

        def call(*args):
            seen.append(describe(*args))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    def synced(descriptor):
        return f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}"

    log("fsync", synced)
    log("rename", lambda a, b: "rename")
    log("replace", lambda a, b: "replace")
    real_remove = checkpoint._remove
    monkeypatch.setattr(
        checkpoint, "_remove", lambda p: (seen.append(f"remove {p.name}"), real_remove(p))
    )
    save(tmp_path, 2)
    assert seen == [
        *(f"fsync {file}" for file in FILES),
        "fsync .saving-step-000002",
        "rename",
        f"fsync {tmp_path.name}",
        "fsync .saving-latest",
        "replace",
        f"fsync {tmp_path.name}",
        "rename",  # of what goes: nothing that is half there looks like a checkpoint
        "remove .saving-step-000001.gone",
    ]


@pytest.mark.parametrize("point", [("fsync", 2), ("rename", 1), ("replace", 1)])
def test_kill_9_inside_a_save(tmp_path, monkeypatch, point, warnings):
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        try:
            crash_at(monkeypatch, *point, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert leftovers(tmp_path)
    assert load_checkpoint(tmp_path).step == (2 if point[0] == "replace" else 1)
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000003"]
    assert_holds(load_checkpoint(tmp_path), 3)
    assert not warnings


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real_open = os.open

    def full(path, flags, *args, **kwargs):
        full_disk = flags & os.O_WRONLY and os.path.basename(path) == "optimizer.safetensors"
        return real_open("/dev/full" if full_disk else path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert leftovers(tmp_path) == []
    assert_holds(load_checkpoint(tmp_path), 1)


def steps(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def test_what_others_leave_in_a_checkpoint_is_not_its_own(tmp_path):
    path = save(tmp_path, 3)
    (path / ".DS_Store").write_bytes(b"x")
    (path / "notes.txt").write_text("the good one")
    (path / "exported").mkdir()
    assert load_checkpoint(tmp_path).step == 3
    (path / "model-extra.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"its files are not those of manifest.json: model-extra.safetensors"
    ):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES])
def test_a_read_that_fails_for_now_says_nothing_of_the_checkpoint(tmp_path, monkeypatch, code):
    """It is not put aside, and no older one is taken for it."""
    save(tmp_path, 1, keep_last=2)
    save(tmp_path, 2, keep_last=2)

    def fail(*args, **kwargs):
        raise OSError(code, "not now")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_check, "_sha256", fail)
        with pytest.raises(OSError, match="not now"):
            load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_rotation_keeps_the_newest(tmp_path, keep_last):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep_last=keep_last)
    assert (
        steps(tmp_path) == ["step-000001", "step-000002", "step-000010", "step-000011"][-keep_last:]
    )
    assert (tmp_path / "latest").read_text() == "step-000011\n"
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        save(tmp_path, 12, keep_last=0)


def test_more_than_six_digits_sort_as_numbers(tmp_path):
    save(tmp_path, 999_999, keep_last=2)
    save(tmp_path, 1_000_000, keep_last=2)
    assert load_checkpoint(tmp_path).step == 1_000_000


def test_going_on_from_an_older_one_drops_the_damaged_newer_one(tmp_path, warnings):
    save(tmp_path, 4, keep_last=2)
    flip_bit(save(tmp_path, 9, keep_last=2) / "model.safetensors")
    assert load_checkpoint(tmp_path).step == 4
    save(tmp_path, 5, keep_last=2)
    assert steps(tmp_path) == ["step-000004", "step-000005"]
    assert "ahead of this run" in warnings[-1]


def test_the_same_step_twice(tmp_path, monkeypatch, warnings):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {"second": True})
    assert load_checkpoint(tmp_path).state == {"second": True}
    assert steps(tmp_path) == ["step-000001"]
    for call in (1, 2):  # moving the first aside, and moving the second in
        with monkeypatch.context() as patch:
            crash_at(patch, "rename", call, Crash())
            with pytest.raises(Crash):
                save(tmp_path, 1)
        assert load_checkpoint(tmp_path).state == {"second": True}
    save(tmp_path, 1)
    assert_holds(load_checkpoint(tmp_path), 1)
    assert steps(tmp_path) == ["step-000001"]
    # a damaged one of the same step does not push out the healthy one beside it
    with monkeypatch.context() as patch:
        crash_at(patch, "replace", 1, Crash())
        with pytest.raises(Crash):
            save_checkpoint(tmp_path, 1, {}, {"third": True})
    assert load_checkpoint(tmp_path).state == {"third": True}
    assert steps(tmp_path) == ["step-000001", "step-000001.old"]
    flip_bit(tmp_path / "step-000001/state.json")
    with monkeypatch.context() as patch:
        crash_at(patch, "rename", 1, Crash())
        with pytest.raises(Crash):
            save(tmp_path, 1)
    assert load_checkpoint(tmp_path).path.name == "step-000001.old"
    assert_holds(load_checkpoint(tmp_path), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    save(tmp_path, 1)
    tensors, state = make(2)
    name = {"nan": "half", "inf": "odd", "-inf": "w"}[str(value)]
    tensors["model"][name].view(-1)[1] = value
    with pytest.raises(ValueError, match=rf"weights of step 2 are not finite \({name}\)"):
        save_checkpoint(tmp_path, 2, tensors, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]
    assert_holds(load_checkpoint(tmp_path), 1)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        save_checkpoint(tmp_path, 1, {}, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"letters, digits and _, got '../model'"):
        save_checkpoint(tmp_path, 1, {"../model": {}}, {})
    with pytest.raises(ValueError, match=r"'a.z' has dtype torch\.complex64"):
        save_checkpoint(tmp_path, 1, {"a": {"z": torch.ones(1, dtype=torch.complex64)}}, {})
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        save_checkpoint(tmp_path, -1, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_same_config_names_what_changed():
    saved = {"seed": 1, "grpo": {"kl_coef": 0.001, "loss_type": "grpo"}, "old": 2, "stages": {}}
    current = {"seed": 1, "grpo": {"kl_coef": 0.0, "loss_type": "dapo"}, "stages": {"a": {"b": 1}}}
    assert same_config(saved, current) == [
        "grpo.kl_coef: 0.001 -> 0.0",
        "grpo.loss_type: 'grpo' -> 'dapo'",
        "old: 2 -> (not set)",
        "stages: {} -> (not set)",
        "stages.a.b: (not set) -> 1",
    ]
    assert same_config(saved, saved) == []


def test_same_config_survives_json():
    from r1fast.config import Config, to_dict

    config = to_dict(Config())
    assert same_config(json.loads(json.dumps(config)), config) == []
    assert same_config({"words": ["a", "b"], "n": 1}, {"words": ("a", "b"), "n": 1.0}) == []
