"""The decoder's forward for the CPU, without autograd: packed weights, fused rows, static buffers.

The same layer as `model.DecoderLayer`, rounded in the same places, as calls into csrc/linear.hpp and
csrc/decoder_rows.hpp. Weights are packed once for each version of the weights: a second copy, which
makes a product 1.2 to 2.5 times as fast at decode's few rows. An element's sum has one fixed order,
so a row's hidden state is the same bits whatever rows are beside it.
Shapes: N tokens, D width, F MLP width, H query heads, K kv heads, Dh head width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from r1fast import _C
from r1fast.model import Decoder, Linear
from r1fast.rollout.kv_cache import KVCache

# attend(layer, q (N, H, Dh), out (N, H, Dh)): out is written
AttendInto = Callable[[int, Tensor, Tensor], None]

MULTIPLE = 32  # rows and columns that AMX reads at once, in bfloat16


def is_supported(model: Decoder) -> bool:
    """Whether this CPU and this model can take the native forward."""
    weight = model.head_weight
    is_bf16 = weight.dtype == torch.bfloat16
    return (
        weight.device.type == "cpu"
        and (is_bf16 or weight.dtype == torch.float32)
        and _C.head_native(is_bf16)
        and model.spec.head_dim <= 1024
        and model.spec.hidden_size % 2 == model.spec.intermediate_size % 2 == 0
    )


class PackedWeight:
    """y = x W^T of one weight (N, D), packed; `halved` puts silu and the product of its halves after it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, halved: bool = False):
        assert weight.stride(1) == 1, weight.stride()
        is_bf16 = weight.dtype == torch.bfloat16
        kind = _C.PackedLinearF32
        if is_bf16:
            kind = _C.PackedLinearAMX if _C.head_amx() else _C.PackedLinearBF16
        self.kept = weight, bias  # the bias is read where it lies
        self.packed = kind(
            weight.data_ptr(), weight.stride(0), 0 if bias is None else bias.data_ptr(),
            *weight.shape, halved, torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self, x: Tensor, y: Tensor, num_rows: int, after: "_C.After") -> None:
        """x (R, >= D), y (R, >= N) of x's dtype or, to store alone, float32. `Buffers` made both."""
        self.packed.run(
            x.data_ptr(), x.stride(0), num_rows, y.data_ptr(), y.stride(0), after,
            y.dtype == torch.float32, torch.get_num_threads(),
        )  # fmt: skip


class Buffers:
    """Rows of every width that a layer needs, grown to the largest number of rows and kept."""

    def __init__(self, model: Decoder):
        spec, self.dtype = model.spec, model.head_weight.dtype
        H, K, Dh = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.widths = {
            "x": spec.hidden_size, "h": spec.hidden_size, "qkv": (H + 2 * K) * Dh,
            "mixed": H * Dh, "mlp": spec.intermediate_size,
        }  # fmt: skip
        self.heads = H * Dh
        self.num_rows = 0

    def reserve(self, num_rows: int) -> None:
        if num_rows <= self.num_rows:
            return
        self.num_rows = -(-num_rows // MULTIPLE) * MULTIPLE
        for name, width in self.widths.items():
            setattr(self, name, self.rows(self.num_rows, width))
        self.q, self.out = (torch.zeros(self.num_rows * self.heads, dtype=self.dtype) for _ in "qo")

    def rows(self, num_rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros with room to be read in whole tiles."""
        rows, width = (-(-n // MULTIPLE) * MULTIPLE for n in (num_rows, width))
        return torch.zeros(rows, width, dtype=dtype or self.dtype)


class NativeForward:
    """The decoder's hidden states and logits. Made anew when the weights change."""

    def __init__(self, model: Decoder):
        self.model, self.spec = model, model.spec
        self.is_bf16 = model.head_weight.dtype == torch.bfloat16
        self.layers = [
            {
                "qkv": _pack(layer.qkv), "o": _pack(layer.o), "down": _pack(layer.down),
                "gate_up": _pack(layer.gate_up, halved=True),
            }
            for layer in model.layers
        ]  # fmt: skip
        self.head = PackedWeight(model.head_weight)
        self.buffers = Buffers(model)
        self._logits = self._hidden = torch.empty(0)

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KVCache, attend: AttendInto
    ) -> Tensor:
        """(N,) int64 each -> (N, D) hidden states after the final norm, in a buffer that is used again.

        Keys and values are written to their slots of the cache before `attend` is called.
        """
        N, b, spec = len(tokens), self.buffers, self.spec
        D, H, Dh = spec.hidden_size, spec.num_heads, spec.head_dim
        threads, after = torch.get_num_threads(), _C.After
        b.reserve(N)
        x, h = b.x, b.h
        x[:N, :D] = F.embedding(tokens, self.model.embed.weight)
        rotations = self.model.rope.table(int(positions.max()) + 1)
        q, out = (y[: N * H * Dh].view(N, H, Dh) for y in (b.q, b.out))
        mixed = b.out.view(-1, H * Dh) if H * Dh % MULTIPLE == 0 else b.mixed
        for index, (layer, packed) in enumerate(zip(self.model.layers, self.layers, strict=True)):
            self._norm(x, layer.attn_norm, h, N)
            packed["qkv"](h, b.qkv, N, after.store)
            keys, values = cache.layers[index]
            _C.write_heads(
                b.qkv.data_ptr(), b.qkv.stride(0),
                layer.q_norm.weight.data_ptr() if spec.qk_norm else 0,
                layer.k_norm.weight.data_ptr() if spec.qk_norm else 0,
                spec.rms_norm_eps, rotations.data_ptr(), positions.data_ptr(), H, q.data_ptr(),
                keys.data_ptr(), values.data_ptr(), spec.num_kv_heads, Dh, self.is_bf16,
                slots.data_ptr(), N, threads,
            )  # fmt: skip
            attend(index, q, out)
            if mixed is b.mixed:
                mixed[:N, : H * Dh] = out.view(N, -1)
            packed["o"](mixed, x, N, after.add)
            self._norm(x, layer.mlp_norm, h, N)
            packed["gate_up"](h, b.mlp, N, after.silu)
            packed["down"](b.mlp, x, N, after.add)
        self._norm(x, self.model.norm, h, N)
        return h[:N, :D]

    def _norm(self, x: Tensor, norm, y: Tensor, num_rows: int) -> None:
        _C.rms_norm(
            x.data_ptr(), x.stride(0), norm.weight.data_ptr(), norm.eps, num_rows,
            self.spec.hidden_size, self.is_bf16, y.data_ptr(), y.stride(0), torch.get_num_threads(),
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:  # (n, D) of `forward` -> (n, V) float32
        """In a buffer that is used again."""
        n, V = len(hidden), self.spec.vocab_size
        if (
            hidden.data_ptr() != self.buffers.h.data_ptr()
        ):  # some rows of it: where whole tiles can be read
            if len(self._hidden) < n:
                self._hidden = self.buffers.rows(n, self.spec.hidden_size)
            self._hidden[:n, : self.spec.hidden_size] = hidden
            hidden = self._hidden
        if self._logits.numel() < n * V:
            self._logits = torch.empty(n * V)
        logits = self._logits[: n * V].view(n, V)
        self.head(hidden, logits, n, _C.After.store)
        return logits


def _pack(linear: Linear, *, halved: bool = False) -> PackedWeight:
    return PackedWeight(linear.weight.detach(), linear.bias, halved=halved)
