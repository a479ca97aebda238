"""Ranges and combinations of a config's values: what is refused before anything is loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1fast.types import KINDS

if TYPE_CHECKING:
    from r1fast.config import Config

STAGES = (
    "base", "small_base", "r1_zero", "cold_start", "rl_1", "rejection", "sft", "reward_models",
    "rl_2", "distill", "small_rl",
)  # fmt: skip

PREFERENCE_REWARDS = (
    "helpfulness",
    "safety",
    "judge",
)  # unless by_kind says so, of general prompts
REWARDS = ("accuracy", "format", "language", "overlong", "repetition", *PREFERENCE_REWARDS)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def steps_of(text: str) -> list[range]:
    """The steps, counted from 1, that log.record names: "all", "12" or "12,20-30"."""
    if text == "all":
        return [range(1, sys.maxsize)]
    ranges = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(
                f"log.record must be empty, all, or steps from 1 on such as 12,20-30, got {text!r}"
            )
        ranges.append(range(first, last + 1))
    return ranges


def check(c: Config) -> None:
    """Ranges and combinations. Every message names the key, the value and what would do."""

    def need(ok: bool, key: str, value: Any, rule: str) -> None:
        if not ok:
            raise ValueError(f"{key} must be {rule}, got {value!r}")

    r, g, o, s, e = c.rollout, c.grpo, c.optim, c.sft, c.eval
    need(r.num_generations >= 1, "rollout.num_generations", r.num_generations, "at least 1")
    for name in (
        "max_prompt_tokens", "max_completion_tokens", "max_batch_size", "block_size",
        "prefill_tokens",
    ):  # fmt: skip
        need(getattr(r, name) >= 1, f"rollout.{name}", getattr(r, name), "at least 1")
    need(r.block_size % 16 == 0, "rollout.block_size", r.block_size, "a multiple of 16")
    need(0 <= r.min_p <= 1, "rollout.min_p", r.min_p, "in [0, 1] (0 is off)")
    need(r.cache_gib >= 0, "rollout.cache_gib", r.cache_gib, "at least 0 (0 is found)")
    drafts = r.num_draft_tokens
    need(drafts >= 0, "rollout.num_draft_tokens", drafts, "at least 0 (0 is off)")
    for key, value in (
        ("rollout.temperature", r.temperature),
        ("sample.temperature", c.sample.temperature),
    ):
        need(value > 0, key, value, "above 0 (greedy decoding has no log-probability to train on)")
    need(e.temperature >= 0, "eval.temperature", e.temperature, "at least 0 (0 is greedy)")
    for key, value in (
        ("rollout.top_p", r.top_p),
        ("eval.top_p", e.top_p),
        ("sample.top_p", c.sample.top_p),
    ):
        need(0 < value <= 1, key, value, "in (0, 1]")
    need(r.top_k >= 0, "rollout.top_k", r.top_k, "at least 0 (0 is off)")
    for name in ("prompts_per_step", "num_mini_batches", "num_iterations", "max_rollout_factor"):
        need(getattr(g, name) >= 1, f"grpo.{name}", getattr(g, name), "at least 1")
    for key, budget in (
        ("grpo.token_budget", g.token_budget),
        ("sft.token_budget", s.token_budget),
    ):
        need(budget == "auto" or budget >= 1, key, budget, "at least 1")
    for name in ("num_steps", "clip_eps_low", "clip_eps_high", "kl_coef", "ref_refresh_steps",
                 "max_logprob_mismatch"):  # fmt: skip
        need(getattr(g, name) >= 0, f"grpo.{name}", getattr(g, name), "at least 0")
    need(g.rollout_clip_max > 0, "grpo.rollout_clip_max", g.rollout_clip_max, "above 0")
    need(0 <= g.rollout_clip_min <= g.rollout_clip_max, "grpo.rollout_clip_min", g.rollout_clip_min,
         f"in [0, grpo.rollout_clip_max = {g.rollout_clip_max:g}]")  # fmt: skip
    need(g.std_eps >= 0, "grpo.std_eps", g.std_eps, "at least 0")
    most = g.prompts_per_step * (1 if g.whole_groups else r.num_generations)
    of = "prompts_per_step" + (" (whole_groups)" if g.whole_groups else " x num_generations")
    need(g.num_mini_batches <= most, "grpo.num_mini_batches", g.num_mini_batches,
         f"at most {of} = {most}")  # fmt: skip
    need(o.lr > 0, "optim.lr", o.lr, "above 0")
    need(0 <= o.min_lr_ratio <= 1, "optim.min_lr_ratio", o.min_lr_ratio, "in [0, 1]")
    for name in ("warmup_steps", "weight_decay", "eps"):
        need(getattr(o, name) >= 0, f"optim.{name}", getattr(o, name), "at least 0")
    need(o.max_grad_norm >= 0, "optim.max_grad_norm", o.max_grad_norm, "at least 0 (0 is off)")
    for name in ("beta1", "beta2"):
        need(0 <= getattr(o, name) < 1, f"optim.{name}", getattr(o, name), "in [0, 1)")
    need(s.max_steps >= 0, "sft.max_steps", s.max_steps, "at least 0 (0 is by epochs)")
    need(s.epochs > 0 or s.max_steps > 0, "sft.epochs", s.epochs, "above 0 where max_steps is 0")
    for name in ("batch_size", "max_seq_tokens"):
        need(getattr(s, name) >= 1, f"sft.{name}", getattr(s, name), "at least 1")
    for name in ("num_samples", "every_num_problems", "every_num_samples"):
        need(getattr(e, name) >= 1, f"eval.{name}", getattr(e, name), "at least 1")
    _check_vllm(c, need)
    stealing = r.work_stealing
    need(not stealing or r.engine == "embedded", "rollout.work_stealing", stealing,
         "false with rollout.engine = vllm, where every rank's samples are spread over all servers")  # fmt: skip
    need(not stealing or g.dynamic_sampling == "off", "rollout.work_stealing", stealing,
         "false with grpo.dynamic_sampling, which gives groups to ranks with free slots by itself")  # fmt: skip
    _check_overlap(c, need)
    _check_parallel(c, need)
    steps_of(c.log.record)
    out = c.output_dir
    need(out.strip() and "\0" not in out, "output_dir", out, "a folder (. is the one you are in)")
    keep = c.checkpoint.keep_last
    need(keep >= 1, "checkpoint.keep_last", keep, "at least 1")
    seconds = c.checkpoint.deadline_seconds
    need(seconds > 0, "checkpoint.deadline_seconds", seconds, "above 0 seconds")
    seconds = c.log.watchdog_seconds
    need(seconds >= 0, "log.watchdog_seconds", seconds, "at least 0 (0 is off)")
    need(seconds > 0 or not c.log.watchdog_abort, "log.watchdog_abort", True,
         "false where log.watchdog_seconds is 0")  # fmt: skip
    best = c.checkpoint.keep_best
    need(not re.fullmatch(r"(.*/)?loss", best), "checkpoint.keep_best", best,
         f"-{best}, as less of it is better")  # fmt: skip
    for key in (
        "data.max_train_problems", "data.max_eval_problems", "eval.num_problems",
        "eval.every_steps", "sample.num_problems", "sample.max_kept",
        "sample.max_paragraph_words", "sample.simple_query_words", "cold_start.num_problems",
        "cold_start.max_kept", "cold_start.num_few_shot", "checkpoint.every_steps",
        "log.num_samples", "log.profile_steps", "rewards.overlong_cache", "rewards.preference_last_steps",
    ):  # fmt: skip
        section, _, name = key.partition(".")
        value = getattr(getattr(c, section), name)
        need(value >= 0, key, value, "at least 0")
    need(c.lora.rank >= 0, "lora.rank", c.lora.rank, "at least 0 (0 trains all weights)")
    need(c.lora.alpha > 0, "lora.alpha", c.lora.alpha, "above 0")
    lora_targets(c.lora.targets)
    for name in ("ref_device", "ref_dtype"):
        value = getattr(g, name)
        need(not c.lora.rank or value == "same", f"grpo.{name}", value,
             "same with lora.rank, as the reference is the policy's own base")  # fmt: skip
    a, w = c.cold_start, c.rewards
    for section, of in (("sample", c.sample), ("cold_start", a)):
        need(of.num_samples >= 1, f"{section}.num_samples", of.num_samples, "at least 1")
        share = of.min_language_share
        need(0 <= share <= 1, f"{section}.min_language_share", share, "in [0, 1]")
    need(c.sample.judge_timeout > 0, "sample.judge_timeout", c.sample.judge_timeout, "above 0")
    for name in REWARDS:
        need(getattr(w, name) >= 0, f"rewards.{name}", getattr(w, name), "a weight of at least 0")
    _check_by_kind(w.by_kind)
    need(0 <= w.general_share < 1, "rewards.general_share", w.general_share, "in [0, 1)")
    need(w.math_timeout > 0, "rewards.math_timeout", w.math_timeout, "above 0 seconds")
    batch_timeout = w.math_batch_timeout
    need(batch_timeout > 0, "rewards.math_batch_timeout", batch_timeout, "above 0 seconds")
    need(w.math_workers >= 1, "rewards.math_workers", w.math_workers, "at least 1")
    for name in ("code_timeout", "code_total_timeout"):
        need(getattr(w, name) > 0, f"rewards.{name}", getattr(w, name), "above 0 seconds")
    need(w.code_memory_mib >= 32, "rewards.code_memory_mib", w.code_memory_mib, "at least 32")
    need(0 <= w.sandbox_slots <= 255, "rewards.sandbox_slots", w.sandbox_slots,
         "0 (automatic) to 255")  # fmt: skip
    words = all(isinstance(v, list) and all(isinstance(x, str) for x in v)
                for v in w.lexicon.values())  # fmt: skip
    need(words, "rewards.lexicon", w.lexicon, "a table of language = [words]")
    _check_judge(c, need)
    need("{prompt}" in c.template.prompt, "template.prompt", c.template.prompt,
         "a text that holds {prompt}")  # fmt: skip
    need("{answer}" in a.summary, "cold_start.summary", a.summary, "a text that holds {answer}")
    for key, names in (("cold_start.methods", a.methods), ("pipeline.stages", c.pipeline.stages)):
        strings = bool(names) and all(isinstance(n, str) for n in names)
        need(strings and len(set(names)) == len(names), key, names, "a list of different names")
    known = {"few_shot", "reflection", "r1_zero"}
    unknown = sorted(set(a.methods) - known)
    need(not unknown, "cold_start.methods", unknown, f"among {', '.join(sorted(known))}")
    if bad := sorted(set(c.stages) - set(STAGES)):
        raise ValueError(f"unknown stage {bad[0]!r} in [stages.*]; known: {', '.join(STAGES)}")
    for stage, table in c.stages.items():
        if not isinstance(table, dict):
            raise ValueError(f"stages.{stage} is a section, got the value {table!r}")
        for key in {"output_dir", "pipeline", "stages"} & table.keys():
            raise ValueError(f"stages.{stage}.{key}: {key} is of the whole run, not of one stage")
    if bad := [s for s in c.pipeline.stages if s not in STAGES]:
        raise ValueError(f"unknown stage {bad[0]!r} in pipeline.stages; known: {', '.join(STAGES)}")


def _check_by_kind(tables: dict) -> None:
    for kind, table in tables.items():
        key = f"rewards.by_kind.{kind}"
        if kind not in KINDS:
            raise ValueError(f"{key}: unknown kind of problem; known: {', '.join(KINDS)}")
        if not isinstance(table, dict):
            raise ValueError(f"{key} must be a table of reward = weight, got {table!r}")
        for name, weight in table.items():
            if name not in REWARDS:
                raise ValueError(f"unknown reward {key}.{name}; known: {', '.join(REWARDS)}")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
                raise ValueError(f"{key}.{name} must be a weight of at least 0, got {weight!r}")


def _check_parallel(c: Config, need: Callable[[bool, str, Any, str], None]) -> None:
    p = c.parallel
    need(p.replicas >= 1, "parallel.replicas", p.replicas, "at least 1")
    need(p.context_parallel >= 1, "parallel.context_parallel", p.context_parallel, "at least 1")
    need(p.tensor_parallel >= 1, "parallel.tensor_parallel", p.tensor_parallel, "at least 1")
    if p.context_parallel > 1:
        need(not c.rollout.batch_invariant, "rollout.batch_invariant", True,
             "false with parallel.context_parallel above 1: the loss would need the engine's own "
             "forward of whole sequences")  # fmt: skip
        need(not c.log.record, "log.record", c.log.record,
             "empty with parallel.context_parallel above 1: a recording is of one rank's whole sequences")  # fmt: skip
    if p.mode == "ddp":
        need(p.replicas == 1, "parallel.replicas", p.replicas,
             'with parallel.mode = "fsdp": in ddp every process holds the whole model')  # fmt: skip
        need(
            not p.cpu_offload, "parallel.cpu_offload", True, 'false without parallel.mode = "fsdp"'
        )
    why, remedy = [], []
    if p.mode == "fsdp":
        why, remedy = ['parallel.mode = "fsdp"'], ['"ddp"']
    if p.tensor_parallel > 1:
        why += [f"parallel.tensor_parallel = {p.tensor_parallel}"]
        remedy += ["parallel.tensor_parallel = 1"]
        need(not c.lora.rank, "lora.rank", c.lora.rank,
             "0 (or take parallel.tensor_parallel = 1): adapters are of whole layers; "
             'parallel.mode = "fsdp" divides the base below them')  # fmt: skip
    if not why:
        return
    for ok, key, value, rule in (
        (not c.rollout.batch_invariant, "rollout.batch_invariant", True,
         "false: the loss would need the whole model in the engine beside the divided one"),
        (not c.log.record, "log.record", c.log.record, "empty: a recording holds digests of whole tensors"),
    ):  # fmt: skip
        need(ok, key, value, f"{rule} ({' and '.join(why)}; or take {' and '.join(remedy)})")


def _check_vllm(c: Config, need: Callable) -> None:
    r = c.rollout
    v, key = r.vllm, "rollout.vllm"
    for name in ("servers", "options"):
        words = getattr(v, name)
        need(
            all(isinstance(w, str) and w for w in words),
            f"{key}.{name}",
            words,
            "a list of strings",
        )
    need(len(set(v.servers)) == len(v.servers), f"{key}.servers", v.servers, "different addresses")
    need(v.num_servers >= 1, f"{key}.num_servers", v.num_servers, "at least 1")
    need(v.num_retries >= 0, f"{key}.num_retries", v.num_retries, "at least 0")
    for name in ("request_timeout", "sync_timeout", "wait_seconds"):
        need(getattr(v, name) > 0, f"{key}.{name}", getattr(v, name), "above 0 seconds")
    need(v.max_canary >= 0, f"{key}.max_canary", v.max_canary, "at least 0 (0 is by dtype)")
    if r.engine != "vllm":
        return
    if v.start:
        need(not v.servers, f"{key}.servers", v.servers, f"empty where {key}.start starts some")
    else:
        need(bool(v.servers), f"{key}.servers", v.servers,
             f"the addresses of servers, such as http://127.0.0.1:8000 (or set {key}.start)")  # fmt: skip
    need(
        r.temperature <= 2,
        "rollout.temperature",
        r.temperature,
        "at most 2, which is vLLM's own bound",
    )
    need(not (v.start and v.weight_transfer == "nccl"), f"{key}.weight_transfer", "nccl",
         f"auto or file with {key}.start: NCCL has no two processes on one GPU")  # fmt: skip
    need(not r.batch_invariant, "rollout.batch_invariant", True,
         "false with rollout.engine = vllm, whose sums have another order than the trainer's")  # fmt: skip


def _check_overlap(c: Config, need: Callable) -> None:
    g, v, key = c.grpo, c.rollout.vllm, "grpo.max_staleness"
    need(g.max_staleness >= 0, key, g.max_staleness, "at least 0 (0 is off)")
    if not g.max_staleness:
        return
    need(c.rollout.engine == "vllm", key, g.max_staleness,
         "0 with rollout.engine = embedded, which samples from the very weights that are trained")  # fmt: skip
    need(g.dynamic_sampling == "off", key, g.max_staleness,
         "0 with grpo.dynamic_sampling, whose draws depend on the rewards of the same step")  # fmt: skip
    need(g.rollout_correction != "none", "grpo.rollout_correction", "none",
         f"auto or another one with {key}: samples are of older weights than those that they train")  # fmt: skip
    need(not v.sleep, "rollout.vllm.sleep", True,
         f"false with {key}, as servers sample while the trainer trains")  # fmt: skip


def _check_judge(c: Config, need: Callable) -> None:
    j, m = c.judge, c.monitor
    need(not (j.url and j.path), "judge.path", j.path, "empty where judge.url is set")
    need(
        bool(j.model) or not j.url, "judge.model", j.model, "the name of the model behind judge.url"
    )
    need(j.timeout > 0, "judge.timeout", j.timeout, "above 0 seconds")
    need(j.num_retries >= 0, "judge.num_retries", j.num_retries, "at least 0")
    for name in ("num_threads", "max_reply_tokens", "num_judgements"):
        need(getattr(j, name) >= 1, f"judge.{name}", getattr(j, name), "at least 1")
    need(0 <= j.min_gap < 2, "judge.min_gap", j.min_gap, "in [0, 2): grades go up to 2")
    ratio = j.max_length_ratio
    need(ratio == 0 or ratio >= 1, "judge.max_length_ratio", ratio, "at least 1, or 0 for any")
    need(j.num_samples >= 2, "judge.num_samples", j.num_samples, "at least 2 responses")
    need(m.window >= 1, "monitor.window", m.window, "at least 1 evaluation")
    need(m.num_errors >= 0, "monitor.num_errors", m.num_errors, "at least 0 standard errors")
    need(m.action != "stop" or c.eval.every_steps >= 1, "monitor.action", m.action,
         "warn or off where eval.every_steps is 0, as nothing is evaluated")  # fmt: skip


def lora_targets(names: list) -> list[str]:
    """The projections that `lora.targets` names, in their order; "all-linear" names all."""
    known = f"{', '.join(PROJECTIONS)}, or all-linear"
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"lora.targets must be a list of projections ({known}), got {names!r}")
    for name in names:
        if name in ("lm_head", "embed_tokens"):
            raise ValueError(
                f"lora.targets: {name} cannot have an adapter, as the loss counts on a frozen head; "
                f"known: {known}"
            )
        if name not in (*PROJECTIONS, "all-linear"):
            raise ValueError(f"lora.targets: unknown projection {name!r}; known: {known}")
    return [name for name in PROJECTIONS if name in names or "all-linear" in names]
