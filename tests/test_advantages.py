import math

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.advantages import group_advantages, has_signal


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
        ([[1.0]], {"baseline": "none"}, "baseline must be mean or leave_one_out, got 'none'"),
        ([[1.0]], {"backend": "cuda"}, "backend must be .*, got 'cuda'"),
        ([[1.0]], {"verdicts": torch.tensor([1])}, r"the rewards' shape \(1, 1\), got \(1,\)"),
        ([[1.0]], {"verdicts": torch.tensor([[1.0]])}, "must be integers, .* got torch.float32"),
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


def test_rewards_must_be_float():
    with pytest.raises(ValueError, match=r"rewards must be float, got torch\.int64"):
        group_advantages(torch.tensor([[1, 2]]))


def test_leave_one_out_compares_with_the_mean_of_the_others():
    result = advantages([[0.0, 2.0, 2.0, 4.0]], baseline="leave_one_out", scale="none")
    assert result[0] == pytest.approx([0 - 8 / 3, 2 - 2, 2 - 2, 4 - 4 / 3])
    assert advantages([[3.0], [5.0]], baseline="leave_one_out") == [[0.0], [0.0]]
    scaled = advantages([[0.0, 2.0]], baseline="leave_one_out", eps=0.0)  # std 1
    assert scaled == [[-2.0, 2.0]]


BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@BACKENDS
def test_equal_verdicts_hide_float_noise(backend, device):
    noisy, clear, large = 0.1 + 0.2, 0.3001, 3e6
    rewards = torch.tensor(
        [[0.3, noisy, 0.3], [0.3, noisy, 0.3], [0.3, clear, 0.3], [large, large + 1, large],
         [0.1, 0.1, 0.1]],
        dtype=torch.float64, device=device,
    )  # fmt: skip
    same, mixed = [1, 1, 1], [1, 0, 1]
    verdicts = torch.tensor([same, mixed, same, same, mixed], device=device)
    expected = [False, True, True, False, False]
    kwargs = {"eps": 0.0, "backend": backend}
    for kind in (torch.int64, torch.int32, torch.int8):
        result = group_advantages(rewards, verdicts=verdicts.to(kind), **kwargs)
        assert (result != 0).any(1).tolist() == expected
        assert has_signal(rewards, verdicts.to(kind)).tolist() == expected
    # without verdicts only equal rewards are without signal
    assert has_signal(rewards).tolist() == [True, True, True, True, False]
    assert (group_advantages(rewards, **kwargs) != 0).any(1).tolist() == has_signal(
        rewards
    ).tolist()


@pytest.mark.parametrize("N", [1, 5, 33])
@pytest.mark.parametrize("G", [1, 2, 3, 8, 16, 64])
def test_kernel_equals_reference(N, G, device):
    generator = torch.Generator().manual_seed(100 * N + G)
    exact = torch.randint(5, (N, G), generator=generator).double() / 10
    exact[::3] = exact[::3, :1]  # groups without signal
    verdicts = (exact > 0.15).long().to(device)
    exact = exact.to(device)
    for n, (scale, baseline) in enumerate(
        [(s, b) for s in ("group", "batch", "none") for b in ("mean", "leave_one_out")]
    ):
        kwargs = {
            "scale": scale, "baseline": baseline, "std": ["population", "sample"][(n + G) % 2],
            "eps": [1e-4, 1e-6][n % 2], "verdicts": verdicts if n % 3 == 0 else None,
        }  # fmt: skip
        truth = group_advantages(exact, backend="torch", **kwargs)
        double = group_advantages(exact, backend="triton", **kwargs)
        torch.testing.assert_close(double, truth, rtol=1e-12, atol=1e-12)
        assert ((double == 0).all(1) == (truth == 0).all(1)).all()
        single = group_advantages(exact.float(), backend="triton", **kwargs)
        plain = group_advantages(exact.float(), backend="torch", **kwargs)
        assert single.dtype == torch.float32
        truth = group_advantages(exact.float().double(), backend="torch", **kwargs)
        assert_accurate(str(kwargs), single, plain, truth, floor=2e-6)


@BACKENDS
def test_any_layout_and_dtype(backend, device):
    rewards = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    expected = group_advantages(rewards.contiguous(), backend="torch")
    transposed = rewards.t().contiguous().t()
    torch.testing.assert_close(group_advantages(transposed, backend=backend), expected)
    half = group_advantages(rewards.bfloat16(), backend=backend)
    assert half.dtype == torch.bfloat16
    expected = group_advantages(rewards.bfloat16().double(), backend="torch")
    torch.testing.assert_close(half.double(), expected, rtol=0.01, atol=0.01)
    assert group_advantages(rewards[:0], backend=backend).shape == (0, 5)


@BACKENDS
def test_a_given_batch_std_is_taken(backend, device):
    rewards = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64, device=device)
    for sigma in (torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)):
        given = group_advantages(rewards, scale="batch", eps=0.0, batch_std=sigma, backend=backend)
        assert given.tolist() == [[-0.25, 0.25], [-0.75, 0.75]]


@BACKENDS
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_zero_on_either_backend(scale, backend, device):
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3], device=device)
    result = group_advantages(rewards, scale=scale, eps=0.0, backend=backend)
    assert result.tolist() == [[0.0] * 3] * 2
