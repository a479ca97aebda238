"""A run folder read back: what every section of the report and the stage table start from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1fast.hf_folder import read_json
from r1fast.json_fields import OBJECT, TEXT, Kind, check_fields, is_number
from r1fast.metrics import read_metrics
from r1fast.report.charts import NUM_COLORS

_LEXICON = Kind(
    "an object of lists of texts",
    lambda x: (
        isinstance(x, dict)
        and all(isinstance(w, list) and all(isinstance(t, str) for t in w) for w in x.values())
    ),
)
_CONFIG = {"rewards?": {"lexicon?": _LEXICON}, "data?": {"language?": TEXT}}
MANIFEST = {"stages?": [OBJECT], "claims?": [OBJECT], "config?": _CONFIG, "lexicon?": _LEXICON}


@dataclass(slots=True)
class Stage:
    """What is known of one stage; every file may be missing."""

    name: str
    title: str
    kind: str = ""
    status: str = ""
    starts_from: str = ""
    seconds: float | None = None
    color: int = 0
    manifest: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    eval: dict = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    accounting: dict = field(default_factory=dict)
    profile: dict = field(default_factory=dict)
    folder: str = ""  # under the run's
    plan: dict = field(default_factory=dict)
    setup: dict = field(default_factory=dict)  # evaluation.json
    rescored: dict = field(default_factory=dict)

    @property
    def is_sft(self) -> bool:
        return self.kind == "sft" or (bool(self.rows) and not any("reward" in r for r in self.rows))


@dataclass(slots=True)
class Run:
    name: str
    manifest: dict
    stages: list[Stage]

    @property
    def is_pipeline(self) -> bool:
        return "stages" in self.manifest


def load_run(folder: str | Path) -> Run:
    """Read a run folder. Raises ValueError where it is none."""
    folder = Path(folder)
    manifest = _read_manifest(folder / "manifest.json")
    if isinstance(manifest.get("stages"), list):
        known = {str(entry.get("name")): entry for entry in manifest["stages"]}
        stages = [_load_stage(folder, entry) for entry in manifest["stages"]]
        for i, stage in enumerate(stages):
            stage.color = i % NUM_COLORS
            start = stage.starts_from
            stage.starts_from = str(known.get(start, {}).get("title") or start)
        return Run(folder.resolve().name, manifest, stages)
    files = ("metrics.jsonl", "eval.json", "samples.jsonl", "accounting.json")
    if not manifest and not any((folder / name).is_file() for name in files):
        state = "does not exist" if not folder.exists() else "is not a run folder"
        raise ValueError(
            f"{str(folder)!r} {state}; a run folder holds manifest.json (of a pipeline: with its "
            f"stages and one folder for each) or a single stage's {', '.join(files)}"
        )
    stage = _load_stage(folder, {"name": folder.resolve().name, "folder": ".", **manifest})
    return Run(folder.resolve().name, manifest, [stage])


def _load_stage(root: Path, entry: Mapping) -> Stage:
    name = str(entry.get("name") or "stage")
    folder = root / str(entry.get("folder") or name)
    manifest = _read_manifest(folder / "manifest.json")
    known = {**manifest, **entry}
    return Stage(
        name=name,
        title=str(known.get("title") or name),
        kind=str(known.get("kind") or ""),
        status=str(known.get("status") or ""),
        starts_from=str(known.get("starts_from") or ""),
        seconds=number(known.get("seconds")),
        manifest=manifest,
        rows=_read_rows(folder / "metrics.jsonl"),
        eval=_read_json(folder / "eval.json"),
        samples=_read_rows(folder / "samples.jsonl"),
        accounting=_read_json(folder / "accounting.json"),
        profile=_read_json(folder / "profile" / "profile.json"),
        folder=str(folder.relative_to(root)),
        plan=_read_json(folder / "plan.json"),
        setup=_read_json(folder / "evaluation.json"),
        rescored=_read_json(folder / "rescored.json"),
    )


def _read_json(path: Path) -> dict:
    return read_json(path, default={})


def _read_manifest(path: Path) -> dict:
    manifest = _read_json(path)
    check_fields(
        manifest, MANIFEST, path, "mend it, or remove it: the report is then made without it"
    )
    return manifest


def _read_rows(path: Path) -> list[dict]:
    return read_metrics(path) if path.is_file() else []


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if is_number(value) and math.isfinite(value) else None


def claim_rows(run: Run) -> list[list[str]]:
    marks = {True: "✓ holds", False: "✗ fails"}
    return [
        [shown(c.get("claim")), shown(c.get("measured")), shown(c.get("bar")),
         marks.get(c.get("ok"), "not measured")]
        for c in run.manifest.get("claims") or []
    ]  # fmt: skip


def shown(value: Any) -> str:
    """A value of a manifest for a person."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v) for v in value)
    return str(value)


def samples_note(run: Run) -> list[str]:
    """How many problems and samples stand behind the table."""
    counts = {
        (shown(s.eval.get("num_problems")), shown(s.eval.get("k")))
        for s in run.stages
        if s.eval.get("num_problems") and s.eval.get("k")
    }
    if len(counts) != 1:
        return []
    problems, k = counts.pop()
    return [f"Each stage: {problems} problems, k = {k} samples each."]
