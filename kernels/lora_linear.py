"""A linear layer with low-rank adapters on some of its outputs, the parts of a fused layer.

    h = x A^T                               A (P r, D), r rows for each of the P adapted parts
    y = x W^T + b;  y_p += h_p (s B_p)^T    B (sum N_p, r), the rows of one part after another

    dh_p = dy_p (s B_p)    dA = dh^T x    dB_p = s dy_p^T h_p    dx = dy W + dh A

A and B may be wider than x: they are rounded to its dtype, s B once, and their gradients widened.
In bfloat16, where the base's product is the sampler's (linear.py), y is one sum of both, as there: (x, h) (W, s B)^T + b,
each B_p behind its own outputs alone.
Nothing of W's size is made where W is frozen: beside the layer's own products 2 T r (P D + sum N_p)
FLOP forward and twice that backward. Shapes: T tokens, D and N widths, N_p outputs of a part.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.linear import add_product_, is_sampled, linear_dweight, linear_dx, linear_fwd

WHOLE_TILES = 32  # elements that a product of linear.hpp may read at once


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    parts: Sequence[tuple[int, int]],
    scale: float,
) -> Tensor:
    """What `lora_linear` computes, in plain PyTorch."""
    r = B.shape[1]
    y, h, Bs = F.linear(x, weight, bias), x @ A.to(x.dtype).t(), (B * scale).to(x.dtype)
    delta, at = torch.zeros_like(y), 0
    for p, (start, end) in enumerate(parts):
        delta[:, start:end] = h[:, p * r : (p + 1) * r] @ Bs[at : at + end - start].t()
        at += end - start
    return y + delta


def wide_factor(
    B: Tensor,  # (sum N_p, r)
    parts: Sequence[tuple[int, int]],
    num_out: int,
) -> Tensor:  # (N, P r)
    """B_p in the rows of its part and behind h_p, zeros elsewhere."""
    r, at = B.shape[1], 0
    wide = B.new_zeros(num_out, len(parts) * r)
    for p, (start, end) in enumerate(parts):
        wide[start:end, p * r : (p + 1) * r] = B[at : at + end - start]
        at += end - start
    return wide


def side_by_side(x: Tensor, h: Tensor) -> Tensor:
    """(n, D), (n, R) -> (n, D' + R'), both filled up with zeros to whole tiles: rows (x, h) and weights (W, B)."""
    return torch.cat(
        (F.pad(x, (0, -x.shape[1] % WHOLE_TILES)), F.pad(h, (0, -h.shape[1] % WHOLE_TILES))), 1
    )


class LoraLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, parts, scale):
        An, Bs = A.to(x.dtype), (B * scale).to(x.dtype)
        h = linear_fwd(x, An, None)
        if is_sampled(x, weight, bias):
            B_wide = wide_factor(Bs, parts, len(weight))
            y = linear_fwd(side_by_side(x, h), side_by_side(weight, B_wide), bias)
        else:
            y = linear_fwd(x, weight, bias)
            for hp, Bp, (start, end) in _parts(h, Bs, parts):
                add_product_(y[:, start:end], hp, Bp.t())
        ctx.save_for_backward(x, weight, An, Bs, h)
        ctx.parts, ctx.scale, ctx.dtypes = parts, scale, (A.dtype, B.dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, A, Bs, h = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dh, dB = torch.empty_like(h), torch.empty_like(Bs)
        for (hp, Bp, (start, end)), (dhp, dBp, _) in zip(
            _parts(h, Bs, ctx.parts), _parts(dh, dB, ctx.parts), strict=True
        ):
            dhp.copy_(linear_dx(dy[:, start:end], Bp))
            dBp.copy_(linear_dweight(dy[:, start:end], hp))
        dA, dB = linear_dweight(dh, x).to(ctx.dtypes[0]), dB.to(ctx.dtypes[1]).mul_(ctx.scale)
        dx = add_product_(linear_dx(dy, weight), dh, A) if needs_x else None
        dweight = linear_dweight(dy, x) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None, dA, dB, None, None


def _parts(h: Tensor, B: Tensor, parts: Sequence[tuple[int, int]]):
    """(h_p, B_p, outputs) of every part, as views."""
    r, at = B.shape[1], 0
    for p, (start, end) in enumerate(parts):
        yield h[:, p * r : (p + 1) * r], B[at : at + end - start], (start, end)
        at += end - start


def lora_linear(
    x: Tensor,  # (T, D)
    weight: Tensor,  # (N, D)
    bias: Tensor | None,  # (N,)
    A: Tensor,  # (P r, D)
    B: Tensor,  # (sum N_p, r)
    parts: Sequence[tuple[int, int]],  # [start, end) of each adapted part among the N outputs
    scale: float,
) -> Tensor:  # (T, N)
    """Differentiable in all tensors, once."""
    return LoraLinearFunction.apply(x, weight, bias, A, B, tuple(parts), scale)
