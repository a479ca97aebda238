"""What a run says: terminal lines, tables, metrics.jsonl. The only module that prints.

A row of metrics.jsonl is {"step": n, "stage": ..., "time": unix seconds, name: value, ...}; what its
numbers are is in metric_help.py.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from r1fast.metric_rows import cut_back, parse_lines

LOGGER_EXTRA = "loggers"  # pip install r1fast[loggers]
LINE_WIDTH = 100
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # where a log goes


def say(text: str = "") -> None:
    """One line (or several) on stdout; silent on ranks other than 0."""
    if launch_rank() == 0:
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
    if launch_rank() == 0:
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
    rank = launch_rank()
    text = f"warning: {text}" if rank == 0 else f"warning (rank {rank}): {text}"
    _write(sys.stderr, _wrapped(text) if sys.stderr.isatty() else text)


def note(text: str) -> None:
    """One line on stderr that is no warning; silent on ranks other than 0."""
    if launch_rank() == 0:
        _write(sys.stderr, text)


def line_width() -> int:
    """Columns that lines and tables may take."""
    return min(console().width, LINE_WIDTH)


def rule(title: str) -> None:
    """A line across the terminal with a title in it."""
    if launch_rank() == 0:
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

    The cells of `whole` columns stay on one line. Where the table is wider than the terminal headings and texts break
    at spaces, and inside a word only where that is not enough.
    """
    if launch_rank() != 0:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        assert len(row) == len(columns), (columns, row)
    shared = console()
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    by_column = [[row[i] for row in cells] for i in range(len(columns))]
    kept = [
        name in whole or all(_is_number(cell) or _is_amount(cell) for cell in column)
        for name, column in zip(columns, by_column, strict=True)
    ]
    widths = _widths(columns, by_column, kept, line_width() - 2 * (len(columns) - 1))
    for name, column, keep, width in zip(columns, by_column, kept, widths, strict=True):
        numeric = any(column) and all(_is_number(cell) for cell in column)
        grid.add_column(
            Text(textwrap.fill(name, width, break_on_hyphens=False) if width else name),
            justify="right" if numeric and name not in left else "left",
            no_wrap=numeric or name in whole or (keep and width is not None),
            overflow="fold",
            width=width,
        )
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    _write(sys.stdout, f"\n{title}\n" if title else "")
    with shared.capture() as capture:
        shared.print(grid, width=line_width())
    _write(sys.stdout, "\n".join(line.rstrip() for line in capture.get().splitlines()))
    for note in [notes] if isinstance(notes, str) else notes:
        _write(sys.stdout, _wrapped(note))


_NUMBER = re.compile(
    r"[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?( ?± ?[\d.]+)?[a-z%]{0,2}|\d+[hm]\d+[ms]|-?"
)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_amount(text: str) -> bool:
    """117 MiB, 0.2 s."""
    number, _, unit = text.rpartition(" ")
    return bool(number) and _is_number(number) and unit.isalpha() and len(unit) <= 3


def _widths(
    columns: Sequence[str], cells: Sequence[Sequence[str]], kept: Sequence[bool], room: int
) -> list[int | None]:
    """Such that no word breaks, and no cell of the columns that are `kept`; None, for rich to choose, where all fits
    as it is, or not even so."""
    from rich.cells import cell_len

    widths, least = [], []
    for name, column, keep in zip(columns, cells, kept, strict=True):
        words = [*name.split(), *(column if keep else " ".join(column).split())]
        least.append(max(map(cell_len, words), default=0))
        widths.append(max(map(cell_len, [name, *column])))
    if sum(widths) <= room or sum(least) > room:
        return [None] * len(widths)
    while sum(widths) > room:
        _, widest = max((w, i) for i, w in enumerate(widths) if w > least[i])
        widths[widest] -= 1
    return widths


def launch_rank() -> int:
    """As the launcher says: there may be no process group yet."""
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


def console() -> Any:
    """rich's own console: live bars must share one. 100 columns when piped."""
    import rich

    console = rich.get_console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LINE_WIDTH
    return console


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
        drop_rows(self.path, resume_step, has_every_step=True)
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
    """The rows of a metrics.jsonl (or of the one in a folder). A last line that was cut off is left out.

    Raises ValueError for any other line that is no row.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    found = parse_lines(path)
    if found.damaged:
        number, line, why = found.damaged[0]
        raise ValueError(
            f"{path}:{number} is not a metrics row ({why}): {line.decode(errors='replace')!r:.80}. Delete the "
            "line, or start the run again, which moves it to a file of its own"
        )
    return [row for _, row in found.rows]


def drop_rows(path: Path, resume_step: int | None, *, has_every_step: bool = False) -> None:
    """Rewrite `path` without rows after `resume_step`; says what else is odd in it (`metric_rows.cut_back`)."""
    for text in cut_back(path, resume_step, has_every_step=has_every_step):
        warn(text)


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
