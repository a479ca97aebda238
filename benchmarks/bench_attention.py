"""Attention of training on the CPU, one layer forward and backward: C++ against PyTorch's flash calls.

Variants take turns in one process on one thread; the best CPU seconds of each count, so that what
else the machine does is not measured. FLOPs are those of the pairs of query and key that are seen:
4 * H * Dh a pair forward, 2.5 times that backward. "pytorch" is what other dtypes and devices take:
a causal call a bucket of similar lengths and one a prompt, merged by log-sum-exp.

    python benchmarks/bench_attention.py [shape ...]
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from common import append_rows, print_table
from torch import Tensor

from r1fast.kernels.attention import bucketed_attention, plan_buckets
from r1fast.kernels.cpu_attention import level, native_attention, plan_segments
from r1fast.kernels.prefix_attention import PrefixAttentionFunction, plan_prefixes

REPEATS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# prompts of P tokens with G completions of about R tokens (lognormal), or sequences alone
SHAPES = {
    "8 prompts of 24, G=8, R=65, H=4, Dh=64": (8, 24, 8, 65, 4, 4, 64),
    "4 prompts of 256, G=16, R=96, H=8, K=2, Dh=64": (4, 256, 16, 96, 8, 2, 64),
    "1 prompt of 256, G=16, R=96, H=16, K=2, Dh=128": (1, 256, 16, 96, 16, 2, 128),
    "64 alone, R=90, H=4, Dh=64": (0, 0, 64, 90, 4, 4, 64),
    "4 alone of 4096, H=8, K=2, Dh=64": (0, 0, 4, 4096, 8, 2, 64),
}


def segments(num_prompts: int, P: int, G: int, R: int) -> tuple[list[int], list[int]]:
    """Lengths, and the segment that each continues."""
    generator = torch.Generator().manual_seed(0)
    lengths, prefix_of = [], []
    for _ in range(max(num_prompts, 1)):
        spread = (0.6 * torch.randn(G, generator=generator)).exp()
        completions = (R * spread / spread.mean()).long().clamp(1).tolist()
        if num_prompts:
            prefix_of += [-1, *[len(lengths)] * G]
            lengths += [P, *completions]
        else:
            prefix_of += [-1] * G
            lengths += [R] * G if R >= 1024 else completions
    return lengths, prefix_of


def variants(lengths, prefix_of, q, k, v) -> dict[str, Callable[[], Tensor]]:
    bounds = [0, *accumulate(lengths)]
    is_shared = max(prefix_of) >= 0
    native = plan_segments(bounds, prefix_of if is_shared else None)
    if is_shared:
        prefixes = plan_prefixes(bounds, prefix_of)
        pytorch = partial(PrefixAttentionFunction.apply, q, k, v, prefixes, None)
    else:
        pytorch = partial(bucketed_attention, q, k, v, plan_buckets(bounds), None)
    return {"pytorch": pytorch, level(): partial(native_attention, q, k, v, native)}


def best_seconds(forwards: dict[str, Callable[[], Tensor]], dout: Tensor) -> dict[str, list[float]]:
    """Forward and backward of each, in turns."""
    best = {name: [float("inf")] * 2 for name in forwards}
    for _ in range(REPEATS):
        for name, forward in forwards.items():
            start = time.process_time()
            out = forward()
            middle = time.process_time()
            out.backward(dout)
            end = time.process_time()
            times = middle - start, end - middle
            best[name] = [min(x) for x in zip(best[name], times, strict=True)]
    return best


def main() -> None:
    torch.set_num_threads(1)
    rows, table = [], []
    for shape in sys.argv[1:] or SHAPES:
        *sizes, H, K, Dh = SHAPES[shape]
        lengths, prefix_of = segments(*sizes)
        pairs = sum(
            n * (n + 1) / 2 + n * (lengths[p] if p >= 0 else 0)
            for n, p in zip(lengths, prefix_of, strict=True)
        )
        flops = 4 * H * Dh * pairs
        for dtype_name, dtype in DTYPES.items():
            q, k, v, dout = (torch.randn(sum(lengths), n, Dh).to(dtype) for n in (H, K, K, H))
            for x in (q, k, v):
                x.requires_grad_()
            best = best_seconds(variants(lengths, prefix_of, q, k, v), dout)
            name = f"{shape}, {dtype_name}"
            for variant, times in best.items():
                for part, seconds, factor in zip(
                    ("forward", "backward"), times, (1, 2.5), strict=True
                ):
                    rows.append((name, variant, part, 1e3 * seconds, "CPU ms"))
                    rows.append((name, variant, part, factor * flops / seconds / 1e9, "GFLOP/s"))
            old, new = best.values()
            table.append(
                [
                    name,
                    *(f"{1e3 * a:.1f} + {1e3 * b:.1f}" for a, b in (old, new)),
                    *(f"{3.5 * flops / sum(times) / 1e9:.0f}" for times in (old, new)),
                    f"{sum(old) / sum(new):.2f}x",
                ]
            )
    print_table(["shape", "pytorch, ms", "C++, ms", "GFLOP/s", "GFLOP/s", "faster"], table)
    append_rows("training attention", rows)


if __name__ == "__main__":
    main()
