"""Decode attention over the paged cache against float64; NaN wherever no query may look."""

import importlib.machinery
import sys
import types
from dataclasses import replace

import pytest
import torch
from numerics import assert_accurate

from r1fast.kernels.paged_attention import (
    DecodePlan,
    PagedLayout,
    copy_blocks,
    paged_attention,
    paged_attention_native,
    paged_attention_ref,
    read_kv,
    write_kv,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (contexts of each group's sequences, blocks they share), queries of each sequence
STEPS = {
    "one position": ([([1], 0)], None),
    "around a block": ([([15, 16, 17], 0), ([31, 32, 33], 1)], None),
    "around a strip": ([([63, 64, 65, 129], 3), ([64, 127, 128], 4), ([130, 200], 8)], None),
    "own part empty but for one": ([([65, 65, 65, 65, 65], 4)], None),
    "chunks": ([([513, 1023, 600, 1025], 32), ([512], 0), ([40], 0)], None),
    "many queries": ([([70, 90, 3], 0), ([20], 0)], [5, 90, 1, 0]),
    "drafts of a group": ([([80, 81, 100], 4)], [3, 1, 4]),
}


class Step:
    """A cache with NaN in every slot that no sequence owns, and one step's plan."""

    def __init__(self, groups, queries, H, K, Dh, dtype, kind="tiled", block_size=16, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.layout = PagedLayout(K, Dh, block_size, dtype, kind=kind)
        contexts = [c for cs, _ in groups for c in cs]
        need = [-(-c // block_size) for c in contexts]
        num_blocks = sum(need) + 3
        free = torch.randperm(num_blocks, generator=g).tolist()
        table = torch.full((len(contexts), max(need) + 1), num_blocks + 7, dtype=torch.int32)
        self.keys, self.values = self.layout.allocate(num_blocks)
        self.keys.fill_(torch.nan)
        self.values.fill_(torch.nan)
        row = 0
        for cs, shared in groups:
            prefix = [free.pop() for _ in range(shared)]
            for i, c in enumerate(cs):
                own = [free.pop() for _ in range(-(-c // block_size) - shared)]
                table[row, : len(prefix) + len(own)] = torch.tensor(prefix + own)
                p = torch.arange(shared * block_size if i else 0, c)
                slots = table[row, p // block_size].long() * block_size + p % block_size
                k, v = (torch.randn(len(p), K, Dh, generator=g).to(dtype) for _ in range(2))
                write_kv(self.layout, self.keys, self.values, k, v, slots)
                row += 1
        sizes = torch.tensor([len(cs) for cs, _ in groups])
        starts = torch.cat((torch.zeros(1), sizes.cumsum(0))).int()
        counts = torch.ones(row) if queries is None else torch.tensor(queries)
        query_starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
        self.plan = DecodePlan(
            table,
            torch.tensor(contexts).int(),
            starts,
            torch.tensor([s for _, s in groups]).int(),
            None if queries is None else query_starts,
        )
        self.q = torch.randn(int(query_starts[-1]), H, Dh, generator=g).to(dtype)

    def to(self, device):
        tensors = {k: v.to(device) for k, v in vars(self.plan).items() if torch.is_tensor(v)}
        self.plan = replace(self.plan, **tensors)
        self.layout = replace(self.layout, device=device)
        self.q, self.keys, self.values = (x.to(device) for x in (self.q, self.keys, self.values))
        return self

    def run(self, **options):
        return paged_attention(self.q, self.layout, self.keys, self.values, self.plan, **options)

    def reference(self, dtype, **options):
        return paged_attention_ref(
            self.q.to(dtype), self.layout, self.keys, self.values, self.plan, **options
        )

    def check(self, out):
        exact = self.reference(torch.float64)
        assert_accurate("out", out, self.reference(self.q.dtype), exact)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K"), [(8, 2), (7, 1), (3, 3)])
def test_against_float64(step, dtype, H, K):
    s = Step(*STEPS[step], H, K, 64, DTYPES[dtype])
    s.check(s.run())


@pytest.mark.parametrize("head_dim", [2, 6, 16, 32, 34, 40, 48, 64, 80, 96, 112, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_head_dims_and_instruction_sets(head_dim, dtype, level):
    s = Step(*STEPS["around a strip"], 5, 1, head_dim, DTYPES[dtype])
    out = torch.full_like(s.q, torch.nan)
    try:
        paged_attention_native(s.q, s.layout, s.keys, s.values, s.plan, head_dim**-0.5, out, level)
    except ValueError:
        pytest.skip(f"this CPU has no {level}")
    s.check(out)


def test_unknown_level_is_refused():
    s = Step(*STEPS["one position"], 2, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="level must be auto, baseline"):
        paged_attention_native(s.q, s.layout, s.keys, s.values, s.plan, 1.0, s.q, "sse9")


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_context(dtype):
    s = Step([([20011], 0), ([20480, 20481], 1279)], None, 4, 1, 64, DTYPES[dtype])
    s.check(s.run())


@pytest.mark.parametrize("block_size", [32, 64])
def test_larger_blocks(block_size):
    s = Step(
        [([100, 140], 64 // block_size), ([31], 0)],
        None,
        4,
        2,
        32,
        torch.float32,
        block_size=block_size,
    )
    s.check(s.run())


def test_scale_and_output():
    s = Step(*STEPS["around a block"], 4, 2, 32, torch.float32)
    out = torch.empty_like(s.q)
    assert s.run(scale=0.3, out=out) is out
    assert_accurate(
        "out", out, s.reference(torch.float32, scale=0.3), s.reference(torch.float64, scale=0.3)
    )


def test_large_scores_do_not_overflow():
    s = Step(*STEPS["chunks"], 4, 1, 64, torch.float32)
    s.q *= 100
    exact = s.reference(torch.float64)
    assert_accurate("out", s.run(), s.reference(torch.float32), exact, floor=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_batch_mates_sharing_and_threads_change_no_bit(step, dtype):
    groups, queries = STEPS[step]
    s = Step(groups, queries, 8, 2, 64, DTYPES[dtype])
    together = s.run()
    plan, B = s.plan, len(s.plan.context_lens)
    no_sharing = DecodePlan(
        plan.block_table,
        plan.context_lens,
        plan.group_starts,
        0 * plan.shared_blocks,
        plan.query_starts,
    )
    assert torch.equal(paged_attention(s.q, s.layout, s.keys, s.values, no_sharing), together)
    num_threads = torch.get_num_threads()
    try:
        for n in (1, 3, 16):
            torch.set_num_threads(n)
            assert torch.equal(s.run(), together)
    finally:
        torch.set_num_threads(num_threads)
    starts = list(range(B + 1)) if queries is None else plan.query_starts.tolist()
    one = torch.tensor([0, 1], dtype=torch.int32)
    for i in range(B):
        n = starts[i + 1] - starts[i]
        alone = DecodePlan(
            plan.block_table[i : i + 1], plan.context_lens[i : i + 1], one, one[:1],
            torch.tensor([0, n], dtype=torch.int32),
        )  # fmt: skip
        rows = slice(starts[i], starts[i + 1])
        out = paged_attention(s.q[rows], s.layout, s.keys, s.values, alone)
        assert torch.equal(out, together[rows])


def test_a_draft_sees_what_plain_decoding_sees():
    """Query j of n is bit for bit the decoding step at its position."""
    s = Step([([200], 0)], [200], 4, 2, 64, torch.float32)
    chunk = s.run()
    one = torch.tensor([0, 1], dtype=torch.int32)
    for position in (0, 15, 16, 63, 64, 130, 199):
        plan = DecodePlan(s.plan.block_table, torch.tensor([position + 1]).int(), one, one[:1])
        q = s.q[position : position + 1]
        assert torch.equal(paged_attention(q, s.layout, s.keys, s.values, plan)[0], chunk[position])


def test_nothing_in_sight_gives_zeros():
    s = Step(*STEPS["around a block"], 4, 2, 32, torch.float32)
    want = s.run()
    s.plan.context_lens[2] = 0
    out = s.run()
    assert (out[2] == 0).all()
    assert torch.equal(out[:2], want[:2])
    assert torch.equal(out[3:], want[3:])


def test_a_nan_in_one_sequence_stays_there():
    s = Step([([70, 90], 4), ([30], 0)], None, 4, 2, 32, torch.float32)
    clean = s.run()
    slot = int(s.plan.block_table[1, 5]) * 16 + 3  # position 83
    nan = torch.full((1, 2, 32), torch.nan)
    write_kv(s.layout, s.keys, s.values, nan, nan, torch.tensor([slot]))
    dirty = s.run()
    assert dirty[1].isnan().all()
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])


def test_the_workspace_is_kept_and_grows():
    s = Step(*STEPS["chunks"], 8, 2, 64, torch.float32)
    small = DecodePlan(
        s.plan.block_table[:1],
        s.plan.context_lens[:1],
        torch.tensor([0, 1]).int(),
        torch.tensor([0]).int(),
    )
    paged_attention(s.q[:1], s.layout, s.keys, s.values, small)
    s.plan.workspace = small.workspace
    s.check(s.run())
    s.check(s.run())
    assert s.plan.workspace is small.workspace


@pytest.mark.parametrize("kind", ["tiled", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_keeps_what_is_written(kind, dtype):
    layout = PagedLayout(3, 10, 16, DTYPES[dtype], kind=kind)
    keys, values = layout.allocate(6)
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(40, 3, 10, generator=g).to(DTYPES[dtype]) for _ in range(2))
    slots = torch.randperm(96, generator=g)[:40]
    write_kv(layout, keys, values, k, v, slots)
    for got, want in zip(read_kv(layout, keys, values, slots), (k, v), strict=True):
        assert torch.equal(got, want)
    rest = torch.tensor(sorted(set(range(96)) - set(slots.tolist())))
    for x in read_kv(layout, keys, values, rest):
        assert x.isnan().all(), "a slot that was not written has changed"
    source, target = torch.tensor([0, 4]), torch.tensor([5, 1])
    before = read_kv(layout, keys, values, torch.arange(96))
    copy_blocks(layout, keys, values, source, target)
    after = read_kv(layout, keys, values, torch.arange(96))
    for old, new in zip(before, after, strict=True):
        old, new = (x.unflatten(0, (6, 16)).nan_to_num(9.0) for x in (old, new))
        assert torch.equal(new[target], old[source])
        assert torch.equal(new[[0, 2, 3, 4]], old[[0, 2, 3, 4]])


def test_write_takes_views_and_other_dtypes():
    layout = PagedLayout(2, 16, 16, torch.bfloat16, kind="tiled")
    keys, values = layout.allocate(1)
    qkv = torch.randn(5, 3, 2, 16)  # q, k, v of a fused projection
    slots = torch.arange(5)
    write_kv(layout, keys, values, qkv[:, 1], qkv[:, 2], slots)
    k, v = read_kv(layout, keys, values, slots)
    assert torch.equal(k, qkv[:, 1].bfloat16())
    assert torch.equal(v, qkv[:, 2].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_writes_what_the_reference_writes(dtype, device):
    """Views of a fused projection too; what nobody writes stays."""
    layout = PagedLayout(3, 10, 16, DTYPES[dtype], device, kind="rows")
    qkv = torch.randn(40, 8, 10, device=device).to(layout.dtype)
    k, v = qkv[:, 2:5], qkv[:, 5:]
    slots = torch.randperm(64, device=device)[:40]
    caches = [layout.allocate(4) for _ in range(2)]
    for (keys, values), backend in zip(caches, ("torch", "triton"), strict=True):
        keys.fill_(torch.nan)
        values.fill_(torch.nan)
        write_kv(layout, keys, values, k, v, slots, backend=backend)
    for actual, expected in zip(*caches, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_bytes_are_those_of_the_tokens():
    for dtype in DTYPES.values():
        layout = PagedLayout(2, 64, 16, dtype)
        keys, values = layout.allocate(4)
        assert keys.nbytes + values.nbytes == 4 * layout.bytes_per_block()
        assert layout.bytes_per_block() == 2 * 16 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"kind": "columns"}, "kind must be"),
        ({"kind": "tiled", "block_size": 8}, "tiled storage is for"),
        ({"kind": "tiled", "dtype": torch.float16}, "tiled storage is for"),
    ],
)
def test_impossible_layouts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PagedLayout(2, 64, **options)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("dtype", "H", "K", "head_dim"), [("bf16", 4, 1, 64), ("fp32", 2, 2, 40)], ids=["bf16", "fp32"]
)
def test_triton_against_float64(step, dtype, H, K, head_dim, device):
    s = Step(*STEPS[step], H, K, head_dim, DTYPES[dtype], kind="rows").to(device)
    s.check(s.run(backend="triton"))


def test_triton_gives_zeros_for_nothing_in_sight(device):
    s = Step(*STEPS["around a block"], 4, 2, 32, torch.float32, kind="rows").to(device)
    s.plan.context_lens[2] = 0
    assert (s.run(backend="triton")[2] == 0).all()


def test_triton_rows_are_independent(device):
    groups, _ = STEPS["chunks"]
    s = Step(groups, None, 4, 2, 64, torch.float32, kind="rows").to(device)
    together = s.run(backend="triton")
    s.keys.fill_(torch.nan)  # all but sequence 4's blocks
    clean = Step(groups, None, 4, 2, 64, torch.float32, kind="rows").to(device)
    own = s.plan.block_table[4, : 512 // 16].long()
    s.keys[own] = clean.keys[own]
    assert torch.equal(s.run(backend="triton")[4], together[4])


@pytest.mark.parametrize(
    ("backend", "kind", "message"),
    [
        ("native", "rows", "native needs the tiled layout"),
        ("triton", "tiled", "triton needs the rows layout"),
        ("flash", "rows", "backend flash needs"),
        ("cudnn", "rows", "backend must be one of"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend, kind, message):
    s = Step(*STEPS["one position"], 2, 1, 16, torch.float32, kind=kind)
    with pytest.raises(ValueError, match=message):
        s.run(backend=backend)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """A stand-in with flash-attn 2's documented signature, layouts and limits; the rest is not to be given."""
    others = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes)
    assert all(x is None for x in others)
    assert (window_size, softcap, num_splits, return_softmax_lse) == ((-1, -1), 0.0, 0, False)
    (B, one, H, Dh), (_, page, K, width) = q.shape, k_cache.shape
    assert (one, width, page % 256, H % K) == (1, Dh, 0, 0)
    assert k_cache.shape == v_cache.shape
    assert q.dtype == k_cache.dtype == v_cache.dtype == torch.bfloat16
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert (cache_seqlens.shape, len(block_table)) == ((B,), B)
    plan = DecodePlan(block_table, cache_seqlens, torch.arange(B + 1).int(), torch.zeros(B).int())
    layout = PagedLayout(K, Dh, page, q.dtype, kind="rows")
    out = paged_attention_ref(q[:, 0], layout, k_cache, v_cache, plan, scale=softmax_scale)
    return out[:, None]


@pytest.fixture
def flash_attn(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def test_flash_attention_takes_the_cache_as_it_lies(flash_attn):
    groups = [([513, 700], 2), ([255], 0), ([1], 0)]
    s = Step(groups, None, 4, 2, 64, torch.bfloat16, kind="rows", block_size=256)
    for scale in (None, 0.3):
        assert torch.equal(s.run(backend="flash", scale=scale), s.run(backend="torch", scale=scale))


@pytest.mark.parametrize(
    ("dtype", "block_size", "queries"),
    [("bf16", 16, None), ("fp32", 256, None), ("bf16", 256, [2])],
)
def test_flash_attention_names_what_it_cannot_take(flash_attn, dtype, block_size, queries):
    s = Step([([40], 0)], queries, 4, 2, 64, DTYPES[dtype], kind="rows", block_size=block_size)
    with pytest.raises(ValueError, match="backend flash needs blocks of a multiple of 256, bfloat"):
        s.run(backend="flash")
