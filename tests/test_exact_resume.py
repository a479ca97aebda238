"""N steps are k, a stop and N - k, to the last bit: weights, moments, reference, rows of metrics, sampled tokens.

Stops between and amid updates by a signal are in test_faults.py, kill -9 in test_checkpoint_faults.py, two
ranks in test_resume_ranks.py.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_reward_model import ADAMW, pairs, small
from test_reward_model import trainer as reward_trainer
from tiny import (
    TokenScorer,
    tiny_checkpoint,
    tiny_config,
    tiny_policy,
    tiny_problems,
    without_clock,
)

from r1fast.data import load_problems
from r1fast.examples import Example
from r1fast.interrupt import Stopped
from r1fast.jsonl import write_jsonl
from r1fast.metrics import read_metrics
from r1fast.policy import load_policy
from r1fast.rejection import rejection_sample
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer
from r1fast.training import Trainer
from r1fast.training_state import tokenizer_facts
from r1fast.types import Problem

STEPS = 5


class RecordingScorer(TokenScorer):
    """Keeps what was sampled: {step: [(position, problem, token ids, log-probabilities)]}."""

    def __init__(self):
        super().__init__(lambda ids: float(sum(t % 2 for t in ids) > len(ids) / 2))
        self.sampled: dict[int, list] = {}

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        step = STEPS - 1 - step_from_end
        self.sampled.setdefault(step, []).extend(
            (group.position, group.problem.id, c.token_ids, c.logprobs)
            for group in groups
            for c in group.completions
        )


def config_of(*overrides: str):
    return tiny_config(
        f"--grpo.num_steps={STEPS}", f"--sft.max_steps={STEPS}", "--checkpoint.every_steps=1",
        "--optim.warmup_steps=2", "--optim.min_lr_ratio=0.1", *overrides,
    )  # fmt: skip


def grpo(folder, *overrides) -> Trainer:
    return GRPOTrainer(
        tiny_policy(), config_of(*overrides), folder, tiny_problems(), RecordingScorer()
    )


def sft(folder, *overrides) -> Trainer:
    policy, config = tiny_policy(), config_of(*overrides)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(8)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def reward_model(folder, *overrides) -> Trainer:
    return reward_trainer(
        small(), pairs(8, 3), folder, max_steps=STEPS, batch_size=4, optim=ADAMW, every=1,
        eval_data=pairs(5, 9),
    )  # fmt: skip


# where it is stopped: epochs are 3 steps of GRPO, 2 of SFT and the reward model
CASES = {
    "grpo": (grpo, (2, 3), ()),
    "several updates a rollout": (
        grpo, (3,), ("--grpo.num_mini_batches=2", "--grpo.num_iterations=2", "--grpo.ref_refresh_steps=5"),
    ),
    "dynamic sampling": (grpo, (2,), ("--grpo.dynamic_sampling=signal", "--grpo.kl_coef=0")),
    "grpo, adapters": (grpo, (3,), ("--lora.rank=3", "--grpo.ref_refresh_steps=2")),
    "sft": (sft, (3, 4), ("--sft.batch_size=4",)),
    "sft, a batch of two epochs": (sft, (2,), ("--sft.batch_size=5",)),
    "sft, adapters": (sft, (2,), ("--sft.batch_size=4", "--lora.rank=3")),
    "reward model": (reward_model, (2, 3), ()),
}  # fmt: skip


def cut(trainer: Trainer, step: int) -> None:
    """Run it, and stop before this step."""
    real = trainer.train_step

    def train_step(n):
        if n == step:
            raise Stopped
        return real(n)

    trainer.train_step = train_step
    with pytest.raises(Stopped):
        trainer.run()


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = trainer.state_tensors()
    return {f"{name}.{key}": x for name, named in found.items() for key, x in named.items()}


def assert_same_run(a: Trainer, b: Trainer) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name
    rows, others = (without_clock(read_metrics(t.folder)) for t in (a, b))
    for row in rows + others:
        row.pop("rollout/cache_mib", None)  # the most that the process's engine ever held
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == others
    for name in ("completions.jsonl", "model/model.safetensors"):
        files = [t.folder / name for t in (a, b)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, case):
    make, cuts, overrides = CASES[case]
    whole, again = make(tmp_path / "whole", *overrides), make(tmp_path / "again", *overrides)
    whole.run()
    again.run()  # the same seed is the same run, too
    assert_same_run(whole, again)
    for step in cuts:
        first = make(tmp_path / f"cut-{step}", *overrides)
        cut(first, step)
        second = make(tmp_path / f"cut-{step}", *overrides)
        assert second.step == step
        second.run()
        assert_same_run(whole, second)
        if make is grpo:
            before, after = (trainer.scorer.sampled for trainer in (first, second))
            assert (*before, *after) == tuple(range(STEPS))
            assert before | after == whole.scorer.sampled == again.scorer.sampled


def test_another_seed_is_another_run(tmp_path):
    runs = [grpo(tmp_path / seed, f"--seed={seed}", "--grpo.num_steps=1") for seed in "01"]
    for run in runs:
        run.scorer.score = TokenScorer.score.__get__(run.scorer)
        run.run()
    a, b = (tensors(run) for run in runs)
    assert not torch.equal(a["model.embed.weight"], b["model.embed.weight"])


class AllRight(TokenScorer):
    """Every completion is right, and written in the pattern."""

    prompt_opens_think = False

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            for c, reward in zip(group.completions, group.rewards, strict=True):
                c.text = f"<think> it is {c.token_ids} </think> <answer> 1 </answer>"
                c.finish_reason, reward.verdict = "stop", "correct"


class StoppedScorer(AllRight):
    def score(self, groups, step_from_end=None):
        raise KeyboardInterrupt


def test_rejection_sampling_that_was_stopped_begins_again_to_the_same(tmp_path):
    config = tiny_config("--sample.num_samples=3", "--sample.min_language_share=0")
    files = {}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()

        def sample(scorer, folder=tmp_path / name):
            rejection_sample(tiny_policy(), tiny_problems(5), config, scorer, folder)

        if name == "parts":
            with pytest.raises(KeyboardInterrupt):
                sample(StoppedScorer())
        sample(AllRight())
        files[name] = [
            (tmp_path / name / n).read_bytes() for n in ("sampled.jsonl", "accounting.json")
        ]
    assert files["whole"] == files["parts"]
    assert b"it is" in files["whole"][0]


@pytest.fixture
def on_disk(tmp_path):
    """A model, a file of problems, and a trainer of both."""
    tiny_checkpoint(tmp_path / "model")
    rows = [{"prompt": f"What is {a} + 1?", "answer": str(a + 1), "id": f"p{a}"} for a in range(6)]
    write_jsonl(tmp_path / "data.jsonl", rows)

    def make(*overrides, **kwargs) -> Trainer:
        config = config_of(*overrides)
        policy = load_policy(tmp_path / "model", device="cpu")
        problems = load_problems(tmp_path / "data.jsonl")
        scorer = RecordingScorer()
        return GRPOTrainer(policy, config, tmp_path / "run", problems, scorer, **kwargs)

    cut(make(), 2)
    return tmp_path, rows, make


def refused(make, *overrides) -> str:
    """Why a run is not gone on with, unless it is forced to."""
    with pytest.raises(ValueError, match="was begun with another config") as error:
        make(*overrides)
    forced = make(*overrides, force=True)
    assert forced.step == 2
    forced.run()
    assert forced.step == STEPS
    make(*overrides)  # the new values are what it is compared with from now on
    return str(error.value)


def test_another_config_is_refused(on_disk):
    _, _, make = on_disk
    text = refused(make, "--optim.lr=0.5", "--grpo.kl_coef=0.25")
    assert text.count("\n  ") == 2
    assert "\n  grpo.kl_coef: 0.05 -> 0.25" in text
    assert "\n  optim.lr: 0.001 -> 0.5" in text
    assert "--force" in text


@pytest.mark.parametrize("change", [{"answer": "77"}, {"prompt": "What is 2 + 2?"}])
def test_another_content_of_the_data_file_is_refused(on_disk, change):
    folder, rows, make = on_disk
    make()
    write_jsonl(folder / "data.jsonl", [rows[0] | change, *rows[1:]])
    text = refused(make)
    assert "\n  the training data: other rows, or another order (digest " in text
    assert text.count("\n  ") == 1


def test_another_order_of_the_data_file_is_refused(on_disk):
    folder, rows, make = on_disk
    write_jsonl(folder / "data.jsonl", rows[::-1])
    assert "the training data: other rows, or another order" in refused(make)


def test_another_tokenizer_file_is_refused(on_disk):
    """Also where no token of the data changes, as a run samples others."""
    folder, _, make = on_disk
    file = folder / "model" / "tokenizer.json"
    rules = json.loads(file.read_text())
    assert rules["normalizer"] is None
    file.write_text(json.dumps(rules | {"normalizer": {"type": "NFKC"}}))
    text = refused(make)
    assert text.count("\n  ") == 1
    assert "\n  tokenizer.rules: '" in text


def test_what_ends_a_completion_and_a_chat_template_are_of_the_tokenizer(tmp_path):
    plain = grpo(tmp_path)
    cut(plain, 1)
    policy, problems = tiny_policy(), tiny_problems()
    policy.eos_ids = [*policy.eos_ids, 5]
    with pytest.raises(ValueError, match=r"tokenizer\.eos_ids: \[0\] -> \[0, 5\]"):
        GRPOTrainer(policy, config_of(), tmp_path, problems, RecordingScorer())
    assert "chat_template" not in plain.tokenizer  # it is not used
    chat = GRPOTrainer(
        tiny_policy(),
        config_of("--template.name=chat"),
        tmp_path / "chat",
        problems,
        RecordingScorer(),
    )
    assert chat.tokenizer.keys() - plain.tokenizer.keys() == {"chat_template"}
    called = replace(plain.policy, tokenizer=copy.deepcopy(plain.policy.tokenizer))
    called.tokenizer.backend_tokenizer.enable_truncation(2)  # as by a call with max_length
    assert tokenizer_facts(called, plain.config) == plain.tokenizer


def test_a_users_reward_may_read_every_column(tmp_path):
    """So another value of any is other data; without one only what grades counts."""
    problems = [Problem("What is 1 + 1?", "2", f"p{i}", meta={"level": i}) for i in range(4)]
    changed = [replace(p, meta={"level": 9}) for p in problems]

    def data(problems, extra) -> str:
        scorer = RecordingScorer()
        scorer.extra = extra
        return GRPOTrainer(tiny_policy(), config_of(), tmp_path, list(problems), scorer).data

    assert data(problems, {}) == data(changed, {})
    with_function = {"mine": (len, 1.0)}
    assert data(problems, with_function) != data(changed, with_function)


def test_a_checkpoint_from_before_tokenizers_were_named_is_taken(tmp_path):
    from r1fast.checkpoint import STATE, load_checkpoint, write_step
    from r1fast.tensor_file import json_bytes, safetensors_bytes

    cut(grpo(tmp_path / "a"), 2)
    saved = load_checkpoint(tmp_path / "a" / "checkpoints")
    state = {k: v for k, v in saved.state.items() if k not in ("tokenizer", "world_size")}
    files = {
        f"{name}.safetensors": safetensors_bytes(
            {
                ("" if name == "model" else f"{name}.") + key: x
                for key, x in saved.tensors(name).items()
            }
        )
        for name in saved.names()
    }
    path = write_step(tmp_path / "b" / "checkpoints", 2, files | {STATE: [json_bytes(state)]})
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 4', '"version": 2'))
    old, whole = grpo(tmp_path / "b"), grpo(tmp_path / "a")
    assert old.step == 2
    assert old.note == ""
    old.run()
    whole.run()
    assert all(torch.equal(x, tensors(old)[name]) for name, x in tensors(whole).items())
