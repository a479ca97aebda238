"""metrics: lines that fit, a writer that survives crashes, rollout numbers that add over ranks."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys

import pytest
from faults import no_room

from r1fast import metrics
from r1fast.metric_help import METRIC_HELP, metric_help
from r1fast.metrics import MetricsWriter, read_metrics
from r1fast.progress import duration, progress, step_line
from r1fast.rollout_metrics import (
    finish_rollout_metrics,
    rollout_extremes,
    rollout_metrics,
    rollout_sums,
    wait_rate,
)
from r1fast.timer import Timer
from r1fast.types import Completion, Problem, Reward, RolloutGroup

ROW = {
    "step": 12,
    "stage": "r1_zero",
    "reward": 1.43,
    "reward_std": 0.5,
    "verdicts/correct": 0.71,
    "rewards/format/mean": 0.98,
    "language_share": 0.44,
    "completions/mean_length": 38.2,
    "kl": 0.0004,
    "completions/clipped_ratio": 0.0,
    "step_time": 1.2,
    "tokens_per_second": 9312.0,
}


def group(scores, lengths, texts=None, cut=(), language=None) -> RolloutGroup:
    """One problem; `scores` are accuracy, format adds one to the total."""
    completions = [
        Completion([7] * n, [-1.0] * n, "length" if i in cut else "stop", (texts or [""] * 9)[i])
        for i, n in enumerate(lengths)
    ]
    rewards = [
        Reward(
            score + 1.0,
            {"accuracy": score, "format": 1.0, "language": language},
            "correct" if score else "wrong",
        )
        for score in scores
    ]
    return RolloutGroup(Problem("1 + 1", "2"), [1, 2], completions, rewards)


def test_import_needs_neither_torch_nor_rich():
    code = "import sys, r1fast.metrics; print([m for m in ('torch', 'rich') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_step_line_reads_as_documented_and_fits():
    line = step_line(ROW, 60)
    assert line == (
        "r1_zero 12/60  reward 1.43±.50  acc .71 fmt .98 lang .44  len  38  "
        "kl .0004 cut   0  1.2s 9.3k tok/s"
    )
    wide = ROW | {"stage": "reward_models", "step": 10400, "completions/mean_length": 32768.0}
    assert len(step_line(wide, 10400)) <= 100
    narrow = step_line(ROW, 60, width=80)
    assert len(narrow) <= 80
    assert "reward 1.43" in narrow
    assert "len" in narrow


def test_step_lines_of_a_stage_align():
    first, last = (
        step_line(ROW | {"step": 1, "verdicts/correct": 0.0}, 60),
        step_line(ROW | {"step": 60, "verdicts/correct": 1.0, "reward_std": 0.0}, 60),
    )
    assert len(first) == len(last)
    assert first.index("kl") == last.index("kl")


def test_step_line_says_that_no_step_was_made():
    assert "no signal" not in step_line(ROW | {"train/steps_without_signal": 0}, 60)
    line = step_line(ROW | {"train/steps_without_signal": 2}, 60)
    assert line.endswith("no signal 2  1.2s 9.3k tok/s")
    assert len(line) <= 100


def test_step_line_has_no_minus_zero():
    assert "reward 0.00±.00" in step_line(ROW | {"reward": -0.001, "reward_std": 0.001}, 60)


def test_step_line_of_sft_and_of_missing_values():
    line = step_line({"step": 3, "stage": "sft", "loss": 1.25, "learning_rate": 5e-5}, 10)
    assert line == "sft  3/10  loss 1.2500  lr 5.00e-05"
    assert step_line({"step": 3, "stage": "sft", "loss": None}, 10) == "sft  3/10"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.96, "10s"), (59.96, "1m00s"), (65, "1m05s"), (7380, "2h03m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_log_shows_progress_with_eta_but_seldom(capsys):
    clock = Clock()
    with progress("Score", 1000, "problem", clock=clock) as bar:
        for _ in range(1000):
            clock.now += 0.05  # 50 s in all: a tenth every 5 s
            bar.update()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11, lines
    assert lines[1] == "Score  20%  200/1000 problem  eta 40s  elapsed 10s"
    assert lines[-1] == "Score  1000 problems in 50s"


def test_log_of_a_quick_stage_is_one_line(capsys):
    clock = Clock()
    with progress("Score", 100, clock=clock) as bar:
        for _ in range(100):
            clock.now += 0.001
            bar.update()
    assert capsys.readouterr().out == "Score  100 steps in 0.1s\n"


def test_progress_prints_every_nth_row_and_counts_a_resumed_start(capsys):
    clock = Clock()
    with progress("RL", 10, start=4, line_every=3, clock=clock) as bar:
        for step in range(5, 11):
            clock.now += 1.0
            bar.update(f"row {step}")
        assert bar.eta() == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("row")] == [
        "row 6", "row 9", "row 10",
    ]  # fmt: skip
    assert "eta 2.0s" in out  # 4 of the 6 left are done after 4 s, not 8 of 10


def test_interrupted_progress_says_where(capsys):
    def crash():
        with progress("RL", 10) as bar:
            bar.update()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert "RL  stopped after 1 of 10 steps" in capsys.readouterr().out


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    metrics.say("hello")
    metrics.table("t", ["a"], [["1"]])
    with progress("RL", 1) as bar:
        bar.update("row")
    assert capsys.readouterr().out == ""


def test_warn_once_on_stderr(capsys):
    metrics.warn("test_warn_once: careful")
    metrics.warn("test_warn_once: careful")
    captured = capsys.readouterr()
    assert captured.err == "warning: test_warn_once: careful\n"
    assert captured.out == ""


def test_names_that_are_numbers_stand_under_their_heading(capsys):
    metrics.table("t", ["subset", "n"], [["2024", "1"], ["7", "10"]], left=["subset"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines[-2:]] == ["2024  ", "7     "]
    assert [line.split()[1] for line in lines[-2:]] == ["1", "10"]


def test_table_aligns_numbers_and_leaves_markup_alone(capsys):
    metrics.table("Stages", ["stage", "pass@1"], [["a", ".98 ±.01"], ["[red]b[/red]", "-"]], ["n"])
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "Stages"
    assert "[red]b[/red]" in out[-2]
    assert out[-3].endswith(".98 ±.01")
    assert out[-2].endswith("       -")
    assert out[-1] == "n"


@pytest.mark.parametrize(("width", "lines"), [(100, 2), (80, 3)])
def test_a_table_breaks_at_spaces_alone(capsys, monkeypatch, width, lines):
    monkeypatch.setattr(metrics, "line_width", lambda: width)
    columns = ["stage", "parameters", "token budget", "peak memory", "a step, at most", "steps",
               "together, at most"]  # fmt: skip
    rows = [["small_base", "134 k", "32,768", "77.2 MiB", "0.0647 s", "320", "34s"],
            ["cold_start", "300 k", "32,768", "60.1 MiB", "0.162 s", "by epochs", "-"]]  # fmt: skip
    metrics.table("", columns, rows)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == lines + 3  # an empty one, headings, a rule, the rows
    assert max(map(len, out)) <= width
    assert [line.split() for line in out[-2:]] == [" ".join(row).split() for row in rows]
    head = " ".join(out[1:lines])
    assert sorted(head.split()) == sorted(" ".join(columns).split())


def test_terminal_without_unicode_prints_instead_of_raising():
    code = (
        "from r1fast.metrics import say, table, rule; rule('x'); say('1 ±2');"
        "table('t', ['a'], [['1 ±2']])"
    )
    env = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert "1 ?2" in subprocess.check_output([sys.executable, "-c", code], text=True, env=env)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_live_bar_on_a_terminal_keeps_lines_above_it(encoding):
    """Runs under a pseudo-terminal: rows are printed whole, bars may nest."""
    import os
    import pty

    code = (
        "from r1fast.progress import progress\n"
        "with progress('Outer', 3) as bar:\n"
        "    for i in range(3):\n"
        "        bar.update(f'row {i} \\u00b1')\n"
        "        with progress('Inner', 2) as inner: inner.update(); inner.update()\n"
    )
    reader, writer = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": ":".join(sys.path)}
    env["PYTHONIOENCODING"] = encoding
    child = subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=writer, env=env)
    os.close(writer)
    out = b""
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:
            break
        if not chunk:
            break
        out += chunk
    assert child.wait() == 0, out.decode()
    text = out.decode()
    mark = "±" if encoding == "utf-8" else "?"
    assert f"row 0 {mark}\r\n" in text
    assert f"row 2 {mark}\r\n" in text
    assert "Outer  3 steps in" in text
    assert "0/3 step" in text, "how many there will be is said from the start"


def test_timer_adds_up_and_starts_again():
    clock = Clock()
    timer = Timer(clock=clock)
    for seconds in (1.0, 2.5):
        with timer("rollout"):
            clock.now += seconds
    with contextlib.suppress(KeyError), timer("update"):
        clock.now += 1.0
        raise KeyError
    assert timer.take() == {"time/rollout": 3.5, "time/update": 1.0}
    assert timer.take() == {}


def test_writer_rows_come_back_and_nonfinite_is_null(tmp_path):
    with MetricsWriter(tmp_path / "run", stage="rl_1") as writer:
        writer.write(1, {"loss": 0.5, "kl": math.nan, "grad_norm": math.inf})
        on_disk = read_metrics(tmp_path / "run")  # flushed before close
    assert on_disk[0]["loss"] == 0.5
    assert on_disk[0]["kl"] is None
    assert on_disk[0]["nonfinite"] == ["kl", "grad_norm"]
    assert on_disk[0]["stage"] == "rl_1"
    assert on_disk[0]["step"] == 1
    assert on_disk[0]["time"] > 1e9
    json.loads((tmp_path / "run/metrics.jsonl").read_text(), parse_constant=pytest.fail)


def test_writer_takes_scalars_of_torch_and_numpy(tmp_path):
    torch = pytest.importorskip("torch")
    with MetricsWriter(tmp_path) as writer:
        row = writer.write(1, {"loss": torch.tensor(0.5), "kl": torch.tensor(math.nan)})
    assert row["loss"] == 0.5
    assert row["nonfinite"] == ["kl"]


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 40.0})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 40.0
    assert not list(tmp_path.glob("*.part"))


def test_rows_wait_while_the_disk_is_full(tmp_path, capsys):
    """Half a row may be on disk by then: what follows goes behind it."""
    writer = MetricsWriter(tmp_path)
    writer.write(1, {})
    with no_room(writer.path.stat().st_size + 10):
        writer.write(2, {})
        writer.write(3, {"loss": 0.5})
    assert "its rows wait for the next step: [Errno 27]" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    writer.write(4, {})
    writer.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["loss"] == 0.5


def test_rows_that_never_could_be_written_are_told(tmp_path, capsys):
    with no_room(10), MetricsWriter(tmp_path) as writer:
        writer.write(1, {})
        writer.write(2, {})
    assert "lacks its last 2 rows" in capsys.readouterr().err


def test_reopening_without_resume_keeps_rows_and_mends_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # the newline was lost
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", "[[1, 2]]", '{"step": "x"}', '{"step": null}', "[" * 90000, '{"step": 1', "\0\0", '{"step": 1' + "0" * 400 + "}"])  # fmt: skip
def test_a_line_that_is_no_row_is_kept_aside_and_the_run_goes_on(tmp_path, capsys, bad):
    """Nobody is to mend a file at night before a run resumes."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": "\\ud800"}\n' + bad + '\n{"step": 2}\n{"step": 3}\n')
    with pytest.raises(
        ValueError, match=r"metrics.jsonl:2 is not a metrics row .*Delete the line, or start"
    ):
        read_metrics(path)
    metrics._warn_once.cache_clear()
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {})
    said = capsys.readouterr().err
    assert "1 lines are no rows and were moved to metrics.jsonl.damaged, the first line 2 (" in said
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(b'{"step": 1, "x": "\\ud800"}\n{"step": 2}\n')
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == bad + "\n"
    MetricsWriter(tmp_path, resume_step=3).close()
    assert capsys.readouterr().err == ""


def test_a_last_line_that_was_cut_off_is_dropped_and_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\xc3')
    metrics._warn_once.cache_clear()
    MetricsWriter(tmp_path, resume_step=1).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    assert "its last line was cut off, as by a crash" in capsys.readouterr().err
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize(
    ("option", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_logger_names_the_extra(tmp_path, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"log\.{option}.*r1fast\[loggers\]"):
        MetricsWriter(tmp_path, **{option: True})


def test_wandb_is_offline_unless_told(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    class Wandb:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsWriter(tmp_path, wandb=True, project="p", run_name="r") as writer:
        writer.write(3, {"loss": 0.5, "kl": math.nan})
    assert calls[0]["mode"] == "offline"
    assert calls[0]["project"] == "p"
    assert calls[1] == (3, {"step": 3, "loss": 0.5})
    assert calls[2] == "finish"


def test_wait_rate_counts_whole_words_in_any_case():
    assert wait_rate(["Wait, 3", "the waiter", "let me  check", "I re-check it", "verify"]) == 0.8
    assert wait_rate([]) == 0


def test_rollout_metrics_by_hand():
    groups = [
        group([1.0, 0.0, 1.0], [4, 10, 6], ["wait", "no", "no"], cut=[1], language=0.5),
        group([1.0, 1.0, 1.0], [5, 5, 5], language=1.0),
    ]
    row = rollout_metrics(groups)
    assert row["reward"] == pytest.approx(11 / 6)
    assert row["reward_std"] == pytest.approx(statistics.stdev([2.0, 1.0, 2.0]) / 2)
    assert row["frac_reward_zero_std"] == 0.5
    assert row["rewards/accuracy/mean"] == pytest.approx(5 / 6)
    assert row["rewards/accuracy/std"] == pytest.approx(statistics.stdev([1, 0, 1, 1, 1, 1]))
    assert row["rewards/format/std"] == 0
    assert row["language_share"] == row["rewards/language/mean"] == pytest.approx(0.75)
    assert row["completions/mean_length"] == pytest.approx(35 / 6)
    assert (row["completions/min_length"], row["completions/max_length"]) == (4, 10)
    assert row["completions/mean_terminated_length"] == 5
    assert row["completions/clipped_ratio"] == pytest.approx(1 / 6)
    assert row["verdicts/correct"] == pytest.approx(5 / 6)
    assert row["verdicts/timeout"] == 0
    assert row["wait_rate"] == pytest.approx(1 / 6)


def test_a_reward_that_does_not_apply_is_not_counted_as_zero():
    general = group([1.0, 1.0], [3, 3])
    for reward in general.rewards:
        reward.verdict, reward.parts = None, {"accuracy": None, "helpfulness": 2.0}
    row = rollout_metrics([general, group([1.0, 0.0], [3, 5], ["wait", ""], language=None)])
    assert row["rewards/accuracy/mean"] == 0.5
    assert row["verdicts/correct"] == 0.5
    assert row["rewards/helpfulness/mean"] == 2.0
    assert row["wait_rate"] == 0.5, "small talk does not dilute it"
    assert (row["completions/mean_length"], row["completions/mean_verified_length"]) == (3.5, 4)
    assert rollout_metrics([general])["wait_rate"] == 0
    assert "language_share" not in row


def test_sums_of_ranks_add_up_to_the_whole():
    ranks = [
        [group([1.0, 0.0], [4, 10], ["wait", ""], language=0.3)],
        [group([1.0, 1.0], [5, 7], language=0.9), group([0.0, 0.0], [1, 2], cut=[0])],
        [],
    ]
    parts = ["accuracy", "format", "language"]
    sums = [rollout_sums(groups, parts) for groups in ranks]
    assert len({tuple(s) for s in sums}) == 1, "every rank must hold the same keys in one order"
    total = {key: sum(s[key] for s in sums) for key in sums[0]}
    extremes = [rollout_extremes(groups) for groups in ranks]
    low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    assert finish_rollout_metrics(total, low, high) == pytest.approx(
        rollout_metrics([g for groups in ranks for g in groups])
    )


def test_nothing_rolled_out_gives_no_numbers():
    assert rollout_metrics([]) == {}


def test_every_rollout_metric_is_documented():
    for name in rollout_metrics([group([1.0, 0.0], [1, 2], language=0.5)]):
        assert metric_help(name)[1], name
    assert metric_help("time/rollout")[0] == "s"
    assert metric_help("rewards/x/std") == METRIC_HELP["rewards/<name>/std"]
    assert metric_help("nonsense") == ("", "")


def test_every_number_of_a_reward_model_and_of_an_update_is_explained():
    for name in ("ratio", "accuracy", "eval/accuracy", "eval/loss"):
        assert metric_help(name)[1], name
    line = step_line({"step": 3, "stage": "safety model", "loss": 0.5, "accuracy": 0.81})
    assert "acc .81" in line


def test_rows_that_a_resumed_run_misses_are_told(tmp_path, capsys):
    def told(resume_step: int) -> str:
        MetricsWriter(tmp_path, stage="grpo", resume_step=resume_step).close()
        return capsys.readouterr().err

    def write(*steps: int) -> None:
        rows = [{"step": step, "stage": "grpo"} for step in steps]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert told(0) == ""
    assert "lacks 3 of the 3 steps that the checkpoint has seen, the first step 1" in told(3)
    write(1, 2, 3, 4)
    assert told(3) == ""
    write(1, 3, 4)
    assert "lacks 1 of the 3 steps that the checkpoint has seen, the first step 2" in told(3)
    write(1, 2)
    assert "has 2 steps of a run of which there is no checkpoint here" in told(0)
    assert told(0) == ""  # they are dropped
