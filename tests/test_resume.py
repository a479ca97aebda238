"""Stopping and going on: signals, the last checkpoint, another stage's folder, what config matters."""

import signal
import threading
from contextlib import nullcontext

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.checkpoint import load_checkpoint
from r1fast.examples import Example
from r1fast.interrupt import SIGNALS, ServersLost, Stopped, StopRequest, any_rank, stoppable
from r1fast.metrics import read_metrics
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer


def grpo(folder, *overrides, scorer=None, **kwargs) -> GRPOTrainer:
    scorer = scorer or TokenScorer()
    config = tiny_config(*overrides)
    return GRPOTrainer(tiny_policy(), config, folder, tiny_problems(), scorer, **kwargs)


def sft(folder, *overrides, **kwargs) -> SFTTrainer:
    policy, config = tiny_policy(), tiny_config(*overrides)
    examples = [Example(f"What is {a} + 1?", str(a + 1)) for a in range(8)]
    return SFTTrainer(policy, config, folder, encode_examples(examples, policy, config), **kwargs)


class SignallingScorer(TokenScorer):
    """Sends signals to its own process in the reward phase of one step."""

    def __init__(self, in_step: int, *signals: int):
        super().__init__()
        self.in_step, self.signals = in_step, signals

    def score(self, groups, step_from_end=None):
        super().score(groups, step_from_end)
        if len(self.steps_from_end) == self.in_step:
            for number in self.signals:
                signal.raise_signal(number)  # to this thread: by another one two may arrive as one


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, number, capfd):
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path / "parts", scorer=SignallingScorer(2, number)).run()
    assert [signal.getsignal(n) for n in SIGNALS] == before
    assert "stopping after this step" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "parts" / "checkpoints").step == 2
    assert len(read_metrics(tmp_path / "parts")) == 2
    assert not (tmp_path / "parts" / "model").exists()
    parts = grpo(tmp_path / "parts")
    assert parts.step == 2
    assert "goes on after step 2 of 4\n" in capfd.readouterr().out
    parts.run()
    whole = grpo(tmp_path / "whole")
    whole.run()
    for (name, p), q in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path, scorer=SignallingScorer(2, signal.SIGINT, signal.SIGINT)).run()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert load_checkpoint(tmp_path / "checkpoints") is None
    assert len(read_metrics(tmp_path)) == 1


def test_a_signal_in_the_last_step_stops_before_what_follows(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        grpo(tmp_path, scorer=SignallingScorer(4, signal.SIGTERM)).run()
    assert grpo(tmp_path).step == 4


def test_no_handlers_outside_the_main_thread(tmp_path):
    failures = []

    def run():
        try:
            grpo(tmp_path, "--grpo.num_steps=1").run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def test_a_request_is_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        assert not stop.received
        _ = 1 / 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_stop_together(monkeypatch):
    """A signal that only another rank got stops this one too."""
    assert not any_rank(False)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda x, op, meanwhile: x.fill_(1))
    assert any_rank(False)
    with pytest.raises(Stopped), StopRequest(), stoppable():
        pass


@pytest.mark.parametrize(
    ("worst", "own", "raised"),
    [(0, None, None), (1, None, Stopped), (2, None, ServersLost), (2, ServersLost, ServersLost), (2, Stopped, Stopped)],
)  # fmt: skip
def test_why_another_rank_stopped_is_why_this_one_does(monkeypatch, worst, own, raised):
    found = []

    def all_reduce(x, op, meanwhile):
        found.append(int(x))
        meanwhile()
        return x.fill_(worst)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with StopRequest(), pytest.raises(raised) if raised else nullcontext() as caught:
        with stoppable(meanwhile=lambda: found.append("meanwhile")):
            if own is not None:
                raise own("as it was")
    assert found == [{None: 0, Stopped: 1, ServersLost: 2}[own], "meanwhile"]
    if own is not None:
        assert str(caught.value) == "as it was"


def test_a_rank_that_is_done_works_until_the_others_are(monkeypatch):
    from torch import distributed as dist

    class Work:
        left = 3

        def is_completed(self):
            self.left -= 1
            return self.left < 0

        def wait(self):
            assert self.left <= 0

    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, async_op: Work())
    distributed.all_reduce(torch.zeros(1), "max", lambda: calls.append(1))
    assert len(calls) == 3


@pytest.mark.parametrize("make", [grpo, sft])
def test_a_finished_run_is_not_trained_again(tmp_path, make, capsys):
    """Also without periodic checkpoints: the last step is always saved."""
    make(tmp_path).run()
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    again = make(tmp_path)
    assert again.step == again.num_steps == 4
    assert "goes on after step" not in capsys.readouterr().out
    again.train_step = None  # would raise
    unfinished = tmp_path / "checkpoints" / ".saving-step-000002.gone"
    unfinished.mkdir()  # a kill amid the last rotation
    capsys.readouterr()
    again.run()
    assert "all 4 steps were trained before, none is repeated" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert not unfinished.exists()


def test_the_checkpoint_of_another_stage_is_refused(tmp_path):
    sft(tmp_path).run()
    for force in (False, True):
        with pytest.raises(ValueError, match=r"checkpoint of stage 'sft', this is stage 'grpo'"):
            grpo(tmp_path, force=force)
    with pytest.raises(ValueError, match="'sft', this is stage 'cold_start'"):
        sft(tmp_path, stage="cold_start")


def test_what_is_evaluated_or_sampled_later_does_not_matter_to_training(tmp_path):
    grpo(tmp_path).run()
    changed = grpo(
        tmp_path, "--eval.num_samples=2", "--sample.num_samples=9", "--data.eval=x.jsonl"
    )
    assert changed.step == 4
    with pytest.raises(ValueError, match=r"another config:\n.*grpo\.clip_eps_low"):
        grpo(tmp_path, "--grpo.clip_eps_low=0.1")


def test_other_training_data_are_refused(tmp_path):
    """An edited file of examples has the same name: the config does not show it."""
    sft(tmp_path).run()
    policy, config = tiny_policy(), tiny_config()
    edited = encode_examples([Example("What is 0 + 1?", "2")] * 8, policy, config)
    with pytest.raises(ValueError, match=r"another config:\n.*the training data"):
        SFTTrainer(policy, config, tmp_path, edited)
    assert SFTTrainer(policy, config, tmp_path, edited, force=True).step == 4


def test_a_budget_below_one_sequence_is_refused_at_once(tmp_path):
    """The longest real prompt counts, not what rollout.max_prompt_tokens would allow."""
    longest = max(map(len, grpo(tmp_path).prompt_ids))
    assert longest < 32
    grpo(tmp_path, f"--grpo.token_budget={longest + 8}")
    with pytest.raises(
        ValueError, match=rf"token_budget = {longest + 7} is less .* {longest + 8} "
    ):
        grpo(tmp_path, f"--grpo.token_budget={longest + 7}")


def test_general_prompts_join_from_the_start_where_no_last_steps_are_named(tmp_path):
    general = tiny_problems(3, kind="general")
    trainer = grpo(tmp_path, "--rewards.general_share=0.5", general=general)
    kinds = [[p.kind for p, _ in trainer._choose(step)].count("general") for step in range(4)]
    assert kinds == [2, 2, 2, 2]
