"""r1fast's linear_cross_entropy has verl's contract: shapes, signs, reductions, shares of a gradient.

verl's own needs a GPU, so the expectation is its documented mathematics in plain PyTorch.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1fast.integrations.verl import linear_cross_entropy

V, D = 61, 16


def expected(hidden, weight, labels, temperature=1.0, reduction="none"):
    logp = torch.log_softmax(hidden.reshape(-1, D) @ weight.t() / temperature, 1)
    chosen = logp.gather(1, labels.reshape(-1, 1))[:, 0]
    if reduction != "none":
        chosen = getattr(chosen, reduction)()
    return chosen, -(logp.exp() * logp).sum(1)


def make_inputs(shape=(2, 7), seed=0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, D, generator=g)
    weight = torch.randn(V, D, generator=g) / 2
    return hidden, weight, torch.randint(V, shape, generator=g)


def gradients(op, hidden, weight, labels, *args):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = op(hidden, weight, labels, *args)
    u = torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)
    ((logprobs * u).sum() + 0.3 * (entropy * entropy).sum() + logprobs.sum()).backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("shape", [(14,), (2, 7), (1, 14)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_values_and_gradients(shape, reduction):
    inputs = make_inputs(shape)
    actual = gradients(linear_cross_entropy, *inputs, 0.7, reduction)
    wanted = gradients(expected, *inputs, 0.7, reduction)
    assert actual[0].shape == ((14,) if reduction == "none" else ())
    assert actual[1].shape == (14,)
    assert actual[2].shape == (*shape, D)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


def test_none_means_the_default():
    inputs = make_inputs()
    for a, w in zip(
        linear_cross_entropy(*inputs, None, None), linear_cross_entropy(*inputs), strict=True
    ):
        assert torch.equal(a, w)


def test_results_are_float32_for_bfloat16():
    hidden, weight, labels = make_inputs()
    actual = gradients(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), labels)
    assert [x.dtype for x in actual] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_arguments_are_verls():
    assert list(inspect.signature(linear_cross_entropy).parameters) == [
        "hidden", "weight", "labels", "temperature", "reduction", "dist_process_group",
    ]  # fmt: skip


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be one of none, sum, mean, got 'max'"):
        linear_cross_entropy(*make_inputs(), 1.0, "max")


@pytest.mark.slow
def test_two_ranks_with_a_slice_each(tmp_path):
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(tmp_path / "store"), str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def check_rank(store: str, rank: int) -> None:
    """This rank's slice gives the whole values; the ranks' shares of dhidden add up to the whole."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    inputs = make_inputs()
    part = slice(0, 25) if rank == 0 else slice(25, V)
    hidden, weight, labels = inputs
    actual = gradients(
        linear_cross_entropy, hidden, weight[part], labels, 0.7, "none", dist.group.WORLD
    )
    wanted = gradients(expected, *inputs, 0.7)
    dist.all_reduce(actual[2])
    for a, w in zip(actual, (*wanted[:3], wanted[3][part]), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    check_rank(sys.argv[1], int(sys.argv[2]))
