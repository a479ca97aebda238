"""Whether a model's weights are what they were: a quick look, and a complete one.

What is kept of older weights (packed copies, cached prefixes) must go when they change, and nobody needs
to say so: optimizers and users write parameters in place.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from r1fast.lora import adapters
from r1fast.model import Decoder

MIX = -7046029254386353131  # odd, so that multiplying by it loses nothing: 0x9E3779B97F4A7C15


def weights(model: Decoder) -> list[Tensor]:
    """What a forward reads now: the parameters, and what stands in for adapters' own."""
    instead = (adapter.instead or () for _, adapter in adapters(model))
    return [*model.parameters(), *chain.from_iterable(instead)]


def versions(model: Decoder) -> tuple:
    """Addresses and version counters of the weights, and which adapters are off.

    Fused optimizers and `.data` do not count.
    """
    found = weights(model)
    # an inference tensor has no counter
    counters = tuple(0 if p.is_inference() else p._version for p in found)
    are_on = tuple(adapter.is_on for _, adapter in adapters(model))
    return tuple(p.data_ptr() for p in found), counters, are_on


@torch.no_grad()
def checksums(parameters: Iterable[Tensor]) -> list[int]:
    """A 64-bit sum of each: one pass over memory.

    One element that changes changes it for certain, and so does what exchanges rows; several changes
    that cancel within a row do not.
    """
    return torch.stack([_checksum(p) for p in parameters]).tolist()


def _checksum(p: Tensor) -> Tensor:  # () int64
    p = p.reshape(len(p), -1)
    size = p.element_size()
    is_aligned = p.shape[1] * size % 8 == 0 and p.storage_offset() * size % 8 == 0
    wide = torch.int64 if is_aligned and p.is_contiguous() else _INTEGERS[size]
    rows = p.view(wide).sum(1, dtype=torch.int64)
    places = torch.arange(1, 2 * len(rows), 2, device=p.device)
    # the high half comes down, or a sign would move nothing but the top bit
    return ((rows ^ (rows >> 32 & 0xFFFFFFFF)) * (places * MIX)).sum()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
