"""Every sampling parameter through the engine, streaming against generate, and bad input."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_policy

from r1fast.config import load_config
from r1fast.rollout.engine import Engine
from r1fast.rollout.result import best_completions
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.speculation import Speculation
from r1fast.types import Completion, Problem

EOS = 3
PROMPT = [5, 6, 7, 8]


def words(ids):
    """One letter a token, so that texts and tokens can be compared by eye."""
    return "".join(chr(97 + t % 26) for t in ids)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    return Engine(model, [EOS], decode=words, max_batch_size=64)


def generate(engine, G=8, prompt=PROMPT, **sampling):
    options = {key: sampling.pop(key) for key in ("return_entropy", "seed") if key in sampling}
    params = SamplingParams(**{"max_tokens": 20} | sampling)
    return engine.generate([prompt], G, params, **options)[0].completions


def test_a_ban_and_a_push_by_logit_bias(engine):
    banned = generate(engine, logit_bias=dict.fromkeys(range(50), -math.inf), ignore_eos=True)
    assert min(t for c in banned for t in c.token_ids) >= 50
    pushed = generate(engine, logit_bias={60: 100.0})
    assert all(set(c.token_ids) == {60} for c in pushed)
    # the policy's log-probability stays what the model says; the other is what was sampled from
    free = generate(engine, temperature=0, max_tokens=1, top_logprobs=64)[0]
    at_60 = dict(free.top_logprobs[0]).get(60)
    if at_60 is not None:
        assert pushed[0].logprobs[0] == pytest.approx(at_60, abs=1e-5)
    assert pushed[0].logprobs[0] < -0.5 < pushed[0].truncated_logprobs[0] <= 0


def test_min_tokens_bans_every_way_to_stop(engine):
    push = {EOS: 50.0, 9: 50.0}
    for c in generate(engine, min_tokens=6, stop_token_ids=(9,), logit_bias=push):
        assert c.finish_reason == "stop"
        assert len(c.token_ids) == 7
        assert not {EOS, 9} & set(c.token_ids[:6])
        assert c.stop_reason == c.token_ids[-1]


def test_stop_token_ids_and_ignore_eos(engine):
    free = generate(engine, ignore_eos=True, max_tokens=30)
    assert all(len(c.token_ids) == 30 and c.finish_reason == "length" for c in free)
    stop = free[0].token_ids[4]
    stopped = generate(engine, ignore_eos=True, max_tokens=30, stop_token_ids=(stop, 96))
    for a, b in zip(stopped, free, strict=True):
        ends = [i for i, t in enumerate(b.token_ids) if t in (stop, 96)]
        n = ends[0] + 1 if ends else 30
        assert a.token_ids == b.token_ids[:n]
        assert a.stop_reason == (b.token_ids[n - 1] if ends else None)


def test_repetition_penalty_is_the_formula(model, engine):
    """Greedy, step by step, against logits of the model's own forward."""
    from r1fast.kernels.attention import PackedAttention

    (c,) = generate(engine, G=1, temperature=0, repetition_penalty=1.7, max_tokens=12)
    ids = list(PROMPT)
    for token in c.token_ids:
        n = len(ids)
        attend = PackedAttention(torch.tensor([0, n], dtype=torch.int32), n)
        with torch.no_grad():
            hidden = model(torch.tensor(ids), torch.arange(n), attend)[-1]
            logits = model.head_weight @ hidden
        seen = torch.tensor(sorted(set(ids)))
        x = logits[seen]
        logits[seen] = torch.where(x > 0, x / 1.7, x * 1.7)
        assert token == int(logits.argmax())
        ids.append(token)


@pytest.mark.parametrize(
    "params",
    [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}, {"top_k": 10, "top_p": 0.8, "min_p": 0.1}],
)
def test_truncated_logprobs(engine, params):
    for c in generate(engine, temperature=0.8, top_logprobs=64, return_entropy=True, **params):
        assert len(c.truncated_logprobs) == len(c.logprobs) == len(c.entropies) == len(c.token_ids)
        for lp, cut, top, token in zip(
            c.logprobs, c.truncated_logprobs, c.top_logprobs, c.token_ids, strict=True
        ):
            assert lp <= cut + 1e-6 <= 2e-6
            assert [x for _, x in top] == sorted((x for _, x in top), reverse=True)
            kept = np.exp([x for _, x in top])
            if "min_p" in params:
                kept = kept[kept >= params["min_p"] * kept[0] - 1e-7]
            if params == {"top_k": 3}:
                assert cut == pytest.approx(lp - math.log(kept[:3].sum()), abs=1e-4)
                assert token in [t for t, _ in top[:3]]
            if params == {"min_p": 0.4}:
                assert cut == pytest.approx(lp - math.log(kept.sum()), abs=1e-4)
    plain = generate(engine)[0]
    assert plain.truncated_logprobs == plain.top_logprobs == []


def test_mixed_parameters_in_one_batch(model, engine):
    """Requests with other parameters beside it change nothing of a request."""
    params = [
        SamplingParams(0.7, max_tokens=12), SamplingParams(top_k=4, max_tokens=9),
        SamplingParams(temperature=0, max_tokens=15, stop=("c",)),
        SamplingParams(repetition_penalty=1.3, max_tokens=10, min_tokens=4),
        SamplingParams(logit_bias={60: 3.0}, top_logprobs=2, max_tokens=8),
    ]  # fmt: skip
    alone = []
    for i, p in enumerate(params):
        fresh = Engine(model, [EOS], decode=words)
        alone += fresh.generate([PROMPT], None, p, seeds=[[i, i + 100]])[0].completions
    ids = [engine.add(PROMPT, [i, i + 100], p, stream=False) for i, p in enumerate(params)]
    events = {}
    while engine.has_work:
        events |= {(e.request_id, e.sample): e for e in engine.step()}
    for n, expected in enumerate(alone):
        event = events[ids[n // 2], n % 2]
        assert event.token_ids == expected.token_ids
        assert event.text == expected.text
        assert event.finish_reason == expected.finish_reason
        assert event.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_stop_strings_across_tokens(engine):
    free = generate(engine, max_tokens=30, ignore_eos=True)
    text = free[0].text
    stop = text[3:6]
    stopped = generate(engine, max_tokens=30, ignore_eos=True, stop=(stop,))
    assert stopped[0].text == text[: text.index(stop)]
    assert (stopped[0].finish_reason, stopped[0].stop_reason) == ("stop", stop)
    # the tokens are kept as they were drawn, those of the stop string too
    assert stopped[0].token_ids == free[0].token_ids[: text.index(stop) + 3]
    late = generate(engine, max_tokens=30, ignore_eos=True, stop=(stop,), min_tokens=29)
    assert len(late[0].token_ids) >= 29


def test_streaming_gives_what_generate_gives(engine):
    sampling = SamplingParams(max_tokens=25, stop=("ab", "q"), top_logprobs=2, top_k=20)
    groups = engine.generate([PROMPT, [9, 10]], 4, sampling, seed=5, return_entropy=True)
    parts = {}
    for event in engine.stream([PROMPT, [9, 10]], 4, sampling, seed=5, return_entropy=True):
        parts.setdefault((event.request_id, event.sample), []).append(event)
    assert not engine.has_work
    for p, group in enumerate(groups):
        for g, c in enumerate(group.completions):
            events = parts[p, g]
            assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
            assert all(len(e.token_ids) == 1 for e in events)
            assert [t for e in events for t in e.token_ids] == c.token_ids
            assert "".join(e.text for e in events) == c.text
            assert [x for e in events for x in e.logprobs] == pytest.approx(c.logprobs, abs=1e-5)
            assert len([x for e in events for x in e.top_logprobs]) == len(c.token_ids)
            assert len([x for e in events for x in e.entropies]) == len(c.entropies)
            assert (events[-1].finish_reason, events[-1].stop_reason) == (
                c.finish_reason, c.stop_reason,
            )  # fmt: skip
    assert any(c.stop_reason in ("ab", "q") for g in groups for c in g.completions)


def test_a_stream_that_is_left_early_holds_nothing(engine):
    stream = engine.stream([PROMPT], 3, SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    engine.step()
    assert not engine.has_work
    assert engine.stats.blocks_used == 0


def test_on_token_and_problems(engine):
    seen, problems = [], [Problem("a", "1", "p0"), Problem("b", "2", "p1")]
    groups = engine.generate(
        [PROMPT, [9]], 2, SamplingParams(max_tokens=6), problems=problems, on_token=seen.append
    )
    assert [g.problem.id for g in groups] == ["p0", "p1"]
    assert groups[1].prompt_ids == [9]
    assert sum(len(e.token_ids) for e in seen) == sum(
        len(c.token_ids) for g in groups for c in g.completions
    )


def test_text_of_a_real_tokenizer():
    """Streamed pieces join to the decoded text; characters that tokens cut are whole."""
    policy = tiny_policy()
    engine = Engine.of(policy, load_config(None).rollout)
    for seed in range(3):
        sampling = SamplingParams(max_tokens=60)
        events = list(engine.stream([[40, 41, 42]], 4, sampling, seed=seed))
        for g in range(4):
            ids = [t for e in events if e.sample == g for t in e.token_ids]
            assert "".join(e.text for e in events if e.sample == g) == policy.decode(ids)


def test_best_of():
    def completion(*logprobs, reason="stop"):
        return Completion([1] * len(logprobs), list(logprobs), reason)

    short, long, broken = completion(-1.0), completion(-0.4, -0.4, -0.4), completion(reason="error")
    assert best_completions([broken, long, short], 1) == [short]
    assert best_completions([broken, short, long], 1, "mean") == [long]
    assert best_completions([broken, short, long], 3) == [short, long, broken]
    with pytest.raises(ValueError, match="best 4 of 3"):
        best_completions([broken, short, long], 4)
    with pytest.raises(ValueError, match="sum or mean, got 'max'"):
        best_completions([short], 1, "max")


def test_drafts():
    s = Speculation(3, ngram=3, min_ngram=2)
    assert s.lookup(np.array([1, 2, 3, 4, 5, 1, 2, 3])).tolist() == [4, 5, 1]
    assert s.lookup(np.array([1, 2, 9, 8, 2, 7, 1, 2])).tolist() == [9, 8, 2]
    assert s.lookup(np.array([7, 2, 9, 8, 1, 2])).tolist() == []  # one token is not enough
    assert s.lookup(np.array([5, 1, 2, 3, 8, 6, 1, 2, 9, 5, 1, 2])).tolist() == [3, 8, 6]  # longest
    assert s.lookup(np.array([1, 1, 1, 1])).tolist() == [1]  # where it ends
    assert s.lookup(np.array([1])).tolist() == []
    assert Speculation(2, 1, 1).lookup(np.array([4, 5, 4])).tolist() == [5, 4]
    for bad in ({"num_draft": 0}, {"ngram": 1}, {"min_ngram": 0}):
        with pytest.raises(ValueError, match="must be"):
            Speculation(**bad)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_speculation_gives_the_same_tokens(model, temperature):
    """Exact: every position is drawn with its own uniform number, drafted or not."""
    prompts = [[5, 6, 7] * 8, [9, 9, 9, 9], [12, 13]]
    sampling = SamplingParams(temperature, max_tokens=60)
    plain = Engine(model, [EOS]).generate(prompts, 4, sampling)
    engine = Engine(model, [EOS], speculation=Speculation(4, 2, 1))
    drafted = engine.generate(prompts, 4, sampling)
    for a, b in zip(plain, drafted, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.token_ids == y.token_ids
            assert x.finish_reason == y.finish_reason
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
    assert engine.stats.accepted > 0
    tokens = sum(len(c.token_ids) for g in drafted for c in g.completions)
    assert engine.stats.decode_tokens == tokens


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        ({"ignore_eos": "no"}, "ignore_eos must be true or false, got .no."),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ({"stop": "end"}, "stop must be a tuple of strings that are not empty, got 'end'"),
        ({"stop": ("",)}, "stop must be"),
        ({"stop": (5,)}, r"stop must be a tuple of strings that are not empty, got \(5,\)"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids must be a tuple of token ids"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens must be in \[0, max_tokens\], got 9"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must be a mapping of token ids to numbers"),
        ({"logit_bias": [1]}, "logit_bias must be"),
        ({"top_logprobs": 65}, r"top_logprobs must be in \[0, 64\], got 65"),
        ({"top_k": True}, "top_k must be at least 0 .*, got True"),
        ({"top_k": np.True_}, "top_k must be at least 0 .*, got np.True_"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_p": "1"}, "top_p must be a number, got '1'"),
        ({"logit_bias": {True: 1.0}}, "logit_bias must be"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a tuple of token ids, got 5"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
    ],
)
def test_bad_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**kwargs)


def test_numbers_of_numpy_become_plain():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(5),
        max_tokens=np.uint8(9),
        stop_token_ids=[np.int32(4)],
        logit_bias={np.int64(3): np.float32(-math.inf), 4: 1},
    )
    assert params == SamplingParams(
        temperature=0.5,
        top_k=5,
        max_tokens=9,
        stop_token_ids=(4,),
        logit_bias={3: -math.inf, 4: 1.0},
    )
    numbers = [params.temperature, *params.logit_bias.values()]
    assert {type(x) for x in numbers} == {float}
    counts = [params.top_k, params.max_tokens, *params.stop_token_ids, *params.logit_bias]
    assert {type(x) for x in counts} == {int}


def test_what_the_caller_does_to_a_bias_later_changes_nothing(engine):
    bias, stops = {60: 100.0}, ["zz"]
    params = SamplingParams(max_tokens=4, logit_bias=bias, stop=stops)
    engine.add(PROMPT, [1], params, stream=False)
    engine.step()
    bias[99_999] = 2.0
    stops.append("a")
    events = engine.step() + engine.step() + engine.step()
    assert [e.token_ids for e in events] == [[60] * 4]
    assert params.stop == ("zz",)


def test_bad_requests_name_themselves_and_leave_the_rest(model, engine):
    good = engine.add(PROMPT, [1], SamplingParams(max_tokens=5))
    for ids, sampling, message in (
        ([], {}, "^chat 7 is empty"),
        ([5, 97], {}, r"^chat 7 has a token id outside \[0, 97\): 5..97"),
        ([5] * 128, {}, "^chat 7 has 128 tokens and fills the model's context of 128"),
        ([5], {"stop_token_ids": (97,)}, "^chat 7 has stop_token_ids with token 97, outside"),
        ([5], {"logit_bias": {-1: 1.0}}, "^chat 7 has logit_bias with token -1, outside"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(ids, [1], SamplingParams(**sampling), name="chat 7")
    with pytest.raises(ValueError, match="made without `decode`"):
        Engine(model, [EOS]).add([5], [1], SamplingParams(stop=("x",)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert {e.request_id for e in events} == {good}
    assert events[-1].finish_reason


def test_one_bad_prompt_of_several_leaves_none_behind(engine):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([PROMPT, []], 2, SamplingParams())
    assert not engine.has_work
    assert engine.step() == []


def test_a_cache_too_small_for_one_sequence(model):
    bytes_a_block = 2 * 2 * 2 * 8 * 16 * 4
    engine = Engine(model, [EOS], cache_bytes=2 * bytes_a_block)
    with pytest.raises(
        ValueError,
        match=r"prompt 0 needs 3 blocks .* there are 2 of 16 positions: give the cache 12288",
    ):
        engine.generate([[5] * 20], 1, SamplingParams(max_tokens=20))
    assert len(engine.generate([[5] * 20], 3, SamplingParams(max_tokens=12))[0].completions) == 3
    with pytest.raises(ValueError, match="holds no block: one of 16 positions takes 4096 bytes"):
        Engine(model, [EOS], cache_bytes=100).generate([[5]], 1, SamplingParams())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"prefill_tokens": 0}, "prefill_tokens must be at least 1, got 0"),
        ({"eos_ids": [97]}, r"end-of-sequence id 97 is outside \[0, 97\)"),
    ],
)
def test_bad_engines(model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, **{"eos_ids": [EOS]} | options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_prompt_with_broken_logits_is_alone(bad):
    """Token 96 has a broken embedding: the prompt that holds it fails, the others are as without it."""
    broken = tiny_model("llama", tie_word_embeddings=False)
    prompts = [PROMPT, [5, 96, 6], [9, 10]]
    ban = SamplingParams(max_tokens=10, logit_bias={96: -math.inf})
    expected = Engine(broken, [EOS]).generate(prompts, 3, ban)
    with torch.no_grad():
        broken.embed.weight[96] = bad
    engine = Engine(broken, [EOS])
    groups = engine.generate(prompts, 3, ban)
    for p in (0, 2):
        assert [c.token_ids for c in groups[p].completions] == [
            c.token_ids for c in expected[p].completions
        ]
    for g, c in enumerate(groups[1].completions):
        assert (c.finish_reason, c.token_ids) == ("error", [])
        assert c.error == (
            f"prompt 1, sample {g}: the model's logits are not finite: its weights have diverged"
        )
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**63}, {"top_k": 1.5}, {"max_tokens": 2**40}, {"top_logprobs": 1.5},
        {"temperature": 1e-39}, {"temperature": 1e39}, {"repetition_penalty": 1e-300},
        {"logit_bias": {3: math.inf}}, {"logit_bias": {3: 10**400}},
        {"stop": ("x",) * 1000}, {"stop_token_ids": tuple(range(1000))},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_arithmetic_cannot_hold_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must"):
        SamplingParams(**values)


def test_what_add_refuses_leaves_the_engine_as_it_was(model):
    engine = Engine(model, [EOS])
    mate = engine.add(PROMPT, [1, 2], SamplingParams(max_tokens=5))
    for prompt, seeds in ((PROMPT, [2**63]), ([1.5, 2.0], [1]), ("ab", [1])):
        with pytest.raises(ValueError, match="bad"):
            engine.add(prompt, seeds, SamplingParams(), name="bad")
    reasons = []
    while engine.has_work:
        reasons += [e.finish_reason for e in engine.step() if e.request_id == mate]
    assert sum(r is not None for r in reasons) == 2
    with pytest.raises(ValueError, match="block_size must be a multiple of 16, got 8"):
        Engine(model, [EOS], block_size=8)


def test_a_request_that_bans_every_token_is_refused(engine):
    V = engine.model.spec.vocab_size
    but_eos = {t: -math.inf for t in range(V) if t != EOS}
    for params, fault in (
        (SamplingParams(logit_bias=but_eos | {EOS: -math.inf}), "logit_bias"),
        (SamplingParams(logit_bias=but_eos, min_tokens=2), "logit_bias and min_tokens"),
    ):
        with pytest.raises(ValueError, match=f"^mine bans every .* {V} tokens by its {fault}$"):
            engine.add(PROMPT, [1], params, name="mine")
    assert not engine.has_work
    only = generate(engine, logit_bias=but_eos | {60: 0.0, EOS: -1.0}, min_tokens=2)
    assert {t for c in only for t in c.token_ids[:2]} == {60}
    flat = generate(engine, logit_bias=dict.fromkeys(range(V), -100.0))  # shifts every logit alike
    assert [c.finish_reason for c in flat] != ["error"] * len(flat)


def test_logits_that_are_not_finite_are_the_models_fault_with_a_bias_too():
    model = tiny_model()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="weights have diverged"):
        generate(Engine(model, [EOS]), logit_bias={5: 1.0}, repetition_penalty=1.1)


def test_a_penalty_beyond_float32_is_not_the_models_fault():
    """Requests that allow one token each: where its logit is negative, the penalty makes it -inf."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.head_weight.mul_(1e34)  # logits up to 1e35: finite
    engine, V = Engine(model, [EOS], decode=words), model.spec.vocab_size
    for t in range(20):
        bans = {i: -math.inf for i in range(V) if i != t}
        sampling = SamplingParams(
            max_tokens=3, ignore_eos=True, logit_bias=bans, repetition_penalty=1e6
        )
        engine.add(list(range(V)), [1, 2], sampling, name=f"request of {t}")
    events = []
    while engine.has_work:
        events += engine.step()
    ends = [e for e in events if e.finish_reason]
    assert {e.finish_reason for e in ends} == {"error", "length"}
    for e in ends:
        expected = f"request of {e.request_id - 1}, sample {e.sample}: its own logit_bias and "
        expected += "repetition_penalty left no token with a finite logit"
        assert e.error == (expected if e.finish_reason == "error" else "")


def test_aborts_inside_on_token(engine):
    """What is aborted ends as such in the result, and its events reach nobody later."""
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    before = engine.add(
        PROMPT, [9], sampling
    )  # so generate's requests are before + 1 and before + 2
    seen = []

    def on_token(event):
        seen.append(event)
        if len(seen) == 5:
            engine.abort(before + 1)

    groups = engine.generate([PROMPT, [9, 8]], 2, sampling, on_token=on_token)
    assert [[c.finish_reason for c in g.completions] for g in groups] == [
        ["abort"] * 2, ["length"] * 2,
    ]  # fmt: skip
    assert [len(c.token_ids) for c in groups[1].completions] == [20, 20]
    for i, group in enumerate(groups):
        for j, c in enumerate(group.completions):
            shown = [t for e in seen if (e.request_id, e.sample) == (i, j) for t in e.token_ids]
            assert c.token_ids == shown
    everything = engine.generate([PROMPT], 2, sampling, on_token=lambda e: engine.abort(before + 3))
    assert [c.finish_reason for c in everything[0].completions] == ["abort"] * 2
    assert not engine.has_work


def test_nobody_gets_events_of_a_call_that_was_left(engine):
    mine = engine.add(PROMPT, [9], SamplingParams(max_tokens=20, ignore_eos=True))
    stream = engine.stream([PROMPT], 2, SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    stream.close()
    with pytest.raises(ZeroDivisionError):
        engine.generate([PROMPT], 2, SamplingParams(ignore_eos=True), on_token=lambda e: 1 / 0)
    while engine.has_work:
        assert {e.request_id for e in engine.step()} == {mine}
