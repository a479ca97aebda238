import pytest
import torch

from r1fast.kernels.gather_rows import gather_rows, plan_gather


@pytest.mark.parametrize("rows", [[], [2], [3, 0, 1], [4, 4, 4], [1, 0, 1, 5, 0, 1, 3]])
def test_gradient_is_that_of_indexing(rows, device):
    x = torch.randn(6, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn(len(rows), 2, 3, dtype=torch.float64, device=device)
    y, expected = gather_rows(x, plan_gather(rows, device=device)), x[torch.tensor(rows).long()]
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (dx,), (exact,) = (torch.autograd.grad(out, x, dy) for out in (y, expected))
    torch.testing.assert_close(dx, exact)


def test_many_takers_are_added_up_in_float32(device):
    """1 + 1023 * 2^-9 in bfloat16, one after the other, stays 1."""
    x = torch.zeros(3, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    dy = torch.full((1024, 4), 2.0**-9, dtype=torch.bfloat16, device=device)
    dy[0] = 1
    gather_rows(x, plan_gather([1] * 1024, device=device)).backward(dy)
    assert x.grad[1].tolist() == [3.0] * 4  # 2.998 rounded
    assert not x.grad[[0, 2]].any()
