"""What a layer keeps for its backward, and what is made again there.

    none       every tensor that the backward reads
    selective  not the outputs of norms, of the rotation and of SwiGLU: each is one pass over a tensor that is kept
               anyway. No product and no attention is computed twice
    full       the layer's input alone; its forward runs again in the backward

With H query heads, K kv heads of width Dh, model width D and MLP width F a layer keeps, in elements a token,
    none       4 D + 3 F + (2 H + 3 K) Dh + H Dh
    selective  2 D + 2 F + (H + 2 K) Dh + H Dh
    full       D
(v is a view of the qkv product.) Gradients are those of `none` bit for bit: the same kernels run on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MODES = ("none", "selective", "full")  # from the most memory to the least
# keep(make, source, *made): a context in which autograd saves nothing of `made`, the first results of
# make(source), and has them made again when it reads them
Keep = Callable[..., AbstractContextManager]


def keep_all(make: Callable, source: Tensor, *made: Tensor) -> AbstractContextManager:
    return nullcontext()


def keep_source(make: Callable, source: Tensor, *made: Tensor) -> AbstractContextManager:
    """`source` stays as it is until the backward, and so does what else `make` reads."""
    return _Again(make, source, made).hooks()


class _Again:
    """Stands for tensors in what autograd saves; makes them when the first is read, for all that will be."""

    def __init__(self, make: Callable, source: Tensor, made: tuple[Tensor, ...]):
        self.make, self.source = make, source.detach()
        self.keys = [_key(x) for x in made]
        self.num_saved = self.num_left = 0
        self.tensors: tuple[Tensor, ...] = ()

    def hooks(self) -> AbstractContextManager:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor) -> Any:
        if (key := _key(x)) not in self.keys:
            return x
        self.num_saved += 1
        return self.keys.index(key), x.shape

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        index, shape = saved
        if not self.tensors:
            with torch.no_grad():
                made = self.make(self.source)
            self.tensors = (made,) if isinstance(made, Tensor) else made
            self.num_left = self.num_saved
        found = self.tensors[index].view(shape)
        self.num_left -= 1
        if not self.num_left:
            self.tensors = ()
        return found


def _key(x: Tensor) -> tuple:
    """The same memory, read in the same order; a contiguous tensor may be saved in another shape."""
    layout: Any = x.is_contiguous() or (x.shape, x.stride())
    return x.data_ptr(), x.numel(), x.dtype, layout
