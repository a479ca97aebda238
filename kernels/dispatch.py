"""One rule for every op: Triton on CUDA tensors, PyTorch and C++ elsewhere. Tests ask by name."""

from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "torch", "native"]  # native: the C++ kernels of csrc/


def use_triton(x: Tensor, backend: Backend = "auto") -> bool:
    """`backend="triton"` on a CPU tensor needs TRITON_INTERPRET=1, set before triton is imported."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return x.is_cuda if backend == "auto" else backend == "triton"
