"""GPU kernels of a language-model head: exponentials against a known anchor, in one pass.

    u = h W^T + b           z = softcap tanh(u / softcap), or u           zhat = z / temperature
    e = exp(zhat - c)       E = e (1 - (z / softcap)^2), or e; 0 at the target
    s = sum_{j != y} e_j    sz = sum_{j != y} e_j (zhat_j - c)

`c` is an estimate of each row's logsumexp, so no running maximum is needed: e is in range as long as
|zhat - c| < 80. E (bfloat16, or float32 for float32 input) is the only array of R x V elements. From
it come the gradients, dh = E W and dW = E^T X, with row factors that the caller puts into X.

One forward is 2 R V D FLOP and writes R V elements; each of the two products is 2 R V D more. Sums
are float32, one partial sum per row and vocabulary tile, added in a fixed order: no atomics, and
a row's bits do not depend on which rows are beside it.
Shapes: R rows of a chunk, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

PAD = 64  # elements a row of E is padded to: cuBLAS wants rows that start on 16 bytes
GROUP_BYTES = 16 << 20  # of `hidden` that stay in L2 while the tiles of W pass by
SLAB = 16384  # vocabulary rows of W cast at a time where its dtype is not E's


@dataclass(frozen=True)
class Config:
    """One tile shape. The epilogue takes the columns in `splits` pieces: fewer live registers."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    splits: int = 1  # twice as many with a soft-cap
    tma: bool = False


# (compute capability, bits of the input): for rows that start on 16 bytes, then for any other.
# tests/test_aot.py compiles each: none spills, all fit the shared memory
CONFIGS: dict[tuple[int, int], list[Config]] = {
    (80, 16): [
        Config(128, 256, 32, num_warps=8, num_stages=3, splits=4),
        Config(128, 128, 32, num_warps=8, num_stages=4, splits=2),
    ],
    (80, 32): [Config(128, 64, 32, num_warps=8, num_stages=3)],
    (90, 16): [
        Config(128, 256, 64, num_warps=8, num_stages=4, splits=4, tma=True),
        Config(128, 128, 64, num_warps=8, num_stages=4, splits=4),
    ],
    (90, 32): [
        Config(128, 128, 32, num_warps=8, num_stages=3, splits=2, tma=True),
        Config(128, 128, 32, num_warps=8, num_stages=3, splits=2),
    ],
    (100, 16): [
        Config(128, 256, 64, num_warps=8, num_stages=4, splits=4, tma=True),
        Config(128, 128, 64, num_warps=8, num_stages=4, splits=4),
    ],
    (100, 32): [
        Config(128, 64, 32, num_warps=8, num_stages=3, tma=True),
        Config(128, 64, 32, num_warps=8, num_stages=3),
    ],
}


def workspace_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of E for inputs of `dtype`: bfloat16 has the exponent range that E needs."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def workspace_numel(R: int, V: int, dtype: torch.dtype) -> int:
    """Elements of the workspace of R rows: each row is padded to a multiple of PAD."""
    return R * _row_stride(V)


def _row_stride(V: int) -> int:
    return triton.cdiv(V, PAD) * PAD


@triton.jit
def _tile(num_m, num_n, group_m):
    """Programs that run together share tiles of W: `group_m` row tiles, then the next columns."""
    pid = tl.program_id(0)
    group = pid // (group_m * num_n)
    first = group * group_m
    size = tl.minimum(num_m - first, group_m)
    local = pid - group * group_m * num_n
    return (first + local % size).to(tl.int64), (local // size).to(tl.int64)


@triton.jit
def _columns(
    u, first: tl.constexpr, factor, c, y, bias_ptr, E_ptr, R, V, padded, stride_e,
    inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, WANT_SZ: tl.constexpr,
):  # fmt: skip
    """Scores (BLOCK_M, columns) -> E, stored, and these columns' part of s and sz (BLOCK_M,).

    Pointers, `R`, `V`, `padded` and `y` are relative to the tile: 32-bit indices take half the registers.
    """
    rows, cols = tl.arange(0, u.shape[0]), first + tl.arange(0, u.shape[1])
    in_vocab = cols < V
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=in_vocab, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        r = 1 / (1 + tl.exp(u * factor[:, None]))  # tanh = 1 - 2 r, 1 - tanh^2 = 4 r (1 - r)
        top = softcap * inv_temperature
        d = (top - c)[:, None] - 2 * top * r
    else:
        d = u * factor[:, None] - c[:, None]
    e = tl.where(in_vocab[None, :] & (cols[None, :] != y[:, None]), tl.exp(d), 0.0)
    s = tl.sum(e, 1)
    sz = s
    if WANT_SZ:
        sz = tl.sum(tl.where(e != 0, e * d, 0.0), 1)  # d is -inf where a bias of -inf bans a token
    if KEEP:
        if SOFTCAP:
            e *= 4 * r * (1 - r)
        at = E_ptr + rows[:, None] * stride_e + cols[None, :]
        # the padding is stored too, as 0: its end is a multiple of PAD, so stores are 16 bytes wide
        stored = (rows < R)[:, None] & (cols < padded)[None, :]
        tl.store(at, e.to(E_ptr.dtype.element_ty), mask=stored)
    return s, sz


@triton.jit
def _halves(x):
    """(M, N) -> two of (M, N / 2), left and right."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x):
    left, right = _halves(x)
    return _halves(left) + _halves(right)


@triton.jit
def _split(x, SPLITS: tl.constexpr):
    """(M, N) -> a tuple of 1, 2, 4 or 8 pieces side by side."""
    if SPLITS == 1:
        pieces = (x,)
    elif SPLITS == 2:
        pieces = _halves(x)
    elif SPLITS == 4:
        pieces = _quarters(x)
    else:
        left, right = _halves(x)
        pieces = _quarters(left) + _quarters(right)
    return pieces


@triton.jit
def _epilogue(
    acc, pid_m, pid_n, bias_ptr, target_ptr, anchor_ptr, E_ptr, s_ptr, sz_ptr,
    R, V, stride_e, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, WANT_SZ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N  # int64
    E_ptr += row * stride_e + col
    bias_ptr += col
    s_ptr += pid_n * R + row
    sz_ptr += pid_n * R + row
    R, V = (R - row).to(tl.int32), (V - col).to(tl.int32)  # what is left from here on
    padded = tl.multiple_of((stride_e - col).to(tl.int32), 16)
    rows = tl.arange(0, BLOCK_M)
    c = tl.load(anchor_ptr + row + rows, mask=rows < R, other=0.0)
    y = (tl.load(target_ptr + row + rows, mask=rows < R, other=-1) - col).to(tl.int32)
    s, sz = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    factor = tl.zeros((BLOCK_M,), tl.float32) + (2 / softcap if SOFTCAP else inv_temperature)
    pieces = _split(acc, SPLITS)
    for i in tl.static_range(SPLITS):
        s_piece, sz_piece = _columns(
            pieces[i], i * (BLOCK_N // SPLITS), factor, c, y, bias_ptr, E_ptr, R, V, padded, stride_e,
            inv_temperature, softcap, HAS_BIAS, SOFTCAP, KEEP, WANT_SZ,
        )  # fmt: skip
        s += s_piece
        sz += sz_piece
        # always true but for NaN: without it ptxas begins all pieces at once, and spills
        factor = tl.where(s_piece >= 0, factor, float("nan"))
    tl.store(s_ptr + rows, s, mask=rows < R)
    if WANT_SZ:
        tl.store(sz_ptr + rows, sz, mask=rows < R)


@triton.jit
def _head_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, anchor_ptr, E_ptr, s_ptr, sz_ptr,
    R, V, D, stride_h, stride_wv, stride_wd, stride_e, group_m, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, WANT_SZ: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = _tile(tl.cdiv(R, BLOCK_M), tl.cdiv(V, BLOCK_N), group_m)
    # rows past the end read the last row: no mask in the loop, and nothing of them is stored
    rows = tl.minimum(pid_m * BLOCK_M + tl.arange(0, BLOCK_M), R - 1)
    cols = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), V - 1)
    k = tl.arange(0, BLOCK_K)
    h_ptrs = hidden_ptr + rows[:, None] * stride_h + k[None, :]
    w_ptrs = weight_ptr + cols[None, :] * stride_wv + k[:, None].to(tl.int64) * stride_wd
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_D:
            h = tl.load(h_ptrs)
            w = tl.load(w_ptrs)
        else:
            h = tl.load(h_ptrs, mask=(start + k < D)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(start + k < D)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
        h_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wd
    _epilogue(
        acc, pid_m, pid_n, bias_ptr, target_ptr, anchor_ptr, E_ptr, s_ptr, sz_ptr,
        R, V, stride_e, inv_temperature, softcap,
        HAS_BIAS, SOFTCAP, KEEP, WANT_SZ, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _head_fwd_tma_kernel(
    hidden_desc, weight_desc, bias_ptr, target_ptr, anchor_ptr, E_ptr, s_ptr, sz_ptr,
    R, V, D, stride_e, group_m, inv_temperature, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, WANT_SZ: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As `_head_fwd_kernel`; the tensor memory accelerator (sm_90 on) loads the tiles, 0 outside."""
    pid_m, pid_n = _tile(tl.cdiv(R, BLOCK_M), tl.cdiv(V, BLOCK_N), group_m)
    row, col = (pid_m * BLOCK_M).to(tl.int32), (pid_n * BLOCK_N).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        h = hidden_desc.load([row, start])
        w = weight_desc.load([col, start])
        acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    _epilogue(
        acc, pid_m, pid_n, bias_ptr, target_ptr, anchor_ptr, E_ptr, s_ptr, sz_ptr,
        R, V, stride_e, inv_temperature, softcap,
        HAS_BIAS, SOFTCAP, KEEP, WANT_SZ, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _sum_tiles_kernel(
    parts_ptr, out_ptr, R, num_tiles, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(num_tiles, R) -> (R,), in an order that depends on num_tiles alone."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, num_tiles, BLOCK_T):
        tiles = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (tiles < num_tiles)[:, None] & (rows < R)[None, :]
        acc += tl.load(parts_ptr + tiles[:, None] * R + rows[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + rows, tl.sum(acc, 0), mask=rows < R)


@triton.jit
def _compact_kernel(
    E_ptr, idx_ptr, num_kept, stride_e, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Row i <- row idx[i] >= i. One program does all rows of its columns, from the top."""
    # here and below the padding counts as columns: with a multiple of 16, accesses are 16 bytes wide
    cols = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    for start in range(0, num_kept, BLOCK_R):
        to = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        source = tl.load(idx_ptr + to, mask=to < num_kept, other=0)
        inside = (to < num_kept)[:, None] & (cols < stride_e)[None, :]
        block = tl.load(E_ptr + source[:, None] * stride_e + cols[None, :], mask=inside)
        tl.debug_barrier()  # every row of the block is read before one of them is overwritten
        tl.store(E_ptr + to[:, None] * stride_e + cols[None, :], block, mask=inside)
        tl.debug_barrier()


@triton.jit
def _affine_kernel(E_ptr, a_ptr, b_ptr, stride_e, num_blocks, BLOCK_V: tl.constexpr):
    """E <- E (a + b log E) on one row's columns; 0 stays 0."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_blocks
    cols = pid % num_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    at = E_ptr + row * stride_e + cols
    E = tl.load(at, mask=cols < stride_e, other=0.0).to(tl.float32)
    value = E * (tl.load(a_ptr + row) + tl.load(b_ptr + row) * tl.log(E))
    tl.store(at, tl.where(E == 0, 0.0, value).to(E_ptr.dtype.element_ty), mask=cols < stride_e)


@triton.jit
def _dbias_kernel(
    E_ptr, x_ptr, dbias_ptr, R, V, stride_e,
    ACCUMULATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dbias (+)= E^T x: one program does all rows of its columns."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        x = tl.load(x_ptr + rows, mask=rows < R, other=0.0)
        inside = (rows < R)[:, None] & (cols < stride_e)[None, :]
        E = tl.load(E_ptr + rows[:, None] * stride_e + cols[None, :], mask=inside, other=0.0)
        acc += E.to(tl.float32) * x[:, None]
    total = tl.sum(acc, 0)
    if ACCUMULATE:
        total += tl.load(dbias_ptr + cols, mask=cols < V, other=0.0)
    tl.store(dbias_ptr + cols, total, mask=cols < V)


class Exponentials:
    """E of one chunk: what its backward needs. Lives in the workspace given to `forward`."""

    def __init__(self, E: Tensor):  # (R, V) of a (R, padded) array whose padding is 0
        self.E = E

    def dense(self) -> Tensor:  # (R, V), a view
        return self.E

    def compact(self, idx: Tensor) -> None:  # (R',) int64, increasing
        """Keep the rows `idx` and no others, in place. Raises ValueError for a wrong dtype."""
        if idx.dim() != 1 or idx.dtype != torch.int64 or len(idx) > len(self.E):
            raise ValueError(
                f"idx must be at most {len(self.E)} increasing int64 row numbers, got "
                f"{tuple(idx.shape)} of {idx.dtype}"
            )
        num_kept, stride_e = len(idx), self.E.stride(0)
        if 0 < num_kept < len(self.E):  # all rows: nothing to move
            BLOCK_V = 256
            _compact_kernel[(triton.cdiv(stride_e, BLOCK_V),)](
                self.E, idx.contiguous(), num_kept, stride_e,
                BLOCK_R=8, BLOCK_V=BLOCK_V, num_warps=1,
            )  # fmt: skip
        self.E = self.E[:num_kept]

    def affine(self, a: Tensor, b: Tensor) -> None:  # (R,) float32 each
        """E <- E (a[r] + b[r] log E), in place. What is 0 stays 0."""
        self._check_rows(a=a, b=b)
        if self.E.numel():
            BLOCK_V, stride_e = 1024, self.E.stride(0)
            blocks = triton.cdiv(stride_e, BLOCK_V)
            _affine_kernel[(len(self.E) * blocks,)](
                self.E, a.float().contiguous(), b.float().contiguous(), stride_e, blocks,
                BLOCK_V=BLOCK_V,
            )  # fmt: skip

    def dhidden(self, weight: Tensor) -> Tensor:  # (V, D) -> (R, D) float32
        """E @ weight."""
        E, V = self.E, self.E.shape[1]
        out = E.new_empty(E.shape[0], weight.shape[1], dtype=torch.float32)
        slab = V if weight.dtype == E.dtype and E.is_cuda else SLAB  # no V x D copy of W
        for start in range(0, V, slab):
            rows = slice(start, start + slab)
            _mm_(out, E[:, rows], weight[rows].to(E.dtype), accumulate=start > 0)
        return out

    def dweight_(
        self,
        X: Tensor,  # (R, D)
        dweight: Tensor,  # (V, D) float32
        accumulate: bool,
    ) -> None:
        """dweight = E^T @ X, or += with `accumulate`. X is rounded to E's dtype."""
        self._check_rows(X=X)
        _mm_(dweight, self.E.t(), X.to(self.E.dtype), accumulate)

    def dbias_(
        self,
        x: Tensor,  # (R,)
        dbias: Tensor,  # (V,) float32
        accumulate: bool,
    ) -> None:
        """dbias = E^T @ x, or += with `accumulate`."""
        self._check_rows(x=x)
        R, V = self.E.shape
        BLOCK_V = 128
        _dbias_kernel[(triton.cdiv(V, BLOCK_V),)](
            self.E, x.float().contiguous(), dbias, R, V, self.E.stride(0),
            ACCUMULATE=accumulate, BLOCK_R=32, BLOCK_V=BLOCK_V,
        )  # fmt: skip

    def _check_rows(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            if len(x) != len(self.E):
                raise ValueError(f"{name} must have E's {len(self.E)} rows, got {tuple(x.shape)}")


@torch.no_grad()  # `out=` refuses a weight that requires a gradient
def _mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or +=, in float32 whatever the inputs' dtype; no temporary of out's size."""
    if not a.shape[1]:  # an empty sum; cuBLAS is not asked
        if not accumulate:
            out.zero_()
    elif a.dtype == torch.float32 or a.is_cpu:  # the CPU (interpreter) has no out_dtype
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


class Head(NamedTuple):
    s: Tensor  # (R,) float32
    sz: Tensor | None  # (R,) float32
    E: Exponentials | None


def choose_config(hidden: Tensor, weight: Tensor) -> Config:
    """The tile shape for this chip and dtype. TMA, and the largest tiles, want aligned rows."""
    major = torch.cuda.get_device_capability(hidden.device)[0] if hidden.is_cuda else 8
    arch = {9: 90, 10: 100}.get(major, 80)
    best, *others = CONFIGS[arch, 8 * hidden.element_size()]
    whole = best.tma or hidden.shape[1] % best.BLOCK_K == 0  # TMA fills what is missing with 0
    return best if not others or (whole and _aligned(hidden, weight)) else others[0]


def _aligned(*tensors: Tensor) -> bool:
    return all(
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in tensors
    )


def forward(
    hidden: Tensor,  # (R, D) bfloat16, float16 or float32
    weight: Tensor,  # (V, D), any row stride
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (R,) int64 in [0, V), or -1: the target is in another shard
    anchor: Tensor,  # (R,) float32, about logsumexp
    *,
    inv_temperature: float,
    softcap: float | None,
    keep: bool,
    want_sz: bool,
    workspace: Tensor | None = None,  # 1-d, workspace_numel elements of workspace_dtype
    config: Config | None = None,
) -> Head:
    """s, sz (None unless `want_sz`) and E (None unless `keep`) of a chunk of rows.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(hidden, weight, bias, target_ids, anchor, softcap)
    (R, D), V = hidden.shape, weight.shape[0]
    stride_e = _row_stride(V)
    E = None
    if keep:
        E = _workspace(workspace, hidden, workspace_numel(R, V, hidden.dtype))
        E = E.view(R, stride_e)[:, :V]
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    config = config or choose_config(hidden, weight)
    if not hidden.is_cuda:  # the interpreter multiplies bfloat16 as if it were integers
        hidden, weight = hidden.float(), weight.float()
    num_m, num_n = triton.cdiv(R, config.BLOCK_M), triton.cdiv(V, config.BLOCK_N)
    parts = hidden.new_empty(1 + want_sz, num_n, R, dtype=torch.float32)
    sums = hidden.new_zeros(1 + want_sz, R, dtype=torch.float32)
    if R and V:
        group_m = max(1, GROUP_BYTES // max(1, config.BLOCK_M * D * hidden.element_size()))
        args = (
            hidden if bias is None else bias.contiguous(), target_ids.contiguous(),
            anchor.contiguous(), E if keep else parts, parts[0], parts[-1], R, V, D,
        )  # fmt: skip
        scalars = (stride_e, min(group_m, num_m), float(inv_temperature), float(softcap or 1.0))
        options = {
            "HAS_BIAS": bias is not None, "SOFTCAP": bool(softcap), "KEEP": keep,
            "WANT_SZ": want_sz, "SPLITS": config.splits * (2 if softcap else 1), "PRECISION": precision(hidden.dtype),
            "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip
        if config.tma:
            _head_fwd_tma_kernel[(num_m * num_n,)](
                TensorDescriptor.from_tensor(hidden, [config.BLOCK_M, config.BLOCK_K]),
                TensorDescriptor.from_tensor(weight, [config.BLOCK_N, config.BLOCK_K]),
                *args, *scalars, **options,
            )  # fmt: skip
        else:
            _head_fwd_kernel[(num_m * num_n,)](
                hidden, weight, *args, hidden.stride(0), *weight.stride(), *scalars,
                EVEN_D=D % config.BLOCK_K == 0, **options,
            )  # fmt: skip
        for part, total in zip(parts, sums, strict=True):
            _sum_tiles_kernel[(triton.cdiv(R, 32),)](part, total, R, num_n, BLOCK_R=32, BLOCK_T=64)
    return Head(sums[0], sums[1] if want_sz else None, Exponentials(E) if keep else None)


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: three TF32 products make one of float32 accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"  # of no effect on 16 bits


def _workspace(workspace: Tensor | None, hidden: Tensor, numel: int) -> Tensor:
    dtype = workspace_dtype(hidden.dtype)
    if workspace is None:
        return hidden.new_empty(numel, dtype=dtype)
    if (
        workspace.dim() != 1
        or workspace.numel() < numel
        or workspace.dtype != dtype
        or workspace.device != hidden.device
        or not workspace.is_contiguous()
    ):
        raise ValueError(
            f"workspace must be contiguous, ({numel},) or longer, {dtype} on {hidden.device}, got "
            f"{tuple(workspace.shape)} of {workspace.dtype} on {workspace.device}"
        )
    return workspace[:numel]


def _check(hidden, weight, bias, target_ids, anchor, softcap) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"need hidden (R, D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden must be bfloat16, float16 or float32, got {hidden.dtype}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one of them")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"need bias (V,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    R = len(hidden)
    if target_ids.shape != (R,) or target_ids.dtype != torch.int64:
        raise ValueError(
            f"target_ids must be ({R},) of int64, got {tuple(target_ids.shape)} of "
            f"{target_ids.dtype}"
        )
    if anchor.shape != (R,) or anchor.dtype != torch.float32:
        raise ValueError(
            f"anchor must be ({R},) of float32, got {tuple(anchor.shape)} of {anchor.dtype}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for none, got {softcap}")
