"""A model and its tokenizer: what is trained, sampled, evaluated and saved as one folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1fast.config import STAGES, Config
from r1fast.lora import merge_lora
from r1fast.model import Decoder, load_model, load_tokenizer, save_model
from r1fast.peft_folder import load_adapter, save_adapter
from r1fast.tokenizer_check import end_ids


@dataclass(slots=True)
class Policy:
    model: Decoder
    tokenizer: Any
    eos_ids: list[int]  # every id that ends a completion
    path: str = ""  # the folder or model id that it was read from

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    @property
    def eos_id(self) -> int:
        """The id that a training example ends with."""
        return self.eos_ids[0]

    def decode(self, token_ids: list[int]) -> str:
        """Text without the end token. Tags may be special tokens, so those stay."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.eos_ids else token_ids
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of a completion to learn, ended by eos."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id]

    def save(self, path: str | Path) -> None:
        """A plain Hugging Face folder; adapters are merged into what is written."""
        eos = self.eos_ids if len(self.eos_ids) > 1 else self.eos_ids[0]
        save_model(self.model, path, tokenizer=self.tokenizer, eos_token_id=eos)

    def save_adapter(self, path: str | Path) -> None:
        """The adapters alone, as a PEFT folder."""
        save_adapter(self.model, path, base=self.path)


def model_name(path: str | Path) -> str:
    """The last part of a path; of `.../RUN/model`, which every run writes, RUN; of a stage of a pipeline PIPELINE-STAGE."""
    path = Path(os.path.abspath(path))
    name, parent = path.name, path.parent
    if name == "model":
        name, parent = parent.name, parent.parent
        if name in STAGES:
            name = f"{parent.name}-{name}"
    return name.strip("-") or "model"


def load_policy(
    path: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    adapter: str | Path = "",
    merge: bool = True,
) -> Policy:
    """Read a Hugging Face folder (or model id). Raises ValueError where no end token is named.

    `adapter` is a PEFT folder of LoRA for it, which is merged into the weights unless `merge` says no.
    """
    model = load_model(path, dtype=dtype, device=pick_device(device))
    if adapter:
        load_adapter(model, adapter)
        if merge:
            merge_lora(model)
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > model.spec.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has {len(tokenizer)} tokens, the model only "
            f"{model.spec.vocab_size}: they do not belong together"
        )
    eos_ids = end_ids(
        {
            "the tokenizer": tokenizer.eos_token_id,
            "generation_config.json": model.generation_config.get("eos_token_id"),
            "config.json": model.hf_config.get("eos_token_id"),
        },
        model.spec.vocab_size,
        path,
    )
    # absolute, so that it is found from anywhere; a model id stays one
    return Policy(
        model, tokenizer, eos_ids, str(Path(path).resolve() if Path(path).exists() else path)
    )


def policy_of(config: Config, path: str | Path = "") -> Policy:
    """What [model] says, or another `path` with its adapter, dtype and device.

    The adapter stays apart where `lora.rank` says that training goes on from it.
    """
    m = config.model
    return load_policy(
        path or m.path,
        dtype=m.dtype,
        device=m.device,
        adapter=m.adapter,
        merge=not config.lora.rank,
    )


def pick_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device is cuda, but no CUDA device is available; use auto or cpu")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
