"""Every kind of problem as a reward: what rows need, and a GRPO step over a file that mixes them."""

import json

import pytest
from test_judge import by_length, endpoint  # noqa: F401
from tiny import tiny_checkpoint, tiny_config

from r1fast.__main__ import main
from r1fast.assemble import problem_sets
from r1fast.data import load_problems
from r1fast.jsonl import write_jsonl
from r1fast.problem_rows import gold_letter
from r1fast.rewards.graders import check_problem
from r1fast.rewards.math import MathReward
from r1fast.rewards.sandbox import Sandbox, SandboxUnavailable
from r1fast.rewards.score import RewardScorer
from r1fast.trainer import _scored_by
from r1fast.types import Completion, RolloutGroup

ROWS = [
    {"id": "m", "prompt": "What is 3 + 5?", "answer": "8"},
    {"id": "c", "kind": "choice", "prompt": "Which is even?", "choices": [3, 4, 5], "answer": 1},
    {"id": "i", "kind": "if", "prompt": "Say hi, without a comma.",
     "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"unused": None}]},
    {"id": "g", "kind": "general", "prompt": "Say hi."},
]  # fmt: skip
CODE = {"id": "p", "kind": "code", "prompt": "Write add(a, b).", "tests": ["assert add(3, 4) == 7"]}
JUDGED = [
    {"id": "q", "kind": "qa", "prompt": "Who wrote Emma?", "answer": "Jane Austen"},
    {"id": "o", "kind": "open", "prompt": "Say hi.", "baseline": "Hello!"},
]
RIGHT = {
    "m": r"<think> 3 and 5 </think> <answer> 8 </answer>",
    "c": "<think> 4 is </think> <answer> B </answer>",
    "i": "<think> hi, hi </think> <answer> Hi there. </answer>",
    "g": "<think> hi </think> <answer> Hi. </answer>",
    "p": "<think> sum </think> <answer>\n```python\ndef add(a, b):\n    return a + b\n```\n</answer>",
    "q": "<think> she </think> <answer> Jane Austen </answer>",
    "o": "<think> hello </think> <answer> Hello to all of you! </answer>",
}
WRONG = {
    "m": "<think> x </think> <answer> 9 </answer>",
    "c": "<think> x </think> <answer> C </answer>",
    "i": "<think> x </think> <answer> Hi, there. </answer>",
    "p": "<think> x </think> <answer>\n```python\ndef add(a, b):\n    return a\n```\n</answer>",
    "q": "<think> x </think> <answer> Bob </answer>",
    "o": "<think> x </think> <answer> Hi </answer>",
}


def has_sandbox() -> bool:
    try:
        with Sandbox() as sandbox:
            sandbox.start()
    except SandboxUnavailable:
        return False
    return True


@pytest.fixture
def code_rows() -> list[dict]:
    return [CODE] * has_sandbox()


def file_of(folder, rows):
    write_jsonl(folder / "train.jsonl", rows)
    return folder / "train.jsonl"


def judge(system: str, user: str) -> str:
    """Of answers: right where the gold stands in them. Of pairs: the longer."""
    if "Reference answer" not in user:
        return by_length(system, user)
    answer = user.partition("Candidate's answer:")[2]
    return json.dumps({"verdict": "correct" if "Austen" in answer else "wrong"})


def test_what_each_kind_pays(tmp_path, endpoint, code_rows):  # noqa: F811
    """The right answer earns 1, a wrong one 0, for every kind that has a grader."""
    from r1fast.assemble import make_scorer

    endpoint.judge = judge
    path = file_of(tmp_path, [*ROWS, *code_rows, *JUDGED])
    config = tiny_config(
        f"--data.train={path}", f"--judge.url={endpoint.url}", "--judge.model=m",
        "--rewards.by_kind.choice.accuracy=2", "--rewards.by_kind.if.format=0",
    )  # fmt: skip
    problems, _ = problem_sets(config)
    groups = [
        RolloutGroup(p, [1], [Completion([1, 2], [], "stop", text)
                              for text in (RIGHT[p.id], WRONG.get(p.id, RIGHT[p.id]))])
        for p in problems
    ]  # fmt: skip
    with make_scorer(config) as scorer:
        scorer.grader.close()
        scorer.grader = MathReward(symbolic=False)
        scorer.score(groups)
    earned = {g.problem.id: [r.parts.get("accuracy") for r in g.rewards] for g in groups}
    assert earned.pop("g") == [None, None]
    assert earned == {name: [1.0, 0.0] for name in earned}
    assert earned.keys() == {"m", "c", "i", "q", "o"} | ({"p"} if code_rows else set())
    totals = {g.problem.id: [r.total for r in g.rewards] for g in groups}
    assert totals["m"] == [2.0, 1.0]
    assert totals["c"] == [3.0, 1.0]
    assert totals["i"] == [1.0, 0.0]


def test_a_grpo_step_over_all_kinds_that_rules_decide(tmp_path, code_rows, capsys):
    tiny_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    path = file_of(tmp_path, [*ROWS, *code_rows])
    (tmp_path / "c.toml").write_text("")
    n = 4 + len(code_rows)
    out = tmp_path / "run"
    words = ["grpo", tmp_path / "c.toml", f"--model.path={tmp_path / 'model'}", "--model.device=cpu",
             f"--data.train={path}", f"--data.eval={path}", f"--output_dir={out}",
             f"--grpo.prompts_per_step={n}", "--rollout.num_generations=4", "--grpo.num_steps=1",
             "--rollout.max_completion_tokens=24", "--rollout.max_prompt_tokens=700",
             "--eval.num_samples=2", "--optim.lr=0.001"]  # fmt: skip
    assert main(list(map(str, words))) == 0, capsys.readouterr().err
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    verdicts = {name: value for name, value in row.items() if name.startswith("verdicts/")}
    assert sum(verdicts.values()) == pytest.approx(1.0)  # shares of what can be verified
    assert not verdicts.get("verdicts/error")
    assert ("sandbox/level" in row) == bool(code_rows)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {s["kind"] for s in samples} == {"math", "choice", "if", "general"} | (
        {"code"} if code_rows else set()
    )
    by_kind = {s["kind"]: s for s in samples}
    assert by_kind["general"]["grader"] == ""
    assert by_kind["choice"]["grader"].startswith("choice-")
    assert by_kind["if"]["instructions"] == ["punctuation:no_comma"]


def test_rows_as_they_are_read(tmp_path):
    _, choice, instructions, _ = load_problems(file_of(tmp_path, ROWS), check=check_problem)
    assert choice.answer == "B"
    assert gold_letter("4", ["3", "4", "5"], "") == gold_letter(1, ["3", "4", "5"], "") == "B"
    assert choice.meta["choices"] == ["3", "4", "5"]
    assert choice.prompt.endswith("Which is even?\n\nA) 3\nB) 4\nC) 5")
    assert instructions.meta["instructions"] == ["punctuation:no_comma"]
    assert instructions.meta["arguments"] == [{}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "choice", "prompt": "a", "answer": "B"}, "'choices' must be a list of options"),
        ({"kind": "choice", "prompt": "a", "choices": ["1", "2"], "answer": "C"},
         "'answer' must be an index from 0 to 1, a letter from A to B or the text of an option, got 'C'"),
        ({"kind": "choice", "prompt": "a", "choices": ["1", "2"], "answer": "1"},
         "'answer' '1' is the index of one option and the text of another; give the letter"),
        ({"kind": "choice", "prompt": "a", "choices": ["x", "y", "x"], "answer": "C"},
         "two of 'choices' are the answer's 'x'"),
        ({"kind": "choice", "prompt": "a", "choices": ["1", "2"]}, "no answer"),
        ({"kind": "if", "prompt": "a"}, "needs lists 'instructions' and 'arguments' (in IFEval's files"),
        ({"kind": "if", "prompt": "a", "instructions": ["x:y"], "arguments": [{}]},
         "unknown instruction 'x:y'; known: "),
        ({"kind": "if", "prompt": "a", "instructions": [3], "arguments": [{}]},
         "an instruction is a name with a table"),
        ({"kind": "if", "prompt": "a", "instructions": ["keywords:existence"], "arguments": [{}]},
         "needs 'keywords'"),
        ({"kind": "open", "prompt": "a"}, "needs a 'baseline'"),
        ({"kind": "code", "prompt": "a"}, "a code problem needs one of"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_graded_name_the_line(tmp_path, row, message):
    path = file_of(tmp_path, [{"prompt": "fine", "answer": "1"}, row])
    with pytest.raises(ValueError, match=r"train\.jsonl:2: .*") as error:
        load_problems(path, check=check_problem)
    assert message in str(error.value)


def test_judged_kinds_need_a_judge(tmp_path):
    for row in JUDGED:
        with pytest.raises(ValueError, match=f"kind {row['kind']}, which a judge decides"):
            problem_sets(tiny_config(f"--data.train={file_of(tmp_path, [row])}"))
    with RewardScorer(
        tiny_config().rewards, tiny_config().template, 8, grader=MathReward(symbolic=False)
    ) as scorer:
        (problem,) = load_problems(file_of(tmp_path, JUDGED[:1]))
        group = RolloutGroup(problem, [1], [Completion([1], [], "stop", "x")])
        with pytest.raises(ValueError, match="which a judge decides"):
            scorer.score([group])


def test_what_decides_is_in_the_digest_of_the_data(tmp_path):
    """A run does not go on with other options, instructions or tests."""

    def digests(rows):
        return [
            _scored_by(p, None) for p in load_problems(file_of(tmp_path, rows), check=check_problem)
        ]

    changed = [dict(row) for row in ROWS]
    changed[2] |= {"instruction_id_list": ["startend:quotation"]}
    before, after = digests(ROWS), digests(changed)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]
