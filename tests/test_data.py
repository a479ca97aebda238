"""Files to problems: formats, errors that name file and line, and the order of epochs."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.data import load_problems
from r1fast.data_order import batch_indices, epoch_order
from r1fast.examples import gsm8k_examples, has_completions, load_examples
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.protocol import split_completion

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside the repo")


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_plain_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1", "answer": 2, "id": "one", "subset": "easy", "level": 3},
        "",
        {"question": "2+2", "gold": " 4 ", "language": "de"},
        {"problem": "3+3", "target": 0.5, "id": 7},
        {"prompt": "Tell a story", "kind": "general"},
    )
    one, two, three, story = load_problems(path)
    assert (one.prompt, one.answer, one.id, one.subset) == ("1+1", "2", "one", "easy")
    assert one.meta == {"level": 3}
    assert (two.answer, two.language, two.id) == ("4", "de", "a.jsonl:3")  # blank lines count
    assert (three.answer, three.id, three.language) == ("0.5", "7", "en")
    assert (story.answer, story.kind) == (None, "general")
    assert [p.id for p in load_problems(path, max_problems=2)] == ["one", "a.jsonl:3"]
    assert load_problems(path, language="fr")[0].language == "fr"


def test_bom_crlf_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    row = '{"prompt": "a\u2028b\u0085c", "answer": "1"}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n" + row.replace("a", "d", 1).encode())
    problems = load_problems(path)
    assert [p.id for p in problems] == ["a.jsonl:1", "a.jsonl:2"]
    assert problems[0].prompt == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("content", "line", "match"),
    [
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": \n', 2, "not valid JSON"),
        (b'[{"prompt": "a"}]\n', 1, "one object a line"),
        (b'"text"\n', 1, "expected a JSON object, got str"),
        (b'{"promt": "a", "answer": "1"}\n', 1, "no prompt .*'promt'"),
        (b'{"prompt": "a", "anwser": "1"}\n', 1, "no answer .*'anwser'"),
        (b'{"prompt": "a", "answer": null}\n', 1, "no answer"),
        (b'{"prompt": 3, "answer": "1"}\n', 1, "'prompt' must be a string, got 3"),
        (b'{"prompt": "a", "answer": [1]}\n', 1, "'answer' must be a string or a number"),
        (b'{"prompt": "a", "answer": true}\n', 1, "'answer' must be a string or a number"),
        (b'{"prompt": "a", "answer": NaN}\n', 1, "NaN is not JSON"),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}\n', 1, "the key 'answer' stands .* once"),
        (b'{"prompt": " ", "answer": "1"}\n', 1, "'prompt' is empty"),
        (b'{"prompt": "a", "answer": " "}\n', 1, "'answer' is empty"),
        (b'{"prompt": "a", "question": "b", "answer": "1"}\n', 1, "'prompt' and 'question'"),
        (b'{"prompt": "a", "answer": "1", "kind": "maths"}\n', 1, "'kind' must be one of"),
        (b'{"prompt": "a", "answer": "1", "language": 5}\n', 1, "'language' must be a string"),
        (b'{"prompt": "a\\u0000", "answer": "1"}\n', 1, "NUL"),
        (b'{"prompt": "a\\ud800", "answer": "1"}\n', 1, "surrogate"),
        (b'\n{"prompt": "a\x00", "answer": "1"}\n', 2, "NUL byte"),
        (b'\n{"prompt": "\xff", "answer": "1"}\n', 2, "not valid UTF-8"),
        (b'\xff\xfe{\x00"\x00', 1, "UTF-16"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", 1, "not valid JSON"),
        (b'{"prompt": "a", "answer": ' + b"[" * 100000 + b"\n", 1, "not valid JSON"),
    ],
)
def test_errors_name_file_and_line(tmp_path, content, line, match):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:{line}: .*{match}"):
        load_problems(path)


def test_duplicate_ids_name_both_lines(tmp_path):
    row = {"prompt": "a", "answer": "1", "id": "x"}
    path = write(tmp_path / "a.jsonl", row, row)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: id 'x' was used on line 1"):
        load_problems(path)


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_problems(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        load_problems(tmp_path)
    empty = write(tmp_path / "empty.jsonl", "", "")
    with pytest.raises(ValueError, match="holds no rows"):
        load_problems(empty)
    with pytest.raises(ValueError, match="holds no rows"):
        load_problems(empty, format="jsonl")
    with pytest.raises(ValueError, match=r"format must be one of .*mgsm.* got 'csv'"):
        load_problems(empty, format="csv")
    with pytest.raises(ValueError, match="max_problems must be at least 0"):
        load_problems(empty, max_problems=-1)


def test_gold_is_checked_at_load(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "?", "kind": "general"},
        {"prompt": "c", "answer": "bad"},
    )

    def check(problem):
        if problem.kind == "math" and problem.answer != "1":
            raise ValueError(f"gold {problem.answer!r} cannot be read")

    with pytest.raises(ValueError, match=r"a\.jsonl:3: gold 'bad' cannot be read"):
        load_problems(path, check=check)


def test_gsm8k_rows(tmp_path):
    good = {"question": "q", "answer": "3*4=<<3*4=12>>12\n#### 1,200"}
    path = write(tmp_path / "a.jsonl", good)
    (problem,) = load_problems(path)  # detected by the ####
    assert problem.answer == "1200"
    assert problem.meta["solution"] == "3*4=<<3*4=12>>12"
    (example,) = gsm8k_examples(path)
    assert example.completion == "<think> 3*4=12 </think> <answer> 1200 </answer>"
    assert split_completion(example.completion).well_formed
    bad = write(tmp_path / "b.jsonl", good, {"question": "q", "answer": "12"})
    with pytest.raises(ValueError, match=r"b\.jsonl:2: 'answer' must end in '#### gold'"):
        load_problems(bad)


def test_math_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"problem": "p", "solution": r"so \boxed{\frac{1}{2}}", "type": "Algebra", "level": 2},
        {"problem": "q", "solution": "", "answer": "7", "unique_id": "test/1", "subject": "NT"},
    )
    half, seven = load_problems(path)
    assert (half.answer, half.subset) == (r"\frac{1}{2}", "Algebra")
    assert (seven.answer, seven.id, seven.subset) == ("7", "test/1", "NT")
    bad = write(tmp_path / "b.jsonl", {"problem": "p", "solution": "no box"})
    with pytest.raises(ValueError, match=r"b\.jsonl:1: no 'answer' and no .boxed"):
        load_problems(bad)


def test_mgsm_rows(tmp_path):
    path = write(tmp_path / "mgsm_de.tsv", "Wie viele?\t1,200", "Und jetzt?\t-3")
    problems = load_problems(path)
    assert [(p.answer, p.language) for p in problems] == [("1200", "de"), ("-3", "de")]
    unnamed = write(tmp_path / "x.tsv", "q\t1")
    with pytest.raises(ValueError, match="language"):
        load_problems(unnamed)
    assert load_problems(unnamed, language="fr")[0].language == "fr"
    with pytest.raises(ValueError, match=r"mgsm_es\.tsv:2: .*got 3 columns"):
        load_problems(write(tmp_path / "mgsm_es.tsv", "q\t1", "a\tb\t2"))


def test_examples(tmp_path):
    path = write(
        tmp_path / "sft.jsonl",
        {"prompt": "a", "completion": "b", "problem_id": "p1", "language": "zh", "source": "x"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
        {"prompt": "c", "completion": "d", "keep": False},
    )
    first, second = load_examples(path)
    assert (first.prompt, first.completion, first.problem_id) == ("a", "b", "p1")
    assert (first.language, first.meta) == ("zh", {"source": "x"})
    assert (second.prompt, second.completion, second.id) == ("u", "v", "sft.jsonl:2")
    assert len(load_examples(path, only_kept=False)) == 3


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, "needs 'prompt' and 'completion', or 'messages'"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"messages": [{"role": "user", "content": "u"}]}, r"roles \['user'\]"),
        ({"messages": "hello"}, "must be a list of objects"),
        ({"prompt": "a", "completion": "b", "keep": "no"}, "'keep' must be true or false"),
        ({"prompt": "a", "completion": "b", "keep": False}, None),
    ],
)
def test_bad_examples(tmp_path, row, match):
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{match}" if match else "none of them"):
        load_examples(path)


def test_write_is_all_or_nothing(tmp_path):
    @dataclass
    class Row:
        a: int

    path = tmp_path / "new" / "a.jsonl"
    assert write_jsonl(path, [{"x": "ä"}, Row(3)]) == 2
    assert [row for _, row in read_jsonl(path)] == [{"x": "ä"}, {"a": 3}]

    def rows():
        yield {"x": 1}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_jsonl(path, rows())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(path, [{"x": float("nan")}])
    assert [row for _, row in read_jsonl(path)] == [{"x": "ä"}, {"a": 3}]
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_epoch_order_is_the_same_everywhere():
    assert epoch_order(8, seed=0, epoch=0) == GOLDEN
    assert epoch_order(8, seed=0, epoch=1) != epoch_order(8, seed=0, epoch=0)
    assert epoch_order(8, seed=1, epoch=0) != epoch_order(8, seed=0, epoch=0)


GOLDEN = [0, 2, 1, 4, 6, 7, 3, 5]  # seed 0, epoch 0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 3))
def test_batches_walk_epochs(n, batch_size, seed):
    steps = 4 * n // batch_size + 3
    batches = [batch_indices(n, batch_size, seed, step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    if n >= batch_size:
        assert all(len(set(batch)) == batch_size for batch in batches)
    walk = sum(batches, [])
    for epoch in range(len(walk) // n):
        assert sorted(walk[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_change_between_epochs():
    assert batch_indices(100, 10, 0, 0) != batch_indices(100, 10, 0, 10)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        batch_indices(0, 4, 0, 0)


def test_data_needs_no_torch():
    code = "import sys, r1fast.data, r1fast.protocol; sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@needs_data
@pytest.mark.parametrize(
    ("name", "rows", "language"),
    [
        ("gsm8k/train.jsonl", 7473, "en"),
        ("gsm8k/test.jsonl", 1319, "en"),
        ("math500/test.jsonl", 500, "en"),
        ("mgsm/mgsm_zh.tsv", 250, "zh"),
        ("mgsm/mgsm_fr.tsv", 250, "fr"),
    ],
)
def test_public_sets(name, rows, language):
    problems = load_problems(SHARED / name)
    assert len(problems) == rows
    assert {p.language for p in problems} == {language}
    assert all(p.answer for p in problems)


@needs_data
def test_gsm8k_solutions_read_back():
    for example in gsm8k_examples(SHARED / "gsm8k/test.jsonl"):
        parts = split_completion(example.completion)
        assert parts.well_formed
        assert parts.answer == example.meta["answer"]
        assert "<<" not in example.completion


def test_general_prompts_with_and_without_replies(tmp_path):
    path = tmp_path / "general.jsonl"
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    reply = {"role": "assistant", "content": "Hi!"}
    write_jsonl(path, [
        {"prompt": "Write a poem"}, {"prompt": "Thanks", "completion": "Welcome"},
        {"messages": talk}, {"messages": [*talk, reply]},
    ])  # fmt: skip
    problems = load_problems(path, format="jsonl", kind="general", language="de")
    assert [p.prompt for p in problems] == ["Write a poem", "Thanks", "Hello", "Hello"]
    assert {(p.kind, p.answer, p.language) for p in problems} == {("general", None, "de")}
    assert problems[2].meta["system"] == "Be kind."
    with pytest.raises(ValueError, match=r"general.jsonl:1: no 'completion', which supervised"):
        load_examples(path, kind="general")
    assert has_completions(path)
    write_jsonl(path, [{"prompt": "Write a poem"}, {"messages": talk}])
    assert not has_completions(path)
    write_jsonl(path, [{"messages": talk}])
    with pytest.raises(ValueError, match=r"one user and one assistant turn.*'system', 'user'"):
        load_examples(path, kind="general")
    write_jsonl(path, [{"messages": [*talk, reply]}])
    (example,) = load_examples(path, kind="general")
    assert (example.prompt, example.completion) == ("Hello", "Hi!")


def test_an_answer_is_a_finite_number(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "x", "answer": 1}\n{"prompt": "y", "answer": 1e999}\n'
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:2: 'answer' must be a finite number, got inf"):
        load_problems(tmp_path / "a.jsonl")
