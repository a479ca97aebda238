"""pass@1 over k samples with both errors, cons@k, and what the samples look like.

    pass@1 = mean over problems of (correct samples / k)                DeepSeek-R1, section 3
    cons@k = mean over problems of [the most voted answer is correct]   ties count 1 / tied answers

Every sample is stored with its seed, text, extracted answer and verdict, so a score can be
recomputed from the file alone.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.data import write_jsonl
from r1fast.hf_folder import write_json
from r1fast.metrics import progress, warn
from r1fast.policy import Policy
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.rollout_metrics import wait_rate
from r1fast.templates import encode_prompts
from r1fast.types import Problem, RolloutGroup


def sample_groups(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    sampling: SamplingParams,
    num_samples: int,
    *,
    purpose: str,
    title: str = "",
) -> list[RolloutGroup]:
    """This rank's share of `num_samples` completions of each problem, not yet scored.

    Prompts that are too long are reported and left out. With a `title` progress is shown.
    """
    room = min(config.rollout.max_prompt_tokens, policy.model.spec.max_position_embeddings - 1)
    ids, kept, dropped = encode_prompts(problems, policy.tokenizer, config.template, room)
    if dropped:
        warn(f"{len(dropped)} of {len(problems)} prompts are longer than {room} tokens: left out")
    rank, world_size = distributed.rank(), distributed.world_size()
    ids, kept = ids[rank::world_size], kept[rank::world_size]
    engine = Engine.of(policy, config.rollout)
    total = len(ids) * num_samples
    with progress(title, total=total, unit="sample", enabled=bool(title)) as bar:
        groups = engine.generate(
            ids,
            num_samples,
            sampling,
            seeds=[
                [sample_seed(config.seed, purpose, problems[i].id, j) for j in range(num_samples)]
                for i in kept
            ],
            problems=[problems[i] for i in kept],
            on_finish=lambda done: bar.update(n=done - bar.done),
        )
    failed = [c.error for group in groups for c in group.completions if c.finish_reason == "error"]
    if failed:
        warn(f"{len(failed)} of {total} completions failed and are cut off (first: {failed[0]})")
    return groups


def evaluate(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    scorer: RewardScorer,
    *,
    num_samples: int = 0,
    folder: Path | None = None,
    title: str = "",
) -> dict:
    """Sample and score `problems`. Writes eval.json and samples.jsonl into `folder` where given.

    Returns the same on every rank. Raises ValueError where there is nothing to evaluate.
    """
    if not problems:
        raise ValueError("there are no evaluation problems (see data.eval)")
    e = config.eval
    sampling = SamplingParams(
        e.temperature, e.top_p, max_tokens=config.rollout.max_completion_tokens
    )
    num_samples = num_samples or e.num_samples
    groups = sample_groups(
        policy, problems, config, sampling, num_samples, purpose="eval", title=title
    )
    scorer.score(groups)
    rows = distributed.gather_problems(_rows(groups, config), (p.id for p in problems))
    result = summarise(rows, scorer.grader.equivalent)
    result |= {"temperature": e.temperature, "top_p": e.top_p, "seed": config.seed}
    if (sandbox := getattr(scorer, "sandbox", None)) is not None:  # what programs ran in
        result["sandbox"] = sandbox.description
    if folder is not None and distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / "samples.jsonl", rows)
        write_json(folder / "eval.json", result)
    return result


def short_evaluation(
    policy: Policy, problems: list[Problem], config: Config, scorer: RewardScorer
) -> Callable[[], dict]:
    """What a trainer calls every `eval.every_steps` steps: few problems, few samples."""
    e = config.eval
    return lambda: evaluate(
        policy, problems[: e.every_num_problems], config, scorer, num_samples=e.every_num_samples
    )


def _rows(groups: list[RolloutGroup], config: Config) -> list[dict]:
    """One stored row a sample."""
    return [
        {
            "problem_id": group.problem.id,
            "kind": group.problem.kind,
            "subset": group.problem.subset,
            "prompt": group.problem.prompt,
            "answer": group.problem.answer,
            "sample": j,
            "seed": sample_seed(config.seed, "eval", group.problem.id, j),
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "extracted": reward.answer,
            "verdict": reward.verdict,
            "format": reward.parts.get("format"),
            "language_share": reward.parts.get("language"),
        }
        for group in groups
        for j, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
    ]


def summarise(rows: list[dict], same_answer: Callable[[str, str], bool]) -> dict:
    """The numbers of eval.json from stored samples."""
    by_problem: dict[str, list[dict]] = {}
    for row in rows:
        by_problem.setdefault(row["problem_id"], []).append(row)
    verified = {p: s for p, s in by_problem.items() if s[0]["verdict"] is not None}
    shares = [sum(r["verdict"] == "correct" for r in s) / len(s) for s in verified.values()]
    n, k = len(shares), max((len(s) for s in by_problem.values()), default=0)
    result: dict = {"num_problems": len(by_problem), "k": k, "num_samples": len(rows)}
    if n:
        mean = sum(shares) / n
        spread = sum((s - mean) ** 2 for s in shares) / max(n - 1, 1)
        within = sum(s * (1 - s) / max(k - 1, 1) for s in shares) / n
        result["pass@1"] = mean
        result["pass@1_stderr"] = math.sqrt(spread / n)  # over the choice of problems
        result["pass@1_run_stderr"] = math.sqrt(within / n)  # over a repeated run
        result["cons@k"] = sum(vote(s, same_answer) for s in verified.values()) / n
        result["verdicts"] = dict(Counter(r["verdict"] for s in verified.values() for r in s))
    result |= {
        "format_rate": _mean([r["format"] for r in rows]),
        "language_share": _mean([r["language_share"] for r in rows]),
        "wait_rate": wait_rate([r["text"] for r in rows]),
        "mean_length": _mean([r["num_tokens"] for r in rows]),
        "clip_rate": _mean([float(r["finish_reason"] == "length") for r in rows]),
    }
    subsets = sorted({r["subset"] for r in rows if r["subset"]})
    if subsets and n:
        result["subsets"] = {
            name: _mean([r["verdict"] == "correct" for r in rows if r["subset"] == name])
            for name in subsets
        }
    return result


def vote(samples: list[dict], same_answer: Callable[[str, str], bool]) -> float:
    """Share of the most voted answer classes that is correct; samples without answer do not vote."""
    classes: list[list[dict]] = []
    for row in samples:
        if row["extracted"] is None:
            continue
        # programs are the same where their text is: what they do is not compared
        same = operator.eq if row.get("kind") == "code" else same_answer
        home = next((c for c in classes if same(c[0]["extracted"], row["extracted"])), None)
        if home is None:
            classes.append([row])
        else:
            home.append(row)
    if not classes:
        return 0.0
    most = max(len(c) for c in classes)
    tied = [c for c in classes if len(c) == most]
    return sum(any(r["verdict"] == "correct" for r in c) for c in tied) / len(tied)


def _mean(values: list) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None
