"""LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   (r, D)
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   (N_p, r)

PEFT has many variants of LoRA. What this decoder does not compute is refused, by name, and so is an
option that is not known here: a wrong result would look like a right one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor, nn

from r1fast.config import LoraConfig
from r1fast.hf_folder import (
    fill_tensors,
    read_json,
    read_tensors,
    resolve_model_path,
    write_folder,
    write_json,
    write_safetensors,
)
from r1fast.lora import adapters, add_lora, drop_lora, lora_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PROJECTION = re.compile(r"\.(\w+)\.lora_[AB]\.weight$")
# options that change nothing of what a loaded adapter computes, or only beside another option
IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
ALLOWED = {  # beside what counts as unset: None, false, 0, "" and empty
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others change the base weights
}


def save_adapter(model: nn.Module, path: str | os.PathLike, *, base: str = "") -> None:
    """Write a folder that PEFT loads on the model `base`; it appears whole or not."""
    lora = lora_of(model)
    if lora is None:
        raise ValueError("the model has no adapters to save")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": lora.targets,
        "bias": "none",
        "inference_mode": True,
    }

    def write(folder: Path) -> None:
        tensors = {name: x.contiguous().cpu() for name, x in _peft_tensors(model).items()}
        write_safetensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)

    write_folder(path, write, CONFIG)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Put the adapter of a PEFT folder (or model id) on `model`, which is frozen.

    Raises ValueError for variants of LoRA that are not computed here, and for one of another model.
    """
    folder = resolve_model_path(path)
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"no {WEIGHTS} in {str(folder)!r}; other formats (.bin: pickles) are not read"
        )
    _check(config, folder)
    found = (_PROJECTION.search(name) for name, _, _ in read_tensors(folder, WEIGHTS))
    lora = LoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        targets=sorted({match[1] for match in found if match}),
    )
    try:
        add_lora(model, lora)
        fill_tensors(folder, _peft_tensors(model), file=WEIGHTS)
    except ValueError as error:
        drop_lora(model)
        raise ValueError(f"the adapter {str(folder)!r} does not fit this model: {error}") from None


def _check(config: dict, folder: Path) -> None:
    """Raises ValueError for an adapter that is not plain LoRA of a causal language model."""
    where = f"{folder / CONFIG}"
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: unsupported peft_type {config.get('peft_type')!r}; supported: LORA"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{where}: 'r' must be a whole number above 0, got {rank!r:.80}")
    if type(alpha) not in (int, float) or not alpha > 0:
        raise ValueError(f"{where}: 'lora_alpha' must be a number above 0, got {alpha!r:.80}")
    for key, value in config.items():
        if key in IRRELEVANT | READ or not value or value in ALLOWED.get(key, ()):
            continue
        known = "; supported: " + ", ".join(map(repr, ALLOWED[key])) if key in ALLOWED else ""
        raise ValueError(
            f"{where}: unsupported {key} = {value!r:.200}{known or '; supported: unset'}"
        )


def _peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every projection under PEFT's names, as views: writing to them writes the adapter."""
    named = {}
    for at, adapter in adapters(model):
        for part in adapter.parts:
            A, B = adapter.of_part(part)
            named |= {f"{PREFIX}{at}{part}.lora_{k}.weight": x for k, x in (("A", A), ("B", B))}
    return named
