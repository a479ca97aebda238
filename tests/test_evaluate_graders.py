"""What each kind of problem is graded by in an evaluation, and that stored samples can be graded again."""

import json
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.data import read_jsonl
from r1fast.evaluate.grader_version import SOURCES, version_of
from r1fast.evaluate.presets import find_preset, word
from r1fast.evaluate.rescore import rescore
from r1fast.evaluate.run import final_row, grader_version, store
from r1fast.evaluate.scorer import KINDS, EvalScorer
from r1fast.evaluate.statistics import summarise
from r1fast.rewards.math import MathReward
from r1fast.rewards.score import RewardScorer
from r1fast.types import Completion, Problem, RolloutGroup

THINK = TemplateConfig(name="chat", protocol="think")


def scorer(kind: str, template: TemplateConfig = THINK, **graders) -> EvalScorer:
    rules = RewardScorer(RewardConfig(), template, 64, grader=MathReward(symbolic=False))
    return EvalScorer(rules, kind, **graders)


def group(problem: Problem, *texts: str) -> RolloutGroup:
    return RolloutGroup(problem, [1], [Completion([1, 2, 3], [], "stop", text) for text in texts])


def graded(of: EvalScorer, problem: Problem, *texts: str) -> list:
    """The rewards of these responses."""
    found = group(problem, *texts)
    with of:
        of.score([found])
    return found.rewards


def test_choice():
    problem = Problem("?", "B", "p", "choice", meta={"choices": ["1", "2", "3"]})
    rewards = graded(
        scorer("choice"), problem,
        "<think>\nx\n</think>\n\nAnswer: B", "<think>\nB\n</think>\n\nAnswer: C", "Answer: B or C", "<think>B",
    )  # fmt: skip
    assert [r.verdict for r in rewards] == ["correct", "wrong", "wrong", "no_answer"]
    assert [r.answer for r in rewards] == ["B", "C", None, None]
    assert [r.parts["format"] for r in rewards] == [1, 1, 0, 0]


def test_instructions_look_at_the_answer_alone():
    meta = {"instructions": ["en:punctuation:no_comma", "length_constraints:number_words"],
            "arguments": [{}, {"relation": "at least", "num_words": 3}]}  # fmt: skip
    problem = Problem("?", None, "p", "if", meta=meta)
    rewards = graded(
        scorer("if"), problem,
        "<think>\na, b\n</think>\n\none two three", "<think>\nab\n</think>\n\none, two three", "<think>one two three",
        "Sure, here:\none two three",
    )  # fmt: skip
    assert [r.verdict for r in rewards] == ["correct", "wrong", "no_answer", "wrong"]
    assert rewards[1].detail == {
        "instructions": ["punctuation:no_comma", "length_constraints:number_words"],
        "followed": [False, True],
        "followed_loosely": [False, True],
    }
    assert rewards[1].answer == "missed: punctuation:no_comma"
    assert rewards[2].detail["followed"] == [False, False]
    assert rewards[3].detail["followed_loosely"] == [True, True]
    r1_zero = TemplateConfig()
    (reward,) = graded(
        scorer("if", r1_zero), problem, "<think> , </think> <answer> one two three </answer>"
    )
    assert reward.verdict == "correct"


def test_answers_that_a_judge_compares_with_the_gold():
    asked = []

    def judge(rows):
        asked.extend(rows)
        return [
            "correct" if gold in answer else "error" if "?" in answer else "wrong"
            for _, gold, answer in rows
        ]

    problem = find_preset("simpleqa")
    one = Problem(
        word(Problem("Who?", "Ada"), problem.wording), "Ada", "p", "qa", meta={"question": "Who?"}
    )
    rewards = graded(
        scorer("qa", judge=judge), one,
        "<think>\nBob\n</think>\n\nIt was Ada.", "<think>\nAda\n</think>\n\nBob", "<think>Ada", "x</think> Who?",
    )  # fmt: skip
    assert [r.verdict for r in rewards] == ["correct", "wrong", "no_answer", "error"]
    assert asked[0] == (
        "Who?",
        "Ada",
        "It was Ada.",
    )  # the question as the set has it, the summary alone
    assert len(asked) == 3
    with pytest.raises(ValueError, match="kind qa need a judge"):
        graded(scorer("qa"), one, "x")


def test_open_answers_are_compared_by_their_summaries():
    asked = []

    def compare(rows):
        asked.extend(rows)
        return [{"good": "a", "same": "tie", "bad": "b"}.get(a, "error") for _, a, _ in rows]

    problem = Problem(
        "Say hi.", None, "p", "open", meta={"baseline": "Hello!", "question": "Say hi."}
    )
    texts = [
        f"<think>\nlong thought\n</think>\n\n{text}" for text in ("good", "same", "bad", "odd")
    ]
    rewards = graded(scorer("open", compare=compare), problem, *texts, "<think>never ends")
    assert [r.detail["outcome"] for r in rewards] == ["win", "tie", "loss", "error", "loss"]
    assert [r.detail["score"] for r in rewards] == [1.0, 0.5, 0.0, None, 0.0]
    assert [r.verdict for r in rewards] == ["correct", "wrong", "wrong", "error", "no_answer"]
    assert asked == [("Say hi.", text, "Hello!") for text in ("good", "same", "bad", "odd")]
    assert (rewards[0].detail["summary_chars"], rewards[0].detail["baseline_chars"]) == (4, 6)
    with pytest.raises(ValueError, match="kind open need a judge"):
        graded(scorer("open"), problem, "x")


class FakeCode:
    """Stands in for rewards.code.CodeReward: a program is right where it says so."""

    info = None

    def problem(self, columns, prompt=""):
        return columns, prompt

    def submit(self, problem, text, protocol, special_token, *, prompt_opens_think):
        self.seen = problem, protocol
        done: Future = Future()
        right = "right" in text
        done.set_result(
            SimpleNamespace(
                verdict="correct" if right else "wrong",
                answer=text[-5:],
                share=0.5 + right / 2,
                why="w",
            )
        )
        return done

    def close(self):
        pass


def test_programs_go_to_the_rules_own_grader():
    meta = {"code_prompt": "def f():\n", "test": "t", "entry_point": "f"}
    problem = Problem("Complete it", None, "p", "code", meta=meta)
    of = scorer("code")
    of.rules.code = FakeCode()
    rewards = graded(of, problem, "right", "false")
    assert [(r.verdict, r.answer, r.detail) for r in rewards] == [
        ("correct", "right", {"share": 1.0, "why": "w"}), ("wrong", "false", {"share": 0.5, "why": "w"}),
    ]  # fmt: skip
    assert of.rules.code.seen == (
        (meta, "def f():\n"),
        "think",
    )  # the function's own head, not our wording


def test_kinds_may_be_mixed():
    choice = group(Problem("?", "A", "c", "choice", meta={"choices": ["1", "2"]}), "Answer: A")
    maths = group(Problem("?", "1/2", "m"), r"\boxed{0.5}", r"\boxed{2}")
    free = group(Problem("?", None, "g", "general"), "hi")
    with scorer("math") as of:
        of.score([choice, maths, free])
    verdicts = [r.verdict for g in (choice, maths, free) for r in g.rewards]
    assert verdicts == ["correct", "correct", "wrong", None]
    with pytest.raises(ValueError, match="kind must be one of math, general, choice"):
        scorer("maths")


def test_versions_change_with_the_code_that_decides(tmp_path, monkeypatch):
    versions = {kind: version_of(kind) for kind in KINDS if kind != "general"}
    assert len(set(versions.values())) == len(versions)
    assert all(v.startswith(f"{kind}-") for kind, v in versions.items())
    assert version_of("choice") == versions["choice"]
    assert version_of("qa", "judge-7b") == f"{versions['qa']} judge-7b"
    from r1fast.evaluate import grader_version as module

    package = tmp_path / "r1fast"
    for name in SOURCES["choice"]:
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(module, "__file__", str(package / "evaluate" / "grader_version.py"))
    before = version_of("choice")
    (package / "rewards" / "choice.py").write_text("two")
    assert version_of("choice") != before
    with scorer("math") as of:
        assert grader_version(of) == of.version
        assert grader_version(of.rules).startswith("rules-")
    assert grader_version(SimpleNamespace()) == ""


def evaluated(folder, of: EvalScorer, *groups: RolloutGroup) -> dict:
    """A run folder as `evaluate` leaves it."""
    with of:
        of.score(list(groups))
        rows = [
            final_row(g.problem, {"sample": j, "seed": j, "prompt_hash": "h", "text": c.text,
                                  "finish_reason": c.finish_reason, "num_tokens": 3}, reward, of.version)
            for g in groups for j, (c, reward) in enumerate(zip(g.completions, g.rewards, strict=True))
        ]  # fmt: skip
        result = summarise(rows, of.grader.equivalent) | {
            "temperature": 0.6,
            "top_p": 0.95,
            "seed": 0,
        }
    setup = {"temperature": 0.6, "top_p": 0.95, "seed": 0, "grader": of.version}
    store(folder, rows, result, [g.problem for g in groups], setup)
    return setup


def test_rescoring_changes_what_the_grader_says_otherwise(tmp_path):
    first = group(Problem("1/2?", "1/2", "m1", subset="s"), r"\boxed{0.5}", r"\boxed{3}")
    second = group(Problem("3?", "3", "m2", subset="s"), r"\boxed{3}", "none")
    setup = evaluated(tmp_path, scorer("math"), first, second)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with scorer("math") as of:
        told = rescore(tmp_path, of, setup)
    assert (told["num_changed"], told["moves"]) == (0, {})
    assert (tmp_path / "samples.jsonl").read_bytes() == before  # the same grader, the same file

    class Strict(EvalScorer):
        """Only the text of the gold is right."""

        def score(self, groups):
            super().score(groups)
            for g in groups:
                for reward in g.rewards:
                    if reward.answer != g.problem.answer and reward.verdict == "correct":
                        reward.verdict = "wrong"

    strict = Strict(scorer("math").rules, "math", judge_name="strict")
    with strict:
        told = rescore(tmp_path, strict, setup)
    assert told["moves"] == {"correct -> wrong": 1}
    assert told["changed"] == [{
        "problem_id": "m1", "sample": 0, "before": "correct", "after": "wrong",
        "extracted_before": "0.5", "extracted_after": "0.5",
    }]  # fmt: skip
    assert (told["eval_before"]["pass@1"], told["grader_before"]) == (0.5, setup["grader"])
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert {row["grader"] for row in rows} == {strict.version}
    assert json.loads((tmp_path / "eval.json").read_text())["pass@1"] == 0.25
    assert json.loads((tmp_path / "evaluation.json").read_text())["grader"] == strict.version
    assert json.loads((tmp_path / "rescored.json").read_text()) == told


def test_rescoring_needs_to_know_what_was_asked(tmp_path):
    setup = evaluated(tmp_path, scorer("math"), group(Problem("3?", "3", "m"), r"\boxed{3}"))
    problem = replace(Problem("3?", "3", "m"), id="other")
    store(tmp_path / "x", [], {}, [problem], setup)
    (tmp_path / "problems.jsonl").write_text("")
    with scorer("math") as of, pytest.raises(ValueError, match=r"that problems.jsonl lacks: m"):
        rescore(tmp_path, of, setup)
    (tmp_path / "problems.jsonl").unlink()
    with scorer("math") as of, pytest.raises(ValueError, match=r"has no problems.jsonl"):
        rescore(tmp_path, of, setup)
