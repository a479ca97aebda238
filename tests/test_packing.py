"""r1fast._C: packing rollouts into unpadded micro-batches."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1fast import _C


@st.composite
def packings(draw, max_size=60):
    """(lengths, token_budget), from all short to all nearly as long as the budget."""
    token_budget = draw(st.integers(1, 100))
    shortest = draw(st.integers(1, token_budget))
    lengths = draw(st.lists(st.integers(shortest, token_budget), max_size=max_size))
    return lengths, token_budget


def first_fit_decreasing(lengths, token_budget):
    """The definition, O(sequences x bins)."""
    bins, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = next((b for b, left in enumerate(room) if left >= lengths[i]), None)
        if b is None:
            b = len(bins)
            bins.append([])
            room.append(token_budget)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def fewest_bins(lengths, token_budget):
    """The optimum, by search over all assignments: only for a handful of sequences."""
    best = len(lengths)

    def place(k, room):
        nonlocal best
        if len(room) >= best:
            return
        if k == len(lengths):
            best = len(room)
            return
        for b in range(len(room)):
            if room[b] >= lengths[k]:
                place(k + 1, [*room[:b], room[b] - lengths[k], *room[b + 1 :]])
        place(k + 1, [*room, token_budget - lengths[k]])

    place(0, [])
    return best


def rollout_lengths(num_sequences, seed=0):
    """Long-tailed like reasoning traces: lognormal, mean about 700, cut at 8192."""
    lengths = np.random.default_rng(seed).lognormal(6.2, 0.85, num_sequences)
    return np.clip(lengths.astype(np.int64), 1, 8192)


@given(packings())
def test_pack_is_first_fit_decreasing(packing):
    lengths, token_budget = packing
    bins = _C.pack(lengths, token_budget)
    assert bins == first_fit_decreasing(lengths, token_budget)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= token_budget for b in bins)


@given(packings(max_size=7))
def test_lower_bound_never_exceeds_the_optimum(packing):
    lengths, token_budget = packing
    bound = _C.lower_bound(lengths, token_budget)
    assert -(-sum(lengths) // token_budget) <= bound <= fewest_bins(lengths, token_budget)


def test_lower_bound_sees_what_the_sum_does_not():
    assert _C.lower_bound([6, 6, 6], 10) == 3  # no two fit together; ceil(18 / 10) is 2


@given(packings(), st.integers(1, 5))
def test_pack_balanced_keeps_every_promise(packing, num_ranks):
    lengths, token_budget = packing
    ranks = _C.pack_balanced(lengths, token_budget, num_ranks)
    num_steps = -(-len(_C.pack(lengths, token_budget)) // num_ranks)
    assert [len(rank) for rank in ranks] == [num_steps] * num_ranks
    micro_batches = [m for rank in ranks for m in rank]
    assert sorted(itertools.chain(*micro_batches)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in m) <= token_budget for m in micro_batches)
    num_empty = sum(not m for m in micro_batches)
    assert num_empty == max(0, len(micro_batches) - len(lengths))
    assert ranks == _C.pack_balanced(np.array(lengths, np.int32), token_budget, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [9000, 16384])
@pytest.mark.parametrize("quadratic", [False, True])
def test_pack_balanced_evens_ranks_and_steps(num_ranks, budget, quadratic):
    lengths = rollout_lengths(1024)
    costs = lengths * (1 + lengths / 4096) if quadratic else lengths.astype(float)
    ranks = _C.pack_balanced(lengths, budget, num_ranks, costs=costs)
    cost = np.array([[costs[m].sum() for m in rank] for rank in ranks])  # (ranks, steps)
    unavoidable = max(0, costs.max() - cost.mean())  # a sequence that outweighs a micro-batch
    assert cost.sum(1).max() <= 1.01 * cost.sum(1).mean() + unavoidable
    # what synchronised ranks wait for: the slowest of each step
    assert cost.max(0).sum() <= 1.01 * cost.sum() / num_ranks + unavoidable


def test_pack_balanced_when_every_micro_batch_is_nearly_full():
    lengths = [7, 3] * 40  # 40 bins of exactly 10: only the full packing fits
    ranks = _C.pack_balanced(lengths, 10, 4)
    assert {sum(lengths[i] for i in m) for rank in ranks for m in rank} == {10}


def test_pack_balanced_spreads_sequences_over_idle_ranks():
    assert _C.pack_balanced([1, 1, 1], 100, 4) == [[[0]], [[1]], [[2]], [[]]]
    assert _C.pack_balanced([], 100, 2) == [[], []]


def test_pack_balanced_follows_costs_not_lengths():
    ranks = _C.pack_balanced([1, 1, 10, 10], 100, 2, costs=[9, 9, 1, 1])
    assert ranks == [[[0, 2]], [[1, 3]]]


def test_ties_go_to_the_lower_index():
    assert _C.pack([3, 5, 3, 5], 8) == [[1, 0], [3, 2]]


def test_pack_flat_is_pack():
    lengths = rollout_lengths(1000)
    order, offsets = _C.pack_flat(lengths, 16384)
    assert order.dtype == offsets.dtype == np.int64
    bins = [order[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert bins == _C.pack(lengths.tolist(), 16384)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_every_integer_array_is_read(dtype):
    lengths = np.array([3, 9, 5, 9, 2, 9, 4], dtype)
    assert (
        _C.pack(lengths[::2], 7) == _C.pack((3, 5, 2, 4), 7) == [[1, 2], [3, 0]]
    )  # not contiguous
    assert _C.pack(list(lengths[::2]), 7) == [[1, 2], [3, 0]]  # a list of numpy scalars


def test_nothing_packs_into_no_bins():
    assert _C.pack([], 8) == []
    assert _C.pack(np.array([], np.int64), 8) == []
    order, offsets = _C.pack_flat([], 8)
    assert order.tolist() == []
    assert offsets.tolist() == [0]
    assert _C.lower_bound([], 8) == 0


def test_a_budget_far_over_the_total_is_one_bin():
    assert _C.pack([1, 2, 3], 2**63 - 1) == [[2, 1, 0]]
    assert _C.pack([2**62, 2**61], 2**62) == [[0], [1]]
    assert _C.lower_bound([2**62, 2**61], 2**62) == 2


FUNCTIONS = {
    "pack": _C.pack,
    "pack_flat": _C.pack_flat,
    "pack_balanced": lambda lengths, budget: _C.pack_balanced(lengths, budget, 2),
    "lower_bound": _C.lower_bound,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("lengths", "token_budget", "error", "message"),
    [
        ([1, 9], 8, ValueError, r"sequence 1 has 9 tokens, more than token_budget 8; raise token_"),
        ([4, 0], 8, ValueError, r"sequence 1 has length 0; lengths must be positive"),
        ([-3], 8, ValueError, r"sequence 0 has length -3; lengths must be positive"),
        ([4], 0, ValueError, r"token_budget must be positive, got 0"),
        ([4], -1, ValueError, r"token_budget must be positive, got -1"),
        ([2**62] * 2, 2**62, ValueError, r"sum to more than 2\*\*63 - 1 \(at sequence 1\)"),
        ([4, 2**63], 8, ValueError, r"lengths\[1\] does not fit in 64 bits"),
        (np.array([2**63], np.uint64), 8, ValueError, r"lengths\[0\] does not fit in 64 bits"),
        ([4], 2**63, ValueError, r"token_budget does not fit in 64 bits"),
        ([4, 2.0], 8, TypeError, r"lengths\[1\] must be an integer, got float 2.0"),
        ([True], 8, TypeError, r"lengths\[0\] must be an integer, got bool True"),
        (["4"], 8, TypeError, r"lengths\[0\] must be an integer, got str '4'"),
        ([4], 8.5, TypeError, r"token_budget must be an integer, got float 8.5"),
        (np.array([4.0]), 8, TypeError, r"1-d integer array, got numpy.ndarray of dtype float64"),
        (np.array([[4]]), 8, TypeError, r"1-d integer array, got .* with 2 dimension"),
        (4, 8, TypeError, r"1-d integer array, got int"),
        (None, 8, TypeError, r"1-d integer array, got NoneType"),
        ("44", 8, TypeError, r"1-d integer array, got str"),
    ],
)
def test_bad_input_is_named(function, lengths, token_budget, error, message):
    with pytest.raises(error, match=message):
        function(lengths, token_budget)


@pytest.mark.parametrize(
    ("num_ranks", "costs", "error", "message"),
    [
        (0, None, ValueError, "num_ranks must be positive, got 0"),
        (2, [1.0], ValueError, "got 1 costs for 2 lengths"),
        (2, [1.0, float("nan")], ValueError, "cost of sequence 1 is nan"),
        (2, [1.0, -1.0], ValueError, "cost of sequence 1 is -1"),
        (2, [[1.0, 2.0]], TypeError, "costs must be"),
        (2.0, None, TypeError, "num_ranks must be an integer"),
    ],
)
def test_bad_ranks_and_costs_are_named(num_ranks, costs, error, message):
    with pytest.raises(error, match=message):
        _C.pack_balanced([4, 5], 8, num_ranks, costs=costs)


def test_a_million_sequences_pack_in_under_two_seconds_and_99_percent_full():
    lengths = rollout_lengths(1_000_000)
    start = time.perf_counter()
    order, offsets = _C.pack_flat(lengths, 16384)
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine
    assert lengths.sum() / ((len(offsets) - 1) * 16384) >= 0.99
    assert np.array_equal(np.sort(order), np.arange(len(lengths)))
    tokens = np.add.reduceat(lengths[order], offsets[:-1])
    assert tokens.max() <= 16384


def longest_pause_while_packing(lengths):
    """How long this thread stood still, as a share of the time that another one packed."""
    packed = {}

    def work():
        start = time.perf_counter()
        _C.pack_flat(lengths, 2**41)
        packed["seconds"] = time.perf_counter() - start

    thread = threading.Thread(target=work)
    longest_pause, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest_pause, last = max(longest_pause, now - last), now
    return longest_pause / packed["seconds"]


def test_the_gil_is_released_while_packing():
    lengths = np.random.default_rng(0).integers(1, 2**40, 2_000_000)  # four radix passes
    # with the GIL held it is about 1 every time; a busy machine may stall one of three
    assert min(longest_pause_while_packing(lengths) for _ in range(3)) < 0.5
