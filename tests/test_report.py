"""report: one page that needs nothing else, whatever the run folder holds or lacks."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from r1fast import metrics
from r1fast.report import print_stage_table, report_on, write_report
from r1fast.report.charts import (
    MAX_POINTS,
    Series,
    curve_chart,
    label_lines,
    nice_ticks,
    rolling_mean,
    segment_widths,
    shorten,
)

STAGES = [  # name, title, kind, starts from, steps, pass@1, language, wait, length, seconds
    ("base", "Base", "sft", "", 80, (0.0, 0.63), (0.5, 0.53), (0.1, 0.12), (20, 24), 212.0),
    ("r1_zero", "R1-Zero", "grpo", "base", 60, (0.63, 1.0), (0.53, 0.36), (0.12, 0.79), (24, 44), 87),
    ("cold_start", "Cold-start SFT", "sft", "base", 40, (0, 0.94), (0, 0.63), (0, 0.35), (0, 33), 9),
    ("rl_1", "RL + language reward", "grpo", "cold_start", 30, (0.94, 1.0), (0.63, 0.995),
     (0.35, 0.75), (33, 44), 51.0),
    ("rejection", "Rejection sampling", "data", "rl_1", 0, None, None, None, None, 14.0),
    ("sft", "SFT from base", "sft", "base", 60, (0, 1.0), (0, 1.0), (0, 0.24), (0, 32), 12.0),
    ("rl_2", "RL, all scenarios", "grpo", "sft", 30, (0.99, 1.0), (0.98, 1.0), (0.24, 0.3),
     (32, 33), 44.0),
    ("small_base", "Small base", "sft", "", 60, (0, 0.56), (0, 0.5), (0, 0.1), (0, 24), 61.0),
    ("distill", "Distilled small model", "sft", "small_base", 50, (0, 1.0), (0, 1.0), (0, 0.29),
     (0, 33), 9.0),
    ("small_rl", "RL on the small base", "grpo", "small_base", 60, (0.56, 0.98), (0.5, 0.55),
     (0.1, 0.09), (24, 29), 25.0),
]  # fmt: skip
LEXICON = {"en": ["is", "so"], "zh": ["shi", "suoyi"]}


def build_run(root: Path, stages=STAGES, num_problems: int = 40, seed: int = 0) -> Path:
    """A made-up pipeline run that looks like the demo's."""
    rng = random.Random(seed)
    entries = []
    for name, title, kind, start, steps, score, language, wait, length, seconds in stages:
        folder = root / name
        folder.mkdir(parents=True)
        entries.append({
            "name": name, "title": title, "folder": name, "status": "done", "seconds": seconds,
            "kind": kind, "starts_from": start,
        })  # fmt: skip
        _dump(folder / "manifest.json", entries[-1])
        rows = [
            _row(rng, name, kind, i + 1, steps, score, language, wait, length, seconds)
            for i in range(steps)
        ]
        if rows:
            _dump_rows(folder / "metrics.jsonl", rows)
        if score:
            verdicts = {"correct": score[1], "wrong": round(1 - score[1], 4), "no_answer": 0.0}
            _dump(folder / "eval.json", {
                "pass@1": score[1], "pass@1_stderr": round(0.4 * (1.001 - score[1]) ** 0.5 / 8, 4),
                "cons@k": min(score[1] + 0.04, 1.0), "k": 8, "num_problems": num_problems,
                "format_rate": 0.89 if "base" in name else 0.998, "language_share": language[1],
                "wait_rate": wait[1], "mean_length": float(length[1]), "clip_rate": 0.001,
                "verdicts": verdicts,
            })  # fmt: skip
            _dump_rows(folder / "samples.jsonl", [
                _sample(rng, i, score[1], language[1], wait[1]) for i in range(num_problems)
            ])  # fmt: skip
        else:
            _dump(folder / "accounting.json", {
                "sampled": 4000, "kept": 812,
                "dropped": {"wrong": 11, "language": 96, "duplicate": 1203, "per_prompt_limit": 1878},
                "kept_by_hand": 0, "edited": 0, "rejected": 0,
            })  # fmt: skip
    _dump(root / "manifest.json", {
        "title": "The R1 recipe on a running sum",
        "config": {"seed": seed, "output_dir": "runs/demo", "data": {"language": ""},
                   "rollout": {"num_generations": 16, "temperature": 1.0},
                   "rewards": {"accuracy": 1.0, "lexicon": LEXICON}},
        "stages": entries, "device": "cpu (2 cores)", "commit": "285bfd7", "torch": "2.13.0",
        "started": "2025-11-21T04:27:00", "seconds": 524.0,
        "claims": [
            {"claim": "R1-Zero raises pass@1 without any SFT", "measured": "0.63 → 1.00",
             "bar": "from 0.2-0.7 to ≥ 0.95", "ok": True},
            {"claim": "Reasoning gets longer by itself", "measured": "24 → 44 tokens",
             "bar": "longer by ≥ 20 %", "ok": True},
            {"claim": "Re-checks appear by themselves", "measured": "0.12 → 0.79",
             "bar": "at least doubled", "ok": True},
            {"claim": "The language drifts without the language reward", "measured": 0.36,
             "bar": "< 0.9", "ok": True},
            {"claim": "The distilled small model is no worse than RL on it", "measured": 0.94,
             "bar": "≥ 0.98", "ok": False},
            {"claim": "Not run", "measured": None, "bar": "≥ 0.95", "ok": None},
        ],
    })  # fmt: skip
    return root


def _row(rng, name, kind, step, steps, score, language, wait, length, seconds) -> dict:
    u = 1 / (1 + math.exp(-10 * (step / steps - 0.35)))

    def between(pair, noise):
        return pair[0] + (pair[1] - pair[0]) * u + rng.gauss(0, noise)

    per_step = 0.9 * seconds / steps
    row = {"step": step, "stage": name, "time": 1.7e9 + step, "step_time": per_step}
    if kind == "sft":
        row |= {"loss": 2.9 * math.exp(-4 * step / steps) + 0.35 + rng.gauss(0, 0.03),
                "learning_rate": 5e-5, "grad_norm": 1.0, "time/update": 0.95 * per_step}  # fmt: skip
        return row
    share = {"a": between(score, 0.03), "l": between(language, 0.03), "w": between(wait, 0.04)}
    share = {k: min(max(v, 0), 1) for k, v in share.items()}
    row |= {
        "reward": share["a"] + 0.95 + 0.05 * u, "reward_std": 0.4 * (1 - share["a"]),
        "verdicts/correct": share["a"], "rewards/format/mean": 0.95 + 0.05 * u,
        "language_share": share["l"], "wait_rate": share["w"],
        "completions/mean_length": between(length, 0.7), "kl": abs(0.02 * u + rng.gauss(0, 0.001)),
        "entropy": 0.6 - 0.45 * u + rng.gauss(0, 0.01), "completions/clipped_ratio": 0.0,
        "time/rollout": 0.55 * per_step, "time/reward": 0.05 * per_step,
        "time/reference": 0.1 * per_step, "time/update": 0.25 * per_step,
        "checkpoint/seconds": 0.05 * per_step,
    }  # fmt: skip
    if step % 20 == 0:
        row["eval/pass@1"] = min(max(share["a"] + rng.gauss(0, 0.02), 0), 1)
    return row


def _sample(rng, i: int, score: float, language: float, wait: float) -> dict:
    digits = [random.Random(f"{i}/{j}").randrange(10) for j in range(8)]
    words, total = [], 0
    for j, d in enumerate(digits):
        total = (total + d) % 10
        words += [str(d), rng.choices(["is", "shi"], [language, 1 - language])[0], str(total)]
        words += [rng.choices(["so", "suoyi"], [language, 1 - language])[0]] if j < 7 else []
    if rng.random() < wait:
        words += ["wait", *(str(sum(digits[: j + 1]) % 10) for j in range(8))]
    correct = rng.random() < score
    answer = str(total if correct else (total + 3) % 10)
    text = f"<think> {' '.join(words)} </think> <answer> {answer} </answer>"
    return {
        "problem_id": f"eval-{i}", "prompt": f"sum {' '.join(map(str, digits))} ?",
        "answer": str(total), "sample": 0, "text": text, "finish_reason": "stop",
        "num_tokens": len(text.split()), "extracted": answer, "format": 1.0,
        "verdict": "correct" if correct else "wrong", "language_share": language,
    }  # fmt: skip


def _dump(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _dump_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Balanced tags, visible words, and whatever would be fetched or run."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.problems, self.tags, self.words = [], [], [], []
        self.feed(page)
        self.problems += [f"<{tag}> is never closed" for tag in self.open]
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = {name for name, _ in attrs}
        if names & {"src", "href", "srcset", "data", "onload", "onerror", "onclick"}:
            self.problems.append(f"<{tag} {attrs}>")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def render(root: Path) -> tuple[str, Checker]:
    path = write_report(root)
    assert path == root / "report.html"
    page = path.read_text(encoding="utf-8")
    checker = Checker(page)
    assert checker.problems == []
    return page, checker


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    _dump(path, value)


def test_page_is_whole_and_needs_nothing_else(finished):
    page, checker = render(finished)
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
    assert str(finished.parent) not in page, "a path of the machine is in the page"
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page
    assert checker.tags.count("h1") == 1
    svgs = re.findall(r'<svg viewBox="0 0 360 \d{3}" role="img" aria-label="', page)
    assert page.count("<svg") == len(svgs) == 9
    assert len(page) < 300_000
    for word in ("claims, measured", "Stages", "Training curves", "before and after", "Provenance"):
        assert word in checker.text


def test_summary_stages_and_claims_show_what_is_stored(finished):
    page, checker = render(finished)
    assert "pass@1 went from 0.63 (Base) to 1.00 (RL, all scenarios)" in checker.text
    assert "4 of 6 claims hold" in checker.text
    assert checker.text.count("✓ holds") == 4
    assert checker.text.count("✗ fails") == 1
    assert "not measured" in checker.text
    assert "0.630 ± 0.030" in checker.text
    assert "40 problems, k = 8" in checker.text
    row = re.search(r"<tr><th scope=\"row\">RL \+ language reward</th>.*?</tr>", page)[0]
    assert "<td>Cold-start SFT</td>" in row, "`starts_from` is shown by the title of that stage"
    assert "--v:0.995" in row
    assert "not finished" not in checker.text


def test_accounting_time_and_provenance(finished):
    page, checker = render(finished)
    assert "4,000 completions sampled" in checker.text
    assert "dropped: duplicate 1,203 30.1 %" in checker.text
    assert "rollout" in checker.text
    assert 'title="checkpoint ' in page
    assert "285bfd7" in checker.text
    assert "rollout.num_generations = 16" in checker.text


def test_a_profile_is_shown_and_its_trace_named(tmp_path):
    run = build_run(tmp_path / "demo")
    folder = run / "rl_1" / "profile"
    folder.mkdir()
    phases = {"rollout": 3.0, "rollout/decode": 2.5, "rollout/rest": 0.5, "rest": 1.0}
    numbers = {"steps": [2, 3], "seconds": 4.0, "phases": phases, "trace": "trace.json.gz"}
    (folder / "profile.json").write_text(json.dumps(numbers))
    _, checker = render(run)
    assert "RL + language reward: 2 traced steps" in checker.text
    assert "rollout: decode 1.250 62.5%" in checker.text
    assert "for ui.perfetto.dev: rl_1/profile/trace.json.gz" in checker.text


def test_same_problem_from_every_stage_highlighted(finished):
    page, _ = render(finished)
    blocks = page.split('<div class="problem">')[1:]
    assert len(blocks) == 4
    for block in blocks:
        assert block.count("<article") == 9, "every stage with samples answers it"
    assert "✗ wrong" in blocks[0]
    assert '<mark class="wait">wait</mark>' in blocks[0]
    assert '<mark class="target">is</mark>' in blocks[0]
    assert '<mark class="other">suoyi</mark>' in blocks[0]
    shown = re.search(r"<h3>(sum [\d ]+ \?)<", blocks[0])[1]
    assert shown in (finished / "base/samples.jsonl").read_text()


def test_the_first_sample_is_shown_not_the_best(tmp_path):
    _dump(tmp_path / "manifest.json", {"stages": [{"name": "base"}]})
    (tmp_path / "base").mkdir()
    _dump_rows(tmp_path / "base" / "samples.jsonl", [
        {"problem_id": "p", "sample": 1, "text": "the good one", "verdict": "correct"},
        {"problem_id": "p", "sample": 0, "text": "the first one", "verdict": "wrong"},
    ])  # fmt: skip
    _, checker = render(tmp_path)
    assert "the first one" in checker.text
    assert "the good one" not in checker.text


def test_everything_a_model_or_a_person_wrote_is_escaped(tmp_path):
    root = build_run(tmp_path / "run", STAGES[:2], num_problems=3)
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> wait"
    for stage in ("base", "r1_zero"):
        rows = [json.loads(r) for r in (root / stage / "samples.jsonl").read_text().splitlines()]
        for row in rows:
            row |= {"text": evil, "prompt": evil, "answer": evil, "verdict": evil}
        _dump_rows(root / stage / "samples.jsonl", rows)
        edit(root / stage / "eval.json", lambda e: e.update({evil: evil, "verdicts": {evil: 1}}))
        _dump(root / stage / "accounting.json", {"sampled": 3, "dropped": {evil: 2}, evil: evil})
        rows = [json.loads(r) for r in (root / stage / "metrics.jsonl").read_text().splitlines()]
        rows[0][f"time/{evil}"] = 9.0
        _dump_rows(root / stage / "metrics.jsonl", rows)

    def change(m):
        m |= {"title": evil, "device": evil, evil: evil, "config": {evil: evil}, "started": evil}
        m["claims"] = [{"claim": evil, "measured": evil, "bar": evil, "ok": True}]
        for entry in m["stages"]:
            entry |= {"title": evil, "status": evil, "starts_from": evil}

    edit(root / "manifest.json", change)
    page, checker = render(root)  # no handler attribute, no unbalanced tag
    assert not set(checker.tags) & {"script", "img"}
    assert page.count("&lt;script&gt;alert(1)") > 20
    assert '<mark class="wait">wait</mark>' in page


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("metrics.jsonl", "Training curves"),
        ("samples.jsonl", "before and after"),
        ("accounting.json", "What sampling kept"),
        ("eval.json", "0.630 ±"),
        ("manifest.json", "nothing is lost"),
    ],
)
def test_a_missing_file_leaves_its_section_out(finished, tmp_path, name, section):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    if name != "manifest.json":
        assert section in render(root)[1].text
    for path in root.glob(f"*/{name}"):
        path.unlink()
    assert section not in render(root)[1].text


def test_unfinished_run_renders_and_says_so(tmp_path):
    root = build_run(tmp_path / "run", STAGES[:5])
    for name in ("cold_start", "rl_1", "rejection"):
        shutil.rmtree(root / name)
    with (root / "r1_zero/metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rew')  # killed in the middle of a row

    def change(m):
        for entry, status in zip(m["stages"][1:], ("running", *["pending"] * 3), strict=True):
            entry["status"] = status
            entry["seconds"] = None
        m["claims"], m["seconds"] = [], None

    edit(root / "manifest.json", change)
    _, checker = render(root)
    assert "not finished: 1 of 5 stages are done (R1-Zero: running" in checker.text
    assert "claims" not in checker.text


def test_empty_pipeline_renders(tmp_path):
    _dump(tmp_path / "manifest.json", {"stages": []})
    assert "Nothing has been measured yet." in render(tmp_path)[1].text


def test_one_training_run_without_a_manifest(finished, tmp_path):
    shutil.copy(finished / "r1_zero/metrics.jsonl", tmp_path)
    page, checker = render(tmp_path)
    assert page.count("<svg") == 8
    assert re.search(r"reward went from 1\.\d+ to [12]\.?\d* in 60 steps", checker.text)
    assert "Stages stand" in checker.text
    assert "claims, measured" not in checker.text
    assert "samples each" not in checker.text


def test_one_run_that_still_trains_says_so(finished, tmp_path):
    shutil.copy(finished / "rl_1/metrics.jsonl", tmp_path)
    _dump(tmp_path / "manifest.json", {"title": "RL", "status": "running"})
    assert "not finished (RL: running)" in render(tmp_path)[1].text


def test_one_sft_run_shows_its_loss(finished, tmp_path):
    shutil.copy(finished / "sft/metrics.jsonl", tmp_path)
    page, checker = render(tmp_path)
    assert page.count("<svg") == 1
    assert "loss went from" in checker.text


@pytest.mark.parametrize("content", [None, "a stray file"])
def test_a_folder_that_is_no_run_says_what_one_holds(tmp_path, content):
    folder = tmp_path / "nothing"
    if content:
        folder.mkdir()
        (folder / "notes.txt").write_text(content)
    with pytest.raises(ValueError, match=r"a run folder holds manifest\.json.*metrics\.jsonl"):
        write_report(folder)


def test_a_broken_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"manifest\.json (is not valid JSON|must hold a JSON object)"
    ):
        write_report(tmp_path)


def test_a_long_run_stays_small(tmp_path):
    stages = [
        (f"s{i}", f"Stage {i}", "grpo", "", 100, *s[5:]) for i, s in enumerate(STAGES) if s[5]
    ]
    root = build_run(tmp_path / "run", stages, num_problems=64)
    for path in root.glob("*/samples.jsonl"):
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        for row in rows:
            row["text"] = "a long thought, wait " * 4000 + "the end"
        _dump_rows(path, rows)
    page, checker = render(root)
    assert len(page.encode()) < 1_000_000
    assert "characters left out" in checker.text
    assert "the end" in checker.text


def test_values_that_are_no_numbers_do_not_break_the_page(tmp_path):
    _dump_rows(tmp_path / "metrics.jsonl", [
        {"step": 1, "reward": None, "nonfinite": ["reward"], "kl": "high"},
        {"step": 2, "reward": 1.0, "kl": None},
        {"reward": 2.0},
    ])  # fmt: skip
    _dump(tmp_path / "eval.json", {"pass@1": None, "k": 4, "cons@k": "x", "mean_length": 3})
    _dump(tmp_path / "accounting.json", {"sampled": None, "kept": 2, "dropped": None})
    page, _ = render(tmp_path)
    assert page.count("<svg") == 1  # reward
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_stage_table_fits_a_terminal(finished, capsys):
    print_stage_table(finished)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    base = next(line for line in lines if line.startswith("Base "))
    assert base.split() == [
        "Base", ".630", "±.030", ".670", ".890", ".530", ".120", "24", ".001", "3m32s",
    ]  # fmt: skip
    assert sum("✓ holds" in line for line in lines) == 4
    assert sum("✗ fails" in line for line in lines) == 1


def test_chart_breaks_the_line_at_a_gap_and_marks_evaluations():
    xs, ys = [1.0, 2.0, 3.0, 4.0], [1.0, None, 2.0, 3.0]
    svg = curve_chart("Reward", [Series("A & B", 0, xs, ys, [(2.0, 2.5)])])
    raw = re.search(r'class="raw" d="([^"]+)"', svg)[1]
    assert raw.count("M") == 2
    assert raw.count("L") == 1
    assert svg.count("<circle") == 1
    assert "A &amp; B: 1 to 3 over 4 steps" in svg


@pytest.mark.parametrize("ys", [[0.0], [5.0, 5.0], [-1e-9, 1e-9], [1e6, 2e6]])
def test_chart_of_odd_ranges_stays_inside_its_frame(ys):
    svg = curve_chart("x", [Series("s", 0, [float(i) for i in range(len(ys))], ys)])
    for x, y in re.findall(r"[ML](\d+\.\d) (-?\d+\.\d)", svg):
        assert 38 <= float(x) <= 352
        assert 12 <= float(y) <= 178


def test_ticks_are_round_and_enclose():
    assert nice_ticks(0.0, 0.9) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert nice_ticks(1.43, 1.99)[0] <= 1.43
    assert nice_ticks(1.43, 1.99)[-1] >= 1.99
    assert nice_ticks(1.0, 1.0 + 1e-6) == [0.5, 0.75, 1.0, 1.25, 1.5]  # else all are "1"
    assert nice_ticks(0.0, 0.0) == [-1.0, -0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "ys", [[2.8e-14, 5.5e-14], [1e-300, 3e-300], [1.0, 1.0 + 2e-16], [0.0, 7e-13], [3.0, 3.0]]
)
def test_curves_of_rounding_errors_are_drawn(ys):
    for from_zero in (True, False):
        svg = curve_chart("kl", [Series("s", 0, [1.0, 2.0], ys)], from_zero=from_zero)
        assert svg.endswith("</svg>")
        assert "nan" not in svg.lower()
        ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
        assert all(a < b for a, b in itertools.pairwise(ticks))
        assert ticks[0] <= min(ys)
        assert max(ys) <= ticks[-1] * (1 + 1e-9)


def test_a_report_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fails(_):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("r1fast.report.write_report", fails)
    report_on(tmp_path)
    printed = "".join(capsys.readouterr())
    assert "ZeroDivisionError" in printed
    assert f"r1fast report {tmp_path}" in " ".join(printed.split())


def test_segments_keep_room_for_short_stages():
    widths = segment_widths([1000, 10, 10], 300)
    assert sum(widths) == pytest.approx(300)
    assert min(widths) == pytest.approx(90)
    assert segment_widths([60, 60], 100) == [50, 50]


def test_long_lines_are_averaged_not_cut():
    xs = [float(i) for i in range(1, 10_001)]
    short_x, short_y = shorten(xs, [2.0 * x for x in xs])
    assert len(short_x) <= MAX_POINTS
    assert short_x[-1] == 10_000
    assert sum(short_y) / len(short_y) == pytest.approx(10_001, rel=0.01)
    assert shorten([1.0], [None]) == ([1.0], [None])


def test_rolling_mean_keeps_gaps():
    assert rolling_mean([1.0, None, 3.0]) == [1.0, None, 3.0]
    ys = [float(i % 2) for i in range(100)]
    assert all(0.3 < y < 0.7 for y in rolling_mean(ys))


def test_labels_are_broken_between_words_and_cut_where_a_word_is_too_long():
    assert label_lines("RL + language reward", 200) == ["RL + language reward"]
    assert label_lines("RL + language reward", 70) == ["RL +", "language", "reward"]
    assert label_lines("cold_start", 30) == ["col…"]


def test_log_scale_shows_late_losses():
    ys = [4.0, 0.4, 0.04]
    svg = curve_chart("loss", [Series("SFT", 0, [1.0, 2.0, 3.0], ys)], log=True)
    raw = re.search(r'class="raw" d="([^"]+)"', svg)[1]
    first, second, third = (float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", raw))
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert ">0.01</text>" in svg
    assert ">10</text>" in svg
    assert "NaN" not in curve_chart("loss", [Series("SFT", 0, [1.0, 2.0], [1.0, 0.0])], log=True)


@pytest.mark.parametrize("width", [100, 80, 60])
def test_stage_table_breaks_no_name(finished, capsys, monkeypatch, width):
    monkeypatch.setattr(metrics, "line_width", lambda: width)
    print_stage_table(finished)
    table = capsys.readouterr().out.partition("Claims")[0].splitlines()
    assert max(map(len, table)) <= width
    for _, title, *_ in STAGES:
        assert sum(line.startswith(title + " ") for line in table) == 1, title
    assert any("starts from" in line for line in table) == (width == 100)


def test_an_error_of_zero_is_shown(tmp_path, capsys):
    build_run(tmp_path, STAGES[:1])
    edit(tmp_path / "base" / "eval.json", lambda e: e.update({"pass@1": 1.0, "pass@1_stderr": 0.0}))
    print_stage_table(tmp_path)
    assert "1.0 ±.000" in capsys.readouterr().out


def test_length_is_that_of_verified_answers_where_known(tmp_path):
    build_run(tmp_path, STAGES[1:2])
    assert "mean length of a completion" in write_report(tmp_path).read_text()
    rows = tmp_path / "r1_zero" / "metrics.jsonl"
    text = rows.read_text().replace("completions/mean_length", "completions/mean_verified_length")
    rows.write_text(text)
    assert "mean length where an answer can be verified" in write_report(tmp_path).read_text()


def test_steps_without_signal_are_reported(tmp_path):
    build_run(tmp_path)
    assert "left out because" not in write_report(tmp_path).read_text()
    path = tmp_path / "r1_zero" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:3]:
        row["train/steps_without_signal"] = 2
        del row["kl"]
    _dump_rows(path, rows)
    page = write_report(tmp_path).read_text()
    assert "no completion had an advantage: 6 of R1-Zero;" in page


@pytest.mark.parametrize(("change", "told"), [
    ({"claims": [[1]]}, r"'claims\[0\]' must be an object, got \[1\]"),
    ({"stages": [3]}, r"'stages\[0\]' must be an object, got 3"),
    ({"config": []}, "'config' must be an object"),
    ({"config": {"rewards": {"lexicon": {"zh": 7}}}}, "'config.rewards.lexicon' must be an object of lists of texts"),
    ({"lexicon": "x"}, "'lexicon' must be an object of lists of texts, got 'x'"),
])  # fmt: skip
def test_a_manifest_that_somebody_has_edited_is_named(tmp_path, change, told):
    build_run(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"manifest\.json: {told}.*; mend it, or remove it"):
        write_report(tmp_path)


def test_numbers_beyond_all_floats_are_none(tmp_path):
    build_run(tmp_path)
    path = tmp_path / "base" / "eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pass@1": 10**400}))
    assert write_report(tmp_path).is_file()
