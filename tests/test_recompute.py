"""What layers keep for the backward: equal gradients to the bit, less memory, and who chooses."""

from dataclasses import replace

import pytest
import torch
from tiny import TokenScorer, tiny_config, tiny_policy, tiny_problems

from r1fast import planning
from r1fast.batch import pack
from r1fast.config import LoraConfig
from r1fast.forward import hidden_states
from r1fast.lora import add_lora
from r1fast.machine import GIB
from r1fast.model import Decoder, ModelSpec
from r1fast.planner import memory, peak
from r1fast.planning import choose_checkpointing, with_checkpointing
from r1fast.probe import LiveBytes, measure_footprint
from r1fast.recompute import MODES, keep_source
from r1fast.trainer import GRPOTrainer
from r1fast.types import Sequence

D, F, H, K, DH = 128, 384, 4, 2, 32
SPECS = {
    "llama": ModelSpec("llama", 300, D, F, 3, H, K, DH, tie_word_embeddings=True),
    "qwen2": ModelSpec("qwen2", 300, D, F, 3, H, K, DH, qkv_bias=True),
    "qwen3": ModelSpec("qwen3", 300, D, F, 3, H, K, DH, qk_norm=True, tie_word_embeddings=True),
}


def batch_of(share: bool):
    """12 prompts of 9 tokens with 4 completions each, enough tokens for the C++ kernels."""
    sequences = [
        Sequence([i, *range(40, 48)], [(7 * i + j + n) % 300 for n in range(15 + j)])
        for i in range(12)
        for j in range(4)
    ]
    return pack(sequences, 10**6, [1.0] * len(sequences), share_prompts=share)[0]


def run(model: Decoder, batch) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes that the forward leaves, the most of the whole pass, and the gradients."""
    model.zero_grad()
    with LiveBytes(model.parameters()) as live:
        hidden = hidden_states(model, batch)
        kept = live.now
        hidden.float().square().sum().backward()
    return kept, live.most, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("family", "dtype", "rank"),
    [
        ("llama", torch.float32, 0), ("qwen2", torch.float32, 0), ("qwen3", torch.float32, 0),
        ("llama", torch.bfloat16, 0), ("qwen3", torch.bfloat16, 0), ("qwen2", torch.float32, 4),
    ],
)  # fmt: skip
def test_gradients_are_equal_to_the_bit_and_memory_falls(family, dtype, rank):
    model = Decoder(SPECS[family], dtype=dtype, seed=0)
    if rank:
        add_lora(model, LoraConfig(rank=rank))
    batch = batch_of(share=family != "qwen2")
    kept, most, grads = {}, {}, {}
    for mode in MODES:
        model.checkpointing = mode
        kept[mode], most[mode], grads[mode] = run(model, batch)
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(grads["none"], grads[mode], strict=True))
    assert kept["selective"] < 0.75 * kept["none"]
    assert kept["full"] < 0.25 * kept["none"]
    assert most["full"] < most["selective"] < 0.85 * most["none"]


def test_what_a_layer_keeps_is_what_is_written():
    """The formulas at the head of recompute.py, in float32 with the C++ kernels; log-sum-exps beside them."""
    written = {
        "none": 4 * D + 3 * F + (2 * H + 3 * K) * DH + H * DH,
        "selective": 2 * D + 2 * F + (H + 2 * K) * DH + H * DH,
        "full": D,
    }
    lora = LoraConfig()
    for mode, elements in written.items():
        found = measure_footprint(
            SPECS["llama"], torch.float32, share_prompts=True, lora=lora, checkpointing=mode
        )
        assert found.layer == pytest.approx(4 * elements, rel=0.05), mode


def test_nothing_is_computed_twice_but_what_was_dropped():
    """And once for all tensors that are dropped together."""
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x, x + 1

    x = torch.randn(5, 4, requires_grad=True)
    a, b = double(x)
    with keep_source(double, x, a, b):
        y = (a * b).sum()
    assert calls == [5]
    y.backward(retain_graph=True)
    assert calls == [5, 5]
    first, x.grad = x.grad, None
    y.backward()
    assert calls == [5, 5, 5]
    assert torch.equal(first, x.grad)
    torch.testing.assert_close(first, 2 * (x + 1) + 2 * x)


def grpo(folder, *overrides) -> GRPOTrainer:
    config = tiny_config(*overrides)
    return GRPOTrainer(tiny_policy(), config, folder, tiny_problems(), TokenScorer())


@pytest.mark.parametrize("budget", ["auto", "4000"])
def test_auto_keeps_all_where_there_is_room_and_less_where_there_is_not(
    tmp_path, monkeypatch, budget
):
    overrides = (
        f"--grpo.token_budget={budget}", "--rollout.num_generations=64", "--grpo.prompts_per_step=32",
    )  # fmt: skip
    trainer = grpo(tmp_path, *overrides)
    assert trainer.model.checkpointing == "none"
    job = trainer.job()

    def most(mode: str) -> int:
        own, T = with_checkpointing(job, mode), 4000
        phases = memory(own, job.at_longest(), T, T, several=True, available=8 * GIB)
        return peak(phases)[1]

    assert most("full") < most("selective") < most("none")
    for mode, room in (("none", "none"), ("selective", "selective"), ("full", "full")):
        available = int(most(room) / 0.9) + (1 << 20)
        found = choose_checkpointing(job, available, 4000)
        assert found.checkpointing == mode
    monkeypatch.setattr(planning, "available_memory", lambda device: 1 << 20)
    assert grpo(tmp_path / "small", *overrides).model.checkpointing == "full"
    asked = grpo(tmp_path / "asked", *overrides, "--model.activation_checkpointing=selective")
    assert asked.model.checkpointing == "selective"


def test_a_run_goes_on_with_another_choice(tmp_path):
    """It changes no weight: a checkpoint made with one is taken with the other, to the same bits."""
    ends = {}
    for name, second in (("kept", "none"), ("changed", "full")):
        for steps, mode in ((1, "none"), (2, second)):
            trainer = grpo(
                tmp_path / name, "--grpo.num_steps=2", f"--model.activation_checkpointing={mode}"
            )
            trainer.folder.mkdir(exist_ok=True)
            while trainer.step < steps:
                trainer.train_step(trainer.step)
                trainer.step += 1
            trainer.save()
        ends[name] = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, ends["changed"][n]) for n, p in ends["kept"].items())


def test_the_planned_seconds_of_a_gpu_have_the_second_forward(tmp_path):
    job = replace(grpo(tmp_path).job(), device=torch.device("cuda"))
    gpu = planning.assumed_gpu("h100")
    none, full = (
        planning.make_plan(job, "x", "", gpu=gpu, checkpointing=mode).seconds()["train"]
        for mode in ("none", "full")
    )
    assert none < full < 1.5 * none
