"""Reward models that are any sequence-classification checkpoint: labels, padding, ways of input, native or not."""

import json

import pytest
import torch

from r1fast import hf_classifier
from r1fast.assemble import preference_rewards
from r1fast.config import TemplateConfig, load_config
from r1fast.hf_classifier import Encoder, HFClassifier, input_form, is_native, load_score_fn
from r1fast.hf_folder import read_json
from r1fast.model import load_tokenizer
from r1fast.reward_model import load_reward_model, save_reward_model

transformers = pytest.importorskip("transformers")
RAW = TemplateConfig(name="raw", prompt="Q: {prompt} A: ")
WORDS = (
    "<pad> <eos> [CLS] [SEP] [UNK] Q: A: one two three four good bad fine user assistant".split()
)
CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
PAIRS = [
    ("one", "good"),
    ("one two three", "bad fine good"),
    ("two", "fine"),
    ("four four four four", "bad bad bad bad good one two"),
    ("one", "bad"),
]
ROW = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "bert": ("BertConfig", {}),
    "deberta": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                    "position_biased_input": False, "type_vocab_size": 0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
}  # fmt: skip


def tokenizer(*, chat=False, pair=False, pad="<pad>", side="right"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if pair else {}
    if pair:
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if pair:
        raw.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", unk_token="[UNK]", padding_side=side,
        **({"pad_token": pad} if pad else {}), **special,
    )  # fmt: skip
    if chat:
        made.chat_template = CHAT
    return made


def checkpoint(folder, family, own_tokenizer, *, num_labels=1, labels=(), **changes):
    name, own = CONFIGS[family]
    config = getattr(transformers, name)(**ROW | own | changes, num_labels=num_labels)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    model.eval().save_pretrained(folder)
    own_tokenizer.save_pretrained(folder)
    return model


def logits(model, rows) -> torch.Tensor:
    """(S, labels): one row at a time, as transformers does it without any padding."""
    with torch.no_grad():
        return torch.cat(
            [model(**{k: torch.tensor([v]) for k, v in row.items()}).logits for row in rows]
        )


def options(family) -> dict:
    return {"pair": True} if family in ("bert", "deberta") else {"chat": True}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_are_those_of_transformers_for_one_text_alone(tmp_path, family, num_labels, side):
    tok = tokenizer(side=side, **options(family))
    model = checkpoint(tmp_path, family, tok, num_labels=num_labels)
    score = load_score_fn(tmp_path, template=RAW)
    assert isinstance(score, HFClassifier) == (
        family in ("bert", "deberta", "gpt2") or num_labels == 2
    )
    if family in ("bert", "deberta"):
        rows = [dict(tok(*pair)) for pair in PAIRS]
    else:
        rows = [
            {"input_ids": tok(f"user {p} <eos> assistant {r} <eos>")["input_ids"]} for p, r in PAIRS
        ]
    z = logits(model, rows)
    expected = (z[:, 0] if num_labels == 1 else z[:, 1] - z[:, 0]).tolist()
    assert max(expected) - min(expected) > 0.1
    assert score(PAIRS) == pytest.approx(expected, abs=2e-5)
    assert score(PAIRS[::-1]) == pytest.approx(expected[::-1], abs=2e-5)
    assert score([]) == []


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_native_and_transformers_score_alike(tmp_path, family):
    """The same checkpoint through the packed trunk and through transformers."""
    tok = tokenizer(chat=True)
    checkpoint(tmp_path, family, tok)
    assert is_native(read_json(tmp_path / "config.json"), tmp_path)
    for how in ("chat", "template"):
        native = load_score_fn(tmp_path, template=RAW, how=how)
        theirs = HFClassifier(tmp_path, Encoder(tok, RAW, how))
        assert native(PAIRS) == pytest.approx(theirs(PAIRS), abs=2e-5)
        assert len({round(x, 4) for x in native(PAIRS)}) == len(PAIRS)


def test_how_a_prompt_and_a_response_are_put(tmp_path):
    bert, chat, plain = tokenizer(pair=True), tokenizer(chat=True), tokenizer()
    assert input_form({}, bert) == "pair"
    assert input_form({}, chat) == "chat"
    assert input_form({}, plain) == "template"
    words = lambda row: plain.convert_ids_to_tokens(row["input_ids"])  # noqa: E731
    assert words(Encoder(bert, RAW, "pair")("one", "good")) == [
        "[CLS]",
        "one",
        "[SEP]",
        "good",
        "[SEP]",
    ]
    assert Encoder(bert, RAW, "pair")("one", "good")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert words(Encoder(chat, RAW, "chat")("one", "good")) == [
        "user", "one", "<eos>", "assistant", "good", "<eos>",
    ]  # fmt: skip
    assert words(Encoder(plain, RAW, "template")("one", "good <eos>"))[-2:] == ["good", "<eos>"]
    # what was trained here was trained through the template, whatever the tokenizer has beside it
    checkpoint(tmp_path / "theirs", "qwen2", chat)
    save_reward_model(load_reward_model(tmp_path / "theirs"), tmp_path / "ours", tokenizer=chat)
    assert input_form(read_json(tmp_path / "ours/config.json"), chat) == "template"
    assert load_score_fn(tmp_path / "ours", template=RAW)(PAIRS) == pytest.approx(
        load_score_fn(tmp_path / "theirs", template=RAW, how="template")(PAIRS), abs=1e-6
    )
    assert load_score_fn(tmp_path / "ours", template=RAW)(PAIRS) != pytest.approx(
        load_score_fn(tmp_path / "theirs", template=RAW)(PAIRS), abs=1e-3
    )
    checkpoint(tmp_path / "plain", "qwen2", plain)
    with pytest.raises(ValueError, match="has no chat template; take 'template' or 'pair'"):
        load_score_fn(tmp_path / "plain", template=RAW, how="chat")


def test_labels(tmp_path):
    tok = tokenizer(pair=True)
    model = checkpoint(tmp_path, "bert", tok, num_labels=3, labels=("toxic", "safe", "neutral"))
    with pytest.raises(ValueError, match=r"3 labels \('toxic', 'safe', 'neutral'\): name the one"):
        load_score_fn(tmp_path, template=RAW)
    with pytest.raises(ValueError, match=r"no label 'good'; it has 'toxic', 'safe', 'neutral'"):
        load_score_fn(tmp_path, template=RAW, label="good")
    scores = load_score_fn(tmp_path, template=RAW, label="safe")(PAIRS)
    p = logits(model, [dict(tok(*pair)) for pair in PAIRS]).softmax(1)[:, 1]
    assert torch.tensor(scores).sigmoid().tolist() == pytest.approx(p.tolist(), abs=1e-5)


def test_padding_that_would_change_scores_is_left_out(tmp_path, monkeypatch):
    """GPT-2 without a padding token cannot be batched by transformers; BERT padded on either side can."""
    texts = []
    monkeypatch.setattr(hf_classifier, "warn", texts.append)
    tok = tokenizer(chat=True)
    model = checkpoint(tmp_path / "gpt2", "gpt2", tok, pad_token_id=None)
    score = load_score_fn(tmp_path / "gpt2", template=RAW)
    assert score.side == ""
    assert "asked one text at a time" in texts[0]
    rows = [
        {"input_ids": tok(f"user {p} <eos> assistant {r} <eos>")["input_ids"]} for p, r in PAIRS
    ]
    assert score(PAIRS) == pytest.approx(logits(model, rows)[:, 0].tolist(), abs=2e-5)
    bare = tokenizer(chat=True, pad="")
    checkpoint(tmp_path / "bare", "gpt2", bare)
    assert load_score_fn(tmp_path / "bare", template=RAW).side == ""
    checkpoint(tmp_path / "bert", "bert", tokenizer(pair=True, side="left"))
    assert load_score_fn(tmp_path / "bert", template=RAW).side == "right"


def test_batches_keep_to_the_budget(tmp_path, monkeypatch):
    checkpoint(tmp_path, "bert", tokenizer(pair=True))
    score = load_score_fn(tmp_path, template=RAW)
    expected, sizes, forward = score(PAIRS), [], score._forward

    def counted(rows, side):
        sizes.append((len(rows), max(len(r["input_ids"]) for r in rows)))
        return forward(rows, side)

    score._forward, score.token_budget = counted, 20
    assert score(PAIRS) == pytest.approx(expected, abs=2e-5)
    assert sum(n for n, _ in sizes) == len(PAIRS)
    assert all(n * longest <= 20 for n, longest in sizes)
    assert len(sizes) < len(PAIRS)


def test_what_is_no_reward_model_is_refused(tmp_path):
    tok = tokenizer(pair=True)
    model = checkpoint(tmp_path, "bert", tok)
    with pytest.raises(ValueError, match=r"response 1 has 72 tokens .* reads at most 64"):
        load_score_fn(tmp_path, template=RAW)([("one", "good"), ("one", "good " * 68)])
    model.bert.save_pretrained(tmp_path / "trunk")
    tok.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ValueError, match=r"lacks weights of a sequence classifier .*at random"):
        load_score_fn(tmp_path / "trunk", template=RAW)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vits"}))
    with pytest.raises(ValueError, match="is no sequence classifier"):
        load_score_fn(tmp_path, template=RAW)


def test_the_rewards_of_a_config(tmp_path):
    """Helpfulness is the score of prompt and summary, safety the probability of prompt and response."""
    tok = tokenizer(pair=True)
    helpful = checkpoint(tmp_path / "h", "bert", tok)
    safe = checkpoint(tmp_path / "s", "deberta", tok, num_labels=2, labels=("safe", "unsafe"))
    config = load_config(None, [
        f"--rewards.helpfulness_model={tmp_path / 'h'}", f"--rewards.safety_model={tmp_path / 's'}",
        "--rewards.safety_label=safe", "--template.protocol=think",
    ])  # fmt: skip
    rewards = preference_rewards(config, None)
    text = "<think> bad </think> good fine"
    z = logits(helpful, [dict(tok("one", "good fine"))])
    assert rewards.score_helpfulness(["one"], [text]) == pytest.approx(z[0].tolist(), abs=1e-5)
    p = logits(safe, [dict(tok("one", text))]).softmax(1)[0, 0]
    assert rewards.score_safety(["one"], [text]) == pytest.approx([float(p)], abs=1e-5)
    assert load_tokenizer(tmp_path / "h").sep_token_id == 3
