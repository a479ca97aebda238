"""What people and systems put where checkpoints are: links, pipes, files where folders belong, pointers to nowhere."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from faults import warnings_of_saves

from r1fast.checkpoint import load_checkpoint, save_checkpoint
from r1fast.checkpoint_writer import CheckpointWriter
from r1fast.config import CheckpointConfig

FILES = ["manifest.json", "state.json", "model.safetensors"]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    return warnings_of_saves(monkeypatch)


@pytest.fixture
def outside(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("outside")


@pytest.fixture(autouse=True)
def in_time():
    """A pipe that is read would be waited for without end."""

    def late(*args):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def save(folder: Path, *steps: int, keep_last: int = 1) -> None:
    with CheckpointWriter(folder, CheckpointConfig(keep_last=keep_last), "-loss") as saves:
        for step in steps:
            saves.saw({"loss": 1.0 + step % 2})
            saves.save(step, {"model": {"w": torch.full((4, 3), float(step))}}, {})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["latest", "best"])
@pytest.mark.parametrize("to", ["outside", "nowhere"])
def test_a_pointer_that_is_a_link_is_replaced_and_not_followed(tmp_path, outside, warnings, name, to):  # fmt: skip
    save(tmp_path, 1)
    (outside / "file").write_text("theirs")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(outside / ("file" if to == "outside" else "absent"))
    save(tmp_path, 2)
    assert (tmp_path / name).read_text() == "step-000002\n"
    assert not (tmp_path / name).is_symlink()
    assert (outside / "file").read_text() == "theirs"
    assert names(outside) == ["file"]
    assert not warnings


@pytest.mark.parametrize("text", [b"\xff\xfe", b"../../etc", b"", b"x" * 100_000])
def test_pointers_are_for_people_alone(tmp_path, warnings, text):
    """Whatever stands in them: the newest whole one is taken, and the next save writes them again."""
    save(tmp_path, 1)
    for name in ("latest", "best"):
        (tmp_path / name).write_bytes(text)
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step-000002\n"
    assert not warnings


def test_a_step_that_is_a_link_is_read_and_what_it_names_is_kept(tmp_path, outside, warnings):
    save(tmp_path, 1)
    (tmp_path / "step-000001").rename(outside / "kept")
    (tmp_path / "step-000001").symlink_to(outside / "kept")
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["best", "latest", "step-000002"]
    assert names(outside / "kept") == sorted(FILES)
    assert not warnings


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a link to a damaged one", "an empty folder", "a file as .old"])  # fmt: skip
def test_what_stands_in_the_way_of_a_save_goes(tmp_path, outside, warnings, what):
    save(tmp_path, 1)
    way = tmp_path / "step-000002"
    match what:
        case "a file":
            way.write_text("x")
        case "a link to nowhere":
            way.symlink_to(outside / "absent")
        case "a link to a damaged one":
            (outside / "manifest.json").write_text("{")
            way.symlink_to(outside)
        case "an empty folder":
            way.mkdir()
        case "a file as .old":
            save(tmp_path, 2)
            way.with_name("step-000002.old").write_text("x")
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path).step == 2
    assert names(tmp_path) == ["best", "latest", "step-000002"]
    assert names(outside) == ["manifest.json"] * (what == "a link to a damaged one")
    assert not warnings


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder", "64 GiB"])
def test_what_is_no_file_is_damage(tmp_path, warnings, file, what):
    save(tmp_path, 1, 2, keep_last=2)
    path = tmp_path / "step-000002" / file
    if what == "64 GiB":  # of nothing, so that reading it fails where it is tried
        os.truncate(path, 1 << 36)
    else:
        if file != "manifest.json":  # a size that fits what is there
            manifest = path.with_name("manifest.json")
            described = json.loads(manifest.read_text())
            described["files"][file]["size"] = path.parent.stat().st_size if what == "a folder" else 0  # fmt: skip
            manifest.write_text(json.dumps(described))
        path.unlink()
        if what == "a pipe":
            os.mkfifo(path)
        elif what == "a device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
    assert load_checkpoint(tmp_path).step == 1
    assert "step-000002 IS DAMAGED" in warnings[0]


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a circle"])
def test_checkpoints_that_are_no_folder_are_refused_before_training(tmp_path, what):
    path = tmp_path / "checkpoints"
    if what == "a file":
        path.write_text("")
    else:
        path.symlink_to("nowhere" if what == "a link to nowhere" else "checkpoints")
    with pytest.raises(ValueError, match="is to hold checkpoints and is no folder"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["step-" + "9" * 200, "step-\u0663", "step-", "step--1", "Step-000009", "step-9.bak"])  # fmt: skip
def test_folders_of_other_names_are_no_checkpoints(tmp_path, warnings, name):
    save_checkpoint(tmp_path, 1, {}, {})
    (tmp_path / name).mkdir()
    assert load_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, 2, {}, {})
    assert names(tmp_path) == sorted(["latest", "step-000002", name])
    assert not warnings
