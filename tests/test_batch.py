import pytest
import torch

from r1fast.batch import collate, pack
from r1fast.types import Sequence


def make_sequences() -> list[Sequence]:
    return [
        Sequence([10, 11, 12], [13, 14], [-1.0, -2.0], [-3.0, -4.0], advantage=0.5),
        Sequence([20], [21, 22, 23], [-5.0, -6.0, -7.0], [-8.0, -9.0, -10.0], advantage=-1.5),
        Sequence([30, 31], [32], [-11.0], None, advantage=2.0),
    ]


def test_the_shift_by_hand():
    """Position t holds token t and learns token t + 1; the last token is only ever a target."""
    batch = collate(make_sequences(), [0.1, 0.2, 0.3], [4, 5, 6], "cpu")
    T, F = True, False
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 30, 31]
    assert batch.target_ids.tolist() == [0, 0, 13, 14, 21, 22, 23, 0, 32]
    assert batch.completion_mask.tolist() == [F, F, T, T, T, T, T, F, T]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9]
    assert batch.max_seqlen == 4
    assert batch.old_logprobs.tolist() == [0, 0, -1, -2, -5, -6, -7, 0, -11]
    assert batch.ref_logprobs.tolist() == [0, 0, -3, -4, -8, -9, -10, 0, 0]
    assert batch.advantages.tolist() == [0, 0, 0.5, 0.5, -1.5, -1.5, -1.5, 0, 2]
    expected = torch.tensor([0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0, 0.3])
    torch.testing.assert_close(batch.token_weights, expected)
    assert batch.sequence_index == [4, 5, 6]
    assert batch.policy_logprobs is None
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.dtype == batch.target_ids.dtype == torch.int64
    assert batch.token_weights.dtype == batch.old_logprobs.dtype == torch.float32


def test_policy_logprobs_stand_where_the_targets_are():
    sequences = make_sequences()
    for s in sequences:
        s.policy_logprobs = [x - 0.5 for x in s.old_logprobs]
    batch = collate(sequences, [1.0] * 3, [0, 1, 2], "cpu")
    expected = torch.where(batch.completion_mask, batch.old_logprobs - 0.5, 0.0)
    assert torch.equal(batch.policy_logprobs, expected)


@pytest.mark.parametrize("budget", [15, 20, 64, 1000])
def test_every_sequence_is_whole_in_one_batch(budget):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 8, (40, 2), generator=g).tolist()
    sequences = [
        Sequence(
            [100 * i] * p,
            [100 * i + j for j in range(1, r + 1)],
            [-i - j / 10 for j in range(r)],
            [i + j / 10 for j in range(r)],
            advantage=float(i),
        )
        for i, (p, r) in enumerate(lengths)
    ]
    batches = pack(sequences, budget, [i / 100 for i in range(40)])
    assert all(len(b.input_ids) <= budget for b in batches)
    assert sorted(i for b in batches for i in b.sequence_index) == list(range(40))
    for b in batches:
        for n, i in enumerate(b.sequence_index):
            rows = slice(int(b.cu_seqlens[n]), int(b.cu_seqlens[n + 1]))
            s, m = sequences[i], b.completion_mask[rows]
            whole = s.prompt_ids + s.completion_ids
            assert b.input_ids[rows].tolist() == whole[:-1]
            assert b.target_ids[rows][m].tolist() == s.completion_ids
            assert b.old_logprobs[rows][m].tolist() == pytest.approx(s.old_logprobs)
            assert b.ref_logprobs[rows][m].tolist() == pytest.approx(s.ref_logprobs)
            assert b.advantages[rows][m].tolist() == [s.advantage] * len(s.completion_ids)
            assert b.token_weights[rows][m].tolist() == pytest.approx(
                [i / 100] * len(s.completion_ids)
            )
            assert (b.token_weights[rows][~m] == 0).all()
    again = pack(sequences, budget, [i / 100 for i in range(40)])
    assert [b.sequence_index for b in again] == [b.sequence_index for b in batches]


def test_a_sequence_that_fills_the_budget_fits():
    (batch,) = pack([Sequence([1] * 6, [2] * 5)], 10, [1.0])  # 11 tokens are 10 positions
    assert len(batch.input_ids) == 10


def test_over_the_budget_names_the_sequence():
    with pytest.raises(ValueError, match=r"length 11 \(number 1\).*10|1 .*11.*10"):
        pack([Sequence([1], [2]), Sequence([1] * 6, [2] * 6)], 10, [1.0, 1.0])


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_empty_parts_are_refused(prompt, completion):
    part = "completion" if prompt else "prompt"
    with pytest.raises(ValueError, match=f"sequence 1 has an empty {part}"):
        pack([Sequence([1], [2]), Sequence(prompt, completion)], 10, [1.0, 1.0])


def test_nothing_packs_into_nothing():
    assert pack([], 10, []) == []


def test_misaligned_logprobs_are_our_own_mistake():
    with pytest.raises(AssertionError):
        collate([Sequence([1], [2, 3], old_logprobs=[-1.0])], [1.0], [0], "cpu")
