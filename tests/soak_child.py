"""A run of `r1fast` that faults can be put into while it runs: what the soak's supervisor starts.

    python tests/soak_child.py FOLDER -- pipeline c.toml ...    one run
    python tests/soak_child.py FOLDER                           a run for every line of stdin, the command as JSON: forked
                                                                off with everything imported; its pid and exit code on stdout

FOLDER/inject.json, put there by a rename, names the fault to come next; the run takes it away. FOLDER/events is a FIFO
for what the run tells, a JSON object a line: a step with what the process holds, that a fault has happened, ...
"""

import contextlib
import ctypes
import errno
import json
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from faults import FileOperations

from r1fast import commands, policy_update, running_sum, sft
from r1fast.metrics import MetricsWriter
from r1fast.rewards.score import RewardScorer
from r1fast.sft import SFTTrainer
from r1fast.trainer import GRPOTrainer
from r1fast.training import Trainer
from r1fast.watchdog import Watchdog

REWARD_TIMEOUT = 4.0  # seconds of a call of the reward function that faults are put into; on a loaded machine 1 was one
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
SAVES = {"kill -9 inside a save": 0, "ENOSPC in a save": errno.ENOSPC, "EIO in a save": errno.EIO}


class Injected:
    """The run's side: where each kind of fault happens. One is armed at a time."""

    def __init__(self, folder: Path):
        self.order = folder / "inject.json"
        # held open: it must work when no file can be opened or written
        self.events = os.open(folder / "events", os.O_WRONLY)
        self.fault: dict = {}
        self.num_steps, self.told = 0, 0.0
        self.lock = threading.Lock()
        self.operations = FileOperations(lambda path: "/checkpoints" in path)
        self.rng = random.Random(0)
        self.stat = os.open("/proc/self/stat", os.O_RDONLY)

    def tell(self, what: str, **more) -> None:
        line = json.dumps({"pid": os.getpid(), "is": what, **more}) + "\n"
        os.write(self.events, line.encode())

    def happens(self, *kinds: str) -> str:
        """The armed fault, if it is one of these; it is told, and does not happen again."""
        with self.lock:
            kind = self.fault.get("kind", "")
            if kind not in kinds:
                return ""
            if not self.fault.get("lasts"):
                self.fault = {}
            self.tell("fault", kind=kind)
            return kind

    def look(self) -> None:
        """At every sign of life: is there an order?"""
        if not self.order.exists():
            return
        with contextlib.suppress(OSError, ValueError):
            fault = json.loads(self.order.read_text())
            self.order.unlink()
            self.fault, self.rng = fault, random.Random(fault["seed"])
            if (kind := fault["kind"]) in SAVES:
                number = SAVES[kind]
                error = OSError(number, os.strerror(number)) if number else None
                self.operations.arm(fault["point"], error)

    def beat(self, stage: str, phase: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if (now := time.monotonic()) > self.told + 0.1:
            self.told = now
            self.tell("beat", stage=stage, phase=phase)
        self.look()
        operations, fault = self.operations, self.fault
        if fault.get("kind") in SAVES and operations.at and len(operations.seen) >= operations.at:
            operations.at = 0
            self.happens(*SAVES)
        elif self.happens("a hang"):
            time.sleep(1000)
        elif self.happens("the clock jumps"):
            real, offset = time.time, fault["seconds"]
            time.time = lambda: real() + offset
        elif kind := self.happens(*LIMITS):
            self.limit(kind, fault["seconds"])
        if not operations.at:
            operations.seen.clear()

    def limit(self, kind: str, seconds: float) -> None:
        """The system refuses something for a time, as it does to a process that has used it up."""
        number, value = LIMITS[kind]
        if number == resource.RLIMIT_AS:
            value += self.held()["size"]
        before = resource.getrlimit(number)
        timer = threading.Timer(seconds, resource.setrlimit, (number, before))
        timer.daemon = True
        timer.start()
        resource.setrlimit(number, (value, before[1]))

    def reward(self, completions, **columns) -> list:
        """The user's reward function, which is not worth anything: what it does is a fault or 1."""
        scores: list = [1.0] * len(completions)
        kind = self.happens(*REWARDS)
        if kind == "a reward hangs":
            time.sleep(REWARD_TIMEOUT * 3)
        elif kind == "a reward is slow":
            time.sleep(REWARD_TIMEOUT / 3)
        elif kind in ("a reward crashes", "a reward crashes for good"):
            raise KeyError("a column that is not there")
        elif kind == "a reward leaves":
            sys.exit(3)
        elif kind == "a reward returns NaN":
            return [math.nan] * len(scores)
        elif kind == "a reward returns rubbish":
            return ["good"] * len(scores)
        return scores

    def held(self) -> dict:
        """What this process has: bytes, threads, open descriptors (-1 where the table is full)."""
        fields = os.pread(self.stat, 4096, 0).decode().rpartition(")")[2].split()
        try:
            files = len(os.listdir("/proc/self/fd")) - 1
        except OSError:
            files = -1
        rss = int(fields[21]) * resource.getpagesize()
        return {"threads": int(fields[17]), "size": int(fields[20]), "rss": rss, "files": files}

    def install(self) -> None:
        beat, step, write = Watchdog.beat, Trainer._step, MetricsWriter.write
        on_gradient, init = Trainer.on_gradient, RewardScorer.__init__

        def beating(dog, phase, detail=""):
            beat(dog, phase, detail)
            self.beat(dog.stage, phase)

        def stepping(trainer, profiler):
            if self.happens("NaN in a weight"):
                weights = list(trainer.trained().values())
                with torch.no_grad():
                    self.rng.choice(weights).view(-1)[0] = math.nan
            return step(trainer, profiler)

        def with_gradient(trainer):
            if self.happens("NaN in a gradient"):
                self.rng.choice(trainer.optimizer.masters).grad.view(-1)[0] = math.nan
            on_gradient(trainer)

        def writing(writer, number, values, stage=None):
            row = write(writer, number, values, stage)
            self.num_steps += 1
            self.tell(
                "step", stage=row["stage"], step=number, nth=self.num_steps,
                seconds=row.get("step_time", 0.0), **self.held(),
            )  # fmt: skip
            return row

        def forward_of(module):
            real = module.hidden_states

            def hidden_states(model, batch):
                if self.happens("OOM in a forward", "OOM for good"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                hidden = real(model, batch)
                return hidden * math.nan if self.happens("NaN in the loss") else hidden

            module.hidden_states = hidden_states

        def scorer(scorer, *args, **kwargs):
            kwargs["extra"] = {**(kwargs.get("extra") or {}), "soak": (self.reward, 0.0)}
            init(scorer, *args, **kwargs, function_timeout=REWARD_TIMEOUT)

        Watchdog.beat, Trainer._step, MetricsWriter.write = beating, stepping, writing
        Trainer.on_gradient, RewardScorer.__init__ = with_gradient, scorer
        for module in (sft, policy_update):
            forward_of(module)
        command = commands.run

        def run(*args):
            self.tell("begun")
            try:
                command(*args)
            finally:
                self.tell("ended")

        commands.run = run
        if os.environ.get("SOAK_PLAN") == "0":  # its probe takes longest
            SFTTrainer.watch = GRPOTrainer.watch = lambda trainer: None


LIMITS = {
    "no descriptors": (resource.RLIMIT_NOFILE, 0),
    "no room for files": (resource.RLIMIT_FSIZE, 1000),
    "no memory": (resource.RLIMIT_AS, 1 << 20),  # beyond what is held
}
REWARDS = (
    "a reward hangs", "a reward is slow", "a reward crashes", "a reward crashes for good",
    "a reward leaves", "a reward returns NaN", "a reward returns rubbish",
)  # fmt: skip


def one_run(folder: Path, argv: list[str]) -> None:
    """Ends the process."""
    if digits := os.environ.get("SOAK_DIGITS"):
        running_sum.NUM_DIGITS = int(digits)
    Injected(folder).install()
    sys.argv = ["r1fast", *argv]
    from r1fast.__main__ import run

    run()


def serve(folder: Path) -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork takes this thread alone along"
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
            os.setsid()
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os.close(log)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            one_run(folder, job["argv"])
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    # a shell that starts it in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(sys.argv) > 2:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        one_run(given, sys.argv[3:])
    serve(given)
