"""Readers of the usual sets: rows in the published layouts, written for these tests, and bad ones."""

import csv
import gzip
import json
import re
from pathlib import Path

import pytest

from r1fast.data import load_problems
from r1fast.evaluate.presets import PRESETS, find_preset
from r1fast.jsonl import write_jsonl
from r1fast.types import Problem

HUMANEVAL = {
    "task_id": "Test/0", "prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add",
    "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}  # fmt: skip
MBPP = {"task_id": 7, "prompt": "Write a function to add.", "code": "def add(a, b): return a + b",
        "test_imports": [], "test_list": ["assert add(1, 2) == 3"]}  # fmt: skip
IFEVAL = {
    "key": 1, "prompt": "Write without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"relation": None}, {"relation": "at least", "num_words": 3, "num_sentences": None}],
}  # fmt: skip
MMLU = {
    "question": "Which is even?",
    "subject": "numbers",
    "choices": ["1", "2", "3", "5"],
    "answer": 1,
}
GPQA = {"Record ID": "r1", "Question": "Which is prime?", "Correct Answer": "7", "Incorrect Answer 1": "8",
        "Incorrect Answer 2": "9", "Incorrect Answer 3": "10", "High-level domain": "Maths"}  # fmt: skip
SIMPLEQA = {
    "metadata": "{'topic': 'Art', 'urls': []}",
    "problem": "Who painted it?",
    "answer": "Nobody",
}
ALPACA = {
    "instruction": "Say hi.",
    "output": "Hi!",
    "generator": "someone",
    "dataset": "helpful_base",
}
ARENA = {"uid": "u1", "category": "hard", "prompt": "Write a poem."}
ARENA_OLD = {"question_id": "q1", "cluster": "c", "turns": [{"content": "Write a poem."}]}


def load(preset: str, path: Path, *args, **options) -> list[Problem]:
    return find_preset(preset).load(path, *args, **options)


def jsonl(path: Path, *rows: dict) -> Path:
    write_jsonl(path, rows)
    return path


def as_csv(path: Path, *rows: dict) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_maths(tmp_path):
    gsm8k = jsonl(tmp_path / "g.jsonl", {"question": "1+1?", "answer": "so <<1+1=2>>2\n#### 2"})
    (problem,) = load("gsm8k", gsm8k)
    assert (problem.answer, problem.kind) == ("2", "math")
    assert problem.prompt.endswith("put your final answer within \\boxed{}.")
    (plain,) = load("gsm8k", gsm8k, is_chat=False)
    assert plain.prompt == "1+1?"  # R1-Zero's template asks for the answer itself
    row = {"problem": "p", "solution": "\\boxed{3}", "subject": "Algebra", "unique_id": "a/1"}
    (problem,) = load("math500", jsonl(tmp_path / "m.jsonl", row))
    assert (problem.answer, problem.subset, problem.id) == ("3", "Algebra", "a/1")
    for name, text in (("mgsm_de", "Wie viel?\t1,234\n"), ("mgsm_ja", "いくつ？\t5\n")):
        (tmp_path / f"{name}.tsv").write_text(text)
    problems = load("mgsm", tmp_path)
    assert [(p.language, p.subset, p.answer) for p in problems] == [
        ("de", "de", "1234"),
        ("ja", "ja", "5"),
    ]
    assert [p.subset for p in load("mgsm", tmp_path / "mgsm_ja.tsv")] == ["ja"]
    (tmp_path / "mgsm_de.tsv").write_text("Eins?\t1\nZwei?\t2\nDrei?\t3\n")
    in_turns = load("mgsm", tmp_path)  # the first few are not all of one language
    assert [(p.subset, p.answer) for p in in_turns] == [
        ("de", "1"),
        ("ja", "5"),
        ("de", "2"),
        ("de", "3"),
    ]


def test_aime(tmp_path):
    rows = [
        {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204},
        {"id": "x", "problem": "p", "solution": "so $\\boxed{033}$", "year": "2024"},
        {"problem": "q", "answer": "$7$"},
    ]
    problems = load("aime", jsonl(tmp_path / "a.jsonl", *rows))
    assert [(p.id, p.answer, p.subset) for p in problems] == [
        ("2024-I-1", "204", ""), ("x", "33", "2024"), ("a.jsonl:3", "7", ""),
    ]  # fmt: skip
    with pytest.raises(
        ValueError,
        match=re.escape("b.jsonl:1: an AIME answer is a number from 0 to 999, got '1000'"),
    ):
        load("aime", jsonl(tmp_path / "b.jsonl", {"problem": "p", "answer": "1000"}))


def test_code(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode() + b"\n"))
    (problem,) = load("humaneval", path)
    assert (problem.kind, problem.id, problem.answer) == ("code", "Test/0", None)
    assert problem.meta["code_prompt"] == HUMANEVAL["prompt"]
    assert problem.meta["test"] == HUMANEVAL["test"]
    assert "```python\ndef add(a, b):" in problem.prompt
    assert "canonical" not in str(problem.meta)  # nobody needs it
    (tmp_path / "mbpp.json").write_text(json.dumps([MBPP]))
    (problem,) = load("mbpp", tmp_path / "mbpp.json")
    assert problem.prompt.startswith("Write a function to add.\nYour code should pass these tests:")
    assert "assert add(1, 2) == 3" in problem.prompt
    assert problem.meta == {"code_prompt": "", "test_list": MBPP["test_list"]}
    old = {
        "task_id": 8,
        "text": "Add.",
        "test_setup_code": "import math",
        "test_list": ["assert add(1) == 1"],
    }
    (problem,) = load("mbpp", jsonl(tmp_path / "mbpp.jsonl", old))
    assert (problem.id, problem.meta["test_setup_code"]) == ("mbpp/8", "import math")
    with pytest.raises(ValueError, match="1: 'test_list' must be a list of assertions, got None"):
        load("mbpp", jsonl(tmp_path / "bad.jsonl", {"prompt": "p"}))


def test_ifeval(tmp_path):
    (problem,) = load("ifeval", jsonl(tmp_path / "i.jsonl", IFEVAL))
    assert (problem.kind, problem.id, problem.prompt) == ("if", "1", IFEVAL["prompt"])
    assert problem.meta["arguments"] == [{}, {"relation": "at least", "num_words": 3}]
    for change, message in [
        ({"kwargs": [{}]}, "2 instructions but 1 arguments"),
        ({"instruction_id_list": ["a:b", "c:d"]}, "unknown instruction 'a:b'"),
        ({"kwargs": [{}, {"relation": "at least"}]}, "needs 'num_words'"),
        ({"kwargs": None}, "needs lists .* 'instruction_id_list' and 'kwargs'"),
    ]:
        with pytest.raises(ValueError, match=f"bad.jsonl:1: .*{message}"):
            load("ifeval", jsonl(tmp_path / "bad.jsonl", IFEVAL | change))


def test_mmlu(tmp_path):
    (problem,) = load("mmlu", jsonl(tmp_path / "m.jsonl", MMLU))
    assert (problem.answer, problem.subset, problem.kind) == ("B", "numbers", "choice")
    assert problem.prompt.endswith("\n\nWhich is even?\n\nA) 1\nB) 2\nC) 3\nD) 5")
    assert "LETTER is one of ABCD" in problem.prompt
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "high_school_art_test.csv").write_text('"A, or\nB?",w,x,y,z,C\nSecond?,1,2,3,4,A\n')
    problems = load("mmlu", folder)
    assert [(p.answer, p.subset) for p in problems] == [
        ("C", "high_school_art"),
        ("A", "high_school_art"),
    ]
    assert problems[0].meta["choices"] == ["w", "x", "y", "z"]
    simple = {
        "": "0",
        "Question": "Q?",
        "A": "1",
        "B": "2",
        "C": "3",
        "D": "4",
        "Answer": "D",
        "Subject": "s",
    }
    (problem,) = load("mmlu", as_csv(tmp_path / "mmlu.csv", simple))
    assert (problem.answer, problem.subset, problem.meta["choices"]) == (
        "D",
        "s",
        ["1", "2", "3", "4"],
    )
    ten = {"question": "Q?", "options": [str(i) for i in range(10)], "answer": "J", "category": "x"}
    assert load("mmlu", jsonl(tmp_path / "pro.jsonl", ten))[0].answer == "J"
    for answer in (4, -1, "E", None, True):
        with pytest.raises(
            ValueError,
            match=r"bad.jsonl:1: 'answer' must be an index from 0 to 3, a letter from A to D or",
        ):
            load("mmlu", jsonl(tmp_path / "bad.jsonl", MMLU | {"answer": answer}))


def test_gpqa_is_shuffled_alike_in_every_run(tmp_path):
    rows = [GPQA | {"Question": f"Which is prime, {i}?", "Record ID": f"r{i}"} for i in range(40)]
    problems = load("gpqa", as_csv(tmp_path / "gpqa.csv", *rows))
    assert all(p.meta["choices"]["ABCD".index(p.answer or "")] == "7" for p in problems)
    assert all(sorted(p.meta["choices"]) == ["10", "7", "8", "9"] for p in problems)
    letters = [p.answer for p in problems]
    assert min(letters.count(letter) for letter in "ABCD") >= 4  # by no means always A
    again = load("gpqa", jsonl(tmp_path / "gpqa.jsonl", *reversed(rows)))
    assert [p.answer for p in reversed(again)] == letters
    with pytest.raises(
        ValueError, match=r"bad.jsonl:1: no 'Incorrect Answer 3'; the row has 'Record ID'"
    ):
        load(
            "gpqa",
            jsonl(
                tmp_path / "bad.jsonl", {k: v for k, v in GPQA.items() if k != "Incorrect Answer 3"}
            ),
        )


def test_simpleqa(tmp_path):
    (problem,) = load("simpleqa", as_csv(tmp_path / "s.csv", SIMPLEQA))
    assert (problem.kind, problem.answer, problem.subset) == ("qa", "Nobody", "Art")
    assert problem.meta["question"] == "Who painted it?"  # what the judge is shown
    assert problem.prompt == "Who painted it?\nAnswer as shortly as possible."


def test_open_answers(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA]))
    (problem,) = load("alpaca_eval", tmp_path / "alpaca.json")
    assert (problem.kind, problem.meta["baseline"], problem.subset) == (
        "open",
        "Hi!",
        "helpful_base",
    )
    general = [{"prompt": "Say hi.", "answer": "Hi!"}, {"prompt": "Bye?", "completion": "Bye!"}]
    own = load("alpaca_eval", jsonl(tmp_path / "general.jsonl", *general))  # rows of data.general
    assert [(p.prompt, p.meta["baseline"]) for p in own] == [("Say hi.", "Hi!"), ("Bye?", "Bye!")]
    questions = jsonl(tmp_path / "question.jsonl", ARENA, ARENA_OLD)
    answers = jsonl(
        tmp_path / "answers.jsonl",
        {"uid": "u1", "messages": [{"role": "user", "content": "p"},
                                   {"role": "assistant", "content": {"answer": "Roses"}}]},
        {"question_id": "q1", "choices": [{"turns": [{"content": "Violets"}]}]},
    )  # fmt: skip
    problems = load("arena_hard", questions, answers)
    assert [(p.prompt, p.meta["baseline"]) for p in problems] == [
        ("Write a poem.", "Roses"), ("Write a poem.", "Violets"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"question.jsonl:1: no answer to compare with for 'u1'"):
        load("arena_hard", questions)
    others = jsonl(tmp_path / "others.jsonl", *({"uid": f"z{i}", "answer": "a"} for i in range(5)))
    with pytest.raises(
        ValueError,
        match=r"for 'u1'; --baseline \S*others.jsonl has answers to 5 others \('z0', 'z1', 'z2', \.",
    ):
        load("arena_hard", questions, others)
    with pytest.raises(ValueError, match="--baseline is of open answers; preset gsm8k"):
        load("gsm8k", questions, answers)


@pytest.mark.parametrize("preset", [p.name for p in PRESETS])
def test_what_cannot_be_read_says_so(preset, tmp_path):
    name = "mgsm_de.tsv" if preset == "mgsm" else "set.jsonl"
    with pytest.raises(ValueError, match="does not exist"):
        load(preset, tmp_path / name)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="holds no"):
        load(preset, tmp_path / name)
    (tmp_path / name).write_text('{"nothing": 1}\n')
    with pytest.raises(ValueError, match=re.escape(f"{name}:1: ")):
        load(preset, tmp_path / name)


def test_a_file_of_another_set_is_named(tmp_path):
    simpleqa = as_csv(tmp_path / "s.csv", SIMPLEQA)
    gpqa = as_csv(tmp_path / "g.csv", GPQA)
    for preset, path, like in (
        ("gsm8k", simpleqa, "simpleqa"), ("aime", simpleqa, "simpleqa"), ("mmlu", gpqa, "gpqa"),
        ("humaneval", jsonl(tmp_path / "m.jsonl", MBPP), "mbpp"),
        ("gpqa", jsonl(tmp_path / "c.jsonl", MMLU | {"answer": "B"}), "mmlu or simpleqa"),
    ):  # fmt: skip
        message = f"; preset {preset} reads .*; the rows of this file are like those of {like}$"
        with pytest.raises(ValueError, match=message):
            load(preset, path)
    good = {"question": "1+1?", "answer": "#### 2"}
    mixed = jsonl(tmp_path / "b.jsonl", good, good | {"answer": "2"})  # the right set, a bad row
    with pytest.raises(ValueError, match=r"b.jsonl:2: 'answer' must end in '#### gold', got '2'$"):
        load("gsm8k", mixed)
    with pytest.raises(ValueError, match=r"s.csv:1: not valid JSON.*presets of evaluate read CSV"):
        load_problems(simpleqa)
    rows = jsonl(tmp_path / "if.jsonl", {"prompt": "p", "kind": "if", "instructions": ["x"]})
    with pytest.raises(
        ValueError, match=r"needs lists 'instructions' and 'arguments' .*got \['x'\] and None"
    ):
        load_problems(rows)


def test_odd_files(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json:1: expected an object, got int"):
        load("mbpp", tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[{]")
    with pytest.raises(ValueError, match="not valid JSON"):
        load("mbpp", tmp_path / "b.json")
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        load("humaneval", tmp_path / "c.jsonl.gz")
    (tmp_path / "d.csv").write_text("problem,answer\na,b,c\n")
    with pytest.raises(ValueError, match=r"d.csv:2: 3 columns, the header has 2"):
        load("simpleqa", tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"e.jsonl: id '1' stands twice"):
        load("ifeval", jsonl(tmp_path / "e.jsonl", IFEVAL, IFEVAL))


def test_the_papers_protocol():
    k = {preset.name: preset.num_samples for preset in PRESETS}
    assert (k["aime"], k["gpqa"], k["math500"]) == (64, 64, 16)
    assert {k[name] for name in ("gsm8k", "mgsm", "mmlu", "ifeval")} == {4}
    with pytest.raises(
        ValueError, match="unknown preset 'gsm'; known: gsm8k, math500, aime, mgsm, humaneval"
    ):
        find_preset("gsm")
