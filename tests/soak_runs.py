"""The runs of a soak: how large they are, and the processes that they are, one at a time."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from r1fast.watchdog import children

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("soak_child.py")
DEADLINE = 10.0  # seconds from a signal to a checkpoint
STAGES = ("base", "r1_zero", "cold_start")


class Size:
    """How large a round is, and how often something happens."""

    def __init__(self, short: bool):
        self.digits = 2 if short else 3
        self.gap = 0.7 if short else 4.0  # mean seconds between two faults, at least
        self.every = 3 if short else 10  # steps between two checkpoints
        self.steps = {"base": 40, "r1_zero": 16, "cold_start": 12}
        if not short:
            self.steps = {"base": 240, "r1_zero": 80, "cold_start": 40}
        self.stop = 2.0 if short else 12.0  # seconds of a SIGSTOP, at most
        self.short = short

    def command(self, folder: Path) -> list[str]:
        few = 8 if self.short else 24
        steps = self.steps
        return [
            "pipeline", str(ROOT / "configs" / "demo.toml"), f"--output_dir={folder}",
            f"--pipeline.stages={json.dumps(STAGES)}", "--model.device=cpu",
            "--data.max_train_problems=90", f"--rollout.max_completion_tokens={16 * self.digits}",
            f"--rollout.num_generations={few // 2 if self.short else 8}",
            f"--grpo.prompts_per_step={few // 2 if self.short else 8}",
            f"--stages.base.sft.max_steps={steps['base']}", "--stages.base.sft.batch_size=48",
            "--stages.base.optim.warmup_steps=10",
            f"--stages.r1_zero.grpo.num_steps={steps['r1_zero']}",
            # nearer to the base model: what R1-Zero reasons is what the cold start needs
            "--stages.r1_zero.optim.lr=1e-4",
            f"--stages.cold_start.sft.max_steps={steps['cold_start']}",
            "--cold_start.num_problems=60", "--cold_start.num_samples=4",
            f"--eval.num_problems={few}", "--eval.num_samples=2",
            f"--eval.every_steps={steps['r1_zero'] // 2}", f"--eval.every_num_problems={few}",
            f"--checkpoint.every_steps={self.every}", "--checkpoint.keep_last=2",
            f"--checkpoint.deadline_seconds={DEADLINE}",
            "--log.watchdog_seconds=8", "--log.watchdog_abort=true",
        ]  # fmt: skip


class Runs:
    """Starts runs, one at a time: forked off from a process that has imported everything, or fresh ones."""

    def __init__(self, folder: Path, size: Size):
        self.folder, self.log = folder, folder / "run.log"
        self.temp = folder / "tmp"
        self.temp.mkdir()
        os.mkfifo(folder / "events")
        self.events = os.open(folder / "events", os.O_RDONLY | os.O_NONBLOCK)
        self._open = os.open(folder / "events", os.O_WRONLY)  # so that it never ends
        self._rest = b""
        self.env = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(self.temp),
            "SOAK_DIGITS": str(size.digits), "SOAK_PLAN": "0",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "GOMP_SPINCOUNT": "10000",
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, str(CHILD), str(folder)], env=self.env, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._answers = b""
        self.process: subprocess.Popen | None = None
        self.pid = 0

    def start(self, argv: list[str], *, fresh: bool = False) -> None:
        self.log.write_text("")
        (self.folder / "inject.json").unlink(missing_ok=True)
        self.process = None
        if fresh:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, str(CHILD), str(self.folder), "--", *argv],
                    env=self.env | {"SOAK_PLAN": "1"},
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            self.pid = self.process.pid
            return
        job = json.dumps({"argv": argv, "log": str(self.log)})
        self.server.stdin.write(f"{job}\n".encode())
        self.pid = self._answer(wait=True)

    def poll(self) -> int | None:
        """Its exit code, -n for signal n; None while it runs."""
        if self.process is not None:
            return self.process.poll()
        return self._answer(wait=False)

    def _answer(self, *, wait: bool) -> int | None:
        """A number that the server has said."""
        while b"\n" not in self._answers:
            if not wait and not select.select([self.server.stdout], [], [], 0)[0]:
                return None
            if not (said := self.server.stdout.read(100)):
                raise RuntimeError("the process that forks the runs has died")
            self._answers += said
        line, _, self._answers = self._answers.partition(b"\n")
        return int(line)

    def send(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    def order(self, fault: dict) -> None:
        part = self.folder / "inject.part"
        part.write_text(json.dumps(fault))
        part.replace(self.folder / "inject.json")

    def told(self) -> list[dict]:
        """What the run has told since the last call."""
        try:
            self._rest += os.read(self.events, 1 << 20)
        except BlockingIOError:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def others(self) -> list[str]:
        """Processes under this one that are neither the server nor the zombies of orphans, which go here."""
        found = []
        for line in children(os.getpid()):
            pid, parent = int(line.split()[0]), int(line.split()[2].rstrip(":"))
            if pid == self.server.pid:
                continue
            if "state Z" in line:
                if parent == os.getpid() and (self.process is None or pid != self.process.pid):
                    os.waitpid(pid, os.WNOHANG)
                continue
            found.append(line)
        return found

    def close(self) -> None:
        if self.poll_quietly() is None:
            self.send(signal.SIGKILL)
        self.server.stdin.close()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            self.server.kill()

    def poll_quietly(self) -> int | None:
        try:
            return self.poll()
        except (RuntimeError, ValueError):
            return 0
