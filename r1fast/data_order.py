"""The order data are visited in: a function of seed, epoch and step, the same on every machine."""

from __future__ import annotations

import math
import random


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), the same on every machine."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed is hashed with SHA-512
    return order


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The indices of batch `step` on a walk through shuffled epochs, wrapping across their ends.

    Each epoch visits every index once; no index comes twice in a batch where n >= batch_size.
    A pure function of its arguments: a resumed run asks for its step.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    start, indices = step * batch_size, []
    while len(indices) < batch_size:
        epoch, offset = divmod(start + len(indices), n)
        missing = batch_size - len(indices)
        indices += _walk_order(n, batch_size, seed, epoch)[offset : offset + missing]
    return indices


def _walk_order(n: int, batch_size: int, seed: int, epoch: int) -> list[int]:
    """`epoch_order`, changed only where a batch that spans two epochs would repeat an index."""
    if batch_size <= n < 2 * batch_size:
        # too few indices to move any aside: one order until a batch ends where an epoch does;
        # n consecutive entries of a repeated permutation are always distinct
        return epoch_order(n, seed, epoch // (batch_size // math.gcd(n, batch_size)))
    order = epoch_order(n, seed, epoch)
    carried = (epoch * n) % batch_size  # indices the spanning batch took from the last epoch
    if epoch == 0 or carried == 0 or n < batch_size:
        return order
    taken = set(epoch_order(n, seed, epoch - 1)[n - carried :])
    head = batch_size - carried
    # the last batch_size entries stay put, so the next epoch may rely on them
    spare = [i for i in range(head, n - batch_size) if order[i] not in taken]
    for i in range(head):
        if order[i] in taken:
            j = spare.pop(0)
            order[i], order[j] = order[j], order[i]
    return order
