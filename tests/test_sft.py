import math

import pytest
import torch
from tiny import tiny_config, tiny_policy, tiny_tokenizer, without_clock

from r1fast.examples import Example
from r1fast.metrics import read_metrics
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.types import Sequence

EXAMPLES = [
    Example(f"What is {a} + {b}?", f"{a} + {b} = {a + b}", id=f"{a}+{b}")
    for a in range(6)
    for b in range(6)
]


class Stopped(Exception):
    pass


def make_trainer(folder, *overrides, policy=None, examples=EXAMPLES, stop_at=None, **kwargs):
    policy, config = policy or tiny_policy(), tiny_config(*overrides)
    trainer = SFTTrainer(
        policy, config, folder, encode_examples(examples, policy, config), **kwargs
    )
    if stop_at is not None:
        real = trainer.train_step

        def train_step(step):
            if step == stop_at:
                raise Stopped
            return real(step)

        trainer.train_step = train_step
    return trainer


def test_encoding_ends_in_eos_and_keeps_the_kept():
    policy, config = tiny_policy(), tiny_config()
    examples = [EXAMPLES[0], Example("no", "thanks", keep=False)]
    (sequence,) = encode_examples(examples, policy, config)
    assert policy.tokenizer.decode(sequence.prompt_ids) == "What is 0 + 0?"
    assert sequence.completion_ids[-1] == policy.eos_id
    assert policy.decode(sequence.completion_ids) == "0 + 0 = 0"


def test_chat_template():
    policy = tiny_policy()
    config = tiny_config("--template.name=chat", "--template.system=Be brief.")
    (sequence,) = encode_examples(EXAMPLES[:1], policy, config)
    text = policy.tokenizer.decode(sequence.prompt_ids)
    assert text == "<|system|>Be brief.\n<|user|>What is 0 + 0?\n<|assistant|>"


def test_too_long_examples_are_counted_and_reported(capsys):
    policy = tiny_policy()
    examples = [*EXAMPLES, Example("a", "very " * 60, id="the long one")]
    for n, override in ((40, "--sft.max_seq_tokens=40"), (41, "--sft.token_budget=41")):
        assert len(encode_examples(examples, policy, tiny_config(override))) == 36
        message = " ".join(capsys.readouterr().err.split())
        assert f"1 of 37 examples are longer than {n} tokens and were left out" in message
        assert "the long one" in message
    with pytest.raises(ValueError, match="no training example is left"):
        encode_examples(examples[-1:], policy, tiny_config("--sft.max_seq_tokens=40"))
    with pytest.raises(ValueError, match="no training example is left"):
        encode_examples([], policy, tiny_config())


def test_loss_is_the_mean_over_completion_tokens(tmp_path):
    """Against a plain loop over the sequences, one at a time."""
    from r1fast.kernels.attention import PackedAttention

    sequences = [Sequence([1, 2, 3], [4, 5]), Sequence([6], [7, 8, 9, 10]), Sequence([3], [2])]
    for loss in ("token", "sequence"):
        policy = tiny_policy()
        config = tiny_config("--sft.batch_size=3", f"--sft.loss={loss}")
        row = SFTTrainer(policy, config, tmp_path, sequences).train_step(0)
        policy = tiny_policy()  # the weights before the step
        nll = []
        for s in sequences:
            ids = torch.tensor(s.prompt_ids + s.completion_ids)
            attend = PackedAttention(torch.tensor([0, len(ids)]), len(ids))
            hidden = policy.model(ids, torch.arange(len(ids)), attend)
            logp = torch.log_softmax(hidden @ policy.model.head_weight.T, -1)
            nll.append([-float(logp[i - 1, ids[i]].detach())
                        for i in range(len(s.prompt_ids), len(ids))])  # fmt: skip
        if loss == "token":
            expected = sum(map(sum, nll)) / 7
        else:
            expected = sum(sum(x) / len(x) for x in nll) / 3
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 < row["entropy"] < math.log(320)
        assert row["epoch"] == 1.0


def test_it_learns(tmp_path):
    trainer = make_trainer(tmp_path, "--sft.max_steps=25", "--optim.lr=0.01")
    trainer.run()
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert losses[-1] < 0.4 * losses[0], losses
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_number_of_steps(tmp_path):
    assert make_trainer(tmp_path, "--sft.max_steps=0", "--sft.epochs=2").num_steps == 9
    assert make_trainer(tmp_path, "--sft.max_steps=0", "--sft.epochs=0.1").num_steps == 1
    assert make_trainer(tmp_path, "--sft.max_steps=7", "--sft.epochs=2").num_steps == 7


def test_in_order(tmp_path):
    """One pass as the data stand, wrapping at the end."""
    trainer = make_trainer(tmp_path, "--sft.batch_size=5", examples=EXAMPLES[:7], in_order=True)
    lengths = [s.num_tokens for s in trainer.sequences]
    trainer.train_step(0)
    assert trainer.num_tokens == sum(lengths[:5])
    trainer.train_step(1)
    assert trainer.num_tokens == sum(lengths) + sum(lengths[:3])


def test_resume_is_bitwise(tmp_path):
    overrides = ("--checkpoint.every_steps=2", "--optim.min_lr_ratio=0.1", "--optim.warmup_steps=1")
    whole = make_trainer(tmp_path / "whole", *overrides)
    whole.run()
    with pytest.raises(Stopped):
        make_trainer(tmp_path / "parts", *overrides, stop_at=3).run()
    parts = make_trainer(tmp_path / "parts", *overrides)
    assert parts.step == 2
    parts.run()
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    a, b = whole.optimizer.state_tensors(), parts.optimizer.state_tensors()
    assert all(torch.equal(a[n], b[n]) for n in a)
    rows = [without_clock(read_metrics(tmp_path / n)) for n in ("whole", "parts")]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match=r"another config:\n.*optim\.lr"):
        make_trainer(tmp_path / "parts", *overrides, "--optim.lr=0.5")


def test_a_finished_stage_is_not_trained_again(tmp_path):
    overrides = ("--checkpoint.every_steps=2",)
    make_trainer(tmp_path, *overrides).run()
    rows = (tmp_path / "metrics.jsonl").read_text()
    again = make_trainer(tmp_path, *overrides)
    assert again.step == 4
    again.run()
    assert (tmp_path / "metrics.jsonl").read_text() == rows
    assert len(rows.splitlines()) == 4


def test_unknown_text_is_reported(capsys):
    policy = tiny_policy(tokenizer=tiny_tokenizer())
    policy.tokenizer.unk_token = "What"  # any token that occurs
    try:
        encode_examples([Example("x", "What is it?")], policy, tiny_config())
        message = " ".join(capsys.readouterr().err.split())
    finally:
        policy.tokenizer.unk_token = None
    assert "1 examples hold text that the tokenizer does not know" in message


def test_a_system_turn_of_an_example_is_its_system_message():
    policy = tiny_policy()
    example = Example("Hi", "Hello", id="e", meta={"system": "Be kind."})
    config = tiny_config("--template.name=chat", "--template.system=Be brief.")
    (sequence,) = encode_examples([example], policy, config)
    text = policy.tokenizer.decode(sequence.prompt_ids)
    assert text == "<|system|>Be kind.\n<|user|>Hi\n<|assistant|>"
    with pytest.raises(ValueError, match=r"example 'e' has a system message.*use 'chat'"):
        encode_examples([example], policy, tiny_config())


def test_the_opening_tag_of_the_prompt_is_not_learned_again():
    policy = tiny_policy()
    example = Example("1 + 1?", "<think> 2 </think> <answer> 2 </answer>")
    config = tiny_config("--template.prompt={prompt} <think>")
    (sequence,) = encode_examples([example], policy, config)
    text = policy.tokenizer.decode(sequence.prompt_ids) + policy.decode(sequence.completion_ids)
    assert text == "1 + 1? <think> 2 </think> <answer> 2 </answer>"
