"""How far a long stage is: a live bar or plain lines, and a row of metrics as one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from r1fast.metrics import LINE_WIDTH, console, launch_rank, line_width, say


def step_line(row: Mapping[str, Any], total: int | None = None, width: int = LINE_WIDTH) -> str:
    """The numbers of one row that a person watches, aligned, in at most `width` columns."""
    step = str(row.get("step", ""))
    head = f"{step:>{len(str(total))}}/{total}" if total else step
    fields: list[tuple[int, str]] = [(0, f"{row.get('stage', '')} {head}".strip())]

    def add(drop: int, text: str, name: str, form: Callable[[float], str]) -> None:
        """A field; the largest `drop` goes first where the line gets too long, 0 never does."""
        if (value := _number(row.get(name))) is not None:
            fields.append((drop, f"{text}{form(value)}"))

    if "reward" in row:
        accuracy = "verdicts/correct" if "verdicts/correct" in row else "rewards/accuracy/mean"
        std = _number(row.get("reward_std"))
        spread = "" if std is None else f"±{std:.2f}".replace("±0", "±")
        add(0, "  reward ", "reward", lambda v: f"{v:z4.2f}{spread}")
        add(0, "  acc ", accuracy, _share)
        add(1, " fmt ", "rewards/format/mean", _share)
        add(1, " lang ", "language_share", _share)
        add(0, "  len ", "completions/mean_length", lambda v: f"{v:3.0f}")
        add(3, "  kl ", "kl", lambda v: f"{v:.4f}".removeprefix("0") if 0 <= v < 1 else f"{v:5.3g}")
        add(4, " cut ", "completions/clipped_ratio", _share)
        if row.get("train/steps_without_signal"):  # optimizer steps left out
            add(0, "  no signal ", "train/steps_without_signal", lambda v: f"{v:.0f}")
        if row.get("train/updates_skipped"):
            add(0, "  skipped ", "train/updates_skipped", lambda v: f"{v:.0f}")
    else:
        add(0, "  loss ", "loss", lambda v: f"{v:6.4f}")
        add(1, "  acc ", "accuracy", _share)
        add(0, "  lr ", "learning_rate", lambda v: f"{v:.2e}")
        add(2, "  grad ", "grad_norm", lambda v: f"{v:6.3g}")
        add(3, "  epoch ", "epoch", lambda v: f"{v:.2f}")
    add(0, "  pass@1 ", "eval/pass@1", _share)
    if row.get("hacking/alarm"):
        fields.append((0, "  hacked?"))
    add(0, "  ", "step_time", lambda v: f"{v:3.1f}s" if v < 10 else f"{v:3.0f}s")
    add(2, " ", "tokens_per_second", lambda v: f"{_short(v):>4} tok/s")
    for drop in (4, 3, 2, 1):
        if sum(len(text) for _, text in fields) > width:
            fields = [field for field in fields if field[0] != drop]
    return "".join(text for _, text in fields)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _share(value: float) -> str:
    """.71, 1.0 and 0 in three columns."""
    text = f"{value:.2f}".removeprefix("0")
    return {".00": "  0", "1.00": "1.0"}.get(text, text)


def _short(value: float) -> str:
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{mark}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """4.2s, 1m05s, 2h03m."""
    if seconds < 59.95:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


class Progress:
    """A long stage: a live bar on a terminal, a plain line now and then in a log.

    `update(row)` counts one unit done and shows the row as one line every `line_every` units.
    `start` is what an earlier run had done. Silent when not `enabled` or on ranks other than 0.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "step",
        *,
        start: int = 0,
        line_every: int = 1,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.total, self.unit, self.done = title, total, unit, start
        self.start, self.line_every, self.clock = start, line_every, clock
        self.enabled = enabled and launch_rank() == 0
        self.began = clock()
        self._said_at, self._said_done = self.began, start
        self._bar: Any = None
        self._width = LINE_WIDTH

    def __enter__(self) -> Self:
        self.began = self._said_at = self.clock()
        if self.enabled and sys.stdout.isatty():
            self._width = line_width()
            self._bar = self._live_bar()
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self.done, info=self._info()
            )
        return self

    def update(self, row: Mapping[str, Any] | str | None = None, n: int = 1) -> None:
        """`n` more units are done; `row` is a metrics row, or a line that is ready to print."""
        last = self.done
        self.done += n
        if not self.enabled:
            return
        every = self.line_every
        if row and every and (last // every != self.done // every or self.done == self.total):
            say(row if isinstance(row, str) else step_line(row, self.total, self._width))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, info=self._info())
            return
        now = self.clock()
        since = now - self._said_at
        tenth = self.total is not None and (self.done - self._said_done) * 10 >= self.total
        if since >= 10 or (tenth and since >= 2):
            self._said_at, self._said_done = now, self.done
            share = f" {100 * self.done // self.total:3d}%" if self.total else ""
            say(f"{self.title}{share}  {self._info()}  elapsed {duration(now - self.began)}")

    def eta(self) -> float | None:
        """Seconds left at the mean speed so far."""
        did = self.done - self.start
        if self.total is None or did <= 0:
            return None
        return (self.clock() - self.began) / did * max(self.total - self.done, 0)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.enabled:
            count = f"{self.done} {self.unit}{'s' * (self.done != 1)}"
            if kind is None:
                say(f"{self.title}  {count} in {duration(self.clock() - self.began)}")
            else:
                of = f" of {self.total}" if self.total else ""
                say(f"{self.title}  stopped after {self.done}{of} {self.unit}s")

    def _info(self) -> str:
        of = f"/{self.total}" if self.total else ""
        eta = self.eta()
        left = "" if eta is None else f"  eta {duration(eta)}"
        return f"{self.done}{of} {self.unit}{left}"

    def _live_bar(self) -> Any:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        return Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[info]}", markup=False),
            TimeElapsedColumn(),
            console=console(),
            transient=True,
            refresh_per_second=4,
        )


progress = Progress  # `with progress("R1-Zero", total=60) as bar:`
