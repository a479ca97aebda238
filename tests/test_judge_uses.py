"""What judges are for beside rewards: preference pairs, and a reward model trained on them."""

import json
import re

import pytest
from test_judge import by_length, endpoint  # noqa: F401
from tiny import CONFIG as TINY
from tiny import tiny_checkpoint, tiny_config

from r1fast.__main__ import main
from r1fast.assemble import general_problems, make_scorer
from r1fast.data import load_problems
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.preference_pairs import make_pairs
from r1fast.rewards.chat import ChatEndpoint
from r1fast.rewards.pairwise import PairwiseJudge
from r1fast.types import Problem

GENERAL = [
    {"prompt": f"Say {word}", "answer": f"{word} " * n}
    for n, word in ((1, "hi"), (40, "bye"), (3, "so"))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "model")
    (folder / "c.toml").write_text("")
    write_jsonl(folder / "general.jsonl", GENERAL)
    write_jsonl(
        folder / "math.jsonl",
        [{"id": f"m{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)],
    )
    return folder


def run(command, files, out, url, *overrides, model=True) -> int:
    path = [f"--model.path={files / 'model'}"] * model
    judge = [f"--judge.url={url}", "--judge.model=m", "--judge.num_retries=0"] * bool(url)
    data = f"--data.general={files / 'general.jsonl'}"
    return main([command, str(files / "c.toml"), *TINY, *path, *judge, data,
                 f"--output_dir={out}", *overrides])  # fmt: skip


def test_preference_pairs_then_a_reward_model(files, tmp_path, endpoint, capsys):  # noqa: F811
    """Sampled, judged four times in random order, kept above the gap, and learnt."""
    endpoint.judge = by_length
    options = ("--template.protocol=think", "--judge.num_samples=6", "--judge.max_length_ratio=0",
               "--rollout.max_completion_tokens=16")  # fmt: skip
    assert run("preferences", files, tmp_path, endpoint.url, *options) == 0
    pairs = [row for _, row in read_jsonl(tmp_path / "preference.jsonl")]
    accounting = json.loads((tmp_path / "accounting.json").read_text())
    assert accounting["sampled"] == 3 * 15
    assert accounting["kept"] == len(pairs) == 45 - sum(accounting["dropped"].values()) > 0
    for pair in pairs:  # grades of 2 only: twice as long or more
        assert len(pair["chosen"].strip()) >= 2 * len(pair["rejected"].strip())
        assert pair["gap"] == 2.0
    judged = (
        45 - accounting["dropped"].get("same text", 0) - accounting["dropped"].get("no summary", 0)
    )
    assert accounting["judge"]["requests"] + accounting["judge"].get("cached", 0) == 4 * judged
    # as likely first as second, in so many draws
    users = [body["messages"][1]["content"] for *_, body in endpoint.requests]
    assert len(users) == 4 * judged
    assert abs(accounting["position_bias"]) < 0.5
    assert accounting["mean_chosen_chars"] > accounting["mean_rejected_chars"]
    capsys.readouterr()
    out = tmp_path / "rm"
    learn = (f"--data.preference={tmp_path / 'preference.jsonl'}", "--sft.max_steps=3")
    assert run("reward-model", files, out, "", *learn) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    assert (out / "helpfulness/config.json").is_file()
    assert json.loads((out / "manifest.json").read_text())["kind"] == "reward-model"
    assert run("reward-model", files, out, "", *learn) == 0  # nothing is trained again
    assert "all 3 steps were trained before" in capsys.readouterr().out
    assert run("reward-model", files, out, "", *learn, "--optim.lr=0.5") == 2
    assert "begun with another config" in capsys.readouterr().err
    assert run("reward-model", files, tmp_path / "none", "") == 2
    assert "data.preference and data.safety are empty" in capsys.readouterr().err


def pairwise(url) -> PairwiseJudge:
    return PairwiseJudge(ChatEndpoint(url, "m", num_retries=0))


def test_given_responses_are_judged_without_a_model(tmp_path, endpoint):  # noqa: F811
    endpoint.judge = by_length
    texts = [
        ["word" * 4, "word" * 2],  # twice as long: kept
        ["word", "wordy"],  # a grade of 1 is not above 1
        ["word " * 9, "word"],  # too different in length
        ["same", "same "],
        ["", "text"],
    ]
    problems = [
        Problem(f"q{i}", None, f"p{i}", "general", meta={"responses": t})
        for i, t in enumerate(texts)
    ]
    rows = make_pairs(problems, tiny_config(), pairwise(endpoint.url), tmp_path)
    assert rows == [
        {"id": "p0/0", "prompt": "q0", "chosen": texts[0][0], "rejected": texts[0][1], "gap": 2.0}
    ]
    accounting = json.loads((tmp_path / "accounting.json").read_text())
    assert accounting["dropped"] == {
        "gap too small": 1, "lengths differ": 1, "no summary": 1, "same text": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no pair of 1 was kept: \{'gap too small': 1\}"):
        make_pairs(problems[1:2], tiny_config(), pairwise(endpoint.url), tmp_path)
    with pytest.raises(
        ValueError, match=r"judge failed': 1\}; the judge's last failure: .*reached"
    ):
        make_pairs(problems[:1], tiny_config(), pairwise("http://127.0.0.1:9"), tmp_path)
    with pytest.raises(ValueError, match="no 'responses', and there is no model to sample them"):
        make_pairs([Problem("q", None, "p")], tiny_config(), pairwise(endpoint.url), tmp_path)
    bad = Problem("q", None, "p", "general", meta={"responses": ["one"]})
    with pytest.raises(ValueError, match="'responses' must be a list of two or more texts"):
        make_pairs([bad], tiny_config(), pairwise(endpoint.url), tmp_path)


def test_a_judge_of_places_alone_makes_no_pairs(tmp_path, endpoint):  # noqa: F811
    """One that always says A>>B has a mean gap of 2 only where all four draws show the same first."""
    endpoint.judge = lambda system, user: '{"verdict": "A>>B"}'
    problems = [
        Problem(f"q{i}", None, f"p{i}", "general", meta={"responses": ["one", "two"]})
        for i in range(64)
    ]
    judge = pairwise(endpoint.url)
    rows = make_pairs(problems, tiny_config(), judge, tmp_path)
    assert len(rows) < 16  # 1 in 8 by chance: the paper's four draws do not forbid it
    assert judge.metrics()["position_bias"] == 1.0  # and this tells


def test_grpo_with_a_judge_of_general_prompts(files, tmp_path, endpoint, capsys):  # noqa: F811
    endpoint.judge = by_length
    data = (f"--data.train={files / 'math.jsonl'}", "--rewards.judge=1", "--grpo.num_steps=2",
            "--rewards.general_share=0.5", "--template.protocol=think")  # fmt: skip
    assert run("grpo", files, tmp_path, endpoint.url, *data) == 0
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 <= row["rewards/judge/mean"] <= 1
    assert row["judge/requests"] > 0
    assert row["judge/position_bias"] == row["judge/failed"] == 0
    assert any(
        re.search("Question:\nSay", b["messages"][1]["content"]) for *_, b in endpoint.requests
    )
    capsys.readouterr()
    assert run("grpo", files, tmp_path / "b", "", *data) == 0
    assert "no judge for rewards.judge: counted as 0" in " ".join(capsys.readouterr().err.split())


def test_references(tmp_path):
    write_jsonl(tmp_path / "g.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
    asked = f"--data.general={tmp_path / 'g.jsonl'}"
    assert [p.answer for p in general_problems(tiny_config(asked))] == [None, None]
    assert [p.answer for p in general_problems(tiny_config(asked, "--rewards.judge=1"))] == [
        "b",
        None,
    ]
    write_jsonl(tmp_path / "g.jsonl", [{"prompt": "c"}])
    with pytest.raises(ValueError, match=r"rewards.judge compares with a reference, and no row"):
        general_problems(tiny_config(asked, "--rewards.judge=1"))


# --- weights by kind


def test_weights_by_kind():
    config = tiny_config(
        "--rewards.format=0.5", "--rewards.helpfulness=1", "--rewards.by_kind.qa.accuracy=2",
        "--rewards.by_kind.qa.format=0", "--rewards.by_kind.math={safety = 0.5}",
    )  # fmt: skip
    w = config.rewards
    off = {"language": 0.0, "overlong": 0.0, "repetition": 0.0, "judge": 0.0}
    assert w.weights("general") == off | {
        "accuracy": 1.0, "format": 0.5, "helpfulness": 1.0, "safety": 0.0,
    }  # fmt: skip
    assert w.weights("qa") == off | {
        "accuracy": 2, "format": 0, "helpfulness": 0.0, "safety": 0.0,
    }  # fmt: skip
    assert w.weights("math") == off | {
        "accuracy": 1.0, "format": 0.5, "helpfulness": 0.0, "safety": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("poetry.accuracy=1", "rewards.by_kind.poetry: unknown kind of problem; known: math, "),
        ("math.beauty=1", "unknown reward rewards.by_kind.math.beauty; known: accuracy, format"),
        ("math.format=-1", r"rewards.by_kind.math.format must be a weight of at least 0, got -1"),
        ("math=3", "rewards.by_kind.math must be a table of reward = weight, got 3"),
        ("math.format=nan", "must be a weight of at least 0, got nan"),
    ],
)
def test_errors_of_weights_by_kind(override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(f"--rewards.by_kind.{override}")


def test_an_unknown_kind_names_the_line(tmp_path):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "kind": "poetry"}]
    write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=r"p\.jsonl:2: 'kind' must be one of math, .*got 'poetry'"):
        load_problems(tmp_path / "p.jsonl")


def test_the_scorer_routes_by_kind(endpoint):  # noqa: F811
    from r1fast.rewards.math import MathReward
    from r1fast.rewards.score import RewardScorer, check_problems
    from r1fast.types import Completion, RolloutGroup

    endpoint.judge = lambda system, user: '{"verdict": "correct"}'
    config = tiny_config(
        f"--judge.url={endpoint.url}", "--judge.model=m", "--template.protocol=think",
        "--rewards.overlong=1", "--rewards.overlong_cache=7", "--rewards.by_kind.qa.overlong=0",
        "--rewards.by_kind.qa.accuracy=3", "--rewards.by_kind.qa.format=0.25",
    )  # fmt: skip
    text = "<think> so </think> 8"
    groups = [
        RolloutGroup(
            Problem("q", "8", kind, kind), [1], [Completion([1] * 8, [0.0] * 8, "stop", text)]
        )
        for kind in ("math", "qa", "general")
    ]
    with make_scorer(config) as scorer:
        scorer.grader.close()
        scorer.grader = MathReward(symbolic=False)
        scorer.score(groups)
    math, qa, general = (group.rewards[0] for group in groups)
    assert math.total == 1.0 + 1.0 - 1.0
    assert qa.total == 3.0 + 0.25
    assert "overlong" not in qa.parts
    assert general.total == 1.0 - 1.0
    nothing = tiny_config("--rewards.by_kind.math={accuracy = 0, format = 0}").rewards
    with pytest.raises(
        ValueError, match=r"'math' has no reward: every weight of rewards.by_kind.m"
    ):
        check_problems([groups[0].problem], nothing)
    # a preference reward may be asked for verified problems too
    from r1fast.rewards.preference import PreferenceRewards

    wide = tiny_config("--rewards.by_kind.math.safety=0.5").rewards
    with pytest.raises(ValueError, match=r"rewards.safety = 0.5 needs a safety model"):
        RewardScorer(wide, config.template, 8, grader=MathReward(symbolic=False))
    preference = PreferenceRewards(config.template, safety=lambda pairs: [0.5] * len(pairs))
    with RewardScorer(wide, config.template, 8, preference, grader=MathReward(symbolic=False)) as s:
        s.score(groups[:1])
    assert groups[0].rewards[0].parts["safety"] == 0.5
    assert groups[0].rewards[0].total == 2.25
