"""Compiles the Triton kernels of kernels/ ahead of time, with no GPU, and prints what came out.

`cases()` is the table of what ships. Run as a program it compiles all of it and writes one JSON
object to stdout: case id -> registers, stack, local and shared memory, instructions. That has to be a process
of its own: where TRITON_INTERPRET is set, @triton.jit makes no compilable kernel.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # in the PTX


@dataclass(frozen=True)
class Case:
    """One kernel with its constants, on one chip. Arguments that are not named are int32."""

    module: str
    kernel: str
    variant: str
    arch: int
    types: dict[str, str]
    constants: dict[str, object]
    multiples_of_16: tuple[str, ...] = ()  # integers; every pointer is one
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    is_gemm: bool = False
    stack: int = 0  # bytes it may spill

    @property
    def id(self) -> str:
        return f"{self.kernel.strip('_')}-{self.variant}-sm_{self.arch}"


def on_every_chip(*args, **kwargs) -> list[Case]:
    return [Case(*args[:3], arch, *args[3:], **kwargs) for arch in SHARED_LIMIT]


def cases() -> list[Case]:
    return [
        *head_cases(), *head_helper_cases(), *advantages_cases(), *loss_cases(),
        *decode_cases(), *sample_cases(), *block_cases(),
    ]  # fmt: skip


def head_cases() -> list[Case]:
    """Every tile shape, as it usually runs and with all that it can do at once."""
    from r1fast.kernels import triton_head

    found = []
    for (arch, bits), configs in triton_head.CONFIGS.items():
        for config in configs:
            dtype, other = ("fp32", "fp32") if bits == 32 else ("bf16", "fp16")
            found.append(head_case(config, arch, "usual", dtype))
            if config == configs[0]:
                found.append(head_case(config, arch, "entropy", dtype, want_sz=True))
                found.append(head_case(config, arch, "all", other, everything=True))
            if config == configs[-1]:
                found.append(head_case(config, arch, "odd", dtype, everything=True, aligned=False))
    return found


def head_case(config, arch, name, dtype, *, everything=False, want_sz=False, aligned=True) -> Case:
    types = dict.fromkeys(("s_ptr", "sz_ptr", "anchor_ptr"), "*fp32")
    types |= {"target_ptr": "*i64", "inv_temperature": "fp32", "softcap": "fp32"}
    types |= {"bias_ptr": f"*{dtype}", "E_ptr": "*fp32" if dtype == "fp32" else "*bf16"}
    constants = {
        "HAS_BIAS": everything, "SOFTCAP": everything, "KEEP": True,
        "WANT_SZ": want_sz or everything,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "SPLITS": config.splits * (2 if everything else 1),
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K,
    }  # fmt: skip
    multiples = ("stride_e",)
    if config.tma:
        types["hidden_desc"] = f"tensordesc<{dtype}[{config.BLOCK_M}, {config.BLOCK_K}]>"
        types["weight_desc"] = f"tensordesc<{dtype}[{config.BLOCK_N}, {config.BLOCK_K}]>"
    else:
        types |= dict.fromkeys(("hidden_ptr", "weight_ptr"), f"*{dtype}")
        constants |= {"stride_wd": 1, "EVEN_D": aligned}
        multiples += ("stride_h", "stride_wv", "D") if aligned else ()
    shape = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}"
    return Case(
        "triton_head", "_head_fwd_tma_kernel" if config.tma else "_head_fwd_kernel",
        f"{dtype}-{shape}-{name}", arch, types, constants, multiples,
        {"num_warps": config.num_warps, "num_stages": config.num_stages}, is_gemm=True,
    )  # fmt: skip


def head_helper_cases() -> list[Case]:
    found = on_every_chip(
        "triton_head", "_sum_tiles_kernel", "fp32",
        {"parts_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK_R": 32, "BLOCK_T": 64},
    )  # fmt: skip
    for dtype in ("bf16", "fp32"):
        x = f"*{dtype}"
        found += on_every_chip(
            "triton_rows", "_scaled_rows_kernel", dtype,
            {"x_ptr": x, "v_ptr": "*fp32", "out_ptr": x}, {"BLOCK_D": 1024}, ("stride_x", "D"),
        )  # fmt: skip
        found += on_every_chip(
            "triton_rows", "_store_dhidden_kernel", dtype,
            {"out_ptr": "*fp32", "v_ptr": "*fp32", "weight_ptr": x, "at_ptr": "*i64",
             "mine_ptr": "*fp32", "index_ptr": "*i64", "dhidden_ptr": x},
            {"HAS_INDEX": True, "BLOCK_D": 1024}, ("stride_w", "stride_d", "D"),
        )  # fmt: skip
        found += on_every_chip(
            "triton_rows", "_scale_kernel", dtype, {"x_ptr": x, "factor_ptr": "*fp32"},
            {"BLOCK": 8192}, options={"num_warps": 8},
        )  # fmt: skip
        found += on_every_chip(
            "triton_head", "_compact_kernel", dtype, {"E_ptr": f"*{dtype}", "idx_ptr": "*i64"},
            {"BLOCK_R": 8, "BLOCK_V": 256}, ("stride_e",), {"num_warps": 1},
        )  # fmt: skip
        found += on_every_chip(
            "triton_head", "_affine_kernel", dtype,
            {"E_ptr": f"*{dtype}", "a_ptr": "*fp32", "b_ptr": "*fp32"},
            {"BLOCK_V": 1024}, ("stride_e",),
        )  # fmt: skip
        found += on_every_chip(
            "triton_head", "_dbias_kernel", dtype,
            {"E_ptr": f"*{dtype}", "x_ptr": "*fp32", "dbias_ptr": "*fp32"},
            {"ACCUMULATE": True, "BLOCK_R": 32, "BLOCK_V": 128}, ("stride_e",),
        )  # fmt: skip
    return found


def advantages_cases() -> list[Case]:
    found = []
    for dtype, G, scale in (("fp64", 16, "group"), ("fp32", 1024, "group"), ("bf16", 8, "batch")):
        found += on_every_chip(
            "advantages", "_group_advantages_kernel", f"{dtype}-{G}-{scale}",
            {"rewards_ptr": f"*{dtype}", "verdicts_ptr": "*i64", "batch_std_ptr": f"*{dtype}",
             "advantages_ptr": f"*{dtype}"},
            {"SCALE": scale, "SAMPLE": True, "LEAVE_ONE_OUT": True, "HAS_VERDICTS": True,
             "EPS": 1e-4, "BLOCK_N": 1024 // G, "BLOCK_G": G},
        )  # fmt: skip
    return found


def loss_cases() -> list[Case]:
    floats = "logp log_is ref A policy kl dpolicy dpolicy_logp dkl dkl_logp".split()
    types = {f"{name}_ptr": "*fp32" for name in floats} | {"low_ptr": "*i8", "high_ptr": "*i8"}
    numbers = "clip_low clip_high delta dual_clip tau_pos tau_neg".split()
    found = []
    for policy, kl in (("clip", "k3"), ("cispo", "k2"), ("sapo", "k3_unbiased")):
        found += on_every_chip(
            "policy_loss", "_token_loss_kernel", f"{policy}-{kl}",
            types | dict.fromkeys(numbers, "fp32"),
            {"POLICY": policy, "KL": kl, "BLOCK_T": 512},
        )  # fmt: skip
    return found


def decode_cases() -> list[Case]:
    from r1fast.kernels import triton_paged_attention as paged

    found = []
    for dtype, head_dim in (("bf16", 64), ("bf16", 128), ("fp32", 64)):
        integers = "table context query_starts group_starts shared".split()
        types = dict.fromkeys([f"{name}_ptr" for name in integers], "*i32")
        types |= dict.fromkeys(("q_ptr", "keys_ptr", "values_ptr"), f"*{dtype}")
        types |= dict.fromkeys(("m_ptr", "l_ptr", "a_ptr"), "*fp32") | {"scale": "fp32"}
        for is_shared in (True, False):
            tile = paged.TILES[2 if dtype == "bf16" else 4, is_shared]
            constants = {
                "H": 28, "K": 4, "Dh": head_dim, "BLOCK_SIZE": 16, "SHARED": is_shared,
                "ONE_QUERY": True, "SPLIT": paged.SPLIT, "UPCAST": False,
                "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
                **dict(zip(("BLOCK_M", "BLOCK_N"), tile, strict=True)),
                "BLOCK_D": head_dim, "BLOCK_G": 32,
            }  # fmt: skip
            found += on_every_chip(
                "triton_paged_attention", "_partial_kernel",
                f"{dtype}-{head_dim}-{'shared' if is_shared else 'own'}", types, constants,
            )  # fmt: skip
        found += on_every_chip(
            "triton_paged_attention", "_merge_kernel", f"{dtype}-{head_dim}",
            dict.fromkeys(("m_ptr", "l_ptr", "a_ptr"), "*fp32") | {"out_ptr": f"*{dtype}"},
            {"Dh": head_dim, "BLOCK_D": head_dim}, options={"num_warps": 1},
        )  # fmt: skip
    types = {f"{name}_ptr": "*bf16" for name in ("k", "v", "keys", "values")}
    return found + on_every_chip(
        "triton_paged_attention", "_write_kernel", "bf16-512", types | {"slots_ptr": "*i64"},
        {"WIDTH": 512, "BLOCK": 512}, ("stride_k", "stride_v"),
    )  # fmt: skip


def sample_cases() -> list[Case]:
    from r1fast.kernels import triton_sample

    block = {"BLOCK": triton_sample.BLOCK}
    sums = dict.fromkeys(("max_ptr", "s_ptr", "sz_ptr", "row_max_ptr"), "*fp32")
    double = dict.fromkeys(("row_s_ptr", "row_sz_ptr"), "*fp64")
    found = []
    for dtype in ("bf16", "fp32"):
        found += on_every_chip(
            "triton_sample", "_block_sums_kernel", dtype,
            {"logits_ptr": f"*{dtype}", "inv_temperature_ptr": "*fp32", "max_ptr": "*fp32",
             "s_ptr": "*fp32", "sz_ptr": "*fp32", "bad_ptr": "*i32"}, block,
        )  # fmt: skip
        found += on_every_chip(
            "triton_sample", "_draw_kernel", dtype,
            {"logits_ptr": f"*{dtype}", "u_ptr": "*fp64", "temperature_ptr": "*fp32",
             "inv_temperature_ptr": "*fp32", "max_ptr": "*fp32", "s_ptr": "*fp32",
             "row_max_ptr": "*fp32", "row_s_ptr": "*fp64", "tokens_ptr": "*i64"},
            block | {"BLOCKS": 256},
        )  # fmt: skip
    longs = ("step_ptr", "tokens_ptr", "positions_ptr", "slots_ptr", "out_tokens_ptr", "drawn_ptr")
    ints = ("context_ptr", "table_ptr")
    found += on_every_chip(
        "advance", "_advance_kernel", "256",
        dict.fromkeys(longs, "*i64") | dict.fromkeys(ints, "*i32")
        | dict.fromkeys(("out_logprobs_ptr", "logprobs_ptr"), "*fp32")
        | dict.fromkeys(("out_bad_ptr", "bad_ptr"), "*u8"),
        {"BLOCK_SIZE": 16, "BLOCK_R": 256},
    )  # fmt: skip
    return found + on_every_chip(
        "triton_sample", "_row_sums_kernel", "256",
        sums | double | {"bad_ptr": "*i32", "inv_temperature_ptr": "*fp64", "is_bad_ptr": "*i8"},
        {"BLOCKS": 256},
    )  # fmt: skip


def block_cases() -> list[Case]:
    """The blocks between a layer's products, at the widths of 1.5B to 70B models and of odd ones."""
    from r1fast.kernels import rms_norm, rope, swiglu

    found = []
    for dtype, width, flag in (("bf16", 1536, False), ("bf16", 8192, True), ("fp32", 8192, True)):
        x, block = f"*{dtype}", 1 << (width - 1).bit_length()
        options = {"num_warps": rms_norm._num_warps(block)}
        variant = f"{dtype}-{width}-{'sum' if flag else 'alone'}"
        names = ("x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "y_ptr")
        found += on_every_chip(
            "rms_norm", "_norm_fwd_kernel", variant, dict.fromkeys(names, x) | {"eps": "fp32"},
            {"HAS_DELTA": flag, "BLOCK_D": block}, ("stride_x", "stride_delta", "D"), options,
        )  # fmt: skip
        names = ("dy_ptr", "ds_ptr", "s_ptr", "weight_ptr", "dx_ptr")
        found += on_every_chip(
            "rms_norm", "_norm_bwd_kernel", variant,
            dict.fromkeys(names, x) | {"dweight_ptr": "*fp32", "eps": "fp32"},
            {"HAS_DS": flag, "BLOCK_D": block}, ("stride_dy", "stride_ds", "stride_s", "D"), options,
        )  # fmt: skip
    for dtype, head_dim, norm in (("bf16", 128, False), ("bf16", 128, True), ("fp32", 256, True)):
        x, blocks = f"*{dtype}", rope._blocks(head_dim)
        options = {"num_warps": blocks.pop("num_warps")}
        variant = f"{dtype}-{head_dim}{'-norm' * norm}"
        inputs = dict.fromkeys(("qkv_ptr", "q_weight_ptr", "k_weight_ptr"), x)
        inputs |= {"rotations_ptr": "*fp32", "eps": "fp32"}
        multiples = ("half", "stride")
        found += on_every_chip(
            "rope", "_rope_fwd_kernel", variant, inputs | dict.fromkeys(("q_ptr", "k_ptr"), x),
            {"NORM": norm, **blocks}, multiples, options,
        )  # fmt: skip
        names = ("dq_ptr", "dk_ptr", "dv_ptr", "dqkv_ptr")
        strides = tuple(f"stride_{of}{n}" for of in "qkv" for n in "th")
        found += on_every_chip(
            "rope", "_rope_bwd_kernel", variant,
            inputs | dict.fromkeys(names, x) | {"dweight_ptr": "*fp32"},
            {"NORM": norm, **blocks}, multiples + strides, options,
        )  # fmt: skip
    for dtype in ("bf16", "fp32"):
        x, block = f"*{dtype}", {"BLOCK_F": swiglu.BLOCK_F}
        found += on_every_chip(
            "swiglu", "_swiglu_fwd_kernel", dtype, dict.fromkeys(("gate_up_ptr", "y_ptr"), x),
            block, ("stride", "width"),
        )  # fmt: skip
        found += on_every_chip(
            "swiglu", "_swiglu_bwd_kernel", dtype,
            dict.fromkeys(("dy_ptr", "gate_up_ptr", "dgate_up_ptr"), x), block,
            ("stride_dy", "stride", "width"),
        )  # fmt: skip
    return found


def shipped_kernels(folder: Path = KERNELS) -> set[tuple[str, str]]:
    """(module, name) of every @triton.jit function that no other one calls."""
    found = set()
    for path in folder.glob("*.py"):
        functions = [
            f for f in ast.walk(ast.parse(path.read_text(), str(path)))
            if isinstance(f, ast.FunctionDef)
            and any("jit" in ast.unparse(d) for d in f.decorator_list)
        ]  # fmt: skip
        called = {
            call.func.id
            for f in functions
            for call in ast.walk(f)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        }
        found |= {(path.stem, f.name) for f in functions if f.name not in called}
    return found


def compile_case(case: Case) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"r1fast.kernels.{case.module}"), case.kernel)
    unknown = (case.types.keys() | case.constants.keys()) - set(kernel.arg_names)
    assert not unknown, f"{case.id}: the kernel has no {unknown}, but {kernel.arg_names}"
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (n,): [["tt.divisibility", 16]]
        for n, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in case.multiples_of_16
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, case.constants, aligned),
        target=GPUTarget("cuda", case.arch, 32),
        options=case.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(part.split(":") for part in usage.split("\n")[-2].split() if ":" in part)
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(numbers["REG"]), "stack": int(numbers["STACK"]),
        "local": int(numbers["LOCAL"]), "shared": compiled.metadata.shared,
        "tensor_core": ptx.count(TENSOR_CORE[case.arch]),
        # Hopper: a step's products go on while the next one's are started
        "overlap": ptx.count("wgmma.wait_group.sync.aligned 1"),
        "wide_loads": len(re.findall(r"ld\.global[\w:.]*\.v4", ptx)),
        "wide_stores": len(re.findall(r"st\.global[\w:.]*\.v4", ptx)),
    }  # fmt: skip


def main() -> None:
    results = {}
    for case in cases():
        try:
            results[case.id] = compile_case(case)
        except Exception as error:
            results[case.id] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
