"""Attention of training in C++: every instruction set against float64, and what its rows depend on."""

import re
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from numerics import assert_accurate
from torch.utils.checkpoint import checkpoint

from r1fast import _C
from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.cpu_attention import native_attention, plan_segments, uses_native
from r1fast.kernels.paged_attention import DecodePlan, PagedLayout, paged_attention_native, write_kv
from r1fast.kernels.prefix_attention import plan_prefixes, prefix_attention, prefix_attention_ref

LEVELS = ["baseline", "avx2", "avx512"][: ["baseline", "avx2", "avx512"].index(_C.cpu_level()) + 1]
# (lengths, the segment each continues)
PACKS = {
    "groups": ([4, 2, 1, 5, 3, 1, 2, 1, 30, 70, 2], [-1, 0, 0, 0, -1, -1, 5, 5, -1, 8, 8]),
    "alone": ([1, 17, 64, 65, 1, 63, 5], None),
    "empty": ([0, 3, 5, 0, 4, 0, 2], [-1, 0, 0, 0, -1, 4, 4]),
    "apart": ([4, 3, 5, 2, 90], [-1, -1, 0, 1, 0]),
    "blocks of keys": ([129, 66, 16, 300], [-1, 0, 0, -1]),
}
HEADS = [(3, 3, 13), (4, 2, 24), (14, 2, 64), (2, 1, 136)]
# units are cut and tasks too: 3e8 multiply-adds a product
LONG = ([40, 900, 500, 30], [-1, 0, 0, 0])


def make_inputs(lengths, H, K, Dh) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, Dh) for heads in (H, K, K, H)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def out_and_grads(op, inputs, dtype=torch.float32) -> dict[str, torch.Tensor]:
    q, k, v, dout = (x.detach().clone().to(dtype) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = op(q, k, v)
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def native(pack, **options):
    lengths, prefix_of = pack
    plan = plan_segments([0, *accumulate(lengths)], prefix_of)
    return lambda q, k, v: native_attention(q, k, v, plan, **options)


def reference(pack, **options):
    lengths, prefix_of = pack
    prefix_of = [-1] * len(lengths) if prefix_of is None else prefix_of
    return lambda *x: prefix_attention_ref(*x, [0, *accumulate(lengths)], prefix_of, **options)


def assert_matches(pack, inputs, level):
    exact = out_and_grads(reference(pack), inputs, torch.float64)
    baseline = out_and_grads(reference(pack), inputs)
    actual = out_and_grads(native(pack, level=level), inputs)
    for name in exact:
        slack = 2 if name == "out" else 4
        # where the exact gradient is 0, the rounding of Dh products in each of H heads is left
        floor = max(1e-6, 2**-23 * (inputs[0][0].numel()) ** 0.5)
        assert_accurate(name, actual[name], baseline[name], exact[name], slack, floor)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("H", "K", "Dh"), HEADS)
def test_matches_float64(level, pack, H, K, Dh):
    assert_matches(pack, make_inputs(pack[0], H, K, Dh), level)


@pytest.mark.parametrize("pack", [LONG, ([1100], None)], ids=["shared", "alone"])
def test_gradients_of_keys_that_several_tasks_have_met(pack):
    assert_matches(pack, make_inputs(pack[0], 8, 1, 64), "auto")


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_is_rounded_once(level):
    """Nearly every output is the nearest bfloat16."""
    pack = PACKS["groups"]
    inputs = [x.bfloat16().double() for x in make_inputs(pack[0], 4, 2, 24)]
    actual = out_and_grads(native(pack, level=level, scale=0.3), inputs, torch.bfloat16)
    exact = out_and_grads(reference(pack, scale=0.3), inputs, torch.float64)
    for name in exact:
        assert (actual[name] == exact[name].bfloat16()).double().mean() > 0.99, name


@pytest.mark.parametrize("level", LEVELS)
def test_large_scores_neither_overflow_nor_vanish(level):
    pack = PACKS["groups"]
    inputs = [(20 * x).float().double() for x in make_inputs(pack[0], 2, 1, 16)]
    actual = out_and_grads(native(pack, level=level), inputs)
    exact = out_and_grads(reference(pack), inputs, torch.float64)
    assert (exact["out"] - exact["out"].round()).abs().max() > 0.1
    for name in exact:
        error = (actual[name] - exact[name]).norm() / exact[name].norm()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("pack", [LONG, PACKS["groups"]], ids=["long", "groups"])
def test_threads_change_no_bit(pack):
    inputs = make_inputs(pack[0], 8, 2, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(out_and_grads(native(pack), inputs))
    finally:
        torch.set_num_threads(before)
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


@pytest.mark.parametrize("level", LEVELS)
def test_rows_do_not_depend_on_the_rest_of_the_batch(level):
    lengths, prefix_of = [70, 9, 33, 8, 140, 21], [-1, 0, 0, -1, 3, 3]
    inputs = make_inputs(lengths, 6, 2, 24)
    whole = out_and_grads(native((lengths, prefix_of), level=level), inputs)
    parts = torch.arange(sum(lengths)).split(lengths)
    for segment in (2, 4, 5):
        prefix = prefix_of[segment]
        rows = torch.cat([parts[prefix], parts[segment]])
        pack = [lengths[prefix], lengths[segment]], [-1, 0]
        alone = out_and_grads(native(pack, level=level), [x[rows] for x in inputs])
        for name in ("out", "dq"):
            assert torch.equal(alone[name], whole[name][rows]), (segment, name)


def decoded(q, k, v, lengths, prefix_of, level) -> torch.Tensor:
    """The same by decode's attention: each segment behind its prefix in blocks of its own, which lie anywhere."""
    layout, out = PagedLayout(*k.shape[1:], 16, q.dtype), []
    parts = torch.arange(len(q)).split(lengths)
    for own, prefix in zip(parts, prefix_of or [-1] * len(parts), strict=True):
        rows = own if prefix < 0 else torch.cat([parts[prefix], own])
        n, num_blocks = len(rows), -(-len(rows) // 16)
        keys, values = (x.fill_(torch.nan) for x in layout.allocate(num_blocks))
        table = torch.randperm(num_blocks, dtype=torch.int32)[None]
        lists = ([n], [0, 1], [0], [0, len(own)])
        plan = DecodePlan(table, *(torch.tensor(x, dtype=torch.int32) for x in lists))
        write_kv(layout, keys, values, k[rows], v[rows], plan.slots(0, torch.arange(n), 16))
        out.append(torch.empty_like(q[own]))
        if len(own):
            scale = q.shape[2] ** -0.5
            paged_attention_native(q[own], layout, keys, values, plan, scale, out[-1], level)
    return torch.cat(out)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "K", "Dh"), [(4, 4, 14), (14, 2, 64), (2, 1, 136)])
def test_rows_have_the_bits_of_decode(H, K, Dh, dtype, level):
    """Prefixes that end in a strip of 64 and at its end; more than one chunk of 512, before and after that end."""
    packs = [
        PACKS["groups"], PACKS["alone"], PACKS["empty"], PACKS["apart"], PACKS["blocks of keys"],
        LONG, ([700, 400, 1], [-1, 0, 0]), ([512, 600, 128], [-1, 0, 0]), ([1100, 513], None),
    ]  # fmt: skip
    for lengths, prefix_of in packs:
        q, k, v, _ = (x.to(dtype) for x in make_inputs(lengths, H, K, Dh))
        expected = decoded(q, k, v, lengths, prefix_of, level)
        assert torch.equal(native((lengths, prefix_of), level=level)(q, k, v), expected), lengths


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poisoned", [1, 2, 5])
def test_nan_of_a_completion_reaches_only_itself_and_its_prompt(poisoned, level):
    lengths, prefix_of = [4, 5, 5, 3, 2, 5, 40], [-1, 0, 0, -1, 3, 0, -1]
    inputs = [x.float() for x in make_inputs(lengths, 4, 2, 8)]
    clean = out_and_grads(native((lengths, prefix_of), level=level), inputs)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    own, prompt = segment == poisoned, segment == prefix_of[poisoned]
    dirty = out_and_grads(
        native((lengths, prefix_of), level=level),
        [x.masked_fill(own[:, None, None], torch.nan) for x in inputs],
    )
    for name in clean:
        reached = own | prompt if name in ("dk", "dv") else own
        assert dirty[name][own].isnan().all(), name
        assert torch.equal(dirty[name][~reached], clean[name][~reached]), name


def test_strided_inputs_and_gradients():
    """q, k and v as parts of one tensor, and a gradient that is one row expanded."""
    pack = PACKS["groups"]
    T, H, K, Dh = sum(pack[0]), 4, 2, 16
    qkv = torch.randn(T, H + 2 * K, Dh, generator=torch.Generator().manual_seed(1))
    dout = torch.randn(H, Dh).expand(T, H, Dh)
    for turned in (False, True):
        parts = qkv.mT.contiguous().mT if turned else qkv  # elements apart, too
        strided = parts.split((H, K, K), dim=1)
        plain = [x.contiguous() for x in strided]
        a, b = (
            torch.autograd.grad(native(pack)(*x), x, dout)
            for x in ([x.requires_grad_() for x in inputs] for inputs in (strided, plain))
        )
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_heads_that_lie_apart():
    """Elements side by side, but not heads: a slice of wider ones."""
    lengths, prefix_of = PACKS["groups"]
    inputs = make_inputs(lengths, 4, 2, 24)
    wide = [torch.cat((x, torch.full_like(x, torch.nan)), 2).float() for x in inputs]
    apart = [x[:, :, :24] for x in wide]
    assert all(x.stride()[1:] == (48, 1) for x in apart)
    op = native((lengths, prefix_of))
    results = []
    for q, k, v, dout in (apart, [x.contiguous() for x in apart]):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = op(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(bool(x.isnan().any()) for x in results[0])


def test_recomputed_under_checkpoint():
    pack = PACKS["groups"]
    inputs = make_inputs(pack[0], 4, 2, 16)
    op = native(pack)
    kept = out_and_grads(op, inputs, torch.bfloat16)
    recomputed = out_and_grads(
        lambda *x: checkpoint(op, *x, use_reentrant=False), inputs, torch.bfloat16
    )
    for name in kept:
        assert torch.equal(kept[name], recomputed[name]), name


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths):
    q, k = (torch.ones(0, heads, 8, requires_grad=True) for heads in (4, 2))
    out = native((lengths, None))(q, k, k)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8)
    assert k.grad.shape == (0, 2, 8)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_memory_is_linear_in_the_length():
    """12,000 tokens: a matrix of their weights would be 576 MB."""
    q = torch.randn(12_000, 1, 8, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is there
    before = peak_bytes()
    native(([12_000], None))(q, q, q).sum().backward()
    assert peak_bytes() - before < 100e6


def test_which_calls_are_computed_in_cpp(monkeypatch):
    q = torch.randn(9, 4, 8)
    bounds = torch.tensor([0, 4, 9])
    assert uses_native(q) == (_C.cpu_level() != "baseline")
    assert not uses_native(q.double())
    assert not uses_native(q.half())
    calls = []
    for name in ("attention", "prefix_attention"):
        monkeypatch.setattr(
            f"r1fast.kernels.{name}.native_attention", lambda q, *_: calls.append(len(q)) or q
        )
        monkeypatch.setattr(
            f"r1fast.kernels.{name}.uses_native", lambda q: q.dtype == torch.float32
        )
    for x in (q, q.double()):
        PackedAttention(bounds, 5)(0, x, x, x)
        prefix_attention(x, x, x, plan_prefixes(bounds.tolist(), [-1, 0]))
    assert calls == [9, 9]


def test_mistakes_are_found():
    q = torch.zeros(6, 4, 8)
    with pytest.raises(ValueError, match="level must be auto, baseline, avx2 or avx512"):
        native(([6], None), level="sse9")(q, q, q)
    for bounds, prefix_of in (
        ([1, 6], None),  # does not begin at 0
        ([0, 7, 6], None),
        ([0, 6], [-1, -1]),
        ([0, 3, 6], [1, -1]),  # continues what comes after it
        ([0, 2, 4, 6], [-1, 0, 1]),  # a prefix with a prefix
    ):
        with pytest.raises(AssertionError):
            plan_segments(bounds, prefix_of)
    for pack, heads in ((([5], None), 4), (([6], None), 3)):
        with pytest.raises(AssertionError):
            native(pack)(q, q[:, :heads], q[:, :heads])
    with pytest.raises(AssertionError):
        native(([6], None))(q.double(), q.double(), q.double())
