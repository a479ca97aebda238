"""The device that a run is planned for: its memory and its speed, as found or as assumed; the memory in use."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from r1fast.rollout.kv_cache import free_memory

GIB = 2**30


@dataclass(frozen=True, slots=True)
class GPU:
    """Data sheet: dense products in bfloat16 and plain float32, and memory."""

    name: str
    bf16_flops: float
    fp32_flops: float
    memory: int
    bandwidth: float  # bytes/s


GPUS = {
    "a100": GPU("NVIDIA A100 80GB SXM", 312e12, 19.5e12, 80 * GIB, 2.04e12),
    "l40s": GPU("NVIDIA L40S", 362e12, 91.6e12, 48 * GIB, 0.864e12),
    "h100": GPU("NVIDIA H100 SXM", 989e12, 67e12, 80 * GIB, 3.35e12),
    "h200": GPU("NVIDIA H200 SXM", 989e12, 67e12, 141 * GIB, 4.8e12),
}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [x.partition(":")[2].strip() for x in _lines("/proc/cpuinfo") if "model name" in x]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} threads"


def available_memory(device: torch.device) -> int:
    """Bytes that a process may still take, with what PyTorch holds on a GPU and does not use.

    On a CPU the processes of one machine have equal shares.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free_memory(device) + cached
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
    return free_memory(device) // max(int(processes) if processes.isdigit() else 1, 1)


class PeakMemory:
    """The most memory since `start`, beside what was there before the `known` bytes of tensors."""

    def __init__(self, device: torch.device, known: int):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is no base to start from
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident
        except (OSError, AttributeError):
            pass  # not Linux, or no permission: then the peak is since the process began
        self.base = _resident("VmRSS") - known

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(_resident("VmHWM") - self.base, 0)


def _resident(name: str) -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and written."""
    size = (1 << 28) if device.type == "cuda" else (1 << 26)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * size / fastest
