"""What a step needs, by counting: parameters, tokens, FLOPs and bytes, from the shape of the model alone.

    forward    2 FLOPs a weight of a matrix and token, 4 H Dh a pair of query and key and layer,
               2 V D a token that is predicted
    training   three times as much: dX and dW are products of the same size (frozen weights: no dW)
A group's prompt is counted once a micro-batch, as it is forwarded. Shapes: D width, L layers, V vocabulary,
H query heads, K kv heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from r1fast.batch import lay_out
from r1fast.kernels.paged_attention import PagedLayout
from r1fast.kernels.vocab_head import VocabHead
from r1fast.model import Decoder, ModelSpec

Groups = Sequence[tuple[int, Sequence[int]]]  # tokens of a prompt, and of each of its completions


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model."""

    linears: int  # in the matrices of all layers
    table: int  # V D: the embedding, or the head
    total: int
    trained: int

    @classmethod
    def of(cls, model: Decoder) -> Size:
        """Of any device: a model on "meta" has no memory."""
        parameters = list(model.parameters())
        return cls(
            linears=sum(p.numel() for p in model.layers.parameters() if p.ndim == 2),
            table=model.head_weight.numel(),
            total=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """What one rank forwards in one pass over a step's sequences."""

    tokens: int  # forwarded
    targets: int  # predicted
    pairs: int  # of a query and a key that it sees
    micro_batches: int
    largest: int  # tokens of the largest micro-batch
    largest_targets: int

    def over(self, num_ranks: int) -> Counts:
        """What one of so many ranks has that share every micro-batch."""
        shares = {f.name: -(-getattr(self, f.name) // num_ranks) for f in fields(self)}
        return replace(self, **shares | {"micro_batches": self.micro_batches})


def count(groups: Groups, token_budget: int, *, cost_per_token: float = 0.0) -> Counts:
    """Packed as training packs them; a group of one has its prompt for itself."""
    sizes = []
    pairs = 0
    alone = [(p, [n]) for p, completions in groups for n in completions if p + n - 1 > token_budget]
    groups = [(p, [n for n in ns if p + n - 1 <= token_budget]) for p, ns in groups]
    groups = [(p, ns) for p, ns in groups if ns]
    bins = lay_out(groups, token_budget, cost_per_token) if groups else []
    batches = [[(groups[g][0], [groups[g][1][m] for m in ms]) for g, ms in b] for b in bins]
    for batch in [*batches, *([one] for one in alone)]:
        tokens = targets = 0
        for prompt, completions in batch:
            own = [n - 1 for n in completions]
            tokens += prompt + sum(own)
            targets += sum(completions)
            pairs += prompt * (prompt + 1) // 2
            pairs += sum(n * prompt + n * (n + 1) // 2 for n in own)
        sizes.append((tokens, targets))
    largest = max(sizes, default=(0, 0))
    return Counts(
        tokens=sum(t for t, _ in sizes),
        targets=sum(n for _, n in sizes),
        pairs=pairs,
        micro_batches=len(sizes),
        largest=largest[0],
        largest_targets=largest[1],
    )


def apart(groups: Groups) -> Groups:
    """Every completion with a prompt of its own."""
    return [(prompt, [n]) for prompt, completions in groups for n in completions]


def forward_flops(spec: ModelSpec, size: Size, counts: Counts) -> dict[str, float]:
    """Of the pass that `counts` is of."""
    pair = 4.0 * spec.num_heads * spec.head_dim * spec.num_layers
    return {
        "linear": 2.0 * size.linears * counts.tokens,
        "attention": pair * counts.pairs,
        "head": 2.0 * size.table * counts.targets,
    }


def rollout_flops(spec: ModelSpec, size: Size, groups: Groups) -> dict[str, float]:
    """Prompts once, then a token at a time; the last token of a completion is not forwarded."""
    pair = 4.0 * spec.num_heads * spec.head_dim * spec.num_layers
    prefill = sum(p for p, _ in groups)
    prefill_pairs = sum(p * (p + 1) // 2 for p, _ in groups)
    decoded = sum(n - 1 for _, ns in groups for n in ns)
    pairs = sum((n - 1) * p + (n - 1) * n // 2 for p, ns in groups for n in ns)
    heads = sum(len(ns) for _, ns in groups) + decoded
    return {
        "prefill": 2.0 * size.linears * prefill + pair * prefill_pairs,
        "decode": 2.0 * size.linears * decoded + pair * pairs + 2.0 * size.table * heads,
    }


def cache_bytes(
    spec: ModelSpec,
    groups: Groups,
    *,
    max_batch_size: int,
    block_size: int,
    dtype: torch.dtype,
    has_tails: bool = False,
) -> int:
    """Keys and values of a rollout at its fullest, all slots at the longest completions of their group.

    `has_tails`: what fills no block is held position by position, as the engine does on a CPU without drafts.
    """
    layout = PagedLayout(
        spec.num_kv_heads, spec.head_dim, block_size, dtype=dtype, device=torch.device("cpu")
    )
    slots, blocks, rows = max_batch_size, 0, 0
    for prompt, completions in groups:
        running = sorted(completions, reverse=True)[:slots]
        slots -= len(running)
        if has_tails:
            ends = [prompt + n - 1 for n in running]  # the last token is never looked back on
            blocks += prompt // block_size + sum(
                n // block_size - prompt // block_size for n in ends
            )
            rows += sum(n % block_size for n in ends)
        else:
            blocks += -(-prompt // block_size)
            blocks += sum(-(-(prompt + n) // block_size) - prompt // block_size for n in running)
    blocks += -(-rows // block_size)
    return blocks * layout.bytes_per_block() * spec.num_layers


def head_chunk_bytes(spec: ModelSpec, dtype: torch.dtype, device: str, num_targets: int) -> int:
    """The exponentials of a chunk of the fused loss."""
    V = spec.vocab_size
    if device != "cpu":
        rows = min(num_targets, max(2048, min(-(-num_targets // 11), 4096)))
        return rows * V * (4 if dtype == torch.float32 else 2)
    if not num_targets:
        return 0
    # the head itself says; its chunks do not depend on the width
    head = VocabHead(
        torch.empty(num_targets, 1, dtype=dtype),
        torch.empty(V, 1, dtype=dtype),
        torch.zeros(1, dtype=torch.int64),
    )
    return head.bytes_of(head.rows_per_chunk(num_targets, None))
