"""float32 matrix products on the CPU by whichever library is faster on this machine.

torch.mm goes to MKL, which takes slower code paths on some makes of CPU; oneDNN, in the same torch
build, can be twice as fast. Its operator is internal to torch, so every use is guarded: where it is
missing or fails, torch.mm it is.
"""

import functools
import time

import torch
from torch import Tensor


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
    """x @ weight.T"""
    if _worth_asking(x, weight) and onednn_is_faster():
        return _onednn(x, weight)
    return torch.mm(x, weight.t())


def _worth_asking(x: Tensor, weight: Tensor) -> bool:
    same = x.dtype == weight.dtype == torch.float32
    return same and not x.is_cuda and x.shape[0] * weight.numel() > 1 << 22


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], None)


@functools.cache
def onednn_is_faster() -> bool:
    """Measured once in a process, in about 20 ms, on a product of known answer."""
    x, weight = torch.ones(128, 256), torch.ones(2048, 256)
    try:
        if not torch.equal(_onednn(x, weight), torch.full((128, 2048), 256.0)):
            return False
    except (AttributeError, RuntimeError):  # another torch, another machine
        return False

    def seconds(multiply) -> float:
        began = time.perf_counter()
        multiply()
        return time.perf_counter() - began

    rounds = [
        (seconds(lambda: _onednn(x, weight)), seconds(lambda: torch.mm(x, weight.t())))
        for _ in range(5)
    ]
    onednn, mkl = (min(times) for times in zip(*rounds, strict=True))
    return onednn < 0.9 * mkl
