"""What a kill leaves of a file or folder that was being written goes with the next write."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import no_room

from r1fast.checkpoint import save_checkpoint
from r1fast.evaluate.row_log import RowLog
from r1fast.hf_folder import write_folder, write_json
from r1fast.jsonl import append_jsonl, read_jsonl, write_jsonl
from r1fast.metrics import MetricsWriter
from r1fast.partial import partial_of
from r1fast.report import write_report

KILLED = """
import os, signal, sys
from pathlib import Path
from r1fast.hf_folder import write_folder, write_json
from r1fast.jsonl import write_jsonl

def rows():
    yield {"a": 1}
    die()

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(folder):
    (folder / "config.json").write_text("{}")
    die()

os.replace = die
what, path = sys.argv[1], Path(sys.argv[2])
{"json": lambda: write_json(path, {}), "jsonl": lambda: write_jsonl(path, rows()),
 "folder": lambda: write_folder(path, half)}[what]()
"""


def whole(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


WRITE = {
    "json": lambda path: write_json(path, {"a": 2}),
    "jsonl": lambda path: write_jsonl(path, [{"a": 2}]),
    "folder": lambda path: write_folder(path, whole),
}


@pytest.mark.parametrize("what", WRITE)
def test_what_a_kill_has_left_goes(tmp_path, what):
    path = tmp_path / "made"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, what, path], env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".made.")
    WRITE[what](path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_others_are_writing_stays(tmp_path):
    """Of a process that runs (this one's parent), and of another name."""
    running = tmp_path / f".made.{os.getppid()}.part"
    other = tmp_path / f".made.json.{os.getpid()}.part"
    for path in (running, other):
        path.touch()
    own = partial_of(tmp_path / "made")
    assert own.name == f".made.{os.getpid()}.part"
    assert sorted(tmp_path.iterdir()) == sorted([running, other])
    own.mkdir()
    assert not partial_of(tmp_path / "made").exists()


def test_rows_are_appended_whole_or_not_at_all(tmp_path):
    """A line that a full disk has torn would make the file unreadable once another follows."""
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}])
    code = (
        "import resource, sys\n"
        "from r1fast.jsonl import append_jsonl\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))\n"
        "append_jsonl(sys.argv[1], [{'a': 2}, {'a': 'x' * 100}])\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert "OSError: [Errno 27]" in done.stderr
    append_jsonl(path, [{"a": 3}])
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}, {"a": 3}]


def append_to_log(path: Path) -> None:
    log = RowLog(path.parent, path.name, "x")
    log.append({"problem_id": "p", "sample": 0})


def resume(path: Path) -> None:
    MetricsWriter(path.parent, resume_step=1)


FULL = {  # who writes -> what is told of
    "json": (WRITE["json"], ".made."),
    "jsonl": (WRITE["jsonl"], ".made."),
    "folder": (WRITE["folder"], "made"),
    "append": (lambda path: append_jsonl(path, [{"a": 1}]), "made"),
    "log": (append_to_log, "made.partial-0.jsonl"),
    "checkpoint": (lambda path: save_checkpoint(path, 1, {}, {"a": 1}), "made/.saving-step-000001/state.json"),
    "metrics": (resume, "metrics.jsonl.part"),
    "report": (lambda path: write_report(path.parent), "report.html.part"),
}  # fmt: skip


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_told_with_the_file(tmp_path, what):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write, name = FULL[what]
    with pytest.raises(OSError, match=r"\[Errno 27\] File too large: '") as caught, no_room():
        write(tmp_path / "made")
    assert f"{tmp_path}/{name}" in str(caught.value)
