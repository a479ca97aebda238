"""How bench_step.py and step_gpu.py talk to a trainer in a process of its own: settings, orders, answers.

A `Worker` starts `python benchmarks/step_peers.py`, sends the settings and then one order a line. An order with
"groups" is the training part alone: those rollouts with those rewards and old log-probabilities. One without
is a whole step, generation and rewards too; the prompts in "silent" earn the same for every completion.
"gradients" names a file for the gradient before clipping, "max_tokens" shortens completions. The answer has
the tokens generated and forwarded and what `Meter` measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_peers import peak_bytes, reset_peak

CLIP, MAX_GRAD_NORM, LEARNING_RATE = 0.2, 1.0, 1e-6
Groups = list[dict[str, Any]]  # each: prompt, prompt_ids; completions, logprobs, rewards of G


@dataclass
class Settings:
    """What a worker is to train, and how; `options` are the variant's own."""

    engine: str
    path: str  # a Hugging Face folder
    prompts: list[str]
    group: int  # G
    max_tokens: int  # of a completion
    kl_coef: float = 0.0
    threads: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    optimizer: bool = True  # false: the step ends at the gradient
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def reward_of(completion_ids: list[int]) -> float:
    """In [0, 1), by the tokens alone and as good as random."""
    return zlib.crc32(array("i", completion_ids).tobytes()) / 2**32


class Meter:
    """Seconds, CPU seconds and memory of what is between `start` and `stop`, pauses left out.

    Memory is resident memory on a CPU, and what the allocator holds for tensors on a GPU.
    """

    def __init__(self, device: str):
        self.device = device
        self.marks: dict[str, float] = {}

    def loaded(self) -> int:
        """The bytes in use now, before any step."""
        return self._reset()

    def start(self) -> None:
        self.marks = {}
        self.peak = self._reset()
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def mark(self, name: str) -> None:
        """Note the seconds since the start under this name."""
        self._synchronize()
        self.marks[name] = self.seconds + time.perf_counter()

    def stop(self) -> dict[str, float]:
        self._halt()
        found = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak": self.peak}
        return found | self.marks

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._halt()
        yield
        self._reset()
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= time.process_time()

    def _halt(self) -> None:
        self._synchronize()
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()
        self.peak = max(self.peak, self._peak())

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _reset(self) -> int:
        self._synchronize()
        if self.device != "cuda":
            return reset_peak([os.getpid()])
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _peak(self) -> int:
        if self.device != "cuda":
            return peak_bytes([os.getpid()])
        import torch

        return torch.cuda.max_memory_allocated()


class Worker:
    """A trainer in a process of its own. Raises RuntimeError where it cannot be had."""

    def __init__(self, settings: Settings, log: Path):
        silence = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        spin = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}  # as the Makefile's
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("step_peers.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=log.open("w"),
            env=os.environ | silence | spin,
        )  # fmt: skip
        self.loaded = self._ask(dataclasses.asdict(settings))["loaded"]  # bytes

    def step(self, **order: Any) -> dict[str, float]:
        """seconds, cpu_seconds, peak (bytes); generation, gradient (seconds when each was there); tokens, forwarded"""
        return self._ask(order)

    def _ask(self, body: dict) -> dict:
        self.process.stdin.write(json.dumps(body) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": f"it ended with {self.process.wait()}"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
