"""Reads the bodies of requests in threads, so that a long one holds up nobody but its like."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from r1fast.policy import Policy
from r1fast.serve.fields import RequestError, parse_json
from r1fast.serve.requests import Generation

LONG = 64 << 10  # bytes; a shorter body takes some milliseconds, a longer one up to many seconds
MAX_LONG = 8  # bodies at work or waiting


class Reader:
    """Two threads: one for short bodies, one for long ones. A tokenizer is not safe in several threads,
    so the long ones' has a copy of its own; it lets go of the interpreter's lock while it works.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.policy_of_long = replace(policy, tokenizer=copy.deepcopy(policy.tokenizer))
        self.short, self.long = (
            ThreadPoolExecutor(1, thread_name_prefix=f"{kind} bodies") for kind in ("short", "long")
        )
        self.num_long = 0

    async def read(self, raw: bytes, read: Callable[[dict, Policy], Generation]) -> Generation:
        """`read` of the body's JSON. Raises RequestError; 429 where too many long ones wait."""

        def work(policy: Policy) -> Generation:
            return read(parse_json(raw), policy)

        loop = asyncio.get_running_loop()
        if len(raw) <= LONG:
            return await loop.run_in_executor(self.short, work, self.policy)
        if self.num_long == MAX_LONG:
            raise RequestError(
                f"{MAX_LONG} bodies over {LONG >> 10} KiB are being read already; try again later",
                status=429,
                code="too_many_long_requests",
            )
        self.num_long += 1
        done = loop.run_in_executor(self.long, work, self.policy_of_long)
        done.add_done_callback(self._count_down)  # also where nobody waits for it any more
        return await done

    def _count_down(self, done: asyncio.Future) -> None:
        self.num_long -= 1

    def close(self) -> None:
        self.short.shutdown()
        self.long.shutdown()
