"""Recorded steps: a step's scored rollouts and versions on disk, so that its update can be made again.

    folder/recorded/step-000012/
      rollouts.safetensors   token ids, log-probabilities, rewards: 4 bytes a prompt token, 8 a completion token
      problems.jsonl         a row a problem
      completions.jsonl      a row a completion, for people: text, reward, parts, verdict, answer
      state.json             config, versions, digests of the state before and after, the update's metrics
      manifest.json          sizes and hashes of these
Written as checkpoints are, in place of an earlier recording of the step.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed, recorded_fields
from r1fast.checkpoint import STATE, read_step, steps_in, write_step
from r1fast.config import to_dict
from r1fast.config_check import steps_of
from r1fast.metrics import warn
from r1fast.provenance import rounding
from r1fast.recorded_fields import check_numbers, check_recording, read_recorded_rows
from r1fast.tensor_file import json_bytes, safetensors_bytes
from r1fast.training import Trainer
from r1fast.types import Completion, Problem, Reward, RolloutGroup

FOLDER = "recorded"
NUMBERS, PROBLEMS, COMPLETIONS = "rollouts", "problems.jsonl", "completions.jsonl"
PROBLEM = tuple(f.name for f in fields(Problem))


@dataclass(slots=True)
class Recording:
    """One step read back. `groups` are those of all ranks; one rank's are in the order it had."""

    step: int  # counted from 1, as in metrics.jsonl
    groups: list[RolloutGroup]
    ranks: list[int]  # (len(groups),) that had them
    state: dict

    def of_rank(self, rank: int, num_processes: int) -> list[RolloutGroup]:
        """What this rank had; with another number of processes, its share of them."""
        if num_processes != self.state["versions"]["processes"]:
            return self.groups[rank::num_processes]
        return [
            group for group, owner in zip(self.groups, self.ranks, strict=True) if owner == rank
        ]


@contextmanager
def recorded(trainer: Trainer, groups: list[RolloutGroup], step: int) -> Iterator[dict]:
    """Keeps the step whose update is made inside, if log.record names it; its metrics go into the yielded dict.

    `step` counts from 0. An update that fails is kept too, without what it would have led to.
    """
    row: dict[str, float] = {}
    if not any(step + 1 in steps for steps in steps_of(trainer.config.log.record)):
        yield row
        return
    with trainer.timer("record"):
        everybody = _gather(groups)
        before = snapshot(trainer) if distributed.is_main() else {}
    try:
        yield row
    except Exception:
        _write(trainer, step + 1, everybody, before, row, failed=True)
        raise
    with trainer.timer("record"):
        _write(trainer, step + 1, everybody, before, row, failed=False)


def snapshot(trainer: Trainer) -> dict:
    """Counters and digests of what a step starts from or leads to."""
    # in the recording itself, or of no matter to an update
    known = ("stage", "data", "config", "base_path", "monitor")
    counters = {name: value for name, value in trainer.state().items() if name not in known}
    return {"counters": counters, "digests": digests(trainer.state_tensors())}


def digests(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """SHA-256 of each set of named tensors: names, types, shapes and every bit."""

    def one(x: Tensor) -> bytes:
        data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(data).digest()

    found = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets other threads run
        for key, named in tensors.items():
            total, names = hashlib.sha256(), sorted(named)
            for name, digest in zip(names, pool.map(one, (named[n] for n in names)), strict=True):
                x = named[name]
                total.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode() + digest)
            found[key] = total.hexdigest()
    return found


def recorded_steps(folder: Path) -> list[int]:
    return sorted({step for step, _ in steps_in(folder / FOLDER)})


def read_recording(folder: Path, step: int) -> Recording:
    """Raises ValueError where the step is not recorded, or its files are damaged."""
    saved = read_step(folder / FOLDER, step)
    if saved is None:
        raise ValueError(
            f"step {step} of {str(folder)!r} is not recorded; recorded are "
            f"{shown_steps(recorded_steps(folder)) or 'none'}. --record=12,20-30 or --record "
            "(all) records the steps of a run, as log.record does"
        )
    check_recording(saved.path, saved.state)
    problems = read_recorded_rows(saved.path / PROBLEMS, recorded_fields.PROBLEM)
    completions = read_recorded_rows(saved.path / COMPLETIONS, recorded_fields.COMPLETION)
    tensors = saved.tensors(NUMBERS)
    check_numbers(tensors, len(problems), len(completions), saved.path / f"{NUMBERS}.safetensors")
    groups = _groups(tensors, problems, completions)
    row = {name: float(x) if isinstance(x, str) else x for name, x in saved.state["row"].items()}
    return Recording(step, groups, [p["rank"] for p in problems], saved.state | {"row": row})


def shown_steps(steps: list[int]) -> str:
    """1-10, 12, 20-30."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _write(
    trainer: Trainer, step: int, everybody, before: dict, row: dict, *, failed: bool
) -> None:
    if not distributed.is_main():
        return
    groups, ranks = everybody
    tensors, problems, completions = _encode(groups)
    problems = [{"rank": r, **row} for r, row in zip(ranks, problems, strict=True)]
    config = trainer.config_that_matters()
    state = {
        "stage": trainer.stage,
        "data": trainer.data,
        "starts_from": trainer.policy.path,
        "versions": rounding(trainer.policy.device, trainer.world_size),
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "before": before,
        "after": {} if failed else snapshot(trainer),
        # JSON has no NaN
        "row": {k: x if abs(x) < float("inf") else str(x) for k, x in row.items()},
        "config": to_dict(trainer.config),
    }
    files = {
        f"{NUMBERS}.safetensors": safetensors_bytes(tensors),
        PROBLEMS: map(_line, problems),
        COMPLETIONS: map(_line, completions),
        STATE: [json_bytes(state)],
    }
    try:
        path = write_step(trainer.folder / FOLDER, step, files)
    except OSError as error:
        warn(f"step {step} could not be recorded, training goes on: {error}")
        return
    shutil.rmtree(path.with_name(f"{path.name}.old"), ignore_errors=True)


def _line(row: dict) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")


def _gather(groups: list[RolloutGroup]) -> tuple[list[RolloutGroup], list[int]]:
    """(groups of all ranks, each with its position in the step; the rank of each), on rank 0."""
    rank, world_size = distributed.rank(), distributed.world_size()
    groups = [
        group if group.position is not None else replace(group, position=rank + n * world_size)
        for n, group in enumerate(groups)
    ]
    if world_size == 1:
        return groups, [0] * len(groups)
    from safetensors.torch import load

    tensors, *rows = _encode(groups)
    numbers = distributed.gather_bytes(b"".join(safetensors_bytes(tensors)))
    rows = distributed.gather_objects(rows)
    if not distributed.is_main():
        return [], []
    by_rank = [_groups(load(x), *r) for x, r in zip(numbers, rows, strict=True)]
    order = sorted((n, rank) for rank, own in enumerate(by_rank) for n in range(len(own)))
    return [by_rank[rank][n] for n, rank in order], [rank for _, rank in order]


def _encode(groups: list[RolloutGroup]) -> tuple[dict[str, Tensor], list[dict], list[dict]]:
    """(numbers, a row a problem, a row a completion) of groups."""
    everything = [(g, i, c) for g in groups for i, c in enumerate(g.completions)]
    ids, floats = torch.int32, torch.float32  # a batch takes log-probabilities as float32
    tensors = {
        "prompt_lengths": torch.tensor([len(g.prompt_ids) for g in groups], dtype=ids),
        "prompt_ids": torch.tensor([t for g in groups for t in g.prompt_ids], dtype=ids),
        "num_completions": torch.tensor([len(g.completions) for g in groups], dtype=ids),
        "completion_lengths": torch.tensor([len(c.token_ids) for _, _, c in everything], dtype=ids),
        "completion_ids": torch.tensor(
            [t for _, _, c in everything for t in c.token_ids], dtype=ids
        ),
        "logprobs": torch.tensor([x for _, _, c in everything for x in c.logprobs], dtype=floats),
    }
    missing, rows = Reward(math.nan, {}, None), []  # the update will say so
    for group, sample, completion in everything:
        reward = group.rewards[sample] if sample < len(group.rewards) else missing
        rows.append({
            "position": group.position, "problem_id": group.problem.id, "sample": sample,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason,
            "reward": reward.total, "verdict": reward.verdict, "answer": reward.answer,
            "parts": reward.parts, "text": completion.text,
        })  # fmt: skip
    tensors["rewards"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    problems = [
        {"position": group.position, **{name: getattr(group.problem, name) for name in PROBLEM}}
        for group in groups
    ]
    return tensors, json.loads(json.dumps(problems, default=str)), rows


def _groups(
    tensors: dict[str, Tensor], problems: list[dict], rows: list[dict]
) -> list[RolloutGroup]:
    """The inverse of `_encode`."""

    def parts(name: str, lengths: str) -> Iterator[list]:
        return iter([x.tolist() for x in tensors[name].split(tensors[lengths].tolist())])

    prompts = parts("prompt_ids", "prompt_lengths")
    ids, logprobs = (parts(n, "completion_lengths") for n in ("completion_ids", "logprobs"))
    rewards, own = iter(tensors["rewards"].tolist()), iter(rows)
    groups = []
    for problem, num_completions in zip(problems, tensors["num_completions"].tolist(), strict=True):
        group = RolloutGroup(Problem(**{n: problem[n] for n in PROBLEM}), next(prompts), [])
        group.position = problem["position"]
        for row in (next(own) for _ in range(num_completions)):
            completion = Completion(next(ids), next(logprobs), row["finish_reason"], row["text"])
            completion.stop_reason = row["stop_reason"]
            group.completions.append(completion)
            group.rewards.append(Reward(next(rewards), row["parts"], row["verdict"], row["answer"]))
        groups.append(group)
    return groups
