"""The blocks between a layer's products on the CPU, forward and backward: one C++ kernel each against PyTorch's eager operations.

    python benchmarks/bench_blocks.py [--no-append]

The norm with its residual sum, the rotation of q and k (with their norms in "qk-norm"), SwiGLU; `<op>_ref` is the peer. Both
take turns in one process on one thread; the best CPU seconds of each count. GB/s are of what must be moved: every input and
output once forward and twice backward (read again, and their gradients), much of it in caches at these sizes.
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from common import append_rows, print_table
from torch import Tensor

from r1fast.kernels.rms_norm import add_rms_norm, add_rms_norm_ref
from r1fast.kernels.rope import rope, rope_ref
from r1fast.kernels.swiglu import swiglu, swiglu_ref

REPEATS = 9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# tokens, width, MLP width, heads, kv heads of 64
SHAPES = {"4,500 x 256": (4500, 256, 768, 4, 2), "4,500 x 512": (4500, 512, 1536, 8, 4)}
Op = Callable[[], tuple[Tensor, ...]]


def cases(shape: str, dtype: torch.dtype) -> dict[str, tuple[Op, Op, list[Tensor]]]:
    """Name -> (ours, PyTorch's, what needs a gradient)."""
    T, D, F, H, K = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).requires_grad_()

    x, delta, weight = leaf(T, D), leaf(T, D), leaf(D)
    qkv, q_weight, k_weight = leaf(T, (H + 2 * K) * 64), leaf(64), leaf(64)
    angles = torch.arange(T)[:, None] * torch.rand(32, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    rotations = torch.cat((cos, cos, -sin, sin), 1)
    gate_up = leaf(T, 2 * F)
    eps = 1e-6
    plain = (qkv, rotations, H, K)
    normed = (*plain, q_weight, k_weight, eps)
    return {
        "norm + residual": (
            partial(add_rms_norm, x, delta, weight, eps),
            partial(add_rms_norm_ref, x, delta, weight, eps),
            [x, delta, weight],
        ),
        "rotation": (partial(rope, *plain), partial(rope_ref, *plain), [qkv]),
        "rotation, qk-norm": (
            partial(rope, *normed), partial(rope_ref, *normed), [qkv, q_weight, k_weight],
        ),
        "SwiGLU": (lambda: (swiglu(gate_up),), lambda: (swiglu_ref(gate_up),), [gate_up]),
    }  # fmt: skip


def best_seconds(ops: dict[str, Op], leaves: list[Tensor]) -> tuple[dict[str, list[float]], int]:
    """Forward and backward of each, in turns; and the bytes of inputs and outputs."""
    best = {name: [float("inf")] * 2 for name in ops}
    num_bytes = 0
    for _ in range(REPEATS):
        for name, op in ops.items():
            begin = time.process_time()
            outs = op()
            forward = time.process_time() - begin
            upstream = [torch.ones_like(y) for y in outs]
            begin = time.process_time()
            torch.autograd.backward(outs, upstream)
            times = forward, time.process_time() - begin
            best[name] = [min(x) for x in zip(best[name], times, strict=True)]
            num_bytes = sum(x.nbytes for x in (*leaves, *outs))
            for x in leaves:
                x.grad = None
    return best, num_bytes


def main() -> None:
    torch.set_num_threads(1)
    table, rows = [], []
    for shape in SHAPES:
        for dtype_name, dtype in DTYPES.items():
            for case, (ours, peer, leaves) in cases(shape, dtype).items():
                best, num_bytes = best_seconds({"r1fast": ours, "PyTorch": peer}, leaves)
                label = f"{case}, {shape}, {dtype_name}"
                for variant, times in best.items():
                    for part, seconds in zip(("forward", "backward"), times, strict=True):
                        rows.append((label, variant, part, 1e3 * seconds, "CPU ms"))
                a, b = best["r1fast"], best["PyTorch"]
                table.append([
                    label, *(f"{1e3 * x:.2f} + {1e3 * y:.2f}" for x, y in (a, b)),
                    f"{b[0] / a[0]:.1f}, {b[1] / a[1]:.1f}", f"{sum(b) / sum(a):.1f}",
                    f"{3 * num_bytes / sum(a) / 1e9:.1f}",
                ])  # fmt: skip
    head = ["block", "r1fast, ms", "PyTorch, ms", "times", "times, together", "r1fast, GB/s"]
    print_table(head, table)
    if "--no-append" not in sys.argv:
        append_rows("blocks", rows)


if __name__ == "__main__":
    main()
