"""The gradient does not depend on how a step is split: micro-batches, packing order, mini-batches.

Two processes instead of one are in test_distributed.py. Denominators are global, so every
comparison is to float32 rounding.
"""

import pytest
import torch
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast import policy_update as update_module
from r1fast.batch import collate
from r1fast.optim import Optimizer
from r1fast.sft import SFTTrainer
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

Gradients = list[dict[str, torch.Tensor]]


def record_gradients(trainer) -> Gradients:
    """The gradient of every optimizer step, before clipping; the weights stay as they are."""
    seen: Gradients = []

    def step(lr):
        seen.append({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        trainer.optimizer.zero_grad()
        return torch.tensor(1.0)

    trainer.optimizer.step = step
    return seen


def grpo_gradients(folder, *overrides, groups=None) -> tuple[Gradients, dict]:
    policy = tiny_policy(std=0.2)
    config = tiny_config(*overrides)
    trainer = GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer())
    with torch.no_grad():  # a reference that is not the policy, so that the KL has a gradient
        for p in trainer.reference.model.parameters():
            p.mul_(0.9)
    seen = record_gradients(trainer)
    groups = groups or random_groups(4, 4, policy.model.spec.vocab_size)
    return seen, trainer.update(groups, 0)


def sft_gradients(folder, *overrides) -> tuple[Gradients, dict]:
    policy = tiny_policy(std=0.2)
    groups = random_groups(8, 2, policy.model.spec.vocab_size, seed=4)
    sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    trainer = SFTTrainer(policy, tiny_config(*overrides), folder, sequences)
    seen = record_gradients(trainer)
    return seen, trainer.train_step(0)


def assert_same(a: tuple[Gradients, dict], b: tuple[Gradients, dict], tolerance=2e-5) -> None:
    """Gradients in relative Frobenius error, metrics in value."""
    assert len(a[0]) == len(b[0]) > 0
    for one, two in zip(a[0], b[0], strict=True):
        whole = torch.cat([x.flatten() for x in one.values()]).norm()
        assert whole > 1e-3
        for name in one:
            error = (one[name] - two[name]).norm()
            assert error <= tolerance * one[name].norm() + 1e-7 * whole, (name, error)
    for key in a[1].keys() - {"train/tokens_forwarded", "train/tokens_saved"}:  # go by the split
        assert a[1][key] == pytest.approx(b[1][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("mini_batches", [1, 3])
def test_grpo_micro_batches(tmp_path, loss_type, mini_batches):
    overrides = (f"--grpo.loss_type={loss_type}", f"--grpo.num_mini_batches={mini_batches}")
    whole = grpo_gradients(tmp_path, *overrides)
    for budget in (15, 40):
        assert_same(whole, grpo_gradients(tmp_path, *overrides, f"--grpo.token_budget={budget}"))
    assert len(whole[0]) == mini_batches


@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_sft_micro_batches(tmp_path, loss):
    whole = sft_gradients(tmp_path, f"--sft.loss={loss}")
    for budget in (15, 40):
        assert_same(
            whole, sft_gradients(tmp_path, f"--sft.loss={loss}", f"--sft.token_budget={budget}")
        )


def test_packing_order(tmp_path, monkeypatch):
    """Any bins in any order: one sequence each, and all together backwards."""
    expected = grpo_gradients(tmp_path), sft_gradients(tmp_path)

    def one_each(sequences, token_budget, weights, *, device, **options):
        return [collate(sequences, weights, [[i]], device) for i in range(len(sequences))]

    def backwards(sequences, token_budget, weights, *, device, **options):
        index = range(len(sequences))[::-1]
        return [collate(sequences, weights, [[i] for i in index], device)]

    for pack in (one_each, backwards):
        monkeypatch.setattr(update_module, "pack", pack)
        monkeypatch.setattr("r1fast.sft.pack", pack)
        assert_same(expected[0], grpo_gradients(tmp_path))
        assert_same(expected[1], sft_gradients(tmp_path))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_order_of_completions_and_groups(tmp_path, loss_type):
    """A group's completions in another order, with their rewards: the same gradient."""
    policy_vocab = tiny_policy().model.spec.vocab_size
    groups = random_groups(4, 4, policy_vocab)
    shuffled = random_groups(4, 4, policy_vocab)[::-1]
    for group in shuffled:
        group.completions.reverse()
        group.rewards.reverse()
    override = f"--grpo.loss_type={loss_type}"
    assert_same(
        grpo_gradients(tmp_path, override, groups=groups),
        grpo_gradients(tmp_path, override, groups=shuffled),
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_equal_mini_batches_average_to_the_whole(tmp_path, loss_type):
    override = f"--grpo.loss_type={loss_type}"
    (whole,), _ = grpo_gradients(tmp_path, override)
    parts, _ = grpo_gradients(tmp_path, override, "--grpo.num_mini_batches=4")
    mean = {n: torch.stack([part[n] for part in parts]).mean(0) for n in whole}
    assert_same(([whole], {}), ([mean], {}))


def test_prompts_carry_no_loss(tmp_path):
    """A longer prompt changes the gradient only through the context: with one that the model
    cannot see (a model of zero attention), not at all."""
    grads = []
    for prefix in ([], [7, 8, 9]):
        policy = tiny_policy(std=0.2)
        with torch.no_grad():
            for layer in policy.model.layers:
                layer.o.weight.zero_()
        sequences = [Sequence([*prefix, 5], [6, 7, 8]), Sequence([*prefix, 2], [1])] * 4
        trainer = SFTTrainer(policy, tiny_config(), tmp_path, sequences)
        seen = record_gradients(trainer)
        row = trainer.train_step(0)
        # o's own gradient sees the attention's output, which does depend on the prefix
        grads.append(([{n: g for n, g in seen[0].items() if not n.endswith("o.weight")}], row))
    assert_same(*grads)


def test_the_test_can_fail(tmp_path):
    """Local denominators (each micro-batch its own mean) are what this file exists to catch."""
    whole = grpo_gradients(tmp_path)
    real = update_module.pack

    def local(sequences, budget, weights, **options):
        batches = real(sequences, budget, weights, **options)
        for b in batches:
            b.token_weights *= len(sequences) / len(b.sequence_index)
        return batches

    update_module.pack = local
    try:
        with pytest.raises(AssertionError):
            assert_same(whole, grpo_gradients(tmp_path, "--grpo.token_budget=15"))
    finally:
        update_module.pack = real


def test_bfloat16_micro_batches_are_added_up_in_float32(tmp_path, monkeypatch):
    """64 micro-batches against one: closer than what autograd's own sum in bfloat16 gives."""

    def gradient(*overrides, policy) -> torch.Tensor:
        policy.model.to(torch.bfloat16)
        groups = random_groups(32, 2, policy.model.spec.vocab_size, seed=4)
        sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
        config = tiny_config("--sft.batch_size=64", *overrides)
        trainer = SFTTrainer(policy, config, tmp_path, sequences)
        seen = []

        def step(lr):
            for (_, p), master in zip(
                trainer.optimizer.named, trainer.optimizer.masters, strict=True
            ):
                seen.append((p if master.grad is None else master).grad.flatten().float())
            return torch.tensor(1.0)

        trainer.optimizer.step = step
        trainer.train_step(0)
        return torch.cat(seen)

    whole = gradient(policy=tiny_policy(std=0.2))
    split = gradient("--sft.token_budget=15", policy=tiny_policy(std=0.2))
    monkeypatch.setattr(Optimizer, "accumulate", lambda self: None)
    naive = gradient("--sft.token_budget=15", policy=tiny_policy(std=0.2))
    error, naive_error = ((x - whole).norm() / whole.norm() for x in (split, naive))
    assert error < 0.75 * naive_error, (error, naive_error)
