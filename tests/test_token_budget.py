"""Out of memory halves the micro-batch: the gradient of a run that had the smaller budget from the start."""

import pytest
import torch
from test_invariance import assert_same, grpo_gradients
from tiny import TokenScorer, has_fixed_sums, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast import forward as forward_module
from r1fast import metrics, policy_update, sft
from r1fast.batch import collate, pack
from r1fast.checkpoint import load_checkpoint
from r1fast.metrics import read_metrics
from r1fast.sft import SFTTrainer
from r1fast.token_budget import TokenBudget, is_out_of_memory
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence


@pytest.fixture(autouse=True)
def _warnings_anew():
    metrics._warn_once.cache_clear()


CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
)
ERRORS = (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
          RuntimeError(CPU_ERROR), MemoryError("std::bad_alloc"))  # fmt: skip


class Memory:
    """Room for `room` tokens in a micro-batch; more raises in the forward or amid the backward.

    `steps`: the optimizer steps at which it does, None: always.
    """

    def __init__(self, room: int, where: str, error=ERRORS[0]):
        self.room, self.where, self.error, self.seen, self.is_full = room, where, error, [], True

    def install(self, monkeypatch) -> "Memory":
        forward = policy_update.hidden_states

        def hidden_states(model, batch):
            self.seen.append(batch.num_tokens)
            too_much = self.is_full and batch.num_tokens > self.room
            if too_much and self.where == "forward":
                raise self.error
            if not (too_much and torch.is_grad_enabled()):
                return forward(model, batch)
            # the layers above have added their gradients when the first one is asked for its own
            hook = model.layers[0].register_full_backward_pre_hook(self.fail)
            try:
                return forward(model, batch)
            finally:
                hook.remove()

        monkeypatch.setattr(policy_update, "hidden_states", hidden_states)
        monkeypatch.setattr(sft, "hidden_states", hidden_states)
        return self

    def fail(self, layer, dy):
        raise self.error


def sft_run(folder, *overrides, dtype=torch.float32):
    policy = tiny_policy(std=0.2)
    policy.model.to(dtype)
    groups = random_groups(8, 2, policy.model.spec.vocab_size, seed=4)
    sequences = [Sequence(g.prompt_ids, c.token_ids) for g in groups for c in g.completions]
    sequences = [Sequence([5, 6, 7], [8, 9] * 9), *sequences[:7]]  # 20 tokens, and 3 to 13
    trainer = SFTTrainer(policy, tiny_config(*overrides), folder, sequences)
    seen = []
    trainer.optimizer.step = lambda lr: (
        seen.append([m.grad.clone() for m in trainer.optimizer.masters]),
        trainer.optimizer.zero_grad(),
        torch.tensor(1.0),
    )[-1]
    return trainer, trainer.train_step(0), seen


def test_layers_are_recomputed_before_a_single_sequence_is_given_up(tmp_path, monkeypatch, capsys):
    """And not where the config has said what they keep."""
    forward = sft.hidden_states

    def hidden_states(model, batch):
        if model.checkpointing != "full" and batch.num_tokens == 20:
            raise ERRORS[0]
        return forward(model, batch)

    _, _, (expected,) = sft_run(tmp_path / "a", "--sft.token_budget=100")
    monkeypatch.setattr(sft, "hidden_states", hidden_states)
    trainer, _, (gradient,) = sft_run(tmp_path / "b", "--sft.token_budget=21")
    assert trainer.model.checkpointing == "full"
    assert "layers are computed again" in " ".join(capsys.readouterr().err.split())
    for a, b in zip(gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 if has_fixed_sums() else 1e-6)
    asked = "--model.activation_checkpointing=none"
    with pytest.raises(RuntimeError, match="cannot be divided"):
        sft_run(tmp_path / "c", "--sft.token_budget=21", asked)


def budgets(capsys) -> list[str]:
    err = " ".join(capsys.readouterr().err.split())
    return [part.split(" tokens instead")[0] for part in err.split("has at most ")[1:]]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_grpo_has_the_gradient_of_half_the_budget(tmp_path, monkeypatch, where, error, capsys):
    whole = grpo_gradients(tmp_path, "--grpo.token_budget=200")
    memory = Memory(50, where, error).install(monkeypatch)
    halved = grpo_gradients(tmp_path, "--grpo.token_budget=200")
    first = next(n for n in memory.seen if n > memory.room)
    half = first // 2
    assert memory.room >= half >= 20  # once was enough, and no sequence was over it
    assert budgets(capsys) == [str(half)]
    monkeypatch.undo()
    assert_same(whole, halved)
    from_the_start = grpo_gradients(tmp_path, f"--grpo.token_budget={half}")
    assert halved[1] == from_the_start[1]
    for a, b in zip(halved[0], from_the_start[0], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_sft_is_halved_until_it_fits(tmp_path, monkeypatch, where, dtype, capsys):
    """Below the longest sequence, which then runs alone. bfloat16 adds up in its masters."""
    memory = Memory(20, where).install(monkeypatch)
    trainer, row, (halved,) = sft_run(tmp_path, "--sft.token_budget=100", dtype=dtype)
    assert trainer.token_budget.num_tokens < 20 == max(memory.seen[-3:])
    assert len(budgets(capsys)) == 2
    monkeypatch.undo()
    _, expected, (alone,) = sft_run(tmp_path, "--sft.token_budget=20", dtype=dtype)
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5 if dtype.itemsize == 4 else 1e-2)
    for a, b in zip(halved, alone, strict=True):
        assert (a - b).norm() <= (2e-5 if dtype.itemsize == 4 else 3e-2) * b.norm() + 1e-7


def test_what_does_not_fit_alone_is_an_error_that_says_what_would_do(tmp_path, monkeypatch, capsys):
    Memory(5, "backward").install(monkeypatch)
    policy, config = tiny_policy(), tiny_config()
    trainer = GRPOTrainer(policy, config, tmp_path, tiny_problems(), TokenScorer())
    with pytest.raises(
        RuntimeError, match=r"one sequence of .* tokens, which cannot be divided"
    ) as e:
        trainer.update(random_groups(4, 4, policy.model.spec.vocab_size), 0)
    assert "rollout.max_completion_tokens" in str(e.value)
    assert "Tried to allocate 2 GiB" in str(e.value)
    assert all(p.grad is None for p in policy.model.parameters())
    with pytest.raises(RuntimeError, match=r"sft\.max_seq_tokens"):
        sft_run(tmp_path)


def test_the_reference_forward_is_halved_too(tmp_path, monkeypatch, capsys):
    whole = grpo_gradients(tmp_path, "--grpo.token_budget=200")
    forward, seen = forward_module.completion_logprobs, []

    def completion_logprobs(model, batch, temperature):
        seen.append(batch.num_tokens)
        if batch.num_tokens > 50:
            raise ERRORS[0]
        return forward(model, batch, temperature)

    monkeypatch.setattr(forward_module, "completion_logprobs", completion_logprobs)
    assert_same(whole, grpo_gradients(tmp_path, "--grpo.token_budget=200"))
    assert seen[0] > 50 >= max(seen[1:])
    assert len(budgets(capsys)) == 1


class Stopped(Exception):
    """Stands for a crash."""


def test_a_resumed_run_keeps_what_was_found(tmp_path, monkeypatch):
    """4 steps, memory is short in the 2nd: as 3 and, from the checkpoint after the 2nd, 2 more."""
    memory = Memory(60, "backward")

    def trainer(folder, *overrides, stop=9, **kwargs):
        config = tiny_config("--checkpoint.every_steps=2", "--grpo.token_budget=200", *overrides)
        scorer = TokenScorer()
        made = GRPOTrainer(tiny_policy(), config, folder, tiny_problems(), scorer, **kwargs)
        train_step = made.train_step

        def short_in_the_second(step):
            if step == stop:
                raise Stopped
            memory.is_full = step == 1
            return train_step(step)

        made.train_step = short_in_the_second
        return made

    memory.install(monkeypatch)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = trainer(whole)
    expected.run()
    with pytest.raises(Stopped):
        trainer(parts, stop=2).run()
    resumed = trainer(parts)
    assert resumed.step == 2
    resumed.run()
    for a, b in zip(expected.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    found = [[row["train/token_budget"] for row in read_metrics(x)] for x in (whole, parts)]
    assert found[0] == found[1]
    assert found[0][0] == 200 > found[0][1] == found[0][2] == found[0][3]
    stored = load_checkpoint(parts / "checkpoints").state["token_budget"]
    assert stored == {"num_tokens": found[0][3], "was_halved": True}
    # a budget that is asked for anew counts
    forced = trainer(parts, "--grpo.token_budget=90", "--grpo.num_steps=6", force=True)
    assert (forced.token_budget.num_tokens, forced.token_budget.was_halved) == (90, False)


def test_other_errors_pass(tmp_path, monkeypatch):
    Memory(5, "forward", RuntimeError("mat1 and mat2 shapes cannot be multiplied")).install(
        monkeypatch
    )
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        grpo_gradients(tmp_path)


def test_what_the_cpu_really_raises():
    with pytest.raises(RuntimeError) as e:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(e.value)
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_a_sequence_over_the_budget_is_alone_where_asked():
    sequences = [Sequence([1] * 3, [2] * n) for n in (4, 20, 5, 30)]
    options = {"share_prompts": True, "longer_alone": True}
    batches = pack(sequences, 12, [1.0] * 4, **options)
    assert [b.sequence_index for b in batches] == [[0, 2], [1], [3]]
    assert [b.num_tokens for b in batches] == [3 + 3 + 4, 22, 32]
    with pytest.raises(ValueError, match="more than token_budget 12"):
        pack(sequences, 12, [1.0] * 4, share_prompts=True)


def test_a_budget_never_gets_below_one_token():
    budget = TokenBudget(3, discard=lambda: None, advice="")
    batch = collate([Sequence([1], [2]), Sequence([1], [2])], [1.0] * 2, [[0, 1]], "cpu")

    def attempt():
        for _ in budget.each([batch]):
            if budget.num_tokens > 1:
                raise ERRORS[0]
        return "done"

    assert budget.fitting(attempt) == "done"
    assert (budget.num_tokens, budget.was_halved) == (1, True)


def test_what_is_no_micro_batch_is_not_divided():
    budget = TokenBudget(64, discard=lambda: None, advice="")
    batch = collate([Sequence([1], [2]), Sequence([1], [2])], [1.0] * 2, [[0, 1]], "cpu")

    def attempt(batches):
        list(budget.each(batches))
        raise MemoryError

    for batches in ([], [batch]):  # before the first of them, and after the last
        with pytest.raises(MemoryError):
            budget.fitting(lambda batches=batches: attempt(batches))
    assert budget.num_tokens == 64
