"""Rejection sampling (DeepSeek-R1, section 2.3.3): sample, keep what is right and readable, count.

Several completions of each problem; the rules decide, a judge where the rules cannot read the
answer; then the filters: mixed language, long paragraphs, code blocks, duplicates. Every completion
that is dropped is counted under its reason.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.evaluate import sample_groups
from r1fast.examples import Example, has_completions, load_examples
from r1fast.hf_folder import write_json
from r1fast.jsonl import write_jsonl
from r1fast.judge_engine import rejection_chat
from r1fast.metrics import say, warn
from r1fast.policy import Policy
from r1fast.protocol import (
    Parts,
    join_completion,
    protocol_hint,
    split_completion,
    whole_completion,
)
from r1fast.rewards import filters
from r1fast.rewards.judge import Judge
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.sampler import SamplingParams
from r1fast.templates import opened_protocols, prompt_opens_think
from r1fast.types import Completion, Problem, Reward, RolloutGroup
from r1fast.watchdog import watched


def rejection_sample(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    scorer: RewardScorer,
    folder: Path,
    *,
    title: str = "rejection",
) -> list[Example]:
    """The kept completions as examples; writes sampled.jsonl and accounting.json into `folder`."""
    s = config.sample
    if s.num_problems:
        problems = problems[: s.num_problems]
    sampling = SamplingParams(
        s.temperature, s.top_p, max_tokens=config.rollout.max_completion_tokens
    )
    with watched(folder, title, config.log):
        groups = sample_groups(
            policy, problems, config, sampling, s.num_samples, purpose="rejection", title=title
        )
        scorer.score(groups)
    chat = rejection_chat(config)
    judge = Judge(chat) if chat is not None else None
    if judge is not None:
        _ask_judge(judge, groups)
    opens = scorer.prompt_opens_think
    unknown = getattr(policy.tokenizer, "unk_token_id", None)
    if unknown in policy.eos_ids:  # Qwen2 has one token for both
        unknown = None
    kept, dropped = [], Counter()
    duplicates = filters.Duplicates()
    for group in groups:
        num_kept = 0
        for completion, reward in zip(group.completions, group.rewards, strict=True):
            fault = _fault(group, completion, reward, config, opens, unknown, duplicates)
            if not fault and s.max_kept and num_kept >= s.max_kept:
                fault = "enough kept"
            if fault:
                dropped[reason(fault)] += 1
                continue
            num_kept += 1
            text = completion.text
            if opens:  # the prompt ended in the opening tag; another model's may not
                text = whole_completion(
                    text, config.template.protocol, config.template.special_token
                )
            kept.append(_example(group.problem, text, num_kept))
    sampled = sum(len(g.completions) for g in groups)
    rows = distributed.gather_problems([asdict(e) for e in kept], (p.id for p in problems))
    examples = [Example(**row) for row in rows]
    parts = distributed.gather_objects([dict(dropped), sampled])
    accounting = {
        "problems": len(problems),
        "sampled": sum(part[1] for part in parts),
        "kept": len(examples),
        "problems_kept": len({e.problem_id for e in examples}),
        "dropped": most_common(sum((Counter(part[0]) for part in parts), Counter())),
    }
    if judge is not None:
        calls = Counter()
        for part in distributed.gather_objects(dict(judge.counts)):
            calls.update(part)
        accounting["judge"] = dict(calls)
    if distributed.is_main():
        write_examples(folder / "sampled.jsonl", examples)
        write_json(folder / "accounting.json", accounting)
    t = config.template
    texts = [c.text for group in groups for c in group.completions]
    hint = protocol_hint(texts, t.protocol, t.special_token, opened_protocols(t, policy.tokenizer))
    if not examples:
        advice = f"The reason may be that {hint}" if hint else "Train longer, sample more or loosen [sample]"  # fmt: skip
        raise ValueError(
            f"rejection sampling kept none of {accounting['sampled']} completions: "
            f"{accounting['dropped']}. {advice}."
        )
    if hint and distributed.is_main():
        warn(hint)
    say(f"kept {len(examples)} of {accounting['sampled']} completions")
    return examples


def _ask_judge(judge: Judge, groups: list[RolloutGroup]) -> None:
    """The judge's verdicts, many at a time, on answers that the rules cannot read."""
    unread = [
        (group.problem, reward)
        for group in groups
        for completion, reward in zip(group.completions, group.rewards, strict=True)
        if completion.finish_reason != "length"
        and reward.verdict == "unparseable"
        and reward.answer
        and group.problem.answer
    ]
    verdicts = judge.judge_all([(p.prompt, p.answer or "", r.answer or "") for p, r in unread])
    for (_, reward), verdict in zip(unread, verdicts, strict=True):
        reward.verdict = verdict


def readability_fault(
    parts: Parts, language: str, min_language_share: float, config: Config, kind: str = "math"
) -> str | None:
    """Why nobody would want to read this reasoning, or None: the filters of `[sample]`.

    Code in the reasoning about a programming problem is no fault.
    """
    s = config.sample
    return (
        filters.language_mix(parts, language, min_language_share, lexicon=config.rewards.lexicon)
        or filters.long_paragraph(parts, s.max_paragraph_words)
        or (filters.code_block(parts) if s.drop_code_blocks and kind != "code" else None)
    )


def _fault(
    group: RolloutGroup,
    completion: Completion,
    reward: Reward,
    config: Config,
    opens: bool,
    unknown: int | None,
    duplicates: filters.Duplicates,
) -> str:
    """Why a completion is not kept; empty where it is."""
    s, template, problem = config.sample, config.template, group.problem
    if completion.finish_reason == "length":
        return "cut off"
    if reward.verdict != "correct":
        return reward.verdict or "not verifiable"
    if unknown in completion.token_ids:  # its text could not be learned as it was sampled
        return "unknown token"
    parts = split_completion(
        completion.text, template.protocol, template.special_token, prompt_opens_think=opens
    )
    return (
        (filters.malformed(parts) if s.require_format else None)
        or readability_fault(parts, problem.language, s.min_language_share, config, problem.kind)
        or (duplicates(problem.id, completion.text) if s.drop_duplicates else None)
        or ""
    )


def reason(fault: str) -> str:
    """The kind of a fault, without its details: what is counted."""
    return fault.partition(":")[0]


def most_common(counts: Counter) -> dict[str, int]:
    """The counts, largest first and equal ones by name, whatever order they were made in."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _example(problem: Problem, text: str, number: int) -> Example:
    return Example(
        problem.prompt,
        text,
        id=f"{problem.id}/{number}",
        problem_id=problem.id,
        kind=problem.kind,
        language=problem.language,
        meta={"answer": problem.answer},
    )


def write_examples(path: Path, examples: list[Example]) -> None:
    """Examples as JSONL that `load_examples` reads back."""
    rows = []
    for example in examples:
        row = asdict(example)
        row |= row.pop("meta")
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)


def general_examples(
    path: str | Path, config: Config, policy: Policy | None = None
) -> list[Example]:
    """Non-reasoning data in the completion pattern of `config.template`.

    A completion that already follows the pattern is kept. A short query gets an empty CoT (the
    paper's "hello"); for the others a CoT is asked of `policy` where `sample.general_cot` is on.
    A file of prompts alone gives none and says so: those are for RL.
    """
    template, s = config.template, config.sample
    if not has_completions(path):
        say(f"{path} has prompts only: no general examples for SFT, they serve RL stage 2")
        return []
    examples = load_examples(path, kind="general", language=config.data.language)
    plain = [
        not split_completion(e.completion, template.protocol, template.special_token).well_formed
        for e in examples
    ]
    thoughts = [""] * len(examples)
    wanted = [
        i
        for i, e in enumerate(examples)
        if plain[i] and len(e.prompt.split()) > s.simple_query_words
    ]
    if s.general_cot and wanted:
        if policy is None:
            raise ValueError("sample.general_cot needs a model to ask for the chains of thought")
        asked = ask_reasoning(policy, [examples[i] for i in wanted], config)
        for i, thought in zip(wanted, asked, strict=True):
            thoughts[i] = thought
    return [
        Example(
            e.prompt,
            join_completion(thought, e.completion, template.protocol, template.special_token)
            if is_plain
            else e.completion,
            id=e.id,
            kind="general",
            language=e.language,
            meta=e.meta,
        )
        for e, is_plain, thought in zip(examples, plain, thoughts, strict=True)
    ]


COT_REQUEST = (
    "{prompt}\n\nA good answer is:\n{answer}\n\n"
    "Write the reasoning that leads from the question to this answer, and nothing else."
)


def _cot_request(prompt: str, answer: str) -> str:
    """Both put in at once: a prompt may itself hold "{answer}"."""
    values = {"{prompt}": prompt, "{answer}": answer}
    return re.sub(r"\{(?:prompt|answer)\}", lambda match: values[match[0]], COT_REQUEST)


def ask_reasoning(policy: Policy, examples: list[Example], config: Config) -> list[str]:
    """One chain of thought for each (prompt, answer), asked of a model; "" where it gave none."""
    requests = [
        Problem(
            _cot_request(e.prompt, e.completion),
            kind="general",
            id=f"cot-{i}",
        )
        for i, e in enumerate(examples)
    ]
    s = config.sample
    sampling = SamplingParams(
        s.temperature, s.top_p, max_tokens=config.rollout.max_completion_tokens
    )
    groups = sample_groups(policy, requests, config, sampling, 1, purpose="general_cot")
    texts = {
        g.problem.id: g.completions[0].text
        for g in groups
        if g.completions[0].finish_reason == "stop"
    }
    merged: dict[str, str] = {}
    for part in distributed.gather_objects(texts):
        merged |= part
    template = config.template
    opens = prompt_opens_think(template, policy.tokenizer)
    marks = ("<think>", "</think>", "<answer>", "</answer>", template.special_token)
    thoughts = []
    for request in requests:
        text = merged.get(request.id, "")
        parts = split_completion(
            text, template.protocol, template.special_token, prompt_opens_think=opens
        )
        if parts.well_formed:  # a model of the recipe thinks before it writes: take what it wrote
            text = parts.summary or ""
        thoughts.append("" if any(mark in text for mark in marks) else text.strip())
    return thoughts


def mix(reasoning: list[Example], general: list[Example], seed: int) -> list[Example]:
    """Both kinds, shuffled by the seed."""
    examples = [*reasoning, *general]
    random.Random(f"{seed}/mix").shuffle(examples)
    return examples
