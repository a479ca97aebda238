"""The GRPO loss from hidden states: r1fast, its peers and the bare GEMMs of the same shape.

    python benchmarks/bench_loss.py [--shapes T,D,V ...] [--dtypes fp32 bf16] [--rounds N]
        [--variants NAME ...] [--modes ...] [--skip memory accuracy] [--budget SECONDS]
        [--json FILE] [--no-append]

One GEMM pass is 2 T D V FLOP; forward + backward is at least three, with a frozen head two, with
half of the rows dead one and a half. Every round measures every variant once, in turns; the table
holds the median and the minimum of the rounds and the ratio of the medians to the GEMMs'. The loss
is dapo without a reference model: old log-probabilities near the new, so that hardly a token is
clipped; groups of 8 sequences, in `half` every other group without advantage. Logits reach |z| of
about 30. The error is against float64. Peak extra memory, each in a process of its own: the
high-water mark less what was there before and less the returned gradients. `--summary FILE` prints
the table of a JSON file.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from common import append_rows, measured_here, print_table
from loss_variants import DTYPES, Problem, grpo_of, make_gemms, make_problem, make_variants
from torch import Tensor

CPU_SHAPES = ["2048,512,32000", "1024,896,151936", "512,2048,151936"]
GPU_SHAPES = ["16384,4096,151936"] + [f"16384,{D},151936" for D in (896, 1536, 2048, 3584)]
MODES = ("forward", "both", "frozen", "half")
TITLES = {
    "forward": "forward", "both": "forward+backward", "frozen": "frozen head",
    "half": "half without signal",
}  # fmt: skip


class Clock:
    """Seconds of one call: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, function: Callable) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def step(loss: Callable, p: Problem, mode: str) -> tuple[Tensor | None, ...]:
    """One call in a mode: (loss, dhidden, dweight)."""
    hidden = p.hidden.detach().requires_grad_(mode != "forward")
    weight = p.weight.detach().requires_grad_(mode in ("both", "half"))
    if weight.requires_grad and getattr(loss, "wide_dweight", False):
        weight.grad_dtype = torch.float32
    with torch.set_grad_enabled(mode != "forward"):
        value = loss(p, hidden, weight, mode == "half")
    if mode != "forward":
        value.backward()
    return value.detach(), hidden.grad, weight.grad


def measure(p: Problem, variants: dict, modes: list[str], rounds: int, seconds: float) -> dict:
    """(variant or library, mode or GEMM pass) -> seconds of each round; one of each in turns.

    What takes four times as long as the GEMMs or more is measured every fourth round.
    """
    device = p.hidden.device.type
    clock, jobs = Clock(device), {}
    for library, passes in make_gemms(p).items():
        for n, gemm in enumerate(passes):
            jobs[library, n] = gemm
    for mode in modes:
        for name, loss in variants.items():
            if name == "torch.compile" and mode == "frozen":
                continue  # one more graph to compile
            jobs[name, mode] = lambda loss=loss, mode=mode: step(loss, p, mode)
    broken = []
    for key, job in jobs.items():
        try:
            job()  # compiles, tunes, fills caches
        except torch.OutOfMemoryError as error:
            broken.append(key)
            print(f"skipped {key}: {str(error).splitlines()[0]}")
    for key in broken:
        del jobs[key]
    times = {key: [clock(job)] for key, job in jobs.items()}
    slow = 4 * sum(times["torch.mm", n][0] for n in range(3))
    often = {key: 4 if t[0] > slow else 1 for key, t in times.items()}
    deadline = time.perf_counter() + seconds
    for n in range(1, rounds):
        keys = [key for key in jobs if n % often[key] == 0]
        for key in keys[n % len(keys) :] + keys[: n % len(keys)]:
            times[key].append(clock(jobs[key]))
        if time.perf_counter() > deadline and n >= 3:
            break
    return times


def gemm_times(times: dict, statistic: Callable) -> tuple[dict[str, float], dict[str, float]]:
    """Mode -> seconds of its bare GEMMs on the fastest library for each, and on torch.mm."""
    best, plain = [], []
    for n in range(3):
        found = {key[0]: statistic(ts) for key, ts in times.items() if key[1] == n}
        best.append(min(found.values()))
        plain.append(found["torch.mm"])
    return tuple(
        {"forward": t[0], "both": sum(t), "frozen": t[0] + t[1], "half": sum(t)}
        for t in (best, plain)
    )


def errors(p: Problem, variants: dict) -> dict[str, dict[str, float]]:
    """Variant -> errors against float64: largest of the log-probabilities, Frobenius of gradients."""
    weight = p.weight.double()
    chunks = [
        slice(n, n + max(1, (1 << 24) // len(weight)))
        for n in range(0, len(p.ids), max(1, (1 << 24) // len(weight)))
    ]

    def logits(rows: slice) -> Tensor:
        return torch.log_softmax(p.hidden[rows].double() @ weight.t(), 1)

    exact = torch.cat([logits(c).gather(1, p.ids[c, None])[:, 0] for c in chunks]).requires_grad_()
    (g,) = torch.autograd.grad(grpo_of(exact, p, False), exact)
    dhidden, dweight = [], torch.zeros_like(weight)
    for rows in chunks:
        dz = logits(rows).exp_().mul_(-g[rows, None])
        dz.scatter_add_(1, p.ids[rows, None], g[rows, None])
        dhidden.append(dz @ weight)
        dweight += dz.t() @ p.hidden[rows].double()
    wanted = {"dhidden": torch.cat(dhidden), "dweight": dweight}
    found = {}
    for name, loss in variants.items():
        try:
            _, *gradients = step(loss, p, "both")
        except torch.OutOfMemoryError:
            continue
        found[name] = {
            f"{n} error": ((x.double() - wanted[n]).norm() / wanted[n].norm()).item()
            for n, x in zip(wanted, gradients, strict=True)
        }
        del gradients
        logprobs_of = getattr(loss, "logprobs", None)
        if logprobs_of is not None:
            with torch.no_grad():
                off = logprobs_of(p.hidden, p.weight, p.ids).double() - exact
            found[name]["logprob error"] = off.abs().max().item()
    return found


def peak_extra_bytes(loss: Callable, p: Problem, mode: str) -> int:
    """Of one call, after one at a small size; in this process."""
    small = Problem(
        p.hidden[:64], p.weight[:512], p.ids[:64] % 512, p.old[:64], p.advantages[:1], p.half[:1],
        p.cu_seqlens[:1].new_tensor([0, 64]),
    )  # fmt: skip
    step(loss, small, mode)
    gc.collect()
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step(loss, p, mode)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again from here
        before = _status_bytes("VmRSS")
        kept = step(loss, p, mode)
        peak = _status_bytes("VmHWM")
    return peak - before - sum(x.nbytes for x in kept[1:] if x is not None)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field + ":"))


def probe_memory(name: str, mode: str, shape: str, dtype: str, device: str) -> float | None:
    """`peak_extra_bytes` in a fresh process, whose allocator gives large blocks back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--probe", name, mode, shape, dtype, device],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"no memory figure for {name}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return float(done.stdout.split()[-1])


def probe(name: str, mode: str, shape: str, dtype: str, device: str) -> None:
    p = make_problem(*map(int, shape.split(",")), DTYPES[dtype], device, sample=False)
    print(peak_extra_bytes(make_variants(device, dtype)[name](), p, mode))


BOTH = "forward+backward"


def bar(label: str, name: str, value: float | None, limit: float, at_least: bool = False) -> str:
    """One of the bars that were set, with its number."""
    if value is None:
        return f"{label}: {name}: not measured"
    holds = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    return f"{label}: {name}: {value:.3g} ({sign} {limit:g}: {'holds' if holds else 'MISSED'})"


def over(cells: dict, a: tuple[str, str], b: tuple[str, str]) -> float | None:
    return cells[a] / cells[b] if a in cells and b in cells else None


def cpu_bars(label: str, dtype: str, cells: dict, ours: str, fast: str) -> list[str]:
    """At (2048, 512, 32000), of the default mode `ours`; `fast` lets PyTorch round bfloat16."""
    found = [bar(label, "over three GEMMs", over(cells, (ours, BOTH), ("GEMMs", BOTH)), 1.2)]
    if fast != ours:
        ratio = over(cells, (fast, BOTH), ("GEMMs", BOTH))
        found.append(bar(label, "fast mode over three GEMMs", ratio, 1.2))
    if dtype == "fp32":
        ratio = over(cells, (ours, BOTH), ("torch.mm", BOTH))
        found.append(bar(label, "over three torch.mm", ratio, 0.7))
    faster = {"materialised": 1.7, "Liger": 2.4 if dtype == "fp32" else 3.0, "TRL": 1.5}
    for peer, limit in faster.items():
        ratio = over(cells, (peer, BOTH), (ours, BOTH))
        found.append(bar(label, f"faster than {peer}", ratio, limit, True))
    ratio = over(cells, (ours, TITLES["half"]), (ours, BOTH))
    found.append(bar(label, "half without signal over full", ratio, 0.65))
    for name in (ours, "r1fast, fp32 dW"):
        if (name, "peak extra memory") in cells:
            ratio = over(cells, (name, "peak extra memory"), ("materialised", "logits"))
            found.append(bar(label, f"peak extra memory over logits ({name})", ratio, 0.125))
    error = cells.get((ours.replace("r1fast", "r1fast logprobs"), "logprob error"))
    found.append(bar(label, "logprob error", error, 5e-5 if dtype == "fp32" else 5e-4))
    return found


def gpu_bars(label: str, cells: dict) -> list[str]:
    """At the reference shape, on an H200."""
    peers = [cells[p, BOTH] for p in ("TRL", "CCE", "F.linear_cross_entropy") if (p, BOTH) in cells]
    cells = cells | {("best per-token peer", BOTH): min(peers)} if peers else cells
    frozen = cells.get(("r1fast", TITLES["frozen"]))
    memory = cells.get(("r1fast, fp32 dW", "peak extra memory"))
    forward = over(cells, ("GEMMs", "forward"), ("r1fast logprobs", "forward"))
    per_token = over(cells, ("best per-token peer", BOTH), ("r1fast", BOTH))
    return [
        bar(label, "forward throughput over the GEMM's", forward, 0.92, True),
        bar(label, "over three GEMMs", over(cells, ("r1fast", BOTH), ("GEMMs", BOTH)), 1.06),
        bar(label, "peak extra GB (fp32 dW)", None if memory is None else memory / 1e9, 1.3),
        bar(label, "faster than the best per-token peer", per_token, 1.3, True),
        bar(label, "faster than Liger", over(cells, ("Liger", BOTH), ("r1fast", BOTH)), 8, True),
        bar(label, "frozen head ms", None if frozen is None else 1e3 * frozen, 54),
        bar(label, "logprob error", cells.get(("r1fast logprobs", "logprob error")), 5e-4),
    ]


def run_shape(
    shape: str, dtype: str, args: argparse.Namespace, seconds: float
) -> tuple[list, list[str]]:
    """Measure one shape: (rows for results.csv, lines about the bars)."""
    T, D, V = map(int, shape.split(","))
    label = f"T={T} D={D} V={V} {dtype}"
    p = make_problem(T, D, V, DTYPES[dtype], args.device)
    variants = {}
    for name, make in make_variants(args.device, dtype).items():
        if args.variants and not any(wanted in name for wanted in args.variants):
            continue
        if name == "torch.compile" and shape != GPU_SHAPES[0]:
            continue  # it compiles for most of a minute at each shape
        try:
            variants[name] = make()
        except (ImportError, AttributeError) as error:
            print(f"skipped {name}: {error}")
    print(f"{label}: measuring {', '.join(variants)}", flush=True)
    times = measure(p, variants, args.modes, args.rounds, seconds)
    cells = {("materialised", "logits"): float(T * V * p.hidden.element_size())}
    rows, table = [], []
    for statistic, suffix in ((statistics.median, ""), (min, " min")):
        best, plain = gemm_times(times, statistic)
        for mode in args.modes:
            for name, value in (("GEMMs", best[mode]), ("torch.mm", plain[mode])):
                cells[name, TITLES[mode] + suffix] = value
                rows.append((label, name, TITLES[mode] + suffix, 1e3 * value, "ms"))
        for (name, mode), found in times.items():
            if mode in TITLES:
                value = statistic(found)
                cells[name, TITLES[mode] + suffix] = value
                rows.append((label, name, TITLES[mode] + suffix, 1e3 * value, "ms"))
    if "accuracy" not in args.skip:
        for name, found in errors(p, variants).items():
            for metric, value in found.items():
                cells[name, metric] = value
                rows.append((label, name, metric, value, "nats" if "log" in metric else "relative"))
    if args.device != "cuda":
        del p  # the processes that measure memory make their own
        gc.collect()
    if "memory" not in args.skip and "both" in args.modes:
        for name, loss in variants.items():
            if args.device == "cuda":  # its allocator counts for itself
                value = peak_extra_bytes(loss, p, "both") if (name, "both") in times else None
            else:
                value = probe_memory(name, "both", shape, dtype, args.device)
            if value is not None:
                cells[name, "peak extra memory"] = value
                rows.append((label, name, "peak extra memory", value / 2**20, "MiB"))
    columns = [TITLES[m] for m in args.modes]
    for name in ["GEMMs", "torch.mm", *variants]:
        line = [name]
        for c in columns:
            value, low = cells.get((name, c)), cells.get((name, c + " min"))
            line += ["", ""] if value is None else [
                f"{1e3 * value:.4g} ({1e3 * low:.4g})", f"{value / cells['GEMMs', c]:.2f}x",
            ]  # fmt: skip
        memory = cells.get((name, "peak extra memory"))
        line.append("" if memory is None else f"{memory / 2**20:,.0f}")
        for metric in ("logprob error", "dhidden error", "dweight error"):
            value = cells.get((name, metric))
            line.append("" if value is None else f"{value:.1e}")
        table.append(line)
    print(
        f"\n{label}: median (min) ms of {max(map(len, times.values()))} rounds, ratio to the GEMMs"
    )
    header = [dtype, *(x for c in columns for x in (c, "ratio"))]
    print_table([*header, "MiB", "logprob error", "dhidden error", "dweight error"], table)
    sys.stdout.flush()
    ours = fast = "r1fast"
    if "r1fast fast" in variants:
        ours, fast = "r1fast exact", "r1fast fast"
    if args.device == "cpu" and shape == CPU_SHAPES[0]:
        return rows, cpu_bars(label, dtype, cells, ours, fast)
    if args.device == "cuda" and shape == GPU_SHAPES[0]:
        return rows, gpu_bars(label, cells)
    peers = [name for name in variants if not name.startswith("r1fast")]
    return rows, [
        bar(label, f"faster than {peer}", over(cells, (peer, BOTH), (ours, BOTH)), 1.0, True)
        for peer in peers
    ]


def show_summary(path: str) -> None:
    """A short table of a JSON file: milliseconds and ratios to the bare GEMMs."""
    with open(path) as file:
        measured = json.load(file)
    cells = {(shape, name, metric): value for shape, name, metric, value, _ in measured["rows"]}
    table = []
    for shape in dict.fromkeys(key[0] for key in cells):
        for name in dict.fromkeys(key[1] for key in cells if key[0] == shape):
            line = [shape, name]
            for metric in TITLES.values():
                value, bare = cells.get((shape, name, metric)), cells.get((shape, "GEMMs", metric))
                line.append("" if value is None else f"{value:.4g} ({value / bare:.2f}x)")
            memory = cells.get((shape, name, "peak extra memory"))
            error = cells.get((shape, name, "logprob error"))
            line.append("" if memory is None else f"{memory:,.0f}")
            line.append("" if error is None else f"{error:.1e}")
            table.append(line)
    date, commit, device, version, _ = measured["head"]
    print(f"{device}, torch {version}, commit {commit}, {date}: ms (over the GEMMs)")
    print_table(["shape", "variant", *TITLES.values(), "MiB", "logprob error"], table)
    for line in measured["bars"]:
        print(line)


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:
        probe(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", help="T,D,V ...")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, help="at most; default 7, on a GPU 30")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds of timing in all")
    parser.add_argument("--variants", nargs="+", default=[], help="parts of the names to run")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--skip", nargs="+", choices=["memory", "accuracy"], default=[])
    parser.add_argument("--json", help="write the rows there too")
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    parser.add_argument("--summary", help="print the table of such a JSON file, measure nothing")
    args = parser.parse_args()
    if args.summary:
        show_summary(args.summary)
        return
    on_gpu = args.device == "cuda"
    args.rounds = args.rounds or (30 if on_gpu else 7)
    jobs = [
        (shape, dtype)
        for shape in args.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
        for dtype in args.dtypes or (["bf16"] if on_gpu else ["fp32", "bf16"])
    ]
    all_rows, all_lines, left = [], [], args.budget
    for n, (shape, dtype) in enumerate(jobs):
        work = [math.prod(map(int, s.split(","))) for s, _ in jobs[n:]]
        start = time.perf_counter()
        rows, lines = run_shape(shape, dtype, args, left * work[0] / sum(work))
        left = max(0.0, left - (time.perf_counter() - start))
        all_rows += rows
        all_lines += lines
        if not args.no_append:
            append_rows("loss", rows)
        if args.json:
            with open(args.json, "w") as file:
                measured = {"head": measured_here("loss"), "rows": all_rows, "bars": all_lines}
                json.dump(measured, file, indent=1)
    print("\nbars")
    for line in all_lines:
        print(f"  {line}")


if __name__ == "__main__":
    main()
