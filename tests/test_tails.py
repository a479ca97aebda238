"""Positions on their own in a paged cache: where they lie, what moves, and what attention sees of it."""

import random

import numpy as np
import pytest
import torch

from r1fast._C import BlockAllocator, Tails
from r1fast.kernels.paged_attention import (
    TILE,
    DecodePlan,
    PagedLayout,
    paged_attention,
    read_kv,
    write_kv,
)
from r1fast.kernels.paged_cache import write_kv_ref

K, DH, SLOTS, LAYERS = 2, 18, 6, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Cache:
    """Sequences that grow and end; what each layer must hold of them."""

    def __init__(self, num_blocks: int, dtype: torch.dtype):
        self.layout = PagedLayout(K, DH, TILE, dtype, kind="tiled")
        self.allocator = BlockAllocator(num_blocks, TILE)
        self.layers = [self.layout.allocate(num_blocks) for _ in range(LAYERS)]
        self.tails = Tails(self.allocator, SLOTS, K, DH, dtype.itemsize)
        for keys, values in self.layers:
            for x in (keys, values):
                x.fill_(torch.nan)
            self.tails.add_layer(keys.data_ptr(), values.data_ptr())
        self.length = np.ones(SLOTS, np.int64)  # a token that is not in the cache
        self.blocks, self.num_blocks = np.zeros((SLOTS, 8), np.int32), np.zeros(SLOTS, np.int64)
        self.expected = [torch.zeros(0, LAYERS, 2, K, DH, dtype=dtype) for _ in range(SLOTS)]

    def missing(self, slots: np.ndarray) -> int:
        return self.tails.missing(slots, self.length, self.num_blocks)

    def grow(self, slots: np.ndarray) -> bool:
        """A position more of each, with random contents."""
        if not self.tails.grow(slots, self.length, self.blocks, self.num_blocks):
            return False
        for slot in slots:
            new = torch.randn(1, *self.expected[slot].shape[1:]).to(self.layout.dtype)
            where = self.where(slot, np.array([self.length[slot] - 1]))
            for (keys, values), x in zip(self.layers, new.unbind(1), strict=True):
                write_kv(self.layout, keys, values, x[:, 0], x[:, 1], where)
            self.expected[slot] = torch.cat((self.expected[slot], new))
            self.length[slot] += 1
        return True

    def where(self, slot: int, positions: np.ndarray) -> torch.Tensor:
        blocks = self.blocks[slot, positions // TILE].astype(np.int64)
        own = self.tails.table[slot, positions % TILE]
        return torch.from_numpy(np.where(blocks < 0, own, blocks * TILE + positions % TILE))

    def end(self, slot: int) -> None:
        self.tails.release(slot)
        self.allocator.free(self.blocks[slot, : self.num_blocks[slot]])
        self.length[slot], self.num_blocks[slot] = 1, 0
        self.expected[slot] = self.expected[slot][:0]

    def check(self) -> None:
        total = sum(map(len, self.expected))
        assert self.tails.num_positions == total - TILE * self.num_blocks.sum()
        assert self.allocator.num_used == -(-total // TILE)
        for slot, expected in enumerate(self.expected):
            where = self.where(slot, np.arange(len(expected)))
            for layer, (keys, values) in enumerate(self.layers):
                found = torch.stack(read_kv(self.layout, keys, values, where), 1)
                assert torch.equal(found, expected[:, layer])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sequences_that_grow_and_end_keep_what_they_hold(dtype):
    rng, cache = random.Random(0), Cache(40, dtype)
    torch.manual_seed(0)
    for _ in range(300):
        chosen = np.array(sorted(rng.sample(range(SLOTS), rng.randint(1, SLOTS))))
        chosen = chosen[cache.length[chosen] < 8 * TILE]
        if rng.random() < 0.1:
            cache.end(rng.randrange(SLOTS))
        before, missing = cache.allocator.num_used, cache.missing(chosen)
        assert cache.grow(chosen)
        assert cache.allocator.num_used == before + missing
        cache.check()
    for slot in range(SLOTS):
        cache.end(slot)
    cache.check()


def test_tiles_need_no_block_beside_the_rows_they_come_from():
    """As many blocks as sequences: each of them gets its tile though rows are all over the others."""
    cache = Cache(SLOTS, torch.float32)
    slots = np.arange(SLOTS)
    for _ in range(TILE):
        assert cache.grow(slots)
    cache.check()
    assert cache.allocator.num_available == 0
    assert not cache.grow(slots[:1])
    cache.check()
    assert cache.allocator.peak_used == SLOTS


def test_a_block_is_adopted_by_several():
    cache = Cache(8, torch.bfloat16)
    for _ in range(5):
        cache.grow(np.array([0]))
    where = torch.arange(7 * TILE, 7 * TILE + 5)
    others = cache.allocator.allocate(7)  # what is left; tile 7 is what is copied
    block = 7
    assert block in others
    for (keys, values), x in zip(cache.layers, cache.expected[0].unbind(1), strict=True):
        write_kv(cache.layout, keys, values, x[:, 0], x[:, 1], where)
    assert cache.allocator.num_available == 0
    for slot in (1, 2):
        assert cache.tails.adopt(slot, block, 5)
        cache.blocks[slot, 0], cache.length[slot] = -1, 6
        cache.expected[slot] = cache.expected[0]
    assert cache.tails.num_positions == 15
    assert not cache.tails.adopt(3, block, 2)  # a 17th position has no room
    assert cache.tails.num_positions == 15
    with pytest.raises(ValueError, match="without rows adopts fewer than 16 positions of a block"):
        cache.tails.adopt(1, block, 1)
    with pytest.raises(ValueError, match="slot 6 is not one"):
        cache.tails.release(SLOTS)
    cache.allocator.free(others)
    cache.check()


@pytest.mark.parametrize(
    ("block_size", "head_dim", "message"), [(32, 18, "blocks of 16"), (16, 17, "whole words")]
)
def test_what_has_no_tails(block_size, head_dim, message):
    with pytest.raises(ValueError, match=message):
        Tails(BlockAllocator(4, block_size), 1, K, head_dim, 2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention_over_tails_is_that_over_tiles(dtype):
    """To the bit: a tail is read as the tile that it will be."""
    torch.manual_seed(1)
    cache, lengths = Cache(64, dtype), [1, 15, 16, 17, 67, 90]
    for n in range(max(lengths)):
        cache.grow(np.array([s for s in range(SLOTS) if n < lengths[s]]))
    keys, values = cache.layers[1]
    tiles = cache.layout.allocate(SLOTS * 6)
    table = torch.arange(SLOTS * 6).view(SLOTS, 6).int()
    for slot, expected in enumerate(cache.expected):
        where = torch.arange(len(expected)) + slot * 6 * TILE
        write_kv_ref(cache.layout, *tiles, expected[:, 1, 0], expected[:, 1, 1], where)
    q = torch.randn(SLOTS, 4, DH).to(dtype)
    context = torch.tensor(lengths).int()
    each = torch.arange(SLOTS + 1).int()
    plan = DecodePlan(
        torch.from_numpy(cache.blocks), context, each, 0 * each[1:],
        tails=torch.from_numpy(cache.tails.table.copy()),
    )  # fmt: skip
    whole = DecodePlan(table, context, each, 0 * each[1:])
    for backend in ("native", "torch"):
        found = paged_attention(q, cache.layout, keys, values, plan, backend=backend)
        assert torch.equal(found, paged_attention(q, cache.layout, *tiles, whole, backend=backend))
        assert found.isfinite().all()


def test_written_rows_are_read_by_the_plain_version():
    torch.manual_seed(2)
    layout = PagedLayout(K, DH, TILE, torch.bfloat16, kind="tiled")
    slots = torch.tensor([~37, 20, ~0, 25])  # rows lie in tiles 0 and 2
    k, v = torch.randn(2, 4, K, DH).bfloat16()
    by_both = []
    for write in (write_kv, write_kv_ref):
        cache = tuple(x.zero_() for x in layout.allocate(3))
        write(layout, *cache, k, v, slots)
        by_both.append(cache)
    assert all(torch.equal(a, b) for a, b in zip(*by_both, strict=True))
