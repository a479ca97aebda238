"""What two updates on the same rollouts have in common: metrics, gradients, weights, and each token's coefficient.

A token's coefficient is minus the derivative of the loss in its log-probability: the step is along the sum of the
tokens' own gradients, each times it; above 0 it makes the token likelier. It is given times the completion
tokens of a mini-batch, so that it has the size of an advantage.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.config import Config
from r1fast.replay.update import Outcome, Pass, ReplayedUpdate
from r1fast.step_plan import Key
from r1fast.types import Problem

NUM_TOKENS, NUM_COMPLETIONS = 12, 6  # that are shown
OF_SPLIT = ("num_mini_batches", "whole_groups", "denominator")  # what a mini-batch holds
CONTEXT = (24, 12)  # tokens shown before and after one


def same(a: float | None, b: float | None) -> bool:
    """Equal to the last bit, where NaN is NaN."""
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


def differing(a: dict[str, float], b: dict[str, float]) -> list[str]:
    """Names of metrics that are not equal to the last bit."""
    return [name for name in a | b if not same(a.get(name), b.get(name))]


def alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> dict[str, float | None]:
    """Cosine and difference of two vectors that are in pieces, summed in float64."""
    dot = square_a = square_b = square_diff = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = x.double().flatten(), y.double().flatten()
        dot, square_diff = dot + float(x @ y), square_diff + float((x - y) @ (x - y))
        square_a, square_b = square_a + float(x @ x), square_b + float(y @ y)
    sizes = math.sqrt(square_a * square_b)
    return {
        "cosine": dot / sizes if sizes else None,
        "relative_difference": math.sqrt(square_diff / square_a) if square_a else None,
        "norms": [math.sqrt(square_a), math.sqrt(square_b)],
    }


@dataclass(frozen=True, slots=True)
class Place:
    """A token of a pass over the rollout, or a completion, and how far its coefficients are apart."""

    difference: float
    key: Key
    iteration: int = 0
    token: int = 0


def compare(trainer: ReplayedUpdate, a: Outcome, b: Outcome, other: Config) -> dict:
    """`b`, of the config `other`, beside `a`, of the trainer's; over all ranks."""
    configs = trainer.config.grpo, other.grpo
    owners = trainer.owners
    num_tokens = sum(len(c.token_ids) for _, c, _ in owners.values())
    total = distributed.sum_dict({"tokens": float(num_tokens)})["tokens"]
    scales = [total / c.num_mini_batches for c in configs]
    lit, tokens, completions = {"0": 0.0, "1": 0.0}, [], []
    shown: dict[Key, list[tuple[Pass, Pass]]] = {}
    for key, (_, completion, _) in owners.items():
        shown[key] = pairs = _pairs(a, b, key, len(completion.token_ids), scales)
        differences = [(x.coefficients - y.coefficients).abs() for x, y in pairs]
        for n, (pair, difference) in enumerate(zip(pairs, differences, strict=True)):
            for side, x in enumerate(pair):
                lit[str(side)] += int((x.coefficients != 0).sum())
            values, at = difference.topk(min(NUM_TOKENS, len(difference)))
            tokens += [
                Place(v, key, n, j) for v, j in zip(values.tolist(), at.tolist(), strict=True)
            ]
        completions.append(Place(sum(float(d.sum()) for d in differences), key))
    lit = distributed.sum_dict(lit)
    decode = trainer.policy.tokenizer.decode
    # else they are of other completions, or at other weights
    are_comparable = a.gradient_at == b.gradient_at and all(
        getattr(configs[0], name) == getattr(configs[1], name) for name in OF_SPLIT
    )
    both = are_comparable and a.gradient is not None and b.gradient is not None
    return {
        "metrics": {name: [a.row.get(name), b.row.get(name)] for name in a.row | b.row},
        "gradient": alike(a.gradient, b.gradient) if both else None,
        "update": alike(a.moved, b.moved),
        "zero_coefficient": [
            1 - lit[side] / max(total * c.num_iterations, 1)
            for side, c in zip("01", configs, strict=True)
        ],
        "tokens": _most(
            [_token(p, *owners[p.key], shown[p.key], decode) for p in _largest(tokens, NUM_TOKENS)],
            NUM_TOKENS,
        ),
        "completions": _most(
            [
                _completion(p, *owners[p.key], shown[p.key])
                for p in _largest(completions, NUM_COMPLETIONS)
            ],
            NUM_COMPLETIONS,
        ),
    }


def _pairs(
    a: Outcome, b: Outcome, key: Key, length: int, scales: list[float]
) -> list[tuple[Pass, Pass]]:
    """The passes of both over one completion, scaled; a pass that one did not make is of zeros."""
    none = Pass(torch.zeros(length), torch.ones(length))
    passes = a.passes.get(key, {}), b.passes.get(key, {})
    both = ((own.get(n, none) for own in passes) for n in sorted(passes[0] | passes[1]))
    return [
        tuple(Pass(x.coefficients * k, x.ratios) for x, k in zip(pair, scales, strict=True))
        for pair in both
    ]


def _largest(places: list[Place], n: int) -> list[Place]:
    return heapq.nsmallest(n, places, key=lambda p: (-p.difference, p.key, p.iteration, p.token))


def _most(rows: list[dict], n: int) -> list[dict]:
    """The rows of all ranks that differ most."""
    rows = sum(distributed.gather_objects(rows), [])
    order = ("position", "sample", "pass", "token")
    return heapq.nsmallest(
        n, rows, key=lambda row: (-row["difference"], *(row.get(name, 0) for name in order))
    )


def _where(place: Place, problem: Problem) -> dict:
    position, sample = place.key
    return {
        "difference": place.difference,
        "problem_id": problem.id,
        "position": position,
        "sample": sample,
    }


def _token(place, problem, completion, reward, pairs, decode) -> dict:
    ids, t = completion.token_ids, place.token
    before, after = CONTEXT
    pair = pairs[place.iteration]
    return _where(place, problem) | {
        "pass": place.iteration + 1,
        "token": t,
        "token_id": ids[t],
        "before": decode(ids[max(t - before, 0) : t]),
        "text": decode(ids[t : t + 1]),
        "after": decode(ids[t + 1 : t + 1 + after]),
        "coefficient": [float(x.coefficients[t]) for x in pair],
        "ratio": [float(x.ratios[t]) for x in pair],
    }


def _completion(place, problem, completion, reward, pairs) -> dict:
    sums = [[float(x.coefficients.sum()) for x in side] for side in zip(*pairs, strict=True)]
    return _where(place, problem) | {
        "num_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "reward": reward.total,
        "verdict": reward.verdict,
        "coefficient": [sum(side) for side in sums] or [0.0, 0.0],
        "text": completion.text,
    }
