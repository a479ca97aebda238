"""The batch is the first groups with signal in the order of the draws, whatever runs beside them."""

import math
import threading
from dataclasses import replace

import pytest
import torch
from tiny import (
    TokenScorer,
    alike,
    has_fixed_sums,
    tiny_config,
    tiny_policy,
    tiny_problems,
    without_clock,
)

from r1fast import dynamic_sampling
from r1fast.dynamic_sampling import Draws, is_mixed
from r1fast.grpo import groups_with_signal
from r1fast.metrics import _warn_once, read_metrics
from r1fast.trainer import GRPOTrainer
from r1fast.types import Completion, Problem, Reward, RolloutGroup

ON = ("--grpo.dynamic_sampling=signal", "--grpo.kl_coef=0", "--rollout.max_completion_tokens=40")


class ByDraw(TokenScorer):
    """Signal in the draws that `good` is true of."""

    def __init__(self, good=lambda draw: draw % 3 == 1, rewards=(0.0, 1.0)):
        super().__init__()
        self.good, self.rewards = good, rewards

    def score(self, groups, step_from_end=None):
        self.steps_from_end.append(step_from_end)
        for group in groups:
            low, high = self.rewards
            first = Reward(high if self.good(group.position) else low, {"stub": high}, None)
            rest = (Reward(low, {"stub": low}, None) for _ in group.completions[1:])
            group.rewards = [first, *rest]


def make_trainer(folder, *overrides, scorer=None, num_problems=40, **kwargs) -> GRPOTrainer:
    policy, config = tiny_policy(std=0.2), tiny_config(*ON, *overrides)
    problems = tiny_problems(num_problems)
    return GRPOTrainer(policy, config, folder, problems, scorer or ByDraw(), **kwargs)


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def rollout_metrics(trainer, step=0):
    row = trainer.train_step(step)
    return row, {k.removeprefix("rollout/"): v for k, v in row.items() if k.startswith("rollout/")}


def test_what_is_known_of_the_draws():
    draws = Draws(2, limit=6)
    draws.num_started = 4
    assert (draws.taken, draws.end, draws.num_open, draws.is_done) == ([], 4, 4, False)
    draws.signal |= {2: True, 3: True}
    assert draws.taken == [2, 3]  # so far: 0 and 1 may come before
    assert (draws.end, draws.num_open, draws.is_done) == (4, 2, False)
    draws.signal[1] = True
    assert (draws.taken, draws.end) == ([1, 2], 3)  # 3 cannot matter any more
    assert (draws.num_open, draws.is_done) == (1, False)
    draws.signal[0] = False
    assert (draws.taken, draws.num_open, draws.is_done) == ([1, 2], 0, True)
    draws.signal[0] = True
    assert (draws.taken, draws.end, draws.is_done) == ([0, 1], 2, True)


def test_as_many_begin_as_will_probably_be_needed():
    draws = Draws(8, limit=20)

    def num_begun():
        before = draws.num_started
        while draws.is_short:
            draws.num_started += 1
        return draws.num_started - before

    assert num_begun() == 8
    draws.signal |= dict.fromkeys(range(4), True)
    assert num_begun() == 0
    draws.signal |= {4: False, 5: False}  # a share of (4 + 2) / (6 + 2), and 2 are under way
    assert num_begun() == 4  # 4 + 6 x 0.75 is enough
    draws.signal |= dict.fromkeys(range(6, 12), False)
    assert num_begun() == 8  # all there are
    assert not draws.is_done
    draws.signal |= dict.fromkeys(range(12, 20), False)
    assert draws.is_done
    assert draws.taken == [0, 1, 2, 3]


@pytest.mark.parametrize("slots", [3, 8, 64])
@pytest.mark.parametrize("rounds", [1, 16])
def test_the_batch_does_not_depend_on_what_runs_beside(tmp_path, monkeypatch, slots, rounds):
    """It is what sampling every candidate and looking afterwards gives, and so are the weights."""
    monkeypatch.setattr(dynamic_sampling, "ROUND", rounds)
    trainer = make_trainer(tmp_path, f"--rollout.max_batch_size={slots}")
    drawn = trainer._draw(0)

    plain = make_trainer(tmp_path)
    picks = plain._choose(0)
    assert len(picks) == 16
    groups = plain.engine.generate(
        [ids for _, ids in picks], 4, plain.sampling, seeds=[plain._seeds(0, d) for d in range(16)],
        problems=[problem for problem, _ in picks],
    )  # fmt: skip
    for draw, group in enumerate(groups):
        group.position = draw
    plain.scorer.score(groups)
    good = [g for g, has in zip(groups, groups_with_signal(groups), strict=True) if has][:4]
    assert [g.position for g in good] == [1, 4, 7, 10]

    def content(groups, logprobs=list):
        return [(g.position, g.problem.id, g.prompt_ids, [r.total for r in g.rewards],
                 [(c.token_ids, logprobs(c.logprobs), c.text, c.finish_reason) for c in g.completions])
                for g in groups]  # fmt: skip

    assert content(drawn.kept) == content(good, alike)
    assert content(drawn.sampled) == content(groups[:11], alike)  # to the one that filled the batch
    if not has_fixed_sums():
        return
    trainer.update(drawn.kept, 0)
    plain.update(good, 0)
    for name, x in weights(plain).items():
        assert torch.equal(weights(trainer)[name], x), name


def test_nothing_more_is_drawn_than_is_needed_where_all_have_signal(tmp_path):
    row, of_rollout = rollout_metrics(make_trainer(tmp_path, scorer=ByDraw(lambda draw: True)))
    assert of_rollout["groups_generated"] == of_rollout["groups_kept"] == 4
    assert of_rollout["oversampling"] == 1
    assert of_rollout["groups_missing"] == of_rollout["tokens_discarded"] == 0
    assert row["train/steps_without_signal"] == row["train/tokens_without_signal"] == 0


def test_what_cannot_matter_is_stopped_and_its_tokens_are_counted(tmp_path, monkeypatch):
    """Draws 1 to 3 end without signal, so many others begin; 4 to 7 fill the batch, and what follows
    them is stopped while draw 0, which may take the place of one, still decodes."""
    monkeypatch.setattr(dynamic_sampling, "ROUND", 4)
    trainer = make_trainer(
        tmp_path, "--rollout.max_batch_size=64", "--rollout.max_completion_tokens=60",
        "--grpo.max_rollout_factor=10", scorer=ByDraw(lambda draw: draw not in (1, 2, 3)),
    )  # fmt: skip
    engine, asked = trainer.engine, []
    real = engine.add

    def add(prompt_ids, seeds, sampling, *, name, stream):
        asked.append(int(name.split()[1]))
        lengths = [3 if 1 <= asked[-1] <= 7 else 60] * 4
        sampling = replace(sampling, ignore_eos=True)
        return real(prompt_ids, seeds, sampling, name=name, stream=stream, lengths=lengths)

    engine.add = add
    row, of_rollout = rollout_metrics(trainer)
    assert asked == list(range(len(asked)))
    assert of_rollout["groups_generated"] == len(asked) > 12
    assert of_rollout["groups_kept"] == 4
    per_sample = of_rollout["tokens_aborted"] / (len(asked) - 8) / 4
    assert 1 <= per_sample <= 12  # of 60
    kept, all_tokens = 60 + 3 * 3, 60 + 7 * 3 + of_rollout["tokens_aborted"] / 4
    assert of_rollout["tokens_discarded"] == pytest.approx(1 - kept / all_tokens)
    assert row["frac_reward_zero_std"] == 3 / 7  # of draws 0 to 6, the last one of the batch
    assert not engine.has_work
    assert engine.stats.num_running == engine.stats.num_waiting == engine.stats.blocks_used == 0


def test_rewards_are_made_while_the_engine_decodes(tmp_path):
    busy = []

    class Watching(ByDraw):
        def score(self, groups, step_from_end=None):
            assert threading.current_thread() is not threading.main_thread()
            busy.append(trainer.engine.has_work)
            super().score(groups, step_from_end)

    trainer = make_trainer(tmp_path, "--rollout.max_batch_size=4", scorer=Watching())
    trainer.train_step(1)
    assert sum(busy) > len(busy) / 2
    assert set(trainer.scorer.steps_from_end) == {2}
    assert {"time/rollout", "time/reward"} <= trainer.timer.take().keys()


def test_a_batch_that_cannot_be_filled_is_smaller_and_says_so(tmp_path, capsys):
    _warn_once.cache_clear()
    trainer = make_trainer(
        tmp_path, "--grpo.max_rollout_factor=2", scorer=ByDraw(lambda draw: draw in (2, 5, 6)),
    )  # fmt: skip
    seen = []
    real = trainer.update
    trainer.update = lambda groups, step: seen.append(groups) or real(groups, step)
    for step in range(2):
        row, of_rollout = rollout_metrics(trainer, step)
        assert of_rollout["groups_generated"] == 8
        assert (of_rollout["groups_kept"], of_rollout["groups_missing"]) == (3, 1)
        assert [g.position for g in seen[-1]] == [2, 5, 6]
        assert row["frac_reward_zero_std"] == 5 / 8
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("fewer than grpo.prompts_per_step groups with signal") == 1


def test_without_any_signal_there_is_no_step(tmp_path):
    scorer = ByDraw(lambda draw: False)
    trainer = make_trainer(tmp_path, "--grpo.kl_coef=0.1", scorer=scorer)
    before = weights(trainer)
    row, of_rollout = rollout_metrics(trainer)
    assert all(torch.equal(before[name], x) for name, x in weights(trainer).items())
    assert row["train/steps_without_signal"] == of_rollout["tokens_discarded"] == 1
    assert row["loss"] == of_rollout["groups_kept"] == 0
    assert row["reward"] == 0
    scorer.good = lambda draw: True
    assert trainer.train_step(1)["grad_norm"] > 0


def test_a_run_without_any_signal_ends_and_resumes(tmp_path):
    """Each step draws max_rollout_factor batches and no more; the weights stay, the schedule goes on."""

    class Crashing(ByDraw):
        def score(self, groups, step_from_end=None):
            if step_from_end == 1:
                raise InterruptedError
            super().score(groups, step_from_end)

    def never(draw):
        return False

    overrides = ("--checkpoint.every_steps=2", "--optim.weight_decay=0.1",
                 "--grpo.max_rollout_factor=2", "--rollout.max_completion_tokens=8")  # fmt: skip
    whole = make_trainer(tmp_path / "whole", *overrides, scorer=ByDraw(never))
    before = weights(whole)
    whole.run()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "parts", *overrides, scorer=Crashing(never)).run()
    parts = make_trainer(tmp_path / "parts", *overrides, scorer=ByDraw(never))
    assert parts.step == parts.optimizer_step == 2
    parts.run()
    for trainer in (whole, parts):
        assert all(torch.equal(before[name], x) for name, x in weights(trainer).items())
        assert trainer.optimizer_step == 4
    rows = [without_clock(read_metrics(tmp_path / name)) for name in ("whole", "parts")]
    for row in rows[0] + rows[1]:
        del row["rollout/cache_mib"]  # the most that the process's engine ever held
    assert rows[0] == rows[1]
    assert [row["rollout/groups_generated"] for row in rows[0]] == [8] * 4
    assert [row["rollout/groups_missing"] for row in rows[0]] == [4] * 4
    assert [row["train/steps_without_signal"] for row in rows[0]] == [1] * 4


def test_a_small_data_set_is_drawn_once(tmp_path):
    trainer = make_trainer(tmp_path, num_problems=10, scorer=ByDraw(lambda draw: False))
    assert rollout_metrics(trainer)[1]["groups_generated"] == 10


def test_the_candidates_are_those_of_seed_and_step(tmp_path):
    trainer = make_trainer(tmp_path)
    off = make_trainer(tmp_path, "--grpo.dynamic_sampling=off")
    general = [Problem(f"Say {w}", None, f"g{w}", "general") for w in "abc"]
    mixed = make_trainer(tmp_path, general=general)
    orders = []
    for step in range(3):
        ids = [problem.id for problem, _ in trainer._choose(step)]
        assert len(ids) == len(set(ids)) == 16
        assert ids[:4] == [problem.id for problem, _ in off._choose(step)]  # every epoch is whole
        assert ids == [problem.id for problem, _ in make_trainer(tmp_path)._choose(step)]
        kinds = [problem.kind for problem, _ in mixed._choose(step)]
        assert kinds == ["math"] * 3 + ["general"] + ["math"] * 12
        orders.append(ids)
    assert len({tuple(ids[4:]) for ids in orders}) == 3
    assert trainer._seeds(0, 5) != trainer._seeds(1, 5) != trainer._seeds(0, 6)


def test_resume_is_bitwise(tmp_path):
    """With the counts of what was begun and stopped: they go by the engine's steps, not by time."""

    class Crashing(ByDraw):
        def score(self, groups, step_from_end=None):
            if step_from_end == 0:
                raise InterruptedError
            super().score(groups, step_from_end)

    overrides = ("--checkpoint.every_steps=2", "--rollout.max_batch_size=10")
    whole = make_trainer(tmp_path / "whole", *overrides)
    whole.run()
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path / "parts", *overrides, scorer=Crashing()).run()
    parts = make_trainer(tmp_path / "parts", *overrides)
    assert parts.step == 2
    parts.run()
    for name, x in weights(whole).items():
        assert torch.equal(weights(parts)[name], x), name
    rows = [without_clock(read_metrics(tmp_path / name)) for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
    samples = [(tmp_path / n / "completions.jsonl").read_text() for n in ("whole", "parts")]
    assert samples[0] == samples[1]


def test_the_clock_changes_no_count(tmp_path, monkeypatch):
    """How many decode steps the native loop makes in a call goes by time; a round has as many for all that."""

    def counts():
        trainer = make_trainer(tmp_path, "--rollout.max_batch_size=10")
        return [rollout_metrics(trainer, step)[1] for step in range(2)]

    expected = counts()
    monkeypatch.setattr("r1fast.rollout.native.MAX_SECONDS", 0.0)
    assert counts() == expected
    assert sum(row["tokens_aborted"] for row in expected) > 0


def test_errors_leave_the_engine_idle(tmp_path):
    scorer = ByDraw(lambda draw: draw == 0, rewards=(0.0, math.nan))
    trainer = make_trainer(tmp_path, "--rollout.max_batch_size=4", scorer=scorer)
    with pytest.raises(ValueError, match="completion 0: the reward is nan"):
        trainer.train_step(0)
    trainer.scorer.rewards = (0.0, 1.0)
    with torch.no_grad():
        trainer.model.embed.weight.mul_(1.01)  # refused while requests run
    trainer.train_step(0)
    with torch.no_grad():
        trainer.model.embed.weight.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match="step 2: draw 0, sample 0: the model's logits are"
    ):
        trainer.train_step(1)


@pytest.mark.parametrize(
    ("verdicts", "mixed"),
    [
        (("correct", "wrong"), True),
        (("correct", "correct"), False),
        (("wrong", "no_answer"), False),
        (("correct", "error"), False),  # an error earned the mean of the others
        (("correct", "error", "timeout"), True),
        (("error", "error"), False),
        ((None, None), True),  # nothing to verify: the rewards alone decide
    ],
)
def test_some_but_not_all_are_correct(verdicts, mixed):
    completions = [Completion([1], [0.0], "stop") for _ in verdicts]
    rewards = [Reward(float(v == "correct"), {}, v) for v in verdicts]
    assert is_mixed(RolloutGroup(Problem("?"), [1], completions, rewards)) == mixed


def test_by_accuracy_a_difference_in_format_is_no_signal(tmp_path):
    """Every draw has one; in every second one the answers differ too."""

    class Formats(TokenScorer):
        def score(self, groups, step_from_end=None):
            for group in groups:
                right = [1, group.position % 2, 1, 1]
                group.rewards = [Reward(r + 0.1 * (n == 0), {}, "correct" if r else "wrong")
                                 for n, r in enumerate(right)]  # fmt: skip

    for how, expected in (("signal", [0, 1, 2, 3]), ("accuracy", [0, 2, 4, 6])):
        trainer = make_trainer(tmp_path, f"--grpo.dynamic_sampling={how}", scorer=Formats())
        assert [g.position for g in trainer._draw(0).kept] == expected
