import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from r1fast.__main__ import main
from r1fast.config import STAGES, Config, load_config, stage_config, to_dict

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_override_wins_over_the_file(tmp_path):
    path = write(tmp_path, "[grpo]\nkl_coef = 0.1\n")
    assert load_config(path).grpo.kl_coef == 0.1
    assert load_config(path, ["--grpo.kl_coef=0"]).grpo.kl_coef == 0.0
    assert load_config(path, ["--grpo.kl_coef=0", "--grpo.kl_coef=0.3"]).grpo.kl_coef == 0.3


def test_values_of_every_type():
    c = load_config(
        None,
        [
            "--seed=7",
            "--optim.lr=1e-6",
            "--log.wandb=true",
            "--data.train=some/file.jsonl",
            "--data.eval=two words",
            "--pipeline.stages=['base', 'sft']",
            "--rewards.lexicon={en = ['so']}",
            "--template.prompt=Q: {prompt}\\n",
            "--grpo.kl_coef=1",
        ],
    )
    assert (c.seed, c.optim.lr, c.log.wandb, c.grpo.kl_coef) == (7, 1e-6, True, 1.0)
    assert type(c.grpo.kl_coef) is float
    assert (c.data.train, c.data.eval) == ("some/file.jsonl", "two words")
    assert c.pipeline.stages == ["base", "sft"]
    assert c.rewards.lexicon == {"en": ["so"]}


def test_without_a_file_the_defaults():
    assert load_config(None) == Config()
    assert to_dict(Config())["grpo"]["ref_refresh_steps"] == 400


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    config = load_config(path)
    for stage in STAGES:
        stage_config(config, stage)


def test_there_are_shipped_configs():
    assert "demo" in [p.stem for p in CONFIGS]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--grpo.clip_eps_hi=0.3",
            r"unknown config key 'grpo.clip_eps_hi' \(did you mean 'clip_eps_high'\?\); known "
            "here: num_steps, prompts_per_step",
        ),
        ("--grop.kl_coef=1", r"unknown config key 'grop' \(did you mean 'grpo'\?\)"),
        ("--xyzzy=1", "unknown config key 'xyzzy'; known here: seed, output_dir, model"),
        ("--grpo=1", "grpo is a section, got the value 1"),
        ("--seed.x=1", "seed must be a whole number"),
        ("--grpo.max_rollout_factor=0", "grpo.max_rollout_factor must be at least 1, got 0"),
        ("--grpo.max_logprob_mismatch=-1", "max_logprob_mismatch must be at least 0, got -1.0"),
        ("--grpo.std_eps=-1", "grpo.std_eps must be at least 0, got -1.0"),
        ("--checkpoint.keep_last=0", "checkpoint.keep_last must be at least 1, got 0"),
        ("--checkpoint.deadline_seconds=0", "deadline_seconds must be above 0 seconds, got 0.0"),
        (
            "--log.watchdog_seconds=-1",
            r"watchdog_seconds must be at least 0 \(0 is off\), got -1.0",
        ),
        ("--eval.every_num_problems=0", "eval.every_num_problems must be at least 1, got 0"),
        ("--eval.every_num_samples=0", "eval.every_num_samples must be at least 1, got 0"),
        ("--grpo.num_steps=1.5", "grpo.num_steps must be a whole number, got 1.5"),
        ("--grpo.num_steps=true", "grpo.num_steps must be a whole number, got True"),
        ("--optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("--optim.lr=nan", "optim.lr must be a number, got nan"),
        ("--log.wandb=1", "log.wandb must be true or false, got 1"),
        ("--data.train=3", "data.train must be a string, got 3"),
        ("--pipeline.stages=base", "pipeline.stages must be a list, got 'base'"),
        (
            "--grpo.loss_type=bnpo",
            "grpo.loss_type must be one of 'grpo', 'dapo', 'dr_grpo', 'gspo', 'cispo', 'sapo', 'luspo', got 'bnpo'",
        ),
        ("--model.dtype=3", "model.dtype must be one of 'bfloat16', 'float32', got 3"),
        ("--rollout.num_generations=0", "rollout.num_generations must be at least 1, got 0"),
        ("--rollout.temperature=0", r"rollout.temperature must be above 0 \(greedy"),
        ("--sample.temperature=-1", "sample.temperature must be above 0"),
        ("--eval.temperature=-1", "eval.temperature must be at least 0"),
        ("--rollout.top_p=0", r"rollout.top_p must be in \(0, 1\], got 0.0"),
        ("--eval.top_p=1.5", r"eval.top_p must be in \(0, 1\]"),
        ("--rollout.top_k=-1", "rollout.top_k must be at least 0"),
        ("--grpo.token_budget=0", "grpo.token_budget must be at least 1"),
        ("--grpo.kl_coef=-0.1", "grpo.kl_coef must be at least 0"),
        ("--grpo.num_mini_batches=257", "at most prompts_per_step x num_generations = 256"),
        ("--optim.lr=0", "optim.lr must be above 0"),
        ("--optim.min_lr_ratio=2", r"optim.min_lr_ratio must be in \[0, 1\]"),
        ("--optim.beta2=1", r"optim.beta2 must be in \[0, 1\), got 1.0"),
        ("--sft.epochs=0", "sft.epochs must be above 0 where max_steps is 0"),
        ("--sft.batch_size=0", "sft.batch_size must be at least 1"),
        ("--rewards.accuracy=-1", "rewards.accuracy must be a weight of at least 0"),
        ("--rewards.general_share=1", r"rewards.general_share must be in \[0, 1\)"),
        ("--rewards.math_timeout=0", "rewards.math_timeout must be above 0 seconds"),
        ("--cold_start.methods=['magic']", r"must be among few_shot, r1_zero, reflection"),
        ("--pipeline.stages=['base', 'magic']", "unknown stage 'magic' in pipeline.stages; known"),
        ("--stages.magic.seed=1", r"unknown stage 'magic' in \[stages.\*\]; known: base"),
        (
            "--stages.sft.optim.lrr=1",
            "unknown config key 'stages.sft.optim.lrr'.*did you mean 'lr'",
        ),
        ("--stages.sft.optim.lr=0", "optim.lr must be above 0"),
        ("--optim.lr=inf", "optim.lr must be a number, got inf"),
        ("--optim.warmup_steps=-1", "optim.warmup_steps must be at least 0, got -1"),
        ("--optim.weight_decay=-1", "optim.weight_decay must be at least 0"),
        ("--optim.eps=-1", "optim.eps must be at least 0"),
        ("--sft.max_steps=-1", "sft.max_steps must be at least 0"),
        ("--checkpoint.every_steps=-1", "checkpoint.every_steps must be at least 0"),
        ("--eval.every_steps=-1", "eval.every_steps must be at least 0"),
        ("--eval.num_problems=-1", "eval.num_problems must be at least 0"),
        ("--sample.num_problems=-1", "sample.num_problems must be at least 0"),
        ("--sample.max_kept=-1", "sample.max_kept must be at least 0"),
        ("--cold_start.num_problems=-1", "cold_start.num_problems must be at least 0"),
        ("--cold_start.max_kept=-1", "cold_start.max_kept must be at least 0"),
        ("--cold_start.num_samples=0", "cold_start.num_samples must be at least 1"),
        ("--log.num_samples=-1", "log.num_samples must be at least 0"),
        ("--rewards.overlong_cache=-1", "rewards.overlong_cache must be at least 0"),
        ("--rewards.preference_last_steps=-1", "preference_last_steps must be at least 0"),
        ("--rewards.helpfulness=-1", "rewards.helpfulness must be a weight of at least 0"),
        ("--rewards.safety=-1", "rewards.safety must be a weight of at least 0"),
        ("--sample.judge_timeout=0", "sample.judge_timeout must be above 0"),
        ("--data.max_train_problems=-1", "data.max_train_problems must be at least 0"),
        ("--data.max_eval_problems=-1", "data.max_eval_problems must be at least 0"),
        ("--sample.min_language_share=1.1", r"sample.min_language_share must be in \[0, 1\]"),
        ("--cold_start.min_language_share=-1", r"min_language_share must be in \[0, 1\]"),
        ("--rewards.lexicon={en = 'so'}", r"rewards.lexicon must be a table of language = \[words"),
        ("--rewards.lexicon={en = [1]}", "rewards.lexicon must be a table"),
        ("--template.prompt=Q:", "template.prompt must be a text that holds {prompt}"),
        ("--cold_start.summary=So.", "cold_start.summary must be a text that holds {answer}"),
        ("--cold_start.methods=[]", "cold_start.methods must be a list of different names"),
        ("--cold_start.methods=[['few_shot']]", "cold_start.methods must be a list of different"),
        ("--cold_start.methods=['r1_zero', 'r1_zero']", "cold_start.methods must be a list"),
        ("--pipeline.stages=[]", "pipeline.stages must be a list of different names"),
        ("--pipeline.stages=[['base']]", "pipeline.stages must be a list of different names"),
        ("--stages.r1_zero=3", "stages.r1_zero is a section, got the value 3"),
        ("--stages.sft.output_dir=x", "stages.sft.output_dir: output_dir is of the whole run"),
        ("--stages.sft.pipeline.base=x", "stages.sft.pipeline: pipeline is of the whole run"),
        ("--stages.sft.stages.sft.seed=1", "stages.sft.stages: stages is of the whole run"),
        ("--seed", "expected --section.key=value, got '--seed'"),
        ("seed=1", "expected --section.key=value, got 'seed=1'"),
    ],
)
def test_wrong_keys_and_values_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_a_value_is_not_a_section(tmp_path):
    path = write(tmp_path, "seed = 1\n")
    with pytest.raises(ValueError, match=r"'seed\.x': 'seed' is a value, not a section"):
        load_config(path, ["--seed.x=1"])


def test_clip_values_of_one_and_more_are_allowed():
    c = load_config(None, ["--grpo.clip_eps_low=10", "--grpo.clip_eps_high=10"])
    assert c.grpo.clip_eps_low == c.grpo.clip_eps_high == 10.0


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS[0].parent.parent)
    with pytest.raises(ValueError, match=r"'no.toml' does not exist; here are .*demo.toml"):
        load_config("no.toml")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(write(tmp_path, "[grpo\n"))
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(tmp_path / "run.toml")


def test_a_stage_has_its_own_values(tmp_path):
    path = write(
        tmp_path,
        "seed = 3\n[optim]\nlr = 0.1\n[stages.sft.optim]\nlr = 0.5\n[stages.rl_2]\nseed = 9\n",
    )
    config = load_config(path, ["--stages.rl_2.rollout.temperature=0.7"])
    sft, rl_2, base = (stage_config(config, s) for s in ("sft", "rl_2", "base"))
    assert (sft.optim.lr, sft.seed) == (0.5, 3)
    assert (rl_2.optim.lr, rl_2.seed, rl_2.rollout.temperature) == (0.1, 9, 0.7)
    assert base == config
    assert config.optim.lr == 0.1


def test_every_section_is_checked_and_frozen():
    config = Config()
    with pytest.raises(AttributeError):
        config.seed = 1
    with pytest.raises(ValueError, match=r"optim\.lr must be above 0"):
        replace(config, optim=replace(config.optim, lr=0.0))
    assert {f.name for f in fields(Config)} == set(to_dict(config))


def test_help_names_every_key_with_its_default_and_comment(capsys):
    assert main(["grpo", "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100

    def check(name, values):
        block = shown.partition(f"\n[{name}]\n")[2].partition("\n\n")[0]
        named = re.findall(r"^  (\w+) =", block, flags=re.MULTILINE)
        tables = {f.name for f in fields(values) if is_dataclass(getattr(values, f.name))}
        assert named == [f.name for f in fields(values) if f.name not in tables]
        for table in tables:
            check(f"{name}.{table}", getattr(values, table))

    for section in fields(Config):
        if is_dataclass(value := getattr(Config(), section.name)):
            check(section.name, value)
    assert "[rollout.vllm]" in shown
    text = " ".join(shown.split())
    assert 'task = "" "" | running_sum; an embedded task that makes its own data' in text
    assert 'token_budget = "auto" auto | a whole number; tokens forwarded in one' in text
    assert "max_logprob_mismatch = 0.0 mean |sampler - trainer| in nats above which" in text
    assert main(["report", "--help"]) == 0
    assert "[grpo]" not in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["", " ", "a\\u0000b"])
def test_an_output_folder_has_a_name(folder):
    with pytest.raises(ValueError, match="output_dir must be a folder"):
        load_config(None, [f'--output_dir="{folder}"'])


def test_an_output_folder_may_be_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert load_config(None, ["--output_dir=~/runs"]).output_dir == "/somewhere/runs"
    assert load_config(None, ["--output_dir=."]).output_dir == "."
