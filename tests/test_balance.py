"""Where completions go: every one once, by cost, the same on every rank. Two processes are in test_distributed.py."""

import random

import pytest
import torch
from tiny import tiny_config

from r1fast import balance, distributed
from r1fast.balance import move, new_ranks
from r1fast.distributed import RankGrid
from r1fast.step_plan import Fact, StepPlan
from r1fast.types import Sequence


def make_plan(lengths: dict[int, list[int]], prompt=10, num_ranks=2) -> StepPlan:
    """Groups by position, dealt out as they are sampled."""
    facts = {
        (p, i): Fact(p % num_ranks, prompt, n, True, False)
        for p, group in lengths.items()
        for i, n in enumerate(group)
    }
    return StepPlan(facts, tiny_config().grpo, drops=True)


def deal(plan, num_ranks, share_prompts=True, token_budget=10_000, cost_per_token=100.0):
    (part,) = plan.mini_batches("0")
    return new_ranks(
        part, plan.facts, num_ranks, token_budget=token_budget, cost_per_token=cost_per_token,
        share_prompts=share_prompts,
    )  # fmt: skip


def loads(plan, ranks, num_ranks, share_prompts=True):
    """Forwarded tokens of each rank."""
    total, prompts = [0] * num_ranks, [set() for _ in range(num_ranks)]
    for key, rank in ranks.items():
        total[rank] += plan.facts[key].num_tokens - 1
        prompts[rank].add(key[0] if share_prompts else key)
    return [n + 10 * len(p) for n, p in zip(total, prompts, strict=True)]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_loads_are_even(num_ranks, share_prompts):
    rng = random.Random(0)
    lengths = {p: [int(rng.lognormvariate(4, 0.8)) + 1 for _ in range(8)] for p in range(40)}
    plan = make_plan(lengths, num_ranks=num_ranks)
    ranks = deal(plan, num_ranks, share_prompts)
    assert ranks.keys() == plan.live
    found = loads(plan, ranks, num_ranks, share_prompts)
    assert max(found) <= 1.08 * sum(found) / num_ranks
    as_sampled = loads(plan, {k: f.rank for k, f in plan.facts.items()}, num_ranks, share_prompts)
    assert max(as_sampled) >= max(found)
    if share_prompts:
        assert sum(found) <= 1.02 * sum(as_sampled)  # hardly a prompt is forwarded twice


def test_one_group_is_cut_where_it_is_all_there_is():
    plan = make_plan({0: [100] * 8})
    found = loads(plan, deal(plan, 2), 2)
    assert max(found) <= 1.1 * sum(found) / 2
    assert loads(make_plan({0: [100]}), deal(make_plan({0: [100]}), 2), 2) == [109, 0]


def test_what_is_not_forwarded_stays():
    plan = make_plan({0: [5, 6], 1: [7, 8]})
    plan.live -= {(0, 1), (1, 0)}
    assert deal(plan, 2).keys() == {(0, 0), (1, 1)}
    plan.live.clear()
    assert deal(plan, 2) == {}


def test_what_moves_arrives_as_it_was(monkeypatch):
    """Both ranks in this process: what each sends is what the other's gather is given."""
    plan = make_plan({0: [3, 1], 1: [2, 4]}, prompt=2)
    ranks = {(0, 0): 1, (0, 1): 0, (1, 0): 1, (1, 1): 0}
    sequences = {
        key: Sequence(
            [7, key[0]], list(range(5, 5 + fact.num_tokens)),
            old_logprobs=torch.randn(fact.num_tokens).tolist(), advantage=0.1 * key[1] - 0.7,
        )
        for key, fact in plan.facts.items()
    }  # fmt: skip

    def own(rank):
        return {key: s for key, s in sequences.items() if plan.facts[key].rank == rank}

    sent = {}

    def run(rank, gather, size=1):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(balance.distributed, "gather_tensors", gather)
        return move(own(rank), plan, ranks, RankGrid(2 // size, size))

    def keep(rank, size=1):
        def gather(numbers, sizes):
            assert len(numbers) == sizes[rank]
            sent[rank] = numbers
            raise InterruptedError

        with pytest.raises(InterruptedError):
            run(rank, gather, size)

    keep(0)
    keep(1)
    assert [len(x) for x in sent.values()] == [2 + 2 * 3 + 1, 2 + 2 * 4 + 1]
    for rank in (0, 1):
        found = run(rank, lambda numbers, sizes: [sent[0], sent[1]])
        assert list(found) == sorted(key for key, r in ranks.items() if r == rank)
        for key, s in found.items():
            was = sequences[key]
            assert (s.prompt_ids, s.completion_ids) == (was.prompt_ids, was.completion_ids)
            assert s.old_logprobs == was.old_logprobs
            assert torch.tensor(s.advantage) == torch.tensor(was.advantage)  # in float32

    still = {key: plan.facts[key].rank for key in ranks}
    monkeypatch.setattr(distributed, "gather_tensors", None)  # nothing moves, nothing is sent
    assert move(own(1), plan, still, RankGrid(2)) == own(1)

    # both in one model-parallel group: each has everything, in the same bits
    ranks = dict.fromkeys(ranks, 0)
    keep(0, size=2)
    keep(1, size=2)
    everywhere = [run(rank, lambda numbers, sizes: [sent[0], sent[1]], size=2) for rank in (0, 1)]
    assert everywhere[0] == everywhere[1]
    assert list(everywhere[0]) == sorted(sequences)
    assert [s.completion_ids for s in everywhere[0].values()] == [
        sequences[key].completion_ids for key in sorted(sequences)
    ]
