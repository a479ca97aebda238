"""Requests that no client should send: a response or an error that names what is wrong, and the server goes on."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_policy

pytest.importorskip("uvicorn")
from starlette.testclient import TestClient

from r1fast.rollout.engine import Engine
from r1fast.serve.app import Limits, Service
from r1fast.serve.fields import RequestError, named, parse_json
from r1fast.serve.requests import Generation, read_chat, read_completion

FIELDS = (
    "prompt messages model max_tokens max_completion_tokens temperature top_p top_k min_p n best_of seed stop stop_token_ids min_tokens "
    "logit_bias ignore_eos logprobs top_logprobs echo stream stream_options repetition_penalty chat_template_kwargs return_token_ids "
    "return_tokens_as_token_ids add_special_tokens suffix tools response_format user metadata presence_penalty functions unknown"
).split()
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 130), st.integers(), st.floats(), st.text(max_size=6),
        st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 1e308, float("inf"), float("nan"), "\ud800", "\0", 10**400, "hi"]),
    ),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage", "5", "-1", "x", "self"]), x, max_size=3),
    max_leaves=6,
)  # fmt: skip
HI = [{"role": "user", "content": "hi"}]
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=4)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.mark.parametrize("kind", ["completion", "chat"])
@settings(max_examples=250)
@given(bodies, st.booleans())
def test_any_body_is_a_generation_or_refused(policy, kind, body, is_sound):
    if is_sound:
        body = body | ({"messages": HI} if kind == "chat" else {"prompt": "hi"})
    try:
        read = read_chat if kind == "chat" else read_completion
        generation = read(body, policy, 8)
    except RequestError as error:
        json.dumps(error.body())
        return
    assert isinstance(generation, Generation)
    assert generation.sampling.max_tokens >= 1


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=20), st.text(max_size=12).map(lambda t: t.encode("utf-8", "surrogatepass")),
                 st.sampled_from([b"[" * 100000, b'{"a":' * 100000, b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe{", b"NaN", b'{"a": 1e999}'])))  # fmt: skip
def test_any_bytes_are_an_object_or_refused(raw):
    try:
        assert isinstance(parse_json(raw), dict)
    except RequestError:
        pass


def test_what_came_is_named_however_deep():
    deep: object = 1
    for _ in range(100000):
        deep = [deep]
    assert "list" in named(deep)
    assert named(10**5000)
    assert named(float("nan")) == "NaN"


def test_a_server_survives_what_is_thrown_at_it(policy):
    """Over its whole application: each answer is JSON with a status below 500, and a sound request still works."""
    rng = random.Random(0)
    engine = Engine(policy.model, policy.eos_ids, decode=policy.decode)
    service = Service(policy, engine, "m", Limits(max_samples=64, max_body_bytes=1 << 20))
    bad = [
        b"", b"[" * 50000, b"null", b"{}", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"prompt": "hi", "n": 1e400}',
        b'{"prompt": [' + b"1," * 5000 + b"1]}", b'{"prompt": "hi", "logit_bias": {"99999999999999999999": 1}}',
        b'{"prompt": "hi", "stop": ["\\ud800"]}', b'{"messages": [{"role": "\\ud800", "content": "\\u0000"}]}', b"\xff" * 100,
        b'{"prompt": "hi", "stop_token_ids": [-1, 9223372036854775808]}', b'{"prompt": "hi", "max_tokens": 9223372036854775807}',
    ]  # fmt: skip
    with TestClient(service.app(), raise_server_exceptions=False) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for raw in bad:
                response = client.post(
                    path,
                    content=raw,
                    headers={"content-type": rng.choice(["application/json", "x/y", ""])},
                )
                assert 400 <= response.status_code < 500, (path, raw[:60], response.text)
                assert response.json()["error"]["message"]
        for path in ("/v1/models/../..", "/%00", "/v1/completions?" + "a" * 5000, "/v1/nothing"):
            assert client.get(path).status_code < 500
        done = client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 2, "seed": 1})
        assert done.status_code == 200
