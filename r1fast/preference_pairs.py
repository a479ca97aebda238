"""Preference pairs for the helpfulness model, made by a judge (DeepSeek-R1 v2, section 3.1).

Two responses to a prompt are judged `judge.num_judgements` times (4), each time in an order drawn at
random, and the grades, from 2 (much better) to -2, are averaged. A pair is kept where the mean is more
than `judge.min_gap` (1) from 0, and where the longer response is at most `judge.max_length_ratio` times
as long, so that length does not tell chosen from rejected.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.evaluate import sample_groups
from r1fast.hf_folder import write_json
from r1fast.jsonl import write_jsonl
from r1fast.metrics import say
from r1fast.policy import Policy
from r1fast.protocol import split_completion
from r1fast.rewards.pairwise import PairwiseJudge, pairwise_metrics
from r1fast.rollout.sampler import SamplingParams
from r1fast.templates import prompt_opens_think
from r1fast.types import Problem


def make_pairs(
    problems: list[Problem],
    config: Config,
    judge: PairwiseJudge,
    folder: Path,
    policy: Policy | None = None,
) -> list[dict]:
    """Rows {prompt, chosen, rejected, gap, id}; writes preference.jsonl and accounting.json.

    A row's own `responses` (two or more texts) are compared; where there are none, the summaries of
    `judge.num_samples` completions of `policy`. Raises ValueError where neither is there or no pair is
    kept.
    """
    j = config.judge
    rank, world_size = distributed.rank(), distributed.world_size()
    given = [problem for problem in problems if problem.meta.get("responses") is not None]
    candidates = [(problem, _responses(problem)) for problem in given[rank::world_size]] + _sampled(
        [p for p in problems if p.meta.get("responses") is None], config, policy
    )
    rows, dropped = [], Counter()
    for problem, responses in candidates:
        for a, b in combinations(responses, 2):
            reason = _fault(a, b, j.max_length_ratio)
            if reason:
                dropped[reason] += 1
            else:
                rows.append({"problem_id": problem.id, "prompt": problem.prompt, "a": a, "b": b})
    gaps = judge.gaps(
        [(row["prompt"], row["a"], row["b"]) for row in rows],
        num_judgements=j.num_judgements,
        temperature=1.0,
        seed=config.seed,
    )
    kept = []
    for row, gap in zip(rows, gaps, strict=True):
        if gap is None:
            dropped["judge failed"] += 1
        elif abs(gap) <= j.min_gap:
            dropped["gap too small"] += 1
        else:
            chosen, rejected = (row["a"], row["b"]) if gap > 0 else (row["b"], row["a"])
            kept.append({
                "problem_id": row["problem_id"], "prompt": row["prompt"], "chosen": chosen,
                "rejected": rejected, "gap": abs(gap),
            })  # fmt: skip
    return _write(kept, dropped, problems, judge, folder)


def _sampled(
    problems: list[Problem], config: Config, policy: Policy | None
) -> list[tuple[Problem, list[str]]]:
    if not problems:
        return []
    if policy is None:
        raise ValueError(
            f"prompt {problems[0].id!r} has no 'responses', and there is no model to sample them: "
            "set model.path"
        )
    r, t = config.rollout, config.template
    sampling = SamplingParams(
        r.temperature, r.top_p, r.top_k, r.max_completion_tokens, min_p=r.min_p
    )
    groups = sample_groups(
        policy, problems, config, sampling, config.judge.num_samples, purpose="preferences",
        title="responses",
    )  # fmt: skip
    opens = prompt_opens_think(t, policy.tokenizer)
    return [
        (
            group.problem,
            [
                split_completion(
                    c.text, t.protocol, t.special_token, prompt_opens_think=opens
                ).summary
                or ""
                for c in group.completions
            ],
        )
        for group in groups
    ]


def _responses(problem: Problem) -> list[str]:
    value = problem.meta["responses"]
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(x, str) for x in value):
        raise ValueError(
            f"prompt {problem.id!r}: 'responses' must be a list of two or more texts, got {value!r:.80}"
        )
    return value


def _fault(a: str, b: str, max_ratio: float) -> str:
    """Why nobody need judge this pair; empty where the judge is to be asked."""
    lengths = sorted((len(a.strip()), len(b.strip())))
    if not lengths[0]:
        return "no summary"
    if a.strip() == b.strip():
        return "same text"
    return "lengths differ" if max_ratio and lengths[1] > max_ratio * lengths[0] else ""


def _write(
    kept: list[dict],
    dropped: Counter,
    problems: list[Problem],
    judge: PairwiseJudge,
    folder: Path,
) -> list[dict]:
    rows = distributed.gather_problems(kept, (problem.id for problem in problems))
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for part, own in distributed.gather_objects(
        [dict(judge.counts + judge.chat.counts), dict(dropped)]
    ):
        counts.update(part)
        reasons.update(own)
    n = max(len(rows), 1)
    accounting = {
        "problems": len(problems),
        "sampled": len(rows) + reasons.total(),
        "kept": len(rows),
        "problems_kept": len({row["problem_id"] for row in rows}),
        "dropped": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "mean_chosen_chars": sum(len(row["chosen"]) for row in rows) / n,
        "mean_rejected_chars": sum(len(row["rejected"]) for row in rows) / n,
        "judge": dict(sorted(counts.items())),
        **pairwise_metrics(counts),
    }
    rows = [
        {"id": f"{row['problem_id']}/{i}", **{k: v for k, v in row.items() if k != "problem_id"}}
        for i, row in enumerate(rows)
    ]
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "accounting.json", accounting)
        if rows:
            write_jsonl(folder / "preference.jsonl", rows)
    if not rows:
        raise ValueError(
            f"no pair of {accounting['sampled']} was kept: {accounting['dropped']}"
            + (f"; the judge's last failure: {error}" if (error := judge.chat.last_error) else "")
        )
    say(f"kept {len(rows)} of {accounting['sampled']} pairs")
    return rows
