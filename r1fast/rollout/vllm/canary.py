"""A few samples that say whether a server has the trainer's weights: its log-probabilities beside the trainer's.

Prompts are the same every time, and longer than a block of the server's cache where the context allows it, so
that keys and values of older weights, left in its prefix cache, show too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from r1fast.kernels.attention import PackedAttention
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.model import Decoder

NUM_PROMPTS = 4
PROMPT_TOKENS = 160  # more than vLLM's blocks on CPUs, of 128; those on GPUs have 16
SAMPLE_TOKENS = 8
# mean |server - trainer| in nats: ten times what rounding gives, far below what other weights do
MAX_MEAN = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True, slots=True)
class Canary:
    """What one server said: |server - trainer| in nats over its samples' tokens."""

    mean: float
    largest: float
    where: str = ""  # the largest one, in words


def canary_prompts(vocab_size: int, context: int) -> list[list[int]]:
    """Token ids that any model can read."""
    length = min(PROMPT_TOKENS, context - SAMPLE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PROMPTS, max(length, 1))
    return torch.randint(vocab_size, shape, generator=generator).tolist()


@torch.no_grad()
def own_logprobs(
    model: Decoder, sequences: list[tuple[list[int], list[int]]], temperature: float
) -> list[list[float]]:
    """Of each (prompt, completion), the completion's log-probabilities by the training forward."""
    device = model.head_weight.device
    bounds, ids, positions, rows, targets = [0], [], [], [], []
    for prompt, completion in sequences:
        tokens = [*prompt, *completion[:-1]]
        ids += tokens
        positions += range(len(tokens))
        rows += range(bounds[-1] + len(prompt) - 1, bounds[-1] + len(tokens))
        targets += completion
        bounds.append(len(ids))
    longest = max(end - start for start, end in pairwise(bounds))
    attend = PackedAttention(torch.tensor(bounds, dtype=torch.int32, device=device), longest)
    hidden = model(
        torch.tensor(ids, device=device), torch.tensor(positions, device=device), attend
    )  # (T, D)
    values = linear_logprobs(
        hidden[torch.tensor(rows, device=device)],
        model.head_weight,
        torch.tensor(targets, device=device),
        temperature=temperature,
    ).tolist()
    parts, start = [], 0
    for _, completion in sequences:
        parts.append(values[start : start + len(completion)])
        start += len(completion)
    return parts


def compare(
    model: Decoder,
    prompts: list[list[int]],
    sampled: list[tuple[list[int], list[float]]],  # tokens and the server's log-probabilities
    temperature: float,
) -> Canary:
    sequences = [(prompt, tokens) for prompt, (tokens, _) in zip(prompts, sampled, strict=True)]
    own = own_logprobs(model, sequences, temperature)
    gaps = [
        (abs(a - b), f"sample {i}, token {n}: server {b:.4f}, trainer {a:.4f}")
        for i, (trainer, (_, server)) in enumerate(zip(own, sampled, strict=True))
        for n, (a, b) in enumerate(zip(trainer, server, strict=True))
    ]
    largest, where = max(gaps)
    return Canary(sum(gap for gap, _ in gaps) / len(gaps), largest, where)
