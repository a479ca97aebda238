"""The loss on a GPU, at sizes the interpreter cannot reach: run by `pytest -m gpu`."""

import math

import pytest
import torch

from r1fast.kernels.fused_grpo_loss import fused_grpo_loss, fused_grpo_loss_ref
from r1fast.kernels.linear_logprobs import linear_logprobs, linear_logprobs_ref

pytestmark = pytest.mark.gpu
SHAPES = [(1000, 512, 32000), (4100, 896, 50257), (2049, 2048, 151936)]


def make_inputs(T, D, V, dtype):
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    hidden, weight = randn(T, D).to(dtype), (randn(V, D) * (4 / math.sqrt(D))).to(dtype)
    y = torch.randint(V, (T,), generator=g, device="cuda")
    with torch.no_grad():
        old = torch.cat([
            linear_logprobs_ref(h.float(), weight.float(), t)
            for h, t in zip(hidden.split(512), y.split(512), strict=True)
        ]) + 0.05 * randn(T)  # fmt: skip
    return hidden, weight, y, old, randn(T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_and_entropy(shape, dtype):
    hidden, weight, y, *_ = make_inputs(*shape, dtype)
    with torch.no_grad():
        actual = linear_logprobs(hidden, weight, y, return_entropy=True)
    for n in range(0, len(y), 256):
        rows = slice(n, n + 256)
        exact = linear_logprobs_ref(
            hidden[rows].double(), weight.double(), y[rows], return_entropy=True
        )
        for a, e in zip(actual, exact, strict=True):
            assert (a[rows] - e).abs().max() <= (5e-4 if dtype == torch.bfloat16 else 5e-5)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1, "kl_coef": 0.01}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients(shape, dtype, options):
    hidden, weight, y, old, A = make_inputs(*shape, dtype)
    options = {"loss_type": "dapo", "old_logprobs": old, "ref_logprobs": old, **options}
    results = []
    for op, kind in ((fused_grpo_loss, dtype), (fused_grpo_loss_ref, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (hidden, weight)]
        leaves[1].grad_dtype = torch.promote_types(kind, torch.float32)
        loss, _ = op(*leaves, y, A, **options)
        loss.backward()
        results.append((loss, *(x.grad.double() for x in leaves)))
    (loss, *actual), (exact_loss, *exact) = results
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-3, abs=1e-5)
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-4) * e.norm()


def test_runs_repeat_bit_for_bit_and_rows_without_signal_get_zeros():
    hidden, weight, y, old, A = make_inputs(*SHAPES[0], torch.bfloat16)
    A[::2] = 0
    grads = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, metrics = fused_grpo_loss(*leaves, y, A, old_logprobs=old, loss_type="dapo")
        loss.backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert metrics["num_evaluated"] == len(y) // 2
    assert (grads[0][0][::2] == 0).all()


def test_logits_are_never_stored():
    hidden, weight, y, old, A = make_inputs(*SHAPES[2], torch.bfloat16)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    leaves[1].grad_dtype = torch.float32
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, _ = fused_grpo_loss(
        *leaves, y, A, old_logprobs=old, loss_type="dapo", workspace_bytes=64 << 20
    )
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.grad.nbytes for x in leaves)
    assert extra <= 160 << 20  # logits: 622 MB
