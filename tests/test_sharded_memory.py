"""What a plan says of a rank that holds a share of the model, against the tensors that are there."""

from dataclasses import replace

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import distributed
from r1fast.costs import Size
from r1fast.lora import add_lora
from r1fast.machine import GIB, GPUS
from r1fast.model import Decoder, ModelSpec
from r1fast.planner import flops, memory, peak, resident
from r1fast.planning import held_bytes, make_job, make_plan
from r1fast.trainer import GRPOTrainer

SPEC = ModelSpec("llama", 320, 128, 352, 3, 4, 2, 32, tie_word_embeddings=True)
GROUPS = [(12, [20] * 4)] * 4
FSDP = ("--parallel.mode=fsdp", "--grpo.token_budget=200")


def job_of(*overrides: str, num_ranks: int = 1, device: str = "cpu", spec: ModelSpec = SPEC):
    config = tiny_config(*overrides)
    model = Decoder(spec, device="meta")
    if config.lora.rank:
        add_lora(model, config.lora)
    size = Size.of(model)
    return make_job("grpo", spec, size, config, torch.device(device), GROUPS, 32, num_ranks)


def phases(job):
    return memory(job, GROUPS, 200, 100, several=True, available=GIB)


@pytest.fixture
def group_of_one():
    yield
    distributed.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_kept_is_what_a_trainer_keeps(tmp_path, group_of_one, dtype, rank):
    policy = tiny_policy("qwen3")
    policy.model.to(getattr(torch, dtype))
    config = tiny_config(*FSDP, f"--model.dtype={dtype}", "--grpo.num_steps=1", f"--lora.rank={rank}",
                         "--model.activation_checkpointing=none", "--grpo.ref_refresh_steps=1")  # fmt: skip
    trainer = GRPOTrainer(policy, config, tmp_path, tiny_problems(), TokenScorer())
    trainer.watch = lambda: None
    trainer.run()
    steps = sum(x.nbytes for n, x in trainer.optimizer.state_tensors().items() if n[:5] == "step.")
    job = replace(trainer.job(), size=Size.of(trainer.model))
    kept = resident(job, GROUPS, GIB)
    assert held_bytes(trainer) - steps == kept["weights"] + kept["optimizer"] + kept["reference"]
    assert trainer.model.num_parameters() == job.size.total
    whole = [p for name, p in policy.model.named_parameters() if name in trainer.parallel.shards]
    assert phases(job)["rollout"]["gathered"] == sum(p.nbytes for p in whole)


@pytest.mark.parametrize(("num_ranks", "replicas"), [(2, 1), (8, 1), (8, 4)])
def test_shares_are_divided_by_the_ranks_that_hold_one_copy(num_ranks, replicas):
    one = job_of(*FSDP)
    some = job_of(*FSDP, f"--parallel.replicas={replicas}", num_ranks=num_ranks)
    num_shares = num_ranks // replicas
    alone, divided = resident(one, GROUPS, GIB), resident(some, GROUPS, GIB)
    for kind in ("weights", "optimizer", "reference"):
        assert divided[kind] == pytest.approx(alone[kind] / num_shares, abs=1)
    assert divided["cache"] == alone["cache"]
    assert f"divided over {num_shares} ranks" in some.divided.says()
    assert (f" in {replicas} copies" in some.divided.says()) == (replicas > 1)
    whole, share = phases(one), phases(some)
    assert share["update"]["gradients"] == pytest.approx(4 * one.size.total / num_shares, abs=1)
    assert share["rollout"]["gathered"] == whole["rollout"]["gathered"] == 4 * one.size.total


@pytest.mark.parametrize("offload", [False, True])
def test_of_adapters_the_base_alone_is_divided(offload):
    lora, fsdp = "--lora.rank=4", (*FSDP, f"--parallel.cpu_offload={str(offload).lower()}")
    device = "cuda" if offload else "cpu"
    whole = job_of(lora, num_ranks=4, device=device)
    some = job_of(*fsdp, lora, num_ranks=4, device=device)
    base = 4 * (some.size.total - some.size.trained)
    all_, kept = resident(whole, GROUPS, GIB), resident(some, GROUPS, GIB)
    for kind in ("optimizer", "reference"):
        assert kept[kind] == all_[kind]
    share = 0 if offload else base // 4
    assert kept["weights"] == all_["weights"] - base + share
    for phase in ("training", "update"):
        assert phases(some)[phase]["gradients"] == phases(whole)[phase]["gradients"]
    assert phases(some)["rollout"]["gathered"] == phases(some)["reference"]["gathered"] == base
    assert phases(some)["training"]["gathered"] == base  # three layers are all
    assert "the base is divided over 4 ranks, adapters" in some.divided.says()


def test_training_has_a_few_layers_at_a_time_or_all():
    few, all_ = (job_of(*FSDP, f"--parallel.reshard_after_forward={x}", num_ranks=4,
                        spec=replace(SPEC, num_layers=12)) for x in ("true", "false"))  # fmt: skip
    layers = few.size.linears * 4
    outside = (few.size.total - few.size.linears) * 4
    assert phases(all_)["training"]["gathered"] == layers + outside
    assert phases(few)["training"]["gathered"] == layers // 4 + outside


def test_ddp_gathers_nothing_and_holds_all():
    ddp, fsdp = job_of(num_ranks=8), job_of(*FSDP, num_ranks=8)
    assert ddp.divided is None
    assert not any("gathered" in kinds for kinds in phases(ddp).values())
    assert peak(phases(fsdp))[1] < peak(phases(ddp))[1]


def test_what_is_offloaded_is_not_on_the_gpu():
    job = job_of(*FSDP, "--parallel.cpu_offload=true", num_ranks=2, device="cuda")
    kept = resident(job, GROUPS, GIB)
    assert kept["weights"] == kept["optimizer"] == kept["reference"] == 0
    assert phases(job)["update"]["gradients"] == 0


def test_a_plan_refuses_to_offload_to_where_weights_are():
    with pytest.raises(ValueError, match=r"on a CPU they are there"):
        job_of(*FSDP, "--parallel.cpu_offload=true")


def test_new_adapters_that_are_never_copied_are_no_reference():
    for more, share in (("--grpo.ref_refresh_steps=0", 0), ("--grpo.ref_refresh_steps=9", 1),
                        ("--model.adapter=folder", 1)):  # fmt: skip
        job = job_of("--lora.rank=4", "--grpo.ref_refresh_steps=0", more)
        assert resident(job, GROUPS, GIB)["reference"] == 4 * job.size.trained * share


def test_a_plan_says_what_it_divides_and_what_it_leaves_out():
    plan = make_plan(job_of(*FSDP, num_ranks=4, device="cuda"), "grpo", "", gpu=GPUS["h100"])
    assert any("divided over 4 ranks; whole weights in rollouts" in x for x in plan.assumptions)
    assert any("gathering takes is not in the seconds" in x for x in plan.assumptions)


def test_a_tensor_rank_has_a_slice_and_activations_of_it():
    tensor = ("--parallel.tensor_parallel=2", "--grpo.token_budget=200")
    whole, alone = job_of(num_ranks=2), job_of("--parallel.mode=ddp", num_ranks=2)
    assert resident(alone, GROUPS, GIB) == resident(whole, GROUPS, GIB)
    norms = 4 * (2 * SPEC.num_layers + 1) * SPEC.hidden_size  # they are on both
    for mode, ranks, share in (("ddp", 2, 1 / 2), ("ddp", 8, 1 / 2), ("fsdp", 8, 1 / 8)):
        job = job_of(*tensor, f"--parallel.mode={mode}", num_ranks=ranks)
        kept, all_ = resident(job, GROUPS, GIB), resident(whole, GROUPS, GIB)
        for kind, copies in (("weights", 1), ("optimizer", 2), ("reference", 1)):
            assert kept[kind] == pytest.approx(all_[kind] * share, abs=copies * norms)
        assert phases(job)["rollout"]["gathered"] == 4 * job.size.total
        assert phases(job)["training"]["activations"] < phases(whole)["training"]["activations"]
        assert f"divided over {round(1 / share)} ranks" in job.divided.says()
    assert job.footprint.forward == whole.footprint.forward  # of the reference, which is whole


def test_two_tensor_ranks_train_twice_the_sequences_at_half_the_cost():
    jobs = job_of(num_ranks=2), job_of("--parallel.tensor_parallel=2", num_ranks=2)
    alone, tensor = (flops(job, job.work(GROUPS), 1 << 20) for job in jobs)
    assert {key: pytest.approx(x, rel=0.01) for key, x in alone.items()} == tensor


def test_a_plan_refuses_what_cannot_be_divided():
    with pytest.raises(ValueError, match="= 4 does not divide the model's 2 key and value heads"):
        job_of("--parallel.tensor_parallel=4", num_ranks=4)
