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
from r1fast.evaluate.row_log import RowLog
from r1fast.evaluate.sample_rows import (
    FINAL,
    SAMPLED,
    completion_of_row,
    final_row,
)
from r1fast.evaluate.sampling import Ask, asks_of, sample_missing
from r1fast.evaluate.standing import (
    JUDGE_COSTS,
    Place,
    costs_before,
    finished_rows,
    standing_rows,
    tell_given_again,
)
from r1fast.evaluate.statistics import summarise
from r1fast.hf_folder import write_json
from r1fast.interrupt import boundary, stoppable
from r1fast.jsonl import write_jsonl
from r1fast.metrics import note, warn
from r1fast.policy import Policy
from r1fast.progress import progress
from r1fast.protocol import protocol_hint
from r1fast.rewards.graders import JUDGED_KINDS
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.sampler import SamplingParams
from r1fast.rollout.weights import checksums, weights
from r1fast.templates import opened_protocols
from r1fast.types import Completion, Problem, RolloutGroup
from r1fast.watchdog import watched

GRADED_AT_ONCE = 256  # samples; what is stored between two of them survives a kill
# of evaluation.json: what samples depend on besides prompt and seed, and verdicts besides what rows say
OF_SAMPLES = ("weights", "dtype", "eos_ids", "temperature", "top_p", "max_completion_tokens")
SLOW_KINDS = ("code", *JUDGED_KINDS)  # whose grading shows progress
OF_VERDICTS = ("template", "rewards", "prompt_opens_think")


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
    earlier: Counter[str] = Counter()
    if folder is None:
        samples = _sample(policy, asks, config, sampling, {}, scorer, lambda row: None, title)
        rows = _grade(asks, samples, scorer, {}, None, title)
    else:
        with watched(folder, title or "evaluation", config.log):
            rows, earlier = _resumable(policy, asks, config, sampling, scorer, setup, folder, title)
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
        t = config.template
        texts, opened = [row["text"] for row in rows], opened_protocols(t, policy.tokenizer)
        hint = protocol_hint(texts, t.protocol, t.special_token, opened)
        if hint and distributed.is_main():
            warn(hint)
    result |= what_graded(scorer, before, earlier)
    if folder is not None:
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


def what_graded(scorer: Any, before: Counter[str], earlier: Counter[str] | None = None) -> dict:
    """{"sandbox": what programs ran in, "judge": what it was asked since `before`}, over all ranks.

    `earlier`, the same on all ranks, is what earlier calls asked for the verdicts that stand.
    """
    told: dict = {}
    if (sandbox := getattr(scorer, "sandbox", None)) is not None:
        told["sandbox"] = sandbox.description
    asked = Counter[str]()
    for part in distributed.gather_objects(judge_costs(scorer, before)):
        asked.update(part)
    total = asked + (earlier or Counter())
    if any(total.values()):
        if any(asked.values()) and earlier:
            new, all_of_them = asked["requests"], total["requests"]
            note(f"the judge got {new:,} requests in this call, {all_of_them:,} with those before")
        told["judge"] = {"model": scorer.judge_name, **{name: total[name] for name in JUDGE_COSTS}}
    return told


def judge_costs(scorer: Any, before: Counter[str]) -> dict[str, int]:
    """What this rank's judges were asked since `before`."""
    now = judge_totals(scorer)
    return {name: now[name] - before[name] for name in JUDGE_COSTS}


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
) -> tuple[list[dict], Counter[str]]:
    """The rows of this rank's problems, what an earlier call has left among them, and what the judge
    was asked for the verdicts that stand."""
    of_samples = {name: setup[name] for name in OF_SAMPLES}
    of_verdicts = {name: setup[name] for name in OF_VERDICTS}
    finished = finished_rows(folder, of_samples, of_verdicts)
    sample_log = RowLog(folder, "samples", _digest(of_samples), SAMPLED)
    verdict_log = RowLog(folder, "graded", _digest(of_samples, of_verdicts), FINAL)
    try:
        known = {**finished.rows, **sample_log.rows}
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
        samples = _sample(policy, asks, config, sampling, valid, scorer, sample_log.append, title)
        versions = grader_versions(scorer, (ask.problem.kind for ask in asks))
        standing, again = standing_rows(asks, samples, finished, verdict_log.rows, versions)
        tell_given_again(again)
        earlier = costs_before(finished, standing, verdict_log, getattr(scorer, "judge_name", ""))
        return _grade(asks, samples, scorer, standing, verdict_log, title), earlier
    finally:
        sample_log.close()
        verdict_log.close()


def _sample(
    policy: Policy,
    asks: Sequence[Ask],
    config: Config,
    sampling: SamplingParams,
    valid: dict[Place, dict],
    scorer: Any,
    keep: Callable[[dict], None],
    title: str,
) -> dict[Place, dict]:
    """All samples by (place in `asks`, sample); new ones go to `keep` as they end."""
    found = dict(valid)
    undrawn = [
        ask.problem
        for i, ask in enumerate(asks)
        if any((i, j) not in valid for j in range(len(ask.seeds)))
    ]
    if undrawn and hasattr(scorer, "prepare"):
        scorer.prepare(undrawn)  # a sandbox that is missing is an error now, not in hours

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
    standing: Mapping[Place, dict],
    log: RowLog | None,
    title: str,
) -> list[dict]:
    """The final rows in order; those not in `standing` are scored, and go to `log` as they are."""
    rows = dict(standing)
    groups: list[RolloutGroup] = []
    places: list[list[Place]] = []
    for i, ask in enumerate(asks):
        own = [(i, j) for j in range(len(ask.seeds)) if (i, j) not in standing]
        if own:
            completions = [completion_of_row(samples[place]) for place in own]
            groups.append(RolloutGroup(ask.problem, ask.prompt_ids, completions))
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
            before = judge_totals(scorer)
            scorer.score(part)
            for group, own in zip(part, where, strict=True):
                for place, reward in zip(own, group.rewards, strict=True):
                    version = versions[group.problem.kind]
                    rows[place] = final_row(group.problem, samples[place], reward, version)
                    if log is not None:
                        log.append(rows[place])
            costs = judge_costs(scorer, before)
            if log is not None and any(costs.values()):
                log.add_costs({"model": scorer.judge_name, **costs})
            bar.update(n=sum(map(len, where)))
    return [rows[place] for place in sorted(rows)]


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
