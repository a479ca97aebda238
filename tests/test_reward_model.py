"""Reward models: transformers' scores, the two losses, exact gradients, and that they learn."""

import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import without_clock

from r1fast import optim, reward_model, training
from r1fast.checkpoint import load_checkpoint
from r1fast.config import OptimConfig, SFTConfig, load_config
from r1fast.metrics import read_metrics
from r1fast.model import Decoder, ModelSpec, save_model
from r1fast.reward_model import (
    LabelledResponse,
    PreferencePair,
    RewardModel,
    encode_response,
    load_labelled,
    load_pairs,
    load_reward_model,
    save_reward_model,
    score_fn,
)
from r1fast.reward_training import (
    RewardPolicy,
    RewardTrainer,
    accumulate_gradients,
    evaluate_reward_model,
    micro_batches,
)

PAD, EOS, GOOD, BAD = 0, 1, 5, 6
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Llama": {"tie_word_embeddings": False},
}
SPEC = ModelSpec(
    "qwen3", vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, qk_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def small(seed=0, head=0, **kwargs) -> RewardModel:
    return RewardModel(Decoder(SPEC, seed=seed), seed=head, **kwargs)


def shaken(model: RewardModel) -> RewardModel:
    """Weights large enough for every part to move the scores."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(std=0.2, generator=generator))
    return model


def sentences(n: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(7, vocab_size) for _ in range(rng.randint(1, 30))] for _ in range(n)]


def pairs(n: int, seed: int) -> list[PreferencePair]:
    """The chosen response holds GOOD somewhere, the rejected one BAD."""
    rng = random.Random(seed)

    def response(mark):
        tokens = [rng.randrange(7, 32) for _ in range(rng.randint(3, 8))]
        tokens[rng.randrange(len(tokens))] = mark
        return [*tokens, EOS]

    prompts = [[rng.randrange(7, 32) for _ in range(rng.randint(2, 5))] for _ in range(n)]
    return [PreferencePair(p, response(GOOD), response(BAD)) for p in prompts]


def labelled(n: int, seed: int) -> list[LabelledResponse]:
    return [
        LabelledResponse(p.prompt_ids, p.chosen_ids if i % 3 else p.rejected_ids, bool(i % 3))
        for i, p in enumerate(pairs(n, seed))
    ]


def their_scores(theirs, batch: list[list[int]], pad: int = PAD) -> list[float]:
    """One right-padded batch through transformers."""
    width = max(map(len, batch))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=mask).logits.squeeze(1).tolist()


def trainer(model, data, folder, *, optim, seed=0, every=0, keep="auto", **kwargs) -> RewardTrainer:
    """A trainer of `model`; what SFTConfig has goes into [sft]."""
    names = SFTConfig.__dataclass_fields__
    sft = {"epochs": 1.0, "batch_size": 256} | {n: kwargs.pop(n) for n in [*kwargs] if n in names}
    config = load_config(None, [f"--seed={seed}", f"--checkpoint.every_steps={every}",
                                f"--model.activation_checkpointing={keep}",
                                f"--log.profile_steps={kwargs.pop('profile', 0)}"])  # fmt: skip
    config = replace(config, optim=optim, sft=replace(config.sft, **sft))
    return RewardTrainer(RewardPolicy(model), config, folder, data, **kwargs)


def train(model, data, **kwargs) -> dict:
    """Trains `model` in a folder that goes; the last row of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(model, data, folder, **kwargs)
        run.run()
        return read_metrics(folder)[-1] if run.rank == 0 else {}


def make_theirs(transformers, family, **kwargs):
    config = getattr(transformers, f"{family}Config")(
        **SHAPE | FAMILIES[family] | {"num_labels": 1, "pad_token_id": PAD} | kwargs
    )
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.2 if p.ndim == 2 else 0.5, generator=generator)
            if name.endswith("norm.weight"):
                p.add_(1)
    return theirs.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_transformers_both_ways(transformers, tmp_path, family):
    theirs = make_theirs(transformers, family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_reward_model(tmp_path / "theirs")
    batch = [*sentences(6, 61), [9, 8, 7, PAD], [PAD, 9, PAD, PAD], [PAD, PAD]]
    expected = their_scores(theirs, batch)
    assert max(expected) - min(expected) > 1
    assert ours.score(batch, token_budget=40) == pytest.approx(expected, abs=1e-5)
    assert ours.decoder.lm_head is None

    shaken(ours)
    save_reward_model(ours, tmp_path / "ours")
    auto = transformers.AutoModelForSequenceClassification
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again).__name__ == f"{family}ForSequenceClassification"
    assert not any(info.values()), info
    changed = their_scores(again.eval(), batch)
    assert max(abs(a - b) for a, b in zip(changed, expected, strict=True)) > 0.1
    assert ours.score(batch) == pytest.approx(changed, abs=1e-5)
    assert load_reward_model(tmp_path / "ours").score(batch) == ours.score(batch)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["pad_token_id"] == PAD
    assert config["tie_word_embeddings"] == FAMILIES[family]["tie_word_embeddings"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_model_gets_a_new_head(transformers, tmp_path, tied):
    config = transformers.Qwen2Config(**SHAPE, tie_word_embeddings=tied)
    torch.manual_seed(0)
    causal = transformers.AutoModelForCausalLM.from_config(config)
    causal.save_pretrained(tmp_path / "causal")
    batch = sentences(3, 61)
    assert load_reward_model(tmp_path / "causal").score(batch) == [0.0, 0.0, 0.0]
    ours = load_reward_model(tmp_path / "causal", seed=3, pad_token_id=PAD)
    assert ours.score(batch) == load_reward_model(tmp_path / "causal", seed=3).score(batch)
    assert ours.score(batch) != load_reward_model(tmp_path / "causal", seed=4).score(batch)
    with torch.no_grad():
        hidden = causal.model(input_ids=torch.tensor(batch[:1])).last_hidden_state[0, -1]
        expected = float(hidden @ ours.score_weight[0])
    assert ours.score(batch[:1])[0] == pytest.approx(expected, abs=1e-5)
    save_reward_model(ours, tmp_path / "ours")
    auto = transformers.AutoModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "ours").eval()
    assert their_scores(theirs, batch) == pytest.approx(ours.score(batch), abs=1e-5)


def test_saving_without_a_padding_token_is_warned_about(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(reward_model, "warn", texts.append)
    save_reward_model(small(), tmp_path / "a")
    assert "neither the reward model nor its tokenizer has a pad_token_id" in texts[0]
    save_reward_model(small(pad_token_id=PAD), tmp_path / "b")
    assert len(texts) == 1
    with pytest.raises(ValueError, match=r"pad_token_id must be in \[0, 32\), got 32"):
        small(pad_token_id=32)


def test_the_tokenizers_padding_token_is_taken(tokenizer, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(reward_model, "warn", texts.append)
    save_reward_model(small(), tmp_path / "a", tokenizer=tokenizer)
    assert json.loads((tmp_path / "a/config.json").read_text())["pad_token_id"] == 0
    assert not texts
    # one that is also eos would hide the end of every response
    same = SimpleNamespace(pad_token_id=1, eos_token_id=1, save_pretrained=lambda folder: None)
    save_reward_model(small(), tmp_path / "b", tokenizer=same)
    assert json.loads((tmp_path / "b/config.json").read_text())["pad_token_id"] is None
    assert len(texts) == 1


def test_folders_that_are_no_reward_model_are_refused(transformers, tmp_path):
    make_theirs(transformers, "Qwen2", num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"score.weight of shape \(1, 48\).*has \(2, 48\)"):
        load_reward_model(tmp_path / "two")
    save_model(Decoder(SPEC, seed=0), tmp_path / "causal")
    config = json.loads((tmp_path / "causal/config.json").read_text())
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (tmp_path / "causal/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has none"):
        load_reward_model(tmp_path / "causal")
    with pytest.raises(ValueError, match="no such model folder"):
        load_reward_model(tmp_path / "absent")


def test_scores_do_not_depend_on_the_packing():
    model = shaken(small())
    batch = sentences(20, 32)
    alone = [model.score([ids])[0] for ids in batch]
    for budget in (1, 30, 64, 10_000):
        assert model.score(batch, token_budget=budget) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == len(alone)
    assert model.score([]) == []
    assert all(p.grad is None for p in model.parameters())


def test_sequences_that_cannot_be_scored():
    model = small()
    with pytest.raises(ValueError, match="at least one token"):
        model.score([[3], []])
    with pytest.raises(ValueError, match=r"in \[0, 32\), got 3 to 32"):
        model.score([[3, 32]])


def gradients(model, items, budget) -> dict[str, torch.Tensor]:
    model.zero_grad()
    accumulate_gradients(model, items, micro_batches(model, items, budget), denominator=len(items))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [pairs, labelled])
def test_gradient_is_that_of_the_mean_loss_whatever_the_micro_batches(make, monkeypatch):
    model, items = shaken(small()), make(24, 1)
    sizes, forward = [], RewardModel.forward

    def counted(self, sequences):
        sizes.append(len(sequences))
        return forward(self, sequences)

    monkeypatch.setattr(RewardModel, "forward", counted)
    whole = gradients(model, items, 10_000)
    assert len(sizes) == 1
    split = gradients(model, items, 40)
    assert len(sizes) > 6

    # the definition, one sequence at a time and in float64
    exact = shaken(small()).double()
    losses = []
    for item in items:
        s = [exact([ids]) for ids in item.sequences()]
        if make is pairs:
            losses.append(-torch.log(torch.sigmoid(s[0] - s[1])))
        else:
            losses.append(-torch.log(torch.sigmoid(s[0] if item.safe else -s[0])))
    torch.cat(losses).mean().backward()
    for name, p in exact.named_parameters():
        scale = float(p.grad.abs().max())
        assert scale > 0, name
        for ours in (whole[name], split[name]):
            assert float((ours - p.grad).abs().max()) < 1e-4 * scale, name


def test_the_loss_reported_is_the_mean_loss_and_ties_are_half_right():
    items = pairs(5, 0)
    zero = RewardModel(Decoder(SPEC, seed=0))
    assert evaluate_reward_model(zero, items) == {
        "loss": pytest.approx(math.log(2)), "accuracy": 0.5,
    }  # fmt: skip
    assert all(p.grad is None for p in zero.parameters())
    model = shaken(small())
    s = [model.score(item.sequences()) for item in items]
    found = evaluate_reward_model(model, items, token_budget=60)
    assert found["loss"] == pytest.approx(
        sum(math.log1p(math.exp(b - a)) for a, b in s) / 5, rel=1e-5
    )
    assert found["accuracy"] == sum(a > b for a, b in s) / 5


ADAMW = OptimConfig(lr=5e-3, min_lr_ratio=0.1, warmup_steps=2)


@pytest.mark.parametrize(("make", "objective"), [(pairs, "pairwise"), (labelled, "pointwise")])
def test_learns_a_separable_preference(tmp_path, make, objective):
    model, held_out = small(pad_token_id=PAD), make(120, 99)
    assert evaluate_reward_model(model, held_out)["accuracy"] < 0.8
    run = trainer(
        model, make(400, 7), tmp_path, objective=objective, max_steps=40, batch_size=32,
        optim=ADAMW, token_budget=512, stage="helpfulness", eval_data=held_out,
    )  # fmt: skip
    run.run()
    final = read_metrics(tmp_path)[-1]
    assert final["eval/accuracy"] > 0.95, final
    assert final["loss"] < 0.3
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "step_time"} <= rows[0].keys()
    assert rows[0]["learning_rate"] == pytest.approx(2.5e-3)
    assert rows[-1]["learning_rate"] == pytest.approx(5e-4)
    assert rows[-1]["eval/accuracy"] == final["eval/accuracy"]
    assert rows[0]["stage"] == "helpfulness"
    assert model.score([[9, GOOD, EOS]]) > model.score([[9, BAD, EOS]])

    loaded = load_reward_model(tmp_path / "model")
    assert evaluate_reward_model(loaded, held_out)["accuracy"] == final["eval/accuracy"]


def test_the_preference_is_read_from_the_data():
    swapped = [PreferencePair(p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs(400, 7)]
    model = small()
    train(model, swapped, max_steps=25, batch_size=32, optim=ADAMW)
    assert evaluate_reward_model(model, pairs(100, 99))["accuracy"] < 0.1


def test_every_micro_batch_is_added_up_by_the_optimizer(monkeypatch):
    """In float32, and before the ranks' sum: a gradient left in the weights would miss both."""
    left, real = [], optim.Optimizer.accumulate

    def accumulate(self):
        left.append(sum(p.grad is not None for p in model.parameters()))
        real(self)

    monkeypatch.setattr(optim.Optimizer, "accumulate", accumulate)
    model = small()
    model.to(torch.bfloat16)
    train(model, pairs(8, 3), max_steps=1, batch_size=8, optim=ADAMW, token_budget=40)
    assert len(left) > 3
    assert all(left[:-2])
    assert left[-2:] == [0, 0]  # the looks before the ranks' sum and the step find nothing


def test_training_repeats_and_counts_its_steps():
    def run(**kwargs):
        model = small()
        final = train(model, pairs(10, 3), optim=ADAMW, **kwargs)
        return final, model.score([[9, 8, GOOD]])

    final, score = run(epochs=2, batch_size=4)
    assert final["epoch"] == pytest.approx(2.0)
    assert final["num_tokens"] == 2 * sum(len(s) for p in pairs(10, 3) for s in p.sequences())
    assert run(epochs=2, batch_size=4)[1] == score
    assert run(epochs=2, batch_size=4, seed=1)[1] != score
    assert run(max_steps=3, batch_size=100)[0]["epoch"] == pytest.approx(3.0)


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    texts = []
    monkeypatch.setattr(training, "warn", texts.append)
    model = small()
    with torch.no_grad():
        model.score_weight.fill_(float("inf"))
    before = model.decoder.embed.weight.clone()
    with pytest.raises(FloatingPointError, match="5 gradients in a row were not finite"):
        train(model, pairs(10, 3), epochs=9, batch_size=4, optim=ADAMW)
    assert torch.equal(model.decoder.embed.weight, before)
    assert len(texts) == 5


def test_training_errors_say_what_would_do():
    def fails(message, data=None, **kwargs):
        with pytest.raises(ValueError, match=message):
            train(small(), pairs(2, 0) if data is None else data, optim=ADAMW, **kwargs)

    fails("pairwise or pointwise, got 'both'", objective="both")
    fails(r"needs LabelledResponse items, got PreferencePair at data\[0\]", objective="pointwise")
    fails(r"needs PreferencePair items, .* at eval_data\[0\]", eval_data=labelled(1, 0))
    fails("data is empty; pairwise", data=[])
    fails("sft.batch_size must be at least 1, got 0", batch_size=0)
    fails("sft.epochs must be above 0", epochs=0)
    fails("tokens, over token_budget = 8", token_budget=8)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    def run(folder, steps=6, **kwargs):
        model = small(pad_token_id=PAD)
        one = trainer(
            model, pairs(20, 3), folder, max_steps=6, batch_size=4, optim=ADAMW, every=2, **kwargs
        )
        real = one.train_step

        def train_step(step):
            if step == steps:
                raise KeyboardInterrupt
            return real(step)

        one.train_step = train_step
        one.run()
        return one, model

    _, whole = run(tmp_path / "whole", eval_data=pairs(5, 9))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", steps=3, eval_data=pairs(5, 9))
    assert load_checkpoint(tmp_path / "cut/checkpoints").step == 2
    again, resumed = run(tmp_path / "cut", eval_data=pairs(5, 9))
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert torch.equal(a, b), name
    rows = [without_clock(read_metrics(tmp_path / name)) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match="the training data: other rows"):
        trainer(small(), pairs(21, 3), tmp_path / "cut", max_steps=6, batch_size=4, optim=ADAMW)
    done, _ = run(tmp_path / "cut", steps=0, eval_data=pairs(5, 9))  # nothing is trained again
    assert done.evaluation == {}
    assert done.evaluate() == again.evaluation


@pytest.mark.parametrize("make", [pairs, labelled])
def test_out_of_memory_halves_the_budget_at_the_same_gradient(tmp_path, monkeypatch, make):
    objective = "pairwise" if make is pairs else "pointwise"
    forward, room, sizes = RewardModel.forward, 120, []

    def limited(self, sequences):
        sizes.append(sum(map(len, sequences)))
        if sizes[-1] > room and self.decoder.checkpointing != "full":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, sequences)

    def run(folder, budget, keep="auto"):
        model = shaken(small())
        options = {"max_steps": 3, "batch_size": 12, "optim": ADAMW, "objective": objective}
        one = trainer(model, make(24, 1), folder, token_budget=budget, keep=keep, **options)
        one.run()
        return [row["train/token_budget"] for row in read_metrics(folder)], weights(model)

    monkeypatch.setattr(RewardModel, "forward", limited)
    budgets, halved = run(tmp_path / "a", 10_000)
    assert budgets[-1] <= room < max(sizes)
    assert budgets == budgets[:1] * 3
    monkeypatch.setattr(RewardModel, "forward", forward)
    _, small_from_the_start = run(tmp_path / "b", budgets[-1])
    for name, value in halved.items():
        assert torch.equal(value, small_from_the_start[name]), name
    monkeypatch.setattr(RewardModel, "forward", limited)
    room = 1
    with pytest.raises(RuntimeError, match=r"which cannot be divided .*Lower sft.max_seq_tokens"):
        run(tmp_path / "c", 10_000, keep="none")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_train_to_the_same_bits(mode):
    models = small(), small()
    for model, keep in zip(models, ("none", mode), strict=True):
        train(model, pairs(8, 3), max_steps=2, batch_size=8, optim=ADAMW, keep=keep)
    for (name, a), b in zip(weights(models[0]).items(), weights(models[1]).values(), strict=True):
        assert torch.equal(a, b), name


def test_steps_can_be_profiled(tmp_path):
    trainer(small(), pairs(8, 3), tmp_path, max_steps=2, batch_size=8, optim=ADAMW, profile=1).run()
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert found["steps"] == [2]
    assert {"train", "train/forward", "train/backward", "train/optimizer"} <= set(found["phases"])


WORDS = "<pad> <eos> <bos> Q: A: one two three good bad ?".split()


@pytest.fixture(scope="module")
def tokenizer(transformers):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_texts_to_ids(tokenizer, tmp_path):
    def render(prompt):
        return f"Q: {prompt} A:"

    assert encode_response("one", "good", tokenizer) == ([2, 5], [8, 1])
    assert encode_response("one", "good <eos>", tokenizer, render) == ([2, 3, 5, 4], [8, 1])
    # a template that writes <bos> itself does not get a second one
    assert encode_response("<bos> one", "good", tokenizer)[0] == [2, 5]
    file = write(tmp_path / "p.jsonl", {"prompt": "one", "chosen": "good", "rejected": "bad two"})
    assert load_pairs(file, tokenizer, render=render) == [
        PreferencePair([2, 3, 5, 4], [8, 1], [9, 6, 1])
    ]
    file = write(tmp_path / "l.jsonl", {"prompt": "one", "response": "bad", "safe": False})
    assert load_labelled(file, tokenizer) == [LabelledResponse([2, 5], [9, 1], False)]


def test_score_fn_scores_what_the_files_train(tokenizer, tmp_path):
    def render(prompt):
        return f"Q: {prompt} A:"

    model = shaken(small(pad_token_id=0))
    row = {"prompt": "one", "chosen": "good three", "rejected": "bad"}
    (pair,) = load_pairs(write(tmp_path / "p.jsonl", row), tokenizer, render=render)
    scores = score_fn(model, tokenizer, render)([("one", "good three"), ("one", "bad")])
    assert scores == pytest.approx(model.score(pair.sequences()), abs=1e-6)
    assert scores[0] != scores[1]
    assert score_fn(model, tokenizer, render)([]) == []
    # an empty summary can still be scored: it is its end token
    assert len(score_fn(model, tokenizer, render)([("one", "")])) == 1


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (load_pairs, {"prompt": "one", "chosen": "good"}, "'rejected' must be a string, got None"),
        (load_pairs, {"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        (
            load_pairs,
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "'chosen' and 'rejected' are the same",
        ),
        (load_pairs, ["one"], "expected a JSON object"),
        (load_labelled, {"prompt": "a", "response": 3, "safe": True}, "'response' must be a str"),
        (load_labelled, {"prompt": "a", "response": "b", "safe": 1}, "'safe' must be true or fal"),
        (load_labelled, {"prompt": "a", "response": "b"}, "'safe' must be true or false, got None"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tokenizer, tmp_path, load, row, message):
    good = {"prompt": "one", "chosen": "good", "rejected": "bad", "response": "x", "safe": True}
    file = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {message}"):
        load(file, tokenizer)


def test_long_rows_are_left_out_and_reported(tokenizer, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(reward_model, "warn", texts.append)
    rows = [{"prompt": "one", "chosen": "good " * n, "rejected": "bad"} for n in (1, 50)]
    file = write(tmp_path / "p.jsonl", *rows)
    assert len(load_pairs(file, tokenizer, max_tokens=20)) == 1
    assert texts == [f"{file}: 1 of 2 rows have over 20 tokens"]
    with pytest.raises(ValueError, match="every row has over 2 tokens"):
        load_pairs(file, tokenizer, max_tokens=2)
    with pytest.raises(ValueError, match="holds no rows"):
        load_pairs(write(tmp_path / "empty.jsonl"), tokenizer)


def train_on_one_rank() -> list[float]:
    model = small()
    with tempfile.TemporaryDirectory() as folder:
        folder = os.environ.get("SHARED_FOLDER", folder)
        run = trainer(
            model,
            pairs(9, 2),
            folder,
            max_steps=4,
            batch_size=5,
            optim=ADAMW,
            eval_data=pairs(3, 4),
        )
        run.run()
        last = read_metrics(folder)[-1]
    return [last["loss"], last["grad_norm"], last["eval/loss"], *model.score([[3, 4], [7, 1]])]


RANK_CODE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from r1fast import distributed
from test_reward_model import train_on_one_rank
torch.set_num_threads(1)
distributed.start()
print("RESULT", *train_on_one_rank())
distributed.stop()
"""


def test_two_ranks_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {
        "SHARED_FOLDER": str(tmp_path),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_CODE, os.path.dirname(__file__)],
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = train_on_one_rank()
    try:
        for output, errors in [rank.communicate(timeout=120) for rank in ranks]:
            lines = [x for x in output.splitlines() if x.startswith("RESULT")]
            assert lines, errors
            together = [float(x) for x in lines[0].split()[1:]]
            assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
