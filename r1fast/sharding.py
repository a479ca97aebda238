"""Who holds what of a model in training: every rank all of it (ddp), or each a share (fsdp, PyTorch's FSDP2);
and which ranks train the same sequences.

                 ddp                              fsdp
    weights      whole, in model.dtype            float32 rows of this rank, which are the masters
    forward      as it is                         a layer's rows are gathered in model.dtype, and freed after it;
                                                  embedding, last norm and head from the forward to the end of the backward
    gradients    summed once an optimizer step    summed once a micro-batch, each rank keeping its own rows
    sampling     from the same weights            from the policy's model, which is whole inside of `whole` alone

Each gathering, and so each forward and backward of a layer, is something that all ranks do together, and so do those
that have pieces of one micro-batch (parallel.context_parallel). Ranks that are so `in_step` have equally many micro-batches
(`parts`), and stop at the same one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from r1fast import distributed
from r1fast.batch import idle_batch
from r1fast.config import Config, OptimConfig, ParallelConfig
from r1fast.context_parallel import check_heads, cut
from r1fast.distributed import RankGrid
from r1fast.model import Decoder, ModelSpec
from r1fast.optim import Optimizer
from r1fast.policy import Policy
from r1fast.sharded_optimizer import ShardedOptimizer
from r1fast.shards import Shard, shard_of
from r1fast.types import PackedBatch


class Ddp:
    """Every rank holds, samples from and trains the policy's own model."""

    is_sharded = False

    def __init__(self, policy: Policy, grid: RankGrid):
        self.model, self.grid, self.device = policy.model, grid, policy.device
        self.name = "ddp" + _pieces(grid)
        self.in_step = grid.group_size > 1

    def make_optimizer(self, config: OptimConfig) -> Optimizer:
        return Optimizer(self.model.named_parameters(), config)

    def trained(self) -> dict[str, Tensor | Shard]:
        """What is updated, in its own memory."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def stored(self) -> dict[str, Tensor | Shard]:
        """The same as a checkpoint holds it."""
        return self.trained()

    def parts(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        """What this rank has of its data rank's micro-batches, as many as the others have where they are in step."""
        return _parts(batches, self.grid, self.device) if self.in_step else batches

    def sum_gradients(self, masters: Iterable[Tensor]) -> None:
        """Over ranks, before an optimizer step."""
        distributed.sum_gradients(masters)

    def gather(self) -> None:
        """The policy's model is whole until `free`. Ranks call it together."""

    def free(self) -> None:
        pass


class Fsdp:
    """`model` is the policy's with its rows divided; the policy's own is empty but between `gather` and `free`."""

    is_sharded = in_step = True

    def __init__(self, policy: Policy, config: ParallelConfig, grid: RankGrid):
        if config.cpu_offload and policy.device.type != "cuda":
            raise ValueError(
                "parallel.cpu_offload keeps shares in the host's memory for a GPU; on a CPU they are there"
            )
        self.policy, self.replicas, self.grid = policy, config.replicas, grid
        self.name = "fsdp" + f" in {config.replicas} copies" * (config.replicas > 1) + _pieces(grid)
        self.dtype, self.device = policy.model.head_weight.dtype, policy.device
        mesh = distributed.mesh(config.replicas, policy.device.type)
        self.model = divided(policy.model, config, mesh)
        self.shards = {name: shard_of(p) for name, p in self.model.named_parameters()}

    def make_optimizer(self, config: OptimConfig) -> ShardedOptimizer:
        return ShardedOptimizer(
            self.model.named_parameters(), config, self.dtype, self.device, self.replicas
        )

    def trained(self) -> dict[str, Tensor | Shard]:
        return dict(self.shards)

    def stored(self) -> dict[str, Tensor | Shard]:
        return {name: x.of(x.part.to(self.dtype)) for name, x in self.shards.items()}

    def parts(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        return _parts(batches, self.grid, self.device)

    def sum_gradients(self, masters: Iterable[Tensor]) -> None:
        """They were, as they were made. What a forward without a backward has left gathered is freed."""
        self.model.reshard()

    def gather(self) -> None:
        fill_whole(self.policy.model, self.shards)

    def free(self) -> None:
        empty(self.policy.model)


def make_parallel(policy: Policy, config: Config, *, can_shard: bool) -> Ddp | Fsdp:
    p = config.parallel
    if p.context_parallel > 1 and not can_shard:
        raise ValueError(
            "parallel.context_parallel divides the sequences of SFT and RL; what is trained here has whole ones on "
            "each process: set parallel.context_parallel = 1 for it ([stages.<stage>.parallel] in a pipeline)"
        )
    grid = distributed.grid(p.context_parallel, p.tensor_parallel, policy.device.type)
    if p.context_parallel > 1:
        check_heads(policy.model.spec, p.context_parallel)
    if p.mode == "ddp":
        return Ddp(policy, grid)
    if not can_shard:
        raise ValueError(
            'parallel.mode = "fsdp" divides the policies of SFT and RL; what is trained here has every process '
            'hold all of it: set parallel.mode = "ddp" for it ([stages.<stage>.parallel] in a pipeline)'
        )
    return Fsdp(policy, p, grid)


def _parts(batches: list[PackedBatch], grid: RankGrid, device: torch.device) -> list[PackedBatch]:
    missing = max(distributed.gather_objects(len(batches))) - len(batches)
    batches = [*batches, *(idle_batch(device) for _ in range(missing))]
    group = grid.context_group
    return batches if group is None else [cut(batch, group) for batch in batches]


def _pieces(grid: RankGrid) -> str:
    return f" with sequences over {grid.context} ranks" * (grid.context > 1)


def divided(model: Decoder, config: ParallelConfig, mesh: DeviceMesh) -> Decoder:
    """A decoder with the weights of `model`, in float32 and divided over `mesh`; `model` is empty afterwards.

    Layer by layer, so that no rank has the whole in float32.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    # of hidden states that `norm` gives as a view; nobody writes into them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    dtype = model.head_weight.dtype
    options = {
        "mesh": mesh,
        # rotations and hidden states are of the type that the decoder gives them
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    made = Decoder(model.spec, device="meta")
    made.checkpointing = model.checkpointing
    for own, whole in zip(made.layers, model.layers, strict=True):
        _take(own, whole)
        fully_shard(own, reshard_after_forward=config.reshard_after_forward, **options)
    for name in ("embed", "norm", "lm_head"):
        if getattr(model, name) is not None:
            _take(getattr(made, name), getattr(model, name))
    # the loss takes the head's weight after the forward
    fully_shard(made, reshard_after_forward=False, **options)
    for module in made.modules():
        if isinstance(module, FSDPModule):  # denominators are global, so gradients are added up
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    made.unshard()  # from now on parts stay where they are
    made.reshard()
    return made


@torch.no_grad()
def _take(own: nn.Module, whole: nn.Module) -> None:
    """The parameters of `whole` in float32, which has none afterwards."""
    for (name, p), (module, key) in zip(whole.named_parameters(), _places(own), strict=True):
        assert name.endswith(key), (name, key)
        setattr(module, key, nn.Parameter(p.to(torch.float32, copy=True)))
        p.data = _nothing(p.shape, p.dtype, p.device)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Of every parameter, in their order."""
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_parameters(recurse=False)
    ]


def fill_whole(model: Decoder, shards: dict[str, Shard]) -> None:
    """Gather all weights into a decoder of this form. All ranks call it."""
    for name, p in model.named_parameters():
        p.data = shards[name].gather(p.dtype, p.device)


def empty(model: Decoder) -> None:
    """Free its weights: what is read until they are filled again is NaN."""
    for p in model.parameters():
        p.data = _nothing(p.shape, p.dtype, p.device)


def hollow(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Decoder:
    """An empty decoder, for `fill_whole`."""
    model = Decoder(spec, dtype=dtype, device="meta")
    for module, name in _places(model):
        x = _nothing(getattr(module, name).shape, dtype, device)
        setattr(module, name, nn.Parameter(x, requires_grad=False))
    return model


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN in this shape, of the memory of one element."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
