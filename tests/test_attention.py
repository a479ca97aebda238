import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels import attention
from r1fast.kernels.attention import (
    PackedAttention,
    bucketed_attention,
    plan_buckets,
    plan_varlen,
    varlen_attention,
    varlen_attention_ref,
)

LENGTHS = {
    "one token": [1],
    "one sequence": [33],
    "equal lengths": [16, 16, 16],
    "length 1 among others": [1, 40, 1, 1, 39],
    "empty among others": [0, 5, 0, 0, 9, 0],
    "bucket edges": [100, 80, 79, 64, 63, 51, 50, 100],  # 0.8 * 100 joins, 79 does not
    "many short": [5, 9, 7, 6, 8, 5, 3, 10, 9, 8, 7, 2],
    "long tail": [130, 20, 18, 3, 17, 1, 2],
}


def cumulative(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def by_buckets(q, k, v, cu_seqlens, max_seqlen, *, scale=None):
    """PyTorch's, where the CPU takes C++ by itself."""
    return bucketed_attention(q, k, v, plan_buckets(cu_seqlens, device=q.device), scale)


def make_inputs(num_tokens: int, H: int, K: int, Dh: int, device: str) -> list[torch.Tensor]:
    """Random float64 q, k, v and the gradient of the output."""
    torch.manual_seed(0)
    return [
        torch.randn(num_tokens, heads, Dh, dtype=torch.float64, device=device)
        for heads in (H, K, K, H)
    ]


def out_and_grads(op, inputs, lengths, dtype, **kwargs) -> dict[str, torch.Tensor]:
    q, k, v, dout = (x.detach().to(dtype) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = op(q, k, v, cumulative(lengths, q.device), max(lengths), **kwargs)
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("op", [varlen_attention, by_buckets])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("H", "K", "Dh"), [(4, 4, 32), (4, 2, 16), (6, 1, 64)])
def test_varlen_attention_matches_reference(op, lengths, H, K, Dh, device):
    inputs = make_inputs(sum(lengths), H, K, Dh, device)
    actual = out_and_grads(op, inputs, lengths, torch.float32)
    baseline = out_and_grads(varlen_attention_ref, inputs, lengths, torch.float32)
    exact = out_and_grads(varlen_attention_ref, inputs, lengths, torch.float64)
    for name in exact:
        assert actual[name].shape == exact[name].shape
        # flash backward recomputes the softmax from its log-sum-exp, which rounds once more
        slack = 2 if name == "out" else 4
        # where the exact gradient is 0, the rounding of Dh products in each of H heads is left
        # (an H200's kernel takes one more: 1.6e-6 against 1.35e-6 for one token)
        floor = max(1e-6, 2 ** (-22 if device == "cuda" else -23) * (H * Dh) ** 0.5)
        assert_accurate(name, actual[name], baseline[name], exact[name], slack, floor)


@pytest.mark.parametrize("op", [varlen_attention, by_buckets])
def test_bfloat16_and_scale(op, device):
    lengths = LENGTHS["bucket edges"]
    inputs = [x.bfloat16().double() for x in make_inputs(sum(lengths), 4, 2, 64, device)]
    results = [
        out_and_grads(f, inputs, lengths, dtype, scale=0.3)
        for f, dtype in (
            (op, torch.bfloat16),
            (varlen_attention_ref, torch.bfloat16),
            (varlen_attention_ref, torch.float64),
        )
    ]
    for name in results[0]:
        assert_accurate(name, *(result[name] for result in results))


def test_reference_is_dense_attention_with_a_block_mask(device):
    lengths = [3, 0, 5, 1]
    q, k, v, _ = make_inputs(sum(lengths), 4, 2, 8, device)
    out = varlen_attention_ref(q, k, v, cumulative(lengths, device), 5)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    mask = (owner[:, None] == owner) & torch.ones(9, 9, device=device).tril().bool()
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(0, 1))


@pytest.mark.parametrize("op", [varlen_attention, by_buckets])
@pytest.mark.parametrize("poisoned", [0, 2, 5])
def test_nan_stays_in_its_sequence(op, poisoned, device):
    lengths = [9, 10, 8, 10, 9, 3]  # one bucket and a stray
    inputs = [x.float() for x in make_inputs(sum(lengths), 4, 2, 16, device)]
    clean = out_and_grads(op, inputs, lengths, torch.float32)
    start = sum(lengths[:poisoned])
    own = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
    own[start : start + lengths[poisoned]] = True
    for x in inputs:
        x[own] = float("nan")
    dirty = out_and_grads(op, inputs, lengths, torch.float32)
    for name in clean:
        assert dirty[name][own].isnan().any()
        torch.testing.assert_close(dirty[name][~own], clean[name][~own], rtol=0, atol=0)


def test_order_of_the_sequences_does_not_matter(device):
    lengths = [12, 3, 10, 11, 0, 12, 64, 5]
    inputs = make_inputs(sum(lengths), 4, 2, 16, device)
    straight = out_and_grads(varlen_attention, inputs, lengths, torch.float32)
    order = [4, 6, 1, 7, 0, 3, 5, 2]
    tokens = torch.arange(sum(lengths), device=device).split(lengths)
    shuffle = torch.cat([tokens[i] for i in order])
    shuffled = out_and_grads(
        varlen_attention, [x[shuffle] for x in inputs], [lengths[i] for i in order], torch.float32
    )
    for name in straight:
        torch.testing.assert_close(shuffled[name], straight[name][shuffle], rtol=1e-5, atol=1e-6)


def test_plan_holds_every_token_once_and_bounds_the_padding():
    torch.manual_seed(0)
    lengths = torch.randint(0, 90, (300,)).tolist()
    tokens, slots = [], 0
    for bucket in plan_buckets(cumulative(lengths)):
        size = bucket.count * bucket.width
        slots += size
        if bucket.padded_from is None:
            tokens += range(bucket.start, bucket.start + size)
        else:
            torch.testing.assert_close(bucket.padded_from[bucket.slots], bucket.tokens)
            tokens += bucket.tokens.tolist()
            assert len(bucket.padding) + len(bucket.slots) == size
    assert sorted(tokens) == list(range(sum(lengths)))
    assert slots <= sum(lengths) / (1 - attention.MAX_PADDING)
    assert len(plan_buckets(cumulative(lengths))) < 40


def test_equal_lengths_are_one_bucket_without_a_copy():
    (bucket,) = plan_buckets(cumulative([7] * 5))
    assert (bucket.count, bucket.width, bucket.start) == (5, 7, 0)
    assert bucket.padded_from is None


def test_empty_batch(device):
    q = torch.ones(0, 4, 8, device=device, requires_grad=True)
    out = varlen_attention(q, q, q, cumulative([0, 0], device), 0)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 4, 8)


def test_packed_attention_plans_once(device, monkeypatch):
    lengths = [4, 9, 8]
    q, k, v, _ = (x.float() for x in make_inputs(21, 4, 2, 16, device))
    plans = []
    monkeypatch.setattr(
        attention, "plan_varlen", lambda *a: plans.append(plan_varlen(*a)) or plans[-1]
    )
    attend = PackedAttention(cumulative(lengths, device), 9)
    outputs = [attend(layer, q, k, v) for layer in range(3)]
    assert len(plans) == 1
    exact = varlen_attention_ref(*(x.double() for x in (q, k, v)), attend.cu_seqlens, 9)
    for out in outputs:
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_cu_seqlens_must_cover_the_batch():
    q = torch.zeros(6, 2, 8)
    with pytest.raises(AssertionError):
        varlen_attention(q, q, q, cumulative([2, 3]), 3)
