"""`r1fast generate`: completions of a model on the terminal as they are made, or as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace

from r1fast.config import Config, load_config
from r1fast.metrics import note, printable, rule, say, say_part
from r1fast.policy import Policy, policy_of
from r1fast.provenance import hardware
from r1fast.rollout.engine import Engine
from r1fast.rollout.result import completion_of
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.templates import encode_prompts
from r1fast.types import Completion, Problem, TokenEvent

Options = Mapping[str, str | list[str]]  # of the command line, without their dashes


def model_config(target: str, overrides: list[str]) -> tuple[Config, str]:
    """(config, the model's path) of a TOML file or of a model by itself.

    A model by itself gets its own chat template, or none, unless --template.* says more.
    """
    is_config = target.endswith(".toml")
    config = load_config(target if is_config else None, overrides)
    path = config.model.path if is_config else target
    if not path:
        raise ValueError(f"{target} names no model.path")
    return config, path


def generate(target: str, overrides: list[str], options: Options) -> None:
    """Sample --num completions of each --prompt and show them.

    A single one is shown as it is made, several as they end, each under its number; with --json a
    line for each. Raises ValueError for a wrong option or a prompt that is too long, RuntimeError
    when all is shown and a completion has failed.
    """
    texts = options.get("prompt")
    if not texts:
        raise ValueError("generate needs --prompt TEXT")
    num = _number(options, "num", 1, low=1)
    config, path = model_config(target, overrides)
    policy = policy_of(config, path)
    if not target.endswith(".toml") and not any(w.startswith("--template.") for w in overrides):
        name = "chat" if getattr(policy.tokenizer, "chat_template", None) else "raw"
        config = replace(config, template=replace(config.template, name=name))
    note(f"template: {config.template.name}")
    prompts = _prompts(texts, policy, config)
    sampling = _sampling(options, policy, config)
    engine = Engine.of(policy, config.rollout, fixed_weights=True)
    seed = sample_seed(_number(options, "seed", config.seed), "generate")
    began, num_tokens, num_failed = time.monotonic(), 0, 0
    alone = len(prompts) == num == 1 and "json" not in options
    parts: list[list[list[TokenEvent]]] = [[[] for _ in range(num)] for _ in prompts]
    names = [f"prompt {i + 1}" for i in range(len(prompts))]  # as on the screen
    for event in engine.stream(prompts, num, sampling, seed=seed, names=names):
        num_tokens += len(event.token_ids)
        events = parts[event.request_id][event.sample]
        events.append(event)
        if alone:
            say_part(printable(event.text))
        if not event.finish_reason:
            continue
        completion = completion_of(events)
        if completion.error:  # where it happened stands beside it
            where = f"{names[event.request_id]}, sample {event.sample}: "
            completion.error = completion.error.removeprefix(where)
        num_failed += event.finish_reason == "error"
        if "json" in options:
            say(_json_line(event, completion, len(prompts[event.request_id])))
        elif alone:
            say(_ending(completion))
        else:
            label = f"{event.sample + 1}/{num}"
            if len(prompts) > 1:
                label = f"prompt {event.request_id + 1}/{len(prompts)}, sample {label}"
            rule(label)
            say(printable(completion.text) + _ending(completion))
    seconds = time.monotonic() - began
    if num_failed:
        raise RuntimeError(f"{num_failed} of {num * len(prompts)} completions failed")
    speed = f"{num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:,.0f} a second"
    note(f"{speed} on {policy.device} ({hardware(policy.device)})")


def _prompts(texts: list[str], policy: Policy, config: Config) -> list[list[int]]:
    problems = [Problem(text, kind="general", id=f"prompt {i + 1}") for i, text in enumerate(texts)]
    room = min(config.rollout.max_prompt_tokens, policy.model.spec.max_position_embeddings - 1)
    prompts, _, dropped = encode_prompts(problems, policy.tokenizer, config.template, room)
    if dropped:
        name, length = dropped[0]
        raise ValueError(
            f"{name} has {length} tokens, more than the {room} that rollout.max_prompt_tokens and "
            "the model's context leave; shorten it, or set --rollout.max_prompt_tokens"
        )
    return prompts


def _sampling(options: Options, policy: Policy, config: Config) -> SamplingParams:
    """The command's options; the config's [eval] and [rollout] where they say nothing."""
    context = policy.model.spec.max_position_embeddings
    return SamplingParams(
        temperature=_number(options, "temperature", config.eval.temperature),
        top_p=_number(options, "top-p", config.eval.top_p),
        top_k=_number(options, "top-k", 0),
        min_p=_number(options, "min-p", 0.0),
        repetition_penalty=_number(options, "repetition-penalty", 1.0),
        max_tokens=_number(
            options, "max-tokens", min(config.rollout.max_completion_tokens, context - 1)
        ),
        min_tokens=_number(options, "min-tokens", 0),
        stop=tuple(options.get("stop", ())),
        stop_token_ids=tuple(
            _number({"stop-token-id": word}, "stop-token-id", 0)
            for word in options.get("stop-token-id", ())
        ),
        top_logprobs=_number(options, "top-logprobs", 0),
    )


def _number(options: Options, name: str, default: float, low: float | None = None) -> float:
    """A number of the default's type. Raises ValueError naming the option."""
    if name not in options:
        return default
    text, kind = options[name], type(default)
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or (low is not None and value < low):
        what = "a whole number" if kind is int else "a number"
        least = "" if low is None else f" of at least {low}"
        raise ValueError(f"--{name} must be {what}{least}, got {text!r}")
    return value


def _ending(completion: Completion) -> str:
    if completion.finish_reason == "error":
        return f" [failed: {completion.error}]"
    return "" if completion.finish_reason == "stop" else " [cut off]"


def _json_line(event: TokenEvent, completion: Completion, num_prompt_tokens: int) -> str:
    row = {
        "prompt": event.request_id,
        "sample": event.sample,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "num_prompt_tokens": num_prompt_tokens,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
    }
    if completion.error:
        row["error"] = completion.error
    if completion.top_logprobs:
        row["top_logprobs"] = completion.top_logprobs
    return json.dumps(row, ensure_ascii=False)
