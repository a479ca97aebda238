"""Which implementation computes an op. "auto": Triton on CUDA tensors, C++ and PyTorch elsewhere.

"torch" is plain PyTorch, "triton" and "native" (the C++ of csrc/) insist on theirs, "fast" lets the
head round bfloat16 logits on the CPU. The head's own choice is vocab_head.head_module; an op without
a C++ kernel takes PyTorch for "native" and "fast".
"""

from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "torch", "native", "fast"]


def use_triton(x: Tensor, backend: Backend = "auto") -> bool:
    """`backend="triton"` on a CPU tensor needs TRITON_INTERPRET=1, set before triton is imported."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return x.is_cuda if backend == "auto" else backend == "triton"
