"""Every kernel that ships, compiled for sm_80, sm_90 and sm_100 without a GPU: does it fit the chip?"""

import json
import os
import subprocess
import sys

import aot
import pytest

CASES = aot.cases()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Case id -> what cuobjdump and the PTX say of it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "ignore", aot.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_fits_the_chip(compiled, case):
    result = compiled[case.id]
    assert "error" not in result, result["error"]
    assert result["stack"] <= case.stack, f"spills: {result}"
    assert result["local"] == 0, result
    assert result["registers"] <= 255, result
    assert result["shared"] <= aot.SHARED_LIMIT[case.arch], result
    if case.is_gemm:
        assert result["tensor_core"] > 0, f"no {aot.TENSOR_CORE[case.arch]}: {result}"
        if case.arch == 90 and not case.variant.startswith("fp32") and "-odd" not in case.variant:
            assert result["overlap"] > 0, f"products wait for each other: {result}"
    if "stride_e" in case.multiples_of_16:
        wide = result["wide_stores" if case.is_gemm else "wide_loads"]
        assert wide > 0, f"E is not accessed 16 bytes at a time: {result}"


def test_every_kernel_is_in_the_table():
    listed = {(case.module, case.kernel) for case in CASES}
    assert aot.shipped_kernels() == listed, "kernels/ and the table of tests/aot.py differ"
    assert len({case.id for case in CASES}) == len(CASES)


def test_a_new_kernel_is_found(tmp_path):
    (tmp_path / "new.py").write_text(
        "import triton\n"
        "@triton.jit\ndef _helper(x):\n    return x\n"
        "@triton.jit\ndef _new_kernel(x):\n    return _helper(x)\n"
        "@triton.jit(do_not_specialize=['x'])\ndef _other_kernel(x):\n    return x\n"
        "def launch(x):\n    return _new_kernel[1](x)\n"
    )
    assert aot.shipped_kernels(tmp_path) == {("new", "_new_kernel"), ("new", "_other_kernel")}
