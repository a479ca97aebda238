"""FSDP2 trains what DDP trains, on any number of ranks: gradients, weights, samples, checkpoints, stops.

All ranks of all cases are forked from one process, sharded_ranks.py, whose cases say what they do.
"""

import json
from pathlib import Path

import pytest
import torch
from as_alone import (
    check_moved,
    check_rows,
    check_weights,
    everything,
    first_step,
    largest_error,
    run_layouts,
    tensors_of,
)
from sharded_ranks import ALWAYS, LAYOUTS, MORE, MOVED, MOVES, RUNS, runs_of
from tiny import tiny_config, tiny_policy

from r1fast.checkpoint import load_checkpoint
from r1fast.interrupt import stoppable
from r1fast.metrics import read_metrics
from r1fast.sharding import empty, hollow, make_parallel
from r1fast.token_budget import OutOfMemoryForGood, TokenBudget

TRAINED = [(layout, name) for layout in (*ALWAYS, *MORE) for name in runs_of(layout)]
TRAINED = [(layout, name) for layout, name in TRAINED if layout != "ddp1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return run_layouts("sharded_ranks.py", tmp_path_factory.mktemp("sharding"))


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_gradients_and_weights_are_those_of_one_process(out, layout, name):
    check_weights(out, layout, LAYOUTS[layout][0], name, RUNS[name])


@pytest.mark.parametrize("name", MORE["ddp2"])
def test_in_bfloat16_the_ranks_of_ddp_have_the_same_micro_batches_and_so_the_same_gradient(
    out, name
):
    fsdp, ddp = (tensors_of(out, layout, name, "gradients") for layout in ("fsdp2", "ddp2"))
    assert largest_error(first_step(fsdp), first_step(ddp)) < 1e-6


@pytest.mark.parametrize("name", MORE["fsdp1"])
def test_a_group_of_one_is_one_process_to_the_bit(out, name):
    for what in ("gradients", "weights-0"):
        alone, divided = (tensors_of(out, layout, name, what) for layout in ("ddp1", "fsdp1"))
        assert all(torch.equal(divided[key], x) for key, x in alone.items())


@pytest.mark.parametrize(("layout", "name"), TRAINED)
def test_data_samples_and_metrics_are_those_of_one_process(out, layout, name):
    n = LAYOUTS[layout][0]
    rows, _ = check_rows(out, layout, n, name, RUNS[name])
    if n > 1 and layout != "ddp4" and not name.startswith("sft"):
        assert ("time/gather" in rows[0]) == ("fsdp" in layout or layout in ("hsdp4", "kept2"))


@pytest.mark.parametrize("name", MOVED)
def test_a_checkpoint_moves_between_all_layouts(out, name):
    check_moved(out, name, [
        "", "processes 1 -> 2, model ddp -> fsdp", "processes 2 -> 4, model fsdp -> ddp",
        "model ddp -> fsdp in 2 copies", "processes 4 -> 1, model fsdp in 2 copies -> fsdp",
    ])  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_a_resumed_run_of_the_same_layout_is_the_same_to_the_bit(out, name):
    whole, pieces = (
        everything(out / f"fsdp2 {how}" / name, len(MOVES)) for how in ("straight", "in pieces")
    )
    assert all(torch.equal(pieces[key], x) for key, x in whole.items())
    files = sorted(
        p.name
        for p in load_checkpoint(out / "fsdp2 straight" / name / "checkpoints").path.iterdir()
    )
    assert [f for f in files if f.startswith("optimizer")] == [
        f"optimizer-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


@pytest.mark.parametrize("name", ["grpo-loss", "grpo-gradient", "sft-loss", "sft-gradient"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(out, name):
    for rank in (0, 1):
        same = json.loads((out / "not_finite" / name / f"same-{rank}.json").read_text())
        assert same == [False, True, False]  # whether a step has left this rank's rows as they were
    rows = read_metrics(out / "not_finite" / name)
    assert [row["train/updates_skipped"] for row in rows] == [0, 1, 0]


def test_a_signal_on_one_rank_stops_all_at_the_same_micro_batch(out):
    facts = [json.loads((out / f"signalled-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts == [{"forwards": 2, "step": 1, "saved": 1}] * 2
    rows = read_metrics(out / "signalled")
    assert [row["step"] for row in rows] == [1, 2]  # the same command went on
    alone = read_metrics(out / "ddp1" / "grpo")
    assert rows[1]["loss"] == pytest.approx(alone[1]["loss"], rel=1e-4)


def test_ranks_of_other_numbers_of_micro_batches_stay_in_step(out):
    alone, *both = (
        json.loads((out / f"uneven-{x}.json").read_text()) for x in ("1-0", "2-0", "2-1")
    )
    assert both == [pytest.approx(alone, rel=1e-5)] * 2


def test_ranks_in_step_do_not_try_again_alone():
    budget = TokenBudget(64, discard=lambda: None, advice="Take less.", in_step=torch.device("cpu"))

    class Batch:
        num_tokens, sequence_index = 50, [0, 1]

    def attempt():
        for _ in budget.each([Batch()]):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(OutOfMemoryForGood, match=r"of 50 tokens, which no rank .* Take less"):
        budget.fitting(attempt)
    assert budget.num_tokens == 64


def test_work_in_step_is_not_stopped_at_a_boundary_of_one_rank():
    from r1fast.interrupt import Stopped, StopRequest, boundary

    with StopRequest(gives_up=lambda left: True) as request:
        request.received = True
        with pytest.raises(Stopped), stoppable(in_step=True):
            boundary("train")  # nothing: the others would wait
            reached = True
    assert reached


def test_an_empty_model_is_nan_and_has_no_memory():
    policy = tiny_policy()
    before = {n: p.shape for n, p in policy.model.named_parameters()}
    empty(policy.model, before)
    other = hollow(policy.model.spec, torch.bfloat16, policy.device)
    for model in (policy.model, other):
        assert {n: p.shape for n, p in model.named_parameters()} == before
        for p in model.parameters():
            assert p.isnan().all()
            assert p.untyped_storage().nbytes() == p.itemsize
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--parallel.replicas=2",), "parallel.replicas must be with parallel.mode"),
        (("--parallel.cpu_offload=true",), "parallel.cpu_offload must be false without"),
        (("--parallel.mode=fsdp", "--rollout.batch_invariant=true"), "batch_invariant must be false"),
        (("--parallel.mode=fsdp", "--log.record=all"), "log.record must be empty"),
        (("--parallel.mode=fsdp", "--parallel.replicas=0"), "parallel.replicas must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*overrides)


def test_what_cannot_be_divided_is_refused():
    policy = tiny_policy()
    with pytest.raises(
        ValueError, match=r'is whole on every process: set parallel.mode = "ddp" for it'
    ):
        make_parallel(policy, tiny_config("--parallel.mode=fsdp"), can_shard=False)
    config = tiny_config("--parallel.mode=fsdp", "--parallel.cpu_offload=true")
    with pytest.raises(ValueError, match=r"on a CPU they are there"):
        make_parallel(policy, config, can_shard=True)
