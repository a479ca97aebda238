"""What must hold in a soak: every step once, no work lost beyond a checkpoint, nothing that grows, the same bits."""

import json
import statistics
from collections import Counter
from pathlib import Path

import torch
from faults import leftovers
from tiny import without_clock

from r1fast import checkpoint
from r1fast.checkpoint import load_checkpoint, steps_in
from r1fast.hf_folder import fill_tensors, read_tensors
from r1fast.jsonl import read_jsonl
from r1fast.metrics import read_metrics

LOOK_AT = 8  # step of a process at which what it holds is compared with other processes
GROWTH = 1.05  # of what a process holds, from the first to the last third of a soak
GROWTH_BYTES = 8 << 20
COLLAPSED = 0.7  # of the reward that the round left alone ends with
LAST = 8  # steps of which that is the mean
FILES = (
    "model/model.safetensors",
    "eval.json",
    "problems.jsonl",
    "collected.jsonl",
    "trained.jsonl",
)
OF_THE_PROCESS = ("rollout/cache_mib",)  # the most that its engine ever held


class Checks:
    def __init__(self, size, stages: tuple[str, ...]):
        self.size, self.stages = size, stages
        self.rows: dict[str, dict] = {}  # kind -> what of it was
        self.steps: list[dict] = []  # of all processes, as they told
        self.broken_invariants: list[str] = []
        self.rounds: list[dict] = []
        self.restarts = 0
        self.codes: Counter[str] = Counter()
        self.lost_steps, self.lost_seconds = [0], [0.0]
        self.folder, self.number, self.bitwise = Path(), 0, False
        self.whole: dict = {}  # of the round that was left alone
        self.held: dict[
            str, list[dict]
        ] = {}  # stage -> what processes that began in it held at LOOK_AT
        self.growth: list[dict] = []  # inside of one process
        self.num_temporary = self.num_kills = 0
        self.last_round = ""

    # --- what happens

    def begin_round(self, number: int, folder: Path, *, bitwise: bool) -> None:
        self.number, self.folder, self.bitwise = number, folder, bitwise
        self.rounds.append({"number": number, "bitwise": bitwise, "runs": 0, "faults": 0})
        self.of_round: list[dict] = []

    def begin_run(self) -> None:
        if self.rounds[-1]["runs"]:
            self.restarts += 1
        self.rounds[-1]["runs"] += 1
        self.of_run: list[dict] = []
        self.excused = 0  # saves that faults have kept from the disk

    def step(self, event: dict) -> None:
        self.steps.append(event)
        self.of_round.append(event)
        self.of_run.append(event)

    def before_fault(self) -> None:
        self.steps_before = len(self.of_run)

    def fault(self, kind, code: int | None, stage: str, seconds: float, right: bool) -> str:
        """Count one, and what it has cost. Returns that in words."""
        row = self._row(kind.name)
        row["injected"] += 1
        row["survived"] += right
        self.rounds[-1]["faults"] += 1
        if (
            kind.saves_fail
        ):  # one, or, as limits last for a while, all that a quick machine has begun meanwhile
            since = len(self.of_run) - self.steps_before if kind.is_limit else 0
            self.excused += 1 + since // self.size.every
        self.num_kills += code == -9
        if code is None:
            return ""
        row["ended"] += 1
        row["seconds"] = round(max(row["seconds"], seconds), 1)
        if stage not in self.stages or code == 0:
            return ""
        lost, lost_seconds = self._lost(stage)
        self._lose(row, lost, lost_seconds)
        allowed = self.size.every * (2 + self.excused)
        if code == 130:
            allowed = 0  # with a checkpoint
        elif code in (3, 75):
            allowed += 5
        if lost > allowed:
            self.broken(f"{kind.name} in {stage}: lost {lost} steps, {allowed} at most")
        return f"lost {lost} ({lost_seconds:.1f}s)" if lost else ""

    def damaged(self, kind, stage: str) -> None:
        """After the kill that was counted: what the damage has cost beyond it."""
        lost, seconds = self._lost(stage)
        self._lose(self._row(kind.name), lost, seconds)
        allowed = self.size.every * (3 + self.excused)
        if lost > allowed:
            self.broken(f"{kind.name} in {stage}: lost {lost} steps, {allowed} at most")

    def not_possible(self, kind) -> None:
        """Only the kill that comes before it was."""
        row = self._row(kind.name)
        row["injected"] -= 1
        row["survived"] -= 1
        kill = self._row("kill -9")
        for key in ("injected", "survived", "ended"):
            kill[key] += 1
        row["ended"] -= 1

    def _row(self, name: str) -> dict:
        zero = {"injected": 0, "survived": 0, "ended": 0, "steps_lost": 0, "seconds": 0.0}
        return self.rows.setdefault(name, zero)

    def _lose(self, row: dict, steps: int, seconds: float) -> None:
        row["steps_lost"] = max(row["steps_lost"], steps)
        self.lost_steps.append(steps)
        self.lost_seconds.append(seconds)

    def _lost(self, stage: str) -> tuple[int, float]:
        """Steps that were done and are to be done again, and the seconds that they took."""
        own = [event for event in self.of_run if event["stage"] == stage]
        saved = self.saved_step(stage)
        rows = [event for event in own if event["step"] > saved]
        return len(rows), sum(event["seconds"] for event in rows)

    def checkpoints(self, stage: str) -> list[Path]:
        """Of a stage, newest first."""
        return [path for _, path in steps_in(self.folder / stage / "checkpoints")]

    def saved_step(self, stage: str) -> int:
        warn, checkpoint.warn = checkpoint.warn, lambda text: None
        try:
            saved = load_checkpoint(self.folder / stage / "checkpoints")
        finally:
            checkpoint.warn = warn
        return saved.step if saved is not None else 0

    # --- what must hold

    @property
    def num_broken(self) -> int:
        return len(self.broken_invariants)

    def broken(self, what: str) -> int:
        self.broken_invariants.append(what)
        return self.num_broken

    def end_run(self, code: int, kind) -> None:
        """After every process: the metrics of each stage go from step 1 on without a gap."""
        self.codes[str(code)] += 1
        for stage in self.stages:
            self._steps_of(stage)
        if len(self.of_run) >= LOOK_AT and self._is_plain(self.of_run[:LOOK_AT]):
            event = self.of_run[LOOK_AT - 1]
            self.held.setdefault(event["stage"], []).append(event)
        first = [e for e in self.of_run[LOOK_AT:] if e["stage"] == "r1_zero" and e["files"] >= 0]
        if len(first) >= 3 * LOOK_AT:
            self.growth.append({"from": first[LOOK_AT], "to": first[-1]})

    @staticmethod
    def _is_plain(events: list[dict]) -> bool:
        return events[0]["stage"] == events[-1]["stage"] and events[-1]["files"] >= 0

    def _rows_of(self, stage: str) -> list[dict]:
        path = self.folder / stage / "metrics.jsonl"
        try:
            return read_metrics(path) if path.exists() else []
        except ValueError as error:
            self.broken(f"{error}")
            return []

    def _steps_of(self, stage: str) -> list[int]:
        steps = [row["step"] for row in self._rows_of(stage)]
        if steps != list(range(1, len(steps) + 1)):
            self.broken(f"{stage}: the steps of metrics.jsonl are {steps}")
        return steps

    def end_round(self, done: bool, seconds: float) -> None:
        found = {stage: self._of_stage(stage) for stage in self.stages}
        entry = self.rounds[-1]
        entry |= {"done": done, "seconds": seconds, "steps": len(self.of_round)}
        reward = self._reward(found)
        entry["reward"] = reward
        if not self.number:
            self.whole = found
            if not done:
                self.broken("the round that was left alone did not end")
        elif self.bitwise and self.whole:
            entry["equal"] = self._compare(found, done)
        if done:
            for stage in self.stages:
                if (n := len(self._steps_of(stage))) != self.size.steps[stage]:
                    self.broken(f"{stage}: {n} steps in metrics.jsonl of {self.size.steps[stage]}")
                self._weights_load(stage)
            self._nothing_left()
            expected = self._reward(self.whole)
            if reward < COLLAPSED * expected:
                self.broken(
                    f"the reward is {reward:.3f} at the end, {expected:.3f} when left alone"
                )
        equal = "the same bits" if entry.get("equal") else ""
        parts = [f"{entry['runs']} runs", f"reward {reward:.2f}", equal]
        self.last_round = ", ".join(part for part in parts if part)

    def _of_stage(self, stage: str) -> dict:
        """What a stage has left that must be the same again."""
        folder = self.folder / stage
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
        if (folder / "samples.jsonl").exists():
            rows = [row for _, row in read_jsonl(folder / "samples.jsonl")]
            files["samples.jsonl"] = json.dumps([_without_fault(row) for row in rows]).encode()
        rows = without_clock(self._rows_of(stage))
        if not (folder / "manifest.json").exists():  # later rows go when it is started again
            saved = self.saved_step(stage)
            rows = [row for row in rows if row["step"] <= saved]
        return {"files": files, "rows": [_without_fault(row) for row in rows]}

    def _compare(self, found: dict, done: bool) -> bool:
        """Whether all there is equals what the round left alone has left."""
        before = self.num_broken
        for stage in self.stages:
            rows, expected = found[stage]["rows"], self.whole[stage]["rows"]
            for row, other in zip(rows, expected, strict=False):
                if row != other:
                    names = [n for n in row.keys() | other.keys() if row.get(n) != other.get(n)]
                    self.broken(f"{stage}: step {row['step']} is another one: {sorted(names)}")
                    break
            if done or (self.folder / stage / "manifest.json").exists():
                files, others = found[stage]["files"], self.whole[stage]["files"]
                names = [n for n in files.keys() | others.keys() if files.get(n) != others.get(n)]
                if names:
                    self.broken(f"{stage}: other bytes in {', '.join(sorted(names))}")
        return self.num_broken == before

    def _weights_load(self, stage: str) -> None:
        folder = self.folder / stage / "model"
        try:
            targets = {name: torch.empty(shape) for name, _, shape in read_tensors(folder)}
            fill_tensors(folder, targets)  # refuses what is not finite
        except ValueError as error:
            self.broken(f"{stage}: the model does not load: {error}")

    def _nothing_left(self) -> None:
        """No half-written file, no log of an evaluation that is over."""
        left = [*self.folder.rglob("*.part"), *self.folder.rglob("*.partial-*")]
        for stage in self.stages:
            folder = self.folder / stage / "checkpoints"
            left += [folder / name for name in leftovers(folder)]
        if left:
            self.broken(f"left behind: {', '.join(str(p.relative_to(self.folder)) for p in left)}")

    @staticmethod
    def _reward(found: dict) -> float:
        rewards = [row["reward"] for row in found["r1_zero"]["rows"] if row.get("reward")]
        return statistics.fmean(rewards[-LAST:]) if rewards else 0.0

    def temporary_files(self, folder: Path) -> None:
        """In TMPDIR: what a kill could not remove, and nothing else."""
        self.num_temporary = len(list(folder.iterdir()))
        if self.num_temporary > self.num_kills:
            self.broken(f"{self.num_temporary} temporary files after {self.num_kills} kills")

    # --- what it comes to

    def result(self, **more) -> dict:
        held = {stage: self._flat(stage, events) for stage, events in self.held.items()}
        growth = {}
        for name in ("rss", "files", "threads"):
            values = [g["to"][name] - g["from"][name] for g in self.growth if g["to"]["files"] >= 0]
            if values:
                growth[name] = max(values)
        if growth.get("rss", 0) > 4 * GROWTH_BYTES:
            self.broken(f"a process grew by {growth['rss'] / 2**20:.0f} MiB")
        done = [r for r in self.rounds if r.get("done")]
        faults = [{"fault": name, **row} for name, row in self.rows.items() if row["injected"]]
        return {
            **more,
            "steps": len(self.steps),
            "steps_again": sum(self.lost_steps),
            "rounds": len(self.rounds),
            "rounds_done": len(done),
            "rounds_equal": sum(bool(r.get("equal")) for r in self.rounds),
            "rewards": [round(r["reward"], 3) for r in done],
            "restarts": self.restarts,
            "exit_codes": dict(sorted(self.codes.items(), key=lambda item: int(item[0]))),
            "faults": sorted(faults, key=lambda row: -row["injected"]),
            "injected": sum(row["injected"] for row in faults),
            "survived": sum(row["survived"] for row in faults),
            "most_steps_lost": max(self.lost_steps),
            "most_seconds_lost": max(self.lost_seconds),
            "seconds_lost": sum(self.lost_seconds),
            "held": held,
            "growth": growth,
            "temporary_files": self.num_temporary,
            "broken": self.broken_invariants,
        }

    def _flat(self, stage: str, events: list[dict]) -> dict:
        """What processes held at their LOOK_AT-th step: the first and the last third of them."""
        third = max(1, len(events) // 3)
        found: dict = {"processes": len(events)}
        for name in ("rss", "files", "threads"):
            first, last = (
                statistics.median(event[name] for event in part)
                for part in (events[:third], events[-third:])
            )
            found[name] = [first, last]
            room = GROWTH_BYTES if name == "rss" else 1
            if len(events) >= 6 and last > GROWTH * first + room:
                self.broken(f"{stage}: {name} grew from {first:g} to {last:g} at equal steps")
        return found


def _without_fault(row: dict) -> dict:
    """Without what the reward function that faults are put into has given, and what is the process's own."""
    row = {k: v for k, v in row.items() if "soak" not in k and k not in OF_THE_PROCESS}
    if isinstance(row.get("parts"), dict):
        row["parts"] = {k: v for k, v in row["parts"].items() if k != "soak"}
    return row
