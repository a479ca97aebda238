"""Tiny runs to be killed. For every line "KIND FOLDER ASYNCHRONOUS POINT" on stdin a run is forked; on stdout
are then its pid, "begun" when it trains, and its exit code. POINT n kills it with SIGKILL at the n-th file operation of its
saves, in the middle of it if it is a write; with 0 it counts them into FOLDER/operations.
"""

import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import checkpoint_writer
from r1fast.examples import Example
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer

STEPS, EVERY = 8, 2
OPERATIONS = "open read write fsync rename replace mkdir unlink rmdir".split()


def make(kind: str, folder: Path, asynchronous: str) -> SFTTrainer | GRPOTrainer:
    config = tiny_config(
        f"--grpo.num_steps={STEPS}", f"--sft.max_steps={STEPS}", "--grpo.ref_refresh_steps=3",
        f"--checkpoint.every_steps={EVERY}", f"--checkpoint.asynchronous={asynchronous}",
        "--sft.token_budget=128", "--grpo.token_budget=128", "--model.activation_checkpointing=none",
    )  # fmt: skip
    policy = tiny_policy()
    if kind == "grpo":
        return GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer())
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(9)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def count_operations(point: int) -> list[int]:
    """Let the file operations inside saves be counted, and the `point`-th kill."""
    count, inside = [0], [False]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args, **kwargs):
            if inside[0]:
                count[0] += 1
                if count[0] == point:
                    if name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in OPERATIONS:
        wrap(name)
    publish = checkpoint_writer.publish

    def counted(*args, **kwargs):
        inside[0] = True
        try:
            return publish(*args, **kwargs)
        finally:
            inside[0] = False

    checkpoint_writer.publish = counted
    return count


def run(kind: str, folder: Path, asynchronous: str, point: int) -> None:
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    count = count_operations(point)
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
    (folder / "operations").write_text(str(count[0]))


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
