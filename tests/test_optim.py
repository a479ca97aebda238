import math

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from r1fast.optim import Optimizer, learning_rate


def optim_config(*overrides):
    return tiny_config(*overrides).optim


def make(dtype=torch.float32, *overrides):
    model = nn.Linear(4, 3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=g)
    model.to(dtype)
    return model, Optimizer(model.named_parameters(), optim_config(*overrides))


def set_grads(model, seed=1, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


def test_schedule_by_hand():
    c = optim_config("--optim.lr=1.0", "--optim.min_lr_ratio=0.1", "--optim.warmup_steps=4")
    rates = [learning_rate(c, step, 11) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.55)  # halfway down the cosine from 1 to 0.1
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(c, 50, 11) == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_constant_schedule_and_short_runs():
    c = optim_config("--optim.lr=0.5")
    assert [learning_rate(c, s, 3) for s in range(3)] == [0.5] * 3
    c = optim_config("--optim.lr=0.5", "--optim.min_lr_ratio=0.0")
    assert learning_rate(c, 0, 1) == 0.5
    assert learning_rate(c, 0, 0) == 0.5
    assert learning_rate(optim_config("--optim.lr=0.5", "--optim.warmup_steps=10"), 0, 2) == 0.05


def test_adamw_by_hand():
    """Two steps against the update written out; matrices decay, biases do not."""
    overrides = (
        "--optim.weight_decay=0.1",
        "--optim.beta1=0.8",
        "--optim.beta2=0.9",
        "--optim.eps=1e-6",
        "--optim.max_grad_norm=0",
    )
    model, optimizer = make(torch.float32, *overrides)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(x) for n, x in expected.items()}
    v = {n: torch.zeros_like(x) for n, x in expected.items()}
    for t in (1, 2):
        set_grads(model, seed=t)
        for n, p in model.named_parameters():
            grad, lr = p.grad.double(), 0.01 * t
            m[n] = 0.8 * m[n] + 0.2 * grad
            v[n] = 0.9 * v[n] + 0.1 * grad**2
            if n == "weight":
                expected[n] *= 1 - lr * 0.1
            update = (m[n] / (1 - 0.8**t)) / ((v[n] / (1 - 0.9**t)).sqrt() + 1e-6)
            expected[n] -= lr * update
        optimizer.step(0.01 * t)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[n], rtol=1e-5, atol=1e-6)
        assert p.grad is None


def test_clipping_scales_the_whole_gradient():
    """Clipped at c, a gradient of norm n moves the moments by c / n of it."""
    one, clipped = make(torch.float32, "--optim.max_grad_norm=0.5")
    two, free = make(torch.float32, "--optim.max_grad_norm=0")
    set_grads(one)
    set_grads(two)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in one.parameters()))
    assert float(clipped.step(0.1)) == pytest.approx(expected)
    assert float(free.step(0.1)) == pytest.approx(expected)
    a, b = clipped.state_tensors(), free.state_tensors()
    torch.testing.assert_close(a["exp_avg.weight"], b["exp_avg.weight"] * 0.5 / expected)

    set_grads(one, scale=1e-3)  # below the limit: untouched
    before = clipped.state_tensors()["exp_avg.bias"].clone()
    grad = one.bias.grad.clone()
    clipped.step(0.1)
    torch.testing.assert_close(
        clipped.state_tensors()["exp_avg.bias"], 0.9 * before + 0.1 * grad, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_applied(bad):
    model, optimizer = make()
    set_grads(model)
    optimizer.step(0.1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: x.clone() for n, x in optimizer.state_tensors().items()}
    set_grads(model)
    model.bias.grad[1] = bad
    assert not math.isfinite(optimizer.step(0.1))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(x, state[n]) for n, x in optimizer.state_tensors().items())
    assert all(p.grad is None for p in model.parameters())


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number, or a copy to the CPU, of a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default, torch.ops.aten.equal.default,
        ), f"{func} waits for the device"  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_step_reads_nothing_back(dtype, bad, monkeypatch):
    """Clipped, applied or not: no number of a tensor is asked for until the norm is."""
    model, optimizer = make(dtype, "--optim.max_grad_norm=0.5")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def refuse(*args, **kwargs):
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch, NoSync():
        for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, refuse)
        for seed in range(2):
            set_grads(model, seed)
            model.bias.grad += bad
            optimizer.accumulate()
            norm = optimizer.step(0.1)
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters()]
    assert all(moved) if bad == 0 else not any(moved)
    assert math.isfinite(norm) == (bad == 0)
    steps = [x for n, x in optimizer.state_tensors().items() if n.startswith("step.")]
    assert [float(x) for x in steps] == [2.0 * (bad == 0)] * 2


def test_no_sync_refuses_what_waits():
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        float(torch.ones(()) * 2)


def test_bfloat16_weights_have_a_float32_master():
    """Updates far below bfloat16's spacing add up."""
    model, optimizer = make(torch.bfloat16, "--optim.max_grad_norm=0")
    start = model.weight.detach().clone()
    for _ in range(50):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-4)
    assert set(optimizer.state_tensors()) >= {"master.weight", "master.bias"}
    master = optimizer.state_tensors()["master.weight"]
    torch.testing.assert_close(master, start.float() - 50e-4, rtol=0, atol=1e-5)
    assert torch.equal(model.weight, master.to(torch.bfloat16))
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_goes_on_bit_for_bit(dtype, device):
    model, optimizer = make(dtype)
    model.to(device)
    optimizer = Optimizer(model.named_parameters(), optimizer.config)
    for seed in (1, 2):
        set_grads_on(model, seed)
        optimizer.step(0.01)
    saved = {n: x.detach().cpu().clone() for n, x in optimizer.state_tensors().items()}
    other, _ = make(dtype)
    other.to(device)
    again = Optimizer(other.named_parameters(), optimizer.config)
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    again.load_state_tensors(saved)
    for m, o in ((model, optimizer), (other, again)):
        set_grads_on(m, 3)
        o.step(0.01)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = optimizer.state_tensors(), again.state_tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def set_grads_on(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = Optimizer(model.named_parameters(), optim_config())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step(0.1)
    assert {n.partition(".")[2] for n in optimizer.state_tensors()} == {"weight"}


def test_no_gradient_at_all():
    model, optimizer = make()
    before = model.weight.detach().clone()
    assert optimizer.step(0.1) == 0
    assert torch.equal(model.weight, before)


def test_bfloat16_gradients_are_added_up_in_float32():
    """512 micro-batches of equal gradients: a bfloat16 sum stops growing, a float32 one does not."""
    model, optimizer = make(torch.bfloat16, "--optim.max_grad_norm=0")
    naive, exact = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.float64)
    for seed in range(512):
        set_grads(model, seed, scale=0.1)
        for p in model.parameters():
            p.grad += 1
        naive += model.weight.grad
        exact += model.weight.grad
        optimizer.accumulate()
        assert model.weight.grad is None
    total = optimizer.masters[0].grad
    assert total.dtype == torch.float32
    error = (total.double() - exact).abs().max()
    assert error < 1e-3 * (naive.double() - exact).abs().max()
    assert optimizer.step(0.01) > exact.norm() * 0.999
    assert all(m.grad is None for m in optimizer.masters)


def test_float32_gradients_stay_where_they_are():
    model, optimizer = make()
    set_grads(model)
    grad = model.weight.grad
    optimizer.accumulate()
    assert model.weight.grad is grad
    assert optimizer.masters[0] is model.weight
