"""A decoder whose heads, MLP and vocabulary are divided over a group of t ranks that train the same tokens.

    qkv, gate_up   rows: H / t heads of q, K / t of k and v; F / t channels of gate, the same of up. The input goes in
                   as it is, its gradient is summed over the group
    o, down        the columns that take those heads and channels. The output is summed, its gradient goes in as it is
    embed, head    rows of the vocabulary, with parallel.vocab_parallel: other ids look up 0 and the sum has the row;
                   the loss takes the group and sums two numbers a row (kernels/vocab_head.py)
    norms, biases of o and down
                   whole on each rank. Hidden states are the same on all, and so are these gradients, but those of
                   q_norm and k_norm, which see this rank's heads alone and are to be summed (`PARTIAL`)

So a layer sums (T, D) twice in its forward and twice in its backward (with its forward computed again there, two more).
Kernels take plain tensors: weights are slices in the forward, and DTensors where they are put together (shards.Cut).
Shapes: T tokens, D width, F MLP width, H query heads, K kv heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from r1fast.kernels.linear import linear
from r1fast.model import Decoder, Linear, ModelSpec
from r1fast.shards import Cut, chunk_of

PARTIAL = (".q_norm.weight", ".k_norm.weight")


class SharedFunction(torch.autograd.Function):
    """What each rank of the group goes on with in its own way: the gradients of all come back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.clone(memory_format=torch.contiguous_format)  # it may be someone else's too
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


class SummedFunction(torch.autograd.Function):
    """The sum of what the ranks have, in its place: each has the gradient of the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class DividedLinear(Linear):
    """In the place of `whole`, which has this rank's widths; on no device."""

    def __init__(self, whole: Linear, group: dist.ProcessGroup):
        super().__init__(
            whole.in_features,
            whole.out_features,
            bias=whole.bias is not None,
            device="meta",
        )
        self.group = group


class ColumnLinear(DividedLinear):
    """(T, D) -> (T, this rank's outputs)"""

    def forward(self, x: Tensor) -> Tensor:
        return linear(SharedFunction.apply(x, self.group), self.weight, self.bias)


class RowLinear(DividedLinear):
    """(T, this rank's inputs) -> (T, D), the same on all ranks"""

    def forward(self, x: Tensor) -> Tensor:
        y = SummedFunction.apply(linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabEmbedding(nn.Embedding):
    """(T,) -> (T, D), the same on all ranks, of which each has some rows from `first` on."""

    def __init__(self, num_rows: int, width: int, first: int, group: dist.ProcessGroup):
        super().__init__(num_rows, width, _weight=torch.empty(num_rows, width, device="meta"))
        self.first, self.group = first, group

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self.first
        is_other = (rows < 0) | (rows >= self.num_embeddings)
        x = F.embedding(rows.masked_fill(is_other, 0), self.weight)
        return SummedFunction.apply(x.masked_fill(is_other[:, None], 0), self.group)


def check_divides(spec: ModelSpec, num_ranks: int, vocab_parallel: bool) -> None:
    """ValueError where a model cannot be divided so."""
    for what, n in (
        ("key and value heads", spec.num_kv_heads),
        ("query heads", spec.num_heads),
        ("MLP channels (intermediate_size)", spec.intermediate_size),
    ):
        if n % num_ranks:
            fit = [t for t in range(1, num_ranks) if _fits(spec, t)]
            raise ValueError(
                f"parallel.tensor_parallel = {num_ranks} does not divide the model's {n} {what}: "
                f"set it to {' or '.join(map(str, fit))}"
            )
    if vocab_parallel and chunk_of(spec.vocab_size, num_ranks, num_ranks - 1)[1] <= 0:
        raise ValueError(
            f"parallel.tensor_parallel = {num_ranks} leaves a rank without any of the model's "
            f"{spec.vocab_size} tokens: set parallel.vocab_parallel = false"
        )


def _fits(spec: ModelSpec, num_ranks: int) -> bool:
    sizes = (spec.num_heads, spec.num_kv_heads, spec.intermediate_size)
    return not any(n % num_ranks for n in sizes)


def local_spec(spec: ModelSpec, num_ranks: int, vocab_parallel: bool, rank: int = 0) -> ModelSpec:
    """The shape of what a rank has; the first one has the most of the vocabulary."""
    V = spec.vocab_size
    return replace(
        spec,
        num_heads=spec.num_heads // num_ranks,
        num_kv_heads=spec.num_kv_heads // num_ranks,
        intermediate_size=spec.intermediate_size // num_ranks,
        vocab_size=chunk_of(V, num_ranks, rank)[1] if vocab_parallel else V,
    )


def divided_decoder(spec: ModelSpec, mesh: DeviceMesh, vocab_parallel: bool) -> Decoder:
    """This rank's, of the parameters' names and order that the whole has; on no device."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    own = local_spec(spec, mesh.size(), vocab_parallel, rank)
    made = Decoder(own, device="meta")
    made.spec = spec  # of the whole: layers know their own
    for layer in made.layers:
        for name, kind in (
            ("qkv", ColumnLinear), ("gate_up", ColumnLinear), ("o", RowLinear), ("down", RowLinear)
        ):  # fmt: skip
            setattr(layer, name, kind(getattr(layer, name), group))
    if vocab_parallel:
        first, _ = chunk_of(spec.vocab_size, mesh.size(), rank)
        made.embed = VocabEmbedding(own.vocab_size, spec.hidden_size, first, group)
        made.head_group = group
    return made


def cuts(spec: ModelSpec, mesh: DeviceMesh, vocab_parallel: bool) -> dict[str, Cut]:
    """How each parameter is divided; those that are not in it are whole on every rank."""
    found = {}
    model = Decoder(spec, device="meta")
    for i, layer in enumerate(model.layers):
        for module, name in ((layer.qkv, "qkv"), (layer.gate_up, "gate_up")):
            parts = next(parts for m, _, parts in layer.projections() if m is module)
            for kind, _ in module.named_parameters(recurse=False):
                found[f"layers.{i}.{name}.{kind}"] = Cut(0, tuple(parts.values()), mesh)
        for module, name in ((layer.o, "o"), (layer.down, "down")):
            found[f"layers.{i}.{name}.weight"] = Cut(1, (module.in_features,), mesh)
    if vocab_parallel:
        for name in ("embed.weight", "lm_head.weight"):
            found[name] = Cut(0, (spec.vocab_size,), mesh)
    return found
