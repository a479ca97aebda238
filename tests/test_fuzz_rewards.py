"""Completions that nobody meant: every parser of a reward answers, in bounded processor time, and raises nothing."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.protocol import answer_region, boxes, split_completion, whole_completion
from r1fast.rewards.chat import defused, read_object
from r1fast.rewards.choice import grade_choice
from r1fast.rewards.code_answer import extract_code, fenced_blocks
from r1fast.rewards.code_problem import read_code_problem
from r1fast.rewards.format import format_reward
from r1fast.rewards.instructions import INSTRUCTIONS, check_instructions, follows_loosely
from r1fast.rewards.judge import read_verdict
from r1fast.rewards.language import language_consistency
from r1fast.rewards.latex import clean, is_balanced, is_symbolic, tokenize
from r1fast.rewards.length import repetition_penalty
from r1fast.rewards.math import MathReward, extract_answer, parse_gold
from r1fast.rewards.pairwise import read_grade
from r1fast.rewards.text_language import is_language

SECONDS = 5.0  # of this process: the slowest takes a tenth of a second on an idle core
PROTOCOLS = [None, "think_answer", "cold_start", "think"]
MATH = MathReward(symbolic=False)
VERDICTS = {"correct", "wrong", "no_answer", "unparseable", "timeout", "error"}
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "|special_token|", "\\boxed{", "}", "{", "$", "$$", "####", "\\frac", "\\sqrt[", "]",
    "^", "_", "(", ")", "[", ",", ";", "=", "<", "\\le", "\\cup", "\\in", "\\pm", "\\begin{pmatrix}", "&", "\\\\", "\\end{pmatrix}",
    "\\text{", "\\mathbb{R}", "\\infty", "\\pi", "e", "i", "x", "!", "%", "°", "\\%", "1", "0", "-", "+", "*", "/", "\\cdot", ".", "1e9",
    "9" * 40, "\\binom", "\\sin", "\\log", "|", "\\left", "\\right", "\n", " ", "```", "```python\n", "**", "Answer:", "A", "B)", "yes",
    '"', "\u200b", "\ud800", "\0", "é", "中", "١", "½", "²", "−", "\\", "#", "'", "mod", "\\dots", "…", "12:30", "km", "\\overline{",
]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join), st.text(max_size=20),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _models_of_languages():
    """lingua reads its own once, for seconds."""
    language_consistency("Let us begin with a sentence.", "en")
    is_language("Let us begin with a sentence.", "en")


def bounded(call, *arguments, **options):
    start = time.process_time()
    found = call(*arguments, **options)
    assert time.process_time() - start < SECONDS, call
    return found


@settings(max_examples=200)
@given(texts, texts, st.sampled_from(PROTOCOLS), st.booleans())
def test_any_completion_gets_a_verdict(gold, text, protocol, opened):
    graded = MATH.grade(gold, text, protocol, prompt_opens_think=opened)
    assert graded.verdict in VERDICTS
    verdict, letter = grade_choice(text, "A", ["x", gold], protocol, prompt_opens_think=opened)
    assert verdict in ("correct", "wrong", "no_answer")
    assert letter is None or len(letter) == 1
    try:
        assert isinstance(parse_gold(gold), str)
    except ValueError:
        pass
    if protocol:
        parts = split_completion(text, protocol, prompt_opens_think=opened)
        assert parts.well_formed == (not parts.fault)
        assert format_reward(text, protocol, prompt_opens_think=opened) in (0.0, 1.0)
        assert isinstance(whole_completion(text, protocol), str)


@settings(max_examples=120)
@given(texts, st.sampled_from(PROTOCOLS), st.sampled_from(["python", "cpp"]))
def test_any_completion_is_read(text, protocol, language):
    extract_code(text, language, protocol)
    fenced_blocks(text)
    extract_answer(text, protocol, several_boxes="last")
    for parse in (
        clean,
        is_balanced,
        is_symbolic,
        boxes,
        read_object,
        read_verdict,
        read_grade,
        defused,
    ):
        parse(text)
    try:
        tokenize(text)
    except ValueError:
        pass
    assert 0 <= language_consistency(text, "en") <= 1
    assert is_language(text, "de") in (True, False)
    assert -1 <= repetition_penalty(text.split(), 2) <= 0


LONG = 20000
BOMBS = {
    "open brackets": "(" * LONG, "open braces": "{" * LONG, "balanced": "(" * LONG + "1" + ")" * LONG, "boxes": "\\boxed{" * LONG,
    "boxes in boxes": "\\boxed{" * 2000 + "1" + "}" * 2000, "fractions": "\\frac{1}{" * 3000 + "1" + "}" * 3000,
    "roots": "\\sqrt{" * 3000 + "2" + "}" * 3000, "powers": "9^" * 3000 + "9", "a tower": "9^{9^{9^{9}}}", "factorials": "9!!!!!!!!!!",
    "a factorial": "99999999!", "digits": "9" * 100000, "a fraction of digits": "1/" + "9" * 100000, "exponents": "1e" + "9" * 30,
    "a sum": "1+" * LONG + "1", "a product": "(x+1)" * 400, "a power of a sum": "(x+y+z+w)^{999}", "minus": "-" * LONG + "1",
    "commas": "1," * LONG, "tags": "<think>" * LONG, "closing tags": "</answer>" * LONG, "answers": "<answer>1</answer>" * 5000,
    "fences": "```" * LONG, "fences and tags": "```python\n" * 5000, "hashes": "#### 1\n" * 5000, "stars": "*" * LONG + "A" + "*" * LONG,
    "matrix": "\\begin{pmatrix}" * 2000, "rows": "\\begin{pmatrix}" + "1&" * 5000 + "\\end{pmatrix}", "text": "\\text{" * 5000,
    "spaces": " " * 100000 + "1" + " " * 100000, "newlines": "\n" * 100000, "letters": "x" * 100000, "words": "so it is " * LONG,
    "quotes": "'" * 50000, "backslashes": "\\" * 50000, "dollars": "$" * 50000, "binomial": "\\binom{99999}{49999}", "bars": "|" * LONG,
    "dots": "." * 50000, "sentences": "Mr. A. B. " * 5000, "json": "[" * 100000, "an object": '{"verdict":' * 20000,
    "periods": "0.\\overline{" + "9" * 5000 + "}", "units": "1 km" * 5000, "sets": "\\{" * 5000 + "\\}" * 5000, "bidi": "\u202e" * 20000,
    "colons": "12:" * 5000, "Answer": "Answer: " * 5000 + "A", "combining": "e" + "\u0301" * 50000, "cup": "(0,1)\\cup" * 2000 + "(1,2)",
    "equals": "x=" * 5000 + "1", "pm": "\\pm" * 5000 + "1", "mixed": "1 1/2 " * 5000, "subscripts": "x_" * 5000 + "1", "tabs": "\t|" * 20000,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_bounded_time(name):
    bomb = BOMBS[name]
    for text in (bomb, f"<think>a</think><answer>{bomb}</answer>", f"\\boxed{{{bomb}}}"):
        assert bounded(MATH.grade, "4", text, None).verdict in VERDICTS
    assert bounded(MATH.grade, "4", bomb, "think_answer").verdict in VERDICTS
    bounded(grade_choice, bomb, "A", ["x", "y"])
    bounded(split_completion, bomb, "cold_start")
    bounded(answer_region, bomb, None, "|special_token|", bomb)
    bounded(extract_code, bomb)
    for parse in (boxes, read_object, read_verdict, read_grade, defused, is_balanced):
        bounded(parse, bomb)
    bounded(language_consistency, bomb, "en")
    bounded(is_language, bomb, "en")
    for parse in (parse_gold, clean, tokenize):
        try:
            bounded(parse, bomb)
        except ValueError:
            pass


def test_a_gold_that_is_a_bomb_is_named():
    for name in ("a tower", "a factorial", "digits", "open brackets"):
        assert MATH.grade(BOMBS[name], "<answer>4</answer>").verdict in VERDICTS


arguments = st.dictionaries(
    st.sampled_from("keywords relation num_words num_sentences language forbidden_words letter let_frequency let_relation frequency keyword "
                    "num_paragraphs nth_paragraph first_word num_placeholders postscript_marker num_bullets num_highlights section_spliter "
                    "num_sections prompt_to_repeat end_phrase capital_relation capital_frequency".split()),
    st.one_of(st.integers(-3, 3), st.integers(), st.text(max_size=4), st.none(), st.booleans(), st.floats(), st.lists(st.text(max_size=3), max_size=2),
              st.sampled_from(["less than", "at least", "en", "(", "[", "*", "\\", "x{1,", ["("], ["a*" * 20]])), max_size=6,
)  # fmt: skip


@settings(max_examples=120)
@given(st.sampled_from(sorted(INSTRUCTIONS)), arguments, texts)
def test_any_instruction_is_checked_or_refused(name, own, text):
    try:
        check_instructions([name], [own])
    except ValueError:
        return
    assert follows_loosely(text, name, own) in (True, False)


@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_instructions_take_bounded_time(name):
    own = {
        "keywords": ["a"], "relation": "at least", "num_words": 3, "num_sentences": 3, "language": "en", "forbidden_words": ["a"], "letter": "a",
        "let_frequency": 3, "let_relation": "at least", "frequency": 3, "keyword": "a", "num_paragraphs": 3, "nth_paragraph": 1, "first_word": "a",
        "num_placeholders": 3, "postscript_marker": "P.S.", "num_bullets": 3, "num_highlights": 3, "section_spliter": "SECTION", "num_sections": 3,
        "prompt_to_repeat": "a", "end_phrase": "a", "capital_relation": "at least", "capital_frequency": 3,
    }  # fmt: skip
    check_instructions([name], [own])
    for bomb in (
        "stars",
        "spaces",
        "words",
        "sentences",
        "hashes",
        "json",
        "newlines",
        "bars",
        "quotes",
        "dots",
        "colons",
    ):
        bounded(follows_loosely, BOMBS[bomb], name, own)


columns = st.dictionaries(
    st.sampled_from("tests test_cases test_list test entry_point language code prompt inputs outputs input_output checker comparison preamble "
                    "time_limit memory_limit setup text fn_name task_id test_setup_code".split()),
    st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.text(max_size=6), st.sampled_from(
        ["python", "cpp", "lines", '{"inputs": [1], "outputs": []}', "assert f(1) == 2", "def check(f): pass"])),
        lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["input", "output", "inputs", "outputs", "fn_name"]), x, max_size=3),
        max_leaves=4), max_size=5,
)  # fmt: skip


@settings(max_examples=120)
@given(columns, st.text(max_size=5))
def test_any_programming_problem_is_read_or_refused(row, prompt):
    try:
        read_code_problem(row, prompt)
    except ValueError:
        pass


@settings(max_examples=150)
@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(["correct", "A", "A>>B"])),
                    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.sampled_from(["verdict", "grade", "preference", "a", "reason"]), x, max_size=3),
                    max_leaves=4), st.sampled_from(["{}", "```json\n{}\n```", "<think>{{</think>{}", "{}{}"]))  # fmt: skip
def test_any_reply_of_a_judge_is_read_or_none(value, form):
    reply = form.replace("{}", json.dumps(value)).replace("{{", "{")
    assert read_verdict(reply) in (None, *VERDICTS)
    grade = read_grade(reply)
    assert grade is None or -2 <= grade <= 2
