"""decode = prefill = trainer: the sampler's log-probability *is* the old log-probability.

float32 throughout; each family at its own head grouping. A wrong shift, position, temperature,
cache slot or mask shows here.
"""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model

from r1fast.batch import pack
from r1fast.config import LoraConfig
from r1fast.forward import completion_logprobs
from r1fast.kernels import cpu_head
from r1fast.lora import adapters, add_lora
from r1fast.model import Decoder, save_model
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.rollout.speculation import Speculation
from r1fast.types import Sequence

EOS = 3
TOLERANCE = 1e-5


def make_prompts(lengths=(4, 1, 11, 2, 30, 7)) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (n,), generator=g).tolist() for n in lengths]


def rollout(model, prompts, sampling, *, G=4, slots=64, return_entropy=False, **options):
    seeds = [[sample_seed(p, g) for g in range(G)] for p in range(len(prompts))]
    engine = Engine(model, [EOS], max_batch_size=slots, **options)
    groups = engine.generate(prompts, None, sampling, seeds=seeds, return_entropy=return_entropy)
    return [group.completions for group in groups]


@torch.no_grad()
def trainer_logprobs(model, prompts, groups, temperature, budget=127):
    """Log-probabilities and entropies of the same tokens, packed as in training; in their order."""
    sequences = [
        Sequence(prompt, c.token_ids)
        for prompt, group in zip(prompts, groups, strict=True)
        for c in group
    ]
    logprobs, entropies = [None] * len(sequences), [None] * len(sequences)
    for batch in pack(sequences, budget, [1.0] * len(sequences)):
        sizes = [len(sequences[i].completion_ids) for i in batch.sequence_index]
        values = completion_logprobs(model, batch, temperature)
        for target, x in zip((logprobs, entropies), values, strict=True):
            for i, part in zip(batch.sequence_index, x.split(sizes), strict=True):
                target[i] = part
    return logprobs, entropies


def assert_parity(model, prompts, groups, temperature):
    logprobs, entropies = trainer_logprobs(model, prompts, groups, temperature)
    num_tokens = 0
    for c, lp, h in zip(sum(groups, []), logprobs, entropies, strict=True):
        torch.testing.assert_close(torch.tensor(c.logprobs), lp, rtol=0, atol=TOLERANCE)
        if c.entropies:
            torch.testing.assert_close(torch.tensor(c.entropies), h, rtol=0, atol=TOLERANCE)
        num_tokens += len(c.token_ids)
    assert num_tokens > 100


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_equals_training_forward(family, temperature):
    model, prompts = tiny_model(family), make_prompts()
    sampling = SamplingParams(temperature, max_tokens=24)
    groups = rollout(model, prompts, sampling, return_entropy=True)
    assert_parity(model, prompts, groups, temperature)


@pytest.mark.parametrize("family", FAMILIES)
def test_refilled_slots(family):
    """More samples than slots: a slot's earlier tenant was longer than its next one, and shorter."""
    model, prompts = tiny_model(family), make_prompts((30, 4, 1, 11, 2, 20, 7))
    groups = rollout(model, prompts, SamplingParams(max_tokens=24), slots=5)
    assert_parity(model, prompts, groups, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_native_forward(family, monkeypatch):
    """The model's own forward over the same cache, as other processors run it."""
    monkeypatch.setattr("r1fast.rollout.runner.is_supported", lambda model: False)
    model, prompts = tiny_model(family), make_prompts()
    sampling = SamplingParams(max_tokens=24)
    for options in ({}, {"prefill_tokens": 12, "slots": 9}, {"speculation": Speculation(3, 1, 1)}):
        groups = rollout(model, prompts, sampling, **options)
        assert_parity(model, prompts, groups, 1.0)


def test_prefill_in_parts():
    model, prompts = tiny_model(), make_prompts()
    groups = rollout(model, prompts, SamplingParams(max_tokens=24), slots=9, prefill_tokens=12)
    assert_parity(model, prompts, groups, 1.0)


def test_with_truncated_sampling_and_a_long_context():
    """top-k and top-p choose the token; the log-probability stays the policy's."""
    model, prompts = tiny_model("llama"), make_prompts((60, 3))
    sampling = SamplingParams(0.7, top_p=0.9, top_k=20, max_tokens=65)
    assert_parity(model, prompts, rollout(model, prompts, sampling), 0.7)


def mean_mismatch(model, budget=500) -> float:
    """Over 12 completions of 64 tokens; prompts that end within a strip of attention and at its end."""
    prompts = make_prompts((70, 64, 1))
    groups = rollout(model, prompts, SamplingParams(max_tokens=64, ignore_eos=True))
    logprobs, _ = trainer_logprobs(model, prompts, groups, 1.0, budget)
    drawn = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    return float((torch.cat(logprobs) - drawn).abs().mean())


def deep_model(family) -> Decoder:
    """Wide and deep enough for sums in another order to be rounded otherwise: 3e-6 to 3e-4 on average then."""
    spec = replace(
        tiny_model(family).spec, hidden_size=128, intermediate_size=256, num_layers=4, qk_norm=True
    )
    return Decoder(spec, seed=0).bfloat16()


needs_bfloat16 = pytest.mark.skipif(not cpu_head.supported(torch.bfloat16), reason="needs AVX2")


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_has_the_bits_of_the_sampler(family):
    """What is left is the head's sum over the vocabulary, in float32."""
    model = deep_model(family)
    assert mean_mismatch(model) < 1e-6
    assert mean_mismatch(model, budget=150) < 1e-6  # prompts are forwarded with each completion


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_without_the_native_forward(family, monkeypatch):
    """Within the bar of 1e-3, as logits are float32 there too; large ones rounded to bfloat16 are 1.3e-3 to 3.6e-3 off."""
    monkeypatch.setattr("r1fast.rollout.runner.is_supported", lambda model: False)
    model = deep_model(family)
    model.norm.weight.data.mul_(2 if family == "qwen2" else 4)
    assert mean_mismatch(model) <= 1e-3


def test_the_head_in_float32_is_made_once_for_each_version(monkeypatch):
    monkeypatch.setattr("r1fast.rollout.runner.is_supported", lambda model: False)
    model = deep_model("qwen2")
    engine = Engine(model, [EOS])

    def logprobs() -> list[float]:
        sampling = SamplingParams(max_tokens=8, ignore_eos=True)
        (group,) = engine.generate([[5, 6]], 1, sampling, seed=0)
        return group.completions[0].logprobs

    first, head = logprobs(), engine.runner._wide_head
    assert head.dtype == torch.float32
    assert logprobs() == first
    assert engine.runner._wide_head is head
    model.head_weight.data.mul_(1.5)
    assert logprobs() != first
    assert engine.runner._wide_head is not head
    model.float()
    logprobs()
    assert engine.runner._wide_head is None


@needs_bfloat16
def test_bfloat16_adapters_have_the_bits_of_the_sampler():
    model = deep_model("qwen2")
    add_lora(model, LoraConfig(rank=5, alpha=10, targets=("q_proj", "v_proj", "o_proj", "up_proj")))
    g = torch.Generator().manual_seed(2)
    for _, adapter in adapters(model):
        adapter.B.data.normal_(std=0.05, generator=g)
    assert mean_mismatch(model) < 1e-6


def test_the_temperature_matters_to_this_test():
    model, prompts = tiny_model(), make_prompts()
    groups = rollout(model, prompts, SamplingParams(0.7, max_tokens=24))
    with pytest.raises(AssertionError):
        assert_parity(model, prompts, groups, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(family)
    save_model(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", dtype=torch.float32
    )
    prompts = make_prompts((5, 1, 12))
    groups = rollout(model, prompts, SamplingParams(temperature=0, max_tokens=16), G=2)
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert [c.token_ids for c in group] == [out[0, len(prompt) :].tolist()] * 2
