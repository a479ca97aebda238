"""For tests of layouts of ranks: run a program that forks them once, and compare what they leave with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_policy

from r1fast.checkpoint import load_checkpoint
from r1fast.metrics import read_metrics

ROOT = Path(__file__).parents[1]
KEYS = (
    "loss", "grad_norm", "reward", "kl", "entropy", "num_tokens", "eval/pass@1", "ratio",
    "train/steps_without_signal", "rollout_correction/weight", "train/old_logprobs_recomputed",
)  # fmt: skip


def run_layouts(program: str, folder: Path) -> Path:
    """All ranks of all cases of `program` (of this folder), which write into `folder`."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / program), str(folder)],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


def largest_error(actual: dict, expected: dict) -> float:
    """Of all tensors, as a share of each one's norm."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[key].double(), x.double()) for key, x in expected.items()]
    return max(float((a - b).norm() / (b.norm() + 1e-30)) for a, b in pairs)


def tensors_of(out: Path, layout: str, name: str, what: str) -> dict[str, torch.Tensor]:
    return load_file(out / layout / name / f"{what}.safetensors")


def first_step(named: dict) -> dict:
    return {key: x for key, x in named.items() if key.startswith("0.")}


def everything(folder: Path, num_steps: int) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    found = load_checkpoint(folder / "checkpoints")
    assert found.step == num_steps
    return {f"{s}.{key}": x for s in found.names() for key, x in found.tensors(s).items()}


def check_weights(out: Path, layout: str, num_ranks: int, name: str, run: tuple, bf16=0.02) -> None:
    """Gradients and weights of all steps are those of `ddp1`, and the same on all ranks.

    In bfloat16 the first gradient is close to that of one process, whose micro-batches are others.
    """
    gradients, weights = (tensors_of(out, layout, name, x) for x in ("gradients", "weights-0"))
    expected, after = (tensors_of(out, "ddp1", name, x) for x in ("gradients", "weights-0"))
    if run[1] == "float32":
        assert largest_error(gradients, expected) < 5e-6
        # adapters begin at 0, so theirs is as large as a gradient's
        assert largest_error(weights, after) < (2e-6 if "lora" in name else 5e-7)
    else:
        assert largest_error(first_step(gradients), first_step(expected)) < bf16
        assert largest_error(weights, after) < 0.02
    begun = {n: p.detach() for n, p in tiny_policy(run[0]).model.named_parameters()}
    # it trains; adapters begin at 0, and nothing else moves beside them
    added = {n: x for n, x in weights.items() if n not in begun}
    trained = added or weights
    before = {n: begun.get(n, torch.zeros_like(x)) for n, x in trained.items()}
    assert largest_error(trained, before) > 1e-3
    for rank in range(1, num_ranks):
        others = tensors_of(out, layout, name, f"weights-{rank}")
        assert all(torch.equal(others[key], x) for key, x in weights.items())


def check_rows(
    out: Path, layout: str, num_ranks: int, name: str, run: tuple
) -> tuple[list[dict], list[dict]]:
    """Data, samples and metrics are those of `ddp1`. Returns the rows of both."""

    def samples(layout: str, n: int) -> list:
        files = [out / layout / name / f"facts-{r}.json" for r in range(n)]
        facts = [json.loads(file.read_text()) for file in files]
        most = None if run[1] == "float32" else 4 // n  # of the first step
        return sorted(sum((f["seen"][:most] for f in facts), []))

    if name != "dynamic":  # where ranks begin other candidates that are dropped later
        assert samples(layout, num_ranks) == samples("ddp1", 1)
        assert samples(layout, num_ranks) or name.startswith("sft")
    rows, expected = (read_metrics(out / which / name) for which in (layout, "ddp1"))
    assert len(rows) == len(expected) == 2
    for row, alone in zip(rows, expected, strict=True):
        assert row["step"] == alone["step"]
        if run[1] == "float32":
            for key in (key for key in KEYS if key in alone):
                assert row[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
    return rows, expected


def check_moved(out: Path, name: str, changes: list[str]) -> None:
    """A step in each of several layouts is the run of one process; `changes` is what each step says of the one before."""
    moved, alone = (
        everything(out / which / name, len(changes)) for which in ("moved", "ddp1 straight")
    )
    assert {key: (x.dtype, x.shape) for key, x in moved.items()} == {
        key: (x.dtype, x.shape) for key, x in alone.items()
    }
    assert largest_error(moved, alone) < (0.03 if "bfloat16" in name else 2e-6)
    notes = [row.get("note", "") for row in read_metrics(out / "moved" / name)]
    assert [note.partition(" after")[0].partition(": ")[2] for note in notes] == changes
