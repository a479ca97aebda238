"""How a question is put to the model: template text, chat template, token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from r1fast.chat_template import render_chat
from r1fast.config import TemplateConfig
from r1fast.protocol import PROTOCOLS, opens_think
from r1fast.types import Problem

# the only constraint put on the content of R1-Zero (arXiv 2501.12948, table 1), on one line
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process "
    "here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


def render_prompt(problem_prompt: str, template: TemplateConfig, tokenizer=None) -> str:
    """The text the model continues. `tokenizer` is needed for the `chat` template only."""
    if template.name == "r1_zero":
        return R1_ZERO_TEMPLATE.replace("{prompt}", problem_prompt)
    if template.name in ("raw", "cold_start"):
        if "{prompt}" not in template.prompt:
            raise ValueError(
                f"template.prompt must hold {{prompt}} where the question goes, "
                f"got {template.prompt!r}"
            )
        return template.prompt.replace("{prompt}", problem_prompt)  # never str.format on user text
    if template.name != "chat":
        raise ValueError(
            f"template.name must be r1_zero, cold_start, chat or raw, got {template.name!r}"
        )
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        kind = "no tokenizer came" if tokenizer is None else type(tokenizer).__name__
        raise ValueError(
            f"template.name = 'chat' needs a tokenizer with a chat template, got {kind}; "
            "use 'r1_zero' or 'raw' for a base model"
        )
    messages = [{"role": "system", "content": template.system}] * bool(template.system)
    messages.append({"role": "user", "content": problem_prompt})
    return render_chat(tokenizer, messages)


def prompt_opens_think(template: TemplateConfig, tokenizer=None) -> bool:
    """Whether prompts end in the opening tag, as the chat templates of R1 models do."""
    if template.name == "chat" and tokenizer is None:
        return False
    return opens_think(
        render_prompt("?", template, tokenizer), template.protocol, template.special_token
    )


def opened_protocols(template: TemplateConfig, tokenizer=None) -> list[str]:
    """The protocols whose opening tag prompts would end in, were they `template.protocol`."""
    protocols = [p for p in PROTOCOLS if p != "cold_start" or template.special_token.strip()]
    return [p for p in protocols if prompt_opens_think(replace(template, protocol=p), tokenizer)]


def with_system(template: TemplateConfig, meta: Mapping, where: str) -> TemplateConfig:
    """`template` with a row's own system message. ValueError where the template has no place for it."""
    system = meta.get("system")
    if not system:
        return template
    if template.name != "chat":
        raise ValueError(
            f"{where} has a system message, which template.name = {template.name!r} has no place "
            "for; use 'chat', or put its text into the prompt"
        )
    return replace(template, system=str(system))


def encode_text(text: str, tokenizer, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt. Works with transformers and with tokenizers.

    An end-of-sequence token that the tokenizer puts behind a prompt is taken off again: the model
    is to continue, not to start anew.
    """
    ids = _ids(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    eos = getattr(tokenizer, "eos_token_id", None)
    if add_special_tokens and eos is not None and ids[-1:] == [eos]:
        plain = _ids(tokenizer.encode(text, add_special_tokens=False))
        if plain[-1:] != [eos]:
            return ids[:-1]
    return ids


def _ids(encoded) -> list[int]:
    return list(getattr(encoded, "ids", encoded))


def encode_prompts(
    problems: Sequence[Problem], tokenizer, template: TemplateConfig, max_prompt_tokens: int
) -> tuple[list[list[int]], list[int], list[tuple[str, int]]]:
    """(prompt_ids, kept, dropped): ids and index of each kept problem; (id, num_tokens) of others.

    A prompt longer than `max_prompt_tokens` is dropped and reported, never cut. A chat template
    writes its own special tokens, so none are added to its text.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
    prompt_ids, kept, dropped = [], [], []
    for i, problem in enumerate(problems):
        own = with_system(template, problem.meta, f"problem {problem.id!r}")
        text = render_prompt(problem.prompt, own, tokenizer)
        ids = encode_text(text, tokenizer, add_special_tokens=template.name != "chat")
        if not ids:
            raise ValueError(f"problem {problem.id!r} has no tokens after encoding: {text[:80]!r}")
        if len(ids) > max_prompt_tokens:
            dropped.append((problem.id, len(ids)))
            continue
        prompt_ids.append(ids)
        kept.append(i)
    return prompt_ids, kept, dropped
