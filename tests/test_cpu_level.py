"""The C++ of every instruction set that this CPU has: chosen by R1FAST_CPU_LEVEL, and alike in every bit."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from numerics import assert_accurate

from r1fast import _C
from r1fast.kernels import cpu_head
from r1fast.rollout.native import padded

LEVELS = ["baseline", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16]
FORWARD = {"avx2": {0: "F32AVX2", 1: "BF16AVX2"}, "avx512": {0: "F32", 1: "BF16"}}
# what runs once more at avx2: forward, decode steps, products, the trainer's steps, the loss, a NaN that must not spread
TESTS = [
    "test_native_forward.py", "test_decode_loop.py", "test_linear.py", "test_golden.py::test_trace[grpo]",
    "test_parity.py::test_bfloat16_has_the_bits_of_the_sampler",
    "test_fused_grpo_loss.py::test_bfloat16_gradients_are_as_good_as_float32_logits[native]",
    "test_score.py::test_logits_that_are_not_finite_are_nan_and_spoil_nothing_else",
]  # fmt: skip
ON_OTHER_CPUS = [{"R1FAST_CPU_LEVEL": "avx2"}, {"R1FAST_CPU_BF16": "0"}]
needs_avx2 = pytest.mark.skipif(not cpu_head.supported(torch.float32), reason="needs AVX2")


def levels(dtype: torch.dtype) -> list[str]:
    """With code for the forward, up to what "auto" is here."""
    best = cpu_head.native_level(dtype).replace("amx", "avx512")
    return LEVELS[1 : LEVELS.index(best) + 1]


def run(code: str, level: str = "", **variables: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: the variables are read once."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"R1FAST_CPU_LEVEL": level} | variables,
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_the_variable_chooses(level):
    code = (
        "from r1fast import _C; from r1fast.kernels.cpu_attention import level\n"
        "print(_C.cpu_level(), level(), _C.native_level(False))"
    )
    done = run(code, level)
    if LEVELS.index(level) > LEVELS.index(_C.cpu_level()):
        pytest.skip(f"{_C.cpu_level()} is the most that this CPU has, or was asked for")
    assert done.stdout.split() == [level] * 3, done.stderr


def test_an_empty_variable_counts_as_unset():
    code = "from r1fast import _C; print(_C.cpu_level())"
    found = [run(code, level) for level in ("", "auto")]
    assert found[0].stdout == found[1].stdout != "", found[0].stderr


@pytest.mark.parametrize("wrong", ["avx9", "AVX2", " "])
def test_a_wrong_value_is_an_error_and_no_silent_fallback(wrong):
    code = "import torch; from r1fast.kernels import cpu_head; cpu_head.supported(torch.float32)"
    done = run(code, wrong)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ValueError: R1FAST_CPU_LEVEL must be auto, baseline, avx2 or avx512")
    assert f"got '{wrong}'" in error


@pytest.mark.parametrize("wrong", ["2", "off", " "])
def test_a_wrong_word_on_bfloat16_is_an_error(wrong):
    done = run("from r1fast import _C; _C.cpu_level()", R1FAST_CPU_BF16=wrong)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error == f"ValueError: R1FAST_CPU_BF16 must be 0 or 1; got '{wrong}'"


@needs_avx2
@pytest.mark.parametrize("cpu", ON_OTHER_CPUS, ids=["avx2", "no bf16"])
def test_forward_loss_and_products_hold_on_other_cpus(cpu):
    if _C.cpu_level() == "avx2":
        pytest.skip("the suite itself runs at avx2")
    if "R1FAST_CPU_BF16" in cpu and not _C.has_avx512_bf16():
        pytest.skip("the suite itself runs without bfloat16's instructions")
    level, tests = cpu.get("R1FAST_CPU_LEVEL", "avx512"), [*TESTS]
    if level == "avx512":
        tests += ["test_cpu_level.py::test_packed_products", "test_cpu_level.py::test_the_head_is_the_same_bits_on_every_level", "test_cpu_level.py::test_a_nan_is_the_same_bits_on_every_level"]  # fmt: skip
    code = (
        "import sys, pytest; from r1fast import _C\n"
        f"assert _C.native_level(False) == _C.native_level(True) == {level!r}\n"
        "assert not _C.has_avx512_bf16() or _C.native_level(True) == 'avx2'\n"
        f"sys.exit(pytest.main({tests!r} + ['-q', '-p', 'no:cacheprovider', '--rootdir=..']))"
    )
    done = run(code, level, **cpu)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


@needs_avx2
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "width", "num_out"),
    [(1, 2, 1), (5, 34, 17), (6, 258, 16), (7, 64, 33), (24, 96, 31), (25, 514, 65), (131, 30, 100)],
)  # fmt: skip
@pytest.mark.parametrize("after", ["store", "add", "silu"])
def test_packed_products(dtype, num_rows, width, num_out, after):
    """Around the tiles of 6 or 8 rows, 16 columns and 128 words: against float64, and the same bits on every level."""
    halved, is_bf16 = after == "silu", dtype == torch.bfloat16
    g = torch.Generator().manual_seed(num_rows)
    weight = torch.randn((1 + halved) * num_out, width, generator=g).to(dtype)
    bias = torch.randn(len(weight), generator=g).to(dtype)
    x, before = (
        padded(num_rows, width, dtype),
        torch.randn(num_rows, num_out, generator=g).to(dtype),
    )
    x[num_rows:] = torch.nan  # no other row's sums
    x[:num_rows, :width] = torch.randn(num_rows, width, generator=g).to(dtype)

    def product(to):
        X, W = x[:num_rows, :width].to(to), weight.to(to)
        if to != torch.float32:
            return X @ W.t()
        # one product after another: PyTorch's on some CPUs are in several sums, which are better than any one
        z = torch.zeros(num_rows, len(W))
        for k in range(width):
            z += X[:, k : k + 1] * W[:, k]
        return z

    def reference(to):
        z = product(to) + bias.to(to)
        if after == "silu":
            gate, up = z.chunk(2, 1)
            return torch.nn.functional.silu(gate) * up
        return z + before.to(to) if after == "add" else z

    found = []
    for level in levels(dtype):
        packed = getattr(_C, "PackedLinear" + FORWARD[level][is_bf16])(
            weight.data_ptr(), width, bias.data_ptr(), *weight.shape, halved, 2
        )
        y = torch.full((num_rows + 1, num_out + 3), 7.0, dtype=dtype)
        y[:num_rows, :num_out] = before
        packed.run(
            x.data_ptr(), x.stride(0), num_rows, y.data_ptr(), y.stride(0),
            getattr(_C.After, after), False, 2,
        )  # fmt: skip
        assert (y[num_rows] == 7).all()
        assert (y[:, num_out:] == 7).all()
        found.append(y[:num_rows, :num_out])
        assert_accurate(level, found[-1], reference(dtype), reference(torch.float64))
    assert all(torch.equal(a, b) for a, b in pairwise(found))


@needs_avx2
def test_a_nan_is_the_same_bits_on_every_level():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1, 1], [inf, 0], [-nan, 1], [inf, -inf]]).bfloat16()
    weight = torch.tensor([[inf, -inf], [1, 1], [nan, 0]]).bfloat16()
    found = []
    for level in levels(torch.bfloat16):
        y = torch.zeros(4, 3, dtype=torch.bfloat16)
        _C.linear_forward_bf16(
            x.data_ptr(), 2, 4, weight.data_ptr(), 2, 3, 2, 0, y.data_ptr(), level, 1
        )
        found.append(y.view(torch.int16))
        assert torch.equal(y.isnan(), (x.float() @ weight.float().t()).isnan())
    assert all(torch.equal(a, b) for a, b in pairwise(found))


@needs_avx2
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "D", "V"), [(77, 66, 1003), (700, 34, 515), (3, 514, 100)])
def test_the_head_is_the_same_bits_on_every_level(dtype, R, D, V):
    """Around the 128 words of bfloat16 that are widened at a time, too."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, D, generator=g).to(dtype)
    weight = (2 * torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    target_ids = torch.randint(-1, V, (R,), generator=g)
    anchor, a, b = (torch.randn(R, generator=g) for _ in range(3))
    found = []
    for level in levels(dtype):
        s, sz, e = cpu_head.forward(
            hidden, weight, None, target_ids, anchor + 8, inv_temperature=0.9, softcap=5.0,
            keep=True, want_sz=True, level=level,
        )  # fmt: skip
        e.affine(a, b)
        dweight, dbias = torch.zeros(V, D), torch.zeros(V)
        e.dweight_(hidden, dweight)
        e.dbias_(a, dbias)
        found.append((s, sz, e.dense(), e.dhidden(weight), dweight, dbias))
    for one, other in pairwise(found):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@needs_avx2
@pytest.mark.parametrize(("T", "D", "N"), [(33, 65, 17), (200, 193, 50), (1200, 40, 100)])
def test_training_products_are_the_same_bits_on_every_level(T, D, N):
    g = torch.Generator().manual_seed(T)
    x, weight, dy = (torch.randn(*s, generator=g) for s in ((T, D), (N, D), (T, N)))
    found = []
    for level in levels(torch.float32):
        y, dx, dweight = torch.empty(T, N), torch.empty(T, D), torch.empty(N, D)
        X, W, DY = ((t.data_ptr(), t.stride(0)) for t in (x, weight, dy))
        _C.linear_forward(*X, T, *W, N, D, 0, y.data_ptr(), level, 2)
        _C.linear_dx(*DY, T, *W, N, D, dx.data_ptr(), level, 2)
        _C.linear_dweight(*DY, T, *X, N, D, dweight.data_ptr(), level, 2)
        found.append((y, dx, dweight))
        exact = (x.double() @ weight.double().t(), dy.double() @ weight.double(), dy.double().t() @ x.double())  # fmt: skip
        for name, actual, double in zip(("y", "dx", "dweight"), found[-1], exact, strict=True):
            assert_accurate(name, actual, double.float(), double, floor=1e-5 * D)
    for one, other in pairwise(found):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
