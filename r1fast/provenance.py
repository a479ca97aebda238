"""What a number depends on besides the config: the code, the libraries, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def provenance() -> dict:
    """What a run's manifest says of where it ran."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        n = torch.get_num_threads()
        device = f"{platform.processor() or platform.machine()}, {n} thread{'s' * (n != 1)}"
    return {"commit": commit, "device": device, "torch": torch.__version__}


def rounding(device: torch.device, num_processes: int) -> dict[str, str | int]:
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
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
