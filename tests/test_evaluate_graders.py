"""What each kind of problem is graded by in an evaluation, and that stored samples can be graded again."""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1fast.config import RewardConfig, TemplateConfig
from r1fast.evaluate import grader_version as module
from r1fast.evaluate.grader_version import SOURCES, version_of
from r1fast.evaluate.presets import find_preset, word
from r1fast.evaluate.rescore import rescore
from r1fast.evaluate.run import grader_versions, store
from r1fast.evaluate.sample_rows import final_row
from r1fast.evaluate.statistics import summarise
from r1fast.jsonl import read_jsonl
from r1fast.rewards.chat import ChatModel
from r1fast.rewards.code import GradedCode
from r1fast.rewards.judge import Judge
from r1fast.rewards.math import MathReward
from r1fast.rewards.pairwise import PairwiseJudge
from r1fast.rewards.score import RewardScorer
from r1fast.types import KINDS, Completion, Problem, RolloutGroup

THINK = TemplateConfig(name="chat", protocol="think")


def scorer(template: TemplateConfig = THINK, **graders) -> RewardScorer:
    return RewardScorer(RewardConfig(), template, 64, grader=MathReward(symbolic=False), **graders)


class Chat(ChatModel):
    """A chat model that says of each request what `says` makes of the texts to compare."""

    def __init__(self, says: Callable[[str], str], name: str = "chat"):
        super().__init__(name)
        self.says, self.asked = says, []

    def _ask(self, requests, read):
        self.asked += requests
        self._count(requests=len(requests))
        return [read(self.says(request.user)) for request in requests]


def group(problem: Problem, *texts: str) -> RolloutGroup:
    return RolloutGroup(problem, [1], [Completion([1, 2, 3], [], "stop", text) for text in texts])


def graded(of: RewardScorer, problem: Problem, *texts: str) -> list:
    """The rewards of these responses."""
    found = group(problem, *texts)
    with of:
        of.score([found])
    return found.rewards


def test_choice():
    problem = Problem("?", "B", "p", "choice", meta={"choices": ["1", "2", "3"]})
    rewards = graded(
        scorer(), problem,
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
        scorer(), problem,
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
        scorer(r1_zero), problem, "<think> , </think> <answer> one two three </answer>"
    )
    assert reward.verdict == "correct"


def test_answers_that_a_judge_compares_with_the_gold():
    def says(user):
        answer = user.partition("Candidate's answer:")[2]
        verdict = "correct" if "Ada" in answer else "?" if "odd" in answer else "wrong"
        return json.dumps({"verdict": verdict})

    chat = Chat(says)
    preset = find_preset("simpleqa")
    prompt = word(Problem("Who?", "Ada"), preset.wording)
    one = Problem(prompt, "Ada", "p", "qa", meta={"question": "Who?"})
    rewards = graded(
        scorer(judge=Judge(chat)), one,
        "<think>\nBob\n</think>\n\nIt was Ada.", "<think>\nAda\n</think>\n\nBob", "<think>Ada", "x</think> odd",
    )  # fmt: skip
    assert [r.verdict for r in rewards] == ["correct", "wrong", "no_answer", "error"]
    assert [r.parts["accuracy"] for r in rewards] == [1.0, 0.0, 0.0, None]
    # the question as the set has it, the summary alone
    assert "Question:\nWho?\n" in chat.asked[0].user
    assert len(chat.asked) == 3
    with pytest.raises(ValueError, match="kind qa, which a judge decides"):
        graded(scorer(), one, "x")


def by_content(user: str) -> str:
    """Prefers "good" to anything, anything to "bad", wherever it stands; "odd" is not understood."""
    a, b = user.partition("Response B:")[::2]
    worth = ["good" in a or "bad" in b, "good" in b or "bad" in a]
    if "odd" in user:
        return "no idea"
    verdict = "A=B" if worth[0] == worth[1] else "A>>B" if worth[0] else "B>>A"
    return json.dumps({"reason": "", "verdict": verdict})


def test_open_answers_are_compared_by_their_summaries():
    chat = Chat(by_content)
    problem = Problem(
        "Say hi.", None, "p", "open", meta={"baseline": "Hello!", "question": "Say hi."}
    )
    texts = [
        f"<think>\nlong thought\n</think>\n\n{text}"
        for text in ("good", "same", "bad", "odd", "Hello!")
    ]
    rewards = graded(scorer(pairwise=PairwiseJudge(chat)), problem, *texts, "<think>never ends")
    assert [r.detail["outcome"] for r in rewards] == ["win", "tie", "loss", "error", "tie", "loss"]
    assert [r.detail["score"] for r in rewards] == [1.0, 0.5, 0.0, None, 0.5, 0.0]
    assert [r.parts["accuracy"] for r in rewards] == [1.0, 0.5, 0.0, None, 0.5, 0.0]
    assert [r.verdict for r in rewards] == [
        "correct", "wrong", "wrong", "error", "wrong", "no_answer",
    ]  # fmt: skip
    assert [r.detail["grades"] for r in rewards] == [
        [2, 2], [0, 0], [-2, -2], [None, None], None, None,
    ]  # fmt: skip
    assert len(chat.asked) == 8  # equal and missing answers need no judge
    assert "long thought" not in "".join(request.user for request in chat.asked)
    assert (rewards[0].detail["summary_chars"], rewards[0].detail["baseline_chars"]) == (4, 6)
    with pytest.raises(ValueError, match="kind open, which a judge decides"):
        graded(scorer(), problem, "x")


class FakeCode:
    """Stands in for rewards.code.CodeReward: a program is right where it says so."""

    info, partial = None, False

    def problem(self, columns, prompt=""):
        return columns, prompt

    def submit(self, problem, text, protocol, special_token, *, prompt_opens_think):
        self.seen = problem, protocol
        done: Future = Future()
        right = "right" in text
        verdict = "correct" if right else "wrong"
        done.set_result(GradedCode(verdict, text[-5:], 0.5 + right / 2, "w"))
        return done

    def close(self):
        pass


def test_programs_go_to_the_rules_own_grader():
    meta = {"code_prompt": "def f():\n", "test": "t", "entry_point": "f"}
    problem = Problem("Complete it", None, "p", "code", meta=meta)
    of = scorer()
    of.code = FakeCode()
    rewards = graded(of, problem, "right", "false")
    assert [(r.verdict, r.answer, r.detail) for r in rewards] == [
        ("correct", "right", {"share": 1.0, "why": "w"}), ("wrong", "false", {"share": 0.5, "why": "w"}),
    ]  # fmt: skip
    assert of.code.seen == (
        (meta, "def f():\n"),
        "think",
    )  # the function's own head, not our wording


def test_kinds_may_be_mixed():
    choice = group(Problem("?", "A", "c", "choice", meta={"choices": ["1", "2"]}), "Answer: A")
    maths = group(Problem("?", "1/2", "m"), r"\boxed{0.5}", r"\boxed{2}")
    free = group(Problem("?", None, "g", "general"), "hi")
    with scorer() as of:
        of.score([choice, maths, free])
    verdicts = [r.verdict for g in (choice, maths, free) for r in g.rewards]
    assert verdicts == ["correct", "correct", "wrong", None]


def test_versions_change_with_the_code_that_decides(tmp_path, monkeypatch):
    versions = {kind: version_of(kind) for kind in KINDS if kind != "general"}
    assert versions.keys() == SOURCES.keys()
    assert len(set(versions.values())) == len(versions)
    assert all(v.startswith(f"{kind}-") for kind, v in versions.items())
    assert version_of("choice", "judge-7b") == versions["choice"]
    assert version_of("qa", "judge-7b") == f"{versions['qa']} judge-7b"
    assert version_of("general") == ""
    for name in SOURCES["choice"]:
        path = tmp_path / "r1fast" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "r1fast/evaluate/grader_version.py"))
    before = version_of("choice")
    (tmp_path / "r1fast/rewards/choice.py").write_text("two")
    assert version_of("choice") != before


def test_rows_are_marked_by_their_own_kind():
    chat = Chat(by_content, "judge-7b")
    with scorer(judge=Judge(chat), pairwise=PairwiseJudge(chat)) as of:
        assert grader_versions(of, ("math", "qa", "math", "general")) == {
            "general": "", "math": version_of("math"), "qa": version_of("qa", "judge-7b"),
        }  # fmt: skip
    assert grader_versions(SimpleNamespace(), ["math"]) == {"math": ""}


NO_VERDICT = {  # of rewards/: what pays or sorts, and decides on no verdict
    "__init__", "filters", "format", "language", "length", "preference", "score", "user_function",
}  # fmt: skip


def test_every_file_that_decides_counts():
    """What a kind's sources import of rewards/ is among them, and no file there is in none."""
    package = Path(module.__file__).parents[1]
    for kind, names in SOURCES.items():
        for name in names:
            assert (package / name).is_file(), name
            # graders.py knows the graders of all kinds; code has of math.py what an extracted answer is
            if name in ("rewards/graders.py", "judge_engine.py") or not name.endswith(".py"):
                continue
            if (kind, name) == ("code", "rewards/math.py"):
                continue
            imported = re.findall(
                r"^\s*from r1fast\.rewards(?:\.(\w+))? import ([\w, ]+)",
                (package / name).read_text(), re.M,
            )  # fmt: skip
            for home, members in imported:
                needed = [home] if home else [m.strip() for m in members.split(",")]
                for other in needed:
                    assert f"rewards/{other}.py" in names, f"{kind}: {name} imports {other}"
    listed = {name for names in SOURCES.values() for name in names}
    files = {f"rewards/{p.name}" for p in (package / "rewards").iterdir() if p.is_file()}
    assert files - listed == {f"rewards/{name}.py" for name in NO_VERDICT}


def evaluated(folder, of: RewardScorer, *groups: RolloutGroup) -> dict:
    """A run folder as `evaluate` leaves it."""
    version = version_of("math")
    with of:
        of.score(list(groups))
        rows = [
            final_row(g.problem, {"sample": j, "seed": j, "prompt_hash": "h", "text": c.text,
                                  "finish_reason": c.finish_reason, "num_tokens": 3}, reward, version)
            for g in groups for j, (c, reward) in enumerate(zip(g.completions, g.rewards, strict=True))
        ]  # fmt: skip
        result = summarise(rows, of.grader.equivalent) | {
            "temperature": 0.6,
            "top_p": 0.95,
            "seed": 0,
        }
    setup = {"temperature": 0.6, "top_p": 0.95, "seed": 0, "grader": version}
    store(folder, rows, result, [g.problem for g in groups], setup)
    return setup


def test_rescoring_changes_what_the_grader_says_otherwise(tmp_path, monkeypatch):
    first = group(Problem("1/2?", "1/2", "m1", subset="s"), r"\boxed{0.5}", r"\boxed{3}")
    second = group(Problem("3?", "3", "m2", subset="s"), r"\boxed{3}", "none")
    setup = evaluated(tmp_path, scorer(), first, second)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with scorer() as of:
        told = rescore(tmp_path, of, setup)
    assert (told["num_changed"], told["moves"]) == (0, {})
    assert (tmp_path / "samples.jsonl").read_bytes() == before  # the same grader, the same file

    class Strict(RewardScorer):
        """Only the text of the gold is right."""

        def score(self, groups):
            super().score(groups)
            for g in groups:
                for reward in g.rewards:
                    if reward.answer != g.problem.answer and reward.verdict == "correct":
                        reward.verdict = "wrong"

    monkeypatch.setattr(module, "version_of", lambda kind, judge_name: f"{kind}-strict")
    strict = Strict(RewardConfig(), THINK, 64, grader=MathReward(symbolic=False))
    with strict:
        told = rescore(tmp_path, strict, setup)
    assert told["moves"] == {"correct -> wrong": 1}
    assert told["changed"] == [{
        "problem_id": "m1", "sample": 0, "before": "correct", "after": "wrong",
        "extracted_before": "0.5", "extracted_after": "0.5",
    }]  # fmt: skip
    assert (told["eval_before"]["pass@1"], told["grader_before"]) == (0.5, setup["grader"])
    rows = [row for _, row in read_jsonl(tmp_path / "samples.jsonl")]
    assert {row["grader"] for row in rows} == {"math-strict"}
    assert json.loads((tmp_path / "eval.json").read_text())["pass@1"] == 0.25
    assert json.loads((tmp_path / "evaluation.json").read_text())["grader"] == "math-strict"
    assert json.loads((tmp_path / "rescored.json").read_text()) == told


def test_rescoring_needs_to_know_what_was_asked(tmp_path):
    setup = evaluated(tmp_path, scorer(), group(Problem("3?", "3", "m"), r"\boxed{3}"))
    problem = replace(Problem("3?", "3", "m"), id="other")
    store(tmp_path / "x", [], {}, [problem], setup)
    (tmp_path / "problems.jsonl").write_text("")
    with scorer() as of, pytest.raises(ValueError, match=r"that problems.jsonl lacks: m"):
        rescore(tmp_path, of, setup)
    (tmp_path / "problems.jsonl").unlink()
    with scorer() as of, pytest.raises(ValueError, match=r"has no problems.jsonl"):
        rescore(tmp_path, of, setup)
