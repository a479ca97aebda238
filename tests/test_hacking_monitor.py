"""The hacking monitor: what raises it, what does not, and a real run whose reward is hackable."""

import pytest
import torch
from tiny import tiny_config, tiny_policy, tiny_problems

from r1fast import metrics
from r1fast.batch import pack
from r1fast.checkpoint import load_checkpoint
from r1fast.config import MonitorConfig, RewardConfig, TemplateConfig, load_config
from r1fast.evaluate import short_evaluation
from r1fast.forward import hidden_states
from r1fast.hacking_monitor import HackingMonitor, RewardHackingError
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.metrics import read_metrics
from r1fast.progress import step_line
from r1fast.report import write_report
from r1fast.rewards.math import MathReward
from r1fast.rewards.score import RewardScorer
from r1fast.trainer import GRPOTrainer
from r1fast.types import Problem, Sequence


def watched(script, **options) -> tuple[HackingMonitor, list[dict]]:
    """A monitor that has seen (rewards of the steps, pass@1, its error) one after the other."""
    monitor, rows, step = HackingMonitor(MonitorConfig(**options)), [], 0
    for rewards, score, error in script:
        for reward in rewards:
            step += 1
            monitor.saw_reward(reward)
        rows.append(monitor.saw_evaluation(step, {"pass@1": score, "pass@1_stderr": error}))
    return monitor, rows


def test_alarm_where_the_reward_rises_and_pass_at_1_falls():
    monitor, rows = watched([([0.4, 0.6], 0.6, 0.03), ([0.8, 1.0], 0.5, 0.04)])
    assert rows[0] == {}
    assert rows[1]["hacking/fall"] == pytest.approx(0.1 / 0.05)
    assert rows[1]["hacking/rise"] == pytest.approx(0.4 / (0.1 * 2**0.5))
    assert rows[1]["hacking/alarm"] == 1.0
    assert "rose from 0.500 to 0.900 since step 2" in monitor.alarm
    assert "fell from 0.600 to 0.500 (2.0 standard errors)" in monitor.alarm


@pytest.mark.parametrize(
    "second",
    [
        ([0.8, 1.0], 0.57, 0.04),  # within the error of pass@1
        ([0.8, 1.0], 0.7, 0.04),  # both rise
        ([0.3, 0.5], 0.4, 0.04),  # both fall: worse, not hacked
        ([0.2, 0.9], 0.4, 0.04),  # the reward's rise is noise
    ],
)
def test_no_alarm(second):
    monitor, rows = watched([([0.4, 0.6], 0.6, 0.03), second])
    assert rows[1]["hacking/alarm"] == 0.0
    assert monitor.alarm == ""


def test_a_slow_fall_is_seen_against_the_best_in_the_window():
    script = [([0.5 + i / 10, 0.5 + i / 10], 0.6 - 0.02 * i, 0.03) for i in range(4)]
    assert [r.get("hacking/alarm") for r in watched(script)[1]] == [None, 0.0, 0.0, 1.0]
    assert [r.get("hacking/alarm") for r in watched(script, window=1)[1]] == [None, 0.0, 0.0, 0.0]
    assert watched(script, num_errors=3.0)[1][-1]["hacking/alarm"] == 0.0


def test_what_cannot_be_compared_is_left_out():
    assert watched([([0.1], 0.5, 0.1), ([0.9], 0.1, 0.1)], action="off")[1] == [{}, {}]
    monitor, rows = watched([([], 0.5, 0.1), ([float("nan"), None], 0.4, 0.1), ([1.0], 0.3, 0.1)])
    assert rows == [{}, {}, {}]  # no reward was seen before the third
    assert monitor.saw_evaluation(9, {}) == {}
    _, rows = watched([([0.1, 0.2], 1.0, None), ([0.8, 0.9], 0.0, None)])  # one problem: no error
    assert (rows[1]["hacking/fall"], rows[1]["hacking/alarm"]) == (0.0, 0.0)


def test_its_state_survives_a_resume():
    script = [([0.4, 0.6], 0.6, 0.03), ([0.8, 1.0], 0.5, 0.04)]
    first, _ = watched(script[:1])
    first.saw_reward(0.8)
    second = HackingMonitor(MonitorConfig())
    second.load_state(first.state())
    second.saw_reward(1.0)
    row = second.saw_evaluation(4, {"pass@1": 0.5, "pass@1_stderr": 0.04})
    assert row == watched(script)[1][1]


# --- a real run

ANSWER = r"\boxed{7}"


@pytest.fixture(scope="module")
def schooled() -> dict[str, torch.Tensor]:
    """Weights of a tiny policy that answers 7 to everything, most of the time."""
    policy = tiny_policy()
    policy.model.requires_grad_(True)
    encode = policy.tokenizer.encode
    learn = [*encode(ANSWER, add_special_tokens=False), policy.eos_id]
    rows = [Sequence(encode(p.prompt), learn) for p in problems()]
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=5e-3)
    weights = [1 / (len(rows) * len(learn))] * len(rows)
    for _ in range(45):
        for batch in pack(rows, 1000, weights):
            linear_cross_entropy(
                hidden_states(policy.model, batch), policy.model.head_weight, batch.target_ids,
                token_weights=batch.token_weights, reduction="sum",
            ).backward()  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
    return {name: x.detach().clone() for name, x in policy.model.state_dict().items()}


def problems() -> list[Problem]:
    return [Problem(p.prompt, "7", p.id) for p in tiny_problems()]


def sevens(completions, **columns):
    """A lazy grader: every 7 is paid for, wherever it stands."""
    return [text.count("7") / 8 for text in completions]


def run(folder, weights, action, *, pay=sevens, accuracy=0.0, **overrides) -> GRPOTrainer:
    metrics._warn_once.cache_clear()
    policy = tiny_policy()
    policy.model.load_state_dict(weights)
    config = tiny_config(
        "--grpo.num_steps=8", "--rollout.num_generations=8", "--rollout.max_completion_tokens=12",
        "--optim.lr=0.005", "--grpo.kl_coef=0", "--eval.every_steps=2", "--eval.every_num_samples=4",
        "--eval.temperature=1", f"--monitor.action={action}",
        *(f"--{k.replace('__', '.')}={v}" for k, v in overrides.items()),
    )  # fmt: skip
    with RewardScorer(
        RewardConfig(accuracy=accuracy, format=0.0), TemplateConfig(name="raw", protocol="think"), 12,
        extra={"sevens": (pay, 1.0)}, grader=MathReward(symbolic=False),
    ) as scorer:  # fmt: skip
        trainer = GRPOTrainer(
            policy, config, folder, problems(), scorer,
            evaluate=short_evaluation(policy, problems(), config, scorer),
        )  # fmt: skip
        trainer.run()
    return trainer


def test_a_hackable_reward_is_found_out_and_the_run_stopped(tmp_path, schooled, capsys):
    run(tmp_path / "warn", schooled, "warn")
    rows = read_metrics(tmp_path / "warn")
    assert len(rows) == 8
    scores = [row["eval/pass@1"] for row in rows if "eval/pass@1" in row]
    alarms = [row["step"] for row in rows if row.get("hacking/alarm")]
    assert alarms, (scores, [row["reward"] for row in rows])
    assert min(scores) < 0.5 * max(scores)
    assert rows[-1]["rewards/sevens/mean"] > 2 * rows[0]["rewards/sevens/mean"]
    shown = capsys.readouterr()
    assert "the reward is being hacked?" in " ".join(shown.err.split())
    assert "hacked?" in shown.out
    page = write_report(tmp_path / "warn").read_text()
    assert "the training reward may be hacked. At step" in page

    with pytest.raises(RewardHackingError, match=rf"step {alarms[0]}: .* --monitor.action=warn"):
        run(tmp_path / "stop", schooled, "stop")
    assert len(read_metrics(tmp_path / "stop")) == alarms[0]
    saved = load_checkpoint(tmp_path / "stop/checkpoints")
    assert saved.step == alarms[0]
    assert saved.state["monitor"]["points"][-1]["step"] == alarms[0]
    # a person has looked at it and goes on: the same steps as without the stop
    run(tmp_path / "stop", schooled, "warn")
    again = read_metrics(tmp_path / "stop")
    assert [r["reward"] for r in again] == pytest.approx([r["reward"] for r in rows], abs=1e-6)
    assert [r.get("hacking/fall") for r in again] == [r.get("hacking/fall") for r in rows]


def test_an_honest_reward_raises_no_alarm(tmp_path, schooled):
    run(tmp_path, schooled, "stop", pay=lambda completions, **_: [0.0] * len(completions),
        accuracy=1.0, optim__lr=0.002)  # fmt: skip
    rows = read_metrics(tmp_path)
    assert sum("hacking/alarm" in row for row in rows) == 3
    assert min(row["eval/pass@1"] for row in rows if "eval/pass@1" in row) > 0.8
    assert not any(row.get("hacking/alarm") for row in rows)


def test_the_terminal_line_and_the_config():
    assert step_line({"step": 3, "reward": 1.0, "hacking/alarm": 1.0}).endswith("hacked?")
    assert "hacked" not in step_line({"step": 3, "reward": 1.0, "hacking/alarm": 0.0})
    with pytest.raises(ValueError, match=r"monitor.action must be warn or off where eval.every"):
        load_config(None, ["--monitor.action=stop"])
    with pytest.raises(ValueError, match=r"monitor.window must be at least 1"):
        load_config(None, ["--monitor.window=0"])
