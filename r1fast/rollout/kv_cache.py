"""Keys and values of the sequences being decoded: one slot a sequence, grown as it gets longer."""

import torch
from torch import Tensor

from r1fast.model import ModelSpec

BLOCK = 64  # the number of positions is a multiple of this
GROWTH = 1.5  # and grows by at least this factor, so that copies stay few


class KVCache:
    """Per layer keys and values of B slots. Rows [0, size) are in use.

    Shapes: B slots, K kv heads, L positions, Dh head width.
    """

    def __init__(self, spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.context = spec.max_position_embeddings
        self.shape = (num_slots, spec.num_kv_heads, 0, spec.head_dim)
        self.keys = [
            torch.empty(self.shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
        ]
        self.values = [k.clone() for k in self.keys]
        self.lengths: list[int] = []  # (B,) positions written

    @property
    def size(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def reserve(self, positions: int) -> None:
        """Make room for `positions` in every slot."""
        if positions <= self.capacity:
            return
        B, K, L, Dh = self.shape
        grown = min(int(GROWTH * self.capacity), self.context)  # more is never asked for
        L = -(-max(positions, grown) // BLOCK) * BLOCK
        self.shape = (B, K, L, Dh)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                new = old.new_zeros(self.shape)  # zeros: masked keys must not be NaN
                new[:, :, : old.shape[2]] = old
                store[i] = new

    def append_prompt(self, layer: int, k: Tensor, v: Tensor, first: int, copies: int) -> None:
        """Write one prompt's (P, K, Dh) keys and values to slots [first, first + copies)."""
        P = k.shape[0]
        self.keys[layer][first : first + copies, :, :P] = k.transpose(0, 1)
        self.values[layer][first : first + copies, :, :P] = v.transpose(0, 1)

    def keep(self, rows: list[int]) -> None:
        """Compact: slot i becomes the old slot rows[i]. `rows` is increasing."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        if moved:
            start = moved[0][0]
            index = torch.tensor([old for _, old in moved], device=self.keys[0].device)
            L = max(self.lengths[r] for r in rows)
            for store in (self.keys, self.values):
                for x in store:
                    x[start : start + len(moved), :, :L] = x[index, :, :L]
        self.lengths = [self.lengths[r] for r in rows]
