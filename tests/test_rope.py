import pytest
import torch
from numerics import assert_accurate
from tiny import at_level, each_backend

from r1fast.kernels import rope as kernel
from r1fast.kernels.rope import rope, rope_ref

# T, H, K, Dh, norms: one token, odd halves, one kv head, more heads than a tile has
SHAPES = [
    (129, 2, 1, 16, True), (127, 3, 3, 2, False), (128, 1, 1, 6, True), (1, 2, 1, 8, False),
    (0, 2, 1, 8, True), (60, 2, 1, 4, True), (5, 9, 3, 64, False), (5, 9, 3, 64, True),
]  # fmt: skip
EPS = 1e-3


def problem(T, H, K, Dh, norm, dtype, device="cpu"):
    g = torch.Generator().manual_seed(0)
    angles = 100 * torch.rand(T, Dh // 2, generator=g)
    cos, sin = angles.cos(), angles.sin()
    p = {
        "qkv": torch.randn(T, (H + 2 * K) * Dh, generator=g),
        "q_weight": torch.randn(Dh, generator=g) if norm else None,
        "k_weight": torch.randn(Dh, generator=g) if norm else None,
        "dq": torch.randn(T, H, Dh, generator=g),
        "dk": torch.randn(T, K, Dh, generator=g),
        "dv": torch.randn(T, K, Dh, generator=g),
    }
    p = {k: t if t is None else t.to(device, dtype) for k, t in p.items()}
    return p | {"rotations": torch.cat((cos, cos, -sin, sin), -1).to(device), "heads": (H, K)}


def out_and_grads(p, dtype, backend=None):
    x, qw, kw, *grads = (
        None if p[k] is None else p[k].detach().to(dtype)
        for k in ("qkv", "q_weight", "k_weight", "dq", "dk", "dv")
    )
    inputs = [t.requires_grad_() for t in (x, qw, kw) if t is not None]
    if backend is None:
        rounded = p["rotations"].to(p["qkv"].dtype)  # of the dtype that is tested
        out = rope_ref(x, rounded, *p["heads"], qw, kw, EPS)
    else:
        out = rope(x, p["rotations"], *p["heads"], qw, kw, EPS, backend=backend)
    names = ("dqkv", "dq_weight", "dk_weight")
    found = torch.autograd.grad(out, inputs, grads)
    return dict(zip("qkv", (t.detach() for t in out), strict=True)) | dict(zip(names, found))  # noqa: B905


@each_backend(SHAPES)
def test_matches_the_reference(shape, backend, dtype, slack, device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PROGRAMS", 40)  # so that some have several tokens
    p = problem(*shape, dtype, device)
    actual, exact = out_and_grads(p, dtype, backend), out_and_grads(p, torch.float64)
    baseline = out_and_grads(p, dtype)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == dtype
        assert actual[name].shape == exact[name].shape
        if shape[0]:
            assert_accurate(name, actual[name], baseline[name], exact[name], slack)
    assert torch.equal(actual["v"], p["qkv"].unflatten(1, (-1, shape[3]))[:, -shape[2] :])


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(level, dtype, monkeypatch):
    at_level(monkeypatch, level, "rope_forward", "rope_backward")
    p = problem(70, 3, 2, 22, True, dtype)
    actual, exact = out_and_grads(p, dtype, "native"), out_and_grads(p, torch.float64)
    for name, baseline in out_and_grads(p, dtype).items():
        assert_accurate(name, actual[name], baseline, exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_strided_tensors(backend, dtype, device):
    """Gradients as attention gives them: heads first, or expanded; the product as columns of another."""
    p = problem(33, 4, 2, 8, True, dtype, device)
    expected = out_and_grads(p, dtype, backend)
    wide = torch.full((33, 100), torch.nan, dtype=dtype, device=device)
    wide[:, 9:73] = p["qkv"]
    turned = {k: p[k].transpose(0, 1).contiguous().transpose(0, 1) for k in ("dq", "dk", "dv")}
    turned["dk"] = p["dk"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    found = out_and_grads(p | turned | {"qkv": wide[:, 9:73]}, dtype, backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    x = p["qkv"].detach().requires_grad_()
    q, _, _ = rope(x, p["rotations"], 4, 2, backend=backend)
    q.sum().backward()  # an expanded gradient, and none for k and v
    assert (x.grad[:, 32:] == 0).all()
    assert (x.grad[:, :32] != 0).any()


def test_what_is_kept_for_the_backward():
    """Without norms nothing of the product's size."""
    p = problem(50, 2, 1, 8, False, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope(p["qkv"].requires_grad_(), p["rotations"], 2, 1)
    assert [t.data_ptr() for t in saved] == [p["rotations"].data_ptr()]
