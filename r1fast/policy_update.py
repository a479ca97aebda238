"""The training part of a GRPO step: scored groups -> advantages -> packed mini-batches -> one optimizer step each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.batch import pack
from r1fast.config import Config
from r1fast.grpo import grpo_objective, loss_options, rollout_advantages, token_weights
from r1fast.kernels.loss_rows import NonFiniteError
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.metrics import warn
from r1fast.policy import Policy
from r1fast.reference import Reference, engine_logprobs
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.training import Trainer, cost_per_token, hidden_states
from r1fast.types import PackedBatch, RolloutGroup, Sequence


def check_loss_options(config: Config) -> PolicyLossOptions:
    """The loss that the config asks for. Raises ValueError naming the key of what it cannot be."""
    try:
        return PolicyLossOptions(**loss_options(config.grpo))
    except ValueError as error:
        raise ValueError(f"grpo.{error}") from None


class PolicyUpdate(Trainer):
    """What learns from scored groups, wherever they come from: a rollout, or a recorded one."""

    section = "grpo"
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
    ):
        g, r = config.grpo, config.rollout
        self.drops = g.drop_without_signal and check_loss_options(config).learns_by_advantage_alone
        self.reference = Reference(policy, config) if g.kl_coef else None
        super().__init__(
            policy,
            config,
            folder,
            stage=stage,
            num_steps=g.num_steps,
            num_optimizer_steps=g.num_steps * g.num_mini_batches * g.num_iterations,
            data=data,
            force=force,
        )
        self.sampling = SamplingParams(
            r.temperature, r.top_p, r.top_k, r.max_completion_tokens, min_p=r.min_p
        )
        self.engine = Engine.of(policy, r)
        self.is_invariant = r.batch_invariant  # the loss takes the engine's log-probabilities

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        return {} if self.reference is None else {"reference": self.reference.tensors()}

    def extra_state(self) -> dict:
        return {} if self.reference is None else {"reference_version": self.reference.version}

    def load_extra(self, saved) -> None:
        if self.reference is not None:
            self.reference.load(saved.tensors("reference"), saved.state["reference_version"])

    def update(self, groups: list[RolloutGroup], step: int) -> dict[str, float]:
        """One pass (or `num_iterations`) over a rollout. Returns the metrics of the training part."""
        g, G = self.config.grpo, self.config.rollout.num_generations
        for group in groups:
            if len(group.completions) != G:
                raise ValueError(
                    f"problem {group.problem.id!r} has {len(group.completions)} completions, "
                    f"rollout.num_generations is {G}"
                )
        sequences = self._sequences(groups)
        # in the order of the groups, G of each: what all ranks must agree on
        own = [(len(s.completion_ids), s.advantage != 0) for s in sequences.values()]
        by_rank = distributed.gather_objects(own)
        P = sum(map(len, by_rank)) // G
        facts = {
            (p, i): by_rank[p % self.world_size][p // self.world_size * G + i]
            for p in range(P)
            for i in range(G)
        }
        length = {key: n for key, (n, _) in facts.items()}
        live = {key for key, (_, signal) in facts.items() if signal or not self.drops}
        if self.reference is not None:
            with self.timer("reference"):
                own_sequences = list(sequences.values())
                self.token_budget.fitting(lambda: self._fill_ref_logprobs(own_sequences))
        unshared = sum(s.num_tokens - 1 for s in sequences.values()) * g.num_iterations
        sums = {"loss": 0.0, "unshared": float(unshared), "forwarded": 0.0, "num_tokens": 0.0}
        norms, lr, mismatch = [], 0.0, (0.0, 0.0, 0.0, 0)
        num_parts = g.num_mini_batches * g.num_iterations
        for iteration in range(g.num_iterations):
            for part in self._split(list(length), step, iteration):
                if live.isdisjoint(part):  # on every rank: no gradient, so no step of AdamW
                    lr = self.next_learning_rate()
                    continue
                first = not norms
                with self.timer("train"):
                    backward = partial(self._backward, part, sequences, length, live)
                    mini = self.token_budget.fitting(partial(backward, check_mismatch=first))
                    norm, lr = self.optimize()
                    self.engine.reset_prefix_cache()
                norms.append(norm)
                if first:
                    found = (mini.pop(name) for name in ("diff", "max_diff", "max_graph"))
                    mismatch = (*found, mini["num_tokens"])
                for key, value in mini.items():
                    sums[key] = sums.get(key, 0.0) + value
        versions = {} if self.reference is None else {"reference/version": self.reference.version}
        self._refresh_reference(num_parts)
        total = distributed.sum_dict(sums)
        diffs = distributed.gather_objects(mismatch)
        num_tokens = total.pop("num_tokens")
        self.num_tokens += sum(length.values()) + G * sum(
            distributed.gather_objects(sum(len(x.prompt_ids) for x in groups))
        )
        row = {"loss": total.pop("loss") / num_parts, "learning_rate": lr} | versions
        forwarded, unshared = total.pop("forwarded"), total.pop("unshared")
        row["train/tokens_forwarded"] = forwarded
        row["train/tokens_saved"] = 1 - forwarded / unshared
        num_live = sum(length[key] for key in live)
        row["train/tokens_without_signal"] = 1 - num_live / sum(length.values())
        row["train/steps_without_signal"] = num_parts - len(norms)
        if norms:
            row["grad_norm"] = sum(norms) / len(norms)
        # means over what was forwarded; nothing is measured where nothing was
        row |= {key: value / max(num_tokens, 1) for key, value in total.items()}
        if num_diffs := sum(d[3] for d in diffs):
            row["logprob_mismatch/mean"] = sum(d[0] for d in diffs) / num_diffs
            row["logprob_mismatch/max"] = max(d[1] for d in diffs)
            if self.is_invariant:
                row["logprob_mismatch/graph_max"] = max(d[2] for d in diffs)
        return row

    def _sequences(self, groups: list[RolloutGroup]) -> dict[tuple[int, int], Sequence]:
        """(position in the step, sample) -> training sequence, of this rank's groups."""
        batch_std = self._batch_std(groups) if self.config.grpo.scale_rewards == "batch" else None
        advantages = rollout_advantages(groups, self.config.grpo, batch_std)
        return {
            (self.rank + n * self.world_size, i): Sequence(
                group.prompt_ids, c.token_ids, old_logprobs=c.logprobs, advantage=advantage
            )
            for n, (group, row) in enumerate(zip(groups, advantages, strict=True))
            for i, (c, advantage) in enumerate(zip(group.completions, row, strict=True))
        }

    def _batch_std(self, groups: list[RolloutGroup]) -> Tensor:
        """Standard deviation of every reward of the step, over all ranks."""
        totals = sum(distributed.gather_objects([r.total for g in groups for r in g.rewards]), [])
        correction = int(self.config.grpo.std == "sample" and len(totals) > 1)
        return torch.tensor(totals, dtype=torch.float64).std(correction=correction)

    def _split(self, keys: list[tuple[int, int]], step: int, iteration: int) -> list[list]:
        """All (position, sample) keys, shuffled and cut into `num_mini_batches` nearly equal parts."""
        N = self.config.grpo.num_mini_batches
        if N > 1:
            random.Random(f"{self.config.seed}/split/{step}/{iteration}").shuffle(keys)
        return [keys[m * len(keys) // N : (m + 1) * len(keys) // N] for m in range(N)]

    def _backward(self, part, sequences, length, live, *, check_mismatch: bool) -> dict[str, float]:
        """Gradients of one mini-batch, this rank's share of it. Returns sums over tokens.

        The denominators are those of the whole mini-batch, also of what is not `live`.
        """
        g = self.config.grpo
        owned = [key for key in part if key in sequences and key in live]
        num_tokens = sum(length[key] for key in part)
        weights = token_weights(
            g.loss_type,
            [length[key] for key in owned],
            num_sequences=len(part),
            num_tokens=num_tokens,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )
        own = [sequences[key] for key in owned]
        if self.is_invariant:
            scored = engine_logprobs(self.engine, own, self.sampling.temperature)
            for s, logprobs in zip(own, scored, strict=True):
                s.policy_logprobs = logprobs
        batches = self._pack(own, weights)
        totals: dict[str, Tensor] = {}
        largest = graph = 0.0
        forwarded = 0
        for batch in batches:
            forwarded += batch.num_tokens
            try:
                loss, sums = grpo_objective(
                    hidden_states(self.model, batch),
                    self.model.head_weight,
                    batch,
                    g,
                    temperature=self.sampling.temperature,
                    num_tokens=num_tokens,
                )
            except NonFiniteError as error:
                warn(str(error))
                self.optimizer.spoil()
                continue
            loss.backward()
            self.optimizer.accumulate()
            sums["loss"] = loss.detach()
            logprobs = sums.pop("logprobs")
            if check_mismatch:
                taken = logprobs if batch.policy_logprobs is None else batch.policy_logprobs
                diff = (taken - batch.old_logprobs).abs()
                sums["diff"] = diff.sum()
                largest = max(largest, float(diff.max()))
                graph = max(graph, float((logprobs - taken).abs().max()))
            for key, value in sums.items():
                totals[key] = totals.get(key, 0) + value.double()
        result = {key: float(value) for key, value in totals.items()}
        if check_mismatch:
            result.setdefault("diff", 0.0)
            result["max_diff"], result["max_graph"] = largest, graph
        result.setdefault("num_tokens", 0.0)
        return result | {"forwarded": forwarded}

    def _pack(
        self, sequences: list[Sequence], weights: list[float] | None = None
    ) -> Iterator[PackedBatch]:
        """Micro-batches within the token budget, for `token_budget.fitting`."""
        batches = pack(
            sequences,
            self.token_budget.num_tokens,
            [0.0] * len(sequences) if weights is None else weights,
            device=self.policy.device,
            share_prompts=self.config.grpo.shared_prompt,
            cost_per_token=cost_per_token(self.model),
            longer_alone=self.token_budget.was_halved,
        )
        return self.token_budget.each(batches)

    def _fill_ref_logprobs(self, sequences: list[Sequence]) -> None:
        logprobs = self.reference.logprobs(sequences, self._pack)
        for s, values in zip(sequences, logprobs, strict=True):
            s.ref_logprobs = values

    def _refresh_reference(self, num_done: int) -> None:
        """reference := policy when the optimizer has passed a multiple of `ref_refresh_steps`."""
        every = self.config.grpo.ref_refresh_steps
        passed = every and self.optimizer_step // every > (self.optimizer_step - num_done) // every
        if self.reference is not None and passed:
            self.reference.refresh(self.model, self.optimizer_step)
