"""Segments that continue a shared prefix, against dense attention with a mask over the whole pack."""

from itertools import accumulate

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.prefix_attention import (
    PrefixAttention,
    PrefixAttentionFunction,
    gathered_attention,
    plan_prefixes,
    prefix_attention,
    prefix_attention_ref,
)

# (lengths, the segment each continues)
PACKS = {
    "one group": ([7, 3, 5, 1], [-1, 0, 0, 0]),
    "prompt of one token": ([1, 4, 4, 9], [-1, 0, 0, 0]),
    "one completion": ([5, 6], [-1, 0]),
    "ragged groups": ([4, 2, 1, 5, 3, 1, 2, 1, 30, 70, 2], [-1, 0, 0, 0, -1, -1, 5, 5, -1, 8, 8]),
    "alone among groups": ([9, 3, 3, 12, 8, 2], [-1, 0, 0, -1, -1, 4]),
    "long prompt": ([300, 90, 20, 17, 1], [-1, 0, 0, 0, 0]),
    "long completions": ([20, 700, 3, 650, 120], [-1, 0, 0, 0, 0]),
    "nothing shared": ([3, 8, 1], [-1, -1, -1]),
    "not beside its prefix": ([4, 3, 5, 2], [-1, -1, 0, 1]),
}
HEADS = [(4, 4, 16), (4, 2, 8), (6, 1, 32)]


def by_ref(q, k, v, bounds, prefix_of, **options):
    return prefix_attention_ref(q, k, v, bounds, prefix_of, **options)


def by_op(q, k, v, bounds, prefix_of, **options):
    return prefix_attention(q, k, v, plan_prefixes(bounds, prefix_of, device=q.device), **options)


def by_flash(q, k, v, bounds, prefix_of, *, scale=None):
    """PyTorch's flash attention, where the CPU takes C++ by itself."""
    return PrefixAttentionFunction.apply(q, k, v, plan_prefixes(bounds, prefix_of), scale)


def by_gather(q, k, v, bounds, prefix_of, *, scale=None):
    plan = plan_prefixes(bounds, prefix_of, device=q.device, gather=True)
    return gathered_attention(q, k, v, plan, scale)


def make_inputs(lengths, H, K, Dh, device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, Dh) for heads in (H, K, K, H)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]


def out_and_grads(op, inputs, pack, dtype, **options) -> dict[str, torch.Tensor]:
    q, k, v, dout = (x.detach().clone().to(dtype) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    lengths, prefix_of = pack
    out = op(q, k, v, [0, *accumulate(lengths)], prefix_of, **options)
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("op", [by_op, by_flash, by_gather])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("H", "K", "Dh"), HEADS)
def test_matches_the_dense_mask(op, pack, H, K, Dh, device):
    if op is by_flash and device != "cpu":
        pytest.skip("of the CPU alone")
    inputs = make_inputs(pack[0], H, K, Dh, device)
    exact = out_and_grads(by_ref, inputs, pack, torch.float64)
    baseline = out_and_grads(by_ref, inputs, pack, torch.float32)
    actual = out_and_grads(op, inputs, pack, torch.float32)
    for name in exact:
        floor = max(1e-6, 2**-23 * (H * Dh * sum(pack[0])) ** 0.5)
        assert_accurate(name, actual[name], baseline[name], exact[name], 4, floor)
    wide = out_and_grads(op, inputs, pack, torch.float64)
    for name in exact:
        torch.testing.assert_close(wide[name], exact[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("op", [by_op, by_gather])
def test_gradcheck(op):
    lengths, prefix_of = [3, 2, 1, 2, 2, 1, 3], [-1, 0, 0, -1, -1, 4, 4]
    q, k, v, _ = (x.requires_grad_() for x in make_inputs(lengths, 4, 2, 4, "cpu"))
    bounds = [0, *accumulate(lengths)]
    assert torch.autograd.gradcheck(lambda *x: op(*x, bounds, prefix_of, scale=0.7), (q, k, v))


def test_far_apart_log_sum_exps(device):
    """Scores of +-400: one part of a row weighs nothing, and no exponential overflows."""
    pack = ([5, 4, 3], [-1, 0, 0])
    inputs = [x * 20 for x in make_inputs(pack[0], 2, 2, 8, device)]
    actual, exact = (out_and_grads(op, inputs, pack, torch.float64) for op in (by_op, by_ref))
    for name in exact:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", [by_op, by_flash])
def test_bfloat16_is_computed_in_float32(op):
    """Rounded once, at the end: nearly every output is the nearest bfloat16."""
    pack = PACKS["ragged groups"]
    inputs = [x.bfloat16().double() for x in make_inputs(pack[0], 4, 2, 16, "cpu")]
    actual = out_and_grads(op, inputs, pack, torch.bfloat16)
    exact = out_and_grads(by_ref, inputs, pack, torch.float64)
    for name in exact:
        assert (actual[name] == exact[name].bfloat16()).double().mean() > 0.99, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_flash_attention_with_more_keys_than_queries(pack, dtype):
    inputs = [x.to(dtype).double() for x in make_inputs(pack[0], 4, 2, 64, "cuda")]
    results = [
        out_and_grads(op, inputs, pack, t)
        for op, t in ((by_op, dtype), (by_ref, dtype), (by_ref, torch.float64))
    ]
    for name in results[0]:
        assert_accurate(name, *(result[name] for result in results), slack=3, floor=1e-2)


@pytest.mark.parametrize("poisoned", [1, 2, 5])
def test_nan_of_a_completion_stays_in_it(poisoned, device):
    lengths, prefix_of = [4, 5, 5, 3, 2, 5], [-1, 0, 0, -1, 3, 0]
    q, k, v, _ = (x.float() for x in make_inputs(lengths, 4, 2, 8, device))
    bounds = [0, *accumulate(lengths)]
    clean = by_op(q, k, v, bounds, prefix_of)
    own = torch.zeros(len(q), dtype=torch.bool, device=device)
    own[bounds[poisoned] : bounds[poisoned + 1]] = True
    q, k, v = (x.masked_fill(own[:, None, None], torch.nan) for x in (q, k, v))
    dirty = by_op(q, k, v, bounds, prefix_of)
    assert dirty[own].isnan().all()
    torch.testing.assert_close(dirty[~own], clean[~own], rtol=0, atol=0)


def test_one_call_for_all_completions_of_a_prompt():
    lengths, prefix_of = [4, 2, 3, 5, 6, 1, 1], [-1, 0, 0, -1, -1, 4, 4]
    runs = plan_prefixes([0, *accumulate(lengths)], prefix_of).runs
    assert [(r.prefix.start, r.prefix.stop, r.queries.start, r.queries.stop) for r in runs] == [
        (0, 4, 4, 9), (14, 20, 20, 22),
    ]  # fmt: skip


def test_the_gathered_keys_of_a_segment_begin_with_its_prefix():
    plan = plan_prefixes([0, 2, 4, 5], [-1, 0, 0], gather=True)
    assert plan.keys.gather.rows.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4]
    assert plan.keys.cu_seqlens_k.tolist() == plan.keys.bounds == [0, 2, 6, 9]
    assert (plan.max_seqlen, plan.keys.max_seqlen) == (2, 4)


def test_the_plan_is_made_once(device, monkeypatch):
    from r1fast.kernels import prefix_attention as module

    plans = []
    monkeypatch.setattr(
        module, "plan_prefixes", lambda *a, **k: plans.append(plan_prefixes(*a, **k)) or plans[-1]
    )
    q, k, v, _ = (x.float() for x in make_inputs([3, 2, 2], 4, 2, 8, device))
    attend = PrefixAttention([0, 3, 5, 7], [-1, 0, 0])
    outputs = [attend(layer, q, k, v) for layer in range(3)]
    assert len(plans) == 1
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], by_ref(q, k, v, [0, 3, 5, 7], [-1, 0, 0]))
