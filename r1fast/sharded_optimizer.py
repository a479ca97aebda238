"""The optimizers of a model that is divided over ranks: each updates its own share, the norm is that of all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from r1fast import distributed
from r1fast.config import OptimConfig
from r1fast.optim import Optimizer
from r1fast.shards import Shard


class DividedOptimizer(Optimizer):
    """Parameters are shares of others, as `shards` says; masters and moments are divided as they are.

    `state_tensors` are those of an `Optimizer` on whole parameters, so that checkpoints are the same.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        shards: Mapping[str, Shard],
        device: torch.device,  # where ranks meet: shares may lie on the CPU
        num_copies: int,  # of the model that all ranks together hold
    ):
        self.shards, self.device, self.num_copies = shards, device, num_copies
        super().__init__(named_parameters, config)

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """Of the whole gradient, alike on all ranks, also where one replica alone is not finite."""
        by_holders: dict[int, list[Tensor]] = {}
        for (name, _), master in zip(self.named, self.masters, strict=True):
            if master.grad is not None:
                by_holders.setdefault(self.shards[name].num_holders, []).append(master.grad)
        own = sum(
            torch.nn.utils.get_total_norm(some).double().square().to(self.device) / n
            for n, some in by_holders.items()
        )
        total = distributed.all_reduce(own) / self.num_copies
        return total.sqrt().float().to(grads[0].device)

    def _shape(self, name: str, p: nn.Parameter) -> torch.Size:
        return self.shards[name].shape

    def _stored(self, name: str, x: Tensor) -> Shard:
        return self.shards[name].of(x)

    def _loaded(self, name: str, whole: Tensor) -> Tensor:
        return self.shards[name].rows_of(whole)


class ShardedOptimizer(DividedOptimizer):
    """Parameters of FSDP2 are float32 rows; the masters are those rows, in the same memory."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        shards: Mapping[str, Shard],
        dtype: torch.dtype,  # of the forward
        device: torch.device,
        num_copies: int,
    ):
        self.dtype = dtype
        super().__init__(named_parameters, config, shards, device, num_copies)

    def _make_master(self, name: str, p: nn.Parameter) -> Tensor:
        return self.shards[name].part.requires_grad_()

    def _has_master(self, p: nn.Parameter) -> bool:
        return self.dtype != torch.float32

    def _grad(self, p: nn.Parameter) -> Tensor:
        return p.grad.to_local()

    def _publish(self) -> None:
        """Nothing: the masters are the weights."""

    def spoil(self) -> None:
        master = max(self.masters, key=Tensor.numel)  # others may have no row here
        master.grad = torch.full_like(master, math.nan)
