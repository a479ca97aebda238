"""A client's connection, which ends where the client takes next to nothing of what waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SEND_TIMEOUT = 60.0  # seconds
LEAST = 64 << 10  # bytes that a client must take in that time, where as many wait


class Connection(H11Protocol):
    """uvicorn's own; one that is given up looks to the application as if the client had left."""

    def __init__(self, *args: Any, send_timeout: float = SEND_TIMEOUT, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.send_timeout = send_timeout
        self._timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:  # LEAST bytes wait: asyncio's own limit
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.send_timeout, self._check, waiting)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self, waited: int) -> None:
        if waited - self.transport.get_write_buffer_size() < LEAST:
            self.transport.abort()
        else:
            self._watch()
