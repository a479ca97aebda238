import math

import pytest
import torch
from numerics import assert_accurate, device_of

from r1fast.kernels import cpu_head
from r1fast.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref
from r1fast.kernels.vocab_head import VocabHead

NEEDS = ("hidden", "weight", "bias")
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(
        not cpu_head.supported(torch.float32), reason="needs AVX2")),
    "triton",
]  # fmt: skip


def make_inputs(T=9, D=24, V=131, *, scale=1.0, shift=0.0, seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(T, D, generator=g, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=g, dtype=torch.float64) * scale / math.sqrt(D),
        "bias": torch.randn(V, generator=g, dtype=torch.float64) + shift,
        "target_ids": torch.randint(V, (T,), generator=g),
    }


def run(op, inputs, dtype, *, entropy_grad=True, **kwargs) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a loss that weighs every row differently."""
    where = device_of(kwargs.get("backend"))
    leaves = {n: inputs[n].clone().to(where, dtype).detach().requires_grad_() for n in NEEDS}
    hidden, weight = leaves["hidden"], leaves["weight"]
    logprobs, entropy = op(
        hidden,
        weight,
        inputs["target_ids"].to(where),
        bias=leaves["bias"],
        return_entropy=True,
        **kwargs,
    )
    g = torch.Generator().manual_seed(7)
    u = torch.randn(2, len(logprobs), generator=g, dtype=torch.float64).to(logprobs)
    loss = (logprobs * u[0]).sum()
    if entropy_grad:
        loss = loss + (entropy * u[1]).sum()
    loss.backward()
    result = {"logprobs": logprobs.detach(), "entropy": entropy.detach()}
    result |= {f"d{n}": leaf.grad for n, leaf in leaves.items()}
    return {n: x.cpu() for n, x in result.items()}


def check(inputs, dtype=torch.float32, *, slack=2.0, floor=4e-6, **kwargs):
    chunk = {name: kwargs.pop(name) for name in ("workspace_bytes", "backend") if name in kwargs}
    exact = run(linear_logprobs_ref, inputs, torch.float64, **kwargs)
    baseline = run(linear_logprobs_ref, inputs, dtype, **kwargs)
    actual = run(linear_logprobs, inputs, dtype, **kwargs, **chunk)
    assert set(actual) == set(exact)
    for name in exact:
        assert_accurate(name, actual[name], baseline[name], exact[name], slack=slack, floor=floor)
    return actual


@pytest.mark.parametrize("rows", [0, 4, 7, 9])  # whose exponentials may be kept
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_accurate_at_every_chunk_size_and_temperature(rows, temperature):
    check(make_inputs(), workspace_bytes=rows * 131 * 4, temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [4, 100])
def test_accurate_on_every_back_end(backend, softcap, rows):
    options = {"backend": backend, "workspace_bytes": rows * 131 * 4}
    check(make_inputs(), softcap=softcap, temperature=0.7, **options)
    check(make_inputs(), softcap=softcap, entropy_grad=False, **options)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("V", [1, 2, 127, 131])
def test_odd_shapes(T, V):
    check(make_inputs(T=T, D=17, V=V), workspace_bytes=V * 16 * 4)


@pytest.mark.parametrize("case", ["peaked", "all negative", "large"])
def test_hard_rows(case):
    scale, shift = {"peaked": (30, 0), "all negative": (1, -150), "large": (60, 0)}[case]
    inputs = make_inputs(scale=scale, shift=shift)
    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    # a float32 logit is known to eps |z|, and so is log p; which rounding a GEMM has is luck
    floor = max(4e-6, 2 * 2**-23 * float(logits.abs().max()))
    if case == "peaked":  # targets the model is sure of: p > 1 - 1e-6
        inputs["target_ids"] = logits.argmax(1)
        assert (torch.log_softmax(logits, 1).amax(1) > -1e-6).any()
    actual = check(inputs, floor=floor)
    assert all(x.isfinite().all() for x in actual.values())
    check(inputs, floor=floor, workspace_bytes=1200)


def test_chunks_change_nothing():
    inputs = make_inputs(T=33)
    whole = run(linear_logprobs, inputs, torch.float32)
    parts = run(linear_logprobs, inputs, torch.float32, workspace_bytes=131 * 5 * 4)
    for name, x in whole.items():
        torch.testing.assert_close(parts[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_bfloat16_logprobs_are_float32():
    inputs = make_inputs(T=64, D=64)
    half = {k: v.to(torch.bfloat16) if k != "target_ids" else v for k, v in inputs.items()}
    for rows in (100, 10):
        actual = check(half, torch.bfloat16, workspace_bytes=131 * 2 * rows)
        assert actual["logprobs"].dtype == actual["entropy"].dtype == torch.float32
        assert actual["dweight"].dtype == torch.bfloat16


def test_by_hand():
    # two tokens with logits 0 and log 3: p = 1/4, 3/4
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0]), return_entropy=True)
    assert logprobs.item() == pytest.approx(math.log(1 / 4))
    assert entropy.item() == pytest.approx(-(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4)
    # at temperature 1/2 the odds are squared
    half = linear_logprobs(hidden, weight, torch.tensor([0]), temperature=0.5)
    assert half.item() == pytest.approx(math.log(1 / 10))


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_gradients_are_the_derivative(entropy_grad):
    """A kernel and its reference may share a mistake; finite differences do not."""
    inputs = make_inputs(T=3, D=4, V=5)
    leaves = [inputs[n].requires_grad_() for n in NEEDS]

    def op(hidden, weight, bias):
        logprobs, entropy = linear_logprobs(
            hidden,
            weight,
            inputs["target_ids"],
            bias=bias,
            temperature=0.7,
            return_entropy=True,
            workspace_bytes=80,
        )
        return (logprobs, entropy) if entropy_grad else logprobs

    assert torch.autograd.gradcheck(op, leaves)


def test_entropy_alone_has_a_gradient():
    inputs = make_inputs()
    grads = []
    for op in (linear_logprobs, linear_logprobs_ref):
        hidden = inputs["hidden"].clone().requires_grad_()
        _, entropy = op(hidden, inputs["weight"], inputs["target_ids"], return_entropy=True)
        entropy.sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


def test_backward_may_run_twice():
    inputs = make_inputs()
    hidden = inputs["hidden"].clone().requires_grad_()
    for budget in (None, 131 * 8 * 4):
        hidden.grad = None
        logprobs = linear_logprobs(
            hidden, inputs["weight"], inputs["target_ids"], workspace_bytes=budget
        )
        logprobs.sum().backward(retain_graph=True)
        once = hidden.grad.clone()
        logprobs.sum().backward()
        torch.testing.assert_close(hidden.grad, 2 * once)


def test_frozen_parts_get_no_gradient_and_tied_parts_get_both():
    inputs = make_inputs()
    hidden, weight = inputs["hidden"].clone().requires_grad_(), inputs["weight"]
    linear_logprobs(hidden, weight, inputs["target_ids"]).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None

    y = torch.arange(9)
    grads = []
    for op in (linear_logprobs, linear_logprobs_ref):
        tied = inputs["weight"].clone().requires_grad_()
        op(tied[:9] * 2, tied, y).sum().backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


def test_no_rows():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = linear_logprobs(hidden, weight, y, return_entropy=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8)
    assert linear_logprobs(hidden, weight, y).shape == (0,)


def test_a_row_does_not_depend_on_its_neighbours_and_runs_repeat():
    inputs = make_inputs(T=20)
    one = run(linear_logprobs, inputs, torch.float32)
    two = run(linear_logprobs, inputs, torch.float32)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = {**inputs, "hidden": inputs["hidden"].clone()}
    other["hidden"][10:] = 5.0
    changed = run(linear_logprobs, other, torch.float32)
    torch.testing.assert_close(changed["logprobs"][:10], one["logprobs"][:10], rtol=0, atol=1e-6)


def test_transposed_weight_and_strided_hidden():
    inputs = make_inputs(T=6)
    hidden = torch.stack((inputs["hidden"], inputs["hidden"]), 1)[:, 0]
    weight = inputs["weight"].t().contiguous().t()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    expected = run(linear_logprobs, inputs, torch.float32)
    actual = run(linear_logprobs, {**inputs, "hidden": hidden, "weight": weight}, torch.float32)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(9, 23)}, r"need hidden \(T, D\) and weight \(V, D\).*\(9, 23\)"),
        ({"hidden": torch.ones(9)}, r"need hidden \(T, D\)"),
        ({"target_ids": torch.zeros(8, dtype=torch.int64)}, "one target per row"),
        ({"hidden": torch.ones(9, 24, dtype=torch.bfloat16)}, "hidden is torch.bfloat16"),
        ({"target_ids": torch.full((9,), 131)}, r"in \[0, 131\), got values from 131 to 131"),
        ({"target_ids": torch.full((9,), -100)}, r"in \[0, 131\), got values from -100"),
        ({"target_ids": torch.zeros(9, dtype=torch.int32)}, "target_ids must be int64"),
        ({"bias": torch.ones(130)}, r"need bias \(V,\) = \(131,\), got \(130,\)"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
        ({"softcap": -1.0}, "softcap must be above 0 or None, got -1.0"),
        ({"workspace_bytes": -1}, "workspace_bytes must be at least 0, got -1"),
        ({"hidden": torch.full((9, 24), math.nan)}, "hidden holds NaN or Inf in row 0"),
        ({"hidden": torch.zeros(9, 24, dtype=torch.int64)}, "must be floating point"),
    ],
)
def test_bad_input(change, message):
    inputs = {k: v if k == "target_ids" else v.float() for k, v in make_inputs().items()} | change
    positional = [inputs.pop(n) for n in ("hidden", "weight", "target_ids")]
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*positional, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_is_used(dtype):
    """A single row is padded to several: a budget must not be counted in such rows."""
    head = VocabHead(
        torch.zeros(4096, 8, dtype=dtype),
        torch.zeros(3000, 8, dtype=dtype),
        torch.zeros(4096, dtype=torch.int64),
    )
    for rows in (272, 1000):
        budget = head.bytes_of(rows)
        used = head.bytes_of(head.rows_per_chunk(4096, budget))
        assert 0.8 * budget <= used <= budget
