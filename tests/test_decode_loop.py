"""Several decode steps in one C++ call: the tokens, numbers and events of single steps, drawn by `draw`."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny import tiny_model

from r1fast.rollout.engine import Engine
from r1fast.rollout.native import NativeForward, is_supported
from r1fast.rollout.runner import Runner
from r1fast.rollout.sampler import SamplingParams

pytestmark = pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")
EOS = 3
PROMPTS = [[5, 6, 7, 8], [9], list(range(10, 40)), [21, 22] * 8]
SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cut": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "stop tokens": {"stop_token_ids": (30, 31, 32)},
    "no end token": {"ignore_eos": True},
}


def run(model, at_once, *, sampling=None, lengths=None, samples=3, prompts=PROMPTS, **options):
    """(request, sample) -> its events, and the engine after it."""
    engine = Engine(model, [EOS], **options)
    sampling = sampling or SamplingParams(max_tokens=40)
    for i, prompt in enumerate(prompts):
        engine.add(
            prompt, [100 * i + g for g in range(samples)], sampling, stream=False,
            return_entropy=True, lengths=lengths,
        )  # fmt: skip
    events, num_calls = {}, 0
    while engine.has_work:
        num_calls += 1
        for event in engine.step(at_once):
            events.setdefault((event.request_id, event.sample), []).append(asdict(event))
    return events, engine, num_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_many_at_once_are_single_steps(settings, dtype, monkeypatch):
    model = tiny_model().to(dtype)
    sampling = SamplingParams(max_tokens=40, **SETTINGS[settings])
    many, engine, calls = run(model, 64, sampling=sampling)
    single, stepped, single_calls = run(model, 1, sampling=sampling)
    monkeypatch.setattr(Runner, "can_decode_many", lambda runner, rows: False)
    drawn, _, drawn_calls = run(model, 64, sampling=sampling)
    assert many == single == drawn
    assert calls < single_calls <= drawn_calls
    for name in ("decode_steps", "decode_tokens", "prefill_tokens", "peak_blocks"):
        assert getattr(engine.stats, name) == getattr(stepped.stats, name), name
    assert engine.stats.blocks_used == 0


def test_a_freed_slot_is_refilled_at_once():
    """Others wait: no step goes on without the one that could begin."""
    model, lengths = tiny_model(), [3, 17, 9, 30]
    options = {"samples": 4, "lengths": lengths, "max_batch_size": 3}
    options["sampling"] = SamplingParams(ignore_eos=True, max_tokens=40)
    many, engine, _ = run(model, 64, **options)
    single, stepped, _ = run(model, 1, **options)
    assert many == single
    assert engine.stats.decode_steps == stepped.stats.decode_steps


def test_samples_that_wait_for_a_slot_do_not_make_steps_single():
    """A group wider than the batch: what waits cannot start before a sample ends, which ends the call."""
    sampling = SamplingParams(ignore_eos=True, max_tokens=40)
    options = {"samples": 8, "max_batch_size": 4, "prompts": [[5, 6]], "sampling": sampling}
    many, _, calls = run(tiny_model(), 64, **options)
    single, _, single_calls = run(tiny_model(), 1, **options)
    assert many == single
    assert calls <= 4 < 70 < single_calls


def test_a_full_cache_preempts_as_ever():
    model = tiny_model()
    whole, _, _ = run(model, 64)
    block = Engine(model, [EOS], cache_bytes=1 << 20)
    block._refresh()
    budget = 12 * block.scheduler.cache.block_bytes
    small, engine, _ = run(model, 64, cache_bytes=budget)
    assert engine.stats.preemptions > 0
    assert small == whole


def test_samples_that_stream_are_shown_every_token():
    engine = Engine(tiny_model(), [EOS], decode=str)
    engine.add([5, 6], [1], SamplingParams(ignore_eos=True, max_tokens=9), stream=True)
    engine.add([5, 7], [2], SamplingParams(ignore_eos=True, max_tokens=9), stream=False)
    counts = []
    while engine.has_work:
        counts += [len(e.token_ids) for e in engine.step(64) if e.request_id == 1]
    assert counts == [1] * 9


def test_a_call_comes_back_in_time(monkeypatch):
    """So that a signal is seen, and whoever wants to add a request."""
    monkeypatch.setattr("r1fast.rollout.native.MAX_SECONDS", 0.0)
    engine = Engine(tiny_model(), [EOS])
    engine.add([5], [1], SamplingParams(ignore_eos=True, max_tokens=30), stream=False)
    engine.step(64)
    engine.step(64)
    assert engine.num_decode_steps == 1
    monkeypatch.undo()
    assert [e.finish_reason for e in engine.step(64)] == ["length"]


def test_more_threads_than_cores_change_nothing():
    """A thread whose core is taken comes back to loops that are over."""
    model = tiny_model(hidden_size=64, intermediate_size=256)
    expected, _, _ = run(model, 64, samples=16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for _ in range(3):
            assert run(model, 64, samples=16)[0] == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("length", [490, 1010])
def test_a_context_that_grows_by_a_chunk_of_attention(length, monkeypatch):
    """Few rows are cut into parts for the threads; how many is settled before a chunk of 512 begins."""
    model = tiny_model(max_position_embeddings=1200)
    prompts = [[4 + i * i % 90 for i in range(length)], [5, 6]]
    options = {
        "prompts": prompts,
        "samples": 1,
        "sampling": SamplingParams(ignore_eos=True, max_tokens=40),
    }
    many, _, _ = run(model, 64, **options)
    assert many == run(model, 1, **options)[0]
    monkeypatch.setattr(Runner, "can_decode_many", lambda runner, rows: False)
    assert many == run(model, 1, **options)[0]


def test_a_row_that_is_not_finite_ends_alone():
    """Its neighbours' call ends with it, and they go on."""
    model = tiny_model("qwen3")  # its head is untied: only who has drawn such a token meets it
    with torch.no_grad():
        model.embed.weight[30:60] = torch.nan
    events, engine, _ = run(model, 64, prompts=[[5], [6], [7]])
    reasons = {e[-1]["finish_reason"] for e in events.values()}
    assert "error" in reasons
    for (event,) in events.values():
        bad = [t for t in event["token_ids"][:-1] if 30 <= t < 60]
        assert not bad
        assert np.isfinite(event["logprobs"]).all()
        drew_bad = 30 <= event["token_ids"][-1] < 60 and len(event["token_ids"]) < 40
        assert (event["finish_reason"] == "error") == drew_bad
    assert engine.stats.decode_tokens == sum(len(e["token_ids"]) for (e,) in events.values())
    assert engine.stats.blocks_used == 0


def test_bad_number_of_tokens():
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        Engine(tiny_model(), [EOS]).step(0)


def test_arrays_of_another_type_are_refused():
    """C++ writes to them where they lie: a converted copy would be lost."""
    engine = Engine(tiny_model(), [EOS])
    engine.add([5], [1], SamplingParams(max_tokens=30), stream=False)
    engine.step()
    engine.rows.logprobs = engine.rows.logprobs.astype(np.float64)
    native = engine.runner._native_of(engine.scheduler.cache)
    assert isinstance(native, NativeForward)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.decode(engine.rows, 1)
