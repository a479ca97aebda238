"""Tensors that ranks hold together: this rank's rows, and the whole from those of all.

A tensor of n rows over S ranks is cut into pieces of ceil(n / S) rows, as FSDP2 does; the last ones may be shorter,
or empty. A name in a dict of tensors may stand for such a piece (`Shard`) or for a plain tensor, which all ranks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's rows of a tensor."""

    part: Tensor
    shape: torch.Size  # of the whole
    group: dist.ProcessGroup  # the ranks that together hold it once

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.part.itemsize

    def of(self, part: Tensor) -> Shard:
        """The same rows of another tensor of this shape."""
        assert part.shape == self.part.shape, (part.shape, self.part.shape)
        return replace(self, part=part)

    def rows_of(self, whole: Tensor) -> Tensor:
        """This rank's rows of `whole`, as a view."""
        start = self.group.rank() * self._num_rows
        return whole[start : start + self._num_rows]

    @torch.no_grad()
    def gather(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The whole on every rank of the group. All of them call it."""
        own = self._padded(dtype, device)
        whole = own.new_empty(len(own) * self.group.size(), *own.shape[1:])
        # its name from PyTorch 2.13 on, which warns of the older one
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(whole, own, group=self.group)
        return whole[: self.shape[0]]

    @torch.no_grad()
    def gather_to(self, rank: int) -> Tensor | None:
        """The whole on `rank`, on its CPU; None elsewhere. All ranks call it; those of its group send."""
        if rank not in dist.get_process_group_ranks(self.group):
            return None
        is_nccl = dist.get_backend(self.group) == "nccl"
        own = self._padded(self.dtype, torch.device("cuda" if is_nccl else "cpu"))
        is_receiver = dist.get_rank() == rank
        parts = [torch.empty_like(own) for _ in range(self.group.size())] if is_receiver else None
        dist.gather(own, parts, dst=rank, group=self.group)
        return parts and torch.cat([part.cpu() for part in parts])[: self.shape[0]]

    @property
    def _num_rows(self) -> int:
        """Of a rank's part, those of padding counted."""
        return -(-self.shape[0] // self.group.size())

    def _padded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        own = self.part.detach().to(device, dtype)
        if missing := self._num_rows - len(own):
            own = torch.cat((own, own.new_zeros(missing, *own.shape[1:])))
        return own.contiguous()


def shard_of(parameter: Tensor) -> Shard:
    """Of a parameter that FSDP2 has divided, in its own memory."""
    mesh = parameter.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    return Shard(parameter.detach().to_local(), parameter.shape, group)


def local(x: Tensor | Shard) -> Tensor:
    """What this rank has of it."""
    return x.part if isinstance(x, Shard) else x


def has_shards(named: Mapping[str, Tensor | Shard]) -> bool:
    return any(isinstance(x, Shard) for x in named.values())
