"""The vLLM engine against servers that fail: nothing is lost, nothing hangs, and what cannot be is said."""

import socket
import threading
import time

import pytest
import torch
from fake_vllm import FakeVllm
from tiny import alike, tiny_config, tiny_policy

from r1fast import __main__ as cli
from r1fast.interrupt import ServersLost
from r1fast.rollout.engine import Engine
from r1fast.rollout.make_engine import make_engine
from r1fast.rollout.request import RefusedRequest
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm import engine as engine_module
from r1fast.rollout.vllm import fleet as fleet_module
from r1fast.rollout.vllm.client import Call, Client, RequestError, ServerError
from r1fast.rollout.vllm.engine import VllmEngine, joined
from r1fast.rollout.vllm.sync import CanaryError

PROMPTS = [[5, 6, 7], [8, 9], [3, 1, 4, 1, 5]]
SAMPLING = SamplingParams(max_tokens=6)


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Servers are looked at more often than in a run."""
    for name, seconds in (("PROBE_SECONDS", 0.02), ("LIFE_SECONDS", 0.1), ("PROBE_TIMEOUT", 0.5)):
        monkeypatch.setattr(fleet_module, name, seconds)
    monkeypatch.setattr(engine_module, "CONNECT_SECONDS", 0.02)


@pytest.fixture
def fleet():
    """Makes servers with weights of their own, and an engine over them."""
    opened = []

    def make(*faults, policy=None, **values):
        servers = [FakeVllm(tiny_policy(seed=i + 1), fault=f) for i, f in enumerate(faults)]
        policy = policy or tiny_policy()
        engine = engine_over(policy, [s.url for s in servers], **values)
        opened.extend([engine, *servers])
        return engine, servers

    yield make
    for x in opened:
        x.close()


def engine_over(policy, urls, **values) -> VllmEngine:
    values = {"wait_seconds": 1.0, "request_timeout": 20.0} | values
    overrides = [f"--rollout.vllm.{key}={value}" for key, value in values.items()]
    words = ["--rollout.engine=vllm", f"--rollout.vllm.servers={list(urls)}", *overrides]
    return make_engine(policy, tiny_config(*words).rollout)


def none(path, n):
    return ""


def at(path, *numbers, what):
    """What goes wrong with these requests of a path."""
    return lambda p, n: what if p == path and n in numbers else ""


def sampled(groups):
    return [
        (c.token_ids, c.logprobs, c.finish_reason, c.text) for g in groups for c in g.completions
    ]


def expected(policy, sampling=SAMPLING, num=4):
    engine = Engine(policy.model, policy.eos_ids, decode=policy.decode)
    return sampled(engine.generate(PROMPTS, num, sampling, seed=3))


def assert_as_embedded(groups, policy, sampling=SAMPLING):
    for (ids, logprobs, *rest), (own_ids, own, *own_rest) in zip(
        sampled(groups), expected(policy, sampling), strict=True
    ):
        assert (ids, rest) == (own_ids, own_rest)
        assert logprobs == alike(own)


def test_two_servers_sample_what_the_embedded_engine_samples(fleet):
    policy = tiny_policy()
    engine, servers = fleet(none, none, policy=policy)
    engine.sync()
    row = engine.take_metrics()
    assert row["vllm/canary_mean"] <= row["vllm/canary_max"] < 1e-4
    groups = engine.generate(PROMPTS, 4, SAMPLING, seed=3)
    assert_as_embedded(groups, policy)
    assert all(c.weight_versions == (1, 1) for g in groups for c in g.completions)
    # spread by load: each had its share, beside its canaries
    assert all(s.seen["/v1/completions"] > 4 for s in servers)
    assert all(b["logprobs"] == 0 and b["seed"] >= 0 for s in servers for b in s.bodies)


CANARIES = 4  # the first requests of a server
FAULTS = ["500", "503", "429", "garbage", "empty", "reset", "short"]


@pytest.mark.parametrize("what", FAULTS)
def test_a_sample_that_fails_is_sent_to_another(fleet, what):
    policy = tiny_policy()
    wrong = at("/v1/completions", CANARIES + 1, CANARIES + 2, what=what)
    engine, servers = fleet(wrong, none, policy=policy)
    engine.sync()
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    row = engine.take_metrics()
    assert row["vllm/retries"] >= 1
    assert row["vllm/lost"] >= 1

    def is_back() -> bool:  # perhaps at the second try: a canary may meet the second fault
        engine.sync()
        return len(engine.fleet.up) == 2

    wait_for(is_back)  # it answers again, and has its weights still
    assert len(servers[0].updates) == 1


def wait_for(condition, seconds=10.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)


def test_a_server_that_hangs_past_the_time_out(fleet):
    policy = tiny_policy()
    hangs = at("/v1/completions", *range(CANARIES + 1, 99), what="hang")
    engine, _ = fleet(hangs, none, policy=policy, request_timeout=0.4)
    engine.sync()
    began = time.monotonic()
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    assert time.monotonic() - began < 15
    assert engine.take_metrics()["vllm/retries"] >= 1


def test_a_server_that_shows_no_life_any_more(fleet, monkeypatch):
    """Its samples would have a quarter of an hour; it is asked how it is before that."""
    policy, quiet = tiny_policy(), threading.Event()
    engine, _ = fleet(
        lambda path, n: "hang" if quiet.is_set() else "", none, policy=policy, request_timeout=900
    )
    engine.sync()
    quiet.set()
    monkeypatch.setattr(fleet_module, "PROBE_TIMEOUT", 0.1)
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    assert "no sign of life" in engine.fleet.servers[0].reason
    assert engine.fleet.servers[0].state == "lost"


def test_a_killed_server_comes_back_with_other_weights(fleet):
    policy = tiny_policy()
    engine, servers = fleet(none, none, policy=policy)
    engine.sync()
    servers[0].delay = 0.2
    ids = [engine.add(p, [1, 2, 3, 4], SAMPLING) for p in PROMPTS]
    wait_for(lambda: engine.fleet.servers[0].jobs)
    servers[0].close()
    events = []
    while engine.has_work:
        events += engine.step()
    assert sorted((e.request_id, e.sample) for e in events) == [
        (i, s) for i in ids for s in range(4)
    ]
    assert engine.take_metrics()["vllm/lost"] == 1
    with FakeVllm(tiny_policy(seed=9), port=servers[0].port) as again:  # as it was started
        engine.add([5, 6], [7], SAMPLING)
        servers[1].delay = 0.2
        wait_for(lambda: engine.step() is None or len(engine.fleet.up) == 2)
        assert again.label.startswith("r1fast-1-")  # no new weights, the same version
        while engine.has_work:
            engine.step()
        engine.fleet.lose(engine.fleet.servers[1], "it has to be the other")
        assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)


def test_without_servers_it_waits_and_then_says_so(fleet):
    engine, servers = fleet(none, none, wait_seconds=0.5)
    engine.sync()
    for server in servers:
        server.close()
    began = time.monotonic()
    with pytest.raises(
        ServersLost, match=r"no vLLM server for 0.5 s .*wait_seconds.*: http.*; http"
    ):
        engine.generate(PROMPTS, 4, SAMPLING, seed=3)
    assert 0.5 <= time.monotonic() - began < 10
    assert not engine.has_work


def test_no_server_at_the_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    engine = engine_over(tiny_policy(), [url], wait_seconds=0.2)
    with pytest.raises(ServersLost, match="cannot be reached"):
        engine.sync()
    engine.close()


def test_a_sample_that_no_server_brings_ends_the_run(fleet):
    wrong = at("/v1/completions", *range(CANARIES + 1, 999), what="500")
    engine, servers = fleet(wrong, wrong, num_retries=2, wait_seconds=10)
    for server in servers:
        server.spares_canaries = True
    engine.sync()
    with pytest.raises(
        ServerError, match=r"failed on 3 tries \(rollout.vllm.num_retries = 2\).*500"
    ):
        engine.generate(PROMPTS, 2, SAMPLING, seed=3)


def test_a_request_that_is_refused_is_not_sent_again(fleet):
    refused = at("/v1/completions", *range(CANARIES + 1, 999), what="400")
    engine, servers = fleet(refused)
    engine.sync()
    with pytest.raises(RequestError, match=r"answers 400: .*a fault that was injected"):
        engine.generate(PROMPTS[:1], 1, SAMPLING, seed=3)
    assert servers[0].seen["/v1/completions"] == CANARIES + 1


def test_what_is_not_finite_on_one_server_another_samples(fleet):
    policy = tiny_policy()
    wrong = at("/v1/completions", *range(CANARIES + 1, 999), what="nan")
    engine, servers = fleet(wrong, none, policy=policy, num_retries=99)
    servers[0].spares_canaries = True  # so it comes back, and is lost again
    engine.sync()
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    row = engine.take_metrics()
    assert row["vllm/lost"] >= 1
    assert row["vllm/retries"] >= 1


def test_what_is_not_finite_anywhere_is_an_error_of_that_sample(fleet):
    engine, servers = fleet(
        at("/v1/completions", CANARIES + 1, 2 * CANARIES + 2, what="nan"), num_retries=1
    )
    engine.sync()
    request = engine.add(PROMPTS[0], [3], SAMPLING, name="step 4, problem p7")
    events = []
    while engine.has_work:
        events += engine.step()
    (event,) = events
    assert (event.request_id, event.finish_reason) == (request, "error")
    url = servers[0].url
    assert (
        event.error
        == f"step 4, problem p7, sample 0: {url} gives a log-probability that is not finite"
    )


def test_an_abort_by_an_update_is_sampled_again_at_no_cost(fleet):
    policy = tiny_policy()
    engine, _ = fleet(
        at("/v1/completions", *range(5, 12), what="abort"), policy=policy, num_retries=0
    )
    engine.sync()
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    row = engine.take_metrics()
    assert row["vllm/lost"] == 0
    assert row["vllm/retries"] == 0


def test_what_is_aborted_frees_its_server(fleet):
    engine, (server,) = fleet(none)
    engine.sync()
    server.delay = 30
    request = engine.add(PROMPTS[0], [1, 2], SAMPLING)
    wait_for(lambda: len(engine.fleet.servers[0].jobs) == 2)
    engine.abort(request)
    events = engine.step()
    assert [(e.sample, e.finish_reason) for e in events] == [(0, "abort"), (1, "abort")]
    assert not engine.has_work
    wait_for(lambda: not engine.fleet.servers[0].jobs)
    assert engine.take_metrics()["vllm/lost"] == 0


# -- weights


def test_new_weights_reach_all_servers_and_old_ones_are_not_sent(fleet):
    policy = tiny_policy()
    engine, servers = fleet(none, none, policy=policy)
    engine.sync()
    engine.sync()
    engine.take_metrics()
    assert [len(s.updates) for s in servers] == [1, 1]
    with torch.no_grad():
        policy.model.layers[0].qkv.weight.add_(0.3)
    engine.reset_prefix_cache()  # what a trainer calls after each optimizer step
    engine.sync()
    row = engine.take_metrics()
    assert row["vllm/weight_version"] == 2
    assert row["vllm/sync_bytes"] == sum(x.nbytes for x in policy.model.hf_tensors().values())
    assert row["vllm/sync_seconds"] > 0
    assert row["vllm/canary_max"] < 1e-3
    assert_as_embedded(engine.generate(PROMPTS, 4, SAMPLING, seed=3), policy)
    # another engine over the same servers, as an evaluation makes one, sends nothing
    other = engine_over(policy, [s.url for s in servers])
    other.sync()
    assert other.weights.version == 2
    assert [len(s.updates) for s in servers] == [2, 2]
    other.close()


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_adapters_are_sent_merged(fleet, lora):
    from r1fast.config import LoraConfig
    from r1fast.lora import adapters, add_lora

    policy = tiny_policy("qwen3")
    if lora:
        add_lora(policy.model, LoraConfig(rank=2))
        with torch.no_grad():
            for _, adapter in adapters(policy.model):
                adapter.B.normal_(std=0.1)
    server = FakeVllm(tiny_policy("qwen3", seed=4))
    engine = engine_over(policy, [server.url])
    engine.sync()
    assert engine.take_metrics()["vllm/canary_max"] < 1e-4
    engine.close()
    server.close()


@pytest.mark.parametrize(
    "kept", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_the_canary_finds_weights_that_did_not_arrive(fleet, kept):
    engine, (server,) = fleet(none)
    server.keeps = frozenset([kept])
    with pytest.raises(
        CanaryError, match=r"does not sample from the trainer's weights \(version 1\).*limit is"
    ):
        engine.sync()
    engine.config = engine.weights.config
    server.keeps = frozenset()
    server.label = "another trainer's"
    engine.sync()
    assert engine.fleet.up


def test_the_limit_of_the_canary_can_be_set(fleet):
    engine, (server,) = fleet(none, max_canary=100)
    server.keeps = frozenset(["model.norm.weight"])
    engine.sync()
    assert engine.take_metrics()["vllm/canary_mean"] > 0.002


def test_an_update_that_fails_leaves_a_label_that_is_nobodys(fleet):
    engine, (server,) = fleet(at("/update_weights", 1, what="500"))
    engine.sync()  # the server is back at once, and is given them again
    assert server.seen["/update_weights"] == 2
    assert not server.is_paused
    assert server.label.startswith("r1fast-1-")


def test_an_update_that_a_trainer_left_open_is_closed_first(fleet):
    engine, (server,) = fleet(none)
    server.is_updating = True
    engine.sync()
    assert not server.is_updating
    assert server.seen["/start_weight_update"] == 2


def test_files_are_gone_when_the_engine_is(fleet, tmp_path):
    left = tmp_path / f"r1fast-weights-4194303-{socket.gethostname()}-x"  # of nobody
    left.mkdir()
    engine, _ = fleet(none, weight_folder=f'"{tmp_path}"')
    engine.sync()
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["version-1"]
    engine.close()
    assert not list(tmp_path.iterdir())


def test_versions_of_samples_in_flight_and_how_far_they_are_behind(fleet):
    policy = tiny_policy()
    engine, (server,) = fleet(none, policy=policy, update="keep")
    engine.sync()
    engine.add(PROMPTS[0], [1, 2], SAMPLING)
    server.delay = 0.3
    engine.add(PROMPTS[1], [3], SAMPLING)
    wait_for(lambda: len(engine.fleet.servers[0].jobs) >= 1)
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.1)
    engine.reset_prefix_cache()
    engine.sync()
    assert server.updates[-1][1] == "true"  # what goes on is computed again
    events = []
    while engine.has_work:
        events += engine.step()
    last = max(events, key=lambda e: e.request_id)
    assert last.weight_versions == (1, 2)
    assert [engine.weights.lag(version) for version in (1, 2)] == [1, 0]
    engine.sync()
    assert engine.weights.lag(2) == 0  # nothing has changed


# -- what is refused


def test_servers_that_cannot_do_it_are_refused(fleet):
    engine, (server,) = fleet(none)
    server.room = 16
    with pytest.raises(ValueError, match=r"has room for 16 tokens.*40 .*--max-model-len 40"):
        engine.sync()
    engine, _ = fleet(at("/openapi.json", *range(1, 99), what="404"))
    with pytest.raises(ServersLost, match=r"openapi.json answers 404"):
        engine.sync()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://h:1", "http://", "http://h:99999", "http://h/v1", 7, ""]
)
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match=r"rollout.vllm.servers must be addresses such as"):
        Client(url)


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        (SamplingParams(stop=("x",)), "stop"),
        (SamplingParams(repetition_penalty=1.5), "repetition_penalty"),
        (SamplingParams(logit_bias={3: 1.0}), "logit_bias"),
        (SamplingParams(top_logprobs=2), "top_logprobs"),
    ],
)
def test_sampling_that_is_not_sent_is_refused(fleet, sampling, field):
    engine, _ = fleet(none)
    engine.sync()
    with pytest.raises(RefusedRequest, match=f"has {field} = .*which is not sent to vLLM") as error:
        engine.generate(PROMPTS, 1, sampling)
    assert error.value.field == field
    with pytest.raises(RefusedRequest, match=r"temperature = 2.5: vLLM takes up to 2"):
        engine.generate(PROMPTS, 1, SamplingParams(temperature=2.5))
    with pytest.raises(RefusedRequest, match="entropies"):
        engine.generate(PROMPTS, 1, SAMPLING, return_entropy=True)


def test_servers_elsewhere_need_a_folder_that_both_see():
    with pytest.raises(
        ValueError, match=r"gpu-7:8000 is on another machine: rollout.vllm.weight_folder"
    ):
        engine_over(tiny_policy(), ["http://gpu-7:8000"])
    with pytest.raises(ValueError, match=r"nccl needs the policy on a GPU"):
        engine_over(tiny_policy(), ["http://gpu-7:8000"], weight_transfer="nccl")


# -- the client


def test_proxies_and_redirects_are_not_followed(fleet, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeVllm(tiny_policy(), fault=at("/health", 2, what="redirect")) as server:
        client = Client(server.url)
        assert client.get("/health", timeout=5) == {}
        with pytest.raises(RequestError, match="/health answers 307"):
            client.get("/health", timeout=5)
        assert server.seen["/elsewhere"] == 0


def test_a_reply_that_drips_for_ever_is_late():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connected, _ = listening.accept()
            with connected:
                connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(200):
                    try:
                        connected.sendall(b" ")
                    except OSError:
                        return
                    time.sleep(0.02)

        threading.Thread(target=drip, daemon=True).start()
        client = Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"gave no reply in 0.3 s"):
            client.get("/health", timeout=0.3)
        assert time.monotonic() - began < 3


def test_a_call_that_is_cut_before_it_begins():
    with FakeVllm(tiny_policy(), fault=lambda path, n: "hang") as server:
        call = Call()
        call.cut()
        with pytest.raises(ServerError):
            Client(server.url).post("/health", timeout=20, call=call)


def test_metrics_of_ranks():
    rows = [
        {"vllm/servers": 2.0, "vllm/lost": 1.0, "vllm/canary_max": 0.1},
        {"vllm/servers": 1.0, "vllm/lost": 2.0},
    ]
    assert joined(rows) == {"vllm/servers": 1.0, "vllm/lost": 3.0, "vllm/canary_max": 0.1}


def test_the_exit_code(monkeypatch, capsys, tmp_path):
    from r1fast import commands

    def lost(*args):
        raise ServersLost("no vLLM server for 120 s")

    monkeypatch.setattr(commands, "run", lost)
    assert cli.main(["grpo", "configs/demo.toml"]) == cli.EXIT_NO_SERVERS == 69
    assert "no vLLM server for 120 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"rollout.vllm.servers must be the addresses of servers, .*or set rollout.vllm.start"),
        (("servers=['http://h:1']", "start=python"), r"must be empty where rollout.vllm.start"),
        (("servers=['http://h:1', 'http://h:1']",), "must be different addresses"),
        (("start=python", "weight_transfer=nccl"), r"weight_transfer must be auto or file"),
        (("start=python", "num_servers=0"), "num_servers must be at least 1"),
        (("start=python", "request_timeout=0"), "request_timeout must be above 0"),
        (("start=python", "max_canary=-1"), "max_canary must be at least 0"),
        (("start=python", "num_retries=-1"), "num_retries must be at least 0"),
        (("start=python", "options=[7]"), "options must be a list of strings"),
    ],
)
def test_configs_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("--rollout.engine=vllm", *[f"--rollout.vllm.{word}" for word in words])
    if not words:
        for word in ("--rollout.batch_invariant=true", "--rollout.temperature=2.5"):
            with pytest.raises(ValueError, match=word[2:].partition("=")[0] + " must be"):
                tiny_config("--rollout.engine=vllm", "--rollout.vllm.start=python", word)
