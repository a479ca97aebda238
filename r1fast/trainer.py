"""The GRPO loop: rollout -> rewards -> advantages -> packed mini-batches -> one optimizer step each."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from r1fast import distributed
from r1fast.batch import pack
from r1fast.config import Config
from r1fast.data import batch_indices
from r1fast.grpo import grpo_objective, loss_options, rollout_advantages, token_weights
from r1fast.kernels.loss_rows import NonFiniteError
from r1fast.kernels.policy_loss_options import PolicyLossOptions
from r1fast.metrics import warn
from r1fast.policy import Policy
from r1fast.rewards.score import RewardScorer
from r1fast.rollout.engine import Engine
from r1fast.rollout.result import EngineStats
from r1fast.rollout.sampler import SamplingParams, sample_seed
from r1fast.rollout_metrics import finish_rollout_metrics, rollout_extremes, rollout_sums
from r1fast.templates import encode_prompts
from r1fast.training import (
    Trainer,
    completion_logprobs,
    cost_per_token,
    digest,
    fill,
    hidden_states,
)
from r1fast.types import PackedBatch, Problem, RolloutGroup, Sequence


def _scored_by(problem: Problem) -> list[int]:
    """What of a problem decides its rewards, as numbers for the digest."""
    return list(json.dumps([problem.answer, problem.language, problem.kind]).encode())


class GRPOTrainer(Trainer):
    """Group relative policy optimisation with rule and preference rewards.

    `general` problems join in the last `rewards.preference_last_steps` steps (0: from the start).
    `evaluate`, where given, is called every `eval.every_steps` steps and returns metrics for the row.
    """

    def __init__(
        self,
        policy: Policy,
        config: Config,
        folder: str | Path,
        problems: list[Problem],
        scorer: RewardScorer,
        *,
        stage: str = "grpo",
        general: list[Problem] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        force: bool = False,
    ):
        g = config.grpo
        try:
            options = PolicyLossOptions(**loss_options(g))
        except ValueError as error:
            raise ValueError(f"grpo.{error}") from None
        if not problems:
            raise ValueError("there are no training problems (see data.train)")
        if g.prompts_per_step < distributed.world_size():
            raise ValueError(
                f"grpo.prompts_per_step = {g.prompts_per_step} is less than the "
                f"{distributed.world_size()} processes; every one needs a prompt"
            )
        self.drops = g.drop_without_signal and options.learns_by_advantage_alone
        self.problems, self.general, self.scorer = problems, general or [], scorer
        self.evaluate = evaluate
        self.prompt_ids = self._encode(problems, policy, config)
        self.general_ids = self._encode(self.general, policy, config)
        self._check_budget(policy, config)
        self.reference = copy.deepcopy(policy.model).requires_grad_(False) if g.kl_coef else None
        super().__init__(
            policy,
            config,
            folder,
            stage=stage,
            num_steps=g.num_steps,
            num_optimizer_steps=g.num_steps * g.num_mini_batches * g.num_iterations,
            data=digest(
                [*self.prompt_ids, *self.general_ids, *map(_scored_by, problems + self.general)]
            ),
            force=force,
        )
        r = config.rollout
        self.sampling = SamplingParams(
            r.temperature, r.top_p, r.top_k, r.max_completion_tokens, min_p=r.min_p
        )
        self.engine = Engine.of(policy, r)
        # whose log-probabilities the loss takes, and the reference's beside them
        self.is_invariant = r.batch_invariant
        self.ref_engine = None
        if self.is_invariant and self.reference is not None:
            self.ref_engine = Engine.of(replace(policy, model=self.reference), r)

    def _check_budget(self, policy: Policy, config: Config) -> None:
        """A sequence that no micro-batch can hold is an error now, not after the first rollout."""
        budget, cut = config.grpo.token_budget, config.rollout.max_completion_tokens
        longest = max(map(len, [*self.prompt_ids, *self.general_ids]))
        num_tokens = min(longest + cut, policy.model.spec.max_position_embeddings)
        if num_tokens > budget:
            raise ValueError(
                f"grpo.token_budget = {budget} is less than the longest prompt ({longest} tokens) "
                f"with a completion of rollout.max_completion_tokens = {cut}: {num_tokens} tokens. "
                f"Set grpo.token_budget to {num_tokens} or more, or lower "
                "rollout.max_prompt_tokens or rollout.max_completion_tokens"
            )

    @staticmethod
    def _encode(problems: list[Problem], policy: Policy, config: Config) -> list[list[int]]:
        """Prompt ids of `problems`, which loses those that are too long (in place, with a warning)."""
        room = min(config.rollout.max_prompt_tokens, policy.model.spec.max_position_embeddings - 1)
        ids, kept, dropped = encode_prompts(problems, policy.tokenizer, config.template, room)
        if dropped:
            name, length = dropped[0]
            warn(
                f"{len(dropped)} of {len(problems)} prompts are longer than {room} tokens and were "
                f"left out (the first: {name}, {length} tokens)"
            )
        if problems and not kept:
            raise ValueError(f"all {len(problems)} prompts are longer than {room} tokens")
        problems[:] = [problems[i] for i in kept]
        return ids

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        if self.reference is None:
            return {}
        return {"reference": dict(self.reference.named_parameters())}

    def load_extra(self, saved) -> None:
        if self.reference is not None:
            fill(dict(self.reference.named_parameters()), saved.tensors("reference"))

    def train_step(self, step: int) -> dict[str, float]:
        before = self.engine.stats
        with self.timer("rollout"):
            groups = self.rollout(step)
        with self.timer("reward"):
            self.scorer.score(groups, step_from_end=self.num_steps - 1 - step)
        row = self._rollout_row(groups) | self._engine_row(before)
        row |= self.update(groups, step)
        self._store_samples(groups, step)
        return row

    def _choose(self, step: int) -> list[tuple[Problem, list[int]]]:
        """The problems of this step over all ranks, with their prompt ids."""
        P, seed, w = self.config.grpo.prompts_per_step, self.config.seed, self.config.rewards
        last = w.preference_last_steps or self.num_steps
        in_last_phase = self.num_steps - step <= last
        num_general = round(P * w.general_share) if self.general and in_last_phase else 0
        chosen = batch_indices(len(self.problems), P, seed, step)[: P - num_general]
        picks = [(self.problems[i], self.prompt_ids[i]) for i in chosen]
        if num_general:
            for i in batch_indices(len(self.general), num_general, seed, step):
                picks.append((self.general[i], self.general_ids[i]))
        return picks

    def rollout(self, step: int) -> list[RolloutGroup]:
        """This rank's groups: positions rank, rank + world size, ... of the step's problems."""
        G, seed = self.config.rollout.num_generations, self.config.seed
        picks = list(enumerate(self._choose(step)))[self.rank :: self.world_size]
        groups = self.engine.generate(
            [ids for _, (_, ids) in picks],
            G,
            self.sampling,
            seeds=[[sample_seed(seed, self.stage, step, p, g) for g in range(G)] for p, _ in picks],
            problems=[problem for _, (problem, _) in picks],
        )
        for completion in (c for group in groups for c in group.completions):
            if completion.finish_reason == "error":  # nothing to train on, and no group without it
                raise FloatingPointError(f"step {step + 1}: {completion.error}")
        return groups

    def _rollout_row(self, groups: list[RolloutGroup]) -> dict[str, float]:
        names = sorted({n for g in groups for r in g.rewards for n in r.parts})
        names = sorted(set(sum(distributed.gather_objects(names), [])))
        sums = distributed.sum_dict(rollout_sums(groups, names))
        shortest, longest = zip(*distributed.gather_objects(rollout_extremes(groups)), strict=True)
        return finish_rollout_metrics(sums, min(shortest), max(longest))

    def _engine_row(self, before: EngineStats) -> dict[str, float]:
        """What the engines of all ranks did in this step."""
        stats = self.engine.stats
        held = stats.peak_blocks * stats.block_bytes
        sums = distributed.sum_dict(stats.since(before) | {"held": float(held)})
        row = {
            "rollout/preemptions": sums["preemptions"],
            "rollout/cache_mib": sums["held"] / 2**20,
        }
        for name, part, whole in (
            ("rollout/prefix_hit_rate", "prefix_hits", "prefix_queries"),
            ("rollout/acceptance", "accepted", "drafted"),
        ):
            if sums[whole]:
                row[name] = sums[part] / sums[whole]
        return row

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
                self._fill_ref_logprobs(sequences)
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
                    mini = self._backward(part, sequences, length, live, check_mismatch=first)
                    norm, lr = self.optimize()
                    self.engine.reset_prefix_cache()
                norms.append(norm)
                if first:
                    found = (mini.pop(name) for name in ("diff", "max_diff", "max_graph"))
                    mismatch = (*found, mini["num_tokens"])
                for key, value in mini.items():
                    sums[key] = sums.get(key, 0.0) + value
        self._refresh_reference(num_parts)
        total = distributed.sum_dict(sums)
        diffs = distributed.gather_objects(mismatch)
        num_tokens = total.pop("num_tokens")
        self.num_tokens += sum(length.values()) + G * sum(
            distributed.gather_objects(sum(len(x.prompt_ids) for x in groups))
        )
        row = {"loss": total.pop("loss") / num_parts, "learning_rate": lr}
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
        if self.is_invariant:
            own = {key: sequences[key] for key in owned}
            for s, logprobs in zip(own.values(), self._score(self.engine, own), strict=True):
                s.policy_logprobs = logprobs
        batches = self._pack([sequences[key] for key in owned], weights)
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

    def _pack(self, sequences: list[Sequence], weights: list[float]) -> list[PackedBatch]:
        g = self.config.grpo
        return pack(
            sequences,
            g.token_budget,
            weights,
            device=self.policy.device,
            share_prompts=g.shared_prompt,
            cost_per_token=cost_per_token(self.model),
        )

    def _score(
        self, engine: Engine, sequences: dict[tuple[int, int], Sequence]
    ) -> list[list[float]]:
        """Log-probabilities of each sequence's completion under the engine's weights, in order."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for key in sequences:
            groups.setdefault(key[0], []).append(key)
        scored = engine.score(
            [sequences[keys[0]].prompt_ids for keys in groups.values()],
            [[sequences[key].completion_ids for key in keys] for keys in groups.values()],
            self.sampling.temperature,
        )
        keys, values = sum(groups.values(), []), sum(scored, [])
        logprobs = {key: x.tolist() for key, x in zip(keys, values, strict=True)}
        return [logprobs[key] for key in sequences]

    @torch.no_grad()
    def _fill_ref_logprobs(self, by_key: dict[tuple[int, int], Sequence]) -> None:
        sequences = list(by_key.values())
        if self.ref_engine is not None:
            for s, logprobs in zip(sequences, self._score(self.ref_engine, by_key), strict=True):
                s.ref_logprobs = logprobs
            self.ref_engine.reset_prefix_cache()  # its packed weights are a copy of the reference
            return
        for batch in self._pack(sequences, [0.0] * len(sequences)):
            logprobs, _ = completion_logprobs(self.reference, batch, self.sampling.temperature)
            values, start = logprobs.tolist(), 0
            for i in batch.sequence_index:
                end = start + len(sequences[i].completion_ids)
                sequences[i].ref_logprobs = values[start:end]
                start = end

    def _refresh_reference(self, num_done: int) -> None:
        """reference := policy when the optimizer has passed a multiple of `ref_refresh_steps`."""
        every = self.config.grpo.ref_refresh_steps
        passed = every and self.optimizer_step // every > (self.optimizer_step - num_done) // every
        if self.reference is not None and passed:
            fill(dict(self.reference.named_parameters()), dict(self.model.named_parameters()))

    def _store_samples(self, groups: list[RolloutGroup], step: int) -> None:
        """A few completions of every step, in full, for reading."""
        if not distributed.is_main() or not self.config.log.num_samples:
            return
        with (self.folder / "completions.jsonl").open("a", encoding="utf-8") as file:
            for group in groups[: self.config.log.num_samples]:
                completion, reward = group.completions[0], group.rewards[0]
                row = {
                    "step": step + 1,
                    "problem_id": group.problem.id,
                    "prompt": group.problem.prompt,
                    "answer": group.problem.answer,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "reward": reward.total,
                    "parts": reward.parts,
                    "verdict": reward.verdict,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def after_step(self) -> dict[str, float]:
        every = self.config.eval.every_steps
        if self.evaluate is None or not every or self.step % every:
            return {}
        with self.timer("eval"):
            values = self.evaluate()
        return {f"eval/{key}": v for key, v in values.items() if isinstance(v, int | float)}
