"""torchrun's elastic agent and a run that loses a rank, or a whole node: it comes back and ends as if nothing had been."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import CONFIG, tiny_checkpoint, tiny_problems

from r1fast.jsonl import read_jsonl, write_jsonl

STEPS, SEEN = 16, 4  # steps of a run, and after how many of them something happens
OVERRIDES = [
    *CONFIG, f"--grpo.num_steps={STEPS}", "--grpo.ref_refresh_steps=4", "--grpo.num_mini_batches=2",
    "--rewards.overlong=1", "--rewards.overlong_cache=6",  # what a random model can learn
    "--optim.lr=0.01", "--checkpoint.every_steps=1", "--model.activation_checkpointing=none",
]  # fmt: skip
UNEQUAL = (
    "time",
    "tokens_per_second",
    "checkpoint/",
    "memory",
    "cache_mib",
)  # clocks, and what a process has held


def vars_of(problem) -> dict[str, str]:
    return {"id": problem.id, "prompt": problem.prompt, "answer": problem.answer}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def agent(out: Path, *words: str, **variables: str):
    """torchrun of a run into `out`, in a session of its own; nothing of it is left behind."""
    out.mkdir(exist_ok=True)
    if not (out / "base").exists():
        tiny_checkpoint(out / "base")
        write_jsonl(out / "p.jsonl", [vars_of(p) for p in tiny_problems()])
        (out / "c.toml").touch()
    command = [
        sys.executable, "-m", "torch.distributed.run", *words, "-m", "r1fast", "grpo", str(out / "c.toml"),
        f"--model.path={out / 'base'}", f"--data.train={out / 'p.jsonl'}", f"--output_dir={out / 'run'}",
        *OVERRIDES,
    ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **variables,
    }  # fmt: skip
    with open(out / f"agent-{len(list(out.glob('agent-*')))}.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """An agent and its workers, which are in groups of their own."""
    workers = workers_of(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def workers_of(agent_pid: int) -> dict[int, int]:
    """pid -> rank of what runs r1fast under this agent."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) != agent_pid:
                continue
            pairs = dict(
                x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x
            )
            if "RANK" in pairs:
                found[int(folder.name)] = int(pairs["RANK"])
    return found


def steps_of(out: Path) -> list[int]:
    path = out / "run" / "metrics.jsonl"
    with contextlib.suppress(ValueError):  # a line that is being written
        return [row["step"] for _, row in read_jsonl(path)] if path.exists() else []
    return []


def wait_for_step(out: Path, step: int, *agents: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while max(steps_of(out), default=0) < step:
        assert time.monotonic() < end, logs(out)
        assert all(a.poll() is None for a in agents), logs(out)
        time.sleep(0.02)


def logs(out: Path) -> str:
    return "\n".join(p.read_text()[-3000:] for p in sorted(out.glob("agent-*.log")))


def finish(out: Path, *agents: subprocess.Popen) -> None:
    for process in agents:
        try:
            assert process.wait(240) == 0, logs(out)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the run does not end:\n{logs(out)}")


def outcome(out: Path) -> tuple[list[dict], dict]:
    """The metrics without what depends on the clock, and the final weights."""
    rows = [
        {k: v for k, v in row.items() if not any(word in k for word in UNEQUAL)}
        for _, row in read_jsonl(out / "run" / "metrics.jsonl")
    ]
    (model,) = (out / "run" / "model").glob("*.safetensors")
    return rows, load_file(model)


def assert_as_if_nothing_had_been(out: Path, undisturbed: Path) -> None:
    (rows, weights), (expected, exact) = outcome(out), outcome(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == expected
    assert weights.keys() == exact.keys()
    assert all(weights[name].equal(x) for name, x in exact.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with agent(out, "--standalone", "--nproc-per-node=2") as process:
        finish(out, process)
    return out


def test_a_rank_is_killed_and_the_run_comes_back(undisturbed, tmp_path):
    """Rank 0, in which the others meet."""
    with agent(tmp_path, "--standalone", "--nproc-per-node=2", "--max-restarts=2") as process:
        wait_for_step(tmp_path, SEEN, process)
        (victim,) = (pid for pid, rank in workers_of(process.pid).items() if rank == 0)
        os.kill(victim, signal.SIGKILL)
        finish(tmp_path, process)
    assert_as_if_nothing_had_been(tmp_path, undisturbed)


def test_a_node_is_lost_and_another_takes_its_place(undisturbed, tmp_path):
    """Two agents of one process each, which meet at a rendezvous; one goes with all it has, and is started again.

    Without the variable PyTorch 2.13's agent that stays does not tell the new one where to meet.
    """
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    out, port = tmp_path, free_port()
    words = (
        "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=run",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host={},join_timeout=120", "--local-addr=127.0.0.1",
    )  # fmt: skip
    host, other = ([w.format(n) for w in words] for n in (1, 0))
    with agent(out, *host, **own) as first:
        with agent(out, *other, **own) as second:
            wait_for_step(out, SEEN, first, second)
            kill(second)
        with agent(out, *other, **own) as third:
            finish(out, first, third)
    assert_as_if_nothing_had_been(out, undisturbed)
