"""Engine.score: the log-probabilities of given tokens are those of decoding them, and the trainer's loss takes them.

On the native forward every comparison of log-probabilities is bit for bit.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_invariance import record_gradients
from test_parity import assert_parity, make_prompts
from tiny import FAMILIES, TokenScorer, tiny_config, tiny_model, tiny_policy, tiny_problems

from r1fast.rollout.engine import Engine
from r1fast.rollout.native import is_supported
from r1fast.rollout.sampler import SamplingParams
from r1fast.trainer import GRPOTrainer

EOS = 3
BLOCK = 16
needs_native = pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")
LENGTHS = (4, 1, 16, 17, 40, 33)  # of prompts: none, all or some of a block over
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def block_bytes(model) -> int:
    spec = model.spec
    size = model.head_weight.element_size()
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * BLOCK * size


def decoded(model, temperature=0.7, **options):
    """(engine, prompts, completions of ragged groups) as sampled."""
    engine, prompts = Engine(model, [EOS], **options), make_prompts(LENGTHS)
    sampling = SamplingParams(temperature, max_tokens=24)
    seeds = [list(range(10 * i, 10 * i + n)) for i, n in enumerate((4, 1, 3, 5, 2, 0))]
    groups = engine.generate(prompts, None, sampling, seeds=seeds)
    return engine, prompts, [group.completions for group in groups]


def ids_of(groups):
    return [[c.token_ids for c in group] for group in groups]


def assert_bitwise(scored, groups):
    assert [len(group) for group in scored] == [len(group) for group in groups]
    num_tokens = 0
    for logprobs, c in zip(sum(scored, []), sum(groups, []), strict=True):
        assert logprobs.dtype == np.float32
        assert logprobs.tolist() == c.logprobs
        num_tokens += len(logprobs)
    assert num_tokens > 100


@needs_native
@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_decode_to_the_bit(family, dtype):
    model = tiny_model(family).to(dtype)
    engine, prompts, groups = decoded(model)
    assert_bitwise(engine.score(prompts, ids_of(groups), 0.7), groups)
    for options in (
        {"prefill_tokens": 5},
        {"prefill_tokens": 23, "cache_bytes": 5 * block_bytes(model)},
        {"block_size": 32, "prefix_cache": False},
    ):
        other = Engine(model, [EOS], batch_invariant=True, **options)
        assert_bitwise(other.score(prompts, ids_of(groups), 0.7), groups)
        assert other.stats.blocks_used == 0


@needs_native
def test_few_logits_at_a_time(monkeypatch):
    engine, prompts, groups = decoded(tiny_model())
    monkeypatch.setattr("r1fast.rollout.score.LOGITS_BYTES", 4 * 97 * 3)
    assert_bitwise(engine.score(prompts, ids_of(groups), 0.7), groups)


def test_without_the_native_forward():
    """As a CPU without AVX2 has it, in sampling and in training alike; the level is a process's own."""
    code = "import test_score; test_score.check_without_the_native_forward()"
    environment = {"R1FAST_CPU_LEVEL": "baseline", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)


def check_without_the_native_forward():
    model = tiny_model()
    engine, prompts, groups = decoded(model, prefill_tokens=23)
    assert not engine.runner.is_native
    scored = engine.score(prompts, ids_of(groups), 0.7)
    for logprobs, c in zip(sum(scored, []), sum(groups, []), strict=True):
        np.testing.assert_allclose(logprobs, c.logprobs, rtol=0, atol=1e-5)
        c.logprobs = logprobs.tolist()
    assert_parity(model, prompts, groups, 0.7)


def test_a_prompt_is_forwarded_once(monkeypatch):
    """Its full blocks; the rest, with the token that predicts the first one, once for each completion."""
    engine, tokens = Engine(tiny_model(), [EOS]), []
    forward = engine.runner.forward_chunks

    def count(chunks, cache):
        tokens.extend(end - start for _, start, end in chunks)
        return forward(chunks, cache)

    monkeypatch.setattr(engine.runner, "forward_chunks", count)
    engine.score([[7] * 33, [8] * 32], [[[5, 6, 7]] * 4, [[5, 6, 7]] * 4])
    assert sum(tokens) == 35 + 3 * 3 + 34 + 3 * 18


@needs_native
def test_beside_requests_that_run():
    """Scoring between two steps changes nothing of what is being sampled, and the other way round."""
    model = tiny_model()
    _, prompts, groups = decoded(model)
    engine = Engine(model, [EOS])
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=30), stream=False)
    alone = engine.generate([[5, 6, 7]], None, SamplingParams(max_tokens=30), seeds=[[1, 2]])
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=30), stream=False)
    events = []
    while engine.has_work:
        events += engine.step()
        assert_bitwise(engine.score(prompts, ids_of(groups), 0.7), groups)
    ended = sorted(events, key=lambda e: e.sample)
    assert [e.logprobs for e in ended] == [c.logprobs for c in alone[0].completions]


@needs_native
def test_scores_are_of_the_weights_as_they_are():
    model = tiny_model()
    engine, prompts, groups = decoded(model)
    with torch.no_grad():
        model.norm.weight.mul_(0.5)
    scored = engine.score(prompts, ids_of(groups), 0.7)
    fresh = Engine(model, [EOS]).score(prompts, ids_of(groups), 0.7)
    for a, b, c in zip(sum(scored, []), sum(fresh, []), sum(groups, []), strict=True):
        assert (a == b).all()
        assert (a != c.logprobs).any()


def test_nothing_to_score():
    engine = Engine(tiny_model(), [EOS])
    assert engine.score([], []) == []
    (group,) = engine.score([[5, 6]], [[[], [7], []]])
    assert [len(x) for x in group] == [0, 1, 0]


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[5], []], [[[6]], [[6]]], "prompt 1 is empty"),
        ([[5]], [[[6]], [[6]]], "1 prompts need as many lists of completions, got 2"),
        ([[5]], [[[6], [97]]], r"completion 1 of prompt 0 has a token id outside \[0, 97\): 97"),
        ([[5]], [[[6.0]]], "completion 0 of prompt 0 must be a list of token ids"),
        ([[5] * 100], [[[6] * 29]], "29 tokens after 100 of the prompt: the model's context is 128"),
        ([[5] * 20], [[[6]], ], "needs 2 blocks of the cache, 1 of 1 are free"),
    ],
)  # fmt: skip
def test_bad_input(prompts, completions, message):
    model = tiny_model()
    engine = Engine(model, [EOS], cache_bytes=block_bytes(model))
    with pytest.raises(ValueError, match=message):
        engine.score(prompts, completions)
    assert engine.stats.blocks_used == 0
    assert len(engine.score([[5]], [[[6]]])[0][0]) == 1


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_greedy_draw_has_no_logprob(temperature):
    with pytest.raises(
        ValueError, match=r"temperature must be in \[1e-06, 1e\+06\], got .* no log-probability"
    ):
        Engine(tiny_model(), [EOS]).score([[5]], [[[6]]], temperature)


def test_logits_that_are_not_finite_are_nan_and_spoil_nothing_else():
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.embed.weight[50] = torch.nan
    engine = Engine(model, [EOS])
    ((bad, good),) = engine.score([[5, 6]], [[[7, 50, 8, 9], [7, 8, 9]]])
    assert np.isnan(bad[2:]).all()
    if is_supported(
        model
    ):  # PyTorch's attention alone, on CPUs older than AVX2, has 0 times NaN in what comes before
        assert not np.isnan(bad[:2]).any()
    assert np.isfinite(good).all()
    assert engine.stats.blocks_used == 0


# The trainer


def train(folder, *overrides, dtype=torch.float32, invariant=True, steps=1, record=False):
    """(rows, gradients where recorded) of GRPO steps with temperature 0.7."""
    policy = tiny_policy(std=0.2)
    policy.model.to(dtype)
    config = tiny_config(
        "--rollout.temperature=0.7",
        f"--rollout.batch_invariant={'true' if invariant else 'false'}",
        *overrides,
    )
    trainer = GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer())
    gradients = record_gradients(trainer) if record else []
    return [trainer.train_step(step) for step in range(steps)], gradients


@needs_native
@DTYPES
def test_the_loss_takes_what_the_sampler_wrote(tmp_path, dtype, monkeypatch):
    """Bit for bit in the first optimizer step, whatever micro-batches it has; and the KL of an equal reference is 0."""
    taken = []
    from r1fast import policy_update as module

    objective = module.grpo_objective

    def keep(hidden, head_weight, batch, *args, **kwargs):
        taken.append((batch.policy_logprobs, batch.old_logprobs, batch.ref_logprobs))
        return objective(hidden, head_weight, batch, *args, **kwargs)

    monkeypatch.setattr(module, "grpo_objective", keep)
    for budget in (40, 64, 2048):
        (row,), _ = train(tmp_path, f"--grpo.token_budget={budget}", dtype=dtype)
        for policy, old, ref in taken:
            assert torch.equal(policy, old)
            assert torch.equal(policy, ref)
        assert len(taken) > 1 or budget == 2048
        taken.clear()
        assert row["logprob_mismatch/max"] == row["logprob_mismatch/mean"] == 0
        assert row["kl"] == 0
        assert row["ratio"] == 1
        limit = 1e-5 if dtype == torch.float32 else 0.3
        assert 0 < row["logprob_mismatch/graph_max"] < limit


@needs_native
def test_later_updates_compare_like_with_like(tmp_path, monkeypatch):
    """After an optimizer step the ratios are of the new weights on the same forward; only the first is 1."""
    ratios = []
    overrides = ("--grpo.num_iterations=3", "--grpo.num_mini_batches=2")
    real = GRPOTrainer._backward

    def backward(self, part, sequences):
        out, diffs = real(self, part, sequences)
        fresh = Engine(self.model, self.policy.eos_ids)
        for key in part.keys:
            s = sequences[key]
            ((expected,),) = fresh.score([s.prompt_ids], [[s.completion_ids]], 0.7)
            assert s.policy_logprobs == expected.tolist()
        ratios.append(out["ratio"] / out["num_tokens"])
        return out, diffs

    monkeypatch.setattr(GRPOTrainer, "_backward", backward)
    train(tmp_path, *overrides, steps=2)
    assert len(ratios) == 12
    assert ratios[0] == ratios[6] == 1
    assert all(r != 1 for i, r in enumerate(ratios) if i not in (0, 6))


@needs_native
@pytest.mark.parametrize("options", [
    (), ("--grpo.entropy_coef=0.01",), ("--grpo.loss_type=gspo",), ("--grpo.num_iterations=2",),
], ids=["grpo", "entropy", "gspo", "off policy"])  # fmt: skip
def test_gradients_are_those_of_the_ordinary_path(tmp_path, options):
    """Within float32 rounding: the same graph, at log-probabilities that differ by rounding."""
    (row,), gradients = train(tmp_path, *options, record=True)
    (other,), ordinary = train(tmp_path, *options, record=True, invariant=False)
    assert "logprob_mismatch/graph_max" not in other
    assert len(gradients) == len(ordinary) > 0
    for a, b in zip(gradients, ordinary, strict=True):
        for name in a:
            assert (a[name] - b[name]).norm() <= 2e-5 * b[name].norm() + 1e-7, name
    for key in ("loss", "entropy", "ratio"):
        assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


@needs_native
def test_losses_do_not_depend_on_the_budget(tmp_path):
    """Two rollouts of two updates each, in one micro-batch or in many: equal but for the order of the last sum."""
    overrides = ("--grpo.num_mini_batches=2", "--optim.lr=0.0001")
    one, _ = train(tmp_path, *overrides, steps=2)
    many, _ = train(tmp_path, *overrides, "--grpo.token_budget=40", steps=2)
    for a, b in zip(one, many, strict=True):
        for key in ("loss", "kl", "ratio", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), key
        assert a["logprob_mismatch/max"] == b["logprob_mismatch/max"] == 0


@needs_native
def test_the_reference_is_scored_again_after_its_refresh(tmp_path):
    rows, _ = train(tmp_path, "--grpo.ref_refresh_steps=1", steps=2)
    assert [row["kl"] for row in rows] == [0, 0]
    rows, _ = train(tmp_path, steps=2)
    assert rows[1]["kl"] > 0


def test_a_model_that_cannot_have_it_is_refused(tmp_path):
    message = r"batch_invariant needs .*: it needs float32 or bfloat16 weights, got float16"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, dtype=torch.float16)
