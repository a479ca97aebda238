"""The fused loss: equal to the materialised one, for every loss type, chunking and back end."""

import math

import numerics
import pytest
import torch
from test_policy_loss import KLS, POLICIES

from r1fast.kernels import cpu_head, vocab_head
from r1fast.kernels.fused_grpo_loss import fused_grpo_loss, fused_grpo_loss_ref
from r1fast.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from r1fast.kernels.vocab_head import VocabHead

T, D, V = 23, 16, 131
CU = torch.tensor([0, 5, 5, 12, 20, 23])
EXTRAS = [
    {"kl_coef": 0.2, "kl_in": "reward"},
    {"entropy_coef": 0.1},
    {"entropy_coef": 0.1, "top_entropy_quantile": 0.4},
    {"off_policy_mask_threshold": 0.02},
    {"rollout_correction": "sequence_truncate", "rollout_clip_max": 1.1},
    {"rollout_correction": "token_mask", "rollout_clip_min": 0.9, "rollout_clip_max": 1.1},
]
BACKENDS = [
    pytest.param("torch", torch.float64, id="torch-float64"),
    pytest.param("torch", torch.float32, id="torch-float32"),
    pytest.param("native", torch.float32, id="native-float32", marks=pytest.mark.skipif(
        not cpu_head.supported(torch.float32), reason="needs AVX2")),
    pytest.param("triton", torch.float32, id="triton-float32"),
]  # fmt: skip


def make_inputs(dtype=torch.float64, *, seed=0, spread=0.3, T=T, V=V, D=D):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = normal(T, D), normal(V, D) / 2, normal(V)
    target_ids = torch.randint(V, (T,), generator=g)
    logprobs = linear_logprobs_ref(hidden, weight, target_ids, bias=bias)
    mask = torch.rand(T, generator=g) > 0.25
    old = logprobs + spread * normal(T)
    tensors = {
        "old_logprobs": old,
        "ref_logprobs": logprobs + 0.4 * normal(T),
        "rollout_logprobs": old + 0.1 * normal(T),
    }
    for x in tensors.values():
        x[~mask] = torch.nan
    hidden[~mask] = torch.nan
    target_ids[~mask] = 10**9
    return {
        "hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype),
        "target_ids": target_ids, "completion_mask": mask,
        "advantages": torch.tensor([1.0, 0.0, -1.0, 0.0, -0.5], dtype=torch.float64),
        "cu_seqlens": CU, "max_completion_tokens": 20, **tensors,
    }  # fmt: skip


def run(op, inputs, upstream=3.0, **options):
    """(loss, dhidden, dweight, dbias, metrics), on the CPU; where there is a GPU, Triton's were made there."""
    where = numerics.device_of(options.get("backend"))
    inputs = {n: x.to(where) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    leaves = [inputs.pop(n).detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    loss, metrics = op(
        leaves[0], leaves[1], inputs.pop("target_ids"), inputs.pop("advantages"),
        inputs.pop("completion_mask"), bias=leaves[2], **inputs, **options,
    )  # fmt: skip
    (upstream * loss).backward()
    metrics = {n: x.cpu() for n, x in metrics.items()}
    return [loss.detach().cpu(), *(x.grad.cpu() for x in leaves), metrics]


def assert_equal(actual, exact, tolerance, what=""):
    assert actual[0] == pytest.approx(float(exact[0]), rel=tolerance, abs=tolerance), what
    for name, a, e in zip(("dhidden", "dweight", "dbias"), actual[1:4], exact[1:4], strict=True):
        error = float((a.double() - e.nan_to_num(0)).norm())
        assert error <= tolerance * (float(e.nan_to_num(0).norm()) + 1e-3), (what, name, error)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_loss_is_the_materialised_one(policy, backend, dtype):
    inputs = make_inputs()
    here = {**inputs, **{n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}}
    combinations = [*KLS[:5], *EXTRAS]
    if backend == "triton":  # the interpreter is slow, and the loss is the same table
        combinations = combinations[3:8:2]
    for n, extra in enumerate(combinations):
        old = {"old_logprobs": None} if n % 3 == 2 else {}
        exact = run(fused_grpo_loss_ref, inputs | old, **policy, **extra)
        for workspace_bytes in (None, V * 8 * 6):
            actual = run(
                fused_grpo_loss, here | old, backend=backend, workspace_bytes=workspace_bytes,
                **policy, **extra,
            )  # fmt: skip
            tolerance = 1e-11 if dtype == torch.float64 else 2e-5
            assert_equal(actual, exact, tolerance, (extra, workspace_bytes))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("extra", [{"kl_coef": 0.2}, *EXTRAS[:2], {"loss_type": "gspo"}], ids=str)
def test_log_probabilities_from_elsewhere(extra, backend, dtype):
    """The loss is taken at `policy_logprobs`; the gradient goes on from there, and `want` is of `hidden`."""
    inputs = make_inputs()
    here = {**inputs, **{n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}}
    elsewhere = {"policy_logprobs": inputs["old_logprobs"] + 0.05}
    exact = run(fused_grpo_loss_ref, inputs | elsewhere, **extra)
    assert float(exact[0]) != pytest.approx(float(run(fused_grpo_loss_ref, inputs, **extra)[0]))
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for workspace_bytes in (None, V * 8 * 6):
        options = {"backend": backend, "workspace_bytes": workspace_bytes, **extra}
        actual = run(fused_grpo_loss, here | elsewhere, want="logprobs", **options)
        assert_equal(actual, exact, tolerance, workspace_bytes)
        own = run(fused_grpo_loss, here, want="logprobs", **options)[4]["logprobs"]
        assert torch.equal(actual[4]["logprobs"], own)


@pytest.mark.parametrize("options", [
    {"temperature": 0.7}, {"temperature": 1.5, "softcap": 3.0}, {"softcap": 2.0},
    {"softcap": 2.0, "entropy_coef": 0.3, "temperature": 0.7},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_temperature_and_softcap(options, backend, dtype):
    inputs = make_inputs()
    exact = run(fused_grpo_loss_ref, inputs, **options)
    here = {**inputs, **{n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}}
    for workspace_bytes in (None, V * 8 * 6):
        actual = run(
            fused_grpo_loss, here, backend=backend, workspace_bytes=workspace_bytes, **options
        )
        assert_equal(actual, exact, 1e-11 if dtype == torch.float64 else 2e-5)


def bfloat16_error(inputs, **options):
    """Relative error of the gradients: of the op, and of float32 logits with bfloat16 dlogits."""
    half = {n: inputs[n].bfloat16() for n in ("hidden", "weight", "bias")}
    inputs = inputs | {"old_logprobs": None, "advantages": torch.tensor([1.0, 0, -1, 0.5, -2])}
    double = {n: x.double() for n, x in half.items()}
    exact = run(fused_grpo_loss_ref, inputs | double, upstream=1.0)
    actual = run(fused_grpo_loss, inputs | half, upstream=1.0, **options)

    # the usual way: float32 logits, their gradient rounded to bfloat16, two bfloat16 products
    wide = {n: x.float().requires_grad_() for n, x in half.items()}
    m = inputs["completion_mask"]
    logits = wide["hidden"][m] @ wide["weight"].T + wide["bias"]
    logits.retain_grad()
    eye = torch.eye(V)
    loss, _ = fused_grpo_loss_ref(
        logits, eye, inputs["target_ids"][m], inputs["advantages"][_sequence_of(m)], None,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), m.cumsum(0)])[CU],
    )  # fmt: skip
    loss.backward()
    dz = logits.grad.bfloat16().double()
    h = half["hidden"][m].double()
    usual = [torch.zeros(T, D, dtype=torch.float64), (dz.T @ h).bfloat16().double()]
    usual[0][m] = (dz @ half["weight"].double()).bfloat16().double()

    def error(a, e):
        return float((a.double() - e.nan_to_num(0)).norm() / e.nan_to_num(0).norm())

    return [(error(actual[n], exact[n]), error(usual[n - 1], exact[n])) for n in (1, 2)]


def _sequence_of(mask):
    return torch.repeat_interleave(torch.arange(len(CU) - 1), CU.diff())[mask]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_bfloat16_gradients_are_as_good_as_float32_logits(backend):
    if backend == "native" and not cpu_head.supported(torch.bfloat16):
        pytest.skip("needs AVX2")
    errors = [bfloat16_error(make_inputs(seed=n), backend=backend) for n in range(12)]
    mean = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
    # dweight takes two roundings, of E and of v X, where the usual way has one: sqrt(2) in all
    for (mine, usual), slack in zip(mean.tolist(), (1.1, 1.5), strict=True):
        assert mine <= slack * usual


def test_rows_that_do_not_count_cost_nothing_and_get_zeros(monkeypatch):
    inputs = make_inputs()
    computed = []
    forward = VocabHead.forward

    def counted(self, rows, *args, **kwargs):
        computed.append(rows.stop - rows.start)
        return forward(self, rows, *args, **kwargs)

    monkeypatch.setattr(VocabHead, "forward", counted)
    m = inputs["completion_mask"]
    live = m & (inputs["advantages"][_sequence_of(slice(None))] != 0)
    wide = {"clip_eps_low": 10.0, "clip_eps_high": 10.0}
    _, dhidden, _, _, metrics = run(fused_grpo_loss, inputs, **wide)
    assert sum(computed) == metrics["num_evaluated"] == int(live.sum()) < int(m.sum())
    assert metrics["num_tokens"] == int(m.sum())
    assert (dhidden[~live] == 0).all()
    assert (dhidden[live] != 0).any(1).all()
    # a KL gives every completion token a gradient; `want` asks for all of them
    for options in ({"kl_coef": 0.1}, {"want": ("logprobs",)}):
        computed.clear()
        metrics = run(fused_grpo_loss, inputs, **options)[-1]
        assert sum(computed) == metrics["num_evaluated"] == int(m.sum())


def test_nothing_has_signal():
    inputs = make_inputs() | {"advantages": torch.zeros(5, dtype=torch.float64)}
    for options in ({}, {"loss_type": "gspo"}, {"want": ("logprobs", "entropy")}):
        loss, *gradients, metrics = run(fused_grpo_loss, inputs, **options)
        assert loss == 0
        assert all((g == 0).all() for g in gradients)
        assert metrics["ratio"].isfinite()


def test_wanted_rows():
    inputs = make_inputs()
    m = inputs["completion_mask"]
    metrics = run(fused_grpo_loss, inputs, want=("logprobs", "entropy"))[-1]
    exact = linear_logprobs_ref(
        inputs["hidden"][m], inputs["weight"], inputs["target_ids"][m], bias=inputs["bias"],
        return_entropy=True,
    )  # fmt: skip
    for name, e in zip(("logprobs", "entropy"), exact, strict=True):
        torch.testing.assert_close(metrics[name][m], e)
        assert (metrics[name][~m] == 0).all()


def test_the_number_of_chunks_changes_nothing():
    inputs = make_inputs(torch.float32)
    whole = run(fused_grpo_loss, inputs, kl_coef=0.1)
    for rows in (1, 3, 7, 100):
        part = run(fused_grpo_loss, inputs, kl_coef=0.1, workspace_bytes=rows * V * 4)
        assert_equal(part, [x.double() for x in whole[:4]], 1e-5)


def test_exponentials_stay_under_an_eighth_of_the_logits(monkeypatch):
    sizes = []
    forward = VocabHead.forward
    monkeypatch.setattr(VocabHead, "forward", lambda self, rows, *a, **k: (
        sizes.append(self.bytes_of(rows.stop - rows.start)), forward(self, rows, *a, **k))[1])  # fmt: skip
    g = torch.Generator().manual_seed(0)
    n = 2048
    hidden, weight = torch.randn(n, 8, generator=g), torch.randn(8000, 8, generator=g)
    loss, _ = fused_grpo_loss(
        hidden.requires_grad_(), weight.requires_grad_(), torch.randint(8000, (n,), generator=g),
        torch.randn(n, generator=g), loss_type="dapo",
    )  # fmt: skip
    loss.backward()
    assert max(sizes) <= n * 8000 * 4 / 8


def test_a_wrong_anchor_is_noticed_and_mended():
    """An old log-probability far from the new one: exp(z - c) overflows or vanishes, then is redone."""
    inputs = make_inputs(torch.float32)
    m = inputs["completion_mask"]
    for gap in (-300.0, -60.0, 60.0):
        old = inputs["old_logprobs"].clone()
        old[m.nonzero()[::3, 0]] += gap
        changed = inputs | {"old_logprobs": old, "advantages": torch.tensor([1.0, 2, -1, 1, -2])}
        double = {n: changed[n].double() for n in ("hidden", "weight", "bias")}
        exact = run(fused_grpo_loss_ref, changed | double, loss_type="cispo")
        actual = run(fused_grpo_loss, changed, loss_type="cispo")
        assert_equal(actual, exact, 2e-5, gap)


@pytest.fixture
def deferred(monkeypatch):
    """As on a GPU: chunks are asked once, at the end, whether their anchors were good."""
    monkeypatch.setattr(vocab_head, "DEFERS", {"cpu", "cuda"})
    heads, init = [], VocabHead.__init__

    def noted(self, *args, **kwargs):
        heads.append(kwargs["deferred"])
        init(self, *args, **kwargs)

    monkeypatch.setattr(VocabHead, "__init__", noted)
    return heads


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:])
@pytest.mark.parametrize("gap", [0.0, -300.0])
@pytest.mark.parametrize("extra", [{}, {"entropy_coef": 0.1}], ids=str)
def test_chunks_that_do_not_wait(extra, gap, backend, dtype, deferred):
    """Computed once where the anchors are good, and again, with waiting, where one is far off."""
    inputs, options = make_inputs(), {"loss_type": "cispo", **extra}
    row = int((inputs["completion_mask"] & (_sequence_of(slice(None)) == 2)).nonzero()[1])
    inputs["old_logprobs"][row] += gap
    exact = run(fused_grpo_loss_ref, inputs, **options)
    here = {**inputs, **{n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}}
    actual = run(fused_grpo_loss, here, backend=backend, workspace_bytes=V * 8 * 6, **options)
    assert_equal(actual, exact, 2e-5)
    assert deferred == [True, False][: 2 if gap else 1]


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:])
def test_an_error_is_found_without_waiting_for_it(backend, dtype, deferred):
    inputs = make_inputs()
    here = {**inputs, **{n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}}
    row = int(inputs["completion_mask"].nonzero()[2])
    here["hidden"][row, 1] = math.nan
    with pytest.raises(ValueError, match=f"hidden holds NaN or Inf in row {row};"):
        run(fused_grpo_loss, here, backend=backend, loss_type="dapo", kl_coef=0.1)
    assert deferred == [True, False]


@pytest.mark.parametrize("factor", [1.0, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_by_a_factor_on_the_device(factor, dtype, device):
    from r1fast.kernels.triton_rows import scale_

    x = torch.randn(3, 5000, device=device).to(dtype)
    expected = (x.double() * factor).to(dtype)
    scale_(x, torch.tensor(factor, device=device))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("case", ["peaked", "large", "negative"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[1:])
def test_hard_logits(case, backend, dtype):
    inputs = make_inputs()
    logits = inputs["hidden"] @ inputs["weight"].T
    scale = {"peaked": 80, "large": 200, "negative": 1}[case]
    inputs["weight"] *= scale / float(logits.nan_to_num(0).abs().max())
    if case == "negative":
        inputs["bias"] -= 190.0
    if case == "peaked":
        z = (inputs["hidden"] @ inputs["weight"].T + inputs["bias"]).nan_to_num(0)
        inputs["target_ids"] = z.argmax(1)
        assert (torch.softmax(z, 1).amax(1) > 1 - 1e-6).any()
    inputs["old_logprobs"] = inputs["ref_logprobs"] = inputs["rollout_logprobs"] = None
    rounded = {n: inputs[n].to(dtype) for n in ("hidden", "weight", "bias")}
    exact = run(fused_grpo_loss_ref, inputs | {n: x.double() for n, x in rounded.items()})
    actual = run(fused_grpo_loss, inputs | rounded, backend=backend)
    # a float32 logit of 200 is known to 2e-5, and so is its probability
    assert_equal(actual, exact, 2e-5 * max(1, scale / 10))


def test_frozen_weight_and_gradients_in_float32():
    inputs = make_inputs()
    half = {n: inputs[n].bfloat16() for n in ("hidden", "weight")}
    args = (inputs["target_ids"], inputs["advantages"], inputs["completion_mask"])
    hidden = half["hidden"].clone().requires_grad_()
    loss, _ = fused_grpo_loss(hidden, half["weight"], *args, cu_seqlens=CU)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    weights = [half["weight"].clone().requires_grad_() for _ in range(2)]
    weights[1].grad_dtype = torch.float32
    for weight in weights:
        loss, _ = fused_grpo_loss(half["hidden"], weight, *args, cu_seqlens=CU)
        loss.backward()
    assert [w.grad.dtype for w in weights] == [torch.bfloat16, torch.float32]
    assert torch.equal(weights[1].grad.bfloat16(), weights[0].grad)
    with torch.no_grad():
        again, _ = fused_grpo_loss(half["hidden"], half["weight"], *args, cu_seqlens=CU)
    assert again == loss


def test_tied_embeddings_get_both_gradients():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(V, D, generator=g, dtype=torch.float64)
    ids, y = torch.randint(V, (9,), generator=g), torch.randint(V, (9,), generator=g)
    A = torch.randn(9, generator=g, dtype=torch.float64)
    grads = []
    for op in (fused_grpo_loss, fused_grpo_loss_ref):
        tied = table.clone().requires_grad_()
        op(tied[ids] * 2, tied, y, A, loss_type="dapo")[0].backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


def test_strided_hidden_and_transposed_weight():
    inputs = make_inputs(torch.float32)
    expected = run(fused_grpo_loss, inputs)
    hidden = torch.stack((inputs["hidden"], inputs["hidden"]), 1)[:, 0]
    weight = inputs["weight"].t().contiguous().t()
    args = (inputs["target_ids"], inputs["advantages"], inputs["completion_mask"])
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    assert not leaves[0].is_contiguous()
    assert not leaves[1].is_contiguous()
    loss, _ = fused_grpo_loss(
        *leaves,
        *args,
        bias=inputs["bias"],
        cu_seqlens=CU,
        old_logprobs=inputs["old_logprobs"],
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(expected[0]), rel=1e-6)
    torch.testing.assert_close(leaves[1].grad * 3, expected[2], rtol=1e-5, atol=1e-7)


def test_runs_repeat_bit_for_bit_and_rows_do_not_touch_their_neighbours():
    inputs = make_inputs(torch.float32)
    one, two = run(fused_grpo_loss, inputs), run(fused_grpo_loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    last = inputs["hidden"].clone()
    last[12:] *= -3.0
    changed = run(fused_grpo_loss, inputs | {"hidden": last})
    assert torch.equal(changed[1][:12], one[1][:12])


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_one_sequence_of_70_000_tokens(loss_type):
    """Longer than 16 bits count and than a chunk: gspo needs all of it before its first gradient."""
    g = torch.Generator().manual_seed(0)
    n = 70_000
    hidden = torch.randn(n, 8, generator=g)
    weight, y = torch.randn(40, 8, generator=g), torch.randint(40, (n,), generator=g)
    old = linear_logprobs_ref(hidden, weight, y) + 0.1 * torch.randn(n, generator=g)
    options = {
        "cu_seqlens": torch.tensor([0, n]),
        "old_logprobs": old,
        "loss_type": loss_type,
    }
    results = []
    float32, float64 = torch.float32, torch.float64
    ops = (fused_grpo_loss, float32), (fused_grpo_loss_ref, float32), (fused_grpo_loss_ref, float64)
    for op, dtype in ops:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss, _ = op(*leaves, y, torch.tensor([1.5]), **options)
        loss.backward()
        results.append((loss.item(), leaves[0].grad.double(), leaves[1].grad.double()))
    (loss, dh, dw), (_, dh_plain, dw_plain), (exact, dh_exact, dw_exact) = results
    assert loss == pytest.approx(exact, rel=1e-5)
    for name, actual, plain, wanted in (
        ("dhidden", dh, dh_plain, dh_exact),
        ("dweight", dw, dw_plain, dw_exact),
    ):
        error, baseline = (float((x - wanted).norm() / wanted.norm()) for x in (actual, plain))
        # where sums are not ours they are PyTorch's: no worse than its own, twice
        bound = 1e-5 if cpu_head.supported(torch.float32) else 2 * baseline
        assert error <= bound, (name, error, baseline)


def test_the_row_of_an_error_is_the_callers():
    inputs = make_inputs()
    inputs["completion_mask"][:] = True
    inputs["hidden"] = torch.ones(T, D, dtype=torch.float64)
    inputs["old_logprobs"] = inputs["ref_logprobs"] = inputs["rollout_logprobs"] = None
    inputs["hidden"][9] = torch.nan  # of the third sequence
    with pytest.raises(ValueError, match="NaN or Inf in row 9"):
        run(fused_grpo_loss, inputs | {"target_ids": torch.zeros(T, dtype=torch.int64)})


def test_weights_that_are_not_leaves():
    """A slice, a cast and an expanded weight: what padded vocabularies and master weights give."""
    g = torch.Generator().manual_seed(0)
    y, A = torch.randint(30, (9,), generator=g), torch.randn(9, generator=g)
    for change in (lambda w: w[:40], lambda w: w * 2, lambda w: w[:1].expand(40, -1)):
        grads = []
        for op in (fused_grpo_loss, fused_grpo_loss_ref):
            leaf = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
            (0.3 * op(hidden, change(leaf), y, A, loss_type="dapo")[0]).backward()
            grads.append((leaf.grad, hidden.grad))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    master = torch.randn(40, 8, generator=g).requires_grad_()
    hidden = torch.randn(9, 8, generator=g).bfloat16()
    fused_grpo_loss(hidden, master.bfloat16(), y, A, loss_type="dapo")[0].backward()
    assert master.grad.dtype == torch.float32


def test_float16_and_a_loss_scale():
    """exp(z - c) of an unlikely target is beyond float16; so are gradients until they are scaled."""
    hidden = torch.tensor([[4.0, 0], [20.0, 0]]).half().requires_grad_()
    weight = torch.tensor([[5.0, 0], [0, 0], [1, 1]]).half().requires_grad_()
    y, A = torch.tensor([1, 1]), torch.tensor([1.0, -1.0])
    loss, _ = fused_grpo_loss(hidden, weight, y, A, loss_type="dapo")
    (loss * 1024).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (fused_grpo_loss_ref(*exact, y, A, loss_type="dapo")[0] * 1024).backward()
    for a, e in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=2e-3, atol=2.0)


def test_no_grad_makes_no_gradient(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setattr(VocabHead, "backward", None)
    monkeypatch.setattr(VocabHead, "_new_dhidden", None)
    leaves = [inputs[n].requires_grad_() for n in ("hidden", "weight")]
    with torch.no_grad():
        loss, _ = fused_grpo_loss(
            *leaves, inputs["target_ids"], inputs["advantages"], inputs["completion_mask"],
            cu_seqlens=CU,
        )  # fmt: skip
    assert loss.isfinite()


@pytest.mark.parametrize("backend", ["auto", "torch", "fast"])
def test_bfloat16_modes(backend):
    """Exact wherever it runs; fast has the error of PyTorch's own bfloat16 logits."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=g).bfloat16()
    weight = (torch.randn(3000, 64, generator=g) * 0.8).bfloat16()
    y = torch.randint(3000, (200,), generator=g)
    exact = linear_logprobs_ref(hidden.double(), weight.double(), y)
    usual = (linear_logprobs_ref(hidden, weight, y) - exact).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        metrics = fused_grpo_loss(
            hidden, weight, y, torch.ones(200), loss_type="dapo", backend=backend, want="logprobs"
        )[1]
    error = (metrics["logprobs"] - exact).abs().max()
    assert error <= (1.2 * usual if backend == "fast" else 5e-5)


def test_backward_twice_says_why():
    inputs = make_inputs()
    hidden = inputs["hidden"].clone().requires_grad_()
    loss, _ = fused_grpo_loss(
        hidden, inputs["weight"], inputs["target_ids"], inputs["advantages"],
        inputs["completion_mask"], cu_seqlens=CU,
    )  # fmt: skip
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time: its gradients were handed over"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(T, 15, dtype=torch.float64)}, r"need hidden \(T, D\) and weight"),
        ({"target_ids": torch.zeros(22, dtype=torch.int64)}, "one target per row"),
        ({"target_ids": torch.full((T,), V)}, r"target_ids must be in \[0, 131\)"),
        ({"target_ids": torch.full((T,), -100)}, r"got values from -100"),
        ({"hidden": torch.full((T, D), torch.nan, dtype=torch.float64)}, "NaN or Inf in row"),
        ({"hidden": torch.ones(T, D)}, "hidden is torch.float32, weight is torch.float64"),
        ({"completion_mask": torch.zeros(T, dtype=torch.bool)}, "the mask is empty"),
        ({"completion_mask": torch.ones(T)}, "completion_mask must be bool"),
        ({"advantages": torch.ones(4)}, r"advantages must be .* or \(S,\) = \(5,\), got \(4,\)"),
        ({"advantages": torch.full((5,), math.inf)}, "advantages is inf at row"),
        ({"loss_type": "reinforce"}, "loss_type must be one of grpo"),
        ({"want": ("perplexity",)}, "want knows logprobs, entropy, got perplexity"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"softcap": 0.0}, "softcap must be above 0 or None"),
        ({"workspace_bytes": -1}, "workspace_bytes must be at least 0"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch, native, fast"),
        (
            {"cu_seqlens": torch.tensor([0.0, 23.0])},
            r"cu_seqlens must be integers, got torch\.float32",
        ),
        ({"advantages": [1.0] * 5}, "advantages must be a tensor, got list"),
        ({"old_logprobs": torch.zeros(T, device="meta")}, "old_logprobs is on meta"),
        ({"rollout_clip_min": 3.0}, r"rollout_clip_min = 3\.0 is above rollout_clip_max = 2\.0"),
        ({"kl_coef": math.inf}, "kl_coef must be finite"),
        ({"bias": torch.ones(V, dtype=torch.complex64)}, "bias must be"),
        ({"weight": torch.full((V, D), torch.nan, dtype=torch.float64)}, "weight holds NaN or Inf"),
        ({"weight": torch.ones(0, D, dtype=torch.float64)}, "weight must not be empty"),
        ({"weight": torch.ones(V, D, dtype=torch.float64, device="meta")}, "on one device"),
        ({"backend": "native"}, "native needs a CPU tensor of float32"),
    ],
)
def test_bad_input(change, message):
    inputs = {k: v for k, v in make_inputs().items() if k != "bias"} | change
    names = ("hidden", "weight", "target_ids", "advantages", "completion_mask")
    with pytest.raises(ValueError, match=message):
        fused_grpo_loss(*[inputs.pop(n) for n in names], **{"bias": None, **inputs})


def test_a_loss_that_is_scaled_is_rounded_once():
    """Divided by 3, as over micro-batches: dweight meets the factor before it is bfloat16."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=g) for n in (64, 2000))
    y = torch.randint(2000, (64,), generator=g)
    x = [t.bfloat16() / 4 for t in (hidden, weight)]

    def dweight(scale, dtype):
        h, w = (t.to(dtype).clone().requires_grad_() for t in x)
        A = torch.ones(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        loss = fused_grpo_loss(h, w, y, A, loss_type="dapo")[0]
        (loss * scale).backward()
        return w.grad.double()

    errors = []
    for scale in (1.0, 1 / 3):
        exact = dweight(scale, torch.float64)
        errors.append((dweight(scale, torch.bfloat16) - exact).norm() / exact.norm())
    assert errors[1] <= 1.05 * errors[0], errors


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_an_impossible_target_is_an_error(loss_type):
    hidden, weight, y = torch.randn(4, 8), torch.randn(20, 8), torch.arange(4)
    bias = torch.zeros(20)
    bias[2] = -math.inf
    with pytest.raises(ValueError, match="row 2: its target has probability 0"):
        fused_grpo_loss(hidden, weight, y, torch.ones(4), bias=bias, loss_type=loss_type)
    bias = bias.roll(10)  # no target there: nothing is wrong
    loss, _ = fused_grpo_loss(
        hidden, weight, y, torch.ones(4), bias=bias, loss_type=loss_type, entropy_coef=0.1
    )
    assert loss.isfinite()
    logprobs, entropy = linear_logprobs(hidden, weight, y, bias=bias.roll(-10), return_entropy=True)
    assert logprobs[2] == -math.inf
    assert entropy.isfinite().all()


@pytest.mark.parametrize("name", ["hidden", "weight", "target_ids", "completion_mask"])
def test_what_is_no_tensor_is_named(name):
    inputs = {
        "hidden": torch.randn(2, 4),
        "weight": torch.randn(9, 4),
        "target_ids": torch.tensor([1, 2]),
        "completion_mask": None,
    }
    inputs[name] = [1.0, 2.0]
    with pytest.raises(ValueError, match=f"{name} must be a tensor, got list"):
        fused_grpo_loss(**inputs, advantages=torch.ones(2), loss_type="dapo")
