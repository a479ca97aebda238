"""Tensors as the C++ and Triton kernels read them: rows, contiguous inside."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), a view where that can be one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def matrix(x: Tensor) -> tuple[int, int]:
    """Where a matrix of such rows lies, and how far apart they are."""
    return x.data_ptr(), x.stride(0)
