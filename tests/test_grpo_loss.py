import math

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.grpo_loss import grpo_loss, grpo_loss_ref

NAMES = ("logprobs", "old_logprobs", "ref_logprobs", "advantages")
PAPER = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "kl_coef": 0.04}


def make_inputs(T: int, spread: float = 0.5, seed: int = 0) -> dict[str, torch.Tensor]:
    """A fifth of the tokens is masked and NaN: those must not be read."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(T, generator=g, dtype=torch.float64)
    inputs = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * torch.randn(T, generator=g, dtype=torch.float64),
        "ref_logprobs": logprobs + spread * torch.randn(T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(T, generator=g, dtype=torch.float64),
    }
    mask = torch.rand(T, generator=g) > 0.2
    for x in inputs.values():
        x[~mask] = torch.nan
    # what float32 holds: the exact result is of the same numbers
    inputs = {name: x.float().double() for name, x in inputs.items()}
    return inputs | {"completion_mask": mask}


def run(op, inputs, dtype=torch.float32, *, device="cpu", **kwargs):
    tensors = {n: inputs[n].to(device, dtype, copy=True) for n in NAMES}
    tensors["logprobs"].requires_grad_()
    mask = inputs["completion_mask"].to(device)
    loss = op(*tensors.values(), mask, **kwargs)
    upstream = torch.linspace(-1, 2, len(loss), dtype=dtype, device=device)
    loss.backward(upstream)
    return loss.detach().cpu(), tensors["logprobs"].grad.cpu()


def check(inputs, backend, device="cpu", **kwargs):
    exact = run(grpo_loss_ref, inputs, torch.float64, **kwargs)
    baseline = run(grpo_loss_ref, inputs, **kwargs)
    actual = run(grpo_loss, inputs, backend=backend, device=device, **kwargs)
    for name, a, b, e in zip(("loss", "gradient"), actual, baseline, exact, strict=True):
        if len(e):  # the floor: one rounding of the largest value
            largest = float(e.nan_to_num(0).abs().max())
            assert_accurate(name, a, b, e, floor=max(1e-6, 2**-23 * largest))
    masked = ~inputs["completion_mask"]
    assert (actual[0][masked] == 0).all()
    assert (actual[1][masked] == 0).all()
    return actual


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("T", [0, 1, 127, 1023, 1024, 1025])
def test_accurate_around_the_block_size(backend, T, device):
    check(make_inputs(T), backend, device, **PAPER)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"clip_eps_low": 10.0, "clip_eps_high": 10.0, "kl_coef": 0.001},  # DeepSeek-R1
        {"clip_eps_low": 1.0, "clip_eps_high": 1.0, "kl_coef": 0.04},
        {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "kl_coef": 0.0},  # DAPO
        {"clip_eps_low": 0.0, "clip_eps_high": 0.0, "kl_coef": 1.0},
    ],
)
def test_accurate_at_every_clip(backend, kwargs, device):
    check(make_inputs(200, spread=2.0), backend, device, **kwargs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_on_policy_gradient_is_the_advantage(backend, device):
    """ratio 1 and reference = policy: dloss/dlogprob = -A, although the loss itself is -A too."""
    inputs = make_inputs(50)
    inputs["old_logprobs"] = inputs["ref_logprobs"] = inputs["logprobs"]
    loss, grad = run(grpo_loss, inputs, backend=backend, device=device, **PAPER)
    keep = inputs["completion_mask"]
    A = inputs["advantages"].float()[keep]
    torch.testing.assert_close(loss[keep], -A)
    torch.testing.assert_close(grad[keep], (-A * torch.linspace(-1, 2, 50)[keep]))


def one(ratio, A, ref_gap=0.0, **kwargs):
    """(loss, gradient) of a single token with the given importance ratio."""
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = logp.detach() - math.log(ratio)
    loss = grpo_loss(
        logp,
        old,
        logp.detach() + ref_gap,
        torch.tensor([A], dtype=torch.float64),
        torch.tensor([True]),
        **PAPER | kwargs,
    )
    loss.sum().backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize(
    ("ratio", "A", "surrogate", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, 1.0, 1.0),  # the minimum does not clip a good token that became rarer
        (0.5, -2.0, -1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, -3.0, -3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_surrogate_by_hand(ratio, A, surrogate, slope):
    loss, grad = one(ratio, A, kl_coef=0.0)
    assert loss == pytest.approx(-surrogate)
    assert grad == pytest.approx(-slope)


def test_eps_of_one_or_more_only_caps_from_above():
    """R1's eps = 10: the ratio is capped at 11, and no ratio is below 1 - 10."""
    wide = {"clip_eps_low": 10.0, "clip_eps_high": 10.0, "kl_coef": 0.0}
    assert one(10.9, 1.0, **wide) == pytest.approx((-10.9, -10.9))
    assert one(12.0, 1.0, **wide) == pytest.approx((-11.0, 0.0))
    assert one(1e-3, -1.0, **wide) == pytest.approx((1e-3, 1e-3))
    assert one(12.0, -1.0, **wide) == pytest.approx((12.0, 12.0))


def test_kl_is_k3():
    for gap in (-2.0, -1e-4, 0.0, 1e-4, 0.5, 2.0):
        loss, grad = one(1.0, 0.0, ref_gap=gap, kl_coef=1.0)
        assert loss == pytest.approx(math.exp(gap) - gap - 1, abs=1e-12)
        assert loss >= 0
        assert grad == pytest.approx(1 - math.exp(gap), abs=1e-12)


def test_small_kl_does_not_cancel_in_float32(device):
    """exp(d) - d - 1 in float32 is noise near d = 0: k3 of 1e-3 is 5e-7."""
    d = torch.logspace(-4, -1, 40)
    x = torch.zeros(40)
    for backend in ("triton", "torch"):
        loss = grpo_loss(
            *(t.to(device) for t in (x, x, d, x, torch.ones(40, dtype=torch.bool))),
            clip_eps_low=0.2,
            clip_eps_high=0.2,
            kl_coef=1.0,
            backend=backend,
        )
        exact = torch.expm1(d.double()) - d.double()
        # expm1(d) - d of float32 d: half an ulp of d on d^2 / 2
        bound = 1e-3 if backend == "triton" else 2e-7 / d.double()
        assert ((loss.cpu() - exact).abs() <= exact * bound + 1e-12).all(), backend


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_everything_masked(backend, device):
    inputs = make_inputs(40)
    inputs["completion_mask"][:] = False
    for x in NAMES:
        inputs[x][:] = torch.nan
    loss, grad = run(grpo_loss, inputs, backend=backend, device=device, **PAPER)
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_bad_input():
    x, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must all be \(T,\), got .*\(3,\)"):
        grpo_loss(x, x, torch.zeros(3), x, mask, **PAPER)
    with pytest.raises(ValueError, match=r"must all be \(T,\)"):
        grpo_loss(*[torch.zeros(2, 2)] * 4, torch.ones(2, 2, dtype=torch.bool), **PAPER)
    with pytest.raises(ValueError, match="backend must be auto, triton or torch, got 'cuda'"):
        grpo_loss(x, x, x, x, mask, **PAPER, backend="cuda")
