"""Cold-start collection (DeepSeek-R1, section 2.3.1): a few hundred readable long chains of thought.

Three ways, each ending in a summary: `r1_zero` cleans samples of an R1-Zero model, `few_shot` shows
a model long CoT examples, `reflection` asks it to reflect and verify. What is collected is written
as JSONL that a person can edit and that is read back: kept, edited and rejected rows are counted.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.evaluate import sample_groups
from r1fast.examples import Example, load_examples
from r1fast.hf_folder import read_json, write_json
from r1fast.metrics import say
from r1fast.policy import Policy
from r1fast.protocol import join_completion, split_completion
from r1fast.rejection import most_common, readability_fault, reason, write_examples
from r1fast.rewards.language import language_consistency
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.sampler import SamplingParams
from r1fast.types import Problem, RolloutGroup

READ_BACK = ("kept_by_hand", "edited", "rejected", "added")  # counted from a person's edit
SEPARATOR = "\n\n###\n\n"  # between few-shot examples


def collect(
    policies: dict[str, Policy],  # method -> the model it asks
    problems: list[Problem],
    configs: dict[str, Config],  # method -> how its prompts are put and its answers read
    scorer_of: dict[str, RewardScorer],
    config: Config,  # of the cold-start stage: the pattern that is written
    folder: Path,
) -> list[Example]:
    """Examples in the cold-start pattern. Writes collected.jsonl, cold_start.jsonl, accounting.json.

    `collected.jsonl` stays as it is; `cold_start.jsonl` is the copy to edit (an edited one is kept).
    """
    c = config.cold_start
    problems = problems[: c.num_problems] if c.num_problems else problems
    examples, accounting = [], {"sampled": 0, "kept": 0, "dropped": Counter(), "methods": {}}
    for method in c.methods:
        groups = _sample(method, policies[method], problems, configs[method], config)
        scorer_of[method].score(groups)
        kept, dropped = clean(
            groups,
            configs[method],
            config,
            method,
            prompt_opens_think=scorer_of[method].prompt_opens_think,
        )
        sampled = sum(len(g.completions) for g in groups)
        rows = distributed.gather_problems([asdict(e) for e in kept], (p.id for p in problems))
        examples += [Example(**row) for row in rows]
        accounting["methods"][method] = len(rows)
        for part, number in distributed.gather_objects([dict(dropped), sampled]):
            accounting["dropped"].update(part)
            accounting["sampled"] += number
    if c.max_kept and len(examples) > c.max_kept:
        accounting["dropped"]["enough kept"] += len(examples) - c.max_kept
        examples = examples[: c.max_kept]
    accounting["kept"] = len(examples)
    accounting["dropped"] = most_common(accounting["dropped"])
    if distributed.is_main():
        write_examples(folder / "collected.jsonl", examples)
        if examples and not (folder / "cold_start.jsonl").exists():
            write_examples(folder / "cold_start.jsonl", examples)
        write_json(folder / "accounting.json", accounting)
    distributed.barrier()
    if not examples:
        raise ValueError(
            f"cold start kept none of {accounting['sampled']} samples: {accounting['dropped']}. "
            "Train R1-Zero longer, sample more or loosen cold_start.min_language_share."
        )
    say(f"cold start: kept {len(examples)} of {accounting['sampled']} samples")
    return examples


def _sample(
    method: str, policy: Policy, problems: list[Problem], asked: Config, config: Config
) -> list[RolloutGroup]:
    """This rank's completions, with the method's own wording around each problem."""
    c = config.cold_start
    if method == "few_shot":
        if not c.few_shot_file:
            raise ValueError(
                "cold_start.methods has few_shot, but cold_start.few_shot_file is empty"
            )
        shots = load_examples(c.few_shot_file)[: c.num_few_shot]
        shown = "".join(f"{e.prompt}\n{e.completion}{SEPARATOR}" for e in shots)
        worded = [replace(p, prompt=f"{shown}{p.prompt}\n") for p in problems]
    elif method == "reflection":
        worded = [
            replace(p, prompt=c.reflection_prompt.replace("{prompt}", p.prompt)) for p in problems
        ]
    else:
        worded = problems
    sampling = SamplingParams(
        asked.rollout.temperature,
        asked.rollout.top_p,
        max_tokens=asked.rollout.max_completion_tokens,
    )
    groups = sample_groups(
        policy,
        worded,
        asked,
        sampling,
        c.num_samples,
        purpose=f"cold_start/{method}",
        title=f"cold start: {method}",
    )
    original = {p.id: p for p in problems}
    for group in groups:
        group.problem = original[group.problem.id]  # the wording is not learned, the problem is
        if method == "few_shot":
            for completion in group.completions:
                completion.text = completion.text.split(SEPARATOR.strip())[0].strip()
    return groups


def clean(
    groups: list[RolloutGroup],
    asked: Config,
    config: Config,
    method: str,
    *,
    prompt_opens_think: bool = False,
) -> tuple[list[Example], Counter]:
    """Correct, well-formed, readable samples, rewritten in the pattern of `config.template`.

    At most one a problem: the one with the most target language, then the longest.
    """
    c, template = config.cold_start, config.template
    kept, dropped = [], Counter()
    for group in groups:
        candidates = []
        for completion, reward in zip(group.completions, group.rewards, strict=True):
            parts = split_completion(
                completion.text,
                asked.template.protocol,
                asked.template.special_token,
                prompt_opens_think=prompt_opens_think,
            )
            thought, language = parts.reasoning or "", group.problem.language
            if reward.verdict != "correct":
                dropped[reward.verdict or "not verifiable"] += 1
            elif not parts.well_formed or template.special_token in completion.text:
                dropped["format"] += 1  # the pattern's own token could not be read back
            elif not thought:
                dropped["no reasoning"] += 1
            elif fault := readability_fault(
                parts, language, c.min_language_share, config, group.problem.kind
            ):
                dropped[reason(fault)] += 1
            else:
                share = language_consistency(thought, language, lexicon=config.rewards.lexicon)
                candidates.append((share, len(thought), thought, reward.answer))
        if not candidates:
            continue
        if len(candidates) > 1:
            dropped["another was better"] += len(candidates) - 1
        share, _, thought, answer = max(candidates, key=lambda x: (x[0], x[1]))
        summary = c.summary.replace("{answer}", answer or group.problem.answer or "")
        kept.append(
            Example(
                group.problem.prompt,
                join_completion(thought, summary, template.protocol, template.special_token),
                id=f"{group.problem.id}/{method}",
                problem_id=group.problem.id,
                language=group.problem.language,
                meta={"answer": group.problem.answer, "method": method},
            )
        )
    return kept, dropped


def was_edited(folder: Path, config: Config) -> bool:
    """Whether the file to edit holds other examples than those that were trained on."""
    if not (folder / "trained.jsonl").exists():
        return False
    edited = Path(config.cold_start.edited_file or folder / "cold_start.jsonl")
    try:
        now = load_examples(edited)
    except ValueError:  # half edited; training says what is wrong with it
        return True
    then = load_examples(folder / "trained.jsonl")
    return [(e.prompt, e.completion) for e in now] != [(e.prompt, e.completion) for e in then]


def reuse(earlier: Path, folder: Path) -> None:
    """Begin `folder` with the collection of an earlier run and its edit, so nothing is sampled."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("collected.jsonl", "cold_start.jsonl"):
        if (earlier / name).exists():
            shutil.copy2(earlier / name, folder / name)
    accounting = read_json(earlier / "accounting.json")
    write_json(
        folder / "accounting.json", {k: v for k, v in accounting.items() if k not in READ_BACK}
    )
    say(
        "cold start: the earlier collection is used again, nothing is sampled; to sample anew, "
        f"remove {folder} first"
    )


def read_back(collected: Path, edited: Path) -> tuple[list[Example], dict[str, int]]:
    """The examples after a person's edit: (kept ones, {"kept", "edited", "rejected", "added"}).

    A row is rejected by deleting it or by "keep": false. Raises ValueError with file and line.
    """
    before = {e.id: e for e in load_examples(collected)}
    after = load_examples(edited, only_kept=False)
    kept = [e for e in after if e.keep]
    changed = [
        e
        for e in kept
        if e.id in before
        and (e.prompt, e.completion) != (before[e.id].prompt, before[e.id].completion)
    ]
    added = [e for e in kept if e.id not in before]
    survivors = {e.id for e in kept} & before.keys()
    counts = {
        "kept_by_hand": len(survivors) - len(changed),
        "edited": len(changed),
        "rejected": len(before) - len(survivors),
        "added": len(added),
    }
    if not kept:
        raise ValueError(f"{edited} keeps no example: every row is rejected")
    return kept, counts
