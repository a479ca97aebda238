"""The vLLM engine against a real vLLM, its CPU build: `make test-vllm` installs it and runs this.

Three servers, two of a model with tied embeddings and one without, are started once; the tests give them
weights of their own. This file is also the program of a rank: MODEL OUT OVERRIDES...
"""

import copy
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_vllm_overlap import Watched
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.config import load_config
from r1fast.lora import merge_lora
from r1fast.metrics import read_metrics
from r1fast.policy import load_policy
from r1fast.rollout.make_engine import make_engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.vllm import transfer
from r1fast.rollout.vllm.canary import own_logprobs
from r1fast.rollout.vllm.client import Client
from r1fast.rollout.vllm.start import Child
from r1fast.rollout.vllm.sync import CanaryError
from r1fast.trainer import GRPOTrainer

PYTHON = os.environ.get("R1FAST_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="needs a vLLM: make test-vllm"),
]
START_SECONDS = 900  # 25 on two cores of its own
# a head width that vLLM's attention on CPUs has, room for prompts longer than its blocks of 128, and so many layers
# that a quick machine takes a second for a long sample
SHAPES = {
    "tied": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 6,
    },
    "untied": {"family": "qwen3", "head_dim": 32, "num_hidden_layers": 6},
}
PROMPTS = [[5, 6, 7, 8] * 10, [9, 10] * 70, [3, 1, 4]]
CLOSE = 1e-3  # nats, between two float32 forwards


class Servers:
    """Models on disk, and servers that have begun with them."""

    def __init__(self, folder):
        self.folder, self.children = folder, {}
        for name, shape in SHAPES.items():
            policy = tiny_policy(std=0.2, max_position_embeddings=512, **shape)
            policy.save(folder / name)

    def start(self, key: str, port: int = 0) -> Child:
        """`key` is a model and a number: tied-0."""
        options = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
        model, log = self.folder / key.partition("-")[0], self.folder / f"{key}.log"
        self.children[key] = Child(PYTHON, str(model), options, log, port=port)
        return self.children[key]

    def policy(self, model: str, seed: int = 0):
        """Of the model's shape, with weights that no server has."""
        policy = load_policy(self.folder / model, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        return policy

    def engine(self, policy, *keys, **values):
        return make_engine(policy, self.config(*keys, **values).rollout)

    def config(self, *keys, **values):
        urls = [self.children[key].url for key in keys]
        words = [f"--rollout.vllm.{key}={value}" for key, value in values.items()]
        return load_config(None, [
            "--rollout.engine=vllm", f"--rollout.vllm.servers={urls}", "--rollout.max_prompt_tokens=200",
            "--rollout.max_completion_tokens=300", "--rollout.temperature=0.8", *words,
        ])  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    made = Servers(tmp_path_factory.mktemp("vllm"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("VLLM_CPU_KVCACHE_SPACE", "1"),
            ("HF_HUB_OFFLINE", "1"),
            ("OMP_NUM_THREADS", "1"),
        ):
            patch.setenv(name, value)
        try:
            for key in ("tied-0", "tied-1", "untied-0"):
                made.start(key)
            for child in made.children.values():
                child.wait(START_SECONDS)
            yield made
        finally:
            for child in made.children.values():
                child.close()


def gaps(policy, groups, temperature=0.8) -> list[list[float]]:
    """|server - trainer| of every token of every completion, in nats."""
    found = [(g.prompt_ids, c) for g in groups for c in g.completions]
    own = own_logprobs(policy.model, [(p, c.token_ids) for p, c in found], temperature)
    return [
        [abs(a - b) for a, b in zip(mine, c.logprobs, strict=True)]
        for mine, (_, c) in zip(own, found, strict=True)
    ]


def worst(policy, groups, **options) -> float:
    return max(map(max, gaps(policy, groups, **options)))


SAMPLING = SamplingParams(temperature=0.8, max_tokens=24)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_weights_arrive_and_samples_are_of_them(servers, model):
    policy = servers.policy(model, seed=1)
    engine = servers.engine(policy, f"{model}-0")
    for version in range(2):
        engine.sync()
        row = engine.take_metrics()
        assert row["vllm/canary_max"] < CLOSE
        groups = engine.generate(PROMPTS, 4, SAMPLING, seed=version)
        assert worst(policy, groups) < CLOSE
        assert {c.weight_versions for g in groups for c in g.completions} == {
            (row["vllm/weight_version"],) * 2
        }
        with torch.no_grad():  # the head and the last layer among them
            for p in policy.model.parameters():
                p.mul_(1.05)
        engine.reset_prefix_cache()
    engine.close()


def test_a_completion_is_a_function_of_its_seed(servers):
    policy = servers.policy("untied", seed=2)
    engine = servers.engine(policy, "untied-0")
    engine.sync()
    together = engine.generate(PROMPTS, None, SAMPLING, seeds=[[1, 2, 3], [4], [5, 6]])
    alone = engine.generate(PROMPTS[:1], None, SAMPLING, seeds=[[2]])
    assert alone[0].completions[0].token_ids == together[0].completions[1].token_ids
    assert len({tuple(c.token_ids) for c in together[0].completions}) == 3
    eos = policy.eos_ids[0]
    ends = SamplingParams(max_tokens=200, temperature=2.0)  # as hot as vLLM allows
    found = [c for g in engine.generate(PROMPTS, 8, ends, seed=3) for c in g.completions]
    assert {c.finish_reason for c in found} == {"stop", "length"}
    for c in found:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == eos)
        assert eos not in c.token_ids[:-1]
    greedy = engine.generate(PROMPTS, 2, SamplingParams(temperature=0, max_tokens=8), seed=4)
    assert all(g.completions[0].token_ids == g.completions[1].token_ids for g in greedy)
    engine.close()


def is_sampling(server) -> bool:
    """By its own word."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    values = [line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running")]
    return sum(map(float, values)) > 0


def has_jobs(server) -> bool:
    return bool(server.jobs)


def in_flight(engine, num=6, seconds=0.0, begun=is_sampling):
    """Samples that have begun on all servers and will go on for a while, unless the machine is busy elsewhere."""
    long = SamplingParams(temperature=0.8, max_tokens=300, ignore_eos=True)
    request = engine.add(PROMPTS[0], list(range(num)), long)
    deadline = time.monotonic() + 60
    while not all(map(begun, engine.fleet.servers)) and engine.fleet.done.empty():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    return request


@pytest.mark.parametrize("update", ["keep", "wait", "abort"])
def test_weights_that_come_while_samples_are_in_flight(servers, update):
    """What holds for all samples is looked at in each try; that an update meets them amid their decoding is chance."""
    policy = servers.policy("untied", seed=3)
    engine = servers.engine(policy, "untied-0", update=update)
    engine.sync()
    # a server that is quick is met early, one on a busy machine late, where its own word takes too long
    ways = [
        (is_sampling, 0.0),
        (has_jobs, 0.5),
        (has_jobs, 0.2),
        (is_sampling, 0.2),
        (has_jobs, 1.0),
    ]
    for i, (begun, seconds) in enumerate(ways * 2):
        old, first = copy.deepcopy(policy.model), engine.weights.version
        in_flight(engine, seconds=seconds, begun=begun)
        factor = 1 / 1.1 if i % 2 else 1.1
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(factor)
        engine.reset_prefix_cache()
        num_under_way = sum(len(server.jobs) for server in engine.fleet.servers)
        engine.sync()
        assert engine.take_metrics()["vllm/canary_max"] < CLOSE
        events = []
        while engine.has_work:
            events += engine.step()
        assert len(events) == 6
        switches = switches_of(events, old, policy.model)
        assert all(e.weight_versions[0] in (first, first + 1) for e in events)
        if update == "wait":
            assert set(switches) == {300}
            if num_under_way == 6:
                break
        elif update == "abort":
            assert set(switches) <= {0, 300}
            if set(switches) == {0}:
                break
        elif any(0 < n < 300 for n in switches):
            assert (first, first + 1) in {e.weight_versions for e in events}
            break
    else:
        pytest.fail(f"no update met samples amid their decoding; the last ones: {switches}")
    engine.close()


def switches_of(events, old, new) -> list[int]:
    """How many tokens of each sample are of the old policy. Each is of one, by the whole prefix before it."""
    sequences = [(PROMPTS[0], e.token_ids) for e in events]
    by_old, by_new = (own_logprobs(model, sequences, 0.8) for model in (old, new))
    switches = []
    for event, before, after in zip(events, by_old, by_new, strict=True):
        assert len(event.token_ids) == 300
        is_new = [abs(x - b) < CLOSE for x, b in zip(event.logprobs, after, strict=True)]
        is_old = [abs(x - a) < CLOSE for x, a in zip(event.logprobs, before, strict=True)]
        switch = next((n for n in range(301) if all(is_new[n:])), 300)
        assert all(is_old[:switch])
        switches.append(switch)
    return switches


def test_more_tokens_to_prefill_than_a_batch_holds(servers):
    """In chunks they would end a server on CPUs: at first, and again when `keep` has all of them computed anew."""
    policy = servers.policy("untied", seed=11)
    engine = servers.engine(policy, "untied-0", update="keep")
    engine.sync()
    long = SamplingParams(temperature=0.8, max_tokens=200, ignore_eos=True)
    for i in range(64):  # 10,000 tokens
        engine.add([i + 1, *range(20, 180)], [i], long)
    time.sleep(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    engine.reset_prefix_cache()
    engine.sync()
    events = []
    while engine.has_work:
        events += engine.step()
    assert [len(event.token_ids) for event in events] == [200] * 64
    row = engine.take_metrics()
    assert row["vllm/lost"] == row["vllm/retries"] == 0
    engine.close()


def test_a_prefix_cache_that_is_not_emptied_is_found(servers, monkeypatch):
    """Without the reset, prompts that were seen before have keys and values of the old weights."""
    policy = servers.policy("tied", seed=4)
    engine = servers.engine(policy, "tied-0", update="keep")
    engine.sync()  # the canaries' prompts are in the cache from now on
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    engine.reset_prefix_cache()
    real = Client.post

    def without_reset(self, path, *args, **options):
        if path.startswith("/reset_prefix_cache"):
            return {"success": True}
        if path.startswith("/pause"):  # which empties it too, where nothing is in flight
            path += "&clear_cache=false"
        return real(self, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", without_reset)
        with pytest.raises(CanaryError, match="a cache that kept older weights"):
            engine.sync()
    engine.fleet.servers[0].client.post(
        "/reset_prefix_cache?reset_running_requests=false", timeout=60
    )
    engine.sync()
    assert engine.take_metrics()["vllm/canary_max"] > CLOSE  # of the failed one, the larger
    engine.sync()
    assert engine.take_metrics()["vllm/canary_max"] < CLOSE
    engine.close()


def test_a_tied_head_that_stays_behind_is_found(servers, monkeypatch):
    """vLLM holds a tied head apart on CPUs: where its name brings other numbers, or none, the old ones stay."""
    policy = servers.policy("tied", seed=5)
    engine = servers.engine(policy, "tied-0")
    engine.sync()
    head = policy.model.head_weight.detach().clone()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.2)
    engine.reset_prefix_cache()
    real = transfer.FileTransfer.prepare

    def prepare(self, version):
        real(self, version)
        tensors = load_file(self._files[0])
        assert "lm_head.weight" not in tensors  # the worker makes it of the embedding
        save_file(tensors | {"lm_head.weight": head}, self._files[0], metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(transfer.FileTransfer, "prepare", prepare)
        with pytest.raises(CanaryError, match="does not sample from the trainer's weights"):
            engine.sync()
    engine.close()
    engine = servers.engine(policy, "tied-0")
    engine.fleet.servers[0].client.post("/update_weight_version", {"new_version": "?"}, timeout=60)
    engine.sync()
    assert engine.take_metrics()["vllm/canary_max"] < CLOSE
    engine.close()


def test_a_short_run_of_grpo_with_adapters_over_two_servers(servers, tmp_path):
    policy = servers.policy("tied", seed=6)
    config = servers.config("tied-0", "tied-1")
    words = [
        f"--rollout.vllm.servers={config.rollout.vllm.servers}", "--rollout.engine=vllm",
        "--lora.rank=4", "--optim.lr=0.02", "--rollout.max_completion_tokens=16",
    ]  # fmt: skip
    trainer = GRPOTrainer(policy, tiny_config(*words), tmp_path, tiny_problems(), TokenScorer())
    trainer.run()
    rows = read_metrics(tmp_path)
    assert len(rows) == 4
    for row in rows:
        assert row["vllm/servers"] == 2
        assert row["logprob_mismatch/max"] < CLOSE
        assert row["logprob_mismatch/mean"] < 1e-4
        assert row["rollout_correction/weight"] == pytest.approx(1, abs=1e-3)
        assert row["vllm/canary_max"] < CLOSE
        assert row["vllm/version_lag_max"] == row["vllm/retries"] == 0
    versions = [row["vllm/weight_version"] for row in rows]
    assert versions == list(range(int(versions[0]), int(versions[0]) + 4))
    merge_lora(policy.model)
    with torch.no_grad():  # the last update, which no rollout followed
        engine = servers.engine(policy, "tied-0")
        engine.sync()
        assert worst(policy, engine.generate(PROMPTS, 2, SAMPLING, seed=7)) < CLOSE
        engine.close()


@pytest.mark.parametrize(
    "layout", [("--parallel.mode=fsdp", "--lora.rank=4"), ("--parallel.tensor_parallel=2",)]
)
def test_two_ranks_that_divide_the_model(servers, tmp_path, layout):
    """The servers get the weights that rank 0 has gathered, adapters merged."""
    child = servers.children["untied-0"]
    words = [
        *layout, "--rollout.engine=vllm", f"--rollout.vllm.servers=['{child.url}']",
        "--optim.lr=0.02", "--grpo.num_steps=3", "--rollout.max_completion_tokens=16",
    ]  # fmt: skip
    Ranks(__file__, servers.folder / "untied", tmp_path, *words).succeed()
    rows = read_metrics(tmp_path)
    assert len(rows) == 3
    for row in rows:
        assert row["vllm/canary_max"] < CLOSE
        assert row["logprob_mismatch/max"] < CLOSE
        assert row["vllm/version_lag_max"] == row["vllm/retries"] == 0
    versions = [row["vllm/weight_version"] for row in rows]
    assert versions == list(range(int(versions[0]), int(versions[0]) + 3))


@pytest.mark.parametrize("update", ["keep", "wait"])
def test_rollouts_that_overlap_training(servers, tmp_path, update):
    """Each token was drawn by the weights of a step that its sample may be of; none is older than the bound."""
    policy = servers.policy("tied", seed=10)
    config = servers.config("tied-0", "tied-1")
    words = [
        f"--rollout.vllm.servers={config.rollout.vllm.servers}", "--rollout.engine=vllm",
        "--optim.lr=0.01", "--rollout.max_completion_tokens=100", "--grpo.num_steps=6",
        "--grpo.max_staleness=1", f"--rollout.vllm.update={update}",
        "--rollout.max_batch_size=4",  # so that a step's samples take longer than its training
    ]  # fmt: skip
    trainer = Watched(policy, tiny_config(*words), tmp_path, tiny_problems(), TokenScorer())
    trainer.begins, trainer.groups = {}, {}
    trainer.run()
    rows = read_metrics(tmp_path)
    first = int(rows[0]["vllm/weight_version"])
    mixed = 0
    for step, groups in trainer.groups.items():
        found = [(group.prompt_ids, c) for group in groups for c in group.completions]
        sequences = [(prompt, c.token_ids) for prompt, c in found]
        by = {
            s: own_logprobs(trainer.begins[s], sequences, 1.0) for s in (step - 1, step) if s >= 0
        }
        for i, (_, c) in enumerate(found):
            old, new = (v - first for v in c.weight_versions)
            assert max(step - 1, 0) <= old <= new <= step
            drawn_by = [
                {s for s in by if abs(by[s][i][t] - x) < CLOSE} for t, x in enumerate(c.logprobs)
            ]
            # the older ones up to a token, the newer ones from there on
            assert any(
                all(old in d for d in drawn_by[:t]) and all(new in d for d in drawn_by[t:])
                for t in range(len(drawn_by) + 1)
            )
            mixed += old != new
    lags = [row["vllm/version_lag_max"] for row in rows]
    if update == "keep":
        assert mixed
        assert lags[0] == 0
        assert max(lags) == 1
    else:
        assert not mixed
        assert lags == [0, 1, 1, 1, 1, 1]
    assert all(row["vllm/canary_max"] < CLOSE and row["vllm/retries"] == 0 for row in rows)


def test_a_server_that_is_killed_and_comes_back(servers):
    """Samples in flight are sampled by the other one; the one that is back gets the weights before it samples."""
    policy = servers.policy("tied", seed=8)
    engine = servers.engine(policy, "tied-0", "tied-1", wait_seconds=600)
    engine.sync()
    for _ in range(10):
        request = in_flight(engine, num=8, seconds=0.05, begun=has_jobs)
        if all(s.jobs for s in engine.fleet.servers):
            break
        while engine.has_work:  # the machine was busy elsewhere
            engine.step()
    port = Client(servers.children["tied-1"].url).port
    servers.children["tied-1"].close()
    events = []
    while engine.has_work:
        events += engine.step()
    assert sorted((e.request_id, e.sample) for e in events) == [(request, i) for i in range(8)]
    assert all(len(e.token_ids) == 300 for e in events)
    row = engine.take_metrics()
    assert row["vllm/lost"] == 1
    assert row["vllm/retries"] >= 1
    assert row["vllm/servers"] == 1
    again = servers.start("tied-1", port=port)  # with the weights on disk, which are others
    waiting = threading.Thread(target=again.wait, args=(START_SECONDS,))
    waiting.start()
    waiting.join()
    while len(engine.fleet.up) < 2:
        engine.generate(PROMPTS[:1], 1, SAMPLING)
        time.sleep(0.1)
    before = engine.fleet.servers[1].version
    assert before == engine.weights.version
    engine.fleet.lose(engine.fleet.servers[0], "the other has to answer")
    assert worst(policy, engine.generate(PROMPTS, 4, SAMPLING, seed=9)) < CLOSE
    engine.close()


def main(model: str, out: Path, words: list[str]) -> None:
    distributed.start()
    policy = load_policy(model, device="cpu")
    GRPOTrainer(policy, tiny_config(*words), out, tiny_problems(), TokenScorer()).run()
    distributed.leave(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
