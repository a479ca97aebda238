"""Decode attention and sampling, one step of B sequences, beside what the engine did before.

Attention: 2 K Dh bytes-of-an-element for each position, those of a shared prompt once a group, and 4 H Dh FLOP for each
query and position. The peer is SDPA over a dense (B, K, L, Dh) cache with a mask. Layers take turns, so that each
cache is as far away as in a model. Sampling: the logits are read once; peers are torch.multinomial and the exponential
race. `floor` is the bytes over the bandwidth of a plain read, measured in the same run.
"""

import time

import torch
import torch.nn.functional as F
from common import append_rows, print_table

from r1fast.kernels.paged_attention import DecodePlan, PagedLayout, paged_attention, write_kv
from r1fast.kernels.sample import sample

B, G, H, K, DH, OWN, NUM_LAYERS = 64, 8, 8, 2, 64, 64, 8
BLOCK_SIZE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def median_ms(calls, rounds: int = 30) -> float:
    """The median time of a call, in ms; `calls` take turns."""
    times = []
    for i in range(rounds + len(calls)):
        start = time.perf_counter()
        calls[i % len(calls)]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times = sorted(times[len(calls) :])
    return 1e3 * times[len(times) // 2]


def read_bandwidth() -> float:
    """Bytes a second of a sum over 256 MiB."""
    x = torch.ones(64 << 20, device=DEVICE)
    return x.nbytes / median_ms([x.sum], 10) * 1e3


def make_layer(prompt: int, dtype: torch.dtype):
    """A filled paged cache and the dense one with the same keys and values."""
    layout = PagedLayout(K, DH, BLOCK_SIZE, dtype, device=DEVICE)
    shared, own = prompt // BLOCK_SIZE, -(-OWN // BLOCK_SIZE)
    num_groups = B // G
    blocks = torch.randperm(num_groups * shared + B * own, device=DEVICE).int()
    prefix = blocks[: num_groups * shared].view(num_groups, shared).repeat_interleave(G, 0)
    table = torch.cat((prefix, blocks[num_groups * shared :].view(B, own)), 1).contiguous()
    L = prompt + OWN
    k, v = torch.randn(2, B, L, K, DH, device=DEVICE).to(dtype)
    for x in (k, v):
        x[:, :prompt] = x[::G, :prompt].repeat_interleave(G, 0)
    keys, values = layout.allocate(len(blocks))
    p = torch.arange(L, device=DEVICE)
    slots = table[:, p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE  # (B, L)
    write_kv(
        layout,
        keys,
        values,
        k[::G, :prompt].flatten(0, 1),
        v[::G, :prompt].flatten(0, 1),
        slots[::G, :prompt].flatten(),
    )
    write_kv(
        layout,
        keys,
        values,
        k[:, prompt:].flatten(0, 1),
        v[:, prompt:].flatten(0, 1),
        slots[:, prompt:].flatten(),
    )
    plan = DecodePlan(
        table,
        torch.full((B,), L, dtype=torch.int32, device=DEVICE),
        torch.arange(0, B + 1, G, dtype=torch.int32, device=DEVICE),
        torch.full((num_groups,), shared, dtype=torch.int32, device=DEVICE),
    )
    q = torch.randn(B, H, DH, device=DEVICE).to(dtype)
    last = slots[:, -1].contiguous()
    dense = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return layout, keys, values, plan, q, last, dense


def attention_rows(prompt: int, name: str, bandwidth: float):
    dtype = DTYPES[name]
    layers = [make_layer(prompt, dtype) for _ in range(NUM_LAYERS)]
    mask = torch.zeros(B, 1, 1, prompt + OWN, dtype=dtype, device=DEVICE)

    def paged(layer, share=True):
        layout, keys, values, plan, q, *_ = layer
        if not share:
            plan = DecodePlan(
                plan.block_table,
                plan.context_lens,
                plan.group_starts,
                0 * plan.shared_blocks,
                workspace=plan.workspace,
            )
        return lambda: paged_attention(q, layout, keys, values, plan)

    def dense(layer):
        *_, q, _, (k, v) = layer
        return lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, mask, enable_gqa=True)

    def write(layer):
        layout, keys, values, _, q, last, _ = layer
        k = q[:, :K].contiguous()
        return lambda: write_kv(layout, keys, values, k, k, last)

    error = (paged(layers[0])() - dense(layers[0])()[:, :, 0]).abs().max().item()
    assert error < 0.05, f"paged and dense attention differ by {error}"
    element = dtype.itemsize
    num_bytes = 2 * K * DH * element * (B * OWN + B // G * prompt)
    flop = 4 * H * DH * B * (prompt + OWN)
    shape = f"B={B} G={G} H={H} K={K} Dh={DH} prompt={prompt} own={OWN} {name}"
    measured = {
        "cascade": median_ms([paged(x) for x in layers]),
        "not shared": median_ms([paged(x, share=False) for x in layers]),
        "dense SDPA": median_ms([dense(x) for x in layers]),
        "write_kv": median_ms([write(x) for x in layers]),
        "floor": 1e3 * num_bytes / bandwidth,
    }
    rows = [(shape, variant, "time", ms, "ms") for variant, ms in measured.items()]
    rows.append((shape, "cascade", "rate", flop / measured["cascade"] / 1e6, "GFLOP/s"))
    return rows


def sampling_rows(V: int, name: str, bandwidth: float):
    logits = (3 * torch.randn(B, V, device=DEVICE)).to(DTYPES[name])
    u = torch.rand(B, dtype=torch.float64, device=DEVICE)

    def with_logprob(tokens):
        return logits.float().log_softmax(-1).gather(1, tokens)

    def multinomial():
        return with_logprob(torch.multinomial(logits.float().softmax(-1), 1))

    def race():
        p = logits.float().softmax(-1)
        return with_logprob((p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))

    calls = {
        "sample": lambda: sample(logits, u),
        "with entropy": lambda: sample(logits, u, return_entropy=True),
        "top_k=50": lambda: sample(logits, u, top_k=50),
        "top_p=0.95": lambda: sample(logits, u, top_p=0.95),
        "multinomial": multinomial,
        "exponential race": race,
    }
    shape = f"B={B} V={V} {name}"
    rows = [(shape, n, "time", median_ms([call], 10), "ms") for n, call in calls.items()]
    return [*rows, (shape, "floor", "time", 1e3 * logits.nbytes / bandwidth, "ms")]


def main() -> None:
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    rows = [r for n in DTYPES for prompt in (64, 512) for r in attention_rows(prompt, n, bandwidth)]
    append_rows("decode", rows)
    sampling = [r for n in DTYPES for r in sampling_rows(16384, n, bandwidth)]
    append_rows("sample", sampling)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print_table(
        ["shape", "variant", "value", "unit"],
        [[r[0], r[1], f"{r[3]:.4g}", r[4]] for r in rows + sampling],
    )


if __name__ == "__main__":
    main()
