"""An update that keeps what a comparison needs: its first gradient, how far the weights moved, every token's coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.config import Config
from r1fast.grpo import token_coefficients
from r1fast.policy import Policy
from r1fast.policy_update import PolicyUpdate
from r1fast.recording import Recording, digests
from r1fast.step_plan import Key
from r1fast.types import Completion, PackedBatch, Problem, Reward


@dataclass(slots=True)
class Pass:
    """One completion in one pass over the rollout."""

    coefficients: Tensor  # (R,) -d loss / d log-probability
    ratios: Tensor  # (R,) of the policy's probability to the sampler's


class ReplayedUpdate(PolicyUpdate):
    """Keeps, once `watching`, its first gradient and what every token was multiplied by."""

    def __init__(self, policy: Policy, config: Config, folder: Path, recording: Recording):
        state = recording.state
        super().__init__(
            policy, config, folder, stage=state["stage"], data=state["data"], resume=False
        )
        self.watching, self.began, self.first_at = False, 0, 0
        self.first_gradient: list[Tensor] | None = None
        self.passes: dict[Key, dict[int, Pass]] = {}  # by iteration
        self.owners: dict[Key, tuple[Problem, Completion, Reward]] = {}  # of this rank

    def on_gradient(self) -> None:
        if self.watching and self.first_gradient is None:
            self.first_at = self.optimizer_step - self.began
            self.first_gradient = [
                torch.zeros_like(m, device="cpu") if m.grad is None else m.grad.cpu().clone()
                for m in self.optimizer.masters
            ]

    def on_logprobs(self, keys: list[Key], batch: PackedBatch, logprobs: Tensor) -> None:
        if not self.watching:
            return
        taken = logprobs if batch.policy_logprobs is None else batch.policy_logprobs
        coefficients = token_coefficients(logprobs, batch, self.config.grpo).cpu()
        ratios = (taken - batch.sampler_logprobs).exp().cpu()
        bounds = batch.cu_seqlens.tolist()
        iteration = (self.optimizer_step - self.began) // self.config.grpo.num_mini_batches
        for i, a, b in zip(batch.sequence_index, bounds, bounds[1:], strict=False):
            # in place of those of a mini-batch that is done again
            self.passes.setdefault(keys[i], {})[iteration] = Pass(coefficients[a:b], ratios[a:b])

    def take_budget(self, recording: Recording) -> bool:
        """Micro-batches as the recorded update made them. Whether it halved them itself."""
        before, after = (
            recording.state[when].get("counters", {}).get("token_budget")
            for when in ("before", "after")
        )
        budget = after or before
        self.token_budget.num_tokens = budget["num_tokens"]
        self.token_budget.was_halved = budget["was_halved"]
        return budget != before

    def weights(self) -> list[Tensor]:
        """A copy of what the optimizer moves, in float32."""
        return [m.detach().cpu().clone() for m in self.optimizer.masters]


@dataclass(slots=True)
class State:
    """A copy of all that a step changes; `Trainer.restore` takes it as it takes a checkpoint."""

    step: int
    state: dict
    parts: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, trainer: PolicyUpdate, step: int) -> State:
        parts = {
            key: {name: x.detach().cpu().clone() for name, x in named.items()}
            for key, named in trainer.state_tensors().items()
        }
        return cls(step, trainer.state(), parts)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.parts[name]


@dataclass(slots=True)
class Outcome:
    """What one update did."""

    row: dict[str, float]
    digests: dict[str, str]
    gradient: list[Tensor] | None  # of the first optimizer step that was made, before clipping
    gradient_at: int  # which one that was
    moved: list[Tensor]  # the weights after less those before
    passes: dict[Key, dict[int, Pass]]


def run_update(trainer: ReplayedUpdate, recording: Recording) -> Outcome:
    before = trainer.weights()
    trainer.watching, trainer.began = True, trainer.optimizer_step
    trainer.first_gradient, trainer.passes = None, {}
    groups = recording.of_rank(trainer.rank, trainer.world_size)
    trainer.owners = {
        (group.position, i): (group.problem, completion, reward)
        for group in groups
        for i, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
    }
    row = trainer.update(groups, recording.step - 1)
    moved = [after.sub_(x) for after, x in zip(trainer.weights(), before, strict=True)]
    found = digests(trainer.state_tensors())
    gradient, passes = trainer.first_gradient, _of_all_ranks(trainer.passes)
    return Outcome(row, found, gradient, trainer.first_at, moved, passes)


def _of_all_ranks(passes: dict[Key, dict[int, Pass]]) -> dict[Key, dict[int, Pass]]:
    """Of every completion, on whatever rank it was trained: a rank compares those that it sampled."""
    own = [(key, n, x) for key, of_key in passes.items() for n, x in of_key.items()]
    indices = distributed.gather_objects([(*key, n, len(x.ratios)) for key, n, x in own])
    numbers = [t.float() for _, _, x in own for t in (x.coefficients, x.ratios)]
    sizes = [2 * sum(length for *_, length in rows) for rows in indices]
    flat = torch.cat(numbers) if numbers else torch.zeros(0)
    found: dict[Key, dict[int, Pass]] = {}
    for rows, part in zip(indices, distributed.gather_tensors(flat, sizes), strict=True):
        pieces = iter(part.split([length for *_, length in rows for _ in range(2)]))
        for position, sample, n, _ in rows:
            found.setdefault((position, sample), {})[n] = Pass(next(pieces), next(pieces))
    return found
