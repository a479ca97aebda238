"""The CPU's own forward against the model's: the same layer, rounded in the same places."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

from r1fast import _C
from r1fast.kernels.attention import PackedAttention
from r1fast.model import Decoder
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.native import NativeForward, PackedWeight, is_supported, padded, why_not
from r1fast.rollout.request import Prefill
from r1fast.rollout.runner import Runner, _note_once

pytestmark = pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")


def forward_both(model, ids, **options):
    """(T, D) hidden states of the model's packed forward and of the runner's prefill, and its logits."""
    n = len(ids)
    attend = PackedAttention(torch.tensor([0, n], dtype=torch.int32), n)
    with torch.inference_mode():
        expected = model(ids, torch.arange(n), attend)
        runner = Runner(model, **options)
        cache = KVCache(
            model.spec, model.head_weight.dtype, torch.device("cpu"), block_size=16,
            num_bytes=1 << 20, max_sequences=4, max_positions=128,
        )  # fmt: skip
        blocks = cache.allocator.allocate(cache.blocks_for(n))
        rows = []
        for end in range(1, n + 1):  # one token at a time: as many forwards as tokens
            job = Prefill(None, ids[:end].numpy(), [], blocks, end - 1)
            rows.append(runner.prefill([(job, end - 1, end)], cache))
        one_by_one = torch.cat(rows)
        job = Prefill(None, ids.numpy(), [], blocks, 0)
        last = runner.prefill([(job, 0, n)], cache)
        return expected, one_by_one, last, runner.logits(last).clone()


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, invariant):
    model, ids = tiny_model(family), torch.randint(4, 97, (45,))
    expected, rows, last, logits = forward_both(model, ids, batch_invariant=invariant)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, expected[-1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, last @ model.head_weight.detach().T, rtol=1e-5, atol=1e-5)
    if invariant:
        assert torch.equal(rows[-1:], last)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_where_the_model_does(family):
    """Where bfloat16 is native its bits are the model's own, which training has; nowhere is it further from the exact ones."""
    spec = replace(tiny_model(family).spec, hidden_size=128, intermediate_size=256, num_layers=4)
    model, ids = Decoder(spec, seed=0).to(torch.bfloat16), torch.randint(4, 97, (120,))
    expected, rows, last, logits = forward_both(model, ids)
    assert torch.equal(rows, expected) or not is_supported(model)
    attend = PackedAttention(torch.tensor([0, 120], dtype=torch.int32), 120)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, torch.arange(120), attend)
    error, allowed = ((x.double() - exact).abs().mean() for x in (rows, expected))
    assert 0 < error < 1.3 * allowed
    assert logits.dtype == torch.float32  # not rounded
    exact = last.double() @ model.head_weight.detach().double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 33, 130])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 2), (31, 34), (48, 32), (97, 64), (130, 258)])
def test_packed_weight(dtype, num_rows, num_out, num_in):
    """Against float64, with NaN in every row and column that is not there; rows alone give the same bits."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=g).to(dtype)
    bias = torch.randn(num_out, generator=g).to(dtype)
    x = padded(num_rows, num_in, dtype)
    x[:num_rows, :num_in] = torch.randn(num_rows, num_in, generator=g)
    packed = PackedWeight(weight, bias)
    exact = x[:num_rows, :num_in].double() @ weight.double().T + bias.double()
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-3 if dtype == torch.float32 else 0.03)
    y = torch.full((num_rows + 1, num_out + 1), torch.nan, dtype=torch.float32)
    packed(x, y, num_rows, _C.After.store)
    torch.testing.assert_close(y[:num_rows, :num_out].double(), exact, rtol=1e-5, atol=1e-3)
    assert y[num_rows].isnan().all()
    assert y[:, num_out].isnan().all()
    alone, one = torch.empty(1, num_out), padded(1, num_in, dtype)
    one[0] = x[num_rows - 1, : one.shape[1]]
    packed(one, alone, 1, _C.After.store)
    assert torch.equal(alone[0], y[num_rows - 1, :num_out])
    z = torch.ones(num_rows, num_out, dtype=dtype)
    packed(x, z, num_rows, _C.After.add)
    torch.testing.assert_close(z.double(), exact + 1, **tolerance)
    if num_out % 2 == 0:
        h = torch.empty(num_rows, num_out // 2, dtype=dtype)
        PackedWeight(weight, bias, halved=True)(x, h, num_rows, _C.After.silu)
        gate, up = exact.chunk(2, dim=-1)
        torch.testing.assert_close(h.double(), torch.nn.functional.silu(gate) * up, **tolerance)
        with pytest.raises(ValueError, match=r"silu is of halved weights|rows of"):
            packed(x, h, num_rows, _C.After.silu)


def test_new_weights_are_packed_again():
    model = tiny_model()
    runner = Runner(model)
    cache = KVCache(
        model.spec, torch.float32, torch.device("cpu"), block_size=16, num_bytes=1 << 20,
        max_sequences=4, max_positions=128,
    )  # fmt: skip
    native = runner._native = NativeForward(model, cache)
    runner.reset()
    assert runner._native is not native


def test_what_keeps_a_model_from_it_is_said(monkeypatch, capsys):
    """In the refusal of batch_invariant, and in one line a process where PyTorch's forward samples instead."""
    spec = tiny_model().spec
    cases = {
        "float32 or bfloat16 weights, got float16": (spec, torch.float16),
        "a head_dim of at most 1024, got 1026": (replace(spec, head_dim=1026), torch.float32),
        "an even intermediate_size, got 49": (replace(spec, intermediate_size=49), torch.bfloat16),
        "an even hidden_size, got 31": (replace(spec, hidden_size=31), torch.float32),
    }
    for reason, (other, dtype) in cases.items():
        assert why_not(other, dtype, torch.device("cpu")) == f"it needs {reason}"
    assert "the weights are on cuda:1" in why_not(spec, torch.float32, torch.device("cuda:1"))
    assert why_not(spec, torch.bfloat16, torch.device("cpu")) is None
    odd = Decoder(replace(spec, intermediate_size=49), seed=0)
    with pytest.raises(
        ValueError, match=r"batch_invariant needs .*: it needs an even intermediate_size, got 49"
    ):
        Runner(odd, batch_invariant=True)
    _note_once.cache_clear()
    for _ in range(2):
        Runner(odd)
        Runner(tiny_model())
    said = "the sampler takes PyTorch's forward, slower than the native one: it needs an even intermediate_size, got 49"
    assert capsys.readouterr().err.splitlines() == [said]
    with monkeypatch.context() as patch:
        patch.setattr(_C, "native_level", lambda bf16: "baseline")
        patch.delenv("R1FAST_CPU_LEVEL", raising=False)
        assert "this CPU has not" in why_not(spec, torch.float32, torch.device("cpu"))
        patch.setenv("R1FAST_CPU_LEVEL", "baseline")
        assert "R1FAST_CPU_LEVEL=baseline" in why_not(spec, torch.float32, torch.device("cpu"))
