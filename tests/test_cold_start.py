"""Cold-start collection: the three ways of asking, what is kept, and a person's edit read back."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from r1fast import cold_start
from r1fast.cold_start import clean, collect, read_back
from r1fast.examples import load_examples
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.types import Completion, Problem, Reward, RolloutGroup

PROBLEMS = [Problem("3 + 5", "8", "p0"), Problem("2 + 2", "4", "p1")]
GOOD = "<think> so 3 + 5 is 8 </think> <answer> 8 </answer>"
LEXICON = "--rewards.lexicon={en = ['is', 'so'], zh = ['shi', 'suoyi']}"


class Scorer:
    """Correct where the gold answer stands in the answer tag."""

    prompt_opens_think = False

    def score(self, groups):
        for group in groups:
            gold = group.problem.answer
            group.rewards = [
                Reward(0.0, {}, "correct" if f"> {gold} <" in c.text else "wrong", answer=gold)
                for c in group.completions
            ]


class Model:
    """Stands in for sample_groups: notes what was asked and answers from a list."""

    def __init__(self, monkeypatch, *texts: str):
        self.texts, self.asked = texts, {}
        monkeypatch.setattr(cold_start, "sample_groups", self.sample)

    def sample(self, policy, problems, config, sampling, num, *, purpose, title):
        self.asked[purpose] = (policy, [p.prompt for p in problems], num)
        return [
            RolloutGroup(p, [1], [Completion([1], [0.0], "stop", t) for t in self.texts])
            for p in problems
        ]


def config_of(*overrides):
    """Written in the cold-start pattern."""
    return tiny_config(LEXICON, "--template.protocol=cold_start", *overrides)


ASKED = tiny_config(LEXICON)  # read by the tags of R1-Zero


def run(tmp_path, methods, *overrides, problems=PROBLEMS):
    config = config_of(f"--cold_start.methods={methods}", *overrides)
    return collect(
        {m: f"model of {m}" for m in methods},
        problems,
        dict.fromkeys(methods, ASKED),
        {m: Scorer() for m in methods},
        config,
        tmp_path,
    )


def test_samples_of_r1_zero_are_rewritten_in_the_pattern(monkeypatch, tmp_path):
    model = Model(monkeypatch, GOOD, "<think> no </think> <answer> 4 </answer>")
    examples = run(tmp_path, ["r1_zero"])
    assert model.asked == {"cold_start/r1_zero": ("model of r1_zero", ["3 + 5", "2 + 2"], 4)}
    assert [(e.id, e.prompt, e.completion) for e in examples] == [
        ("p0/r1_zero", "3 + 5",
         "|special_token| so 3 + 5 is 8 |special_token| The answer is \\boxed{8}."),
        ("p1/r1_zero", "2 + 2", "|special_token| no |special_token| The answer is \\boxed{4}."),
    ]  # fmt: skip
    accounting = json.loads((tmp_path / "accounting.json").read_text())
    assert accounting == {
        "sampled": 4, "kept": 2, "dropped": {"wrong": 2}, "methods": {"r1_zero": 2},
    }  # fmt: skip
    both = [(tmp_path / n).read_text() for n in ("collected.jsonl", "cold_start.jsonl")]
    assert both[0] == both[1]


def test_few_shot_shows_examples_and_cuts_what_follows(monkeypatch, tmp_path):
    shots = tmp_path / "shots.jsonl"
    write_jsonl(shots, [{"prompt": f"q{i}", "completion": f"long thought {i}"} for i in range(3)])
    model = Model(monkeypatch, GOOD + "\n\n###\n\n9 + 9\n<think> and on", "wrong")
    examples = run(
        tmp_path, ["few_shot"], f"--cold_start.few_shot_file={shots}", "--cold_start.num_few_shot=2"
    )
    _, (first, _), _ = model.asked["cold_start/few_shot"]
    assert first == "q0\nlong thought 0\n\n###\n\nq1\nlong thought 1\n\n###\n\n3 + 5\n"
    (example,) = examples
    assert example.prompt == "3 + 5"  # the wording is not learned
    assert example.completion.startswith("|special_token| so 3 + 5 is 8 |special_token|")
    with pytest.raises(ValueError, match=r"few_shot, but cold_start\.few_shot_file is empty"):
        run(tmp_path, ["few_shot"])


def test_reflection_asks_for_it(monkeypatch, tmp_path):
    model = Model(monkeypatch, GOOD)
    (example,) = run(tmp_path, ["reflection"])
    _, (first, second), _ = model.asked["cold_start/reflection"]
    assert first.startswith("3 + 5\n\nReason in detail: reflect on every step and verify")
    assert second.startswith("2 + 2\n\n")
    assert example.prompt == "3 + 5"


def test_several_methods_and_a_limit(monkeypatch, tmp_path):
    Model(monkeypatch, GOOD, GOOD.replace("8 <", "4 <"))
    examples = run(tmp_path, ["r1_zero", "reflection"], "--cold_start.max_kept=3")
    assert [e.id for e in examples] == ["p0/r1_zero", "p1/r1_zero", "p0/reflection"]
    accounting = json.loads((tmp_path / "accounting.json").read_text())
    assert accounting["methods"] == {"r1_zero": 2, "reflection": 2}
    assert accounting["dropped"] == {"wrong": 4, "enough kept": 1}
    assert accounting["sampled"] == accounting["kept"] + sum(accounting["dropped"].values()) == 8


def test_an_edited_file_is_not_written_over(monkeypatch, tmp_path):
    Model(monkeypatch, GOOD)
    run(tmp_path, ["r1_zero"])
    (tmp_path / "cold_start.jsonl").write_text("mine")
    run(tmp_path, ["r1_zero"])
    assert (tmp_path / "cold_start.jsonl").read_text() == "mine"


def test_nothing_kept_says_why(monkeypatch, tmp_path):
    Model(monkeypatch, "wrong")
    with pytest.raises(ValueError, match=r"kept none of 2 samples: {'wrong': 2}"):
        run(tmp_path, ["r1_zero"])
    Model(monkeypatch, GOOD)
    assert run(tmp_path, ["r1_zero"]) == load_examples(tmp_path / "cold_start.jsonl")


def cleaned(*texts, opens=False, overrides=()):
    group = RolloutGroup(
        PROBLEMS[0], [1], [Completion([1], [0.0], "stop", t) for t in texts]
    )  # fmt: skip
    Scorer().score([group])
    return clean([group], ASKED, config_of(*overrides), "r1_zero", prompt_opens_think=opens)


def test_what_is_dropped_and_which_is_best():
    texts = [
        "<think> shi suoyi </think> <answer> 8 </answer>",
        "<think> so it is </think> <answer> 8 </answer>",
        "<think> so it is so is it </think> <answer> 8 </answer>",
        "<think> </think> <answer> 8 </answer>",
        "<think> so |special_token| </think> <answer> 8 </answer>",
        "so <answer> 8 </answer>",
        "<think> is </think> <answer> 9 </answer>",
    ]
    kept, dropped = cleaned(*texts)
    assert [e.completion.split("|special_token|")[1].strip() for e in kept] == ["so it is so is it"]
    assert dropped == Counter({
        "another was better": 2, "format": 2, "no reasoning": 1, "wrong": 1,
    })  # fmt: skip
    _, dropped = cleaned(*texts, overrides=("--cold_start.min_language_share=0.5",))
    assert dropped["mixed language"] == 1


def test_a_prompt_that_opens_the_thought():
    text = GOOD.removeprefix("<think>")
    assert cleaned(text)[1] == {"format": 1}
    kept, dropped = cleaned(text, opens=True)
    assert not dropped
    assert kept[0].completion.startswith("|special_token| so 3 + 5 is 8 |special_token|")


def test_a_persons_edit_is_counted(tmp_path):
    rows = [{"id": f"e{i}", "prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    write_jsonl(tmp_path / "collected.jsonl", rows)
    edited = [dict(r) for r in rows]
    edited[0]["completion"] = "better"
    edited[1]["keep"] = False
    del edited[2]
    edited.append({"id": "mine", "prompt": "q", "completion": "a"})
    write_jsonl(tmp_path / "edited.jsonl", edited)
    kept, counts = read_back(tmp_path / "collected.jsonl", tmp_path / "edited.jsonl")
    assert counts == {"kept_by_hand": 2, "edited": 1, "rejected": 2, "added": 1}
    assert [e.id for e in kept] == ["e0", "e3", "e4", "mine"]
    assert kept[0].completion == "better"
    _, counts = read_back(tmp_path / "collected.jsonl", tmp_path / "collected.jsonl")
    assert counts == {"kept_by_hand": 5, "edited": 0, "rejected": 0, "added": 0}
    write_jsonl(tmp_path / "edited.jsonl", [r | {"keep": False} for r in rows])
    with pytest.raises(ValueError, match=r"edited\.jsonl keeps no example"):
        read_back(tmp_path / "collected.jsonl", tmp_path / "edited.jsonl")
    (tmp_path / "edited.jsonl").write_text('{"id": "e0", "prompt": "q0"}\n')
    with pytest.raises(ValueError, match=r"edited\.jsonl:1: an example needs"):
        read_back(tmp_path / "collected.jsonl", tmp_path / "edited.jsonl")


def test_the_examples_are_read_back_as_they_were(monkeypatch, tmp_path):
    Model(monkeypatch, GOOD)
    examples = run(tmp_path, ["r1_zero"])
    assert load_examples(tmp_path / "cold_start.jsonl") == examples
    (row,) = [row for _, row in read_jsonl(tmp_path / "cold_start.jsonl")]
    assert (row["answer"], row["method"]) == ("8", "r1_zero")


def test_few_shot_and_reflection_ask_a_real_model(tmp_path, monkeypatch):
    """Through the engine, with a tiny random policy; the stub scorer finds every answer right."""
    from tiny import tiny_policy

    class Right(Scorer):
        def score(self, groups):
            super().score(groups)
            for group in groups:
                for c, reward in zip(group.completions, group.rewards, strict=True):
                    c.text, reward.verdict = GOOD, "correct"

    shots = tmp_path / "shots.jsonl"
    write_jsonl(shots, [{"prompt": "q", "completion": "a"}])
    methods = ["few_shot", "reflection"]
    config = config_of(f"--cold_start.methods={methods}", f"--cold_start.few_shot_file={shots}",
                       "--cold_start.num_samples=2")  # fmt: skip
    asked = tiny_config(LEXICON, "--rollout.max_prompt_tokens=200")
    policy = tiny_policy(max_position_embeddings=512)
    examples = collect(
        dict.fromkeys(methods, policy),
        PROBLEMS,
        dict.fromkeys(methods, asked),
        dict.fromkeys(methods, Right()),
        config,
        tmp_path,
    )
    assert [e.id for e in examples] == [
        "p0/few_shot", "p1/few_shot", "p0/reflection", "p1/reflection"
    ]  # fmt: skip


def test_the_pipeline_picks_the_model_and_the_tags_of_each_method(tmp_path, monkeypatch):
    from r1fast import recipe as module
    from r1fast.pipeline import Pipeline

    seen = {}
    monkeypatch.setattr(
        module.cold_start, "collect", lambda policies, problems, asked, scorers, config, folder:
        seen.update(policies=policies, asked=asked)
    )  # fmt: skip
    config = config_of(
        "--data.task=running_sum",
        f"--output_dir={tmp_path}",
        "--cold_start.methods=['r1_zero', 'few_shot', 'reflection']",
        "--stages.r1_zero.template.protocol=think",
    )
    runner = Pipeline(config)
    monkeypatch.setattr(Pipeline, "policy", lambda self, name: SimpleNamespace(
        name=name, tokenizer=None))  # fmt: skip
    module._collect(runner, config, tmp_path)
    assert {m: p.name for m, p in seen["policies"].items()} == {
        "r1_zero": "r1_zero", "few_shot": "base", "reflection": "base"
    }  # fmt: skip
    assert {m: c.template.protocol for m, c in seen["asked"].items()} == {
        "r1_zero": "think", "few_shot": "cold_start", "reflection": "think_answer"
    }  # fmt: skip
