"""A benchmark's own file as the program of gloo ranks on this machine, for bench_scale.py and bench_sharding.py."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def run_ranks(
    program: str,
    order: list,  # to each, as JSON behind --rank-program
    num_ranks: int,
    *,
    copies: int = 1,  # that know nothing of each other
    cores: Sequence[int] = (),  # one for each process; none: wherever the system puts them
    timeout: float = 3600,
) -> list[list[str]]:
    """What each rank of each copy has written to stdout. SystemExit where one has failed."""
    processes = []
    with contextlib.ExitStack() as stack:
        for _ in range(copies):
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = str(s.getsockname()[1])
            for rank in range(num_ranks):
                env = os.environ | {
                    "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                }  # fmt: skip
                pinned = ["taskset", "-c", str(cores[len(processes)])] if cores else []
                words = [*pinned, sys.executable, program, "--rank-program", json.dumps(order)]
                process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
                stack.callback(process.kill)
                processes.append(process)
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank ended with {[process.returncode for process in processes]}")
    return [said[i : i + num_ranks] for i in range(0, len(said), num_ranks)]
