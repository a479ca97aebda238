"""The decoder: one definition of Qwen2, Qwen3 and Llama 3 for training, prefill and decode.

A layer, with the sequence mixing left to `attend` (packed attention, or a KV cache):

    x = x + o(attend(rope(norm(q)), rope(norm(k)), v))      q, k, v = qkv(rms_norm(x))
    x = x + down(silu(gate) * up)                           gate, up = gate_up(rms_norm(x))

    rope(x)_p = x * cos(p f) + (-x2, x1) * sin(p f)         x = (x1, x2), f the frequencies

q, k, v are one GEMM and so are gate and up; files keep Hugging Face's separate tensors.
Shapes: T packed tokens, D model width, F MLP width, V vocabulary, H query heads, K kv heads, Dh.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from r1fast.hf_folder import (
    fill_tensors,
    read_json,
    read_tensors,
    resolve_model_path,
    write_folder,
    write_json,
    write_tensors,
)
from r1fast.kernels.linear import linear
from r1fast.kernels.rms_norm import add_rms_norm, rms_norm
from r1fast.kernels.rope import rope
from r1fast.kernels.swiglu import swiglu
from r1fast.lora import merged_weights
from r1fast.recompute import MODES, Keep, keep_all, keep_source
from r1fast.tokenizer_check import check_tokenizer_config, probe

__all__ = [
    "Decoder", "ModelSpec", "load_model", "load_tokenizer", "resolve_model_path", "save_model",
]  # fmt: skip

# attend(layer, q (T, H, Dh), k (T, K, Dh), v (T, K, Dh)) -> (T, H, Dh)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder, as config.json states it."""

    model_type: str  # qwen2 | qwen3 | llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # with its rope_type; None is the default rope
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            raise ValueError(
                f"unsupported model_type {self.model_type!r}; supported: {', '.join(ARCHITECTURES)}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need pairs")
        rope_type = (self.rope_scaling or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"unsupported rope type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}"
            )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Parse a config.json. Raises ValueError for what this decoder does not compute."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise ValueError(
                f"unsupported model_type {model_type!r}; supported: {', '.join(ARCHITECTURES)}"
            )
        num_layers = _size(config, "num_hidden_layers")
        if model_type != "llama" and _uses_sliding_window(config, num_layers):
            raise ValueError("sliding-window attention is unsupported; supported: full attention")
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(f"unsupported hidden_act {activation!r}; supported: silu")
        if config.get("quantization_config"):
            raise ValueError("quantized weights are unsupported; supported: float32, bf16, fp16")

        hidden_size, num_heads = (
            _size(config, key) for key in ("hidden_size", "num_attention_heads")
        )
        # Qwen2 has a bias on q, k, v alone; in the others attention_bias covers o too
        attention_bias = bool(config.get("attention_bias", False)) and model_type != "qwen2"
        rope_theta, rope_scaling = _read_rope(config)
        return cls(
            model_type=model_type,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_size(config, "num_key_value_heads", num_heads),
            head_dim=_size(
                config, "head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads
            ),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
            qk_norm=model_type == "qwen3",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6),
            max_position_embeddings=_size(
                config, "max_position_embeddings", 2048 if model_type == "llama" else 32768
            ),
        )

    def to_hf_config(self) -> dict[str, Any]:
        """The config.json keys of this shape, rope in the newer and in the older spelling."""
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        config = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_type": "default"}
            | (scaling or {})
            | {"rope_theta": self.rope_theta},
        }
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        else:
            config["use_sliding_window"] = False
        if self.model_type != "qwen2":
            config["attention_bias"] = self.o_bias
        return config


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least 1; ValueError where it is absent and there is no `default`."""
    value = config.get(key) or default if default else config.get(key)
    if value is None:
        raise ValueError(f"config.json has no {key!r}")
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key!r} must be a whole number above 0, got {value!r:.80}")
    if value >= 2**31:
        raise ValueError(
            f"config.json: {key!r} must be a whole number below 2**31, got {value!r:.80}"
        )
    return value


def _positive(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0 that float32 can hold; ValueError where it is absent and there is no `default`."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= torch.finfo(torch.float32).max:
        raise ValueError(f"config.json: {key!r} must be a number above 0, got {value!r:.80}")
    return value


def _uses_sliding_window(config: Mapping[str, Any], num_layers: int) -> bool:
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    if layer_types := config.get("layer_types"):
        if not isinstance(layer_types, list):
            raise ValueError(f"config.json: 'layer_types' must be a list, got {layer_types!r:.80}")
        return "sliding_attention" in layer_types
    most = config.get("max_window_layers", 28)
    if type(most) is not int:
        raise ValueError(
            f"config.json: 'max_window_layers' must be a whole number, got {most!r:.80}"
        )
    return most < num_layers


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling or None) from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {key!r} must be an object, got {rope!r:.80}")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    theta = _positive({"rope_theta": theta}, "rope_theta")
    rope["rope_type"] = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"unsupported partial_rotary_factor {partial}; supported: 1.0")
    if rope["rope_type"] == "default":
        return float(theta), None
    if rope["rope_type"] == "llama3" and "original_max_position_embeddings" not in rope:
        rope["original_max_position_embeddings"] = _size(config, "max_position_embeddings")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"unsupported rope type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}"
        )
    llama3 = ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in ["factor", *(llama3 if rope["rope_type"] == "llama3" else [])]:
        if key not in rope:
            raise ValueError(f"{rope['rope_type']} rope scaling has no {key!r}")
        _positive(rope, key)
    return float(theta), rope


def rope_frequencies(spec: ModelSpec) -> Tensor:  # (Dh / 2,) float32
    """The rotation per position of each pair, in the float32 steps of transformers."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponent
    scaling = spec.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        # long wavelengths are stretched by factor, short ones kept, those between interpolated
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        smooth = (turns - low) / (high - low)
        stretched = frequencies / scaling["factor"]
        between = (1 - smooth) * stretched + smooth * frequencies
        return torch.where(turns < low, stretched, torch.where(turns > high, frequencies, between))
    return frequencies


class RopeTable:
    """cos and sin of every position, computed in float32 once a device and shared by all layers."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self._frequencies: dict[torch.device, Tensor] = {}
        self._table = torch.empty(0)

    def _rotations(self, positions: Tensor) -> Tensor:  # (N,) -> (N, 2 * Dh): cos, signed sin
        if positions.device not in self._frequencies:
            self._frequencies[positions.device] = rope_frequencies(self.spec).to(positions.device)
        angles = positions.float()[:, None] * self._frequencies[positions.device]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos, -sin, sin), dim=-1)

    def table(self, num_positions: int) -> Tensor:
        """(at least num_positions, 2 * Dh) float32 on the CPU: cos, then sin with its first half negated."""
        if num_positions > len(self._table):
            # a power of two, so that a growing decode recomputes it rarely
            self._table = self._rotations(torch.arange(1 << (num_positions - 1).bit_length()))
        return self._table

    def __call__(self, position_ids: Tensor) -> Tensor:  # (T,) -> (T, 2 * Dh)
        if position_ids.is_cpu:
            needed = int(position_ids.max()) + 1 if position_ids.numel() else 0
            return self.table(needed)[position_ids]
        # a few kernels a forward; a table would need the largest position, which is a sync
        return self._rotations(position_ids)


class Linear(nn.Linear):
    """nn.Linear by `kernels.linear`. No initialisation: Decoder fills it, the global RNG is left alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)  # of lora.py

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.adapter is not None and self.adapter.is_on:
            return self.adapter(x, self)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 whatever the dtype."""

    def __init__(self, width: int, eps: float, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + delta, and x + delta."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, index: int, **factory):
        super().__init__()
        self.index, self.spec = index, spec
        D, F_, H, K, Dh = (
            spec.hidden_size, spec.intermediate_size,
            spec.num_heads, spec.num_kv_heads, spec.head_dim,
        )  # fmt: skip
        self.attn_norm = RMSNorm(D, spec.rms_norm_eps, **factory)
        self.qkv = Linear(D, (H + 2 * K) * Dh, bias=spec.qkv_bias, **factory)
        if spec.qk_norm:
            self.q_norm = RMSNorm(Dh, spec.rms_norm_eps, **factory)
            self.k_norm = RMSNorm(Dh, spec.rms_norm_eps, **factory)
        self.o = Linear(H * Dh, D, bias=spec.o_bias, **factory)
        self.mlp_norm = RMSNorm(D, spec.rms_norm_eps, **factory)
        self.gate_up = Linear(D, 2 * F_, bias=spec.mlp_bias, **factory)
        self.down = Linear(F_, D, bias=spec.mlp_bias, **factory)

    def forward(
        self, x: Tensor, rotations: Tensor, attend: Attend, keep: Keep = keep_all
    ) -> Tensor:
        """(T, D), (T, 2 Dh) -> (T, D)"""
        h = self.attn_norm(x)
        with keep(self.attn_norm, x, h):
            qkv = self.qkv(h)
        heads = partial(self._heads, rotations=rotations)
        q, k, v = heads(qkv)
        with keep(heads, qkv, q, k):
            mixed = attend(self.index, q, k, v)
        h, x = self.mlp_norm.add(x, self.o(mixed.flatten(1)))
        with keep(self.mlp_norm, x, h):
            gate_up = self.gate_up(h)
        y = swiglu(gate_up)
        with keep(swiglu, gate_up, y):
            return x + self.down(y)

    def _heads(self, qkv: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (H + 2 K) Dh) -> q, k, v as `attend` takes them."""
        spec = self.spec
        norms = (self.q_norm.weight, self.k_norm.weight, spec.rms_norm_eps) if spec.qk_norm else ()
        return rope(qkv, rotations, spec.num_heads, spec.num_kv_heads, *norms)

    def projections(self) -> list[tuple[Linear, str, dict[str, int]]]:
        """Every linear, with its block in Hugging Face's names and the widths of its parts there."""
        spec = self.spec
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), spec.intermediate_size)
        return [
            (self.qkv, "self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}),
            (self.o, "self_attn", {"o_proj": spec.hidden_size}),
            (self.gate_up, "mlp", gate_up),
            (self.down, "mlp", {"down_proj": spec.hidden_size}),
        ]

    def hf_tensors(self) -> dict[str, Tensor]:
        """Views of the weights under Hugging Face's names, the fused ones in their parts."""
        spec, named = self.spec, {}
        for module, name, parts in self.projections():
            for kind, tensor in module.named_parameters(recurse=False):
                views = tensor.detach().split(tuple(parts.values()))
                named |= {f"{name}.{p}.{kind}": x for p, x in zip(parts, views, strict=True)}
        named["input_layernorm.weight"] = self.attn_norm.weight.detach()
        named["post_attention_layernorm.weight"] = self.mlp_norm.weight.detach()
        if spec.qk_norm:
            named["self_attn.q_norm.weight"] = self.q_norm.weight.detach()
            named["self_attn.k_norm.weight"] = self.k_norm.weight.detach()
        return {f"model.layers.{self.index}.{name}": tensor for name, tensor in named.items()}


class Decoder(nn.Module):
    """A dense decoder without its logits: `forward` ends at the final norm.

    With a `seed` the weights are random (normal `init_std`, residual outputs scaled by 1/sqrt(2 layers))
    and the global RNG is untouched; without one they are uninitialised, for `load_model` to fill.
    `checkpointing` is what layers keep for the backward, one of recompute.MODES.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int | None = None,
        init_std: float = 0.02,
    ):
        super().__init__()
        factory = {"dtype": _dtype(dtype), "device": device}
        V, D = spec.vocab_size, spec.hidden_size
        self.spec = spec
        self.hf_config: dict[str, Any] = {}  # config.json of the source folder, kept by save_model
        self.generation_config: dict[str, Any] = {}  # and its generation_config.json
        self.checkpointing = "none"
        self.head_group: ProcessGroup | None = None  # with a slice of the head's rows on each rank
        self.embed = nn.Embedding(V, D, _weight=torch.empty(V, D, **factory))
        self.layers = nn.ModuleList(
            DecoderLayer(spec, index, **factory) for index in range(spec.num_layers)
        )
        self.norm = RMSNorm(D, spec.rms_norm_eps, **factory)
        self.lm_head = None if spec.tie_word_embeddings else Linear(D, V, bias=False, **factory)
        self.rope = RopeTable(spec)
        if seed is not None:
            self._init_weights(seed, init_std)

    @torch.no_grad()
    def _init_weights(self, seed: int, std: float) -> None:
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        residual_std = std / math.sqrt(2 * self.spec.num_layers)
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
            elif p.ndim == 2:
                is_residual = name.endswith((".o.weight", ".down.weight"))
                p.normal_(std=residual_std if is_residual else std, generator=generator)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """(T,), (T,) -> (T, D) hidden states after the final norm.

        `attend(layer, q, k, v)` maps (T, H, Dh), (T, K, Dh), (T, K, Dh) to (T, H, Dh).
        """
        x = self.embed(input_ids)
        rotations = self.rope(position_ids)
        assert self.checkpointing in MODES, self.checkpointing
        mode = self.checkpointing if torch.is_grad_enabled() else "none"
        keep = keep_source if mode == "selective" else keep_all
        for layer in self.layers:
            if mode == "full":  # nothing in a layer is drawn
                x = checkpoint(
                    layer, x, rotations, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = layer(x, rotations, attend, keep)
        return self.norm(x)

    @property
    def head_weight(self) -> Tensor:  # (V, D)
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hf_tensors(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name, as views: writing to them writes the model.

        Adapters are not among them.
        """
        named = {"model.embed_tokens.weight": self.embed.weight.detach()}
        for layer in self.layers:
            named |= layer.hf_tensors()
        named["model.norm.weight"] = self.norm.weight.detach()
        if self.lm_head is not None:
            named["lm_head.weight"] = self.lm_head.weight.detach()
        return named


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_size(spec: ModelSpec, folder: Path) -> None:
    """ValueError where the weights of a folder cannot be those of `spec`, before any memory is taken for them."""
    s, shapes = spec, [shape for _, _, shape in read_tensors(folder)]
    attention = s.hidden_size * s.head_dim * 2 * (s.num_heads + s.num_kv_heads)
    layer = attention + 3 * s.hidden_size * s.intermediate_size
    needed = s.vocab_size * s.hidden_size + s.num_layers * layer
    found = sum(math.prod(shape) for shape in shapes)
    # a few that are missing are named by fill_tensors
    if needed > 2 * found + (1 << 24) or s.num_layers > len(shapes):
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit its config.json: {len(shapes)} tensors of "
            f"{found} numbers in all, for {s.num_layers} layers and at least {needed} numbers"
        )


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> Decoder:
    """Read a Hugging Face model folder (or fetch one by its name), in `dtype`.

    Raises ValueError for an unsupported architecture and for weights that do not fit the config.
    """
    folder = resolve_model_path(path)
    config = read_json(folder / "config.json")
    try:
        spec = ModelSpec.from_hf_config(config)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error}") from None
    check_size(spec, folder)
    model = Decoder(spec, dtype=dtype, device=device)
    # a tied head may be stored too; rotary buffers are of old files
    tied = ("lm_head.weight",) if model.spec.tie_word_embeddings else ()
    fill_tensors(folder, model.hf_tensors(), ignored=(".rotary_emb.inv_freq", *tied))
    model.hf_config = config
    model.generation_config = read_json(folder / "generation_config.json", default={})
    return model


def save_model(
    model: Decoder,
    path: str | os.PathLike,
    *,
    tokenizer=None,
    max_shard_bytes: int = 5 << 30,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Write a folder that `load_model` and AutoModelForCausalLM read; it appears whole or not.

    Adapters are merged into the weights that are written, the model stays as it is. Keys of the source config.json and generation_config.json are kept; `eos_token_id` and
    `pad_token_id`, where given, replace theirs. An existing model folder is replaced.
    """
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    tokens = {key: value for key, value in tokens.items() if value is not None}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = {**model.hf_config, **model.spec.to_hf_config(), "dtype": dtype, **tokens}
    config.pop("torch_dtype", None)  # the older name of dtype
    generation = {**model.generation_config, **tokens}

    def write(folder) -> None:
        write_tensors(folder, model.hf_tensors(), max_shard_bytes, merged_weights(model))
        write_json(folder / "config.json", config)
        if generation:
            write_json(folder / "generation_config.json", generation)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(path, write)


GENERIC_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer.json says it all


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer of a model folder; no remote code is run and nothing else is fetched.

    Raises ValueError for files that make none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = resolve_model_path(path)
    config = read_json(folder / "tokenizer_config.json", default={})
    # next to a Qwen2 or Llama config AutoTokenizer would take that model's own splitting rules
    is_generic = config.get("tokenizer_class") in GENERIC_TOKENIZERS
    check_tokenizer_config(config, folder)
    loader = PreTrainedTokenizerFast if is_generic else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        probe(tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # of every kind: what is read is only looked at as it is used
        raise ValueError(
            f"the tokenizer in {str(folder)!r} cannot be read: {type(error).__name__}: {error!s:.500}"
        ) from error
    return tokenizer
