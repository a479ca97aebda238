"""Bytes of a rank that holds a share of a model (parallel.mode = "fsdp"), for planner.py.

between steps   4 bytes a weight for its rows, which are the masters, 8 for their moments, the reference's
training        embedding, norm and head whole from forward to backward; of the layers three: the one that
                computes, and the next one as it arrives and as it is laid out
gradients       this rank's rows in float32; whole those of a layer, as made and as sent in float32, and at the
                end those of the embedding and the head
rollout         all weights, gathered
"""

from __future__ import annotations

from dataclasses import dataclass

from r1fast.config import ParallelConfig
from r1fast.costs import Size

GATHERED = 3  # layers at a time
SENT = 4  # bytes of a gradient that is summed over ranks


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one rank of `num_ranks` that together hold the model `replicas` times."""

    size: Size
    num_layers: int
    item: int  # bytes of a weight in the forward
    num_ranks: int
    parallel: ParallelConfig

    @property
    def num_shares(self) -> int:
        return max(1, self.num_ranks // self.parallel.replicas)

    def kept(self) -> dict[str, int]:
        """Between two steps, on the device."""
        if self.parallel.cpu_offload:
            return {"weights": 0, "optimizer": 0}
        return {"weights": self._share(4), "optimizer": self._share(8)}

    def rows_of_gradients(self) -> int:
        return 0 if self.parallel.cpu_offload else self._share(4)

    def whole(self) -> int:
        """All weights, to sample from."""
        return self.size.total * self.item

    def gathered(self) -> int:
        """At a time in training."""
        L = self.num_layers
        layers = min(GATHERED, L) if self.parallel.reshard_after_forward else L
        return (self._outside() + layers * self.size.linears // L) * self.item

    def fresh(self) -> int:
        """Gradients that are not divided yet, at the end of a backward, where they are the most."""
        layer = self.size.linears // self.num_layers
        return max(layer, self._outside()) * (self.item + SENT)

    def says(self) -> str:
        copies = f", {self.parallel.replicas} times" if self.parallel.replicas > 1 else ""
        return (
            f'parallel.mode = "fsdp": weights, optimizer and reference are divided over {self.num_shares} '
            f"ranks{copies}; whole weights in rollouts; what gathering takes is not in the seconds"
        )

    def _share(self, item: int) -> int:
        return -(-self.size.trained * item // self.num_shares)

    def _outside(self) -> int:
        """Weights outside of the layers."""
        return self.size.total - self.size.linears
