import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.rms_norm import rms_norm, rms_norm_ref


def out_and_grads(op, x, weight, dy, dtype):
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    y = op(x, weight, 1e-3)
    y.backward(dy.to(dtype))
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad}


@pytest.mark.parametrize("shape", [(1, 8), (7, 256), (300, 4, 64), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_matches_reference(shape, dtype, device):
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape, dtype=torch.float64, device=device).to(dtype).double()
    weight = torch.randn(shape[-1], dtype=torch.float64, device=device).to(dtype).double()
    actual = out_and_grads(rms_norm, x, weight, dy, dtype)
    baseline = out_and_grads(rms_norm_ref, x, weight, dy, dtype)
    exact = out_and_grads(rms_norm_ref, x, weight, dy, torch.float64)
    for name in exact:
        assert actual[name].dtype == dtype
        if x.numel():
            assert_accurate(name, actual[name], baseline[name], exact[name])
        assert actual[name].shape == exact[name].shape


def test_inference_has_the_bits_of_training(device):
    # the sampler runs without gradients, and its logprobs are the trainer's old logprobs
    torch.manual_seed(0)
    x, weight = torch.randn(65, 96, device=device), torch.randn(96, device=device)
    with_grad = rms_norm(x, weight.requires_grad_(), 1e-6)
    with torch.no_grad():
        without = rms_norm(x, weight, 1e-6)
    assert with_grad.requires_grad
    assert torch.equal(with_grad, without)
