"""A chunk of the language-model head in PyTorch: any dtype (float64 too), any device, no compiler.

    u = h W^T + b;  z = cap tanh(u / cap);  E = exp(z / temperature - anchor), 0 at the target

`EXACT` computes 16-bit inputs in float32, a slab of the weight at a time. `FAST` leaves bfloat16 to
PyTorch's bfloat16 GEMM, which rounds the logits: errors like those of PyTorch's own bfloat16 logits.
On the CPU the pass over the logits is one C++ loop. The siblings are cpu_head.py and triton_head.py.
Shapes: R rows of a chunk, D width, V vocabulary; E is (R, V).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from r1fast.kernels import cpu_head

SLAB = 8192  # columns of the vocabulary at a time: bounds the temporaries


@dataclass(frozen=True)
class TorchHead:
    exact: bool

    def workspace_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of E. float16 cannot hold exp(z - anchor) of an unlikely target."""
        if dtype == torch.bfloat16 and not self.exact:
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def workspace_numel(self, R: int, V: int, dtype: torch.dtype) -> int:
        return R * V

    def forward(
        self,
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
        z = logits(hidden, weight, self.workspace_dtype(hidden.dtype), out)
        if _in_cpp(z):
            s, sz = cpu_head.epilogue_(
                z, bias, target_ids, anchor,
                inv_temperature=inv_temperature, softcap=softcap, want_sz=want_sz,
            )  # fmt: skip
        else:
            z, s, sz = _epilogue(z, bias, target_ids, anchor, inv_temperature, softcap, want_sz)
        return s, sz, DenseE(z) if keep else None


EXACT, FAST = TorchHead(True), TorchHead(False)


def logits(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    dtype: torch.dtype,
    out: Tensor | None = None,  # (R, V)
) -> Tensor:  # (R, V)
    """hidden @ weight.T in `dtype`, without a copy of the weight in it."""
    if hidden.dtype == dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if out is None:
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    hidden = hidden.to(dtype)
    for part, slab in zip(out.split(SLAB, 1), weight.split(SLAB), strict=True):
        part.copy_(torch.mm(hidden, slab.to(dtype).t()))
    return out


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
        if self.values.dtype == weight.dtype:
            return torch.mm(self.values, weight).to(_wide(weight))
        out = self.values.new_zeros(len(self.values), weight.shape[1])
        for part, slab in zip(self.values.split(SLAB, 1), weight.split(SLAB), strict=True):
            out.addmm_(part, slab.to(out.dtype))
        return out

    def dweight_(self, x: Tensor, dweight: Tensor, accumulate: bool) -> None:  # (R, D), (V, D)
        x = x.to(self.values.dtype)
        for part, out in zip(self.values.split(SLAB, 1), dweight.split(SLAB), strict=True):
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
