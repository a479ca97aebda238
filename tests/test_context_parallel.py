"""Ranks that have pieces of the same sequences train what one process trains: parallel.context_parallel.

All ranks of all cases are forked from one process, context_ranks.py, whose cases say what they do.
"""

import json
from pathlib import Path

import pytest
from as_alone import check_moved, check_rows, check_weights, run_layouts
from context_ranks import CUT, OWN_RUNS, TRAINED
from sharded_ranks import MOVED
from sharded_ranks import RUNS as SHARDED_RUNS
from test_planner import job
from tiny import tiny_config, tiny_policy

from r1fast import distributed
from r1fast.balance import sampled_ranks
from r1fast.distributed import RankGrid, grid
from r1fast.machine import GIB, GPUS
from r1fast.metrics import read_metrics
from r1fast.planner import choose_budget, seconds, training_counts
from r1fast.planning import make_plan
from r1fast.sharding import make_parallel
from r1fast.step_plan import Fact, MiniBatch

TWO = "--parallel.context_parallel=2"
RUNS = SHARDED_RUNS | OWN_RUNS


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return run_layouts("context_ranks.py", tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_gradients_and_weights_are_those_of_one_process(out, layout, name):
    check_weights(out, layout, CUT[layout][0], name, RUNS[name])


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_data_samples_and_metrics_are_those_of_one_process(out, layout, name):
    """Sums are counted once: `num_tokens` and what was forwarded too."""
    rows, expected = check_rows(out, layout, CUT[layout][0], name, RUNS[name])
    for row, alone in zip(rows, expected, strict=True):
        assert row.keys() >= alone.keys() - {"time/gather"}
        if RUNS[name][1] == "float32" and "logprob_mismatch/mean" in alone:
            mean = "logprob_mismatch/mean"
            assert row[mean] == pytest.approx(alone[mean], rel=1e-4, abs=2e-5)
        if name == "apart" and layout == "cp2":  # no prompt is shared, so packing changes nothing
            assert row["train/tokens_forwarded"] == alone["train/tokens_forwarded"]
            assert row["train/rank_imbalance"] < 1.05
    if name == "replaced":
        assert rows[0]["train/old_logprobs_recomputed"] == 1


@pytest.mark.parametrize("name", MOVED)
def test_a_checkpoint_moves_between_layouts(out, name):
    check_moved(out, name, [
        "", "processes 2 -> 1, model ddp with sequences over 2 ranks -> ddp",
        "processes 1 -> 4, model ddp -> fsdp with sequences over 2 ranks",
        "model fsdp with sequences over 2 ranks -> ddp with sequences over 4 ranks",
        "processes 4 -> 1, model ddp with sequences over 4 ranks -> fsdp",
    ])  # fmt: skip


def test_pieces_of_any_length_are_the_whole(out):
    for rank in range(4):
        assert (out / f"pieces-{rank}").exists()
        assert (out / f"exchanged-{rank}").exists()


def test_a_rank_keeps_half_of_the_activations(out):
    for rank in (0, 1):
        found = json.loads((out / f"kept-{rank}.json").read_text())
        for mode, share in (("none", 0.6), ("selective", 0.55), ("full", 0.55)):
            assert found[f"{mode} piece"] < share * found[f"{mode} whole"], (mode, found)


@pytest.mark.parametrize("loss", [".", "gspo"])
@pytest.mark.parametrize("name", ["grpo-loss", "grpo-gradient", "sft-loss", "sft-gradient"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(out, loss, name):
    folder = out / loss / "not_finite" / name
    for rank in (0, 1):
        assert json.loads((folder / f"same-{rank}.json").read_text()) == [False, True, False]
    rows = read_metrics(folder)
    assert [row["train/updates_skipped"] for row in rows] == [0, 1, 0]


def test_a_signal_on_one_rank_stops_all_at_the_same_micro_batch(out):
    facts = [json.loads((out / f"signalled-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1]
    assert facts[0]["step"] == facts[0]["saved"] == 1
    assert [row["step"] for row in read_metrics(out / "signalled")] == [1, 2]


def test_neighbours_are_a_group():
    found = RankGrid(num_data_ranks=2, context=3, tensor=2)
    assert found.group_size == 6
    assert [found.data_rank_of(rank) for rank in range(12)] == [0] * 6 + [1] * 6
    alone = grid(1, 1)
    assert (alone.num_data_ranks, alone.data_rank, alone.context_group) == (1, 0, None)
    with pytest.raises(ValueError, match="2 x 1 does not divide the number of processes, 1"):
        grid(2, 1)
    assert distributed.world_size() == 1


def test_without_balance_a_group_trains_what_its_ranks_have_sampled():
    facts = {(p, 0): Fact(p, 3, 5, True, False) for p in range(6)}
    part = MiniBatch(list(facts), list(facts)[1:], 30)
    found = sampled_ranks(part, facts, RankGrid(num_data_ranks=3, context=2))
    assert found == {(1, 0): 0, (2, 0): 1, (3, 0): 1, (4, 0): 2, (5, 0): 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--parallel.context_parallel=0",), "parallel.context_parallel must be at least 1, got 0"),
        ((TWO, "--rollout.batch_invariant=true"), "batch_invariant must be false with parallel.context"),
        ((TWO, "--log.record=all"), "log.record must be empty with parallel.context_parallel"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*overrides)


def test_reward_models_are_refused():
    with pytest.raises(ValueError, match=r"set parallel.context_parallel = 1 for it"):
        make_parallel(tiny_policy(), tiny_config(TWO), can_shard=False)


def test_a_plan_counts_a_rank_s_tokens():
    alone, two = job(device="cuda"), job("grpo", TWO, device="cuda", ranks=2)
    assert (alone.longest_piece, two.longest_piece) == (129, 65)
    # two ranks' samples over two ranks
    assert choose_budget(two, 80 * GIB) == choose_budget(alone, 80 * GIB)
    assert choose_budget(two, 10**6)[0] == 65
    for budget in (200, 4000):
        (one,) = training_counts(alone, alone.work(alone.groups).trained, budget)
        (half,) = training_counts(two, two.work(two.groups).trained, budget)
        assert half.targets == one.targets
        assert half.largest <= budget
        assert half.tokens <= one.tokens
    sft = job("sft", TWO, groups=((30, [100]),) * 4, ranks=2)
    assert sft.work(sft.groups).trained == list(sft.groups)
    plan = make_plan(two, "grpo", "", gpu=GPUS["h100"])
    assert any("parallel.context_parallel = 2" in line for line in plan.assumptions)
    assert seconds(two, plan.speed, plan.work, 4000)["train"] > 0
