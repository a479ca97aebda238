"""No command reaches the network by itself: with every connection but loopback's refused, all of them work, and none tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CONFIG, tiny_checkpoint

from r1fast.hf_folder import read_model_config, resolve_model_path
from r1fast.jsonl import write_jsonl

GUARD = """
import os, socket
LOOPBACK = ("127.", "::1", "localhost")

def refuse(host):
    name = host.decode() if isinstance(host, bytes) else str(host)
    if not name.startswith(LOOPBACK) and name not in ("", "None", "0.0.0.0", "::"):
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(name + "\\n")
        raise OSError(f"the network is refused: {name}")

def guarded(real):
    def call(self, address, *more):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        return real(self, address, *more)
    return call

def looked_up(real):
    def call(host, *more, **named):
        refuse(host)
        return real(host, *more, **named)
    return call

for name in ("connect", "connect_ex"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    real = getattr(socket, name)
    if name == "create_connection":
        socket.create_connection = lambda address, *a, _real=real, **k: (refuse(address[0]), _real(address, *a, **k))[1]
    else:
        setattr(socket, name, looked_up(real))
"""
RUN = """
import json, sys
from r1fast.__main__ import main
for argv in json.loads(sys.argv[1]):
    code = main(argv)
    print(f"== {argv[0]} {code}", flush=True)
"""


@pytest.fixture
def guard(tmp_path, monkeypatch):
    """An environment whose Pythons refuse the network and write down who asked for it; nothing else keeps them off it."""
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GUARD)
    log = tmp_path / "network.txt"
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))
    }
    return env | {"PYTHONPATH": path, "NETWORK_LOG": str(log), "HF_HOME": str(tmp_path / "hf")}, log


def run(env, commands) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)], env=env, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_guard_refuses_and_writes_down(guard):
    env, log = guard
    code = "import socket, urllib.request as u\nfor x in ('https://example.org', 'http://203.0.113.7'):\n try: u.urlopen(x)\n except OSError as e: print(e)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    ).stdout
    assert said.count("the network is refused") == 2
    assert log.read_text().split() == ["example.org", "203.0.113.7"]


@pytest.mark.slow
def test_no_command_asks_the_network(guard, tmp_path):
    env, log = guard
    model, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "out"
    problems = [{"prompt": f"{i} + 1?", "answer": str(i + 1)} for i in range(6)]
    write_jsonl(tmp_path / "p.jsonl", problems)
    write_jsonl(
        tmp_path / "e.jsonl", [{"prompt": p["prompt"], "completion": p["answer"]} for p in problems]
    )
    write_jsonl(
        tmp_path / "f.jsonl",
        [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(12)],
    )
    (tmp_path / "c.toml").write_text("")
    data = [f"--data.train={tmp_path / 'p.jsonl'}", f"--data.eval={tmp_path / 'p.jsonl'}", f"--data.sft={tmp_path / 'e.jsonl'}",
            f"--data.preference={tmp_path / 'f.jsonl'}"]  # fmt: skip
    tiny = [str(tmp_path / "c.toml"), *CONFIG, f"--model.path={model}", "--grpo.num_steps=1", "--sft.max_steps=1", "--eval.num_samples=1",
            "--sample.num_samples=2", *data]  # fmt: skip
    commands = [
        ["plan", *tiny, f"--output_dir={out}/plan"],
        ["sft", *tiny, f"--output_dir={out}/sft"],
        [
            "grpo",
            *tiny,
            f"--output_dir={out}/grpo",
            "--template.name=chat",
            "--record=all",
        ],
        ["replay", f"{out}/grpo", "--step=1"],
        ["report", f"{out}/grpo"],
        ["export", f"{out}/grpo", f"{out}/exported"],
        ["sample", *tiny, f"--output_dir={out}/sample"],
        ["reward-model", *tiny, f"--output_dir={out}/rm"],
        ["evaluate", *tiny, f"--output_dir={out}/eval"],
        ["generate", model, "--prompt", "hi", "--max-tokens", "2"],
    ]
    said = run(env, commands)
    for argv in commands:
        assert f"== {argv[0]} " in said, said[-3000:]
    for name in ("plan", "sft", "grpo", "report", "export", "reward-model", "evaluate"):
        assert f"== {name} 0" in said, said[-5000:]
    assert not log.exists(), log.read_text()


@pytest.mark.slow
def test_a_model_that_is_no_folder_is_named(guard, tmp_path):
    """A path with a slip in it asks nobody; a model id does, unless HF_HUB_OFFLINE is set."""
    env, log = guard
    (tmp_path / "runs").mkdir()
    wrong = [f"{tmp_path}/runs/model", "./model", "~/model", "a/b/c", "model", "runs/model"]
    said = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([["generate", name, "--prompt", "hi"] for name in wrong])], env=env, cwd=tmp_path,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert said.stdout.count("== generate 2") == len(wrong), said.stderr
    assert said.stderr.count("no such model folder") == len(wrong)
    assert not log.exists(), log.read_text()
    said = run(env | {"HF_HUB_OFFLINE": "1"}, [["generate", "Qwen/Qwen3-0.6B", "--prompt", "hi"]])
    assert "== generate 2" in said
    assert "HF_HUB_OFFLINE=1" in said
    assert not log.exists(), log.read_text()
    said = run(env, [["generate", "Qwen/Qwen3-0.6B", "--prompt", "hi"]])
    assert "== generate 2" in said
    assert "could not be fetched" in said
    assert len(set(log.read_text().split())) == 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a",
        "/a/b",
        "../a",
        "a/b/c",
        "~/a",
        "a b/c",
        "a/",
        "a/..",
        "http://a/b",
        "a/b\0",
        "a/" + "b" * 99,
        "-a/b",
    ],
)
def test_what_is_no_model_id(name):
    for read in (resolve_model_path, read_model_config):
        with pytest.raises(ValueError, match=r"no such model folder|a model is a folder|null"):
            read(name)
    assert not Path("a").exists()
