"""Evaluations on the terminal: one run, two runs compared, a run graded again. Fits 80 columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from r1fast.evaluate.compare import FEW
from r1fast.metrics import table

MAX_ROWS = 60  # of a table by subset; eval.json has all


def show_evaluation(result: Mapping[str, Any]) -> None:
    """The numbers of eval.json, with both errors where there are any; by subset below."""
    rows = []
    for key, name in _names(result):
        value = result.get(key)
        if value is None:
            continue
        shown = f"{value:.1f}" if key.startswith("mean_length") else f"{value:.3f}"
        if key.endswith("_chars"):
            shown = f"{value:.0f}"
        rows.append([name, shown, *(_error(result, key, of) for of in ("stderr", "run_stderr"))])
    notes = []
    if counts := result.get("outcomes") or result.get("verdicts"):
        label = "outcomes" if result.get("outcomes") else "verdicts"
        notes.append(f"{label}: {', '.join(f'{n} {name}' for name, n in counts.items())}")
    if failed := result.get("num_errors"):
        notes.append(f"{failed} samples could not be judged and do not count")
    if judge := result.get("judge"):
        tokens = judge["prompt_tokens"] + judge["completion_tokens"]
        notes.append(
            f"judge {judge['model']}: {judge['requests']:,} requests, {judge['retries']:,} retries, "
            f"{judge['cached']:,} cached, {judge['failed']:,} failed, {tokens:,} tokens"
        )
    if any(row[2] or row[3] for row in rows):
        columns = ["", "value", "± problems", "± runs"]
    else:
        columns, rows = ["", "value"], [row[:2] for row in rows]
    n, k = result["num_problems"], result["k"]
    title = f"{n:,} problem{'s' * (n != 1)}, {k} sample{'s' * (k != 1)} each"
    table(title, columns, rows, notes)
    _show_parts(result.get("kinds") or {}, "kind")
    _show_parts(result.get("subsets") or {}, "subset")
    _show_instructions(result.get("instructions") or {})


def _names(result: Mapping) -> list[tuple[str, str]]:
    curve = sorted(int(m[1]) for key in result if (m := re.fullmatch(r"pass@(\d+)", key)))
    return [
        ("win_rate", "win rate"),
        *((f"pass@{k}", f"pass@{k}") for k in curve),
        ("cons@k", f"cons@{result['k']}"),
        ("prompt_strict", "prompts followed, strict"),
        ("prompt_loose", "prompts followed, loose"),
        ("instruction_strict", "instructions, strict"),
        ("instruction_loose", "instructions, loose"),
        ("attempted_rate", "attempted"),
        ("correct_given_attempted", "correct of attempted"),
        ("f_score", "F-score"),
        ("format_rate", "format"),
        ("language_share", "target language"),
        ("wait_rate", "re-checks"),
        ("mean_length", "mean length, tokens"),
        ("position_bias", "judge: position bias"),
        ("inconsistent", "judge: inconsistent"),
        ("summary_chars", "answer, characters"),
        ("baseline_chars", "baseline, characters"),
        ("clip_rate", "cut off"),
    ]


def _error(result: Mapping, key: str, of: str) -> str:
    value = result.get(f"{key}_{of}")
    return "" if value is None else f"±{value:.3f}"


def _show_parts(parts: Mapping[str, Mapping], of: str) -> None:
    """A table of the scores by subset, or by kind."""
    if not parts:
        return
    scores = {name: "win_rate" if "win_rate" in s else "pass@1" for name, s in parts.items()}
    rows = [
        [
            _short(name, 30), str(s["num_problems"]), _number(s.get(scores[name])),
            _error(s, scores[name], "stderr"), _number(s.get("cons@k")),
            _number(s.get("mean_length"), 0), _number(s.get("clip_rate")),
        ]
        for name, s in list(parts.items())[:MAX_ROWS]
    ]  # fmt: skip
    score = " or ".join(sorted({name.replace("_", " ") for name in scores.values()}))
    columns = [of, "problems", score, "±", "cons@k", "tokens", "cut off"]
    if not any("cons@k" in s for s in parts.values()):
        columns, rows = columns[:4] + columns[5:], [row[:4] + row[5:] for row in rows]
    more = len(parts) - MAX_ROWS
    notes = f"{more} more are in eval.json" if more > 0 else ()
    table(f"By {of}", columns, rows, notes, left=columns[:1])


def _show_instructions(found: Mapping[str, Mapping]) -> None:
    if found:
        rows = [
            [_short(name, 44), str(e["num"]), _number(e["strict"]), _number(e["loose"])]
            for name, e in found.items()
        ]
        table("By instruction", ["instruction", "asked", "strict", "loose"], rows)


def show_comparison(told: Mapping[str, Any]) -> None:
    """Two runs: the difference b - a with its interval, by subset where there are some."""
    parts = {"all problems": told["all"], **told["subsets"]}
    rows = [
        [
            _short(name, 22), str(c["num_problems"]), _number(c["mean_a"]), _number(c["mean_b"]),
            f"{c['difference']:+.3f}", _interval(c), _p_value(c["p_value"]),
        ]
        for name, c in list(parts.items())[: MAX_ROWS + 1]
    ]  # fmt: skip
    whole = told["all"]
    notes = [f"a = {told['a']}", f"b = {told['b']}"]
    errors = [
        f"±{value:.3f} {words}"
        for key, words in (("stderr", "over problems"), ("run_stderr", "run to run"))
        if (value := whole[key]) is not None
    ]
    if errors:
        notes.append(f"error of the difference: {', '.join(errors)}")
    notes.append(
        f"b is better on {whole['num_better']} problems, worse on {whole['num_worse']}; mean length "
        f"{told['mean_length_a']:.0f} and {told['mean_length_b']:.0f} tokens"
    )
    if told["num_left_out"]:
        notes.append(f"{told['num_left_out']} problems without a verdict in both are left out")
    if not told["same_grader"]:
        notes.append(
            "the runs are graded by different versions of the grader: --rescore both first"
        )
    if few := sum(bool(c["note"]) for c in parts.values()):
        those = "this" if len(parts) == 1 else f"{few} of these rows"
        notes.append(
            f"fewer than {FEW} problems in {those}: the interval is too narrow (none of one problem), and p "
            "cannot be below 2^(1 - problems that differ)"
        )
    columns = ["b - a", "problems", "a", "b", "diff.", "95% interval", "p"]
    title = f"{told['score']} paired by problem: bootstrap interval, p by sign flips"
    table(title, columns, rows, notes, left=columns[:1])


def show_rescored(told: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """What grading again has changed."""
    before = told["eval_before"]
    rows = []
    for key, name in _names(result):
        a, b = before.get(key), result.get(key)
        if a is not None and b is not None and (key in ("pass@1", "win_rate") or a != b):
            rows.append([name, f"{a:.3f}", f"{b:.3f}"])
    moves = ", ".join(f"{n} {move}" for move, n in told["moves"].items()) or "none"
    notes = [f"verdicts that changed: {moves}"]
    if told["grader_before"] != told["grader"]:
        notes.append(f"grader: {told['grader_before'] or 'not recorded'}, now {told['grader']}")
    title = f"{told['num_samples']:,} samples graded again, {told['num_changed']} changed"
    table(title, ["", "before", "now"], rows, notes)


def _interval(compared: Mapping[str, Any]) -> str:
    low, high = compared["low"], compared["high"]
    return "-" if low is None or high is None else f"{low:+.3f} {high:+.3f}"


def _p_value(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"
