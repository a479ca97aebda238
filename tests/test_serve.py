"""The server on a loopback port, asked by the real `openai` client."""

import asyncio
import http.client
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
from tiny import EOS, tiny_checkpoint, tiny_policy

from r1fast.__main__ import main
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.templates import encode_text

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from r1fast.serve.app import Limits, Service  # noqa: E402
from r1fast.serve.connection import LEAST, Connection  # noqa: E402
from r1fast.serve.reader import LONG, MAX_LONG  # noqa: E402
from r1fast.serve.server import ServeOptions, _is_no_lost_client  # noqa: E402

MODEL = "tiny"
CONTEXT, VOCAB = 2048, 320
LIMITS = Limits(max_samples=64, max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(max_position_embeddings=CONTEXT)


def make_engine(policy, **options) -> Engine:
    return Engine(policy.model, policy.eos_ids, decode=policy.decode, **options)


@contextmanager
def running(service: Service, **connection):
    """The base URL of `service`, served by a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if connection:  # the kernel is to keep little of what a client does not read
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = uvicorn.Server(
            uvicorn.Config(
                service.app(),
                http=partial(Connection, **connection),
                log_level="critical",
                timeout_graceful_shutdown=5,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def service(policy):
    return Service(policy, make_engine(policy), MODEL, LIMITS)


@pytest.fixture(scope="module")
def url(service):
    with running(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def post(url: str, body, path: str = "/completions", **headers) -> tuple[int, dict]:
    """Status and JSON of a request that the client would not send."""
    host, _, prefix = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(
        "POST", f"/{prefix}{path}", raw, {"content-type": "application/json"} | headers
    )
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer)


def by_engine(policy, prompt_ids, num, sampling, seed):
    """What the engine itself makes of a request with `seed`."""
    seeds = [[sample_seed("serve", seed, 0, j) for j in range(num)]]
    return make_engine(policy).generate([prompt_ids], num, sampling, seeds=seeds)[0].completions


def streamed(chunks) -> dict[int, dict]:
    """What the chunks of a stream add up to, for each choice."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            new = {"text": "", "ids": [], "tops": [], "logprobs": [], "offsets": []}
            of = found.setdefault(choice.index, new)
            of["text"] += choice.text if hasattr(choice, "text") else choice.delta.content or ""
            of["ids"] += getattr(choice, "token_ids", None) or []
            if choice.logprobs is not None and hasattr(choice, "text"):
                of["logprobs"] += choice.logprobs.token_logprobs
                of["tops"] += choice.logprobs.top_logprobs or []
                of["offsets"] += choice.logprobs.text_offset
            elif choice.logprobs is not None:
                of["logprobs"] += [entry.logprob for entry in choice.logprobs.content]
            assert "reason" not in of, "a chunk came behind the last one"
            if choice.finish_reason:
                of["reason"] = choice.finish_reason
    return found


def test_a_completion_is_the_engines(client, policy):
    prompt = encode_text("What is 1 + 1?", policy.tokenizer)
    expected = by_engine(policy, prompt, 3, SamplingParams(max_tokens=12, top_logprobs=2), seed=7)
    for given in ("What is 1 + 1?", prompt):
        answer = client.completions.create(
            model=MODEL, prompt=given, n=3, max_tokens=12, seed=7, logprobs=2,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert answer.object == "text_completion"
        assert answer.model == MODEL
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in expected)
        for choice, own in zip(answer.choices, expected, strict=True):
            assert choice.token_ids == own.token_ids
            assert choice.prompt_token_ids == prompt
            assert choice.text == own.text
            assert choice.finish_reason == own.finish_reason
            assert choice.logprobs.token_logprobs == pytest.approx(own.logprobs, abs=1e-5)
            names = [policy.tokenizer.decode([t]) for t in own.token_ids]
            assert choice.logprobs.tokens == names
            offsets = choice.logprobs.text_offset
            ends = [*offsets[1:], len(own.text)]
            assert offsets[0] == 0
            assert offsets == sorted(offsets)
            for name, begin, end in zip(names, offsets, ends, strict=True):
                assert "\ufffd" in name or name in (own.text[begin:end], EOS)
            for top, row in zip(choice.logprobs.top_logprobs, own.top_logprobs, strict=True):
                assert {policy.tokenizer.decode([t]) for t, _ in row} <= set(top)
                assert max(top.values()) == pytest.approx(row[0][1], abs=1e-5)


def test_a_chat_is_the_template_and_the_engine(client, policy):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    text = "<|system|>Be brief.\n<|user|>1 + 1?\n<|assistant|>"
    prompt = encode_text(text, policy.tokenizer, add_special_tokens=False)
    sampling = SamplingParams(0.7, max_tokens=10, top_logprobs=3)
    expected = by_engine(policy, prompt, 2, sampling, seed=1)
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}]
    for given in (messages, parts):
        answer = client.chat.completions.create(
            model=MODEL, messages=given, n=2, max_completion_tokens=10, seed=1, temperature=0.7,
            logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert answer.prompt_token_ids == prompt
        for choice, own in zip(answer.choices, expected, strict=True):
            assert choice.message.role == "assistant"
            assert choice.message.content == own.text
            assert choice.token_ids == own.token_ids
            content = choice.logprobs.content
            assert [e.logprob for e in content] == pytest.approx(own.logprobs, abs=1e-5)
            for entry, token, row in zip(content, own.token_ids, own.top_logprobs, strict=True):
                assert entry.token == policy.tokenizer.decode([token])
                assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
                assert [t.logprob for t in entry.top_logprobs] == pytest.approx(
                    [lp for _, lp in row], abs=1e-5
                )


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_adds_up_to_the_whole(client, chat):
    settings = {
        "model": MODEL, "n": 3, "max_tokens": 25, "seed": 3, "stop": ["e", "12"],
        "extra_body": {"return_token_ids": True, "repetition_penalty": 1.1},
    }  # fmt: skip
    if chat:
        create = client.chat.completions.create
        settings |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    else:
        create = client.completions.create
        settings |= {"prompt": ["What is", "Why?"], "logprobs": 1}
    whole = create(**settings)
    chunks = list(create(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    found = streamed(chunks)
    assert sorted(found) == list(range(3 if chat else 6))
    for choice in whole.choices:
        of = found[choice.index]
        assert of["text"] == (choice.message.content if chat else choice.text)
        assert of["ids"] == choice.token_ids
        assert of["reason"] == choice.finish_reason
        if chat:
            assert of["logprobs"] == pytest.approx([e.logprob for e in choice.logprobs.content])
        else:
            assert of["logprobs"] == pytest.approx(choice.logprobs.token_logprobs)
            assert of["offsets"] == choice.logprobs.text_offset
            assert len(of["tops"]) == len(choice.token_ids)
    assert any(choice.finish_reason == "stop" for choice in whole.choices)


def test_a_stream_comes_in_parts(client):
    with client.completions.create(
        model=MODEL, prompt="hi", max_tokens=40, stream=True, seed=0
    ) as stream:
        times = [time.monotonic() for chunk in stream if chunk.choices[0].text]
    assert len(times) > 10


def test_seeds(client):
    def texts(**settings):
        answer = client.completions.create(model=MODEL, max_tokens=12, **settings)
        return [c.text for c in answer.choices]

    once = texts(prompt="hi", seed=5, n=2)
    assert texts(prompt="hi", seed=5, n=2) == once
    assert texts(prompt="hi", seed=6, n=2) != once
    assert texts(prompt="hi", n=2) != texts(prompt="hi", n=2)
    assert once[0] != once[1]
    # equal prompts of one request differ; the first is what it would be alone
    several = texts(prompt=["hi", "hi"], seed=5, n=2)
    assert several[:2] == once
    assert several[2:] != once


def test_sampling_settings_reach_the_engine(client, policy):
    prompt = encode_text("What is", policy.tokenizer)
    extra = {"top_k": 4, "min_p": 0.01, "repetition_penalty": 1.3, "min_tokens": 5,
             "ignore_eos": True, "stop_token_ids": [20, 21]}  # fmt: skip
    settings = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 30, "logit_bias": {"20": 1.5}}
    sampling = SamplingParams(
        0.8, 0.9, 4, 30, 0.01, 1.3, stop_token_ids=(20, 21), min_tokens=5, logit_bias={20: 1.5},
        ignore_eos=True,
    )  # fmt: skip
    (own,) = by_engine(policy, prompt, 1, sampling, seed=2)
    answer = client.completions.create(
        model=MODEL, prompt="What is", seed=2, extra_body={**extra, "return_token_ids": True},
        **settings,
    )  # fmt: skip
    assert answer.choices[0].token_ids == own.token_ids
    off = client.completions.create(model=MODEL, prompt="What is", seed=2, max_tokens=30,
                                    extra_body={"return_token_ids": True, "top_k": -1})  # fmt: skip
    assert off.choices[0].token_ids != own.token_ids


def test_stop_strings(client):
    free = client.completions.create(
        model=MODEL, prompt="hi", max_tokens=30, temperature=0.9, seed=9
    )
    text = free.choices[0].text
    stop = text[6:9]
    ended = client.completions.create(
        model=MODEL, prompt="hi", max_tokens=30, temperature=0.9, seed=9, stop=["never", stop]
    ).choices[0]
    assert ended.text == text[: text.index(stop)]
    assert ended.finish_reason == "stop"
    assert ended.stop_reason == stop


def test_echo_best_of_and_token_names(client, policy):
    settings = {"model": MODEL, "prompt": "What is", "max_tokens": 8, "seed": 4}
    plain = client.completions.create(**settings, n=4, logprobs=0)
    assert plain.choices[0].logprobs.top_logprobs is None
    echoed = client.completions.create(**settings, n=4, echo=True)
    assert [c.text for c in echoed.choices] == ["What is" + c.text for c in plain.choices]
    chunks = client.completions.create(**settings, n=4, echo=True, stream=True)
    texts = [of["text"] for _, of in sorted(streamed(chunks).items())]
    assert texts == [c.text for c in echoed.choices]
    best = client.completions.create(**settings, n=2, best_of=4, logprobs=0)
    means = sorted(
        (sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in plain.choices),
        reverse=True,
    )
    found = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in best.choices]
    assert found == pytest.approx(means[:2])
    assert best.usage.completion_tokens == plain.usage.completion_tokens
    named = client.completions.create(
        **settings, logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "return_token_ids": True},
    ).choices[0]  # fmt: skip
    assert named.logprobs.tokens == [f"token_id:{t}" for t in named.token_ids]


def test_the_context_bounds_a_chat(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], seed=0, stop=["a", "e", "1"]
    )
    assert answer.usage.total_tokens <= CONTEXT


def test_concurrent_requests_get_what_they_get_alone(client):
    """16 at once, short and long, streaming and not, equal prompts among them."""

    def ask(i: int) -> tuple:
        settings = {
            "model": MODEL, "prompt": ["What is 1 + 1?", "hi", f"number {i}"][i % 3], "n": 1 + i % 3,
            "max_tokens": 5 + 7 * (i % 5), "seed": i, "extra_body": {"return_token_ids": True},
        }  # fmt: skip
        if i % 2:
            found = streamed(client.completions.create(**settings, stream=True))
            return [(of["ids"], of["text"], of["reason"]) for _, of in sorted(found.items())]
        answer = client.completions.create(**settings)
        return [(c.token_ids, c.text, c.finish_reason) for c in answer.choices]

    alone = [ask(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(service, url, stream):
    engine = service.thread.engine
    until(lambda: engine.stats.blocks_used == 0)
    aborted = service.thread.counters["aborted_requests"]
    host = url.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(host, timeout=10)
    body = {"prompt": "hi", "n": 8, "max_tokens": 1500, "stream": stream, "ignore_eos": True}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    if stream:
        assert connection.getresponse().read(10) == b'data: {"id'
    until(lambda: engine.stats.num_running == 8)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: service.thread.counters["aborted_requests"] == aborted + 1)
    until(lambda: engine.stats.blocks_used == 0)
    assert engine.stats.num_running == engine.stats.num_waiting == service.num_samples == 0


def test_models_health_and_metrics(client, url, service):
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' does not exist here; this server has"):
        client.models.retrieve("other")
    client.completions.create(model=MODEL, prompt="hi", max_tokens=3)

    def get(path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(url.removeprefix("http://").partition("/")[0])
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    assert get("/health") == (200, '{"status":"ok","samples":0}')
    status, text = get("/metrics")
    assert status == 200
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, value in map(str.split, lines)}
    assert values["r1fast_generated_tokens_total"] > 0
    assert values["r1fast_prompt_tokens_total"] > 0
    assert values["r1fast_samples_in_flight"] == 0
    assert values["r1fast_samples_limit"] == LIMITS.max_samples
    assert values["r1fast_engine_num_blocks"] == service.thread.engine.stats.num_blocks > 0
    status, text = get("/v2")
    assert status == 404
    assert "/v1/completions" in json.loads(text)["error"]["message"]
    assert get("/v1/completions")[0] == 405


CHAT = "/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("", {}, "prompt", "prompt is missing"),
        ("", {"prompt": ""}, "prompt", "prompt is empty"),
        ("", {"prompt": []}, "prompt", "must be a text, token ids, or a list of either, got []"),
        ("", {"prompt": [[1], []]}, "prompt", "prompt[1] is empty"),
        ("", {"prompt": ["a", 3]}, "prompt", "prompt[1] must be a list of token ids, got 3"),
        ("", {"prompt": [1, 10**6]}, "prompt", "token id 1000000, the vocabulary ends at"),
        ("", {"prompt": [-1]}, "prompt", "prompt has token id -1"),
        ("", {"prompt": "\ud800"}, "prompt", "prompt is not valid Unicode"),
        ("", {"prompt": [5] * CONTEXT}, "prompt", "fills the model's context of 2048; shorten it"),
        ("", {"prompt": "a", "max_tokens": 5000}, "max_tokens", "ask for at most 2047"),
        ("", {"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        ("", {"prompt": "a", "max_tokens": "9"}, "max_tokens", "a whole number, got \"9\""),
        ("", {"prompt": "a", "temperature": -1}, "temperature", "at least 0, got -1.0"),
        ("", {"prompt": "a", "temperature": True}, "temperature", "must be a number, got true"),
        ("", {"prompt": "a", "temperature": 10**400}, "temperature", "must be a number"),
        ("", {"prompt": "a", "top_p": 0}, "top_p", "in (0, 1], got 0.0"),
        ("", {"prompt": "a", "top_k": -2}, "top_k", "at least -1, got -2"),
        ("", {"prompt": "a", "min_p": 2}, "min_p", "in [0, 1], got 2.0"),
        ("", {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ("", {"prompt": "a", "min_tokens": 99}, "min_tokens", "in [0, max_tokens], got 99"),
        ("", {"prompt": "a", "stop": [""]}, "stop", "none of them empty, got [\"\"]"),
        ("", {"prompt": "a", "stop": 5}, "stop", "got 5"),
        ("", {"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids", "got [\"x\"]"),
        ("", {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids", "outside [0, "),
        *(
            ("", {"prompt": "a", "logit_bias": {key: 1}}, "logit_bias", "must map token ids")
            for key in ("x", "", " 5", "05", "+5", "-1", "5.0", "\u0665", "9" * 5000)
        ),
        ("", {"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias", "999999, outside [0, "),
        ("", {"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias", "got \"5\": \"1\""),
        ("", {"prompt": "a", "logit_bias": {"5": 1e7}}, "logit_bias", "within 1e6"),
        ("", {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(VOCAB)), -1e9)}, "logit_bias",
         "within 1e6"),
        (CHAT, HI | {"stop_token_ids": [10**6]}, "stop_token_ids", "outside [0, "),
        ("", {"prompt": "a", "best_of": 65}, "best_of", "asks for 65 samples"),
        ("", {"prompt": ["a"] * 65}, "prompt", "has 65 prompts"),
        ("", {"prompt": [5] * CONTEXT}, "prompt", "fills the model's context of"),
        (CHAT, HI | {"max_tokens": 5, "max_completion_tokens": 9999}, "max_completion_tokens",
         "max_completion_tokens = 9999 goes beyond"),
        (CHAT, HI | {"max_tokens": 9999}, "max_tokens", "max_tokens = 9999 goes beyond"),
        ("", {"prompt": "a", "logit_bias": [1]}, "logit_bias", "must be an object, got [1]"),
        ("", {"prompt": "a", "n": 0}, "n", "n must be at least 1, got 0"),
        ("", {"prompt": "a", "n": 65}, "n", "asks for 65 samples, this server takes at most 64"),
        ("", {"prompt": "a", "n": 2, "best_of": 1}, "best_of", "at least n = 2, got 1"),
        ("", {"prompt": "a", "best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ("", {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
        ("", {"prompt": "a", "echo": True, "logprobs": 1}, "echo", "leave one of the two out"),
        ("", {"prompt": "a", "stream": "yes"}, "stream", "must be true or false, got \"yes\""),
        ("", {"prompt": "a", "stream_options": {"x": 1}}, "stream_options", "knows include_usage"),
        *(
            ("", {"prompt": "a", "stream": True, "stream_options": {"include_usage": x}},
             "stream_options", "include_usage must be true or false, got ")
            for x in ("no", 1, [])
        ),
        ("", {"prompt": "a", "stream_options": {}}, "stream_options", "needs stream = true"),
        (CHAT, HI | {"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ("", {"prompt": "a", "suffix": "z"}, "suffix", "suffix = \"z\" is not served"),
        ("", {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "is not served"),
        ("", {"prompt": "a", "skip_special_tokens": True}, "skip_special_tokens", "tags"),
        ("", {"prompt": "a", "temprature": 1}, "temprature", "unknown field 'temprature'; known:"),
        ("", {"prompt": "a", "seed": 1.5}, "seed", "a whole number, got 1.5"),
        ("", {"prompt": "a", "seed": 2**70}, "seed",
         f"seed must be from {-(2**63)} to {2**64 - 1}, got {2**70}"),
        ("", {"prompt": "a", "n": 2**70}, "n", f"asks for {2**70} samples"),
        ("", {"prompt": "a", "seed": True}, "seed", "a whole number, got true"),
        ("", [1], None, "must be a JSON object, got [1]"),
        ("", b"{", None, "not valid JSON"),
        ("", b'{"prompt": "a", "temperature": NaN}', None, "NaN is not a JSON number"),
        ("", b"[" * 100_000, None, "not valid JSON"),
        ("", b"\xff\xfe", None, "not valid JSON"),
        (CHAT, {}, "messages", "at least one message, got null"),
        (CHAT, {"messages": []}, "messages", "at least one message, got []"),
        (CHAT, {"messages": ["hi"]}, "messages", "messages[0] must be an object with a role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages", "messages[0].content must be a text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages",
         "messages[0].content must be a text or a list"),
        (CHAT, HI | {"top_logprobs": 2}, "top_logprobs", "needs logprobs = true"),
        (CHAT, HI | {"tools": [{"type": "function"}]}, "tools", "is not served"),
        (CHAT, HI | {"response_format": {"type": "json_object"}}, "response_format", "not served"),
        (CHAT, HI | {"max_completion_tokens": 9999}, "max_completion_tokens", "ask for at most"),
        (CHAT, HI | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "own"),
        (CHAT, HI | {"best_of": 2}, "best_of", "unknown field 'best_of'"),
    ],
)  # fmt: skip
def test_bad_input_is_answered_with_the_field(url, service, path, body, param, message):
    status, answer = post(url, body, path or "/completions")
    error = answer["error"]
    assert status == 400, error
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert service.num_samples == 0


def test_the_default_of_max_tokens_fits_the_context(url):
    """Nobody asked for 16 tokens, so nobody is refused for them."""
    status, answer = post(url, {"prompt": [5] * (CONTEXT - 3), "ignore_eos": True})
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 3


def test_a_long_text_holds_up_nobody(policy):
    """Others are answered while it is tokenised; too many of them are refused at once."""
    service = Service(policy, make_engine(policy), MODEL, Limits(64, 16 << 20))
    texts = {"prompt": "What is 1 + 1? " * 5000, "max_tokens": 1}
    begun, go_on = threading.Event(), threading.Event()
    tokenizer = service.reader.policy_of_long.tokenizer
    assert tokenizer is not policy.tokenizer
    encode = tokenizer.encode

    def slow(*args, **kwargs):
        begun.set()
        assert go_on.wait(30)
        return encode(*args, **kwargs)

    tokenizer.encode = slow
    with running(service) as url, ThreadPoolExecutor(MAX_LONG) as pool:
        long = [pool.submit(post, url, texts) for _ in range(MAX_LONG)]
        until(lambda: begun.is_set() and service.reader.num_long == MAX_LONG)
        for _ in range(3):
            assert post(url, {"prompt": "hi", "max_tokens": 2})[0] == 200
        status, answer = post(url, texts)
        assert (status, answer["error"]["code"]) == (429, "too_many_long_requests")
        assert not any(request.done() for request in long)
        tokenizer.encode = encode
        go_on.set()
        for request in long:
            status, answer = request.result()
            assert status == 400
            assert answer["error"]["code"] == "context_length_exceeded"
        assert service.reader.num_long == 0
        body = {"prompt": "hi", "max_tokens": 2, "user": "x" * LONG, "seed": 1}
        long = post(url, body)[1]["choices"]  # read by the other tokenizer
        assert long == post(url, body | {"user": ""})[1]["choices"]


def test_bad_requests_do_not_hurt_others(client, url):
    """A fuzz of bodies while others are answered: no 500, and the others get what they get alone."""
    ask = {"model": MODEL, "prompt": "What is", "n": 4, "max_tokens": 60, "seed": 0}
    alone = client.completions.create(**ask)
    rng = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        2,
        1e9,
        1e-9,
        "",
        "a",
        [],
        [[]],
        [1],
        ["a", "b"],
        {},
        {"a": 1},
        "\x00",
    ]
    names = ("prompt messages n best_of stop seed logprobs top_logprobs temperature top_p top_k min_p "
             "max_tokens min_tokens logit_bias stream echo stop_token_ids stream_options add_special_tokens "
             "repetition_penalty chat_template_kwargs return_token_ids").split()  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(client.completions.create, **ask) for _ in range(6)]
        for _ in range(200):
            body = {"prompt": "hi", "max_tokens": 2, "stream": False}
            body |= {rng.choice(names): rng.choice(values) for _ in range(rng.randint(1, 3))}
            if body["stream"]:
                body["stream"] = "x"
            if body["max_tokens"] is None:
                body["max_tokens"] = 3  # a chat would fill the context
            path = rng.choice(["/completions", CHAT])
            if path == CHAT:
                body |= {"messages": rng.choice([HI["messages"], body.pop("prompt")])}
            status, answer = post(url, body, path)
            assert status in (200, 400), (path, body, answer)
    for other in others:
        assert [c.text for c in other.result().choices] == [c.text for c in alone.choices]


def test_the_wrong_type_length_and_model(client, url):
    status, answer = post(url, {"prompt": "hi"}, **{"content-type": "text/plain"})
    assert status == 415
    assert "must be application/json, got 'text/plain'" in answer["error"]["message"]
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="other", prompt="hi")
    assert raised.value.code == "model_not_found"
    status, answer = post(url, {"prompt": "x" * LIMITS.max_body_bytes})
    assert status == 413
    assert f"limit of {LIMITS.max_body_bytes} bytes" in answer["error"]["message"]


def test_too_many_samples_are_refused_and_come_later(policy):
    service = Service(policy, make_engine(policy, max_batch_size=2), MODEL, Limits(4, 1 << 20))
    ask = {"model": MODEL, "prompt": "hi", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    with running(service) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        first = client.completions.create(**ask, n=3, stream=True)
        next(first)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt="hi", n=2)
        assert "3 samples are at work or waiting, 2 more go beyond the limit of 4" in str(
            refused.value
        )
        assert refused.value.response.headers["retry-after"] == "1"
        one = client.completions.create(model=MODEL, prompt="hi", max_tokens=2)  # there is room
        assert one.usage.completion_tokens == 2
        first.close()
        until(lambda: service.num_samples == 0)
        assert client.completions.create(model=MODEL, prompt="hi", n=4).choices
        client.close()


@contextmanager
def unread(url: str, **body):
    """A socket on which a stream of `body` comes, with next to no room for it."""
    host, port = url.removeprefix("http://").partition("/")[0].split(":")
    raw = json.dumps({"prompt": "hi", "stream": True, "ignore_eos": True, **body}).encode()
    with socket.socket() as client:
        client.settimeout(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
        )
        yield client


def rest_of(client: socket.socket) -> bytes:
    parts = []
    while parts[-1:] != [b""]:
        parts.append(client.recv(1 << 18))
    return b"".join(parts)


def test_samples_are_in_flight_until_they_end(policy):
    """And no longer, whoever reads them or does not."""
    service = Service(policy, make_engine(policy), MODEL, Limits(8, 1 << 20))
    with running(service, send_timeout=60) as url:
        with unread(url, n=8, max_tokens=100, logprobs=20) as client:
            until(lambda: service.num_samples == 8)
            until(lambda: service.num_samples == 0)
            status, answer = post(url, {"prompt": "hi", "n": 8, "max_tokens": 2})
            assert status == 200, answer
            assert rest_of(client).count(b'"finish_reason": "length"') == 8
        assert service.num_samples == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_nothing_is_disconnected(policy, stream):
    service = Service(policy, make_engine(policy), MODEL, LIMITS)
    with running(service, send_timeout=0.3) as url:
        size = 1500 if stream else 100
        with unread(url, n=8, max_tokens=size, logprobs=20, stream=stream) as client:
            if stream:
                until(lambda: service.thread.counters["aborted_requests"] == 1)
            until(lambda: service.thread.counters["requests"] == 1 and not service.num_samples)
            until(lambda: service.thread.engine.stats.blocks_used == 0)
            time.sleep(0.6)
            assert (b"[DONE]" if stream else b'"usage"') not in rest_of(client)


def test_a_slow_client_is_waited_for(policy):
    service = Service(policy, make_engine(policy), MODEL, LIMITS)
    with running(service, send_timeout=0.4) as url:
        with unread(url, n=8, max_tokens=400, logprobs=20, stream=False) as client:
            taken = b""
            for _ in range(6):
                end = len(taken) + 2 * LEAST
                while len(taken) < end:
                    taken += client.recv(end - len(taken)) or pytest.fail("it was disconnected")
                time.sleep(0.2)
            assert b'"usage"' in rest_of(client)


def test_a_stream_that_falls_too_far_behind_ends(policy):
    """What was made before comes, then an error; the samples and their blocks are free at once."""
    limits = Limits(8, 1 << 20, max_stream_bytes=1 << 20)
    service = Service(policy, make_engine(policy), MODEL, limits)
    with running(service, send_timeout=60) as url:
        with unread(url, n=8, max_tokens=1500, logprobs=20) as client:
            until(lambda: service.num_samples == 8)
            until(lambda: service.num_samples == 0)
            until(lambda: service.thread.engine.stats.blocks_used == 0)
            text = rest_of(client)
        assert b'"code": "client_too_slow"' in text
        assert b"data: [DONE]" in text
        assert text.count(b"text_completion") > 100
        assert service.thread.counters["aborted_requests"] == 1


def test_an_api_key(policy):
    service = Service(policy, make_engine(policy), MODEL, LIMITS, api_key="sécret")
    with running(service) as url:
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            for ask in (
                client.models.list,
                lambda: client.completions.create(model=MODEL, prompt="hi"),
            ):
                with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
                    ask()
        key = "sécret".encode().decode("latin-1")
        status, answer = post(url, {"prompt": "hi", "max_tokens": 1}, Authorization=f"Bearer {key}")
        assert status == 200, answer


def test_a_failing_step_answers_everybody_and_the_next(policy):
    """What is broken inside the engine is a 500 with its name, also in the middle of a stream."""
    engine = make_engine(policy)
    service = Service(policy, engine, MODEL, LIMITS)
    step, broken = engine.step, threading.Event()

    def sometimes():
        if broken.is_set():
            raise RuntimeError("out of luck")
        return step()

    engine.step = sometimes
    ask = {"model": MODEL, "prompt": "hi", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
    with running(service) as url, openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        stream = client.completions.create(**ask, stream=True)
        next(stream)
        broken.set()
        with pytest.raises(openai.APIError, match="out of luck"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="RuntimeError: out of luck"):
            client.completions.create(**ask)
        assert service.thread.failure == "RuntimeError: out of luck"
        broken.clear()
        assert client.completions.create(model=MODEL, prompt="hi", max_tokens=2).choices
        assert service.thread.failure == ""
        until(lambda: service.num_samples == 0)
        assert engine.stats.blocks_used == 0


def test_the_command_and_sigterm(tmp_path):
    """What ends within --drain ends, the rest is given up, and the exit code is 0."""
    path = tiny_checkpoint(tmp_path / "served", max_position_embeddings=1 << 18)
    server = subprocess.Popen(
        [sys.executable, "-m", "r1fast", "serve", path, "--port=0", "--drain=2",
         "--model.device=cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"R1FAST_API_KEY": "k"},
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        start = "served: 0.03 million parameters, float32 on cpu ("
        assert line.startswith(start), (line, server.stderr.read())
        assert re.search(r"\d threads?, [\w -]+\); cache up to ", line), line
        line = server.stdout.readline()
        assert line.startswith("ready on http://127.0.0.1:")
        url = line.split()[2]
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            ask = {"model": "served", "prompt": "hi", "stream": True}
            short, long = (
                client.completions.create(**ask, max_tokens=n, extra_body={"ignore_eos": True})
                for n in (100, 200_000)
            )
            next(long)
            server.send_signal(signal.SIGTERM)
            assert streamed(short)[0]["reason"] == "length"
            with pytest.raises((openai.APIError, httpx_error())):
                list(long)
        out, err = server.communicate(timeout=10)
        assert server.returncode == 0, err
        assert out == ""
        assert "stopping; " in err
        assert " samples may end within 2 s" in err
    finally:
        server.kill()
        server.wait()


def test_asyncio_says_nothing_of_clients_that_left():
    def keeps(text):
        return _is_no_lost_client(logging.LogRecord("asyncio", 30, "", 0, text, (), None))

    assert not keeps("socket.send() raised exception.")  # in asyncio/selector_events.py
    assert keeps("socket.accept() out of system resource")


def httpx_error() -> type[Exception]:
    """What the client lets through when a connection breaks in the middle of a stream."""
    import httpx2

    return httpx2.RemoteProtocolError


def test_options():
    read = ServeOptions.read
    assert read({}) == ServeOptions()
    assert read({"port": "0", "api-key": "k", "max-queued": "7"}) == ServeOptions(
        port=0, api_key="k", max_queued=7
    )
    for words, message in (
        ({"port": "70000"}, "--port must be a whole number from 0 to 65535, got '70000'"),
        ({"max-body-mib": "0"}, "--max-body-mib must be a whole number from 1 to"),
        ({"drain": "soon"}, "--drain must be a whole number from 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            read(words)


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), f"--port={port}"]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["serve"]) == 2
    assert "r1fast serve takes a config file or a model, got 0" in capsys.readouterr().err
    for name in list(sys.modules):
        if name.partition(".")[0] in ("starlette", "uvicorn") or name.startswith("r1fast.serve"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tmp_path)]) == 2
    assert "which is not installed: pip install 'r1fast[serve]'" in capsys.readouterr().err


def test_any_other_address_is_warned_about(capsys, monkeypatch):
    from r1fast.config import Config
    from r1fast.serve import server

    def stop(*args, **kwargs):
        raise ValueError("loaded")

    monkeypatch.setattr(server, "policy_of", stop)
    for host, key, warned in (
        ("0.0.0.0", "", True),
        ("0.0.0.0", "k", True),
        ("127.0.0.1", "", False),
    ):
        with pytest.raises(ValueError, match="loaded"):
            server.serve(Config(), "m", ServeOptions(host, 0, key))
        shown = capsys.readouterr().err
        assert ("0.0.0.0 is no loopback address" in shown) == warned
        assert ("without --api-key" in shown) == (warned and not key)


def test_a_job_ends_when_its_samples_do(policy):
    """Without HTTP: one that is refused raises, and leaves nothing behind."""
    from r1fast.serve.engine_thread import EngineThread

    async def run():
        thread = EngineThread(make_engine(policy))
        thread.start()
        sampling = SamplingParams(max_tokens=5)
        with pytest.raises(ValueError, match=r"prompt\[1\] is empty"):
            await thread.submit([[5], []], [[1], [2]], sampling, streams=False)
        job = await thread.submit([[5], [6, 7]], [[1, 2], [3]], sampling, streams=True)
        events = [item async for items in job.events() for item in items]
        thread.stop()
        assert not thread.alive
        assert thread.engine.stats.blocks_used == 0
        return events

    events = asyncio.run(run())
    ended = [(p, e.sample) for p, e in events if e.finish_reason]
    assert sorted(ended) == [(0, 0), (0, 1), (1, 0)]
