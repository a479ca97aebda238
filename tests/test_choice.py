"""Multiple choice: the letter that a response commits to, and nothing that only looks like one."""

import time

import pytest

from r1fast.rewards.choice import extract_choice, grade_choice

OPTIONS = ["Paris", "Rome", "A dog", "42"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("Ｂ", "B"),
        ("Option B", "B"),
        ("B) Rome", "B"),
        ("B. Rome", "B"),
        ("Rome", "B"),
        ("A dog", "C"),
        ("42", "D"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\text{Rome}}", "B"),
        (r"The final answer is $\boxed{D}$.", "D"),
        ("Answer: B", "B"),
        ("Answer: b", "B"),
        ("**Answer: B**", "B"),
        ("**Answer:** B", "B"),
        ("Answer:\nD", "D"),
        ("Answer: $B$", "B"),
        ("Answer: `C`", "C"),
        (r"Answer: \textbf{C}", "C"),
        ("Answer: option C", "C"),
        ("Answer: D) 42", "D"),
        ("Answer: D 42", "D"),
        ("Answer: A dog", "C"),  # the option's text, not the letter A
        ("Answer: 42", "D"),
        ("The answer is Rome.", "B"),
        ("The correct answer is (B).", "B"),
        ("the answer is (a)", "A"),
        ("The answer is B because A is wrong", "B"),
        ("The best option is C.", "C"),
        ("The correct choice is **(D)**, since 6*7=42", "D"),
        ("Final Answer: The answer is C", "C"),
        ("Answer: A.\nB is wrong since it is in Italy", "A"),
        ("My answer would be\n(C)", "C"),
        ("So it is\n\nB", "B"),
        ("答案：B", "B"),
        ("答案是 B。", "B"),
        ("Answer: E", "E"),  # a letter that is no option: an answer, and a wrong one
        ("thought</think>Answer: A", "A"),
    ],
)
def test_what_is_an_answer(text, letter):
    assert extract_choice(text, OPTIONS).letter == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog is an animal",
        "A man walks in",
        "I think so",
        "An answer I like",
        "The answer is a tricky one",
        "The answer is a",
        "The answer: I don't know",
        "answer is I",
        "The answer is not A",
        "The answer isn't A.",
        "The answer is A man",
        "The answer depends on A",
        "The answer choice A is tempting",
        "Answer: Both",
        "Answer: A dog is the best",
        "answer: none of A, B",
        "Option A is wrong. Option B is right.",
        "Option A: this is wrong",
        "A. Paris\nB. Rome\nC. A dog\nD. 42",  # the options once more
        "I\nII",
        "B and C",
        "A, B",
        "<think>Answer: A",
        "Answer: A\n<think>",
        r"\boxed{}",
        r"\boxed{Berlin}",
    ],
)
def test_what_is_none(text):
    assert extract_choice(text, OPTIONS).letter is None


@pytest.mark.parametrize(
    "text",
    ["Answer: A or B", "Answer: (A) or (B)", "Answer: A, B", "Answer: A/B", "Answer: A\nWait.\nAnswer: B",
     r"\boxed{A} or \boxed{B}"],
)  # fmt: skip
def test_two_answers_are_wrong(text):
    assert grade_choice(text, "A", OPTIONS) == ("wrong", None)


def test_the_protocols_place():
    inside = "<think> Answer: A </think> <answer> B </answer>"
    assert grade_choice(inside, "B", OPTIONS, "think_answer") == ("correct", "B")
    assert grade_choice("<think> B </think> <answer> I am sure </answer>", "B", OPTIONS, "think_answer") == (
        "no_answer", None,
    )  # fmt: skip
    assert grade_choice("<think>Answer: B", "B", OPTIONS, "think") == ("no_answer", None)
    opened = "it is B </think> The answer is (C)."
    assert grade_choice(opened, "B", OPTIONS, "think", prompt_opens_think=True) == ("wrong", "C")


def test_options_that_are_equal_name_no_letter():
    assert extract_choice("same", ["same", "same", "other"]).letter is None
    assert extract_choice("other", ["same", "same", "other"]).letter == "C"


def test_a_gold_that_is_no_letter():
    with pytest.raises(ValueError, match="a letter from A to D, got 'E'"):
        grade_choice("A", "E", OPTIONS)
    with pytest.raises(ValueError, match="got '2'"):
        grade_choice("A", "2", OPTIONS)


@pytest.mark.parametrize(
    "text", ["answer " * 10_000, "A" + ")" * 20_000 + "x", "B) " * 10_000, "(" * 30_000]
)
def test_degenerate_responses_take_no_time(text):
    start = time.perf_counter()
    assert extract_choice(text, ["a", "b"]).letter is None
    assert time.perf_counter() - start < 3
