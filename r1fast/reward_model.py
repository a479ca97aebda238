"""Preference reward models: the decoder's trunk with a scalar head on the last token.

    s(x, y) = w . h_last(x, y)                        h after the final norm, w of width D

The last token is the last that is not the padding token, the rule of transformers' sequence
classifiers, so that a folder scores alike in both.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1fast import _C
from r1fast.hf_folder import (
    fill_tensors,
    read_json,
    read_tensors,
    resolve_model_path,
    write_folder,
    write_json,
    write_tensors,
)
from r1fast.jsonl import read_jsonl
from r1fast.kernels.attention import PackedAttention
from r1fast.metrics import warn
from r1fast.model import Decoder, ModelSpec, check_size
from r1fast.templates import encode_text

ARCHITECTURES = {
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
}
TRAINED_HERE = "r1fast_reward_model"  # in config.json: prompts are put through [template]
TOKEN_BUDGET = 16384  # tokens in one micro-batch


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt, the first preferred."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def sequences(self) -> list[list[int]]:
        return [self.prompt_ids + self.chosen_ids, self.prompt_ids + self.rejected_ids]


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """A response and whether it is safe."""

    prompt_ids: list[int]
    response_ids: list[int]
    safe: bool

    def sequences(self) -> list[list[int]]:
        return [self.prompt_ids + self.response_ids]


class RewardModel(nn.Module):
    """`decoder` (taken over: its vocabulary head is dropped) and a score head.

    The head starts at zero, so every score does and the first loss is log 2; with a `seed` it is
    normal, of deviation 1 / sqrt(D + 1).
    """

    def __init__(
        self, decoder: Decoder, *, seed: int | None = None, pad_token_id: int | None = None
    ):
        super().__init__()
        decoder.lm_head = None
        weight = torch.zeros(1, decoder.spec.hidden_size)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            weight.normal_(std=1 / math.sqrt(weight.numel() + 1), generator=generator)
        self.decoder = decoder
        self.score_weight = nn.Parameter(weight.to(decoder.embed.weight))  # (1, D)
        self.pad_token_id = decoder.hf_config.get("pad_token_id")
        if pad_token_id is not None:
            if not 0 <= pad_token_id < decoder.spec.vocab_size:
                raise ValueError(
                    f"pad_token_id must be in [0, {decoder.spec.vocab_size}), got {pad_token_id}"
                )
            self.pad_token_id = pad_token_id

    @property
    def checkpointing(self) -> str:
        """What the decoder's layers keep for the backward."""
        return self.decoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, mode: str) -> None:
        self.decoder.checkpointing = mode

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's: where a trainer looks for adapters."""
        return self.decoder.layers

    def forward(self, sequences: Sequence[list[int]]) -> Tensor:  # S lists of ids -> (S,) float32
        """Scores of one packed batch; differentiable."""
        device = self.score_weight.device
        sequences = [self.trim(ids) for ids in sequences]
        lengths = [len(ids) for ids in sequences]
        tokens = [token for ids in sequences for token in ids]
        if not 0 <= min(tokens) <= max(tokens) < self.decoder.spec.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.decoder.spec.vocab_size}), "
                f"got {min(tokens)} to {max(tokens)}"
            )
        ends = torch.tensor(lengths).cumsum(0)
        input_ids = torch.tensor(tokens)
        position_ids = torch.cat([torch.arange(n) for n in lengths])
        attend = PackedAttention(F.pad(ends, (1, 0)).to(device, torch.int32), max(lengths))
        hidden = self.decoder(input_ids.to(device), position_ids.to(device), attend)  # (T, D)
        last = hidden[(ends - 1).to(device)]  # (S, D)
        return F.linear(last.float(), self.score_weight.float()).squeeze(1)

    def trim(self, ids: list[int]) -> list[int]:
        """`ids` up to the last token that is not padding (to the first where all are)."""
        if not ids:
            raise ValueError("a sequence to score must have at least one token, got none")
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad_token_id:
            end -= 1
        return ids[:end]

    @torch.no_grad()
    def score(
        self, token_ids: Sequence[list[int]], *, token_budget: int = TOKEN_BUDGET
    ) -> list[float]:
        """The score of each sequence. One longer than the budget has a micro-batch to itself."""
        lengths = [len(self.trim(ids)) for ids in token_ids]
        scores = [0.0] * len(lengths)
        for index in _C.pack(lengths, max(token_budget, *lengths)) if lengths else []:
            values = self([token_ids[i] for i in index]).tolist()
            for i, value in zip(index, values, strict=True):
                scores[i] = value
        return scores

    def hf_tensors(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name, as views."""
        return self.decoder.hf_tensors() | {"score.weight": self.score_weight.detach()}


def names_classifier(config: dict) -> bool:
    """Whether a config.json is of a sequence classifier. ValueError where its architectures are no list of names."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json: 'architectures' must be a list of names, got {names!r:.80}")
    return any("SequenceClass" in name for name in names)


def load_reward_model(
    path: str | PathLike,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    seed: int | None = None,
    pad_token_id: int | None = None,
) -> RewardModel:
    """Read a sequence-classification folder with one label, or a causal LM, which gets a new head.

    `seed` and `pad_token_id` as in RewardModel; the second replaces that of config.json.
    """
    folder = resolve_model_path(path)
    config = read_json(folder / "config.json")
    spec = ModelSpec.from_hf_config(config)
    check_size(spec, folder)
    shapes = {name: shape for name, _, shape in read_tensors(folder)}
    is_classifier = names_classifier(config)
    if is_classifier and shapes.get("score.weight") != (1, spec.hidden_size):
        found = shapes.get("score.weight", "none")
        raise ValueError(
            f"a reward model has one label: score.weight of shape (1, {spec.hidden_size}); "
            f"{str(folder)!r} has {found}"
        )
    # built as if tied, so that no vocabulary head is allocated
    decoder = Decoder(replace(spec, tie_word_embeddings=True), dtype=dtype, device=device)
    decoder.spec, decoder.hf_config = spec, config
    model = RewardModel(decoder, seed=seed, pad_token_id=pad_token_id)
    targets = model.hf_tensors()
    if "score.weight" not in shapes:
        del targets["score.weight"]
    fill_tensors(folder, targets, ignored=(".rotary_emb.inv_freq", "lm_head.weight"))
    return model


def save_reward_model(
    model: RewardModel, path: str | PathLike, *, tokenizer=None, max_shard_bytes: int = 5 << 30
) -> None:
    """Write a folder that AutoModelForSequenceClassification reads; it appears whole or not."""
    decoder = model.decoder
    pad = model.pad_token_id
    if pad is None and tokenizer is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        pad = tokenizer.pad_token_id  # one that is eos would hide the end of every response
    config: dict[str, Any] = {
        **decoder.hf_config,
        **decoder.spec.to_hf_config(),
        "architectures": [ARCHITECTURES[decoder.spec.model_type]],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "dtype": str(model.score_weight.dtype).removeprefix("torch."),
        "pad_token_id": pad,
        TRAINED_HERE: True,
    }
    for key in ("torch_dtype", "num_labels"):  # older names of dtype and of len(id2label)
        config.pop(key, None)
    if pad is None:
        warn(
            f"{path}: neither the reward model nor its tokenizer has a pad_token_id, so "
            "transformers can score only one sequence at a time with it; give load_reward_model one"
        )

    def write(folder: Path) -> None:
        write_tensors(folder, model.hf_tensors(), max_shard_bytes)
        write_json(folder / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(path, write)


def encode_response(
    prompt: str, response: str, tokenizer, render: Callable[[str], str] | None = None
) -> tuple[list[int], list[int]]:
    """(prompt_ids, response_ids): one way for training and for scoring.

    `render` puts the template around the prompt. The response ends in the end-of-sequence token.
    """
    text = prompt if render is None else render(prompt)
    bos = getattr(tokenizer, "bos_token", None)  # a chat template has written it already
    prompt_ids = encode_text(text, tokenizer, add_special_tokens=not (bos and text.startswith(bos)))
    response_ids = encode_text(response, tokenizer, add_special_tokens=False)
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is not None and response_ids[-1:] != [eos]:
        response_ids = [*response_ids, eos]
    return prompt_ids, response_ids


def load_pairs(
    path: str | Path,
    tokenizer,
    *,
    render: Callable[[str], str] | None = None,
    max_tokens: int = 0,  # 0 = no limit; a pair with a longer sequence is left out and reported
) -> list[PreferencePair]:
    """Rows {prompt, chosen, rejected} of a JSONL file."""
    pairs = []
    for where, row in _rows(path):
        prompt, chosen, rejected = (_text(row, k, where) for k in ("prompt", "chosen", "rejected"))
        if chosen == rejected:
            raise ValueError(f"{where}: 'chosen' and 'rejected' are the same text")
        prompt_ids, chosen_ids = encode_response(prompt, chosen, tokenizer, render)
        rejected_ids = encode_response(prompt, rejected, tokenizer, render)[1]
        pairs.append(PreferencePair(prompt_ids, chosen_ids, rejected_ids))
    return _within(pairs, path, max_tokens)


def load_labelled(
    path: str | Path,
    tokenizer,
    *,
    render: Callable[[str], str] | None = None,
    max_tokens: int = 0,  # as in load_pairs
) -> list[LabelledResponse]:
    """Rows {prompt, response, safe} of a JSONL file."""
    responses = []
    for where, row in _rows(path):
        prompt, response = (_text(row, key, where) for key in ("prompt", "response"))
        if not isinstance(row.get("safe"), bool):
            raise ValueError(f"{where}: 'safe' must be true or false, got {row.get('safe')!r:.80}")
        ids = encode_response(prompt, response, tokenizer, render)
        responses.append(LabelledResponse(*ids, row["safe"]))
    return _within(responses, path, max_tokens)


def _rows(path: str | Path) -> Iterable[tuple[str, dict]]:
    return ((f"{path}:{line}", row) for line, row in read_jsonl(path))


def _text(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, got {value!r:.80}")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    return value


def _within(items: list, path: str | Path, max_tokens: int) -> list:
    if not items:
        raise ValueError(f"{path} holds no rows")
    kept = [x for x in items if not max_tokens or max(map(len, x.sequences())) <= max_tokens]
    if len(kept) < len(items):
        warn(f"{path}: {len(items) - len(kept)} of {len(items)} rows have over {max_tokens} tokens")
    if not kept:
        raise ValueError(f"{path}: every row has over {max_tokens} tokens")
    return kept


def score_fn(
    model: RewardModel,
    tokenizer,
    template_render: Callable[[str], str] | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> Callable[[list[tuple[str, str]]], list[float]]:
    """(prompt, response) texts -> scores, encoded as `load_pairs` and `load_labelled` do."""

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        encoded = [encode_response(*pair, tokenizer, template_render) for pair in pairs]
        return model.score([p + r for p, r in encoded], token_budget=token_budget)

    return score
