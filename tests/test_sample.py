"""The sampler against a sort in float64, row by row and bit by bit, and against the distribution it must follow."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from r1fast.kernels.sample import (
    Adjustments,
    adjust_logits_,
    sample,
    sample_native,
    sample_ref,
    token_logprobs,
)

LEVELS = ["baseline", "avx2", "avx512"]
CUTS = {
    "none": {},
    "k": {"top_k": 7},
    "p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
    "greedy": {"temperature": 0.0},
}


def make_logits(B, V, dtype=torch.float32, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(B, generator=g, dtype=torch.float64)
    return (scale * torch.randn(B, V, generator=g)).to(dtype), u


def native(level):
    """`sample` on the C++ compiled for `level`, with one value a parameter."""

    def run(
        logits,
        u,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        adjustments=None,
        num_top=0,
        given=None,
    ):
        B = len(logits)
        full = [torch.full((B,), float(x)) for x in (temperature, top_p, min_p)]
        k = torch.full((B,), top_k)
        try:
            return sample_native(
                logits, u, full[0], k, full[1], full[2], adjustments, True, num_top, given, level
            )
        except ValueError:
            pytest.skip(f"this CPU has no {level}")

    return run


def assert_same_draw(actual, exact, u, tolerance=2e-6):
    """Same tokens and log-probabilities as float64, which has the same logits."""
    assert torch.equal(actual.tokens, exact.tokens)
    for name in ("logprobs", "truncated_logprobs", "entropies", "top_logprobs"):
        got, want = getattr(actual, name), getattr(exact, name)
        if got is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=tolerance)
    if actual.top_ids is not None:
        assert torch.equal(actual.top_ids, exact.top_ids)
    assert torch.equal(actual.is_bad, exact.is_bad)


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_against_float64(V, cut, dtype):
    logits, u = make_logits(33, V, dtype)
    options = {"return_entropy": True, "num_top": min(V, 6), **CUTS[cut]}
    actual = sample(logits, u, **options)
    assert_same_draw(actual, sample_ref(logits.double(), u, **options), u)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_instruction_set(level, cut):
    logits, u = make_logits(16, 2100)
    actual = native(level)(logits, u, num_top=3, **CUTS[cut])
    exact = sample_ref(logits.double(), u, return_entropy=True, num_top=3, **CUTS[cut])
    assert_same_draw(actual, exact, u)


def test_unknown_level_is_refused():
    logits, u = make_logits(1, 4)
    one, k = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="level must be auto, baseline"):
        sample_native(logits, u, one, k, one, 0 * one, None, False, 0, None, "sse9")


@settings(max_examples=60)
@given(
    st.integers(1, 300), st.integers(0, 10**6), st.floats(0.05, 4), st.integers(0, 50),
    st.floats(0.01, 1), st.floats(0, 0.5),
)  # fmt: skip
def test_any_row(V, seed, temperature, top_k, top_p, min_p):
    logits, u = make_logits(4, V, seed=seed)
    logits = logits.round(decimals=1)  # ties
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    actual = sample(logits, u, **options)
    exact = sample_ref(logits.double(), u, **options)
    kept_p = exact.truncated_logprobs.exp()
    # a boundary that float32 places differently may cut one token more, or less: nothing else may differ
    different = actual.tokens != exact.tokens
    assert different.float().mean() <= 0.25
    torch.testing.assert_close(
        actual.truncated_logprobs.double().exp()[~different],
        kept_p[~different],
        rtol=0.2,
        atol=1e-5,
    )


def test_parameters_of_each_row():
    logits, u = make_logits(6, 700)
    rows = [
        {},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 0.0},
        {"temperature": 2.0},
    ]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = {n: torch.tensor([{**defaults, **r}[n] for r in rows]) for n in defaults}
    together = sample(logits, u, **columns)
    for i, options in enumerate(rows):
        alone = sample(logits[i : i + 1], u[i : i + 1], **options)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.logprobs[0], together.logprobs[i])
        assert torch.equal(alone.truncated_logprobs[0], together.truncated_logprobs[i])


@pytest.mark.parametrize("cut", CUTS)
def test_rows_and_threads_change_no_bit(cut):
    logits, u = make_logits(40, 16384)
    options = {"return_entropy": True, "num_top": 4, **CUTS[cut]}
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample(logits, u, **options)
        torch.set_num_threads(4)
        many = sample(logits, u, **options)
    finally:
        torch.set_num_threads(num_threads)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], u[order], **options)
    for a, b, c in zip(one, many, shuffled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[order], c)


@pytest.mark.parametrize("cut", ["none", "all"])
def test_follows_its_distribution(cut):
    """Chi-square over every token that is kept, from an even grid of u with a random shift."""
    V, N = 50, 20000
    row = make_logits(1, V, scale=2.0)[0]
    u = torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = sample(row.expand(N, V), u, **CUTS[cut]).tokens.bincount(minlength=V).double()
    p = exact_distribution(row[0].double(), **CUTS[cut])
    assert (counts[p == 0] == 0).all()
    expected = N * p[p > 0]
    pooled = expected < 5
    observed, expected = counts[p > 0], expected
    chi2 = ((observed - expected)[~pooled] ** 2 / expected[~pooled]).sum().item()
    freedom = int((~pooled).sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), (chi2, freedom)


def exact_distribution(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """A loop over the sorted tokens, in float64."""
    p = (x / temperature).softmax(0)
    order = sorted(range(len(x)), key=lambda i: (-x[i].item(), i))[: top_k or None]
    total, mass, kept = sum(p[i].item() for i in order), 0.0, []
    for i in order:
        if top_p < 1 and mass >= top_p * total:
            break
        mass += p[i].item()
        if p[i] >= min_p * p[order[0]]:
            kept.append(i)
    cut = torch.zeros_like(p)
    cut[kept] = p[kept]
    return cut / cut.sum()


@pytest.mark.parametrize("cut", ["none", "k", "p", "min_p", "all"])
def test_inverse_cdf_is_exact(cut):
    """u in the middle of each token's interval of the float64 CDF draws that token."""
    V = 1500
    row = make_logits(1, V, scale=1.5)[0]
    p = exact_distribution(row[0].double(), **CUTS[cut])
    cdf = p.cumsum(0)
    wide = (p > 1e-6).nonzero()[:, 0]
    for share in (0.1, 0.5, 0.9):
        u = cdf[wide] - share * p[wide]
        tokens = sample(row.expand(len(wide), V), u, **CUTS[cut]).tokens
        assert torch.equal(tokens, wide)


@pytest.mark.parametrize("cut", CUTS)
def test_u_at_its_ends_draws_a_token_that_is_kept(cut):
    logits, _ = make_logits(2, 3000)
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens = sample(logits, u, **CUTS[cut]).tokens
    for i in range(2):
        options = CUTS[cut]
        if not options.get("temperature", 1.0):
            assert tokens[i] == logits[i].argmax()
        else:
            assert exact_distribution(logits[i].double(), **options)[tokens[i]] > 0


def test_ties_go_to_the_lower_id():
    logits = torch.zeros(1, 2000)
    logits[0, [3, 900, 1500]] = 1.0
    u = torch.tensor([0.999], dtype=torch.float64)
    assert sample(logits, u, temperature=0.0).tokens == 3
    assert sample(logits, u, top_k=2).tokens == 900
    assert sample(logits, u, top_k=5).tokens == 1500
    result = sample(logits, u, num_top=5)
    assert result.top_ids.tolist() == [[3, 900, 1500, 0, 1]]
    assert sample(torch.zeros(1, 2000), u, top_p=0.01).tokens == 19  # the first 20 of equals


def test_negative_zero_ties_with_zero():
    logits = torch.tensor([[-0.0, 0.0, -1.0]])
    u = torch.tensor([0.0], dtype=torch.float64)
    assert sample(logits, u, top_k=1).tokens == 0
    assert sample(logits.flip(1), u, top_k=1).tokens == 1


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((3, 1300), -torch.inf)
    logits[:, 1100] = 2.0
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    result = sample(logits, u, return_entropy=True)
    assert result.tokens.tolist() == [1100] * 3
    assert result.logprobs.tolist() == [0.0] * 3
    assert result.entropies.tolist() == [0.0] * 3
    assert not result.is_bad.any()


def test_a_bad_row_is_flagged_and_its_neighbours_are_not_touched():
    logits, u = make_logits(5, 1100)
    clean = sample(logits, u, return_entropy=True, num_top=2)
    logits[0, 1050] = torch.nan
    logits[2] = -torch.inf
    logits[4, 7] = torch.inf
    dirty = sample(logits, u, return_entropy=True, num_top=2)
    assert dirty.is_bad.tolist() == [True, False, True, False, True]
    bad = dirty.is_bad
    assert (dirty.tokens[bad] == 0).all()
    for x in (dirty.logprobs, dirty.truncated_logprobs, dirty.entropies, dirty.top_logprobs):
        assert x[bad].isnan().all()
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[~bad], b[~bad])


def some_adjustments():
    """Row 0: a penalty on both signs, a bias and a ban; row 1: nothing; row 2: all banned but one."""
    ids = [0, 1, 2, 3, *range(1, 20)]
    penalty = [1.5, 1.5, 1.0, 1.0] + [1.0] * 19
    bias = [0.0, 0.5, 4.0, -torch.inf] + [-torch.inf] * 19
    starts = torch.tensor([0, 4, 4, 23])
    return Adjustments(starts, torch.tensor(ids), torch.tensor(penalty), torch.tensor(bias))


def test_adjustments_change_what_is_sampled_and_not_the_policy():
    logits, u = make_logits(3, 20)
    logits[0, :4] = torch.tensor([2.0, -2.0, 1.0, 9.0])
    before = logits.clone()
    a = some_adjustments()
    result = sample(logits, u, adjustments=a, temperature=0.8)
    assert torch.equal(logits, before)
    adjusted = logits.clone()
    adjust_logits_(adjusted, a)
    want = torch.tensor([2 / 1.5, -2 * 1.5 + 0.5, 5.0, -torch.inf])
    torch.testing.assert_close(adjusted[0, :4], want)
    assert torch.equal(adjusted[1], logits[1])
    rows = torch.arange(3)
    policy = (logits.double() / 0.8).log_softmax(-1)[rows, result.tokens]
    sampled = (adjusted.double() / 0.8).log_softmax(-1)[rows, result.tokens]
    torch.testing.assert_close(result.logprobs.double(), policy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.truncated_logprobs.double(), sampled, rtol=1e-6, atol=1e-6)
    assert result.tokens[2] == 0
    assert torch.equal(result.tokens, sample(adjusted, u, temperature=0.8).tokens)
    assert_same_draw(result, sample_ref(logits.double(), u, adjustments=a, temperature=0.8), u)


def test_a_row_that_is_banned_entirely_is_bad():
    logits, u = make_logits(2, 3)
    a = Adjustments(
        torch.tensor([0, 0, 3]), torch.arange(3), torch.ones(3), torch.full((3,), -torch.inf)
    )
    result = sample(logits, u, adjustments=a)
    assert result.is_bad.tolist() == [False, True]
    assert result.logprobs[1].isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"min_p": torch.tensor([0.0, 2.0])}, "min_p must be"),
        ({"num_top": 11}, "num_top must be"),
        ({"adjustments": Adjustments(torch.tensor([0, 0, 1]), torch.tensor([10]), torch.ones(1), torch.zeros(1))}, r"ids must be in \[0, 10\)"),
    ],
    ids=["temperature", "top_p", "top_k", "min_p", "num_top", "ids"],
)  # fmt: skip
def test_bad_arguments_are_refused(options, message):
    logits, u = make_logits(2, 10)
    with pytest.raises(ValueError, match=message):
        sample(logits, u, **options)


def test_seeds_draw_what_they_drew_before():
    """The rule of today's rollout.sampler: fp32 softmax, float64 running sum, first above u."""
    logits, u = make_logits(64, 4000)
    cdf = logits.softmax(-1).double().cumsum(-1)
    before = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(sample(logits, u).tokens, before)


@pytest.mark.parametrize("V", [1, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("cut", CUTS)
def test_triton_against_float64(V, cut, device):
    logits, u = (x.to(device) for x in make_logits(9, V))
    options = {"return_entropy": True, "num_top": min(V, 6), **CUTS[cut]}
    actual = sample(logits, u, backend="triton", **options)
    assert_same_draw(actual, sample_ref(logits.double(), u, **options), u)


def test_triton_flags_bad_rows_and_keeps_zeros_out(device):
    logits, u = (x.to(device) for x in make_logits(5, 1100))
    logits[0, 1050] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    logits[3, :1098] = -torch.inf
    result = sample(logits, u, return_entropy=True, backend="triton")
    exact = sample_ref(logits.double(), u, return_entropy=True)
    assert result.is_bad.tolist() == [True, True, True, False, False]
    assert_same_draw(
        type(result)(*(None if x is None else x[3:] for x in result)),
        type(exact)(*(None if x is None else x[3:] for x in exact)),
        u[3:],
    )


def test_triton_adjusts(device):
    logits, u = make_logits(3, 20)
    a = some_adjustments()
    moved = Adjustments(*(x.to(device) for x in vars(a).values()))
    result = sample(logits.to(device), u.to(device), adjustments=moved, backend="triton")
    exact = sample_ref(logits.double(), u, adjustments=a)
    assert_same_draw(type(result)(*(None if x is None else x.cpu() for x in result)), exact, u)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("V", [1, 17, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_given_tokens_have_the_bits_of_drawn_ones(level, V, dtype):
    """Also beside an entropy, a cut and adjustments, which sum the row in other ways."""
    run = native(level)
    logits, u = make_logits(33, V, dtype)
    bans = Adjustments(
        torch.arange(34), torch.arange(33) % V, torch.full((33,), 1.3), torch.zeros(33)
    )
    for options in ({}, {"top_k": 3, "top_p": 0.9}, {"adjustments": bans}):
        for temperature in (0.0, 0.7, 1.0):
            drawn = run(logits, u, temperature, **options)
            given = run(logits, 0 * u, temperature, given=drawn.tokens)
            assert torch.equal(given.logprobs, drawn.logprobs)
            assert torch.equal(given.tokens, drawn.tokens)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_token_logprobs(backend, device):
    """Of any token, likely or not, with a temperature a row; a bad row is NaN and no other."""
    logits, _ = make_logits(9, 1500)
    logits[3, 1400] = torch.nan
    ids = torch.tensor([0, 1499, 1023, 5, 1024, 7, 8, 9, 10])
    temperature = torch.linspace(0, 2, 9)
    actual = token_logprobs(
        logits.to(device), ids.to(device), temperature=temperature.to(device), backend=backend
    ).cpu()
    divisor = torch.where(temperature == 0, 1, temperature).double()[:, None]
    exact = (logits.double() / divisor).log_softmax(-1)[torch.arange(9), ids]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert actual.isnan().tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize("token", [-1, 10])
def test_a_given_token_outside_the_vocabulary_is_refused(token):
    logits, _ = make_logits(2, 10)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 10\)"):
        token_logprobs(logits, torch.tensor([3, token]))
