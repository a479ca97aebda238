"""Reads an OpenAI request: a JSON body becomes prompts and sampling, or an error that names the field.

Fields are those of OpenAI's reference and vLLM's usual extras.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1fast.chat_template import render_chat
from r1fast.policy import Policy
from r1fast.rollout.sampler import SamplingParams
from r1fast.serve.fields import Fields, RequestError, checked_unicode, is_int, is_number, named
from r1fast.templates import encode_text

MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's; a chat may fill the context


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks for."""

    prompts: list[list[int]]
    prompt_texts: list[str]  # what `echo` gives back; decoded where ids came, "" without it
    sampling: SamplingParams
    n: int
    best_of: int  # samples drawn for each prompt, of which the best n are returned
    seed: int | None
    chat: bool
    echo: bool
    stream: bool
    include_usage: bool  # a last chunk with the usage
    top_logprobs: int | None  # None: no log-probabilities asked for
    return_token_ids: bool
    tokens_as_ids: bool  # "token_id:42" instead of a token's text
    field_names: Mapping[str, str]  # how the client calls what the engine calls something else

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.best_of


def read_completion(body: dict, policy: Policy, max_prompts: int) -> Generation:
    """A body of /v1/completions."""
    fields = Fields(body)
    special = fields.boolean("add_special_tokens", True)
    echo = fields.boolean("echo", False)
    prompts, texts = _prompts(
        fields.take("prompt"), policy, special=special, max_prompts=max_prompts, with_texts=echo
    )
    top = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    if echo and top is not None:
        raise RequestError(
            "echo with logprobs asks for log-probabilities of the prompt, which are not served; "
            "leave one of the two out",
            "echo",
        )
    room = policy.model.spec.max_position_embeddings - max(map(len, prompts))
    max_tokens = fields.integer("max_tokens", min(DEFAULT_MAX_TOKENS, room), 1)
    return _generation(fields, policy, prompts, texts, max_tokens, "max_tokens", top, echo, False)


def read_chat(body: dict, policy: Policy, max_prompts: int) -> Generation:
    """A body of /v1/chat/completions. The tokenizer's own chat template renders the messages.

    It is one prompt, whatever `max_prompts` is.
    """
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    text = _render(messages, fields.take("chat_template_kwargs") or {}, policy.tokenizer)
    prompt = encode_text(
        checked_unicode(text, "messages"), policy.tokenizer, add_special_tokens=False
    )
    room = _room(prompt, "messages", policy)
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise RequestError(
            f"top_logprobs = {top} needs logprobs = true, got {wanted}", "top_logprobs"
        )
    # the later name of the two counts where both are given
    name = "max_completion_tokens" if fields.given("max_completion_tokens") else "max_tokens"
    max_tokens = fields.integer("max_tokens", room, 1)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, 1)
    top = (top or 0) if wanted else None
    return _generation(fields, policy, [prompt], [text], max_tokens, name, top, False, True)


def _generation(
    fields: Fields,
    policy: Policy,
    prompts: list[list[int]],
    texts: list[str],
    max_tokens: int,
    max_tokens_name: str,
    top_logprobs: int | None,
    echo: bool,
    chat: bool,
) -> Generation:
    """What both kinds of request share."""
    n = fields.integer("n", 1, 1)
    best_of = n if chat else fields.integer("best_of", n, 1)
    stream = fields.boolean("stream", False)
    if best_of < n:
        raise RequestError(f"best_of must be at least n = {n}, got {best_of}", "best_of")
    if stream and best_of > n:
        raise RequestError(
            f"best_of = {best_of} with n = {n} cannot be streamed: which samples are best is known "
            "at the end; use stream = false",
            "best_of",
        )
    options = fields.mapping("stream_options")
    include_usage = options.pop("include_usage", False)
    if not isinstance(include_usage, bool):
        raise RequestError(
            f"stream_options.include_usage must be true or false, got {named(include_usage)}",
            "stream_options",
        )
    if options:
        raise RequestError(
            f"stream_options knows include_usage, got {', '.join(map(repr, options))}",
            "stream_options",
        )
    if fields.given("stream_options") and not stream:
        raise RequestError("stream_options needs stream = true", "stream_options")
    sampling = _sampling(fields, max_tokens, max_tokens_name, top_logprobs)
    generation = Generation(
        prompts, texts, sampling, n, best_of,
        seed=fields.integer("seed", None, -(2**63), 2**64 - 1),
        chat=chat,
        echo=echo,
        stream=stream,
        include_usage=include_usage,
        top_logprobs=top_logprobs,
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
        field_names={
            "prompt": "messages" if chat else "prompt",
            "max_tokens": max_tokens_name,
            "n": "best_of" if best_of > n else "n",
        },
    )  # fmt: skip
    fields.finish()
    _check_room(generation, policy.model.spec.max_position_embeddings, max_tokens_name)
    return generation


def _sampling(
    fields: Fields, max_tokens: int, max_tokens_name: str, top_logprobs: int | None
) -> SamplingParams:
    names = {
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": max(0, fields.integer("top_k", 0, -1)),  # vLLM's -1 is "off" too
        "min_p": fields.number("min_p", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
        "stop": _stop(fields.take("stop")),
        "stop_token_ids": tuple(_token_ids(fields.take("stop_token_ids") or [], "stop_token_ids")),
        "min_tokens": fields.integer("min_tokens", 0, 0),
        "logit_bias": _logit_bias(fields.mapping("logit_bias")),
        "ignore_eos": fields.boolean("ignore_eos", False),
    }
    try:
        return SamplingParams(**names, max_tokens=max_tokens, top_logprobs=top_logprobs or 0)
    except ValueError as error:
        name = str(error).split(maxsplit=1)[0].split("[")[0]
        name = max_tokens_name if name == "max_tokens" else name
        raise RequestError(str(error), name if name in fields.names else None) from None


def _check_room(generation: Generation, context: int, max_tokens_name: str) -> None:
    for i, ids in enumerate(generation.prompts):
        room = context - len(ids)
        if generation.sampling.max_tokens <= room:
            continue
        name = (
            "messages" if generation.chat else "prompt" + f"[{i}]" * (len(generation.prompts) > 1)
        )
        raise RequestError(
            f"{name} has {len(ids)} tokens, and {max_tokens_name} = {generation.sampling.max_tokens} "
            f"goes beyond the model's context of {context}; ask for at most {room}",
            max_tokens_name,
            code="context_length_exceeded",
        )


def _room(prompt: list[int], name: str, policy: Policy) -> int:
    """Tokens of the context that a prompt leaves. Refuses one that leaves none."""
    context = policy.model.spec.max_position_embeddings
    if len(prompt) >= context:
        raise RequestError(
            f"{name} has {len(prompt)} tokens and fills the model's context of {context}; shorten it",
            name.partition("[")[0],
            code="context_length_exceeded",
        )
    return context - len(prompt)


def _prompts(
    value: Any, policy: Policy, *, special: bool, max_prompts: int, with_texts: bool
) -> tuple[list[list[int]], list[str]]:
    """Text, ids, or a list of either; and their texts, where they are wanted.

    What cannot be served is refused at the first prompt that shows it. Only the tokens tell: no number
    of characters is too many for every tokenizer.
    """
    if value is None:
        raise RequestError(
            "prompt is missing; give a text, token ids, or a list of either", "prompt"
        )
    one = isinstance(value, str) or (isinstance(value, list) and value and is_int(value[0]))
    items = [value] if one else value
    if not isinstance(items, list) or not items:
        raise RequestError(
            f"prompt must be a text, token ids, or a list of either, got {named(value)}", "prompt"
        )
    if len(items) > max_prompts:
        raise RequestError(
            f"prompt has {len(items)} prompts, this server takes at most {max_prompts} samples at "
            "once; split it",
            "prompt",
        )
    prompts, texts = [], []
    for i, item in enumerate(items):
        name = "prompt" if one else f"prompt[{i}]"
        if isinstance(item, str):
            text = checked_unicode(item, name)
            ids = encode_text(text, policy.tokenizer, add_special_tokens=special)
            _room(ids, name, policy)
        else:
            ids = _token_ids(item, name)
            _room(ids, name, policy)
            V = policy.model.spec.vocab_size
            wrong = next((t for t in ids if not 0 <= t < V), None)
            if wrong is not None:
                raise RequestError(
                    f"{name} has token id {wrong}, the vocabulary ends at {V - 1}", "prompt"
                )
            text = policy.tokenizer.decode(ids) if with_texts else ""
        if not ids:
            raise RequestError(f"{name} is empty", "prompt")
        prompts.append(ids)
        texts.append(text)
    return prompts, texts


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"messages must be a list of at least one message, got {named(value)}", "messages"
        )
    messages = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"{name} must be an object with a role and content, got {named(message)}",
                "messages",
            )
        messages.append({**message, "content": _content(message.get("content"), name)})
    return messages


def _content(value: Any, name: str) -> str:
    """A text, or OpenAI's list of text parts, joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [
            part["text"]
            for part in value
            if isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ]
        if len(parts) == len(value):
            return "\n".join(parts)
    raise RequestError(
        f'{name}.content must be a text or a list of {{"type": "text", "text": ...}}, '
        f"got {named(value)}",
        "messages",
    )


def _render(messages: list[dict], variables: Any, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "the model's tokenizer has no chat template; use /v1/completions", "messages"
        )
    reserved = {"messages", "conversation", "tokenize", "chat_template", "add_generation_prompt",
                "return_tensors", "return_dict", "tools", "documents"}  # fmt: skip
    if not isinstance(variables, dict) or reserved & set(variables):
        raise RequestError(
            "chat_template_kwargs must be an object of the template's own variables, "
            f"got {named(variables)}",
            "chat_template_kwargs",
        )
    try:
        return render_chat(tokenizer, messages, variables=variables)
    except ValueError as error:
        raise RequestError(str(error), "messages") from None


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise RequestError(
            f"stop must be a text or a list of texts, none of them empty, got {named(value)}",
            "stop",
        )
    return tuple(checked_unicode(s, "stop") for s in strings)


def _token_ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(map(is_int, value)):
        raise RequestError(
            f"{name} must be a list of token ids, got {named(value)}", name.partition("[")[0]
        )
    return value


def _logit_bias(value: dict) -> dict[int, float]:
    bias = {}
    for key, number in value.items():
        # one spelling of a number: "05" or "٥" beside "5" would be two biases of one token
        is_id = len(key) < 20 and key.isascii() and key.isdecimal() and str(int(key)) == key
        if not is_id or not is_number(number):
            raise RequestError(
                'logit_bias must map token ids, as "42", to numbers, got '
                f"{named(key)}: {named(number)}",
                "logit_bias",
            )
        bias[int(key)] = float(number)
    return bias
