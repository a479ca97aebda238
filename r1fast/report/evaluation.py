"""The evaluation in the report: scores with both errors, the pass@k curve, subsets, instructions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from r1fast.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NUM_COLORS,
    RIGHT,
    TOP,
    WIDTH,
    tick_label,
)
from r1fast.report.page import cell, details, keys, table
from r1fast.report.run import Run, Stage, number, shown

SCORES = (  # of a single evaluation: (key of eval.json, words)
    ("win_rate", "Win rate"),
    ("cons@k", "cons@k"),
    ("prompt_strict", "Prompts followed, strict"),
    ("prompt_loose", "Prompts followed, loose"),
    ("instruction_strict", "Instructions followed, strict"),
    ("instruction_loose", "Instructions followed, loose"),
    ("attempted_rate", "Attempted"),
    ("correct_given_attempted", "Correct of what was attempted"),
    ("f_score", "F-score"),
    ("format_rate", "Format"),
    ("language_share", "Target language"),
    ("position_bias", "Judge: position bias"),
    ("inconsistent", "Judge: orders that disagree"),
    ("wait_rate", "Re-checks"),
    ("clip_rate", "Cut off"),
)
HELP = (  # (key of eval.json that it is of, words)
    ("num_problems",
     "± problems is the standard error over the choice of problems, ± runs that of a repeated run on the "
     "same ones; a dash stands where one problem, or one sample a problem, tells nothing of it."),
    ("pass@2",
     "pass@k is the unbiased estimate of the chance that one of k samples is right."),
    ("cons@k", "cons@k is the share of problems whose majority answer is right."),
    ("win_rate",
     "The win rate counts a tie as half; answers that the judge prefers in one order alone are a tie."),
    ("position_bias",
     "Position bias, from -1 to 1: how much more often the judge preferred what it was shown first."),
)  # fmt: skip


def is_evaluation(run: Run) -> bool:
    return not run.is_pipeline and run.manifest.get("kind") == "evaluate"


def summary(run: Run) -> str:
    """One sentence on a run that only evaluates; "" where nothing is scored."""
    e = run.stages[0].eval
    name = "win_rate" if "win_rate" in e else "pass@1"
    score, error = number(e.get(name)), number(e.get(f"{name}_stderr"))
    if score is None:
        return ""
    spread = "" if error is None else f" ± {error:.3f}"
    preset = shown(run.manifest.get("preset"))
    on = f" on {preset}" if preset else ""
    k = number(e.get("k")) or 1
    samples = "one sample each" if k == 1 else f"{k:.0f} samples each"
    return (
        f"{name.replace('_', ' ')} is {score:.3f}{spread}{on}: "
        f"{number(e.get('num_problems')) or 0:,.0f} problems, {samples}."
    )


def scores(run: Run) -> list[str]:
    """Every score of an evaluation, with both errors."""
    e = run.stages[0].eval
    if not e:
        return []
    rows = []
    for key, name in (("pass@1", "pass@1"), *SCORES):
        value = number(e.get(key))
        if value is None:
            continue
        errors = [number(e.get(f"{key}_{of}")) for of in ("stderr", "run_stderr")]
        has_error = f"{key}_stderr" in e
        rows.append([
            escape(name.replace("@k", f"@{shown(e.get('k'))}")), cell(f"{value:.3f}", value),
            *(cell("" if x is None else f"{x:.3f}") if has_error else "<td></td>" for x in errors),
        ])  # fmt: skip
    facts = []
    for key, words in (("mean_length", "tokens a completion"), ("summary_chars", "characters an answer"),
                       ("baseline_chars", "characters an answer of the baseline")):  # fmt: skip
        if (value := number(e.get(key))) is not None:
            facts.append(f"{value:,.0f} {words}")
    counts = e.get("outcomes") or e.get("verdicts")
    if isinstance(counts, Mapping):
        facts.append(", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))
    if failed := number(e.get("num_errors")):
        facts.append(f"{failed:.0f} samples could not be judged and do not count")
    if isinstance(judge := e.get("judge"), Mapping):
        facts.append(
            f"judge {shown(judge.get('model'))}: {number(judge.get('requests')) or 0:,.0f} requests, "
            f"{number(judge.get('failed')) or 0:,.0f} failed"
        )
    if sandbox := shown(e.get("sandbox")):
        facts.append(f"programs ran in {sandbox}")
    facts += _graded_by(run.stages[0])
    note = f'<p class="note">{escape("; ".join(facts))}.</p>' if facts else ""
    help_text = " ".join(words for key, words in HELP if key in e)
    help_text = f'<p class="note">{escape(help_text)}</p>' if help_text else ""
    return [table("Scores", ["", "Value", "± problems", "± runs"], rows), note, help_text]


def _graded_by(stage: Stage) -> list[str]:
    """The version of the grader, and what grading again has changed."""
    facts = []
    if grader := shown(stage.setup.get("grader")):
        facts.append(f"graded by {grader}")
    told = stage.rescored
    if told and told.get("grader") == stage.setup.get("grader"):  # not evaluated anew since
        changed, num = number(told.get("num_changed")), number(told.get("num_samples"))
        before = shown(told.get("grader_before")) or "an unknown version"
        facts.append(
            f"graded again ({changed or 0:,.0f} of {num or 0:,.0f} samples changed; before: {before})"
        )
    return facts


def pass_curves(run: Run) -> list[str]:
    """pass@k over k of every stage that has more than pass@1, and the same as numbers."""
    curves = [(stage, points) for stage in run.stages if len(points := curve(stage.eval)) > 1]
    if not curves:
        return []
    ks = sorted({k for _, points in curves for k, _, _ in points})
    rows = []
    for stage, points in curves:
        found = {k: (value, error) for k, value, error in points}
        cells = []
        for k in ks:
            value, error = found.get(k, (None, None))
            spread = "" if error is None else f" ± {error:.3f}"
            cells.append(cell("" if value is None else f"{value:.3f}{spread}"))
        rows.append([escape(_name(run, stage)), *cells])
    legend = keys([(stage.title, stage.color) for stage, _ in curves]) if len(curves) > 1 else ""
    caption = (
        "The chance that at least one of k samples is right, by k on a log scale; bars: the standard "
        "error over problems."
    )
    return [
        f'<div class="charts"><figure><figcaption><h3>pass@k</h3><span class="help">{caption}</span>'
        f"</figcaption>{curve_svg(curves)}</figure></div>",
        legend,
        table("pass@k", ["", *(f"k = {k}" for k in ks)], rows),
    ]


def _name(run: Run, stage: Stage) -> str:
    return stage.title if run.is_pipeline else "pass@k"


def curve(values: Mapping) -> list[tuple[int, float, float | None]]:
    """(k, pass@k, its standard error over problems) from eval.json, by k."""
    points = []
    for key in values:
        if (match := re.fullmatch(r"pass@(\d+)", key)) and number(values[key]) is not None:
            points.append((int(match[1]), float(values[key]), number(values.get(f"{key}_stderr"))))
    return sorted(points)


def curve_svg(curves: Sequence[tuple[Stage, list[tuple[int, float, float | None]]]]) -> str:
    """One line a stage; where there is one, its values stand at the points."""
    most = max(k for _, points in curves for k, _, _ in points)
    lowest = min(value - (error or 0) for _, points in curves for _, value, error in points)
    low = min(max(math.floor(lowest * 4) / 4, 0.0), 0.75) if lowest > 0.3 else 0.0
    inner = WIDTH - LEFT - RIGHT - 24

    def at_x(k: int) -> float:
        return LEFT + 12 + inner * math.log2(k) / math.log2(most)

    def at_y(value: float) -> float:
        share = (min(max(value, low), 1.0) - low) / (1 - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    words = "; ".join(
        f"{stage.title}: " + ", ".join(f"{value:.3f} at {k}" for k, value, _ in points)
        for stage, points in curves
    )
    label = escape(f"pass@k. {words}", quote=True)
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for i in range(5):
        tick = low + (1 - low) * i / 4
        out.append(f'<path class="grid" d="M{LEFT} {at_y(tick):.1f}H{WIDTH - RIGHT}"/>')
        text = tick_label(round(tick, 4))
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{at_y(tick) + 3.5:.1f}">{text}</text>')
    ks = sorted({k for _, points in curves for k, _, _ in points})
    last = math.inf
    for k in reversed(ks):  # the largest always; those too near to it not
        if last - at_x(k) > 22:
            last = at_x(k)
            out.append(f'<text class="steps" x="{last:.1f}" y="{HEIGHT - BOTTOM + 17}">{k}</text>')
    out.append(f'<text class="steps" x="{LEFT + 12 + inner / 2:.1f}" y="{HEIGHT - 4}">k</text>')
    for stage, points in curves:
        out.append(f'<g style="--c:var(--c{stage.color % NUM_COLORS})">')
        places = [f"{at_x(k):.1f} {at_y(value):.1f}" for k, value, _ in points]
        out.append(f'<path class="line" d="M{"L".join(places)}"/>')
        for k, value, error in points:
            if error:
                bar = f"M{at_x(k):.1f} {at_y(value - error):.1f}V{at_y(value + error):.1f}"
                out.append(f'<path class="raw" d="{bar}"/>')
            title = escape(f"{stage.title}: pass@{k} = {value:.3f}")
            out.append(
                f'<circle class="dot" cx="{at_x(k):.1f}" cy="{at_y(value):.1f}" r="3">'
                f"<title>{title}</title></circle>"
            )
        for (k, value, _), is_first in ((points[0], True), (points[-1], False)):
            # the curve rises: room is below its first point and, unless that is the top, above its last
            below = HEIGHT - BOTTOM - at_y(value) > 18 if is_first else at_y(value) < TOP + 16
            y = at_y(value) + (16 if below else -9)
            x, anchor = (at_x(k) + 8, "start") if is_first else (at_x(k) + 8, "end")
            out.append(
                f'<text class="value" style="text-anchor:{anchor}" x="{x:.1f}" y="{y:.1f}">{value:.3f}</text>'
            )
        out.append("</g>")
    out.append("</svg>")
    return "".join(out)


def parts(run: Run, key: str, of: str) -> list[str]:
    """One table a stage of what every subset scores, or every kind of problem where there are several."""
    tables = []
    for stage in run.stages:
        found = stage.eval.get(key)
        if isinstance(found, Mapping) and all(isinstance(v, Mapping) for v in found.values()):
            made = _parts_table(f"{stage.title} by {of}", of, found)
            tables.append(details(stage.title, made) if run.is_pipeline else made)
    return tables


def _parts_table(title: str, of: str, found: Mapping[str, Mapping]) -> str:
    names = {name: "win_rate" if "win_rate" in v else "pass@1" for name, v in found.items()}
    has_votes = any("cons@k" in v for v in found.values())
    rows = []
    for name, v in found.items():
        value, error = number(v.get(names[name])), number(v.get(f"{names[name]}_stderr"))
        spread = "" if error is None else f" ± {error:.3f}"
        votes, clip = number(v.get("cons@k")), number(v.get("clip_rate"))
        length = number(v.get("mean_length"))
        rows.append([
            escape(str(name)), cell(shown(v.get("num_problems"))),
            cell("" if value is None else f"{value:.3f}{spread}", value),
            *[cell("" if votes is None else f"{votes:.3f}", votes)] * has_votes,
            cell("" if length is None else f"{length:.0f}"),
            cell("" if clip is None else f"{clip:.3f}", clip),
        ])  # fmt: skip
    score = " or ".join(sorted({name.replace("_", " ") for name in names.values()}))
    columns = [of.capitalize(), "Problems", score, *["cons@k"] * has_votes, "Tokens", "Cut off"]
    return table(title, columns, rows)


def instructions(run: Run) -> list[str]:
    """How often each kind of instruction was followed."""
    found = None if run.is_pipeline else run.stages[0].eval.get("instructions")
    if not isinstance(found, Mapping):
        return []
    rows = [
        [escape(name), cell(shown(v["num"])), *(cell(f"{v[of]:.3f}", v[of]) for of in ("strict", "loose"))]
        for name, v in found.items()
    ]  # fmt: skip
    return [table("Instructions", ["Instruction", "Asked", "Strict", "Loose"], rows)]
