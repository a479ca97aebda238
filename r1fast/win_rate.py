"""Win rate of a policy against reference answers, by a pairwise judge asked in both orders.

    win rate = mean over problems of the mean over k samples of (1 won, 1/2 tie, 0 lost)

The judge sees what a user reads, the summary; a response without one has lost. What the judge failed on
is an error: counted, and in no mean.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.data import write_jsonl
from r1fast.evaluate import sample_groups
from r1fast.hf_folder import write_json
from r1fast.policy import Policy
from r1fast.protocol import split_completion
from r1fast.rewards.pairwise import PairwiseJudge, pairwise_metrics
from r1fast.rollout.sampler import SamplingParams
from r1fast.templates import prompt_opens_think
from r1fast.types import Problem


def win_rate(
    policy: Policy,
    problems: list[Problem],  # those with an answer, the reference, are compared
    config: Config,
    judge: PairwiseJudge,
    *,
    folder: Path | None = None,
) -> dict:
    """Sample `eval.num_samples` responses and compare each with its problem's reference.

    Writes comparisons.jsonl and win_rate.json into `folder`. Raises ValueError where no problem has a
    reference, RuntimeError where the judge failed on more than half of the comparisons, or on all it was
    asked about.
    """
    asked = [problem for problem in problems if problem.answer]
    if not asked:
        raise ValueError(
            f"none of {len(problems)} prompts has a reference to compare with ('answer' or "
            "'completion')"
        )
    e, t = config.eval, config.template
    sampling = SamplingParams(
        e.temperature, e.top_p, max_tokens=config.rollout.max_completion_tokens
    )
    groups = sample_groups(
        policy, asked, config, sampling, e.num_samples, purpose="win_rate", title="win rate"
    )
    opens = prompt_opens_think(t, policy.tokenizer)
    rows = [
        {
            "problem_id": group.problem.id,
            "prompt": group.problem.prompt,
            "reference": group.problem.answer,
            "sample": j,
            "response": split_completion(
                completion.text, t.protocol, t.special_token, prompt_opens_think=opens
            ).summary
            or "",
        }
        for group in groups
        for j, completion in enumerate(group.completions)
    ]
    found = judge.compare([(r["prompt"], r["response"], r["reference"]) for r in rows])
    for row, comparison in zip(rows, found, strict=True):
        row["winner"] = {"a": "response", "b": "reference"}.get(
            comparison.winner, comparison.winner
        )
        row["grades"] = [comparison.shown_first, comparison.shown_second]
        row["score"] = comparison.score
    rows = distributed.gather_problems(rows, (problem.id for problem in asked))
    counts: Counter[str] = Counter()
    for part in distributed.gather_objects(dict(judge.counts + judge.chat.counts)):
        counts.update(part)
    errors = distributed.gather_objects(judge.chat.last_error)
    result = summarise(rows) | pairwise_metrics(counts) | {"judge": dict(sorted(counts.items()))}
    judged = counts["first"] + counts["second"] + counts["neither"]
    if result["errors"] > (0.5 * len(rows) if judged else 0):
        raise RuntimeError(
            f"the judge failed on {result['errors']} of {len(rows)} comparisons; the last failure: "
            f"{next(filter(None, errors), '')}"
        )
    if folder is not None and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "comparisons.jsonl", rows)
        write_json(folder / "win_rate.json", result)
    return result


def summarise(rows: list[dict]) -> dict:
    """The numbers of win_rate.json from stored comparisons."""
    by_problem: dict[str, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            by_problem.setdefault(row["problem_id"], []).append(row["score"])
    winners = Counter(row["winner"] for row in rows)
    result = {
        "num_problems": len({row["problem_id"] for row in rows}),
        "num_samples": len(rows),
        "won": winners["response"],
        "tied": winners["tie"],
        "lost": winners["reference"],
        "errors": winners["error"],
        "mean_chars": sum(len(row["response"]) for row in rows) / len(rows),
        "mean_reference_chars": sum(len(row["reference"]) for row in rows) / len(rows),
    }
    if by_problem:
        shares = [math.fsum(scores) / len(scores) for scores in by_problem.values()]
        mean, n = math.fsum(shares) / len(shares), len(shares)
        spread = math.fsum((share - mean) ** 2 for share in shares) / max(n - 1, 1)
        result |= {"win_rate": mean, "win_rate_stderr": math.sqrt(spread / n)}
    return result
