"""Training of a preference reward model: packed micro-batches, one loss a step, halved where memory runs out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from r1fast import _C, distributed
from r1fast.config import OptimConfig
from r1fast.data import batch_indices
from r1fast.metrics import MetricsWriter, Timer, progress, warn
from r1fast.optim import Optimizer, learning_rate
from r1fast.profiling import Profiler
from r1fast.reward_model import TOKEN_BUDGET, LabelledResponse, PreferencePair, RewardModel
from r1fast.token_budget import TokenBudget

Objective = Literal["pairwise", "pointwise"]
Item = PreferencePair | LabelledResponse
MAX_SKIPPED = 5  # steps in a row with a non-finite gradient


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    items: list[Item]
    num_tokens: int
    sequence_index: list[int]  # of the items


def accumulate_gradients(
    model: RewardModel,
    items: Sequence[Item],
    *,
    denominator: int,  # items of the whole step, over all ranks and micro-batches
    token_budget: int | TokenBudget = TOKEN_BUDGET,  # the latter is halved where memory runs out
    after_backward: Callable[[], None] = lambda: None,  # Optimizer.accumulate
    timer: Timer | None = None,
) -> dict[str, float]:
    """Add the gradient of sum(loss) / denominator to .grad; returns sums over `items`.

    Both sequences of a pair are in one micro-batch. Without gradients enabled, only the sums.
    """
    timer = timer or Timer()
    if isinstance(token_budget, int):
        batches = _pack(model, items, token_budget, longer_alone=False)
        return _add_up(model, batches, denominator, after_backward, timer)

    def attempt() -> dict[str, float]:
        batches = _pack(model, items, token_budget.num_tokens, longer_alone=token_budget.was_halved)
        watched = token_budget.each(batches)
        return _add_up(model, watched, denominator, after_backward, timer)

    return token_budget.fitting(attempt)


def _pack(
    model: RewardModel, items: Sequence[Item], num_tokens: int, *, longer_alone: bool
) -> Iterator[_MicroBatch]:
    lengths = [sum(len(model.trim(ids)) for ids in item.sequences()) for item in items]
    longer = [i for i, n in enumerate(lengths) if n > num_tokens]
    if longer and not longer_alone:
        i = lengths.index(max(lengths))
        raise ValueError(
            f"example {i} of the batch has {lengths[i]} tokens, over token_budget = {num_tokens}"
        )
    short = [i for i, n in enumerate(lengths) if n <= num_tokens]
    bins = [[i] for i in longer]
    if short:
        bins += [[short[i] for i in b] for b in _C.pack([lengths[i] for i in short], num_tokens)]
    for index in bins:
        yield _MicroBatch([items[i] for i in index], sum(lengths[i] for i in index), index)


def _add_up(
    model: RewardModel,
    batches: Iterator[_MicroBatch],
    denominator: int,
    after_backward: Callable[[], None],
    timer: Timer,
) -> dict[str, float]:
    sums = {"loss": 0.0, "accuracy": 0.0, "tokens": 0.0}
    for batch in batches:
        with timer.part("forward"):
            scores = model([ids for item in batch.items for ids in item.sequences()])
            if isinstance(batch.items[0], PreferencePair):
                chosen, rejected = scores.view(-1, 2).unbind(1)
                margin = chosen - rejected
            else:
                sign = torch.tensor([1.0 if item.safe else -1.0 for item in batch.items])
                margin = scores * sign.to(scores.device)
            loss = -F.logsigmoid(margin).sum()
        if torch.is_grad_enabled():
            with timer.part("backward"):
                (loss / denominator).backward()
            after_backward()
        right = (margin > 0).sum() + 0.5 * (margin == 0).sum()  # a tie is half right
        sums["loss"] += float(loss.detach())
        sums["accuracy"] += float(right)
        sums["tokens"] += batch.num_tokens
    return sums


@torch.no_grad()
def evaluate_reward_model(
    model: RewardModel,
    data: Sequence[PreferencePair] | Sequence[LabelledResponse],
    *,
    token_budget: int | TokenBudget = TOKEN_BUDGET,
) -> dict[str, float]:
    """{"loss", "accuracy"}: the share of pairs in the right order, or of labels on the right side."""
    mine = data[distributed.rank() :: distributed.world_size()]
    sums = distributed.sum_dict(
        accumulate_gradients(model, mine, denominator=len(data), token_budget=token_budget)
    )
    return {name: sums[name] / len(data) for name in ("loss", "accuracy")}


def train_reward_model(
    model: RewardModel,
    data: Sequence[PreferencePair] | Sequence[LabelledResponse],
    *,
    objective: Objective = "pairwise",
    epochs: float = 1.0,
    max_steps: int = 0,  # 0 = by epochs
    batch_size: int = 256,  # pairs or responses a step, over all ranks
    optim: OptimConfig,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
    activation_checkpointing: str = "auto",  # as model.activation_checkpointing; auto: none until memory runs out
    out_dir: Path | None = None,  # rows go to its metrics.jsonl; the caller saves the model
    title: str = "reward model",
    eval_data: Sequence[PreferencePair] | Sequence[LabelledResponse] = (),
    profile_steps: int = 0,  # traced into out_dir/profile after one that warms up
) -> dict[str, float]:
    """Train in place. Returns the last step's metrics, with eval/loss and eval/accuracy of
    `eval_data`. The gradient does not depend on the split into micro-batches and ranks."""
    _check(data, "data", objective)
    if eval_data:
        _check(eval_data, "eval_data", objective)
    if batch_size < 1 or max_steps < 0 or (max_steps == 0 and epochs <= 0):
        raise ValueError(
            "batch_size must be at least 1, and max_steps or epochs above 0, got "
            f"batch_size={batch_size}, max_steps={max_steps}, epochs={epochs}"
        )
    if profile_steps and out_dir is None:
        raise ValueError(f"profile_steps = {profile_steps} needs an out_dir to write to, got none")
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_size = min(batch_size, len(data))
    num_steps = max_steps or max(1, math.ceil(epochs * len(data) / batch_size))
    optimizer, device = Optimizer(model.named_parameters(), optim), model.score_weight.device
    decoder, is_auto = model.decoder, activation_checkpointing == "auto"
    decoder.checkpointing = "none" if is_auto else activation_checkpointing

    def relieve() -> str:
        if not is_auto or decoder.checkpointing == "full":
            return ""
        decoder.checkpointing = "full"
        return "its layers are computed again in the backward"

    budget = TokenBudget(
        token_budget, discard=optimizer.zero_grad, relieve=relieve,
        advice="Leave out the longest rows, take model.dtype = bfloat16, or a smaller model",
    )  # fmt: skip
    timer = Timer(torch.cuda.synchronize if device.type == "cuda" else None)
    writer = MetricsWriter(out_dir, stage=title) if out_dir is not None and rank == 0 else None
    num_tokens, skipped, values = 0.0, 0, {}
    try:
        with (
            progress(title, total=num_steps, line_every=max(1, num_steps // 20)) as bar,
            Profiler(
                out_dir or Path(), timer, device, profile_steps if rank == 0 else 0,
                num_left=num_steps,
            ) as profiler,
        ):  # fmt: skip
            for step in range(num_steps):
                profiler.begin(step)
                began = time.perf_counter()
                batch = [data[i] for i in batch_indices(len(data), batch_size, seed, step)]
                with timer("train"):
                    own = accumulate_gradients(
                        model,
                        batch[rank::world_size],
                        denominator=len(batch),
                        token_budget=budget,
                        after_backward=optimizer.accumulate,
                        timer=timer,
                    )
                    with timer.part("optimizer"):
                        distributed.sum_gradients(optimizer.masters)
                        lr = learning_rate(optim, step, num_steps)
                        norm = optimizer.step(lr)
                sums, grad_norm = distributed.sum_dict(own), float(norm)
                budget.agree(device)
                skipped = 0 if math.isfinite(grad_norm) else skipped + 1
                if skipped == MAX_SKIPPED:
                    raise RuntimeError(
                        f"{title}: the gradient was not finite in {MAX_SKIPPED} steps in a row, "
                        f"the last was step {step}; lower optim.lr (now {optim.lr:g})"
                    )
                if skipped:
                    warn(f"{title}: gradient of step {step} is not finite; step skipped")
                seconds = time.perf_counter() - began
                profiler.end(seconds, int(sums["tokens"]))
                timer.take()
                num_tokens += sums["tokens"]
                values = {
                    "loss": sums["loss"] / len(batch),
                    "accuracy": sums["accuracy"] / len(batch),
                    "grad_norm": grad_norm,
                    "learning_rate": lr,
                    "epoch": (step + 1) * batch_size / len(data),
                    "num_tokens": num_tokens,
                    "step_time": seconds,
                    "tokens_per_second": sums["tokens"] / seconds,
                    "train/token_budget": budget.num_tokens,
                }
                if eval_data and step == num_steps - 1:
                    held_out = evaluate_reward_model(model, eval_data, token_budget=budget)
                    values |= {f"eval/{name}": value for name, value in held_out.items()}
                if writer is not None:
                    writer.write(step + 1, values)
                bar.update({"step": step + 1, "stage": title, **values})
    finally:
        if writer is not None:
            writer.close()
    return values


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
