"""Runs the model for the engine: a chunk of prompts, or the next tokens of every running sample.

Two forwards with one meaning: `native` on a CPU that has AVX-512 or AVX2, else the model's own.
Shapes: B running rows, Nq tokens of a step, N tokens of prompts, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.paged_attention import DecodePlan, paged_attention, read_kv
from r1fast.lora import stacks, with_stacks
from r1fast.metrics import note
from r1fast.model import Decoder
from r1fast.rollout.cuda_graphs import Capture, CudaCapture, DecodeGraphs
from r1fast.rollout.decode_step import DecodeStep, Inputs, slots_of
from r1fast.rollout.draw import Draw, draws_in_graph
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.native import NativeForward, draws_alone, is_supported, why_not
from r1fast.rollout.rows import Rows
from r1fast.rollout.sampler import uniforms
from r1fast.rollout.scheduler import Chunk


@cache
def _note_once(text: str) -> None:
    note(text)


class Runner:
    """`batch_invariant` insists on what the native forward gives: a row's results are the same bits
    whatever else is in its step, and whether it was decoded, prefilled in chunks or computed again.
    `graph_rows` is for how many rows decode steps become CUDA graphs, on a GPU; 0: none.

    Raises ValueError where that cannot be had.
    """

    def __init__(self, model: Decoder, *, batch_invariant: bool = False, graph_rows: int = 0):
        self.model, self.batch_invariant = model, batch_invariant
        self.graphs: DecodeGraphs | None = None
        self.reset()
        if graph_rows and self.device.type == "cuda":
            self.use_graphs(graph_rows, partial(CudaCapture, self.device))

    def use_graphs(self, max_rows: int, make_capture: Callable[[], Capture]) -> None:
        self.graphs = DecodeGraphs(
            make_capture,
            max_rows=max_rows,
            max_positions=self.model.spec.max_position_embeddings,
            device=self.device,
        )
        self._addresses = self._weight_addresses()

    def _weight_addresses(self) -> tuple[int, ...]:
        return tuple(p.data_ptr() for p in self.model.parameters())

    def reset(self) -> None:
        """Forget what was prepared from the weights, which may be of another type or elsewhere now; but
        not graphs that read them where they still are.
        """
        self._native: NativeForward | None = None
        # for the model's own forward on a CPU: of adapters, and the head in float32
        self._stacks: list | None = None
        self._wide_head: Tensor | None = None
        weight = self.model.head_weight
        self.device = weight.device
        self.is_native = is_supported(self.model)
        reason = None if self.is_native else why_not(self.model.spec, weight.dtype, self.device)
        if self.batch_invariant and not self.is_native:
            raise ValueError(f"batch_invariant needs the CPU's native forward: {reason}")
        if reason is not None and self.device.type == "cpu":
            _note_once(f"the sampler takes PyTorch's forward, slower than the native one: {reason}")
        if self.graphs is not None and self.graphs.device != self.device:
            self.graphs = None
        elif self.graphs is not None and self._addresses != (now := self._weight_addresses()):
            self.graphs.clear()
            self._addresses = now

    def logits(self, hidden: Tensor) -> Tensor:  # (n, D) of `prefill` or `decode` -> (n, V)
        """In a buffer that the next call may use again. On a CPU in float32 at least, as in training."""
        if self.is_native:
            return self._native.logits(hidden)
        weight = self.model.head_weight
        # a GPU's stay in the weights' dtype: half of what each graph keeps of them, and read as they are
        if self.device.type != "cpu":
            return F.linear(hidden, weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.dtype == dtype:
            return F.linear(hidden, weight)
        if self._wide_head is None:  # without it one row takes 1.5 times as long
            self._wide_head = weight.detach().to(dtype)
        return F.linear(hidden.to(dtype), self._wide_head)

    def copy_blocks(self, copies: list[tuple[int, int]], cache: KVCache) -> None:
        if copies:
            source, target = torch.tensor(copies, device=self.device).T.contiguous()
            cache.copy(source, target)

    def decode(self, rows: Rows, cache: KVCache, drafts: np.ndarray | None = None) -> Tensor:
        """(B, num_draft) drafts, -1: none. Returns (Nq, V) logits: a row's last token's, then its drafts'."""
        tails = None if cache.tails is None else cache.tails.table
        step = DecodeStep.of(rows, drafts, tails)
        if self.graphs is not None:
            logits = self.graphs.logits(step, cache, self._decode)
            if logits is not None:
                return logits
        return self._decode(*step.to(self._tensor), cache)

    def can_decode_ahead(self, rows: Rows) -> bool:
        return self.graphs is not None and draws_in_graph(rows.batch())

    def decode_ahead(self, rows: Rows, cache: KVCache, num_steps: int) -> list[Draw] | None:
        """What `num_steps` steps draw, B entries each, made without the host between them; None: no graph can.

        A row goes on after a token that ends it. There must be blocks for all steps.
        """
        batch = rows.batch()
        step = DecodeStep.of(rows, num_steps=num_steps)
        place = rows.length[batch.slots] - rows.prompt_length[batch.slots]
        u = np.stack([uniforms(rows.seed[batch.slots], place + j) for j in range(num_steps)])
        temperature = rows.temperature[batch.slots]
        found = self.graphs.draws(step, u, temperature, cache, self._decode)
        if found is None:
            return None
        none = np.zeros(len(batch.slots), bool)
        return [
            Draw(tokens, is_bad, none, {"logprobs": logprobs}, None, None)
            for tokens, logprobs, is_bad in zip(*found, strict=True)
        ]

    def can_decode_many(self, rows: Rows) -> bool:
        """Whether steps are C++ from forward to draw."""
        return self.is_native and self.graphs is None and draws_alone(rows.batch())

    def decode_many(self, rows: Rows, cache: KVCache, max_steps: int) -> tuple[int, np.ndarray]:
        """NativeForward.decode"""
        return self._native_of(cache).decode(rows, max_steps)

    def _decode(self, inputs: Inputs, plan: DecodePlan, cache: KVCache) -> Tensor:  # (Nq, V)
        """Shapes alone decide what it does, so that a graph of it holds for other contents."""
        if self.is_native:
            return self.logits(self._native_forward(inputs, cache, plan))

        def attend(layer: int, q: Tensor) -> Tensor:
            return paged_attention(q, cache.layout, *cache.layers[layer], plan)

        return self.logits(self._forward(inputs, cache, attend))

    def prefill(self, chunks: list[Chunk], cache: KVCache) -> Tensor:
        """Forward tokens of prompts into the cache. Returns (n, D): the last token's of those that end."""
        last = np.cumsum([end - start for _, start, end in chunks]) - 1
        ends = [end == len(job.tokens) for job, _, end in chunks]
        return self.forward_chunks(chunks, cache)[self._tensor(last[ends])]

    def forward_chunks(self, chunks: list[Chunk], cache: KVCache) -> Tensor:
        """(N, D) of all their tokens, in a buffer that the next call may use again."""
        N = cache.block_size
        positions = np.concatenate([np.arange(start, end) for _, start, end in chunks])
        tokens = np.concatenate([job.tokens[start:end] for job, start, end in chunks])
        blocks = np.concatenate(
            [job.blocks[np.arange(start, end) // N] for job, start, end in chunks]
        )
        slots = slots_of(blocks, positions, N)
        inputs = Inputs(*map(self._tensor, (tokens, positions, slots)))
        starts = np.concatenate(([0], np.cumsum([end - start for _, start, end in chunks])))
        if self.is_native:  # as fast as SDPA, and the same sums as in decode
            return self._native_forward(inputs, cache, self._prefill_plan(chunks, starts, cache))
        return self._forward(inputs, cache, _Chunks(cache, chunks, starts, self.device))

    def _prefill_plan(self, chunks: list[Chunk], starts: np.ndarray, cache: KVCache) -> DecodePlan:
        """Every chunk a sequence of its own, with as many queries as it has tokens."""
        context = np.array([end for _, _, end in chunks])
        table = np.zeros((len(chunks), cache.blocks_for(int(context.max()))), np.int32)
        for row, (job, _, end) in zip(table, chunks, strict=True):
            row[: cache.blocks_for(end)] = job.blocks[: cache.blocks_for(end)]
        groups, shared = np.arange(len(chunks) + 1), np.zeros(len(chunks))
        return DecodePlan(*map(self._int32, (table, context, groups, shared, starts)))

    def _native_of(self, cache: KVCache) -> NativeForward:
        if self._native is None or self._native.cache is not cache:
            self._native = NativeForward(self.model, cache)
        return self._native

    def _native_forward(self, inputs: Inputs, cache: KVCache, plan: DecodePlan) -> Tensor:  # (N, D)
        return self._native_of(cache).forward(inputs, plan)

    def _forward(self, inputs: Inputs, cache: KVCache, attend) -> Tensor:  # (N, D)
        x = inputs

        def write_and_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, k, v, x.slots)
            return attend(layer, q)

        if self.device.type != "cpu":  # graphs read the adapters where they lie
            return self.model(x.tokens, x.positions, write_and_attend)
        if self._stacks is None:
            self._stacks = stacks(self.model)
        with with_stacks(self.model, self._stacks):
            return self.model(x.tokens, x.positions, write_and_attend)

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, non_blocking=True)

    def _int32(self, x: np.ndarray) -> Tensor:
        return self._tensor(x.astype(np.int32))


class _Chunks:
    """Attention of chunks of prompts, each over what the cache holds of its own prompt.

    Those that begin their prompt take one packed call, as in training.
    """

    def __init__(self, cache: KVCache, chunks: list[Chunk], starts: np.ndarray, device):
        self.cache = cache
        N = cache.block_size
        first = [i for i, (_, start, _) in enumerate(chunks) if start == 0]
        self.slots, self.continued = [], []
        lengths = [chunks[i][2] for i in first]
        cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        self.packed = PackedAttention(cu, max(lengths)) if first else None
        fresh = [np.arange(starts[i], starts[i + 1]) for i in first]
        is_all = len(first) == len(chunks)
        self.fresh = slice(None) if is_all else _index(fresh, device)
        slots = [_slots(chunks[i][0].blocks, chunks[i][2], N) for i in first]
        self.fresh_slots = _index(slots, device)
        for i, (job, start, end) in enumerate(chunks):
            if start:
                slots = torch.from_numpy(_slots(job.blocks, end, N)).to(device)
                self.continued.append((int(starts[i]), int(starts[i + 1]), slots))

    def __call__(self, layer: int, q: Tensor) -> Tensor:  # (N, H, Dh) -> (N, H, Dh)
        out = torch.empty_like(q)
        layout, (keys, values) = self.cache.layout, self.cache.layers[layer]
        if self.packed is not None:
            k, v = read_kv(layout, keys, values, self.fresh_slots)
            out[self.fresh] = self.packed(layer, q[self.fresh], k, v)
        for a, b, slots in self.continued:
            k, v = read_kv(layout, keys, values, slots)
            # a chunk's queries are the last of these positions
            seen = torch.ones(b - a, len(k), dtype=torch.bool, device=q.device)
            mixed = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q[a:b], k, v)),
                seen.tril(len(k) - (b - a)),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[a:b] = mixed[0].transpose(0, 1)
        return out


def _index(parts: list[np.ndarray], device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts])).to(device)


def _slots(blocks: np.ndarray, end: int, block_size: int) -> np.ndarray:
    """Where positions [0, end) lie."""
    p = np.arange(end)
    return slots_of(blocks[p // block_size], p, block_size)
