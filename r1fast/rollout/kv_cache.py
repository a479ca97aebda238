"""The paged KV cache: one pool of blocks for every sequence, of a size that is given or found.

A block holds `block_size` positions of all layers. Who holds which is `_C.BlockAllocator`'s affair; how
a layer's keys and values lie inside is `kernels.paged_cache`'s. In tiles, what running samples have behind
their last full block is held position by position (`_C.Tails`).
"""

from pathlib import Path

import torch
from torch import Tensor

from r1fast._C import BlockAllocator, Tails
from r1fast.kernels.paged_attention import TILE, PagedLayout, copy_blocks, write_kv
from r1fast.model import ModelSpec

FOUND_SHARE = 0.5  # of the memory that is free, where no budget is given


class KVCache:
    """Keys and values of all layers. On a CPU only what is written to takes memory.

    `num_bytes` None takes what `max_sequences` of `max_positions` need, and at most half the free memory.
    `has_tails` makes `tails` for `max_sequences` slots where the layout lets it; None elsewhere.
    Raises ValueError for a budget that does not hold a single block, and for a type of weights that the
    engine does not compute in.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        block_size: int,
        num_bytes: int | None,
        max_sequences: int,
        max_positions: int,
        has_tails: bool = False,
    ):
        types = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type != "cpu")
        if dtype not in types:
            raise ValueError(
                f"the engine takes weights in {', '.join(map(str, types))} on {device.type}, got {dtype}; "
                "use model.to"
            )
        self.layout = PagedLayout(
            spec.num_kv_heads, spec.head_dim, block_size, dtype=dtype, device=device
        )
        self.block_size, self.dtype, self.device = block_size, dtype, device
        self.block_bytes = self.layout.bytes_per_block() * spec.num_layers
        largest = max_sequences * -(-max_positions // block_size)
        room = int(free_memory(device) * FOUND_SHARE) if num_bytes is None else num_bytes
        num_blocks = min(room // self.block_bytes, largest)
        if num_blocks < 1:
            raise ValueError(
                f"a cache of {room} bytes holds no block: one of {block_size} positions takes "
                f"{self.block_bytes} bytes in the model's {spec.num_layers} layers"
            )
        # with a budget all of it may keep prefixes; a found one is not to be filled by them
        self.allocator = BlockAllocator(
            num_blocks, block_size, max_cached=-1 if num_bytes is None else num_blocks
        )
        # the last block is nobody's: rows that only fill up a batch write there
        self.layers = [self.layout.allocate(num_blocks + 1) for _ in range(spec.num_layers)]
        self.tails: Tails | None = None
        if has_tails and self.layout.is_tiled and block_size == TILE:
            self.tails = Tails(
                self.allocator, max_sequences, spec.num_kv_heads, spec.head_dim, dtype.itemsize
            )
            for keys, values in self.layers:
                self.tails.add_layer(keys.data_ptr(), values.data_ptr())

    def fits(self, weight: Tensor) -> bool:
        """Whether keys and values of this weight's type and device can be stored."""
        return (weight.dtype, weight.device) == (self.dtype, self.device)

    @property
    def num_blocks(self) -> int:
        return self.allocator.num_blocks

    @property
    def scratch_slot(self) -> int:
        """A slot that no sequence ever reads."""
        return self.num_blocks * self.block_size

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """(N, K, Dh), (N, K, Dh), (N,) int64"""
        write_kv(self.layout, *self.layers[layer], k, v, slots)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Block target[i] of every layer becomes a copy of source[i]; (N,) int64."""
        for keys, values in self.layers:
            copy_blocks(self.layout, keys, values, source, target)


def free_memory(device: torch.device) -> int:
    """Bytes that could still be had: of the GPU, or of the machine and the control group we are in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit, used = (_lines(group / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():
        free.append(max(int(limit[0]) - int(used[0]), 0))
    return min(free, default=4 << 30)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
