"""A chunk of the language-model head in PyTorch: any dtype (float64 too), any device, no compiler.

    u = h W^T + b;  z = cap tanh(u / cap);  E = exp(z / temperature - anchor), 0 at the target

On the CPU the pass over the logits is one C++ loop where there is one for the dtype. Its siblings
are cpu_head.py and triton_head.py. E is (R, V), in the dtype of hidden: in bfloat16 the GEMM rounds
the logits (the `fast` mode; cpu_head.py is the exact one).
Shapes: R rows of a chunk, D width, V vocabulary.
"""

import torch
from torch import Tensor

from r1fast.kernels import cpu_head

BLOCK_V = 8192  # columns of dweight at a time: bounds the temporary


def workspace_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype


def workspace_numel(R: int, V: int, dtype: torch.dtype) -> int:
    return R * V


def forward(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (R,), -1: not in this part of the vocabulary
    anchor: Tensor,  # (R,) float32 (float64 for float64)
    *,
    inv_temperature: float,
    softcap: float | None,
    keep: bool,
    want_sz: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, "DenseE | None"]:
    """(s, sz, E): s = sum of e over the columns but the target, sz = sum of e (z - anchor)."""
    R, V = len(hidden), len(weight)
    out = None if workspace is None else workspace[: R * V].view(R, V)
    z = torch.mm(hidden, weight.t(), out=out)
    if _in_cpp(z):
        s, sz = cpu_head.epilogue_(
            z, bias, target_ids, anchor,
            inv_temperature=inv_temperature, softcap=softcap, want_sz=want_sz,
        )  # fmt: skip
    else:
        z, s, sz = _epilogue(z, bias, target_ids, anchor, inv_temperature, softcap, want_sz)
    return s, sz, DenseE(z) if keep else None


def _epilogue(z, bias, target_ids, anchor, inv_temperature, softcap, want_sz):
    dtype, slope = z.dtype, None
    z = z.to(torch.promote_types(dtype, torch.float32))
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    z = z * inv_temperature - anchor[:, None]
    e = z.exp()
    here = (target_ids >= 0).nonzero()[:, 0]
    e[here, target_ids[here]] = 0
    s = e.sum(1)
    sz = torch.where(e > 0, e * z, 0).sum(1) if want_sz else None
    return (e if slope is None else e * slope).to(dtype), s, sz


class DenseE:
    """E as a plain (R, V) matrix."""

    def __init__(self, values: Tensor):
        self.values = values

    def compact(self, index: Tensor) -> None:
        """Keep the rows `index` (increasing) only."""
        if _in_cpp(self.values):
            self.values = cpu_head.compact_(self.values, index)
        else:
            self.values = self.values[index]

    def affine(self, a: Tensor, b: Tensor) -> None:  # (R,), (R,)
        """E <- E (a + b log E); what is zero stays zero."""
        if _in_cpp(self.values):
            cpu_head.affine_(self.values, a, b)
            return
        wide = self.values.to(a.dtype)
        logs = torch.where(wide > 0, wide, 1).log_()
        self.values = (wide * logs.mul_(b[:, None]).add_(a[:, None])).to(self.values.dtype)

    def dhidden(self, weight: Tensor) -> Tensor:  # (V, D) -> (R, D)
        return torch.mm(self.values, weight).to(_wide(weight))

    def dweight_(self, x: Tensor, dweight: Tensor, accumulate: bool) -> None:  # (R, D), (V, D)
        x = x.to(self.values.dtype)
        for part, out in zip(self.values.split(BLOCK_V, 1), dweight.split(BLOCK_V), strict=True):
            if x.dtype == dweight.dtype:
                out.addmm_(part.t(), x, beta=float(accumulate))
            elif accumulate:
                out += torch.mm(part.t(), x)
            else:
                out.copy_(torch.mm(part.t(), x))

    def dbias_(self, x: Tensor, dbias: Tensor, accumulate: bool) -> None:  # (R,), (V,)
        total = self.values.to(x.dtype).t() @ x
        if accumulate:
            dbias += total
        else:
            dbias.copy_(total)

    def dense(self) -> Tensor:
        return self.values


def _in_cpp(x: Tensor) -> bool:
    return not x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and x.stride(-1) == 1


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
