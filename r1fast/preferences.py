"""The reward-model stage: helpfulness from pairs, safety from labels; and general prompts scored."""

from __future__ import annotations

import random
from pathlib import Path

from r1fast import distributed, running_sum
from r1fast.assemble import preference_rewards
from r1fast.config import Config
from r1fast.evaluate import sample_groups
from r1fast.hf_folder import write_json
from r1fast.metrics import say
from r1fast.model import load_tokenizer
from r1fast.policy import Policy, pick_device
from r1fast.reward_model import load_labelled, load_pairs, load_reward_model
from r1fast.reward_training import RewardPolicy, RewardTrainer
from r1fast.rollout.sampler import SamplingParams
from r1fast.templates import prompt_opens_think, render_prompt
from r1fast.types import Problem

EVAL_SHARE = 0.1  # of the rows, held out


def train_reward_models(config: Config, base: str, folder: Path, *, force: bool = False) -> None:
    """Train what has data and no checkpoint of its own; writes helpfulness/, safety/, accounting.json.

    The helpfulness model sees prompt and summary, the safety model prompt and whole response
    (arXiv 2501.12948, section 2.3.4). A run that was stopped goes on from its checkpoint.
    """
    d, w, s = config.data, config.rewards, config.sft
    pairs_file, labels_file = d.preference, d.safety
    if d.task == "running_sum" and not (pairs_file or labels_file):
        pairs_file, labels_file = (str(folder / n) for n in ("preference.jsonl", "safety.jsonl"))
        if distributed.is_main():
            running_sum.write_preferences(Path(pairs_file), Path(labels_file), config)
        distributed.barrier()
    tokenizer = load_tokenizer(base)

    def render(prompt: str) -> str:
        return render_prompt(prompt, config.template, tokenizer)

    jobs = {}
    options = {"render": render, "max_tokens": s.max_seq_tokens}
    if pairs_file and not w.helpfulness_model:
        jobs["helpfulness"] = ("pairwise", load_pairs(pairs_file, tokenizer, **options))
    if labels_file and not w.safety_model:
        jobs["safety"] = ("pointwise", load_labelled(labels_file, tokenizer, **options))
    accounting = {}
    for name, (objective, rows) in jobs.items():
        if len(rows) < 2:
            raise ValueError(
                f"the {name} model needs at least 2 rows, one to train on and one to hold out; "
                f"{pairs_file if name == 'helpfulness' else labels_file} has {len(rows)}"
            )
        random.Random(f"{config.seed}/{name}").shuffle(rows)  # files are often sorted
        num_eval = max(1, round(len(rows) * EVAL_SHARE))
        model = load_reward_model(
            base, dtype=config.model.dtype, device=pick_device(config.model.device)
        )
        trainer = RewardTrainer(
            RewardPolicy(model, tokenizer, base),
            config,
            folder / f"{name}_training",
            rows[num_eval:],
            objective=objective,
            eval_data=rows[:num_eval],
            stage=f"{name} model",
            out=folder / name,
            force=force,
        )
        trainer.run()
        values = trainer.evaluation or trainer.evaluate()
        accounting[name] = {"rows": len(rows), "held_out_accuracy": values["accuracy"]}
        say(f"{name} model: held-out accuracy {values['accuracy']:.3f}")
    if not jobs and not (w.helpfulness_model or w.safety_model):
        say("no preference data and no reward models: RL stage 2 uses rule rewards only")
    if distributed.is_main():
        write_json(folder / "accounting.json", accounting)
    distributed.barrier()


def score_general(
    policy: Policy, problems: list[Problem], config: Config, reward_models: Path, num_samples: int
) -> dict[str, float]:
    """Mean preference scores of a policy on general prompts."""
    preference = preference_rewards(config, reward_models)
    sampling = SamplingParams(
        config.eval.temperature,
        config.eval.top_p,
        max_tokens=config.rollout.max_completion_tokens,
    )
    groups = sample_groups(policy, problems, config, sampling, num_samples, purpose="general")
    prompts = [g.problem.prompt for g in groups for _ in g.completions]
    texts = [c.text for g in groups for c in g.completions]
    opens = prompt_opens_think(config.template, policy.tokenizer)
    sums: dict[str, float] = {}
    for name, scores in (
        ("helpfulness", preference.score_helpfulness(prompts, texts, prompt_opens_think=opens)),
        ("safety", preference.score_safety(prompts, texts)),
    ):
        known = [s for s in scores or [] if s is not None]
        sums[name], sums[f"{name}/count"] = sum(known), float(len(known))
    total = distributed.sum_dict(sums)
    return {
        name: total[name] / total[f"{name}/count"]
        for name in ("helpfulness", "safety")
        if total[f"{name}/count"]
    }
