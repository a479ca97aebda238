"""The CPU head against float64, at the edges of its tiles, and bit for bit where that is promised."""

import pytest
import torch

from r1fast.kernels import cpu_head

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = ["baseline", "avx2", "avx512"]
NATIVE = ["avx2", "avx512", "amx"]

# (R, D, V): around the tiles of 8 rows of W by 16, 32 or 48 rows of h, the pairs of bf16, the blocks of 256
SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (15, 17, 15),
    (16, 64, 16),
    (17, 65, 17),
    (31, 200, 127),
    (33, 65, 131),
    (47, 17, 1000),
    (49, 3, 513),
    (65, 1, 257),
    (228, 200, 1000),
]


def needs(dtype):
    if not cpu_head.supported(dtype):
        pytest.skip(f"no native kernels for {dtype} on this CPU")


@pytest.fixture(params=["fp32", "bf16", "bf16 on amx", "fp32 on avx2", "bf16 on avx2"])
def dtype(request, monkeypatch):
    name, _, level = request.param.partition(" on ")
    dtype = DTYPES[name != "fp32"]
    best = cpu_head.native_level(dtype)
    level = level or best.replace("amx", "avx512")
    if best not in NATIVE or NATIVE.index(level) > NATIVE.index(best):
        pytest.skip(f"{best} is the most that this CPU has for {dtype}")
    monkeypatch.setattr(cpu_head, "native_level", lambda dtype: level)
    return dtype


def make_inputs(num_rows, width, vocab_size, dtype, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = randn(num_rows, width).to(dtype)
    weight = (2 * randn(vocab_size, width) / width**0.5).to(dtype)
    target_ids = torch.randint(-1, vocab_size, (num_rows,), generator=generator)
    return hidden, weight, randn(vocab_size) if bias else None, target_ids


def exact(hidden, weight, bias, target_ids, anchor, inv_temperature=1.0, softcap=None):
    """s, sz and E (R, V) in float64."""
    z = hidden.double() @ weight.double().t()
    return exact_epilogue(z, bias, target_ids, anchor, inv_temperature, softcap)


def exact_epilogue(z, bias, target_ids, anchor, inv_temperature=1.0, softcap=None):
    z = z.double() if bias is None else z.double() + bias.double()
    slope = torch.ones_like(z)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    x = z * inv_temperature - anchor.double()[:, None]
    e = x.exp()
    (rows,) = (target_ids >= 0).nonzero(as_tuple=True)
    e[rows, target_ids[rows]] = 0
    return e.sum(1), (e * x).sum(1), e * slope


def lse(hidden, weight, bias, inv_temperature=1.0, softcap=None):
    """An anchor as a caller has it: the row's logsumexp, nearly."""
    none = torch.full((hidden.shape[0],), -1)
    s, _, _ = exact(hidden, weight, bias, none, torch.zeros(len(none)), inv_temperature, softcap)
    return (s.log() + 0.3).float()


def run(hidden, weight, bias, target_ids, anchor, inv_temperature=1.0, softcap=None, **more):
    options = {"keep": True, "want_sz": True} | more
    return cpu_head.forward(
        hidden,
        weight,
        bias,
        target_ids,
        anchor,
        inv_temperature=inv_temperature,
        softcap=softcap,
        **options,
    )


def assert_close(actual, expected, relative, absolute=1e-30):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    worst = (error - relative * expected.double().abs() - absolute).max().item()
    assert worst <= 0, f"max error {error.max():.3e}, over the allowed by {worst:.3e}"


def test_amx_is_refused_where_it_cannot_be():
    needs(torch.float32)
    inputs = make_inputs(3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match="for bf16, amx, one that this CPU has; got amx"):
        run(*inputs, torch.zeros(3), level="amx")


@pytest.mark.parametrize("size", [0, 1, 4095, 65536, 65537, 131072, 1_000_003])
def test_narrow_in_place(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size))
    x[::7] *= 1e-40
    expected = x.to(torch.bfloat16)
    narrowed = cpu_head.narrow_to_bf16(x)
    assert torch.equal(narrowed, expected)
    assert narrowed.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("num_rows", "width", "vocab_size"), SHAPES)
@pytest.mark.parametrize(
    ("bias", "inv_temperature", "softcap"),
    [(False, 1.0, None), (True, 1 / 0.7, None), (True, 1.0, 3.0)],
    ids=["plain", "bias", "softcap"],
)
def test_forward_and_gradients(num_rows, width, vocab_size, dtype, bias, inv_temperature, softcap):
    hidden, weight, bias, target_ids = make_inputs(num_rows, width, vocab_size, dtype, bias)
    anchor = lse(hidden, weight, bias, inv_temperature, softcap)
    inputs = hidden, weight, bias, target_ids, anchor, inv_temperature, softcap
    s, sz, e = run(*inputs)
    want_s, want_sz, want_e = exact(*inputs)

    # log(1 + s) is the log-probability's error: fp32 accumulation in either dtype
    assert_close(s, want_s, 1e-5, 1e-7)
    assert_close(sz, want_sz, 2e-5, 1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    dense = e.dense()
    assert dense.dtype == dtype
    assert_close(dense, want_e, rounding + 2e-5)
    (rows,) = (target_ids >= 0).nonzero(as_tuple=True)
    assert (dense[rows, target_ids[rows]] == 0).all()
    only_s, none, nothing = run(*inputs, keep=False, want_sz=False)
    assert none is None
    assert nothing is None
    assert torch.equal(only_s, s)

    dense = dense.double()
    dhidden = e.dhidden(weight)
    assert_close(dhidden, dense @ weight.double(), 1e-5, 1e-5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, width, generator=generator)
    rounded = x.to(dtype)
    dweight = torch.full((vocab_size, width), float("nan"))
    e.dweight_(x, dweight, accumulate=False)
    product = dense.t() @ rounded.double()
    assert_close(dweight, product, 1e-5, 1e-5)
    start = torch.randn(vocab_size, width + 3, generator=generator)[:, 1 : width + 1]
    added = start.clone()
    e.dweight_(rounded, added)
    assert torch.equal(added, start + dweight)
    dbias = torch.ones(vocab_size)
    e.dbias_(x[:, 0], dbias)
    assert_close(dbias, 1 + dense.t() @ x[:, 0].double(), 1e-5, 1e-5)
    e.dbias_(x[:, 0], dbias, accumulate=False)
    assert_close(dbias, dense.t() @ x[:, 0].double(), 1e-5, 1e-5)


def test_logprobs_are_fp32_accurate(dtype):
    hidden, weight, _, target_ids = make_inputs(65, 200, 1000, dtype)
    target_ids = target_ids.clamp(min=0)
    anchor = lse(hidden, weight, None)
    s, _, _ = run(hidden, weight, None, target_ids, anchor, keep=False)
    z = hidden.double() @ weight.double().t()
    z_y = z.gather(1, target_ids[:, None])[:, 0]
    logprobs = z_y - anchor - (s + (z_y - anchor).exp()).log()
    assert (logprobs - z.log_softmax(1).gather(1, target_ids[:, None])[:, 0]).abs().max() < 5e-6


@pytest.mark.parametrize("offset", [-80.0, -30.0, 80.0])
def test_anchors_far_away(dtype, offset):
    hidden, weight, _, target_ids = make_inputs(17, 64, 131, dtype)
    z = hidden.double() @ weight.double().t()
    anchor = (z.max(1).values - offset).float()  # the largest logit is `offset` above it
    s, sz, e = run(hidden, weight, None, target_ids, anchor)
    want_s, want_sz, want_e = exact(hidden, weight, None, target_ids, anchor)
    assert_close(s, want_s, 3e-5)
    assert_close(sz, want_sz, 3e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert_close(e.dense(), want_e, 3e-5 + rounding, 1.2e-38)


def test_exp_at_its_ends():
    needs(torch.float32)
    infinity = float("inf")
    values = [0.0, -0.0, 88.0, 88.7, 89.0, 1e30, infinity, -87.0, -100.0, -104.5, -1e30, -infinity]
    values = torch.tensor([*values, float("nan")])
    inputs = values[:, None], torch.ones(1, 1), None, torch.full((13,), -1), torch.zeros(13)
    _, _, e = run(*inputs)
    for actual in [e.dense()[:, 0], *(epilogue(values[:, None], level) for level in LEVELS)]:
        torch.testing.assert_close(actual, values.exp(), rtol=3e-7, atol=3e-45, equal_nan=True)


def epilogue(z, level):
    z = z.clone()
    ids, anchor = torch.full((len(z),), -1), torch.zeros(len(z))
    try:
        cpu_head.epilogue_(
            z, None, ids, anchor, inv_temperature=1.0, softcap=None, want_sz=True, level=level
        )
    except ValueError:
        pytest.skip(f"no {level} on this CPU")
    return z[:, 0]


def all_results(hidden, weight, bias, target_ids, anchor):
    s, sz, e = run(hidden, weight, bias, target_ids, anchor, 1.3)
    dweight, dbias = torch.zeros(weight.shape), torch.zeros(len(weight))
    e.dweight_(hidden, dweight)
    e.dbias_(anchor, dbias)
    return [s, sz, e.dense(), e.dhidden(weight), dweight, dbias]


def test_number_of_threads_changes_no_bit(dtype):
    inputs = make_inputs(100, 130, 3000, dtype, bias=True)
    inputs = (*inputs, lse(*inputs[:3], 1.3))
    z = inputs[0].float() @ inputs[1].float().t()
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in [1, 2, 3, 7]:
            torch.set_num_threads(num_threads)
            plain = z.to(dtype, copy=True)
            sums = cpu_head.epilogue_(
                plain, *inputs[2:], inv_temperature=1.3, softcap=None, want_sz=True
            )
            results.append([*all_results(*inputs), *sums, plain])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_do_not_see_each_other(dtype):
    hidden, weight, bias, target_ids = make_inputs(100, 65, 600, dtype, bias=True)
    anchor = lse(hidden, weight, bias)

    def rows_of(rows, bad=None):
        h = hidden[rows].clone()
        if bad is not None:
            h[bad] = torch.tensor([float("nan"), float("inf"), 1.0]).repeat(22)[:65].to(dtype)
        s, sz, e = run(h, weight, bias, target_ids[rows], anchor[rows], softcap=5.0)
        return [s, sz, e.dense(), e.dhidden(weight)]

    everyone = rows_of(torch.arange(100))
    for rows in [torch.tensor([99]), torch.arange(3, 40), torch.randperm(100)[:81]]:
        some = rows_of(rows)
        assert all(torch.equal(a[rows], b) for a, b in zip(everyone, some, strict=True))
    for bad in [0, 50, 96, 99]:
        others = torch.arange(100) != bad
        with_bad = rows_of(torch.arange(100), bad)
        assert with_bad[0][bad].isnan()
        for a, b in zip(everyone, with_bad, strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("kept", [[0], [48], [1, 2, 15, 16, 17, 40], list(range(3, 49)), []])
def test_compact(dtype, kept):
    hidden, weight, _, target_ids = make_inputs(49, 33, 300, dtype)
    anchor = lse(hidden, weight, None)
    _, _, e = run(hidden, weight, None, target_ids, anchor)
    plain, index = e.dense(), torch.tensor(kept, dtype=torch.int64)
    expected = plain[index]
    e.compact(index)
    assert torch.equal(e.dense(), expected)
    assert torch.equal(cpu_head.compact_(plain, index), expected)
    _, _, few = run(hidden, weight, None, target_ids, anchor)
    assert torch.equal(e.dhidden(weight), few.dhidden(weight)[index])
    dweight = torch.zeros(300, 33)
    e.dweight_(hidden[index], dweight)
    assert_close(dweight, expected.double().t() @ hidden[index].double(), 1e-5, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_affine(dtype, level):
    hidden, weight, _, target_ids = make_inputs(33, 17, 515, dtype)
    _, _, e = run(hidden, weight, None, target_ids, lse(hidden, weight, None))
    a, b = torch.randn(2, 33)
    plain = e.dense()
    x = plain.double()
    expected = torch.where(x == 0, 0, x * (a[:, None] + b[:, None] * x.log()))
    e.affine(a, b)
    try:
        cpu_head.affine_(plain, a, b, level=level)
    except ValueError:
        pytest.skip(f"no {level} on this CPU")
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    for actual in [e.dense(), plain]:
        assert_close(actual, expected, rounding, 1e-6 * x.max())
        assert (actual[x == 0] == 0).all()


def test_affine_of_subnormals_and_infinity():
    needs(torch.float32)
    e = torch.tensor([[0.0, 1e-45, 1e-40, 1.17e-38, 1.0, 3e38, float("nan")]])
    cpu_head.affine_(e, torch.zeros(1), torch.ones(1))
    x = torch.tensor([1e-45, 1e-40, 1.17e-38, 1.0, 3e38 / 88]).double()
    assert e[0, 0] == 0
    assert_close(e[0, 1:5], (x * x.log())[:4], 1e-6, 3e-45)
    assert e[0, 5] == float("inf")
    assert e[0, 6].isnan()


def test_strided_inputs_and_untouched_surroundings(dtype):
    num_rows, width, vocab_size = 21, 37, 141
    hidden, weight, _, target_ids = make_inputs(num_rows, width, vocab_size, dtype)
    anchor = lse(hidden, weight, None)
    nan = float("nan")  # a value read from outside shows

    def inside(x):
        padded = torch.full((x.shape[0] + 2, x.shape[1] + 5), nan).to(x.dtype)
        padded[1:-1, 3:-2] = x
        return padded[1:-1, 3:-2]

    workspace = torch.full((cpu_head.workspace_numel(num_rows, vocab_size, dtype) + 64,), nan)
    h, w = inside(hidden), inside(weight)
    s, sz, e = run(h, w, None, target_ids, anchor, workspace=workspace)
    want = run(hidden, weight, None, target_ids, anchor)
    assert torch.equal(s, want[0])
    assert torch.equal(sz, want[1])
    assert torch.equal(e.dense(), want[2].dense())
    assert workspace[-64:].isnan().all()
    assert torch.equal(e.dhidden(w), want[2].dhidden(weight))
    dweight = inside(torch.zeros(vocab_size, width))
    e.dweight_(h, dweight)
    assert_close(dweight, e.dense().double().t() @ hidden.double(), 1e-5, 1e-5)
    around = torch.ones(vocab_size + 2, width + 5, dtype=torch.bool)
    around[1:-1, 3:-2] = False
    assert dweight._base[around].isnan().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (3, 17), (5, 513), (2, 20001)])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_epilogue(level, num_rows, vocab_size, softcap, dtype):
    generator = torch.Generator().manual_seed(0)
    storage = 6 * torch.randn(num_rows, vocab_size + 3, generator=generator)
    storage = storage.to(dtype)
    z, outside = storage[:, 2:-1], storage.clone()
    bias = torch.randn(vocab_size, generator=generator)
    target_ids = torch.randint(-1, vocab_size, (num_rows,), generator=generator)
    anchor = torch.full((num_rows,), 12.0)
    want = exact_epilogue(z, bias, target_ids, anchor, 1.5, softcap)
    try:
        s, sz = cpu_head.epilogue_(
            z,
            bias,
            target_ids,
            anchor,
            inv_temperature=1.5,
            softcap=softcap,
            want_sz=True,
            level=level,
        )
    except ValueError:
        pytest.skip(f"no {level} on this CPU")
    assert_close(s, want[0], 1e-5)
    assert_close(sz, want[1], 1e-5, 1e-6)
    assert_close(z, want[2], 1e-5 + (2**-8 if dtype == torch.bfloat16 else 0), 1e-37)
    assert torch.equal(storage[:, :2], outside[:, :2])
    assert torch.equal(storage[:, -1], outside[:, -1])


def test_a_nan_target_logit_does_not_reach_the_sums(dtype):
    hidden, weight, _, _ = make_inputs(3, 8, 40, dtype)
    weight[7] = float("nan")
    target_ids = torch.tensor([7, 7, 3])
    s, sz, e = run(hidden, weight, None, target_ids, torch.zeros(3))
    z = (hidden.double() @ weight.double().t()).float()
    z_sums = cpu_head.epilogue_(
        z, None, target_ids, torch.zeros(3), inv_temperature=1.0, softcap=None, want_sz=True
    )
    for sums in [(s, sz), z_sums]:
        assert all(torch.equal(x.isnan(), torch.tensor([False, False, True])) for x in sums)
    assert e.dense()[0, 7] == 0


def test_unknown_level_says_so():
    with pytest.raises(ValueError, match="level must be auto, baseline, avx2 or avx512"):
        cpu_head.epilogue_(
            torch.zeros(1, 1),
            None,
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1),
            inv_temperature=1.0,
            softcap=None,
            want_sz=False,
            level="sse",
        )
