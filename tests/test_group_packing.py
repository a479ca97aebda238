"""r1fast._C.pack_groups: groups in micro-batches that hold each prompt once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1fast import _C


@st.composite
def group_packings(draw):
    """(prompts, completions, token_budget), from groups that fit to groups of many pieces."""
    budget = draw(st.integers(2, 60))
    prompts = draw(st.lists(st.integers(1, budget), max_size=8))
    completions = [
        draw(st.lists(st.integers(0, budget - p), min_size=1, max_size=10)) for p in prompts
    ]
    return prompts, completions, budget


def tokens(piece, prompts, completions) -> int:
    group, members = piece
    return prompts[group] + sum(completions[group][i] for i in members)


@given(group_packings(), st.integers(1, 3))
def test_every_promise(packing, num_ranks):
    prompts, completions, budget = packing
    ranks = _C.pack_groups(prompts, completions, budget, 1.5, num_ranks)
    assert len(ranks) == num_ranks
    assert len({len(rank) for rank in ranks}) == 1
    bins = [b for rank in ranks for b in rank]
    placed = sorted((g, i) for b in bins for g, members in b for i in members)
    assert placed == [(g, i) for g, row in enumerate(completions) for i in range(len(row))]
    for b in bins:
        groups = [g for g, _ in b]
        assert groups == sorted(set(groups))
        assert all(members and members == sorted(members) for _, members in b)
        assert sum(tokens(piece, prompts, completions) for piece in b) <= budget
    for g, row in enumerate(completions):
        num_pieces = sum(group == g for b in bins for group, _ in b)
        if prompts[g] + sum(row) <= budget:
            assert num_pieces == 1
        else:
            assert num_pieces <= len(_C.pack([r for r in row if r], budget - prompts[g]))
    assert ranks == _C.pack_groups(prompts, completions, budget, 1.5, num_ranks)


def test_a_group_is_split_evenly():
    (bins,) = _C.pack_groups([1], [[3, 3, 3, 3]], 10)
    assert sorted(len(members) for ((_, members),) in bins) == [2, 2]


def test_unless_full_pieces_save_a_micro_batch():
    """Even pieces of 7 + 7 leave no room for 6; full ones of 10 + 4 do."""
    (bins,) = _C.pack_groups([1, 1], [[3, 3, 3, 3], [5]], 10)
    assert sorted(sum(tokens(p, [1, 1], [[3] * 4, [5]]) for p in b) for b in bins) == [10, 10]


def test_costs_count_attention_to_the_prompt():
    """Two groups with a long prompt and two without, as many tokens each: one of both a rank."""
    prompts, completions = [60, 60, 2, 2], [[40], [40], [49, 49], [49, 49]]
    ranks = _C.pack_groups(prompts, completions, 200, 0.0, 2)
    assert [sorted(g for b in rank for g, _ in b) for rank in ranks] == [[0, 2], [1, 3]]


def test_no_groups():
    assert _C.pack_groups([], [], 10, 1.0, 2) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "completions", "budget", "cost", "message"),
    [
        ([3], [[2, 8]], 10, 1, "group 0, completion 1 has 8 tokens and a prompt of 3, more than token_budget 10"),
        ([11], [[0]], 10, 1, "completion 0 has 0 tokens and a prompt of 11"),
        ([1, 0], [[1], [1]], 10, 1, "group 1 has a prompt of length 0"),
        ([1], [[]], 10, 1, "group 0 has no completion"),
        ([1], [[-1]], 10, 1, "group 0, completion 0 has length -1"),
        ([1], [], 10, 1, "got 1 prompts and completions of 0 groups"),
        ([1], [[1]], 0, 1, "token_budget must be positive, got 0"),
        ([1], [[1]], 10, float("nan"), "cost_per_token must be finite"),
        ([1], [[2**62, 2**62, 2**62]], 2**63 - 1, 1, "sum to more than"),
    ],
)  # fmt: skip
def test_errors(prompts, completions, budget, cost, message):
    with pytest.raises(ValueError, match=message):
        _C.pack_groups(prompts, completions, budget, cost)


def test_ranks_must_be_positive():
    with pytest.raises(ValueError, match="num_ranks must be positive"):
        _C.pack_groups([1], [[1]], 10, 1.0, 0)
