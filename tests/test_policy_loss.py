"""The table of policy losses: against formulas written out here, autograd, and between back ends."""

import itertools
import math

import pytest
import torch
from numerics import assert_accurate, device_of

from r1fast.kernels.loss_rows import prepare_rows
from r1fast.kernels.policy_loss import loss_terms, policy_loss, quantile, token_loss
from r1fast.kernels.policy_loss_options import CORRECTIONS, LOSS_TYPES, PolicyLossOptions

CU = torch.tensor([0, 4, 4, 11, 18, 24])  # one sequence is empty
MAX_TOKENS = 9
POLICIES = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "delta": 1.15, "dual_clip": 1.1},
    {"loss_type": "grpo", "clip_eps_low": 10.0, "clip_eps_high": 10.0},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo", "clip_eps_high": 0.28},
    {"loss_type": "dr_grpo"},
    {"loss_type": "gspo", "clip_eps_low": 0.02, "clip_eps_high": 0.03},
    {"loss_type": "cispo"},
    {"loss_type": "cispo", "cispo_clip": "absolute", "clip_eps_high": 1.2},
    {"loss_type": "sapo"},
    {"loss_type": "luspo"},
]
KLS = [
    {},
    *({"kl_coef": 0.3, "kl_estimator": k} for k in ("k1", "k2", "k3", "k3_unbiased")),
    *({"kl_coef": 0.3, "kl_estimator": k, "kl_in": "reward"} for k in ("k1", "k2", "k3")),
]
ENTROPIES = [{}, {"entropy_coef": 0.2}, {"top_entropy_quantile": 0.4, "entropy_coef": -0.1}]
OFF_POLICY = [
    {},
    {"off_policy_mask_threshold": 0.02},
    *({"rollout_correction": c, "rollout_clip_min": 0.9, "rollout_clip_max": 1.1}
      for c in CORRECTIONS),
]  # fmt: skip


def make_batch(seed=0, dtype=torch.float64, spread=0.3):
    """Log-probabilities, entropies and the batch they belong to; a quarter is masked and NaN."""
    g = torch.Generator().manual_seed(seed)
    T = int(CU[-1])

    def normal(n=T):
        return torch.randn(n, generator=g, dtype=torch.float64)

    logprobs = -3 * torch.rand(T, generator=g, dtype=torch.float64) - 0.1
    old = logprobs + spread * normal()
    batch = {
        "old_logprobs": old,
        "ref_logprobs": logprobs + 0.4 * normal(),
        "rollout_logprobs": old + 0.1 * normal(),
    }
    mask = torch.rand(T, generator=g) > 0.25
    entropy = torch.rand(T, generator=g, dtype=torch.float64) * 3
    advantages = torch.tensor([1.0, 5.0, 0.0, -1.5, 0.7], dtype=torch.float64)
    for x in (logprobs, entropy, *batch.values()):
        x[~mask] = torch.nan
    batch = {k: x.to(dtype) for k, x in batch.items()}
    batch |= {"cu_seqlens": CU, "max_completion_tokens": MAX_TOKENS}
    return logprobs.to(dtype), entropy.to(dtype), advantages.to(dtype), mask, batch


def run(options, seed=0, dtype=torch.float64, backend="torch", **changes):
    """(loss, dlogprobs, dentropy, metrics) by the op, on the CPU."""
    where = device_of(backend)
    *tensors, batch = make_batch(seed, dtype)
    logprobs, entropy, advantages, mask = (x.to(where) for x in tensors)
    batch = {
        n: x.to(where) if isinstance(x, torch.Tensor) else x for n, x in (batch | changes).items()
    }
    logprobs.requires_grad_()
    entropy.requires_grad_()
    loss, metrics = policy_loss(
        logprobs, advantages, mask, options, entropy=entropy, backend=backend, **batch
    )
    loss.backward()
    grads = (None if x.grad is None else x.grad.cpu() for x in (logprobs, entropy))
    return loss.detach().cpu(), *grads, {n: x.cpu() for n, x in metrics.items()}


def by_definition(options, seed=0, on_policy=False):
    """The loss as the papers write it: sequence by sequence, token by token, in float64."""
    o = options
    logprobs, entropy, advantages, mask, batch = make_batch(seed)
    logprobs.requires_grad_()
    entropy.requires_grad_()
    kept = entropy.detach()[mask]
    floor = torch.quantile(kept, 1 - o.top_entropy_quantile) if o.top_entropy_quantile < 1 else -1.0
    num_sequences, num_tokens = len(advantages), int(mask.sum())
    total, entropies = 0.0, []
    for s in range(num_sequences):
        tokens = [t for t in range(int(CU[s]), int(CU[s + 1])) if mask[t]]
        A, n = float(advantages[s]), len(tokens)
        if not n:
            continue
        logp = [logprobs[t] for t in tokens]
        old = (
            [x.item() for x in logp]
            if on_policy
            else [float(batch["old_logprobs"][t]) for t in tokens]
        )
        ref = [float(batch["ref_logprobs"][t]) for t in tokens]
        rollout = [float(batch["rollout_logprobs"][t]) for t in tokens]

        def estimate(p, q, kind=o.kl_estimator):
            d = q - p
            exp = torch.exp(d) if isinstance(d, torch.Tensor) else math.exp(d)
            return {"k1": -d, "k2": d * d / 2}.get(kind, exp - d - 1)

        if o.kl_coef and o.kl_in == "reward":
            A -= o.kl_coef * sum(map(estimate, old, ref))
        gaps = [a - b for a, b in zip(old, rollout, strict=True)]
        factors = [1.0] * n
        if o.rollout_correction:
            level, _, how = o.rollout_correction.partition("_")
            if level == "sequence":
                gaps = [sum(gaps)] * n
            elif level == "geometric":
                gaps = [sum(gaps) / n] * n
            low, high = o.rollout_clip_min, o.rollout_clip_max
            ratios = [math.exp(x) for x in gaps]
            if how == "truncate":
                factors = [min(max(x, low), high) for x in ratios]
            else:
                factors = [x if low <= x <= high else 0.0 for x in ratios]
        if o.off_policy_mask_threshold is not None:
            drift = sum(b - p.item() for b, p in zip(rollout, logp, strict=True)) / n
            if A < 0 and drift > o.off_policy_mask_threshold:
                factors = [0.0] * n
        ratios = [torch.exp(p - q) for p, q in zip(logp, old, strict=True)]
        if o.importance_sampling_level == "sequence":
            mean = sum(p - q for p, q in zip(logp, old, strict=True)) / n
            ratios = [torch.exp(mean)] * n
        sequence = 0.0
        for t, p, q, r, factor in zip(tokens, logp, ref, ratios, factors, strict=True):
            if o.loss_type == "cispo":
                top = 1 + o.clip_eps_high if o.cispo_clip == "relative" else o.clip_eps_high
                bottom = 1 - o.clip_eps_low if o.cispo_clip == "relative" else 0.0
                policy = -min(max(r.item(), bottom), top) * A * p
            elif o.loss_type == "sapo":
                tau = o.sapo_temperature_pos if A > 0 else o.sapo_temperature_neg
                policy = -torch.sigmoid(tau * (r - 1)) * 4 / tau * A
            else:
                free = r if o.delta is None else r.clamp(max=o.delta)
                policy = -torch.min(free * A, r.clamp(1 - o.clip_eps_low, 1 + o.clip_eps_high) * A)
                if o.dual_clip is not None and A < 0:
                    policy = policy.clamp(max=-o.dual_clip * A)
            learns = bool(entropy[t] >= floor)
            if learns:
                entropies.append(entropy[t])
            kl = 0.0
            if o.kl_coef and o.kl_in == "loss":
                kl = o.kl_coef * estimate(p, q) * (r if o.kl_estimator == "k3_unbiased" else 1)
            sequence = sequence + factor * learns * policy + kl
        if o.loss_type in ("grpo", "gspo", "sapo"):
            sequence = sequence / n
        total = total + sequence
    divisor = {
        "dapo": num_tokens, "bnpo": num_tokens, "cispo": num_tokens,
        "dr_grpo": num_sequences * MAX_TOKENS,
    }.get(o.loss_type, num_sequences)  # fmt: skip
    loss = total / divisor
    if o.entropy_coef:
        loss = loss - o.entropy_coef * sum(entropies) / len(entropies)
    loss.backward()
    dentropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return loss.detach(), logprobs.grad, dentropy


@pytest.mark.parametrize("policy", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_combination_is_what_the_papers_write(policy):
    for kl, entropy, off in itertools.product(KLS, ENTROPIES, OFF_POLICY):
        options = PolicyLossOptions(**policy, **kl, **entropy, **off)
        exact = by_definition(options)
        loss, dlogprobs, dentropy, _ = run(options)
        assert loss == pytest.approx(float(exact[0]), rel=1e-12, abs=1e-13), options
        for actual, expected in ((dlogprobs, exact[1]), (dentropy, exact[2])):
            actual = torch.zeros(24, dtype=torch.float64) if actual is None else actual
            torch.testing.assert_close(
                actual.nan_to_num(0), expected, rtol=1e-10, atol=1e-13, msg=str(options)
            )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_without_old_logprobs_the_new_ones_stand_in(policy):
    for kl in KLS:
        options = PolicyLossOptions(**policy, **kl)
        exact = by_definition(options, on_policy=True)
        loss, dlogprobs, _, _ = run(options, old_logprobs=None)
        assert loss == pytest.approx(float(exact[0]), rel=1e-12, abs=1e-13), options
        torch.testing.assert_close(dlogprobs, exact[1], rtol=1e-10, atol=1e-13, msg=str(options))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_the_gradient_is_the_derivative_of_the_loss(policy):
    """The analytic gradient against autograd through the very same expression."""
    logprobs, entropy, advantages, mask, batch = make_batch(seed=3, spread=0.8)
    for kl, extra in itertools.product(KLS, [*ENTROPIES, *OFF_POLICY]):
        options = PolicyLossOptions(**policy, **kl, **extra)
        index, rows = prepare_rows(
            options, len(logprobs), advantages, mask, dtype=torch.float64, **batch
        )
        leaf = logprobs[index].requires_grad_()
        terms = loss_terms(leaf, entropy[index], rows, options, "torch")
        (derivative,) = torch.autograd.grad(terms.loss, leaf)
        torch.testing.assert_close(terms.dlogprobs, derivative, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_log_probabilities_from_elsewhere(policy):
    """The loss, its metrics and its gradient are those at `policy_logprobs`, to the bit."""
    logprobs, entropy, advantages, mask, batch = make_batch(seed=0)
    elsewhere = logprobs + 0.1 * torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
    for kl, extra in itertools.product(KLS, [*ENTROPIES, *OFF_POLICY]):
        options = PolicyLossOptions(**policy, **kl, **extra)
        loss, dlogprobs, _, metrics = run(options, policy_logprobs=elsewhere)
        leaf = elsewhere.clone().requires_grad_()
        expected, expected_metrics = policy_loss(
            leaf, advantages, mask, options, entropy=entropy, backend="torch", **batch
        )
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(dlogprobs, leaf.grad)
        assert metrics == expected_metrics


@pytest.mark.parametrize("T", [1, 127, 1023, 1024, 1025])
def test_the_kernel_computes_the_table(T, device):
    """Triton and PyTorch run one source; float32 of both against float64, for all branches."""
    g = torch.Generator().manual_seed(T)
    inputs = [torch.randn(4, T, generator=g, dtype=torch.float64)[i] for i in range(4)]
    inputs[0] = -inputs[0].abs()
    inputs = [x.float() for x in inputs]
    for policy, kl in itertools.product(POLICIES, KLS[:5]):
        options = PolicyLossOptions(**policy, **kl)
        exact = token_loss(*(x.double() for x in inputs), options, "torch")
        baseline = token_loss(*inputs, options, "torch")
        actual = token_loss(*(x.to(device) for x in inputs), options, "triton")
        # float32 may round a ratio across a clip: those tokens have no one right answer
        r = inputs[1].double().exp()
        edges = [1 - options.clip_eps_low, 1 + options.clip_eps_high, options.clip_eps_high, 1.15]
        safe = torch.stack([(r - e).abs() > 1e-6 * r for e in edges]).all(0)
        for n, (a, b, e) in enumerate(zip(actual, baseline, exact, strict=True)):
            if e.dtype == torch.bool:
                assert torch.equal(a.cpu()[safe], e[safe]), (options, n)
            else:
                largest = float(e.abs().max())
                floor = max(1e-6, 2**-22 * largest)
                assert_accurate(f"{n}", a.cpu()[safe], b[safe], e[safe], floor=floor)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_whole_op_on_both_back_ends(backend):
    for policy in POLICIES:
        options = PolicyLossOptions(**policy, kl_coef=0.1, entropy_coef=0.1)
        exact = run(options)
        actual = run(options, dtype=torch.float32, backend=backend)
        assert actual[0] == pytest.approx(float(exact[0]), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(actual[1].double(), exact[1], rtol=1e-4, atol=1e-6)


def one(ratio, A, ref_gap=0.0, backend="torch", **options):
    """(loss, gradient) of a single token with the given importance ratio."""
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    options = PolicyLossOptions(**{"loss_type": "dapo"} | options)
    loss, _ = policy_loss(
        logp, torch.tensor([A], dtype=torch.float64), None, options,
        old_logprobs=logp.detach() - math.log(ratio), ref_logprobs=logp.detach() + ref_gap,
        backend=backend,
    )  # fmt: skip
    loss.backward()
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
    loss, grad = one(ratio, A)
    assert loss == pytest.approx(-surrogate)
    assert grad == pytest.approx(-slope)


def test_eps_of_one_or_more_only_caps_from_above():
    """R1's eps = 10: the ratio is capped at 11, and no ratio is below 1 - 10."""
    wide = {"clip_eps_low": 10.0, "clip_eps_high": 10.0}
    assert one(10.9, 1.0, **wide) == pytest.approx((-10.9, -10.9))
    assert one(12.0, 1.0, **wide) == pytest.approx((-11.0, 0.0))
    assert one(1e-3, -1.0, **wide) == pytest.approx((1e-3, 1e-3))
    assert one(12.0, -1.0, **wide) == pytest.approx((12.0, 12.0))


def test_delta_and_dual_clip_by_hand():
    # a bad token that became common: without a bound its loss grows with the ratio
    assert one(5.0, -1.0) == pytest.approx((5.0, 5.0))
    assert one(5.0, -1.0, delta=4.0) == pytest.approx((4.0, 0.0))
    assert one(5.0, -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0))
    assert one(2.0, -1.0, dual_clip=3.0) == pytest.approx((2.0, 2.0))
    assert one(0.5, 1.0, dual_clip=3.0) == pytest.approx((-0.5, -0.5))  # good ones keep theirs


def test_a_ratio_beyond_all_bounds_stays_a_number():
    for A in (1.0, 0.0, -1.0):
        loss, grad = one(math.exp(300), A, kl_coef=0.1)
        assert not math.isnan(loss)
        assert not math.isnan(grad)


def test_k3_by_hand_and_without_cancellation(device):
    for gap in (-2.0, -0.2501, -0.2499, -1e-4, 0.0, 1e-4, 0.2499, 0.5, 2.0):
        loss, grad = one(1.0, 0.0, ref_gap=gap, kl_coef=1.0)
        assert loss == pytest.approx(math.expm1(gap) - gap, rel=1e-13, abs=1e-16)
        assert grad == pytest.approx(1 - math.exp(gap), abs=1e-12)
    d = torch.logspace(-4, -0.1, 60)
    x = torch.zeros(60)
    options = PolicyLossOptions(kl_coef=1.0)
    for backend in ("triton", "torch"):
        kl = token_loss(*(t.to(device) for t in (x, x, d, x)), options, backend)[1].cpu()
        exact = torch.expm1(d.double()) - d.double()
        assert ((kl - exact).abs() <= 2e-5 * exact).all(), backend


def test_metrics_by_hand():
    ratios = torch.tensor([1.4, 0.5, 1.4, 0.5], dtype=torch.float64)
    old = torch.full_like(ratios, math.log(0.5))
    _, metrics = policy_loss(
        old + ratios.log(), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64), None,
        PolicyLossOptions(loss_type="dapo"), old_logprobs=old, ref_logprobs=old + 0.1,
    )  # fmt: skip
    assert metrics["clip_ratio/high_mean"] == metrics["clip_ratio/low_mean"] == 1 / 4
    assert metrics["clip_ratio/region_mean"] == 2 / 4
    assert metrics["ratio"] == pytest.approx(3.8 / 4)
    d = [0.1 - math.log(r) for r in ratios.tolist()]
    assert metrics["kl"] == pytest.approx(sum(math.exp(x) - x - 1 for x in d) / 4)
    assert metrics["num_tokens"] == 4
    assert not any(x.requires_grad for x in metrics.values())


def test_quantile_is_torchs():
    x = torch.randn(37, dtype=torch.float64)
    for q in (0.0, 0.2, 0.5, 0.99, 1.0):
        assert quantile(x, q) == pytest.approx(float(torch.quantile(x, q)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, .*got 'ppo'"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, k3_unbiased, got 'k4'"),
        ({"kl_in": "advantage"}, "kl_in must be one of loss, reward"),
        ({"importance_sampling_level": "word"}, "must be one of token, sequence"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "defined per token"),
        ({"kl_estimator": "k3_unbiased", "kl_in": "reward"}, "needs kl_in='loss'"),
        ({"rollout_correction": "tis"}, "rollout_correction must be one of .*token_truncate"),
        ({"clip_eps_low": -0.1}, "clip_eps_low must be at least 0, got -0.1"),
        ({"clip_eps_high": math.nan}, "clip_eps_high must be at least 0, got nan"),
        ({"delta": 0.0}, "delta must be above 0"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be above 0"),
        ({"top_entropy_quantile": 0.0}, r"top_entropy_quantile must be in \(0, 1\], got 0.0"),
        ({"entropy_coef": math.inf}, "entropy_coef must be finite"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossOptions(**options)


def test_every_loss_type_is_walked():
    assert {o["loss_type"] for o in POLICIES} == set(LOSS_TYPES)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"cu_seqlens": None}, "one per sequence needs cu_seqlens"),
        ({}, {"cu_seqlens": torch.tensor([0, 23])}, "must rise from 0 to the number of rows, 24"),
        ({}, {"cu_seqlens": torch.tensor([0, 9, 5, 24])}, "must rise from 0"),
        ({}, {"old_logprobs": torch.zeros(23)}, r"old_logprobs must be \(T,\) = \(24,\)"),
        ({}, {"old_logprobs": torch.full((24,), math.nan)}, "old_logprobs is nan at row"),
        ({"kl_coef": 0.1}, {"ref_logprobs": None}, r"kl_coef = 0.1 needs ref_logprobs"),
        (
            {"rollout_correction": "token_mask"},
            {"rollout_logprobs": None},
            "needs rollout_logprobs",
        ),
        ({"loss_type": "dr_grpo"}, {"max_completion_tokens": None}, "needs max_completion_tokens"),
        ({}, {"normaliser": 0.0}, "normaliser must be above 0 and finite, got 0.0"),
        ({}, {"num_sequences": 0}, "num_sequences must be above 0 and finite, got 0"),
    ],
)
def test_batches_that_do_not_fit(options, changes, message):
    with pytest.raises(ValueError, match=message):
        run(PolicyLossOptions(**options), **changes)


def test_other_bad_input():
    x, ones = torch.zeros(4), torch.ones(4)
    o = PolicyLossOptions(loss_type="dapo")
    with pytest.raises(ValueError, match="the mask is empty: no completion token among 4 rows"):
        policy_loss(x, ones, torch.zeros(4, dtype=torch.bool), o)
    with pytest.raises(ValueError, match=r"completion_mask must be bool, got torch\.float32"):
        policy_loss(x, ones, ones, o)
    with pytest.raises(
        ValueError, match=r"advantages must be \(T,\) = \(4,\), got \(3,\); .*cu_se"
    ):
        policy_loss(x, torch.ones(3), None, o)
    with pytest.raises(ValueError, match=r"logprobs must be \(T,\), got \(2, 2\)"):
        policy_loss(torch.zeros(2, 2), ones, None, o)
    with pytest.raises(ValueError, match=r"need entropy \(T,\)"):
        policy_loss(x, ones, None, PolicyLossOptions(loss_type="dapo", entropy_coef=1.0))
    with pytest.raises(
        ValueError, match="backend must be one of auto, triton, torch, native, fast"
    ):
        policy_loss(x, ones, None, o, backend="cuda")
