"""Completions of advantage 0 are not forwarded, and the step is the same; a step of none is no step."""

import math

import pytest
import torch
from test_invariance import assert_same, record_gradients
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast.grpo import rollout_advantages
from r1fast.kernels.policy_loss_options import LOSS_TYPES
from r1fast.metrics import read_metrics
from r1fast.trainer import GRPOTrainer
from r1fast.types import Reward

NO_KL, OFF = "--grpo.kl_coef=0", "--grpo.drop_without_signal=false"
LOSSES = [(f"--grpo.loss_type={name}",) for name in LOSS_TYPES if name != "bnpo"]
OPTIONS = [
    ("--grpo.importance_sampling_level=sequence", "--grpo.clip_eps_high=0.3"),
    ("--grpo.off_policy_mask_threshold=0.5", "--grpo.dual_clip=3", "--grpo.delta=2"),
    ("--grpo.num_mini_batches=2", "--grpo.num_iterations=2", "--grpo.clip_eps_high=10"),
    ("--grpo.scale_rewards=batch", "--grpo.shared_prompt=false", "--grpo.token_budget=15"),
]
MEANS = {"entropy", "ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"}
MEANS |= {"clip_ratio/region_mean", "logprob_mismatch/mean", "logprob_mismatch/max"}


def make_trainer(folder, *overrides, scorer=None) -> GRPOTrainer:
    policy, config = tiny_policy(std=0.2), tiny_config(*overrides)
    return GRPOTrainer(policy, config, folder, tiny_problems(), scorer or TokenScorer())


def some_groups(*totals: tuple[float, ...]):
    groups = random_groups(len(totals), len(totals[0]), len(tiny_policy().tokenizer))
    for group, values in zip(groups, totals, strict=True):
        group.rewards = [Reward(v, {"stub": v}, None) for v in values]
    return groups


def mixed():
    """A group without signal, one where a single completion has none, and two where all have."""
    return some_groups((1, 1, 1, 1), (0, 1, 2, 1), (0, 1, 1, 0), (2, 0, 0, 0))


def dead(groups):
    return [[a == 0 for a in row] for row in rollout_advantages(groups, tiny_config().grpo)]


@pytest.mark.parametrize("overrides", [*LOSSES, *OPTIONS], ids=lambda x: " ".join(x))
def test_the_gradient_is_that_of_the_whole_batch(tmp_path, overrides):
    steps = []
    for extra in ((), (OFF,)):
        trainer = make_trainer(tmp_path, NO_KL, *overrides, *extra)
        seen = record_gradients(trainer)
        row = trainer.update(mixed(), 0)
        steps.append((seen, {k: v for k, v in row.items() if k not in MEANS and "train/" not in k}))
        assert (row["train/tokens_without_signal"] > 0) == (not extra)
    assert_same(*steps)


def test_the_tokens_that_are_forwarded_are_those_that_teach(tmp_path):
    """A group without signal goes with its prompt; a single completion's prompt stays."""
    groups = mixed()
    assert dead(groups) == [[True] * 4, [False, True, False, True], [False] * 4, [False] * 4]
    trainer = make_trainer(tmp_path, NO_KL)
    record_gradients(trainer)
    row = trainer.update(groups, 0)
    lengths = [[len(c.token_ids) for c in g.completions] for g in groups]
    kept = [lengths[1][::2], lengths[2], lengths[3]]
    prompts = [len(g.prompt_ids) for g in groups]
    forwarded = sum(prompts[1:]) + sum(sum(part) - len(part) for part in kept)
    assert row["train/tokens_forwarded"] == forwarded
    everything = sum(p + n - 1 for p, part in zip(prompts, lengths, strict=True) for n in part)
    assert row["train/tokens_saved"] == pytest.approx(1 - forwarded / everything)
    num_kept, num = sum(map(sum, kept)), sum(map(sum, lengths))
    assert row["train/tokens_without_signal"] == pytest.approx(1 - num_kept / num)
    assert row["train/steps_without_signal"] == 0
    assert trainer.num_tokens == everything + 16  # what was seen: the dropped count


@pytest.mark.parametrize(
    "override", ["--grpo.kl_coef=0.1", "--grpo.entropy_coef=0.01", OFF], ids=str
)
def test_what_has_a_gradient_stays(tmp_path, override):
    trainer = make_trainer(tmp_path, NO_KL, override)
    (seen, row) = record_gradients(trainer), trainer.update(some_groups((1, 1, 1, 1)), 0)
    assert row["train/tokens_without_signal"] == row["train/steps_without_signal"] == 0
    assert row["train/tokens_forwarded"] > 0
    assert len(seen) == 1


def test_metrics_are_means_over_what_was_forwarded(tmp_path):
    """Those of the groups with signal alone."""
    rows = []
    for groups in (mixed(), mixed()[2:]):
        trainer = make_trainer(tmp_path, NO_KL, "--grpo.scale_rewards=none")
        record_gradients(trainer)
        if len(groups) == 4:  # whose second group has completions on both sides
            groups[1].rewards = groups[0].rewards
        rows.append(trainer.update(groups, 0))
    for name in MEANS:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name
    assert rows[0]["entropy"] > 0


def test_a_step_without_signal_moves_nothing_and_is_counted(tmp_path):
    """With old moments and weight decay, which would move the weights on a gradient of zero."""
    trainer = make_trainer(tmp_path, NO_KL, "--optim.weight_decay=0.1", "--optim.min_lr_ratio=0.1",
                           "--grpo.num_mini_batches=2", "--grpo.num_iterations=2")  # fmt: skip
    trainer.update(mixed(), 0)

    def state():
        tensors = dict(trainer.model.named_parameters()) | trainer.optimizer.state_tensors()
        return {name: x.detach().clone() for name, x in tensors.items()}

    before, tokens = state(), trainer.num_tokens
    assert any(name.startswith("exp_avg") for name in before)
    row = trainer.update(some_groups((1, 1, 1, 1), (0, 0, 0, 0)), 1)
    after = state()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert trainer.optimizer_step == 8  # the schedule goes on
    assert row["learning_rate"] < 0.001
    assert trainer.num_tokens > tokens
    assert row["train/steps_without_signal"] == 4
    assert row["train/tokens_without_signal"] == row["train/tokens_saved"] == 1
    assert row["train/tokens_forwarded"] == row["loss"] == 0
    assert not row.keys() & (MEANS | {"grad_norm"})  # nothing was measured


def test_the_mismatch_is_of_the_first_mini_batch_with_signal(tmp_path):
    """Half of the mini-batches, of one completion each, have none."""
    trainer = make_trainer(tmp_path, NO_KL, "--grpo.num_mini_batches=8", "--optim.lr=0.01")
    for step in range(6):
        groups = trainer.rollout(step)[:2]
        for group, values in zip(groups, ((1, 1, 1, 1), (0, 1, 0, 1)), strict=True):
            group.rewards = [Reward(float(v), {}, None) for v in values]
        row = trainer.update(groups, step)
        assert row["train/steps_without_signal"] == 4
        assert 0 < row["logprob_mismatch/max"] < 1e-5  # before any update moved the weights


class SomeSteps(TokenScorer):
    """No signal in every second step; crashes in the step after `steps`."""

    def __init__(self, steps: int = 99):
        super().__init__()
        self.left = steps

    def score(self, groups, step_from_end=None):
        if not self.left:
            raise InterruptedError
        self.left -= 1
        super().score(groups, step_from_end)
        if step_from_end % 2 == 0:
            for group in groups:
                group.rewards = [Reward(1.0, {}, None) for _ in group.rewards]


def test_resume_is_bitwise(tmp_path):
    """A stop behind a step that was left out, with the checkpoint of that step."""
    overrides = (NO_KL, "--checkpoint.every_steps=2", "--optim.min_lr_ratio=0.1")
    whole = make_trainer(tmp_path / "whole", *overrides, scorer=SomeSteps())
    whole.run()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "parts", *overrides, scorer=SomeSteps(3)).run()
    parts = make_trainer(tmp_path / "parts", *overrides, scorer=SomeSteps())
    assert (parts.step, parts.optimizer_step) == (2, 2)
    parts.run()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [read_metrics(tmp_path / name) for name in ("whole", "parts")]
    names = ("loss", "learning_rate", "num_tokens", "train/steps_without_signal")
    assert [[row[n] for n in names] for row in rows[0]] == [
        [row[n] for n in names] for row in rows[1]
    ]
    assert [row["train/steps_without_signal"] for row in rows[0]] == [0, 1, 0, 1]


def test_a_reward_that_is_not_finite_is_an_error_with_its_names(tmp_path):
    groups = mixed()
    groups[2].rewards[3] = Reward(math.nan, {"accuracy": 1.0, "helpfulness": math.nan}, "correct")
    for override in ("--grpo.scale_rewards=group", "--grpo.scale_rewards=batch"):
        with pytest.raises(
            ValueError,
            match=r"problem 'g2', completion 3: the reward is nan \(helpfulness is nan\)",
        ):
            make_trainer(tmp_path, override).update(groups, 0)
    groups[2].rewards.pop()
    with pytest.raises(ValueError, match="problem 'g2' has 3 rewards for 4 completions"):
        make_trainer(tmp_path).update(groups, 0)
    for group in groups:  # all of them, so that their sizes are equal
        del group.completions[3:], group.rewards[3:]
    with pytest.raises(ValueError, match="problem 'g0' has 3 completions"):
        make_trainer(tmp_path).update(groups, 0)


def test_float_noise_under_equal_verdicts_is_no_signal():
    """A grader's failure earns the mean of the others, which may be rounded."""
    noise = 0.1 + 1e-16
    assert noise != 0.1
    for verdicts, rewards, silent in (
        (("wrong", "wrong", "error"), (0.1, 0.1, noise), True),
        (("error", "error", "error"), (0.1, 0.1, noise), True),
        (("wrong", "wrong", "no_answer"), (0.1, 0.1, noise), False),
        ((None, None, None), (0.1, 0.1, noise), False),  # nothing was verified: it may be real
        (("wrong", "wrong", "wrong"), (0.1, 0.1, 0.2), False),
    ):
        (group,) = random_groups(1, 3, 9)
        group.rewards = [Reward(r, {}, v) for r, v in zip(rewards, verdicts, strict=True)]
        assert dead([group]) == [[silent] * 3], verdicts
