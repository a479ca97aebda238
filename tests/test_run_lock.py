"""A second run in an output folder is refused, waits for one that is leaving, and finds it free after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import no_room

from r1fast.__main__ import main
from r1fast.checkpoint import write_step
from r1fast.checkpoint_layout import checkpoint_files
from r1fast.config import load_config
from r1fast.pipeline import Pipeline
from r1fast.run_lock import only_run

HOLDS = "import sys, time; from r1fast.run_lock import only_run\nwith only_run(sys.argv[1]): print('held', flush=True); time.sleep(float(sys.argv[2]))"


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the folder for some seconds."""
    started = []

    def hold(seconds: float, folder: Path = tmp_path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_one_that_stays_is_named(hold, tmp_path):
    process = hold(60)
    with (
        pytest.raises(ValueError, match=f"in use by another run, process {process.pid} on "),
        only_run(tmp_path, patience=0.3),
    ):
        pytest.fail("two runs in one folder")


def test_one_that_leaves_is_waited_for(hold, tmp_path, capsys):
    process = hold(1.5)
    with only_run(tmp_path, patience=30):
        assert process.poll() is not None or process.wait(5) == 0
    assert f"waiting up to 30 s for process {process.pid}" in capsys.readouterr().err


def test_a_kill_frees_it_though_its_children_live(tmp_path):
    """They hold the file open, as workers of a grader do."""
    code = "import os, time\nfrom r1fast.run_lock import only_run\nwith only_run(os.sys.argv[1]):\n    pid = os.fork()\n    if pid: print(pid, flush=True)\n    time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        began = time.monotonic()
        with only_run(tmp_path, patience=20):
            assert time.monotonic() - began < 5
            os.kill(child, 0)  # it is there
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_the_command_is_refused(hold, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(only_run.__wrapped__, "__kwdefaults__", {"patience": 0.2})
    hold(60)
    (tmp_path / "c.toml").touch()
    assert (
        main(["grpo", str(tmp_path / "c.toml"), f"--output_dir={tmp_path}", "--model.path=x/y"])
        == 2
    )
    assert "in use by another run" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_full_disk_ends_no_run(tmp_path):
    with no_room(), only_run(tmp_path):
        pass
    assert (tmp_path / ".lock").read_bytes() == b""


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match=r"output_dir = .* cannot be a folder"), only_run(path):
            pytest.fail("no folder")


def test_a_folder_among_checkpoints_is_refused(tmp_path):
    """A run removes its older checkpoints, and what lies in them."""
    run = tmp_path / "step-3"  # a name that anybody's folder may have
    step = run / "checkpoints" / "step-000004"
    files = checkpoint_files({"model": {"a": torch.ones(2)}}, {})
    write_step(run / "checkpoints", 4, files)
    for path in (step, step / "mine", run / "checkpoints", run / "checkpoints" / "mine"):
        with pytest.raises(ValueError, match="would lie among the checkpoints in"), only_run(path):
            pytest.fail("it was taken")
    assert not (run / "checkpoints" / "mine").exists()
    with only_run(run), only_run(run / "mine"):
        pass


def test_an_evaluation_is_refused_too(hold, tmp_path, monkeypatch, capsys):
    """It would write between the lines of the other one's samples."""
    monkeypatch.setattr(only_run.__wrapped__, "__kwdefaults__", {"patience": 0.2})
    hold(60)
    words = ["evaluate", "some/model", "--data.task=running_sum", f"--output_dir={tmp_path}"]
    assert main(words) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_stage_of_a_pipeline_is_refused_where_another_run_is_in_its_folder(
    hold, tmp_path, monkeypatch
):
    """As `r1fast grpo --output_dir=run/base` is, beside `r1fast pipeline --output_dir=run`."""
    monkeypatch.setattr(only_run.__wrapped__, "__kwdefaults__", {"patience": 0.2})
    hold(60, tmp_path / "base")
    demo = Path(__file__).parent.parent / "configs" / "demo.toml"
    with pytest.raises(ValueError, match=r"base is in use by another run"):
        Pipeline(load_config(demo, [f"--output_dir={tmp_path}", "--model.device=cpu"])).run()
