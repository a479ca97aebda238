"""What a run says: terminal lines, progress bars, tables, metrics.jsonl. The only module that prints.

Every number a row of metrics.jsonl can hold is in `METRIC_HELP`; the names are TRL's where TRL has
one. A row is {"step": n, "stage": ..., "time": unix seconds, name: value, ...}.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

# name -> (unit, meaning); <...> stands for any word
METRIC_HELP: dict[str, tuple[str, str]] = {
    "reward": ("", "mean reward of the step's completions"),
    "reward_std": ("", "standard deviation of the reward inside a group, mean over groups"),
    "frac_reward_zero_std": ("share", "groups whose completions all earned the same: no gradient"),
    "rewards/<name>/mean": ("", "mean of one reward, unweighted, where it applies"),
    "rewards/<name>/std": ("", "standard deviation of one reward over the step's completions"),
    "completions/mean_length": ("tokens", "mean length of a completion"),
    "completions/min_length": ("tokens", "shortest completion"),
    "completions/max_length": ("tokens", "longest completion"),
    "completions/mean_terminated_length": ("tokens", "mean length of completions that stopped"),
    "completions/mean_verified_length": ("tokens", "mean length where an answer can be verified"),
    "completions/clipped_ratio": ("share", "completions cut off at max_completion_tokens"),
    "verdicts/<verdict>": ("share", "completions with this verdict, of those that can be verified"),
    "sandbox/level": ("", "rung of the ladder that code runs on, 0 is the best; see sandbox.json"),
    "wait_rate": ("share", "verified completions with a reflection word (wait, re-check ...)"),
    "language_share": ("share", "words of the reasoning that are in the target language"),
    "kl": ("nats", "k3 estimate of KL(policy, reference) per token"),
    "entropy": ("nats", "entropy of the policy per completion token"),
    "clip_ratio/low_mean": ("share", "tokens clipped from below (ratio small, advantage below 0)"),
    "clip_ratio/high_mean": ("share", "tokens clipped from above (ratio large, advantage above 0)"),
    "clip_ratio/region_mean": ("share", "tokens clipped on either side"),
    "logprob_mismatch/mean": ("nats", "mean |sampler logprob - trainer logprob| per token"),
    "logprob_mismatch/max": ("nats", "largest |sampler logprob - trainer logprob|"),
    "logprob_mismatch/graph_max": (
        "nats",
        "largest |logprob in the loss - that of the forward with the gradient|, if batch_invariant",
    ),
    "rollout/preemptions": ("", "samples whose cache was taken away and computed again"),
    "rollout/prefix_hit_rate": ("share", "prompt tokens that were found in the prefix cache"),
    "rollout/acceptance": ("share", "drafted tokens that were what was sampled"),
    "rollout/cache_mib": (
        "MiB",
        "keys and values held at once, at most since the start, all ranks",
    ),
    "train/token_budget": ("tokens", "a micro-batch may have; halved where memory ran out"),
    "rollout/groups_generated": ("", "groups begun in dynamic sampling, over all ranks"),
    "rollout/groups_kept": ("", "groups with signal that the step learns from"),
    "rollout/groups_missing": ("", "prompts_per_step less groups_kept: the batch was not filled"),
    "rollout/oversampling": ("", "groups begun over prompts_per_step"),
    "rollout/tokens_discarded": (
        "share",
        "sampled tokens of groups that the step does not learn from",
    ),
    "rollout/tokens_aborted": (
        "tokens",
        "of groups stopped because the batch was full before them",
    ),
    "train/tokens_forwarded": ("tokens", "forwarded by the policy in training, all ranks"),
    "train/rank_imbalance": ("", "largest number of tokens forwarded by a rank, over the mean"),
    "train/tokens_saved": (
        "share",
        "not forwarded: shared prompts, and completions without signal",
    ),
    "train/tokens_without_signal": ("share", "completion tokens dropped, their advantage being 0"),
    "train/tokens_masked": ("share", "completion tokens without loss: cut off, mask_truncated"),
    "train/old_logprobs_recomputed": ("", "1 where the sampler's were too far from the trainer's"),
    "judge/requests": ("", "sent to the judge in this step, retries included"),
    "judge/retries": ("", "requests to the judge that were sent again"),
    "judge/cached": ("", "judgements that were known from before"),
    "judge/failed": ("", "judgements that were not to be had: they count as no score"),
    "judge/tokens": ("tokens", "that the judge read and wrote in this step"),
    "judge/position_bias": (
        "",
        "first response preferred less second preferred, over judgements: 0 is none, 1 always the first",
    ),
    "judge/inconsistent": (
        "share",
        "comparisons whose two orders prefer different responses: ties",
    ),
    "hacking/fall": ("standard errors", "held-out pass@1 below the best evaluation looked back on"),
    "hacking/rise": ("standard errors", "training reward above that of the same evaluation"),
    "hacking/alarm": ("", "1 where both are above monitor.num_errors: the reward may be hacked"),
    "train/steps_without_signal": ("", "optimizer steps left out: nothing in them had signal"),
    "train/updates_skipped": ("", "optimizer steps not applied: their gradient was not finite"),
    "reference/version": ("", "optimizer step whose weights the reference had in this step's KL"),
    "ratio": ("", "mean of policy probability over sampler probability, per token; 1 on policy"),
    "loss": ("", "training loss"),
    "grad_norm": ("", "norm of the gradient before clipping"),
    "learning_rate": ("", "learning rate of the step"),
    "accuracy": ("share", "reward model: pairs in the right order, or labels on the right side"),
    "num_tokens": ("tokens", "tokens seen since the start of the stage"),
    "epoch": ("epochs", "passes over the training data"),
    "step_time": ("s", "wall time of the step"),
    "tokens_per_second": ("tokens/s", "prompt and completion tokens over step_time"),
    "time/<phase>": ("s", "wall time of one phase of the step"),
    "eval/pass@1": ("share", "mean correctness over k samples a problem"),
    "eval/pass@1_stderr": ("share", "standard error of pass@1 over problems"),
    "checkpoint/seconds": ("s", "that the step before waited for its checkpoint"),
    "checkpoint/write_seconds": (
        "s",
        "writing and reading back of the last checkpoint that is done",
    ),
    "checkpoint/bytes": ("bytes", "size of that checkpoint"),
    "eval/accuracy": ("share", "accuracy of a reward model on the held-out rows"),
    "eval/loss": ("", "loss of a reward model on the held-out rows"),
    "eval/cons@k": ("share", "problems whose majority answer is correct"),
    "eval/format_rate": ("share", "evaluation samples in the asked format"),
    "eval/language_share": ("share", "language_share of the evaluation samples"),
    "eval/wait_rate": ("share", "wait_rate of the evaluation samples"),
    "eval/mean_length": ("tokens", "mean length of the evaluation samples"),
    "eval/clip_rate": ("share", "evaluation samples cut off at the token limit"),
}

LOGGER_EXTRA = "loggers"  # pip install r1fast[loggers]
LINE_WIDTH = 100
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # where a log goes


def metric_help(name: str) -> tuple[str, str]:
    """(unit, meaning) of a metric; ("", "") where the name is not one of ours."""
    if name in METRIC_HELP:
        return METRIC_HELP[name]
    for pattern, text in METRIC_HELP.items():
        head, sep, tail = pattern.partition("<")
        tail = tail.partition(">")[2]
        if sep and name.startswith(head) and name.endswith(tail):
            return text
    return "", ""


def say(text: str = "") -> None:
    """One line (or several) on stdout; silent on ranks other than 0."""
    if _rank() == 0:
        _write(sys.stdout, text)


def say_wrapped(text: str, indent: str = "  ") -> None:
    """A sentence on stdout, broken between words; its further lines are indented."""
    say(_wrapped(text, indent))


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(
        text,
        line_width(),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def say_part(text: str) -> None:
    """Text on stdout that goes on in the same line; silent on ranks other than 0."""
    if _rank() == 0:
        _write(sys.stdout, text, end="")


def printable(text: str) -> str:
    """`text` with control characters made visible, so that a model cannot drive the terminal."""
    return "".join(
        chr(0x2400 + ord(c))
        if c < " " and c not in "\n\t"
        else "\ufffd"
        if "\x7f" <= c < "\xa0"
        else c
        for c in text
    )


def warn(text: str) -> None:
    """One line on stderr, once per distinct text."""
    _warn_once(text)


@functools.cache
def _warn_once(text: str) -> None:
    rank = _rank()
    text = f"warning: {text}" if rank == 0 else f"warning (rank {rank}): {text}"
    _write(sys.stderr, _wrapped(text) if sys.stderr.isatty() else text)


def note(text: str) -> None:
    """One line on stderr that is no warning; silent on ranks other than 0."""
    if _rank() == 0:
        _write(sys.stderr, text)


def line_width() -> int:
    """Columns that lines and tables may take."""
    return min(_console().width, LINE_WIDTH)


def rule(title: str) -> None:
    """A line across the terminal with a title in it."""
    if _rank() == 0:
        width = line_width()
        _write(sys.stdout, f"\n── {title} ".ljust(width + 1, "─"))


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] | str = (),
    *,
    whole: Sequence[str] = (),
    left: Sequence[str] = (),
) -> None:
    """A table on stdout. Columns that hold only numbers, shares and marks are right-aligned, unless
    they are among `left`, as names are that may be numbers.

    The cells of `whole` columns stay on one line.
    """
    if _rank() != 0:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        assert len(row) == len(columns), (columns, row)
    console = _console()
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, name in enumerate(columns):
        column = [row[i] for row in cells]
        numeric = any(column) and all(_is_number(cell) for cell in column)
        grid.add_column(
            Text(name),
            justify="right" if numeric and name not in left else "left",
            no_wrap=numeric or name in whole,
            overflow="fold",
        )
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    _write(sys.stdout, f"\n{title}\n" if title else "")
    with console.capture() as capture:
        console.print(grid, width=line_width())
    _write(sys.stdout, "\n".join(line.rstrip() for line in capture.get().splitlines()))
    for note in [notes] if isinstance(notes, str) else notes:
        _write(sys.stdout, _wrapped(note))


_NUMBER = re.compile(
    r"[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?( ?± ?[\d.]+)?[a-z%]{0,2}|\d+[hm]\d+[ms]|-?"
)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _rank() -> int:
    rank = os.environ.get("RANK", "0")  # set by torchrun
    return int(rank) if rank.isdigit() else 0


def _write(stream: Any, text: str, end: str = "\n") -> None:
    """Print, with characters that the terminal cannot show replaced rather than raised on.

    A log on a full disk, or a terminal that is gone, loses text and ends nothing.
    """
    encoding = getattr(stream, "encoding", None)  # None while a live bar stands in for stdout
    encoding = encoding or getattr(sys.__stdout__, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end=end, file=stream, flush=True)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise


def _console() -> Any:
    """rich's own console: live bars must share one. 100 columns when piped."""
    import rich

    console = rich.get_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LINE_WIDTH
    return console


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
        self.enabled = enabled and _rank() == 0
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
            console=_console(),
            transient=True,
            refresh_per_second=4,
        )


progress = Progress  # `with progress("R1-Zero", total=60) as bar:`


class Timer:
    """Seconds per phase: `with timer("rollout"): ...`, then `timer.take()`.

    Phases may nest and repeat; a nested phase counts in its parent too. `sync` runs before each
    reading of the clock (torch.cuda.synchronize where the time of queued work should count). `part`s
    of a phase are timed while there is a `mark`, a profiler's range of a name; every phase gets one then.
    """

    mark: Callable[[str], AbstractContextManager] | None = None

    def __init__(
        self,
        sync: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda phase: None,  # told as each begins
    ):
        self.sync, self.clock, self.on_phase = sync, clock, on_phase
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with nullcontext() if self.mark is None else self.mark(phase):
            self.on_phase(phase)
            self._running.append(phase)
            began = self._now()
            try:
                yield
            finally:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - began
                self._running.pop()

    def part(self, name: str) -> AbstractContextManager:
        """`with timer.part("forward"):` times "train/forward" inside of "train"; without a mark nothing."""
        if self.mark is None:
            return nullcontext()
        return self("/".join([*self._running[-1:], name]))

    def seconds(self) -> dict[str, float]:
        """{"rollout": seconds, "rollout/decode": seconds, ...} since the last `take`."""
        return dict(self._seconds)

    def phase_seconds(self) -> dict[str, float]:
        """{"time/rollout": seconds, ...} since the last `take`, without parts."""
        return {f"time/{phase}": x for phase, x in self._seconds.items() if "/" not in phase}

    def take(self) -> dict[str, float]:
        """`phase_seconds()`, and start again from zero."""
        seconds = self.phase_seconds()
        self._seconds.clear()
        return seconds

    def _now(self) -> float:
        if self.sync is not None:
            self.sync()
        return self.clock()


class MetricsWriter:
    """Rows to `folder/metrics.jsonl`, one flush each; TensorBoard and wandb where asked for.

    `resume_step`: the last step that the loaded checkpoint has seen. Later rows of an earlier run
    are dropped, so no step appears twice; -1 drops all of them, None keeps all.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        stage: str = "",
        tensorboard: bool = False,
        wandb: bool = False,
        project: str = "r1fast",
        run_name: str | None = None,
        config: Mapping | None = None,
        resume_step: int | None = None,
    ):
        self.folder, self.stage = Path(folder), stage
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self._board = _tensorboard(self.folder, resume_step) if tensorboard else None
        self._wandb = _wandb(self.folder, project, run_name, config) if wandb else None
        drop_rows(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""  # what a full disk has not taken yet

    def write(self, step: int, values: Mapping[str, Any], stage: str | None = None) -> dict:
        """Append one row and return it. NaN and inf become null, named under "nonfinite".

        A full disk is a warning: the row waits for the next one.
        """
        row: dict[str, Any] = {
            "step": int(step),
            "stage": self.stage if stage is None else stage,
            "time": round(time.time(), 3),
        }
        nonfinite = []
        for name, value in values.items():
            if name in row:
                continue
            value = value.item() if hasattr(value, "item") else value
            if isinstance(value, float) and not math.isfinite(value):
                nonfinite.append(name)
                value = None
            row[name] = value
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._unwritten += (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._write_waiting()
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "time"}
        if self._board is not None:
            for name, value in numbers.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log(numbers, step=int(step))
        return row

    def _write_waiting(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            warn(f"{self.path} could not be written, its rows wait for the next step: {error}")

    def close(self) -> None:
        self._write_waiting()
        if num_lost := self._unwritten.count(b"\n"):
            warn(f"{self.path} lacks its last {num_lost} rows, which could not be written")
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl (or of the one in a folder). A torn last line is left out."""
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    return _parse_rows(path)[0]


def _parse_rows(path: Path) -> tuple[list[dict], bool]:
    """(rows, whether the last line was torn: a crash in the middle of a write)."""
    lines = path.read_bytes().split(b"\n")
    rows: list[dict] = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if any(rest.strip() for rest in lines[i + 1 :]):
                raise ValueError(f"{path}:{i + 1} is not a metrics row: {error}") from None
            return rows, True
    return rows, bool(lines[-1].strip())  # a whole row whose newline is missing


def drop_rows(path: Path, resume_step: int | None) -> None:
    """Rewrite `path` without rows after `resume_step` and without a torn last line."""
    if not path.exists():
        return
    rows, torn = _parse_rows(path)
    keep = [r for r in rows if resume_step is None or r.get("step", 0) <= resume_step]
    if len(keep) == len(rows) and not torn:
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in keep)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def _wandb(folder: Path, project: str, name: str | None, config: Mapping | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    return wandb.init(
        project=project,
        name=name,
        dir=str(folder),
        config=dict(config or {}),
        mode=os.environ.get("WANDB_MODE", "offline"),
    )


def _missing(package: str) -> ValueError:
    return ValueError(
        f"log.{package} = true needs the package {package!r}, which is not installed; "
        f"pip install 'r1fast[{LOGGER_EXTRA}]', or set log.{package} = false"
    )
