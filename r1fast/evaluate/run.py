"""An evaluation: sample what is missing, grade it, store every sample, sum up.

Samples and verdicts are written as they come, by (problem, sample). A run that was killed draws and
judges only what it had not, and ends with the same files as one that was not. So does one whose k
grew: samples of the same model, settings, prompt and seed are used again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from r1fast import distributed
from r1fast.config import Config
from r1fast.evaluate.grader_version import versions_of
from r1fast.evaluate.row_log import Key, RowLog
from r1fast.evaluate.sampling import Ask, asks_of, sample_missing
from r1fast.evaluate.statistics import summarise
from r1fast.hf_folder import read_json, write_json
from r1fast.interrupt import boundary, stoppable
from r1fast.jsonl import read_jsonl, write_jsonl
from r1fast.metrics import note, progress
from r1fast.policy import Policy
from r1fast.rewards.graders import JUDGED_KINDS
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.weights import checksums, weights
from r1fast.types import Completion, Problem, RolloutGroup
from r1fast.watchdog import watched

GRADED_AT_ONCE = 256  # samples; what is stored between two of them survives a kill
SAMPLED = ("sample", "seed", "prompt_hash", "text", "finish_reason", "num_tokens")
# of evaluation.json: what samples depend on besides prompt and seed, and verdicts besides samples
OF_SAMPLES = ("weights", "dtype", "eos_ids", "temperature", "top_p", "max_completion_tokens")
SLOW_KINDS = ("code", *JUDGED_KINDS)  # whose grading shows progress
JUDGE_COSTS = ("requests", "retries", "cached", "failed", "prompt_tokens", "completion_tokens")
OF_VERDICTS = ("template", "rewards", "prompt_opens_think", "grader")
Place = tuple[int, int]  # in this rank's problems, sample


def evaluate(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    scorer: RewardScorer,
    *,
    num_samples: int = 0,
    folder: Path | None = None,
    title: str = "",
    preset: str = "",
) -> dict:
    """Sample and score `problems`. Writes eval.json, samples.jsonl, problems.jsonl and
    evaluation.json into `folder` where given, and resumes what a killed call has left there.

    Returns the same on every rank. Raises ValueError where there is nothing to evaluate, and, where a
    folder is given, RuntimeError where the judge failed on more than half of what it was asked: there
    is no number then, and the samples wait for the same command.
    """
    if not problems:
        raise ValueError("there are no evaluation problems (see data.eval)")
    e = config.eval
    sampling = SamplingParams(
        e.temperature, e.top_p, max_tokens=config.rollout.max_completion_tokens
    )
    num_samples = num_samples or e.num_samples
    asks = asks_of(policy, problems, config, num_samples, "eval")
    setup = setup_of(policy, config, scorer, preset, {problem.kind for problem in problems})
    before = judge_totals(scorer)
    if folder is None:
        samples = _sample(policy, asks, config, sampling, {}, lambda row: None, title)
        rows = _grade(asks, samples, scorer, {}, lambda row: None, title)
    else:
        with watched(folder, title or "evaluation", config.log):
            rows = _resumable(policy, asks, config, sampling, scorer, setup, folder, title)
    rows = distributed.gather_problems(rows, (p.id for p in problems))
    if not rows:
        raise ValueError(
            f"none of the {len(problems)} prompts fits into rollout.max_prompt_tokens = "
            f"{config.rollout.max_prompt_tokens} and the model's context of "
            f"{policy.model.spec.max_position_embeddings}: there is nothing to evaluate"
        )
    result = summarise(rows, scorer.grader.equivalent)
    result |= {"temperature": e.temperature, "top_p": e.top_p, "seed": config.seed}
    if folder is not None:
        check_judge(rows, scorer)
    result |= what_graded(scorer, before)
    if folder is not None:
        if "judge" not in result and any(row["kind"] in JUDGED_KINDS for row in rows):
            result |= _judge_before(folder)
        if distributed.is_main():
            store(folder, rows, result, problems, setup)
        distributed.barrier()
    return result


def store(
    folder: Path, rows: list[dict], result: dict, problems: Sequence[Problem], setup: dict
) -> None:
    """Write the four files of an evaluation, each all or nothing; the partial ones go."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {row["problem_id"] for row in rows}
    write_jsonl(folder / "problems.jsonl", (asdict(p) for p in problems if p.id in asked))
    write_json(folder / "evaluation.json", setup)
    write_jsonl(folder / "samples.jsonl", rows)
    write_json(folder / "eval.json", result)
    for path in folder.glob("*.partial-*.jsonl"):
        path.unlink(missing_ok=True)


def short_evaluation(
    policy: Policy, problems: list[Problem], config: Config, scorer: RewardScorer
) -> Callable[[], dict]:
    """What a trainer calls every `eval.every_steps` steps: few problems, few samples."""
    e = config.eval
    return lambda: evaluate(
        policy, problems[: e.every_num_problems], config, scorer, num_samples=e.every_num_samples
    )


def judge_totals(scorer: Any) -> Counter[str]:
    return scorer.judge_totals() if hasattr(scorer, "judge_totals") else Counter()


def what_graded(scorer: Any, before: Counter[str]) -> dict:
    """{"sandbox": what programs ran in, "judge": what it was asked since `before`}, over all ranks."""
    told: dict = {}
    if (sandbox := getattr(scorer, "sandbox", None)) is not None:
        told["sandbox"] = sandbox.description
    now, asked = judge_totals(scorer), Counter[str]()
    for part in distributed.gather_objects(
        {name: now[name] - before[name] for name in JUDGE_COSTS}
    ):
        asked.update(part)
    if any(asked.values()):
        told["judge"] = {"model": scorer.judge_name, **asked}
    return told


def _judge_before(folder: Path) -> dict:
    """What the judge cost when it was last asked: all of its verdicts were there before this call."""
    path = folder / "eval.json"
    told = read_json(path).get("judge") if path.is_file() else None
    return {} if told is None else {"judge": told}


def check_judge(rows: Sequence[Mapping], scorer: Any) -> None:
    """RuntimeError where the judge failed on more than half of what it was asked, on any rank."""
    asked = [r for r in rows if r["kind"] in JUDGED_KINDS and r["verdict"] != "no_answer"]
    failed = sum(row["verdict"] == "error" for row in asked)
    errors = distributed.gather_objects(
        [chat.last_error for chat in getattr(scorer, "chats", []) if chat.last_error]
    )
    if 2 * failed > len(asked):
        last = next((text for texts in errors for text in texts), "none was noted")
        raise RuntimeError(
            f"the judge failed on {failed} of {len(asked)} answers; the last failure: {last}. What was "
            "sampled and judged is kept: the same command goes on"
        )


def setup_of(
    policy: Policy, config: Config, scorer: Any, preset: str, kinds: Iterable[str]
) -> dict:
    """What samples and verdicts depend on besides prompt and seed: all that `rescore` needs, too."""
    e = config.eval
    weight_sums = repr(checksums(weights(policy.model)))
    return {
        "preset": preset,
        "model": policy.path,
        "weights": blake2b(weight_sums.encode(), digest_size=8).hexdigest(),
        "dtype": str(policy.model.head_weight.dtype).removeprefix("torch."),
        "eos_ids": list(policy.eos_ids),
        "temperature": e.temperature,
        "top_p": e.top_p,
        "max_completion_tokens": config.rollout.max_completion_tokens,
        "seed": config.seed,
        "template": asdict(config.template),
        "rewards": asdict(config.rewards),
        "prompt_opens_think": bool(getattr(scorer, "prompt_opens_think", False)),
        "grader": "; ".join(filter(None, grader_versions(scorer, kinds).values())),
    }


def grader_versions(scorer: Any, kinds: Iterable[str]) -> dict[str, str]:
    """What rows of each kind are marked with; a scorer that is not ours may have a `version`."""
    if isinstance(scorer, RewardScorer):
        return versions_of(kinds, scorer.judge_name)
    return dict.fromkeys(sorted(set(kinds)), str(getattr(scorer, "version", "")))


def _digest(*values: Any) -> str:
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _resumable(
    policy: Policy,
    asks: Sequence[Ask],
    config: Config,
    sampling: SamplingParams,
    scorer: Any,
    setup: dict,
    folder: Path,
    title: str,
) -> list[dict]:
    """The rows of this rank's problems, what an earlier call has left among them."""
    of_samples = {name: setup[name] for name in OF_SAMPLES}
    of_verdicts = {name: setup[name] for name in OF_VERDICTS}
    finished, holds = _finished(folder, of_samples, of_verdicts)
    sample_log = RowLog(folder, "samples", _digest(of_samples))
    verdict_log = RowLog(folder, "graded", _digest(of_samples, of_verdicts))
    try:
        known = {**finished, **sample_log.rows}
        valid = {
            (i, j): row
            for i, ask in enumerate(asks)
            for j, seed in enumerate(ask.seeds)
            if (row := known.get((ask.problem.id, j))) is not None
            and (row["seed"], row["prompt_hash"]) == (seed, ask.prompt_hash)
            and row["finish_reason"] != "error"
        }
        if valid and title:
            total = sum(len(ask.seeds) for ask in asks)
            note(f"{len(valid)} of {total} samples were drawn before and are used again")
        samples = _sample(policy, asks, config, sampling, valid, sample_log.append, title)
        graded = {**(finished if holds else {}), **verdict_log.rows}
        return _grade(asks, samples, scorer, graded, verdict_log.append, title)
    finally:
        sample_log.close()
        verdict_log.close()


def _finished(
    folder: Path, of_samples: Mapping, of_verdicts: Mapping
) -> tuple[dict[Key, dict], bool]:
    """The rows of a finished evaluation of the same samples, and whether their verdicts hold too."""
    setup_path, rows_path = folder / "evaluation.json", folder / "samples.jsonl"
    if not (setup_path.is_file() and rows_path.is_file()):
        return {}, False
    setup = read_json(setup_path)
    if {name: setup.get(name) for name in of_samples} != of_samples:
        return {}, False
    rows = {(row["problem_id"], row["sample"]): row for _, row in read_jsonl(rows_path)}
    return rows, {name: setup.get(name) for name in of_verdicts} == of_verdicts


def _sample(
    policy: Policy,
    asks: Sequence[Ask],
    config: Config,
    sampling: SamplingParams,
    valid: dict[Place, dict],
    keep: Callable[[dict], None],
    title: str,
) -> dict[Place, dict]:
    """All samples by (place in `asks`, sample); new ones go to `keep` as they end."""
    found = dict(valid)

    def on_finish(i: int, j: int, completion: Completion) -> None:
        found[i, j] = {
            "problem_id": asks[i].problem.id,
            "sample": j,
            "seed": asks[i].seeds[j],
            "prompt_hash": asks[i].prompt_hash,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
        }
        keep(found[i, j])

    sample_missing(policy, asks, config, sampling, valid, on_finish, title=title)
    return found


def _grade(
    asks: Sequence[Ask],
    samples: dict[Place, dict],
    scorer: Any,
    graded: Mapping[Key, dict],
    keep: Callable[[dict], None],
    title: str,
) -> list[dict]:
    """The final rows in order; those not in `graded` are scored, and go to `keep` as they are.

    A verdict "error" is asked for again: what failed then may work now.
    """
    rows: dict[Place, dict] = {}
    groups: list[RolloutGroup] = []
    places: list[list[Place]] = []
    for i, ask in enumerate(asks):
        group, own = RolloutGroup(ask.problem, ask.prompt_ids, []), []
        for j in range(len(ask.seeds)):
            row, before = samples[i, j], graded.get((ask.problem.id, j))
            if before is not None and before["verdict"] != "error" and _is_same(before, row):
                rows[i, j] = before
            else:
                group.completions.append(completion_of_row(row))
                own.append((i, j))
        if own:
            groups.append(group)
            places.append(own)
    num_new = sum(map(len, places))
    shown = bool(title) and any(group.problem.kind in SLOW_KINDS for group in groups)
    as_one = scorer.as_one_call() if hasattr(scorer, "as_one_call") else nullcontext()
    versions = grader_versions(scorer, (ask.problem.kind for ask in asks))
    with (
        as_one,
        progress(f"{title}, grading", num_new, "sample", enabled=shown) as bar,
        stoppable(waits=True),
    ):
        for part, where in _parts(groups, places):
            boundary("grading", title)
            scorer.score(part)
            for group, own in zip(part, where, strict=True):
                for place, reward in zip(own, group.rewards, strict=True):
                    version = versions[group.problem.kind]
                    rows[place] = final_row(group.problem, samples[place], reward, version)
                    keep(rows[place])
            bar.update(n=sum(map(len, where)))
    return [rows[place] for place in sorted(rows)]


def _is_same(graded: Mapping, sampled: Mapping) -> bool:
    return all(graded.get(name) == sampled[name] for name in SAMPLED)


def _parts(
    groups: list[RolloutGroup], places: list[list[Place]]
) -> Iterator[tuple[list[RolloutGroup], list[list[Place]]]]:
    """Groups and the places of their samples, about GRADED_AT_ONCE samples at a time."""
    start = size = 0
    for end, own in enumerate(places, 1):
        size += len(own)
        if size >= GRADED_AT_ONCE or end == len(places):
            yield groups[start:end], places[start:end]
            start, size = end, 0


def completion_of_row(row: Mapping) -> Completion:
    """A stored sample to be graded. Which tokens it had is not stored: no verdict depends on it."""
    return Completion([0] * row["num_tokens"], [], row["finish_reason"], row["text"])


def final_row(problem: Problem, row: dict, reward: Any, grader: str) -> dict:
    """What samples.jsonl holds of a sample."""
    return {
        "problem_id": problem.id,
        "kind": problem.kind,
        "subset": problem.subset,
        "prompt": problem.prompt,
        "answer": problem.answer,
        **{name: row[name] for name in SAMPLED},
        "extracted": reward.answer,
        "verdict": reward.verdict,
        "grader": grader,
        "format": reward.parts.get("format"),
        "language_share": reward.parts.get("language"),
        **reward.detail,
    }
