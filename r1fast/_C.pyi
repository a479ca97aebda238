from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

# `lengths` is a list or tuple of positive ints, or a 1-d integer array of any width. All functions are deterministic
# (ties go to the lower index) and release the GIL. They raise ValueError on a sequence longer than `token_budget`,
# a length or budget below 1, or a total over 2**63 - 1; TypeError on what is not an integer.
Lengths: TypeAlias = Sequence[int] | NDArray[np.integer]

def pack(lengths: Lengths, token_budget: int) -> list[list[int]]:
    """First-fit decreasing: the indices of the sequences in each micro-batch, longest first."""

def pack_flat(
    lengths: Lengths,  # (S,)
    token_budget: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # order (S,), offsets (num_bins + 1,)
    """What `pack` returns, without a Python object per sequence: bin b is order[offsets[b]:offsets[b + 1]]."""

def pack_balanced(
    lengths: Lengths,  # (S,)
    token_budget: int,
    num_ranks: int,
    costs: ArrayLike | None = None,  # (S,) finite and >= 0; the lengths if None
) -> list[list[list[int]]]:
    """rank -> micro-batch -> sequence indices, ascending. Every rank gets the same number of micro-batches
    (ceil(len(pack(...)) / num_ranks)), with costs evened over ranks and micro-batches. A micro-batch is empty
    only when there are fewer sequences than micro-batches."""

def lower_bound(lengths: Lengths, token_budget: int) -> int:
    """No packing uses fewer micro-batches (Martello and Toth's L2; at least ceil(sum / token_budget))."""
