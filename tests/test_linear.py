"""The products of a linear layer: C++ against PyTorch, in float32 around the sizes of its tiles and blocks."""

import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from numerics import assert_accurate
from torch.utils.checkpoint import checkpoint

from r1fast.kernels import cpu_head
from r1fast.kernels import linear as op
from r1fast.kernels.linear import LinearFunction, linear, linear_ref
from r1fast.kernels.lora_linear import lora_linear

native = pytest.mark.skipif(not cpu_head.supported(torch.float32), reason="needs AVX2")


@pytest.fixture(autouse=True)
def from_few_tokens_on(monkeypatch):
    """On every level from as few as on AVX-512: the tests' sizes are those of tiles and blocks."""
    monkeypatch.setitem(op.MIN_TOKENS, "avx2", op.MIN_TOKENS["avx512"])


def problem(T, D, N, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"x": (T, D), "weight": (N, D), "bias": (N,), "dy": (T, N)}
    tensors = {k: torch.randn(*s, generator=g, dtype=torch.float64) for k, s in sizes.items()}
    if not bias:
        tensors["bias"] = None
    return {k: t if t is None else t.float().double() for k, t in tensors.items()}


def out_and_grads(f, p, dtype=torch.float32):
    x, weight, bias = (
        None if p[k] is None else p[k].detach().to(dtype).requires_grad_()
        for k in ("x", "weight", "bias")
    )
    y = f(x, weight, bias)
    y.backward(p["dy"].to(dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweight": weight.grad}
    return found if bias is None else found | {"dbias": bias.grad}


@native
@pytest.mark.parametrize(
    ("T", "D", "N"),
    [(32, 1, 1), (33, 16, 17), (40, 64, 48), (127, 191, 64), (128, 192, 65), (129, 193, 31),
     (191, 33, 129), (193, 400, 100), (1153, 50, 80), (1500, 48, 7), (200, 1000, 300),
     (64, 65, 800), (65, 64, 193), (192, 769, 769), (385, 1540, 70)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_no_less_accurate_than_pytorch(T, D, N, bias):
    p = problem(T, D, N, bias)
    assert op.is_native(*(None if p[k] is None else p[k].float() for k in ("x", "weight", "bias")))
    actual, baseline = out_and_grads(linear, p), out_and_grads(linear_ref, p)
    exact = out_and_grads(linear_ref, p, torch.float64)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_accurate(name, actual[name], baseline[name], exact[name])


@native
def test_rows_of_any_stride_and_shape():
    """Slices, columns of a larger matrix, a transposed weight, leading dimensions, an expanded gradient."""
    p = problem(120, 96, 40)
    x, weight, bias, dy = (p[k].float() for k in ("x", "weight", "bias", "dy"))
    expected = out_and_grads(linear, p)
    wide = torch.full((120, 200), torch.nan)
    wide[:, 7:103] = x
    other = torch.full((120, 90), torch.nan)
    other[:, 50:] = dy
    spellings = {
        "slice": (wide[:, 7:103], weight, other[:, 50:]),
        "column-major": (x.t().contiguous().t(), weight.t().contiguous().t(), dy.t().contiguous().t()),
        "3d": (x.view(4, 30, 96), weight, dy.view(4, 30, 40)),
    }  # fmt: skip
    for name, (a, w, d) in spellings.items():
        a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
        assert op.is_native(a, w, bias), name
        y = linear(a, w, bias)
        assert y.shape == d.shape, name
        y.backward(d)
        assert torch.equal(y.view(120, 40), expected["y"]), name
        assert torch.equal(a.grad.view(120, 96), expected["dx"]), name
        assert torch.equal(w.grad, expected["dweight"]), name
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(40, 96), rtol=1e-5, atol=1e-5)


@native
def test_threads_and_other_rows_change_no_bit():
    p = problem(1300, 800, 780)  # several groups of rows, chunks and sets of columns
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(out_and_grads(linear, p))
    finally:
        torch.set_num_threads(threads)
    for name in ("y", "dx", "dweight"):
        assert torch.equal(found[0][name], found[1][name]), name
        assert torch.equal(found[0][name], found[2][name]), name
    part = out_and_grads(linear, {k: v[37:101] if k in ("x", "dy") else v for k, v in p.items()})
    for name in ("y", "dx"):
        assert torch.equal(part[name], found[0][name][37:101]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_without_leading_dimensions(dtype):
    p = problem(1, 24, 10)
    x, weight, dy = p["x"][0].to(dtype), p["weight"].to(dtype), p["dy"][0].to(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    linear(x, weight).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight)
    torch.testing.assert_close(weight.grad, torch.outer(dy, x))


@native
def test_frozen_weights_checkpoints_and_no_grad(monkeypatch):
    from r1fast import _C

    p = problem(64, 32, 48)
    x, weight, bias = (p[k].float().requires_grad_() for k in ("x", "weight", "bias"))
    dy, expected = p["dy"].float(), out_and_grads(linear, p)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), expected["y"])
    checkpoint(linear, x, weight, bias, use_reentrant=False).backward(dy)
    for name, t in (("dx", x), ("dweight", weight), ("dbias", bias)):
        assert torch.equal(t.grad, expected[name]), name
        t.grad = None

    def refuse(*_):
        raise AssertionError("nobody asked for this product")

    with monkeypatch.context() as patched:
        patched.setattr(_C, "linear_dweight", refuse)
        linear(x, weight.detach(), bias.detach()).backward(dy)
    assert torch.equal(x.grad, expected["dx"])
    with monkeypatch.context() as patched:
        patched.setattr(_C, "linear_dx", refuse)
        linear(x.detach(), weight, None).backward(dy)
    assert torch.equal(weight.grad, expected["dweight"])


@native
def test_a_second_derivative_is_refused():
    x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    y = linear(x, weight).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_everything_else_is_pytorch(monkeypatch):
    monkeypatch.setattr(LinearFunction, "forward", None)
    x, weight = torch.randn(64, 32), torch.randn(48, 32)
    monkeypatch.setattr(op, "has_bf16_products", lambda: True)
    cases = [
        (x[: op.MIN_TOKENS["avx512"] - 1], weight),
        (x.double(), weight.double()),
        (x[:, :31].bfloat16(), weight[:, :31].bfloat16()),
        (x.new_empty(0, 32), weight),
        (x, weight[:0]),
        (x[:, :0], weight[:, :0]),
    ]
    for a, w in cases:
        assert torch.equal(linear(a, w), linear_ref(a, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    for a, w in ((x, weight[:, :5]), (x[0, 0], weight)):
        with pytest.raises(RuntimeError):
            linear(a, w)
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.zeros(3))


@native
def test_adapters_are_over_the_same_products(monkeypatch):
    from r1fast import _C

    p = problem(64, 32, 48)
    x, weight, bias, dy = (p[k].float() for k in ("x", "weight", "bias", "dy"))
    factors = torch.randn(4, 32), torch.zeros(48, 4)  # B = 0: nothing is added
    calls = []
    for name in ("linear_forward", "linear_dx", "linear_dweight"):
        f = getattr(_C, name)
        monkeypatch.setattr(_C, name, lambda *a, f=f, name=name: (calls.append(name), f(*a)))
    expected = out_and_grads(linear, p)
    x.requires_grad_()
    y = lora_linear(x, weight, bias, *(t.requires_grad_() for t in factors), [(0, 48)], 2.0)
    y.backward(dy)
    assert torch.equal(y, expected["y"])
    assert torch.equal(x.grad, expected["dx"])
    # of W: y and dx; of A: h = x A^T and dA; of B: dh and dB, but not y + h B^T
    assert calls[3:5] == ["linear_forward"] * 2
    assert sorted(calls[5:]) == ["linear_dweight"] * 2 + ["linear_dx"] * 2


sampled = pytest.mark.skipif(not cpu_head.supported(torch.bfloat16), reason="needs AVX2")


@sampled
@pytest.mark.parametrize(
    ("T", "D", "N"), [(1, 2, 1), (7, 16, 17), (33, 64, 48), (64, 190, 65), (129, 256, 40)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_forward_is_the_samplers_product(T, D, N, bias):
    """To the bit, for rows of any stride, and no less accurate than PyTorch's."""
    from r1fast import _C
    from r1fast.rollout.native import PackedWeight, padded

    p = problem(T, D, N, bias)
    x, weight, b = (None if p[k] is None else p[k].bfloat16() for k in ("x", "weight", "bias"))
    assert op.is_sampled(x, weight, b)
    y = linear(x, weight, b)
    tiles, out = padded(T, D, x.dtype), padded(T, N, x.dtype)
    tiles[:T, :D] = x
    PackedWeight(weight, b)(tiles, out, T, _C.After.store)
    assert torch.equal(y, out[:T, :N])
    wide = torch.full((T, D + 5), torch.nan, dtype=x.dtype)
    wide[:, 3 : D + 3] = x
    assert torch.equal(linear(wide[:, 3 : D + 3], weight, b), y)
    exact = {k: None if t is None else t.bfloat16().double() for k, t in p.items()}
    actual, baseline = (out_and_grads(f, p, torch.bfloat16) for f in (linear, linear_ref))
    for name, value in out_and_grads(linear_ref, exact, torch.float64).items():
        assert_accurate(name, actual[name], baseline[name], value)


@pytest.fixture
def without_bfloat16_products(monkeypatch):
    """As on a CPU with AVX2 alone, where PyTorch multiplies bfloat16 in loops."""
    monkeypatch.setattr(op, "has_bf16_products", lambda: False)


@pytest.mark.parametrize(
    ("T", "D", "N"),
    [(1, 2, 1), (7, 15, 17), (33, 64, 48), (40, 191, 65), (129, 256, 40), (0, 4, 6)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_gradients_in_float32(without_bfloat16_products, monkeypatch, T, D, N, bias):
    """No less accurate than PyTorch's, for any cut into slabs, whether or not the forward is the sampler's."""
    p = {k: None if t is None else t.bfloat16() for k, t in problem(T, D, N, bias).items()}
    exact = {k: None if t is None else t.double() for k, t in p.items()}
    expected = out_and_grads(linear_ref, exact, torch.float64)
    baseline = out_and_grads(linear_ref, p, torch.bfloat16)
    found = []
    for slab in (16, op.SLAB):
        monkeypatch.setattr(op, "SLAB", slab)
        found.append(out_and_grads(linear, p, torch.bfloat16))
        for name, value in expected.items():
            assert found[-1][name].dtype == torch.bfloat16
            if value.numel():
                assert_accurate(name, found[-1][name], baseline[name], value)
    wide = {k: p[k].float() for k in ("x", "weight", "dy")}
    assert_close = partial(torch.testing.assert_close, rtol=2**-8, atol=1e-5)
    assert_close(found[1]["dx"].float(), wide["dy"] @ wide["weight"])
    assert_close(found[1]["dweight"].float(), wide["dy"].t() @ wide["x"])


@pytest.mark.parametrize("has_products", [True, False])
def test_bfloat16_gradients_are_pytorchs_where_it_has_products(monkeypatch, has_products):
    p = {k: t.bfloat16() for k, t in problem(70, 34, 50).items()}
    dx, dweight = p["dy"] @ p["weight"], torch.mm(p["dy"].t(), p["x"])
    monkeypatch.setattr(op, "has_bf16_products", lambda: has_products)
    slabs, real = [], op._slab
    monkeypatch.setattr(op, "_slab", lambda length: (slabs.append(length), real(length))[1])
    actual = op.linear_dx(p["dy"], p["weight"]), op.linear_dweight(p["dy"], p["x"])
    if has_products:
        assert torch.equal(actual[0], dx)
        assert torch.equal(actual[1], dweight)
    assert slabs == ([] if has_products else [50, 34])
    # what is not bfloat16 never is
    slabs.clear()
    op.linear_dx(p["dy"].float(), p["weight"].float())
    op.linear_dweight(p["dy"].double(), p["x"].double())
    assert not slabs


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and platform.machine() == "x86_64"),
    reason="needs oneDNN on x86-64",
)
def test_what_pytorch_says_of_its_products():
    """oneDNN held to AVX2, as ONEDNN_MAX_CPU_ISA can, once a process."""
    code = "from r1fast.kernels.linear import has_bf16_products; print(has_bf16_products())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr
    if torch.cpu._is_avx512_bf16_supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        assert op.has_bf16_products()


def test_bfloat16_adapters_in_float32(without_bfloat16_products):
    """The adapters' products and the sum with the base's, around them the tests of test_lora_linear.py."""
    from test_lora_linear import PARTS, test_against_float64

    for name in PARTS:
        test_against_float64(name, torch.bfloat16, 33, 64, 8)
        test_against_float64(name, torch.bfloat16, 5, 33, 3)
