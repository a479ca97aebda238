"""Reads an OpenAI request: a JSON body becomes prompts and sampling, or an error that names the field.

Fields are those of OpenAI's reference and vLLM's usual extras. An unknown field is refused, because a
setting that is silently ignored falsifies what is measured with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from r1fast.policy import Policy
from r1fast.rollout.sampler import SamplingParams
from r1fast.templates import encode_text

MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI's; a chat may fill the context

IGNORED = frozenset(  # describe the caller, not the completion
    "user metadata store service_tier safety_identifier prompt_cache_key model".split()
)
NEUTRAL: Mapping[str, tuple] = {  # not served; these values ask for nothing
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "skip_special_tokens": (False,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "use_beam_search": (False,),
}
WHY_NOT = {
    "skip_special_tokens": "texts keep special tokens, except the one that ends them, because tags "
    "may be such tokens",
    "include_stop_str_in_output": "a text ends before its stop string; its token ids do not",
}


class RequestError(ValueError):
    """A refused request, in OpenAI's terms: HTTP status, message, the field at fault, a code."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request asks for."""

    prompts: list[list[int]]
    prompt_texts: list[str]  # what `echo` gives back; decoded where ids came
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

    @property
    def num_samples(self) -> int:
        return len(self.prompts) * self.best_of


def parse_json(raw: bytes) -> dict:
    """The body as a JSON object. Raises RequestError; NaN and Infinity are no JSON."""

    def refuse(word: str):
        raise ValueError(f"{word} is not a JSON number")

    try:
        body = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error or 'nested too deep'}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {_named(body)}")
    return body


def read_completion(body: dict, policy: Policy) -> Generation:
    """A body of /v1/completions."""
    fields = _Fields(body)
    special = fields.boolean("add_special_tokens", True)
    prompts, texts = _prompts(fields.take("prompt"), policy, special)
    top = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    echo = fields.boolean("echo", False)
    if echo and top is not None:
        raise RequestError(
            "echo with logprobs asks for log-probabilities of the prompt, which are not served; "
            "leave one of the two out",
            "echo",
        )
    max_tokens = fields.integer("max_tokens", DEFAULT_MAX_TOKENS, 1)
    return _generation(fields, policy, prompts, texts, max_tokens, "max_tokens", top, echo, False)


def read_chat(body: dict, policy: Policy) -> Generation:
    """A body of /v1/chat/completions. The tokenizer's own chat template renders the messages."""
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    text = _render(messages, fields.take("chat_template_kwargs") or {}, policy.tokenizer)
    prompt = encode_text(_unicode(text, "messages"), policy.tokenizer, add_special_tokens=False)
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise RequestError(
            f"top_logprobs = {top} needs logprobs = true, got {wanted}", "top_logprobs"
        )
    name = "max_tokens" if fields.given("max_tokens") else "max_completion_tokens"
    max_tokens = fields.integer("max_tokens", None, 1)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, 1)
    if max_tokens is None:
        max_tokens = max(1, policy.model.spec.max_position_embeddings - len(prompt))
    top = (top or 0) if wanted else None
    return _generation(fields, policy, [prompt], [text], max_tokens, name, top, False, True)


def _generation(
    fields: _Fields,
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
    include_usage = bool(options.pop("include_usage", False))
    if options:
        raise RequestError(
            f"stream_options knows include_usage, got {', '.join(map(repr, options))}",
            "stream_options",
        )
    sampling = _sampling(fields, max_tokens, max_tokens_name, top_logprobs)
    generation = Generation(
        prompts, texts, sampling, n, best_of,
        seed=fields.integer("seed", None),
        chat=chat,
        echo=echo,
        stream=stream,
        include_usage=include_usage,
        top_logprobs=top_logprobs,
        return_token_ids=fields.boolean("return_token_ids", False),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids", False),
    )  # fmt: skip
    fields.finish()
    _check_room(generation, policy.model.spec.max_position_embeddings, max_tokens_name)
    return generation


def _sampling(
    fields: _Fields, max_tokens: int, max_tokens_name: str, top_logprobs: int | None
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
        if room < 1:
            raise RequestError(
                f"{name} has {len(ids)} tokens and fills the model's context of {context}; shorten it",
                name.partition("[")[0],
                code="context_length_exceeded",
            )
        raise RequestError(
            f"{name} has {len(ids)} tokens, and {max_tokens_name} = {generation.sampling.max_tokens} "
            f"goes beyond the model's context of {context}; ask for at most {room}",
            max_tokens_name,
            code="context_length_exceeded",
        )


def _prompts(value: Any, policy: Policy, special: bool) -> tuple[list[list[int]], list[str]]:
    """Text, ids, or a list of either."""
    if value is None:
        raise RequestError(
            "prompt is missing; give a text, token ids, or a list of either", "prompt"
        )
    one = isinstance(value, str) or (isinstance(value, list) and value and _is_int(value[0]))
    items = [value] if one else value
    if not isinstance(items, list) or not items:
        raise RequestError(
            f"prompt must be a text, token ids, or a list of either, got {_named(value)}", "prompt"
        )
    prompts, texts = [], []
    for i, item in enumerate(items):
        name = "prompt" if one else f"prompt[{i}]"
        if isinstance(item, str):
            text = _unicode(item, name)
            ids = encode_text(text, policy.tokenizer, add_special_tokens=special)
        else:
            ids = _token_ids(item, name)
            V = policy.model.spec.vocab_size
            wrong = next((t for t in ids if not 0 <= t < V), None)
            if wrong is not None:
                raise RequestError(
                    f"{name} has token id {wrong}, the vocabulary ends at {V - 1}", "prompt"
                )
            text = policy.tokenizer.decode(ids)
        if not ids:
            raise RequestError(f"{name} is empty", "prompt")
        prompts.append(ids)
        texts.append(text)
    return prompts, texts


def _messages(value: Any) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise RequestError(
            f"messages must be a list of at least one message, got {_named(value)}", "messages"
        )
    messages = []
    for i, message in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"{name} must be an object with a role and content, got {_named(message)}",
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
        f"got {_named(value)}",
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
            f"got {_named(variables)}",
            "chat_template_kwargs",
        )
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **variables
        )
    except Exception as error:  # a template raises whatever it likes, jinja's own errors included
        raise RequestError(
            f"the model's chat template refuses these messages: {type(error).__name__}: {error}",
            "messages",
        ) from None


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(s, str) and s for s in strings):
        raise RequestError(
            f"stop must be a text or a list of texts, none of them empty, got {_named(value)}",
            "stop",
        )
    return tuple(_unicode(s, "stop") for s in strings)


def _token_ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(map(_is_int, value)):
        raise RequestError(
            f"{name} must be a list of token ids, got {_named(value)}", name.partition("[")[0]
        )
    return value


def _logit_bias(value: dict) -> dict[int, float]:
    bias = {}
    for key, number in value.items():
        if not str(key).isdecimal() or not _is_number(number):
            raise RequestError(
                f"logit_bias must map token ids to numbers, got {key!r}: {_named(number)}",
                "logit_bias",
            )
        bias[int(key)] = float(number)
    return bias


class _Fields:
    """The fields of a body, each taken once; `finish` refuses those that nobody took."""

    def __init__(self, body: dict):
        self.body, self.names = body, set()

    def given(self, name: str) -> bool:
        return self.body.get(name) is not None

    def take(self, name: str) -> Any:
        self.names.add(name)
        return self.body.get(name)

    def number(self, name: str, default: float) -> float:
        return float(self._checked(name, default, _is_number, "a number"))

    def integer(
        self, name: str, default: int | None, low: int | None = None, high: int | None = None
    ) -> int | None:
        value = self._checked(name, default, _is_int, "a whole number")
        if value is None:
            return None
        if (low is not None and value < low) or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RequestError(f"{name} must be {limits}, got {value}", name)
        return value

    def boolean(self, name: str, default: bool) -> bool:
        return self._checked(name, default, lambda v: isinstance(v, bool), "true or false")

    def mapping(self, name: str) -> dict:
        return dict(self._checked(name, {}, lambda v: isinstance(v, dict), "an object"))

    def _checked(self, name: str, default: Any, right: Callable[[Any], bool], what: str) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if not right(value):
            raise RequestError(f"{name} must be {what}, got {_named(value)}", name)
        return value

    def finish(self) -> None:
        for name, value in self.body.items():
            if name in self.names or name in IGNORED or value is None:
                continue
            if name not in NEUTRAL:
                known = ", ".join(sorted(self.names))
                raise RequestError(f"unknown field {name!r}; known: {known}", name)
            if (type(value), value) not in [(type(v), v) for v in NEUTRAL[name]]:
                why = WHY_NOT.get(name, "leave it out")
                raise RequestError(f"{name} = {_named(value)} is not served: {why}", name)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_int(value)


def _unicode(text: str, name: str) -> str:
    """`text`, refused where half a surrogate pair stands in it, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode: {error}", name.partition("[")[0]
        ) from None
    return text


def _named(value: Any) -> str:
    """What came, short: a JSON text of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
