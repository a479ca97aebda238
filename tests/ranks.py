"""Processes of one job on this machine, joined by gloo, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Ranks:
    """`program` once a rank, with `args`; what happens meanwhile happens beside them."""

    def __init__(self, program: str | Path, *args: object, num_ranks: int = 2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = {
            "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1",
        }  # fmt: skip
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(program), *map(str, args)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_ranks)
        ]

    def wait(self, timeout: float = 300) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of every rank."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, *texts) for p, texts in zip(self.processes, said, strict=True)]

    def succeed(self, timeout: float = 300) -> list[str]:
        """What every rank has written to stderr; all must have ended well."""
        ended = self.wait(timeout)
        assert [code for code, _, _ in ended] == [0] * len(ended), "\n".join(
            f"rank {rank}: {code}\n{out[-1500:]}\n{err[-3000:]}"
            for rank, (code, out, err) in enumerate(ended)
        )
        return [err for _, _, err in ended]
