import pytest
import torch
from numerics import assert_accurate
from tiny import at_level, each_backend

from r1fast.kernels import dispatch
from r1fast.kernels import rms_norm as kernel
from r1fast.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

SHAPES = [(129, 5), (127, 33), (128, 17), (1, 8), (0, 16), (3, 1), (17, 4, 64), (7, 256)]


def problem(shape, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, delta, dy, ds = torch.randn(4, *shape, dtype=torch.float64, generator=g).to(device, dtype)
    weight = torch.randn(shape[-1], dtype=torch.float64, generator=g).to(device, dtype)
    return x, delta, weight, dy, ds


def out_and_grads(op, p, dtype, backend=None):
    """Of the norm alone, and of the sum before it with both of its results used."""
    options = {} if backend is None else {"backend": backend}
    x, delta, weight, dy, ds = (t.detach().to(dtype) for t in p)
    inputs = [t.requires_grad_() for t in (x, delta, weight)]
    if op == "norm":
        f = rms_norm_ref if backend is None else rms_norm
        y = f(x, weight, 1e-3, **options)
        dx, dw = torch.autograd.grad(y, (x, weight), dy)
        return {"y": y.detach(), "dx": dx, "dw": dw}
    f = add_rms_norm_ref if backend is None else add_rms_norm
    y, s = f(*inputs, 1e-3, **options)
    dx, ddelta, dw = torch.autograd.grad((y, s), inputs, (dy, ds))
    assert torch.equal(dx, ddelta)
    return {"y": y.detach(), "s": s.detach(), "dx": dx, "dw": dw}


@pytest.mark.parametrize("op", ["norm", "add"])
@each_backend(SHAPES)
def test_matches_the_reference(op, shape, backend, dtype, slack, device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PROGRAMS", 40)  # so that some have several rows
    p = problem(shape, dtype, device)
    actual = out_and_grads(op, p, dtype, backend)
    baseline = out_and_grads(op, p, dtype)
    exact = out_and_grads(op, p, torch.float64)
    for name in exact:
        assert actual[name].dtype == dtype
        assert actual[name].shape == exact[name].shape
        if exact[name].numel() and shape[0]:
            assert_accurate(name, actual[name], baseline[name], exact[name], slack)
    if not shape[0]:
        assert (actual["dw"] == 0).all()


def test_weight_gradients_of_many_rows():
    """Blocks of rows, summed in order: as accurate as PyTorch's own sum, whatever the threads."""
    p = problem((7001, 24), torch.float32)
    exact, baseline = out_and_grads("add", p, torch.float64), out_and_grads("add", p, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(out_and_grads("add", p, torch.float32, "auto"))
    finally:
        torch.set_num_threads(threads)
    for name in exact:
        assert_accurate(name, found[0][name], baseline[name], exact[name], slack=3)
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.equal(found[0][name], found[2][name]), name


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(level, dtype, monkeypatch):
    at_level(monkeypatch, level, "norm_forward", "norm_backward")
    p = problem((130, 77), dtype)
    actual = out_and_grads("add", p, dtype, "native")
    baseline, exact = out_and_grads("add", p, dtype), out_and_grads("add", p, torch.float64)
    for name in exact:
        assert_accurate(name, actual[name], baseline[name], exact[name])


def test_half_of_the_results_and_strided_rows():
    x, delta, weight, dy, ds = problem((40, 24), torch.float32)
    wide = torch.full((40, 60), torch.nan)
    wide[:, 3:27] = x
    a, b = wide[:, 3:27].requires_grad_(), delta.t().contiguous().t().requires_grad_()
    y, s = add_rms_norm(a, b, weight, 1e-6)
    expected = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(y, expected[0])
    assert torch.equal(s, x + delta)
    (ga,) = torch.autograd.grad(s, a, ds, retain_graph=True)
    assert torch.equal(ga, ds)
    (gb,) = torch.autograd.grad(y, b, dy, retain_graph=True)
    both = torch.autograd.grad((y, s), b, (dy, ds))[0]
    torch.testing.assert_close(both, gb + ds)


def test_inference_has_the_bits_of_training(device):
    # the sampler runs without gradients, and its logprobs are the trainer's old logprobs
    torch.manual_seed(0)
    x, weight = torch.randn(65, 96, device=device), torch.randn(96, device=device)
    with_grad = rms_norm(x, weight.requires_grad_(), 1e-6)
    with torch.no_grad():
        without = rms_norm(x, weight, 1e-6)
    assert with_grad.requires_grad
    assert torch.equal(with_grad, without)


def test_what_no_kernel_takes_is_pytorch(monkeypatch):
    x = torch.randn(4, 8)
    choose = dispatch.block_backend
    assert choose("auto", x, torch.ones(8)) == "native"
    assert choose("torch", x) == "torch"
    assert choose("auto", x.double(), torch.ones(8).double()) == "torch"
    assert choose("auto", x.half()) == "torch"
    assert choose("auto", x, torch.ones(8).bfloat16()) == "torch"
    assert choose("auto", torch.empty(2, 2, device="meta")) == "torch"
    monkeypatch.setattr(dispatch, "_is_built", lambda: False)
    assert choose("auto", x) == "torch"
    s = torch.randn(4, 8, dtype=torch.float64)
    y, total = add_rms_norm(x, s, torch.ones(8), 1e-6)
    torch.testing.assert_close(total, x + s)
    torch.testing.assert_close(y, rms_norm_ref(x + s, torch.ones(8), 1e-6))
