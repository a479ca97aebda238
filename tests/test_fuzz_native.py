"""r1fast._C with arguments that cannot be: a ValueError or TypeError each time, never a crash.

An address cannot be measured, so what is tried on those is what C++ can tell: sizes below 0 or beyond memory, strides that
overlap, addresses of nothing or between elements, contents that point outside. `make test-sanitize` runs this too.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from r1fast import _C
from r1fast.kernels import cpu_attention, cpu_head, sample
from r1fast.rollout.engine import Engine
from r1fast.rollout.native import NativeForward, PackedWeight, is_supported, padded
from r1fast.rollout.sampler import SamplingParams

REFUSED = (ValueError, TypeError)
BAD_SIZES = [-1, -(2**31), -(2**63), 2**47 + 1, 2**62, 2**63 - 1, 2**63, 1.5, None, "4"]
BAD_ADDRESSES = [1, 3, 2**47, 2**48, 2**63, 2**64 - 8, 2**64, -8, 8.0, None, "8"]
BAD_THREADS = [0, -1, -(2**63), 4097, 2**31, 2**32 + 1, 2**62]
BAD_LEVELS = ["", "sse", "AVX2", "avx512 ", "auto\0", None, 2]
R, V, D, T, H, K, DH, S = 5, 24, 32, 6, 4, 2, 16, 3


class Memory:
    """Arguments of a call, and the tensors that they are the addresses of."""

    def __init__(self):
        self.kept = []

    def at(self, x: torch.Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()

    def floats(self, *shape: int) -> int:
        return self.at(torch.rand(*shape))

    def ints(self, values, dtype=torch.int64) -> int:
        return self.at(torch.tensor(values, dtype=dtype))


def head(m: Memory) -> dict:
    words = torch.zeros(_C.head_words(R, V, False) + 16)
    offset = -words.data_ptr() % 64 // 4
    return {
        "e": m.at(words[offset:]), "ld": _C.head_ld(R), "num_rows": R, "vocab_size": V, "bf16": False,
    }  # fmt: skip


def attention(m: Memory) -> dict:
    return {
        "q": m.floats(T, H, DH), "ld_q": H * DH, "k": m.floats(T, K, DH), "ld_k": K * DH,
        "v": m.floats(T, K, DH), "ld_v": K * DH, "bf16": False, "num_heads": H, "num_kv_heads": K,
        "head_dim": DH, "scale": 0.25, "bounds": m.ints([0, 3, 4, 6]), "prefix_of": m.ints([-1, 0, -1]),
        "num_segments": S,
    }  # fmt: skip


def plan(m: Memory) -> dict:
    i32 = torch.int32
    return {
        "block_table": m.ints([[0, 1], [0, 2]], i32), "max_blocks": 2, "tails": 0, "block_size": 16,
        "context_lens": m.ints([20, 18], i32), "query_starts": 0, "group_starts": m.ints([0, 2], i32),
        "shared_blocks": m.ints([1], i32), "num_groups": 1,
    }  # fmt: skip


def rope(m: Memory) -> dict:
    return {
        "ld": (H + 2 * K) * DH, "rotations": m.floats(T, 2 * DH), "q_weight": m.floats(DH),
        "k_weight": m.floats(DH), "eps": 1e-6, "num_tokens": T, "num_heads": H, "num_kv_heads": K,
        "head_dim": DH, "bf16": False,
    }  # fmt: skip


def sampling(m: Memory) -> dict:
    return {
        "logits": m.floats(R, V), "ld": V, "bf16": False, "num_rows": R, "vocab_size": V,
        "u": m.at(torch.rand(R, dtype=torch.float64)), "temperature": m.at(torch.ones(R)),
        "top_k": m.ints([0] * R), "top_p": m.at(torch.ones(R)), "min_p": m.at(torch.zeros(R)),
        "tokens": m.ints([0] * R), "logprobs": m.floats(R), "truncated_logprobs": m.floats(R),
        "is_bad": m.at(torch.zeros(R, dtype=torch.bool)), "row_starts": m.ints([0, 1, 1, 2, 2, 3]),
        "ids": m.ints([0, 5, V - 1]), "penalty": m.floats(3), "bias": m.floats(3), "given": 0,
        "entropies": m.floats(R), "num_top": 2, "top_ids": m.ints([[0, 0]] * R),
        "top_logprobs": m.floats(R, 2),
    }  # fmt: skip


LEVEL, THREADS = {"level": "auto"}, {"num_threads": 2}
BOTH = LEVEL | THREADS
MAP = lambda m: {  # noqa: E731
    "bias": m.floats(V), "target_ids": m.ints([0, -1, 3, V - 1, 2**40]), "anchor": m.floats(R),
    "inv_temperature": 1.0, "softcap": 0.0,
}  # fmt: skip
CALLS = {
    "head_ld": lambda m: {"num_rows": R},
    "head_words": lambda m: {"num_rows": R, "vocab_size": V, "bf16": True},
    "epilogue": lambda m: {
        "z": m.floats(R, V), "ld": V, "bf16": False, "num_rows": R, "vocab_size": V, **MAP(m),
        "s": m.floats(R), "sz": m.floats(R), **BOTH,
    },
    "affine_rows": lambda m: {
        "e": m.floats(R, V), "ld": V, "bf16": False, "num_rows": R, "vocab_size": V,
        "a": m.floats(R), "b": m.floats(R), **BOTH,
    },
    "compact_rows": lambda m: {
        "e": m.floats(R, V), "ld": V, "bf16": False, "vocab_size": V, "kept": m.ints([1, 4]),
        "num_kept": 2, **THREADS,
    },
    "narrow_to_bf16": lambda m: {"x": m.floats(R), "size": R, **THREADS},
    "advise_huge_pages": lambda m: {"memory": m.floats(R), "num_bytes": 4 * R},
    "native_forward": lambda m: {
        "hidden": m.floats(R, D), "ld_hidden": D, "weight": m.floats(V, D), "ld_weight": D, "width": D,
        **head(m), **MAP(m), "s": m.floats(R), "sz": m.floats(R), **BOTH,
    },
    "native_dhidden": lambda m: head(m) | {
        "weight": m.floats(V, D), "ld_weight": D, "width": D, "dhidden": m.floats(R, D), **BOTH,
    },
    "native_dweight": lambda m: head(m) | {
        "x": m.floats(R, D), "ld_x": D, "x_bf16": False, "width": D, "dweight": m.floats(V, D),
        "ld_dweight": D, "accumulate": True, **BOTH,
    },
    "native_dbias": lambda m: head(m) | {
        "x": m.floats(R), "dbias": m.floats(V), "accumulate": False, **BOTH,
    },
    "native_affine": lambda m: head(m) | {"a": m.floats(R), "b": m.floats(R), **BOTH},
    "native_compact": lambda m: head(m) | {"kept": m.ints([0, 2, 4]), "num_kept": 3, **THREADS},
    "attention_forward": lambda m: attention(m) | {
        "out": m.floats(T, H, DH), "wide_out": m.floats(T, H, DH), "m": m.floats(T, H),
        "share": m.floats(T, H), **BOTH,
    },
    "attention_backward": lambda m: attention(m) | {
        "wide_out": m.floats(T, H, DH), "m": m.floats(T, H), "share": m.floats(T, H),
        "dout": m.floats(T, H, DH), "ld_dout": H * DH, "dq": m.floats(T, H, DH),
        "dk": m.floats(T, K, DH), "dv": m.floats(T, K, DH), **BOTH,
    },
    "write_kv": lambda m: {
        "keys": m.floats(3, K, DH, 16), "values": m.floats(3, K, 16, DH), "num_kv_heads": K,
        "head_dim": DH, "bf16": False, "k": m.floats(2, K, DH), "ld_k": K * DH, "v": m.floats(2, K, DH),
        "ld_v": K * DH, "slots": m.ints([0, 40]), "num_tokens": 2, **THREADS,
    },
    "DecodeWorkspace.attend": lambda m: {
        "q": m.floats(2, H, DH), "out": m.floats(2, H, DH), "num_heads": H, "scale": 0.25,
        "keys": m.floats(3, K, DH, 16), "values": m.floats(3, K, 16, DH), "num_kv_heads": K,
        "head_dim": DH, "bf16": False, **plan(m), **BOTH,
    },
    "sample": lambda m: sampling(m) | BOTH,
    "linear_forward": lambda m: {
        "x": m.floats(T, D), "ld_x": D, "num_tokens": T, "weight": m.floats(V, D), "ld_weight": D,
        "num_out": V, "num_in": D, "bias": m.floats(V), "y": m.floats(T, V), **BOTH,
    },
    "linear_forward_bf16": lambda m: {
        "x": m.floats(T, D), "ld_x": D, "num_tokens": T, "weight": m.floats(V, D), "ld_weight": D,
        "num_out": V, "num_in": D, "bias": m.floats(V), "y": m.floats(T, V), **BOTH,
    },
    "linear_dx": lambda m: {
        "dy": m.floats(T, V), "ld_dy": V, "num_tokens": T, "weight": m.floats(V, D), "ld_weight": D,
        "num_out": V, "num_in": D, "dx": m.floats(T, D), **BOTH,
    },
    "linear_dweight": lambda m: {
        "dy": m.floats(T, V), "ld_dy": V, "num_tokens": T, "x": m.floats(T, D), "ld_x": D,
        "num_out": V, "num_in": D, "dweight": m.floats(V, D), **BOTH,
    },
    "norm_forward": lambda m: {
        "x": m.floats(T, D), "ld_x": D, "delta": m.floats(T, D), "ld_delta": D, "weight": m.floats(D),
        "eps": 1e-6, "num_rows": T, "dim": D, "bf16": False, "sum": m.floats(T, D),
        "y": m.floats(T, D), **BOTH,
    },
    "norm_backward": lambda m: {
        "dy": m.floats(T, D), "ld_dy": D, "residual": m.floats(T, D), "ld_residual": D,
        "x": m.floats(T, D), "ld_x": D, "weight": m.floats(D), "eps": 1e-6, "num_rows": T, "dim": D,
        "bf16": False, "dx": m.floats(T, D), "dweight": m.floats(D), **BOTH,
    },
    "rope_forward": lambda m: {
        "qkv": m.floats(T, (H + 2 * K) * DH), **rope(m), "q": m.floats(T, H, DH),
        "k": m.floats(T, K, DH), **BOTH,
    },
    "rope_backward": lambda m: {
        "dq": (m.floats(T, H, DH), H * DH, DH), "dk": (m.floats(T, K, DH), K * DH, DH),
        "dv": (m.floats(T, K, DH), K * DH, DH), "qkv": m.floats(T, (H + 2 * K) * DH), **rope(m),
        "dqkv": m.floats(T, (H + 2 * K) * DH), "dweight": m.floats(2, DH), **BOTH,
    },
    "swiglu_forward": lambda m: {
        "gate_up": m.floats(T, 2 * D), "ld": 2 * D, "num_rows": T, "width": D, "bf16": False,
        "y": m.floats(T, D), **BOTH,
    },
    "swiglu_backward": lambda m: {
        "dy": m.floats(T, D), "ld_dy": D, "gate_up": m.floats(T, 2 * D), "ld": 2 * D, "num_rows": T,
        "width": D, "bf16": False, "dgate_up": m.floats(T, 2 * D), **BOTH,
    },
}  # fmt: skip
# 0 is what is absent
OPTIONAL = {
    "bias", "sz", "wide_out", "prefix_of", "residual", "q_weight", "k_weight", "tails", "query_starts",
    "given", "entropies", "row_starts", "delta",
}  # fmt: skip
BYTES = {"memory", "is_bad"}  # lie anywhere
NATIVE = ("native_", "linear_")  # AVX2 at least
TORN = {
    ("native_forward", "e"),
    ("attention_backward", "wide_out"),
}  # of which 0 means something else


def function(name: str):
    return _C.DecodeWorkspace().attend if name == "DecodeWorkspace.attend" else getattr(_C, name)


def bad_values(name: str, key: str, value) -> list:
    if key == "num_threads":
        return BAD_THREADS
    if key == "level":
        return BAD_LEVELS
    if isinstance(value, tuple):
        return [(bad, *value[1:]) for bad in [0, *BAD_ADDRESSES]] + [
            (value[0], bad, value[2]) for bad in BAD_SIZES
        ]
    if isinstance(value, bool | float):
        return ["x", []]
    if value > 2**20 or key in OPTIONAL:
        absent = key in OPTIONAL or (name, key) in TORN
        bad = BAD_ADDRESSES if key not in BYTES else BAD_ADDRESSES[2:]
        return bad if absent else [0, *bad]
    return BAD_SIZES


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_cannot_be(name):
    if name.startswith(NATIVE) and not cpu_head.supported(torch.float32):
        pytest.skip("needs AVX2")
    memory = Memory()
    good = CALLS[name](memory)
    function(name)(**good)
    for key, value in good.items():
        for bad in bad_values(name, key, value):
            with pytest.raises(REFUSED):
                function(name)(**good | {key: bad})
                pytest.fail(f"{name}({key}={bad!r}) was taken")
    function(name)(**good)


@pytest.mark.parametrize("name", CALLS)
def test_two_arguments_that_cannot_be_together(name):
    """What each alone would be refused for must not hide, or overflow, the other's check."""
    if name.startswith(NATIVE) and not cpu_head.supported(torch.float32):
        pytest.skip("needs AVX2")
    memory, rng = Memory(), random.Random(name)
    good = CALLS[name](memory)
    keys = list(good)
    for _ in range(100):
        changes = {}
        for key in rng.sample(keys, min(len(keys), 2)):
            changes[key] = rng.choice(bad_values(name, key, good[key]))
        with pytest.raises(REFUSED):
            function(name)(**good | changes)
            pytest.fail(f"{name}({changes}) was taken")


CONTENTS = [
    ("attention_forward", "bounds", [[1, 3, 4, 6], [0, 4, 3, 6], [0, -1, 4, 6], [0, 3, 4, 2**62]]),
    ("attention_forward", "prefix_of", [[0, 0, -1], [1, 0, -1], [-1, 0, 1], [-1, 5, -1], [2**40, -1, -1]]),
    ("compact_rows", "kept", [[4, 1], [1, 1], [-1, 1], [-(2**63), 2**62]]),
    ("native_compact", "kept", [[0, 2, 5], [0, 0, 1], [-1, 0, 1], [2, 1, 0]]),
    ("sample", "ids", [[-1, 0, 0], [0, V, 0], [0, 0, 2**62]]),
    ("sample", "row_starts", [[0, 2, 1, 2, 2, 3], [1, 1, 1, 2, 2, 3], [0, 1, 1, 2, 2, 2**62], [0, 0, 0, 0, 0, -1]]),
    ("sample", "given", [[0, 0, 0, 0, V], [-1, 0, 0, 0, 0], [2**62] * 5]),
    ("DecodeWorkspace.attend", "context_lens", [[33, 18], [-1, 18], [20, 2**31 - 1], [15, 18]]),
    ("DecodeWorkspace.attend", "group_starts", [[1, 2], [0, -1], [2, 0]]),
    ("DecodeWorkspace.attend", "shared_blocks", [[-1], [2], [2**31 - 1]]),
    ("DecodeWorkspace.attend", "block_table", [[[0, -1], [0, 2]], [[-5, 1], [0, 2]]]),
    ("DecodeWorkspace.attend", "query_starts", [[0, 2, 1], [1, 1, 2], [0, -3, 2]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "wrong"), CONTENTS)
def test_contents_that_point_outside(name, key, wrong):
    if name.startswith(NATIVE) and not cpu_head.supported(torch.float32):
        pytest.skip("needs AVX2")
    memory = Memory()
    good = CALLS[name](memory)
    dtype = torch.int32 if name.startswith("Decode") else torch.int64
    for values in wrong:
        with pytest.raises(ValueError, match=r"."):
            function(name)(**good | {key: memory.ints(values, dtype)})
            pytest.fail(f"{name}({key}={values}) was taken")


@pytest.mark.parametrize("changes", [
    {"num_heads": 3}, {"num_kv_heads": 3}, {"num_kv_heads": 8}, {"head_dim": 0}, {"num_heads": 0},
])  # fmt: skip
@pytest.mark.parametrize("name", ["attention_forward", "DecodeWorkspace.attend", "rope_forward"])
def test_heads_that_do_not_divide(name, changes):
    if name == "rope_forward" and changes == {"num_heads": 3}:
        pytest.skip("each head is rotated by itself")
    good = CALLS[name](memory := Memory())
    if name == "rope_forward" and changes == {"num_kv_heads": 3}:
        changes = {"head_dim": 15}
    with pytest.raises(ValueError, match=r"must be|cannot"):
        function(name)(**good | changes)
    assert memory.kept


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "u", "logits"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0, 1e38, -0.0])
def test_numbers_that_no_sampler_should_see_draw_a_token_or_a_bad_row(name, value):
    memory = Memory()
    good = CALLS["sample"](memory)
    dtype = torch.float64 if name == "u" else torch.float32
    shape = (R, V) if name == "logits" else (R,)
    _C.sample(**good | {name: memory.at(torch.full(shape, value, dtype=dtype))})
    tokens = memory.kept[[x.data_ptr() for x in memory.kept].index(good["tokens"])]
    assert ((tokens >= 0) & (tokens < V)).all()


# ---- arrays


ints = st.integers(-(2**63), 2**64)
small = st.integers(-3, 40)
anything = st.one_of(
    st.none(), st.text(max_size=3), st.floats(), st.booleans(), ints,
    st.lists(st.one_of(small, ints, st.floats(), st.none(), st.text(max_size=2)), max_size=5),
    st.sampled_from([
        np.ones((2, 2), np.int64), np.array([1.5]), np.array([True]), np.array(["a"]), np.array(3),
        np.array([2**64 - 1], np.uint64), np.array([2**40]), np.array([1 + 2j]), np.array([], object),
        np.arange(10)[::-2], np.array([np.nan]), np.zeros(3, "datetime64[s]"), b"12", {}, {1, 2}, object(),
    ]),
)  # fmt: skip


@given(anything, anything, anything, anything)
def test_packing_takes_or_refuses(lengths, budget, ranks, costs):
    for call in (
        lambda: _C.pack(lengths, budget),
        lambda: _C.pack_flat(lengths, budget),
        lambda: _C.lower_bound(lengths, budget),
        lambda: _C.pack_balanced(lengths, budget, ranks, costs),
        lambda: _C.pack_groups(lengths, costs, budget, 1.0, ranks),
    ):
        try:
            call()
        except REFUSED:
            pass


@given(st.lists(small, max_size=6), small, st.sampled_from([1, 7, 2**20, 2**20 + 1, 2**40, 2**62]))
def test_a_number_of_ranks_is_bounded(lengths, budget, ranks):
    """Each rank has a list: 2**40 of them would be all the memory there is."""
    ok = budget > 0 and all(0 < n <= budget for n in lengths) and ranks <= 2**20
    if ok and ranks > 7:
        return
    try:
        assert len(_C.pack_balanced(lengths, budget, ranks)) == ranks
        assert ok
    except ValueError:
        assert not ok


@given(st.tuples(ints, ints, ints, ints))
def test_an_allocator_of_sizes_that_cannot_be(sizes):
    try:
        allocator = _C.BlockAllocator(*sizes)
    except REFUSED:
        return
    assert allocator.num_blocks == sizes[0]


ACTIONS = ["allocate", "share", "free", "lookup", "insert", "reset", "holders"]


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), anything, anything), max_size=30))
def test_an_allocator_survives_any_calls(actions):
    allocator = _C.BlockAllocator(6, 2)
    held = allocator.allocate(2)
    for name, a, b in actions:
        arguments = {"reset": [], "insert": [a, b]}.get(name, [a])
        try:
            getattr(allocator, name)(*arguments)
        except REFUSED:
            pass
        assert allocator.num_used + allocator.num_available == 6
    allocator.reset()
    assert 0 <= allocator.num_used <= 6
    assert len(held) == 2


@pytest.mark.parametrize("wrong", [
    [2**32], [-(2**32)], [2**63 - 1], [1.0], [0.5], [np.nan], ["0"], [None], [[0]], 0, None, [True],
    np.array([2**64 - 1], np.uint64), np.array([2**32], np.int64),
])  # fmt: skip
def test_no_block_is_rounded_or_wrapped_around(wrong):
    allocator = _C.BlockAllocator(4, 2)
    allocator.allocate(1)
    for call in (allocator.share, allocator.free, allocator.lookup):
        with pytest.raises(REFUSED):
            call(wrong)
    assert allocator.holders(0) == 1


def make_tails(num_slots: int = 3):
    allocator = _C.BlockAllocator(8, 16)
    tails = _C.Tails(allocator, num_slots, K, DH, 4)
    keys, values = torch.zeros(2, 8, K, DH, 16)
    tails.add_layer(keys.data_ptr(), values.data_ptr())
    return tails, (keys, values)


@given(
    st.lists(st.integers(-2, 4), max_size=4), st.lists(st.integers(-2, 40), max_size=4),
    st.lists(st.integers(-2, 4), max_size=4), st.integers(0, 3),
)  # fmt: skip
def test_tails_take_or_refuse_any_arrays(slots, length, num_blocks, width):
    tails, memory = make_tails()
    slots, length, num_blocks = (np.array(x, np.int64) for x in (slots, length, num_blocks))
    blocks = np.zeros((len(length), width), np.int32)
    for _ in range(3):
        for call in (
            lambda: tails.missing(slots, length, num_blocks),
            lambda: tails.grow(slots, length, blocks, num_blocks),
        ):
            try:
                call()
            except REFUSED:
                pass
    assert len(memory) == 2


@pytest.mark.parametrize("changes", [
    {"slots": np.array([[0]])}, {"slots": np.array([0], np.int32)}, {"slots": [0]},
    {"length": np.array([1, 1, 1], np.int32)}, {"length": np.ones((3, 1), np.int64)},
    {"length": np.ones(6, np.int64)[::2]}, {"blocks": np.zeros(3, np.int32)},
    {"blocks": np.zeros((2, 2), np.int32)}, {"num_blocks": np.zeros(2, np.int64)}, {"blocks": None},
])  # fmt: skip
def test_tails_refuse_arrays_of_another_type_or_shape(changes):
    tails, _memory = make_tails()
    good = {
        "slots": np.array([0]), "length": np.ones(3, np.int64), "blocks": np.zeros((3, 2), np.int32),
        "num_blocks": np.zeros(3, np.int64),
    }  # fmt: skip
    with pytest.raises(REFUSED):
        tails.grow(**good | changes)
    good["num_blocks"].flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        tails.grow(**good)


@pytest.mark.parametrize("sizes", [
    (-1, K, DH, 4), (2**62, K, DH, 4), (3, 0, DH, 4), (3, 2**62, DH, 4), (3, K, -16, 4), (3, K, 2**62, 4),
    (3, K, DH, 0), (3, K, 3, 2), (3, K, DH, 2**62),
])  # fmt: skip
def test_tails_of_sizes_that_cannot_be(sizes):
    with pytest.raises(REFUSED):
        _C.Tails(_C.BlockAllocator(8, 16), *sizes)


# ---- the decoder and its loop


needs_native = pytest.mark.skipif(not is_supported(tiny_model()), reason="needs AVX2")


@needs_native
def test_packed_weights_refuse_what_cannot_be():
    weight = torch.rand(V, D)
    packed = PackedWeight(weight).packed
    make = type(packed)
    for changes in ({0: 0}, {0: 3}, {1: -1}, {1: 2**62}, {2: 2}, {3: 0}, {3: -1}, {3: 2**62},
                    {4: 0}, {4: 2**62}, {6: 0}, {6: 2**40}):  # fmt: skip
        arguments = [weight.data_ptr(), D, 0, V, D, False, 1]
        for place, bad in changes.items():
            arguments[place] = bad
        with pytest.raises(ValueError, match=r"must be|cannot|fit"):
            make(*arguments)
    with pytest.raises(ValueError, match="even num_out"):
        make(weight.data_ptr(), D, 0, V - 1, D, True, 1)
    x, y = padded(R, D, torch.float32), torch.empty(R, V)
    good = [x.data_ptr(), D, R, y.data_ptr(), V, _C.After.store, True, 1]
    packed.run(*good)
    for place, bad in ((0, 0), (0, 2), (1, -1), (1, 2**62), (2, -1), (2, 2**62), (3, 0), (4, V - 1),
                       (4, -1), (5, _C.After.silu), (7, 0)):  # fmt: skip
        arguments = list(good)
        arguments[place] = bad
        with pytest.raises(ValueError, match=r"."):
            packed.run(*arguments)


@needs_native
@pytest.mark.parametrize("kind", ["PackedLinear", "Decoder"])
def test_instructions_that_this_cpu_lacks_are_refused(kind):
    weight = torch.rand(64, 64)
    for suffix in ("F32", "BF16", "AMX", "F32AVX2", "BF16AVX2"):
        make = getattr(_C, kind + suffix)
        arguments = [weight.data_ptr(), 64, 0, 32, 32, False, 1]
        if kind == "Decoder":
            arguments = [32, 2, 1, 16, 32, 1e-6, weight.data_ptr(), 64, weight.data_ptr()]
        try:
            make(*arguments)
        except ValueError as error:
            assert "instructions" in str(error)


@needs_native
def test_a_decoder_refuses_weights_that_do_not_fit():
    def linear(n, d, halved=False):
        return PackedWeight(torch.rand(n, d), halved=halved).packed

    ones, cache = torch.ones(D), torch.zeros(2, 8, K, DH, 16)
    kind = type(linear(V, D)).__name__.replace("PackedLinear", "Decoder")
    at = ones.data_ptr()
    good = [D, H, K, DH, 48, 1e-6, torch.rand(V, D).data_ptr(), D, at]
    for place, bads in ((0, (0, -1, 2**62)), (1, (0, 3, 2**62)), (2, (0, 3, 8)), (3, (0, 15, 1026)),
                        (4, (0, -1)), (6, (0, 2)), (7, (D - 1, -1)), (8, (0, 3))):  # fmt: skip
        for bad in bads:
            with pytest.raises(ValueError, match=r"."):
                getattr(_C, kind)(*[bad if i == place else x for i, x in enumerate(good)])
    decoder = getattr(_C, kind)(*good)
    weights = [linear((H + 2 * K) * DH, D), linear(D, H * DH), linear(96, D, True), linear(D, 48)]
    layer = [at, at, at, at, *weights, cache[0].data_ptr(), cache[1].data_ptr()]
    decoder.add_layer(*layer)
    wrong = [linear(V, D), linear(D, D), linear(96, D), linear(D, 96)]
    for i, weight in enumerate(wrong, 4):
        with pytest.raises(ValueError, match="must be a weight of"):
            decoder.add_layer(*layer[:i], weight, *layer[i + 1 :])
    for i in (0, 1, 3, 8, 9):
        with pytest.raises(ValueError, match=r"cannot lie|both of q and k"):
            decoder.add_layer(*layer[:i], 0, *layer[i + 1 :])
    with pytest.raises(ValueError, match="the head must be"):
        loop = getattr(_C, kind.replace("Decoder", "DecodeLoop"))
        loop(decoder, linear(V, D), V + 1)


@needs_native
def test_a_decode_loop_refuses_rows_that_point_outside(monkeypatch):
    calls = []
    plain = NativeForward.decode

    def decode(self, rows, max_steps):
        real = self.loop

        class Spy:
            def run(self, *arguments):
                if not calls:
                    calls.append(arguments)
                    check_loop(real, list(arguments))
                return real.run(*arguments)

        self.loop = Spy()
        try:
            return plain(self, rows, max_steps)
        finally:
            self.loop = real

    monkeypatch.setattr(NativeForward, "decode", decode)
    engine = Engine(tiny_model(), [3], max_batch_size=4)
    engine.add([5, 6, 7], [1, 2], SamplingParams(max_tokens=20, ignore_eos=True), stream=False)
    while engine.has_work:
        engine.step(8)
    assert calls


NAMES = (
    "tokens logprobs truncated entropies blocks tails length num_blocks prompt_length limit seed temperature top_k "
    "top_p min_p ignore_eos stop_ids is_eos slots group_starts shared_blocks allocator rotations max_steps "
    "max_seconds num_threads"
).split()


def check_loop(loop, arguments: list) -> None:
    good = dict(zip(NAMES, arguments, strict=True))
    slot = int(good["slots"][0])

    def with_value(name, value, at=slot):
        x = good[name].copy()
        x[at] = value
        return {name: x}

    wrong = [
        {"slots": np.array([len(good["length"])])}, {"slots": np.array([-1])},
        {"slots": good["slots"][[0, 0]]}, {"slots": good["slots"][:1]}, {"slots": good["slots"].astype(np.int32)},
        with_value("length", 0), with_value("length", good["tokens"].shape[1]), with_value("length", 2**62),
        with_value("length", -(2**62)), with_value("prompt_length", -1), with_value("prompt_length", 2**62),
        with_value("num_blocks", -1), with_value("num_blocks", 2**62),
        with_value("tokens", -1), with_value("tokens", 2**62), with_value("blocks", -7), with_value("blocks", 2**30),
        {"group_starts": np.array([0, 1], np.int32)}, {"group_starts": np.array([0, 5], np.int32)},
        {"group_starts": np.array([1, 2], np.int32)}, {"shared_blocks": np.array([5], np.int32)},
        {"shared_blocks": np.array([-1], np.int32)}, {"shared_blocks": np.array([0, 0], np.int32)},
        {"is_eos": good["is_eos"][:-1]}, {"stop_ids": np.zeros(4, np.int64)}, {"seed": good["seed"][:2]},
        {"temperature": good["temperature"].astype(np.float64)}, {"top_k": good["top_k"][::2]},
        {"tokens": good["tokens"][:, ::2]}, {"tokens": good["tokens"][0]}, {"logprobs": good["logprobs"][:, :4].copy()},
        {"blocks": good["blocks"][:, :0].copy()}, {"blocks": good["blocks"][:2].copy()}, {"rotations": 0}, {"rotations": 2},
        {"max_steps": 0}, {"max_steps": -1}, {"max_steps": 2**62}, {"num_threads": 0}, {"num_threads": 2**40},
        {"allocator": None}, {"tokens": None},
    ]  # fmt: skip
    before = {k: v.copy() for k, v in good.items() if isinstance(v, np.ndarray)}
    for changes in wrong:
        if good["tails"] is not None and {"num_blocks", "blocks"} & changes.keys():
            continue  # rows on their own need no block
        with pytest.raises(REFUSED):
            loop.run(*(good | changes).values())
            pytest.fail(f"a decode loop took {changes}")
    readonly = good["tokens"].copy()
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        loop.run(*(good | {"tokens": readonly}).values())
    for name, x in before.items():
        assert np.array_equal(good[name], x, equal_nan=x.dtype.kind == "f"), name


# ---- tensors of any shape, through the functions that know shapes


sizes = st.integers(0, 5)


@given(st.lists(sizes, min_size=3, max_size=3), st.lists(sizes, min_size=3, max_size=3),
       st.lists(st.integers(-1, 6), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))  # fmt: skip
def test_attention_of_any_shapes(q, k, bounds, dtype):
    try:
        segments = cpu_attention.plan_segments(bounds)
        out = cpu_attention.native_attention(
            torch.rand(*q, dtype=dtype),
            torch.rand(*k).to(dtype),
            torch.rand(*k).to(dtype),
            segments,
        )
        assert out.shape == tuple(q)
    except (AssertionError, ZeroDivisionError, IndexError, *REFUSED):
        pass


@given(st.lists(sizes, min_size=2, max_size=2), st.lists(sizes, min_size=2, max_size=2), sizes,
       st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))  # fmt: skip
def test_the_head_of_any_shapes(hidden, weight, rows, targets):
    if not cpu_head.supported(torch.float32):
        return
    try:
        s, _, _ = cpu_head.forward(
            torch.rand(*hidden), torch.rand(*weight), None, torch.tensor(targets, dtype=torch.int64),
            torch.zeros(rows), inv_temperature=1.0, softcap=None, keep=True, want_sz=True,
        )  # fmt: skip
        assert s.isfinite().all()
    except (AssertionError, *REFUSED):
        pass


@given(
    st.integers(0, 4),
    st.integers(0, 40),
    st.floats(),
    st.integers(-2, 50),
    st.floats(),
    st.integers(-1, 50),
)
def test_sampling_with_any_parameters(rows, vocab, temperature, top_k, top_p, num_top):
    logits, u = torch.randn(rows, vocab), torch.rand(rows, dtype=torch.float64)
    try:
        drawn = sample.sample(
            logits, u, temperature=temperature, top_k=top_k, top_p=top_p, num_top=num_top
        )
    except REFUSED:
        return
    assert ((drawn.tokens >= 0) & (drawn.tokens < vocab)).all()
