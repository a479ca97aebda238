"""The head's CPU compute over r1fast._C: logits, their epilogue and both gradients, in 3 GEMMs of 2 R V D FLOP.

    u = h W^T + bias    z = softcap tanh(u / softcap)    x = z / temperature - anchor    e = exp(x)
    E = e (1 - (z / softcap)^2), 0 at the target       s = sum_{j != y} e       sz = sum_{j != y} e x

`anchor` is near the row's logsumexp, so e needs no running maximum. The native kernels (AVX-512 or AVX2; in bfloat16
AMX, too; all with float32 sums) keep E transposed in a workspace that calls may share; `epilogue_` works in place
on logits that a GEMM of PyTorch has made. Results are the same bits for any number of threads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def native_level(dtype: torch.dtype) -> str:
    """By what the native kernels multiply `dtype` here: amx, avx512 or avx2; baseline where there are none.

    At most what the environment's R1FAST_CPU_LEVEL says: avx512, avx2 or baseline.
    """
    try:
        from r1fast import _C
    except ImportError:
        return "baseline"
    if dtype not in (torch.float32, torch.bfloat16):
        return "baseline"
    return _C.native_level(dtype == torch.bfloat16)


def supported(dtype: torch.dtype) -> bool:
    """Whether this CPU, and this build, have native kernels for hidden states and weights of `dtype`."""
    return native_level(dtype) != "baseline"


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype) -> Tensor:
    """torch.empty in huge pages where it is large: its first use costs half as much."""
    x = torch.empty(shape, dtype=dtype)
    try:
        from r1fast import _C
    except ImportError:
        return x
    _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def narrow_to_bf16(x: Tensor) -> Tensor:
    """A contiguous float32 tensor rounded to bfloat16 where it lies: no fresh memory, `x` is used up.

    The result keeps the storage of `x`, twice what it needs; the pages behind it are given back.
    """
    from r1fast import _C

    assert x.is_cpu, x.device
    assert x.dtype == torch.float32, x.dtype
    assert x.is_contiguous(), x.stride()
    _C.narrow_to_bf16(x.data_ptr(), x.numel(), torch.get_num_threads())
    return x.view(-1).view(torch.bfloat16)[: x.numel()].view(x.shape)


def workspace_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the memory that holds E, whatever the dtype of the hidden states."""
    return torch.float32


def workspace_numel(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Elements of a float32 workspace, on a cache line's boundary, that holds E for up to `num_rows` rows.

    Chunks of a multiple of 48 rows fill the kernels' tiles; of 16, nearly so.
    """
    from r1fast import _C

    return _C.head_words(num_rows, vocab_size, dtype == torch.bfloat16)


def _rows_ok(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Of this dtype and shape on the CPU, and contiguous within a row."""
    inner = x.shape[-1] <= 1 or x.stride(-1) == 1
    return x.is_cpu and x.dtype == dtype and x.shape == shape and inner


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _vector(x: Tensor, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    assert x.is_cpu, x.device
    assert x.shape == (length,), (x.shape, length)
    return x.detach().to(dtype).contiguous()


def _row_index(index: Tensor, num_rows: int) -> Tensor:
    assert index.dtype == torch.int64, index.dtype
    assert index.ndim == 1, index.shape
    if index.numel():
        assert bool((index[1:] > index[:-1]).all()), "index must increase"
        assert 0 <= index[0] <= index[-1] < num_rows, (index, num_rows)
    return index.contiguous()


@dataclass
class TransposedE:
    """E of the native kernels: `words` is float32 memory, with two bfloat16 in a word if `dtype` is that."""

    words: Tensor  # (at least rows of words * ld,)
    ld: int
    num_rows: int
    vocab_size: int
    dtype: torch.dtype
    level: str

    @property
    def _where(self) -> tuple[int, int, int, int]:
        return self.words.data_ptr(), self.ld, self.num_rows, self.vocab_size

    @property
    def _bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def compact(self, index: Tensor) -> None:
        """Keeps the rows `index` (int64, increasing), in place."""
        from r1fast import _C

        index, kept = _row_index(index, self.num_rows), index.numel()
        _C.native_compact(*self._where, self._bf16, index.data_ptr(), kept, torch.get_num_threads())
        self.num_rows = kept

    def affine(self, a: Tensor, b: Tensor) -> None:
        """E becomes E (a + b log E), row by row, in place; zeros stay. a, b: (R,)"""
        from r1fast import _C

        a, b = _vector(a, self.num_rows), _vector(b, self.num_rows)
        _C.native_affine(
            *self._where, self._bf16, a.data_ptr(), b.data_ptr(), self.level,
            torch.get_num_threads(),
        )  # fmt: skip

    def dhidden(self, weight: Tensor) -> Tensor:
        """E @ weight: (V, D) -> (R, D) float32."""
        from r1fast import _C

        width = weight.shape[1]
        assert _rows_ok(weight, self.dtype, (self.vocab_size, width)), (weight.shape, weight.dtype)
        dhidden = torch.empty(self.num_rows, width)
        if dhidden.numel():
            _C.native_dhidden(
                *self._where,
                weight.data_ptr(),
                _row_stride(weight),
                width,
                self._bf16,
                dhidden.data_ptr(),
                self.level,
                torch.get_num_threads(),
            )
        return dhidden

    def dweight_(self, x: Tensor, dweight: Tensor, accumulate: bool = True) -> None:
        """dweight (V, D) float32 = or += E^T @ x, x (R, D) in float32 or E's dtype."""
        from r1fast import _C

        width = dweight.shape[1]
        assert x.dtype in (torch.float32, self.dtype), (x.dtype, self.dtype)
        assert _rows_ok(x, x.dtype, (self.num_rows, width)), (x.shape, x.stride(), dweight.shape)
        assert _rows_ok(dweight, torch.float32, (self.vocab_size, width)), dweight.dtype
        _C.native_dweight(
            *self._where,
            self._bf16,
            x.data_ptr(),
            _row_stride(x),
            x.dtype == torch.bfloat16,
            width,
            dweight.data_ptr(),
            _row_stride(dweight),
            accumulate,
            self.level,
            torch.get_num_threads(),
        )

    def dbias_(self, x: Tensor, dbias: Tensor, accumulate: bool = True) -> None:
        """dbias (V,) float32 = or += E^T @ x, x (R,)."""
        from r1fast import _C

        x = _vector(x, self.num_rows)
        assert _rows_ok(dbias, torch.float32, (self.vocab_size,)), (dbias.shape, dbias.dtype)
        _C.native_dbias(
            *self._where,
            self._bf16,
            x.data_ptr(),
            dbias.data_ptr(),
            accumulate,
            self.level,
            torch.get_num_threads(),
        )

    def dense(self) -> Tensor:
        """E as (R, V) in its dtype, a copy: for tests."""
        per_word = 2 if self._bf16 else 1
        rows = (self.vocab_size + per_word - 1) // per_word
        words = self.words[: rows * self.ld].view(self.dtype).view(rows, self.ld, per_word)
        dense = words.transpose(1, 2).reshape(rows * per_word, self.ld)
        return dense[: self.vocab_size, : self.num_rows].t().contiguous()


def forward(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (R,), -1 where the target is not among these columns
    anchor: Tensor,  # (R,)
    *,
    inv_temperature: float,
    softcap: float | None,
    keep: bool,
    want_sz: bool,
    workspace: Tensor | None = None,  # at least workspace_numel(R, V, dtype) float32
    level: str | None = None,  # amx, avx512 or avx2; default: native_level
) -> tuple[Tensor, Tensor | None, TransposedE | None]:  # s (R,), sz (R,), E
    """One pass over the vocabulary. `keep=False` makes the sums alone."""
    from r1fast import _C

    (num_rows, width), vocab_size, dtype = hidden.shape, weight.shape[0], weight.dtype
    bf16 = dtype == torch.bfloat16
    assert supported(dtype), dtype
    assert min(num_rows, width, vocab_size) > 0, (hidden.shape, weight.shape)
    assert vocab_size < 2**31 - 8, vocab_size
    assert _rows_ok(hidden, dtype, (num_rows, width)), (hidden.shape, hidden.dtype, dtype)
    assert _rows_ok(weight, dtype, (vocab_size, width)), (weight.shape, weight.stride())
    bias = None if bias is None else _vector(bias, vocab_size)
    target_ids = _vector(target_ids, num_rows, torch.int64)
    anchor = _vector(anchor, num_rows)

    level = native_level(dtype) if level is None else level
    e = None
    if keep:
        numel = _C.head_words(num_rows, vocab_size, bf16)
        if workspace is None:
            workspace = torch.empty(numel)
        assert workspace.is_cpu, workspace.device
        assert workspace.dtype == torch.float32, workspace.dtype
        assert workspace.is_contiguous(), workspace.stride()
        assert workspace.numel() >= numel, (workspace.shape, numel)
        assert workspace.data_ptr() % 64 == 0, workspace.data_ptr()  # streaming stores
        e = TransposedE(
            workspace.view(-1), _C.head_ld(num_rows), num_rows, vocab_size, dtype, level
        )
    s = torch.empty(num_rows)
    sz = torch.empty(num_rows) if want_sz else None
    _C.native_forward(
        hidden.data_ptr(),
        _row_stride(hidden),
        weight.data_ptr(),
        _row_stride(weight),
        width,
        bf16,
        _address(bias),
        target_ids.data_ptr(),
        anchor.data_ptr(),
        inv_temperature,
        softcap or 0.0,
        _address(e.words if e else None),
        e.ld if e else 0,
        num_rows,
        vocab_size,
        s.data_ptr(),
        _address(sz),
        level,
        torch.get_num_threads(),
    )
    return s, sz, e


def epilogue_(
    z: Tensor,  # (R, V) float32 or bfloat16, made E in place
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (R,)
    anchor: Tensor,  # (R,)
    *,
    inv_temperature: float,
    softcap: float | None,
    want_sz: bool,
    level: str = "auto",  # or baseline, avx2, avx512
) -> tuple[Tensor, Tensor | None]:  # s (R,), sz (R,)
    from r1fast import _C

    num_rows, vocab_size = z.shape
    assert z.dtype in (torch.float32, torch.bfloat16), z.dtype
    assert _rows_ok(z, z.dtype, (num_rows, vocab_size)), (z.shape, z.stride())
    bias = None if bias is None else _vector(bias, vocab_size)
    target_ids = _vector(target_ids, num_rows, torch.int64)
    anchor = _vector(anchor, num_rows)
    s = torch.empty(num_rows)
    sz = torch.empty(num_rows) if want_sz else None
    _C.epilogue(
        z.data_ptr(),
        _row_stride(z),
        z.dtype == torch.bfloat16,
        num_rows,
        vocab_size,
        _address(bias),
        target_ids.data_ptr(),
        anchor.data_ptr(),
        inv_temperature,
        softcap or 0.0,
        s.data_ptr(),
        _address(sz),
        level,
        torch.get_num_threads(),
    )
    return s, sz


def affine_(e: Tensor, a: Tensor, b: Tensor, *, level: str = "auto") -> None:
    """A plain E (R, V) becomes E (a + b log E) in place; zeros stay. a, b: (R,)"""
    from r1fast import _C

    num_rows, vocab_size = e.shape
    assert e.dtype in (torch.float32, torch.bfloat16), e.dtype
    assert _rows_ok(e, e.dtype, (num_rows, vocab_size)), (e.shape, e.stride())
    a, b = _vector(a, num_rows), _vector(b, num_rows)
    _C.affine_rows(
        e.data_ptr(),
        _row_stride(e),
        e.dtype == torch.bfloat16,
        num_rows,
        vocab_size,
        a.data_ptr(),
        b.data_ptr(),
        level,
        torch.get_num_threads(),
    )


def compact_(e: Tensor, index: Tensor) -> Tensor:
    """Moves the rows `index` (int64, increasing) of a plain E (R, V) to its head: a view of those."""
    from r1fast import _C

    vocab_size = e.shape[1]
    assert e.dtype in (torch.float32, torch.bfloat16), e.dtype
    assert _rows_ok(e, e.dtype, tuple(e.shape)), (e.shape, e.stride())
    index, kept = _row_index(index, e.shape[0]), index.numel()
    _C.compact_rows(
        e.data_ptr(),
        _row_stride(e),
        e.dtype == torch.bfloat16,
        vocab_size,
        index.data_ptr(),
        kept,
        torch.get_num_threads(),
    )
    return e[:kept]
