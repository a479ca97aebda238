"""Ctrl-C and SIGTERM noted instead of obeyed at once, so that a step can end and be saved."""

import os
import signal
import threading
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside the block the first SIGINT or SIGTERM only sets `received`; a second acts as before.

    Handlers can be set in the main thread only: elsewhere this does nothing.
    """

    def __init__(self, notice: str = ""):
        self.notice = notice  # to stderr when the first signal comes; a step may take a while
        self.received = False
        self._before: dict = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        self._restore()
        if self.notice:
            os.write(2, f"\n{self.notice}\n".encode())  # buffered streams may be inside a write

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
