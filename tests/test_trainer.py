import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    TokenScorer,
    random_groups,
    tiny_config,
    tiny_policy,
    tiny_problems,
    without_clock,
)

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.metrics import read_metrics
from r1fast.model import load_tokenizer
from r1fast.progress import step_line
from r1fast.recording import read_recording
from r1fast.report import write_report
from r1fast.rewards.score import RewardScorer
from r1fast.running_sum import build_tokenizer
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem


class Stopped(Exception):
    """Stands for a crash."""


class StoppingScorer(TokenScorer):
    """Crashes in the reward phase of the step after `steps`."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def score(self, groups, step_from_end=None):
        if not self.left:
            raise Stopped
        self.left -= 1
        super().score(groups, step_from_end)


@pytest.mark.parametrize("prompt", ["sum 1 2 ?", "Natalia sold 48 clips in April ."])
@pytest.mark.parametrize("role", ["unk", "eos"])
def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path, capsys, prompt, role):
    """Unless its unknown token has another role, as Qwen2's: that one may stand there on purpose."""
    build_tokenizer(tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    if role == "eos":
        tokenizer.eos_token = tokenizer.unk_token
    problems = [replace(problem, prompt=prompt) for problem in tiny_problems()]
    make_trainer(tmp_path / role, problems=problems, policy=tiny_policy(tokenizer=tokenizer))
    err = capsys.readouterr().err
    told = err.count("the tokens of the first 12 prompts are '<unk>', text that the tokenizer of")
    assert told == ("Natalia" in prompt and role == "unk")
    assert told == err.count("warning: 100% of")


def make_trainer(folder, *overrides, scorer=None, problems=None, policy=None, **kwargs):
    Path(folder).mkdir(exist_ok=True)
    return GRPOTrainer(
        policy or tiny_policy(),
        tiny_config(*overrides),
        folder,
        tiny_problems() if problems is None else problems,
        scorer or TokenScorer(),
        **kwargs,
    )


def timeless(folder) -> list[dict]:
    return without_clock(read_metrics(folder))


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_resume_is_bitwise(tmp_path):
    """4 steps = 2 + crash in the 4th + resume: weights, moments, reference, metrics, samples.

    Two optimizer steps a rollout, the reference refreshed every 3: once before the checkpoint
    at step 2, once behind it.
    """
    overrides = (
        "--checkpoint.every_steps=2",
        "--grpo.num_mini_batches=2",
        "--grpo.ref_refresh_steps=3",
        "--optim.min_lr_ratio=0.1",
        "--optim.warmup_steps=3",
    )
    whole = make_trainer(tmp_path / "whole", *overrides)
    whole.run()

    with pytest.raises(Stopped):
        make_trainer(tmp_path / "parts", *overrides, scorer=StoppingScorer(3)).run()
    assert [r["step"] for r in read_metrics(tmp_path / "parts")] == [1, 2, 3]
    parts = make_trainer(tmp_path / "parts", *overrides)
    assert parts.step == 2
    assert parts.optimizer_step == 4
    parts.run()

    for a, b in (
        (dict(whole.model.named_parameters()), dict(parts.model.named_parameters())),
        (whole.optimizer.state_tensors(), parts.optimizer.state_tensors()),
        (
            dict(whole.reference.model.named_parameters()),
            dict(parts.reference.model.named_parameters()),
        ),
    ):
        assert_same_tensors(a, b)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    samples = [(tmp_path / n / "completions.jsonl").read_text() for n in ("whole", "parts")]
    assert samples[0] == samples[1]
    assert [json.loads(line)["step"] for line in samples[0].splitlines()] == sorted(
        [1, 2, 3, 4] * 4
    )
    for name in ("model.safetensors", "tokenizer.json"):
        files = [(tmp_path / n / "model" / name).read_bytes() for n in ("whole", "parts")]
        assert files[0] == files[1]


def test_changed_config_is_refused_with_the_difference(tmp_path):
    def resume(*overrides, **kwargs):
        return make_trainer(tmp_path, "--checkpoint.every_steps=1", *overrides, **kwargs)

    with pytest.raises(Stopped):
        resume(scorer=StoppingScorer(2)).run()
    with pytest.raises(ValueError, match=r"begun with another config") as error:
        resume("--grpo.kl_coef=0.5", "--seed=3")
    assert "grpo.kl_coef" in str(error.value)
    assert "0.05" in str(error.value)
    assert "0.5" in str(error.value)
    assert "seed" in str(error.value)
    assert "--force" in str(error.value)
    # what is shown and where it is written does not matter
    assert resume("--log.num_samples=1", "--checkpoint.keep_last=2").step == 2
    forced = resume("--grpo.kl_coef=0.5", force=True)
    assert forced.step == 2
    forced.run()
    assert forced.step == 4


def test_reference_is_refreshed_at_the_right_step(tmp_path):
    trainer = make_trainer(tmp_path, "--grpo.ref_refresh_steps=3")
    start = {n: p.clone() for n, p in trainer.model.named_parameters()}
    for step in range(7):
        trainer.train_step(step)
        policy, reference = (
            dict(m.named_parameters()) for m in (trainer.model, trainer.reference.model)
        )
        if step < 2:
            assert_same_tensors(reference, start)
        if step in (2, 5):
            assert_same_tensors(reference, policy)
            start = {n: p.clone() for n, p in policy.items()}
        elif step > 2:
            assert_same_tensors(reference, start)  # as it was refreshed, not as the policy is
        assert torch.equal(reference["embed.weight"], policy["embed.weight"]) == (step in (2, 5))


def test_reference_of_several_optimizer_steps_a_rollout(tmp_path):
    """4 optimizer steps a rollout, refresh every 6: passed inside the 2nd and at the 3rd's end."""
    trainer = make_trainer(tmp_path, "--grpo.num_mini_batches=2", "--grpo.num_iterations=2",
                           "--grpo.ref_refresh_steps=6")  # fmt: skip
    refreshed = []
    for step in range(4):
        trainer.train_step(step)
        refreshed.append(
            torch.equal(trainer.reference.model.embed.weight, trainer.model.embed.weight)
        )
    assert trainer.optimizer_step == 16
    assert refreshed == [False, True, True, False]


def test_reference_never_refreshed_and_none_at_all(tmp_path):
    trainer = make_trainer(tmp_path / "a", "--grpo.ref_refresh_steps=0")
    start = trainer.reference.model.embed.weight.clone()
    trainer.train_step(0)
    assert torch.equal(trainer.reference.model.embed.weight, start)
    without = make_trainer(tmp_path / "b", "--grpo.kl_coef=0")
    assert without.reference is None
    assert "kl" not in without.train_step(0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_temperature_is_in_the_logprobs(tmp_path, temperature):
    trainer = make_trainer(tmp_path, f"--rollout.temperature={temperature}")
    first = trainer.train_step(0)
    assert first["logprob_mismatch/max"] < 1e-5
    assert first["logprob_mismatch/mean"] <= first["logprob_mismatch/max"]
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["clip_ratio/region_mean"] == 0
    second = trainer.train_step(1)
    assert second["kl"] > 1e-6  # the policy has left the reference
    assert second["logprob_mismatch/max"] < 1e-5  # yet the sampler is still the trainer


def test_later_iterations_are_off_policy(tmp_path):
    overrides = ("--grpo.num_iterations=3", "--optim.lr=0.01", "--grpo.clip_eps_low=0.01",
                 "--grpo.clip_eps_high=0.01")  # fmt: skip
    row = make_trainer(tmp_path, *overrides).train_step(0)
    assert row["ratio"] != pytest.approx(1, abs=1e-4)
    assert row["clip_ratio/region_mean"] > 0
    both = row["clip_ratio/low_mean"] + row["clip_ratio/high_mean"]
    assert row["clip_ratio/region_mean"] == pytest.approx(both)
    assert row["logprob_mismatch/max"] < 1e-5  # of the first forward, before any update


def test_the_metrics_row_has_trls_names(tmp_path):
    calls = []

    def evaluate():
        calls.append(1)
        return {"pass@1": 0.5, "verdicts": {"correct": 1}}

    with RewardScorer(RewardConfig(), TemplateConfig(name="raw"), 8) as scorer:
        trainer = make_trainer(
            tmp_path,
            "--eval.every_steps=2",
            "--grpo.num_steps=2",
            scorer=scorer,
            evaluate=evaluate,
        )
        trainer.run()
    first, second = read_metrics(tmp_path)
    wanted = {
        "step", "stage", "loss", "learning_rate", "grad_norm", "reward", "reward_std",
        "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/accuracy/std",
        "rewards/format/mean", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/clipped_ratio", "kl", "entropy",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "num_tokens",
        "step_time", "tokens_per_second", "time/rollout", "time/reward", "time/reference",
        "time/train", "logprob_mismatch/mean", "logprob_mismatch/max",
    }  # fmt: skip
    assert wanted <= set(first), wanted - set(first)
    assert len(calls) == 1
    assert "eval/pass@1" not in first
    assert second["eval/pass@1"] == 0.5
    assert "time/eval" in second  # in the row of the step that was evaluated
    assert "eval/verdicts" not in second
    phases = sum(first[f"time/{name}"] for name in ("rollout", "reward", "reference", "train"))
    assert phases <= first["step_time"] * 1.01
    # a random model never answers: no reward, no spread, no gradient but the KL's
    assert first["reward"] == first["reward_std"] == 0
    assert first["frac_reward_zero_std"] == 1
    sampled = [json.loads(x) for x in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {"step", "problem_id", "prompt", "answer", "text", "reward"} <= set(sampled[0])


def test_num_tokens_counts_prompts_once_a_completion(tmp_path):
    trainer = make_trainer(tmp_path, "--grpo.num_iterations=2")
    groups = trainer.rollout(0)
    trainer.scorer.score(groups)
    trainer.update(groups, 0)
    expected = sum(len(g.prompt_ids) + len(c.token_ids) for g in groups for c in g.completions)
    assert trainer.num_tokens == expected


def test_prompts_that_are_too_long_are_dropped_with_a_warning(tmp_path, capsys):
    problems = [*tiny_problems(), Problem("long " * 50, "1", "a long one")]
    trainer = make_trainer(tmp_path, problems=problems)
    assert len(trainer.problems) == len(trainer.prompt_ids) == 12
    message = capsys.readouterr().err
    assert "1 of 13 prompts are longer than 32 tokens" in " ".join(message.split())
    assert "a long one" in message
    with pytest.raises(ValueError, match="all 1 prompts are longer than 32 tokens"):
        make_trainer(tmp_path, problems=problems[:1] * 0 + [Problem("long " * 50, "1", "x")])
    with pytest.raises(ValueError, match="there are no training problems"):
        make_trainer(tmp_path, problems=[])


def test_a_gradient_that_is_not_finite_is_skipped_and_five_in_a_row_stop(tmp_path, capsys):
    policy = tiny_policy()
    trainer = make_trainer(tmp_path, "--grpo.num_steps=8", policy=policy)
    trainer.train_step(0)
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    groups = random_groups(4, 4, policy.model.spec.vocab_size)
    for group in groups:  # an old log-probability that makes the ratio overflow
        for c, reward in zip(group.completions, group.rewards, strict=True):
            c.logprobs = [math.nan] * len(c.logprobs)
            reward.total = float(len(c.token_ids))
    for attempt in range(1, 5):
        row = trainer.update(groups, attempt)
        assert not math.isfinite(row["grad_norm"])
        assert math.isnan(row["loss"])
        assert row["train/updates_skipped"] == 1
        assert row["train/steps_without_signal"] == 0
        assert trainer.num_skipped == attempt
    assert_same_tensors(dict(policy.model.named_parameters()), before)
    assert "gradient is not finite, update skipped" in " ".join(capsys.readouterr().err.split())
    trainer.train_step(5)  # a good one in between
    assert trainer.num_skipped == 0
    with pytest.raises(FloatingPointError, match="5 gradients in a row were not finite"):
        for attempt in range(5):
            trainer.update(groups, attempt)


@pytest.mark.parametrize("budget", [10_000, 40])
def test_a_skipped_update_is_in_its_row_and_in_the_report(tmp_path, budget):
    """One micro-batch of several is enough; what is written is JSON, which has no NaN."""
    trainer = make_trainer(
        tmp_path, f"--grpo.token_budget={budget}", "--grpo.num_steps=3", '--log.record="2"'
    )
    real = trainer.rollout

    def rollout(step):
        groups = real(step)
        if step == 1:
            groups[0].completions[0].logprobs[0] = math.nan
        return groups

    trainer.rollout = rollout
    trainer.run()

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["train/updates_skipped"] for row in rows] == [0, 1, 0]
    assert [row["loss"] is None for row in rows] == [False, True, False]
    assert set(rows[1]["nonfinite"]) >= {"loss", "grad_norm"}
    assert [("skipped 1" in step_line(row)) for row in rows] == [False, True, False]
    assert math.isnan(read_recording(tmp_path, 2).state["row"]["loss"])
    (tmp_path / "manifest.json").write_text("{}")
    write_report(tmp_path)
    assert "NaN" not in (tmp_path / "report.html").read_text()


def test_an_update_leaves_nothing_of_the_weights_that_sampled(tmp_path):
    """Neither cached prefixes nor packed weights: they would take memory until the next rollout."""
    problems = [Problem(f"What is {i} + {i}? " * 8, str(2 * i), f"p{i}") for i in range(4)]
    trainer = make_trainer(tmp_path, "--rollout.max_prompt_tokens=99", problems=problems)
    groups = trainer.rollout(0)
    assert all(len(group.prompt_ids) > 16 for group in groups)  # a block
    trainer.scorer.score(groups)
    assert trainer.engine.stats.blocks_cached > 0
    trainer.update(groups, 0)
    assert trainer.engine.stats.blocks_cached == 0
    assert trainer.engine.runner._native is None
    assert trainer.engine.runner._stacks is None


def test_general_prompts_join_in_the_last_steps_only(tmp_path):
    general = [Problem(f"Say {w}", None, f"g{w}", "general") for w in ("a", "b", "c")]
    overrides = ("--grpo.num_steps=5", "--rewards.preference_last_steps=2",
                 "--rewards.general_share=0.5")  # fmt: skip
    trainer = make_trainer(tmp_path, *overrides, general=general)
    kinds = [[p.kind for p, _ in trainer._choose(step)] for step in range(5)]
    assert kinds == [["math"] * 4] * 3 + [["math"] * 2 + ["general"] * 2] * 2
    for step in range(5):
        trainer.train_step(step)
    assert trainer.scorer.steps_from_end == [4, 3, 2, 1, 0]
    nobody = make_trainer(tmp_path / "b", *overrides)
    assert all(p.kind == "math" for p, _ in nobody._choose(4))


def test_every_epoch_visits_every_problem(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = [p.id for step in range(3) for p, _ in trainer._choose(step)]
    assert sorted(seen) == sorted(p.id for p in tiny_problems(12))


def test_reward_rises_on_a_trivial_task(tmp_path):
    """An extra reward for one token, through the real scorer: the policy finds it."""
    policy = tiny_policy()
    (wanted,) = policy.tokenizer.encode("5", add_special_tokens=False)

    def share(prompts, completions, completion_ids, **columns):
        assert len(prompts) == len(completions) == len(completion_ids) == len(columns["id"])
        return [sum(t == wanted for t in ids) / len(ids) for ids in completion_ids]

    weights = RewardConfig(accuracy=0.0, format=0.0)
    with RewardScorer(
        weights, TemplateConfig(name="raw"), 8, extra={"share": (share, 1.0)}
    ) as scorer:
        trainer = make_trainer(
            tmp_path,
            "--grpo.num_steps=12",
            "--rollout.num_generations=16",
            "--optim.lr=0.02",
            "--grpo.kl_coef=0.0",
            scorer=scorer,
            policy=policy,
            problems=tiny_problems(kind="general"),  # nothing for the grader to read
        )
        trainer.run()
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert rewards[0] < 0.1
    assert max(rewards[-2:]) > 0.5, rewards
    assert [r["rewards/share/mean"] for r in read_metrics(tmp_path)] == pytest.approx(rewards)


def test_run_writes_a_folder_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    trainer = make_trainer(tmp_path, "--grpo.num_steps=1")
    trainer.run()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 0
    assert torch.equal(theirs.model.embed_tokens.weight, trainer.model.embed.weight)


def test_a_failed_checkpoint_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("r1fast.checkpoint_writer.publish", full)
    make_trainer(tmp_path, "--grpo.num_steps=2", "--checkpoint.every_steps=1").run()
    assert "No space left" in capsys.readouterr().err
    assert len(read_metrics(tmp_path)) == 2
    assert Path(tmp_path / "model").is_dir()


@pytest.mark.parametrize("change", [{"answer": "77"}, {"language": "zh"}, {"kind": "general"}])
def test_another_answer_is_other_data(tmp_path, change):
    def data(problems):
        trainer = GRPOTrainer(tiny_policy(), tiny_config(), tmp_path, problems, TokenScorer())
        return trainer.data

    problems = tiny_problems()
    assert data(problems) != data([replace(problems[0], **change), *problems[1:]])
