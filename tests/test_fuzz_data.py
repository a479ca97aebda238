"""Data files that nobody wrote on purpose: rows, or a ValueError that names the file; bounded in memory."""

import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from r1fast import jsonl
from r1fast.data import FORMATS, load_problems
from r1fast.evaluate.presets import PRESETS
from r1fast.examples import has_completions, load_examples
from r1fast.jsonl import read_jsonl, read_rows, write_jsonl
from r1fast.reward_model import load_labelled, load_pairs
from r1fast.rewards.graders import check_problem
from r1fast.types import KINDS

READERS = {
    "problems": lambda path: load_problems(path, check=check_problem),
    "general": lambda path: load_problems(path, kind="general"),
    "examples": load_examples,
    "pairs": lambda path: load_pairs(path, tiny_tokenizer()),
    "labelled": lambda path: load_labelled(path, tiny_tokenizer()),
    "has completions": has_completions,
    **{form: lambda path, form=form: load_problems(path, format=form, language="en", check=check_problem)
       for form in FORMATS},
}  # fmt: skip
COLUMNS = (
    "prompt question problem answer gold target solution id kind language subset subject messages completion keep choices "
    "options instructions arguments instruction_id_list kwargs test_list text code test entry_point task_id chosen rejected "
    "response safe responses tests test_cases meta judge type unique_id problem_id"
).split()
json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 30), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(["#### 4", "A", "\\boxed{", "\\frac{1}", "\0", "\ud800", "9" * 5000, "assert f(1) == 2", *KINDS]),
    ),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "input", "output", "fn_name", ""]), x, max_size=3),
    max_leaves=5,
)  # fmt: skip
rows = st.lists(st.dictionaries(st.sampled_from(COLUMNS), json_values, max_size=5), max_size=3)


def read(reader, path):
    """What the reader makes, or None for a ValueError that names the file."""
    try:
        return reader(path)
    except ValueError as error:
        assert path.name in str(error), error
        return None


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25)
@given(rows)
def test_any_rows(tmp_path_factory, name, rows):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    read(READERS[name], path)
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows))
    read(READERS[name], path)


SOUND = [
    {"prompt": "2 + 2?", "answer": "4", "id": "a"}, {"question": "1?", "answer": "so\n#### 1,234"},
    {"prompt": "which?", "kind": "choice", "choices": ["x", "y"], "answer": "A"},
    {"prompt": "say", "kind": "if", "instructions": ["punctuation:no_comma"], "arguments": [{}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
]  # fmt: skip


@pytest.mark.parametrize("name", ["problems", "examples", "gsm8k", "mgsm", "mbpp"])
def test_mutated_files(tmp_path, name):
    rng, path = random.Random(name), tmp_path / "rows.jsonl"
    data = "\n".join(map(json.dumps, SOUND)).encode()
    for _ in range(60):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(bad) - 9)
            match rng.randrange(4):
                case 0:
                    bad[at] = rng.randrange(256)
                case 1:
                    del bad[at : at + rng.randrange(40)]
                case 2:
                    bad[at:at] = rng.choice(
                        [
                            b"[",
                            b"{",
                            b'"',
                            b"\0",
                            b"\xff\xfe",
                            b"\n",
                            b"\r",
                            b"NaN",
                            b"1e999",
                            b"\\ud800",
                        ]
                    )
                case 3:
                    bad[at:at] = bad[at : at + rng.randrange(30)]
            if len(bad) < 20:
                break
        path.write_bytes(bad)
        read(READERS[name], path)


@pytest.mark.parametrize("text", [
    "[" * 200000, '{"a":' * 100000, '{"prompt": ' + "[" * 100000 + "]" * 100000 + "}", '{"answer": ' + "9" * 5000 + "}",
    "\ufeff", "null", "[]", "{}", "\u2028", '{"prompt": "a", "answer": 1e999}', '{"prompt": "a", "answer": NaN}',
    '{"prompt": "a", "answer": "\\ud800"}', '{"prompt": "a\\u0000", "answer": "1"}',
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_bombs(tmp_path, text, suffix):
    path = tmp_path / f"bomb{suffix}"
    path.write_text(text)
    for reader in READERS.values():
        assert not read(reader, path)


def test_damaged_gzip(tmp_path):
    rng, path = random.Random(0), tmp_path / "rows.jsonl.gz"
    whole = gzip.compress("\n".join(map(json.dumps, SOUND * 20)).encode())
    for i in range(60):
        bad = bytearray(whole)
        if i % 3:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        if i % 2:
            del bad[rng.randrange(len(bad)) :]
        path.write_bytes(bad)
        read(READERS["problems"], path)
        read(READERS["examples"], path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz:\d+: not a whole gzip file"):
        list(read_jsonl(path))


def test_a_line_or_an_array_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 1 << 20)
    monkeypatch.setattr(jsonl, "MAX_ARRAY", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * (64 << 20)))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(ValueError, match=r"bomb\.jsonl\.gz:1: a line of over 1 MiB"):
        list(read_jsonl(path))
    path = tmp_path / "array.json"
    path.write_text("[" + '{"prompt": "aaaaaaaaaaaaaaaaaa"},\n' * 50000)
    with pytest.raises(ValueError, match=r"array\.json: an array of over"):
        list(read_rows(path))


def test_files_that_are_none(tmp_path):
    for name in ("nothing.jsonl", "x" * 5000, "\0"):
        for reader in READERS.values():
            with pytest.raises(ValueError, match="does not exist"):
                reader(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder"):
        list(read_jsonl(tmp_path))


@settings(max_examples=60)
@given(st.lists(json_values, max_size=3))
def test_what_is_written_is_json_or_nothing(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "out.jsonl"
    path.write_text("before")
    try:
        num_rows = write_jsonl(path, rows)
    except ValueError:  # NaN, half a surrogate pair
        assert path.read_text() == "before"
    else:
        assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == rows
        assert num_rows == len(rows)
    assert not list(path.parent.glob(".out.jsonl.*"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.name)
@settings(max_examples=15)
@given(rows, st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]), st.text(max_size=20))
def test_evaluation_sets_of_any_rows(tmp_path_factory, preset, rows, suffix, text):
    path = tmp_path_factory.getbasetemp() / f"set{suffix}"
    whole = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    for content in (whole, text, whole.replace('"', "").replace(": ", ",")):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        read(preset.load, path)
