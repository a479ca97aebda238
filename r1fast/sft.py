"""Supervised fine-tuning: packed batches, loss on completion tokens only, cosine to a floor."""

from __future__ import annotations

import math
from pathlib import Path

from r1fast import distributed
from r1fast.batch import pack
from r1fast.config import Config
from r1fast.costs import Size
from r1fast.data_order import batch_indices
from r1fast.examples import Example
from r1fast.forward import hidden_states, nothing
from r1fast.interrupt import stoppable
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.kernels.loss_rows import NonFiniteError
from r1fast.metrics import warn
from r1fast.plan import PlanWatch
from r1fast.planner import Job, Work
from r1fast.planning import make_job, settle, sft_groups, watch
from r1fast.policy import Policy
from r1fast.protocol import rest_of_completion
from r1fast.templates import encode_text, render_prompt, with_system
from r1fast.training import Trainer
from r1fast.training_state import digest
from r1fast.types import Sequence


def encode_examples(examples: list[Example], policy: Policy, config: Config) -> list[Sequence]:
    """Prompt and completion ids of the kept examples; too long ones are counted and reported."""
    room = min(config.sft.max_seq_tokens, policy.model.spec.max_position_embeddings)
    if config.sft.token_budget != "auto":
        room = min(room, config.sft.token_budget * config.parallel.context_parallel)
    tokenizer, sequences, dropped = policy.tokenizer, [], []
    unknown = 0
    for example in examples:
        if not example.keep:
            continue
        t = with_system(config.template, example.meta, f"example {example.id!r}")
        text = render_prompt(example.prompt, t, tokenizer)
        ids = encode_text(text, tokenizer, add_special_tokens=t.name != "chat")
        completion = rest_of_completion(text, example.completion, t.protocol, t.special_token)
        sequence = Sequence(ids, policy.encode_completion(completion))
        unknown += tokenizer.unk_token_id is not None and (
            tokenizer.unk_token_id in sequence.completion_ids
        )
        if sequence.num_tokens > room:
            dropped.append((example.id, sequence.num_tokens))
        else:
            sequences.append(sequence)
    if dropped:
        warn(
            f"{len(dropped)} of {len(examples)} examples are longer than {room} tokens and were "
            f"left out (the first: {dropped[0][0]}, {dropped[0][1]} tokens)"
        )
    if unknown:
        warn(f"{unknown} examples hold text that the tokenizer does not know")
    if not sequences:
        raise ValueError("no training example is left: none was given, or all are too long")
    return sequences


def _lengths(s: Sequence) -> tuple[int, int]:
    return len(s.prompt_ids), len(s.completion_ids)


class SFTTrainer(Trainer):
    """Minimises the mean negative log-likelihood per completion token (or per sequence)."""

    section, shorter, can_shard = "sft", "sft.max_seq_tokens", True

    def __init__(
        self,
        policy: Policy,
        config: Config,
        folder: str | Path,
        sequences: list[Sequence],
        *,
        stage: str = "sft",
        in_order: bool = False,  # one pass in the given order: the data are their own curriculum
        force: bool = False,
    ):
        self.sequences, self.in_order = sequences, in_order
        s = config.sft
        by_epochs = math.ceil(s.epochs * len(sequences) / s.batch_size)
        num_steps = s.max_steps or max(1, by_epochs)
        super().__init__(
            policy,
            config,
            folder,
            stage=stage,
            num_steps=num_steps,
            num_optimizer_steps=num_steps,
            data=digest(ids for s in sequences for ids in (s.prompt_ids, s.completion_ids)),
            force=force,
        )

    def job(self) -> Job:
        """What one rank has to do in a step."""
        lengths = [_lengths(s) for s in self.sequences]
        return make_job(
            "sft",
            self.model.spec,
            Size.of(self.policy.model),
            self.config,
            self.policy.device,
            sft_groups(self.config, lengths, self.grid.num_data_ranks),
            max(map(sum, lengths)),
            self.world_size,
        )

    def settle(self, token_budget: int | str) -> tuple[int, str]:
        return settle(self, self.job(), token_budget)

    def watch(self) -> PlanWatch | None:
        mean = sum(s.num_tokens for s in self.sequences) / len(self.sequences)
        return watch(self, self.job(), f"examples of {mean:.0f} tokens in the mean")

    def own_measure(self) -> str:
        return "-loss"

    def line_every(self) -> int:
        return max(1, self.num_steps // 20)

    def train_step(self, step: int) -> dict[str, float]:
        s = self.config.sft
        if self.in_order:
            n = len(self.sequences)
            chosen = [i % n for i in range(step * s.batch_size, (step + 1) * s.batch_size)]
        else:
            chosen = batch_indices(len(self.sequences), s.batch_size, self.config.seed, step)
        batch_of = [self.sequences[i] for i in chosen]
        num_tokens = sum(len(x.completion_ids) for x in batch_of)
        self.batch = owned = batch_of[self.grid.data_rank :: self.grid.num_data_ranks]
        if s.loss == "token":
            weights = [1.0 / num_tokens] * len(owned)
        else:
            weights = [1.0 / (len(batch_of) * len(x.completion_ids)) for x in owned]
        self.work = Work.of([(p, [n]) for p, n in map(_lengths, owned)])
        with self.timer("train"):
            with stoppable(in_step=self.parallel.in_step):
                sums = self.token_budget.fitting(lambda: self._backward(owned, weights))
            with self.timer.part("optimizer"):
                norm, lr = self.optimize()
        total = distributed.sum_dict(self.grid.once(sums))
        self.num_tokens += sum(x.num_tokens for x in batch_of)
        return {
            "loss": total["loss"],
            "entropy": total["entropy"] / num_tokens,
            "learning_rate": lr,
            "epoch": (step + 1) * s.batch_size / len(self.sequences),
        } | self.read_norms([norm])

    def _backward(self, owned: list[Sequence], weights: list[float]) -> dict[str, float]:
        """Gradients of this rank's examples, added up. Returns sums over their tokens."""
        sums = {"loss": 0.0, "entropy": 0.0}
        batches = pack(
            owned,
            self.micro_batch_tokens,
            weights,
            device=self.policy.device,
            longer_alone=self.token_budget.was_halved,
        )
        for batch in self.token_budget.each(self.parallel.parts(batches)):
            with self.timer.part("forward"):
                hidden = hidden_states(self.model, batch)
            if batch.is_idle:
                nothing(hidden, self.model.head_weight).backward()
                self.optimizer.accumulate()  # of others' losses, where they have other pieces
                continue
            try:
                with self.timer.part("forward"):
                    loss, entropy = linear_cross_entropy(
                        hidden,
                        self.model.head_weight,
                        batch.target_ids,
                        token_weights=batch.token_weights,
                        reduction="sum",
                        return_entropy=True,
                        process_group=self.model.head_group,
                    )
            except NonFiniteError as error:
                warn(str(error))
                if self.parallel.in_step:  # other ranks exchange with this one
                    nothing(hidden, self.model.head_weight).backward()
                self.optimizer.spoil()
                sums["loss"] = math.nan  # there is none, on any rank
                continue
            with self.timer.part("backward"):
                loss.backward()
            self.optimizer.accumulate()
            sums["loss"] += float(loss.detach())
            sums["entropy"] += float(entropy.sum())
        return sums
