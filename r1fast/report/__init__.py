"""`r1fast report RUN`: one self-contained HTML page, and the stage table for the terminal.

A run folder is a pipeline's (manifest.json with "stages", one folder a stage) or a single stage's.
Whatever file is missing leaves its section out, so an unfinished run can be read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1fast import metrics
from r1fast.file_errors import naming
from r1fast.progress import duration
from r1fast.report.page import page
from r1fast.report.run import claim_rows, load_run, number, samples_note
from r1fast.report.sections import body


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path."""
    run = load_run(run_folder)
    title = str(run.manifest.get("title") or run.name)
    path = Path(run_folder) / "report.html"
    part = path.with_name("report.html.part")
    with naming(part):
        part.write_text(page(f"{title} · r1fast", body(run, title)), encoding="utf-8")
    part.replace(path)
    return path


def report_on(run_folder: str | Path) -> None:
    """Write the report of a run that has ended and say where it is; no failure of it ends the run."""
    try:
        metrics.say(f"\nreport: {write_report(run_folder)}")
    except Exception as error:
        metrics.warn(
            f"the run is complete, but its report could not be written: {type(error).__name__}: "
            f"{error}; `r1fast report {run_folder}` tries again"
        )


def print_stage_table(run_folder: str | Path) -> None:
    """The stage table and the claims on the terminal, in at most 100 columns.

    Where a table is too wide its least telling columns go; names are never broken.
    """
    run = load_run(run_folder)
    rows = []
    for s in run.stages:
        e = s.eval
        score, error = number(e.get("pass@1")), number(e.get("pass@1_stderr"))
        shares = [
            _terse(e.get(k)) for k in ("cons@k", "format_rate", "language_share", "wait_rate")
        ]
        length, seconds = number(e.get("mean_length")), s.seconds
        rows.append([
            _cut(s.title, 30),
            _cut(s.starts_from, 30),
            "-" if score is None else _terse(score) + ("" if error is None else f" ±{_terse(error)}"),
            *shares,
            "-" if length is None else f"{length:.0f}",
            _terse(e.get("clip_rate")),
            _cut(s.status, 8) if seconds is None else duration(seconds),
        ])  # fmt: skip
    columns = ["stage", "starts from", "pass@1", "cons@k", "fmt", "lang", "wait", "len"]
    columns, rows = _narrowed([*columns, "clip", "time"], rows)
    metrics.table(run.name, columns, rows, samples_note(run), whole=("stage", "starts from"))
    if claims := claim_rows(run):
        metrics.table("Claims", ["claim", "measured", "bar", ""], claims)


def _narrowed(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that fit the line."""
    for name in ("starts from", "clip", "cons@k", "fmt"):
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= metrics.line_width():
            break
        i = columns.index(name)
        columns, rows = columns[:i] + columns[i + 1 :], [row[:i] + row[i + 1 :] for row in rows]
    return columns, rows


def _terse(value: Any) -> str:
    """.985 and 1.0 for the terminal."""
    value = number(value)
    if value is None:
        return "-"
    shown = f"{value:.3f}"
    return "1.0" if shown == "1.000" else shown.removeprefix("0")


def _cut(value: str, room: int) -> str:
    return value if len(value) <= room else value[: room - 1] + "…"
