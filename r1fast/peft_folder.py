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

import torch
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
_FACTOR = re.compile(r"(.*?)\.lora_([AB])\.weight")
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

    Raises ValueError for variants of LoRA that are not computed here, for one of another model, and
    where the model has adapters already; the model is then as it was.
    """
    folder = resolve_model_path(path)
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"no {WEIGHTS} in {str(folder)!r}; other formats (.bin: pickles) are not read"
        )
    _check(config, folder)
    found = _adapted(folder, config["r"])
    lora = LoraConfig(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        targets=sorted({module.rpartition(".")[2] for module in found}),
    )
    try:
        add_lora(model, lora)
        try:
            _check_targets(config["target_modules"], found, model)
            fill_tensors(folder, _peft_tensors(model), file=WEIGHTS)
        except BaseException:
            drop_lora(model)
            raise
    except ValueError as error:
        raise ValueError(f"the adapter {str(folder)!r} does not fit this model: {error}") from None


def _adapted(folder: Path, rank: int) -> set[str]:
    """The modules that the weights are of, `model.layers.0.self_attn.q_proj` and so on."""
    found = set()
    for name, _, shape in read_tensors(folder, WEIGHTS):
        if match := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            found.add(match[1])
            if match[2] == "A" and shape[:1] != (rank,):
                raise ValueError(
                    f"{folder}: {name!r} has the shape {shape}, and 'r' in {CONFIG} is {rank}"
                )
    return found


def _check_targets(targets: str | list[str], found: set[str], model: nn.Module) -> None:
    """Raises ValueError unless the weights are of those modules that `targets` means to PEFT.

    That is a list of names or ends of names, a pattern for whole names, or "all-linear".
    """
    projections = [
        f"model.layers.{layer.index}.{block}.{part}"
        for layer in model.layers
        for _, block, parts in layer.projections()
        for part in parts
    ]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        asked = set(projections)
    else:
        known = [*projections, "model.embed_tokens", "lm_head"]
        asked = {name for name in known if _is_target(targets, name)}
    without, beyond = _some(asked - found), _some(found - asked)
    if without or beyond:
        raise ValueError(
            f"its target_modules are {targets!r:.200}"
            + f", but there are no weights for {without}" * bool(without)
            + f", but there are weights for {beyond}" * bool(beyond)
        )


def _is_target(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        import regex  # with a time-out: a pattern may take the age of the universe

        try:
            return regex.fullmatch(targets, name, timeout=1.0) is not None
        except TimeoutError:
            raise ValueError(f"'target_modules' takes over a second: {targets!r:.80}") from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_names(targets: object, where: str) -> None:
    if isinstance(targets, str):
        import regex

        try:
            regex.compile(targets)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"{where}: 'target_modules' is no pattern: {error}") from None
    elif not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(
            f"{where}: 'target_modules' must be a list of names, a pattern or \"all-linear\", got "
            f"{targets!r:.80}"
        )


def _some(names: set[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more


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
    # the products are float32 at most; infinity and what is beyond would be NaN in the outputs
    if type(alpha) not in (int, float) or not 0 < alpha <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: 'lora_alpha' must be a number above 0, got {alpha!r:.80}")
    if type(rslora := config.get("use_rslora", False)) is not bool:
        raise ValueError(f"{where}: 'use_rslora' must be true or false, got {rslora!r:.80}")
    _check_names(config.get("target_modules"), where)
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
