"""One vLLM server over HTTP, with the standard library alone: JSON out, JSON in, within a deadline.

The environment's proxies are not asked, redirects are not followed: a redirect is an answer like any other
that is not 200.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import quote, urlsplit

CONNECT_SECONDS = 10.0
_CHUNK = 1 << 16
_RETRIED = frozenset({408, 425, 429})  # of the 4xx: the request is right, the moment is not


class ServerError(RuntimeError):
    """A server that does not answer as it should; another one may, or this one later."""


class Interrupted(ServerError):
    """A server has stopped a sample for new weights: it is to be sent again, and nothing is wrong."""


class RequestError(ValueError):
    """A server says that the request is wrong: every other one would say so too."""


class Call:
    """A request under way. Another thread may cut it off, also before it has begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.is_cut = False

    def take(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
            is_cut = self.is_cut
        if is_cut:
            self.cut()

    def cut(self) -> None:
        with self._lock:
            self.is_cut = True
            connected = self._socket
        if connected is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS is not unwrapped


class Client:
    """Requests to the server at `url`, from any thread; each has a connection of its own.

    Raises ValueError for an address that cannot be.
    """

    def __init__(self, url: str):
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.path not in ("", "/")
            or parts.query
            or port == -1
        ):
            raise ValueError(
                f"rollout.vllm.servers must be addresses such as http://127.0.0.1:8000, got {url!r}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.host, self.is_secure = parts.hostname, parts.scheme == "https"
        self.port = port or (443 if self.is_secure else 80)

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, by its address."""
        return self.host == "localhost" or self.host == "::1" or self.host.startswith("127.")

    def get(self, path: str, *, timeout: float) -> Any:
        return self.request("GET", path, None, timeout=timeout)

    def post(self, path: str, body: object = None, *, timeout: float, call: Call | None = None):
        return self.request("POST", path, body, timeout=timeout, call=call)

    def request(
        self,
        method: str,
        path: str,  # with its query
        body: object,  # what JSON can say; None: none
        *,
        timeout: float,  # seconds for all of it
        call: Call | None = None,
    ) -> Any:
        """The JSON of the reply, or None of an empty one.

        Raises RequestError where the server refuses the request for good, ServerError for all else.
        """
        deadline = time.monotonic() + timeout
        kind = HTTPSConnection if self.is_secure else HTTPConnection
        connection = kind(self.host, self.port, timeout=min(timeout, CONNECT_SECONDS))
        data, headers = None, {"Accept": "application/json"}
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            connection.connect()
            sock = connection.sock
            if call is not None:
                call.take(sock)
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            connection.request(method, quote(path, safe="/?=&"), data, headers)
            response = connection.getresponse()
            parts = []
            while not response.isclosed():
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (part := response.read1(_CHUNK)):
                    break
                parts.append(part)
                if time.monotonic() > deadline:  # it sends, but never all
                    raise TimeoutError
            raw = b"".join(parts)
            if response.length:  # of the announced body, what has not come
                raise ServerError(f"{self.url}{path} broke off its reply")
        except TimeoutError:
            raise ServerError(f"{self.url}{path} gave no reply in {timeout:g} s") from None
        except (OSError, HTTPException) as error:
            what = str(error) or type(error).__name__
            raise ServerError(f"{self.url}{path} cannot be reached: {what}") from None
        finally:
            connection.close()
        return self._read(path, response.status, raw)

    def _read(self, path: str, status: int, raw: bytes) -> Any:
        if status != 200:
            text = f"{self.url}{path} answers {status}: {raw[:300].decode('utf-8', 'replace')}"
            refused = 300 <= status < 500 and status not in _RETRIED
            raise (RequestError if refused else ServerError)(text)
        if not raw:
            return None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url}{path} answers what is no JSON: {raw[:80]!r}") from None
