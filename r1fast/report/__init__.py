"""`r1fast report RUN`: one self-contained HTML page, and the stage table for the terminal.

A run folder is a pipeline's (manifest.json with "stages", one folder a stage) or a single stage's.
Whatever file is missing leaves its section out, so an unfinished run can be read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1fast import metrics
from r1fast.metrics import duration
from r1fast.report.page import page
from r1fast.report.run import claim_rows, load_run, number, samples_note
from r1fast.report.sections import body


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path."""
    run = load_run(run_folder)
    title = str(run.manifest.get("title") or run.name)
    path = Path(run_folder) / "report.html"
    part = path.with_name("report.html.part")
    part.write_text(page(f"{title} · r1fast", body(run, title)), encoding="utf-8")
    part.replace(path)
    return path


def print_stage_table(run_folder: str | Path) -> None:
    """The stage table and the claims on the terminal, in at most 100 columns."""
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
            _cut(s.title, 20),
            _cut(s.starts_from, 14),
            "-" if score is None else _terse(score) + (f" ±{_terse(error)}" if error else ""),
            *shares,
            "-" if length is None else f"{length:.0f}",
            _terse(e.get("clip_rate")),
            _cut(s.status, 8) if seconds is None else duration(seconds),
        ])  # fmt: skip
    columns = ["stage", "starts from", "pass@1", "cons@k", "format", "lang", "wait", "length"]
    metrics.table(run.name, [*columns, "clip", "time"], rows, samples_note(run))
    if claims := claim_rows(run):
        metrics.table("Claims", ["claim", "measured", "bar", ""], claims)


def _terse(value: Any) -> str:
    """.985 and 1.0 for the terminal."""
    value = number(value)
    if value is None:
        return "-"
    shown = f"{value:.3f}"
    return "1.0" if shown == "1.000" else shown.removeprefix("0")


def _cut(value: str, room: int) -> str:
    return value if len(value) <= room else value[: room - 1] + "…"
