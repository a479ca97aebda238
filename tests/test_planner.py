"""What is planned against what is there: tokens, FLOPs, tensors, cache, and the budget that follows."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems
from torch.utils.flop_counter import FlopCounterMode

from r1fast import planning
from r1fast.batch import pack
from r1fast.config import LoraConfig
from r1fast.costs import Size, apart, cache_bytes, count, forward_flops, rollout_flops
from r1fast.examples import Example
from r1fast.forward import hidden_states
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.lora import add_lora
from r1fast.machine import GIB, GPUS, PeakMemory, available_memory
from r1fast.metrics import read_metrics
from r1fast.model import Decoder, ModelSpec
from r1fast.planner import Work, choose_budget, flops, memory, peak, seconds, training_counts
from r1fast.planning import held_bytes, make_job, make_plan, sft_groups
from r1fast.probe import LiveBytes, Pass, Speed, cut, measure_footprint, measure_speed
from r1fast.rollout.engine import Engine
from r1fast.rollout.sampler import SamplingParams
from r1fast.sft import SFTTrainer, encode_examples
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

GROUPS = [(5, [1, 9, 4, 1]), (1, [3, 7]), (6, [8]), (9, [2, 2, 30, 11, 5])]
SPEC = ModelSpec("llama", 320, 128, 352, 3, 4, 2, 32, tie_word_embeddings=True)
CPU = torch.device("cpu")


def sequences(groups, vocab_size=90) -> list[Sequence]:
    """Prompts that differ, so that each is a group."""
    return [
        Sequence([(i + j) % vocab_size for j in range(p)], [3] * n)
        for i, (p, ns) in enumerate(groups)
        for n in ns
    ]


def visible_pairs(batch) -> int:
    """Of query and key, by the definition: a segment sees its prefix and itself up to the query."""
    sizes = [b - a for a, b in zip(batch.bounds, batch.bounds[1:], strict=False)]
    return sum(
        n * (sizes[p] if p >= 0 else 0) + n * (n + 1) // 2
        for n, p in zip(sizes, batch.prefix_of, strict=True)
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [20, 45, 1000])  # the longest sequence has 38: some go alone
def test_counts_are_those_of_the_packed_batches(share, budget):
    own = sequences(GROUPS)
    batches = pack(own, budget, [1.0] * len(own), share_prompts=share, longer_alone=True)
    counts = count(GROUPS if share else apart(GROUPS), budget)
    assert counts.tokens == sum(b.num_tokens for b in batches)
    assert counts.targets == sum(len(b.target_ids) for b in batches)
    assert counts.pairs == sum(map(visible_pairs, batches))
    assert counts.micro_batches == len(batches)
    assert counts.largest == max(b.num_tokens for b in batches)


def test_flops_of_a_forward_are_those_that_pytorch_counts():
    """In float64, which takes no product of ours; its counter sees linear layers alone."""
    model = Decoder(SPEC, dtype=torch.float64, seed=0)
    own = sequences(GROUPS)
    (batch,) = pack(own, 1000, [1.0] * len(own), share_prompts=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = hidden_states(model, batch)
        hidden @ model.head_weight.T
    products = {"mm", "addmm", "bmm"}
    by_op = counter.get_flop_counts()["Global"]
    seen = sum(n for op, n in by_op.items() if str(op).split(".")[-1] in products)
    expected = forward_flops(SPEC, Size.of(model), count(GROUPS, 1000))
    assert seen == pytest.approx(expected["linear"] + expected["head"], rel=1e-6)
    H, Dh, L = 4, 32, 3
    assert expected["attention"] == 4 * H * Dh * L * count(GROUPS, 1000).pairs


def test_flops_of_a_rollout_are_those_of_its_forwards():
    """Token by token, the prompt once: n tokens take n - 1 forwards after it, and n heads."""
    size = Size.of(Decoder(SPEC, device="meta"))
    found = rollout_flops(SPEC, size, [(5, [3, 1])])
    pair = 4 * 4 * 32 * 3
    assert found["prefill"] == 2 * size.linears * 5 + pair * (1 + 2 + 3 + 4 + 5)
    assert found["decode"] == 2 * size.linears * 2 + pair * (6 + 7) + 2 * size.table * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
def test_activations_of_a_narrow_decoder_foretell_those_of_the_wide(dtype, rank):
    lora = LoraConfig(rank=rank)
    footprint = measure_footprint(SPEC, dtype, share_prompts=True, lora=lora)
    model = Decoder(replace(SPEC, vocab_size=16), dtype=dtype, seed=0)
    if rank:
        add_lora(model, lora)
    own = sequences([(12, [20] * 5)] * 6, 16)
    (batch,) = pack(own, 10**6, [1.0] * len(own), share_prompts=True)
    with LiveBytes(model.parameters()) as live:
        loss = linear_cross_entropy(
            hidden_states(model, batch), model.head_weight, batch.target_ids, reduction="sum"
        )
        at_loss = live.most
        live.restart()
        loss.backward()
    T = batch.num_tokens
    saved = footprint.layer * SPEC.num_layers
    assert at_loss == pytest.approx((saved + footprint.loss) * T, rel=0.05)
    assert live.most == pytest.approx((saved + footprint.backward) * T, rel=0.05)


def test_live_bytes_see_what_lives_and_what_has_gone():
    known = torch.ones(1000)
    with LiveBytes([known]) as live:
        view = known.view(10, 100)  # no memory of its own
        assert live.now == 0
        x = view + 1
        y = x * 2
        assert (live.now, live.most) == (8000, 8000)
        del x
        assert (live.now, live.most) == (4000, 8000)
        live.restart()
        y.add_(1)
        assert live.most == 4000


def grpo(folder, *overrides, policy=None, **kwargs) -> GRPOTrainer:
    policy = policy or tiny_policy()
    config = tiny_config(*overrides)
    return GRPOTrainer(policy, config, folder, tiny_problems(), TokenScorer(), **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_planned_weights_are_the_tensors_that_are_held(tmp_path, dtype, rank, kl):
    policy = tiny_policy()
    policy.model.to(getattr(torch, dtype))
    overrides = (f"--model.dtype={dtype}", f"--lora.rank={rank}", f"--grpo.kl_coef={kl}")
    trainer = grpo(tmp_path, *overrides, policy=policy)
    trainer.train_step(0)
    kinds = memory(trainer.job(), trainer.work.sampled, 100, 100, several=False, available=8 * GIB)[
        "update"
    ]
    planned = sum(kinds.get(kind, 0) for kind in ("weights", "optimizer", "reference"))
    counters = 4 * len(trainer.optimizer.named)  # AdamW's step numbers
    copy_of_adapters = kinds["reference"] if rank and kl else 0  # made at a refresh
    assert planned - copy_of_adapters + counters == held_bytes(trainer)


def test_the_cache_is_what_the_engine_holds():
    policy = tiny_policy()
    engine = Engine(policy.model, [0], max_batch_size=12)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    engine.generate([[1] * 20, [2] * 5, [3] * 31], 4, sampling)
    spec, held = policy.model.spec, engine.stats
    planned = cache_bytes(
        spec, [(n, [40] * 4) for n in (20, 5, 31)],
        max_batch_size=12, block_size=16, dtype=torch.float32, has_tails=True,
    )  # fmt: skip
    assert planned == pytest.approx(held.peak_blocks * held.block_bytes, rel=0.1)


def job(kind="grpo", *overrides, spec=SPEC, device="cpu", groups=((30, [100] * 8),) * 4, ranks=1):
    config = tiny_config("--grpo.token_budget=auto", "--sft.token_budget=auto", *overrides)
    size = Size.of(Decoder(spec, device="meta"))
    longest = max(p + n for p, ns in groups for n in ns)
    return make_job(kind, spec, size, config, torch.device(device), groups, longest, ranks)


def test_auto_is_what_memory_allows():
    one = job(device="cuda")
    whole = 4 * (30 + 8 * 99)
    assert choose_budget(one, 80 * GIB) == (whole, "a micro-batch holds a whole mini-batch")
    found = [choose_budget(one, n)[0] for n in (10**9, 10**8, 5 * 10**7, 3 * 10**7, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[0] == whole > found[2] > found[-1] == 129  # never below the longest sequence
    assert "may not fit" in choose_budget(one, 10**6)[1]
    for budget, available in zip(found[:-1], (10**9, 10**8, 5 * 10**7, 3 * 10**7), strict=True):
        most = memory(one, one.groups, budget, budget, several=budget < whole, available=available)
        assert peak(most)[1] <= 0.9 * available or budget == 129


def test_auto_on_a_cpu_keeps_micro_batches_small_and_groups_whole():
    many = ((30, [100] * 8),) * 64
    assert choose_budget(job(groups=many), 80 * GIB) == (4096, "the CPU is not faster with more")
    # a prompt that would be forwarded again counts: at most a twentieth, or the whole group
    assert choose_budget(job(groups=((300, [100] * 64),) * 8), 80 * GIB)[0] == 6000
    assert choose_budget(job(groups=((300, [100] * 50),) * 8), 80 * GIB)[0] == 300 + 50 * 99
    # mini-batches are what is packed, and without sharing every completion has its prompt
    halves = job("grpo", "--grpo.num_mini_batches=16", groups=((30, [100] * 8),) * 4)
    assert choose_budget(halves, 80 * GIB)[0] == 30 + 99 + 30 + 99
    assert choose_budget(job("sft", groups=((30, [100]),) * 4), 80 * GIB)[0] == 4 * 129


def test_auto_is_chosen_once_and_kept(tmp_path, monkeypatch):
    """A resumed run keeps the number though its machine would choose another; and trains to the same bits."""
    options = ("--checkpoint.every_steps=2", "--grpo.token_budget=auto")
    whole = grpo(tmp_path / "whole", *options)
    chosen = whole.token_budget.num_tokens
    whole.run()
    assert {row["train/token_budget"] for row in read_metrics(tmp_path / "whole")} == {chosen}
    first = grpo(tmp_path / "parts", *options, "--grpo.num_steps=2")
    first.run()
    monkeypatch.setattr(planning, "choose_budget", lambda job, available: (41, "another machine"))
    rest = grpo(tmp_path / "parts", *options, force=True)
    assert rest.token_budget.num_tokens == chosen != 41
    rest.run()
    fixed = grpo(tmp_path / "fixed", f"--grpo.token_budget={chosen}")
    fixed.run()
    for other in (rest, fixed):
        for a, b in zip(whole.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)
    plan = json.loads((tmp_path / "parts" / "plan.json").read_text())
    assert plan["token_budget"]["reason"] == "as it was before"


def test_sft_with_auto_drops_no_example_for_its_budget(tmp_path):
    config = tiny_config("--sft.token_budget=auto")
    policy = tiny_policy()
    examples = [Example("What is 1 + 1?", " 2" * n) for n in (1, 2, 30)]
    found = encode_examples(examples, policy, config)
    trainer = SFTTrainer(policy, config, tmp_path, found)
    assert len(found) == 3
    assert trainer.token_budget.num_tokens >= max(s.num_tokens for s in found) - 1
    trainer.run()
    assert json.loads((tmp_path / "plan.json").read_text())["kind"] == "sft"


def test_sft_groups_are_from_short_to_long():
    config = tiny_config("--sft.batch_size=4")
    lengths = [(n, n) for n in random.Random(0).sample(range(1, 101), 100)]
    assert sft_groups(config, lengths, 2) == [(26, [26]), (76, [76])]


def test_the_first_steps_stand_beside_the_plan(tmp_path, capsys):
    trainer = grpo(tmp_path, "--grpo.num_steps=5")
    trainer.run()
    out = capsys.readouterr().out
    assert out.index("plan: ") < out.index("grpo 1/5") < out.index("grpo 3/5")
    assert out.index("grpo 3/5") < out.index("measured, and as planned") < out.index("grpo 4/5")
    plan = json.loads((tmp_path / "plan.json").read_text())
    measured = plan["measured"]
    assert measured["steps"] == 2
    assert set(measured["seconds"]) == {"rollout", "reference", "train"}
    rows = read_metrics(tmp_path)[1:3]
    for phase, (planned, taken) in measured["seconds"].items():
        assert planned > 0
        assert taken == pytest.approx(sum(row[f"time/{phase}"] for row in rows) / 2)
    tokens = trainer.num_tokens / 5
    rate = measured["tokens_per_second"][1] * sum(row["step_time"] for row in rows) / 2
    assert rate == pytest.approx(tokens, rel=0.3)
    assert all(x > 0 for x in measured["mfu"] + measured["memory_peak"][:1])


def test_a_probe_that_fails_does_not_stop_training(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(planning, "_speed", fail)
    grpo(tmp_path, "--grpo.num_steps=1").run()
    assert len(read_metrics(tmp_path)) == 1
    assert "no plan, as a measurement failed: no such kernel" in capsys.readouterr().err


def test_probes_draw_nothing_and_leave_nothing(tmp_path):
    """The global generator, gradients and grad mode are as before; all costs are finite numbers."""
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    speed = measure_speed(
        replace(SPEC, vocab_size=20_000), torch.float32, CPU, GROUPS, share_prompts=True,
        token_budget=64, max_batch_size=8, sampling=SamplingParams(), lora=LoraConfig(),
        optim=tiny_config().optim,
    )  # fmt: skip
    measure_footprint(SPEC, torch.float32, share_prompts=False, lora=LoraConfig())
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.is_grad_enabled()
    assert speed.gemm > 1e8
    parts = [*(getattr(p, n) for p in (speed.train, speed.forward) for n in ("token", "pair")),
             speed.train.target, speed.update, speed.step + speed.row]  # fmt: skip
    assert all(0 <= x < 10 for x in parts)
    assert min(speed.train.target, speed.update, speed.step + speed.row) > 0


def test_seconds_add_up_what_is_counted():
    speed = Speed(1e9, Pass(2.0, 0.0, 0.5), Pass(1.0, 0.0, 0.0), 7.0, 100.0, 3.0, 10.0, 1.0, 0.0)
    groups = [(4, [6, 2])]
    one = job("grpo", "--grpo.kl_coef=1", "--grpo.num_iterations=2", groups=groups)
    found = seconds(one, speed, Work(groups, groups), 1000)
    assert found["reference"] == 4 + 5 + 1
    assert found["train"] == 2 * (2.0 * 10 + 0.5 * 8) + 2 * 7.0
    # 6 decoded tokens in 5 steps of two slots; one slot alone takes a step for each
    assert found["rollout"] == 100 + 3 * 4 + 10 * 5 + 6
    assert speed.rollout(groups, 1) == 100 + 3 * 4 + 10 * 6 + 6


def test_training_flops_are_three_forwards_or_two_of_a_frozen_base():
    one = job("sft", groups=[(4, [6])])
    (counts,) = training_counts(one, one.groups, 1000)
    forward = forward_flops(SPEC, one.size, counts)
    found = flops(one, Work.of(one.groups), 1000)
    assert {k.removeprefix("training, "): v for k, v in found.items()} == {
        name: pytest.approx(3 * value) for name, value in forward.items()
    }
    frozen = replace(one, size=replace(one.size, trained=0))
    assert flops(frozen, Work.of(one.groups), 1000)["training, linear"] == 2 * forward["linear"]


def test_what_is_cut_is_about_as_long_as_asked():
    assert cut([(10, [5] * 4)] * 9, 50) == [(10, [5] * 4), (10, [5] * 4)]
    assert cut([(10**6, [10**6] * 64)] * 64, 1000) == [(500, [501])]
    assert cut([(1, [1])], 1000) == [(1, [1])]


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("r1fast.machine.free_memory", lambda device: 600)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_memory(CPU) == 600
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available_memory(CPU) == 200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")  # not torchrun's, but no reason to fail
    assert available_memory(CPU) == 600


def test_peak_memory_is_what_is_added_to_the_known():
    kept = torch.ones(4 << 20)  # 16 MiB, as if they were the weights
    watch = PeakMemory(CPU, kept.nbytes)
    torch.ones(16 << 20).add_(1)  # 64 MiB for a moment
    assert watch.read() == pytest.approx(80 << 20, rel=0.1)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_that_is_not_here_is_assumed_and_says_so(name):
    spec = replace(SPEC, num_layers=28, hidden_size=3584, intermediate_size=18944, num_heads=28,
                   num_kv_heads=4, head_dim=128, vocab_size=152_064)  # fmt: skip
    one = job("grpo", "--model.dtype=bfloat16", spec=spec, device="cuda", ranks=8)
    plan = make_plan(one, "grpo", "some", gpu=GPUS[name])
    assert plan.available == GPUS[name].memory
    assert "not measured" in plan.assumptions[0]
    assert 0.2 < plan.mfu(plan.seconds()["train"]) < 0.7
    assert plan.memory["training"]["weights"] == 2 * one.size.total
    assert plan.memory["training"]["optimizer"] == 12 * one.size.total
    assert plan.memory["update"]["gradients"] == 8 * one.size.total  # and their sum over ranks
