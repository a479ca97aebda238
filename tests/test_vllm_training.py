"""GRPO over servers: the correction for a sampler that is another engine, metrics, what is saved when all are lost.

This file is also the program of each rank of two: THIS OUT URL OVERRIDES..., URL being of a server that fails.
"""

import sys
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVllm
from ranks import Ranks
from test_vllm_fleet import _fast, at, none  # noqa: F401
from tiny import TokenScorer, tiny_checkpoint, tiny_config, tiny_policy, tiny_problems

from r1fast import __main__ as cli
from r1fast import distributed
from r1fast.grpo import token_coefficients
from r1fast.interrupt import ServersLost, Stopped
from r1fast.metric_help import METRIC_HELP, metric_help
from r1fast.metrics import read_metrics
from r1fast.policy_update import settled_correction
from r1fast.trainer import GRPOTrainer


@pytest.fixture
def servers():
    opened = []

    def make(*faults, **options):
        opened.extend(
            FakeVllm(tiny_policy(seed=i + 1), fault=f, **options) for i, f in enumerate(faults)
        )
        return opened

    yield make
    for server in opened:
        server.close()


def words(servers, *more):
    urls = [s.url for s in servers]
    return ["--rollout.engine=vllm", f"--rollout.vllm.servers={urls}", "--rollout.vllm.wait_seconds=1",
            *more]  # fmt: skip


def make_trainer(folder, servers, *more, **options) -> GRPOTrainer:
    return GRPOTrainer(
        tiny_policy(), tiny_config(*words(servers, *more)), folder, tiny_problems(), TokenScorer(),
        **options,
    )  # fmt: skip


def test_a_run_over_two_servers_is_that_of_the_embedded_engine(tmp_path, servers):
    make_trainer(tmp_path / "vllm", servers(none, none)).run()
    GRPOTrainer(
        tiny_policy(), tiny_config(), tmp_path / "own", tiny_problems(), TokenScorer()
    ).run()
    rows, own = read_metrics(tmp_path / "vllm"), read_metrics(tmp_path / "own")
    for row, other in zip(rows, own, strict=True):
        for name in ("loss", "reward", "grad_norm", "kl", "num_tokens", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
        assert row["logprob_mismatch/mean"] < 1e-5
        assert row["rollout_correction/weight"] == pytest.approx(1, abs=1e-5)
        assert row["rollout_correction/bounded"] == 0
        assert row["vllm/servers"] == 2
        assert row["vllm/version_lag_max"] == 0
        assert row["vllm/lost"] == row["vllm/retries"] == 0
        assert row["vllm/canary_max"] < 1e-4
        assert row["time/sync"] > row["vllm/sync_seconds"] > 0
        assert row["vllm/sync_bytes"] > 0
        assert not any(name.startswith("rollout/cache") for name in row)
    assert [row["vllm/weight_version"] for row in rows] == [1, 2, 3, 4]
    known = set(METRIC_HELP)
    assert {n for n in rows[0] if n.startswith(("vllm/", "rollout_correction/"))} <= known
    assert metric_help("vllm/canary_mean")[0] == "nats"


def test_the_correction_is_the_default_there_and_only_there():
    vllm = tiny_config("--rollout.engine=vllm", "--rollout.vllm.servers=['http://127.0.0.1:1']")
    assert settled_correction(vllm).grpo.rollout_correction == "token_truncate"
    assert settled_correction(tiny_config()).grpo.rollout_correction == "none"
    off = tiny_config("--grpo.rollout_correction=token_mask")
    assert settled_correction(off).grpo.rollout_correction == "token_mask"
    for word in ("--grpo.rollout_clip_max=0", "--grpo.rollout_clip_min=3"):
        with pytest.raises(ValueError, match=r"grpo.rollout_clip_m.. must be"):
            tiny_config(word)


@pytest.mark.parametrize("passes", [1, 2])
def test_what_the_correction_does(tmp_path, passes):
    """Every token's gradient is that of the trainer's own old log-probabilities, times the bounded ratio."""
    off = 1.2  # nats, so that some ratios are above 2

    def trainer(folder, *more):
        folder.mkdir()
        made = GRPOTrainer(
            tiny_policy(std=0.2),
            tiny_config("--grpo.kl_coef=0", f"--grpo.num_iterations={passes}", *more),
            folder, tiny_problems(), TokenScorer(),
        )  # fmt: skip
        real, found = made.rollout, []

        def rollout(step):
            groups = real(step)
            for c in (c for g in groups for c in g.completions):
                c.logprobs = [x - off * (n % 2) for n, x in enumerate(c.logprobs)]
            return groups

        def on_logprobs(keys, batch, logprobs):
            coefficients = token_coefficients(logprobs, batch, made.config.grpo)
            bounds = batch.cu_seqlens.tolist()
            for i, a, b in zip(batch.sequence_index, bounds, bounds[1:], strict=False):
                found.append((keys[i], coefficients[a:b]))

        made.rollout, made.on_logprobs = rollout, on_logprobs
        return made, found

    corrected, weighed = trainer(tmp_path / "a", "--grpo.rollout_correction=token_truncate")
    row = corrected.train_step(0)
    # what it is without a sampler that is off, and without the correction
    plain, unweighed = trainer(tmp_path / "b", "--grpo.rollout_correction=none",
                               "--grpo.max_logprob_mismatch=0.01")  # fmt: skip
    plain.train_step(0)
    # the second one sees its first mini-batch twice, the first time with what the sampler said
    first = dict(weighed[: len(weighed) // passes])
    own = dict(unweighed[len(unweighed) - len(weighed) :][: len(first)])
    assert first.keys() == own.keys()
    for key, coefficients in first.items():
        factor = torch.tensor([2.0 if n % 2 else 1.0 for n in range(len(coefficients))])
        torch.testing.assert_close(coefficients, own[key] * factor, rtol=1e-3, atol=1e-6)
    assert row["logprob_mismatch/max"] == pytest.approx(off, abs=1e-3)  # as it was found
    assert row["train/old_logprobs_recomputed"] == 0
    assert 0.3 < row["rollout_correction/bounded"] <= 0.5  # every second token
    assert row["rollout_correction/weight"] == pytest.approx(
        1 + row["rollout_correction/bounded"], abs=0.01
    )
    assert row["ratio"] == pytest.approx(1, abs=0.05)


def test_one_optimizer_step_needs_no_forward_more(tmp_path, servers):
    trainer = make_trainer(tmp_path, servers(none))
    row = trainer.train_step(0)
    own = GRPOTrainer(tiny_policy(), tiny_config(), tmp_path, tiny_problems(), TokenScorer())
    assert row["train/tokens_forwarded"] == own.train_step(0)["train/tokens_forwarded"]
    assert row["ratio"] == 1
    trainer.engine.close()


@pytest.mark.parametrize("dynamic", ["off", "signal"])
def test_a_run_whose_servers_are_all_lost_saves_and_goes_on_later(tmp_path, servers, dynamic):
    (server,) = servers(none)
    more = [f"--grpo.dynamic_sampling={dynamic}"]
    trainer = make_trainer(tmp_path, [server], *more)
    real = trainer.train_step

    def train_step(step):
        if step == 2:
            server.close()
        return real(step)

    trainer.train_step = train_step
    with pytest.raises(ServersLost, match="no vLLM server for 1 s"):
        trainer.run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with FakeVllm(tiny_policy(seed=7), port=server.port) as again:
        # another address and patience are no other run
        resumed = make_trainer(tmp_path, [again], "--rollout.vllm.num_retries=9", *more)
        assert resumed.step == 2
        resumed.run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


RANKS = ("--grpo.num_steps=2", "--grpo.prompts_per_step=3", "--optim.eps=0.001")


@pytest.mark.parametrize(
    "layout", ["mode=ddp", "mode=fsdp", "tensor_parallel=2", "context_parallel=2"]
)
def test_two_ranks_over_two_servers(tmp_path, servers, layout):
    """Rank 0 gives the weights, both sample; where all servers are lost, both end and one saves."""
    parallel = f"--parallel.{layout}"
    made = servers(none, none)
    lost = FakeVllm(tiny_policy(), fault=at("/v1/completions", *range(9, 999), what="reset"))
    with lost:
        ended = Ranks(__file__, tmp_path, lost.url, *words(made, *RANKS, parallel)).wait()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [len(s.updates) for s in made] == [2, 2]
    make_trainer(tmp_path / "one", servers(none)[-1:], *RANKS).run()
    for row, other in zip(
        read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True
    ):
        for name in ("loss", "reward", "grad_norm", "num_tokens", "rollout_correction/weight"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
        assert row["vllm/servers"] == 2
    ends = [(tmp_path / f"lost-{rank}.txt").read_text() for rank in (0, 1)]
    assert any("no vLLM server for 1 s" in end for end in ends)
    assert "step 1 was given up to stop in time" in ended[0][1]


def test_commands_over_servers(tmp_path, servers, capsys):
    """grpo with evaluations, and sample: by the command line, whose exit code says that servers are gone."""
    path = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text(
        "\n".join(f'{{"prompt": "What is {i} + 1?", "answer": "{i + 1}"}}' for i in range(8))
    )
    (server,) = servers(none)
    more = [
        f"--model.path={path}", f"--data.train={tmp_path}/p.jsonl", f"--data.eval={tmp_path}/p.jsonl",
        f"--output_dir={tmp_path}/run", "--template.name=raw", "--rollout.num_generations=2",
        "--rollout.max_completion_tokens=8", "--grpo.num_steps=2", "--grpo.prompts_per_step=2",
        "--eval.every_steps=1", "--eval.num_samples=2", "--eval.every_num_problems=2",
        "--model.device=cpu", "--eval.num_problems=2", "--grpo.entropy_coef=0.1", "--optim.lr=0.01",
    ]  # fmt: skip
    (tmp_path / "c.toml").write_text("")
    assert cli.main(["grpo", f"{tmp_path}/c.toml", *more, *words([server])]) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["vllm/weight_version"] for row in rows] == [1, 2]
    # each evaluation has the weights of its step, and the next step does not send them again
    assert len(server.updates) == 3
    assert "eval/pass@1" in rows[0]
    server.close()
    gone = [f"--output_dir={tmp_path}/other", *words([server])]
    assert cli.main(["grpo", f"{tmp_path}/c.toml", *more, *gone]) == cli.EXIT_NO_SERVERS
    assert "no vLLM server for 1 s" in capsys.readouterr().err


def test_a_pipeline_refuses_servers(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[stages.rl_1.rollout]\nengine = "vllm"\nvllm.servers = ["http://h:1"]\n'
    )
    assert cli.main(["pipeline", f"{tmp_path}/c.toml"]) == cli.EXIT_USAGE


def main(out: Path, lost: str, given: list[str]) -> None:
    distributed.start()
    for folder in ("two", "lost"):
        if distributed.is_main():
            (out / folder).mkdir()
        distributed.barrier()
        config = tiny_config(*given)
        trainer = GRPOTrainer(tiny_policy(), config, out / folder, tiny_problems(), TokenScorer())
        try:
            trainer.run()
        except Stopped as error:
            (out / f"lost-{distributed.rank()}.txt").write_text(str(error))
        given = [*given, f"--rollout.vllm.servers=['{lost}']"]
    distributed.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
