"""Faults put into a run: signals in every phase, numbers that are not finite, rewards that fail, memory, hangs.

With R1FAST_FAULT_REPORT naming a folder, what was tried and survived is written there as JSON.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import interrupt, metrics, policy_update, sft, watchdog
from r1fast.checkpoint import NonFiniteWeightsError, load_checkpoint
from r1fast.config import RewardConfig, TemplateConfig
from r1fast.evaluate import short_evaluation
from r1fast.examples import Example
from r1fast.interrupt import Stopped, StopRequest, boundary, stoppable
from r1fast.jsonl import read_jsonl
from r1fast.metrics import read_metrics
from r1fast.rewards.score import RewardScorer
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.token_budget import OutOfMemoryForGood
from r1fast.trainer import GRPOTrainer
from r1fast.training import MAX_DUMPED, MAX_SKIPPED
from r1fast.types import Completion, Problem, RolloutGroup
from r1fast.watchdog import EXIT_HUNG, Watchdog, beat, children

ROOT = Path(__file__).parents[1]
NOW = "--checkpoint.deadline_seconds=0.001"  # nothing can end by then
TRIED: dict[str, list[int]] = {}  # fault -> [tried, survived]


@pytest.fixture(autouse=True)
def counted(request):
    """One more fault of the test's kind, survived where the test passes."""
    metrics._warn_once.cache_clear()
    kind = request.node.originalname.removeprefix("test_").replace("_", " ")
    tried = TRIED.setdefault(kind, [0, 0])
    tried[0] += 1
    failed = request.session.testsfailed
    yield
    tried[1] += request.session.testsfailed == failed


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    if folder := os.environ.get("R1FAST_FAULT_REPORT"):
        path = Path(folder) / "test_faults.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"fault": kind, "tried": tried, "survived": survived}
            for kind, (tried, survived) in TRIED.items()
        ]
        path.write_text(json.dumps({"module": "test_faults", "faults": rows}, indent=2) + "\n")


def grpo(folder, *overrides, scorer=None, **kwargs) -> GRPOTrainer:
    config = tiny_config("--checkpoint.every_steps=1", "--checkpoint.keep_last=9", *overrides)
    return GRPOTrainer(
        tiny_policy(), config, folder, tiny_problems(), scorer or TokenScorer(), **kwargs
    )


def sft_run(folder, *overrides) -> SFTTrainer:
    policy, config = tiny_policy(), tiny_config("--sft.token_budget=20", *overrides)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(8)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config))


def outcome(trainer) -> tuple[dict, list]:
    """Weights and moments, and what rows of metrics say that is no time."""
    tensors = {
        f"{key}.{name}": x.clone()
        for key, named in trainer.state_tensors().items()
        for name, x in named.items()
    }
    names = ("step", "loss", "reward", "grad_norm", "learning_rate", "num_tokens", "eval/pass@1")
    rows = [{n: row[n] for n in names if n in row} for row in read_metrics(trainer.folder)]
    return tensors, rows


def assert_alike(a: tuple[dict, list], b: tuple[dict, list]) -> None:
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name, x in a[0].items():
        assert torch.equal(x, b[0][name]), name


class At:
    """Raises signals the `nth` time after the first step that `beat` or a boundary tells of `phase`."""

    def __init__(self, monkeypatch, phase: str, nth: int, *numbers: int):
        self.phase, self.left, self.numbers = phase, nth, numbers
        self.came = 0.0
        self.beat = watchdog.Watchdog.beat
        monkeypatch.setattr(watchdog.Watchdog, "beat", lambda dog, *args: self(dog, *args))

    def __call__(self, dog, phase: str, detail: str = "") -> None:
        self.beat(dog, phase, detail)
        if phase == self.phase and dog.step >= 1:
            self.left -= 1
            if self.left == 0:
                self.came = time.monotonic()
                for number in self.numbers:
                    signal.raise_signal(number)


SLOW = ("--rollout.num_generations=8", "--rollout.max_batch_size=4")  # several chunks
EVALS = ("--eval.every_steps=2", "--eval.every_num_problems=3", "--eval.num_samples=1")
PHASES = {  # phase -> (the nth of it, overrides, the step of the checkpoint)
    "rollout": (4, SLOW, 1),
    "reward": (1, (), 1),
    "reference": (1, (), 1),
    "train": (3, ("--grpo.token_budget=40",), 1),
    "optimizer": (1, (), 2),  # nothing is given up any more
    "save": (1, (), 1),
    "sampling": (1, EVALS, 2),
    "grading": (1, EVALS, 2),
}


class GradedScorer(TokenScorer):
    """With verdicts, for an evaluation."""

    grader = type("Grader", (), {"equivalent": staticmethod(lambda a, b: a == b)})()

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        for group in groups:
            for c, reward in zip(group.completions, group.rewards, strict=True):
                reward.verdict = "correct" if sum(c.token_ids) % 2 else "wrong"
                reward.parts |= {"format": 1.0, "language": None}


def whole_run(folder, overrides, **kwargs):
    trainer = with_evaluation(folder, *overrides, **kwargs)
    trainer.run()
    return outcome(trainer)


def with_evaluation(folder, *overrides, **kwargs) -> GRPOTrainer:
    trainer = grpo(folder, *overrides, scorer=GradedScorer(), **kwargs)
    if EVALS[0] in overrides:
        trainer.evaluate = short_evaluation(
            trainer.policy, tiny_problems(3), trainer.config, trainer.scorer
        )
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_a_phase(tmp_path, monkeypatch, phase, number, capfd):
    """There is no time: the step is given up there, saved, and the resumed run is that of no signal."""
    nth, overrides, step = PHASES[phase]
    with monkeypatch.context() as patch:
        at = At(patch, phase, nth, number)
        stopped = with_evaluation(tmp_path / "parts", NOW, *overrides)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    assert time.monotonic() - at.came < 2
    assert at.left <= 0
    assert load_checkpoint(tmp_path / "parts" / "checkpoints").step == step
    said = capfd.readouterr()
    assert "or within 0.001 s, with a checkpoint" in said.err
    beat_of = json.loads((tmp_path / "parts" / "heartbeat.json").read_text())
    assert (beat_of["phase"], beat_of["pid"]) == ("stopped", os.getpid())
    parts = with_evaluation(tmp_path / "parts", *overrides)
    assert parts.step == step
    parts.run()
    whole = whole_run(tmp_path / "whole", overrides)
    assert_alike(outcome(parts), whole)
    if overrides is EVALS:
        assert sum("eval/pass@1" in row for row in whole[1]) == 2


def test_a_signal_where_there_is_time_ends_the_step(tmp_path, monkeypatch):
    at = At(monkeypatch, "rollout", 5, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stop:
        grpo(tmp_path, *SLOW).run()
    assert at.left <= 0
    assert not isinstance(stop.value, Stopped)
    assert load_checkpoint(tmp_path / "checkpoints").step == len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("left", [1, 3], ids=["before_an_update", "between_updates"])
def test_a_signal_in_a_rollout_of_several_updates(tmp_path, monkeypatch, left, capfd):
    """Between two updates what the step began with is gone: nothing newer than the last checkpoint is kept."""
    many = ("--grpo.num_mini_batches=4", "--checkpoint.every_steps=0")
    first = grpo(tmp_path / "parts", *many, "--grpo.num_steps=4")
    first.step_now = first.train_step

    def train_step(step):
        if step == 2:
            monkeypatch.setattr(first.token_budget, "fitting", fitting)
        return first.step_now(step)

    calls, plain = [], first.token_budget.fitting

    def fitting(attempt):
        calls.append(attempt)
        if len(calls) == left + 1:  # the first is the reference's
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.01)
        return plain(attempt)

    first.train_step = train_step
    first.config = tiny_config(*many, NOW)
    with pytest.raises(Stopped):
        first.run()
    said = capfd.readouterr().out
    saved = load_checkpoint(tmp_path / "parts" / "checkpoints")
    if left == 1:
        assert saved.step == 2
        assert saved.state["optimizer_step"] == 8
        assert "step 3 was given up to stop in time; the run goes on from the end of step 2" in said
    else:
        assert saved is None
        assert "between its updates: the run goes on from the checkpoint of step 0" in said
    parts = grpo(tmp_path / "parts", *many)
    parts.run()
    assert_alike(outcome(parts), whole_run_of(tmp_path / "whole", many))


def whole_run_of(folder, overrides):
    trainer = grpo(folder, *overrides)
    trainer.run()
    return outcome(trainer)


def test_a_signal_in_dynamic_sampling(tmp_path, monkeypatch):
    dynamic = ("--grpo.dynamic_sampling=signal", "--grpo.kl_coef=0", *SLOW)
    with monkeypatch.context() as patch:
        at = At(patch, "rollout", 12, signal.SIGTERM)
        with pytest.raises(Stopped):
            grpo(tmp_path / "parts", NOW, *dynamic).run()
    assert at.left <= 0
    parts = grpo(tmp_path / "parts", *dynamic)
    assert 0 <= parts.step < 4
    parts.run()
    assert_alike(outcome(parts), whole_run_of(tmp_path / "whole", dynamic))


def test_a_signal_amid_a_micro_batch_of_sft(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        At(patch, "train", 7, signal.SIGUSR1)
        with pytest.raises(Stopped):
            sft_run(tmp_path / "parts", NOW).run()
    parts = sft_run(tmp_path / "parts")
    assert parts.step >= 1
    parts.run()
    whole = sft_run(tmp_path / "whole")
    whole.run()
    assert_alike(outcome(parts), outcome(whole))


class Hanging(TokenScorer):
    """In its second step a reward waits for what never comes."""

    def score(self, groups, step_from_end=None):
        if len(self.steps_from_end) == 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        super().score(groups, step_from_end)


def test_a_signal_while_a_reward_hangs(tmp_path):
    """Nothing comes to a boundary: the wait itself is left."""
    began = time.monotonic()
    with pytest.raises(Stopped):
        grpo(tmp_path, "--checkpoint.deadline_seconds=1", scorer=Hanging()).run()
    assert time.monotonic() - began < 10
    assert load_checkpoint(tmp_path / "checkpoints").step == 1


def test_signals_of_a_launcher_are_one(monkeypatch):
    """torchrun's agent passes on what the group got too; a person's second one acts at once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        stop.came -= interrupt.ONE_SIGNAL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_boundary_outside_of_stoppable_work_goes_on():
    with StopRequest(deadline=0.0) as stop:
        signal.raise_signal(signal.SIGTERM)
        boundary("save")
        with pytest.raises(Stopped), stoppable():
            boundary("rollout")
        assert stop.depth == 0


def run_command(folder, *words, code="", **environment):
    """The command in a process of its own, with `code` run before it."""
    script = textwrap.dedent(code) + (
        f"\nimport sys\nsys.argv = ['r1fast', {', '.join(map(repr, words))}]\n"
        "from r1fast.__main__ import run\nrun()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
