"""How many tokens a micro-batch may have; half as many where one has not fitted into memory.

A mini-batch in which one does not fit is done again from its beginning with the smaller budget: what was
added up is dropped, so its gradient is that of a run which had this budget from the start, bit for bit.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from r1fast import distributed
from r1fast.interrupt import Stopped, boundary, giving_up
from r1fast.metrics import warn
from r1fast.watchdog import beat

T = TypeVar("T")


class MicroBatch(Protocol):
    num_tokens: int
    sequence_index: list[int]


B = TypeVar("B", bound=MicroBatch)
# of PyTorch's errors that are no torch.OutOfMemoryError: of the CPU, and of cuBLAS's own memory
MESSAGES = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")


class OutOfMemoryForGood(RuntimeError):
    """Nothing can be made smaller any more."""


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemoryForGood):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


class TokenBudget:
    """`discard` drops the gradients that were added up.

    Where a sequence alone does not fit, `relieve` makes room and says how; where it says nothing, it could
    not, and `advice` is in the error. Ranks that do every micro-batch `in_step`, with each other on that device,
    give one up together, and cannot do a mini-batch again: the others are amid it. Where several have pieces of
    one micro-batch, `num_tokens` is of a rank's piece.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        discard: Callable[[], None],
        relieve: Callable[[], str] = str,
        advice: str,
        was_halved: bool = False,
        in_step: torch.device | None = None,
    ):
        assert num_tokens >= 1, num_tokens
        self.num_tokens, self.was_halved = num_tokens, was_halved
        self.discard, self.relieve, self.advice = discard, relieve, advice
        self.in_step = in_step
        self._size: tuple[int, int] | None = None  # tokens and sequences of what runs
        self._stops: torch.Tensor | None = None  # whether a rank gave up at the micro-batch before

    def each(self, batches: Iterable[B]) -> Iterator[B]:
        """The micro-batches that `fitting` watches, one after the other."""
        for batch in batches:
            if self.in_step is None:
                boundary("train", f"{batch.num_tokens} tokens")
            else:
                self._common_boundary(f"{batch.num_tokens} tokens")
            self._size = batch.num_tokens, len(batch.sequence_index)
            yield batch
        self._size = None

    def _common_boundary(self, detail: str) -> None:
        """Raises Stopped on all ranks alike. One micro-batch late, so that no device is waited for meanwhile."""
        beat("train", detail)
        stops, self._stops = self._stops, None
        if stops is not None and bool(stops):
            raise Stopped
        flag = torch.tensor(float(giving_up()), device=self.in_step)
        self._stops = distributed.all_reduce(flag, "max")

    def fitting(self, attempt: Callable[[], T]) -> T:
        """`attempt()`, which packs by `num_tokens`; again with less where a micro-batch does not fit.

        Raises OutOfMemoryForGood where one sequence alone does not.
        """
        while True:
            self._size = None
            try:
                return attempt()
            except (RuntimeError, MemoryError) as error:
                if self._size is None or not is_out_of_memory(error):
                    raise
                said = str(error).strip().partition("\n")[0]
                if self.in_step is not None:
                    raise OutOfMemoryForGood(
                        f"out of memory in a micro-batch of {self._size[0]} tokens, which no rank can do again alone "
                        f'with parallel.mode = "fsdp", or parallel.context_parallel or tensor_parallel above 1 ({said}). '
                        f"Lower the token_budget. {self.advice}"
                    ) from error
            # outside of the clause: the error's frames hold what the attempt had in memory
            self.discard()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(*self._size, said)

    def _halve(self, num_tokens: int, num_sequences: int, said: str) -> None:
        if num_sequences == 1:
            if relief := self.relieve():
                warn(
                    f"out of memory in a micro-batch of one sequence of {num_tokens} tokens ({said}); "
                    f"from now on {relief}, with the same gradient"
                )
                return
            raise OutOfMemoryForGood(
                f"out of memory in a micro-batch of one sequence of {num_tokens} tokens, which cannot "
                f"be divided ({said}). {self.advice}"
            )
        before, self.was_halved = self.num_tokens, True
        self.num_tokens = max(1, min(before, num_tokens) // 2)
        warn(
            f"out of memory in a micro-batch of {num_tokens} tokens ({said}); from now on a "
            f"micro-batch has at most {self.num_tokens} tokens instead of {before}, with the same gradient"
        )

    def agree(self, device: torch.device) -> int:
        """The smallest budget of all ranks becomes everyone's."""
        if distributed.world_size() > 1:
            both = torch.tensor([self.num_tokens, not self.was_halved], device=device)
            self.num_tokens, unhalved = distributed.all_reduce(both, "min").tolist()
            self.was_halved = not unhalved
        return self.num_tokens
