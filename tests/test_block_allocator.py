"""Blocks of the KV cache: holders, the free list, prefixes found again, what is evicted first."""

import random

import numpy as np
import pytest

from r1fast._C import BlockAllocator


def test_allocate_share_free():
    a = BlockAllocator(4, 16)
    blocks = a.allocate(3)
    assert len(set(blocks.tolist())) == 3
    assert (a.num_used, a.num_available, a.peak_used) == (3, 1, 3)
    a.share(blocks[:2])
    a.free(blocks)
    assert a.num_used == 2
    assert [a.holders(b) for b in blocks] == [1, 1, 0]
    a.free(blocks[:2])
    assert (a.num_used, a.num_available, a.peak_used, a.num_cached) == (0, 4, 3, 0)
    assert len(a.allocate(0)) == 0


def test_errors_leave_the_counts_alone():
    a = BlockAllocator(3, 2)
    blocks = a.allocate(2)
    with pytest.raises(ValueError, match="cannot allocate 2 blocks, 1 of 3 are available"):
        a.allocate(2)
    with pytest.raises(ValueError, match="cannot allocate -1 blocks"):
        a.allocate(-1)
    with pytest.raises(ValueError, match=r"block 7 is outside \[0, 3\)"):
        a.free([7])
    with pytest.raises(ValueError, match="block 2 has no holder"):
        a.share([2])
    assert a.num_used == 2
    a.free(blocks)
    with pytest.raises(ValueError, match=f"block {blocks[1]} has no holder: it was freed before"):
        a.free(blocks)
    with pytest.raises(ValueError, match="2 blocks of 2 need 4 tokens, got 3"):
        a.insert([1, 2, 3], a.allocate(2))
    for bad in ((0, 16), (4, 0), (4, 16, -2), (4, 16, -1, 65)):
        with pytest.raises(ValueError, match=r"num_blocks|block_size|max_cached|hash_bits"):
            BlockAllocator(*bad)


def test_a_prefix_is_found_by_its_tokens():
    a = BlockAllocator(8, 2)
    blocks = a.allocate(3)
    a.insert([1, 2, 3, 4, 5], blocks[:2])
    assert a.lookup([1, 2, 3, 4, 5, 6]).tolist() == blocks[:2].tolist()
    assert a.lookup([1, 2, 3]).tolist() == blocks[:1].tolist()
    assert a.lookup([3, 4]).tolist() == []  # the same tokens elsewhere
    assert a.lookup([9, 9, 3, 4]).tolist() == []
    assert [a.holders(b) for b in blocks] == [3, 2, 1]
    a.free(blocks)
    a.free(blocks[:2])
    a.free(blocks[:1])
    assert (a.num_used, a.num_cached) == (0, 2)  # nobody holds them, still to be found
    found = a.lookup([1, 2, 3, 4])
    assert (a.num_used, a.num_cached) == (2, 0)
    a.free(found)
    a.reset()
    assert (a.num_cached, len(a.lookup([1, 2]))) == (0, 0)


def test_reset_while_held():
    a = BlockAllocator(4, 1)
    held = a.allocate(2)
    a.insert([5, 6], held)
    a.reset()
    assert len(a.lookup([5, 6])) == 0
    a.free(held)
    assert (a.num_used, a.num_cached) == (0, 0)


def test_the_longest_unused_goes_first_and_of_a_chain_its_end():
    a = BlockAllocator(4, 1, max_cached=4)
    old, new = a.allocate(2), a.allocate(2)
    a.insert([1, 2], old)
    a.insert([7, 8], new)
    a.free(old)
    a.free(new)
    assert a.num_cached == 4
    a.free(a.allocate(1))
    assert a.lookup([1, 2]).tolist() == old[:1].tolist()  # its end has gone
    a.free(old[:1])
    a.free(a.allocate(3))
    assert len(a.lookup([7, 8])) == 0
    assert a.lookup([1]).tolist() == old[:1].tolist()  # used last


def test_what_is_kept_without_a_holder_is_limited():
    a = BlockAllocator(100, 1, max_cached=3)
    for token in range(50):
        block = a.allocate(1)
        a.insert([token], block)
        a.free(block)
    assert a.num_cached == 3
    assert [len(a.lookup([t])) for t in (46, 47, 49)] == [0, 1, 1]
    b = BlockAllocator(100, 1)  # as many as were ever held at once: 2
    pair = b.allocate(2)
    b.insert([1, 2], pair)
    b.free(pair)
    for token in range(50, 60):
        block = b.allocate(1)
        b.insert([token], block)
        b.free(block)
    assert b.num_cached == 2


@pytest.mark.parametrize("hash_bits", [0, 1, 64])
def test_a_collision_is_a_miss_never_a_wrong_prefix(hash_bits):
    """With 0 bits every hash is equal: only tokens and chains tell prefixes apart."""
    rng = random.Random(0)
    a, content = BlockAllocator(64, 2, 64, hash_bits), {}
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(8)]
        found = a.lookup(tokens)
        for i, block in enumerate(found.tolist()):
            assert content[block] == tokens[: 2 * i + 2]
        blocks = np.concatenate((found, a.allocate(4 - len(found))))
        for i, block in enumerate(blocks.tolist()[len(found) :], len(found)):
            content[block] = tokens[: 2 * i + 2]
        a.insert(tokens, blocks)
        a.free(blocks)
        assert a.num_used == 0


def test_a_chain_whose_beginning_was_evicted_is_computed_again():
    a = BlockAllocator(3, 1, max_cached=3)
    chain = a.allocate(2)
    a.insert([1, 2], chain)
    a.free(chain[:1])  # the beginning has no holder, the end has
    a.allocate(2)  # evicts it
    assert len(a.lookup([1, 2])) == 0
    a.free(chain[1:])
    assert (a.num_used, a.num_cached) == (2, 1)


def test_random_use_against_a_model():
    """Against dictionaries: counts, no block handed out twice, found prefixes hold the right tokens."""
    rng = random.Random(1)
    a, holders, sequences, content = BlockAllocator(40, 2), {}, [], {}
    for _ in range(5000):
        if sequences and (rng.random() < 0.45 or a.num_available < 5):
            tokens, blocks = sequences.pop(rng.randrange(len(sequences)))
            a.free(blocks)
            for b in blocks.tolist():
                holders[b] -= 1
        elif sequences and rng.random() < 0.3:
            tokens, blocks = rng.choice(sequences)
            a.share(blocks)
            sequences.append((tokens, blocks))
            for b in blocks.tolist():
                holders[b] += 1
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
            found = a.lookup(tokens)
            fresh = a.allocate(-(-len(tokens) // 2) - len(found))
            for i, b in enumerate(found.tolist()):
                assert content[b] == tokens[: 2 * i + 2]
            assert not any(holders.get(b) for b in fresh.tolist())
            for i, b in enumerate(fresh.tolist(), len(found)):
                content[b] = tokens[: 2 * i + 2]
            blocks = np.concatenate((found, fresh))
            a.insert(tokens, blocks[: len(tokens) // 2])
            sequences.append((tokens, blocks))
            for b in blocks.tolist():
                holders[b] = holders.get(b, 0) + 1
        assert a.num_used == sum(h > 0 for h in holders.values())
        assert a.num_used + a.num_available == 40
        for b, h in holders.items():
            assert a.holders(b) == h
    for _, blocks in sequences:
        a.free(blocks)
    assert a.num_used == 0
