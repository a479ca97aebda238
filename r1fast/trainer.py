"""The GRPO loop: problems -> rollout -> rewards -> the update of policy_update.py -> metrics."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

from r1fast import distributed
from r1fast.config import Config
from r1fast.data_order import batch_indices
from r1fast.dynamic_sampling import Drawn, DynamicSampler
from r1fast.hacking_monitor import HackingMonitor, RewardHackingError
from r1fast.hf_folder import write_json
from r1fast.interrupt import stoppable
from r1fast.jsonl import append_jsonl
from r1fast.metrics import warn
from r1fast.policy import Policy
from r1fast.policy_update import PolicyUpdate, check_loss_options
from r1fast.recording import recorded
from r1fast.rewards.graders import GRADED_BY
from r1fast.rewards.score import RewardScorer, judge_row
from r1fast.rollout.result import EngineStats
from r1fast.rollout.sampler import sample_seed
from r1fast.rollout.stealing import Claims, generate_claimed
from r1fast.rollout.vllm.engine import VllmEngine, joined
from r1fast.rollout_metrics import (
    finish_rollout_metrics,
    finish_version_lag,
    rollout_extremes,
    rollout_sums,
    version_lag,
)
from r1fast.rollouts_ahead import RolloutsAhead, settled_update
from r1fast.templates import encode_prompts
from r1fast.tokenizer_check import warn_of_unknown
from r1fast.training_state import digest
from r1fast.types import Problem, RolloutGroup


def _scored_by(problem: Problem, scorer: RewardScorer) -> list[int]:
    """What of a problem decides its rewards, as numbers for the digest."""
    scored = [problem.answer, problem.language, problem.kind]
    if columns := GRADED_BY.get(problem.kind):
        scored.append({name: problem.meta[name] for name in columns if name in problem.meta})
    if getattr(scorer, "extra", None):  # a user's function may read any column
        scored.append(problem.meta)
    return list(json.dumps(scored, default=str).encode())


class GRPOTrainer(PolicyUpdate):
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
        check_loss_options(config)
        if not problems:
            raise ValueError("there are no training problems (see data.train)")
        if g.prompts_per_step < distributed.world_size():
            raise ValueError(
                f"grpo.prompts_per_step = {g.prompts_per_step} is less than the "
                f"{distributed.world_size()} processes; every one needs a prompt"
            )
        self.problems, self.general, self.scorer = problems, general or [], scorer
        self.evaluate = evaluate
        self.monitor = HackingMonitor(config.monitor)
        self.claims: Claims | None = None
        if config.rollout.work_stealing and distributed.world_size() > 1:
            self.claims = Claims(*distributed.store_and_rank())
        self.sandbox_recorded = False
        if any(problem.kind == "code" for problem in problems):
            scorer.prepare(problems)
        self.prompt_ids = self._encode(problems, policy, config)
        if distributed.is_main():
            warn_of_unknown(self.prompt_ids, policy.tokenizer, policy.path, policy.eos_ids)
        self.general_ids = self._encode(self.general, policy, config)
        self._check_budget(policy, config)
        scored = (_scored_by(problem, scorer) for problem in problems + self.general)
        super().__init__(
            policy,
            settled_update(config),
            folder,
            stage=stage,
            data=digest([*self.prompt_ids, *self.general_ids, *scored]),
            force=force,
        )
        self.ahead = self._make_ahead()

    def _make_ahead(self) -> RolloutsAhead | None:
        if not (max_staleness := self.config.grpo.max_staleness):
            return None
        return RolloutsAhead(
            self.engine,
            self._groups,
            self._seeds,
            self.sampling,
            max_staleness=max_staleness,
            num_steps=self.num_steps,
        )

    def _check_budget(self, policy: Policy, config: Config) -> None:
        """A sequence that no micro-batch can hold is an error now, not after the first rollout."""
        budget, cut = config.grpo.token_budget, config.rollout.max_completion_tokens
        if budget == "auto":
            return
        context = config.parallel.context_parallel
        longest = max(map(len, [*self.prompt_ids, *self.general_ids]))
        num_tokens = min(longest + cut, policy.model.spec.max_position_embeddings)
        needed = -(-num_tokens // context)  # of one rank
        if needed > budget:
            over = f" over {context} ranks (parallel.context_parallel)" * (context > 1)
            raise ValueError(
                f"grpo.token_budget = {budget} is less than the longest prompt ({longest} tokens) "
                f"with a completion of rollout.max_completion_tokens = {cut}: {num_tokens} tokens{over}. "
                f'Set grpo.token_budget to {needed} or more (or "auto"), or lower '
                "rollout.max_prompt_tokens or rollout.max_completion_tokens"
            )

    def prompt_lengths(self) -> list[int]:
        return list(map(len, [*self.prompt_ids, *self.general_ids]))

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

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.engine.close()

    def train_step(self, step: int) -> dict[str, float]:
        before = self.engine.stats
        if self.config.grpo.dynamic_sampling == "off":
            with self.whole_policy():
                groups = self._sample(step)
            with self.timer("reward"), stoppable(waits=True):
                self.scorer.score(groups, step_from_end=self.num_steps - 1 - step)
            drawn = Drawn(kept=groups, sampled=groups)
        else:
            with self.whole_policy():
                self._give_weights(step)
                drawn = self._draw(step)
        row = self._rollout_row(drawn.sampled) | self._engine_row(before) | drawn.metrics
        row |= self._lag_row(drawn.kept)
        if isinstance(self.engine, VllmEngine):
            self.engine.sleep()
        row |= self._sandbox_row()
        with recorded(self, drawn.kept, step) as trained:
            trained |= self.update(drawn.kept, step)
        row |= trained | self._judge_row()
        self.monitor.saw_reward(row.get("reward"))
        self._store_samples(drawn.sampled, step)
        return row

    def _sample(self, step: int) -> list[RolloutGroup]:
        """This rank's groups. Servers get the weights before or, where samples of the step are to end first, after."""
        ahead = self.ahead
        is_late = ahead is not None and ahead.drains and ahead.is_out(step)
        if not is_late:
            self._give_weights(step)
        with self.timer("rollout"), stoppable(meanwhile=self.engine.tend):
            groups = self.rollout(step)
        if is_late:
            self._give_weights(step)
        return groups

    def _give_weights(self, step: int | None = None) -> None:
        """Servers get the policy as it is now, and then the requests that `step` lets out."""
        if not isinstance(self.engine, VllmEngine):
            return
        if self.ahead is not None and self.ahead.drains:
            with self.timer("rollout"), stoppable(meanwhile=self.engine.tend):
                self.ahead.drain()
        with self.timer("sync"), stoppable():
            self.engine.sync()
            if self.ahead is not None and step is not None:
                self.ahead.send(step)

    def _draw(self, step: int) -> Drawn:
        """This rank's share of dynamic sampling."""
        sampler = DynamicSampler(
            self.engine,
            self.sampling,
            self.config,
            self._choose(step),
            lambda draw: self._seeds(step, draw),
            partial(self.scorer.score, step_from_end=self.num_steps - 1 - step),
            self.timer,
        )
        try:
            with (
                self.scorer.as_one_call(),
                # with more ranks it agrees by itself
                stoppable(waits=True) if self.world_size == 1 else nullcontext(),
            ):
                return sampler.sample()
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step + 1}: {error}") from None

    def _choose(self, step: int) -> list[tuple[Problem, list[int]]]:
        """The problems of this step over all ranks, with their prompt ids.

        In dynamic sampling others follow, each once, that are drawn as long as the batch is not full.
        """
        P, seed, w = self.config.grpo.prompts_per_step, self.config.seed, self.config.rewards
        last = w.preference_last_steps or self.num_steps
        in_last_phase = self.num_steps - step <= last
        num_general = round(P * w.general_share) if self.general and in_last_phase else 0
        chosen = batch_indices(len(self.problems), P, seed, step)[: P - num_general]
        picks = [(self.problems[i], self.prompt_ids[i]) for i in chosen]
        if num_general:
            for i in batch_indices(len(self.general), num_general, seed, step):
                picks.append((self.general[i], self.general_ids[i]))
        if self.config.grpo.dynamic_sampling != "off":
            num_more = P * (self.config.grpo.max_rollout_factor - 1)
            n = len(self.problems)
            order = random.Random(f"{seed}/draws/{step}").sample(range(n), min(n, P + num_more))
            more = [i for i in order if i not in set(chosen)][:num_more]
            picks += [(self.problems[i], self.prompt_ids[i]) for i in more]
        return picks

    def _seeds(self, step: int, position: int) -> list[int]:
        """Of a group's samples: whatever rank samples it, and when."""
        G = self.config.rollout.num_generations
        return [sample_seed(self.config.seed, self.stage, step, position, g) for g in range(G)]

    def _groups(self, step: int) -> list[RolloutGroup]:
        """This rank's, still to be sampled: positions rank, rank + world size, ... of the step's problems."""
        picks = list(enumerate(self._choose(step)))[self.rank :: self.world_size]
        return [RolloutGroup(problem, ids, [], position=p) for p, (problem, ids) in picks]

    def rollout(self, step: int) -> list[RolloutGroup]:
        """This rank's groups with their completions."""
        if self.ahead is not None:
            groups = self.ahead.collect(step)
        elif self.claims is not None:
            groups = self._claimed(step)
        else:
            asked = self._groups(step)
            groups = self.engine.generate(
                [group.prompt_ids for group in asked],
                self.config.rollout.num_generations,
                self.sampling,
                seeds=[self._seeds(step, group.position) for group in asked],
                problems=[group.problem for group in asked],
            )
            for group, of in zip(groups, asked, strict=True):
                group.position = of.position
        for completion in (c for group in groups for c in group.completions):
            if completion.finish_reason == "error":  # nothing to train on, and no group without it
                raise FloatingPointError(f"step {step + 1}: {completion.error}")
        return groups

    def _claimed(self, step: int) -> list[RolloutGroup]:
        """With rollout.work_stealing: those that this rank came to first."""
        picks = self._choose(step)
        found = generate_claimed(
            self.engine,
            self.claims,
            [ids for _, ids in picks],
            partial(self._seeds, step),
            self.sampling,
            self.config.rollout.max_batch_size,
        )
        return [
            RolloutGroup(picks[p][0], list(picks[p][1]), completions, position=p)
            for p, completions in found.items()
        ]

    def _rollout_row(self, groups: list[RolloutGroup]) -> dict[str, float]:
        names = sorted({n for g in groups for r in g.rewards for n in r.parts})
        names = sorted(set(sum(distributed.gather_objects(names), [])))
        sums = distributed.sum_dict(rollout_sums(groups, names))
        shortest, longest = zip(*distributed.gather_objects(rollout_extremes(groups)), strict=True)
        return finish_rollout_metrics(sums, min(shortest), max(longest))

    def _engine_row(self, before: EngineStats) -> dict[str, float]:
        """What the engines of all ranks did in this step."""
        if isinstance(self.engine, VllmEngine):
            return joined(distributed.gather_objects(self.engine.take_metrics()))
        stats = self.engine.stats
        held = stats.peak_blocks * stats.block_bytes
        stolen = 0 if self.claims is None else self.claims.num_stolen
        counts = stats.since(before) | {"held": float(held), "stolen": float(stolen)}
        sums = distributed.sum_dict(counts)
        row = {
            "rollout/preemptions": sums["preemptions"],
            "rollout/cache_mib": sums["held"] / 2**20,
        }
        if self.claims is not None:
            row["rollout/stolen"] = sums["stolen"]
        for name, part, whole in (
            ("rollout/prefix_hit_rate", "prefix_hits", "prefix_queries"),
            ("rollout/acceptance", "accepted", "drafted"),
        ):
            if sums[whole]:
                row[name] = sums[part] / sums[whole]
        return row

    def _lag_row(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """How old the weights were that sampled the step, and who waited for whom."""
        if not isinstance(self.engine, VllmEngine):
            return {}
        own = version_lag(groups, self.engine.weights.lag)
        row = finish_version_lag(distributed.gather_objects(own))
        assert row["vllm/version_lag_max"] <= self.config.grpo.max_staleness, row
        if self.ahead is not None:
            waits = distributed.gather_objects(self.ahead.take_metrics())
            row["overlap/trainer_waited"] = max(w["trainer"] for w in waits)
            row["overlap/samples_waited"] = min(w["samples"] for w in waits)
        return row

    def _sandbox_row(self) -> dict[str, float]:
        """The rung that programs run on, the worst of all ranks; sandbox.json has it in words."""
        info = getattr(self.scorer, "sandbox", None)  # other scorers run no programs
        levels = distributed.gather_objects(None if info is None else info.level)
        if info is not None and distributed.is_main() and not self.sandbox_recorded:
            self.sandbox_recorded = True
            try:
                write_json(self.folder / "sandbox.json", asdict(info))
            except OSError as error:
                warn(f"sandbox.json could not be written, training goes on: {error}")
        known = [level for level in levels if level is not None]
        return {"sandbox/level": float(max(known))} if known else {}

    def _judge_row(self) -> dict[str, float]:
        """What the judges of all ranks did in this step."""
        counts = self.scorer.judge_counts() if isinstance(self.scorer, RewardScorer) else {}
        return judge_row(distributed.sum_dict(counts)) if counts else {}

    def _store_samples(self, groups: list[RolloutGroup], step: int) -> None:
        """A few completions of every step, in full, for reading."""
        if not distributed.is_main() or not self.config.log.num_samples:
            return
        rows = []
        for group in groups[: self.config.log.num_samples]:
            completion, reward = group.completions[0], group.rewards[0]
            rows.append(
                {
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
            )
        path = self.folder / "completions.jsonl"
        try:
            append_jsonl(path, rows)
        except OSError as error:
            warn(f"{path} could not be written, training goes on: {error}")

    def after_step(self) -> dict[str, float]:
        every = self.config.eval.every_steps
        if self.evaluate is None or not every or self.step % every:
            return {}
        with self.whole_policy():
            if self.ahead is not None:  # so that the versions of what is in flight are known
                self._give_weights()
            with self.timer("eval"):
                values = self.evaluate()
        row = {f"eval/{key}": v for key, v in values.items() if isinstance(v, int | float)}
        row |= self.monitor.saw_evaluation(self.step, values)
        if alarm := self.monitor.alarm:
            if self.config.monitor.action == "stop":
                self.stop_reason = RewardHackingError(
                    f"{alarm}. Stopped with a checkpoint (monitor.action); look at "
                    f"{self.folder / 'completions.jsonl'}, then change the rewards, or go on with "
                    "--monitor.action=warn"
                )
            elif distributed.is_main():
                warn(f"{alarm}; see completions.jsonl for what is paid")
        return row

    def own_measure(self) -> str:
        evaluates = self.evaluate is not None and self.config.eval.every_steps
        return "eval/pass@1" if evaluates else "reward"

    def extra_state(self) -> dict:
        return super().extra_state() | {"monitor": self.monitor.state()}

    def load_extra(self, saved) -> None:
        super().load_extra(saved)
        if "monitor" in saved.state:
            self.monitor.load_state(saved.state["monitor"])
