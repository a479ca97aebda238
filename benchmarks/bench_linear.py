"""The three products of a linear layer in training, r1fast's on the CPU against PyTorch's (MKL, oneDNN), in turns.

    python benchmarks/bench_linear.py [--threads 1 2] [--dtypes fp32 bf16] [--tokens 64 512 2048] [--rounds 9] [--no-append]

y = x W^T, dx = dy W and dW = dy^T x of T tokens and a weight (N, D) of the widths of checkpoint A (bench_rollout.py) and of
Qwen2.5-0.5B. Quoted: GFLOP/s of 2 T D N over the median of wall seconds, with packing and conversions; the error of the
result against the float64 product of the same factors, of its norm; the geometric means of the ratios of what C++
computes; and, as what this machine gives, the highest rate that any product of the type reached in the run, one of 2048 x
2048 x 2048 among them. "own" says whether C++ computes it (kernels/linear.py chooses by the processor, the dtypes and the
shapes): where it does not, both columns are PyTorch.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import append_rows, print_table
from torch import Tensor

from r1fast.kernels.linear import (
    is_native,
    is_sampled,
    is_widened,
    linear_dweight,
    linear_dx,
    linear_fwd,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = {  # (N, D)
    "A qkv": (512, 256), "A gate and up": (2048, 256),
    "0.5B out": (896, 896), "0.5B gate and up": (9728, 896), "0.5B down": (896, 4864),
}  # fmt: skip
VARIANTS = ["r1fast", "PyTorch"]
Product = Callable[[], Tensor]


def products(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, tuple[Product, Product, bool]]:
    """Name -> (r1fast's, PyTorch's, whether the former is not the latter)."""
    return {
        "y": (
            lambda: linear_fwd(x, weight, None),
            lambda: F.linear(x, weight),
            is_native(x, weight) or is_sampled(x, weight) or is_widened(x, weight),
        ),
        "dx": (
            lambda: linear_dx(dy, weight),
            lambda: dy @ weight,
            is_native(dy, weight.t()) or is_widened(dy, weight),
        ),
        "dW": (
            lambda: linear_dweight(dy, x),
            lambda: dy.t() @ x,
            is_native(x, weight) or is_widened(dy, x),
        ),
    }


def median_seconds(ops: list[Product], rounds: int) -> list[float]:
    """Of each, in turns; several calls at once where one is short."""
    ops[0]()
    begin = time.perf_counter()
    ops[0]()
    calls = max(1, int(2e-3 / max(time.perf_counter() - begin, 1e-9)))
    taken: list[list[float]] = [[] for _ in ops]
    for number in range(rounds + 1):
        for op, seconds in zip(ops, taken, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                op()
            if number:  # the first round warms up
                seconds.append((time.perf_counter() - begin) / calls)
    return [statistics.median(seconds) for seconds in taken]


def made(T: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (T, D), (N, D), (T, N)
    x, weight, dy = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return x, weight / D**0.5, dy


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-append", action="store_true", help="leave results.csv alone")
    args = parser.parse_args()
    table, rows, summary = [], [], []
    for threads in args.threads:
        torch.set_num_threads(threads)
        label = f"{threads} threads"
        for dtype_name in args.dtypes:
            dtype = DTYPES[dtype_name]
            largest = products(*made(2048, 2048, 2048, dtype))["y"][:2]
            most = 2 * 2048**3 / min(median_seconds(list(largest), args.rounds)) / 1e9
            ratios: dict[int, list[float]] = {T: [] for T in args.tokens}  # of what is ours
            for T, (weight_name, (N, D)) in itertools.product(args.tokens, WEIGHTS.items()):
                tensors = made(T, N, D, dtype)
                wide = products(*(t.double() for t in tensors))
                for name, (ours, peer, own) in products(*tensors).items():
                    seconds = median_seconds([ours, peer], args.rounds)
                    rates = [2 * T * D * N / s / 1e9 for s in seconds]
                    most = max(most, *rates)
                    ratios[T] += [rates[0] / rates[1]] * own
                    exact = wide[name][1]()
                    errors = [error(op(), exact) for op in (ours, peer)]
                    shape = f"{name}, {weight_name} {N} x {D}, {T} tokens, {dtype_name}"
                    for variant, rate, e in zip(VARIANTS, rates, errors, strict=True):
                        rows.append((shape, variant, label, rate, "GFLOP/s"))
                        rows.append((shape, variant, "error / norm", e, "ratio"))
                    table.append([
                        shape, str(threads), "yes" if own else "no", *(f"{r:,.0f}" for r in rates),
                        f"{rates[0] / rates[1]:.2f}", *(f"{e:.1e}" for e in errors),
                    ])  # fmt: skip
            rows.append((f"any, {dtype_name}", "highest", label, most, "GFLOP/s"))
            for T, of_tokens in ratios.items():
                if of_tokens:
                    mean = statistics.geometric_mean(of_tokens)
                    summary.append(
                        f"times PyTorch's, {dtype_name}, {label}, {T} tokens: {mean:.2f}"
                    )
                    rows.append(
                        (
                            f"own, {T} tokens, {dtype_name}",
                            "r1fast",
                            f"times, {label}",
                            mean,
                            "ratio",
                        )
                    )
            summary.append(f"highest rate, {dtype_name}, {label}: {most:,.0f} GFLOP/s")
    print_table(["product", "threads", "own", *VARIANTS, "times", "error", "PyTorch's"], table)
    print("\n".join(summary))
    if not args.no_append:
        append_rows("linear", rows)


if __name__ == "__main__":
    main()
