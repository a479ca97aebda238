"""`--profile N`: a trace of N steps, their seconds by phase, the operators that took longest, peak memory.

    folder/profile/trace.json.gz   for ui.perfetto.dev or chrome://tracing, with a range for every phase and part
    folder/profile/profile.json    the numbers of the table

The first step of a run warms up and is not traced; the step behind the traced ones, where there is one,
tells what tracing costs.
"""

from __future__ import annotations

import resource
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from r1fast.hf_folder import write_json
from r1fast.metrics import say, table, warn
from r1fast.timer import Timer

FOLDER, TRACE, NUMBERS = "profile", "trace.json.gz", "profile.json"
NUM_OPERATORS = 12
OF_STEPS = ("step ", "ProfilerStep")  # ranges around everything
REST = "rest"


class Profiler:
    """Told where every step begins and ends; does nothing where `num_steps` is 0."""

    def __init__(
        self, folder: Path, timer: Timer, device: torch.device, num_steps: int, *, num_left: int
    ):
        self.folder, self.timer, self.device = folder / FOLDER, timer, device
        self.num_steps = min(num_steps, num_left - 1)  # to trace
        if num_steps and self.num_steps < 1:
            warn("nothing to profile: the first step of a run warms up, and there is no second one")
        self.steps: list[int] = []  # those that were traced, counted from 1
        self.seconds, self.num_tokens = 0.0, 0
        self.phases: dict[str, float] = {}
        self.result: dict[str, Any] = {}  # until it is shown
        self._num_seen = self._step = 0
        self._range = ExitStack()
        self._profile: profile | None = None

    def __enter__(self) -> Profiler:
        if self.num_steps >= 1:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self._profile = profile(
                activities=kinds,
                schedule=schedule(wait=0, warmup=1, active=self.num_steps, repeat=1),
                on_trace_ready=self._read,
            )
            self._profile.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Of a run that was stopped too: what was traced until then."""
        self._end_range()
        if self._profile is not None:
            self._profile.stop()
        self._finish(None)

    def begin(self, step: int) -> None:
        if self._profile is None or not 1 <= self._num_seen <= self.num_steps:
            return
        if self.device.type == "cuda" and not self.steps:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._step = step + 1
        self.timer.mark = record_function
        self._range.enter_context(record_function(f"step {step + 1}"))

    def end(self, seconds: float, num_tokens: int) -> None:
        """Of a step that took so long for so many tokens."""
        if self._profile is None:
            return
        self._end_range()
        if 1 <= self._num_seen <= self.num_steps:
            self.steps.append(self._step)
            self.seconds, self.num_tokens = self.seconds + seconds, self.num_tokens + num_tokens
            for name, value in self.timer.seconds().items():
                self.phases[name] = self.phases.get(name, 0.0) + value
        if self._num_seen <= self.num_steps:
            self._profile.step()
        else:
            self._finish(seconds / max(num_tokens, 1))
            self._profile.stop()
            self._profile = None
        self._num_seen += 1

    def _end_range(self) -> None:
        self._range.close()
        self.timer.mark = None

    def _read(self, traced: profile) -> None:
        """Write the trace, and keep the numbers until the overhead is known."""
        if not self.steps:
            return
        is_cuda = self.device.type == "cuda"
        time = "self_device_time_total" if is_cuda else "self_cpu_time_total"
        events = [e for e in traced.key_averages() if not e.key.startswith(OF_STEPS)]
        events.sort(key=lambda e: -getattr(e, time))
        total = sum(getattr(e, time) for e in events)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        self.result = {
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens": self.num_tokens,
            "phases": _with_rests(self.phases, self.seconds),
            "operators": [
                {
                    "name": f"{e.key}, outside of operators" if e.is_user_annotation else e.key,
                    "calls": e.count,
                    "self_seconds": getattr(e, time) / 1e6,
                    "share": getattr(e, time) / max(total, 1e-9),
                }
                for e in events[:NUM_OPERATORS]
            ],
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if is_cuda else peak,
            "peak_of": "the GPU in these steps" if is_cuda else "the process since it began",
            "device": torch.cuda.get_device_name(self.device) if is_cuda else "cpu",
            "trace": TRACE,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(self.folder / TRACE))
        except OSError as error:
            warn(f"{self.folder / TRACE} could not be written: {error}")

    def _finish(self, seconds_a_token: float | None) -> None:
        """Write and show the table; with what an untraced step took a token, where there was one."""
        result, self.result = self.result, {}
        if not result:
            return
        traced = result["seconds"] / max(result["tokens"], 1)
        result["overhead"] = traced / seconds_a_token - 1 if seconds_a_token else None
        try:
            write_json(self.folder / NUMBERS, result)
        except OSError as error:
            warn(f"{self.folder / NUMBERS} could not be written: {error}")
        _show(result, self.folder)


def _with_rests(phases: dict[str, float], seconds: float) -> dict[str, float]:
    """Phases, each followed by its parts and by what is in none of them."""
    found: dict[str, float] = {}
    tops = [name for name in phases if "/" not in name]
    for top in tops:
        parts = {name: x for name, x in phases.items() if name.startswith(f"{top}/")}
        found |= {top: phases[top]} | parts
        if parts:
            found[f"{top}/{REST}"] = phases[top] - sum(parts.values())
    return found | {REST: seconds - sum(phases[top] for top in tops)}


def _show(result: dict[str, Any], folder: Path) -> None:
    seconds, n = result["seconds"], len(result["steps"])
    rows = [
        [
            f"  {name.partition('/')[2]}" if "/" in name else name,
            f"{x / n:.3f}",
            f"{x / seconds:.1%}",
        ]
        for name, x in [*result["phases"].items(), ("a step", seconds)]
    ]
    overhead = result["overhead"]
    cost = "not known: no step came after" if overhead is None else f"{overhead:+.1%} a token"
    notes = [
        f"the forward makes the head's gradients too; peak memory of {result['peak_of']}: "
        f"{result['peak_bytes'] / 2**30:.2f} GiB",
        f"tracing cost {cost}" + ", against the step behind them" * (overhead is not None),
    ]
    shown = f"{result['steps'][0]}-{result['steps'][-1]}" if n > 1 else str(result["steps"][0])
    table(
        f"profile of step{'s' * (n > 1)} {shown}", ["phase", "seconds a step", "share"], rows, notes
    )
    rows = [
        [e["name"], f"{e['calls'] / n:.0f}", f"{e['self_seconds'] / n:.3f}", f"{e['share']:.1%}"]
        for e in result["operators"]
    ]
    columns = ["operators by their own time", "calls a step", "seconds a step", "share"]
    table("", columns, rows)
    say(f"\n{folder / TRACE}: open it in ui.perfetto.dev")
