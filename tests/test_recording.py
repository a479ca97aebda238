"""Recorded steps: what is on disk, that it changes nothing, resume, crashes, damage."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import forge
from safetensors.torch import load_file, save_file
from test_trainer import Stopped, StoppingScorer, assert_same_tensors, timeless
from tiny import TokenScorer, tiny_checkpoint, tiny_config, tiny_policy, tiny_problems

from r1fast.__main__ import parse
from r1fast.config import load_config
from r1fast.policy import policy_of
from r1fast.recording import read_recording, recorded_steps, shown_steps
from r1fast.replay import replay
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem, Reward

ALL = "--log.record=all"


class KeepingScorer(TokenScorer):
    """Keeps what it scored; gives verdicts and answers too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            group.rewards = [
                Reward(r.total, {**r.parts, "none": None}, "wrong", f"é{i}\n")
                for i, r in enumerate(group.rewards)
            ]
        self.seen.append(groups)


def make(folder: Path, *overrides, scorer=None, problems=None) -> GRPOTrainer:
    folder.mkdir(exist_ok=True)
    config = tiny_config("--grpo.num_steps=3", *overrides)
    scorer = scorer or TokenScorer()
    return GRPOTrainer(tiny_policy(), config, folder, problems or tiny_problems(), scorer)


def test_what_was_recorded_is_read_back(tmp_path):
    scorer = KeepingScorer()
    problems = [
        Problem("What is 1 + é?", "2", "p\u2028x", language="zh", subset="s", meta={"a": [1]}),
        *tiny_problems(3),
    ]
    trainer = make(tmp_path, ALL, scorer=scorer, problems=problems)
    trainer.run()
    assert recorded_steps(tmp_path) == [1, 2, 3]
    for step, groups in enumerate(scorer.seen, 1):
        recording = read_recording(tmp_path, step)
        # ids, logprobs, rewards to the last bit, texts
        assert recording.groups == [replace(g, position=n) for n, g in enumerate(groups)]
        assert recording.ranks == [0] * 4
        rows = timeless(tmp_path)[step - 1]
        assert recording.state["row"].items() <= rows.items()
        assert recording.state["row"].keys() >= {"loss", "grad_norm", "kl"}
        path = tmp_path / "recorded" / f"step-{step:06d}"
        lines = [json.loads(x) for x in (path / "completions.jsonl").read_text().split("\n")[:-1]]
        assert [line["text"] for line in lines] == [c.text for g in groups for c in g.completions]
        assert {line["verdict"] for line in lines} == {"wrong"}
    first, second, third = (read_recording(tmp_path, step).state for step in (1, 2, 3))
    assert first["after"] == second["before"]
    assert second["after"] == third["before"]
    assert third["after"]["counters"]["optimizer_step"] == 3
    digests = {d for s in (first, second, third) for d in s["before"]["digests"].values()}
    assert len(digests) == 3 + 3  # weights, moments; the reference is the first of the weights
    assert {"torch", "threads", "commit", "processes"} <= first["versions"].keys()


def test_the_numbers_are_as_small_as_documented(tmp_path):
    scorer = KeepingScorer()
    make(tmp_path, ALL, scorer=scorer).run()
    for step, groups in enumerate(scorer.seen, 1):
        size = (tmp_path / f"recorded/step-{step:06d}/rollouts.safetensors").stat().st_size
        prompt = sum(len(g.prompt_ids) for g in groups)
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        per_completion, per_group, header = 12, 8, 800
        most = 4 * prompt + 8 * tokens + per_completion * 16 + per_group * 4 + header
        assert 4 * prompt + 8 * tokens < size <= most


def test_recording_changes_nothing(tmp_path):
    weights = []
    for name, overrides in (("plain", ()), ("recorded", (ALL,))):
        trainer = make(tmp_path / name, *overrides)
        trainer.run()
        weights.append(dict(trainer.model.named_parameters()))
    assert_same_tensors(*weights)
    assert timeless(tmp_path / "plain") == timeless(tmp_path / "recorded")
    assert not (tmp_path / "plain" / "recorded").exists()


def test_only_the_steps_that_are_named(tmp_path):
    make(tmp_path, "--log.record=2-9", "--grpo.num_steps=4").run()
    assert recorded_steps(tmp_path) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"step 1 of .* is not recorded; recorded are 2-4\. --rec"):
        read_recording(tmp_path, 1)
    assert shown_steps([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


@pytest.mark.parametrize("value", ["some", "0", "3-2", "1,x", "-3", "1-2-3"])
def test_steps_that_are_none(value):
    with pytest.raises(ValueError, match=rf"log.record must be .* such as 12,20-30, got '{value}'"):
        tiny_config(f'--log.record="{value}"')


def test_the_words(tmp_path):
    for words, value in (
        (["--record"], "all"),
        (["--record=3"], "3"),
        (["--record=3,5-7"], "3,5-7"),
    ):
        _, _, overrides, _ = parse(["grpo", "c.toml", *words])
        assert load_config(None, overrides).log.record == value
    with pytest.raises(ValueError, match="unknown option '--record'"):
        parse(["evaluate", "c.toml", "--record"])


def test_a_resumed_run_goes_on_recording(tmp_path):
    """A crash in step 4; steps 3 and 4 are done again from the checkpoint of step 2, and replace theirs."""
    overrides = (ALL, "--checkpoint.every_steps=2", "--grpo.num_steps=4")
    make(tmp_path / "whole", *overrides).run()
    with pytest.raises(Stopped):
        make(tmp_path / "parts", *overrides, scorer=StoppingScorer(3)).run()
    assert recorded_steps(tmp_path / "parts") == [1, 2, 3]
    mark = tmp_path / "parts" / "recorded" / "step-000003" / "mark"
    mark.touch()
    make(tmp_path / "parts", *overrides).run()
    assert not mark.exists()
    folders = [tmp_path / name / "recorded" for name in ("whole", "parts")]
    assert sorted(p.name for p in folders[1].iterdir()) == [f"step-00000{n}" for n in range(1, 5)]
    for file in ("rollouts.safetensors", "completions.jsonl", "state.json", "manifest.json"):
        for step in range(1, 5):
            a, b = ((f / f"step-00000{step}" / file).read_bytes() for f in folders)
            assert a == b, (step, file)


def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    real_open = os.open

    def full(path, *args, **kwargs):
        if str(path).endswith("rollouts.safetensors") and "step-000002" in str(path):
            raise OSError("No space left on device")
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    trainer = make(tmp_path, ALL)
    trainer.run()
    assert "step 2 could not be recorded, training goes on: No space" in capsys.readouterr().err
    assert [p.name for p in sorted((tmp_path / "recorded").iterdir())] == [
        "step-000001",
        "step-000003",
    ]


@pytest.mark.parametrize(
    ("file", "message"),
    [("rollouts.safetensors", "content of rollouts"), ("completions.jsonl", "content of compl"),
     ("problems.jsonl", "content of problems"), ("state.json", "content of state"),
     ("manifest.json", "")],
)  # fmt: skip
def test_a_flipped_bit_is_found(tmp_path, file, message):
    """Any of them; of a manifest too, where it may still be JSON."""
    make(tmp_path, '--log.record="1"', "--grpo.num_steps=1", "--lora.rank=2").run()
    path = tmp_path / "recorded" / "step-000001" / file
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"step-000001 is damaged: .*{message}"):
            read_recording(tmp_path, 1)
    path.write_bytes(whole)
    assert read_recording(tmp_path, 1).step == 1


def test_an_update_that_fails_is_kept(tmp_path, monkeypatch):
    trainer = make(tmp_path, ALL)

    def fail(*args):
        raise FloatingPointError("no")

    monkeypatch.setattr(trainer, "optimize", fail)
    with pytest.raises(FloatingPointError, match="no"):
        trainer.run()
    recording = read_recording(tmp_path, 1)
    assert recording.state["after"] == {}
    assert len(recording.groups) == 4


def test_a_metric_that_is_not_finite_is_read_back(tmp_path, monkeypatch):
    trainer = make(tmp_path, '--log.record="1"', "--grpo.num_steps=1")
    update = trainer.update
    monkeypatch.setattr(
        trainer,
        "update",
        lambda *a: update(*a) | {"grad_norm": float("nan"), "loss": -float("inf")},
    )
    trainer.run()
    row = read_recording(tmp_path, 1).state["row"]
    assert torch.isnan(torch.tensor(row["grad_norm"]))
    assert row["loss"] == -float("inf")
    assert "NaN" not in (tmp_path / "recorded/step-000001/state.json").read_text()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A run of one recorded step."""
    folder = tmp_path_factory.mktemp("one")
    base = tiny_checkpoint(folder / "base")
    config = tiny_config(f"--model.path={base}", "--grpo.num_steps=1", ALL)
    GRPOTrainer(policy_of(config), config, folder / "run", tiny_problems(), TokenScorer()).run()
    return folder / "run"


@pytest.fixture
def edited(one):
    """Replaces files of the recording, which is whole again after the test."""
    path = one / "recorded" / "step-000001"
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def restore() -> None:
        for file, kept in before.items():
            (path / file).write_bytes(kept)

    def edit(name: str, raw: bytes) -> None:
        restore()
        forge(path, name, raw)

    yield edit, before
    restore()


@pytest.mark.parametrize(("file", "change", "told"), [
    ("state.json", lambda s: s | {"versions": []}, r"state.json: 'versions' must be an object, got \[\]"),
    ("state.json", lambda s: s | {"row": {"loss": "x"}}, "'row' must be an object of numbers"),
    ("state.json", lambda s: {k: v for k, v in s.items() if k != "data"}, "state.json has no 'data'; it was not"),
    ("state.json", lambda s: s | {"before": {"digests": {}}}, "has no 'before.counters'"),
    ("problems.jsonl", lambda rows: [*rows[:1], {"rank": 0}], r"problems.jsonl:2 has no 'position'; .* record the step again"),
    ("problems.jsonl", lambda rows: [rows[0] | {"prompt": 1}, *rows[1:]], r"problems.jsonl:1: 'prompt' must be a text, got 1"),
    ("problems.jsonl", lambda rows: rows[1:], r"'num_completions' must have one number for each of 3 problems, got \(4,\)"),
    ("completions.jsonl", lambda rows: rows[1:], r"'completion_lengths' must have one number for each of 15 completions"),
    ("completions.jsonl", lambda rows: [3, *rows[1:]], "completions.jsonl:1: '' must be an object, got 3"),
])  # fmt: skip
def test_an_edited_recording_is_named(one, edited, file, change, told):
    edit, before = edited
    text = before[file].decode()
    lines = file.endswith("l")
    found = change([json.loads(x) for x in text.splitlines()] if lines else json.loads(text))
    edit(
        file,
        ("".join(json.dumps(x) + "\n" for x in found) if lines else json.dumps(found)).encode(),
    )
    with pytest.raises(ValueError, match=told):
        replay(one, 1)


def test_lines_that_are_no_json_are_named(one, edited):
    edit, before = edited
    edit("completions.jsonl", before["completions.jsonl"] + b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"completions\.jsonl:17 is not valid JSON"):
        read_recording(one, 1)


@pytest.mark.parametrize(("change", "told"), [
    (lambda t: t.pop("logprobs"), "has no 'logprobs'"),
    (lambda t: t.update(logprobs=t["logprobs"][1:].clone()), "'logprobs' must have one number for each of"),
    (lambda t: t.update(rewards=t["rewards"][1:].clone()), "'rewards' must have one number for each of 16 completions"),
    (lambda t: t.update(prompt_lengths=t["prompt_lengths"].neg()), "'prompt_lengths' must be at least 0"),
    (lambda t: t.update(num_completions=t["num_completions"] + 1), "'num_completions' must add up to 16"),
    (lambda t: t.update(prompt_ids=t["prompt_ids"][None].clone()), "'prompt_ids' must have one number"),
])  # fmt: skip
def test_numbers_that_do_not_fit(one, edited, tmp_path, change, told):
    edit, before = edited
    (tmp_path / "x").write_bytes(before["rollouts.safetensors"])
    tensors = load_file(tmp_path / "x")
    tensors = {key.removeprefix("rollouts."): x for key, x in tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "x")
    edit("rollouts.safetensors", (tmp_path / "x").read_bytes())
    with pytest.raises(ValueError, match=told):
        read_recording(one, 1)


JUNK = [None, True, -1, 2**63, 10**400, 1e400, 0.5, "x", "\ud800", [], [1], [{}], {}, {"a": 1}]


def test_any_state_of_a_recording_is_replayed_or_refused(one, edited):
    edit, before = edited
    rng, refused = random.Random(0), 0
    for _ in range(40):
        state = json.loads(before["state.json"])
        inner, keys = state, list(state)
        while isinstance(inner[key := rng.choice(keys)], dict) and inner[key] and rng.random() < 0.6:  # fmt: skip
            inner, keys = inner[key], list(inner[key])
        inner[key] = rng.choice(JUNK)
        edit("state.json", json.dumps(state).encode())
        try:
            replay(one, 1)
        except ValueError:
            refused += 1
    assert 20 < refused < 40
