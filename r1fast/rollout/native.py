"""The decoder's forward for the CPU, without autograd: packed weights, fused rows, static buffers.

The same layer as `model.DecoderLayer`, rounded in the same places: csrc/decoder.hpp runs it, a call a step.
Weights are packed once for each version of the weights: a second copy, which makes a product 1.2 to 2.5
times as fast at decode's few rows. An element's sum has one fixed order, so a row's hidden state is the
same bits whatever rows are beside it.
Shapes: N tokens, D width, H query heads, K kv heads, Dh head width, V vocabulary.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast import _C
from r1fast.kernels.lora_linear import WHOLE_TILES as MULTIPLE
from r1fast.kernels.lora_linear import side_by_side
from r1fast.kernels.paged_attention import DecodePlan
from r1fast.model import Decoder, Linear, ModelSpec
from r1fast.rollout.decode_step import Inputs
from r1fast.rollout.kv_cache import KVCache
from r1fast.rollout.rows import Batch, Rows

MAX_HEAD_DIM = 1024
MAX_SECONDS = 0.05  # of one call: signals and other requests wait for its end


def why_not(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps a model from the native forward here, for a message; None: nothing does."""
    if device.type != "cpu":
        return f"it needs a CPU, the weights are on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it needs float32 or bfloat16 weights, got {str(dtype).removeprefix('torch.')}"
    if _C.native_level(dtype == torch.bfloat16) == "baseline":
        is_asked = os.environ.get("R1FAST_CPU_LEVEL") == "baseline"
        why = "R1FAST_CPU_LEVEL=baseline leaves out" if is_asked else "this CPU has not"
        return f"it needs AVX2, which {why}"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"it needs a head_dim of at most {MAX_HEAD_DIM}, got {spec.head_dim}"
    for name in ("hidden_size", "intermediate_size"):
        if (size := getattr(spec, name)) % 2:
            return f"it needs an even {name}, got {size}"
    return None


def is_supported(model: Decoder) -> bool:
    """Whether this CPU and this model can take the native forward."""
    weight = model.head_weight
    return why_not(model.spec, weight.dtype, weight.device) is None


class PackedWeight:
    """y = x W^T of one weight (N, D), packed; `halved` puts silu and the product of its halves after it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, halved: bool = False):
        assert weight.stride(1) == 1, weight.stride()
        self.bias = bias  # is read where it lies
        self.packed = _of_type("PackedLinear", weight.dtype)(
            weight.data_ptr(), weight.stride(0), 0 if bias is None else bias.data_ptr(),
            *weight.shape, halved, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self, x: Tensor, y: Tensor, num_rows: int, after: "_C.After") -> None:
        """x (R, >= D), y (R, >= N) of x's dtype or, to store alone, float32. `padded` made both."""
        self.packed.run(
            x.data_ptr(), x.stride(0), num_rows, y.data_ptr(), y.stride(0), after,
            y.dtype == torch.float32, torch.get_num_threads(),
        )  # fmt: skip


def padded(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros with room to be read in whole tiles."""
    rows, width = (-(-n // MULTIPLE) * MULTIPLE for n in (num_rows, width))
    return torch.zeros(rows, width, dtype=dtype)


class NativeForward:
    """The decoder's hidden states and logits. Made anew when the weights, or the cache, change."""

    def __init__(self, model: Decoder, cache: KVCache):
        self.model, self.spec, self.cache = model, model.spec, cache
        self.dtype = model.head_weight.dtype
        self.decoder = self._make_decoder()
        self.head = PackedWeight(model.head_weight)
        self.loop = _of_type("DecodeLoop", self.dtype)(
            self.decoder, self.head.packed, self.spec.vocab_size
        )
        self._hidden = self._picked = padded(0, self.spec.hidden_size, self.dtype)
        self._logits = torch.empty(0)

    def _make_decoder(self) -> "_C.DecoderF32":
        model, spec = self.model, self.spec
        embedding = model.embed.weight.detach()
        decoder = _of_type("Decoder", self.dtype)(
            spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim,
            spec.intermediate_size, spec.rms_norm_eps, embedding.data_ptr(), embedding.stride(0),
            model.norm.weight.data_ptr(),
        )  # fmt: skip
        self._packed = []  # their biases are read where they lie
        # so are embeddings and norms: a parameter that is replaced must not take its memory along
        self._kept = [p.detach() for p in model.parameters()]
        for layer, (keys, values) in zip(model.layers, self.cache.layers, strict=True):
            packed, low_rank = zip(
                _pack(layer.qkv), _pack(layer.o), _pack(layer.gate_up, halved=True),
                _pack(layer.down), strict=True,
            )  # fmt: skip
            self._packed += packed
            q_norm, k_norm = (
                getattr(layer, name).weight.data_ptr() if spec.qk_norm else 0
                for name in ("q_norm", "k_norm")
            )
            decoder.add_layer(
                layer.attn_norm.weight.data_ptr(), q_norm, k_norm,
                layer.mlp_norm.weight.data_ptr(), *(p.packed for p in packed),
                keys.data_ptr(), values.data_ptr(),
                *(None if A is None else A.packed for A in low_rank),
            )  # fmt: skip
        return decoder

    def forward(self, inputs: Inputs, plan: DecodePlan) -> Tensor:
        """(N, D) hidden states after the final norm, in a buffer that is used again.

        Keys and values are written to their slots of the cache before a layer attends.
        """
        n, x = len(inputs.tokens), inputs
        if len(self._hidden) < n:
            self._hidden = padded(n, self.spec.hidden_size, self.dtype)
        rotations = self.model.rope.table(int(x.positions.max()) + 1)
        starts = plan.query_starts
        self.decoder.run(
            x.tokens.data_ptr(), x.positions.data_ptr(), x.slots.data_ptr(), n,
            rotations.data_ptr(), plan.block_table.data_ptr(), plan.block_table.stride(0),
            0 if plan.tails is None else plan.tails.data_ptr(),
            self.cache.block_size, plan.context_lens.data_ptr(),
            0 if starts is None else starts.data_ptr(), plan.group_starts.data_ptr(),
            plan.shared_blocks.data_ptr(), len(plan.shared_blocks), self._hidden.data_ptr(),
            self._hidden.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return self._hidden[:n, : self.spec.hidden_size]

    def logits(self, hidden: Tensor) -> Tensor:  # (n, D) of `forward` -> (n, V) float32
        """In a buffer that is used again."""
        n, V = len(hidden), self.spec.vocab_size
        if hidden.data_ptr() != self._hidden.data_ptr():  # some rows of it
            if len(self._picked) < n:
                self._picked = padded(n, self.spec.hidden_size, self.dtype)
            self._picked[:n, : self.spec.hidden_size] = hidden
            hidden = self._picked
        if self._logits.numel() < n * V:
            self._logits = torch.empty(n * V)
        logits = self._logits[: n * V].view(n, V)
        self.head(hidden, logits, n, _C.After.store)
        return logits

    def decode(
        self, rows: Rows, max_steps: int
    ) -> tuple[int, np.ndarray]:  # steps, (B,) _C.Outcome
        """Steps of all running rows, drawn and appended, until one of them ends or needs a block that
        the cache has not, or MAX_SECONDS are over. There must be blocks for the first one.
        """
        batch = rows.batch()
        left = rows.limit[batch.slots] - rows.length[batch.slots]
        max_steps = min(max_steps, int(left.min()))
        longest = int(rows.length[batch.slots].max()) + max_steps
        rows.reserve(longest)
        rotations = self.model.rope.table(longest)  # held: another thread may let it grow
        return self.loop.run(
            rows.tokens, rows.logprobs, rows.truncated,
            rows.entropies if batch.return_entropy else None, rows.blocks,
            self.cache.tails, rows.length, rows.num_blocks, rows.prompt_length, rows.limit, rows.seed, rows.temperature, rows.top_k,
            rows.top_p, rows.min_p, rows.ignore_eos, rows.stop_ids, rows.is_eos, batch.slots,
            batch.group_starts, batch.shared_blocks, self.cache.allocator,
            rotations.data_ptr(), max_steps, MAX_SECONDS,
            torch.get_num_threads(),
        )  # fmt: skip


def draws_alone(batch: Batch) -> bool:
    """Whether `NativeForward.decode` can draw for these rows: they change no logits and report no others."""
    return not batch.adjusts and not batch.num_top


def _of_type(name: str, dtype: torch.dtype) -> type:
    """The class of _C for these weights on this CPU."""
    suffix = "BF16" if dtype == torch.bfloat16 else "F32"
    level = _C.native_level(dtype == torch.bfloat16)
    return getattr(_C, name + {"amx": "AMX", "avx512": suffix, "avx2": suffix + "AVX2"}[level])


def _pack(linear: Linear, *, halved: bool = False) -> tuple[PackedWeight, PackedWeight | None]:
    """The weight, and A of its adapters; B then lies behind the weight, as `x A^T` behind x."""
    weight, low_rank = linear.weight.detach(), None
    factors = linear.adapter and linear.adapter.stacked(len(weight), weight.dtype)
    if factors is not None:
        # whole tiles: a product must not read what another layer's left behind its own columns
        A, B = factors
        weight, low_rank = (
            side_by_side(weight, B),
            PackedWeight(F.pad(A, (0, 0, 0, -len(A) % MULTIPLE))),
        )
    return PackedWeight(weight, linear.bias, halved=halved), low_rank
