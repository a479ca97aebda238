"""The optimizer of a model that is divided over ranks: each updates its own rows, the norm is that of all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from r1fast import distributed
from r1fast.config import OptimConfig
from r1fast.optim import Optimizer
from r1fast.shards import Shard, shard_of


class ShardedOptimizer(Optimizer):
    """Parameters of FSDP2 are float32 rows; the masters are those rows, in the same memory.

    `state_tensors` are those of an `Optimizer` on whole parameters of `dtype`, so that checkpoints are the same.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        dtype: torch.dtype,  # of the forward
        device: torch.device,  # where ranks meet: rows may lie on the CPU
        replicas: int,  # times that all ranks together hold the model
    ):
        self.dtype, self.device, self.replicas = dtype, device, replicas
        self.shards: dict[str, Shard] = {}
        super().__init__(named_parameters, config)

    def _make_master(self, name: str, p: nn.Parameter) -> Tensor:
        self.shards[name] = shard_of(p)
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

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """Of the whole gradient, alike on all ranks, also where one replica alone is not finite."""
        own = torch.nn.utils.get_total_norm(grads).double().square().to(self.device)
        total = distributed.all_reduce(own) / self.replicas
        return total.sqrt().float().to(grads[0].device)

    def _stored(self, name: str, x: Tensor) -> Shard:
        return self.shards[name].of(x)

    def _loaded(self, name: str, whole: Tensor) -> Tensor:
        return self.shards[name].rows_of(whole)
