"""Scoring a rollout: parts, totals, language, length, filters, preference models."""

import json
import math
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1fast.config import GRPOConfig, RewardConfig, TemplateConfig
from r1fast.grpo import rollout_advantages
from r1fast.protocol import split_completion
from r1fast.rewards import filters
from r1fast.rewards.language import check_language, language_consistency
from r1fast.rewards.length import overlong_penalty, repetition_penalty
from r1fast.rewards.math import Graded, MathReward
from r1fast.rewards.preference import PreferenceRewards
from r1fast.rewards.score import RewardScorer, check_problems
from r1fast.types import Completion, Problem, RolloutGroup

CASES = Path(__file__).parents[2] / "shared" / "cases"
LEXICON = {"en": ["is", "so"], "zh": ["shi", "suoyi"]}
RIGHT = "<think> 3 + 5 is 8 so </think> <answer> 8 </answer>"
WRONG = "<think> 3 + 5 shi 7 so </think> <answer> 7 </answer>"
BROKEN = "<think> 3 + 5 shi 8 <answer> 8"


def completion(text):
    ids = list(range(len(text.split())))
    return Completion(ids, [0.0] * len(ids), "stop", text)


def group(*texts, answer="8", kind="math", **meta):
    problem = Problem("3 + 5", answer, id="p", kind=kind, meta=meta)
    return RolloutGroup(problem, [1, 2], [completion(text) for text in texts])


def scorer(config=None, preference=None, **kwargs):
    kwargs.setdefault("grader", MathReward(symbolic=False))
    return RewardScorer(config or RewardConfig(), TemplateConfig(), 20, preference, **kwargs)


def test_parts_and_totals():
    rollout = group(RIGHT, WRONG, BROKEN)
    config = RewardConfig(language=0.5, lexicon=LEXICON)
    with scorer(config) as s:
        s.score([rollout])
    right, wrong, broken = rollout.rewards
    assert right.parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert (right.total, right.verdict, right.answer) == (2.5, "correct", "8")
    assert wrong.parts == {"accuracy": 0.0, "format": 1.0, "language": 0.5}
    assert (wrong.total, wrong.verdict, wrong.answer) == (1.25, "wrong", "7")
    assert broken.parts == {"accuracy": 0.0, "format": 0.0, "language": 0.0}
    assert (broken.verdict, broken.answer) == ("no_answer", None)
    assert s.counts == {"correct": 1, "wrong": 1, "no_answer": 1}


def test_parts_that_do_not_apply_are_none_and_left_out():
    rollout = group("<answer> 8 </answer>", "<think> </think> <answer> 8 </answer>")
    with scorer(RewardConfig(language=1.0, lexicon=LEXICON)) as s:
        s.score([rollout])
    assert [r.parts["language"] for r in rollout.rewards] == [None, None]  # no CoT, an empty CoT
    assert [r.total for r in rollout.rewards] == [1.0, 2.0]


def test_general_prompts_have_format_and_no_accuracy():
    """Equation 10 of the paper: reward model and format for general data."""
    rollout, verifiable = group(RIGHT, BROKEN, kind="general", answer=None), group(RIGHT)
    with scorer() as s:
        s.score([rollout, verifiable])
    assert rollout.rewards[0].parts == {"format": 1.0, "language": 1.0}  # measured, at weight 0
    assert (rollout.rewards[0].total, rollout.rewards[0].verdict) == (1.0, None)
    assert rollout.rewards[1].parts["format"] == 0.0
    assert verifiable.rewards[0].parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0}


def test_length_parts():
    long = "<think> " + "a " * 16 + "</think> <answer> 8 </answer>"
    rollout = group(long, RIGHT)
    with scorer(RewardConfig(overlong=0.5, repetition=2.0, overlong_cache=10)) as s:
        s.score([rollout])
    assert rollout.rewards[0].parts["overlong"] == -1.0
    assert rollout.rewards[0].total == 2.0 - 0.5
    assert rollout.rewards[1].parts["overlong"] == pytest.approx(-0.1)  # 11 tokens
    assert rollout.rewards[1].parts["repetition"] == 0.0


class Grader:
    """A grader that fails on some completions."""

    def __init__(self, verdicts):
        self.verdicts = verdicts  # by text

    def grade_all(self, rows, *args, **kwargs):
        return [Graded(self.verdicts[text], "8") for _, text in rows]

    def close(self):
        pass


def test_a_failed_grader_is_no_zero_and_stops_the_run_when_it_fails_often():
    rollout = group(RIGHT, WRONG)
    with scorer(grader=Grader({RIGHT: "error", WRONG: "timeout"})) as s:
        s.score([rollout])
    assert rollout.rewards[0].parts == {"accuracy": None, "format": 1.0, "language": 1.0}
    assert (rollout.rewards[0].total, rollout.rewards[0].verdict) == (1.0, "error")
    assert rollout.rewards[1].parts["accuracy"] == 0.0
    assert s.errors["accuracy"] == 1
    grader = Grader({BROKEN: "error", RIGHT: "correct"})
    with (
        scorer(grader=grader) as s,
        pytest.raises(RuntimeError, match="failed on 6 of 10 completions"),
    ):
        s.score([group(*[BROKEN] * 6, *[RIGHT] * 4)])
    assert s.counts["error"] == 6


def test_what_the_grader_failed_on_has_no_advantage():
    verdicts = {RIGHT: "correct", WRONG: "wrong", BROKEN: "error"}
    rollout, alone = group(RIGHT, WRONG, BROKEN, RIGHT), group(BROKEN, BROKEN)
    with scorer(grader=Grader(verdicts), max_error_share=1.0) as s:
        s.score([rollout, alone])
    totals = [r.total for r in rollout.rewards]
    assert totals == [2.0, 1.0, pytest.approx(5 / 3), 2.0]
    assert rollout.rewards[2].verdict == "error"
    assert rollout.rewards[2].parts["accuracy"] is None
    advantages = rollout_advantages([rollout], GRPOConfig())[0]
    assert advantages[2] == pytest.approx(0, abs=1e-12)
    assert advantages[0] > 0 > advantages[1]
    assert len({r.total for r in alone.rewards}) == 1  # nobody knows: no gradient


def test_calls_for_a_few_groups_each_count_as_one_call():
    """A group on which the grader fails is no reason to stop; most of a step is."""
    verdicts = {RIGHT: "correct", BROKEN: "error"}
    broken, fine = group(*[BROKEN] * 10), group(*[RIGHT] * 10)
    with scorer(grader=Grader(verdicts)) as s:
        with pytest.raises(RuntimeError, match="failed on 10 of 10"):
            s.score([broken])
        with s.as_one_call():
            s.score([broken])
            s.score([fine])
        s.score([broken, fine])
        with pytest.raises(RuntimeError, match="failed on 20 of 30"), s.as_one_call():
            for part in (broken, fine, broken):
                s.score([part])
        s.score([fine])
    assert [r.verdict for r in broken.rewards] == ["error"] * 10


def test_a_prompt_that_opens_the_thought():
    rollout = group(RIGHT.removeprefix("<think>"))
    with scorer(prompt_opens_think=True) as s:
        s.score([rollout])
    assert rollout.rewards[0].parts["format"] == 1.0
    assert rollout.rewards[0].total == 2.0


def test_user_rewards_follow_trls_contract(capsys):
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, ids=completion_ids)
        return [1.0, None, float("nan")]

    rollout = group(RIGHT, WRONG, BROKEN, level=3)
    with scorer(extra={"mine": (reward, 0.25)}) as s:
        s.score([rollout])
    assert [r.parts["mine"] for r in rollout.rewards] == [1.0, None, None]
    assert rollout.rewards[0].total == 2.25
    assert s.errors["mine"] == 1  # NaN is a failure, None is not
    assert "reward 'mine' returned nan for problem" in " ".join(capsys.readouterr().err.split())
    assert seen["prompts"] == ["3 + 5"] * 3
    assert seen["answer"] == ["8"] * 3
    assert seen["level"] == [3] * 3
    assert seen["completions"] == [RIGHT, WRONG, BROKEN]
    assert seen["ids"][0] == rollout.completions[0].token_ids


def test_user_rewards_of_wrong_length_or_name():
    with (
        scorer(extra={"short": (lambda **_: [1.0], 1.0)}) as s,
        pytest.raises(ValueError, match="reward 'short' returned 1 scores for 2 completions"),
    ):
        s.score([group(RIGHT, WRONG)])
    with (
        scorer(extra={"none": (lambda **_: None, 1.0)}) as s,
        pytest.raises(ValueError, match="reward 'none' must return a list, got NoneType"),
    ):
        s.score([group(RIGHT)])
    with pytest.raises(ValueError, match="'format' has the name of a built-in"):
        scorer(extra={"format": (lambda **_: [], 1.0)})


def test_preference_models_see_what_they_should():
    seen = {}

    def model(name):
        def score(pairs):
            seen[name] = pairs
            return [float(len(seen[name]))] * len(pairs)

        return score

    template = TemplateConfig()
    preference = PreferenceRewards(template, helpfulness=model("help"), safety=model("safe"))
    config = RewardConfig(helpfulness=1.0, safety=0.5, preference_last_steps=2, lexicon=LEXICON)
    general, maths = group(RIGHT, BROKEN, kind="general", answer=None), group(RIGHT)
    with scorer(config, preference) as s:
        s.score([general, maths], step_from_end=1)
        assert seen["help"] == [("3 + 5", "8")]  # the summary only, where there is one
        assert seen["safe"] == [("3 + 5", RIGHT), ("3 + 5", BROKEN)]  # the whole response
        assert [r.parts for r in general.rewards] == [
            {"format": 1.0, "language": 1.0, "helpfulness": 1.0, "safety": 2.0},
            {"format": 0.0, "language": 0.0, "helpfulness": 1.0, "safety": 2.0},
        ]
        assert [r.total for r in general.rewards] == [3.0, 2.0]
        assert "helpfulness" not in maths.rewards[0].parts
        seen.clear()
        s.score([general], step_from_end=2)  # not yet among the last two steps
        assert seen == {}
        assert general.rewards[0].parts == {"format": 1.0, "language": 1.0}


def test_a_response_without_a_summary_is_as_unhelpful_as_the_worst_of_its_group():
    """None would count 0, more than a response that the model scores -2."""
    marks = {"8": -2.0, "7": 1.5}
    preference = PreferenceRewards(
        TemplateConfig(), helpfulness=lambda pairs: [marks[answer] for _, answer in pairs]
    )
    one = group(RIGHT, BROKEN, WRONG, kind="general", answer=None)
    other = group(WRONG, BROKEN, kind="general", answer=None)
    nothing = group(BROKEN, BROKEN, kind="general", answer=None)
    with scorer(RewardConfig(helpfulness=1.0, format=0.0), preference) as s:
        s.score([one, other, nothing])
    scores = [[r.parts["helpfulness"] for r in g.rewards] for g in (one, other, nothing)]
    assert scores == [[-2.0, -2.0, 1.5], [1.5, 1.5], [None, None]]
    assert [r.total for r in one.rewards] == [-2.0, -2.0, 1.5]
    assert [r.total for r in nothing.rewards] == [0.0, 0.0]


def test_preference_errors():
    config = RewardConfig(safety=1.0)
    with pytest.raises(ValueError, match=r"rewards\.safety = 1\.0 needs a safety model"):
        scorer(config)
    for scores, match in (([float("nan")], "gave nan"), ([1.0, 2.0], "2 scores for 1")):
        preference = PreferenceRewards(TemplateConfig(), safety=lambda _, scores=scores: scores)
        with scorer(config, preference) as s, pytest.raises(ValueError, match=match):
            s.score([group(RIGHT, kind="general", answer=None)])


def test_problems_are_checked_before_the_first_step():
    problem = Problem("a", "1", language="xx")
    check_problems([problem], RewardConfig())
    with pytest.raises(ValueError, match=r"'xx' is not among the known languages: ar, .*, zh"):
        check_problems([problem], RewardConfig(language=1.0))
    with pytest.raises(ValueError, match="among the lexicon: en, zh"):
        check_problems([problem], RewardConfig(language=1.0, lexicon=LEXICON))


# --- length


def test_overlong_penalty_is_dapos():
    assert [overlong_penalty(n, 20, 10) for n in (0, 10, 15, 20, 30)] == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(9, 10) == -0.5  # a fifth of 10
    with pytest.raises(ValueError, match=r"in \[0, 10\] tokens, got 11"):
        overlong_penalty(1, 10, 11)


def test_repetition_penalty():
    assert repetition_penalty([1, 2, 3, 4], ngram=2) == 0.0
    assert repetition_penalty([1, 1, 1, 1, 1], ngram=2) == -0.75
    assert repetition_penalty([1], ngram=2) == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        repetition_penalty([1], 0)


# --- language


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("", "en", 1.0),
        ("1 + 2 = 3", "en", 1.0),
        ("We add two and three.", "en", 1.0),
        ("We add. 我们加。", "en", 2 / 5),
        ("We add. 我们加。", "zh", 3 / 5),
        ("ひらがなと漢字。", "ja", 1.0),
        ("漢字だけでは無い。 今天好。", "zh", 3 / 11),  # Han beside kana is Japanese
        ("Мы считаем three", "ru", 2 / 3),
        ("우리는 더한다 ok", "ko", 2 / 3),
        ("我们有 $x = 3$ and $\\frac{abc}{d}$。", "zh", 3 / 4),
        ("我们看 ```python\nfor i in range(3): print(i)\n``` 好", "zh", 1.0),
        ("我们看 https://example.org/some/page 和 my_variable_name 与 foo() 好", "zh", 1.0),
        ("所以 x = 3, y + 2", "zh", 1.0),  # variables are no words
        ("\\boxed{yes} 好", "zh", 1.0),
    ],
)
def test_language_share(text, target, share):
    assert language_consistency(text, target) == pytest.approx(share)


def test_a_lexicon_decides_alone():
    text = "3 is 4 so 5 shi 6 other words suoyi"
    assert language_consistency(text, "en", lexicon=LEXICON) == 0.5
    assert language_consistency("3 4 5", "en", lexicon=LEXICON) == 1.0


def test_unknown_language_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'klingon' is not among the known languages: ar, bg"):
        check_language("klingon")
    problems = [Problem("a", "1", id="a.jsonl:1"), Problem("b", "1", id="a.jsonl:2", language="xx")]
    with pytest.raises(ValueError, match=r"problem 'a\.jsonl:2': language 'xx' .* to one of them"):
        check_problems(problems, RewardConfig(language=1.0))


needs_cases = pytest.mark.skipif(
    not CASES.is_dir(), reason="../shared/cases is not beside the repo"
)


needs_lingua = pytest.mark.skipif(
    find_spec("lingua") is None,
    reason="lingua-language-detector is missing: Latin languages are not told apart; "
    "pip install lingua-language-detector",
)


@needs_cases
@pytest.mark.parametrize(
    ("latin", "mean", "largest"),
    [(False, 0.02, 0.05), pytest.param(True, 0.10, 0.10, marks=needs_lingua)],
    ids=["across scripts", "within Latin"],
)
def test_mixed_language_cases(latin, mean, largest):
    """Errors of the share over texts of known ratio."""
    errors = []
    for line in (CASES / "langmix.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if ({case["target"], case["other"]} <= {"en", "fr", "de", "es"}) == latin:
            share = language_consistency(case["text"], case["target"])
            assert share == language_consistency(case["text"], case["target"])
            errors.append(abs(share - case["ratio"]))
    assert len(errors) >= 60
    assert sum(errors) / len(errors) < mean
    assert max(errors) < largest


@needs_lingua
def test_latin_languages_are_told_apart_beside_maths_code_and_names():
    german = "Wir addieren zuerst die beiden Zahlen und teilen danach das Ergebnis durch zwei."
    english = "Then we divide the remaining number by the sum of all its digits once more."
    noise = " $x = \\frac{abc}{d}$ ```python\nprint(total_sum)\n``` https://example.org/le/chat "
    share = language_consistency(f"{german} {noise} {english}", "de")
    assert share == pytest.approx(13 / 28)
    assert language_consistency(german + noise, "de") == 1.0
    assert language_consistency("Let x be prime.", "de") == 1.0  # in doubt the target


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["en", "zh", "ja", "ru"]))
def test_any_text_has_a_share(text, target):
    assert 0.0 <= language_consistency(text, target) <= 1.0


# --- filters


def test_filters_say_why():
    good = split_completion("<think> a is b </think> <answer> 8 </answer>")
    assert filters.malformed(good) is None
    assert filters.malformed(split_completion(BROKEN)) == "format: no </think>"
    assert filters.language_mix(good, "en", 0.9, lexicon=LEXICON) is None
    mixed = split_completion("<think> is shi </think> <answer> 8 </answer>")
    assert filters.language_mix(mixed, "en", 0.9, lexicon=LEXICON).startswith("mixed language: 0.5")
    assert filters.language_mix(mixed, "en", 0, lexicon=LEXICON) is None
    assert filters.long_paragraph(good, 3) is None
    assert filters.long_paragraph(good, 2) == "long paragraph: 3 words, 2 are allowed"
    assert filters.long_paragraph(good, 0) is None
    chinese = split_completion("<think>" + "好" * 9 + "</think><answer>8</answer>")
    assert filters.long_paragraph(chinese, 8).startswith("long paragraph: 9")
    code = split_completion("<think> so\n```python\nx = 1\n```\n</think><answer>8</answer>")
    assert filters.code_block(code) == "code block: fenced"
    assert filters.code_block(good) is None
    once = filters.Duplicates()
    assert once("p", "A b.") is None
    assert once("q", "A b.") is None
    assert once("p", "a  B").startswith("duplicate")


def test_rewards_import_no_torch_and_score_nothing_by_default():
    code = (
        "import sys, r1fast.rewards as r; r.RewardScorer; r.Judge; r.MathReward\n"
        "sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    )
    root = str(Path(__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    with scorer() as s:
        s.score([])
    assert math.isfinite(s.total({}))


@pytest.mark.parametrize(
    "unit", ["a", "a.", "\\[", "\\begin{a}", "a@", "a_", "$a", "aB", "好", "\\boxed{"]
)
def test_language_is_read_in_linear_time(unit):
    """What a policy repeats for ever must not hold up the trainer: 20 times as long, not 400."""
    seconds = []
    for count in (1_000, 20_000):
        start = time.perf_counter()
        language_consistency(unit * count, "zh" if unit == "好" else "en")
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < max(200 * seconds[0], 1.5)


CHINESE = "我们先把两个数字相加然后除以二就得到答案"


@pytest.mark.parametrize("text", [
    f"```\n{CHINESE}", f"```\n{CHINESE}\n```", f"`{CHINESE}`", f"$ {CHINESE}$", rf"\({CHINESE}\)", rf"\boxed{{{CHINESE}}}",
    f"<a {CHINESE}>", f"http://{CHINESE}", f"{CHINESE}@a.b", f"{CHINESE}()", rf"\begin{{a}}{CHINESE}\end{{a}}", f"&{CHINESE};",
    "ვიმსჯელოთ ნაბიჯ ნაბიჯ", "យើងគិតម្តងមួយជំហាន",
])  # fmt: skip
def test_another_language_cannot_hide(text):
    assert language_consistency(text, "en") < 0.05


def test_points_units_and_functions_are_of_every_language():
    text = "设 x 为未知数，则 AB = CD，三角形 ABC 的面积 S 为 5 cm，sin 值为 0.5"
    assert language_consistency(text, "zh") == 1.0
    assert language_consistency("print('这里') 是 total_sum 的值。" + CHINESE, "zh") > 0.9
