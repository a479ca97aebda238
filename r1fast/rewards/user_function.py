"""Calls of a user's reward function, which may fail, hang or take its time: with a deadline, and counted."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from r1fast.metrics import warn

MAX_FAILED = 3  # calls in a row


class UserFunction:
    """One function's calls. With a `timeout` each is in a thread of its own: one that hangs is left behind."""

    def __init__(self, name: str, timeout: float):
        if not timeout >= 0:
            raise ValueError(
                f"function_timeout must be at least 0 seconds (0 is off), got {timeout}"
            )
        self.name, self.timeout = name, timeout
        self.num_failed = 0  # in a row
        self.has_worked = False

    def __call__(self, function: Callable, **columns: Any) -> list | None:
        """The function's list; None where the call has failed.

        Raises RuntimeError where the first call fails, or MAX_FAILED in a row: a mistake, not an accident;
        and ValueError where no list comes back.
        """
        try:
            scores = function(**columns) if not self.timeout else self._in_time(function, columns)
        except Exception as error:
            self._failed(error)
            return None
        try:
            scores = list(scores)
        except TypeError:
            raise ValueError(
                f"reward {self.name!r} must return a list, got {type(scores).__name__}"
            ) from None
        self.num_failed, self.has_worked = 0, True
        return scores

    def _failed(self, error: Exception) -> None:
        self.num_failed += 1
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        what = f"reward {self.name!r} failed: {type(error).__name__}: {error}{where}"
        if not self.has_worked:
            raise RuntimeError(f"{what}, in its first call") from error
        if self.num_failed >= MAX_FAILED:
            raise RuntimeError(f"{what}, {self.num_failed} times in a row") from error
        warn(f"{what}; its scores of this step do not count")

    def _in_time(self, function: Callable, columns: dict[str, Any]) -> Any:
        outcome: list = []
        device = _device()

        def call() -> None:
            if device is not None:
                sys.modules["torch"].cuda.set_device(device)  # a thread's own setting
            try:
                outcome.append((function(**columns), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            raise TimeoutError(
                f"no answer in function_timeout = {self.timeout:g} s; the call is left behind in its "
                "thread. RewardScorer takes another function_timeout"
            )
        scores, error = outcome[0]
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(repr(error))
        return scores


def _device() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_device()
