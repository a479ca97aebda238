"""Which implementation computes an op. "auto": Triton on CUDA tensors, C++ and PyTorch elsewhere.

"torch" is plain PyTorch, "triton" and "native" (the C++ of csrc/) insist on theirs, "fast" lets the
head round bfloat16 logits on the CPU. The head's own choice is vocab_head.head_module; an op without
a C++ kernel takes PyTorch for "native" and "fast". The blocks between a layer's products (rms_norm,
rope, swiglu) ask `block_backend`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Backend = Literal["auto", "triton", "torch", "native", "fast"]


def use_triton(x: Tensor, backend: Backend = "auto") -> bool:
    """`backend="triton"` on a CPU tensor needs TRITON_INTERPRET=1, set before triton is imported."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    return x.is_cuda if backend == "auto" else backend == "triton"


def block_backend(backend: Backend, *tensors: Tensor) -> Literal["triton", "native", "torch"]:
    """By whom: the kernels take plain tensors of one dtype and device, the C++ no float16."""
    x = tensors[0]
    plain = all(
        type(t) in (Tensor, nn.Parameter) and (t.dtype, t.device) == (x.dtype, x.device)
        for t in tensors
    )
    if use_triton(x, backend):
        halves = (torch.float32, torch.bfloat16, torch.float16)
        return "triton" if plain and x.dtype in halves else "torch"
    if backend in ("auto", "native") and plain and x.is_cpu:
        if x.dtype in (torch.float32, torch.bfloat16) and _is_built():
            return "native"
    return "torch"


def _is_built() -> bool:
    try:
        import r1fast._C  # noqa: F401
    except ImportError:
        return False
    return True
