"""Chat templates, rendered in a process of their own that ends when one takes too much time or memory.

A template is a program, written by whoever made the model folder. Jinja's sandbox keeps it from attributes and files, not
from a loop that never ends, `2 ** 9 ** 9` or a text of gigabytes: those end the process, which is replaced, and are a
ValueError here. What is rendered is what `tokenizer.apply_chat_template` of transformers gives.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from r1fast.json_fields import is_sound
from r1fast.worker_process import Ended, Late, WorkerProcess

_WORKER = Path(__file__).with_name("chat_template_worker.py")
_TIMEOUT = (
    120.0  # seconds of the clock, of a machine that is busy: processor time is what ends a template
)
MAX_CHARS = 1 << 24  # of a rendered chat, and of a template


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """`messages` by the tokenizer's chat template; `variables` are further ones of the template.

    Raises ValueError for what the template refuses, and for one that is wrong, takes over two seconds of a core, or makes
    over 16 Mi characters. A tokenizer that has its own way (not transformers') is asked itself.
    """
    if hasattr(tokenizer, "get_chat_template"):
        text = _rendered(tokenizer, messages, add_generation_prompt, variables or {})
    else:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    if not is_sound(text):
        raise ValueError(
            f"the model's chat template must make a text without half a surrogate pair, got {text!r:.200}"
        )
    return text


def _rendered(
    tokenizer: Any, messages: Sequence[Mapping], add: bool, variables: Mapping[str, Any]
) -> str:
    template = tokenizer.get_chat_template()
    if not isinstance(template, str) or len(template) > MAX_CHARS:
        raise ValueError(
            f"a chat template must be a text of at most {MAX_CHARS} characters, got "
            + (f"{len(template)}" if isinstance(template, str) else f"{template!r:.80}")
        )
    values = {
        "tools": None,
        "documents": None,
        **tokenizer.special_tokens_map,
        **variables,
        "messages": [_plain(message) for message in messages],
        "add_generation_prompt": add,
    }
    try:
        return _renderer().render(template, values)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the variables of a chat template must be JSON values: {error}") from None


def _plain(message: Mapping) -> dict:
    """As transformers hands it to a template: without what is None, the reasoning under each of its names."""
    plain = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if name in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


@cache
def _renderer() -> _Renderer:
    return _Renderer()


class _Renderer:
    """The process, started when it is first needed and replaced when it has ended. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._last: str | None = None  # the template that this process has
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.forget()
        self._lock, self._worker = threading.Lock(), None

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        with self._lock:
            worker = self._running()
            request = {"template": None if template == self._last else template, "values": values}
            deadline = time.monotonic() + _TIMEOUT
            try:
                worker.send(request, deadline)
                reply = worker.read(deadline)
            except BaseException as error:
                self._end()  # after a Ctrl-C too: its reply would be taken for the next one's
                if isinstance(error, Late):
                    raise ValueError(
                        f"the model's chat template took over {_TIMEOUT:g} s"
                    ) from None
                if isinstance(error, Ended):
                    raise ValueError(_why(error.status)) from None
                raise
            self._last = None if "error" in reply else template
        if "error" in reply:
            raise ValueError(f"the model's chat template refuses these messages: {reply['error']}")
        return reply["text"]

    def _running(self) -> WorkerProcess:
        if self._worker is None or not self._worker.is_running():
            self._end()
            self._worker = WorkerProcess(_WORKER, MAX_CHARS)
        return self._worker

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = self._last = None


def _why(status: int) -> str:
    """What a process that ended while it rendered has died of."""
    if -status in (signal.SIGPROF, signal.SIGXCPU):
        return "the model's chat template takes over two seconds of processor time"
    name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    return f"the model's chat template ended the process that rendered it ({name})"
