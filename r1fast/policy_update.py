"""The training part of a GRPO step: scored groups -> advantages -> packed mini-batches -> one optimizer step each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.balance import move, new_ranks, sampled_ranks
from r1fast.batch import pack
from r1fast.config import Config
from r1fast.context_parallel import coupled_objective
from r1fast.costs import Size
from r1fast.forward import cost_per_token, hidden_states, nothing, sequence_logprobs
from r1fast.grpo import (
    groups_with_signal,
    grpo_objective,
    loss_options,
    rollout_advantages,
    token_weights,
)
from r1fast.interrupt import stoppable
from r1fast.kernels.loss_rows import NonFiniteError
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.metrics import warn
from r1fast.plan import PlanWatch
from r1fast.planner import Job, Work
from r1fast.planning import grpo_groups, make_job, settle, watch
from r1fast.policy import Policy
from r1fast.reference import engine_logprobs, make_reference
from r1fast.rollout.make_engine import make_engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.shards import Shard
from r1fast.step_plan import Fact, Key, MiniBatch, StepPlan, check_groups
from r1fast.training import Trainer
from r1fast.types import Completion, PackedBatch, RolloutGroup, Sequence

# mean |sampler - trainer| in nats: ten times and more what the rounding of two forwards gives
MAX_MISMATCH = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}


def check_loss_options(config: Config) -> PolicyLossOptions:
    """The loss that the config asks for. Raises ValueError naming the key of what it cannot be."""
    try:
        return PolicyLossOptions(**loss_options(config.grpo))
    except ValueError as error:
        raise ValueError(f"grpo.{error}") from None


def settled_correction(config: Config) -> Config:
    """`config` with what grpo.rollout_correction = "auto" is."""
    if config.grpo.rollout_correction != "auto":
        return config
    kind = "token_truncate" if config.rollout.engine == "vllm" else "none"
    return replace(config, grpo=replace(config.grpo, rollout_correction=kind))


class PolicyUpdate(Trainer):
    """What learns from scored groups, wherever they come from: a rollout, or a recorded one."""

    section, can_shard = "grpo", True
    shorter = "rollout.max_completion_tokens or rollout.max_prompt_tokens"

    def __init__(
        self,
        policy: Policy,
        config: Config,
        folder: str | Path,
        *,
        stage: str,
        data: str,
        force: bool = False,
        resume: bool = True,
    ):
        config = settled_correction(config)
        g, r = config.grpo, config.rollout
        options = check_loss_options(config)
        # its sequences are in pieces, and their tokens' losses are not each its own
        self.couples = config.parallel.context_parallel > 1 and options.coupling != "token"
        self.drops = g.drop_without_signal and options.learns_by_advantage_alone
        super().__init__(
            policy,
            config,
            folder,
            stage=stage,
            num_steps=g.num_steps,
            num_optimizer_steps=g.num_steps * g.num_mini_batches * g.num_iterations,
            data=data,
            force=force,
            resume=resume,
        )
        self.sampling = SamplingParams(
            r.temperature, r.top_p, r.top_k, r.max_completion_tokens, min_p=r.min_p
        )
        self.engine = make_engine(policy, r, part=self.timer.part)
        self.max_mismatch = g.max_logprob_mismatch or MAX_MISMATCH[policy.model.head_weight.dtype]
        self.is_invariant = r.batch_invariant  # the loss takes the engine's log-probabilities
        self.corrects = g.rollout_correction != "none"  # for a sampler that is another engine

    def prepare(self) -> None:
        has_kl = self.config.grpo.kl_coef
        self.reference = make_reference(self.policy, self.config, self.parallel) if has_kl else None

    @contextmanager
    def whole_policy(self) -> Iterator[None]:
        with super().whole_policy():
            yield
            if self.parallel.is_sharded:
                self.engine.reset_prefix_cache()  # what it has packed is a copy of the weights

    def extra_tensors(self) -> dict[str, dict[str, Tensor | Shard]]:
        return {} if self.reference is None else {"reference": self.reference.tensors()}

    def extra_state(self) -> dict:
        return {} if self.reference is None else {"reference_version": self.reference.version}

    def load_extra(self, saved) -> None:
        if self.reference is not None:
            self.reference.load(saved.tensors("reference"), saved.state["reference_version"])

    def update(self, groups: list[RolloutGroup], step: int) -> dict[str, float]:
        """One pass (or `num_iterations`) over a rollout. Returns the metrics of the training part."""
        g = self.config.grpo
        check_groups(
            groups,
            num_generations=self.config.rollout.num_generations,
            vocab_size=self.model.spec.vocab_size,
        )
        sequences, plan = self._plan(groups)
        split = f"{self.config.seed}/split/{step}/"
        if self.world_size > 1 and (g.balance_ranks or self.grid.group_size > 1):
            with self.timer("balance"):
                for part in plan.mini_batches(f"{split}0"):
                    sequences = self._move(sequences, plan, part)
        self.work = self._work(groups, sequences, plan)
        self.batch = own = [s for key, s in sequences.items() if key in plan.live]
        if self.reference is not None:
            with self.timer("reference"), stoppable(in_step=self.parallel.in_step):
                self.token_budget.fitting(lambda: self._fill_ref_logprobs(own))
        sums = dict.fromkeys(("loss", "forwarded", "num_tokens"), 0.0)
        norms, lr, mismatch, replaced = [], 0.0, {}, False
        num_parts = g.num_mini_batches * g.num_iterations
        if self.corrects:
            with self.timer("train"), stoppable(in_step=self.parallel.in_step):
                sums["forwarded"] += self._take_apart(own, num_parts)
        for iteration in range(g.num_iterations):
            for part in plan.mini_batches(f"{split}{iteration}"):
                if not part.live:  # on any rank: no gradient, so no step of AdamW
                    lr = self.next_learning_rate()
                    continue
                with self.timer("train"):
                    backward = partial(self._backward, part, sequences)
                    with stoppable(in_step=self.parallel.in_step):
                        mini, diffs = self.token_budget.fitting(backward)
                    if not norms:  # the weights are those that sampled
                        mismatch = self._mismatch(diffs)
                        mean = mismatch.get("logprob_mismatch/mean", 0.0)
                        replaced = mean > self.max_mismatch and not self.corrects
                        if replaced:
                            sums["forwarded"] += mini["forwarded"] + self._replace_old(own)
                            mini, _ = self.token_budget.fitting(backward)
                    with self.timer.part("optimizer"):
                        norm, lr = self.optimize()
                    self.engine.reset_prefix_cache()
                norms.append(norm)
                for key, value in mini.items():
                    sums[key] = sums.get(key, 0.0) + value
        loads = distributed.gather_objects(sums["forwarded"])
        sums = self._counts(groups) | self.grid.once(sums)
        row = self._row(distributed.sum_dict(sums), plan, num_parts)
        if self.world_size > 1 and sum(loads):
            row["train/rank_imbalance"] = max(loads) * self.world_size / sum(loads)
        if self.reference is not None:
            row["reference/version"] = self.reference.version
        self._refresh_reference(num_parts)
        row |= mismatch | {
            "learning_rate": lr,
            "train/steps_without_signal": num_parts - len(norms),
            "train/old_logprobs_recomputed": int(replaced),
        }
        return row | self.read_norms(norms)

    def _plan(self, groups: list[RolloutGroup]) -> tuple[dict[Key, Sequence], StepPlan]:
        """This rank's training sequences, and what all ranks do with all of them."""
        g = self.config.grpo
        placed = {
            self.rank + n * self.world_size if group.position is None else group.position: group
            for n, group in enumerate(groups)
        }
        if g.denominator == "live":
            signals = groups_with_signal(groups)
            placed = {
                p: x for (p, x), signal in zip(placed.items(), signals, strict=True) if signal
            }
        groups = list(placed.values())
        batch_std = self._batch_std(groups) if g.scale_rewards == "batch" else None
        advantages = rollout_advantages(groups, g, batch_std)

        def is_masked(key: Key) -> bool:
            return self._is_masked(placed[key[0]].completions[key[1]])

        sequences = {
            (position, i): Sequence(
                group.prompt_ids, c.token_ids, old_logprobs=c.logprobs, advantage=advantage
            )
            for (position, group), row in zip(placed.items(), advantages, strict=True)
            for i, (c, advantage) in enumerate(zip(group.completions, row, strict=True))
        }
        own = [
            (*key, len(s.prompt_ids), len(s.completion_ids), s.advantage != 0, is_masked(key))
            for key, s in sequences.items()
        ]
        facts, num_rows = {}, 0
        for rank, rows in enumerate(distributed.gather_objects(own)):
            facts |= {(p, i): Fact(rank, *fact) for p, i, *fact in rows}
            num_rows += len(rows)
        assert len(facts) == num_rows, "two groups at one position of the step"
        return sequences, StepPlan(facts, g, drops=self.drops)

    def _move(
        self, sequences: dict[Key, Sequence], plan: StepPlan, part: MiniBatch
    ) -> dict[Key, Sequence]:
        """This rank's sequences after those of a mini-batch are dealt out, by their cost or where they are."""
        if not self.config.grpo.balance_ranks:
            return move(sequences, plan, sampled_ranks(part, plan.facts, self.grid), self.grid)
        ranks = new_ranks(
            part,
            plan.facts,
            self.grid.num_data_ranks,
            token_budget=self.micro_batch_tokens,
            cost_per_token=cost_per_token(self.policy.model),
            share_prompts=self.config.grpo.shared_prompt,
        )
        return move(sequences, plan, ranks, self.grid)

    @staticmethod
    def _work(groups: list[RolloutGroup], sequences: dict[Key, Sequence], plan: StepPlan) -> Work:
        """What this rank has sampled, and what of it is trained, as a plan counts it."""
        trained: dict[int, tuple[int, list[int]]] = {}
        for (position, i), s in sequences.items():
            if (position, i) in plan.live:
                _, lengths = trained.setdefault(position, (len(s.prompt_ids), []))
                lengths.append(len(s.completion_ids))
        sampled = [(len(g.prompt_ids), [len(c.token_ids) for c in g.completions]) for g in groups]
        return Work(sampled, list(trained.values()))

    def prompt_lengths(self) -> list[int]:
        """Of the prompts that may come."""
        return [self.config.rollout.max_prompt_tokens]

    def job(self) -> Job:
        """What one rank has to do in a step, at the longest completions."""
        prompts, cut = self.prompt_lengths(), self.config.rollout.max_completion_tokens
        spec = self.model.spec
        return make_job(
            "grpo",
            spec,
            Size.of(self.policy.model),
            self.config,
            self.policy.device,
            grpo_groups(self.config, prompts, cut, self.world_size),
            min(max(prompts) + cut, spec.max_position_embeddings),
            self.world_size,
        )

    def settle(self, token_budget: int | str) -> tuple[int, str]:
        return settle(self, self.job(), token_budget)

    def watch(self) -> PlanWatch | None:
        longest = f"completions of {self.config.rollout.max_completion_tokens} tokens, the longest"
        return watch(self, self.job(), longest)

    def _is_masked(self, completion: Completion) -> bool:
        return self.config.grpo.mask_truncated and completion.finish_reason == "length"

    def _counts(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """Tokens of this rank's groups, whatever becomes of them."""
        prompts = [len(group.prompt_ids) for group in groups for _ in group.completions]
        completions = [c for group in groups for c in group.completions]
        lengths = [len(c.token_ids) for c in completions]
        masked = [n for n, c in zip(lengths, completions, strict=True) if self._is_masked(c)]
        unshared = (sum(prompts) + sum(lengths) - len(lengths)) * self.config.grpo.num_iterations
        return {"seen": float(sum(prompts) + sum(lengths)), "completions": float(sum(lengths)),
                "masked": float(sum(masked)), "unshared": float(unshared)}  # fmt: skip

    def _row(self, total: dict[str, float], plan: StepPlan, num_parts: int) -> dict[str, float]:
        """Metrics of the sums over all ranks."""
        self.num_tokens += int(total.pop("seen"))
        completions, masked = total.pop("completions"), total.pop("masked")
        forwarded, unshared = total.pop("forwarded"), total.pop("unshared")
        num_tokens = total.pop("num_tokens")
        dropped = completions - masked - plan.num_tokens(plan.live)
        row = {
            "loss": total.pop("loss") / num_parts,
            "train/tokens_forwarded": forwarded,
            "train/tokens_saved": 1 - forwarded / max(unshared, 1),
            "train/tokens_without_signal": dropped / max(completions, 1),
        }
        if self.config.grpo.mask_truncated:
            row["train/tokens_masked"] = masked / max(completions, 1)
        # means over what was forwarded; nothing is measured where nothing was
        return row | {key: value / max(num_tokens, 1) for key, value in total.items()}

    def _mismatch(self, diffs: list[float]) -> dict[str, float]:
        """How far the sampler's log-probabilities are from the trainer's, over all ranks."""
        total, largest, graph, count = zip(*distributed.gather_objects(diffs), strict=True)
        if not sum(count):
            return {}
        row = {
            "logprob_mismatch/mean": sum(total) / sum(count),
            "logprob_mismatch/max": max(largest),
        }
        return row | ({"logprob_mismatch/graph_max": max(graph)} if self.is_invariant else {})

    def _replace_old(self, sequences: list[Sequence]) -> int:
        """Old log-probabilities by the forward that the loss takes, before the first update.

        The gradient that was made of the others is forgotten. Returns the tokens forwarded.
        """
        warn(
            "the sampler's log-probabilities are more than grpo.max_logprob_mismatch = "
            f"{self.max_mismatch:g} nats off the trainer's in the mean. In such steps the trainer "
            "computes the old ones again (train/old_logprobs_recomputed): look for what differs "
            "between the two forwards"
        )
        self.optimizer.zero_grad()
        for s, values in zip(sequences, self._logprobs(sequences), strict=True):
            s.old_logprobs = values
        return 0 if self.is_invariant else self._num_forwarded(sequences)

    def _take_apart(self, sequences: list[Sequence], num_parts: int) -> int:
        """The sampler's log-probabilities are no old ones: the trainer's are, by a forward where there is
        more than one optimizer step, else by that of the loss itself. Returns the tokens forwarded."""
        for s in sequences:
            s.rollout_logprobs, s.old_logprobs = s.old_logprobs, None
        if num_parts == 1:
            return 0
        for s, values in zip(sequences, self._logprobs(sequences), strict=True):
            s.old_logprobs = values
        return self._num_forwarded(sequences)

    def _logprobs(self, sequences: list[Sequence]) -> list[list[float]]:
        """Of every sequence's completion, as the loss takes them."""
        temperature = self.sampling.temperature
        if self.is_invariant:
            return engine_logprobs(self.engine, sequences, temperature)
        return self.token_budget.fitting(
            lambda: sequence_logprobs(self.model, self._in_step(sequences), temperature)
        )

    def _batch_std(self, groups: list[RolloutGroup]) -> Tensor:
        """Standard deviation of every reward of the step, over all ranks."""
        own = [r.total for g in groups for r in g.rewards]
        totals = sum(distributed.gather_objects(own), []) or [0.0]
        correction = int(self.config.grpo.std == "sample" and len(totals) > 1)
        return torch.tensor(totals, dtype=torch.float64).std(correction=correction)

    def _backward(
        self, part: MiniBatch, sequences: dict[Key, Sequence]
    ) -> tuple[dict[str, float], list[float]]:
        """Gradients of this rank's share of a mini-batch.

        Returns sums over tokens, and what `_mismatch` takes: of |what the loss takes - sampler's logprob|
        the sum and the largest, the largest |graph - what the loss takes|, the number of tokens.
        """
        g = self.config.grpo
        owned = [key for key in part.live if key in sequences]
        own = [sequences[key] for key in owned]
        weights = token_weights(
            g.loss_type,
            [len(s.completion_ids) for s in own],
            num_sequences=len(part.keys),
            num_tokens=part.num_tokens,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )
        if self.is_invariant:
            with self.timer.part("score"):
                scored = self._logprobs(own)
            for s, logprobs in zip(own, scored, strict=True):
                s.policy_logprobs = logprobs
        batches = self._in_step(own, weights)
        objective = coupled_objective if self.couples else grpo_objective
        totals: dict[str, Tensor] = {}
        diffs = torch.zeros(3, dtype=torch.float64, device=self.policy.device)
        forwarded = 0
        for batch in batches:
            with self.timer.part("forward"):
                hidden = hidden_states(self.model, batch)
            forwarded += batch.num_tokens
            if (batch.context.whole if self.couples else batch).is_idle:
                nothing(hidden, self.model.head_weight).backward()
                self.optimizer.accumulate()  # of others' losses, where they have other pieces
                continue
            try:
                with self.timer.part("forward"):
                    loss, sums = objective(
                        hidden,
                        self.model.head_weight,
                        batch,
                        g,
                        temperature=self.sampling.temperature,
                        num_tokens=part.num_tokens,
                        process_group=self.model.head_group,
                    )
            except NonFiniteError as error:
                warn(str(error))
                if self.parallel.in_step:  # other ranks exchange with this one
                    nothing(hidden, self.model.head_weight).backward()
                self.optimizer.spoil()
                totals["loss"] = diffs.new_tensor(math.nan)  # there is none, on any rank
                continue
            with self.timer.part("backward"):
                loss.backward()
            self.optimizer.accumulate()
            logprobs = sums.pop("logprobs")
            self.on_logprobs(owned, batch, logprobs)
            if not batch.is_idle:
                taken = logprobs if batch.policy_logprobs is None else batch.policy_logprobs
                off = (taken - batch.sampler_logprobs).abs()
                diffs[0] += off.sum(dtype=torch.float64)
                diffs[1] = diffs[1].maximum(off.max())
                diffs[2] = diffs[2].maximum((logprobs - taken).abs().max())
            for key, value in sums.items():
                totals[key] = totals.get(key, 0) + value.double()
        result = {key: float(value) for key, value in totals.items()}
        result.setdefault("num_tokens", 0.0)
        return result | {"forwarded": forwarded}, [*diffs.tolist(), result["num_tokens"]]

    def on_logprobs(self, keys: list[Key], batch: PackedBatch, logprobs: Tensor) -> None:  # (N,)
        """For subclasses: of a micro-batch's tokens; its sequence_index points into `keys`."""

    def _in_step(
        self, sequences: list[Sequence], weights: list[float] | None = None
    ) -> Iterator[PackedBatch]:
        """This rank's parts of micro-batches, for `token_budget.fitting`: as many on all ranks where they are in step."""
        return self.token_budget.each(self.parallel.parts(self._packed(sequences, weights)))

    def _num_forwarded(self, sequences: list[Sequence]) -> int:
        return sum(batch.num_tokens for batch in self.parallel.parts(self._packed(sequences)))

    def _packed(
        self, sequences: list[Sequence], weights: list[float] | None = None
    ) -> list[PackedBatch]:
        return pack(
            sequences,
            self.micro_batch_tokens,
            [0.0] * len(sequences) if weights is None else weights,
            device=self.policy.device,
            share_prompts=self.config.grpo.shared_prompt,
            cost_per_token=cost_per_token(self.policy.model),
            longer_alone=self.token_budget.was_halved,
        )

    def _fill_ref_logprobs(self, sequences: list[Sequence]) -> None:
        """The reference is whole on each rank of a tensor group: each takes some of their sequences."""
        num_parts = self.grid.tensor
        own = self.reference.logprobs(sequences[self.grid.tensor_rank :: num_parts], self._in_step)
        found = [own]
        if num_parts > 1:
            found = distributed.gather_objects(own, self.parallel.tensor.get_group())
        for n, logprobs in enumerate(found):
            for s, values in zip(sequences[n::num_parts], logprobs, strict=True):
                s.ref_logprobs = values

    def _refresh_reference(self, num_done: int) -> None:
        """reference := policy when the optimizer has passed a multiple of `ref_refresh_steps`."""
        every = self.config.grpo.ref_refresh_steps
        passed = every and self.optimizer_step // every > (self.optimizer_step - num_done) // every
        if self.reference is not None and passed:
            self.checkpoints.before_change()
            self.reference.refresh(self.model, self.optimizer_step)
