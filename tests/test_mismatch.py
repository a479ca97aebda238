"""Old log-probabilities that are too far from the trainer's are computed again, before the first update."""

import pytest
import torch
from test_invariance import record_gradients
from test_score import needs_native
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast.forward import sequence_logprobs
from r1fast.metrics import _warn_once, read_metrics
from r1fast.trainer import GRPOTrainer

BOUND = "--grpo.max_logprob_mismatch=0.05"
DEFAULT = "--grpo.max_logprob_mismatch=0"
PASSES = ("--grpo.num_mini_batches=2", "--grpo.num_iterations=2", "--optim.lr=0.01")


def make_trainer(folder, *overrides, dtype=torch.float32, off=0.0) -> GRPOTrainer:
    """Whose engine reports log-probabilities that are `off` by so much."""
    policy = tiny_policy(std=0.2)
    policy.model.to(dtype)
    trainer = GRPOTrainer(policy, tiny_config(*overrides), folder, tiny_problems(), TokenScorer())
    real = trainer.rollout

    def rollout(step):
        groups = real(step)
        for c in (c for group in groups for c in group.completions):
            c.logprobs = [x + off * (-1) ** n for n, x in enumerate(c.logprobs)]
        return groups

    trainer.rollout = rollout
    return trainer


def weights_after(trainer, steps=2):
    rows = [trainer.train_step(step) for step in range(steps)]
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, rows


@pytest.mark.parametrize("options", [(), ("--grpo.kl_coef=0",)], ids=["kl", "no kl"])
def test_the_step_is_that_of_the_trainers_own_logprobs(tmp_path, options):
    """To the last bit; the one with the engine's is another."""
    weights, rows = weights_after(make_trainer(tmp_path, BOUND, *PASSES, *options, off=0.2))
    assert [row["train/old_logprobs_recomputed"] for row in rows] == [1, 1]
    assert rows[0]["logprob_mismatch/mean"] == pytest.approx(0.2, abs=1e-4)  # as it was found

    other = make_trainer(tmp_path, BOUND, *PASSES, *options, off=0.2)
    real = other._plan

    def plan(groups):
        sequences, plan = real(groups)
        live = [s for key, s in sequences.items() if key in plan.live]
        own = sequence_logprobs(other.model, other._in_step(live))
        for s, logprobs in zip(live, own, strict=True):
            s.old_logprobs = logprobs
        return sequences, plan

    other._plan = plan
    expected, expected_rows = weights_after(other)
    assert [row["train/old_logprobs_recomputed"] for row in expected_rows] == [0, 0]
    assert all(torch.equal(weights[name], x) for name, x in expected.items())
    for name in ("loss", "ratio", "entropy", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in expected_rows]
    # two forwards more: of the mini-batch whose gradient was forgotten, and of all
    more = [a["train/tokens_forwarded"] - b["train/tokens_forwarded"]
            for a, b in zip(rows, expected_rows, strict=True)]  # fmt: skip
    assert all(0 < n < row["train/tokens_forwarded"] for n, row in zip(more, rows, strict=True))

    unbound = make_trainer(tmp_path, "--grpo.max_logprob_mismatch=1", *PASSES, *options, off=0.2)
    wrong, wrong_rows = weights_after(unbound)
    assert [row["train/old_logprobs_recomputed"] for row in wrong_rows] == [0, 0]
    assert not all(torch.equal(weights[name], x) for name, x in wrong.items())


def test_it_is_said_once(tmp_path, capsys):
    _warn_once.cache_clear()
    make_trainer(tmp_path, BOUND, off=0.1).run()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("more than grpo.max_logprob_mismatch = 0.05 nats off the trainer's") == 1
    assert [row["train/old_logprobs_recomputed"] for row in read_metrics(tmp_path)] == [1] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_bound_lies_between_rounding_and_an_error(tmp_path, dtype):
    rows = weights_after(make_trainer(tmp_path, DEFAULT, *PASSES, dtype=dtype))[1]
    assert [row["train/old_logprobs_recomputed"] for row in rows] == [0, 0]
    trainer = make_trainer(tmp_path, DEFAULT, dtype=dtype, off=0.1)
    assert trainer.train_step(0)["train/old_logprobs_recomputed"] == 1
    assert all(10 * row["logprob_mismatch/mean"] < trainer.max_mismatch for row in rows)


def test_one_token_far_off_is_no_mismatch_of_the_forwards(tmp_path):
    """The mean decides: the largest is one token's, and the step keeps the sampler's."""
    trainer = make_trainer(tmp_path, BOUND)
    real = trainer.rollout

    def rollout(step):
        groups = real(step)
        groups[0].completions[0].logprobs[0] += 1.0
        return groups

    trainer.rollout = rollout
    row = trainer.train_step(0)
    assert row["logprob_mismatch/max"] == pytest.approx(1, abs=1e-3)
    assert row["logprob_mismatch/mean"] < trainer.max_mismatch == 0.05
    assert row["train/old_logprobs_recomputed"] == 0


def test_a_step_in_which_nothing_is_forwarded_has_nothing_to_compare(tmp_path):
    trainer = make_trainer(tmp_path, BOUND, "--grpo.kl_coef=0", off=0.2)
    trainer.scorer.reward = lambda ids: 1.0
    row = trainer.train_step(0)
    assert row["train/old_logprobs_recomputed"] == 0
    assert "logprob_mismatch/mean" not in row


@needs_native
def test_under_batch_invariant_they_are_the_engines_of_the_weights(tmp_path):
    """Which are what the loss takes, so that the ratio is exactly 1 again."""
    trainer = make_trainer(tmp_path, BOUND, "--rollout.batch_invariant=true", off=0.2)
    record_gradients(trainer)
    row = trainer.train_step(0)
    assert row["train/old_logprobs_recomputed"] == 1
    assert row["ratio"] == 1
