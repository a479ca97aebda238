"""A patched GRPOTrainer trains as the unpatched one does: losses, metrics and weights, step by step.

This file is also the program that torchrun starts for the test of two ranks.
"""

import copy
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer

from r1fast.integrations import trl as r1fast_trl
from r1fast.integrations.trl import ChunkedLogProbFunction, patch, unpatch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

N, D, V = 11, 16, 61


def chunked_inputs(seed=0, dtype=torch.float32) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(N, D, generator=g).to(dtype),
        "weight": torch.randn(V, D, generator=g).to(dtype) / 2,
        "bias": torch.randn(V, generator=g).to(dtype) / 2,
        "targets": torch.randint(V, (N,), generator=g),
    }


def run_chunked(function, inputs, *args, use_bias=True, entropy_grad=True):
    leaves = {
        n: inputs[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")
    }  # fmt: skip
    outputs = function.apply(
        leaves["hidden"], leaves["weight"], leaves["bias"] if use_bias else None,
        inputs["targets"], *args,
    )  # fmt: skip
    loss = (outputs[0] * torch.linspace(-1, 1, N)).sum()
    if entropy_grad and outputs[1] is not None:
        loss = loss + (outputs[1] * torch.linspace(0, 1, N)).sum()
    loss.backward()
    return outputs, {n: x.grad for n, x in leaves.items()}


@pytest.mark.parametrize("outputs", [(), ("entropy",), r1fast_trl.OUTPUTS], ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.3), (8.0, 1.7)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_chunked_function_as_trl_computes_it(outputs, softcap, scale, use_bias):
    from trl.kernels import ChunkedLogProbFunction as Theirs

    arguments = (chunked_inputs(), 0.7, 32, softcap, scale, outputs)
    theirs = run_chunked(Theirs, *arguments, use_bias=use_bias)
    ours = run_chunked(ChunkedLogProbFunction, *arguments, use_bias=use_bias)
    assert len(ours[0]) == len(theirs[0])
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for name, gradient in theirs[1].items():
        if gradient is not None:
            torch.testing.assert_close(ours[1][name], gradient, rtol=2e-5, atol=2e-5)


def test_chunked_function_under_autocast():
    from trl.kernels import ChunkedLogProbFunction as Theirs

    results = []
    for function in (Theirs, ChunkedLogProbFunction):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run_chunked(function, chunked_inputs(), 1.0, 32, None, 1.0, ()))
    for name, gradient in results[0][1].items():
        assert results[1][1][name].dtype == gradient.dtype == torch.float32
        error = (results[1][1][name] - gradient).norm()
        assert error < 2e-2 * gradient.norm(), name


def reward(completions, **kwargs) -> list[float]:
    return [float(len(c) % 3) + (c.count("e") > 1) for c in completions]


def make_trainer(folder, cls=None, **changes):
    """TRL's trainer, CPU, float32, no downloads; the same seed gives the same training."""
    from datasets import Dataset

    torch.manual_seed(0)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    model_changes = changes.pop("model_changes", {})
    prompts = [{"prompt": f"What is {n} + 2?"} for n in range(8)]
    rows, functions = changes.pop("rows", prompts), changes.pop("reward_funcs", reward)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **model_changes,
    )  # fmt: skip
    saved = folder / "model"  # TRL loads the reference model from where the model came from
    if not saved.exists():
        transformers.Qwen2ForCausalLM(config).save_pretrained(saved)
    model = transformers.Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.float32)
    arguments = {
        "beta": 0.05, "num_iterations": 2, "max_steps": 3,
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False,
        # a few tokens, the end among them: completions of every length
        "generation_kwargs": {"suppress_tokens": list(range(6, len(tokenizer)))},
    } | changes  # fmt: skip
    return (cls or trl.GRPOTrainer)(
        model=model,
        reward_funcs=functions,
        args=trl.GRPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def history(trainer) -> list[dict[str, float]]:
    skipped = ("time", "runtime", "per_second", "num_tokens", "flos")
    return [
        {k: v for k, v in row.items() if isinstance(v, float) and not any(s in k for s in skipped)}
        for row in trainer.state.log_history
    ]


def check_same_training(tmp_path, *, loss="fused", tolerance=1e-4, **changes):
    plain = make_trainer(tmp_path / "a", **changes)
    patched = patch(make_trainer(tmp_path / "b", **changes), loss=loss)
    for trainer in (plain, patched):
        torch.manual_seed(1)
        trainer.train()
    lengths = {row.get("completions/mean_length") for row in history(plain)} - {None}
    assert min(lengths) < 6
    assert len(history(plain)) == len(history(patched)) > 0
    for ours, theirs in zip(history(patched), history(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    start = make_trainer(tmp_path / "c", **changes).model.state_dict()
    after = plain.model.state_dict()
    for name, weight in patched.model.state_dict().items():
        moved = (after[name] - start[name]).norm()
        assert (weight - after[name]).norm() <= 1e-3 * moved + 1e-6, name
    assert any((after[n] - start[n]).norm() > 1e-3 for n in after)
    return patched


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "delta": 1.5},
        {"loss_type": "dr_grpo", "use_bias_correction_kl": True},
        {"loss_type": "dapo", "gradient_accumulation_steps": 2, "beta": 0.0},
        {"loss_type": "cispo", "epsilon_high": 1.1, "gradient_accumulation_steps": 2},
        {"loss_type": "sapo"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "learning_rate": 0.02},
        {"loss_type": "luspo", "learning_rate": 0.02},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "entropy_coef": 0.01},
        {"loss_type": "dapo", "off_policy_mask_threshold": 0.05, "temperature": 0.8},
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"loss_type": "bnpo", "model_changes": {"final_logit_softcapping": 3.0}},
        {"loss_type": "grpo", "cast_lm_head_to_fp32": True},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_patched_training_is_the_same(tmp_path, changes):
    patched = check_same_training(tmp_path, **changes)
    assert patched._r1fast.fused


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "vespo"},
        {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_coef": 0.01},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_what_cannot_be_fused_is_scored(tmp_path, changes):
    patched = check_same_training(tmp_path, loss="auto", **changes)
    assert not patched._r1fast.fused
    with pytest.raises(ValueError, match=r"this configuration's loss cannot be fused: .*logprobs"):
        patch(patched, loss="fused")


def test_top_entropy_quantile_is_left_to_trl(tmp_path):
    # equal contexts have equal entropies but for rounding: which of them the quantile takes is chance
    trainer = patch(make_trainer(tmp_path, top_entropy_quantile=0.5))
    assert not trainer._r1fast.fused
    trainer.train()
    assert any(h.get("grad_norm", 0) > 0 for h in history(trainer))


def test_bfloat16_autocast(tmp_path):
    found = []
    for wrap in (unpatch, patch):
        trainer = wrap(make_trainer(tmp_path, bf16=True, loss_type="dapo", max_steps=2))
        torch.manual_seed(1)
        trainer.train()
        found.append([(h["loss"], h["grad_norm"]) for h in history(trainer) if "loss" in h])
    assert torch.tensor(found[1]).tolist() == [
        pytest.approx(row, rel=0.05, abs=0.02) for row in found[0]
    ]


def test_scoring_alone_trains_the_same(tmp_path):
    check_same_training(tmp_path, loss="logprobs")


def test_trl_never_projects_and_prompts_are_not_scored(tmp_path, monkeypatch):
    trainer = patch(make_trainer(tmp_path))
    seen = []
    fused = r1fast_trl.padded_loss
    monkeypatch.setattr(
        r1fast_trl, "padded_loss", lambda h, *a, **k: (seen.append(len(h)), fused(h, *a, **k))[1]
    )
    from trl.kernels import ChunkedLogProbFunction as Theirs

    monkeypatch.setattr(Theirs, "forward", None)
    trainer.train()
    assert len(seen) == 3
    assert max(seen) <= 4 * 6  # completions of a micro-batch, not prompts


def test_unpatch_restores_everything(tmp_path):
    import trl.trainer.utils as utils

    theirs = utils._ChunkedLogProbFunction, utils._use_triton
    trainer = make_trainer(tmp_path)
    assert patch(trainer) is trainer
    assert patch(trainer, loss="logprobs") is trainer
    assert trainer._r1fast.fused is False
    trainer.train()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == theirs
    assert unpatch(trainer) is trainer
    hooks = {"_r1fast", "_get_per_token_logps_and_entropies", "_compute_loss"}
    assert not hooks & vars(trainer).keys()
    assert unpatch(trainer) is trainer


def test_a_loss_that_differs_from_trls_is_an_error(tmp_path, monkeypatch):
    trainer = patch(make_trainer(tmp_path))
    arguments = r1fast_trl._loss_arguments
    monkeypatch.setattr(
        r1fast_trl, "_loss_arguments",
        lambda *a: (lambda d: d | {"advantages": d["advantages"] + 1})(arguments(*a)),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"r1fast's loss is .*, TRL's is .*loss='logprobs'"):
        trainer.train()


def test_evaluation_and_accumulated_eval_loss(tmp_path):
    results = []
    for wrap in (unpatch, patch):
        trainer = wrap(
            make_trainer(
                tmp_path, loss_type="dapo", per_device_eval_batch_size=4, num_generations_eval=4
            )
        )
        torch.manual_seed(1)
        results.append(trainer.evaluate(trainer.train_dataset))
    for name in ("eval_loss", "eval_entropy", "eval_kl"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-4, abs=1e-5)


def test_rewards_of_r1fast_as_they_are(tmp_path):
    """`reward_funcs` of the real GRPOTrainer: names, columns, and None where a row has no tests or gold."""
    from r1fast.rewards import CodeReward, FormatReward, LanguageReward, MathReward
    from r1fast.rewards.sandbox import SandboxUnavailable

    code = CodeReward()
    try:
        code.start()
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox: {error}")
    rows = [
        {"prompt": "What is 3 + 5?", "answer": "8", "tests": None, "language": "en"},
        {"prompt": "Write add(a, b).", "answer": None, "tests": ["assert add(3, 4) == 7"],
         "language": "en"},
    ]  # fmt: skip
    given = {
        "What is 3 + 5?": "<think> the sum of three and five </think> <answer> 8 </answer>",
        "Write add(a, b).": "<think> die Summe von zwei Zahlen </think> <answer>\n```python\n"
        "def add(a, b):\n    return a + b\n```\n</answer>",
    }
    seen = {}

    def spied(reward):
        """The reward with what it was asked and said; with its name, as TRL wants it."""

        class Spy(type(reward)):
            def __call__(self, prompts=None, completions=None, completion_ids=None, **columns):
                texts = [given[prompt] for prompt in prompts]
                scores = super().__call__(prompts, texts, completion_ids, **columns)
                seen.setdefault(self.__name__, []).extend(zip(prompts, scores, strict=True))
                return scores

        reward.__class__ = Spy
        return reward

    with MathReward(symbolic=False) as maths, code:
        rewards = [spied(r) for r in (maths, code, FormatReward(), LanguageReward())]
        trainer = make_trainer(
            tmp_path, reward_funcs=rewards, rows=rows, max_steps=1, num_iterations=1,
            per_device_train_batch_size=8,
        )  # fmt: skip
        trainer.train()
    names = ["math_accuracy", "code_accuracy", "format", "language"]
    assert trainer.reward_func_names == names
    assert list(seen) == names
    for name, scores in zip(names, [(1.0, None), (None, 1.0), (1.0, 1.0)], strict=False):
        for row, score in zip(rows, scores, strict=True):
            asked = [said for prompt, said in seen[name] if prompt == row["prompt"]]
            assert asked == [score] * 4, (name, row["prompt"])
    shares = dict(seen["language"])
    assert shares["What is 3 + 5?"] == 1.0
    (row, *_) = [h for h in history(trainer) if "loss" in h]
    for name in names:
        assert f"rewards/{name}/mean" in row


@pytest.mark.slow
def test_two_ranks_train_the_same(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def train_on_two_ranks(folder: Path) -> None:
    found = []
    for wrap in (unpatch, patch):
        trainer = wrap(
            make_trainer(
                folder / os.environ["RANK"], loss_type="dapo", ddp_backend="gloo",
                gradient_accumulation_steps=2,
            )
        )  # fmt: skip
        torch.manual_seed(1 + trainer.args.process_index)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        found.append(([h["grad_norm"] for h in history(trainer) if "loss" in h], trainer.model))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4, abs=1e-4)
    for a, b in zip(found[1][1].parameters(), found[0][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class OwnLoss(trl.GRPOTrainer):
    def _compute_loss(self, model, inputs):
        return 2 * super()._compute_loss(model, inputs)


def test_a_subclass_with_its_own_loss_keeps_it(tmp_path):
    trainer = patch(make_trainer(tmp_path, OwnLoss))
    assert not trainer._r1fast.fused
    with pytest.raises(ValueError, match="OwnLoss has a _compute_loss of its own"):
        patch(trainer, loss="fused")


def test_refusals_say_what_would_do(tmp_path, monkeypatch):
    import trl.trainer.utils as utils

    with pytest.raises(ValueError, match=r"patch takes a trl\.GRPOTrainer, got object"):
        patch(object())
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="loss must be one of auto, fused, logprobs, got 'x'"):
        patch(trainer, loss="x")

    text_config = types.SimpleNamespace()
    with monkeypatch.context() as m, pytest.raises(ValueError, match="not a text model"):
        m.setattr(trainer.model.config, "get_text_config", lambda: text_config, raising=False)
        patch(trainer)
    adapter = type("LoraLinear", (), {"__module__": "peft.tuners.lora.layer"})
    with monkeypatch.context() as m, pytest.raises(ValueError, match=r"a PEFT LoraLinear.*Leave"):
        m.setattr(trainer.model, "get_output_embeddings", adapter)
        patch(trainer)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="use ZeRO-2 or FSDP"):
        m.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
        patch(trainer)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="set it to False"):
        m.setattr(trainer.args, "torch_compile", True)
        patch(trainer)
    with monkeypatch.context() as m, pytest.raises(ValueError, match=r"TRL 1\.\S+ has no _use_tr"):
        m.delattr(utils, "_use_triton")
        patch(trainer)
    other = types.SimpleNamespace(forward=lambda ctx, hidden: None)
    with monkeypatch.context() as m, pytest.raises(ValueError, match=r"take hidden; r1fast knows"):
        m.setattr(utils, "_ChunkedLogProbFunction", other)
        patch(trainer)
    assert "_r1fast" not in vars(trainer)


if __name__ == "__main__":
    train_on_two_ranks(Path(sys.argv[1]))
