"""Faults put into a run: signals in every phase, numbers that are not finite, rewards that fail, memory, hangs.

With R1FAST_FAULT_REPORT naming a folder, what was tried and survived is written there as JSON.
"""

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from faults import Spoiled, Tally, grpo_trainer, no_room, sft_trainer
from tiny import TokenScorer, tiny_problems

from r1fast import interrupt, metrics, policy_update, watchdog
from r1fast.checkpoint import NonFiniteWeightsError, load_checkpoint
from r1fast.config import RewardConfig, TemplateConfig
from r1fast.evaluate import short_evaluation
from r1fast.interrupt import Stopped, StopRequest, boundary, stoppable
from r1fast.jsonl import read_jsonl
from r1fast.metrics import MetricsWriter, read_metrics
from r1fast.plan import PlanWatch
from r1fast.rewards import MathReward
from r1fast.rewards.score import RewardScorer
from r1fast.sft import SFTTrainer
from r1fast.token_budget import OutOfMemoryForGood
from r1fast.trainer import GRPOTrainer
from r1fast.training import MAX_DUMPED, MAX_SKIPPED
from r1fast.types import Completion, Problem, RolloutGroup
from r1fast.watchdog import EXIT_HUNG, Watchdog, beat, children

ROOT = Path(__file__).parents[1]
NOW = "--checkpoint.deadline_seconds=0.001"  # nothing can end by then
TALLY = Tally("test_faults")


@pytest.fixture(autouse=True)
def counted(request):
    """One more fault of the test's kind, survived where the test passes."""
    metrics._warn_once.cache_clear()
    kind = request.node.originalname.removeprefix("test_").replace("_", " ")
    failed = request.session.testsfailed
    yield
    TALLY.count(kind, 1, int(request.session.testsfailed == failed))


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    TALLY.write()


def grpo(folder, *overrides, **kwargs) -> GRPOTrainer:
    every = ("--grpo.num_steps=3", "--checkpoint.every_steps=1")
    return grpo_trainer(folder, *every, *overrides, **kwargs)


def sft_run(folder, *overrides) -> SFTTrainer:
    return sft_trainer(folder, "--sft.token_budget=20", *overrides)


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run with these overrides leads to when nothing happens; each is made once."""
    made: dict[tuple, tuple] = {}

    def run(*overrides):
        if overrides not in made:
            trainer = with_evaluation(tmp_path_factory.mktemp("whole"), *overrides)
            trainer.run()
            made[overrides] = outcome(trainer)
        return made[overrides]

    return run


def with_evaluation(folder, *overrides) -> GRPOTrainer:
    trainer = grpo(folder, *overrides, scorer=GradedScorer())
    if EVALS[0] in overrides:
        trainer.evaluate = short_evaluation(
            trainer.policy, tiny_problems(3), trainer.config, trainer.scorer
        )
    return trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_a_phase(tmp_path, monkeypatch, phase, number, capfd, undisturbed):
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
    assert_alike(outcome(parts), undisturbed(*overrides))
    if overrides is EVALS:
        assert ["eval/pass@1" in row for row in read_metrics(parts.folder)] == [False, True, False]


def test_a_signal_where_there_is_time_ends_the_step(tmp_path, monkeypatch):
    at = At(monkeypatch, "rollout", 5, signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stop:
        grpo(tmp_path, *SLOW).run()
    assert at.left <= 0
    assert not isinstance(stop.value, Stopped)
    assert load_checkpoint(tmp_path / "checkpoints").step == len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("nth", [1, 5], ids=["before_an_update", "between_updates"])
def test_a_signal_in_a_rollout_of_several_updates(tmp_path, monkeypatch, nth, capfd, undisturbed):
    """Between two updates what the step began with is gone: nothing newer than the last checkpoint is kept."""
    many = ("--grpo.num_mini_batches=4", "--checkpoint.every_steps=0", "--grpo.kl_coef=0")
    with monkeypatch.context() as patch:
        At(patch, "train", nth, signal.SIGTERM)
        with pytest.raises(Stopped):
            grpo(tmp_path / "parts", *many, NOW).run()
    said = capfd.readouterr().out
    saved = load_checkpoint(tmp_path / "parts" / "checkpoints")
    if nth == 1:
        assert saved.step == 1
        assert saved.state["optimizer_step"] == 4
        assert "step 2 was given up to stop in time; the run goes on from the end of step 1" in said
    else:
        assert saved is None
        assert "between its updates: the run goes on from the checkpoint of step 0" in said
    parts = with_evaluation(tmp_path / "parts", *many)
    parts.run()
    assert_alike(outcome(parts), undisturbed(*many))


def test_a_step_that_is_given_up_has_counted_nothing(tmp_path, monkeypatch):
    """A mini-batch without signal has moved the schedule, and no weight."""
    trainer = grpo(tmp_path)
    plain = trainer.train_step

    def train_step(step):
        if step == 0:
            return plain(step)
        trainer.next_learning_rate()
        trainer.checkpoints.saved_step = 0  # as with fewer checkpoints
        raise Stopped

    trainer.train_step = train_step
    with pytest.raises(Stopped):
        trainer.run()
    assert load_checkpoint(tmp_path / "checkpoints").state["optimizer_step"] == 1
    assert trainer.optimizer_step == 1


def test_a_signal_in_dynamic_sampling(tmp_path, monkeypatch, undisturbed):
    dynamic = ("--grpo.dynamic_sampling=signal", "--grpo.kl_coef=0", *SLOW)
    with monkeypatch.context() as patch:
        at = At(patch, "rollout", 3, signal.SIGTERM)
        with pytest.raises(Stopped):
            with_evaluation(tmp_path / "parts", NOW, *dynamic).run()
    assert at.left <= 0
    parts = with_evaluation(tmp_path / "parts", *dynamic)
    assert parts.step == 1
    parts.run()
    assert_alike(outcome(parts), undisturbed(*dynamic))


def test_a_signal_amid_a_micro_batch_of_sft(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        At(patch, "train", 2, signal.SIGUSR1)
        with pytest.raises(Stopped):
            sft_run(tmp_path / "parts", NOW).run()
    parts = sft_run(tmp_path / "parts")
    assert parts.step == 1
    parts.run()
    whole = sft_run(tmp_path / "whole")
    whole.run()
    assert_alike(outcome(parts), outcome(whole))


class Hanging(TokenScorer):
    """In its second step a reward waits for what never comes."""

    def score(self, groups, step_from_end=None):
        if len(self.steps_from_end) == 1:
            self.came = time.monotonic()
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        super().score(groups, step_from_end)


def test_a_signal_while_a_reward_hangs(tmp_path):
    """Nothing comes to a boundary: the wait itself is left."""
    scorer = Hanging()
    with pytest.raises(Stopped):
        grpo(tmp_path, "--checkpoint.deadline_seconds=1", scorer=scorer).run()
    assert time.monotonic() - scorer.came < 10
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


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_is_skipped_counted_and_dumped(tmp_path, monkeypatch, where):
    """Weights and moments stay as they were, and the run goes on."""
    trainer = sft_run(tmp_path, "--checkpoint.every_steps=1")
    Spoiled(trainer, monkeypatch, where, range(1, 3))
    states, batches, plain = [], [], trainer.train_step

    def train_step(step):
        row = plain(step)
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        batches.append([s.completion_ids for s in trainer.batch])
        return row

    trainer.train_step = train_step
    trainer.run()
    rows = read_metrics(tmp_path)
    assert [row["train/updates_skipped"] for row in rows] == [0, 1, 1, 0]
    pairs = itertools.pairwise(states)
    same = [all(torch.equal(b[n], x) for n, x in a.items()) for a, b in pairs]
    assert same == [True, True, False]
    dumped = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert dumped == ["step-000002.jsonl", "step-000003.jsonl"]
    lines = [row for _, row in read_jsonl(tmp_path / "nonfinite" / dumped[0])]
    assert [line["completion_ids"] for line in lines] == batches[1]


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_numbers_that_stay_not_finite_end_the_run(tmp_path, monkeypatch, where):
    """The last good checkpoint stays, and no model is published."""
    trainer = sft_run(tmp_path, "--checkpoint.every_steps=2", "--sft.max_steps=20")
    Spoiled(trainer, monkeypatch, where, range(2, 99))
    if where == "weight":
        plain = trainer.train_step

        def train_step(step):
            if step == 2:
                with torch.no_grad():
                    trainer.optimizer.masters[3].view(-1)[0] = math.nan
            return plain(step)

        trainer.train_step = train_step
    with pytest.raises(FloatingPointError) as error:
        trainer.run()
    if where == "weight":
        assert isinstance(error.value, NonFiniteWeightsError)
        assert trainer.step == 4
    else:
        assert f"{MAX_SKIPPED} gradients in a row were not finite" in str(error.value)
        assert trainer.step == 2 + MAX_SKIPPED - 1
    saved = load_checkpoint(tmp_path / "checkpoints")
    assert saved.step == (2 if where == "weight" else 6)
    assert all(x.isfinite().all() for x in saved.tensors("model").values())
    assert not (tmp_path / "model").exists()


def test_a_weight_that_is_not_finite_ends_a_rollout(tmp_path):
    trainer = grpo(tmp_path)
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError):
        trainer.run()
    assert load_checkpoint(tmp_path / "checkpoints") is None
    assert not (tmp_path / "model").exists()


def test_dumps_are_bounded(tmp_path):
    trainer = sft_run(tmp_path)
    trainer.batch = trainer.sequences[:1]
    trainer.batch[0].advantage = math.nan  # no JSON number
    for trainer.step in range(MAX_DUMPED + 3):
        trainer._dump_batch()
    files = sorted((tmp_path / "nonfinite").iterdir())
    assert len(files) == MAX_DUMPED
    assert json.loads(files[0].read_text())["advantage"] == "NaN"


def groups(num: int = 2) -> list[RolloutGroup]:
    return [
        RolloutGroup(
            Problem(f"What is {i} + 1?", str(i + 1), f"p{i}", "general"),
            [1],
            [Completion([2, 3], [-1.0, -1.0], "stop", "a b") for _ in range(2)],
        )
        for i in range(num)
    ]


def scorer_of(function, timeout: float = 300.0) -> RewardScorer:
    config = RewardConfig(accuracy=0, format=0)
    return RewardScorer(
        config, TemplateConfig(), 8, extra={"mine": (function, 1.0)}, function_timeout=timeout
    )


class Reward:
    """1 for each, unless its `faults` have something else for a call."""

    def __init__(self, **faults):
        self.faults, self.num_calls, self.threads = faults, 0, []

    def __call__(self, completions, **columns):
        self.num_calls += 1
        fault = self.faults.get(f"call{self.num_calls}", lambda n: [1.0] * n)
        return fault(len(completions))


def hang(n):
    time.sleep(30)
    return [1.0] * n


def crash(n):
    raise KeyError("a column that is not there")


def leave(n):
    sys.exit(3)


def slow(n):
    time.sleep(0.05)
    return [1.0] * n


FAULTS = {"hanging": hang, "crashing": crash, "leaving": leave}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_that_fails_once_does_not_count(fault, capsys):
    """Not in its first call, which is a mistake; three in a row are one too."""
    bad = FAULTS[fault]
    with scorer_of(Reward(call2=bad), timeout=0.3) as scorer:
        totals = []
        for _ in range(3):
            scorer.score(made := groups())
            totals.append([r.parts["mine"] for g in made for r in g.rewards])
    assert totals == [[1.0] * 4, [None] * 4, [1.0] * 4]
    assert scorer.errors["mine"] == 4
    assert "reward 'mine' failed" in capsys.readouterr().err
    with scorer_of(Reward(call1=bad), timeout=0.3) as scorer:
        with pytest.raises(RuntimeError, match=r"reward 'mine' failed: .*, in its first call"):
            scorer.score(groups())
    with scorer_of(Reward(call2=bad, call3=bad, call4=bad), timeout=0.3) as scorer:
        for _ in range(3):
            scorer.score(groups())
        with pytest.raises(RuntimeError, match=r"reward 'mine' failed: .*, 3 times in a row"):
            scorer.score(groups())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["1"] * 4, r"returned '1' \(str\) for problem 'p0'; a score is a number, or None"),
        ([[1.0]] * 4, r"returned \[1.0\] \(list\)"),
        ([1.0] * 3, "returned 3 scores for 4 completions"),
        ([1.0] * 5, "returned 5 scores for 4 completions"),
        (None, "must return a list, got NoneType"),
        (3.0, "must return a list, got float"),
    ],
    ids=["strings", "lists", "short", "long", "none", "number"],
)
def test_a_reward_that_lies_is_an_error(answer, message):
    with scorer_of(lambda **columns: answer) as scorer, pytest.raises(ValueError, match=message):
        scorer.score(groups())


def test_a_reward_that_is_slow_nan_or_of_another_type_counts():
    answer = [torch.tensor(2.0), math.nan, None, True]
    with scorer_of(Reward(call1=slow, call2=lambda n: answer)) as scorer:
        scorer.score(made := groups())
        assert [r.total for g in made for r in g.rewards] == [1.0] * 4
        scorer.score(made := groups())
        assert [r.parts["mine"] for g in made for r in g.rewards] == [2.0, None, None, 1.0]
        assert [r.total for g in made for r in g.rewards] == [2.0, 0.0, 0.0, 1.0]


class Short:
    """No memory for micro-batches over `room` tokens, in the forward of training."""

    def __init__(self, monkeypatch, room: int):
        self.room, self.num_failures = room, 0
        self.forward = policy_update.hidden_states
        monkeypatch.setattr(policy_update, "hidden_states", self)

    def __call__(self, model, batch):
        if batch.num_tokens > self.room:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return self.forward(model, batch)


def test_memory_that_runs_out_halves_and_changes_nothing_else(tmp_path, monkeypatch, undisturbed):
    """Weights are those of a run that had the smaller budget from the start."""
    plain = ("--grpo.kl_coef=0", "--grpo.token_budget=96")
    with monkeypatch.context() as patch:
        short = Short(patch, 60)
        halved = with_evaluation(tmp_path / "halved", *plain)
        halved.run()
    assert short.num_failures >= 1
    budget = halved.token_budget.num_tokens
    small = with_evaluation(tmp_path / "small", plain[0], f"--grpo.token_budget={budget}")
    small.run()
    assert_alike(outcome(halved), outcome(small))


def test_memory_that_is_too_small_for_good_is_an_error(tmp_path, monkeypatch):
    Short(monkeypatch, 1)
    with pytest.raises(OutOfMemoryForGood, match=r"Lower rollout\.max_completion_tokens"):
        grpo(tmp_path, "--grpo.kl_coef=0", "--model.activation_checkpointing=none").run()


def test_a_silent_hang_is_told_again_and_again(tmp_path, capfd):
    """At doubling intervals, with every thread's stack and the children, and the run goes on."""
    child = subprocess.Popen(["sleep", "30"])
    try:
        with Watchdog(tmp_path, stage="grpo", seconds=0.2) as dog:
            dog.step_ended(3, 1.0)
            time.sleep(0.4)
            assert dog.num_dumps == 1
            beat("rollout", "chunk 7")
            began = time.monotonic()
            while dog.num_dumps < 3 and time.monotonic() < began + 20:
                time.sleep(0.02)
            took = time.monotonic() - began
    finally:
        child.kill()
        child.wait()
    assert took >= 0.4 - 0.05
    files = list(tmp_path.glob("hang-*.txt"))
    text = "".join(path.read_text() for path in files)
    assert "in grpo, after step 3, since 'rollout, chunk 7'" in text
    assert f"child {child.pid} of {os.getpid()}: sleep, state S" in text
    assert "test_a_silent_hang_is_told_again_and_again" in text  # this thread's stack
    assert text.count("NOTHING HAS MOVED") == 3
    assert capfd.readouterr().err.count("NOTHING HAS MOVED") == 3


def test_what_moves_is_no_hang(tmp_path):
    with Watchdog(tmp_path, stage="grpo", seconds=0.4) as dog:
        dog.step_ended(0, 0.0)
        for _ in range(12):
            time.sleep(0.1)
            boundary("rollout")
        assert dog.num_dumps == 0
    assert not list(tmp_path.glob("hang-*"))


STOPPED = """
import sys, time
from r1fast.watchdog import Watchdog, beat

with Watchdog(sys.argv[1], stage="grpo", seconds=6, abort=True) as dog:
    dog.step_ended(0, 0.0)
    beat("rollout")
    time.sleep(0.9)  # it has looked
    print("running", flush=True)
    end = time.process_time() + 0.15  # busy, and stopped meanwhile: it looks before the next beat
    while time.process_time() < end:
        pass
    beat("rollout")
"""


def test_a_process_that_was_stopped_is_no_hang(tmp_path):
    """SLURM suspends jobs: after that they go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6.6)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert not list(tmp_path.glob("hang-*"))


def test_a_disk_that_is_full_beside_the_checkpoints(tmp_path, monkeypatch, undisturbed):
    """A row of metrics, samples, the heartbeat and the plan cannot be written: it is the same run."""
    said: list[str] = []
    monkeypatch.setattr(metrics, "_warn_once", said.append)
    trainer = with_evaluation(tmp_path)
    plain, write, make, watch = (
        trainer.train_step, MetricsWriter.write, PlanWatch.__init__, PlanWatch.after_step
    )  # fmt: skip

    def full(function, *args):
        with no_room(100):
            return function(*args)

    trainer.train_step = lambda step: full(plain, step) if step == 1 else plain(step)
    monkeypatch.setattr(
        MetricsWriter,
        "write",
        lambda self, step, row: (
            full(write, self, step, row) if step == 2 else write(self, step, row)
        ),
    )
    monkeypatch.setattr(PlanWatch, "__init__", lambda *args: full(make, *args))
    monkeypatch.setattr(PlanWatch, "after_step", lambda *args: full(watch, *args))
    trainer.run()
    assert_alike(outcome(trainer), undisturbed())
    steps = [row["step"] for _, row in read_jsonl(tmp_path / "completions.jsonl")]
    assert set(steps) == {1, 3}
    assert not (tmp_path / "plan.json").exists()
    for name in ("metrics.jsonl", "completions.jsonl", "plan.json"):
        assert any(f"{name} could not be written" in text for text in said), name


def test_a_heartbeat_is_as_old_as_what_it_tells_of(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.1)
    path = tmp_path / "heartbeat.json"
    with Watchdog(tmp_path, stage="sft", seconds=0, num_steps=9) as dog:
        dog.step_ended(4, 1.5)
        beat("train", "64 tokens")
        began = time.monotonic()
        while json.loads(path.read_text())["phase"] != "train" and time.monotonic() < began + 20:
            time.sleep(0.02)
        told = json.loads(path.read_text())
        time.sleep(0.3)
        assert json.loads(path.read_text()) == told
    assert (told["stage"], told["step"], told["num_steps"]) == ("sft", 4, 9)
    assert (told["detail"], told["step_seconds"], told["pid"]) == ("64 tokens", 1.5, os.getpid())
    assert time.time() - told["time"] < 30
    assert json.loads(path.read_text())["phase"] == "done"


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


TINY = """
    import time
    from tiny import tiny_checkpoint, tiny_config, tiny_policy, tiny_problems, TokenScorer
    from r1fast import commands
    from r1fast.trainer import GRPOTrainer

    class Scorer(TokenScorer):
        def score(self, groups, step_from_end=None):
            super().score(groups, step_from_end)
            if len(self.steps_from_end) == 2:
                {in_step_2}

    def run(*args):
        config = tiny_config({overrides})
        GRPOTrainer(tiny_policy(), config, "run", tiny_problems(), Scorer()).run()

    commands.run = run
"""


def in_a_process(tmp_path, in_step_2: str, *overrides: str) -> subprocess.Popen:
    (tmp_path / "c.toml").write_text("")
    code = TINY.format(in_step_2=in_step_2, overrides=", ".join(map(repr, overrides)))
    return run_command(tmp_path, "grpo", "c.toml", code=textwrap.dedent(code))


def test_a_hang_ends_with_its_own_exit_code(tmp_path):
    process = in_a_process(
        tmp_path, "time.sleep(60)", "--log.watchdog_seconds=0.5", "--log.watchdog_abort=true"
    )
    _, said = process.communicate(timeout=100)
    assert process.returncode == EXIT_HUNG, said
    assert "NOTHING HAS MOVED" in said
    assert "in score" in next((tmp_path / "run").glob("hang-*.txt")).read_text()
    assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["phase"] == "hung"


def test_a_hang_that_holds_the_interpreter_is_told(tmp_path):
    """No thread of Python runs: the stacks come from faulthandler's own."""
    stuck = "import ctypes; ctypes.PyDLL(None).sleep(60)"
    process = in_a_process(
        tmp_path, stuck, "--log.watchdog_seconds=0.5", "--log.watchdog_abort=true"
    )
    _, said = process.communicate(timeout=100)
    assert process.returncode == 1, said
    assert "Timeout (0:00:0" in said
    assert "in score" in said


def test_a_signal_to_the_command(tmp_path):
    """Exit code 130 with a checkpoint, though a thread of a reward still hangs."""
    hang = "open('waits', 'w').close(); time.sleep(60)"
    process = in_a_process(
        tmp_path, hang, "--checkpoint.deadline_seconds=1", "--checkpoint.every_steps=1"
    )
    began = time.monotonic()
    while not (tmp_path / "waits").exists() and time.monotonic() < began + 90:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    sent = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert time.monotonic() - sent < 20
    assert "the same command continues from the last checkpoint" in said
    assert load_checkpoint(tmp_path / "run" / "checkpoints").step == 1


SIGNALS = """
    import atexit, signal, sys

    # a shell that starts the tests in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Finder:  # of modules, asked at every import
        def find_spec(self, name, *more):
            if name == {module!r}:
                sys.meta_path.remove(self)
                signal.raise_signal(signal.{name})

    sys.meta_path.insert(0, Finder())
    atexit.register(lambda: {at_exit} and signal.raise_signal(signal.{name}))
    from r1fast import __main__
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_while_the_command_starts_or_leaves(tmp_path, name):
    """Before there is a config, in the seconds in which torch is imported, and when all is done."""
    (tmp_path / "c.toml").write_text("")
    for module in ("tomllib", "torch"):
        code = SIGNALS.format(module=module, name=name, at_exit=False)
        process = run_command(tmp_path, "grpo", "c.toml", code=code)
        out, said = process.communicate(timeout=100)
        assert (process.returncode, out) == (130, ""), said
        assert (
            said.strip()
            == "r1fast: stopped while it started; nothing was changed, and the same command goes on"
        )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "stage": "grpo", "reward": 1.0}\n')
    code = SIGNALS.format(module="", name=name, at_exit=True)
    process = run_command(tmp_path, "report", "run", code=code)
    out, said = process.communicate(timeout=100)
    assert (process.returncode, said) == (0, "")
    assert "report.html" in out


RANKS = """
    import signal
    import torch
    from test_faults import SLOW, grpo, outcome
    from r1fast import distributed, watchdog
    from r1fast.interrupt import Stopped

    distributed.start()
    rank = distributed.rank()
    plain, seen = watchdog.Watchdog.beat, []

    def beat(dog, phase, detail=""):
        plain(dog, phase, detail)
        if phase == "rollout" and dog.step >= 1:
            seen.append(phase)
            if len(seen) == 2 and rank == 1:
                signal.raise_signal(signal.SIGTERM)

    for mode in ("off", "signal"):
        overrides = (*SLOW, "--grpo.dynamic_sampling=" + mode)
        seen.clear()
        watchdog.Watchdog.beat = beat
        try:
            grpo(mode, "--checkpoint.deadline_seconds=0.001", *overrides).run()
            raise SystemExit("nothing stopped")
        except Stopped:
            pass
        watchdog.Watchdog.beat = plain
        parts, whole = (grpo(name, *overrides) for name in (mode, "whole-" + mode))
        assert parts.step == 1, parts.step
        parts.run()
        whole.run()
        a, b = outcome(parts), outcome(whole)
        assert a[1] == b[1]
        assert all(torch.equal(x, b[0][name]) for name, x in a[0].items())
    distributed.leave(0)
"""


def test_a_signal_to_one_of_two_ranks(tmp_path):
    """Both give the step up, with one checkpoint, and go on as if nothing had been; in dynamic sampling too."""
    code = textwrap.dedent(RANKS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert (tmp_path / "off" / "heartbeat-rank1.json").exists()


def test_a_signal_to_a_whole_job_leaves_the_graders_alone():
    """SLURM signals every process: a worker that dies of it takes a verdict with it."""
    answers = [
        f"<answer> \\boxed{{\\sqrt{{{n}}}+\\sin(x)^2+\\cos(x)^2-1}} </answer>" for n in (8, 18)
    ]
    with MathReward(num_workers=1) as reward:
        assert reward(completions=answers[:1], answer=["2\\sqrt{2}"]) == [1.0]
        before = [line.split(":")[0] for line in children(os.getpid())]
        assert before
        for line in before:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(int(line.split()[0]), number)
        assert reward(completions=answers[1:], answer=["3\\sqrt{2}"]) == [1.0]
        assert [line.split(":")[0] for line in children(os.getpid())] == before


def test_children_are_found():
    child = subprocess.Popen(["sleep", "30"])
    try:
        assert any(f"{child.pid} of {os.getpid()}: sleep" in line for line in children(os.getpid()))
    finally:
        child.kill()
        child.wait()
