"""What a model is made of, counted from config.json: dense ones and mixtures of experts, also those that r1fast
does not run. For plans on paper (cluster_plan.py).

Norms and biases are left out: under a thousandth of any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DENSE = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class PaperShape:
    """Parameters, and what a token, a position and a pair of query and key cost."""

    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    is_tied: bool
    shared: int  # parameters of all layers that every token passes: attention, dense MLPs, routers
    experts: int  # parameters of the routed experts of all layers
    num_experts: int  # of a layer; 0: dense
    top_k: int  # of them that a token passes
    moe_layers: int
    cache_width: int  # numbers that a position of a layer takes in the cache
    pair_flops: int  # forward, of a pair of query and key in a layer

    @property
    def table(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def total(self) -> int:
        return self.shared + self.experts + self.table * (1 if self.is_tied else 2)

    @property
    def active(self) -> int:
        """In the products of one token that is predicted."""
        routed = self.experts * self.top_k // self.num_experts if self.num_experts else 0
        return self.shared + routed + self.table

    def experts_met(self, num_tokens: float) -> float:
        """Share of the experts that so many tokens pass, if the router is even."""
        if not self.num_experts:
            return 0.0
        return 1 - (1 - self.top_k / self.num_experts) ** num_tokens


def read_shape(config: Mapping[str, Any]) -> PaperShape:
    """Parse a config.json. Raises ValueError for a family that is not known, or a size that is missing."""
    family = config.get("model_type")
    if family not in (*DENSE, *MIXTURES):
        raise ValueError(
            f"a plan on paper knows model_type {', '.join((*DENSE, *MIXTURES))}; got {family!r}"
        )

    def size(*keys: str, default: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.json needs {keys[0]}, a whole number of at least 1, got {value!r}"
            )
        return value

    D, L, H = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
    if family.startswith("deepseek"):  # latent attention: arXiv 2405.04434, section 2.1
        nope, rope, value = (size(f"{n}_head_dim") for n in ("qk_nope", "qk_rope", "v"))
        latent = size("kv_lora_rank")
        if config.get("q_lora_rank") is None:
            queries = D * H * (nope + rope)
        else:
            queries = size("q_lora_rank") * (D + H * (nope + rope))
        attention = queries + D * (latent + rope) + latent * H * (nope + value) + H * value * D
        cache_width, pair_flops = latent + rope, 2 * H * (nope + rope + value)
    else:
        K = size("num_key_value_heads", default=H)
        Dh = size("head_dim", default=128 if family.startswith("qwen3") else D // H)
        attention = 2 * D * Dh * (H + K)
        cache_width, pair_flops = 2 * K * Dh, 4 * H * Dh
    num_experts = top_k = moe_layers = expert = always = 0
    if family in MIXTURES:
        num_experts = size("n_routed_experts", "num_local_experts", "num_experts")
        top_k = size("num_experts_per_tok")
        if top_k > num_experts:
            raise ValueError(f"a token passes {top_k} of {num_experts} experts")
        expert = 3 * D * size("moe_intermediate_size", "intermediate_size")
        always = expert * (config.get("n_shared_experts") or 0) + D * num_experts  # and the router
        moe_layers = sum(_is_mixture(config, family, n) for n in range(L))
    dense = 3 * D * size("intermediate_size") * (L - moe_layers)
    return PaperShape(
        family, L, D, size("vocab_size"), bool(config.get("tie_word_embeddings", False)),
        shared=L * attention + dense + moe_layers * always,
        experts=moe_layers * num_experts * expert,
        num_experts=num_experts, top_k=top_k, moe_layers=moe_layers,
        cache_width=cache_width, pair_flops=pair_flops,
    )  # fmt: skip


def _is_mixture(config: Mapping[str, Any], family: str, layer: int) -> bool:
    if family.startswith("deepseek"):
        every = config.get("moe_layer_freq") or 1
        return layer >= (config.get("first_k_dense_replace") or 0) and layer % every == 0
    if family == "qwen3_moe":
        if layer in (config.get("mlp_only_layers") or ()):
            return False
        return (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    return True
