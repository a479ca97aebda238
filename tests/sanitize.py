"""`make test-sanitize`: csrc/ built with AddressSanitizer and UBSan in a folder of its own, and its tests, at each CPU level.

The package is looked at through a folder of links, in which only r1fast/_C is another: nothing of the normal build is
touched. Arguments go to pytest; R1FAST_CPU_LEVEL limits the levels to one.
"""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build/sanitize"
LEVELS = ("baseline", "avx2", "avx512")
ONCE = ("packing", "group_packing", "block_allocator", "tails")  # have one level
TESTS = (
    "fuzz_native", "cpu_attention", "prefix_attention", "paged_attention", "cpu_head", "linear", "sample", "rms_norm", "rope",
    "swiglu", "native_forward", "decode_loop", "rollout_cache",
)  # fmt: skip
PYTEST = (
    "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib",
    # none of C++; seconds, and bits, of an optimised build
    "-k", "not triton and not in_under_two_seconds and not in_time and not for_a_slot and not rounds_where",
)  # fmt: skip
OPTIONS = {
    # Python's own memory at its end is no leak of ours; a stack that is used after its return costs little
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "OMP_NUM_THREADS": "2",  # more than one thread, so that what they share is looked at
    "GOMP_SPINCOUNT": "10000",
}


def build() -> Path:
    """The folder that holds the package with the sanitized extension."""
    import pybind11

    package = BUILD / "tree/r1fast"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "r1fast").iterdir():
        link = package / path.name
        if not (path.name.startswith("_C.") and path.suffix == ".so") and not link.is_symlink():
            link.symlink_to(path)
    options = {
        "CMAKE_BUILD_TYPE": "None", "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package, "R1FAST_SANITIZE": "ON",
        "PYBIND11_FINDPYTHON": "ON", "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }  # fmt: skip
    flags = [f"-D{key}={value}" for key, value in options.items()]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for command in (
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, *flags],
        ["cmake", "--build", BUILD],
    ):
        done = subprocess.run(
            command, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return package.parent


def runtime() -> str:
    """What must be loaded before Python: the sanitizer, and libstdc++, whose exceptions it looks at."""
    cache = (BUILD / "CMakeCache.txt").read_text()
    compiler = next(
        line.partition("=")[2]
        for line in cache.splitlines()
        if line.startswith("CMAKE_CXX_COMPILER:")
    )
    names = [f"libclang_rt.asan-{platform.machine()}.so", "libclang_rt.asan.so", "libasan.so"]
    found = []
    for name in (*names, "libstdc++.so.6"):
        said = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if os.path.isabs(said) and (name == "libstdc++.so.6" or not found):
            found.append(os.path.realpath(said))
    if len(found) < 2:
        sys.exit(
            f"{compiler} has no library of AddressSanitizer: install libasan, or compiler-rt for clang"
        )
    return ":".join(found)


def main() -> None:
    start = time.monotonic()
    tree = build()
    print(f"built in {time.monotonic() - start:.0f} s", flush=True)
    env = os.environ | OPTIONS | {"LD_PRELOAD": runtime(), "PYTHONPATH": str(tree)}
    asked = os.environ.get("R1FAST_CPU_LEVEL")
    env.pop("R1FAST_CPU_LEVEL", None)
    probe = "import r1fast._C as C; print(C.cpu_level(), C.__file__)"
    best, file = subprocess.run(
        [sys.executable, "-c", probe],
        env=env,
        cwd=BUILD,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    assert Path(file).is_relative_to(tree), file
    levels = [asked] if asked else LEVELS[: LEVELS.index(best) + 1][::-1]
    for level in levels:
        start = time.monotonic()
        names = (*ONCE, *TESTS) if level == levels[0] else TESTS
        files = [str(ROOT / f"tests/test_{name}.py") for name in names]
        if any(not word.startswith("-") for word in sys.argv[1:]):  # files of the caller's
            files = []
        done = subprocess.run(
            [sys.executable, *PYTEST, *sys.argv[1:], *files],
            env=env | {"R1FAST_CPU_LEVEL": level},
            cwd=ROOT / "tests",
        )
        print(f"{level}: {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
