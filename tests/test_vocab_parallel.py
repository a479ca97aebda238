"""Two processes, each with a slice of the vocabulary, give what one gives with all of it.

This file is also the program that torchrun starts: `torchrun --nproc-per-node 2 THIS OUT`.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from r1fast.distributed import leave
from r1fast.kernels.fused_grpo_loss import fused_grpo_loss
from r1fast.kernels.linear_cross_entropy import linear_cross_entropy
from r1fast.kernels.linear_logprobs import linear_logprobs

T, D, V, CUT = 21, 8, 53, 30  # slices of 30 and 23 words
CU = torch.tensor([0, 9, 14, 21])
LOSSES = {
    "grpo": {},
    "gspo": {"loss_type": "gspo"},
    "entropy": {"entropy_coef": 0.2, "kl_coef": 0.1},
    "softcap": {"softcap": 2.0, "entropy_coef": 0.2, "temperature": 0.7},
    "chunks": {"workspace_bytes": 5 * CUT * 4},
    "stale": {"loss_type": "cispo"},
}


def results(rank: int | None) -> dict[str, torch.Tensor]:
    """Losses and gradients on the whole vocabulary, or on the slice of `rank`."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g) for s in ((T, D), (V, D), (V,)))
    y = torch.randint(V, (T,), generator=g)
    old = torch.randn(T, generator=g) - 4
    A = torch.tensor([1.0, -1.0, 0.5])
    mine = {None: slice(V), 0: slice(CUT), 1: slice(CUT, V)}[rank]
    group = None if rank is None else dist.group.WORLD
    found = {}

    def record(name, op):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
        out = op(leaves[0], leaves[1], bias=leaves[2], process_group=group)
        out.sum().backward()
        found[name] = out.detach().clone()
        found.update({f"{name}.d{n}": x.grad for n, x in zip("hwb", leaves, strict=True)})

    for name, options in LOSSES.items():
        changed = old - 200 if name == "stale" else old
        record(name, lambda h, w, o=options, c=changed, **k: fused_grpo_loss(
            h, w, y, A, cu_seqlens=CU, old_logprobs=c, ref_logprobs=old, **o, **k)[0])  # fmt: skip
    weights = torch.linspace(-1, 2, T)
    record("logprobs", lambda h, w, **k: linear_logprobs(h, w, y, **k) * weights)
    record("both", lambda h, w, **k: torch.stack(
        linear_logprobs(h, w, y, return_entropy=True, workspace_bytes=4 * CUT * 6, **k)) * weights)  # fmt: skip
    record("nll", lambda h, w, **k: linear_cross_entropy(h, w, y, **k))
    return found


def test_two_slices_are_the_whole(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-addr", "127.0.0.1", "--master-port", str(port), __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole = results(None)
    slices = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, expected in whole.items():
        if name.endswith((".dw", ".db")):
            actual = torch.cat([s[name] for s in slices])
        else:
            actual = slices[0][name]
            assert torch.equal(actual, slices[1][name]), name
        largest = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * largest, msg=name)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(results(dist.get_rank()), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.barrier()
    leave(0)
