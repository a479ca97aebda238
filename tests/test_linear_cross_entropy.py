import math

import pytest
import torch

from r1fast.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

T, D, V = 19, 12, 57


def make_inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((T, D), (V, D), (V,))
    )
    y = torch.randint(V, (T,), generator=g)
    y[::4] = -100
    return [x.to(dtype) for x in (hidden, weight, bias)], y


def run(op, dtype=torch.float64, poison=False, **options):
    tensors, y = make_inputs(dtype)
    if poison:
        tensors[0][y == -100] = torch.nan
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = op(leaves[0], leaves[1], y, bias=leaves[2], **options)
    loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 57 * 8 * 4])
def test_is_cross_entropy(reduction, options, workspace_bytes):
    exact = run(linear_cross_entropy_ref, reduction=reduction, **options)
    actual = run(
        linear_cross_entropy, reduction=reduction, workspace_bytes=workspace_bytes, **options
    )
    torch.testing.assert_close(actual, exact)
    poisoned = run(linear_cross_entropy, poison=True, reduction=reduction, **options)
    torch.testing.assert_close(poisoned, exact)  # ignored rows are not read
    single = run(linear_cross_entropy, torch.float32, reduction=reduction, **options)
    torch.testing.assert_close([x.double() for x in single], exact, rtol=1e-4, atol=1e-5)


def test_weights_entropy_and_a_global_count():
    (hidden, weight, bias), y = make_inputs()
    w = torch.rand(T, dtype=torch.float64)
    nll = linear_cross_entropy_ref(hidden, weight, y, bias=bias, reduction="none")
    p = torch.softmax(hidden @ weight.T + bias, 1)
    H = torch.where(y == -100, 0, -(p * p.log()).sum(1))
    for reduction, expected in (("sum", (nll * w).sum()), ("none", nll * w)):
        loss, entropy = linear_cross_entropy(
            hidden, weight, y, bias=bias, token_weights=w, reduction=reduction, return_entropy=True
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(entropy, H)
    mean = linear_cross_entropy(hidden, weight, y, bias=bias, num_tokens=1000)
    torch.testing.assert_close(mean, nll.sum() / 1000)


def test_every_row_ignored():
    (hidden, weight, _), y = make_inputs()
    y[:] = -100
    leaf = hidden.requires_grad_()
    assert math.isnan(linear_cross_entropy(leaf, weight, y).item())
    loss = linear_cross_entropy(leaf, weight, y, reduction="sum")
    assert loss == 0
    loss.backward()
    assert (leaf.grad == 0).all()
    assert (linear_cross_entropy(leaf, weight, y, reduction="none") == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be mean, sum or none, got 'max'"),
        ({"ignore_index": -1}, r"target_ids must be in \[0, 57\), got values from -100"),
        ({"num_tokens": 0}, "num_tokens must be above 0, got 0"),
        ({"token_weights": torch.ones(3)}, r"token_weights must be \(T,\) = \(19,\), got \(3,\)"),
        ({"bias": torch.ones(3)}, r"need bias \(V,\)"),
    ],
)
def test_bad_input(options, message):
    (hidden, weight, _), y = make_inputs()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, y, **options)


def test_token_weights_must_be_finite():
    inputs = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([1, -100, 2])
    weights = torch.tensor([1.0, math.nan, 1.0])
    assert linear_cross_entropy(*inputs, token_weights=weights).isfinite()  # row 1 does not count
    with pytest.raises(ValueError, match="token_weights is nan at row 2"):
        linear_cross_entropy(*inputs, token_weights=weights.roll(1))
