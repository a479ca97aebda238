"""Training adapters alone: what is frozen, what is kept, the reference, resume, and that it learns."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from test_invariance import assert_same
from test_trainer import Stopped, StoppingScorer, assert_same_tensors, timeless
from tiny import TokenScorer, random_groups, tiny_config, tiny_policy, tiny_problems

from r1fast.checkpoint import load_checkpoint
from r1fast.config import LoraConfig
from r1fast.examples import Example
from r1fast.kernels import vocab_head
from r1fast.lora import adapters, add_lora, lora_tensors, merge_lora
from r1fast.metrics import read_metrics
from r1fast.model import load_model
from r1fast.policy import load_policy
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer

LORA = ("--lora.rank=4", "--optim.lr=0.01")


def grpo(folder, *overrides, scorer=None, policy=None, **kwargs) -> GRPOTrainer:
    config = tiny_config(*LORA, *overrides)
    Path(folder).mkdir(exist_ok=True)
    return GRPOTrainer(
        policy or tiny_policy(), config, folder, tiny_problems(), scorer or TokenScorer(), **kwargs
    )


def sft(folder, *overrides, policy=None) -> SFTTrainer:
    policy, config = policy or tiny_policy(), tiny_config(*LORA, *overrides)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(8)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def base_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "adapter" not in n}


def nudge(model) -> None:
    """Adapters that matter, as after some training."""
    generator = torch.Generator().manual_seed(3)
    for _, adapter in adapters(model):
        adapter.B.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("make", [grpo, sft])
def test_the_base_is_frozen_and_costs_neither_gradients_nor_moments(tmp_path, make):
    trainer = make(tmp_path)
    before = base_of(trainer.model)
    trainer.run()
    assert_same_tensors(base_of(trainer.model), before)
    named = dict(trainer.model.named_parameters())
    moved = [n for n, p in named.items() if p.requires_grad]
    assert moved == [n for n in named if n.endswith(("adapter.A", "adapter.B"))]
    assert len(moved) == 2 * 4 * 2
    assert all(bool(named[n].any()) for n in moved)
    state = trainer.optimizer.state_tensors()
    assert {n.partition(".")[2] for n in state} == set(moved)
    assert all(p.grad is None for p in named.values())
    files = load_checkpoint(tmp_path / "checkpoints")
    assert files.tensors("model").keys() == set(moved)
    if make is grpo:
        assert not files.tensors("reference")


def test_no_gradient_of_the_base_is_ever_made(tmp_path):
    """In the backward of a whole step, the head's included: two products for the head, not three."""
    trainer = grpo(tmp_path)
    module = vocab_head.head_module(trainer.model.head_weight, "auto")
    owner = module if isinstance(module, ModuleType) else type(module)  # PyTorch's is an object
    calls = {"forward": 0, "dhidden": 0, "dweight_": 0}
    kinds = set()

    def spy(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return counted

    def forward(*args, **kwargs):
        found = original_forward(*args, **kwargs)
        calls["forward"] += 1
        if (E := found[2]) is not None and type(E) not in kinds:
            kinds.add(type(E))
            for name in ("dhidden", "dweight_"):
                patch.setattr(type(E), name, spy(type(E), name))
        return found

    original_forward = owner.forward
    groups = random_groups(4, 4, trainer.model.spec.vocab_size)
    seen = record_gradients_of_trained(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "forward", forward)
        trainer.update(groups, 0)
    assert calls["forward"] >= calls["dhidden"] > 0
    assert calls["dweight_"] == 0
    assert len(seen) == 1
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if "adapter" not in n)


def record_gradients_of_trained(trainer):
    seen = []

    def step(lr):
        named = trainer.model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.requires_grad})
        trainer.optimizer.zero_grad()
        return torch.tensor(1.0)

    trainer.optimizer.step = step
    return seen


@pytest.mark.parametrize("other", ["--grpo.shared_prompt=false", "--grpo.token_budget=15"])
def test_the_gradient_does_not_depend_on_the_packing(tmp_path, other):
    runs = []
    for overrides in ((), (other,)):
        trainer = grpo(tmp_path, *overrides)
        nudge(trainer.model)
        seen = record_gradients_of_trained(trainer)
        row = trainer.update(random_groups(4, 4, trainer.model.spec.vocab_size), 0)
        runs.append((seen, row))
    assert_same(*runs)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_layers_may_be_recomputed(tmp_path, mode):
    gradients = []
    for checkpointing in ("none", mode):
        trainer = grpo(tmp_path, f"--model.activation_checkpointing={checkpointing}")
        nudge(trainer.model)
        assert trainer.model.checkpointing == checkpointing
        seen = record_gradients_of_trained(trainer)
        trainer.update(random_groups(4, 4, trainer.model.spec.vocab_size), 0)
        gradients.append(seen[0])
    assert_same_tensors(*gradients)


def test_the_reference_is_the_base_and_needs_no_second_model(tmp_path):
    """Its log-probabilities are the base's, bit for bit; after a refresh those of the adapters then."""
    trainer = grpo(tmp_path, "--grpo.ref_refresh_steps=3")
    assert trainer.reference.model is trainer.model
    groups = random_groups(2, 4, trainer.model.spec.vocab_size)

    def reference_logprobs(update):
        sequences = list(update._plan(groups)[0].values())
        return update.reference.logprobs(sequences, update._in_step)

    full = GRPOTrainer(
        tiny_policy(), tiny_config(), tmp_path / "full", tiny_problems(), TokenScorer()
    )
    base = reference_logprobs(full)
    assert reference_logprobs(trainer) == base
    for step in range(2):
        trainer.train_step(step)
        assert reference_logprobs(trainer) == base
        assert not trainer.reference.tensors()
    trainer.train_step(2)
    refreshed = reference_logprobs(trainer)
    assert refreshed != base
    assert_same_tensors(dict(trainer.reference.tensors()), lora_tensors(trainer.model))
    trainer.train_step(3)
    assert reference_logprobs(trainer) == refreshed
    with pytest.raises(AssertionError):
        assert_same_tensors(dict(trainer.reference.tensors()), lora_tensors(trainer.model))


def test_the_reference_begins_at_the_policy(tmp_path):
    """Where training goes on from an adapter, the KL is to that one, not to the base."""
    policy = tiny_policy()
    add_lora(policy.model, LoraConfig(rank=4))
    nudge(policy.model)
    rows = [
        grpo(
            tmp_path,
            policy=policy,
        ).train_step(0)
    ]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert grpo(tmp_path).train_step(0)["kl"] == pytest.approx(0, abs=1e-9)


def test_resume_is_bitwise(tmp_path):
    """As for all weights: 2 steps, a crash in the 4th, the rest; the reference refreshed on both sides."""
    overrides = ("--checkpoint.every_steps=2", "--grpo.num_mini_batches=2",
                 "--grpo.ref_refresh_steps=3", "--optim.warmup_steps=3")  # fmt: skip
    whole = grpo(tmp_path / "whole", *overrides)
    whole.run()
    with pytest.raises(Stopped):
        grpo(tmp_path / "parts", *overrides, scorer=StoppingScorer(3)).run()
    parts = grpo(tmp_path / "parts", *overrides)
    assert (parts.step, parts.optimizer_step) == (2, 4)
    assert parts.reference.tensors()
    parts.run()
    assert_same_tensors(lora_tensors(whole.model), lora_tensors(parts.model))
    assert_same_tensors(whole.optimizer.state_tensors(), parts.optimizer.state_tensors())
    assert_same_tensors(dict(whole.reference.tensors()), dict(parts.reference.tensors()))
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_checkpoint_knows_its_base(tmp_path):
    trainer = grpo(tmp_path)
    trainer.run()
    state = json.loads((tmp_path / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["base"] == trainer.base
    other = replace(tiny_policy(), path="elsewhere")
    with torch.no_grad():
        other.model.layers[1].gate_up.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match=r"trained on the weights of ''; those of 'elsewhere' are"):
        grpo(tmp_path, policy=other)
    with pytest.raises(ValueError, match=r"another config:\n.*lora.rank: 4 -> 5"):
        grpo(tmp_path, "--lora.rank=5")
    for changed in ("--lora.rank=5", "--lora.rank=0", '--lora.targets=["q_proj"]'):
        with pytest.raises(ValueError, match="holds other weights than this run trains"):
            grpo(tmp_path, changed, force=True)
    assert grpo(tmp_path).step == 4


def test_a_run_leaves_a_plain_model_and_an_adapter(tmp_path):
    """Both are the policy: the first for anything that reads a model, the second beside its base."""
    policy = tiny_policy()
    policy.save(tmp_path / "base")
    policy = load_policy(tmp_path / "base", device="cpu")
    trainer = sft(tmp_path / "run", policy=policy)
    trainer.run()
    plain = load_model(tmp_path / "run" / "model")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = load_policy(tmp_path / "base", adapter=tmp_path / "run" / "adapter", device="cpu")
    merge_lora(policy.model)
    assert_same_tensors(loaded.model.hf_tensors(), policy.model.hf_tensors())
    assert_same_tensors(plain.hf_tensors(), policy.model.hf_tensors())
    assert not torch.equal(
        plain.layers[0].qkv.weight, load_model(tmp_path / "base").layers[0].qkv.weight
    )


def test_training_goes_on_from_an_adapter(tmp_path):
    sft(tmp_path / "one").run()
    tiny_policy().save(tmp_path / "base")

    def load():
        return load_policy(
            tmp_path / "base", adapter=tmp_path / "one" / "adapter", device="cpu", merge=False
        )

    first = sft(tmp_path / "two", policy=load()).train_step(0)["loss"]
    assert first < read_metrics(tmp_path / "one")[0]["loss"]
    with pytest.raises(ValueError, match=r"of another kind .*rank=3.*\n  lora.rank = 4"):
        sft(tmp_path / "three", "--lora.rank=3", policy=load())
    with pytest.raises(ValueError, match="or merge them first"):
        sft(tmp_path / "four", "--lora.rank=0", policy=load())


def test_bfloat16_keeps_adapters_in_float32(tmp_path):
    """Steps far below bfloat16's last bit add up, in the adapters and in what is saved."""
    policy = tiny_policy()
    policy.model.to(torch.bfloat16)
    trainer = grpo(tmp_path, "--optim.lr=0.00001", policy=policy)
    A = trainer.model.layers[0].qkv.adapter.A
    before = A.detach().clone()
    trainer.run()
    assert A.dtype == torch.float32
    assert trainer.optimizer.masters[0] is A
    moved = (A - before).abs()
    assert 0 < moved.max() < 2**-9 * before.abs().max()
    assert trainer.model.embed.weight.dtype == torch.bfloat16
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    assert load_model(tmp_path / "model", dtype="bfloat16").hf_config["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_training(tmp_path, dtype):
    """Sampler and trainer are one to the last bit; so are reference and policy as long as they are."""
    policy = tiny_policy()
    policy.model.to(dtype)
    try:
        trainer = grpo(
            tmp_path, "--rollout.batch_invariant=true", "--grpo.ref_refresh_steps=2", policy=policy
        )
    except ValueError as error:
        pytest.skip(str(error))
    rows = [trainer.train_step(step) for step in range(4)]
    assert [row["logprob_mismatch/max"] for row in rows] == [0.0] * 4
    # the first step of all, and the one after a refresh
    assert [row["kl"] > 0 for row in rows] == [False, True, False, True]


def test_grpo_learns(tmp_path):
    """The reward is the share of tokens below 160, half of the vocabulary; the base stays."""
    scorer = TokenScorer(lambda ids: sum(t < 160 for t in ids) / len(ids))
    trainer = grpo(
        tmp_path, "--lora.rank=8", "--grpo.num_steps=12", "--rollout.num_generations=16",
        "--grpo.kl_coef=0", "--optim.lr=0.02", policy=tiny_policy(std=0.25), scorer=scorer,
    )  # fmt: skip
    before = base_of(trainer.model)
    trainer.run()
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert rewards[0] < 0.6, rewards
    assert min(rewards[-3:]) > 0.8, rewards
    assert_same_tensors(base_of(trainer.model), before)


def test_sft_learns(tmp_path):
    overrides = ("--lora.rank=8", "--sft.max_steps=15", "--optim.lr=0.02")
    sft(tmp_path, *overrides, policy=tiny_policy(std=0.25)).run()
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[-1] < 0.4 * losses[0], losses


def test_seeds_of_stages_differ(tmp_path):
    a, b = (
        SFTTrainer(p := tiny_policy(), tiny_config(*LORA), tmp_path / stage,
                   encode_examples([Example("a", "b")], p, tiny_config()), stage=stage)
        for stage in ("one", "two")
    )  # fmt: skip
    A, B = (t.model.layers[0].qkv.adapter.A for t in (a, b))
    assert not torch.equal(A, B)
