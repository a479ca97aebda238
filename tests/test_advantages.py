import math

import pytest
import torch

from r1fast.kernels.advantages import group_advantages


def advantages(rewards, **kwargs):
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), **kwargs).tolist()


def test_by_hand():
    # mean 2, deviations -2 0 0 2: population variance 8 / 4, sample variance 8 / 3
    rewards = [[0.0, 2.0, 2.0, 4.0]]
    p, s = 2 / (math.sqrt(2) + 1e-4), 2 / (math.sqrt(8 / 3) + 1e-4)
    assert advantages(rewards)[0] == pytest.approx([-p, 0, 0, p])
    assert advantages(rewards, std="sample")[0] == pytest.approx([-s, 0, 0, s])
    assert advantages(rewards, eps=0.0)[0] == pytest.approx([-math.sqrt(2), 0, 0, math.sqrt(2)])
    assert advantages(rewards, scale="none") == [[-2, 0, 0, 2]]


def test_eps_is_added_to_the_standard_deviation():
    assert advantages([[0.0, 2.0]], eps=1.0) == [[-0.5, 0.5]]  # std 1, and 1 more


def test_batch_scale_keeps_the_mean_of_the_group():
    rewards = [[0.0, 1.0], [2.0, 5.0]]
    sigma = math.sqrt(14 / 4)  # of 0 1 2 5 around 2
    expected = [[-0.5 / sigma, 0.5 / sigma], [-1.5 / sigma, 1.5 / sigma]]
    for actual, row in zip(advantages(rewards, scale="batch", eps=0.0), expected, strict=True):
        assert actual == pytest.approx(row)
    sample = advantages(rewards, scale="batch", std="sample", eps=0.0)
    assert sample[1] == pytest.approx([-1.5 / math.sqrt(14 / 3), 1.5 / math.sqrt(14 / 3)])
    given = advantages(rewards, scale="batch", eps=0.0, batch_std=torch.tensor(2.0))
    assert given == [[-0.25, 0.25], [-0.75, 0.75]]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("std", ["population", "sample"])
def test_a_constant_group_is_exactly_zero(scale, std):
    # 0.1 is no float: its mean over 3 differs from it in the last bit
    rows = [[0.1] * 3, [1.0, 0.0, 1.0], [0.7] * 3]
    for eps in (0.0, 1e-4):
        rewards = torch.tensor(rows)
        result = group_advantages(rewards, scale=scale, std=std, eps=max(eps, 1e-30))
        assert result[0].tolist() == result[2].tolist() == [0.0] * 3
        assert (result[1] != 0).all()
        assert result.isfinite().all()


def test_one_completion_has_nothing_to_compare_with():
    assert advantages([[3.0], [5.0]]) == [[0.0], [0.0]]
    assert advantages([[3.0]], std="sample", scale="batch") == [[0.0]]


def test_groups_sum_to_zero_and_have_unit_spread():
    rewards = torch.rand(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = group_advantages(rewards, eps=0.0)
    assert result.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(result.square().mean(1), torch.ones(50, dtype=torch.float64))
    shifted = group_advantages(rewards * 5 + 3, eps=0.0)  # scale and shift do not matter
    torch.testing.assert_close(shifted, result)


def test_equals_trl_and_numpy():
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    centred = rewards - rewards.mean(1, keepdim=True)
    trl = centred / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, std="sample"), trl)
    numpy = centred / (torch.tensor(rewards.numpy().std(1))[:, None] + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), numpy)


@pytest.mark.parametrize(
    ("rewards", "kwargs", "message"),
    [
        ([1.0, 2.0], {}, r"must be \(N, G\) with G >= 1, got \(2,\)"),
        ([[], []], {}, r"got \(2, 0\)"),
        ([[1.0, 0.0], [1.0, math.nan]], {}, r"group 1 are not finite: \[1.0, nan\]"),
        ([[math.inf, 0.0]], {}, "group 0 are not finite"),
        ([[1.0]], {"scale": "token"}, "scale must be group, batch or none, got 'token'"),
        ([[1.0]], {"std": "biased"}, "std must be population or sample, got 'biased'"),
    ],
)
def test_bad_input(rewards, kwargs, message):
    with pytest.raises(ValueError, match=message):
        advantages(rewards, **kwargs)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_constant_group_is_zero_without_eps(scale):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.0, 1.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, scale=scale, eps=0.0)
    assert advantages[0].tolist() == [0, 0, 0]
    assert advantages.isfinite().all()
    assert advantages[1].abs().min() > 0
    assert group_advantages(rewards[:1], scale=scale, eps=0.0).tolist() == [[0, 0, 0]]
