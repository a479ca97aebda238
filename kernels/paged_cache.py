"""A paged KV cache: where one layer's keys and values of a position lie, and how they get there.

Position p of a sequence has the slot  block_table[p // block_size] * block_size + p % block_size.
Two kinds of storage, chosen with the layout and hidden behind `write_kv` and `read_kv`:

    rows    both (num_blocks, block_size, K, Dh): CUDA, and what flash attention takes
    tiled   tiles of 16 slots, for the CPU kernels of csrc/decode_attention.hpp
            keys (tiles, K, Dh, 16), so that a vector holds 16 positions of one dimension; in
            bfloat16 (tiles, K, Dh / 2, 16, 2), two dimensions in a word;  values (tiles, K, 16, Dh)
            A tile may instead hold 16 rows, keys and values (K, Dh), of positions on their own: slot
            -1 - i is row i of all that there would be.

Shapes: N tokens, K kv heads, Dh head width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from r1fast.kernels.dispatch import Backend, use_triton

TILE = 16  # slots of a tile: the float32 lanes of AVX-512


@dataclass(frozen=True)
class PagedLayout:
    """How one layer's keys and values are stored. Raises ValueError for sizes that cannot be.

    `kind` is rows or tiled; auto is tiled for float32 and bfloat16 on the CPU where it fits.
    """

    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    kind: str = "auto"
    _kind: str = field(init=False, repr=False, default="")

    def __post_init__(self):
        for name in ("num_kv_heads", "head_dim", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        fits = (
            torch.device(self.device).type == "cpu"
            and self.dtype in (torch.float32, torch.bfloat16)
            and self.block_size % TILE == 0
            and self.head_dim % 2 == 0
        )
        if self.kind not in ("auto", "rows", "tiled"):
            raise ValueError(f"kind must be auto, rows or tiled, got {self.kind!r}")
        if self.kind == "tiled" and not fits:
            raise ValueError(
                "tiled storage is for float32 or bfloat16 on the CPU, an even head_dim and a "
                f"block_size that {TILE} divides; got {self.dtype} on {self.device}, "
                f"head_dim {self.head_dim}, block_size {self.block_size}"
            )
        tiled = self.kind == "tiled" or (self.kind == "auto" and fits)
        object.__setattr__(self, "_kind", "tiled" if tiled else "rows")

    @property
    def is_tiled(self) -> bool:
        return self._kind == "tiled"

    def allocate(self, num_blocks: int) -> tuple[Tensor, Tensor]:
        """One layer's (keys, values), not initialised."""
        key_shape, value_shape = self.shapes(num_blocks)
        return (
            torch.empty(key_shape, dtype=self.dtype, device=self.device),
            torch.empty(value_shape, dtype=self.dtype, device=self.device),
        )

    def shapes(self, num_blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        K, Dh = self.num_kv_heads, self.head_dim
        if not self.is_tiled:
            return ((num_blocks, self.block_size, K, Dh),) * 2
        tiles = num_blocks * (self.block_size // TILE)
        packed = (Dh // 2, TILE, 2) if self.dtype == torch.bfloat16 else (Dh, TILE)
        return (tiles, K, *packed), (tiles, K, TILE, Dh)

    def bytes_per_block(self) -> int:
        """Keys and values of one block in one layer."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Our own mistakes: storage that this layout has not allocated."""
        num_slots = keys.numel() // (self.num_kv_heads * self.head_dim)
        shapes = self.shapes(num_slots // self.block_size)
        assert (tuple(keys.shape), tuple(values.shape)) == shapes, (keys.shape, values.shape)
        assert keys.dtype == values.dtype == self.dtype, (keys.dtype, values.dtype, self.dtype)
        assert keys.is_contiguous(), keys.stride()
        assert values.is_contiguous(), values.stride()


def write_kv_ref(
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    k: Tensor,  # (N, K, Dh)
    v: Tensor,  # (N, K, Dh)
    slot_mapping: Tensor,  # (N,) int64
) -> None:
    """What `write_kv` does, in plain PyTorch."""
    if not layout.is_tiled:
        keys.flatten(0, 1)[slot_mapping] = k.to(layout.dtype)
        values.flatten(0, 1)[slot_mapping] = v.to(layout.dtype)
        return
    k, v, rows = k.to(layout.dtype), v.to(layout.dtype), slot_mapping < 0
    for x, part in ((keys, k), (values, v)):
        x.view(-1, *part.shape[1:])[~slot_mapping[rows]] = part[rows]
    k, v, slot_mapping = k[~rows], v[~rows], slot_mapping[~rows]
    tile, lane = slot_mapping // TILE, slot_mapping % TILE
    keys[tile, :, :, lane] = k.unflatten(2, (-1, 2)) if keys.dim() == 5 else k
    values[tile, :, lane] = v


def write_kv(
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    k: Tensor,  # (N, K, Dh)
    v: Tensor,  # (N, K, Dh)
    slot_mapping: Tensor,  # (N,) int64, distinct but for those that nobody reads
    *,
    backend: Backend = "auto",
) -> None:
    """Stores each token's key and value in its slot. Slots are not checked.

    On CUDA in one kernel that can be captured: assignment by index would, in PyTorch's deterministic
    mode, ask the device for the largest.
    """
    layout.check(keys, values)
    assert k.shape == v.shape == (len(slot_mapping), layout.num_kv_heads, layout.head_dim), k.shape
    by_triton = not layout.is_tiled and use_triton(k, backend)
    if not layout.is_tiled and not by_triton:
        write_kv_ref(layout, keys, values, k, v, slot_mapping)
        return
    k, v = (x if _rows_ok(x, layout.dtype) else x.to(layout.dtype).contiguous() for x in (k, v))
    if by_triton:
        from r1fast.kernels.triton_paged_attention import write_kv_triton

        write_kv_triton(keys, values, k, v, slot_mapping)
        return
    from r1fast import _C

    _C.write_kv(
        keys.data_ptr(), values.data_ptr(), layout.num_kv_heads, layout.head_dim,
        layout.dtype == torch.bfloat16, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        slot_mapping.contiguous().data_ptr(), len(slot_mapping), torch.get_num_threads(),
    )  # fmt: skip


def _rows_ok(x: Tensor, dtype: torch.dtype) -> bool:
    """(N, K, Dh) of this dtype, contiguous within a token."""
    return x.dtype == dtype and x.stride(2) == 1 and x.stride(1) == x.shape[2]


def read_kv(
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,  # (N,) int64
) -> tuple[Tensor, Tensor]:  # (N, K, Dh) each
    """The keys and values of these slots, as they were written."""
    layout.check(keys, values)
    if not layout.is_tiled:
        return keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots]
    tile, lane = slots.clamp_min(0) // TILE, slots % TILE
    shape = (len(slots), layout.num_kv_heads, layout.head_dim)
    k, v = keys[tile, :, :, lane].reshape(shape), values[tile, :, lane]
    rows = slots < 0
    for x, part in ((keys, k), (values, v)):
        part[rows] = x.view(-1, *shape[1:])[~slots[rows]]
    return k, v


def copy_blocks(
    layout: PagedLayout,
    keys: Tensor,
    values: Tensor,
    source: Tensor,  # (N,) int64 block numbers
    target: Tensor,  # (N,) int64, distinct, none of them a source
) -> None:
    """Block target[i] becomes a copy of block source[i]."""
    layout.check(keys, values)
    for x in (keys, values):
        size = layout.block_size * layout.num_kv_heads * layout.head_dim
        blocks = x.view(-1, size)  # (num_blocks, elements)
        blocks[target] = blocks[source]
