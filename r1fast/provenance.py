"""What a number depends on besides the config: the code, the libraries, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from r1fast import _C
from r1fast.kernels import cpu_head
from r1fast.kernels.linear import has_bf16_products


def provenance() -> dict:
    """What a run's manifest says of where it ran."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"commit": commit, "device": hardware(device), "torch": torch.__version__}


def hardware(device: torch.device) -> str:
    """As "NVIDIA H200", or "x86_64, 2 threads, AVX-512 with bfloat16"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n, own = torch.get_num_threads(), levels()
    name = {"avx512": "AVX-512", "avx2": "AVX2"}.get(own["float32"], own["float32"])
    if own["bfloat16"] == "amx":
        name += " with AMX"
    elif own["bfloat16"] == "avx512" and _C.has_avx512_bf16():
        name += " with bfloat16"
    return f"{platform.processor() or platform.machine()}, {n} thread{'s' * (n != 1)}, {name}"


def levels() -> dict[str, str]:
    """By which instructions r1fast's own C++ computes; R1FAST_CPU_LEVEL lowers them."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {name: cpu_head.native_level(dtype) for name, dtype in dtypes.items()}


def rounding(device: torch.device, num_processes: int) -> dict[str, Any]:
    """What the last bits of an update depend on: where all of it is equal, they are."""
    try:
        own = version("r1fast")
    except PackageNotFoundError:  # a checkout on the path
        own = ""
    known = provenance()
    return {
        "r1fast": own,
        "commit": known["commit"],
        "torch": known["torch"],
        "device": known["device"] if device.type == "cuda" else processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # PyTorch's
        "levels": levels(),
        "bfloat16_products": has_bf16_products(),
        "threads": torch.get_num_threads(),
        "processes": num_processes,
    }


def processor() -> str:
    """The name of the CPU, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
