"""A prompt forwarded once a micro-batch gives the step that a prompt for each completion gives."""

import pytest
import torch
from test_invariance import assert_same, grpo_gradients, record_gradients
from tiny import (
    FAMILIES,
    TokenScorer,
    tiny_config,
    tiny_model,
    tiny_policy,
    tiny_problems,
)

from r1fast.batch import pack
from r1fast.forward import completion_logprobs, hidden_states
from r1fast.kernels.policy_loss_options import LOSS_TYPES
from r1fast.trainer import GRPOTrainer
from r1fast.types import Completion, Problem, Reward, RolloutGroup, Sequence

OFF = "--grpo.shared_prompt=false"
# (prompt, completions): ragged, a group of one, a prompt of one token, completions of one token
SHAPES = [(5, [1, 9, 4, 1]), (1, [3, 7]), (6, [8]), (2, [1, 1, 1]), (9, [2, 2, 30, 11, 5])]


def make_sequences(vocab_size: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    prompts = [(ids(p), lengths) for p, lengths in SHAPES]
    sequences = [Sequence(prompt, ids(n)) for prompt, lengths in prompts for n in lengths]
    return sequences[::2] + sequences[1::2]  # members of a group need not be neighbours


def padded_logprobs(model, s: Sequence):
    """One sequence alone, no packing of any kind."""
    (batch,) = pack([s], 1000, [1.0])
    return completion_logprobs(model, batch)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [38, 60, 1000])  # 38 is the longest sequence: groups are split
def test_logprobs_and_gradients_in_float64(family, budget):
    """Every parameter's gradient to 1e-10, with an upstream gradient that tells every token apart."""
    model = tiny_model(family).double()
    sequences = make_sequences(97)
    upstream = [torch.linspace(-1, 2, len(s.completion_ids)).double() * (i + 1)
                for i, s in enumerate(sequences)]  # fmt: skip

    def run(values) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.autograd.backward(*zip(*values, strict=True))
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    alone = [padded_logprobs(model, s) for s in sequences]
    exact = run(list(zip(alone, upstream, strict=True)))
    packed = [None] * len(sequences)
    for batch in pack(sequences, budget, [1.0] * len(sequences), share_prompts=True):
        parts = completion_logprobs(model, batch)[0].split(batch.cu_seqlens.diff().tolist())
        for i, part in zip(batch.sequence_index, parts, strict=True):
            packed[i] = part
    for one, two in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    shared = run(list(zip(packed, upstream, strict=True)))
    for name, gradient in exact.items():
        error = (shared[name] - gradient).norm()
        assert error <= 1e-10 * gradient.norm(), (name, error)


LOSSES = [f"--grpo.loss_type={name}" for name in LOSS_TYPES if name != "bnpo"]
OPTIONS = [
    ("--grpo.importance_sampling_level=sequence", "--grpo.clip_eps_high=0.3"),
    ("--grpo.kl_in=reward", "--grpo.kl_estimator=k1"),
    ("--grpo.entropy_coef=0.01", "--grpo.kl_estimator=k3_unbiased"),
    ("--grpo.num_mini_batches=3", "--grpo.num_iterations=2"),
    ("--grpo.off_policy_mask_threshold=0.5",),
]


@pytest.mark.parametrize(
    "overrides", [*((loss,) for loss in LOSSES), *OPTIONS], ids=lambda x: " ".join(x)
)
def test_the_step_is_the_unshared_step(tmp_path, overrides):
    """With the KL to a reference that is not the policy, whose logprobs are shared too."""
    expected = grpo_gradients(tmp_path, *overrides, OFF)
    for budget in ("", "--grpo.token_budget=15"):
        assert_same(expected, grpo_gradients(tmp_path, *overrides, *filter(None, [budget])))


def group(prompt: list[int], lengths: list[int]) -> RolloutGroup:
    return RolloutGroup(
        Problem("?", "0"),
        prompt,
        [Completion([7] * n, [-5.0] * n, "stop") for n in lengths],
        [Reward(float(i % 2), {}, None) for i in range(len(lengths))],
    )


def step_row(folder, groups, *overrides) -> dict[str, float]:
    trainer = GRPOTrainer(
        tiny_policy(), tiny_config("--rollout.num_generations=4", *overrides), folder,
        tiny_problems(), TokenScorer(),
    )  # fmt: skip
    record_gradients(trainer)
    return trainer.update(groups, 0)


def test_the_tokens_that_are_forwarded_are_counted(tmp_path):
    """P + sum (R - 1): the last token of a completion is predicted, not forwarded."""
    groups = [group([1, 2, 3, 4, 5, 6], [3, 5, 1, 4]), group([1, 2], [2, 2, 2, 9])]
    row = step_row(tmp_path, groups)
    assert row["train/tokens_forwarded"] == (6 + 9) + (2 + 11)
    unshared = (4 * 6 + 9) + (4 * 2 + 11)
    assert row["train/tokens_saved"] == pytest.approx(1 - 28 / unshared)
    row = step_row(tmp_path, groups, OFF)
    assert row["train/tokens_forwarded"] == unshared
    assert row["train/tokens_saved"] == 0
    row = step_row(tmp_path, groups, "--grpo.num_iterations=2", "--grpo.kl_coef=0.1")
    assert row["train/tokens_forwarded"] == 2 * 28  # of the policy: the reference is not counted
    # over the budget of 14, the first group (15) is in two pieces with the prompt in each
    row = step_row(tmp_path, groups, "--grpo.token_budget=14")
    assert row["train/tokens_forwarded"] == 28 + 6


def test_a_completion_that_never_fits_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"grpo.token_budget = 20 is less than the longest prompt"):
        step_row(tmp_path, [], "--grpo.token_budget=20", "--rollout.max_completion_tokens=16")


def test_the_same_prompt_twice_in_a_step_is_forwarded_once(tmp_path):
    groups = [group([1, 2, 3], [3, 3, 3, 3]), group([1, 2, 3], [2, 2, 2, 2])]
    assert step_row(tmp_path, groups)["train/tokens_forwarded"] == 3 + 8 + 4


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradient(mode):
    model, sequences = tiny_model(), make_sequences(97)
    (batch,) = pack(sequences, 1000, [1.0] * len(sequences), share_prompts=True)
    gradients = []
    for checkpointing in ("none", mode):
        model.checkpointing = checkpointing
        model.zero_grad()
        hidden_states(model, batch).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(stored, recomputed, rtol=0, atol=0)
