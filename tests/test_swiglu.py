import pytest
import torch
from numerics import assert_accurate
from tiny import at_level, each_backend

from r1fast.kernels.swiglu import swiglu, swiglu_ref


def problem(T, F, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    gate_up = 4 * torch.randn(T, 2 * F, dtype=torch.float64, generator=g)
    return gate_up.to(device, dtype), torch.randn(T, F, generator=g).to(device, dtype)


def out_and_grad(p, dtype, backend=None):
    gate_up, dy = (t.detach().to(dtype) for t in p)
    gate_up.requires_grad_()
    y = swiglu_ref(gate_up) if backend is None else swiglu(gate_up, backend=backend)
    y.backward(dy)
    return {"y": y.detach(), "dgate_up": gate_up.grad}


@each_backend([(129, 16), (127, 33), (128, 1), (1, 80), (1, 1), (0, 4), (5, 1030)])
def test_matches_the_reference(shape, backend, dtype, slack, device):
    p = problem(*shape, dtype, device)
    actual, exact = out_and_grad(p, dtype, backend), out_and_grad(p, torch.float64)
    baseline = out_and_grad(p, dtype)
    for name in exact:
        assert actual[name].dtype == dtype
        assert actual[name].shape == exact[name].shape
        if shape[0]:
            assert_accurate(name, actual[name], baseline[name], exact[name], slack)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(level, dtype, monkeypatch):
    at_level(monkeypatch, level, "swiglu_forward", "swiglu_backward")
    p = problem(70, 77, dtype)
    actual, exact = out_and_grad(p, dtype, "native"), out_and_grad(p, torch.float64)
    for name, baseline in out_and_grad(p, dtype).items():
        assert_accurate(name, actual[name], baseline, exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "triton", "torch"])
def test_saturated_gates(backend, dtype, device):
    """Gates so far out that exp overflows, or is 0."""
    gate_up = torch.tensor(
        [[-1e4, -200, -90, 0, 90, 200, 1e4] + [2.0] * 7], dtype=dtype, device=device
    )
    gate_up.requires_grad_()
    y = swiglu(gate_up, backend=backend)
    (grad,) = torch.autograd.grad(y, gate_up, torch.ones_like(y))
    expected = torch.tensor([[0, 0, 0, 0, 180, 400, 2e4]], dtype=dtype, device=device)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-35)
    slope = torch.tensor([[0, 0, 0, 1, 2, 2, 2]], dtype=dtype, device=device)  # of 2 silu
    torch.testing.assert_close(grad[:, :7], slope, rtol=0, atol=1e-35)
    torch.testing.assert_close(grad[:, 7:], expected / 2, rtol=0, atol=1e-35)


def test_keeps_its_input_alone():
    """silu(gate) is computed again: nothing but gate_up is saved."""
    gate_up = torch.randn(32, 20, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate_up)
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]
