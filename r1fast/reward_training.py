"""Training of preference reward models, with checkpoints and token budget of any other training.

pairwise:  mean of -log sigmoid(s_chosen - s_rejected)      Bradley-Terry; InstructGPT, eq. 1
pointwise: mean of -log sigmoid(s) where safe, -log sigmoid(-s) where not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from r1fast import _C, distributed
from r1fast.config import Config, LoraConfig
from r1fast.data_order import batch_indices
from r1fast.interrupt import stoppable
from r1fast.reward_model import (
    TOKEN_BUDGET,
    LabelledResponse,
    PreferencePair,
    RewardModel,
    save_reward_model,
)
from r1fast.timer import Timer
from r1fast.training import Trainer
from r1fast.training_state import digest

Objective = Literal["pairwise", "pointwise"]
Items = Sequence[PreferencePair] | Sequence[LabelledResponse]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What is forwarded at once: items by their place. Both sequences of a pair are in one."""

    sequence_index: list[int]
    num_tokens: int


def micro_batches(
    model: RewardModel, items: Items, token_budget: int, *, longer_alone: bool = False
) -> list[MicroBatch]:
    """Items packed by their tokens. ValueError for one over the budget, unless it may run alone."""
    if not items:
        return []
    lengths = [sum(len(model.trim(ids)) for ids in item.sequences()) for item in items]
    if max(lengths) > token_budget and not longer_alone:
        i = lengths.index(max(lengths))
        raise ValueError(
            f"example {i} of the batch has {lengths[i]} tokens, over token_budget = {token_budget}"
        )
    packed = _C.pack(lengths, max(token_budget, *lengths) if longer_alone else token_budget)
    return [MicroBatch(list(index), sum(lengths[i] for i in index)) for index in packed]


def accumulate_gradients(
    model: RewardModel,
    items: Items,
    batches: Iterable[MicroBatch],
    *,
    denominator: int,  # items of the whole step, over all ranks and micro-batches
    after_backward: Callable[[], None] = lambda: None,  # Optimizer.accumulate
    timer: Timer | None = None,
) -> dict[str, float]:
    """Add the gradient of sum(loss) / denominator to .grad; returns sums over `items`.

    Without gradients enabled, only the sums.
    """
    timer = timer or Timer()
    sums = {"loss": 0.0, "accuracy": 0.0, "tokens": 0.0}
    for micro in batches:
        batch = [items[i] for i in micro.sequence_index]
        with timer.part("forward"):
            scores = model([ids for item in batch for ids in item.sequences()])
            if isinstance(batch[0], PreferencePair):
                chosen, rejected = scores.view(-1, 2).unbind(1)
                margin = chosen - rejected
            else:
                sign = torch.tensor([1.0 if item.safe else -1.0 for item in batch])
                margin = scores * sign.to(scores.device)
            loss = -F.logsigmoid(margin).sum()
        if torch.is_grad_enabled():
            with timer.part("backward"):
                (loss / denominator).backward()
            after_backward()
        right = (margin > 0).sum() + 0.5 * (margin == 0).sum()  # a tie is half right
        sums["loss"] += float(loss.detach())
        sums["accuracy"] += float(right)
        sums["tokens"] += micro.num_tokens
    return sums


@torch.no_grad()
def evaluate_reward_model(
    model: RewardModel, data: Items, *, token_budget: int = TOKEN_BUDGET
) -> dict[str, float]:
    """{"loss", "accuracy"}: the share of pairs in the right order, or of labels on the right side."""
    mine = data[distributed.rank() :: distributed.world_size()]
    batches = micro_batches(model, mine, token_budget, longer_alone=True)
    sums = distributed.sum_dict(accumulate_gradients(model, mine, batches, denominator=len(data)))
    return {name: sums[name] / len(data) for name in ("loss", "accuracy")}


@dataclass(slots=True)
class RewardPolicy:
    """A reward model where the other trainers have a policy."""

    model: RewardModel
    tokenizer: Any = None
    path: str = ""  # what it was read from

    @property
    def device(self) -> torch.device:
        return self.model.score_weight.device

    def save(self, path: str | Path) -> None:
        save_reward_model(self.model, path, tokenizer=self.tokenizer)


class RewardTrainer(Trainer):
    """Minimises the pairwise or the pointwise loss over `[sft]` epochs, `[optim]`.

    `eval_data` is scored after the last step, and every `eval.every_steps`. `out` is where the model
    goes. All weights are trained, whatever [lora] says. Raises ValueError for data of another kind.
    """

    section, shorter = "sft", "sft.max_seq_tokens"

    def __init__(
        self,
        policy: RewardPolicy,
        config: Config,
        folder: str | Path,
        data: Items,
        *,
        objective: Objective = "pairwise",
        eval_data: Items = (),
        stage: str = "reward model",
        out: str | Path = "",
        force: bool = False,
    ):
        _check(data, "data", objective)
        if eval_data:
            _check(eval_data, "eval_data", objective)
        s = config.sft
        self.items, self.eval_data, self.out = data, eval_data, out
        self.evaluation: dict[str, float] = {}  # of `eval_data`, the newest
        self.batch_size = min(s.batch_size, len(data))
        num_steps = s.max_steps or max(1, math.ceil(s.epochs * len(data) / self.batch_size))
        super().__init__(
            policy,
            replace(config, lora=LoraConfig()),
            folder,
            stage=stage,
            num_steps=num_steps,
            num_optimizer_steps=num_steps,
            data=digest(row for item in data for row in _rows(item)),
            force=force,
        )

    def settle(self, token_budget: int | str) -> tuple[int, str]:
        """What a reward model takes by default, and enough for both sequences of any pair; layers keep
        all that they can until memory runs out."""
        if token_budget == "auto":
            longest = max(sum(map(len, item.sequences())) for item in self.items)
            token_budget = max(TOKEN_BUDGET, longest)
        asked = self.config.model.activation_checkpointing
        return int(token_budget), "none" if asked == "auto" else asked

    def model_folder(self) -> Path:
        return Path(self.out) if self.out else super().model_folder()

    def own_measure(self) -> str:
        return "-loss"

    def line_every(self) -> int:
        return max(1, self.num_steps // 20)

    def train_step(self, step: int) -> dict[str, float]:
        chosen = batch_indices(len(self.items), self.batch_size, self.config.seed, step)
        batch = [self.items[i] for i in chosen]
        self.batch = owned = batch[self.rank :: self.world_size]
        with self.timer("train"):
            with stoppable():
                sums = self.token_budget.fitting(lambda: self._backward(owned, len(batch)))
            with self.timer.part("optimizer"):
                norm, lr = self.optimize()
        total = distributed.sum_dict(sums)
        self.num_tokens += int(total["tokens"])
        return {
            "loss": total["loss"] / len(batch),
            "accuracy": total["accuracy"] / len(batch),
            "learning_rate": lr,
            "epoch": (step + 1) * self.batch_size / len(self.items),
        } | self.read_norms([norm])

    def _backward(self, owned: list, denominator: int) -> dict[str, float]:
        budget = self.token_budget
        batches = micro_batches(
            self.model, owned, budget.num_tokens, longer_alone=budget.was_halved
        )
        return accumulate_gradients(
            self.model,
            owned,
            budget.each(batches),
            denominator=denominator,
            after_backward=self.optimizer.accumulate,
            timer=self.timer,
        )

    def after_step(self) -> dict[str, float]:
        every = self.config.eval.every_steps
        if self.step == self.num_steps or (every and self.step % every == 0):
            return {f"eval/{name}": value for name, value in self.evaluate().items()}
        return {}

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on `eval_data`; empty where there is none."""
        if self.eval_data:
            with self.timer("eval"):
                self.evaluation = evaluate_reward_model(
                    self.model, self.eval_data, token_budget=self.token_budget.num_tokens
                )
        return self.evaluation


def _rows(item: PreferencePair | LabelledResponse) -> list[list[int]]:
    if isinstance(item, PreferencePair):
        return [item.prompt_ids, item.chosen_ids, item.rejected_ids]
    return [item.prompt_ids, item.response_ids, [int(item.safe)]]


def _check(data: Sequence, name: str, objective: str) -> None:
    if objective not in get_args(Objective):
        raise ValueError(f"objective must be pairwise or pointwise, got {objective!r}")
    wanted = PreferencePair if objective == "pairwise" else LabelledResponse
    if not data:
        raise ValueError(f"{name} is empty; {objective} training needs {wanted.__name__} items")
    for i, item in enumerate(data):
        if not isinstance(item, wanted):
            raise ValueError(
                f"{objective} training needs {wanted.__name__} items, "
                f"got {type(item).__name__} at {name}[{i}]"
            )
