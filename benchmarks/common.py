"""What the benchmarks share: the machine's name, rows of results.csv, and RESULTS.md made from them.

`python benchmarks/common.py` rewrites RESULTS.md: the newest value of every cell, per device.
Given JSON files that gpu.sh brought back from another machine, it adds their rows first.
"""

import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.csv"
COLUMNS = "date commit device torch benchmark shape variant metric value unit".split()


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of usable cores and, without AVX-512, what it has instead.

    Some machines of one name have AVX-512, some have not, and then other code runs.
    """
    import torch

    from r1fast.kernels.cpu_attention import level

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    vectors = "" if level() == "avx512" else f"{level()}, "
    return f"{name}, {vectors}{torch.get_num_threads()} threads"


def commit_id() -> str:
    """The short commit; "+" follows when the code that was measured is not all committed.

    The environment's COMMIT goes before git's, for a copy without a history.
    """
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=FOLDER, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = git(
        "status", "--porcelain", "--", ":/csrc", ":/kernels", ":/r1fast", ":/benchmarks/*.py"
    )
    return commit + "+" * bool(changed)


def measured_here(benchmark: str) -> list[str]:
    """The columns of results.csv that say when, on what and by which code."""
    import torch

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return [now, commit_id(), device_name(), torch.__version__, benchmark]


def append_rows(
    benchmark: str,
    rows: Iterable[tuple[str, str, str, float, str]],
    head: list[str] | None = None,
) -> None:
    """Add (shape, variant, metric, value, unit) rows to results.csv, measured here unless `head`."""
    head = head or measured_here(benchmark)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for shape, variant, metric, value, unit in rows:
            writer.writerow([*head, shape, variant, metric, f"{value:.6g}", unit])


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as needed; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    for line in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]))


def results_page(rows: list[dict[str, str]]) -> str:
    """RESULTS.md: a section per benchmark, a table per device, a column per variant."""
    page = [
        "# Benchmark results",
        "",
        "Made from results.csv by `python benchmarks/common.py`; do not edit. Each cell is the newest",
        "measurement. `make bench` measures again, here. A commit with `+` had uncommitted changes.",
    ]
    for benchmark in sorted({row["benchmark"] for row in rows}):
        page += ["", f"## {benchmark}"]
        of_benchmark = [row for row in rows if row["benchmark"] == benchmark]
        for device in dict.fromkeys(row["device"] for row in of_benchmark):
            of_device = [row for row in of_benchmark if row["device"] == device]
            page += ["", *_device_table(device, of_device)]
    return "\n".join(page) + "\n"


def _device_table(device: str, rows: list[dict[str, str]]) -> list[str]:
    newest = {}  # (shape, metric, unit) -> variant -> row; rows are in the order of measurement
    for row in rows:
        newest.setdefault((row["shape"], row["metric"], row["unit"]), {})[row["variant"]] = row
    shown = [row for cells in newest.values() for row in cells.values()]
    variants = list(dict.fromkeys(row["variant"] for row in shown))

    def joined(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in shown))

    dates = sorted({row["date"][:10] for row in shown})
    period = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        f"**{device}** (torch {joined('torch')}; commit {joined('commit')}; {period})",
        "",
        f"| shape | metric | {' | '.join(variants)} |",
        "|---|---|" + "---:|" * len(variants),
    ]
    for (shape, metric, unit), cells in newest.items():
        values = [_shown(float(cells[v]["value"])) if v in cells else "" for v in variants]
        lines.append(f"| {shape} | {metric} ({unit}) | {' | '.join(values)} |")
    return lines


def _shown(value: float) -> str:
    """0.019238, 99.997 or 43,117."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"


def main() -> None:
    for path in sys.argv[1:]:
        measured = json.loads(Path(path).read_text())
        append_rows(measured["head"][-1], measured["rows"], measured["head"])
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (FOLDER / "RESULTS.md").write_text(results_page(rows))
    print(f"benchmarks/RESULTS.md: {len(rows)} rows of results.csv")


if __name__ == "__main__":
    main()
