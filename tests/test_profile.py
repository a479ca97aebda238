"""A profile: the same weights, a trace with our phases, seconds that add up, and what a run that stops leaves."""

import gzip
import json

import pytest
from test_resume import SignallingScorer, grpo, sft
from test_trainer import Stopped, StoppingScorer, assert_same_tensors, timeless
from tiny import tiny_config

from r1fast import distributed
from r1fast.__main__ import parse
from r1fast.config import load_config
from r1fast.metrics import read_metrics
from r1fast.timer import Timer

SIZE = (
    "--rollout.num_generations=8",
    "--rollout.max_completion_tokens=40",
    "--grpo.num_iterations=2",
)
PHASES = {
    "rollout": {"prefill", "decode", "sampling"},
    "reward": set(),
    "reference": set(),
    "train": {"forward", "backward", "optimizer"},
}


def stored(folder) -> dict:
    return json.loads((folder / "profile" / "profile.json").read_text())


def ranges(folder) -> dict[str, list[dict]]:
    """Name -> our ranges of the trace."""
    with gzip.open(folder / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    found: dict[str, list[dict]] = {}
    for event in events:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append(event)
    return found


def test_it_changes_nothing_and_its_phases_add_up(tmp_path, capsys):
    weights = []
    for name, overrides in (("plain", SIZE), ("profiled", (*SIZE, "--log.profile_steps=2"))):
        trainer = grpo(tmp_path / name, *overrides)
        trainer.run()
        weights.append(dict(trainer.model.named_parameters()))
    assert_same_tensors(*weights)
    assert timeless(tmp_path / "plain") == timeless(tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "profiled"
    found, numbers = ranges(folder), stored(folder)
    assert numbers["steps"] == [2, 3]
    rows = read_metrics(folder)[1:3]
    assert numbers["seconds"] == pytest.approx(sum(r["step_time"] for r in rows))
    for phase, parts in PHASES.items():
        seconds = sum(r[f"time/{phase}"] for r in rows)
        assert numbers["phases"][phase] == pytest.approx(seconds)
        assert len(found[phase]) == (4 if phase == "train" else 2)  # two passes
        inner = {name: x for name, x in numbers["phases"].items() if name.startswith(f"{phase}/")}
        assert set(inner) == {f"{phase}/{part}" for part in {*parts, *(["rest"] if parts else [])}}
        if parts:
            assert sum(inner.values()) == pytest.approx(seconds)
            assert inner[f"{phase}/rest"] >= 0
        for name in inner:
            assert name.endswith("/rest") or name in found, name
    tops = [numbers["phases"][name] for name in (*PHASES, "rest")]
    assert sum(tops) == pytest.approx(numbers["seconds"])
    assert 0 <= numbers["phases"]["rest"] <= 0.1 * numbers["seconds"]
    # and by the trace's own clock
    steps = sum(e["dur"] for step in (2, 3) for e in found[f"step {step}"])
    assert steps == pytest.approx(numbers["seconds"] * 1e6, rel=0.1)
    assert sum(e["dur"] for phase in PHASES for e in found[phase]) == pytest.approx(steps, rel=0.1)

    assert numbers["peak_bytes"] > 2**26
    assert numbers["overhead"] > -1
    seconds = [e["self_seconds"] for e in numbers["operators"]]
    assert seconds == sorted(seconds, reverse=True)
    assert any(e["name"].startswith("aten::") for e in numbers["operators"])
    shown = capsys.readouterr().out
    for word in ("profile of steps 2-3", "  decode", "  backward", "tracing cost", "aten::"):
        assert word in shown


def test_of_sft(tmp_path):
    sft(tmp_path, "--log.profile_steps=1").run()
    assert stored(tmp_path)["steps"] == [2]
    assert list(stored(tmp_path)["phases"]) == [
        "train", "train/forward", "train/backward", "train/optimizer", "train/rest", "rest",
    ]  # fmt: skip
    assert {"train", "train/forward", "train/backward", "train/optimizer"} <= set(ranges(tmp_path))


def test_what_there_is(tmp_path, capsys):
    """More steps are asked for than come; of one step there is nothing."""
    grpo(tmp_path / "few", "--log.profile_steps=9", "--grpo.num_steps=3").run()
    assert stored(tmp_path / "few")["steps"] == [2, 3]
    assert stored(tmp_path / "few")["overhead"] is None
    assert "not known: no step came after" in capsys.readouterr().out
    grpo(tmp_path / "one", "--log.profile_steps=1", "--grpo.num_steps=1").run()
    assert not (tmp_path / "one" / "profile").exists()
    assert "nothing to profile: the first step of a run warms up" in capsys.readouterr().err


def test_a_run_that_stops(tmp_path):
    """In the second of three steps to trace by an error, and by a signal."""
    with pytest.raises(Stopped):
        grpo(tmp_path / "crash", "--log.profile_steps=3", scorer=StoppingScorer(2)).run()
    assert stored(tmp_path / "crash")["steps"] == [2]
    assert ranges(tmp_path / "crash")["rollout"]
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path / "signal", "--log.profile_steps=3", scorer=SignallingScorer(2, 15)).run()
    assert stored(tmp_path / "signal")["steps"] == [2]
    grpo(tmp_path / "signal", "--log.profile_steps=1").run()  # steps 3 and 4
    assert stored(tmp_path / "signal")["steps"] == [4]


def test_a_profile_of_a_run_that_goes_on_changes_nothing(tmp_path):
    """Adapters and their reference, interrupted among the traced steps, go on as if neither had been."""
    overrides = ("--lora.rank=3", "--optim.lr=0.01", "--grpo.ref_refresh_steps=3",
                 "--grpo.num_steps=6", "--checkpoint.every_steps=2")  # fmt: skip
    whole = grpo(tmp_path / "whole", *overrides)
    whole.run()
    overrides += ("--log.profile_steps=2",)
    with pytest.raises(Stopped):
        grpo(tmp_path / "parts", *overrides, scorer=StoppingScorer(2)).run()
    assert stored(tmp_path / "parts")["steps"] == [2]
    parts = grpo(tmp_path / "parts", *overrides)
    assert parts.step == 2
    parts.run()
    assert stored(tmp_path / "parts")["steps"] == [4, 5]
    assert_same_tensors(dict(whole.model.named_parameters()), dict(parts.model.named_parameters()))
    assert_same_tensors(whole.optimizer.state_tensors(), parts.optimizer.state_tensors())
    assert_same_tensors(whole.reference.tensors(), parts.reference.tensors())
    assert whole.reference.version == parts.reference.version == 6
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    grpo(tmp_path, "--log.profile_steps=2").run()
    assert not (tmp_path / "profile").exists()


def test_the_words():
    for words in (["--profile", "3"], ["--profile=3"]):
        for command in ("grpo", "sft", "distill", "pipeline"):
            _, _, overrides, _ = parse([command, *words, "c.toml"])
            assert load_config(None, overrides).log.profile_steps == 3
    with pytest.raises(ValueError, match=r"log\.profile_steps must be at least 0, got -1"):
        tiny_config("--log.profile_steps=-1")
    _, _, overrides, _ = parse(["grpo", "c.toml", "--profile"])
    with pytest.raises(ValueError, match=r"log\.profile_steps must be a whole number, got ''"):
        load_config(None, overrides)


def test_parts_are_timed_while_there_is_a_mark():
    now, marked = [0.0], []
    timer = Timer(clock=lambda: now[0])

    class Mark:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            marked.append(self.name)

        def __exit__(self, *exc):
            marked.append(f"/{self.name}")

    def phase():
        with timer("train"):
            with timer.part("forward"):
                now[0] += 2
            now[0] += 1

    phase()
    assert timer.seconds() == {"train": 3}
    timer.mark = Mark
    phase()
    assert timer.seconds() == {"train": 6, "train/forward": 2}
    assert marked == ["train", "train/forward", "/train/forward", "/train"]
    assert timer.take() == {"time/train": 6}
    assert timer.seconds() == {}
