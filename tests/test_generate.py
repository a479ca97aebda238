"""`r1fast generate` on a tiny checkpoint: what it prints, its JSON lines, its options."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from r1fast import generate as generate_module
from r1fast.__main__ import main, parse
from r1fast.metrics import printable
from r1fast.rollout.decoding import NOT_FINITE
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed

PROMPT = "What is 1 + 1?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("generate") / "model")


def rows(shown: str) -> list[dict]:
    return [json.loads(line) for line in shown.splitlines()]


def test_a_folder_and_a_config_say_the_same(model, tmp_path, capsys):
    words = ["--prompt", PROMPT, "--num=2", "--template.name=raw", "--max-tokens=5"]
    assert main(["generate", model, *words]) == 0
    first = capsys.readouterr().out
    assert "── 1/2 ───" in first
    assert "── 2/2 ───" in first
    assert main(["generate", model, *words]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "c.toml").write_text("")
    config = str(tmp_path / "c.toml")
    assert main(["generate", config, f"--model.path={model}", *words]) == 0
    assert capsys.readouterr().out == first
    assert main(["generate", config, *words]) == 2
    assert "names no model.path" in capsys.readouterr().err
    length = "--rollout.max_completion_tokens=5"
    assert main(["generate", model, *words[:-1], length]) == 0
    assert capsys.readouterr().out == first


def test_the_template_is_the_models_own(model, tmp_path, capsys):
    words = ["--prompt", PROMPT, "--max-tokens=5"]
    assert main(["generate", model, *words]) == 0
    by_itself = capsys.readouterr()
    assert by_itself.err.startswith("template: chat\n")
    assert main(["generate", model, *words, "--template.name=chat"]) == 0
    assert capsys.readouterr().out == by_itself.out
    assert main(["generate", model, *words, "--template.name=raw"]) == 0
    raw = capsys.readouterr().out
    assert raw != by_itself.out
    plain = shutil.copytree(model, tmp_path / "plain")
    for path in (*plain.glob("chat_template*"), plain / "tokenizer_config.json"):
        if path.name == "tokenizer_config.json":
            kept = json.loads(path.read_text())
            kept.pop("chat_template", None)
            path.write_text(json.dumps(kept))
        else:
            path.unlink()
    assert main(["generate", str(plain), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out == raw
    assert shown.err.startswith("template: raw\n")


def test_one_completion_is_shown_as_it_is_made(model, monkeypatch, capsys):
    """Part by part, and together what the whole is."""
    parts = []
    words = ["generate", model, "--prompt", PROMPT, "--max-tokens=20", "--temperature=1"]
    assert main([*words, "--json"]) == 0
    (row,) = rows(capsys.readouterr().out)
    monkeypatch.setattr(generate_module, "say_part", parts.append)
    assert main(words) == 0
    assert len([p for p in parts if p]) > 5
    assert "".join(parts) == printable(row["text"])
    assert capsys.readouterr().out.strip() == "[cut off]"
    assert row["finish_reason"] == "length"


def test_json_lines_hold_what_the_engine_made(model, capsys):
    from r1fast.policy import load_policy
    from r1fast.templates import encode_text

    words = ["--prompt", PROMPT, "--prompt", "Why?", "--num", "3", "--seed=5", "--json",
             "--temperature=1", "--top-p=1", "--max-tokens=12", "--top-logprobs=2",
             "--template.name=raw"]  # fmt: skip
    assert main(["generate", model, *words]) == 0
    found = {(row["prompt"], row["sample"]): row for row in rows(capsys.readouterr().out)}
    assert sorted(found) == [(p, i) for p in range(2) for i in range(3)]
    policy = load_policy(model)
    prompts = [encode_text(text, policy.tokenizer) for text in (PROMPT, "Why?")]
    groups = Engine(policy.model, policy.eos_ids, decode=policy.decode).generate(
        prompts, 3, SamplingParams(max_tokens=12, top_logprobs=2), seed=sample_seed(5, "generate")
    )
    for (p, i), row in found.items():
        expected = groups[p].completions[i]
        assert row["token_ids"] == expected.token_ids
        assert row["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
        assert row["text"] == expected.text
        assert row["finish_reason"] == expected.finish_reason
        assert row["num_prompt_tokens"] == len(prompts[p])
        assert [len(top) for top in row["top_logprobs"]] == [2] * len(row["token_ids"])


def test_a_stop_string_ends_the_text(model, capsys):
    words = ["generate", model, "--prompt", PROMPT, "--max-tokens=30", "--temperature=0", "--json"]
    assert main(words) == 0
    (free,) = rows(capsys.readouterr().out)
    stop = free["text"][5:8]
    assert main([*words, "--stop", "never there", "--stop", stop]) == 0
    (stopped,) = rows(capsys.readouterr().out)
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == stop
    wanted = free["token_ids"][3]
    assert main([*words, f"--stop-token-id={wanted}"]) == 0
    (stopped,) = rows(capsys.readouterr().out)
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(wanted) + 1]


def test_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[2Jb\r\x07\tc\n\x7f\x9bé文") == "a␛[2Jb␍␇\tc\n\ufffd\ufffdé文"


def test_prompts_are_counted_from_one_in_what_a_person_reads(model, capsys):
    words = ["generate", model, "--prompt=a", "--prompt=b", "--template.name=raw", "--json"]
    assert main([*words, "--stop-token-id=9999"]) == 2
    assert capsys.readouterr().err.endswith(
        "prompt 1 has stop_token_ids with token 9999, outside [0, 320)\n"
    )


@pytest.mark.parametrize("mode", [["--json"], []], ids=["json", "text"])
def test_an_error_does_not_say_again_where_it_was(model, monkeypatch, capsys, mode):
    from r1fast.policy import policy_of

    def broken(*args):
        policy = policy_of(*args)
        policy.model.norm.weight.data.fill_(float("nan"))
        return policy

    monkeypatch.setattr(generate_module, "policy_of", broken)
    words = ["generate", model, "--prompt=a", "--prompt=b", *mode]
    assert main(words) == 1
    shown = capsys.readouterr().out
    if mode:
        assert [(row["prompt"], row["error"]) for row in rows(shown)] == [
            (0, NOT_FINITE),
            (1, NOT_FINITE),
        ]
    else:
        assert "prompt 2/2, sample 1/1" in shown
        assert shown.count(f"[failed: {NOT_FINITE}]") == 2


def test_a_pipe_that_closes_ends_quietly(model):
    words = ["generate", model, "--prompt", PROMPT, "--num=4", "--max-tokens=50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "r1fast", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read().splitlines() == ["template: chat"]
    assert process.wait() == 141


def test_the_readmes_engine_runs(model, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from r1fast import Engine.*?)```", readme, re.S)
    assert '"runs/demo/rl_1/model"' in code
    names = {}
    exec(code.replace("runs/demo/rl_1/model", model), names)
    assert capsys.readouterr().out
    (scored,), drawn = names["logprobs"], names["group"].completions
    for logprobs, c in zip(scored, drawn, strict=True):
        assert logprobs.tolist() == pytest.approx(c.logprobs, abs=1e-5)


def test_words_that_come_several_times_or_alone():
    _, _, overrides, options = parse(
        [
            "generate",
            "m",
            "--prompt",
            "a",
            "--stop=x",
            "--json",
            "--prompt=b",
            "--model.dtype=float32",
        ]
    )
    assert options == {"prompt": ["a", "b"], "stop": ["x"], "json": "1"}
    assert overrides == ["--model.dtype=float32"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "generate needs --prompt TEXT"),
        (["--prompt"], "--prompt needs a value"),
        (["--prompt=x", "--num=0"], "--num must be a whole number of at least 1, got '0'"),
        (["--prompt=x", "--top-k=2.5"], "--top-k must be a whole number, got '2.5'"),
        (["--prompt=x", "--temperature=hot"], "--temperature must be a number, got 'hot'"),
        (["--prompt=x", "--temperature=-1"], "temperature must be at least 0, got -1.0"),
        (["--prompt=x", "--stop-token-id=y"], "--stop-token-id must be a whole number, got 'y'"),
        (["--prompt=x", "--temprature", "1"], "unknown option '--temprature'; known: --prompt, --num"),
        (["--prompt=x", "--prompt", "x" * 400, "--rollout.max_prompt_tokens=40"],
         "prompt 2 has 4"),
    ],
)  # fmt: skip
def test_wrong_options(model, words, message, capsys):
    assert main(["generate", model, *words]) == 2
    assert message in capsys.readouterr().err
