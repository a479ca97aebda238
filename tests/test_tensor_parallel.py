"""Tensor parallel ranks train what one process trains: gradients, weights, samples, checkpoints, memory.

All ranks of all cases are forked from one process, tensor_ranks.py, whose cases say what they do.
"""

import json
from pathlib import Path

import pytest
import torch
from as_alone import check_moved, check_rows, check_weights, everything, run_layouts
from sharded_ranks import RUNS
from tensor_ranks import LAYOUTS, MODELS, MOVES, TRAINED
from tiny import tiny_config, tiny_model, tiny_policy

from r1fast.metrics import read_metrics
from r1fast.sharding import make_parallel
from r1fast.tensor_parallel import check_divides

EACH = [(layout, name) for layout, names in TRAINED.items() for name in names]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return run_layouts("tensor_ranks.py", tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("n", [2, 4])
def test_a_divided_decoder_is_the_whole_one(out, n):
    """Hidden states, loss, the norm and the gradient of every parameter, whatever layers keep."""
    first, *others = (json.loads((out / f"decoders-{n}-{r}.json").read_text()) for r in range(n))
    assert all(found == first for found in others)
    assert len(first) == 6 * len(MODELS)
    for case, errors in first.items():
        assert max(errors.values()) < 2e-6, (case, errors)
    for name in MODELS:  # what is computed again is the same
        modes = [first[f"{name}, vocab_parallel=true, {m}"] for m in ("none", "selective", "full")]
        assert modes[0] == modes[1] == modes[2]


@pytest.mark.parametrize(("layout", "name"), EACH)
def test_gradients_and_weights_are_those_of_one_process(out, layout, name):
    check_weights(out, layout, LAYOUTS[layout][0], name, RUNS[name], bf16=0.03)


@pytest.mark.parametrize(("layout", "name"), EACH)
def test_data_samples_and_metrics_are_those_of_one_process(out, layout, name):
    check_rows(out, layout, LAYOUTS[layout][0], name, RUNS[name])


@pytest.mark.parametrize("name", ["grpo", "sft bfloat16"])
def test_a_checkpoint_moves_between_all_layouts(out, name):
    check_moved(out, name, [
        "",
        "processes 1 -> 2, model ddp -> ddp, tensor parallel over 2",
        "model ddp, tensor parallel over 2 -> fsdp",
        "processes 2 -> 4, model fsdp -> fsdp, tensor parallel over 2",
        "model fsdp, tensor parallel over 2 -> ddp, tensor parallel over 2",
    ])  # fmt: skip


def test_a_resumed_run_of_the_same_layout_is_the_same_to_the_bit(out):
    whole, pieces = (
        everything(out / f"tensor2 {how}" / "grpo", len(MOVES)) for how in ("straight", "in pieces")
    )
    assert all(torch.equal(pieces[key], x) for key, x in whole.items())


@pytest.mark.parametrize("layout", ["ddp2 tensor2", "fsdp2 tensor2"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(out, layout):
    rows = read_metrics(out / "not_finite" / layout)
    assert [row["train/updates_skipped"] for row in rows] == [0, 1, 0]


def test_a_signal_on_one_rank_stops_all_at_the_same_micro_batch(out):
    facts = [json.loads((out / f"signalled-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts == [{"forwards": 2, "step": 1, "saved": 1}] * 2
    assert [row["step"] for row in read_metrics(out / "signalled")] == [1, 2]


def test_a_rank_holds_its_share_alone_and_the_plan_knows(out):
    def sizes(layout: str) -> list[dict]:
        files = [out / "memory" / layout / f"sizes-{r}.json" for r in range(LAYOUTS[layout][0])]
        return [json.loads(file.read_text()) for file in files]

    (alone,) = sizes("ddp1")
    for layout, share in (("tensor2", 0.51), ("fsdp2 tensor2", 0.26)):
        for rank in sizes(layout):
            held = rank["held"] - rank["steps"]
            assert held < share * (alone["held"] - alone["steps"])
            assert rank["gradients"] < share * alone["gradients"]
        first = sizes(layout)[0]  # has the most
        kept, gradients = first["planned"]
        assert sum(kept.values()) == pytest.approx(first["held"] - first["steps"], rel=0.01)
        assert gradients == pytest.approx(first["gradients"], rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--lora.rank=4",), "lora.rank must be 0"),
        (("--rollout.batch_invariant=true",), "rollout.batch_invariant must be false"),
        (("--log.record=all",), "log.record must be empty"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, message):
    for mode in ("ddp", "fsdp"):
        with pytest.raises(ValueError, match=message) as raised:
            tiny_config("--parallel.tensor_parallel=2", f"--parallel.mode={mode}", *overrides)
        assert "parallel.tensor_parallel = 1" in str(raised.value)


def test_there_is_at_least_one_slice():
    with pytest.raises(ValueError, match=r"parallel.tensor_parallel must be at least 1, got 0"):
        tiny_config("--parallel.tensor_parallel=0")


def test_what_cannot_be_divided_is_refused():
    policy = tiny_policy()
    spec = policy.model.spec
    with pytest.raises(
        ValueError, match=r"= 4 does not divide the model's 2 key and value heads: set it to 1 or 2"
    ):
        check_divides(spec, 4, True)
    with pytest.raises(ValueError, match=r"= 5 does not divide the model's 2 key and value heads"):
        check_divides(spec, 5, True)
    config = tiny_config("--parallel.tensor_parallel=2")
    message = r"is whole on every process: set parallel.tensor_parallel = 1 for it"
    with pytest.raises(ValueError, match=message):
        make_parallel(policy, config, can_shard=False)
    with pytest.raises(ValueError, match=r"1 x 2 does not divide the number of processes, 1"):
        make_parallel(policy, config, can_shard=True)
    few = tiny_model(vocab_size=5, num_attention_heads=8, num_key_value_heads=4).spec
    with pytest.raises(
        ValueError,
        match=r"= 4 leaves a rank without any of the model's 5 tokens: set parallel.vocab",
    ):
        check_divides(few, 4, True)
    check_divides(few, 4, False)
