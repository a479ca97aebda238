"""The reference: once a rollout, its version kept, on another device and in another precision."""

from dataclasses import replace

import pytest
import torch
from test_invariance import record_gradients
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast.metrics import read_metrics
from r1fast.reference import Reference
from r1fast.trainer import GRPOTrainer

VERSIONS = ("--grpo.ref_refresh_steps=3", "--checkpoint.every_steps=1", "--grpo.num_mini_batches=2")


def make_trainer(folder, *overrides, std=0.2) -> GRPOTrainer:
    policy, config = tiny_policy(std=std), tiny_config(*overrides)
    return GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer())


def kl_of(folder, *overrides) -> float:
    trainer = make_trainer(folder, *overrides)
    groups = random_groups(4, 4, trainer.model.spec.vocab_size)
    with torch.no_grad():
        for p in trainer.reference.model.parameters():
            p.mul_(0.95)
    record_gradients(trainer)
    return trainer.update(groups, 0)["kl"]


def test_it_is_forwarded_once_a_rollout_for_any_number_of_passes(tmp_path):
    passes = "--grpo.num_iterations=3", "--grpo.num_mini_batches=2"
    trainer = make_trainer(tmp_path, *passes, "--grpo.token_budget=4096")
    tokens = []
    trainer.reference.model.register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    groups = trainer.rollout(0)
    trainer.scorer.score(groups)
    trainer.update(groups, 0)
    prompts = {tuple(g.prompt_ids) for g in groups}  # packed, and each of them once
    completions = [len(c.token_ids) - 1 for g in groups for c in g.completions]
    assert tokens == [sum(map(len, prompts)) + sum(completions)]


def test_its_version_is_in_the_metrics_and_in_the_checkpoint(tmp_path):
    """Two optimizer steps a rollout: refreshed after rollouts 2 (4 steps), 3 (6), 5 (10)."""
    overrides = (*VERSIONS, "--grpo.num_steps=5")
    make_trainer(tmp_path, *overrides, "--grpo.num_steps=3").run()
    versions = [row["reference/version"] for row in read_metrics(tmp_path)]
    assert versions == [0, 0, 4]  # of each step's own KL, which comes before the refresh
    with pytest.raises(ValueError, match="num_steps"):
        make_trainer(tmp_path, *overrides)
    config = tiny_config(*overrides)
    resumed = GRPOTrainer(
        tiny_policy(std=0.2), config, tmp_path, tiny_problems(), TokenScorer(), force=True
    )
    assert resumed.reference.version == 6
    resumed.run()
    assert [row["reference/version"] for row in read_metrics(tmp_path)] == [0, 0, 4, 6, 6]
    assert resumed.reference.version == 10


def test_weights_on_another_device_come_for_the_forward_alone(tmp_path):
    """The meta device stands in for a GPU: it has shapes and no memory."""
    config = tiny_config("--grpo.ref_device=cpu")
    policy = tiny_policy()
    reference = Reference(policy, config)
    reference.device = torch.device("meta")
    before = {n: p.clone() for n, p in reference.tensors().items()}
    places = [p.data_ptr() for p in reference.model.parameters()]
    with reference._on_device() as model:
        assert all(p.is_meta for p in model.parameters())
    with pytest.raises(InterruptedError), reference._on_device():
        raise InterruptedError
    assert [p.data_ptr() for p in reference.model.parameters()] == places
    assert all(torch.equal(p, before[n]) for n, p in reference.tensors().items())

    # and it never takes memory where the policy is
    reference = Reference(replace(policy, model=policy.model.to("meta")), tiny_config())
    assert all(p.is_meta for p in reference.model.parameters())


def test_on_the_cpu_the_device_changes_nothing(tmp_path):
    assert kl_of(tmp_path, "--grpo.ref_device=cpu") == kl_of(tmp_path) > 1e-4


def test_it_is_a_copy_and_learns_nothing():
    policy = tiny_policy()
    reference = Reference(policy, tiny_config())
    own = {p.data_ptr() for p in reference.model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in policy.model.parameters())
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in policy.model.parameters())


def test_in_bfloat16_it_takes_half_the_memory_and_the_kl_stays(tmp_path):
    """Its log-probabilities are those of the policy cast to bfloat16, after a refresh too."""
    override = "--grpo.ref_dtype=bfloat16"
    exact, low = kl_of(tmp_path), kl_of(tmp_path, override)
    assert low != exact
    assert low == pytest.approx(exact, rel=0.1)

    trainer = make_trainer(tmp_path, override, "--grpo.ref_refresh_steps=1")

    def num_bytes(model):
        return sum(p.numel() * p.element_size() for p in model.parameters())

    assert 2 * num_bytes(trainer.reference.model) == num_bytes(trainer.model)
    trainer.train_step(0)
    assert trainer.reference.version == 1
    for p, q in zip(trainer.model.parameters(), trainer.reference.model.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        assert torch.equal(p.to(torch.bfloat16), q)
