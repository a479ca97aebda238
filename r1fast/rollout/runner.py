"""Runs the model for the engine: a chunk of prompts, or the next tokens of every running sample."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.paged_attention import DecodePlan, paged_attention, read_kv
from r1fast.model import Decoder
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.rows import Rows
from r1fast.rollout.scheduler import Chunk


class Runner:
    """`batch_invariant`: a row's results do not depend on the other rows."""

    def __init__(self, model: Decoder, *, batch_invariant: bool = False):
        self.model, self.batch_invariant = model, batch_invariant
        self.device = model.head_weight.device

    def weights_key(self) -> tuple:
        """Another one after the parameters have been written to or replaced."""
        return tuple((p.data_ptr(), p._version) for p in self.model.parameters())

    def reset(self) -> None:
        """Forget what was prepared from the weights."""

    def logits(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, V)
        return F.linear(hidden, self.model.head_weight)

    def copy_blocks(self, copies: list[tuple[int, int]], cache: KVCache) -> None:
        if copies:
            source, target = torch.tensor(copies, device=self.device).T
            cache.copy(source, target)

    def decode(self, rows: Rows, cache: KVCache, drafts: np.ndarray | None = None) -> Tensor:
        """(B, num_draft) drafts, -1: none. Returns (Nq, V) logits: a row's last token, then its drafts."""
        batch = rows.batch()
        slots, N = batch.slots, rows.block_size
        length = rows.length[slots]
        tokens, positions = rows.tokens[slots, length - 1], length - 1
        table = rows.blocks[
            slots,
            : cache.blocks_for(int(length.max()) + (0 if drafts is None else drafts.shape[1])),
        ]
        starts, context, row = None, length, np.arange(len(slots))
        if drafts is not None:
            counts = 1 + (drafts >= 0).sum(1)
            starts = np.concatenate(([0], np.cumsum(counts)))
            row = np.repeat(row, counts)
            offset = np.arange(len(row)) - starts[row]
            tokens = np.concatenate((tokens[:, None], drafts), 1)[row, offset]
            positions, context = positions[row] + offset, length + counts - 1
        slot_mapping = table[row, positions // N].astype(np.int64) * N + positions % N
        plan = DecodePlan(
            *(
                self._tensor(x.astype(np.int32))
                for x in (table, context, batch.group_starts, batch.shared_blocks)
            ),
            None if starts is None else self._tensor(starts.astype(np.int32)),
        )
        slot_mapping = self._tensor(slot_mapping)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, k, v, slot_mapping)
            return paged_attention(q, cache.layout, *cache.layers[layer], plan)

        hidden = self.model(self._tensor(tokens), self._tensor(positions), attend)
        return self.logits(hidden)

    def prefill(self, chunks: list[Chunk], cache: KVCache) -> Tensor:
        """Forward tokens of prompts into the cache. Returns (n, D): the last token's, where it is among them."""
        N = cache.block_size
        lengths = [end - start for _, start, end in chunks]
        cu = np.concatenate(([0], np.cumsum(lengths)))
        positions = np.concatenate([np.arange(start, end) for _, start, end in chunks])
        tokens = np.concatenate([job.tokens[start:end] for job, start, end in chunks])
        slots = np.concatenate([
            job.blocks[np.arange(start, end) // N].astype(np.int64) * N + np.arange(start, end) % N
            for job, start, end in chunks
        ])  # fmt: skip
        slot_mapping = self._tensor(slots)
        packed = PackedAttention(self._tensor(cu.astype(np.int32)), max(lengths))
        continued = [
            (int(cu[i]), int(cu[i + 1]), self._tensor(_slots(job.blocks, start, N)))
            for i, (job, start, _) in enumerate(chunks)
            if start
        ]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, k, v, slot_mapping)
            if len(continued) == len(chunks):
                out = torch.empty_like(q)
            else:
                out = packed(layer, q, k, v)
            for a, b, before in continued:
                past_k, past_v = read_kv(cache.layout, *cache.layers[layer], before)
                out[a:b] = _attend_after(q[a:b], past_k, past_v, k[a:b], v[a:b])
            return out

        hidden = self.model(self._tensor(tokens), self._tensor(positions), attend)
        last = [
            e - 1 for (job, _, end), e in zip(chunks, cu[1:], strict=True) if end == len(job.tokens)
        ]
        return hidden[self._tensor(np.array(last, np.int64))]

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, non_blocking=True)


def _slots(blocks: np.ndarray, end: int, block_size: int) -> np.ndarray:
    """Where positions [0, end) lie."""
    p = np.arange(end)
    return blocks[p // block_size].astype(np.int64) * block_size + p % block_size


def _attend_after(q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a chunk (n, H, Dh) over what was there before (L, K, Dh) and itself."""
    keys, values = torch.cat((past_k, k)), torch.cat((past_v, v))
    mask = torch.ones(len(q), len(keys), dtype=torch.bool, device=q.device).tril(len(past_k))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
        mask, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)
