"""`r1fast replay RUN --step N`: a recorded update made again, to the last bit, or beside one of another loss.

Nothing of the run is changed; the result goes into `RUN/replay-step-<N>....json` as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1fast import distributed
from r1fast.config import to_dict
from r1fast.config_diff import same_config
from r1fast.hf_folder import write_json
from r1fast.metrics import say, warn
from r1fast.replay.diff import compare, differing
from r1fast.replay.show import show
from r1fast.replay.start import Replay, prepare, under
from r1fast.replay.update import Outcome, State, run_update


def replay(
    run: str | Path, step: int, overrides: Sequence[str] = (), *, as_json: bool = False
) -> dict:
    """Replay a step, show what came of it, and return it. Raises ValueError as `prepare` does."""
    folder = Path(run)
    ready = prepare(folder, step, overrides)
    trainer, recording = ready.trainer, ready.recording
    before = State.of(trainer, step - 1) if ready.variant is not None else None
    outcome = run_update(trainer, recording)
    result = _result(ready, outcome)
    if ready.variant is not None:
        trainer.restore(before)
        other = under(trainer, ready.variant, recording)
        result["overrides"] = same_config(to_dict(ready.config), to_dict(ready.variant))
        result["comparison"] = compare(
            trainer, outcome, run_update(other, recording), ready.variant
        )
    result = _plain(result)
    if distributed.is_main():
        changed = "-".join(override.removeprefix("--") for override in overrides)
        name = re.sub(r"[^\w.=-]+", "_", f"replay-step-{step:06d}" + f"-{changed}" * bool(changed))
        path = folder / f"{name[:200]}.json"
        try:
            write_json(path, result)
        except OSError as error:
            warn(f"{path} could not be written: {error}")
        if as_json:
            say(json.dumps(result, ensure_ascii=False, indent=1))
        else:
            show(result)
            say(f"\n{path}")
    distributed.barrier()
    return result


def _result(ready: Replay, outcome: Outcome) -> dict[str, Any]:
    """The recorded update and the same one made again."""
    recording = ready.recording
    state, after = recording.state, recording.state["after"]
    moved = [n for n, x in after.get("digests", {}).items() if outcome.digests.get(n) != x]
    metrics = differing(state["row"], outcome.row) if after else []
    completions = [c for group in recording.groups for c in group.completions]
    return {
        "run": str(ready.trainer.folder),
        "stage": state["stage"],
        "step": recording.step,
        "problems": len(recording.groups),
        "completions": len(completions),
        "tokens": sum(len(c.token_ids) for c in completions),
        "start": ready.start,
        "is_complete": bool(
            after
        ),  # else the recorded update failed, and there is nothing to compare with
        "is_identical": bool(after) and ready.is_exact and not moved and not metrics,
        "differing": [*moved, *metrics],
        "versions": state["versions"],
        "other_versions": ready.differences,
        "recorded": state["row"],
        "replayed": outcome.row,
    }


def _plain(value: Any) -> Any:
    """With None for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
