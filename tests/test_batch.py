from itertools import pairwise

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
    """Token t predicts token t + 1; the last token of a sequence is only ever a target."""
    batch = collate(make_sequences(), [0.1, 0.2, 0.3], [[1], [0], [2]], "cpu")
    assert batch.input_ids.tolist() == [20, 21, 22, 10, 11, 12, 13, 30, 31]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.bounds == [0, 3, 7, 9]
    assert batch.num_tokens == 9
    assert batch.prefix_of == [-1, -1, -1]
    assert batch.target_rows == [0, 1, 2, 5, 6, 8]
    assert batch.target_ids.tolist() == [21, 22, 23, 13, 14, 32]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.old_logprobs.tolist() == [-5, -6, -7, -1, -2, -11]
    assert batch.ref_logprobs.tolist() == [-8, -9, -10, -3, -4, 0]
    assert batch.advantages.tolist() == [-1.5, -1.5, -1.5, 0.5, 0.5, 2]
    torch.testing.assert_close(batch.token_weights, torch.tensor([0.2, 0.2, 0.2, 0.1, 0.1, 0.3]))
    assert batch.sequence_index == [1, 0, 2]
    assert batch.policy_logprobs is None
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.dtype == batch.target_ids.dtype == torch.int64
    assert batch.token_weights.dtype == batch.old_logprobs.dtype == torch.float32


def test_policy_logprobs_are_of_the_targets():
    sequences = make_sequences()
    for s in sequences:
        s.policy_logprobs = [x - 0.5 for x in s.old_logprobs]
    batch = collate(sequences, [1.0] * 3, [[1], [0], [2]], "cpu")
    assert torch.equal(batch.policy_logprobs, batch.old_logprobs - 0.5)


def test_a_shared_prompt_by_hand():
    """The prompt's last token predicts every completion's first; a completion of one token adds none."""
    sequences = [
        Sequence([10, 11, 12], [13, 14, 15]),
        Sequence([20, 21], [22, 23]),
        Sequence([10, 11, 12], [16]),
        Sequence([10, 11, 12], [17, 18]),
    ]
    batch = collate(sequences, [1.0, 2.0, 3.0, 4.0], [[0, 2, 3], [1]], "cpu")
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 17, 20, 21, 22]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert batch.bounds == [0, 3, 5, 6, 9]
    assert batch.prefix_of == [-1, 0, 0, -1]
    assert batch.target_rows == [2, 3, 4, 2, 2, 5, 7, 8]
    assert batch.target_ids.tolist() == [13, 14, 15, 16, 17, 18, 22, 23]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert batch.token_weights.tolist() == [1, 1, 1, 3, 4, 4, 2, 2]
    assert batch.sequence_index == [0, 2, 3, 1]


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("budget", [15, 20, 64, 1000])
def test_every_token_is_predicted_once_from_what_precedes_it(budget, share_prompts):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 8, (40, 2), generator=g).tolist()
    sequences = [
        Sequence(
            [100 * (i // 4)] * lengths[i // 4][0],
            [100 * i + j for j in range(1, r + 1)],
            [-i - j / 10 for j in range(r)],
            [i + j / 10 for j in range(r)],
            advantage=float(i),
        )
        for i, (_, r) in enumerate(lengths)
    ]
    weights = [i / 100 for i in range(40)]
    batches = pack(sequences, budget, weights, share_prompts=share_prompts)
    assert all(len(b.input_ids) == b.num_tokens <= budget for b in batches)
    assert sorted(i for b in batches for i in b.sequence_index) == list(range(40))
    for b in batches:
        bounds, rows = b.bounds, b.target_rows
        segment_of = [s for s, (x, y) in enumerate(pairwise(bounds)) for _ in range(x, y)]
        for n, i in enumerate(b.sequence_index):
            s, part = sequences[i], slice(int(b.cu_seqlens[n]), int(b.cu_seqlens[n + 1]))
            whole = s.prompt_ids + s.completion_ids
            for t, row in enumerate(rows[part]):
                segment = segment_of[row]
                seen = list(range(bounds[segment], row + 1))
                if (p := b.prefix_of[segment]) >= 0:
                    seen = [*range(bounds[p], bounds[p + 1]), *seen]
                assert b.input_ids[seen].tolist() == whole[: len(s.prompt_ids) + t]
                assert b.position_ids[seen].tolist() == list(range(len(seen)))
            assert b.target_ids[part].tolist() == s.completion_ids
            assert b.old_logprobs[part].tolist() == pytest.approx(s.old_logprobs)
            assert b.ref_logprobs[part].tolist() == pytest.approx(s.ref_logprobs)
            assert set(b.advantages[part].tolist()) == {s.advantage}
            assert b.token_weights[part].tolist() == pytest.approx([weights[i]] * len(rows[part]))
    again = pack(sequences, budget, weights, share_prompts=share_prompts)
    assert [b.sequence_index for b in again] == [b.sequence_index for b in batches]
    # every prompt once, if one micro-batch holds all
    once = sum(len(p) for p in {tuple(s.prompt_ids) for s in sequences})
    shared = once + sum(len(s.completion_ids) - 1 for s in sequences)
    total = sum(b.num_tokens for b in batches)
    if share_prompts and budget == 1000:
        assert total == shared
    elif not share_prompts:
        assert total == sum(s.num_tokens - 1 for s in sequences)


def test_different_prompts_are_packed_as_if_nothing_were_shared():
    sequences = make_sequences()
    for budget in (4, 9, 100):
        plain, shared = (pack(sequences, budget, [1.0] * 3, share_prompts=x) for x in (False, True))
        assert [b.sequence_index for b in plain] == [b.sequence_index for b in shared]


def test_a_sequence_that_fills_the_budget_fits():
    (batch,) = pack([Sequence([1] * 6, [2] * 5)], 10, [1.0])  # 11 tokens are 10 positions
    assert len(batch.input_ids) == 10


def test_over_the_budget_names_the_sequence():
    sequences = [Sequence([1] * 6, [2]), Sequence([1] * 6, [2] * 6)]
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens, more than token_budget 10"):
        pack(sequences, 10, [1.0, 1.0])
    message = "group 0, completion 1 has 5 tokens and a prompt of 6, more than token_budget 10"
    with pytest.raises(ValueError, match=message):
        pack(sequences, 10, [1.0, 1.0], share_prompts=True)


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_empty_parts_are_refused(prompt, completion):
    part = "completion" if prompt else "prompt"
    with pytest.raises(ValueError, match=f"sequence 1 has an empty {part}"):
        pack([Sequence([1], [2]), Sequence(prompt, completion)], 10, [1.0, 1.0])


def test_nothing_packs_into_nothing():
    assert pack([], 10, []) == []


def test_misaligned_logprobs_are_our_own_mistake():
    with pytest.raises(AssertionError):
        collate([Sequence([1], [2, 3], old_logprobs=[-1.0])], [1.0], [[0]], "cpu")
