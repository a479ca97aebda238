"""What is installed: pins that fit pyproject.toml, stubs that fit the extension, complete archives."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from r1fast import _C

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"not an exact pin: {line}"
            found[canonical(requirement.name)] = specifier.version
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_inside_its_supported_range():
    extras = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + extras["math"] + extras["dev"]:
        requirement = Requirement(line)
        version = pins().get(canonical(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt"
        assert version in requirement.specifier, f"{line}, but the pin is {version}"


def test_what_installed_packages_need_is_pinned_too():
    for name in pins():
        if name == "triton" and sys.platform != "linux":
            continue
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                known = canonical(needed.name) in pins() or needed.name.startswith(
                    ("nvidia", "cuda")
                )
                assert known, f"{name} needs {needed.name}, which constraints.txt does not pin"


def test_stub_names_every_function_and_argument_of_the_extension():
    """Methods too; of a class that inherits in the stub alone, those of its base."""
    body = ast.parse((ROOT / "r1fast/_C.pyi").read_text()).body
    public = {name: getattr(_C, name) for name in dir(_C) if not name.startswith("_")}
    stub = {n.name: n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert sorted(stub) == sorted(public)
    functions = [(n, public[n.name]) for n in body if isinstance(n, ast.FunctionDef)]
    for name, node in stub.items():
        if isinstance(node, ast.ClassDef):
            base = stub[node.bases[0].id] if node.bases else node
            methods = [m for m in base.body if isinstance(m, ast.FunctionDef)]
            functions += [(m, getattr(public[name], m.name)) for m in methods]
            attributes = {a.target.id for a in base.body if isinstance(a, ast.AnnAssign)}
            named = {m.name for m in methods} | attributes
            real = {n for n in dir(public[name]) if not n.startswith("_")} - {"name", "value"}
            assert named - {"__init__"} == real, name
    for node, function in functions:
        signature = inspect.getdoc(function).splitlines()[0]
        arguments = [argument.arg for argument in node.args.args if argument.arg != "self"]
        found = [a for a in re.findall(r"[(,] ?(\w+):", signature) if a != "self"]
        assert found == arguments, signature


def test_ci_runs_the_tests():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    assert "make test" in script.read_text()


@pytest.mark.slow
def test_sdist_builds_a_complete_wheel(tmp_path):
    tree = tmp_path / "tree with a space"
    skip = shutil.ignore_patterns(
        ".*", "build", "runs", "dist", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skip)

    run(tree, f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not (unpacked / "r1fast/kernels").is_symlink()

    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    run(unpacked, code, CMAKE_BUILD_TYPE="Debug")  # all is there, and quickly compiled
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        path.relative_to(tree).as_posix()
        for folder in ["r1fast", "r1fast/kernels"]
        for path in (tree / folder).rglob("*.py*")
        if "__pycache__" not in path.parts
    }
    missing = (sources | {"r1fast/py.typed"}) - names
    assert not missing
    assert any(re.fullmatch(r"r1fast/_C\..*so", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    stray = {n for n in names if not n.startswith("r1fast/") and ".dist-info/" not in n}
    assert not stray, "the wheel must only install r1fast"


def run(folder: Path, code: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
