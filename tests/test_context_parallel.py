"""Ranks that have pieces of the same sequences train what one process trains: parallel.context_parallel.

All ranks of all cases are forked from one process, context_ranks.py, whose cases say what they do.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from context_ranks import CUT, OWN_RUNS, STEPS, TRAINED
from sharded_ranks import RUNS as SHARDED_RUNS
from test_planner import job
from test_sharding import everything, first_step, largest_error, tensors_of
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

ROOT = Path(__file__).parents[1]
TWO = "--parallel.context_parallel=2"
RUNS = SHARDED_RUNS | OWN_RUNS


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/context_ranks.py"), str(folder)],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_gradients_and_weights_are_those_of_one_process(out, layout, name):
    """In bfloat16 the first gradient is close to that of one process, whose micro-batches are others."""
    gradients, weights = (tensors_of(out, layout, name, x) for x in ("gradients", "weights-0"))
    expected, after = (tensors_of(out, "ddp1", name, x) for x in ("gradients", "weights-0"))
    if RUNS[name][1] == "float32":
        assert largest_error(gradients, expected) < 5e-6
        assert largest_error(weights, after) < 5e-7
    else:
        assert largest_error(first_step(gradients), first_step(expected)) < 0.02
        assert largest_error(weights, after) < 0.02
    begun = dict(tiny_policy(RUNS[name][0]).model.named_parameters())
    trained = {n: x for n, x in weights.items() if n not in begun or name != "lora"}
    if name == "lora":
        assert largest_error(trained, {n: torch.zeros_like(x) for n, x in trained.items()}) > 1e-3
    else:
        assert largest_error(weights, {n: p.detach() for n, p in begun.items()}) > 1e-3
    for rank in range(1, CUT[layout][0]):
        others = tensors_of(out, layout, name, f"weights-{rank}")
        assert all(torch.equal(others[key], x) for key, x in weights.items())


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_data_samples_and_metrics_are_those_of_one_process(out, layout, name):
    """Sums are counted once: `num_tokens` and what was forwarded too."""

    def samples(layout: str, n: int) -> list:
        facts = [json.loads((out / layout / name / f"facts-{r}.json").read_text()) for r in range(n)]  # fmt: skip
        if RUNS[name][1] == "float32":
            return sorted(sum((f["seen"] for f in facts), []))
        return sorted(sum((f["seen"][: 4 // n] for f in facts), []))  # of the first step

    if name != "dynamic":  # where ranks begin other candidates that are dropped later
        assert samples(layout, CUT[layout][0]) == samples("ddp1", 1)
    rows, expected = (read_metrics(out / which / name) for which in (layout, "ddp1"))
    assert len(rows) == len(expected) == 2
    keys = (
        "loss", "grad_norm", "reward", "kl", "entropy", "num_tokens", "eval/pass@1", "ratio",
        "train/steps_without_signal", "logprob_mismatch/mean", "rollout_correction/weight",
        "train/old_logprobs_recomputed",
    )  # fmt: skip
    for row, alone in zip(rows, expected, strict=True):
        assert row["step"] == alone["step"]
        assert (row.keys() | {"x"}) >= (alone.keys() - {"time/gather"})
        if RUNS[name][1] == "float32":
            for key in (key for key in keys if key in alone):
                atol = 2e-5 if key.startswith("logprob_mismatch") else 1e-6
                assert row[key] == pytest.approx(alone[key], rel=1e-4, abs=atol), key
        if name == "apart" and layout == "cp2":  # no prompt is shared, so packing changes nothing
            assert row["train/tokens_forwarded"] == alone["train/tokens_forwarded"]
            assert row["train/rank_imbalance"] < 1.05
    if name == "replaced":
        assert rows[0]["train/old_logprobs_recomputed"] == 1


@pytest.mark.parametrize("name", ["grpo", "sft bfloat16"])
def test_a_checkpoint_moves_between_layouts(out, name):
    """A step in each of STEPS, one after the other, is the run of one process."""
    moved, alone = everything(out / "moved" / name), everything(out / "ddp1 straight" / name)
    assert largest_error(moved, alone) < (2e-6 if name == "grpo" else 0.03)
    notes = [row.get("note", "") for row in read_metrics(out / "moved" / name)]
    assert [note.partition(" after")[0].partition(": ")[2] for note in notes] == [
        "", "processes 2 -> 1, model ddp with sequences over 2 ranks -> ddp",
        "processes 1 -> 4, model ddp -> fsdp with sequences over 2 ranks",
        "model fsdp with sequences over 2 ranks -> ddp with sequences over 4 ranks",
        "processes 4 -> 1, model ddp with sequences over 4 ranks -> fsdp",
    ]  # fmt: skip
    assert len(STEPS) == 5


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
    alone = grid(1, 1, "cpu")
    assert (alone.num_data_ranks, alone.data_rank, alone.context_group) == (1, 0, None)
    with pytest.raises(ValueError, match="2 x 1 does not divide the number of processes, 1"):
        grid(2, 1, "cpu")
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
