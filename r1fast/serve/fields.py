"""The fields of an OpenAI request, each checked as it is read; and how a request is refused.

An unknown field is refused, because a setting that is silently ignored falsifies what is measured with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

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


def parse_json(raw: bytes) -> dict:
    """The body as a JSON object. Raises RequestError; NaN and Infinity are no JSON."""

    def refuse(word: str):
        raise ValueError(f"{word} is not a JSON number")

    try:
        body = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error or 'nested too deep'}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {named(body)}")
    return body


class Fields:
    """The fields of a body, each taken once; `finish` refuses those that nobody took."""

    def __init__(self, body: dict):
        self.body, self.names = body, set()

    def given(self, name: str) -> bool:
        return self.body.get(name) is not None

    def take(self, name: str) -> Any:
        self.names.add(name)
        return self.body.get(name)

    def number(self, name: str, default: float) -> float:
        return float(self._checked(name, default, is_number, "a number"))

    def integer(
        self, name: str, default: int | None, low: int | None = None, high: int | None = None
    ) -> int | None:
        value = self._checked(name, default, lambda v: type(v) is int, "a whole number")
        if value is None:
            return None
        if (low is not None and value < low) or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"from {low} to {high}"
            raise RequestError(f"{name} must be {limits}, got {named(value)}", name)
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
            raise RequestError(f"{name} must be {what}, got {named(value)}", name)
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
                raise RequestError(f"{name} = {named(value)} is not served: {why}", name)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def is_number(value: Any) -> bool:
    return isinstance(value, float) or is_int(value)


def checked_unicode(text: str, name: str) -> str:
    """`text`, refused where half a surrogate pair stands in it, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} is not valid Unicode: {error}", name.partition("[")[0]
        ) from None
    return text


def named(value: Any) -> str:
    """What came, short: a JSON text of at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):  # nested too deep; a number of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"
