"""What stands around the two products of the head's backward on a GPU, each in one pass.

Row factors go in before the product with E^T and after the one with W; the target's column, which E has not, is
added there too. And a loss that is multiplied by 1, as it usually is, costs no pass over its gradients.
Shapes: R rows of a chunk, N rows in all, D width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1fast.kernels.triton_head import workspace_dtype


@triton.jit
def _scaled_rows_kernel(x_ptr, v_ptr, out_ptr, stride_x, D, BLOCK_D: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * stride_x + d, mask=d < D).to(tl.float32) * tl.load(v_ptr + row)
    tl.store(out_ptr + row * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _store_dhidden_kernel(
    out_ptr, v_ptr, weight_ptr, at_ptr, mine_ptr, index_ptr, dhidden_ptr, stride_w, stride_d, D,
    HAS_INDEX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    W = tl.load(weight_ptr + tl.load(at_ptr + row) * stride_w + d, mask=d < D).to(tl.float32)
    x = tl.load(out_ptr + row * D + d, mask=d < D) * tl.load(v_ptr + row)
    x += W * tl.load(mine_ptr + row)
    to = tl.load(index_ptr + row) if HAS_INDEX else row
    tl.store(dhidden_ptr + to * stride_d + d, x.to(dhidden_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < n).to(tl.float32) * factor
        tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=i < n)


def scaled_rows(x: Tensor, v: Tensor) -> Tensor:  # (R, D), (R,) float32 -> (R, D) in E's dtype
    """x v, rounded once, as `dweight_` takes it."""
    x = x if x.stride(1) == 1 else x.contiguous()
    dtype = workspace_dtype(x.dtype)
    # the interpreter cuts bits off where it should round
    out = torch.empty(x.shape, dtype=dtype if x.is_cuda else torch.float32, device=x.device)
    (R, D), BLOCK_D = x.shape, min(triton.next_power_of_2(x.shape[1]), 1024)
    if R:
        grid = (R, triton.cdiv(D, BLOCK_D))
        _scaled_rows_kernel[grid](x, v.contiguous(), out, x.stride(0), D, BLOCK_D=BLOCK_D)
    return out.to(dtype)


def store_dhidden(
    out: Tensor,  # (R, D) float32, contiguous: E W
    v: Tensor,  # (R,) float32
    weight: Tensor,  # (V, D)
    at: Tensor,  # (R,) int64, the targets
    mine: Tensor,  # (R,) float32
    dhidden: Tensor,  # (N, D), rows side by side
    index: Tensor | None,  # (R,) int64 rows of dhidden; None: all of them
) -> None:
    """dhidden[index] = out v + weight[at] mine, in one pass."""
    if not out.is_cuda and dhidden.dtype != torch.float32:  # the interpreter rounds wrongly
        wide = dhidden.float()
        store_dhidden(out, v, weight, at, mine, wide, index)
        dhidden.copy_(wide)
        return
    if weight.stride(1) != 1:
        weight, at = weight[at], torch.arange(len(at), device=at.device)
    (R, D), BLOCK_D = out.shape, min(triton.next_power_of_2(out.shape[1]), 1024)
    if R:
        _store_dhidden_kernel[R, triton.cdiv(D, BLOCK_D)](
            out, v.contiguous(), weight, at, mine.contiguous(), at if index is None else index, dhidden,
            weight.stride(0), dhidden.stride(0), D, HAS_INDEX=index is not None, BLOCK_D=BLOCK_D,
        )  # fmt: skip


def scale_(x: Tensor, factor: Tensor) -> None:  # contiguous, () on the same device
    """x *= factor. Reads nothing of x where the factor is 1, which the host need not know."""
    BLOCK = 8192
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, factor, x.numel(), BLOCK=BLOCK, num_warps=8
        )
