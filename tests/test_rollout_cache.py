"""What the engine's history may not change: preemption, prefix hits, chunks, refills, speculation, aborts.

With `batch_invariant` log-probabilities are compared bit for bit: it makes decode and prefill the same
sums, so a completion that was computed again is the same to the last bit.
"""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model

from r1fast.rollout.engine import Engine
from r1fast.rollout.native import is_supported
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.speculation import Speculation
from r1fast.rollout.weights import checksums

EOS = 3
PROMPTS = [[5, 6, 7, 8], [9] * 17, [10, 11] * 20, [21, 22], [23] * 30, [5, 6, 7, 8]]
LONG = SamplingParams(max_tokens=40)
BLOCK = 16


def block_bytes(model) -> int:
    spec = model.spec
    size = model.head_weight.element_size()
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * BLOCK * size


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def run(model, *, prompts=PROMPTS, G=4, sampling=LONG, blocks=0, **options):
    """(engine, completions of all prompts in order)"""
    if blocks:
        options["cache_bytes"] = blocks * block_bytes(model)
    engine = Engine(model, [EOS], decode=str, **{"max_batch_size": 64} | options)
    groups = engine.generate(prompts, G, sampling, seed=7)
    return engine, [c for group in groups for c in group.completions]


def tokens(completions):
    return [c.token_ids for c in completions]


def logprobs(completions):
    return np.concatenate([c.logprobs for c in completions])


def assert_same(actual, expected, tolerance=1e-5):
    assert tokens(actual) == tokens(expected)
    assert np.abs(logprobs(actual) - logprobs(expected)).max() <= tolerance


def assert_nothing_held(engine):
    stats = engine.stats
    assert (stats.blocks_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert not engine.has_work


HISTORIES = {
    "few slots": {"max_batch_size": 3},
    "one slot": {"max_batch_size": 1},
    "a full cache": {"blocks": 8},
    "a cache for one sequence": {"blocks": 5},
    "small chunks": {"prefill_tokens": 5},
    "small chunks in a full cache": {"prefill_tokens": 7, "blocks": 9, "max_batch_size": 7},
    "no prefix cache": {"prefix_cache": False, "blocks": 8},
    "speculation": {"speculation": Speculation(3, ngram=2, min_ngram=1)},
    "speculation in a full cache": {"speculation": Speculation(4, 1, 1), "blocks": 8},
}


@pytest.mark.parametrize("options", HISTORIES.values(), ids=HISTORIES)
def test_history_does_not_matter(model, options):
    _, expected = run(model)
    engine, actual = run(model, **options)
    assert_same(actual, expected)
    assert_nothing_held(engine)
    if "blocks" in options and "speculation" not in options:
        assert engine.stats.preemptions > 0
    if "speculation" in options:
        assert engine.stats.drafted > engine.stats.accepted > 0
        assert 0 < engine.stats.acceptance < 1


@pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_is_bitwise(family, dtype):
    """Prefill computes again what decode computed, alone or beside others: the same bits."""
    model = tiny_model(family).to(dtype)
    _, expected = run(model, batch_invariant=True)
    for name, options in HISTORIES.items():
        _, actual = run(model, batch_invariant=True, **options)
        assert tokens(actual) == tokens(expected), name
        assert (logprobs(actual) == logprobs(expected)).all(), name
    _, alone = run(model, prompts=PROMPTS[:1], batch_invariant=True)
    assert (logprobs(alone) == logprobs(expected[:4])).all()


def test_batch_invariant_where_it_cannot_be_had(model):
    with pytest.raises(ValueError, match=r"it needs float32 or bfloat16 weights, got float16"):
        Engine(tiny_model().to(torch.float16), [EOS], batch_invariant=True)


def test_a_group_shares_its_prompt(model):
    """40 tokens of prompt are 2 full blocks, once; every sample has the 8 positions behind them for itself."""
    engine = Engine(model, [EOS], decode=str, prefix_cache=False)
    engine.add([10, 11] * 20, range(8), SamplingParams(max_tokens=5, ignore_eos=True))
    engine.step()
    stats = engine.stats
    assert (stats.num_running, stats.prefill_tokens) == (8, 40)
    assert stats.blocks_used == 2 + 8 * 8 // BLOCK
    engine.step()
    assert engine.rows.batch().shared_blocks.tolist() == [2]
    assert engine.rows.batch().group_starts.tolist() == [0, 8]


@pytest.mark.parametrize("at_once", [1, 64])
@pytest.mark.parametrize("prompt_tokens", [45, 48])
def test_cache_memory_is_what_the_tokens_need(model, at_once, prompt_tokens):
    """Whenever one looks: what is in the cache of running samples, rounded up to one block in all."""
    engine = Engine(model, [EOS], prefix_cache=False)
    lengths = [1, 2, 9, 14, 15, 16, 17, 30, 31, 33, 60, 64]
    for i in range(2):
        engine.add([5 + i] * prompt_tokens, range(12), SamplingParams(ignore_eos=True), stream=False,
                   lengths=lengths)  # fmt: skip
    num_looks = 0
    engine.step(at_once)
    while engine.has_work:
        slots, full = engine.rows.batch().slots, prompt_tokens // BLOCK * BLOCK
        own = engine.rows.length[slots] - 1 - full  # a part of a block is copied for each sample
        shared = len(set(engine.rows.group[slots])) * full
        assert engine.stats.blocks_used == -(-(shared + own.sum()) // BLOCK)
        num_looks += 1
        engine.step(at_once)
    assert num_looks > 8
    assert engine.stats.blocks_used == 0


def test_prefix_cache_across_calls_and_weights():
    model = tiny_model()
    engine = Engine(model, [EOS], decode=str)
    prompt, sampling = [[5, 6] * 24], SamplingParams(max_tokens=8, temperature=0)
    first = engine.generate(prompt, 1, sampling)[0].completions[0]
    assert engine.stats.prefix_hits == 0
    again = engine.generate(prompt, 1, sampling)[0].completions[0]
    assert engine.stats.prefix_hits == 32  # the last block holds the token whose logits are wanted
    assert again.token_ids == first.token_ids
    assert again.logprobs == pytest.approx(first.logprobs, abs=1e-5)
    longer = [[*prompt[0], *first.token_ids, 7]]  # what was generated is found too
    before = engine.stats.prefix_hits
    engine.generate(longer, 1, sampling)
    assert engine.stats.prefix_hits - before == 48
    with torch.no_grad():
        model.norm.weight.mul_(-1)
    changed = engine.generate(prompt, 1, sampling)[0].completions[0]
    assert engine.stats.prefix_hits - before == 48  # nothing of the old weights
    fresh = Engine(model, [EOS]).generate(prompt, 1, sampling)[0].completions[0]
    assert changed.token_ids == fresh.token_ids != first.token_ids
    with torch.no_grad():
        model.norm.weight.data.mul_(-1)  # behind the version counter's back
    engine.reset_prefix_cache()
    assert engine.generate(prompt, 1, sampling)[0].completions[0].token_ids == first.token_ids


def test_a_fused_optimizer_is_noticed():
    """It writes the weights without touching their version counters."""
    model = tiny_model()
    engine = Engine(model, [EOS])
    prompt, sampling = [[5, 6] * 24], SamplingParams(max_tokens=8, temperature=0)
    before = engine.generate(prompt, 1, sampling)[0].completions[0]
    versions = [p._version for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert versions == [p._version for p in model.parameters()]
    after = engine.generate(prompt, 1, sampling)[0].completions[0]
    assert engine.stats.prefix_hits == 0
    assert (
        after.logprobs
        == Engine(model, [EOS]).generate(prompt, 1, sampling)[0].completions[0].logprobs
    )
    assert after.logprobs != before.logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["embed.weight", "norm.weight", "layers.1.qkv.bias"])
def test_one_element_that_nobody_announced_is_noticed(name, dtype):
    """A fused step may move a single row, by a little: no version counter, no sample would show it."""
    model = tiny_model().to(dtype)
    engine = Engine(model, [EOS])
    prompt, sampling = [[5, 6] * 24], SamplingParams(max_tokens=8, temperature=0)
    engine.generate(prompt, 1, sampling)
    parameter = dict(model.named_parameters())[name].data
    for index in (0, 7, parameter.numel() // 2 + 1, parameter.numel() - 1):
        hits = engine.stats.prefix_hits
        engine.generate(prompt, 1, sampling)
        assert engine.stats.prefix_hits > hits
        hits = engine.stats.prefix_hits
        x = parameter.view(-1)[index : index + 1]
        x.view(torch.int32 if dtype == torch.float32 else torch.int16).add_(1)  # the last bit
        after = engine.generate(prompt, 1, sampling)[0].completions[0]
        assert engine.stats.prefix_hits == hits
        fresh = Engine(model, [EOS]).generate(prompt, 1, sampling)[0].completions[0]
        assert after.logprobs == fresh.logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6, 8), (6, 7), (9,), (16,)])
def test_checksums(shape, dtype):
    """Of tensors that lie anywhere; others where elements, signs or the order of rows differ."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def checksum(x):
        model = torch.nn.Module()
        model.x = torch.nn.Parameter(x)
        return checksums(model.parameters())

    known = checksum(x)
    assert known == checksum(x.clone())
    shifted = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
    for same in (shifted, x.T.contiguous().T if x.ndim > 1 else x):  # narrower words
        before = checksum(same)
        same[-1] += 1
        assert checksum(same) != before
        same[-1] -= 1
    x = x.clone()
    for at in range(x.numel()):
        for change in (lambda e: e * 1.25, lambda e: -e):
            y = x.clone()
            y.view(-1)[at] = change(y.view(-1)[at])
            assert checksum(y) != known
    assert checksum(x.flip(0)) != known
    assert checksum(-x) != known


def test_weights_that_change_while_requests_run(model):
    model = tiny_model()
    engine = Engine(model, [EOS], decode=str)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    engine.add([5, 6], [1], sampling)
    engine.step()
    engine.add([5, 7], [2], sampling)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="weights have changed while 2 requests run"):
        engine.add([5, 8], [3], sampling)
    events = []
    while engine.has_work:
        events += engine.step()
    assert [e.finish_reason for e in events if e.finish_reason] == ["length"] * 2
    after = engine.generate([[5, 6] * 24], 1, sampling)
    fresh = Engine(model, [EOS]).generate([[5, 6] * 24], 1, sampling)
    assert after[0].completions[0].logprobs == fresh[0].completions[0].logprobs


def test_a_model_that_is_converted_after_its_first_use():
    model = tiny_model()
    engine = Engine(model, [EOS])
    prompt, sampling = [[5, 6] * 24], SamplingParams(max_tokens=8)
    engine.generate(prompt, 2, sampling)
    queries = engine.stats.prefix_queries
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        model.to(dtype)
        after = engine.generate(prompt, 2, sampling)[0].completions
        fresh = Engine(model, [EOS]).generate(prompt, 2, sampling)[0].completions
        assert_same(after, fresh, tolerance=0)
    assert engine.stats.prefix_queries == 4 * queries  # counters go on
    assert engine.stats.prefix_hits == 0


def test_fixed_weights_are_looked_at_once():
    model = tiny_model()
    engine = Engine(model, [EOS], fixed_weights=True)
    prompt, sampling = [[5, 6] * 24], SamplingParams(max_tokens=8)
    engine.generate(prompt, 1, sampling)
    with torch.no_grad():
        model.norm.weight.add_(1)
    engine.generate(prompt, 1, sampling)
    assert engine.stats.prefix_hits > 0
    engine.reset_prefix_cache()
    after = engine.generate(prompt, 1, sampling)[0].completions[0]
    fresh = Engine(model, [EOS]).generate(prompt, 1, sampling)[0].completions[0]
    assert after.logprobs == fresh.logprobs


def test_a_long_prompt_does_not_stall_decoding(model):
    """While 100 tokens are prefilled 10 a step, the sample that runs gets a token every step."""
    engine = Engine(model, [EOS], decode=str, prefill_tokens=10)
    short = engine.add([5, 6], [1], SamplingParams(max_tokens=30, ignore_eos=True))
    engine.step()
    long = engine.add([7] * 100, [2], SamplingParams(max_tokens=5, ignore_eos=True))
    for step in range(10):
        events = engine.step()
        assert [e.request_id for e in events][:1] == [short]
        assert (long in [e.request_id for e in events]) == (step == 9)


def test_a_finished_slot_is_refilled_in_the_same_step(model):
    engine = Engine(model, [EOS], decode=str, max_batch_size=2)
    lengths = [2, 5, 3, 3]
    for n in lengths:
        engine.add([5, 6], [n], SamplingParams(max_tokens=n, ignore_eos=True))
    running = []
    while engine.has_work:
        engine.step()
        running.append(engine.stats.num_running)
    # the prompt's step gives a token too; both slots are in use until nothing waits
    assert running == [2, 2, 2, 2, 1, 0]


def test_abort(model):
    engine = Engine(model, [EOS], decode=str, max_batch_size=3, prefix_cache=False)
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    kept, dropped = engine.add([5] * 20, [1, 2], sampling), engine.add([6] * 20, [3, 4], sampling)
    for _ in range(4):
        engine.step()
    engine.abort(dropped)
    engine.abort(dropped)
    engine.abort(12345)
    events = engine.step()
    aborted = [e for e in events if e.finish_reason == "abort"]
    assert [(e.request_id, e.sample) for e in aborted] == [(dropped, 0), (dropped, 1)]
    assert {e.request_id for e in events if e.finish_reason is None} == {kept}
    while engine.has_work:
        assert {e.request_id for e in engine.step()} == {kept}
    assert_nothing_held(engine)


def test_soak(model):
    """Thousands of requests of all kinds through a small cache: no block is left, and no memory."""
    import resource

    engine = Engine(
        model, [EOS], decode=str, max_batch_size=16, prefill_tokens=64,
        cache_bytes=24 * block_bytes(model),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    finished, added, peaks = 0, 0, []
    while added < 3000 or engine.has_work:
        while added < 3000 and engine.stats.num_waiting < 20:
            prompt = [int(rng.integers(4, 9))] * 20 + rng.integers(4, 97, rng.integers(40)).tolist()
            sampling = SamplingParams(
                max_tokens=int(rng.integers(1, 30)), top_k=int(rng.integers(3))
            )
            request = engine.add(prompt, range(int(rng.integers(1, 4))), sampling,
                                 stream=bool(rng.integers(2)))  # fmt: skip
            added += 1
            if rng.random() < 0.05:
                engine.abort(request)
        finished += sum(e.finish_reason is not None for e in engine.step())
        if added % 500 == 0:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert finished >= 3000
    assert_nothing_held(engine)
    assert engine.stats.preemptions > 0 < engine.stats.prefix_hits
    assert peaks[-1] - peaks[len(peaks) // 2] < 20_000  # KiB, in the second half
