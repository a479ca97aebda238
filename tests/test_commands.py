"""The commands on a tiny checkpoint: what they write, what they say, and their exit codes."""

import json

import pytest
from tiny import CONFIG as TINY
from tiny import tiny_checkpoint, tiny_config, tiny_policy

from r1fast import __main__ as cli
from r1fast import commands
from r1fast.__main__ import COMMANDS, main, parse
from r1fast.checkpoint import NonFiniteWeightsError, load_checkpoint
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.metrics import read_metrics
from r1fast.model import load_tokenizer
from r1fast.preferences import train_reward_models
from r1fast.rejection import rejection_sample
from r1fast.reward_model import save_reward_model
from r1fast.token_budget import OutOfMemoryForGood

PROBLEMS = [{"id": f"p{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
EXAMPLES = [{"prompt": f"What is {i} + 1?", "completion": f" {i + 1}."} for i in range(8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, an empty config, problems, examples, preference data."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "model")
    (folder / "c.toml").write_text("")
    write_jsonl(folder / "problems.jsonl", PROBLEMS)
    write_jsonl(folder / "examples.jsonl", EXAMPLES)
    write_jsonl(folder / "general.jsonl", [{"prompt": "Say hi"}, {"prompt": "Say bye"}])
    return folder


def run(command, files, out, *overrides, model=True) -> int:
    path = [f"--model.path={files / 'model'}"] * model
    return main([command, str(files / "c.toml"), *TINY, *path, f"--output_dir={out}", *overrides])


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_grpo_and_the_same_command_again(files, tmp_path, capsys):
    data = (f"--data.train={files / 'problems.jsonl'}", f"--data.eval={files / 'problems.jsonl'}",
            "--eval.num_samples=2")  # fmt: skip
    assert run("grpo", files, tmp_path, *data) == 0
    assert manifest(tmp_path)["kind"] == "grpo"
    assert len(read_metrics(tmp_path)) == 4
    first = (tmp_path / "manifest.json").read_bytes()
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    # a refused run leaves everything as it was
    assert run("grpo", files, tmp_path, *data, "--grpo.kl_coef=0.9") == 2
    assert "begun with another config" in capsys.readouterr().err
    assert (tmp_path / "manifest.json").read_bytes() == first
    # another evaluation of the finished run trains nothing
    assert run("grpo", files, tmp_path, *data, "--eval.num_samples=3") == 0
    assert "all 4 steps were trained before" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert json.loads((tmp_path / "eval.json").read_text())["k"] == 3
    assert manifest(tmp_path)["config"]["eval"]["num_samples"] == 3
    # the folder belongs to grpo
    assert run("sft", files, tmp_path, f"--data.sft={files / 'examples.jsonl'}") == 2
    assert "checkpoint of stage 'grpo', this is stage 'sft'" in capsys.readouterr().err
    assert manifest(tmp_path)["kind"] == "grpo"


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_sft_and_distill(files, tmp_path, command):
    examples = f"--data.sft={files / 'examples.jsonl'}"
    evaluation = (f"--data.eval={files / 'problems.jsonl'}", "--eval.num_samples=1")
    assert run(command, files, tmp_path, examples, *evaluation) == 0
    assert manifest(tmp_path)["kind"] == command
    assert json.loads((tmp_path / "eval.json").read_text())["num_problems"] == 6
    for name in ("report.html", "model/config.json", "model/tokenizer.json", "samples.jsonl"):
        assert (tmp_path / name).is_file(), name
    assert load_checkpoint(tmp_path / "checkpoints").step == 4


def test_sft_on_problems_names_the_right_key(files, tmp_path, capsys):
    assert run("sft", files, tmp_path, f"--data.train={files / 'problems.jsonl'}") == 2
    message = capsys.readouterr().err
    assert "problems.jsonl' holds problems" in message
    assert "as data.sft" in message
    assert run("sft", files, tmp_path) == 2
    assert "data.sft is empty" in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()


def test_evaluate(files, tmp_path, capsys):
    data = f"--data.eval={files / 'problems.jsonl'}"
    # weights of reward models do not matter to an evaluation
    assert run("evaluate", files, tmp_path, data, "--eval.num_samples=2",
               "--rewards.helpfulness=1") == 0  # fmt: skip
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 12
    shown = capsys.readouterr()
    assert "6 problems, 2 samples each" in shown.out
    assert "no model for" not in shown.err
    assert run("evaluate", files, tmp_path) == 2
    assert "data.eval is empty" in capsys.readouterr().err


def test_sample(files, tmp_path, capsys, monkeypatch):
    data = f"--data.train={files / 'problems.jsonl'}"
    assert run("sample", files, tmp_path, data) == 2  # a random model is never right
    assert "kept none of 24 completions" in capsys.readouterr().err
    accounting = json.loads((tmp_path / "accounting.json").read_text())
    assert sum(accounting["dropped"].values()) == accounting["sampled"] == 24

    class AllRight:
        def __init__(self, scorer):
            self.scorer, self.prompt_opens_think = scorer, False

        def score(self, groups):
            self.scorer.score(groups)
            for group in groups:
                for c, reward in zip(group.completions, group.rewards, strict=True):
                    c.finish_reason, reward.verdict = "stop", "correct"

    def sampled(policy, problems, config, scorer, folder):
        return rejection_sample(policy, problems, config, AllRight(scorer), folder)

    monkeypatch.setattr(commands, "rejection_sample", sampled)
    monkeypatch.setattr("r1fast.rejection.protocol_hint", lambda *_: "they follow another protocol")
    assert run("sample", files, tmp_path, data, "--sample.require_format=false",
               "--sample.max_kept=2", "--sample.min_language_share=0") == 0  # fmt: skip
    kept = [row for _, row in read_jsonl(tmp_path / "sampled.jsonl")]
    assert len(kept) == 12
    shown = capsys.readouterr()
    assert "warning: they follow another protocol" in shown.err
    assert "enough kept" in shown.out
    # what was kept is what distill learns
    out = tmp_path / "student"
    assert run("distill", files, out, f"--data.sft={tmp_path / 'sampled.jsonl'}") == 0


def test_report_of_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def reward_model(files, name: str) -> str:
    """A reward model of a tiny trunk, saved once."""
    from r1fast.reward_model import load_reward_model

    path = files / name
    if not path.exists():
        tokenizer = load_tokenizer(files / "model")
        save_reward_model(load_reward_model(files / "model", seed=1), path, tokenizer=tokenizer)
    return str(path)


def test_grpo_with_a_reward_model_takes_general_prompts_from_the_start(files, tmp_path, capsys):
    data = (f"--data.train={files / 'problems.jsonl'}", f"--data.general={files / 'general.jsonl'}",
            "--rewards.general_share=0.5", "--rewards.helpfulness=1", "--grpo.num_steps=2")  # fmt: skip
    model = reward_model(files, "helpfulness")
    assert run("grpo", files, tmp_path / "a", *data, f"--rewards.helpfulness_model={model}",
               "--rewards.safety=1") == 0  # fmt: skip
    ids = [row["problem_id"] for _, row in read_jsonl(tmp_path / "a" / "completions.jsonl")]
    assert sum(i.startswith("general") for i in ids) == 4
    message = " ".join(capsys.readouterr().err.split())
    assert "no model for rewards.safety: counted as 0" in message
    assert run("grpo", files, tmp_path / "b", *data) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert "no model for rewards.helpfulness: counted as 0" in message
    ids = [row["problem_id"] for _, row in read_jsonl(tmp_path / "b" / "completions.jsonl")]
    assert not any(i.startswith("general") for i in ids)


def test_reward_models_hold_out_rows_at_random(files, tmp_path, monkeypatch):
    """A file sorted by its label would hold out one label only."""
    from r1fast import preferences

    rows = [{"prompt": "q", "response": f"r{i}", "safe": i >= 10} for i in range(20)]
    write_jsonl(tmp_path / "safety.jsonl", rows)
    seen = {}

    class Trainer:
        def __init__(self, policy, config, folder, data, *, eval_data, **kwargs):
            seen["train"], seen["eval"] = data, eval_data
            self.evaluation = {"accuracy": 1.0}

        def run(self):
            pass

    monkeypatch.setattr(preferences, "RewardTrainer", Trainer)
    monkeypatch.setattr(preferences, "EVAL_SHARE", 0.4)
    config = tiny_config(f"--data.safety={tmp_path / 'safety.jsonl'}")
    train_reward_models(config, str(files / "model"), tmp_path)
    assert {len(seen["eval"]), len(seen["train"])} == {8, 12}
    assert {r.safe for r in seen["eval"]} == {True, False}
    before = seen["eval"]
    train_reward_models(config, str(files / "model"), tmp_path)
    assert seen["eval"] == before
    write_jsonl(tmp_path / "safety.jsonl", rows[:1])
    with pytest.raises(ValueError, match=r"the safety model needs at least 2 rows.*has 1"):
        train_reward_models(config, str(files / "model"), tmp_path)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("what"), 2), (RuntimeError("what"), 1), (OSError("what"), 1),
     (FloatingPointError("what"), 3), (NonFiniteWeightsError("what"), 3), (MemoryError("what"), 4),
     (OutOfMemoryForGood("what"), 4), (RuntimeError("CUDA out of memory"), 4),
     (KeyboardInterrupt(), 130)],
)  # fmt: skip
def test_exit_codes_of_errors(files, monkeypatch, capsys, error, code):
    def fail(*args):
        raise error

    monkeypatch.setattr(commands, "run", fail)
    monkeypatch.delenv("R1FAST_DEBUG", raising=False)
    assert main(["grpo", str(files / "c.toml")]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("r1fast: ")
    if code == 1:
        assert f"{type(error).__name__}: what" in lines[0]
        monkeypatch.setenv("R1FAST_DEBUG", "1")
        assert main(["grpo", str(files / "c.toml")]) == 1
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpro", "c.toml"], "unknown command 'gpro'; known: pipeline, grpo" ),
        (["grpo"], "r1fast grpo takes a config file, got 0"),
        (["report"], "r1fast report takes a run folder, got 0"),
        (["grpo", "a.toml", "b.toml"], "got 2: ['a.toml', 'b.toml']"),
        (["grpo", "c.toml", "--only"], "unknown option '--only'; known: --force"),
        (["pipeline", "c.toml", "--from"], "--from needs a value"),
        (["grpo", "nowhere.toml"], "config file 'nowhere.toml' does not exist"),
    ],
)  # fmt: skip
def test_wrong_words(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_words_are_read_in_any_order():
    expected = ("pipeline", "c.toml", ["--grpo.kl_coef=0"], {"from": "sft", "force": "1"})
    assert parse(["pipeline", "--force", "--from", "sft", "c.toml", "--grpo.kl_coef=0"]) == expected
    assert parse(["pipeline", "c.toml", "--from=sft", "--grpo.kl_coef=0", "--force"]) == expected


def test_help_and_nothing(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert main(["grpo", "--help"]) == 0
    assert main([]) == cli.EXIT_USAGE


def test_a_chat_template_that_opens_the_thought_is_found(tmp_path):
    """make_scorer sees it in the tokenizer; without it every format reward was 0."""
    from r1fast.assemble import make_scorer

    tokenizer = tiny_policy().tokenizer
    before = tokenizer.chat_template
    config = tiny_config("--template.name=chat")
    try:
        with make_scorer(config, tokenizer=tokenizer) as scorer:
            assert not scorer.prompt_opens_think
        tokenizer.chat_template = before + "{% if add_generation_prompt %}<think>\n{% endif %}"
        with make_scorer(config, tokenizer=tokenizer) as scorer:
            assert scorer.prompt_opens_think
    finally:
        tokenizer.chat_template = before
