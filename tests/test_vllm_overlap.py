"""Rollouts that overlap training, over servers of our own: how old samples get, what stays as it was, who waits for whom.

This file is also the program of each rank of two: THIS OUT OVERRIDES...
"""

import os
import signal
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm
from ranks import Ranks
from test_replay import train as record
from test_vllm_fleet import _fast, fleet, none, wait_for  # noqa: F401
from test_vllm_training import words
from tiny import TokenScorer, tiny_checkpoint, tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.evaluate.sampling import sample_groups
from r1fast.interrupt import ServersLost
from r1fast.metric_help import METRIC_HELP
from r1fast.metrics import read_metrics
from r1fast.replay import replay
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.rollout.vllm.canary import own_logprobs
from r1fast.rollouts_ahead import settled_update
from r1fast.trainer import GRPOTrainer

CLOSE = 1e-4  # nats, between two float32 forwards
STILL = "--optim.lr=1e-30"  # an update that moves nothing
FAST = "--optim.lr=0.02"
SAMPLES = 16  # of a step
MODES = ["wait", "keep", "abort"]


@pytest.fixture
def servers():
    opened = []

    def make(num=1, delay=0.0):
        for _ in range(num):
            opened.append(FakeVllm(tiny_policy(seed=7)))
            opened[-1].delay, opened[-1].spares_canaries = delay, True
        return opened[-num:]

    yield make
    for server in opened:
        server.close()


def ahead(num_steps: int, update: str = "auto") -> list[str]:
    return [f"--grpo.max_staleness={num_steps}", f"--rollout.vllm.update={update}"]


class Watched(GRPOTrainer):
    """Keeps the weights that each step begins with, and the samples that it trains on."""

    train_seconds = 0.0

    def update(self, groups, step):
        self.begins[step], self.groups[step] = deepcopy(self.model), groups
        time.sleep(self.train_seconds)
        return super().update(groups, step)


def trainer_of(folder, servers, *more, **options) -> Watched:
    config = tiny_config(*words(servers, *more))
    made = Watched(tiny_policy(), config, folder, tiny_problems(), TokenScorer(), **options)
    made.begins, made.groups = {}, {}
    return made


def run(folder, servers, *more, **options) -> tuple[Watched, list[dict]]:
    trainer = trainer_of(folder, servers, *more, **options)
    trainer.run()
    return trainer, read_metrics(folder)


def asked(server: FakeVllm) -> list[tuple]:
    """(prompt, seed) of the samples of training, as they came."""
    bodies = [body for body in server.bodies if not body["ignore_eos"]]
    return [(tuple(body["prompt"]), body["seed"]) for body in bodies]


def gap(model, groups, only=None) -> float:
    """Largest |sampler - model| in nats, over all completions or some of them."""
    found = [(g.prompt_ids, c) for g in groups for c in only or g.completions]
    own = own_logprobs(model, [(prompt, c.token_ids) for prompt, c in found], 1.0)
    return max(
        abs(a - b)
        for mine, (_, c) in zip(own, found, strict=True)
        for a, b in zip(mine, c.logprobs, strict=True)
    )


SHOWN = ("loss", "reward", "grad_norm", "kl", "num_tokens", "entropy", "rollout_correction/weight")


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("staleness", [1, 2, 9])
def test_where_weights_stay_the_same_so_does_the_run(tmp_path, servers, staleness, update):
    """The data, their order, the seeds, the samples: only the time at which they are asked for is another."""
    one = "--rollout.max_batch_size=1"  # so that requests come in the order in which they are sent
    (server,) = servers()
    trainer, rows = run(tmp_path / "ahead", [server], STILL, one, *ahead(staleness, update))
    (other,) = servers()
    plain, own = run(tmp_path / "own", [other], STILL, one)
    assert plain.ahead is None
    assert asked(server) == asked(other)
    assert len(asked(server)) == 4 * SAMPLES  # nothing beyond the last step
    for row, expected in zip(rows, own, strict=True):
        assert {name: row[name] for name in SHOWN} == {name: expected[name] for name in SHOWN}
        assert row["vllm/version_lag_max"] == 0
        assert "overlap/trainer_waited" not in expected
    assert [problem.id for problem in of_all(trainer)] == [p.id for p in of_all(plain)]
    seeds = [sample_seed(0, "grpo", t, p, g) for t in range(4) for p in range(4) for g in range(4)]
    assert [seed for _, seed in asked(server)] == seeds


def of_all(trainer):
    return [group.problem for step in sorted(trainer.groups) for group in trainer.groups[step]]


@pytest.mark.parametrize("update", MODES)
@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_sample_is_older_than_the_bound(tmp_path, servers, staleness, update):
    steps = "--grpo.num_steps=6"
    trainer, rows = run(tmp_path, servers(2, delay=0.02), FAST, steps, *ahead(staleness, update))
    lags = [row["vllm/version_lag_max"] for row in rows]
    assert lags[0] == 0
    assert all(lag <= min(step, staleness) for step, lag in enumerate(lags))
    assert max(lags) >= 1
    for row in rows:
        assert 0 <= row["vllm/version_lag"] <= row["vllm/version_lag_max"]
        assert row["overlap/trainer_waited"] >= 0
        assert row["overlap/samples_waited"] >= 0
    assert {"vllm/version_lag", "overlap/trainer_waited", "overlap/samples_waited"} <= set(
        METRIC_HELP
    )
    for groups in trainer.groups.values():  # the versions are true: the first one is of step 0
        for group in groups:
            for c in group.completions:
                first, last = c.weight_versions
                assert min(
                    gap(trainer.begins[v - 1], [group], [c]) for v in range(first, last + 1)
                ) < CLOSE  # fmt: skip


def test_what_an_update_aborts_is_of_the_new_weights_and_says_so(tmp_path, servers):
    """Half of the samples are under way at a time, those of the next step when an update comes."""
    slots = f"--rollout.max_batch_size={SAMPLES}"
    more = [FAST, slots, "--grpo.num_steps=2", *ahead(1, "abort")]
    # so slow that no busy machine trains longer
    trainer, rows = run(tmp_path, servers(delay=1.5), *more)
    assert sum(row["vllm/retries"] for row in rows) == 0  # nothing was wrong
    assert rows[1]["vllm/version_lag"] < 0.5  # they were asked for under the weights before
    for groups in trainer.groups.values():
        for group in groups:
            for c in group.completions:
                assert gap(trainer.begins[c.weight_versions[0] - 1], [group], [c]) < CLOSE


def test_one_step_off_is_a_function_of_the_seed(tmp_path, servers):
    """Where an update waits, all samples of a step are of the weights of the step before, whatever the timing."""
    found = []
    for name, num, delay in (("quick", 1, 0.0), ("slow", 2, 0.05)):
        trainer, rows = run(tmp_path / name, servers(num, delay), FAST, *ahead(1, "wait"))
        assert [row["vllm/version_lag"] for row in rows] == [0, 1, 1, 1]
        for step, groups in trainer.groups.items():
            assert gap(trainer.begins[max(step - 1, 0)], groups) < CLOSE
            assert step == 0 or gap(trainer.begins[step], groups) > 10 * CLOSE
        found.append([{name: row[name] for name in SHOWN} for row in rows])
    assert found[0] == found[1]


@pytest.mark.parametrize("update", MODES)
def test_an_evaluation_has_the_newest_weights(tmp_path, servers, update):
    """Also with samples of the steps to come in flight, which go on afterwards."""
    (server,) = servers(delay=0.1)
    gaps, others = [], []

    def evaluate():
        groups = sample_groups(
            trainer.policy, tiny_problems(3), trainer.config, SamplingParams(max_tokens=6), 2,
            purpose="eval",
        )  # fmt: skip
        gaps.append(gap(trainer.model, groups))
        others.append(gap(trainer.begins[trainer.step - 1], groups))
        return {"pass@1": 0.5}

    more = ["--eval.every_steps=1", FAST, *ahead(2, update)]
    trainer = trainer_of(tmp_path, [server], *more, evaluate=evaluate)
    trainer.run()
    assert len(gaps) == 4
    assert max(gaps) < CLOSE < 10 * CLOSE < min(others)
    rows = read_metrics(tmp_path)
    assert all("eval/pass@1" in row for row in rows)
    assert max(row["vllm/version_lag_max"] for row in rows) <= 2
    assert len(server.updates) == 5  # the first weights, and those of each evaluation


@pytest.mark.parametrize("update", ["wait", "keep"])
def test_a_run_takes_as_long_as_the_longer_half(tmp_path, servers, update):
    """With servers and a trainer of the same speed, hardly anybody waits: 7 times 0.5 s instead of 12."""
    seconds, waited = [], []
    for staleness in (0, 1):
        folder = tmp_path / str(staleness)
        more = ["--grpo.num_steps=6", FAST, *ahead(staleness, update)]
        trainer = trainer_of(folder, servers(delay=0.5), *more)
        trainer.train_seconds = 0.5
        began = time.monotonic()
        trainer.run()
        seconds.append(time.monotonic() - began)
        waited.append(sum(row["time/rollout"] for row in read_metrics(folder)))
    assert waited[0] > 6 * 0.5
    assert waited[1] < 0.6 * waited[0], waited  # 1 / 6, and what a busy machine adds
    assert seconds[1] < seconds[0], seconds


def test_who_waits_for_whom(tmp_path, servers):
    _, rows = run(tmp_path / "slow", servers(delay=0.5), *ahead(1, "wait"))
    for row in (rows[0], *rows[2:]):  # the second step's were sent with the first one's
        assert row["overlap/samples_waited"] == 0
        assert row["time/rollout"] >= row["overlap/trainer_waited"] > 0.1
    trainer = trainer_of(tmp_path / "quick", servers(), *ahead(1))
    trainer.train_seconds = 0.6
    trainer.run()
    rows = read_metrics(tmp_path / "quick")[1:]
    assert all(row["overlap/samples_waited"] > 0.1 for row in rows)
    assert all(row["overlap/trainer_waited"] < 0.1 for row in rows)


@pytest.mark.parametrize(("amid", "num_done"), [("update", 2), ("rollout", 3)])
def test_a_stop_gives_up_what_is_in_flight_and_a_resumed_run_asks_again(
    tmp_path, servers, amid, num_done
):
    more = ["--grpo.num_steps=5", "--checkpoint.deadline_seconds=1", FAST, *ahead(2)]
    (server,) = servers()
    trainer = trainer_of(tmp_path, [server], *more)
    real, at = {name: getattr(trainer, name) for name in ("update", "rollout")}, {}

    def part(name, step, *groups):
        if (name, step) == ("update", 0):
            wait_for(lambda: len(asked(server)) == 3 * SAMPLES)
            server.delay = 60.0  # the samples of step 3 and those behind it
        if (name, step) == (amid, {"update": 1, "rollout": 3}[amid]):
            at["signal"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return real[name](*groups, step)

    trainer.update = lambda groups, step: part("update", step, groups)
    trainer.rollout = lambda step: part("rollout", step)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert time.monotonic() - at["signal"] < 20
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, num_done + 1))
    (again,) = servers()
    resumed = trainer_of(tmp_path, [again], *more)
    assert resumed.step == num_done
    resumed.run()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    # asked for again, of the weights that are there
    assert [row["vllm/version_lag_max"] for row in rows[num_done:]] == list(range(5 - num_done))
    steps = range(num_done, 5)
    seeds = {sample_seed(0, "grpo", t, p, g) for t in steps for p in range(4) for g in range(4)}
    assert {seed for _, seed in asked(again)} == seeds


def test_all_servers_lost_with_requests_in_flight(tmp_path, servers):
    (server,) = servers(delay=0.2)
    trainer = trainer_of(tmp_path, [server], FAST, *ahead(1))
    real = trainer.update

    def update(groups, step):
        if step == 1:
            server.close()
        return real(groups, step)

    trainer.update = update
    with pytest.raises(ServersLost, match="no vLLM server for 1 s"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    _, rows = run(tmp_path, servers(), FAST, *ahead(1))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("update", MODES)
def test_one_of_two_servers_lost_with_requests_in_flight(tmp_path, servers, update):
    first, second = servers(2)
    more = ["--grpo.num_steps=6", FAST, *ahead(2, update)]
    trainer = trainer_of(tmp_path, [first, second], *more)
    real, back = trainer.update, []

    def update_and_lose(groups, step):
        if step == 0:
            wait_for(lambda: len(asked(first) + asked(second)) == 3 * SAMPLES)
            first.delay = 60.0
        if step == 1:
            wait_for(lambda: first.num_sampling)  # of step 3
            first.close()
        if step == 3:
            back.append(FakeVllm(tiny_policy(seed=9), port=first.port))
        return real(groups, step)

    trainer.update = update_and_lose
    try:
        trainer.run()
    finally:
        for server in back:
            server.close()
    rows = read_metrics(tmp_path)
    assert len(rows) == 6
    assert sum(row["vllm/retries"] for row in rows) >= 1
    assert sum(row["vllm/lost"] for row in rows) == 1
    assert all(row["vllm/version_lag_max"] <= min(step, 2) for step, row in enumerate(rows))
    for groups in trainer.groups.values():
        assert all(len(group.completions) == 4 for group in groups)


def test_a_server_that_comes_back_while_the_weights_are_newer_than_the_last_sync(fleet):  # noqa: F811
    """It gets what the trainer has, under a version of its own; those that sample on keep theirs."""
    policy = tiny_policy()
    engine, (first, second) = fleet(none, none, policy=policy, update="keep")
    engine.sync()
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    engine.reset_prefix_cache()
    engine.fleet.lose(engine.fleet.servers[0], "it was away")
    wait_for(lambda: engine.fleet.servers[0].state == "back")
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=6))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [s.version for s in engine.fleet.servers] == [2, 1]
    assert first.label.startswith("r1fast-2-")
    assert second.label.startswith("r1fast-1-")
    for event in events:
        (own,) = own_logprobs(policy.model, [([5, 6, 7], event.token_ids)], 1.0)
        is_new = max(abs(a - b) for a, b in zip(own, event.logprobs, strict=True)) < CLOSE
        assert event.weight_versions[0] == (2 if is_new else 1)
    engine.sync()
    assert [s.version for s in engine.fleet.servers] == [2, 2]
    assert (len(first.updates), len(second.updates)) == (2, 2)


def test_other_ranks_ask_no_server_that_rank_0_has_lost(fleet, monkeypatch):  # noqa: F811
    """It may still have older weights, though this rank has seen nothing wrong with it."""
    engine, _ = fleet(none, none)
    engine.sync()
    said = iter(
        [[[2, "another digest"], "", False], [[1], "", False]]
    )  # weights, servers that are up
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [next(said), own])
    engine.sync()
    first, second = engine.fleet.servers
    assert first.state != "up"
    assert (second.state, second.version) == ("up", 2)
    wait_for(lambda: first.state == "back")
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=6))
    while engine.has_work:
        assert all(event.weight_versions == (2, 2) for event in engine.step())
    assert first.state != "up"  # its label says that it has others


def test_what_is_held_is_sent_with_the_next_weights(fleet):  # noqa: F811
    policy = tiny_policy()
    engine, (server,) = fleet(none, policy=policy)
    engine.sync()
    engine.hold()
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=6))
    before = len(server.bodies)
    time.sleep(0.1)
    assert engine.step() == []
    assert len(server.bodies) == before
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    engine.reset_prefix_cache()
    engine.sync()
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.weight_versions for event in events] == [(2, 2)] * 2


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks(tmp_path, servers, mode):
    """Each asks for its own share ahead; rank 0 gives the weights when both have drained."""
    more = ("--grpo.num_steps=4", "--grpo.prompts_per_step=3", "--optim.eps=0.001", FAST,
            *ahead(1, "wait"))  # fmt: skip
    (tmp_path / "two").mkdir()
    made = servers(2, delay=0.02)
    Ranks(__file__, tmp_path / "two", *words(made, *more), f"--parallel.mode={mode}").succeed()
    _, own = run(tmp_path / "one", servers(1), *more)
    rows = read_metrics(tmp_path / "two")
    for row, other in zip(rows, own, strict=True):
        for name in ("loss", "reward", "grad_norm", "num_tokens", "vllm/version_lag"):
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name
    assert [row["vllm/version_lag"] for row in rows] == [0, 1, 1, 1]
    assert sum(len(asked(server)) for server in made) == 4 * 12


@pytest.mark.parametrize("update", ["wait", "keep"])
def test_two_ranks_and_the_one_server_comes_back_with_other_weights(tmp_path, servers, update):
    """Rank 0 gives it the weights of now, also when it has all its own samples, and rank 1 samples on."""
    (server,) = servers(delay=0.3)
    own = ("--rollout.max_batch_size=4", "--rollout.vllm.wait_seconds=20", "--grpo.num_steps=4")
    given = [*words([server], "--optim.lr=0.001", *ahead(1, update)), *own]
    ranks = Ranks(__file__, tmp_path, *given, "slowly")
    try:
        wait_for(lambda: (tmp_path / "updating-1").exists(), 60)
        server.close()
        again = FakeVllm(tiny_policy(seed=9), port=server.port)
        again.delay, again.spares_canaries = 0.05, True
        ranks.succeed()
    finally:
        again.close()
    rows = read_metrics(tmp_path)
    assert len(rows) == 4
    assert sum(row["vllm/lost"] for row in rows) >= 1
    assert all(row["vllm/version_lag_max"] <= 1 for row in rows)
    gaps = [row["logprob_mismatch/mean"] for row in rows]
    assert max(gaps) < 0.1, gaps  # of the server's own weights it would be above 1


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_behaviour_and_proximal_policy_over_several_optimizer_steps(tmp_path, servers, correction):
    """The sampler's log-probabilities are of the step before, the old ones of this step's begin, in every update."""
    trainer = trainer_of(
        tmp_path, servers(), FAST, *ahead(1, "wait"), "--grpo.num_mini_batches=2",
        "--grpo.num_iterations=2", f"--grpo.rollout_correction={correction}",
    )  # fmt: skip
    step, seen = [0], []
    real = trainer.update

    def update(groups, number):
        step[0] = number
        return real(groups, number)

    def on_logprobs(keys, batch, logprobs):
        seen.append((step[0], batch.old_logprobs, batch.rollout_logprobs, logprobs, batch))

    trainer.update, trainer.on_logprobs = update, on_logprobs
    trainer.run()
    drifts = []
    for number, old, rollout, logprobs, batch in seen:
        sequences = [trainer_sequence(batch, i) for i in range(len(batch.sequence_index))]
        for name, values, model in (
            ("proximal", old, trainer.begins[number]),
            ("behaviour", rollout, trainer.begins[max(number - 1, 0)]),
        ):
            own = sum(own_logprobs(model, sequences, 1.0), [])
            assert values.tolist() == pytest.approx(own, abs=CLOSE), (name, number)
        drifts.append((number, float((logprobs - old).abs().max())))
    assert len(drifts) >= 16
    assert max(drift for _, drift in drifts) > 10 * CLOSE  # later updates of a step have moved on
    rows = read_metrics(tmp_path)
    assert rows[0]["rollout_correction/weight"] == pytest.approx(1, abs=1e-3)
    assert all(row["logprob_mismatch/mean"] > 10 * CLOSE for row in rows[1:])
    assert all(row["train/old_logprobs_recomputed"] == 0 for row in rows)


def trainer_sequence(batch, i: int) -> tuple[list[int], list[int]]:
    """(prompt, completion) of the i-th sequence of a micro-batch, read back from its layout."""
    start, end = batch.cu_seqlens[i].item(), batch.cu_seqlens[i + 1].item()
    rows, targets = batch.target_rows[start:end], batch.target_ids[start:end].tolist()
    first = rows[0]  # the prompt's last token
    begin = max(b for b in batch.bounds if b <= first)
    return batch.input_ids[begin : first + 1].tolist(), targets


def test_a_recorded_step_is_made_again_to_the_bit(tmp_path, servers):
    """With the sampler's log-probabilities of older weights, and without servers."""
    base = tiny_checkpoint(tmp_path / "base")
    (server,) = servers()
    record(tmp_path / "run", base, *words([server], FAST, "--grpo.num_iterations=2", *ahead(1)))
    server.close()
    for step in (1, 2, 3):
        result = replay(tmp_path / "run", step)
        assert result["is_identical"], result["differing"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grpo.max_staleness=-1"], "grpo.max_staleness must be at least 0"),
        (["--rollout.engine=embedded"], "must be 0 with rollout.engine = embedded, which samples"),
        (["--grpo.dynamic_sampling=signal"], "max_staleness must be 0 with grpo.dynamic_sampling"),
        (["--grpo.rollout_correction=none"], "rollout_correction must be auto or another one"),
        (["--rollout.vllm.sleep=true"], "rollout.vllm.sleep must be false with grpo.max_staleness"),
    ],
)
def test_what_is_refused(more, message):
    given = ["--rollout.engine=vllm", "--rollout.vllm.servers=['http://h:1']"]
    with pytest.raises(ValueError, match=message):
        tiny_config(*given, "--grpo.max_staleness=1", *more)


def test_what_an_update_does_by_default():
    given = ["--rollout.engine=vllm", "--rollout.vllm.servers=['http://h:1']"]

    def update(*more):
        return settled_update(tiny_config(*given, *more)).rollout.vllm.update

    assert update() == "wait"
    assert update("--grpo.max_staleness=1") == "keep"
    assert update("--grpo.max_staleness=1", "--rollout.vllm.update=wait") == "wait"
    assert update("--rollout.vllm.update=abort") == "abort"


class Slow(GRPOTrainer):
    """Says when it trains, which takes it a while."""

    def update(self, groups, step):
        (self.folder / f"updating-{step}").touch()
        time.sleep(0.5)
        return super().update(groups, step)


def main(out: Path, given: list[str]) -> None:
    distributed.start()
    kind = Slow if "slowly" in given else GRPOTrainer
    config = tiny_config(*(word for word in given if word != "slowly"))
    kind(tiny_policy(), config, out, tiny_problems(), TokenScorer()).run()
    distributed.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
