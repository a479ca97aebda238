"""The soak, short, and that its checks see what they are for."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soak
import soak_report
import soak_runs
import torch
from faults import DAMAGES
from soak_checks import GROWTH_BYTES, Checks
from soak_kinds import BY_NAME, KILL_AND_FLIP, KINDS, Deck

from r1fast.checkpoint import save_checkpoint
from r1fast.hf_folder import write_safetensors

STAGES = ("base", "r1_zero")
STEPS = 4


@pytest.mark.slow
def test_a_short_soak(tmp_path):
    """Whatever comes in 25 s, of all kinds but hangs, after a round that is left alone."""
    program = Path(soak.__file__)
    words = ["--short", "--seconds=25", "--seed=1", f"--out={tmp_path / 'soak'}"]
    done = subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": f"{soak_runs.ROOT}:{program.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    result = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert result["broken"] == []
    assert result["injected"] == result["survived"] >= 2  # more where nobody else wants the machine
    assert result["rounds_done"] >= 1
    assert result["rounds_equal"] >= 1  # as far as it came
    assert {row["fault"] for row in result["faults"]} <= set(BY_NAME)


def test_exact_is_kills_and_damage():
    assert set(KILL_AND_FLIP) == {"kill -9", "kill -9 inside a save", *DAMAGES}
    assert all(BY_NAME[name].exact for name in KILL_AND_FLIP)


@pytest.fixture
def run(tmp_path):
    """(checks, folder) of a round that is as it should be."""
    size = SimpleNamespace(every=2, steps=dict.fromkeys(STAGES, STEPS))
    return Checks(size, STAGES), fill(tmp_path / "run")


def fill(folder: Path) -> Path:
    for stage in STAGES:
        (folder / stage / "model").mkdir(parents=True)
        write_rows(folder / stage, range(1, STEPS + 1))
        weights = {"w": torch.ones(2)}
        write_safetensors(folder / stage / "model" / "model.safetensors", weights)
        save_checkpoint(folder / stage / "checkpoints", STEPS, {"model": weights}, {})
    return folder


def write_rows(folder: Path, steps, **changes) -> None:
    rows = [
        {"step": step, "reward": 0.5, "loss": 1.0, "step_time": 0.1} | changes for step in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole_round(checks: Checks, folder: Path, *, number: int = 0, bitwise: bool = False) -> None:
    checks.begin_round(number, folder, bitwise=bitwise)
    checks.begin_run()
    checks.end_run(0, None)
    checks.end_round(True, 1.0)


def test_a_good_round_breaks_nothing(run):
    checks, folder = run
    whole_round(checks, folder)
    whole_round(checks, folder, number=1, bitwise=True)
    assert checks.broken_invariants == []
    assert [r.get("equal") for r in checks.rounds] == [None, True]


def test_what_is_to_be_done_again_need_not_be_equal(run):
    """Of a round that the time has ended, rows after the checkpoint: of a step with a NaN, say."""
    checks, folder = run
    whole_round(checks, folder)
    rows = [{"step": step, "reward": 0.5, "loss": 1.0, "step_time": 0.1} for step in range(1, 6)]
    rows[-1]["loss"] = None
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "base" / "metrics.jsonl").write_text(text)
    checks.begin_round(1, folder, bitwise=True)
    checks.end_round(False, 1.0)
    assert checks.broken_invariants == []
    assert checks.rounds[-1]["equal"]


def nan_weights(folder: Path) -> None:
    bad = {"w": torch.tensor([1.0, torch.nan])}
    write_safetensors(folder / "base" / "model" / "model.safetensors", bad)


FAULTY = {
    "gap": (lambda f: write_rows(f / "base", [1, 2, 4]), "the steps of metrics.jsonl are [1, 2, 4]"),
    "twice": (lambda f: write_rows(f / "base", [1, 2, 2, 3]), "are [1, 2, 2, 3]"),
    "short": (lambda f: write_rows(f / "r1_zero", [1, 2]), "2 steps in metrics.jsonl of 4"),
    "rubbish": (
        lambda f: (f / "base" / "metrics.jsonl").write_text("?\n{}\n"),
        "is not a metrics row",
    ),
    "collapse": (
        lambda f: write_rows(f / "r1_zero", range(1, 5), reward=0.1),
        "the reward is 0.100 at the end, 0.500 when left alone",
    ),
    "other": (lambda f: write_rows(f / "base", range(1, 5), loss=2.0), "step 1 is another one"),
    "weights": (nan_weights, "the model does not load"),
    "bytes": (nan_weights, "other bytes in model/model.safetensors"),
    "part": (lambda f: (f / "base" / ".x.1.part").touch(), "left behind: base/.x.1.part"),
    "unfinished": (
        lambda f: (f / "base" / "checkpoints" / ".saving-step-000001").mkdir(),
        "left behind: base/checkpoints/.saving-step-000001",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_what_is_wrong_is_named(run, fault):
    checks, folder = run
    whole_round(checks, folder)
    spoil, said = FAULTY[fault]
    spoil(folder)
    whole_round(checks, folder, number=1, bitwise=True)
    assert any(said in text for text in checks.broken_invariants), checks.broken_invariants


def event(step: int, **changes) -> dict:
    held = {"rss": 300 << 20, "files": 7, "threads": 4}
    return {"stage": "base", "step": step, "nth": step, "seconds": 0.5, **held, **changes}


@pytest.mark.parametrize(
    ("kind", "code", "steps", "broken"),
    [
        ("kill -9", -9, 8, False),
        ("kill -9", -9, 9, True),
        ("SIGTERM", 130, 4, False),
        ("SIGTERM", 130, 5, True),
    ],
)
def test_work_that_is_lost_is_counted_and_bounded(run, kind, code, steps, broken):
    """Two intervals of 2 steps after a kill, one of them in flight; none after a signal."""
    checks, folder = run
    checks.begin_round(1, folder, bitwise=False)
    checks.begin_run()
    for step in range(1, steps + 1):
        checks.step(event(step))
    checks.before_fault()
    text = checks.fault(BY_NAME[kind], code, "base", 0.1, True)
    lost = steps - STEPS
    assert text == (f"lost {lost} ({lost / 2:.1f}s)" if lost else "")
    assert checks.rows[kind]["steps_lost"] == lost
    assert bool(checks.broken_invariants) == broken


def test_what_grows_is_named(run):
    checks, folder = run
    checks.begin_round(0, folder, bitwise=False)
    for n in range(9):
        checks.begin_run()
        for step in range(1, 9):
            more = {"rss": (300 << 20) + n * 3 * GROWTH_BYTES, "files": 7 + n, "threads": 4}
            checks.step(event(step, **more))
        checks.end_run(0, None)
    result = checks.result(seconds=1.0, seed=0)
    grown = [text.split(": ")[1].split(" ")[0] for text in result["broken"]]
    assert grown == ["rss", "files"]
    assert result["held"]["base"]["threads"] == [4, 4]


def test_temporary_files_are_those_of_kills(run, tmp_path):
    checks, _ = run
    (tmp_path / "a").touch()
    checks.temporary_files(tmp_path)
    assert "2 temporary files after 0 kills" in checks.broken_invariants[0]


def test_each_kind_comes_once_before_any_comes_again():
    names = [kind.name for kind in KINDS]
    deck = Deck(names, random.Random(0))
    drawn = [deck.draw(lambda kind: True).name for _ in range(2 * len(names))]
    assert sorted(drawn[: len(names)]) == sorted(drawn[len(names) :]) == sorted(names)
    again = Deck(names, random.Random(0))
    assert [again.draw(lambda kind: True).name for _ in names] == drawn[: len(names)]
    only = deck.draw(lambda kind: kind.name == "SIGINT")
    deck.put_back(only)
    assert deck.draw(lambda kind: kind.name == "SIGINT") is only
    assert deck.draw(lambda kind: False) is None


def test_the_table_fits_and_goes_into_the_page(run, tmp_path, monkeypatch):
    checks, folder = run
    checks.begin_round(0, folder, bitwise=False)
    checks.begin_run()
    for step in range(1, 9):
        checks.step(event(step))
    for kind in KINDS:
        checks.before_fault()
        checks.fault(kind, kind.ends[0], "", 1.0, True)
    checks.end_run(0, None)
    checks.end_round(True, 3.0)
    checks.broken("this is wrong")
    result = checks.result(seconds=1900.0, seed=0)
    lines = soak_report.terminal(result).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "BROKEN: this is wrong" in lines[-1]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{soak_report.BEGIN}old\n{soak_report.END}after\n")
    monkeypatch.setattr(soak_report, "PAGE", page)
    soak_report.fill_page(result)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| a hang | 1 | 1 | 1 | 0 |" in text
    assert "| **broken** | this is wrong |" in text
    assert "old" not in text


@pytest.mark.parametrize(("held", "code"), [(True, 0), (False, 1)])
def test_a_broken_invariant_is_the_exit_code(tmp_path, monkeypatch, held, code):
    made = SimpleNamespace(run=lambda: held, out=tmp_path)
    monkeypatch.setattr(soak, "Soak", lambda *args, **kwargs: made)
    monkeypatch.setattr(sys, "argv", ["soak", "--short"])
    assert soak.main() == code
