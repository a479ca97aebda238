"""Micro-benchmarks of single kernels under pytest-benchmark: `make bench`, or `pytest benchmarks`.

Sizes are small enough for two CPU cores. On a GPU the clock waits for the device.
"""

import pytest
import torch

from r1fast.kernels.advantages import group_advantages
from r1fast.kernels.attention import varlen_attention
from r1fast.kernels.fused_grpo_loss import fused_grpo_loss
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.kernels.linear_logprobs import linear_logprobs
from r1fast.kernels.rms_norm import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T, D, V, S = 512, 256, 16000, 16


def timed(benchmark, function):
    def call():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)


@pytest.fixture(params=DTYPES)
def head(request) -> dict[str, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    dtype = DTYPES[request.param]
    hidden = torch.randn(T, D, generator=g, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, generator=g, device=DEVICE) * 6.5 / D**0.5).to(dtype)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "target_ids": torch.randint(V, (T,), generator=g, device=DEVICE),
    }


def test_linear_logprobs_forward(benchmark, head):
    def forward():
        with torch.no_grad():
            linear_logprobs(**head)

    timed(benchmark, forward)


def test_linear_logprobs_with_entropy_backward(benchmark, head):
    def both():
        logprobs, entropy = linear_logprobs(**head, return_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()

    timed(benchmark, both)


def test_linear_cross_entropy(benchmark, head):
    timed(benchmark, lambda: linear_cross_entropy(**head).backward())


@pytest.mark.parametrize("signal", [1.0, 0.5])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_fused_grpo_loss(benchmark, head, loss_type, signal):
    advantages = torch.randn(S, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    advantages[: round(S * (1 - signal))] = 0
    cu_seqlens = torch.arange(0, T + 1, T // S, device=DEVICE)

    def both():
        loss, _ = fused_grpo_loss(
            **head, advantages=advantages, cu_seqlens=cu_seqlens, loss_type=loss_type
        )
        loss.backward()

    timed(benchmark, both)


def test_group_advantages(benchmark):
    rewards = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    timed(benchmark, lambda: group_advantages(rewards, scale="group"))


def test_rms_norm(benchmark):
    x, weight = torch.randn(4096, 896, device=DEVICE), torch.ones(896, device=DEVICE)
    timed(benchmark, lambda: rms_norm(x, weight, 1e-6))


def test_varlen_attention(benchmark):
    q = torch.randn(1024, 8, 64, device=DEVICE)
    k, v = torch.randn(2, 1024, 2, 64, device=DEVICE)
    cu_seqlens = torch.arange(0, 1025, 128, device=DEVICE, dtype=torch.int32)
    timed(benchmark, lambda: varlen_attention(q, k, v, cu_seqlens, 128))
