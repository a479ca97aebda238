from itertools import zip_longest

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_policy

from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.types import Problem

EOS = 3
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [21, 22], [23] * 30]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


OPTIONS = ("cache_bytes", "prefix_cache", "prefill_tokens", "batch_invariant", "speculation")


def generate(model, prompts=PROMPTS, G=3, *, seed=0, slots=64, max_tokens=20, **kwargs):
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    engine = Engine(model, [EOS], max_batch_size=slots, decode=str, **options)
    seeds = [[sample_seed(seed, str(p), g) for g in range(G)] for p in prompts]
    sampling = SamplingParams(kwargs.pop("temperature", 1.0), max_tokens=max_tokens)
    groups = engine.generate(prompts, None, sampling, seeds=seeds, **kwargs)
    assert [g.prompt_ids for g in groups] == [list(p) for p in prompts]
    return [g.completions for g in groups]


def tokens(groups):
    return [[c.token_ids for c in group] for group in groups]


def test_shapes_order_and_reasons(model):
    groups = generate(model, G=8, max_tokens=40)
    assert [len(g) for g in groups] == [8] * 5
    reasons = set()
    for c in sum(groups, []):
        assert len(c.logprobs) == len(c.token_ids) <= 40
        assert c.entropies == []
        assert c.text == str(c.token_ids)  # what `decode` made of it
        assert all(0 <= t < 97 for t in c.token_ids)
        assert all(lp <= 0 for lp in c.logprobs)
        assert EOS not in c.token_ids[:-1]
        assert c.finish_reason == ("stop" if c.token_ids[-1] == EOS else "length")
        assert c.finish_reason == "stop" or len(c.token_ids) == 40
        reasons.add(c.finish_reason)
    assert reasons == {"stop", "length"}


def test_same_seed_same_tokens_and_other_seeds_differ(model):
    one, two, other = generate(model), generate(model), generate(model, seed=1)
    assert tokens(one) == tokens(two)
    assert [c.logprobs for g in one for c in g] == [c.logprobs for g in two for c in g]
    assert tokens(one) != tokens(other)
    assert len({tuple(c.token_ids) for c in one[0]}) == 3  # the samples of a prompt differ


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_slots_do_not_matter(model, slots):
    """Fewer slots than samples: they are refilled, and a group is split over several prefills."""
    expected, actual = generate(model), generate(model, slots=slots)
    assert tokens(actual) == tokens(expected)
    for a, b in zip(sum(actual, []), sum(expected, []), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_batch_mates_do_not_matter(model):
    together = tokens(generate(model))
    for i, prompt in enumerate(PROMPTS):
        assert tokens(generate(model, [prompt])) == [together[i]]
    assert tokens(generate(model, PROMPTS[::-1])) == together[::-1]


def test_prefill_in_parts(model):
    expected = tokens(generate(model))
    assert tokens(generate(model, prefill_tokens=12)) == expected


def test_engine_sees_new_weights(model):
    fresh = tiny_model()
    engine = Engine(fresh, [EOS])
    sampling = SamplingParams(max_tokens=10)
    (before,) = engine.generate([[5, 6]], None, sampling, seeds=[[1]])
    with torch.no_grad():
        fresh.norm.weight.mul_(-1)
    (after,) = engine.generate([[5, 6]], None, sampling, seeds=[[1]])
    assert before.completions[0].token_ids != after.completions[0].token_ids


def test_weights_can_be_trained_after_a_rollout(model):
    """The engine runs in inference mode; nothing that the training forward needs is left in it."""
    fresh = tiny_model()
    Engine(fresh, [EOS]).generate([[5, 6]], 1, SamplingParams(max_tokens=10))
    from r1fast.kernels.attention import PackedAttention

    ids = torch.tensor([5, 6, 7])
    fresh(ids, torch.arange(3), PackedAttention(torch.tensor([0, 3]), 3)).sum().backward()
    assert fresh.embed.weight.grad is not None


def test_several_end_tokens(model):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    (group,) = Engine(model, [EOS]).generate([[5, 6]], 1, greedy)
    (free,) = group.completions
    assert len(free.token_ids) > 4
    stop = free.token_ids[4]
    (group,) = Engine(model, [EOS, stop]).generate([[5, 6]], 1, greedy)
    (stopped,) = group.completions
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def test_one_token_each(model):
    for c in sum(generate(model, max_tokens=1), []):
        assert len(c.token_ids) == 1
        assert c.finish_reason == ("stop" if c.token_ids == [EOS] else "length")


def test_the_context_ends_a_completion(model):
    """Prompt and completion fill max_position_embeddings = 128 exactly, and no more."""
    groups = generate(model, [[7] * 120, [7] * 127, [8] * 3], G=6, max_tokens=500)
    for prompt, group in zip((120, 127, 3), groups, strict=True):
        assert all(prompt + len(c.token_ids) <= 128 for c in group)
        cut = [c for c in group if c.finish_reason == "length"]
        assert all(prompt + len(c.token_ids) == 128 for c in cut)
    assert any(c.finish_reason == "length" for c in groups[0])


def test_on_finish_counts_to_the_total(model):
    for slots in (64, 4):
        seen = []
        generate(model, slots=slots, on_finish=seen.append)
        assert seen == sorted(set(seen))
        assert seen[-1] == 15


def test_entropies_when_asked_for(model):
    for c in sum(generate(model, return_entropy=True), []):
        assert len(c.entropies) == len(c.token_ids)
        assert all(0 <= h <= 4.6 for h in c.entropies)  # log 97 = 4.57


def test_groups_of_different_size_and_none_at_all(model):
    engine, sampling = Engine(model, [EOS]), SamplingParams(max_tokens=5)
    groups = engine.generate(PROMPTS[:3], None, sampling, seeds=[[1, 2], [], [3]])
    assert [len(g.completions) for g in groups] == [2, 0, 1]
    assert engine.generate([], 4, sampling) == []
    assert engine.generate([[5]], 0, sampling)[0].completions == []


def test_fewer_decode_steps_than_tokens(model):
    engine = Engine(model, [EOS], max_batch_size=64)
    engine.generate(PROMPTS, 8, SamplingParams(max_tokens=20))
    assert engine.num_decode_steps <= 19  # the first token comes from the prefill


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], []], "prompt 1 is empty"),
        ([[5, 97]], r"prompt 0 has a token id outside \[0, 97\): 5..97"),
        ([[5], [6, -1]], r"prompt 1 has a token id outside \[0, 97\): -1..6"),
        ([[5] * 128], "prompt 0 has 128 tokens and fills the model's context of 128"),
    ],
)
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts)


@pytest.mark.parametrize(
    ("prompts", "got"),
    [
        ([5, 6], "5"),
        ([[[5, 6]]], r"\[\[5, 6\]\]"),
        ([np.array([[5, 6]])], r"array\(\[\[5, 6\]\]\)"),
        ([[[5], [6, 7]]], r"\[\[5\], \[6, 7\]\]"),
        ([[5.0]], r"\[5.0\]"),
        (["ab"], "'ab'"),
    ],
)
def test_prompts_of_another_shape(model, prompts, got):
    message = f"prompt 0 must be a list of token ids, and prompts a list of such lists; got {got}"
    with pytest.raises(ValueError, match=message):
        Engine(model, [EOS]).generate(prompts, 1, SamplingParams())


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple], ids=["numpy", "torch", "tuple"])
def test_prompts_of_other_libraries(model, make):
    prompts, sampling = [[5, 6], [7, 8]], SamplingParams(max_tokens=4)
    expected = Engine(model, [EOS]).generate(prompts, 2, sampling)
    found = Engine(model, [EOS]).generate(make(prompts), 2, sampling)
    assert found == expected
    assert [group.prompt_ids for group in found] == prompts
    assert all(type(t) is int for group in found for t in group.prompt_ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_the_engine_does_not_take(dtype):
    model = tiny_model()
    engine = Engine(model, [EOS])
    model.to(dtype)
    message = f"takes weights in torch.float32, torch.bfloat16 on cpu, got {dtype}"
    with pytest.raises(ValueError, match=message):
        engine.generate([[5]], 1, SamplingParams(max_tokens=2))
    model.to(torch.float32)
    assert engine.generate([[5]], 1, SamplingParams(max_tokens=2))[0].completions[0].token_ids


def test_a_budget_of_less_than_a_block_is_refused():
    config = tiny_config("--rollout.cache_gib=1e-10")
    engine = Engine.of(tiny_policy(), config.rollout)
    with pytest.raises(ValueError, match="a cache of 1 bytes holds no block: one of 16 positions"):
        engine.generate([[5]], 1, SamplingParams(max_tokens=2))


def test_bad_engines(model):
    with pytest.raises(ValueError, match="at least one end-of-sequence id, got none"):
        Engine(model, [])
    with pytest.raises(ValueError, match="max_batch_size must be at least 1, got 0"):
        Engine(model, [EOS], max_batch_size=0)
    with pytest.raises(ValueError, match="2 prompts need as many lists of seeds, got 1"):
        Engine(model, [EOS]).generate([[5], [6]], None, SamplingParams(), seeds=[[1]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diverged_weights_are_named(bad):
    broken = tiny_model()
    with torch.no_grad():
        broken.layers[0].o.weight[0, 0] = bad
    with pytest.raises(FloatingPointError, match="not finite: its weights have diverged"):
        generate(broken)


def test_what_a_nan_has_touched_is_not_found_again():
    """The blocks of a prompt whose logits are not finite do not stay in the prefix cache."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.embed.weight[96] = torch.nan
    engine, sampling = Engine(model, [EOS]), SamplingParams(max_tokens=2, ignore_eos=True)
    bad = [96, *range(4, 44)]
    with pytest.raises(FloatingPointError):
        engine.generate([bad], 1, sampling)
    assert engine.stats.blocks_cached == 0
    engine.generate([bad[1:]], 1, sampling)
    assert engine.stats.blocks_cached > 0


@pytest.mark.parametrize("options", [{"stream": True}, {"stop": ("never",)}, {}])
def test_a_tokenizer_that_fails_ends_its_sample_alone(options):
    def decode(ids):
        if 50 in ids:
            raise KeyError("no such piece")
        return "x" * len(ids)

    stream = options.pop("stream", False)
    engine = Engine(tiny_model(), [EOS], decode=decode)
    common = {"max_tokens": 3, "ignore_eos": True, **options}
    failing = engine.add(
        [5, 6], [1], SamplingParams(logit_bias={50: 1e5}, **common), stream=stream, name="mine"
    )
    other = engine.add([5, 7], [2], SamplingParams(logit_bias={9: 1e5}, **common), stream=stream)
    ended = {}
    while engine.has_work:
        ended |= {e.request_id: e for e in engine.step() if e.finish_reason}
    assert ended[failing].finish_reason == "error"
    assert "mine, sample 0: its tokens cannot be decoded to text (KeyError" in ended[failing].error
    assert ended[other].finish_reason == "length"
    assert engine.stats.blocks_used == 0


def test_calls_may_take_turns_on_one_engine(model):
    """A callback that generates, two streams at once, a stream with a call amid it: all are whole."""
    sampling, one, two = SamplingParams(max_tokens=9), PROMPTS[:2], PROMPTS[2:4]
    engine = Engine(model, [EOS], decode=str)
    expected = [tokens(groups_of(engine.generate(p, 2, sampling))) for p in (one, two)]
    inner = []

    def generates(event):
        if not inner:
            inner.append(engine.generate(two, 2, sampling))

    outer = engine.generate(one, 2, sampling, on_token=generates)
    assert [tokens(groups_of(g)) for g in (outer, inner[0])] == expected

    first, second = engine.stream(one, 2, sampling), engine.stream(two, 2, sampling)
    met = [next(first)], [next(second)]
    inner = engine.generate(two, 2, sampling)
    for pair in zip_longest(first, second):
        for events, event in zip(met, pair, strict=True):
            events += [event] if event else []
    for events, whole in zip(met, expected, strict=True):
        found = [[[] for _ in group] for group in whole]
        for event in events:
            found[event.request_id][event.sample] += event.token_ids
        assert found == whole
        assert sum(e.finish_reason is not None for e in events) == 4
    assert tokens(groups_of(inner)) == expected[1]
    assert not engine.has_work
    assert not engine._events


def groups_of(groups):
    return [group.completions for group in groups]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"problems": [Problem("")]}, "2 prompts need as many problems, got 1"),
        ({"seeds": [[1, 2], [3]]}, "num_generations = 2 needs as many seeds .* got .2, 1."),
        ({"seeds": [[1, 2.5], [3, 4]]}, "prompt 0 has a seed that is no integer: 2.5"),
        ({"sampling": {"max_tokens": 3}}, "prompt 0 needs SamplingParams .* got dict"),
        ({"sampling": None}, "prompt 0 needs SamplingParams .* got NoneType"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_anything_is_sampled(model, wrong, message):
    engine = Engine(model, [EOS])
    options = {"sampling": SamplingParams(max_tokens=3)} | wrong
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS[:2], 2, **options, on_finish=pytest.fail)
    assert not engine.has_work


@pytest.mark.parametrize(
    "wrong", [{"max_batch_size": 1.5}, {"cache_bytes": 1e6}, {"prefill_tokens": "9"}]
)
def test_an_engine_of_no_integer_is_refused(model, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer"):
        Engine(model, [EOS], **wrong)
