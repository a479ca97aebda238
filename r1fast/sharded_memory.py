"""Bytes of a rank that holds a share of a model (parallel.mode = "fsdp", parallel.tensor_parallel), for planner.py.

between steps   fsdp: 4 bytes a weight for its rows, which are the masters, 8 for their moments, the reference's;
                ddp: its slice's weights, masters and moments
training        fsdp: embedding, norm and head whole from forward to backward; of the layers three: the one that
                computes, and the next one as it arrives and as it is laid out
gradients       those of its rows, or of its slice, in float32; fsdp: whole those of a layer, as made and as sent in
                float32, and at the end those of the embedding and the head
rollout         all weights, gathered
adapters        whole on every rank, trained as in ddp: rows are of the frozen base, in the type of the forward
With tensor_parallel "whole" is of a slice in training: the first rank's, which has the most of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1fast.config import ParallelConfig
from r1fast.costs import Size

GATHERED = 3  # layers at a time
SENT = 4  # bytes of a gradient that is summed over ranks


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one rank of `num_ranks` that together hold the model `replicas` times, or in ddp as often as it fits."""

    size: Size
    slice: Size  # of what a rank would hold in ddp
    num_layers: int
    item: int  # bytes of a weight in the forward
    num_ranks: int
    parallel: ParallelConfig

    @property
    def of_base(self) -> bool:
        """Whether what is divided is not what is trained."""
        return self.size.trained < self.size.total

    @property
    def has_rows(self) -> bool:
        return self.parallel.mode == "fsdp"

    @property
    def num_shares(self) -> int:
        """Ranks that have the rows of one slice."""
        num_slices = self.parallel.tensor_parallel * self.parallel.replicas
        return max(1, self.num_ranks // num_slices) if self.has_rows else 1

    def kept(self) -> dict[str, int]:
        """Between two steps, on the device."""
        if self.of_base:
            adapters = 4 * self.size.trained
            base = 0 if self.parallel.cpu_offload else self.share(self.item)
            return {"weights": base + adapters, "optimizer": 2 * adapters}
        if self.parallel.cpu_offload:
            return {"weights": 0, "optimizer": 0}
        if self.has_rows:
            return {"weights": self.share(4), "optimizer": self.share(8)}
        masters = 4 * (self.item < 4)
        return {"weights": self.share(self.item), "optimizer": self.share(masters + 8)}

    def gradients(self) -> int:
        """As an optimizer step has them."""
        if self.of_base:
            return 4 * self.size.trained
        return 0 if self.parallel.cpu_offload else self.share(4)

    def flat(self) -> int:
        """Gradients that are summed over ranks in one piece."""
        if self.of_base:
            return 4 * self.size.trained * (self.num_ranks > 1)
        others = self.num_ranks > self.parallel.tensor_parallel
        return 0 if self.has_rows else self.share(4) * others

    def whole(self) -> int:
        """What is divided, to sample from."""
        return self._num_divided(self.size) * self.item

    def gathered(self) -> int:
        """At a time in training."""
        if not self.has_rows:
            return 0
        L = self.num_layers
        layers = min(GATHERED, L) if self.parallel.reshard_after_forward else L
        linears = self.slice.linears - self.size.trained * self.of_base
        return (self._outside() + layers * linears // L) * self.item

    def fresh(self, several: bool) -> int:
        """Gradients at the end of a backward, where they are the most, beside those that `gradients` counts."""
        if self.of_base:
            return 0 if several else 4 * self.size.trained
        if not self.has_rows:
            added_up = several and self.item == 4  # but for the one that is being added
            return self.slice.table * 4 if added_up else self.share(self.item)
        layer = self.slice.linears // self.num_layers
        return max(layer, self._outside()) * (self.item + SENT)

    def says(self) -> str:
        p = self.parallel
        if not self.has_rows:
            over = f"divided over {p.tensor_parallel} ranks"
        else:
            copies = f" in {p.replicas} copies" if p.replicas > 1 else ""
            num = self.num_shares * p.tensor_parallel
            over = f"divided over {num} rank{'s' * (num > 1)}{copies}"
        keys = ['parallel.mode = "fsdp"'] * self.has_rows
        keys += [f"parallel.tensor_parallel = {p.tensor_parallel}"] * (p.tensor_parallel > 1)
        sums = (
            "what gathering takes"
            if p.tensor_parallel == 1
            else "what gathering and summing over ranks takes"
        )
        if self.of_base:
            return (
                f"{keys[0]}: the base is {over}, adapters and their optimizer are whole on each; the whole base in "
                f"rollouts; {sums} is not in the seconds"
            )
        return (
            f"{' and '.join(keys)}: weights, optimizer and reference are {over}; whole weights in rollouts; "
            f"{sums} is not in the seconds"
        )

    def share(self, item: int) -> int:
        """Of this rank's rows, or its slice, at so many bytes a weight."""
        return -(-self._num_divided(self.slice) * item // self.num_shares)

    def _num_divided(self, size: Size) -> int:
        return size.total - size.trained if self.of_base else size.total

    def _outside(self) -> int:
        """Weights of a slice outside of the layers."""
        return self.slice.total - self.slice.linears
