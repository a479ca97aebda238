"""One rule for every op: Triton on CUDA tensors, PyTorch elsewhere. Tests ask for either by name."""

from typing import Literal

from torch import Tensor

Backend = Literal["auto", "triton", "torch"]


def use_triton(x: Tensor, backend: Backend = "auto") -> bool:
    """`backend="triton"` on a CPU tensor needs TRITON_INTERPRET=1, set before triton is imported."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be auto, triton or torch, got {backend!r}")
    return x.is_cuda if backend == "auto" else backend == "triton"
