"""The sections of the report: each reads a Run and gives HTML, or nothing where nothing is stored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from r1fast.metric_help import metric_help
from r1fast.progress import duration
from r1fast.report import evaluation
from r1fast.report.browser import browser
from r1fast.report.charts import Series, curve_chart
from r1fast.report.page import cell, details, keys, section, table, text
from r1fast.report.plan import plans
from r1fast.report.run import Run, Stage, claim_rows, number, samples_note, shown
from r1fast.rollout_metrics import reflection_pattern

MAX_PROBLEMS = 4  # shown before and after
MAX_TEXT = 1600  # characters of a completion that are shown
SMALL_STAGES = ("small_base", "distill", "small_rl")  # another model than the main line's

# (title, metric of a training row, metric of an evaluation, is a share, starts at zero)
CHARTS = [
    ("Reward", "reward", "", False, False),
    ("Accuracy and pass@1", "verdicts/correct", "pass@1", True, True),
    ("Completion length", "completions/mean_verified_length", "mean_length", False, True),
    ("Re-check rate", "wait_rate", "wait_rate", True, True),
    ("Target language", "language_share", "language_share", True, True),
    ("Format", "rewards/format/mean", "format_rate", True, True),
    ("KL to the reference", "kl", "", False, True),
    ("Entropy", "entropy", "", False, True),
    ("Weight of the correction", "rollout_correction/weight", "", False, False),
    ("Age of the weights that sampled", "vllm/version_lag", "", False, True),
    ("Wait for samples", "overlap/trainer_waited", "", False, True),
]
CAPTIONS = {
    "verdicts/correct": "share of the training completions judged correct; dots: pass@1",
    "rewards/format/mean": "share of the completions in the asked format",
}
SFT_CHARTS = [("SFT loss", "loss", "", False, False)]
LOG_SCALE = ("loss",)
# where the first was never written: runs whose answers nothing verifies, and older ones
INSTEAD = {
    "verdicts/correct": "rewards/accuracy/mean",
    "completions/mean_verified_length": "completions/mean_length",
}


def body(run: Run, title: str) -> str:
    """Everything between <main> and </main>."""
    parts = (
        _heading(run, title),
        section("The claims, measured", _claims(run)),
        section(
            "Stages" if run.is_pipeline else "Evaluation",
            *(evaluation.scores(run) if evaluation.is_evaluation(run) else _stages(run)),
        ),
        section("How pass@k grows with k", *evaluation.pass_curves(run)),
        section("By kind of problem", *evaluation.parts(run, "kinds", "kind")),
        section("By subset", *evaluation.parts(run, "subsets", "subset")),
        section("By instruction", *evaluation.instructions(run)),
        section("Training curves", *_curves(run)),
        section(
            "The same problems, before and after", *(_problems(run) if run.is_pipeline else [])
        ),
        section("The samples", *browser(run)),
        section("What sampling kept, and why the rest went", *map(_accounting, run.stages)),
        section("Where the time went", *_time(run), *map(_profile, run.stages)),
        section("Planned and measured", *plans(run)),
        section("Provenance", _provenance(run), _config(run)),
    )
    return "\n".join(part for part in parts if part)


def _heading(run: Run, title: str) -> str:
    kind = "pipeline run" if run.is_pipeline else "training run"
    kind = "evaluation" if evaluation.is_evaluation(run) else kind
    started = shown(run.manifest.get("started"))[:19].replace("T", " ")
    parts = [f'<p class="eyebrow">r1fast · {kind}{escape(" · " + started if started else "")}</p>']
    parts.append(f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(_summary(run))}</p>')
    waiting = [s for s in run.stages if s.status not in ("", "done")]
    if waiting:
        state = ", ".join(f"{s.title}: {s.status}" for s in waiting)
        count = f": {len(run.stages) - len(waiting)} of {len(run.stages)} stages are done"
        alert = f"This run is not finished{count if run.is_pipeline else ''} ({state})."
        parts.append(f'<p class="alert" role="status">{escape(alert)}</p>')
    parts += [
        f'<p class="alert" role="status">{escape(alarm)}</p>'
        for stage in run.stages
        if (alarm := _hacking(stage))
    ]
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _hacking(stage: Stage) -> str:
    """The steps at which the monitor took the reward for hacked; empty where at none."""
    steps = [shown(row.get("step")) for row in stage.rows if number(row.get("hacking/alarm"))]
    if not steps:
        return ""
    return (
        f"{stage.title}: the training reward may be hacked. At step{'s' * (len(steps) > 1)} "
        f"{', '.join(steps)} it had risen while held-out pass@1 had fallen."
    )


def _summary(run: Run) -> str:
    """One sentence: what changed, and whether the claims hold."""
    if evaluation.is_evaluation(run) and (told := evaluation.summary(run)):
        return told
    scored = [(s, number(s.eval.get("pass@1"))) for s in run.stages if s.name not in SMALL_STAGES]
    scored = [(s, score) for s, score in scored if score is not None]
    sentences = []
    if len(scored) > 1:
        (first, low), (last, high) = scored[0], scored[-1]
        sentences.append(f"pass@1 went from {low:.2f} ({first.title}) to {high:.2f} ({last.title})")
    elif scored:
        sentences.append(f"pass@1 is {scored[0][1]:.2f} after {scored[0][0].title}")
    elif not run.is_pipeline and (rows := run.stages[0].rows):
        name = "loss" if run.stages[0].is_sft else "reward"
        values = [v for row in rows if (v := number(row.get(name))) is not None]
        if values:
            sentences.append(
                f"{name} went from {values[0]:.3g} to {values[-1]:.3g} in {len(values)} steps"
            )
    seconds = number(run.manifest.get("seconds"))
    device = shown(run.manifest.get("device"))
    if seconds is not None:
        stages = f"{len(run.stages)} stages in " if run.is_pipeline else ""
        sentences.append(f"{stages}{duration(seconds)}" + (f" on {device}" if device else ""))
    claims = [c.get("ok") for c in run.manifest.get("claims") or []]
    if claims:
        held = sum(ok is True for ok in claims)
        sentences.append(f"{held} of {len(claims)} claims hold")
    return "; ".join(sentences) + "." if sentences else "Nothing has been measured yet."


def _claims(run: Run) -> str:
    rows = []
    for claim, measured, bar, mark in claim_rows(run):
        style = {"✓": "ok", "✗": "no"}.get(mark[0], "dim")
        result = f'<td class="{style}">{escape(mark)}</td>'
        rows.append([escape(claim), text(measured), text(bar), result])
    return table("Claims", ["Claim", "Measured", "Bar", "Result"], rows, left=4) if rows else ""


def _stages(run: Run) -> list[str]:
    if not run.is_pipeline and not run.stages[0].eval:
        return []
    rows = []
    for s in run.stages:
        e = s.eval
        head = escape(s.title)
        if s.status not in ("", "done"):
            head += f'<span class="sub">{escape(s.status)}</span>'
        score, error = number(e.get("pass@1")), number(e.get("pass@1_stderr"))
        spread = f" ± {error:.3f}" if error is not None else ""
        length = number(e.get("mean_length"))
        cells = [text(s.starts_from or "–")] if run.is_pipeline else []
        cells.append(cell("" if score is None else f"{score:.3f}{spread}", score))
        for name in ("cons@k", "format_rate", "language_share", "wait_rate"):
            share = number(e.get(name))
            cells.append(cell("" if share is None else f"{share:.3f}", share))
        clip = number(e.get("clip_rate"))
        cells.append(cell("" if length is None else f"{length:.1f}"))
        cells.append(cell("" if clip is None else f"{clip:.3f}", clip))
        cells.append(cell("" if s.seconds is None else duration(s.seconds)))
        rows.append([head, *cells])
    columns = ["Stage", *["Starts from"] * run.is_pipeline, "pass@1", "cons@k", "Format"]
    columns += ["Target language", "Re-checks", "Tokens", "Cut off", "Time"]
    note = (
        "pass@1 is the mean correctness over k samples a problem, ± its standard error over "
        "problems; cons@k the share of problems whose majority answer is right. Format, target "
        "language (words of the reasoning), re-checks (completions with a word such as “wait”) and "
        "cut off (at the token limit) are shares; tokens is the mean length of a completion."
    )
    return [
        table("Stages", columns, rows, left=1 + run.is_pipeline),
        f'<p class="note">{escape(" ".join([*samples_note(run), note]))}</p>',
        details("Every number of the evaluations", _all_numbers(run)),
    ]


def _all_numbers(run: Run) -> str:
    """Every value of every eval.json: a row a name, a column a stage."""
    stages = [s for s in run.stages if s.eval]
    flat = [dict(_flatten(s.eval)) for s in stages]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [
        [escape(name), *(cell(shown(values.get(name))) for values in flat)] for name in names
    ]  # fmt: skip
    return table("Evaluations", ["", *(s.title for s in stages)], rows) if rows else ""


def _flatten(values: Mapping, prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flatten(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _curves(run: Run) -> list[str]:
    reward = [s for s in run.stages if s.rows and not s.is_sft]
    sft = [s for s in run.stages if s.rows and s.is_sft]
    figures, plotted = [], []
    for stages, charts in ((reward, CHARTS), (sft, SFT_CHARTS)):
        for title, name, judged, share, from_zero in charts:
            log = name in LOG_SCALE
            used = (
                name if any(name in r for s in stages for r in s.rows) else INSTEAD.get(name, name)
            )
            series = [one for s in stages if (one := _series(s, name, judged)).values()]
            if not series:
                continue
            unit, help_text = metric_help(used)
            help_text = CAPTIONS.get(name, help_text) + (", log scale" if log else "")
            label = title + (f", {unit}" if unit not in ("", "share") else "")
            svg = curve_chart(title, series, share=share, from_zero=from_zero, log=log)
            figures.append(
                f"<figure><figcaption><h3>{escape(label)}</h3>"
                f'<span class="help">{escape(help_text)}</span></figcaption>{svg}</figure>'
            )
            plotted.append((title, series))
    if not figures:
        return []
    titles = [s.title for s in run.stages if s.rows]
    rows = []
    for title, series in plotted:
        values = {one.label: one for one in series}
        cells = [cell(_first_last(values.get(name))) for name in titles]
        rows.append([escape(title), *cells])
    note = (
        "Stages stand one after the other, each on its own steps. Thin: each step; bold: rolling "
        "mean; dots: evaluations."
    )
    return [
        f'<p class="note">{note}{escape(_without_signal(reward))}</p>',
        f'<div class="charts">{"".join(figures)}</div>',
        details(
            "The curves as numbers: first and last tenth", table("Curves", ["", *titles], rows)
        ),
    ]


def _without_signal(stages: Sequence[Stage]) -> str:
    """How many optimizer steps were left out, where any was."""
    counts = []
    for stage in stages:
        name = "train/steps_without_signal"
        count = sum(number(row.get(name)) or 0.0 for row in stage.rows)
        counts += [f"{count:.0f} of {stage.title}"] * (count > 0)
    if not counts:
        return ""
    return (
        f" Optimizer steps left out because no completion had an advantage: {', '.join(counts)};"
        " the update's curves have no points there."
    )


def _series(stage: Stage, name: str, judged: str) -> Series:
    """The values of one metric over a stage; evaluations as points."""
    if name in INSTEAD and not any(name in row for row in stage.rows):
        name = INSTEAD[name]
    rows = [row for row in stage.rows if name in row and number(row.get("step")) is not None]
    xs = [float(row["step"]) for row in rows]
    points = [
        (float(row["step"]), value)
        for row in stage.rows
        if judged and (value := number(row.get(f"eval/{judged}"))) is not None
    ]
    final = number(stage.eval.get(judged)) if judged else None
    if final is not None and xs and (not points or points[-1][0] < xs[-1]):
        points.append((xs[-1], final))
    ys = [number(row[name]) for row in rows]
    return Series(stage.title, stage.color, xs or [x for x, _ in points], ys, points)


def _first_last(one: Series | None) -> str:
    values = [y for y in one.ys if y is not None] if one else []
    if not values:
        return ""
    size = max(len(values) // 10, 1)
    return f"{sum(values[:size]) / size:.3g} → {sum(values[-size:]) / size:.3g}"


def _problems(run: Run) -> list[str]:
    """A handful of problems that several stages answered; always the first stored sample."""
    stages = [s for s in run.stages if s.samples]
    by_stage = [_first_samples(s.samples) for s in stages]
    ids = list(dict.fromkeys(key for rows in by_stage for key in rows))
    found = {key: [rows.get(key) for rows in by_stage] for key in ids}
    if len(stages) > 1:
        found = {key: rows for key, rows in found.items() if sum(map(bool, rows)) > 1}
    if not found:
        return []

    def order(key: str) -> tuple:
        rows = [row for row in found[key] if row]
        learned = rows[0].get("verdict") != "correct" and rows[-1].get("verdict") == "correct"
        return (-len(rows), not learned, ids.index(key))

    chosen = sorted(found, key=order)
    half = MAX_PROBLEMS // 2  # the rest as they come: not only success stories
    rest = sorted(chosen[half:], key=ids.index)
    marker = _Marker(run)
    parts = [
        f'<p class="note">{escape(_problems_note(len(found), marker))}</p>',
        marker.legend(),
    ]
    for key in [*chosen[:half], *rest[: MAX_PROBLEMS - half]]:
        rows = found[key]
        sample = next(row for row in rows if row)
        prompt, answer = shown(sample.get("prompt")), shown(sample.get("answer"))
        cards = [
            _card(stage, row, marker) for stage, row in zip(stages, rows, strict=True) if row
        ]  # fmt: skip
        expected = f'<span class="dim"> · expected {escape(answer)}</span>' if answer else ""
        parts.append(
            f'<div class="problem"><h3>{escape(_shorten(prompt, 400))}{expected}</h3>'
            f'<div class="answers">{"".join(cards)}</div></div>'
        )
    return parts


def _problems_note(count: int, marker: _Marker) -> str:
    return (
        f"Chosen from {count} stored problems: first those that the first stage shown missed and "
        "the last one solved, then others as they come. Always the first sample of a stage, never "
        "the best."
    )


def _first_samples(rows: Sequence[Mapping]) -> dict[str, Mapping]:
    """problem id -> its sample with the lowest number."""
    out: dict[str, Mapping] = {}
    for row in rows:
        key = str(row.get("problem_id", ""))
        if key not in out or (row.get("sample") or 0) < (out[key].get("sample") or 0):
            out[key] = row
    return out


def _card(stage: Stage, row: Mapping, marker: _Marker) -> str:
    verdict = shown(row.get("verdict"))
    mark = {"correct": "✓ ", "": ""}.get(verdict, "✗ ")
    style = "ok" if verdict == "correct" else "no"
    facts = []
    if (tokens := number(row.get("num_tokens"))) is not None:
        facts.append(f"{tokens:.0f} tokens")
    if (share := number(row.get("language_share"))) is not None:
        facts.append(f"language {share:.2f}")
    if (good := row.get("format")) is not None:
        facts.append("format ok" if good else "format broken")
    if row.get("finish_reason") == "length":
        facts.append("cut off")
    label = escape(f"{stage.title}: completion", quote=True)
    return (
        f'<article class="answer"><header><b style="color:var(--c{stage.color})">'
        f'{escape(stage.title)}</b><span class="{style}">{escape(mark + verdict)}</span></header>'
        f'<pre tabindex="0" aria-label="{label}">{marker(shown(row.get("text")))}</pre>'
        f"<footer>{escape(' · '.join(facts))}</footer></article>"
    )


def _shorten(value: str, room: int) -> str:
    if len(value) <= room:
        return value
    head = room * 2 // 3
    return f"{value[:head]} … [{len(value) - room:,} characters left out] … {value[head - room :]}"


class _Marker:
    """Highlights reflection words and the words of each language in a completion."""

    def __init__(self, run: Run):
        config = run.manifest.get("config") or {}
        lexicon = (config.get("rewards") or {}).get("lexicon") or run.manifest.get("lexicon") or {}
        for stage in run.stages:
            own = stage.manifest.get("config") or {}
            lexicon = lexicon or (own.get("rewards") or {}).get("lexicon") or {}
        self.target = (config.get("data") or {}).get("language") or "en"
        self.language = {str(w).lower(): lang for lang, words in lexicon.items() for w in words}
        words = "|".join(map(re.escape, sorted(self.language, key=len, reverse=True)))
        foreign = "" if self.target in ("zh", "ja", "ko", "ru") else f"|(?P<script>{_SCRIPTS})"
        self.pattern = re.compile(
            rf"(?P<wait>{reflection_pattern().pattern})"
            rf"|(?<!\w)(?P<word>{words or '(?!)'})(?!\w){foreign}",
            re.IGNORECASE,
        )

    def __call__(self, value: str) -> str:
        value, out, last = _shorten(value, MAX_TEXT), [], 0
        for match in self.pattern.finditer(value):
            kind = "wait" if match["wait"] else "other"
            if match["word"] and self.language[match["word"].lower()] == self.target:
                kind = "target"
            out.append(escape(value[last : match.start()]))
            out.append(f'<mark class="{kind}">{escape(match[0])}</mark>')
            last = match.end()
        return "".join(out) + escape(value[last:])

    def legend(self) -> str:
        items = ['<li><mark class="wait">wait</mark> a re-check</li>']
        words = {}
        for word, lang in self.language.items():
            words.setdefault("target" if lang == self.target else "other", []).append(word)
        for kind, name in (("target", f"target language ({self.target})"), ("other", "another")):
            if kind in words:
                some = escape(" ".join(words[kind][:4]))
                items.append(f'<li><mark class="{kind}">{some}</mark> {escape(name)}</li>')
        return f'<ul class="keys">{"".join(items)}</ul>'


_SCRIPTS = r"[\u0400-\u04ff\u0600-\u06ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"


def _accounting(stage: Stage) -> str:
    """sampled -> kept, and why the rest went."""
    a = stage.accounting
    if not a:
        return ""
    sampled, kept = number(a.get("sampled")), number(a.get("kept"))
    dropped = a.get("dropped") if isinstance(a.get("dropped"), Mapping) else {}
    whole = sampled or sum(v for v in map(number, dropped.values()) if v) + (kept or 0) or 1
    rows = []
    for name, value in [("kept", kept), *dropped.items()]:
        if (count := number(value)) is not None:
            label = escape(name if name == "kept" else f"dropped: {str(name).replace('_', ' ')}")
            share = count / whole
            rows.append([label, cell(f"{count:,.0f}"), cell(f"{100 * share:.1f} %", share)])
    rest = [
        f"{name.replace('_', ' ')} {shown(value)}"
        for name, value in a.items()
        if name not in ("sampled", "kept", "dropped")
    ]
    head = "" if sampled is None else f" · {sampled:,.0f} completions sampled"
    return (
        f'<h3 style="margin-top:18px">{escape(stage.title)}<span class="dim">{head}</span></h3>'
        + (table(f"{stage.title}: kept and dropped", ["", "Completions", "Share"], rows))
        + (f'<p class="note">{escape("; ".join(rest))}</p>' if rest else "")
    )


def _time(run: Run) -> list[str]:
    """Seconds of every stage, split by phase where the rows tell."""
    spent: list[tuple[Stage, dict[str, float]]] = []
    for stage in run.stages:
        phases: dict[str, float] = {}
        for row in stage.rows:
            for name, value in row.items():
                name = "time/checkpoint" if name == "checkpoint/seconds" else name
                if name.startswith("time/") and (seconds := number(value)) is not None:
                    phase = name.removeprefix("time/")
                    phases[phase] = phases.get(phase, 0.0) + seconds
        steps = sum(number(row.get("step_time")) or 0.0 for row in stage.rows)
        total = max(stage.seconds or 0.0, steps, sum(phases.values()))
        if total > 0:
            phases["other"] = max(total - sum(phases.values()), 0.0)
            spent.append((stage, phases))
    if not spent:
        return []
    names = [n for n in dict.fromkeys(n for _, p in spent for n in p) if n != "other"]
    colors = {name: i % 7 for i, name in enumerate(names)} | {"other": 7}  # 7 is the grey
    longest = max(sum(phases.values()) for _, phases in spent)
    rows = []
    for stage, phases in spent:
        total = sum(phases.values())
        parts = sorted(phases.items(), key=lambda item: list(colors).index(item[0]))
        told = ", ".join(f"{name} {duration(s)}" for name, s in parts if s >= 0.05)
        bars = "".join(
            f'<span style="--c:var(--c{colors[name]});width:{100 * s / longest:.2f}%" '
            f'title="{escape(f"{name} {duration(s)}", quote=True)}"></span>'
            for name, s in parts
            if s / longest > 0.002
        )
        bar = (
            f'<td style="width:70%;vertical-align:middle"><div class="stack" role="img" '
            f'aria-label="{escape(told, quote=True)}">{bars}</div></td>'
        )
        rows.append([escape(stage.title), bar, cell(duration(total))])
    legend = keys(list(colors.items())) if names else ""
    return [legend, table("Time", ["Stage", "By phase", "Time"], rows, left=2)]


def _profile(stage: Stage) -> str:
    """Seconds by phase of the steps that were traced, and the trace."""
    profile = stage.profile
    if not profile:
        return ""
    total, n = profile["seconds"], len(profile["steps"])
    rows = [
        [escape(name.replace("/", ": ")), cell(f"{x / n:.3f}"), cell(f"{x / total:.1%}", x / total)]
        for name, x in profile["phases"].items()
    ]
    title = f"{stage.title}: {n} traced step{'s' * (n > 1)}"
    trace = escape(f"{stage.folder}/profile/{profile['trace']}".removeprefix("./"))
    note = f'<p class="note">The trace, for ui.perfetto.dev: {trace}</p>'
    return details(title, table(title, ["Phase", "Seconds a step", "Share"], rows) + note)


def _provenance(run: Run) -> str:
    manifest = run.manifest
    config = manifest.get("config") or {}
    facts = {"run": run.name, "seed": config.get("seed")}
    skip = {"config", "stages", "claims", "title", "name", "lexicon", "seconds", "folder"}
    facts |= {k: v for k, v in manifest.items() if k not in skip}
    if (seconds := number(manifest.get("seconds"))) is not None:
        facts["time"] = duration(seconds)
    rows = "".join(
        f"<dt>{escape(str(k))}</dt><dd>{escape(shown(v))}</dd>"
        for k, v in facts.items()
        if v not in (None, "")
    )
    return f"<dl>{rows}</dl>"


def _config(run: Run) -> str:
    config = run.manifest.get("config") or {}
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in _flatten(config)]
    if not lines:
        return ""
    body = escape("\n".join(lines))
    return details("Config", f'<pre tabindex="0" aria-label="Config">{body}</pre>')
