"""What a mini-batch's means count, against a dense float64 loss of padded rows, written out as TRL and verl do."""

import copy

import pytest
import torch
from test_invariance import assert_same, record_gradients
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast.batch import pack
from r1fast.forward import hidden_states
from r1fast.trainer import GRPOTrainer
from r1fast.types import Reward, Sequence

LONGEST, EPS = 8, 0.2  # of tiny_config: max_completion_tokens, clip_eps
REWARDS = ((1, 1, 1, 1), (0, 1, 2, 1), (0, 1, 1, 0), (3, 3, 3, 3), (2, 0, 0, 1))
CUT = {(0, 1), (1, 0), (1, 1), (2, 3), (4, 2)}  # completions that ran into the limit


def make_trainer(folder, *overrides) -> GRPOTrainer:
    config = tiny_config("--grpo.prompts_per_step=5", *overrides)
    trainer = GRPOTrainer(tiny_policy(std=0.2), config, folder, tiny_problems(), TokenScorer())
    if trainer.reference is not None:
        with torch.no_grad():
            for p in trainer.reference.model.parameters():
                p.mul_(0.9)
    return trainer


def make_groups(vocab_size: int):
    groups = random_groups(5, 4, vocab_size, longest=LONGEST)
    for p, (group, totals) in enumerate(zip(groups, REWARDS, strict=True)):
        group.rewards = [Reward(float(r), {}, None) for r in totals]
        for i, c in enumerate(group.completions):
            c.finish_reason = "length" if (p, i) in CUT else "stop"
            c.logprobs = [x + 0.3 for x in c.logprobs]
    return groups


def dense_logprobs(model, groups):
    """Of each completion, in order; every sequence forwarded with its own prompt."""
    sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    (batch,) = pack(sequences, 1000, [0.0] * len(sequences))
    logits = hidden_states(model, batch) @ model.head_weight.T
    chosen = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    parts = chosen.split(batch.cu_seqlens.diff().tolist())
    by_index = dict(zip(batch.sequence_index, parts, strict=True))
    return [by_index[i] for i in range(len(sequences))]


def dense_gradient(trainer, groups, loss_type, denominator, mask_truncated, kl_coef):
    """(gradient by name, loss) in float64: padded rows, a mask, TRL's formulas."""
    model = copy.deepcopy(trainer.model).double()
    new = dense_logprobs(model, groups)
    ref = [torch.zeros_like(x) for x in new]
    if kl_coef:
        with torch.no_grad():
            ref = dense_logprobs(copy.deepcopy(trainer.reference.model).double(), groups)
    rows, n = [], 0
    for group in groups:
        r = torch.tensor([x.total for x in group.rewards], dtype=torch.float64)
        advantages = (r - r.mean()) / (r.std(correction=0) + 1e-4)
        for c, a in zip(group.completions, advantages, strict=True):
            keep = not (mask_truncated and c.finish_reason == "length")
            old = torch.tensor(c.logprobs, dtype=torch.float64)
            if denominator == "full" or (r != r[0]).any():  # verl's filter: no part of the batch
                rows.append((new[n], old, ref[n], a.expand(len(old)), torch.full_like(old, keep)))
            n += 1
    new, old, ref, advantages, mask = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
        for column in zip(*rows, strict=True)
    )
    ratio = (new - old).exp()
    token = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPS, 1 + EPS) * advantages)
    token = token + kl_coef * ((ref - new).exp() - (ref - new) - 1)
    if loss_type == "grpo":
        loss = ((token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    elif loss_type == "dapo":
        loss = (token * mask).sum() / mask.sum()
    else:
        loss = (token * mask).sum() / (len(rows) * LONGEST)
    loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters()}, loss.item()


@pytest.mark.parametrize(("mask", "kl_coef"), [(False, 0.0), (True, 0.0), (True, 0.05)])
@pytest.mark.parametrize("denominator", ["full", "live"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_dense_loss_has_the_same_gradient(tmp_path, loss_type, denominator, mask, kl_coef):
    trainer = make_trainer(
        tmp_path, f"--grpo.loss_type={loss_type}", f"--grpo.denominator={denominator}",
        f"--grpo.mask_truncated={str(mask).lower()}", f"--grpo.kl_coef={kl_coef}",
    )  # fmt: skip
    groups = make_groups(trainer.model.spec.vocab_size)
    gradient, loss = dense_gradient(trainer, groups, loss_type, denominator, mask, kl_coef)
    seen = record_gradients(trainer)
    row = trainer.update(groups, 0)
    assert_same((seen, {"loss": row["loss"]}), ([gradient], {"loss": loss}))


def test_the_choices_are_different_losses(tmp_path):
    """Or the test above could not tell them apart."""
    losses = set()
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        for denominator in ("full", "live"):
            for mask in ("true", "false"):
                trainer = make_trainer(
                    tmp_path, f"--grpo.loss_type={loss_type}", f"--grpo.mask_truncated={mask}",
                    f"--grpo.denominator={denominator}",
                )  # fmt: skip
                record_gradients(trainer)
                losses.add(trainer.update(make_groups(trainer.model.spec.vocab_size), 0)["loss"])
    assert len(losses) == 12


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_what_is_masked_is_not_forwarded_by_policy_or_reference(tmp_path, kl_coef):
    trainer = make_trainer(tmp_path, "--grpo.mask_truncated=true", f"--grpo.kl_coef={kl_coef}")
    groups = make_groups(trainer.model.spec.vocab_size)
    by_reference = []
    if kl_coef:
        trainer.reference.model.register_forward_pre_hook(
            lambda _, args: by_reference.append(len(args[0]))
        )
    record_gradients(trainer)
    row = trainer.update(groups, 0)
    lengths = {(p, i): len(c.token_ids) for p, g in enumerate(groups)
               for i, c in enumerate(g.completions)}  # fmt: skip
    silent = set() if kl_coef else {(p, i) for p in (0, 3) for i in range(4)} | {(1, 1), (1, 3)}
    kept = lengths.keys() - CUT - silent
    prompts = sum(len(groups[p].prompt_ids) for p in {p for p, _ in kept})
    assert row["train/tokens_forwarded"] == prompts + sum(lengths[key] - 1 for key in kept)
    assert by_reference == [row["train/tokens_forwarded"]] * bool(kl_coef)
    total = sum(lengths.values())
    masked = sum(lengths[key] for key in CUT)
    assert row["train/tokens_masked"] == pytest.approx(masked / total)
    dropped = sum(lengths[key] for key in silent - CUT)
    assert row["train/tokens_without_signal"] == pytest.approx(dropped / total)
    # the counter of tokens seen and the saving are of all
    seen = total + 4 * sum(len(group.prompt_ids) for group in groups)
    assert trainer.num_tokens == seen
    assert row["train/tokens_saved"] == 1 - row["train/tokens_forwarded"] / (seen - 20)


def test_a_step_that_is_masked_as_a_whole_is_no_step(tmp_path):
    trainer = make_trainer(tmp_path, "--grpo.mask_truncated=true")
    groups = make_groups(trainer.model.spec.vocab_size)
    for c in (c for group in groups for c in group.completions):
        c.finish_reason = "length"
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    row = trainer.update(groups, 0)
    assert row["train/steps_without_signal"] == row["train/tokens_masked"] == 1
    assert row["train/tokens_forwarded"] == row["loss"] == 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_a_live_batch_is_that_of_its_groups_alone(tmp_path):
    """Also the std of the batch, the mini-batches, and for any number of groups."""
    live = "--grpo.denominator=live"
    overrides = ("--grpo.scale_rewards=batch", "--grpo.num_mini_batches=3")
    results = []
    for some in (False, True):
        trainer = make_trainer(tmp_path, *overrides, *([] if some else [live]))
        groups = make_groups(trainer.model.spec.vocab_size)
        for position, group in enumerate(groups):
            group.position = position
        seen = record_gradients(trainer)
        row = trainer.update([groups[p] for p in (1, 2, 4)] if some else groups, 0)
        results.append((seen, {k: v for k, v in row.items() if not k.startswith("train/")}))
    assert_same(*results)
    for denominator, num in (("full", 0), ("live", 0), ("live", 5)):
        trainer = make_trainer(tmp_path, f"--grpo.denominator={denominator}", *overrides)
        groups = make_groups(trainer.model.spec.vocab_size)[:num]
        for group in groups:
            group.rewards = [Reward(1.0, {}, None)] * 4
        row = trainer.update(groups, 0)
        assert row["train/steps_without_signal"] == 3
        assert row["loss"] == row["train/tokens_forwarded"] == 0
        assert row["train/tokens_without_signal"] == bool(num)
