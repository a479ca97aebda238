"""Tiny runs to be killed. For every line "KIND FOLDER ASYNCHRONOUS POINT" on stdin a run is forked; on stdout
are then its pid, "begun" when it trains, and its exit code. POINT n kills it with SIGKILL at the n-th file operation of its
saves, in the middle of it if it is a write; with 0 it counts them into FOLDER/operations.
"""

import os
import sys
import tempfile
import traceback
from pathlib import Path

from faults import WRITING, FileOperations, grpo_trainer, sft_trainer

from r1fast import checkpoint_writer
from r1fast.sft import SFTTrainer
from r1fast.trainer import GRPOTrainer

STEPS, EVERY = 8, 2


def make(kind: str, folder: Path, asynchronous: str) -> SFTTrainer | GRPOTrainer:
    overrides = (
        f"--grpo.num_steps={STEPS}", f"--sft.max_steps={STEPS}", "--grpo.ref_refresh_steps=3",
        f"--checkpoint.every_steps={EVERY}", f"--checkpoint.asynchronous={asynchronous}",
        "--sft.token_budget=128", "--grpo.token_budget=128", "--model.activation_checkpointing=none",
    )  # fmt: skip
    if kind == "grpo":
        return grpo_trainer(folder, *overrides)
    return sft_trainer(folder, *overrides, num_examples=9)


def count_operations(folder: Path, point: int) -> FileOperations:
    """Let the file operations inside saves be counted, and the `point`-th kill."""
    inside, publish = [False], checkpoint_writer.publish

    def is_inside(path: str) -> bool:
        return inside[0] and path.startswith(str(folder))

    def counted(*args, **kwargs):
        inside[0] = True
        try:
            return publish(*args, **kwargs)
        finally:
            inside[0] = False

    checkpoint_writer.publish = counted
    operations = FileOperations(is_inside, names=WRITING)
    operations.arm(point, None)
    return operations


def run(kind: str, folder: Path, asynchronous: str, point: int) -> None:
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    operations = count_operations(folder, point)
    trainer = make(kind, folder, asynchronous)
    train_step, trainer.watch = trainer.train_step, lambda: None  # no plan: its probe takes longest

    def first_step(step):
        trainer.train_step = train_step
        os.write(out, b"begun\n")
        return train_step(step)

    trainer.train_step = first_step
    trainer.run()
    if trainer.train_step is first_step:  # there was no step left
        os.write(out, b"begun\n")
    (folder / "operations").write_text(str(len(operations.seen)))


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # what is imported late is imported before the forks
        for kind in ("sft", "grpo"):
            make(kind, Path(folder), "true")
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes this thread alone along"
    for line in sys.stdin:
        kind, folder, asynchronous, point = line.split()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(kind, Path(folder), asynchronous, int(point))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
