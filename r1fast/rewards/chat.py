"""Chat models that judge: many requests at a time, each with a reader of its reply.

`ChatEndpoint` talks to any OpenAI-compatible /v1/chat/completions with the standard library alone;
`judge_engine.EngineChat` samples from a model in this process. What cannot be asked, or says nothing
that can be read, is None and counted, never a guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

_RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_MAX_REPLY_BYTES = 1 << 20
_MAX_CACHE = 1 << 16
_MAX_WAIT = 30.0  # seconds between two tries
_MAX_FAILURES = 16  # requests in a row, after which a call asks no more
RETRY_TEMPERATURE = 0.6  # after a reply that could not be read: a greedy one would come again
Read = Callable[[str], Any]  # a reply -> what it says, None where it says nothing

# what a tokenizer may read as its own control tokens, which would end the judge's prompt
_CONTROL = re.compile(
    r"<[|｜][^<>|｜\n]{1,40}[|｜]?>|<[^<>|｜\n]{1,40}[|｜]>|\[[|｜][^\[\]|｜\n]{1,40}[|｜]\]|</?s>|</think>"
    r"|\[/?(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|g?MASK|sMASK|CLS|SEP|BOS|EOS|UNK|PAD)\]|<</?SYS>>"
    r"|<(?:start|end)_of_(?:turn|utterance)>|</?(?:bos|eos|pad|unk|cls|sep|mask|sop|eop)>"
    r"|<_?(?:user|assistant|system|bot|human|tool)>|<(?:unused|extra_id|reserved|SPECIAL)_?\d+>|<[a-z]{1,12}:[a-z]{1,12}>"
    r"|\][~!][a-z]{1,3}[\[\]]", re.IGNORECASE
)  # fmt: skip


class ChatError(RuntimeError):
    """A request that failed; `retry` says whether another try may help, in `wait` seconds."""

    def __init__(self, message: str, *, retry: bool, wait: float = 0.0):
        super().__init__(message)
        self.retry = retry
        self.wait = wait


@dataclass(frozen=True, slots=True)
class ChatRequest:
    system: str
    user: str
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]


class ChatModel:
    """Cache and counters over `_ask`; thread safe.

    `counts`: requests sent, retries, answers from the cache, tokens of prompts and replies, requests
    that failed after every try, and those not sent because so many in a row had failed. `name` is the
    model's.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.counts: Counter[str] = Counter()
        self.last_error = ""
        self._cache: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, requests: Sequence[ChatRequest], read: Read) -> list[Any]:
        """What `read` makes of each reply; None where there is no reply that it can read.

        Equal requests are asked once. What failed is not cached.
        """
        keys = [_key(request) for request in requests]
        found: dict[bytes, Any] = {}
        todo: dict[bytes, ChatRequest] = {}
        with self._lock:
            for key, request in zip(keys, requests, strict=True):
                if key in self._cache:
                    self._cache.move_to_end(key)
                    found[key] = self._cache[key]
                    self.counts["cached"] += 1
                elif key in todo:
                    self.counts["cached"] += 1
                else:
                    todo[key] = request
        for key, value in zip(todo, self._ask(list(todo.values()), read), strict=True):
            found[key] = value
            with self._lock:
                if value is None:
                    self.counts["failed"] += 1
                    continue
                self._cache[key] = value
                if len(self._cache) > _MAX_CACHE:
                    self._cache.popitem(last=False)
        return [found[key] for key in keys]

    def _ask(self, requests: list[ChatRequest], read: Read) -> list[Any]:
        raise NotImplementedError

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)

    def _failed(self, error: object) -> None:
        with self._lock:
            self.last_error = str(error)


class ChatEndpoint(ChatModel):
    """A model behind an OpenAI-compatible endpoint, `num_threads` requests at a time.

    Raises ValueError for an address or number that cannot be. `timeout` is in seconds, of one try;
    between tries it waits `backoff`, twice as long each time, or what Retry-After says.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 30.0,
        num_retries: int = 3,
        backoff: float = 0.5,
        api_key: str = "",
        api_key_env: str = "",  # where it comes from, for the error of an endpoint that refuses it
        max_reply_tokens: int = 512,
        num_threads: int = 8,
    ):
        super().__init__(model)
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"the judge's url must be an http or https address, got {url!r}")
        if not model:
            raise ValueError(f"the judge's model must name the model behind {url}, got ''")
        if timeout <= 0 or num_retries < 0 or num_threads < 1 or max_reply_tokens < 1:
            raise ValueError(
                "timeout must be above 0, num_retries at least 0, num_threads and max_reply_tokens "
                f"at least 1, got {timeout}, {num_retries}, {num_threads}, {max_reply_tokens}"
            )
        self.url = _endpoint(url)
        self.model = model
        self.timeout = timeout
        self.num_retries = num_retries
        self.backoff = backoff
        self.max_reply_tokens = max_reply_tokens
        self.num_threads = num_threads
        self._api_key = api_key
        self._api_key_env = api_key_env

    def _ask(self, requests: list[ChatRequest], read: Read) -> list[Any]:
        failures = 0  # in a row; threads may count a few more before they see it

        def one(request: ChatRequest) -> Any:
            nonlocal failures
            if failures >= _MAX_FAILURES:
                self._count(given_up=1)
                return None
            value = self._try(request, read)
            failures = failures + 1 if value is None else 0
            return value

        if len(requests) <= 1:
            return [one(request) for request in requests]
        with ThreadPoolExecutor(max_workers=min(self.num_threads, len(requests))) as pool:
            return list(pool.map(one, requests))

    def _try(self, request: ChatRequest, read: Read) -> Any:
        temperature = request.temperature
        for attempt in range(self.num_retries + 1):
            body = {
                "model": self.model,
                "temperature": temperature,
                "seed": request.seed + attempt,
                "max_tokens": self.max_reply_tokens,
                "messages": request.messages(),
            }
            try:
                content = self._post(json.dumps(body).encode())
                value = read(content)
                if value is not None:
                    return value
                temperature = temperature or RETRY_TEMPERATURE
                error = ChatError(f"the judge's reply cannot be read: {content!r:.200}", retry=True)
            except ChatError as failed:
                error = failed
            self._failed(error)
            if not error.retry or attempt == self.num_retries:
                break
            self._count(retries=1)
            time.sleep(min(_MAX_WAIT, max(error.wait, self.backoff * 2**attempt)))
        return None

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        self._count(requests=1)
        deadline = time.monotonic() + self.timeout
        connections = _Connections()
        timer = threading.Timer(self.timeout, connections.cut)
        timer.daemon = True
        timer.start()
        try:
            with connections.opener.open(request, timeout=self.timeout) as response:
                raw = response.read(_MAX_REPLY_BYTES + 1)
                if time.monotonic() > deadline:  # cut off: what was read is not all
                    raise ChatError(f"no reply in {self.timeout:g} s", retry=True)
                if len(raw) > _MAX_REPLY_BYTES:
                    raise ChatError("the judge's reply is above 1 MiB", retry=False)
        except urllib.error.HTTPError as error:
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            try:
                detail = error.read(300).decode("utf-8", "replace")
            except (OSError, HTTPException, ValueError):
                detail = "its text was cut off"
            raise ChatError(
                f"{self.url} answered {error.code}: {detail}{self._remedy(error.code)}",
                retry=error.code in _RETRY_STATUS,
                wait=float(wait) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", wait) else 0.0,
            ) from None
        except (
            OSError,
            HTTPException,
            ValueError,
        ) as error:  # URLError, time-outs; a head that is none
            late = time.monotonic() > deadline
            reason = f"no reply in {self.timeout:g} s" if late else str(error)
            raise ChatError(f"{self.url} cannot be reached: {reason}", retry=True) from None
        finally:
            timer.cancel()
        return self._content(raw)

    def _remedy(self, status: int) -> str:
        """What would do where the endpoint refuses the key; "" for other errors."""
        if status not in (401, 403):
            return ""
        name = self._api_key_env
        if self._api_key:
            return f"; the key that was sent is refused: set another{f' in {name}' * bool(name)}"
        if name:
            return f"; no key was sent: set the environment variable {name} (judge.api_key_env)"
        return "; no key was sent: judge.api_key_env names the environment variable that holds it"

    def _content(self, raw: bytes) -> str:
        try:
            reply = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise ChatError(f"no chat completion: {raw[:200]!r}", retry=True) from None
        for name in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                self._count(**{name: usage[name]})
        return content if isinstance(content, str) else ""


class _Connections:
    """An opener whose connections can be cut off: a socket's own time-out begins anew at each byte."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        sockets, cuts = self._sockets, self

        def kept(base: type) -> type:
            class Kept(base):
                def connect(self) -> None:
                    super().connect()
                    sockets.append(self.sock)
                    if cuts.is_cut:
                        cuts.cut()

            return Kept

        class Http(urllib.request.HTTPHandler):
            def http_open(self, request):
                return self.do_open(kept(HTTPConnection), request)

        class NoRedirect(
            urllib.request.HTTPRedirectHandler
        ):  # it would take the key to another host
            def http_error_302(self, *_):
                return None

            http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, request):
                return self.do_open(kept(HTTPSConnection), request, context=self._context)

        self.is_cut = False
        self.opener = urllib.request.build_opener(Http, Https, NoRedirect)

    def cut(self) -> None:
        self.is_cut = True
        for connected in list(self._sockets):
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS is not unwrapped


class Fence:
    """Untrusted text between marks that its writer cannot know."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(16)

    def mark(self, *texts: str) -> str:
        """One mark for all `texts`: the same for the same texts, so that answers can be cached."""
        digest = hashlib.blake2b(key=self._secret, digest_size=12)
        for text in texts:
            digest.update(f"{len(text)}:{text}".encode("utf-8", "replace"))
        return f"=====UNTRUSTED-{digest.hexdigest()}====="


def defused(text: str) -> str:
    """`text` without what a chat template's tokenizer would read as control tokens.

    A space goes behind the first character of each: <|im_end|> becomes < |im_end|>.
    """
    return _CONTROL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def read_object(content: str) -> dict | None:
    """The JSON object that a reply is; a judge's own reasoning and a code fence are skipped."""
    content = content.strip()
    if content.startswith("<think>") or "<think>" not in content:  # templates may open the thought
        content = content.partition("</think>")[2].strip() or content
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", content, re.DOTALL):
        content = fenced[1]
    try:
        reply = json.loads(content, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _key(request: ChatRequest) -> bytes:
    fields = [request.system, request.user, request.temperature, request.seed]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


def _endpoint(url: str) -> str:
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        return url
    return url + ("" if re.search(r"/v\d+$", url) else "/v1") + "/chat/completions"
