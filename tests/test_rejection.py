"""Rejection sampling: what is kept, what is dropped and why, and the non-reasoning data beside it."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from r1fast import rejection
from r1fast.examples import Example, load_examples
from r1fast.jsonl import write_jsonl
from r1fast.rejection import general_examples, mix, rejection_sample, write_examples
from r1fast.types import Completion, Problem, Reward, RolloutGroup

GOOD = "<think> so 3 + 5 is {n} </think> <answer> 8 </answer>"
SHORT = GOOD.format(n=8)
MIXED = "<think> shi suoyi shi is </think> <answer> 8 </answer>"
CODE = "<think>\n```python\nx = 1\n```\n</think> <answer> 8 </answer>"
LONG = "<think> " + "so " * 40 + "</think> <answer> 8 </answer>"
BROKEN = "so it is <answer> 8 </answer>"
LEXICON = "--rewards.lexicon={en = ['is', 'so'], zh = ['shi', 'suoyi']}"


class Scorer:
    """Verdicts by text: `wrong` in it is wrong, `odd` cannot be read, all else is correct."""

    prompt_opens_think = False

    def score(self, groups):
        for group in groups:
            group.rewards = []
            for c in group.completions:
                verdict = "wrong" if "wrong" in c.text else "correct"
                verdict = "unparseable" if "odd" in c.text else verdict
                group.rewards.append(Reward(0.0, {}, verdict, answer=f"- {c.text}".split()[-2]))


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion([1], [0.0], finish, text)


def sample(monkeypatch, tmp_path, texts, *overrides, scorer=None):
    """(kept examples, accounting) of problems with these completions each."""
    groups = [
        RolloutGroup(Problem("3 + 5", "8", f"p{i}"), [1],
                     [completion(*t) if isinstance(t, tuple) else completion(t) for t in row])
        for i, row in enumerate(texts)
    ]  # fmt: skip
    monkeypatch.setattr(rejection, "sample_groups", lambda *args, **kwargs: groups)
    config = tiny_config(LEXICON, "--template.name=r1_zero", "--sample.max_kept=0",
                         "--sample.max_paragraph_words=30", *overrides)  # fmt: skip
    problems = [g.problem for g in groups]
    policy = SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=5), eos_ids=[6])
    kept = rejection_sample(policy, problems, config, scorer or Scorer(), tmp_path)
    return kept, json.loads((tmp_path / "accounting.json").read_text())


def test_every_completion_is_kept_or_counted_under_a_reason(monkeypatch, tmp_path):
    texts = [SHORT, SHORT, (SHORT, "length"), "wrong", MIXED, CODE, LONG, BROKEN, "odd 7 ."]
    kept, accounting = sample(monkeypatch, tmp_path, [texts, [SHORT, GOOD.format(n="so 8")]])
    assert accounting["dropped"] == {
        "duplicate": 1, "cut off": 1, "wrong": 1, "mixed language": 1, "code block": 1,
        "long paragraph": 1, "format": 1, "unparseable": 1,
    }  # fmt: skip
    assert [e.id for e in kept] == ["p0/1", "p1/1", "p1/2"]
    assert (accounting["sampled"], accounting["kept"], accounting["problems_kept"]) == (11, 3, 2)
    assert accounting["kept"] + sum(accounting["dropped"].values()) == accounting["sampled"]
    stored = load_examples(tmp_path / "sampled.jsonl")
    assert [(e.id, e.completion, e.meta["answer"]) for e in stored] == [
        (e.id, e.completion, "8") for e in kept
    ]


def test_switches(monkeypatch, tmp_path):
    texts = [[SHORT, GOOD.format(n="so 8")], [SHORT, SHORT, MIXED, CODE, LONG, BROKEN]]
    _, accounting = sample(monkeypatch, tmp_path, texts, "--sample.max_kept=1")
    assert accounting["kept"] == 2
    assert accounting["dropped"]["enough kept"] == 1
    _, accounting = sample(
        monkeypatch, tmp_path, texts, "--sample.drop_duplicates=false",
        "--sample.min_language_share=0", "--sample.drop_code_blocks=false",
        "--sample.max_paragraph_words=0", "--sample.require_format=false",
    )  # fmt: skip
    assert accounting["dropped"] == {}
    assert accounting["kept"] == 8


def test_nothing_kept_says_why(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"kept none of 2 completions: {'wrong': 2}"):
        sample(monkeypatch, tmp_path, [["wrong", "wrong wrong"]])
    with pytest.raises(
        ValueError, match=r"may be that next to none .* --template.protocol=think r"
    ):
        sample(monkeypatch, tmp_path, [["<think> wrong </think> 8"] * 2])


def test_the_judge_is_asked_for_all_that_rules_cannot_read_at_once(monkeypatch, tmp_path):
    calls = []

    class Judge:
        def __init__(self, chat):
            assert (chat.url, chat.model) == ("http://x/v1/chat/completions", "m")
            self.counts = Counter(requests=2)

        def judge_all(self, rows):
            calls.append(rows)
            return ["correct" if "8" in answer else "wrong" for _, _, answer in rows]

    monkeypatch.setattr(rejection, "Judge", Judge)
    odd = "<think> so odd </think> <answer> {} </answer>"
    texts = [
        [odd.format(8), odd.format(7), SHORT],
        [odd.format("eight-8"), (odd.format(8), "length")],
    ]
    kept, accounting = sample(
        monkeypatch, tmp_path, texts, "--sample.judge_url=http://x", "--sample.judge_model=m"
    )
    assert calls == [[("3 + 5", "8", "8"), ("3 + 5", "8", "7"), ("3 + 5", "8", "eight-8")]]
    assert accounting["judge"] == {"requests": 2}
    assert accounting["dropped"] == {"wrong": 1, "cut off": 1}
    assert len(kept) == 3


def test_a_prompt_that_opens_the_thought(monkeypatch, tmp_path):
    """The kept text is whole: the model that learns it may have another template."""
    scorer = Scorer()
    scorer.prompt_opens_think = True
    kept, accounting = sample(
        monkeypatch, tmp_path, [[SHORT.removeprefix("<think>"), BROKEN]], scorer=scorer
    )
    assert [e.completion for e in kept] == [SHORT]
    assert accounting["dropped"] == {"format": 1}


def test_general_examples_in_the_pattern(tmp_path):
    path = tmp_path / "general.jsonl"
    whole = "<think> kind </think> <answer> Hi! </answer>"
    write_jsonl(path, [
        {"prompt": "hello", "completion": "Hi!"},
        {"prompt": "hello there", "completion": whole},
        {"messages": [{"role": "system", "content": "Be kind."},
                      {"role": "user", "content": "thanks"},
                      {"role": "assistant", "content": "Welcome"}]},
    ])  # fmt: skip
    config = tiny_config(f"--data.general={path}", "--data.language=de")
    examples = general_examples(path, config)
    assert [e.completion for e in examples] == [
        "<think> </think> <answer> Hi! </answer>", whole,
        "<think> </think> <answer> Welcome </answer>",
    ]  # fmt: skip
    assert {(e.kind, e.language) for e in examples} == {("general", "de")}
    assert examples[2].meta["system"] == "Be kind."


def test_general_prompts_without_replies_serve_rl_only(tmp_path, capsys):
    path = tmp_path / "general.jsonl"
    write_jsonl(path, [{"prompt": "Write a poem"}, {"prompt": "hello"}])
    assert general_examples(path, tiny_config()) == []
    assert "prompts only: no general examples for SFT" in " ".join(capsys.readouterr().out.split())
    write_jsonl(path, [{"prompt": "hello", "completion": "Hi!"}, {"prompt": "Write a poem"}])
    with pytest.raises(ValueError, match=r"general.jsonl:2: no 'completion'"):
        general_examples(path, tiny_config())


def test_a_chain_of_thought_is_asked_for_longer_queries(tmp_path, monkeypatch):
    path = tmp_path / "general.jsonl"
    write_jsonl(path, [
        {"id": "a", "prompt": "hello", "completion": "Hi!"},
        {"id": "b", "prompt": "why is the sky so blue", "completion": "Light scatters."},
        {"id": "c", "prompt": "why is the sea so blue", "completion": "Water absorbs red."},
    ])  # fmt: skip
    config = tiny_config("--sample.general_cot=true")
    with pytest.raises(ValueError, match="general_cot needs a model"):
        general_examples(path, config)
    asked = []

    def sample_groups(policy, problems, config, sampling, num, purpose):
        asked.extend(problems)
        texts = [" Short waves scatter more. ", "I </think> forget"]
        return [RolloutGroup(p, [1], [completion(t)]) for p, t in zip(problems, texts, strict=True)]

    monkeypatch.setattr(rejection, "sample_groups", sample_groups)
    policy = SimpleNamespace(tokenizer=None)
    examples = general_examples(path, config, policy)
    assert [p.prompt.splitlines()[0] for p in asked] == [
        "why is the sky so blue", "why is the sea so blue"
    ]  # fmt: skip
    assert "Light scatters." in asked[0].prompt
    assert [e.completion for e in examples] == [
        "<think> </think> <answer> Hi! </answer>",
        "<think> Short waves scatter more. </think> <answer> Light scatters. </answer>",
        "<think> </think> <answer> Water absorbs red. </answer>",  # a tag in it: not usable
    ]


def test_mix_is_a_shuffle_by_the_seed():
    some = [Example(str(i), "x", id=str(i)) for i in range(20)]
    one, again, other = mix(some[:12], some[12:], 0), mix(some[:12], some[12:], 0), mix(some, [], 1)
    assert one == again != other
    assert sorted(e.id for e in one) == sorted(e.id for e in some)


def test_written_examples_are_read_back(tmp_path):
    examples = [
        Example("a", "b", id="1", problem_id="p", kind="general", language="de", meta={"k": 1})
    ]
    write_examples(tmp_path / "x" / "e.jsonl", examples)
    assert load_examples(tmp_path / "x" / "e.jsonl") == examples


def test_a_request_for_reasoning_leaves_braces_in_the_prompt_alone():
    text = rejection._cot_request("What is {answer}?", "a {prompt}")
    assert text.startswith("What is {answer}?\n\nA good answer is:\na {prompt}\n")


def test_an_unknown_token_is_dropped(monkeypatch, tmp_path):
    groups = [RolloutGroup(Problem("3 + 5", "8", "p"), [1], [completion(SHORT), completion(LONG)])]
    groups[0].completions[1].token_ids = [1, 5]
    monkeypatch.setattr(rejection, "sample_groups", lambda *args, **kwargs: groups)
    for eos_ids, dropped in (([6], {"unknown token": 1}), ([5, 6], {})):
        policy = SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=5), eos_ids=eos_ids)
        config = tiny_config(LEXICON, "--sample.max_kept=0")
        rejection_sample(policy, [groups[0].problem], config, Scorer(), tmp_path)
        assert json.loads((tmp_path / "accounting.json").read_text())["dropped"] == dropped
