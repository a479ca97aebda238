"""The plan of a stage, and beside it what its first steps took: lines, tables and plan.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from r1fast.hf_folder import write_json
from r1fast.machine import PeakMemory
from r1fast.metrics import say_wrapped, table, warn
from r1fast.planner import (
    Job,
    Memory,
    Work,
    flops,
    memory_of,
    peak,
    seconds,
    training_counts,
    training_flops,
)
from r1fast.probe import Speed

FILE = "plan.json"
WATCHED = 3  # steps that are compared with it; the first of several is slower, and left out
PHASES = ("rollout", "reference", "train")  # of those that the metrics time


@dataclass(slots=True)
class Plan:
    job: Job
    stage: str
    device: str
    available: int  # bytes that the run may take, its weights included
    token_budget: int
    reason: str  # of the budget
    memory: Memory
    work: Work  # a step as expected
    lengths: str  # where the work's lengths are from
    speed: Speed | None = None
    peak_flops: float = 0.0  # that MFU is a share of
    assumptions: list[str] = field(default_factory=list)  # where nothing could be measured
    measured: dict = field(default_factory=dict)

    def flops(self, work: Work | None = None) -> dict[str, float]:
        return flops(self.job, work or self.work, self.token_budget)

    def seconds(self, work: Work | None = None) -> dict[str, float]:
        if self.speed is None:
            return {}
        return seconds(self.job, self.speed, work or self.work, self.token_budget)

    def mfu(self, seconds: float, work: Work | None = None) -> float:
        """Of the training part: FLOPs that it needs over those that the device could do."""
        if not seconds or not self.peak_flops:
            return 0.0
        return training_flops(self.flops(work)) / seconds / self.peak_flops

    def num_tokens(self, work: Work | None = None) -> int:
        """Prompt and completion tokens of a rank's step, as the metrics count them."""
        num = sum(p + n for p, ns in (work or self.work).sampled for n in ns)
        p = self.job.config.parallel
        together = p.context_parallel * p.tensor_parallel  # ranks that share the examples of SFT
        return num // (together if self.job.kind == "sft" else 1)

    def too_much(self) -> str:
        return " (the peak is more than is there)" * (peak(self.memory)[1] > self.available)

    def recomputed(self) -> str:
        mode = self.job.checkpointing
        return "" if mode == "none" else f"; activation checkpointing: {mode}"

    def lines(self) -> list[str]:
        """For the head of a run."""
        size, (phase, most) = self.job.size, peak(self.memory)
        kinds = sorted(self.memory[phase].items(), key=lambda item: -item[1])[:4]
        trained = "all" if size.trained == size.total else billions(size.trained)
        found = [
            f"plan: {billions(size.total)} parameters, {trained} trained, "
            f"{self.job.config.model.dtype}; {self.token_budget:,} tokens a micro-batch "
            f"({self.reason}){self.recomputed()}",
            f"      peak memory {mib(most)} of {mib(self.available)}{self.too_much()}, in {phase}: "
            + ", ".join(f"{kind} {mib(n)}" for kind, n in kinds),
        ]
        if planned := self.seconds():
            share = self.mfu(planned["train"])
            found.append(
                f"      a step with {self.lengths}: "
                + ", ".join(f"{phase} {_s(x)}" for phase, x in planned.items())
                + f"; MFU {100 * share:.0f}% of {number(self.peak_flops)}FLOP/s"
            )
        return found

    def to_dict(self) -> dict:
        planned = self.seconds()
        counts = training_counts(self.job, self.work.trained, self.token_budget)
        return {
            "stage": self.stage,
            "kind": self.job.kind,
            "device": self.device,
            "assumptions": self.assumptions,
            "dtype": self.job.config.model.dtype,
            "parameters": {"all": self.job.size.total, "trained": self.job.size.trained},
            "token_budget": {
                "num_tokens": self.token_budget,
                "asked": self.job.budget,
                "reason": self.reason,
            },
            "activation_checkpointing": {
                "mode": self.job.checkpointing,
                "asked": self.job.config.model.activation_checkpointing,
            },
            "lengths": self.lengths,
            "tokens_forwarded": sum(c.tokens for c in counts) * self.job.passes,
            "micro_batches": sum(c.micro_batches for c in counts) * self.job.passes,
            "memory": self.memory,
            "memory_peak": peak(self.memory)[1],
            "memory_available": self.available,
            "flops": self.flops(),
            "peak_flops": self.peak_flops,
            "seconds": planned,
            "mfu": self.mfu(planned.get("train", 0.0)),
            "measured": self.measured,
        }

    def show(self) -> None:
        """Everything, as tables."""
        size = self.job.size
        kinds = list(dict.fromkeys(kind for phase in self.memory.values() for kind in phase))
        rows = [
            [
                kind,
                *(mib(phase[kind]) if phase.get(kind) else "-" for phase in self.memory.values()),
            ]
            for kind in kinds
        ]
        rows.append(["together", *(mib(sum(phase.values())) for phase in self.memory.values())])
        trained = "" if size.trained == size.total else f", {billions(size.trained)} trained"
        table(
            f"{self.stage}: {billions(size.total)} parameters{trained}, {self.job.config.model.dtype}, "
            f"{self.device}",
            ["memory", *self.memory],
            rows,
            [
                f"{mib(self.available)} there{self.too_much()}; {self.token_budget:,} tokens a micro-batch "
                f"({self.reason}){self.recomputed()}",
                *self.assumptions,
            ],
        )
        whole = self.flops()
        table("", ["FLOPs a step and process", "number"],
              [[name, number(value)] for name, value in whole.items()])  # fmt: skip
        counts = training_counts(self.job, self.work.trained, self.token_budget)
        alone = sum(p + n - 1 for p, ns in self.work.trained for n in ns)
        notes = [
            f"with {self.lengths}; {sum(c.tokens for c in counts):,} tokens forwarded in "
            f"{_counted(sum(c.micro_batches for c in counts), 'micro-batch', 'micro-batches')}, of "
            f"{-(-alone // self.job.context):,} with a prompt for each "
            "completion"
        ]
        planned = self.seconds()
        if planned:
            rows = [[phase, _s(x)] for phase, x in planned.items()]
            share = 100 * self.mfu(planned["train"])
            notes.append(f"MFU of training {share:.0f}% of {number(self.peak_flops)}FLOP/s")
        else:
            rows = []
        table("", ["phase", "seconds a step"], rows, notes)


class PlanWatch:
    """Compares the first steps of a run with its plan; writes plan.json before and after."""

    def __init__(self, plan: Plan, folder: Path, known_bytes: int):
        self.plan, self.folder = plan, folder
        for line in plan.lines():
            say_wrapped(line, " " * 8)
        self._write()
        self.rows: list[tuple[dict, Work]] = []
        self.memory = PeakMemory(plan.job.device, known_bytes)

    def after_step(self, row: dict, work: Work, last: bool = False) -> None:
        """`row` has the seconds of the phases and `work` what was done in them."""
        if len(self.rows) == WATCHED or self.plan.measured:
            return
        self.rows.append((row, work))
        if len(self.rows) < WATCHED and not last:
            return
        self.plan.measured = self._compare()
        self._write()
        say_wrapped(_line(self.plan.measured), " " * 8)

    def _write(self) -> None:
        try:
            write_json(self.folder / FILE, self.plan.to_dict())
        except OSError as error:
            warn(f"{self.folder / FILE} could not be written, training goes on: {error}")

    def _compare(self) -> dict:
        """Everything as [predicted, measured]; seconds are means over the steps."""
        rows = self.rows[1:] or self.rows
        plan, n = self.plan, len(rows)
        predicted: dict[str, float] = {}
        for _, work in rows:
            for phase, x in plan.seconds(work).items():
                predicted[phase] = predicted.get(phase, 0.0) + x / n
        taken = {
            phase: sum(row.get(f"time/{phase}", 0.0) for row, _ in rows) / n for phase in PHASES
        }
        needed = sum(training_flops(plan.flops(work)) for _, work in rows) / n
        whole = sum(row["step_time"] for row, _ in rows) / n
        tokens = sum(plan.num_tokens(work) for _, work in rows) / n
        unplanned = whole - sum(taken[phase] for phase in predicted)  # rewards, for instance
        peaks = [
            peak(memory_of(plan.job, work, plan.token_budget, plan.available))[1]
            for _, work in self.rows
        ]
        found = {
            "steps": n,
            "memory_peak": [max(peaks), self.memory.read()],
            "seconds": {phase: [x, taken[phase]] for phase, x in predicted.items()},
        }
        if predicted:
            found["tokens_per_second"] = [
                tokens / (sum(predicted.values()) + unplanned), tokens / whole
            ]  # fmt: skip
        if plan.peak_flops and taken["train"]:
            found["mfu"] = [
                needed / x / plan.peak_flops for x in (predicted["train"], taken["train"]) if x
            ]
        return found


def _line(m: dict) -> str:
    parts = [f"{phase} {_s(b)} ({_s(a)})" for phase, (a, b) in m["seconds"].items()]
    if len(m.get("mfu", ())) == 2:
        a, b = m["mfu"]
        parts.append(f"MFU {100 * b:.0f}% ({100 * a:.0f}%)")
    a, b = m["memory_peak"]
    parts.append(f"peak memory {mib(b)} ({mib(a)})")
    if "tokens_per_second" in m:
        a, b = m["tokens_per_second"]
        parts.append(f"{b:,.0f} tokens/s ({a:,.0f})")
    return "measured, and as planned for these lengths: " + ", ".join(parts)


def _counted(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def billions(num_parameters: int) -> str:
    return number(num_parameters).strip().replace("G", "B")


def number(value: float) -> str:
    """3.5 M, 25 G, 1.9 T, with the space before a unit."""
    for size, mark in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {mark}"
    return f"{value:.0f} "


def mib(num_bytes: float) -> str:
    size = num_bytes / 2**20
    if 0 < size < 0.1:
        return f"{size * 1024:.3g} KiB"
    return f"{size / 1024:.3g} GiB" if size >= 1000 else f"{size:.3g} MiB"


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"
