"""Reward models as Hugging Face has them: any sequence-classification checkpoint, native or through transformers.

    one label        score = its logit
    several labels   score = log-odds of one: z_l - log sum_{k != l} exp z_k;  its sigmoid is p(l)

A folder of our architectures with one label runs on the packed trunk of `reward_model.py`; every other
one is loaded by AutoModelForSequenceClassification and padded. Padding is tried at load, on texts of two
lengths: a model that scores them otherwise in a padded batch gets one text at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1fast.chat_template import render_chat
from r1fast.config import TemplateConfig
from r1fast.hf_folder import read_json, read_tensors, resolve_model_path
from r1fast.metrics import warn
from r1fast.model import load_tokenizer
from r1fast.reward_model import (
    ARCHITECTURES,
    TRAINED_HERE,
    encode_response,
    load_reward_model,
    names_classifier,
)
from r1fast.templates import render_prompt

ScoreFn = Callable[[list[tuple[str, str]]], list[float]]
TOKEN_BUDGET = 16384  # padded tokens in one batch
PROBE = ("one", "one two three four five six seven eight nine ten, and a little more to be longer")


def load_score_fn(
    path: str | Path,
    *,
    template: TemplateConfig,
    dtype: str = "float32",
    device: str = "cpu",
    label: str = "",  # the one whose log-odds count; "": the only one, or the last of two
    how: str = "auto",  # template | chat | pair; auto: as `input_form` finds
) -> ScoreFn:
    """(prompt, response) texts -> scores, by the checkpoint in `path`.

    Raises ValueError for a folder that is no sequence classifier, for a label it does not have, and
    where its tokenizer has no place for the way of input.
    """
    folder = resolve_model_path(path)
    config = read_json(folder / "config.json")
    tokenizer = load_tokenizer(path)
    how = input_form(config, tokenizer) if how == "auto" else how
    if how == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {path} has no chat template; take 'template' or 'pair'")
    encode = Encoder(tokenizer, template, how)
    if is_native(config, folder):
        model = load_reward_model(path, dtype=dtype, device=device)
        return lambda pairs: model.score([encode(*pair)["input_ids"] for pair in pairs])
    return HFClassifier(folder, encode, dtype=dtype, device=device, label=label)


def is_native(config: dict, folder: Path) -> bool:
    """Whether the packed trunk scores it: an architecture of ours with one label."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES or not names_classifier(config):
        return False
    shapes = {name: shape for name, _, shape in read_tensors(folder)}
    return shapes.get("score.weight", (0,))[0] == 1


def input_form(config: dict, tokenizer: Any) -> str:
    """How a checkpoint wants a prompt and a response.

    What r1fast trained: through the template; with a chat template: as a chat; a tokenizer that joins
    two texts itself (BERT's): as a pair; else through the template.
    """
    if config.get(TRAINED_HERE):
        return "template"
    if getattr(tokenizer, "chat_template", None):
        return "chat"
    return "pair" if getattr(tokenizer, "sep_token_id", None) is not None else "template"


@dataclass(frozen=True, slots=True)
class Encoder:
    """A prompt and a response -> a tokenizer's row (input_ids and what else the model reads)."""

    tokenizer: Any
    template: TemplateConfig
    how: str

    def __call__(self, prompt: str, response: str) -> dict[str, list[int]]:
        t = self.tokenizer
        if self.how == "pair":
            return dict(t(prompt, response))
        if self.how == "chat":
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            text = render_chat(t, messages, add_generation_prompt=False)
            return dict(t(text, add_special_tokens=False))  # the template writes its own
        prompt_ids, response_ids = encode_response(
            prompt, response, t, lambda text: render_prompt(text, self.template, t)
        )
        ids = prompt_ids + response_ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


class HFClassifier:
    """Scores by a transformers model. Batches hold texts of like length, padded on the side that works."""

    def __init__(
        self,
        folder: Path,
        encode: Encoder,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        label: str = "",
        token_budget: int = TOKEN_BUDGET,
    ):
        from transformers import AutoModelForSequenceClassification

        self.encode, self.token_budget = encode, token_budget
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(f"{folder} is no sequence classifier: {error}") from None
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(
                f"{folder} lacks weights of a sequence classifier ({missing}); it would score at random"
            )
        self.model = model.to(device).eval()
        self.device = device
        self.label = _label(self.model.config, label, folder)
        self.limit = min(
            getattr(self.model.config, "max_position_embeddings", None) or 1 << 30,
            getattr(encode.tokenizer, "model_max_length", None) or 1 << 30,
        )
        self.side = self._find_side(folder)

    def __call__(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Scores of (prompt, response). ValueError for one longer than the model reads."""
        rows = [self.encode(*pair) for pair in pairs]
        for i, row in enumerate(rows):
            if len(row["input_ids"]) > self.limit:
                raise ValueError(
                    f"response {i} has {len(row['input_ids'])} tokens with its prompt, the reward "
                    f"model reads at most {self.limit}: lower rollout.max_completion_tokens, or take "
                    "a model of a longer context"
                )
        return self._score(rows, self.side)

    def _score(self, rows: list[dict], side: str) -> list[float]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        scores, batch = [0.0] * len(rows), []
        for n, i in enumerate(order):
            batch.append(i)
            longest = len(rows[order[n + 1]]["input_ids"]) if n + 1 < len(order) else 0
            if n + 1 < len(order) and side and (len(batch) + 1) * longest <= self.token_budget:
                continue
            for j, score in zip(batch, self._forward([rows[j] for j in batch], side), strict=True):
                scores[j] = score
            batch = []
        return scores

    @torch.inference_mode()
    def _forward(self, rows: list[dict], side: str) -> list[float]:
        if len(rows) == 1:
            inputs = {name: torch.tensor([ids]) for name, ids in rows[0].items()}
        else:
            inputs = self.encode.tokenizer.pad(rows, padding_side=side, return_tensors="pt")
        logits = self.model(**{n: x.to(self.device) for n, x in inputs.items()}).logits.float()
        if logits.shape[1] == 1:
            return logits[:, 0].tolist()
        others = [k for k in range(logits.shape[1]) if k != self.label]
        return (logits[:, self.label] - logits[:, others].logsumexp(1)).tolist()

    def _find_side(self, folder: Path) -> str:
        """right or left, where padding leaves scores as they are; "" where nothing does."""
        if getattr(self.encode.tokenizer, "pad_token_id", None) is None:
            return ""
        rows = [self.encode(PROBE[0], text) for text in PROBE]
        alone = self._score(rows, "")
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.05
        scale = 1 + max(map(abs, alone))
        for side in ("right", "left"):
            try:
                padded = self._forward(rows, side)
            except (ValueError, TypeError, RuntimeError):
                continue  # a model without a padding token takes one text at a time
            errors = [abs(a - b) for a, b in zip(alone, padded, strict=True)]
            if max(errors) <= tolerance * scale:
                return side
        warn(
            f"{folder}: scores change with padding; it is asked one text at a time, which is slower"
        )
        return ""


def _label(config: Any, label: str, folder: Path) -> int:
    names = {int(k): str(v) for k, v in (config.id2label or {}).items()}
    known = ", ".join(repr(names[k]) for k in sorted(names))
    if label:
        if label not in names.values():
            raise ValueError(f"{folder} has no label {label!r}; it has {known}")
        return next(k for k, name in names.items() if name == label)
    if config.num_labels > 2:
        raise ValueError(
            f"{folder} has {config.num_labels} labels ({known}): name the one that is to be high as "
            "rewards.helpfulness_label or rewards.safety_label"
        )
    return config.num_labels - 1
