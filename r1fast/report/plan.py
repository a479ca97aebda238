"""The section of the report that puts what was planned beside what the first steps took."""

from __future__ import annotations

from html import escape

from r1fast.plan import mib
from r1fast.report.page import cell, table, text
from r1fast.report.run import Run, Stage, number

NOTE = (
    "Planned for the lengths that were sampled, then measured, in the first steps of a stage (the "
    "first of all is left out). MFU: FLOPs that training needs over those of a large product on this device."
)


def plans(run: Run) -> list[str]:
    """A row a stage; nothing where no plan was stored."""
    stages = [s for s in run.stages if s.plan.get("measured")]
    if not stages:
        return []
    phases = list(dict.fromkeys(p for s in stages for p in s.plan["measured"].get("seconds", {})))
    columns = ["Stage", "Tokens a micro-batch", "Peak memory", *(f"Seconds: {p}" for p in phases)]
    rows = [_row(s, phases) for s in stages]
    return [
        table("Plan", [*columns, "MFU", "Tokens/s"], rows),
        f'<p class="note">{escape(NOTE)}</p>',
    ]


def _row(stage: Stage, phases: list[str]) -> list[str]:
    measured, budget = stage.plan["measured"], stage.plan.get("token_budget", {})
    seconds = measured.get("seconds", {})
    reason = f'<span class="sub">{escape(str(budget.get("reason", "")))}</span>'
    return [
        escape(stage.title),
        f'<td class="n">{budget.get("num_tokens", 0):,}{reason}</td>',
        _pair(measured.get("memory_peak"), mib),
        *(_pair(seconds.get(phase), lambda x: f"{x:.3g}") for phase in phases),
        _pair(measured.get("mfu"), lambda x: f"{100 * x:.0f}%"),
        _pair(measured.get("tokens_per_second"), lambda x: f"{x:,.0f}"),
    ]


def _pair(values, form) -> str:
    if not isinstance(values, list) or len(values) != 2 or None in map(number, values):
        return cell("")
    return text(" → ".join(map(form, values)))
