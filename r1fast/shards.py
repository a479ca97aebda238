"""Tensors that ranks hold together: this rank's rows, and the whole from those of all.

A tensor of n rows over S ranks is cut into pieces of ceil(n / S) rows, as FSDP2 and DTensor do; the last ones may be
shorter, or empty. In tensor parallelism it is cut first over the ranks that train the same tokens, by rows or by
columns (`Cut`), and such a slice may then be held by rows (`Slice`). A name in a dict of tensors may stand for a piece
(`Shard`) or for a plain tensor, which all ranks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


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

    @property
    def num_holders(self) -> int:
        """Ranks that have the same part, of those that together hold the model once."""
        return 1

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


def chunk_of(size: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """(first, how many) of `size` elements are a rank's."""
    most = -(-size // num_ranks)
    return min(most * rank, size), max(0, min(most, size - most * rank))


@dataclass(frozen=True, slots=True)
class Cut:
    """How tensors are divided over the ranks of `mesh` along `dim`: each of the fused `parts` by itself, such as q, k, v."""

    dim: int
    parts: tuple[int, ...]  # their sizes along `dim`
    mesh: DeviceMesh

    def slice_of(self, whole: Tensor) -> Tensor:
        """This rank's; a copy where there are several parts."""
        found = [
            part.narrow(self.dim, *self._place(n))
            for n, part in zip(self.parts, whole.split(self.parts, self.dim), strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)

    @torch.no_grad()
    def whole_of(self, own: Tensor) -> Tensor:
        """From the slices of all ranks, which call it together."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as Placement

        found = []
        lengths = [self._place(n)[1] for n in self.parts]
        for n, part in zip(self.parts, own.split(lengths, self.dim), strict=True):
            shape = [*part.shape]
            shape[self.dim] = n
            stride = torch.empty(shape, device="meta").stride()
            divided = DTensor.from_local(
                part.contiguous(),
                self.mesh,
                [Placement(self.dim)],
                shape=torch.Size(shape),
                stride=stride,
            )
            found.append(divided.full_tensor())
        return found[0] if len(found) == 1 else torch.cat(found, self.dim)

    def shape_of(self, whole: torch.Size) -> torch.Size:
        """Of this rank's slice."""
        shape = [*whole]
        shape[self.dim] = sum(self._place(n)[1] for n in self.parts)
        return torch.Size(shape)

    def _place(self, size: int) -> tuple[int, int]:
        return chunk_of(size, self.mesh.size(), self.mesh.get_local_rank())


@dataclass(frozen=True, slots=True)
class Slice(Shard):
    """This rank's rows of its slice of a tensor: the slice is what `group` holds together, without one each rank.

    `cut` is None for what all ranks of the tensor-parallel group have, `num_slices`.
    """

    group: dist.ProcessGroup | None
    cut: Cut | None
    num_slices: int

    @property
    def num_holders(self) -> int:
        return self.num_slices if self.cut is None else 1

    def rows_of(self, whole: Tensor) -> Tensor:
        own = whole if self.cut is None else self.cut.slice_of(whole)
        return own if self.group is None else self._rows().rows_of(own)

    @torch.no_grad()
    def gather(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The whole on every rank; where nothing is divided, in this rank's own memory."""
        if self.group is None:
            own = self.part.detach().to(device, dtype)
        else:
            own = self._rows().gather(dtype, device)
        return own if self.cut is None else self.cut.whole_of(own)

    @torch.no_grad()
    def gather_to(self, rank: int) -> Tensor | None:
        # all ranks have it for a moment: as each is the receiver of others, it takes as long
        where = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        whole = self.gather(self.dtype, where)
        return whole.to("cpu", copy=True) if dist.get_rank() == rank else None

    def _rows(self) -> Shard:
        shape = self.shape if self.cut is None else self.cut.shape_of(self.shape)
        return Shard(self.part, shape, self.group)


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
