"""From logits to the next token of many samples at once: their parameters put together for `kernels.sample`."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r1fast.kernels.sample import Adjustments, sample
from r1fast.rollout.rows import Batch, Rows
from r1fast.rollout.sampler import uniforms

SETTINGS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(slots=True)
class Draw:
    """What was drawn for Nq entries."""

    tokens: np.ndarray  # (Nq,) int64
    is_bad: np.ndarray  # (Nq,) bool: the logits are not finite, the rest means nothing
    is_banned: np.ndarray  # (Nq,) bool: they were, until penalties, biases and bans changed them
    values: dict[str, np.ndarray]  # logprobs and, where wanted, truncated and entropies; (Nq,)
    top_ids: np.ndarray | None  # (Nq, num_top)
    top_logprobs: np.ndarray | None


def draws_in_graph(batch: Batch) -> bool:
    """Whether the temperature alone decides, and nothing is reported but the token's own log-probability."""
    return not (batch.adjusts or batch.truncates or batch.return_entropy or batch.num_top)


def draw(logits: Tensor, rows: Rows, slots: np.ndarray, offsets: np.ndarray | None = None) -> Draw:
    """(Nq, V), (Nq,) slots, (Nq,) tokens between a slot's last one and the entry's.

    The uniform number of a token comes from its sample's seed and its place in the completion alone.
    """
    batch, device = rows.batch(), logits.device
    position = rows.length[slots] - rows.prompt_length[slots]
    if offsets is not None:
        position = position + offsets
    u = torch.from_numpy(uniforms(rows.seed[slots], position)).to(device)
    if batch.sampling is not None:
        p = batch.sampling
        settings = {name: getattr(p, name) for name in SETTINGS}
    else:
        settings = {
            name: torch.from_numpy(getattr(rows, name)[slots]).to(device) for name in SETTINGS
        }
    drawn = sample(
        logits,
        u,
        **settings,
        adjustments=_adjustments(rows, slots, device) if batch.adjusts else None,
        return_entropy=batch.return_entropy,
        num_top=min(batch.num_top, logits.shape[1]),
    )
    values = {"logprobs": drawn.logprobs}
    if batch.truncates:
        values["truncated"] = drawn.truncated_logprobs
    if batch.return_entropy:
        values["entropies"] = drawn.entropies
    top = (None if x is None else x.cpu().numpy() for x in (drawn.top_ids, drawn.top_logprobs))
    is_bad = drawn.is_bad.cpu().numpy()
    is_banned = np.zeros_like(is_bad)
    if batch.adjusts and is_bad.any():
        bad = drawn.is_bad
        is_banned[is_bad] = ~sample(logits[bad], u[bad]).is_bad.cpu().numpy()
    return Draw(
        drawn.tokens.cpu().numpy(),
        is_bad,
        is_banned,
        {name: x.cpu().numpy() for name, x in values.items()},
        *top,
    )


def _adjustments(rows: Rows, slots: np.ndarray, device: torch.device) -> Adjustments:
    """Penalties of tokens seen, biases, and the ban on what ends a completion before min_tokens."""
    ids, penalty, bias, counts = [], [], [], []
    eos = np.flatnonzero(rows.is_eos)
    for slot in slots:
        sample = rows.samples[slot]
        p, before = sample.request.sampling, sum(map(len, ids))
        if sample.seen is not None:
            seen = np.flatnonzero(sample.seen)
            ids.append(seen)
            penalty.append(np.full(len(seen), p.repetition_penalty, np.float32))
            bias.append(np.zeros(len(seen), np.float32))
        added = list(p.logit_bias.items())
        if rows.length[slot] < rows.min_length[slot]:
            added += [(t, -np.inf) for t in (*(() if p.ignore_eos else eos), *p.stop_token_ids)]
        if added:
            ids.append(np.array([t for t, _ in added], np.int64))
            penalty.append(np.ones(len(added), np.float32))
            bias.append(np.array([b for _, b in added], np.float32))
        counts.append(sum(map(len, ids)) - before)
    starts = np.concatenate(([0], np.cumsum(counts)))
    parts = (
        np.concatenate(x) if x else np.zeros(0, dtype)
        for x, dtype in ((ids, np.int64), (penalty, np.float32), (bias, np.float32))
    )
    return Adjustments(*(torch.from_numpy(x).to(device) for x in (starts, *parts)))
