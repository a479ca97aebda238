"""Packing rollouts into micro-batches: r1fast._C against first-fit decreasing in pure Python.

Both search a tree, O(n log bins), and give the same bins. Input and output are lists for "python"
and "pack", numpy arrays for "pack_flat". No packing uses fewer bins than `lower_bound`.

    python benchmarks/bench_packing.py [number of sequences ...]
"""

import sys
import time

import numpy as np
from common import append_rows, print_table

from r1fast import _C

TOKEN_BUDGET = 16384


def rollout_lengths(num_sequences: int) -> np.ndarray:
    """Long-tailed like reasoning traces: lognormal, mean about 700, cut at 8192."""
    lengths = np.random.default_rng(0).lognormal(6.2, 0.85, num_sequences)
    return np.clip(lengths.astype(np.int64), 1, 8192)


def pack_python(lengths: list[int], token_budget: int) -> list[list[int]]:
    """First-fit decreasing with the room of every bin in a tournament tree."""
    num_leaves = 1
    while num_leaves < min(len(lengths), 2 * (sum(lengths) // token_budget) + 2):
        num_leaves *= 2
    max_room = [token_budget] * (2 * num_leaves)
    bins = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length, node = lengths[i], 1
        while node < num_leaves:
            node *= 2
            if max_room[node] < length:
                node += 1
        if node - num_leaves == len(bins):
            bins.append([])
        bins[node - num_leaves].append(i)
        max_room[node] -= length
        while node > 1:
            node //= 2
            best = max(max_room[2 * node], max_room[2 * node + 1])
            if max_room[node] == best:
                break
            max_room[node] = best
    return bins


def seconds(function, *args, repeats: int) -> float:
    """The median of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main() -> None:
    sizes = [int(arg) for arg in sys.argv[1:]] or [1024, 32_768, 1_000_000]
    rows, table = [], []
    for num_sequences in sizes:
        array = rollout_lengths(num_sequences)
        as_list = array.tolist()
        bins = _C.pack(as_list, TOKEN_BUDGET)
        assert bins == pack_python(as_list, TOKEN_BUDGET)
        bound = _C.lower_bound(array, TOKEN_BUDGET)
        fill = array.sum() / (len(bins) * TOKEN_BUDGET)
        repeats = 5 if num_sequences < 100_000 else 3
        times = {
            "python": seconds(pack_python, as_list, TOKEN_BUDGET, repeats=repeats),
            "pack": seconds(_C.pack, as_list, TOKEN_BUDGET, repeats=repeats),
            "pack_flat": seconds(_C.pack_flat, array, TOKEN_BUDGET, repeats=repeats),
        }
        shape = f"S={num_sequences} budget={TOKEN_BUDGET}"
        rows += [(shape, variant, "time", 1e3 * t, "ms") for variant, t in times.items()]
        rows += [(shape, variant, "bins", len(bins), "count") for variant in times]
        rows += [(shape, "lower bound", "bins", bound, "count")]
        rows += [(shape, variant, "fill", 100 * fill, "%") for variant in times]
        table.append(
            [f"{num_sequences:,}"]
            + [f"{1e3 * t:.2f} ms" for t in times.values()]
            + [f"{times['python'] / times['pack']:.0f}x"]
            + [f"{len(bins):,}", f"{bound:,}", f"{100 * fill:.2f}%"]
        )
    header = "sequences,python,pack,pack_flat,pack is faster,bins,lower bound,fill".split(",")
    print_table(header, table)
    append_rows("packing", rows)


if __name__ == "__main__":
    main()
