import math
from itertools import product

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels import triton_head
from r1fast.kernels.triton_head import Config, Exponentials, forward

# the interpreter cuts float32 off to bfloat16, a GPU rounds it: twice the error
SLACK = 2.0 if torch.cuda.is_available() else 4.0
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


def rand(*shape, seed=0, dtype=torch.float32, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(seed + 10007 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)


def targets(R, V, device="cpu", missing=False):
    y = torch.randint(V, (R,), generator=torch.Generator().manual_seed(R * V))
    if missing:
        y[::3] = -1
    return y.to(device)


def expected(h, W, bias, y, c, inv_temperature, softcap, dtype=torch.float64):
    """(s, sz, E) as the module's docstring defines them, in `dtype`."""
    u = h.to(dtype) @ W.to(dtype).t()
    if bias is not None:
        u = u + bias.to(dtype)
    z = u if softcap is None else softcap * torch.tanh(u / softcap)
    d = z * inv_temperature - c.to(dtype)[:, None]
    e = torch.where(torch.arange(len(W), device=y.device) == y[:, None], 0, d.exp())
    E = e if softcap is None else e * (1 - (z / softcap) ** 2)
    return e.sum(1), torch.where(e == 0, 0, e * d).sum(1), E


def anchor(h, W, bias=None, inv_temperature=1.0, softcap=None):
    """logsumexp, but not quite."""
    y = torch.full((len(h),), -1, device=h.device)
    zero = torch.zeros(len(h), device=h.device)
    total = expected(h, W, bias, y, zero, inv_temperature, softcap)[0]
    return (total.log() + 0.3).float()


def case(R, D, V, dtype=torch.float32, device="cpu", **kwargs):
    h = rand(R, D, dtype=dtype, device=device)
    W = rand(V, D, dtype=dtype, device=device, scale=2 / math.sqrt(D))
    return h, W, targets(R, V, device, **kwargs)


def check(h, W, bias, y, *, inv_temperature=1.0, softcap=None, config=None, workspace=None):
    c = anchor(h, W, bias, inv_temperature, softcap)
    exact = expected(h, W, bias, y, c, inv_temperature, softcap)
    plain = expected(h, W, bias, y, c, inv_temperature, softcap, dtype=torch.float32)
    s, sz, E = forward(
        h, W, bias, y, c, inv_temperature=inv_temperature, softcap=softcap,
        keep=True, want_sz=True, workspace=workspace, config=config,
    )  # fmt: skip
    assert s.dtype == sz.dtype == torch.float32
    assert E.dense().dtype == triton_head.workspace_dtype(h.dtype)
    floor = 1e-5 if h.is_cuda else 1e-6  # tensor cores add float32 from three TF32 products
    floor += 3e-7 * (softcap or 0.0)  # tanh from exp: an error of an ulp of the cap
    assert_accurate("s", s, plain[0], exact[0], floor=floor)
    assert_accurate("sz", sz, plain[1], exact[1], floor=5 * floor)
    if E.dense().dtype == torch.bfloat16:  # few values may all happen to round well
        floor += float(exact[2].max()) * 2**-8
    assert_accurate("E", E.dense(), plain[2].to(E.dense().dtype), exact[2], floor=floor)
    rows = (y >= 0).nonzero()[:, 0]
    assert (E.dense()[rows, y[rows]] == 0).all()
    return E, exact[2]


SHAPES = list(product([1, 17, 64, 129], [3, 16, 65], [2, 127, 128, 129, 257]))


@pytest.mark.parametrize(("R", "D", "V"), SHAPES)
def test_equals_float64(R, D, V, device):
    n = SHAPES.index((R, D, V))  # the options vary from shape to shape
    h, W, y = case(R, D, V, [torch.float32, torch.bfloat16][n % 2], device, missing=n % 3 == 0)
    bias = rand(V, device=device) if n % 5 < 2 else None
    E, exact = check(
        h, W, bias, y,
        inv_temperature=[1.0, 1 / 0.7, 1 / 1.5][n % 3], softcap=[None, 5.0, 30.0][n // 3 % 3],
    )  # fmt: skip

    rounded = E.dense().float()
    X = rand(R, 7, device=device)
    assert_accurate("dhidden", E.dhidden(W), rounded @ W.float(), exact @ W.double(), SLACK, 1e-5)
    dweight = torch.full((V, 7), math.nan, device=device)
    E.dweight_(X, dweight, accumulate=False)
    plain = rounded.t() @ X.to(E.dense().dtype).float()
    assert_accurate("dweight", dweight, plain, exact.t() @ X.double(), SLACK, 1e-5)
    before = dweight.clone()
    E.dweight_(X, dweight, accumulate=True)
    torch.testing.assert_close(dweight, 2 * before, rtol=1e-6, atol=1e-6)

    dbias = torch.full((V,), math.nan, device=device)
    E.dbias_(X[:, 0], dbias, accumulate=False)
    assert_accurate(
        "dbias", dbias, rounded.t() @ X[:, 0], exact.t() @ X[:, 0].double(), SLACK, 1e-5
    )
    before = dbias.clone()
    E.dbias_(X[:, 0], dbias, accumulate=True)
    torch.testing.assert_close(dbias, 2 * before)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_tiles_of_every_kind(tma, splits, device):
    # 3 x 5 x 3 tiles, the last of each cut short; TMA wants rows of 16 bytes
    h, W, y = case(39, 40, 141, torch.float32, device)
    config = Config(**SMALL, splits=splits, tma=tma)
    check(h, W, rand(141, device=device), y, softcap=9.0, inv_temperature=1.3, config=config)
    check(h, W, None, y, config=config)


def test_float16(device):
    h, W, y = case(17, 16, 129, torch.float16, device)
    E, exact = check(h, W, None, y)
    assert E.dense().dtype == torch.bfloat16
    rounded = E.dense().float() @ W.bfloat16().float()
    assert_accurate("dhidden", E.dhidden(W), rounded, exact @ W.double(), SLACK, 1e-5)


def test_dhidden_by_slabs(monkeypatch, device):
    monkeypatch.setattr(triton_head, "SLAB", 50)
    h, W, y = case(5, 16, 129, torch.float16, device)
    E, exact = check(h, W, None, y)
    plain = E.dense().float() @ W.bfloat16().float()
    assert_accurate("dhidden", E.dhidden(W), plain, exact @ W.double(), SLACK, 1e-5)


@pytest.mark.parametrize(
    "layout", ["rows apart", "transposed", "hidden apart", "hidden transposed"]
)
def test_strides(layout, device):
    h, W, y = case(17, 16, 129, torch.float32, device)
    if layout == "rows apart":
        W = torch.cat([W, W * math.nan], 1)[:, :16]
    elif layout == "transposed":
        W = W.t().contiguous().t()
    elif layout == "hidden apart":
        h = torch.cat([h, h * math.nan], 1)[:, :16]
    else:
        h = h.t().contiguous().t()
    check(h, W, None, y)


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_flat_and_peaked_rows(scale, device):
    h, W, y = case(33, 65, 129, torch.float32, device)
    check(h, W * scale, None, y)


def test_all_logits_strongly_negative(device):
    h, W, y = case(17, 16, 129, torch.float32, device)
    check(h, W, torch.full((129,), -200.0, device=device), y)


def test_banned_tokens_count_as_zero(device):
    h, W, y = case(17, 16, 129, torch.float32, device)
    bias = rand(129, device=device)
    bias[5] = -math.inf
    E, _ = check(h, W, bias, y)
    assert (E.dense()[:, 5] == 0).all()


def test_sums_alone_are_the_same(device):
    h, W, y = case(33, 16, 129, torch.bfloat16, device)
    c = anchor(h, W)
    kwargs = {"inv_temperature": 1.0, "softcap": None}
    s, sz, E = forward(h, W, None, y, c, keep=True, want_sz=True, **kwargs)
    alone = forward(h, W, None, y, c, keep=False, want_sz=False, **kwargs)
    assert torch.equal(alone.s, s)
    assert alone.sz is None
    assert alone.E is None
    both = forward(h, W, None, y, c, keep=False, want_sz=True, **kwargs)
    assert torch.equal(both.sz, sz)
    kept = forward(h, W, None, y, c, keep=True, want_sz=False, **kwargs)
    assert torch.equal(kept.E.dense(), E.dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype, device):
    h, W, y = case(35, 65, 141, dtype, device)
    c = anchor(h, W)
    kwargs = {"inv_temperature": 1.0, "softcap": None, "keep": True, "want_sz": True}
    config = Config(**SMALL)
    whole = forward(h, W, None, y, c, **kwargs, config=config)
    h = h.clone()
    h[::2] = math.nan
    odd = slice(1, None, 2)
    with_nan = forward(h, W, None, y, c, **kwargs, config=config)
    assert with_nan.s[::2].isnan().all()
    assert torch.equal(with_nan.s[odd], whole.s[odd])
    assert torch.equal(with_nan.sz[odd], whole.sz[odd])
    assert torch.equal(with_nan.E.dense()[odd], whole.E.dense()[odd])
    few = forward(h[odd], W, None, y[odd], c[odd], **kwargs, config=config)
    torch.testing.assert_close(few.s, whole.s[odd], rtol=1e-6, atol=0)


def test_workspace_is_used_again(device):
    dtype = torch.bfloat16
    numel = triton_head.workspace_numel(64, 129, dtype)
    workspace = torch.full((numel,), math.nan, dtype=dtype, device=device)
    for R, V in [(64, 129), (17, 127), (5, 129), (1, 2)]:  # what was there before does not show
        h, W, y = case(R, 16, V, dtype, device)
        E, _ = check(h, W, None, y, workspace=workspace)
        assert E.dense().data_ptr() == workspace.data_ptr()
        assert E.dense().shape == (R, V)
        padding = workspace[: triton_head.workspace_numel(R, V, dtype)].view(R, -1)[:, V:]
        assert (padding == 0).all()
    assert numel < 64 * (129 + triton_head.PAD)


def kept(R, V, dtype, device):
    h, W, y = case(R, 16, V, dtype, device)
    return check(h, W, None, y)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["none", "all", "first", "last", "even", "odd", "tail", "random"])
def test_compact(keep, dtype, device):
    R, V = 37, 300
    idx = {
        "none": [], "all": range(R), "first": [0], "last": [R - 1], "even": range(0, R, 2),
        "odd": range(1, R, 2), "tail": range(1, R), "random": [0, 1, 3, 4, 5, 6, 17, 30, 36],
    }[keep]  # fmt: skip
    idx = torch.tensor(list(idx), dtype=torch.int64, device=device)
    E = kept(R, V, dtype, device)
    before = E.dense().clone()
    E.compact(idx)
    assert torch.equal(E.dense(), before[idx])
    W, X = rand(V, 3, dtype=dtype, device=device), rand(len(idx), 3, device=device)
    assert E.dhidden(W).shape == (len(idx), 3)
    dweight = rand(V, 3, device=device)
    accumulated = dweight + before[idx].float().t() @ X.to(dtype).float()
    E.dweight_(X, dweight, accumulate=True)
    torch.testing.assert_close(dweight, accumulated, rtol=1e-5, atol=1e-5)
    E.dweight_(X, dweight, accumulate=False)
    torch.testing.assert_close(dweight, before[idx].float().t() @ X.to(dtype).float())
    dbias = rand(V, device=device)
    E.dbias_(X[:, 0], dbias, accumulate=False)
    torch.testing.assert_close(dbias, before[idx].float().t() @ X[:, 0])


def test_compact_twice(device):
    E = kept(37, 129, torch.float32, device)
    before = E.dense().clone()
    even = torch.arange(0, 37, 2, device=device)
    E.compact(even)
    E.compact(even[:3])
    assert torch.equal(E.dense(), before[[0, 4, 8]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 129, 1100])
def test_affine(V, dtype, device):
    E = kept(5, V, dtype, device)
    before = E.dense().clone().double()
    a, b = rand(5, device=device), rand(5, seed=1, device=device)
    E.affine(a, b)
    logs = torch.where(before == 0, 0, before.log())
    exact = before * (a.double()[:, None] + b.double()[:, None] * logs)
    assert_accurate("affine", E.dense(), exact.to(dtype), exact, SLACK)
    assert ((E.dense() == 0) == (before == 0)).all()


def test_no_rows(device):
    h, W, y = case(0, 16, 129, torch.bfloat16, device)
    s, sz, E = forward(
        h, W, None, y, torch.empty(0, device=device),
        inv_temperature=1.0, softcap=None, keep=True, want_sz=True,
    )  # fmt: skip
    assert s.shape == sz.shape == (0,)
    assert E.dense().shape == (0, 129)


def test_weight_may_require_a_gradient(device):
    h, W, y = case(3, 16, 5, torch.float32, device)
    E, exact = check(h, W.requires_grad_(), None, y)
    assert not E.dhidden(W).requires_grad
    torch.testing.assert_close(
        E.dhidden(W).double(), exact @ W.detach().double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run the overloads")
def test_products_have_a_float32_overload():
    # CUDA's overloads cannot run here, but their shapes and dtypes can
    out = torch.empty(5, 7, device="meta")
    a, b = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in [(5, 3), (3, 7)])
    for accumulate in (False, True):
        triton_head._mm_(out, a, b, accumulate)
    for overload in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
        assert "ScalarType out_dtype" in str(overload._schema)


def test_tma_needs_aligned_rows(monkeypatch):
    def chosen(D, dtype, offset=0, W=None):
        h = torch.empty(4, D + offset, dtype=dtype)[:, offset:]
        return triton_head.choose_config(h, torch.empty(4, D, dtype=dtype) if W is None else W)

    large, small = triton_head.CONFIGS[80, 16]  # the CPU takes what every chip can do
    assert chosen(64, torch.bfloat16) == chosen(64, torch.float16) == large
    assert chosen(65, torch.bfloat16) == chosen(40, torch.bfloat16) == small
    assert [chosen(65, torch.float32)] == triton_head.CONFIGS[80, 32]
    for arch in (90, 100):
        monkeypatch.setitem(triton_head.CONFIGS, (80, 16), triton_head.CONFIGS[arch, 16])
        assert chosen(64, torch.bfloat16).tma
        assert chosen(40, torch.bfloat16).tma
        assert not chosen(60, torch.bfloat16).tma  # 120 bytes a row
        assert not chosen(56, torch.bfloat16, offset=1).tma
        W = torch.empty(64, 64, dtype=torch.bfloat16)
        for other in (W.t(), W[:1].expand(8, 64), W[:, 1:61]):
            assert not chosen(other.shape[1], torch.bfloat16, W=other).tma
    assert not any(c.tma for bits in (16, 32) for c in triton_head.CONFIGS[80, bits][-1:])


BAD = {
    r"need hidden \(R, D\)": lambda a: a | {"weight": torch.zeros(5, 4)},
    "float16 or float32, got torch.float64": lambda a: a | {"hidden": torch.zeros(2, 3).double()},
    "hidden is torch.float32, weight is": lambda a: a | {"weight": torch.zeros(5, 3).bfloat16()},
    r"bias \(V,\) = \(5,\), got \(4,\)": lambda a: a | {"bias": torch.zeros(4)},
    r"target_ids must be \(2,\) of int64, got \(3,\)": lambda a: (
        a | {"target_ids": torch.zeros(3, dtype=torch.int64)}
    ),
    "target_ids must be .* of torch.int32": lambda a: (
        a | {"target_ids": torch.zeros(2, dtype=torch.int32)}
    ),
    r"anchor must be \(2,\) of float32": lambda a: a | {"anchor": torch.zeros(2).double()},
    "softcap must be above 0": lambda a: a | {"softcap": 0.0},
    r"workspace must be contiguous, \(128,\) or longer": lambda a: (
        a | {"workspace": torch.zeros(100)}
    ),
    "got .* of torch.bfloat16 on cpu": lambda a: (
        a | {"workspace": torch.zeros(128, dtype=torch.bfloat16)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    good = {
        "hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "bias": None,
        "target_ids": torch.zeros(2, dtype=torch.int64), "anchor": torch.zeros(2),
        "inv_temperature": 1.0, "softcap": None, "keep": True, "want_sz": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        forward(**BAD[message](good))


def test_bad_rows():
    E = Exponentials(torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"x must have E.s 2 rows, got \(3,\)"):
        E.dbias_(torch.zeros(3), torch.zeros(64), accumulate=False)
    with pytest.raises(ValueError, match=r"at most 2 increasing int64 row numbers, got .*int32"):
        E.compact(torch.zeros(1, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("R", "D", "V"), [(300, 512, 4096), (1000, 1000, 50257)])
def test_large_on_the_gpu(R, D, V, dtype):
    h, W, y = case(R, D, V, dtype, "cuda", missing=True)
    E, exact = check(h, W, rand(V, device="cuda"), y, softcap=20.0)
    check(h, W, None, y, config=triton_head.CONFIGS[80, 8 * h.element_size()][-1])
    plain = E.dense().float() @ W.to(E.dense().dtype).float()
    assert_accurate("dhidden", E.dhidden(W), plain, exact @ W.double(), floor=1e-4)
    X = rand(R, D, device="cuda")
    dweight = torch.zeros(V, D, device="cuda")
    E.dweight_(X, dweight, accumulate=True)
    plain = E.dense().float().t() @ X.to(E.dense().dtype).float()
    assert_accurate("dweight", dweight, plain, exact.t() @ X.double(), floor=1e-4)
    first = [forward(h, W, None, y, anchor(h, W), inv_temperature=1.0, softcap=None,
                     keep=True, want_sz=True) for _ in range(2)]  # fmt: skip
    assert torch.equal(first[0].s, first[1].s)
    assert torch.equal(first[0].E.dense(), first[1].E.dense())
