"""A process that is asked by lines of JSON: late, dead, long-winded, and gone with its owner."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1fast.worker_process import Ended, Late, WorkerProcess

ECHO = """
import json, sys, time
for line in sys.stdin.buffer:
    request = json.loads(line)
    if "sleep" in request: time.sleep(request["sleep"])
    if "exit" in request: sys.exit(request["exit"])
    for _ in range(request.get("times", 1)):
        print(request.get("raw") or json.dumps({"is": request["say"] * request.get("long", 1)}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "types.py").write_text("raise ImportError('the folder of a script is on sys.path')")
    (tmp_path / "echo.py").write_text(ECHO)
    worker = WorkerProcess(tmp_path / "echo.py")
    yield worker
    worker.kill()
    worker.kill()
    assert not worker.is_running()


def soon(seconds: float = 30) -> float:
    return time.monotonic() + seconds


def test_lines_come_one_by_one_and_may_be_long(worker):
    worker.send({"say": "a", "times": 3}, soon())
    assert [worker.read(soon()) for _ in range(3)] == [{"is": "a"}] * 3
    worker.send({"say": "é\n" * 300_000, "long": 10}, soon())
    began = time.monotonic()
    assert worker.read(soon()) == {"is": "é\n" * 3_000_000}
    assert time.monotonic() - began < 20


def test_nobody_waits_beyond_a_deadline(worker):
    worker.send({"say": 1, "sleep": 60}, soon())
    began = time.monotonic()
    with pytest.raises(Late):
        worker.read(soon(0.2))
    with pytest.raises(Late):  # it reads nothing, and its pipe is full
        worker.send({"say": "x" * 1_000_000}, soon(0.2))
    assert time.monotonic() - began < 10


def test_one_that_has_ended_says_how(worker):
    worker.send({"exit": 7}, soon())
    with pytest.raises(Ended, match="worker ended with status 7") as caught:
        worker.read(soon())
    assert caught.value.status == 7
    worker.send({"say": 1}, soon())
    with pytest.raises(Ended):
        worker.read(soon())
    assert not worker.is_running()


@pytest.mark.parametrize("raw", ["no JSON", "[1]", "null"])
def test_what_is_no_reply(worker, raw):
    worker.send({"raw": raw}, soon())
    with pytest.raises(ValueError, match=r"not a reply|Expecting"):
        worker.read(soon())


def test_it_goes_with_its_owner(tmp_path):
    (tmp_path / "sleep.py").write_text("import sys; sys.stdin.read()")
    code = (
        "import sys; from pathlib import Path; from r1fast.worker_process import WorkerProcess\n"
        "w = WorkerProcess(Path(sys.argv[1])); print(w.process.pid)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "sleep.py"],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
