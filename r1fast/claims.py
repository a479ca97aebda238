"""The paper's claims as rows: each measured from the stored evaluations of a pipeline run.

A claim is {"claim", "measured", "bar", "ok"}; `ok` is None where a stage it needs has not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from r1fast.config import Config

HIGH = 0.95  # the demo's bar for pass@1 and language share
DRIFT = 0.05  # a smaller change of the language share is no drift
BAND = (0.2, 0.7)  # of the demo's base model: room to learn, and something to start from
Evals = dict[str, dict]


def claims(folder: Path, config: Config) -> list[dict]:
    """Every claim for which this pipeline has the stages; absolute bars hold for the demo only."""
    evals = _read_evals(folder)
    demo = bool(config.data.task)
    rows = []
    for text, needs, bar, measure in _CLAIMS:
        if any(stage not in config.pipeline.stages for stage in needs):
            continue
        row = {"claim": text, "measured": "", "bar": bar(demo), "ok": None}
        if all(stage in evals for stage in needs):
            row["measured"], row["ok"] = measure(*(evals[s] for s in needs), demo)
        rows.append(row)
    general = folder / "rl_2" / "general.json"
    if "rl_2" in config.pipeline.stages and general.exists():
        rows += _preference_claims(json.loads(general.read_text()))
    return rows


def _read_evals(folder: Path) -> Evals:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/eval.json")}


def _change(a: dict, b: dict, key: str, digits: int = 3) -> str:
    return f"{_show(a[key], digits)} -> {_show(b[key], digits)}"


def _show(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _r1_zero_raises(base: dict, zero: dict, demo: bool) -> tuple[str, bool]:
    a, b = base["pass@1"], zero["pass@1"]
    ok = BAND[0] <= a <= BAND[1] and b >= HIGH if demo else b > a
    return _change(base, zero, "pass@1"), ok


def _length_grows(base: dict, zero: dict, demo: bool) -> tuple[str, bool]:
    return _change(base, zero, "mean_length", 1), zero["mean_length"] > base["mean_length"]


def _wait_grows(base: dict, zero: dict, demo: bool) -> tuple[str, bool]:
    return _change(base, zero, "wait_rate"), zero["wait_rate"] > base["wait_rate"]


def _language_drifts(base: dict, zero: dict, demo: bool) -> tuple[str, bool | None]:
    a, b = base["language_share"], zero["language_share"]
    if a is None or b is None:
        return _change(base, zero, "language_share"), None
    # nothing pays for it: it moves, either way, and does not end in the target language
    return _change(base, zero, "language_share"), abs(b - a) > DRIFT and b < HIGH


def _language_held(zero: dict, rl: dict, demo: bool) -> tuple[str, bool | None]:
    a, b = zero["language_share"], rl["language_share"]
    if a is None or b is None:
        return _change(zero, rl, "language_share"), None
    return _change(zero, rl, "language_share"), b >= HIGH if demo else b > a


def _sft_keeps(rl: dict, sft: dict, demo: bool) -> tuple[str, bool]:
    ok = sft["pass@1"] >= (HIGH if demo else rl["pass@1"] - 0.05)
    return _change(rl, sft, "pass@1"), ok


def _rl_2_keeps(sft: dict, rl: dict, demo: bool) -> tuple[str, bool]:
    return _change(sft, rl, "pass@1"), rl["pass@1"] >= (HIGH if demo else sft["pass@1"])


def _distilled_accuracy(distilled: dict, rl: dict, demo: bool) -> tuple[str, bool]:
    a, b = distilled["pass@1"], rl["pass@1"]
    # "no lower": within the error of the difference of two measured means
    # one problem has no error to estimate
    errors = (distilled["pass@1_stderr"] or 0.0, rl["pass@1_stderr"] or 0.0)
    error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return f"{a:.3f} ±{errors[0]:.3f} against {b:.3f} ±{errors[1]:.3f}", a >= b - 2 * error


def _distilled_language(distilled: dict, rl: dict, demo: bool) -> tuple[str, bool | None]:
    a, b = distilled["language_share"], rl["language_share"]
    shown = f"{_show(a)} against {_show(b)}"
    return shown, None if a is None or b is None else a > b


def _bar(demo: str, other: str) -> Callable[[bool], str]:
    return lambda is_demo: demo if is_demo else other


_CLAIMS = [
    ("R1-Zero raises pass@1 by RL alone", ("base", "r1_zero"),
     _bar(f"from {BAND[0]}-{BAND[1]} to >= {HIGH}", "higher"), _r1_zero_raises),
    ("its answers get longer by themselves", ("base", "r1_zero"),
     _bar("longer", "longer"), _length_grows),
    ("it learns to re-check itself (wait rate)", ("base", "r1_zero"),
     _bar("higher", "higher"), _wait_grows),
    ("its language drifts, nothing pays for it", ("base", "r1_zero"),
     _bar(f"moves > {DRIFT}, stays < {HIGH}", f"moves > {DRIFT}, stays < {HIGH}"), _language_drifts),
    ("the language reward holds the language", ("r1_zero", "rl_1"),
     _bar(f">= {HIGH}", "higher"), _language_held),
    ("rejection-sampling SFT from base keeps pass@1", ("rl_1", "sft"),
     _bar(f">= {HIGH}", "within .05"), _sft_keeps),
    ("RL for all scenarios keeps pass@1", ("sft", "rl_2"),
     _bar(f">= {HIGH}", "no lower"), _rl_2_keeps),
    ("distilled small model: pass@1 against RL on it", ("distill", "small_rl"),
     _bar("no lower, within 2 errors", "no lower, within 2 errors"), _distilled_accuracy),
    ("distilled small model: language against RL on it", ("distill", "small_rl"),
     _bar("higher", "higher"), _distilled_language),
]  # fmt: skip


def _preference_claims(general: dict) -> list[dict]:
    rows = []
    for name in ("helpfulness", "safety"):
        before, after = general["before"].get(name), general["after"].get(name)
        if before is not None and after is not None:
            rows.append({
                "claim": f"preference rewards raise {name} (their own models)",
                "measured": f"{before:.2f} -> {after:.2f}",
                "bar": "higher",
                "ok": after > before,
            })  # fmt: skip
    return rows
