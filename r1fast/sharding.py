"""Who holds what of a model in training: every rank all of it (ddp), or each a share (fsdp, PyTorch's FSDP2);
and which ranks train the same sequences.

                 ddp                              fsdp
    weights      whole, in model.dtype            float32 rows of this rank, which are the masters
    forward      as it is                         a layer's rows are gathered in model.dtype, and freed after it;
                                                  embedding, last norm and head from the forward to the end of the backward
    gradients    summed once an optimizer step    summed once a micro-batch, each rank keeping its own rows
    sampling     from the same weights            from the policy's model, which is whole inside of `whole` alone
    adapters     whole, trained as any weight     whole, trained as in ddp; the frozen base is in rows of model.dtype

With parallel.tensor_parallel = t (tensor_parallel.py) "the model" above is a rank's slice of it, an own decoder, and
the ranks that ddp and fsdp are over are those with the same slice; sampling is as in fsdp with either.

Each gathering, and so each forward and backward of a layer, is something that all ranks do together, and so do those
that have pieces of one micro-batch (parallel.context_parallel) or slices of one model. Ranks that are so `in_step` have
equally many micro-batches (`parts`), and stop at the same one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from r1fast import distributed
from r1fast.batch import idle_batch
from r1fast.config import Config, OptimConfig, ParallelConfig
from r1fast.context_parallel import check_heads, cut
from r1fast.distributed import RankGrid
from r1fast.lora import Adapter, adapters, lora_tensors, share_adapters
from r1fast.model import Decoder, ModelSpec
from r1fast.optim import Optimizer
from r1fast.policy import Policy
from r1fast.sharded_optimizer import DividedOptimizer, ShardedOptimizer
from r1fast.shards import Cut, Shard, Slice, shard_of
from r1fast.tensor_parallel import PARTIAL, check_divides, cuts, divided_decoder, local_spec
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


class Divided:
    """`model` has this rank's share of the policy's; the policy's own is empty but between `gather` and `free`."""

    is_sharded = in_step = True

    def __init__(self, policy: Policy, config: ParallelConfig, grid: RankGrid):
        self.policy, self.config, self.grid = policy, config, grid
        self.dtype, self.device = policy.model.head_weight.dtype, policy.device
        num_slices, spec = config.tensor_parallel, policy.model.spec
        # ranks that share a slice, and those that have the slices of one model
        self.data, self.tensor = distributed.mesh(config.replicas, policy.device.type, num_slices)
        self.name = config.mode + f" in {config.replicas} copies" * (config.replicas > 1)
        self.cuts: dict[str, Cut] = {}
        if self.tensor is not None:
            self.cuts = cuts(spec, self.tensor, config.vocab_parallel)
            but = "" if config.vocab_parallel else " but for the vocabulary"
            self.name += f", tensor parallel over {num_slices}{but}"
        self.name += _pieces(grid)
        self.model = self._divide(policy.model)
        shapes = {name: p.shape for name, p in policy.model.named_parameters()}
        whole = lora_tensors(self.model)
        self.shards = {
            name: self._shard_of(p, shapes[name], self.cuts.get(name))
            for name, p in self.model.named_parameters()
            if name not in whole
        }
        self._partial: list[Tensor] = []  # masters whose gradients are sums over slices too

    def make_optimizer(self, config: OptimConfig) -> Optimizer:
        made = self._optimizer(config)
        if self.tensor is not None:
            masters = zip(made.named, made.masters, strict=True)
            self._partial = [master for (name, _), master in masters if name.endswith(PARTIAL)]
        return made

    def trained(self) -> dict[str, Tensor | Shard]:
        return dict(self.shards)

    def stored(self) -> dict[str, Tensor | Shard]:
        return {name: x.of(x.part.to(self.dtype)) for name, x in self.shards.items()}

    def parts(self, batches: list[PackedBatch]) -> list[PackedBatch]:
        return _parts(batches, self.grid, self.device)

    def gather(self) -> None:
        fill_whole(self.policy.model, self.shards)

    def free(self) -> None:
        empty(self.policy.model, self.shards)

    def _optimizer(self, config: OptimConfig) -> Optimizer:
        raise NotImplementedError

    def _divide(self, whole: Decoder) -> Decoder:
        """A decoder with this rank's share of the weights of `whole`, which is empty afterwards."""
        raise NotImplementedError

    def _shard_of(self, p: nn.Parameter, shape: torch.Size, cut: Cut | None) -> Shard:
        """What of the whole parameter, of this shape, `p` is."""
        raise NotImplementedError

    def _sum_partial(self) -> None:
        if partial := [master for master in self._partial if master.grad is not None]:
            distributed.sum_gradients(partial, self.tensor.get_group(), self.device)

    def _blank(self, spec: ModelSpec) -> Decoder:
        if self.tensor is None:
            return Decoder(spec, device="meta")
        return divided_decoder(spec, self.tensor, self.config.vocab_parallel)

    @torch.no_grad()
    def _take(self, own: nn.Module, whole: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """This rank's slices of the parameters of `whole`, which has none afterwards; adapters are in both."""
        for (name, p), (module, key) in zip(whole.named_parameters(), _places(own), strict=True):
            assert name.endswith(key), (name, key)
            if isinstance(module, Adapter):
                continue
            cut = self.cuts.get(prefix + name)
            own_slice = (p if cut is None else cut.slice_of(p)).to(dtype, copy=True)
            setattr(module, key, nn.Parameter(own_slice, requires_grad=p.requires_grad))
            p.data = _nothing(p.shape, p.dtype, p.device)


class TensorDdp(Divided):
    """Every rank holds and trains its slice of each layer; those with the same slice are data parallel."""

    def sum_gradients(self, masters: Iterable[Tensor]) -> None:
        distributed.sum_gradients(masters, self.data.get_group())
        self._sum_partial()

    def _optimizer(self, config: OptimConfig) -> DividedOptimizer:
        named = self.model.named_parameters()
        return DividedOptimizer(named, config, self.shards, self.device, self.data.size())

    def _divide(self, whole: Decoder) -> Decoder:
        made = self._blank(whole.spec)
        made.checkpointing = whole.checkpointing
        for name, module in whole.named_children():
            self._take(getattr(made, name), module, f"{name}.", self.dtype)
        return made

    def _shard_of(self, p: nn.Parameter, shape: torch.Size, cut: Cut | None) -> Shard:
        return Slice(p.detach(), shape, None, cut, self.config.tensor_parallel)


class Fsdp(Divided):
    """Every rank holds rows of the model, or of its slice of it."""

    rows_dtype = torch.float32  # they are the masters

    def __init__(self, policy: Policy, config: ParallelConfig, grid: RankGrid):
        check_offload(config, policy.device)
        super().__init__(policy, config, grid)

    def sum_gradients(self, masters: Iterable[Tensor]) -> None:
        """They were, as they were made. What a forward without a backward has left gathered is freed."""
        self.model.reshard()
        self._sum_partial()

    def _optimizer(self, config: OptimConfig) -> Optimizer:
        named, copies = self.model.named_parameters(), self.config.replicas
        return ShardedOptimizer(named, config, self.shards, self.dtype, self.device, copies)

    def _divide(self, whole: Decoder) -> Decoder:
        """In `rows_dtype`, layer by layer, so that no rank has the whole in it."""
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        # of hidden states that `norm` gives as a view; nobody writes into them
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        options = {
            "mesh": self.data,
            # rotations and hidden states are of the type that the decoder gives them
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if self.dtype == self.rows_dtype else self.dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": CPUOffloadPolicy() if self.config.cpu_offload else OffloadPolicy(),
        }
        made = self._blank(whole.spec)
        made.checkpointing = whole.checkpointing
        share_adapters(whole, made)
        options["ignored_params"] = {p for _, a in adapters(made) for p in a.parameters()}
        for i, (own, layer) in enumerate(zip(made.layers, whole.layers, strict=True)):
            self._take(own, layer, f"layers.{i}.", self.rows_dtype)
            fully_shard(own, reshard_after_forward=self.config.reshard_after_forward, **options)
        for name in ("embed", "norm", "lm_head"):
            if getattr(whole, name) is not None:
                self._take(getattr(made, name), getattr(whole, name), f"{name}.", self.rows_dtype)
        # the loss takes the head's weight after the forward
        fully_shard(made, reshard_after_forward=False, **options)
        for module in made.modules():
            if isinstance(module, FSDPModule):  # denominators are global, so gradients are added up
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        made.unshard()  # from now on parts stay where they are
        made.reshard()
        return made

    def _shard_of(self, p: nn.Parameter, shape: torch.Size, cut: Cut | None) -> Shard:
        rows = shard_of(p)
        if self.tensor is None:
            return rows
        return Slice(rows.part, shape, rows.group, cut, self.config.tensor_parallel)


class LoraFsdp(Fsdp):
    """Every rank holds rows of the frozen base, and the adapters, which are small, whole: they are trained as in ddp."""

    def __init__(self, policy: Policy, config: ParallelConfig, grid: RankGrid):
        self.rows_dtype = policy.model.head_weight.dtype  # nothing is added to them
        super().__init__(policy, config, grid)

    def trained(self) -> dict[str, Tensor | Shard]:
        return dict(lora_tensors(self.model))

    def stored(self) -> dict[str, Tensor | Shard]:
        return self.trained()

    def sum_gradients(self, masters: Iterable[Tensor]) -> None:
        self.model.reshard()
        distributed.sum_gradients(masters)

    def _optimizer(self, config: OptimConfig) -> Optimizer:
        return Optimizer(self.model.named_parameters(), config)


def check_offload(config: ParallelConfig, device: torch.device) -> None:
    """ValueError where parallel.cpu_offload has nowhere to go."""
    if config.cpu_offload and device.type != "cuda":
        raise ValueError(
            "parallel.cpu_offload keeps shares in the host's memory for a GPU; on a CPU they are there"
        )


def make_parallel(policy: Policy, config: Config, *, can_shard: bool) -> Ddp | Divided:
    p = config.parallel
    numbers = ("context_parallel", "tensor_parallel")
    undivided = {"mode": '"ddp"'} if p.mode == "fsdp" else {}
    undivided |= {name: "1" for name in numbers if getattr(p, name) > 1}
    if undivided and not can_shard:
        instead = " and ".join(f"parallel.{key} = {value}" for key, value in undivided.items())
        raise ValueError(
            "the policies of SFT and RL can be divided, and their sequences; what is trained here is whole on every "
            f"process: set {instead} for it ([stages.<stage>.parallel] in a pipeline)"
        )
    grid = distributed.grid(p.context_parallel, p.tensor_parallel)
    if not undivided:
        return Ddp(policy, grid)
    spec = policy.model.spec
    check_divides(spec, p.tensor_parallel, p.vocab_parallel)
    check_heads(local_spec(spec, p.tensor_parallel, p.vocab_parallel), p.context_parallel)
    if p.mode == "fsdp":
        return (LoraFsdp if config.lora.rank else Fsdp)(policy, p, grid)
    return TensorDdp(policy, p, grid) if p.tensor_parallel > 1 else Ddp(policy, grid)


def _parts(batches: list[PackedBatch], grid: RankGrid, device: torch.device) -> list[PackedBatch]:
    missing = max(distributed.gather_objects(len(batches))) - len(batches)
    batches = [*batches, *(idle_batch(device) for _ in range(missing))]
    group = grid.context_group
    return batches if group is None else [cut(batch, group) for batch in batches]


def _pieces(grid: RankGrid) -> str:
    return f" with sequences over {grid.context} ranks" * (grid.context > 1)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Of every parameter, in their order."""
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_parameters(recurse=False)
    ]


def fill_whole(model: Decoder, shards: dict[str, Shard]) -> None:
    """Gather what is divided into a decoder of this form. All ranks call it."""
    own = dict(model.named_parameters())
    for name, shard in shards.items():
        p = own[name]
        p.data = shard.gather(p.dtype, p.device)


def empty(model: Decoder, names: Iterable[str]) -> None:
    """Free these weights: what is read until they are filled again is NaN."""
    own = dict(model.named_parameters())
    for p in (own[name] for name in names):
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
