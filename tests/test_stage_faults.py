"""Faults in each stage: a number that is not finite, no memory, no room, a signal, a grader that breaks.

What a stage was doing then is an error or is told; the same call again ends with the files of one that
nothing has happened to.
"""

import contextlib
import errno
import itertools
import signal
from pathlib import Path

import pytest
import torch
from faults import Spoiled, Tally, grpo_trainer, no_room, sft_trainer
from test_evaluate import ParityScorer
from test_faults import NOW, At, assert_alike, outcome
from tiny import tiny_checkpoint, tiny_config, tiny_policy, tiny_problems

from r1fast import sft
from r1fast.checkpoint import load_checkpoint
from r1fast.evaluate import evaluate
from r1fast.interrupt import Stopped, StopRequest, boundary, interrupts
from r1fast.jsonl import read_jsonl
from r1fast.metrics import read_metrics
from r1fast.pipeline import Pipeline
from r1fast.rejection import rejection_sample
from r1fast.rollout.engine import Engine
from r1fast.token_budget import is_out_of_memory
from r1fast.trainer import GRPOTrainer

TALLY = Tally("test_stage_faults")


@pytest.fixture(autouse=True)
def counted(request):
    failed = request.session.testsfailed
    yield
    kind = request.node.originalname.removeprefix("test_").replace("_", " ")
    TALLY.count(kind, 1, int(request.session.testsfailed == failed))


@pytest.fixture(autouse=True, scope="module")
def report():
    yield
    TALLY.write()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_in_grpo(tmp_path, monkeypatch, where):
    """As in SFT: the update is left out, counted and dumped, and the run goes on."""
    trainer = grpo_trainer(tmp_path, "--grpo.kl_coef=0", "--checkpoint.every_steps=1")
    Spoiled(trainer, monkeypatch, where, range(1, 3))
    states, plain = [], trainer.train_step

    def train_step(step):
        row = plain(step)
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return row

    trainer.train_step = train_step
    trainer.run()
    assert [row["train/updates_skipped"] for row in read_metrics(tmp_path)] == [0, 1, 1, 0]
    pairs = itertools.pairwise(states)
    same = [all(torch.equal(b[n], x) for n, x in a.items()) for a, b in pairs]
    assert same == [True, True, False]
    dumped = tmp_path / "nonfinite" / "step-000002.jsonl"
    assert all(row["completion_ids"] for _, row in read_jsonl(dumped))


@pytest.mark.parametrize(("phase", "step"), [("train", 1), ("optimizer", 2), ("save", 1)])
def test_a_signal_in_a_phase_of_sft(tmp_path, monkeypatch, phase, step):
    every = ("--sft.token_budget=20", "--checkpoint.every_steps=1")
    with monkeypatch.context() as patch:
        at = At(patch, phase, 1, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            sft_trainer(tmp_path / "parts", NOW, *every).run()
    assert at.left <= 0
    assert load_checkpoint(tmp_path / "parts" / "checkpoints").step == step
    parts, whole = (sft_trainer(tmp_path / name, *every) for name in ("parts", "whole"))
    assert parts.step == step
    for trainer in (parts, whole):
        trainer.run()
    assert_alike(outcome(parts), outcome(whole))


def test_memory_that_runs_out_in_sft(tmp_path, monkeypatch):
    """Weights are those of a run that had the smaller budget from the start."""
    real, failed = sft.hidden_states, []

    def short(model, batch):
        if batch.num_tokens > 30:
            failed.append(batch.num_tokens)
            run_out_of_memory()
        return real(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "hidden_states", short)
        halved = sft_trainer(tmp_path / "halved", "--sft.token_budget=64")
        halved.run()
    assert failed
    budget = halved.token_budget.num_tokens
    small = sft_trainer(tmp_path / "small", f"--sft.token_budget={budget}")
    small.run()
    assert_alike(outcome(halved), outcome(small))


# --- sampling, evaluation, pipeline: (call, the files that it leaves)

SAMPLED = ("--rollout.max_batch_size=4", "--eval.num_samples=3", "--eval.top_p=1.0",
           "--sample.num_samples=3", "--sample.max_kept=0", "--sample.require_format=false")  # fmt: skip


def run_evaluation(folder: Path, base: Path, scorer=None) -> None:
    config, scorer = tiny_config(*SAMPLED), scorer or ParityScorer()
    evaluate(tiny_policy(), tiny_problems(6), config, scorer, folder=folder, title="evaluation")


class SamplingScorer(ParityScorer):
    prompt_opens_think = False


def run_sampling(folder: Path, base: Path, scorer=None) -> None:
    scorer = scorer or SamplingScorer()
    # long enough for some to end
    config = tiny_config(*SAMPLED, "--rollout.max_completion_tokens=90", "--sample.num_samples=6")
    rejection_sample(tiny_policy(), tiny_problems(6), config, scorer, folder)


def run_pipeline(folder: Path, base: Path, scorer=None) -> None:
    config = tiny_config(
        *SAMPLED, f"--output_dir={folder}", f"--pipeline.base={base}", "--data.task=running_sum",
        "--pipeline.stages=[\"base\", \"r1_zero\"]", "--grpo.num_steps=2", "--eval.num_problems=4",
        "--rollout.max_prompt_tokens=48", "--checkpoint.every_steps=1",
    )  # fmt: skip
    Pipeline(config).run()


STAGES = {
    "evaluation": (run_evaluation, ("samples.jsonl", "eval.json", "problems.jsonl")),
    "sampling": (run_sampling, ("sampled.jsonl", "accounting.json")),
    "pipeline": (
        run_pipeline,
        ("base/eval.json", "base/samples.jsonl", "r1_zero/model/model.safetensors",
         "r1_zero/eval.json", "r1_zero/samples.jsonl"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return Path(tiny_checkpoint(tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base):
    """The files of each stage when nothing happens; each is made once."""
    made: dict[str, dict[str, bytes]] = {}

    def files_of(stage: str) -> dict[str, bytes]:
        if stage not in made:
            folder = tmp_path_factory.mktemp(stage) / "run"
            STAGES[stage][0](folder, base)
            made[stage] = contents(stage, folder)
        return made[stage]

    return files_of


def contents(stage: str, folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in STAGES[stage][1]}


def assert_ends_as_if_nothing_was(stage: str, folder: Path, base: Path, undisturbed) -> None:
    STAGES[stage][0](folder, base)
    assert contents(stage, folder) == undisturbed(stage)
    left = [*folder.rglob("*.part"), *folder.rglob("*.partial-*"), *folder.rglob(".saving-*")]
    assert not left


def at_a_call(monkeypatch, nth: int, fault) -> list:
    """`fault()` in place of the `nth` call of the engine, whoever calls it."""
    calls, real = [], Engine.step

    def step(self, *args):
        calls.append(1)
        if len(calls) == nth:
            fault()
        return real(self, *args)

    monkeypatch.setattr(Engine, "step", step)
    return calls


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_no_memory_in_a_forward_of_sampling(tmp_path, monkeypatch, stage, nth, base, undisturbed):
    """An error, with the exit code of memory; what was drawn stays."""
    with monkeypatch.context() as patch:
        calls = at_a_call(patch, nth, run_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError) as error:
            STAGES[stage][0](tmp_path / "run", base)
    assert len(calls) == nth
    assert is_out_of_memory(error.value)
    assert_ends_as_if_nothing_was(stage, tmp_path / "run", base, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_while_sampling(tmp_path, monkeypatch, stage, number, base, undisturbed):
    # a shell that starts the tests in the background has it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            at_a_call(patch, 3, lambda: signal.raise_signal(number))
            with pytest.raises(KeyboardInterrupt), interrupts():
                STAGES[stage][0](tmp_path / "run", base)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_ends_as_if_nothing_was(stage, tmp_path / "run", base, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_an_error_after_a_signal_is_the_signal(number):
    """As where a module swallows it amid its import, and what it has not defined is missed later."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped, interrupts():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
            raise RecursionError("maximum recursion depth exceeded")
        assert type(stopped.value.__cause__) is RecursionError
        with pytest.raises(RecursionError), interrupts():
            raise RecursionError("without a signal")
        for goes_on in (lambda: boundary("rollout"), StopRequest().__enter__):
            went_on = False
            with pytest.raises(KeyboardInterrupt), interrupts():
                with contextlib.suppress(KeyboardInterrupt):  # as a library amid its import
                    signal.raise_signal(number)
                goes_on()
                went_on = True
            assert not went_on
        boundary("rollout")  # the next command knows nothing of it
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("size", [0, 100, 700])
@pytest.mark.parametrize("stage", STAGES)
def test_no_room_on_the_disk(tmp_path, stage, size, base, undisturbed):
    """No file is half there, and the same call goes on."""
    folder = tmp_path / "run"
    with no_room(size), pytest.raises(OSError, match="File too large") as error:
        STAGES[stage][0](folder, base)
    assert error.value.errno in (errno.EFBIG, None)  # None: by safetensors
    for name in STAGES[stage][1]:
        if (folder / name).exists():
            assert (folder / name).read_bytes() == undisturbed(stage)[name]
    assert_ends_as_if_nothing_was(stage, folder, base, undisturbed)


@pytest.mark.parametrize("stage", ["evaluation", "sampling"])
def test_a_weight_that_is_not_finite_while_sampling(
    tmp_path, monkeypatch, stage, base, undisturbed
):
    """An error: there is no number, and nothing that was drawn with such weights is used again."""
    with monkeypatch.context() as patch:
        bad = tiny_policy()
        with torch.no_grad():
            bad.model.norm.weight[0] = torch.nan
        patch.setitem(globals(), "tiny_policy", lambda: bad)
        with pytest.raises(FloatingPointError):
            STAGES[stage][0](tmp_path / "run", base)
    assert not any((tmp_path / "run" / name).exists() for name in STAGES[stage][1])
    assert_ends_as_if_nothing_was(stage, tmp_path / "run", base, undisturbed)


class Breaking(SamplingScorer):
    """Grades nothing: a grader that is broken."""

    def score(self, groups, step_from_end=None):
        raise RuntimeError("the grader has no answer")


@pytest.mark.parametrize("stage", ["evaluation", "sampling"])
def test_a_grader_that_breaks(tmp_path, stage, base, undisturbed):
    with pytest.raises(RuntimeError, match="the grader has no answer"):
        STAGES[stage][0](tmp_path / "run", base, Breaking())
    assert_ends_as_if_nothing_was(stage, tmp_path / "run", base, undisturbed)


@pytest.mark.parametrize("step", [0, 1])
def test_numbers_not_finite_in_a_pipeline(tmp_path, monkeypatch, step, base, undisturbed):
    """The stage ends; its weights go on from the last good checkpoint."""
    real = GRPOTrainer.train_step

    def train_step(self, number):
        if number == step:
            with torch.no_grad():
                self.model.norm.weight[0] = torch.nan
        return real(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(GRPOTrainer, "train_step", train_step)
        with pytest.raises(FloatingPointError):
            run_pipeline(tmp_path / "run", base)
    saved = load_checkpoint(tmp_path / "run" / "r1_zero" / "checkpoints")
    assert (saved.step if saved else 0) == step
    assert_ends_as_if_nothing_was("pipeline", tmp_path / "run", base, undisturbed)


def test_a_signal_in_a_pipelines_training(tmp_path, monkeypatch, base, undisturbed):
    with monkeypatch.context() as patch:
        At(patch, "train", 1, signal.SIGTERM)
        with pytest.raises((Stopped, KeyboardInterrupt)):
            run_pipeline(tmp_path / "run", base)
    assert not (tmp_path / "run" / "r1_zero" / "manifest.json").exists()
    assert_ends_as_if_nothing_was("pipeline", tmp_path / "run", base, undisturbed)
